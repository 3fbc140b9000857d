from dataclasses import dataclass

from torch import Tensor, finfo

from ..domains import Positive
from ..rule import Rule, State, Values, hyper, root, square


@dataclass(frozen=True)
class Adagrad(Rule):
    """Gradients divided by the root of the sum of all squared gradients so far, equal to `torch.optim.Adagrad`.

        g = g + weight_decay·x
        v = v + g²
        x = x − lr / (1 + (t − 1)·lr_decay) · g / (√(initial_accumulator_value + v) + eps)

    Args:
        lr: learning rate, at least 0, default 1e-2; 0.1 above level 0, where it moves raw hyperparameters.
        lr_decay: decay of lr with the number of steps, at least 0, default 0.
        weight_decay: coupled weight decay (L2 penalty), at least 0, default 0.
        initial_accumulator_value: initial value of the sum, at least 0, default 0. It is added where the sum is read and not
            stored in the state, so it can be learned, and a value assigned later takes effect from then on.
        eps: added to the root, as in torch, at least 0, default 1e-10.

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

    def direction(self, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        # A sum of finite squares, unlike an average of them, may overflow.
        new = {"v": (state["v"] + square(g)).clamp_max(finfo(g.dtype).max)}
        d = g if self.lr_decay == 0 else g / (1 + (t - 1) * h.lr_decay)
        return d / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        total = state["v"] if self.initial_accumulator_value == 0 else state["v"] + h.initial_accumulator_value
        return root(total) + h.eps
