"""Fused kernels of torch for the direction of a rule, used in eager mode in place of a dozen operations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..rule import Rule, State
from ..rules.adam import Adam
from ..rules.averaged import _Averaged
from ..rules.schedule_free import _ScheduleFree
from ..rules.split import _Split
from .buffers import Buffer

_fused = torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]


class Kernel:
    """Adam's direction by torch._fused_adam_, which changes nothing where it is told to skip.

    Args:
        values: of the hyperparameters, which are held.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self.options: dict[str, Any] = {name: values[name] for name in ("beta1", "beta2", "eps")}
        self.shared: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, move: Tensor, g: Tensor, state: State, t: Tensor, skip: Tensor) -> None:
        """Add the direction to `move` and write the new state, unless `skip` is 1."""
        _fused(
            [move], [g], [state["m"]], [state["v"]], [], [t.float()], lr=-1.0, weight_decay=0.0, amsgrad=False, maximize=False,
            found_inf=skip.float(), **self.options,
        )  # fmt: skip

    def scratch(self, like: Tensor, buffer: Buffer, cut: slice | None, *, lasting: bool) -> Tensor:
        """Zeros shaped like a block; memory that need not last until the next pass is shared."""
        if lasting:
            if buffer.scratch is None:
                buffer.scratch = torch.empty(buffer.numel, dtype=like.dtype, device=like.device)
            start = cut.start if cut is not None else 0
            return buffer.scratch[start : start + like.numel()].view(like.shape).zero_()
        key = like.dtype, like.device
        if key not in self.shared or self.shared[key].numel() < like.numel():
            self.shared[key] = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        shared = self.shared[key]
        return (shared if shared.shape == like.shape else shared[: like.numel()].view(like.shape)).zero_()


def textbook(rule: Rule) -> bool:
    """Whether the direction of a rule is Adam's as in the textbook."""
    return type(rule) is Adam and not rule._couples() and not rule.amsgrad and rule.bias_correction


def kernel(rule: Rule, values: Mapping[str, Tensor], rests: Mapping[str, Tensor]) -> Kernel | None:
    """The kernel of a rule at these values and complements of all that is held, which are read on the host; None if there is none."""
    wanted = textbook(rule) and rule.value("beta1") != 0 and not any(values[name].dim() for name in ("beta1", "beta2", "eps"))
    if not wanted or not float(values["eps"]):
        return None  # with eps = 0, torch's 0/0 is NaN and `root` makes it 0
    # Near 1 the complement has the digits.
    return Kernel({n: 1 - float(rests[n]) if 0.5 < float(v) < 1 else float(v) for n, v in values.items()})


def inner(rule: Rule) -> Rule:
    """The rule that gives the direction of an average; of a split rule the one that serves, once it is settled which."""
    rule = rule.inner if isinstance(rule, (_ScheduleFree, _Averaged)) else rule
    return rule.by(None) if isinstance(rule, _Split) and rule.role.direction is not None else rule
