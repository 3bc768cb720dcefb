"""The images of report.html: image | label | prediction | errors, as WebP inside the page."""

import base64
import math
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from fcn.datasets import SegmentationDataset
from fcn.evaluation import Result
from fcn.visualize import VOID_COLOUR, Palette

STEPS = ((480, 82), (400, 76), (320, 70), (240, 60), (160, 50), (96, 35))  # long side, WebP quality
ERRORS = ((229, 62, 48),)  # colour of wrong pixels
ERRORS_OF_TWO = ((236, 150, 20), (44, 132, 236), (200, 50, 190))  # only A's, only B's, both's


def text(value: Any) -> str:
    """Escaped, for elements and for attributes in double quotes."""
    return escape(str(value), quote=True)


def absent(value: float | None) -> bool:
    return value is None or math.isnan(value)


def percent(value: float | None, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:{sign}.1f}".replace("-", "−")


def change(value: float) -> str:
    """A difference of scores, in the colour of better or worse."""
    kind = "up" if value >= 5e-4 else "down" if value <= -5e-4 else "soft"
    return f'<span class="{kind}">{percent(value, "+")}</span>'


def chip(colour: Sequence[int]) -> str:
    r, g, b = colour
    return f'<i class="chip" style="background:rgb({r},{g},{b})"></i>'


def lettered(results: Sequence[Result]) -> Iterator[tuple[str, Result]]:
    """Each result with the letter that it is called by, where there are two."""
    return zip(("A", "B") if len(results) > 1 else ("",), results, strict=True)


def choose(scores: Sequence[float], wanted: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of the lowest, the middle and the highest scores, none twice, NaN never."""
    order = sorted((i for i, s in enumerate(scores) if not math.isnan(s)), key=lambda i: scores[i])
    wanted = min(wanted, len(order))
    low, high = (wanted + 2) // 3, (wanted + 1) // 3
    middle = wanted - low - high
    start = min(max((len(order) - middle) // 2, low), len(order) - high - middle)
    return order[:low], order[start : start + middle], order[len(order) - high :][::-1]


def shots(
    results: Sequence[Result],
    data: SegmentationDataset,
    palette: Palette,
    *,
    wanted: int,
    budget: int,
) -> str:
    """HTML of the chosen images, at most `budget` bytes of it: with many, pictures get smaller."""
    two = len(results) > 1
    miou = np.array([[row[2] for row in r.images.rows] for r in results])  # (results, N)
    groups = choose((miou[-1] - miou[0] if two else miou[0]).tolist(), wanted)
    chosen = sum(map(len, groups))
    if not chosen:
        return "<p>None are shown: the setting is report.images.</p>"
    budget -= 4000  # for what is around the images
    share, shown, html = budget // chosen, 0, ""
    titles = ("B loses most", "Median", "B gains most") if two else ("Worst", "Median", "Best")
    for title, group in zip(titles, groups, strict=True):
        part = ""
        for index in group:
            shot = Shot(results, data, palette, index)
            html_of_one = next(
                (h for h in (shot.html(*step) for step in STEPS) if len(h) <= share), ""
            )
            part += html_of_one
            shown += html_of_one != ""
        html += f'<h3>{title}</h3><div class="shots">{part}</div>' if part else ""
    rank = (
        "by how the mean IoU of the image changes from A to B. A slider moves the border between "
        "A's prediction, to its left, and B's."
        if two
        else "by the mean IoU of the image alone, over the classes in its label or prediction. "
        "A slider lays the prediction over its image."
    )
    less = f" {chosen - shown} more do not fit into 20 MB." if shown < chosen else ""
    return (
        f"<p>{shown} of {len(data.ids)}, ranked {rank}{less}</p>"
        f'<label class="every">all sliders <input type="range" id="every" min="0" max="100" '
        f'value="{50 if two else 0}"></label>{html}'
    )


class Shot:
    """One image with its label and predictions.

    The page holds each picture once: where it is shown again, under errors or over the image,
    the script copies it (`data-copy`). Class 0 is clear, so that a prediction can lie on top.
    """

    def __init__(
        self,
        results: Sequence[Result],
        data: SegmentationDataset,
        palette: Palette,
        index: int,
    ) -> None:
        sample = data[index]
        self.index, self.palette, self.void = index, palette, data.void
        self.name, self.classes = text(data.ids[index]), [text(_brief(c)) for c in data.classes]
        self.photo = sample["image"].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
        self.mask = mask = sample["mask"].numpy()  # (H, W)
        self.letters = [letter for letter, _ in lettered(results)]
        self.predictions = [r.images.prediction(index, mask.shape) for r in results]
        self.scores = [r.images.rows[index][1:] for r in results]  # pixel accuracy, mean IoU
        wrong = sum((p != mask).astype(np.uint8) << i for i, p in enumerate(self.predictions))
        self.wrong = np.where(mask == self.void, self.void, wrong).astype(np.uint8)  # 0 to 3
        self.colours = np.zeros((256, 4), np.uint8)  # RGBA
        self.colours[1 : len(palette), :3], self.colours[1 : len(palette), 3] = palette[1:], 255
        self.colours[self.void] = (*VOID_COLOUR, 255)

    def html(self, side: int, quality: int) -> str:
        """A figure, its pictures at most `side` pixels long."""
        two, name, source = len(self.letters) > 1, self.name, f"i{self.index}"
        at, what = (50, "the border of A and B") if two else (0, "the prediction")
        photo = webp(self.photo, f"photograph {name}", source, side, quality=quality, method=4)
        overs = [_copy(f"{source}p{x}", f"over {x}".strip()) for x in self.letters]
        panels = (
            '<div class="panel"><small>image</small><div class="stage wipes" '
            f'style="--at:{at}%">{photo}{"".join(overs)}</div><input type="range" min="0" '
            f'max="100" value="{at}" aria-label="Lay {what} over {name}"></div>'
        )
        r, g, b = self.palette[0]
        shown = [("label", self.mask, "m")]
        for letter, prediction in zip(self.letters, self.predictions, strict=True):
            shown.append((f"prediction {letter}".strip(), prediction, f"p{letter}"))
        for title, classes, key in shown:
            alt = f"{title} of {name}: {self.shares(classes)}"
            picture = webp(classes, alt, source + key, side, colours=self.colours)
            panels += f'<div class="panel"><small>{title}</small><div class="stage" style='
            panels += f'"background:rgb({r},{g},{b})">{picture}</div></div>'
        colours, words = (ERRORS_OF_TWO, ("only A", "only B", "both")) if two else (ERRORS, ("",))
        marks = np.zeros((256, 4), np.uint8)
        marks[1 : 1 + len(colours), :3], marks[1 : 1 + len(colours), 3] = colours, 255
        marks[self.void] = (128, 128, 128, 150)
        counts = np.bincount(self.wrong[self.mask != self.void], minlength=4)
        shares = [percent(n / max(1, counts.sum())) for n in counts[1:].tolist()]
        parts = [f"{w} wrong {s} %".strip() for w, s in zip(words, shares, strict=False)]
        picture = webp(
            self.wrong, f"errors in {name}: {', '.join(parts)}", source + "e", side, colours=marks
        )
        panels += '<div class="panel"><small>errors</small><div class="stage">'
        panels += f"{_copy(source, 'under')}{picture}</div></div>"
        legend = [chip(c) + part for c, part in zip(colours, parts, strict=True)]
        return (
            f'<figure class="card"><figcaption><b>{name}</b>{self.caption()}</figcaption><div '
            f'class="panels">{panels}</div>{self.legend(legend)}</figure>'
        )

    def caption(self) -> str:
        told = "".join(
            f'<span><b class="{x}">{x}</b> mean IoU <b>{percent(miou)} %</b>, pixel accuracy '
            f"{percent(accuracy)} %</span>"
            for x, (accuracy, miou) in zip(self.letters, self.scores, strict=True)
        )
        if len(self.scores) > 1:
            told += f"<span>change {change(self.scores[1][1] - self.scores[0][1])}</span>"
        return told

    def legend(self, more: Sequence[str]) -> str:
        """The classes that occur, void if it does, and `more`."""
        found = np.unique(np.stack([self.mask, *self.predictions])).tolist()
        entries = [chip(self.palette[k]) + self.classes[k] for k in found if k != self.void]
        entries += [chip(VOID_COLOUR) + "void"] * (self.void in found) + list(more)
        return f'<div class="legend">{"".join(f"<span>{e}</span>" for e in entries)}</div>'

    def shares(self, classes: np.ndarray) -> str:
        """The five largest classes in words, for those who do not see the picture."""
        counts = np.bincount(classes[classes != self.void], minlength=len(self.classes))
        largest = [k for k in counts.argsort()[::-1][:5].tolist() if counts[k]]
        parts = [f"{self.classes[k]} {100 * counts[k] / counts.sum():.0f} %" for k in largest]
        return ", ".join(parts) or "void"


def webp(
    pixels: np.ndarray,
    alt: str,
    ident: str,
    side: int,
    *,
    colours: np.ndarray | None = None,
    **options: int,
) -> str:
    """An <img> of a photograph (H, W, 3), or of numbers (H, W) that have `colours` (256, 4)."""
    picture = Image.fromarray(pixels)
    scale = min(1, side / max(picture.size))
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    buffer = BytesIO()
    if colours is None:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
        picture.save(buffer, "WEBP", **options)
    else:
        small = np.asarray(picture.resize(size, Image.Resampling.NEAREST))
        Image.fromarray(colours[small]).save(buffer, "WEBP", lossless=True, quality=50, method=3)
    code = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img id="{ident}" loading="lazy" decoding="async" width="{size[0]}" height="{size[1]}" '
        f'alt="{alt}" src="data:image/webp;base64,{code}">'
    )


def _copy(ident: str, kind: str) -> str:
    return f'<img class="{kind}" alt="" aria-hidden="true" data-copy="{ident}">'


def _brief(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:59]}…"
