"""BatchNorm statistics for averaged weights."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def batch_statistics(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Context manager that gives BatchNorm layers the statistics of `batches` under the model's present weights.

    Running statistics collected during training belong to the training weights; averaged weights, inside `optimizer.averaged()`, need
    their own. On exit the training statistics are restored bit for bit. A model without BatchNorm runs no batch. The training or
    evaluation mode of every module is preserved.

    Args:
        model: the model, with the weights to evaluate.
        batches: about fifty batches of training data are enough. Tensors in them are moved to the device of the model. The type of a
            batch says how the model is called: with a dictionary, model(**batch); with a tuple or list, model(*batch[:n]), where n is
            the number of arguments that `model.forward` requires, at least 1, so that the targets of (input, target) pairs are left out;
            with anything else, model(batch).
        forward: called with each batch in place of the model, for batches that this rule does not fit.

    Raises:
        ValueError: no batches for a model that has BatchNorm.
        TypeError: not a module; batches that cannot be iterated over, or a single batch.

    Source: Izmailov et al. 2018 (arXiv 1803.05407); torch.optim.swa_utils.update_bn, which takes tensors and pairs.

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
    if isinstance(batches, (torch.Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batch_statistics takes a list or loader of batches, got {type(batches).__name__}: give [x] for a single one")
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    saved = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    try:
        if any(layer.track_running_stats for layer in layers):
            _collect(model, layers, batches, forward or (lambda batch: _call(model, batch)))
        yield
    finally:
        for layer, buffers in zip(layers, saved, strict=True):
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)


@torch.no_grad()
def _collect(model: nn.Module, layers: list[Any], batches: Iterable[Any], forward: Callable[[Any], Any]) -> None:
    """Give the layers the mean statistics of the batches."""
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    device, batch = next(model.parameters()).device, None
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean
        for batch in batches:
            forward(_moved(batch, device))
        if batch is None:
            raise ValueError("batch_statistics was given no batches: give some training data, as inputs or (input, target) pairs")
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):  # a tensor, or a type of its own, such as PackedSequence or BatchEncoding
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return [_moved(value, device) for value in batch]
    return batch


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "to"):
        return model(*batch[: _required(model)])
    return model(batch)


def _required(model: nn.Module) -> int:
    """The number of positional arguments without a default of a model, at least 1."""
    arguments = inspect.signature(model.forward).parameters.values()
    required = sum(a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) and a.default is a.empty for a in arguments)
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)  # of torch.compile and DDP, which take any arguments
    return _required(inner) if not required and isinstance(inner, nn.Module) else max(required, 1)
