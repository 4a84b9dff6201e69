"""Images: scikit-learn's digits, MNIST and Fashion-MNIST, binarized MNIST, patches of photographs, folders of pictures,
and clips of digits that move."""

import importlib.resources
import io
import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse._files import cache, check_unpacked, digest, gunzip, read_json, replacing, warn, write_json
from genfuse.data._dataset import READING_OF_IMAGES, Damaged, Dataset, Fit, Mode, Source, Split, Stream
from genfuse.data.tables import PART_OF, PARTS, Arrays, find_arrays, in_order, read_arrays
from genfuse.errors import DataError, DataWarning, SettingsError

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


def glyphs(source: Source) -> Dataset:
    """Digits of matplotlib's fonts, bent by chance: 10,000 + 2,000 images (1, 28, 28) of 256 levels, labels 0..9.

    They look like MNIST's and need no files. Each is a glyph that was turned, sheared, stretched and moved, under a
    displacement that is smooth over the image, as hands do it (Simard et al., 2003). Always the same.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    source.no_argument()
    fonts = [f"DejaVu{name}.ttf" for name in ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Italic")]
    drawn = np.zeros((10, len(fonts), 1, 64, 64), np.float32)
    for i, name in enumerate(fonts):
        font = ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf", name)), 52)
        for digit in range(10):
            canvas = Image.new("L", (64, 64))
            ImageDraw.Draw(canvas).text((32, 32), str(digit), 255, font, anchor="mm")
            drawn[digit, i, 0] = np.asarray(canvas) / 255
    generator = torch.Generator().manual_seed(0)

    def chance(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    y = torch.arange(12_000) % 10
    turn, shear = 0.15 * chance(len(y)), 0.2 * chance(len(y))
    scales = (0.1 * chance(len(y), 2)).exp()
    turned = torch.stack([turn.cos(), shear - turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2) * scales[:, None]
    where = torch.cat([turned, 0.07 * chance(len(y), 2, 1)], 2)
    glyph = torch.from_numpy(drawn)[y, torch.randint(len(fonts), (len(y),), generator=generator)]
    x = torch.empty(len(y), 1, 28, 28, dtype=torch.uint8)
    for rows in torch.arange(len(y)).split(1000):
        bent = F.interpolate(0.08 * chance(len(rows), 2, 4, 4), size=(56, 56), mode="bicubic").permute(0, 2, 3, 1)
        grid = F.affine_grid(where[rows], [len(rows), 1, 56, 56], align_corners=False) + bent
        seen = F.avg_pool2d(F.grid_sample(glyph[rows], grid, align_corners=False), 2)
        x[rows] = (seen * 255).round().to(torch.uint8)
    splits = {"train": Split(x[:10_000], y[:10_000]), "test": Split(x[10_000:], y[10_000:])}
    return Dataset(source.name, splits, levels=256)


# Of `sprites`: pixels a side, and how many values scale, orientation, and each of x and y have.
SPRITES = {None: (32, 4, 10, 16), "tiny": (16, 4, 10, 8), "full": (64, 6, 40, 32)}


def sprites(source: Source) -> Dataset:
    """White squares, ellipses and hearts on black, one for each combination of shape, scale, orientation, x and y.

    30,720 images (1, 32, 32) of 4 scales, 10 orientations and 16 x 16 places; "sprites:tiny" has 7,680 of (1, 16, 16),
    with 8 x 8 places, "sprites:full" dSprites' own layout (Matthey et al., 2017), 737,280 of (1, 64, 64): 3 GB.
    Scales are 0.5..1, orientations 0..2 pi, of which the first and the last one are alike, places a pixel apart.
    """
    if source.argument not in SPRITES:
        raise DataError(f"data set {source.name!r}: write sprites, sprites:tiny or sprites:full")
    side, scales, orientations, places = SPRITES[source.argument]
    spans = {"scale": (0.5, 1, scales), "orientation": (0, 2 * np.pi, orientations), "x": (0, 1, places)}
    factors: dict[str, Any] = {name: np.linspace(*span) for name, span in spans.items()}
    factors = {"shape": np.arange(3), **factors, "y": factors["x"]}
    # One canvas for each sprite, of which images are windows: the lower its row and column, the further the sprite.
    reach = side // 4
    across = (np.arange(side + places - 1) - (reach + places - 1)) / reach
    scale, turn = factors["scale"][:, None, None, None], factors["orientation"][:, None, None]
    u = (across * np.cos(turn) + across[:, None] * np.sin(turn)) / scale
    v = (across[:, None] * np.cos(turn) - across * np.sin(turn)) / scale
    square = np.maximum(abs(u), abs(v)) <= 0.68
    ellipse = u**2 + 4 * v**2 <= 0.94
    heart = (1.6 * (u**2 + (v - 0.06) ** 2) - 1) ** 3 + (1.6 * u**2) * (1.265 * (v - 0.06)) ** 3 <= 0
    canvas = np.stack([square, ellipse, heart]).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(canvas, (side, side), axis=(-2, -1))[..., ::-1, ::-1, :, :]
    sizes = [len(values) for values in factors.values()]
    splits = {}
    for part, rows in source.hold_out(math.prod(sizes)).items():
        shape, scale, turn, x, y = where = np.unravel_index(rows.numpy(), sizes)
        images = torch.from_numpy(windows[shape, scale, turn, y, x])[:, None]
        splits[part] = Split(images, factors=torch.from_numpy(np.stack(where, 1)))
    return Dataset(source.name, splits, levels=2, factors={k: tuple(map(float, v)) for k, v in factors.items()})


def mnist(source: Source) -> Dataset:
    """MNIST (LeCun et al., 1998), four IDX files: 60,000 + 10,000 images (1, 28, 28) of 256 levels, labels 0..9."""
    return _idx_dataset(source, "mnist")


def fashion_mnist(source: Source) -> Dataset:
    """Fashion-MNIST (arXiv 1708.07747): of MNIST's shapes, sizes and file names, labels 0..9."""
    data = _idx_dataset(source, "fashion-mnist")
    return replace(data, class_names=GARMENTS) if data.classes == len(GARMENTS) else data


def stacked_mnist(source: Source) -> Dataset:
    """Three digits by chance as the colours of an image (arXiv 1612.02136): 60,000 + 26,000 images (3, H, W), of three
    training digits or three test digits; labels 100 a + 10 b + c. Of MNIST, or of another of the data sets here."""
    makers = {"mnist": mnist, "fashion-mnist": fashion_mnist, "glyphs": glyphs, "digits": digits}
    name = source.argument or "mnist"
    if name not in makers:
        raise DataError(f"data set {source.name!r}: {name!r} cannot be stacked; it takes one of {', '.join(makers)}")
    try:
        single = makers[name](replace(source, name=name, argument=None))
    except DataError as error:
        raise DataError(f"{error}\n`stacked-mnist:glyphs` needs no files") from error
    generator, classes = torch.Generator().manual_seed(source.seed), single.classes or 10
    splits = {}
    for part, count in (("train", 60_000), ("test", 26_000)):
        of = single.splits[part]
        rows = torch.randint(len(of), (count, 3), generator=generator)
        assert of.y is not None
        y = (of.y[rows] * classes ** torch.tensor([2, 1, 0])).sum(1)
        splits[part] = Split(of.x[rows.flatten()].view(count, 3, *single.shape[1:]), y)
    return Dataset(source.name, splits, levels=single.levels, classes=classes**3, channels=single)


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
    """Pictures as 8-bit grey (1, H, W) or RGB (3, H, W), 256 levels; or an npy or npz file of images.

    They must be of one size and one mode, unless `Reading` says what to make of them. Those that are too many for
    memory are decoded once into a file in the cache, which batches are read from.

    Pictures in sub-folders are labelled by them, whose names are the classes'; numbers are in the order of numbers.
    Folders ``train`` and ``test`` (and ``validation``, ``valid`` or ``val``) are the splits if they exist, in any
    case; without ``test`` one training picture in five is held out. Links are followed. Pictures are turned as their
    EXIF data says. What is not read is warned of.
    """
    root = source.path()
    if root.suffix in (".npy", ".npz") and root.is_file():
        source.no_options()
        return of_arrays(source, find_arrays(source, root), str(root))
    if root.suffix.lower() in SUFFIXES and root.is_file() and source.whole:
        picture, rows = _read_pictures(root, [root], Reading.of(source)).x, source.hold_out(1, "picture")
        return Dataset(source.name, {part: Split(picture[index]) for part, index in rows.items()}, levels=256)
    if not root.is_dir():
        raise DataError(f"data set {source.name!r}: {root} is no folder")
    found, others = _files(root)
    if not found:
        raise DataError(f"the folder {root} holds no picture: no {', '.join(SUFFIXES)} in it or its sub-folders")
    pictures, tops = _parts(root, found)
    others += sorted(set(found).difference(*pictures.values()))
    label_of: dict[Path, str] = {}
    bare = []
    for part, paths in pictures.items():  # as macOS and Linux write é differently
        of = {path: unicodedata.normalize("NFC", _folder(path, tops[part])) for path in paths}
        if not any(of.values()):
            bare.append(str(tops[part]))
        elif stray := next((path for path, label in of.items() if not label), None):
            raise DataError(f"{stray} lies beside the sub-folders that are the classes; move it into one of them")
        label_of |= of
    names = in_order(set(label_of.values()) - {""})
    if names and bare:
        warn(
            f"{root}: the pictures of {' and '.join(bare)} have no labels, as they lie in no sub-folders of classes",
            DataWarning,
        )
    if "test" not in pictures:
        (_, whole), *rest = pictures.items()
        few = source.whole or len(whole) < 5
        held = {"train": range(len(whole)), "test": ()} if few else source.hold_out(len(whole), "pictures")
        some = {part: [whole[i] for i in of] for part, of in held.items()}
        pictures = {"train": some["train"], **dict(rest), **({} if source.whole else {"test": some["test"]})}
    try:
        stored = _read_pictures(root, [path for paths in pictures.values() for path in paths], Reading.of(source))
    except DataError as error:  # of the first picture; others may need more
        hint = f"; `genfuse data describe {source.name}` says what all of them need" if "--data." in str(error) else ""
        raise DataError(f"{error}{hint}") from error
    if pictures.get("test") == []:  # what is wrong with the pictures themselves is told before
        source.hold_out(len(pictures["train"]), "pictures")
    number = {name: i for i, name in enumerate(["", *names], -1)}  # -1: without a label
    splits, end = {}, 0
    for part, paths in pictures.items():  # the pixels lie in the order of the splits, so that each is a piece of them
        kept = [path for path in paths if path not in stored.left_out]
        if not kept:
            raise DataError(f"{root}: none of the {len(paths)} pictures of the {part} split can be read")
        start, end = end, end + len(kept)
        y = torch.tensor([number[label_of[path]] for path in kept])
        splits[part] = Split(stored.x[start:end], y if y[0] >= 0 else None, files=tuple(map(str, kept)))
    splits.setdefault("test", splits["train"])  # where nothing is to be held out
    if others:
        suffixes = Counter(path.suffix.lower() or "no suffix" for path in others).most_common(5)
        read = {above for paths in pictures.values() for path in paths for above in path.parents}
        bare = sorted({str(path.parent) for path in others if path.parent not in read})
        warn(
            f"{root}: {so_many(others, 'files', 'are not read')} "
            f"({', '.join(f'{n} {suffix}' for suffix, n in suffixes)}), such as {others[0]}"
            + (f"; nothing at all is read from {', '.join(bare[:5])}" if bare else ""),
            DataWarning,
        )
    if len(names) == 1:
        warn(
            f"{root}: all pictures have one label, {names[0]!r}, the one sub-folder there is; if its own sub-folders "
            "are the classes, name that folder",
            DataWarning,
        )
    return Dataset(source.name, splits, levels=256, class_names=tuple(names) or None, streamed=stored.streamed)


class Survey(NamedTuple):
    """What a folder of pictures holds."""

    sizes: dict[tuple[str, str], list[tuple[int, int]]]  # width and height of each picture, by mode and format
    notes: dict[str, list[str]]  # of what is not as a viewer shows it the pictures
    unread: list[str]  # why a picture cannot be read


def survey(root: Path) -> Survey:
    """Look at all pictures of a folder, whatever they are. Raises DataError if there are none."""
    from PIL import Image

    paths, others = _files(root)
    if not paths:
        raise DataError(f"the folder {root} holds no picture: no {', '.join(SUFFIXES)} in it or its sub-folders")
    found = Survey({}, {}, [])

    def look(path: Path) -> tuple[tuple[str, str], tuple[int, int], list[str]] | str:
        try:
            pixels, notes = _read_picture(path, Reading(None, "crop", "RGB", "skip", "no"), path.stat().st_size, 1)
        except DataError as error:
            return str(error).partition(";")[0]
        with Image.open(path, formats=FORMATS) as picture:
            turned = ["are turned as EXIF data says"] if picture.getexif().get(0x0112, 1) != 1 else []
            return (picture.mode, picture.format or ""), pixels.shape[:0:-1], [*notes, *turned]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, seen in zip(paths, pool.map(look, paths), strict=True):
            if isinstance(seen, str):
                found.unread.append(seen)
                continue
            kind, size, notes = seen
            found.sizes.setdefault(kind, []).append(size)
            for note in notes:
                found.notes.setdefault(note, []).append(str(path))
    if others:
        found.notes["are not read"] = [*map(str, others)]
    return found


def photos(source: Source) -> Dataset:
    """Patches (3, 48, 48) of the seven colour photographs that scikit-learn and scikit-image ship, 256 levels, labelled
    by photograph; ``photos:64`` has other sides. Always the same.

    A sixth of each photograph, a band at its right, is the test split, cut edge to edge; training patches, of the rest,
    overlap by half. Raises DataError without scikit-image.
    """
    from PIL import Image

    (side,) = _whole_numbers(source, (48,), (8,), (160,))
    folders = [Path(str(importlib.resources.files("sklearn")), "datasets/images")]
    try:
        folders.append(Path(str(importlib.resources.files("skimage")), "data"))
    except ModuleNotFoundError:
        raise DataError(f"data set {source.name!r} needs scikit-image: pip install 'genfuse[images]'") from None
    names = ("china.jpg flower.jpg", "astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg")
    patches: dict[str, list[Tensor]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    paths = [folder / name for folder, of in zip(folders, names, strict=True) for name in of.split()]
    for label, path in enumerate(paths):
        picture = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        edge = picture.shape[2] - max(side, picture.shape[2] // 6)
        for part, of, step in (("train", picture[:, :, :edge], side // 2), ("test", picture[:, :, edge:], side)):
            cut = of.unfold(1, side, step).unfold(2, side, step).flatten(1, 2).transpose(0, 1)
            patches[part].append(cut)
            labels[part] += [label] * len(cut)
    splits = {part: Split(torch.cat(cut), torch.tensor(labels[part])) for part, cut in patches.items()}
    return Dataset(source.name, splits, levels=256, class_names=tuple(path.stem for path in paths))


def clips(source: Source) -> Dataset:
    """Digits that move evenly and bounce off the walls (arXiv 1502.04681): clips (T, 1, H, W), 256 levels, 4,000 + 500.

    ``clips:8,32,1``, which is usual, are 8 frames of 32 x 32 cells with one digit. Digits are MNIST's if it is found,
    else those of `glyphs`, training and test digits apart, at half their size unless frames have 56 cells or more. Made
    when they are loaded, by ``source.seed``.
    """
    frames, side, count = _whole_numbers(source, (8, 32, 1), (2, 16, 1), (32, 64, 9))
    plain = replace(source, argument=None)
    there = [file for of in ("", "mnist/") if source.root for file in source.root.glob(f"{of}train-images*")]
    base = mnist(plain) if there else glyphs(plain)
    halves = 1 if side >= 2 * base.shape[1] else 2
    size = base.shape[1] // halves
    splits = {}
    for part, n in (("train", 4000), ("test", 500)):
        generator = torch.Generator().manual_seed(2 * source.seed + (part == "test"))
        room = side - size
        at = torch.rand(n, count, 2, generator=generator) * room
        angle = torch.rand(n, count, generator=generator) * 2 * math.pi
        speed = side * (0.05 + 0.05 * torch.rand(n, count, 1, generator=generator))
        speed = speed * torch.stack([angle.cos(), angle.sin()], 2)
        way = at[:, None] + torch.arange(frames).view(1, -1, 1, 1) * speed[:, None]  # (n, T, count, 2)
        corner = (room - (way.remainder(2 * room) - room).abs()).round().long()
        x = torch.zeros(n, frames, 1, side, side, dtype=torch.uint8)
        digit = base.splits[part].x[torch.randint(len(base.splits[part]), (n * count,), generator=generator)].float()
        digit = F.avg_pool2d(digit, halves).round().byte().view(n, count, size, size)
        window = torch.arange(size)
        i, t = torch.arange(n).view(-1, 1, 1, 1), torch.arange(frames).view(1, -1, 1, 1)
        for k in range(count):
            rows, columns = (corner[:, :, k, axis, None, None] for axis in (0, 1))
            where = (i, t, 0, rows + window[:, None], columns + window)
            x[where] = torch.maximum(x[where], digit[:, k, None])
        splits[part] = Split(x)
    return Dataset(source.name, splits, levels=256)


def _whole_numbers(
    source: Source, usual: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]
) -> tuple[int, ...]:
    """The numbers of an argument such as 8,32, the usual ones in place of those left out at its end."""
    words = (source.argument or "").replace(" ", "").split(",") if source.argument else []
    given = [int(word) if word.isdecimal() else -1 for word in words]
    numbers = (*given, *usual[len(given) :])
    ranges = [f"{a}..{b}" for a, b in zip(least, most, strict=True)]
    if len(numbers) != len(usual) or not all(a <= k <= b for a, k, b in zip(least, numbers, most, strict=True)):
        raise DataError(f"data set {source.name!r}: the argument is whole numbers of {', '.join(ranges)}, by default "
                        f"{','.join(map(str, usual))}; got {source.argument}")  # fmt: skip
    return numbers


class Reading(NamedTuple):
    """How a folder of pictures is read: `READING_OF_IMAGES`, checked."""

    size: tuple[int, int] | None  # height and width of all; None: as they are
    fit: str
    mode: str  # "": as they are
    damaged: str
    stream: str

    @classmethod
    def of(cls, source: Source) -> "Reading":
        """Raises SettingsError for what cannot be meant."""
        given = {key: source.options.get(key, value) for key, value in READING_OF_IMAGES.items()}
        for key, choices in {"fit": Fit, "damaged": Damaged, "stream": Stream, "mode": Mode}.items():
            if given[key] not in get_args(choices):
                known = ", ".join(filter(None, get_args(choices)))
                raise SettingsError(f"{key} must be one of {known}; got {given[key]!r}")
        sides = given.pop("size").replace(" ", "")
        if sides and not re.fullmatch(r"0*[1-9]\d{0,4}(,0*[1-9]\d{0,4})?", sides):
            raise SettingsError(
                f"size must be a side in pixels, as 64, or a height and a width, as 48,64, each 1..99999; got {sides!r}"
            )
        height, _, width = sides.partition(",")
        return cls((int(height), int(width or height)) if sides else None, **given)


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

    top = root
    while len(names := {_folder(path, top) for path in found}) == 1 and "" not in names:  # an archive's own, perhaps
        deeper = top / min(names)
        within = {name.lower() for path in found for name in path.parent.relative_to(deeper).parts}
        if deeper.name.lower() in PART_OF or not within & PART_OF.keys():
            break
        top = deeper
    folders: dict[str, str] = {}
    for name in sorted(names):
        if (part := PART_OF.get(name.lower())) and (other := folders.setdefault(part, name)) != name:
            raise DataError(f"{top / other} and {top / name} are both called as the {part} split; leave one")
    if folders and "train" not in folders:
        raise DataError(
            f"{top} has {' and '.join(folders.values())}, but no train split: name a single folder to have it split, "
            "or rename the folder if it is a class"
        )
    part_of = {path: PART_OF.get(_folder(path, top).lower()) for path in found}
    outside = next((path for path, part in part_of.items() if part is None), None)
    if folders and outside is not None and "test" not in folders:
        raise DataError(
            f"the folder {top / folders['train']} is called as a split, but {outside} lies in none: put all pictures "
            "into folders train, validation and test, or rename the folder if it is a class"
        )
    pictures = {part: [path for path in found if part_of[path] == part] for part in PARTS if part in folders}
    pictures, tops = pictures or {"all": found}, {part: top / name for part, name in folders.items()} or {"all": top}
    for part, paths in pictures.items():
        for path in paths:
            if odd := [name for name in path.parent.relative_to(tops[part]).parts if name.lower() in PART_OF]:
                raise DataError(
                    f"{path}: the folder {odd[0]} is called as a split, but lies inside of a class: splits are the "
                    f"upper folders, {odd[0]}/CLASS; rename it if it is none"
                )
    return pictures, tops


def _folder(path: Path, top: Path) -> str:
    """The sub-folder of ``top`` that a picture is in, "" for none."""
    parts = path.relative_to(top).parts
    return parts[0] if len(parts) > 1 else ""


class Pictures(NamedTuple):
    x: Tensor  # (N, C, H, W) in uint8
    left_out: set[Path]  # what is not in it
    streamed: bool  # whether x lies in a file


COLOURED = "coloured"
ONE = {"are": "is", "have": "has", "files": "file"}


class DamagedError(DataError):
    """A picture that can be left out."""


def _read_pictures(root: Path, paths: list[Path], reading: Reading) -> Pictures:
    """The pixels of all pictures, in memory or in a file of the cache; warns of what is not as a viewer shows it."""
    told: dict[str, list[str]] = {}  # what was found, and in which pictures
    packed = sum(path.stat().st_size for path in paths)

    def read(path: Path, of: Reading = reading, told: dict[str, list[str]] = told) -> np.ndarray | None:
        try:
            pixels, notes = _read_picture(path, of, packed, len(paths))
        except DamagedError as error:
            if of.damaged == "refuse":
                raise
            told.setdefault("are left out", []).append(str(error).partition(";")[0])
            return None
        for note in notes:
            told.setdefault(note, []).append(str(path))
        return pixels

    lost: dict[str, list[str]] = {}
    first = next((pixels for path in paths if (pixels := read(path, told=lost)) is not None), None)
    if first is None:
        why = next(iter(lost.values()))[0]
        raise DataError(why if len(paths) == 1 else f"none of the {len(paths)} pictures in {root} can be read: {why}")
    if reading.mode == "auto":
        in_colour = reading._replace(mode="RGB", damaged="skip")
        coloured = (pixels is not None and not _grey(pixels) for pixels in (read(p, in_colour, {}) for p in paths))
        reading = reading._replace(mode="RGB" if any(coloured) else "L")
        first = first[: 3 if reading.mode == "RGB" else 1]
    shape, size = first.shape, first.nbytes * len(paths)
    left_out: set[Path] = set()

    def decoded() -> Iterator[np.ndarray]:
        """The pixels of each picture in order, but of those that are left out."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders leave Python's lock
            for start in range(0, len(paths), 256):  # so that no more than these wait to be kept
                part = paths[start : start + 256]
                for path, pixels in zip(part, pool.map(partial(read, of=reading), part), strict=True):
                    if pixels is None:
                        left_out.add(path)
                        continue
                    if pixels.shape != shape:
                        raise DataError(
                            f"the picture {path} is {_size(pixels.shape)}, but {paths[0]} and all before it are "
                            f"{_size(shape)}; one size and one mode are needed: --data.size 64, or another, makes them "
                            "of one size, --data.mode auto of one mode"
                        )
                    if shape[0] == 3 and COLOURED not in told and not _grey(pixels):
                        told[COLOURED] = []
                    yield pixels

    if reading.stream == "no" or (reading.stream == "auto" and size <= _memory() / 2):
        memory = np.empty((len(paths), *shape), np.uint8)
        for place, pixels in zip(memory, decoded(), strict=False):
            place[...] = pixels
        found = Pictures(torch.from_numpy(memory[: len(paths) - len(left_out)]), left_out, False)
    else:
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        file = cache("pictures") / f"{digest({'pictures': stats, 'reading': reading})[:32]}.pixels"
        facts: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            facts = read_json(file.with_suffix(".json"))
        rows = len(paths) - len(facts.get("left_out", ()))
        if not facts or not file.is_file() or file.stat().st_size != rows * first.nbytes:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as beside, open(beside, "wb") as stored:
                stored.writelines(pixels.tobytes() for pixels in decoded())
                facts = {"left_out": sorted(map(str, left_out)), "told": told}
                write_json(file.with_suffix(".json"), facts, indent=0)
            rows = len(paths) - len(left_out)
        told = facts["told"]
        warn(
            f"{root}: the pixels of {rows:,} pictures, {size / 1e9:.3g} GB, are kept in {file} and read from there",
            DataWarning,
        )
        stored_bytes = torch.from_file(str(file), shared=False, size=rows * first.nbytes, dtype=torch.uint8)
        found = Pictures(stored_bytes.view(rows, *shape), set(map(Path, facts["left_out"])), True)
    if told.pop(COLOURED, None) is None and shape[0] == 3:
        told["are RGB, but grey: --data.mode auto reads them as L, with a third of the numbers"] = [*map(str, paths)]
    for note, where in told.items():
        named = ", ".join(sorted(where)[:3])  # in no order yet, as threads found them
        warn(f"{root}: {so_many(where, 'of the pictures', note)}, such as {named}", DataWarning)
    return found


def so_many(found: Sized, what: str, note: str) -> str:
    """As "2 files are not read", or "1 of the pictures is left out"."""
    if len(found) == 1:
        what, note = (" ".join(ONE.get(word, word) for word in words.split(" ")) for words in (what, note))
    return f"{len(found):,} {what} {note}"


def _grey(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[:1]).all())


def _memory() -> float:
    """Bytes of memory that this process may have, infinite if it is not known."""
    found, groups = [math.inf], {""}
    with suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError):  # of a container, of a job in one, of a unit of systemd
        groups |= {line.rpartition(":")[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}
    for group in {each for name in groups for each in (Path(name), *Path(name).parents)}:
        for file in (Path(group, "memory.max"), Path("memory", group, "memory.limit_in_bytes")):
            with suppress(OSError, ValueError):  # "max": no limit
                found.append(int(Path("/sys/fs/cgroup", file).read_text()))
    return min(found)


def _read_picture(path: Path, reading: Reading, packed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """A picture as (C, H, W) in uint8, and what of it is not as a viewer shows it."""
    from PIL import Image, ImageOps

    notes: list[str] = []
    try:
        with Image.open(path, formats=FORMATS) as picture:
            unpacked = picture.width * picture.height * len(picture.getbands())
            if reading.size:
                check_unpacked(path, path.stat().st_size, unpacked, "the picture")
            else:
                check_unpacked(path, packed, unpacked * count, f"{count} pictures of its size")
            frames, odd, mode = getattr(picture, "n_frames", 1), _not_as_shown(picture), picture.mode
            if reading.size:  # a JPEG need not be decoded at many times the size
                picture.draft(None, (2 * max(reading.size),) * 2)
            if frames > 1 and picture.format != "MPO":  # a photo and its previews
                raise DamagedError(f"the picture {path} has {frames} frames; {CONVERT}")
            if not reading.mode and (odd or mode not in ("L", "RGB")):
                raise DataError(
                    f"the picture {path} has {odd or f'mode {mode}'}; {CONVERT}, or have them read so: --data.mode RGB"
                )
            ImageOps.exif_transpose(picture, in_place=True)
            turned = _plain(picture, notes)
            if mode[0] == "I" or (odd and odd.startswith("16")):
                notes.append("have 16 bits a channel, of which the upper 8 are read")
            turned = turned.convert({"": mode, "auto": "RGB"}.get(reading.mode, reading.mode))
            if reading.size:
                size, method = reading.size[::-1], Image.Resampling.LANCZOS
                if reading.fit == "crop":
                    turned = ImageOps.fit(turned, size, method)
                else:
                    turned = ImageOps.pad(turned, size, method) if reading.fit == "pad" else turned.resize(size, method)
            pixels = np.asarray(turned)
    except DataError:
        raise
    except Exception as error:  # decoders raise all kinds of errors for damaged files
        raise DamagedError(f"the picture {path} cannot be read: {error}; --data.damaged skip leaves it out") from error
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)), notes


def _plain(picture: Any, notes: list[str]) -> Any:
    """A picture of any mode as L or RGB: on white where it is transparent, in the colours of sRGB."""
    from PIL import Image, ImageCms

    profile = picture.info.get("icc_profile")
    if picture.mode == "F":
        raise ValueError("its values are floating-point numbers, whose range nobody knows")
    if picture.mode[0] == "I":  # 16 bits, in 16 or 32
        cells = np.asarray(picture)
        if cells.min() < 0 or cells.max() > 65535:
            raise ValueError(f"it has values from {cells.min()} to {cells.max()}, not of 8 or 16 bits")
        picture = Image.fromarray((cells >> 8).astype(np.uint8))
    if "transparency" in picture.info or {"A", "a"} & {*picture.getbands()}:
        notes.append("are transparent in part, and are read as on white")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        picture = picture.convert("RGB")
    elif picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(own).lower():
                seen = (
                    ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or picture
                )
                picture = seen.convert("L") if picture.mode == "L" else seen
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("have a colour profile that cannot be applied")
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")


CONVERT = "convert all to L (grey) or RGB, 8 bits a channel"


def _not_as_shown(picture: Any) -> str | None:
    """What a viewer would show of a picture, and Pillow's array of mode L or RGB does not have."""
    for *_, coding in picture.tile:  # how the file's bytes are to be read: ";16B", or of a PPM the largest value
        parts = coding if isinstance(coding, tuple) else (coding,)
        if picture.mode in ("L", "RGB") and (
            any(re.search(r";16[BLN]", str(part)) for part in parts)
            or (picture.format == "PPM" and any(isinstance(part, int) and part > 255 for part in parts))
        ):
            return "16 bits a channel"
    if "transparency" in picture.info and picture.mode in ("L", "RGB"):
        return "a transparent colour"
    return None


def of_arrays(source: Source, found: Arrays, path: str) -> Dataset:
    """Images (N, H, W), (N, C, H, W) or (N, H, W, C), or clips of T of the latter, (N, T, C, H, W) or (N, T, H, W, C),
    whole numbers 0..255, perhaps with labels."""
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
    """An array of images as (N, C, H, W), of clips as (N, T, C, H, W), in uint8."""
    if array.ndim not in (3, 4, 5) or 0 in array.shape:
        raise DataError(
            f"{origin}: expected images, (N, H, W), (N, C, H, W) or (N, H, W, C), or clips, (N, T, C, H, W) or "
            f"(N, T, H, W, C); got {array.shape}"
        )
    if array.ndim == 5:
        frames = _images(f"{origin}, frames", array.reshape(-1, *array.shape[2:]))
        return frames.unflatten(0, array.shape[:2])
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
