"""fcn.memory: bytes counted by hand, what torch's profiler sees of a real step, the table.

Nearly all of it runs on tensors without data, so that a true VGG takes no longer than a tiny one.
"""

from functools import cache

import pytest
import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from fcn.cli import short_messages
from fcn.errors import ConfigError
from fcn.memory import (
    GB,
    RESERVE,
    Need,
    Plan,
    advice,
    build,
    compose,
    main,
    peak,
    plan,
    trace,
)
from fcn.training.settle import image_size

NARROW = (
    "data=shapes",
    "data.crop_size=64",
    "model=fcn32s",
    "model.backbone=vgg11",
    "model.head_width=16",
    "model.head_kernel=1",
    "trainer.precision=32-true",
)
WIDE = ("data.crop_size=512", "data.batch_size=4")  # activations are most of it


def settings(*overrides: str) -> DictConfig:
    return compose([*NARROW, *overrides])


@cache
def planned(*overrides: str) -> Plan:
    return plan(settings(*overrides))


def weights(config: DictConfig) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for p in build(config).parameters())


@pytest.mark.parametrize(
    ("optimizer", "copies"), [("sgd", 1), pytest.param("adamw", 2, marks=pytest.mark.slow)]
)
def test_weights_and_optimizer_state_are_exact(optimizer: str, copies: int) -> None:
    of = planned(*WIDE, *([] if optimizer == "sgd" else [f"optimizer={optimizer}"]))
    exact = weights(settings())
    assert of.weights == exact
    # AdamW also counts its steps, 4 bytes for each of the parameters
    assert 0 <= of.optimizer - copies * exact < 1000
    assert of.gradients == exact  # those of the last step exist during the forward pass


@pytest.mark.slow
def test_kept_activations_are_those_counted_by_hand() -> None:
    """VGG-11 on 512x512 in float32: what the backward pass needs of the stages, at its beginning.

    Each convolution keeps its input, which is the ReLU's output in place, or the pool's.
    """
    config = settings("data.crop_size=512")
    pixels = 512 * 512
    channels = [(64,), (128,), (256, 256), (512, 512), (512, 512)]
    count = 3 * pixels * 4  # the normalised image
    for stage, widths in enumerate(channels):
        area = pixels // 4**stage
        count += sum(width * area * 4 for width in widths)  # outputs of convolutions
        count += widths[-1] * area // 4 * 4  # of the pool, which looks for its maxima again
    lived = trace(config, 1)[:, 3].max()
    head = 21 * pixels * 4 * 3 + 8 * pixels  # logits, their float32, log-softmax, int64 labels
    assert count < lived < count + head


@pytest.mark.slow
def test_activations_grow_with_the_batch_exactly_until_it_does_not_fit() -> None:
    tiny = "model.backbone=vgg_tiny"
    config = settings("data.crop_size=512", tiny)
    need, four = Need(config), trace(config, 4)
    assert (four == need.constant + 4 * need.slope).all()
    two = need.constant + 2 * need.slope
    assert four[:, 3].max() == pytest.approx(2 * two[:, 3].max(), rel=1e-6)
    moment = four.sum(1).argmax()
    assert four[moment, 3] == pytest.approx(2 * two[moment, 3], rel=1e-6)
    assert peak(four) == planned(*WIDE, tiny)

    images = need.largest_batch(size := peak(four).total + 100_000_000)
    assert images >= 4
    assert peak(need.constant + images * need.slope).total <= size
    assert peak(need.constant + (images + 1) * need.slope).total > size
    assert need.largest_batch(1_000_000) == 0


@pytest.mark.parametrize(
    ("lever", "precision"),
    [
        pytest.param("model.freeze_stages=2", "bf16-mixed", marks=pytest.mark.slow),
        ("model.checkpoint_stages=2", "32-true"),
    ],
)
def test_levers_lower_activations(lever: str, precision: str) -> None:
    base = WIDE if precision == "32-true" else (*WIDE, f"trainer.precision={precision}")
    before, after = planned(*base), planned(*base, lever)
    assert after.activations < 0.7 * before.activations
    assert after.total < before.total  # a checkpointed stage needs all of its own once more
    assert after.weights == before.weights


@pytest.mark.slow
def test_bf16_shrinks_activations_and_accumulation_keeps_gradients() -> None:
    full, half = planned(*WIDE), planned(*WIDE, "trainer.precision=auto")
    assert 0.45 * full.activations < half.activations < 0.7 * full.activations
    head = "model.head_kernel=7", "model.head_width=512"  # gradients are most of it
    accumulated = planned(*head, "trainer.accumulate_grad_batches=4")
    assert accumulated.total - planned(*head).total > 0.3 * accumulated.weights


@pytest.mark.slow
def test_forward_and_backward_agree_with_the_profiler() -> None:
    """What a real step allocates at its peak, as torch's CPU allocator reports it."""
    config = settings("data.crop_size=256", "data.batch_size=2")
    module = build(config).to_empty(device="cpu")
    module.network.reset_parameters()
    optimizer = module.configure_optimizers()
    batch = {
        "image": torch.zeros(2, 3, 256, 256, dtype=torch.uint8),
        "mask": torch.zeros(2, 256, 256, dtype=torch.uint8),
    }
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            loss = module.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    live = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    before = sum(p.nbytes for p in module.parameters()) * 3 + sum(b.nbytes for b in batch.values())
    # oneDNN allocates its own copies by itself: neither the profiler nor the plan sees them.
    assert plan(config).total == pytest.approx(most + before, rel=0.02)


@pytest.mark.slow
def test_advice_names_what_helps_and_nothing_else() -> None:
    config = settings(*WIDE, "model.freeze_stages=3", "trainer.precision=bf16-mixed")
    text = advice(config, 2 * GB)
    assert f"{plan(config).total / GB:.1f} GB" in text
    assert "data.batch_size=1 trainer.accumulate_grad_batches=4" in text
    assert "data.crop_size=320" in text
    for useless in ("precision", "freeze_stages", "head_width"):
        assert useless not in text.partition("\n")[2]


def test_advice_on_gradients_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def advised(*overrides: str) -> str:
        config = settings(*overrides)
        sizes = {id(config): GB}  # every other configuration needs less
        monkeypatch.setattr(
            "fcn.memory.plan", lambda other: Plan(sizes.get(id(other), GB // 2), 0, 0, 0, 0)
        )
        return advice(config, GB)

    in_backward, accumulated = "optimizer=sgd_in_backward", "trainer.accumulate_grad_batches=2"
    assert f"\n  {in_backward}    0.5 GB" in advised()
    for impossible in (
        accumulated,
        "trainer.gradient_clip_val=5",
        "trainer.precision=16-mixed",
        "trainer.devices=2",
        "trainer=ddp",
        "optimizer=adamw",
        in_backward,
    ):
        assert f"\n  {in_backward}" not in advised(impossible)
    assert "accumulate_grad_batches" in advised()
    assert "accumulate_grad_batches" not in advised(in_backward)


@pytest.mark.slow
def test_image_is_the_crop_or_the_largest() -> None:
    assert image_size(settings("data.crop_size=[64,96]").data) == (64, 96)
    assert image_size(settings("data.crop_size=null").data) == (96, 96)  # that of data=shapes
    voc = ["data=voc2012", "data.crop_size=null"]
    assert image_size(compose(voc).data) == (500, 500)
    assert image_size(compose([*voc, "data.scale=[0.5,1.5]"]).data) == (750, 750)


def test_automatic_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        settings("data.batch_size=auto")


@pytest.mark.slow
def test_command_prints_a_row_for_each_combination(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "model.backbone=vgg_tiny"
    main([*NARROW, tiny, "data.batch_size=1,2", "data.crop_size=96,[96,128]"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.count("yes, ") == 5]
    assert [row.split()[-3:] for row in rows] == [
        [size, f"data.batch_size={images}", f"data.crop_size={crop}"]
        for images in (1, 2)
        for crop, size in (("96", "96x96"), ("[96,128]", "96x128"))
    ]
    assert f"{RESERVE / GB:.1f} GB" in printed
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m fcn.memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("data.batch_sze=1,2", "data.batch_sze"),
        ("data.batch_size=0,1", "data.batch_size=0"),
        ("trainer.precision=half", "trainer.precision=half"),
        ("model.stride=7", "model.stride=7"),
        (
            "optimizer=sgd_in_backward trainer.accumulate_grad_batches=2",
            "trainer.accumulate_grad_batches=2: must be 1 with optimizer=sgd_in_backward",
        ),
    ],
)
def test_command_refuses_wrong_settings_in_short(
    wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, short_messages():
        main([*NARROW, *wrong.split()])
    assert end.value.code == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("error: ")
    assert said in first


@pytest.mark.slow
def test_average_of_the_weights_is_a_second_set_of_them() -> None:
    config = settings(*WIDE)
    config.callbacks = {"ema": {"decay": 0.99}}
    before, after = planned(*WIDE), plan(config)
    assert after.weights == 2 * before.weights
    assert after.total == before.total + before.weights


@pytest.mark.slow
def test_card_of_8_gb_holds_the_batch_of_the_paper() -> None:
    """20 whole images of VOC2012, which the paper's recipe takes one after another."""
    recipe = ["experiment=paper_fcn8s", "data.batch_size=20", "trainer.accumulate_grad_batches=1"]
    assert Need(compose(recipe)).largest_batch(8 * GB - RESERVE) >= 20


@pytest.mark.slow
def test_gradients_that_are_applied_in_the_backward_pass_are_not_kept() -> None:
    """What is left of them is at most one, of the largest layer, and its 16-bit copy."""
    wide = ("data.crop_size=32", "data.batch_size=1", "model.head_width=512")
    plain = planned(*wide)
    other = planned(*wide, "optimizer=sgd_in_backward")
    assert plain.gradients == plain.weights
    assert (other.weights, other.optimizer) == (plain.weights, plain.optimizer)
    assert other.total < plain.total - plain.gradients / 4
