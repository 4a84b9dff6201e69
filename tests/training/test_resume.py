"""A run that was stopped, in whatever way, ends in the same bytes as one that was not."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch

import genfuse
from genfuse import plugins
from genfuse._files import read_tensors
from genfuse.errors import NonFiniteLossError, RunError, SettingsError
from genfuse.training import Run, Trainer
from genfuse.training.checkpoint import Checkpoint

CLOCKS = ("seconds", "examples_per_second")


@pytest.fixture
def start():
    """Start `tiny_models.train` in a process of its own, quickly: it is forked from one that has imported all."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        [
            "genfuse.training",
            "genfuse.models.vae",
            "lightning_fabric",
            "torch.utils.tensorboard",
            "sklearn.datasets",
            "rich",
        ]
    )
    started = []

    def start(*args, **options):
        process = server.Process(target=tiny_models.train, args=args, kwargs=options)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def finish(process):
    process.join(120)
    assert process.exitcode == 0


def timeless(run):
    return [{key: value for key, value in entry.items() if key not in CLOCKS} for entry in run.metrics()]


def assert_same_run(a, b):
    for name in ("model.safetensors", "state.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert timeless(Run(a)) == timeless(Run(b))


def commit(out):
    """When the run was last saved, or None."""
    try:
        return (out / "state.safetensors").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.is_alive(), f"the training ended with {process.exitcode}"
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("name", "settings", "kills", "more"),
    [
        ("tiny", {}, 8, {}),
        ("tiny", {}, 4, {"steps": 204, "keep": "best", "lr": 1.0}),
        ("duel", {}, 3, {}),
        ("vae", {"hidden": (16,), "latent_dim": 2}, 3, {}),
    ],
)
def test_killed_again_and_again_and_resumed_it_ends_in_the_same_bytes(name, settings, kills, more, start, tmp_path):
    options = {"epochs": 24, "batch_size": 128, "checkpoint_every": 1, "log_every": 5, **more}
    finish(start(name, tmp_path / "whole", settings, **options))
    moments = random.Random(0)
    killed = tmp_path / "killed"
    steps = []
    for _ in range(kills):
        process = start(name, killed, settings, **options)
        for _ in range(2):  # its first checkpoint is of where it begins, the next one of a step
            before = commit(killed)
            wait_for(lambda: commit(killed) != before, process)  # noqa: B023
        time.sleep(moments.uniform(0, 0.1))  # a step and its checkpoint take some milliseconds: it lands anywhere
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(checkpointed_step(killed))
    assert steps == sorted(steps)
    assert 0 < steps[-1] < options.get("steps", 240)
    finish(start(name, killed, settings, **options))
    assert_same_run(tmp_path / "whole", killed)
    _, facts = read_tensors(killed / "model.safetensors")
    assert (facts["step"] < checkpointed_step(killed)) == ("keep" in options)  # the best ones are not the last
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


def checkpointed_step(out):
    return Checkpoint.read(out).facts["step"]


@pytest.mark.parametrize(
    ("number", "exitcode"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
)
def test_an_interrupt_saves_the_step_that_it_meets(number, exitcode, start, tmp_path):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and so it is by a training")
    options = {"epochs": 3, "batch_size": 100, "log_every": 2, "checkpoint_every": 1000}
    slow = {"seconds_per_step": 0.02}
    out = tmp_path / "run"
    process = start("tiny", out, slow, **options)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(Run(out).metrics()) >= 3, process)
    assert checkpointed_step(out) == 0
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == exitcode
    assert 6 <= checkpointed_step(out) < 45
    finish(start("tiny", out, slow, **options))
    finish(start("tiny", tmp_path / "whole", slow, **options))
    for name in ("model.safetensors", "state.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_interrupt_stops_at_once(start, tmp_path):
    out = tmp_path / "run"
    process = start("tiny", out, {"seconds_per_step": 60.0}, epochs=1)
    wait_for(lambda: (out / "tensorboard").exists(), process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130


@pytest.fixture
def handled():
    """Handlers of signals as a program of one's own may have them, and in the end those of the tests again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.signal
    for number, handler in before.items():
        signal.signal(number, handler)


class Interrupted(tiny_models.Plain):
    """A signal arrives in the step that then goes wrong, or not."""

    number, wrong = signal.SIGINT, True

    def loss(self, batch, player="model"):
        loss, terms = super().loss(batch, player)
        if len(self.seen) == 3 and self.training:
            os.kill(os.getpid(), self.number)
            loss = loss * (math.nan if self.wrong else 1)
        return loss, terms


def interrupted(**facts):
    model = type("Interrupted", (Interrupted,), facts)(tiny_models.Config())
    model.plugin = "plain"
    return model


def test_an_error_does_not_swallow_an_interrupt(handled, digits, trainer, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer(out=tmp_path / "run").fit(interrupted(), digits)
    assert isinstance(caught.value.__context__, NonFiniteLossError)


def test_a_run_that_was_stopped_is_not_taken_for_finished_whoever_handles_the_signal(
    handled, digits, trainer, tmp_path
):
    got = []
    handled(signal.SIGTERM, lambda number, frame: got.append(number))
    with pytest.raises(KeyboardInterrupt):
        trainer(out=tmp_path / "run").fit(interrupted(number=signal.SIGTERM, wrong=False), digits)
    assert got == [signal.SIGTERM]
    assert checkpointed_step(tmp_path / "run") == 3


def test_a_signal_that_is_ignored_stays_so(handled, digits, trainer, tmp_path):
    handled(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    run = trainer(out=tmp_path / "run").fit(interrupted(number=signal.SIGHUP, wrong=False), digits)
    assert checkpointed_step(run.path) == 30


def test_a_kill_between_the_two_renames_of_a_checkpoint_mixes_nothing(
    make, digits, trainer, tmp_path, same_weights, monkeypatch
):
    from genfuse.training import checkpoint as module

    def fail_on_weights(path, tensors, facts, write=module.write_tensors):
        if path.name == "model.safetensors" and facts["step"] == 15:
            raise KeyboardInterrupt
        write(path, tensors, facts)

    monkeypatch.setattr(module, "write_tensors", fail_on_weights)
    with pytest.raises(KeyboardInterrupt):
        trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    monkeypatch.undo()
    run = Run(tmp_path / "run")
    assert same_weights(run.model().state_dict(), make("tiny").state_dict())  # of step 0, whole
    Trainer.resuming(run).fit(make("tiny"), digits)
    whole = trainer(out=tmp_path / "whole").fit(make("tiny"), digits)
    assert_same_run(run.path, whole.path)


def test_a_kill_between_the_last_two_renames_is_mended(make, digits, trainer, tmp_path, monkeypatch):
    from genfuse.training import checkpoint as module

    whole = trainer(out=tmp_path / "whole").fit(make("tiny"), digits)

    def fail_on_weights(path, tensors, facts, write=module.write_tensors):
        if path.name == "model.safetensors" and facts["step"] == 30:
            raise KeyboardInterrupt
        write(path, tensors, facts)

    monkeypatch.setattr(module, "write_tensors", fail_on_weights)
    with pytest.raises(KeyboardInterrupt):
        trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    monkeypatch.undo()
    Trainer.resuming(Run(tmp_path / "run")).fit(make("tiny"), digits)
    assert_same_run(tmp_path / "run", whole.path)


@pytest.mark.parametrize("name", ["tiny", "duel"])
def test_more_epochs_continue_as_if_they_had_been_asked_for(name, make, digits, trainer, tmp_path):
    whole = trainer(epochs=4, out=tmp_path / "whole").fit(make(name), digits)
    parts = trainer(epochs=2, out=tmp_path / "parts").fit(make(name), digits)
    torch.manual_seed(99)
    Trainer.resuming(parts, epochs=4).fit(parts.model(), parts.data())
    assert_same_run(whole.path, parts.path)
    assert Run(parts.path).config["training"]["epochs"] == 4


def test_more_steps_continue_as_if_they_had_been_asked_for(make, digits, trainer, tmp_path):
    whole = trainer(steps=40, out=tmp_path / "whole").fit(make("tiny"), digits)
    parts = trainer(steps=20, out=tmp_path / "parts").fit(make("tiny"), digits)
    assert checkpointed_step(parts.path) == 20
    Trainer.resuming(parts, steps=40).fit(parts.model(), parts.data())
    for name in ("model.safetensors", "state.safetensors"):
        assert (whole.path / name).read_bytes() == (parts.path / name).read_bytes()
    with pytest.raises(RunError, match="has trained 40 steps, more than the 35: resume it with more steps"):
        Trainer.resuming(whole, steps=35).fit(make("tiny"), digits)


def test_augmented_and_streamed_batches_go_on_as_if_the_run_had_not_stopped(make, digits, trainer, tmp_path):
    streamed = replace(digits, streamed=True)
    options = {"flip": True, "shift": 1}
    whole = trainer(steps=40, out=tmp_path / "whole", **options).fit(make("tiny"), streamed)
    parts = trainer(steps=20, out=tmp_path / "parts", **options).fit(make("tiny"), streamed)
    Trainer.resuming(parts, steps=40).fit(parts.model(), streamed)
    memory = trainer(steps=40, out=tmp_path / "memory", **options).fit(make("tiny"), digits)
    plain = trainer(steps=40, out=tmp_path / "plain").fit(make("tiny"), digits)
    weights = [(run.path / "model.safetensors").read_bytes() for run in (whole, parts, memory, plain)]
    assert weights[0] == weights[1]
    same, other = (read_tensors(run.path / "model.safetensors")[0] for run in (memory, plain))
    found = read_tensors(whole.path / "model.safetensors")[0]
    assert all(torch.equal(found[name], same[name]) for name in found)
    assert not torch.equal(found["net.0.weight"], other["net.0.weight"])
    with pytest.raises(RunError, match="training shift: was 1, now 2"):
        Trainer.resuming(parts, shift=2, steps=50).fit(make("tiny"), streamed)


@pytest.mark.parametrize("options", [{"shift": 8}, {"flip": True}, {"shift": -1}])
def test_what_cannot_be_flipped_or_shifted_is_refused(make, digits, trainer, tmp_path, options):
    table = genfuse.load_data("toy:moons")
    model = genfuse.create("vae", table, decoder="gaussian")
    both = (make("tiny"), digits) if "shift" in options else (model, table)
    with pytest.raises(SettingsError, match=r"flip and shift are of images|shift must be at least 0"):
        trainer(**options).fit(*both)


def test_rows_are_smoothed_by_a_share_of_scotts_bandwidth_and_alike_where_a_run_goes_on(trainer, tmp_path, monkeypatch):
    table = genfuse.load_data("toy:moons")
    rows = table.splits["train"].x
    shown = []
    flow = plugins.find("models", "maf").load()
    loss = flow.loss

    def seen(model, batch, player="model"):
        shown.append(batch.x.detach().clone())
        return loss(model, batch, player)

    monkeypatch.setattr(flow, "loss", seen)

    def made():
        torch.manual_seed(0)
        return genfuse.create("maf", table, hidden=8, layers=1)

    options = {"smooth": 2.0, "batch_size": len(rows)}
    whole = trainer(steps=4, out=tmp_path / "whole", keep="last", **options).fit(made(), table)
    smoothed = torch.cat([x for x in shown if len(x) == len(rows)])
    variance = smoothed.var(0) - rows.var(0)  # of the noise alone
    torch.testing.assert_close(variance.sqrt(), 2 * len(rows) ** (-1 / 6) * rows.std(0), rtol=0.1, atol=0)
    parts = trainer(steps=2, out=tmp_path / "parts", keep="last", **options).fit(made(), table)
    Trainer.resuming(parts, steps=4).fit(made(), table)
    weights = [(run.path / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


def test_what_cannot_be_smoothed_is_refused(make, digits, trainer):
    with pytest.raises(SettingsError, match="smooth is of tables of real numbers; 'digits' is none"):
        trainer(smooth=0.5).fit(make("tiny"), digits)
    with pytest.raises(SettingsError, match="smooth must be a number of at least 0, got -1"):
        trainer(smooth=-1.0)


def test_sigterm_says_where_the_run_is_saved(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "genfuse", "train", "vae", "--data", "digits", "--out", out, "--epochs", "100000"]
    with subprocess.Popen([*command, "--no-pictures", "--device", "cpu"], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not ((out / "metrics.jsonl").exists() and len(Run(out).metrics()) >= 3) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert f"genfuse: SIGTERM: {out} is saved at step {checkpointed_step(out)}" in said


def test_a_run_that_is_older_than_an_option_is_resumed(make, digits, trainer, tmp_path):
    run = trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    for option in ("keep", "steps"):
        del config["training"][option]
    path.write_text(json.dumps(config))
    Trainer.resuming(Run(run.path), epochs=3).fit(make("tiny"), digits)
    assert checkpointed_step(run.path) == 45


def test_resuming_a_finished_run_changes_nothing(make, digits, trainer, tmp_path):
    run = trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    before = (run.path / "state.safetensors").read_bytes(), run.metrics()
    model = make("tiny")
    Trainer.resuming(run).fit(model, digits)
    assert ((run.path / "state.safetensors").read_bytes(), run.metrics()) == before
    assert torch.equal(model.net[0].weight, run.model().net[0].weight)


def test_what_was_logged_after_the_last_checkpoint_is_cut(make, digits, trainer, tmp_path):
    run = trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    lines = run.metrics()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 31, "epoch": 3, "split": "train", "player": "model", "loss": 1e9}) + "\n" + '{"st'
        )
    Trainer.resuming(run).fit(make("tiny"), digits)
    assert run.metrics() == lines


def test_every_difference_that_breaks_the_promise_is_named(make, digits, trainer, tmp_path):
    trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    other = trainer(out=tmp_path / "run", resume=True, batch_size=64, seed=3, lr=0.1, grad_clip=1.0, keep="best")
    with pytest.raises(RunError) as caught:
        other.fit(
            make("tiny", seconds_per_step=0.001), tiny_models.validated(genfuse.load_data("digits", binarize="static"))
        )
    for part in (
        "model seconds_per_step: was 0.0, now 0.001",
        "data binarize: was 'none', now 'static'",
        "data fingerprint",
        "training batch_size: was 100, now 64",
        "training seed: was 0, now 3",
        "training lr: was None, now 0.1",
        "training grad_clip: was None, now 1.0",
        "training keep: was 'last', now 'best'",
    ):
        assert part in str(caught.value)


def test_a_cosine_schedule_is_bound_to_its_number_of_epochs(make, digits, trainer, tmp_path):
    run = trainer(schedule="cosine", out=tmp_path / "run").fit(make("tiny"), digits)
    with pytest.raises(RunError, match="training epochs: was 2, now 3"):
        Trainer.resuming(run, epochs=3).fit(make("tiny"), digits)
    with pytest.raises(RunError, match="training steps: was None, now 60"):
        Trainer.resuming(run, steps=60).fit(make("tiny"), digits)


def test_fewer_epochs_than_were_trained_are_refused(make, digits, trainer, tmp_path):
    run = trainer(out=tmp_path / "run").fit(make("tiny"), digits)
    before = (run.path / "config.json").read_text()
    with pytest.raises(RunError, match="has trained 30 steps, more than the 15 of 1 epochs"):
        Trainer.resuming(run, epochs=1).fit(make("tiny"), digits)
    assert (run.path / "config.json").read_text() == before


def test_nothing_to_resume_is_an_error(make, digits, trainer, tmp_path):
    with pytest.raises(RunError, match=r"there is no run folder .* to resume"):
        trainer(out=tmp_path / "absent", resume=True).fit(make("tiny"), digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("name", ["plain", "duel"])
def test_two_processes_train_one_model(name, make, digits, trainer, tmp_path):
    data = tiny_models.validated(digits)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tiny_models.__file__, name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"whole-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    for file in ("model.safetensors", "state.safetensors"):
        assert Path(tmp_path, "whole", file).read_bytes() == Path(tmp_path, "parts", file).read_bytes()
    if name == "plain":  # without noise, the same as one process
        model = make("plain")
        trainer(batch_size=64, keep="best").fit(model, data)
        assert torch.allclose(ranks[0]["mean"], model.mean, atol=1e-5)
    with pytest.raises(RunError, match="number of processes: was 2, now 1"):
        Trainer.resuming(Run(tmp_path / "whole"), epochs=3).fit(make(name), data)
