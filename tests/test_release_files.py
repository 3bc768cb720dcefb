"""Files for those who cite, update or change the project: they agree with the rest of it."""

import re
import subprocess
import tomllib

import pytest
import yaml
from conftest import PROJECT

from fcn.cli import RENAMED


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def test_pre_commit_has_the_versions_of_the_gate() -> None:
    ruff, local = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", read("requirements/dev.txt"), re.MULTILINE))
    assert ruff["rev"] == f"v{pinned['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    # mypy and import-linter are those that requirements/dev.txt has installed.
    assert {hook["entry"] for hook in local["hooks"]} == {"mypy", "lint-imports"}
    assert {hook["language"] for hook in local["hooks"]} == {"system"}


def test_documents_name_tests_that_are_there() -> None:
    tests = {path.name: path.read_text("utf-8") for path in (PROJECT / "tests").glob("test_*.py")}
    for path in [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]:
        text = path.read_text("utf-8")
        for file, name in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", text):
            assert f"def {name}" in tests[file], f"{path.name}: {file}::{name}"
        for name in re.findall(r"`(?:::)?(test_\w+)`", text):
            assert any(f"def {name}(" in content for content in tests.values()), name


def test_no_weights_or_data_are_committed() -> None:
    """By their size: a file of weights was once committed under a name that .gitignore lacks."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    files = [PROJECT / name for name in listed.stdout.split("\0") if name]
    large = [path.name for path in files if path.is_file() and path.stat().st_size > 500_000]
    assert not large


def test_citation() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()  # what CFF asks for
    for key in ("version", "license"):
        assert citation[key] == project[key]
    assert citation["authors"][0]["name"] in read("LICENSE")
    authors = [author["family-names"] for author in citation["references"][0]["authors"]]
    assert authors == ["Long", "Shelhamer", "Darrell"]


def test_changelog_names_every_renamed_setting() -> None:
    text = read("CHANGELOG.md")
    assert "## [Unreleased]" in text
    for old, new in RENAMED.items():
        if not old.startswith("logger."):  # these are one row together
            assert f"| `{old}` | `{new}` |" in text


def test_commands_can_be_pasted_into_any_shell() -> None:
    """zsh takes brackets for a pattern of file names, and Windows' cmd knows double quotes only."""
    texts = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("*.py")]
    texts += [path for part in ("conf", "fcn") for path in (PROJECT / part).rglob("*.*")]
    for path in filter(lambda path: path.suffix in (".md", ".yaml", ".py"), texts):
        for line in path.read_text(encoding="utf-8").splitlines():
            command = re.search(r"(?:^[ #]*|`)(?:python |evaluate\.py )[^`]*", line)
            words = command[0].partition("  #")[0] if command else ""
            wrong = re.findall(r"""(?:^| )(?:[\w.]+=\[|'[\w.]+=)\S*""", words)
            assert not wrong, f"{path}: {wrong[0]} needs double quotes around it"


def test_ci_runs_the_commands_of_readme() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    readme = read("README.md")
    jobs = workflow["jobs"]
    runs = {name: [s["run"] for s in job["steps"] if "run" in s] for name, job in jobs.items()}
    for command in (*runs["fast"], *runs["all"]):
        assert command in readme
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert [name.partition("-")[0] for name in matrix["os"]] == ["ubuntu", "windows", "macos"]
    assert len(matrix["python"]) == 2
    assert '-m "not slow"' in runs["fast"][-1]
    assert "python -m pytest" in read(runs["all"][-1].split()[-1])
