import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import genfuse
from genfuse.applications import encode, examples, interpolate, reconstruct
from genfuse.errors import DataError, SettingsError

pytestmark = pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")


def test_codes_are_the_models_own_and_lead_back_to_the_rows(trained, odd):
    run = trained("nsf", hidden=32)
    found = examples(run, odd)
    z = encode(found)
    assert torch.allclose(z, run.model().encode(found.batch.x), atol=1e-5)
    restored = found.restored(reconstruct(found))
    rows = pd.read_csv(odd)[["age", "income", "noise"]]
    pd.testing.assert_frame_equal(restored, rows, rtol=1e-3, atol=1e-3)


def test_between_two_examples_the_ends_are_the_examples(trained):
    run = trained("realnvp", "digits", steps=2, channels=8)
    found = examples(run, "digits")
    between = interpolate(found, steps=3, pairs=4)
    assert between.shape == (4, 3, 1, 8, 8)
    x = found.batch.x[:8]
    assert torch.allclose(between[:, 0], x[::2], atol=1e-3)
    assert torch.allclose(between[:, -1], x[1::2], atol=1e-3)
    of_vae = interpolate(examples(trained("vae", "digits", steps=2), "digits"), steps=4, pairs=2)
    model = trained("vae", "digits", steps=2).model()
    assert torch.allclose(of_vae[:, 0], model.reconstruct(x[:4:2]).detach(), atol=1e-5)


def test_what_a_model_lacks_is_named(trained, odd):
    found = examples(trained("edm", hidden=(32, 32)), odd)
    for verb in (encode, reconstruct, interpolate):
        with pytest.raises(SettingsError, match=r"a EDM has no .*; it has: sample, log_prob, elbo"):
            verb(found)
    flow = trained("nsf", hidden=32)
    with pytest.raises(SettingsError, match="got 1 examples and 10 steps"):
        interpolate(examples(flow, np.array([[50.0, 50000.0, 0.0]])))


def test_a_run_is_used_in_another_process_in_three_lines(trained, odd):
    run = genfuse.Run(trained("nsf", hidden=32).path)
    assert encode(examples(run, odd)).shape == (60, 3)


def test_a_grey_picture_is_read_as_a_run_in_colour_reads_it(tmp_path):
    r = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(r.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    grey = tmp_path / "9.png"
    Image.fromarray(r.integers(0, 256, (9, 9), dtype=np.uint8)).save(grey)
    (tmp_path / "cut.png").write_bytes(grey.read_bytes()[:60])
    data = genfuse.load_data(f"images:{tmp_path}", size=8, mode="auto", damaged="skip")
    run = genfuse.Trainer(steps=1, out=tmp_path / "run").fit(genfuse.create("vae", data, hidden=8, network="mlp"), data)
    assert examples(run, grey).batch.x.shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=r"^the picture .*cut\.png cannot be read: "):
        examples(run, tmp_path / "cut.png")
