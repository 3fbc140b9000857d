"""torch.compile without its guards: compiled code is found by a key that says everything that can change."""

import gc
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from ..tangents import DUALS
from .buffers import Buffer
from .eager import Block

# From which torch on compiled code writes float64 numbers on a CPU: 2.11 loses what is copied into a 0-d tensor, 2.14 does not.
DOUBLES = "2.14"


class Compiled:
    """Functions fused by torch.compile, from the very same code; eager where no compiler works, after one warning.

    Dynamo's guards take as long as a small model's whole step. Nothing can change here but what the key says, so guards are dropped and
    compiled code is found by its key alone.
    """

    def __init__(self) -> None:
        # Imported here, since these modules take a second to import.
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        self.config = config
        self.errors = (TorchDynamoException, InductorError)
        self.fused: dict[Any, Callable[..., Any]] = {}
        self.works = True

    def __call__(self, key: Any, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args).

        Args:
            key: equal for calls for which the same compiled code is right: the function and the structure of everything that it reads,
                but not the numbers in tensors.
        """
        if not self.works:
            return function(*args)
        key = key, torch.get_num_threads()  # the number of threads is a constant in compiled code
        fused = self.fused.get(key)
        try:
            if fused is not None:
                return fused(*args)
            # Loops of a thousand elements are not worth waking a second thread for; the numbers of a high tower are one kernel, not a few.
            options = {"guard_filter_fn": _none, "cpp.min_chunk_size": 8192, "max_fusion_size": 1024}
            fused = torch.compile(_alone(function), fullgraph=True, options=options)
            # A function called with other shapes than before is compiled for these. dynamic=False would warn each time.
            with DUALS, self.config.patch(automatic_dynamic_shapes=False):  # traced with dual numbers
                found = fused(*args)
            self.fused[key] = fused
            # What Dynamo leaves behind is cycles that hold the optimizer's state, which may be gigabytes, until Python looks for cycles.
            gc.collect()
            return found
        except self.errors as error:
            # Compilation fails before anything has run, so the step can be taken again.
            warnings.warn(f"torch.compile does not work here, this optimizer goes on without it: {error}", RuntimeWarning, stacklevel=2)
            self.works = False
            return function(*args)

    def stage(self, also: Any, function: Callable[..., Any], *args: Any) -> Any:
        """One stage of a step, compiled once for all buffers that look alike: many large ones in one piece would take minutes."""
        return self((also, function.__name__, *(_shape(a) for a in args)), function, *args)


def is_right(params: Sequence[Tensor]) -> bool:
    """Whether this torch compiles a step of these parameters correctly; warns where it does not."""
    right = torch.__version__ >= DOUBLES or not any(p.dtype == torch.float64 and p.device.type == "cpu" for p in params)
    if not right:
        warnings.warn(
            f"torch {torch.__version__} loses float64 numbers that compiled code writes on a CPU: this optimizer is not compiled",
            RuntimeWarning,
            stacklevel=2,
        )
    return right


def _shape(argument: Any) -> Any:
    """The structure of an argument of a stage."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, (list, tuple)):
        return tuple(_shape(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((key, _shape(a)) for key, a in argument.items())
    if isinstance(argument, Block):
        return _shape([argument.x, argument.g, argument.made]), argument.buffer.layout()
    return argument.layout() if isinstance(argument, Buffer) else argument


def _none(guards: Sequence[Any]) -> list[bool]:
    return [False] * len(guards)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: what torch.compile has made is kept with the code, and found there."""
    plain = getattr(function, "__func__", function)
    copy = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    return MethodType(copy, function.__self__) if isinstance(function, MethodType) else copy
