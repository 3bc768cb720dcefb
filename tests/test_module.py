"""The LightningModule: loss, scores, optimizer groups, and checkpoints that stand alone."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import FINISHED, compose_config, train_tiny
from pytorch_lightning.callbacks import Timer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from fcn.checkpoint import best_checkpoint, last_checkpoint
from fcn.datasets.shapes import Shapes
from fcn.errors import ConfigError, WeightsError
from fcn.module import SegmentationModule
from fcn.network import FCN, head_layers
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


def test_loss_is_torchs_mean_without_void(module: SegmentationModule) -> None:
    logits = 5 * torch.randn(2, K, 9, 7)
    mask = torch.randint(K, (2, 9, 7)).to(torch.uint8)
    mask[0, :5] = 255  # so that a mean of each image's mean would differ
    expected = F.cross_entropy(logits, mask.long(), ignore_index=255)
    torch.testing.assert_close(module.loss(logits, mask), expected)
    half = logits.bfloat16()
    torch.testing.assert_close(
        module.loss(half, mask), F.cross_entropy(half.float(), mask.long(), ignore_index=255)
    )


def test_weighted_loss_by_hand() -> None:
    """The sum of w·loss, divided by the number of pixels that are not void; validation: w is 1."""
    weights, data = [0.5, 2.0, 0.0], batch(1, 2)
    module = small(class_weights=weights)
    with torch.no_grad():
        torch.nn.init.normal_(module.network.get_parameter("score.weight"))
        each = F.cross_entropy(
            module.eval()(data["image"]), data["mask"].long(), ignore_index=255, reduction="none"
        )
    seen = data["mask"] != 255
    factors = torch.tensor(weights)[data["mask"][seen].long()]
    expected = (factors * each[seen]).sum() / seen.sum()
    torch.testing.assert_close(module.training_step(data, 0), expected)
    module.validation_step(data, 0)
    torch.testing.assert_close(module.val_losses.compute().sum(), each[seen].sum())
    assert module.state_dict().keys() == small().state_dict().keys()  # an older checkpoint fits
    assert module.hparams["class_weights"] == weights
    with pytest.raises(ValueError, match="call `set_class_weights`"):
        small(class_weights="balanced").on_train_start()


def test_loss_of_void_only_is_zero(module: SegmentationModule) -> None:
    only_void = batch(1, 2, void=1.1)
    loss = module.training_step(only_void, 0)
    assert loss.item() == 0
    parameters = [p for p in module.network.parameters() if p.requires_grad]
    for gradient in torch.autograd.grad(loss, parameters):
        assert (gradient == 0).all()  # NaN is not 0


def test_loss_is_float32_under_autocast(module: SegmentationModule) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = module(batch(1)["image"])
        loss = module.loss(logits, batch(1)["mask"])
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.float(), batch(1)["mask"].long(), ignore_index=255)
    torch.testing.assert_close(loss, expected)


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
            learned = [p for p in module.network.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, learned)
            module.validation_step(data, 0)
        return called, [loss.detach(), *gradients]

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
    module.make_scheduler = None
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    names = {id(p): name for name, p in module.network.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group
    return found


def test_optimizer_groups() -> None:
    module = small(head_lr_multiplier=10.0, freeze_stages=2)
    module.fresh_layers = ["score", "upsample.to_image_8"]  # as if the rest were loaded
    found = groups(module)
    trainable = {name for name, p in module.network.named_parameters() if p.requires_grad}
    assert found.keys() == trainable
    assert not any(name.startswith(("stages.0.", "stages.1.")) for name in found)
    assert any(name.startswith("stages.2.") for name in found)
    for name, group in found.items():
        layer, _, kind = name.rpartition(".")
        head = 10 if layer in ("score", "upsample.to_image_8") else 1
        rate, decay = (2, 0) if kind == "bias" else (1, 5e-4)
        assert group["lr"] == pytest.approx(0.1 * head * rate), name
        assert group["weight_decay"] == decay, name
        assert group["momentum"] == 0.9


def test_upsampling_that_is_not_learned_is_not_optimized() -> None:
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
    label, guess = masks.numpy(), logits.argmax(1).numpy()
    seen = label != 255
    assert len(np.unique(guess[seen])) > 1
    iou, accuracy, share = [], [], []
    for k in range(K):
        both = ((label == k) & (guess == k) & seen).sum()
        iou.append(both / (((label == k) | (guess == k)) & seen).sum())
        accuracy.append(both / (label == k).sum())
        share.append((label == k).sum() / seen.sum())
    scores = module.scores
    assert scores["iou"] == pytest.approx(iou)
    assert scores["miou"] == pytest.approx(np.mean(iou))
    assert scores["mean_acc"] == pytest.approx(np.mean(accuracy))
    assert scores["fwiou"] == pytest.approx(np.dot(share, iou))
    assert scores["pixel_acc"] == pytest.approx((label == guess)[seen].mean())
    expected = F.cross_entropy(logits.double(), masks.long(), ignore_index=255)
    assert module.val_loss == pytest.approx(expected.item(), rel=1e-5)


def test_arguments_that_contradict() -> None:
    with pytest.raises(ValueError, match=r"^num_classes=3: must be null or 2, the number of class"):
        SegmentationModule(num_classes=3, class_names=["a", "b"], **SMALL)
    with pytest.raises(ValueError, match="optimizer"):
        SegmentationModule(num_classes=K, **SMALL).configure_optimizers()
    with pytest.raises(TypeError, match="depth"):
        SegmentationModule(num_classes=K, depth=3, **SMALL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", 1),
        ("num_classes", 256),
        ("num_classes", "21"),
        ("head_lr_multiplier", 0),
        ("bias_lr_multiplier", float("nan")),
        ("weights", ""),
        ("weights", True),
        ("class_weights", "even"),
        ("class_weights", [1.0, 2.0]),
        ("class_weights", [-1.0, *[1.0] * 20]),
        ("class_weights", [0.0] * 21),
        ("class_names", 5),
        ("class_names", "ab"),
        ("class_names", ["a"] * 256),
        ("palette", [1, 2, 3]),
        ("palette", [[999, 0, 0]] * 21),
        ("palette", [[0, 0, 0]] * 20),
        ("void", "a"),
        ("void", 0),
        ("void", 256),
        ("stride", 7),
    ],
)
def test_refused_arguments(name: str, value: Any) -> None:
    shown = "true" if value is True else value
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={shown}')}: must be "):
        SegmentationModule(**SMALL | {name: value})


def test_number_and_names_of_classes() -> None:
    assert SegmentationModule(**SMALL).hparams["num_classes"] == 21
    module = SegmentationModule(class_names=["a", "b"], **SMALL)
    assert module.hparams["num_classes"] == module.network.score.out_channels == 2
    module = SegmentationModule(num_classes=3, **SMALL)
    assert module.class_names == module.hparams["class_names"] == ["0", "1", "2"]


def test_pretrained_weights(tmp_path: Path, module: SegmentationModule) -> None:
    """Layers without loaded values are fresh; without weights, all of head and decoder are."""
    assert module.fresh_layers == head_layers(module.network)
    torch.save(small(stride=16).network.state_dict(), tmp_path / "x.pth")
    loaded = small(stride=8, weights=tmp_path / "x.pth")
    assert loaded.fresh_layers == ["skips.pool3", "upsample.to_pool3", "upsample.to_image_8"]
    with pytest.raises(WeightsError, match=r"^model\.weights=nowhere\.pth: no such file"):
        small(weights="nowhere.pth")
    with pytest.raises(ConfigError, match=r"^head_lr_multiplier=-1"):  # before it looks for them
        small(weights="nowhere.pth", head_lr_multiplier=-1)


def assert_plain(value: Any) -> None:
    """Only what YAML can hold; no subclass of it either."""
    if type(value) is dict:
        for key, inner in value.items():
            assert_plain(key)
            assert_plain(inner)
    elif type(value) in (list, tuple):
        for inner in value:
            assert_plain(inner)
    else:
        assert type(value) in (str, int, float, bool, type(None)), value


def test_checkpoint_holds_all_that_rebuilds_the_network(finished_run: Path) -> None:
    for path in (last_checkpoint(finished_run), best_checkpoint(finished_run)):
        checkpoint = torch.load(path, weights_only=True)
        hyper = checkpoint["hyper_parameters"]
        for part in ("hyper_parameters", "config", "versions", "normalization", "fresh_layers"):
            assert_plain(checkpoint[part])
        assert hyper["class_names"] == list(Shapes.classes)
        assert hyper["palette"] == [list(colour) for colour in Shapes.palette]
        assert hyper["stride"] == 32
        assert hyper["weights"] is None
        assert checkpoint["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
        assert checkpoint["normalization"]["std"] == pytest.approx([0.229, 0.224, 0.225])
        assert checkpoint["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert checkpoint["config"]["data"]["dataset"]["size"] == 48
        assert checkpoint["config"]["seed"] == 0
        assert checkpoint["precision"] == "32-true"
    assert torch.load(last_checkpoint(finished_run), weights_only=True)["global_step"] == 4


def test_checkpoint_rebuilds_the_network(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint needs no other weights")

    monkeypatch.setattr("fcn.module.load_weights", refuse)
    path = last_checkpoint(finished_run)
    loaded = SegmentationModule.load_from_checkpoint(path)
    assert loaded.class_names == list(Shapes.classes)
    assert next(loaded.parameters()).device.type == "cpu"

    cfg = compose_config("train")
    assert cfg.model.weights == "IMAGENET1K_V1"  # what a user's run would have asked for
    layout = loaded.hparams["channels_last"]
    network = FCN(len(Shapes.classes), stride=32, channels_last=layout, **SMALL).eval()
    state = torch.load(path, weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items()})
    image = batch(1)["image"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(image), network(image))
        assert network(image).abs().sum() > 0


def test_optimizer_groups_of_a_loaded_checkpoint(finished_run: Path) -> None:
    loaded = SegmentationModule.load_from_checkpoint(last_checkpoint(finished_run))
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
    reads: list[int] = []
    steps = 0

    def count(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any) -> Any:
            if training:
                reads.append(steps)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    training = False
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        count(name)
    step = SegmentationModule.training_step
    end = SegmentationModule.on_validation_epoch_start

    def begin(self: SegmentationModule, *args: Any) -> torch.Tensor:
        nonlocal training, steps
        training, steps = True, steps + 1
        return step(self, *args)

    def stop(self: SegmentationModule) -> None:
        nonlocal training
        training = False
        end(self)

    monkeypatch.setattr(SegmentationModule, "training_step", begin)
    monkeypatch.setattr(SegmentationModule, "on_validation_epoch_start", stop)
    train_tiny(
        tmp_path / "run",
        *("trainer.max_steps=14", "trainer.val_check_interval=14", "trainer.log_every_n_steps=5"),
        *("trainer.gradient_clip_val=1", "trainer.enable_progress_bar=true"),
        "data.num_workers=1",  # augmentation reads its random numbers, in another process
    )
    assert sorted(set(reads)) == [5, 10, 14], reads  # 14: the checkpoint and the end


@pytest.mark.slow
def test_compiled_training_step(tmp_path: Path) -> None:
    """The same weights as without, to rounding; validation has images of other sizes."""
    for name in ("false", "true"):
        train_tiny(tmp_path / name, f"trainer.compile={name}", "model.dropout=0")  # random apart
    eager, compiled = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("false", "true")
    )
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"),
    [("simple", {"fit-simple.txt"}), ("pytorch", {"fit-pytorch.txt", "*.json"})],
)
def test_profiler_writes_into_the_run_folder(tmp_path: Path, name: str, files: set[str]) -> None:
    options = (f"trainer.profiler={name}", "trainer.max_steps=6", "data.batch_size=1")
    train_tiny(tmp_path / "run", *options)
    for pattern in files:
        assert list((tmp_path / "run" / "profile").glob(pattern)), pattern
