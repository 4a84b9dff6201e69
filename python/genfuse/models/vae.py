"""The variational autoencoder (arXiv 1312.6114) and its importance-weighted bound (arXiv 1509.00519)."""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence
from torch.nn import functional as F
from typing_extensions import Self

from genfuse import nn as blocks
from genfuse.data import Dataset
from genfuse.errors import SettingsError
from genfuse.models import _base
from genfuse.models._base import Batch, GenerativeModel, Given, ModelConfig, Player, adam
from genfuse.nn import Columns, Composite, Transform, WithContext, mlp
from genfuse.nn.likelihoods import Bernoulli, Categorical, DiscretizedLogistic, Gaussian, Likelihood, at_least_float32
from genfuse.ops import kl_per_dimension, reparameterize_kl, standard_normal_log_prob

Network = Literal["mlp", "conv"]
Decoder = Literal["auto", "bernoulli", "gaussian", "mixture", "categorical", "discretized-logistic"]
Variance = Literal["fixed", "shared", "per-cell"]
Posterior = Literal["gaussian", "planar", "radial", "iaf"]
Objective = Literal["elbo", "tc", "factor"]
Encoded = Sequence[Any]  # mu and logvar of the Gaussian q(z0 | x), and the context of the posterior's flow, if any
COLLAPSED = 0.1  # nats of KL per example, all dimensions together
GAMMA = 10.0  # the default
DISCRETE = {Bernoulli: "bernoulli", Categorical: "categorical", DiscretizedLogistic: "discretized-logistic"}


def check_bound(of: Any, flow: bool, prior: bool = False) -> None:
    """Raise SettingsError unless the bound that ``of``, a VAE or its settings, is trained on can be had, with ``flow``
    of a posterior that is a flow, and with ``prior`` of one that is not N(0, I)."""
    _base.check_at_least(of, latent_dim=1, iwae_samples=1, beta_warmup=0, beta=0, free_bits=0, gamma=0)
    _base.check_choices(of, objective=Objective)
    if of.objective != "elbo" and (of.iwae_samples > 1 or of.free_bits > 0):
        raise SettingsError(f"objective {of.objective!r} weighs parts of the KL of one draw: leave iwae_samples at 1 "
                            f"and free_bits at 0, got {of.iwae_samples} and {of.free_bits}")  # fmt: skip
    mine, other = ("gamma", "beta") if of.objective == "factor" else ("beta", "gamma")
    if getattr(of, other) != {"beta": 1.0, "gamma": GAMMA}[other]:
        raise SettingsError(f"objective {of.objective!r} has {mine} in place of {other}: leave {other} out, got "
                            f"{getattr(of, other)}")  # fmt: skip
    if of.objective == "tc" and flow:
        raise SettingsError("objective 'tc' needs q(z | x) of each draw and each other example, which a flow has at a "
                            "high cost: use posterior 'gaussian', or objective 'factor'")  # fmt: skip
    if (flow or prior) and of.free_bits > 0:
        raise SettingsError(
            "free_bits act on the KL of each latent dimension, which a flow as the posterior, or a prior other than "
            "N(0, I), does not have: leave them at 0, or use beta_warmup"
        )
    if of.iwae_samples > 1 and (of.beta, of.beta_warmup, of.free_bits) != (1.0, 0, 0.0):
        raise SettingsError(
            "iwae_samples above 1 train a bound that has no KL term for beta, beta_warmup or free_bits to act on: "
            "leave these at their defaults, or iwae_samples at 1"
        )


@dataclass(frozen=True)
class VAEConfig(ModelConfig):
    """Settings of a VAE. Raises SettingsError for values outside their range."""

    latent_dim: int = 20  # dimensions of z
    network: Network = "mlp"  # conv takes images and puts convolutions before the dense layers
    hidden: tuple[int, ...] = (256, 256)  # widths of the encoder's dense layers; the decoder has them in reverse
    channels: tuple[int, ...] = (32, 64)  # conv: widths of the encoder's stages, each of which halves the image
    # p(x | z) of a cell; auto: mixture for tables, unless sigma or variance are given, gaussian for other real-valued
    # data, else bernoulli
    decoder: Decoder = "auto"
    mixtures: int = 1  # discretized-logistic: logistic densities of a cell
    sigma: float = 1.0  # gaussian: standard deviation; where it is learned, its start
    variance: Variance = "shared"  # gaussian: sigma^2, one learned number, or an output
    objective: Objective = "elbo"  # elbo: of beta-VAE; tc: of beta-TCVAE; factor: of FactorVAE
    beta: float = 1.0  # weight of the KL; tc: of the total correlation alone
    gamma: float = GAMMA  # factor: weight of the total correlation, beside the KL
    discriminator: tuple[int, ...] = (256, 256, 256)  # factor: widths of the network that estimates it
    beta_warmup: int = 0  # steps over which the weights of the KL and the total correlation grow from 0
    free_bits: float = 0.0  # nats of KL per latent dimension, in the mean over a batch, that cost nothing to use
    iwae_samples: int = 1  # more than 1: train the importance-weighted bound with this many samples
    posterior: Posterior = "gaussian"  # q(z | x): diagonal, or what a flow of this kind makes of a diagonal one
    posterior_layers: int = 4  # of that flow
    posterior_hidden: tuple[int, ...] = (64, 64)  # iaf: widths of each layer's network
    posterior_context: int = 32  # features of x that the encoder hands to that flow
    examples: int | None = None  # of the training split: for tc; taken from the data
    _positive = ("sigma",)
    normal_scores = True

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = _base.numbers_alone(self.columns)
        if self.decoder == "auto":
            asked = self.columns is None or (numbers and (self.sigma, self.variance) != (1.0, "shared"))
            of_numbers = "gaussian" if asked else "mixture"
            object.__setattr__(self, "decoder", of_numbers if self.levels is None else "bernoulli")
        elif self.decoder == "gaussian" and not numbers:  # as former runs of tables of several kinds have it
            object.__setattr__(self, "decoder", "mixture")
        if self.decoder == "mixture" and self.columns is None:
            raise SettingsError(f"decoder 'mixture' is of tables, whose columns are taken from the data; got shape "
                                f"{self.shape} without: use decoder 'gaussian'")  # fmt: skip
        if self.decoder != "mixture":
            object.__setattr__(self, "columns", None)
        check_bound(self, flow=self.posterior != "gaussian")
        _base.check_at_least(self, posterior_layers=1, posterior_context=1, mixtures=1)
        for name in ("hidden", "channels", "posterior_hidden", "discriminator"):
            if any(size < 1 for size in getattr(self, name)):
                raise SettingsError(f"{name} must hold sizes of at least 1, got {getattr(self, name)}")
        if self.columns is not None and self.network == "conv":
            raise SettingsError("network 'conv' needs images, and the data is a table: use network 'mlp'")
        if self.network == "conv" and (len(self.shape) != 3 or not self.channels):
            raise SettingsError(
                f"network 'conv' needs images, shape (C, H, W), and at least one entry of channels; "
                f"got shape {self.shape} and channels {self.channels}: use network 'mlp'"
            )
        if self.decoder in ("categorical", "discretized-logistic") and self.levels is None:
            raise SettingsError(
                f"decoder {self.decoder!r} needs discrete data, levels of 2 or more, got {self.levels}: "
                "use decoder 'gaussian' for real-valued data"
            )
        if self.posterior == "iaf" and not self.posterior_hidden:
            raise SettingsError("posterior 'iaf' needs at least one entry of posterior_hidden, got ()")


def _likelihood(config: VAEConfig) -> Likelihood | Columns:
    levels = config.levels or 0  # of discrete data: VAEConfig saw to it
    if config.columns is not None:
        return Columns(config.columns)
    if config.decoder == "gaussian":
        return Gaussian(config.sigma, config.variance)
    if config.decoder == "bernoulli":
        return Bernoulli()
    return Categorical(levels) if config.decoder == "categorical" else DiscretizedLogistic(levels, config.mixtures)


def _flow(config: VAEConfig) -> Composite | None:
    """What turns a draw z0 of the diagonal Gaussian into z ~ q(z | x), with the encoder's features as its context."""
    d, context, layers = config.latent_dim, config.posterior_context, config.posterior_layers
    if config.posterior == "gaussian":
        return None
    if config.posterior == "iaf":
        steps: list[Transform] = []
        # arXiv 1606.04934, algorithm 1; the order of the dimensions is reversed after each step
        for _ in range(layers):
            made = blocks.AutoregressiveAffine(d, config.posterior_hidden, context=context, scale="sigmoid")
            steps += [made, blocks.Permutation.reversed(d)]
        return Composite(steps)
    layer = blocks.Planar if config.posterior == "planar" else blocks.Radial
    return Composite([layer(d, context) for _ in range(layers)])


def _networks(config: VAEConfig, outputs: int, per_cell: int) -> tuple[nn.Module, nn.Module]:
    """Encoder (N, *shape) -> (N, outputs) and decoder (N, D) -> (N, *shape, per_cell), shown a context if there is
    one."""
    shape, hidden, cells, context = config.shape, config.hidden, config.dimensions, config.context
    inputs = config.latent_dim + context
    encoder: nn.Module
    decoder: nn.Module
    if config.columns is not None:
        columns = Columns(config.columns)
        encoder = nn.Sequential(columns, mlp([columns.width + context, *hidden, outputs]))
        decoder = mlp([inputs, *hidden[::-1], columns.outputs])
    elif config.network == "conv":
        channels, height, width = shape
        encoder = blocks.conv_encoder((channels + context, height, width), config.channels, hidden, outputs)
        decoder = blocks.ConvDecoder(inputs, hidden, config.channels, (channels, height, width), per_cell)
    else:
        encoder = nn.Sequential(
            blocks.Near() if config.levels is None else nn.Flatten(), mlp([cells + context, *hidden, outputs])
        )
        decoder = nn.Sequential(mlp([inputs, *hidden[::-1], cells * per_cell]), nn.Unflatten(-1, (*shape, per_cell)))
    if not context:
        return encoder, decoder
    return WithContext(encoder, planes=config.network == "conv"), WithContext(decoder, planes=False)


class FlowPosterior(Distribution):
    """What an invertible ``flow`` makes of a diagonal Gaussian: z = f(z0; features), z0 ~ ``base``.

    Of batch shape (N,) and event shape (D,); ``features`` (N, C) are the flow's context, if it takes one. `log_prob`
    needs the flow's inverse.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Distribution, flow: Transform, features: Tensor | None = None) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.flow, self.features = base, flow, features

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return _through(self.flow, self.base.rsample(sample_shape), self.features)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.expand(*value.shape[:-2], *self.batch_shape, *self.event_shape)
        z0, logdet = _through(self.flow.inverse, value, self.features)
        log_prob: Tensor = self.base.log_prob(z0) + logdet
        return log_prob


class VAE(GenerativeModel):
    """Variational autoencoder: latents z ~ p(z), examples x ~ p(x | z), and q(z | x) in place of the posterior.

    Examples x are (N, *shape), latents z (N, D), densities (N,) in nats. With an ``embedding`` all of it is given y,
    labels (N,) or a context (N, C), that is p(x | z, y), q(z | x, y) and, if the prior takes a context, p(z | y).

    Args:
        encoder: x -> (N, 2 D), mu and logvar of a diagonal Gaussian side by side, and after them the context of
            ``posterior_flow`` if it takes one. Called as encoder(x, context) if there is an ``embedding``.
        decoder: z (M, D) -> the raw parameters of ``likelihood`` for M examples; decoder(z, context) with an
            ``embedding``.
        likelihood: p(x | z) of such parameters: one of `genfuse.nn.likelihoods`, or any object with
            ``log_prob(raw, x)`` -> (M,) in nats, ``mean(raw)`` and ``sample(raw, generator)`` -> (M, *shape). If it is
            a module, its parameters are trained.
        latent_dim: D.
        prior: p(z); None is N(0, I). A Distribution of event shape (D,), or a module that makes one, whose parameters
            are trained. It is called without arguments, or with the context (N, C) if its ``forward`` demands one, or
            its attribute ``context`` says, as that of a flow does, that it takes some. A Distribution stays where its
            tensors are: make it on the device of the model. The KL is exact if `torch.distributions.kl_divergence`
            knows it, else by the draw of z.
        posterior_flow: makes z of a draw z0 of the Gaussian: ``flow(z0, features)`` returns z and the log-determinant,
            (N,); a `genfuse.nn.Transform`.
        embedding: makes the context (N, C) of y; its parameters are trained.
        shape: of one example, if it is to be checked; with (C, H, W) samples are means, as pictures of VAEs show them.
        levels: of discrete data, whose examples are then in [0, 1]; None for real-valued data.
        objective, beta, gamma, beta_warmup, free_bits, iwae_samples: what is minimised: see `loss`, and the settings.
        discriminator: with ``factor``: z (N, D) -> a number for each, (N, 1) or (N,): the logit that it is of q(z).
        examples: with ``tc``: how many the training split has.
        config: the settings that it was made of, if it was.

    Raises SettingsError for values outside their range, and for a prior of another event shape.
    """

    Config = VAEConfig
    moved = {"posterior.": "posterior_flow."}
    updates: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: blocks.likelihoods.AnyLikelihood,
        *,
        latent_dim: int,
        prior: Distribution | nn.Module | None = None,
        posterior_flow: Transform | None = None,
        embedding: nn.Module | None = None,
        shape: tuple[int, ...] | None = None,
        levels: int | None = None,
        objective: Objective = "elbo",
        beta: float = 1.0,
        gamma: float = GAMMA,
        discriminator: nn.Module | None = None,
        examples: int | None = None,
        beta_warmup: int = 0,
        free_bits: float = 0.0,
        iwae_samples: int = 1,
        config: VAEConfig | None = None,
    ) -> None:
        super().__init__(config, shape=shape, levels=levels, embedding=embedding)
        if isinstance(likelihood, Gaussian) and len(self.shape or ()) != 3:
            self.levels = None  # it takes cells of any range; those of images are held to theirs
        self.latent_dim, self.iwae_samples = latent_dim, iwae_samples
        self.beta, self.beta_warmup, self.free_bits = beta, beta_warmup, free_bits
        self.objective, self.gamma, self.examples = objective, gamma, examples
        check_bound(self, posterior_flow is not None, prior is not None)
        # In this order, by which the state of an optimizer names them.
        self.likelihood = likelihood
        self.posterior_flow = posterior_flow
        self.encoder, self.decoder = encoder, decoder
        self.prior = prior
        self.discriminator = discriminator
        if (objective == "factor") != (discriminator is not None) or (objective == "tc" and not examples):
            needs = "a discriminator for 'factor', and no other; for 'tc' examples, the size of the training split"
            raise SettingsError(f"objective {objective!r} needs {needs}: genfuse.create('vae', data) gives both")
        self._prior_sees_context = isinstance(prior, nn.Module) and _demands_context(prior)
        if isinstance(prior, Distribution):
            self._checked_prior(prior)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, config: VAEConfig) -> Self:
        likelihood, flow = _likelihood(config), _flow(config)
        outputs = 2 * config.latent_dim + (0 if flow is None else config.posterior_context)
        encoder, decoder = _networks(config, outputs, getattr(likelihood, "parameters_per_cell", 1))
        names = ("latent_dim", "objective", "beta", "gamma", "examples", "beta_warmup", "free_bits", "iwae_samples")
        given: dict[str, Any] = {name: getattr(config, name) for name in names}
        if config.objective == "factor":
            given["discriminator"] = blocks.mlp_critic(config.latent_dim, config.discriminator)
        return cls(encoder, decoder, likelihood, posterior_flow=flow, config=config, **given)

    def players(self) -> list[Player]:
        if self.discriminator is None:
            return super().players()
        own = [weight for name, weight in self.named_parameters() if not name.startswith("discriminator.")]
        critic = Player("discriminator", self.discriminator.parameters(), adam(1e-4, (0.5, 0.9)))  # arXiv 1802.05983
        return [Player("model", own, adam()), critic]

    def check_data(self, data: Dataset) -> None:
        super().check_data(data)
        decoder = DISCRETE.get(type(self.likelihood))
        if decoder is None:
            return
        if data.levels is None:
            raise SettingsError(
                f"the data set {data.name!r} is real-valued, but the decoder is {decoder!r}: "
                "use --model.decoder gaussian (in Python: decoder='gaussian')"
            )
        levels = getattr(self.likelihood, "levels", data.levels)
        if levels != data.levels:
            raise _base.unlike(data, f"has {data.levels} levels, but the decoder was made for {levels}")

    def watch(self, player: str, step: int, terms: dict[str, float]) -> dict[str, str]:
        if step < max(500, self.beta_warmup) or self.beta == 0 or not terms.get("kl", math.inf) < COLLAPSED:
            return {}
        return {
            "collapse": f"the posterior has collapsed: q(z | x) is {terms['kl']:.2g} nats from the prior, so that z "
            "tells nothing of x and the decoder has to do without. Try --model.beta-warmup, --model.free-bits, a "
            "smaller --model.beta, or a decoder that is less sure of itself"
        }

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """``elbo``; none for a Bernoulli likelihood of values between 0 and 1, of which it is no density."""
        grey = isinstance(self.likelihood, Bernoulli) and self.levels != 2
        return () if grey else ("elbo",)

    def after_step(self, player: str) -> None:
        if player == "model":
            self.updates.add_(1)
        super().after_step(player)

    def kl_weight(self) -> Tensor | float:
        """The present weight of the KL: it grows linearly from 0 to ``beta`` over ``beta_warmup`` updates; to 1 of the
        objectives that weigh the total correlation."""
        beta = self.beta if self.objective == "elbo" else 1.0
        if self.beta_warmup == 0:
            return beta
        self.settle(always=True)
        return beta * (self.updates / self.beta_warmup).clamp(max=1)

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """-E_q[log p(x | z)] + beta KL(q(z | x) || p(z)), with one draw of z per example; the terms are unweighted.

        With free bits f the KL in the total is sum_d max(f, KL of dimension d in the mean over the batch): arXiv
        1606.04934, appendix C.8, with each latent dimension a group of its own. With ``iwae_samples`` above 1 the total
        is the negative importance-weighted bound, arXiv 1509.00519, equation 8.

        Objective ``tc`` is beta-TCVAE, arXiv 1802.04942, equation 4 with alpha = gamma = 1: KL + (beta - 1) TC in place
        of beta KL, with the total correlation TC of `decomposed`; the terms ``mutual_information``,
        ``total_correlation`` and ``dimension_kl`` add up to the KL. Objective ``factor`` is FactorVAE, arXiv
        1802.05983, equation 2: KL + gamma TC, where TC = E[log D(z) - log(1 - D(z))] by a second player, the
        ``discriminator``, that tells codes z of a batch from those with each dimension permuted across the batch.
        """
        self.settle()
        x, context = batch.x, self.context_of(self.y_of(batch), len(batch.x))
        if player == "discriminator" and self.discriminator is not None:
            with torch.no_grad():
                z, _ = self._draw(self._encoded(x, context), context)
                permuted = z.gather(0, torch.rand_like(z).argsort(0))
            real, fake = self.discriminator(torch.cat([z, permuted])).chunk(2)
            accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
            return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean()), {"accuracy": accuracy}
        mu, logvar, _ = encoded = self._encoded(x, context)
        if self.iwae_samples > 1:
            z0, _ = reparameterize_kl(mu, logvar, samples=self.iwae_samples)  # (K, N, D)
            log_w = self._log_weight(z0, x, encoded, context)  # (K, N)
            iwae = (math.log(len(z0)) - log_w.logsumexp(0)).mean()
            return iwae, {"iwae": iwae.detach()}
        z, kl_per_example = self._draw(encoded, context)
        reconstruction = -self._log_likelihood(x, z, context).mean()
        kl = kl_per_example.mean()
        terms = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if self.free_bits > 0:
            kl = kl_per_dimension(mu, logvar).mean(0).clamp(min=self.free_bits).sum()
        if self.objective == "tc":
            assert self.examples is not None  # __init__ saw to it
            information, tc = decomposed(z, mu, logvar, self.examples)
            kl = kl + (self.beta - 1) * tc
            terms |= {"mutual_information": information, "total_correlation": tc}
            terms["dimension_kl"] = terms["kl"] - information - tc
        if self.discriminator is not None:
            terms["total_correlation"] = self.discriminator(z).mean()
            kl = kl + self.gamma * terms["total_correlation"]
        return reconstruction + self.kl_weight() * kl, {name: term.detach() for name, term in terms.items()}

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """q(z | x), of batch shape (N,) and event shape (D,): an `Independent` `Normal`, or a `FlowPosterior`."""
        mu, logvar, features = self._encoded(x, self.context_of(y, len(x)))
        gaussian = _gaussian(mu, logvar)
        return gaussian if self.posterior_flow is None else FlowPosterior(gaussian, self.posterior_flow, features)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z (N, D): the mean of q(z | x), or what the flow makes of the Gaussian's mean if the posterior is a flow."""
        mu, _, features = self._encoded(x, self.context_of(y, len(x)))
        return mu if self.posterior_flow is None else _through(self.posterior_flow, mu, features)[0]

    @property
    def uniforms(self) -> int:
        """How many ``u`` `decode` makes a draw of, for a table with columns of several kinds; else 0."""
        return self.likelihood.uniforms if isinstance(self.likelihood, Columns) else 0

    def decode(self, z: Tensor, y: Tensor | None = None, *, u: Tensor | None = None) -> Tensor:
        """E[x | z], (..., *shape), for latents (..., D); y is for the N of z (..., N, D). With uniform draws ``u`` in
        (0, 1), (N, `uniforms`), a draw of p(x | z)."""
        context = self.context_of(y, z.shape[-2] if z.dim() > 1 else 1)
        if u is not None and isinstance(self.likelihood, Columns):
            return self.likelihood.sample(self._raw(z, context), u=u)
        return self._decode(z, context)

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x | z] at `encode`'s z, (N, *shape)."""
        return self.decode(self.encode(x, y), y)

    def latents(self, n: int, *, y: Given = None, generator: torch.Generator | None = None) -> Tensor:
        """n draws z ~ p(z), (n, D); of a prior that takes a context p(z | y)."""
        return self._latents(n, self.draw_context(n, y, generator) if self._prior_sees_context else None, generator)

    @torch.no_grad()
    def sample(
        self, n: int, *, y: Given = None, generator: torch.Generator | None = None, mean: bool | None = None
    ) -> Tensor:
        """(n, *shape): E[x | z] with z ~ p(z), or with ``mean=False`` a draw x ~ p(x | z).

        By default the means of images, as pictures of VAEs show them, and draws of all else, where the spread around
        the mean is part of the density.
        """
        mean = len(self.shape or ()) == 3 if mean is None else mean
        where = self.device if generator is None else generator.device
        context = self.draw_context(n, y, generator)
        z = self._latents(n, context, generator)
        parts = _base.split(self._rows(self.shape), z, context)
        if mean:
            return torch.cat([self._decode(*part) for part in parts])
        draws = [self.likelihood.sample(self._raw(*part).to(where), generator) for part in parts]
        return torch.cat(draws).to(self.device)

    def interpolate(self, a: Tensor, b: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
        """E[x | z] on the line between the codes of examples a and b, as `encode` makes them, both ends included.

        Examples (*shape) give (steps, *shape); batches (N, *shape) give (steps, N, *shape), if the model knows its
        ``shape``. Raises SettingsError for fewer than two steps.
        """
        if a.dim() == len(self.shape or ()):
            return self.interpolate(a[None], b[None], steps, self.for_all(y, 1)).squeeze(1)
        return self.decode(_base.between(self.encode(a, y), self.encode(b, y), steps, arc=False), y)

    def interpolate_latents(self, a: Tensor, b: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
        """E[x | z] from latents a to b, (N, D) each, both ends included: (steps, N, *shape). On arcs if the prior is
        N(0, I), whose draws are nearly all at one distance from the origin (arXiv 1609.04468), else on lines.

        Raises SettingsError for fewer than two steps.
        """
        return self.decode(_base.between(a, b, steps, arc=self.prior is None), y)

    def elbo(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """The evidence lower bound of log p(x), (N,) nats: one draw of z, and the KL, exact if the posterior is
        Gaussian and its KL from the prior is known. Differentiable."""
        context = self.context_of(y, len(x))
        z, kl = self._draw(self._encoded(x, context), context, generator)
        return self._log_likelihood(x, z, context) - kl

    @torch.no_grad()
    def iwae_bound(
        self,
        x: Tensor,
        samples: int = 50,
        *,
        y: Tensor | None = None,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """log 1/K sum_k p(x, z_k) / q(z_k | x) with K = ``samples`` draws (arXiv 1509.00519), (N,) nats.

        In expectation it grows with K from the ELBO to log p(x). At most ``chunk`` latents are decoded at a time, by
        default as many as make 2 million decoder outputs; one seed gives one bound, to rounding, whatever the chunk.
        Raises SettingsError if samples or chunk is below 1.
        """
        chunk = self._rows(x.shape[1:]) if chunk is None else chunk
        if samples < 1 or chunk < 1:
            raise SettingsError(f"samples and chunk must be at least 1, got samples={samples} and chunk={chunk}")
        context = self.context_of(y, len(x))
        encoded = [self._encoded(*part) for part in _base.split(chunk, x, context)]
        mu, logvar, features = map(_joined, zip(*encoded, strict=True))
        together = max(1, chunk // max(1, len(x)))
        total = mu.new_full((len(x),), -math.inf)
        for first in range(0, samples, together):
            # One draw of all examples at a time, so that the noise does not depend on the chunks.
            draws = range(first, min(first + together, samples))
            z = torch.stack([reparameterize_kl(mu, logvar, generator=generator)[0] for _ in draws], 1)  # (N, K, D)
            parts = _base.split(chunk, z, x, context, mu, logvar, features)
            log_w = torch.cat([self._log_weight(z.movedim(1, 0), x, each, c) for z, x, c, *each in parts], dim=-1)
            total = torch.logaddexp(total, log_w.logsumexp(0))
        return total - math.log(samples)

    def anomaly_score(self, x: Tensor, samples: int = 50, **options: Any) -> Tensor:
        """An upper estimate of -log p(x), (N,) nats: the higher, the less the example is like the training data. The
        options are those of `iwae_bound`, and so are the errors."""
        return -self.iwae_bound(x, samples, **options)

    def code(self, coder: Any, n: int, x: Tensor | None = None) -> Tensor:
        """See `genfuse.models.Codes`: by bits-back (arXiv 1901.04866). Bits of the stack are taken for a draw of
        q(z | x), then x is put on it by p(x | z), and z by p(z): in expectation the stack is longer by -ELBO, since
        whoever takes z and x again puts these bits back.

        Raises SettingsError unless the likelihood is of levels, the posterior Gaussian, the prior N(0, I), and nothing
        is given.
        """
        likelihood: Any = self.likelihood
        for reason, holds in {
            "its likelihood is a density of real numbers, which have no levels": not hasattr(likelihood, "code"),
            "its Bernoulli likelihood is of 2 levels: binarize the data, or use another decoder": not self.likelihoods,
            "its posterior is a flow": self.posterior_flow is not None,
            "its prior is not N(0, I)": self.prior is not None,
            "it is conditional, and what is given would not be in the file": self.conditional,
        }.items():
            if holds:
                raise SettingsError(f"this {type(self).__name__} does not compress: {reason}")
        z = coder.prior(n, self.latent_dim, None if x is None else coder.gaussian(*self._spread(x)))
        found: Tensor = likelihood.code(coder, self._raw(coder.centres(z), None), x)
        if x is None:
            coder.gaussian(*self._spread(found), z)
        coder.flush()
        return found

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar, _ = self._encoded(x)
        return mu, torch.exp(logvar / 2)

    def _encoded(self, x: Tensor, context: Tensor | None = None) -> Encoded:
        """mu and logvar of the Gaussian, each (N, D): two parts, not copied, of the encoder's output; and the flow's
        context (N, F), if there is one."""
        x = self.checked(x)
        out = at_least_float32(self.encoder(x) if context is None else self.encoder(x, context))
        d, wanted = self.latent_dim, 2 * self.latent_dim
        if out.shape[1] < wanted or (out.shape[1] > wanted and self.posterior_flow is None):
            raise SettingsError(
                f"the encoder must return (N, {wanted}), mu and logvar of {d} latent dimensions side by side, and more "
                f"for a posterior flow alone; got {tuple(out.shape)}"
            )
        mu, logvar, *features = out.split([d, d, out.shape[1] - wanted] if out.shape[1] > wanted else d, 1)
        return mu, logvar, features[0] if features else None

    def _draw(
        self, encoded: Encoded, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """z ~ q(z | x), (N, D), and KL(q(z | x) || p(z)), (N,), in closed form if there is one.

        Else by that draw, log q(z | x) - log p(z) (arXiv 1505.05770, equation 15). The Gaussian's own part of it could
        be had in closed form, but varies together with log p(z): so the difference varies less.
        """
        mu, logvar, _ = encoded
        z, kl = reparameterize_kl(mu, logvar, generator=generator)
        if self.posterior_flow is None and self.prior is None:
            return z, kl
        prior = self._prior(context)
        if self.posterior_flow is None and prior is not None:
            with suppress(NotImplementedError):
                return z, kl_divergence(_gaussian(mu, logvar), prior)
        return self._moved(z, encoded, prior)

    def _moved(self, z: Tensor, encoded: Encoded, prior: Distribution | None) -> tuple[Tensor, Tensor]:
        """Draws (..., N, D) of the Gaussian as the flow moves them, if there is one: z, and log q(z | x) - log p(z)."""
        mu, logvar, features = encoded
        eps = (z - mu) * torch.exp(-logvar / 2)
        logdet: Any = 0.0
        if self.posterior_flow is not None:
            z, logdet = _through(self.posterior_flow, z, features)
        if prior is None:  # the constants of both normal densities cancel
            return z, 0.5 * (z.square() - eps.square() - logvar).sum(-1) - logdet
        return z, standard_normal_log_prob(eps) - 0.5 * logvar.sum(-1) - logdet - prior.log_prob(z)

    def _log_weight(self, z: Tensor, x: Tensor, encoded: Encoded, context: Tensor | None) -> Tensor:
        """log p(x, z) / q(z | x), (..., N), for draws z (..., N, D) of the Gaussian, which the flow moves."""
        z, log_ratio = self._moved(z, encoded, self._prior(context))
        return self._log_likelihood(x, z, context) - log_ratio

    def _prior(self, context: Tensor | None) -> Distribution | None:
        """p(z), or p(z | context); None for N(0, I)."""
        if self.prior is None or isinstance(self.prior, Distribution):
            return self.prior
        return self._checked_prior(self.prior(context) if self._prior_sees_context else self.prior())

    def _checked_prior(self, prior: Any) -> Distribution:
        if not isinstance(prior, Distribution) or tuple(prior.event_shape) != (self.latent_dim,):
            got = f"of event shape {tuple(prior.event_shape)}" if isinstance(prior, Distribution) else repr(prior)
            raise SettingsError(
                f"the prior must be a Distribution of event shape ({self.latent_dim},), as torch.distributions."
                f"Independent(Normal(mean, std), 1) of {self.latent_dim} means is, or a module that makes one; "
                f"got {got}"
            )
        return prior

    def _latents(self, n: int, context: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if self.prior is None:
            where = self.device if generator is None else generator.device
            z = torch.randn(n, self.latent_dim, device=where, generator=generator)
        else:
            with _base.seeded(generator):  # since a Distribution draws from the global generators alone
                prior = self._prior(context)
                assert prior is not None
                z = prior.sample(() if prior.batch_shape else (n,))
        return z.to(next(self.parameters()))

    def _raw(self, z: Tensor, context: Tensor | None) -> Any:
        """The decoder's output for latents (..., D), which it is shown as (M, D), and their context (N, C)."""
        rows = z.reshape(-1, z.shape[-1])
        if context is None:
            return self.decoder(rows)
        return self.decoder(rows, context.expand(*z.shape[:-2], *context.shape).reshape(len(rows), -1))

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        mean = self.likelihood.mean(self._raw(z, context))  # (M, *shape)
        return mean.reshape(*z.shape[:-1], *mean.shape[1:])

    def _log_likelihood(self, x: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x | z), (..., N), for latents (..., N, D)."""
        raw = self._raw(z, context)
        if isinstance(self.likelihood, (Likelihood, Columns)):  # which take axes before N, so that x need not be copied
            return self.likelihood.log_prob(raw.unflatten(0, z.shape[:-1]), x)
        rows = x.expand(*z.shape[:-2], *x.shape).reshape(-1, *x.shape[1:])  # (M, *shape)
        log_prob = self.likelihood.log_prob(raw, rows)
        if log_prob.shape != rows.shape[:1]:
            raise SettingsError(
                f"log_prob of the likelihood must be one number for each of {len(rows)} examples, ({len(rows)},); got "
                f"{tuple(log_prob.shape)}: sum over the cells"
            )
        return log_prob.view(z.shape[:-1])

    def _rows(self, shape: Sequence[int] | None) -> int:
        """How many latents to decode at a time if memory is to be bounded."""
        cells = math.prod(shape or (1024,)) * getattr(self.likelihood, "parameters_per_cell", 1)
        return max(1, 2**21 // cells)


def decomposed(z: Tensor, mu: Tensor, logvar: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """Two parts of the mean KL(q(z | x) || p(z)), scalars in nats: the mutual information E[log q(z | x) / q(z)] of
    codes and examples, and the total correlation E[log q(z) / prod_d q(z_d)] (arXiv 1802.04942, equation 2).

    ``z`` (N, D) are draws of q(z | x) = N(mu, exp(logvar)) for a batch out of ``examples`` in all. q(z), the mean over
    all of them, is estimated by minibatch stratified sampling (appendix C.2): the example that z is of counts 1 /
    examples, and the others of the batch share the rest alike. So q(z) has no bias; log q(z) keeps some.
    """
    n = len(z)
    examples = max(examples, n)
    pairs = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar)  # (N, N, D): of z_i given x_j
    of_own, of_others = (-math.log(examples), math.log((examples - 1) / examples / (n - 1))) if n > 1 else (0.0, 0.0)
    weights = z.new_full((n, n), of_others).fill_diagonal_(of_own)[..., None]
    joint = (pairs.sum(-1, keepdim=True) + weights).logsumexp(1)[:, 0]
    information = pairs.diagonal().sum(0) - joint
    return information.mean(), (joint - (pairs + weights).logsumexp(1).sum(-1)).mean()


def _gaussian(mu: Tensor, logvar: Tensor) -> Independent:
    return Independent(Normal(mu, torch.exp(logvar / 2), validate_args=False), 1, validate_args=False)


def _through(
    transform: Callable[..., tuple[Tensor, Tensor]], z: Tensor, features: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a transform of (M, D) makes of z (..., N, D), with features (N, F) as its context, and logdet (..., N)."""
    wide = None if features is None else features.expand(*z.shape[:-1], -1).reshape(-1, features.shape[-1])
    moved, logdet = transform(z.reshape(-1, z.shape[-1]), wide)
    return moved.view(z.shape), logdet.view(z.shape[:-1])


def _demands_context(prior: nn.Module) -> bool:
    parameters = inspect.signature(prior.forward).parameters.values()
    demanded = any(each.default is each.empty and "VAR" not in each.kind.name for each in parameters)
    return demanded or bool(getattr(prior, "context", 0))


def _joined(parts: Sequence[Tensor | None]) -> Any:
    """The opposite of `split` for one of its tensors."""
    return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]
