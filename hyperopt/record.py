"""Recording what a tower learns, without host syncs, and writing it to TensorBoard, CSV or PNG."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .optimizer import HyperOptimizer

ROWS = 1024
HYPER, HYPERGRADIENT = "hyper/", "hypergradient/"


@dataclass
class _Block:
    """Up to `ROWS` samples of a fixed set of tags, on the device of the values."""

    tags: tuple[str, ...]
    rows: Tensor
    samples: list[int] = field(default_factory=list)


class Recorder:
    """Records the hyperparameters and hypergradients of an optimizer after its steps.

    Recording copies values on their device and never synchronizes; everything that reads them (`values`, `to_csv`, …) does. Values per
    tensor or per coordinate are recorded as their mean. Samples stay in memory, 4 bytes per value: use `every` to thin out a long run.

    Args:
        optimizer: the `HyperOptimizer` to record.
        every: number of steps from one sample to the next, at least 1. Default: 1, every step.

    Raises:
        ValueError: `every` is below 1.
        TypeError: not a HyperOptimizer.

    >>> import torch
    >>> from hyperopt import SGD, Adam, Hyper, Recorder
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = Hyper(Adam).stack(SGD).bind(model.parameters())
    >>> with Recorder(optimizer) as recorder:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(4, 2)).sum().backward()
    ...         optimizer.step()
    >>> recorder.values["0.lr"].shape
    (3,)
    """

    def __init__(self, optimizer: HyperOptimizer, every: int = 1) -> None:
        if not hasattr(optimizer, "hyperparameters"):
            raise TypeError(f"a Recorder needs a HyperOptimizer, got {type(optimizer).__name__}: bind a tower, as in Hyper(Adam).bind(…)")
        if every < 1:
            raise ValueError(f"every={every} must be at least 1: give the number of steps from one sample to the next")
        self.every, self._seen, self._written = every, 0, 0
        self._steps: list[int] = []
        self._blocks: list[_Block] = []
        self._open: dict[tuple, _Block] = {}
        self._handle = optimizer.register_step_post_hook(self._sample)

    def close(self) -> None:
        """Stop recording; the samples stay readable."""
        self._handle.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def _sample(self, optimizer: Any, *_: object) -> None:
        # A run that was resumed goes on counting: its optimizer has the steps that were taken before.
        calls = [group["tower"]["calls"] for group in optimizer.param_groups if "tower" in group]
        self._seen = max(self._seen + 1, *calls) if calls else self._seen + 1
        if self._seen % self.every:
            return
        places = defaultdict(dict)
        for prefix, values in (HYPER, optimizer.hyperparameters()), (HYPERGRADIENT, optimizer.hypergradients()):
            for key, value in values.items():
                places[value.device, value.dtype][prefix + key] = value.mean() if value.ndim else value
        for (device, dtype), values in places.items():
            # Hypergradients exist from the second step on only; every set of tags has its own block.
            place = (tuple(values), device, dtype)
            block = self._open.get(place)
            if block is None or len(block.samples) == ROWS:
                block = self._open[place] = _Block(place[0], torch.empty(ROWS, len(values), device=device, dtype=dtype))
                self._blocks.append(block)
            torch.stack(list(values.values()), out=block.rows[len(block.samples)])
            block.samples.append(len(self._steps))
        self._steps.append(self._seen)

    def _read(self, first: int = 0) -> dict[str, np.ndarray]:
        """All columns by tag, from sample `first` on; NaN where a tag had no value."""
        columns = defaultdict(lambda: np.full(len(self._steps) - first, np.nan))
        for block in (block for block in self._blocks if block.samples[-1] >= first):
            at = np.array(block.samples) - first
            rows = block.rows[: len(at)].cpu().double().numpy()[at >= 0]
            for tag, column in zip(block.tags, rows.T, strict=True):
                columns[tag][at[at >= 0]] = column
        # What a group was called while it was the only one: "0.lr", and later "0.lr[0]".
        for tag in [tag for tag in columns if f"{tag}[0]" in columns]:
            alone, later = columns.pop(tag), columns[f"{tag}[0]"]
            columns[f"{tag}[0]"] = np.where(np.isnan(later), alone, later)
        return columns

    @property
    def steps(self) -> np.ndarray:
        """The step after which each sample was taken, counted from the first step of the run, also where it was resumed."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """One value per sample for each hyperparameter, learned or held, by `"<level>.<name>"`."""
        return {tag.removeprefix(HYPER): column for tag, column in self._read().items() if tag.startswith(HYPER)}

    @property
    def hypergradients(self) -> dict[str, np.ndarray]:
        """One hypergradient per sample, in raw space, by `"<level>.<name>"`; NaN before the first one exists."""
        return {tag.removeprefix(HYPERGRADIENT): column for tag, column in self._read().items() if tag.startswith(HYPERGRADIENT)}

    def to_tensorboard(self, writer: Any) -> None:
        """Write the samples that no earlier call has written, as `hyper/<level>.<name>` and `hypergradient/<level>.<name>`.

        May be called repeatedly, for example once per epoch, always with the same writer. NaN is left out.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar`.

        Raises:
            TypeError: not a writer.
        """
        if not hasattr(writer, "add_scalar"):
            raise TypeError(f"to_tensorboard needs a writer, such as SummaryWriter(folder), got {writer!r}")
        for tag, column in self._read(self._written).items():
            for step, value in zip(self._steps[self._written :], column, strict=True):
                if not np.isnan(value):
                    writer.add_scalar(tag, value, step)
        self._written = len(self._steps)

    def to_csv(self, path: str | Path) -> None:
        """Write one row per sample, with columns `step`, `<level>.<name>` and `hypergradient/<level>.<name>`; `read_csv` reads it back.

        Args:
            path: the file, which is overwritten.
        """
        columns = {tag.removeprefix(HYPER): column for tag, column in self._read().items()}
        with Path(path).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["step", *columns])
            for step, *row in zip(self._steps, *columns.values(), strict=True):
                table.writerow([step, *(f"{value:.9g}" for value in row)])  # nine digits determine a float32

    def to_png(self, path: str | Path, title: str | None = None) -> None:
        """Plot the learned schedules: a panel for each hyperparameter name with a line for each level.

        Values that never changed are left out, unless none did.

        Args:
            path: the file, which is overwritten.
            title: the title of the figure. Default: "learned schedules".

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # not pyplot: no global state, no display
        except ImportError as error:
            raise ImportError("to_png needs matplotlib: pip install 'hyperopt-torch[experiments]'") from error
        values = self.values
        moved = {key: column for key, column in values.items() if np.unique(column[np.isfinite(column)]).size > 1}
        panels = defaultdict(dict)
        for key, column in (moved or values).items():
            level, name = key.rsplit(".", 1)
            name, _, group = name.partition("[")
            panels[name][f"level {level}" + (f" [{group}" if group else "")] = column
        across = min(len(panels), 3) or 1
        down = math.ceil(len(panels) / across) or 1
        figure = Figure(figsize=(4.5 * across, 3.2 * down + 0.4), layout="constrained")
        for i, (name, lines) in enumerate(panels.items(), 1):
            axis = figure.add_subplot(down, across, i)
            # Decays are plotted as 1 − value: .99 and .999 average over 100 and 1000 steps.
            decay = name != "lr" and all((column[~np.isnan(column)] > 0.5).all() and np.nanmax(column) < 1 for column in lines.values())
            for label, column in lines.items():
                axis.plot(self._steps, 1 - column if decay else column, label=label)
            low, high = axis.dataLim.intervaly
            if low > 0 and (name == "lr" or high > 10 * low):
                axis.set_yscale("log")
            axis.set(xlabel="step", ylabel=f"1 − {name}" if decay else name)
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(title or "learned schedules")
        figure.savefig(path, dpi=120)


def read_csv(path: str | Path) -> dict[str, np.ndarray]:
    """Read a file that `Recorder.to_csv` wrote: `step` (integers) and one float64 column per key.

    Args:
        path: the file.

    Raises:
        ValueError: a file of another format, or one that was truncated or edited since, naming the line.
    """
    with Path(path).open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or "step" not in lines[0]:
        raise ValueError(f"{path} is not a schedule: its first line needs a column 'step', as Recorder.to_csv writes it")
    header, *rows = lines
    table = np.empty((len(rows), len(header)))
    for line, row in enumerate(rows):
        try:
            table[line] = [float(number) for _, number in zip(header, row, strict=True)]
        except ValueError as error:
            raise ValueError(f"{path}, line {line + 2}: {len(header)} numbers are needed, one for each column: {error}") from None
    return {name: column.astype(np.int64 if name == "step" else np.float64) for name, column in zip(header, table.T, strict=True)}
