"""The integer discrete flow (arXiv 1905.07376): an invertible map of integers, with an exact P(x) of discrete data."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from genfuse.data import Dataset
from genfuse.errors import SettingsError
from genfuse.models._base import Batch, GenerativeModel, Given, ModelConfig, Player, adam
from genfuse.models._flow import MANY
from genfuse.nn import Columns, ConvConditioner, ResidualMLP, Squeeze
from genfuse.nn.likelihoods import log_logistic

FARTHEST = 2.0  # that one coupling moves a value, in halves of the range of the data
PARTS = 4  # in which the channels of a scale are modelled, one given those before


@dataclass(frozen=True)
class IDFConfig(ModelConfig):
    """Settings of an IDF. Raises SettingsError for values outside their range."""

    scales: int = 2  # images: how often 2x2 cells become channels, while both sides are even; 0: as vectors
    couplings: int = 1  # additive ones, at each scale
    mixtures: int = 5  # logistic densities of the prior of a cell
    channels: tuple[int, ...] = (32,)  # images: width of each residual block of a network, all the same
    hidden: tuple[int, ...] = (128, 128)  # vectors: width of each residual block of a network, all the same
    _positive = ("mixtures", "channels", "hidden")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels is None and self.columns is None:
            raise SettingsError("idf is a flow of integers, and the data is of real numbers: use nsf, or another flow")
        if min(self.couplings, self.scales) < 0:
            raise SettingsError(f"couplings and scales must be at least 0; got {self.couplings} and {self.scales}")


class _Scale(nn.Module):
    """Couplings of ``channels`` cells of integers h (N, channels, ...), and the priors of all parts but the first."""

    def __init__(self, network: Callable[[int, int], nn.Module], channels: int, config: IDFConfig) -> None:
        super().__init__()
        parts, self.middle = min(PARTS, channels), channels // 2
        self.ends = [channels * (i + 1) // parts for i in range(parts)]
        sides = (self.middle, channels - self.middle)
        moved = range(config.couplings if channels > 1 else 0)
        self.moves: Any = nn.ModuleList(network(*(sides[::-1] if i % 2 else sides)) for i in moved)
        self.priors: Any = nn.ModuleList(network(a, 3 * config.mixtures * (b - a)) for a, b in pairwise(self.ends))

    def couple(self, h: Tensor, unit: Tensor, context: Tensor | None, sign: int) -> Tensor:
        """h with each half in turn moved by what a network says of the other, rounded (section 3.1 of the paper); the
        opposite for ``sign`` -1."""
        for i in range(len(self.moves))[::sign]:
            halves, units = list(h.tensor_split([self.middle], 1)), unit.tensor_split([self.middle])
            of, to = (1, 0) if i % 2 else (0, 1)
            by = FARTHEST * units[to] * torch.tanh(self.moves[i](halves[of] / units[of], context))
            halves[to] = halves[to] + sign * (by + (by.round() - by).detach())  # gradients pass through the rounding
            h = torch.cat(halves, 1)
        return h


class IDF(GenerativeModel):
    """Integers become integers z by additive couplings that are rounded; each z has a mixture of logistic
    distributions, integrated over unit bins, as its prior.

    Examples x (N, *shape) are of ``levels``, x = k / (levels - 1), or rows of a table without real numbers; `log_prob`
    is log P(x), exact. At each scale 2x2 cells of an image become channels, which are coupled, and modelled in four
    parts, each given those before; the first part goes on to the next scale. Vectors have one scale.
    """

    Config = IDFConfig
    usual_steps = 3000
    _of_levels = True
    sizes: Tensor  # levels of each column, or (1,)

    def __init__(self, config: IDFConfig) -> None:
        super().__init__(config)
        c, shape = config, tuple[int, ...](config.shape)
        self.columns = None if c.columns is None else Columns(c.columns)
        sizes = [c.levels or 2] if self.columns is None else self.columns.sizes
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float32), persistent=False)
        halvings = 0
        while len(shape) == 3 and halvings < c.scales and not any(side % 2 ** (halvings + 1) for side in shape[1:]):
            halvings += 1
        self.images, self.scales = halvings > 0, nn.ModuleList()
        network: Any = partial(ConvConditioner, context=c.context, channels=c.channels, residual=True)
        if not self.images:
            shape, network = (c.dimensions,), partial(ResidualMLP, context=c.context, hidden=c.hidden)
        for _ in range(halvings or 1):
            shape = (4 * shape[0], *(side // 2 for side in shape[1:])) if self.images else shape
            scale = _Scale(network, shape[0], c)
            self.scales.append(scale)
            shape = (scale.ends[0], *shape[1:])
        self.prior = nn.Parameter(torch.zeros(3 * c.mixtures * shape[0], *shape[1:]))  # of what is left
        reach = max(sizes) * (1 + FARTHEST * c.couplings * len(self.scales)) / 2
        self.reach = int(2 ** math.ceil(math.log2(reach + 1)))  # all z are within +-reach

    def players(self) -> list[Player]:
        return [Player("model", self.parameters(), adam(3e-3))]

    @property
    def likelihoods(self) -> tuple[str, ...]:
        return ("log_prob", "bits_per_dim")

    def doubts(self, data: Dataset) -> Iterator[str]:
        if data.is_image and math.prod(data.shape) > MANY:
            yield (
                f"an {self.plugin or 'idf'} is made to compress: what it draws of pictures of {math.prod(data.shape)} "
                "cells are pieces of strokes. For samples to look at use gan or edm"
            )

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """-log P(x), in the mean over the batch."""
        nll = -self.log_prob(batch.x, self.y_of(batch)).mean()
        return nll, {"bits_per_dim": nll.detach() / (self.config.dimensions * math.log(2))}

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log P(x), (N,) nats."""
        total = x.new_zeros(len(x))
        for z, raw, unit in self._parts(self.checked(x), self.context_of(y, len(x))):
            logits, mu, precision = self._mixture(raw, unit)
            upper, lower = ((z[..., None] + half - mu) * precision for half in (0.5, -0.5))
            cells = (log_logistic(upper, lower, precision) + logits.log_softmax(-1)).logsumexp(-1)
            total = total + cells.flatten(1).sum(1)
        return total

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """-log2 P(x) / D, (N,): bits that each of the D cells costs."""
        return -self.log_prob(x, y) / (self.config.dimensions * math.log(2))

    @torch.no_grad()
    def sample(self, n: int, *, y: Given = None, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape); values that the couplings lead out of the levels are held to the nearest one."""
        where = self.device if generator is None else generator.device

        def draw(raw: Tensor, unit: Tensor) -> Tensor:
            logits, mu, precision = self._mixture(raw, unit)
            u = torch.rand((2, *mu.shape), device=where, generator=generator).to(mu).clamp(1e-6, 1 - 1e-6)
            chosen = (logits - torch.log(-torch.log(u[0]))).argmax(-1, keepdim=True)
            return (mu + u[1].logit() / precision).gather(-1, chosen)[..., 0].round()

        return self._whole(n, draw, self.draw_context(n, y, generator))

    def code(self, coder: Any, n: int, x: Tensor | None = None) -> Tensor:
        """See `genfuse.models.Codes`. Raises SettingsError for a conditional model."""
        if self.conditional:
            raise SettingsError("a conditional IDF does not compress: what is given would not be in the file")

        def take(raw: Tensor, unit: Tensor, z: Tensor | None = None) -> Tensor:
            symbols, reach = None if z is None else z + self.reach, self.reach
            k: Tensor = coder.logistics(*self._mixture(raw, unit), lambda edge: edge - reach - 0.5, 2 * reach, symbols)
            return k - reach

        if x is None:
            return self._whole(n, take, None)
        for z, raw, unit in reversed(self._parts(x, None)):
            take(raw, unit, z)
        coder.flush()
        return x

    def _parts(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Integers z (N, c, ...), raw parameters of their prior and their unit, first those that leave first."""
        k = (x * (self.sizes - 1)).round() if self.columns is None else self.columns.levels(x)
        h, found = (k - (self.sizes / 2).floor()).to(x.dtype), []
        h = h if self.images else h.flatten(1)
        scale: Any
        for scale in self.scales:
            h = Squeeze()(h)[0] if self.images else h
            unit = self._unit(h, h.shape[1])
            h = scale.couple(h, unit, context, 1)
            for (a, b), prior in reversed([*zip(pairwise(scale.ends), scale.priors, strict=True)]):
                found.append((h[:, a:b], prior(h[:, :a] / unit[:a], context), unit[a:b]))
            h = h[:, : scale.ends[0]]
        return [*found, (h, self.prior.expand(len(h), *self.prior.shape), unit[: h.shape[1]])]

    def _whole(self, n: int, take: Callable[[Tensor, Tensor], Tensor], context: Tensor | None) -> Tensor:
        """Examples of what ``take`` makes of each prior's raw parameters and unit: the opposite of `_parts`."""
        scale: Any = self.scales[-1]
        h = take(self.prior.expand(n, *self.prior.shape), self._unit(self.prior[None], scale.ends[0]))
        for scale in reversed(self.scales):
            unit = self._unit(h, scale.ends[-1])
            for (a, b), prior in zip(pairwise(scale.ends), scale.priors, strict=True):
                h = torch.cat([h, take(prior(h / unit[:a], context), unit[a:b])], 1)
            h = scale.couple(h, unit, context, -1)
            h = Squeeze().inverse(h)[0] if self.images else h
        h = h if self.images else h.view(n, *self.config.shape)
        k = torch.minimum((h + (self.sizes / 2).floor()).clamp(min=0), self.sizes - 1)
        return k / (self.sizes - 1) if self.columns is None else self.columns.of_levels(k).to(h.dtype)

    def _unit(self, h: Tensor, channels: int) -> Tensor:
        """Half of the range of the cells of each channel, as networks see them, (channels, 1, ...)."""
        unit = (self.sizes / 2).to(h)
        return unit[:channels] if self.columns else unit.expand(channels).view(-1, *[1] * (h.dim() - 2))

    def _mixture(self, raw: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and inverse scales (N, c, ..., K) of a prior, in ones, of raw (N, 3 K c, ...)."""
        k = self.config.mixtures
        logits, mu, log_scale = raw.unflatten(1, (3, k, -1)).movedim(2, -1).unbind(1)
        start = torch.linspace(-1, 1, k + 2, dtype=raw.dtype, device=raw.device)[1:-1]
        root = torch.exp(4 * torch.tanh((2 - log_scale) / 8))  # scales from e^-8 to e^8 of a unit
        return logits, unit[..., None] * (mu + start), root * root / unit[..., None]
