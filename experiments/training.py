"""One training run, with a tower or with plain torch.optim, and the replay of what the run learned.

    result = train(WORKLOADS["m3"], "SGD(lr=0.01) / Adam", seed=0)
    result["metric"], result["courses"]["0.lr"]

A run may be sent to another process (`pool.execute`) if its workload and its optimizers can be pickled: build them from module-level
functions and `functools.partial`.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import hyperopt
from experiments.workloads import Workload
from hyperopt import Hyper, HyperOptimizer, Recorder, Replay, batch_statistics

# Builds everything that is stepped after a backward pass, in this order: optimizers, then their schedulers.
Make = Callable[[nn.Module], list[Any]]
POINTS = 200  # points of each learned schedule and of the training loss in TensorBoard
# What may follow a run, as keys of its result.
HELD, REPLAYED = "held", "replayed"


class Method(NamedTuple):
    """A way of training that an experiment compares with others."""

    label: str  # in tables and legends
    make: Callable[..., Any]  # takes a cell of the experiment's grid, returns the `make` of `train`
    color: str
    style: str = "-"

    @property
    def line_style(self) -> dict[str, Any]:
        """Keyword arguments of `plots.band`."""
        return {"color": self.color, "linestyle": self.style, "label": self.label}


def train(
    workload: Workload,
    make: str | Hyper | Make,
    seed: int,
    *,
    after: Iterable[str] = (),
    evaluations: int = 1,
    points: int = 50,
    validation: bool = False,
    tested: bool = False,
    twin: Hyper | None = None,
    device: str = "cpu",
    log: Path | None = None,
    observe: Callable[[nn.Module, SummaryWriter, int], None] | None = None,
) -> dict[str, Any]:
    """Train one model and measure it.

    Args:
        workload: provides the model, the batches and the metric; any object with the methods of `Workload`.
        make: a tower, its text, or a function that takes the model and returns the optimizers and schedulers to step.
        seed: seed of the initial weights and of the batches.
        after: second runs on plain torch.optim, from the same weights and on the same batches: HELD keeps the final hyperparameters of
            this run constant, REPLAYED sets those of each step. Only for towers.
        evaluations: number of evaluations, evenly spaced, the last one after the last step.
        points: maximal number of points of each learned schedule in the result.
        validation: measure on held-out training data in place of the test data.
        tested: measure the trained model on the test data too, as `test` in the result.
        twin: the tower whose rule `after` runs on torch.optim, where this run's rule has no twin there; of the learned values it is given
            those that both rules have.
        device: where the model is trained.
        log: folder for TensorBoard; None writes nothing.
        observe: called with the model, the TensorBoard writer and the step after each evaluation, if `log` is given.

    Returns:
        A dict for JSON, where None stands for a number that is not finite: `metric`; `loss` of the last step; `steps`; `seconds` spent
        on steps, evaluations excluded; `curve`, the step and the metric of each evaluation; `courses`, the recorded `step`s and at each
        of them every learned value by "<level>.<name>", or "0.lr" for optimizers of torch; and for each entry of `after` a dict with
        the `metric`, `loss`, `steps` and `seconds` of that second run.
    """
    torch.manual_seed(seed)
    model = workload.model(seed, device)
    stepped = bind(make, model)
    optimizers = [each for each in stepped if isinstance(each, Optimizer)]
    towers = [each for each in optimizers if isinstance(each, HyperOptimizer)]
    evaluated = {math.ceil(k * workload.steps / evaluations) for k in range(1, evaluations + 1)}
    losses, curve, rates, seconds = [], [], [], 0.0
    for optimizer in optimizers:
        switch_mode(optimizer, "train")
    with ExitStack() as stack:
        every = 1 if after else max(1, workload.steps // POINTS)
        recorder = stack.enter_context(Recorder(towers[0], every)) if towers else None
        # purge_step: a second run into the same folder replaces the curves of the first.
        writer = stack.enter_context(SummaryWriter(str(log), purge_step=0)) if log else None
        no_bar = True if multiprocessing.parent_process() else None  # None: shown only on a terminal
        batches = workload.batches(seed, device, validation=validation)
        begin = time.perf_counter()
        for x, y in tqdm(batches, total=workload.steps, unit="step", leave=False, disable=no_bar):
            model.zero_grad()
            loss = workload.loss(model, x, y)
            loss.backward()
            for i, each in enumerate(stepped):
                each.step()
                if i == 0 and not towers:  # the lr of this step: schedulers, which follow the optimizers, set the next one
                    rates.append(float(each.param_groups[0]["lr"]))
            losses.append(loss.detach())
            # A tower skips non-finite gradients and continues, but fifty of them in a row mean that the run is lost.
            if len(losses) % 50 == 0 and not torch.stack(losses[-50:]).isfinite().any():
                break
            if len(losses) in evaluated and len(losses) < workload.steps:
                losses[-1].item()  # waits for the device, so that `seconds` includes these steps
                seconds += time.perf_counter() - begin
                curve.append((len(losses), evaluate(workload, model, optimizers, seed, validation, device)))
                if writer and observe:
                    observe(model, writer, len(losses))
                begin = time.perf_counter()
        last = losses[-1].item()
        seconds += time.perf_counter() - begin
        metric = evaluate(workload, model, optimizers, seed, validation, device)
        test = evaluate(workload, model, optimizers, seed, False, device) if tested else math.nan
        curve.append((len(losses), metric))
        steps, columns = _recorded(recorder) if recorder else (np.arange(1, len(rates) + 1), {"0.lr": np.array(rates)})
        if writer:
            measured = f"{'validation' if validation else 'test'} {workload.metric}"
            _write_scalars(writer, measured, torch.stack(losses).cpu().numpy(), curve, thin(steps, columns, POINTS))
            if observe:
                observe(model, writer, len(losses))
    result = {
        "metric": _finite(metric) if math.isfinite(last) else None,
        "loss": _finite(last),
        "steps": len(losses),
        "seconds": round(seconds, 2),
        "curve": {"step": [step for step, _ in curve], "metric": [_finite(value) for _, value in curve]},
        "courses": thin(steps, columns, points),
        **({"test": _finite(test)} if tested else {}),
    }
    if recorder:
        values = {name.removeprefix("0."): column for name, column in recorder.values.items() if name.startswith("0.")}
        for what in after:
            shown = {name: column[-1:] for name, column in values.items()} if what == HELD else values
            if twin:
                shown = {name: column for name, column in shown.items() if name.partition("[")[0] in twin.rule.declared()}
            again = train(workload, partial(replayed, twin or towers[0].tower, shown), seed, validation=validation, device=device)
            result[what] = {name: again[name] for name in ("metric", "loss", "steps", "seconds")}
    return result


def tasks(
    workload: Workload, makes: Mapping[str, str | Hyper | Make], seeds: int, log: Path, replay: Container[str] = (), **options: Any
) -> dict[str, Callable[[], dict[str, Any]]]:
    """A call of `train` for each of `makes` and each seed, by the keys that `Store.seeds` reads.

    Args:
        workload: the workload of all runs.
        makes: the `make` of `train`, by name.
        seeds: number of seeds, counted from 0.
        log: folder for TensorBoard, with a folder for each run.
        replay: names of towers whose learned schedule is replayed on torch.optim, for seed 0.
        options: further keyword arguments of `train`.
    """
    return {
        key: partial(train, workload, make, seed, after=(REPLAYED,) if seed == 0 and name in replay else (), log=log / slug(key), **options)
        for seed in range(seeds)
        for name, make in makes.items()
        for key in [f"{name} | {seed}"]
    }


def slug(key: str) -> str:
    """The name of the TensorBoard folder of a run."""
    return re.sub(r"[^\w.=()-]+", "_", key).strip("_")


# ---- what is stepped


def bind(make: str | Hyper | Make, model: nn.Module) -> list[Any]:
    """The optimizers and schedulers that `make` builds for this model."""
    if isinstance(make, (str, Hyper)):
        return [(Hyper.parse(make) if isinstance(make, str) else make).bind(model.parameters())]
    return make(model)


def auto(model: nn.Module, lr: float | None = None) -> list[Optimizer]:
    """The recommended tower, `hyperopt.auto`, as a `make` of `train`."""
    return [hyperopt.auto(model, lr)]


def plain(tower: Hyper, params: Any) -> Optimizer:
    """The optimizer of torch.optim with the values of the tower's level 0; if torch has none, level 0 itself with nothing learned."""
    rule = tower.rule
    make = getattr(torch.optim, type(rule).__name__, None)
    values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    if make is None or not values.pop("bias_correction", True) or values.pop("cautious", False):
        return tower.held().bind(params)
    if "beta1" in values:
        values["betas"] = values.pop("beta1"), values.pop("beta2")
    if "decoupled" in values:
        values["decoupled_weight_decay"] = values.pop("decoupled")
    return make(params, **values)


def reference(tower: Hyper, schedule: Callable[[Optimizer], Any] | None, model: nn.Module) -> list[Any]:
    """`plain` and, if one is given, a scheduler of torch; `partial(reference, tower, schedule)` is a `make` of `train`."""
    optimizer = plain(tower, model.parameters())
    return [optimizer, schedule(optimizer)] if schedule else [optimizer]


def replayed(tower: Any, values: Mapping[str, Any], model: nn.Module) -> list[Any]:
    """`plain` with recorded values of level 0; `partial(replayed, tower, values)` is a `make` of `train`."""
    optimizer = plain(tower, model.parameters())
    return [optimizer, Replay(optimizer, values)]


# ---- what is measured and recorded


def evaluate(
    workload: Workload, model: nn.Module, optimizers: Iterable[Optimizer], seed: int = 0, validation: bool = False, device: str = "cpu"
) -> float:
    """The metric; if an optimizer averages weights, that of the average, with the statistics of BatchNorm estimated anew for it."""
    with ExitStack() as stack:
        if stack.enter_context(averaged(optimizers)):
            some = islice(workload.batches(seed, device, validation=validation), 50)
            stack.enter_context(batch_statistics(model, some))
        return workload.evaluate(model, validation)


@contextmanager
def averaged(optimizers: Iterable[Optimizer]) -> Iterator[bool]:
    """Replace weights by their averages, for optimizers that keep one; yields whether one of them does."""
    with ExitStack() as stack:
        averages = False
        for optimizer in optimizers:
            if isinstance(optimizer, HyperOptimizer):
                stack.enter_context(optimizer.averaged())
                averages |= optimizer.tower.rule.averages
            elif switch_mode(optimizer, "eval"):
                stack.callback(switch_mode, optimizer, "train")
                averages = True
        yield averages


def switch_mode(optimizer: Optimizer, mode: str) -> bool:
    """Call `optimizer.train()` or `.eval()`, which optimizers of the package schedulefree have; whether there is such a method."""
    switch = getattr(optimizer, mode, None)
    if switch:
        switch()
    return bool(switch)


def _recorded(recorder: Recorder) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The recorded steps, and the values of every learned hyperparameter and of lr, learned or not."""
    names = {**dict.fromkeys(recorder.hypergradients), "0.lr": None}
    values = recorder.values
    return recorder.steps, {name: values[name] for name in names if name in values}


def thin(steps: np.ndarray, columns: Mapping[str, np.ndarray], points: int) -> dict[str, list[float]]:
    """`step` and all columns at no more than `points` evenly spaced steps, the first and the last included."""
    at = np.unique(np.linspace(0, len(steps) - 1, min(points, len(steps))).round().astype(int))
    rounded = {name: [_finite(float(f"{value:.6g}")) for value in column[at]] for name, column in columns.items()}
    return {"step": steps[at].tolist(), **rounded}


def _finite(value: float) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _write_scalars(writer: SummaryWriter, metric: str, losses: np.ndarray, curve: list[tuple[int, float]], courses: dict[str, Any]) -> None:
    step = 0
    for part in np.array_split(losses, min(POINTS, len(losses))):  # the mean of each part, at the last of its steps
        step += len(part)
        writer.add_scalar("loss", part.mean(), step)
    for step, value in curve:
        writer.add_scalar(metric.replace(" ", "_").replace("%", "percent"), value, step)
    for name, column in courses.items():
        for step, value in zip(courses["step"], column, strict=True):
            if name != "step" and value is not None:
                writer.add_scalar(f"hyper/{name}", value, step)
