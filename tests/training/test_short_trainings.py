"""The first of the trainings that `make fuzz-training` runs by the thousand, and what an error says of where."""

import pytest
import torch
from fuzz_training import MODELS, one

import genfuse
from genfuse import Trainer
from genfuse.data import Dataset, Split
from genfuse.errors import NonFiniteLossError


@pytest.mark.parametrize("seed", range(20))
def test_short_trainings_end_finite_or_with_a_message_that_says_where(seed, tmp_path):
    one(seed, tmp_path)


def data(value: float) -> Dataset:
    x = torch.randn(60, 3)
    x[7, 1] = value
    return Dataset("table", {"train": Split(x), "test": Split(x[:9])})


@pytest.mark.parametrize("name", ["vae", "realnvp", "edm"])
def test_a_loss_that_is_not_finite_names_weights_and_the_column_with_the_largest_value(name):
    table = data(3e38)
    model = genfuse.create(name, table, **MODELS[name])
    with pytest.raises(NonFiniteLossError, match=r"the largest value, 3e\+38, is in column 1$"):
        Trainer(steps=20, batch_size=16, device="cpu").fit(model, table)


def test_a_loss_that_is_not_finite_names_the_layer_where_all_weights_are_finite(monkeypatch):
    """At the first step, before the update spoils them."""
    table = data(1.0)
    model = genfuse.create("vae", table, **MODELS["vae"])
    with torch.no_grad():
        model.decoder[0][-1].weight.fill_(3e38)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *given, **more: None)
    with pytest.raises(NonFiniteLossError, match=r"all weights are finite, the layer decoder\.0\.\d+ is not"):
        Trainer(steps=3, batch_size=16, device="cpu").fit(model, table)


def test_weights_that_the_last_update_spoiled_are_named_without_a_run_folder_too(monkeypatch):
    table = data(1.0)
    model = genfuse.create("vae", table, **MODELS["vae"])

    def spoil(optimizer, *given, **more):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    with pytest.raises(NonFiniteLossError, match=r"the loss was finite up to step 1, but these weights are not: \w+"):
        Trainer(steps=1, batch_size=16, device="cpu").fit(model, table)
