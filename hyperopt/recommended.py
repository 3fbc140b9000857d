"""The recommended optimizer in one call."""

from typing import Any

import torch

from .optimizer import HyperOptimizer
from .rules import Adam, ScheduleFree
from .tower import Hyper


def auto(model_or_params: Any, lr: float | None = None, compile: bool = False) -> HyperOptimizer:
    """The optimizer that needs no tuning: `ScheduleFree(Adam) / Adam`, bound.

    Its learning rate is learned from any start, and averaging stands in for a schedule. Evaluate under
    `with optimizer.averaged():`, and for a model with BatchNorm under `batch_statistics(model, batches)` too.

    Args:
        model_or_params: a module, or parameters as torch.optim takes them.
        lr: where learning of the learning rate begins, default 1e-3.
        compile: fuse each step with torch.compile, which this tower is worth where a training step takes a few milliseconds or less
            (MLP, batch 256, two cores: 1.1 times as long as with torch's fused Adam, and 3 to 4 times if it is not fused).

    Raises:
        ValueError: no parameters, an lr that is not above 0.
        TypeError: an lr that is not a number.

    >>> import hyperopt, torch
    >>> hyperopt.auto(torch.nn.Linear(2, 1))
    HyperOptimizer(ScheduleFree(Adam) / Adam, 2 tensors in 1 groups)
    """
    params = model_or_params.parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    tower = Hyper(ScheduleFree(Adam)).stack(Adam)
    return (tower if lr is None else tower.replace(lr=lr)).bind(params, compile=compile)
