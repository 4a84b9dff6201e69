import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from genfuse.data import load_data

VALUES = np.random.default_rng(0).normal((5, -3, 1e9), (1, 100, 2), size=(50, 3))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"csv:{path}"


def save(path: Path, values: np.ndarray = VALUES) -> str:
    """The name of a data set that is this array in a file, in the format that the path's suffix names."""
    if path.suffix == ".csv":
        np.savetxt(path, values, delimiter=",", fmt="%.17g")
    elif path.suffix == ".npy":
        np.save(path, values)
    else:
        np.savez(path, values)
    return f"{path.suffix[1:]}:{path}"


@pytest.mark.parametrize("suffix", [".csv", ".npy", ".npz"])
def test_a_table_is_standardized_by_its_training_split(tmp_path, suffix):
    data = load_data(save(tmp_path / f"a{suffix}"))
    train, test = (data.batch(part, slice(None)).x for part in ("train", "test"))
    assert (data.shape, data.levels, data.is_image, len(train), len(test)) == ((3,), None, False, 40, 10)
    original = data.scaling.restore(torch.cat([train, test])).numpy()
    assert np.allclose(np.sort(original, 0), np.sort(VALUES, 0), rtol=1e-6)
    oracle = StandardScaler().fit(original[:40])
    assert np.allclose(oracle.transform(original[:40]), train, atol=1e-6)
    assert np.allclose(oracle.transform(original[40:]), test, atol=1e-6)
    assert data.scaling.names is None


def test_the_split_follows_the_seed(tmp_path):
    name = save(tmp_path / "a.npy")
    assert load_data(name).fingerprint() == load_data(name, seed=0).fingerprint()
    assert load_data(name).fingerprint() != load_data(name, seed=1).fingerprint()


@pytest.mark.parametrize("constant", [0.1, 0.0, -1e17 / 3])
def test_a_constant_column_becomes_zero(tmp_path, constant):
    data = load_data(save(tmp_path / "a.npy", np.c_[VALUES, np.full(50, constant)]))
    assert data.scaling.std[3] == 1
    for split in data.splits.values():
        assert not split.x[:, 3].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, np.uint64, bool, ">f4"])
def test_any_real_dtype_is_taken(tmp_path, dtype):
    values = np.arange(20).reshape(10, 2).astype(dtype)
    data = load_data(save(tmp_path / "a.npy", values))
    restored = torch.cat([data.scaling.restore(split.x) for split in data.splits.values()])
    assert np.allclose(np.sort(restored.numpy(), 0), np.sort(values.astype(float), 0), atol=1e-6)


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
@pytest.mark.parametrize("validation", ["val", "valid", "validation", None])
def test_a_folder_of_splits_is_taken_as_it_is(tmp_path, suffix, validation):
    parts = {"train": VALUES[:20], "test": VALUES[20:30], **({validation: VALUES[30:]} if validation else {})}
    for part, values in parts.items():
        save(tmp_path / f"{part}{suffix}", values)
    data = load_data(f"{suffix[1:]}:{tmp_path}")
    assert list(data.splits) == (["train", "validation", "test"] if validation else ["train", "test"])
    assert data.scaling.mean == pytest.approx(tuple(VALUES[:20].mean(0)))
    assert np.allclose(data.scaling.restore(data.splits["test"].x).numpy(), VALUES[20:30], rtol=1e-6)


def test_an_npz_may_hold_the_splits(tmp_path, refused):
    np.savez_compressed(tmp_path / "a.npz", train=VALUES[:20], val=VALUES[20:30], test=VALUES[30:], other=VALUES)
    data = load_data(f"npz:{tmp_path}/a.npz")
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 20, "validation": 10, "test": 20}
    np.savez(tmp_path / "b.npz", a=VALUES, b=VALUES)
    refused(f"npz:{tmp_path}/b.npz", "one array, or train and test; it has: a, b")


def test_miniboone_is_loaded_from_its_folder(data_root):
    root = data_root("miniboone40/train.npy")
    data = load_data(f"npy:{root}/miniboone40")
    assert data.shape == (40,)
    assert np.allclose(
        data.scaling.restore(data.splits["test"].x), np.load(root / "miniboone40" / "test.npy"), atol=1e-5
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1,2\n" * 5, None),
        ("a, b c\n" + "1,2\n" * 5, ("a", "b c")),
        ('"a","b,c"\n' + '"1","2"\n' * 5, ("a", "b,c")),
        ("\ufeffa,b\r\n" + "1,2\r\n" * 5, ("a", "b")),
        ("\na,b\n" + "1,2\n\n" * 5, ("a", "b")),
        ("#a,b\n" + "1, 2\n" * 4 + "1,2", ("#a", "b")),
        (",x\n" + "1,2\n" * 5, ("", "x")),
        ('"a\nb",c\n' + "1,2\n" * 5, ("a\nb", "c")),
    ],
)
def test_headers_quotes_and_blank_lines(tmp_path, text, names):
    path = tmp_path / "a.csv"
    path.write_text(text, newline="")
    data = load_data(f"csv:{path}")
    assert data.scaling.names == names
    assert data.scaling.mean == (1, 2)
    assert sum(map(len, data.splits.values())) == 5


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n", "a header and no rows"),
        ("a,b\n1,2\n3\n", "row 3: 1 cells, but the first row has 2"),
        ("a,b\n1,2\n3,4,5\n", "row 3: 3 cells, but the first row has 2"),
        ("1,2\n\n3,4,\n", "row 3: 3 cells"),
        ("a,b,c\n1,2\n3,4\n", "row 2: 2 cells, but the first row has 3"),
        ("a,b\n1,2\n3,four\n", "row 3, column 2 (b): expected a number; got 'four'"),
        ("1,2\n3,four\n", "row 2, column 2: expected a number; got 'four'"),
        ("1,two\n3,4\n", "row 1, column 2: expected a number; got 'two'"),
        ("a,b\n1,2\n ,4\n", "row 3, column 1 (a): expected a number; got an empty cell"),
        ("a;b\n1;2\n", "row 2, column 1 (a;b): expected a number; got '1;2'"),
        ("a,b\n1,nan\ninf,4\n5,-inf\n", "3 cells are NaN or infinite, the first in row 2, column 2 (b): nan"),
        ("1,2\n" * 4, "4 rows are too few"),
        ('a,b\n1,"2\n3,4\n', "column 2 (b)"),
        ("1,1e308\n1,-1e308\n" * 5, "spread of column 2"),
        ("1,1e-300\n1,2e-300\n" * 5, "spread of column 2"),
    ],
)
def test_a_faulty_csv_is_refused_with_row_and_column(tmp_path, refused, text, problem):
    refused(write(tmp_path / "a.csv", text), f"{tmp_path}/a.csv", problem)


def test_a_binary_file_is_no_csv(tmp_path, refused):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x01")
    refused(f"csv:{tmp_path}/a.csv", "is no text")
    (tmp_path / "b.csv").write_bytes(b"1,2\n3,4\n" * 10_000 + b"\xff\n")
    refused(f"csv:{tmp_path}/b.csv", "b.csv", "is no text")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_nan_and_inf_in_an_array_are_counted_and_the_first_is_named(tmp_path, refused, suffix):
    values = VALUES.copy()
    values[[7, 9, 3], [1, 0, 2]] = np.nan, np.inf, -np.inf
    refused(save(tmp_path / f"a{suffix}", values), "3 cells are NaN or infinite", "row 3, column 2 (from 0): -inf")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.arange(9.0), "expected rows and columns, (N, D); got an array of shape (9,)"),
        (np.zeros((9, 2, 2)), "shape (9, 2, 2)"),
        (np.zeros((0, 2)), "shape (0, 2)"),
        (np.zeros((9, 0)), "shape (9, 0)"),
        (np.zeros((9, 2), complex), "an array of complex128"),
        (np.full((9, 2), "a"), "an array of <U1"),
        (np.zeros((4, 2)), "4 rows are too few"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_that_is_no_table_is_refused(tmp_path, refused, suffix, values, problem):
    refused(save(tmp_path / f"a{suffix}", values), problem)


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickles_are_never_run(tmp_path, refused, suffix):
    refused(
        save(tmp_path / f"objects{suffix}", np.array([[Explosive()] * 2] * 9)), f"objects{suffix}", "cannot be read"
    )
    (tmp_path / f"a{suffix}").write_bytes(pickle.dumps(Explosive()))
    refused(f"{suffix[1:]}:{tmp_path}/a{suffix}", "is no NumPy file", "pickles are refused")


def test_damaged_arrays_are_named(tmp_path, refused):
    for suffix in (".npy", ".npz"):
        name = save(tmp_path / f"a{suffix}")
        path = tmp_path / f"a{suffix}"
        raw = path.read_bytes()
        for damaged in (raw[:-100], raw[:20], raw[:6] + b"\xff" * 50 + raw[56:]):
            path.write_bytes(damaged)
            refused(name, str(path), "cannot be read")
        path.write_bytes(b"")
        refused(name, str(path), "is empty")
    save(tmp_path / "b.npz", np.zeros((400, 4)))
    raw = bytearray((tmp_path / "b.npz").read_bytes())
    raw[1000] ^= 255  # in the array: the archive's checksum tells
    (tmp_path / "b.npz").write_bytes(raw)
    refused(f"npz:{tmp_path}/b.npz", "b.npz", "cannot be read")
    with zipfile.ZipFile(tmp_path / "c.npz", "w"):
        pass
    refused(f"npz:{tmp_path}/c.npz", "it has: none")


def test_one_format_under_the_name_of_another_is_told(tmp_path, refused):
    save(tmp_path / "a.npy")
    save(tmp_path / "a.npz")
    refused(f"npz:{tmp_path}/a.npy", f"write npy:{tmp_path}/a.npy")
    refused(f"npy:{tmp_path}/a.npz", f"write npz:{tmp_path}/a.npz")


def test_paths_are_checked_and_may_have_colons(tmp_path, refused):
    for name in ("csv", "npy", "npz", "csv:"):
        refused(name, "the path is missing", f"{name.rstrip(':')}:PATH")
    refused(f"csv:{tmp_path}/absent.csv", "there is no file or folder", f"{tmp_path}/absent.csv")
    refused(f"npy:{tmp_path}", "no train.npy and no test.npy")
    refused(f"npz:{tmp_path}", str(tmp_path))
    assert load_data(save(tmp_path / "a:b.npy")).name == f"npy:{tmp_path}/a:b.npy"


def test_splits_with_different_columns_are_refused(tmp_path, refused):
    save(tmp_path / "train.npy")
    save(tmp_path / "test.npy", VALUES[:, :2])
    refused(f"npy:{tmp_path}", f"{tmp_path}/test.npy has 2 columns, but {tmp_path}/train.npy has 3")
