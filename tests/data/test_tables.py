import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

import genfuse
from genfuse.data import load_data
from genfuse.errors import DataError, DataWarning, SettingsError

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
    with pytest.warns(DataWarning, match="not used: other"):
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
        ("a,b\n1,2\n ,4\n", "2 rows are too few"),
        ("a;b\n1;2\n", "row 2, column 1 (a;b): expected a number; got '1;2'"),
        ("a,b\n1,nan\ninf,4\n5,-inf\n", "3 cells are NaN or infinite, the first in row 2, column 2 (b): nan"),
        ("1,2\n" * 4, "4 rows are too few"),
        ('a,b\n1,"2\n3,4\n', "column 2 (b): a quote is not closed"),
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


# Columns and headers

ROWS = "".join(f"{a:.4f},{b:.4f}\n" for a, b in VALUES[:10, :2])


def original(data, part: str) -> np.ndarray:
    return data.scaling.restore(data.splits[part].x).numpy()


def test_columns_of_the_splits_are_matched_by_name(tmp_path):
    np.savetxt(tmp_path / "train.csv", VALUES[:30], delimiter=",", header="a,b,c", comments="")
    np.savetxt(tmp_path / "test.csv", VALUES[30:, [2, 0, 1]], delimiter=",", header="c,a,b", comments="")
    np.savetxt(tmp_path / "valid.csv", VALUES[:9, ::-1], delimiter=",", header="c,b,a", comments="")
    data = load_data(f"csv:{tmp_path}")
    assert data.scaling.names == ("a", "b", "c")
    assert np.allclose(original(data, "test"), VALUES[30:], rtol=1e-6)
    assert np.allclose(original(data, "validation"), VALUES[:9], rtol=1e-6)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("a,b,d\n", "test.csv has the columns a, b, d, but"),
        ("a,b,b\n", "test.csv has the columns a, b, b, but"),
        ("", "test.csv has no header, but"),
    ],
)
def test_columns_that_cannot_be_matched_are_refused(tmp_path, refused, header, problem):
    row = "0.5,2.5,0.125\n"
    write(tmp_path / "train.csv", "a,b,c\n" + row * 9)
    write(tmp_path / "test.csv", header + row * 9)
    refused(f"csv:{tmp_path}", problem)


@pytest.mark.parametrize("head", ["0,1", '"0","1"', "400,410.5", "1999,2000"])
def test_a_first_row_that_may_be_names_or_numbers_is_asked_about(tmp_path, refused, head):
    name = write(tmp_path / "a.csv", head + "\n" + ROWS)
    refused(name, f"{tmp_path}/a.csv: the first row,", "--data.header yes or no", "header='yes'")
    names = load_data(name, header="yes")
    assert names.scaling.names == tuple(head.replace('"', "").split(","))
    assert sum(map(len, names.splits.values())) == 10
    numbers = load_data(name, header="no")
    assert numbers.scaling.names is None
    assert sum(map(len, numbers.splits.values())) == 11
    assert (names.options, numbers.options) == ({"header": "yes"}, {"header": "no"})


@pytest.mark.parametrize("text", ["0,1\n" * 5, "1,2\n3,4\n0,9\n7,8\n5,6\n", ROWS, "0\n0\n1\n1\n0\n"])
def test_rows_of_numbers_that_look_like_all_others_are_data(tmp_path, text):
    data = load_data(write(tmp_path / "a.csv", text))
    assert data.scaling.names is None
    assert sum(map(len, data.splits.values())) == text.count("\n")


def test_names_of_which_some_are_numbers_are_asked_about(tmp_path, refused):
    name = write(tmp_path / "a.csv", "height,2020\n" + ROWS)
    refused(name, "row 1, column 1: expected a number; got 'height'; if the row holds names, say --data.header yes")
    assert load_data(name, header="yes").scaling.names == ("height", "2020")


@pytest.mark.parametrize("first", ["", "Unnamed: 0"])
@pytest.mark.parametrize("index", [range(10), np.random.default_rng(0).permutation(99)[:10]])
def test_the_index_that_pandas_writes_is_left_out_and_told(tmp_path, first, index):
    rows = "".join(f"{i},{line}\n" for i, line in zip(index, ROWS.split(), strict=True))
    with pytest.warns(DataWarning, match="holds the numbers of the rows"):
        data = load_data(write(tmp_path / "a.csv", f"{first},a,b\n{rows}"))
    assert data.scaling.names == ("a", "b")
    assert data.scaling.mean == pytest.approx(original(data, "train").mean(0))
    assert sorted(np.r_[original(data, "train"), original(data, "test")][:, 0]) == pytest.approx(
        sorted(VALUES[:10, 0]), abs=1e-4
    )


@pytest.mark.parametrize(("name", "step"), [("id", 3), ("row", 1)])
def test_a_column_that_numbers_the_rows_is_left_out_as_of_a_table_of_words(tmp_path, name, step):
    ids = [step * i for i in range(10)]
    rows = "".join(f"{i},{line}\n" for i, line in zip(ids, ROWS.split(), strict=True))
    file = write(tmp_path / "a.csv", f"{name},a,b\n{rows}")
    said = f"the column {name} is left out: it numbers the rows; to have it modelled, say --data.types {name}=integer"
    with pytest.warns(DataWarning, match=said):
        assert load_data(file).scaling.names == ("a", "b")
    assert load_data(file, types=f"{name}=integer").scaling.names == (name, "a", "b")
    rows = rows.replace(f"\n{ids[4]},", f"\n{ids[3]},")  # no two are the same of those that do
    assert load_data(write(tmp_path / "a.csv", f"{name},a,b\n{rows}")).scaling.names == (name, "a", "b")


def test_numbers_beyond_2_to_the_53_are_refused_where_float64_does_not_hold_them_alone(tmp_path, refused):
    rows = [f"{2.5e20 + i * 1e18:.6e},{2**60},{w}\n" for i, w in enumerate("xyxyxyxyxy")]
    assert load_data(write(tmp_path / "a.csv", "a,b,c\n" + "".join(rows))).shape == (3,)
    rows[4] = rows[4].replace(f"{2**60},", f"{2**60 + 1},")
    refused(write(tmp_path / "a.csv", "a,b,c\n" + "".join(rows)), "row 6, column 2 (b)", "a whole number beyond 2^53")


def test_a_warning_names_the_column_of_the_file_also_where_others_are_left_out(tmp_path):
    rows = "".join(f"{i},{line}\n" for i, line in enumerate(ROWS.split()))
    text = f"id,a,b\n{rows}" + "".join(f"{i},{line}\n" for i, line in enumerate(ROWS.split() * 9, 10)) + "100,1e12,0\n"
    with pytest.warns(DataWarning, match=r"row 102, column 2 \(a\): 1e\+12"):
        load_data(write(tmp_path / "a.csv", text))


# Marks between cells and before decimals


@pytest.mark.parametrize(
    ("delimiter", "mark"), [(";", ";"), ("semicolon", ";"), ("tab", "\t"), ("\t", "\t"), ("|", "|"), (" ", " ")]
)
@pytest.mark.parametrize("decimal", [".", ","])
def test_other_marks_are_read_if_they_are_named(tmp_path, delimiter, mark, decimal):
    text = "a,b\n" + ROWS
    text = text.replace(",", mark).replace(".", decimal)
    data = load_data(write(tmp_path / "a.csv", text), delimiter=delimiter, decimal=decimal)
    assert data.scaling.names == ("a", "b")
    assert sorted(np.r_[original(data, "train"), original(data, "test")][:, 1]) == pytest.approx(
        sorted(VALUES[:10, 1]), abs=1e-3
    )


@pytest.mark.parametrize(
    ("text", "options", "problem"),
    [
        ("a;b\n1;2\n" * 3, {}, "separated by semicolons? --data.delimiter ';' (in Python delimiter=';')"),
        ("1,5;2,5\n" * 9, {}, "semicolons? --data.delimiter ';' --data.decimal ,"),
        ("a;b\n1,5;2,5\n", {}, "semicolons? --data.delimiter ';' --data.decimal ,"),
        ("a\tb\n1\t2\n", {}, "separated by tabs? --data.delimiter tab"),
        ("a;b\n1,5;2,5\n", {"delimiter": ";"}, "decimals marked by commas? --data.decimal ,"),
        ("a;b\n1.234,5;2,5\n", {"delimiter": ";", "decimal": ","}, "column 1 (a): expected a number; got '1.234,5'"),
        ("a;b\n1.5;2,5\n", {"delimiter": ";", "decimal": ","}, "expected a number; got '1.5'"),
    ],
)
def test_an_error_tells_which_marks_there_seem_to_be(tmp_path, refused, text, options, problem):
    refused(write(tmp_path / "a.csv", text), problem, **options)


@pytest.mark.parametrize(
    "options",
    [{"decimal": ","}, {"delimiter": "ab"}, {"delimiter": "."}, {"delimiter": "1"}, {"decimal": "x"}, {"header": "x"}],
)
def test_marks_that_cannot_be_meant_are_refused(tmp_path, options):
    with pytest.raises(SettingsError, match="must be"):
        load_data(write(tmp_path / "a.csv", ROWS), **options)
    with pytest.raises(SettingsError, match="are for csv:PATH"):
        load_data("digits", **options)


# Numbers


def test_whole_numbers_that_float64_cannot_hold_are_refused(tmp_path, refused):
    big = np.arange(20).reshape(10, 2) + 2**60
    refused(save(tmp_path / "a.npy", big), "row 0, column 1 (from 0): 1152921504606846977: a whole number beyond 2^53")
    refused(save(tmp_path / "a.npy", big.astype(np.uint64)), "a whole number beyond 2^53")
    refused(save(tmp_path / "a.npy", -big), "-1152921504606846977: a whole number beyond 2^53")
    text = "a,b\n" + "".join(f"{a},0.5\n" for a in big[:, 1])
    refused(write(tmp_path / "a.csv", text), "row 2, column 1 (a): 1152921504606846977: a whole number beyond 2^53")
    exact = np.arange(20).reshape(10, 2) * 2**50
    data = load_data(save(tmp_path / "a.npy", exact))
    assert np.allclose(np.sort(np.r_[original(data, "train"), original(data, "test")], 0), exact, atol=1e10)


@pytest.mark.parametrize("rows", [10, 300])
@pytest.mark.parametrize("where", [(0,), (2, 3, 5)])
@pytest.mark.parametrize("value", [1e30, -1e8])
def test_a_cell_that_flattens_its_column_is_warned_of_with_row_and_column(tmp_path, rows, where, value):
    values = np.random.default_rng(0).normal(size=(rows, 3))
    for row in where:
        if row < rows:
            values[row, 1] = value
    np.save(tmp_path / "train.npy", values)
    np.save(tmp_path / "test.npy", VALUES)
    if rows == 10 and len(where) > 1:
        return  # a third of the rows: two kinds of rows, and no outlier
    with pytest.warns(DataWarning) as said:
        load_data(f"npy:{tmp_path}")
    [message] = [str(each.message) for each in said if "train.npy" in str(each.message)]
    assert f"row {where[0]}, column 1 (from 0): {value:.6g} makes all others of its column almost equal" in message


def test_a_cell_of_a_held_out_split_that_is_far_out_is_warned_of_with_its_line(tmp_path):
    write(tmp_path / "train.csv", "a,b\n" + ROWS)
    write(tmp_path / "test.csv", "b,a\n\n" + ROWS.replace("\n", "\n\n") + "1e9,3\n")
    with pytest.warns(DataWarning, match=r"test.csv, row 23, column 2 \(b\): 1e\+09 of the test split is"):
        load_data(f"csv:{tmp_path}")


@pytest.mark.parametrize(
    "column",
    [
        np.zeros(300),
        np.arange(300) % 2,
        np.random.default_rng(0).poisson(0.02, 300),
        np.random.default_rng(0).standard_cauchy(300).clip(-200, 200),
        np.exp(2 * np.random.default_rng(0).normal(size=300)),
    ],
)
def test_columns_of_few_values_or_heavy_tails_are_not_warned_of(tmp_path, column):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(save(tmp_path / "a.npy", np.c_[np.random.default_rng(1).normal(size=(300, 2)), column]))


def test_columns_far_from_0_are_standardized_to_the_last_digit(tmp_path):
    offset = np.random.default_rng(0).integers(0, 9, (400, 1)) + 2.0**52
    x = load_data(save(tmp_path / "a.npy", offset)).splits["train"].x
    assert abs(float(x.double().mean())) < 0.2  # of the mean, float64 holds whole numbers alone
    assert float(x.std()) == pytest.approx(1, abs=0.01)


# Labels beside arrays

CLASSES = np.arange(50) % 3


@pytest.mark.parametrize(
    ("x", "y"), [("x", "y"), ("X", "Y"), ("data", "labels"), ("features", "target"), ("points", "label")]
)
@pytest.mark.parametrize("form", ["npz", "npy"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (CLASSES, None),
        (CLASSES[:, None].astype(float), None),
        (np.eye(3)[CLASSES], None),
        (CLASSES + 1, ("1", "2", "3")),
        (np.array([-1, 5, 9])[CLASSES], ("-1", "5", "9")),
        (np.array(["cat", "dog", "owl"])[CLASSES], ("cat", "dog", "owl")),
        (np.array(["2", "9", "10"])[CLASSES], ("2", "9", "10")),
        (np.array(["a2", "a10", "b"])[CLASSES], ("a2", "a10", "b")),
        (np.array([b"a", b"b\xfe", b"b\xff"])[CLASSES], ("a", r"b\xfe", r"b\xff")),
        (CLASSES.astype("u8") + 2**63, tuple(str(2**63 + k) for k in range(3))),
    ],
)
def test_labels_beside_an_array_are_read(tmp_path, x, y, form, labels, names):
    values = np.c_[CLASSES, VALUES]
    if form == "npz":
        np.savez(tmp_path / "a.npz", **{x: values, y: labels})
        data = load_data(f"npz:{tmp_path}/a.npz")
    else:
        if x == "points":
            return  # in a folder, other files may be anything
        np.save(tmp_path / f"{x}.npy", values)
        np.save(tmp_path / f"{y}.npy", labels)
        data = load_data(f"npy:{tmp_path}")
    assert (data.classes, data.class_names) == (3, names)
    for part, split in data.splits.items():
        assert np.array_equal(original(data, part)[:, 0].round(), split.y)


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train", "train_labels", "test", "test_labels"),
        ("trainX", "trainY", "testX", "testY"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("xtrain", "ytrain", "xtest", "ytest"),
        ("training-data", "training-labels", "testing-data", "testing-labels"),
    ],
)
def test_labels_beside_splits_are_read(tmp_path, names):
    arrays = (VALUES[:30], CLASSES[:30], VALUES[30:], CLASSES[30:])
    np.savez(tmp_path / "a.npz", **dict(zip(names, arrays, strict=True)))
    data = load_data(f"npz:{tmp_path}/a.npz")
    assert data.classes == 3
    assert np.array_equal(data.splits["test"].y, CLASSES[30:])
    assert np.allclose(original(data, "test"), VALUES[30:], rtol=1e-6)


def test_labels_and_members_that_are_no_text_and_no_arrays_are_refused(tmp_path, refused):
    labels = np.array(["cat", "dog"] * 25)
    labels.view(np.uint32)[0] = 0x110000
    np.savez(tmp_path / "a.npz", x=VALUES, y=labels)
    refused(f"npz:{tmp_path}/a.npz", "a.npz, y: the labels hold characters that Unicode does not have")
    np.savez(tmp_path / "a.npz", x=VALUES)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("y", b"0, 1, 2")
    refused(f"npz:{tmp_path}/a.npz", "y in it is no array")


def test_labels_that_no_training_example_has_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", train=VALUES, test=VALUES, y_train=CLASSES % 2, y_test=CLASSES)
    with pytest.warns(DataWarning, match="the test split has the labels 2, which no training example has"):
        load_data(f"npz:{tmp_path}/a.npz")


def test_arrays_that_are_not_used_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", train=VALUES, test=VALUES, weights=VALUES, y_train=VALUES[:, 0], y=CLASSES)
    with pytest.warns(DataWarning, match=r"a.npz: not used: weights, y, y_train"):
        data = load_data(f"npz:{tmp_path}/a.npz")
    assert data.splits["train"].y is None


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"x": VALUES, "y": CLASSES[:9]}, "a.npz, y has shape (9,), but there are 50 examples"),
        ({"x": VALUES, "data": VALUES, "y": CLASSES}, "x and data may both be the examples of all"),
        ({"train": VALUES, "x_train": VALUES, "test": VALUES}, "may both be the examples of train"),
        ({"train": VALUES, "test": VALUES, "val": VALUES, "valid": VALUES}, "may both be the examples of validation"),
    ],
)
def test_arrays_that_can_be_read_in_two_ways_are_refused(tmp_path, refused, arrays, problem):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(f"npz:{tmp_path}/a.npz", problem)


def test_files_of_one_split_that_are_two_are_refused_and_others_are_named(tmp_path, refused):
    for name in ("train", "test", "val", "extra"):
        write(tmp_path / f"{name}.csv", "a,b\n" + "1.5,2\n3,4\n" * 3)
    with pytest.warns(DataWarning, match=r"not used: extra\.csv$"):
        assert set(load_data(f"csv:{tmp_path}").splits) == {"train", "validation", "test"}
    write(tmp_path / "valid.csv", "a,b\n1,2\n")
    refused(f"csv:{tmp_path}", "valid.csv and", "val.csv are both called as the validation split")


@pytest.mark.parametrize("cell", ["1_000", "\u0661", "\uff11"])
@pytest.mark.parametrize("mark", [".", ","])
def test_numbers_are_those_that_every_program_reads(tmp_path, refused, cell, mark):
    path = write(tmp_path / "a.csv", "a;b\n" + "1;2\n" * 9 + f"{cell};2\n")
    refused(path, "row 11, column 1 (a): expected a number", delimiter=";", decimal=mark)


def test_text_in_utf_16_is_told_what_is_wanted(tmp_path, refused):
    (tmp_path / "a.csv").write_text("a,b\n" + "1,2\n" * 9, encoding="utf-16")
    refused(f"csv:{tmp_path}/a.csv", "is no text in UTF-8")


def test_other_formats_than_csv_are_said_to_be_so(tmp_path, refused):
    for name, read in (("a.xlsx", "read_excel"), ("a.parquet", "read_parquet"), ("a.json", "read_json")):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        refused(f"csv:{tmp_path / name}", f"{name} is no text of comma-separated cells by its name", f"pandas.{read}(")


def test_arrays_and_tensors_that_do_not_hold_all_their_values_are_refused():
    values = VALUES.astype(np.float32)
    tensor = torch.from_numpy(values)
    masked = np.ma.masked_array(values, values > 1)
    for given, problem in [
        (masked, "cells are NaN"),
        (masked.round().astype(int), "cells are NaN"),
        (tensor.to_sparse(), "got a torch.sparse_coo one"),
        (tensor.to("meta"), "got a meta one"),
    ]:
        with pytest.raises(DataError, match=problem):
            load_data(given)
    model = genfuse.create("nsf", shape=values.shape[1:], levels=None).eval()
    with pytest.raises(DataError, match="masks some"):
        model.log_prob(masked)
    whole = load_data(torch._neg_view(tensor)).splits["train"].x
    assert torch.equal(whole, load_data(-tensor).splits["train"].x)
