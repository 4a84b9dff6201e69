"""Examples as a trained model is shown them: of a file, in the columns, units and labels of its run."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfuse.data import READING, Batch, Dataset, Scaling, Split, load_data, names_in
from genfuse.errors import DataError, DataWarning
from genfuse.metrics import undisturbed
from genfuse.models import GenerativeModel
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

        scaling = self.run.scaling
        values = x.double().cpu() if scaling is None else scaling.restore(x.cpu())
        return pd.DataFrame(values.numpy(), columns=list(self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of a table; numbers from 1 if they have none."""
        named = self.run.scaling and self.run.scaling.names
        return named or tuple(str(i + 1) for i in range(self.data.shape[0]))


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
    shape, image = tuple(was["shape"]), len(was["shape"]) == 3
    name = _name(file, image)
    options = {key: value for key, value in was.get("options", {}).items() if key in READING}
    if isinstance(name, str) and not name.startswith("csv:"):
        options = {}
    data = load_data(name, root=root or home(was), seed=was["seed"], hold_out=False, **options)
    if split not in data.splits:
        raise DataError(f"{data.name} has no split {split!r}; it has: {', '.join(data.splits)}")
    columns: dict[str, np.ndarray] = {}
    if len(data.shape) == len(shape) == 1 and run.scaling is not None:
        data, columns = _in_units_of(run, data, split, by_name=isinstance(name, str))
    if data.shape != shape:
        kinds = {1: "rows of a table", 3: "images"}
        raise DataError(
            f"{data.name} has examples of shape {data.shape}, {kinds.get(len(data.shape), '')}, and the run {run.path} "
            f"was trained on {kinds.get(len(shape), 'others')} of shape {shape}"
        )
    model = run.model(device)
    if was["binarize"] == "none" and model.levels and data.levels and model.levels != data.levels:
        data = _in_levels(data, model.levels)
    data = data.binarized(was["binarize"], was["seed"])
    if model.conditional and not data.condition:
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


def _in_units_of(run: Run, data: Dataset, split: str, by_name: bool) -> tuple[Dataset, dict[str, np.ndarray]]:
    """A table's rows in the columns and the scaling of the run, and the other columns in their own units, by name."""
    scaling, given = run.scaling, run.condition_scaling
    assert scaling is not None
    x = data.splits[split].x
    values = x.double() if data.scaling is None else data.scaling.restore(x)
    wanted = [*(scaling.names or ()), *((given and given.names) or ())]
    found = list((data.scaling and data.scaling.names) or ())
    if wanted and found:
        if missing := [name for name in wanted if name not in found]:
            raise DataError(
                f"{data.name} has no column {', '.join(missing)}, which the run {run.path} was trained on; it has: "
                f"{', '.join(found)}"
            )
        order = [found.index(name) for name in wanted]
    else:
        if wanted and by_name:
            raise DataError(
                f"{data.name} has no header, and the run {run.path} was trained on the columns {', '.join(wanted)}: "
                "give it one"
            )
        numbers = (
            [int(name) - 1 for name in names_in(run.config["data"].get("options", {}).get("condition", ""))]
            if given and not wanted
            else []
        )
        order = [i for i in range(values.shape[1]) if i not in numbers] + numbers
    width = len(scaling.mean) + (len(given.mean) if given else 0)
    if len(order) != width:
        raise DataError(
            f"{data.name} has {values.shape[1]} columns, and the run {run.path} was trained on {width}"
            + (f": {', '.join(wanted)}" if wanted else "")
        )
    columns = {name: values[:, i].numpy() for i, name in enumerate(found) if i not in order}
    own = len(scaling.mean)
    rows = scaling.apply(values[:, order[:own]])
    y = data.splits[split].y if given is None else given.apply(values[:, order[own:]])
    both = dict.fromkeys(("train", "test", split), Split(rows, y))
    return replace(data, splits=both, scaling=scaling, condition_scaling=given), columns


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
    """The data with labels as the run numbers them, by their names. Raises DataError for names that it does not know."""
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
    """What says of each example whether it is odd: a column of the file that the model does not know, by name; ``y`` for
    the labels in an npz file; or another file, of one number a row. Raises DataError if it is none of these."""
    name = str(labels)
    if name in found.columns:
        return found.columns[name].round(6)
    y = found.data.splits[found.split].y
    if name == "y" and y is not None and not found.data.condition:
        names = found.data.class_names
        return y.numpy() if names is None else np.array([float(names[i]) if names[i].isdecimal() else -1 for i in y])
    if Path(name).is_file():
        data = load_data(_name(name, image=False), hold_out=False)
        x = data.splits["test"].x
        values = x if data.scaling is None else data.scaling.restore(x)
        if values.shape != (len(found.data.splits[found.split]), 1):
            raise DataError(f"{name} must hold one label for each of the {len(found.data.splits[found.split])} examples; "
                            f"got {tuple(values.shape)}")  # fmt: skip
        return values[:, 0].numpy().round(6)
    others = ", ".join([*found.columns, *(["y"] if y is not None and not found.data.condition else [])])
    raise DataError(f"{found.data.name} has no labels {name!r}, and there is no such file; it has: {others or 'none'}")
