"""`python -m benchmarks compression`: bits per dimension of lossless compression, beside gzip, bz2 and picture formats.

1,000 test images of MNIST, binarized and with 8 bits, and all of digits. General programs are given all images as one
file, binary ones packed to bits; formats of pictures once all as one picture of 32 images a row, once each image alone.
"""

import bz2
import gzip
import io
import math
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import genfuse
from genfuse.applications import compress, decompress
from genfuse.cli import main

# Data set: the trainings, by name, as `genfuse train` takes them.
TRAININGS = {
    "binarized-mnist": {"vae": "vae --steps 20000 --schedule cosine"},
    "mnist": {
        "vae": "vae --steps 6000 --lr 2e-3 --schedule cosine --model.decoder discretized-logistic --model.mixtures 3 "
        "--model.latent-dim 32",
        "idf": "idf --steps 3000 --batch-size 64 --schedule cosine",
        "realnvp": "realnvp --steps 6000 --schedule cosine",
    },
    "digits": {
        "vae": "vae --steps 3000 --schedule cosine --model.decoder discretized-logistic --model.latent-dim 10",
        "idf": "idf --steps 800 --schedule cosine",
        "realnvp": "realnvp --steps 500 --schedule cosine",
        "nsf": "nsf --steps 500 --schedule cosine --model.logit 0.05",
    },
}
PUBLISHED = {"binarized-mnist": 0.19, "mnist": 1.41}  # BB-ANS, arXiv 1901.04866, table 2: all 10,000 images


def _saved(form: str, **options: object) -> Callable[[np.ndarray], bytes]:
    def save(pixels: np.ndarray) -> bytes:
        picture = Image.fromarray(pixels)
        picture = picture.convert("1") if pixels.max() == 255 and set(np.unique(pixels)) <= {0, 255} else picture
        if form != "PNG":  # they have no pictures of one bit
            picture = picture.convert("RGB" if form == "WEBP" else "L")
        picture.save(file := io.BytesIO(), form, **options)
        return file.getvalue()

    return save


def formats() -> dict[str, Callable[[np.ndarray], bytes]]:
    """Formats of pictures that Pillow has here."""
    found = {"PNG": _saved("PNG", optimize=True), "WebP": _saved("WEBP", lossless=True, quality=100, method=6)}
    try:
        import pillow_jxl  # noqa: F401
    except ImportError:
        print("JPEG XL is left out: pip install pillow-jxl-plugin")
        return found
    return {**found, "JPEG XL": _saved("JXL", lossless=True, effort=9)}


def others(x: np.ndarray, levels: int) -> dict[str, tuple[float, float | None]]:
    """Bits per dimension of images (N, H, W) by name: all at once, and each alone."""
    raw = np.packbits(x).tobytes() if levels == 2 else x.tobytes()
    found: dict[str, tuple[float, float | None]] = {
        "gzip": (8 * len(gzip.compress(raw, 9)) / x.size, None),
        "bz2": (8 * len(bz2.compress(raw, 9)) / x.size, None),
    }
    shown = (x.astype(np.uint16) * 255 // (levels - 1)).astype(np.uint8)
    rows = math.ceil(len(x) / 32)
    sheet = np.zeros((rows * 32, *x.shape[1:]), np.uint8)
    sheet[: len(x)] = shown
    sheet = sheet.reshape(rows, 32, *x.shape[1:]).swapaxes(1, 2).reshape(rows * x.shape[1], -1)
    for name, save in formats().items():
        found[name] = (8 * len(save(sheet)) / x.size, 8 * sum(len(save(each)) for each in shown) / x.size)
    return found


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--data", action="append", choices=list(TRAININGS), help="only this one (may be repeated)")
    parser.add_argument("--model", action="append", help="only this one (may be repeated)")
    parser.add_argument("--runs", type=Path, default=Path("runs/compression"), help="where runs are, or are trained to")
    parser.add_argument("--images", type=int, default=1000, help="test images, at most")


def run(args: Namespace) -> None:
    for data in args.data or TRAININGS:
        loaded = genfuse.load_data(data)
        x = loaded.splits["test"].x[: args.images, 0].numpy()
        print(f"\n{data}, {len(x):,} images, bits per dimension\n\n| | all at once | each alone |\n|---|---|---|")
        for name, (together, alone) in others(x, loaded.levels or 256).items():
            print(f"| {name} | {together:.3f} | {'' if alone is None else f'{alone:.3f}'} |")
        if data in PUBLISHED:
            print(f"| BB-ANS, as published | {PUBLISHED[data]} | |")
        notes = []
        for name, command in TRAININGS[data].items():
            if args.model and name not in args.model:
                continue
            if not (folder := args.runs / f"{name}-{data}").exists():
                main(["train", *command.split(), "--data", data, "--out", str(folder)])
            file, start = args.runs / f"{name}-{data}.gfz", time.process_time()
            found, between = compress(folder, data, file, limit=args.images), time.process_time()
            made, _ = decompress(file, run=folder)
            assert np.array_equal(made[:, 0], x)
            seconds = time.process_time() - start
            print(f"| **genfuse, {name}** | **{found.bits_per_dim:.4f}** | |")
            over = [f"{100 * (bits / found.bound - 1):+.2f}%" for bits in (found.message, found.bits_per_dim)]
            notes.append(
                f"{name}: bound {found.bound:.4f}; message {found.message:.4f} ({over[0]}), {found.initial} bits to "
                f"start with counted; file of {found.bytes:,} bytes ({over[1]}); {between - start:.1f} s to write and "
                f"{seconds - between + start:.1f} s to read, of one core"
            )
        print("", *notes, sep="\n")
