"""A resumed run has the settings of its configuration, which may have changed since it was begun.

    python train.py resume=RUN optimizer.lr=1e-5 scheduler=poly trainer.max_steps=80000

fcn/training/trainer.py adds this callback to every run. What cannot be changed is refused in
fcn/runs/resume.py.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# What fcn/module.py and the schedule write into each parameter group.
GROUP_SETTINGS = {"lr", "initial_lr", "lr_multiplier", "weight_decay"}


class ResumedSettings(Callback):
    """Puts the current settings where Lightning has restored those of the checkpoint.

    These are the rates, momentum, weight decay and schedule, and the patience of early stopping. If
    no setting has changed, they are equal to what they replace. A schedule of another kind than
    ours has set rates itself, perhaps step by step; there nothing is replaced.

    Without the callback `ema`, a run that had it goes on from its weights, not from their average.
    """

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []  # settings of the optimizer's parameter groups

    def on_load_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, EarlyStopping) and state:
                state["patience"] = callback.patience
        # By `fused` in these groups, torch decides on which device it keeps the counter of steps.
        fused = module.make_optimizer.keywords.get("fused")
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group |= {"fused": fused} if "fused" in group else {}
        if "current_model_state" in checkpoint:  # then `state_dict` holds their average
            module.load_state_dict(checkpoint["current_model_state"])

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Keep the settings of the new optimizer. Lightning restores its state after this.

        Parameter groups may also hold state, such as a counter of steps, which is left alone.
        """
        (optimizer,) = trainer.optimizers
        names = (GROUP_SETTINGS | module.make_optimizer.keywords.keys()) - {"fused"}
        self.groups = [
            {name: value for name, value in group.items() if name in names}
            for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Put today's settings over those that Lightning has just restored."""
        (optimizer,) = trainer.optimizers
        follow_layout(optimizer)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        ours = [schedule for schedule in schedules if isinstance(schedule, LambdaLR)]
        if ours != schedules:  # not of fcn/schedules.py
            return
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(settings)
        for schedule in ours:
            schedule.base_lrs = [settings["initial_lr"] for settings in self.groups]
            for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(schedule.last_epoch)


def follow_layout(optimizer: Optimizer) -> None:
    """Store momentum and the like in the order in which the weights are stored.

    A checkpoint keeps the order of its run, and `model.channels_last` may have changed since. A
    fused optimizer pairs the numbers of weights and state as they lie in memory, so that it would
    move weights by the momentum of others.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
