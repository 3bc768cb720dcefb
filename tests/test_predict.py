"""predict.py: what it reads, what it writes and where; tiles, flips and scales."""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import PROJECT, TINY, compose_config, write_tiny_voc
from PIL import Image
from test_train import script
from torch import Tensor
from torch.nn import functional as F

from fcn.checkpoints import read_checkpoint
from fcn.config import quoted
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012, voc_palette
from fcn.errors import ConfigError, DataError, WeightsError
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.prediction import TestTime, cast_weights, find_photos, load_model, read_photo, tiles
from fcn.runs import best_checkpoint
from predict import predict
from train import train


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8, smooth enough for JPEG and to have several classes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def run(ckpt: Path, *overrides: str) -> Path:
    """In this process; the folder of the results."""
    arguments = map(quoted, [f"ckpt={ckpt}", *overrides])
    return predict(compose_config("predict", *arguments, "device=cpu"))


@pytest.fixture(scope="module")
def ckpt(finished_run: Path) -> Path:
    return best_checkpoint(finished_run)


@pytest.fixture(scope="module")
def voc_ckpt(tiny_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc") / "run"
    tiny = [o for o in TINY if not o.startswith("data")]
    options = [f"data.root={tiny_voc}", "data.download=false", "data.crop_size=64"]
    train(compose_config("train", *tiny, "data=voc2012", "data.num_workers=0", *options), folder)
    return best_checkpoint(folder)


def test_results_of_a_photograph(tmp_path: Path, ckpt: Path) -> None:
    pixels = noise(50, 70)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    output = run(ckpt, f"input={tmp_path / 'photo.png'}", f"output={tmp_path / 'out'}")
    assert {path.name for path in output.iterdir()} == {"photo.png", "photo_overlay.jpg"}
    module = SegmentationModule.load_from_checkpoint(ckpt).eval()
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = module(image)[0].argmax(0).numpy()
    with Image.open(output / "photo.png") as mask:
        assert (mask.mode, mask.size) == ("P", (70, 50))
        assert np.array_equal(np.array(mask), expected)
        palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert np.array_equal(palette, [*Shapes.palette, *voc_palette()[len(Shapes.palette) :]])
    with Image.open(output / "photo_overlay.jpg") as overlay:
        assert overlay.width >= 70
        assert overlay.height > 50  # the legend
        legend = np.asarray(overlay)[50:]
    for k in np.unique(expected):  # the colours of the classes found are in the legend
        distance = np.abs(legend.astype(int) - Shapes.palette[k]).max(2)
        assert (distance < 12).sum() > 30


def test_folder(tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "odd ${x} [1] name"
    names = ["a/x.jpg", "b/x.jpg", "b/x.png", "b/x.jpg.png", "b/c/x.JPG", "it's = {ä,ö}.webp"]
    for seed, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(33, 40 + seed % 2, seed)).save(photos / name)
    (photos / "b" / "notes.txt").write_text("no image")
    (photos / ".hidden.jpg").write_text("no image")
    (photos / "broken.jpg").write_text("no image")
    (photos / "cut.png").write_bytes((photos / "b" / "x.png").read_bytes()[:500])
    output = photos / "results"
    with pytest.raises(DataError, match="2 of 8 images failed") as error:
        run(ckpt, f"input={photos}", f"output={output}", "batch_size=2")
    assert "broken.jpg: cannot identify" in str(error.value)
    assert "cut.png: " in str(error.value)
    stems = ["a/x", "b/x.jpg", "b/x.png", "b/x.jpg.png", "b/c/x", "it's = {ä,ö}"]
    files = {f"{stem}{end}" for stem in stems for end in (".png", "_overlay.jpg")}
    assert {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()} == files
    assert "8/8" in capsys.readouterr().err  # the progress bar
    for seed, name in enumerate(names):
        with Image.open(output / f"{stems[seed]}.png") as mask:
            together = np.array(mask)
        alone = run(ckpt, f"input={photos / name}", f"output={tmp_path / str(seed)}")
        with Image.open(next(alone.glob("*.png"))) as mask:
            assert np.array_equal(together, np.array(mask))
    # Results in the folder itself are no photographs of the next time.
    assert len(find_photos(str(photos), output)) == 8


def test_globs(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/b/x.jpg", "a/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    output = tmp_path / "out"

    def found(pattern: str) -> set[str]:
        jobs = find_photos(str(tmp_path / pattern), output)
        return {str(target.relative_to(output)) for target in jobs.values()}

    assert found("**/*.jpg") == {"a/x", "a/b/x"}
    assert found("a/*") == {"x", "y"}
    assert found("a/*/../../a/*.png") == {"y"}
    assert found("a/b/x.jpg") == {"x"}
    for pattern in ("none.jpg", "*.gif", "**/*.txt"):
        with pytest.raises(ConfigError, match="no image there"):
            found(pattern)
    with pytest.raises(ConfigError, match="overwrite"):
        find_photos(str(tmp_path / "a" / "y.png"), tmp_path / "a")


def test_readers(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    photo = Image.fromarray(pixels)
    for name in ("x.png", "x.bmp", "x.tif", "x.ppm"):
        photo.save(tmp_path / name)
        assert torch.equal(read_photo(tmp_path / name), expected)
    photo.convert("RGBA").save(tmp_path / "opaque.png")
    assert torch.equal(read_photo(tmp_path / "opaque.png"), expected)
    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert read_photo(tmp_path / "clear.png").unique().tolist() == [255]

    grey = pixels[..., 0].copy()
    for name, values in {
        "l.png": grey,
        "i16.png": grey.astype(np.uint16) * 257,
        "i16.tif": grey.astype(np.uint16) * 256,
        "i32.tif": grey.astype(np.int32) * 257,
        "f.tif": grey.astype(np.float32) / 255,
    }.items():
        Image.fromarray(values).save(tmp_path / name)
        assert torch.equal(read_photo(tmp_path / name), torch.from_numpy(grey).expand(3, 20, 30))
    modes = ["P", "1", "CMYK", "LA"]
    if int(PIL.__version__.partition(".")[0]) >= 13:  # older ones cannot read what they wrote
        modes.append("YCbCr")
    for mode in modes:
        file = tmp_path / f"{mode}.tif"
        photo.convert(mode).save(file)
        assert read_photo(file).shape == (3, 20, 30)

    turned = Image.Exif()
    turned[0x0112] = 6  # a camera on its side
    photo.save(tmp_path / "turned.png", exif=turned)
    assert torch.equal(read_photo(tmp_path / "turned.png"), expected.flip(1).transpose(1, 2))
    assert torch.equal(read_photo(tmp_path / "turned.png", upright=False), expected)


def test_limits_of_pillow(tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(DataError, match=r"bomb\.png: Image size \(8000 pixels\) exceeds"):
        run(ckpt, f"input={tmp_path / 'bomb.png'}", f"output={tmp_path / 'out'}")


def test_tiles_share_every_pixel() -> None:
    for length in (65, 100, 224, 225, 500, 999):
        for tile in (64, 96, 224):
            parts = tiles(length, tile)
            total = torch.zeros(length)
            for start, stop, weight in parts:
                assert start % 32 == 0
                assert 0 < stop - start <= tile
                total[start:stop] += weight
            torch.testing.assert_close(total, torch.ones(length))
            assert parts[-1][1] == length


def test_tiles_of_a_local_network_are_exact() -> None:
    """Where the margin is wider than the receptive field, tiled and whole are the same."""
    torch.manual_seed(0)
    kernel = torch.randn(5, 3, 7, 7)
    seen: list[tuple[int, ...]] = []

    def local(image: Tensor) -> Tensor:
        seen.append(tuple(image.shape))
        return F.conv2d(image.float() / 255, kernel, padding=3)

    for size in ((300, 410), (64, 500), (129, 31)):
        image = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
        whole = local(image)
        network = TestTime(local, tile=100)  # rounded down to 96
        seen.clear()
        torch.testing.assert_close(network(image), whole, atol=1e-4, rtol=0)
        assert all(height <= 96 and width <= 96 for *_, height, width in seen)
        assert network.masks(image).eq(whole.argmax(1)).float().mean() > 0.9999
        bands = [band.shape[2] for band in network._bands(image)]
        assert sum(bands) == size[0]
        assert max(bands) <= 96  # rows of scores held at a time


@torch.inference_mode()
def test_tiles_of_a_vgg_agree() -> None:
    """A VGG-11 FCN-8s sees 270 pixels; in tiles of 256, with 24 to spare at a seam, scores move by
    1 % of their spread on average. Without margin or ramp it is several times as much."""
    torch.manual_seed(0)
    network = FCN(5, 8, "vgg11", head_width=16, head_kernel=3).eval()
    for layer in (network.score, *network.skips.values()):
        torch.nn.init.normal_(layer.weight, std=0.05)
    image = torch.from_numpy(noise(330, 420).copy()).permute(2, 0, 1)[None]
    whole, tiled = network(image), TestTime(network, tile=256)(image)
    difference = (tiled - whole).abs()[..., 32:-32, 32:-32]
    assert difference.mean() < 0.02 * whole.std()
    assert tiled.argmax(1).eq(whole.argmax(1))[..., 32:-32, 32:-32].float().mean() > 0.99


def test_flips_and_scales() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3)

    def network(image: Tensor) -> Tensor:
        return F.conv2d(image.float() / 255, kernel, padding=1)

    image = torch.from_numpy(noise(40, 52).copy()).permute(2, 0, 1)[None]
    assert torch.equal(TestTime(network)(image), network(image))
    assert torch.equal(TestTime(network, tile=64)(image), network(image))
    flipped = TestTime(network, flip=True)(image)
    mean = (network(image).softmax(1) + network(image.flip(-1)).flip(-1).softmax(1)) / 2
    torch.testing.assert_close(flipped.exp(), mean)
    torch.testing.assert_close(TestTime(network, flip=True)(image.flip(-1)).flip(-1), flipped)
    sizes: list[tuple[int, ...]] = []
    views = TestTime(lambda x: sizes.append(x.shape[-2:]) or network(x), scales=(0.75, 1, 1.25))
    torch.testing.assert_close(views(image).exp().sum(1), torch.ones(1, 40, 52))
    assert sizes == [(30, 39), (40, 52), (50, 65)]
    assert TestTime(network, flip=True, scales=[0.01])(image[..., :1]).shape == (1, 4, 40, 1)
    for options in ({"scales": []}, {"scales": [0]}, {"scales": [math.inf]}, {"tile": 63}):
        with pytest.raises(ConfigError, match="must be"):
            TestTime(network, **options)  # type: ignore[arg-type]


def test_voc_folder(tmp_path: Path, voc_ckpt: Path, tiny_voc: Path) -> None:
    output = run(voc_ckpt, "format=voc", f"output={tmp_path}")  # the run knows data.root
    folder = output / "results" / "VOC2012" / "Segmentation" / "comp5_val_cls"
    data = VOC2012(split="val", root=tiny_voc)
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in data.ids}
    for sample in (data[i] for i in range(len(data))):
        with Image.open(folder / f"{sample['id']}.png") as mask:
            assert mask.mode == "P"
            assert mask.getpalette() == [c for colour in voc_palette() for c in colour]
            assert mask.size == sample["mask"].shape[::-1]

    root = write_tiny_voc(tmp_path / "own")
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt").write_text("2007_000032\n")
    for mask_file in (root / "VOCdevkit/VOC2012/SegmentationClass").iterdir():
        mask_file.unlink()  # of the test images, nobody has masks
    run(voc_ckpt, "format=voc", f"output={tmp_path}", f"data.root={root}", "comp=comp6")
    found = list((folder.parent / "comp6_test_cls").iterdir())
    assert [path.name for path in found] == ["2007_000032.png"]
    with pytest.raises(DataError, match=r"none\.txt"):
        run(voc_ckpt, "format=voc", f"output={tmp_path}", "split=none")
    with pytest.raises(ConfigError, match="the name of a list"):
        run(voc_ckpt, "format=voc", f"output={tmp_path}", "split=../x")


def test_settings_that_cannot_work(tmp_path: Path, ckpt: Path, tiny_voc: Path) -> None:
    photo = tmp_path / "x.png"
    Image.new("RGB", (9, 7)).save(photo)
    output = f"output={tmp_path / 'out'}"
    for overrides, message in (
        ([], "choose input="),
        (["format=voc", f"data.root={tiny_voc}"], "8 classes of .* are not VOC's"),
        ([f"input={photo}", "tile=10"], "tile=10: must be"),
        ([f"input={photo}", "tta.scales=[0]"], r"tta\.scales"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(ckpt, output, *overrides)
    assert not (tmp_path / "out").exists()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda: "):
            load_model(ckpt, "cuda")
    with pytest.raises(WeightsError, match=r"none\.ckpt: no such file"):
        run(tmp_path / "none.ckpt", f"input={photo}")
    with pytest.raises(ConfigError, match=r"output=.*x\.png"):
        run(ckpt, f"input={photo}", f"output={photo}")


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        ("32-true", None, torch.float32),
        ("64-true", None, torch.float64),
        ("32-true", "bf16-mixed", torch.bfloat16),
        ("16-mixed", "32-true", torch.float32),
    ],
)
def test_precision(
    tmp_path: Path, ckpt: Path, trained: str, asked: str | None, expected: torch.dtype
) -> None:
    checkpoint = read_checkpoint(ckpt) | {"precision": trained}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    model = load_model(tmp_path / "x.ckpt", "cpu", asked)
    with torch.inference_mode():
        assert model.scores(torch.zeros(1, 3, 8, 9, dtype=torch.uint8)).dtype == expected


@pytest.mark.parametrize("settings", [{}, {"alignment": "caffe"}, {"fusion": "feature"}])
def test_weights_are_cast_once_for_the_same_scores(settings: dict) -> None:
    network = FCN(5, backbone="vgg11", head_width=8, dropout=0, freeze_stages=2, **settings)
    for layer in network.modules():
        if getattr(layer, "bias", None) is not None:
            torch.nn.init.normal_(layer.bias)
    image = torch.randint(256, (1, 3, 40, 70), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.nn.init.normal_(network.score.weight)
        expected = network.eval()(image)
        cast_weights(network, "32-true")
        assert network.conv6.weight.dtype is torch.float32
        cast_weights(network, "bf16-mixed")
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        assert torch.equal(network(image), expected)


def test_script(
    tmp_path: Path,
    ckpt: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a shell sees: exit code 1 and a few lines, names taken as they are."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(20, 20)).save("ä (1).png")
    Path("ü=2.png").write_text("no image")
    arguments = [f"ckpt={ckpt}", "input=.", "output=o,u${t}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(PROJECT / "predict.py"), run_name="__main__")
    assert exit_.value.code == 1
    printed = capsys.readouterr()
    assert "error: 1 of 2 images failed:\n" in printed.err
    assert "ü=2.png: cannot identify image file" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out.startswith("1 of 2 images")
    assert {path.name for path in Path("o,u${t}").iterdir()} == {"ä (1).png", "ä (1)_overlay.jpg"}


@pytest.mark.parametrize("name", ["predict.py", "export.py"])
def test_help_needs_no_torch(tmp_path: Path, name: str) -> None:
    result = script(tmp_path, name, "--help", python=("-X", "importtime"))
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "torchvision", "pytorch_lightning", "numpy", "PIL", "onnx"}
    assert "ckpt:" in result.stdout
