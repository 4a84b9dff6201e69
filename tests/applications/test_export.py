import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import genfuse
from genfuse.applications import export, verbs_of
from genfuse.applications._export import LOOPS
from genfuse.errors import SettingsError

runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def run_program(file, *inputs):
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(*inputs).detach().numpy()
    session = runtime.InferenceSession(file)
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, [each.numpy() for each in inputs], strict=True)))[0]


@pytest.mark.parametrize(
    ("model", "settings", "has"),
    [
        ("nsf", {"layers": 2, "hidden": (4,), "bins": 4}, "log_prob decode"),
        ("maf", {"layers": 2, "hidden": (4,)}, "log_prob encode"),
        ("vae", {"hidden": 8, "latent_dim": 2, "decoder": "gaussian"}, "encode decode sample"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_programs_of_a_table_are_the_models_verbs_in_its_own_units(model, settings, has, suffix, trained, tmp_path):
    run = trained(model, steps=2, **settings)
    wrote = export(run, tmp_path / f"m.{suffix}", has.split(), say=lambda line: None)  # each takes seconds
    files = {file.stem.split("-")[1]: file for file in wrote}
    own, scaling = run.model(), run.scaling
    rows = torch.tensor(
        [[50.0, 52000.0, 0.1]] * 5 + [[61.0, 58000.0, -1.0]] * 2, dtype=torch.float64
    )  # 7, traced with 3
    x, z = scaling.apply(rows), torch.randn(7, own.latent_dim if model == "vae" else 3)
    if "log_prob" in files:
        wanted = own.log_prob(x).detach().numpy() - np.log(scaling.std).sum()
        assert run_program(files["log_prob"], rows) == pytest.approx(wanted, abs=1e-3)
    if "encode" in files:
        assert run_program(files["encode"], rows) == pytest.approx(own.encode(x).detach().numpy(), abs=1e-4)
    for verb in files.keys() & {"decode", "sample"}:
        wanted = scaling.restore(own.decode(z).detach()).numpy()
        assert run_program(files[verb], z) == pytest.approx(wanted, rel=1e-4, abs=1e-3)


def test_verbs_are_those_that_are_functions_without_noise(trained):
    assert verbs_of(trained("nsf", steps=2, hidden=8).model()) == ["log_prob", "encode", "decode", "sample"]
    assert verbs_of(trained("vae", "digits", steps=2).model()) == ["encode", "decode", "sample"]
    assert verbs_of(trained("gan", "digits", steps=2).model()) == ["decode", "sample"]
    assert verbs_of(trained("edm", steps=2, hidden=(8,)).model()) == ["sample"]


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_conditional_program_takes_the_labels(suffix, trained, tmp_path):
    run = trained("vae", "digits", steps=2, conditional=True, hidden=8)
    [file] = export(run, tmp_path / f"m.{suffix}", ["encode"], say=lambda line: None)
    x, y = genfuse.load_data("digits").batch("test", slice(0, 5))
    assert run_program(file, x, y) == pytest.approx(run.model().encode(x, y).detach().numpy(), abs=1e-5)


@pytest.mark.parametrize(("model", "suffix"), [("flow-matching", "pt2"), ("edm", "onnx")])
def test_a_diffusion_model_exports_its_sampler(model, suffix, trained, tmp_path):
    run = trained(model, steps=2, hidden=(8,))
    [file] = export(run, tmp_path / f"m.{suffix}", say=lambda line: None)
    assert file.name == f"m-sample.{suffix}"
    z = torch.randn(4, 3)
    wanted = run.scaling.restore(run.model().trajectory(z)[-1]).numpy()
    assert run_program(file, z) == pytest.approx(wanted, rel=1e-4, abs=1e-2)
    if LOOPS and suffix == "pt2":  # one step, and not 20
        assert len(torch.export.load(file).graph.nodes) < 100


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8)], ids=str)
def test_a_sampler_of_pictures_or_clips_is_exported(shape, tmp_path):
    data = genfuse.load_data(torch.randint(0, 256, (20, *shape), dtype=torch.uint8))
    run = genfuse.Trainer(steps=1, pictures=False, device="cpu", out=tmp_path / "run").fit(
        genfuse.create("edm", data, channels=(8,)), data
    )
    [file] = export(run, tmp_path / "m.pt2", say=lambda line: None)
    z = torch.randn(3, math.prod(shape))
    assert run_program(file, z) == pytest.approx(run.model().trajectory(z)[-1].numpy(), rel=1e-4, abs=1e-4)


def test_the_path_of_ddpm_is_exported(trained):
    class Sampler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = trained("ddpm", steps=2, hidden=(8,)).model()

        def forward(self, z):
            return self.model.trajectory(z, steps=2)[-1]

    z, sampler = torch.randn(4, 3), Sampler()
    assert torch.equal(torch.export.export(sampler, (z,), strict=True).module()(z), sampler(z))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    r, n = np.random.default_rng(0), 300
    frame = pd.DataFrame(
        {
            "income": np.exp(r.normal(10, 1, n)).round(2),
            "age": r.integers(18, 90, n),
            "plan": r.choice(["basic", "plus", "gold"], n),
            "joined": pd.Timestamp("2020-01-01") + pd.to_timedelta(r.integers(0, 999, n), "D"),
            "one": "same",
        }
    )
    path = tmp_path_factory.mktemp("mixed") / "mixed.csv"
    frame.mask(r.random(frame.shape) < 0.1).to_csv(path, index=False)
    return f"csv:{path}"


@pytest.mark.parametrize(
    ("model", "settings", "verbs"),
    [
        ("vae", {"hidden": 8, "latent_dim": 2}, "encode decode sample"),
        ("nsf", {"layers": 2, "hidden": (4,), "bins": 4}, "encode sample"),
        ("gan", {"hidden": (8,), "latent_dim": 3}, "decode sample"),
    ],
)
def test_programs_of_a_table_of_several_kinds_take_and_make_numbers(model, settings, verbs, mixed, trained, tmp_path):
    run = trained(model, mixed, steps=20, **settings)
    *wrote, columns = export(run, tmp_path / "m.onnx", verbs.split(), say=lambda line: None)
    own, scaling, schema = run.model(), run.scaling, run.schema
    named = [(each["name"], each["kind"], each["categories"]) for each in json.loads(columns.read_text())]
    assert named[2] == ("plan", "category", ["basic", "gold", "plus"])
    x = run.data().splits["test"].x[:40]
    z = torch.randn(40, own.columns.latents if model == "nsf" else own.latent_dim)
    u = torch.rand(40, max(1, getattr(own, "uniforms", 0)), generator=torch.Generator().manual_seed(0))
    u = u.clamp(1e-4, 1 - 1e-4)
    for file, verb in zip(wrote, verbs.split(), strict=True):
        if verb == "encode":
            wanted = own.encode(x).detach().numpy()
            assert run_program(file, scaling.restore(x)) == pytest.approx(wanted, abs=1e-3)
            continue
        drawn = verb == "sample" and model != "nsf"
        wanted = schema.decode(own.decode(z, u=u).detach() if drawn else own.decode(z).detach())
        made = run_program(file, z, *([u] if drawn else []))
        wanted = schema.parse(schema.texts(wanted))
        assert np.isnan(made).sum() == np.isnan(wanted).sum()
        assert made[:, 0] == pytest.approx(wanted[:, 0], rel=1e-3, nan_ok=True)  # income has digits
        assert np.array_equal(made[:, 1:], wanted[:, 1:], equal_nan=True)  # ages, codes and days are whole


def test_draws_of_a_program_are_spread_as_the_models(mixed, trained):
    for model in ("vae", "gan"):
        own = trained(model, mixed, steps=20, hidden=(8,)).model()
        torch.manual_seed(0)
        drawn = own.decode(torch.randn(4000, own.latent_dim), u=torch.rand(4000, own.uniforms).clamp(1e-6, 1 - 1e-6))
        sampled = own.sample(4000)
        for column in (0, 2):
            for cells in (drawn.nan_to_num(9.0), sampled.nan_to_num(9.0)):
                assert cells[:, column].unique().numel() > 2
            gap = drawn[:, column].nan_to_num(9.0).sort().values - sampled[:, column].nan_to_num(9.0).sort().values
            assert gap.abs().mean() < 0.25


def test_what_a_table_of_several_kinds_has_not_is_said_with_the_reason(mixed, trained, tmp_path):
    with pytest.raises(SettingsError, match=r"has no log_prob .*; it has a bound of its likelihood alone, which draws"):
        export(trained("nsf", mixed, steps=20, layers=2, hidden=(4,), bins=4), tmp_path / "m.onnx", ["log_prob"])
    edm = trained("edm", steps=2, hidden=(8,))
    with pytest.raises(SettingsError, match=r"has no log_prob .*; its density is the solution of a differential eq"):
        export(edm, tmp_path / "m.onnx", ["log_prob"])


def test_what_cannot_be_exported_is_named(trained, tmp_path):
    run = trained("gan", "digits", steps=2)
    with pytest.raises(SettingsError, match=r"must end in \.pt2 or \.onnx; got .*m.tflite"):
        export(run, tmp_path / "m.tflite")
    with pytest.raises(SettingsError, match="a GAN has no log_prob that could be exported; it has: decode, sample"):
        export(run, tmp_path / "m.pt2", ["log_prob"])
    assert list(tmp_path.iterdir()) == []
