"""Whether a long run grows: resident memory and open files of train.py over its steps.

    python benchmarks/long_run.py                        5,000 steps, a tiny network
    python benchmarks/long_run.py --every 60 model.head_width=64 trainer.max_steps=100000

The quickstart with a tiny network and small pictures, 100 validations with panels, curves and
animations. train.py runs as anybody would start it, and this script looks at it from outside.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["experiment=quickstart", "logger=none", "model.backbone=vgg11", "model.head_width=8"]
SETTINGS += ["data.batch_size=1", "data.dataset.size=48", "data.dataset.val_length=8"]
SETTINGS += ["data.num_workers=1", "trainer.max_steps=5000", "trainer.val_check_interval=50"]
SETTINGS += ["trainer.enable_progress_bar=false", "trainer.precision=32-true"]


def main(argv: list[str] | None = None) -> list[tuple[int, float, float, int]]:
    """Train for long, and print memory and open files as it goes on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=float, default=5, help="seconds from one look to the next")
    parser.add_argument("overrides", nargs="*", help="of conf/")
    args = parser.parse_args(argv)
    measured: list[tuple[int, float, float, int]] = []  # step, MB, loaders' MB, open files
    print("step, resident MB, of its loaders, open files", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, ROOT / "train.py", *SETTINGS, *args.overrides]
        process = subprocess.Popen([*command, f"hydra.run.dir={run}"], stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(args.every)
                if (step := last_step(run / "metrics.csv")) and (now := look(process.pid)):
                    measured.append((step, *now))
                    print(*measured[-1], sep=", ", flush=True)
        finally:
            process.kill()
    if process.returncode or not measured:
        raise SystemExit(f"train.py ended with {process.returncode} after {len(measured)} looks")
    return measured


def last_step(path: Path) -> int | None:
    """Of a metrics.csv that is being written; None before its first row."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[1:-1]  # whole ones
    return int(lines[-1].split(b",")[0]) if lines else None


def look(pid: int) -> tuple[float, float, int] | None:
    """Resident MB of a process and of its children, its open files; None if it has ended."""
    try:
        process = psutil.Process(pid)
        own = process.memory_info().rss
        loaders = sum(child.memory_info().rss for child in process.children())
        files = process.num_handles() if sys.platform == "win32" else process.num_fds()
    except psutil.NoSuchProcess:
        return None
    return own / 1e6, loaders / 1e6, files


if __name__ == "__main__":
    main()
