"""Several processes: sharded weights do what one process does with the whole batch, and all ranks learn the same hyperparameters."""

import contextlib
import copy
import warnings
from datetime import timedelta

import pytest
import torch
from small import differences, net
from torch import nn

from hyperopt import Hyper

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")

TOWERS = [
    "Adam(lr=0.01, learn=(lr, beta1)) / Adam(lr=0.03)",
    "ScheduleFree(Adam)(lr=0.01, weight_decay=0.1) / Adam / Adam",
    "SGD(lr=0.01, momentum=0.9, per=tensor) / Adam",
    "Adam(lr=0.01, project=Box(-0.5, 0.5), horizon=1) / SGD",
]


def batch(step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x[:, :3].sin()


def backward(model, optimizer, x, y):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()


def shard(batch, rank, ranks):
    return [whole.chunk(ranks)[rank] for whole in batch]


def fully_sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def numbers(optimizer):
    return torch.cat([value.reshape(-1) for found in (optimizer.hyperparameters(), optimizer.hypergradients()) for value in found.values()])


def assert_ranks_agree(optimizer):
    mine = numbers(optimizer)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others), others


def assert_same(run, reference, tolerance=1e-9):
    (model, optimizer), (twin, other) = run, reference
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (whole(p) - q).norm() <= tolerance * q.norm()
    torch.testing.assert_close(numbers(optimizer), numbers(other), rtol=tolerance, atol=tolerance)
    assert abs(optimizer.hyperparameters()["0.lr"] / 0.01 - 1).max() > 1e-3, "nothing was learned"


@contextlib.contextmanager
def processes(rank, ranks, folder, name="store"):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/{name}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def reductions():
    """The sizes of the all-reduces inside."""
    found, original = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        found.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    yield found
    dist.all_reduce = original


def spawn(function, ranks, *args):
    torch.multiprocessing.spawn(function, (ranks, *args), nprocs=ranks)


def assert_trains_like_one_process(tower, model, twin, part, at_most=2):
    """Some steps of a sharded `model` on parts of each batch, against those of the whole `twin` on all of it."""
    optimizer, other = tower.bind(model.parameters()), tower.bind(twin.parameters())
    for step in range(6):
        backward(twin, other, *batch(step))
        other.step()
        backward(model, optimizer, *part(batch(step)))
        if step == 3:  # not finite in one shard
            first = next(model.parameters())
            first.grad = first.grad * (torch.nan if dist.get_rank() % 2 else 1)
            before = copy.deepcopy([whole(p) for p in model.parameters()])
            optimizer.step()
            assert not differences(before, [whole(p) for p in model.parameters()])
            assert optimizer.skipped["gradients"] == 1
            backward(model, optimizer, *part(batch(step)))
        with reductions() as found:
            optimizer.step()
        assert len(found) <= at_most, found
        assert max(found) < 20, found
        assert_ranks_agree(optimizer)
    assert_same((model, optimizer), (twin, other))
    with optimizer.averaged(), other.averaged():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (whole(p) - q).norm() <= 1e-9 * q.norm()
    return optimizer, other


def _fully_shard(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh

    with processes(rank, ranks, folder):
        mesh = init_device_mesh("cpu", (ranks,))
        for text in TOWERS:
            model = fully_sharded(net(torch.float64), mesh)
            assert_trains_like_one_process(Hyper.parse(text), model, net(torch.float64), lambda b: shard(b, rank, ranks))


@pytest.mark.parametrize("ranks", [2, 4])  # of the five rows of the first matrix, the last of four ranks has none
def test_fully_shard_does_what_one_process_does(ranks, tmp_path):
    spawn(_fully_shard, ranks, str(tmp_path))


def _meshes(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tower = Hyper.parse(TOWERS[1])
    with processes(rank, ranks, folder):
        # Sharded in pairs, with a replica each.
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = fully_sharded(net(torch.float64), mesh)
        assert_trains_like_one_process(tower, model, net(torch.float64), lambda b: shard(b, rank, ranks))
        # Tensor parallel: some tensors whole, some sharded by rows or by columns.
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}

        def wide():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3)).double()

        model = parallelize_module(wide(), mesh["tensor"], plan)
        assert_trains_like_one_process(tower, model, wide(), lambda b: b)
        # Both: two reductions for each dimension of the mesh.
        model = fully_sharded(parallelize_module(wide(), mesh["tensor"], plan), mesh["data"])
        assert_trains_like_one_process(tower, model, wide(), lambda b: shard(b, rank // 2, 2), at_most=4)


def test_meshes_of_two_dimensions_and_tensor_parallel(tmp_path):
    spawn(_meshes, 4, str(tmp_path))
