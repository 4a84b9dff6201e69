import hashlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import genfuse
from genfuse import ops
from genfuse.applications import Exact, compress, decompress
from genfuse.applications._coder import (
    COARSE,
    COARSE_STEP,
    CURVES,
    FINE,
    GRID,
    OFF,
    STEP,
    TOP,
    Coder,
    distribution,
    padding,
    places,
    probit,
)
from genfuse.applications._compress import HEAD, SEAL
from genfuse.cli import main
from genfuse.errors import DataError, RunError, SettingsError

pytestmark = pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")
GREY = {"model": "vae", "data": "digits", "decoder": "discretized-logistic", "latent_dim": 4, "hidden": (32,)}
MODELS = {
    "grey": GREY,
    "mixture": {**GREY, "mixtures": 3},
    "categorical": {**GREY, "decoder": "categorical"},
    "convolutions": {**GREY, "network": "conv", "channels": (4, 8)},
    "binary": {"model": "vae", "data": "digits", "binarize": "static", "latent_dim": 4, "hidden": (32,)},
    "idf": {"model": "idf", "data": "digits", "channels": (8,), "steps": 30},
    "realnvp": {"model": "realnvp", "data": "digits", "layers": 3, "hidden": (32,), "steps": 40},
    "realnvp of halves": {"model": "realnvp", "data": "digits", "linear": False, "hidden": (32,), "steps": 40},
    "realnvp of images": {"model": "realnvp", "data": "digits", "network": "conv", "channels": (8,), "steps": 20},
    "glow": {"model": "glow", "data": "digits", "channels": (8,), "scales": 2, "steps": 20},
    "nsf": {"model": "nsf", "data": "digits", "logit": 0.05, "layers": 2, "hidden": (32,), "steps": 40},
    "idf of vectors": {"model": "idf", "data": "digits", "scales": 0, "couplings": 3, "hidden": (16,), "steps": 30},
}


@pytest.fixture(scope="session")
def visits(tmp_path_factory):
    """A table of integers, words and booleans, with words missing."""
    draw = np.random.default_rng(0)
    age = draw.integers(18, 90, 400)
    plan = np.where(draw.random(400) < 0.1, None, draw.choice(["basic", "plus", "none at all"], 400))
    frame = pd.DataFrame({"age": age, "visits": age // 10 + draw.integers(0, 3, 400), "plan": plan,
                          "member": draw.random(400) < 0.5, "year": 2020})  # fmt: skip
    path = tmp_path_factory.mktemp("visits") / "visits.csv"
    frame.to_csv(path, index=False)
    return path


def levels(name, count=None):
    x = genfuse.load_data("digits").splits["test"].x[:count].numpy()
    return (x > 8).astype(np.uint8) if name == "binary" else x


@pytest.mark.parametrize("name", MODELS)
def test_what_is_compressed_comes_back_at_the_price_of_the_models_bound(name, trained, tmp_path):
    run, x = trained(**MODELS[name]), levels(name)
    found = compress(run, x, tmp_path / "x.gfz")
    made, by = decompress(tmp_path / "x.gfz", run=run)
    assert made.dtype == x.dtype
    assert np.array_equal(made, x)
    assert by == run.path
    assert found.bytes == (tmp_path / "x.gfz").stat().st_size
    assert found.bits_per_dim == pytest.approx(8 * found.bytes / x.size)
    # Two examples' draws of z aside, of which the bound has others: 1% of 300 small images. Flows pay bits to start.
    flow = MODELS[name]["model"] in ("realnvp", "glow", "nsf")
    assert abs((found.message - flow * found.initial / x.size) / found.bound - 1) < 0.01
    # Head, groups, notes, and what of the last word is empty: up to 4 bytes, by chance.
    assert found.bits_per_dim - found.message < 8 * (200 if flow else 105) / x.size
    assert found.initial == (0 if "idf" in name else 32 * (found.initial // 32))
    assert "idf" in name or 32 <= found.initial <= (1024 if flow else 96)


@pytest.mark.parametrize(
    "model", [{"model": "vae", "latent_dim": 2, "hidden": (32,)}, {"model": "idf", "hidden": (16,)}]
)
def test_tables_of_integers_and_categories_come_back(model, trained, visits, tmp_path):
    run = trained(data=f"csv:{visits}", **model)
    found = compress(run, visits, tmp_path / "v.gfz")
    decompress(tmp_path / "v.gfz", tmp_path / "again.csv", run=run)
    assert (tmp_path / "again.csv").read_bytes() == visits.read_bytes()
    assert abs(found.message / found.bound - 1) < 0.03
    rows = pd.read_csv(visits)
    for change, error in {
        "extra": "has the columns extra, which the model",
        "age": r"example 3, column age: 200, which is not in 18\.\.89, is none of the 72 levels",
        "plan": "row 3.*plan.*one of the categories",
    }.items():
        odd = rows.assign(**{change: rows.get(change, pd.Series(1, rows.index)).astype(object)})
        odd.loc[3, change] = {"age": 200, "plan": "gold"}.get(change, 1)
        with pytest.raises(DataError, match=error):
            compress(run, odd, tmp_path / "odd.gfz")
    with pytest.raises(DataError, match="has no column member"):
        compress(run, rows.drop(columns="member"), tmp_path / "odd.gfz")
    with pytest.raises(SettingsError, match=r"must end in \.csv"):
        decompress(tmp_path / "v.gfz", tmp_path / "again.npy", run=run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.csv", "v.gfz"]


def test_columns_without_levels_are_named(trained, visits, tmp_path):
    rows = pd.read_csv(visits)
    path = tmp_path / "mixed.csv"
    rows.assign(income=rows.age * 1.01, spent=rows.age * 2.02).to_csv(path, index=False)
    with pytest.raises(SettingsError, match="column income, spent of the table has no levels"):
        genfuse.create("idf", f"csv:{path}")
    with pytest.raises(SettingsError, match="column income, spent of the table has no levels"):
        compress(trained("vae", f"csv:{path}", steps=2, hidden=(4,)), path, tmp_path / "x.gfz")


def test_a_limit_below_one_is_refused(trained, tmp_path):
    with pytest.raises(SettingsError, match="must be a whole number above 0, or None; got -1"):
        compress(trained(**MODELS["grey"]), levels("grey"), tmp_path / "x.gfz", limit=-1)


CODE = """
import sys, numpy as np
from genfuse.applications import compress, decompress
for i, run in enumerate(sys.argv[3:]):
    made, _ = decompress(f"{sys.argv[1]}/{i}.gfz", run=run)
    np.save(f"{sys.argv[2]}/{i}.npy", made)
    compress(run, made, f"{sys.argv[2]}/{i}.gfz")
"""


def test_another_processor_thread_count_and_implementation_makes_the_same_bytes(trained, tmp_path):
    names = ["grey", "mixture", "convolutions", "binary", "idf", "idf of vectors", "realnvp", "realnvp of halves",
             "glow", "nsf"]  # fmt: skip
    runs = [trained(**MODELS[name]) for name in names]
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        compress(run, levels(name, 100), tmp_path / f"{i}.gfz")
    machines = {
        "sse2": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE",
                 "GENFUSE_IMPL": "reference", "OMP_NUM_THREADS": "2"},
        "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                 "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA", "OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    for machine, variables in machines.items():
        (folder := tmp_path / machine).mkdir()
        command = [sys.executable, "-c", CODE, tmp_path, folder, *(run.path for run in runs)]
        subprocess.run(list(map(str, command)), env={**os.environ, **variables}, check=True)
        for i, name in enumerate(names):
            assert np.array_equal(np.load(folder / f"{i}.npy"), levels(name, 100)), (machine, name)
            assert (folder / f"{i}.gfz").read_bytes() == (tmp_path / f"{i}.gfz").read_bytes(), (machine, name)


def test_no_value_of_a_curve_on_the_grid_lies_near_the_middle_between_two():
    """By 64 units in the last place; libraries differ by one or two."""
    for name, curve in CURVES.items():
        grid, far = COARSE.get(name, GRID), 1024 if name in COARSE else 18
        x = torch.arange(-far * int(grid), far * int(grid) + 1, dtype=torch.float64) / grid
        y = curve(x).clamp(max=2**10) * GRID
        assert ((y + OFF - (y + OFF).floor() - 0.5).abs() / y.clamp(min=1)).min() > 2.0**-46, name
        if name in COARSE:
            continue
        ends = curve(torch.tensor([-1000.0, 18.0, 1000.0], dtype=torch.float64))
        beyond = {"exp": [0, 2**10, 2**10], "tanh": [-1, 1, 1], "sigmoid": [0, 1, 1]}.get(name, [0, 18, 1000])
        assert (ends.clamp(max=2**10) - torch.tensor(beyond)).abs().max() < 0.25 / GRID, name  # alike from there on


def test_no_entry_of_a_table_lies_near_the_middle_between_two():
    stats = pytest.importorskip("scipy.stats")
    for name, of in (("logistic", stats.logistic), ("normal", stats.norm)):
        for top in (TOP, 2**26, 2**32) if name == "logistic" else (TOP,):
            table = distribution(name, top)
            x = (np.arange(len(table)) - len(table) // 2) / FINE
            upper = x > 0
            exact = top * of.cdf(x)
            assert np.abs(table - exact)[upper].max() <= 0.5 - 2.0**-20, name
            assert np.array_equal(table + table[::-1], np.full(len(table), top))
    for bits in (8, 12):
        exact = stats.norm.ppf(np.arange(1, 2 ** (bits + 1)) / 2 ** (bits + 1))
        assert np.abs(probit(bits)[1:-1] - exact).max() * GRID <= 0.5 - 2.0**-24


@pytest.mark.parametrize("level", [0, 100, 255])
def test_the_noise_of_a_level_takes_as_many_bits_as_it_has_even_next_to_black(level):
    coder = Coder(padding(20_000))
    k, before = torch.full((200, 64), float(level), dtype=torch.float64), coder.stack.num_valid_bits()
    y = coder.dequantized(256, 1e-6, k)
    taken = (before - coder.stack.num_valid_bits()) / k.numel()
    density = 256 * y.sigmoid() * (-y).sigmoid() * coder.step**-1  # of y = logit(v), for v even over a 256th
    assert abs(taken + density.log2().mean()) < 0.01
    assert torch.equal(coder.dequantized(256, 1e-6, y=y), k)
    assert coder.stack.num_valid_bits() == before


@pytest.mark.parametrize("step", [COARSE_STEP, STEP])
@pytest.mark.parametrize("margin", [0, 1e-6, 0.05])
@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_levels_fill_the_interval_and_no_more(levels, margin, step):
    begin, mass, reach = places(levels, margin, step)
    assert (np.diff(begin) > 0).all()
    assert mass[0] <= begin[0]
    assert begin[-1] <= mass[-1]
    assert len(mass) == 2 * reach + 1
    assert (np.diff(mass) >= 0).all()


def test_sums_are_the_same_in_any_order_and_near_those_of_float64():
    torch.manual_seed(0)
    x, w, order = torch.randn(5, 700).double(), torch.randn(700, 9).double(), torch.randperm(700)
    kernel, images = torch.randn(4, 3, 3, 3).double(), torch.randn(2, 3, 8, 8).double()
    with Exact():
        one, other = x @ w, x[:, order] @ w[order]
        near = torch.nn.functional.conv2d(images, kernel)
        flipped = torch.nn.functional.conv2d(images.flip(1), kernel.flip(1))
        up = torch.nn.functional.conv_transpose2d(near, kernel)
    assert torch.equal(one, other)
    assert torch.equal(near, flipped)
    assert (one - x @ w).abs().max() < 2e-3
    assert (near - torch.nn.functional.conv2d(images, kernel)).abs().max() < 1e-3
    assert (up - torch.nn.functional.conv_transpose2d(near, kernel)).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (torch.nn.LayerNorm(4).double(), "aten::native_layer_norm"),
        (lambda x: ops.reparameterize_kl(x, x), "genfuse::|aten::"),
        (lambda x: torch.add(x, x, alpha=3), "aten::add"),
        (lambda x: x.float() @ x.float().T, "mm of torch.float32"),
        (lambda x: x.sum(), "aten::sum"),
    ],
)
def test_what_may_differ_between_machines_is_refused_by_name(network, name):
    with torch.no_grad(), Exact(), pytest.raises(SettingsError, match=name):
        network(torch.ones(3, 4, dtype=torch.float64))


def test_a_folder_of_pictures_comes_back_under_its_names(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    images = np.concatenate([x] * 4)[:, None]
    split = genfuse.data.Split(torch.from_numpy(images))
    data = genfuse.data.Dataset("grey", {"train": split, "test": split}, levels=256)
    model = genfuse.create("idf", data, channels=(4,))
    genfuse.Trainer(steps=2, out=tmp_path / "runs" / "grey", pictures=False, device="cpu").fit(model, data)
    names = ["a.png", "sub/b.png", "sub/c.bmp"]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name, pixels in zip(names, x, strict=True):
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    assert main(["compress", "runs/grey", "in", "--out", "x.gfz"]) == 0
    assert "bits per dimension: " in capsys.readouterr().out
    assert main(["decompress", "x.gfz", "--out", "out"]) == 0
    assert "by the model of" in capsys.readouterr().out
    for name, pixels in zip(names, x, strict=True):
        assert np.array_equal(np.asarray(Image.open((tmp_path / "out" / name).with_suffix(".png"))), pixels)
    assert main(["decompress", "x.gfz", "--out", "out"]) == 2
    assert "out exists" in capsys.readouterr().err
    assert main(["compress", "runs/grey", "in/a.png", "--out", "a.gfz"]) == 0
    assert main(["decompress", "a.gfz", "--out", "again.png"]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), x[0])
    Image.fromarray(x[0, :4]).save("in/small.png")
    for made, error in {"small": r"in/small.png has 1 examples of shape \(1, 4, 8\)", "colour": r"of shape \(3, 8, 8\)",
                        "clear": "has mode LA"}.items():  # fmt: skip
        (tmp_path / made).mkdir()
        pixels = {"colour": np.stack([x[0]] * 3, -1), "clear": np.stack([x[0]] * 2, -1)}.get(made, x[0, :4])
        Image.fromarray(pixels).save(tmp_path / made / "small.png" if made == "small" else tmp_path / made / "z.png")
        with pytest.raises(DataError, match=error.replace("in/", "")):
            compress("runs/grey", made, "y.gfz")
    assert not (tmp_path / "y.gfz").exists()


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (levels("grey", 2) * 15, r"example 0, cell \(0, 0, 2\): \d+ is none of the 17 levels"),
        (levels("grey", 2) / 16, "expected whole numbers, the levels of examples; got float64"),
        (levels("grey", 2)[:, :, :5], r"shape \(1, 5, 8\), and the model of .* takes \(1, 8, 8\)"),
        (levels("grey", 0), r"expected images, .*; got \(0, 1, 8, 8\)"),
        ("digits.npy", "there is no file or folder digits.npy"),
    ],
)
@pytest.mark.parametrize("name", ["grey", "realnvp"])
def test_examples_that_are_not_of_the_model_are_refused(name, array, error, trained, tmp_path):
    with pytest.raises(DataError, match=error):
        compress(trained(**MODELS[name]), array, tmp_path / "x.gfz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "vae", "latent_dim": 2}, "likelihood is of 2 levels"),
        ({"model": "vae", "decoder": "gaussian"}, "density of real numbers"),
        ({**GREY, "posterior": "planar"}, "posterior is a flow"),
        ({**GREY, "conditional": True}, "conditional"),
        ({"model": "gan"}, "a GAN does not compress"),
        ({"model": "maf"}, "a flow with AutoregressiveAffine does not compress: realnvp, glow and nsf do"),
        ({"model": "realnvp", "hidden": (8,), "conditional": True}, "RealNVP does not compress: it is conditional"),
    ],
)
def test_models_that_do_not_compress_say_why(settings, error, trained, tmp_path):
    run = trained(**{"data": "digits", "steps": 1, **settings})
    with pytest.raises(SettingsError, match=error):
        compress(run, "digits", tmp_path / "x.gfz")


@pytest.mark.parametrize("name", ["grey", "idf", "realnvp of halves", "glow", "nsf"])
def test_a_damaged_foreign_or_other_file_is_refused_and_nothing_written(name, trained, tmp_path, monkeypatch):
    run, other = trained(**MODELS[name]), trained(**MODELS["categorical"])
    file, out = tmp_path / "x.gfz", tmp_path / "out.npy"
    compress(run, levels("grey", 8), file)
    whole = file.read_bytes()
    draw = np.random.default_rng(0)
    damaged = [whole[:size] for size in (0, 3, 30, 60, len(whole) // 2, len(whole) - 1)] + [whole + b"\0"]
    for place in [4, 10, 25, 35, *draw.integers(0, len(whole), 30)]:
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << int(draw.integers(8))]) + whole[place + 1 :])
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged or was cut short|is no file of|is of version"):
            decompress(file, out, run=run)
    for place in draw.integers(HEAD.size, len(whole) - SEAL, 8):  # changed, and sealed again
        content = whole[:place] + bytes([whole[place] ^ 1 << int(draw.integers(8))]) + whole[place + 1 : -SEAL]
        file.write_bytes(content + hashlib.sha256(content).digest()[:SEAL])
        with pytest.raises(DataError, match=r"damaged or was cut short|is not what was compressed"):
            decompress(file, out, run=run)
    file.write_bytes(whole)
    with pytest.raises(RunError, match="compressed by another model"):
        decompress(file, out, run=other)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="name its run, by --run"):
        decompress(file, out)
    with pytest.raises(FileNotFoundError):
        decompress(tmp_path / "none.gfz", out)
    assert not out.exists()
    assert np.array_equal(decompress(file, out, run=run)[0], np.load(out))
