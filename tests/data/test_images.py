import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from genfuse.data import load_data

FILES = {
    "train-images-idx3-ubyte": (30, 4, 5),
    "train-labels-idx1-ubyte": (30,),
    "t10k-images-idx3-ubyte": (10, 4, 5),
    "t10k-labels-idx1-ubyte": (10,),
}


def idx(shape: tuple[int, ...], seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(10, size=shape, dtype=np.uint8)
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + values.tobytes()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a small MNIST, gzipped."""
    (tmp_path / "mnist").mkdir()
    for name, shape in FILES.items():
        (tmp_path / "mnist" / f"{name}.gz").write_bytes(gzip.compress(idx(shape)))
    return tmp_path


def test_digits_are_scikit_learns_split_once_and_for_all():
    data = load_data("digits", seed=5)
    assert (data.shape, data.levels, data.classes) == ((1, 8, 8), 17, 10)
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 1500, "test": 297}
    x = torch.cat([data.batch(part, slice(None)).x for part in data.splits])
    original = load_digits()
    assert sorted(map(tuple, x.flatten(1).tolist())) == sorted(map(tuple, (original.data / 16).tolist()))
    image = {row.tobytes(): label for row, label in zip(original.data, original.target, strict=True)}
    x, y = data.batch("test", slice(None))
    assert [image[row.tobytes()] for row in (x.double() * 16).flatten(1).numpy()] == y.tolist()
    assert torch.bincount(y).min() >= 28  # stratified: 29 or 30 of each
    assert data.fingerprint() == load_data("digits").fingerprint()


def test_mnist_is_read_as_it_is_in_the_files(data_root):
    root = data_root("mnist/train-images-idx3-ubyte.gz")
    data = load_data("mnist", root=root)
    assert (data.shape, data.levels, data.classes) == ((1, 28, 28), 256, 10)
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 60_000, "test": 10_000}
    assert data.splits["train"].y[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.batch("train", slice(None, 10_000)).x.mean() == pytest.approx(0.1307, abs=2e-3)


def test_binarized_mnist_is_static_and_has_a_validation_split(data_root):
    root = data_root("binarized_mnist/binarized_mnist.npz")
    data = load_data("binarized-mnist", root=root)
    assert (data.shape, data.levels, data.binarize) == ((1, 28, 28), 2, "static")
    assert [(part, len(split)) for part, split in data.splits.items()] == [
        ("train", 50_000),
        ("validation", 10_000),
        ("test", 10_000),
    ]
    with np.load(root / "binarized_mnist" / "binarized_mnist.npz") as arrays:
        assert np.array_equal(data.batch("test", slice(None)).x.flatten(1).numpy(), arrays["test"])


def test_binarized_mnist_with_other_values_is_refused(tmp_path, refused):
    ones = np.ones((6, 784), np.uint8)
    np.savez(tmp_path / "binarized_mnist.npz", train=ones, valid=ones, test=2 * ones)
    refused("binarized-mnist", "binarized_mnist.npz, test", "0 and 1", root=tmp_path)
    np.savez(tmp_path / "binarized_mnist.npz", train=ones, test=ones)
    refused("binarized-mnist", "no array validation or valid or val; it has: train, test", root=tmp_path)


@pytest.mark.parametrize("folder", ["fashion-mnist", ""])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("pack", [True, False])
def test_idx_files_are_found_by_each_name_in_circulation(tmp_path, folder, joint, pack):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, shape in FILES.items():
        file = tmp_path / folder / (name.replace("-idx", f"{joint}idx") + (".gz" if pack else ""))
        file.write_bytes(gzip.compress(idx(shape)) if pack else idx(shape))
    data = load_data("fashion-mnist", root=tmp_path)
    assert (data.shape, len(data.splits["train"]), len(data.splits["test"])) == ((1, 4, 5), 30, 10)
    assert data.splits["train"].x.numpy().tobytes() == idx((30, 4, 5))[16:]


def test_an_unpacked_file_that_kept_its_gz_name_is_read(root):
    file = root / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.decompress(file.read_bytes()))
    assert load_data("mnist", root=root).shape == (1, 4, 5)


def test_an_absent_file_is_named_with_where_to_put_it(root, refused, monkeypatch):
    monkeypatch.delenv("GENFUSE_DATA", raising=False)
    everything = ("train-images-idx3-ubyte.gz", "t10k-labels.idx1-ubyte", "--data-root", "GENFUSE_DATA")
    refused("fashion-mnist", *everything, "neither is given", "ROOT/fashion-mnist")
    refused("fashion-mnist", *everything, f"{root}/fashion-mnist and {root}", root=root)
    (root / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    message = refused("mnist", "t10k-labels-idx1-ubyte.gz", f"Looked in {root}/mnist.", root=root)
    assert "train-images" not in message


def test_two_data_sets_in_one_root_are_not_mixed(root, refused):
    """Fashion-MNIST's folder lacks its labels: MNIST's, which lie in the root, must not serve."""
    for file in (root / "mnist").iterdir():
        shutil.copy(file, root)
    (root / "mnist").rename(root / "fashion-mnist")
    (root / "fashion-mnist" / "train-labels-idx1-ubyte.gz").unlink()
    refused("fashion-mnist", "train-labels-idx1-ubyte.gz", root=root)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda raw: gzip.compress(raw)[:-20], "truncated or corrupt gzip"),
        (lambda raw: gzip.compress(raw)[:40] + b"\xff" * 40 + gzip.compress(raw)[80:], "truncated or corrupt gzip"),
        (lambda raw: b"", "is empty"),
        (lambda raw: b"<html>not found</html>", "begins with 0x3c68746d, not 0x00000803"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "begins with 0x00000801, not 0x00000803"),
        (lambda raw: raw[:9], "has 9 bytes"),
        (lambda raw: raw[:-1], "has 615 bytes, but by its header, of shape (30, 4, 5), it must have 616"),
        (lambda raw: raw + b"\0", "has 617 bytes"),
        (lambda raw: idx((29, 4, 5)), "has 29 images, but"),
        (lambda raw: idx((30, 5, 4)), "shape"),
    ],
)
def test_a_damaged_idx_file_is_named(root, refused, damage, problem):
    file = root / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(idx((30, 4, 5))))
    message = refused("mnist", problem, root=root)
    assert str(file) in message or "examples of the test split have shape (1, 4, 5)" in message


def test_an_argument_where_none_is_taken_is_refused(refused):
    for name in ("digits:3", "mnist:x", "fashion-mnist:x", "binarized-mnist:x"):
        refused(name, "takes no argument", name)


def picture(path: Path, size: tuple[int, int] = (6, 4), mode: str = "L", value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16") else (value,) * len(mode)).save(path)
    return path


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_folder_of_pictures_is_split(tmp_path, mode, channels):
    for i in range(10):
        picture(tmp_path / f"{i}.{'PNG' if i % 2 else 'png'}", mode=mode, value=20 * i)
    data = load_data(f"images:{tmp_path}")
    assert (data.shape, data.levels, data.classes) == ((channels, 4, 6), 256, None)
    assert (len(data.splits["train"]), len(data.splits["test"])) == (8, 2)
    values = torch.cat([split.x[:, 0, 0, 0] for split in data.splits.values()])
    assert sorted(values.tolist()) == [20 * i for i in range(10)]
    assert load_data(f"images:{tmp_path}").fingerprint() == data.fingerprint()
    assert load_data(f"images:{tmp_path}", seed=1).fingerprint() != data.fingerprint()


def test_channels_and_rows_are_where_pytorch_has_them(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    for i in range(5):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    x = load_data(f"images:{tmp_path}").splits["train"].x
    assert np.array_equal(x[0].permute(1, 2, 0).numpy(), pixels)


def test_jpegs_are_read(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.{'jpg' if i % 2 else 'jpeg'}", value=100)
    assert load_data(f"images:{tmp_path}").splits["train"].x.float().mean() == pytest.approx(100, abs=2)


def test_sub_folders_are_classes(tmp_path):
    for i in range(12):
        picture(tmp_path / ("cat", "dog", "emu")[i % 3] / "deep" / f"{i}.png", value=i)
    picture(tmp_path / ".hidden" / "x.png", size=(1, 1))
    data = load_data(f"images:{tmp_path}")
    assert data.classes == 3
    for split in data.splits.values():
        assert torch.equal(split.y, split.x[:, 0, 0, 0] % 3)


def test_folders_of_splits_are_the_splits(tmp_path):
    for part, value in (("train", 1), ("val", 2), ("test", 3)):
        for label in ("a", "b"):
            picture(tmp_path / part / label / "x.png", value=value)
    data = load_data(f"images:{tmp_path}")
    assert {part: set(split.x.flatten().tolist()) for part, split in data.splits.items()} == {
        "train": {1},
        "validation": {2},
        "test": {3},
    }
    assert [split.y.tolist() for split in data.splits.values()] == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("odd", "problem"),
    [
        ({"size": (6, 5)}, "is 6x5 grey, but"),
        ({"mode": "RGB"}, "is 6x4 RGB, but"),
        ({"mode": "RGBA"}, "has mode RGBA; convert"),
        ({"mode": "I;16"}, "has mode I;16; convert"),
    ],
)
def test_the_first_odd_picture_is_named(tmp_path, refused, odd, problem):
    for i in range(6):
        picture(tmp_path / f"{i}.png")
    picture(tmp_path / "3.png", **odd)
    refused(f"images:{tmp_path}", f"{tmp_path}/3.png", problem)


@pytest.mark.parametrize("damage", [lambda raw: raw[:45], lambda raw: b"", lambda raw: b"GIF89a" + raw])
def test_an_unreadable_picture_is_named(tmp_path, refused, damage):
    for i in range(6):
        picture(tmp_path / f"{i}.png")
    file = tmp_path / "4.png"
    file.write_bytes(damage(file.read_bytes()))
    refused(f"images:{tmp_path}", f"the picture {file} cannot be read")


def test_folders_that_are_no_data_set_are_refused(tmp_path, refused):
    refused("images", "path is missing", "images:PATH")
    refused(f"images:{tmp_path}/absent", "there is no file or folder", f"{tmp_path}/absent")
    refused(f"images:{tmp_path}", "holds no picture", ".png")
    refused(f"images:{picture(tmp_path / '0.png')}", "is no folder")
    refused(f"images:{tmp_path}", "1 pictures are too few")
    picture(tmp_path / "cat" / "1.png")
    refused(f"images:{tmp_path}", f"{tmp_path}/0.png lies beside the sub-folders")
