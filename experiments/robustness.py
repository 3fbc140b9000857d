"""Test error against the initial learning rate, from 1e-8 to 1e2: what a tower makes of a bad start.

    python -m experiments.robustness            4 minutes on two cores, resumes where it was stopped

Protocol: MNIST, MLP 784-128-10, tanh, batch 256, 3 epochs, cross entropy; within a seed every run has the same initial weights and the
same batches. Writes robustness_mnist.json (every run) and robustness_mnist.png to experiments/results.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments import data, models, provenance
from hyperopt import Hyper

# The paper learns alpha itself and the betas, one step back, with a step size that its authors tuned for this model.
PAPER = "Adam(lr={lr}, learn=(lr, beta1, beta2), horizon=1, trust=None, domains={{lr: Real}}) / SGD(lr=1e-5, trust=None)"
METHODS = {
    "Adam": "Adam(lr={lr})",
    "Adam / SGD, the paper's settings": PAPER,
    "Adam / SGD": "Adam(lr={lr}) / SGD",
    "Adam / Adam": "Adam(lr={lr}) / Adam",
    "SGD(momentum=0.9) / Adam": "SGD(lr={lr}, momentum=0.9) / Adam",
}
STARTS = [10.0**k for k in range(-8, 3)]


def train(tower: str, images: data.Data, seed: int, epochs: int) -> dict[str, float]:
    """One run; its test error in percent and the lr it ended with."""
    torch.manual_seed(seed)
    model = models.mlp()
    optimizer = Hyper.parse(tower).bind(model.parameters())
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(images.train_x), generator=shuffle).split(256):
            optimizer.zero_grad()
            cross_entropy(model(images.train_x[index]), images.train_y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        wrong = model(images.test_x).argmax(1) != images.test_y
    return {"error": 100 * wrong.float().mean().item(), "lr": optimizer.hyperparameters()["0.lr"].item()}


def draw(runs: dict[str, dict[str, float]], seeds: int, caption: str, path: Path) -> None:
    """One line a method, the band from the best to the worst seed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        errors = [[runs[key(method, lr, seed)]["error"] for seed in range(seeds)] for lr in STARTS]
        (line,) = axes.plot(STARTS, [statistics.mean(e) for e in errors], marker="o", label=method)
        axes.fill_between(STARTS, [min(e) for e in errors], [max(e) for e in errors], alpha=0.2, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="initial lr", ylabel="test error after 3 epochs, %")
    axes.set_title(f"MNIST, MLP 784-128-10: mean of {seeds} seeds, band from best to worst")
    axes.set_yticks([2.5, 5, 10, 20, 50, 90], labels=["2.5", "5", "10", "20", "50", "90"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.supxlabel(caption, fontsize=7)
    figure.savefig(path, dpi=110)


def key(method: str, lr: float, seed: int) -> str:
    """The name of a run in the result file."""
    return f"{method} | {lr:g} | {seed}"


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("experiments/results"),
    figures: Annotated[bool, typer.Option(help="draw from the results that are there, train nothing")] = False,
) -> None:
    """Run every method from every initial lr, and draw the figure."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "robustness_mnist.json"
    result = json.loads(path.read_text()) if path.exists() else {**provenance.stamp(), "epochs": epochs, "runs": {}}
    runs = result["runs"]
    missing = [(m, lr, s) for m in METHODS for lr in STARTS for s in range(seeds) if key(m, lr, s) not in runs]
    if missing and not figures:
        images = data.load("mnist")
        for method, lr, seed in tqdm(missing, unit="run"):
            runs[key(method, lr, seed)] = train(METHODS[method].format(lr=lr), images, seed, epochs)
            path.write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, seeds, provenance.caption(result), path.with_suffix(".png"))

    print(f"{'test error %, mean of ' + str(seeds) + ' seeds':34}" + "".join(f"{lr:>7.0e}" for lr in STARTS) + "  worst")
    for method in METHODS:
        means = [statistics.mean(runs[key(method, lr, s)]["error"] for s in range(seeds)) for lr in STARTS]
        print(f"{method:34}" + "".join(f"{mean:7.2f}" for mean in means) + f"{max(means):7.2f}")


if __name__ == "__main__":
    typer.run(main)
