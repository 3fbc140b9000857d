"""The loops around an optimizer: autocast with a gradient scaler, accumulation, clipping, a compiled model, several processes."""

import copy

import pytest
import torch
from small import differences, loss_at, net, snapshot
from torch import nn
from torch.nn.functional import mse_loss

from hyperopt import Adam, Hyper

TOWER = Hyper(Adam, lr=0.01, learn=("lr", "beta1")).stack(Adam, lr=0.03)
BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(6)]


def loss_of(model, x):
    return mse_loss(model(x), x[:, :3].sin())


def trained(one_step):
    """A model and its optimizer after a step on each of `BATCHES`."""
    model = net(torch.float64)
    optimizer = TOWER.bind(model.parameters())
    for x in BATCHES:
        optimizer.zero_grad()
        one_step(model, optimizer, x)
    return model, optimizer


def plain(model, optimizer, x):
    loss_of(model, x).backward()
    optimizer.step()


def learned(optimizer):
    return torch.stack([optimizer.hyperparameters()[name] for name in ("0.lr", "0.beta1")])


def assert_same(run, reference):
    (model, optimizer), (twin, other) = run, reference
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()
    torch.testing.assert_close(learned(optimizer), learned(other), rtol=1e-6, atol=0)
    assert (learned(other) / torch.tensor([0.01, 0.9]) - 1).abs().min() > 1e-3, "nothing was learned"


def test_a_scaler_under_autocast_skips_a_gradient_that_overflowed():
    model = net()
    optimizer = TOWER.bind(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    losses = []
    for at in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_at(model, at)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        before, scale = snapshot(model, optimizer), scaler.get_scale()
        if at == 10:
            next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        changed = differences(before, snapshot(model, optimizer))
        assert bool(changed) == (at != 10), changed
        assert scaler.get_scale() == (scale / 2 if at == 10 else scale)
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}  # the scaler did not call step
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_scale_that_is_taken_out_changes_nothing():
    def scaled(model, optimizer, x):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)

    assert_same(trained(scaled), trained(plain))


def test_a_gradient_that_is_not_unscaled_and_overflowed_is_skipped_whole():
    model, optimizer = trained(plain)
    before = snapshot(model, optimizer)
    for p in model.parameters():
        p.grad *= torch.inf
    optimizer.step()
    after = differences(before, snapshot(model, optimizer))
    assert optimizer.skipped["gradients"] == 1
    assert all("tower" in path for path in after), after  # where steps and skipped steps are counted


def test_accumulated_gradients_are_those_of_one_big_batch():
    def accumulating(model, optimizer, x):
        for part in x.chunk(4):
            (loss_of(model, part) / 4).backward()
        optimizer.step()

    assert_same(trained(accumulating), trained(plain))


def test_clipped_gradients_are_what_the_tower_learns_from():
    def clipping(model, optimizer, x):
        loss_of(model, x).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.step()

    def by_hand(model, optimizer, x):
        loss_of(model, x).backward()
        grads = [p.grad for p in model.parameters()]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for g in grads:
            g.mul_(0.1 / (norm + 1e-6))
        optimizer.step()

    assert_same(trained(clipping), trained(by_hand))
    assert not torch.equal(learned(trained(clipping)[1]), learned(trained(plain)[1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_model():
    def compiled(model, optimizer, x):
        fused = torch.compile(model, backend="aot_eager")
        loss_of(fused, x).backward()
        optimizer.step()

    assert_same(trained(compiled), trained(plain))


def _process(rank, folder, start):
    """One of two processes, each with half of every batch."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = copy.deepcopy(start)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = TOWER.bind(parallel.parameters())
    for x in BATCHES:
        optimizer.zero_grad()
        loss_of(parallel, x.chunk(2)[rank]).backward()
        optimizer.step()
    torch.save((model.state_dict(), optimizer.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_stay_equal_and_do_what_one_does(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path), net(torch.float64)), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert not differences(*saved)
    model = net(torch.float64)
    model.load_state_dict(saved[0][0])
    optimizer = TOWER.bind(model.parameters())
    optimizer.load_state_dict(saved[0][1])
    assert_same((model, optimizer), trained(plain))
