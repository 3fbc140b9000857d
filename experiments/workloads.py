"""The training problems of the experiments: a model, its data, how many steps, and what is measured at the end.

    for x, y in workload.batches(seed):
        loss = workload.loss(model, x, y)

Within a seed, every method gets the same initial weights and the same batches, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from experiments import data, models


@dataclass(frozen=True)
class Workload:
    """One training problem; `WORKLOADS` has them all."""

    name: str
    title: str  # the protocol in one line
    metric: str  # what `evaluate` returns: error %, perplexity, or loss (nats per character)
    guess: float  # what blind guessing scores there
    steps: int
    batch: int
    make: Callable[[], nn.Module]
    read: Callable[..., data.Data | data.Text]
    length: int = 0  # characters of a training sequence
    blocks: tuple[int | None, int] = (None, 0)  # of the text that is evaluated: how many (None: all), of how many characters
    flip: bool = False  # mirror half of the training images
    shift: int = 0  # pixels by which training images are moved at random, at most; what comes in is zero

    def model(self, seed: int, device: str = "cpu") -> nn.Module:
        """The model with the initial weights of this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(device)

    def batches(self, seed: int, device: str = "cpu", *, validation: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The `steps` training batches of this seed; for validation as many, none with what is held out."""
        source = _read(self.read, device, validation)
        generator = torch.Generator().manual_seed(seed)
        endless = self._characters(source, generator) if isinstance(source, data.Text) else self._images(source, generator)
        return islice(endless, self.steps)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy."""
        return cross_entropy(model(x).flatten(0, -2), y.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, validation: bool = False) -> float:
        """The metric on the test data, or on held-out training data."""
        source = _read(self.read, str(next(model.parameters()).device), validation)
        training = model.training
        model.eval()
        if isinstance(source, data.Text):
            count, length = self.blocks
            count = count or (len(source.test) - 1) // length
            xs, ys = (source.test[i : i + count * length].view(count, length) for i in (0, 1))
            losses = [self.loss(model, x, y) * len(x) for x, y in zip(xs.split(64), ys.split(64), strict=True)]
            mean = torch.stack(losses).sum() / count
            result = mean.exp() if self.metric == "perplexity" else mean
        else:
            outputs = torch.cat([model(x) for x in source.test_x.split(250)])
            # Outputs that are not numbers are no answer, not the first class.
            wrong = (outputs.argmax(1) != source.test_y) | ~outputs.isfinite().all(1)
            result = 100 * wrong.float().mean()
        model.train(training)
        return result.item()

    @torch.no_grad()
    def sample(self, model: nn.Module, count: int, seed: int = 0) -> str:
        """A text that the model writes: each character is drawn after the `length` before it, until the model is not finite any more."""
        device = next(model.parameters()).device
        alphabet = cast(data.Text, _read(self.read, str(device), False)).alphabet
        generator = torch.Generator().manual_seed(seed)
        written = torch.zeros(1, dtype=torch.long)  # the first character of both alphabets is the end of a line
        for _ in range(count):
            logits = model(written[None, -self.length :].to(device))[0, -1].cpu()
            if not logits.isfinite().all():
                break
            written = torch.cat([written, torch.multinomial(logits.softmax(0), 1, generator=generator)])
        return "".join(alphabet[i] for i in written[1:].tolist())

    def _images(self, source: data.Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch after epoch, each in an order of its own."""
        device = source.train_x.device
        while True:
            for index in torch.randperm(len(source.train_x), generator=generator).to(device).split(self.batch):
                x, y = source.train_x[index], source.train_y[index]
                if self.flip:
                    mirrored = torch.rand(len(x), generator=generator).to(device) < 0.5
                    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
                if self.shift:
                    x = _shifted(x, self.shift, generator)
                yield x, y

    def _characters(self, source: data.Text, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Sequences from random positions, and the characters that follow."""
        offsets = torch.arange(self.length)
        while True:
            starts = torch.randint(len(source.train) - self.length, (self.batch, 1), generator=generator)
            index = (starts + offsets).to(source.train.device)
            yield source.train[index], source.train[index + 1]


def _shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `most` pixels in both directions."""
    n, _, height, width = x.shape
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator).to(x.device)
    rows, columns = down + torch.arange(height, device=x.device), right + torch.arange(width, device=x.device)
    images = torch.arange(n, device=x.device)[:, None, None]
    return pad(x, (most,) * 4)[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _read(read: Callable[..., data.Data | data.Text], device: str, validation: bool) -> data.Data | data.Text:
    # A partial that was sent to a process is another object every time, and would be read anew for every run.
    function, arguments = (read.func, read.args) if isinstance(read, partial) else (read, ())
    return _read_once(function, arguments, device, validation)


@lru_cache(maxsize=2)
def _read_once(
    function: Callable[..., data.Data | data.Text], arguments: tuple[Any, ...], device: str, validation: bool
) -> data.Data | data.Text:
    return function(*arguments, device, validation=validation)


def _cifar10(images: int, device: str, *, validation: bool) -> data.Data:
    """The first training images, and a fifth as many test images."""
    train_x, train_y, test_x, test_y = data.cifar10(device, images=images, validation=validation)
    return data.Data(train_x, train_y, test_x[: images // 5], test_y[: images // 5])


def _channels_last(network: str) -> nn.Module:
    """One of `models.CIFAR`, a fifth faster on a CPU, and laid out for tensor cores."""
    return models.CIFAR[network]().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def cifar10(network: str, images: int, epochs: int, steps: int | None = None) -> Workload:
    """CIFAR-10 as He et al. (2016) train on it: batches of 128, images mirrored and moved by up to 4 pixels.

    Args:
        network: one of `models.CIFAR`.
        images: to train on, the first of them; a fifth as many are tested on.
        epochs: how often all of them are seen.
        steps: at most so many steps.
    """
    each = -(-images // 128)
    return Workload(
        f"cifar10_{network}",
        f"CIFAR-10 ({images:,} images), {network}, batch 128, {epochs} epochs",
        "error %",
        guess=90,
        steps=min(each * epochs, steps or each * epochs),
        batch=128,
        make=partial(_channels_last, network),
        read=partial(_cifar10, images),
        flip=True,
        shift=4,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "m3",
            "MNIST, MLP 784-128-10, batch 256, 3 epochs",
            "error %",
            guess=90,
            steps=3 * 235,
            batch=256,
            make=models.mlp,
            read=partial(data.load, "mnist"),
        ),
        Workload(
            "r12",
            "War and Peace, char-RNN 2×128, batch 32×64, 1,200 steps",
            "perplexity",
            guess=82,
            steps=1200,
            batch=32,
            make=partial(models.CharRNN, 82),
            read=partial(data.text, "war_and_peace"),
            length=64,
            blocks=(64, 1000),
        ),
        Workload(
            "c3",
            "CIFAR-10 (20,000 images), ResNet-20, batch 128, 3 epochs",
            "error %",
            guess=90,
            steps=3 * 157,
            batch=128,
            make=partial(_channels_last, "resnet20"),
            read=partial(_cifar10, 20_000),
            flip=True,
        ),
        Workload(
            "cnn",
            "Fashion-MNIST, simple CNN, batch 128, 2 epochs",
            "error %",
            guess=90,
            steps=2 * 469,
            batch=128,
            make=models.cnn,
            read=partial(data.load, "fashion"),
        ),
        Workload(
            "gpt",
            "tinyshakespeare, GPT 4×128, batch 32×128, 500 steps",
            "loss",
            guess=4.17,  # log 65
            steps=500,
            batch=32,
            make=partial(models.GPT, 65),
            read=partial(data.text, "tinyshakespeare"),
            length=128,
            blocks=(None, 128),
        ),
    )
}

# What a GPU has time for.
LONG = (
    replace(WORKLOADS["r12"], name="r12_10000", title="War and Peace, char-RNN 2×128, batch 32×64, 10,000 steps", steps=10_000),
    replace(WORKLOADS["gpt"], name="gpt_1500", title="tinyshakespeare, GPT 4×128, batch 32×128, 1,500 steps", steps=1500),
)
WORKLOADS |= {workload.name: workload for workload in LONG}
