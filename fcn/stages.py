"""FCN-32s, then FCN-16s from its best checkpoint, then FCN-8s from that one's: the paper's way.

    python -m fcn.stages experiment=paper               recipes paper_fcn32s, paper_fcn16s, ...
    python -m fcn.stages experiment=quickstart seed=1   one recipe; model=fcn32s, fcn16s, fcn8s
    python -m fcn.stages data.root=/data optimizer.lr=1e-3

Settings are train.py's and go to each stage, but model.weights only to the first. Runs go to
runs/stages/<date_time>/fcn32s, fcn16s, fcn8s, or below `hydra.run.dir=DIR`. After a kill or Ctrl-C,
the same command goes on: finished stages are skipped, the unfinished one is resumed.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from fcn.config import quoted, short_messages
from fcn.errors import ConfigError
from fcn.checkpoint import best_checkpoint
from fcn.runs.sweep import find_job, finished_before, resumable

PROJECT = Path(__file__).resolve().parents[1]
STAGES = ("fcn32s", "fcn16s", "fcn8s")


def settings_of(stage: str, given: Sequence[str], weights: Path | None) -> list[str]:
    """What train.py is called with: the stage's recipe or model, and what it begins with.

    Raises:
        ConfigError: an argument is no setting, or one that the stages themselves choose.
    """
    for argument in given:
        if argument.startswith("-") or argument.partition("=")[0] in ("model", "resume"):
            raise ConfigError(f"{argument}: not for all stages; each has its own")
    recipe = next((o[11:] for o in given if o.startswith("experiment=")), None)
    if recipe and (PROJECT / "conf" / "experiment" / f"{recipe}_{stage}.yaml").is_file():
        settings = [f"experiment={recipe}_{stage}"]
        given = [o for o in given if not o.startswith("experiment=")]
    else:
        settings = [f"model={stage}", f"name={recipe}_{stage}" if recipe else f"name={stage}"]
    if weights is not None:
        given = [o for o in given if not o.startswith("model.weights=")]
        settings.append(quoted(f"model.weights={weights}"))
    return [*settings, *given]


def train_stages(given: Sequence[str]) -> int:
    """Train the stages that have not finished; the exit code of the last one that ran."""
    folders = [o.partition("=")[2] for o in given if o.startswith("hydra.run.dir=")]
    given = [o for o in given if not o.startswith("hydra.run.dir=")]
    folder = Path(folders[-1]) if folders else find_folder(settings_of(STAGES[0], given, None))
    weights = None
    for stage in STAGES:
        settings = settings_of(stage, given, weights)
        run = find_job(folder, settings)
        if run is None or not finished_before(run):
            if run is not None and resumable(run):
                arguments = [quoted(f"resume={run}")]
            else:
                arguments = [*settings, quoted(f"hydra.run.dir={run or folder / stage}")]
            print(f"stage {stage}: python train.py {' '.join(arguments)}", flush=True)
            code = run_train(arguments)
            if code != 0:
                print(f"stage {stage} has not finished; the same command goes on with it")
                return code
            run = find_job(folder, settings)
            assert run is not None  # it has finished
        weights = best_checkpoint(run)
    return 0


def find_folder(first: list[str]) -> Path:
    """Where the same command has been at work before, or a new folder."""
    root = Path("runs") / "stages"
    before = (f for f in sorted(root.glob("*"), reverse=True) if find_job(f, first))
    return next(before, root / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))


def run_train(arguments: list[str]) -> int:
    """train.py in its own process, so that it may start others (trainer=ddp); its exit code."""
    process = subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *arguments])
    # Ctrl-C in a terminal reaches train.py itself, which saves its state; a SIGTERM to us does not.
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    code = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it


def main() -> None:
    """Train the stages with the settings on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fcn.stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of train.py")
    with short_messages():
        sys.exit(train_stages(parser.parse_args().settings))


if __name__ == "__main__":
    main()
