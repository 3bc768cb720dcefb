"""notebooks/tutorial.ipynb, from its first cell to its last, with one step of each training.

Its three networks are of the tests' tiny VGG. nbformat and nbclient are imported inside functions,
since that takes seconds in a worker that runs no test of this file.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import PROJECT

NOTEBOOK = PROJECT / "notebooks" / "tutorial.ipynb"

# A cell that is added behind the definition of `run`. It tries `run` with short commands. The
# project's commands then run in the notebook's own process, which has imported torch already.
RUN = """
import runpy
from hydra.core.global_hydra import GlobalHydra

run("-c", "print('ran', 1 + 1)")
try:
    run("-c", "import sys; sys.exit('this is why')")
except RuntimeError as error:
    print(error)

def run(*command):
    print("$ python", *command, flush=True)
    before, sys.argv = sys.argv, list(command)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
"""

# What a cell that is added at the end prints.
RESULTS = """
import json
print(json.dumps({
    "by_hand": {name: float(value) for name, value in by_hand.items()},
    "scores": {name: scores[name] for name in by_hand},
    "differences": [difference_224, difference_500, difference_bilinear],
    "maps": [at_500["pool5"], at_500["conv6"]],
    "fields": [fields["pool5"], field_16],
    "blocks": list(blocks.values()),
    "gigabytes": plans[3].total / memory.GB,
    "runs": [str(folder.resolve()) for folder in runs.values()],
}))
"""


def test_notebook_is_small_and_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 20
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert max(len("".join(cell["source"]).splitlines()) for cell in cells) <= 20
    assert NOTEBOOK.stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.xdist_group("notebook")  # long: it begins early
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the project, so that it is seen what is written where."""
    import nbformat
    from nbclient import NotebookClient

    project = tmp_path / "project"
    for name in ("fcn", "conf"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, project / name, ignore=ignored)
    for name in ("train.py", "predict.py"):
        shutil.copy(PROJECT / name, project)
    shutil.copy(PROJECT / "tests" / "tiny_vgg.py", project)
    with (project / "fcn" / "vgg.py").open("a", encoding="utf-8") as file:
        file.write("\nimport tiny_vgg\n")  # registers it, in each process
    (project / "notebooks").mkdir()
    before = files(project)
    monkeypatch.setenv("FCN_TUTORIAL_STEPS", "1")
    # What the notebook has compiled of the project, train.py and predict.py need not compile again.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (trained,) = (cell for cell in notebook.cells if '"model.backbone=vgg11"' in cell.source)
    trained.source = trained.source.replace("vgg11", "vgg_tiny").replace("width=128", "width=8")
    place = next(n for n, cell in enumerate(notebook.cells) if "def run(" in cell.source)
    in_one_process = nbformat.v4.new_code_cell(RUN)
    notebook.cells.insert(place + 1, in_one_process)
    notebook.cells.append(nbformat.v4.new_code_cell(RESULTS))
    resources = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()  # a failing cell raises
    results = json.loads(notebook.cells[-1].outputs[0].text)
    shown = "".join(output.text for output in in_one_process.outputs)
    assert re.fullmatch(r"\$ python -c .*\nran 2\n\$ .*\nthis is why\n-c failed; .*\n", shown)

    by_hand = {"pixel_acc": 6 / 7, "mean_acc": 31 / 36, "miou": 317 / 420, "fwiou": 367 / 490}
    assert results["by_hand"] == pytest.approx(by_hand)
    assert results["scores"] == pytest.approx(by_hand)
    assert max(results["differences"]) < 1e-4  # fully connected = conv6; transposed = bilinear
    assert results["maps"] == [[512, 16, 16], [4096, 16, 16]]
    assert results["fields"] == [[32, 268], 404]  # of a VGG-19's pool5; 404: the paper's table 1
    assert results["blocks"] == sorted(results["blocks"])  # finer strides show more
    assert 1.5 < results["gigabytes"] < 8

    for run in map(Path, results["runs"]):
        assert run.is_relative_to(project)
        assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"] == 1
    written = {path.parts[:2] for path in files(project) - before}
    assert written == {("runs", "notebook")}


def files(folder: Path) -> set[Path]:
    """All files in a folder and below, relative to it, but for what Python has compiled."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path for path in found if path.parent.name != "__pycache__"}
