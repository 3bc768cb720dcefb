"""From a batch of images to logits: ours, other people's, and our ONNX exports in onnxruntime.

    python benchmarks/inference.py --size 375 500 --batch 1

It works as training.py does. export.py makes the exports, in float and in int8, from untrained
checkpoints, and calibrates with noise. How many pixels of a trained network keep their class in
int8, export.py itself says. The bars of int8 need a CPU with VNNI.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from peers import GROUPS, random_batch, save_checkpoint
from PIL import Image
from timing import ROOT, Table, options
from training import EXPORTS, compete


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


def export(folder: Path) -> dict[str, Path]:
    """Export each of EXPORTS. One that fails is left out, and a line says why."""
    (folder / "noise").mkdir()
    for number in range(4):
        noise = random_batch(1, 375, 500)[0][0].permute(1, 2, 0).roll(number, 0).numpy()
        Image.fromarray(noise).save(folder / "noise" / f"{number}.png")
    files = {}
    for name, (backbone, int8) in EXPORTS.items():
        checkpoint = folder / f"{backbone}.ckpt"
        if not checkpoint.is_file():
            save_checkpoint(checkpoint, f"model.backbone={backbone}")
        path = folder / f"{name}.onnx"
        command = [sys.executable, ROOT / "export.py", f"ckpt={checkpoint}", f"output={path}"]
        command += [f"int8={str(int8).lower()}", f"calibrate={folder / 'noise'}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        print(done.stdout or f"{name} is left out: {done.stderr}", flush=True)
        if path.is_file():
            files[name] = path
    return files


def main(argv: list[str] | None = None) -> list[Table]:
    """Time the forward passes of all networks in turn."""
    args = options(__doc__, size=(375, 500), batch=1).parse_args(argv)
    size = (args.batch, *args.size)
    with tempfile.TemporaryDirectory() as folder:
        files = export(Path(folder))
        tables = []
        for backbone in GROUPS:
            others = {n: partial(onnx, files[n], args.device, size) for n in files if backbone in n}
            tables += compete(args, backbone, train=False, **others)
    return tables


if __name__ == "__main__":
    main()
