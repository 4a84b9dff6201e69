"""Clips: what is drawn of them, and models that take none."""

import numpy as np
import pytest
import torch
from PIL import Image

import genfuse
from genfuse.cli import main
from genfuse.cli.train import _summary
from genfuse.data import Dataset, Split
from genfuse.errors import SettingsError
from genfuse.plots import animation


@pytest.fixture(scope="module")
def clips():
    x = torch.randint(0, 256, (40, 4, 1, 8, 12), generator=torch.Generator().manual_seed(0)).byte()
    return Dataset("clips:4,12", {"train": Split(x), "test": Split(x[:8])}, levels=256)


def test_a_diffusion_model_learns_clips_and_their_pictures_are_frames_in_a_row(clips, tmp_path):
    model = genfuse.create("edm", clips, channels=(8, 8))
    trainer = genfuse.Trainer(steps=2, batch_size=8, device="cpu", out=tmp_path / "run")
    run = trainer.fit(model, clips)
    assert run.model().sample(2, steps=2).shape == (2, 4, 1, 8, 12)
    assert (run.path / "pictures" / "samples.png").is_file()
    assert any("--n 16 --out clip.gif" in line for line in _summary(run))  # what to do next
    for kind in ("gif", "mp4", "png", "npy"):
        if kind == "mp4":
            pytest.importorskip("imageio_ffmpeg")
        out = tmp_path / f"clip.{kind}"
        assert main(["sample", str(run.path), "--n", "3", "--steps", "2", "--out", str(out)]) == 0
        assert out.stat().st_size > 100


def test_an_animation_has_every_frame(tmp_path):
    moving = torch.eye(5)[None, :, None, None].expand(2, 5, 1, 5, 5)
    animation(moving, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 5
        for i in range(5):
            picture.seek(i)
            frame = np.asarray(picture.convert("L"))
            bright = np.flatnonzero((frame > 200).any(0))
            assert bright.min() // 13 == i  # each cell is enlarged to 13 pixels


def test_models_that_take_no_clips_refuse_them(clips, tmp_path, capsys):
    with pytest.raises(SettingsError, match="cannot make examples of shape"):
        genfuse.create("wgan-gp", clips, network="dcgan")
    digits = genfuse.load_data("digits")
    run = genfuse.Trainer(steps=1, device="cpu", pictures=False, out=tmp_path / "run")
    run.fit(genfuse.create("edm", digits, channels=(8,)), digits)
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "a.gif")]) == 2
    assert "a .gif shows clips (T, C, H, W), but" in capsys.readouterr().err
