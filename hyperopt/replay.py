"""Replaying a learned schedule on an ordinary torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from .record import Recorder, read_csv


class Replay:
    """A scheduler that sets the hyperparameters of an optimizer to those that level 0 of a tower had, step by step.

    Used like a torch scheduler: the constructor sets the values of the first step, and each `step()` those of the next. Between two
    recorded steps, values are interpolated linearly; before the first and after the last they are constant.

    Args:
        optimizer: any `torch.optim.Optimizer` that reads its `param_groups`.
        source: a `Recorder`, the path of a CSV that it wrote, or a mapping from names ("0.lr" or "lr"; "lr[1]" for parameter group 1
            only) to one value per step, with an entry "step" if steps are missing. Only level 0 is replayed. Values per tensor or per
            coordinate were recorded as their mean and are replayed as it.
        names: the hyperparameters to replay, such as ("lr",). Default: all that were recorded.

    Raises:
        ValueError: nothing was recorded; a name that was not recorded; a name or a parameter group that the optimizer does not have;
            values that are not finite; steps that do not increase.
        TypeError: not a torch optimizer, or a source that is none of the three.

    >>> import torch
    >>> from hyperopt import Replay
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = torch.optim.Adam([w])
    >>> schedule = Replay(optimizer, {"lr": [0.1, 0.2], "beta1": [0.9, 0.8]})
    >>> for _ in range(2):
    ...     w.grad = w.detach()
    ...     optimizer.step()
    ...     schedule.step()
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
    (0.2, (0.8, 0.999))
    """

    def __init__(self, optimizer: Optimizer, source: Recorder | str | Path | Mapping[str, Any], names: Iterable[str] | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a Replay needs an optimizer of torch, got {type(optimizer).__name__}: give torch.optim.Adam(…), for example")
        self.optimizer = optimizer
        self._steps, columns = _read(source)
        recorded = {label.partition("[")[0] for label in columns}
        wanted = recorded if names is None else {names} if isinstance(names, str) else set(names)
        missing = wanted - recorded
        if missing or not columns:
            found = ", ".join(columns) or "nothing of level 0"
            raise ValueError(f"{', '.join(sorted(missing)) or 'a schedule'} cannot be replayed: {found} was recorded")
        if not len(self._steps):
            raise ValueError("a schedule without a step cannot be replayed: record at least one")
        if (np.diff(self._steps) <= 0).any():
            raise ValueError("the steps of a schedule must increase strictly, as a Recorder's do: sort them and leave out repeated ones")
        self._columns: list[tuple[dict[str, Any], str, np.ndarray]] = []
        for label, column in columns.items():
            name, _, group = label.removesuffix("]").partition("[")
            if name in wanted:
                if column.shape == self._steps.shape and group:  # a group that was added later begins with its first value
                    column = np.where(np.isnan(column).cumprod(), column[np.isfinite(column).argmax()], column)
                if column.shape != self._steps.shape or not np.isfinite(column).all():
                    raise ValueError(f"{label} needs one finite number for each of {len(self._steps)} steps, got {column!r}")
                self._columns += [(each, name, column) for each in self._groups(label, name, group)]
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """Set the values of the next step; call it after `optimizer.step()`."""
        self.last_step += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The present lr of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken; the schedule itself is an argument of the constructor."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the step at which `state_dict` was made. Load the optimizer's own state first.

        Raises:
            ValueError: not the state of a Replay.
        """
        step = state_dict.get("last_step")
        if not isinstance(step, int) or step < 0:
            has = ", ".join(state_dict) or "no entries"
            raise ValueError(f"this is not the state of a Replay: it has {has}, and needs last_step, a count of steps")
        self.last_step = step
        self._apply()

    def _apply(self) -> None:
        for group, name, column in self._columns:
            value = float(np.interp(self.last_step + 1, self._steps, column))
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)  # in place, as torch's schedulers do: a captured or compiled step reads this tensor
            elif name in group:
                group[name] = value
            else:
                group["betas"] = tuple(value if name == f"beta{i}" else beta for i, beta in enumerate(group["betas"], 1))

    def _groups(self, label: str, name: str, group: str) -> list[dict[str, Any]]:
        """The parameter groups that a column applies to."""
        groups, kind = self.optimizer.param_groups, type(self.optimizer).__name__
        if group and not (group.isdecimal() and int(group) < len(groups)):
            raise ValueError(f"{label} was recorded, and {kind} has {len(groups)} parameter groups: give it as many")
        selected = [groups[int(group)]] if group else groups
        for each in selected:
            betas = [f"beta{i}" for i, _ in enumerate(each.get("betas", ()), 1)]
            known = [key for key in (*each, *betas) if key not in ("params", "param_names", "betas")]
            if name not in known:
                raise ValueError(f"{kind} has no hyperparameter {name!r}: it has {', '.join(known)}; leave {name!r} out of names")
        return selected


def _read(source: Recorder | str | Path | Mapping[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The recorded steps, and the columns of level 0 by name."""
    if isinstance(source, Recorder):
        columns: dict[str, Any] = {"step": source.steps, **source.values}
    elif isinstance(source, (str, Path)):
        columns = read_csv(source)
    elif isinstance(source, Mapping):
        columns = dict(source)
    else:
        raise TypeError(f"a schedule is read from a Recorder, the path of its CSV or a mapping, got {type(source).__name__}")
    arrays = {name: np.atleast_1d(np.asarray(column, dtype=np.float64)) for name, column in columns.items() if "/" not in name}
    steps = arrays.pop("step", None)
    level0 = {name.removeprefix("0."): column for name, column in arrays.items() if name.startswith("0.") or "." not in name}
    if steps is None:
        steps = np.arange(1, 1 + max(map(len, level0.values()), default=0), dtype=np.float64)
    return steps, {name: _decimal(column) for name, column in level0.items()}


def _decimal(column: np.ndarray) -> np.ndarray:
    """The shortest decimals of float32 values, .999 instead of .99900001: torch computes 1 − beta2 from them in double precision."""
    with np.errstate(over="ignore"):
        single = column.astype(np.float32)
    return np.array([float(str(value)) for value in single]) if (single == column).all() else column
