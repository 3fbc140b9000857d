"""The recommended optimizer in one call."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .optimizer import HyperOptimizer
from .rules import Adam, ScheduleFree
from .spec.tower import Hyper

# Of the root mean square of a gradient of norm 1. On validation data, one seed, ScheduleFree(Adam) / Adam from 1e-3 has with eps of
#                                 1e-8    1e-5    1e-4    3e-4    1e-3    SGD in place of Adam
#     MNIST, error %              2.38    2.31    2.34    2.46    2.30    2.40       101,770 weights: eps is 1.6e-4 here
#     char-RNN, perplexity        4.10    4.06    3.94    3.88    3.82    3.76       285,266: 9.4e-5
#     CNN, error %                7.98    7.98    7.93    7.68    7.88    8.35       3,274,634: 2.8e-5
#     small GPT, loss             1.85    1.83    1.88    1.91    2.08    2.41       826,368: 5.5e-5
SHARE = 0.05


def auto(model_or_params: Any, lr: float | None = None, compile: bool = False) -> HyperOptimizer:
    """The optimizer that needs no tuning: `ScheduleFree(Adam)(eps=…) / Adam`, bound.

    Its learning rate is learned from any start, and averaging stands in for a schedule. Evaluate under
    `with optimizer.averaged():`, and for a model with BatchNorm under `batch_statistics(model, batches)` too.

        eps = 0.05 / √n            n: the number of weights that are trained

    That is a twentieth of what each weight has in a gradient of norm 1. With Adam's 1e-8 a weight whose gradients are rare or small takes
    steps as large as any other. With more a char-RNN ends lower, and other models about the same, until it is so much that a GPT loses.
    The loss is taken for a mean: of one a thousand times as large it is as good as 1e-8, of one a thousandth as large the rule is close to
    `ScheduleFree(SGD)`, which suits a GPT less.

    Args:
        model_or_params: a module, or parameters as torch.optim takes them; a group may give its own values.
        lr: where learning of the learning rate begins, default 1e-3.
        compile: fuse each step with torch.compile, which this tower is worth where a training step takes a few milliseconds or less
            (MLP, batch 256, two cores: 1.2 times as long as with torch's fused Adam, and 3 to 4 times if it is not fused).

    Raises:
        ValueError: no parameters, an lr that is not above 0, and what `Hyper.bind` raises.
        TypeError: an lr that is not a number, something that holds no parameters.

    >>> import hyperopt, torch
    >>> hyperopt.auto(torch.nn.Linear(2, 1))
    HyperOptimizer(ScheduleFree(Adam)(eps=0.029) / Adam, 2 tensors in 1 groups)
    """
    if lr == 0:
        raise ValueError("lr = 0 of auto is on the boundary, where nothing is learned: give a number above 0, or leave it out for 1e-3")
    tower = Hyper(ScheduleFree(Adam)).stack(Adam)
    tower = tower if lr is None else tower.replace(lr=lr)
    params = model_or_params.parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    if isinstance(params, Iterable) and not isinstance(params, (str, torch.Tensor)):
        params = [_lasting(entry) for entry in params]
    # Bound twice: the first one reads whatever torch.optim takes, and raises what is to be raised.
    n = sum(p.numel() for group in tower.bind(params).param_groups for p in group["params"] if p.requires_grad)
    return tower.replace(eps=float(f"{SHARE / math.sqrt(max(n, 1)):.1e}")).bind(params, compile=compile)


def _lasting(entry: Any) -> Any:
    """An entry of params that can be read twice."""
    iterated = isinstance(entry, Mapping) and isinstance(entry.get("params"), Iterator)
    return {**entry, "params": list(entry["params"])} if iterated else entry
