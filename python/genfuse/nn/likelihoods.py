"""Decoder likelihoods p(x | z): full log-densities and log-masses in nats, constants included.

What a VAE asks of its likelihood is `AnyLikelihood`. Those here read the decoder's output ``params``, (..., N, *shape,
parameters_per_cell), for examples ``x``, (N, *shape); axes that lead N, such as the samples of an importance-weighted
bound, are kept. Discrete data is x = k / (levels - 1) with
k = 0 ... levels - 1. Half-precision parameters are read as they are and computed with in float32.
"""

import math
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse import ops
from genfuse.ops import log_logistic as log_logistic

_FAR = 1e6  # from all locations, by any scale: where the outermost bins end


class AnyLikelihood(Protocol):
    """p(x | z) as a VAE needs it: of the decoder's output ``raw`` for M latents, whatever it is, and M examples."""

    def log_prob(self, raw: Any, x: Tensor, /) -> Tensor:
        """log p(x | z), (M,) nats, for examples (M, *shape)."""

    def mean(self, raw: Any, /) -> Tensor:
        """E[x | z], (M, *shape)."""

    def sample(self, raw: Any, generator: torch.Generator | None, /) -> Tensor:
        """A draw x ~ p(x | z), (M, *shape), all of its noise from ``generator``, which is on the device of ``raw``."""


def at_least_float32(t: Tensor) -> Tensor:
    """A tensor of 16 bits as float32; wider ones as they are."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _bounded(t: Tensor, limit: float) -> Tensor:
    """Identity near 0, smoothly held within +-limit."""
    return limit * torch.tanh(t / limit)


def _uniform_like(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform on the open interval (0, 1)."""
    return torch.rand(t.shape, dtype=t.dtype, device=t.device, generator=generator).clamp_min(torch.finfo(t.dtype).tiny)


def _check_cells(made: Tensor, x: Tensor) -> None:
    """Raise a ValueError unless what is made of params, (..., N, *shape), has x's cells."""
    if (wanted := made.shape[made.dim() - x.dim() :]) != x.shape:
        raise ValueError(f"x must be {tuple(wanted)}, as the params are; got {tuple(x.shape)}")


class Likelihood(nn.Module):
    """Base: the cells are independent given z. A subclass gives `cell_nll`, `mean` and `sample`; one of levels has
    ``code(coder, params, x)``, which puts examples x (N, *shape) on a coder's stack, or takes them if x is None."""

    parameters_per_cell: int

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """log p(x | z), (..., N) in nats, summed over the cells of each example. Raises ValueError for an x (N, *shape)
        of other cells than the params."""
        cells = self.cell_nll(at_least_float32(params), x)
        _check_cells(cells, x)
        return -cells.flatten(cells.ndim - x.ndim + 1).sum(-1)

    def cell_nll(self, params: Tensor, x: Tensor) -> Tensor:
        """-log p of each cell, (..., N, *shape): negative here, so that no pass over the cells turns the sign."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """E[x | z], (..., *shape)."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw x ~ p(x | z), (..., *shape)."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """x in {0, 1}; params are logits.

    Intensities x in [0, 1] are taken too: what is returned is then minus the usual cross-entropy, which is the mean
    log-mass over binarizations of x and no log-density of x itself.
    """

    parameters_per_cell = 1

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        logits = at_least_float32(params).squeeze(-1)  # (..., N, *shape)
        _check_cells(logits, x)
        rows = logits.shape[: logits.dim() - x.dim() + 1]
        sizes = rows.numel(), x.shape[1:].numel()
        flat = [t.reshape(sizes) for t in (logits, x.to(logits.dtype).expand_as(logits))]
        return -ops.bernoulli_nll(*flat).view(rows)

    def cell_nll(self, params: Tensor, x: Tensor) -> Tensor:
        logits = params.squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")

    def code(self, coder: Any, params: Tensor, x: Tensor | None = None) -> Tensor:
        return coder.softmax(torch.cat([torch.zeros_like(params), params], -1), x)

    def mean(self, params: Tensor) -> Tensor:
        return at_least_float32(params).squeeze(-1).sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params), generator=generator)


class Gaussian(Likelihood):
    """x real; params are the means and, with ``variance="per-cell"``, log-variances relative to ``sigma``.

    The variance is sigma^2 for all cells (``fixed``), one learned number for all (``shared``, as in sigma-VAE, arXiv
    2006.13202), or an output of the decoder (``per-cell``). A learned one starts at sigma^2 and is held smoothly within
    factors e^-12 and e^12 of it, since the density has no maximum where a cell is constant.
    """

    shift: Tensor

    def __init__(self, sigma: float = 1.0, variance: Literal["fixed", "shared", "per-cell"] = "fixed") -> None:
        super().__init__()
        self.start = 2 * math.log(sigma)
        self.parameters_per_cell = 2 if variance == "per-cell" else 1
        if variance == "shared":
            self.shift = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("shift", torch.zeros(()), persistent=False)

    def mean_and_logvar(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """The means (..., *shape) and the log-variance, a scalar or one per cell."""
        if self.parameters_per_cell == 2:
            mean, shift = at_least_float32(params).unbind(-1)
            return mean, self.start + _bounded(shift, 12)
        return at_least_float32(params).squeeze(-1), self.start + _bounded(self.shift.to(params.device), 12)

    def cell_nll(self, params: Tensor, x: Tensor) -> Tensor:
        mean, logvar = self.mean_and_logvar(params)
        return 0.5 * ((x - mean).square() * torch.exp(-logvar) + (logvar + math.log(2 * math.pi)))

    def mean(self, params: Tensor) -> Tensor:
        return self.mean_and_logvar(params)[0]

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, logvar = self.mean_and_logvar(params)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + torch.exp(logvar / 2) * noise


class Categorical(Likelihood):
    """x in ``levels`` unordered levels; params are their logits, as in PixelRNN (arXiv 1601.06759)."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.parameters_per_cell = self.levels = levels

    def cell_nll(self, params: Tensor, x: Tensor) -> Tensor:
        level = (x * (self.levels - 1)).round().long()
        chosen = params.gather(-1, level.expand(params.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return params.logsumexp(-1) - chosen

    def code(self, coder: Any, params: Tensor, x: Tensor | None = None) -> Tensor:
        k: Tensor = coder.softmax(params, None if x is None else (x * (self.levels - 1)).round())
        return k / (self.levels - 1)

    def mean(self, params: Tensor) -> Tensor:
        probabilities = at_least_float32(params).softmax(-1)
        return probabilities @ torch.linspace(0, 1, self.levels, dtype=probabilities.dtype, device=params.device)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        params = at_least_float32(params)
        gumbel = -torch.log(-torch.log(_uniform_like(params, generator)))
        return (params + gumbel).argmax(-1).to(params.dtype) / (self.levels - 1)


class DiscretizedLogistic(Likelihood):
    """x in ``levels`` ordered levels: a mixture of logistic densities, integrated over bins, the first and last of them
    open-ended.

    arXiv 1606.04934 (appendix) and 1701.05517 (equation 2). params are the location of the one density, in units where
    the data spans [-1, 1], and its log-scale; or of each of several ``components`` all logits, then all locations, less
    evenly spaced ones, and all log-scales. Log-scales are held smoothly within +-7.
    """

    parameters_per_cell = 2

    def __init__(self, levels: int, components: int = 1) -> None:
        super().__init__()
        self.levels, self.components = levels, components
        if components > 1:
            self.parameters_per_cell = 3 * components

    def location_and_log_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the one component, (..., *shape) each."""
        location, log_scale = at_least_float32(params).unbind(-1)
        return location, _bounded(log_scale, 7)

    def mixture(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, locations and log-scales of the components, (components, ..., *shape) each."""
        if self.components == 1:
            location, log_scale = (each[None] for each in self.location_and_log_scale(params))
            return torch.zeros_like(location), location, log_scale
        parts = at_least_float32(params).movedim(-1, 0)
        logits, location, log_scale = parts.contiguous().chunk(3)
        start = torch.linspace(-1, 1, self.components, dtype=parts.dtype, device=parts.device)
        return logits, location + start.view(-1, *[1] * (parts.dim() - 1)), _bounded(log_scale, 7)

    def cell_nll(self, params: Tensor, x: Tensor) -> Tensor:
        logits, location, log_scale = self.mixture(params)
        precision, half = torch.exp(-log_scale), 1 / (self.levels - 1)
        low = torch.where(x < half / 2, -_FAR, 2 * x - 1 - half)  # edges of the bin, as wide there as 2 x is
        high = torch.where(x > 1 - half / 2, _FAR, 2 * x - 1 + half)
        upper, lower = (high - location) * precision, (low - location) * precision
        each = log_logistic(upper, lower, (high - low) * precision)
        return -(each[0] if self.components == 1 else (logits.log_softmax(0) + each).logsumexp(0))

    def code(self, coder: Any, params: Tensor, x: Tensor | None = None) -> Tensor:
        logits, location, log_scale = (each.movedim(0, -1) for each in self.mixture(params))
        top = self.levels - 1
        k: Tensor = coder.logistics(
            logits, location, torch.exp(-log_scale), lambda edge: (2 * edge - 1) / top - 1, self.levels,
            None if x is None else (x * top).round(),
        )  # fmt: skip
        return k / top

    def mean(self, params: Tensor) -> Tensor:
        logits, location, log_scale = self.mixture(params)
        precision = torch.exp(-log_scale)
        total = torch.zeros_like(location)
        for k in range(1, self.levels):  # E[k] is the sum of P(k' >= k)
            edge = (2 * k - 1) / (self.levels - 1) - 1
            total += torch.sigmoid((location - edge) * precision)
        return (logits.softmax(0) * total).sum(0) / (self.levels - 1)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits, location, log_scale = self.mixture(params)
        if self.components > 1:
            chosen = (logits - torch.log(-torch.log(_uniform_like(logits, generator)))).argmax(0, keepdim=True)
            location, log_scale = location.gather(0, chosen), log_scale.gather(0, chosen)
        u = _uniform_like(location, generator)
        x = (location + torch.exp(log_scale) * (torch.log(u) - torch.log1p(-u)) + 1) / 2
        return (x[0].clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)
