"""Files appear whole or not at all, replace nothing unasked, have one writer, and are checked when they are read."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, get_args

from genfuse.errors import DataError, RunError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
LEFT = re.compile(r"\..*\.[0-9a-f]{16}\.new")  # names of what a kill leaves half written
UNPACKED = "GENFUSE_MAX_UNPACKED"  # bytes that a file may unpack to; by default these, or so many times its own size
UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 100
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # what file systems without locks answer


# Writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to. At the end it takes the place of ``path``, durably and in one step.

    It lies in a new folder beside ``path``, under a name that nobody can guess: no link can wait there. A link at
    ``path`` is replaced, not written through. OSErrors name ``path``.
    """
    with named(path):
        with staging(path.parent, path.name) as stage:
            yield stage / path.name
            with open(stage / path.name, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(stage / path.name, path)
        sync_folder(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """`replacing`, with a file that is open to be written to."""
    with replacing(path) as beside, open(beside, "xb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """`writing` of UTF-8; what is no text, as names of files may be, is written as escapes."""
    with writing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the name of a file into an OSError of writing to it, which has none."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def staging(folder: Path, name: str = "stage") -> Iterator[Path]:
    """Yield a new folder within ``folder``, of a name that `sweep` knows; what is still in it at the end goes."""
    stage = folder / f".{name}.{secrets.token_hex(8)}.new"
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def keep_as(path: Path, name: str) -> None:
    """Give a file a second name beside it, in the place of what had that name. The file itself stays all the time."""
    try:
        with staging(path.parent, name) as stage:
            os.link(path, stage / name, follow_symlinks=False)
            os.replace(stage / name, path.with_name(name))
    except (OSError, NotImplementedError):  # a file system without hard links
        with open(path, "rb") as source, writing(path.with_name(name)) as copy:
            shutil.copyfileobj(source, copy)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and needs none."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: Path) -> None:
    """Remove what a kill left half written in a folder. Call it as the only writer."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if LEFT.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def occupied(path: Path) -> bool:
    """Whether something is at ``path`` that is no empty folder. What a kill left half written does not count."""
    return path.exists() and not (
        path.is_dir() and all(each.name == LOCK or LEFT.fullmatch(each.name) for each in path.iterdir())
    )


# Links, and one writer at a time


def refuse_links(folder: Path, *within: str) -> None:
    """Raise RunError for a link, or anything else that is neither file nor folder, in ``folder`` or its ``within``.

    What is written there would land elsewhere. ``folder`` itself may be a link.
    """
    for place in (folder, *(folder / name for name in within)):
        if not place.is_dir():
            continue
        for entry in os.scandir(place):
            mode = entry.stat(follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                raise RunError(f"{entry.path} is {what}, which a run folder must not hold: remove it")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of ``folder``, which is made if it is absent; it goes again if nothing was written to it.

    The system lets go of the lock when the process ends, however it ends. Raises RunError, which names host, process
    and since when, if another one has it. On a file system without locks the name of a process that is no more on
    this host is no obstacle, and one on another host is.
    """
    made = not folder.exists()
    file = None
    while file is None:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)  # mkdir takes no dangling link
        with suppress(FileNotFoundError):  # another one has just removed the folder
            file = _lock(folder / LOCK)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(file)
        if made:
            with suppress(OSError):
                Path(os.path.realpath(folder)).rmdir()


def _lock(path: Path) -> int | None:
    """The open lock file, or None where it was removed at that moment: try again."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no locks")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno not in NO_LOCKS
            for _ in range(20):
                owner = _owner(file)
                if owner or not held:
                    break
                time.sleep(0.01)  # it has just been taken
            if held or _alive(owner):
                who = "process {process} on {host}, since {since}".format(**owner) if owner else "another process"
                last = "" if held else f", or, if it is no more, delete {path}"
                raise RunError(
                    f"{path.parent} is being written to by {who}: wait until it ends, or stop it{last}"
                ) from None
        there = os.stat(path, follow_symlinks=False)
        if (there.st_dev, there.st_ino) != (os.fstat(file).st_dev, os.fstat(file).st_ino):
            raise FileNotFoundError(path)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        with named(path):
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            os.write(file, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}).encode())
    except BaseException:
        os.close(file)
        raise
    return file


def _owner(file: int) -> dict[str, Any] | None:
    with suppress(ValueError, TypeError, KeyError, RecursionError, OSError):
        os.lseek(file, 0, os.SEEK_SET)
        owner = json.loads(os.read(file, 1000))
        return {"host": str(owner["host"]), "process": int(owner["process"]), "since": str(owner["since"])}
    return None


def _alive(owner: dict[str, Any] | None) -> bool:
    """Whether the process may still be there that a lock file names."""
    if owner is None:
        return False
    if owner["host"] != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(owner["process"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return owner["process"] != os.getpid()


# Reading


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError if it is none, whatever is wrong with it."""
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, content: dict[str, Any], indent: int) -> None:
    """Write an object with a checksum of itself, as `checked` wants it."""
    write_text(path, json.dumps({**content, "sha256": digest(content)}, indent=indent) + "\n")


def digest(content: dict[str, Any], *parts: Any) -> str:
    """SHA-256 of what an object says, however it is laid out, less its own ``sha256``; and of the bytes ``parts``."""
    said = {key: value for key, value in content.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()


def intact(content: dict[str, Any]) -> bool:
    """Whether an object is what `write_json` wrote, or has no checksum, as what is older than them."""
    return content.get("sha256") in (None, digest(content))


def demand(content: Any, wanted: dict[str, Any], where: object) -> Any:
    """``content``, or RunError, which names ``where`` and the key, if a key is absent or of the wrong type.

    ``wanted`` has the type of each key; a dot leads into an object.
    """
    import typeguard

    every = typeguard.CollectionCheckStrategy.ALL_ITEMS
    for key, kind in wanted.items():
        value = content
        for part in [key] if isinstance(content, dict) and key in content else key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise RunError(f"{where}: it has no {key!r}")
            value = value[part]
        if isinstance(value, bool) and {bool, Any}.isdisjoint(get_args(kind) or (kind,)):  # to Python it is an int
            raise RunError(f"{where}: {key!r} is {value}, which is no number")
        try:
            typeguard.check_type(value, kind, collection_check_strategy=every)
        except typeguard.TypeCheckError as error:
            raise RunError(f"{where}: {key!r} is {shown(value)}: {error}") from None
        rest = [value]
        while rest:
            inner = rest.pop()
            if isinstance(inner, int) and abs(inner) >= 2**63:
                raise RunError(f"{where}: {key!r} is {shown(value)}, which is too large")
            rest += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
    return content


def shown(value: object) -> str:
    """The beginning of a value of any size."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "nested too deeply"


def cache(name: str) -> Path:
    """A folder for what can be made again: in $GENFUSE_CACHE, by default ~/.cache/genfuse."""
    return Path(os.environ.get("GENFUSE_CACHE") or "~/.cache/genfuse").expanduser() / name


def check_unpacked(path: Path, packed: int, unpacked: int, what: str = "it") -> None:
    """Raise DataError if a file of ``packed`` bytes would unpack to more than is allowed."""
    given = os.environ.get(UNPACKED)
    try:
        most = max(UNPACKED_BYTES, UNPACKED_RATIO * packed) if given is None else int(float(given))
    except (ValueError, OverflowError):
        raise DataError(f"the variable {UNPACKED} must be a number of bytes, as 4e9; got {given!r}") from None
    if unpacked > most:
        raise DataError(
            f"{path}: {what} would unpack from {packed:,} bytes to {unpacked:,} or more, beyond the limit of {most:,}; "
            f"if you trust it, raise the limit: {UNPACKED}={unpacked:.0e}"
        )


def gunzip(path: Path) -> bytes:
    """The content of a gzip file. Raises DataError if it is too large, zlib.error, EOFError or OSError if damaged."""
    import gzip

    packed = path.stat().st_size
    parts, size = [], 0
    with gzip.open(path) as file:
        while part := file.read(2**22):
            size += len(part)
            check_unpacked(path, packed, size)
            parts.append(part)
    return b"".join(parts)


def check_zip(path: Path) -> None:
    """Raise DataError if the arrays of an npz file are too large, zipfile.BadZipFile and others if it is damaged."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        check_unpacked(path, path.stat().st_size, sum(member.file_size for member in members))
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    check_array(file, member.file_size)


def check_array(file: IO[bytes], size: int) -> None:
    """Raise ValueError if an npy of ``size`` bytes announces more than it holds, and so would take more memory."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the npy format holds no plain numbers")
    shape, _, dtype = read(file)
    held, there = dtype.itemsize * math.prod(shape), size - file.tell()
    if held > there or any(side < 0 for side in shape):
        raise ValueError(f"its header announces {shape} of {dtype}, {held:,} bytes, but there are {there:,}")


def read_array(path: Path) -> "np.ndarray":
    """The array of an npy file. Raises ValueError, OSError or EOFError if it is damaged."""
    import numpy as np

    with path.open("rb") as file:
        check_array(file, path.stat().st_size)
        file.seek(0)
        found: np.ndarray = np.load(file, allow_pickle=False)
        return found


# Texts


def plain(text: object) -> str:
    """Text in which nothing has a meaning to a terminal: control characters and marks of direction as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t " else repr(c)[1:-1] for c in str(text))


def warn(message: str, kind: type[Warning]) -> None:
    """Warn, as of the line outside of this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "genfuse":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)


# Tensors


def read_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The tensors of a safetensors file, on the CPU, and what `write_tensors` was told about them.

    Raises RunError if it is damaged: where anything is other than when it was written.
    """
    from safetensors.torch import load_file

    facts = tensor_facts(path)
    try:
        tensors = load_file(path)
        was = facts.pop("sha256", None)
        if was is not None and was != digest(facts, *_tensor_parts(tensors)):
            raise ValueError("its checksum is not that of its content: it is damaged")
    except Exception as error:  # damaged files raise all kinds of errors
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return tensors, facts


def tensor_facts(path: Path) -> dict[str, Any]:
    """What `write_tensors` was told, unchecked: the tensors are not read."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["genfuse"])
        if not isinstance(facts, dict):
            raise TypeError(f"its facts are no object: {facts!r:.60}")
    except Exception as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return facts


def write_tensors(path: Path, tensors: dict[str, "Tensor"], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts, with a checksum of all of it.

    The facts are one entry, as safetensors writes several in any order.
    """
    from safetensors.torch import save

    sealed = {**facts, "sha256": digest(facts, *_tensor_parts(tensors))}
    with writing(path) as file:
        file.write(save(tensors, {"genfuse": json.dumps(sealed)}))


def _tensor_parts(tensors: dict[str, "Tensor"]) -> Iterator[Any]:
    """Names, types, shapes and bytes of tensors, as a checksum takes them."""
    import torch

    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
