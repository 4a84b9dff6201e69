"""Columns of a table that are given, and not modelled."""

import numpy as np
import pytest
import torch

import genfuse
from genfuse.errors import DataError, SettingsError

TABLE = np.random.default_rng(0).normal((0, 5, -3), (1, 2, 0.5), (200, 3))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    np.savetxt(path, TABLE, delimiter=",", header="a,b,c", comments="")
    return f"csv:{path}"


def test_given_columns_are_the_context_and_the_others_are_modelled(table):
    whole, data = genfuse.load_data(table), genfuse.load_data(table, condition="c,a")
    assert (data.shape, data.condition, data.classes) == ((1,), 2, None)
    for part, split in data.splits.items():
        assert torch.equal(split.x, whole.splits[part].x[:, [1]])
        assert torch.equal(split.y, whole.splits[part].x[:, [2, 0]])
    batch = data.batch("train", slice(0, 4))
    assert (batch.x.shape, batch.y.shape, batch.y.dtype) == ((4, 1), (4, 2), torch.float32)
    assert (data.scaling.names, data.condition_scaling.names) == (("b",), ("c", "a"))
    restored = data.condition_scaling.restore(data.splits["test"].y)
    assert restored.mean(0).tolist() == pytest.approx([-3, 0], abs=0.3)
    assert data.options == {"condition": "c,a"}
    assert data.fingerprint() != whole.fingerprint()


def test_columns_without_names_are_called_by_number(tmp_path):
    np.save(tmp_path / "t.npy", TABLE)
    whole = genfuse.load_data(f"npy:{tmp_path / 't.npy'}")
    data = genfuse.load_data(f"npy:{tmp_path / 't.npy'}", condition=["2"])
    assert torch.equal(data.splits["train"].y, whole.splits["train"].x[:, [1]])


def test_names_with_commas_spaces_and_equals_signs_are_found_again(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('"x=1,y",b c,k=1,z\n' + "\n".join(",".join(map(str, row)) for row in np.random.rand(50, 4)) + "\n")
    data = genfuse.load_data(f"csv:{path}", condition=["x=1,y", "b c"])
    assert data.condition_scaling.names == ("x=1,y", "b c")
    again = genfuse.load_data(f"csv:{path}", **data.options)
    assert again.fingerprint() == data.fingerprint()
    assert genfuse.load_data(f"csv:{path}", condition='"x=1,y", b c').fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("d", "'d' is none of a, b, c"),
        ("1", "'1' is none of a, b, c"),
        ("a,a", "each column can be given once"),
        ("a,b,c", "at least one must be left"),
    ],
)
def test_columns_that_cannot_be_given_are_refused(table, condition, problem):
    with pytest.raises(DataError, match=problem):
        genfuse.load_data(table, condition=condition)


def test_data_without_columns_or_with_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="only columns of a table of real numbers"):
        genfuse.load_data("digits", condition="1")
    np.savez(tmp_path / "t.npz", x=TABLE, y=np.arange(200) % 2)
    with pytest.raises(DataError, match="labels, or a condition, already"):
        genfuse.load_data(f"npz:{tmp_path / 't.npz'}", condition="1")


def test_models_and_data_agree_on_the_condition(table):
    whole, data = genfuse.load_data(table), genfuse.load_data(table, condition="a")
    model = genfuse.create("maf", data)
    assert model.config.condition == 1
    assert model.conditional
    with pytest.raises(SettingsError, match="gives 0 numbers with each example, and the model was made for 1"):
        genfuse.create("maf", whole, condition=1).check_data(whole)
    with pytest.raises(SettingsError, match=r"give a context y, \(4, 1\)"):
        model.log_prob(torch.zeros(4, 2))
    for wrong in (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), torch.zeros(3, 1)):
        with pytest.raises(DataError, match="context"):
            model.log_prob(torch.zeros(4, 2), wrong)
    one = model.sample(5, y=[0.5], generator=torch.Generator().manual_seed(0))  # one row for all
    assert torch.equal(one, model.sample(5, y=torch.full((5, 1), 0.5), generator=torch.Generator().manual_seed(0)))
