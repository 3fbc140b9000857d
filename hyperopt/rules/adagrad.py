"""Adagrad."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Positive
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class Adagrad(Rule):
    """Gradients divided by the root of the sum of all their squares, as `torch.optim.Adagrad`.

        g = g + weight_decay·x
        v = v + g²
        x = x − lr / (1 + (t − 1)·lr_decay) · g / (√(initial_accumulator_value + v) + eps)

    Args:
        lr: step size, default 1e-2 (above level 0: 0.1, in raw space).
        lr_decay: at least 0, default 0.
        weight_decay: coupled (L2), at least 0, default 0.
        initial_accumulator_value: where the sum starts, default 0. It is added where the sum is read, so that it can be
            learned, and a value that is assigned later counts from then on.
        eps: added to the root, where torch has it, default 1e-10.

    Raises:
        ValueError: a value outside its domain.

    Source: Duchi, Hazan and Singer 2011; torch.optim.Adagrad.

    >>> from hyperopt import SGD, Adagrad, Hyper
    >>> Hyper(Adagrad, lr=0.1, lr_decay=0.01, learn=("lr", "lr_decay")).stack(SGD)
    Hyper('Adagrad(lr=0.1, lr_decay=0.01, learn=(lr, lr_decay)) / SGD')
    """

    lr: float = hyper(1e-2, Positive(), above=0.1)
    lr_decay: float = hyper(0.0, Positive())
    weight_decay: float = hyper(0.0, Positive())
    initial_accumulator_value: float = hyper(0.0, Positive())
    eps: float = hyper(1e-10, Positive())

    def init(self, x: Tensor) -> State:
        return {"v": x.new_zeros(x.shape)}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0:
            g = g + h.weight_decay * x
        # A sum, unlike an average, of finite squares may be infinite.
        v = (state["v"] + square(g)).clamp_max(torch.finfo(g.dtype).max)
        step = h.lr if self.lr_decay == 0 else h.lr / (1 + (t - 1) * h.lr_decay)
        new = {"v": v}
        return x - step * g / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        total = state["v"] if self.initial_accumulator_value == 0 else state["v"] + h.initial_accumulator_value
        return root(total) + h.eps

    def linear_in_lr(self) -> bool:
        return self.weight_decay == 0
