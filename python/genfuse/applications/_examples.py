"""Examples as a trained model is shown them: of a file, in the columns, units and labels of its run."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfuse.data import READING, READING_OF_IMAGES, Batch, Dataset, Schema, Split, load_data, named, read_rows
from genfuse.errors import DataError, DataWarning
from genfuse.metrics import undisturbed
from genfuse.models import GenerativeModel
from genfuse.nn import Columns
from genfuse.training import Run
from genfuse.training.run import home


@dataclass(frozen=True)
class Examples:
    """A run's model, and the examples of a file as it is shown them, in the order of the file."""

    run: Run
    model: GenerativeModel
    data: Dataset  # `split` of it are the examples
    split: str
    columns: dict[str, np.ndarray]  # of a table with names: those of the file that the model does not know

    @property
    def batch(self) -> Batch:
        """x (N, *shape), and y for a conditional model alone, on the model's device; the same draw of dynamically
        binarized data each time."""
        generator = torch.Generator(self.data.splits[self.split].x.device).manual_seed(0)
        x, y = self.data.batch(self.split, slice(None), generator)
        dtype = next(self.model.parameters()).dtype
        return Batch(
            x.to(self.model.device, dtype),
            y.to(self.model.device) if self.model.conditional and y is not None else None,
        )

    def of_all(self, verb: Any, *each: Tensor, rows: int = 500) -> Tensor:
        """What ``verb(*tensors, **given)`` makes of so many rows at a time, on the CPU; ``given`` holds y, if any."""
        y, found = self.batch.y, []
        with torch.no_grad(), undisturbed(self.model):
            for start in range(0, len(each[0]), rows):
                torch.manual_seed(start)
                part = slice(start, start + rows)
                given = {} if y is None else {"y": y[part]}
                found.append(verb(*(tensor[part] for tensor in each), **given).cpu())
        return torch.cat(found)

    def restored(self, x: Tensor) -> Any:
        """Examples (N, *shape) as people know them: of a table a DataFrame in its own units, else an array."""
        if len(self.data.shape) > 1:
            return x.cpu().numpy()
        import pandas as pd

        if self.run.schema is not None:
            return self.run.schema.decode(x)
        scaling = self.run.scaling
        values = x.double().cpu() if scaling is None else scaling.restore(x.cpu())
        return pd.DataFrame(values.numpy(), columns=list(self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of a table; numbers from 1 if they have none."""
        named = self.run.schema or self.run.scaling
        return (named and named.names) or tuple(str(i + 1) for i in range(self.data.shape[0]))


def examples(
    run: Run | str | Path, file: Any, *, split: str = "test", root: str | Path | None = None, device: Any = "cpu"
) -> Examples:
    """Read ``file`` as the data of a run was read: its columns by name, in the run's scaling, its labels by name.

    ``file`` is a path (.csv, .npy, .npz, a picture or a folder of pictures), a data set by name ("mnist", "csv:PATH"),
    of which one ``split`` is taken, or data as `load_data` takes it. What comes in one piece is taken whole.

    Raises DataError for examples of another shape, columns that are missing, or labels that the run does not know; and
    what `load_data` and the model's ``check_data`` raise. A DataWarning tells of images of other levels than the run's.
    """
    run = run if isinstance(run, Run) else Run(run)
    was = run.config["data"]
    shape, name = tuple(was["shape"]), _name(file, len(was["shape"]) == 3)
    columns: dict[str, np.ndarray] = {}
    if len(shape) == 1 and run.scaling is not None and not str(name).startswith("images:"):
        data, columns = _rows(run, name, split, root or home(was))
    else:
        options = {key: value for key, value in was.get("options", {}).items() if key in READING_OF_IMAGES}
        if not str(name).startswith("images:") or str(name).endswith((".npy", ".npz")):
            options = {}
        if options.get("mode") == "auto":  # as it was found of all pictures; a single one may be grey
            options["mode"] = "RGB" if was["shape"][0] == 3 else "L"
        data = load_data(name, root=root or home(was), seed=was["seed"], hold_out=False, **options)
    if data.shape != shape:
        raise _misshaped(run, data)
    if split not in data.splits:
        raise DataError(f"{data.name} has no split {split!r}; it has: {', '.join(data.splits)}")
    model = run.model(device)
    if was["binarize"] == "none" and model.levels and data.levels and model.levels != data.levels:
        data = _in_levels(data, model.levels)
    data = data.binarized(was["binarize"], was["seed"])
    if task := was.get("options", {}).get("task"):
        data = data.with_task(task)
    elif model.conditional and not data.condition:
        data = _labelled(run, data)
    model.check_data(data)
    return Examples(run, model, data, split, columns)


def _name(file: Any, image: bool) -> Any:
    """The name by which `load_data` reads a path; anything else as it is."""
    path = Path(file) if isinstance(file, (str, Path)) else None
    if path is None or not path.exists():
        if isinstance(file, Path) or (path is not None and path.suffix and ":" not in str(file)):
            raise DataError(f"there is no file or folder {path}")
        return file
    suffix = path.suffix.lower()
    pictures = path.is_dir() and not any((path / f"test{kind}").exists() for kind in (".csv", ".npy"))
    if suffix in (".csv", ".tsv", ".txt") or (path / "test.csv").exists():
        return f"csv:{path}"
    if suffix in (".npy", ".npz") and not image:
        return f"{suffix[1:]}:{path}"
    return f"npy:{path}" if path.is_dir() and not pictures else f"images:{path}"


def _rows(run: Run, name: Any, split: str, root: Any) -> tuple[Dataset, dict[str, np.ndarray]]:
    """A table's rows by the columns and in the scaling of the run, and the other columns by name."""
    import pandas as pd

    own, context = (
        schema or (Schema(()) if scaling is None else Schema.of_scaling(scaling))
        for schema, scaling in ((run.schema, run.scaling), (run.condition_schema, run.condition_scaling))
    )
    names, have_names = [*own.names, *context.names], run.schema is not None or bool(run.scaling and run.scaling.names)
    origin, path = name if isinstance(name, str) else f"<{type(name).__name__}>", Path(str(name).partition(":")[2])
    data = None
    if isinstance(name, str) and name.startswith("csv:"):
        options = run.config["data"].get("options", {})
        path = path / f"{split}.csv" if path.is_dir() else path
        frame = read_rows(path, **{key: options[key] for key in READING if key in options})
        if have_names and not frame.attrs["named"]:
            raise DataError(
                f"{path} has no header, and the run {run.path} was trained on the columns {', '.join(names)}"
            )
    elif hasattr(name, "iloc"):
        frame = named(name)
    else:
        data = load_data(name, root=root, hold_out=False)
        if split not in data.splits:
            raise DataError(f"{data.name} has no split {split!r}; it has: {', '.join(data.splits)}")
        if len(data.shape) > 1:
            raise _misshaped(run, data)
        x = data.splits[split].x
        values = (x if data.scaling is None else data.scaling.restore(x)).numpy()
        frame = pd.DataFrame(values, columns=names if values.shape[1] == len(names) else None)
        if isinstance(name, str) and have_names and not name.startswith("toy:"):
            origin = data.name
    if not have_names and frame.shape[1] == len(names):
        frame.columns = pd.Index([str(i + 1) for i in range(len(names))])
    if len({*names} & {*frame.columns}) == 0:
        raise DataError(
            f"{origin} has {frame.shape[1]} columns, and the run {run.path} was trained on {len(names)}: "
            f"{', '.join(names)}"
        )
    others = [column for column in frame.columns if column not in names]

    def encoded(schema: Schema) -> Tensor:
        left_out = tuple((column, "") for column in frame.columns if column not in schema.names)
        return replace(schema, left_out=left_out).encode(frame, origin)

    y = None if data is None else data.splits[split].y
    if context.columns:
        y = encoded(context)
        y = y if run.condition_schema is None else Columns(context.specs()).encode(y)
    both = dict.fromkeys(("train", "test", split), Split(encoded(own), y))
    labels: dict[str, Any] = {}
    if data is not None and y is not None and not context.columns:
        labels = {"classes": data.classes, "class_names": data.class_names}
    found = Dataset(origin, both, scaling=run.scaling, schema=run.schema, condition_scaling=run.condition_scaling,
                    condition_schema=run.condition_schema, **labels)  # fmt: skip
    return found, {column: frame[column].to_numpy() for column in others}


def _misshaped(run: Run, data: Dataset) -> DataError:
    kinds, shape = {1: "rows of a table", 3: "images"}, tuple(run.config["data"]["shape"])
    return DataError(
        f"{data.name} has examples of shape {data.shape}, {kinds.get(len(data.shape), 'others')}, and the run "
        f"{run.path} was trained on {kinds.get(len(shape), 'others')} of shape {shape}"
    )


def _in_levels(data: Dataset, levels: int) -> Dataset:
    """Discrete examples with the nearest of so many levels."""
    assert data.levels is not None
    exact = {part: split.x.double() * ((levels - 1) / (data.levels - 1)) for part, split in data.splits.items()}
    if any(float((x - x.round()).abs().max()) > (levels - 1) / (data.levels - 1) / 2 + 1e-9 for x in exact.values()):
        warnings.warn(
            f"{data.name} has {data.levels} levels, and the run {levels}: each is taken for the nearest", DataWarning,
            stacklevel=3,
        )  # fmt: skip
    splits = {part: replace(split, x=exact[part].round().to(torch.uint8)) for part, split in data.splits.items()}
    return replace(data, splits=splits, levels=levels)


def _labelled(run: Run, data: Dataset) -> Dataset:
    """The data with labels as the run numbers them, by their names. Raises DataError for unknown names."""
    if data.classes is None:
        return data
    known = run.class_names or tuple(map(str, range(run.config["model"]["settings"].get("classes") or 0)))
    named = data.class_names or tuple(map(str, range(data.classes)))
    if unknown := [name for name in named if name not in known]:
        raise DataError(
            f"{data.name} has the labels {', '.join(unknown[:9])}, and the run {run.path} knows {', '.join(known)}"
        )
    numbers = torch.tensor([known.index(name) for name in named])
    splits = {
        part: replace(split, y=None if split.y is None else numbers[split.y]) for part, split in data.splits.items()
    }
    return replace(data, splits=splits, classes=len(known), class_names=run.class_names)


def labels_of(found: Examples, labels: str | Path) -> np.ndarray:
    """What says of each example whether it is odd: a column of the file that the model does not know, by name; ``y``
    for the labels in an npz file; or another file, of one number a row. Raises DataError if it is none of these."""
    name = str(labels)
    if name in found.columns:
        import pandas as pd

        cells = pd.Series(found.columns[name])
        numeric = pd.to_numeric(cells, errors="coerce")
        return (cells if numeric.isna().any() else numeric).to_numpy()
    y = found.data.splits[found.split].y
    if name == "y" and y is not None and not found.data.condition:
        names = found.data.class_names
        return y.numpy() if names is None else np.array([float(names[i]) if names[i].isdecimal() else -1 for i in y])
    if Path(name).is_file():
        data = load_data(_name(name, image=False), hold_out=False)
        x = data.splits["test"].x
        values = x if data.scaling is None else data.scaling.restore(x)
        if values.shape != (len(found.data.splits[found.split]), 1):
            count = len(found.data.splits[found.split])
            raise DataError(f"{name} must hold one label for each of the {count} examples; got {tuple(values.shape)}")
        return values[:, 0].numpy().round(6)
    others = ", ".join([*found.columns, *(["y"] if y is not None and not found.data.condition else [])])
    raise DataError(f"{found.data.name} has no labels {name!r}, and there is no such file; it has: {others or 'none'}")
