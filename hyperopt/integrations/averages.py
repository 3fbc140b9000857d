"""The averaged weights of a model in the place of its training weights: what the callbacks of the frameworks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..batch_norm import batch_statistics
from ..optimizer import HyperOptimizer
from . import unwrapped

BATCHES = 50  # enough for the statistics of BatchNorm


class Averages:
    """Shows the averaged weights of a model for a while, or leaves them there once training is over.

    Args:
        batches: training data for `batch_statistics`, a loader that can be iterated over again and again; for models with BatchNorm.
        forward: how a batch is given to the model, as for `batch_statistics`.
    """

    def __init__(self, batches: Iterable[Any] | None = None, forward: Callable[[Any], Any] | None = None) -> None:
        self.batches, self.forward = batches, forward
        self.training: dict[str, Tensor] | None = None  # the training weights, while the model has the averaged ones for good
        self._shown: ExitStack | None = None

    @contextmanager
    def showing(self, optimizers: Sequence[Any], model: nn.Module) -> Iterator[None]:
        """Inside this context the model has the averaged weights; optimizers that are no towers keep theirs."""
        with ExitStack() as stack:
            for tower in [] if self.training else towers(optimizers):
                stack.enter_context(tower.averaged())
            if self.batches is not None and not self.training:
                stack.enter_context(batch_statistics(model, islice(self.batches, BATCHES), self.forward))
            yield

    def enter(self, optimizers: Sequence[Any], model: nn.Module) -> None:
        """Show the averaged weights until `leave`."""
        self.leave()
        self._shown = ExitStack()
        self._shown.enter_context(self.showing(optimizers, model))

    def leave(self) -> bool:
        """Give the model its training weights back; whether it had the averaged ones."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.close()
        return shown is not None

    def settle(self, optimizers: Sequence[Any], model: nn.Module) -> None:
        """Give the model the averaged weights for good."""
        self.leave()
        if self.training is None:
            with self.showing(optimizers, model):
                averaged = copied(model)
            self.training = copied(model)
            model.load_state_dict(averaged, strict=False)

    def resume(self, model: nn.Module | None) -> None:
        """Go on training: give the model the training weights back, or None to forget them, as others were loaded."""
        if self.training is not None and model is not None:
            model.load_state_dict(self.training, strict=False)
        self.training = None


def towers(optimizers: Sequence[Any]) -> list[HyperOptimizer]:
    """The towers among optimizers, which may be wrapped."""
    found = []
    for optimizer in optimizers:
        try:
            found.append(unwrapped(optimizer))
        except TypeError:
            continue
    return found


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the tensors of a model's state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
