"""REINFORCE (Williams 1992) on the cart-pole of Barto, Sutton and Anderson (1983): 16 episodes in each of 100 steps.

    python -m examples.reinforce --optimizer hyperopt

Minutes on one core of a busy machine: 0.4, with Adam 0.5. Steps of an episode: 492, with Adam 496 (means of 2 seeds).
"""

import math
from contextlib import nullcontext
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

import hyperopt
from experiments.cli import command
from hyperopt import HyperOptimizer

EPISODES, LONGEST, DISCOUNT = 16, 500, 0.99


def move(state: Tensor, right: Tensor) -> Tensor:
    """The states of carts with poles, of shape (n, 4), after 0.02 s of a push of 10 N; `right` of shape (n,) is 0 or 1."""
    x, speed, angle, turn = state.unbind(1)
    gravity, cart, pole, half, dt = 9.8, 1.0, 0.1, 0.5, 0.02
    force = (20 * right - 10 + pole * half * turn.square() * angle.sin()) / (cart + pole)
    turning = (gravity * angle.sin() - angle.cos() * force) / (half * (4 / 3 - pole * angle.cos().square() / (cart + pole)))
    speeding = force - pole * half * turning * angle.cos() / (cart + pole)
    return torch.stack([x + dt * speed, speed + dt * speeding, angle + dt * turn, turn + dt * turning], 1)


@torch.no_grad()
def play(policy: nn.Module, episodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """States of shape (time, episodes, 4), actions, and 1 where the pole was still up, each of shape (time, episodes)."""
    state, up = torch.rand(episodes, 4) * 0.1 - 0.05, torch.ones(episodes)
    states, actions, ups = [], [], []
    while up.any() and len(states) < LONGEST:
        right = torch.bernoulli(policy(state).squeeze(1).sigmoid())
        states, actions, ups = [*states, state], [*actions, right], [*ups, up]
        state = move(state, right)
        up = up * (state[:, 0].abs() < 2.4) * (state[:, 2].abs() < math.radians(12))
    return torch.stack(states), torch.stack(actions), torch.stack(ups)


def returns(up: Tensor) -> Tensor:
    """The discounted number of steps that follow each step, of shape (time, episodes)."""
    found, after = torch.empty_like(up), torch.zeros(up.shape[1])
    for t in reversed(range(len(up))):
        found[t] = after = up[t] * (1 + DISCOUNT * after)
    return found


def make(optimizer: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer under comparison."""
    if optimizer == "hyperopt":
        return hyperopt.auto(model)
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def train(optimizer: str = "hyperopt", steps: int = 100, seed: int = 0) -> float:
    """Train, and return the mean length of 100 new episodes; one ends after 500 steps at the latest.

    Args:
        optimizer: `hyperopt` or `usual`.
        steps: of the optimizer.
        seed: of the weights and the episodes.
    """
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 1))
    opt = make(optimizer, policy)
    for _ in range(steps):
        states, actions, up = play(policy, EPISODES)
        gain = returns(up)[up > 0]
        gain = (gain - gain.mean()) / (gain.std() + 1e-6)
        log_odds = policy(states[up > 0]).squeeze(1)
        surprise = nn.functional.binary_cross_entropy_with_logits(log_odds, actions[up > 0], reduction="none")
        opt.zero_grad()
        (surprise * gain).sum().div(EPISODES).backward()
        opt.step()
    with opt.averaged() if isinstance(opt, HyperOptimizer) else nullcontext():
        return play(policy, 100)[2].sum(0).mean().item()


def main(
    optimizer: Annotated[Literal["hyperopt", "usual"], typer.Option(help="usual: Adam with lr 1e-2")] = "hyperopt",
    steps: Annotated[int, typer.Option(min=0)] = 100,
    seed: int = 0,
) -> None:
    """Train, and print the mean length of an episode."""
    torch.set_num_threads(1)
    print(f"reinforce, {optimizer}, {steps} steps, seed {seed}: {train(optimizer, steps, seed):.0f} of {LONGEST} steps in an episode")


app = command(main)

if __name__ == "__main__":
    app()
