"""A word-level LSTM language model on the first 60,000 words of War and Peace, by truncated backpropagation through time, 4 epochs.

    python -m examples.lstm --optimizer hyperopt

Minutes on one core of a busy machine: 1.5, with SGD 1.3. Test perplexity: 239, with SGD 250 (means
of 2 seeds); after 6 epochs 353 and 196 (1 seed), when hyperopt.auto has learned the text by heart.
"""

import math
import re
from collections import Counter
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hyperopt
from experiments import data
from experiments.cli import command
from hyperopt import HyperOptimizer

WORDS, BATCH, LENGTH, CLIP = 60_000, 20, 35, 0.25


class LanguageModel(nn.Module):
    """Embedding, two layers of LSTM and a head, with dropout before, between and after the layers."""

    def __init__(self, words: int, width: int = 150, layers: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(words, width), nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout)
        self.head = nn.Linear(width, words)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.uniform_(weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits for words of shape (length, batch), and the state after the last of them."""
        y, state = self.lstm(self.dropout(self.embedding(x)), state)
        return self.head(self.dropout(y)), state


def words(count: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Words to train on, a tenth as many for validation and for the test, each of shape (n, batch), and the size of the vocabulary."""
    text = data.text("war_and_peace")
    characters = "".join(text.alphabet[i] for i in text.train[: 8 * count].tolist())
    found = re.findall(r"\w+|[^\w\s]", characters.lower())[: count * 12 // 10]  # punctuation marks are words too
    number = {word: i for i, (word, _) in enumerate(Counter(found).most_common())}
    parts = torch.tensor([number[word] for word in found]).split([count, count // 10, count // 10])
    train, valid, test = (part[: len(part) // BATCH * BATCH].view(BATCH, -1).T.contiguous() for part in parts)
    return train, valid, test, len(number)


def make(optimizer: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer under comparison."""
    if optimizer == "hyperopt":
        return hyperopt.auto(model)
    return torch.optim.SGD(model.parameters(), lr=20)


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """The perplexity of a text."""
    model.eval()
    logits, _ = model(text[:-1], None)
    model.train()
    return cross_entropy(logits.flatten(0, 1), text[1:].flatten()).exp().item()


def train(optimizer: str = "hyperopt", epochs: int = 4, seed: int = 0, count: int = WORDS) -> float:
    """Train, and return the test perplexity.

    Args:
        optimizer: `hyperopt` or `usual`.
        epochs: over the words.
        seed: of the weights and the dropout.
        count: words to train on.
    """
    torch.manual_seed(seed)
    text, valid, test, size = words(count)
    model = LanguageModel(size)
    opt = make(optimizer, model)
    best = math.inf
    for _ in range(epochs):
        state = None
        for start in range(0, len(text) - 1, LENGTH):
            x, y = text[start : start + LENGTH], text[start + 1 : start + 1 + LENGTH]
            logits, state = model(x[: len(y)], state)
            state = (state[0].detach(), state[1].detach())
            opt.zero_grad()
            cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            opt.step()
        if optimizer == "usual":
            now = evaluate(model, valid)
            if now > best:
                opt.param_groups[0]["lr"] /= 4
            best = min(best, now)
    with opt.averaged() if isinstance(opt, HyperOptimizer) else nullcontext():
        return evaluate(model, test)


def main(
    optimizer: Annotated[Literal["hyperopt", "usual"], typer.Option(help="usual: SGD with lr 20, annealed")] = "hyperopt",
    epochs: Annotated[int, typer.Option(min=0)] = 4,
    seed: int = 0,
) -> None:
    """Train, and print the test perplexity."""
    torch.set_num_threads(1)
    print(f"lstm, {optimizer}, {epochs} epochs, seed {seed}: test perplexity {train(optimizer, epochs, seed):.0f}")


app = command(main)

if __name__ == "__main__":
    app()
