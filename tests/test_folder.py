"""Own data: pairs by name, splits, labels and colours; errors name the setting that is wrong."""

import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose_config
from hydra.utils import instantiate
from PIL import Image

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


def write_pair(
    root: Path, name: str, split: str = "", layout: str = "{folder}/{split}", mask: Any = MASK
) -> None:
    for folder, end in (("images", "jpg"), ("masks", "png")):
        write(root / layout.format(folder=folder, split=split), name, mask, end)


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


def refused(root: Path, message: str, split: str = "all", **settings: Any) -> None:
    """The data cannot be opened, and the error says why."""
    with pytest.raises(DataError, match=message):
        opened(root, split, **settings)


def test_indexed(root: Path) -> None:
    data: SegmentationDataset = opened(root)
    assert data.ids == [sample["id"] for sample in data] == NAMES
    assert data.classes == tuple(CLASSES)
    assert len(data.palette) == 3
    for sample in data:
        assert sample["image"].shape == (3, 8, 12)
        assert np.array_equal(sample["mask"], MASK)


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
    write(root / "masks", NAMES[3], MASK.clip(max=2))  # grey, so it holds labels
    data = opened(root, **settings)
    assert data.palette == tuple(map(tuple, PALETTE))
    for i, expected in enumerate([MASK, MASK, MASK, MASK.clip(max=2)]):
        assert np.array_equal(data[i]["mask"], expected)
    write(root / "masks", NAMES[4], coloured(void=(1, 2, 3)))
    with pytest.raises(DataError, match=r"photo 04\.png: not in .*palette: \(1, 2, 3\)"):
        data[4]
    with pytest.raises(DataError, match=r"photo 00\.png: .*255, 255, 255"):
        opened(root, palette=PALETTE)[0]
    with pytest.raises(DataError, match=r"x\.jpg: .*JPEG changes the values .* as PNG"):
        data.read_mask(write(root, "x", picture, "jpg"))


GREY = [[0, 0, 0], [128, 128, 128], [255, 255, 255]]


@pytest.mark.parametrize(
    ("kind", "wrong"), [(np.uint8, [9]), (np.uint16, [9, 300]), (np.float32, [-7, 65535])]
)
def test_grey_colours(root: Path, kind: Any, wrong: list[int]) -> None:
    values = np.array([0, 128, 255])[MASK.clip(max=2)].astype(kind)  # (8, 12)
    path = write(root, "x", values, "tif")
    data = opened(root, palette=GREY, void=None)
    assert np.array_equal(data.read_mask(path), MASK.clip(max=2))
    for value in wrong:
        values[0, 0] = value
        write(root, "x", values, "tif")
        with pytest.raises(DataError, match=rf"x\.tif: not in .*palette: \(?{value}(, 9, 9\))?$"):
            data.read_mask(path)


def test_transparent_pixels_of_coloured_masks(root: Path) -> None:
    """What was erased has no colour, but its file may keep one; people see the background."""
    pixels = np.zeros((8, 12, 4), np.uint8)
    pixels[2:5, 3:9] = 255
    data = opened(root, palette=GREY, void=None)
    labels = data.read_mask(write(root, "x", pixels))
    assert np.array_equal(labels, pixels[..., 3] // 255 * 2)
    pixels[..., :3] = 255
    with pytest.raises(DataError, match=r"x\.png: .*transparent pixels above \(255, 255, 2"):
        data.read_mask(write(root, "x", pixels))


COLOURS: dict[str, Any] = {"palette": PALETTE, "void": 255}


HINTS: list[Any] = [
    # Grey values that are spread, so that people can see them.
    (MASK.clip(max=2) * 100, {}, r"set data\.dataset\.palette to .* as \[100,100,100\]"),
    (coloured(), {}, r"palette, .*; its colours are \(20, 10, 250\), \(255, 255, 255\), \(2"),
    (np.arange(1200).astype(">u2").view("u1").reshape(20, 40, 3), {}, "are more than 256$"),
    (coloured(), COLOURS, r"if these are void, data.dataset.void=\[255,255,255\]$"),
    (coloured().convert("L"), COLOURS, r"labels must be .*; a grey mask holds labels: save it"),
]


@pytest.mark.parametrize(("picture", "settings", "message"), HINTS)
def test_hints(root: Path, picture: Any, settings: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(root, **settings).read_mask(write(root, "x", picture))


def test_share(root: Path) -> None:
    train, val = opened(root, "train").ids, opened(root, "val").ids
    assert (len(train), len(val)) == (8, 2)
    assert sorted(train + val) == NAMES
    assert len({tuple(opened(root, "val", seed=seed).ids) for seed in range(8)}) > 3
    assert len(opened(root, "val", val_share=0.01).ids) == 1
    refused(root, r"for the split 'train', of 10 in all; change", "train", val_share=0.99)
    write_pair(root, "new")
    assert len(set(opened(root, "val").ids) - set(val)) <= 1


def test_lists(root: Path) -> None:
    lists = root / "lists"
    lists.mkdir()
    (lists / "val.txt").write_text("photo 03\n\nphoto 07.png\n")
    settings: dict[str, Any] = {"val": "lists/val.txt"}
    assert opened(root, "val", **settings).ids == ["photo 03", "photo 07"]
    rest = [name for name in NAMES if name not in ("photo 03", "photo 07")]
    assert opened(root, "train", **settings).ids == rest
    (lists / "train.txt").write_text("photo 00\nphoto 01\n")
    settings["train"] = str(lists / "train.txt")
    (root / "masks" / "photo 09.png").unlink()  # it is in no list, so that nobody misses it
    assert opened(root, "train", **settings).ids == NAMES[:2]
    (lists / "train.txt").write_text("photo 00\nphoto 99\n")
    refused(
        root,
        r"train\.txt: 'photo 99' has neither .* mask \(the first of 1 such ids, of 2\)",
        "train",
        **settings,
    )
    with missing_allowed():  # as the check opens it
        errors = Survey("train", opened(root, "train", **settings), images=True).errors
    assert [str(error) for error in errors] == [
        f"{lists / 'train.txt'}: 'photo 99' has neither an image nor a mask"
    ]
    refused(root, r"none\.txt.*No such file", "train", train="none.txt")
    # An id that itself ends like a picture, by its id, by its file, and beside one without that.
    write_pair(root, "photo 03.jpg")
    write_pair(root, "p.png")
    (lists / "val.txt").write_text("p.png\nphoto 03.jpg.jpg\nphoto 03.jpg\n")
    assert opened(root, "val", val="lists/val.txt").ids == ["p.png", "photo 03.jpg", "photo 03"]


def test_partners(root: Path) -> None:
    (root / "masks" / "photo 03.png").unlink()
    refused(root, r"1 of 10 masks missing, the first .*masks.photo 03\.\*")
    (root / "images" / "photo 02.bmp").unlink()
    refused(root, r"1 of 10 images missing, the first .*photo 02\.\*")
    write(root / "images", "photo 00", MASK)
    refused(root, r"photo 00\.png: photo 00\.jpg has the same name except")


def test_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Folder(split="all", images=str(root / "images"), masks=f"{root}/masks", classes=CLASSES)
    assert data.ids == NAMES
    refused(root, r"none: there is no such folder", masks="none")
    (root / "none").mkdir()
    refused(root, r"none: there is no picture", images="none")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(root.parent))
    (root.parent / "mine.txt").write_text(f"{NAMES[3]}\n")
    assert opened(root, "val", val="~/mine.txt").ids == [NAMES[3]]


@pytest.mark.parametrize("setting", ["root", "images", "masks", "val"])
def test_the_home_folder_of_an_unknown_user(root: Path, setting: str) -> None:
    with pytest.raises(DataError, match=r"no_user.*: .*[nN]o such"):
        opened(**{"root": root, setting: "~no_user"})  # type: ignore[arg-type]


@pytest.mark.parametrize("names", ["train", "aachen ulm", "train/aachen val/ulm"])
def test_folders_that_are_not_read(tmp_path: Path, names: str) -> None:
    for name in names.split():
        write_pair(tmp_path, "a", name)
    refused(tmp_path, r"no picture in this folder, but .* named train and val")


@pytest.mark.parametrize("layout", ["{folder}/{split}", "{split}/{folder}"])
@pytest.mark.parametrize("names", ["train val test", "Training validation Testing"])
def test_a_folder_for_each_split(tmp_path: Path, layout: str, names: str) -> None:
    numbers = {"train": 3, "val": 2, "test": 1}
    for name, number in zip(names.split(), numbers.values(), strict=True):
        for i in range(number):  # the same names in each split
            write_pair(tmp_path, str(i), name, layout, np.full_like(MASK, number - 1))
    write_pair(tmp_path, "a", "x", layout)
    for split, number in numbers.items():
        assert opened(tmp_path, split).ids == [f"{split}/{i}" for i in range(number)]
    assert len(opened(tmp_path, "all")) == 6
    assert (opened(tmp_path, "val")[1]["mask"] == 1).all()
    (tmp_path / "val.txt").write_text("0")
    with pytest.raises(
        ConfigError, match=r"data\.dataset\.val must be null: the folders train and val"
    ):
        opened(tmp_path, val="val.txt")
    path = tmp_path / layout.format(folder="masks", split=names.split()[1]) / "1.png"
    path.unlink()
    where = re.escape(str(path.with_suffix(".*")))
    refused(tmp_path, f"1 of 2 masks missing, the first {where}$", "val")
    write_pair(tmp_path, "a", "valid", layout)
    refused(tmp_path, r"val.* are both folders of the split val; keep one")


def test_folders_of_some_splits_only(tmp_path: Path) -> None:
    for split in ("test", "train"):
        for name in ("0", "1"):
            write_pair(tmp_path, name, split, "{split}/{folder}")
    settings = {"images": "train/images", "masks": "train/masks"}
    advice = " ".join(f"data.dataset.{key}={value}" for key, value in settings.items())
    found = (
        r"images: there is no such folder, only train/images and test/images\. .* train and val "
    )
    refused(tmp_path, rf"{found}.*{re.escape(advice)}$")
    assert opened(tmp_path, **settings).ids == ["0", "1"]  # the advice is good
    write(tmp_path / "val" / "images", "0", MASK)
    refused(tmp_path, "masks: there is no such folder, only train/masks and test/masks")


@pytest.mark.parametrize("layout", ["{folder}/{split}", "{split}/{folder}"])
@pytest.mark.parametrize("missing", ["images", "masks"])
def test_a_split_without_a_folder(tmp_path: Path, layout: str, missing: str) -> None:
    """The message names the folder that is missing, and not that of another split."""
    for split in ("train", "val", "test"):
        write_pair(tmp_path, "0", split, layout)
    folder = tmp_path / layout.format(folder=missing, split="test")
    shutil.rmtree(folder)
    assert opened(tmp_path, "val").ids == ["val/0"]
    message = f"1 of 3 {missing} missing, the first {re.escape(str(folder / '0.*'))}$"
    refused(tmp_path, message, "all")


def test_a_split_without_pairs(tmp_path: Path) -> None:
    """A share or a list cannot make a split `test`; a folder can."""
    for name in "ab":
        write_pair(tmp_path, name)
    refused(tmp_path, "split 'test', of 2 in all; it needs a folder of that name", "test")
    (tmp_path / "val.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"change data\.dataset\.val_share or the lists"):
        opened(tmp_path, "train", val="val.txt")


def test_pictures_outside_of_the_folders_of_the_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_pair(tmp_path, "0", split)
    write(tmp_path / "images", "._0", MASK)  # as macOS leaves beside files on other disks
    assert opened(tmp_path).ids == ["train/0", "val/0"]
    write(tmp_path / "images", "0", MASK)
    refused(tmp_path, "images: there are pictures outside of train and val")


def test_only_the_images_have_a_folder_for_each_split(tmp_path: Path) -> None:
    for part in ("images/train", "images/val", "masks"):
        write(tmp_path / part, part[-3:], MASK)
    refused(tmp_path, r"images: only the images, or only the masks, have a folder")


def test_one_folder_and_suffixes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, Image.new("RGB", (12, 8)), "jpg")
        write(tmp_path, f"{name}_mask", MASK)
    here: dict[str, Any] = {"images": ".", "masks": "."}
    data = opened(tmp_path, **here, mask_suffix="_mask")
    assert data.ids == ["a", "b"]
    assert np.array_equal(data[1]["mask"], MASK)
    (tmp_path / "a.jpg").rename(tmp_path / "a_sat.jpg")
    both = here | {"image_suffix": "_sat", "mask_suffix": "_mask", "val": "val.txt"}
    for line in ("a", "a_sat", "a_sat.jpg"):
        (tmp_path / "val.txt").write_text(line)
        assert opened(tmp_path, "val", **both).ids == ["a"]
    refused(tmp_path, r"1 of 1 images missing, the first .*b_sat\.\*", "train", **both)
    with pytest.raises(ConfigError, match="mask_suffix=: must be set, to tell the masks from"):
        opened(tmp_path, **here)
    refused(tmp_path, "no picture whose name ends with _x", **here, mask_suffix="_x")
    message = r"first files are a_sat\.jpg and a_mask\.png\. With data"
    refused(tmp_path, message, **here, image_suffix="_sat", mask_suffix="mask")


def test_one_folder_and_a_suffix_of_the_images_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, f"{name}_img", Image.new("RGB", (12, 8)), "jpg")
        write(tmp_path, name, MASK)
    data = opened(tmp_path, images=".", masks=".", image_suffix="_img")
    assert data.ids == ["a", "b"]
    assert np.array_equal(data[1]["mask"], MASK)
    (tmp_path / "b.png").unlink()
    message = r"1 of 2 masks missing, the first .*b\.\*"
    refused(tmp_path, message, images=".", masks=".", image_suffix="_img")


def test_forms_of_unicode(tmp_path: Path) -> None:
    short, long = (unicodedata.normalize(form, "Ährenfeld é") for form in ("NFC", "NFD"))
    assert short != long
    write_pair(tmp_path, "x")
    write(tmp_path / "images", long, MASK)
    write(tmp_path / "masks", short, MASK)
    assert opened(tmp_path).ids == ["x", short]
    (tmp_path / "val.txt").write_text(long, "utf-8")
    assert opened(tmp_path, "val", val="val.txt").ids == [short]


def test_lists_as_other_systems_write_them(root: Path) -> None:
    lines = (
        "# chosen by hand",
        "images\\photo 01.JPEG",
        "C:\\data/images/photo 04.jpg",
        " photo 07",
    )
    text = "\r\n".join(lines)
    for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
        (root / "val.txt").write_bytes(f"\ufeff{text}".encode(encoding))
        assert opened(root, "val", val="val.txt").ids == ["photo 01", "photo 04", "photo 07"]
    (root / "val.txt").write_bytes(text.encode("utf-16-le"))
    refused(root, r"val\.txt: .*not in UTF-8", val="val.txt")


def test_an_image_twice_in_a_list(root: Path) -> None:
    lines = "photo 00\nphoto 01\nimages/photo 01.JPEG\n"
    (root / "list.txt").write_text(lines)
    refused(root, r"list\.txt: 'photo 01' is in this list more than once$", val="list.txt")
    (root / "list.txt").write_text(f"{lines}photo 00\n")
    refused(root, r"'photo 00' is .* once, and 1 more of its ids", val="list.txt")


SETTINGS: list[Any] = [
    ({"classes": None}, "classes=null: must be a list"),
    ({"classes": "cat"}, "classes=cat: must be a list"),
    ({"classes": ["cat", "cat"]}, "each once"),
    ({"classes": ["cat", True]}, "2 to 255"),  # what YAML makes of yes
    ({"void": 2}, "void=2 is the label of a class"),
    ({"void": [1, 2, 3]}, "with a palette"),
    ({"palette": PALETTE[:2]}, "for each of 3"),
    ({"palette": [*PALETTE[:2], [0, 0, 256]]}, "a colour"),
    ({"palette": [*PALETTE[:2], [0, 0, 0]]}, "two meanings"),
    ({"palette": PALETTE, "void": [0, 0, 0]}, "two meanings"),
    ({"val_share": 1}, "val_share=1"),
    ({"masks": None}, "masks=null"),
    ({"images": 5}, "images=5: must be the folder"),
    ({"train": ""}, "train=: must be null or a text list"),
    ({"seed": -1}, "seed=-1"),
    ({"image_suffix": None}, "image_suffix=null: must be a text"),
    ({"mask_suffix": 0}, "mask_suffix=0: must be a text"),
    ({"void": "255"}, "void=255: must be null, the number .*, but is a text; remove the quotes"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings(root: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.dataset\..*{message}"):
        opened(root, **settings)
    if set(settings) <= {"classes", "palette", "void"}:  # known before any data is there
        with pytest.raises(ConfigError, match=message):
            Folder.labels(**{"classes": CLASSES, "images": "x"} | settings)


def test_command_line(root: Path) -> None:
    settings = ["classes=[ground,cat,dog]", "palette=[[0,0,0],[250,10,20],[20,10,250]]"]
    settings += ["void=[255,255,255]"]
    data = [f"data.dataset.{setting}" for setting in settings]
    cfg = compose_config("train", "data=folder", f"data.root={root}", *data)
    make = instantiate(cfg.data.dataset, _convert_="all")
    assert make.func.labels(**make.keywords).classes == tuple(CLASSES)
    write(root / "masks", NAMES[0], coloured())
    assert np.array_equal(make(split="all", root=cfg.data.root)[0]["mask"], MASK)
