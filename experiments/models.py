"""The models of the experiments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu, scaled_dot_product_attention


def mlp(inputs: int = 784, hidden: int = 128, outputs: int = 10) -> nn.Sequential:
    """The multilayer perceptron of Chandra et al. (2022): one hidden layer, tanh, torch's default initialisation."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def cnn(filters: tuple[int, int] = (32, 64), hidden: int = 1024, outputs: int = 10) -> nn.Sequential:
    """The simple CNN of Choi et al. (2019) for flat images of 28×28: two blocks of 5×5 convolution, ReLU, pooling, and a dense layer."""
    first, second = filters
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(second * 7 * 7, hidden), nn.ReLU()),
        nn.Linear(hidden, outputs),
    )


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut that subsamples pixels and pads channels with zeros (option A of He et al.)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, outputs - inputs
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.convolution2(relu(self.norm1(self.convolution1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return relu(y + pad(shortcut, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2)))


def resnet(depth: int = 20, outputs: int = 10) -> nn.Sequential:
    """The ResNet of He et al. (2016) for CIFAR's 32×32 images, with their initialisation. Depth 20, 32, 44 or 56, in general 6n + 2.

    Raises:
        ValueError: depth is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth={depth} must be 6n + 2: 20, 32, 44, 56")
    blocks = []
    for inputs, channels in (16, 16), (16, 32), (32, 64):
        blocks.append(Block(inputs, channels, stride=channels // inputs))
        blocks += [Block(channels, channels, stride=1) for _ in range((depth - 2) // 6 - 1)]
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *blocks,
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(64, outputs),
    )
    return _initialised(model)


def vgg16(outputs: int = 10) -> nn.Sequential:
    """The convolutions of VGG-16 (Simonyan and Zisserman 2015, configuration D) with BatchNorm, from torchvision.

    For an image of 32×32 the last pooling leaves one pixel of 512 channels, followed by one linear layer.
    """
    from torchvision.models import vgg

    return _initialised(nn.Sequential(vgg.make_layers(vgg.cfgs["D"], batch_norm=True), nn.Flatten(), nn.Linear(512, outputs)))


def resnet18(outputs: int = 10) -> nn.Module:
    """torchvision's ResNet-18 (He et al. 2016) for 32×32 images: the first convolution is 3×3 without stride, and no pooling follows it."""
    from torchvision import models

    model: Any = models.resnet18(num_classes=outputs)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return _initialised(model)


def _initialised(model: Any) -> Any:
    """Initialise convolutions as He et al. (2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


# Networks for images of 3×32×32, by name.
CIFAR: dict[str, Callable[[], nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in (20, 32, 44, 56)},
    "vgg16": vgg16,
    "resnet18": resnet18,
}


class CharRNN(nn.Module):
    """The character LSTM of Chandra et al. (2022); every sequence begins with a zero state.

    Takes indices of shape (sequences, length), returns logits of shape (sequences, length, alphabet).
    """

    def __init__(self, alphabet: int, hidden: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


class Layer(nn.Module):
    """A transformer layer: causal attention and an MLP, each with a residual connection and a LayerNorm before it (pre-LN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer on characters with learned positional embeddings, initialised like GPT-2.

    Takes indices of shape (sequences, length ≤ context), returns logits of shape (sequences, length, alphabet).
    """

    def __init__(self, alphabet: int, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(alphabet, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Smaller for layers that add to the residual stream, so that its variance does not grow with depth.
                added = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.layers(self.token(x) + self.position(positions))))
