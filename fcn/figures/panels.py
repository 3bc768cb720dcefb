"""Sheets of pictures in rows and columns, such as image | label | prediction | errors.

    sheet = draw_panels(rows, class_names=names, palette=palette, captions=["IoU 0.71", "IoU 0.45"])
    sheet.save("panels.png")

A picture is a tensor (3, H, W) uint8, a mask one of class indices (H, W).
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fcn.figures import masks
from fcn.figures.legend import (
    FONT_SIZE,
    TEXT_COLOUR,
    Entry,
    draw_legend,
    legend_entries,
    load_font,
    one_line,
)

Cell = tuple[Tensor, str]  # a picture (3, h, w) uint8, and the line of text below it

GAP, LINE = 10, 22  # pixels between pictures, and the height of a line of text
TITLE_SIZE = 15  # pixels
WIDTH = 240  # of a column, in pixels


def draw_panels(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    class_names: Sequence[str],
    palette: masks.Palette,
    void: int = masks.VOID,
    title: str,
    ids: Sequence[str],
    captions: Sequence[str],
) -> Image.Image:
    """A row of image | label | prediction | errors for each image, above a legend.

    The legend holds the classes that occur in these labels and predictions. Images keep their
    shape; a tall one is limited to a height of 1.5 times the width of its column.

    Args:
        rows: (image (3, H, W) uint8, label (H, W), prediction (H, W)), of any sizes.
        ids: a text below each image, such as its name.
        captions: a text below each prediction, such as its score.
    """
    cells: list[list[Cell]] = []
    found: set[int] = {void}  # void is always in the legend, since the error maps show it
    for row, name, caption in zip(rows, ids, captions, strict=True):
        _, label, prediction = row
        judged = label != void
        wrong = int(((label != prediction) & judged).sum())
        share = wrong / max(1, int(judged.sum()))
        found.update(masks.labels_in(label, prediction))
        image, label, prediction = (masks.resize_to_fit(x, WIDTH, WIDTH * 3 // 2) for x in row)
        cells.append(
            [
                (image, name),
                (masks.colourise(label, palette, void), ""),
                (masks.colourise(prediction, palette, void), caption),
                (masks.error_map(label, prediction, void), f"{100 * share:.1f} % wrong"),
            ]
        )
    return draw_sheet(
        cells,
        headings=("image", "label", "prediction", "errors: red; void: grey"),
        legend=legend_entries(found, class_names, palette, void),
        title=title,
    )


def draw_sheet(
    rows: Sequence[Sequence[Cell]],
    *,
    headings: Sequence[str],
    legend: Sequence[Entry],
    title: str = "",
    width: int = WIDTH,
) -> Image.Image:
    """Pictures in rows and columns with a text below each, and a legend below them all.

    Args:
        rows: pictures of any height, no wider than `width`; one for each heading.
        headings: of the columns.
        width: of a column, in pixels. Texts that are wider are cut.
    """
    font = load_font(FONT_SIZE)
    heights = [max(picture.shape[1] for picture, _ in row) + LINE + GAP for row in rows]
    lefts = [GAP + column * (width + GAP) for column in range(len(headings))]
    top = GAP + (LINE + 2 if title else 0)
    below = top + LINE + sum(heights)  # where the legend begins
    strip = draw_legend(legend, width=lefts[-1] + width + GAP)
    sheet = Image.new("RGB", (strip.width, below + strip.height + GAP), "white")
    draw = ImageDraw.Draw(sheet)

    draw.text((GAP, GAP - 2), title, TEXT_COLOUR, load_font(TITLE_SIZE))
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, top), _cut(heading, font, width), TEXT_COLOUR, font)
    top += LINE
    for row, height in zip(rows, heights, strict=True):
        for left, (picture, text) in zip(lefts, row, strict=True):
            sheet.paste(masks.to_pil(picture), (left, top))
            place = left, top + picture.shape[1] + 3
            draw.text(place, _cut(text, font, width), TEXT_COLOUR, font)
        top += height
    sheet.paste(strip, (0, below))
    return sheet


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a text as fits into a width in pixels, with an ellipsis where some is missing."""
    text = one_line(text, 200)
    while len(text) > 1 and font.getlength(text) > width:
        text = f"{text[:-2]}…"
    return text
