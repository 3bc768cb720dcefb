"""report.html: what it holds, that nothing breaks out of it, its size, and itself in a browser."""

import io
import math
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from fcn.datasets import Sample
from fcn.datasets.voc2012 import VOC2012, voc_palette
from fcn.evaluation import report
from fcn.evaluation.boundaries import boundary_miou
from fcn.evaluation.folder import write_folder
from fcn.evaluation.report import run_name, write_report
from fcn.evaluation.report_images import choose_images
from fcn.evaluation.result import Result
from fcn.evaluation.scores import ImageScores
from fcn.metrics import segmentation_scores

pytestmark = pytest.mark.xdist_group("report")  # one worker draws the pages and starts the browser

VOID_TAGS = {"meta", "link", "img", "input", "path", "circle", "polyline"}


class FakeData:
    """Pictures of noise, with a square of a class within a rectangle of void."""

    void = 255

    def __init__(self, classes: Sequence[str], ids: Sequence[str], size: int = 60) -> None:
        self.classes, self.ids, self.size = tuple(classes), list(ids), size
        self.palette = voc_palette(len(self.classes))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        shape = (self.size, self.size + 20)
        image = np.random.default_rng(index).integers(0, 256, (3, *shape), np.uint8)
        mask = np.zeros(shape, np.uint8)
        mask[10:30, 10:40] = 255
        mask[12:28, 12:38] = 1 + index % (len(self.classes) - 1)
        return {
            "image": tv_tensors.Image(torch.from_numpy(image)),
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "id": self.ids[index],
        }

    def scored(self, seed: int = 0, *, void: bool = False, **metrics: Any) -> Result:
        """A network that is right, but for a stripe that grows from image to image.

        Args:
            void: the labels are void everywhere, so that there is nothing to judge.
        """
        scores, k = ImageScores(keep=True), len(self.classes)
        for i in range(len(self)):
            mask = self[i]["mask"].numpy()
            prediction = np.where(mask == 255, 0, mask).astype(np.uint8)
            prediction[:, : 1 + (i * (seed + 3)) % self.size] = (i + seed) % k
            scores.add(self.ids[i], np.full_like(mask, 255) if void else mask, prediction, k, 255)
        confusion = torch.from_numpy(scores.bands.sum(0))
        numbers: dict[str, Any] = dict(segmentation_scores(confusion))
        numbers["iou"] = dict(zip(self.classes, numbers["iou"], strict=True))
        numbers |= {"boundary_miou": boundary_miou(scores.bands), "images": len(self), "loss": 0.5}
        numbers |= {"images_per_second": 2.0, "split": "val", "step": 7, "precision": "32-true"}
        numbers |= {"checkpoint": f"runs/fcn8s/day_{seed}/checkpoints/best.ckpt", "device": "cpu"}
        numbers |= {"tta": {"flip": False, "scales": [1]}, "tile": None, "date": "2026-01-31 12:00"}
        numbers |= {"data": {"dataset": {"class": "x.Y"}, "root": "data"}, "git_revision": "abc"}
        return Result(numbers | {"versions": {"torch": "2.9"}} | metrics, confusion, scores)


class Page(HTMLParser):
    """The elements of a page: every one is closed where it must be, or parsing fails."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.source = path, path.read_bytes().decode("ascii")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        self.open += [tag] * (tag not in VOID_TAGS)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID_TAGS or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] not in (["style"], ["script"]) else ""

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        found = (a for name, a in self.elements if name == tag)
        return [a for a in found if not kind or kind in a.get("class", "").split()]

    def rows(self) -> list[str]:
        """The HTML of each row of the first table, that of the classes."""
        return self.source.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]


def written(
    path: Path, data: FakeData, *results: Result, images: int = 6, command: str = "python x"
) -> Page:
    write_report(path, results or [data.scored()], data, images=images, command=command)
    return Page(path)


def numbered(n: int) -> list[str]:
    return [f"image_{i:03d}" for i in range(n)]


VOC = FakeData(VOC2012.classes, numbered(15))  # so that some classes do not occur


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Page]:
    """An evaluation and a comparison."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one #1?", "two")]
    one = written(folders[0] / "report.html", VOC, command="python evaluate.py 'ckpt=a b'")
    return one, written(folders[1] / "report.html", VOC, VOC.scored(0), VOC.scored(1))


def sortable(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def test_contents(pages: tuple[Page, Page]) -> None:
    page, metrics = pages[0], VOC.scored().metrics
    for name in ("pixel_acc", "mean_acc", "miou", "fwiou"):
        assert f"{100 * metrics[name]:.1f} %" in page.text
    assert "Void pixels (label 255) are ignored" in page.text
    facts = ("python evaluate.py 'ckpt=a b'", "best.ckpt", "val", "15", "torch 2.9", "abc")
    for fact in (*facts, "2026-01-31 12:00"):
        assert fact in page.text
    assert len(page.all("figure")) == 6
    assert re.findall(r"(Worst|Median|Best)", page.text) == ["Worst", "Median", "Best"]
    for width, value in metrics["boundary_miou"].items():
        assert f"{width} px{100 * value:.1f}" in page.text
    names = [re.search(r'data-v="(\w+)" title', row)[1] for row in page.rows()]  # type: ignore[index]
    assert names == list(VOC.classes)
    ious = [re.findall(r'<td data-v="([^"]*)"', row)[0] for row in page.rows()]
    assert ious == [sortable(iou) for iou in metrics["iou"].values()]


def test_comparison(pages: tuple[Page, Page]) -> None:
    page = pages[1]
    assert "B loses most" in page.text
    assert len(page.all("figure")) == 6
    alts = [a["alt"] for a in page.all("img") if "src" in a]
    for letter in "AB":
        assert sum(alt.startswith(f"prediction {letter}") for alt in alts) == 6
    values = [tuple(re.findall(r'<td data-v="([^"]*)"', row)[:3]) for row in page.rows()]
    ious = zip(*(VOC.scored(seed).metrics["iou"].values() for seed in (0, 1)), strict=True)
    assert values == [(sortable(a), sortable(b), sortable(b - a)) for a, b in ious]
    assert len(page.all("table", "heat")) == 2


def test_one_file_without_network(pages: tuple[Page, Page]) -> None:
    page = pages[0]
    texts = re.sub(r"base64,[^\"]*", "", page.source)  # pictures may hold anything
    assert re.findall(r"https?://|//[\w.]+/|@import|url\(", texts) == []
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "poster"):
            value = attributes.get(key, "data:")
            assert value.startswith(("data:", "#")), (tag, key)
    assert "content=\"default-src 'none'; " in page.source
    shown = [a for a in page.all("img") if "src" in a]
    assert len(shown) == 6 * 4
    for image in shown:
        assert image["alt"]
        assert image["loading"] == "lazy"
    assert list(page.path.parent.iterdir()) == [page.path]


def test_pictures_show_what_they_say(tmp_path: Path) -> None:
    """The errors of the worst image, counted in the picture, are those of its caption."""
    data = FakeData(("ground", "cat", "dog"), numbered(5))
    page = written(tmp_path / "report.html", data, images=1)
    errors = next(a for a in page.all("img") if a.get("alt", "").startswith("errors"))
    picture = Image.open(io.BytesIO(b64decode(errors["src"].partition(",")[2]))).convert("RGBA")
    pixels = np.asarray(picture).reshape(-1, 4)  # (80 * 60, 4)
    wrong = (pixels == (229, 62, 48, 255)).all(1).sum()
    void = (pixels[:, 3] == 150).sum()
    assert void == 20 * 30 - 16 * 26
    stated = float(re.search(r"wrong ([\d.]+) %", errors["alt"])[1])  # type: ignore[index]
    assert 100 * wrong / (len(pixels) - void) == pytest.approx(stated, abs=0.06)


HOSTILE = (
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>'",
    "two\nlines\tand a tab",
    "Straße 東京 🦒 ‮rtl",
    "x" * 3000,
    "lone \udcff surrogate",
    "&amp; $body ${title} %s {0} \\",
    "<!--",
)


def test_nothing_breaks_out(tmp_path: Path) -> None:
    data = FakeData(HOSTILE, HOSTILE)
    result = data.scored(checkpoint=f"runs/{HOSTILE[0]}/{HOSTILE[1]}/checkpoints/best.ckpt")
    result.metrics |= {"split": HOSTILE[0], "git_revision": HOSTILE[1], "device": HOSTILE[7]}
    page = written(tmp_path / "report.html", data, result, command=HOSTILE[0] + HOSTILE[1])
    plain = written(tmp_path / "plain.html", FakeData(list("abcdefgh"), numbered(8)))
    for tag in ("script", "img", "figure", "td", "th"):
        assert len(page.all(tag)) == len(plain.all(tag)), tag
    assert not any("onerror" in a for _, a in page.elements)
    titles = {a["title"] for a in page.all("th", "name") if "title" in a}
    assert titles == {name.replace("\udcff", "�") for name in HOSTILE} or titles == set(HOSTILE)
    assert "{{" not in plain.source
    both = written(tmp_path / "both.html", data, result, data.scored(1))
    assert len(both.all("script")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "figures", "largest"), [(100_000, 6, 180), (20_000, 6, 160), (4_000, 0, 0)]
)
def test_stays_below_its_limit(
    room: int, figures: int, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise does not compress: pictures get smaller, then fewer, and the page says so."""
    data, path = FakeData(VOC2012.classes, numbered(6), size=160), tmp_path / "report.html"
    written(path, data, images=0)
    monkeypatch.setattr(report, "LARGEST", path.stat().st_size + 6 * room)
    page = written(path, data, images=400)
    assert path.stat().st_size <= report.LARGEST < 20e6
    assert len(page.all("figure")) == figures
    assert max((int(a.get("width", 0)) for a in page.all("img")), default=0) == largest
    assert ("6 more do not fit" in page.text) == (figures == 0)


def test_many_classes_and_no_pictures(tmp_path: Path) -> None:
    data = FakeData([f"class {k}" for k in range(40)], numbered(4))
    page = written(tmp_path / "report.html", data, images=0)
    assert len(page.all("table", "dense")) == 1
    assert page.source.count("<td") > 40**2
    assert page.path.stat().st_size < 3e5
    assert page.all("figure") == []
    assert "report.images" in page.text


def test_nothing_to_judge(tmp_path: Path) -> None:
    data = FakeData(("ground", "cat"), numbered(3))
    result = data.scored(void=True)
    assert all(math.isnan(score) for _, *scores in result.images.rows for score in scores)
    assert all(map(math.isnan, result.metrics["boundary_miou"].values()))
    page = written(tmp_path / "report.html", data, result)
    assert "nan" not in page.text
    assert "None are shown: no image has a score" in page.text
    assert "report.images" not in page.text
    assert len(page.all("table", "dense")) == 0


def test_choice_of_images() -> None:
    scores = [0.5, math.nan, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6]  # sorted: 2 6 4 8 0 9 5 7 3
    assert choose_images(scores, 3) == ([2], [0], [3])
    assert choose_images(scores, 1) == ([2], [], [])
    assert choose_images([math.nan], 12) == ([], [], [])
    for wanted in range(14):
        groups = choose_images(scores, wanted)
        every = [i for group in groups for i in group]
        assert len(every) == len(set(every)) == min(wanted, 9)
        assert all(scores[i] == s for i, s in zip(groups[0], sorted(scores[2:]), strict=False))


def test_names_of_runs() -> None:
    assert run_name(Path("/x/runs/fcn8s/2026-01-31/checkpoints/best.ckpt")) == "fcn8s/2026-01-31"
    assert run_name(Path("/best.ckpt")) == "best.ckpt"
    assert run_name(Path("/x/export/best/model.safetensors")) == "best"


RUN, WEIGHTS = "/x/day/checkpoints", "model.safetensors"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ((f"{RUN}/best.ckpt", "/y/best.ckpt"), ("x/day", "best.ckpt")),
        ((f"{RUN}/best.ckpt", f"{RUN}/last.ckpt"), ("best.ckpt", "last.ckpt")),
        ((f"/A/out/best/{WEIGHTS}", f"/B/out/best/{WEIGHTS}"), ("A/out/best", "B/out/best")),
        ((f"/A/out/best/{WEIGHTS}", f"/A/out/last/{WEIGHTS}"), ("best", "last")),
        (("/A/best.onnx", "/B/best.onnx"), ("A/best.onnx", "B/best.onnx")),
        (("/A/best.onnx", "/A/best.onnx"), ("best.onnx", "best.onnx")),
    ],
)
def test_a_title_tells_two_checkpoints_apart(
    paths: tuple[str, str], names: tuple[str, str], tmp_path: Path
) -> None:
    data = FakeData(("ground", "cat"), numbered(1))
    results = [data.scored(seed, checkpoint=path) for seed, path in enumerate(paths)]
    page = written(tmp_path / "report.html", data, *results, images=0)
    assert f"<h1>{' against '.join(names)}</h1>" in page.source


def test_a_comparison_removes_only_what_an_evaluation_wrote(tmp_path: Path) -> None:
    """Of files in the folder that have the names of an evaluation's, the user's own are kept."""
    data, own = FakeData(("ground", "cat"), numbered(1)), tmp_path / "images.csv"
    results = [data.scored(0), data.scored(1)]
    own.write_text("own", encoding="utf-8")
    for _ in range(2):  # the second time, the folder holds a comparison
        write_folder(tmp_path, results, data, images=0, command="x")
        assert own.read_text(encoding="utf-8") == "own"
    (tmp_path / "metrics.json").write_text("[]", encoding="utf-8")  # another program's
    write_folder(tmp_path, results, data, images=0, command="x")
    assert own.read_text(encoding="utf-8") == "own"
    write_folder(tmp_path, results[:1], data, images=0, command="x")
    write_folder(tmp_path, results, data, images=0, command="x")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.html"}


# In a browser: Debian's chromium and chromium-driver, and selenium.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("chromium or chromium-driver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # as without a network
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def view(browser: Any, width: int, height: int, scheme: str = "light") -> np.ndarray:
    """What is on a screen of that size, in CSS pixels, with a colour scheme: (height, width, 3)."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    return pixels_of(browser.get_screenshot_as_png())


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


LOADED = """
for (const i of document.images) i.loading = 'eager';
return [...document.images].every(i => i.naturalWidth)
"""
TINY_TEXTS = """
return [...document.querySelectorAll('p, td, .tile')].filter(e =>
  parseFloat(getComputedStyle(e).fontSize) < 11).length
"""


@pytest.mark.slow
@pytest.mark.parametrize(("which", "start"), [(0, 0), (1, 50)])
def test_in_a_browser(browser: Any, pages: tuple[Page, Page], which: int, start: int) -> None:
    browser.get(pages[which].path.as_uri())
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120).until(lambda b: b.execute_script(LOADED))
    requests = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert all(name.startswith("data:") for name in browser.execute_script(requests))

    light, dark = (view(browser, 375, 812, scheme) for scheme in ("light", "dark"))  # a phone
    width = "return document.documentElement.scrollWidth"
    assert browser.execute_script(width) <= 375  # tables scroll inside their own box
    assert browser.execute_script(TINY_TEXTS) == 0
    assert light.mean() > 200
    assert dark.mean() < 80
    assert dark.std() > 5  # there is text on it

    assert len(np.unique(view(browser, 1200, 900).reshape(-1, 3), axis=0)) > 20
    panel = browser.find_element("css selector", "figure .panel")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
    slider = panel.find_element("css selector", "input")
    stage = panel.find_element("css selector", ".stage")
    assert slider.get_attribute("value") == str(start)
    before = pixels_of(stage.screenshot_as_png)
    slider.send_keys("\ue014" * 40)  # the right arrow key
    assert slider.get_attribute("value") == str(start + 40)
    assert (np.abs(pixels_of(stage.screenshot_as_png) - before) > 8).any()
    browser.find_element("id", "every").send_keys("\ue010")  # End: all the way, on all images
    sliders = browser.find_elements("css selector", ".panel input")
    assert {s.get_attribute("value") for s in sliders} == {"100"}
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_sorting_and_cells(browser: Any, pages: tuple[Page, Page]) -> None:
    browser.get(pages[0].path.as_uri())
    heads = browser.find_elements("css selector", "table.sort thead th")
    rows = "return [...document.querySelector('table.sort').tBodies[0].rows]"

    def click(index: int) -> tuple[list[str], str | None]:
        """The column in its new order, and what the heading says of it."""
        heads[index].find_element("tag name", "button").click()
        column = browser.execute_script(f"{rows}.map(r => r.cells[{index}].dataset.v)")
        return column, heads[1].get_attribute("aria-sort")

    ious = [iou for iou in VOC.scored().metrics["iou"].values() if not math.isnan(iou)]
    absent = [""] * (21 - len(ious))
    for down, order in ((True, "descending"), (False, "ascending")):  # those without one are last
        values = [*map(sortable, sorted(ious, reverse=down)), *absent]
        assert click(1) == (values, order)
    assert click(0) == (sorted(VOC.classes), None)

    cell = browser.find_elements("css selector", ".heat tbody tr:nth-child(3) td")[2]
    browser.execute_script("arguments[0].click()", cell)
    text = browser.find_element("css selector", ".cell-text").text
    assert re.fullmatch(r"bicycle predicted as bicycle: [\d.]+ % of .* \([\d,]+ of [\d,]+\)", text)
    assert browser.get_log("browser") == []
