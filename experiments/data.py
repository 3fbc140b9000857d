"""Data sets as tensors that lie on one device as a whole; a batch is a selection by index."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("mnist", "fashion", "digits")
CIFAR10 = "cifar-10-batches-py"
# Statistics of all 50,000 training images, scaled to [0, 1]; used even if only a part of them is read.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# File, URL and MD5 sum of each text.
TEXTS = {
    "war_and_peace": (
        "warpeace_input.txt",
        "https://cs.stanford.edu/people/karpathy/char-rnn/warpeace_input.txt",
        "c12bc0d6a5530c4d6878952f5c3d76b9",
    ),
    "tinyshakespeare": (
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "6fb458f1232090904fb40fe944165e91",
    ),
}


class Data(NamedTuple):
    """Images, float32 with the batch dimension first, and labels, int64 of shape (n,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Text(NamedTuple):
    """Characters as indices into the alphabet, int64 of shape (n,)."""

    train: Tensor
    test: Tensor
    alphabet: str


class DataNotFoundError(RuntimeError):
    """The data set is not on this machine and could not be downloaded."""


def load(name: str, device: torch.device | str = "cpu", *, validation: bool = False) -> Data:
    """Load flattened images in [0, 1], of shape (n, features).

    Args:
        name: `mnist`, `fashion` (downloaded into ./data unless the environment variable HYPEROPT_DATA names a folder that holds them)
            or `digits` (1,797 handwritten digits of 8×8 pixels, which come with scikit-learn).
        device: device of the tensors.
        validation: hold out the last 10,000 training images (the last fifth of digits) and return them in place of the test images.
            Choices that a result depends on are made on these, so that the test images remain unseen.

    Raises:
        ValueError: no data set has this name.
        DataNotFoundError: the files are missing and cannot be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"dataset={name!r} must be one of {', '.join(NAMES)}")
    images = _digits() if name == "digits" else _torchvision(name)
    return _images(images, 10_000 if name != "digits" else len(images.train_x) // 5, device, validation)


def cifar10(device: torch.device | str = "cpu", *, images: int | None = None, validation: bool = False) -> Data:
    """Load CIFAR-10, normalised per channel, of shape (n, 3, 32, 32).

    Args:
        device: device of the tensors.
        images: number of training images to use, the first ones; all by default. The folder cifar-10-batches-py in HYPEROPT_DATA may
            lack some of the five training files, if the others have enough images.
        validation: hold out the last fifth of the training images and return it in place of the test images.

    Raises:
        DataNotFoundError: the files, or some of the images asked for, are missing and cannot be downloaded.
    """
    root, given = _root()
    folder = root / CIFAR10
    if not given:
        from torchvision.datasets import CIFAR10 as Download

        try:
            Download(root, download=True)
        except (RuntimeError, OSError) as error:
            raise _not_found("cifar10", CIFAR10) from error
    train, test = sorted(folder.glob("data_batch_*")), folder / "test_batch"
    if not train or not test.exists():
        raise _not_found("cifar10", CIFAR10)
    train_x, train_y = (torch.cat(parts) for parts in zip(*map(_cifar10_file, train), strict=True))
    if images is not None and images > len(train_x):
        raise DataNotFoundError(
            f"{folder} holds {len(train_x):,} training images of the {images:,} that are needed: add data_batch_* files"
        )
    data = Data(train_x[:images], train_y[:images], *_cifar10_file(test))
    return _images(data, len(data.train_x) // 5, device, validation)


def text(name: str, device: torch.device | str = "cpu", *, validation: bool = False) -> Text:
    """Load a text as indices of characters, with the last tenth as test data. A byte order mark is dropped, and \\r\\n is read as \\n.

    Args:
        name: `war_and_peace` or `tinyshakespeare`, read from the folder `text` of HYPEROPT_DATA, or downloaded into ./data/text.
        device: device of the tensors.
        validation: return the second-to-last tenth in place of the last one, and only the text before it as training data.

    Raises:
        ValueError: no text has this name.
        DataNotFoundError: the file is missing and cannot be downloaded.
    """
    if name not in TEXTS:
        raise ValueError(f"text={name!r} must be one of {', '.join(TEXTS)}")
    file, url, md5 = TEXTS[name]
    root, given = _root()
    path = root / "text" / file
    if not given:
        from torchvision.datasets.utils import download_url

        try:
            download_url(url, path.parent, filename=file, md5=md5)
        except (RuntimeError, OSError) as error:
            raise _not_found(name, f"text/{file}") from error
    if not path.exists():
        raise _not_found(name, f"text/{file}")
    characters = path.read_text(encoding="utf-8-sig")  # universal newlines: \r\n becomes \n
    alphabet = "".join(sorted(set(characters)))
    index = {character: i for i, character in enumerate(alphabet)}
    indices = torch.tensor([index[character] for character in characters], device=device)
    start, end = (len(indices) * 8 // 10, len(indices) * 9 // 10) if validation else (len(indices) * 9 // 10, len(indices))
    return Text(indices[:start], indices[start:end], alphabet)


def _root() -> tuple[Path, bool]:
    """The folder of the data sets, and whether HYPEROPT_DATA names it (otherwise data sets are downloaded)."""
    folder = os.environ.get("HYPEROPT_DATA")
    return Path(folder or "data"), bool(folder)


def _not_found(name: str, content: str) -> DataNotFoundError:
    root, given = _root()
    return DataNotFoundError(
        f"data set {name!r} is not in {root} (HYPEROPT_DATA) which has to contain {content}: correct HYPEROPT_DATA, "
        "or unset it to download into ./data"
        if given
        else f"data set {name!r} is not in ./data and could not be downloaded: connect to the network, or set HYPEROPT_DATA to a "
        f"folder that contains {content}"
    )


def _images(data: Data, held_out: int, device: torch.device | str, validation: bool) -> Data:
    """Move the tensors to the device; with `validation`, the last `held_out` training images replace the test images."""
    if validation:
        train_x, train_y = data.train_x, data.train_y
        data = Data(train_x[:-held_out], train_y[:-held_out], train_x[-held_out:], train_y[-held_out:])
    return Data(*(tensor.to(device) for tensor in data))


def _digits() -> Data:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # The samples are sorted by their 43 writers: shuffle them with a fixed seed.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order] / 16
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    test = len(y) // 5
    return Data(x[:-test], y[:-test], x[-test:], y[-test:])


def _torchvision(name: str) -> Data:
    from torchvision import datasets

    dataset = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[name]
    root, given = _root()
    try:
        parts = [dataset(root, train=train, download=not given) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise _not_found(name, f"{dataset.__name__}/raw") from error
    return Data(*(tensor for part in parts for tensor in (part.data.flatten(1).float() / 255, part.targets)))


def _cifar10_file(path: Path) -> tuple[Tensor, Tensor]:
    """Normalised images and labels of one of CIFAR-10's files."""
    with path.open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    x = torch.as_tensor(content["data"]).view(-1, 3, 32, 32).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return (x - mean) / std, torch.tensor(content["labels"])
