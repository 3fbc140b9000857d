"""The models of the experiments."""

from torch import nn


def mlp(inputs: int = 784, hidden: int = 128, outputs: int = 10) -> nn.Sequential:
    """The multilayer perceptron of Chandra et al. (2022): one hidden layer, tanh, torch's default initialisation."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
