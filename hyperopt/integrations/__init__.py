"""What training frameworks need beside a `torch.optim.Optimizer`. Each file needs the package that it is named after, this one needs none.

>>> import torch
>>> from hyperopt import Adam, Hyper
>>> from hyperopt.integrations import scalars
>>> optimizer = Hyper(Adam).stack(Adam).bind(torch.nn.Linear(2, 1).parameters())
>>> sorted(scalars(optimizer))[:2]
['hyper/0.beta1', 'hyper/0.beta2']
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..optimizer import HyperOptimizer


def unwrapped(optimizer: Any) -> HyperOptimizer:
    """The tower inside the wrapper that a framework put around it, such as Accelerate's `AcceleratedOptimizer`; or the tower itself.

    Raises:
        TypeError: there is none.
    """
    found = optimizer
    while not isinstance(found, HyperOptimizer):
        found = getattr(found, "optimizer", None)
        if found is None:
            raise TypeError(f"a tower that is bound, or a wrapper around one, is needed, got {type(optimizer).__name__}")
    return found


def scalars(optimizer: Any, hypergradients: bool = False) -> dict[str, float]:
    """Every hyperparameter as a number, by "hyper/<level>.<name>", for a logger. Waits for the device once.

    Args:
        optimizer: a tower that is bound, or a wrapper around one.
        hypergradients: add those of the last step, by "hypergradient/<level>.<name>". Default: False.

    Returns:
        Numbers; of values per tensor or per coordinate, the mean.
    """
    tower = unwrapped(optimizer)
    found = {f"hyper/{name}": value for name, value in tower.hyperparameters().items()}
    if hypergradients:
        found |= {f"hypergradient/{name}": value for name, value in tower.hypergradients().items()}
    if not found:
        return {}
    means = torch.stack([value.double().mean().to(next(iter(found.values())).device) for value in found.values()])
    return dict(zip(found, means.tolist(), strict=True))


class LearnedLR(LRScheduler):
    """A scheduler that leaves lr alone, for frameworks that make one of their own if they are given none.

    Their "constant" scheduler would not do: it assigns the initial lr before every step, so that nothing is learned. `get_last_lr` returns
    the learned lr of each group.

    Args:
        optimizer: a tower that is bound.
    """

    def __init__(self, optimizer: HyperOptimizer) -> None:
        self.optimizer, self.last_epoch = optimizer, 0
        self.base_lrs = self.get_last_lr()

    def get_last_lr(self) -> list[Any]:
        return [group["lr"].detach().clone().mean() for group in self.optimizer.param_groups]

    def get_lr(self) -> list[Any]:
        return self.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
