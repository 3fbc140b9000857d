"""Several processes: sharded weights do what one process does with the whole batch, and all ranks learn the same hyperparameters."""

import contextlib
import os
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small import differences, net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hyperopt import Adam, Hyper, ScheduleFree
from hyperopt.body.part import STAGES

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")

TOWERS = [
    "Adam(lr=0.01) / Adam(lr=0.03)",
    "ScheduleFree(Adam)(lr=0.01, weight_decay=0.1) / Adam / Adam",
    "AdamW(lr=0.01, learn=(lr, beta1), per=tensor) / Adam",
    "SGD(lr=0.01, momentum=0.9, project=Box(-0.5, 0.5), horizon=1) / SGD",
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
    return p.full_tensor() if hasattr(p, "full_tensor") else p.clone()


def weights(model):
    return [whole(p) for p in model.parameters()]


def numbers(optimizer):
    return torch.cat([value.reshape(-1) for found in (optimizer.hyperparameters(), optimizer.hypergradients()) for value in found.values()])


def assert_ranks_agree(optimizer):
    mine = numbers(optimizer).nan_to_num(7e7)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    assert all(torch.equal(mine, other) for other in others), others


def assert_same(run, reference, tolerance=1e-9):
    (model, optimizer), (twin, other) = run, reference
    for p, q in zip(weights(model), weights(twin), strict=True):
        assert (p - q).norm() <= tolerance * q.norm()
    torch.testing.assert_close(numbers(optimizer), numbers(other), rtol=tolerance, atol=tolerance)
    assert abs(optimizer.hyperparameters()["0.lr"] / 0.01 - 1).max() > 1e-3, "nothing was learned"


@contextlib.contextmanager
def processes(rank, ranks, folder, name="store"):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/{name}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    yield
    dist.barrier()
    done(rank, folder, name)
    os._exit(0)  # gloo's threads now and then abort a process that ends them, and an interpreter takes a second to finish


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


def done(rank, folder, name="store"):
    """Note that a rank has made all of its assertions."""
    Path(f"{folder}/{name}.done.{rank}").touch()


def assert_on_ranks(function, ranks, folder, *args, name="store", finish=None):
    """Run a function of assertions in as many processes; all of them (or those in `finish`) must get to its end, and none raise."""
    torch.multiprocessing.spawn(function, (ranks, str(folder), *args), nprocs=ranks)
    assert {int(path.suffix[1:]) for path in Path(folder).glob(f"{name}.done.*")} == set(finish or range(ranks))


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
            before = weights(model)
            optimizer.step()
            assert not differences(before, weights(model))
            assert optimizer.skipped["gradients"] == 1
            backward(model, optimizer, *part(batch(step)))
        with reductions() as found:
            optimizer.step()
        assert len(found) <= at_most or not step, found  # the first step may prepare more
        assert max(found) < 20, found
        assert_ranks_agree(optimizer)
    assert_same((model, optimizer), (twin, other))
    with optimizer.averaged(), other.averaged():
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-9, atol=1e-9)
    return optimizer, other


def _fully_shard(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh

    with processes(rank, ranks, folder):
        mesh = init_device_mesh("cpu", (ranks,))
        for text in TOWERS:
            model, twin = fully_sharded(net(torch.float64), mesh), net(torch.float64)
            if text == TOWERS[3]:  # weights so small that trust counts them as larger
                with torch.no_grad():
                    for p in (*model.parameters(), *twin.parameters()):
                        p *= 1e-3
            optimizer, other = assert_trains_like_one_process(Hyper.parse(text), model, twin, lambda b: shard(b, rank, ranks))
            x, _ = batch(0)
            with optimizer.averaged(), other.averaged(), torch.no_grad():
                torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-9)
                model.reshard()
            torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [2, 4])  # of the five rows of the first matrix, the last of four ranks has none
def test_fully_shard_does_what_one_process_does(ranks, tmp_path):
    assert_on_ranks(_fully_shard, ranks, tmp_path)


def _meshes(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tower = Hyper.parse(TOWERS[1])
    with processes(rank, ranks, folder):
        # Sharded in pairs, with a replica each.
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = fully_sharded(net(torch.float64), mesh)
        assert_trains_like_one_process(tower, model, net(torch.float64), lambda b: shard(b, rank, ranks))
        other = fully_sharded(net(torch.float64), init_device_mesh("cpu", (ranks,)))
        with pytest.raises(ValueError, match="slice them from one"):
            tower.bind([*model.parameters(), *other.parameters()])
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
    assert_on_ranks(_meshes, 4, tmp_path)


def _reductions(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with processes(rank, ranks, folder):
        mesh = init_device_mesh("cpu", (ranks,))
        # Two groups: a gradient that is not finite in one of them stops both.
        model = fully_sharded(net(torch.float64), mesh)
        optimizer = Hyper.parse(TOWERS[0]).bind([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
        for step in range(3):
            backward(model, optimizer, *shard(batch(step), rank, ranks))
            if step == 2 and rank:
                model[0].weight.grad *= torch.inf
            before = weights(model)
            optimizer.step()
            assert bool(differences(before, weights(model))) == (step < 2)
            assert_ranks_agree(optimizer)
        # A shard that lies elsewhere than when the tower was bound, as FSDP2 may move it before the first forward pass.
        w = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))
        optimizer = Hyper(Adam, lr=0.1).stack(Adam).bind([w])
        for _ in range(2):
            before = whole(w)
            w.grad = torch.ones_like(w)
            w._local_tensor = w._local_tensor.clone()
            optimizer.step()
            assert (whole(w) < before).all()
        # A live optimizer whose state is sharded.
        model, twin = fully_sharded(net(torch.float64), mesh), net(torch.float64)
        optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin))
        for taken in (False, True):
            if taken:
                optimizer, other = (Hyper(o).stack(Adam).bind() for o in (optimizer, other))
            for step in range(3):
                backward(model, optimizer, *shard(batch(step), rank, ranks))
                optimizer.step()
                backward(twin, other, *batch(step))
                other.step()
        assert_same((model, optimizer), (twin, other))
        # Held-out losses of each rank are averaged, as gradients are.
        data_parallel = DistributedDataParallel(net(torch.float64), gradient_as_bucket_view=True)
        runs = []
        for model in (net(torch.float64), fully_sharded(net(torch.float64), mesh), data_parallel):
            optimizer = Hyper.parse(TOWERS[0]).bind(model.parameters())
            for step in range(4):
                both = batch(step), batch(100 + step)
                (x, y), held_out = both if not runs else [shard(one, rank, ranks) for one in both]
                backward(model, optimizer, x, y)
                grads = [p.grad.clone() for p in model.parameters()]
                optimizer.hyper_backward((model(held_out[0]) - held_out[1]).square().mean())
                assert not differences([whole(g) for g in grads], [whole(p.grad) for p in model.parameters()])
                optimizer.step()
                assert_ranks_agree(optimizer)
            runs.append((model, optimizer))
        for run in runs[1:]:
            assert_same(run, runs[0])


def test_groups_live_optimizers_and_held_out_losses(tmp_path):
    assert_on_ranks(_reductions, 2, tmp_path)


def _compiled(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh

    with processes(rank, ranks, folder):
        model, twin = fully_sharded(net(), init_device_mesh("cpu", (ranks,))), net()
        optimizer, other = Hyper.parse(TOWERS[0]).bind(model.parameters(), compile=True), Hyper.parse(TOWERS[0]).bind(twin.parameters())
        for step in range(5):
            x, y = (whole.float() for whole in batch(step))
            backward(model, optimizer, *shard((x, y), rank, ranks))
            optimizer.step()
            backward(twin, other, x, y)
            other.step()
            assert_ranks_agree(optimizer)
        assert_same((model, optimizer), (twin, other), 1e-5)
        assert optimizer._groups()[0]._step.compiled.fused
        assert optimizer._groups()[0].body.mode == STAGES


def test_compiled_steps(tmp_path):
    assert_on_ranks(_compiled, 2, tmp_path)


def _save(rank, ranks, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    with processes(rank, ranks, folder, "saving"):
        mesh = init_device_mesh("cpu", (ranks,))
        for i, text in enumerate(TOWERS):
            model = fully_sharded(net(torch.float64), mesh)
            optimizer = Hyper.parse(text).bind(model.parameters())
            for step in range(8):
                backward(model, optimizer, *shard(batch(step), rank, ranks))
                optimizer.step()
                if step == 3:
                    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                    dcp.save(parts, checkpoint_id=f"{folder}/{i}")
            after = weights(model), numbers(optimizer)
            if not rank:
                torch.save(after, f"{folder}/{i}.pt")


def _load(rank, ranks, folder, taken):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    with processes(rank, ranks, folder, f"loading{taken}"):
        mesh = init_device_mesh("cpu", (ranks,))
        for i, text in enumerate(TOWERS):
            model = fully_sharded(net(torch.float64), mesh)
            optimizer = Hyper.parse(text).bind(model.parameters())
            for step in range(taken):
                backward(model, optimizer, *shard(batch(50 + step), rank, ranks))
                optimizer.step()
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(parts, checkpoint_id=f"{folder}/{i}")
            set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
            for step in range(4, 8):
                backward(model, optimizer, *shard(batch(step), rank, ranks))
                optimizer.step()
            assert_ranks_agree(optimizer)
            expected = torch.load(f"{folder}/{i}.pt")
            torch.testing.assert_close((weights(model), numbers(optimizer)), expected, rtol=1e-9, atol=1e-9)
            # The state of one process, of whole tensors, goes to shards and comes back.
            twin = net(torch.float64)
            other = Hyper.parse(text).bind(twin.parameters())
            for step in range(3):
                backward(twin, other, *batch(step))
                other.step()
            optimizer.load_state_dict(other.state_dict())
            back = optimizer.state_dict()
            for key, one in other.state_dict()["state"].items():
                assert not differences(one, {name: whole(value) for name, value in back["state"][key].items()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("saved"))
    assert_on_ranks(_save, 4, folder, name="saving")
    return folder


@pytest.mark.one_in(3)
@pytest.mark.parametrize("taken", [0, 3])  # steps of the optimizer that is loaded into
def test_a_checkpoint_of_four_ranks_on_two(taken, saved):
    assert_on_ranks(_load, 2, saved, taken, name=f"loading{taken}")


def _join(rank, ranks, folder):
    with processes(rank, ranks, folder):
        mine = range(3 + 2 * rank)
        model = DistributedDataParallel(net(torch.float64))
        optimizer = Hyper.parse(TOWERS[1]).bind(model.parameters())

        def epoch(start):
            for step in mine:
                backward(model, optimizer, *batch(start + 10 * rank + step))
                optimizer.step()

        with pytest.raises(RuntimeError, match="exhausted"), model.join(throw_on_early_termination=True):
            epoch(0)
        assert optimizer.state_dict()["param_groups"][0]["tower"]["calls"] == 3
        assert_ranks_agree(optimizer)
        with model.join():
            epoch(100)
        parts = [optimizer.state_dict()]
        dist.broadcast_object_list(parts, src=1)
        optimizer.load_state_dict(parts[0])
        assert optimizer.state_dict()["param_groups"][0]["tower"]["calls"] == 8
        backward(model, optimizer, *batch(rank))
        optimizer.step()
        assert_ranks_agree(optimizer)


def test_join(tmp_path):
    assert_on_ranks(_join, 2, tmp_path)


def _dies(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh

    with processes(rank, ranks, folder):
        model = fully_sharded(net(torch.float64), init_device_mesh("cpu", (ranks,)))
        optimizer = Hyper.parse(TOWERS[0]).bind(model.parameters())
        for step in range(2):
            backward(model, optimizer, *shard(batch(step), rank, ranks))
            if step and rank:
                os._exit(0)
            if step:
                with pytest.raises(RuntimeError):
                    optimizer.step()
                done(rank, folder)
                os._exit(0)
            optimizer.step()


def test_a_rank_that_dies_ends_the_step_of_the_others(tmp_path):
    assert_on_ranks(_dies, 2, tmp_path, finish=[0])


class Coupled(Adam):
    """A rule that needs whole matrices."""

    elementwise = False


def _refused(rank, ranks, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with processes(rank, ranks, folder):
        mesh = init_device_mesh("cpu", (ranks,))
        model = fully_sharded(net(), mesh)
        whole_tensors = net()
        for tower, match in [
            (Hyper(Coupled).stack(Adam), "needs whole tensors"),
            (Hyper(ScheduleFree(Coupled)).stack(Adam), "needs whole tensors"),
            (Hyper.parse("Adam(project=Ball(3)) / Adam"), "give a Box"),
            (Hyper.parse("Adam(per=coordinate) / Adam"), "per = "),
            (Hyper.parse("Adam(strategy=graph, horizon=1) / Adam"), "strategy = "),
            (Hyper(torch.optim.Rprop(model.parameters(), lr=0.01)).stack(Adam), "black box"),
        ]:
            params = None if tower.source else model.parameters()
            with pytest.raises(ValueError, match=match):
                tower.bind(params) if params else tower.bind()
            if params:
                tower.bind(whole_tensors.parameters())
        for original in (False, True):
            old = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=original)
            with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
                Hyper(Adam).stack(Adam).bind(old.parameters())
        parallel = DistributedDataParallel(net(torch.float64))
        with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer.*model\.parameters\(\)"):
            ZeroRedundancyOptimizer(parallel.parameters(), lambda params: Hyper(Adam).stack(Adam).bind(params))
        # As the optimizer that is driven it works: it moves whole tensors.
        twin = net(torch.float64)
        optimizer = Hyper(ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.Adam, lr=0.01)).stack(Adam).bind()
        other = Hyper(torch.optim.Adam(twin.parameters(), lr=0.01)).stack(Adam).bind()
        for step in range(5):
            backward(parallel, optimizer, *shard(batch(step), rank, ranks))
            optimizer.step()
            backward(twin, other, *batch(step))
            other.step()
            assert_ranks_agree(optimizer)
        torch.testing.assert_close(weights(parallel), weights(twin), rtol=1e-9, atol=1e-9)


def test_what_would_let_ranks_learn_apart_is_refused(tmp_path):
    assert_on_ranks(_refused, 2, tmp_path)
