import gzip
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from sklearn.datasets import load_digits, load_sample_image

import genfuse
from genfuse.data import Dataset, Split, images, load_data
from genfuse.errors import DataError, DataWarning, SettingsError

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


# What a viewer shows is what is read


def values_by_label(data):
    """{split: {(label's name, value of the first cell)}}."""
    return {
        part: {(data.class_names[int(y)], int(x[0, 0, 0])) for x, y in zip(split.x, split.y, strict=True)}
        for part, split in data.splits.items()
    }


@pytest.mark.parametrize("validation", ["val", "valid", "Validation", None])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("deeper", ["", "archive", "archive/images"])
def test_splits_are_found_by_any_of_their_names_and_are_no_classes(tmp_path, train, validation, deeper):
    top = tmp_path / deeper
    for part, count in ((train, 10), *([(validation, 3)] if validation else [])):
        for k, label in enumerate(("cat", "dog")):
            for i in range(count):
                picture(top / part / label / f"{i}.png", value=100 * k + (part == validation))
    data = load_data(f"images:{tmp_path}")
    assert data.class_names == ("cat", "dog")
    assert {part: len(split) for part, split in data.splits.items()} == {
        "train": 16, **({"validation": 6} if validation else {}), "test": 4,
    }  # fmt: skip
    found = values_by_label(data)
    assert found["train"] | found["test"] == {("cat", 0), ("dog", 100)}
    assert found.get("validation", {("cat", 1), ("dog", 101)}) == {("cat", 1), ("dog", 101)}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["val/cat/0.png", "val/dog/0.png"], "but no train split"),
        (["test/0.png"], "but no train split"),
        (["train/0.png", "Train/1.png"], "both called as the train split"),
        (["train/0.png", "val/0.png", "valid/0.png"], "both called as the validation split"),
        (["train/0.png", "bus/0.png", "car/0.png"], "bus/0.png lies in none"),
        (["train/a/0.png", "val/a/0.png", "0.png"], "0.png lies in none"),
        (["cat/train/0.png", "dog/train/0.png", "cat/val/0.png"], "lies inside of a class"),
        (["train/a/test/0.png", "train/b/0.png"], "the folder test is called as a split"),
        (
            ["train/a/0.png", "test/a/1.png", "test/0.png"],
            "test/0.png lies beside the sub-folders that are the classes",
        ),
    ],
)
def test_folders_of_splits_that_can_be_read_in_two_ways_are_refused(tmp_path, refused, files, problem):
    for name in files:
        for i in range(6):
            picture(tmp_path / Path(name).with_stem(f"{Path(name).stem}-{i}"))
    refused(f"images:{tmp_path}", problem.replace("0.png", "0-0.png"))


def test_pictures_beside_train_and_test_are_told_to_be_left_out(tmp_path):
    for part in ("train", "test", "unlabeled"):
        picture(tmp_path / part / "0.png")
    with pytest.warns(DataWarning, match=r"1 file is not read \(1 .png\).*nothing at all is read from .*unlabeled"):
        data = load_data(f"images:{tmp_path}")
    assert sum(map(len, data.splits.values())) == 2


@pytest.mark.parametrize("bare", ["train", "val", "test"])
def test_a_split_without_sub_folders_has_no_labels_and_the_others_have_theirs(tmp_path, bare):
    for part, count in (("train", 3), ("val", 2), ("test", 4)):
        for label in ("",) if part == bare else ("cat", "dog"):
            for i in range(count):
                picture(tmp_path / part / label / f"{i}.png", value=9 if label == "dog" else 5)
    with pytest.warns(DataWarning, match=rf"the pictures of .*{bare} have no labels") as told:
        data = load_data(f"images:{tmp_path}")
    assert len(told) == 1
    assert data.class_names == ("cat", "dog")
    for part, split in data.splits.items():
        if part == {"val": "validation"}.get(bare, bare):
            assert split.y is None
        else:
            assert split.y.tolist() == (split.x[:, 0, 0, 0] == 9).long().tolist()
    with pytest.raises(SettingsError, match=r"needs labels, but the data set .* has none in its splits"):
        genfuse.create("gan", data, conditional=True).check_data(data)


def test_a_class_that_no_training_picture_has_is_told(tmp_path):
    for name in ("train/Cat", "train/dog", "test/cat", "test/dog"):
        picture(tmp_path / name / "0.png")
    with pytest.warns(DataWarning, match="the test split has the labels cat, which no training example has"):
        assert load_data(f"images:{tmp_path}").class_names == ("Cat", "cat", "dog")


def test_a_class_is_one_however_its_accents_are_written(tmp_path):
    for name in ("train/caf\u00e9", "train/tea", "test/cafe\u0301", "test/tea"):  # as Linux and as macOS
        picture(tmp_path / name / "0.png", value=len(name))
    data = load_data(f"images:{tmp_path}")
    assert data.class_names == ("caf\u00e9", "tea")
    assert data.splits["test"].y.tolist() == data.splits["train"].y.tolist() == [0, 1]


def test_classes_of_numbers_are_in_the_order_of_numbers(tmp_path):
    for k in range(12):
        picture(tmp_path / str(k) / "0.png", value=k)
    data = load_data(f"images:{tmp_path}")
    assert data.class_names == tuple(map(str, range(12)))
    assert all((split.x[:, 0, 0, 0] == split.y).all() for split in data.splits.values())


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["c10", "c9", "c1"], ["c1", "c9", "c10"]),
        (["10", "9.5", "-1"], ["-1", "9.5", "10"]),
        (["b", "a", "10", "9"], ["9", "10", "a", "b"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        (["α", "a", "Ä"], ["a", "Ä", "α"]),
    ],
)
def test_labels_follow_the_names_of_the_classes(tmp_path, names, order):
    for name in names:
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    assert list(load_data(f"images:{tmp_path}").class_names) == order


def test_links_to_classes_pictures_and_folders_above_are_followed_once(tmp_path):
    root = tmp_path / "subset"
    for i in range(6):
        picture(tmp_path / "store" / "cat" / f"{i}.png", value=10)
        picture(root / "owl" / f"{i}.png", value=30)
        picture(tmp_path / "store" / "one.png", value=20)
        (root / "dog").mkdir(exist_ok=True)
        (root / "dog" / f"{i}.png").symlink_to(tmp_path / "store" / "one.png")
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    (root / "owl" / "up").symlink_to(root)
    data = load_data(f"images:{root}")
    assert values_by_label(data)["train"] == {("cat", 10), ("dog", 20), ("owl", 30)}
    assert sum(map(len, data.splits.values())) == 18


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_their_exif_data_says(tmp_path, form, orientation):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 240
    exif = Image.Exif()
    exif[0x0112] = orientation
    suffix = {"JPEG": "jpg"}.get(form, form.lower())
    for i in range(5):
        Image.fromarray(pixels).save(tmp_path / f"{i}.{suffix}", format=form, exif=exif)
    x = load_data(f"images:{tmp_path}").splits["train"].x[0, 0].float()
    with Image.open(tmp_path / f"0.{suffix}") as shown:
        seen = np.asarray(ImageOps.exif_transpose(shown))[:, :, 0].astype(float)
    assert x.shape == seen.shape == ((24, 16) if orientation > 4 else (16, 24))
    assert np.abs(x.numpy() - seen).max() < 3
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert x[corner[orientation]] > 200


@pytest.mark.parametrize(
    ("suffix", "form"),
    [("bmp", "BMP"), ("webp", "WEBP"), ("jfif", "JPEG"), ("tif", "TIFF"), ("TIFF", "TIFF"), ("ppm", "PPM")],
)
def test_other_formats_are_read(tmp_path, suffix, form):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    for i in range(5):
        Image.fromarray(pixels).save(tmp_path / f"{i}.{suffix}", format=form, **options)
    x = load_data(f"images:{tmp_path}").splits["train"].x[0].permute(1, 2, 0).numpy()
    assert np.abs(x.astype(int) - pixels).max() <= (4 if form == "JPEG" else 0)


def test_files_that_are_not_read_are_counted_and_named(tmp_path):
    for i in range(10):
        picture(tmp_path / "cat" / f"{i}.png")
    for i in range(3):
        (tmp_path / "fox").mkdir(exist_ok=True)
        Image.new("L", (6, 4)).save(tmp_path / "fox" / f"{i}.gif")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "read me").write_text("x")
    with pytest.warns(DataWarning) as said:
        load_data(f"images:{tmp_path}")
    first, one = (str(warning.message) for warning in said)
    assert "5 files are not read (3 .gif, 1 .txt, 1 no suffix), such as" in first
    assert first.endswith(f"nothing at all is read from {tmp_path}/fox"), "the pictures lie in folders beside `read me`"
    assert "all pictures have one label, 'cat'" in one


def sixteen_bit_png(path: Path, kind: int) -> None:
    """Grey (0) or RGB (2), all in the low byte."""
    cells = np.arange(8 * 8 * (1 + kind), dtype=">u2").reshape(8, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in cells)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def test_what_an_array_of_bytes_cannot_hold_is_refused(tmp_path, refused):
    file = tmp_path / "0.png"
    sixteen_bit_png(file, 0)
    refused(f"images:{tmp_path}", f"{file} has mode I;16")
    sixteen_bit_png(file, 2)
    refused(f"images:{tmp_path}", f"{file} has 16 bits a channel")
    file.unlink()
    (tmp_path / "0.ppm").write_bytes(b"P6\n2 2\n65535\n" + bytes(24))
    refused(f"images:{tmp_path}", "0.ppm has 16 bits a channel")
    (tmp_path / "0.ppm").unlink()
    Image.new("RGB", (6, 4)).save(file, transparency=(0, 0, 0))
    refused(f"images:{tmp_path}", f"{file} has a transparent colour")
    frames = [Image.new("RGB", (6, 4), (shade,) * 3) for shade in (0, 200)]
    for name in ("0.webp", "0.png", "0.tif"):
        file.unlink(missing_ok=True)
        file = tmp_path / name
        frames[0].save(file, save_all=True, append_images=frames[1:])
        refused(f"images:{tmp_path}", f"{file} has 2 frames")


# Pictures of any size and mode, as asked for


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture whose left half is red and whose upper half is blue, more so at the corners."""
    up, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray((255 * np.stack([1 - across, np.full_like(up, 0.1 * seed), 1 - up], 2)).astype(np.uint8))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pictures_of_all_sizes_become_one_size(tmp_path, fit):
    for i, (width, height) in enumerate([(40, 20), (20, 40), (64, 48), (16, 16), (300, 90), (7, 9)]):
        photo(width, height, i).save(tmp_path / f"{i}.png")
    data = load_data(f"images:{tmp_path}", size=(16, 24), fit=fit)
    assert data.shape == (3, 16, 24)
    assert data.options == {"size": "16,24", **({} if fit == "crop" else {"fit": fit})}
    by_seed = {round(10 * int(x[1].max()) / 255): x for split in data.splits.values() for x in split.x}
    wide, tall = by_seed[4].float() / 255, by_seed[1].float() / 255
    if fit == "pad":  # all of it is there, between black bars
        assert (wide[2, [0, -1]] == 0).all()
        assert (tall[0, :, [0, -1]] == 0).all()
    elif fit == "stretch":
        assert (wide[0, :, 0] - wide[0, :, -1]).min() > 0.9
    else:  # the middle: the ends of the long side are cut off
        assert (wide[0, :, 0] - wide[0, :, -1]).max() < 0.6
        assert (wide[2, 0] - wide[2, -1]).min() > 0.8


@pytest.mark.parametrize("size", ["0", "-3", "a", "3,4,5", "0,4", "1.5", 0, (16, 0)])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    for i in range(5):
        picture(tmp_path / f"{i}.png")
    with pytest.raises(SettingsError, match="size must be a side in pixels"):
        load_data(f"images:{tmp_path}", size=size)


def test_options_of_pictures_are_of_folders_of_pictures_alone(tmp_path):
    for name in ("digits", "toy:moons", f"csv:{tmp_path}"):
        with pytest.raises(SettingsError, match="size, mode are for images:FOLDER; leave them out"):
            load_data(name, size=8, mode="L")
    with pytest.raises(SettingsError, match="mode must be one of auto, L, RGB; got 'P'"):
        load_data(f"images:{picture(tmp_path / 'a.png').parent}", mode="P")


def of_each_mode(folder: Path) -> None:
    image = photo(12, 12, 5)
    image.convert("L").save(folder / "L.png")
    image.save(folder / "RGB.png")
    image.convert("CMYK").save(folder / "CMYK.tif")
    image.quantize(64).save(folder / "P.png")
    image.convert("1").save(folder / "1.png")
    image.convert("LA").save(folder / "LA.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "I.png")
    sixteen_bit_png(folder / "RGB16.png", 2)
    clear = image.copy()
    clear.putalpha(0)
    clear.save(folder / "RGBA.png")


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("auto", 3)])
def test_pictures_of_all_modes_become_one_mode(tmp_path, mode, channels):
    of_each_mode(tmp_path)
    with pytest.warns(DataWarning) as said:
        data = load_data(f"images:{tmp_path}", mode=mode, size=12)
    assert data.shape == (channels, 12, 12)
    text = " ".join(str(warning.message) for warning in said)
    assert "2 of the pictures have 16 bits a channel, of which the upper 8 are read, such as" in text
    assert "2 of the pictures are transparent in part, and are read as on white" in text
    x = torch.cat([split.x for split in data.splits.values()])
    assert any((each == 255).all() for each in x)  # RGBA.png, which is clear all over
    grey = torch.from_numpy(np.asarray(photo(12, 12, 5).convert("L")))
    assert sum(bool((each == grey).all()) for each in x) >= (7 if channels == 1 else 3) - 2  # L, I and LA at least


def test_colour_that_is_none_is_told_and_read_as_grey_if_asked(tmp_path):
    for i in range(5):
        photo(8, 8, i).convert("L").convert("RGB").save(tmp_path / f"{i}.png")
    with pytest.warns(DataWarning, match="5 of the pictures are RGB, but grey: --data.mode auto"):
        assert load_data(f"images:{tmp_path}").shape == (3, 8, 8)
    assert load_data(f"images:{tmp_path}", mode="auto").shape == (1, 8, 8)
    photo(8, 8).save(tmp_path / "colour.png")
    assert load_data(f"images:{tmp_path}", mode="auto").shape == (3, 8, 8)


def test_colour_profiles_are_applied(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))  # a profile of another kind of colours
    original = photo(8, 8, 3)
    for i in range(5):
        original.save(tmp_path / f"{i}.png", icc_profile=srgb.tobytes())
    x = load_data(f"images:{tmp_path}").splits["train"].x[0]
    assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(original))
    for profile in (lab.tobytes(), b"nothing of the kind"):
        original.save(tmp_path / "0.png", icc_profile=profile)
        with pytest.warns(DataWarning, match=r"1 of the pictures has a colour profile that cannot be applied.*0\.png"):
            load_data(f"images:{tmp_path}")
    # sRGB's profile under another name, with red and green changed for each other
    raw = bytearray(srgb.tobytes().replace(b"s\0R\0G\0B", b"r\0G\0R\0B").replace(b"sRGB", b"rGRB"))
    tags = {bytes(raw[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(raw[128:132], "big"), 12)}
    red, green = (tags[name] + 4 for name in (b"rXYZ", b"gXYZ"))
    raw[red : red + 8], raw[green : green + 8] = raw[green : green + 8], raw[red : red + 8]
    for i in range(5):
        Image.fromarray(np.asarray(original)[..., [1, 0, 2]].copy()).save(tmp_path / f"{i}.png", icc_profile=bytes(raw))
    x = load_data(f"images:{tmp_path}").splits["train"].x[0]
    assert np.abs(x.permute(1, 2, 0).numpy().astype(int) - np.asarray(original)).max() <= 2


@pytest.mark.parametrize("stream", ["no", "yes"])
def test_damaged_pictures_are_left_out_if_asked(tmp_path, stream, refused, monkeypatch):
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path / "cache"))
    for k, label in enumerate(("cat", "dog")):
        for i in range(6):
            picture(tmp_path / "p" / label / f"{i}.png", value=100 * k + 10)
    (tmp_path / "p" / "cat" / "3.png").write_text("no picture at all")
    (tmp_path / "p" / "dog" / "4.png").write_bytes((tmp_path / "p" / "dog" / "0.png").read_bytes()[:45])
    refused(f"images:{tmp_path}/p", "cat/3.png cannot be read", "--data.damaged skip leaves it out", stream=stream)
    for _ in range(2):  # the second time a stream is what was kept the first time
        with pytest.warns(DataWarning, match=r"2 of the pictures are left out, such as .*cat/3\.png.*dog/4\.png"):
            data = load_data(f"images:{tmp_path}/p", damaged="skip", stream=stream)
        assert sum(map(len, data.splits.values())) == 10
        for split in data.splits.values():
            assert torch.equal(split.x[:, 0, 0, 0] > 100, split.y == 1)
            assert ["dog" in file for file in split.files] == (split.y == 1).tolist()
        with pytest.warns(DataWarning, match=r"2 of the pictures are left out"):  # not 4: each is read once
            data = load_data(f"images:{tmp_path}/p", damaged="skip", stream=stream, hold_out=False)
        assert data.splits["train"].files == data.splits["test"].files
        assert len(data.splits["test"]) == 10
    for file in (tmp_path / "p").rglob("*.png"):
        file.write_text("")
    refused(f"images:{tmp_path}/p", "none of the 12 pictures in", damaged="skip", stream=stream)


# Streams


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path / "cache"))
    for i in range(40):
        photo(8, 8, i % 10).save(tmp_path / f"{i}.png")

    def load(**options):
        return load_data(f"images:{tmp_path}", **options)

    return load


@pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")
def test_a_stream_is_the_same_data(streamed, tmp_path):
    data, memory = streamed(stream="yes"), streamed(stream="no")
    assert data.streamed
    assert not memory.streamed
    assert data.fingerprint() == memory.fingerprint()
    index = [torch.tensor(rows) for rows in ([3, 1], [0, 5, 9], [7])] * 3
    for part, wanted in zip(data.batches("train", index), index, strict=True):
        assert torch.equal(part.x, memory.batch("train", wanted).x)
    changed = next((tmp_path / "cache" / "pictures").glob("*.pixels")).stat().st_mtime_ns
    assert streamed(stream="yes").fingerprint() == memory.fingerprint()
    assert [f.stat().st_mtime_ns for f in (tmp_path / "cache" / "pictures").glob("*.pixels")] == [changed]
    photo(8, 8, 7).save(tmp_path / "0.png")  # one picture is another now
    assert streamed(stream="yes").fingerprint() == streamed(stream="no").fingerprint() != memory.fingerprint()


@pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")
@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/job/step\n", "/sys/fs/cgroup/job/memory.max"),
        ("4:memory:/job/step\n0::/\n", "/sys/fs/cgroup/memory/job/step/memory.limit_in_bytes"),
        ("0::/\n", "/sys/fs/cgroup/memory.max"),
    ],
)
def test_the_memory_is_that_of_the_group_a_process_is_in(groups, file, monkeypatch):
    files = {"/proc/self/cgroup": groups, file: "123456\n", "/sys/fs/cgroup/job/step/memory.max": "max\n"}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(images.Path, "read_text", read_text)
    assert images._memory() == 123456


def test_pictures_are_streamed_if_they_would_fill_half_of_the_memory(streamed, monkeypatch):
    size = 40 * 3 * 8 * 8
    monkeypatch.setattr("genfuse.data.images._memory", lambda: 2 * size)
    assert not streamed().streamed
    monkeypatch.setattr("genfuse.data.images._memory", lambda: 2 * size - 1)
    assert streamed().streamed


@pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")
def test_a_stream_stays_where_it_is_and_its_batches_go_to_the_device(streamed):
    data = streamed(stream="yes").to("cpu")
    assert data.device == data.batches_on == torch.device("cpu")
    elsewhere = streamed(stream="yes").to("meta")
    assert elsewhere.splits["train"].x.device.type == "cpu"
    assert elsewhere.batch("train", torch.tensor([0, 1])).x.device.type == elsewhere.device.type == "meta"


def test_examples_are_flipped_and_shifted_by_chance_and_repeat_their_edges():
    x = torch.arange(25.0).view(1, 1, 5, 5).repeat(400, 2, 1, 1)
    moved = genfuse.data.augmented(x, True, 2, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0], moved[:, 1])
    rows, columns = (moved[:, 0] // 5).long(), (moved[:, 0] % 5).long()
    assert (rows == rows[:, :, :1]).all()
    assert (columns == columns[:, :1]).all()
    seen = {(tuple(r[:, 0].tolist()), tuple(c[0].tolist())) for r, c in zip(rows, columns, strict=True)}
    ways = {tuple(min(max(i + d, 0), 4) for i in range(5)) for d in range(-2, 3)}
    assert seen == {(r, c) for r in ways for c in ways | {w[::-1] for w in ways}}
    assert torch.equal(genfuse.data.augmented(x, False, 0), x)
    assert torch.equal(genfuse.data.augmented(x, True, 2, torch.Generator().manual_seed(0)), moved)


# Arrays of images

SHADES = np.random.default_rng(0).integers(256, size=(20, 9, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (SHADES[..., 0], SHADES[:, None, :, :, 0]),
        (SHADES, SHADES.transpose(0, 3, 1, 2)),
        (SHADES.transpose(0, 3, 1, 2), SHADES.transpose(0, 3, 1, 2)),
        (SHADES[..., :1].astype(np.int64), SHADES[..., 0][:, None]),
        (SHADES[..., 0] > 128, (SHADES[..., 0] > 128)[:, None]),
    ],
)
def test_arrays_of_images_are_read_with_their_channels_first(tmp_path, suffix, array, expected):
    file = tmp_path / f"x.{suffix}"
    (np.save if suffix == "npy" else np.savez)(file, array)
    data = load_data(f"images:{file}")
    assert data.shape == expected.shape[1:]
    assert data.levels == (2 if array.dtype == bool else 256)
    rows = sorted(row.tobytes() for row in expected.astype(np.uint8))
    assert sorted(row.tobytes() for split in data.splits.values() for row in split.x.numpy()) == rows


def test_images_and_labels_of_keras_are_read(tmp_path):
    y = np.arange(20) % 3
    np.savez(tmp_path / "m.npz", x_train=SHADES[:15], y_train=y[:15, None], x_test=SHADES[15:], y_test=y[15:, None])
    data = load_data(f"images:{tmp_path}/m.npz")
    assert (data.shape, data.classes, data.class_names) == ((3, 9, 7), 3, None)
    assert data.splits["test"].y.tolist() == y[15:].tolist()
    assert np.array_equal(data.splits["train"].x.numpy(), SHADES[:15].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (SHADES[:, :3], "both of the axes 1 and 3 of (20, 3, 7, 3) may be channels"),
        (np.zeros((9, 4, 5, 2), np.uint8), "none of the axes 1 and 3"),
        (SHADES / 255, "got float64 from 0 to 1"),
        (SHADES.astype(np.int16) - 128, "got int16 from -128 to 127"),
        (SHADES.astype(np.uint16) * 256, "got uint16 from 0 to"),
        (SHADES[0, 0], "expected images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, refused, array, problem):
    np.save(tmp_path / "x.npy", array)
    refused(f"images:{tmp_path}/x.npy", f"{tmp_path}/x.npy: ", problem)


def test_splits_of_images_on_two_scales_are_refused(tmp_path, refused):
    images = np.random.default_rng(0).integers(256, size=(9, 4, 4))
    np.savez(tmp_path / "a.npz", train=images > 99, test=images)
    refused(f"images:{tmp_path}/a.npz", "the train split has no values but 0 and 1, the test split reaches 25")


def test_a_single_image_is_not_taken_for_many(tmp_path, refused):
    np.save(tmp_path / "a.npy", np.zeros((48, 64, 3), np.uint8))
    refused(f"images:{tmp_path}/a.npy", "(48, 64, 3) is one image with its channels last, or 48 of 3x64")


def test_a_table_of_images_is_refused_with_what_to_write(tmp_path, refused):
    np.save(tmp_path / "x.npy", SHADES)
    refused(f"npy:{tmp_path}/x.npy", "images and clips are read by images:PATH")


def test_stacked_mnist_is_three_digits_as_colours_and_their_labels_as_one_number(root: Path):
    single, data = load_data("mnist", root=root), load_data("stacked-mnist", root=root, seed=1)
    assert (data.shape, data.levels, data.classes) == ((3, 4, 5), 256, 1000)
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 60_000, "test": 26_000}
    for part, split in data.splits.items():
        of = single.splits[part]
        known = {image.tobytes(): label for image, label in zip(of.x.numpy(), of.y.tolist(), strict=True)}
        for image, label in zip(split.x[:50].numpy(), split.y[:50].tolist(), strict=True):
            assert [known[colour.tobytes()] for colour in image] == [label // 100, label // 10 % 10, label % 10]
    assert not torch.equal(data.splits["train"].x, load_data("stacked-mnist", root=root, seed=2).splits["train"].x)
    assert load_data("stacked-mnist:digits").shape == (3, 8, 8)


def test_stacked_mnist_without_mnist_says_what_is_missing_and_what_needs_no_files(tmp_path: Path):
    with pytest.raises(DataError, match=r"(?s)'mnist'.*train-images-idx3-ubyte.*`stacked-mnist:glyphs` needs no files"):
        load_data("stacked-mnist", root=tmp_path)
    with pytest.raises(DataError, match="'toy' cannot be stacked; it takes one of mnist, fashion-mnist"):
        load_data("stacked-mnist:toy")


def test_photos_are_patches_whose_test_split_shows_other_parts_of_the_photographs():
    pytest.importorskip("skimage")
    data = load_data("photos:96")
    assert (data.shape, data.levels, data.classes) == ((3, 96, 96), 256, 7)
    assert data.class_names[:2] == ("china", "flower")
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    test = data.splits["test"]
    assert torch.equal(test.x[test.y == 0][0], photo[:, :96, 534:630])
    assert load_data("photos:96").fingerprint() == data.fingerprint()


def test_clips_show_digits_that_move_evenly_and_stay_within(tmp_path, monkeypatch):
    glyphs = Split((torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 255).byte())
    monkeypatch.setattr(
        "genfuse.data.images.glyphs", lambda source: Dataset("few", {"train": glyphs, "test": glyphs}, 256)
    )
    data = load_data("clips:6,20", root=tmp_path)  # of glyphs, as there is no MNIST
    assert (data.shape, data.levels, data.is_image) == ((6, 1, 20, 20), 256, False)
    x = data.splits["test"].x.float()[:, :, 0]
    mass = x.sum((2, 3))
    torch.testing.assert_close(mass, mass[:, :1].expand_as(mass))  # nothing leaves the frame
    where = (x * torch.arange(20.0)).sum((2, 3)) / mass
    steps = where.diff(dim=1).abs()
    assert steps.max() <= 3.01  # up to a tenth of the side, and rounding
    assert (where.diff(dim=1).sign().diff(dim=1).abs() == 2).any()  # some turn back
    assert data.fingerprint() == load_data("clips:6,20", root=tmp_path).fingerprint()
    assert data.fingerprint() != load_data("clips:6,20", root=tmp_path, seed=1).fingerprint()


@pytest.mark.parametrize("name", ["clips:1", "clips:8,32,1,1", "clips:x", "clips:8,15", "photos:4", "photos:8,8"])
def test_sizes_that_cannot_be_are_refused_with_what_can(name):
    with pytest.raises(DataError, match=r"the argument is whole numbers of \d+\.\.\d+"):
        load_data(name)
