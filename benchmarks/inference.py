"""From a batch of images to logits: ours, other people's, and our ONNX export in onnxruntime.

    python benchmarks/inference.py --size 375 500 --batch 1

It works as training.py does. The export is made by export.py from an untrained checkpoint.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from peers import GROUPS, random_batch, save_checkpoint
from timing import ROOT, Table, options
from training import compete


def onnx(path: Path, device: str, size: tuple[int, ...]) -> Callable[[], Callable]:
    """An entrant of `race`: imports now, and builds the network when asked."""
    import onnxruntime

    def build() -> Callable:
        provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
        session = onnxruntime.InferenceSession(path, providers=[provider])
        (entry,) = session.get_inputs()
        image = random_batch(*size)[0].numpy()
        if "uint8" not in entry.type:
            image = image.astype("float32") / 255
        return partial(session.run, None, {entry.name: image})

    return build


def main(argv: list[str] | None = None) -> list[Table]:
    """Time the forward passes of all networks in turn."""
    args = options(__doc__, size=(375, 500), batch=1).parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path, problem = Path(folder) / "fcn.onnx", "there is no export.py yet"
        if (ROOT / "export.py").is_file():
            checkpoint, _ = save_checkpoint(Path(folder) / "last.ckpt")
            command = [sys.executable, ROOT / "export.py", f"ckpt={checkpoint}", f"output={path}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            problem = done.stderr.strip()
        run = partial(onnx, path, args.device, (args.batch, *args.size))
        others = {"vgg19": {"ours vgg19 onnxruntime": run}} if path.is_file() else {}
        tables = [compete(args, b, train=False, **others.get(b, {}))[0] for b in GROUPS]
    if not others:
        tables[0].notes.append(f"onnxruntime is left out: {problem}")
        print(tables[0].notes[-1])
    return tables


if __name__ == "__main__":
    main()
