"""The integer discrete flow (arXiv 1905.07376): an invertible map of integers, with an exact P(x) of discrete data."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genfuse.data import Dataset
from genfuse.errors import SettingsError
from genfuse.models._base import Batch, GenerativeModel, ModelConfig, Player, adam
from genfuse.nn import Columns, ConvConditioner, ResidualMLP, Squeeze
from genfuse.nn.likelihoods import log_logistic

Network = Literal["auto", "mlp", "conv"]
FARTHEST = 2.0  # that one coupling moves a value, in halves of the range of the data
PARTS = 4  # in which the channels of a scale are modelled, one given those before


@dataclass(frozen=True)
class IDFConfig(ModelConfig):
    """Settings of an IDF. Raises SettingsError for values outside their range."""

    network: Network = "auto"  # conv: images with even sides; mlp: any shape, as vectors; auto: conv if it can be had
    scales: int = 2  # conv: how often 2x2 cells become channels, while both sides are even
    couplings: int = 1  # additive ones, at each scale
    mixtures: int = 5  # logistic densities of the prior of a cell
    channels: tuple[int, ...] = (32,)  # conv: width of each residual block of a network, all the same
    hidden: tuple[int, ...] = (128, 128)  # mlp: width of each residual block of a network, all the same

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network)
        self.check_positive("scales", "mixtures", "channels", "hidden")
        if self.couplings < 0:
            raise SettingsError(f"couplings must be at least 0, got {self.couplings}")
        if self.levels is None and self.columns is None:
            raise SettingsError("idf is a flow of integers, and the data is of real numbers: use nsf, or another flow")
        if self.network == "conv" and not self.even:
            raise SettingsError(f"network 'conv' needs images with even sides, got shape {self.shape}: use 'mlp'")

    @property
    def even(self) -> bool:
        """Whether examples are images with even sides."""
        return len(self.shape) == 3 and not self.shape[1] % 2 and not self.shape[2] % 2


class _Scale(nn.Module):
    """Couplings of ``channels`` cells of integers h (N, channels, ...), and the prior of all parts but the first."""

    def __init__(self, network: Callable[[int, int], nn.Module], channels: int, couplings: int, mixtures: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.ends = [channels * (i + 1) // min(PARTS, channels) for i in range(min(PARTS, channels))]
        sides = [(self.half, channels - self.half) if i % 2 == 0 else (channels - self.half, self.half)
                 for i in range(couplings if channels > 1 else 0)]  # fmt: skip
        self.moves = nn.ModuleList(network(*side) for side in sides)
        ends = self.ends
        self.priors = nn.ModuleList(network(a, 3 * mixtures * (b - a)) for a, b in zip(ends, ends[1:], strict=False))

    def couple(self, h: Tensor, unit: Tensor, context: Tensor | None, inverse: bool = False) -> Tensor:
        """h with each half in turn moved by what a network says of the other, rounded (section 3.1 of the paper)."""
        for i, network in reversed([*enumerate(self.moves)]) if inverse else enumerate(self.moves):
            a, b = h[:, : self.half], h[:, self.half :]
            seen, moved = (b, a) if i % 2 else (a, b)
            of, to = (unit[self.half :], unit[: self.half]) if i % 2 else (unit[: self.half], unit[self.half :])
            by = FARTHEST * to * torch.tanh(network(seen / of, context))
            by = by + (by.round() - by).detach()  # the gradient passes through the rounding
            moved = moved - by if inverse else moved + by
            h = torch.cat([moved, seen] if i % 2 else [seen, moved], 1)
        return h


class IDF(GenerativeModel):
    """Integer discrete flow: integers become integers z by additive couplings that are rounded; each z has a mixture of
    logistic distributions, integrated over unit bins, as its prior.

    Examples x (N, *shape) are of ``levels``, x = k / (levels - 1), or rows of a table without real numbers. `log_prob`
    is log P(x), exact, in nats. At each scale 2x2 cells become channels; they are coupled, and modelled in four parts,
    each given those before, of which the first goes on to the next scale. Images are compressed by it without bits to
    start with.
    """

    Config = IDFConfig
    usual_steps = 3000

    def __init__(self, config: IDFConfig) -> None:
        super().__init__(config)
        c = config
        self.columns = None if c.columns is None else Columns(c.columns)
        sizes = self.columns.sizes if self.columns is not None else [c.levels or 2]
        self.images = c.even and c.network != "mlp"
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float32), persistent=False)
        shape = c.shape if self.images else (c.dimensions,)
        self.scales = nn.ModuleList()
        for _ in range(c.scales if self.images else 1):
            if self.images:
                if shape[1] % 2 or shape[2] % 2:
                    break
                shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
                network = partial(ConvConditioner, context=c.context, channels=c.channels, residual=True)
            else:
                network = partial(ResidualMLP, context=c.context, hidden=c.hidden)
            scale = _Scale(partial(_made, network), shape[0], c.couplings, c.mixtures)
            self.scales.append(scale)
            shape = (scale.ends[0], *shape[1:])
        self.last = shape  # of what is left, which has a prior of its own for each cell
        self.prior = nn.Parameter(torch.zeros(3 * c.mixtures * shape[0], *shape[1:]))
        reach = max(sizes) * (1 + FARTHEST * sum(len(scale.moves) for scale in self.scales)) / 2
        self.reach = 2 ** math.ceil(math.log2(reach + 1))  # all z are within +-reach

    sizes: Tensor

    def players(self) -> list[Player]:
        return [Player("model", self.parameters(), adam(3e-3))]

    def check_data(self, data: Dataset) -> None:
        super().check_data(data)
        self.check_levels(data)

    @property
    def likelihoods(self) -> tuple[str, ...]:
        return ("log_prob", "bits_per_dim")

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """-log P(x), in the mean over the batch."""
        nll = -self.log_prob(batch.x, self.y_of(batch)).mean()
        return nll, {"bits_per_dim": nll.detach() / (self.config.dimensions * math.log(2))}

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log P(x), (N,) nats."""
        context = self.context_of(y, len(x))
        total = x.new_zeros(len(x))
        for z, raw, unit in self._parts(self.checked(x), context):
            logits, mu, precision = self._mixture(raw, unit)
            upper, lower = ((z[..., None] + half - mu) * precision for half in (0.5, -0.5))
            cells = (log_logistic(upper, lower, precision) + logits.log_softmax(-1)).logsumexp(-1)
            total = total + cells.flatten(1).sum(1)
        return total

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """-log2 P(x) / D, (N,): bits that each of the D cells costs."""
        return -self.log_prob(x, y) / (self.config.dimensions * math.log(2))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        y: Tensor | Sequence[float] | int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(n, *shape), of priors whose scales are those of the model times ``temperature``; values that the couplings
        lead out of the levels are held to the nearest one. ``y`` as in `GenerativeModel`."""
        if not 0 < temperature < math.inf:
            raise SettingsError(f"temperature must be above 0 and finite, got {temperature}")
        where = self.device if generator is None else generator.device

        def draw(raw: Tensor, unit: Tensor) -> Tensor:
            logits, mu, precision = self._mixture(raw, unit)
            u = torch.rand((2, *mu.shape), device=where, generator=generator).to(mu).clamp(1e-6, 1 - 1e-6)
            chosen = (logits - torch.log(-torch.log(u[0]))).argmax(-1, keepdim=True)
            noise = torch.log(u[1]) - torch.log1p(-u[1])
            z: Tensor = (mu + temperature / precision * noise).gather(-1, chosen)[..., 0].round()
            return z

        return self._whole(n, draw, self.draw_context(n, y, generator))

    def code(self, coder: Any, n: int, x: Tensor | None = None) -> Tensor:
        """Put n examples x on a coder's stack, or take them from it if x is None: see `genfuse.models.Codes`. Raises
        SettingsError for a conditional model."""
        if self.conditional:
            raise SettingsError("a conditional IDF does not compress: what is given would not be in the file")

        def take(raw: Tensor, unit: Tensor, z: Tensor | None = None) -> Tensor:
            logits, mu, precision = self._mixture(raw, unit)
            symbols = None if z is None else z + self.reach
            found: Tensor = coder.logistics(
                logits, mu, precision, lambda edge: edge - self.reach - 0.5, 2 * self.reach, symbols
            )
            return found - self.reach

        if x is None:
            return self._whole(n, take, None)
        for z, raw, unit in reversed(self._parts(x, None)):
            take(raw, unit, z)
        coder.flush()
        return x

    # Between examples and integers.

    def _parts(self, x: Tensor, context: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each prior is of: integers z (N, c, ...), its raw parameters and the unit of z, first those that leave
        first."""
        k = self.columns.levels(x) if self.columns is not None else (x * (self.sizes - 1)).round()
        h, found = (k - (self.sizes / 2).floor()).to(x.dtype), []
        h = h if self.images else h.flatten(1)
        for scale in self.scales:
            h = self._squeezed(h)
            unit = self._unit(h)
            h = scale.couple(h, unit, context)
            for i in reversed(range(len(scale.priors))):
                a, b = scale.ends[i : i + 2]
                found.append((h[:, a:b], scale.priors[i](h[:, :a] / unit[:a], context), unit[a:b]))
            h = h[:, : scale.ends[0]]
        return [*found, (h, self.prior.expand(len(h), *self.prior.shape), self._unit(h))]

    def _whole(self, n: int, take: Callable[[Tensor, Tensor], Tensor], context: Tensor | None) -> Tensor:
        """Examples of what ``take`` makes of each prior's raw parameters and unit: the opposite of `_parts`."""
        h = take(self.prior.expand(n, *self.prior.shape), self._unit(self.prior[None], self.last[0]))
        for scale in reversed(self.scales):
            unit = self._unit(h, scale.ends[-1])  # type: ignore[index, arg-type]
            for i, prior in enumerate(scale.priors):  # type: ignore[arg-type]
                a, b = scale.ends[i : i + 2]  # type: ignore[index]
                h = torch.cat([h, take(prior(h / unit[:a], context), unit[a:b])], 1)
            h = scale.couple(h, unit, context, inverse=True)  # type: ignore[operator]
            h = Squeeze().inverse(h)[0] if self.images else h
        h = h if self.images else h.view(n, *self.config.shape)
        k = torch.minimum((h + (self.sizes / 2).floor()).clamp(min=0), self.sizes - 1)
        if self.columns is not None:
            return self.columns.of_levels(k).to(h.dtype)
        return k / (self.sizes - 1)

    def _squeezed(self, h: Tensor) -> Tensor:
        return Squeeze()(h)[0] if self.images else h

    def _unit(self, h: Tensor, channels: int | None = None) -> Tensor:
        """Half of the range of the cells of each channel of h, as networks see them, (channels, 1, ...)."""
        unit, channels = (self.sizes / 2).to(h), channels or h.shape[1]
        if self.columns is not None:
            return unit[:channels]
        return unit.view(1, *[1] * (h.dim() - 2)).expand(channels, *[-1] * (h.dim() - 2))

    def _mixture(self, raw: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and inverse scales (N, c, ..., K) of the prior, in ones, of raw (N, 3 K c, ...)."""
        m = self.config.mixtures
        logits, mu, log_scale = raw.unflatten(1, (3, m, -1)).movedim(2, -1).unbind(1)
        unit = unit[..., None]
        start = torch.linspace(-1, 1, m + 2, dtype=raw.dtype, device=raw.device)[1:-1]
        root = torch.exp(4 * torch.tanh((2 - log_scale) / 8))  # scales from e^-8 to e^8 of a unit
        return logits, unit * (mu + start), root * root / unit


def _made(network: Callable[..., nn.Module], inputs: int, outputs: int) -> nn.Module:
    return network(inputs, outputs)
