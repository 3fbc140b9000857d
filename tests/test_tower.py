"""`Hyper`: stacking, text, and every error that can be made at construction."""

import copy
import math
import pickle
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyperopt import (
    ADOPT,
    SGD,
    Adam,
    AdamW,
    AdaShift,
    Averaged,
    Ball,
    Box,
    Exponent,
    Hyper,
    Interval,
    Muon,
    Positive,
    Real,
    Rule,
    ScheduleFree,
    SpikeAwareAdam,
    UnitInterval,
    hyper,
)
from hyperopt.feasible import Feasible
from hyperopt.spec import arguments, level
from hyperopt.spec.text import read_set

# ---- structure


def test_height_and_levels_of_a_chain():
    chain = Hyper(Adam).stack(SGD).stack(Adam)
    assert [Hyper(Adam).height, chain.height] == [0, 2]
    assert str(chain) == "Adam / SGD / Adam"
    assert list(chain.above) == [("lr",)]
    assert chain.learned == ("lr",)


def test_stack_puts_a_level_on_every_branch_of_a_tree():
    tree = Hyper(Adam).stack(lr=Hyper(Adam), beta1=SGD).stack(SGD)
    assert str(tree) == "Adam / {lr: Adam / SGD, beta1: SGD / SGD}"
    assert tree.height == 2
    assert tree.learned == ("lr", "beta1")
    assert tree.is_tree()


def test_stack_takes_a_tower_whole():
    assert str(Hyper(SGD).stack(Hyper(Adam).stack(SGD))) == "SGD / Adam / SGD"


def test_a_single_branch_is_a_chain():
    assert Hyper(Adam).stack(beta1=SGD).learned == ("beta1",)
    assert not Hyper(Adam).stack(beta1=SGD).is_tree()


def test_a_step_size_for_each_hyperparameter_says_what_is_learned():
    two = Hyper(Adam).stack(SGD, lr={"lr": 1e-5, "beta1": 1e-4})
    assert two.learned == ("lr", "beta1")
    optimizer = two.bind([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.hyperparameters()["1.lr"].tolist() == pytest.approx([1e-5, 1e-4])


def test_learn_all_leaves_out_what_lies_on_the_boundary():
    assert Hyper(Adam, learn="all").learned == ("lr", "beta1", "beta2", "eps")
    assert Hyper(Adam, learn="all", weight_decay=0.1).learned == ("lr", "beta1", "beta2", "eps", "weight_decay")
    assert Hyper(SGD, learn="all").learned == ("lr",)
    assert Hyper(SGD, learn="all", momentum=0.9).learned == ("lr", "momentum")
    assert Hyper(SGD, learn="lr").learned == ("lr",)


def test_torch_optimizers_are_mapped_to_rules():
    assert Hyper(torch.optim.Adam) == Hyper(Adam)
    assert Hyper(torch.optim.SGD, momentum=0.9) == Hyper(SGD, momentum=0.9)
    assert Hyper(torch.optim.AdamW) == Hyper(AdamW) == Hyper(Adam, weight_decay=1e-2, decoupled=True)
    assert str(Hyper(torch.optim.Adam).stack(torch.optim.SGD)) == "Adam / SGD"


def test_a_rule_instance_and_a_class_with_keywords_are_the_same():
    assert Hyper(Adam(lr=0.1)) == Hyper(Adam, lr=0.1)
    assert Hyper(Adam(lr=0.1), beta1=0.5) == Hyper(Adam, lr=0.1, beta1=0.5)


def test_rules_of_the_same_name_make_towers_that_differ():
    mine = dataclass(frozen=True)(type("SGD", (SGD,), {}))
    assert Hyper(mine) != Hyper(SGD)
    assert Hyper(SGD).stack(mine) != Hyper(SGD).stack(SGD)
    assert Hyper(SGD).stack(mine) == Hyper(SGD).stack(mine) != "SGD / SGD"


def test_betas_stand_for_beta1_and_beta2():
    both = Hyper(Adam, betas=(0.8, 0.95))
    assert (both.rule.beta1, both.rule.beta2) == (0.8, 0.95)
    assert both == Hyper(Adam, beta1=0.8, beta2=0.95)


def value_of(text: str, key: str) -> float:
    return float(Hyper.parse(text).bind([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]).hyperparameters()[key])


def test_default_step_sizes_above_level_0():
    assert value_of("SGD / Adam / SGD", "0.lr") == 1e-3
    assert value_of("SGD / Adam / SGD", "1.lr") == 0.1
    assert value_of("SGD / Adam / SGD", "2.lr") == 1.0
    assert value_of("Adam / Adam(lr=0.001)", "1.lr") == 1e-3
    assert value_of("Adam / {lr: SGD, beta1: Adam}", "1[beta1].lr") == 0.1
    # 1e-3 is what Adam has at level 0, and yet it was asked for.
    assert str(Hyper(Adam).stack(Adam, lr=1e-3)) == "Adam / Adam(lr=0.001)"
    assert str(Hyper(Adam, lr=1e-3).stack(Adam, lr=0.1)) == "Adam / Adam"


def test_default_trust_and_horizon():
    chain = Hyper(Adam).stack(SGD)
    (above,) = chain.above.values()
    assert (chain.horizon_of("lr"), chain.trust_at(0), above.trust_at(1)) == (1000, 0.03, level.TRUST_ABOVE)
    assert Hyper(Adam, trust=None).trust_at(0) is None
    averaging = Hyper(ScheduleFree(Adam))
    assert (averaging.horizon_of("lr"), averaging.trust_at(0), averaging.trust_at(1)) == (500, 0.1, level.TRUST_ABOVE)
    assert str(Hyper(ScheduleFree(Adam), horizon=1000)) == "ScheduleFree(Adam)(horizon=1000)"


def horizons(tower: Hyper) -> dict[str, float]:
    return {name: tower.horizon_of(name) for name in tower.rule.declared()}


def test_a_horizon_for_each_hyperparameter():
    """What the user gives wins over what the rule declares, and that over the default of the rule's class."""
    adam = {"lr": 1000, "beta1": 1, "beta2": 1, "eps": 1000, "weight_decay": 1000}
    assert horizons(Hyper(Adam)) == adam
    assert horizons(Hyper(Adam, horizon=30)) == dict.fromkeys(adam, 30)
    given = Hyper(Adam, learn=("lr", "beta1"), horizon={"beta1": np.float64(5.0)})
    assert horizons(given) == adam | {"beta1": 5}
    assert str(given) == "Adam(learn=(lr, beta1), horizon={beta1: 5.0})"
    # Once more above level 0, and for each of the branches of a tree.
    chain = (
        Hyper(Adam)
        .stack(Adam, learn="all", horizon={"beta1": 3})
        .stack(lr=SGD, beta1=Hyper(Adam, learn="beta2", horizon={"beta2": 9}).stack(SGD))
    )
    (upper,) = chain.above.values()
    assert (horizons(upper), horizons(upper.above["beta1",])["beta2"]) == (adam | {"beta1": 3}, 9)


@pytest.mark.parametrize(
    ("rule", "declared"),
    [
        (ScheduleFree(Adam), {"lr": 500, "beta1": 500, "beta2": 1, "eps": 500}),
        (ScheduleFree(SGD), {"lr": 500, "beta1": 500}),
        (Averaged(Adam), {"lr": 1000, "beta1": 1, "decay": 1000}),
        (Averaged(SGD), {"momentum": 1}),
        (Muon | Adam, {"lr": 1000, "momentum": 1, "beta1": 1, "beta2": 1, "weight_decay": 1000}),
        (ScheduleFree(Muon | Adam), {"lr": 500, "beta1": 500, "beta2": 1}),
        (ADOPT, {"beta1": 1, "beta2": 10, "clip": 10}),
        (Exponent, {"beta2": 1, "eta": 1, "p": 1, "eps": 1000}),
        (SpikeAwareAdam, {"beta2": 1, "clip": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_composition_has_the_horizons_of_its_parts(rule, declared):
    found = horizons(Hyper(rule))
    assert {name: found[name] for name in declared} == declared


def test_a_rule_declares_a_horizon_of_at_least_one_step():
    with pytest.raises(ValueError, match=r"hyper\(horizon\) = 0.5 is outside \[1, inf\]: give a number of steps"):
        hyper(0.9, UnitInterval(), horizon=0.5)


def test_the_structure_says_one_horizon_where_all_are_equal():
    """Checkpoints that were written when a level had one horizon go on to be read."""
    for tower in (Hyper(Adam).stack(Adam), Hyper(Adam, learn="all", horizon=1000).stack(Adam)):
        assert tower.structure().count("horizon 1000; learned: lr") == 1
        assert "horizon 1000; learned: nothing" in tower.structure()
    mixed = Hyper(Adam, learn=("lr", "beta1")).stack(Adam)
    assert "horizon 1000 of lr, 1 of beta1; learned" in mixed.structure()


def test_a_tower_is_immutable_and_reusable():
    base = Hyper(Adam, domains={"lr": Real()})
    with pytest.raises(AttributeError, match="replace"):
        base.horizon = 1
    assert base.stack(SGD) is not base
    assert (base.height, base.learn, str(base)) == (0, None, "Adam(domains={lr: Real})")
    chain = Hyper(Adam).stack(SGD)
    first, second = (chain.bind([torch.nn.Parameter(torch.ones(2))]) for _ in range(2))
    first.param_groups[0]["lr"].fill_(5)
    assert second.hyperparameters()["0.lr"] == pytest.approx(1e-3)
    assert str(chain) == "Adam / SGD"


def test_a_tower_does_not_share_what_it_was_made_from():
    domains = {"lr": Real()}
    made = Hyper(SGD, domains=domains)
    domains["lr"] = Positive()
    assert made.domain("lr") == Real()
    steps = {"lr": 0.5}
    made = Hyper(SGD).stack(SGD, lr=steps)
    steps["lr"] = 7.0
    assert str(made).endswith("SGD(lr={lr: 0.5})")


def test_towers_compare_hash_copy_and_pickle():
    made = Hyper(Adam, lr=0.1).stack(lr=SGD, beta2=Adam)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), Hyper.parse(str(made))):
        assert again == made
        assert hash(again) == hash(made)
    assert made != Hyper(Adam).stack(lr=SGD, beta2=Adam)


def test_replace_and_held():
    chain = Hyper(Adam, learn=("lr", "beta1")).stack(SGD)
    assert str(chain.replace(lr=0.2)) == "Adam(lr=0.2, learn=(lr, beta1)) / SGD"
    assert str(chain.held(lr=0.2, beta1=0.5)) == "Adam(lr=0.2, beta1=0.5)"


# ---- text


def facts(node: Hyper, level: int = 0) -> list:
    """Everything that decides what a tower does."""
    above = {names: facts(upper, level + 1) for names, upper in node.above.items()}
    learned = (node.learned, {n: node.domain(n) for n in node.rule.declared()}) if node.above or node.learn is not None else None
    options = (node.horizon, horizons(node), node.trust_at(level), node.per, node.strategy, node.maximize, node.domains)
    return [node.rule_at(level), learned, options, above]


TEXTS = [
    "Adam",
    "Adam / SGD",
    "Adam(lr=0.002, beta2=0.5) / SGD(lr=1e-05)",
    "SGD(momentum=0.9, nesterov=True) / Adam / SGD / Adam",
    "Adam(weight_decay=0.01, decoupled=True, bias_correction=False)",
    "Adam(horizon=inf, trust=None) / SGD(trust=0.1)",
    "Adam(horizon=1) / SGD(horizon=2.5)",
    "Adam(horizon={lr: inf, beta1: 3}) / {lr: SGD, beta1: Adam(learn=(eps,), horizon={eps: 1.5}) / SGD}",
    "Adam(learn=all) / SGD",
    "Adam(learn=(lr, beta1)) / SGD(lr={lr: 1e-05, beta1: 0.0001})",
    "Adam(learn=(beta1,)) / SGD",
    "SGD(domains={lr: Real}) / SGD(domains={lr: Interval(0.0, 2.0)})",
    "SGD(maximize=True) / SGD",
    "Adam(per=tensor) / SGD",
    "Adam(per=coordinate, strategy=graph, horizon=1) / SGD",
    "Adam / {lr: Adam(lr=0.5) / SGD, beta1: SGD}",
    "Adam / {lr: Adam / {lr: SGD, beta1: Adam}, beta2: SGD(trust=None) / SGD}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(text):
    made = Hyper.parse(text)
    again = Hyper.parse(str(made))
    assert again == made
    assert facts(again) == facts(made)
    # The options' order is the library's own; nothing else of a text in canonical numbers changes.
    assert sorted(str(made)) == sorted(text)


def test_text_agrees_with_what_was_written_in_python():
    pairs = {
        "Adam(lr=0.001) / SGD(lr=1e-5)": Hyper(Adam, lr=0.001).stack(SGD, lr=1e-5),
        "Adam(learn=all, horizon=inf) / SGD": Hyper(Adam, learn="all", horizon=math.inf).stack(SGD),
        "Adam(learn=(lr, beta1)) / SGD(lr={lr: 1, beta1: 2})": Hyper(Adam).stack(SGD, lr={"lr": 1, "beta1": 2}),
        "SGD / {lr: SGD / Adam}": Hyper(SGD).stack(lr=Hyper(SGD).stack(Adam)),
        "SGD(momentum=.5) / {lr: SGD, momentum: Adam} / SGD": Hyper(SGD, momentum=0.5).stack(lr=SGD, momentum=Adam).stack(SGD),
        "Adam(betas=(0.5, 0.6))": Hyper(Adam, betas=(0.5, 0.6)),
        "AdamW": Hyper(AdamW),
        " Adam/SGD ": Hyper(Adam).stack(SGD),
        "SGD(domains={lr: Positive, weight_decay: UnitInterval()})": Hyper(SGD, domains={"lr": Positive(), "weight_decay": UnitInterval()}),
        "SGD(domains={momentum: Interval(-1, 1)})": Hyper(SGD, domains={"momentum": Interval(-1, 1)}),
    }
    for text, made in pairs.items():
        assert facts(Hyper.parse(text)) == facts(made), text


def test_values_of_numpy_are_printed_as_numbers():
    made = Hyper(Adam, lr=np.float64(0.25), horizon=np.float64(3.0)).stack(SGD, lr={"lr": np.float64(0.5)})
    assert facts(Hyper.parse(str(made))) == facts(made)


positive = st.one_of(st.floats(1e-12, 1e3), st.sampled_from([1e-3, 0.1, 1.0, 1e-8, 1]))
unit = st.floats(0.01, 0.999)
VALUES = {
    Adam: {"lr": positive, "beta1": unit, "beta2": unit, "eps": positive, "decoupled": st.booleans(), "bias_correction": st.booleans()},
    SGD: {"lr": positive, "momentum": unit, "weight_decay": positive},
}


@st.composite
def towers(draw, level=0):
    rule = draw(st.sampled_from([Adam, SGD]))
    keywords = draw(st.fixed_dictionaries({}, optional=VALUES[rule]))
    options = {
        "horizon": st.sampled_from([1, 2.5, 1000, math.inf, "default"]),
        "trust": st.one_of(st.none(), st.floats(1e-4, 1)),
        "prior": st.one_of(st.none(), st.floats(1, 1e4)),
        "per": st.sampled_from(arguments.PER),
        "strategy": st.just("tangents"),
        "domains": st.fixed_dictionaries({}, optional={"lr": st.sampled_from([Real(), Positive(), Interval(0, 2e3)])}),
    }
    if level == 0:
        options["maximize"] = st.booleans()
    keywords |= draw(st.fixed_dictionaries({}, optional=options))
    if draw(st.booleans()) and keywords.get("horizon") == 1:
        keywords["strategy"] = "graph"
    made = Hyper(rule, **keywords)
    above = draw(st.sampled_from(["none", "chain", "tree", "steps"])) if level < 3 else "none"
    names = draw(st.lists(st.sampled_from(Hyper(rule, learn="all", **keywords).learned), min_size=1, unique=True))
    if above == "chain":
        learn = draw(st.sampled_from([None, "all", tuple(names)]))
        made = Hyper(rule, learn=learn, **keywords).stack(draw(towers(level + 1)))
    if above == "tree":
        made = made.stack(**{name: draw(towers(level + 1)) for name in names})
    if above == "steps":
        made = made.stack(SGD, lr={name: draw(positive) for name in names})
    return made


@settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
@given(towers())
def test_text_round_trip_of_any_tower(made):
    again = Hyper.parse(str(made))
    assert str(again) == str(made)
    assert facts(again) == facts(made)
    assert again == made
    assert hash(again) == hash(made)
    assert again.structure() == made.structure()


NO_TOWERS = [
    "",
    "__import__('os')",
    "__import__('os').system('true')",
    "Adam(lr=__import__('os').getpid())",
    "Adam(lr=(lambda: 1)())",
    "Adam(lr=1 + 1)",
    "Adam(lr=[1][0])",
    "Adam(lr=0.1",
    "Adam(0.1)",
    "Adam(*a)",
    "Adam(**a)",
    "Adam(lr='0.1')",
    "Adam(lr=-1)",
    "Adam(lr=nan)",
    "Adam(lr=True)",
    "Adam(lr=None)",
    "Adam(lr=0.1, lr=0.2)",
    "Adam(rule=SGD)",
    "Adam(self=1)",
    "Adam(step=1)",
    "Adam(lr=1j)",
    "Adam(betas=0.9)",
    "Adam(betas=(0.9,))",
    "Adam(domains={lr: Interval(2, 1)})",
    "Adam(domains={lr: Interval(low=0, high=1)})",
    "Adam(domains={lr: Positive(low=1)})",
    "Adam(domains={lr: int})",
    "Adam(domains=3)",
    "Adam(learn=3)",
    "Adam(learn=(1, 2))",
    "Adam * SGD",
    "Adam / 3",
    "Adam / {}",
    "Adam / {**x}",
    "Adam / {1: SGD}",
    "Adam / {lr: SGD, lr: Adam}",
    "{lr: Adam} / SGD",
    "Adam / SGD / Lion9",
    "Hyper",
    "Rule",
    "Adam; SGD",
    "Adam / SGD # a comment\n/ SGD",
    "Adam\0",
    "(" * 300 + "Adam" + ")" * 300,
]


@pytest.mark.parametrize("text", NO_TOWERS)
def test_text_that_is_no_tower_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        Hyper.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", "'__import__' in .* is not a rule: there are .*SGD, .*Adam, AdamW"),
        ("Lion9 / SGD", "'Lion9' in 'Lion9 / SGD' is not a rule"),
        ("Adam(0.1)", r"every value needs its name, as in Adam\(lr=0.001\)"),
        ("Adam(lr=", "is not a tower.*write one as in 'Adam"),
        ("Adam(lr=2*3)", r"'2 \* 3' in .* is not a number, a name"),
        ("Adam(lr=-2)", r"Adam\(lr\) = -2 is outside its domain Positive\(\): give at least 0"),
    ],
)
def test_messages_of_parse(text, message):
    with pytest.raises(ValueError, match=message):
        Hyper.parse(text)


# ---- errors of construction: the argument, its value, the bound and the remedy


VALUE_ERRORS = [
    (lambda: Hyper.parse("SGD(momentum=0.9, nesterov=false)"), "nesterov.* must be True or False, got 'false'"),
    (lambda: Hyper(Adam, betas=(0.9, 0.99), beta1=0.5), "betas was given beside beta1 or beta2"),
    (lambda: Hyper(torch.optim.SGD([torch.ones(1)], lr=0.1), lr=0.5), "lr was given for a live optimizer.*its param_groups"),
    (lambda: Hyper(Adam, lr=-0.5), r"Adam\(lr\) = -0.5 is outside its domain Positive\(\): give at least 0"),
    (lambda: Hyper(SGD, lr=math.nan), r"SGD\(lr\) = nan is outside its domain"),
    (lambda: Hyper(SGD, lr=math.inf), r"SGD\(lr\) = inf is outside its domain"),
    (lambda: Hyper(Adam, beta1=1.5), r"Adam\(beta1\) = 1.5 is outside .*Interval\(low=0.0, high=1.0\): give between 0 and 1"),
    (lambda: Hyper(Adam, betas=(0.9, -0.1)), r"Adam\(beta2\) = -0.1 is outside"),
    (lambda: Hyper(Adam, beta2=1.0), "beta1 or beta2 = 1.*below 1, or bias_correction=False"),
    (lambda: Hyper(SGD, nesterov=True), "needs momentum > 0, got momentum = 0: give momentum=0.9"),
    (lambda: Hyper(SGD).stack(SGD, lr={"lr": -1.0}), r"SGD\(lr\) = -1.0 is outside its domain"),
    (lambda: Hyper(Adam, momentum=0.9), "Adam has no hyperparameter or option 'momentum': it has lr, beta1, beta2, eps"),
    (lambda: Hyper(SGD).stack(SGD, beta1=0.9), "SGD has no hyperparameter or option 'beta1': it has lr, momentum"),
    (lambda: Hyper(Adam).replace(momentum=0.9), "Adam has no hyperparameter or option 'momentum'"),
    (lambda: Hyper(SGD, betas=(0.9, 0.99)), "SGD has no hyperparameter or option 'beta"),
    (lambda: Hyper(Adam, learn="momentum"), "Adam has no hyperparameter 'momentum' to learn: it has lr, beta1"),
    (lambda: Hyper(Adam, learn=("lr", "gamma")), "Adam has no hyperparameter 'gamma' to learn: it has lr, beta1"),
    (lambda: Hyper(Adam).stack(gamma=SGD), "Adam has no hyperparameter 'gamma' to learn: it has lr, beta1"),
    (lambda: Hyper(Adam, learn=("lr", "lr")), "names a hyperparameter twice"),
    (
        lambda: Hyper(SGD, learn="momentum"),
        r"momentum = 0.0 of SGD cannot be learned.*the bound 0 of .*strictly inside, leave 'momentum' out of learn, or give domains",
    ),
    (lambda: Hyper(SGD).stack(lr=SGD, momentum=SGD), "momentum = 0.0 of SGD cannot be learned"),
    (lambda: Hyper(SGD, lr=0.0).stack(SGD), "lr = 0.0 of SGD cannot be learned.*the bound 0"),
    (lambda: Hyper(SGD, learn="momentum", momentum=1.0), "momentum = 1.0 of SGD cannot be learned.*the bound 1 of"),
    (lambda: Hyper(SGD, lr=3.0, domains={"lr": Interval(0, 2)}).stack(SGD), "lr = 3.0 of SGD cannot be learned.*the bound 2 of"),
    (lambda: Hyper(SGD, learn="all", lr=0.0).stack(SGD), "nothing can be stacked on SGD: learn='all' leaves no hyperparameter"),
    (lambda: Hyper(SGD, learn=()).stack(SGD), "nothing can be stacked on SGD"),
    (lambda: Hyper(SGD, horizon=0.5), r"horizon = 0.5 is outside \[1, inf\]: give a number of steps"),
    (lambda: Hyper(SGD, horizon={"lr": 0.5}), r"horizon\['lr'\] = 0.5 is outside \[1, inf\]: give a number of steps"),
    (lambda: Hyper(SGD, horizon={"lr": "long"}), r"horizon\['lr'\] = 'long' is outside \[1, inf\]"),
    (lambda: Hyper(SGD, horizon={"beta1": 1}), "horizon names 'beta1', which SGD does not have: it has lr, momentum"),
    (
        lambda: Hyper(SGD, momentum=0.9, learn="lr", horizon={"momentum": 1}),
        r"horizon names 'momentum' of SGD, which is not learned \(lr is\): add 'momentum' to learn, or leave it out of horizon",
    ),
    (lambda: Hyper(SGD, momentum=0.9, horizon={"momentum": 1}).stack(SGD), "horizon names 'momentum' of SGD, which is not learned"),
    (lambda: Hyper.parse("SGD(horizon={momentum: 1}) / SGD"), "horizon names 'momentum' of SGD, which is not learned"),
    (lambda: Hyper(Adam, strategy="graph", learn=("lr", "beta1"), horizon={"beta1": 1}), r"'graph' .*learn lr from, got horizon = 1000.0"),
    (lambda: Hyper(Adam, strategy="graph", horizon={"lr": 1}).stack(lr=SGD, eps=SGD), "'graph' .*learn eps from, got horizon = 1000.0"),
    (lambda: Hyper(SGD, horizon=math.nan), r"horizon = nan is outside \[1, inf\]"),
    (lambda: Hyper(SGD, horizon="long"), r"horizon = 'long' is outside \[1, inf\]"),
    (lambda: Hyper(SGD).stack(SGD, horizon=0), r"horizon = 0 is outside \[1, inf\]"),
    (lambda: Hyper(SGD, trust=0), "trust = 0 must be a positive number, or None"),
    (lambda: Hyper(SGD, prior=0.5), "prior = 0.5 must be a number of steps, at least 1, or None"),
    (lambda: Hyper(SGD, prior=True), "prior = True must be a number of steps"),
    (lambda: Hyper(SGD, prior="weak"), "prior = 'weak' must be a number of steps"),
    (lambda: Hyper(SGD, prior=math.inf), "prior = inf must be a number of steps"),
    (lambda: hyper(0.5, UnitInterval(), usual=1.0), r"hyper\(usual\) = 1.0 cannot be learned in"),
    (lambda: Hyper(SGD, trust=-0.1), "trust = -0.1 must be a positive number, or None"),
    (lambda: Hyper(SGD, trust=math.nan), "trust = nan must be a positive number, or None"),
    (lambda: Hyper(SGD, trust="much"), "trust = 'much' must be a positive number, or None"),
    (lambda: Hyper(SGD, strategy="graph"), r"strategy='graph' .*horizon = 1000.0: give horizon=1, or strategy='tangents'"),
    (lambda: Hyper(SGD, strategy="graph", horizon=2), "horizon = 2: give horizon=1"),
    (lambda: Hyper(SGD, strategy="vjp"), "strategy = 'vjp' is none of tangents, graph"),
    (lambda: Hyper(SGD, per="layer"), "per = 'layer' is none of group, tensor, coordinate"),
    (lambda: Hyper(SGD, domains={"momentun": Real()}), "domains names 'momentun', which SGD does not have: it has lr, momentum"),
    (lambda: Hyper(SGD).stack(SGD, maximize=True), "maximize=True belongs to level 0"),
    (lambda: Hyper(SGD).stack(Hyper(SGD, maximize=True)), "maximize=True belongs to level 0"),
    (lambda: Hyper(Adam).stack(lr=Hyper(SGD, maximize=True), beta1=SGD), "maximize=True belongs to level 0"),
    (lambda: Hyper(Adam, learn=("lr", "beta1")).stack(SGD, lr={"lr": 1.0, "eps": 1.0}), r"'lr', 'eps'.*\('lr', 'beta1'\) are learned"),
    (lambda: Hyper(Adam, learn="lr").stack(SGD, lr={"lr": 1.0, "beta1": 1.0}), "name the same"),
    (lambda: Hyper(Adam).stack(lr=Hyper(SGD, lr={"lr": 1.0, "beta1": 1.0}), beta2=SGD), "name the same"),
    (lambda: Hyper(Adam, learn=("lr", "beta1")).stack(lr=SGD, eps=SGD), "learn=.*does not match the branches"),
    (lambda: Hyper(torch.optim.LBFGS), "there is no rule for LBFGS: there are .*SGD, .*Adam"),
]


@pytest.mark.parametrize(("make", "message"), VALUE_ERRORS, ids=range(len(VALUE_ERRORS)))
def test_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TYPE_ERRORS = [
    (lambda: Hyper(SGD, momentum=0.9, nesterov="yes"), r"SGD\(nesterov\) must be True or False, got 'yes'"),
    (lambda: Hyper(SGD, maximize="yes"), "maximize must be True or False, got 'yes'"),
    (lambda: Hyper(SGD, learn=3), r"learn = 3 must be a name, names, or 'all'"),
    (lambda: Hyper(SGD, domains=[Real()]), "domains = .* must be a mapping from names to domains"),
    (lambda: Hyper(SGD).stack(Hyper(SGD), lr=0.1), "lr was given beside a finished level: write it there"),
    (lambda: Hyper.parse(3), "a tower is read from text such as 'Adam.*got 3"),
    (lambda: Hyper(SGD).bind("model"), r"got str: pass model.parameters\(\)"),
    (lambda: Hyper(SGD).bind([torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))]), "dtype torch.float8_e4m3fn cannot be trained"),
    (lambda: Hyper(Adam, lr="fast"), r"Adam\(lr\) must be a number, got 'fast'"),
    (lambda: Hyper(Adam, lr=True), r"Adam\(lr\) must be a number, got True"),
    (lambda: Hyper(Adam, lr=None), r"Adam\(lr\) must be a number, got None"),
    (lambda: Hyper(SGD, domains={"lr": "log"}), r"domains\['lr'\] must be a Domain such as Positive\(\) or Real\(\), got 'log'"),
    (lambda: Hyper(SGD, domains={"lr": Positive}), r"domains\['lr'\] must be a Domain such as Positive\(\)"),
    (lambda: Hyper(SGD, learn="lr", domains={"lr": Positive}), r"domains\['lr'\] must be a Domain such as Positive\(\)"),
    (lambda: Hyper(3), "a tower is built from rules such as Adam or SGD, got 3"),
    (lambda: Hyper("Adam"), "a tower is built from rules such as Adam or SGD, got 'Adam'"),
    (lambda: Hyper(Adam).stack(), r"stack\(\) needs an optimizer: .stack\(SGD\)"),
    (lambda: Hyper(Adam).stack(lr="SGD"), "a tower is built from rules"),
    (lambda: Hyper(Adam).stack(lr=1e-3), "a tower is built from rules|needs an optimizer"),
]


@pytest.mark.parametrize(("make", "message"), TYPE_ERRORS, ids=range(len(TYPE_ERRORS)))
def test_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_value_for_each_has_no_meaning_at_level_0():
    with pytest.raises((TypeError, ValueError), match=r"Adam\(?.*lr"):
        Hyper(Adam, lr={"lr": 0.1, "beta1": 0.1}).bind([torch.nn.Parameter(torch.ones(2))])


def test_betas_of_the_wrong_length_name_betas():
    with pytest.raises((TypeError, ValueError), match="betas"):
        Hyper(Adam, betas=(0.9,))
    with pytest.raises((TypeError, ValueError), match="betas"):
        Hyper(Adam, betas=0.9)


def test_real_makes_a_boundary_value_learnable_as_the_message_promises():
    # The remedy named for momentum = 0 must lead to a momentum that is learned, not to one that stays 0.
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5))
    optimizer = Hyper(SGD, lr=0.05, learn="momentum", domains={"momentum": Real()}, horizon=5).stack(SGD, lr=0.01).bind([w])
    for _ in range(6):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()
    assert optimizer.hypergradients()["0.momentum"] != 0
    assert optimizer.hyperparameters()["0.momentum"] > 0


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_hyper_every_must_be_a_whole_number(k):
    with pytest.raises(ValueError, match=r"hyper_every = .* must be a whole number of steps, at least 1"):
        Hyper(SGD).bind([torch.nn.Parameter(torch.ones(2))], hyper_every=k)


def test_a_rule_of_the_users_own_is_found_by_name():
    @dataclass(frozen=True)
    class Signed(Rule):
        lr: float = hyper(1e-3, Positive())

        def init(self, x):
            return {}

        def update(self, x, g, state, h, t):
            return x - h.lr * g.sign(), {}

    made = Hyper(Signed, lr=0.1).stack(Adam)
    assert str(made) == "Signed(lr=0.1) / Adam"
    assert Hyper.parse(str(made)) == made


# ---- text that was never meant to be read: no other error than ValueError, and soon


HUGE = {
    "brackets": "(" * 5000,
    "calls": "Adam(" * 5000,
    "levels": "Adam / " * 5000 + "Lion9",
    "more levels": "Adam / " * 14_000,
    "levels in brackets": "Adam / (" * 150 + "Lion9" + ")" * 150,
    "branches": "Adam / {lr: " * 150 + "Lion9" + "}" * 150,
    "signs": "Adam(lr=" + "-" * 5000 + "1)",
    "a few hundred signs": "Adam(lr=" + "-" * 901 + "1)",
    "compositions": "ScheduleFree(" * 150 + "Adam" + ")" * 150,
    "products": "Adam * " * 900 + "Adam",
    "powers": "Adam" + " ** Adam" * 900,
    "mappings": "Adam(lr=" + "{lr: " * 90 + "1" + "}" * 91,
    "a long name": "A" * 1_000_000,
    "a long text": "Adam" * 300_000,
    "an integer": "Adam(lr=" + "9" * 400 + ")",
    "an integer of more digits than Python prints": "Adam(lr=" + "9" * 10_000 + ")",
    "an integer in hexadecimal": "Adam(lr=0x" + "f" * 10_000 + ")",
    "an integer for a name": "Adam / {0x" + "f" * 10_000 + ": Adam}",
    "an integer in a domain": "Adam(domains={lr: Interval(0, " + "9" * 400 + ")})",
    "an integer for trust": "Adam(trust=" + "9" * 400 + ")",
    "keywords": "Adam(" + ", ".join(f"x{i}=1" for i in range(9000)) + ")",
    "the same keyword": "Adam(" + "lr=1, " * 9000 + ")",
    "the same branch": "Adam / {" + "lr: Adam, " * 9000 + "}",
    "doubling": "Adam" + " / {lr: Adam, beta1: Adam}" * 200 + " / Lion9",
    "a null byte": "Adam\0 / SGD",
    "half a character": "Adam\ud800",
    "spaces": "Adam" + " " * 200_000 + "/ ",
    "lines": "Adam\n" * 10_000,
    "text of an f-string": "f'{" + "(" * 150 + "1" + ")" * 150 + "}'",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_malformed_text_of_any_size_is_a_value_error(name):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r".") as caught:
        Hyper.parse(HUGE[name])
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 2000
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("text", ["Ball(" * 5000, "Ball(" + "-" * 5000 + "1)", "Ball(1)\0", "Ball(" + "9" * 400 + ")", "x" * 1_000_000])
def test_a_malformed_set_of_any_size_is_a_value_error(text):
    with pytest.raises(ValueError, match="project = "):
        read_set(text)


def test_an_integer_that_no_float_holds_is_infinite():
    assert Hyper(Adam, horizon=10**400) == Hyper(Adam, horizon=math.inf) == Hyper.parse("Adam(horizon=" + "9" * 400 + ")")
    for make in (lambda: Hyper(Adam, lr=10**400), lambda: Adam(lr=-(10**400)), lambda: Interval(0, 10**400), lambda: Ball(10**400)):
        with pytest.raises(ValueError, match=r"."):
            make()
    assert Box(-(10**400), 1) == Box(-math.inf, 1)


def test_a_high_chain_is_read_and_printed():
    text = "SGD" + " / SGD" * 700
    made = Hyper.parse(text)
    assert str(made) == text
    assert made == Hyper.parse(text)
    assert made.height == 700


def test_the_highest_tower_is_stacked_read_copied_and_compared_and_no_higher_one():
    made = Hyper(Adam)
    for _ in range(level.HIGHEST):
        made = made.stack(Adam)
    assert Hyper.parse(str(made)) == made
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        assert hash(again) == hash(made)
        assert again.structure() == made.structure()
    assert made.replace(lr=0.1) != made
    for higher in (lambda: made.stack(Adam), lambda: Hyper.parse(f"Adam / {made}"), lambda: Hyper(Adam).stack(made)):
        with pytest.raises(ValueError, match="1001 levels is too high: stack at most 1000"):
            higher()
    with pytest.raises(ValueError, match="height 1000 is too high to be bound: stack at most 200"):
        made.bind([torch.ones(3, requires_grad=True)])


@pytest.mark.slow
def test_the_highest_tower_that_is_bound_steps_and_is_copied():
    w = torch.ones(3, requires_grad=True)
    optimizer = Hyper.parse("Adam" + " / Adam" * level.BOUND).bind([w])

    def deep(function, frames=150):
        return deep(function, frames - 1) if frames else function()

    for _ in range(level.BOUND + 5):
        w.grad = torch.ones(3)
        deep(optimizer.step)
    assert optimizer.hyperparameters()[f"{level.BOUND - 1}.lr"] != Adam().lr
    assert repr(deep(lambda: copy.deepcopy(optimizer))) == repr(optimizer)


def test_the_deepest_branches_are_read_back_and_no_deeper_ones():
    made = Hyper(SGD)
    for _ in range(level.DEEPEST):
        made = Hyper(Adam).stack(lr=made, beta1=SGD)
    assert Hyper.parse(str(made)) == made
    with pytest.raises(ValueError, match="151 deep, is too deep: branch at most 150 times"):
        Hyper(Adam).stack(lr=made, beta1=SGD)


def test_branches_under_branches_are_read_soon():
    # Written out, this tower has 2^60 levels: the branches share them.
    text = "Adam" + " / {lr: Adam, beta1: Adam}" * 60
    made, again = Hyper.parse(text + " / SGD"), Hyper.parse(text).stack(SGD)
    assert made.learning == ("lr", "beta1")
    assert made == again != Hyper.parse(text + " / Adam")
    assert hash(made) == hash(again)
    assert copy.deepcopy(made) == made
    assert len(repr(made)) < 100
    for use in (lambda: str(made), lambda: made.structure(), lambda: made.bind([torch.ones(3, requires_grad=True)])):
        with pytest.raises(ValueError, match="is too large to be printed or bound, there may be 10,000"):
            use()


def test_a_tower_reads_back_with_defaults_that_were_given():
    for made in (
        Hyper(Adam).stack(Adam, lr=0.1),
        Hyper(Adam).stack(Adam, betas=(0.9, 0.999)),
        Hyper(Adam, lr=0.5, domains={"lr": Interval(-1, 5)}).stack(Adam),
        Hyper(Adam, domains={"lr": Positive(2)}).stack(Adam),
        Hyper(Adam(lr=np.float64(0.25))).stack(Adam),
        Hyper(AdaShift, n=np.int64(3)).stack(Adam),
    ):
        again = Hyper.parse(str(made))
        assert again == made
        assert hash(again) == hash(made)
        assert again.structure() == made.structure()


def test_betas_are_given_by_their_own_names():
    @dataclass(frozen=True)
    class Above(Adam):
        beta1: float = hyper(0.9, UnitInterval(), above=0.5)

    (above,) = Hyper(Adam).stack(Above, betas=(0.9, 0.99)).above.values()
    assert above.rule_at(1).beta1 == 0.9
    (above,) = Hyper(Adam).stack(Above).above.values()
    assert above.rule_at(1).beta1 == 0.5


def test_options_domains_and_sets_of_the_users_own_are_read():
    @dataclass(frozen=True)
    class Cube(Feasible):
        size: float
        centre: float = 0.0

        def project(self, ys, metrics):
            return ys

    @dataclass(frozen=True)
    class Half(Positive):
        """A domain with the same fields as its base, and a name of its own."""

    @dataclass(frozen=True)
    class Moded(SGD):
        mode: str = "fast"
        sizes: tuple = ()
        other: object = None

    for mode in ("fast", "slow", "two words", "inf", "None", "lambda", "Real", "'quoted'", "", "é", "1"):
        made = Hyper(Moded, mode=mode, sizes=(1, 2.5, "a"), other=-math.inf).stack(Adam)
        assert Hyper.parse(str(made)) == made
        assert Hyper.parse(str(made)).rule == made.rule
    made = Hyper(SGD, project=Cube(2.0), domains={"lr": Half(0.5), "momentum": Half()}).stack(Adam)
    assert str(made) == "SGD(domains={lr: Half(0.5), momentum: Half}, project=Cube(2.0)) / Adam"
    assert Hyper.parse(str(made)) == made
    assert Hyper.parse(str(made)).project == Cube(2.0)
    assert Hyper.parse("SGD(project=Cube(2, 1))").project == Cube(2.0, 1.0)
