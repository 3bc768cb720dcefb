"""fcn.memory: bytes counted by hand, what torch's profiler sees of a real step, the table."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fcn.errors import ConfigError
from fcn.memory import GB, RESERVE, Need, advice, build, compose, largest_batch, main, plan, trace

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


def settings(*overrides: str) -> dict[str, Any]:
    return compose([*NARROW, *overrides])


def weights(config: dict[str, Any]) -> int:
    """Bytes of all parameters, from the real network."""
    return sum(p.nbytes for p in build(config).parameters())


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 1), ("adamw", 2)])
def test_weights_and_optimizer_state_are_exact(optimizer: str, copies: int) -> None:
    config = settings(*WIDE, f"optimizer={optimizer}")
    planned, exact = plan(config), weights(config)
    assert planned.weights == exact
    # AdamW also counts its steps, 4 bytes for each of the parameters
    assert 0 <= planned.optimizer - copies * exact < 1000
    assert planned.gradients == exact  # those of the last step live through the forward pass


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


def test_activations_grow_with_the_batch_exactly() -> None:
    config = settings("data.crop_size=512")
    one, two, four = (trace(config, n) for n in (1, 2, 4))
    assert (four == one + 3 * (two - one)).all()
    assert four[:, 3].max() == pytest.approx(2 * two[:, 3].max(), rel=1e-6)
    moment = four.sum(1).argmax()
    assert four[moment, 3] == pytest.approx(2 * two[moment, 3], rel=1e-6)
    assert Need(config).plan(4) == plan(settings("data.crop_size=512", "data.batch_size=4"))


@pytest.mark.parametrize(
    ("lever", "precision"),
    [("model.freeze_stages=2", "bf16-mixed"), ("model.checkpoint_stages=2", "32-true")],
)
def test_levers_lower_activations(lever: str, precision: str) -> None:
    base = (*WIDE, f"trainer.precision={precision}")
    before, after = plan(settings(*base)), plan(settings(*base, lever))
    assert after.activations < 0.7 * before.activations
    assert after.total < before.total  # of a checkpointed stage all lives again at its turn
    assert after.weights == before.weights


def test_bf16_shrinks_activations_and_accumulation_keeps_gradients() -> None:
    full, half = (plan(settings(*WIDE, f"trainer.precision={p}")) for p in ("32-true", "auto"))
    assert 0.45 * full.activations < half.activations < 0.7 * full.activations
    head = "model.head_kernel=7", "model.head_width=512"  # gradients are most of it
    accumulated = plan(settings(*head, "trainer.accumulate_grad_batches=4"))
    assert accumulated.gradients > 1.3 * plan(settings(*head)).gradients


def test_largest_batch_fits_and_one_more_does_not() -> None:
    config = settings("data.crop_size=200")
    size = plan(config).total + 100_000_000
    images = largest_batch(config, size)
    assert images > 2
    assert plan(settings("data.crop_size=200", f"data.batch_size={images}")).total <= size
    assert plan(settings("data.crop_size=200", f"data.batch_size={images + 1}")).total > size
    assert largest_batch(config, 1_000_000) == 0


def test_forward_and_backward_agree_with_the_profiler() -> None:
    """What a real step allocates at its peak, as torch's CPU allocator reports it."""
    config = settings("data.crop_size=256", "data.batch_size=2")
    module = build(config)
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
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    before = sum(p.nbytes for p in module.parameters()) * 3 + sum(b.nbytes for b in batch.values())
    # oneDNN allocates its copies for itself, so that the profiler does not see them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcn.memory.workspace", lambda *_: (0,))
        assert plan(config).total == pytest.approx(peak + before, rel=0.02)


def test_advice_names_what_helps_and_nothing_else() -> None:
    config = settings(*WIDE, "model.freeze_stages=3", "trainer.precision=bf16-mixed")
    text = advice(config, 2 * GB)
    assert f"{plan(config).total / GB:.1f} GB" in text
    assert "data.batch_size=1 trainer.accumulate_grad_batches=4" in text
    assert "data.crop_size=320" in text
    for useless in ("precision", "freeze_stages", "head_width"):
        assert useless not in text.partition("\n")[2]


def test_image_is_the_crop_or_the_largest() -> None:
    shape = [trace(compose([*NARROW, f"data.crop_size={crop}"]), 1) for crop in (96, "null")]
    assert (shape[0] == shape[1]).all()  # shapes are 96 pixels wide
    voc = [compose(["data=voc2012", *NARROW[2:], f"data.crop_size={c}"]) for c in (500, "null")]
    assert plan(voc[0]) == plan(voc[1])


def test_automatic_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        settings("data.batch_size=auto")


def test_command_prints_a_row_for_each_combination(capsys: pytest.CaptureFixture[str]) -> None:
    main([*NARROW, "data.batch_size=1,2", "data.crop_size=64,[96,128]"])
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if "yes, " in line]) == 4
    assert "data.batch_size" in printed
    assert "Images of 64x64, 96x128 pixels" in printed
    assert f"{RESERVE / GB:.1f} GB" in printed
    main(["--help"])
    assert "python -m fcn.memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("data.batch_sze=1,2", "data.batch_sze"), ("data.batch_size=0,1", "data.batch_size=0")],
)
def test_command_refuses_wrong_settings_in_short(
    wrong: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*NARROW, wrong])
    assert end.value.code == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("error: ")
    assert said in first
