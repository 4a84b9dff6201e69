"""Images that are made of images: tasks, models of them, `genfuse upscale`, and how well they are measured."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import genfuse
from genfuse import applications, metrics, nn
from genfuse.cli import main
from genfuse.data import resized
from genfuse.errors import DataError, SettingsError

TASK = "super-resolution:2"


@pytest.fixture(scope="module")
def data():
    return genfuse.load_data("digits", task=TASK)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Runs of a model of least squared error, and of a diffusion model."""
    found = {}
    settings = {"wgan-gp": {"adversarial_weight": 0.0, "channels": (16,), "blocks": 2}, "edm": {"channels": (16, 16)}}
    for (name, of_model), steps in zip(settings.items(), (200, 80), strict=True):
        torch.manual_seed(0)
        trainer = genfuse.Trainer(steps=steps, lr=3e-3, batch_size=32, device="cpu", pictures=False,
                                  out=tmp_path_factory.mktemp("runs") / name)  # fmt: skip
        found[name] = trainer.fit(genfuse.create(name, data, **of_model), data)
    return found


def test_a_small_image_is_the_mean_of_its_cells_as_pillow_makes_it(data):
    x, y = data.batch("test", slice(0, 20))
    assert (data.given, data.condition, data.classes, y.shape) == ((1, 4, 4), 0, None, (20, 1, 4, 4))
    torch.testing.assert_close(y, resized(x, (4, 4), "box"), atol=1.01 / 255, rtol=0)
    assert genfuse.load_data("digits", **data.options).fingerprint() == data.fingerprint()


def test_other_tasks_give_grey_and_an_image_with_a_hole():
    images = (np.random.default_rng(0).random((20, 3, 8, 8)) * 255).astype(np.uint8)
    grey = genfuse.load_data(images, task="colorize").batch("train", slice(0, 4))
    pixels = (grey.x[0] * 255).round().byte().permute(1, 2, 0).numpy()
    pillow = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L"))) / 255
    torch.testing.assert_close(grey.y[0, 0], pillow, atol=1.01 / 255, rtol=0)
    x, y = genfuse.load_data(images, task="inpaint:4").batch("train", slice(0, 4))
    assert not y[:, :, 2:6, 2:6].any()
    assert torch.allclose(y[:, :, 6:], x[:, :, 6:])


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("digits", {"task": "super-resolution:3"}, "3 must divide both sides of the images, 8 x 8"),
        ("digits", {"task": "super-resolution:1"}, "at least 2"),
        ("digits", {"task": "super-resolution:8"}, "leave 2 cells"),
        ("digits", {"task": "super-resolution"}, "tasks are: super-resolution"),
        ("digits", {"task": "super-resolution:x"}, "tasks are"),
        ("digits", {"task": "deblur"}, "tasks are"),
        ("digits", {"task": "colorize"}, "grey already"),
        ("digits", {"task": "inpaint:8"}, "below 8"),
        ("toy:moons", {"task": TASK}, "it is for images of levels"),
        ("digits", {"task": TASK, "binarize": "dynamic"}, "not drawn anew"),
    ],
)
def test_tasks_that_cannot_be_are_refused(name, options, problem):
    with pytest.raises(DataError, match=problem):
        genfuse.load_data(name, **options)


def test_models_that_take_no_image_are_refused_by_name_before_they_are_trained(data):
    for name, called in (("vae", "VAE"), ("glow", "Glow"), ("maf", "MAF")):
        with pytest.raises(SettingsError, match=f"takes none, as a {called}: use edm"):
            genfuse.Trainer(steps=1, device="cpu").fit(genfuse.create(name, data), data)
    with pytest.raises(SettingsError, match="gives no image with each example"):
        genfuse.create("edm", data).check_data(genfuse.load_data("digits"))
    with pytest.raises(SettingsError, match="network 'mlp' cannot be given images"):
        genfuse.create("edm", data, network="mlp")


@pytest.mark.parametrize("model", ["ddpm", "score", "flow-matching", "gan", "wgan", "wgan-gp"])
def test_others_train_and_draw_images_of_any_size(model, data):
    made = genfuse.create(model, data, channels=(8,) if "gan" in model else (8, 8))
    genfuse.Trainer(steps=3, batch_size=8, device="cpu", flip=True).fit(made, data)
    options = {} if "gan" in model else {"steps": 2}
    assert made.eval().sample(2, y=torch.rand(2, 1, 5, 9), **options).shape == (2, 1, 10, 18)


def test_an_augmented_image_is_given_with_what_is_made_of_it(data):
    x = data.batch("train", slice(0, 5)).x.flip(3)
    assert torch.allclose(data.given_of(x), data.batch("train", slice(0, 5)).y.flip(3))


def test_least_squared_error_beats_bicubic_and_the_metrics_are_those_of_libraries(runs, data):
    found = metrics.restoration(runs["wgan-gp"].model(), data, n=100, features="pixels")["methods"]
    assert found["model"]["psnr"] > found["bicubic"]["psnr"] + 1
    assert found["model"]["ssim"] > found["bicubic"]["ssim"]
    x, y = data.batch("test", metrics._evaluate.some(297, 100, 0))
    from torchmetrics.functional.image import peak_signal_noise_ratio

    each = [
        peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(resized(y, (8, 8), "lanczos"), x, strict=True)
    ]
    assert found["lanczos"]["psnr"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)
    diffusion = metrics.restoration(runs["edm"].model(), data, n=40)["methods"]
    assert diffusion["model, one step"]["psnr"] > diffusion["model"]["psnr"]  # the mean has the least squared error
    with pytest.raises(SettingsError, match=r"n in 1\.\.297"):
        metrics.restoration(runs["edm"].model(), data, n=298)


def test_tiles_are_the_whole_where_the_network_sees_less_than_their_overlap():
    torch.manual_seed(0)
    network = nn.Restorer(1, 1, 2, 8, 2)
    torch.nn.init.normal_(network.layers[-1].weight)
    y = torch.rand(1, 2, 61, 90)
    with torch.no_grad():
        whole, tiled = network._restore(y), nn.in_tiles(network._restore, y, tile=48, overlap=40)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(nn.in_tiles(network._restore, y, tile=90), whole)
    two = nn.in_tiles(
        lambda a, b: b + F.interpolate(a, scale_factor=3), y, torch.ones(1, 2, 183, 270), tile=32, overlap=0
    )
    torch.testing.assert_close(two, 1 + F.interpolate(y, scale_factor=3))


def test_seams_of_a_diffusion_model_are_no_larger_than_other_steps(runs):
    model = runs["edm"].model()
    y = F.interpolate(
        torch.rand(1, 1, 4, 20, generator=torch.Generator().manual_seed(0)), scale_factor=8, mode="bicubic"
    )
    big = applications.upscale(model, y.clamp(0, 1), steps=1)  # 32 x 160: two tiles of 128, whose overlap is 64..128
    steps = big.diff(dim=3).abs().mean((0, 1, 2))
    seam = steps[2 * 64 : 2 * 96]
    assert seam.max() <= 1.1 * max(steps[: 2 * 64].max(), steps[2 * 96 :].max())


def test_pictures_of_any_size_and_mode_become_as_much_larger(runs, tmp_path, capsys):
    run, rng = str(runs["wgan-gp"].path), np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, shape in {"a": (9, 14), "b": (7, 5, 3), "c": (6, 6, 4)}.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    assert main(["upscale", run, str(folder), "--out", str(tmp_path / "big")]) == 0
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "big").iterdir()}
    assert sizes == {"a.png": (28, 18), "b.png": (10, 14), "c.png": (12, 12)}
    said = capsys.readouterr()
    assert "b.png: 5x7 to 10x14, read as grey from mode RGB" in said.out
    assert "is transparent in part, and is read as on white" in said.err
    command = ["upscale", run, str(folder / "a.png"), "--out", str(tmp_path / "big.png")]
    assert main(command) == 0
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_what_cannot_be_enlarged_is_refused_clearly(runs, tmp_path, capsys, data):
    run, out = str(runs["wgan-gp"].path), ["--out", str(tmp_path / "out.png")]
    (tmp_path / "notes.txt").write_text("hallo")
    (tmp_path / "text.png").write_text("hallo")
    plain = genfuse.Trainer(steps=1, device="cpu", pictures=False, out=tmp_path / "plain")
    plain.fit(genfuse.create("edm", "digits", channels=(8,)), genfuse.load_data("digits"))
    Image.new("L", (4, 4)).save(tmp_path / "ok.png")
    cases = {
        (run, "notes.txt"): "is no picture",
        (run, "text.png"): "cannot be read: cannot identify",
        (run, "none.png"): "there is no file",
        (str(tmp_path / "plain"), "ok.png"): "this edm enlarges no images",
        (str(tmp_path), "ok.png"): "not a run folder|no config.json|config.json",
    }
    for (of, name), problem in cases.items():
        assert main(["upscale", of, str(tmp_path / name), *out]) == 2
        assert re.search(problem, capsys.readouterr().err), name
    assert not (tmp_path / "out.png").exists()
    with pytest.raises(SettingsError, match="steps are of diffusion models"):
        applications.upscale(runs["wgan-gp"].model(), torch.rand(1, 1, 4, 4), steps=2)
    with pytest.raises(SettingsError, match=r"images must be floats \(N, 1, h, w\)"):
        applications.upscale(runs["wgan-gp"].model(), torch.rand(1, 3, 4, 4))


def test_commands_show_what_was_given_beside_what_was_made(runs, tmp_path, capsys):
    run = str(runs["edm"].path)
    assert main(["sample", run, "--n", "4", "--steps", "2", "--out", str(tmp_path / "s.png")]) == 0
    assert Image.open(tmp_path / "s.png").size[0] > 100
    assert main(["evaluate", run, "--n", "20", "--json", str(tmp_path / "e.json")]) == 0
    shown = capsys.readouterr().out
    assert "bicubic" in shown
    assert "lanczos" in shown
    assert main(["sample", run, "--n", "2", "--label", "3", "--out", str(tmp_path / "t.png")]) == 2
    assert "is given images alone" in capsys.readouterr().err
