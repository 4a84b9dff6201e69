"""Diffusion models in anybody's hands: own networks, embeddings and loops, contexts, runs of former versions."""

import copy
import json
import math
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import genfuse
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, RunWarning, SettingsError
from genfuse.metrics import sliced_wasserstein_distance
from genfuse.models import Batch
from genfuse.models.ddpm import DDPM
from genfuse.models.edm import EDM
from genfuse.models.flow_matching import FlowMatching
from genfuse.models.score import ScoreModel

NAMES = {"ddpm": DDPM, "edm": EDM, "score": ScoreModel, "flow-matching": FlowMatching}
every_model = pytest.mark.parametrize("name", NAMES)


class Network(nn.Module):
    """One of the user's own: no part of the library, and buffers, dropout and all."""

    def __init__(self, cells, context=0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(cells + 1 + context, 32), nn.SiLU(), nn.Dropout(0.1), nn.BatchNorm1d(32), nn.Linear(32, cells)
        )

    def forward(self, x, log_sigma, context=None):
        given = [x.flatten(1), log_sigma[:, None], *([] if context is None else [context])]
        return self.body(torch.cat(given, -1)).view(x.shape)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(name, **settings):
    torch.manual_seed(0)
    return genfuse.create(name, **{"shape": (2,), "levels": None, "hidden": (16,), "ema": 0.9, **settings})


def loop(model, steps=8, accumulate=1, after=None, loss=None, fused=False):
    """As one writes it, with all parameters."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=fused)
    torch.manual_seed(1)
    for _ in range(steps):
        for _ in range(accumulate):
            (model if loss is None else loss)(torch.randn(16, 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after:
            after("model")
    return model


# Averages that cannot be forgotten.


@pytest.mark.parametrize(("accumulate", "fused"), [(1, False), (3, False), (1, True)])
@every_model
def test_an_own_loop_samples_as_one_that_counts_its_steps(name, accumulate, fused):
    plain, counted = loop(small(name), accumulate=accumulate, fused=fused), small(name)
    loop(counted, accumulate=accumulate, fused=fused, after=counted.stepped)
    a, b = (model.sample(5, steps=3, generator=seeded()) for model in (plain, counted))
    assert torch.equal(a, b)
    assert int(plain.averaged.updates) == int(counted.averaged.updates) == 8
    assert not torch.equal(a, small(name).sample(5, steps=3, generator=seeded()))


@every_model
def test_an_own_loop_around_a_compiled_loss_samples_the_present_weights(name):
    torch._dynamo.reset()  # beyond some graphs, which other tests may have made, nothing is compiled
    model = small(name)
    with torch.no_grad():  # else the first network predicts nothing, whatever the loop does
        for p in model.denoiser.parameters():
            p += 0.1 * torch.randn_like(p)
    loop(model, loss=torch.compile(model, backend="eager"))
    x = torch.randn(4, 2)
    assert int(model.averaged.updates) == 0
    assert torch.equal(model.denoise(x, 0.5), model.denoiser.eval()(x, 0.5))
    assert model.eval().log_prob(x).isfinite().all()
    for a, b in zip(model.denoiser.parameters(), model.averaged.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_samples_of_an_own_loop_are_as_near_with_and_without_after_step():
    data = genfuse.load_data("toy:moons")
    x, test = data.splits["train"].x, data.splits["test"].x[:500]
    distances = []
    for after in (True, False):
        torch.manual_seed(0)
        model = genfuse.create("edm", data, ema=0.98, hidden=(64, 64))
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(400):
            optimizer.zero_grad()
            model.loss(Batch(x[torch.randint(len(x), (256,))]))[0].backward()
            optimizer.step()
            if after:
                model.after_step("model")
        drawn = model.sample(500, steps=20, generator=seeded())
        distances.append(float(sliced_wasserstein_distance(drawn, test, projections=200)))
    assert max(distances) < 1.5 * min(distances) + 0.05 < 0.4, distances  # of weights that start: 0.53


@every_model
def test_samples_in_training_mode_are_those_of_evaluation_mode(name):
    model = loop(small(name, dropout=0.5))
    in_training = model.sample(4, steps=3, generator=seeded())
    assert torch.equal(in_training, model.eval().sample(4, steps=3, generator=seeded()))


# Own networks, and contexts.


@every_model
def test_a_model_of_an_own_network_and_embedding_trains_samples_and_measures(name):
    torch.manual_seed(0)
    model = NAMES[name](Network(2, 5), shape=(2,), embedding=nn.Linear(3, 5), ema=0.5)
    assert model.config is None
    y = torch.randn(64, 3)
    rows = Dataset("rows", {part: Split(torch.randn(64, 2) + y[:, :2], y) for part in ("train", "test")})
    before = copy.deepcopy(model.averaged_embedding.module.weight)
    genfuse.Trainer(steps=4, batch_size=32, device="cpu").fit(model, rows)
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(rows.splits["train"].x, y).backward()
    assert all(p.grad is not None for p in [*model.denoiser.parameters(), *model.embedding.parameters()])
    optimizer.step()
    model.eval()
    one = model.sample(4, y=y[0], steps=3, generator=seeded())
    assert torch.equal(one, model.sample(4, y=y[:1].expand(4, 3), steps=3, generator=seeded()))
    assert not torch.equal(one, model.sample(4, y=y[1], steps=3, generator=seeded()))
    assert not torch.equal(one, model.sample(4, y=y[0], steps=3, guidance=2.0, generator=seeded()))
    assert not torch.equal(before, model.averaged_embedding.module.weight)
    assert model.log_prob(one, y[:4], tolerance=1e-2).shape == (4,)
    assert model.trajectory(torch.randn(4, 2), y[:4], steps=2)[-1].shape == (4, 2)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.sample(4, y=y[0], steps=3, generator=seeded()), one)
    model.load_state_dict(copy.deepcopy(again).state_dict())
    with pytest.raises(SettingsError, match="conditional: give a context y"):
        model.sample(4)


@every_model
def test_a_model_of_images_of_an_own_network_has_its_bound(name):
    model = NAMES[name](Network(12), shape=(1, 3, 4), levels=5)
    x = torch.randint(5, (16, 1, 3, 4)) / 4
    loop_of = torch.optim.Adam(model.parameters())
    model(x).backward()
    loop_of.step()
    seen = []
    drawn = model.sample(3, steps=4, callback=lambda step, x, sigma, denoised: seen.append(step))
    assert set((4 * drawn).flatten().tolist()) <= {0, 1, 2, 3, 4}
    assert seen == [0, 1, 2, 3]
    bits = model.bits_per_dim(x[:2], **({"strata": 3} if name == "ddpm" else {"tolerance": 1e-2}))
    assert bits.shape == (2,)


def test_a_model_of_own_parts_has_no_run_folder(tmp_path):
    trainer = genfuse.Trainer(steps=1, device="cpu", out=tmp_path / "run")
    with pytest.raises(SettingsError, match="this EDM was made of parts that were given, not of settings"):
        trainer.fit(EDM(Network(2), shape=(2,)), genfuse.load_data("toy:moons"))
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_shape_is_refused():
    with pytest.raises(SettingsError, match="shape is missing: give that of one example"):
        EDM(Network(2))


@every_model
def test_a_context_of_floats_makes_a_conditional_model(name):
    model = small(name, condition=2, context_dropout=0.5).train()
    y = torch.zeros(400, 2)
    kept = model._training_context(Batch(torch.randn(400, 2), y))
    assert kept.shape == (400, 3)  # a 1 tells the context 0 from none
    assert float(kept[:, 2].mean()) == pytest.approx(0.5, abs=0.1)
    x = torch.randn(400, 2)
    loop(model, loss=lambda _: model(x, torch.randn(400, 2)))
    model.eval()
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    one = model.sample(2, y=[1.0, 0.0], steps=3, generator=seeded())
    both = model.sample(2, y=rows, steps=3, generator=seeded())
    torch.testing.assert_close(one[0], both[0])
    assert not torch.allclose(one[1], both[1])
    assert not torch.equal(one, model.sample(2, y=rows[0], guidance=3.0, steps=3, generator=seeded()))
    assert (model.log_prob(x[:2], rows) - model.log_prob(x[:2], rows.flip(0))).abs().min() > 0
    with pytest.raises(DataError, match=r"y must be a context \(N, 2\)"):
        model.log_prob(x[:2], torch.zeros(2, 3))
    with pytest.raises(SettingsError, match=r"give a context y, \(2, 2\)"):
        model.sample(2)


# Runs of former versions.


def former(state):
    """Tensors by the names that they had, without the mean and variance of examples."""
    back = {"denoiser.network.": "network.", "averaged.module.network.": "average.module.", "averaged.": "average."}
    old = {}
    for name, value in state.items():
        new, was = next(((new, was) for new, was in back.items() if name.startswith(new)), ("", ""))
        old[was + name[len(new) :]] = value
    return {name: value for name, value in old.items() if name not in ("seen", "mean", "variance")}


FORMER = {
    "ddpm": ({"timesteps": 50}, {}),
    "edm": ({"log_mean": -1.0, "log_std": 1.1, "sigma_data": 0.5}, {"P_mean": -1.0, "P_std": 1.1}),
    "score": ({"ladder": 20}, {"sigmas": 20}),
    "flow-matching": ({}, {}),
}


@every_model
def test_settings_and_tensors_of_a_former_version_are_read(name):
    own, now = FORMER[name]
    old = {"shape": [2], "levels": None, "hidden": 16, "layers": 2, "label_dropout": 0.2, "dropout": 0.0, **own}
    config = genfuse.models.configure(NAMES[name], NAMES[name].current(old))
    assert config.hidden == (16, 16)
    assert config.context_dropout == 0.2
    assert {key: getattr(config, key) for key in now} == now
    today = json.loads(json.dumps({"hidden": config.hidden, **now}))
    assert NAMES[name].current(today) == today
    model = loop(NAMES[name].from_config(config))
    first = model.sample(3, steps=2, generator=seeded())
    assert model.seen > 0
    state = former(model.state_dict())
    assert any(key.startswith("average.module.first") for key in state)
    other = NAMES[name].from_config(config)
    loop(other)
    other.load_state_dict(state)
    assert int(other.averaged.updates) == 8
    assert other.seen == 0  # unknown
    sigma, expected = other.sigma_max, math.hypot(other.denoiser.sigma_data, other.sigma_max)
    torch.testing.assert_close(other._prior(sigma)[1], torch.full((2,), expected))
    for of in (model, other):
        of.mean.zero_()
        of.variance.zero_()
        of.seen.zero_()
    assert torch.equal(other.sample(3, steps=2, generator=seeded()), model.sample(3, steps=2, generator=seeded()))
    assert first.shape == (3, 2)
    with pytest.raises(RuntimeError, match=r"denoiser\.network\.first\.weight"):
        other.load_state_dict({key: value for key, value in state.items() if key != "network.first.weight"})


def test_a_run_of_a_former_version_goes_on_as_if_it_had_never_stopped(tmp_path):
    """That of 6 steps, from before the settings and tensors had their names of now."""
    data = genfuse.load_data("toy:moons")
    shutil.copytree(Path(__file__).parent / "former-run", tmp_path / "former")
    assert genfuse.Run(tmp_path / "former").model().config.hidden == (8, 8)
    models = []
    for out, resume in (("former", True), ("whole", False)):
        torch.manual_seed(0)
        model = genfuse.create("flow-matching", data, hidden=(8, 8), channels=(32, 64, 64))
        options = {"steps": 12, "batch_size": 64, "device": "cpu", "pictures": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # of another version, or number of threads
            models.append(genfuse.Trainer(out=tmp_path / out, resume=resume, **options).fit(model, data).model())
    former, whole = (model.state_dict() for model in models)
    assert int(former["averaged.updates"]) == 12
    for name, value in whole.items():
        torch.testing.assert_close(former[name], value, msg=name)
