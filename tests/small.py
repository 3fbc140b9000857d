"""What the tests of the torch.optim face share: a small model, data that depends on the step alone, snapshots and their comparison."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model of four tensors; the same one at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss_at(model: nn.Module, step: int) -> Tensor:
    """The loss of a step, on data drawn for that step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(next(model.parameters()))
    return (model(x) - x[:, :3].sin()).square().mean()


def backward(model: nn.Module, step: int) -> None:
    """Leave the gradients of a step in the parameters."""
    model.zero_grad()
    loss_at(model, step).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take the steps, each on its own data."""
    for step in steps:
        backward(model, step)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of everything that a step may change."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state.get(p, {}) for p in params]
    return copy.deepcopy({"model": model.state_dict(), "groups": groups, "state": state})


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nests of containers, tensors and plain values differ in a bit; −0 is 0."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(t.nan_to_num(7e7, math.inf, -math.inf) for t in (a, b)))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        absent = [f"{path}.{k} on one side only" for k in a.keys() ^ b.keys()]
        return absent + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} != {b!r}"]


def through_distributed(saved: tuple[Any, Any], loaded: tuple[Any, Any], folder: Path) -> None:
    """Save a model and its optimizer by torch.distributed.checkpoint, and load them into another pair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pair, move in ((saved, dcp.save), (loaded, dcp.load)):
            entries: Any = dict(zip(("model", "optimizer"), get_state_dict(*pair), strict=True))
            move(entries, checkpoint_id=folder)
        set_state_dict(*loaded, model_state_dict=entries["model"], optim_state_dict=entries["optimizer"])
