"""Weights that are changed from outside, between steps."""

import weakref
from typing import Any

import torch
from torch import Tensor


class Edits:
    """What a change of the weights means for a rule that averages by itself.

    What lr moves and the average are kept relative to x, and go wherever x is put. Once, that is all. After every step, as where weights
    are clamped or masked, what is taken back of the steps must not add up in the gap:

        gap = gap · clamp(1 + δ / ((1 − mix)·gap), 0, 1)        where the change δ points against the gap

    so that what lr moves is moved by as much as moves x by δ, but no farther than to x. δ is known where a copy of x is kept, which is from
    the first change on. That there was one is told by the sum of x. Tangents stay as they are: with them shrunk alike, lr ends no better.

    Where weights are clamped to ±.05 after each of 4,000 steps of `ScheduleFree(Adam)(lr=0.01)`, the largest weight of the average is 2.0
    without this and .05 with it; a tower drives its lr to 1e19 without, and to .005 with it.

    Args:
        buffer: a `Buffer` of weights.
    """

    def __init__(self, buffer: Any) -> None:
        self.buffer = weakref.proxy(buffer)  # which holds this: a cycle would live until Python looks for some
        rounds, saved = buffer.shards[0].dtype != buffer.dtype, buffer.records[0]
        rest, self.seen = (buffer.load(name) if name in saved else None for name in ("rest", "seen"))
        for record in buffer.records:
            record.pop("rest", None)  # of a checkpoint whose weights had another dtype
        # What rounding x cuts off, of which states that are kept relative to x say nothing.
        self.rest = buffer.empty().zero_() if rounds and rest is None else rest if rounds else None
        for name, kept in (("rest", self.rest), ("seen", self.seen)):
            if kept is not None:
                buffer.keep(name, kept)
        self.sum: Tensor | None = None  # of x as the last step left it, where a step has to look
        # Read one step late, so that nothing waits for the device.
        self.changed = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=buffer.t.device.type == "cuda")
        self.told = self.changed.numpy()  # the same memory, which is read as it is

    def wanted(self) -> bool:
        """Whether a copy of x is kept, or should be."""
        return self.seen is not None or bool(self.told)

    def begin(self) -> None:
        """Move the state along with x, as it was gathered."""
        x = self.buffer.x()
        if self.seen is not None:
            self._follow(x, self.seen)
        elif bool(self.told):
            self.seen = x.clone()
            self.buffer.keep("seen", self.seen)
        elif self.sum is not None:
            self.changed.copy_(x.sum() != self.sum, non_blocking=True)

    def finish(self) -> None:
        """Take x for what a step has made of it, and keep what rounding it has cut off."""
        buffer, x = self.buffer, self.buffer.x()
        if self.seen is None:
            self.sum = x.sum()
        else:
            self.seen.copy_(x)
        if self.rest is not None:
            for view, shard in zip(buffer.views(self.rest), buffer.shards, strict=True):
                view.copy_(shard)
            torch.sub(x, self.rest, out=self.rest)

    def gathered(self, x: Tensor) -> None:
        """Add to x what rounding has cut off; where x was changed since, no more than half of its last digit."""
        if self.rest is not None:
            info = torch.finfo(self.buffer.shards[0].dtype)
            half = x.abs().clamp_min_(info.smallest_normal) * (info.eps / 2)
            x += torch.clamp(self.rest, -half, half)

    def _follow(self, x: Tensor, seen: Tensor) -> None:
        state = self.buffer.state
        gap, change = state["gap"], x - seen
        left = torch.where(change * gap < 0, 1 + change / ((1 - state["mix"]) * gap), 1.0).clamp_(0, 1)
        gap *= left
        seen.copy_(x)
