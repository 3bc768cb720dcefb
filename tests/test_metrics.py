"""The confusion matrix, and the paper's four metrics by hand.

test_module.py has a second implementation of both, for a whole split.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fcn.metrics import confusion_matrix, segmentation_scores

NAN = math.nan
MANY = 300_000_001  # pixels; in float32, one more or less would vanish


@pytest.mark.parametrize(
    ("confusion", "iou", "others"),  # pixel accuracy, mean accuracy, frequency-weighted IoU
    [
        # Rows are labels. Rows sum to (8, 4, 4), columns to (7, 6, 3); correct are 6, 3, 2 of 16.
        (
            [[6, 2, 0], [0, 3, 1], [1, 1, 2]],
            [6 / 9, 3 / 7, 2 / 5],
            [11 / 16, (6 / 8 + 3 / 4 + 2 / 4) / 3, (8 * 6 / 9 + 4 * 3 / 7 + 4 * 2 / 5) / 16],
        ),
        # Class 1 is nowhere: the means are over the two others.
        (
            [[3, 0, 1], [0, 0, 0], [2, 0, 4]],
            [3 / 6, NAN, 4 / 7],
            [7 / 10, (3 / 4 + 4 / 6) / 2, (4 * 3 / 6 + 6 * 4 / 7) / 10],
        ),
        # Class 1 is predicted but never labelled: its IoU counts, and it has no accuracy.
        ([[4, 1], [0, 0]], [4 / 5, 0.0], [4 / 5, 4 / 5, 4 / 5]),
        ([[0, 0], [0, 0]], [NAN, NAN], [NAN, NAN, NAN]),  # nothing but void
        ([[MANY, 1], [0, MANY]], [1 - 1 / MANY] * 2, [1 - 0.5 / MANY] * 2 + [1 - 1 / MANY]),
    ],
)
def test_worked_out_by_hand(
    confusion: list[list[int]], iou: list[float], others: list[float]
) -> None:
    scores = segmentation_scores(torch.tensor(confusion))
    known = [value for value in iou if not math.isnan(value)]
    wanted = [*iou, sum(known) / len(known) if known else NAN, *others]
    found = [*scores["iou"], *(scores[n] for n in ("miou", "pixel_acc", "mean_acc", "fwiou"))]
    assert found == pytest.approx(wanted, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("void", "dtype"), [(255, torch.uint8), (0, torch.int64), (3, torch.uint8)]
)
def test_counts_are_those_of_torchmetrics(void: int, dtype: torch.dtype) -> None:
    """Also where void is one of the classes: its pixels are left out, predictions of it are not."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(200, (2, 30, 40), generator=generator).to(dtype)
    label = torch.randint(200, (2, 30, 40), generator=generator).to(torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.2] = void
    expected = multiclass_confusion_matrix(prediction.long(), label.long(), 200, ignore_index=void)
    assert torch.equal(confusion_matrix(prediction, label, 200, void), expected)
    assert expected.sum() == (label != void).sum()


def test_a_label_that_is_no_class_is_not_lost() -> None:
    for label in (3, 254):
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
