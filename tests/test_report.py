"""report.html: what it holds, that nothing breaks out of it, its size, and itself in a browser."""

import io
import math
import re
import shutil
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
from fcn.evaluation.report import run_name, write_report
from fcn.evaluation.report_images import choose_images
from fcn.evaluation.result import Result
from fcn.evaluation.scores import ImageScores
from fcn.metrics import segmentation_scores

VOID_TAGS = {"meta", "link", "img", "input", "path", "circle", "polyline"}


class FakeData:
    """Pictures of noise or of a gradient, with a square of each class and a line of void."""

    void = 255

    def __init__(
        self, classes: Sequence[str], ids: Sequence[str], *, size: int = 60, noise: bool = False
    ) -> None:
        self.classes, self.ids = tuple(classes), list(ids)
        self.palette = voc_palette(len(self.classes))
        self.size, self.noise = size, noise

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        image = np.full((3, self.size, self.size + 20), 90, np.uint8)
        image[:, :, : 30 + index % 20] = 180
        if self.noise:
            image = rng.integers(0, 256, image.shape).astype(np.uint8)
        mask = np.zeros(image.shape[1:], np.uint8)
        mask[10:30, 10:40] = 255
        mask[12:28, 12:38] = 1 + index % (len(self.classes) - 1)
        if self.noise:
            mask[30:] = rng.integers(0, len(self.classes), mask[30:].shape)
        return {
            "image": tv_tensors.Image(torch.from_numpy(image)),
            "mask": tv_tensors.Mask(torch.from_numpy(mask)),
            "id": self.ids[index],
        }

    def scored(self, seed: int = 0, **metrics: Any) -> Result:
        """A network that is right, but for a stripe that grows from image to image."""
        scores = ImageScores(keep=True)
        k = len(self.classes)
        for i in range(len(self)):
            mask = self[i]["mask"].numpy()
            prediction = np.where(mask == 255, 0, mask).astype(np.uint8)
            prediction[:, : 1 + (i * (seed + 3)) % self.size] = (i + seed) % k
            scores.add(self.ids[i], mask, prediction, k, 255)
        confusion = torch.from_numpy(scores.bands.sum(0))
        numbers: dict[str, Any] = dict(segmentation_scores(confusion))
        numbers["iou"] = dict(zip(self.classes, numbers["iou"], strict=True))
        numbers |= {"boundary_miou": boundary_miou(scores.bands), "images": len(self), "loss": 0.5}
        numbers |= {"images_per_second": 2.0, "split": "val", "step": 7, "precision": "32-true"}
        numbers |= {"checkpoint": f"runs/fcn8s/day_{seed}/checkpoints/best.ckpt", "device": "cpu"}
        numbers |= {"tta": {"flip": False, "scales": [1]}, "tile": None, "date": "2026-01-31 12:00"}
        numbers |= {"data": {"dataset": {"class": "x.Y"}, "root": "data"}, "git_revision": "abc"}
        numbers |= {"versions": {"torch": "2.9"}}
        return Result(numbers | metrics, confusion, scores)


class Page(HTMLParser):
    """The elements of a page: every one is closed where it must be, or parsing fails."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.source = path.read_bytes().decode("ascii")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [
            a
            for t, a in self.elements
            if t == tag and (not kind or kind in a.get("class", "").split())
        ]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def written(
    path: Path, data: FakeData, *results: Result, images: int = 12, command: str = "python x"
) -> Page:
    write_report(path, results or [data.scored()], data, images=images, command=command)
    return Page(path)


def numbered(n: int) -> list[str]:
    return [f"image_{i:03d}" for i in range(n)]


def test_contents(tmp_path: Path) -> None:
    data = FakeData(VOC2012.classes, numbered(30))
    result = data.scored()
    page = written(tmp_path / "report.html", data, result, command="python evaluate.py 'ckpt=a b'")
    for name in ("pixel_acc", "mean_acc", "miou", "fwiou"):
        assert f"{100 * result.metrics[name]:.1f} %" in page.text
    assert "Void pixels (label 255) are ignored" in page.text
    for fact in ("python evaluate.py 'ckpt=a b'", "best.ckpt", "val", "30", "torch 2.9", "abc"):
        assert fact in page.text
    assert "2026-01-31 12:00" in page.text
    assert len(page.all("figure")) == 12
    assert re.findall(r"(Worst|Median|Best)", page.text) == ["Worst", "Median", "Best"]
    for width, value in result.metrics["boundary_miou"].items():
        assert f"{width} px{100 * value:.1f}" in page.text
    rows = page.source.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    assert [re.search(r'data-v="(\w+)" title', r)[1] for r in rows] == list(VOC2012.classes)  # type: ignore[index]
    for row, iou in zip(rows, result.metrics["iou"].values(), strict=True):
        value = re.findall(r'<td data-v="([^"]*)"', row)[0]
        assert value == ("" if math.isnan(iou) else f"{iou:.6f}")


def test_one_file_without_network(tmp_path: Path) -> None:
    data = FakeData(VOC2012.classes, numbered(9))
    page = written(tmp_path / "report.html", data)
    outside = re.findall(r"https?://|//[\w.]+/|@import|url\(", page.source)
    assert outside == []
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "poster"):
            value = attributes.get(key, "data:")
            assert value.startswith(("data:", "#")), (tag, key)
    policy = next(a["content"] for a in page.all("meta") if "content" in a and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    shown = [a for a in page.all("img") if "src" in a]
    assert len(shown) == 9 * 4
    for image in shown:
        assert image["alt"]
        assert image["loading"] == "lazy"
        assert image["src"].startswith("data:image/webp;base64,")
    copies = {a["data-copy"] for a in page.all("img") if "data-copy" in a}
    assert copies <= {a["id"] for a in shown}
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_show_what_they_say(tmp_path: Path) -> None:
    """The errors of the worst image, counted in the picture, are those of its caption."""
    from base64 import b64decode

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


@pytest.mark.parametrize("classes", [2, 40])
def test_number_of_classes(tmp_path: Path, classes: int) -> None:
    data = FakeData([f"class {k}" for k in range(classes)], numbered(4))
    page = written(tmp_path / "report.html", data)
    assert len(page.all("table", "heat")) == 1
    assert len(page.all("table", "dense")) == (classes > 32)
    assert page.source.count("<td") > classes**2
    assert (tmp_path / "report.html").stat().st_size < 3e5


@pytest.mark.slow
def test_stays_below_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise does not compress: pictures get smaller, then fewer, and the page says so."""
    data = FakeData(VOC2012.classes, numbered(6), size=160, noise=True)
    path, result = tmp_path / "report.html", data.scored()
    written(path, data, result, images=0)
    bare = path.stat().st_size
    counts, widths = [], []
    for limit in (report.LARGEST, bare + 6 * 28_000, bare + 6 * 4_000):
        monkeypatch.setattr(report, "LARGEST", limit)
        page = written(path, data, result, images=400)
        assert path.stat().st_size <= limit < 20e6
        counts.append(len(page.all("figure")))
        widths += [int(a["width"]) for a in page.all("img")[:1]]
    assert counts == [6, 6, 0]
    assert widths[0] == 180 > widths[1]
    assert "6 more do not fit" in page.text


def test_without_pictures_or_with_nothing_to_judge(tmp_path: Path) -> None:
    data = FakeData(("ground", "cat"), numbered(3))
    page = written(tmp_path / "report.html", data, images=0)
    assert page.all("figure") == []
    assert "report.images" in page.text
    scores = ImageScores(keep=True)
    empty = np.full((20, 20), 255, np.uint8)
    for name in data.ids:
        scores.add(name, empty, np.zeros_like(empty), 2, 255)
    nothing = {"miou": math.nan, "pixel_acc": math.nan, "mean_acc": math.nan, "fwiou": math.nan}
    nothing |= {"iou": dict.fromkeys(data.classes, math.nan)}
    nothing |= {"boundary_miou": boundary_miou(scores.bands)}
    result = data.scored(**nothing)
    result.images, result.confusion = scores, torch.zeros(2, 2, dtype=torch.long)
    assert "nan" not in written(tmp_path / "report.html", data, result).text


def test_comparison(tmp_path: Path) -> None:
    data = FakeData(VOC2012.classes, numbered(20))
    a, b = data.scored(0), data.scored(1)
    page = written(tmp_path / "report.html", data, a, b, images=6)
    assert "B loses most" in page.text
    assert len(page.all("figure")) == 6
    alts = [x["alt"] for x in page.all("img") if "src" in x]
    assert sum(x.startswith("prediction A") for x in alts) == 6
    assert sum(x.startswith("prediction B") for x in alts) == 6
    rows = page.source.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    values = [re.findall(r'<td data-v="([^"]*)"', row)[:3] for row in rows]
    for (iou_a, iou_b, difference), x, y in zip(
        values, a.metrics["iou"].values(), b.metrics["iou"].values(), strict=True
    ):
        if not math.isnan(x - y):
            assert (iou_a, iou_b) == (f"{x:.6f}", f"{y:.6f}")
            assert difference == f"{y - x:.6f}"
    assert len(page.all("table", "heat")) == 2


def test_choice_of_images() -> None:
    scores = [0.5, math.nan, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6]  # sorted: 2 6 4 8 0 9 5 7 3
    assert choose_images(scores, 3) == ([2], [0], [3])
    assert choose_images(scores, 1) == ([2], [], [])
    assert choose_images(scores, 0) == ([], [], [])
    assert choose_images([math.nan], 12) == ([], [], [])
    for wanted in range(14):
        groups = choose_images(scores, wanted)
        every = [i for group in groups for i in group]
        assert len(every) == len(set(every)) == min(wanted, 9)
        assert all(scores[i] == s for i, s in zip(groups[0], sorted(scores[2:]), strict=False))


def test_names_of_runs() -> None:
    assert run_name(Path("/x/runs/fcn8s/2026-01-31/checkpoints/best.ckpt")) == "fcn8s/2026-01-31"
    assert run_name(Path("/best.ckpt")) == "best.ckpt"


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


def view(browser: Any, width: int, height: int, scheme: str = "light") -> None:
    """A screen of that size, in CSS pixels, and its colour scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def screenshot(browser: Any) -> np.ndarray:
    """(H, W, 3) of what is on screen."""
    return np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An evaluation and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    data = FakeData(VOC2012.classes, numbered(30))
    one, two = folder / "one #1?.html", folder / "two.html"
    written(one, data)
    written(two, data, data.scored(0), data.scored(1))
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_in_a_browser(browser: Any, pages: tuple[Path, Path], which: int) -> None:
    view(browser, 1200, 900)
    browser.get(pages[which].as_uri())
    loaded = "for (const i of document.images) i.loading = 'eager'; "
    loaded += "return [...document.images].every(i => i.naturalWidth)"
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120).until(lambda b: b.execute_script(loaded))
    requests = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert all(name.startswith("data:") for name in browser.execute_script(requests))
    screen = screenshot(browser)
    assert len(np.unique(screen.reshape(-1, 3), axis=0)) > 20
    assert browser.get_log("browser") == []

    view(browser, 375, 812)  # a phone
    light = screenshot(browser)
    width = "return document.documentElement.scrollWidth"
    assert browser.execute_script(width) <= 375  # tables scroll inside their own box
    tiny = "return [...document.querySelectorAll('p, td, .tile')].filter(e => "
    tiny += "parseFloat(getComputedStyle(e).fontSize) < 11).length"
    assert browser.execute_script(tiny) == 0
    view(browser, 375, 812, "dark")
    dark = screenshot(browser)
    assert light.mean() > 200
    assert dark.mean() < 80
    assert dark.std() > 5  # there is text on it


@pytest.mark.slow
def test_sorting(browser: Any, pages: tuple[Path, Path]) -> None:
    browser.get(pages[0].as_uri())
    heads = browser.find_elements("css selector", "table.sort thead th")

    def column(index: int) -> list[str]:
        script = "return [...document.querySelector('table.sort').tBodies[0].rows].map(r => "
        return browser.execute_script(script + f"r.cells[{index}].dataset.v)")

    def click(index: int) -> list[str]:
        heads[index].find_element("tag name", "button").click()
        return column(index)

    original = column(0)
    assert original == list(VOC2012.classes)
    down = [float(v) for v in click(1) if v != ""]  # the highest first, absent last
    assert down == sorted(down, reverse=True)
    assert heads[1].get_attribute("aria-sort") == "descending"
    values = click(1)
    up = [float(v) for v in values if v != ""]
    assert up == sorted(up)
    assert values[len(up) :] == [""] * (len(values) - len(up))
    assert heads[1].get_attribute("aria-sort") == "ascending"
    assert click(0) == sorted(original)
    assert heads[1].get_attribute("aria-sort") is None
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_overlay_moves(browser: Any, pages: tuple[Path, Path]) -> None:
    view(browser, 1200, 900)
    for page, start in zip(pages, ("0", "50"), strict=True):
        browser.get(page.as_uri())
        panel = browser.find_element("css selector", "figure .panel")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", panel)
        slider = panel.find_element("css selector", "input")
        stage = panel.find_element("css selector", ".stage")
        assert slider.get_attribute("value") == start

        def shown(element: Any = stage) -> np.ndarray:
            picture = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
            return np.asarray(picture).astype(int)

        before = shown()
        slider.send_keys("\ue012" * 5 if start == "50" else "\ue014" * 40)  # arrow keys
        moved = int(slider.get_attribute("value"))
        assert moved == (45 if start == "50" else 40)
        assert (np.abs(shown() - before) > 8).any()
        every = browser.find_element("id", "every")
        every.send_keys("\ue010")  # End: all the way, on all images
        sliders = browser.find_elements("css selector", ".panel input")
        assert {s.get_attribute("value") for s in sliders} == {"100"}
        assert browser.get_log("browser") == []


@pytest.mark.slow
def test_confusion_describes_its_cells(browser: Any, pages: tuple[Path, Path]) -> None:
    browser.get(pages[0].as_uri())
    cell = browser.find_elements("css selector", ".heat tbody tr:nth-child(3) td")[2]
    browser.execute_script("arguments[0].click()", cell)
    text = browser.find_element("css selector", ".cell-text").text
    assert re.fullmatch(r"bicycle predicted as bicycle: [\d.]+ % of .* \([\d,]+ of [\d,]+\)", text)
