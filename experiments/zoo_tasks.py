"""The tasks of the zoo: twenty ordinary training problems that take seconds each.

    problem = TASKS["drift"].problem(seed=0)
    for model, loss in problem.parts:
        loss(0).backward()                      # the loss of the first step
    problem.measure().metric                    # lower is better

They are the problems that people try an optimizer on: small, badly scaled, noisy, drifting, or almost solved at the start. A seed
determines the data, the initial weights and the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss, softplus

Labelled = tuple[Tensor, Tensor]  # inputs and their labels
Loss = Callable[[int], Tensor]  # the loss of a step, which is counted from 0


class Score(NamedTuple):
    """What is measured after the last step."""

    metric: float  # lower is better
    error_rate: float | None = None  # share of test examples with a wrong label, for classifiers


@dataclass(frozen=True)
class Problem:
    """A task with its data and its initial weights.

    In every step each loss in turn is computed, differentiated, and followed by a step of its model's optimizer.
    """

    parts: Sequence[tuple[nn.Module, Loss]]
    measure: Callable[[], Score]


@dataclass(frozen=True)
class Task:
    """A training problem; those of the zoo are in `TASKS`."""

    name: str
    description: str  # one sentence
    metric: str
    steps: int
    make: Callable[[int], Problem]  # takes the seed of data and batches; weights are drawn from torch's global generator
    floor: float = 0.0  # smaller differences mean nothing: the noise of the data, or the task is solved
    muon: bool = True  # whether every model has hidden matrices

    def problem(self, seed: int) -> Problem:
        """The task with the data, the initial weights and the batches of this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make(seed)


# ---- what several tasks share


def generator(seed: int) -> torch.Generator:
    """A new random generator."""
    return torch.Generator().manual_seed(seed)


def drawn(n: int, size: int, g: torch.Generator) -> Tensor:
    """The indices of a batch, drawn with replacement from n examples."""
    return torch.randint(0, n, (size,), generator=g)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A multilayer perceptron with an activation between any two layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error of a model with one output."""
    return (model(x).squeeze(1) - y).square().mean()


@lru_cache
def split(name: str, divisor: float = 1.0) -> tuple[Labelled, Labelled]:
    """A data set of scikit-learn with inputs divided by a number: the same 70 % for training and 30 % for testing in every run."""
    bunch = getattr(datasets, f"load_{name}")()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / divisor, torch.tensor(bunch.target).long()
    train, test = torch.randperm(len(x), generator=generator(7)).tensor_split([int(0.7 * len(x))])
    return (x[train], y[train]), (x[test], y[test])


def classifier(
    model: nn.Module,
    train: Labelled,
    test: Labelled,
    batch: int,
    g: torch.Generator,
    objective: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    measured: Labelled | None = None,
) -> Problem:
    """A classifier on random batches.

    Args:
        model: returns logits.
        train: training data.
        test: test data, of which the error rate is measured.
        batch: number of examples of a step.
        g: generator of the batches.
        objective: takes logits and labels, returns the training loss.
        measured: the data whose cross entropy is the metric; by default the test data.
    """
    x, y = train

    def loss(_: int) -> Tensor:
        i = drawn(len(x), batch, g)
        return objective(model(x[i]), y[i])

    def measure() -> Score:
        inputs, labels = measured or test
        wrong = model(test[0]).argmax(1) != test[1]
        return Score(cross_entropy(model(inputs), labels).item(), wrong.float().mean().item())

    return Problem([(model, loss)], measure)


# ---- regression


def ill_conditioned(seed: int) -> Problem:
    """Linear regression on 20 features whose scales span 2.5 decades, along random directions; no noise."""
    g = generator(seed)
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, generator=g))
    w = torch.randn(20, generator=g)
    x = torch.randn(1024, 20, generator=g) * torch.logspace(0, -2.5, 20) @ rotation.T
    y = x @ w
    model = nn.Linear(20, 1)
    return Problem([(model, lambda _: squared_error(model, x, y))], lambda: Score(squared_error(model, x, y).item()))


def housing(seed: int) -> Problem:
    """An MLP for targets as large as the prices of houses: the progression of diabetes times 1000."""
    g = generator(seed)
    bunch = getattr(datasets, "load_diabetes")()  # noqa: B009 - the declared return type is a union
    x, y = torch.tensor(bunch.data, dtype=torch.float32), torch.tensor(bunch.target, dtype=torch.float32) * 1000
    x = x / x.std(0)
    model = mlp(10, 32, 1)

    def loss(_: int) -> Tensor:
        i = drawn(len(x), 64, g)
        return squared_error(model, x[i], y[i])

    return Problem([(model, loss)], lambda: Score((squared_error(model, x, y) / y.var()).item()))


def drift(seed: int) -> Problem:
    """Linear regression on fresh batches while the true weights rotate."""
    g = generator(seed)
    model = nn.Linear(10, 1)
    a = torch.randn(10, 10, generator=g)
    rotation = torch.linalg.matrix_exp(0.003 * (a - a.T))
    w = torch.randn(10, generator=g)
    losses: list[Tensor] = []

    def loss(_: int) -> Tensor:
        nonlocal w
        w = rotation @ w
        x = torch.randn(32, 10, generator=g)
        found = (model(x).squeeze(1) - x @ w - 0.1 * torch.randn(32, generator=g)).square().mean()
        losses.append(found.detach())
        return found

    return Problem([(model, loss)], lambda: Score(torch.stack(losses[len(losses) // 2 :]).double().mean().item()))


def plateau(seed: int) -> Problem:
    """Four linear layers with tiny weights: the loss is flat near the saddle, and then falls."""
    g = generator(seed)
    x = torch.randn(256, 6, generator=g)
    y = x @ torch.randn(6, 6, generator=g)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.02)

    def loss(_: int = 0) -> Tensor:
        return (model(x) - y).square().mean()

    return Problem([(model, loss)], lambda: Score(loss().item()))


def curve(seed: int) -> Problem:
    """Three numbers of different scales, y = a exp(−b t) + c with a = 50, b = .3, c = 7, from 1, 1, 0."""
    t = torch.linspace(0, 10, 50)
    y = 50 * (-0.3 * t).exp() + 7 + torch.randn(50, generator=generator(seed))
    model = nn.ParameterList(torch.tensor(value) for value in (1.0, 1.0, 0.0))

    def loss(_: int = 0) -> Tensor:
        a, b, c = model
        return (a * (-b * t).exp() + c - y).square().mean()

    return Problem([(model, loss)], lambda: Score(loss().item()))


# ---- classification


def logistic(name: str, seed: int) -> Problem:
    """Logistic regression on a data set of scikit-learn as it is; the cross entropy is that of the training data."""
    train, test = split(name)
    model = nn.Linear(train[0].shape[1], int(train[1].max()) + 1)
    return classifier(model, train, test, 32, generator(seed), measured=train)


def embedding(seed: int) -> Problem:
    """The topic of a bag of 12 words out of 4000, most of which are rare (Zipf's law)."""
    g = generator(seed)
    words = 4000
    topics = torch.randint(0, 5, (words,), generator=g)

    def bags(n: int) -> Labelled:
        y = torch.randint(0, 5, (n,), generator=g)
        weights = 1 / torch.arange(1, words + 1).float() * (1 + 6 * (topics == y[:, None]).float())
        return torch.multinomial(weights, 12, replacement=True, generator=g), y

    train, test = bags(6000), bags(2000)
    return classifier(nn.Sequential(nn.EmbeddingBag(words, 16), nn.Linear(16, 5)), train, test, 64, g)


def digits(seed: int, batch: int = 64, wrong: float = 0.0, objective: Callable[[Tensor, Tensor], Tensor] = cross_entropy) -> Problem:
    """An MLP on the digits; a share of the training labels may be drawn at random."""
    (x, y), test = split("digits", 16)
    g = generator(seed)
    if wrong:
        replaced = torch.rand(len(y), generator=g) < wrong
        y = torch.where(replaced, torch.randint(0, 10, y.shape, generator=g), y)
    return classifier(mlp(64, 64, 64, 10), (x, y), test, batch, g, objective)


def thousandth(logits: Tensor, labels: Tensor) -> Tensor:
    """A thousandth of the cross entropy."""
    return 1e-3 * cross_entropy(logits, labels)


def fine_tuning(seed: int) -> Problem:
    """An MLP that was trained on the digits, and then sees 100 digits shifted by a pixel."""
    (x, y), (test_x, test_y) = split("digits", 16)
    torch.manual_seed(100 + seed)
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    g = generator(seed)
    for _ in range(600):
        i = drawn(len(x), 64, g)
        optimizer.zero_grad()
        cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()

    def shifted(images: Tensor) -> Tensor:
        return torch.roll(images.view(-1, 8, 8), 1, 2).reshape(-1, 64)

    model.zero_grad()
    return classifier(model, (shifted(x[:100]), y[:100]), (shifted(test_x), test_y), 16, g)


# ---- unsupervised learning, sequences, games


def autoencoder(seed: int) -> Problem:
    """An MLP that squeezes digits through 8 numbers."""
    (x, _), (test_x, _) = split("digits", 16)
    g = generator(seed)
    model = mlp(64, 64, 8, 64, 64)

    def loss(_: int) -> Tensor:
        i = drawn(len(x), 64, g)
        return (model(x[i]) - x[i]).square().mean()

    return Problem([(model, loss)], lambda: Score((model(test_x) - test_x).square().mean().item()))


def factorisation(seed: int) -> Problem:
    """Two factors of rank 4 for a matrix of which 30 % is known; the rest is predicted."""
    g = generator(seed)
    rows, columns, rank = 150, 120, 4
    matrix = torch.randn(rows, rank, generator=g) @ torch.randn(columns, rank, generator=g).T / rank**0.5
    is_known = torch.rand(rows, columns, generator=g) < 0.3
    known, unknown = is_known.nonzero(), (~is_known).nonzero()
    # Embeddings, as each step sees some rows only.
    left, right = (nn.Embedding.from_pretrained(0.1 * torch.randn(n, rank), freeze=False) for n in (rows, columns))

    def error(at: Tensor) -> Tensor:
        i, j = at.unbind(1)
        return ((left.weight[i] * right.weight[j]).sum(1) - matrix[i, j]).square().mean()

    model = nn.ModuleList([left, right])
    return Problem([(model, lambda _: error(known[drawn(len(known), 256, g)]))], lambda: Score(error(unknown).item()))


def variational(seed: int) -> Problem:
    """A diagonal Gaussian fitted to a correlated one, from one sample of the ELBO a step; measured is the exact gap to the optimum."""
    g = generator(seed)
    d = 20
    a = torch.randn(d, d, generator=g) / d**0.5
    precision = a @ a.T + 0.5 * torch.eye(d)
    mean = 3 * torch.randn(d, generator=g)
    model = nn.ParameterList(torch.zeros(d) for _ in range(2))
    mu, log_sigma = model

    def loss(_: int) -> Tensor:
        error = mu + log_sigma.exp() * torch.randn(d, generator=g) - mean
        return 0.5 * error @ precision @ error - log_sigma.sum()

    def measure() -> Score:
        error = mu - mean
        expected = 0.5 * error @ precision @ error + 0.5 * (precision.diagonal() * (2 * log_sigma).exp()).sum() - log_sigma.sum()
        optimum = 0.5 * d + 0.5 * precision.diagonal().log().sum()
        return Score((expected - optimum).item())

    return Problem([(model, loss)], measure)


class Copier(nn.Module):
    """A transformer decoder of two layers for sequences of `length` symbols; symbol number `alphabet` separates."""

    def __init__(self, alphabet: int, length: int, width: int = 32) -> None:
        super().__init__()
        symbols = nn.Embedding(alphabet + 1, width)
        self.positions = nn.Embedding.from_pretrained(0.02 * torch.randn(length, width), freeze=False)
        self.symbols = symbols
        layer = partial(nn.TransformerEncoderLayer, width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(width, alphabet)
        self.mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.symbols(x) + self.positions.weight
        for layer in self.layers:
            h = layer(h, src_mask=self.mask)
        return self.head(h)


def copying(seed: int) -> Problem:
    """A transformer that sees 8 symbols and a separator, and repeats the symbols."""
    g = generator(seed)
    alphabet = length = 8
    model = Copier(alphabet, 2 * length)

    def error(n: int) -> Tensor:
        symbols = torch.randint(0, alphabet, (n, length), generator=g)
        x = torch.cat([symbols, torch.full((n, 1), alphabet), symbols[:, :-1]], 1)
        return cross_entropy(model(x)[:, length:].reshape(-1, alphabet), symbols.reshape(-1))

    return Problem([(model, lambda _: error(32))], lambda: Score(error(200).item()))


def gan(seed: int) -> Problem:
    """A GAN on eight clusters on a circle; measured is the sliced Wasserstein distance of 2000 samples, over 32 directions."""
    g = generator(seed)
    fake, judge = mlp(4, 64, 64, 2), mlp(2, 64, 64, 1)

    def real(n: int) -> Tensor:
        angle = torch.randint(0, 8, (n,), generator=g) * (2 * math.pi / 8)
        return torch.stack([angle.cos(), angle.sin()], 1) * 2 + 0.05 * torch.randn(n, 2, generator=g)

    def noise(n: int) -> Tensor:
        return torch.randn(n, 4, generator=g)

    def judged(_: int) -> Tensor:
        z = noise(64)
        return softplus(-judge(real(64))).mean() + softplus(judge(fake(z).detach())).mean()

    def generated(_: int) -> Tensor:
        return softplus(-judge(fake(noise(64)))).mean()

    def measure() -> Score:
        samples = real(2000), fake(noise(2000))
        angle = torch.linspace(0, math.pi, 32)
        directions = torch.stack([angle.cos(), angle.sin()])
        a, b = ((points @ directions).sort(0)[0] for points in samples)
        return Score((a - b).abs().mean().item())

    return Problem([(judge, judged), (fake, generated)], measure)


def dqn(seed: int) -> Problem:
    """Q-learning with replay and a target network: a cart in the wind that should stay near 0; measured is what 40 steps cost."""
    g = generator(seed)
    values, target = (mlp(2, 64, 64, 3, activation=nn.Tanh) for _ in range(2))
    target.load_state_dict(values.state_dict())
    carts, capacity = 16, 20_000
    states = torch.rand(carts, 2, generator=g) * 2 - 1  # position and velocity
    memory = torch.zeros(capacity, 2), torch.zeros(capacity, dtype=torch.long), torch.zeros(capacity), torch.zeros(capacity, 2)

    def move(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The next states and the rewards."""
        velocity = 0.95 * state[:, 1] + 0.1 * (action.float() - 1) + 0.02 * torch.randn(len(state), generator=g)
        position = (state[:, 0] + velocity * 0.5).clamp(-2, 2)
        return torch.stack([position, velocity], 1), -position.abs() - 0.01 * (action != 1).float()

    @torch.no_grad()
    def explore(step: int) -> None:
        nonlocal states
        is_random = torch.rand(carts, generator=g) < max(0.1, 1 - step / 500)
        action = torch.where(is_random, torch.randint(0, 3, (carts,), generator=g), values(states).argmax(1))
        after, reward = move(states, action)
        at = (torch.arange(carts) + carts * step) % capacity
        for kept, new in zip(memory, (states, action, reward, after), strict=True):
            kept[at] = new
        states = torch.rand(carts, 2, generator=g) * 3 - 1.5 if step % 40 == 0 else after

    def loss(step: int) -> Tensor:
        if step % 50 == 1:
            target.load_state_dict(values.state_dict())
        explore(step)
        i = drawn(min(carts * (step + 1), capacity), 64, g)
        state, action, reward, after = (kept[i] for kept in memory)
        with torch.no_grad():
            y = reward + 0.95 * target(after).max(1)[0]
        return smooth_l1_loss(values(state).gather(1, action[:, None]).squeeze(1), y)

    def measure() -> Score:
        state, cost = torch.rand(512, 2, generator=generator(5)) * 3 - 1.5, 0.0
        for _ in range(40):
            state, reward = move(state, values(state).argmax(1))
            cost = cost - reward.mean()
        return Score(float(cost))

    return Problem([(values, loss)], measure)


TEST_LOSS = "test cross entropy"
TASKS = {
    task.name: task
    for task in (
        Task(
            "linreg ill (full batch)",
            "Linear regression without noise, on features whose scales span 2.5 decades.",
            "mean squared error",
            steps=1500,
            make=ill_conditioned,
            floor=1e-3,
            muon=False,
        ),
        Task(
            "housing, raw targets",
            "An MLP for targets near 150,000, the progression of diabetes times 1000.",
            "mean squared error over the variance of the targets",
            steps=2000,
            make=housing,
        ),
        Task(
            "logreg wine, raw",
            "Logistic regression on 13 features of wine, whose scales span 3 decades.",
            "training cross entropy",
            steps=1500,
            make=partial(logistic, "wine"),
            floor=0.02,
            muon=False,
        ),
        Task(
            "logreg cancer, raw",
            "Logistic regression on 30 features of tumours, whose scales span 5 decades.",
            "training cross entropy",
            steps=1500,
            make=partial(logistic, "breast_cancer"),
            floor=0.02,
            muon=False,
        ),
        Task(
            "embedding zipf",
            "The topic of a bag of words, most of which are rare.",
            TEST_LOSS,
            steps=1200,
            make=embedding,
            muon=False,
        ),
        Task(
            "autoencoder",
            "An MLP that encodes digits in 8 numbers.",
            "mean squared error on test digits",
            steps=1500,
            make=autoencoder,
        ),
        Task(
            "transformer copy",
            "A transformer of two layers that repeats 8 symbols.",
            "cross entropy on new sequences",
            steps=800,
            make=copying,
            floor=1e-3,
        ),
        Task(
            "matrix factorisation",
            "A matrix of rank 4, of which 30 % of the entries are known.",
            "mean squared error on the unknown entries",
            steps=2000,
            make=factorisation,
            floor=1e-2,
            muon=False,
        ),
        Task(
            "GAN ring",
            "A GAN on eight clusters on a circle.",
            "sliced Wasserstein distance",
            steps=2000,
            make=gan,
        ),
        Task(
            "DQN",
            "Q-learning with replay and a target network, for a cart that should stay near 0.",
            "cost of an episode",
            steps=1500,
            make=dqn,
        ),
        Task(
            "ELBO, noisy",
            "A diagonal Gaussian fitted to a correlated one, from a sample of the ELBO in each step.",
            "gap to the optimal ELBO",
            steps=2000,
            make=variational,
            muon=False,
        ),
        Task(
            "MLP digits",
            "An MLP 64-64-64-10 on scikit-learn's digits.",
            TEST_LOSS,
            steps=1200,
            make=digits,
        ),
        Task(
            "MLP sum loss",
            "The same MLP; its loss is the sum over the batch of 64 instead of the mean.",
            TEST_LOSS,
            steps=1200,
            make=partial(digits, objective=partial(cross_entropy, reduction="sum")),
        ),
        Task(
            "MLP loss x1e-3",
            "The same MLP; its loss is multiplied by 1e-3.",
            TEST_LOSS,
            steps=1200,
            make=partial(digits, objective=thousandth),
        ),
        Task(
            "MLP batch 1",
            "The same MLP with one digit in each step.",
            TEST_LOSS,
            steps=3000,
            make=partial(digits, batch=1),
        ),
        Task(
            "MLP 60% wrong labels",
            "The same MLP; 60 % of the training labels are drawn at random.",
            TEST_LOSS,
            steps=1200,
            make=partial(digits, wrong=0.6),
        ),
        Task(
            "drift",
            "Linear regression on fresh batches, while the true weights rotate.",
            "mean squared error over the second half of the steps, each measured before it is taken",
            steps=1500,
            make=drift,
            muon=False,
        ),
        Task(
            "plateau",
            "Four linear layers that start near the saddle at 0.",
            "mean squared error",
            steps=1500,
            make=plateau,
            floor=1e-3,
        ),
        Task(
            "curve fit",
            "Three numbers of different scales, y = a exp(−b t) + c.",
            "mean squared error",
            steps=2000,
            make=curve,
            muon=False,
        ),
        Task(
            "fine-tune",
            "An MLP trained on the digits, and then on 100 digits shifted by a pixel.",
            "cross entropy on shifted test digits",
            steps=300,
            make=fine_tuning,
        ),
    )
}
