"""Every family on a table with numbers, integers, categories and cells missing."""

import numpy as np
import pytest
import torch

import genfuse
from genfuse.data import Dataset, load_data
from genfuse.errors import SettingsError
from genfuse.models import GenerativeModel, configure, load
from genfuse.training import Run

SMALL = {
    "vae": {"hidden": (32,), "latent_dim": 4},
    "gan": {"hidden": (32,), "latent_dim": 4, "pac": 4},
    "wgan": {"hidden": (32,), "latent_dim": 4},
    "wgan-gp": {"hidden": (32,), "latent_dim": 4, "pac": 3},
    "nsf": {"layers": 2, "hidden": (16,)},
    "nsf-ar": {"layers": 2, "hidden": (16,)},
    "realnvp": {"layers": 2, "hidden": (16,)},
    "maf": {},
    "glow": {"steps": 2, "hidden": (16,)},
    "planar": {},
    "ddpm": {"hidden": (32,)},
    "edm": {"hidden": (32,)},
    "score": {"hidden": (32,)},
    "flow-matching": {"hidden": (32,)},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    r = np.random.default_rng(0)
    n = 1000
    colour = r.choice(["red", "green", "blue"], n)
    size = np.exp(r.normal(size=n)) + 3 * (colour == "red")
    count = r.poisson(2, n)
    rows = np.stack([size.round(3).astype(str), count.astype(str), colour, (size > 2).astype(int).astype(str)], 1)
    rows = np.where(r.random((n, 4)) < 0.1, "", rows)
    file = tmp_path_factory.mktemp("data") / "a.csv"
    file.write_text("size,count,colour,large\n" + "\n".join(map(",".join, rows)) + "\n")
    return file


@pytest.fixture(scope="module")
def data(path) -> Dataset:
    return load_data(f"csv:{path}")


def trained(name: str, data: Dataset, steps: int = 6, **settings) -> GenerativeModel:
    torch.manual_seed(0)
    model = genfuse.create(name, data, **{**SMALL[name], **settings})
    genfuse.Trainer(steps=steps, batch_size=50, device="cpu").fit(model, data)
    return model.eval()


def check_rows(data: Dataset, x: torch.Tensor) -> None:
    """Rows as the table has them."""
    frame = data.schema.decode(x)
    for column in data.schema.columns:
        cells = frame[column.name].dropna()
        if column.categories:
            assert set(cells.astype(str)) <= set(column.categories)
        else:
            assert cells.between(column.low, column.high).all()
    assert torch.allclose(data.schema.encode(frame), x, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", SMALL)
def test_a_family_trains_and_draws_rows(name, data, tmp_path):
    model = trained(name, data)
    few = {"steps": 5} if hasattr(model, "denoiser") else {}
    x = model.sample(40, generator=torch.Generator().manual_seed(0), **few)
    assert x.shape == (40, 4)
    check_rows(data, x)
    again = model.sample(40, generator=torch.Generator().manual_seed(0), **few)
    assert torch.equal(x.nan_to_num(9), again.nan_to_num(9))
    for verb in model.likelihoods:
        assert getattr(model, verb)(data.splits["test"].x).isfinite().all()


@pytest.mark.parametrize("name", ["vae", "nsf", "wgan-gp", "ddpm"])
def test_a_run_is_loaded_with_the_columns(name, data, tmp_path):
    torch.manual_seed(0)
    model = genfuse.create(name, data, **SMALL[name])
    run = genfuse.Trainer(steps=4, batch_size=50, device="cpu", out=tmp_path / "run", pictures=name == "vae").fit(
        model, data
    )
    again = Run(run.path)
    assert again.schema == data.schema
    assert again.data().fingerprint() == data.fingerprint()
    few = {"steps": 5} if name == "ddpm" else {}
    drawn = [m.sample(5, generator=torch.Generator().manual_seed(0), **few) for m in (model, again.model())]
    assert torch.equal(*(x.nan_to_num(9) for x in drawn))


@pytest.mark.parametrize("name", ["vae", "nsf", "wgan-gp", "ddpm"])
def test_columns_of_any_kind_are_conditions(name, path):
    full = [line for line in path.read_text().splitlines() if ",," not in line and not line.endswith(",")]
    (path.parent / "full.csv").write_text("\n".join(full) + "\n")
    data = load_data(f"csv:{path.parent}/full.csv", condition="colour,count")
    model = trained(name, data)
    y = data.splits["test"].y[:1]
    x = model.sample(7, y=y[0], **({"steps": 5} if name == "ddpm" else {}))
    assert x.shape == (7, 2)
    check_rows(data, x)


def test_what_is_learned_is_better_than_independent_columns(data):
    """The bounds of a VAE and of a flow on test rows beat columns that know nothing of each other."""
    x = data.splits["test"].x
    flow, vae = trained("nsf", data, steps=150), trained("vae", data, steps=150)
    base, log_w = flow.columns.dequantize(x, torch.Generator().manual_seed(0))
    alone = torch.distributions.Normal(0, 1).log_prob(base).sum(1) + log_w
    with torch.no_grad():
        assert flow.elbo(x).mean() > alone.mean() + 0.1
        assert vae.elbo(x).mean() > alone.mean() - 0.5
        assert torch.allclose(flow.log_prob(x).mean(), flow.elbo(x).mean(), atol=0.5)


def test_a_model_made_for_other_columns_is_refused(data, path):
    other = load_data(f"csv:{path}", drop="count")
    with pytest.raises(SettingsError, match="shape"):
        genfuse.create("vae", data).check_data(other)
    other = load_data(f"csv:{path}", types="count=category")
    with pytest.raises(SettingsError, match="the model was made for other columns"):
        genfuse.create("vae", data).check_data(other)
    with pytest.raises(SettingsError, match="the model was made for numbers alone"):
        genfuse.create("nsf", shape=(4,), levels=None).check_data(data)
    with pytest.raises(SettingsError, match="has no likelihood"):
        genfuse.create("ddpm", data).log_prob(data.splits["test"].x)
    with pytest.raises(SettingsError, match="network 'mlp'"):
        genfuse.create("gan", data, network="dcgan")


def test_a_model_of_a_former_version_goes_on_with_whole_numbers(tmp_path):
    """A table of numbers, some of them whole: former versions took all for numbers without end."""
    rows = np.random.default_rng(0).poisson(3, (100, 2)) + np.array([0, 0.5])
    np.savetxt(tmp_path / "a.csv", rows, delimiter=",", header="a,b", comments="", fmt="%g")
    data = load_data(f"csv:{tmp_path}/a.csv")
    assert data.columns is not None
    former = genfuse.create("nsf", shape=(2,), levels=None, layers=2, hidden=(16,))
    run = genfuse.Trainer(steps=2, out=tmp_path / "run", device="cpu", pictures=False).fit(former, data)
    assert Run(run.path).model().likelihoods == ("log_prob",)
    from genfuse.cli import main

    assert main(["train", "--resume", str(run.path), "--steps", "4"]) == 0
    assert Run(run.path).step == 4


def test_examples_that_a_critic_sees_together_are_those_of_a_batch(data):
    model = genfuse.create("wgan-gp", data, **SMALL["wgan-gp"])
    for n in (1, 2, 3, 50):
        batch = data.batch("train", torch.arange(n))
        for player in ("critic", "generator"):
            assert model.loss(batch, player)[0].isfinite()


def test_the_usual_gan_of_a_table_is_r3gans(data):
    config = configure(load("gan"), {}, data)
    assert (config.loss, config.penalty) == ("relativistic", "r1r2")


@pytest.fixture(scope="module")
def numbers() -> Dataset:
    """A spike, a heavy tail that follows from it, and a column of one value."""
    r = np.random.default_rng(0)
    spike = r.normal(size=2000) * r.choice([1, 0.001], 2000)
    return load_data(np.stack([spike, np.exp(2 * spike + 0.1 * r.normal(size=2000)), np.full(2000, 3.0)], 1))


def test_a_vae_of_numbers_alone_has_a_mixture_of_each_and_beats_a_gaussian(numbers):
    bounds, x = [], numbers.splits["test"].x
    for decoder in ("auto", "gaussian"):
        model = trained("vae", numbers, steps=300, decoder=decoder)
        assert model.config.decoder == ("mixture" if decoder == "auto" else "gaussian")
        drawn = model.sample(100, generator=torch.Generator().manual_seed(0))
        assert drawn.isfinite().all()
        bounds.append(model.elbo(x).mean())
    assert (drawn[:, 2] != 0).any()  # a Gaussian of a column of one value
    assert bounds[0] > bounds[1] + 1


@pytest.mark.parametrize("name", ["gan", "wgan", "wgan-gp"])
def test_adversarial_models_see_scores_of_numbers_alone(name, numbers):
    model = trained(name, numbers)
    drawn = model.sample(50)
    x = numbers.splits["train"].x
    assert (drawn >= x.amin(0)).all()
    assert (drawn <= x.amax(0)).all()
    assert (drawn[:, 2] == 0).all()
    assert genfuse.create(name, numbers, columns=None).sample(1).shape == (1, 3)


def test_a_model_of_numbers_alone_takes_other_tables_of_them(numbers, data):
    other = load_data(np.random.default_rng(1).normal(size=(100, 3)))
    model = genfuse.create("vae", numbers)
    model.check_data(other)
    with pytest.raises(SettingsError, match="the model was made for numbers alone"):
        genfuse.create("vae", load_data(np.random.default_rng(1).normal(size=(100, 4)))).check_data(data)


@pytest.mark.parametrize(
    ("settings", "decoder"),
    [
        ({}, "mixture"),
        ({"decoder": "mixture"}, "mixture"),
        ({"decoder": "gaussian"}, "gaussian"),
        ({"variance": "per-cell"}, "gaussian"),
        ({"sigma": 0.5}, "gaussian"),
        ({"columns": None}, "gaussian"),
    ],
)
def test_the_decoder_of_a_table_of_numbers_is_as_settings_say(settings, decoder, numbers):
    config = configure(load("vae"), settings, numbers)
    assert config.decoder == decoder
    assert (config.columns is None) == (decoder == "gaussian")


def test_a_decoder_of_tables_is_refused_without_one():
    with pytest.raises(SettingsError, match="decoder 'mixture' is of tables"):
        configure(load("vae"), {"shape": (2,), "levels": None, "decoder": "mixture"})


def test_settings_of_former_runs_of_tables_of_several_kinds_keep_their_meaning(data):
    assert configure(load("vae"), {"decoder": "gaussian"}, data).columns is not None
