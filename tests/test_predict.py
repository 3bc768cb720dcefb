"""predict.py, and fcn/inference/predictor.py: what is written for photographs, and where."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, TINY, compose_config, write_tiny_voc
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from evaluate import evaluate
from fcn.checkpoint import (
    best_checkpoint,
    find_checkpoint,
    read_checkpoint,
    write_safetensors,
)
from fcn.cli import quoted
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012, voc_palette
from fcn.errors import ConfigError, DataError, WeightsError
from fcn.inference.photos import OWN_RESULT, find_photos
from fcn.inference.predictor import load_predictor
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.precision import cast_weights
from predict import predict
from train import train


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8, smooth enough for JPEG and to have several classes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_checkpoint(
    path: Path,
    class_names: Sequence[str] = Shapes.classes,
    palette: Sequence[Sequence[int]] | None = Shapes.palette,
    data: dict[str, Any] | None = None,
    image_type: str | None = None,
) -> Path:
    """A checkpoint with what a run's holds, of a network with random scores: it finds all classes.

    Args:
        data, image_type: the run's data settings, and the type of its training images.
    """
    torch.manual_seed(0)
    colours = None if palette is None else [list(colour) for colour in palette]
    module = SegmentationModule(
        class_names=class_names,
        palette=colours,
        stride=8,
        backbone="vgg_tiny",
        head_width=8,
        head_kernel=3,
    )
    for layer in (module.network.score, *module.network.skips.values()):
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    config = {"data": data or {}, "image_type": image_type}
    checkpoint |= {"config": config, "precision": "32-true", "global_step": 3}
    torch.save(checkpoint, path)
    return path


def run(ckpt: Path, *overrides: str) -> Path:
    """In this process; the folder of the results."""
    arguments = map(quoted, [f"ckpt={ckpt}", *overrides])
    return predict(compose_config("predict", *arguments, "device=cpu"))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("shapes") / "best.ckpt")


@pytest.fixture(scope="module")
def voc_ckpt(tiny_voc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, data = (
        tmp_path_factory.mktemp("voc"),
        {"dataset": {"class": "VOC2012"}, "root": str(tiny_voc)},
    )
    return write_checkpoint(folder / "best.ckpt", VOC2012.classes, None, data)


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


@pytest.mark.slow
def test_folder(tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "odd ${x} [1] name"
    names = ["a/x.jpg", "b/x.jpg", "b/x.png", "b/x.jpg.png", "b/c/x.JPG", "it's = {ä,ö}.webp"]
    for seed, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(33, 40 + seed % 2, seed)).save(photos / name)
    (photos / "b" / "notes.txt").write_text("no image", encoding="utf-8")
    (photos / ".hidden.jpg").write_text("no image", encoding="utf-8")
    (photos / ".DS_Store").write_text("no image", encoding="utf-8")
    (photos / "broken.jpg").write_text("no image", encoding="utf-8")
    (photos / "cut.png").write_bytes((photos / "b" / "x.png").read_bytes()[:500])
    output = photos / "results"
    with pytest.raises(DataError, match="2 of 8 images failed") as error:
        run(ckpt, f"input={photos}", f"output={output}", "batch_size=2")
    assert "broken.jpg: cannot read this image: cannot identify" in str(error.value)
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
    # Results are no photographs of the next time, wherever that puts its own.
    for folder in (output, photos / "other"):
        jobs, left_out = find_photos(str(photos), folder)
        assert len(jobs) == 8
        assert list(left_out.values()).count(OWN_RESULT) == 12
        assert left_out[photos / ".hidden.jpg"] == "it is hidden"  # .DS_Store is not mentioned
        assert "ending" in left_out[photos / "b" / "notes.txt"]
        assert len(left_out) == 14


@pytest.mark.slow
def test_image_above_the_limit_of_pixels(tmp_path: Path, ckpt: Path) -> None:
    """Pillow would call it a decompression bomb."""
    photo = tmp_path / "x.tif"
    Image.new("1", (14_000, 13_000)).save(photo, compression="group4")
    options = (f"input={photo}", f"output={tmp_path / 'out'}", "tile=1024")
    with pytest.raises(DataError, match=r"14000×13000 .*limit is 179.*max_pixels=182000"):
        run(ckpt, *options)
    Image.new("RGB", (100, 80)).save(photo)
    with pytest.raises(DataError, match=r"it has 100×80 pixels, 0\.0 million"):
        run(ckpt, *options, "max_pixels=7999")
    run(ckpt, *options, "max_pixels=8000")


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
    run(voc_ckpt, "format=voc", f"output={tmp_path}")  # results of an earlier run are replaced
    Image.new("L", (3, 2)).save(folder / f"{data.ids[0]}.png")  # another program's
    with pytest.raises(ConfigError, match=r"would overwrite .*val_cls.*, which has not the mark"):
        run(voc_ckpt, "format=voc", f"output={tmp_path}")


@pytest.mark.slow
def test_images_of_another_type_than_in_training(tmp_path: Path) -> None:
    """The type is in the checkpoint and in files of export.py; what is refused leaves no folder."""
    values = np.random.default_rng(0).integers(0, 4096, (8, 40, 50))
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i, array in enumerate(values):
        Image.fromarray(array.astype(np.uint16)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray((array > 2000).astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    data = ["data=folder", f"data.root={tmp_path}", "data.dataset.value_range=[0,4095]"]
    tiny = [o for o in TINY if not o.startswith("data")]
    cfg = compose_config("train", *tiny, *data, "data.dataset.classes=[a,b]", "data.num_workers=0")
    train(cfg, tmp_path / "run")
    best = best_checkpoint(tmp_path / "run")
    module, checkpoint = SegmentationModule.load_from_checkpoint(best), read_checkpoint(best)
    handed_on = tmp_path / "handed_on.safetensors"
    write_safetensors(checkpoint, module.state_dict(), handed_on)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray((values[0] / 4095).astype(np.float32)).save(photos / "float.tif")
    for path in (best, handed_on):
        assert load_predictor(path, "cpu").image_type == "16-bit"
        with pytest.raises(DataError, match=r"float, but the type of the training images is 16"):
            run(path, f"input={photos}", f"output={tmp_path / 'new' / 'out'}")
        run(path, f"input={tmp_path / 'images' / '0.png'}", f"output={tmp_path / path.suffix}")
    for path in list((tmp_path / "images").iterdir()):
        path.with_suffix(".tif").write_bytes((photos / "float.tif").read_bytes())
        path.unlink()
    with pytest.raises(DataError, match="float, but the type of the training images is 16-bit"):
        evaluate(compose_config("evaluate", f"ckpt={best}", f"output={tmp_path / 'new'}"))
    assert not (tmp_path / "new").exists()
    old = write_checkpoint(tmp_path / "old.ckpt")
    assert load_predictor(old, "cpu").image_type is None
    run(old, f"input={photos}", f"output={tmp_path / 'old'}")


def test_settings_that_cannot_work(tmp_path: Path, ckpt: Path, tiny_voc: Path) -> None:
    photo = tmp_path / "x.png"
    Image.new("RGB", (9, 7)).save(photo)
    given = {"ckpt": str(ckpt), "device": "cpu", "output": str(tmp_path / "out")}
    cfg = OmegaConf.merge(compose_config("predict"), given)
    for changes, message in (
        ({}, "choose input="),
        ({"input": str(photo), "format": "voc"}, "choose input="),
        ({"input": str(photo), "format": "coco"}, "format=coco: must be null or one of voc"),
        ({"format": "voc", "data": {"root": str(tiny_voc)}}, "8 classes of .* are not VOC's"),
        ({"input": str(photo), "tile": 10}, "tile=10: must be"),
        ({"input": str(photo), "max_pixels": 0}, "max_pixels=0: must be null or a whole number"),
        ({"input": str(photo), "tta": {"scales": [0]}}, r"tta\.scales=\[0\]: must be"),
        ({"input": str(photo), "tta": 3}, r"tta\.flip=null: must be"),
        ({"input": str(photo), "output": str(photo)}, r"output=.*x\.png"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict(DictConfig(OmegaConf.merge(cfg, changes)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="precision=half: must be null or one of 32-true"):
        load_predictor(ckpt, precision="half")
    with pytest.raises(ConfigError, match="device=tpu: must be auto, cpu, mps, cuda or cuda:1"):
        load_predictor(ckpt, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda: "):
            load_predictor(ckpt, "cuda")
    with pytest.raises(WeightsError, match=r"none\.ckpt: no such file"):
        run(tmp_path / "none.ckpt", f"input={photo}")
    with pytest.raises(ConfigError, match="ckpt=3: must be a checkpoint, or a run folder"):
        find_checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size=0: must be a whole number from 1"):
        predict(DictConfig(OmegaConf.merge(cfg, {"input": str(photo), "batch_size": 0})))


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
    predictor = load_predictor(tmp_path / "x.ckpt", "cpu", asked)
    with torch.inference_mode():
        assert predictor.scores(torch.zeros(1, 3, 8, 9, dtype=torch.uint8)).dtype == expected


@pytest.mark.parametrize("settings", [{}, {"alignment": "caffe"}, {"fusion": "feature"}])
def test_weights_are_cast_once_for_the_same_scores(settings: dict) -> None:
    network = FCN(5, backbone="vgg_tiny", head_width=8, dropout=0, freeze_stages=2, **settings)
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
    Path("ü=2.png").write_text("no image", encoding="utf-8")
    arguments = [f"ckpt={ckpt}", "input=.", "output=o,u${t}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(PROJECT / "predict.py"), run_name="__main__")
    assert exit_.value.code == 1
    printed = capsys.readouterr()
    assert "error: 1 of 2 images failed:\n" in printed.err
    assert "ü=2.png: cannot read this image: cannot identify image file" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out.startswith("1 of 2 images")
    assert {path.name for path in Path("o,u${t}").iterdir()} == {"ä (1).png", "ä (1)_overlay.jpg"}
