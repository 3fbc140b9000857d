"""The table of rules: a new rule is one row here, and every property in tests/ then holds for it or the row says why not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperopt import SGD, Adam, AdamW, Rule


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: the id of its tests.
        rule: with a value strictly inside its domain for everything in `learnable`, and none that is a default for lr
            (above level 0 a rule has other defaults).
        learnable: the hyperparameters that are learned, together and one by one.
        torch: makes torch's optimizer with the values of the rule it is given, or None.
        reason: why `torch` is None or a hyperparameter is missing in `learnable`.
    """

    name: str
    rule: Rule
    learnable: tuple[str, ...]
    torch: Callable[[Iterable[Tensor], Rule], torch.optim.Optimizer] | None
    reason: str = ""

    def peer(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """torch's own optimizer with the same values."""
        assert self.torch is not None, self.reason
        return self.torch(params, self.rule)


def torch_sgd(params: Iterable[Tensor], rule: SGD) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay, nesterov=rule.nesterov)


def torch_adam(params: Iterable[Tensor], rule: Adam) -> torch.optim.Optimizer:
    make = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
    return make(params, lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay)


ADAM = ("lr", "beta1", "beta2", "eps")

CASES = (
    Case("sgd", SGD(lr=0.2), ("lr",), torch_sgd, "momentum and weight_decay are 0, on the boundary"),
    Case("sgd-momentum", SGD(lr=0.1, momentum=0.8), ("lr", "momentum"), torch_sgd, "weight_decay is 0, on the boundary"),
    Case("sgd-nesterov", SGD(lr=0.1, momentum=0.8, nesterov=True), ("lr", "momentum"), torch_sgd, "weight_decay is 0, on the boundary"),
    Case("sgd-decay", SGD(lr=0.2, weight_decay=0.05), ("lr", "weight_decay"), torch_sgd, "momentum is 0, on the boundary"),
    Case(
        "sgd-everything",
        SGD(lr=0.1, momentum=0.7, weight_decay=0.05, nesterov=True),
        ("lr", "momentum", "weight_decay"),
        torch_sgd,
    ),
    Case("adam", Adam(lr=0.01), ("lr", "beta1", "beta2"), torch_adam, "eps = 1e-8 moves weights by less than a finite difference resolves"),
    Case("adam-eps", Adam(lr=0.02, beta1=0.8, beta2=0.9, eps=0.01), ADAM, torch_adam, "weight_decay is 0, on the boundary"),
    Case("adam-decay", Adam(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.05), (*ADAM, "weight_decay"), torch_adam),
    Case("adamw", AdamW(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.5), (*ADAM, "weight_decay"), torch_adam),
    Case(
        "adam-uncorrected",
        Adam(lr=0.02, beta2=0.99, eps=0.01, bias_correction=False),
        ADAM,
        None,
        "torch.optim has no Adam without bias correction",
    ),
)
