import json

import pytest
import torch

import genfuse
from genfuse.errors import PluginError, RunError
from genfuse.training import Run


@pytest.fixture
def run(make, digits, trainer, tmp_path):
    return trainer(out=tmp_path / "run").fit(make("tiny"), digits)


def edit(run, **changes):
    path = run.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_folder_holds_what_was_trained_on_what_and_how(run, digits):
    assert {path.name for path in run.path.iterdir()} == {
        "config.json", "model.safetensors", "state.safetensors", "state-1.safetensors", "metrics.jsonl", "tensorboard"
    }  # fmt: skip
    assert run.config["version"] == 1
    assert run.config["genfuse"] == genfuse.__version__
    assert run.config["model"] == {
        "name": "tiny",
        "settings": {"shape": [1, 8, 8], "width": 16, "seconds_per_step": 0.0},
    }
    assert run.config["data"]["name"] == "digits"
    assert run.config["data"]["fingerprint"] == digits.fingerprint()
    assert run.config["training"]["epochs"] == 2
    assert run.scaling is None
    assert run.data().fingerprint() == digits.fingerprint()


def test_the_model_comes_back_in_evaluation_mode_and_no_random_number_is_used(
    make, digits, trainer, tmp_path, same_weights
):
    model = make("tiny")
    run = trainer(out=tmp_path / "run").fit(model, digits)
    state = torch.get_rng_state()
    loaded = run.model()
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config
    assert not loaded.training


def test_a_table_keeps_its_scaling(tmp_path, trainer):
    table = tmp_path / "table.csv"
    table.write_text("height,weight\n" + "".join(f"{170 + i % 7},{60 + i % 11}\n" for i in range(100)))
    data = genfuse.load_data(f"csv:{table}")
    model = genfuse.create("vae", data, decoder="gaussian", latent_dim=1, hidden=(8,))
    run = trainer(out=tmp_path / "run").fit(model, data)
    assert Run(run.path).scaling == data.scaling
    table.write_text("height,weight\n" + "".join(f"{170 + i % 5},{60 + i % 11}\n" for i in range(100)))
    with pytest.raises(RunError, match=r"not what the run .* was trained on"):
        run.data()


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="there is no run folder"):
        Run(tmp_path / "absent")
    with pytest.raises(RunError, match=r"no config\.json"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "something else"}')
    with pytest.raises(RunError, match=r"is not the config\.json of a run"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(RunError, match=r"is not the config\.json of a run"):
        Run(tmp_path)


def test_half_a_run_folder_is_refused(run, make, digits, trainer):
    (run.path / "state.safetensors").unlink()
    assert Run(run.path).model()  # good for all but resuming
    with pytest.raises(RunError, match=r"no state\.safetensors"):
        trainer(out=run.path, resume=True).fit(make("tiny"), digits)
    (run.path / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"half there.*no model\.safetensors"):
        Run(run.path)


def test_a_run_of_another_version_is_refused(run):
    edit(run, version=2)
    with pytest.raises(RunError, match="version 2"):
        Run(run.path)


def test_a_run_of_a_plugin_that_is_gone_names_it(run):
    edit(run, model={"name": "departed", "settings": {}})
    with pytest.raises(PluginError, match="departed"):
        Run(run.path).model()


def test_damaged_weights_are_named(run):
    weights = run.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
        run.model()


def test_weights_of_another_model_are_refused(run):
    edit(run, model={"name": "tiny", "settings": {"shape": [1, 8, 8], "width": 8}})
    with pytest.raises(RunError, match="does not fit"):
        Run(run.path).model()


def test_half_a_last_line_of_metrics_is_left_out(run):
    path = run.path / "metrics.jsonl"
    whole = run.metrics()
    path.write_text(path.read_text() + '{"step": 31, "los')
    assert run.metrics() == whole
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 1: not JSON"):
        run.metrics()


def test_tensorboard_has_the_same_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    expected = [entry["loss"] for entry in run.metrics() if entry["split"] == "test"]
    assert [event.value for event in events.Scalars("test/model/loss")] == pytest.approx(expected)


def test_an_existing_run_is_refused_and_left_alone(run, make, digits, trainer):
    before = (run.path / "state.safetensors").read_bytes()
    with pytest.raises(RunError, match="exists: choose another one, or ask for --resume or --overwrite"):
        trainer(out=run.path).fit(make("tiny"), digits)
    assert (run.path / "state.safetensors").read_bytes() == before


def test_overwrite_replaces_a_run(run, make, digits, trainer):
    (run.path / "pictures").mkdir()
    (run.path / "pictures/old.png").touch()
    new = trainer(out=run.path, overwrite=True, epochs=1).fit(make("duel"), digits)
    assert new.config["model"]["name"] == "duel"
    assert max(entry["step"] for entry in new.metrics()) == 15
    assert not (run.path / "pictures").exists()
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


def test_overwrite_deletes_nothing_that_is_not_a_run(make, digits, trainer, tmp_path):
    precious = tmp_path / "thesis" / "chapter.tex"
    precious.parent.mkdir()
    precious.write_text("words")
    with pytest.raises(RunError, match="will not be overwritten"):
        trainer(out=precious.parent, overwrite=True).fit(make("tiny"), digits)
    (precious.parent / "config.json").write_text('{"version": 1}')
    with pytest.raises(RunError, match="will not be overwritten"):
        trainer(out=precious.parent, overwrite=True).fit(make("tiny"), digits)
    with pytest.raises(RunError, match="not a folder"):
        trainer(out=precious, overwrite=True).fit(make("tiny"), digits)
    assert precious.read_text() == "words"


def test_an_empty_folder_is_used(make, digits, trainer, tmp_path):
    (tmp_path / "run").mkdir()
    assert trainer(epochs=1, out=tmp_path / "run").fit(make("tiny"), digits).metrics()


def test_pictures_are_drawn_by_what_the_model_can(make, digits, trainer, tmp_path):
    run = trainer(epochs=1, out=tmp_path / "run", pictures=True).fit(make("tiny"), digits)
    assert {path.name for path in (run.path / "pictures").iterdir()} == {"samples.png", "curves.png", "progress.png"}
    model = genfuse.create("vae", digits, hidden=(8,), latent_dim=3)
    run = trainer(epochs=1, out=tmp_path / "vae", pictures=True).fit(model, digits)
    names = {"samples.png", "reconstructions.png", "latent.png", "curves.png", "progress.png"}
    assert {path.name for path in (run.path / "pictures").iterdir()} == names
