"""Clips: what is drawn of them, and models that take none."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import genfuse
from genfuse.cli import main
from genfuse.cli.train import _summary
from genfuse.data import Dataset, Split, augmented
from genfuse.errors import SettingsError
from genfuse.metrics import extractor, frechet_distance, train_features
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


def test_a_model_that_sees_clips_as_vectors_says_so_before_it_is_trained(clips):
    assert list(genfuse.create("edm", clips, channels=(8, 8)).doubts(clips)) == []
    for name in ("vae", "gan", "realnvp"):
        [doubt] = genfuse.create(name, clips).doubts(clips)
        assert f"this {name} see the 384 cells of a clip as a vector" in doubt


def test_models_that_take_no_clips_refuse_them(clips, tmp_path, capsys):
    with pytest.raises(SettingsError, match="cannot make examples of shape"):
        genfuse.create("wgan-gp", clips, network="dcgan")
    digits = genfuse.load_data("digits")
    run = genfuse.Trainer(steps=1, device="cpu", pictures=False, out=tmp_path / "run")
    run.fit(genfuse.create("edm", digits, channels=(8,)), digits)
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "a.gif")]) == 2
    assert "a .gif shows clips (T, C, H, W), but" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_clips_of_ones_own_go_from_a_file_to_pictures(channels, last, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (20, 4, channels, 8, 12), dtype=np.uint8)
    np.save("clips.npy", frames.transpose(0, 1, 3, 4, 2) if last else frames)
    data = genfuse.load_data("images:clips.npy")
    assert data.shape == (4, channels, 8, 12)
    assert len(data.splits["train"]) == 16
    assert torch.equal(data.splits["test"].x, genfuse.load_data(frames).splits["test"].x)
    small = ["--steps", "2", "--batch-size", "4", "--flip", "--shift", "2"]
    assert main(["train", "vae", "--data", "images:clips.npy", "--out", "run", *small]) == 0
    for picture in ("samples", "reconstructions"):
        assert (tmp_path / f"run/pictures/{picture}.png").is_file()
    assert main(["reconstruct", "run", "images:clips.npy", "--out", "pairs.png"]) == 0
    assert main(["interpolate", "run", "images:clips.npy", "--pairs", "2", "--steps", "3", "--out", "between.png"]) == 0
    with Image.open("pairs.png") as pairs, Image.open("between.png") as between:
        assert pairs.height > 4 * pairs.width  # 40 rows of four frames and a name
        assert between.width < between.height < 1.2 * between.width  # 6 rows of four frames
    assert main(["evaluate", "run", "--features", "random-conv"]) == 0
    assert "random-conv: 64 features" in capsys.readouterr().out
    assert main(["score", "run", "images:clips.npy", "--out", "odd.csv"]) == 0
    assert len((tmp_path / "odd.csv").read_text().splitlines()) == 21
    capsys.readouterr()
    assert main(["score", "run", "clips.npy", "--out", "other.csv"]) == 2
    assert "images and clips are read by images:PATH" in capsys.readouterr().err
    np.save("clips.npy", frames.astype(np.float32) / 255)
    assert main(["data", "describe", "images:clips.npy"]) == 2
    assert "clips.npy, frames: expected whole numbers 0..255" in capsys.readouterr().err


def test_features_of_clips_see_all_frames_and_tell_them_from_noise():
    x = torch.zeros(160, 4, 1, 12, 12, dtype=torch.uint8)
    for i in range(160):  # a square that moves to the right
        for t in range(4):
            x[i, t, 0, i % 8 : i % 8 + 4, 2 * t : 2 * t + 4] = 255
    data = Dataset("squares", {"train": Split(x[:80]), "test": Split(x[80:])}, levels=256)
    extract = extractor("auto", data)
    features = extract.of_samples(x[80:] / 255)
    assert (extract.name, features.shape) == ("random-conv", (80, 64))
    backwards, noise = extract.of_samples(x[80:].flip(1) / 255), extract.of_samples(torch.rand(80, *data.shape))
    same = frechet_distance(extract.of_samples(x[:80] / 255), features)
    assert 100 * same < frechet_distance(backwards, features) < frechet_distance(noise, features)
    labelled = {part: Split(x[:80] if part == "train" else x[80:], torch.arange(80) % 8) for part in ("train", "test")}
    assert train_features(Dataset("squares", labelled, levels=256, classes=8), steps=60)[1] > 0.9


def test_the_frames_of_a_clip_are_mirrored_and_moved_alike():
    x = torch.rand(16, 4, 3, 5, 6)
    made = augmented(x, True, 2, torch.Generator().manual_seed(0))
    each = [augmented(x[:, i], True, 2, torch.Generator().manual_seed(0)) for i in range(4)]
    assert torch.equal(made, torch.stack(each, 1))
    assert not torch.equal(made, x)


def test_a_film_without_its_writer_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SettingsError, match=r"pip install 'genfuse\[video\]'"):
        animation(torch.rand(1, 2, 1, 4, 4), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
