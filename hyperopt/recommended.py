"""The recommended optimizer, in one call."""

from collections.abc import Callable
from typing import Any

import torch

from .optimizer import UNTRACED, HyperOptimizer
from .rules import Adam, Muon, ScheduleFree, SpikeAwareAdam
from .spec.tower import Hyper

# Validation data, from lr = 1e-3; MNIST means of 3 seeds, which differ by .1, the others one seed. Test losses of the zoo's digits and
# fine-tuning as ratios to the best peer.
#
#                                            MNIST, error %    char-RNN, perplexity    GPT, loss    digits, fine-tune
#     without smoothing and decay            2.39              3.70                    1.67         2.9, 2.1
#     smoothing = .5                         2.10              3.66                                 1.3, 1.6
#     smoothing = .9                         2.40              3.73                                 1.9, 1.5
#     weight_decay = .1                      2.28              3.87                                 1.0, .87
#     smoothing = .5, weight_decay = .03     1.99              3.66                    1.60         .61, 1.06
#     smoothing = .5, weight_decay = .1      1.93              3.75                                 .70, .76
#     the same, cautious                     2.01              3.66                                 .61, .90
#     the same of all tensors                1.92              3.67                    1.59         .67, .79
#     the same of all tensors, .3            1.84              3.83                                 .39, .67
#     the same of matrices: as below         1.94              3.66                    1.60         .55, .80
#
# Cautious decay of Adam's matrices too takes points off the error on MNIST, and the loss on rare words, whose vectors then decay where
# they are not seen, from .31 to .18. But where weights are what is estimated, it biases them: with all tensors decaying, the loss of an
# ill-conditioned regression without noise is 5 times as high, that of a curve fit 1.5 times, the gap of an ELBO 16 times.
#
# beta2 = .99 and not .999 takes the 8 tasks without hidden matrices from 4 to 6 that are within 10 % of the best peer. Adam's steps cut at
# 1 or 2 lr cost a logistic regression a factor of 3 to 10.
#
# Filters by Muon, and by Adam: CNN 7.33, 7.49 %, ResNet-20 28.7, 29.0 %. Without smoothing they were worse by Muon (9.55, 9.08, test data).
#
# Whole matrices (rows = None), 64 and 16 rows: MNIST 2.36, 2.40, 2.30, GPT 1.68, 1.67, 1.75, without smoothing and decay. A matrix of
# 1024 x 3136 is orthogonalised in 11 ms on one thread with 64 rows, in 20 with 128. norm_decays pays where a model overfits: without it,
# digits end at 1.5, fine-tune at 1.8 times the best peer. Rates of forgetting of .02 and .1 do no better than .05. With through = 1, lr on
# raw features rises until the loss is five times as high. Above, with all tensors decaying, beta2 = .99 in place of .999 takes MNIST from
# 1.92 to 2.02 and the char-RNN from 3.66 to 3.72, .95 MNIST to 2.26.
#
# SpikeAwareAdam and not Adam above: a batch of one example, or a step that went too far, may have a hypergradient much larger than those
# before it, whose square stays in Adam's second moment for a thousand steps and slows lr down. MNIST, char-RNN and GPT do not tell them
# apart; of the zoo, the loss of batches of one example goes from .162 to .153, of the plateau from .031 to .0006, worst starts of seed 0,
# and of nine runs of a turning classification problem the worst from .57 to .24, where .15 is good. Clipped at 3 and not 5, MNIST from
# 1e-8 has 1.99 in place of 1.88.
#
# decay_after: with a constant step size on top, lr wanders in long runs, since hypergradients answer for 500 steps. All of the above is
# without it. Within 10 % of the best peer, and twice as bad, of the 20 tasks of the zoo:
#
#                   MNIST from 1e-3, 1e-8    char-RNN    GPT      GPT, 1,500 steps, test    zoo
#     None          1.91, 1.88               3.60        1.583    1.78                      14, 2
#     100           1.92, 1.91               3.56        1.581
#     50            1.88, 1.86               3.54                 1.52                      15, 2
#     30            1.88, 1.91               3.53        1.597    1.51                      16, 3
#     10                                                          1.52 (slow from below: 1.72 after 500 steps)
#
# Adam's eps is too small to be felt for gradients of any scale, so that a loss may be a sum or a mean.
TOWER = Hyper(
    ScheduleFree(Muon | Adam),
    beta2=0.99,
    eps=1e-15,
    weight_decay=0.1,
    decayed="matrices",
    cautious=True,
    smoothing=0.5,
    norm_decays=(0.9, 0.999),
    rows=64,
    forget=0.05,
    through=0.99,
).stack(SpikeAwareAdam, eps=1e-15, decay_after=50)
# Of a known number of steps: the share over which lr falls to 0, and between which shares y moves to the average.
DESCENT, ARRIVAL = 0.3, (0.8, 0.9)


def auto(model_or_params: Any, lr: float | None = None, compile: bool = False, steps: int | None = None) -> HyperOptimizer:
    """Make the recommended optimizer, which needs no tuning: the tower `ScheduleFree(Muon | Adam)(…) / SpikeAwareAdam`, bound.

    Hidden matrices and filters take orthogonalised steps and everything else Adam's, with one learning rate, which is learned from any
    initial value. Give the model itself: it says which of its tensors are hidden matrices. Of bare parameters those of two
    or more dimensions are taken for such. Weight decay is for tensors of two or more dimensions in a parameter group that has several.

    Averaging replaces a schedule. Evaluate inside `with optimizer.averaged():`, for a model with BatchNorm also inside
    `batch_statistics(model, batches)`. Neither is needed after exactly `steps` steps, if that number is given: over the last 30 % of them
    the learned lr is scaled down to 0, and the weights themselves move to their average.

    Args:
        model_or_params: a module, or parameters as for torch.optim; a group may have its own values.
        lr: the initial learning rate, above 0. Default: 1e-3.
        compile: fuse each step with torch.compile, which pays if a training step takes a few milliseconds or less. Default: False.
        steps: the number of steps of the whole training. Default: None, not known. Later steps change nothing.

    Raises:
        ValueError: no parameters, an lr that is not above 0, and what `Hyper.bind` raises; steps that are not a number of at least 1.
        TypeError: an lr that is not a number, or something that is no parameters.

    >>> import hyperopt, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> for line in str(hyperopt.auto(model)).splitlines()[1:]:
    ...     print(line.strip())
    Muon: 0.weight
    Adam: 0.bias, 2.weight, 2.bias
    """
    if model_or_params is None:
        raise TypeError("auto() needs the model, or parameters: pass the model itself, hyperopt.auto(model)")
    if lr == 0:
        raise ValueError("lr = 0 is on the boundary of its domain and cannot be learned: give a number above 0, or leave it out for 1e-3")
    tower = TOWER if lr is None else TOWER.replace(lr=lr)
    if steps is None:
        return tower.bind(model_or_params, compile=compile)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps = {steps!r} must be the number of all steps of a training, at least 1; leave it out where it is not known")
    return Descending(tower, model_or_params, steps, compile=compile)


class Descending(HyperOptimizer):
    """A tower over an average whose weights are those to evaluate with after a known number of steps.

        lr = learned lr · min(1, (1 − k/steps) / DESCENT)
        beta1 rises linearly from its value to 1 between ARRIVAL[0]·steps and ARRIVAL[1]·steps

    Args:
        tower: with a beta1.
        params: as for `Hyper.bind`.
        length: the number of all steps.
        compile: as for `Hyper.bind`.
    """

    def __init__(self, tower: Hyper, params: Any, length: int, *, compile: bool = False) -> None:
        self.length = length
        super().__init__(tower, params, compile=compile, schedule=True)

    @UNTRACED
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As in `HyperOptimizer`."""
        for group in self.param_groups:
            done = group["tower"]["calls"] / self.length
            group["lr"] = group["tower"]["initial"] * min(1.0, max(0.0, 1 - done) / DESCENT)
            before, now = left(done - 1 / self.length), left(done)
            if now < before:
                group["beta1"] = group["beta1"].lerp(torch.ones_like(group["beta1"]), 1 - now / before)
        return super().step(closure)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"length": self.length}


def left(done: float) -> float:
    """How far y still is from where it arrives at the average, as a share of where it was."""
    return min(1.0, max(0.0, (ARRIVAL[1] - done) / (ARRIVAL[1] - ARRIVAL[0])))
