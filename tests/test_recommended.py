"""The optimizer in one call is the tower that it says it is, with every value a user may give."""

import pytest
import torch
from small import net, train

from hyperopt import Adam, Hyper, ScheduleFree, auto


@pytest.mark.parametrize("lr", [None, 1e-6])
@pytest.mark.parametrize("given", ["module", "parameters", "groups"])
def test_it_trains_as_the_tower_does(given, lr):
    model, twin = net(), net()
    params = {"module": model, "parameters": model.parameters(), "groups": [{"params": model.parameters()}]}[given]
    values = {} if lr is None else {"lr": lr}
    optimizer, other = auto(params, lr=lr), Hyper(ScheduleFree(Adam), **values).stack(Adam).bind(twin.parameters())
    train(model, optimizer, range(8))
    train(twin, other, range(8))
    assert float(optimizer.hyperparameters()["0.lr"]) != (lr or 1e-3)
    with optimizer.averaged(), other.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_compile_is_handed_on():
    assert auto(net(), compile=True).compile
    assert not auto(net()).compile


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [(-1.0, ValueError, "give at least 0"), (0.0, ValueError, "start strictly inside"), ("fast", TypeError, "must be a number")],
)
def test_an_lr_that_is_none_is_refused(lr, error, message):
    with pytest.raises(error, match=message):
        auto(net(), lr=lr)
