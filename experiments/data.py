"""Data sets as whole tensors on one device; batches are taken by index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("mnist", "fashion", "digits")


class Data(NamedTuple):
    """Inputs in [0, 1] of shape (n, features), float32; labels of shape (n,), int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class DataNotFoundError(RuntimeError):
    """The data set is neither on this machine nor to be had from the network."""


def load(name: str, device: torch.device | str = "cpu", *, validation: bool = False) -> Data:
    """Load a data set.

    Args:
        name: `mnist`, `fashion` (downloaded into ./data unless the environment variable HYPEROPT_DATA names a folder that holds them)
            or `digits` (scikit-learn's 1,797 handwritten digits of 8×8 pixels, part of its installation).
        device: where the tensors are put.
        validation: split the last 10,000 training images off (of digits, the last fifth) and return them in place of the test
            images, which stay unseen: for every choice that a result depends on.

    Raises:
        ValueError: no data set has this name.
        DataNotFoundError: the files are missing and cannot be downloaded.
    """
    if name not in NAMES:
        raise ValueError(f"dataset={name!r} must be one of {', '.join(NAMES)}")
    train_x, train_y, test_x, test_y = _digits() if name == "digits" else _torchvision(name)
    if validation:
        held_out = 10_000 if name != "digits" else len(train_x) // 5
        train_x, test_x = train_x[:-held_out], train_x[-held_out:]
        train_y, test_y = train_y[:-held_out], train_y[-held_out:]
    return Data(*(tensor.to(device) for tensor in (train_x, train_y, test_x, test_y)))


def _digits() -> Data:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # The samples stand in order of the 43 writers' sheets: shuffle, always in the same way.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order] / 16
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    test = len(y) // 5
    return Data(x[:-test], y[:-test], x[-test:], y[-test:])


def _torchvision(name: str) -> Data:
    from torchvision import datasets

    dataset = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[name]
    folder = os.environ.get("HYPEROPT_DATA")
    root = Path(folder or "data")
    try:
        parts = [dataset(root, train=train, download=not folder) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataNotFoundError(
            f"data set {name!r} is not in {root} (HYPEROPT_DATA) which has to contain {dataset.__name__}/raw: correct HYPEROPT_DATA, "
            "or unset it to download into ./data"
            if folder
            else f"data set {name!r} is not in ./data and could not be downloaded: connect to the network, or set HYPEROPT_DATA to a "
            f"folder that contains {dataset.__name__}/raw"
        ) from error
    return Data(*(tensor for part in parts for tensor in (part.data.flatten(1).float() / 255, part.targets)))
