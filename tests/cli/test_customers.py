"""The way of a customer table through the commands: describe, train, sample, evaluate."""

import json
import re
import shlex
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from genfuse.cli import main
from genfuse.errors import DataWarning
from genfuse.training import Run

pytestmark = pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")
QUICK = ["--steps", "60", "--no-pictures", "--device", "cpu", "--model.hidden", "32"]


@pytest.fixture(scope="module")
def customers(tmp_path_factory):
    r = np.random.default_rng(0)
    n = 400
    plan = r.choice(["basic", "plus"], n)
    frame = pd.DataFrame({
        "customer_id": np.arange(n) + 5000,
        "age": r.integers(18, 90, n),
        "income": np.exp(r.normal(10, 1, n)).round(2),
        "plan": plan,
        "joined": (pd.Timestamp("2020-01-01") + pd.to_timedelta(r.integers(0, 999, n), "D")).strftime("%d.%m.%Y"),
        "churned": r.integers(0, 2, n) * (plan == "plus"),
    })  # fmt: skip
    gone = r.random(frame.shape) < 0.05
    gone[:, [0, 3, 5]] = False
    path = tmp_path_factory.mktemp("data") / "customers.csv"
    frame.mask(gone).astype({"churned": int}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(customers, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "vae"
    assert main(["train", "vae", "--data", f"csv:{customers}", "--out", str(out), *QUICK]) == 0
    return out


def test_a_file_is_described(capsys, customers):
    assert main(["data", "describe", str(customers), "--types", "age=category", "--drop", "income"]) == 0
    said = capsys.readouterr()
    assert "left out" not in said.err
    lines = [line.split() for line in said.out.splitlines() if line.strip()]
    assert [line[:2] for line in lines[3:]][:1] == [["age", "category"]]
    for words in (["plan", "category", "2:", "basic,", "plus"], ["churned", "boolean", "0,", "1"]):
        assert words in [line[: len(words)] for line in lines]
    assert "by --data.drop" in said.out
    assert "numbers the rows" in said.out
    assert "train 320, test 80 rows" in said.out


def test_what_an_error_advises_can_be_typed(capsys, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a b;c d\n" + "".join(f"1,{i};{i % 5}-{i}\n" for i in range(40)))
    assert main(["data", "describe", str(file)]) == 2
    [advice] = re.findall(r"--data\.delimiter ';'", capsys.readouterr().err)
    marks = [*shlex.split(advice), "--data.decimal", ","]
    assert main(["data", "describe", f"csv:{file}", *marks, "--data.types", "c d=category"]) == 0
    assert main(["data", "describe", str(file), *marks]) == 0


def test_what_is_left_out_is_said_where_only_numbers_are_left(capsys, tmp_path):
    frame = pd.DataFrame({"id": np.arange(40), "size": np.random.default_rng(0).normal(size=40), "none": ""})
    frame.to_csv(tmp_path / "a.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["data", "describe", str(tmp_path / "a.csv")]) == 0
    said = capsys.readouterr().err
    assert "the column id is left out: it numbers the rows" in said
    assert "the column none is left out: all of its cells are empty" in said


def test_a_file_of_numbers_alone_is_described(capsys, tmp_path):
    np.savetxt(tmp_path / "a.csv", np.random.default_rng(0).normal(size=(20, 2)), delimiter=",")
    assert main(["data", "describe", str(tmp_path / "a.csv")]) == 0
    assert capsys.readouterr().out.count(" number ") == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("digits", ["train 1,500, test 297 examples of shape (1, 8, 8), 17 levels", "10 classes", "mean 0.305"]),
        ("toy:moons", ["examples of shape (2,), real-valued", "2 classes"]),
        ("sprites", ["(1, 32, 32), 2 levels", "factor scale: 4 values, 0.5 to 1"]),
        ("x.npy", ["npy:x.npy: train 24, test 6 rows", "number"]),
        ("npy:x.npy", ["npy:x.npy: train 24, test 6 rows", "number"]),
        ("images:x.npz", ["train 24, test 6 examples of shape (1, 6, 5), 256 levels"]),
        ("rows", ["csv:rows: train 30, test 30 rows"]),
    ],
)
def test_data_of_every_kind_is_described(capsys, tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0).normal(size=(30, 2))
    np.save("x.npy", numbers)
    np.savez("x.npz", np.random.default_rng(0).integers(0, 256, (30, 6, 5), dtype=np.uint8))
    (tmp_path / "rows").mkdir()
    for part in ("train", "test"):
        np.savetxt(tmp_path / "rows" / f"{part}.csv", numbers, delimiter=",")
    assert main(["data", "describe", data]) == 0
    said = capsys.readouterr()
    assert not said.err
    for word in words:
        assert word in said.out


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digtis", "there is no data set 'digtis'.* did you mean digits?"),
        ("nowhere.csv", "data set 'csv:nowhere.csv': there is no file or folder"),
        ("", "there is no data set ''"),
        ("images:", "the path is missing; write images:PATH"),
        ("toy", "write one of toy:moons"),
        (".", "the folder . holds no picture"),
    ],
)
def test_data_that_is_not_there_is_an_error_that_says_what_to_write(capsys, tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "describe", data]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_of_pictures_is_described_whatever_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    turn = Image.Exif()
    turn[0x0112] = 6
    for i in range(4):
        Image.fromarray(noise).save(folder / f"{i}.jpg", exif=turn if i == 3 else Image.Exif())
        Image.fromarray(noise[: 20 + i, :, 0]).save(folder / f"{i}.png")
    (folder / "00.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("holiday")
    assert main(["data", "describe", "./photos"]) == 0  # photos alone is a data set of that name
    assert "photos: 8 pictures" in capsys.readouterr().out
    assert main(["data", "describe", "images:photos"]) == 0
    said = capsys.readouterr()
    assert "photos: 8 pictures" in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["L", "PNG", "4", "4", "sizes,", "30", "to", "30", "x", "20", "to", "23"] in rows
    assert ["RGB", "JPEG", "4", "2", "sizes,", "30", "to", "40", "x", "30", "to", "40"] in rows
    assert "1 of the pictures is turned as EXIF data says, such as photos/3.jpg" in said.out
    assert "1 other file is not read, such as photos/notes.txt" in said.out
    assert said.out.count("photos/00.png") == 1
    assert said.out.endswith("to train on them: --data.size 64 --data.mode auto --data.damaged skip\n"), "all at once"
    assert main(["train", "vae", "--data", "images:photos", "--out", "run"]) == 2
    assert "`genfuse data describe images:photos` says what all of them need" in capsys.readouterr().err
    assert main(["data", "describe", "images:photos", "--size", "8"]) == 0
    assert capsys.readouterr().out.endswith("to train on them: --data.mode auto --data.damaged skip\n")
    read = ["--data.size", "8", "--mode", "auto", "--damaged", "skip"]
    assert main(["data", "describe", "images:photos", *read]) == 0
    said = capsys.readouterr()
    assert "train 7, test 1 examples of shape (3, 8, 8), 256 levels" in said.out
    assert not said.err, "what was said is not said again"


def test_a_training_says_what_it_takes_the_columns_for(capsys, customers, tmp_path):
    args = ["--data.types", "age=number", "--data.drop", "joined", "--steps", "2"]
    assert main(["train", "nsf", "--data", f"csv:{customers}", "--out", str(tmp_path / "r"), *QUICK, *args]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["age", "number"] in [line[:2] for line in lines]
    assert ["customer_id", "left"] in [line[:2] for line in lines]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["data"]["options"] == {"types": "age=number", "drop": "joined"}
    assert main(["train", "--resume", str(tmp_path / "r"), "--steps", "4"]) == 0


def test_rows_are_written_as_the_table_has_them(run, customers, tmp_path):
    assert main(["sample", str(run), "--n", "50", "--out", str(tmp_path / "rows.csv")]) == 0
    rows = pd.read_csv(tmp_path / "rows.csv", dtype=str)
    assert list(rows) == ["age", "income", "plan", "joined", "churned"]
    assert len(rows) == 50
    assert rows["age"].dropna().str.fullmatch(r"\d+").all()
    assert rows["income"].dropna().str.fullmatch(r"\d+\.\d{1,2}").all()
    assert set(rows["plan"]) <= {"basic", "plus"}
    assert set(rows["churned"]) <= {"0", "1"}
    assert rows["joined"].dropna().str.fullmatch(r"\d\d\.\d\d\.20\d\d").all()


def test_rows_of_numbers_are_written_in_original_units(tmp_path):
    rows = np.random.default_rng(0).normal([170, 7e4], [10, 9e3], (200, 2))
    gaussian = ["--model.decoder", "gaussian"]
    for header in ("height,mass", ""):
        np.savetxt(tmp_path / "a.csv", rows, delimiter=",", header=header, comments="")
        out = tmp_path / f"run{header}"
        assert main(["train", "vae", "--data", f"csv:{tmp_path}/a.csv", "--out", str(out), *QUICK, *gaussian]) == 0
        assert main(["sample", str(out), "--n", "300", "--out", str(out) + ".csv"]) == 0
        drawn = pd.read_csv(str(out) + ".csv", header=0 if header else None)
        assert list(drawn) == (["height", "mass"] if header else [0, 1])
        assert np.allclose(drawn.mean(), rows.mean(0), rtol=0.1)


def test_rows_are_drawn_until_they_are_as_asked(run, tmp_path, capsys):
    rule = "plan=plus, age>=40.5, income<1e5, age!=50, churned = no, joined>01.01.2003"
    assert main(["sample", str(run), "--n", "30", "--where", rule, "--out", str(tmp_path / "rows.csv")]) == 0
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert len(rows) == 30
    assert (rows.plan == "plus").all()
    assert (rows.age >= 40).all()
    assert (rows.income < 1e5).all()
    assert (rows.age != 50).all()
    assert (rows.churned == 0).all()
    assert (pd.to_datetime(rows.joined, format="%d.%m.%Y") > pd.Timestamp(2003, 1, 1)).all()  # by time, not by text


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("age>200", "age>200: 0 of 2,048 rows drawn are so (0.00%), and --n asks for 64"),
        ("ages=3", "the table has no column ages; it has: age, income, plan, joined, churned"),
        ("plan", "must be COLUMN=VALUE, or by !=, <, <=, >, >="),
        ("age=old", "age is a column of numbers; got 'old'"),
        ("plan=gold", "the column plan is a category, one of basic, plus; got 'gold'"),
        ("churned=perhaps", "the column churned is a boolean, one of 0, 1; got 'perhaps'"),
        ("joined<soon", "the column joined is a date, of the form %d.%m.%Y; got 'soon'"),
    ],
)
def test_rows_that_cannot_be_had_are_refused(run, tmp_path, capsys, monkeypatch, rule, problem):
    monkeypatch.setattr("genfuse.cli._sample.TRIES", 2000)
    assert main(["sample", str(run), "--where", rule, "--out", str(tmp_path / "rows.csv")]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "rows.csv").exists()


def test_what_a_model_is_given_need_not_be_searched_for(customers, tmp_path, capsys):
    args = ["--data.condition", "churned,plan", "--out", str(tmp_path / "r")]
    assert main(["train", "wgan-gp", "--data", f"csv:{customers}", *QUICK, *args]) == 0
    out = tmp_path / "rows.csv"
    assert main(["sample", str(tmp_path / "r"), "--n", "9", "--where", "churned=1,plan=plus", "--out", str(out)]) == 0
    rows = pd.read_csv(out)
    assert list(rows) == ["age", "income", "joined", "churned", "plan"]
    assert (rows.churned == 1).all()
    assert (rows.plan == "plus").all()
    again = ["sample", str(tmp_path / "r"), "--n", "9", "--out", str(out), "--overwrite"]
    assert main([*again, "--condition", "churned=1,plan=gold"]) == 2
    assert "one of the categories basic, plus" in capsys.readouterr().err
    assert main([*again, "--where", "churned>0"]) == 2
    assert "are given to the model, by =" in capsys.readouterr().err
    assert main([*again, "--where", "churned=1"]) == 2
    assert "--condition must be churned=VALUE,plan=VALUE" in capsys.readouterr().err
    assert main(again) == 0


def test_a_table_is_evaluated_and_compared(run, customers, tmp_path, capsys):
    assert main(["evaluate", str(run), "--samples", "2", "--n", "80"]) == 0
    found = json.loads((run / "evaluation.json").read_text())["samples"]
    names = {"marginal_wasserstein", "marginal_total_variation", "correlation_difference", "detection_auroc",
             "synthetic_auroc"}  # fmt: skip
    assert names <= found["samples"].keys() & found["real"].keys()


def test_rows_of_another_file_are_scored_and_reconstructed(run, customers, tmp_path, capsys):
    frame = pd.read_csv(customers, dtype=str)
    frame.loc[3, ["age", "plan"]] = ["90", "plus"]
    shuffled = frame.assign(odd=(np.arange(len(frame)) == 3).astype(int))[[*frame.columns[::-1], "odd"]]
    shuffled.to_csv(tmp_path / "new.csv", index=False)
    args = [str(tmp_path / "new.csv"), "--out", str(tmp_path / "out.csv"), "--overwrite"]
    assert main(["score", str(run), *args, "--explain", "3", "--samples", "2"]) == 0
    scores = pd.read_csv(tmp_path / "out.csv")
    assert len(scores) == len(frame)
    assert np.isfinite(scores["score"]).all()
    assert set(scores["column_1"].dropna()) <= {"age", "income", "plan", "joined", "churned"}
    assert main(["reconstruct", str(run), *args]) == 0
    assert list(pd.read_csv(tmp_path / "out.csv")) == ["age", "income", "plan", "joined", "churned"]
    frame.assign(plan="gold").to_csv(tmp_path / "new.csv", index=False)
    assert main(["score", str(run), *args]) == 2
    assert "new.csv, row 2, column 4 (plan): one of the categories basic, plus" in capsys.readouterr().err
    frame.drop(columns="age").to_csv(tmp_path / "new.csv", index=False)
    assert main(["score", str(run), *args]) == 2
    assert "has no column age" in capsys.readouterr().err


def test_a_start_from_a_run_of_other_categories_says_which_columns_are_others(capsys, customers, run, tmp_path):
    pd.read_csv(customers).assign(plan=lambda frame: frame.plan.where(frame.age < 50, "gold")).to_csv(
        tmp_path / "a.csv", index=False
    )
    args = [
        "train",
        "--from",
        str(run),
        "--data",
        f"csv:{tmp_path / 'a.csv'}",
        "--out",
        str(tmp_path / "r"),
        "--steps",
        "1",
    ]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert "do not fit this VAE: model columns: plan was category of 2 choices, now category of 3 choices" in error
    assert len(error) < 400


def test_a_run_does_not_tell_again_what_its_training_told(run, recwarn):
    warnings.simplefilter("always")
    Run(run).data()
    assert not [each for each in recwarn if issubclass(each.category, DataWarning)]
