"""The training problems of the experiments: model, data, number of steps, and metric.

    for x, y in workload.batches(seed):
        loss = workload.loss(model, x, y)

A seed determines the initial weights and the batches, for every method and on every device.
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
    """A training problem; those of the experiments are in `WORKLOADS`."""

    name: str
    title: str  # the protocol in one line
    metric: str  # what `evaluate` returns: error %, perplexity, or loss (nats per character)
    guess: float  # the metric of blind guessing
    steps: int
    batch: int
    make: Callable[[], nn.Module]
    read: Callable[..., data.Data | data.Text]
    length: int = 0  # characters of a training sequence; 0 for images
    blocks: tuple[int | None, int] = (None, 0)  # of the evaluated text: their number (None: all) and their length in characters
    flip: bool = False  # mirror each training image with probability 1/2
    shift: int = 0  # maximal random shift of training images in pixels, padded with zeros

    def model(self, seed: int, device: str = "cpu") -> nn.Module:
        """The model with the initial weights of this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(device)

    def batches(self, seed: int, device: str = "cpu", *, validation: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The `steps` training batches of this seed; with `validation`, as many batches without the held-out training data."""
        source = _read(self.read, device, validation)
        generator = torch.Generator().manual_seed(seed)
        endless = self._characters(source, generator) if isinstance(source, data.Text) else self._images(source, generator)
        return islice(endless, self.steps)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy."""
        return cross_entropy(model(x).flatten(0, -2), y.flatten())

    def shortened(self, steps: int | None) -> Workload:
        """The same workload with so many steps, if they are given."""
        return replace(self, steps=steps, title=f"{self.title}, but {steps} steps") if steps else self

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
            # Without the second term, argmax would count outputs of NaN as the first class.
            wrong = (outputs.argmax(1) != source.test_y) | ~outputs.isfinite().all(1)
            result = 100 * wrong.float().mean()
        model.train(training)
        return result.item()

    @torch.no_grad()
    def sample(self, model: nn.Module, count: int, seed: int = 0) -> str:
        """Sample a text from the model, each character given the `length` before it; it ends early if the logits are not finite."""
        device = next(model.parameters()).device
        alphabet = cast(data.Text, _read(self.read, str(device), False)).alphabet
        generator = torch.Generator().manual_seed(seed)
        written = torch.zeros(1, dtype=torch.long)  # the first character of both alphabets is a newline
        for _ in range(count):
            logits = model(written[None, -self.length :].to(device))[0, -1].cpu()
            if not logits.isfinite().all():
                break
            written = torch.cat([written, torch.multinomial(logits.softmax(0), 1, generator=generator)])
        return "".join(alphabet[i] for i in written[1:].tolist())

    def _images(self, source: data.Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images without end, shuffled in every epoch."""
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
        """Batches of sequences from random positions without end; the targets are the next characters."""
        offsets = torch.arange(self.length)
        while True:
            starts = torch.randint(len(source.train) - self.length, (self.batch, 1), generator=generator)
            index = (starts + offsets).to(source.train.device)
            yield source.train[index], source.train[index + 1]


def _shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `most` pixels in both directions, and pad it with zeros."""
    n, _, height, width = x.shape
    down, right = torch.randint(2 * most + 1, (2, n, 1), generator=generator).to(x.device)
    rows, columns = down + torch.arange(height, device=x.device), right + torch.arange(width, device=x.device)
    images = torch.arange(n, device=x.device)[:, None, None]
    return pad(x, (most,) * 4)[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _read(read: Callable[..., data.Data | data.Text], device: str, validation: bool) -> data.Data | data.Text:
    # Partials compare by identity: one that was unpickled in another process would miss the cache in every run.
    function, arguments = (read.func, read.args) if isinstance(read, partial) else (read, ())
    return _read_once(function, arguments, device, validation)


@lru_cache(maxsize=2)
def _read_once(
    function: Callable[..., data.Data | data.Text], arguments: tuple[Any, ...], device: str, validation: bool
) -> data.Data | data.Text:
    return function(*arguments, device, validation=validation)


def _first(images: int, name: str, device: str, *, validation: bool) -> data.Data:
    """Measured on the first `images` images only."""
    whole = data.load(name, device, validation=validation)
    return whole._replace(test_x=whole.test_x[:images], test_y=whole.test_y[:images])


def _cifar10(images: int, device: str, *, validation: bool) -> data.Data:
    """The first `images` training images, and a fifth as many test images."""
    train_x, train_y, test_x, test_y = data.cifar10(device, images=images, validation=validation)
    return data.Data(train_x, train_y, test_x[: images // 5], test_y[: images // 5])


def _channels_last(network: str) -> nn.Module:
    """One of `models.CIFAR` in channels-last layout, which is a fifth faster on a CPU and suits tensor cores."""
    return models.CIFAR[network]().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def cifar10(network: str, images: int, epochs: int, steps: int | None = None) -> Workload:
    """CIFAR-10 with the augmentation of He et al. (2016): batches of 128, images mirrored and shifted by up to 4 pixels.

    Args:
        network: one of `models.CIFAR`.
        images: number of training images, the first ones; a fifth as many test images are used.
        epochs: number of epochs.
        steps: upper limit of the number of steps.
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

# Small ones, of which a search affords many runs.
SMALL = {
    workload.name: workload
    for workload in (
        Workload(
            "digits",
            "8×8 digits, MLP 64-32-10, batch 64, 10 epochs",
            "error %",
            guess=90,
            steps=10 * 18,
            batch=64,
            make=partial(models.mlp, 64, 32),
            read=partial(data.load, "digits"),
        ),
        Workload(
            "cnn_small",
            "Fashion-MNIST, simple CNN with a quarter of the filters, batch 64, 120 steps",
            "error %",
            guess=90,
            steps=120,
            batch=64,
            make=partial(models.cnn, (8, 16), 128),
            read=partial(_first, 4000, "fashion"),
        ),
        Workload(
            "rnn_small",
            "War and Peace, char-RNN 2×64, batch 16×64, 120 steps",
            "perplexity",
            guess=82,
            steps=120,
            batch=16,
            make=partial(models.CharRNN, 82, 64),
            read=partial(data.text, "war_and_peace"),
            length=64,
            blocks=(64, 500),
        ),
    )
}

# Longer versions, two of them for a GPU.
LONG = (
    replace(WORKLOADS["m3"], name="m3_30", title="MNIST, MLP 784-128-10, batch 256, 30 epochs", steps=7050),
    replace(WORKLOADS["r12"], name="r12_10000", title="War and Peace, char-RNN 2×128, batch 32×64, 10,000 steps", steps=10_000),
    replace(WORKLOADS["gpt"], name="gpt_1500", title="tinyshakespeare, GPT 4×128, batch 32×128, 1,500 steps", steps=1500),
)
WORKLOADS |= {workload.name: workload for workload in LONG}
