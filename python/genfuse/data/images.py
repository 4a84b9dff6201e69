"""Images: scikit-learn's digits, MNIST and Fashion-MNIST, binarized MNIST, and folders of pictures."""

import math
import os
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfuse._files import check_unpacked, gunzip
from genfuse.data._dataset import Dataset, Source, Split
from genfuse.data.tables import PART_OF, PARTS, Arrays, find_arrays, in_order, read_arrays
from genfuse.errors import DataError, DataWarning

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


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
    data = _idx_dataset(source, "fashion-mnist")
    return replace(data, class_names=GARMENTS) if data.classes == len(GARMENTS) else data


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
    """Pictures of one size, 8-bit grey (1, H, W) or RGB (3, H, W), 256 levels; or an npy or npz file of images.

    Pictures in sub-folders are labelled by them, whose names are the classes'; numbers are in the order of numbers.
    Folders ``train`` and ``test`` (and ``validation``, ``valid`` or ``val``) are the splits if they exist, in any
    case; without ``test`` one training picture in five is held out. Links are followed. Pictures are turned as their
    EXIF data says. What is not read is warned of.
    """
    root = source.path()
    if root.suffix in (".npy", ".npz") and root.is_file():
        return of_arrays(source, find_arrays(source, root), str(root))
    if root.suffix.lower() in SUFFIXES and root.is_file():
        picture, rows = _read_pictures([root]), source.hold_out(1, "picture")
        return Dataset(source.name, {part: Split(picture[index]) for part, index in rows.items()}, levels=256)
    if not root.is_dir():
        raise DataError(f"data set {source.name!r}: {root} is no folder")
    found, others = _files(root)
    if not found:
        raise DataError(f"the folder {root} holds no picture: no {', '.join(SUFFIXES)} in it or its sub-folders")
    pictures, tops = _parts(root, found)
    others += sorted(set(found).difference(*pictures.values()))
    labels = {part: [_label(path, tops[part]) for path in paths] for part, paths in pictures.items()}
    for part, of in labels.items():
        if "" in of and any(of):
            stray = pictures[part][of.index("")]
            raise DataError(f"{stray} lies beside the sub-folders that are the classes; move it into one of them")
    names = in_order(set().union(*labels.values()) - {""})
    if names and (bare := [str(tops[part]) for part, of in labels.items() if not any(of)]):
        warnings.warn(
            f"{root}: the pictures of {' and '.join(bare)} have no labels, as they lie in no sub-folders of classes",
            DataWarning,
            stacklevel=3,
        )
    x = _read_pictures([path for paths in pictures.values() for path in paths])
    number = {name: i for i, name in enumerate(["", *names], -1)}  # -1: without a label
    y = torch.tensor([number[label] for of in labels.values() for label in of])
    ends = torch.arange(len(x)).split([len(paths) for paths in pictures.values()])
    rows = dict(zip(pictures, ends, strict=True))
    if "test" not in rows:
        first = rows.pop(next(iter(rows)))
        held = source.hold_out(len(first), "pictures")
        rows = {"train": first[held["train"]], **rows, "test": first[held["test"]]}
    if others:
        suffixes = Counter(path.suffix.lower() or "no suffix" for path in others).most_common(5)
        read = {path.parent for paths in pictures.values() for path in paths}
        bare = sorted({str(path.parent) for path in others if path.parent not in read})
        warnings.warn(
            f"{root}: {len(others)} files are not read ({', '.join(f'{n} {suffix}' for suffix, n in suffixes)}), such "
            f"as {others[0]}" + (f"; nothing at all is read from {', '.join(bare[:5])}" if bare else ""),
            DataWarning,
            stacklevel=3,
        )
    if len(names) == 1:
        warnings.warn(
            f"{root}: all pictures have one label, {names[0]!r}, the one sub-folder there is; if its own sub-folders "
            "are the classes, name that folder",
            DataWarning,
            stacklevel=3,
        )
    splits = {part: Split(x[index], y[index] if y[index[0]] >= 0 else None) for part, index in rows.items()}
    return Dataset(source.name, splits, levels=256, class_names=tuple(names) or None)


def _files(top: Path) -> tuple[list[Path], list[Path]]:
    """The pictures under a folder, sorted, and all other files; names that begin with a dot are passed over."""
    found: tuple[list[Path], list[Path]] = ([], [])
    for here, folders, names in os.walk(top, followlinks=True):
        real = Path(here).resolve()
        folders[:] = [
            name for name in folders
            if not name.startswith(".") and (Path(here, name).resolve() not in (real, *real.parents))  # a link upwards
        ]  # fmt: skip
        for name in names:
            if not name.startswith("."):
                found[Path(name).suffix.lower() not in SUFFIXES].append(Path(here, name))
    return sorted(found[0]), sorted(found[1])


def _parts(root: Path, found: list[Path]) -> tuple[dict[str, list[Path]], dict[str, Path]]:
    """The pictures of each split and the folder that it is; "all" if there are no folders of splits."""

    def below(top: Path) -> set[str]:
        return {path.relative_to(top).parts[0] for path in found if path.parent != top}

    def split_of(path: Path, top: Path) -> str | None:
        parts = path.relative_to(top).parts
        return PART_OF.get(parts[0].lower()) if len(parts) > 1 else None

    top = root
    while len(below(top)) == 1 and not any(path.parent == top for path in found):  # an archive's own folder, perhaps
        if {name.lower() for name in below(top)} & PART_OF.keys():
            break
        deeper = top / next(iter(below(top)))
        if not any(part.lower() in PART_OF for path in found for part in path.parent.relative_to(deeper).parts):
            break
        top = deeper
    folders: dict[str, str] = {}
    for name in sorted(below(top)):
        if (part := PART_OF.get(name.lower())) is None:
            continue
        if part in folders:
            raise DataError(f"{top / folders[part]} and {top / name} are both called as the {part} split; leave one")
        folders[part] = name
    pictures = {part: [path for path in found if split_of(path, top) == part] for part in PARTS if part in folders}
    tops = {part: top / name for part, name in folders.items()}
    if folders and "train" not in folders:
        raise DataError(
            f"{top} has {' and '.join(folders.values())}, but no train split: name a single folder to have it split, "
            "or rename the folder if it is a class"
        )
    outside = next((path for path in found if split_of(path, top) is None), None)
    if folders and outside is not None and "test" not in folders:
        raise DataError(
            f"the folder {top / folders['train']} is called as a split, but {outside} lies in none: put all pictures "
            "into folders train, validation and test, or rename the folder if it is a class"
        )
    if not folders:
        pictures, tops = {"all": found}, {"all": top}
    for part, paths in pictures.items():
        for path in paths:
            if odd := [name for name in path.parent.relative_to(tops[part]).parts if name.lower() in PART_OF]:
                raise DataError(
                    f"{path}: the folder {odd[0]} is called as a split, but lies inside of a class: splits are the "
                    f"upper folders, {odd[0]}/CLASS; rename it if it is none"
                )
    return pictures, tops


def _label(path: Path, top: Path) -> str:
    """The sub-folder of ``top`` that a picture is in, "" for none."""
    parts = path.relative_to(top).parts
    return unicodedata.normalize("NFC", parts[0]) if len(parts) > 1 else ""  # as macOS and Linux write é differently


def _read_pictures(paths: list[Path]) -> Tensor:
    from PIL import Image, ImageOps

    x: np.ndarray | None = None
    packed = sum(path.stat().st_size for path in paths)
    for i, path in enumerate(paths):
        try:
            with Image.open(path, formats=FORMATS) as picture:
                unpacked = picture.width * picture.height * len(picture.getbands()) * len(paths)
                check_unpacked(path, packed, unpacked, f"{len(paths)} pictures of its size")
                odd = _not_as_shown(picture)
                pixels, mode = np.asarray(ImageOps.exif_transpose(picture)), picture.mode
        except DataError:
            raise
        except Exception as error:  # decoders raise all kinds of errors for damaged files
            raise DataError(f"the picture {path} cannot be read: {error}") from error
        if odd or mode not in ("L", "RGB"):
            raise DataError(f"the picture {path} has {odd or f'mode {mode}'}; {CONVERT}")
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


CONVERT = "convert all to L (grey) or RGB, 8 bits a channel"


def _not_as_shown(picture: Any) -> str | None:
    """What a viewer would show of a picture of mode L or RGB, and Pillow's array does not have."""
    for *_, coding in (
        picture.tile if picture.mode in ("L", "RGB") else ()
    ):  # how the file's bytes are to be read: ";16B", or of a PPM the largest value
        parts = coding if isinstance(coding, tuple) else (coding,)
        if any(re.search(r";16[BLN]", str(part)) for part in parts) or (
            picture.format == "PPM" and any(isinstance(part, int) and part > 255 for part in parts)
        ):
            return "16 bits a channel"
    if "transparency" in picture.info:
        return "a transparent colour"
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:  # MPO: a photo and its previews
        return f"{picture.n_frames} frames"
    return None


def of_arrays(source: Source, found: Arrays, path: str) -> Dataset:
    """Images (N, H, W), (N, C, H, W) or (N, H, W, C), whole numbers 0..255, perhaps with labels."""
    parts = {part: _images(*each) for part, each in found.x.items()}
    y: dict[str, Tensor] = found.y
    if "all" in parts:
        rows = source.hold_out(len(parts["all"]), "images")
        y = {part: y["all"][of] for part, of in rows.items() if y}
        parts = {part: parts["all"][of] for part, of in rows.items()}
    most = {part: int(x.max()) for part, x in parts.items()}
    levels = 2 if max(most.values()) < 2 else 256
    if levels > 2 and (dark := next((part for part, value in most.items() if value < 2), None)):
        other = max(most, key=lambda part: most[part])
        raise DataError(
            f"{path}: the {dark} split has no values but 0 and 1, the {other} split reaches {most[other]}: "
            "give all the same scale"
        )
    splits = {part: Split(x, y.get(part)) for part, x in parts.items()}
    return Dataset(source.name, splits, levels=levels, classes=found.classes, class_names=found.class_names)


def _images(origin: str, array: np.ndarray) -> Tensor:
    """An array of images as (N, C, H, W) in uint8."""
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{origin}: expected images, (N, H, W), (N, C, H, W) or (N, H, W, C); got {array.shape}")
    if array.dtype.kind not in "biu" or array.min() < 0 or array.max() > 255:
        spread = f" from {array.min():.4g} to {array.max():.4g}" if array.dtype.kind in "biuf" else ""
        raise DataError(f"{origin}: expected whole numbers 0..255, such as uint8; got {array.dtype}{spread}")
    if array.ndim == 3:
        if array.shape[2] in (3, 4) and min(array.shape[:2]) > 4:
            raise DataError(
                f"{origin}: {array.shape} is one image with its channels last, or {len(array)} of "
                f"{array.shape[2]}x{array.shape[1]}; save images as (N, C, H, W)"
            )
        array = array[:, None]
    else:
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first == last:
            raise DataError(
                f"{origin}: {'both' if first else 'none'} of the axes 1 and 3 of {array.shape} may be channels, 1 or 3 "
                "of them; save images as (N, 1 or 3, H, W) with sides of other lengths"
            )
        array = array if first else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))


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
