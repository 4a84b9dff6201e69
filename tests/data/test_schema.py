"""Tables as people keep them: kinds of columns, and the way there and back."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from genfuse.data import Dataset, Schema, joined, load_data, names_in, read_rows
from genfuse.errors import DataError, DataWarning, SettingsError

N = 60


def people(n: int = N) -> pd.DataFrame:
    r = np.random.default_rng(0)
    return pd.DataFrame({
        "person_id": r.permutation(10 * n)[:n] + 1000,
        "height": r.normal(170, 10, n).round(1),
        "children": r.poisson(2, n),
        "city": r.choice(["Rome", "Bonn", "Oslo, east"], n),
        "married": r.choice(["Yes", "No"], n),
        "smokes": r.integers(0, 2, n),
        "born": pd.Timestamp("1980-05-17") + pd.to_timedelta(r.integers(0, 9000, n), "D"),
        "note": [f"{i} says {j}" for i, j in enumerate(r.integers(0, 99, n))],
    })  # fmt: skip


def with_gaps(frame: pd.DataFrame, seed: int = 1) -> pd.DataFrame:
    gone = np.random.default_rng(seed).random(frame.shape) < 0.1
    gone[:, [0, -1]] = False
    return frame.mask(gone)


def load(tmp_path, frame: pd.DataFrame, **options) -> Dataset:
    """The data set of a CSV file of this table, read without a word about what is left out."""
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.warns(DataWarning, match="left out"):
        return load_data(f"csv:{tmp_path}/a.csv", **options)


def kinds(data: Dataset) -> dict[str, str]:
    return {column.name: column.kind for column in data.schema.columns}


EXPECTED = {"height": "number", "children": "integer", "city": "category", "married": "boolean", "smokes": "boolean",
            "born": "date"}  # fmt: skip


@pytest.mark.parametrize("gaps", [False, True])
def test_kinds_of_columns_are_seen_and_ids_are_left_out(tmp_path, gaps):
    frame = with_gaps(people()) if gaps else people()
    data = load(tmp_path, frame)
    assert kinds(data) == EXPECTED
    assert [name for name, _ in data.schema.left_out] == ["person_id", "note"]
    assert "numbers the rows" in data.schema.left_out[0][1]
    assert "names the rows" in data.schema.left_out[1][1]
    assert [c.missing for c in data.schema.columns] == [gaps] * 6
    assert data.schema.columns[2].categories == ("Bonn", "Oslo, east", "Rome")
    for part in data.splits.values():
        assert bool(part.x.isnan().any()) == gaps


SEED = 3  # with which rows 0, 1 and 2 are for training
TIMES = pd.Series(pd.date_range("2024-01-13 23:05", periods=N, freq="7h"))


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["01067", "10115", "80331"] * 20, "category"),  # whose zeros a number would lose
        (TIMES.dt.strftime("%H:%M"), "date"),
        (TIMES.dt.strftime("%Y-%m"), "date"),
        (TIMES.dt.strftime("%Y%m%d"), "date"),
        (TIMES.dt.strftime("%Y-%m-%dT%H:%M:%SZ"), "date"),
        (TIMES.dt.strftime("%Y-%m-%d %H:%M:%S+0000"), "date"),
        (TIMES.dt.strftime("%Y-%m-%d %H:%M:%S.%f"), "date"),
        (TIMES.dt.strftime("%d.%m.%Y %H:%M"), "date"),
        (TIMES.dt.strftime("%m/%d/%Y %I:%M %p"), "date"),
        (["-0", "0", "1"] * 20, "boolean"),
        (["1.5" if i in (0, 1, 2) else "" for i in range(N)], "number"),  # which the test split has none of
    ],
)
def test_cells_are_read_for_what_they_are_and_written_as_they_were(tmp_path, cells, kind):
    frame = pd.DataFrame({"height": people()["height"], "cell": list(cells)})
    frame.to_csv(tmp_path / "a.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        data = load_data(f"csv:{tmp_path}/a.csv", seed=SEED)
    assert kinds(data)["cell"] == kind
    back = data.schema.texts(data.schema.decode(data.splits["train"].x))["cell"]
    wanted = frame["cell"].iloc[_split(N, SEED)[0].numpy()]
    if cells[0] == "-0":
        wanted = wanted.replace("-0", "0")
    assert back.astype(object).fillna("").map(str).tolist() == wanted.tolist()


def test_ids_too_long_for_a_number_are_left_out(tmp_path):
    data = load(
        tmp_path, people().assign(account=[str(2**60 + i) for i in range(N)]).drop(columns=["note", "person_id"])
    )
    assert data.schema.left_out[0][0] == "account"


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        (["12.5%", "3%"], "got '12.5%'; write numbers without their unit, or say --data.types 'a cell=category'"),
        (["€ 1,200.50", "€ 7"], "write numbers without their unit"),
        (["1.5", "2.5", "-"], "got '-'.* if it stands for nothing, leave the cell empty"),
        (["01/02/2024", "03/02/2024"], "say which by --data.types 'a cell=date:"),
    ],
)
def test_what_is_wrong_with_cells_is_said_with_what_to_do(tmp_path, cells, problem):
    pd.DataFrame({"a cell": (cells * N)[:N], "b": people()["height"]}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=problem):
        load_data(f"csv:{tmp_path}/a.csv")


def test_two_columns_of_one_name_are_named_by_their_places(tmp_path):
    (tmp_path / "a.csv").write_text("size,,size,\n" + "1.5,a,2.5,b\n" * 9)
    with pytest.raises(DataError, match="columns 1 and 3 are both called 'size': rename one"):
        load_data(f"csv:{tmp_path}/a.csv")


def test_dataframes_of_other_kinds_are_read(tmp_path):
    frame = pd.DataFrame(
        {
            ("seen", "at"): TIMES.dt.tz_localize("Europe/Berlin"),
            ("seen", "for"): pd.to_timedelta(np.arange(N) ** 2, "s"),
            ("kind", ""): pd.Categorical(["x", "y"] * (N // 2)),
        }
    )
    data = load_data(frame)
    assert kinds(data) == {"seen at": "date", "seen for": "number", "kind ": "category"}
    seen = data.schema.decode(data.splits["train"].x)["seen at"]
    assert seen.iloc[0] == TIMES.dt.tz_localize("Europe/Berlin").iloc[0].tz_convert("UTC").tz_localize(None)
    assert load_data(frame["seen", "for"].dt.total_seconds()).shape == (1,)


@pytest.mark.parametrize("cell", [[1.0, 2.0], {"a": 1}, np.zeros(2), 1 + 2j])
def test_cells_of_a_dataframe_that_have_parts_are_refused_by_place(cell):
    frame = pd.DataFrame({"age": np.arange(40) % 7, "size": [1.5] * 39 + [cell]}, index=range(100, 140))
    with pytest.raises(DataError, match=r"row 1(00|39), column 2 \(size\): expected a number, a word or a date; got a"):
        load_data(frame)
    assert load_data(frame, drop="size").shape == (1,)


def test_notebooks_show_rows_in_words(tmp_path):
    data = load(tmp_path, people())
    shown = data._repr_html_()
    assert "<td>Oslo, east</td>" in shown
    assert data.schema.decode(data.splits["train"].x[:1])["born"].dt.strftime("<td>%Y-%m-%d</td>").item() in shown
    assert all(f"<td>{kind}</td>" in data.schema._repr_html_() for kind in (*EXPECTED.values(), "left out"))


@pytest.mark.parametrize("gaps", [False, True])
def test_rows_come_back_as_they_were(tmp_path, gaps):
    frame = with_gaps(people()) if gaps else people()
    data = load(tmp_path, frame)
    back = data.schema.decode(torch.cat([split.x for split in data.splits.values()]))
    texts = data.schema.texts(back)
    order = torch.cat(_split(len(frame))).numpy()
    texts.to_csv(tmp_path / "back.csv", index=False)
    written = read_rows(tmp_path / "back.csv").reset_index(drop=True)
    original = read_rows(tmp_path / "a.csv").iloc[order].reset_index(drop=True)[list(EXPECTED)]
    whole = ["children", "smokes"]  # which pandas writes as 2.0 where cells are missing
    original[whole] = original[whole].map(lambda cell: cell.removesuffix(".0"))
    assert written.to_numpy().tolist() == original.to_numpy().tolist()
    assert str(back["children"].dtype) == "Int64"
    assert back["born"].dtype.kind == "M"
    assert texts["born"].dropna().str.fullmatch(r"\d{4}-\d\d-\d\d").all()
    assert torch.allclose(data.schema.encode(texts), data.schema.encode(back), equal_nan=True)


def _split(n: int, seed: int = 0) -> list[torch.Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return [order[n // 5 :].sort().values, order[: n // 5].sort().values]


def test_a_schema_is_the_same_after_json(tmp_path):
    schema = load(tmp_path, with_gaps(people())).schema
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    for damaged in ({}, {"columns": [{"nome": "a"}], "left_out": [], "decimal": "."}, {"columns": 3}):
        with pytest.raises(DataError, match="no schema"):
            Schema.from_json(damaged)


def test_codes_that_mean_something_else_have_another_fingerprint(tmp_path):
    data = load(tmp_path, people())
    other = load(tmp_path, people().replace({"Rome": "Roma"}))
    assert torch.equal(data.splits["train"].x, other.splits["train"].x)
    assert data.fingerprint() != other.fingerprint()


def test_a_table_of_numbers_alone_is_as_ever(tmp_path):
    frame = people()[["height"]].assign(weight=np.random.default_rng(2).normal(size=N))
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = load_data(f"csv:{tmp_path}/a.csv")
    assert data.schema is None
    assert data.columns is None
    assert data.plain
    np.save(tmp_path / "a.npy", frame.to_numpy())
    assert torch.equal(data.splits["train"].x, load_data(f"npy:{tmp_path}/a.npy").splits["train"].x)
    assert [column.kind for column in data.described().columns] == ["number", "number"]


def test_whole_numbers_are_seen_and_standardized_as_ever(tmp_path):
    frame = people()[["height", "children", "smokes"]].assign(constant=7)
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = load_data(f"csv:{tmp_path}/a.csv")
    assert kinds(data) == {"height": "number", "children": "integer", "smokes": "boolean", "constant": "integer"}
    assert data.plain
    np.save(tmp_path / "a.npy", frame.to_numpy())
    assert torch.equal(data.splits["train"].x, load_data(f"npy:{tmp_path}/a.npy").splits["train"].x)
    assert data.schema.decode(data.splits["test"].x)["constant"].tolist() == [7] * 12


def test_the_user_has_the_last_word(tmp_path):
    frame = people()
    data = load(
        tmp_path, frame, types={"children": "category", "smokes": "number", "person_id": "integer"}, drop="city"
    )
    assert kinds(data) == {"person_id": "integer", "height": "number", "children": "category", "married": "boolean",
                           "smokes": "number", "born": "date"}  # fmt: skip
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = load_data(f"csv:{tmp_path}/a.csv", columns="city,height")
    assert list(kinds(data)) == ["height", "city"]
    assert data.options == {"columns": "city,height"}
    for options, problem in (
        ({"drop": "x"}, "--data.drop: .* has no column x; it has: person_id"),
        ({"columns": ["y"]}, "--data.columns: .* has no column y"),
        ({"types": "city=colour"}, "kinds number, integer, category, boolean, date"),
        ({"types": "z=number"}, "--data.types: .* has no column z"),
        ({"target": "x", "drop": "note,person_id"}, "--data.target: .* has no column x"),
    ):
        with pytest.raises(SettingsError, match=problem):
            load_data(f"csv:{tmp_path}/a.csv", **options)


@pytest.mark.parametrize(
    ("cells", "form"),
    [
        (["2021-03-04", "2020-12-31"], "%Y-%m-%d"),
        (["2021-03-04 10:20:30", "2020-12-31 00:00:01"], "%Y-%m-%d %H:%M:%S"),
        (["31.12.2020", "04.03.2021"], "%d.%m.%Y"),
        (["31/12/2020", "04/03/2021"], "%d/%m/%Y"),
        (["12/31/2020", "03/04/2021"], "%m/%d/%Y"),
        (["4 Mar 2021", "31 Dec 2020"], "%d %b %Y"),
    ],
)
def test_dates_of_one_form_are_read_and_written(tmp_path, cells, form):
    frame = people(10)[["height"]].assign(day=cells * 5)
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = load_data(f"csv:{tmp_path}/a.csv")
    [_, day] = data.schema.columns
    assert (day.kind, day.form) == ("date", form)
    written = data.schema.texts(data.schema.decode(data.splits["train"].x))["day"]
    assert {cell.lstrip("0") for cell in written} == {cell.lstrip("0") for cell in cells}


def test_dates_that_may_be_two_are_asked_about(tmp_path, refused):
    frame = people(10)[["height"]].assign(day=["01/02/2020", "03/04/2021"] * 5)
    frame.to_csv(tmp_path / "a.csv", index=False)
    refused(f"csv:{tmp_path}/a.csv", "which may be %d/%m/%Y or %m/%d/%Y: say which by --data.types day=date:%d/%m/%Y")
    data = load_data(f"csv:{tmp_path}/a.csv", types="day=date:%d/%m/%Y")
    assert str(data.schema.decode(data.splits["train"].x)["day"].max().date()) == "2021-04-03"


def test_years_of_two_digits_are_read():
    frame = pd.DataFrame({"day": [f"{i % 28 + 1:02}/{i % 12 + 1:02}/{i % 5 + 20}" for i in range(200)]})
    data = load_data(frame)
    (column,) = data.schema.columns
    assert (column.kind, column.form) == ("date", "%d/%m/%y")
    assert data.schema.texts(data.schema.decode(data.splits["test"].x))["day"].isin(frame["day"]).all()


def test_whole_numbers_beyond_those_of_float64_are_numbers_with_decimals(refused):
    frame = pd.DataFrame(
        {"a": [1e300] * 20, "b": np.random.default_rng(0).normal(size=20) * 1e40, "c": ["x", "y"] * 10}
    )
    data = load_data(frame)
    assert kinds(data) == {"a": "number", "b": "number", "c": "category"}
    assert data.schema.decode(data.splits["train"].x)["a"].tolist() == [1e300] * 16
    assert next(iter(data.schema.describe()))[2] == "1e+300 to 1e+300"
    refused(frame, "some beyond 2^53", types="b=integer")


def test_names_in_quotes_may_have_commas():
    assert names_in('a, "b, c",d') == ["a", "b, c", "d"]
    assert names_in('plan="family, large",age>3, x!="say ""hi"""') == ["plan=family, large", "age>3", 'x!=say "hi"']
    assert names_in(joined(["a=b, c", "d"])) == ["a=b, c", "d"]


GOOD = "".join(f"{i / 7:.3f},{'red' if i % 3 else 'blue'},{i % 5}\n" for i in range(40))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b,c\n" + GOOD.replace("0.143,", "heavy,"), "row 3, column 1 (a): expected a number; got 'heavy'; if it is"),
        ("a,b,c\n" + GOOD + "inf,red,1\n", "row 42, column 1 (a): expected a finite number; got 'inf'"),
        ("a,b,c\n" + GOOD + "1,red\n", "row 42: 2 cells, but the first row has 3"),
        ("a,b,c\n", "a header and no rows"),
        ("a,b,b\n" + GOOD, "the names of the columns are not all different: a, b, b"),
        ("a,b,c\n" + ",,\n" * 20, "no column is left to be modelled: a: all of"),
        ("a,d\n" + "1.5,2020-01-02\n" * 9 + "1.5,03/04/2021\n",
         "row 11, column 2 (d): expected a date of the form %Y-%m-%d, as 90% of the column are; got '03/04/2021'"),
        ("a;b;c\n" + GOOD.replace(",", ";"), "are the cells separated by semicolons? --data.delimiter ';'"),
        ("a\tb\tc\n" + GOOD.replace(",", "\t"), "are the cells separated by tabs? --data.delimiter tab"),
        ("a|b|c\n" + GOOD.replace(",", "|"), "are the cells separated by |? --data.delimiter '|'"),
        ("a,b\n" + "".join(f"{i % 7}.5,c{i % 1500}\n" for i in range(6000)), "1,500 categories, more than 1,000"),
        ('a,b,c\n' + GOOD + '1,"red\n', "a quote is not closed"),
        ("a,b\n" + f"{2**60 + 1},red\n" * 9, "a whole number beyond 2^53"),
        ("a,b\n" + "".join(f"{i / 7 if i % 4 == 0 else '-'},red\n" for i in range(200)),
         "row 3, column 1 (a): expected a number; got '-'; if it is a name and no number, say --data.types a=category; "
         "if it stands for nothing, leave the cell empty"),
        ("a,b\n" + "".join(f'"{i + 1},234.50",red\n' for i in range(40)), "write numbers without marks between"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_clear_is_refused_with_its_place(tmp_path, refused, text, problem):
    (tmp_path / "a.csv").write_text(text)
    refused(f"csv:{tmp_path}/a.csv", f"{tmp_path}/a.csv", problem)


@pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")
def test_marks_byte_order_marks_and_words_for_nothing_are_read(tmp_path):
    text = "\ufeffa;b;empty\r\n" + "".join(f"{i},5;{'x' if i % 2 else 'NA'};\r\n" for i in range(20)) + "n/a;y;\r\n"
    (tmp_path / "a.csv").write_bytes(text.encode())
    data = load_data(f"csv:{tmp_path}/a.csv", delimiter=";", decimal=",")
    assert kinds(data) == {"a": "number", "b": "category"}
    assert data.schema.left_out == (("empty", "all of its cells are empty"),)
    assert all(column.missing for column in data.schema.columns)
    assert data.schema.columns[0].high in (18.5, 19.5)
    rows = read_rows(tmp_path / "a.csv", delimiter=";")
    assert list(rows.columns) == ["a", "b", "empty"]
    assert rows.index[0] == 2


def test_a_table_without_a_header_has_numbered_columns(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD)
    data = load_data(f"csv:{tmp_path}/a.csv")
    assert kinds(data) == {"1": "number", "2": "category", "3": "integer"}
    assert data.scaling.names is None


def test_other_tables_are_read_by_the_schema_or_refused_by_name(tmp_path):
    frame = with_gaps(people())
    schema = load(tmp_path, frame.assign(smokes=people()["smokes"])).schema
    x = schema.encode(frame.assign(smokes=people()["smokes"])[frame.columns[::-1]])
    assert x.shape == (N, 6)
    for other, problem in (
        (people().drop(columns="city"), "has no column city; it has: person_id, height"),
        (people().assign(extra=1), "has the columns extra, which are none of height, children"),
        (
            people().replace({"Rome": "Lima"}),
            r"column 4 \(city\): one of the categories Bonn, Oslo, east, Rome.*'Lima'",
        ),
        (people().assign(height="tall"), r"row 0, column 2 \(height\): expected a number; got 'tall'"),
        (people().assign(children=1.5), r"\(children\): expected a whole number; got '1.5'"),
        (people().assign(born="tomorrow"), r"\(born\): expected a date of the form %Y-%m-%d; got 'tomorrow'"),
        (people().assign(smokes=None), r"\(smokes\): the cell is empty, and none of the training data's was"),
    ):
        with pytest.raises(DataError, match=problem):
            schema.encode(other, "the table")


def test_a_folder_of_splits_is_read_by_the_training_splits_schema(tmp_path, refused):
    frame = people(100)[["height", "city", "married"]]
    frame[:60].to_csv(tmp_path / "train.csv", index=False)
    frame[60:][["married", "height", "city"]].to_csv(tmp_path / "test.csv", index=False)
    data = load_data(f"csv:{tmp_path}")
    back = data.schema.decode(data.splits["test"].x)
    assert back["city"].tolist() == frame["city"][60:].tolist()
    frame[60:].replace({"Rome": "Lima"}).to_csv(tmp_path / "test.csv", index=False)
    refused(f"csv:{tmp_path}", "test.csv, row", "(city)", "got 'Lima'")


def test_columns_of_any_kind_can_be_given(tmp_path):
    whole = people()[["smokes", "city"]]
    data = load(tmp_path, with_gaps(people()).assign(**whole), condition="smokes,city")
    assert list(kinds(data)) == ["height", "children", "married", "born"]
    assert data.condition == 2 + 3
    assert set(data.splits["train"].y.unique().tolist()) == {-1, 1}
    assert data.condition_schema.names == ("smokes", "city")


def test_quantiles_lead_heavy_tails_to_a_gaussian(tmp_path):
    from genfuse.nn import Columns

    frame = people(3000)[["city"]].assign(income=np.exp(3 * np.random.default_rng(0).normal(size=3000)))
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = load_data(f"csv:{tmp_path}/a.csv")
    v = Columns(data.columns).encode(data.splits["train"].x)[:, 0]
    assert float(v.mean()) == pytest.approx(0, abs=0.05)
    assert float(v.std()) == pytest.approx(1, abs=0.05)
    assert float((v.double() ** 4).mean()) == pytest.approx(3, abs=0.4)
    assert math.isfinite(float(v.max()))


def test_a_dataframe_is_read_as_its_file(tmp_path):
    frame = with_gaps(people())
    of_file = load(tmp_path, frame)
    with pytest.warns(DataWarning, match="left out"):
        given = load_data(frame)
    assert given.schema == of_file.schema
    assert given.fingerprint() == of_file.fingerprint()
    parts = {"train": frame[:40][["height", "city"]], "test": frame[40:][["city", "height"]]}
    assert [len(split) for split in load_data(parts).splits.values()] == [40, 20]
    with pytest.warns(DataWarning, match="left out"):
        assert load_data((frame, np.arange(N) % 2)).classes == 2
    assert kinds(load_data(people()[["height", "children"]], types={"children": "category"}))["children"] == "category"
