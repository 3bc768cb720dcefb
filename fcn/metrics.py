"""Every score from one confusion matrix (Long et al. 2015, section 5).

Let n_ij be the pixels of class i that were predicted as class j, and t_i the pixels of class i.
torchmetrics' ready-made Jaccard and Accuracy treat absent classes differently, so all four scores
are derived here from `torchmetrics.classification.MulticlassConfusionMatrix`.
"""

from typing import TypedDict

import torch
from torch import Tensor


class Scores(TypedDict):
    """Fractions in [0, 1]; NaN where nothing was to be judged."""

    pixel_acc: float
    mean_acc: float
    miou: float
    fwiou: float
    iou: list[float]  # one for each class, NaN for a class in neither labels nor predictions


def segmentation_scores(confusion: Tensor) -> Scores:
    """The paper's four metrics and the IoU of each class.

    A class that is in neither labels nor predictions is left out of mean IoU; mean accuracy
    averages over the classes that are in the labels.

    Args:
        confusion: (K, K) pixel counts; rows are labels, columns are predictions; void not counted.
    """
    n = confusion.cpu().to(torch.float64)  # Apple's GPUs have no float64
    correct = n.diag()  # (K,) n_ii
    labelled = n.sum(1)  # (K,) t_i
    union = labelled + n.sum(0) - correct  # (K,)
    iou = correct / union  # 0 / 0 = NaN: the class is absent
    return {
        "pixel_acc": (correct.sum() / n.sum()).item(),
        "mean_acc": (correct / labelled).nanmean().item(),
        "miou": iou.nanmean().item(),
        "fwiou": ((labelled * iou).nansum() / n.sum()).item(),
        "iou": iou.tolist(),
    }
