"""Old names, until benchmarks/ and docs/ use the new ones."""

from fcn.inference.predictor import load_predictor as load_model  # noqa: F401
from fcn.inference.tta import TestTime  # noqa: F401
from fcn.precision import cast_weights  # noqa: F401
