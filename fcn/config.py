"""Settings are checked before anything is downloaded, built or written.

Plain Python: this file must load fast, and knows neither torch nor Hydra.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from fcn.errors import ConfigError, FCNError

Test = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(low: int, high: int = 2**31 - 1) -> Test:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _between(low: float, high: float) -> Test:
    return lambda v: _number(v) and low <= v <= high


def _below(low: float, high: float) -> Test:
    return lambda v: _number(v) and low <= v < high


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _one_of(*choices: Any) -> Test:
    return lambda v: any(type(v) is type(c) and v == c for c in choices)


def _optional(test: Test) -> Test:
    return lambda v: v is None or test(v)


def _pair(test: Test) -> Test:
    return lambda v: isinstance(v, list) and len(v) == 2 and all(map(test, v))


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and "\0" not in value


def _duration(value: Any) -> bool:
    if isinstance(value, dict):  # of hours, minutes, ...
        return any(value.values())
    is_time = isinstance(value, str) and re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value)
    return bool(is_time) and value.strip("0:") != ""


def _strategy(value: Any) -> bool:
    """Lightning's name, or what conf/trainer/ddp.yaml has; others' options are their own."""
    options = ("broadcast_buffers", "gradient_as_bucket_view")
    is_table = isinstance(value, dict) and _text(value.get("_target_"))
    return _text(value) or (is_table and all(isinstance(value.get(k, True), bool) for k in options))


TRUTH = (lambda v: isinstance(v, bool), "true or false")
COUNT = (_whole(1), "a whole number from 1 up, below 2^31")
COUNT_OR_NONE = (_optional(_whole(1)), "null or a whole number from 1 up, below 2^31")
MOST = 2**14  # of what takes memory: 1 GB for an image or a layer of that side; more is a slip
SIZE = (_whole(1, MOST), "a whole number from 1 to 16384")
WHOLE = (_whole(0), "a whole number from 0 up, below 2^31")
POSITIVE = (_positive, "a number above 0")
NOT_NEGATIVE = (_between(0, math.inf), "a number from 0 up")
FRACTION = (_between(0, 1), "a number from 0 to 1")
TEXT_OR_NONE = (_optional(_text), "null or a text")
SEED = (_whole(0, 2**32 - 1), "a whole number from 0 to 4294967295")
SPLIT = (_text, "the name of a split, such as train")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")

RULES: dict[str, tuple[Test, str]] = {
    "name": (
        lambda v: _text(v) and v not in (".", "..") and not re.search(r"[/\\\0]", v),
        "a folder's name, without / or \\",
    ),
    "seed": SEED,
    "resume": TEXT_OR_NONE,
    "model.stride": (_one_of(32, 16, 8), "32, 16 or 8"),
    "model.weights": TEXT_OR_NONE,
    "model.num_classes": (_optional(_whole(2, 255)), "null or a whole number from 2 to 255"),
    "model.head_width": SIZE,
    "model.head_kernel": (lambda v: _whole(1, 63)(v) and v % 2 == 1, "an odd number, 1 to 63"),
    "model.dropout": (_below(0, 1), "at least 0 and below 1"),
    "model.pooling": (_one_of("max", "avg"), "max or avg"),
    "model.fusion": (_one_of("score", "feature"), "score or feature"),
    "model.pool_scales": (
        lambda v: isinstance(v, list) and len(v) == 3 and all(map(_positive, v)),
        "three numbers above 0, for pool5, pool4 and pool3",
    ),
    "model.learn_upsampling": TRUTH,
    "model.learn_last_upsampling": TRUTH,
    "model.alignment": (_one_of("centered", "caffe"), "centered or caffe"),
    "model.freeze_stages": (_whole(0, 5), "a whole number from 0 to 5"),
    "model.checkpoint_stages": (_whole(0, 5), "a whole number from 0 to 5"),
    "model.channels_last": TRUTH,
    "model.head_lr_multiplier": POSITIVE,
    "model.bias_lr_multiplier": POSITIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.momentum": (_below(0, 1), "at least 0 and below 1"),
    "optimizer.betas": (_pair(_below(0, 1)), "two numbers, at least 0 and below 1"),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.nesterov": TRUTH,
    "optimizer.fused": (_one_of("auto", True, False, None), "auto, true, false or null"),
    "trainer.max_steps": (lambda v: v == -1 or _whole(1)(v), "-1 or a whole number from 1 up"),
    "trainer.max_epochs": COUNT_OR_NONE,
    "trainer.max_time": (_optional(_duration), "null or a time DD:HH:MM:SS"),
    "trainer.val_check_interval": COUNT,
    "trainer.log_every_n_steps": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": (_optional(_positive), "null or a number above 0"),
    "trainer.precision": (_one_of(*PRECISIONS), ", ".join(PRECISIONS)),
    "trainer.accelerator": (_text, "auto, cpu, gpu, mps or another of Lightning's"),
    "trainer.devices": (
        lambda v: (
            v in ("auto", -1) or _whole(1, 256)(v) or (isinstance(v, list) and v != [])
        ),
        "a count up to 256, a list or auto",
    ),
    "trainer.strategy": (_strategy, "the name of a strategy, or its _target_ and true or false"),
    "trainer.deterministic": (lambda v: isinstance(v, bool) or v == "warn", "true, false or warn"),
    "trainer.benchmark": (_optional(lambda v: isinstance(v, bool)), "null, true or false"),
    "trainer.limit_val_batches": (
        lambda v: v is None or _whole(1)(v) or (isinstance(v, float) and 0 < v <= 1),
        "null, a whole number from 1 up, or a fraction above 0.0",
    ),
    "trainer.profiler": (
        _one_of(None, "simple", "advanced", "pytorch"),
        "null, simple, advanced or pytorch",
    ),
    "trainer.num_nodes": COUNT,
    "trainer.compile": TRUTH,
    "trainer.enable_progress_bar": TRUTH,
    "trainer.enable_model_summary": TRUTH,
    "tile": (_optional(_whole(64)), "null or a whole number from 64 up"),
    "tta.flip": TRUTH,
    "tta.scales": (
        lambda v: isinstance(v, list) and v != [] and all(_positive(x) and x <= 8 for x in v),
        "a list of numbers above 0, at most 8, such as [0.75, 1, 1.25]",
    ),
    "ckpt": (_text, "a checkpoint, or a run's folder"),
    "input": TEXT_OR_NONE,
    "output": TEXT_OR_NONE,
    "format": TEXT_OR_NONE,
    "split": TEXT_OR_NONE,
    "accelerator": (_text, "auto, cpu, gpu, mps or another of Lightning's"),
    "batch_size": SIZE,
    "device": (
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v)),
        "auto, cpu, mps, cuda or cuda:1",
    ),
    "precision": (_one_of(None, *PRECISIONS[1:]), f"null, {', '.join(PRECISIONS[1:])}"),
    "comp": (_one_of("comp5", "comp6"), "comp5 or comp6"),
    "argmax": TRUTH,
    "report.images": WHOLE,
    "callbacks.average_decay": (_optional(_below(0, 1)), "null, or at least 0 and below 1"),
    "callbacks.half_life": POSITIVE,
    "callbacks.window": COUNT,
    "callbacks.checkpoint_every_n_steps": COUNT,
    "callbacks.panel_images": WHOLE,
}  # fmt: skip


def check_values(config: Mapping[str, Any]) -> None:
    """Refuse values that cannot work, each for itself.

    Args:
        config: resolved, as plain Python.

    Raises:
        ConfigError: names the first such key, its value, and what it must be.
    """
    for key, (test, wanted) in RULES.items():
        group, _, name = key.rpartition(".")
        section = config.get(group) or {} if group else config
        if not isinstance(section, Mapping):
            raise ConfigError(f"{group}={section!r} is no group of settings: see conf/{group}/")
        if name in section and not test(section[name]):
            raise ConfigError(f"{key}={_shown(section[name])}: must be {wanted}")


def check_training(config: Mapping[str, Any]) -> None:
    """As `check_values`, and refuse settings that do not go together in a training run."""
    check_values(config)
    trainer = config.get("trainer") or {}
    ends = (trainer.get("max_steps", -1) != -1, trainer.get("max_epochs"), trainer.get("max_time"))
    if not any(ends):
        raise ConfigError("training would never end: set trainer.max_steps, max_epochs or max_time")
    model = config.get("model") or {}
    for key in ("learn_upsampling", "learn_last_upsampling"):
        if model.get("fusion") == "feature" and not model.get(key, True):
            raise ConfigError(f"model.fusion=feature needs model.{key}=true")
    if model.get("alignment") == "caffe" and model.get("head_kernel") != 7:
        raise ConfigError("model.alignment=caffe needs model.head_kernel=7")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def short_messages(*mendable: type[Exception]) -> Iterator[None]:
    """End the script with a line or two, not a traceback, where the user can mend what is wrong.

    Args:
        mendable: exception types beside `FCNError`: those of the configuration library.
    """
    expected: tuple[type[Exception], ...] = (FCNError, *mendable)
    try:
        yield
    except Exception as error:
        if not isinstance(error, expected) and not _raised_by_hydra(error):
            raise
        print(f"error: {short_message(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None


def short_message(error: Exception) -> str:
    """What our own error says, if one is the cause, or the part of Hydra's that matters."""
    known = next((e for e in _causes(error) if isinstance(e, FCNError)), None)
    return str(known) if known is not None else _of_hydra(error)


PATHS = ("ckpt", "input", "output", "data.root", "model.weights", "resume", "hydra.run.dir")


def quoted(argument: str) -> str:
    """Keep Hydra's grammar out of file names: any character may be in them."""
    key, _, value = argument.partition("=")
    if key not in PATHS or value in ("", "null"):
        return argument
    value = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + end[2].replace("'", "\\'"), value)
    return f"{key}='{value}'".replace("${", "\\${")


def _of_hydra(error: Exception) -> str:
    """The two lines that matter of a message of Hydra's."""
    if type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        return str(error.__cause__).strip()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].replace("Could not override", "There is no setting")
    options: list[str] = []
    for number, line in enumerate(lines):
        if line.startswith("Available options"):
            end = next((i for i, x in enumerate(lines) if x.startswith("Config search path")), None)
            options = [x for x in lines[number + 1 : end] if not x.startswith("_")]
    if options:
        return f"{first}\nAvailable: {', '.join(options)}"
    return f"{first}\n`--cfg job` shows every setting, `--help` the groups."


def _raised_by_hydra(error: Exception) -> bool:
    """Its own complaints are of any type (`data=1`: ValueError); those of what it calls are not."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("hydra", "omegaconf")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
