"""The recommended optimizer, in one call."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .optimizer import HyperOptimizer
from .rules import Adam, ScheduleFree
from .spec.tower import Hyper

# eps relative to the root mean square entry of a gradient of norm 1. ScheduleFree(Adam) / Adam from lr = 1e-3 on validation data, one seed,
# with eps =
#                                 1e-8    1e-5    1e-4    3e-4    1e-3    SGD instead of Adam
#     MNIST, error %              2.38    2.31    2.34    2.46    2.30    2.40       101,770 weights: eps = 1.6e-4
#     char-RNN, perplexity        4.10    4.06    3.94    3.88    3.82    3.76       285,266: 9.4e-5
#     CNN, error %                7.98    7.98    7.93    7.68    7.88    8.35       3,274,634: 2.8e-5
#     small GPT, loss             1.85    1.83    1.88    1.91    2.08    2.41       826,368: 5.5e-5
EPS_SCALE = 0.05


def auto(model_or_params: Any, lr: float | None = None, compile: bool = False) -> HyperOptimizer:
    """Make the recommended optimizer, which needs no tuning: the tower `ScheduleFree(Adam)(eps=…) / Adam`, bound.

    The learning rate is learned from any initial value, and averaging replaces a schedule. Evaluate inside `with optimizer.averaged():`,
    for a model with BatchNorm also inside `batch_statistics(model, batches)`.

        eps = 0.05 / √n            n: the number of trainable weights

    This is a twentieth of the root mean square entry of a gradient of norm 1. With Adam's default of 1e-8, weights whose gradients are rare
    or small take steps as large as all others. A larger eps improves a char-RNN and hardly changes other models, until it is large enough
    to hurt a GPT. The formula assumes a loss that is a mean over examples: for a loss scaled by 1000 it acts like 1e-8, for one scaled
    by 1/1000 the rule becomes close to `ScheduleFree(SGD)`, which suits a GPT less.

    Args:
        model_or_params: a module, or parameters as for torch.optim; a group may have its own values.
        lr: the initial learning rate, above 0. Default: 1e-3.
        compile: fuse each step with torch.compile. This tower gains from it if a training step takes a few milliseconds or less: for an
            MLP (batch 256, two cores) a training step takes 1.03 times as long as with torch's fused Adam, without it 1.16 times.
            Default: False.

    Raises:
        ValueError: no parameters, an lr that is not above 0, and what `Hyper.bind` raises.
        TypeError: an lr that is not a number, or something that is no parameters.

    >>> import hyperopt, torch
    >>> hyperopt.auto(torch.nn.Linear(2, 1))
    HyperOptimizer(ScheduleFree(Adam)(eps=0.029) / Adam, 2 tensors in 1 groups)
    """
    if lr == 0:
        raise ValueError("lr = 0 is on the boundary of its domain and cannot be learned: give a number above 0, or leave it out for 1e-3")
    tower = Hyper(ScheduleFree(Adam)).stack(Adam)
    tower = tower if lr is None else tower.replace(lr=lr)
    params = model_or_params.parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    if isinstance(params, Iterable) and not isinstance(params, (str, Mapping, torch.Tensor)):
        params = [_reusable(entry) for entry in params]
    # The tower is bound twice: the first time only parses and validates params, to count the weights.
    n = sum(p.numel() for group in tower.bind(params).param_groups for p in group["params"] if p.requires_grad)
    return tower.replace(eps=float(f"{EPS_SCALE / math.sqrt(max(n, 1)):.1e}")).bind(params, compile=compile)


def _reusable(entry: Any) -> Any:
    """An entry of params that can be iterated over twice."""
    is_iterator = isinstance(entry, Mapping) and isinstance(entry.get("params"), Iterator)
    return {**entry, "params": list(entry["params"])} if is_iterator else entry
