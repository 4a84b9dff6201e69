"""What adversarial models share: a generator and a critic that train against each other, and how that is watched."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from genfuse.errors import SettingsError
from genfuse.models._base import Batch, GenerativeModel, ModelConfig, Player
from genfuse.nn import (
    EMA,
    WithContext,
    dcgan_critic,
    dcgan_generator,
    mlp_critic,
    mlp_generator,
    resnet_critic,
    resnet_generator,
    slerp,
)
from genfuse.nn.likelihoods import at_least_float32
from genfuse.ops import gradient_penalty

Network = Literal["mlp", "dcgan", "resnet"]
Penalty = Literal["none", "gradient", "r1"]

# When the watch speaks.
STALLED = 1e-6  # norm of the generator's gradient below which Adam's eps swallows it
ALIKE = 0.05  # diversity below which samples repeat
STARTED = 1000  # updates of the generator before which samples may be alike: the first weights draw almost one image


@dataclass(frozen=True)
class AdversarialConfig(ModelConfig):
    """Settings of every adversarial model. Raises SettingsError for values outside their range."""

    latent_dim: int = 100  # dimensions of z
    network: Network = "mlp"  # dcgan and resnet take images of at least 8 x 8
    hidden: tuple[int, ...] = (256, 256)  # mlp: widths of the generator's layers; the critic has them in reverse
    channels: int = 64  # dcgan, resnet: width at the finest resolution; it doubles with each coarser one, up to 8 times
    n_critic: int = 1  # updates of the critic for one of the generator
    ema: float = 0.999  # samples are of the generator's weights averaged over its updates with this decay; 0: the last
    spectral_norm: bool = False  # divide the critic's weights by their largest singular value
    layer_norm: bool = False  # in the critic; it has no batch norm
    bound: float = 1000.0  # a critic's loss beyond it, above or below 0, is warned of

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(network=Network)
        self.check_positive("latent_dim", "hidden", "channels", "bound")
        if self.n_critic < 1:
            raise SettingsError(f"n_critic must be at least 1 update of the critic per round, got {self.n_critic}")
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema must be at least 0 and below 1, got {self.ema}")
        if self.network != "mlp" and (len(self.shape) != 3 or min(self.shape[1:]) < 8):
            raise SettingsError(
                f"network {self.network!r} makes images (C, H, W) of at least 8 x 8, and cannot make examples of shape "
                f"{self.shape}: use network 'mlp', or larger images"
            )


@dataclass(frozen=True)
class PenaltyConfig(AdversarialConfig):
    """Settings of those whose critic may pay for steepness."""

    penalty: Penalty = (
        "none"  # on |grad D|: (|.| - 1)^2 between real and generated examples; r1: |.|^2 / 2 at real ones
    )
    penalty_weight: float = 10.0  # lambda; r1: gamma
    one_sided: bool = False  # gradient: only norms above 1 pay

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(penalty=Penalty)
        if not 0 <= self.penalty_weight < math.inf:
            raise SettingsError(f"penalty_weight must be at least 0 and finite, got {self.penalty_weight}")
        if self.one_sided and self.penalty != "gradient":
            raise SettingsError(f"one_sided is of penalty 'gradient', got penalty {self.penalty!r}: leave it out")


class Objective(NamedTuple):
    """What critic and generator minimise, (N,) each, as functions of the critic's output (N,)."""

    real: Callable[[Tensor], Tensor]  # the critic, for real examples
    fake: Callable[[Tensor], Tensor]  # the critic, for generated ones
    generator: Callable[[Tensor], Tensor]


class AdversarialModel(GenerativeModel):
    """A generator x = G(z), z ~ N(0, I), and a critic D that tells its samples from real examples.

    Examples x are (N, *shape), latents z (N, D), labels y (N,), which conditional models take, and they alone. A
    subclass says what the two minimise, an `Objective`, and how they are optimised. Each round trains the critic
    ``n_critic`` times, every time on a batch of its own, and then the generator once.
    """

    config: AdversarialConfig
    critic_name: ClassVar[str] = "critic"
    objective: Objective

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__(config)
        self.generator = _generator(config)
        self.critic = _critic(config)
        self.averaged = EMA(self.generator, config.ema) if config.ema else None

    def train(self, mode: bool = True) -> "AdversarialModel":
        super().train(mode)
        if self.averaged is not None:
            self.averaged.eval()  # its statistics of batch norm are averages too
        return self

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        raise NotImplementedError(f"{type(self).__name__} has no optimizer")

    def players(self) -> list[Player]:
        return [
            Player(self.critic_name, self.critic.parameters(), self.optimizer, self.config.n_critic),
            Player("generator", self.generator.parameters(), self.optimizer),
        ]

    def loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the player's part of the objective. Terms: `critic_terms`; of the generator its `diversity`.

        Raises DataError where x is not (N, *shape), or labels are missing or outside their range.
        """
        x, n = self._centred(self.checked(batch.x)), len(batch.x)
        context = self.context_of(batch.y if self.conditional else None, n)
        z = torch.randn(n, self.config.latent_dim, dtype=x.dtype, device=x.device)
        if player == "generator":
            fake = self._generate(self.generator, z, context)
            loss = self.objective.generator(self._criticise(fake, context)).mean()
            return loss, {"diversity": diversity(fake.detach(), x)} if n > 1 else {}
        with torch.no_grad():
            fake = self._generate(self.generator, z, context).to(x.dtype)
        both = None if context is None else context.repeat(2, 1)
        real_out, fake_out = self._criticise(torch.cat([x, fake]), both).chunk(2)
        loss = self.objective.real(real_out).mean() + self.objective.fake(fake_out).mean()
        terms = self.critic_terms(real_out.detach(), fake_out.detach())
        penalty = self.penalty(x, fake, context)
        return (loss, terms) if penalty is None else (loss + penalty, {**terms, "penalty": penalty.detach()})

    def critic_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """What to log of the critic's outputs (N,) for real and generated examples."""
        return {"real": real.mean(), "fake": fake.mean()}

    def penalty(self, x: Tensor, fake: Tensor, context: Tensor | None) -> Tensor | None:
        """The weighted penalty on the critic's gradient, if there is one."""
        config = self.config
        if not isinstance(config, PenaltyConfig) or config.penalty == "none":
            return None
        if config.penalty == "r1":  # arXiv 1801.04406, equation 9
            return config.penalty_weight / 2 * gradient_penalty(self.critic, x, y=context, target=0.0, at="real")
        return config.penalty_weight * gradient_penalty(self.critic, x, fake, context, one_sided=config.one_sided)

    def after_step(self, player: str) -> None:
        if player == "generator" and self.averaged is not None:
            self.averaged.update(self.generator)

    def latents(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n draws z ~ N(0, I), (n, D). A seeded generator may be on any device: its own decides the draws."""
        where = self.device if generator is None else generator.device
        z = torch.randn(n, self.config.latent_dim, device=where, generator=generator)
        return z.to(next(self.parameters()))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """x = G(z), (N, *shape), for latents (N, D), with the averaged weights where there are such."""
        return self._decode(z, self.context_of(y, len(z)))

    @torch.no_grad()
    def sample(self, n: int, *, y: Tensor | int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """n draws, (n, *shape). ``y`` are the labels of a conditional model, (n,), or one for all; left out, any."""
        return self._decode(self.latents(n, generator=generator), self.draw_context(n, y, generator))

    def interpolate(self, a: Tensor, b: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
        """x on the arcs between latents a and b, (N, D) each, both ends included: (steps, N, *shape).

        An arc, since the samples of a line's middle would be nearer to the origin than almost all that G has seen
        (arXiv 1609.04468). Labels y are (N,). Raises SettingsError for fewer than two steps.
        """
        if steps < 2:
            raise SettingsError(f"an interpolation has at least 2 steps, got {steps}")
        z = slerp(a, b, torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device))
        return torch.stack([self.decode(each, y) for each in z])

    def watch(self, player: str, step: int, terms: dict[str, float]) -> dict[str, str]:
        found = {}
        if player == self.critic_name and abs(terms["loss"]) > self.config.bound:
            found["divergence"] = (
                f"the loss of the {player} is {terms['loss']:.4g}, beyond {self.config.bound:g}: it runs away. Try a "
                "smaller --lr, a penalty or a larger one (--model.penalty-weight), or --model.spectral-norm"
            )
        if player == "generator" and terms.get("gradient_norm", math.inf) < STALLED:
            found["vanishing"] = (
                f"the generator's gradient is {terms['gradient_norm']:.1e}: the {self.critic_name} is so sure that the "
                f"generator learns nothing. Try fewer --model.n-critic, a penalty, or a smaller --lr; of `gan` the "
                "non-saturating loss"
            )
        started = step // (self.config.n_critic + 1) >= STARTED
        if player == "generator" and started and terms.get("diversity", math.inf) < ALIKE:
            found["collapse"] = (
                f"samples repeat: they are {terms['diversity']:.1%} as far from each other as real examples are. Try a "
                "penalty (wgan-gp, or --model.penalty r1), a smaller --lr, or more --model.n-critic"
            )
        return found

    def _centred(self, x: Tensor) -> Tensor:
        """Examples as the critic is shown them: discrete data in [-1, 1]. From data in [0, 1] it learns badly."""
        return x if self.config.levels is None else 2 * x - 1

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        x = self._generate(self.averaged or self.generator, z, context)
        return x if self.config.levels is None else (x + 1) / 2

    def _generate(self, network: nn.Module, z: Tensor, context: Tensor | None) -> Tensor:
        """Examples as `_centred` gives them."""
        x = at_least_float32(network(z if context is None else torch.cat([z, context], 1)))
        return x if self.config.levels is None else x.tanh()

    def _criticise(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The critic's output, (N,), for examples that are `_centred`."""
        return at_least_float32(self.critic(x) if context is None else self.critic(x, context)).squeeze(1)


def diversity(x: Tensor, real: Tensor, most: int = 64) -> Tensor:
    """Mean distance from an example (N, ...) to its nearest neighbour, as a share of the same among real ones.

    Near 1 for good samples, and 0 where all repeat each other. Of each at most the first ``most`` are compared.
    """
    near = []
    for examples in (x, real):
        points = examples[:most].flatten(1)
        points = points - points.mean(0)  # since cdist rounds by the size of the points
        distances = torch.cdist(points, points)
        near.append(distances.fill_diagonal_(math.inf).amin(1).mean())
    tiny = torch.finfo(near[0].dtype).tiny
    return (near[0] + tiny) / (near[1] + tiny)


def _generator(config: AdversarialConfig) -> nn.Module:
    inputs = config.latent_dim + config.context
    if config.network == "mlp":
        return mlp_generator(inputs, config.shape, config.hidden)
    channels, height, width = config.shape
    make = dcgan_generator if config.network == "dcgan" else resnet_generator
    return make(inputs, (channels, height, width), config.channels)


def _critic(config: AdversarialConfig) -> nn.Module:
    if config.network == "mlp":
        critic = mlp_critic(config.dimensions + config.context, config.hidden[::-1], config.layer_norm)
    else:
        channels, height, width = config.shape
        make = dcgan_critic if config.network == "dcgan" else resnet_critic
        critic = make((channels, height, width), config.channels, config.layer_norm, config.context)
    if config.spectral_norm:
        for module in list(critic.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                spectral_norm(module)
    return WithContext(critic, planes=config.network != "mlp") if config.conditional else critic
