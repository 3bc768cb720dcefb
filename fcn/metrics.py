"""Every score from one confusion matrix (Long et al. 2015, section 5).

    confusion = confusion_matrix(prediction, label, num_classes=21, void=255)  # (K, K) pixel counts
    scores = segmentation_scores(confusion)  # {"miou": 0.65, ...}

Let n_ij be the number of pixels of class i that were predicted as class j, and t_i the number of
pixels of class i. torchmetrics has all of this too, but its Jaccard index and its accuracy treat
absent classes in different ways, and on Apple's GPUs and with deterministic algorithms its
confusion matrix makes a table of K^2 numbers for each pixel: 45 GB for one image with 150 classes.
"""

from typing import Final, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric

# The scores of a whole split, under the names that metrics.csv, metrics.json and W&B have for them.
SCORES: Final = ("miou", "pixel_acc", "mean_acc", "fwiou")


class Scores(TypedDict):
    """Fractions in [0, 1]; NaN where there were no pixels to score."""

    pixel_acc: float
    mean_acc: float
    miou: float
    fwiou: float
    iou: list[float]  # one for each class; NaN for a class in neither labels nor predictions


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int, void: int) -> Tensor:
    """Count the pixels of each class i that were predicted as class j.

    The counts are exact on every device, and the same with deterministic algorithms.

    Args:
        prediction: class indices of any shape and integer type, below K.
        label: of the same shape; class indices below K, or `void`.
        num_classes: K.
        void: the label of pixels that are not counted. It may be one of the K indices.

    Returns:
        (K, K) int64; rows are labels, columns are predictions.
    """
    pairs = 1 + label.int() * num_classes + prediction  # 1 to K^2
    pairs = torch.where(label == void, 0, pairs).flatten()
    if pairs.is_mps:
        pairs = pairs.cpu()  # Apple's GPUs need seconds to count a common class (pytorch #184779)
    counts = torch.bincount(pairs, minlength=num_classes**2 + 1)[1:]
    return counts.view(num_classes, num_classes).to(label.device)


class ConfusionMatrix(Metric):
    """The sum of `confusion_matrix` over batches and over the processes of a distributed run."""

    counts: Tensor

    def __init__(self, num_classes: int, void: int) -> None:
        super().__init__()
        self.num_classes, self.void = num_classes, void
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add a batch: predictions (N, H, W) and labels (N, H, W)."""
        self.counts += confusion_matrix(prediction, label, self.num_classes, self.void)

    def compute(self) -> Tensor:
        """(K, K) int64."""
        return self.counts


def segmentation_scores(confusion: Tensor) -> Scores:
    """The paper's four metrics, and the IoU of each class.

    The mean IoU leaves out a class that is in neither labels nor predictions. The mean accuracy is
    over the classes that are in the labels.

    Args:
        confusion: (K, K) pixel counts; rows are labels, columns are predictions. Void pixels must
            not be in it.
    """
    n = confusion.cpu().to(torch.float64)  # Apple's GPUs have no float64
    correct = n.diag()  # (K, K) -> (K,): n_ii
    labelled = n.sum(1)  # (K, K) -> (K,): t_i
    union = labelled + n.sum(0) - correct  # (K,): pixels of class i in labels or predictions
    iou = correct / union  # (K,); 0 / 0 is NaN: the class is absent
    return {
        "pixel_acc": (correct.sum() / n.sum()).item(),
        "mean_acc": (correct / labelled).nanmean().item(),
        "miou": iou.nanmean().item(),
        "fwiou": ((labelled * iou).nansum() / n.sum()).item(),
        "iou": iou.tolist(),
    }
