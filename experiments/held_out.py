"""Weight decay learned from held-out data: the benefit of `hyper_backward` for a model that overfits.

    python -m experiments.held_out                11 minutes on one core beside other work; resumes if it was stopped
    python -m experiments.held_out --figures      the table and the figure from existing results

Protocol: MNIST and Fashion-MNIST, only the first 1,000 training images, MLP 784-128-10, tanh, 1,000 steps with batch 100, 3 seeds. Another
1,000 training images are held out for the hypergradient; loss and error are measured on the test images. All runs of a seed have the same
initial weights and the same batches. The optimizer is AdamW with lr learned by Adam, with defaults, from five values of weight decay
between 1e-3 and 10. The methods:

- held: lr learned from the training loss, weight decay held.
- training: both learned from the training loss.
- lr held-out: lr learned from the held-out loss only, weight decay held.
- held-out: both learned from the held-out loss only.
- all images: as held, but trained on the held-out images too, on 2,000 images in all.

Writes held_out.json (every run), .md and .png to experiments/results.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from experiments import cli, data, models, plots, tables, training
from experiments.store import Store
from hyperopt import Hyper, Recorder

IMAGES, BATCH = 1000, 100
DECAYS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
DATASETS = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}
LEARNED = "AdamW(weight_decay={}, learn=(lr, weight_decay), prior=None) / Adam"
# For each method: label, tower, whether it learns from the held-out loss, number of training images.
METHODS = {
    "held": ("lr from the training loss, weight decay held", "AdamW(weight_decay={}) / Adam", False, IMAGES),
    "training": ("both from the training loss", LEARNED, False, IMAGES),
    "lr held-out": ("lr from the held-out loss, weight decay held", "AdamW(weight_decay={}) / Adam", True, IMAGES),
    "held-out": ("both from the held-out loss", LEARNED, True, IMAGES),
    "all images": ("as the first, trained on the held-out images too", "AdamW(weight_decay={}) / Adam", False, 2 * IMAGES),
}
MEASURES = {"loss": "test loss, nats", "error": "test error, %"}
load = lru_cache(data.load)


def train(dataset: str, method: str, decay: float, seed: int, steps: int, validation: bool) -> dict[str, Any]:
    """One run: final loss and error in percent (None if not finite), and the values of lr and weight decay at up to 100 steps."""
    _, text, held_out, images = METHODS[method]
    x, y, test_x, test_y = load(dataset, validation=validation)
    torch.manual_seed(seed)
    model = models.mlp(x.shape[1])
    # hyper_every larger than the number of steps: nothing is learned from the training loss.
    optimizer = Hyper.parse(text.format(decay)).bind(model.parameters(), hyper_every=steps + 1 if held_out else 1)
    draw, draw_held_out = (torch.Generator().manual_seed(s) for s in (seed, seed + 1000))
    with Recorder(optimizer, max(1, steps // 100)) as recorder:
        for _ in range(steps):
            batch = torch.randint(images, (BATCH,), generator=draw)
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            if held_out:
                batch = torch.randint(IMAGES, 2 * IMAGES, (BATCH,), generator=draw_held_out)
                optimizer.hyper_backward(cross_entropy(model(x[batch]), y[batch]))
    with torch.no_grad():
        outputs = model(test_x)
        wrong = (outputs.argmax(1) != test_y) | ~outputs.isfinite().all(1)
        found = {"loss": cross_entropy(outputs, test_y).item(), "error": 100 * wrong.float().mean().item()}
    columns = {what: recorder.values[what] for what in ("0.lr", "0.weight_decay")}
    scores = {what: value if np.isfinite(value) else None for what, value in found.items()}
    return {**scores, "courses": training.thin(recorder.steps, columns, 100)}


def name(dataset: str, method: str, decay: float) -> str:
    """The key of a cell in the result file, without the seed."""
    return f"{dataset} | {method} | {decay:g}"


def cells() -> Iterator[tuple[str, str, float]]:
    """All cells: data set, method, weight decay."""
    return product(DATASETS, METHODS, DECAYS)


def scores(store: Store, dataset: str, method: str, measure: str) -> list[list[float]]:
    """For each weight decay, the loss or the error of each seed, infinite if it was not finite."""
    runs = [store.seeds(name(dataset, method, decay)) for decay in DECAYS]
    return [[np.inf if run[measure] is None else run[measure] for run in found] for found in runs]


def table(store: Store) -> str:
    """The results in Markdown: for each data set a row for each method and measure."""
    protocol = store.result["protocol"]
    parts = [f"{protocol['title']}; mean ± sd of {protocol['seeds']} seeds.\n"]
    for dataset, title in DATASETS.items():
        rows = []
        for method, (label, *_) in METHODS.items():
            ends = [tables.ends(store.seeds(name(dataset, method, decay)), ["weight_decay"]) for decay in DECAYS]
            for measure, what in MEASURES.items():
                rows.append([f"{label}: {what}", *map(tables.mean_sd, scores(store, dataset, method, measure))])
            if "learn" in METHODS[method][1]:
                rows.append([f"{label}: weight decay at the end", *ends])
        parts.append(tables.markdown([f"{title}, from weight decay", *(f"{decay:g}" for decay in DECAYS)], rows))
    return "\n".join(parts)


def draw(store: Store, path: Path) -> None:
    """Draw a row for each data set: loss and error against the initial weight decay, and the learned weight decays."""
    protocol = store.result["protocol"]
    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = figure.subplots(len(DATASETS), 3)
    for row, (dataset, title) in zip(panels, DATASETS.items(), strict=True):
        for axes, (measure, what) in zip(row, MEASURES.items(), strict=False):
            for color, (method, (label, *_)) in enumerate(METHODS.items()):
                lines = zip(*scores(store, dataset, method, measure), strict=True)
                plots.band(axes, [(DECAYS, line) for line in lines], marker="o", markersize=4, color=f"C{color}", label=label)
            axes.set(xscale="log", xlabel="weight decay at first", ylabel=what, title=title)
            axes.grid(alpha=0.3)
        for color, decay in enumerate(DECAYS):
            for method, style in ("training", ":"), ("held-out", "-"):
                for seed, line in enumerate(plots.courses(store.seeds(name(dataset, method, decay)), "0.weight_decay")):
                    label = f"{method}, from {decay:g}" if seed == 0 else None
                    row[2].plot(*line, color=f"C{color}", linestyle=style, linewidth=1, alpha=0.7, label=label)
        row[2].set(
            yscale="log", ylim=(1e-16, 1e10), xlabel="step", ylabel="weight decay", title=f"{title}: learned beside lr, a line a seed"
        )
        plots.finish(row[2], fontsize=6, loc="upper center", ncols=2)
    title = f"{protocol['title']}; mean of {protocol['seeds']} seeds, bands from the lowest to the highest"
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, title=title)
    figure.supxlabel(store.caption(), fontsize=7)
    figure.savefig(path, dpi=72)


def main(
    steps: cli.Steps = 1000,
    seeds: cli.Seeds = 3,
    validation: Annotated[
        bool, typer.Option(help="measure on the last 10,000 training images; the results are in held_out_validation.json")
    ] = False,
    jobs: cli.Jobs = 1,
    again: cli.Again = None,
    out: cli.Out = cli.RESULTS,
    figures: cli.Figures = False,
) -> None:
    """Run what is missing, print the table and draw the figure."""
    torch.set_num_threads(1)
    title = f"MLP on {IMAGES:,} images, {steps:,} steps of {BATCH}, AdamW / Adam; " + ("validation" if validation else "test") + " data"
    store = Store(out / f"held_out{'_validation' if validation else ''}.json", title=title, seeds=seeds)
    store.forget(again or ())
    if not figures:
        tasks = {f"{name(*cell)} | {seed}": partial(train, *cell, seed, steps, validation) for seed in range(seeds) for cell in cells()}
        store.complete(tasks, jobs)
    cli.publish(store, table(store), draw)


app = cli.command(main)

if __name__ == "__main__":
    app()
