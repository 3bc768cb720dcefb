"""Own data: pairs by name, splits, labels and colours; errors name the setting that is wrong."""

import traceback
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_config
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DataLoader

from fcn.datasets import SegmentationDataset
from fcn.datasets.folder import Folder
from fcn.datasets.reading import missing_allowed
from fcn.datasets.survey import Survey
from fcn.errors import ConfigError, DataError

CLASSES = ["ground", "cat", "dog"]
PALETTE = [[0, 0, 0], [250, 10, 20], [20, 10, 250]]
MASK = np.array([[0, 1, 2], [2, 2, 255]], np.uint8).repeat(4, 0).repeat(4, 1)  # (8, 12)
NAMES = [f"photo {i:02d}" for i in range(10)]  # people have spaces in the names of their files


def write(folder: Path, name: str, picture: Image.Image | np.ndarray, end: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{end}"
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path)
    return path


def coloured(mask: np.ndarray = MASK, void: tuple[int, ...] = (255, 255, 255)) -> Image.Image:
    table = np.full((256, 3), void, np.uint8)
    table[:3] = PALETTE
    return Image.fromarray(table[mask])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pairs; photographs in several formats."""
    for i, name in enumerate(NAMES):
        picture = Image.new("RGB", (12, 8), (20 * i, 0, 0))
        write(tmp_path / "images", name, picture, ("jpg", "JPEG", "bmp", "webp")[i % 4])
        write(tmp_path / "masks", name, MASK)
    (tmp_path / "images" / "Thumbs.db").touch()
    (tmp_path / "masks" / "._photo 01.png").touch()
    return tmp_path


def opened(root: Path, split: str = "all", **settings: Any) -> Folder:
    return Folder(root=root, split=split, **{"classes": CLASSES} | settings)


def test_indexed(root: Path) -> None:
    data: SegmentationDataset = opened(root)
    assert data.ids == NAMES
    assert data.classes == tuple(CLASSES)
    assert len(data.palette) == 3
    for i, name in enumerate(NAMES):
        sample = data[i]
        assert sample["id"] == name
        assert sample["image"].shape == (3, 8, 12)
        assert sample["mask"].dtype == torch.uint8
        assert np.array_equal(sample["mask"], MASK)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_kinds_of_label_pictures(root: Path, mode: str) -> None:
    mask = MASK.clip(max=1) if mode == "1" else MASK
    if mode == "P":
        picture = Image.fromarray(mask)
        picture.putpalette([*range(255, -1, -1)] * 3)  # its own colours mean nothing
    elif mode == "1":
        picture = Image.fromarray(mask.astype(bool))
    else:
        picture = Image.fromarray(mask.astype(np.uint16) if mode == "I;16" else mask)
    path = write(root / "masks", NAMES[0], picture)
    with Image.open(path) as file:
        assert file.mode == mode
    assert np.array_equal(opened(root)[0]["mask"], mask)


def test_void(root: Path) -> None:
    write(root / "masks", NAMES[0], np.where(MASK == 255, 7, MASK).astype(np.uint8))
    with pytest.raises(DataError, match=r"photo 00\.png: labels must be .* found 7"):
        opened(root)[0]
    assert np.array_equal(opened(root, void=7)[0]["mask"], MASK)
    message = r"photo 01\.png: labels must be 0 to 2, found 255; .*set data\.dataset\.palette"
    with pytest.raises(DataError, match=message):
        opened(root, void=None)[1]


def test_colours(root: Path) -> None:
    settings: dict[str, Any] = {"palette": PALETTE, "void": [255, 255, 255]}
    picture = coloured()
    write(root / "masks", NAMES[0], picture)
    write(root / "masks", NAMES[1], picture.convert("RGBA"))
    write(root / "masks", NAMES[2], picture.quantize(8))  # a palette in whatever order
    data = opened(root, **settings)
    assert data.palette == tuple(map(tuple, PALETTE))
    for i in range(4):  # the last one is grey, so it holds labels
        expected = MASK if i < 3 else MASK.clip(max=2)
        if i == 3:
            write(root / "masks", NAMES[3], expected)
        assert np.array_equal(data[i]["mask"], expected)
    write(root / "masks", NAMES[4], coloured(void=(1, 2, 3)))
    with pytest.raises(DataError, match=r"photo 04\.png: not in .*palette: \(1, 2, 3\)"):
        data[4]
    with pytest.raises(DataError, match=r"photo 00\.png: .*255, 255, 255"):
        opened(root, palette=PALETTE)[0]
    with pytest.raises(DataError, match=r"photo 00\.png: .*RGB needs data\.dataset\.palette"):
        opened(root)[0]


GREY = [[0, 0, 0], [128, 128, 128], [255, 255, 255]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, ">u2", np.int32, np.float32])
def test_grey_colours(root: Path, kind: Any) -> None:
    values = np.array([0, 128, 255])[MASK.clip(max=2)].astype(kind)  # (8, 12)
    path = write(root, "x", values, "tif")
    data = opened(root, palette=GREY, void=None)
    assert np.array_equal(data.read_mask(path), MASK.clip(max=2))
    for value in (-7, 9, 300, 65535):
        if kind is np.uint8 or (value < 0 and kind not in (np.int32, np.float32)):
            continue
        values[0, 0] = value
        write(root, "x", values, "tif")
        with pytest.raises(DataError, match=rf"x\.tif: not in .*palette: \(?{value}(, 9, 9\))?$"):
            data.read_mask(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_of_coloured_masks(root: Path, mode: str) -> None:
    """What was erased has no colour, but its file may keep one; people see the background."""
    seen = np.zeros((8, 12, 4), np.uint8)
    seen[2:5, 3:9] = 255
    erased = seen.copy()
    erased[..., :3] = 255
    data = opened(root, palette=GREY, void=None)
    for pixels, is_right in ((seen, True), (erased, False)):
        if mode == "P":
            picture = Image.fromarray(pixels[..., 3] // 255)
            picture.putpalette([*pixels[0, 0, :3], 255, 255, 255])
            picture.info["transparency"] = 0
        else:
            picture = Image.fromarray(pixels).convert(mode)
        path = write(root, "x", picture)
        if is_right:
            assert np.array_equal(data.read_mask(path), seen[..., 3] // 255 * 2)
        else:
            with pytest.raises(
                DataError, match=r"x\.png: .*transparent pixels above \(255, 255, 2"
            ):
                data.read_mask(path)


COLOURS: dict[str, Any] = {"palette": PALETTE, "void": 255}


@pytest.mark.parametrize(
    ("picture", "settings", "message"),
    [
        # Grey values that are spread, so that people can see them.
        *((np.array([0, *v], np.uint8)[MASK.clip(max=2)], {}, r"palette .* as \[100,100,100\]")
          for v in ((128, 255), (127, 254), (100, 200), (85, 170))),
        (coloured(), {}, r"palette, .*; its colours are \(20, 10, 250\), \(255, 255, 255\), \(2"),
        (np.arange(1200, dtype=np.uint8).reshape(20, 20, 3), {}, r"its colours are \("),
        (np.arange(1200).astype(">u2").view("u1").reshape(20, 40, 3), {}, "are more than 256$"),
        (coloured(), COLOURS, r"if these are void, data.dataset.void=\[255,255,255\]$"),
        (coloured().convert("L"), COLOURS, r"labels must be .*; a grey mask holds labels: save it"),
    ],
)  # fmt: skip
def test_hints(
    root: Path, picture: np.ndarray | Image.Image, settings: dict[str, Any], message: str
) -> None:
    path = write(root, "x", picture)
    with pytest.raises(DataError, match=message) as error:
        opened(root, **settings).read_mask(path)
    assert ("set data.dataset.palette" in str(error.value)) == ("100" in message)


@pytest.mark.parametrize("settings", [{}, COLOURS, {"palette": GREY, "void": None}])
def test_jpeg_masks(root: Path, settings: dict[str, Any]) -> None:
    picture = coloured() if settings is COLOURS else Image.fromarray(MASK)
    path = write(root, "x", picture, "jpg")
    with pytest.raises(DataError, match=r"x\.jpg: .*JPEG changes the values .* as PNG"):
        opened(root, **settings).read_mask(path)


def test_share(root: Path) -> None:
    train, val = opened(root, "train").ids, opened(root, "val").ids
    assert (len(train), len(val)) == (8, 2)
    assert sorted(train + val) == NAMES
    assert opened(root, "val").ids == val
    others = {tuple(opened(root, "val", seed=seed).ids) for seed in range(8)}
    assert len(others) > 3
    assert len(opened(root, "val", val_share=0.01).ids) == 1
    write(root / "images", "new", Image.new("RGB", (12, 8)))
    write(root / "masks", "new", MASK)
    assert len(set(opened(root, "val").ids) - set(val)) <= 1
    with pytest.raises(DataError, match="no pairs are left for the split 'train'"):
        opened(root, "train", val_share=0.99)


def test_lists(root: Path) -> None:
    lists = root / "lists"
    lists.mkdir()
    (lists / "val.txt").write_text("\ufeffphoto 03\n\nphoto 07.png\n", "utf-8")
    settings: dict[str, Any] = {"val": "lists/val.txt"}
    assert opened(root, "val", **settings).ids == ["photo 03", "photo 07"]
    rest = [name for name in NAMES if name not in ("photo 03", "photo 07")]
    assert opened(root, "train", **settings).ids == rest
    (lists / "train.txt").write_text("photo 00\nphoto 01\n")
    settings["train"] = str(lists / "train.txt")
    (root / "masks" / "photo 09.png").unlink()  # it is in no list, so that nobody misses it
    assert opened(root, "train", **settings).ids == NAMES[:2]
    (lists / "train.txt").write_text("photo 00\nphoto 99\n")
    with pytest.raises(DataError, match=r"train\.txt: no file of 'photo 99' \(1 of 2 ids\)"):
        opened(root, "train", **settings)
    with missing_allowed():  # as the check opens it
        errors = Survey("train", opened(root, "train", **settings), images=True).errors
    assert [str(error) for error in errors] == [f"{lists / 'train.txt'}: no file of 'photo 99'"]
    with pytest.raises(DataError, match=r"none\.txt.*No such file"):
        opened(root, "train", train="none.txt")


def test_partners(root: Path) -> None:
    (root / "masks" / "photo 03.png").unlink()
    with pytest.raises(DataError, match=r"1 of 10 masks missing, the first .*masks.photo 03\.\*"):
        opened(root)
    (root / "images" / "photo 02.bmp").unlink()
    with pytest.raises(DataError, match=r"1 of 10 images missing, the first .*/photo 02\.\*"):
        opened(root)
    write(root / "images", "photo 00", Image.new("RGB", (12, 8)))
    with pytest.raises(DataError, match=r"photo 00\.png: photo 00\.jpg has the same stem"):
        opened(root)


def test_folders(root: Path, tmp_path: Path) -> None:
    data = Folder(split="all", images=str(root / "images"), masks=f"{root}/masks", classes=CLASSES)
    assert data.ids == NAMES
    with pytest.raises(DataError, match=r"none: there is no such folder"):
        opened(root, masks="none")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: there is no picture"):
        opened(root, images="none")


@pytest.mark.parametrize("layout", ["{folder}/{split}", "{split}/{folder}"])
@pytest.mark.parametrize("names", ["train val test", "Training validation Test", "train valid x"])
def test_names_of_the_folders(tmp_path: Path, layout: str, names: str) -> None:
    for split in names.split():
        for folder in ("images", "masks"):
            write(tmp_path / layout.format(folder=folder, split=split), "a", MASK)
    assert opened(tmp_path, "train").ids == ["train/a"]
    val = opened(tmp_path, "val")
    assert val.ids == ["val/a"]
    assert np.array_equal(val[0]["mask"], MASK)
    assert len(opened(tmp_path, "all")) == (2 if "x" in names else 3)
    (tmp_path / layout.format(folder="masks", split="val")).mkdir(parents=True, exist_ok=True)
    if "val" not in names.split():
        with pytest.raises(DataError, match=r"val.* are of one split; keep one"):
            opened(tmp_path, "val")


@pytest.mark.parametrize("names", ["train", "aachen ulm", "train/aachen val/ulm"])
def test_folders_that_are_not_read(tmp_path: Path, names: str) -> None:
    for name in names.split():
        for folder in ("images", "masks"):
            write(tmp_path / folder / name, "a", MASK)
    with pytest.raises(DataError, match=r"no picture in this folder, but .* named train and val"):
        opened(tmp_path)


@pytest.mark.parametrize("layout", ["{folder}/{split}", "{split}/{folder}"])
def test_a_folder_for_each_split(tmp_path: Path, layout: str) -> None:
    for split, number in (("train", 3), ("val", 2), ("test", 1)):
        for i in range(number):  # the same names in each split
            images, masks = (layout.format(folder=f, split=split) for f in ("images", "masks"))
            write(tmp_path / images, f"{i}", Image.new("RGB", (12, 8)), "jpg")
            write(tmp_path / masks, f"{i}", np.full_like(MASK, number - 1))
    assert opened(tmp_path, "train").ids == ["train/0", "train/1", "train/2"]
    assert opened(tmp_path, "test").ids == ["test/0"]
    assert len(opened(tmp_path, "all")) == 6
    val = opened(tmp_path, "val")
    assert val.ids == ["val/0", "val/1"]
    assert (val[1]["mask"] == 1).all()
    (tmp_path / "val.txt").write_text("0")
    with pytest.raises(ConfigError, match=r"data\.dataset\.val: folders train and val"):
        opened(tmp_path, val="val.txt")
    (path := tmp_path / layout.format(folder="masks", split="val") / "1.png").unlink()
    with pytest.raises(DataError, match="1 of 2 masks missing") as error:
        opened(tmp_path, "val")
    assert str(error.value).endswith(str(path.with_suffix(".*")))
    write(tmp_path / "images", "0", MASK)
    with pytest.raises(DataError, match="images: there are pictures outside of train and val"):
        opened(tmp_path, "val")


def test_only_the_images_have_a_folder_for_each_split(tmp_path: Path) -> None:
    for part in ("images/train", "images/val", "masks"):
        (tmp_path / part).mkdir(parents=True)
        Image.fromarray(MASK).save(tmp_path / part / f"{part[-3:]}.png")
    with pytest.raises(DataError, match=r"images: only the images, or only the masks, have a fo"):
        opened(tmp_path)


def test_a_list_in_the_home_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(root.parent))
    (root.parent / "mine.txt").write_text(f"{NAMES[3]}\n")
    assert opened(root, "val", val="~/mine.txt").ids == [NAMES[3]]


@pytest.mark.parametrize("line", ["a", "a_sat", "a_sat.jpg"])
def test_one_folder_and_suffixes(tmp_path: Path, line: str) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, Image.new("RGB", (12, 8)), "jpg")
        write(tmp_path, f"{name}_mask", MASK)
    here: dict[str, Any] = {"images": ".", "masks": "."}
    data = opened(tmp_path, **here, mask_suffix="_mask")
    assert data.ids == ["a", "b"]
    assert np.array_equal(data[1]["mask"], MASK)
    (tmp_path / "a.jpg").rename(tmp_path / "a_sat.jpg")
    (tmp_path / "val.txt").write_text(line)
    both = here | {"image_suffix": "_sat", "mask_suffix": "_mask", "val": "val.txt"}
    assert opened(tmp_path, "val", **both).ids == ["a"]
    with pytest.raises(DataError, match=r"1 of 1 images missing, the first .*b_sat\.\*"):
        opened(tmp_path, "train", **both)
    with pytest.raises(ConfigError, match="mask_suffix=: must be set: the masks lie beside"):
        opened(tmp_path, **here)
    with pytest.raises(DataError, match="no picture whose name ends with _x"):
        opened(tmp_path, **here, mask_suffix="_x")
    with pytest.raises(DataError, match=r"first files are a_sat\.jpg and a_mask\.png\. With data"):
        opened(tmp_path, **here, image_suffix="_sat", mask_suffix="mask")


def test_forms_of_unicode(tmp_path: Path) -> None:
    short, long = (unicodedata.normalize(form, "Ährenfeld é") for form in ("NFC", "NFD"))
    assert short != long
    write(tmp_path / "images", long, Image.new("RGB", (12, 8)), "jpg")
    write(tmp_path / "masks", short, MASK)
    write(tmp_path / "images", "x", Image.new("RGB", (12, 8)), "jpg")
    write(tmp_path / "masks", "x", MASK)
    assert opened(tmp_path).ids == ["x", short]
    (tmp_path / "val.txt").write_text(long, "utf-8")
    assert opened(tmp_path, "val", val="val.txt").ids == [short]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_lists_as_other_systems_write_them(root: Path, encoding: str) -> None:
    text = (
        "# chosen by hand\r\nimages\\photo 01.JPEG\r\nC:\\data/images/photo 04.jpg\r\n photo 07\r\n"
    )
    if encoding in ("utf-16-le", "utf-16-be"):
        text = "\ufeff" + text
    (root / "val.txt").write_bytes(text.encode(encoding))
    assert opened(root, "val", val="val.txt").ids == ["photo 01", "photo 04", "photo 07"]
    if encoding.startswith("utf-16-"):
        (root / "val.txt").write_bytes(text[1:].encode(encoding))
        with pytest.raises(DataError, match=r"val\.txt: .*not in UTF-8"):
            opened(root, "val", val="val.txt")


@pytest.mark.parametrize("second", ["photo 01", "photo 01.JPEG", "images/photo 01.JPEG"])
def test_an_image_twice_in_a_list(root: Path, second: str) -> None:
    (root / "list.txt").write_text(f"photo 00\nphoto 01\n{second}\n")
    with pytest.raises(DataError, match=r"list\.txt: 'photo 01' is in this list more than once$"):
        opened(root, "val", val="list.txt")
    with (root / "list.txt").open("a") as file:
        file.write("photo 00")
    with pytest.raises(DataError, match=r"'photo 00' is .* once, and 1 more of its ids"):
        opened(root, "train", val="list.txt")


def test_worker_hands_the_message_on(root: Path) -> None:
    write(root / "masks", NAMES[0], np.full((8, 12), 9, np.uint8))
    with pytest.raises(DataError) as error:
        list(DataLoader(opened(root), num_workers=1, batch_size=None))
    traceback.clear_frames(error.tb)  # they hold the loader, which ends its process only then
    assert str(error.value).startswith(str(root / "masks"))
    assert str(error.value).endswith("found 9")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": None}, "classes=null: must be a list"),
        ({"classes": "cat"}, "classes=cat: must be a list"),
        ({"classes": ["cat"]}, "2 to 255"),
        ({"classes": ["cat", "cat"]}, "each once"),
        ({"classes": ["cat", True]}, "list of"),  # what YAML makes of yes
        ({"void": 2}, "void=2 is the label of a class"),
        ({"void": 256}, "void=256"),
        ({"void": [1, 2, 3]}, "with a palette"),
        ({"palette": PALETTE[:2]}, "for each of 3"),
        ({"palette": [*PALETTE[:2], [0, 0, 256]]}, "a colour"),
        ({"palette": "voc"}, "a colour"),
        ({"palette": [*PALETTE[:2], [0, 0, 0]]}, "two meanings"),
        ({"palette": PALETTE, "void": [0, 0, 0]}, "two meanings"),
        ({"val_share": 1}, "val_share=1"),
        ({"masks": None}, "masks=null"),
        ({"images": 5}, "images=5: must be the folder"),
        ({"train": ""}, "train=: must be null or a text list"),
        ({"seed": -1}, "seed=-1"),
        ({"val_share": "half"}, "val_share=half"),
    ],
)
def test_settings(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        opened(root, **settings)
    assert "data.dataset." in str(error.value)
    if set(settings) <= {"classes", "palette", "void"}:  # known before any data is there
        with pytest.raises(ConfigError, match=message):
            Folder.labels(**{"classes": CLASSES, "images": "x"} | settings)


def test_command_line(root: Path) -> None:
    cfg = compose_config(
        "train",
        "data=folder",
        f"data.root={root}",
        "data.dataset.classes=[ground,cat,dog]",
        "data.dataset.palette=[[0,0,0],[250,10,20],[20,10,250]]",
        "data.dataset.void=[255,255,255]",
    )
    make = instantiate(cfg.data.dataset, _convert_="all")
    assert make.func.labels(**make.keywords).classes == tuple(CLASSES)
    write(root / "masks", NAMES[0], coloured())
    assert np.array_equal(make(split="all", root=cfg.data.root)[0]["mask"], MASK)
