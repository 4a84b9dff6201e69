import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import genfuse
from genfuse._files import locked
from genfuse.errors import PluginError, RunError, RunWarning, SettingsError
from genfuse.training import Run, Trainer
from genfuse.training.checkpoint import Checkpoint


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


def test_weights_of_another_run_are_told_where_they_fit(run, make, digits, trainer, tmp_path):
    other = trainer(out=tmp_path / "other", seed=5).fit(make("tiny"), digits)
    (run.path / "model.safetensors").write_bytes((other.path / "model.safetensors").read_bytes())
    with pytest.warns(RunWarning, match="was not trained by the settings that config.json names: training seed: was 5"):
        Run(run.path).model()


def test_a_folder_whose_name_is_no_text_is_refused_before_anything_is_done(make, digits, trainer, tmp_path):
    with pytest.raises(RunError, match="take no path that is not UTF-8"):
        trainer(out=tmp_path / os.fsdecode(b"\xff")).fit(make("tiny"), digits)
    assert not list(tmp_path.iterdir())


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
    names = {"samples.png", "reconstructions.png", "interpolation.png", "latent.png", "curves.png", "progress.png"}
    names |= {"traversal.png", "traversal.gif"}
    assert {path.name for path in (run.path / "pictures").iterdir()} == names


# What was damaged or edited


def resume(run, make, digits, **changes):
    return Trainer.resuming(Run(run.path), **changes).fit(make("tiny"), digits)


def rewrite(path, change):
    """The facts in a safetensors file changed, and its checksum gone, as in a run that is older than them."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["genfuse"])
    facts.pop("sha256", None)
    tensors = load_file(path)
    change(facts, tensors)
    save_file(tensors, path, {"genfuse": json.dumps(facts)})


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "config.json", "metrics.jsonl"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(name, run, make, digits, same_weights):
    flips, path = random.Random(name), run.path / name
    whole = {file: (run.path / file).read_bytes() for file in os.listdir(run.path) if (run.path / file).is_file()}
    weights, metrics, config = run.model().state_dict(), run.metrics(), run.config
    noticed = 0
    for _ in range(60):
        raw = bytearray(whole[name])
        raw[flips.randrange(len(raw))] ^= 1 << flips.randrange(8)
        path.write_bytes(raw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RunWarning)
                again = Run(run.path)
                assert same_weights(again.model().state_dict(), weights)
                assert again.metrics() == metrics
                Checkpoint.newest(run.path)
            # Such as a blank in a header, or one digit of a checksum that nothing depends on.
            assert {**again.config, "sha256": 0} == {**config, "sha256": 0}
        except (RunError, RunWarning, PluginError):
            noticed += 1
        path.write_bytes(whole[name])
    assert noticed > 50


def test_weights_whose_checksum_fails_are_named(run):
    path = run.path / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RunError, match=r"model\.safetensors cannot be read: .*its checksum is not that of its content"):
        run.model()


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_what_is_lost(
    make, digits, trainer, tmp_path, same_weights
):
    whole = trainer(epochs=3, out=tmp_path / "whole").fit(make("tiny"), digits)
    run = trainer(epochs=2, out=tmp_path / "run").fit(make("tiny"), digits)
    state = run.path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1000])
    with pytest.warns(
        RunWarning, match=r"state\.safetensors cannot be read.*going on from state-1\.safetensors.* 15: "
    ):
        again = resume(run, make, digits, epochs=3)
    assert state.read_bytes() == (whole.path / "state.safetensors").read_bytes()
    assert same_weights(again.model().state_dict(), whole.model().state_dict())
    assert [entry["step"] for entry in again.metrics()] == [entry["step"] for entry in whole.metrics()]
    for file in ("state.safetensors", "state-1.safetensors"):
        (run.path / file).write_bytes(b"")
    with pytest.raises(RunError, match=r"/state\.safetensors cannot be read"):
        resume(run, make, digits, epochs=4)


@pytest.mark.parametrize(("keep", "steps"), [(1, [30]), (2, [30, 20]), (3, [30, 20, 10]), (9, [30, 20, 10, 0])])
def test_as_many_checkpoints_are_kept_as_asked_for(keep, steps, make, digits, trainer, tmp_path):
    options = {"steps": 30, "checkpoint_every": 10, "keep_checkpoints": keep}
    run = trainer(**options, out=tmp_path / "run").fit(make("tiny"), digits)
    names = ["state.safetensors", *(f"state-{k}.safetensors" for k in range(1, len(steps)))]
    assert [Checkpoint.read(run.path, name).facts["step"] for name in names] == steps
    assert len(list(run.path.glob("state*"))) == len(steps)
    resume(run, make, digits, steps=40, keep_checkpoints=1)  # which is free to change
    assert len(list(run.path.glob("state*"))) == 1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "lr", 0.5),
        ("training", "seed", 7),
        ("training", "batch_size", 10),
        ("training", "grad_clip", 0.1),
        ("data", "fingerprint", "0" * 16),
        ("data", "binarize", "dynamic"),
    ],
)
def test_an_edited_config_is_not_resumed_and_the_edit_is_named(section, key, value, run, make, digits):
    edit(run, **{section: {**run.config[section], key: value}})
    with pytest.warns(RunWarning, match=r"config\.json is not as genfuse wrote it"), pytest.raises(RunError, match=key):
        resume(run, make, digits)


def test_an_edited_setting_is_refused_where_the_weights_fit_all_the_same(run):
    edit(run, model={"name": "tiny", "settings": {**run.config["model"]["settings"], "seconds_per_step": 0.1}})
    with pytest.warns(RunWarning), pytest.raises(RunError, match=r"seconds_per_step: was 0\.0, now 0\.1"):
        Run(run.path).model()


@pytest.fixture
def table_run(tmp_path, trainer):
    table = tmp_path / "table.csv"
    rows = np.random.default_rng(0).normal([170, 60], [7, 11], size=(100, 2))
    np.savetxt(table, rows, delimiter=",", header="height,weight", comments="")
    data = genfuse.load_data(f"csv:{table}")
    model = genfuse.create("vae", data, decoder="gaussian", latent_dim=1, hidden=(8,))
    return trainer(epochs=1, out=tmp_path / "run").fit(model, data)


@pytest.mark.parametrize(("key", "value"), [("mean", [170.0, 61.0]), ("std", [1.0, 1.0]), ("names", None)])
def test_an_edited_scaling_gives_no_numbers(key, value, table_run):
    edit(table_run, data={**table_run.config["data"], "scaling": {**table_run.config["data"]["scaling"], key: value}})
    with pytest.warns(RunWarning):
        run = Run(table_run.path)
    with pytest.raises(RunError, match="data scaling: was"):
        run.scaling  # noqa: B018
    with pytest.raises(RunError, match=key):
        run.data()


def test_every_split_is_in_the_fingerprint_and_what_changed_is_said(tmp_path, trainer):
    tables = {}
    for part, n in (("train", 60), ("validation", 20), ("test", 20)):
        tables[part] = np.random.default_rng(n).normal(size=(n, 2))
        np.save(tmp_path / part, tables[part])
    data = genfuse.load_data(f"npy:{tmp_path}")
    make = lambda: genfuse.create("vae", data, decoder="gaussian", latent_dim=1, hidden=(8,))  # noqa: E731
    run = trainer(epochs=1, out=tmp_path / "run").fit(make(), data)
    for part in ("validation", "test"):
        np.save(tmp_path / part, tables[part] + [[0, 1e-3]])
        with pytest.raises(RunError, match=rf"the {part} split has changed; the train split is the same"):
            run.data()
        with pytest.raises(RunError, match=rf"the {part} split has changed"):
            Trainer.resuming(run, epochs=2).fit(make(), genfuse.load_data(f"npy:{tmp_path}"))
        np.save(tmp_path / part, tables[part])
    for part in tables:  # in other units: the same once they are standardized
        np.save(tmp_path / part, tables[part] * 1024)
    with pytest.raises(RunError, match="the std of its columns: was"):
        run.data()


def test_data_are_found_from_any_folder_and_where_they_have_moved_by_name(tmp_path, trainer, monkeypatch):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "t.npy", np.random.default_rng(0).normal(size=(60, 2)))
    monkeypatch.chdir(tmp_path / "a")
    data = genfuse.load_data("npy:t.npy")
    model = genfuse.create("vae", data, decoder="gaussian", latent_dim=1, hidden=(8,))
    run = trainer(epochs=1, out=tmp_path / "run").fit(model, data)
    monkeypatch.chdir(tmp_path)
    assert run.data().fingerprint() == data.fingerprint()
    shutil.move("a", "b")
    with pytest.raises(genfuse.errors.DataError, match=rf"no file or folder {tmp_path}/a/t.npy\n.*has moved.* --data"):
        run.data()
    assert run.data(name="npy:b/t.npy").fingerprint() == data.fingerprint()
    np.save("b/t.npy", np.zeros((60, 2)))
    with pytest.raises(RunError, match="the train split has changed; the test split has changed; the mean of"):
        run.data(name="npy:b/t.npy")


def age(path):
    """Make a run folder what genfuse wrote before there were checksums."""
    for file in path.glob("state-*"):
        file.unlink()
    for name in ("model.safetensors", "state.safetensors"):
        rewrite(path / name, lambda facts, tensors: facts.pop("config"))
    config = json.loads((path / "config.json").read_text())
    config["data"]["fingerprint"] = config["data"].pop("splits")["train"]
    for key in ("sha256", "torch", "threads"):
        del config[key]
    del config["training"]["keep_checkpoints"]
    (path / "config.json").write_text(json.dumps(config, indent=2))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "crc32"}) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)


def test_a_run_without_checksums_is_read_with_a_note_and_goes_on(run, make, digits, trainer, tmp_path):
    whole = trainer(epochs=3, out=tmp_path / "whole").fit(make("tiny"), digits)
    metrics, weights = run.metrics(), run.model().state_dict()
    age(run.path)
    with pytest.warns(RunWarning, match="of a genfuse without checksums: that its files are whole cannot be verified"):
        old = Run(run.path)
    assert old.metrics() == metrics
    assert all(torch.equal(weights[key], value) for key, value in old.model().state_dict().items())
    assert old.data().fingerprint() == digits.fingerprint()
    with pytest.warns(RunWarning):
        new = resume(run, make, digits, epochs=3)
    assert (new.path / "state.safetensors").read_bytes() == (whole.path / "state.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(new.path)


@pytest.mark.parametrize(("key", "value"), [("torch", "1.0"), ("genfuse", "0.0.1"), ("threads", 99)])
def test_a_resume_under_other_versions_or_threads_says_so(key, value, run, make, digits, monkeypatch):
    from genfuse._files import write_json

    write_json(run.path / "config.json", {**run.config, key: value}, 2)
    with pytest.warns(RunWarning, match=rf"was trained by {key} {value}, now .*: it goes on from the same state, but"):
        resume(run, make, digits)


def dropped(key):
    def change(facts, tensors):
        facts.pop(key, None)
        tensors.pop(key, None)

    return change


def put(key, value):
    def change(facts, tensors):
        (tensors if isinstance(value, torch.Tensor) else facts)[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dropped("step"), "it has no 'step'"),
        (dropped("processes"), "it has no 'processes'"),
        (dropped("scalars"), "it has no 'scalars'"),
        (put("step", "1"), "'step' is '1'"),
        (put("scaler", []), "'scaler' is"),
        (dropped("model.net.0.weight"), "net.0.weight"),
        (put("model.net.0.weight", torch.zeros(2)), "net.0.weight"),
        (put("optimizer.model.0.exp_avg", torch.zeros(2)), r"optimizer\.model\.0\.exp_avg has shape \(2,\)"),
        (dropped("optimizer.model.0.exp_avg"), r"no optimizer\.model\.0\.exp_avg"),
        (put("optimizer.other.0.exp_avg", torch.zeros(2)), "other"),
        (put("optimizer.model.99.exp_avg", torch.zeros(2)), r"optimizer\.model\.99"),
        (put("optimizer.model", torch.zeros(2)), "state.safetensors does not fit"),
        (put("generator.cpu", torch.zeros(3)), "state.safetensors does not fit"),
        (put("generator.cpu", torch.zeros(1, 9, dtype=torch.uint8)), "state.safetensors does not fit"),
        (put("best.net.0.weight", torch.zeros(2)), r"it has no 'best\.step'"),
    ],
)
def test_a_state_that_lacks_or_has_what_it_should_not_is_named(change, said, run, make, digits):
    for file in run.path.glob("state-*"):
        file.unlink()
    rewrite(run.path / "state.safetensors", change)
    with pytest.raises(RunError, match=said) as caught:
        resume(run, make, digits)
    assert "state.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("model"), "it has no 'model.name'"),
        (lambda c: c.update(model=["a"]), "it has no 'model.name'"),
        (lambda c: c["model"].pop("settings"), "it has no 'model.settings'"),
        (lambda c: c["data"].update(seed="3"), "'data.seed' is '3'"),
        (lambda c: c["data"].update(seed=-1), "'data.seed' is -1"),
        (lambda c: c["data"].update(seed=True), "'data.seed' is True, which is no number"),
        (lambda c: c["training"].update(batch_size=True), "'training.batch_size' is True, which is no number"),
        (lambda c: c["data"].update(options={"name": "csv:x"}), "'data.options' is"),
        (lambda c: c["data"].update(class_names=5), "'data.class_names' is 5"),
        (lambda c: c["data"].update(root=5), "'data.root' is 5"),
        (lambda c: c["data"].update(splits=[]), "'data.splits' is"),
        (lambda c: c["data"].update(shape=[1, "8"]), "'data.shape' is"),
        (lambda c: c["data"].update(scaling={"mean": [0.0], "std": [1.0], "names": None}), "has 1 columns, but"),
        (lambda c: c["data"].update(scaling={"mean": [10**400], "std": [1], "names": None}), "which is too large"),
        (lambda c: c["data"].update(scaling={"mean": 1}), "'data.scaling.mean' is 1"),
        (lambda c: c["training"].update(epochs="many"), "'training.epochs' is 'many'"),
        (lambda c: c["training"].update(epochs=0), "training: epochs must be at least 1"),
        (lambda c: c["training"].update(colour=1), "'training.colour' is no option"),
        (lambda c: c.update(training=None), "'training' is None"),
        (lambda c: c["training"].pop("seed"), "it has no 'training.seed'"),
    ],
)
def test_a_config_that_lacks_or_has_what_it_should_not_is_named(change, said, run):
    config = json.loads((run.path / "config.json").read_text())
    change(config)
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"config\.json is not the config\.json of a run: .*{said}"):
        Run(run.path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{}", "it has no 'step'"),
        (b"null", "an object with step, epoch and split is wanted; got None"),
        (b"[]", "wanted; got \\[\\]"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"step": 1, "epoch": 1, "split": "train"}', "it has no 'player'"),
        (b'{"step": 1, "epoch": 1, "split": "train", "player": "a", "loss": "x"}', "'loss' is 'x'"),
        (b'{"step": 1, "epoch": 1, "split": "epoch", "seconds": 1, "crc32": "00000000"}', "checksum crc32"),
    ],
)
def test_a_line_of_metrics_that_is_damaged_is_named(line, said, run, make, digits):
    path = run.path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(RunError, match=rf"metrics\.jsonl, line 1: .*{said}"):
        run.metrics()
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 1"):
        resume(run, make, digits)


@pytest.mark.parametrize("raw", [b"", b"[" * 200_000, b"\xff\xfe\x00", b"null", b"3", b'"version"'])
def test_what_is_no_json_is_no_run(raw, run):
    (run.path / "config.json").write_bytes(raw)
    with pytest.raises(RunError, match=r"config\.json is not the config\.json of a run"):
        Run(run.path)


@pytest.mark.parametrize("metadata", [None, {}, {"genfuse": "{"}, {"genfuse": "[]"}, {"genfuse": "[" * 100_000}])
def test_weights_without_their_facts_are_named(metadata, run):
    path = run.path / "model.safetensors"
    save_file(load_file(path), path, metadata)
    for use in (run.model, lambda: run.step, lambda: run.scaling):
        with pytest.raises(RunError, match=r"model\.safetensors cannot be read"):
            use()


def test_stray_files_are_passed_over_and_damaged_samples_do_not_end_a_training(run, make, digits):
    progress = run.path / "progress"
    progress.mkdir()
    for name in ("._00000001.npy", "x.npy", "1.npy"):
        (progress / name).write_bytes(b"\0\1")
    assert run.progress() == {}
    (progress / "00000001.npy").write_bytes(b"\0\1")
    with pytest.raises(RunError, match=r"00000001\.npy cannot be read"):
        run.progress()
    with pytest.warns(RunWarning, match=r"progress\.png is not drawn: .*00000001\.npy"):
        resume(run, make, digits, epochs=3, pictures=True)
    assert (run.path / "pictures" / "samples.png").is_file()


# Folders of strangers, of others, and of one's own


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "state.safetensors", "state-1.safetensors", "config.json", "metrics.jsonl",
        "evaluation.json", "tensorboard", "progress", "pictures", "tensorboard/x", "pictures/samples.png",
        "progress/00000000.npy", ".config.json.new", ".lock",
    ],
)  # fmt: skip
def test_a_link_in_a_run_folder_is_refused_and_nothing_is_written_through_it(name, run, make, digits, tmp_path):
    victim = tmp_path / "victim"
    for folder in ("progress", "pictures"):
        (run.path / folder).mkdir()
    victim.mkdir()
    target = victim / "precious"
    target.write_text("mine")
    path = run.path / name
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(victim)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    for act in (lambda: Run(run.path), lambda: Trainer.resuming(run, epochs=3).fit(make("tiny"), digits)):
        with pytest.raises(RunError, match=f"{path} is a symbolic link, which a run folder must not hold: remove it"):
            act()
    assert [each.name for each in victim.iterdir()] == ["precious"]
    assert target.read_text() == "mine"


@pytest.mark.parametrize("there", [True, False])
def test_the_folder_itself_may_be_a_link(there, make, digits, trainer, tmp_path):
    real, out = tmp_path / "big disk", tmp_path / "run"
    if there:
        real.mkdir()
    out.symlink_to(real)
    run = trainer(epochs=1, out=out).fit(make("tiny"), digits)
    run = Trainer.resuming(run, epochs=2).fit(make("tiny"), digits)
    trainer(epochs=1, out=out, overwrite=True).fit(make("tiny"), digits)
    assert out.is_symlink()
    assert (real / "config.json").is_file()
    with locked(real), pytest.raises(RunError, match="is being written to by process"):
        resume(run, make, digits)


def test_overwrite_leaves_what_is_the_users(run, make, digits, trainer, tmp_path):
    mine = [
        run.path / name for name in ("notes.md", "plot.py", "code/a.py", "tensorboard/mine", "model.safetensors.bak")
    ]
    mine += [tmp_path / ".run.new" / "x", tmp_path / ".run.new.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (run.path / "evaluation.json").touch()
    old = (run.path / "model.safetensors").read_bytes()
    trainer(out=run.path, overwrite=True, epochs=1).fit(make("duel"), digits)
    assert all(path.read_text() == "mine" for path in mine)
    assert not (run.path / "evaluation.json").exists()
    assert (run.path / "model.safetensors").read_bytes() != old
    assert len(list((run.path / "tensorboard").glob("events*"))) == 1


def test_a_kill_while_a_run_appears_is_in_nobodys_way(make, digits, trainer, tmp_path, monkeypatch):
    from genfuse.training import run as module

    for overwrite in (False, True):
        for moment in range(4):
            out = tmp_path / f"{overwrite}{moment}"
            if overwrite:
                trainer(epochs=1, out=out).fit(make("tiny"), digits)
            moments, replace, rmtree = iter(range(9)), os.replace, shutil.rmtree

            def killed(*paths, moments=moments, moment=moment, replace=replace):
                if paths[1].parent.name[:6] != ".stage" and next(moments) == moment:
                    raise KeyboardInterrupt
                replace(*paths)

            monkeypatch.setattr(module.os, "replace", killed)
            monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # what a kill does not do either
            monkeypatch.setattr(type(out), "rmdir", lambda path: None)
            if moment < 3:
                with pytest.raises(KeyboardInterrupt):
                    trainer(epochs=1, out=out, overwrite=overwrite).fit(make("tiny"), digits)
            monkeypatch.undo()
            new = trainer(epochs=1, out=out, overwrite=overwrite).fit(make("tiny"), digits)
            assert new.step == 15
            assert not list(out.glob(".*"))
            assert rmtree is shutil.rmtree


def test_two_new_trainings_into_one_folder_do_not_mix(make, digits, trainer, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(RunError, match="is being written to by process"):
        trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file_and_the_checkpoint_that_is_whole(run, make, digits, monkeypatch):
    from genfuse import _files

    done = iter(range(99))

    def full(file, fsync=os.fsync):
        if next(done) > 12:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full)
        with pytest.raises(
            RunError, match=r"stopped at step \d+: .*No space left on device: '.*/run/.*'; the last good ch"
        ):
            resume(run, make, digits, epochs=4)
    assert 30 <= Checkpoint.read(run.path).facts["step"] < 60
    resume(run, make, digits, epochs=4)
    assert Checkpoint.read(run.path).facts["step"] == 60


def obey_permissions():
    """In a process that is started: root may no longer write where nobody may."""
    CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs permissions that root obeys too")
def test_a_run_that_cannot_be_written_to_is_evaluated_sampled_and_compared(tmp_path):
    from genfuse.cli import main

    out = tmp_path / "run"
    assert main(["train", "vae", "--data", "digits", "--steps", "2", "--no-pictures", "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    out.chmod(0o555)
    few = ["--limit", "5", "--n", "70"]
    commands = [
        ["evaluate", out, *few, "--samples", "2", "--json", tmp_path / "numbers.json"],
        ["sample", out, "--out", tmp_path / "x.npy"],
        ["compare", out, "--out", tmp_path / "compared", "--features", "random-conv", *few],
        ["train", "--resume", out, "--epochs", "3"],
    ]
    code = f"from genfuse.cli import main; print([main(each) for each in {[[*map(str, c)] for c in commands]!r}])"
    started = [sys.executable, "-c", code]
    done = subprocess.run(started, capture_output=True, text=True, preexec_fn=obey_permissions)
    assert done.stdout.endswith("[0, 0, 0, 2]\n"), done.stderr
    assert "frechet distance" in done.stdout
    assert f"{out} cannot be written to, so it has no evaluation.json of this" in done.stderr
    assert "failed" not in done.stderr
    assert "genfuse: error: [Errno 13] Permission denied" in done.stderr
    assert json.loads((tmp_path / "numbers.json").read_text())["samples"]["n"] == 70
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_keep_checkpoints_is_at_least_one():
    with pytest.raises(SettingsError, match="keep_checkpoints must be at least 1, got 0"):
        genfuse.Trainer(keep_checkpoints=0)
