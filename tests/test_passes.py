"""The hand-written passes over the weights against the same step written plainly in float64, differentiated by torch."""

import ctypes
import itertools
import math
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyperopt import Muon
from hyperopt.body import functions
from hyperopt.body.functions import Column, Value, built, installed
from hyperopt.rules.muon import newton_schulz

BLOCK = 3000  # more than one piece in a block, more than one block in a tensor
CHUNKS = [[3, 7001], [1, 1024, 17]]  # sizes; the second chunk has taken seven steps already
SHARED = [[3, 40_001], [1, 1024, 17]]  # enough for two threads
FAR = [[3], [1_100_001]]  # enough for fetching ahead
STEPS = 5
RULES = ["plain", "averaged", "averaged untold", "free", "free, forgetting"]
NUMBERS = [Column.T, Column.WEIGHT, Column.ZWEIGHT, Column.MIX, Column.LAG, Column.LAG_SIZE, Column.DECAY]
KEEP = 0.9
FORGET, THROUGH = 0.3, 0.6

pytestmark = [
    pytest.mark.skipif(built() is None, reason="no compiler"),
    # The first dual number makes torch import a module that warns of a deprecation of torch's own.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning"),
]


@dataclass
class Case:
    """A direction, a rule, how weights decay, and whether lr is learned; `averaged untold` has no tangent of its average."""

    direction: str
    rule: str
    decaying: str
    learned: bool

    @property
    def decay(self) -> float:
        return 0.0 if self.decaying == "still" else 0.1

    @property
    def cautious(self) -> bool:
        return self.decaying in ("cautious", "bounded")

    @property
    def largest(self) -> float:
        return 0.8 if self.decaying == "bounded" else math.inf

    @property
    def forgets(self) -> bool:
        return self.rule.endswith("forgetting")

    def columns(self) -> list[Column]:
        free, mean = self.rule.startswith("free"), self.rule.startswith("averaged")
        have = {
            Column.X: True,
            Column.G: True,
            Column.D: self.direction == "given",
            Column.M: self.direction == "momentum",
            Column.V: self.direction != "given",
            Column.GAP: free,
            Column.AVERAGE: mean,
            Column.ZX: self.learned,
            Column.ZA: self.learned and (free or self.rule == "averaged"),
        }
        return [column for column, there in have.items() if there]


CASES = [
    Case(*case)
    for case in itertools.product(["given", "gradient", "momentum"], RULES, ["still", "decay", "cautious", "bounded"], [False, True])
    if case[1] != "averaged untold" or case[3]
]


def name(case: Case) -> str:
    rule = case.rule.replace(",", "").replace(" ", "-")
    return f"{case.direction}-{rule}-{case.decaying}-{'learned' if case.learned else 'fixed'}"


def unaligned(size: int) -> Tensor:
    return torch.zeros(size + 1)[1:]


@dataclass
class Hypers:
    lr: float
    beta: float
    rest1: float = 0.1
    rest2: float = 0.01
    eps: float = 1e-3
    rest_decay: float = 0.3


@dataclass
class Weights:
    """What the passes are handed: tensors column by column, the numbers of each chunk, and the table of all of them."""

    case: Case
    chunks: list[list[int]]
    tensors: dict[Column, list[Tensor]] = field(init=False)
    numbers: list[dict[Column, Tensor]] = field(init=False)
    sums: Tensor = field(default_factory=lambda: torch.full((6,), math.nan))

    def __post_init__(self) -> None:
        sizes = [size for chunk in self.chunks for size in chunk]
        self.tensors = {column: [unaligned(size) for size in sizes] for column in self.case.columns()}
        self.numbers = [{column: torch.zeros(()) for column in NUMBERS} for _ in self.chunks]
        for i, numbers in enumerate(self.numbers):
            numbers[Column.DECAY].fill_(self.case.decay / (1 + i))
        self.heads = torch.tensor([0, *itertools.accumulate(len(chunk) for chunk in self.chunks[:-1])])
        self.values = [torch.zeros(()) for _ in Value]
        blocks = [(i, at, min(BLOCK, size - at)) for i, size in enumerate(sizes) for at in range(0, size, BLOCK)]
        self.blocks = torch.tensor(blocks)
        self.partial = torch.full((6 * len(blocks),), math.nan, dtype=torch.float64)
        self.owner = [i for i, chunk in enumerate(self.chunks) for _ in chunk]
        rows = [[self._pointer(column, i) for i in range(len(sizes))] for column in Column]
        self.table = (ctypes.c_void_p * (len(Column) * len(sizes)))(*itertools.chain(*rows))
        self.pointers = (ctypes.c_void_p * len(Value))(*(value.data_ptr() for value in self.values))

    def _pointer(self, column: Column, i: int) -> int | None:
        if column not in NUMBERS:
            return self.tensors[column][i].data_ptr() if column in self.tensors else None
        free = Column.GAP in self.tensors and (column != Column.ZWEIGHT or (self.case.learned and not self.case.forgets))
        free = free and (self.case.forgets or column not in (Column.LAG, Column.LAG_SIZE))
        there = self.case.decay != 0 if column == Column.DECAY else free or column == Column.T
        return self.numbers[self.owner[i]][column].data_ptr() if there else None

    def set(self, h: Hypers) -> None:
        options = [*([FORGET, THROUGH] if self.case.forgets else [0.0, 1.0]), float(self.case.cautious), self.case.largest]
        for value, number in zip(self.values, [h.rest1, h.rest2, h.eps, h.beta, h.rest_decay, *options], strict=True):
            value.fill_(number)

    def look(self, measure: int, threads: int = 1) -> list[float]:
        table = len(self.blocks), self.blocks.data_ptr(), len(self.owner), ctypes.addressof(self.table), ctypes.addressof(self.pointers)
        passes().look(threads, measure, *table, self.partial.data_ptr(), self.sums.data_ptr())
        return self.sums.tolist()

    def take(self, ok: float, lr: float, keep: float, threads: int = 1, behind: float = 0.0) -> None:
        table = len(self.blocks), self.blocks.data_ptr(), len(self.owner), ctypes.addressof(self.table), ctypes.addressof(self.pointers)
        orders, heads = torch.tensor([ok, lr, keep, behind]), self.heads
        passes().take(threads, *table, len(heads), heads.data_ptr(), orders.data_ptr(), self.partial.data_ptr(), self.sums.data_ptr())

    def everything(self) -> Iterator[tuple[str, Tensor]]:
        for column, tensors in self.tensors.items():
            yield from ((f"{column.name}[{i}]", t) for i, t in enumerate(tensors))
        for i, numbers in enumerate(self.numbers):
            yield from ((f"{column.name} of chunk {i}", t) for column, t in numbers.items())
        yield "sums", self.sums


def passes() -> ctypes.CDLL:
    found = built()
    assert found is not None
    return found


def started(case: Case, chunks: list[list[int]] = CHUNKS) -> Weights:
    """Weights of which the first chunk has taken no step yet and the second has taken seven, with tangents of their own."""
    made, at = Weights(case, chunks), torch.Generator().manual_seed(0)
    for column, tensors in made.tensors.items():
        for i, t in enumerate(tensors):
            old = made.owner[i] == 1
            if column == Column.X or (old and column not in (Column.G, Column.D)):
                t.copy_(torch.randn(t.shape, generator=at))
            if column == Column.V:
                t.square_()
    last = made.numbers[1]
    known = {Column.T: 7.0, Column.WEIGHT: 0.02, Column.ZWEIGHT: 0.03, Column.MIX: 0.7, Column.LAG: -40.0, Column.LAG_SIZE: 50.0}
    for column, number in known.items():
        last[column].fill_(number)
    for i, x in enumerate(made.tensors[Column.X]):
        averages = made.tensors.get(Column.AVERAGE)
        if averages and made.owner[i] == 0:
            averages[i].copy_(x)
    return made


def gradients(made: Weights, at: torch.Generator) -> None:
    for column in (Column.G, Column.D):
        for t in made.tensors.get(column, []):
            t.copy_(torch.randn(t.shape, generator=at))


class Reference:
    """One tensor's step in float64, as it is in the books, and its derivative along log lr."""

    def __init__(self, made: Weights, i: int) -> None:
        self.case, numbers = made.case, made.numbers[made.owner[i]]
        self.has = {column: tensors[i].double() for column, tensors in made.tensors.items()}
        self.t, self.weight, self.zweight, self.mix, self.lag, self.lag_size, self.decay = (numbers[column].double() for column in NUMBERS)
        self.free = Column.GAP in self.has
        x = self.has[Column.X]
        zeros = torch.zeros_like(x)
        self.m, self.v = self.has.get(Column.M, zeros), self.has.get(Column.V, zeros)
        self.z, self.za = self.has.get(Column.ZX, zeros), self.has.get(Column.ZA, zeros)
        self.place, self.average = x, self.has.get(Column.AVERAGE, x)
        if self.free:  # here in the letters of the paper: z and the average, with a tangent of each
            gap = self.has[Column.GAP]
            self.place, self.average = x + self.mix * gap, x - (1 - self.mix) * gap
            self.z, self.za = self.z + self.mix * self.za, self.z - (1 - self.mix) * self.za

    def x(self, place: Tensor, average: Tensor, mix: Tensor | float) -> Tensor:
        return place + mix * (average - place) if self.free else place

    def direction(self, g: Tensor, d: Tensor | None, h: Hypers) -> tuple[Tensor, Tensor, Tensor]:
        if d is not None:
            return d, self.m, self.v
        t = self.t + 1
        v = (1 - h.rest2) * self.v + h.rest2 * g**2
        m = (1 - h.rest1) * self.m + h.rest1 * g if self.case.direction == "momentum" else g
        m_hat = m / (1 - (1 - h.rest1) ** t) if self.case.direction == "momentum" else g
        return m_hat / ((v / (1 - (1 - h.rest2) ** t)).sqrt() + h.eps), m, v

    def decayed(self, d: Tensor, x: Tensor) -> Tensor:
        bounded = x.clamp(-self.case.largest, self.case.largest)
        return d + self.decay * (bounded * ((d >= 0) == (x >= 0)) if self.case.cautious else bounded)

    def look(self, g: Tensor, d: Tensor | None, h: Hypers) -> list[Tensor]:
        s = self.decayed(self.direction(g, d, h)[0], self.x(self.place, self.average, self.mix))
        tangent = self.za if self.free else self.z
        if self.case.forgets:
            tangent = THROUGH * self.za + (1 - THROUGH) * self.z
        behind = (g * (self.place - self.average)).sum() * self.case.forgets
        x = self.x(self.place, self.average, self.mix).sum() * self.free
        return [g.sum(), (g * tangent).sum(), (self.place**2).sum(), (s**2).sum(), behind, x]

    def take(self, g: Tensor, d: Tensor | None, h: Hypers, behind: float) -> None:
        past = 1.0
        if self.case.forgets:
            self.lag, self.lag_size = 0.98 * self.lag + 0.02 * behind, 0.98 * self.lag_size + 0.02 * abs(behind)
            past = 1 - FORGET * max(0.0, float(-self.lag / self.lag_size))
        d, self.m, self.v = self.direction(g, d, h)
        t, decay = self.t + 1, 1 - h.rest_decay
        with forward_ad.dual_level():
            lr = forward_ad.make_dual(torch.tensor(h.lr).double().log(), torch.ones(()).double()).exp()
            place, average = forward_ad.make_dual(self.place, KEEP * self.z), forward_ad.make_dual(self.average, KEEP * self.za)
            # Where the average forgets, its share is a constant in the derivatives.
            if self.case.forgets:
                weight, counted = self.weight, forward_ad.unpack_dual(lr).primal
            else:
                weight, counted = forward_ad.make_dual(self.weight, KEEP * self.zweight), lr
            weight = past * weight + counted**2
            place = place - lr * self.decayed(d, self.x(place, average, self.mix))
            share = counted**2 / weight if self.free else h.rest_decay / (1 - decay**t)
            average = average + share * (place - average)
            (self.place, self.z), (self.average, self.za), (self.weight, self.zweight) = (
                (dual.primal, dual.tangent) for dual in map(forward_ad.unpack_dual, (place, average, weight))
            )
        self.t, self.mix = t, torch.tensor(h.beta).double() if self.free else self.mix

    def compare(self, made: Weights, i: int) -> None:
        tensors, numbers = made.tensors, made.numbers[made.owner[i]]
        expected = {
            Column.X: self.x(self.place, self.average, self.mix),
            Column.M: self.m,
            Column.V: self.v,
            Column.GAP: self.place - self.average,
            Column.AVERAGE: self.average,
            Column.ZX: self.x(self.z, self.za, self.mix),
            Column.ZA: self.z - self.za if self.free else self.za,
        }
        for column, value in expected.items():
            if column in tensors:
                close(tensors[column][i], value, f"{column.name} of tensor {i}")
        assert numbers[Column.T] == self.t
        if self.free:
            close(numbers[Column.WEIGHT], self.weight, "weight")
            close(numbers[Column.MIX], self.mix, "mix")
            close(numbers[Column.LAG], self.lag, "lag")
            close(numbers[Column.LAG_SIZE], self.lag_size, "size of lags")
            if self.case.learned and not self.case.forgets:
                close(numbers[Column.ZWEIGHT], self.zweight, "tangent of weight")


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=5e-6, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_steps_are_those_of_the_books(case: Case) -> None:
    follow(case, CHUNKS, STEPS)


@pytest.mark.parametrize("case", [Case("momentum", rule, "decay", True) for rule in RULES], ids=name)
def test_steps_of_many_weights_are_those_of_the_books(case: Case) -> None:
    follow(case, FAR, 2)


def follow(case: Case, chunks: list[list[int]], steps: int) -> None:
    made, at = started(case, chunks), torch.Generator().manual_seed(1)
    references = [Reference(made, i) for i in range(len(made.owner))]
    for step in range(steps):
        h = Hypers(lr=0.05 / (1 + step), beta=0.9 - 0.1 * step)
        made.set(h)
        gradients(made, at)
        gs = [g.double() for g in made.tensors[Column.G]]
        ds = [d.double() for d in made.tensors[Column.D]] if Column.D in made.tensors else [None] * len(gs)
        sums = made.look(1)
        each = [r.look(g, d, h) for r, g, d in zip(references, gs, ds, strict=True)]
        expected = [float(sum(column)) for column in zip(*each, strict=True)]
        behind = expected[4]
        expected = [1.0, expected[1] * case.learned, math.sqrt(expected[2]), math.sqrt(expected[3]), behind, expected[5]]
        torch.testing.assert_close(sums, expected, rtol=2e-5, atol=1e-6 * sum(map(sum, chunks)) + 1e-3)
        for r, g, d in zip(references, gs, ds, strict=True):
            r.take(g, d, h, behind)
        made.take(1.0, h.lr, KEEP, behind=sums[4])
        left = float(made.sums[5])
        if case.rule.startswith("free"):  # by which a change in between is seen
            assert made.look(1)[5] == left
        for i, r in enumerate(references):
            r.compare(made, i)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_threads_change_no_bit(case: Case) -> None:
    one, two = started(case, SHARED), started(case, SHARED)
    for step in range(2):
        for made, threads in ((one, 1), (two, 2)):
            made.set(Hypers(lr=0.05, beta=0.9))
            gradients(made, torch.Generator().manual_seed(step))
            made.look(1, threads)
            made.take(1.0, 0.05, KEEP, threads)
    assert_equal(one, two)


@pytest.mark.parametrize("ok", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_step_that_does_not_count_changes_no_bit(case: Case, ok: float) -> None:
    made, same = started(case), started(case)
    for weights in (made, same):
        weights.set(Hypers(lr=0.05, beta=0.9))
        gradients(weights, torch.Generator().manual_seed(1))
        weights.look(1)
    made.take(ok, 0.05, KEEP)
    assert_equal(made, same)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", [case for case in CASES if case.learned], ids=name)
def test_tangents_that_are_not_finite_start_again(case: Case, bad: float) -> None:
    made, zero = started(case), started(case)
    for weights, value in ((made, bad), (zero, 0.0)):
        weights.set(Hypers(lr=0.05, beta=0.9))
        gradients(weights, torch.Generator().manual_seed(1))
        for column in (Column.ZX, Column.ZA):
            for t in weights.tensors.get(column, []):
                t[::2] = value
        weights.numbers[1][Column.ZWEIGHT].fill_(value)
        weights.take(1.0, 0.05, KEEP)
    if Column.GAP not in made.tensors or case.forgets:  # its tangent is then nothing that a step knows
        made.numbers[1][Column.ZWEIGHT].copy_(zero.numbers[1][Column.ZWEIGHT])
    assert_equal(made, zero)


@pytest.mark.parametrize("measure", [0, 1])
def test_look_is_asked_for_no_more_than_it_does(measure: int) -> None:
    made = started(Case("momentum", "plain", "decay", True))
    made.set(Hypers(lr=0.05, beta=0.9))
    gradients(made, torch.Generator().manual_seed(1))
    full, sums = made.look(1), made.look(measure)
    assert sums[:2] == pytest.approx(full[:2], rel=1e-6)
    assert sums[2:] == [full[2] if measure else 0, full[3] if measure else 0, 0, 0]


def test_gradients_that_are_not_finite_are_seen() -> None:
    made = started(Case("momentum", "plain", "decay", True))
    made.set(Hypers(lr=0.05, beta=0.9))
    for bad in (math.nan, math.inf, -math.inf):
        gradients(made, torch.Generator().manual_seed(1))
        assert made.look(1)[0] == 1
        made.tensors[Column.G][1][2500] = bad
        assert made.look(1)[0] == 0


@pytest.mark.parametrize("direction", ["given", "momentum"])
def test_infinite_weights_do_not_decay_to_nan(direction: str) -> None:
    made = started(Case(direction, "plain", "decay", True))
    made.set(Hypers(lr=0.05, beta=0.9))
    gradients(made, torch.Generator().manual_seed(1))
    made.tensors[Column.X][1][7] = math.inf
    assert math.isfinite(made.look(1)[3])
    made.take(1.0, 0.05, KEEP)
    assert made.tensors[Column.X][1][7] == math.inf
    assert made.tensors[Column.ZX][1].isfinite().all()


def test_ends_are_exact() -> None:
    made = started(Case("momentum", "free", "still", True))
    made.set(Hypers(lr=0.05, beta=1.0, rest1=1.0, rest2=1.0))
    gradients(made, torch.Generator().manual_seed(1))
    gs, ms, vs = (made.tensors[column] for column in (Column.G, Column.M, Column.V))
    for moments in (*ms, *vs):
        moments.fill_(1e9)  # beside which a gradient is lost, unless nothing is left of it
    gs[1][5] = 3e38  # whose square is the largest float, not infinity
    made.take(1.0, 0.05, KEEP)
    for g, m, v in zip(gs, ms, vs, strict=True):
        assert torch.equal(m, g)
        assert torch.equal(v, g.square().clamp_max(torch.finfo(torch.float32).max))
    # The first step's average is what it made, whatever it started from.
    assert not made.tensors[Column.GAP][1].any()


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_without_gradients_and_eps_nothing_moves(direction: str) -> None:
    made = started(Case(direction, "plain", "still", True))
    for moment in (*made.tensors[Column.V], *made.tensors.get(Column.M, [])):
        moment.zero_()
    made.set(Hypers(lr=0.05, beta=0.9, eps=0.0))
    before = [x.clone() for x in made.tensors[Column.X]]
    assert made.look(1)[3] == 0
    made.take(1.0, 0.05, KEEP)
    assert all(map(torch.equal, before, made.tensors[Column.X]))


@pytest.mark.parametrize("lr", [0.0, 1e-25, 1e-20])
@pytest.mark.parametrize("rule", ["free", "free, forgetting"])
def test_a_vanishing_lr_leaves_all_finite(rule: str, lr: float) -> None:
    made = started(Case("momentum", rule, "decay", True))
    for _ in range(3):
        made.set(Hypers(lr=lr, beta=0.9))
        gradients(made, torch.Generator().manual_seed(1))
        made.look(1)
        made.take(1.0, lr, KEEP)
    assert all(t.isfinite().all() for _, t in made.everything())


def assert_equal(one: Weights, two: Weights) -> None:
    for (what, a), (_, b) in zip(one.everything(), two.everything(), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), what


# ---- orthogonal factors


SHAPES = [
    (1, 2, 2),
    (1, 5, 2),
    (1, 2, 5),
    (2, 64, 784),
    (3, 33, 50),
    (1, 200, 70),
    (5, 16, 16),
    (1, 128, 128),
    (2, 6, 64),
    (2, 7, 65),
    (1, 30, 9000),
]
ABC, SCALE = Muon.ns_coefficients, torch.tensor(0.7)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of the matrices that C++ orthogonalises."""
    made = built()
    monkeypatch.setattr(functions, "installed", lambda: made)
    seen, real = [], made.orthogonal

    def orthogonal(threads: int, *rest: Any) -> None:
        seen.append(rest[:3])
        real(threads, *rest)

    monkeypatch.setattr(made, "orthogonal", orthogonal)
    return seen


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonal_factors_are_those_of_float64(shape: tuple[int, ...], steps: int, calls: list[tuple[int, ...]]) -> None:
    matrices = torch.randn(shape)
    found = newton_schulz(matrices, ABC, steps, SCALE)
    torch.testing.assert_close(found, newton_schulz(matrices.double(), ABC, steps, SCALE).float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(newton_schulz(matrices.mT, ABC, steps, SCALE), found.mT, rtol=0, atol=1e-4)
    assert calls[0] == shape


@pytest.mark.parametrize("native", [True, False], ids=["C++", "torch"])
@pytest.mark.parametrize("steps", [5, 6, 10])
@pytest.mark.parametrize("columns", [20, 64])
@pytest.mark.parametrize("kind", ["rank 2", "rows over three decades"])
def test_rounding_errors_of_what_is_nearly_singular_do_not_grow(
    kind: str, columns: int, steps: int, native: bool, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past five steps a product that is followed and not computed anew has errors of more than 1, and soon no finite number."""
    if not native:
        monkeypatch.setattr(functions, "installed", lambda: None)
    matrices = torch.randn(2, 16, columns)
    if kind == "rank 2":
        matrices = torch.randn(2, 16, 2) @ torch.randn(2, 2, columns)
    else:
        matrices *= torch.logspace(-3, 0, 16)[:, None]
    expected = newton_schulz(matrices.double(), ABC, steps, SCALE).float()
    torch.testing.assert_close(newton_schulz(matrices, ABC, steps, SCALE), expected, rtol=0, atol=2e-2)
    assert len(calls) == native


def test_orthogonal_factors_do_not_depend_on_the_number_of_threads(calls: list[tuple[int, ...]]) -> None:
    matrices, found = torch.randn(5, 40, 100), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(newton_schulz(matrices, ABC, 5, SCALE))
    torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found)
    assert len(calls) == 4


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-20, 1e-6, 1e18, math.inf, math.nan])
def test_orthogonal_factors_of_hostile_sizes_are_those_of_torch(scale: float, calls: list[tuple[int, ...]]) -> None:
    matrices = torch.randn(2, 8, 12)
    matrices[1] *= scale
    found = newton_schulz(matrices, ABC, 5, SCALE)
    with forward_ad.dual_level():
        expected = newton_schulz(forward_ad.make_dual(matrices, torch.zeros_like(matrices)), ABC, 5, SCALE)
        torch.testing.assert_close(found, forward_ad.unpack_dual(expected).primal, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert len(calls) == 1


@pytest.mark.parametrize("columns", [9, 17], ids=["computed anew", "followed"])
@pytest.mark.parametrize("scale", [1.0, math.inf])
def test_what_is_not_finite_stays_in_its_matrix(scale: float, columns: int, calls: list[tuple[int, ...]]) -> None:
    matrices = torch.randn(3, 6, columns)
    matrices[0, 0, 0] = math.nan
    found = newton_schulz(matrices, ABC, 5, torch.tensor(scale))
    assert found[0].isnan().all()
    alone = torch.cat([newton_schulz(matrices[i : i + 1], ABC, 5, torch.tensor(scale)) for i in (1, 2)])
    assert torch.equal(found[1:], alone)
    assert not alone.isnan().any()
    assert len(calls) == 3


def test_functional_transforms_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    matrices = torch.randn(2, 6, 9)
    expected = newton_schulz(matrices.double(), ABC, 5, SCALE).float()
    mapped = torch.func.vmap(lambda m, scale: newton_schulz(m[None], ABC, 5, scale)[0])(matrices, SCALE.expand(2))
    functional = torch.func.functionalize(lambda m: newton_schulz(m * 1, ABC, 5, SCALE))(matrices)
    for found in (mapped, functional):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not calls


def test_derivatives_large_matrices_and_other_numbers_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    small, scale = torch.randn(1, 8, 12), torch.tensor(2.0, requires_grad=True)
    newton_schulz(small, ABC, 5, scale).sum().backward()
    assert scale.grad is not None
    newton_schulz(small.requires_grad_(), ABC, 5, SCALE).sum().backward()
    assert small.grad is not None
    newton_schulz(torch.randn(1, functions.SMALL + 1, functions.SMALL + 2), ABC, 1, SCALE)
    for rows, columns in ((1, 100), (100, 1), (2, functions.FEW)):
        newton_schulz(torch.randn(1, rows, columns), ABC, 1, SCALE)
    for dtype in (torch.float64, torch.bfloat16):
        assert newton_schulz(torch.randn(1, 8, 12).to(dtype), ABC, 5, SCALE).dtype == dtype
    assert newton_schulz(torch.randn(1, 0, 12), ABC, 5, SCALE).shape == (1, 0, 12)
    assert not calls


# ---- where they come from


@pytest.mark.parametrize("content", [None, b"", b"not an object"])
def test_what_is_not_installed_or_cannot_be_loaded_is_none(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "SOURCE", tmp_path / "passes.cpp")
    if content is not None:
        (tmp_path / f"_passes{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    assert installed.__wrapped__() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler")
@pytest.mark.parametrize(("usable", "changed"), [(1, False), (1, True), (0, False)])
def test_what_was_built_for_another_cpu_or_from_another_source_is_none(
    usable: int, changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "SOURCE", tmp_path / "passes.cpp")
    code = f"int usable(void) {{ return {usable}; }} unsigned source(void) {{ return SOURCE; }} "
    code += "void look(void) {} void take(void) {} void orthogonal(void) {}"
    (tmp_path / "passes.cpp").write_text(code)
    made, define = tmp_path / f"_passes{EXTENSION_SUFFIXES[0]}", f"-DSOURCE={zlib.crc32(code.encode())}u"
    subprocess.run(["cc", "-x", "c", "-shared", "-fPIC", define, tmp_path / "passes.cpp", "-o", made], check=True)
    if changed:
        (tmp_path / "passes.cpp").write_text(code + "\n")
    assert (installed.__wrapped__() is not None) == (bool(usable) and not changed)


def test_without_a_compiler_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "installed", lambda: None)
    with torch._inductor.config.patch("cpp.cxx", (str(tmp_path / "nowhere"),)):
        assert built.__wrapped__() is None
