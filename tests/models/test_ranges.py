"""What models and features do with examples that are not in the range of the data: images in 0..255 or in [-1, 1]."""

import pytest
import torch

import genfuse
from genfuse.data import Dataset, Split, load_data
from genfuse.errors import DataError
from genfuse.metrics import extractor

IMAGES = {
    "vae": {"hidden": (8,), "latent_dim": 2},
    "realnvp": {"hidden": (8,), "layers": 2},
    "glow": {"channels": (8,), "steps": 1},
    "maf": {"hidden": (8,), "layers": 1},
    "nsf": {"hidden": (8, 8), "layers": 1},
    "ddpm": {"channels": (8,)},
    "edm": {"channels": (8,)},
    "score": {"channels": (8,)},
    "flow-matching": {"channels": (8,)},
    "gan": {"hidden": (8,)},
    "wgan-gp": {"hidden": (8,)},
}
VERBS = ("elbo", "log_prob", "bits_per_dim", "encode", "reconstruct", "iwae_bound", "anomaly_score")
RANGES = {
    "0..255 in bytes": lambda x: (x * 255).to(torch.uint8),
    "0..255": lambda x: x * 255,
    "0..16": lambda x: x * 16,
    "-1..1": lambda x: 2 * x - 1,
}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_another_range_are_refused_by_every_verb(name, kind, digits):
    model = genfuse.create(name, digits, **IMAGES[name])
    x = digits.batch("test", slice(0, 4)).x
    for training in (True, False):
        model.train(training)
        with pytest.raises(DataError, match=r"x must be .*in \[0, 1\].*got"):
            model.loss(genfuse.models.Batch(RANGES[kind](x)), model.players()[0].name)
    asked = [verb for verb in VERBS if hasattr(model, verb)]
    if name in ("ddpm", "edm", "score", "flow-matching"):
        asked.remove("log_prob")  # of real-valued data alone
    assert asked or name in ("gan", "wgan-gp")
    for verb in asked:
        with pytest.raises(DataError, match=r"x must be .*in \[0, 1\].*got"):
            getattr(model, verb)(RANGES[kind](x))


@pytest.mark.parametrize("decoder", ["bernoulli", "gaussian", "categorical", "discretized-logistic"])
def test_every_decoder_refuses_images_of_another_range(decoder, digits):
    model = genfuse.create("vae", digits, hidden=(8,), latent_dim=2, decoder=decoder)
    x = digits.batch("test", slice(0, 4)).x
    assert model.elbo(x).isfinite().all()
    with pytest.raises(DataError, match=r"got values from -1 to 1: divide 0..255 by 255, and take \(x \+ 1\) / 2"):
        model.elbo(2 * x - 1)


@pytest.mark.parametrize("features", ["pixels", "random-conv"])
@pytest.mark.parametrize("kind", RANGES)
def test_features_of_images_of_another_range_are_refused(features, kind, digits):
    extract = extractor(features, digits)
    x = digits.batch("test", slice(0, 4)).x
    assert len(extract(x)) == 4
    with pytest.raises(DataError, match=r"x must be .*in \[0, 1\]"):
        extract(RANGES[kind](x))
    assert len(extract.of_samples(2 * x - 0.5)) == 4  # what a model draws may be outside


def test_real_values_may_be_anything_and_rounding_is_no_other_range(digits):
    table = Dataset("table", {part: Split(1000 * torch.randn(9, 3)) for part in ("train", "test")})
    for name in ("realnvp", "vae"):
        own = {"decoder": "gaussian"} if name == "vae" else {}
        model = genfuse.create(name, table, **IMAGES[name], **own)
        model.loss(genfuse.models.Batch(table.splits["train"].x), "model")
    assert extractor("columns", table)(table.splits["train"].x).shape == (9, 3)
    model = genfuse.create("vae", digits, **IMAGES["vae"])
    x = digits.batch("test", slice(0, 4)).x
    assert model.elbo(x * 1.0002).isfinite().all()
    assert model.elbo(x[:0]).shape == (0,)


def test_per_example_gradients_by_torch_func_still_work(digits):
    model = genfuse.create("vae", digits, **IMAGES["vae"]).eval()
    x = digits.batch("test", slice(0, 4)).x
    model.forward = lambda x: model.encode(x)[0]

    def of_one(weights, x):
        return torch.func.functional_call(model, weights, (x[None],)).sum()

    found = torch.func.vmap(torch.func.grad(of_one), (None, 0))(dict(model.encoder.named_parameters("encoder")), x)
    assert all(len(each) == 4 for each in found.values())
