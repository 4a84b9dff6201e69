"""Data that is given in Python: DataFrames, arrays, tensors, torch Datasets and DataLoaders."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data

from genfuse._files import warn
from genfuse.data import images, tables
from genfuse.data._dataset import Dataset, Source
from genfuse.data._schema import named
from genfuse.errors import DataError, DataWarning


def objects(source: Source) -> Dataset:
    """The data set of what ``source.given`` holds: examples alone; (examples, labels); or a dict of them by what they
    are, as a npz file has them: train, test, validation, x_train, y_train and so on.

    Examples are a DataFrame or an array or tensor: (N, D) are rows of a table; (N, H, W), (N, C, H, W) or (N, H, W, C)
    images, whole numbers 0..255 or floats in [0, 1], which are then 256 levels. A torch Dataset or DataLoader is read
    once, to the end; its items are examples or (example, label).

    Raises DataError for anything else, and what is wrong in a file is an error here too.
    """
    given = source.given
    if isinstance(given, Mapping):
        parts = dict(given)
    elif isinstance(given, tuple) and len(given) == 2:
        parts = dict(zip("xy", given, strict=True))
    else:
        parts = {"x": given.to_frame() if hasattr(given, "to_frame") and given.ndim == 1 else given}  # a Series
    for name in [name for name, part in parts.items() if isinstance(part, (torch_data.Dataset, torch_data.DataLoader))]:
        suffix = "" if name == "x" else f"_{name}"
        x, y = _collected(parts.pop(name), source.name + suffix.replace("_", ", "))
        parts |= {f"x{suffix}": x} if y is None else {f"x{suffix}": x, f"y{suffix}": y}
    origins = {name: source.name if name == "x" else f"{source.name}, {name}" for name in parts}
    found = tables.arrange(source.name, {name: _array(part, origins[name]) for name, part in parts.items()}, origins)
    called = {part: next(n for n in parts if origins[n] == origin) for part, (origin, _) in found.x.items()}
    frames = {part: (found.x[part][0], named(parts[name])) for part, name in called.items() if _is_frame(parts[name])}
    if len(frames) == len(called):
        return tables.of_frames(source, frames, arrays=found if found.y else None)
    if all(array.ndim < 3 for _, array in found.x.values()):
        return tables.of_arrays(source, found)
    levels = {part: (origin, _levels(array, origin)) for part, (origin, array) in found.x.items()}
    return images.of_arrays(source, tables.Arrays(levels, found.y, found.classes, found.class_names), source.name)


def _array(part: Any, origin: str) -> np.ndarray:
    """An array, a tensor on any device, a DataFrame, or what numpy makes an array of."""
    if isinstance(part, torch.Tensor):
        if part.layout is not torch.strided or part.is_meta:
            kind = "meta" if part.is_meta else part.layout
            raise DataError(f"{origin}: expected a tensor that holds all its values; got a {kind} one")
        part = part.detach().cpu()
        return (part.float() if part.dtype == torch.bfloat16 else part).resolve_conj().resolve_neg().numpy()
    if _is_frame(part):
        if 0 in part.shape:
            raise DataError(f"{origin}: expected rows and columns; got a DataFrame of shape {part.shape}")
        return np.zeros(part.shape)  # it is read by its columns
    if np.ma.is_masked(part):
        part = part.astype(np.promote_types(part.dtype, np.float32)).filled(math.nan)
    try:
        array = np.asarray(part)
    except ValueError as error:  # rows of several lengths
        raise DataError(f"{origin}: no array can be made of it: {error}") from None
    if array.dtype == object and array.size and not isinstance(array.flat[0], str):
        raise DataError(
            f"{origin}: expected a DataFrame, array, tensor, torch Dataset or DataLoader, a tuple (examples, labels) "
            f"or a dict of them; got {type(part).__name__}, of {type(array.flat[0]).__name__}"
        )
    return array.astype(str) if array.dtype == object else array


def _is_frame(part: Any) -> bool:
    return hasattr(part, "columns") and hasattr(part, "iloc")


def _levels(array: np.ndarray, origin: str) -> np.ndarray:
    """Images as whole numbers: floats in [0, 1] as 0..255, or as they are if all are 0 or 1."""
    if array.dtype.kind != "f":
        return array
    if not (array.size and array.min() >= 0 and array.max() <= 1):  # which NaN is not
        spread = f" from {array.min():.4g} to {array.max():.4g}" if array.size else ""
        raise DataError(
            f"{origin}: images must be whole numbers 0..255 or floats in [0, 1]; got {array.dtype}{spread}: divide "
            "0..255 by 255, and take (x + 1) / 2 of [-1, 1]"
        )
    scaled = array * (255 if ((array > 0) & (array < 1)).any() else 1)
    if np.abs(scaled - scaled.round()).max() > 0.01:
        warn(f"{origin}: intensities are rounded to 256 levels", DataWarning)
    return scaled.round().astype(np.uint8)


def _collected(given: Any, origin: str) -> tuple[np.ndarray, np.ndarray | None]:
    """All examples, and labels if there are any, of a torch Dataset or of the batches of a DataLoader."""
    batched = isinstance(given, torch_data.DataLoader)
    items = given if batched or not hasattr(given, "__len__") else (given[i] for i in range(len(given)))
    x: list[np.ndarray] = []
    y: list[np.ndarray] = []
    for item in items:
        parts = item if isinstance(item, (tuple, list)) else [item]
        if isinstance(item, dict) or len(parts) not in (1, 2):
            raise DataError(f"{origin}: its items must be examples or (example, label); got {type(item).__name__}")
        for some, part in zip((x, y), parts, strict=False):
            some.append(_array(part, origin))
    if not x:
        raise DataError(f"{origin} is empty")
    if y and len(y) < len(x):
        raise DataError(f"{origin}: {len(y)} of its {len(x)} items have a label: give one to all, or to none")
    join = np.concatenate if batched else np.stack
    try:
        return join(x), join(y) if y else None
    except ValueError as error:
        raise DataError(f"{origin}: its examples are not of one shape: {error}") from None
