"""What all normalizing flows share: the density, sampling, and the way from data to the flow and back."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from genfuse import nn as blocks
from genfuse.data import Batch, Dataset
from genfuse.errors import SettingsError
from genfuse.flows import Flow, StandardNormal
from genfuse.models._base import GenerativeModel, Given, ModelConfig, check_at_least, seeded, split
from genfuse.nn import Columns, OneHot, Transform

Dequantization = Literal["uniform", "variational"]


FEW, MANY = 256, 512  # cells of a picture that dense networks learn to draw, and convolutional ones in little time
REPEATED = 0.05  # of the examples, that one value may have in a column of real numbers


@dataclass(frozen=True)
class FlowConfig(ModelConfig):
    """Settings of every flow. Raises SettingsError for values outside their range."""

    logit: float = 1e-6  # discrete data: the flow sees logit(a + (1 - 2 a) v) of v in [0, 1) with this a; 0: v - 1/2
    dequantization: Dequantization = "uniform"  # discrete data: the noise that makes levels real numbers
    reversible: bool = False  # recompute activations in the backward pass: memory does not grow with depth

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, logit=0, below=0.5)
        if self.dequantization == "variational" and (self.levels is None or len(self.shape) != 3):
            raise SettingsError(
                f"dequantization 'variational' is for images of discrete levels, got shape {self.shape} and levels "
                f"{self.levels}: use 'uniform'"
            )

    @property
    def options(self) -> dict[str, Any]:
        """What every flow of `genfuse.flows` takes beside its shape and own options."""
        embedding = OneHot(self.context) if self.context and not self.condition else None
        return {"context": self.context, "embedding": embedding, "reversible": self.reversible}


@dataclass(frozen=True)
class NetworkConfig(FlowConfig):
    """Settings of a flow whose layers' parameters are made by networks."""

    squash: bool = True  # networks of vectors see features squashed, so that no row far outside explodes

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "squash": self.squash}


def one_per_block(settings: dict[str, Any], name: str, width: int, blocks: int) -> dict[str, Any]:
    """Settings of former versions, in which ``name`` was one width, by default this, and ``blocks`` said how many, as
    JSON has those of now."""
    if not isinstance(settings.get(name, width), int) or not {name, "blocks"} & settings.keys():
        return settings
    others = {key: value for key, value in settings.items() if key != "blocks"}
    return {**others, name: [settings.get(name, width)] * settings.get("blocks", blocks)}


class FlowModel(GenerativeModel):
    """A normalizing flow as a model: x = f^-1(z) of z drawn from the flow's base.

    Real-valued examples x are (N, *shape), with exact densities in nats. Discrete ones, x = k / (levels - 1), are
    dequantised: `elbo` is a lower bound of log P(x), and `bits_per_dim` the same in bits per cell. Latents z are
    (N, D), as many as an example has cells. Tables with integers, categories or cells missing are dequantised too, by
    `genfuse.nn.Columns.dequantize`: `elbo` is then a lower bound of the log-density of the numbers and log-probability
    of all else, and `log_prob` is the same. What is given, y, is a context (N, C), labels (N,), or what else the flow's
    ``embedding`` takes.

    >>> model = FlowModel(genfuse.flows.NSF(2))

    A subclass for the commands has settings, ``Config``, and says in ``flow_class``, or in `flow_of`, which flow they
    make.

    Args:
        flow: any, from examples (N, *shape) to latents (N, D).
        shape: of an example, if the flow does not know it.
        levels: of discrete data; None for real-valued data.
        logit: discrete data: the flow sees logit(a + (1 - 2 a) v) of v in [0, 1) with this a, or with 0 v - 1/2.
        noise: discrete data: a transform that makes the dequantisation noise, as in `genfuse.nn.Dequantize`; uniform
            noise if it is left out.
        columns: of a table whose columns are not all numbers; the flow then has its ``latents``.
        config: the settings that the flow was made of.
    """

    Config: ClassVar[type] = FlowConfig
    flow_class: ClassVar[Callable[..., Flow]]
    _of_levels = True
    borrows = True
    former: ClassVar[dict[str, Any]] = {}  # settings that runs of former versions lack, as they were then

    def __init__(
        self,
        flow: Flow,
        *,
        shape: tuple[int, ...] | None = None,
        levels: int | None = None,
        logit: float = 1e-6,
        noise: Transform | None = None,
        columns: Columns | None = None,
        config: FlowConfig | None = None,
    ) -> None:
        embedding = blocks.Features(flow.context) if flow.embedding is None and flow.context else flow.embedding
        shape = shape or ((columns.columns,) if columns is not None else flow.event_shape)
        super().__init__(config, shape=shape, levels=levels, embedding=embedding)
        if self.shape is not None and len(self.shape) == 3:
            self.usual_steps = 2000  # samples can be read by then, and more learns few images by heart
        self.columns = columns
        self.dequantize = None if levels is None else blocks.Dequantize(levels, noise)
        self.reals: Transform | None = None if levels is None else blocks.Logit(logit) if logit else blocks.Centre()
        self.flow = flow
        first = 0 if levels is None else 1  # where the way to real numbers was the flow's first layer
        self.moved = {  # type: ignore[misc]
            f"flow.transforms.{first + i}.": f"flow.transform.transforms.{i}."
            for i in range(len(flow.transform.transforms))
        }

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**cls.former, **settings} if "shape" in settings else settings  # only a run's have a shape

    @classmethod
    def from_config(cls, config: Any) -> Self:
        noise = _variational_noise(config.shape) if config.dequantization == "variational" else None
        columns = None if config.columns is None else Columns(config.columns)
        seen = config if columns is None else replace(config, shape=(columns.latents,), columns=None)
        return cls(
            cls.flow_of(seen), levels=config.levels, logit=config.logit, noise=noise, columns=columns, config=config
        )

    @classmethod
    def flow_of(cls, config: Any, **more: Any) -> Flow:
        """The flow that the settings make: a ``flow_class`` with those settings that it has arguments for, ``layers``
        as its ``transforms``, and with ``more``."""
        if not hasattr(cls, "flow_class"):
            raise NotImplementedError(f"{cls.__name__} has no flow_of")
        known = {"layers": "transforms", **{name: name for name in inspect.signature(cls.flow_class).parameters}}
        given = {known[each.name]: getattr(config, each.name) for each in fields(config) if each.name in known}
        return cls.flow_class(config.shape, **{**given, **config.options, **more})

    @property
    def likelihoods(self) -> tuple[str, ...]:
        if self.columns is not None:
            return ("elbo",)
        return ("log_prob",) if self.dequantize is None else ("elbo", "bits_per_dim")

    def doubts(self, data: Dataset) -> Iterator[str]:
        yield from super().doubts(data)
        cells, name = math.prod(data.shape), self.plugin or "flow"
        if data.is_image and any(isinstance(part, nn.Conv2d) for part in self.flow.modules()):
            if cells > MANY:
                yield (
                    f"a {name} of pictures of {cells} cells takes hours to draw whole ones: after the usual "
                    f"{self.usual_steps:,} steps they are strokes. For samples to look at use gan or edm, or give it "
                    "many times as many --steps; its densities and codes are of use before"
                )
        elif data.is_image and cells > FEW:
            yield (
                f"the networks of this {name} see the {cells} cells of a picture as a vector: its densities and codes "
                "are of use, but what it draws are clouds of dots. For samples to look at use gan or edm"
            )
        if self.levels is not None or self.columns is not None or len(data.shape) > 1:
            return
        x = data.batch("train", slice(10_000)).x
        names = (data.scaling and data.scaling.names) or [str(i + 1) for i in range(x.shape[1])]
        for name, column in zip(names, x.T, strict=True):
            share = int(column.unique(return_counts=True)[1].max()) / len(column)
            if share > REPEATED and len(column) >= 100:
                yield (
                    f"{share:.0%} of the examples have one value in column {name}: a density has no bound there, and "
                    "likelihood may grow while the model gets no better. Leave the column out, or add noise to it; in "
                    f"a .csv say what it is, by --data.types {name}=integer or {name}=category"
                )

    def loss(self, batch: Batch, player: str = "model") -> tuple[Tensor, dict[str, Tensor]]:
        """-log p(x), or for discrete data minus its lower bound, in the mean over the batch."""
        y = self.y_of(batch)
        nll = -(self.log_prob(batch.x, y) if self.dequantize is None else self.elbo(batch.x, y)).mean()
        return nll, {} if self.dequantize is None else {"bits_per_dim": nll.detach() / self._nats_per_bit}

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x), exact, (N,) nats. If the data is discrete, x are dequantised values in [0, 1); of a table with
        columns of several kinds it is a lower bound, `elbo`."""
        return self.elbo(x, y) if self.columns is not None else self._log_prob(self.checked(x), y)

    def _log_prob(self, x: Tensor, y: Tensor | None) -> Tensor:
        context = self.context_of(y, len(x))
        z, logdet = self._to_base(x, context)
        return self.flow.base_log_prob(z, logdet, context)

    def _to_base(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """z, and the log-determinant (N,)."""
        if self.reals is None:
            return self.flow.transform(x, context)
        real, logdet = self.reals(x)
        z, more = self.flow.transform(real, context)
        return z, logdet + more

    def elbo(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """A lower bound of log P(x) of discrete x, (N,) nats, with one draw of the dequantisation noise.

        Raises SettingsError for a model of real-valued data, which has `log_prob`.
        """
        dequantize = self.dequantize if self.columns is None else self.columns.dequantize
        if dequantize is None:
            raise SettingsError("elbo is for discrete data; the model is of real-valued data: use log_prob")
        v, log_weight = dequantize(self.checked(x), generator)
        return self._log_prob(v, y) + log_weight

    def bits_per_dim(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """-elbo / (D ln 2), (N,): bits that each of the D cells, of ``levels`` levels, costs (arXiv 1511.01844)."""
        return -self.elbo(x, y, generator=generator) / self._nats_per_bit

    def code(self, coder: Any, n: int, x: Tensor | None = None) -> Tensor:
        """See `genfuse.models.Codes`: bits of the stack are taken for the dequantisation noise, then the flow's layers
        take and give bits as they spread and draw together, and z is put on it by the base; in expectation the stack
        is longer by -ELBO.

        Raises SettingsError for flows of numbers, of tables, conditional ones, and such as have layers that have no
        `Transform.code`.
        """
        for reason, holds in {
            "it is of real numbers, which have no levels": self.levels is None and self.columns is None,
            "it is of a table, which a vae or idf compresses": self.columns is not None,
            "its dequantisation noise is variational": self.dequantize is not None
            and self.dequantize.noise is not None,
            "it is conditional, and what is given would not be in the file": self.conditional,
            "its base is not N(0, I)": not isinstance(self.flow.base, StandardNormal),
        }.items():
            if holds:
                raise SettingsError(f"this {type(self).__name__} does not compress: {reason}")
        of: Any = self.flow.transform.code
        levels, margin, top = self.levels, getattr(self.reals, "a", 0.0), (self.levels or 0) - 1
        if x is None:
            return (
                coder.dequantized(levels, margin, y=of(coder, coder.normal(n, math.prod(self.shape or ())), True)) / top
            )
        z = of(coder, coder.dequantized(levels, margin, (x * top).round()))
        coder.normal(*z.shape, z)
        coder.flush()
        return x

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z = f(x), (N, D); of discrete x, and of integers, categories and missing cells of a table, at the middle of
        what they are dequantised to."""
        x = self.checked(x)
        if self.columns is not None:
            x = self.columns.middle(x)
        if self.levels is not None:
            x = ((x * (self.levels - 1)).round() + 0.5) / self.levels
        return self._to_base(x, self.context_of(y, len(x)))[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """x = f^-1(z), (N, *shape), for latents (N, D); discrete x are on their levels."""
        return self._decode(z, self.context_of(y, len(z)))

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        x, _ = self.flow.transform.inverse(z, context)
        if self.columns is not None:
            return self.columns.quantize(x)
        return x if self.reals is None or self.dequantize is None else self.dequantize.inverse(self.reals.inverse(x)[0])

    def trajectory(self, z: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """z (N, D), and what each layer makes of it on the way to the data; the last is in the data's space."""
        steps, context = [z], self.context_of(y, len(z))
        for transform in reversed(self.flow.transform.transforms):
            steps.append(transform.inverse(steps[-1], context)[0])  # type: ignore[operator]
        if self.columns is not None:
            return [*steps[:-1], self.columns.quantize(steps[-1])]
        return steps if self.reals is None else [*steps, self.reals.inverse(steps[-1])[0]]

    @torch.no_grad()
    def sample(
        self, n: int, *, y: Given = None, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """n draws, (n, *shape), of latents with standard deviation ``temperature``; 1 is the model itself."""
        z, context = self._draw(n, temperature, y, generator)
        rows = max(1, 2**22 // z[0].numel()) if n else 1
        return torch.cat([self._decode(*part) for part in split(rows, z, context)])

    @torch.no_grad()
    def sample_and_log_prob(self, n: int, *, temperature: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
        """Draws as `sample` makes them, and the log-density of what they were drawn from, (n,) nats, in the same pass.

        Raises SettingsError for discrete data, whose log-probability has only bounds: use sample and elbo.
        """
        if self.dequantize is not None or self.columns is not None:
            raise SettingsError("sample_and_log_prob is for real-valued data; of discrete data use sample, then elbo")
        z, context = self._draw(n, temperature, **options)
        x, logdet = self.flow.transform.inverse(z, context)
        scaled = self.flow.base_log_prob(z / temperature, -logdet, context)
        return x, scaled - z[0].numel() * math.log(temperature) if n else scaled

    def _draw(
        self, n: int, temperature: float, y: Given = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Latents, and the context."""
        if not 0 < temperature < math.inf:
            raise SettingsError(f"temperature must be above 0 and finite, got {temperature}")
        context = self.draw_context(n, y, generator)
        where = torch.device("cpu") if generator is None else generator.device
        weight = next(self.parameters())
        if isinstance(self.flow.base, StandardNormal):
            z = torch.randn(n, *self.flow.base.zeros.shape, device=where, generator=generator) * temperature
            return z.to(weight), context
        if temperature != 1:
            raise SettingsError(f"temperature is for flows whose base is N(0, I); got {temperature}: leave it out")
        base = self.flow.base_of(context)
        with seeded(generator):
            return base.sample(() if base.batch_shape else (n,)), context

    @property
    def _nats_per_bit(self) -> float:
        return math.prod(self.shape or ()) * math.log(2)


def _variational_noise(shape: tuple[int, ...]) -> Transform:
    channels, height, width = shape
    return blocks.Composite(
        [
            blocks.AffineCoupling(
                blocks.ConvConditioner(channels, 2 * channels, channels, channels=(32,)),
                mask=blocks.checkerboard(height, width, bool(i % 2)),
            )
            for i in range(4)
        ]
    )
