"""Lossless compression by a trained model, and the files that hold it."""

import copy
import hashlib
import json
import math
import struct
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genfuse._files import check_unpacked, digest, read_array, replacing, staging, writing
from genfuse.applications._coder import BITS, FEW, Coder, Exact, padding
from genfuse.applications._examples import examples
from genfuse.data import load_data
from genfuse.data.images import SUFFIXES
from genfuse.errors import DataError, GenfuseError, NoLevelsError, RunError, SettingsError
from genfuse.metrics import undisturbed
from genfuse.models import Codes
from genfuse.nn import Columns
from genfuse.training import Run
from genfuse.training.run import home

# A file: this head; the sizes of the groups of examples that are coded together, a byte each, whose upper bit says that
# no bits come back; notes, zlib of JSON; the stack, little-endian; and the first bytes of the SHA-256 of all of it.
HEAD = struct.Struct("<4sB16s8sIHI")  # magic, version, digests of model and levels, examples, groups, bytes of notes
MAGIC, VERSION, SEAL = b"\x89GFZ", 1, 8


class Compressed(NamedTuple):
    """What `compress` wrote; bits per dimension are those of a cell of an example, in the mean."""

    examples: int
    bytes: int
    bits_per_dim: float  # of the file
    message: float  # of the stack in it, initial bits counted
    bound: float  # -ELBO or -log P(x), as the model has it
    initial: int  # bits that the latents of the first examples cost, for which none came back


def compress(
    run: Run | str | Path, file: Any, out: str | Path, *, split: str = "test", root: Any = None, limit: Any = None
) -> Compressed:
    """Write the examples of ``file``, at most ``limit``, to ``out``, from which `decompress` makes the same again.

    ``file`` is a picture, a folder of pictures, an array (N, ...) of whole numbers, in memory or .npy, a .csv, a data
    set by name, of which one ``split`` is taken, or else what `load_data` takes. The model's verb ``code`` puts them on
    a stack (`genfuse.models.Codes`).

    Raises SettingsError for a model that does not compress, DataError for examples that are not of its shape, levels or
    columns: nothing is rounded, cropped or left out.
    """
    run = run if isinstance(run, Run) else Run(run)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise SettingsError(
            f"limit, the most examples to compress, must be a whole number above 0, or None; got {limit!r}"
        )
    model = _coding(run)
    k, notes = _read(run, model, file, split, root, limit)
    x, exact = _alphabet(model)[1](k), copy.deepcopy(model).double()
    coder, groups, initial = _coded(exact, x)
    verb = model.log_prob if "log_prob" in model.likelihoods else model.elbo
    with torch.no_grad(), undisturbed(model):
        torch.manual_seed(0)
        bound = -sum(float(verb(part.float()).double().sum()) for part in x.split(500))
    told = zlib.compress(json.dumps(notes).encode(), 9) if notes else b""
    head = HEAD.pack(MAGIC, VERSION, _digest(run, model), _sum(k), len(k), len(groups), len(told))
    content = head + groups + told + coder.stack.get_compressed().astype("<u4").tobytes()
    with writing(Path(out)) as written:
        written.write(content + hashlib.sha256(content).digest()[:SEAL])
    size, cells = len(content) + SEAL, k.numel()
    bits = coder.stack.num_valid_bits()
    return Compressed(len(k), size, 8 * size / cells, bits / cells, bound / math.log(2) / cells, initial)


def decompress(file: str | Path, out: Any = None, *, run: Run | str | Path | None = None) -> tuple[Any, Path]:
    """What `compress` was given, and the folder of the run that it was compressed by: images (N, C, H, W) in uint8, an
    array as it was, or a DataFrame. With ``out`` it is written: a folder of pictures as .png by their names, one
    picture, .npy, .npz (as ``x``) or .csv. A ``run`` that is left out is looked for in ``runs``, here and beside the
    file.

    Raises DataError for a file that is damaged, none of these, or of another version; RunError for another run, or if
    there is none; SettingsError for an ``out`` that cannot hold the data.
    """
    path = Path(file)
    content = path.read_bytes()
    if content[:4] != MAGIC or len(content) < HEAD.size + SEAL:
        raise DataError(f"{path} is no file of `genfuse compress`, or only the beginning of one")
    _, version, wanted, sums, count, pieces, noted = HEAD.unpack_from(content)
    if version != VERSION:
        raise DataError(f"{path} is of version {version} of its format, and this genfuse reads version {VERSION}")
    rest = content[HEAD.size : -SEAL]
    groups, told, stack = rest[:pieces], rest[pieces : pieces + noted], rest[pieces + noted :]
    sealed = hashlib.sha256(content[:-SEAL]).digest()[:SEAL] == content[-SEAL:]
    damaged = DataError(f"{path} is damaged or was cut short: its checksum is not that of its content")
    if not sealed or len(stack) % 4 or not count or sum(size & 127 for size in groups) != count:
        raise damaged
    try:
        notes = json.loads(zlib.decompress(told)) if told else {}
    except (ValueError, zlib.error):
        raise damaged from None
    found = _find(run, wanted, path)
    check_unpacked(path, len(content), count * math.prod(found.config["data"]["shape"]))
    exact, coder, parts = _coding(found).double(), Coder(np.frombuffer(stack, "<u4")), []
    to, of, _ = _alphabet(exact)
    wrong = DataError(f"{path}: what was decoded is not what was compressed, so nothing is written: please report it")
    try:
        with torch.no_grad(), Exact():
            for size in reversed(groups):
                coder.direct = size > 127
                parts.append(to(exact.code(coder, size & 127)).long())
    except DataError:  # numbers that are on no level
        raise wrong from None
    k = torch.cat(parts[::-1])
    left = coder.stack.get_compressed()
    if _sum(k) != sums or not np.array_equal(left, padding(len(left))):
        raise wrong
    if hasattr(exact.config, "columns") and exact.config.columns:
        made: Any = found.schema.texts(found.schema.decode(of(k)))  # type: ignore[union-attr]
    else:
        made = (_pixels(k, exact) if "names" in notes else k).numpy().astype(notes.get("dtype", "u1"))
        shape = tuple(notes.get("shape", made.shape[1:]))
        last = made.ndim == 4 and len(shape) == 3 and shape != made.shape[1:]
        made = np.ascontiguousarray(made.transpose(0, 2, 3, 1) if last else made).reshape(-1, *shape)
    if out is not None:
        _write(Path(out), made, [] if hasattr(made, "to_csv") else _pixels(k, exact).numpy().astype("u1"), notes)
    return made, found.path


def _coded(exact: Any, x: Tensor) -> tuple[Coder, bytearray, int]:
    """Examples on a stack; their groups; and how many bits were paid to start with: those that the stack began with, or
    of latents that were coded alone."""

    def depth(direct: bool) -> int:
        """Words that the first example takes from the stack before it gives any."""
        many = x[0].numel() + 64
        coder = Coder(padding(many), direct)
        exact.code(coder, 1, x[:1])
        return many - coder.least + 2

    latents, borrows = getattr(exact, "latent_dim", 0), getattr(exact, "borrows", False)
    with torch.no_grad(), Exact():
        words, cost = (depth(True), 40 * depth(False)) if borrows else (0, latents * BITS)
        while True:
            coder, groups, done = Coder(padding(words)), bytearray(), 0
            while done < len(x):  # as many as the stack has bits for; where it has none, one alone
                afford = coder.stack.num_valid_bits() // cost if cost else 127
                size = max(1, min(afford, 127, 2**18 // x[0].numel(), len(x) - done))
                coder.direct = afford < 1
                exact.code(coder, size, x[done : done + size])
                groups.append(size | 128 * coder.direct)
                done += size
            if not borrows or coder.least > 1:
                return coder, groups, 32 * words or sum(each > 127 for each in groups) * latents * FEW
            words, cost = words + 8, cost + 256  # one of the others took more than the first


def _coding(run: Run) -> Any:
    model = run.model()
    if not isinstance(model, Codes):
        raise SettingsError(f"a {type(model).__name__} does not compress: a vae of discrete data, idf, and the "
                            "flows realnvp, glow and nsf of images do")  # fmt: skip
    try:
        _alphabet(model)
    except NoLevelsError as error:
        raise NoLevelsError(error.places, run.schema.names if run.schema else ()) from None
    return model


def _digest(run: Run, model: Any) -> bytes:
    """Of a run's model: its kind, settings and weights."""
    weights = (each.numpy().tobytes() for _, each in sorted(model.state_dict().items()))
    return bytes.fromhex(digest(run.config["model"], *weights))[:16]


def _sum(k: Tensor) -> bytes:
    return hashlib.sha256(k.numpy().astype("<i4").tobytes()).digest()[:8]


def _find(run: Run | str | Path | None, wanted: bytes, path: Path) -> Run:
    """The run whose model has a digest."""
    if run is not None:
        run = run if isinstance(run, Run) else Run(run)
        if (got := _digest(run, run.model())) != wanted:
            raise RunError(
                f"{path} was compressed by another model than that of {run.path}: one of digest {wanted.hex()}, and "
                f"the run's is {got.hex()}"
            )
        return run
    places = dict.fromkeys(place.resolve() for place in (Path("runs"), Path(), path.parent, path.parent / "runs"))
    for config in (each for place in places for each in sorted(place.glob("*/config.json"))):
        with suppress(GenfuseError, OSError):
            run = Run(config.parent)
            if _digest(run, run.model()) == wanted:
                return run
    raise RunError(
        f"the model that {path} was compressed by, of digest {wanted.hex()}, is in no folder of "
        f"{', '.join(map(str, places))}: name its run, by --run"
    )


def _alphabet(model: Any) -> tuple[Any, Any, Tensor]:
    """What makes levels k (N, *shape) of examples, examples of levels, and how many levels there are."""
    if getattr(model.config, "columns", None):
        columns = Columns(model.config.columns)
        return columns.levels, columns.of_levels, torch.tensor(columns.sizes)
    if model.config.levels is None:
        raise SettingsError("the model is of real numbers, which have no levels to be coded: train it on images, or on "
                            "a table of integers and categories")  # fmt: skip
    top = model.config.levels - 1
    return lambda x: (x * top).round(), lambda k: k.double() / top, torch.tensor(top + 1)


def _pixels(k: Tensor, model: Any) -> Tensor:
    return (k.double() * 255 / (model.config.levels - 1)).round()


def _read(
    run: Run, model: Any, file: Any, split: str, root: Any, limit: int | None
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """The levels (N, *shape) of examples, and what else is needed to write them as they were."""
    shape, (to, _, sizes), notes = tuple(run.config["data"]["shape"]), _alphabet(model), dict[str, Any]()
    path = Path(file) if isinstance(file, (str, Path)) and Path(file).exists() else None
    pictures = sorted(path.rglob("*") if path.is_dir() else [path]) if path and sizes.dim() == 0 else []
    pictures = [each for each in pictures if each.suffix.lower() in SUFFIXES][:limit]
    columns, origin = tuple[str, ...](), file if isinstance(file, (str, Path)) else f"<{type(file).__name__}>"
    if sizes.dim():
        found = examples(run, file, split=split, root=root)
        if found.columns:
            others = ", ".join(found.columns)
            raise DataError(
                f"{origin} has the columns {others}, which the model of {run.path} does not know: leave them out"
            )
        k, columns = to(found.data.splits[split].x), found.names
    elif pictures and path:
        names = [(each.relative_to(path) if each != path else Path(path.name)).with_suffix("") for each in pictures]
        notes["names"] = [name.as_posix() for name in names]
        if twice := {name for name in notes["names"] if notes["names"].count(name) > 1}:
            raise DataError(f"{origin}: several pictures are called {min(twice)}, and as .png would be one file")
        x = [load_data(f"images:{each}", hold_out=False).splits["test"].x for each in pictures]
        odd = next((i for i, each in enumerate(x) if each.shape[1:] != shape), None)
        k = to(torch.cat(x).double() / 255) if odd is None else x[odd]
        if odd is None and len(wrong := (_pixels(k, model) != torch.cat(x)).flatten(1).any(1).nonzero()):
            raise DataError(f"{pictures[int(wrong[0])]} has values of none of the {int(sizes)} levels of the model of "
                            f"{run.path}, which are spread over 0..255")  # fmt: skip
        origin = origin if odd is None else pictures[odd]
    else:
        array = read_array(path) if path and path.suffix == ".npy" else file if isinstance(file, np.ndarray) else None
        if array is not None:
            if array.dtype.kind not in "biu":
                raise DataError(f"{origin}: expected whole numbers, the levels of examples; got {array.dtype}")
            notes.update(shape=array.shape[1:], dtype=array.dtype.str)
        if isinstance(file, (str, Path)) and path is None and Path(file).suffix and ":" not in str(file):
            raise DataError(f"there is no file or folder {file}")
        name = f"{'images' if len(shape) == 3 else 'npz'}:{path}" if path and path.suffix == ".npz" else file
        if array is not None and array.ndim == 2:
            k = torch.from_numpy(array.astype(np.int64))
        else:
            data = load_data(name if array is None else array, root=root or home(run.config["data"]), hold_out=False)
            if split not in data.splits:
                raise DataError(f"{data.name} has no split {split!r}; it has: {', '.join(data.splits)}")
            k = data.splits[split].x
        if k.is_floating_point():
            raise DataError(f"{origin} has real numbers, and the model of {run.path} is of {int(sizes)} levels")
    k = k[:limit].long()
    if tuple(k.shape[1:]) != shape or not len(k):
        raise DataError(
            f"{origin} has {len(k)} examples of shape {tuple(k.shape[1:])}, and the model of {run.path} takes {shape}; "
            "nothing is cropped or scaled"
        )
    if bool((odd_cells := (k < 0) | (k >= sizes)).any()):
        row, *cell = odd_cells.nonzero()[0].tolist()
        value, levels = int(k[row][tuple(cell)]), int(sizes.expand(shape)[tuple(cell)])
        where = f"cell {tuple(cell)}: {value}"
        if columns and run.schema:  # which are integers: other categories are refused before
            low = int(run.schema.columns[cell[0]].low)
            where = f"column {columns[cell[0]]}: {low + value}, which is not in {low}..{low + levels - 1},"
        raise DataError(
            f"{origin}, example {row}, {where} is none of the {levels} levels that the training data of {run.path} had"
            + ("; binarized data is needed" if levels == 2 and not columns else "")
        )
    return k, notes


def _write(out: Path, made: Any, images: Any, notes: dict[str, Any]) -> None:
    table, suffix = hasattr(made, "to_csv"), out.suffix.lower()
    if suffix in ((".csv",) if table else (".npy", ".npz")):
        with writing(out) as file:
            if table:
                made.to_csv(file, index=False)
            elif suffix == ".npz":
                np.savez_compressed(file, x=made)
            else:
                np.save(file, made)
        return
    if (
        table
        or images.ndim != 4
        or images.shape[1] not in (1, 3)
        or (suffix == ".png" and len(made) > 1)
        or out.is_dir()
    ):
        wanted = ".csv" if table else ".npy or .npz, or for several images be a folder that is not there yet"
        raise SettingsError(f"--out must end in {wanted}; got {out}")
    from PIL import Image

    names = notes.get("names") or [f"{i:0{len(str(len(made) - 1))}d}" for i in range(len(made))]
    if odd := [n for n in names if {"..", "/"} & {*PurePosixPath(n).parts} or not n or {*n} & {*"\\:\0"}]:
        raise DataError(f"a picture is called {odd[0]!r}, which leads out of its folder: the file is refused")
    pictures = [Image.fromarray(each[0] if len(each) == 1 else each.transpose(1, 2, 0)) for each in images]
    if suffix == ".png":
        with replacing(out) as beside:
            pictures[0].save(beside)
        return
    with staging(out.parent) as stage:
        for name, picture in zip(names, pictures, strict=True):
            place = stage / "all" / f"{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
        (stage / "all").rename(out)
