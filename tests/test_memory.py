"""fcn.memory: bytes counted by hand, what torch's profiler sees of a real step, the table.

Nearly all of it runs on tensors without data, so that a true VGG takes no longer than a tiny one.
"""

from functools import cache

import pytest
import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from fcn.cli import short_messages
from fcn.memory import GB, RESERVE, Need, Plan, advice, build, compose, main, peak, plan, trace

pytestmark = pytest.mark.xdist_group("memory")  # one worker keeps what `planned` has computed
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
# Weights are most of it. (On 64 pixels, the gradient of a 7x7 kernel is copied once more.)
HEAD = ("model.head_kernel=7", "model.head_width=512", "data.crop_size=128")


def settings(*overrides: str) -> DictConfig:
    return compose([*NARROW, *overrides])


@cache
def planned(*overrides: str) -> Plan:
    return plan(settings(*overrides))


@pytest.mark.slow
def test_weights_and_optimizer_state_are_exact() -> None:
    exact = sum(p.nbytes for p in build(settings()).parameters())
    sgd, adamw = planned(*WIDE), planned(*WIDE, "optimizer=adamw")
    assert (sgd.weights, adamw.weights) == (exact, exact)
    # Those of the last step exist during the forward pass.
    assert (sgd.gradients, adamw.gradients) == (exact, exact)
    assert 0 <= sgd.optimizer - exact < 1000
    assert 0 <= adamw.optimizer - 2 * exact < 1000  # it counts its steps, 4 bytes for each tensor
    config = settings(*WIDE)
    config.callbacks = {"ema": {"decay": 0.99}}
    averaged = plan(config)
    assert averaged.weights == 2 * exact
    assert averaged.total == sgd.total + exact


def test_deep_skips_need_more_and_bring_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    deep = planned("model=fcn8s", "model.deep_skips=true")
    assert deep.total > planned("model=fcn8s").total
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.slow
def test_gradients_that_are_kept_longer_or_not_at_all() -> None:
    plain = planned(*HEAD)
    accumulated = planned(*HEAD, "trainer.accumulate_grad_batches=4")
    assert accumulated.total - plain.total > 0.3 * plain.weights
    # Of those that are applied in the backward pass, at most one is left, and its 16-bit copy.
    at_once = planned(*HEAD, "optimizer=sgd_in_backward")
    assert (at_once.weights, at_once.optimizer) == (plain.weights, plain.optimizer)
    assert at_once.total < plain.total - plain.gradients / 4


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lever", "low", "high"),
    [
        ("model.freeze_stages=2", 0, 0.7),
        ("model.checkpoint_stages=2", 0, 0.7),
        ("trainer.precision=auto", 0.45, 0.7),  # that is, bfloat16
    ],
)
def test_levers_lower_activations(lever: str, low: float, high: float) -> None:
    before, after = planned(*WIDE), planned(*WIDE, lever)
    assert low < after.activations / before.activations < high
    assert after.total < before.total  # a checkpointed stage needs all of its own once more
    assert after.weights == before.weights


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
    # The plan is for GPUs, and leaves out the copies that a convolution makes for itself: on the
    # CPU, oneDNN's two more copies of a weight's gradient, which the profiler sees, since oneDNN
    # allocates through torch; on a GPU, cuDNN's workspaces, for which there is RESERVE. With
    # smaller images, the real peak would be there.
    assert plan(config).total == pytest.approx(most + before, rel=0.02)


@pytest.mark.slow
def test_advice_names_what_helps_and_nothing_else() -> None:
    config = settings(*WIDE, "model.freeze_stages=3", "trainer.precision=bf16-mixed")
    text = advice(config, 2 * GB)
    whole = settings("data.crop_size=null")
    assert plan(whole, (64, 64)).total < plan(whole, (64, 96)).total
    assert text.startswith(f"a step needs about {plan(config).total / GB:.1f} GB, ")
    assert "data.batch_size=1 trainer.accumulate_grad_batches=4" in text
    assert "data.crop_size=320" in text
    for useless in ("precision", "freeze_stages", "head_width"):
        assert useless not in text.partition("\n")[2]


@pytest.mark.slow
def test_advice_on_gradients_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def advised(*overrides: str) -> str:
        config = settings(*overrides)
        sizes = {id(config): GB}  # every other configuration needs less
        monkeypatch.setattr(
            "fcn.memory.plan", lambda other, _: Plan(sizes.get(id(other), GB // 2), 0, 0, 0, 0)
        )
        return advice(config, GB)

    in_backward = "optimizer=sgd_in_backward"
    plain, already = advised(), advised(in_backward)
    assert f"\n  {in_backward}    0.5 GB" in plain
    for precision in ("bf16-mixed", "16-mixed"):  # a GTX 10xx has only the second
        assert f"\n  trainer.precision={precision}    0.5 GB" in plain
    assert "accumulate_grad_batches" in plain
    assert "accumulate_grad_batches" not in already
    accumulated, other = advised("trainer.accumulate_grad_batches=2"), advised("optimizer=adamw")
    for impossible in (accumulated, other, already):
        assert f"\n  {in_backward}" not in impossible


@pytest.mark.slow
def test_command_prints_a_row_for_each_combination(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "model.backbone=vgg_tiny"
    main([*NARROW, tiny, "data.batch_size=1,2", "data.crop_size=96,[96,128]"])
    printed = capsys.readouterr().out
    rows = [line.split()[-3:] for line in printed.splitlines() if line.count("yes, ") == 5]
    assert rows == [
        [size, f"data.batch_size={images}", f"data.crop_size={crop}"]
        for images in (1, 2)
        for crop, size in (("96", "96x96"), ("[96,128]", "96x128"))
    ]
    assert f"{RESERVE / GB:.1f} GB" in printed


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("data.batch_sze=1,2", "data.batch_sze"),
        ("data.batch_size=0,1", "data.batch_size=0"),
        ("data.batch_size=auto", "data.batch_size=auto"),
        ("model.stride=7", "model.stride=7"),
        (
            "trainer.accumulate_grad_batches=2 optimizer=sgd_in_backward",
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
def test_card_of_8_gb_holds_the_batch_of_the_paper() -> None:
    """20 whole images of VOC2012, which the paper's recipe takes one after another."""
    recipe = ["experiment=paper_fcn8s", "data.batch_size=20", "trainer.accumulate_grad_batches=1"]
    assert Need(compose(recipe)).largest_batch(8 * GB - RESERVE) >= 20
