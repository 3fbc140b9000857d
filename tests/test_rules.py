"""What is particular to one rule, and so is no property of the whole table."""

import pytest
import torch

from hyperopt import SGD, Adan, AdaShift, Exponent, Hyper, SpikeAwareAdam, Unified, Yogi


@pytest.mark.parametrize(
    ("rule", "wrong", "remedy"),
    [
        (AdaShift, {"n": 0}, "integer of at least 1"),
        (AdaShift, {"n": 2.0}, "integer of at least 1"),
        (SpikeAwareAdam, {"decay_after": 0}, "None or a whole number of steps, at least 1"),
        (SpikeAwareAdam, {"decay_after": 0.5}, "None or a whole number of steps, at least 1"),
        (Yogi, {"v0": -1.0}, "at least 0"),
        (Yogi, {"beta1": 1.0, "bias_correction": True}, "bias_correction=False"),
        (Adan, {"beta3": 1.0}, "bias_correction=False"),
        (Exponent, {"eta": 0.0}, "above 0"),
        (Exponent, {"beta2": 1.0}, "bias_correction=False"),
        (Unified, {"eta": 0.0}, "above 0"),
        (Unified, {"beta1": 1.0}, "correction=0"),
    ],
)
def test_a_rule_without_meaning_is_refused_with_a_remedy(rule, wrong, remedy):
    with pytest.raises(ValueError, match=remedy):
        rule(**wrong)


@pytest.mark.parametrize("rule", [Exponent, Unified])
@pytest.mark.parametrize("eta", [0.5, 4.0])
def test_powers_are_finite_at_zero_and_where_they_overflow(rule, eta):
    """Weight decay makes the gradient depend on what is learned: |g|^(1/2) then has an infinite derivative at g = 0."""
    w = torch.nn.Parameter(torch.tensor([0.0, 1.0, 1.0]))
    learn = ("lr", "beta2", "eta", "weight_decay")
    optimizer = Hyper(rule(eta=eta, weight_decay=0.1), learn=learn, horizon=10).stack(SGD, lr=1e-3).bind([w])
    for _ in range(4):
        w.grad = torch.tensor([0.0, 1e-3, 1e20])
        optimizer.step()
    assert w[0] == 0
    assert w.isfinite().all()
    assert all(q.isfinite() for q in optimizer.hypergradients().values())
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}
