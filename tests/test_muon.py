"""Muon, alone and beside Adam: against torch.optim.Muon and against two towers of their own, and which tensor is stepped by which."""

import copy
import io
import pickle

import pytest
import test_derivatives
import torch
from cases import Case
from small import differences, snapshot
from torch import nn

from hyperopt import SGD, Adam, AdamW, Averaged, Box, Hyper, Lion, Muon, ScheduleFree, Split, Unified
from hyperopt.roles import REST, Role, read
from hyperopt.rules.muon import newton_schulz

needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


class Tiny(nn.Module):
    """An embedding, attention, a norm, a recurrent layer, a convolution and a head, on sequences of letters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 7)

    def forward(self, letters):
        x = self.embed(letters)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.lstm(self.conv(x.mT).tanh().mT)[0])


MATRICES = ["attention.in_proj_weight", "attention.out_proj.weight", "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]


def tiny(dtype=torch.float64):
    torch.manual_seed(0)
    return Tiny().to(dtype)


def train(model, optimizer, steps):
    for step in steps:
        letters = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(letters[:, :-1]).flatten(0, 1), letters[:, 1:].flatten()).backward()
        optimizer.step()


def matrices(dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 5), (3, 8), (9, 2))]


def descend(params, optimizer, steps=20):
    """Steps with gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) + 0.3
        optimizer.step()


def flat(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


# ---- the rule


@needs_torchs
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original", "spectral_unclamped"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
def test_equal_to_torch_at_the_same_precision(momentum, nesterov, adjust_lr_fn, monkeypatch):
    options = {"lr": 0.02, "momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    ours, theirs = matrices(), matrices()
    descend(ours, Hyper(Muon, **options).bind(ours))
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    descend(theirs, torch.optim.Muon(theirs, **options))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (flat(ours) - flat(matrices())).norm() > 0.1


@needs_torchs
def test_near_torch_which_computes_in_bfloat16():
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    descend(ours, Hyper(Muon, lr=0.02).bind(ours))
    descend(theirs, torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn="match_rms_adamw"))
    moved = flat(theirs) - flat(matrices(torch.float32))
    assert (flat(ours) - flat(theirs)).norm() < 0.02 * moved.norm()


@needs_torchs
def test_the_defaults_are_torchs_but_for_the_scale():
    theirs = torch.optim.Muon(matrices()).defaults
    assert {name: theirs[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "ns_steps", "ns_coefficients")} == {
        name: getattr(Muon(), name) for name in ("lr", "momentum", "weight_decay", "nesterov", "ns_steps", "ns_coefficients")
    }


@needs_torchs
def test_learns_as_over_a_live_one_of_torchs(monkeypatch):
    """A black box, whose displacements are torch's own."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = matrices(), matrices()
    live = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0)
    runs = Hyper(Muon, lr=0.01, weight_decay=0.0, adjust_lr_fn="original").stack(Adam).bind(ours), Hyper(live).stack(Adam).bind()
    for params, optimizer in zip((ours, theirs), runs, strict=True):
        descend(params, optimizer)
    assert runs[1].driven is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for values in (run.hyperparameters() for run in runs):
        assert values["0.lr"] != 0.01
    torch.testing.assert_close(*(run.hyperparameters()["0.lr"] for run in runs), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(20, 20), (8, 40), (40, 8), (1, 7), (7, 1)])
def test_directions_are_nearly_orthogonal_and_of_the_size_of_adams(shape):
    g = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    kept = s > 0.01 * s.norm()
    ends = torch.linalg.svdvals(newton_schulz(g[None], Muon.ns_coefficients, 5, torch.ones(()))[0])
    assert float(ends[: int(kept.sum())].min()) > 0.6
    assert float(ends.max()) < 1.3
    d, _ = Muon(momentum=0.0).direction(g, {}, None, None)
    assert torch.nn.functional.cosine_similarity(d.flatten(), (u @ vt).flatten(), dim=0) > 0.95
    assert 0.13 < float(d.square().mean().sqrt()) < 0.27


@pytest.mark.parametrize("shape", [(), (6,), (0,), (0, 3), (3, 0), (2, 3, 4)])
def test_any_shape_has_a_direction_and_no_gradient_none(shape):
    rule = Muon(momentum=0.0)
    d, _ = rule.direction(torch.ones(shape), {}, None, None)
    assert d.shape == shape
    assert d.isfinite().all()
    assert not rule.direction(torch.zeros(shape), {}, None, None)[0].any()
    assert rule.direction(torch.full(shape, 1e30), {}, None, None)[0].isfinite().all()


def test_blocks_are_tensors_of_their_own():
    whole = nn.Parameter(torch.randn(12, 6, dtype=torch.float64))
    parts = [nn.Parameter(w.clone()) for w in whole.detach().split(4)]
    rows = nn.Parameter(whole.detach().clone())
    runs = [
        ([whole], Hyper(Muon, lr=0.1).stack(Adam).bind([{"params": [whole], "blocks": 3}])),
        (parts, Hyper(Muon, lr=0.1).stack(Adam).bind(parts)),
        ([rows], Hyper(Muon, lr=0.1, rows=5).stack(Adam).bind([rows])),  # 12 rows in three blocks of at most 5
    ]
    for step in range(10):
        g = torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for params, optimizer in runs:
            for p, mine in zip(params, g.split(12 // len(params)), strict=True):
                p.grad = mine.clone()
            optimizer.step()
    for params, optimizer in runs[1:]:
        torch.testing.assert_close(flat(params), flat([whole]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.hyperparameters(), runs[0][1].hyperparameters(), rtol=1e-10, atol=0)


def test_rows_that_the_blocks_leave_over_are_shared_out():
    d, _ = Muon(momentum=0.0, rows=3).direction(g := torch.randn(7, 5), {}, None, None)
    sizes = (3, 2, 2)
    expected = [Muon(momentum=0.0).direction(part, {}, None, None)[0] for part in g.split(sizes)]
    torch.testing.assert_close(d, torch.cat(expected))


def test_rows_leave_alone_what_is_cheap():
    for shape in ((7, 3), (7,), (2, 9)):
        g = torch.randn(shape)
        assert torch.equal(Muon(momentum=0.0, rows=3).direction(g, {}, None, None)[0], Muon(momentum=0.0).direction(g, {}, None, None)[0])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", [(6, 13), (13, 6), (6, 7), (1, 9), (9, 1)])
def test_wide_matrices_take_the_same_steps_by_another_way(shape, steps):
    a, b, c = Muon().ns_coefficients
    g = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = g / g.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(newton_schulz(g, (a, b, c), steps, torch.ones(())), x, rtol=1e-9, atol=1e-12)


def test_steps_follow_the_norm_of_gradients():
    rule, plain = Muon(momentum=0.0, norm_decays=(0.5, 0.9)), Muon(momentum=0.0)
    state, now, mean = rule.init(torch.zeros(4, 6, dtype=torch.float64)), 0.0, 0.0
    for t, size in enumerate((1.0, 3.0, 0.2, 0.0, 1e-3), 1):
        g = size * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        now, mean = 0.5 * now + 0.5 * float(g.norm()) ** 2, 0.9 * mean + 0.1 * float(g.norm()) ** 2
        d, state = rule.direction(g, state, None, torch.tensor(float(t), dtype=torch.float64))
        factor = (now / (1 - 0.5**t) / (mean / (1 - 0.9**t))) ** 0.5
        torch.testing.assert_close(d, factor * plain.direction(g, {}, None, None)[0], rtol=1e-9, atol=1e-12)
    assert factor < 0.7, "the last gradients are small beside the mean, and steps are not"


def test_gradients_are_smoothed_before_they_are_orthogonalised():
    rule, plain = Muon(smoothing=0.5, momentum=0.0), Muon(momentum=0.0)
    state = rule.init(torch.zeros(4, 6, dtype=torch.float64))
    gs = torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in range(1, 6):
        d, state = rule.direction(gs[t - 1], state, None, torch.tensor(float(t), dtype=torch.float64))
        weights = 0.5 ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
        mean = torch.einsum("t,tij->ij", weights / weights.sum(), gs[:t])
        torch.testing.assert_close(d, plain.direction(mean, {}, None, None)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decayed", [None, "Muon", "Adam", "matrices"])
@pytest.mark.parametrize("outer", ["(Muon | Adam)", "ScheduleFree(Muon | Adam)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_decay_that_are_said_to(outer, decayed, dtype):
    """Without gradients nothing else moves; in float32 by the C++ passes."""
    model = tiny(dtype)
    optimizer = Hyper.parse(f"{outer}(lr=0.1, weight_decay=0.5, decayed={decayed})").bind(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        served = "Muon" if name in MATRICES else "Adam"
        decays = p.dim() > 1 if decayed == "matrices" else decayed in (None, served)
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("shapes", "decay"), [([(3, 2)], False), ([(3, 2), (3,)], False), ([(3, 2), (2, 1, 2), (3,)], True)])
def test_one_matrix_is_what_is_estimated_and_does_not_decay(shapes, decay, compile):
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    text = "ScheduleFree(Muon | Adam)(lr=0.1, weight_decay=0.5, decayed=matrices) / Adam"
    optimizer = Hyper.parse(text).bind([{"params": params, "rule": "Adam"}], compile=compile)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in params:
        assert bool((p < 1).all()) == (decay and p.dim() > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decayed", ["matrices", "Adam", None])
def test_large_weights_decay_as_smaller_ones(decayed, dtype):
    """By 3 at most, if matrices are what decays."""
    values = torch.tensor([[-9.0, -2.0, 1.0], [2.5, 3.5, 70.0]], dtype=dtype)
    params = [nn.Parameter(values.clone()) for _ in range(2)]
    text = f"ScheduleFree(Muon | Adam)(lr=0.1, weight_decay=0.5, decayed={decayed}, cautious=True, trust=None) / Adam"
    optimizer = Hyper.parse(text).bind([{"params": params, "rule": "Adam"}])
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    taken = values.clamp(-3, 3) if decayed == "matrices" else values
    for p in params:
        torch.testing.assert_close(p.detach(), values - 0.05 * taken)


@pytest.mark.parametrize("outer", ["(Muon | Adam)", "ScheduleFree(Muon | Adam)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_is_learned_as_the_update_says_where_large_weights_decay_less(outer, dtype, monkeypatch):
    """The closed form and the C++ passes, against the update of lr and beta2, which is differentiated as a whole."""
    monkeypatch.setattr("hyperopt.rules.split.LARGEST", 0.2)
    models, found = [tiny(dtype) for _ in range(2)], []
    for model, learn in zip(models, ("lr", "(lr, beta2)"), strict=True):
        text = f"{outer}(lr=0.01, eps=0.001, weight_decay=2.0, decayed=matrices, cautious=True, learn={learn}) / SGD(lr=1e-20)"
        optimizer = Hyper.parse(text).bind(model)
        qs = []
        for step in range(8):
            train(model, optimizer, [step])
            qs.append(optimizer.hypergradients().get("0.lr"))
        found.append(torch.stack(qs[1:]))
    torch.testing.assert_close(*found, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert found[0].abs().min() > 1e-6


def test_what_decays_is_not_gathered_with_what_does_not():
    """Where it is all served by one rule, also once decay is switched on later."""
    model = tiny(torch.float32)
    optimizer = Hyper.parse("(Muon | Adam)(lr=0.1, decayed=matrices, learn=lr) / Adam").bind(
        [{"params": model.parameters(), "rule": "Adam"}]
    )
    train(model, optimizer, [0])
    optimizer.param_groups[0]["weight_decay"] = 0.5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["m"].zero_()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() > 1 else 1))


def test_a_vector_is_one_column_and_a_tiny_gradient_makes_a_small_step():
    rule = Muon(momentum=0.0, adjust_lr_fn="original")
    g = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(rule.direction(g, {}, None, None)[0], rule.direction(g[:, None], {}, None, None)[0][:, 0])
    assert float(rule.direction(1e-12 * g, {}, None, None)[0].norm()) < 0.05 * float(rule.direction(g, {}, None, None)[0].norm())


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_filter_is_the_matrix_of_its_outputs(memory):
    g = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    d, _ = Muon(momentum=0.0).direction(g.to(memory_format=memory), {}, None, None)
    expected, _ = Muon(momentum=0.0).direction(g.reshape(6, 12), {}, None, None)
    torch.testing.assert_close(d.reshape(6, 12), expected, rtol=1e-12, atol=1e-12)


# ---- which tensor is what


def found(module):
    """The blocks of each parameter that is a hidden matrix, by name."""
    roles = read(module)
    assert roles.keys() == set(module.parameters())
    assert all(role == REST for role in roles.values() if role.direction)
    return {name: roles[p].blocks for name, p in module.named_parameters() if roles[p].direction == 0}


def test_roles_of_a_perceptron():
    assert found(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))) == {"0.weight": 1, "2.weight": 1}
    assert found(nn.Linear(3, 2)) == {}


def test_roles_of_a_convolutional_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8, 2)
    )
    assert found(model) == {"0.weight": 1, "2.weight": 4}
    assert found(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.Conv2d(4, 1, 1))) == {
        "0.weight": 1,
        "1.weight": 1,
    }


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_roles_of_recurrent_layers(kind, gates):
    options = {"proj_size": 2} if kind == "LSTM" else {}
    layers = [getattr(nn, kind)(3, 4, num_layers=2, bidirectional=True, **options), getattr(nn, f"{kind}Cell")(3, 4)]
    for layer in layers:
        names = {name for name, p in layer.named_parameters() if p.dim() == 2}
        assert found(layer) == {name: 1 if "_hr_" in name else gates for name in names}


def test_roles_of_a_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "body": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})
    model["head"] = nn.Linear(8, 5)
    model["head"].weight = model["embed"].weight  # tied
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert found(model) == {f"body.layers.{i}.{name}": 3 if "in_proj" in name else 1 for i in range(2) for name in names}
    shared = nn.ModuleList([nn.Embedding(5, 8), nn.Linear(8, 5), nn.Linear(5, 2)])
    shared[1].weight = shared[0].weight
    assert found(shared) == {}
    apart = nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True), nn.Linear(8, 1)])
    assert found(apart) == {f"0.{name}": 1 for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")}


def test_roles_of_what_a_layer_of_the_users_own_holds():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.pos_embed = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(9, 3))
            self.token, self.scale = nn.Parameter(torch.ones(1, 1, 3)), nn.Parameter(torch.ones(()))
            self.norm = nn.LayerNorm((2, 2, 2))

    assert found(Own()) == {"matrix": 1}


def test_roles_are_printed_and_are_read_by_shape_where_there_is_no_module():
    model = tiny()
    text = repr(Hyper(Muon | Adam).stack(Adam).bind(model))
    head, muon, adam = text.split("\n")
    assert head == f"HyperOptimizer((Muon | Adam) / Adam, {len(list(model.parameters()))} tensors in 1 groups)"
    blocks = {"attention.in_proj_weight": " in 3 blocks", "lstm.weight_ih_l0": " in 4 blocks", "lstm.weight_hh_l0": " in 4 blocks"}
    assert muon == f"    Muon: {', '.join(name + blocks.get(name, '') for name in MATRICES)}"
    assert {"embed.weight", "head.weight", "norm.weight", "conv.bias"} <= set(adam.removeprefix("    Adam: ").split(", "))
    params = [nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,), (4, 1, 2, 2))]
    assert repr(Hyper(Muon | Adam).bind(params)).split("\n")[1:] == ["    Muon: (3, 2), (4, 1, 2, 2)", "    Adam: (3,)"]
    assert "\n" not in repr(Hyper(Adam).bind(model))


def test_a_group_says_what_its_tensors_are():
    params = [nn.Parameter(torch.ones(6, 2)) for _ in range(4)]
    groups = [{"params": params[:1], "rule": "Adam"}, {"params": params[1:2], "rule": Muon, "blocks": 2}]
    groups.append({"params": params[2:], "rule": ["Muon", "Adam"], "blocks": [3, 1]})
    optimizer = Hyper(Muon | Adam).stack(Adam).bind(groups)
    assert [list(group.roles.values()) for group in optimizer._groups()] == [[Role(1)], [Role(0, 2)], [Role(0, 3, True), Role(1, 1, True)]]
    descend(params, optimizer, 2)
    assert [set(optimizer.state[p]) & {"m", "v"} for p in params] == [{"m", "v"}, {"m"}, {"m"}, {"m", "v"}]


@pytest.mark.parametrize(
    ("rule", "entries", "message"),
    [
        (Muon | Adam, {"rule": "SGD"}, "rule = 'SGD' is none of those that serve it: give 'Muon' or 'Adam'"),
        (Muon | Adam, {"rule": ["Muon"]}, "rule has 1 values for 2 parameters"),
        (Muon | Adam, {"blocks": 4}, r"blocks = 4 must be a number that divides the rows of a matrix, here \(6, 2\)"),
        (Muon | Adam, {"blocks": [3, 3]}, r"blocks = 3 must be a number that divides the rows of a matrix, here \(2,\)"),
        (Muon, {"blocks": [0, 1]}, "blocks = 0 must be a number"),
        (Muon, {"blocks": [1.0, 1]}, "blocks = 1.0 must be a number"),
        (Muon, {"rule": "Muon"}, "unknown entry 'rule'"),
        (Adam, {"blocks": 2}, "unknown entry 'blocks'"),
    ],
)
def test_a_group_that_says_something_wrong_is_refused(rule, entries, message):
    params = [nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=message):
        Hyper(rule).bind([{"params": params, **entries}])


def test_what_a_tensor_is_cannot_be_changed_later():
    optimizer = Hyper(Muon | Adam).bind(tiny())
    optimizer.param_groups[0]["rule"] = "Adam"
    with pytest.raises(ValueError, match=r"'rule'.* was changed"):
        optimizer.step()


# ---- two directions in one tower


@pytest.mark.parametrize("outer", [lambda rule: rule, ScheduleFree, Averaged], ids=["alone", "schedule-free", "averaged"])
def test_one_tower_is_a_tower_for_each_of_the_two_at_the_same_lr(outer):
    """Weights, averages, and the hypergradient of lr, which is the sum of the two."""
    together, apart = tiny(), tiny()
    tower = Hyper(outer(Muon | Adam), lr=0.02, eps=1e-3, trust=None).stack(SGD, lr=1e-30)
    optimizer = tower.bind(together)
    roles = read(apart)
    served = [[p for p in apart.parameters() if roles[p].direction == i] for i in (0, 1)]
    blocks = {"blocks": [roles[p].blocks for p in served[0]]}
    options = {"lr": 0.02, "weight_decay": 0.0, "trust": None}
    muon = Hyper(outer(Muon), **options).stack(SGD, lr=1e-30).bind([{"params": served[0], **blocks}])
    adam = Hyper(outer(Adam), eps=1e-3, **options).stack(SGD, lr=1e-30).bind(served[1])
    for step in range(8):
        train(together, optimizer, [step])
        for p, q in zip(apart.parameters(), together.parameters(), strict=True):
            p.grad = q.grad
        muon.step()
        adam.step()
        q, first, second = (run.hypergradients().get("0.lr", torch.zeros(())) for run in (optimizer, muon, adam))
        torch.testing.assert_close(q, first + second, rtol=1e-9, atol=1e-15)
        assert bool(q) == (step > 0)
    torch.testing.assert_close(flat(together.parameters()), flat(apart.parameters()), rtol=1e-11, atol=1e-11)
    with optimizer.averaged(), muon.averaged(), adam.averaged():
        torch.testing.assert_close(flat(together.parameters()), flat(apart.parameters()), rtol=1e-11, atol=1e-11)
    assert (flat(together.parameters()) - flat(tiny().parameters())).norm() > 0.5


def test_tensors_of_the_rest_are_gathered_and_each_matrix_is_a_buffer():
    model = tiny()
    optimizer = Hyper(ScheduleFree(Muon | Adam)).stack(Adam).bind(model)
    train(model, optimizer, range(2))
    names = {p: name for name, p in model.named_parameters()}
    buffers = [[names[p] for p in buffer.tensors] for buffer in optimizer._groups()[0].buffers]
    assert sorted(buffer[0] for buffer in buffers if len(buffer) == 1) == sorted(MATRICES)
    assert [len(buffer) for buffer in buffers if len(buffer) > 1] == [len(names) - len(MATRICES)]
    assert "m" not in optimizer.state[model.conv.weight]
    assert set(optimizer.state[model.head.weight]) >= {"v", "gap"}


SPLIT = Case(
    "split",
    (Muon | Adam)(lr=0.02, momentum=0.8, beta1=0.7, beta2=0.9, eps=0.01, weight_decay=0.3),
    ("lr", "momentum", "beta1", "beta2", "eps", "weight_decay"),
    None,
)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("horizon", [1, 10])
@pytest.mark.parametrize("per", ["group", "tensor"])
def test_hypergradients_are_finite_differences(per, horizon, level):
    learn = SPLIT.learnable if level == 0 else ("lr", "beta1", "beta2", "eps")  # of the levels above Adam serves
    if per == "group":
        spec, indices = test_derivatives.tower(SPLIT, level, learn, horizon=horizon), ((),)
    elif level:
        pytest.skip("level 1 has one tensor")
    else:
        spec = Hyper(SPLIT.rule, learn=learn, horizon=horizon, trust=None, per="tensor").stack(SGD, lr=0.1, trust=None)
        indices = ((0,), (1,))
        learn = ("lr", "weight_decay")  # of the others each acts on one of the two tensors
    node, steps = test_derivatives.run(SPLIT, spec, level)
    for step in steps:
        step.q = {name: q for name, q in step.q.items() if name in learn}
    raw = {name: r for name, r in node.hypers.raw().items() if name in learn}
    assert set(raw) == set(learn)
    for name in learn:
        for index in indices:
            q = test_derivatives.reported(steps, name)[(slice(None), *index)]
            expected = test_derivatives.brute_force(node, steps, name, 1 - 1 / horizon, index)
            test_derivatives.close(q, expected, rtol=1e-6, atol=1e-9, least=2e-13)
            assert q.any()


def test_a_value_each_tensor_moves_it_alone():
    model = tiny(torch.float32)
    optimizer = Hyper(ScheduleFree(Muon | Adam), per="tensor").stack(Adam).bind(model)
    train(model, optimizer, range(5))
    assert optimizer.hyperparameters()["0.lr"].unique().numel() > 3
    assert optimizer.skipped == {"gradients": 0, "hypergradients": 0}


# With its usual eps Adam makes steps of what is 0 but for rounding, such as the gradient of the bias of keys.
TOWERS = [
    "ScheduleFree(Muon | Adam)(lr=0.01, eps=0.001) / Adam",
    "ScheduleFree(Muon | Adam)(lr=0.01, eps=0.001, norm_decays=(0.9, 0.99), forget=0.2, through=0.8) / Adam",
    "ScheduleFree(Muon | Adam)(lr=0.01, eps=0.001, weight_decay=0.3, smoothing=0.5, decayed=Muon, cautious=True) / Adam",
    "ScheduleFree(Muon | Adam)(lr=0.01, eps=0.001, weight_decay=0.3, decayed=matrices, cautious=True) / Adam",
    "(Muon | Adam)(lr=0.01, eps=0.001, weight_decay=0.3, cautious=True, decayed=Adam) / Adam",
    "(Muon | Adam)(lr=0.01, eps=0.001, learn=(lr, momentum)) / Adam",
]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("text", [*TOWERS, "Averaged(Muon)(lr=0.01) / Adam"])
@pytest.mark.parametrize("way", ["native", "whole", "stages"])
@pytest.mark.usefixtures("graphs")
def test_compiled_is_eager(way, text, monkeypatch):
    monkeypatch.setattr("hyperopt.rules.split.LARGEST", 0.2)
    if way != "native":
        monkeypatch.setattr("hyperopt.body.functions.built", lambda: None)
        monkeypatch.setattr("hyperopt.body.functions.installed", lambda: None)
    monkeypatch.setattr("hyperopt.body.choose.PIECES", 9 if way == "whole" else 1)
    models = [tiny(torch.float32) for _ in range(2)]
    optimizers = [Hyper.parse(text).bind(model, compile=compile) for model, compile in zip(models, (False, True), strict=True)]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, [step])
    torch.testing.assert_close(*(flat(model.parameters()) for model in models), rtol=1e-4, atol=1e-5)
    values = [optimizer.hyperparameters() for optimizer in optimizers]
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)
    assert (flat(models[0].parameters()) - flat(tiny(torch.float32).parameters())).norm() > 0.02


@pytest.mark.parametrize(
    "text",
    [*TOWERS[:2], TOWERS[3], "(Muon | Adam)(lr=0.01, eps=0.001, weight_decay=0.1) / Adam", "(Muon | Adam)(eps=0.001, lr=0.01)"],
)
def test_native_passes_make_adams_directions_and_are_given_muons(text, monkeypatch):
    from hyperopt.body.functions import installed

    if installed() is None:
        pytest.skip("the passes are not built")
    monkeypatch.setattr("hyperopt.rules.split.LARGEST", 0.2)
    models = [tiny(torch.float32) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyperopt.body.functions.installed", lambda: None)
        plain = Hyper.parse(text).bind(models[0])
    native = Hyper.parse(text).bind(models[1])
    for step in range(8):
        train(models[0], plain, [step])
        train(models[1], native, [step])
    body = native._groups()[0].body
    rest = 2 if "decayed=matrices" in text else 1  # what decays is stepped by itself
    assert sorted(body.passes.told) == [False] * rest + [True] * len(MATRICES)
    assert not hasattr(plain._groups()[0].body, "passes")
    torch.testing.assert_close(*(flat(model.parameters()) for model in models), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.hyperparameters(), native.hyperparameters(), rtol=1e-4, atol=0)


def test_a_matrix_is_orthogonalised_once_a_step(monkeypatch):
    """Also a large one in operations of torch, of which an elementwise direction would be computed again."""
    monkeypatch.setattr("hyperopt.body.functions.installed", lambda: None)
    monkeypatch.setattr("hyperopt.body.buffers.BLOCK", 8)
    calls = []
    monkeypatch.setattr("hyperopt.rules.muon.newton_schulz", lambda *a: calls.append(1) or newton_schulz(*a))
    for rule in (Muon, ScheduleFree(Muon)):
        params = matrices()
        optimizer = Hyper(rule).stack(Adam).bind(params)
        descend(params, optimizer, 1)
        calls.clear()
        descend(params, optimizer, 3)
        assert len(calls) == 3 * len(params)


@pytest.mark.parametrize(
    "text", ["ScheduleFree(Muon | Adam) / Adam", "(Muon | Adam)(learn=(lr, momentum, beta1)) / Adam / SGD", "Muon / Adam"]
)
def test_a_checkpoint_goes_on_bit_for_bit_and_brings_the_roles(text):
    model = tiny(torch.float32)
    optimizer = Hyper.parse(text).bind(model)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = tiny(torch.float32)
    resumed = Hyper.parse(text).bind(other.parameters())  # which would be served by their shapes
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert [*resumed._groups()[0].roles.values()] == [*optimizer._groups()[0].roles.values()]
    copied = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (other, resumed), copied):
        train(*pair, range(6, 12))
    assert not differences(snapshot(model, optimizer)["model"], snapshot(other, resumed)["model"])
    assert not differences(snapshot(model, optimizer)["state"], snapshot(other, resumed)["state"])
    assert not differences(snapshot(model, optimizer), snapshot(*copied))


def test_a_momentum_that_is_assigned_later_gets_its_state():
    model = tiny()
    optimizer = Hyper(Muon | Adam, momentum=0.0).stack(Adam).bind(model)
    train(model, optimizer, range(2))
    assert "m" not in optimizer.state[model.conv.weight]
    optimizer.param_groups[0]["momentum"] = 0.5
    train(model, optimizer, range(2, 4))
    assert optimizer.state[model.conv.weight]["m"].any()


def test_weights_stay_in_a_set():
    model = tiny()
    optimizer = Hyper(Muon | Adam, lr=0.1, project=Box(-0.2, 0.2)).stack(Adam).bind(model)
    train(model, optimizer, range(4))
    assert float(flat(model.parameters()).abs().max()) == pytest.approx(0.2)


def test_no_first_moment_inside_a_schedule_free_one():
    rule = ScheduleFree(Muon | Adam)
    assert set(rule.declared()) == {"lr", "beta1", "beta2", "eps", "weight_decay"}
    assert rule().inner.value("momentum") == rule().inner.value("beta1") == 0
    assert (rule().weight_decay, ScheduleFree(Muon)().weight_decay, ScheduleFree(Muon | AdamW)().weight_decay) == (0, 0.1, 0.01)
    assert [part.value("momentum" if i == 0 else "beta1") for i, part in enumerate(rule().inner.directions)] == [0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "(Muon | Adam)",
        "(Muon | Adam)(lr=0.01, momentum=0.5, rows=256, learn=(lr, beta2)) / Adam",
        "ScheduleFree(Muon | Adam)(ns_steps=6, rows=128) / Adam",
        "ScheduleFree(Muon | Adam)(norm_decays=(0.9, 0.99), forget=0.05, through=0.99) / Adam",
        "ScheduleFree(Muon | Adam)(weight_decay=0.1, smoothing=0.5, decayed=Muon, cautious=True) / Adam",
        "(Muon | Adam)(weight_decay=0.1, decayed=matrices) / Adam",
        "Averaged(Muon | AdamW)(decay=0.5) / SGD",
        "ScheduleFree(Muon) / Adam",
        "Muon(nesterov=False, adjust_lr_fn=original, ns_coefficients=(2.0, -1.5, 0.5)) / (Muon | Lion)",
    ],
)
def test_text_round_trip(text):
    tower = Hyper.parse(text)
    assert str(tower) == text
    assert Hyper.parse(str(tower)) == tower == pickle.loads(pickle.dumps(tower)) == copy.deepcopy(tower)
    assert pickle.loads(pickle.dumps(tower)).rule.serving(Role(1)) == tower.rule


def test_text_without_brackets_is_read():
    assert Hyper.parse("Muon | Adam") == Hyper(Muon | Adam) == Hyper(Split(Muon, Adam))
    assert Muon | Adam is Muon | Adam
    assert ScheduleFree(Muon | Adam) is ScheduleFree(Muon | Adam)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Muon | Adam / Adam", r"are written \(Muon \| Adam\) / Adam"),
        ("Muon | Adam | SGD", r"are written \(Muon \| Adam\) / Adam"),
        ("Muon | Nothing", "'Nothing' in .* is not a rule"),
        ("Muon | Adam(lr=1)", "is not a name"),
        ("Muon | ScheduleFree(Adam)", "an average goes around both"),
    ],
)
def test_text_that_is_no_pair_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Hyper.parse(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Muon | Muon, TypeError, "is one rule: give two"),
        (lambda: Muon | Unified, TypeError, "'nesterov' is a hyperparameter of one"),
        (lambda: Muon | (Muon | Adam), TypeError, "a direction alone"),
        (lambda: Split(Muon, 3), TypeError, "takes two rules"),
        (lambda: Hyper(Split(Averaged(Muon), Adam)), TypeError, "an average goes around both"),
        (lambda: (Muon | Adam)(beta1=1.0), ValueError, "divides by 1 - beta"),
        (lambda: (Muon | Adam)(decoupled=True), TypeError, "decoupled"),
        (lambda: Muon(adjust_lr_fn="rms"), ValueError, "is none of match_rms_adamw"),
        (lambda: Muon(ns_steps=0), ValueError, "at least 1"),
        (lambda: Muon(rows=0), ValueError, "at least 1"),
        (lambda: Hyper(Muon, rows=2.5), ValueError, "at least 1"),
        (lambda: Muon(norm_decays=(0.9, 1.0)), ValueError, "two floats between 0 and 1"),
        (lambda: Muon(norm_decays=0.9), ValueError, "two floats between 0 and 1"),
        (lambda: Muon(smoothing=1.0), ValueError, "from 0 on and below 1"),
        (lambda: ScheduleFree(Muon)(smoothing="x"), ValueError, "from 0 on and below 1"),
        (lambda: (Muon | Adam)(decayed="SGD"), ValueError, "None, for everything, or one of Muon, Adam, matrices"),
        (lambda: Adam(weight_decay=0.1, cautious=True), ValueError, "cautious=True.* give decoupled=True too"),
        (lambda: Muon(ns_coefficients=(1.0, 2.0)), ValueError, "must be three floats"),
        (lambda: Hyper(Muon, learn="momentum", per="coordinate"), ValueError, "cannot learn momentum of Muon, which couples coordinates"),
    ],
)
def test_what_has_no_meaning_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_annotations_are_still_unions():
    assert Muon in (Muon | None).__args__


@pytest.mark.parametrize("options", ["learn=(lr, beta2)", "project=Ball(2.0)", "learn=(lr, momentum), project=Ball(2.0)"])
def test_a_matrix_of_the_rest_is_stepped_as_by_that_rule_alone(options):
    """In a feasible set, whose metric is the rule's, and where the update is differentiated as a whole."""
    ours, theirs = matrices()[:1], matrices()[:1]  # several would be gathered in a vector
    tower = Hyper.parse(f"(Muon | Adam)(lr=0.01, {options}) / SGD(lr=0.001)")
    optimizer = tower.bind([{"params": ours, "rule": "Adam"}])
    reference = Hyper.parse(f"Adam(lr=0.01, {options.replace('(lr, momentum)', 'lr')}) / SGD(lr=0.001)").bind(theirs)
    descend(ours, optimizer)
    descend(theirs, reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert reference.hyperparameters()["0.lr"] != 0.01
    torch.testing.assert_close(*(run.hyperparameters()["0.lr"] for run in (optimizer, reference)), rtol=1e-10, atol=0)


@pytest.mark.usefixtures("graphs", "operations_of_torch")
def test_compiled_code_of_one_role_is_not_taken_for_another(monkeypatch):
    monkeypatch.setattr("hyperopt.body.choose.PIECES", 0)
    runs = []
    for compile in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
        runs.append((params, Hyper(Muon, lr=0.01).stack(Adam).bind([{"params": params, "blocks": [1, 2]}], compile=compile)))
        descend(*runs[-1], 8)
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)


def test_any_two_rules_can_share_a_tower():
    model = tiny(torch.float32)
    optimizer = Hyper(Split(SGD, Lion), lr=0.01).stack(Adam).bind(model)
    train(model, optimizer, range(3))
    assert len(optimizer._groups()[0].buffers) == 2  # both elementwise: the matrices are gathered, and so is the rest
