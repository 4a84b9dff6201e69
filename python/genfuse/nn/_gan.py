"""Generators and critics: MLPs, DCGAN (arXiv 1511.06434) and the residual networks of WGAN-GP (arXiv 1704.00028).

A generator turns z (N, D), and the context (N, C) if there is one, into (N, *shape): ``inputs`` are D + C. A critic
turns (N, *shape) into (N, 1); `WithContext` shows it the context. No critic has batch norm, so what it says of an
example depends on that example alone, as a gradient penalty needs it.

Images start from some 4 x 4 cells and double; if that makes them larger than ``shape``, generators cut the rim off and
critics see it as zeros. ``channels`` are widths from the finest resolution to the coarsest; of a single one the others
are made, each twice the one before, up to 8 times the first. `slerp` leads from one z to another.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.nn._conditioners import last_layer
from genfuse.nn._context import beside, in_tiles
from genfuse.nn._mlp import MLP

SLOPE = 0.2  # of leaky ReLUs
WIDEST = 8  # times the width at the finest resolution

Image = tuple[int, int, int]


class Generator(MLP):
    """Layers that see z (N, D) and the context (N, C), if there is one, side by side: (N, D + C)."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(z if context is None else torch.cat([z, context], 1))


def mlp_generator(inputs: int, shape: tuple[int, ...], hidden: Sequence[int]) -> Generator:
    """Linear layers of the widths ``hidden`` with leaky ReLU between them."""
    return Generator(*_dense(inputs, hidden, math.prod(shape)), nn.Unflatten(1, shape))


def mlp_critic(inputs: int, hidden: Sequence[int], layer_norm: bool = False) -> nn.Sequential:
    """Linear layers with leaky ReLU between them; ``inputs`` are the cells of an example, and the context's C."""
    return MLP(nn.Flatten(), *_dense(inputs, hidden, 1, layer_norm))


def _dense(inputs: int, hidden: Sequence[int], outputs: int, layer_norm: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *hidden]):
        norm = [nn.LayerNorm(after)] if layer_norm else []
        layers += [nn.Linear(before, after), *norm, nn.LeakyReLU(SLOPE, inplace=True)]
    return [*layers, nn.Linear([inputs, *hidden][-1], outputs)]


def dcgan_generator(inputs: int, shape: Image, channels: Sequence[int]) -> Generator:
    """Transposed 4 x 4 convolutions of stride 2 with batch norm. Raises SettingsError for channels that do not fit."""
    stages, base = _stages(shape)
    widths = _widths(channels, stages)[::-1]
    layers = [*_start(inputs, widths[0], base), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
    for before, after in pairwise(widths):
        layers += [
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.ConvTranspose2d(widths[-1], shape[0], 4, stride=2, padding=1))
    network = Generator(*layers, Crop(shape[1:]))
    for module in network.modules():  # arXiv 1511.06434, section 4
        if isinstance(module, nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return network


def dcgan_critic(shape: Image, channels: Sequence[int], layer_norm: bool = False, context: int = 0) -> nn.Sequential:
    """4 x 4 convolutions of stride 2; ``context`` are channels more at the input.

    Raises SettingsError for channels that do not fit.
    """
    stages, base = _stages(shape)
    widths = _widths(channels, stages)
    first = nn.Conv2d(shape[0] + context, widths[0], 4, stride=2, padding=_rim(shape))
    layers: list[nn.Module] = [first, nn.LeakyReLU(SLOPE, inplace=True)]
    for before, after in pairwise(widths):
        norm = [nn.GroupNorm(1, after)] if layer_norm else []
        layers += [
            nn.Conv2d(before, after, 4, stride=2, padding=1), *norm, nn.LeakyReLU(SLOPE, inplace=True)
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * math.prod(base), 1))


def resnet_generator(inputs: int, shape: Image, channels: Sequence[int]) -> Generator:
    """Residual blocks with batch norm, each of which doubles the image.

    Raises SettingsError for channels that do not fit.
    """
    stages, base = _stages(shape)
    widths = _widths(channels, stages + 1)[::-1]
    layers = [*_start(inputs, widths[0], base)]
    for before, after in pairwise(widths):
        larger = nn.Upsample(scale_factor=2)
        branch = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.ReLU(),
            larger,
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1),
        )
        # A 1 x 1 convolution and an enlargement in blocks commute, and the former is cheaper first.
        layers.append(Residual(branch, nn.Sequential(nn.Conv2d(before, after, 1), larger)))
    end = nn.Conv2d(widths[-1], shape[0], 3, padding=1)
    return Generator(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True), end, Crop(shape[1:]))


def resnet_critic(shape: Image, channels: Sequence[int], layer_norm: bool = False, context: int = 0) -> nn.Sequential:
    """Residual blocks, each of which halves the image; ``context`` are channels more at the input.

    Raises SettingsError for channels that do not fit.
    """
    stages, base = _stages(shape)
    widths = _widths(channels, stages + 1)

    def norm(width: int) -> list[nn.Module]:
        return [nn.GroupNorm(1, width)] if layer_norm else []

    layers: list[nn.Module] = [nn.Conv2d(shape[0] + context, widths[0], 3, padding=_rim(shape))]
    for before, after in pairwise(widths):
        branch = nn.Sequential(
            *norm(before),
            nn.ReLU(),
            nn.Conv2d(before, before, 3, padding=1),
            *norm(before),
            nn.ReLU(inplace=True),
            nn.Conv2d(before, after, 3, padding=1),
            nn.AvgPool2d(2),
        )
        # A 1 x 1 convolution and a mean commute too.
        layers.append(Residual(branch, nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, after, 1))))
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(widths[-1] * math.prod(base), 1))


class Residual(nn.Module):
    """branch(x) + shortcut(x); the identity for no shortcut.

    Raises ValueError if one of them would overwrite the x that the other reads.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, nn.Identity() if shortcut is None else shortcut
        for name, part in self.named_children():
            first = next(layer for layer in part.modules() if not [*layer.children()])
            if getattr(first, "inplace", False):
                raise ValueError(f"{name} must not overwrite its input: it begins with {first}")

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class Restorer(nn.Module):
    """Images (N, channels, k h, k w) of a context as `Images` makes it, (N, C + 1, h, w): SRGAN's generator (arXiv
    1609.04802, figure 4) without batch norm (arXiv 1707.02921), on top of what bicubic interpolation makes.

    It draws nothing: z (N, D) has no say. It sees no further than 2 ``blocks`` + 4 cells of the context, and takes it
    in tiles, so images may be of any size.
    """

    def __init__(self, given: int, channels: int, factor: int, width: int, blocks: int) -> None:
        super().__init__()
        self.given, self.channels, self.factor = given, channels, factor

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1)

        branches = [nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width)) for _ in range(blocks)]
        body = Residual(nn.Sequential(*map(Residual, branches), conv(width, width)))
        larger: list[nn.Module] = []
        for prime in (p for p in range(2, factor + 1) if all(p % q for q in range(2, p))):
            while factor % prime == 0:
                larger += [conv(width, width * prime**2), nn.PixelShuffle(prime), nn.LeakyReLU(SLOPE)]
                factor //= prime
        self.layers = nn.Sequential(conv(given + 1, width), body, *larger, last_layer(conv(width, channels)))

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        return in_tiles(self._restore, context, overlap=64)

    def _restore(self, context: Tensor) -> Tensor:
        made = self.layers(context)
        plain = beside(made[:, :0], context[:, : self.given])
        return plain[:, : self.channels] + made  # grey goes to all channels


class WithContext(nn.Module):
    """A network that is shown x (N, ...) and a context, (N, C) or with ``planes`` an image (N, C, h, w), as one tensor.

    With ``planes``, x are images (N, channels, H, W), and the network sees (N, channels + C, H, W), C planes
    more, constant ones of a context (N, C); without, it sees all cells of x as features, (N, cells + C).
    """

    def __init__(self, network: nn.Module, planes: bool) -> None:
        super().__init__()
        self.network, self.planes = network, planes

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = context.to(x.dtype)
        if context.dim() == 4:
            return self.network(beside(x, context))
        if self.planes:
            together = [x, context[:, :, None, None].expand(-1, -1, *x.shape[2:])]
        else:
            together = [x.flatten(1), context]
        return self.network(torch.cat(together, 1))


class Crop(nn.Module):
    """The middle ``size`` of images (N, C, H, W)."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        for axis, size in zip((2, 3), self.size, strict=True):
            x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
        return x


def _stages(shape: Image) -> tuple[int, tuple[int, int]]:
    """How often the sides double, and the sides before that: 4, for powers of two."""
    _, height, width = shape
    stages = math.ceil(math.log2(min(height, width) / 4))
    return stages, (math.ceil(height / 2**stages), math.ceil(width / 2**stages))


def _rim(shape: Image) -> tuple[int, int]:
    """Padding of a critic's first convolution: the usual 1, and the rim that `Crop` takes from generated images."""
    stages, base = _stages(shape)
    rims = [math.ceil((side * 2**stages - size) / 2) for side, size in zip(base, shape[1:], strict=True)]
    return 1 + rims[0], 1 + rims[1]


def _widths(channels: Sequence[int], count: int) -> list[int]:
    """As many widths as there are resolutions, from the finest to the coarsest."""
    if len(channels) == 1:
        return [channels[0] * min(2**k, WIDEST) for k in range(count)]
    if len(channels) != count:
        raise SettingsError(
            f"channels must be one width, or {count}: one for each resolution, from the finest to the coarsest; got "
            f"{tuple(channels)}"
        )
    return list(channels)


def _start(inputs: int, width: int, base: tuple[int, int]) -> list[nn.Module]:
    return [nn.Linear(inputs, width * math.prod(base)), nn.Unflatten(1, (width, *base))]


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Points (steps, N, D) on the arcs from a to b, (N, D) each, at ``weights`` (steps,) from 0 to 1."""
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1)
    angle, t = torch.acos(cosine)[:, None], weights[:, None, None]
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(torch.sin(angle).abs() < 1e-4, torch.lerp(a, b, t), arc)
