"""Lossless compression by a trained model, and the files that hold it."""

import copy
import hashlib
import json
import math
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfuse._files import check_unpacked, read_array, replacing, staging, writing
from genfuse._files import digest as digest_of
from genfuse.applications._coder import BITS, FEW, Coder, Exact
from genfuse.applications._examples import examples
from genfuse.data import Dataset, load_data
from genfuse.data.images import SUFFIXES
from genfuse.errors import DataError, GenfuseError, RunError, SettingsError
from genfuse.metrics import undisturbed
from genfuse.models import Codes, GenerativeModel
from genfuse.nn import Columns
from genfuse.training import Run
from genfuse.training.run import home

# A file: this head; the sizes of the groups of examples that are coded together, a byte each, of which the upper bit
# says that no bits come back; notes, zlib of JSON; the stack, little-endian; and the first bytes of its own SHA-256.
MAGIC, VERSION = b"\x89GFZ", 1
HEAD = struct.Struct("<4sB16s8sIHI")  # magic, version, digests of model and levels, examples, groups, bytes of notes
SEAL = 8
MOST = 127  # examples of a group


@dataclass(frozen=True)
class Compressed:
    """What `compress` wrote. Bits per dimension are of all cells of all examples."""

    examples: int
    dimensions: int  # cells of an example
    bytes: int  # of the file
    message: int  # bits of the stack
    initial: int  # bits of it that the latents of the first examples cost, which no other bits paid for
    bound: float  # nats: -ELBO or -log P(x) of all examples, as the model has it in float32

    @property
    def bits_per_dim(self) -> float:
        """Of the whole file."""
        return 8 * self.bytes / (self.examples * self.dimensions)

    @property
    def message_bits_per_dim(self) -> float:
        """Of the stack, initial bits counted, without head, names and checksum."""
        return self.message / (self.examples * self.dimensions)

    @property
    def bound_bits_per_dim(self) -> float:
        return self.bound / math.log(2) / (self.examples * self.dimensions)


def compress(
    run: Run | str | Path, file: Any, out: str | Path, *, split: str = "test", root: Any = None, limit: int | None = None
) -> Compressed:
    """Write the examples of ``file``, at most ``limit``, to ``out``, from which `decompress` makes the same again.

    ``file`` is a picture or a folder of pictures, an array (N, ...) of whole numbers as .npy, a .csv, a data set by
    name, of which one ``split`` is taken, or data as `load_data` takes it. The model must have the verb ``code``
    (`genfuse.models.Codes`).

    Raises SettingsError for a model that does not compress, DataError for examples that are not of its shape, levels or
    columns: nothing is rounded, cropped or left out.
    """
    run = run if isinstance(run, Run) else Run(run)
    model = _coding(run.model())
    k, notes = _read(run, model, file, split, root)
    k = k[:limit]
    if not len(k):
        raise DataError("there are no examples to compress")
    if notes.get("names"):
        notes["names"] = notes["names"][:limit]
    x, coder = _examples_of(model, k), Coder()
    latents, groups, done = getattr(model, "latent_dim", 0), [], 0
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), Exact():
        while done < len(k):
            # As many as the stack has bits for; where it has none, one, whose latents are coded for good.
            afford = coder.bits // (latents * BITS) if latents else MOST
            size = min(max(1, afford), _most(k), len(k) - done)
            coder.direct = bool(latents) and afford < 1
            exact.code(coder, size, x[done : done + size])  # type: ignore[operator]
            groups.append(size | 128 * coder.direct)
            done += size
    with torch.no_grad(), undisturbed(model):
        torch.manual_seed(0)
        bound = _bound(model, x)
    stack = coder.words.astype("<u4").tobytes()
    told = zlib.compress(json.dumps(notes).encode(), 9) if notes else b""
    head = HEAD.pack(MAGIC, VERSION, _digest(run, model), _sum(k), len(k), len(groups), len(told))
    content = b"".join([head, bytes(groups), told, stack])
    with writing(Path(out)) as written:
        written.write(content + hashlib.sha256(content).digest()[:SEAL])
    initial = sum(size >= 128 for size in groups) * latents * FEW
    return Compressed(len(k), k[0].numel(), len(content) + SEAL, coder.bits, initial, bound)


def decompress(
    file: str | Path, out: str | Path | None = None, *, run: Run | str | Path | None = None
) -> tuple[Any, Path]:
    """What `compress` was given, and the folder of the run it was compressed by: images (N, C, H, W) in uint8, or an
    array as it was, or a table as a DataFrame. With ``out`` it is written too: a folder of pictures as .png under their
    names, .npy, .npz (as ``x``) or .csv.

    ``run`` is the run it was compressed by; left out, it is looked for in the folders ``runs``, here and beside the
    file. Raises DataError for a file that is damaged, none of these, or of another version; RunError for another run,
    or if there is none; SettingsError for an ``out`` that cannot hold the data.
    """
    path = Path(file)
    content = path.read_bytes()
    if content[:4] != MAGIC or len(content) < HEAD.size + SEAL:
        raise DataError(f"{path} is no file of `genfuse compress`, or only the beginning of one")
    _, version, wanted, sums, count, pieces, noted = HEAD.unpack_from(content)
    if version != VERSION:
        raise DataError(f"{path} is of version {version} of this format, and this genfuse reads version {VERSION}")
    if hashlib.sha256(content[:-SEAL]).digest()[:SEAL] != content[-SEAL:]:
        raise DataError(f"{path} is damaged or was cut short: its checksum is not that of its content")
    rest = content[HEAD.size : -SEAL]
    groups, told, stack = rest[:pieces], rest[pieces : pieces + noted], rest[pieces + noted :]
    if len(stack) % 4 or sum(size & 127 for size in groups) != count or not count:
        raise DataError(f"{path} says what cannot be of itself: it was not written by `genfuse compress`")
    found, model = _find(run, wanted, path)
    check_unpacked(path, len(content), count * math.prod(found.config["data"]["shape"]))
    notes = json.loads(zlib.decompress(told)) if told else {}
    exact, coder, parts = _coding(model).double(), Coder(np.frombuffer(stack, "<u4")), []
    with torch.no_grad(), Exact():
        for size in reversed(groups):
            coder.direct = size >= 128
            parts.append(_levels_of(exact, exact.code(coder, size & 127)))  # type: ignore[operator]
    k = torch.cat(parts[::-1])
    if _sum(k) != sums or coder.bits:
        raise DataError(f"{path} was decoded to other data than it was made of: the model's file is not the same, or "
                        "this machine computes otherwise; nothing is written")  # fmt: skip
    made = _restored(found, exact, k, notes)
    if out is not None:
        _write(Path(out), made, notes)
    return made, found.path


def _coding(model: GenerativeModel) -> GenerativeModel:
    if not isinstance(model, Codes):
        raise SettingsError(
            f"a {type(model).__name__} does not compress: a vae of discrete data does, and idf; continuous flows do not"
        )
    return model


def _most(k: Tensor) -> int:
    """Examples that are coded together, at most."""
    return max(1, min(MOST, 2**18 // k[0].numel()))


def _digest(run: Run, model: GenerativeModel) -> bytes:
    """Of a run's model: its kind, settings and weights."""
    named = run.config["model"]
    parts = [each for name, tensor in sorted(model.state_dict().items())
             for each in (name.encode(), tensor.contiguous().numpy().tobytes())]  # fmt: skip
    return bytes.fromhex(digest_of({"name": named["name"], "settings": named["settings"]}, *parts))[:16]


def _sum(k: Tensor) -> bytes:
    return hashlib.sha256(k.numpy().astype("<i4").tobytes()).digest()[:8]


def _find(run: Run | str | Path | None, wanted: bytes, path: Path) -> tuple[Run, GenerativeModel]:
    """The run of a digest, and its model."""
    if run is not None:
        run = run if isinstance(run, Run) else Run(run)
        model = run.model()
        if (got := _digest(run, model)) != wanted:
            raise RunError(
                f"{path} was compressed by another model than that of {run.path}: its digest is {wanted.hex()}, and "
                f"the run's is {got.hex()}"
            )
        return run, model
    places = dict.fromkeys(place.resolve() for place in (Path("runs"), Path(), path.parent, path.parent / "runs"))
    for config in (each for place in places if place.is_dir() for each in sorted(place.glob("*/config.json"))):
        with suppress(GenfuseError, OSError):
            run = Run(config.parent)
            model = run.model()
            if _digest(run, model) == wanted:
                return run, model
    raise RunError(
        f"the model that {path} was compressed by, of digest {wanted.hex()}, is in none of "
        f"{', '.join(map(str, places))}: name its run folder, by --run"
    )


# Levels 0, 1, ... of examples


def _columns(model: GenerativeModel) -> Columns | None:
    specs = getattr(model.config, "columns", None)
    return None if specs is None else Columns(specs)


def _examples_of(model: GenerativeModel, k: Tensor) -> Tensor:
    """x (N, *shape) in float64 of levels (N, *shape)."""
    columns = _columns(model)
    return k.double() / (_levels(model) - 1) if columns is None else columns.of_levels(k)


def _levels_of(model: GenerativeModel, x: Tensor) -> Tensor:
    columns = _columns(model)
    return ((x * (_levels(model) - 1)).round() if columns is None else columns.levels(x)).long()


def _levels(model: GenerativeModel) -> int:
    levels = getattr(model.config, "levels", None)
    if levels is None:
        raise SettingsError(
            f"this {type(model).__name__} is of real numbers, which have no levels to compress: train it on images, or "
            "on a table of integers and categories"
        )
    return int(levels)


def _bound(model: GenerativeModel, x: Tensor) -> float:
    verb = model.log_prob if "log_prob" in model.likelihoods else model.elbo  # type: ignore[union-attr]
    return -sum(float(verb(part.float()).double().sum()) for part in x.split(500))  # type: ignore[operator]


def _read(run: Run, model: GenerativeModel, file: Any, split: str, root: Any) -> tuple[Tensor, dict[str, Any]]:
    """The levels (N, *shape) of examples, and what else is needed to write them as they were."""
    shape, columns = tuple(run.config["data"]["shape"]), _columns(model)
    if columns is not None:
        sizes = torch.tensor(columns.sizes)
        found = examples(run, file, split=split, root=root)
        if found.columns:
            raise DataError(
                f"{file} has the columns {', '.join(found.columns)}, which the model of {run.path} does not know: "
                "compress a file without them"
            )
        k = columns.levels(found.data.splits[split].x).long()
        if bool(odd := ((k < 0) | (k >= sizes)).any(1).nonzero()[:1]) if len(k) else False:
            row = int(odd)
            column = int(((k[row] < 0) | (k[row] >= sizes)).nonzero()[0])
            raise DataError(
                f"{file}, row {row}, column {found.names[column]}: the value lies outside of those of the training "
                f"data, whose {int(sizes[column])} levels are what the model of {run.path} can code"
            )
        return k, {}
    levels, path = _levels(model), Path(file) if isinstance(file, (str, Path)) else None
    pictures = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES) if path and path.is_dir() else []
    if path and path.is_file() and path.suffix.lower() in SUFFIXES:
        pictures, path = [path], path.parent
    if pictures:
        names = [each.relative_to(path).with_suffix("").as_posix() for each in pictures]
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path}: several pictures are called {min(twice)}, and as .png would be one file")
        k = torch.cat([_fitting(_picture(each), shape, run, str(each)) for each in pictures])
        odd = _pixels(k, levels)[1]
        if odd is not None:
            raise DataError(f"{pictures[odd]} has values that are none of the {levels} levels of the model of {run.path}")
        return _pixels(k, levels)[0], {"names": names}
    if path and path.is_file() and path.suffix == ".npy":
        array = read_array(path)
        data = load_data(array, hold_out=False) if array.ndim > 2 else None
        notes = {"shape": array.shape[1:], "dtype": array.dtype.str}
        x = torch.from_numpy(array) if data is None else data.splits["test"].x
        return _in_range(_fitting(x, shape, run, str(path)), levels, run, str(path)), notes
    name = f"npz:{path}" if path and path.is_file() and path.suffix == ".npz" and len(shape) == 1 else file
    name = f"images:{path}" if path and path.is_file() and path.suffix == ".npz" and len(shape) == 3 else name
    if path and not path.exists() and path.suffix and ":" not in str(file):
        raise DataError(f"there is no file or folder {path}")
    data = load_data(name, root=root or home(run.config["data"]), hold_out=False)
    if split not in data.splits:
        raise DataError(f"{data.name} has no split {split!r}; it has: {', '.join(data.splits)}")
    return _in_range(_fitting(data.splits[split].x, shape, run, data.name), levels, run, data.name), {}


def _picture(path: Path) -> Tensor:
    return load_data(f"images:{path}", hold_out=False).splits["test"].x


def _fitting(x: Tensor, shape: tuple[int, ...], run: Run, origin: str) -> Tensor:
    if tuple(x.shape[1:]) != shape:
        raise DataError(
            f"{origin} has examples of shape {tuple(x.shape[1:])}, and the model of {run.path} is for {shape}: "
            "compression crops and scales nothing"
        )
    return x


def _in_range(x: Tensor, levels: int, run: Run, origin: str) -> Tensor:
    if x.dtype.is_floating_point or int(x.min()) < 0 or int(x.max()) >= levels:
        got = f"{x.dtype} from {float(x.min()):.4g} to {float(x.max()):.4g}"
        raise DataError(
            f"{origin}: the model of {run.path} codes whole numbers 0..{levels - 1}, and got {got}"
            + (": binarized data is needed" if levels == 2 else "")
        )
    return x.long()


def _pixels(x: Tensor, levels: int) -> tuple[Tensor, int | None]:
    """The levels of pixels 0..255, and the first picture with one that no level is shown as."""
    k = (x.double() * (levels - 1) / 255).round()
    odd = (_shown(k, levels) != x).flatten(1).any(1).nonzero()
    return k.long(), int(odd[0]) if len(odd) else None


def _shown(k: Tensor, levels: int) -> Tensor:
    return (k.double() * 255 / (levels - 1)).round()


def _restored(run: Run, model: GenerativeModel, k: Tensor, notes: dict[str, Any]) -> Any:
    """What was compressed, of its levels."""
    columns = _columns(model)
    if columns is not None:
        assert run.schema is not None
        return run.schema.texts(run.schema.decode(columns.of_levels(k)))
    if "names" in notes:
        return _shown(k, _levels(model)).numpy().astype(np.uint8)
    array = k.numpy().astype(notes.get("dtype", "u1"))
    shape = tuple(notes.get("shape", array.shape[1:]))
    if array.ndim == 4 and shape[-1:] == array.shape[1:2] and shape != array.shape[1:] and len(shape) == 3:
        array = array.transpose(0, 2, 3, 1)  # channels were last
    return np.ascontiguousarray(array.reshape(-1, *shape))


def _write(out: Path, made: Any, notes: dict[str, Any]) -> None:
    table, suffix = hasattr(made, "to_csv"), out.suffix.lower()
    kinds = (".csv",) if table else (".npy", ".npz")
    if suffix in kinds:
        with writing(out) as file:
            if table:
                made.to_csv(file, index=False)
            elif suffix == ".npz":
                np.savez_compressed(file, x=made)
            else:
                np.save(file, made)
        return
    if table or made.ndim != 4 or made.shape[1] not in (1, 3):
        raise SettingsError(f"--out must end in {' or '.join(kinds)} for this data; got {out}")
    from PIL import Image

    names = notes.get("names") or [f"{i:0{len(str(len(made) - 1))}d}" for i in range(len(made))]
    one = suffix == ".png"
    if one and len(made) > 1:
        raise SettingsError(f"--out must be a folder for {len(made)} pictures; got {out}")
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or set(name) & {"\\", ":", "\0"}:
            raise DataError(f"the name of a picture, {name!r}, leads out of its folder: the file is refused")
    pictures = [Image.fromarray(each[0] if len(each) == 1 else each.transpose(1, 2, 0)) for each in made]
    if one:
        with replacing(out) as beside:
            pictures[0].save(beside)
        return
    if out.exists():
        raise SettingsError(f"{out} exists: name a folder that is not there yet, for {len(made)} pictures")
    with staging(out.parent) as stage:
        for name, picture in zip(names, pictures, strict=True):
            place = stage / "all" / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
        (stage / "all").rename(out)
