"""All examples with hyperopt and with the optimizer that such scripts usually have, as a table.

    python -m examples.compare --seeds 2            resumes if it was stopped; writes examples/results.json after every run
    python -m examples.compare --again "vae | hyperopt"       forgets these runs first
    python -m examples.compare --figures            the table again, from the JSON file alone

Prints the table, and writes it into examples/README.md.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import torch
import typer

from experiments import cli, tables
from experiments.store import Store, metrics

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
OPTIMIZERS = ("usual", "hyperopt")
TABLE = re.compile(r"^\| example \| metric .*\n(?:\|.*\n)+", re.MULTILINE)


class Example(NamedTuple):
    """What an example reports.

    Args:
        metric: its name.
        usual: the usual optimizer.
        higher: whether a higher metric is better.
        digits: after the decimal point.
    """

    metric: str
    usual: str
    higher: bool = False
    digits: int = 2


EXAMPLES = {
    "vae": Example("negative ELBO of a test image, nats", "Adam, lr 1e-3"),
    "wgan": Example("sliced Wasserstein distance", "RMSprop, lr 5e-5", digits=3),
    "lstm": Example("test perplexity", "SGD, lr 20, divided by 4 where validation does not improve", digits=0),
    "reinforce": Example("steps of an episode, at most 500", "Adam, lr 1e-2", higher=True, digits=0),
    "nanogpt": Example("test loss", "AdamW, warm-up and cosine, lr up to 1e-3", digits=3),
}


def run(name: str, optimizer: str, seed: int) -> dict[str, Any]:
    """One run at full size: its metric and its seconds."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    metric = importlib.import_module(f"examples.{name}").train(optimizer, seed=seed)
    return {"metric": metric if math.isfinite(metric) else None, "seconds": round(time.perf_counter() - begin, 1)}


def table(store: Store) -> str:
    """Means over the seeds, with their range, and the ratio of hyperopt to the usual optimizer, in Markdown; below 1 is better."""
    rows = []
    for name, example in EXAMPLES.items():
        found = {optimizer: metrics(store.seeds(f"{name} | {optimizer}")) for optimizer in OPTIMIZERS}
        if all(found.values()):
            usual, ours = (sum(found[optimizer]) for optimizer in OPTIMIZERS)
            ratio = usual / ours if example.higher else ours / usual
            cells = [spread(found[optimizer], example.digits) for optimizer in OPTIMIZERS]
            rows.append([f"[{name}]({name}.py)", example.metric, example.usual, *cells, f"{ratio:.2f}", "yes" if ratio <= 1.1 else "no"])
    return tables.markdown(["example", "metric", "usual optimizer", "usual", "hyperopt", "ratio", "within 10 %"], rows)


def spread(values: list[float], digits: int) -> str:
    """A cell such as `3.11 (3.05 to 3.17)`."""
    mean, least, most = (f"{value:.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


def main(
    seeds: cli.Seeds = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(EXAMPLES)}; may be repeated")] = None,
    jobs: cli.Jobs = 1,
    again: cli.Again = None,
    out: Annotated[Path, typer.Option(help="the JSON file")] = FOLDER / "results.json",
    figures: Annotated[bool, typer.Option(help="only print the table from existing results")] = False,
) -> None:
    """Run what is missing, and print the table."""
    for name in only or ():
        if name not in EXAMPLES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(EXAMPLES)}", param_hint="--only")
    store = Store(out, seeds=seeds)
    store.result["command"] = "python -m examples.compare"
    store.forget(again or ())
    if not figures:
        keys = [(name, optimizer, seed) for seed in range(seeds) for name in only or EXAMPLES for optimizer in OPTIMIZERS]
        store.complete({" | ".join(map(str, key)): partial(run, *key) for key in keys}, jobs)
    found = table(store)
    if out == FOLDER / "results.json":
        README.write_text(TABLE.sub(lambda _: found, README.read_text()))
    print(found)


app = cli.command(main)

if __name__ == "__main__":
    app()
