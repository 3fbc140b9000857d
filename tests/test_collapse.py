"""A learning rate that overshot comes back: it neither falls for ever nor stands still there."""

import pytest
import torch
from torch import nn

from hyperopt import Hyper

PLAIN = {"Adam": 0.01, "SGD(momentum=0.9)": 0.1, "ScheduleFree(Adam)": 0.01}  # rule -> an lr that is good here


def regression(tower, lr, steps):
    """The mean loss of the last 20 steps, and the last lr."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = Hyper.parse(tower).replace(lr=lr).bind(model.parameters())
    batches, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        x = torch.randn(32, 4, generator=batches)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses[-20:]).mean().item(), optimizer.hyperparameters()["0.lr"].item()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("lr", [1e-6, 1e-3])
@pytest.mark.parametrize("rule", PLAIN)
def test_a_far_too_small_lr_climbs_overshoots_and_settles(rule, lr):
    loss, learned = regression(f"{rule} / Adam", lr, steps=1200)
    good, _ = regression(rule, PLAIN[rule], steps=1200)
    assert learned > PLAIN[rule] / 20
    assert loss < 2 * good


def test_learning_beta1_beside_lr_does_not_run_away():
    loss, learned = regression("Adam(learn=(lr, beta1)) / Adam", 1e-3, steps=600)
    good, _ = regression("Adam", 0.01, steps=600)
    assert learned > 1e-3
    assert loss < 4 * good


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_learning_both_betas_beside_lr_does_not_run_away(lr):
    # Without `guards.Pace` the loss from 1e-5 is 400 times as large, with lr at 1e-7.
    loss, learned = regression("Adam(learn=(lr, beta1, beta2)) / Adam", lr, steps=600)
    good, _ = regression("Adam", 0.01, steps=600)
    assert learned > 1e-3
    assert loss < 1.5 * good
