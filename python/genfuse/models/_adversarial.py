"""What adversarial models share: a generator and a critic that train against each other, and how that is watched."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import Self

from genfuse import nn as blocks
from genfuse.errors import SettingsError
from genfuse.models import _base
from genfuse.models._base import Batch, GenerativeModel, Given, ModelConfig, Player
from genfuse.nn import EMA, Columns
from genfuse.nn.likelihoods import at_least_float32
from genfuse.ops import gradient_norm_penalty, gradient_penalty, scores_and_gradient, scores_and_penalty, transformed

Network = Literal["mlp", "dcgan", "resnet"]
Penalty = Literal["none", "gradient", "r1", "r1r2"]

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
    # dcgan, resnet: widths from the finest resolution; one: it doubles, up to 8 times
    channels: tuple[int, ...] = (64,)
    n_critic: int = 1  # updates of the critic for one of the generator
    ema: float = 0.999  # samples are of the generator's weights averaged over its updates with this decay; 0: the last
    spectral_norm: bool = False  # divide the critic's weights by their largest singular value
    layer_norm: bool = False  # in the critic; it has no batch norm
    bound: float = 1000.0  # a critic's loss beyond it, above or below 0, is warned of
    given: tuple[int, ...] | None = None  # (C, h, w) of the image that is given with each; taken from the data
    blocks: int = 4  # given an image: residual blocks of the generator; the critic is dcgan or resnet, as network says
    adversarial_weight: float = 5e-3  # given an image: of the critic's say, beside squared error; 0: trains no critic
    pac: int = 1  # mlp: examples that the critic sees side by side, by which it notices those that repeat (PacGAN)
    _positive: ClassVar[tuple[str, ...]] = ("latent_dim", "hidden", "channels", "bound", "pac", "blocks")
    normal_scores = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _base.check_at_least(self, adversarial_weight=0)
        if self.network != "mlp" and (self.pac > 1 or self.columns is not None):
            raise SettingsError(f"network {self.network!r} sees single images: use network 'mlp' for tables or pac")
        check_training(self)
        if not self.channels:
            raise SettingsError("channels must hold at least one width, got ()")
        if self.pac > 1 and self.given:
            raise SettingsError("pac must be 1 where an image is given")
        if (self.network != "mlp" or self.given) and (len(self.shape) != 3 or min(self.shape[1:]) < 8):
            raise SettingsError(
                f"network {self.network!r} makes images (C, H, W) of at least 8 x 8, and cannot make examples of shape "
                f"{self.shape}: use network 'mlp', or larger images"
            )

    @property
    def vectors(self) -> bool:
        """Whether examples are vectors of real numbers, or rows of a table."""
        return self.levels is None and len(self.shape) == 1


@dataclass(frozen=True)
class PenaltyConfig(AdversarialConfig):
    """Settings of those whose critic may pay for steepness."""

    # on |grad D|: (|.| - 1)^2 between real and generated examples; r1: |.|^2 / 2 at real ones; r1r2: at both
    penalty: Penalty = "none"
    penalty_weight: float = 10.0  # lambda; r1, r1r2: gamma
    one_sided: bool = False  # gradient: only norms above 1 pay


def check_training(of: Any) -> None:
    """Raise SettingsError unless a model, or its settings, can be trained as its attributes say."""
    if of.n_critic < 1:
        raise SettingsError(f"n_critic must be at least 1 update of the critic per round, got {of.n_critic}")
    _base.check_at_least(of, ema=0, below=1)
    if hasattr(of, "penalty"):
        _base.check_choices(of, penalty=Penalty)
        _base.check_at_least(of, penalty_weight=0)
        if of.one_sided and of.penalty != "gradient":
            raise SettingsError(f"one_sided is of penalty 'gradient', got penalty {of.penalty!r}: leave it out")


class Objective(NamedTuple):
    """What critic and generator minimise, (N,) each, as functions of the critic's output (N,).

    If it is ``relativistic``, all three get the output less that for an example of the other kind.
    """

    real: Callable[[Tensor], Tensor]  # the critic, for real examples
    fake: Callable[[Tensor], Tensor]  # the critic, for generated ones
    generator: Callable[[Tensor], Tensor]
    relativistic: bool = False


class AdversarialModel(GenerativeModel):
    """A generator x = G(z), z ~ N(0, I), and a critic D that tells its samples from real examples.

    Examples x are (N, *shape), latents z (N, D). With an ``embedding`` both networks are given y, labels (N,), a
    context (N, C) or an image (N, C, h, w). Each round trains the critic ``n_critic`` times, every time on a batch of
    its own, and then the generator once. A subclass says what the two minimise, and how they are optimised.

    Args:
        generator: z (N, D) -> x (N, *shape), squashed by tanh if the data is discrete; called as generator(z, context)
            if there is an ``embedding``.
        critic: x -> (N, 1) or (N,); critic(x, context) with an ``embedding``. It is shown discrete data as 2x - 1.
        objective: what the two minimise.
        latent_dim, n_critic, ema, penalty_weight, one_sided, bound: as the settings.
        shape: of one example, if it is to be checked.
        levels: of discrete data, whose examples are in [0, 1]; None for real-valued data.
        penalty: on the norm of the critic's gradient |grad D|: ``gradient`` (|.| - 1)^2 between real and generated
            examples (arXiv 1704.00028), ``r1`` |.|^2 / 2 at real ones (arXiv 1801.04406), ``r1r2`` the same at
            generated ones too (arXiv 2501.05441), or ``none``.
        pac: examples that the critic sees side by side (arXiv 1712.04086): it is then given (N / pac, pac * cells).
        columns: of a table whose columns are not all numbers: the generator then puts out (N, ``columns.width``), of
            which `genfuse.nn.Columns.activate` makes examples, and the critic sees such.
        adversarial_weight: of a model that restores images: the generator minimises squared error in [-1, 1] plus this
            times its objective (SRGAN, arXiv 1609.04802, equation 3, with pixels as content), makes of y what it makes
            without tanh, and of 0 needs no critic; None: the objective alone.
        embedding: makes the context (N, C) of y. The generator owns its parameters, which are averaged as its own; the
            critic sees what it makes, and does not train it.
        config: the settings that it was made of, if it was.

    Raises SettingsError for values outside their range.
    """

    usual_steps = 8000
    critic_name: ClassVar[str] = "critic"

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        objective: Objective,
        *,
        latent_dim: int,
        shape: tuple[int, ...] | None = None,
        levels: int | None = None,
        n_critic: int = 1,
        ema: float = 0.999,
        penalty: Penalty = "none",
        penalty_weight: float = 10.0,
        one_sided: bool = False,
        bound: float = 1000.0,
        pac: int = 1,
        columns: Columns | None = None,
        adversarial_weight: float | None = None,
        embedding: nn.Module | None = None,
        config: AdversarialConfig | None = None,
    ) -> None:
        super().__init__(config, shape=shape, levels=levels, embedding=embedding)
        self.objective = objective
        self.latent_dim, self.n_critic, self.ema, self.bound = latent_dim, n_critic, ema, bound
        self.penalty, self.penalty_weight, self.one_sided = penalty, penalty_weight, one_sided
        self.pac, self.columns, self.adversarial_weight = pac, columns, adversarial_weight
        check_training(self)
        self.generator, self.critic = generator, critic
        self.averaged = EMA(generator, ema) if ema else None
        learned = embedding is not None and any(weight.requires_grad for weight in embedding.parameters())
        self.averaged_embedding = EMA(embedding, ema) if embedding is not None and ema and learned else None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model of these settings, with networks of ours."""
        names = ["latent_dim", "n_critic", "ema", "bound", "pac", *(["adversarial_weight"] if config.given else [])]
        names += [name for name in ("penalty", "penalty_weight", "one_sided", "clip") if hasattr(config, name)]
        given = {name: getattr(config, name) for name in names}
        if hasattr(config, "loss"):
            given["objective"] = config.loss
        columns = None if config.columns is None else Columns(config.columns)
        generator = _generator(config, columns)  # first, by which seeds make the same weights as ever
        return cls(generator, _critic(config, columns), columns=columns, config=config, **given)

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        channels = settings.get("channels", (64,))
        return {**settings, "channels": (channels,)} if isinstance(channels, int) else settings

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """What each player is optimised by, unless a loop brings its own."""
        raise NotImplementedError(f"{type(self).__name__} has no optimizer")

    def players(self) -> list[Player]:
        embedding = [] if self.embedding is None else self.embedding.parameters()
        critic = Player(self.critic_name, self.critic.parameters(), self.optimizer, self.n_critic)
        generator = Player("generator", [*self.generator.parameters(), *embedding], self.optimizer)
        return [generator] if self.adversarial_weight == 0 else [critic, generator]

    def loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the player's part of the objective. Terms: `critic_terms`; of the generator its `diversity`,
        or of one that restores images its ``squared_error``, in [-1, 1].

        Raises SettingsError if the critic does not return one number for each example.
        """
        self.settle()
        if player not in (self.critic_name, "generator"):
            self.named_player(player)  # which refuses it
        x, n = self._centred(self.checked(batch.x)), len(batch.x)
        context = self.context_of(self.y_of(batch), n)
        if self.pac > 1 and n % self.pac:  # the last ones wait, and of too few some come twice
            some = torch.arange(max(self.pac, n - n % self.pac), device=x.device) % max(n, 1)
            x, n = x[some], len(some)
            context = None if context is None else context[some]
        seen = None if context is None else context.detach()  # by the critic
        z = torch.randn(n, self.latent_dim, dtype=x.dtype, device=x.device)
        if player == "generator":
            fake = self._generate(self.generator, z, context)
            weight, error = self.adversarial_weight, torch.zeros(())
            if weight is not None:
                error = (fake - x).square().mean()
                if weight == 0:
                    return error, {"squared_error": error.detach()}
            out = self._criticise(fake, seen)
            if self.objective.relativistic:
                with torch.no_grad():
                    real_out = self._criticise(x, seen)
                out = out - real_out
            loss = self.objective.generator(out).mean()
            if weight is not None:
                return error + weight * loss, {"squared_error": error.detach()}
            return loss, {"diversity": diversity(fake.detach(), x)} if n > 1 else {}
        with torch.no_grad():
            fake = self._generate(self.generator, z, context).to(x.dtype)
        both = None if seen is None else seen.repeat(2, *[1] * (seen.dim() - 1))
        penalty: Tensor | None
        if self.penalty == "r1r2":  # both are at the points of the loss: one forward pass for all
            points = self._packed(torch.cat([x, fake]), both)
            out, gradient = scores_and_gradient(self.critic, *points)
            penalty = self.penalty_weight * gradient_norm_penalty(gradient, target=0.0)  # a mean over real and fake
            real_out, fake_out = self._scores(out, len(points[0])).chunk(2)
        elif self.penalty == "gradient" and type(self).gradient_penalty is AdversarialModel.gradient_penalty:
            points = self._packed(x, fake, seen)
            *outs, penalty = scores_and_penalty(self.critic, *points, one_sided=self.one_sided)
            real_out, fake_out = (self._scores(out, len(points[0])) for out in outs)
            penalty = self.penalty_weight * penalty
        else:
            real_out, fake_out = self._criticise(torch.cat([x, fake]), both).chunk(2)
            penalty = self.gradient_penalty(*self._packed(x, fake, seen))
        terms = self.critic_terms(real_out.detach(), fake_out.detach())
        if self.objective.relativistic:
            real_out, fake_out = real_out - fake_out, fake_out - real_out
        loss = self.objective.real(real_out).mean() + self.objective.fake(fake_out).mean()
        return (loss, terms) if penalty is None else (loss + penalty, {**terms, "penalty": penalty.detach()})

    def critic_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """What to log of the critic's outputs (N,) for real and generated examples."""
        return {"real": real.mean(), "fake": fake.mean()}

    def gradient_penalty(self, x: Tensor, fake: Tensor, context: Tensor | None) -> Tensor | None:
        """The weighted penalty on the critic's gradient at x (N, *shape), fake ones or between, if there is one."""
        if self.penalty == "none":
            return None
        if self.penalty == "r1":  # arXiv 1801.04406, equation 9
            return self.penalty_weight / 2 * gradient_penalty(self.critic, x, context=context, target=0.0, at="real")
        return self.penalty_weight * gradient_penalty(self.critic, x, fake, context, one_sided=self.one_sided)

    def after_step(self, player: str) -> None:
        if player == "generator":
            for average, network in self._averages():
                average.update(network)
        super().after_step(player)

    def latents(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n draws z ~ N(0, I), (n, D)."""
        where = self.device if generator is None else generator.device
        z = torch.randn(n, self.latent_dim, device=where, generator=generator)
        return z.to(next(self.parameters()))

    @property
    def uniforms(self) -> int:
        """How many ``u`` `decode` draws the categories and missing cells of a table by; else 0."""
        return 0 if self.columns is None else self.columns.choices

    def decode(self, z: Tensor, y: Tensor | None = None, *, u: Tensor | None = None) -> Tensor:
        """x = G(z), (N, *shape), for latents (N, D), with the averaged weights if there are such; of categories the
        likeliest, or with uniform draws ``u`` in (0, 1), (N, `uniforms`), one by chance."""
        self._settle_averages()
        return self._decode(z, self.context_of(y, len(z), **self._embedding()), drawn=u is not None, u=u)

    @torch.no_grad()
    def sample(self, n: int, *, y: Given = None, generator: torch.Generator | None = None) -> Tensor:
        """n draws, (n, *shape)."""
        self._settle_averages()
        z = self.latents(n, generator=generator)
        return self._decode(z, self.draw_context(n, y, generator, **self._embedding()), generator=generator)

    def realness(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The critic's output for x (N, *shape), (N,): the higher, the more it takes x for a real example. It tells
        real from generated examples, and is no density: far from both it may be anything."""
        context = self.context_of(y, len(x))
        if self.pac > 1:  # each beside itself
            x = x.repeat_interleave(self.pac, 0)
            context = None if context is None else context.repeat_interleave(self.pac, 0)
        return self._criticise(self._centred(self.checked(x)), context)

    def interpolate_latents(self, a: Tensor, b: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
        """x on the arcs between latents a and b, (N, D) each, both ends included: (steps, N, *shape).

        An arc, since the samples of a line's middle would be nearer to the origin than almost all that G has seen
        (arXiv 1609.04468). Raises SettingsError for fewer than two steps.
        """
        return torch.stack([self.decode(each, y) for each in _base.between(a, b, steps, arc=True)])

    def watch(self, player: str, step: int, terms: dict[str, float]) -> dict[str, str]:
        found = {}
        if player == self.critic_name and abs(terms["loss"]) > self.bound:
            found["divergence"] = (
                f"the loss of the {player} is {terms['loss']:.4g}, beyond {self.bound:g}: it runs away. Try a "
                "smaller --lr, a penalty or a larger one (--model.penalty-weight), or --model.spectral-norm"
            )
        if player == "generator" and terms.get("gradient_norm", math.inf) < STALLED:
            found["vanishing"] = (
                f"the generator's gradient is {terms['gradient_norm']:.1e}: the {self.critic_name} is so sure that the "
                f"generator learns nothing. Try fewer --model.n-critic, a penalty, or a smaller --lr; of `gan` the "
                "non-saturating loss"
            )
        started = step // (self.n_critic + 1) >= STARTED
        if player == "generator" and started and terms.get("diversity", math.inf) < ALIKE:
            found["collapse"] = (
                f"samples repeat: they are {terms['diversity']:.1%} as far from each other as real examples are. Try a "
                "penalty (wgan-gp, or --model.penalty r1), a smaller --lr, or more --model.n-critic"
            )
        return found

    def _averages(self) -> list[tuple[EMA, nn.Module]]:
        pairs = [(self.averaged, self.generator), (self.averaged_embedding, self.embedding)]
        return [(average, network) for average, network in pairs if average is not None and network is not None]

    def _settle_averages(self) -> None:
        """Bring the averages up to date. One without updates yet, as after a loop over a compiled loss, is of the
        present weights."""
        self.settle()
        if torch.compiler.is_compiling() or transformed():
            return
        for average, network in self._averages():
            average.follow(network)

    def _embedding(self) -> dict[str, nn.Module]:
        """The averaged embedding, if there is one, as `context_of` takes it."""
        return {} if self.averaged_embedding is None else {"embedding": self.averaged_embedding}

    def _centred(self, x: Tensor) -> Tensor:
        """Examples as the critic is shown them: discrete data in [-1, 1]. From data in [0, 1] it learns badly."""
        if self.columns is not None:
            return self.columns.encode(x, noise=True)
        return x if self.levels is None else 2 * x - 1

    def _packed(self, *of: Any) -> list[Any]:
        return [x if x is None or self.pac == 1 else x.reshape(len(x) // self.pac, -1) for x in of]

    def _decode(self, z: Tensor, context: Tensor | None, **choices: Any) -> Tensor:
        x = self._generate(self.averaged or self.generator, z, context, **choices)
        if self.columns is not None:
            return self.columns.decode(x)
        return x if self.levels is None else ((x + 1) / 2).clamp(0, 1)

    def _generate(self, network: nn.Module, z: Tensor, context: Tensor | None, **choices: Any) -> Tensor:
        """Examples as `_centred` gives them; ``choices`` are the options of `genfuse.nn.Columns.activate`."""
        x = at_least_float32(network(z) if context is None else network(z, context))
        if self.columns is not None:
            return self.columns.activate(x, **choices)
        if self.adversarial_weight is not None:  # of any size
            return x
        if self.shape is not None and x.shape[1:] != self.shape:
            raise SettingsError(f"the generator must make examples (N, *{self.shape}); it made {tuple(x.shape)}")
        return x if self.levels is None else x.tanh()

    def _criticise(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The critic's output, (N,), for examples that are `_centred`; of those that it sees together, (N / pac,)."""
        x, context = self._packed(x, context)
        return self._scores(self.critic(x) if context is None else self.critic(x, context), len(x))

    def _scores(self, out: Tensor, n: int) -> Tensor:
        if out.shape not in ((n,), (n, 1)):
            raise SettingsError(
                f"the critic must return one number for each of {n} examples, ({n}, 1) or ({n},); got "
                f"{tuple(out.shape)}"
            )
        return at_least_float32(out).view(n)


def diversity(x: Tensor, real: Tensor, most: int = 64) -> Tensor:
    """Mean distance from an example (N, ...) to its nearest neighbour, as a share of the same among real ones.

    Near 1 for good samples, and 0 where all repeat each other. Of each at most the first ``most`` are compared.
    """
    near = []
    for examples in (x, real):
        points = examples[:most].flatten(1)
        points = points - points.mean(0)  # since cdist rounds by the size of the points
        distances = torch.cdist(points, points)
        itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
        near.append(distances.masked_fill(itself, math.inf).amin(1).mean())
    tiny = torch.finfo(near[0].dtype).tiny
    return (near[0] + tiny) / (near[1] + tiny)


def _generator(config: AdversarialConfig, columns: Columns | None) -> nn.Module:
    inputs = config.latent_dim + config.context
    if config.given:
        factor = config.shape[1] // config.given[1]
        return blocks.Restorer(config.given[0], config.shape[0], factor, config.channels[0], config.blocks)
    if config.network == "mlp":
        return blocks.mlp_generator(inputs, config.shape if columns is None else (columns.width,), config.hidden)
    channels, height, width = config.shape
    make = blocks.dcgan_generator if config.network == "dcgan" else blocks.resnet_generator
    return make(inputs, (channels, height, width), config.channels)


def _critic(config: AdversarialConfig, columns: Columns | None) -> nn.Module:
    context = config.given[0] + 1 if config.given else config.context
    if config.network == "mlp" and not config.given:
        cells = config.pac * ((config.dimensions if columns is None else columns.width) + config.context)
        critic = blocks.mlp_critic(cells, config.hidden[::-1], config.layer_norm)
    else:
        channels, height, width = config.shape
        make = blocks.resnet_critic if config.network == "resnet" else blocks.dcgan_critic
        critic = make((channels, height, width), config.channels, config.layer_norm, context)
    if config.spectral_norm:
        for module in list(critic.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                spectral_norm(module)
    return blocks.WithContext(critic, planes=config.network != "mlp") if context else critic
