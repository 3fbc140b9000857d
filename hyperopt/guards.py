"""What keeps a tower from destroying a run: trust ratios, forgetting, and steps that are left out when numbers are not finite."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Of log lr: wider than the jitter of a settled lr, which is .1 a step under Adam. With 0 and power 1, which forgets at every jitter,
# SGD(momentum=0.9) / Adam ends at 2.95 % on MNIST validation data, with these at 2.89, without forgetting at 2.96 %.
BAND, POWER = 1.0, 4.0
# What a decay does shows only after the steps that it averages over: at the pace of lr, .1 a step under Adam, it runs past its good values.
PACE = 0.005
# A tenth a step, Adam's pace, is slow from far below: a small GPT from lr = 1e-8 ends at a validation loss of 2.25 under AdamW / Adam and
# 2.00 under ScheduleFree(Adam) / Adam, and at 1.89 and 1.96 with five times that (one seed).
CLIMB = 5.0
LEAP = 0.5  # the largest move of log lr in such a step, if the level above allows it
# Of trust: larger steps end the climb. With .1 MNIST validation error from 1e-8 is 2.59 and not 2.52 % (ScheduleFree(Adam) / Adam), but
# 2.74 and not 3.00 % of Adam / Adam (2.95 without a climb); two seeds.
NEGLIGIBLE = 0.01
FEW = 4
FLOOR = 0.01  # root mean square below which weights count as this large, so that zero-initialised groups can start


def relative_scale(moves: Sequence[Tensor], norms: Sequence[Tensor], numel: int, trust: float) -> Tensor:
    """The factor in (0, 1] that takes ‖Δ‖ down to trust·max(‖x‖, FLOOR·√n), over all parts of a node together.

    Args:
        moves: ‖Δ‖ of each part, for the weights as they would move.
        norms: ‖x‖ of each part.
        numel: n, the number of weights.
        trust: the largest relative change.
    """
    return _down(trust * _norm(norms).clamp_min(FLOOR * max(1, numel) ** 0.5), _norm(moves))


def absolute_scale(moves: Sequence[Tensor], trust: float) -> Tensor:
    """The factor in (0, 1] that takes the largest |Δ| of raw hyperparameters down to `trust`."""
    move = combined(moves, torch.maximum, torch.amax)
    return _down(torch.full_like(move, trust), move)


def norm(x: Tensor) -> Tensor:
    """‖x‖, in half of the time that torch's own takes."""
    flat = x.reshape(-1)
    return torch.dot(flat, flat).sqrt()


def combined(numbers: Sequence[Tensor], pairwise: Callable[[Tensor, Tensor], Tensor], whole: Callable[[Tensor], Tensor]) -> Tensor:
    """Several 0-d tensors in one: a few pair by pair, which fuses into nothing, many side by side."""
    numbers = [number.to(numbers[0]) for number in numbers] if len(numbers) > 1 else numbers
    return functools.reduce(pairwise, numbers) if len(numbers) <= FEW else whole(torch.stack(list(numbers)))


def _norm(norms: Sequence[Tensor]) -> Tensor:
    return combined(norms, torch.hypot, torch.linalg.vector_norm)


def _down(allowed: Tensor, move: Tensor) -> Tensor:
    # Clamped from below so that a norm that overflows leaves a logarithm that is finite; what is not a number belongs to a step
    # that does not count, and must not spoil the raw number that is kept.
    tiny = torch.finfo(move.dtype).tiny
    return (allowed / move.clamp_min(tiny)).nan_to_num(1.0).clamp(tiny, 1.0)


def fade(anchor: Tensor, log_lr: Tensor) -> tuple[Tensor, Tensor]:
    """The factor in (0, 1] on what past steps say about an lr that has fallen since, and the new anchor.

    Past steps that went too far keep saying so for a whole horizon, and the smaller lr becomes the more they outweigh the new ones:
    lr then falls without end and training stands still. So they are forgotten as lr falls, by the fourth power of the ratio. The
    jitter of an lr that has settled costs nothing: the anchor, log lr, lets it fall by BAND before it follows.

    Args:
        anchor: as returned last; log |lr| at first.
        log_lr: log |lr| of the step to come.
    """
    top = log_lr + BAND
    return (POWER * (top - anchor)).clamp_max(0).exp(), anchor.clamp(log_lr, top)


def is_finite(number: Tensor) -> Tensor:
    """1. where a 0-d tensor is finite, 0. otherwise; torch's own takes four times as long."""
    # number·0 == 0 would do, but torch 2.11 compiles number·0 to 0.
    return (number.abs() <= torch.finfo(number.dtype).max).to(number.dtype)


def finite(sums: Sequence[Tensor], like: Tensor) -> Tensor:
    """1. where every element of every tensor is finite, 0. otherwise, without a host sync.

    The sum of a tensor is not finite when one of its elements is not, and is four times as fast to take as the largest
    |element|; that finite elements near 1e38 can add up to infinity is accepted, as their squares already are.

    Args:
        sums: the sum of each.
        like: a tensor of the device and dtype wanted.
    """
    return is_finite(combined(sums, torch.add, torch.sum).to(like))
