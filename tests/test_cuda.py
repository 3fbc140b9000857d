"""On a GPU: the numbers of the CPU, compiled or not, no waiting for the device, and checkpoints that move from one to the other."""

import io
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cases import CASES
from fused import STEPS, assert_equal, bound, fresh_compiler
from fused import train as train_both
from small import backward, differences, net, snapshot, train
from torch.optim.lr_scheduler import LambdaLR

import hyperopt
from hyperopt import SGD, Adam, Hyper, Recorder, ScheduleFree

GPU = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
__all__ = ["fresh_compiler"]

TOWERS = {
    "height 0": Hyper(Adam),
    "chain": Hyper(Adam, lr=1e-3).stack(Adam).stack(SGD),
    "tree": Hyper(Adam, lr=1e-3).stack(lr=Hyper(Adam).stack(SGD), beta1=Hyper(SGD, lr=0.1)),
    "averaging": Hyper(ScheduleFree(Adam), learn=("lr", "beta1")).stack(Adam),
    "tensor": Hyper(Adam, per="tensor", learn=("lr", "beta1")).stack(Adam),
    "coordinate": Hyper(SGD, lr=0.01, per="coordinate").stack(SGD),
    "graph": Hyper(Adam, lr=1e-3, horizon=1, strategy="graph").stack(SGD),
}
SAVED = {name: tower for name, tower in TOWERS.items() if name != "graph"}  # a graph cannot be saved, and waits for the device
chosen = pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)


def on(device, tower, dtype=torch.float64):
    model = net(dtype).to(device)
    return model, tower.bind(model.parameters())


def assert_close(run, other, tolerance=1e-6):
    """The same weights and hyperparameters, wherever they lie."""
    (model, optimizer), (twin, reference) = run, other
    expected, actual = ({**dict(m.named_parameters()), **o.hyperparameters()} for m, o in ((twin, reference), (model, optimizer)))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value.cpu(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def no_host_sync():
    """What waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the numbers of the CPU


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule_steps_and_learns_as_on_the_cpu(case):
    tower = Hyper(case.rule, learn=case.learnable).stack(Adam)
    run, reference = on(GPU, tower), on("cpu", tower)
    start = run[1].hyperparameters()
    for model, optimizer in (run, reference):
        train(model, optimizer, range(20))
    assert_close(run, reference)
    assert all(value.device.type == GPU for value in run[1].hyperparameters().values())
    assert any(value != start[name] for name, value in run[1].hyperparameters().items())


@chosen
def test_every_kind_of_tower_is_that_of_the_cpu(tower):
    run, reference = on(GPU, tower), on("cpu", tower)
    for model, optimizer in (run, reference):
        train(model, optimizer, range(20))
        with optimizer.averaged():
            backward(model, 20)
        optimizer.step()
    assert_close(run, reference)


@pytest.mark.parametrize("text", ["Adam / Adam", "ScheduleFree(Adam) / Adam", "SGD(lr=0.1, momentum=0.9) / Adam / SGD", "Adam"])
def test_the_compiled_step_is_the_eager_one(text):
    eager, fused = (bound(text, compile=c, device=GPU) for c in (False, True))
    train_both(STEPS, eager, fused)
    # torch's fused Adam, which eager steps use, rounds beta2 to float32 on a GPU before it takes 1 - beta2: 1.3e-5 of v.
    assert_equal(eager, fused, torch.float32, 2e-5)


def test_half_the_model_on_each_device():
    model, (twin, reference) = net(torch.float64), on("cpu", TOWERS["chain"])
    model[2].to(GPU)
    optimizer = TOWERS["chain"].bind(model.parameters())
    for step in range(10):
        backward(twin, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = q.grad.to(p.device)
        reference.step()
        optimizer.step()
    assert_close((model, optimizer), (twin, reference))


# ---- no waiting


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("tower", SAVED.values(), ids=SAVED)
def test_a_step_does_not_wait_for_the_device(tower, compile):
    model = net().to(GPU)
    optimizer = tower.bind(model.parameters(), compile=compile)
    with Recorder(optimizer) as recorder:
        for step in range(12):
            backward(model, step)
            if step < 8:  # until everything has been made and compiled
                optimizer.step()
                continue
            with no_host_sync():
                optimizer.step()
        assert len(recorder.values["0.lr"]) == 12


def test_a_step_with_a_scheduler_does_not_wait_for_the_device():
    model, optimizer = on(GPU, TOWERS["chain"])
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for step in range(12):
        backward(model, step)
        with no_host_sync() if step > 3 else nullcontext():
            optimizer.step()
        schedule.step()
    assert schedule.last_epoch == 12
    assert optimizer.hyperparameters()["0.lr"].is_cuda


def test_the_guard_of_the_tests_above_guards():
    with no_host_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=GPU).item()


# ---- what is not a number, and mixed precision


@chosen
def test_a_bad_gradient_changes_nothing(tower):
    model, optimizer = on(GPU, tower)
    train(model, optimizer, range(4))
    before = snapshot(model, optimizer)
    backward(model, 4)
    next(model.parameters()).grad[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped == {"gradients": 1, "hypergradients": 0}
    changed = differences(before, snapshot(model, optimizer))
    assert all("tower" in path for path in changed), changed  # where steps and skipped steps are counted


def test_float16_with_a_scaler():
    model, optimizer = on(GPU, Hyper(Adam, lr=0.01).stack(Adam), torch.float32)
    scaler = torch.amp.GradScaler(GPU, init_scale=2.0**20, growth_interval=1000)  # far too large: the first steps overflow
    start = optimizer.hyperparameters()["0.lr"]
    x = torch.randn(64, 4, device=GPU)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(GPU, torch.float16):
            loss = (model(x).float() - x[:, :3].sin()).square().sum()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**20
    assert optimizer.hyperparameters()["0.lr"] != start
    assert losses[-1] < 0.5 * losses[0]


# ---- checkpoints, torch's optimizers, hyperopt.auto


@pytest.mark.parametrize(("first", "second"), [(GPU, "cpu"), ("cpu", GPU)])
@pytest.mark.parametrize("tower", SAVED.values(), ids=SAVED)
def test_a_checkpoint_goes_on_on_the_other_device(tower, first, second):
    model, optimizer = on(first, tower)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location=second)
    twin, other = on(second, tower)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for each in ((model, optimizer), (twin, other)):
        train(*each, range(5, 10))
    assert_close((twin, other), (model, optimizer))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_torchs_optimizer_on_the_gpu_is_gone_on_from(make):
    models = [net(torch.float64).to(GPU) for _ in range(2)]
    theirs, live = (make(model.parameters(), lr=0.01, foreach=True) for model in models)
    for model, optimizer in zip(models, (theirs, live), strict=True):
        train(model, optimizer, range(5))
    ours = Hyper(live).bind()
    for model, optimizer in zip(models, (theirs, ours), strict=True):
        train(model, optimizer, range(5, 10))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_recommended_optimizer_learns_a_rate():
    model = net().to(GPU)
    optimizer = hyperopt.auto(model, lr=1e-6)
    train(model, optimizer, range(200))
    assert optimizer.hyperparameters()["0.lr"] > 1e-4
    with optimizer.averaged():
        backward(model, 200)


def test_an_optimizer_that_is_driven():
    model, twin = net(torch.float64).to(GPU), net(torch.float64)
    towers = [Hyper(torch.optim.Rprop(m.parameters(), lr=0.01)).stack(Adam).bind() for m in (model, twin)]
    for run in zip((model, twin), towers, strict=True):
        train(*run, range(10))
    assert_close((model, towers[0]), (twin, towers[1]))
