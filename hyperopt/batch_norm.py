"""BatchNorm statistics for averaged weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn


@contextmanager
def batch_statistics(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Context manager that gives BatchNorm layers the statistics of `batches` under the model's present weights.

    Running statistics collected during training belong to the training weights; averaged weights, inside `optimizer.averaged()`, need
    their own. On exit the training statistics are restored bit for bit. A model without BatchNorm runs no batch. The training or
    evaluation mode of every module is preserved.

    Args:
        model: the model, with the weights to evaluate.
        batches: inputs, or (input, target) pairs; about fifty batches of training data are enough.

    Raises:
        ValueError: no batches for a model that has BatchNorm.
        TypeError: not a module; batches that cannot be iterated over, or a single batch.

    Source: Izmailov et al. 2018 (arXiv 1803.05407); the pass itself is torch.optim.swa_utils.update_bn.

    >>> import torch
    >>> from hyperopt import Adam, Hyper, ScheduleFree, batch_statistics
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    >>> optimizer = Hyper(ScheduleFree(Adam)).stack(Adam).bind(model.parameters())
    >>> with optimizer.averaged(), batch_statistics(model, [torch.randn(8, 2)]):
    ...     out = model.eval()(torch.randn(4, 2))
    """
    if not isinstance(model, nn.Module):
        name = type(model).__name__
        raise TypeError(f"batch_statistics takes the model first, a torch.nn.Module, got {name}: batch_statistics(model, batches)")
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batch_statistics takes a list or loader of batches, got {type(batches).__name__}: give [x] for a single one")
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    saved = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    modes = {module: module.training for module in model.modules()}
    try:
        if any(layer.track_running_stats for layer in layers):
            remaining = iter(batches)
            first = list(islice(remaining, 1))
            if not first:
                raise ValueError("batch_statistics was given no batches: give some training data, as inputs or (input, target) pairs")
            try:
                update_bn(chain(first, remaining), model, device=next(model.parameters()).device)
            finally:
                for module, mode in modes.items():
                    module.training = mode
        yield
    finally:
        for layer, buffers in zip(layers, saved, strict=True):
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)
