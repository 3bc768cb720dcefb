"""Old name of parts of fcn.training; deleted when nothing uses it any more."""

from fcn.training.loss_statistics import LossStatistics  # noqa: F401
from fcn.training.score_table import print_scores  # noqa: F401
