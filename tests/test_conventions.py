"""The conventions of torch.optim: its words, its groups, its checkpoints, and what its own tests ask of any optimizer."""

import copy
import io
import warnings

import pytest
import torch
from cases import CASES
from small import backward, differences, loss_at, net, train
from torch import nn

import hyperopt
from hyperopt import SGD, Adam, Averaged, Hyper, ScheduleFree

CHAIN = Hyper(Adam, lr=1e-3).stack(Adam).stack(SGD)
# Each rule alone and with an lr that is learned; `Averaged` and `ScheduleFree` as rules of their own.
RULES = [*(case.rule for case in CASES), ScheduleFree(Adam)(), Averaged(SGD)()]
TOWERS = {f"{type(rule).__name__}{i}/{height}": tower for i, rule in enumerate(RULES) for height, tower in enumerate(
    [Hyper(rule, lr=0.01), Hyper(rule, lr=0.01).stack(SGD, lr=0.01)]
)}  # fmt: skip
every_tower = pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)

# Of what torch tests its optimizers for, what is not asked here, and why. All else is, or in the file that is named.
NOT_APPLICABLE = {
    "complex parameters": "refused",
    "sparse gradients": "refused",
    "foreach and fused against the plain loop, their peak memory": "there is one implementation, chosen when bound, and the flags are "
    "ignored: that all implementations agree is in test_native.py, test_engine.py and test_passes.py",
    "fused and GradScaler": "GradScaler unscales, as for any optimizer that does not do it itself: test_amp_ddp.py",
    "capturable in a CUDA graph": "not supported: what a step notices, such as assignments, it notices in Python",
    "state dicts of older versions, or with numbers for tensors": "checkpoints have a format of their own: test_errors.py",
    "less memory with beta1 = 0": "a hyperparameter held at 0 has no state: test_optimizer.py",
    "a closure that is required": "no rule needs one",
    "differentiable": "refused",
    "several devices": "test_cuda.py",
}


# ---- words


def numbers(value, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype), torch.tensor([value], dtype=dtype), nn.Parameter(torch.tensor(value, dtype=dtype))]


@pytest.mark.parametrize("i", range(3))
def test_a_tensor_of_one_element_is_a_number(i):
    lr, beta = numbers(0.02)[i], numbers(0.8)[i]
    assert Hyper(Adam, lr=lr, betas=(beta, 0.99)) == Hyper(Adam, lr=0.02, betas=(0.8, 0.99))
    assert Hyper(Adam, beta1=beta).stack(SGD, lr=lr) == Hyper(Adam, beta1=0.8).stack(SGD, lr=0.02)
    assert Hyper(Adam).replace(lr=lr) == Hyper(Adam, lr=0.02)
    assert Hyper(Adam).stack(SGD, lr={"lr": lr}) == Hyper(Adam).stack(SGD, lr={"lr": 0.02})
    w = nn.Parameter(torch.ones(2))
    group = Hyper(Adam).bind([{"params": [w], "lr": lr, "betas": (beta, 0.99)}]).param_groups[0]
    assert [round(float(group[name]), 6) for name in ("lr", "beta1", "beta2")] == [0.02, 0.8, 0.99]
    assert float(hyperopt.auto([w], lr=lr).param_groups[0]["lr"]) == pytest.approx(0.02)


def test_a_tensor_is_read_once_and_stays_the_users():
    lr, w = torch.tensor(0.1), nn.Parameter(torch.ones(2))
    optimizer = Hyper(SGD, lr=lr).bind([{"params": [w], "lr": lr}])
    lr.fill_(7.0)
    w.grad = torch.ones(2)
    optimizer.step()
    assert float(w.detach()[0]) == pytest.approx(0.9)
    assert lr == 7.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Hyper(Adam, lr=torch.tensor([0.1, 0.2])), ValueError, r"lr is a tensor of shape \(2,\): give a number"),
        (lambda: Hyper(Adam, lr=torch.tensor([])), ValueError, r"lr is a tensor of shape \(0,\)"),
        (lambda: Hyper(Adam, betas=(torch.ones(3), 0.9)), ValueError, r"betas is a tensor of shape \(3,\)"),
        (lambda: Hyper(Adam, lr=torch.tensor(-1.0)), ValueError, "lr.* = -1.0 is outside its domain"),
        (lambda: Hyper(Adam, lr=torch.tensor(True)), TypeError, "must be a number, got True"),
        (lambda: Hyper(Adam, lr=torch.tensor(1j)), TypeError, "must be a number"),
        (lambda: Hyper(Adam).bind([{"params": [nn.Parameter(torch.ones(1))], "lr": torch.ones(2)}]), ValueError, "lr is a tensor of shape"),
        (lambda: Hyper(Adam, differentiable=True), ValueError, "not part of an autograd graph"),
        (lambda: Hyper(Adam, fused="yes"), TypeError, "fused must be True, False or None, got 'yes'"),
        (lambda: Hyper(Adam).stack(SGD, differentiable=True), ValueError, "not part of an autograd graph"),
    ],
)
def test_what_is_no_number_or_flag_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_flags_of_torch_are_accepted_and_change_nothing():
    flags = {"foreach": True, "fused": None, "capturable": True, "differentiable": False}
    assert Hyper(Adam, **flags).stack(SGD, **flags) == Hyper(Adam).stack(SGD)
    assert Hyper(torch.optim.SGD, momentum=0.9, **flags) == Hyper(SGD, momentum=0.9)
    params = list(net().parameters())
    group = Hyper(Adam).bind([{"params": params, **flags}]).param_groups[0]
    assert {name: group[name] for name in flags} == flags


def test_torchs_word_for_decoupled_weight_decay():
    assert Hyper(torch.optim.NAdam, decoupled_weight_decay=True, weight_decay=0.1) == Hyper(
        hyperopt.NAdam, decoupled=True, weight_decay=0.1
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (5, "params must be a module or parameters, got int: pass model.parameters"),
        (0.1, "got float: pass model.parameters"),
        ({"params": [nn.Parameter(torch.ones(2))]}, r"got dict: pass model.parameters\(\), or a list of groups, \[{'params'"),
        (net().state_dict(), "got OrderedDict: pass model.parameters"),
        (lambda: 0, "got function: pass model.parameters"),
        ("weights", "got str: pass model.parameters"),
        ([{"params": 5}], "a parameter group's params must be parameters, got int: give a list of tensors"),
        ([5], "one of the params is int"),
    ],
)
@pytest.mark.parametrize("bind", [Hyper(Adam).bind, CHAIN.bind, hyperopt.auto])
def test_what_is_no_parameters_is_named_with_what_is_expected(bind, params, message):
    with pytest.raises(TypeError, match=message):
        bind(params)


@pytest.mark.parametrize("given", [5, None, []])
def test_what_is_no_checkpoint_is_named(given):
    with pytest.raises(TypeError, match=r"a checkpoint is a dictionary, as optimizer.state_dict\(\) makes it, got"):
        CHAIN.bind(net().parameters()).load_state_dict(given)


# ---- entries of parameter groups


def test_entries_of_the_users_own_are_kept_and_saved():
    model = net()
    own = {"lr_scale": 0.5, "weight_decay_scale": 0.0, "layer": "head", "tags": [1, 2]}
    optimizer = CHAIN.bind([{"params": list(model.parameters()), **own}])
    train(model, optimizer, range(2))
    assert {name: optimizer.param_groups[0][name] for name in own} == own
    again = CHAIN.bind(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert {name: again.param_groups[0][name] for name in own} == own
    assert {name: copy.deepcopy(optimizer).param_groups[0][name] for name in own} == own


def test_entries_of_a_live_optimizer_are_kept():
    live = torch.optim.AdamW([{"params": list(net().parameters()), "lr_scale": 0.5}], lr=0.1)
    group = Hyper(live).stack(Adam).bind().param_groups[0]
    assert group["lr_scale"] == 0.5
    assert "foreach" not in group


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_the_groups_of_torchs_own_optimizer_can_be_bound(kind):
    groups = kind(net().parameters(), lr=0.02).param_groups
    assert float(Hyper(getattr(hyperopt, kind.__name__)).stack(Adam).bind(groups).param_groups[0]["lr"]) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"momentum": 0.9}, "unknown entry 'momentum': Adam has lr"),  # of another rule
        ({"wieght_decay": 0.1}, "unknown entry 'wieght_decay': write 'weight_decay'"),
        ({"learning_rate": 0.1}, "unknown entry 'learning_rate'"),
        ({"learn": "lr"}, "unknown entry 'learn'"),  # of a whole tower
        ({"amsgrad": True}, "unknown entry 'amsgrad': the whole tower has False"),
        ({"maximize": True}, "unknown entry 'maximize': the whole tower has False"),
        ({"decoupled_weight_decay": True}, "unknown entry 'decoupled_weight_decay': the whole tower has False"),
        ({"tower": {}}, "unknown entry 'tower'"),
        ({"differentiable": True}, "not part of an autograd graph"),
    ],
)
def test_an_entry_that_would_be_ignored_although_it_means_something_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        Hyper(Adam).bind([{"params": list(net().parameters()), **entry}])


def test_lr_scale_is_followed_as_timms_schedulers_do_it():
    model = net()
    groups = [{"params": [p], "lr_scale": 0.5**i} for i, p in enumerate(model.parameters())]
    optimizer = Hyper(SGD, lr=1.0).stack(SGD).bind(groups)
    for step in range(3):
        lr = 0.1 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, step)
        optimizer.step()
        for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
            torch.testing.assert_close(p.detach(), old - lr * 0.5**i * p.grad)


# ---- checkpoints


def storages(saved):
    """Of every tensor in a nest: where its storage is, and whether all of it is the tensor's."""
    if isinstance(saved, dict):
        saved = list(saved.values())
    if isinstance(saved, list):
        return [found for value in saved for found in storages(value)]
    if not isinstance(saved, torch.Tensor):
        return []
    return [(saved.untyped_storage().data_ptr(), saved.untyped_storage().nbytes() == saved.nbytes)]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "tower", [CHAIN, Hyper(ScheduleFree(Adam), learn=("lr", "beta1")).stack(Adam), Hyper(SGD, per="tensor").stack(SGD)], ids=str
)
def test_saved_tensors_share_no_storage(tower, compile, graphs):
    model = net()
    optimizer = tower.bind(model.parameters(), compile=compile)
    train(model, optimizer, range(3))
    found = storages(optimizer.state_dict())
    assert len(found) > 10
    assert len({place for place, _ in found}) == len(found)
    assert all(alone for _, alone in found)
    assert not all(alone for _, alone in storages(list(optimizer.state.values())))  # while training they do


def test_safetensors_saves_the_state(tmp_path):
    save = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = net()
    optimizer = CHAIN.bind(model.parameters())
    train(model, optimizer, range(3))
    flat = {f"{i}.{key}": value for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    save.save_file(flat, tmp_path / "state.safetensors")
    again = save.load_file(tmp_path / "state.safetensors")
    assert differences(flat, again) == []


# ---- what torch's own tests ask of any optimizer


@every_tower
def test_the_loss_goes_down_with_and_without_a_scheduler(tower):
    for make in (None, lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.9), torch.optim.lr_scheduler.ReduceLROnPlateau):
        model = net()
        optimizer = tower.bind(model.parameters())
        scheduler = make(optimizer) if make else None
        first = loss_at(model, 0).item()
        for _ in range(20):
            backward(model, 0)
            optimizer.step()
            if scheduler is not None:
                scheduler.step(*([loss_at(model, 0).detach()] if make is torch.optim.lr_scheduler.ReduceLROnPlateau else []))
        assert loss_at(model, 0).item() < first


@every_tower
def test_no_gradient_is_no_step_and_zero_gradients_move_no_weights(tower):
    if getattr(tower.rule, "weight_decay", 0):
        tower = tower.replace(weight_decay=0)
    model = net()
    optimizer = tower.bind(model.parameters())
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert not optimizer.state_dict()["state"] or not any(float(s["t"]) for s in optimizer.state_dict()["state"].values())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert differences(before, copy.deepcopy(model.state_dict())) == []
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@every_tower
def test_non_contiguous_and_empty_parameters(tower):
    torch.manual_seed(0)
    whole = torch.randn(6, 4, 2)
    x = [nn.Parameter(whole[..., 0]), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))]
    y = [nn.Parameter(p.detach().clone().contiguous()) for p in x]
    for params in (x, y):
        optimizer = tower.bind(params)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
    assert not x[0].is_contiguous()
    for a, b in zip(x, y, strict=True):
        torch.testing.assert_close(a.detach(), b.detach())


@every_tower
def test_state_dicts_are_equal_for_equal_runs_and_are_read_with_weights_only(tower):
    runs = []
    for _ in range(2):
        model = net()
        optimizer = tower.bind(model.named_parameters())
        train(model, optimizer, range(3))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        runs.append((model, optimizer, torch.load(file, weights_only=True)))
    assert differences(runs[0][2], runs[1][2]) == []
    model, _, saved = runs[0]
    again = tower.bind(model.parameters())  # without names
    kept = copy.deepcopy(saved)
    again.load_state_dict(saved)
    assert differences(saved, kept) == []
    train(model, again, range(3, 5))
    train(*runs[1][:2], range(3, 5))
    assert differences(copy.deepcopy(model.state_dict()), copy.deepcopy(runs[1][0].state_dict())) == []


def test_hooks_run_and_may_change_what_is_saved():
    model = net()
    optimizer, calls = CHAIN.bind(model.parameters()), []
    optimizer.register_step_pre_hook(lambda o, *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda o, *_: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: {**saved, "param_groups": saved["param_groups"]})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    optimizer.load_state_dict(saved)
    assert calls == ["before", "after", "saving", "loaded"]


@pytest.mark.parametrize("tower", [Hyper(Adam), CHAIN], ids=str)
def test_a_copy_has_all_public_attributes(tower):
    optimizer = tower.bind(net().parameters())

    def public(o):
        return {name for name in vars(o) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


def test_defaults_are_those_of_level_0():
    assert CHAIN.bind(net().parameters()).defaults["lr"] == 1e-3


def test_weight_decay_of_one_group_alone():
    model = net()
    weights, biases = [[p for p in model.parameters() if p.dim() == d] for d in (2, 1)]
    optimizer = Hyper(SGD, lr=0.1).bind([{"params": weights, "weight_decay": 0.5}, {"params": biases}])
    before = [p.detach().clone() for p in weights + biases]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(weights + biases, before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.95 if p.dim() == 2 else 1))


# ---- torch's own table: every input that torch tests its optimizers with, given to the rule of the same name


def torchs_table():
    pytest.importorskip("expecttest", reason="torch's tables of optimizers need expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_optimizers
    names = vars(hyperopt).keys() - {"Muon"}  # which torch computes in bfloat16: it is compared in test_muon.py
    return [info for info in common_optimizers.optim_db if info.optim_cls.__name__ in names]


def test_every_input_of_torchs_table_gives_the_same_weights():
    compared = 0
    for info in torchs_table():
        flags = [{}, *({flag: True} for flag in info.supported_impls if flag in ("foreach", "fused"))]
        for given in info.optim_inputs_func("cpu"):
            for extra in flags:
                made = []
                for make in (lambda p: info.optim_cls(p, **given.kwargs), lambda p: Hyper(info.optim_cls, **given.kwargs, **extra).bind(p)):  # noqa: B023
                    model = net(torch.float64)
                    train(model, make(model.parameters()), range(7))
                    made.append([p.detach() for p in model.parameters()])
                torch.testing.assert_close(made[1], made[0], msg=lambda m: f"{info.name}({given.kwargs}): {m}", rtol=1e-9, atol=1e-10)  # noqa: B023
                compared += 1
    assert compared > 50


# Of torch's table of errors, what is none here, and why.
NO_ERROR = {
    "beta2 should be between 0 and 1": "Adamax, with beta2 = 1: u is then the largest gradient so far",
    "lr as Tensor doesn't work with foreach & not capturable": "flags are ignored, and a tensor is read once",
    "betas must be either both floats or both Tensors": "a tensor is read once",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "flags are ignored, and a tensor is read once",
}


def test_every_error_of_torchs_table_is_an_error_or_says_why_not():
    compared = 0
    for info in torchs_table():
        for error in info.optim_error_inputs_func("cpu", torch.float32):
            given = error.optimizer_error_input
            params = [nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
            if given.desc in NO_ERROR:
                Hyper(info.optim_cls, **given.kwargs).bind(params)
                continue
            expected = (ValueError, TypeError) if error.error_type in (UserWarning, RuntimeError) else error.error_type
            with pytest.raises(expected):
                Hyper(info.optim_cls, **given.kwargs).bind(params)
            compared += 1
    assert compared > 40
