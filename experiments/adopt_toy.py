"""ADOPT's toy problem: a linear loss on [−1, 1] whose rare large gradients mislead Adam unless beta2 is close to 1.

    python -m experiments.adopt_toy             half a minute on one core; writes adopt_toy.json and adopt_toy.png

Protocol: minimise f(x) = x over [−1, 1], whose solution is −1, from x = 0. The stochastic gradient is k² with probability 1/k and −k
otherwise, with mean 1 and k = 10. beta1 = 0.9, lr = 0.01/√(1 + 0.01·t), and x is clamped to [−1, 1] after each step. All values of beta2
and all seeds are coordinates of one tensor, updated with a beta2 of their own; within a seed all rules and all beta2 see the same
gradients. The result is x averaged over the last tenth of the steps.

ADOPT (Algorithm 1) ends below −0.98 for every beta2; Adam ends at +1 for beta2 ≤ 0.9. Clipped ADOPT is biased until the clip c = t^¼
reaches the largest normalised gradient, which is at most k (t = 10⁴); for beta2 ≥ 0.999 a few seeds have not fully recovered by then.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from experiments import cli, provenance, store
from hyperopt import ADOPT, Adam, Rule, Values

K = 10
BETAS = [0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]
RULES: dict[str, Rule] = {
    "Adam": Adam(),
    "AMSGrad": Adam(amsgrad=True),
    "ADOPT": ADOPT(clipped=False),
    "ADOPT, clipped": ADOPT(),
}
POINTS = 200  # of each curve in the figure


def gradients(steps: int, seeds: int) -> Tensor:
    """The stochastic gradients, of shape (steps, seeds)."""
    generator = torch.Generator().manual_seed(0)
    rare = torch.rand(steps, seeds, generator=generator, dtype=torch.float64) < 1 / K
    return torch.where(rare, float(K**2), float(-K))


def run(rule: Rule, gs: Tensor) -> Tensor:
    """x after every step for each beta2, averaged over seeds, of shape (steps, betas)."""
    h = {name: torch.tensor(rule.value(name), dtype=gs.dtype) for name in rule.declared()}
    h |= {"beta1": torch.tensor(0.9, dtype=gs.dtype), "beta2": torch.tensor(BETAS, dtype=gs.dtype)[:, None]}
    x = gs.new_zeros(len(BETAS), gs.shape[1])
    state, out = rule.init(x), []
    for i, g in enumerate(gs):
        t = torch.tensor(i + 1.0, dtype=gs.dtype)
        values = Values({**h, "lr": 0.01 / (1 + 0.01 * t).sqrt()}, lambda name: 1 - h[name])
        x, state = rule.update(x, g.expand_as(x), state, values, t)
        x = x.clamp(-1, 1)
        out.append(x.mean(1))
    return torch.stack(out)


def final(xs: Tensor) -> list[float]:
    """x for each beta2, averaged over the last tenth of the steps."""
    return xs[-len(xs) // 10 :].mean(0).tolist()


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a panel for each rule with a curve for each beta2."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(result["rules"]), sharey=True)
    for panel, (name, found) in zip(panels, result["rules"].items(), strict=True):
        for curve, beta2 in zip(found["curves"], BETAS, strict=True):
            panel.plot(result["at"], curve, label=f"{beta2:g}")
        panel.axhline(-1, color="black", linestyle=":", linewidth=1)
        panel.set(title=name, xlabel="step", ylim=(-1.1, 1.1), xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("x, mean of the seeds (solution −1)")
    panels[2].legend(title="beta2", fontsize=8, loc="upper left", ncols=2)
    figure.suptitle(f"f(x) = x on [−1, 1] from gradients {K**2} with probability 1/{K} and −{K} otherwise, {result['seeds']} seeds")
    figure.supxlabel(provenance.caption(result), fontsize=7)
    figure.savefig(path, dpi=110)


def main(
    steps: Annotated[int, typer.Option(min=100)] = 100_000,
    seeds: cli.Seeds = 10,
    out: cli.Out = cli.RESULTS,
) -> None:
    """Run every rule with every beta2 and draw the figure."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    gs = gradients(steps, seeds)
    at = torch.logspace(0, torch.tensor(float(steps)).log10().item(), POINTS).round().long().clamp(1, steps).unique()
    result: dict[str, Any] = {**provenance.stamp(), "steps": steps, "seeds": seeds, "beta2": BETAS, "at": at.tolist(), "rules": {}}
    print(f"{'x at the end, beta2 =':24}" + "".join(f"{beta2:>9g}" for beta2 in BETAS))
    for name, rule in RULES.items():
        xs = run(rule, gs)
        curves = [[round(x, 4) for x in curve] for curve in xs[at - 1].T.tolist()]
        result["rules"][name] = {"rule": dataclasses.asdict(rule), "final": final(xs), "curves": curves}
        print(f"{name:24}" + "".join(f"{x:9.3f}" for x in final(xs)))
    store.write(result, out / "adopt_toy.json")
    draw(result, out / "adopt_toy.png")


app = cli.command(main)

if __name__ == "__main__":
    app()
