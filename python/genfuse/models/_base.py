"""What every generative model is: a module with settings and a few verbs."""

import dataclasses
import html
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import repeat
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, runtime_checkable

import numpy as np
import torch
import typeguard
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import Self

from genfuse import plugins
from genfuse.data import Batch, Dataset, load_data
from genfuse.errors import DataError, NoLevelsError, SettingsError, near
from genfuse.nn import Features, Images, OneHot, Together, slerp


@dataclass
class Player:
    """One side of the game that training is: what is optimised together, how, and how often."""

    name: str
    parameters: Iterable[nn.Parameter]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int = 1  # updates per round; a round visits every player

    def __post_init__(self) -> None:
        self.parameters = list(self.parameters)
        if self.steps < 1:
            raise SettingsError(f"player {self.name!r} must take at least 1 step per round, got {self.steps}")


def adam(lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Callable:
    """Adam (arXiv 1412.6980) in its fused form, as a `Player` takes it."""
    return partial(torch.optim.Adam, lr=lr, betas=betas, eps=eps, fused=True)


@dataclass(frozen=True)
class ModelConfig:
    """Settings that every built-in model has. Raises SettingsError for values outside their range."""

    shape: tuple[int, ...] = (1, 28, 28)  # of one example: (C, H, W) or (D,); taken from the data
    levels: int | None = 256  # of discrete data, None for real-valued data; taken from the data
    classes: int | None = None  # of labels; taken from the data
    conditional: bool = False  # model p(x | label) in place of p(x)
    seen_labels: tuple[int, ...] | None = None  # that training examples have, if not all; taken from the data
    condition: int = 0  # numbers that are given with each example: the model is p(x | these); taken from the data
    # of tables: for `genfuse.nn.Columns`; taken from the data
    columns: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)
    _positive: ClassVar[tuple[str, ...]] = ()  # of a class: its settings that are above 0 and finite
    normal_scores: ClassVar[bool] = False  # of a class: whether it sees tables of numbers alone by ``columns`` too

    def __post_init__(self) -> None:
        if not self.shape or any(size < 1 for size in self.shape):
            raise SettingsError(f"shape must hold sizes of at least 1, got {self.shape}")
        if self.levels is not None and self.levels < 2:
            raise SettingsError(f"levels must be at least 2, or None for real-valued data, got {self.levels}")
        if self.condition < 0:
            raise SettingsError(f"condition must be at least 0 numbers, got {self.condition}")
        if self.conditional and not self.condition and not self.classes:
            raise SettingsError("conditional needs labels, classes of 1 or more, and there are none: leave it out")
        literals = {each.name: each.type for each in dataclasses.fields(self) if get_origin(each.type) is Literal}
        self.check_choices(**literals)
        self.check_positive(*(name for cls in type(self).__mro__ for name in vars(cls).get("_positive", ())))

    def check_positive(self, *names: str) -> None:
        """Raise SettingsError unless these settings, numbers or tuples of them, are above 0 and finite."""
        for name in names:
            value = getattr(self, name)
            if not all(0 < each < math.inf for each in (value if isinstance(value, tuple) else (value,))):
                raise SettingsError(f"{name} must be above 0 and finite, got {value}")

    def check_choices(self, **choices: Any) -> None:
        """Raise SettingsError unless each of these settings is one of the values of its `Literal`. Of fields that have
        such a type it is done already."""
        check_choices(self, **choices)

    @property
    def dimensions(self) -> int:
        """Cells of an example: D, or C H W."""
        return math.prod(self.shape)

    @property
    def context(self) -> int:
        """Features of the context that networks are given: a label as a one-hot vector, or the condition."""
        return self.condition or (self.classes or 0 if self.conditional else 0)


def numbers_alone(columns: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether columns of a table are numbers without end, or of one value, and no cell is missing."""
    return all(not c["missing"] and (c["kind"] == "number" or len(c["shares"]) == 1) for c in columns or ())


def check_choices(of: Any, **choices: Any) -> None:
    """Raise SettingsError unless each of these attributes is one of the values of its `Literal`."""
    for name, literal in choices.items():
        if getattr(of, name) not in get_args(literal):
            raise SettingsError(f"{name} must be one of {', '.join(get_args(literal))}, got {getattr(of, name)!r}")


def check_at_least(of: Any, *, below: float = math.inf, **least_of: float) -> None:
    """Raise SettingsError unless these attributes are no less than their least values, and below ``below``."""
    for name, least in least_of.items():
        if not least <= getattr(of, name) < below:
            limit = "finite" if below == math.inf else f"below {below}"
            raise SettingsError(f"{name} must be at least {least} and {limit}, got {getattr(of, name)}")


# What a model can do besides `loss` and `sample` shows in which of these it is an instance of. ``y`` is what is given:
# labels (N,), a context (N, C) or an image (N, C, h, w), of a conditional model alone.


@runtime_checkable
class Encodes(Protocol):
    """Has a latent code z (N, D) for each example x (N, *shape)."""

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Decodes(Protocol):
    """Makes examples (N, *shape) of latents z (N, D)."""

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Reconstructs(Protocol):
    """Makes of each example (N, *shape) what its code keeps of it, (N, *shape)."""

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class DrawsLatents(Protocol):
    """Draws latents z (n, D) from its prior, and decodes what lies between two such."""

    def latents(self, n: int, *, generator: torch.Generator | None = None) -> Tensor: ...

    def interpolate_latents(self, a: Tensor, b: Tensor, steps: int, y: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class HasPosterior(Protocol):
    """Has a distribution q(z | x) of the latents of each example, of batch shape (N,)."""

    def posterior(self, x: Tensor, y: Tensor | None = None) -> torch.distributions.Distribution: ...


@runtime_checkable
class HasTrajectory(Protocol):
    """Leads a base sample z (N, D) to an example step by step: z first, data last."""

    def trajectory(self, z: Tensor, y: Tensor | None = None) -> list[Tensor]: ...


@runtime_checkable
class Codes(Protocol):
    """Puts n examples x (n, *shape) of levels on the stack of a `genfuse.applications.Coder`, or takes them from it if
    x is None; returns them. It is called within `genfuse.applications.Exact`, in float64."""

    def code(self, coder: Any, n: int, x: Tensor | None = None) -> Tensor: ...


Given = Tensor | Sequence[float] | int | None  # y of n examples, or one label or row for all; None: nothing, or drawn
VERBS = {
    "log_prob", "elbo", "bits_per_dim", "iwae_bound", "anomaly_score", "encode", "decode", "reconstruct", "interpolate",
    "interpolate_latents", "realness", "denoising_error", "score",
}  # fmt: skip


def _of_arrays_too(verb: Callable) -> Callable:
    """A verb that is also given numpy's arrays, of which it then makes arrays, without gradients."""

    @wraps(verb)
    def of_either(self: "GenerativeModel", *given: Any, **named: Any) -> Any:
        for each in (*given, *named.values()):
            if isinstance(each, np.ndarray):
                break
        else:
            return verb(self, *given, **named)
        with torch.no_grad():
            tensors = [self.tensor_of(each, label=i > 0) for i, each in enumerate(given)]
            made = verb(self, *tensors, **{k: self.tensor_of(each, label=k == "y") for k, each in named.items()})
        return made.cpu().numpy() if isinstance(made, Tensor) else made

    return of_either


def _of_a_number(sample: Callable) -> Callable:
    """`GenerativeModel.sample`, which refuses what is no number of examples."""

    @wraps(sample)
    def of_count(self: "GenerativeModel", n: int, *given: Any, **named: Any) -> Tensor:
        if not isinstance(n, int | np.integer | torch.SymInt) or n < 0:
            raise SettingsError(f"n must be how many examples to draw, a whole number from 0 on; got {n!r}")
        drawn: Tensor = sample(self, n, *given, **named)
        return drawn

    return of_count


class GenerativeModel(nn.Module):
    """Base of every model, third parties' included.

    A subclass names its settings, a frozen dataclass, as ``Config``, builds its networks in ``__init__(config)``, or in
    `from_config` if ``__init__`` takes the networks themselves, and implements `loss` and `sample`. What else it can do
    shows in its verbs: ``log_prob(x)`` (exact) and ``elbo(x)``, both (N,) in nats, and those of `Encodes`, `Decodes`,
    `Reconstructs`, `DrawsLatents`, `HasPosterior` and `HasTrajectory`.

    Verbs take numpy's arrays too, and then return arrays. A conditional model is p(x | y). Every verb then takes ``y``:
    labels (N,), integers, or a context (N, C), floats; those that draw also one of them for all, and draw labels that
    are left out. A seeded generator may be on any device: its own decides the draws.

    Raises SettingsError from `from_config` for settings that no model can be made of. Verbs raise DataError for x that
    `checked`, and y that `context_of` refuses.
    """

    genfuse_api: ClassVar[int] = plugins.API
    Config: ClassVar[type]
    moved: ClassVar[Mapping[str, str]] = {}  # {how names in the state_dict began in former versions: how they do now}
    loss_unit: ClassVar[str] = "nats per example"  # of what `loss` returns, as pictures name it
    _of_levels: ClassVar[bool] = False  # whether its likelihood depends on the levels of the data
    usual_steps: int = 4000  # of all players together, that a training takes if nobody says how many
    plugin: str | None = None  # what the user typed to make it
    config: Any  # the settings that it was made of; None if its networks were given
    shape: tuple[int, ...] | None  # of one example, if it is known
    levels: int | None  # of discrete data; None for real-valued data
    embedding: nn.Module | None  # makes the context (N, C) of y; None if the model is not conditional

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        for verb in VERBS & vars(cls).keys():
            setattr(cls, verb, _of_arrays_too(vars(cls)[verb]))
        if "sample" in vars(cls):
            cls.sample = _of_a_number(vars(cls)["sample"])  # type: ignore[method-assign]

    def __init__(
        self,
        config: Any = None,
        *,
        shape: Sequence[int] | None = None,
        levels: int | None = None,
        embedding: nn.Module | None = None,
    ) -> None:
        """``shape``, ``levels`` and ``embedding`` are those of ``config`` unless given."""
        super().__init__()
        self.config = config
        given = getattr(config, "shape", None) if shape is None else shape
        self.shape = None if given is None else tuple(given)
        self.levels = getattr(config, "levels", None) if levels is None else levels
        if embedding is None and isinstance(config, ModelConfig) and config.context:
            embedding = Features(config.context) if config.condition else OneHot(config.context)
        if embedding is None and (image := getattr(config, "given", None)):
            embedding = Images(image[0])
        self.embedding = embedding
        self._stepped: dict[str, int] | None = None
        self._weights: _Weights | None = None

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model of these settings: by default ``cls(config)``."""
        return cls(config)

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings as a run of a former version has them, by the names and types of now. Extend it after a rename."""
        return settings

    def players(self) -> list[Player]:
        """Who is optimised: by default one player, ``model``, that owns every parameter, with Adam at 1e-3."""
        return [Player("model", self.parameters(), adam())]

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called once before the first update of a training, without gradients, with the training split in batches, in
        an order by the seed: to set what data decides, such as codebooks, centres of k-means or scales. A run that is
        resumed has it in its state. Take as many batches as are needed: those that are not asked for cost nothing."""

    def turn(self, step: int, steps: int) -> str | None:
        """Whose update the one after ``step`` of ``steps`` updates is, by the name of a player, for a model that is
        trained in stages: first one player, then the next. None: each player in turn, as often as `Player.steps` says.
        """
        return None

    def loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``player`` minimises: the total and its named terms, each a scalar mean per example, in nats."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def forward(self, x: Tensor, y: Tensor | None = None, player: str | None = None) -> Tensor:
        """The total of `loss` for examples x (N, *shape), a scalar; of the first player unless one is named.

        Raises SettingsError for a player that the model does not have, and for y if it is not conditional.
        """
        if y is not None and not self.conditional:
            self.context_of(y, len(x))  # which refuses it
        return self.loss(Batch(x, y), self.named_player(player))[0]

    def named_player(self, player: str | None) -> str:
        """A player's name, by default the first one's. Raises SettingsError if no player is called so."""
        names = [each.name for each in self.players()]
        if player is not None and player not in names:
            raise SettingsError(f"{type(self).__name__} has no player {player!r}; it has: {', '.join(names)}")
        return player or names[0]

    def y_of(self, batch: Batch) -> Tensor | None:
        """What a batch gives to a conditional model. Labels that come with data are nothing to any other model.

        Raises SettingsError for a context (N, C) that no `embedding` takes.
        """
        if self.conditional:
            return batch.y
        if batch.y is not None and batch.y.dim() > 1:
            raise SettingsError(
                f"{type(self).__name__} was given a context y {tuple(batch.y.shape)} and is not conditional: make it "
                "with embedding=, a network that makes of y what its networks are given, or torch.nn.Identity()"
            )
        return None

    def after_step(self, player: str) -> None:
        """Called after each update of ``player``: for weight clipping, moving averages, counters and the like.

        The trainer calls it by `stepped`, and `settle` does in a loop of the user's own. Call ``super().after_step`` at
        the end of your own: then an update that a loop tells of itself, by calling this, is not counted twice.
        """
        if type(self).after_step is not GenerativeModel.after_step and player in (now := self._versions()):
            self._stepped = {**(self._stepped or now), player: now[player]}

    def stepped(self, player: str) -> None:
        """Call `after_step` for an update that was just made."""
        self.after_step(player)
        if type(self).after_step is not GenerativeModel.after_step:
            self._stepped = self._versions()

    def settle(self, *, always: bool = False) -> None:
        """Call `after_step` of each player whose weights were changed since the last call of this or of `stepped`.

        A model whose `after_step` matters calls this first in `loss` and in whatever shows the result, so that nobody's
        own training loop has to know of `after_step`. In what is compiled it does nothing, or if it has to ``always``
        breaks the graph; in what is transformed by torch.func, or called with weights of others, it does nothing.
        """
        if torch.compiler.is_compiling():
            if always:
                _settle(self)
            return
        if transformed() or type(self).after_step is GenerativeModel.after_step or not self._weights_of().own:
            return
        now = self._versions()
        before, self._stepped = self._stepped or now, now
        for player, version in now.items():
            if version != before[player]:
                self.stepped(player)

    def _versions(self) -> dict[str, int]:
        """How often the weights of each player were changed in place."""
        return {player: sum(w._version for w in weights.tensors) for player, weights in self._weights_of().of.items()}

    def _weights_of(self) -> "_Weights":
        """The weights of each player. It takes longer to find them than to look at them: they are looked for anew after
        any layer or parameter was registered, and if others stand in their place."""
        known = self._weights
        if known is not None and known.registered == _registered and known.in_place():
            return known
        found = _Weights(self)
        if found.own:
            self._weights = found
            if known is not None and not known.same(found):
                self._stepped = None
        return found

    def train(self, mode: bool = True) -> Self:
        self._weights = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._stepped = self._weights = None
        return super()._apply(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module, the last update of the user's own loop counted."""
        self.settle()
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {**self.__dict__, "_stepped": None, "_weights": None}  # copies count anew

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module; names that former versions had are those that they have `moved` to."""
        for old, new in self.moved.items():
            state_dict = {
                new + name[len(old) :] if name.startswith(old) and not name.startswith(new) else name: value
                for name, value in state_dict.items()
            }
        result = super().load_state_dict(state_dict, strict, assign)
        self._stepped = self._weights = None
        return result

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw n examples, (n, *shape), in the range of the data that the model was trained on.

        A subclass may take more: ``y``, labels (n,) or a context (n, C), and ``temperature``, a factor of the base
        distribution's spread.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot sample")

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """The verbs that say how likely examples (N, *shape) are, (N,) each: ``log_prob`` and ``elbo``, as it has them.

        Override it if the verbs that can be used depend on the settings, or there are others.
        """
        return tuple(verb for verb in ("log_prob", "elbo") if hasattr(self, verb))

    @property
    def conditional(self) -> bool:
        """Whether it models p(x | y): if it has an `embedding`, or its setting ``conditional`` says so."""
        return self.embedding is not None or getattr(self.config, "conditional", False)

    @property
    def drawn_labels(self) -> Tensor:
        """The labels (K,) that training examples had, of which `sample` of a model of p(x | label) draws if it is given
        none: the setting ``seen_labels``, by default all."""
        classes = self.embedding.classes if isinstance(self.embedding, OneHot) else self.config.classes
        return torch.tensor(getattr(self.config, "seen_labels", None) or range(classes))

    def checked(self, x: Tensor) -> Tensor:
        """``x``, if these are examples as the model knows them. Raises DataError unless x is (N, *shape), discrete
        examples are in [0, 1], and outside of training x is of the weights' dtype, if autocast does not see to that."""
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise DataError(f"x must be (N, {wanted}), as the setting `shape` says; got {tuple(x.shape)}")
        check_range(x, self.levels, always=not self.training)
        if self.training or torch.compiler.is_compiling() or not x.is_floating_point():
            return x
        if not torch.is_autocast_enabled(x.device.type):
            dtype = next((weight.dtype for weight in self.parameters()), x.dtype)
            if x.dtype is not dtype:
                raise DataError(f"x must be {dtype}, as the model's weights are; got {x.dtype}: give it x.to({dtype})")
        return x

    def tensor_of(self, given: Any, label: bool = False) -> Any:
        """A tensor on the model's device of a numpy array, in the model's dtype but for whole numbers that may be
        labels or are refused as levels; anything else as it is. Raises DataError for an array of no real numbers."""
        if not isinstance(given, np.ndarray):
            return given
        if given.dtype.kind not in "biuf":
            raise DataError(f"an array of real numbers is needed; got one of {given.dtype}")
        if np.ma.is_masked(given):
            raise DataError("an array of which all cells are known is needed; got one that masks some: fill them")
        floats = given.dtype.kind == "f" or not (label or self.levels)
        return torch.as_tensor(
            given.copy(), dtype=next(self.parameters()).dtype if floats else None, device=self.device
        )

    def context_of(self, y: Tensor | None, n: int, embedding: nn.Module | None = None) -> Tensor | None:
        """The context (n, C) that ``embedding``, by default the model's own, makes of labels (n,) or a context (n, C);
        None if the model is not conditional.

        Raises SettingsError if y is missing or not wanted, and DataError if it is not one label or row per example.
        """
        if self.embedding is None:
            if y is not None:
                raise SettingsError("the model is not conditional, so it takes no labels: leave y out")
            return None
        labels = isinstance(self.embedding, OneHot)
        if y is None:
            if labels:
                wanted = f"of p(x | label): give labels y, ({n},), each in 0..{self.embedding.classes - 1}"  # type: ignore[operator]
            else:
                features = f", {self.embedding.features}" if isinstance(self.embedding, Features) else ", C"
                wanted = f"conditional: give a context y, ({n}{features})"
            raise SettingsError(f"the model is {wanted}")
        if y.dim() < 1 or len(y) != n or (labels and (y.dim() > 1 or y.dtype.is_floating_point)):
            wanted = f"labels y must be integers ({n},), one" if labels else f"y must be a context ({n}, C), one row"
            raise DataError(f"{wanted} for each example; got {y.dtype} {tuple(y.shape)}")
        embedded: Tensor = (embedding or self.embedding)(y)
        return embedded.to(next(self.parameters()).dtype)

    def draw_context(
        self, n: int, y: Given, generator: torch.Generator | None, **embedding: nn.Module
    ) -> Tensor | None:
        """`context_of` y, which may be one label or one row (C,) for all n; `drawn_labels`, uniformly, if it is left
        out. Raises SettingsError if it is left out of a model that takes no labels but a context."""
        if y is None and isinstance(self.embedding, OneHot):
            where = torch.device("cpu") if generator is None else generator.device
            labels = self.drawn_labels.to(where)
            y = labels[torch.randint(len(labels), (n,), device=where, generator=generator)]
        return self.context_of(self.for_all(y, n), n, **embedding)

    def for_all(self, y: Given, n: int) -> Tensor | None:
        """One label, row (C,) of a context or image (C, h, w) as of n examples, on the model's device; else y."""
        if y is None:
            return None
        y = torch.as_tensor(y, device=self.device)
        one = y.dim() in (0, 3) or (y.dim() == 1 and y.dtype.is_floating_point)
        return y.expand(n, *y.shape) if one else y

    def some_given(self, data: Dataset, n: int) -> dict[str, Tensor]:
        """What `sample` and others are given to draw n examples that stand for all of ``data``: as ``y`` each label in
        turn, or what is given with the first test examples, if that is a context or an image or the model does not know
        its labels; nothing if the model is not conditional."""
        if not self.conditional:
            return {}
        labels = isinstance(self.embedding, OneHot) or getattr(self.config, "classes", None)
        y = self.drawn_labels if labels and not (data.condition or data.given) else data.splits["test"].y
        assert y is not None  # `check_data` saw to it
        return {"y": y[torch.arange(n, device=y.device) % len(y)].to(self.device)}

    def check_data(self, data: Dataset) -> None:
        """Raise SettingsError if the model was made for other examples, or for labels that ``data`` does not have.

        Extend it for other facts.
        """
        if self.shape is not None and self.shape != data.shape:
            raise unlike(data, f"has examples of shape {data.shape}, but the model was made for {self.shape}")
        condition = getattr(self.config, "condition", 0)
        if self.config is not None and data.condition != condition:
            made_for = f"gives {data.condition} numbers with each example, and the model was made for {condition}"
            raise unlike(data, made_for, ", or take data without --data.condition")
        given = getattr(self.config, "given", None)
        if self.config is not None and given != data.given:
            takes = f"was made for {given or 'none'}" if hasattr(self.config, "given") else (
                f"takes none, as a {type(self).__name__}: use edm, another diffusion model or wgan-gp")  # fmt: skip
            raise SettingsError(
                f"the data set {data.name!r} gives {f'an image {data.given}' if data.given else 'no image'} with each "
                f"example (--data.task), and the model {takes}"
            )
        columns = getattr(self.config, "columns", None)
        numbers = numbers_alone(columns)
        if columns != data.columns and not (numbers and data.plain):
            kinds = "numbers alone" if numbers else "other columns"
            made_for = f"has columns of several kinds, or cells missing, and the model was made for {kinds}"
            raise unlike(data, made_for, "; models without `columns` take tables of numbers alone")
        if self.conditional and (bare := [part for part, split in data.splits.items() if split.y is None]):
            raise SettingsError(
                f"the model is conditional and needs labels, but the data set {data.name!r} has none in its splits "
                f"{', '.join(bare)}: use a data set with labels, or a model without `conditional`"
            )
        classes = getattr(self.config, "classes", None)
        if self.conditional and data.classes is not None and classes is not None and data.classes > classes:
            made_for = f"but the model was made for labels 0..{classes - 1}"
            raise unlike(data, f"has labels up to {data.classes - 1}, {made_for}")
        if self._of_levels:
            self.check_levels(data)

    def check_levels(self, data: Dataset) -> None:
        """For `check_data` of a model whose likelihood depends on them: raise SettingsError if they are others."""
        if self.levels != data.levels:
            has, made_for = (f"{n} levels" if n else "real numbers" for n in (data.levels, self.levels))
            raise unlike(data, f"has {has}, but the model was made for {made_for}")

    def doubts(self, data: Dataset) -> Iterator[str]:
        """What a user should know before this model is trained on ``data``: each is told as a TrainingWarning."""
        if data.is_clip and not any(isinstance(part, nn.Conv2d) for part in self.modules()):
            yield (
                f"the networks of this {self.plugin or type(self).__name__} see the {math.prod(data.shape):,} cells of "
                "a clip as a vector: what it draws are scattered cells. For samples to look at use edm"
            )

    def watch(self, player: str, step: int, terms: dict[str, float]) -> dict[str, str]:
        """What goes wrong in a training, as {a name for it: what was seen, and what to try}; each is told once.

        Called after ``step`` updates with the mean of each of ``player``'s terms since the last look at them, the
        norm of its gradient as ``gradient_norm`` among them if there are several players.
        """
        return {}

    def extra_repr(self) -> str:
        """How many parameters there are, and the settings: the head of what is printed of a model."""
        settings = "" if self.config is None else f"\n{self.config}"
        return f"{sum(weight.numel() for weight in self.parameters()):,} parameters{settings}"

    def _repr_html_(self) -> str:
        """For notebooks: parameters, and the settings as a table."""
        head = f"{self.plugin or type(self).__name__}: {self.extra_repr().splitlines()[0]}"
        rows = "".join(
            f"<tr><td>{field.name}</td><td>{html.escape(str(getattr(self.config, field.name)))}</td></tr>"
            for field in (dataclasses.fields(self.config) if dataclasses.is_dataclass(self.config) else ())
            if field.repr
        )
        return f"<p>{html.escape(head)}</p><table>{rows}</table>"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def unlike(data: Dataset, why: str, more: str = "") -> SettingsError:
    """The error of a model that was made for other data."""
    again = f"pass the data set when you make it, as in genfuse.create(name, data){more}"
    return SettingsError(f"the data set {data.name!r} {why}: {again}")


def check_range(x: Tensor, levels: int | None, *, always: bool = True) -> None:
    """Raise DataError unless discrete examples x are numbers in [0, 1], as `Dataset.batch` has them.

    Images in 0..255 or [-1, 1] would give other numbers, and no error. Real-valued data (``levels`` None) may hold
    anything. On a GPU, where the answer has to be waited for, it is only looked for if ``always``; never in what is
    compiled or transformed by torch.func.
    """
    # PyTorch 2.6 fixes a size that is asked whether it is 0.
    if levels is None or torch.compiler.is_compiling() or not x.numel():
        return
    if not x.is_floating_point():
        raise DataError(
            f"x must be floating-point numbers in [0, 1]; got {x.dtype}: divide by {levels - 1}, as data.batch does"
        )
    if type(x) not in (Tensor, nn.Parameter) or transformed():
        return
    if always or x.device.type == "cpu":
        low, high = x.detach().aminmax()
        if float(low) < -SLACK or float(high) > 1 + SLACK:  # NaN and inf pass, as they do elsewhere
            raise DataError(
                f"x must be in [0, 1], as batches of data with {levels} levels are; got values from {float(low):.4g} "
                f"to {float(high):.4g}: divide 0..255 by 255, and take (x + 1) / 2 of [-1, 1]"
            )


_counted: set[int] = set()  # the ids of weights whose updates a model counts; one that is used anew does no harm
_registered = 0  # how many layers and parameters of any module were, since this was imported


def _count_registration(*_: Any) -> None:
    global _registered
    _registered += 1


register_module_module_registration_hook(_count_registration)
register_module_parameter_registration_hook(_count_registration)


class _Weights:
    """The weights of a model's players, as they were found."""

    def __init__(self, model: "GenerativeModel") -> None:
        self.registered = _registered
        self.of = {player.name: Together(player.parameters) for player in model.players()}
        firsts = [weights.tensors[0] for weights in self.of.values() if weights.tensors]
        self.own = all(isinstance(weight, nn.Parameter) for weight in firsts)  # and not lent, as by functional_call
        places = [(of._parameters, name) for of in model.modules() for name in of._parameters]
        self._places = [(of, name, weight) for weight in firsts for of, name in places if of[name] is weight]
        if self.own:
            for weights in self.of.values():
                _counted.update(map(id, weights.tensors))

    def in_place(self) -> bool:
        """Whether the model still has the first weight of each player: who lends weights lends all of a player."""
        return all(parameters.get(name) is weight for parameters, name, weight in self._places)

    def same(self, other: "_Weights") -> bool:
        """Whether both hold the same tensors."""
        ids = [[[*map(id, weights.tensors)] for weights in each.of.values()] for each in (self, other)]
        return ids[0] == ids[1]


def _tell_of_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count a change of the weights that an optimizer has stepped, by which `GenerativeModel.settle` sees it. Fused
    optimizers, and those that write to ``weight.data``, do not do so themselves. Weights of others are left alone."""
    weights = (weight for group in optimizer.param_groups for weight in group["params"] if id(weight) in _counted)
    torch.autograd.graph.increment_version([weight for weight in weights if weight.grad is not None])


register_optimizer_step_post_hook(_tell_of_step)


@_disable_dynamo  # torch.compiler.disable would import all of it here, for seconds
def _settle(model: GenerativeModel) -> None:
    model.settle()


def transformed() -> bool:
    """Whether this is inside of torch.func's transforms, where values cannot be looked at, nor buffers changed."""
    return torch._C._functorch.maybe_current_level() is not None


SLACK = 1e-3  # by which x may be off for rounding to 16 bits
# Settings that the data decides, where a model has them.
FACTS = ("shape", "levels", "classes", "seen_labels", "condition", "given", "columns", "examples")


def configure(cls: type[GenerativeModel], settings: dict[str, Any], data: Dataset | None = None) -> Any:
    """The config of a model class from plain values (as JSON has them), checked against the types of its fields.

    Settings that ``data`` decides (shape, levels, classes) are taken from it unless given. Raises SettingsError for an
    unknown name or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls.Config)
    known = [field.name for field in dataclasses.fields(cls.Config)]
    for name in settings:
        if name not in known:
            raise SettingsError(
                f"{cls.__name__} has no setting {name!r}; it has: {', '.join(known)}{near(name, known)}"
            )
    given = dict(settings)
    if data is not None:
        facts = {name: getattr(data, name) for name in FACTS if name in known}
        if getattr(cls.Config, "normal_scores", False) and data.plain and data.scaling is not None:
            facts["columns"] = data.described().specs()
        given = {**facts, **given}
    for name, value in given.items():
        if isinstance(value, list):  # JSON has no tuples
            given[name] = value = tuple(value)
        elif isinstance(value, str) and hints[name] == tuple[int, ...] and re.fullmatch(r"[\d\s]+(,[\d\s]+)*,?", value):
            given[name] = value = tuple(int(each) for each in value.split(",") if each.strip())  # as the command has it
        elif type(value) is int and hints[name] == tuple[int, ...]:  # one width of one layer
            given[name] = value = (value,)
        try:
            typeguard.check_type(value, hints[name])
        except typeguard.TypeCheckError as error:
            raise SettingsError(f"setting {name!r} of {cls.__name__}: got {value!r}: {error}") from None
    config = cls.Config(**given)
    unseen = data is not None and data.class_names is None and data.seen_labels
    if data is not None and unseen and getattr(config, "conditional", False) and "classes" not in settings:
        raise SettingsError(
            f"the training examples of {data.name!r} have the labels {', '.join(map(str, unseen[:9]))}, which are not "
            f"all of 0..{(data.classes or 0) - 1}, and a conditional model would be one of labels without examples: "
            "number them 0, 1, 2, ..., or name them all (Dataset's class_names), to have the others never drawn"
        )
    return config


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """torch's global generators, of which alone a Distribution draws, seeded by a draw of ``generator``, if there is
    one, and afterwards as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device)))
        yield


def split(rows: int, *each: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """At most ``rows`` at a time of tensors (N, ...), of which the first is not None."""
    return zip(*(repeat(None) if tensor is None else tensor.split(rows) for tensor in each), strict=False)


def between(a: Tensor, b: Tensor, steps: int, *, arc: bool) -> Tensor:
    """Latents (steps, N, D) from a to b, (N, D) each, both ends included: on arcs, or on lines. Raises SettingsError
    for fewer than two steps."""
    if steps < 2:
        raise SettingsError(f"an interpolation has at least 2 steps, got {steps}")
    weights = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)
    return slerp(a, b, weights) if arc else torch.lerp(a, b, weights[:, None, None])


def unfit(loaded: Any) -> str | None:
    """What makes an object unfit to be a model that a package brings, or None."""
    api = getattr(loaded, "genfuse_api", None)
    if api != plugins.API:
        written_for = "no plugin API (it has no `genfuse_api`)" if api is None else f"plugin API {api}"
        return f"was written for {written_for}; this genfuse has plugin API {plugins.API}"
    if not (isinstance(loaded, type) and issubclass(loaded, GenerativeModel)):
        return f"is not a subclass of genfuse.models.GenerativeModel: it is {loaded!r}"
    if not (isinstance(config := getattr(loaded, "Config", None), type) and dataclasses.is_dataclass(config)):
        return f"has no dataclass of settings as its Config; it has {config!r}"
    if loaded.loss is GenerativeModel.loss:
        return "lacks the verb loss(batch, player), without which it cannot be trained"
    return None


def load(name: str) -> type[GenerativeModel]:
    """The class that ``name`` stands for. Raises PluginError for an unknown or broken model."""
    cls: type[GenerativeModel] = plugins.load("models", name, unfit)
    return cls


def create(name: str, data: Any = None, **settings: Any) -> GenerativeModel:
    """Make the model that ``name`` stands for, with the given settings.

    Pass the data set, or what `load_data` makes one of, to have ``shape``, ``levels`` and ``classes`` taken from it;
    without it they are the defaults of the model's config, MNIST's for image models. Raises PluginError for an unknown
    or broken model and SettingsError for a setting that it does not take.

    >>> model = genfuse.create("vae", genfuse.load_data("digits"), latent_dim=8)
    """
    cls, data = load(name), None if data is None else load_data(data)
    try:
        model: GenerativeModel = cls.from_config(configure(cls, settings, data))
    except NoLevelsError as error:
        raise NoLevelsError(error.places, data.schema.names if data and data.schema else ()) from None
    model.plugin = name
    return model


@torch.no_grad()
def sample_in_parts(
    model: GenerativeModel, n: int, y: Tensor | None = None, generator: torch.Generator | None = None, **options: Any
) -> Iterator[Tensor]:
    """``model.sample`` of n examples, at most 1,024 at a time, with their labels ``y`` (n,) where there are any.

    In parts, since the activations of the networks can be many times the size of what they draw.
    """
    for start in range(0, n, 1024):
        given = {} if y is None else {"y": y[start : start + 1024]}
        yield model.sample(min(n - start, 1024), generator=generator, **given, **options)
