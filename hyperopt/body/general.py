"""x', s' and Z' of blocks where an update has to be differentiated, averages, or stays in a feasible set."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..hyperparameter import Raw
from ..rule import Rule, State, Values
from ..tangents import Point
from .blocks import Block
from .buffers import Tangent


def write(body: Any, batch: Sequence[Block], r: Raw, kept: Raw, ok: Tensor) -> None:
    """Take the step of some blocks.

    Args:
        body: an `Eager`.
        batch: one block, or all that a feasible set couples.
        r: the raw hyperparameters.
        kept: the factors with which the tangents of each go into the step.
        ok: 1. if the step counts.
    """
    for block in batch:
        counts = body.arithmetic.counts(ok, block.t)
        for tangent in block.tangents.values():
            for z in tangent.values():
                body.arithmetic.restart(z, counts)
        if body.tangents.fixed and not block.made:
            block.made = body.direction(block, body.h(block, r), ok)
    points = [(block.x, block.state) for block in batch]
    news: Sequence[Point] = [] if r else update(body, batch, points, r)
    found: list[Tangent] = [{} for _ in batch]
    for name in r:
        carried: list[dict[str, Tensor]] = [{} for _ in batch]
        if body.tangents.gamma[name]:
            carried = [{k: z * block.factor(name, kept[name], z) for k, z in block.tangents.get(name, {}).items()} for block in batch]
        views = batch[0].cut is not None
        news, tangents = body.tangents.along(name, points, carried, r, lambda p, r: update(body, batch, p, r), views=views)
        for mine, new in zip(found, tangents, strict=True):
            mine[name] = new
    for block, new, tangent in zip(batch, news, found, strict=True):
        body.commit(block, *new, tangent, ok)


def update(body: Any, batch: Sequence[Block], points: Sequence[Point], r: Raw) -> list[Point]:
    """The new points, as a differentiable function of the old ones and r; inside the feasible set."""
    hs = [body.h(block, r) for block in batch]
    arrived = [_arrive(body, block, *point, h) for block, point, h in zip(batch, points, hs, strict=True)]
    if body.feasible is not None:
        metrics = [block.buffer.rule.metric(state, h, block.t) for block, (_, state), h in zip(batch, arrived, hs, strict=True)]
        places = body.feasible.project([place for place, _ in arrived], metrics)
        arrived = [(place, _followed(state, place - old)) for place, (old, state) in zip(places, arrived, strict=True)]
    if body.updates:
        return arrived
    return [block.buffer.rule.after(*each, h, block.t) for block, each, h in zip(batch, arrived, hs, strict=True)]


def _arrive(body: Any, block: Block, x: Tensor, state: State, h: Values) -> Point:
    """Where the step takes that which lr moves, and the state on the way."""
    rule: Rule = block.buffer.rule
    if body.updates:
        place, new = rule.update(x, body.gradient(block), state, h, block.t)
    elif block.made:
        d, own = block.made
        place, new = rule._moved(x, {**state, **own}, h.lr * rule._step(x, d, h, block.t))
    else:
        place, new = rule._arrive(x, body.gradient(block), state, h, block.t)
    if body.limit is None:
        return place, new
    start = rule.place(x, state)
    limited = start + (place - start).clamp(-body.limit, body.limit)
    return limited, _followed(new, limited - place)


def _followed(state: State, by: Tensor) -> State:
    """The state, where that which lr moves went farther than it said."""
    return {**state, "gap": state["gap"] + by} if "gap" in state else state
