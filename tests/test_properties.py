"""Random programs over every rule: whatever a user does, numbers stay sound, and what is refused changes nothing.

A program binds a tower to tensors of several shapes and dtypes, and takes steps with all kinds of gradients, between assignments, edits
of the weights and checkpoints. After each of its actions:

    errors          are raised by the library on purpose, and leave everything as it was
    hyperparameters are inside their domains, at every level
    a step          with a gradient that is not finite changes nothing at all, at any level
    finite numbers  stay finite, unless a user has asked for a step that no float holds

HYPEROPT_FUZZ is the number of programs, which are then new ones in every run; `make fuzz` sets it.
"""

import copy
import math
import os
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import differences
from torch import Tensor, nn

import hyperopt
from hyperopt import SGD, Adam, AdamW, Averaged, Ball, Box, Hyper, Lion, Muon, Padam, RMSprop, ScheduleFree, rules

COUNT = int(os.environ.get("HYPEROPT_FUZZ", "0"))
HEIGHTS = range(4)
SETTINGS = settings(
    max_examples=COUNT // len(HEIGHTS) or 250,
    derandomize=not COUNT,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
LIBRARY = str(Path(hyperopt.__file__).parent)

AVERAGING = [
    ScheduleFree(Adam),
    ScheduleFree(SGD),
    ScheduleFree(RMSprop),
    ScheduleFree(Lion),
    ScheduleFree(Muon | Adam),
    Averaged(Adam),
    Averaged(SGD),
]
RULES: list[tuple[Any, tuple[str, ...]]] = [(case.rule, case.learnable) for case in CASES]
RULES += [(rule, ("lr", "weight_decay") if rule is AdamW else ("lr",)) for rule in (Adam, AdamW, SGD, Padam, Muon, Muon | Adam, *AVERAGING)]
RULES += [(ScheduleFree(Adam)(forget=0.05, through=0.9), ("lr",)), (Averaged(Adam)(decay=0.9), ("lr", "decay"))]
ABOVE: list[Any] = [
    Adam,
    SGD,
    Hyper(SGD, lr=0.1, momentum=0.9),
    RMSprop,
    Lion,
    ScheduleFree(Adam),
    AdamW,
    *[case.rule for case in CASES[::4]],
]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (5, 1), (1, 7), (3, 0), (2, 3, 2), (17,)]
DTYPES = [torch.float32] * 6 + [torch.float64, torch.float64, torch.bfloat16, torch.float16]
VALUES = [0.0, 1e-30, 1e-4, 0.01, 0.5, 1.0, 3.0, -0.5, math.nan, math.inf, 10**400, "fast", True, None, [0.1]]
GRADIENTS = {
    "normal": 1.0,
    "tiny": 1e-30,
    "square": 1e20,
    "huge": 3e38,
    "zero": 0.0,
    "infinite": math.inf,
    "nan": math.nan,
}


def test_every_rule_of_the_catalogue_takes_part():
    known = {type(rule() if callable(rule) else rule).__name__ for rule, _ in RULES}
    for name in set(rules.__all__) - {"ScheduleFree", "Averaged"}:
        rule = getattr(rules, name)
        assert type(rule()).__name__ in known, name


# ---- programs


@dataclass
class Program:
    """What a user writes: a tower, parameters, and what is done with them."""

    text: list[str]
    tower: Any
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    groups: int
    options: dict[str, Any]
    actions: list[tuple[Any, ...]]
    wild: bool = field(default=False)  # whether numbers may overflow by what the user asked for


@st.composite
def programs(draw: Any, height: int) -> Program:
    rule, learnable = draw(st.sampled_from(RULES))
    keywords: dict[str, Any] = {}
    if height:
        keywords["learn"] = draw(st.sampled_from([None, None, learnable, learnable, "all"]))
    keywords["horizon"] = draw(st.sampled_from(["default", "default", 1, 10, math.inf]))
    keywords["trust"] = draw(st.sampled_from(["default", "default", "default", None]))
    keywords["prior"] = draw(st.sampled_from(["default", "default", 1, None]))
    keywords["per"] = draw(st.sampled_from(["group"] * 6 + ["tensor", "coordinate"]))
    keywords["project"] = draw(st.sampled_from([None] * 8 + [Box(-1, 1), Ball(3)]))
    keywords["maximize"] = draw(st.sampled_from([False] * 7 + [True]))
    levels = [draw(st.sampled_from(ABOVE)) for _ in range(height)]
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    mixed = draw(st.booleans())
    dtypes = [draw(st.sampled_from(DTYPES))] * len(shapes)
    if mixed:
        dtypes = [draw(st.sampled_from(DTYPES)) for _ in shapes]
    options = {"hyper_every": draw(st.sampled_from([1, 1, 1, 2])), "schedule": draw(st.sampled_from([False] * 7 + [True]))}
    groups = min(draw(st.sampled_from([1, 1, 2])), len(shapes))
    actions = draw(st.lists(action(len(shapes), groups), min_size=2, max_size=7))
    return Program([f"{rule} {keywords} {levels}"], (rule, keywords, levels), shapes, dtypes, groups, options, actions)


def action(tensors: int, groups: int) -> Any:
    kinds = st.sampled_from(["normal"] * 8 + [*GRADIENTS, "none", "sparse", "mixed"])
    step = st.tuples(st.just("step"), st.one_of(kinds.map(lambda k: [k] * tensors), st.lists(kinds, min_size=tensors, max_size=tensors)))
    plain = st.tuples(st.just("step"), st.just(["normal"] * tensors))
    name = st.sampled_from(["lr", "lr", "lr", "beta1", "beta2", "momentum", "weight_decay", "eps", "decay", "betas", "project"])
    assign = st.tuples(
        st.just("assign"),
        st.integers(0, groups - 1),
        name,
        st.sampled_from(VALUES),
        st.sampled_from(["value", "tensor", "vector", "in place"]),
    )
    edit = st.tuples(st.just("edit"), st.integers(0, tensors - 1), st.sampled_from([0.0, 1.0, -3.0, 1e15, 1e-30, 3e38, math.inf, math.nan]))
    others = st.sampled_from([("load",), ("copy",), ("held out",), ("averaged",), ("state",), ("loads", "other")])
    return st.one_of(plain, step, step, step, assign, edit, others)


class World:
    """A program under way."""

    def __init__(self, program: Program) -> None:
        rule, keywords, levels = program.tower
        tower = Hyper(rule, **keywords)
        for level in levels:
            tower = tower.stack(level)
        self.program, self.tower = program, tower
        generator = torch.Generator().manual_seed(len(program.shapes))
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape, dtype in zip(program.shapes, program.dtypes, strict=True)
        ]
        self.optimizer = self.bound(self.params)
        self.generator = generator
        self.wild = any(p.dtype == torch.float16 for p in self.params)

    def bound(self, params: list[Any]) -> Any:
        groups = [{"params": params[i :: self.program.groups]} for i in range(self.program.groups)]
        return self.tower.bind(groups, **self.program.options)

    def everything(self) -> dict[str, Any]:
        """Copies of what must survive an error, and a step that does not count."""
        optimizer = self.optimizer
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for group in groups:
            group["tower"] = {k: v for k, v in group["tower"].items() if k not in ("chunks", "held_out")}
        state = [dict(optimizer.state.get(p, {})) for p in self.params]
        kept = {"weights": [p.detach() for p in self.params], "groups": groups, "state": state}
        return copy.deepcopy(kept)

    def finite(self) -> bool:
        """Whether weights and their state, without tangents, are finite."""
        kept = [s for p in self.params for k, s in self.optimizer.state.get(p, {}).items() if not k.startswith("Z.")]
        return all(bool(t.isfinite().all()) for t in [p.detach() for p in self.params] + kept)

    # ---- what a user does

    def step(self, kinds: list[str]) -> None:
        for p, kind in zip(self.params, kinds, strict=True):
            p.grad = None
            if kind == "sparse":
                if p.dim() and p.numel():
                    p.grad = torch.ones_like(p).to_sparse()
            elif kind != "none":
                g = torch.randn(p.shape, generator=self.generator)
                if kind == "mixed":
                    size = torch.tensor(list(GRADIENTS.values())[:5])[torch.randint(5, p.shape, generator=self.generator)]
                else:
                    size = torch.tensor(GRADIENTS[kind])
                g = g if kind == "normal" else g.sign() * size if bool(size.isfinite().all()) else g * 0 + size
                p.grad = g.to(p.dtype)
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        sparse = any(g is not None and g.is_sparse for g in grads)
        usable = [g for g in grads if g is not None and not g.is_sparse]
        finite = all(bool(g.isfinite().all()) for g in usable)
        before, skipped, sound = self.everything(), self.optimizer.skipped, self.finite()
        self.optimizer.step()
        assert not sparse, "a sparse gradient was taken"
        assert [None if p.grad is None else 0 for p in self.params] == [None if g is None else 0 for g in grads]
        assert all(g is None or differences(p.grad, g) == [] for p, g in zip(self.params, grads, strict=True)), "a gradient was changed"
        added = self.optimizer.skipped["gradients"] - skipped["gradients"]
        assert added == (not finite), f"{added} steps were left out"
        if not finite:
            after = self.everything()
            for was, now in zip(before["groups"], after["groups"], strict=True):
                for kept in (was, now):
                    for count in ("calls", "skipped", "watched", "last", "nodes" if not was["tower"]["nodes"] else ""):
                        kept["tower"].pop(count, None)
            assert changed(before, after) == [], "a step that does not count changed something"
        elif sound and not self.wild:
            assert self.finite(), "finite numbers did not stay so"

    def assign(self, group: int, name: str, value: Any, how: str) -> None:
        entries = self.optimizer.param_groups[group]
        if name not in entries and name not in ("betas",):
            return
        had, good = name in entries, entries.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38
        if number and value > 1:
            self.wild = True
        if how == "in place" and isinstance(good, Tensor):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value == 10**400:
                return
            good.fill_(value)
        elif how in ("tensor", "vector") and isinstance(value, float):
            entries[name] = torch.full((3,) if how == "vector" else (), value)
        else:
            entries[name] = value
        try:
            self.step(["normal"] * len(self.params))
        except (TypeError, ValueError):
            if had:
                entries[name] = good
            else:
                del entries[name]
            raise

    def edit(self, tensor: int, value: float) -> None:
        with torch.no_grad():
            self.params[tensor].copy_(torch.tensor(value))
        if not abs(value) < 1e16:
            self.wild = True

    def load(self) -> None:
        saved = self.optimizer.state_dict()
        fresh = self.bound(self.params)
        fresh.load_state_dict(copy.deepcopy(saved))
        assert differences(fresh.hyperparameters(), self.optimizer.hyperparameters()) == []
        self.optimizer = fresh

    def copy(self) -> None:
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))

    def held_out(self) -> None:
        self.optimizer.hyper_backward(sum(p.float().square().sum() for p in self.params))

    def averaged(self) -> None:
        before = [p.detach().clone() for p in self.params]
        with self.optimizer.averaged():
            pass
        assert differences(before, [p.detach() for p in self.params]) == []

    def state(self) -> None:
        """Another tensor with the same numbers, in the place of each that a parameter has."""
        for p in self.params:
            record = self.optimizer.state.get(p, {})
            for key in list(record):
                record[key] = record[key].clone()

    def loads(self, _: str) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        del saved["param_groups"][0]["tower"]["nodes"]
        self.optimizer.load_state_dict(saved)
        raise AssertionError("a damaged checkpoint was loaded")

    def do(self, name: str, *arguments: Any) -> None:
        before = self.everything()
        try:
            getattr(self, name.replace(" ", "_"))(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            check_error(error)
            # Of what was assigned in place the number stays, unless it is refused.
            assert changed(before, self.everything()) == [], f"after an error: {error}"  # noqa: PT017
        self.check_domains()

    def check_domains(self) -> None:
        for group in self.optimizer._groups():
            for node in group.nodes.values():
                for name, h in node.hypers.own.items():
                    low, high = h.domain.bounds()
                    assert h.value.isfinite().all(), (name, h.value)
                    inside = (h.value > low) & (h.value < high) if h.learned else (h.value >= low) & (h.value <= high)
                    if name in node.hypers.watched or h.factor is not None:  # what was assigned on the boundary is used once
                        inside = (h.value >= low) & (h.value <= high)
                    assert inside.all(), (name, h.value)
                for names, x in node.hypers.above:
                    assert x.isfinite().all(), names


def changed(before: Any, after: Any) -> list[str]:
    """What of `before` is otherwise afterwards; what was added is nothing that was changed."""
    return [d for d in differences(before, after) if not d.endswith("on one side only") or lost(before, d)]


def lost(before: Any, path: str) -> bool:
    """Whether a path of `differences` exists in `before`."""
    value = before
    for part in path.removesuffix(" on one side only").replace("]", "").replace("[", ".").split("."):
        if part:
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                return False
    return True


def check_error(error: Exception) -> None:
    """An error is one that the library raises on purpose, and says what is wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(LIBRARY), f"an error of another library's: {error!r} in {last.filename}"
    assert (last.line or "").startswith("raise"), f"nobody meant to raise {error!r}"
    assert len(str(error)) > 10, error


def run(program: Program) -> World | None:
    try:
        world = World(program)
    except (TypeError, ValueError) as error:
        check_error(error)
        return None
    for name, *arguments in program.actions:
        world.do(name, *arguments)
    return world


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_programs(height: int) -> None:
    @SETTINGS
    @given(programs(height))
    def check(program: Program) -> None:
        run(program)

    check()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_programs_at_a_time() -> None:
    """In two threads, each ends where it does alone."""

    def end(program: Program) -> Any:
        world = run(program)
        return world and (world.everything(), world.optimizer.hyperparameters())

    @settings(SETTINGS, max_examples=COUNT // 20 or 20)
    @given(programs(1), programs(2))
    def check(one: Program, other: Program) -> None:
        both = one, other
        alone, found = [end(program) for program in both], [None, None]

        def work(i: int) -> None:
            try:
                found[i] = end(both[i])
            except BaseException as error:
                found[i] = error  # pyright: ignore[reportArgumentType]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert differences(alone, found) == []

    check()
