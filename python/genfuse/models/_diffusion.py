"""What all diffusion models share: one denoiser, its average, and with it training, sampling and likelihoods.

A model is no more than a choice of what the network predicts, of sigma_data, and of the noise levels in training and in
sampling: arXiv 2206.00364, section 5. `genfuse.diffusion` has the parts.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from genfuse.data import Batch
from genfuse.diffusion import Denoiser, drop_rows, likelihood, samplers
from genfuse.errors import SettingsError
from genfuse.models._base import GenerativeModel, Given, ModelConfig, Player, adam, check_at_least, split, transformed
from genfuse.nn import EMA, Columns, DenoisingMLP, Features, OneHot, UNet, in_tiles
from genfuse.ops import philox

Network = Literal["auto", "mlp", "unet"]


@dataclass(frozen=True)
class DiffusionConfig(ModelConfig):
    """Settings of every diffusion model. Raises SettingsError for values outside their range."""

    network: Network = "auto"  # unet: images and clips; mlp: any shape, as vectors; auto: unet for those
    hidden: tuple[int, ...] = (128, 128, 128)  # mlp: width of each residual block, all equal
    channels: tuple[int, ...] = (16, 32, 64)  # unet: widths of the scales, each of half the size of the one before
    blocks: int = 1  # unet: residual blocks of each scale on the way down; one more on the way up
    attention: tuple[int, ...] = ()  # unet: scales with self-attention; 0 is the whole image
    dropout: float = 0.0  # share of the hidden units that are left out in training
    context_dropout: float = 0.1  # conditional: share of the labels or contexts left out in training, for guidance
    lr: float = 1e-3  # Adam's learning rate
    ema: float = 0.999  # decay of the moving average of the weights that everything but training uses
    given: tuple[int, ...] | None = None  # (C, h, w) of the image that is given with each; taken from the data
    _positive: ClassVar[tuple[str, ...]] = ("hidden", "channels", "blocks", "lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channels:
            raise SettingsError("channels must hold at least one width, got ()")
        if len(set(self.hidden)) != 1:
            raise SettingsError(f"hidden must hold one width for each residual block, all equal, got {self.hidden}")
        if self.network == "unet" and len(self.shape) not in (3, 4):
            raise SettingsError(f"network 'unet' needs images, shape (C, H, W), got {self.shape}: use network 'mlp'")
        if self.network == "mlp" and self.given:
            raise SettingsError("network 'mlp' cannot be given images: use network 'unet'")
        if not all(0 <= scale < len(self.channels) for scale in self.attention):
            raise SettingsError(
                f"attention must name scales, 0..{len(self.channels) - 1} for {len(self.channels)} channels, "
                f"got {self.attention}"
            )
        check_at_least(self, dropout=0, context_dropout=0, ema=0, below=1)

    def build(self) -> nn.Module:
        """The network F: (c_in x, log_sigma (N,), context (N, C) or None) -> what it predicts, (N, *shape)."""
        context = self.context + bool(self.condition)  # `FeaturesOrNone` adds one
        if self.network == "unet" or (self.network == "auto" and len(self.shape) in (3, 4)):
            given = self.given[0] + 1 if self.given else 0
            cells = math.prod(self.shape[:-2])
            return UNet(cells, self.channels, self.blocks, self.attention, context, self.dropout, given)
        cells = self.dimensions if self.columns is None else Columns(self.columns).width
        return DenoisingMLP(cells, self.hidden, context, self.dropout)

    def parts(self) -> dict[str, Any]:
        """What a model of these settings is made of beside its network, by the arguments of its ``__init__``."""
        shared = {field.name for field in dataclasses.fields(DiffusionConfig)}
        own = {field.name for field in dataclasses.fields(self)} - shared
        parts = {name: getattr(self, name) for name in (*own, "context_dropout", "lr", "ema")}
        embedding = FeaturesOrNone(self.condition) if self.condition else None
        return {"config": self, "embedding": embedding, **parts}


class FeaturesOrNone(Features):
    """A context (N, features) with a 1 behind it, (N, features + 1), so that zeros, which guidance and context dropout
    put in its place, are no context and not the context 0. Raises DataError for anything else."""

    def forward(self, y: Tensor) -> Tensor:
        return F.pad(super().forward(y), (0, 1), value=1.0)


class DiffusionModel(GenerativeModel):
    """A model of examples seen through Gaussian noise. A subclass gives `draw_sigmas`, `sigma_schedule`, and the
    smallest and the largest noise level of its probability flow, ``sigma_min`` and ``sigma_max``.

    Examples x (N, *shape) and y, labels (N,) or a context (N, C), are the data's. What `denoise` and `score` see is in
    the model's space: real-valued examples as they are, discrete ones as 2 x - 1, rows of tables with columns of
    several kinds as `genfuse.nn.Columns` encodes them. Densities are in nats; of such tables there are none.
    """

    _of_levels = True
    loss_unit: ClassVar[str] = "per cell, without unit"
    moved = {
        "network.": "denoiser.network.",
        "average.module.": "averaged.module.network.",
        "average.updates": "averaged.updates",
    }
    renamed: ClassVar[Mapping[str, str]] = {}  # {settings of former versions: their names now}
    seen: Tensor  # how many examples the loss was trained on, and of each of their cells the mean and the variance
    mean: Tensor
    variance: Tensor
    sigma_min: float
    sigma_max: float
    sampler: tuple[str, int] = ("heun", 20)  # and steps, by default

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        config: DiffusionConfig | None = None,
        shape: Sequence[int] | None = None,
        levels: int | None = None,
        embedding: nn.Module | None = None,
        context_dropout: float = 0.1,
        lr: float = 1e-3,
        ema: float = 0.999,
    ) -> None:
        """A model of a denoiser.

        Args:
            denoiser: of any network, without an embedding of its own.
            config: the settings that it is made of, if any.
            shape: of one example; that of ``config`` if there is one.
            levels: of discrete examples, in [0, 1]; None for real-valued ones.
            embedding: makes the context (N, C) that the network sees of y; None if the model is not conditional.
            context_dropout: share of the contexts that are replaced by zeros in training.
            lr: Adam's learning rate, as the Trainer takes it.
            ema: decay of the moving average of the weights, of an embedding's too.

        Raises SettingsError without a shape.
        """
        super().__init__(config, shape=shape, levels=levels, embedding=embedding)
        if self.shape is None:
            raise SettingsError("shape is missing: give that of one example, such as shape=(1, 28, 28)")
        self.denoiser, self.context_dropout, self.lr = denoiser, context_dropout, lr
        self.averaged = EMA(denoiser, ema)
        trained = self.embedding is not None and next(self.embedding.parameters(), None) is not None
        self.averaged_embedding = EMA(self.embedding, ema) if self.embedding is not None and trained else None
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        columns = getattr(config, "columns", None)
        self.columns = None if columns is None else Columns(columns)
        inner = self.shape if self.columns is None else (self.columns.width,)
        self.register_buffer("mean", torch.zeros(inner))
        self.register_buffer("variance", torch.zeros(inner))

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        """The model of these settings, with a network of ours."""
        return cls(config.build(), **config.parts())  # type: ignore[arg-type]

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        settings = dict(super().current(settings))
        if "layers" in settings:
            settings["hidden"] = [settings.get("hidden", 128)] * settings.pop("layers")  # as JSON has it
        renamed = {"label_dropout": "context_dropout", **cls.renamed}
        return {renamed.get(name, name): value for name, value in settings.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state, of a former version too: one without the mean and variance of training examples is loaded as
        one of which they are not known."""
        statistics = ("seen", "mean", "variance")
        if strict and not any(name in state_dict for name in statistics):
            state_dict = {**state_dict, **{name: torch.zeros_like(getattr(self, name)) for name in statistics}}
        return super().load_state_dict(state_dict, strict, assign)

    def draw_sigmas(self, n: int) -> Tensor:
        """Noise levels (n,) of a training batch."""
        raise NotImplementedError(f"{type(self).__name__} has no noise levels to train at")

    def sigma_schedule(self, steps: int) -> list[float]:
        """The noise levels of a sampler: ``steps`` of them, falling from the largest, and 0."""
        raise NotImplementedError(f"{type(self).__name__} has no noise levels to sample at")

    def players(self) -> list[Player]:
        embedding = [] if self.embedding is None else self.embedding.parameters()
        return [Player("model", [*self.denoiser.parameters(), *embedding], adam(self.lr))]

    def after_step(self, player: str) -> None:
        self.averaged.update(self.denoiser)
        if self.averaged_embedding is not None and self.embedding is not None:
            self.averaged_embedding.update(self.embedding)
        super().after_step(player)

    def _average(self) -> Denoiser:
        """The denoiser of all but training, up to date: of the present weights as long as no update is known."""
        self.settle()
        exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has the latter
        if not transformed() and not exporting():
            self.averaged.follow(self.denoiser)
            if self.averaged_embedding is not None and self.embedding is not None:
                self.averaged_embedding.follow(self.embedding)
        return cast(Denoiser, self.averaged.module)

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over examples and cells of (F - target)^2 at noise levels drawn anew; a number without unit.

        In evaluation mode F has the averaged weights.
        """
        denoiser = self._present()
        x0, context = self._trained_on(batch.x), self._training_context(batch)
        return denoiser.loss(x0, self.draw_sigmas(len(x0)), context), {}

    def _present(self) -> Denoiser:
        """The denoiser of the loss."""
        if not self.training:
            return self._average()
        self.settle()
        return self.denoiser

    def _training_context(self, batch: Batch) -> Tensor | None:
        """The context of a batch, of which in training some rows are all 0: none."""
        y = self.y_of(batch)
        if not self.training:
            return self.context_of(y, len(batch.x))
        context = self.context_of(y, len(batch.x), self.embedding)
        return None if context is None else drop_rows(context, self.context_dropout)

    def context_of(self, y: Tensor | None, n: int, embedding: nn.Module | None = None) -> Tensor | None:
        """`GenerativeModel.context_of`, by default by the averaged weights of an own embedding."""
        if embedding is None and self.averaged_embedding is not None:
            self._average()
        return super().context_of(y, n, embedding or self.averaged_embedding)

    def denoise(
        self, x: Tensor, sigma: float | Tensor, context: Tensor | None = None, *, guidance: float = 1.0
    ) -> Tensor:
        """D(x, sigma) = E[x0 | x0 + sigma eps = x], (N, *shape), in the model's space, by the averaged weights.

        ``sigma`` is one number or a tensor (N,); ``context`` is what `context_of` makes of y, (N, C), with rows of
        zeros for none. ``guidance`` w leads away from what the model says without a context: D_0 + w (D_y - D_0), arXiv
        2207.12598.
        """
        denoised: Tensor = self._average()(x, sigma, context, guidance=guidance)
        return denoised

    def score(self, x: Tensor, sigma: float | Tensor, y: Tensor | None = None) -> Tensor:
        """The gradient of log p(x) of x = x0 + sigma eps, (N, *shape), in the model's space."""
        return self._average().score(x, sigma, self.context_of(y, len(x)))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        y: Given = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch_size: int | None = None,
        callback: samplers.Callback | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """n draws, (n, *shape), by a sampler in so many steps; left out, the model's own in its own number of steps.

        ``sampler`` is one of ancestral, ddim, heun, heun-stochastic, langevin, dpm-solver++, and ``options`` are those
        of its function in `genfuse.diffusion.samplers`, such as eta of ddim; ``callback(step, x, sigma, denoised)`` is
        called in each step, in the model's space. ``y`` is what is given: labels (n,), a context (n, C), images
        (n, C, h, w), or one of them for all; left out, labels are drawn uniformly. Images may be of another size than
        in training, and are then seen in tiles (`genfuse.nn.in_tiles`). ``guidance`` above 1 makes samples more typical
        of what is given (`denoise`).

        One number is drawn from the generator. All noise of example i follows from it and i, so that with the same
        seed the first examples of a larger n are those of a smaller one, and ``batch_size``, the examples that the
        network sees at a time, changes nothing but rounding.
        """
        name, usual = self.sampler
        run = _sampler(sampler or name, options)
        sigmas = self._sigmas(usual if steps is None else steps)
        if batch_size is not None and batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1, got {batch_size}")
        if guidance != 1 and not self.conditional:
            raise SettingsError("guidance leads towards a label, which a model that is not conditional does not take")
        denoiser, weight = self._average(), next(self.parameters())
        keys = samplers.noise_keys(weight, generator)
        labels = next(keys)
        if y is None and isinstance(self.embedding, OneHot):
            drawn = self.drawn_labels.to(labels.device)
            y = drawn[(philox.uniform(labels, (n,)) * len(drawn)).long()]
        context = self.context_of(self.for_all(y, n), n)
        shape = tuple(self.mean.shape)
        if self.config and getattr(self.config, "given", None) and context is not None:
            k = shape[1] // self.config.given[1]
            shape = (shape[0], *(k * side for side in context.shape[2:]))
        rows = batch_size or max(1, 2**20 // math.prod(shape))  # in bounded memory

        def denoised(x: Tensor, sigma: float, context: Tensor | None) -> Tensor:
            if shape == self.mean.shape or context is None:
                return denoiser(x, sigma, context, guidance=guidance)
            return in_tiles(lambda y, x: denoiser(x, sigma, y, guidance=guidance), context, x)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            x0 = torch.cat([denoised(part, sigma, c) for part, c in split(rows, x, context)])
            return x0 if self.levels is None else x0.clamp(-1, 1)

        mean, std = self._prior(sigmas[0])
        if shape != self.mean.shape:
            mean, std = (each.mean((1, 2), keepdim=True) for each in (mean, std))
        x = mean + std * samplers.noisy(weight.new_zeros((n, *shape)), 1.0, next(keys))[1]

        def noise(x: Tensor, sigma: float) -> Tensor:
            return samplers.noisy(x, sigma, next(keys))[0]

        return self._outward(run(denoise, x, sigmas, noise=noise, callback=callback, **options))

    def _sigmas(self, steps: int) -> list[float]:
        if steps < 1:
            raise SettingsError(f"steps must be at least 1, got {steps}")
        return self.sigma_schedule(steps)

    @torch.no_grad()
    def trajectory(self, z: Tensor, y: Tensor | None = None, steps: int = 20) -> list[Tensor]:
        """What the probability flow makes of z ~ N(0, I), (N, D), in so many steps of DDIM: z first, data last.

        Between them x is divided by sqrt(1 + sigma^2), so that it keeps its size.
        """
        sigmas = self._sigmas(steps)
        mean, std = self._prior(sigmas[0])
        x = mean + std * z.view(-1, *self.mean.shape)
        path = samplers.ddim.steps(self._given(y, len(z)), x, sigmas)
        return [z, *(self._outward(x / math.hypot(1, sigma)) for x, sigma in zip(path, sigmas[1:], strict=True))]

    def trajectory_end(self, z: Tensor, y: Tensor | None = None, steps: int = 20) -> Tensor:
        """The last of `trajectory`, examples (N, *shape) of latents z (N, D), by a loop of which a program of
        `torch.export` holds one step."""
        from torch._higher_order_ops import scan

        levels, denoiser = self._sigmas(steps), self._given(y, len(z))
        mean, std = self._prior(levels[0])
        sigmas = torch.tensor(levels, dtype=torch.float64)

        def step(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            sigma, ratio = at.to(x.dtype)
            moved = torch.lerp(denoiser(x, sigma.expand(len(x))), x, ratio)
            return moved.clone(memory_format=torch.contiguous_format), x.new_zeros(())  # as scan has every step alike

        x = mean + std * z.view(-1, *self.mean.shape)
        x, _ = scan(step, x, torch.stack([sigmas[:-1], sigmas[1:] / sigmas[:-1]], 1))
        return self._outward(x)

    # Likelihoods.

    @property
    def likelihoods(self) -> tuple[str, ...]:
        if self.columns is not None:
            return ()
        return ("log_prob",) if self.levels is None else ("elbo", "bits_per_dim")

    def log_prob(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """log p(x) of real-valued x, (N,) nats, by the probability-flow ODE: `log_prob_and_error` without the error."""
        return self.log_prob_and_error(x, y, **options)[0]

    @torch.inference_mode(False)  # what is given, too, is seen by networks that are differentiated
    def log_prob_and_error(self, x: Tensor, y: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """log p(x) of real-valued x and its standard error, (N,) nats each, by the probability-flow ODE, arXiv
        2011.13456, section 4.3, with the options of `genfuse.diffusion.likelihood.log_prob`. It is the density of what
        the deterministic samplers draw, at the smallest noise level. At the largest, x is taken for a Gaussian with the
        mean and the variances of the training examples, whose error is of the order of (spread of the data /
        sigma_max)^3; with labels, whose means differ, of its square. Raises SettingsError for discrete data, which has
        `elbo`.
        """
        self._check_density()
        if self.levels is not None:
            raise SettingsError("log_prob is for real-valued data; discrete data has the bounds elbo and bits_per_dim")
        return likelihood.log_prob(self._given(y, len(x)), self._inward(x), **self._noise_levels, **options)

    def elbo(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """A lower bound of log P(x) of discrete x, (N,) nats: `elbo_and_error` without the error."""
        return self.elbo_and_error(x, y, **options)[0]

    @torch.inference_mode(False)
    def elbo_and_error(self, x: Tensor, y: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """A lower bound of log P(x) of discrete x and the standard error of its estimate, (N,) nats each.

        That of `genfuse.diffusion.likelihood.elbo`, by the probability flow and a decoder at a small noise level; the
        rest is as for `log_prob_and_error`. Raises SettingsError for real-valued data.
        """
        self._check_density()
        if self.levels is None:
            raise SettingsError("elbo is for discrete data; the model is of real-valued data: use log_prob")
        return likelihood.elbo(self._given(y, len(x)), self._inward(x), self.levels, **self._noise_levels, **options)

    def denoising_error(self, x: Tensor, y: Tensor | None = None, *, levels: int = 10) -> Tensor:
        """The mean over cells, and over so many noise levels of `sigma_schedule`, of |D(x + sigma eps, sigma) - x|^2 /
        c_out(sigma)^2, (N,), without unit: the loss of x, with noise from torch's global generator."""
        x0, context, error = self._inward(x), self.context_of(y, len(x)), x.new_zeros(len(x))
        for sigma in self._sigmas(levels)[:-1]:
            off = self.denoise(x0 + sigma * torch.randn_like(x0), sigma, context) - x0
            error = error + (off / self.denoiser.c_out(sigma)).square().flatten(1).mean(1) / levels
        return error

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """-elbo / (D ln 2), (N,): bits that each of the D cells costs, with the options of `elbo_and_error`."""
        return -self.elbo(x, y, **options) / (math.prod(x.shape[1:]) * math.log(2))

    def _given(self, y: Tensor | None, n: int) -> Callable[[Tensor, Any], Tensor]:
        """`denoise` for what is given, as samplers and likelihoods take it."""
        denoiser, context = self._average(), self.context_of(y, n)
        return lambda x, sigma: denoiser(x, sigma, context)

    @property
    def _noise_levels(self) -> dict[str, Any]:
        """The ends of the probability flow, as likelihoods take them."""
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "prior": self._prior(self.sigma_max)}

    def _prior(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (*shape) each, of the Gaussian that x = x0 + sigma eps is taken for at the
        largest noise level: with those of the examples that were trained on, of none yet 0 and ``sigma_data``."""
        variance = torch.where(self.seen > 0, self.variance, self.denoiser.sigma_data**2)
        return self.mean, (variance + sigma**2).sqrt()

    def _check_density(self) -> None:
        if self.columns is not None:
            raise SettingsError(
                "a diffusion model of a table with categories, integers or cells missing has no likelihood: use a flow "
                "or a VAE for one"
            )

    # Between the data and the model.

    def _trained_on(self, x: Tensor) -> Tensor:
        """`_inward` of a batch for the loss. In training its mean and variance are put to those before it, without the
        examples that are not finite."""
        x = self._inward(x)
        if self.training and len(x) and not transformed():
            with torch.no_grad():
                finite = x.flatten(1).isfinite().all(1).view(-1, *[1] * (x.dim() - 1))  # (N, 1, ...)
                count = finite.sum()
                mean = torch.where(finite, x, 0).sum(0) / count.clamp(min=1)
                variance = torch.where(finite, x - mean, 0).square().sum(0) / count.clamp(min=1)
                self.seen += count
                share = count / self.seen.clamp(min=1)
                off = mean - self.mean
                self.variance += share * (variance - self.variance + (1 - share) * off.square())
                self.mean += share * off
        return x

    def _inward(self, x: Tensor) -> Tensor:
        if self.columns is not None:
            return self.columns.encode(self.checked(x), noise=True)
        return self.checked(x) if self.levels is None else 2 * self.checked(x) - 1

    def _outward(self, x: Tensor) -> Tensor:
        """What `_inward` undoes; discrete x are put on their levels."""
        if self.columns is not None:
            return self.columns.decode(x)
        if self.levels is None:
            return x
        return ((x.clamp(-1, 1) + 1) / 2 * (self.levels - 1)).round() / (self.levels - 1)


def _sampler(name: str, options: dict[str, Any]) -> samplers.Sampler:
    """The sampler of this name. Raises SettingsError if there is none, or it has not these options."""
    if name not in samplers.SAMPLERS:
        raise SettingsError(f"sampler must be one of {', '.join(samplers.SAMPLERS)}, got {name!r}")
    sampler = samplers.SAMPLERS[name]
    shared = ("callback", "generator", "noise")
    known = [
        each.name
        for each in inspect.signature(sampler).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.name not in shared
    ]
    for option in options:
        if option not in known:
            raise SettingsError(f"the sampler {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    return sampler
