"""The time of a training step against the height of the tower, beside torch.optim.Adam, in one interleaved run.

    python -m experiments.bench                 2 minutes on two cores, with nothing else running

MLP 784-128-10, batch 256. Every optimizer takes one block of steps in turn, over and over; the median over blocks is reported with the
fastest and the slowest, and as a ratio to torch.optim.Adam(fused=True). Writes bench.json to experiments/results.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam as TorchAdam
from torch.optim import Optimizer
from tqdm import tqdm

from experiments import models, provenance
from hyperopt import Adam, Hyper

Make = Callable[[nn.Module], Optimizer]


def tower(height: int, *, compile: bool = False) -> Make:
    """An all-Adam tower of this height."""
    spec = Hyper(Adam)
    for _ in range(height):
        spec = spec.stack(Adam)
    return lambda model: spec.bind(model.parameters(), compile=compile)


def main(
    blocks: Annotated[int, typer.Option(min=3, help="how often every optimizer has its turn")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="steps in a block")] = 50,
    compiled: Annotated[bool, typer.Option(help="time compile=True too")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder of the result")] = Path("experiments/results"),
) -> None:
    """Time whole training steps and optimizer steps alone."""
    makes: dict[str, Make] = {
        "torch Adam, fused": lambda model: TorchAdam(model.parameters(), fused=True),
        "torch Adam, foreach": lambda model: TorchAdam(model.parameters(), foreach=True),
        **{f"height {h}": tower(h) for h in (0, 1, 2, 3, 5, 10, 30)},
        **({f"height {h}, compiled": tower(h, compile=True) for h in (0, 1, 2, 3)} if compiled else {}),
    }
    torch.manual_seed(0)
    x, y = torch.rand(256, 784, device=device), torch.randint(10, (256,), device=device)
    trainings = {name: prepare(make, x, y) for name, make in makes.items()}
    times: dict[str, list[float]] = {name: [] for name in makes}
    alone: dict[str, list[float]] = {name: [] for name in makes}
    for step, optimizer_step in trainings.values():
        timed(step, 40, device)
        timed(optimizer_step, 10, device)
    for _ in tqdm(range(blocks), unit="block"):
        for name, (step, optimizer_step) in trainings.items():
            times[name].append(timed(step, steps, device))
            alone[name].append(timed(optimizer_step, steps, device))

    reference = statistics.median(times["torch Adam, fused"])
    rows = {
        name: {
            "training_step_ms": spread(times[name]),
            "optimizer_step_ms": spread(alone[name]),
            "ratio": statistics.median(times[name]) / reference,
        }
        for name in makes
    }
    out.mkdir(parents=True, exist_ok=True)
    result = {**provenance.stamp(), "model": "MLP 784-128-10, batch 256", "blocks": blocks, "steps": steps, "rows": rows}
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':24}{'training step, ms':>28}{'ratio':>8}{'optimizer step, ms':>28}")
    for name, row in rows.items():
        cells = ["{median:.3f} ({min:.3f} to {max:.3f})".format(**row[k]) for k in ("training_step_ms", "optimizer_step_ms")]
        print(f"{name:24}{cells[0]:>28}{row['ratio']:8.2f}{cells[1]:>28}")


def prepare(make: Make, x: Tensor, y: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A training step, and the optimizer step alone on the gradients that it left."""
    torch.manual_seed(0)
    model = models.mlp().to(x.device)
    optimizer = make(model)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, optimizer.step


def timed(run: Callable[[], object], steps: int, device: str) -> float:
    """Milliseconds for one of `steps` calls."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return 1e3 * (time.perf_counter() - started) / steps


def spread(values: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    typer.run(main)
