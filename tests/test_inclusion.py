"""More general rules contain the special ones (Choi et al. 2019): at a corner, or in a limit, of their hyperparameters."""

import pytest
import torch

from hyperopt import ADOPT, SGD, Adam, Exponent, Hyper, NAdam, RMSprop, Unified

STEPS = 50


def path(rule, schedule=None, steps=STEPS):
    """The weights after each step of a quadratic with noise; `schedule` multiplies lr at each step."""
    noise = torch.Generator().manual_seed(1)
    curvature = torch.linspace(0.1, 3, 20, dtype=torch.float64)
    w = torch.nn.Parameter(torch.linspace(-1, 1, 20, dtype=torch.float64))
    optimizer = Hyper(rule).bind([w])
    out = []
    for t in range(1, steps + 1):
        if schedule:
            optimizer.param_groups[0]["lr"] = rule.lr * schedule(t)
        w.grad = curvature * w.detach() + 0.3 * torch.randn(20, generator=noise, dtype=torch.float64)
        optimizer.step()
        out.append(w.detach().clone())
    return torch.stack(out)


def same(general, special, schedule=None):
    a, b = path(general, schedule), path(special)
    start = torch.linspace(-1, 1, 20, dtype=torch.float64)
    assert (b[-1] - start).norm() > 0.1 * start.norm(), "too little moved for the comparison to mean anything"
    assert (a - b).norm() <= 1e-6 * b.norm()


def test_sgd_is_momentum_0():
    same(SGD(lr=0.05, momentum=1e-12), SGD(lr=0.05))


def test_momentum_is_the_limit_of_adam():
    """eps → ∞ with lr·eps held: x = x − (lr/eps)·m̂, and m̂ = (1 − beta1)/(1 − beta1^t)·b is corrected back."""
    eps, beta1, lr = 1e7, 0.9, 0.02
    adam = Adam(lr=lr * eps / (1 - beta1), beta1=beta1, eps=eps)
    same(adam, SGD(lr=lr, momentum=beta1), schedule=lambda t: 1 - beta1**t)


def test_nesterov_is_the_limit_of_nadam():
    """The same, with a momentum that does not warm up (momentum_decay → ∞), once the bias correction has died out and is forgotten.

    NAdam corrects its two terms by different products, so that no schedule of lr undoes it from the first step on.
    """
    eps, mu, lr, steps = 1e7, 0.9, 0.02, 1500
    nadam = path(NAdam(lr=lr * eps / (1 - mu), beta1=mu, eps=eps, momentum_decay=1e4), steps=steps)
    nesterov = path(SGD(lr=lr, momentum=mu, nesterov=True), steps=steps)
    heavy_ball = path(SGD(lr=lr, momentum=mu), steps=steps)
    late = slice(-STEPS, None)
    assert (nadam - nesterov)[late].norm() <= 1e-6 * nesterov[late].norm()
    assert (heavy_ball - nesterov)[late].norm() > 0.1 * nesterov[late].norm()


@pytest.mark.parametrize("bias_correction", [True, False])
def test_adam_is_exponent_2(bias_correction):
    options = {"lr": 0.03, "beta2": 0.98, "eps": 1e-3, "bias_correction": bias_correction}
    same(Exponent(eta=2.0, **options), Adam(**options))
    same(Exponent(eta=2.0, weight_decay=0.1, **options), Adam(weight_decay=0.1, **options))
    same(Exponent(eta=2.0, weight_decay=0.1, decoupled=True, **options), Adam(weight_decay=0.1, decoupled=True, **options))


def test_amsgrad_is_exponent_2_with_the_running_max():
    options = {"lr": 0.03, "beta2": 0.5, "eps": 1e-3, "bias_correction": False}
    same(Exponent(eta=2.0, running_max=True, **options), Adam(amsgrad=True, **options))


def test_momentum_is_padam_0():
    same(Exponent(lr=0.2, p=1e-12, bias_correction=False), SGD(lr=0.02, momentum=0.9))


EPS = 0.01
SHARE = 1 / (1 + EPS)  # 1 − damping, and the factor of lr
DAMPED = {"damping": EPS / (1 + EPS)}
PLAIN = {"correction": 0.0}
LOOK = {"beta1": 0.9, "nesterov": 1.0}
CORNERS = {
    "sgd": (SGD(lr=0.05), Unified(lr=0.05, beta1=0.0, damping=1.0, **PLAIN)),
    "heavy ball": (SGD(lr=0.02, momentum=0.9), Unified(lr=0.2, beta1=0.9, damping=1.0, **PLAIN)),
    "nesterov": (SGD(lr=0.02, momentum=0.9, nesterov=True), Unified(lr=0.2, damping=1.0, **LOOK, **PLAIN)),
    "rmsprop": (RMSprop(lr=0.02, alpha=0.9, eps=EPS), Unified(lr=0.02 * SHARE, beta1=0.0, beta2=0.9, **DAMPED, **PLAIN)),
    "adam": (Adam(lr=0.03, eps=EPS), Unified(lr=0.03 * SHARE, **DAMPED)),
    "adam-uncorrected": (Adam(lr=0.03, eps=EPS, bias_correction=False), Unified(lr=0.03 * SHARE, **DAMPED, **PLAIN)),
    "adam-decay": (
        Adam(lr=0.03, eps=EPS, weight_decay=0.1),
        Unified(lr=0.03 * SHARE, weight_decay=0.1, **DAMPED),
    ),
    "amsgrad": (Adam(lr=0.03, beta2=0.5, eps=EPS, amsgrad=True), Unified(lr=0.03 * SHARE, beta2=0.5, amsgrad=1.0, **DAMPED)),
    "adopt": (
        ADOPT(lr=0.03, beta2=0.9, eps=EPS, clipped=False),
        Unified(lr=0.03 * SHARE, beta2=0.9, adopt=1.0, **DAMPED, **PLAIN),
    ),
    "exponent": (Exponent(lr=0.03, beta2=0.9, eps=EPS, eta=4.0), Unified(lr=0.03 * SHARE, beta2=0.9, eta=4.0, **DAMPED)),
}


@pytest.mark.parametrize(("special", "corner"), CORNERS.values(), ids=CORNERS)
def test_corners_of_unified(special, corner):
    same(corner, special)


CONTINUOUS = ("beta1", "damping", "eta", "nesterov", "amsgrad", "adopt", "correction")


@pytest.mark.parametrize("name", CONTINUOUS)
def test_unified_reaches_its_corners_continuously(name):
    """Where a coefficient goes to its boundary, from where the code has another branch, the weights go where the boundary has them."""
    inside = {"beta1": 0.5, "damping": 0.1, "eta": 1.5, "nesterov": 0.4, "amsgrad": 0.5, "adopt": 0.3, "correction": 0.6}
    for end, near in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        if (name, end) in {("beta1", 1.0), ("eta", 0.0)}:
            continue  # not a corner
        rules = [Unified(**{"lr": 0.03, "beta2": 0.9, **inside, name: value}) for value in (end, near)]
        same(*rules)


def test_unified_moves_between_its_corners():
    """Halfway between two rules is neither of them: no coefficient is idle."""
    inside = {"beta1": 0.5, "damping": 0.1, "eta": 1.5, "nesterov": 0.4, "amsgrad": 0.5, "adopt": 0.3, "correction": 0.6}
    middle = path(Unified(lr=0.03, beta2=0.9, **inside))
    for name in CONTINUOUS:
        other = path(Unified(**{"lr": 0.03, "beta2": 0.9, **inside, name: inside[name] + 0.1}))
        assert (middle - other).norm() > 1e-4 * middle.norm(), name


@pytest.mark.parametrize("adopt", [0.0, 0.3, 1.0])
def test_bias_correction_of_unified_is_exact(adopt):
    """Under a gradient that never changes every step is lr, as if the averages had been there for ever; the first is lr·(1 − adopt)."""
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Hyper(Unified(lr=0.1, beta1=0.0, beta2=0.9, damping=0.0, eta=1.5, adopt=adopt)).bind([w])
    for t in range(STEPS):
        w.grad = torch.tensor([1e-3, 1.0, -1e3], dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(w.data, -0.1 * (t + 1 - adopt) * w.grad.sign(), rtol=1e-9, atol=1e-15)
