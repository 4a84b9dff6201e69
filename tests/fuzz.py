"""Everything that reads files, given inputs that are damaged or made up: `python -m tests.fuzz [NAME ...]`.

A reader is a row of READERS. Each input is a valid one with a file of it changed, by bits, bytes, values of JSON, the
content within gzip, zip or safetensors, or with a file missing, in the place of a folder, or planted. Whatever comes
out that is neither a result nor a documented error is a finding, with the number that makes the same input again; so
is an input that takes SECONDS of the processor, or MEMORY more than all before it.
"""

import argparse
import gzip
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import genfuse
from genfuse._files import digest, locked
from genfuse.cli.train import arguments_of
from genfuse.comparison import _report, _store
from genfuse.data import Dataset, Split
from genfuse.errors import GenfuseError
from genfuse.training import Run, Trainer
from genfuse.training.loop import Loop

# Values

ODD = (
    None, True, False, 0, -1, 1, 3, 2**40, 2**63, -(10**30), 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x",
    "../../x", "/etc/passwd", "[/x]", "<script>alert(1)</script>", "\x1b[31m", "\ud800", "é" * 300, [], {}, [None],
    ["a"], [[[]]], {"a": 1}, {"": {}}, [0] * 300, [1e400, "b"], {"name": 3}, {"sha256": 1},
)  # fmt: skip
WHOLE = (
    b"", b"null", b"[]", b"{}", b"1", b'"x"', b"\xff\xfe", b"\x00" * 64, b"[" * 200_000, b'{"a":' * 50_000,
    b"- " * 9_000, b"\n", b"\xef\xbb\xbf", b"PK\x03\x04", b"\x1f\x8b", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00",
    b"a: &a [*a]", b"?" * 99,
)  # fmt: skip
TOKENS = (
    b"nan", b"inf", b"-", b",", b";", b'"', b"'", b"\n", b"\r", b"\x00", b"1e999", b"9" * 400, b"{", b"]", b":",
    b"null", b"\xff",
)  # fmt: skip


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from nodes(each, (*path, key))


def changed_json(content: Any, rng: random.Random) -> Any:
    """JSON with one value replaced, removed, renamed or repeated; its checksum stays, goes, or is made to fit."""
    content = json.loads(json.dumps(content))
    *above, last = path = rng.choice([*nodes(content)][1:] or [("x",)])
    inner = content
    for key in above:
        inner = inner[key]
    how = rng.randrange(4)
    if not path or not isinstance(inner, (dict, list)) or how == 0:
        return rng.choice(ODD)
    if how == 1:
        del inner[last]
    elif how == 2 and isinstance(inner, dict):
        inner[rng.choice(("x", "", str(last).upper(), str(last) + "_"))] = inner.pop(last)
    else:
        inner[last] = rng.choice(ODD)
    if isinstance(content, dict) and "sha256" in content:
        match rng.randrange(4):
            case 0:
                del content["sha256"]
            case 1 | 2:
                content["sha256"] = digest(content)
    return content


# Bytes


def changed_bytes(raw: bytes, rng: random.Random) -> bytes:
    if not raw:
        return rng.choice(WHOLE)
    data, at = bytearray(raw), rng.randrange(len(raw))
    end = min(len(raw), at + rng.choice((1, 2, 8, 64, 1000)))
    match rng.randrange(9):
        case 0 | 1:
            data[at] ^= 1 << rng.randrange(8)
        case 2:
            data[at:end] = rng.randbytes(end - at)
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end]
        case 5:
            del data[at:]
        case 6:
            data[at:at] = rng.choice(TOKENS)
        case 7:
            other = rng.randrange(len(raw))
            data[at:end] = data[other : other + end - at]
        case 8:
            return rng.choice(WHOLE)
    return bytes(data)


def changed(name: str, raw: bytes, rng: random.Random) -> bytes:
    """The bytes of a file changed; half of the time within what its format wraps."""
    try:
        if rng.random() < 0.5:
            return changed_bytes(raw, rng)
        if name.endswith(".json"):
            return json.dumps(changed_json(json.loads(raw), rng)).encode("utf-8", "surrogatepass")
        if name.endswith(".jsonl"):
            lines = raw.split(b"\n")
            at = rng.randrange(len(lines) - 1)
            entry = json.loads(lines[at])
            if rng.random() < 0.7:
                entry.pop("crc32", None)
            lines[at] = json.dumps(changed_json(entry, rng)).encode()
            return b"\n".join(lines)
        if name.endswith(".safetensors"):
            return changed_safetensors(raw, rng)
        if name.endswith(".gz"):
            return gzip.compress(changed_bytes(gzip.decompress(raw), rng))
        if name.endswith(".npz"):
            return changed_zip(raw, rng)
        if name.endswith(".png"):
            return changed_png(raw, rng)
        if raw.startswith(b"\x93NUMPY"):
            at = rng.randrange(min(len(raw), 128))  # the header
            return raw[:at] + rng.choice((*TOKENS, rng.randbytes(1))) + raw[at + 1 :]
    except Exception:  # it has been changed already, to what can no longer be taken apart
        pass
    return changed_bytes(raw, rng)


def changed_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Its header changed, or the facts in it; or bits of its tensors."""
    (size,) = struct.unpack("<Q", raw[:8])
    header, tensors = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    if rng.random() < 0.7:
        facts = json.loads(header["__metadata__"]["genfuse"])
        if rng.random() < 0.7:
            facts.pop("sha256", None)
        header["__metadata__"]["genfuse"] = json.dumps(changed_json(facts, rng))
    else:
        header = changed_json(header, rng)
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + tensors


def changed_zip(raw: bytes, rng: random.Random) -> bytes:
    """One of its members changed, under a checksum that fits."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = changed(name, content, rng) if rng.random() < 0.8 else b""
                name = name if rng.random() < 0.8 else rng.choice(("x.npy", "x", "../x.npy", names[0]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new.writestr(name, content)
    return made.getvalue()


def changed_png(raw: bytes, rng: random.Random) -> bytes:
    """Its header changed, under a checksum that fits."""
    header = bytearray(raw[12:29])  # IHDR and its 13 bytes
    header[rng.randrange(4, 17)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return raw[:12] + bytes(header) + struct.pack(">I", zlib.crc32(header)) + raw[33:]


# Readers


class Reader(NamedTuple):
    make: Callable[[Path], Any]  # writes a valid input into a folder, and returns what `read` needs beside it
    read: Callable[[Path, Any], Any]
    planted: tuple[str, ...] = ()  # files that may be there too
    errors: tuple[type[Exception], ...] = (GenfuseError,)


def make_run(folder: Path) -> Any:
    table = folder.parent / "table.npy"
    np.save(table, np.random.default_rng(0).normal(size=(20, 2)))
    return trained(folder, f"npy:{table}", "last", "vae", hidden=(4,), latent_dim=1, decoder="gaussian")


def make_labelled_run(folder: Path) -> Any:
    """Of labels with names, and left with the weights that were best, so that its state holds two sets of them."""
    draw, table = np.random.default_rng(0), folder.parent / "labelled.npz"
    parts = (("train", 20), ("validation", 6), ("test", 6))
    arrays = {f"x_{part}": draw.normal(size=(n, 2)) for part, n in parts}
    arrays |= {f"y_{part}": np.array(["cat", "dog"] * (n // 2)) for part, n in parts}
    np.savez(table, **arrays)
    return trained(folder, f"npz:{table}", "best", "flow-matching", hidden=4, blocks=1, conditional=True)


def trained(folder: Path, name: str, keep: str, model: str, **settings: Any) -> Any:
    data = genfuse.load_data(name)
    torch.manual_seed(0)
    options = {"batch_size": 8, "checkpoint_every": 1, "pictures": False, "device": "cpu", "keep": keep}
    trainer = Trainer(steps=4, out=folder, **options)
    trainer.fit(genfuse.create(model, data, **settings), data)
    (folder / "progress").mkdir()
    np.save(folder / "progress" / "00000002.npy", np.zeros((3, 2), np.float32))
    shutil.rmtree(folder / "tensorboard")  # which nothing of ours reads
    return data, trainer._fabric(1)


def read_run(folder: Path, more: Any) -> None:
    data, fabric = more
    run = Run(folder)
    model = run.model().train()
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    run.scaling, run.class_names, run.step, run.metrics(), run.progress(), run.data()
    trainer = Trainer.resuming(run)
    from genfuse.training import run as module

    options = {key: value for key, value in asdict(trainer).items() if key not in module.WHERE}
    config = module.describe(model, data, options)
    with locked(folder):
        module.claim(folder, True, False, config)
    loop = Loop(trainer, fabric, model, list(model.players()), data)
    loop.essentials = module.essentials(config)
    loop._load(folder)
    loop._update(0, loop.data.batch("train", torch.arange(8)))


def make_comparison(folder: Path) -> Any:
    rows = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    data = Dataset("table", {"train": Split(rows[:130]), "test": Split(rows[130:])})
    small = {"a": {"hidden": [4], "latent_dim": 1, "decoder": "gaussian"}}
    options = {"budget": "128examples", "seeds": 1, "settings": small, "limit": 4, "n": 70}
    result = genfuse.compare(["a=vae"], data, out=folder, trainer=Trainer(device="cpu"), **options)
    for path in folder.iterdir():
        if path.name != "comparison.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result["options"], [_store.Entry("a", "vae", small["a"])]


def read_comparison(folder: Path, more: Any) -> None:
    options, entries = more
    was = _store.claim(folder, json.loads(json.dumps(options)), entries)
    if was:
        for row in was["rows"]:
            row |= _report.summary(row["runs"], _report.measures(was))
        _report.markdown({**was, "machine": _store.begin(options, "cpu")["machine"]})
        _report.html({**was, "machine": _store.begin(options, "cpu")["machine"]}, folder / "pictures", str)


def make_options(folder: Path) -> None:
    options = {"data": {"name": "digits", "seed": 3}, "epochs": 1, "lr": 0.002, "model": {"hidden": [8, 4], "beta": 2}}
    (folder / "options.yaml").write_text("model: vae\ndata: {name: digits}\nepochs: 5\nlr: 0.1\npictures: no\n")
    (folder / "options.json").write_text(json.dumps(options))


def read_options(folder: Path, more: Any) -> None:
    for file in ("options.yaml", "options.json"):
        if (folder / file).is_file():
            arguments_of("vae", folder / file)


def of_data(name: str, make: Callable[[Path], Any]) -> Reader:
    """A reader of `load_data`. In its name FOLDER is where the files are."""
    return Reader(
        make,
        lambda folder, _: genfuse.load_data(name.replace("FOLDER", str(folder)), root=folder),
        (".DS_Store", "val.csv", "x/y.png"),
    )


def make_csv(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 3))
    np.savetxt(folder / "table.csv", rows, delimiter=",", header="a,b,c", comments="")


def make_parts(folder: Path) -> None:
    for part, n in (("train", 9), ("test", 5)):
        rows = np.random.default_rng(n).normal(size=(n, 2))
        np.savetxt(folder / f"{part}.csv", rows, delimiter=",", header='"a, b",c', comments="")


def make_idx(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for kind, shape in (("images-idx3", (6, 4, 4)), ("labels-idx1", (6,))):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            content = header + draw.integers(10, size=shape, dtype=np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def make_marks(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 2))
    text = "\r\n".join(f'{i};"{a:.3f}";{b:.3e}' for i, (a, b) in enumerate(rows)).replace(".", ",")
    (folder / "table.csv").write_bytes(f'\ufeff;"width; cm";"né ""e"""\r\n{text}\r\n'.encode())


def read_marks(folder: Path, more: Any) -> None:
    genfuse.load_data(f"csv:{folder / 'table.csv'}", delimiter=";", decimal=",")


def make_pictures(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(8):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = draw.integers(256, size=(6, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.{'png' if i % 4 else 'jpg'}")


def make_npy(folder: Path) -> None:
    np.save(folder / "table.npy", np.random.default_rng(0).normal(size=(9, 3)))


def make_npz(folder: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez_compressed(folder / "table.npz", train=draw.normal(size=(9, 3)), test=draw.normal(size=(5, 3)))


def make_image_arrays(folder: Path) -> None:
    draw = np.random.default_rng(0)
    images = {f"{part}_images": draw.integers(256, size=(n, 5, 6, 3)) for part, n in (("train", 9), ("test", 5))}
    names = np.array(["b", "a"])
    np.savez(folder / "images.npz", **images, train_labels=names[[0, 1] * 4 + [0]], test_labels=names[[0, 1, 0, 0, 1]])


def make_npy_parts(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for part, n in (("train", 9), ("valid", 5), ("test", 5)):
        np.save(folder / f"{part}.npy", draw.normal(size=(n, 2)).astype(">f4"))
        np.save(folder / f"y_{part}.npy", np.eye(2, dtype=np.float32)[draw.integers(2, size=n)])


IN_A_RUN = ("progress/._00000001.npy", "state-1.safetensors", "state-x.safetensors", ".lock")
READERS = {
    "run": Reader(make_run, read_run, IN_A_RUN),
    "labelled-run": Reader(make_labelled_run, read_run, IN_A_RUN),
    "comparison": Reader(make_comparison, read_comparison, ("a/seed-0", "pictures")),
    "options": Reader(make_options, read_options),
    "csv": of_data("csv:FOLDER/table.csv", make_csv),
    "csv-parts": of_data("csv:FOLDER", make_parts),
    "csv-marks": Reader(make_marks, read_marks),
    "npy": of_data("npy:FOLDER/table.npy", make_npy),
    "npy-parts": of_data("npy:FOLDER", make_npy_parts),
    "npz": of_data("npz:FOLDER/table.npz", make_npz),
    "idx": of_data("mnist", make_idx),
    "images": of_data("images:FOLDER", make_pictures),
    "image-arrays": of_data("images:FOLDER/images.npz", make_image_arrays),
}


# The search

SECONDS, MEMORY = 10, 2**29  # of one input; what may be unpacked at all is half of that memory
FAST = "/dev/shm"  # a folder in memory, where there is one


class Finding(NamedTuple):
    reader: str
    number: int  # of the input: the same number makes the same
    error: str


def used() -> tuple[float, int]:
    """Seconds of the processor, and the most memory in bytes, that this process has taken so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def fuzz(name: str, numbers: range, tell: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Give a reader the inputs of these numbers."""
    reader, findings = READERS[name], []

    def found(number: int, error: str) -> None:
        findings.append(Finding(name, number, error))
        tell(findings[-1])

    fast = FAST if os.access(FAST, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as top, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(top) / "input"
        folder.mkdir()
        more = reader.make(folder)
        valid = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        reader.read(folder, more)  # what is valid is read
        restore(folder, valid)
        now, most = used()
        for number in numbers:
            touched = put(folder, valid, reader.planted, random.Random(f"{name} {number}"))
            try:
                reader.read(folder, more)
            except reader.errors:
                pass
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {error}"[:200]
                found(number, f"{said} ({Path(where.filename).name}:{where.lineno})")
            (seconds, memory), (now, most) = (now, most), used()
            if now - seconds > SECONDS or most - memory > MEMORY:
                found(number, f"{now - seconds:.0f} s, and {(most - memory) / 1e6:.0f} MB more than before")
            restore(folder, valid, touched)
    return findings


def put(folder: Path, valid: dict[Path, bytes], planted: tuple[str, ...], rng: random.Random) -> list[Path]:
    """Change the input; returns what is other than it was."""
    file = rng.choice([*valid])
    how = rng.random()
    if how < 0.94:
        raw = valid[file]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            raw = changed(file.name, raw, rng)
        file.write_bytes(raw)
        return [file]
    if how < 0.95 and planted:
        file = folder / rng.choice(planted)
        if not file.parent.is_dir() or file.exists():
            return []
        file.write_bytes(rng.choice(WHOLE))
        return [file]
    file.unlink()
    if how > 0.98:
        file.mkdir()
    elif how > 0.96:
        file.symlink_to(rng.choice([*valid]))
    return [file]


def restore(folder: Path, valid: dict[Path, bytes], touched: list[Path] | None = None) -> None:
    for file in [*folder.rglob("*")] if touched is None else touched:
        if file.is_dir() and not file.is_symlink():
            if not any(file in each.parents for each in valid):
                shutil.rmtree(file)
        elif file not in valid or touched is not None:
            file.unlink(missing_ok=True)
    for file, raw in valid.items():
        if touched is None or file in touched:
            file.write_bytes(raw)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="NAME", help=f"of {', '.join(READERS)}; by default all")
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.readers or [*READERS]
    print("| reader | inputs | seconds | findings |\n| --- | --: | --: | --: |", flush=True)
    found = []
    for name in names:
        began = time.process_time()
        new = fuzz(name, range(options.first, options.first + options.count), tell)
        print(f"| {name} | {options.count:,} | {time.process_time() - began:.0f} | {len(new):,} |", flush=True)
        found += new
    return min(len(found), 1)


def tell(finding: Finding) -> None:
    print(f"{finding.reader} {finding.number}: {finding.error!r}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
