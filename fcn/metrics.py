"""Every score from one confusion matrix (Long et al. 2015, section 5).

    scores = segmentation_scores(confusion)  # (K, K) pixel counts -> {"miou": 0.65, ...}

Let n_ij be the number of pixels of class i that were predicted as class j, and t_i the number of
pixels of class i. torchmetrics' own Jaccard index and accuracy treat absent classes in different
ways. All scores are therefore computed here, from the counts of
`torchmetrics.classification.MulticlassConfusionMatrix`.
"""

from typing import TypedDict

import torch
from torch import Tensor


class Scores(TypedDict):
    """Fractions in [0, 1]; NaN where there were no pixels to score."""

    pixel_acc: float
    mean_acc: float
    miou: float
    fwiou: float
    iou: list[float]  # one for each class; NaN for a class in neither labels nor predictions


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
