"""The recommended optimizer in one call."""

import math
from typing import Any

import torch

from .optimizer import HyperOptimizer
from .rules import Adam, ScheduleFree
from .tower import Hyper

# Of the root mean square of a gradient of norm 1. On validation data, one or two seeds, ScheduleFree(Adam) / Adam from 1e-3 has with eps of
#                                 1e-8    1e-5    1e-4    3e-4    1e-3    SGD in place of Adam
#     MNIST, error %              2.53    2.31    2.41    2.46    2.37    2.39       101,770 weights, eps is 1.6e-4 here
#     char-RNN, perplexity        4.09    4.06    3.94    3.88    3.81    3.76       285,266          9.4e-5
#     CNN, error %                8.04    7.98    8.07    7.68    7.99    8.34       3,274,634        2.8e-5
#     small GPT, loss             1.86    1.83    1.89    1.91    2.06    2.39       826,368          5.5e-5
SHARE = 0.05


def auto(model_or_params: Any, lr: float | None = None, compile: bool = False) -> HyperOptimizer:
    """The optimizer that needs no tuning: `ScheduleFree(Adam)(eps=…) / Adam`, bound.

    Its learning rate is learned from any start, and averaging stands in for a schedule. Evaluate under
    `with optimizer.averaged():`, and for a model with BatchNorm under `batch_statistics(model, batches)` too.

        eps = 0.05 / √n            n: the number of weights; a twentieth of what each has in a gradient of norm 1

    Adam's 1e-8 gives weights whose gradients are rare or small steps as large as all others; a larger eps is better where lr is learned and
    makes up for the smaller steps. It takes the loss for a mean: of a loss a thousand times as large it is as good as 1e-8, of one a
    thousandth as large the rule is close to `ScheduleFree(SGD)`, which suits a transformer less.

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
    HyperOptimizer(ScheduleFree(Adam)(eps=0.029) / Adam, 2 tensors in 1 groups)
    """
    params = model_or_params.parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    groups = torch.optim.Optimizer(params, {}).param_groups  # whatever torch.optim takes, read once
    n = sum(p.numel() for group in groups for p in group["params"])
    tower = Hyper(ScheduleFree(Adam), eps=float(f"{SHARE / math.sqrt(max(n, 1)):.1e}")).stack(Adam)
    return (tower if lr is None else tower.replace(lr=lr)).bind(groups, compile=compile)
