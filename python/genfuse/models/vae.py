"""The variational autoencoder (arXiv 1312.6114) and its importance-weighted bound (arXiv 1509.00519)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from genfuse.errors import DataError, SettingsError
from genfuse.models._base import Batch, GenerativeModel, check_range
from genfuse.nn import (
    AutoregressiveAffine,
    Composite,
    ConvDecoder,
    Permutation,
    Planar,
    Radial,
    Transform,
    conv_encoder,
    mlp,
)
from genfuse.nn.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    at_least_float32,
)
from genfuse.ops import kl_per_dimension, reparameterize_kl, standard_normal_log_prob

if TYPE_CHECKING:
    from genfuse.data import Dataset


Network = Literal["mlp", "conv"]
Decoder = Literal["bernoulli", "gaussian", "categorical", "discretized-logistic"]
Variance = Literal["fixed", "shared", "per-cell"]
Posterior = Literal["gaussian", "planar", "radial", "iaf"]


@dataclass(frozen=True)
class VAEConfig:
    """Settings of a VAE. Raises SettingsError for values outside their range."""

    shape: tuple[int, ...] = (1, 28, 28)  # of one example: (C, H, W) or (D,); taken from the data
    levels: int | None = 256  # of discrete data, None for real-valued data; taken from the data
    latent_dim: int = 20  # dimensions of z
    network: Network = "mlp"  # conv takes images and puts convolutions before the dense layers
    hidden: tuple[int, ...] = (256, 256)  # widths of the encoder's dense layers; the decoder has them in reverse
    channels: tuple[int, ...] = (32, 64)  # conv: widths of the encoder's stages, each of which halves the image
    decoder: Decoder = "bernoulli"  # p(x | z) of a cell
    sigma: float = 1.0  # gaussian: standard deviation; where it is learned, its start
    variance: Variance = "shared"  # gaussian: sigma^2, one learned number, or an output
    beta: float = 1.0  # weight of the KL
    beta_warmup: int = 0  # steps over which the weight of the KL grows from 0 to beta
    free_bits: float = 0.0  # nats of KL per latent dimension, in the mean over a batch, that cost nothing to use
    iwae_samples: int = 1  # more than 1: train the importance-weighted bound with this many samples
    posterior: Posterior = "gaussian"  # q(z | x): diagonal, or what a flow of this kind makes of a diagonal one
    posterior_layers: int = 4  # of that flow
    posterior_hidden: tuple[int, ...] = (64, 64)  # iaf: widths of each layer's network
    posterior_context: int = 32  # features of x that the encoder hands to that flow

    def __post_init__(self) -> None:
        least_of = {"latent_dim": 1, "iwae_samples": 1, "posterior_layers": 1, "posterior_context": 1}
        for name, least in {**least_of, "beta_warmup": 0, "beta": 0, "free_bits": 0}.items():
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise SettingsError(f"{name} must be at least {least} and finite, got {value}")
        choices_of = {"network": Network, "decoder": Decoder, "variance": Variance, "posterior": Posterior}
        for name, choices in choices_of.items():
            if getattr(self, name) not in get_args(choices):
                raise SettingsError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}"
                )
        if not 0 < self.sigma < math.inf:
            raise SettingsError(f"sigma must be above 0 and finite, got {self.sigma}")
        for name in ("shape", "hidden", "channels", "posterior_hidden"):
            if any(size < 1 for size in getattr(self, name)):
                raise SettingsError(f"{name} must hold sizes of at least 1, got {getattr(self, name)}")
        if not self.shape:
            raise SettingsError("shape must have at least one axis, got ()")
        if self.network == "conv" and (len(self.shape) != 3 or not self.channels):
            raise SettingsError(
                f"network 'conv' needs images, shape (C, H, W), and at least one entry of channels; "
                f"got shape {self.shape} and channels {self.channels}: use network 'mlp'"
            )
        if self.decoder in ("categorical", "discretized-logistic") and (self.levels is None or self.levels < 2):
            raise SettingsError(
                f"decoder {self.decoder!r} needs discrete data, levels of 2 or more, got {self.levels}: "
                "use decoder 'gaussian' for real-valued data"
            )
        if self.posterior == "iaf" and not self.posterior_hidden:
            raise SettingsError("posterior 'iaf' needs at least one entry of posterior_hidden, got ()")
        if self.posterior != "gaussian" and self.free_bits > 0:
            raise SettingsError(
                f"free_bits act on the KL of each latent dimension, which posterior {self.posterior!r} does not have: "
                "leave them at 0, or use beta_warmup"
            )
        if self.iwae_samples > 1 and (self.beta, self.beta_warmup, self.free_bits) != (1.0, 0, 0.0):
            raise SettingsError(
                "iwae_samples above 1 train a bound that has no KL term for beta, beta_warmup or free_bits to act on: "
                "leave these at their defaults, or iwae_samples at 1"
            )


def _likelihood(config: VAEConfig) -> Likelihood:
    if config.decoder == "gaussian":
        return Gaussian(config.sigma, config.variance)
    if config.decoder == "bernoulli":
        return Bernoulli()
    assert config.levels is not None  # VAEConfig saw to it
    return (Categorical if config.decoder == "categorical" else DiscretizedLogistic)(config.levels)


def _flow(config: VAEConfig) -> Composite | None:
    """What turns the diagonal Gaussian z0 into q(z | x), with the encoder's features as its context: from z0 to z."""
    d, context, layers = config.latent_dim, config.posterior_context, config.posterior_layers
    if config.posterior == "gaussian":
        return None
    if config.posterior == "iaf":
        steps: list[Transform] = []
        for _ in range(
            layers
        ):  # arXiv 1606.04934, algorithm 1; the order of the dimensions is reversed after each step
            made = AutoregressiveAffine(d, config.posterior_hidden, context=context, scale="sigmoid")
            steps += [made, Permutation.reversed(d)]
        return Composite(steps)
    layer = Planar if config.posterior == "planar" else Radial
    return Composite([layer(d, context) for _ in range(layers)])


class VAE(GenerativeModel):
    """Variational autoencoder with a standard normal prior p(z) and a diagonal Gaussian q(z | x), or a flow of it.

    Examples x are (N, *shape), latents z (N, D), densities (N,) in nats.
    """

    Config = VAEConfig
    config: VAEConfig
    updates: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.likelihood = _likelihood(config)
        shape, hidden, per_cell = config.shape, config.hidden, self.likelihood.parameters_per_cell
        cells = math.prod(shape)
        self.posterior = _flow(config)
        outputs = 2 * config.latent_dim + (config.posterior_context if self.posterior else 0)
        self.encoder: nn.Module
        self.decoder: nn.Module
        if config.network == "conv":
            image = (shape[0], shape[1], shape[2])
            self.encoder = conv_encoder(image, config.channels, hidden, outputs)
            self.decoder = ConvDecoder(config.latent_dim, hidden, config.channels, image, per_cell)
        else:
            self.encoder = nn.Sequential(nn.Flatten(), mlp([cells, *hidden, outputs]))
            self.decoder = nn.Sequential(
                mlp([config.latent_dim, *hidden[::-1], cells * per_cell]), nn.Unflatten(-1, (*shape, per_cell))
            )
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def check_data(self, data: "Dataset") -> None:
        super().check_data(data)
        if self.config.decoder == "gaussian":
            return
        if data.levels is None:
            raise SettingsError(
                f"the data set {data.name!r} is real-valued, but the decoder is {self.config.decoder!r}: "
                "use --model.decoder gaussian (in Python: decoder='gaussian')"
            )
        if self.config.decoder != "bernoulli" and self.config.levels != data.levels:
            raise SettingsError(
                f"the data set {data.name!r} has {data.levels} levels, but the decoder was made for "
                f"{self.config.levels}: pass the data set when you make the model, as in genfuse.create('vae', data)"
            )

    def after_step(self, player: str) -> None:
        self.updates.add_(1)

    def beta(self) -> Tensor | float:
        """The present weight of the KL: it grows linearly from 0 to ``config.beta`` over ``beta_warmup`` updates."""
        if self.config.beta_warmup == 0:
            return self.config.beta
        return self.config.beta * (self.updates / self.config.beta_warmup).clamp(max=1)

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """-E_q[log p(x | z)] + beta KL(q(z | x) || p(z)), with one draw of z per example; the terms are unweighted.

        With free bits f the KL in the total is sum_d max(f, KL of dimension d in the mean over the batch): arXiv
        1606.04934, appendix C.8, with each latent dimension a group of its own. With ``iwae_samples`` above 1 the total
        is the negative importance-weighted bound, arXiv 1509.00519, equation 8.
        """
        mu, logvar, context = self._encoded(batch.x)
        if self.config.iwae_samples > 1:
            z0, _ = reparameterize_kl(mu, logvar, samples=self.config.iwae_samples)
            log_w = self._log_weight(batch.x, z0, mu, logvar, context)
            iwae = (math.log(len(z0)) - log_w.logsumexp(0)).mean()
            return iwae, {"iwae": iwae.detach()}
        z, kl_per_example = self._draw(mu, logvar, context)
        reconstruction = -self._log_likelihood(batch.x, z).mean()
        kl = kl_per_example.mean()
        terms = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if self.config.free_bits > 0:
            kl = kl_per_dimension(mu, logvar).mean(0).clamp(min=self.config.free_bits).sum()
        return reconstruction + self.beta() * kl, terms

    def encode(self, x: Tensor) -> Any:
        """mu and logvar of q(z | x), each (N, D): two parts, not copied, of the encoder's output.

        Where the posterior is a flow, which has no such numbers: what it makes of the Gaussian's mean, z (N, D).

        Raises DataError where x is not (N, *shape).
        """
        mu, logvar, context = self._encoded(x)
        return (mu, logvar) if self.posterior is None else self.posterior(mu, context)[0]

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """mu and logvar of the Gaussian, each (N, D), and the flow's context (N, C), if there is a flow."""
        if x.shape[1:] != self.config.shape:
            wanted = ", ".join(map(str, self.config.shape))
            raise DataError(f"x must be (N, {wanted}), as the setting `shape` says; got {tuple(x.shape)}")
        if self.config.decoder != "gaussian" or len(self.config.shape) == 3:
            check_range(x, self.config.levels, always=not self.training)
        out, d = at_least_float32(self.encoder(x)), self.config.latent_dim
        return out[:, :d], out[:, d : 2 * d], None if self.posterior is None else out[:, 2 * d :]

    def _draw(
        self, mu: Tensor, logvar: Tensor, context: Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """z ~ q(z | x), (N, D), and KL(q(z | x) || p(z)), (N,), in closed form; where the posterior is a flow by that
        draw, log q(z | x) - log p(z) (arXiv 1505.05770, equation 15). The Gaussian's own part of it could be had in
        closed form, but varies together with log p(z): so the difference varies less.
        """
        z, kl = reparameterize_kl(mu, logvar, generator=generator)
        if self.posterior is None:
            return z, kl
        eps = (z - mu) * torch.exp(-logvar / 2)
        z, logdet = self.posterior(z, context)
        log_q = standard_normal_log_prob(eps, -logdet) - 0.5 * logvar.sum(-1)
        return z, log_q - standard_normal_log_prob(z)

    def _mean_latent(self, x: Tensor) -> Tensor:
        encoded = self.encode(x)
        return encoded if isinstance(encoded, Tensor) else encoded[0]

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], (..., *shape), for latents (..., D)."""
        return self.likelihood.mean(self.decoder(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x | z] at the mean of q(z | x), (N, *shape)."""
        return self.decode(self._mean_latent(x))

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None, mean: bool | None = None) -> Tensor:
        """(n, *shape): E[x | z] with z ~ p(z), or with ``mean=False`` a draw x ~ p(x | z).

        By default the means of images, as pictures of VAEs show them, and draws of all else, where the spread around
        the mean is part of the density. A seeded generator may be on any device: its own decides the draws.
        """
        mean = len(self.config.shape) == 3 if mean is None else mean
        where = self.device if generator is None else generator.device
        z = torch.randn(n, self.config.latent_dim, device=where, generator=generator).to(next(self.parameters()))
        if mean:
            return torch.cat([self.decode(part) for part in z.split(self._rows)])
        draws = [self.likelihood.sample(self.decoder(part).to(where), generator) for part in z.split(self._rows)]
        return torch.cat(draws).to(self.device)

    def interpolate(self, a: Tensor, b: Tensor, steps: int) -> Tensor:
        """E[x | z] on the line between the means of q(z | a) and q(z | b), both ends included.

        Examples (*shape) give (steps, *shape); batches (N, *shape) give (steps, N, *shape). Raises SettingsError for
        fewer than two steps.
        """
        if steps < 2:
            raise SettingsError(f"an interpolation has at least 2 steps, got {steps}")
        if a.ndim == len(self.config.shape):
            return self.interpolate(a[None], b[None], steps).squeeze(1)
        start, end = self._mean_latent(a), self._mean_latent(b)
        weight = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[:, None, None]
        return self.decode(torch.lerp(start, end, weight))

    def elbo(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The evidence lower bound of log p(x), (N,) nats: one draw of z, and the KL, exact if the posterior is
        Gaussian. Differentiable."""
        z, kl = self._draw(*self._encoded(x), generator)
        return self._log_likelihood(x, z) - kl

    @torch.no_grad()
    def iwae_bound(
        self, x: Tensor, samples: int = 50, *, chunk: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """log 1/K sum_k p(x, z_k) / q(z_k | x) with K = ``samples`` draws (arXiv 1509.00519), (N,) nats.

        In expectation it grows with K from the ELBO to log p(x). At most ``chunk`` latents are decoded at a time, by
        default as many as make 2 million decoder outputs; one seed gives one bound, to rounding, whatever the chunk.
        Raises SettingsError where samples or chunk is below 1.
        """
        chunk = self._rows if chunk is None else chunk
        if samples < 1 or chunk < 1:
            raise SettingsError(f"samples and chunk must be at least 1, got samples={samples} and chunk={chunk}")
        encoded = [self._encoded(part) for part in x.split(chunk)]
        mu, logvar = (torch.cat([part[i] for part in encoded]) for i in (0, 1))  # type: ignore[misc]
        context = None if self.posterior is None else torch.cat([part[2] for part in encoded])  # type: ignore[misc]
        together = max(1, chunk // max(1, len(x)))
        total = mu.new_full((len(x),), -math.inf)
        for first in range(0, samples, together):
            # One draw of all examples at a time, so that the noise does not depend on the chunks.
            draws = range(first, min(first + together, samples))
            z = torch.stack([reparameterize_kl(mu, logvar, generator=generator)[0] for _ in draws])
            parts = (self._log_weight(*rows) for rows in _split(chunk, x, z, mu, logvar, context))
            log_w = torch.cat(list(parts), dim=-1)
            total = torch.logaddexp(total, log_w.logsumexp(0))
        return total - math.log(samples)

    def anomaly_score(
        self, x: Tensor, samples: int = 50, *, chunk: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """An upper estimate of -log p(x), (N,) nats: the higher, the less the example is like the training data."""
        return -self.iwae_bound(x, samples, chunk=chunk, generator=generator)

    @property
    def _rows(self) -> int:
        """How many latents to decode at a time where memory is to be bounded."""
        return max(1, 2**21 // (math.prod(self.config.shape) * self.likelihood.parameters_per_cell))

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), (..., N), for latents (..., N, D)."""
        return self.likelihood.log_prob(self.decoder(z), x)

    def _log_weight(self, x: Tensor, z0: Tensor, mu: Tensor, logvar: Tensor, context: Tensor | None) -> Tensor:
        """log p(x, z) / q(z | x), (..., N), for draws (..., N, D) of the Gaussian, of which the flow, if there is one,
        makes z. The normal densities' constants cancel."""
        eps, z, logdet = (z0 - mu) * torch.exp(-logvar / 2), z0, 0.0
        if self.posterior is not None and context is not None:
            wide = context.expand(*z0.shape[:-1], -1)
            z, changed = self.posterior(z0.flatten(0, -2), wide.flatten(0, -2))
            z, logdet = z.view(z0.shape), changed.view(z0.shape[:-1])
        return self._log_likelihood(x, z) + 0.5 * (eps.square() + logvar - z.square()).sum(-1) + logdet


def _split(
    rows: int, x: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, context: Tensor | None
) -> Iterator[tuple[Any, ...]]:
    """At most ``rows`` examples at a time of x, mu, logvar and the context (N, ...) and of z (S, N, D)."""
    contexts = [None] * len(x.split(rows)) if context is None else context.split(rows)
    return zip(x.split(rows), z.split(rows, dim=1), mu.split(rows), logvar.split(rows), contexts, strict=True)
