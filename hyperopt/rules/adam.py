"""Adam and AdamW."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..domains import Positive, UnitInterval
from ..rule import Kernel, Native, Rule, State, Values, Variant, hyper, root, square

_fused = torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]
_native = Native(Path(__file__).with_suffix(".cpp"), state=("m", "v"), complements=("beta1", "beta2"), values=("eps", "weight_decay"))


@dataclass(frozen=True)
class Adam(Rule):
    """Adaptive moments, with coupled or decoupled weight decay and AMSGrad, as `torch.optim.Adam` and `AdamW`.

        g = g + weight_decay·x              (decoupled: x = x − lr·weight_decay·x instead)
        m = beta1·m + (1 − beta1)·g
        v = beta2·v + (1 − beta2)·g²
        v_max = max(v_max, v)               (amsgrad alone, and v_max in place of v below)
        x = x − lr·m̂ / (√v̂ + eps),          m̂ = m / (1 − beta1^t),  v̂ = v / (1 − beta2^t)

    Args:
        lr: step size, default 1e-3 (above level 0: 0.1, in raw space).
        beta1, beta2: decays of the moments, in [0, 1), default 0.9 and 0.999.
        eps: added to the root after the correction, where torch has it, default 1e-8.
        weight_decay: at least 0, default 0.
        decoupled: decay the weights themselves (AdamW) instead of adding to the gradient.
        amsgrad: divide by the largest second moment so far, before its correction, as torch does.
        bias_correction: divide the moments by 1 − beta^t; without it m̂ = m and v̂ = v.

    Raises:
        ValueError: a value outside its domain, or a beta of 1 with bias correction.

    Source: Kingma and Ba 2015 (arXiv 1412.6980); Loshchilov and Hutter 2019 (arXiv 1711.05101); Reddi, Kale and Kumar 2018
    (arXiv 1904.09237) for AMSGrad; torch.optim.Adam.

    >>> from hyperopt import SGD, Adam, Hyper
    >>> Hyper(Adam, lr=3e-3).stack(SGD)
    Hyper('Adam(lr=0.003) / SGD')
    """

    lr: float = hyper(1e-3, Positive(), above=0.1)
    beta1: float = hyper(0.9, UnitInterval())
    beta2: float = hyper(0.999, UnitInterval())
    eps: float = hyper(1e-8, Positive())
    weight_decay: float = hyper(0.0, Positive())
    decoupled: bool = False
    amsgrad: bool = False
    bias_correction: bool = True
    first_moment: ClassVar[tuple[str, ...]] = ("beta1",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias_correction and 1 in (self.beta1, self.beta2):
            raise ValueError("Adam(beta1 or beta2 = 1) divides by 1 - beta^t = 0: give a beta below 1, or bias_correction=False")

    def init(self, x: Tensor) -> State:
        names = ["v"] + ["m"] * (self.beta1 != 0) + ["v_max"] * self.amsgrad
        return {name: x.new_zeros(x.shape) for name in names}

    def update(self, x: Tensor, g: Tensor, state: State, h: Values, t: Tensor) -> tuple[Tensor, State]:
        if self.weight_decay != 0 and not self.decoupled:
            g = g + h.weight_decay * x
        v = torch.lerp(state["v"], square(g), h.one_minus("beta2"))
        m, new, step = g, {"v": v}, h.lr
        if self.amsgrad:
            new["v_max"] = torch.maximum(state["v_max"], v)
        if self.bias_correction:
            # m̂ / (√v̂ + eps) with both corrections moved to the scalars: one pass over the weights less.
            step = step * h.one_minus_power("beta2", t).sqrt()
        if self.beta1 != 0:
            m = new["m"] = torch.lerp(state["m"], g, h.one_minus("beta1"))
            step = step / h.one_minus_power("beta1", t) if self.bias_correction else step
        if self.decoupled and self.weight_decay != 0:
            x = x * self.shrink(h)
        return x - step * m / self.metric(new, h, t), new

    def metric(self, state: State, h: Values, t: Tensor) -> Tensor:
        eps = h.eps * h.one_minus_power("beta2", t).sqrt() if self.bias_correction else h.eps
        return root(state["v_max" if self.amsgrad else "v"]) + eps

    def kernel(self, h: Mapping[str, float]) -> Kernel | None:
        if not self._textbook() or not h["eps"]:
            return None  # with eps = 0, torch's 0/0 is NaN and `root` makes it 0
        options = {"beta1": h["beta1"], "beta2": h["beta2"], "eps": h["eps"], "weight_decay": 0.0, "amsgrad": False, "maximize": False}

        def adam(move: Tensor, g: Tensor, state: State, t: Tensor, skip: Tensor) -> None:
            _fused([move], [g], [state["m"]], [state["v"]], [], [t.float()], lr=1.0, **options, found_inf=skip.float())
            state["v"].clamp_max_(torch.finfo(g.dtype).max)  # as `square` does

        return adam

    def native(self) -> Native | None:
        return _native if self._textbook() else None

    def _textbook(self) -> bool:
        coupled = self.weight_decay != 0 and not self.decoupled
        return not coupled and not self.amsgrad and self.bias_correction and self.beta1 != 0

    def linear_in_lr(self) -> bool:
        return self.decoupled or self.weight_decay == 0

    def shrink(self, h: Values) -> Tensor | float:
        return 1 - h.lr * h.weight_decay if self.decoupled and self.weight_decay != 0 else 1.0


AdamW = Variant(Adam, weight_decay=1e-2, decoupled=True)
