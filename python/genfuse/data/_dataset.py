"""What a data set is, and how a name becomes one."""

import hashlib
import html
import importlib
import mimetypes
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import plots, plugins
from genfuse._files import warn
from genfuse.data._schema import Scaling, Schema, joined, names_in
from genfuse.errors import DataError, DataWarning, PluginError, SettingsError
from genfuse.nn import Columns
from genfuse.ops import bernoulli

Binarize = Literal["none", "static", "dynamic"]
Header = Literal["auto", "yes", "no"]
Fit = Literal["crop", "pad", "stretch"]
Mode = Literal["", "auto", "L", "RGB"]
Damaged = Literal["refuse", "skip"]
Stream = Literal["auto", "yes", "no"]
# How a table of text is read, and what is usual: whether its first row is names (auto: if none of its cells is a
# number), what stands between cells, and the mark before decimals.
READING = {"header": "auto", "delimiter": ",", "decimal": "."}
# How a folder of pictures is read, and what is usual: the size, or none, and the mode, or none, that all are made to
# be; how the size is reached; what becomes of damaged ones; and whether they are read from a file of the cache.
READING_OF_IMAGES = {"size": "", "fit": "crop", "mode": "", "damaged": "refuse", "stream": "auto"}
# What the user says of the columns of such a table: those to keep, those to leave out, kinds, and the one to predict.
COLUMNS = ("columns", "drop", "types", "target")

# What an image may be given with, made of itself, and what the number after the task's name is, if it has one.
TASKS = {
    "super-resolution": "how many times smaller the sides of the image that is given are, as super-resolution:4",
    "colorize": "",
    "inpaint": "how many cells the sides of the square in its middle are that is missing, as inpaint:10",
}

AHEAD = 8  # batches of a stream that are fetched at once, as a disk is slow to find each example but finds many alike


class Batch(NamedTuple):
    """Examples (N, *shape), and what is given with them, if the data set has it: labels (N,), or a context (N, C) or
    (N, C, h, w)."""

    x: Tensor
    y: Tensor | None = None


@dataclass(frozen=True)
class Mixture:
    """The equally likely Gaussians that data were drawn from, in the units of the data set."""

    centres: tuple[tuple[float, ...], ...]
    std: float  # of every column of every one


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set, in memory."""

    x: Tensor  # (N, *shape): uint8 for discrete data, float32 for real-valued data
    y: Tensor | None = None  # (N,) int64 labels; or float32: a context (N, C) or an image (N, C, h, w) that is given
    factors: Tensor | None = None  # (N, K) int64: what each example was made of, as numbers of `Dataset.factors`
    files: tuple[str, ...] | None = None  # of pictures: where each one was read

    def __post_init__(self) -> None:
        if isinstance(self.x, Tensor):  # rows in one piece: a batch of a transposed array takes 8 times as long
            object.__setattr__(self, "x", self.x.contiguous())

    def __len__(self) -> int:
        return len(self.x)

    def some(self, rows: Tensor | slice) -> "Split":
        """Some of the examples, with all that is given with them."""
        y, factors = (None if each is None else each[rows] for each in (self.y, self.factors))
        places = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Split(self.x[rows], y, factors, self.files and tuple(self.files[i] for i in places))


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Named splits of examples of one shape: ``train``, ``test`` and, if there is one, ``validation``.

    Raises DataError if a split is missing or empty, or its tensors are not what is written beside the fields here.
    """

    name: str  # as the user typed it
    splits: dict[str, Split]
    levels: int | None = None  # discrete data: batches hold k / (levels - 1), k = 0..levels-1; None: real-valued data
    classes: int | None = None  # labels are 0..classes-1; taken from the names or the labels unless given
    class_names: tuple[str, ...] | None = None  # of labels 0, 1, ..., if they have names
    binarize: str = "none"  # how levels became 2: "none" | "static" | "dynamic"
    scaling: Scaling | None = None  # tables: the way back to original units
    stored_levels: int | None = None  # with binarize="dynamic": the levels of the intensities that x holds
    seed: int = 0  # that `load_data` made it with
    mixture: Mixture | None = None  # toys: what they were drawn from, if that is a mixture of Gaussians
    options: dict[str, str] = field(default_factory=dict)  # by which `load_data` had its files read
    condition_scaling: Scaling | None = None  # of the columns that are given as the context y
    source: str | None = None  # the name with an absolute path in it, if it is that of a file or folder
    root: str | None = None  # absolute path of the folder that files of a data set by name were found in
    schema: Schema | None = None  # of a table whose columns are not all numbers without end: what they are
    condition_schema: Schema | None = None  # of the columns of such a table that are given as the context y
    streamed: bool = False  # x lies in a file that may be larger than memory, and is not moved to a device
    batches_on: torch.device | None = None  # where batches go, if x is elsewhere
    channels: "Dataset | None" = None  # of stacked images: the data set that each channel is an example of
    # What all examples were made of, independently, if it is known: {name of a factor: its values, two or more}. The
    # factors (N, K) of a split have these values' numbers 0, 1, ..., a column each, in this order.
    factors: dict[str, tuple[float, ...]] | None = None
    task: str = ""  # of TASKS: what the image y that is given with each example is to it
    before: "Dataset | None" = None  # of a task: the data without it, with its labels

    def __post_init__(self) -> None:
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            if self.classes is None:
                object.__setattr__(self, "classes", len(self.class_names))
        if problem := self._problem():
            raise DataError(f"data set {self.name!r}: {problem}")
        if self.classes is None and self.splits["train"].y is not None and self.splits["train"].y.dim() == 1:
            classes = 1 + max(int(split.y.max()) for split in self.splits.values() if split.y is not None)
            object.__setattr__(self, "classes", classes)

    def _problem(self) -> str | None:
        if missing := [part for part in ("train", "test") if part not in self.splits]:
            return f"it has no {' and no '.join(missing)} split; it has: {', '.join(self.splits) or 'none'}"
        stored = self.stored_levels or self.levels
        if stored is not None and not 2 <= stored <= 256:
            return f"levels must be 2..256, or None for real-valued data; got {stored}"
        dynamic = self.binarize == "dynamic"
        if dynamic != (self.stored_levels is not None) or (dynamic and self.levels != 2):
            return "binarize='dynamic', and nothing else, needs stored_levels, and levels=2"
        names = self.class_names
        if names is not None and (len(names) != self.classes or len(set(names)) < len(names)):
            return f"class_names must be {self.classes} different names, one for each class; got {', '.join(names)}"
        dtype = torch.float32 if stored is None else torch.uint8
        for part, split in self.splits.items():
            x, y = split.x, split.y
            if not isinstance(x, Tensor) or x.dtype != dtype:
                got = getattr(x, "dtype", type(x).__name__)
                return f"x of the {part} split must be a tensor of {dtype}, as levels={stored}; got {got}"
            if x.ndim < 2 or x.numel() == 0:
                return f"x of the {part} split must be (N, *shape) and not empty; got {tuple(x.shape)}"
            if x.shape[1:] != self.splits["train"].x.shape[1:]:
                return f"examples of the {part} split have shape {tuple(x.shape[1:])}, those of train {self.shape}"
            if x.ndim == 4 and x.shape[3] in (1, 3) and min(x.shape[1:3]) > 4:
                return f"images must be (N, C, H, W), with the channels before the rows; x of the {part} split is " + (
                    f"{tuple(x.shape)}, which has them last: use x.permute(0, 3, 1, 2)"
                )
            if self.schema is not None and x.dim() == 2 and len(self.schema.columns) == x.shape[1]:
                x = x.masked_fill(x.isnan() & x.new_tensor([c.missing for c in self.schema.columns]).bool(), 0.0)
            if stored is None and not x.isfinite().all():
                return f"x of the {part} split has {int((~x.isfinite()).sum())} NaN or infinite values"
            if stored is not None and stored < 256 and int(x.max()) >= stored:
                return f"x of the {part} split has the value {int(x.max())}, but levels={stored} ends at {stored - 1}"
            if problem := self._problem_of_factors(part):
                return problem
            if y is None:
                continue
            if isinstance(y, Tensor) and y.dtype == torch.float32 and y.dim() > 1:
                first = self.splits["train"].y
                if y.dim() not in (2, 4) or len(y) != len(x) or first is None or y.shape[1:] != first.shape[1:]:
                    alike = f"({len(x)}, C) or ({len(x)}, C, h, w), with one C"
                    return f"the context y of the {part} split must be {alike}; got {tuple(y.shape)}"
                if not y.isfinite().all():
                    return f"the context y of the {part} split has {int((~y.isfinite()).sum())} NaN or infinite values"
                continue
            if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (len(x),):
                got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                return f"y of the {part} split must be an int64 tensor of shape ({len(x)},); got {got}"
            if int(y.min()) < 0 or (self.classes is not None and int(y.max()) >= self.classes):
                return f"labels of the {part} split are {int(y.min())}..{int(y.max())}; they must be 0..classes-1"
        return None

    def _problem_of_factors(self, part: str) -> str | None:
        found, sizes = self.splits[part].factors, {name: len(values) for name, values in (self.factors or {}).items()}
        if found is None and not sizes:
            return None
        wanted = (
            f"factors of the {part} split must be int64 ({len(self.splits[part])}, K), the numbers of the values of "
        )
        kind = getattr(found, "dtype", type(found)), *getattr(found, "shape", ())
        if not sizes or min(sizes.values()) < 2 or kind != (torch.int64, len(self.splits[part]), len(sizes)):
            return f"{wanted}{sizes}, two or more each; got {', '.join(map(str, kind))}"
        assert found is not None
        low, high = found.amin(0).tolist(), found.amax(0).tolist()
        wrong = min(low) < 0 or any(most >= size for most, size in zip(high, sizes.values(), strict=True))
        return f"{wanted}{sizes}, from 0; got {low} to {high}" if wrong else None

    def __repr__(self) -> str:
        values = "real-valued" if self.levels is None else f"{self.levels} levels"
        sizes = ", ".join(f"{part} {len(split)}" for part, split in self.splits.items())
        return f"<Dataset {self.name!r}: {sizes}; shape {self.shape}, {values}, classes {self.classes}>"

    def _repr_html_(self) -> str:
        """For notebooks: `repr`, and examples: pictures from all over the training split, which may be in the order of
        its labels, or the first rows, in original units."""
        import pandas as pd

        over = torch.linspace(0, self.examples - 1, min(32, self.examples)).round().long()
        x = self.batch("train", over.to(self.splits["train"].x.device) if self.is_image else slice(0, 5)).x
        if self.is_image:
            shown = plots.as_html(plots.sample_grid, x, suffix="png")
        elif len(self.shape) == 1:
            schema = Schema.of_scaling(self.scaling) if self.scaling and self.schema is None else self.schema
            rows = pd.DataFrame(x.numpy(force=True)) if schema is None else schema.decode(x)
            shown = rows.iloc[:, :20].to_html(index=False, float_format="{:.6g}".format)
        else:
            shown = ""
        return f"<p>{html.escape(repr(self))}</p>{shown}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example: (C, H, W) for images, (D,) for rows of a table."""
        return tuple(self.splits["train"].x.shape[1:])

    @property
    def examples(self) -> int:
        """How many the training split has."""
        return len(self.splits["train"])

    @property
    def is_image(self) -> bool:
        """Whether examples are images (C, H, W)."""
        return len(self.shape) == 3

    @property
    def is_clip(self) -> bool:
        """Whether examples are clips (T, C, H, W)."""
        return len(self.shape) == 4

    @property
    def columns(self) -> tuple[dict[str, Any], ...] | None:
        """What `genfuse.nn.Columns` is made of, for a table whose columns are not all numbers without end."""
        return None if self.schema is None else self.schema.specs()

    @property
    def plain(self) -> bool:
        """Whether all values are numbers, with no cell missing and no code of a category among them."""
        return self.schema is None or self.schema.plain

    def described(self) -> Schema:
        """The schema of a table, one of numbers alone too. Raises DataError for what is no table."""
        if self.schema is not None:
            return self.schema
        if self.scaling is None:
            raise DataError(f"the data set {self.name!r} is no table")
        values = self.scaling.restore(self.splits["train"].x).cpu().numpy()
        return Schema.of_scaling(self.scaling).fitted(values, self.scaling.mean, self.scaling.std)

    @property
    def condition(self) -> int:
        """C of the context (N, C) that is given with the examples; 0 if there is none, or there are labels."""
        y = self.splits["train"].y
        return y.shape[1] if y is not None and y.dim() == 2 else 0

    @property
    def given(self) -> tuple[int, ...] | None:
        """The shape (C, h, w) of the image that is given with each example, if there is one: see `with_task`."""
        y = self.splits["train"].y
        return tuple(y.shape[1:]) if y is not None and y.dim() == 4 else None

    @property
    def seen_labels(self) -> tuple[int, ...] | None:
        """The labels that training examples have, if these are not all of 0..classes-1; else None."""
        y = self.splits["train"].y
        seen = None if y is None or y.dim() > 1 else tuple(y.unique().tolist())
        return None if seen is None or len(seen) == self.classes else seen

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.batches_on or self.splits["train"].x.device

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device; of what is streamed, or would fill half of its memory, the batches."""
        device = torch.device(device)
        size = sum(split.x.nbytes for split in self.splits.values() if split.x.device != device)
        if self.streamed or (device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0] / 2):
            return replace(self, batches_on=device)
        moved = {
            part: replace(split, x=split.x.to(device), y=None if split.y is None else split.y.to(device))
            for part, split in self.splits.items()
        }
        return replace(self, splits=moved, batches_on=None)

    def batch(self, split: str, index: Tensor | slice, generator: torch.Generator | None = None) -> Batch:
        """Examples of a split: x (N, *shape) float32, in [0, 1] for discrete data; y (N,) or None.

        ``index`` is a slice or a tensor (N,) of integers. With ``binarize="dynamic"`` each cell is drawn anew at each
        call, Bernoulli(intensity), from ``generator``, on the data's device (default: torch's global generator).
        A slice of real-valued data shares its memory with the data set.
        """
        return self._finished(*self._rows(split, index), generator)

    def batches(self, split: str, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """`batch` of each of ``indices``. Where the data is not on the device of the batches, or is streamed, the next
        ones are fetched by threads meanwhile; what is random is drawn in turn, as `batch` does."""
        if not (self.streamed or self.batches_on):
            yield from (self.batch(split, index) for index in indices)
            return
        with ThreadPoolExecutor(AHEAD) as pool:
            ahead: deque[Future[tuple[Tensor, Tensor | None]]] = deque()
            for index in indices:
                ahead.append(pool.submit(self._rows, split, index))
                if len(ahead) > AHEAD:
                    yield self._finished(*ahead.popleft().result())
            while ahead:
                yield self._finished(*ahead.popleft().result())

    def _rows(self, split: str, index: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Examples as they are stored, on the device of the batches."""
        source = self.splits[split]
        if isinstance(index, slice):
            x, y = source.x[index], None if source.y is None else source.y[index]
        else:  # index_select: half the time of source.x[index], and 1/10 for images in uint8
            index = index.to(source.x.device)
            x = source.x.index_select(0, index)
            y = None if source.y is None else source.y.index_select(0, index)
        if self.batches_on:
            x = (x.pin_memory() if self.batches_on.type == "cuda" else x).to(self.batches_on, non_blocking=True)
            y = None if y is None else y.to(self.batches_on)
        return x, y

    def _finished(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None = None) -> Batch:
        if self.levels is None:
            return Batch(x, y)
        x = x.float().div_((self.stored_levels or self.levels) - 1)
        if self.binarize == "dynamic":
            x = bernoulli(x, generator=generator)
        return Batch(x, y)

    def binarized(self, how: Binarize, seed: int = 0) -> "Dataset":
        """Discrete data with each cell drawn Bernoulli(intensity): anew in each batch, or ("static") once, by ``seed``.

        Data that is binary already, and any data with "none", is returned as it is. Raises DataError for real-valued
        data, which has no intensities.
        """
        if how not in get_args(Binarize):
            raise DataError(f"binarize must be one of {', '.join(get_args(Binarize))}; got {how!r}")
        if how == "none" or self.levels == 2:
            return self
        if self.levels is None:
            raise DataError(f"data set {self.name!r} cannot be binarized: its values are no intensities in [0, 1]")
        drawn = replace(self, binarize="dynamic", levels=2, stored_levels=self.levels)
        if how == "dynamic":
            return drawn
        if self.streamed:
            raise DataError(f"data set {self.name!r} is too large to be binarized once: use dynamic")
        generator = torch.Generator().manual_seed(seed)

        def draw(part: str) -> Tensor:
            starts = range(0, len(self.splits[part]), 1024)  # a part at a time, as float32 is 4 times the memory
            return torch.cat([drawn.batch(part, slice(i, i + 1024), generator).x.to(torch.uint8) for i in starts])

        splits = {part: replace(split, x=draw(part)) for part, split in self.splits.items()}
        return replace(self, binarize="static", levels=2, splits=splits)

    def with_validation(self, share: float = 0.1) -> "Dataset":
        """The data with a validation split: if it has none, a share of the training examples, by chance and `seed`.

        ``options`` then say so, by which `load_data` makes the same split again. Raises DataError for a share that is
        not between 0 and 1, or that leaves either split without an example.
        """
        if "validation" in self.splits:
            return self
        if self.streamed:
            raise DataError(f"data set {self.name!r} is streamed: make its validation split yourself, as a folder")
        train = self.splits["train"]
        held = round(share * len(train)) if 0 < share < 1 else 0
        if not 0 < held < len(train):
            raise DataError(
                f"data set {self.name!r}: a share of {share:g} of its {len(train)} training examples makes no "
                "validation split: it must be above 0 and below 1, and leave both splits an example"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).to(train.x.device)
        rows = {"train": order[held:].sort().values, "validation": order[:held].sort().values}
        made = {part: train.some(i) for part, i in rows.items()}
        return replace(self, splits={**self.splits, **made}, options={**self.options, "validation": f"{share:g}"})

    def with_task(self, task: str) -> "Dataset":
        """Images that are given with an image made of themselves, y (N, c, h, w) in [0, 1], 256 levels, as the context:
        by ``task``, "super-resolution:4", the mean of each 4 x 4 cells (box filter, which aliases least); "colorize",
        its grey (ITU-R 601); "inpaint:10", itself without the 10 x 10 cells in its middle. Labels are left out.

        Raises DataError for another task, data that is no images, that is streamed or drawn anew in each batch, and
        sides that the factor does not divide.
        """
        name, _, number = task.partition(":")

        def refuse(problem: str) -> DataError:
            return DataError(f"data set {self.name!r}, task {task}: {problem}")

        if name not in TASKS or bool(number) != bool(TASKS[name]) or not (number or "2").isdecimal():
            known = "; ".join(f"{each} ({says})" if says else each for each, says in TASKS.items())
            raise refuse(f"tasks are: {known}")
        if not self.is_image or self.levels is None:
            raise refuse(f"it is for images of levels, (C, H, W); its examples have shape {self.shape}")
        if self.condition or self.streamed or self.binarize == "dynamic":
            raise refuse("the images must be in memory, not drawn anew in each batch, and given with nothing else")
        height, width = self.shape[1:]
        k = int(number or 2)
        if k < (2 if name == "super-resolution" else 1) or (name == "inpaint" and k >= min(height, width)):
            raise refuse(f"{number} must be {TASKS[name]}: at least 2 and, of a square, below {min(height, width)}")
        if name == "super-resolution" and (height % k or width % k or min(height, width) < 2 * k):
            raise refuse(f"{k} must divide both sides of the images, {height} x {width}, and leave 2 cells or more")
        if name == "colorize" and self.shape[0] != 3:
            raise refuse("the images are grey already")
        bare = {part: replace(split, y=None) for part, split in self.splits.items()}
        of_task = replace(self, splits=bare, task=task, before=self, classes=None, class_names=None)
        splits = {part: replace(split, y=torch.cat([of_task.given_of(self.batch(part, slice(i, i + 1024)).x)
                                                    for i in range(0, len(split), 1024)]))
                  for part, split in bare.items()}  # fmt: skip
        return replace(of_task, splits=splits, options={**self.options, "task": task})

    def given_of(self, x: Tensor) -> Tensor:
        """What `task` gives with images x (N, C, H, W) in [0, 1]: (N, c, h, w)."""
        name, _, number = self.task.partition(":")
        if name == "super-resolution":
            y = F.avg_pool2d(x, int(number))
        elif name == "colorize":
            y = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        else:
            k, (height, width) = int(number), x.shape[2:]
            top, left = (height - k) // 2, (width - k) // 2
            y = x.clone()
            y[:, :, top : top + k, left : left + k] = 0
        return (y * 255).round() / 255

    def conditioned(self, columns: Sequence[str]) -> "Dataset":
        """A table whose ``columns`` are given, and no longer modelled: batches hold them as the context y (N, C).

        Columns are called by name, or by number from 1 if they have none. Raises DataError for data that is no table of
        real numbers, that has labels, or that has no such column, and if no column were left.
        """

        def refuse(problem: str) -> DataError:
            return DataError(f"data set {self.name!r}, condition {','.join(columns)}: {problem}")

        if self.levels is not None or len(self.shape) != 1:
            raise refuse("only columns of a table of real numbers can be given")
        if self.splits["train"].y is not None:
            raise refuse("the data has labels, or a condition, already: use one or the other")
        names = self.scaling.names if self.scaling else None
        known = names or tuple(str(i + 1) for i in range(self.shape[0]))
        for column in columns:
            if known.count(column) != 1:
                which = "is the name of several columns" if column in known else "is none of"
                raise refuse(f"{column!r} {which} {', '.join(known)}")
        if len(set(columns)) < len(columns):
            raise refuse("each column can be given once")
        given = [known.index(column) for column in columns]
        rest = [i for i in range(len(known)) if i not in given]
        if not rest:
            raise refuse("all columns are given: at least one must be left to be modelled")

        y = {part: split.x[:, given].contiguous() for part, split in self.splits.items()}
        schemas: dict[str, Any] = {}
        if self.schema is not None:
            kept, context = self.schema.some(rest), self.schema.some(given)
            schemas = {"schema": None if kept.real else kept}
            if not context.real:  # categories one-hot
                y = {part: Columns(context.specs()).encode(each) for part, each in y.items()}
                schemas["condition_schema"] = context
        splits = {part: replace(split, x=split.x[:, rest], y=y[part]) for part, split in self.splits.items()}
        return replace(self, splits=splits, scaling=self.scaling and self.scaling.some(rest), mixture=None,
                       condition_scaling=self.scaling and self.scaling.some(given), **schemas)  # fmt: skip

    def fingerprint(self, split: str | None = None) -> str:
        """16 hex digits that stand for the content of all splits, shape, levels and scaling; or for one split alone."""
        digest = hashlib.sha256(repr((self.shape, self.levels, self.stored_levels)).encode())
        if split is None:
            parts = [(part, self.fingerprint(part)) for part in sorted(self.splits)]
            digest.update(repr((parts, self.classes, self.scaling and asdict(self.scaling))).encode())
            if not self.plain and self.schema is not None:  # what the codes in the splits mean
                digest.update(repr([(c.name, c.kind, c.categories, c.form) for c in self.schema.columns]).encode())
            return digest.hexdigest()[:16]
        for tensor in (self.splits[split].x, self.splits[split].y):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


def augmented(x: Tensor, flip: bool, shift: int, generator: torch.Generator | None = None) -> Tensor:
    """Images (N, C, H, W) or clips (N, T, C, H, W), each mirrored left to right with probability 1/2 if ``flip``, and
    moved along both axes by -shift..shift pixels; what comes in at an edge repeats it. ``generator`` is one of the
    CPU."""
    n, (h, w) = len(x), x.shape[-2:]
    moves = torch.randint(-shift, shift + 1, (2, n, 1), generator=generator)
    mirrored = torch.randint(2, (n, 1), generator=generator).bool() & flip
    rows = (torch.arange(h) + moves[0]).clamp(0, h - 1)
    columns = (torch.arange(w) + moves[1]).clamp(0, w - 1)
    columns = torch.where(mirrored, columns.flip(1), columns)
    cells = (rows[:, :, None] * w + columns[:, None]).view(n, 1, h * w).to(x.device)
    planes = x.reshape(n, -1, h * w)
    return planes.gather(2, cells.expand(-1, planes.shape[1], -1)).view_as(x)


def resized(images: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """Images (N, C, h, w) in [0, 1] at another height and width as Pillow makes them, of 8 bits a channel; ``method``
    is one of its resampling filters: "nearest", "bicubic", "lanczos" and so on."""
    from PIL import Image

    cells = (images.detach().clamp(0, 1) * 255).round().byte().cpu().flatten(0, 1).numpy()
    how = Image.Resampling[method.upper()]
    made = [np.asarray(Image.fromarray(channel).resize(size[::-1], how)) for channel in cells]
    return (torch.from_numpy(np.stack(made)).unflatten(0, images.shape[:2]) / 255).to(images.device)


@dataclass(frozen=True)
class Source:
    """What a data set plugin is given: where to take the data from."""

    name: str  # as the user typed it, "csv:PATH"; the name of the data set
    argument: str | None = None  # what stands after the first ':' behind the plugin's name
    root: Path | None = None  # --data-root, else GENFUSE_DATA
    seed: int = 0  # rules every random choice: which rows are held out, what a toy draws
    options: Mapping[str, str] = field(default_factory=dict)  # of READING, those that the user gave
    found: dict[str, str] = field(default_factory=dict)  # where the data was: its absolute "source", or its "root"
    whole: bool = False  # nothing is held out
    given: Any = None  # what `load_data` was given in place of a name

    def no_options(self, *but: str) -> None:
        """Raise SettingsError if the user gave options of tables of text or of folders of pictures, ``but`` these."""
        if given := [option for option in self.options if option not in but]:
            kind = "images:FOLDER" if given[0] in READING_OF_IMAGES else "csv:PATH"
            raise SettingsError(f"data set {self.name!r}: {', '.join(given)} are for {kind}; leave them out")

    def no_argument(self) -> None:
        """Raise DataError if the user gave an argument."""
        if self.argument is not None:
            raise DataError(f"data set {self.name!r}: it takes no argument; got {self.argument!r}")

    def path(self) -> Path:
        """The argument as the path of something that exists. Raises DataError otherwise."""
        if self.argument is None:
            raise DataError(f"data set {self.name!r}: the path is missing; write {self.name.rstrip(':')}:PATH")
        path = Path(self.argument).expanduser()
        if not path.exists():
            raise DataError(f"data set {self.name!r}: there is no file or folder {path.absolute()}")
        self.found["source"] = self.name.removesuffix(self.argument) + str(path.absolute())
        return path

    def files(self, folders: Sequence[str], *wanted: Sequence[str]) -> list[Path]:
        """One path for each of ``wanted``, which lists the names that a file may have.

        All come from the first of ``folders`` ("" for the root itself) that has any of them, so that two data sets in
        one root are never mixed. Raises DataError that says what was looked for, if, and what to do.
        """
        places = [self.root / folder for folder in folders] if self.root else []
        place = next((at for at in places if any((at / name).is_file() for names in wanted for name in names)), None)
        found = [[place / name for name in names if place and (place / name).is_file()] for names in wanted]
        if self.root and all(found):
            self.found["root"] = str(self.root.absolute())
            return [paths[-1] for paths in found]
        lines = "\n  ".join(" or ".join(names) for names, paths in zip(wanted, found, strict=True) if not paths)
        looked = " and ".join(map(str, [place] if place else places)) or "no folder, as none is named"
        raise DataError(
            f"data set {self.name!r}: not found:\n  {lines}\nLooked in {looked}. Put what is missing into "
            f"{Path('ROOT', folders[0])}, and name ROOT by --data-root or by the environment variable GENFUSE_DATA "
            f"(now: {self.root or 'neither is given'})"
        )

    def hold_out(self, count: int, what: str = "rows") -> dict[str, Tensor]:
        """Which of ``count`` examples are for training and which, one in five by chance, for testing.

        Returns the indices of "train" and "test", in rising order; if nothing is to be held out both have all. Raises
        DataError if there are fewer than five.
        """
        if self.whole:
            return dict.fromkeys(("train", "test"), torch.arange(count))
        if count < 5:
            raise DataError(f"data set {self.name!r}: {count} {what} are too few: 5 or more, one in five is held out")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return {"train": order[count // 5 :].sort().values, "test": order[: count // 5].sort().values}


def kind_of(path: Path) -> str:
    """The data set that a file or folder is meant for, as it seems: images, npy, npz or csv."""
    if path.is_dir():
        inside = {file.name.lower() for file in path.iterdir()}
        kinds = {"csv": ("train.csv",), "npy": ("train.npy", "x.npy", "x_train.npy")}
        return next((kind for kind, names in kinds.items() if inside.intersection(names)), "images")
    if (mimetypes.guess_type(path.name)[0] or "").startswith("image/"):
        return "images"
    return {".npy": "npy", ".npz": "npz"}.get(path.suffix.lower(), "csv")


def load_data(
    name: Any,
    *,
    root: str | Path | None = None,
    binarize: Binarize = "none",
    seed: int = 0,
    header: Header = "auto",
    delimiter: str = ",",
    decimal: str = ".",
    condition: str | Sequence[str] = (),
    validation: float | str = 0,
    hold_out: bool = True,
    columns: str | Sequence[str] = (),
    drop: str | Sequence[str] = (),
    types: str | Mapping[str, str] = "",
    target: str = "",
    size: str | int | Sequence[int] = "",
    fit: Fit = "crop",
    mode: Mode = "",
    damaged: Damaged = "refuse",
    stream: Stream = "auto",
    task: str = "",
) -> Dataset:
    """Load the data set that ``name`` stands for, into memory unless it is a folder of too many pictures.

    ``name`` is NAME or NAME:ARGUMENT, as in "mnist", "csv:PATH", "images:FOLDER", "toy:moons"; for a plugin whose name
    another one has as well, DISTRIBUTION:NAME or DISTRIBUTION:NAME:ARGUMENT. Files of data sets by name are looked for
    under ``root``, else under the environment variable GENFUSE_DATA. ``seed`` rules how tables are split, what toys
    draw, and static binarization. ``header``, ``delimiter`` and ``decimal`` say how text is read (`READING`).
    ``condition`` names columns of a table, "a,b" or a sequence, that are given, not modelled (`Dataset.conditioned`).
    ``columns`` and ``drop`` name those of a CSV file that are read and that are left out; ``types`` says what kinds
    columns are, "a=category,b=date:%d/%m/%Y" or a dict, in place of what is seen (`Schema`); ``target`` names the
    column that metrics predict.
    ``validation`` is the share of the training examples that `Dataset.with_validation` makes a split of. Without
    ``hold_out`` data that comes in one piece is not split: ``train`` and ``test`` both have all examples in order.

    ``task`` gives an image with each image, made of it, as "super-resolution:4" does (`Dataset.with_task`).

    In place of a name, data itself is taken (`genfuse.data.objects`): a DataFrame, an array or tensor of rows or
    images, a torch Dataset or DataLoader, a tuple (examples, labels), or a dict of these by split.

    All of a folder of pictures are made to be of ``size``, one side in pixels or a height and a width, if it is given:
    by ``fit`` cropped to the middle, padded with black, or stretched. ``mode`` makes all grey ("L") or "RGB", or grey
    if all are ("auto"). ``damaged="skip"`` leaves out, with a warning, those that cannot be read. ``stream`` says
    whether pixels are read from a file in $GENFUSE_CACHE ("yes"); "auto": if they would fill half of the memory.

    Raises DataError if the data is absent, damaged or not of the kind that the name promises, and PluginError where
    the name is unknown or its plugin fails.

    >>> data = load_data("digits")
    >>> data.shape, data.levels, data.classes
    ((1, 8, 8), 17, 10)
    """
    if isinstance(name, Dataset):
        return name
    given = None
    if not isinstance(name, str):
        given, name = name, f"<{type(name).__name__}>"
    elif name.startswith("<"):
        raise DataError(f"the data set {name} was given in memory, from Python, and can only be given there again")
    root = root or os.environ.get("GENFUSE_DATA") or None
    head, _, argument = name.partition(":")
    if given is None and head not in {plugin.name for plugin in plugins.discover("datasets")} and argument:
        short, _, argument = argument.partition(":")
        head = f"{head}:{short}"
    if given is None and head and not argument and (path := Path(name)).exists():
        kind = kind_of(path)
        if head not in {plugin.name for plugin in plugins.discover("datasets")}:
            raise PluginError(f"there is no data set {name!r}, but a file or folder: say {kind}:{name}")
        if root is None or path.resolve() != Path(root, name).expanduser().resolve():
            warn(
                f"{name!r} is the data set of that name (genfuse list datasets); what lies here as {name} is "
                f"{kind}:{name}",
                DataWarning,
            )
    plugin = plugins.find("datasets", "csv" if given is not None else head)
    said: dict[str, Any] = {"header": header, "delimiter": delimiter, "decimal": decimal, "size": size, "fit": fit,
                            "mode": mode, "damaged": damaged, "stream": stream, "columns": columns, "drop": drop,
                            "types": [f"{name}={kind}" for name, kind in types.items()] if isinstance(types, Mapping)
                            else types, "target": target}  # fmt: skip
    texts = {key: str(of) if isinstance(of, (str, int)) else joined([*map(str, of)]) for key, of in said.items()}
    options = {key: text for key, text in texts.items() if text != {**READING, **READING_OF_IMAGES}.get(key, "")}
    source = Source(name, argument or None, Path(root).expanduser() if root else None, seed, options,
                    whole=not hold_out, given=given)  # fmt: skip
    if plugin.distribution == plugins.OURS:
        source.no_options(*{"csv": (*READING, *COLUMNS), "images": READING_OF_IMAGES}.get(plugin.name, ()))
    # By its name, as plugins are loaded: it imports this module.
    make = plugin.load() if given is None else importlib.import_module("genfuse.data.objects").objects
    try:
        data = make(source)
    except Exception as error:
        if plugin.distribution == plugins.OURS:
            if isinstance(error, OSError):  # a file that may not be read, a folder where a file is meant
                raise DataError(f"data set {name!r}: {error}") from error
            raise
        if isinstance(error, DataError):
            raise DataError(f"{plugin}: {error}") from error
        raise PluginError(f"{plugin} failed: {type(error).__name__}: {error}") from error
    if not isinstance(data, Dataset):
        raise PluginError(f"{plugin} must return a genfuse.data.Dataset; it returned {type(data).__name__}")
    _warn_of_unseen(data)
    known = () if data.scaling is None else data.described().names
    if target and target not in known:
        raise SettingsError(f"--data.target: the data set {name!r} has no column {target}; it has: {', '.join(known)}")
    conditions = names_in(condition) if isinstance(condition, str) else [*map(str, condition)]
    if conditions:
        data, options = data.conditioned(conditions), {**options, "condition": joined(conditions)}
    data = replace(data, name=name, seed=seed, options=options, **source.found)  # type: ignore[arg-type]
    data = (data.with_validation(float(validation)) if float(validation) else data).binarized(binarize, seed)
    return data.with_task(task) if task else data


def _warn_of_unseen(data: Dataset) -> None:
    """Warn of labels that the training split has none of: a class that is written otherwise there, perhaps."""
    y = {part: split.y.unique().tolist() for part, split in data.splits.items() if split.y is not None and data.classes}
    for part in y if "train" in y else ():
        if unseen := [data.class_names[label] if data.class_names else str(label)
                      for label in y[part] if label not in y["train"]]:  # fmt: skip
            warn(
                f"data set {data.name!r}: the {part} split has the labels {', '.join(unseen[:9])}"
                f"{', ...' if len(unseen) > 9 else ''}, which no training example has",
                DataWarning,
            )
