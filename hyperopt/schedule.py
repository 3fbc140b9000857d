"""A scheduler that writes to a learned lr: it scales the lr, or the user is told that it overwrites it."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .domains import Domain
from .hyperparameter import Hyperparameter
from .rule import Rule


class Schedule:
    """A learned lr that a scheduler scales: a step uses the value that the scheduler wrote to `param_groups`, times what was learned.

        lr = learned · written / initial,       initial: the lr that the group was bound with, where learning starts

    What was written stays there until the scheduler writes again, because some schedulers compute the next value from the current one.

    Args:
        group: the parameter group.
        written: what the scheduler wrote, 0-d.
        domain: of lr.
        size: how many values lr has; None for one.
        rule: of the group.
    """

    def __init__(self, group: dict[str, Any], written: Tensor, domain: Domain, size: int | None, rule: Rule) -> None:
        tower = group["tower"]
        if "initial" not in tower:
            tower["initial"] = written.detach().clone()
            tower["last"]["lr"] = expanded(written.detach().clone(), size)
        self.initial = tower["initial"] = tower["initial"].to(written)
        self.factor = torch.ones_like(written)
        self.lr = Hyperparameter(domain, tower["last"]["lr"], learned=True, rule=rule, name="lr", factor=self.factor)
        self.written(written)

    def written(self, value: Tensor) -> bool:
        """Scale by what was written. A tensor that is negative or not finite is ignored, as nobody waits to look at it."""
        factor = value / self.initial
        # Another tensor, as the graph of the last step may hold the one before.
        self.factor = self.lr.factor = torch.where((factor >= 0) & factor.isfinite(), factor, self.factor)
        return True

    def unwritten(self) -> None:
        """Nothing was written before this step."""


class Overwritten:
    """Warns once if a learned lr is overwritten on every step, so that it is hardly learned.

    A scheduler that writes a constant writes what is already there on every second step: the tower uses the value once and learns on from
    there. `StepLR` writes on every step too, and rarely another value than the one that is there. Changes are therefore counted, on the
    device; the count is copied without waiting for it, and a late copy is seen some steps later.

    Args:
        last: the values that were published last, by name.
        device: of the hyperparameters.
    """

    STEPS, CHANGES = 20, 5  # this many changes within as many steps in a row on which lr is written

    def __init__(self, last: dict[str, Tensor], device: torch.device) -> None:
        self.last, self.steps, self.warned = last, 0, False
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self.copy = torch.zeros((), dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
        self.seen = self.copy.numpy()  # read without an operation of torch

    def written(self, value: Tensor) -> bool:
        """Count an lr that was written before this step; it replaces the one that was learned."""
        if self.warned:
            return False
        self.steps += 1
        self.count.add_((value != self.last["lr"]).any())
        if self.steps == self.STEPS:
            self.copy.copy_(self.count, non_blocking=True)
            self.unwritten()
        if self.seen >= self.CHANGES:
            self.warned = True
            warnings.warn(
                f"lr is learned, and was overwritten on {self.STEPS} steps in a row, by a scheduler or a training loop, so that it is "
                "hardly learned: bind(…, schedule=True) lets them scale the learned lr instead",
                UserWarning,
                stacklevel=2,
            )
        return False

    def unwritten(self) -> None:
        """Nothing was written before this step."""
        if self.steps:
            self.steps = 0
            self.count.zero_()


def expanded(value: Tensor, size: int | None) -> Tensor:
    """A value for each of `size` tensors or coordinates."""
    return value if size is None or value.dim() else value.expand(size).clone()
