"""Tables of numbers: CSV, NumPy's npy and npz. Every column is standardized by the training split's statistics."""

import csv as csv_format
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genfuse._files import check_zip, read_array, warn
from genfuse.data._dataset import READING, Dataset, Source, Split
from genfuse.data._schema import (
    CODE,
    EXACT,
    TOO_LONG,
    Scaling,
    Schema,
    in_order,
    infer,
    is_inexact,
    number_of,
    numbers,
    numbers_rows,
    of_numbers,
    stripped,
)
from genfuse.errors import DataError, DataWarning, SettingsError

if TYPE_CHECKING:
    import pandas as pd

PARTS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
PART_OF = {name: part for part, names in PARTS.items() for name in names} | {"training": "train", "testing": "test"}
EXAMPLES = {"x", "data", "images", "image", "features", "inputs", "input", "samples"}  # what arrays of these are called
LABELS = {"y", "label", "labels", "target", "targets", "class", "classes"}


@dataclass(frozen=True)
class Table:
    """Numbers, (N, D) in float64, and where they came from."""

    origin: str
    values: np.ndarray
    names: tuple[str, ...] | None = None  # of the columns
    lines: Callable[[], list[int]] | None = None  # of a text: the line, from 1, that each row is on
    schema: Schema | None = None  # if not all columns are numbers without end: as `Schema.parse` has made the values
    columns: Sequence[str] = ()  # of a table with a schema: all that it had, those too that are left out

    def place(self, row: int, column: int) -> str:
        """A cell, as errors name it: rows and columns of text from 1, those of arrays from 0."""
        named = f" ({self.names[column]})" if self.names else ""
        if self.lines is None:
            return f"row {row}, column {column} (from 0)"
        at = self.columns.index(self.schema.names[column]) if self.schema else column
        return f"row {self.lines()[row]}, column {at + 1}{named}"


@dataclass(frozen=True)
class Reading:
    """How text is read. Raises SettingsError for what cannot be meant."""

    header: str
    delimiter: str
    decimal: str

    def __post_init__(self) -> None:
        if self.header not in ("auto", "yes", "no"):
            raise SettingsError(f"header must be auto, yes or no; got {self.header!r}")
        if self.decimal not in (".", ","):
            raise SettingsError(f"decimal must be . or ,; got {self.decimal!r}")
        named = {"tab": "\t", "\\t": "\t", "semicolon": ";", "comma": ","}.get(self.delimiter, self.delimiter)
        object.__setattr__(self, "delimiter", named)
        if len(named) != 1 or named.isalnum() or named in "\"'\r\n.+-_" or named == self.decimal:
            raise SettingsError(
                f"delimiter must be one character that is in no number, such as ; or tab, and not the decimal mark "
                f"{self.decimal!r}; got {self.delimiter!r}"
            )

    def is_number(self, cell: str) -> bool:
        """Whether a cell is a number, NaN included; 1_000 and digits of other scripts are for Python alone."""
        return not math.isnan(number_of(cell, self.decimal)) or cell.strip().lower().lstrip("+-") == "nan"

    def number(self, cell: str) -> float:
        """Raises ValueError for what is none."""
        if not self.is_number(cell):
            raise ValueError(cell)
        return number_of(cell, self.decimal)

    def names(self, first: list[str]) -> list[str] | None:
        """The names of the columns, if the first row is that."""
        named = self.header == "yes" or (self.header == "auto" and not any(map(self.is_number, first)))
        return [cell.strip() for cell in first] if named else None

    def rows(self, path: Path, most: int | None = None) -> list[tuple[int, list[str]]]:
        """The first rows of a file that are not empty, with the line on which each ends. Raises DataError if there are
        none, or it is no text."""
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv_format.reader(file, delimiter=self.delimiter)
                rows = list(itertools.islice(((reader.line_num, row) for row in reader if row), most))
        except (UnicodeDecodeError, csv_format.Error) as error:
            raise DataError(
                f"{path} is no text in UTF-8 with comma-separated cells: {error}; if a spreadsheet wrote it, save it "
                "as CSV UTF-8"
            ) from error
        if not rows:
            raise DataError(f"{path} is empty")
        return rows


@dataclass(frozen=True)
class Arrays:
    """Arrays of examples by split, "all" for what is yet to be split: (where from, the array); and their labels."""

    x: dict[str, tuple[str, np.ndarray]]
    y: dict[str, Tensor]
    classes: int | None = None
    class_names: tuple[str, ...] | None = None


OTHERS = {".xlsx": "read_excel", ".xls": "read_excel", ".ods": "read_excel", ".parquet": "read_parquet",
          ".feather": "read_feather", ".json": "read_json", ".pkl": "read_pickle"}  # fmt: skip


def csv(source: Source) -> Dataset:
    """Rows of text, with or without a header; or a folder of train.csv, test.csv and maybe validation.csv.

    If all cells are numbers, the table is one of numbers, and `Schema` says which of them are whole. Else the columns
    are numbers, integers, categories, booleans or dates, and cells may be missing.
    """
    reading = Reading(**{key: source.options.get(key, usual) for key, usual in READING.items()})
    said = {key: source.options[key] for key in ("columns", "drop", "types") if source.options.get(key)}
    paths = _paths(source, ".csv")
    for path in paths.values():
        if read := OTHERS.get(path.suffix.lower()):
            raise DataError(f"{path} is no text of comma-separated cells by its name: save it as CSV, or in Python "
                            f"give load_data what pandas.{read}({path.name!r}) returns")  # fmt: skip
    tables = {} if said else {part: _read_csv(path, reading) for part, path in paths.items()}
    if tables and all(tables.values()):
        return _dataset(source, tables)  # type: ignore[arg-type]
    frames = {part: (str(path), read_rows(path, **vars(reading))) for part, path in paths.items()}
    return of_frames(source, frames, reading.decimal)


def of_frames(
    source: Source, frames: "dict[str, tuple[str, pd.DataFrame]]", decimal: str = ".", arrays: Arrays | None = None
) -> Dataset:
    """DataFrames by split, "all" for what is yet to be split: (where from, the table); and the labels in ``arrays``."""
    said = {key: source.options[key] for key in ("columns", "drop", "types") if source.options.get(key)}
    origin, first = next(iter(frames.values()))
    schema = infer(first, origin, decimal=decimal, **said)
    for name, why in schema.left_out:
        if "--data.drop" not in why and "--data.columns" not in why:
            warn(f"{origin}: the column {name or repr(name)} is left out: {why}", DataWarning)
    names = schema.names if first.attrs.get("named", True) else None
    mixed = {
        part: Table(
            origin, schema.parse(frame, origin), names, partial(list, frame.index), schema,
            list(map(str, frame.attrs.get("columns", frame.columns))),
        )
        for part, (origin, frame) in frames.items()
    }  # fmt: skip
    return _dataset(source, mixed, arrays)


def read_rows(path: Path | str, header: str = "auto", delimiter: str = ",", decimal: str = ".") -> "pd.DataFrame":
    """The cells of a CSV file as text, by the line that each row is on, under the names of the columns, or 1, 2, ...

    The index that pandas writes is left out. Raises DataError for text that is no table, as `csv` does.
    """
    import pandas as pd

    path, reading = Path(path), Reading(header, delimiter, decimal)
    rows = reading.rows(path)
    first = rows[0][1]
    named = (found := reading.names(first)) is not None
    names = found or [str(i + 1) for i in range(len(first))]
    if not (rows := rows[named:]):
        raise DataError(f"{path} has a header and no rows")
    line, last = rows[-1]
    broken = [i for i, cell in enumerate(last) if "\n" in cell]
    if broken and path.read_text(encoding="utf-8-sig").count('"') % 2:
        raise DataError(
            f"{path}, row {line}, column {broken[0] + 1} ({names[broken[0] % len(names)]}): a quote is not closed"
        )
    if odd := next(((line, row) for line, row in rows if len(row) != len(first)), None):
        raise DataError(
            f"{path}, row {odd[0]}: {len(odd[1])} cells, but the first row has {len(first)}"
            + (_other_marks(odd[1], reading) or ("; if that is a title, remove it" if len(first) == 1 else ""))
        )
    some = [row for _, row in rows[:50]]
    if (hint := _other_marks(some[0], reading)) and all(_other_marks(row, reading) == hint for row in some):
        bad = next(i for i, cell in enumerate(some[0]) if not reading.is_number(cell))
        if len(first) == 1 or (any("," in cell or ";" in cell for cell in some[0]) and "--data.decimal" in hint):
            name = f" ({names[bad]})" if named else ""
            raise DataError(
                f"{path}, row {rows[0][0]}, column {bad + 1}{name}: expected a number; got {some[0][bad]!r}{hint}"
            )
    frame = pd.DataFrame([row for _, row in rows], columns=names, index=[line for line, _ in rows], dtype=object)
    frame.attrs = {"named": named, "columns": names}
    if named and len(names) > 1:
        index, gone = stripped(frame.iloc[:, 0])
        values = numbers(index, decimal)
        if not gone.any() and not np.isnan(values).any() and _is_index(names[0], values):
            warn(
                f"{path}: the first column, {names[0] or 'without a name'}, holds the numbers of the rows, as pandas "
                "writes them, and is left out",
                DataWarning,
            )
            frame = frame.iloc[:, 1:]
    return frame


def npy(source: Source) -> Dataset:
    """An array (N, D) of numbers; or a folder of train.npy, test.npy and maybe validation.npy (valid.npy, val.npy), or
    of x.npy, and labels y.npy, y_train.npy, ... beside them."""
    return of_arrays(source, find_arrays(source, source.path()))


def npz(source: Source) -> Dataset:
    """Arrays (N, D) of numbers: one alone, or ``train``, ``test`` and maybe ``validation`` (``valid``, ``val``), also
    called x_train and so on; labels beside them are y, y_train, train_labels and the like."""
    return of_arrays(source, find_arrays(source, source.path()))


def of_arrays(source: Source, found: Arrays, names: tuple[str, ...] | None = None) -> Dataset:
    """A table of arrays (N, D), with the names of its columns if they have any."""
    tables = {part: replace(_table(*each), names=names) for part, each in found.x.items()}
    return _dataset(source, tables, found)


def find_arrays(source: Source, path: Path) -> Arrays:
    """The examples and labels in an npy or npz file or a folder of npy files, by what the arrays are called.

    What is not used is warned of. Raises DataError if it is not clear which array is what.
    """
    kind = source.name.partition(":")[0]
    arrays: dict[str, np.ndarray]
    if path.is_dir() and kind != "npz":
        files = {file.stem: file for file in sorted(path.glob("*.npy")) if not file.name.startswith(".")}
        arrays = {name: _array(file) for name, file in files.items() if _called(name) is not None}
        names = {name: str(file) for name, file in files.items()}
    elif kind == "npz" or (kind != "npy" and path.suffix == ".npz"):
        arrays = read_arrays(path)
        names = {name: f"{path}, {name}" for name in arrays}
    else:
        return Arrays({"all": (str(path), _array(path))}, {})
    return arrange(path, arrays, names)


def arrange(path: Path | str, arrays: dict[str, np.ndarray], names: dict[str, str]) -> Arrays:
    """What of some arrays are examples and what labels, by what they are called; ``names`` is for errors."""
    called = {name: _called(name) for name in arrays}
    unnamed = [name for name, of in called.items() if of is None]
    if len(unnamed) == 1 and not any(of and of[0] == "x" for of in called.values()):
        called[unnamed[0]] = ("x", "all")  # one alone may have any name
    by: dict[tuple[str, str], str] = {}
    for name, of in called.items():
        if of is not None and by.setdefault(of, name) != name:
            raise DataError(f"{path}: {by[of]} and {name} may both be {_MEANS[of[0]]} of {of[1]}; leave one of them")
    x = {part: by["x", part] for part in (*PARTS, "all") if ("x", part) in by}
    if "all" in x and len(x) > 1:
        x.pop("all")
    if not ("all" in x or {"train", "test"} <= x.keys()):
        if isinstance(path, Path) and path.is_dir():
            missing = [part + ".npy" for part in ("train", "test") if part not in x]
            raise DataError(f"the folder {path} has no {' and no '.join(missing)}; name a single file to have it split")
        raise DataError(f"{path} must hold one array, or train and test; it has: {', '.join(arrays) or 'none'}")
    labels = {part: by["y", part] for part in x if ("y", part) in by}
    values = {part: _labels(names[name], arrays[name], len(arrays[x[part]])) for part, name in labels.items()}
    usable = {part: of for part, of in values.items() if of is not None}
    together = np.concatenate([*usable.values()]) if usable else np.zeros(0)
    different, places = np.unique(together, return_inverse=True)
    if different.dtype.kind == "U":
        order = in_order(different.tolist())
        different, places = np.array(order), np.array([order.index(name) for name in different.tolist()])[places]
    if len(different) > max(2, len(together) // 2):  # almost as many as there are examples: no classes
        usable = {}
    if unused := sorted(names.keys() - set(x.values()) - {labels[part] for part in usable}):
        warn(f"{path}: not used: {', '.join(unused)}", DataWarning)
    examples = {part: (names[name], arrays[name]) for part, name in x.items()}
    if not usable:
        return Arrays(examples, {})
    ends = np.cumsum([len(of) for of in usable.values()])[:-1]
    y = {part: torch.from_numpy(of) for part, of in zip(usable, np.split(places.astype(np.int64), ends), strict=True)}
    numbered = different.dtype.kind == "i" and np.array_equal(different, np.arange(len(different)))
    return Arrays(examples, y, len(different), None if numbered else tuple(map(str, different.tolist())))


_MEANS = {"x": "the examples", "y": "the labels"}


def _called(name: str) -> tuple[str, str] | None:
    """("x" or "y", the split or "all") of an array by its name, as X_train or test-labels; None if it says neither."""
    words = re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    glued = re.fullmatch(r"([xy])([a-z]+)", words[0]) if len(words) == 1 else None
    if glued and glued[2] in PART_OF:
        words = [glued[1], glued[2]]
    parts = [PART_OF[word] for word in words if word in PART_OF]
    rest = [word for word in words if word not in PART_OF]
    if len(parts) > 1 or len(rest) > 1 or not words:
        return None
    kind = "x" if not rest or rest[0] in EXAMPLES else "y" if rest[0] in LABELS else None
    return None if kind is None else (kind, parts[0] if parts else "all")


def _array(path: Path) -> np.ndarray:
    found = _load(path)
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path} holds several arrays; write npz:{path}")
    return found


def _labels(origin: str, array: np.ndarray, count: int) -> np.ndarray | None:
    """Labels (count,) of whole numbers or words, also from one-hot rows; None if they are measurements."""
    if len(array.shape) == 0 or len(array) != count:
        raise DataError(f"{origin} has shape {array.shape}, but there are {count} examples to be labelled")
    if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "biuf":
        if not (((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all()):
            return None
        array = array.argmax(1)
    array = array.reshape(count, -1)
    if array.shape[1] != 1:
        return None
    array = array[:, 0]
    if array.dtype.kind == "f" and ((array == array.round()) & (abs(array) < EXACT)).all():
        array = array.astype(np.int64)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "backslashreplace")
    if array.dtype.kind == "u" and array.max(initial=0) >= 2**63:
        array = array.astype(str)
    if array.dtype.kind not in "biuU":
        return None
    if array.dtype.kind == "U":
        codes = np.frombuffer(array.astype(array.dtype.newbyteorder("=")).tobytes(), np.uint32)
        if ((codes > 0x10FFFF) | (codes >> 11 == 0xD800 >> 11)).any():  # of which Python makes no string, or half a one
            raise DataError(f"{origin}: the labels hold characters that Unicode does not have")
    return array.astype(np.int64) if array.dtype.kind in "biu" else array


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name. Raises DataError if it is damaged or holds pickled objects."""
    found = _load(path)
    if isinstance(found, np.ndarray):
        raise DataError(f"{path} holds a single array, not named ones; write npy:{path}")
    return found


def _load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    with path.open("rb") as file:
        magic = file.read(6)
        if not magic:
            raise DataError(f"{path} is empty")
        if not magic.startswith((b"\x93NUMPY", b"PK")):
            raise DataError(f"{path} is no NumPy file: it begins with {magic!r}; pickles are refused: they run code")
        file.seek(0)
        try:
            if not magic.startswith(b"PK"):
                return read_array(path)
            check_zip(path)
            arrays = dict(np.load(file, allow_pickle=False))
            if other := next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None):
                raise ValueError(f"{other} in it is no array")
            return arrays
        except DataError:
            raise
        except Exception as error:  # damaged files raise all kinds of errors
            raise DataError(f"{path} cannot be read: {error}") from error


def _paths(source: Source, suffix: str) -> dict[str, Path]:
    """The file of each split; a single file, which is yet to be split, goes by "all"."""
    path = source.path()
    if not path.is_dir():
        return {"all": path}
    paths: dict[str, Path] = {}
    for part, file in ((part, path / (name + suffix)) for part, names in PARTS.items() for name in names):
        if file.is_file() and (other := paths.setdefault(part, file)) != file:
            raise DataError(f"{other} and {file} are both called as the {part} split; leave one of them")
    if missing := [part + suffix for part in ("train", "test") if part not in paths]:
        raise DataError(f"the folder {path} has no {' and no '.join(missing)}; name a single file to have it split")
    if unused := sorted(
        {file.name for file in path.iterdir() if file.suffix.lower() == suffix} - {p.name for p in paths.values()}
    ):
        warn(f"{path}: not used: {', '.join(unused)}", DataWarning)
    return paths


def _dataset(source: Source, tables: dict[str, Table], arrays: Arrays | None = None) -> Dataset:
    first = next(iter(tables.values()))
    tables = {part: _in_columns_of(first, table) for part, table in tables.items()}
    if "all" in tables:
        held = source.hold_out(len(first.values))
        rows = {part: index.numpy() for part, index in held.items()}
        tables = dict.fromkeys(rows, first)
    else:
        rows = {part: np.arange(len(table.values)) for part, table in tables.items()}
    values = {part: table.values[rows[part]] for part, table in tables.items()}
    train = values["train"]
    mean, std = _moments(first, train)
    if len(bad := np.flatnonzero(~(np.isfinite(std) & (std > 0)))):
        raise DataError(f"{first.origin}: the spread of column {bad[0] + 1} is beyond float64's range; rescale it")
    scaling = Scaling(tuple(mean.tolist()), tuple(std.tolist()), first.names)
    names = first.names or tuple(str(i + 1) for i in range(len(mean)))
    schema = first.schema
    if schema is None and arrays is None and first.lines is not None:
        schema = of_numbers(names, np.concatenate([*{id(t): t.values for t in tables.values()}.values()]))
    if schema is not None:
        schema = None if schema.real else schema.fitted(train, mean.tolist(), std.tolist())
    x = {part: scaling.apply(torch.from_numpy(array)) for part, array in values.items()}
    for part, table in tables.items():
        _warn_of_extremes(table, part, values[part], x[part].numpy(), rows[part])
    arrays = arrays or Arrays({}, {})
    y = {part: arrays.y["all"][rows[part]] for part in x} if "all" in arrays.y else arrays.y
    splits = {part: Split(x[part], y.get(part)) for part in x}
    return Dataset(source.name, splits, None, arrays.classes, arrays.class_names, scaling=scaling, schema=schema)


def _moments(table: Table, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of each column, of the cells that are there; 1 for that of a constant one."""
    there = ~np.isnan(train)
    if (bare := ~there.any(0)).any():
        name = table.names[int(bare.argmax())] if table.names else int(bare.argmax()) + 1
        raise DataError(f"{table.origin}: the column {name} is empty in all rows of the training split: drop it")
    some = train[there.argmax(0), np.arange(train.shape[1])]
    with np.errstate(all="ignore"):
        near = train - some  # small numbers, whatever the columns are far from
        mean, std = some + np.nanmean(near, 0), np.nanstd(near, 0)
        # By the extremes: of a constant column, mean and std as computed are off by rounding errors.
        constant = np.nanmin(train, 0) == np.nanmax(train, 0)
        return np.where(constant, some, mean), np.where(constant, 1.0, std)


def _in_columns_of(first: Table, table: Table) -> Table:
    """The table with its columns in the order of the first one. Raises DataError if they are others."""
    if table.values.shape[1] != first.values.shape[1]:
        raise DataError(
            f"{table.origin} has {table.values.shape[1]} columns, but {first.origin} has {first.values.shape[1]}"
        )
    if table.names == first.names:
        return table
    if table.names is None or first.names is None:
        bare, other = (table, first) if table.names is None else (first, table)
        raise DataError(
            f"{bare.origin} has no header, but {other.origin} has one ({', '.join(other.names or ())}), so that the "
            "columns cannot be matched: give both one, or none"
        )
    if sorted(table.names) != sorted(first.names) or len(set(first.names)) < len(first.names):
        raise DataError(
            f"{table.origin} has the columns {', '.join(table.names)}, but {first.origin} has "
            f"{', '.join(first.names)}: the same names are needed, in any order if all are different"
        )
    return replace(table, values=table.values[:, [table.names.index(name) for name in first.names]], names=first.names)


FLAT, FAR = 1000.0, 1e5  # how many times the middle's spread a column's is, and how far a held-out cell, to be told


def _warn_of_extremes(table: Table, part: str, values: np.ndarray, x: np.ndarray, rows: np.ndarray) -> None:
    """Warn of columns in which few cells are so far out that all others become almost equal, and of cells far out."""
    if np.isnan(x).any():
        there = np.where(np.isnan(values).all(0), 0, values)
        x, values = np.where(np.isnan(x), 0, x), np.where(np.isnan(there), np.nanmedian(there, axis=0), there)
    if part == "train":
        low, high = np.quantile(x, (0.25, 0.75), axis=0, method="nearest")
        flat = [
            c
            for c in np.flatnonzero((high - low < 1.35 / FLAT) & (x.min(0) < x.max(0)))
            if low[c] < high[c] or len(np.unique(x[:, c])) < 0.9 * len(np.unique(values[:, c]))
        ]
        what = "makes all others of its column almost equal when it is standardized; remove or mend it if it is wrong"
    else:
        flat = list(np.flatnonzero(np.abs(x).max(0) > FAR))
        what = f"of the {part} split is {{:.3g}} standard deviations of the training split from its mean"
    for column in flat[:5]:
        row = int(np.abs(values[:, column] - np.median(values[:, column])).argmax())
        said = what.format(abs(float(x[row, column])))
        where = table.place(int(rows[row]), int(column))
        warn(f"{table.origin}, {where}: {values[row, column]:.6g} {said}", DataWarning)


def _table(origin: str, array: np.ndarray) -> Table:
    if array.ndim != 2 or 0 in array.shape:
        images = (
            "; images and clips are read by images:PATH" if array.ndim in (3, 4, 5) and 0 not in array.shape else ""
        )
        raise DataError(f"{origin}: expected rows and columns, (N, D); got an array of shape {array.shape}{images}")
    if array.dtype.kind not in "biuf":
        raise DataError(f"{origin}: expected real numbers; got an array of {array.dtype}")
    values = array.astype(np.float64)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 4:
        for row, column in np.argwhere(np.abs(values) >= EXACT).tolist():
            if int(values[row, column]) != int(array[row, column]):
                raise DataError(f"{origin}: row {row}, column {column} (from 0): {array[row, column]}: {TOO_LONG}")
    if len(bad := np.argwhere(~np.isfinite(values))):
        row, column = bad[0].tolist()
        raise DataError(
            f"{origin}: {len(bad)} cells are NaN or infinite, the first in row {row}, column {column} (from 0): "
            f"{values[row, column]}; remove or fill them"
        )
    return Table(origin, values)


def _read_csv(path: Path, reading: Reading) -> Table | None:
    """The table of a text of which all cells are numbers, quickly; None if some are words, dates or nothing, if a row
    is longer than others, or a column numbers the rows."""
    (line, first), *some = reading.rows(path, 51)
    names = reading.names(first)
    if reading.header == "auto" and _may_be_names(first, [row for _, row in some], reading):
        raise DataError(
            f"{path}: the first row, {', '.join(first[:6])}{', ...' if len(first) > 6 else ''}, may be names of "
            "columns or the first example: say which by --data.header yes or no (in Python header='yes')"
        )
    if names and not some:
        raise DataError(f"{path} has a header and no rows")
    try:
        values = np.loadtxt(
            path, delimiter=reading.delimiter, quotechar='"', comments=None, ndmin=2, encoding="utf-8-sig",
            skiprows=line if names else 0, converters=reading.number if reading.decimal == "," else None,
        )  # fmt: skip
    except ValueError:
        return None
    if values.shape[1] != len(first) or (np.isnan(values).any() and not np.isinf(values).any()):
        return None
    end = rb"(?:^|$|[\s\"]|%s)" % re.escape(reading.delimiter.encode())
    days = (values.min(0) > 19000000) & (values.max(0) < 21000000)  # perhaps, as 20240517
    if days.any() or re.search(rb"(?m)%s%s%s" % (end, CODE.encode(), end), path.read_bytes()):
        return None
    lines = lambda: [line for line, _ in reading.rows(path)][bool(names) :]  # noqa: E731
    table = Table(str(path), values, tuple(names) if names else None, lines)
    if len(bad := np.argwhere(~np.isfinite(values))):
        where = f"{table.place(*bad[0].tolist())}: {values[tuple(bad[0])]}"
        raise DataError(f"{path}: {len(bad)} cells are NaN or infinite, the first in {where}; remove or fill them")
    if len(far := np.argwhere(np.abs(values) > EXACT)):
        rows = reading.rows(path)[bool(names) :]
        for row, column in far.tolist():
            if is_inexact(cell := rows[row][1][column].strip()):
                raise DataError(f"{path}, {table.place(row, column)}: {cell}: {TOO_LONG}")
    if names and len(names) > 1:
        columns = [*zip(names, values.T, strict=True)]
        if _is_index(*columns[0]) or any(numbers_rows(*each) for each in columns):
            return None
    return table


def _is_index(name: str, column: np.ndarray) -> bool:
    """Whether a first column of numbers is what pandas writes: without a name, whole and no two the same, shuffled or
    not."""
    different = len(np.unique(column)) == len(column) > 1
    return name in ("", "Unnamed: 0") and different and bool((column == column.round()).all())


def _may_be_names(first: list[str], rows: list[list[str]], reading: Reading) -> bool:
    """Whether a first row of numbers may be names of columns: 0, 1, 2, as pandas calls them; or numbers that rise, as
    wavelengths and years do, and differ from what is below them."""
    rows = [row for row in rows if len(row) == len(first) and all(map(reading.is_number, row))]
    if not rows or first in rows or not all(map(reading.is_number, first)):
        return False
    whole = [bool(re.fullmatch(r"\s*[+-]?\d+\s*", cell)) for row in rows for cell in row]
    if [cell.strip() for cell in first] == [str(i) for i in range(len(first))]:
        return len(first) > 1 or not all(whole)
    values, below = (np.array([list(map(reading.number, row)) for row in some]) for some in ([first], rows))
    if len(first) < 2 or not (np.diff(values) > 0).all():
        return False
    outside = bool(((values < below.min(0)) | (values > below.max(0))).all())
    alone = len(first) > 5 and not (np.diff(below) > 0).all(1).any()
    written = not any(whole) and all(re.fullmatch(r"\s*[+-]?\d+\s*", cell) for cell in first)
    return alone or (len(rows) > 3 and (outside or written))


def _other_marks(row: list[str], reading: Reading) -> str:
    """What to do if cells seem to be separated, or decimals marked, by another character."""
    text = reading.delimiter.join(row)
    for mark, name, option in ((";", "semicolons", "';'"), ("\t", "tabs", "tab"), ("|", "|", "'|'")):
        if mark in text and reading.delimiter != mark:
            commas = all(re.fullmatch(r"\s*[+-]?\d+(,\d+)?\s*", cell) for cell in text.split(mark))
            decimal = " --data.decimal ," if commas and "," in text else ""
            python = f"delimiter={mark!r}" + (", decimal=','" if decimal else "")
            return f"; are the cells separated by {name}? --data.delimiter {option}{decimal} (in Python {python})"
    commas = any(re.fullmatch(r"[+-]?\d+,\d+", cell.strip()) for cell in row)
    if commas and reading.decimal == "." and reading.delimiter != ",":
        return "; are decimals marked by commas? --data.decimal , (in Python decimal=',')"
    return ""
