"""What all diffusion models share: one denoiser, and with it training, sampling and likelihoods.

Every model here learns D(x, s) = E[x0 | x0 + s eps = x] for noise levels s. Its network F sees x_t = alpha x0 +
sigma eps, where sigma = s alpha, and predicts a target, from which D follows. A model is no more than a choice of
alpha, of the target, and of the noise levels in training and in sampling: arXiv 2206.00364, section 5.
"""

import inspect
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.models._base import Batch, GenerativeModel, ModelConfig, Player, adam, transformed
from genfuse.models._samplers import SAMPLERS
from genfuse.nn import EMA, DenoisingMLP, UNet
from genfuse.nn.likelihoods import at_least_float32
from genfuse.ops import _philox, diffuse

if TYPE_CHECKING:
    from genfuse.data import Dataset

Network = Literal["auto", "mlp", "unet"]
Target = Literal["noise", "x0", "v", "velocity"]

EXACT = 8  # dimensions up to which the trace of a Jacobian is computed and not estimated


@dataclass(frozen=True)
class DiffusionConfig(ModelConfig):
    """Settings of every diffusion model. Raises SettingsError for values outside their range."""

    network: Network = "auto"  # unet: images; mlp: any shape, as vectors; auto: unet for images
    hidden: int = 128  # mlp: width
    layers: int = 3  # mlp: residual blocks
    channels: tuple[int, ...] = (32, 64, 64)  # unet: widths of the scales, each of half the size of the one before
    blocks: int = 1  # unet: residual blocks of each scale on the way down; one more on the way up
    attention: tuple[int, ...] = ()  # unet: scales with self-attention; 0 is the whole image
    dropout: float = 0.0  # share of the hidden units that are left out in training
    label_dropout: float = 0.1  # conditional: share of the labels left out in training, which guidance needs
    lr: float = 1e-3  # Adam's learning rate
    ema: float = 0.999  # decay of the moving average of the weights that everything but training uses

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network)
        self.check_positive("hidden", "layers", "channels", "blocks", "lr")
        if not self.channels:
            raise SettingsError("channels must hold at least one width, got ()")
        if self.network == "unet" and len(self.shape) != 3:
            raise SettingsError(f"network 'unet' needs images, shape (C, H, W), got {self.shape}: use network 'mlp'")
        if not all(0 <= scale < len(self.channels) for scale in self.attention):
            raise SettingsError(
                f"attention must name scales, 0..{len(self.channels) - 1} for {len(self.channels)} channels, "
                f"got {self.attention}"
            )
        for name in ("dropout", "label_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def build(self) -> nn.Module:
        """The network F: (x_t, logarithm of the noise level (N,), context or None) -> the target."""
        if self.network == "unet" or (self.network == "auto" and len(self.shape) == 3):
            return UNet(self.shape[0], self.channels, self.blocks, self.attention, self.context, self.dropout)
        return DenoisingMLP(self.dimensions, self.hidden, self.layers, self.context, self.dropout)


class DiffusionModel(GenerativeModel):
    """A model of examples seen through Gaussian noise. A subclass gives `draw_levels`, `noise_levels`, and `limits`.

    Examples x (N, *shape) and labels y (N,) are the data's. What `denoise` and `score` see is in the model's space:
    real-valued examples as they are, discrete ones as 2 x - 1. Densities are in nats.
    """

    loss_unit: ClassVar[str] = "per cell, without unit"
    config: DiffusionConfig
    seen: Tensor  # how many examples the loss was trained on, and of each of their cells the mean and the variance
    mean: Tensor
    variance: Tensor
    target: Target = "noise"  # of the network
    unit: float = 1.0  # the standard deviation of examples that the network's input and target are scaled by
    limits: tuple[float, float]  # the smallest and the largest noise level of the probability flow
    sampler: tuple[str, int] = ("heun", 20)  # and steps, by default

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.network = config.build()
        self.average = EMA(self.network, config.ema)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(config.shape))
        self.register_buffer("variance", torch.zeros(config.shape))

    def alpha(self, level: Any) -> Any:
        """alpha of x_t = alpha (x0 + level eps) for a number or tensor of noise levels: here alpha^2 + sigma^2 = 1."""
        return (1 + level * level) ** -0.5

    def draw_levels(self, n: int) -> Tensor:
        """Noise levels (n,) of a training batch."""
        raise NotImplementedError(f"{type(self).__name__} has no noise levels to train at")

    def noise_levels(self, steps: int) -> list[float]:
        """The noise levels of a sampler: ``steps`` of them, falling from the largest, and 0."""
        raise NotImplementedError(f"{type(self).__name__} has no noise levels to sample at")

    def check_data(self, data: "Dataset") -> None:
        super().check_data(data)
        self.check_levels(data)

    def players(self) -> list[Player]:
        return [Player("model", self.network.parameters(), adam(self.config.lr))]

    def after_step(self, player: str) -> None:
        self.average.update(self.network)

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over examples and cells of (F - target)^2 at noise levels drawn anew; a number without unit.

        In evaluation mode F has the averaged weights.
        """
        x0, context = self._trained_on(batch.x) / self.unit, self._training_context(batch)
        level = self.draw_levels(len(x0)) / self.unit
        alpha = self.alpha(level)
        x_t, target = diffuse(x0, alpha, level * alpha, target=self.target)
        predicted = at_least_float32(self._present(x_t, level.log(), context))
        return (predicted - target).square().mean(), {}

    @property
    def _present(self) -> nn.Module:
        return self.network if self.training else self.average

    def _training_context(self, batch: Batch) -> Tensor | None:
        """Labels as one-hot vectors, of which some are all 0: none."""
        context = self.context_of(batch.y if self.conditional else None, len(batch.x))
        if context is None or not self.training:
            return context
        return context * (torch.rand_like(context[:, :1]) >= self.config.label_dropout)

    def denoise(
        self, x: Tensor, level: float | Tensor, context: Tensor | None = None, *, guidance: float = 1.0
    ) -> Tensor:
        """D(x, level) = E[x0 | x0 + level eps = x], (N, *shape), in the model's space.

        ``level`` is one number or a tensor (N,); ``context`` holds labels as one-hot vectors, rows of zeros for none.
        ``guidance`` w leads away from what the model says without labels: D_0 + w (D_y - D_0), arXiv 2207.12598.
        """
        if isinstance(level, Tensor):
            log_level, level = (level / self.unit).log(), level.view(-1, *[1] * (x.dim() - 1))
        else:
            log_level = x.new_full((len(x),), math.log(level / self.unit))
        alpha = self.alpha(level / self.unit)
        skip, out = {
            "noise": (1.0, -level),
            "x0": (0.0, self.unit),
            "v": (alpha * alpha, -alpha * level),
            "velocity": (alpha, -alpha * level),
        }[self.target]
        x_t = x * (alpha / self.unit)
        predicted = self.average(x_t, log_level, context)
        if context is not None and guidance != 1:
            predicted = torch.lerp(self.average(x_t, log_level, torch.zeros_like(context)), predicted, guidance)
        return skip * x + out * predicted.to(x.dtype)

    def score(self, x: Tensor, level: float | Tensor, y: Tensor | None = None) -> Tensor:
        """The gradient of log p(x) of x = x0 + level eps, (N, *shape), in the model's space."""
        denoised = self.denoise(x, level, self.context_of(y, len(x)))
        return (denoised - x) / (level.view(-1, *[1] * (x.dim() - 1)) if isinstance(level, Tensor) else level) ** 2

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        y: Tensor | int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """n draws, (n, *shape), by a sampler in so many steps; left out, the model's own in its own number of steps.

        ``sampler`` is one of ancestral, ddim, heun, heun-stochastic, langevin, dpm-solver++, and ``options`` are those
        of its function in genfuse.models._samplers, such as eta of ddim. ``y`` are the labels of a conditional model,
        (n,), or one for all; left out, they are drawn uniformly. ``guidance`` above 1 makes samples more typical of
        their label (`denoise`).

        One number is drawn from the generator. All noise of example i follows from it and i, so that with the same
        seed the first examples of a larger n are those of a smaller one, and ``batch_size``, the examples that the
        network sees at a time, changes nothing but rounding.
        """
        name, usual = self.sampler
        run = self._sampler(sampler or name, options)
        levels = self._levels(usual if steps is None else steps)
        if batch_size is not None and batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1, got {batch_size}")
        if guidance != 1 and not self.conditional:
            raise SettingsError("guidance leads towards a label, which a model that is not conditional does not take")
        keys = self._keys(generator)
        if isinstance(y, int):
            y = torch.full((n,), y)
        labels = next(keys)
        if y is None and self.conditional:
            some = self.drawn_labels.to(labels.device)
            y = some[(_philox.uniform(labels, (n,)) * len(some)).long()]
        context = self.context_of(y, n)
        rows = batch_size or self._rows

        def denoise(x: Tensor, level: float) -> Tensor:
            contexts = [None] * len(x.split(rows)) if context is None else context.split(rows)
            pairs = zip(x.split(rows), contexts, strict=True)
            x0 = torch.cat([self.denoise(part, level, c, guidance=guidance) for part, c in pairs])
            return x0 if self.config.levels is None else x0.clamp(-1, 1)

        like = next(self.parameters()).new_zeros((n, *self.config.shape))
        mean, spread = self._end(levels[0])
        x = mean + spread * noisy(like, 1.0, next(keys))[1]
        path = run(denoise, x, levels, lambda x, sigma: noisy(x, sigma, next(keys))[0], **options)
        return self._outward(deque(path, maxlen=1)[0])

    @staticmethod
    def _sampler(name: str, options: dict[str, Any]) -> Any:
        if name not in SAMPLERS:
            raise SettingsError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
        known = [p.name for p in inspect.signature(SAMPLERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for option in options:
            if option not in known:
                raise SettingsError(
                    f"the sampler {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}"
                )
        return SAMPLERS[name]

    def _levels(self, steps: int) -> list[float]:
        if steps < 1:
            raise SettingsError(f"steps must be at least 1, got {steps}")
        return self.noise_levels(steps)

    @torch.no_grad()
    def trajectory(self, z: Tensor, y: Tensor | None = None, steps: int = 20) -> list[Tensor]:
        """What the probability flow makes of z ~ N(0, I), (N, D), in so many steps of DDIM: z first, data last.

        Between them x is divided by sqrt(1 + s^2), so that it keeps its size.
        """
        levels, context = self._levels(steps), self.context_of(y, len(z))
        mean, spread = self._end(levels[0])
        x = mean + spread * z.view(-1, *self.config.shape)
        path = SAMPLERS["ddim"](lambda x, s: self.denoise(x, s, context), x, levels, lambda x, sigma: x)
        return [z, *(self._outward(x / math.hypot(1, s)) for x, s in zip(path, levels[1:], strict=True))]

    # Likelihoods.

    @property
    def likelihoods(self) -> tuple[str, ...]:
        return ("log_prob",) if self.config.levels is None else ("elbo", "bits_per_dim")

    def log_prob(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """log p(x) of real-valued x, (N,) nats, by the probability-flow ODE: `log_prob_and_error` without the error."""
        return self.log_prob_and_error(x, y, **options)[0]

    @torch.no_grad()
    def log_prob_and_error(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        exact: bool | None = None,
        draws: int = 1,
        tolerance: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log p(x) of real-valued x and its standard error, (N,) nats each, by the probability-flow ODE, arXiv
        2011.13456, section 4.3: the density of what the deterministic samplers draw, at the smallest noise level. At
        the largest, x is taken for a Gaussian with the mean and the variances of the training examples, whose error is
        of the order of (spread of the data / noise level)^3; with labels, whose means differ, of its square.

        ``exact`` computes the trace of each Jacobian, by default up to 8 dimensions, and the error is 0 but for that of
        the solver, dopri5 with ``tolerance``. Else the result is the mean over ``draws`` of Hutchinson's estimate, free
        of bias, with this mean's standard error, NaN for one draw. The solver chooses its steps for all examples
        together: a part of them alone gives the same to within its tolerance. Raises SettingsError for discrete data,
        which has `elbo`.
        """
        if self.config.levels is not None:
            raise SettingsError("log_prob is for real-valued data; discrete data has the bounds elbo and bits_per_dim")
        if exact is None:
            exact = self.config.dimensions <= EXACT
        keys, x, context = self._keys(generator), self._inward(x), self.context_of(y, len(x))
        values = [
            self._flow_log_prob(x, self.limits[0], context, None if exact else next(keys), tolerance)
            for _ in range(1 if exact else _at_least_one(draws))
        ]
        value, error = _mean_and_error(values)
        return value, torch.zeros_like(value) if exact else error

    def elbo(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """A lower bound of log P(x) of discrete x, (N,) nats: `elbo_and_error` without the error."""
        return self.elbo_and_error(x, y, **options)[0]

    @torch.no_grad()
    def elbo_and_error(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        exact: bool = False,
        draws: int = 1,
        tolerance: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A lower bound of log P(x) of discrete x and the standard error of its estimate, (N,) nats each.

        The density at a small noise level s, by the probability-flow ODE, and the decoder of `decoder_log_prob` from
        there bound it by E_q [log p(x_s) + log P(x | x_s) - log q(x_s | x)] with q = N(x, s^2). The result is the
        mean over ``draws`` of x_s; the rest is as for `log_prob_and_error`. Raises SettingsError for real-valued data.
        """
        if self.config.levels is None:
            raise SettingsError("elbo is for discrete data; the model is of real-valued data: use log_prob")
        keys, x, context = self._keys(generator), self._inward(x), self.context_of(y, len(x))
        # Below a third of half a bin nothing is gained, and a network would have to know each level as a spike.
        s = max(self.limits[0], 1 / (3 * (self.config.levels - 1)))
        values = []
        for _ in range(_at_least_one(draws)):
            x_s, eps = noisy(x, s, next(keys))
            log_q = _normal_log_prob(eps, 1.0) - self.config.dimensions * math.log(s)
            log_p = self._flow_log_prob(x_s, s, context, None if exact else next(keys), tolerance)
            values.append(log_p + self.decoder_log_prob(x, x_s, s, context) - log_q)
        return _mean_and_error(values)

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        """-elbo / (D ln 2), (N,): bits that each of the D cells costs, with the options of `elbo_and_error`."""
        return -self.elbo(x, y, **options) / (self.config.dimensions * math.log(2))

    def decoder_log_prob(self, x: Tensor, x_s: Tensor, level: float, context: Tensor | None) -> Tensor:
        """log p(x | x_s), (N,) nats, of x in the model's space by N(D(x_s), level^2): for discrete x integrated over
        the bins of the levels, the outermost open-ended (arXiv 2006.11239, equation 13)."""
        off = (x - self.denoise(x_s, level, context)).flatten(1) / level
        if self.config.levels is None:
            return _normal_log_prob(off, 1.0) - self.config.dimensions * math.log(level)
        half = 1 / (self.config.levels - 1)
        x, half_bin = x.flatten(1), half / level
        lower = torch.where(x < half - 1, -math.inf, off - half_bin)
        upper = torch.where(x > 1 - half, math.inf, off + half_bin)
        # In the upper half the mass is taken from above, where the distribution function does not round to 1.
        lower, upper = torch.where(off > 0, -upper, lower), torch.where(off > 0, -lower, upper)
        above, below = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
        return (above + torch.log(-torch.expm1(below - above))).sum(1)

    def _flow_log_prob(
        self, x: Tensor, first: float, context: Tensor | None, key: Tensor | None, tolerance: float
    ) -> Tensor:
        """log p(x), (N,), at the noise level ``first``, with the exact trace or Hutchinson's estimate under a key.

        Integrated is y = x / sqrt(1 + s^2) over the logarithm of s, along which it is of one size and smooth.
        """
        from torchdiffeq import odeint

        if not len(x):  # of which the solver has no error to choose its steps by
            return x.new_zeros(0)
        last = self.limits[1]
        probe = None if key is None else noisy(x, 1.0, key)[1].sign()
        d = self.config.dimensions

        def change(log_s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            s = float(log_s.exp())
            scale = math.hypot(1, s)
            # Roundings to 16 bits would make the solver's steps ever smaller.
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                y = state[0].detach().requires_grad_()
                slope = y / scale**2 - self.denoise(y * scale, s, context) / scale
                divergence = _divergence(slope, y, probe)
            return slope.detach(), divergence

        ends = torch.tensor([first, last], dtype=torch.float64, device=x.device).log().to(x.dtype)
        start = x / math.hypot(1, first), x.new_zeros(len(x))
        y, divergence = (
            states[-1] for states in odeint(change, start, ends, rtol=tolerance, atol=tolerance, method="dopri5")
        )
        mean, spread = self._end(last)
        end = _normal_log_prob((y * math.hypot(1, last) - mean) / spread, 1.0) - spread.log().sum()
        return end + divergence + d * math.log(math.hypot(1, last) / math.hypot(1, first))

    def _end(self, level: float) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (*shape) each, of the Gaussian that x = x0 + level eps is taken for at the
        largest noise level: those of the examples that were trained on, of none yet 0 and ``unit``."""
        variance = torch.where(self.seen > 0, self.variance, self.unit**2)
        return self.mean, (variance + level**2).sqrt()

    # Between the data and the model.

    def _trained_on(self, x: Tensor) -> Tensor:
        """`_inward` of a batch for the loss. In training its mean and variance are put to those before it."""
        x = self._inward(x)
        if self.training and len(x) and not transformed():
            with torch.no_grad():
                self.seen += len(x)
                share = len(x) / self.seen
                off = x.mean(0) - self.mean
                self.variance += share * (x.var(0, correction=0) - self.variance + (1 - share) * off.square())
                self.mean += share * off
        return x

    def _inward(self, x: Tensor) -> Tensor:
        return self.checked(x) if self.config.levels is None else 2 * self.checked(x) - 1

    def _outward(self, x: Tensor) -> Tensor:
        """What `_inward` undoes; discrete x are put on their levels."""
        if self.config.levels is None:
            return x
        return ((x.clamp(-1, 1) + 1) / 2 * (self.config.levels - 1)).round() / (self.config.levels - 1)

    @property
    def _rows(self) -> int:
        """How many examples the network sees at a time where memory is to be bounded."""
        return max(1, 2**20 // self.config.dimensions)

    def _keys(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Keys of Philox, () int64 on the model's device, without end, from one number that is drawn now."""
        weight = next(self.parameters())
        like = weight if generator is None else torch.empty(0, device=generator.device)
        seed = _philox.seed(like, generator).to(weight.device)

        def keys() -> Iterator[Tensor]:
            start = 0
            while True:
                words = _philox.philox(torch.arange(start, start := start + 1024, device=seed.device), seed)
                yield from ((words[0] << 32) | words[1]).unbind()

        return keys()


def noisy(x: Tensor, sigma: float | Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """x + sigma eps and eps, both (N, *shape), for sigma a number or (N,). Each element of eps, a standard normal,
    follows from the key and its place: it is the same in a larger batch."""
    return diffuse(x, 1, sigma, seed=key)


def _divergence(f: Tensor, y: Tensor, probe: Tensor | None) -> Tensor:
    """The trace of df/dy, (N,), exactly, or with a probe v of mean 0 and covariance I as v^T (df/dy) v."""
    if probe is not None:
        return (torch.autograd.grad((f * probe).sum(), y)[0] * probe).flatten(1).sum(1)
    cells = f.flatten(1).unbind(1)
    rows = [torch.autograd.grad(cell.sum(), y, retain_graph=True)[0].flatten(1)[:, i] for i, cell in enumerate(cells)]
    return torch.stack(rows).sum(0)


def _normal_log_prob(x: Tensor, spread: float) -> Tensor:
    """log N(x; 0, spread^2 I), (N,) nats."""
    x = x.flatten(1)
    return -0.5 * (x / spread).square().sum(1) - x.shape[1] * (math.log(spread) + 0.5 * math.log(2 * math.pi))


def _mean_and_error(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of independent estimates (N,), and its standard error: NaN where there is only one."""
    stacked = torch.stack(values)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(values)) if len(values) > 1 else stacked[0] * math.nan


def _at_least_one(draws: int) -> int:
    if draws < 1:
        raise SettingsError(f"draws must be at least 1, got {draws}")
    return draws
