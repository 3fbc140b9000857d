"""Rules transcribed from their papers in the papers' letters, for where no optimizer written by others follows them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hyperopt import ADOPT, Adam, Exponent, Muon, Rule

Step = Callable[[Tensor, Tensor, dict[str, Any], int], Tensor]


class Paper(torch.optim.Optimizer):
    """An optimizer of one function: new weights from weights, gradient, what it keeps, and the number of the step."""

    def __init__(self, params: Iterable[Tensor], step: Step) -> None:
        super().__init__(params, {})
        self.one = step

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            kept = self.state[p]
            kept["t"] = kept.get("t", 0) + 1
            p.copy_(self.one(p, p.grad, kept, kept["t"]))


def adopt(params: Iterable[Tensor], rule: Rule) -> torch.optim.Optimizer:
    """Taniguchi et al. 2024, Algorithms 1 and 2, with decoupled weight decay."""
    assert isinstance(rule, ADOPT)

    def step(theta: Tensor, g: Tensor, kept: dict[str, Any], t: int) -> Tensor:
        if t == 1:
            kept["m"], kept["v"] = torch.zeros_like(g), g**2
            return theta
        n = g / kept["v"].sqrt().clamp(min=rule.eps)
        if rule.clipped:
            c = rule.clip * (t - 1) ** rule.clip_power
            n = n.clamp(-c, c)
        kept["m"] = rule.beta1 * kept["m"] + (1 - rule.beta1) * n
        kept["v"] = rule.beta2 * kept["v"] + (1 - rule.beta2) * g**2
        return theta - rule.lr * rule.weight_decay * theta - rule.lr * kept["m"]

    return Paper(params, step)


def exponent(params: Iterable[Tensor], rule: Rule) -> torch.optim.Optimizer:
    """The thesis's family, and Padam (Chen et al. 2018, Algorithm 1, eps as in the authors' code)."""
    assert isinstance(rule, Exponent)

    def step(x: Tensor, g: Tensor, kept: dict[str, Any], t: int) -> Tensor:
        if rule.weight_decay and not rule.decoupled:
            g = g + rule.weight_decay * x
        m = kept["m"] = rule.beta1 * kept.get("m", 0) + (1 - rule.beta1) * g
        v = kept["v"] = rule.beta2 * kept.get("v", 0) + (1 - rule.beta2) * g.abs() ** rule.eta
        if rule.bias_correction:
            m, v = m / (1 - rule.beta1**t), v / (1 - rule.beta2**t)
        if rule.running_max:
            v = kept["v_max"] = torch.maximum(v, kept.get("v_max", v))
        if rule.decoupled:
            x = x - rule.lr * rule.weight_decay * x
        return x - rule.lr * m / (v ** (1 / rule.eta) + rule.eps) ** (2 * rule.p)

    return Paper(params, step)


def cautious_adamw(params: Iterable[Tensor], rule: Rule) -> torch.optim.Optimizer:
    """Chen et al. 2025, Algorithm 1 over Adam."""
    assert isinstance(rule, Adam)

    def step(x: Tensor, g: Tensor, kept: dict[str, Any], t: int) -> Tensor:
        m = kept["m"] = rule.beta1 * kept.get("m", 0) + (1 - rule.beta1) * g
        v = kept["v"] = rule.beta2 * kept.get("v", 0) + (1 - rule.beta2) * g**2
        u = (m / (1 - rule.beta1**t)) / ((v / (1 - rule.beta2**t)).sqrt() + rule.eps)
        return x - rule.lr * (u + rule.weight_decay * (u * x >= 0) * x)

    return Paper(params, step)


def muon(params: Iterable[Tensor], rule: Rule) -> torch.optim.Optimizer:
    """Jordan et al. 2024 with the scale and weight decay of Liu et al. 2025; what becomes of singular values by an SVD, not by products."""
    assert isinstance(rule, Muon)
    a, b, c = rule.ns_coefficients

    def step(w: Tensor, g: Tensor, kept: dict[str, Any], t: int) -> Tensor:
        mu = rule.momentum
        kept["m"] = mu * kept.get("m", torch.zeros_like(g)) + (1 - mu) * g
        n = mu * kept["m"] + (1 - mu) * g if rule.nesterov else kept["m"]
        matrix = n.flatten(1) if n.dim() > 1 else n[:, None]
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm().clamp(min=1e-7)
        for _ in range(rule.ns_steps):
            s = a * s + b * s**3 + c * s**5
        d = 0.2 * max(matrix.shape) ** 0.5 * (u * s @ vt).reshape(n.shape)
        return w - rule.lr * d - rule.lr * rule.weight_decay * w

    return Paper(params, step)
