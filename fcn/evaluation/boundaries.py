"""How good a prediction is near the boundaries of its label, where skips to finer layers show.

    confusions = band_confusions(mask, prediction, classes=21, void=255)   # of one image
    boundary_miou(confusions)                      # {"1": 0.31, "2": 0.35, ..., "40": 0.62}

This is the trimap of Kohli et al. (IJCV 2009), Krähenbühl and Koltun (NIPS 2011) and DeepLab.
Theirs is a band around the void pixels of VOC. Here a boundary is wherever neighbouring labels
(above, below, left and right) differ, and void is one of these labels. So bands start at the edge
of the void line that VOC draws around objects, and where the data has no void, at the place where
two classes touch. The border of the picture is no boundary.
"""

import numpy as np
import torch
from scipy import ndimage

from fcn.metrics import segmentation_scores

WIDTHS = (1, 2, 3, 5, 10, 20, 40)  # of the bands, in pixels


def band_confusions(
    mask: np.ndarray, prediction: np.ndarray, classes: int, void: int
) -> np.ndarray:
    """The confusion matrix of one image, split by the distance from the label's boundaries.

    The pixels at a boundary are the band of width 1. A band of width w holds the pixels that are at
    most w - 1 pixels away from these, in a straight line. Void pixels are ignored.

    Args:
        mask: (H, W) uint8, the label.
        prediction: (H, W) uint8.
        classes: K.
        void: the label of void pixels.

    Returns:
        (bands + 1, K, K) pixels. The matrix at i counts the pixels that are in band i of WIDTHS and
        in no narrower one; the last one counts those beyond all bands. Together they are the
        confusion matrix of the image, with labels in rows and predictions in columns.
    """
    # Where the labels of a pixel and of the four around it are not all the same.
    cross = ndimage.generate_binary_structure(2, 1)
    edge = ndimage.morphological_gradient(mask, footprint=cross) > 0  # (H, W)
    distance = ndimage.distance_transform_edt(~edge) if edge.any() else np.full(mask.shape, np.inf)
    # The index in WIDTHS of the narrowest band that reaches a pixel; one more beyond all bands.
    band = np.searchsorted(WIDTHS, distance + 1)  # (H, W)
    cell = (band * classes + mask) * classes + prediction  # (H, W), an index into the flat counts
    counts = np.bincount(cell[mask != void], minlength=(len(WIDTHS) + 1) * classes**2)
    return counts.reshape(-1, classes, classes)


def boundary_miou(confusions: np.ndarray) -> dict[str, float]:
    """Mean IoU of the pixels within each of WIDTHS pixels of a boundary; NaN where there are none.

    Args:
        confusions: (bands + 1, K, K), a sum of what `band_confusions` gives for each image.
    """
    within = torch.from_numpy(np.cumsum(confusions, 0))  # a band holds all narrower ones
    return {
        str(width): segmentation_scores(confusion)["miou"]
        for width, confusion in zip(WIDTHS, within[:-1], strict=True)
    }
