"""SGD whose step is a part of the backward pass, so that gradients are never kept.

    python train.py optimizer=sgd_in_backward

A gradient is read only once, by the optimizer. This one applies each as soon as the backward pass
has computed it, and then frees it. So only the largest gradient has to fit into memory, which is
conv6's 0.4 GB, and not the sum of all, 0.5 GB for a VGG-19 of full width. At the moment when most
memory is in use, this saves 0.2 to 0.4 GB (docs/memory.md). The weights are SGD's, bit for bit.

The tutorial "How to save memory by fusing the optimizer step into the backward pass" of torch's
documentation has the idea. Its optimizers, one for each parameter, have neither a common schedule
nor a common state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from fcn.errors import refuse

TARGET = "fcn.training.in_backward.SGDInBackward"  # conf/optimizer/sgd_in_backward.yaml names it


class SGDInBackward(SGD):
    """torch's SGD, which applies gradients while the closure of `step` computes them.

    Arguments, parameter groups and state are those of `torch.optim.SGD`. Nothing may be done with
    all gradients between backward pass and step, so these are impossible: clipping, accumulation
    over batches, the scaling of losses in 16-mixed, and the averaging of DDP.
    `check_trainer` refuses them.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run a closure that computes gradients, and apply each of them meanwhile.

        Args:
            closure: calls `backward`. Lightning always gives one. None applies the gradients that
                are there, as SGD does.

        Returns:
            What the closure returns.
        """
        with self.applied_in_backward():
            return super().step(closure)

    @contextmanager
    def applied_in_backward(self) -> Iterator[None]:
        """While this block runs a backward pass, apply each gradient as soon as it is computed."""
        self.norms: list[Tensor] = []  # of the gradient of each parameter
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._apply, group))
            for group in self.param_groups
            for parameter in group["params"]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients of the last backward pass, a scalar."""
        return torch.linalg.vector_norm(torch.stack(self.norms))

    def _apply(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Apply the gradient of one parameter of a group, and free it."""
        assert parameter.grad is not None
        self.norms.append(torch.linalg.vector_norm(parameter.grad))
        groups, self.param_groups = self.param_groups, [{**group, "params": [parameter]}]
        try:
            super().step()
        finally:
            self.param_groups = groups
        parameter.grad = None


def check_trainer(trainer: Any) -> None:
    """Refuse settings that need all gradients at once, which `SGDInBackward` never has.

    Args:
        trainer: settings as in conf/trainer.

    Raises:
        ConfigError: the message names the setting.
    """
    devices, strategy = trainer.get("devices", 1), trainer.get("strategy", "auto")
    clip, batches = trainer["gradient_clip_val"], trainer["accumulate_grad_batches"]
    precision = trainer["precision"]
    several = isinstance(devices, int) and devices > 1
    settings = (  # name, value, whether it is impossible, what is possible
        ("gradient_clip_val", clip, clip, "null"),
        ("accumulate_grad_batches", batches, batches > 1, "1"),
        ("precision", precision, precision == "16-mixed", "32-true or bf16-mixed"),
        ("devices", devices, several, "1"),
        ("strategy", strategy, strategy != "auto", "auto"),
    )
    for name, value, impossible, wanted in settings:
        if impossible:
            why = "which applies each gradient and frees it; optimizer=sgd keeps them all"
            refuse(f"trainer.{name}", value, f"{wanted} with optimizer=sgd_in_backward, {why}")
