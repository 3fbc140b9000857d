"""Learning hyperparameters from held-out data: what the levels above are told, and what is left alone."""

import copy
import math

import pytest
import torch
from small import differences, loss_at, net, snapshot, train

from hyperopt import SGD, Adam, Averaged, Hyper, ScheduleFree

TOWERS = {
    "displacement": Hyper(Adam, lr=0.01).stack(Adam),
    # What is learned beside lr has a prior, but not where it is learned from a held-out loss.
    "tangents": Hyper(Adam, lr=0.01, eps=1e-3, learn=("lr", "beta1", "eps"), prior=None).stack(SGD, lr=0.1),
    "tree": Hyper(SGD, lr=0.05, momentum=0.5, prior=None).stack(lr=Adam, momentum=SGD),
    "ascent": Hyper(SGD, lr=0.05, maximize=True).stack(Adam),
    "per tensor": Hyper(Adam, lr=0.01, per="tensor").stack(Adam),
}


@pytest.mark.parametrize("name", TOWERS)
def test_held_out_data_that_are_the_training_data_change_nothing(name):
    def run(held_out):
        model = net(torch.float64)
        optimizer = TOWERS[name].bind(model.parameters())
        for step in range(6):
            if held_out:
                optimizer.hyper_backward(loss_at(model, step))
            train(model, optimizer, range(step, step + 1))
        return optimizer.hyperparameters()

    with_it, without = run(True), run(False)
    assert with_it["0.lr"].ne(float(TOWERS[name].rule.value("lr"))).all()
    for key, value in without.items():
        torch.testing.assert_close(with_it[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", [Averaged(Adam, decay=0.8), Averaged(SGD, decay=0.8), ScheduleFree(Adam)], ids=lambda r: str(r)[:14])
@pytest.mark.parametrize("at", ["weights", "average"])
def test_the_hypergradient_is_the_derivative_of_the_held_out_loss(rule, at):
    """At horizon inf, with gradients held: against central differences of the whole run, in every learned hyperparameter."""
    base = Hyper(rule, horizon=math.inf, trust=None).replace(lr=0.02)
    names = ("lr", "decay") if "decay" in base.rule.declared() else ("lr", "beta1")
    tower = Hyper(base.rule, learn=names, horizon=math.inf, trust=None).stack(SGD, lr=1e-30)
    model, held = net(torch.float64), []
    optimizer = tower.bind(model.parameters())
    for step in range(5):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        held.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()

    def evaluate(model, optimizer):
        if at == "average":
            with optimizer.averaged():
                return float(loss_at(model, 100).detach())
        return float(loss_at(model, 100).detach())

    with optimizer.averaged() if at == "average" else torch.enable_grad():
        optimizer.hyper_backward(loss_at(model, 100))
    train(model, optimizer, range(5, 6))
    found = optimizer.hypergradients()

    def loss_after(name, shift):
        domain = tower.rule.declared()[name].domain
        raw = domain.raw(torch.tensor(tower.rule.value(name), dtype=torch.float64)) + shift
        twin = net(torch.float64)
        run = base.replace(**{name: float(domain.value(raw))}).bind(twin.parameters())
        for grads in held:
            for p, g in zip(twin.parameters(), grads, strict=True):
                p.grad = g.clone()
            run.step()
        return evaluate(twin, run)

    eps = 1e-5
    for name in names:
        expected = (loss_after(name, eps) - loss_after(name, -eps)) / (2 * eps)
        assert float(found[f"0.{name}"]) == pytest.approx(expected, rel=1e-6, abs=1e-10), name
        # Weights never see the average, nor the average of Schedule-Free the interpolation.
        assert (abs(expected) < 1e-10) == ((name, at) in (("decay", "weights"), ("beta1", "average")))


def test_parameters_gradients_and_state_are_left_alone_and_calls_add_up():
    model = net(torch.float64)
    optimizer = Hyper(Adam, lr=0.01).stack(SGD, lr=1.0).bind(model.parameters())
    train(model, optimizer, range(3))
    before, twin = snapshot(model, optimizer), copy.deepcopy((model, optimizer))
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.hyper_backward(loss_at(model, 50))
    optimizer.hyper_backward(loss_at(model, 51))
    after = snapshot(model, optimizer)
    held_out = [group["tower"].pop("held_out") for group in after["groups"]]
    assert differences(before, after) == []
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    twin[1].hyper_backward(loss_at(twin[0], 50) + loss_at(twin[0], 51))
    torch.testing.assert_close(held_out[0]["lr"], twin[1].param_groups[0]["tower"]["held_out"]["lr"])


def test_with_a_long_hyper_every_only_held_out_data_teach():
    model = net()
    optimizer = Hyper(Adam, lr=0.01, trust=None).stack(Adam).bind(model.parameters(), hyper_every=10**9)
    train(model, optimizer, range(5))
    assert float(optimizer.hyperparameters()["0.lr"]) == pytest.approx(0.01)
    optimizer.hyper_backward(loss_at(model, 50))
    train(model, optimizer, range(5, 6))
    assert float(optimizer.hyperparameters()["0.lr"]) != pytest.approx(0.01)
    learned = float(optimizer.hyperparameters()["0.lr"])
    train(model, optimizer, range(6, 9))
    assert float(optimizer.hyperparameters()["0.lr"]) == learned


def test_what_waits_for_the_next_step_survives_a_checkpoint(tmp_path):
    model = net()
    optimizer = Hyper(Adam, lr=0.01).stack(Adam).bind(model.parameters())
    train(model, optimizer, range(3))
    optimizer.hyper_backward(loss_at(model, 50))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "both.pt")
    other = net()
    again = Hyper(Adam, lr=0.01).stack(Adam).bind(other.parameters())
    weights, state = torch.load(tmp_path / "both.pt", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for m, o in ((model, optimizer), (other, again)):
        train(m, o, range(3, 5))
    assert differences(snapshot(model, optimizer), snapshot(other, again)) == []


def test_what_cannot_teach_is_refused():
    model = net()
    optimizer = Hyper(Adam).stack(Adam).bind(model.parameters())
    with pytest.raises(ValueError, match="one number that depends on the parameters"):
        optimizer.hyper_backward(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"one number that depends on the parameters, got shape \(2, 3\), requires_grad True"):
        optimizer.hyper_backward(model(torch.ones(2, 4)))
    with pytest.raises(ValueError, match="depends on none of the parameters: make it from the model as it is now"):
        optimizer.hyper_backward(torch.ones(2, requires_grad=True).sum())
    with pytest.raises(RuntimeError, match="stack an optimizer on it"):
        Hyper(Adam).bind(model.parameters()).hyper_backward(loss_at(model, 0))
    with pytest.raises(RuntimeError, match="strategy='tangents'"):
        Hyper(Adam, horizon=1, strategy="graph").stack(Adam).bind(model.parameters()).hyper_backward(loss_at(model, 0))
