"""Fully convolutional networks for semantic segmentation (Long, Shelhamer, Darrell, CVPR 2015)."""

__version__ = "0.1.0"
