"""The table of rules: a new rule is one row here, and every property in tests/ then holds for it or the row says why not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import papers
import pytorch_optimizer
import torch
from torch import Tensor

from hyperopt import (
    ADOPT,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Adan,
    AdaShift,
    Exponent,
    Lion,
    Muon,
    NAdam,
    Padam,
    RAdam,
    RMSprop,
    Rule,
    SpikeAwareAdam,
    Unified,
    Yogi,
)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        name: the id of its tests.
        rule: with a value strictly inside its domain for everything in `learnable`, and none that is a default for lr
            (above level 0 a rule has other defaults).
        learnable: the hyperparameters that are learned, together and one by one.
        torch: makes torch's optimizer with the values of the rule it is given, or pytorch-optimizer's, or None.
        reason: why `torch` is None or not theirs, a hyperparameter is missing in `learnable`, or one is in `late`.
        late: the hyperparameters that the weights see a step late, so that their hypergradient is 0 at horizon 1.
        steps: how many steps it takes until every hyperparameter has been at work.
        float32: whether the comparison with `torch` holds in float32 too.
    """

    name: str
    rule: Rule
    learnable: tuple[str, ...]
    torch: Callable[[Iterable[Tensor], Rule], torch.optim.Optimizer] | None
    reason: str = ""
    late: tuple[str, ...] = ()
    steps: int = 7
    float32: bool = True

    def peer(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """torch's own optimizer with the same values."""
        assert self.torch is not None, self.reason
        return self.torch(params, self.rule)


def torch_peer(params: Iterable[Tensor], rule: Rule) -> torch.optim.Optimizer:
    """torch's optimizer of the rule's name, with the rule's values and options under torch's names."""
    values = {f.name: getattr(rule, f.name) for f in fields(rule) if f.name != "bias_correction"}
    if "beta1" in values:
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    assert not values.pop("cautious", False)
    if "decoupled" in values:
        values["decoupled_weight_decay"] = values.pop("decoupled")
    return getattr(torch.optim, type(rule).__name__)(params, **values)


def torch_adamw(params: Iterable[Tensor], rule: Adam) -> torch.optim.Optimizer:
    betas = (rule.beta1, rule.beta2)
    return torch.optim.AdamW(params, lr=rule.lr, betas=betas, eps=rule.eps, weight_decay=rule.weight_decay, amsgrad=rule.amsgrad)


class _Clipping(torch.optim.Adam):
    """torch's Adam after coupled weight decay was added by hand and gradients were clipped by hand, with an lr that may decay."""

    clip: float
    coupled: float
    decay_after: int | None
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            if self.decay_after is not None:
                group["lr"] = self.defaults["lr"] * min(1.0, self.decay_after / self.steps)
            for p in group["params"]:
                p.grad = p.grad + self.coupled * p.detach()
                if state := self.state.get(p):
                    v = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
                    p.grad = torch.where(v > 0, p.grad.clamp(-self.clip * v.sqrt(), self.clip * v.sqrt()), p.grad)
        return super().step(closure)


def peer_spike_aware(params: Iterable[Tensor], rule: SpikeAwareAdam) -> torch.optim.Optimizer:
    betas, decay = (rule.beta1, rule.beta2), rule.weight_decay
    peer = _Clipping(params, lr=rule.lr, betas=betas, eps=rule.eps, weight_decay=decay * rule.decoupled, decoupled_weight_decay=True)
    peer.clip, peer.coupled, peer.decay_after = rule.clip, decay * (not rule.decoupled), rule.decay_after
    return peer


def peer_adopt(params: Iterable[Tensor], rule: ADOPT) -> torch.optim.Optimizer:
    # The peer counts the call that only sets v, so that its c_t begins at t = 2.
    clip = (lambda t: rule.clip * (t - 1) ** rule.clip_power) if rule.clipped else None
    return pytorch_optimizer.ADOPT(params, lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, clip_lambda=clip)


def peer_adashift(params: Iterable[Tensor], rule: AdaShift) -> torch.optim.Optimizer:
    betas = rule.beta1, rule.beta2
    return pytorch_optimizer.AdaShift(params, lr=rule.lr, betas=betas, keep_num=rule.n, reduce_func=None, eps=rule.eps)


def peer_lion(params: Iterable[Tensor], rule: Lion) -> torch.optim.Optimizer:
    return pytorch_optimizer.Lion(params, lr=rule.lr, betas=(rule.beta1, rule.beta2), weight_decay=rule.weight_decay)


def peer_yogi(params: Iterable[Tensor], rule: Yogi) -> torch.optim.Optimizer:
    # The peer corrects the bias, which the paper does not, and starts m at v0 too.
    assert rule.bias_correction
    assert rule.v0 == 0
    return pytorch_optimizer.Yogi(params, lr=rule.lr, betas=(rule.beta1, rule.beta2), initial_accumulator=0.0, eps=rule.eps)


def peer_adan(params: Iterable[Tensor], rule: Adan) -> torch.optim.Optimizer:
    betas = rule.beta1, rule.beta2, rule.beta3
    return pytorch_optimizer.Adan(params, lr=rule.lr, betas=betas, weight_decay=rule.weight_decay, weight_decouple=True, eps=rule.eps)


def torch_adamw_of_unified(params: Iterable[Tensor], rule: Unified) -> torch.optim.Optimizer:
    share, betas = 1 - rule.damping, (rule.beta1, rule.beta2)
    return torch.optim.AdamW(params, lr=rule.lr / share, betas=betas, eps=rule.damping / share, weight_decay=rule.weight_decay * share)


ADAM = ("lr", "beta1", "beta2", "eps")
RMSPROP = ("lr", "alpha", "eps", "momentum")
NADAM = (*ADAM, "weight_decay", "momentum_decay")

CASES = (
    Case("sgd", SGD(lr=0.2), ("lr",), torch_peer, "momentum, dampening and weight_decay are 0, on the boundary"),
    Case("sgd-momentum", SGD(lr=0.1, momentum=0.8), ("lr", "momentum"), torch_peer, "dampening and weight_decay are 0, on the boundary"),
    Case("sgd-nesterov", SGD(lr=0.1, momentum=0.8, nesterov=True), ("lr", "momentum"), torch_peer, "nesterov goes without dampening"),
    Case("sgd-decay", SGD(lr=0.2, weight_decay=0.05), ("lr", "weight_decay"), torch_peer, "momentum and dampening are 0, on the boundary"),
    Case(
        "sgd-everything",
        SGD(lr=0.1, momentum=0.7, weight_decay=0.05, nesterov=True),
        ("lr", "momentum", "weight_decay"),
        torch_peer,
        "nesterov goes without dampening",
    ),
    Case("sgd-dampening", SGD(lr=0.2, momentum=0.8, dampening=0.3), ("lr", "momentum", "dampening"), torch_peer, "weight_decay is 0"),
    Case("adagrad", Adagrad(lr=0.05), ("lr",), torch_peer, "the others are 0, or eps = 1e-10 and too small for a finite difference"),
    Case(
        "adagrad-everything",
        Adagrad(lr=0.05, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.1, eps=0.01),
        ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        torch_peer,
    ),
    Case("rmsprop", RMSprop(lr=0.001), ("lr", "alpha"), torch_peer, "eps = 1e-8 is too small for a finite difference, the others are 0"),
    Case("rmsprop-momentum", RMSprop(lr=0.005, alpha=0.9, eps=0.01, momentum=0.5), RMSPROP, torch_peer, "weight_decay is 0"),
    Case(
        "rmsprop-everything",
        RMSprop(lr=0.005, alpha=0.9, eps=0.01, weight_decay=0.05, momentum=0.5, centered=True),
        (*RMSPROP, "weight_decay"),
        torch_peer,
    ),
    Case("adadelta", Adadelta(lr=0.5, eps=1e-4), ("lr", "rho", "eps"), torch_peer, "weight_decay is 0, on the boundary"),
    Case("adadelta-decay", Adadelta(lr=0.5, eps=1e-4, weight_decay=0.05), ("lr", "rho", "eps", "weight_decay"), torch_peer),
    Case("adam", Adam(lr=0.01), ("lr", "beta1", "beta2"), torch_peer, "eps = 1e-8 moves weights by less than a finite difference resolves"),
    Case("adam-eps", Adam(lr=0.02, beta1=0.8, beta2=0.9, eps=0.01), ADAM, torch_peer, "weight_decay is 0, on the boundary"),
    Case("adam-decay", Adam(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.05), (*ADAM, "weight_decay"), torch_peer),
    Case("adamw", AdamW(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.5), (*ADAM, "weight_decay"), torch_adamw),
    Case(
        "adamw-cautious",
        AdamW(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.5, cautious=True),
        (*ADAM, "weight_decay"),
        papers.cautious_adamw,
        "torch has no cautious weight decay",
    ),
    Case("adamw-amsgrad", AdamW(lr=0.02, beta2=0.9, eps=0.01, weight_decay=0.5, amsgrad=True), (*ADAM, "weight_decay"), torch_adamw),
    Case(
        "spike-aware-adam",
        SpikeAwareAdam(lr=0.02, beta2=0.9, eps=0.01, weight_decay=0.5, decoupled=True, clip=0.8),
        (*ADAM, "weight_decay", "clip"),
        peer_spike_aware,
    ),
    Case(
        "spike-aware-adam-slowed",
        SpikeAwareAdam(lr=0.02, beta2=0.9, eps=0.01, weight_decay=0.5, clip=0.8, decay_after=3),
        (*ADAM, "weight_decay", "clip"),
        peer_spike_aware,
    ),
    Case(
        "spike-aware-adam-decay",
        SpikeAwareAdam(lr=0.02, beta2=0.9, eps=0.01, weight_decay=0.5, clip=0.8),
        (*ADAM, "weight_decay", "clip"),
        peer_spike_aware,
    ),
    Case("nadam-decay", NAdam(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.05, momentum_decay=0.1), NADAM, torch_peer),
    Case("nadam-decoupled", NAdam(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.5, momentum_decay=0.1, decoupled=True), NADAM, torch_peer),
    Case("radam-decay", RAdam(lr=0.08, eps=0.01, weight_decay=0.05), (*ADAM, "weight_decay"), torch_peer, steps=9),
    Case(
        "radam-decoupled",
        RAdam(lr=0.02, beta2=0.99, eps=0.01, weight_decay=0.5, decoupled=True),
        (*ADAM, "weight_decay"),
        torch_peer,
        steps=9,
    ),
    Case("adamax", Adamax(lr=0.05, beta2=0.7, eps=0.15), ADAM, torch_peer, "weight_decay is 0, on the boundary"),
    Case("adamax-decay", Adamax(lr=0.05, beta2=0.6, eps=0.05, weight_decay=0.05), (*ADAM, "weight_decay"), torch_peer),
    Case(
        "adam-uncorrected",
        Adam(lr=0.02, beta2=0.99, eps=0.01, bias_correction=False),
        ADAM,
        None,
        "torch.optim has no Adam without bias correction",
    ),
    Case(
        "adopt",
        ADOPT(lr=0.02, beta2=0.9, eps=0.01, clipped=False),
        ("lr", "beta1", "beta2"),
        peer_adopt,
        "beta2 acts through the v of the step before; eps is not at work, there is no clip, and weight_decay is 0, on the boundary",
        late=("beta2",),
    ),
    Case(
        "adopt-clipped",
        ADOPT(lr=2.0, beta2=0.9, clip=1e-3, clip_power=0.5),
        ("lr", "beta1", "clip", "clip_power"),
        peer_adopt,
        "every n is clipped: nothing depends on beta2 and eps, and in float32 rounding turns the sign of an n; weight_decay is 0",
        float32=False,
    ),
    Case(
        "adopt-decay",
        ADOPT(lr=2.0, beta2=0.9, eps=10.0, weight_decay=0.01, clip=5.0),
        ("lr", "beta1", "eps", "weight_decay"),
        papers.adopt,
        "eps is larger than every root of v, so that nothing depends on beta2 and no n is clipped; the peer decays at the first call too",
    ),
    Case("adashift", AdaShift(lr=0.1, beta2=0.9, eps=0.2, n=2), ADAM, peer_adashift, steps=10),
    Case(
        "lion",
        Lion(lr=0.01, weight_decay=0.1),
        ("lr", "weight_decay"),
        peer_lion,
        "a sign has no derivative with respect to beta1 and beta2; eps is 0, on the boundary",
    ),
    Case(
        "lion-soft",
        Lion(lr=0.02, beta2=0.9, eps=0.05),
        ADAM,
        None,
        "eps is ours; beta2 acts through the m of the step before; weight_decay is 0, on the boundary",
        late=("beta2",),
    ),
    Case(
        "muon",
        Muon(lr=0.02, momentum=0.8, weight_decay=0.5),
        ("lr", "momentum", "weight_decay"),
        papers.muon,
        "torch's takes matrices alone, in bfloat16: tests/test_muon.py; in float32 the rounding of small singular values grows",
        float32=False,
    ),
    Case(
        "yogi",
        Yogi(lr=0.02, eps=0.01, bias_correction=True),
        ADAM,
        peer_yogi,
    ),
    Case(
        "adan",
        Adan(lr=0.02, beta1=0.9, beta2=0.8, beta3=0.95, eps=0.01, weight_decay=0.5),
        ("lr", "beta1", "beta2", "beta3", "eps", "weight_decay"),
        peer_adan,
    ),
    Case(
        "exponent",
        Exponent(lr=0.01, beta2=0.9, eps=0.01, eta=3.0, p=0.4, weight_decay=0.1, decoupled=True),
        (*ADAM, "eta", "p", "weight_decay"),
        papers.exponent,
        "no package has the family",
    ),
    Case(
        "padam",
        Padam(lr=0.03, beta2=0.98, eps=0.01, p=0.2),
        (*ADAM, "eta", "p"),
        papers.exponent,
        "the peer leaves out the running maximum and corrects the bias, neither as the paper; weight_decay is 0, on the boundary",
    ),
    Case(
        "unified-adamw",
        Unified(lr=0.02, beta2=0.99, damping=0.01, weight_decay=0.5, decoupled=True),
        (*ADAM[:3], "damping", "eta", "weight_decay"),
        torch_adamw_of_unified,
        "the other coefficients are at a corner",
    ),
    Case(
        "unified",
        Unified(lr=0.02, beta2=0.9, damping=1e-3, eta=1.5, nesterov=0.4, adopt=0.3, correction=0.6),
        (*ADAM[:3], "damping", "eta", "nesterov", "adopt", "correction"),
        None,
        "nobody else has it, tests/test_inclusion.py compares its corners; amsgrad and weight_decay are 0, on the boundary",
    ),
    Case(
        "unified-amsgrad",
        Unified(lr=0.02, beta2=0.5, damping=0.1, eta=1.5, nesterov=0.4, amsgrad=0.5, correction=0.6),
        (*ADAM[:2], "damping", "nesterov", "amsgrad", "correction"),
        None,
        "as above; where v passes its maximum a finite difference with respect to what v depends on, beta2 and eta, means nothing",
        steps=12,
    ),
)
