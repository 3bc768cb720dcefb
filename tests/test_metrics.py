"""The confusion matrix, and the paper's four metrics by hand and by a second implementation."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcn.metrics import ConfusionMatrix, confusion_matrix, segmentation_scores


def test_worked_out_by_hand() -> None:
    """Rows are labels. t = (8, 4, 4); columns sum to (7, 6, 3); correct are 6, 3, 2 of 16."""
    confusion = torch.tensor([[6, 2, 0], [0, 3, 1], [1, 1, 2]])
    scores = segmentation_scores(confusion)
    iou = [6 / (8 + 7 - 6), 3 / (4 + 6 - 3), 2 / (4 + 3 - 2)]  # 6/9, 3/7, 2/5
    assert scores["iou"] == pytest.approx(iou)
    assert scores["pixel_acc"] == pytest.approx(11 / 16)
    assert scores["mean_acc"] == pytest.approx((6 / 8 + 3 / 4 + 2 / 4) / 3)
    assert scores["miou"] == pytest.approx(sum(iou) / 3)
    assert scores["fwiou"] == pytest.approx((8 * iou[0] + 4 * iou[1] + 4 * iou[2]) / 16)


def test_absent_class_is_left_out_of_the_means() -> None:
    """Class 1 is nowhere: the means are over the two others."""
    scores = segmentation_scores(torch.tensor([[3, 0, 1], [0, 0, 0], [2, 0, 4]]))
    assert math.isnan(scores["iou"][1])
    assert scores["miou"] == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert scores["mean_acc"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert scores["pixel_acc"] == pytest.approx(7 / 10)
    assert scores["fwiou"] == pytest.approx((4 * 3 / 6 + 6 * 4 / 7) / 10)


def test_class_that_is_predicted_but_never_labelled() -> None:
    """Its IoU is 0 and counts; it has no accuracy, for there is nothing of it to find."""
    scores = segmentation_scores(torch.tensor([[4, 1], [0, 0]]))
    assert scores["iou"] == pytest.approx([4 / 5, 0.0])
    assert scores["miou"] == pytest.approx(2 / 5)
    assert scores["mean_acc"] == pytest.approx(4 / 5)
    assert scores["fwiou"] == pytest.approx(4 / 5)


def test_nothing_but_void_is_nan() -> None:
    scores = segmentation_scores(torch.zeros(3, 3, dtype=torch.long))
    assert all(math.isnan(scores[name]) for name in ("pixel_acc", "mean_acc", "miou", "fwiou"))
    assert len(scores["iou"]) == 3
    assert all(map(math.isnan, scores["iou"]))


def test_perfect_prediction() -> None:
    scores = segmentation_scores(torch.diag(torch.tensor([7, 1, 0, 2])))
    assert [scores[name] for name in ("pixel_acc", "mean_acc", "miou", "fwiou")] == [1.0] * 4
    assert scores["iou"][:2] == [1.0, 1.0]


def test_counts_of_a_large_split_are_exact() -> None:
    """In float32 a pixel more or less would vanish in 3e8."""
    count = 300_000_001
    scores = segmentation_scores(torch.tensor([[count, 1], [0, count]]))
    assert scores["pixel_acc"] == pytest.approx(2 * count / (2 * count + 1), rel=1e-15)
    assert scores["pixel_acc"] < 1


def slow_scores(label: np.ndarray, prediction: np.ndarray, classes: int) -> dict[str, object]:
    """From sets of pixels, class by class, without a confusion matrix."""
    valid = label != 255
    label, prediction = label[valid], prediction[valid]
    ious, accuracies, weighted = [], [], 0.0
    for k in range(classes):
        both = np.count_nonzero((label == k) & (prediction == k))
        either = np.count_nonzero((label == k) | (prediction == k))
        there = np.count_nonzero(label == k)
        ious.append(both / either if either else math.nan)
        if there:
            accuracies.append(both / there)
            weighted += there * both / either
    return {
        "pixel_acc": np.count_nonzero(label == prediction) / label.size,
        "mean_acc": np.mean(accuracies),
        "miou": np.nanmean(ious),
        "fwiou": weighted / label.size,
        "iou": ious,
    }


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_slow_implementation(seed: int) -> None:
    """Through the confusion matrix in several updates, void and absent classes there."""
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 2, 3, 5, 6, 255], size=(6, 17, 13), p=[0.4, *[0.1] * 6])
    guess = rng.choice([0, 1, 2, 3, 6, 7], size=label.shape)
    prediction = np.where((rng.random(label.shape) < 0.6) & (label != 255), label, guess)
    confusion = ConfusionMatrix(9, void=255)
    for part in range(0, 6, 2):
        confusion.update(
            torch.from_numpy(prediction[part : part + 2]),
            torch.from_numpy(label[part : part + 2].astype(np.uint8)),
        )
    scores = segmentation_scores(confusion.compute())
    wanted = slow_scores(label, prediction, 9)
    assert math.isnan(scores["iou"][4])
    assert math.isnan(scores["iou"][8])
    assert scores["iou"][7] == 0  # predicted, never labelled
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name  # type: ignore[literal-required]


@pytest.mark.parametrize("void", [255, 0, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counts_are_those_of_torchmetrics(void: int, dtype: torch.dtype) -> None:
    """Also where void is one of the classes: its pixels are left out, predictions of it are not."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(200, (2, 30, 40), generator=generator).to(dtype)
    label = torch.randint(200, (2, 30, 40), generator=generator).to(torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.2] = void
    expected = multiclass_confusion_matrix(prediction.long(), label.long(), 200, ignore_index=void)
    found = confusion_matrix(prediction, label, 200, void)
    assert torch.equal(found, expected)
    assert found.sum() == (label != void).sum()
    assert confusion_matrix(prediction, torch.full_like(label, void), 200, void).sum() == 0


def test_a_label_that_is_no_class_is_not_lost() -> None:
    for label in (3, 4, 254):
        with pytest.raises(RuntimeError, match="shape"):
            confusion_matrix(torch.zeros(9).int(), torch.full((9,), label), 3, 255)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that a result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_table_of_pixels_by_classes() -> None:
    """torchmetrics makes one of 500 * 500 * 150**2 with deterministic algorithms, as on MPS."""
    prediction = torch.randint(150, (1, 500, 500))
    torch.use_deterministic_algorithms(True)
    try:
        with LargestTensor() as largest:
            found = confusion_matrix(prediction, prediction.to(torch.uint8), 150, 255)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, torch.bincount(prediction.flatten(), minlength=150).diag())
    assert largest.elements == 500 * 500
