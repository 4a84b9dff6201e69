"""Images: scikit-learn's digits, MNIST and Fashion-MNIST, binarized MNIST, and folders of pictures."""

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genfuse._files import check_unpacked, gunzip
from genfuse.data._dataset import Dataset, Source, Split
from genfuse.data.tables import PARTS, read_arrays
from genfuse.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")


def digits(source: Source) -> Dataset:
    """scikit-learn's handwritten digits: 1,500 + 297 images (1, 8, 8) of 17 levels, labels 0..9; always split alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source.no_argument()
    found = load_digits()
    x = torch.from_numpy(found.images).to(torch.uint8)[:, None]
    y = torch.from_numpy(found.target).long()
    train, test = train_test_split(np.arange(len(y)), test_size=297, stratify=found.target, random_state=0)
    splits = {part: Split(x[rows], y[rows]) for part, rows in (("train", train), ("test", test))}
    return Dataset(source.name, splits, levels=17)


def mnist(source: Source) -> Dataset:
    """MNIST (LeCun et al., 1998), four IDX files: 60,000 + 10,000 images (1, 28, 28) of 256 levels, labels 0..9."""
    return _idx_dataset(source, "mnist")


def fashion_mnist(source: Source) -> Dataset:
    """Fashion-MNIST (arXiv 1708.07747): of MNIST's shapes, sizes and file names, labels 0..9."""
    return _idx_dataset(source, "fashion-mnist")


def binarized_mnist(source: Source) -> Dataset:
    """MNIST binarized once (Larochelle & Murray, 2011): 50,000 + 10,000 + 10,000 images (1, 28, 28) of 0 and 1."""
    source.no_argument()
    folders = ("binarized_mnist", "binarized-mnist", "")
    [path] = source.files(folders, ["binarized_mnist.npz", "binarized-mnist.npz"])
    arrays = read_arrays(path)
    splits = {}
    for part, names in PARTS.items():
        key = next((name for name in names if name in arrays), None)
        if key is None:
            raise DataError(f"{path} has no array {' or '.join(names)}; it has: {', '.join(arrays) or 'none'}")
        pixels = arrays[key]
        if pixels.ndim != 2 or pixels.shape[1] != 784 or not ((pixels == 0) | (pixels == 1)).all():
            raise DataError(f"{path}, {key}: expected (N, 784) of 0 and 1; got {pixels.dtype} {pixels.shape}")
        splits[part] = Split(torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28))
    return Dataset(source.name, splits, levels=2, binarize="static")


def folder(source: Source) -> Dataset:
    """PNG and JPEG pictures of one size, grey (1, H, W) or RGB (3, H, W), 256 levels.

    Pictures in sub-folders are labelled by them, in sorted order. Folders ``train`` and ``test`` (and ``validation``,
    ``valid`` or ``val``) are the splits where they exist; otherwise one picture in five is held out.
    """
    root = source.path()
    if not root.is_dir():
        raise DataError(f"data set {source.name!r}: {root} is no folder")
    parts = {part: root / name for part, names in PARTS.items() for name in names if (root / name).is_dir()}
    if not {"train", "test"} <= parts.keys():
        parts = {"all": root}
    pictures = {part: _pictures(top) for part, top in parts.items()}
    kinds = {part: {_label(path, parts[part]) for path in paths} for part, paths in pictures.items()}
    names = sorted(set().union(*kinds.values()))
    if names[0] == "" and len(names) > 1:
        stray = next(path for part, paths in pictures.items() for path in paths if not _label(path, parts[part]))
        raise DataError(f"{stray} lies beside the sub-folders that are the classes; move it into one of them")
    x = _read_pictures([path for paths in pictures.values() for path in paths])
    number = {name: i for i, name in enumerate(names)}
    y = torch.tensor([number[_label(path, parts[part])] for part, paths in pictures.items() for path in paths])
    if "all" in parts:
        rows = source.hold_out(len(x), "pictures")
    else:
        rows = dict(zip(pictures, torch.arange(len(x)).split([len(paths) for paths in pictures.values()]), strict=True))
    labelled = names != [""]
    splits = {part: Split(x[index], y[index] if labelled else None) for part, index in rows.items()}
    return Dataset(source.name, splits, levels=256, classes=len(names) if labelled else None)


def _pictures(top: Path) -> list[Path]:
    """All pictures under a folder, sorted; files and folders whose names begin with a dot are passed over."""
    found = sorted(
        path
        for path in top.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.relative_to(top).parts)
    )
    if not found:
        raise DataError(f"the folder {top} holds no picture: no {', '.join(SUFFIXES)} in it or its sub-folders")
    return found


def _label(path: Path, top: Path) -> str:
    """The sub-folder of ``top`` that a picture is in, "" for none."""
    parts = path.relative_to(top).parts
    return parts[0] if len(parts) > 1 else ""


def _read_pictures(paths: list[Path]) -> Tensor:
    from PIL import Image

    x: np.ndarray | None = None
    packed = sum(path.stat().st_size for path in paths)
    for i, path in enumerate(paths):
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as picture:
                unpacked = picture.width * picture.height * len(picture.getbands()) * len(paths)
                check_unpacked(path, packed, unpacked, f"{len(paths)} pictures of its size")
                pixels, mode = np.asarray(picture), picture.mode
        except DataError:
            raise
        except Exception as error:  # decoders raise all kinds of errors for damaged files
            raise DataError(f"the picture {path} cannot be read: {error}") from error
        if mode not in ("L", "RGB"):
            raise DataError(f"the picture {path} has mode {mode}; convert all to L (grey) or RGB, 8 bits a channel")
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if x is None:
            x = np.empty((len(paths), *pixels.shape), np.uint8)
        elif pixels.shape != x.shape[1:]:
            raise DataError(
                f"the picture {path} is {_size(pixels.shape)}, but {paths[0]} and all before it are "
                f"{_size(x.shape[1:])}; one size and one mode are needed"
            )
        x[i] = pixels
    return torch.from_numpy(x)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"  # width first, as picture tools write it


def _idx_dataset(source: Source, home: str) -> Dataset:
    source.no_argument()
    wanted = [
        [f"{part}-{kind}{joint}{form}-ubyte{suffix}" for joint in "-." for suffix in (".gz", "")]
        for part in ("train", "t10k")
        for kind, form in (("images", "idx3"), ("labels", "idx1"))
    ]
    files = source.files((home, ""), *wanted)
    splits = {}
    for part, (images, labels) in {"train": files[:2], "test": files[2:]}.items():
        x, y = _read_idx(images, 3), _read_idx(labels, 1)
        if len(x) != len(y):
            raise DataError(f"{images} has {len(x)} images, but {labels} has {len(y)} labels")
        splits[part] = Split(x[:, None], y.long())
    return Dataset(source.name, splits, levels=256)


def _read_idx(path: Path, dims: int) -> Tensor:
    """An IDX file of unsigned bytes, gzipped or not: 0, 0, 8, dims; each size as 4 bytes, big-endian; the bytes."""
    raw = path.read_bytes()
    if not raw:
        raise DataError(f"{path} is empty")
    if raw.startswith(b"\x1f\x8b"):  # what the file is, not what it is called: browsers unpack and keep the name
        try:
            raw = gunzip(path)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is a truncated or corrupt gzip file: {error}; fetch it again") from error
    magic, start = bytes([0, 0, 8, dims]), 4 + 4 * dims
    if raw[:4] != magic:
        raise DataError(
            f"{path} is neither gzip nor IDX with {dims} dimensions of bytes: "
            f"it begins with 0x{raw[:4].hex()}, not 0x{magic.hex()}"
        )
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    size = start + math.prod(shape)
    if len(raw) != size:
        raise DataError(f"{path} has {len(raw)} bytes, but by its header, of shape {shape}, it must have {size}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())
