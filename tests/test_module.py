"""The LightningModule: loss, scores, optimizer groups, and checkpoints that stand alone."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import FINISHED, train_tiny
from pytorch_lightning.callbacks import Timer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from fcn.checkpoint import last_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.module import SegmentationModule
from fcn.network import FCN
from fcn.runs.metrics import read_column, read_metrics

K = 3
SMALL: dict[str, Any] = {"backbone": "vgg_tiny", "head_width": 8, "head_kernel": 3}


def small(**options: Any) -> SegmentationModule:
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    return SegmentationModule(num_classes=K, optimizer=sgd, **SMALL, **options)


@pytest.fixture(scope="module")
def module() -> SegmentationModule:
    """For tests that leave it as it is: FCN-8s whose scores are not zero as at the start."""
    torch.manual_seed(0)
    module = small()
    for layer in ("score", "skips.pool4", "skips.pool3"):
        torch.nn.init.normal_(module.network.get_parameter(f"{layer}.weight"))
    return module


def batch(*sizes: int, void: float = 0.2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (len(sizes), 3, 40, 36), dtype=torch.uint8, generator=generator)
    mask = torch.randint(K, (len(sizes), 40, 36), dtype=torch.uint8, generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < void] = 255
    return {"image": image, "mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_torchs_mean_without_void(module: SegmentationModule, dtype: torch.dtype) -> None:
    """In float32 under autocast, too."""
    logits = (5 * torch.randn(2, K, 9, 7)).to(dtype)
    mask = torch.randint(K, (2, 9, 7)).to(torch.uint8)
    mask[0, :5] = 255  # so that a mean of each image's mean would differ
    expected = F.cross_entropy(logits.float(), mask.long(), ignore_index=255)
    torch.testing.assert_close(module.loss(logits, mask), expected)


def test_weighted_loss_by_hand() -> None:
    """The sum of w·loss, divided by the number of pixels that are not void; validation: w is 1."""
    weights, data = [0.5, 2.0, 0.0], batch(1, 2)
    module = small(class_weights=weights)
    torch.nn.init.normal_(module.network.get_parameter("score.weight"))
    logits, mask = module.eval()(data["image"]), data["mask"]
    each = F.cross_entropy(logits, mask.long(), ignore_index=255, reduction="none")
    seen = mask != 255
    expected = (torch.tensor(weights)[mask[seen].long()] * each[seen]).sum() / seen.sum()
    torch.testing.assert_close(module.training_step(data, 0), expected)
    module.validation_step(data, 0)
    torch.testing.assert_close(module.val_losses.compute().sum(), each[seen].sum())
    assert module.state_dict().keys() == small().state_dict().keys()  # an older checkpoint fits
    assert module.hparams["class_weights"] == weights
    with pytest.raises(ValueError, match="call `set_class_weights`"):
        small(class_weights="balanced").on_train_start()


def gradients(module: SegmentationModule, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])


def test_loss_of_void_only_is_zero(module: SegmentationModule) -> None:
    loss = module.training_step(batch(1, 2, void=1.1), 0)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(module, loss))  # NaN is not 0


class Operations(TorchDispatchMode):
    """Notes the operations of torch that are called, and the reductions of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.reductions = set[str](), set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        if "nll_loss" in str(func):
            self.reductions.add(args[3] if isinstance(args[3], int) else args[4])
        return func(*args, **kwargs or {})


# Those that a network like this could call and that torch refuses on a GPU where
# trainer.deterministic=true, from the documentation of torch.use_deterministic_algorithms.
NOT_DETERMINISTIC = {"adaptive_avg_pool2d", "max_unpool2d", "upsample_bilinear2d", "histc", "put_"}
NOT_DETERMINISTIC |= {"reflection_pad2d", "median", "grid_sampler_2d", "scatter_reduce"}


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_deterministic_step_calls_what_a_gpu_can_do(pooling: str) -> None:
    """torch refuses its own sum of the losses, so no reduction (0) may be left to it."""
    module, data = small(pooling=pooling, dropout=0.0, class_weights=[0.5, 1.0, 2.0]), batch(1, 2)
    torch.nn.init.normal_(module.network.get_parameter("score.weight"))

    def step() -> tuple[Operations, list[torch.Tensor]]:
        with Operations() as called:
            loss = module.training_step(data, 0)
            found = [loss.detach(), *gradients(module, loss)]
            module.validation_step(data, 0)
        return called, found

    usual, expected = step()
    torch.use_deterministic_algorithms(True)
    try:
        exact, found = step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert {"nll_loss2d_forward", "nll_loss2d_backward", "bincount"} <= exact.names
    assert not {name.removesuffix("_backward") for name in exact.names} & NOT_DETERMINISTIC
    assert (usual.reductions, exact.reductions) == ({2}, {0})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def groups(module: SegmentationModule) -> dict[str, dict[str, Any]]:
    """The optimizer's settings for each parameter by name; each is in one group only."""
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    found = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: found[p] for name, p in module.network.named_parameters() if p in found}


def test_optimizer_groups() -> None:
    module = small(head_lr_multiplier=10.0, freeze_stages=2)
    module.fresh_layers = ["score", "upsample.to_image_8"]  # as if the rest were loaded
    found = groups(module)
    names = {name for name, _ in module.network.named_parameters()}
    assert found.keys() == {n for n in names if not n.startswith(("stages.0.", "stages.1."))}
    for name, group in found.items():
        layer, _, kind = name.rpartition(".")
        head = 10 if layer in ("score", "upsample.to_image_8") else 1
        rate, decay = (2, 0) if kind == "bias" else (1, 5e-4)
        assert group["lr"] == pytest.approx(0.1 * head * rate), name
        assert group["weight_decay"] == decay, name
        assert group["momentum"] == 0.9
    found = groups(small(learn_upsampling=False, bias_lr_multiplier=1.0))
    assert not any(name.startswith("upsample.") for name in found)
    assert {group["lr"] for group in found.values()} == {0.1}


def test_schedule_counts_optimizer_steps(finished_run: Path) -> None:
    assert "scheduler=poly" in FINISHED
    assert "trainer.accumulate_grad_batches=2" in FINISHED
    steps, rates = read_column(read_metrics(finished_run / "metrics.csv"), "train/lr")
    assert steps == [1, 2, 3, 4]
    assert rates == pytest.approx([1e-3 * (1 - k / 4) ** 0.9 for k in range(4)])


def test_scores_are_of_the_whole_split(module: SegmentationModule) -> None:
    batches = [batch(1, 2), batch(1, void=0.9, seed=1), batch(1, 2, 3, void=1.1, seed=2), batch(1)]
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    for _ in range(2):  # the second does not add to the first
        trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert module.scores is not None

    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(b["image"]) for b in batches])
    masks = torch.cat([b["mask"] for b in batches])
    seen = masks != 255
    label, guess = masks[seen].numpy(), logits.argmax(1)[seen].numpy()
    assert len(np.unique(guess)) > 1
    iou, accuracy, share = [], [], []
    for k in range(K):
        both = ((label == k) & (guess == k)).sum()
        iou.append(both / ((label == k) | (guess == k)).sum())
        accuracy.append(both / (label == k).sum())
        share.append((label == k).mean())
    scores = module.scores
    assert scores["iou"] == pytest.approx(iou)
    assert scores["miou"] == pytest.approx(np.mean(iou))
    assert scores["mean_acc"] == pytest.approx(np.mean(accuracy))
    assert scores["fwiou"] == pytest.approx(np.dot(share, iou))
    assert scores["pixel_acc"] == pytest.approx((label == guess).mean())
    expected = F.cross_entropy(logits.double(), masks.long(), ignore_index=255)
    assert module.val_loss == pytest.approx(expected.item(), rel=1e-5)


REFUSED: dict[str, list[Any]] = {
    "num_classes": [1, "21"],
    "head_lr_multiplier": [0],
    "bias_lr_multiplier": [float("nan")],
    "weights": [""],
    "class_weights": ["even", [1.0, 2.0], [-1.0, *[1.0] * 20], [0.0] * 21],
    "class_names": ["ab", ["a"] * 256],
    "palette": [[1, 2, 3], [[999, 0, 0]] * 21, [[0, 0, 0]] * 20],
    "void": ["a", 0],
    # Of the network:
    "stride": [7, "8"],
    "backbone": ["vgg19_bn"],
    "freeze_stages": [6, True],
    "head_kernel": [4, 3.0],
    "dropout": [1, float("nan")],
    "pool_scales": [(1.0, 2.0), (1.0, 0.0, 1.0)],
    "deep_skips": ["yes", 1, "True"],  # the text "True" is not shown as true
    "skip_kernel": [2, 0, 1.0, "3"],
    "channels_last": [1],
    "learn_upsampling": ["no"],
    "alignment": ["left"],
}


@pytest.mark.parametrize(("name", "values"), REFUSED.items(), ids=REFUSED)
def test_refused_arguments(name: str, values: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fcn.network.vgg_stages")  # nothing is built before
    for value in values:
        shown = "true" if value is True else value
        text = r".*, but is a text; remove the quotes$" if value in ("8", "3") else ""
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={shown}')}: must be {text}"):
            SegmentationModule(**SMALL | {name: value})


def test_number_and_names_of_classes() -> None:
    assert SegmentationModule(**SMALL).hparams["num_classes"] == 21
    module = SegmentationModule(class_names=["a", "b"], **SMALL)
    assert module.hparams["num_classes"] == module.network.score.out_channels == 2
    module = SegmentationModule(num_classes=3, **SMALL)
    assert module.class_names == module.hparams["class_names"] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="optimizer"):
        module.configure_optimizers()
    with pytest.raises(ValueError, match=r"^num_classes=3: must be null or 2, the number of class"):
        SegmentationModule(num_classes=3, class_names=["a", "b"], **SMALL)
    with pytest.raises(ValueError, match=r"^class_names=0: must be a list of names"):
        SegmentationModule(class_names=[0, 1], **SMALL)


def test_checkpoint_holds_all_that_rebuilds_the_network(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = last_checkpoint(finished_run)
    checkpoint = torch.load(path, weights_only=True)
    for part in ("hyper_parameters", "config", "versions", "normalization", "fresh_layers"):
        json.dumps(checkpoint[part])  # only plain values
    hyper = checkpoint["hyper_parameters"]
    assert hyper["class_names"] == list(Shapes.classes)
    assert hyper["palette"] == [list(colour) for colour in Shapes.palette]
    assert (hyper["stride"], hyper["weights"]) == (32, None)
    assert checkpoint["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert checkpoint["normalization"]["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert checkpoint["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert checkpoint["config"]["data"]["dataset"]["size"] == 48
    assert (checkpoint["precision"], checkpoint["global_step"]) == ("32-true", 4)

    monkeypatch.delattr("fcn.module.load_weights")  # a checkpoint needs no other weights
    loaded = SegmentationModule.load_from_checkpoint(path)
    assert loaded.class_names == list(Shapes.classes)
    assert next(loaded.parameters()).device.type == "cpu"
    torch.testing.assert_close(dict(loaded.state_dict()), checkpoint["state_dict"], rtol=0, atol=0)
    network = FCN(len(Shapes.classes), stride=32, channels_last=hyper["channels_last"], **SMALL)
    network.load_state_dict(loaded.network.state_dict())
    image = batch(1)["image"]
    assert torch.equal(loaded.eval()(image), network.eval()(image))

    loaded.make_optimizer = partial(torch.optim.SGD, lr=0.1)
    found = groups(loaded)
    assert found["score.weight"]["lr"] == pytest.approx(0.5)  # still fresh: five times the rate
    assert found["stages.0.0.weight"]["lr"] == pytest.approx(0.1)


def test_share_of_time_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a schedule goes by when `trainer.max_time` ends the run."""
    module = small()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    module.trainer = pl.Trainer(max_time={"seconds": 100}, max_epochs=-1, **quiet)
    for elapsed in (0, 25, 100):
        monkeypatch.setattr(Timer, "time_elapsed", lambda *_, seconds=elapsed: seconds)
        assert module.time_used() == elapsed / 100
    module.trainer = pl.Trainer(max_steps=3, **quiet)
    assert module.time_used() == 0


@pytest.mark.slow
def test_training_does_not_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a tensor's value would; it happens once for `log_every_n_steps` steps."""
    reads: set[int] = set()  # the number of steps that have begun
    steps = 0

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: torch.Tensor, *args: Any) -> Any:
            reads.add(steps)
            return original(self, *args)

        return read

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, noted(getattr(torch.Tensor, name)))
    step = SegmentationModule.training_step

    def begin(self: SegmentationModule, *args: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return step(self, *args)

    monkeypatch.setattr(SegmentationModule, "training_step", begin)
    train_tiny(
        tmp_path / "run",
        *("trainer.max_steps=14", "trainer.val_check_interval=14", "trainer.log_every_n_steps=5"),
        *("trainer.gradient_clip_val=1", "trainer.enable_progress_bar=true"),
        "data.num_workers=1",  # augmentation reads its random numbers, in another process
    )
    assert reads == {0, 5, 10, 14}  # before the first one; 14: validation and the checkpoint


@pytest.mark.slow
def test_compiled_training_step_and_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights as without, to rounding; validation has images of other sizes.

    torch traces the network and its gradients as it does by default, but runs the result itself,
    which needs no C++ compiler.
    """
    compiled = create_autospec(FCN.compile, side_effect=partial(FCN.compile, backend="aot_eager"))
    monkeypatch.setattr(FCN, "compile", compiled)
    states = []
    for name in ("false", "true"):  # dropout would draw other random numbers
        options = (f"trainer.compile={name}", "trainer.max_steps=2", "model.dropout=0")
        train_tiny(tmp_path / name, *options, "trainer.profiler=simple")
        assert (tmp_path / name / "profile" / "fit-simple.txt").is_file()
        states.append(torch.load(last_checkpoint(tmp_path / name), weights_only=True)["state_dict"])
    compiled.assert_called_once()
    torch.testing.assert_close(states[1], states[0], rtol=1e-3, atol=1e-4)
