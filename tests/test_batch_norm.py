"""BatchNorm's statistics for averaged weights: those of a forward pass in training mode, and gone again afterwards."""

import copy

import pytest
import torch
from torch import nn

from hyperopt import Adam, Hyper, ScheduleFree, batch_statistics


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5, momentum=0.3))


def batches(n=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 6, 6, generator=generator) + 2 for _ in range(n)]


def trained():
    model = net()
    optimizer = Hyper(ScheduleFree(Adam), lr=0.05).stack(Adam).bind(model.parameters())
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("pairs", [False, True], ids=["inputs", "pairs"])
def test_the_statistics_are_those_of_the_averaged_weights_and_training_gets_its_own_back(pairs):
    model, optimizer = trained()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    given = [(x, None) if pairs else x for x in batches()]
    with optimizer.averaged(), batch_statistics(model, given):
        assert [m.training for m in model] == [True, False, True, True, True]
        seen = model[0](torch.cat(batches())).detach()
        torch.testing.assert_close(model[1].running_mean, seen.mean((0, 2, 3)))
        torch.testing.assert_close(model[1].running_var, torch.stack([model[0](x).var((0, 2, 3)) for x in batches()]).mean(0).detach())
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[4].momentum == 0.3


def test_they_come_back_after_an_exception_inside_and_in_the_pass_itself():
    model, _ = trained()
    model.eval()
    before = copy.deepcopy(model.state_dict())

    def failing():
        yield from batches(2)
        raise KeyError("data")

    with pytest.raises(KeyError, match="evaluation"), batch_statistics(model, batches()):
        raise KeyError("evaluation")
    with pytest.raises(KeyError, match="data"), batch_statistics(model, failing()):
        pass
    with pytest.raises(ValueError, match="no batches"), batch_statistics(model, []):
        pass
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (net(), torch.ones(16, 1, 6, 6), r"got Tensor: give \[x\] for a single one"),
        (net(), None, "a list or loader of batches, got NoneType"),
        (batches(), net(), "the model first, a torch.nn.Module, got list"),
    ],
)
def test_what_is_no_model_or_no_batches_is_named(model, given, message):
    with pytest.raises(TypeError, match=message), batch_statistics(model, given):
        pass


def test_without_batch_norm_no_batch_is_run():
    with batch_statistics(nn.Linear(2, 2), iter([1 / 2, "not a batch"])) as nothing:
        assert nothing is None
    with batch_statistics(nn.BatchNorm1d(2, track_running_stats=False), []) as nothing:
        assert nothing is None


class Two(nn.Module):
    """A model of two inputs and an option, as models of text are."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, shift, scale=None):
        assert scale is None
        return self.body(x - shift)


class Wrapped(nn.Module):
    """As DistributedDataParallel, which takes any arguments."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **named):
        return self.module(*inputs, **named)


SHIFT = torch.ones(1)
TYPES = {
    "dict": lambda x: {"shift": SHIFT, "x": x},
    "dict with a number": lambda x: {"x": x, "shift": 1.0},
    "tuple": lambda x: (x, SHIFT),
    "tuple with targets": lambda x: (x, SHIFT, None),
    "list": lambda x: [x, SHIFT, "name"],
}


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["alone", "wrapped"])
@pytest.mark.parametrize("batch", TYPES.values(), ids=TYPES)
def test_dict_and_tuple_batches_are_the_arguments_of_the_model(batch, wrap):
    model = wrap(Two())
    with batch_statistics(model, [batch(x) for x in batches()]):
        found = [buffer.clone() for buffer in model.buffers()]
    body = net()
    with batch_statistics(body, [x - 1 for x in batches()]):
        assert all(map(torch.equal, found, body.buffers()))


def test_a_default_argument_takes_no_target():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x, mask=None):
            assert mask is None
            return self.body(x)

    with batch_statistics(Masked(), [(x, torch.zeros(16)) for x in batches()]):
        pass


def test_a_batch_type_of_ones_own_is_one_argument_and_moves_itself():
    class Own(tuple):
        moved = ()

        def to(self, device):
            Own.moved += (device,)
            return self

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, batch):
            assert isinstance(batch, Own)
            return self.body(batch[0])

    with batch_statistics(Model(), [Own((x, None)) for x in batches()]):
        assert Own.moved == (torch.device("cpu"),) * 4


def test_forward_stands_for_the_model():
    model = net()
    with batch_statistics(model, [{"image": x, "label": 3} for x in batches()], lambda batch: model(batch["image"])):
        found = [buffer.clone() for buffer in model.buffers()]
    with batch_statistics(model, batches()):
        assert all(map(torch.equal, found, model.buffers()))


def test_nothing_of_the_pass_is_differentiated():
    model, seen = net(), []
    with batch_statistics(model, batches(), lambda x: seen.append(model(x).requires_grad)):
        assert seen == [False] * len(batches())


def test_a_single_dict_is_named():
    with (
        pytest.raises(TypeError, match=r"takes a list or loader of batches, got dict: give \[x\] for a single one"),
        batch_statistics(net(), {"x": 1}),
    ):
        pass
