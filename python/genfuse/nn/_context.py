"""What a model is given beside its examples, as the context that networks see: (N, C), or an image (N, C, h, w)."""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.errors import DataError, SettingsError
from genfuse.ops import has_values


class OneHot(nn.Module):
    """Labels (N,), integers in 0..classes - 1, as one-hot vectors (N, classes), float32.

    Raises DataError for anything else; on a GPU, where the answer has to be waited for, labels outside are not noticed.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, y: Tensor) -> Tensor:
        if y.dim() != 1 or y.dtype.is_floating_point:
            raise DataError(f"labels y must be integers (N,), one for each example; got {y.dtype} {tuple(y.shape)}")
        if y.is_cpu and has_values(y) and y.shape[0] and not 0 <= y.min() <= y.max() < self.classes:
            raise DataError(f"labels y must be in 0..{self.classes - 1}; got {int(y.min())}..{int(y.max())}")
        return F.one_hot(y.long(), self.classes).float()


class Features(nn.Module):
    """A context (N, features) of floats, as it is. Raises DataError for anything else."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[1] != self.features or not y.dtype.is_floating_point:
            raise DataError(f"y must be a context (N, {self.features}) of floats; got {y.dtype} {tuple(y.shape)}")
        return y


class Images(nn.Module):
    """Images (N, channels, h, w) in [0, 1], of any size, as (N, channels + 1, h, w): 2 y - 1, and a plane of ones, by
    which a context of zeros is no image. Raises DataError for anything else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, y: Tensor) -> Tensor:
        if y.dim() != 4 or y.shape[1] != self.channels or not y.dtype.is_floating_point:
            raise DataError(f"y must be images (N, {self.channels}, h, w) of floats; got {y.dtype} {tuple(y.shape)}")
        return torch.cat([2 * y - 1, torch.ones_like(y[:, :1])], 1)


def beside(x: Tensor, context: Tensor) -> Tensor:
    """Images x (N, C, H, W), and behind them, enlarged to their size by bicubic interpolation, (N, c, h, w)."""
    context = context.to(x.dtype)
    if context.shape[2:] != x.shape[2:]:
        context = F.interpolate(context, x.shape[2:], mode="bicubic", align_corners=False)
    return torch.cat([x, context], 1)


def in_tiles(network: Callable[..., Tensor], *images: Tensor, tile: int = 128, overlap: int = 64) -> Tensor:
    """What ``network`` makes of images (N, C, h, w) of any size, (N, C, k h, k w), in tiles of ``tile`` cells.

    Of several images the first is the smallest, and the others are whole numbers of times its size. Where two tiles
    overlap, the result goes from one over to the other within the middle half of the overlap, so that it is that of the
    whole, to rounding, if the network sees no further than a quarter of it. Raises SettingsError for an overlap
    that is not below the tile.
    """
    if not 0 <= overlap < tile:
        raise SettingsError(f"overlap must be at least 0 and below the tile, {tile}; got {overlap}")
    height, width = images[0].shape[2:]
    if max(height, width) <= tile:
        return network(*images)

    def weights(k: int, start: int, side: int) -> Tensor:
        cells = (torch.arange(k * min(tile, side)) + 0.5) / k
        away = torch.minimum(cells if start else cells + tile, (side if start + tile >= side else 0) + tile - cells)
        return ((away - overlap / 4) / (overlap / 2)).clamp(0, 1)

    tops, lefts = (sorted({*range(0, max(1, n - tile), tile - overlap), max(0, n - tile)}) for n in (height, width))
    total, weight = torch.zeros(()), torch.zeros(())
    for top, left in itertools.product(tops, lefts):
        scales = [image.shape[2] // height for image in images]
        seen = [image[..., top * k : (top + tile) * k, left * k : (left + tile) * k]
                for image, k in zip(images, scales, strict=True)]  # fmt: skip
        made = network(*seen)
        k = made.shape[2] // seen[0].shape[2]
        if not total.dim():
            total, weight = (made.new_zeros(*made.shape[:2], k * height, k * width) for _ in range(2))
        window = (weights(k, top, height)[:, None] * weights(k, left, width)).to(made)
        where = (..., slice(top * k, top * k + made.shape[2]), slice(left * k, left * k + made.shape[3]))
        total[where] += window * made
        weight[where] += window
    return total / weight
