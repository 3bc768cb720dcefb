"""The LightningModule: an FCN with its loss, metrics, optimizer groups and schedule.

    module = SegmentationModule.load_from_checkpoint("runs/.../checkpoints/best.ckpt")
    logits = module(image)  # (N, 3, H, W) uint8 -> (N, K, H, W)

train.py builds it from conf/model, conf/optimizer and conf/scheduler. Loss and scores are those of
Long, Shelhamer, Darrell (CVPR 2015), except that the loss is a mean over pixels, not a sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import CatMetric

from fcn.checkpoint import check_sizes, read_checkpoint
from fcn.datasets import check_labels
from fcn.errors import WeightsError, check_number, check_text, check_whole, is_number, refuse
from fcn.metrics import SCORES, ConfusionMatrix, Scores, segmentation_scores
from fcn.network import FCN, head_layers
from fcn.precision import best_layout
from fcn.weights import load_weights


class SegmentationModule(pl.LightningModule):
    """Trains and evaluates one `FCN`.

    Args:
        num_classes: K, background included. None takes the number of `class_names`, or 21.
        class_names: names of the K classes. None names them "0", "1" and so on.
        palette: K colours (R, G, B), 0 to 255, for pictures made from a checkpoint.
        void: the label of pixels that are ignored in the loss and in every score; no class has it.
        weights: pretrained weights to begin with, as `fcn.weights.load_weights` takes them.
        optimizer: a `functools.partial` that makes the optimizer from parameter groups. Its
            keyword `lr` is the base rate. It is needed for training only.
        scheduler: makes a schedule from (optimizer, total_steps, time_used), such as
            `fcn.schedules.poly`. None keeps the rate constant.
        head_lr_multiplier: a factor on the learning rate of those layers of head and decoder for
            which no pretrained weights were loaded.
        bias_lr_multiplier: a factor on the learning rate of biases, 2 in the paper. Biases have no
            weight decay.
        class_weights: K factors on the training loss of a pixel, by its label, for data in which
            some classes are rare. None: all are 1. "balanced" is accepted as a placeholder, to be
            replaced by `set_class_weights` before training. The loss of a validation is not
            weighted.
        network: further arguments of `fcn.network.FCN`.

    Raises:
        ValueError: an argument cannot work. The message begins with "name=value".
        fcn.errors.WeightsError: the weights cannot be found or do not fit.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        void: int = 255,
        weights: str | Path | None = None,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        head_lr_multiplier: float = 1.0,
        bias_lr_multiplier: float = 2.0,
        class_weights: Sequence[float] | str | None = None,
        **network: Any,
    ) -> None:
        check_whole("num_classes", num_classes, 2, 255, optional=True)
        check_text("weights", weights, optional=True)
        check_number("head_lr_multiplier", head_lr_multiplier, above=0)
        check_number("bias_lr_multiplier", bias_lr_multiplier, above=0)
        super().__init__()
        if class_names is None:
            class_names = [str(k) for k in range(num_classes or 21)]
        check_labels(class_names, palette, void)
        num_classes = num_classes or len(class_names)
        if len(class_names) != num_classes:
            wanted = f"null or {len(class_names)}, the number of class names"
            refuse("num_classes", num_classes, f"{wanted} (background is a class, void is not)")
        _check_class_weights(class_weights, num_classes)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"], logger=False)
        self.hparams.update(num_classes=num_classes, class_names=list(class_names))
        self.class_names, self.void = list(class_names), void
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.head_lr_multiplier, self.bias_lr_multiplier = head_lr_multiplier, bias_lr_multiplier

        self.network = FCN(num_classes, **network)
        # The layers of head and decoder that were not loaded; `head_lr_multiplier` applies to them.
        self.fresh_layers = head_layers(self.network)
        if weights is not None:
            self.load_pretrained(weights)
        self.confusion = ConfusionMatrix(num_classes, void)
        # For each validation batch, the sum of the loss over its pixels.
        self.val_losses = CatMetric(nan_strategy="disable")
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None, persistent=False)  # a hyperparameter
        if class_weights is not None and not isinstance(class_weights, str):
            self.set_class_weights(class_weights)
        self.scores: Scores | None = None  # of the last validation
        self.val_loss = math.nan

    def set_class_weights(self, weights: Sequence[float]) -> None:
        """Multiply the training loss of each pixel by the weight of its label, one of K."""
        _check_class_weights(weights, len(self.class_names))
        self.hparams["class_weights"] = list(weights)
        self.class_weights = torch.tensor(weights, dtype=torch.float32)

    def load_pretrained(self, source: str | Path) -> None:
        """Begin with pretrained weights, as `fcn.weights.load_weights` takes them.

        Raises:
            fcn.errors.WeightsError: they cannot be found or do not fit. Nothing is changed then.
        """
        self.fresh_layers = load_weights(self.network, source)

    def forward(self, image: Tensor) -> Tensor:
        """Images (N, 3, H, W), uint8 or float in [0, 1] -> logits (N, K, H, W)."""
        return self.network(image)

    def loss(
        self,
        logits: Tensor,
        mask: Tensor,
        pixels: Tensor | float | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in float32, the mean over the pixels that are not void; 0 if all are void.

        Args:
            logits: (N, K, H, W).
            mask: (N, H, W).
            pixels: divide the sum by this number; None divides by the pixels that are not void.
            weights: (K,), factors on the loss of a pixel by its label; None: all are 1.

        Returns:
            A scalar.
        """
        if pixels is None:
            pixels = (mask != self.void).sum().clamp(min=1)
        # trainer.deterministic=true: on a GPU, only the losses of single pixels are deterministic,
        # not torch's own sum of them.
        exact = torch.are_deterministic_algorithms_enabled()
        losses = F.cross_entropy(
            logits.float(),
            mask.long(),
            None if weights is None else weights.float(),
            ignore_index=self.void,
            reduction="none" if exact else "sum",
        )
        return losses.sum() / pixels

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of one batch: `image` (N, 3, H, W), `mask` (N, H, W).

        With DDP, every process computes the gradient of its own batch, and DDP averages these. The
        batches differ in how many pixels are not void. So each process divides its sum of losses by
        the mean number of such pixels in a process; the average is then the gradient of the mean
        over the pixels of all batches.
        """
        mask = batch["mask"]
        pixels, processes = (mask != self.void).sum(), 1
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(pixels)
            processes = distributed.get_world_size()
        pixels = pixels.clamp(min=1) / processes
        return self.loss(self(batch["image"]), mask, pixels, self.class_weights)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Score one batch. Callbacks get `prediction`, class indices (N, H, W) uint8."""
        mask = batch["mask"]
        # `forward` skips torch.compile (trainer.compile=true): the images of a validation differ in
        # size, and the network would be compiled again for each size.
        logits = self.network.forward(batch["image"])
        prediction = logits.max(1).indices  # (N, K, H, W) -> (N, H, W); argmax takes twice as long
        self.confusion.update(prediction, mask)
        # Its shape is (1,), not (): else torchmetrics could not gather the values of a process that
        # has one batch together with those of one that has several.
        self.val_losses.update(self.loss(logits, mask, pixels=1).reshape(1))
        return {"prediction": prediction.to(torch.uint8)}

    def on_validation_start(self) -> None:
        """Compute as evaluate.py does, which gives the same scores to the last digit.

        cuDNN does not search for its fastest algorithms, because images differ in size. The layout
        of activations may be another one than in training, which has a backward pass.
        """
        self.benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        if isinstance(self.network, FCN):  # evaluate.py may put something else in its place
            self.layout = self.network.channels_last
            precision = str(self.trainer.precision)
            self.network.set_layout(best_layout(self.device, precision, backward=False))

    def on_validation_end(self) -> None:
        torch.backends.cudnn.benchmark = self.benchmark
        if isinstance(self.network, FCN):
            self.network.set_layout(self.layout)

    def on_validation_epoch_start(self) -> None:
        self.confusion.reset()
        self.val_losses.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split, at the number of optimizer steps taken so far."""
        if self.trainer.sanity_checking:  # trainer.num_sanity_val_steps: no whole split
            return
        confusion = self.confusion.compute()  # (K, K), summed over all processes
        self.scores = segmentation_scores(confusion)
        # fsum rounds once, so that the sum does not depend on which process saw which image.
        self.val_loss = math.fsum(self.val_losses.compute().flatten().tolist())
        self.val_loss /= max(1, int(confusion.sum()))
        ious = zip(self.class_names, self.scores["iou"], strict=True)
        named = {f"val/{name}": self.scores[name] for name in SCORES}
        named |= {f"val/iou/{name}": iou for name, iou in ious}
        named["val/loss"] = self.val_loss
        # For checkpoints and early stopping, as float32. Each process has the same numbers.
        self.log_dict(named, logger=False, sync_dist=True)
        for logger in self.loggers:
            logger.log_metrics(named, step=self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer with up to four parameter groups, and the schedule.

        The groups are weights and biases, of layers that were loaded and of layers that were not.
        Each has its own learning rate: the base rate times a factor, which the group keeps as
        `lr_multiplier`. The metric `train/lr` is the rate without this factor.

        Raises:
            ValueError: the module was built without an optimizer.
        """
        if self.make_optimizer is None:
            raise ValueError("SegmentationModule(optimizer=...) is needed for training")
        lr = self.make_optimizer.keywords["lr"]  # type: ignore[attr-defined]  # functools.partial
        fresh = set(self.fresh_layers)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            layer, _, kind = name.rpartition(".")
            if parameter.requires_grad:
                groups.setdefault((layer in fresh, kind == "bias"), []).append(parameter)
        settings: list[dict[str, Any]] = []
        for (is_fresh, is_bias), parameters in groups.items():
            multiplier = self.head_lr_multiplier if is_fresh else 1
            multiplier *= self.bias_lr_multiplier if is_bias else 1
            rates = {"lr": lr * multiplier, "lr_multiplier": multiplier}
            decay = {"weight_decay": 0.0} if is_bias else {}
            settings.append({"params": parameters, **rates, **decay})
        optimizer = self.make_optimizer(settings)
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(
            optimizer,
            total_steps=self.trainer.estimated_stepping_batches,  # inf if only time is limited
            time_used=self.time_used,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Refuse to train with a placeholder instead of class weights."""
        if self.hparams["class_weights"] == "balanced":
            raise ValueError("class_weights=balanced: call `set_class_weights` before training")

    def time_used(self) -> float:
        """The share of `trainer.max_time` that has passed, from 0 to 1; 0 without a limit."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
                elapsed = callback.time_elapsed()
                share = elapsed / max(elapsed + left, 1e-9)
                return self.trainer.strategy.broadcast(share)  # one clock for all processes
        return 0.0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as Lightning does, but with fused optimizers too.

        Lightning refuses these for every precision, although only 16-mixed is a problem: there, a
        fused optimizer itself divides the gradients by the loss scale, after they were clipped.
        fcn/training/settle.py refuses that.
        """
        if gradient_clip_val:
            clip = self.trainer.precision_plugin.clip_grad_by_norm
            if gradient_clip_algorithm == "value":
                clip = self.trainer.precision_plugin.clip_grad_by_value
            clip(optimizer, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint usable on its own.

        It holds all weights. So `weights` is stored as None, and to open it nothing is downloaded.
        """
        checkpoint["hyper_parameters"] = dict(checkpoint["hyper_parameters"], weights=None)
        checkpoint["fresh_layers"] = self.fresh_layers
        checkpoint["normalization"] = {
            "mean": self.network.mean.flatten().tolist(),
            "std": self.network.std.flatten().tolist(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.fresh_layers = checkpoint.get("fresh_layers", [])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        checkpoint: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Self:
        """Build the module of a .ckpt or .safetensors, or of a published net.

        No code that the file may hold is run. This replaces Lightning's own method, which imports
        and calls what the settings in a file name; before version 2.6.6 that may be any function.

        Args:
            checkpoint_path: the file.
            map_location: the device that the module is moved to; None leaves it on the CPU.
            checkpoint: what the file holds, if it has been read already. A run that still trains
                replaces its last.ckpt, so that a second reading may find another.
            changes: arguments of `SegmentationModule` that replace those in the checkpoint.

        Raises:
            WeightsError: the file is missing, broken, not ours, or hostile.
        """
        path = Path(checkpoint_path)
        checkpoint = checkpoint or read_checkpoint(path)
        check_sizes(path, checkpoint)
        settings = {**checkpoint["hyper_parameters"], "weights": None}
        try:
            module = cls(**settings | changes)
            module.load_state_dict(checkpoint["state_dict"])
        except (TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise WeightsError(f"{path} does not build a network: {why}") from error
        module.on_load_checkpoint(checkpoint)
        return module.to(map_location)


def _check_class_weights(weights: Any, num_classes: int) -> None:
    """Refuse what is neither None nor "balanced" nor one weight for each class."""
    if weights is None or weights == "balanced":
        return
    valid = isinstance(weights, list | tuple) and len(weights) == num_classes
    valid = valid and all(is_number(weight) and weight >= 0 for weight in weights)
    if not valid or not any(weights):
        wanted = f"{num_classes} numbers of at least 0, one for each class and not all of them 0"
        refuse("class_weights", weights, f"null, balanced or {wanted}")
