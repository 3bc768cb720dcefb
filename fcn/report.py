"""report.html: an evaluation, or two of them beside each other, as one file that needs no network.

    python evaluate.py ckpt=runs/.../checkpoints/best.ckpt report.images=60
    python evaluate.py compare=[runs/A,runs/B]

Texts, style and script are in report_template.html, pictures in report_images.py. Whatever comes
from outside (names of classes and images, paths, the command) is escaped, and the file is ASCII,
so that no editor or server can get its characters wrong.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from fcn.datasets import SegmentationDataset
from fcn.evaluation import Result
from fcn.report_images import absent, change, chip, lettered, percent, shots, text
from fcn.runs import atomic_write
from fcn.visualize import Palette

LARGEST = 19_500_000  # bytes of the file: below 20 MB however they are counted
DENSE = 32  # with more classes, cells of the confusion matrix are small and show no numbers


def write_report(
    path: Path,
    results: Sequence[Result],
    data: SegmentationDataset,
    palette: Palette,
    *,
    images: int,
    command: str,
) -> None:
    """Write one evaluation, or the comparison of two on the same images.

    Args:
        data: the images that were judged; those to show are read again.
        palette: a colour for each class.
        images: how many to show at most, a third each of the worst, the median and the best; as
            large as the limit on the file lets them be.
        command: that made this, as it was typed.
    """
    first = results[0].metrics
    names = [run_name(Path(r.metrics["checkpoint"])) for r in results]
    parts = {
        "title": text(" against ".join(names) if len(names) > 1 else f"Evaluation of {names[0]}"),
        "subtitle": f"{first['images']} images of {text(first['split'])}, {text(first['date'])}",
        "key": "".join(
            f'<div class="key"><b class="{x}">{x}</b> <code>{text(r.metrics["checkpoint"])}</code>'
            f"</div>"
            for x, r in lettered(results)
            if x
        ),
        "kind": "two" if len(results) > 1 else "",
        "columns": "The last column is of B."
        if len(results) > 1
        else "IoU: shared pixels out of those that label or prediction has. Accuracy (recall): "
        "found pixels out of the labelled. Precision: right pixels out of the predicted.",
        "classes": _classes(results, palette),
        "boundary": _curve(results) + _boundary_table(results),
        "confusion": "".join(_heat_maps(results)),
        "void": text(data.void),
        "facts": "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in _facts(results, command)),
    }
    for name in ("miou", "pixel_acc", "mean_acc", "fwiou"):
        a, *others = (r.metrics[name] for r in results)
        parts[name] = f"{percent(a)} %"
        for b in others:
            parts[name] = f'<span class="A">{percent(a)}</span> → <span class="B">{percent(b)}'
            parts[name] += f"</span> {change(b - a)}"
    page = Template(Path(__file__).with_name("report_template.html").read_text("ascii"))
    used = len(_ascii(page.substitute(parts, images="")))
    parts["images"] = shots(results, data, palette, wanted=images, budget=LARGEST - used)
    with atomic_write(path) as file:
        file.write(_ascii(page.substitute(parts)))


def _ascii(html: str) -> str:
    """All else as character references, lone surrogates too: file names need not be UTF-8."""
    return html.encode("ascii", "xmlcharrefreplace").decode("ascii")


def run_name(checkpoint: Path) -> str:
    """`<name>/<date_time>` of a run's checkpoint, or the file's own name."""
    parents = checkpoint.absolute().parents
    if parents[0].name == "checkpoints" and len(parents) > 3:
        return f"{parents[2].name}/{parents[1].name}"
    return checkpoint.name


def _ious(result: Result) -> np.ndarray:
    """(K,), NaN for absent classes."""
    return np.array(list(result.metrics["iou"].values()), np.float64)


def _classes(results: Sequence[Result], palette: Palette) -> str:
    """A row for each class; report_template.html sorts by `data-v`, empty ones last."""
    names = list(results[0].metrics["iou"])
    confusion = results[-1].confusion.double().cpu().numpy()  # (K, K)
    correct, labelled = confusion.diagonal(), confusion.sum(1)  # (K,)
    wrong = confusion - np.diag(correct)
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
        accuracy, precision = correct / labelled, correct / confusion.sum(0)
        share = labelled / labelled.sum()
    columns = {"IoU": _ious(results[0]), "accuracy": accuracy, "precision": precision}
    if len(results) > 1:
        a, b = map(_ious, results)
        columns = {"IoU, A": a, "IoU, B": b, "B − A": b - a}
    columns["of all pixels"] = share

    heads = ("class", *columns, "most often taken for")
    html = '<table class="list sort"><thead><tr>'
    for head in heads:
        kind = ' class="name"' if head in (heads[0], heads[-1]) else ""
        html += f'<th scope="col"{kind}{" data-up" if head == heads[0] else ""}>'
        html += f'<button type="button">{head}</button></th>'
    html += "</tr></thead><tbody>"
    for k, name in enumerate(names):
        html += f'<tr><th class="name" scope="row" data-v="{text(name)}" title="{text(name)}">'
        html += f"{chip(palette[k])}{text(name)}</th>"
        html += "".join(_cell(head, float(values[k])) for head, values in columns.items())
        other = int(wrong[k].argmax())
        part = wrong[k, other] / max(labelled[k], 1)
        told = f"{text(names[other])} {percent(part)}" if part else ""
        value = f"{part:.6f}" if part else ""
        html += f'<td class="name" data-v="{value}" title="{told}">{told}</td></tr>'
    return html + "</tbody></table>"


def _cell(head: str, value: float) -> str:
    if absent(value):
        return '<td data-v="">–</td>'
    if head == "B − A":
        return f'<td data-v="{value:.6f}">{change(value)}</td>'
    bar = "" if head == "of all pixels" else f' class="bar" style="--v:{value:.3f}"'
    return f'<td data-v="{value:.6f}"{bar}>{percent(value)}</td>'


def _curve(results: Sequence[Result]) -> str:
    """Mean IoU over the width of the band around boundaries, as SVG."""
    curves = [r.metrics["boundary_miou"] for r in results]
    known = [v for c in curves for v in c.values() if not absent(v)]
    if not known:
        return "<p>No label has a boundary.</p>"
    known += [r.metrics["miou"] for r in results]
    low, high = math.floor(min(known) * 10), math.ceil(max(known) * 10)  # tenths
    high = max(high, low + 1)
    widths = {
        w: 34 + 310 * math.log(int(w)) / math.log(int(max(curves[0], key=int))) for w in curves[0]
    }

    def y(value: float) -> float:
        return 186 - 170 * (10 * value - low) / (high - low)

    svg = '<svg viewBox="0 0 352 226" role="img" aria-label="Mean IoU in percent over the width of '
    svg += 'the band around boundaries, 1 to 40 pixels: the values are in the table beside it">'
    for tenth in range(low, high + 1):
        svg += f'<path class="grid" d="M34 {y(tenth / 10):.1f}H344"/>'
        svg += f'<text x="28" y="{y(tenth / 10) + 4:.1f}" text-anchor="end">{10 * tenth}</text>'
    for width, x in widths.items():
        svg += f'<text x="{x:.1f}" y="203" text-anchor="middle">{width}</text>'
    for (letter, result), curve in zip(lettered(results), curves, strict=True):
        points = [(widths[w], y(v)) for w, v in curve.items() if not absent(v)]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        colour = f"var(--{letter.lower()})" if letter else "rgb(var(--ok))"
        svg += f'<g style="stroke:{colour};fill:{colour}"><polyline class="line" points="{line}"/>'
        svg += "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in points)
        svg += f'<path class="all" d="M34 {y(result.metrics["miou"]):.1f}H344"/></g>'
    return f'{svg}<text x="189" y="222" text-anchor="middle">width of the band, pixels</text></svg>'


def _boundary_table(results: Sequence[Result]) -> str:
    heads = "".join(
        f'<th scope="col"><span class="{x}">{x}</span>{"" if x else "mean IoU"}, %</th>'
        for x, _ in lettered(results)
    )
    html = '<div class="scroll"><table class="list"><thead><tr><th class="name" scope="col">within'
    html += f"</th>{heads}</tr></thead><tbody>"
    curves = [r.metrics["boundary_miou"] | {"": r.metrics["miou"]} for r in results]
    for width in curves[0]:
        row = f"{width} px" if width else "all pixels"
        cells = "".join(f"<td>{percent(curve[width])}</td>" for curve in curves)
        html += f'<tr><th class="name" scope="row">{row}</th>{cells}</tr>'
    return html + "</tbody></table></div>"


def _heat_maps(results: Sequence[Result]) -> Iterator[str]:
    """Each confusion matrix as a table of coloured cells, and its pixels for the script."""
    for letter, result in lettered(results):
        names = [text(name) for name in result.metrics["iou"]]
        counts: list[list[int]] = result.confusion.tolist()
        heads = "".join(f'<th scope="col" title="{n}"><span>{n}</span></th>' for n in names)
        rows = ""
        for k, (name, row) in enumerate(zip(names, counts, strict=True)):
            cells = "".join(_heat(n / max(1, sum(row)), k == j) for j, n in enumerate(row))
            rows += f'<tr><th scope="row" title="{name}">{name}</th>{cells}</tr>'
        dense = " dense" if len(names) > DENSE else ""
        yield (
            f'<div class="card heatmap">{f"<b class={letter}>{letter}</b>" if letter else ""}'
            f'<div class="scroll"><table class="heat{dense}" data-counts="counts{letter}" '
            f'aria-label="Confusion matrix {letter}, rows normalised, in percent"><thead><tr><td>'
            f"</td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
            '<output class="pointed soft">Point at a cell, or tap it.</output></div>'
            f'<script type="application/json" id="counts{letter}">{json.dumps(counts)}</script>'
        )


def _heat(share: float, right: bool) -> str:
    depth = math.sqrt(share)
    kind = " ".join(["d"] * right + ["f"] * (depth > 0.62))
    number = f"{100 * share:.0f}" if share >= 0.005 else ""
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' style="--v:{depth:.2f}"' if share else ""
    return f"<td{attributes}>{number}</td>"


def _facts(results: Sequence[Result], command: str) -> Iterator[tuple[str, str]]:
    """What one needs to know to trust the numbers, or to make them again."""
    first = results[0].metrics
    yield "command", f"<code>{text(command)}</code>"
    for letter, result in lettered(results):
        m: dict[str, Any] = result.metrics
        yield (
            f"checkpoint {letter}",
            f"<code>{text(m['checkpoint'])}</code>, step {m['step']}; {text(m['precision'])} on "
            f"{text(m['device'])}, {m['images_per_second']:.2f} images a second, loss "
            f"{m['loss']:.4f}",
        )
    source = (first["data"].get("dataset") or {}).get("_target_")
    yield (
        "data",
        f"<code>{text(source)}</code>, root <code>{text(first['data'].get('root'))}</code>",
    )
    yield "split", text(first["split"])
    yield "images", f"{first['images']}, each at its own resolution"
    scales = ", ".join(map(str, first["tta"]["scales"]))
    mirrored = "and mirrored" if first["tta"]["flip"] else "not mirrored"
    tile = f"in tiles of {first['tile']} pixels" if first["tile"] else "as a whole"
    yield "test time", text(f"images {tile}, scales {scales}, {mirrored}")
    yield "versions", text(", ".join(f"{k} {v}" for k, v in first["versions"].items()))
    yield "code", f"<code>{text(first['git_revision'] or 'outside a git checkout')}</code>"
    yield "date", text(first["date"])
