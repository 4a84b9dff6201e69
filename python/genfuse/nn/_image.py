"""Layers at the data's end of a flow: from levels to real numbers, and between the shapes of images."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from genfuse.errors import SettingsError
from genfuse.nn._transform import Movement, Transform
from genfuse.ops import standard_normal_log_prob


class Squeeze(Movement):
    """Each 2x2 square of cells becomes one cell of four times the channels: (N, C, H, W) -> (N, 4 C, H / 2, W / 2)."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape  # F.pixel_unshuffle leaves zero rows in their old shape
        squares = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(n, 4 * c, h // 2, w // 2), x.new_zeros(n)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, c, h, w = y.shape
        squares = y.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return squares.reshape(n, c // 4, 2 * h, 2 * w), y.new_zeros(n)

    def forward_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return (4 * shape[0], shape[1] // 2, shape[2] // 2) if shape and len(shape) == 3 else shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // 4, 2 * shape[1], 2 * shape[2]) if len(shape) == 3 else shape


class Flatten(Movement):
    """Examples of ``shape``, (N, *shape), become vectors (N, D)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.unflatten(1, self.shape), y.new_zeros(y.shape[0])

    def forward_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        return (math.prod(self.shape),)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.shape


class MultiscaleSplit(Transform):
    """The multi-scale step (arXiv 1605.08803, section 3.6) of images (N, *shape): half of the channels leave, the
    others go on through ``rest``, which makes vectors of them; the result is a vector (N, D) of both.

    What leaves is first normalised by ``prior``, a coupling that lets the channels that go on pass through: to the base
    distribution it is a learned prior of the channels that leave, given those that stay.
    """

    def __init__(self, prior: Transform, rest: Transform, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.prior, self.rest = prior, rest
        self.shape, self.kept = shape, shape[0] // 2

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.prior(x, context)
        z, more = self.rest(x[:, : self.kept], context)
        return torch.cat([z, x[:, self.kept :].flatten(1)], 1), logdet + more

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        channels, height, width = self.shape
        cells = self.kept * height * width
        x, logdet = self.rest.inverse(y[:, :cells], context)
        left = y[:, cells:].unflatten(1, (channels - self.kept, height, width))
        x, more = self.prior.inverse(torch.cat([x, left], 1), context)
        return x, logdet + more

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        channels, height, width = self.shape
        if not inverse:
            x = self.prior.code(coder, x)
            return torch.cat([self.rest.code(coder, x[:, : self.kept]), x[:, self.kept :].flatten(1)], 1)
        z, left = x.split([self.kept * height * width, (channels - self.kept) * height * width], 1)
        left = left.unflatten(1, (channels - self.kept, height, width))
        return self.prior.code(coder, torch.cat([self.rest.code(coder, z, True), left], 1), True)

    def forward_shape(self, shape: tuple[int, ...] | None) -> tuple[int, ...]:
        return (math.prod(self.shape),)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.shape


def _log_slope(y: Tensor) -> Tensor:
    """log dy / dp = log 1 / (p (1 - p)) of y = logit(p). By PyTorch's threshold of 20 it would lack 2e-9 in float64."""
    return F.softplus(y, threshold=40.0) + F.softplus(-y, threshold=40.0)


class Logit(Transform):
    """y = logit(a + (1 - 2 a) x) of each coordinate x in [0, 1] (arXiv 1605.08803, section 4.1).

    Raises SettingsError unless a is between 0 and 0.5.
    """

    domain = constraints.unit_interval

    def __init__(self, a: float = 0.05) -> None:
        super().__init__()
        if not 0 < a < 0.5:
            raise SettingsError(f"the logit's margin must be between 0 and 0.5, got {a}")
        self.a = a

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.logit(self.a + (1 - 2 * self.a) * x)
        return y, self._logdet(y)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(y) - self.a) / (1 - 2 * self.a), -self._logdet(y)

    def _logdet(self, y: Tensor) -> Tensor:
        return (_log_slope(y) + math.log(1 - 2 * self.a)).flatten(1).sum(1)


class Centre(Transform):
    """y = x - 1/2 of each coordinate x."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x - 0.5, x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y + 0.5, y.new_zeros(y.shape[0])


class Dequantize(nn.Module):
    """Levels k = 0 ... K - 1, given as x = k / (K - 1), become real numbers v = (k + u) / K in [0, 1).

    u is uniform (arXiv 1511.01844, section 3.1), or made by ``noise``, a transform of standard normal noise of x's
    shape whose context is x - 1/2, and a sigmoid after it (variational: arXiv 1902.00275).
    """

    def __init__(self, levels: int, noise: Transform | None = None) -> None:
        super().__init__()
        self.levels, self.noise = levels, noise

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """v, and what is to be added to its log-density: E[log p(v) + this] <= log P(x), (N,) nats."""
        k = (x * (self.levels - 1)).round()
        log_weight = x.new_full((x.shape[0],), -math.log(self.levels) * x.shape[1:].numel())
        if self.noise is None:
            u = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        else:
            eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            u, logdet = self.noise(eps, x - 0.5)
            # log q(u | x) = log N(eps) - logdet - log |d sigmoid|
            log_weight = log_weight - standard_normal_log_prob(eps.flatten(1), -logdet)
            log_weight = log_weight - _log_slope(u).flatten(1).sum(1)
            u = u.sigmoid()
        # Rounding must not carry k + u over to the next level.
        return torch.minimum((k + u) / self.levels, (k + 1) / self.levels * (1 - 1e-6)), log_weight

    def inverse(self, v: Tensor) -> Tensor:
        """x of the level that v lies in."""
        return (v * self.levels).floor().clamp(0, self.levels - 1) / (self.levels - 1)
