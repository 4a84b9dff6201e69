"""What every generative model is: a module with settings and a few verbs."""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import typeguard
from torch import Tensor, nn

from genfuse import plugins
from genfuse.errors import DataError, SettingsError

if TYPE_CHECKING:
    from genfuse.data import Dataset


class Batch(NamedTuple):
    """Examples (N, *shape) and, where the data set has them, their labels (N,)."""

    x: Tensor
    y: Tensor | None = None


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


class GenerativeModel(nn.Module):
    """Base of every model, third parties' included.

    A subclass names its settings, a frozen dataclass, as ``Config``, builds its networks in ``__init__(config)``, and
    implements `loss` and `sample`. Everything else that it can do shows in which of these verbs it has:
    ``log_prob(x)`` (exact) and ``elbo(x)``, both (N,) in nats; ``encode``, ``decode`` and ``reconstruct``;
    ``trajectory(z)``, a list of what each step of a flow makes of a base sample z (N, D): z itself first, data last.
    A `conditional` model takes labels (N,) in each of them as ``y=``.
    """

    genfuse_api: ClassVar[int] = plugins.API
    Config: ClassVar[type]
    loss_unit: ClassVar[str] = "nats per example"  # of what `loss` returns, as pictures name it
    plugin: str | None = None  # what the user typed to make it

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def players(self) -> list[Player]:
        """Who is optimised: by default one player, ``model``, that owns every parameter, with Adam at 1e-3."""
        return [Player("model", self.parameters(), adam())]

    def loss(self, batch: Batch, player: str) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``player`` minimises: the total and its named terms, each a scalar mean per example, in nats."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def after_step(self, player: str) -> None:
        """Called after each update of ``player``: for weight clipping, warm-up counters and the like."""

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw n examples, (n, *shape), in the range of the data that the model was trained on.

        A subclass may take more: labels ``y`` (n,), and ``temperature``, a factor of the base distribution's spread.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot sample")

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """The verbs that say how likely examples (N, *shape) are, (N,) each: ``log_prob`` and ``elbo``, as it has them.

        Override it where the verbs that can be used depend on the settings, or there are others.
        """
        return tuple(verb for verb in ("log_prob", "elbo") if hasattr(self, verb))

    @property
    def conditional(self) -> bool:
        """Whether it models p(x | y) and takes labels: by default, its setting ``conditional``.

        Its labels are 0 .. ``classes`` - 1, which is a setting too.
        """
        return getattr(self.config, "conditional", False)

    @property
    def drawn_labels(self) -> Tensor:
        """Of a conditional model the labels (K,) that training examples had, of which `sample` draws where it is given
        none: the setting ``seen_labels``, by default all."""
        return torch.tensor(getattr(self.config, "seen_labels", None) or range(self.config.classes))

    def check_data(self, data: "Dataset") -> None:
        """Raise SettingsError where the model was made for other examples, or for labels that ``data`` does not have.

        Extend it for other facts.
        """
        if self.config.shape != data.shape:
            raise SettingsError(
                f"the data set {data.name!r} has examples of shape {data.shape}, but the model was made for "
                f"{self.config.shape}: pass the data set when you make it, as in genfuse.create(name, data)"
            )
        if self.conditional and (bare := [part for part, split in data.splits.items() if split.y is None]):
            raise SettingsError(
                f"the model is conditional and needs labels, but the data set {data.name!r} has none in its splits "
                f"{', '.join(bare)}: use a data set with labels, or a model without `conditional`"
            )
        classes = getattr(self.config, "classes", None)
        if self.conditional and data.classes is not None and classes is not None and data.classes > classes:
            raise SettingsError(
                f"the data set {data.name!r} has labels up to {data.classes - 1}, but the model was made for labels 0.."
                f"{self.config.classes - 1}: pass the data set when you make it, as in genfuse.create(name, data)"
            )

    def watch(self, player: str, step: int, terms: dict[str, float]) -> dict[str, str]:
        """What goes wrong in a training, as {a name for it: what was seen, and what to try}; each is told once.

        Called after ``step`` updates with the mean of each of ``player``'s terms since the last look at them, the
        norm of its gradient as ``gradient_norm`` among them where there are several players.
        """
        return {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def check_range(x: Tensor, levels: int | None, *, always: bool = True) -> None:
    """Raise DataError unless discrete examples x are numbers in [0, 1], as `Dataset.batch` has them.

    Images in 0..255 or [-1, 1] would give other numbers, and no error. Real-valued data (``levels`` None) may hold
    anything. On a GPU, where the answer has to be waited for, it is only looked for if ``always``; never in what is
    compiled or transformed by torch.func.
    """
    if levels is None or not x.numel() or torch.compiler.is_compiling():
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


def transformed() -> bool:
    """Whether this is inside of torch.func's transforms, where values cannot be looked at, nor buffers changed."""
    return torch._C._functorch.maybe_current_level() is not None


SLACK = 1e-3  # by which x may be off for rounding to 16 bits
FACTS = ("shape", "levels", "classes", "seen_labels")  # settings that the data decides, where a model has them


def _facts(config: Any, data: "Dataset") -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config)}
    return {name: getattr(data, name) for name in FACTS if name in names}


def configure(cls: type[GenerativeModel], settings: dict[str, Any], data: "Dataset | None" = None) -> Any:
    """The config of a model class from plain values (as JSON has them), checked against the types of its fields.

    Settings that ``data`` decides (shape, levels, classes) are taken from it unless given. Raises SettingsError for an
    unknown name or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls.Config)
    known = [field.name for field in dataclasses.fields(cls.Config)]
    for name in settings:
        if name not in known:
            raise SettingsError(f"{cls.__name__} has no setting {name!r}; it has: {', '.join(known)}")
    given = dict(settings)
    if data is not None:
        given = {**_facts(cls.Config, data), **given}
    for name, value in given.items():
        if isinstance(value, list):  # JSON has no tuples
            given[name] = value = tuple(value)
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


def create(name: str, data: "Dataset | None" = None, **settings: Any) -> GenerativeModel:
    """Make the model that ``name`` stands for, with the given settings.

    Pass the data set to have ``shape``, ``levels`` and ``classes`` taken from it; without it they are the defaults of
    the model's config, MNIST's for image models. Raises PluginError for an unknown or broken model and SettingsError
    for a setting that it does not take.

    >>> model = genfuse.create("vae", genfuse.load_data("digits"), latent_dim=8)
    """
    cls = plugins.load("models", name)
    model = cls(configure(cls, settings, data))
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
