"""Hyperparameters as the update of a rule reads them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Values:
    """The hyperparameters of one update as attributes, and 1 − value without cancellation.

    Args:
        values: the value of every hyperparameter, by name: 0-d, or one for each coordinate.
        complement: returns 1 − value of the hyperparameter that it is given by name.
    """

    def __init__(self, values: Mapping[str, Tensor], complement: Callable[[str], Tensor]) -> None:
        self.__dict__.update(values)
        self._complement = complement

    def __getattr__(self, name: str) -> Tensor:
        known = ", ".join(key for key in self.__dict__ if not key.startswith("_"))
        raise AttributeError(f"this rule declares no hyperparameter {name!r}: it has {known}")

    def one_minus(self, name: str) -> Tensor:
        """1 − value, exact also where the value is within rounding of 1."""
        return self._complement(name)

    def one_minus_power(self, name: str, t: Tensor) -> Tensor:
        """1 − value**t, the bias of an exponential average after t steps."""
        return -torch.expm1(t * torch.log1p(-self._complement(name)))
