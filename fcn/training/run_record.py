"""What a checkpoint says about the run that made it, so that it can be used on its own.

fcn/training/trainer.py adds this callback to every run.
"""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from fcn.checkpoint import without_targets
from fcn.runs.versions import versions


class RunRecord(Callback):
    """Puts settings, the type of the training images, versions and precision into each checkpoint.

    Args:
        config: the resolved configuration. In a checkpoint, its `_target_` entries are replaced by
            plain names, so that nothing in the file can be called.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = without_targets(config)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        data = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        # Generated images have no type. predict.py refuses files of another type.
        checkpoint["config"] = self.config | {"image_type": getattr(data, "image_type", None)}
        checkpoint["versions"] = versions()
        checkpoint["precision"] = str(trainer.precision)  # evaluate.py computes in the same one
