"""A convolutional encoder and decoder for images of any size.

Each stage of the encoder halves height and width, rounding up; the decoder takes the same sizes in reverse, so that odd
sizes, and sides of 1, come out exactly.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from genfuse.nn._mlp import mlp


def _sizes(shape: tuple[int, int, int], stages: int) -> list[tuple[int, int]]:
    """Height and width before the first stage and after each."""
    _, height, width = shape
    return [(math.ceil(height / 2**k), math.ceil(width / 2**k)) for k in range(stages + 1)]


def conv_encoder(
    shape: tuple[int, int, int], channels: Sequence[int], hidden: Sequence[int], outputs: int
) -> nn.Sequential:
    """Images (N, *shape) -> (N, outputs): a 3x3 convolution of stride 2 per entry of ``channels``, then an MLP."""
    stages: list[nn.Module] = []
    for before, after in pairwise([shape[0], *channels]):
        stages += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU(inplace=True)]
    height, width = _sizes(shape, len(channels))[-1]
    return nn.Sequential(*stages, nn.Flatten(), mlp([channels[-1] * height * width, *hidden, outputs]))


class ConvDecoder(nn.Module):
    """The mirror image of `conv_encoder`: (..., inputs) -> (..., *shape, parameters_per_cell)."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        channels: Sequence[int],
        shape: tuple[int, int, int],
        parameters_per_cell: int = 1,
    ) -> None:
        super().__init__()
        self.cell_shape = (shape[0], parameters_per_cell)
        sizes = _sizes(shape, len(channels))[::-1]
        height, width = sizes[0]
        layers: list[nn.Module] = [
            mlp([inputs, *hidden[::-1], channels[-1] * height * width]),
            nn.ReLU(inplace=True),
            nn.Unflatten(-1, (channels[-1], height, width)),
        ]
        widths = [*channels[::-1], channels[0]]
        for (before, after), (small, large) in zip(pairwise(widths), pairwise(sizes), strict=True):
            # A transposed 3x3 convolution of stride 2 and padding 1 makes 2n - 1 of n; even sizes need one more.
            missing = (large[0] - (2 * small[0] - 1), large[1] - (2 * small[1] - 1))
            layers += [
                nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=missing),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Conv2d(channels[0], math.prod(self.cell_shape), 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        images = self.layers(z.reshape(-1, z.shape[-1]))
        cells = images.unflatten(1, self.cell_shape).movedim(2, -1)
        return cells.reshape(*z.shape[:-1], *cells.shape[1:])
