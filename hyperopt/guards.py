"""What keeps a tower from destroying a run: bounds on how far hyperparameters and weights move, and what past steps may still say.

A guard acts at two moments: `moved`, when the level above has chosen new raw values, and `sized`, when it is known how large the step at
these values would be. Each is the identity unless a guard overrides it. Nothing here waits for the device.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .hyperparameter import Hyperparameter

Raw = dict[str, Tensor]

FLOOR = 0.01  # root mean square below which weights count as this large, so that zero-initialised groups can start


class Size(NamedTuple):
    """How large a step would be.

    Args:
        move: ‖Δ‖ / max(‖x‖, FLOOR·√n) at level 0; max |Δ| of the raw hyperparameters above.
        steps: the largest number of steps that any of the tensors has taken.
    """

    move: Tensor
    steps: Tensor


class Guard:
    """One guard of one node."""

    held_out = True  # whether it also minds moves by hypergradients of a held-out loss

    def moved(self, before: Raw, r: Raw, q: Raw, ok: Tensor) -> Raw:
        """The raw values to use, where the level above has moved them from `before` to `r` by the hypergradients `q`."""
        return r

    def sized(self, r: Raw, size: Size, ok: Tensor, keep: Tensor | None) -> tuple[Raw, Tensor | None]:
        """The raw values to use, where the step at `r` is as large as `size`, and the factor on what past steps say about lr (None: 1)."""
        return r, keep


class Climb(Guard):
    """From a start far too low, lr rises five times as fast while no hypergradient says down and steps are negligible.

    A tenth a step, Adam's pace, is slow from far below: a small GPT from lr = 1e-8 ends at a validation loss of 2.25 under AdamW / Adam
    and 2.00 under ScheduleFree(Adam) / Adam, with the climb at 1.89 and 1.96 (one seed).

    Args:
        on: 1. while the climb lasts, 0-d, or one for each lr; changed in place.
        trust: of the node.
        leap: the largest move of log lr in a step.
    """

    FACTOR = 5.0
    LEAP = 0.5
    # Of trust: larger steps end the climb. With .1, MNIST validation error from 1e-8 is 2.59 instead of 2.52 % (ScheduleFree(Adam) / Adam),
    # but 2.74 instead of 3.00 % for Adam / Adam (2.95 without a climb); two seeds.
    NEGLIGIBLE = 0.01

    def __init__(self, on: Tensor, trust: float, leap: float) -> None:
        self.on, self.trust, self.leap = on, trust, min(self.LEAP, leap)

    def moved(self, before: Raw, r: Raw, q: Raw, ok: Tensor) -> Raw:
        self.on.masked_fill_(q["lr"] * ok > 0, 0.0)
        move = r["lr"] - before["lr"]
        faster = torch.maximum((self.FACTOR * move).clamp_max(self.leap), move)
        return {**r, "lr": r["lr"].lerp(before["lr"] + faster, self.on)}

    def sized(self, r: Raw, size: Size, ok: Tensor, keep: Tensor | None) -> tuple[Raw, Tensor | None]:
        self.on.masked_fill_(size.move * ok > self.trust * self.NEGLIGIBLE, 0.0)
        return r, keep


class Pace(Guard):
    """The raw value of a decay, and above level 0 that of every hyperparameter, is moved by hypergradients by no more than 0.005 in a step.

    What a decay does shows only after the steps that it averages over: at the pace of lr, 0.1 a step under Adam, it passes its good values
    before they show.

    Above level 0 the same evidence comes back step after step, as the hypergradient of an lr answers for 1,000 steps: successive ones
    agree, whatever the level above has done in the meantime, and say that its steps should have been larger.

    Args:
        names: of the hyperparameters.
    """

    # In 700 steps of MNIST the lr of level 1 in Adam / Adam / Adam rises from .1 to 4.6 without this: validation error 3.51 %, and 3.30 %
    # at height 3. With it 2.63 and 2.64 %, where height 1 has 2.75 % (three seeds); with .002 both are 2.62 % (two seeds). Over 7,050
    # steps it is not enough by itself, see `Prior`.
    LIMIT = 0.005

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def moved(self, before: Raw, r: Raw, q: Raw, ok: Tensor) -> Raw:
        return {**r, **{name: r[name].clamp(before[name] - self.LIMIT, before[name] + self.LIMIT) for name in self.names}}


class Prior(Guard):
    """A raw value decays towards the usual one, by 1/steps of the distance in a step: where hypergradients say nothing it gets there, and
    where they say something it stays between the two. The lr of the weights has no usual value. Above level 0 it is the one that lr was
    bound with.

    What a hyperparameter such as a beta does to the next loss is a biased witness of what it does to a run, and the bias is there in every
    step: without a prior beta1 goes to .4 and beta2 to 1 on MNIST, eps through many decades, weight decay to 1e-15. A held-out loss is one
    that nothing else descends, and what is learned from it has no prior.

    Args:
        usual: the raw value of each hyperparameter that has one.
        steps: the number of steps over which what moved a value counts.
    """

    # Of 30, 100 and 300 the best, see docs/guards.md: MNIST validation error with betas and eps learned is 2.68, 2.83 and 2.97 %, without a
    # prior 2.88 and with lr alone 2.75 (three seeds). From beta1 = .1 it is 2.95 with 30 and 3.24 with 100.
    STEPS = 30.0
    held_out = False

    def __init__(self, usual: Raw, steps: float) -> None:
        self.usual, self.steps = usual, steps

    def moved(self, before: Raw, r: Raw, q: Raw, ok: Tensor) -> Raw:
        share = ok / self.steps
        return {**r, **{name: r[name].lerp(usual, share) for name, usual in self.usual.items()}}


class Trust(Guard):
    """lr is projected down to where the step is no larger than trust allows: a relative change of the weights at level 0, the largest
    change of a raw hyperparameter above.

    Args:
        lr: an lr that the user assigned is not projected.
        trust: the largest size of a step.
        warmup: the number of first steps over which trust grows to its value.
    """

    # Of a rule whose lr moves a state of its own (ScheduleFree's z). Steps of a tenth of the weights in the first steps, whose directions
    # are little more than signs, are damage that stays: from lr = .1 a small GPT ends at 2.20 with 1, at 1.97 with 10 and 1.98 with 30
    # (validation loss, one seed). MNIST loses up to .1 points, with 100 two.
    WARMUP = 20

    def __init__(self, lr: Hyperparameter, trust: float, warmup: int = 1) -> None:
        self.lr, self.trust, self.warmup = lr, trust, warmup

    def sized(self, r: Raw, size: Size, ok: Tensor, keep: Tensor | None) -> tuple[Raw, Tensor | None]:
        allowed = self.trust
        if self.warmup > 1:
            allowed = ((size.steps + 1) * (self.trust / self.warmup)).clamp_max(self.trust)
        # Clamped so that the logarithm is finite where a norm overflows; what is not a number belongs to a step that does not count,
        # and must not spoil the raw value that is kept.
        scale = (allowed / size.move).nan_to_num(1.0).clamp(torch.finfo(size.move.dtype).tiny, 1.0)
        if self.lr.assignment is not None:
            scale = torch.where(self.lr.assignment.changed, torch.ones_like(scale), scale)
        return {**r, "lr": self.lr.scaled(r["lr"], scale)}, keep


class Forget(Guard):
    """What past steps say about lr is forgotten as lr falls, by the fourth power of the ratio.

    Past steps that went too far say so for a whole horizon, and the smaller lr becomes the more they outweigh the new ones: lr then falls
    without end and training stands still. The jitter of an lr that has settled costs nothing: the high-water mark lets log lr fall by BAND
    before it follows.

    Args:
        lr: the hyperparameter.
        mark: the high-water mark, log |lr| at first; changed in place.
    """

    # Wider than the jitter of a settled lr, .1 a step under Adam. With BAND 0 and POWER 1, which forgets at every jitter,
    # SGD(momentum=0.9) / Adam ends at 2.95 % on MNIST validation data, with these values at 2.89, without forgetting at 2.96 %.
    BAND, POWER = 1.0, 4.0

    def __init__(self, lr: Hyperparameter, mark: Tensor) -> None:
        self.lr, self.mark = lr, mark

    def sized(self, r: Raw, size: Size, ok: Tensor, keep: Tensor | None) -> tuple[Raw, Tensor | None]:
        log_lr = self.lr.log_size(r["lr"])
        top = log_lr + self.BAND
        factor = (self.POWER * (top - self.mark)).clamp_max(0).exp()
        self.mark.lerp_(self.mark.clamp(log_lr, top), ok.to(self.mark))
        return r, factor if keep is None else keep * factor


class Guards:
    """All guards of one node, in their order: raw values settle first, then the step is taken at them."""

    def __init__(self, guards: Sequence[Guard] = ()) -> None:
        self.movers = [guard for guard in guards if type(guard).moved is not Guard.moved]
        self.sizers = [guard for guard in guards if type(guard).sized is not Guard.sized]

    def moved(self, before: Raw, r: Raw, q: Raw, ok: Tensor, *, held_out: bool) -> Raw:
        """See `Guard.moved`; `held_out`: `q` is of a loss that the weights do not descend."""
        for guard in self.movers:
            if guard.held_out or not held_out:
                r = guard.moved(before, r, q, ok)
        return r

    def sized(self, r: Raw, size: Size | None, ok: Tensor) -> tuple[Raw, Tensor | None]:
        """See `Guard.sized`; `size` is None where no guard needs it."""
        if size is None:
            return r, None
        keep = None
        for guard in self.sizers:
            r, keep = guard.sized(r, size, ok, keep)
        return r, keep


def is_finite(number: Tensor) -> Tensor:
    """1. where a 0-d tensor is finite, 0. otherwise; torch.isfinite takes four times as long."""
    # number·0 == 0 would do, but torch 2.11 compiles number·0 to 0.
    return (number.abs() <= torch.finfo(number.dtype).max).to(number.dtype)


def every(numbers: Iterable[Tensor]) -> Tensor:
    """The product of 0-d tensors, which may be on several devices."""
    first, *rest = numbers
    for number in rest:
        first = first * number.to(first)
    return first
