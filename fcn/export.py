"""A network as an ONNX file or a torch.export program, compared with itself, and read again.

write_checked(module, Path("model.onnx"), argmax=True)
scores, class_names, palette = open_onnx(Path("model.onnx"))
"""

import json
import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental import _config as shapes_config
from torch.nn import functional as F

from fcn.errors import ConfigError, FCNError, WeightsError, reason
from fcn.module import SegmentationModule

Scores = Callable[[Tensor], Tensor]
Run = Callable[[Tensor], Sequence[Tensor]]  # an image -> scores, and the mask if it is there
AXES = {0: "batch", 2: "height", 3: "width"}
SIZES = ((1, 97, 131), (2, 33, 64), (3, 50, 31), (1, 32, 224), (1, 1, 1))  # (N, H, W)
ROUNDING = 1e-4  # of the largest score: for a VGG-19 in float32, it is about 1e-6
EXTRA = ("class_names", "palette", "void", "hyper_parameters")  # JSON, in either file


class ExportError(FCNError):
    """An exported file does not do what the network does."""


class Exported(nn.Module):
    """What the file does: images (N, 3, H, W) uint8 -> scores (N, K, H, W) and, with argmax, mask
    (N, H, W) uint8."""

    def __init__(self, network: nn.Module, argmax: bool) -> None:
        super().__init__()
        self.network, self.argmax = network, argmax

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores = self.network(image)
        return (scores, scores.argmax(1).to(torch.uint8)) if self.argmax else (scores,)


def write_checked(module: SegmentationModule, path: Path, *, argmax: bool) -> tuple[float, float]:
    """Export to `path`, as ONNX or .pt2 by its ending, once the file is known to agree.

    Returns:
        The largest difference of a score, and the share of equal pixels in the masks.

    Raises:
        ConfigError: a package is missing, or `path` cannot be written.
        ExportError: the file disagrees with the network; nothing new is at `path`.
    """
    onnx = path.suffix == ".onnx"
    if onnx:
        _need("onnx", "onnxscript", "onnxruntime")
    settings = dict(module.hparams, weights=None)
    about = (module.class_names, settings.get("palette"), module.void, settings)
    extra = {name: json.dumps(value) for name, value in zip(EXTRA, about, strict=True)}
    network = module.network.eval().cpu().float().to(memory_format=torch.contiguous_format)
    example = torch.zeros(2, 3, 70, 101, dtype=torch.uint8)
    part = path.with_name(f".{path.name}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes_of_1 = shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with torch.no_grad(), sizes_of_1:  # else batches and 32-pixel cells are more than one
            write = _write_onnx if onnx else _write_torch
            write(Exported(network, argmax).eval(), example, part, extra)
        run = _session(part)[0] if onnx else torch.export.load(part).module()  # our own file
        result = compare(run, network)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"output={path}: {reason(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return result


def _write_onnx(program: nn.Module, example: Tensor, path: Path, extra: dict[str, str]) -> None:
    names = ["scores", "mask"][: 1 + program.argmax]  # type: ignore[operator]
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.WARNING)  # what was optimised is no news
    written = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        dynamic_shapes=(AXES,),
        input_names=["image"],
        output_names=names,
        verbose=False,
    )
    assert written is not None
    for value in written.model.graph.outputs:  # the crop's arithmetic, in place of these names
        assert value.shape is not None
        channels = value.shape[1:-2]
        value.shape = type(value.shape)([AXES[0], *channels, AXES[2], AXES[3]])
    written.model.metadata_props.update(extra)
    written.save(path, external_data=False)


def _write_torch(program: nn.Module, example: Tensor, path: Path, extra: dict[str, str]) -> None:
    exported = torch.export.export(
        program, (example,), dynamic_shapes=(dict.fromkeys(AXES, Dim.DYNAMIC),)
    )
    torch.export.save(exported, path, extra_files=extra)


def compare(run: Run, network: nn.Module) -> tuple[float, float]:
    """Largest difference of scores, and share of equal mask pixels, on images of several odd sizes.

    Raises:
        ExportError: a score differs by more than rounding does, or a pixel's class where the two
            highest scores are further apart than that.
    """
    random = torch.Generator().manual_seed(0)
    largest, equal, pixels = 0.0, 0, 0
    for n, height, width in SIZES:
        coarse = torch.randint(256, (n, 3, height // 8 + 1, width // 8 + 1), generator=random)
        image = F.interpolate(coarse.to(torch.uint8), (height, width))  # blocks, 8 pixels wide
        with torch.no_grad():
            expected = network(image)
            scores, *mask = run(image)
        if scores.shape != expected.shape:
            raise ExportError(f"the file gives {tuple(scores.shape)}, not {tuple(expected.shape)}")
        tolerance = ROUNDING * expected.abs().max().item() + 1e-6
        difference = (scores - expected).abs().max().item()
        found = mask[0] if mask else scores.argmax(1)
        first, *second = expected.sort(1, descending=True).values.unbind(1)  # each (N, H, W)
        sure = first - second[0] > 2 * tolerance if second else first == first
        wrong = found != expected.argmax(1)
        if not difference <= tolerance or (wrong & sure).any():
            raise ExportError(
                f"the file disagrees with the network at {width}×{height}: scores differ by "
                f"{difference:.2g} (rounding: {tolerance:.2g}), {wrong.sum()} pixels by their class"
            )
        largest = max(largest, difference)
        equal, pixels = equal + int((~wrong).sum()), pixels + wrong.numel()
    return largest, equal / pixels


def open_onnx(path: Path) -> tuple[Scores, list[str], list | None]:
    """What gives scores, class names and palette of an ONNX file of ours.

    Raises:
        ConfigError: onnxruntime is missing.
        WeightsError: the file is missing, broken or not ours.
    """
    _need("onnxruntime")
    run, metadata = _session(path)
    if not set(EXTRA) <= set(metadata):
        raise WeightsError(f"ckpt={path} was not written by export.py")
    names, palette = (json.loads(metadata[name]) for name in EXTRA[:2])
    return lambda image: run(image)[0], names, palette


def _session(path: Path) -> tuple[Run, dict[str, str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # of many types, none of them public
        raise WeightsError(f"ckpt={path} cannot be read: {str(error).splitlines()[0]}") from error

    def run(image: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]

    return run, session.get_modelmeta().custom_metadata_map


def read_pt2(path: Path) -> SegmentationModule:
    """The network of a .pt2 of ours, built again from its settings, with the weights in the file.

    The file's program is not run: `torch.export.load` unpickles and evaluates what is in a file, so
    that is for files one trusts. Here nothing but JSON and numbers is read.

    Raises:
        WeightsError: the file is broken or not ours.
    """
    try:
        with ZipFile(path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            settings = json.loads(archive.read(f"{root}/extra/hyper_parameters"))
            listed = archive.read(f"{root}/data/weights/model_weights_config.json")
            files = {
                name: entry["path_name"] for name, entry in json.loads(listed)["config"].items()
            }
            module = SegmentationModule(**settings | {"weights": None})
            for name, parameter in module.named_parameters():  # network.score.weight, ...
                numbers = bytearray(archive.read(f"{root}/data/weights/{files[name]}"))
                values = torch.frombuffer(numbers, dtype=torch.float32)
                parameter.data.copy_(values.view_as(parameter))
    except Exception as error:  # a damaged file raises nearly anything
        raise WeightsError(
            f"ckpt={path} is no .pt2 of export.py, or broken: {reason(error)}"
        ) from error
    return module


def _need(*packages: str) -> None:
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"{package} is not installed: pip install -r requirements-export.txt"
            ) from error
