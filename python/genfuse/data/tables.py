"""Tables of numbers: CSV, NumPy's npy and npz. Every column is standardized by the training split's statistics."""

import csv as csv_format
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genfuse._files import check_array, check_zip
from genfuse.data._dataset import Dataset, Scaling, Source, Split
from genfuse.errors import DataError

PARTS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Table:
    """Finite numbers, (N, D) in float64, and where they came from."""

    origin: str
    values: np.ndarray
    names: tuple[str, ...] | None = None  # of the columns


def csv(source: Source) -> Dataset:
    """Numbers and commas, with or without a header; or a folder of train.csv, test.csv and maybe validation.csv."""
    return _dataset(source, {part: _read_csv(path) for part, path in _paths(source, ".csv").items()})


def npy(source: Source) -> Dataset:
    """An array (N, D) of numbers; or a folder of train.npy, test.npy and maybe validation.npy (valid.npy, val.npy)."""
    tables = {}
    for part, path in _paths(source, ".npy").items():
        found = _load(path)
        if not isinstance(found, np.ndarray):
            raise DataError(f"{path} holds several arrays; write npz:{path}")
        tables[part] = _table(str(path), found)
    return _dataset(source, tables)


def npz(source: Source) -> Dataset:
    """Arrays (N, D) of numbers: one alone, or ``train``, ``test`` and maybe ``validation`` (``valid``, ``val``)."""
    path = source.path()
    arrays = read_arrays(path)
    if len(arrays) == 1:
        parts = {"all": next(iter(arrays))}
    else:
        parts = {part: name for part, names in PARTS.items() for name in names if name in arrays}
        if not {"train", "test"} <= parts.keys():
            raise DataError(f"{path} must hold one array, or train and test; it has: {', '.join(arrays) or 'none'}")
    return _dataset(source, {part: _table(f"{path}, {name}", arrays[name]) for part, name in parts.items()})


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name. Raises DataError where it is damaged or holds pickled objects."""
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
            if magic.startswith(b"PK"):
                check_zip(path)
            else:
                check_array(file, path.stat().st_size)
                file.seek(0)
            found = np.load(file, allow_pickle=False)
            return found if isinstance(found, np.ndarray) else dict(found)
        except DataError:
            raise
        except Exception as error:  # damaged files raise all kinds of errors
            raise DataError(f"{path} cannot be read: {error}") from error


def _paths(source: Source, suffix: str) -> dict[str, Path]:
    """The file of each split; a single file, which is yet to be split, goes by "all"."""
    path = source.path()
    if not path.is_dir():
        return {"all": path}
    paths = {
        part: file for part, names in PARTS.items() for name in names if (file := path / (name + suffix)).is_file()
    }
    if missing := [part + suffix for part in ("train", "test") if part not in paths]:
        raise DataError(f"the folder {path} has no {' and no '.join(missing)}; name a single file to have it split")
    return paths


def _dataset(source: Source, tables: dict[str, Table]) -> Dataset:
    first = next(iter(tables.values()))
    for table in tables.values():
        if table.values.shape[1] != first.values.shape[1]:
            raise DataError(
                f"{table.origin} has {table.values.shape[1]} columns, but {first.origin} has {first.values.shape[1]}"
            )
    if "all" in tables:
        rows = source.hold_out(len(first.values))
        values = {part: first.values[index.numpy()] for part, index in rows.items()}
    else:
        values = {part: table.values for part, table in tables.items()}
    train = values["train"]
    with np.errstate(all="ignore"):
        mean, std = train.mean(0), train.std(0)
    # By the extremes: of a constant column, mean and std as computed are off by rounding errors.
    constant = train.min(0) == train.max(0)
    mean, std = np.where(constant, train[0], mean), np.where(constant, 1.0, std)
    if len(bad := np.flatnonzero(~(np.isfinite(std) & (std > 0)))):
        raise DataError(f"{first.origin}: the spread of column {bad[0] + 1} is beyond float64's range; rescale it")
    scaling = Scaling(tuple(mean.tolist()), tuple(std.tolist()), first.names)
    splits = {part: Split(scaling.apply(torch.from_numpy(array))) for part, array in values.items()}
    return Dataset(source.name, splits, scaling=scaling)


def _table(origin: str, array: np.ndarray) -> Table:
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{origin}: expected rows and columns, (N, D); got an array of shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise DataError(f"{origin}: expected real numbers; got an array of {array.dtype}")
    values = array.astype(np.float64)
    if len(bad := np.argwhere(~np.isfinite(values))):
        row, column = bad[0].tolist()
        raise DataError(
            f"{origin}: {len(bad)} cells are NaN or infinite, the first in row {row}, column {column} (from 0): "
            f"{values[row, column]}; remove or fill them"
        )
    return Table(origin, values)


def _read_csv(path: Path) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.reader(file)
            first = next((row for row in reader if row), None)
            lines = reader.line_num
    except (UnicodeDecodeError, csv_format.Error) as error:
        raise DataError(f"{path} is no text with comma-separated cells: {error}") from error
    if first is None:
        raise DataError(f"{path} is empty")
    names = None if any(map(_is_number, first)) else tuple(cell.strip() for cell in first)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")
            values = np.loadtxt(
                path, delimiter=",", quotechar='"', comments=None, ndmin=2, encoding="utf-8-sig",
                skiprows=lines if names else 0,
            )  # fmt: skip
    except ValueError as error:
        _explain(path, first, names)
        raise DataError(f"{path} cannot be read: {error}") from error
    if not values.size:
        raise DataError(f"{path} has a header and no rows")
    if values.shape[1] != len(first) or not np.isfinite(values).all():
        _explain(path, first, names)
    return Table(str(path), values, names)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _explain(path: Path, first: list[str], names: tuple[str, ...] | None) -> None:
    """Raise DataError that names the faulty row, as a line of the file, and column. Slow, and only for the message."""
    odd: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.reader(file)
            rows = ((reader.line_num, row) for row in reader if row)
            if names:
                next(rows)
            for line, row in rows:
                if len(row) != len(first):
                    raise DataError(f"{path}, row {line}: {len(row)} cells, but the first row has {len(first)}")
                for column, cell in enumerate(row):
                    where = f"row {line}, column {column + 1}" + (f" ({names[column]})" if names else "")
                    if not _is_number(cell):
                        got = repr(cell) if cell.strip() else "an empty cell"
                        raise DataError(f"{path}, {where}: expected a number; got {got}")
                    if not math.isfinite(float(cell)):
                        odd.append(f"{where}: {cell.strip()}")
    except (UnicodeDecodeError, csv_format.Error) as error:
        raise DataError(f"{path} is no text with comma-separated cells: {error}") from error
    if odd:
        raise DataError(f"{path}: {len(odd)} cells are NaN or infinite, the first in {odd[0]}; remove or fill them")
