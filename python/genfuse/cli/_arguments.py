"""What arguments of several commands mean."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from genfuse._files import plain
from genfuse.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from genfuse.data import Dataset, Schema


@dataclass(frozen=True)
class DataOptions:
    """How `load_data` reads what --data names."""

    binarize: Literal["none", "static", "dynamic"] = "none"  # draw each cell as 0 or 1: once, or anew for each batch
    seed: int = 0  # of a table's split and of static binarization; --seed has no part in these
    header: Literal["auto", "yes", "no"] = "auto"  # csv: the first row is names; auto: if no cell of it is a number
    delimiter: str = ","  # csv: what stands between cells, such as ; or tab
    decimal: str = "."  # csv: the mark before decimals: . or ,
    columns: str = ""  # csv: columns that are read, as a,b; left out: all
    drop: str = ""  # csv: columns that are left out, as a,b
    types: str = ""  # csv: kinds of columns, as a=category,b=date:%d/%m/%Y: number, integer, category, boolean or date
    target: str = ""  # tables: the column that `genfuse evaluate` predicts; left out, the last of categories
    condition: str = ""  # tables: columns that are given and not modelled, as a,b: the model is p(the others | a, b)
    validation: float = 0.0  # share of the training examples to make a validation split of; 0.1 if one is needed
    size: str = ""  # pictures: one side in pixels, or HEIGHT,WIDTH, that all are made to have
    fit: Literal["crop", "pad", "stretch"] = "crop"  # pictures: how that size is reached
    mode: Literal["", "auto", "L", "RGB"] = ""  # pictures: make all grey (L) or RGB; auto: grey if all are
    damaged: Literal["refuse", "skip"] = "refuse"  # pictures: what becomes of those that cannot be read
    task: str = ""
    """images: give each with one made of it: super-resolution:4 (or another factor), colorize, inpaint:10"""
    stream: Literal["auto", "yes", "no"] = "auto"  # pictures: read pixels from a file; auto: if memory is too small


READ_AS_USUAL = DataOptions()


@dataclass(frozen=True)
class Given:
    """What commands take that do something with the examples of a file."""

    split: Literal["train", "validation", "test"] = "test"  # of a data set that comes in splits
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None
    """folder with the data sets that are read from files"""
    device: str = "auto"  # auto, cpu, cuda, mps, or one of several: cuda:1
    overwrite: bool = False  # replace an existing file


AS_USUAL = Given()


def find_device(name: str) -> "torch.device":
    """The device that a user means. Raises SettingsError if this machine or this PyTorch does not have it."""
    import torch

    if name == "auto":
        return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    reason = "no such device"
    if name.partition(":")[0] in ("cpu", "cuda", "mps"):
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    raise SettingsError(f"--device must be auto, cpu, cuda, cuda:N or mps; got {name}: {reason}")


def refuse_existing(file: Path, overwrite: bool) -> None:
    """Raise SettingsError if a file is there that may not be replaced."""
    if file.exists() and not overwrite:
        raise SettingsError(f"{file} exists: name another file, or pass --overwrite")


def show_table(heads: Iterable[object], rows: Iterable[Iterable[object]], of_numbers: bool = True) -> None:
    """Print a table as it is, without markup: numbers with 5 digits, and where it is ``of_numbers`` to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def text(cell: object) -> Text:
        return Text(plain(f"{cell:.5g}" if isinstance(cell, float) else cell))

    table = Table(box=box.HEAVY_HEAD if of_numbers else box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(text(head), justify="right" if i and of_numbers else "left")
    for row in rows:
        table.add_row(*map(text, row))
    Console().print(table)


def load_told(name: str, said: Sequence[str] = (), **options: Any) -> "Dataset":
    """`load_data`, with its warnings but for those that hold one of ``said``, and those that `show_columns` prints."""
    from genfuse.data import load_data

    data = None
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            data = load_data(name, **options)
    finally:
        said = [*said, *([" is left out: "] if data is not None and data.schema is not None else [])]
        for each in told:
            if not any(text in str(each.message) for text in said):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return data


def show_columns(schema: "Schema") -> None:
    """Print what the columns of a table are taken for."""
    show_table(("column", "kind", "values", "missing"), schema.describe(), of_numbers=False)


def show_pictures(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Print how many pictures a folder holds, of which modes and sizes, and those that cannot be read; returns what
    `load_data` would say again, and the options that it needs."""
    from genfuse.data.images import so_many, survey

    found = survey(folder)
    print(plain(f"{folder}: {sum(len(sizes) for sizes in found.sizes.values()):,} pictures"))
    rows = []
    for (mode, form), sizes in sorted(found.sizes.items(), key=lambda each: -len(each[1])):
        widths, heights = zip(*sizes, strict=True)
        each = f"{len(set(sizes))} sizes, {min(widths)} to {max(widths)} x {min(heights)} to {max(heights)}"
        rows.append((mode, form, f"{len(sizes):,}", each if len(set(sizes)) > 1 else f"{widths[0]} x {heights[0]}"))
    show_table(("mode", "format", "pictures", "width x height"), rows, of_numbers=False)
    for note, paths in found.notes.items():
        what = "other files" if note == "are not read" else "of the pictures"
        print(plain(f"{so_many(paths, what, note)}, such as {paths[0]}"))
    for error in found.unread:
        print(plain(f"not read: {error}"))
    several = len({size for each in found.sizes.values() for size in each}) > 1
    modes = {mode for mode, _ in found.sizes}
    plain_modes = len(modes) == 1 and modes <= {"L", "RGB"}
    needs = {"size": "64" if several else "", "mode": "" if plain_modes else "auto",
             "damaged": "skip" if found.unread else ""}  # fmt: skip
    return [*(note.partition(" ")[2] for note in found.notes), "left out, such as", "not read ("], needs


def show_data(data: "Dataset") -> None:
    """Print splits, shape, classes, factors and values of examples that are no rows of a table with names."""
    import torch

    splits = ", ".join(f"{part} {len(split):,}" for part, split in data.splits.items())
    kind = "real-valued" if data.levels is None else f"{data.levels} levels"
    print(plain(f"{data.name}: {splits} examples of shape {data.shape}, {kind}"))
    y = data.splits["train"].y
    if data.classes and y is not None:
        counts = y.bincount(minlength=data.classes).tolist()
        names = data.class_names or [*map(str, range(data.classes))]
        each = ", ".join(f"{name} {count:,}" for name, count in zip(names[:10], counts, strict=False))
        print(plain(f"{data.classes:,} classes, of training examples: {each}{', ...' if data.classes > 10 else ''}"))
    for name, values in (data.factors or {}).items():
        print(plain(f"factor {name}: {len(values)} values, {values[0]:g} to {values[-1]:g}"))
    x = data.batch("train", slice(10_000)).x
    if data.levels is None and x.dim() == 2:
        figures = torch.stack([x.mean(0), x.std(0, correction=0), x.amin(0), x.amax(0)], 1)[:50].tolist()
        rows = [(str(i), *row) for i, row in enumerate(figures, 1)]
        show_table(("column", "mean", "std", "least", "most"), rows)
    else:
        empty, full = ((x == end).float().mean().item() for end in (x.min(), x.max()))
        print(f"values {x.min():.4g} ({empty:.1%} of the cells) to {x.max():.4g} ({full:.1%}), mean {x.mean():.4g}")
