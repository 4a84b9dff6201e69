"""What models share that may be conditional on labels."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.errors import DataError, SettingsError
from genfuse.models._base import GenerativeModel, check_range

if TYPE_CHECKING:
    from genfuse.data import Dataset


@dataclass(frozen=True)
class ConditionalConfig:
    """Settings of a model that may be conditional. Raises SettingsError for values outside their range."""

    shape: tuple[int, ...] = (1, 28, 28)  # of one example: (C, H, W) or (D,); taken from the data
    levels: int | None = 256  # of discrete data, None for real-valued data; taken from the data
    classes: int | None = None  # of labels; taken from the data
    conditional: bool = False  # model p(x | label) in place of p(x)
    seen_labels: tuple[int, ...] | None = None  # that training examples have, if not all; taken from the data

    def __post_init__(self) -> None:
        if not self.shape or any(size < 1 for size in self.shape):
            raise SettingsError(f"shape must hold sizes of at least 1, got {self.shape}")
        if self.levels is not None and self.levels < 2:
            raise SettingsError(f"levels must be at least 2, or None for real-valued data, got {self.levels}")
        if self.conditional and not self.classes:
            raise SettingsError("conditional needs labels, classes of 1 or more, and there are none: leave it out")

    def check_positive(self, *names: str) -> None:
        """Raise SettingsError unless these settings, numbers or tuples of them, are above 0 and finite."""
        for name in names:
            value = getattr(self, name)
            if not all(0 < each < math.inf for each in (value if isinstance(value, tuple) else (value,))):
                raise SettingsError(f"{name} must be above 0 and finite, got {value}")

    def check_choices(self, **choices: Any) -> None:
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise SettingsError(
                    f"{name} must be one of {', '.join(get_args(literal))}, got {getattr(self, name)!r}"
                )

    @property
    def dimensions(self) -> int:
        """Of an example."""
        return math.prod(self.shape)

    @property
    def context(self) -> int:
        """Features of the context: a label as a one-hot vector."""
        return self.classes or 0 if self.conditional else 0


class ConditionalModel(GenerativeModel):
    """A model of p(x), or with the setting ``conditional`` of p(x | label)."""

    config: ConditionalConfig

    @property
    def conditional(self) -> bool:
        return self.config.conditional

    def _check_levels(self, data: "Dataset") -> None:
        """For `check_data` of a model whose likelihood depends on them."""
        if self.config.levels != data.levels:
            kinds = [f"{n} levels" if n else "real numbers" for n in (data.levels, self.config.levels)]
            raise SettingsError(
                f"the data set {data.name!r} has {kinds[0]}, but the model was made for {kinds[1]}: pass the data set "
                "when you make it, as in genfuse.create(name, data)"
            )

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.config.shape:
            wanted = ", ".join(map(str, self.config.shape))
            raise DataError(f"x must be (N, {wanted}), as the setting `shape` says; got {tuple(x.shape)}")
        check_range(x, self.config.levels, always=not self.training)
        return x

    def _context(self, y: Tensor | None, n: int) -> Tensor | None:
        """Labels as one-hot vectors, (n, classes), or None of a model that is not conditional."""
        if not self.conditional:
            if y is not None:
                raise SettingsError("the model is not conditional, so it takes no labels: leave y out")
            return None
        classes = self.config.context
        if y is None:
            raise SettingsError(f"the model is of p(x | label): give labels y, ({n},), each in 0..{classes - 1}")
        if y.shape != (n,) or y.dtype.is_floating_point:
            raise DataError(f"labels y must be integers ({n},), one for each example; got {y.dtype} {tuple(y.shape)}")
        if n and not torch.compiler.is_compiling() and y.device.type == "cpu" and not 0 <= y.min() <= y.max() < classes:
            raise DataError(f"labels y must be in 0..{classes - 1}; got {int(y.min())}..{int(y.max())}")
        return F.one_hot(y.long(), classes).to(next(self.parameters()))

    def _draw_context(self, n: int, y: Tensor | int | None, generator: torch.Generator | None) -> Tensor | None:
        """`_context` of labels (n,), of one label for all, or of `drawn_labels`, uniformly, where y is left out."""
        if y is None and self.conditional:
            where = torch.device("cpu") if generator is None else generator.device
            labels = self.drawn_labels.to(where)
            y = labels[torch.randint(len(labels), (n,), device=where, generator=generator)]
        elif isinstance(y, int):
            y = torch.full((n,), y)
        return self._context(y, n)
