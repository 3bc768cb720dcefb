"""fcn/inference/photos.py: which photographs are found, which are not, and where results go."""

from pathlib import Path

import pytest

from fcn.errors import ConfigError
from fcn.inference.photos import find_photos, voc_photos


def test_globs(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/b/x.jpg", "a/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    output = tmp_path / "out"

    def found(pattern: str) -> set[str]:
        jobs, _ = find_photos(str(tmp_path / pattern), output)
        return {target.relative_to(output).as_posix() for target in jobs.values()}

    assert found("**/*.jpg") == {"a/x", "a/b/x"}
    assert found("a/*") == {"x", "y"}
    assert found("a/*/../../a/*.png") == {"y"}
    assert found("a/b/x.jpg") == {"x"}
    for pattern in ("none.jpg", "*.gif", "**/*.txt"):
        with pytest.raises(ConfigError, match="no image there"):
            found(pattern)
    with pytest.raises(ConfigError, match="overwrite"):
        find_photos(str(tmp_path / "a" / "y.png"), tmp_path / "a")


@pytest.mark.parametrize(
    ("split", "comp", "message"),
    [
        ("../x", "comp5", r"split=\.\./x: must be the name of a list"),
        (" ", "comp5", "split= : must be null or the name of a list"),
        ("val", "comp7", "comp=comp7: must be one of comp5, comp6"),
    ],
)
def test_voc_settings_that_cannot_work(tmp_path: Path, split: str, comp: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        voc_photos(tmp_path, split, comp, tmp_path)
