"""A small GPT on the characters of Shakespeare, in the shape of nanoGPT: 4 layers of width 128, context 64, 500 steps of 2 × 12 sequences.

    python -m examples.nanogpt --optimizer hyperopt

The loop has a schedule of its own, warm-up and cosine, which it assigns to the parameter groups before every step. With `schedule=True`
what is assigned scales the learned lr and does not replace it.

Minutes on one core of a busy machine: 3, with AdamW as many. Test loss: 1.89, with AdamW 2.18 (means of 2 seeds).
"""

import math
from contextlib import nullcontext
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments import data, models
from experiments.cli import command
from hyperopt import HyperOptimizer
from hyperopt.recommended import TOWER

CONTEXT, BATCH, MICRO_BATCHES, CLIP = 64, 12, 2, 1.0
PEAK, LEAST, WARMUP = 1e-3, 1e-4, 0.05  # of lr; of the steps


def get_lr(step: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine to a tenth of it."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return PEAK * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return LEAST + 0.5 * (1 + math.cos(math.pi * done)) * (PEAK - LEAST)


def make(optimizer: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer under comparison."""
    if optimizer == "hyperopt":
        # The tower of hyperopt.auto, which has no argument `schedule`.
        return TOWER.replace(lr=PEAK).bind(model, schedule=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99))


def get_batch(text: Tensor, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Sequences at random places, and the same shifted by a character."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1))
    places = starts + torch.arange(CONTEXT)
    return text[places], text[places + 1]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """The loss on 600 sequences, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loss_of(model, *get_batch(text, 600)).item()


def train(optimizer: str = "hyperopt", steps: int = 500, seed: int = 0) -> float:
    """Train, and return the test loss in nats a character.

    Args:
        optimizer: `hyperopt` or `usual`.
        steps: of the optimizer.
        seed: of the weights and the batches.
    """
    torch.manual_seed(seed)
    text = data.text("tinyshakespeare")
    model = models.GPT(len(text.alphabet), context=CONTEXT)
    opt = make(optimizer, model)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = get_lr(step, steps)
        opt.zero_grad()
        for _ in range(MICRO_BATCHES):
            (loss_of(model, *get_batch(text.train)) / MICRO_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()
    with opt.averaged() if isinstance(opt, HyperOptimizer) else nullcontext():
        return evaluate(model, text.test)


def main(
    optimizer: Annotated[Literal["hyperopt", "usual"], typer.Option(help="usual: AdamW with lr up to 1e-3")] = "hyperopt",
    steps: Annotated[int, typer.Option(min=0)] = 500,
    seed: int = 0,
) -> None:
    """Train, and print the test loss."""
    torch.set_num_threads(1)
    print(f"nanogpt, {optimizer}, {steps} steps, seed {seed}: test loss {train(optimizer, steps, seed):.3f}")


app = command(main)

if __name__ == "__main__":
    app()
