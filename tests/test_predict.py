"""predict.py, and fcn/inference/predictor.py: what is written for photographs, and where."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, compose_config
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_bad_images import png
from torch import nn

from evaluate import evaluate
from fcn.checkpoint import best_checkpoint, read_checkpoint, write_safetensors
from fcn.cli import quoted
from fcn.datasets import pictures
from fcn.datasets.shapes import Shapes
from fcn.datasets.voc2012 import VOC2012, voc_palette
from fcn.errors import ConfigError, DataError
from fcn.inference.photos import OWN_RESULT, find_photos
from fcn.inference.predictor import load_predictor
from fcn.module import SegmentationModule
from predict import predict
from train import train


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8, smooth enough for JPEG and to have several classes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_checkpoint(path: Path, names: Sequence[str] = Shapes.classes, **config: Any) -> Path:
    """A checkpoint with what a run's holds, of a network with random scores: it finds all classes.

    Args:
        config: the run's `data` settings, and the `image_type` of its training images.
    """
    torch.manual_seed(0)
    palette = [list(colour) for colour in Shapes.palette] if names == Shapes.classes else None
    network: dict[str, Any] = {"backbone": "vgg_tiny", "head_width": 8, "head_kernel": 3}
    module = SegmentationModule(class_names=names, palette=palette, stride=8, **network)
    for layer in (module.network.score, *module.network.skips.values()):
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    checkpoint |= {"config": config, "precision": "32-true", "global_step": 3}
    torch.save(checkpoint, path)
    return path


def write_12_bits(root: Path) -> dict[str, Any]:
    """Ten pairs of 16-bit images whose values are 0 to 4095; the data settings to read them."""
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number in range(10):
        pixels = noise(64, 48, number)[..., 0]
        Image.fromarray(pixels.astype(np.uint16) * 16).save(root / "images" / f"{number}.png")
        Image.fromarray(pixels // 32).save(root / "masks" / f"{number}.png")
    dataset = {"class": "fcn.datasets.folder.Folder", "classes": list(Shapes.classes)}
    dataset |= {"value_range": [0, 4095], "val_share": 0.6}
    return {"dataset": dataset, "root": str(root), "num_workers": 0}


def run(ckpt: Path, *overrides: str) -> Path:
    """In this process; the folder of the results."""
    arguments = map(quoted, [f"ckpt={ckpt}", *overrides])
    return predict(compose_config("predict", *arguments, "device=cpu"))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("shapes") / "best.ckpt")


def network_mask(ckpt: Path, pixels: np.ndarray) -> np.ndarray:
    """The classes (H, W) that the network alone finds in a photograph (H, W, 3)."""
    module = SegmentationModule.load_from_checkpoint(ckpt).eval()
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        return module(image)[0].argmax(0).numpy()


def test_results_of_a_photograph(tmp_path: Path, ckpt: Path) -> None:
    pixels = noise(50, 70)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    output = run(ckpt, f"input={tmp_path / 'photo.png'}", f"output={tmp_path / 'out'}")
    assert {path.name for path in output.iterdir()} == {"photo.png", "photo_overlay.jpg"}
    expected = network_mask(ckpt, pixels)
    with Image.open(output / "photo.png") as mask:
        assert (mask.mode, mask.size) == ("P", (70, 50))
        assert np.array_equal(mask, expected)
        palette = np.array(mask.getpalette()).reshape(-1, 3)
    assert np.array_equal(palette, [*Shapes.palette, *voc_palette()[len(Shapes.palette) :]])
    with Image.open(output / "photo_overlay.jpg") as overlay:
        legend = np.asarray(overlay)[50:]  # it is below the picture
    for k in np.unique(expected):  # the colours of the classes found are in the legend
        distance = np.abs(legend.astype(int) - Shapes.palette[k]).max(2)
        assert (distance < 12).sum() > 30


@pytest.mark.slow
def test_folder(tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "odd ${x} [1] name"
    names = ["a/x.jpg", "b/x.jpg", "b/x.png", "b/x.jpg.png", "b/c/x.JPG", "it's = {ä,ö}.webp"]
    stems = ["a/x", "b/x.jpg", "b/x.png", "b/x.jpg.png", "b/c/x", "it's = {ä,ö}"]
    for seed, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(33, 40 + seed % 2, seed)).save(photos / name)
    for name in ("b/notes.txt", ".hidden.jpg", ".DS_Store", "broken.jpg"):
        (photos / name).write_text("no image", encoding="utf-8")
    (photos / "cut.png").write_bytes((photos / "b" / "x.png").read_bytes()[:500])
    output = photos / "results"
    message = r"2 of 8 images failed:\n.*broken\.jpg: cannot read this image: .*\n.*cut\.png: "
    with pytest.raises(DataError, match=message):
        run(ckpt, f"input={photos}", f"output={output}", "batch_size=2")
    printed = capsys.readouterr()
    assert printed.out.startswith("6 of 8 images")
    assert "8/8" in printed.err  # the progress bar
    files = {f"{stem}{end}" for stem in stems for end in (".png", "_overlay.jpg")}
    assert {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()} == files
    for name, stem in zip(names, stems, strict=True):
        with Image.open(photos / name) as photo, Image.open(output / f"{stem}.png") as mask:
            assert np.array_equal(mask, network_mask(ckpt, np.asarray(photo)))
    # Results are no photographs of the next time, wherever that puts its own.
    for folder in (output, photos / "other"):
        jobs, left_out = find_photos(str(photos), folder)
        assert (len(jobs), len(left_out)) == (8, 14)  # .DS_Store is not mentioned
        assert list(left_out.values()).count(OWN_RESULT) == 12
        assert left_out[photos / ".hidden.jpg"] == "it is hidden"
        assert "its name does not end like" in left_out[photos / "b" / "notes.txt"]


def test_limit_of_pixels(tmp_path: Path, ckpt: Path) -> None:
    photo, options = tmp_path / "x.png", (f"input={tmp_path}", f"output={tmp_path / 'out'}")
    photo.write_bytes(png(14_000, 13_000))  # Pillow would call it a decompression bomb
    with pytest.raises(DataError, match=r"14000×13000 .*limit is 179.*max_pixels=182000"):
        run(ckpt, *options)
    Image.new("RGB", (100, 80)).save(photo)
    with pytest.raises(DataError, match=r"it has 100×80 pixels, 0\.0 million"):
        run(ckpt, *options, "max_pixels=7999")
    run(ckpt, *options, "max_pixels=8000")


def test_voc_folder(tmp_path: Path, tiny_voc: Path) -> None:
    """test_inference_photos.py has which list is chosen, and what is not overwritten."""
    data = {"dataset": {"class": "VOC2012"}, "root": str(tiny_voc)}
    ckpt, val = tmp_path / "best.ckpt", VOC2012(split="val", root=tiny_voc)
    options = [f"output={tmp_path}", "format=voc", "comp=comp6"]
    run(write_checkpoint(ckpt, VOC2012.classes, data=data), *options)  # the run knows data.root
    folder = tmp_path / "results" / "VOC2012" / "Segmentation" / "comp6_val_cls"
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in val.ids}
    for sample in (val[i] for i in range(len(val))):
        with Image.open(folder / f"{sample['id']}.png") as mask:
            assert (mask.mode, mask.size) == ("P", sample["mask"].shape[::-1])
            assert mask.getpalette() == [c for colour in voc_palette() for c in colour]
    for setting, message in (("split=none", r"none\.txt"), ("data.root=nowhere", "nowhere")):
        with pytest.raises(DataError, match=message):
            run(ckpt, *options, setting)


@pytest.mark.slow
def test_images_of_another_type_than_in_training(tmp_path: Path) -> None:
    """The type is in the checkpoint and in files of export.py; what is refused leaves no folder."""
    write_12_bits(tmp_path)
    settings = [o for o in TINY if not o.startswith("data")] + ["trainer.max_steps=2"]
    settings += ["data=folder", f"data.root={tmp_path}", "data.dataset.classes=[a,b,c,d,e,f,g,h]"]
    settings += ["data.dataset.value_range=[0,4095]", "data.num_workers=0", "callbacks.curves=null"]
    train(compose_config("train", *settings), tmp_path / "run")
    best, handed_on = best_checkpoint(tmp_path / "run"), tmp_path / "handed_on.safetensors"
    checkpoint = read_checkpoint(best)
    write_safetensors(checkpoint, checkpoint["state_dict"], handed_on)
    photo, message = tmp_path / "x.tif", "float, but the type of the training images is 16-bit"
    Image.fromarray(np.full((64, 48), 0.5, np.float32)).save(photo)
    for path in (best, handed_on):
        with pytest.raises(DataError, match=message):
            run(path, f"input={photo}", f"output={tmp_path / 'new' / 'out'}")
        run(path, f"input={tmp_path / 'images' / '0.png'}", f"output={tmp_path / path.suffix}")
    for path in list((tmp_path / "images").iterdir()):
        path.with_suffix(".tif").write_bytes(photo.read_bytes())
        path.unlink()
    with pytest.raises(DataError, match=message):
        evaluate(compose_config("evaluate", f"ckpt={best}", f"output={tmp_path / 'new'}"))
    assert not (tmp_path / "new").exists()
    old = write_checkpoint(tmp_path / "old.ckpt")  # which does not know the type
    run(old, f"input={photo}", f"output={tmp_path / 'old'}")


def test_settings_that_cannot_work(tmp_path: Path, ckpt: Path, tiny_voc: Path) -> None:
    photo = str(tmp_path / "x.png")
    Image.new("RGB", (9, 7)).save(photo)
    given = {"ckpt": str(ckpt), "device": "cpu", "output": str(tmp_path / "out"), "input": photo}
    cfg = OmegaConf.merge(compose_config("predict"), given)
    voc = {"input": None, "format": "voc", "data": {"root": str(tiny_voc)}}
    rows: list[tuple[dict[str, Any], str]] = [
        ({"input": None}, "input= is missing: give input=FILE"),
        ({"format": "voc"}, r"format=voc excludes input=.*x\.png: give"),
        ({"format": "coco"}, "format=coco: must be null or one of voc"),
        (voc, "8 classes of .* are not VOC's 21"),
        ({"ckpt": 3}, "ckpt=3: must be a checkpoint, or a run folder"),
        ({"tile": 10}, "tile=10: must be"),
        ({"max_pixels": 0}, "max_pixels=0: must be null or a whole number"),
        ({"tta": 3}, "tta=3: must be a group of settings"),
        ({"output": photo}, r"output=.*x\.png"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number from 1"),
        ({"precision": "half"}, "precision=half: must be null or one of 32-true"),
        ({"device": "tpu"}, "device=tpu: must be auto, cpu, mps, cuda or cuda:1"),
        ({"device": "cuda:99"}, "device=cuda:99: "),
    ]
    for changes, message in rows:
        with pytest.raises(ConfigError, match=message):
            predict(DictConfig(OmegaConf.merge(cfg, changes)))
    assert not (tmp_path / "out").exists()


def test_a_setting_that_tta_does_not_have(tmp_path: Path, ckpt: Path) -> None:
    Image.new("RGB", (9, 7)).save(tmp_path / "x.png")
    given = [f"input={tmp_path}", f"output={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"^tta\.tile=512: must be .*; .* is tile=512$"):
        run(ckpt, *given, "+tta.tile=512")
    with pytest.raises(ConfigError, match=r"^tta=null: must be a group of settings"):
        run(ckpt, *given, "tta=null")


def test_values_in_a_small_part_of_their_range(
    tmp_path: Path,
    ckpt: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning, also where it is not the first image. Images without a fault are read once."""
    decoded: list[Path] = []

    def decode(path: Path, *given: Any, **options: Any) -> Any:
        decoded.append(path)
        return real(path, *given, **options)

    real = pictures._decode
    monkeypatch.setattr(pictures, "_decode", decode)
    for number, factor in enumerate((257, 257, 16, 16)):  # in 16 bits; in 12 bits
        values = noise(20, 30, number)[..., 0].astype(np.uint16) * factor
        values[0, 0] = 65535  # a defect of the sensor
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    run(ckpt, f"input={tmp_path}", f"output={tmp_path / 'out'}")
    assert [path.stem for path in decoded] == ["0", "1", "2", "2", "3"]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "2.png: their 16-bit values from " in warning
    assert "hardly any contrast; data.dataset.value_range=[0,4095] spreads them" in warning


def test_precision(tmp_path: Path, ckpt: Path) -> None:
    for trained, asked, expected in (
        ("32-true", None, torch.float32),
        ("64-true", None, torch.float64),
        ("32-true", "bf16-mixed", torch.bfloat16),
        ("16-mixed", "32-true", torch.float32),
    ):
        torch.save(read_checkpoint(ckpt) | {"precision": trained}, tmp_path / "x.ckpt")
        predictor = load_predictor(tmp_path / "x.ckpt", "cpu", asked)
        with torch.inference_mode():
            assert predictor.scores(torch.zeros(1, 3, 8, 9, dtype=torch.uint8)).dtype == expected
