"""Files appear whole or not at all, and replace nothing unasked."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to. At the end it takes the place of ``path``, durably and in one step."""
    beside = path.with_name(f".{path.name}.new")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and needs none."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def occupied(path: Path) -> bool:
    """Whether something is at ``path`` that is no empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
