"""Networks that see a noise level: (x, log_sigma, context) -> as much as x.

x is (N, D), or (N, C, H, W) of any height and width; log_sigma, the logarithm of its noise level, (N,); the context
(N, F) or None; of `UNet` also an image (N, C, h, w).
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse import ops
from genfuse.errors import SettingsError
from genfuse.nn._conditioners import last_layer
from genfuse.nn._context import beside


class NoiseEmbedding(nn.Module):
    """Features (N, features) of a logarithm of a noise level (N,), by cosines and sines of it, and of the context."""

    frequencies: Tensor

    def __init__(self, features: int, context: int = 0, waves: int = 16) -> None:
        super().__init__()
        # A denoiser changes over factors of e in the noise level: waves from 60 to 1.5 of them long.
        self.register_buffer("frequencies", torch.logspace(math.log10(0.1), math.log10(4), waves), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * waves + context, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, log_sigma: Tensor, context: Tensor | None = None) -> Tensor:
        angles = log_sigma[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin(), *([] if context is None else [context])], -1))


class _LinearBlock(nn.Module):
    """A residual block of two linear layers, activation first, with the noise level's scale and shift between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.film = nn.Linear(width, 2 * width)
        self.second = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.film(embedded).chunk(2, -1)
        return h + self.second(torch.addcmul(shift, self.first(F.silu(h)), 1 + scale))


class DenoisingMLP(nn.Module):
    """Residual blocks that see the noise level; examples of any shape, (N, ...), as vectors of ``features`` cells.

    ``hidden`` has the width of each block. Raises SettingsError unless there is one at least, and all are equal.
    """

    def __init__(
        self, features: int, hidden: Sequence[int] = (128, 128, 128), context: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if len(set(hidden)) != 1:
            raise SettingsError(f"hidden must be the width of each residual block, all equal, got {tuple(hidden)}")
        width = hidden[0]
        self.embedding = NoiseEmbedding(width, context)
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(_LinearBlock(width, dropout) for _ in hidden)
        self.last = last_layer(nn.Linear(width, features))

    def forward(self, x: Tensor, log_sigma: Tensor, context: Tensor | None = None) -> Tensor:
        embedded = F.silu(self.embedding(log_sigma, context))
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedded)
        return self.last(F.silu(h)).view(x.shape)


class GroupNorm(nn.GroupNorm):
    """At most 8 groups, of at least 4 channels each where there are as many; then, if given, each example's scale and
    shift, (N, C), and SiLU if asked for."""

    def __init__(self, channels: int, silu: bool = True) -> None:
        groups = next(g for g in range(8, 0, -1) if channels % g == 0 and (channels // g >= 4 or g == 1))
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, h: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if scale is not None and shift is not None:
            weight, bias = weight * (1 + scale), torch.addcmul(shift, bias, 1 + scale)
        return ops.group_norm(h, self.num_groups, weight, bias, eps=self.eps, silu=self.silu)


class _Attention(nn.Module):
    """Self-attention over the cells of images, with heads of 32 channels where these divide the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32) if channels % 32 == 0 else 1
        self.norm = GroupNorm(channels, silu=False)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.last = last_layer(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        if ops.transformed():  # on CPUs PyTorch's kernel has neither tangents nor a rule for vmap
            attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return h + self.last(attended.mT.reshape(h.shape))


def _named(layers: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


class _Block(nn.Module):
    """A residual block: norm, activation, convolution; the same again, scaled and shifted by the noise level."""

    def __init__(self, inputs: int, outputs: int, embedded: int, dropout: float, attention: bool) -> None:
        super().__init__()
        # The names of weights in checkpoints count layers as if SiLU were one.
        self.first = _named({"0": GroupNorm(inputs), "2": nn.Conv2d(inputs, outputs, 3, padding=1)})
        self.film = nn.Linear(embedded, 2 * outputs)
        self.norm = GroupNorm(outputs)
        last = last_layer(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.second = _named({"1": nn.Dropout(dropout), "2": last})
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attention else nn.Identity()

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        inner = self.norm(self.first(h), *self.film(embedded).chunk(2, 1))
        return self.attention(self.second(inner).add_(self.skip(h)))


class UNet(nn.Module):
    """A U-Net as of arXiv 2006.11239, appendix B: residual blocks that see the noise level, on ever smaller images and
    back, where each sees what the way down made of images of its size.

    ``channels`` are the widths of the scales, each of half the size of the one before, rounded up, so that images may
    be of any size; ``attention`` names the scales, 0 for the whole image, whose blocks have self-attention. ``given``
    are the channels of a context that is an image, seen beside x. Clips (N, T, C, H, W) have T C ``inputs``.
    """

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int] = (32, 64, 64),
        blocks: int = 1,
        attention: Sequence[int] = (),
        context: int = 0,
        dropout: float = 0.0,
        given: int = 0,
    ) -> None:
        super().__init__()
        embedded = 4 * channels[0]
        self.embedding = NoiseEmbedding(embedded, context)
        self.first = nn.Conv2d(inputs + given, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        passed = [(0, channels[0])]  # scale and width of what the way down leaves for the way up
        for scale, width in enumerate(channels):
            if scale:
                before = passed[-1][1]
                self.down.append(nn.Conv2d(before, before, 3, stride=2, padding=1))  # halves the sides, rounding up
                passed.append((scale, before))
            for _ in range(blocks):
                self.down.append(_Block(passed[-1][1], width, embedded, dropout, scale in attention))
                passed.append((scale, width))
        h = channels[-1]
        self.middle = _Block(h, h, embedded, dropout, len(channels) - 1 in attention)
        for scale, width in reversed(passed):
            self.up.append(_Block(h + width, channels[scale], embedded, dropout, scale in attention))
            h = channels[scale]
        self.last = _named({"0": GroupNorm(h), "2": last_layer(nn.Conv2d(h, inputs, 3, padding=1))})

    def forward(self, x: Tensor, log_sigma: Tensor, context: Tensor | None = None) -> Tensor:
        shape, x = x.shape, x.flatten(1, -3)  # the frames of clips as channels
        if context is not None and context.dim() == 4:
            x, context = beside(x, context), None
        embedded = F.silu(self.embedding(log_sigma, context))
        # A CPU's convolutions take up to half as long if channels lie side by side, which vmap knows nothing of.
        if x.is_cpu and not ops.transformed():
            x = x.clone(memory_format=torch.channels_last)
        passed = [self.first(x)]
        for layer in self.down:
            passed.append(layer(passed[-1]) if isinstance(layer, nn.Conv2d) else layer(passed[-1], embedded))
        h = self.middle(passed[-1], embedded)
        for layer in self.up:
            left = passed.pop()
            if h.shape[2:] != left.shape[2:]:
                h = F.interpolate(h, left.shape[2:])
            h = layer(torch.cat([h, left], 1), embedded)
        return self.last(h).view(shape)
