import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy import stats

from genfuse import plugins
from genfuse.data import Dataset, Scaling, Source, Split, load_data
from genfuse.errors import DataError, PluginError


def ramp(rows: int = 6, levels: int = 17) -> Split:
    return Split((torch.arange(rows * 4) % levels).to(torch.uint8).view(rows, 1, 2, 2), torch.arange(rows) % 3)


def dataset(**changes) -> Dataset:
    return Dataset(**{"name": "ramp", "splits": {"train": ramp(), "test": ramp(2)}, "levels": 17, **changes})


def test_batches_of_discrete_data_are_k_over_levels_minus_1():
    x, y = dataset().batch("train", torch.tensor([4, 1]))
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == pytest.approx([16 / 16, 0 / 16, 1 / 16, 2 / 16, 4 / 16, 5 / 16, 6 / 16, 7 / 16])
    assert y.tolist() == [1, 1]


@pytest.mark.parametrize("index", [slice(1, 4), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32)])
def test_a_batch_takes_a_slice_or_indices(index):
    data = dataset()
    x, y = data.batch("train", index)
    assert torch.equal(x, data.splits["train"].x[1:4].float() / 16)
    assert y.tolist() == [1, 2, 0]


def test_batches_of_real_valued_data_are_the_values():
    x = torch.randn(5, 3)
    data = dataset(splits={"train": Split(x), "test": Split(x[:2])}, levels=None)
    batch = data.batch("train", torch.tensor([3, 0]))
    assert torch.equal(batch.x, x[[3, 0]])
    assert batch.y is None


def test_transposed_arrays_are_stored_in_rows():
    assert Split(torch.randn(4, 9).T).x.is_contiguous()


def test_shape_and_kind():
    assert dataset().shape == (1, 2, 2)
    assert dataset().is_image
    table = dataset(splits={part: Split(torch.zeros(2, 3)) for part in ("train", "test")}, levels=None)
    assert table.shape == (3,)
    assert not table.is_image
    assert "train 6, test 2; shape (1, 2, 2), 17 levels, classes 3" in repr(dataset())


def test_classes_come_from_the_labels_of_all_splits():
    assert dataset().classes == 3
    splits = {"train": ramp(), "test": Split(ramp(2).x, torch.tensor([0, 7]))}
    assert dataset(splits=splits).classes == 8
    assert dataset(splits={"train": Split(ramp().x), "test": Split(ramp().x)}).classes is None


def test_moving_keeps_everything_else():
    moved = dataset().to("cpu")
    assert moved.fingerprint() == dataset().fingerprint()
    assert (moved.classes, moved.levels, moved.name) == (3, 17, "ramp")


def grey(levels: int, rows: int) -> Dataset:
    """Each intensity once per row."""
    x = torch.arange(levels, dtype=torch.uint8).view(1, 1, 1, levels).expand(rows, 1, 1, levels)
    return dataset(splits={"train": Split(x), "test": Split(x[:1])}, levels=levels)


@pytest.mark.parametrize("levels", [3, 17, 256])
@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_binarized_cells_are_bernoulli_of_their_intensity(levels, how):
    rows = 20_000
    data = grey(levels, rows).binarized(how, seed=3)
    ones = data.batch("train", slice(None), torch.Generator().manual_seed(0)).x.sum(0).flatten()
    assert (data.levels, data.binarize) == (2, how)
    assert ones[0] == 0
    assert ones[-1] == rows
    p_values = [stats.binomtest(int(n), rows, k / (levels - 1)).pvalue for k, n in enumerate(ones)][1:-1]
    assert min(p_values) > 1e-3 / levels  # Bonferroni
    assert len(p_values) < 20 or stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_dynamic_binarization_draws_anew_and_by_the_generator():
    data = grey(256, 8).binarized("dynamic")
    first, second = (data.batch("train", slice(None)).x for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    by_global = data.batch("train", slice(None)).x
    by_generator = data.batch("train", torch.arange(8), torch.Generator().manual_seed(5)).x
    assert torch.equal(by_global, by_generator)


def test_static_binarization_is_drawn_once_by_the_seed():
    data = grey(256, 3000).binarized("static", seed=1)
    assert data.splits["train"].x.dtype == torch.uint8
    assert torch.equal(data.batch("train", slice(None)).x, data.batch("train", slice(None)).x)
    assert torch.equal(data.splits["train"].x, grey(256, 3000).binarized("static", seed=1).splits["train"].x)
    assert not torch.equal(data.splits["train"].x, grey(256, 3000).binarized("static", seed=2).splits["train"].x)
    assert not torch.equal(data.splits["train"].x[:1024], data.splits["train"].x[1024:2048])


def test_binary_data_stays_as_it_is_however_it_is_binarized():
    data = grey(2, 4)
    assert data.binarized("dynamic") is data
    assert data.binarized("static") is data


def test_real_valued_data_cannot_be_binarized(refused):
    refused("toy:moons", "'toy:moons'", "cannot be binarized", binarize="static")
    refused("toy:moons", "cannot be binarized", binarize="dynamic")


def test_an_unknown_way_to_binarize_is_refused(refused):
    refused("digits", "none, static, dynamic", "'sometimes'", binarize="sometimes")


def test_the_fingerprint_stands_for_content_levels_and_binarization():
    prints = {
        data.fingerprint()
        for data in (
            dataset(),
            dataset(levels=18),
            dataset().binarized("dynamic"),
            dataset().binarized("static", seed=0),
            dataset().binarized("static", seed=1),
            dataset(splits={"train": ramp(5), "test": ramp(2)}),
            dataset(splits={"train": Split(ramp().x), "test": ramp(2)}),
            dataset(splits={"train": Split(ramp().x.view(6, 1, 4, 1)), "test": Split(ramp().x.view(6, 1, 4, 1))}),
        )
    }
    assert len(prints) == 8
    assert dataset().fingerprint() == dataset(name="other").fingerprint()


def test_scaling_survives_json_and_returns_to_original_units():
    scaling = Scaling((1e9, -3.0), (2.0, 0.5), ("a", "b"))
    assert Scaling(**json.loads(json.dumps(dataclasses.asdict(scaling)))) == scaling
    x = torch.tensor([[1e9 + 3, -4.0], [1e9 - 1, 0.0]], dtype=torch.float64)
    assert torch.equal(scaling.apply(x), torch.tensor([[1.5, -2.0], [-0.5, 6.0]]))
    assert torch.equal(scaling.restore(scaling.apply(x)), x)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"splits": {"test": ramp()}}, "no train split"),
        ({"splits": {"train": ramp()}}, "no test split"),
        ({"splits": {}}, "no train and no test split"),
        ({"levels": None}, "must be a tensor of torch.float32, as levels=None; got torch.uint8"),
        ({"levels": 1}, "levels must be 2..256"),
        ({"levels": 16}, "has the value 16, but levels=16 ends at 15"),
        ({"binarize": "dynamic"}, "needs stored_levels"),
        ({"stored_levels": 17}, "needs stored_levels"),
        ({"classes": 2}, "labels of the train split are 0..2"),
        ({"splits": {"train": ramp(), "test": Split(ramp().x.view(6, 1, 4, 1))}}, "shape (1, 4, 1), those of train"),
        ({"splits": {"train": ramp(), "test": Split(ramp().x[:0])}}, "not empty; got (0, 1, 2, 2)"),
        ({"splits": {"train": ramp(), "test": Split(ramp().x.float())}}, "got torch.float32"),
        ({"splits": {"train": ramp(), "test": Split(ramp().x.numpy())}}, "got uint8"),
        ({"splits": {"train": ramp(), "test": Split(ramp().x, torch.zeros(6))}}, "int64 tensor of shape (6,); got"),
        ({"splits": {"train": ramp(), "test": Split(ramp().x, torch.zeros(5).long())}}, "got torch.int64 (5,)"),
        (
            {"splits": {"train": ramp(), "test": Split(ramp().x, torch.arange(-1, 5))}},
            "the test split are -1..4",
        ),
        ({"splits": {"train": Split(torch.tensor([[1.0], [torch.nan]])), "test": ramp()}, "levels": None}, "has 1 NaN"),
    ],
)
def test_a_data_set_that_breaks_the_contract_is_refused(changes, problem):
    with pytest.raises(DataError) as caught:
        dataset(**changes)
    assert "data set 'ramp'" in str(caught.value)
    assert problem in str(caught.value)


PLUGIN = """
import torch
from genfuse.data import Dataset, Split
def ones(source):
    global got
    got = source
    x = torch.ones(4, 2)
    return Dataset("another name", {"train": Split(x), "test": Split(x)})
def nothing(source): pass
def ints(source): return Dataset("x", {"train": Split(torch.ones(4, 2).int())})
def boom(source): raise ZeroDivisionError("boom")
def no_train(source): return Dataset("x", {"test": Split(torch.ones(4, 2))})
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """install(distribution, name, function) registers a function of PLUGIN as a data set of a third party."""
    (tmp_path / "acme_data.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    registered = list(plugins.discover("datasets"))

    def install(distribution: str, name: str, function: str) -> None:
        registered.append(plugins.Plugin("datasets", name, distribution, "1.0", f"acme_data:{function}"))
        monkeypatch.setattr(plugins, "discover", lambda kind: tuple(registered))

    yield install
    sys.modules.pop("acme_data", None)


def test_a_plugin_gets_its_source_and_its_data_goes_by_the_typed_name(install, tmp_path):
    install("acme", "ones", "ones")
    data = load_data("ones:with:colons", root=tmp_path, seed=7)
    assert data.name == "ones:with:colons"
    assert sys.modules["acme_data"].got == Source("ones:with:colons", "with:colons", tmp_path, 7)
    load_data("ones")
    assert sys.modules["acme_data"].got.argument is None


def test_the_root_is_the_environments_unless_given(install, tmp_path, monkeypatch):
    install("acme", "ones", "ones")
    monkeypatch.setenv("GENFUSE_DATA", "/elsewhere")
    for root, expected in ((None, Path("/elsewhere")), (tmp_path, tmp_path), ("~", Path.home())):
        load_data("ones", root=root)
        assert sys.modules["acme_data"].got.root == expected
    monkeypatch.delenv("GENFUSE_DATA")
    load_data("ones")
    assert sys.modules["acme_data"].got.root is None


def test_a_name_claimed_twice_is_told_apart_by_its_distribution(install):
    install("acme", "ones", "ones")
    install("other", "ones", "nothing")
    with pytest.raises(PluginError, match="acme:ones or other:ones"):
        load_data("ones")
    load_data("acme:ones")
    assert sys.modules["acme_data"].got.argument is None
    load_data("acme:ones:a:b")
    assert sys.modules["acme_data"].got.argument == "a:b"


@pytest.mark.parametrize("name", ["nonsense", "nonsense:x", ""])
def test_an_unknown_data_set_is_refused_with_the_known_ones(name):
    with pytest.raises(PluginError, match=r"known: .*digits"):
        load_data(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.csv", "csv:rows.csv"),
        ("x.NPY", "npy:x.NPY"),
        ("photo.png", "images:photo.png"),
        ("photos.d", "images:photos.d"),
    ],
)
def test_a_file_that_is_named_without_its_kind_is_told_how(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir() if name.endswith(".d") else (tmp_path / name).touch()
    with pytest.raises(PluginError, match=f"say {said}$"):
        load_data(name)


@pytest.mark.parametrize(
    ("function", "kind", "problem"),
    [
        ("nothing", PluginError, "must return a genfuse.data.Dataset; it returned NoneType"),
        ("boom", PluginError, "failed: ZeroDivisionError: boom"),
        ("no_train", DataError, "no train split"),
        ("ints", DataError, "no test split"),
    ],
)
def test_a_plugin_at_fault_is_named(install, function, kind, problem):
    install("acme", "bad", function)
    with pytest.raises(kind) as caught:
        load_data("bad")
    assert "'bad' from acme 1.0" in str(caught.value)
    assert problem in str(caught.value)


def test_too_few_rows_to_hold_any_out():
    with pytest.raises(DataError, match="4 rows are too few"):
        Source("x").hold_out(4)
    rows = Source("x", seed=1).hold_out(5)
    assert (len(rows["train"]), len(rows["test"])) == (4, 1)
    assert sorted(torch.cat(list(rows.values())).tolist()) == [0, 1, 2, 3, 4]
