"""Masks as pictures and their legends, pixel by pixel."""

import pytest
import torch
from PIL import Image

from fcn.datasets.voc2012 import VOC2012
from fcn.figures import masks
from fcn.figures.legend import draw_legend, legend_entries, one_line

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 128, 64)]
NAMES = ["background", "aeroplane", "potted plant"]


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    """All colours of an RGB picture."""
    return {colour for _, colour in picture.getcolors(2**24)}


def test_colourise() -> None:
    mask = torch.tensor([[0, 1, 2], [255, 2, 1]], dtype=torch.uint8)
    expected = [[*PALETTE], [masks.VOID_COLOUR, PALETTE[2], PALETTE[1]]]
    colours = masks.colourise(mask, PALETTE)
    assert colours.dtype == torch.uint8
    assert colours.permute(1, 2, 0).equal(torch.tensor(expected, dtype=torch.uint8))
    assert masks.colourise(mask.long(), PALETTE, void=2)[:, 0, 2].tolist() == list(
        masks.VOID_COLOUR
    )


def test_overlay_blends_every_value_as_float32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The background stays clear."""
    values = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256)  # each row has all of them
    labels = torch.arange(256)[:, None].expand(256, 256)  # each row has another label
    monkeypatch.setattr(masks, "ROWS_AT_ONCE", 37)  # parts of a large image fit together
    for alpha in (0, 0.6, 0.25, 1.0):
        blend = (1 - alpha) * values + alpha * masks.colourise(labels, VOC2012.palette)
        expected = torch.where(labels == 0, values, blend.round().to(torch.uint8))
        assert masks.overlay(values, labels.byte(), VOC2012.palette, alpha).equal(expected)


def test_overlay_colours_the_first_class_if_it_is_no_background() -> None:
    """CamVid's first class is the sky, in grey; a class in black stays clear."""
    image, mask = torch.full((3, 1, 2), 200, dtype=torch.uint8), torch.tensor([[0, 1]])
    result = masks.overlay(image, mask.byte(), [(100, 100, 100), (0, 0, 0)], alpha=0.5)
    assert result[0].tolist() == [[150, 200]]


def test_overlay_needs_no_copy_for_pillow() -> None:
    image, mask = torch.zeros(3, 4, 5, dtype=torch.uint8), torch.ones(4, 5, dtype=torch.uint8)
    result = masks.overlay(image, mask, PALETTE)
    assert result.permute(1, 2, 0).is_contiguous()
    assert masks.to_pil(result).getpixel((0, 0)) == (153, 0, 0)
    assert not image.any()  # it is not changed


def test_error_map() -> None:
    label = torch.tensor([[0, 1, 255], [2, 255, 1]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 2, 0], [2, 1, 0]])
    colours = masks.error_map(label, prediction).permute(1, 2, 0).tolist()
    correct, wrong, void = map(list, (masks.CORRECT, masks.WRONG, masks.IGNORED))
    assert colours == [[correct, wrong, void], [correct, void, wrong]]


def test_resize_to_fit() -> None:
    mask = torch.tensor([[0, 7], [255, 3]], dtype=torch.uint8)
    doubled = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert masks.resize_to_fit(mask, 4, 9).equal(doubled)
    assert masks.resize_to_fit(torch.zeros(3, 10, 1000, dtype=torch.uint8), 50, 50).shape == (
        3,
        1,
        50,
    )
    assert masks.resize_to_fit(torch.zeros(1000, 10, dtype=torch.uint8), 50, 50).shape == (50, 1)


def test_palette_image_keeps_the_labels() -> None:
    picture = masks.to_palette_image(torch.tensor([[0, 2], [255, 1]]), PALETTE)
    assert (picture.mode, list(picture.tobytes())) == ("P", [0, 2, 255, 1])
    assert picture.convert("RGB").getpixel((1, 0)) == PALETTE[2]


def test_legend_entries_of_the_labels_that_occur() -> None:
    found = masks.labels_in(torch.tensor([[2, 255]], dtype=torch.uint8), torch.tensor([[0, 2]]))
    assert found == [0, 2, 255]
    entries = [("background", PALETTE[0]), ("potted plant", PALETTE[2])]
    assert legend_entries(found, NAMES, PALETTE) == [*entries, ("void", masks.VOID_COLOUR)]
    assert legend_entries([2, 0], NAMES, PALETTE) == entries
    assert legend_entries([1, 0], NAMES, PALETTE, void=1)[1] == ("void", masks.VOID_COLOUR)


def test_legend_grows_with_its_entries_and_its_font() -> None:
    entries = legend_entries(range(3), NAMES, PALETTE)
    wide, narrow = (draw_legend(entries, width=width) for width in (600, 150))
    assert wide.width == 600
    assert narrow.height == 3 * wide.height  # a column of three
    assert draw_legend(entries, width=1200, font_size=26).height == 2 * wide.height
    assert draw_legend(entries, width=1).width > 60  # a name is never cut off
    assert draw_legend([("x" * 500, PALETTE[1])], width=1).width < 800
    assert draw_legend([], width=9).height == 0
    assert set(PALETTE) <= colours_in(wide)


def test_names_from_outside_are_one_line() -> None:
    assert one_line("a\nb\x1b[31m", 40) == "a b [31m"
    assert one_line("x" * 40, 40) == "x" * 40
    assert one_line("x" * 41, 40) == "x" * 39 + "…"
