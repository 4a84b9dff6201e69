import io
import math
import re
import sys
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import Config, Plain, Slope, Staged, Tiny, validated

import genfuse
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, DataWarning, NonFiniteLossError, RunError, SettingsError, TrainingWarning
from genfuse.training import Run, Trainer
from genfuse.training.process import NOISE, seed_of


def train_lines(run, player="model"):
    return [entry for entry in run.metrics() if entry["split"] == "train" and entry["player"] == player]


def test_training_lowers_the_loss_and_leaves_the_model_ready_to_use(make, digits, trainer, tmp_path):
    model = make("tiny")
    run = trainer(epochs=5, out=tmp_path / "run").fit(model, digits)
    test = [entry["loss"] for entry in run.metrics() if entry["split"] == "test"]
    assert len(test) == 5
    assert test[-1] < 0.7 * test[0]
    assert not model.training


def test_without_a_folder_nothing_is_written(make, digits, trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make("tiny")
    before = model.net[0].weight.clone()
    history = trainer().fit(model, digits)
    assert not torch.equal(model.net[0].weight, before)
    assert list(tmp_path.iterdir()) == []
    assert [step for step, _ in history.losses["train"]] == [15, 30]
    assert "train" in repr(history)
    assert "<img src=" in history._repr_html_()


def test_players_cycle_and_only_the_active_one_has_gradients(make, digits, trainer):
    model = make("duel")
    trainer(epochs=1).fit(model, digits)
    assert [player for player, _ in model.history] == (["critic", "critic", "generator"] * 5)[:15]
    for player, wanted in model.history:
        assert wanted == {name: name == player for name in ("critic", "generator")}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.abs().max() <= 0.05 for parameter in model.critic.parameters())


def counted(examples):
    return Counter(example.numpy().tobytes() for example in examples)


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own(make, digits, trainer):
    everything = digits.batch("train", slice(None)).x
    steps = math.ceil(len(everything) / 110)

    def seen(seed):
        model = make("plain")
        trainer(seed=seed, batch_size=110).fit(model, digits)
        epochs = model.seen[:steps], model.seen[steps:]
        assert [len(batch.x) for batch in epochs[1]] == [110] * (steps - 1) + [len(everything) % 110]
        return [torch.cat([batch.x for batch in epoch]) for epoch in epochs]

    first, second = seen(0)
    for epoch in (first, second):
        assert counted(epoch) == counted(everything)
    assert not torch.equal(first, second)
    assert torch.equal(first, seen(0)[0])
    assert not torch.equal(first, seen(1)[0])


def test_frozen_weights_stay(make, digits, trainer):
    model = make("tiny")
    trainer().fit(model, digits)
    assert torch.equal(model.frozen, torch.ones(64))
    assert not model.frozen.requires_grad


def test_global_generators_are_as_before(make, digits, trainer, tmp_path):
    model = make("tiny")
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    trainer(out=tmp_path / "run", pictures=True).fit(model, digits)
    assert torch.equal(torch.rand(3), expected)


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state(make, digits, trainer, same_weights):
    def weights(disturbance, seed):
        model = make("tiny")
        torch.manual_seed(disturbance)
        trainer(seed=seed).fit(model, digits)
        return model.state_dict()

    assert same_weights(weights(1, 0), weights(2, 0))
    assert not same_weights(weights(1, 0), weights(1, 1))


def test_learning_rate_and_cosine_schedule(make, digits, trainer, tmp_path):
    run = trainer(out=tmp_path / "run", lr=0.01, schedule="cosine", log_every=1).fit(make("tiny"), digits)
    rates = [entry["lr"] for entry in train_lines(run)]
    assert rates == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * i / 30)) for i in range(30)])


def test_steps_take_the_place_of_epochs(make, digits, trainer, tmp_path):
    run = trainer(steps=20, schedule="cosine", out=tmp_path / "run", log_every=1).fit(make("tiny"), digits)
    lines = train_lines(run)
    assert [entry["step"] for entry in lines] == list(range(1, 21))
    assert [entry["lr"] for entry in lines] == pytest.approx(
        [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 20)) for i in range(20)]
    )
    assert [(entry["step"], entry["epoch"]) for entry in run.metrics() if entry["split"] == "test"] == [
        (15, 1),
        (20, 2),
    ]


def test_without_lr_each_player_keeps_its_own(make, digits, trainer, tmp_path):
    run = trainer(out=tmp_path / "run").fit(make("duel"), digits)
    assert {entry["lr"] for entry in train_lines(run, "critic")} == {1e-2}
    assert {entry["lr"] for entry in train_lines(run, "generator")} == {1e-3}


def test_gradients_are_clipped_to_the_norm(make, digits, trainer):
    model = make("plain")  # SGD at 0.1 from 0; one step moves it by 0.1 of the clipped gradient
    trainer(epochs=1, batch_size=2000, grad_clip=0.5).fit(model, digits)
    assert model.mean.norm().item() == pytest.approx(0.05, rel=1e-5)


def test_clipping_with_a_gradient_scaler_sees_the_true_gradients(make, digits, trainer, tmp_path, monkeypatch):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    def half(self, players):  # the public way is refused without CUDA, but the scaler itself works on the CPU
        return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu"))

    monkeypatch.setattr(Trainer, "_fabric", half)
    model = make("plain")
    run = trainer(epochs=1, batch_size=2000, grad_clip=0.5, out=tmp_path / "run").fit(model, digits)
    assert model.mean.norm().item() == pytest.approx(0.05, rel=1e-3)
    again = make("plain")
    Trainer.resuming(run, epochs=2).fit(again, digits)
    assert again.mean.norm().item() == pytest.approx(0.1, rel=0.01)


def test_curves_hold_the_mean_since_the_last_line(make, digits, trainer, tmp_path):
    every = trainer(out=tmp_path / "a", log_every=1).fit(make("tiny"), digits)
    fourth = trainer(out=tmp_path / "b", log_every=4).fit(make("tiny"), digits)
    losses = {entry["step"]: entry["loss"] for entry in train_lines(every)}
    lines = train_lines(fourth)
    assert [entry["step"] for entry in lines] == [4, 8, 12, 15, 19, 23, 27, 30]
    for before, entry in zip([0, 4, 8, 12, 15, 19, 23, 27], lines, strict=True):
        window = [losses[step] for step in range(before + 1, entry["step"] + 1)]
        assert entry["loss"] == pytest.approx(sum(window) / len(window), rel=1e-5)
    assert [entry["epoch"] for entry in lines] == [1] * 4 + [2] * 4


def test_the_test_loss_is_the_mean_over_the_split_in_evaluation_mode(make, digits, trainer, tmp_path):
    model = make("plain")
    run = trainer(out=tmp_path / "run").fit(model, digits)
    test = [entry for entry in run.metrics() if entry["split"] == "test"][-1]
    with torch.no_grad():
        expected = model.loss(digits.batch("test", slice(None)))[0].item()
    assert test["loss"] == pytest.approx(expected, rel=1e-5)
    assert test["error"] == test["loss"]


def test_samples_from_the_same_noise_are_kept_at_moments_and_disturb_nothing(
    make, digits, trainer, tmp_path, same_weights
):
    kept = trainer(steps=20, log_every=7, out=tmp_path / "kept", pictures=True).fit(make("duel"), digits)
    bare = trainer(steps=20, log_every=7, out=tmp_path / "bare").fit(make("duel"), digits)
    assert same_weights(kept.model().state_dict(), bare.model().state_dict())
    assert (kept.path / "state.safetensors").read_bytes() == (bare.path / "state.safetensors").read_bytes()
    assert [e.get("loss") for e in kept.metrics()] == [e.get("loss") for e in bare.metrics()]
    assert not bare.progress()
    progress = kept.progress()
    assert list(progress) == [0, 2, 5, 8, 10, 12, 15, 18, 20]
    for step, model in ((0, make("duel")), (20, kept.model())):
        expected = model.sample(8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(progress[step], expected)


def test_a_resumed_run_keeps_the_samples_that_it_has(make, digits, trainer, tmp_path):
    run = trainer(steps=8, out=tmp_path / "run", pictures=True).fit(make("duel"), digits)
    Trainer.resuming(run, steps=24).fit(run.model(), digits)
    assert list(run.progress()) == [*range(9), 9, 12, 15, 18, 21, 24]
    assert (run.path / "pictures/progress.png").is_file()


def test_gradient_norms_of_several_players_are_logged(make, digits, trainer, tmp_path):
    options = {"epochs": 1, "batch_size": 2000}
    run = trainer(**options, out=tmp_path / "duel", log_every=1).fit(make("duel"), digits)
    (entry,) = train_lines(run, "critic")
    model = make("duel")
    torch.manual_seed(seed_of(0, NOISE, 0))
    loss, _ = model.loss(digits.batch("train", slice(None)), "critic")
    gradients = torch.autograd.grad(loss, list(model.critic.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert entry["gradient_norm"] == pytest.approx(expected, rel=1e-3)
    clipped = trainer(**options, out=tmp_path / "clipped", grad_clip=1e-3).fit(make("duel"), digits)
    assert train_lines(clipped, "critic")[0]["gradient_norm"] == pytest.approx(expected, rel=1e-3)
    alone = trainer(**options, out=tmp_path / "tiny").fit(make("tiny"), digits)
    assert "gradient_norm" not in train_lines(alone)[0]


def test_what_a_model_notices_is_told_once_by_name(digits, trainer, tmp_path):
    class Worried(Plain):
        def watch(self, player, step, terms):
            assert player == "model"
            assert terms.keys() == {"loss", "error"}
            return {"early": f"seen at {step}", **({"late": "try less"} if step >= 20 else {})}

    model = Worried(Config())
    model.plugin = "plain"
    with pytest.warns(TrainingWarning) as told:
        run = trainer(log_every=5, out=tmp_path / "run").fit(model, digits)
    assert [str(warning.message) for warning in told] == ["step 5: seen at 5", "step 20: try less"]
    kept = [(e["step"], e["name"], e["message"]) for e in run.metrics() if e["split"] == "warning"]
    assert kept == [(5, "early", "seen at 5"), (20, "late", "try less")]


@pytest.mark.parametrize("folder", [True, False])
def test_best_keeps_the_weights_of_the_lowest_validation_loss(folder, digits, trainer, tmp_path):
    class Wandering(Plain):
        """Its weights after each update are given: 12 updates an epoch."""

        def after_step(self, player):
            with torch.no_grad():
                self.mean.fill_({12: 0.9, 24: 0.3, 36: 0.8}.get(len(self.seen), 2.0))

    data = validated(digits)
    model = Wandering(Config())
    model.plugin = "plain"
    run = trainer(steps=40, keep="best", out=tmp_path / "run" if folder else None).fit(model, data)
    assert torch.equal(model.mean, torch.full((64,), 0.3))
    if not folder:
        assert not isinstance(run, Run)
        return
    assert torch.equal(run.model().mean, model.mean)
    lines = [entry for entry in run.metrics() if entry["split"] == "validation"]
    assert [entry["step"] for entry in lines] == [12, 24, 36, 40]
    x = data.batch("validation", slice(None)).x.flatten(1)
    assert lines[1]["loss"] == pytest.approx((x - 0.3).square().sum(1).mean().item(), rel=1e-5)
    again = Wandering(Config())
    again.plugin = "plain"
    Trainer.resuming(run).fit(again, data)
    assert torch.equal(again.mean, model.mean)


def small_table(rows=1250):
    """Rows of a density that a flow learns in 100 steps, and 1,000 to train on that it knows by heart after 600."""
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, rows, 6, generator=torch.Generator().manual_seed(1))
    return genfuse.load_data(torch.tanh(noise[0] @ mix / 2) + 0.1 * noise[1])


def test_a_training_of_the_usual_length_ends_near_its_best_on_few_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(genfuse.models.load("maf"), "usual_steps", 600)
    data, ends = small_table(), {}
    for keep in ("auto", "last"):
        torch.manual_seed(0)
        model, seen = genfuse.create("maf", data), []
        out = tmp_path / keep
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run = Trainer(keep=keep, lr=3e-3, device="cpu", pictures=False, out=out).fit(
                model, data, [lambda e, seen=seen: seen.append(e["loss"]) if e["split"] == "test" else None]
            )
        said = {"auto": "by which the best weights are chosen, .* --keep last trains on all", "last": "by heart"}[keep]
        assert re.search(said, "".join(str(warning.message) for warning in told))
        assert sum("by heart" in str(warning.message) for warning in told) == (keep == "last")
        with torch.no_grad():
            ends[keep] = -float(run.model().log_prob(data.splits["test"].x).mean()) - min(seen)
        assert run.config["training"]["keep"] == {"auto": "best", "last": "last"}[keep]
        assert run.config["data"]["options"] == ({"validation": "0.1"} if keep == "auto" else {})
    assert ends["auto"] < 0.2  # nats
    assert ends["last"] > 1  # by which the test could fail


@pytest.mark.parametrize("given", [{"steps": 3}, {"epochs": 1}])
def test_a_length_that_is_given_trains_on_all(given, make, digits, trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        trainer(**given).fit(make("tiny"), digits)


def test_best_without_a_finite_validation_loss_keeps_the_last_weights(digits, trainer, tmp_path):
    class Blind(Plain):
        def loss(self, batch, player="model"):
            loss, terms = super().loss(batch, player)
            return (loss, terms) if self.training else (loss * math.nan, terms)

    model = Blind(Config())
    model.plugin = "plain"
    run = trainer(epochs=1, keep="best", out=tmp_path / "run").fit(model, validated(digits))
    assert torch.equal(run.model().mean, model.mean)
    assert model.mean.norm() > 0


@pytest.mark.parametrize("option", [{"keep": "best"}, {"patience": 3}])
def test_the_best_weights_are_those_of_one_player(option, make, digits, trainer, tmp_path):
    best = trainer(**option, out=tmp_path / "run")
    with pytest.raises(SettingsError, match=r"one player.* Duel has 2 \(critic, generator\): use keep='last'"):
        best.fit(make("duel"), validated(digits))
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_validation_split_gets_one_that_the_run_remembers(make, digits, trainer, tmp_path):
    best = trainer(epochs=1, keep="best", out=tmp_path / "run")
    with pytest.warns(DataWarning, match=r"'digits' has no validation split: 150 of .* and 1,350 are trained on"):
        run = best.fit(make("tiny"), digits)
    data = run.data()
    assert {part: len(split) for part, split in data.splits.items()} == {"train": 1350, "test": 297, "validation": 150}
    assert run.config["data"]["splits"]["validation"] == data.fingerprint("validation")
    assert data.fingerprint() == genfuse.load_data("digits", validation=0.1).fingerprint() != digits.fingerprint()
    both = torch.cat([data.splits[part].x for part in ("train", "validation")])
    assert torch.equal(both.flatten(1).sum(1).sort().values, digits.splits["train"].x.flatten(1).sum(1).sort().values)
    with pytest.warns(DataWarning):
        Trainer.resuming(run, epochs=2).fit(run.model(), digits)
    Trainer.resuming(run, epochs=3).fit(run.model(), data)


class Falling(Plain):
    """Its weights after each update are given, so that the validation loss falls for two epochs of 12, then rises."""

    def after_step(self, player):
        with torch.no_grad():
            self.updates = getattr(self, "updates", 0) + 1
            self.mean.fill_({12: 0.8, 24: 0.3}.get(self.updates, 2.0))


@pytest.mark.parametrize("folder", [True, False])
def test_patience_ends_a_training_with_its_best_weights(folder, digits, trainer, tmp_path):
    model = Falling(Config())
    model.plugin = "plain"
    run = trainer(epochs=50, patience=3, out=tmp_path / "run" if folder else None).fit(model, validated(digits))
    assert model.updates == 5 * 12  # the second epoch was the best
    assert torch.equal(model.mean, torch.full((64,), 0.3))
    if folder:
        assert run.step == 24
        again = run.model()
        Trainer.resuming(run).fit(again, validated(digits))  # which has nothing to do
        assert run.metrics()[-1]["step"] == 60


def test_a_training_that_patience_would_end_goes_on_as_one_with_more_of_it(make, digits, trainer, tmp_path):
    data, options = validated(digits), {"epochs": 40, "lr": 1.0}
    whole = trainer(**options, patience=4, out=tmp_path / "whole").fit(make("tiny"), data)
    run = trainer(**options, patience=1, out=tmp_path / "run").fit(make("tiny"), data)
    stopped = run.metrics()[-1]["step"]
    run = Trainer.resuming(run, patience=4).fit(make("tiny"), data)
    assert stopped < run.metrics()[-1]["step"] == whole.metrics()[-1]["step"] < 480
    for file in ("model.safetensors", "state.safetensors"):
        assert (whole.path / file).read_bytes() == (run.path / file).read_bytes()
    with pytest.raises(RunError, match="training keep: was 'best', now 'last'"):
        Trainer.resuming(run, patience=None, keep="last").fit(make("tiny"), data)


@pytest.mark.parametrize("folder", [True, False])
def test_callbacks_see_the_metrics_as_they_are_made_and_can_end_the_training(folder, make, digits, trainer, tmp_path):
    lines = []

    def end(line):
        lines.append(line)
        return line["split"] == "test" and line["epoch"] == 2

    options = {"epochs": 9, "log_every": 5, "out": tmp_path / "run" if folder else None}
    run = trainer(**options).fit(make("tiny"), digits, [end])
    assert {line["split"] for line in lines} == {"train", "epoch", "test"}
    assert lines[-1]["step"] == 30
    if folder:
        timeless = [{k: v for k, v in line.items() if k not in ("seconds", "examples_per_second")} for line in lines]
        kept = [
            {k: v for k, v in line.items() if k not in ("seconds", "examples_per_second")} for line in run.metrics()
        ]
        assert kept == timeless
        trainer(epochs=9, out=tmp_path / "whole").fit(make("tiny"), digits)
        Trainer.resuming(run).fit(make("tiny"), digits)
        assert (run.path / "state.safetensors").read_bytes() == (tmp_path / "whole/state.safetensors").read_bytes()


def test_what_a_callback_raises_ends_the_training(make, digits, trainer):
    class PrunedError(Exception):
        pass

    def prune(line):
        raise PrunedError

    with pytest.raises(PrunedError):
        trainer().fit(make("tiny"), digits, [prune])


@pytest.mark.parametrize("kind", ["array", "frame", "dataset", "loader"])
def test_data_in_memory_is_trained_on_as_it_is(kind, trainer, tmp_path):
    x = np.random.default_rng(0).normal([3, 500], [1, 90], (100, 2))
    of = torch.utils.data.TensorDataset(torch.from_numpy(x))
    given = {"array": x, "frame": pd.DataFrame(x, columns=["a", "b"]), "dataset": of,
             "loader": torch.utils.data.DataLoader(of, batch_size=30)}[kind]  # fmt: skip
    model = genfuse.create("nsf", given, hidden=8)
    run = trainer(epochs=1, out=tmp_path / "run").fit(model, given)
    assert run.scaling.mean == pytest.approx(run.data(name=given).scaling.mean)
    assert run.data(name=given).fingerprint() == run.config["data"]["fingerprint"]
    with pytest.raises(DataError, match="was given in memory, from Python"):
        run.data()


class Breaking(Plain):
    """Its error is NaN from a certain step on, its loss with it."""

    def loss(self, batch, player="model"):
        loss, terms = super().loss(batch, player)
        terms["fine"] = loss.detach()
        if len(self.seen) >= 23:
            terms["error"] = terms["error"] * float("nan")
            loss = loss * float("nan")
        return loss, terms


def test_a_loss_that_is_not_finite_stops_with_step_term_and_checkpoint(digits, trainer, tmp_path):
    model = Breaking(Config())
    model.plugin = "plain"
    with pytest.raises(NonFiniteLossError) as caught:
        trainer(epochs=5, out=tmp_path / "run").fit(model, digits)
    message = str(caught.value)
    for part in ("step 23 (epoch 2, player model)", "error is nan", "step 15", str(tmp_path / "run/state.safetensors")):
        assert part in message
    run = genfuse.Run(tmp_path / "run")
    assert all(weight.isfinite().all() for weight in run.model().parameters())
    assert max(entry["step"] for entry in run.metrics()) == 15


def test_a_loss_that_is_not_finite_without_a_folder(digits, trainer):
    with pytest.raises(NonFiniteLossError, match=r"step 23 .*there is no checkpoint"):
        trainer(epochs=5).fit(Breaking(Config()), digits)


class Exploding(Plain):
    """Its weights are infinite after step 15, the last of an epoch, though every loss so far was finite."""

    def after_step(self, player):
        if len(self.seen) == 15:
            self.mean.data.fill_(math.inf)


def test_weights_that_are_not_finite_are_never_saved(digits, trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("genfuse.training.loop.Loop._end_lap", lambda self, seconds: None)
    model = Exploding(Config())
    model.plugin = "plain"
    with pytest.raises(NonFiniteLossError, match="finite up to step 15, but these weights are not: mean"):
        trainer(out=tmp_path / "run").fit(model, digits)
    assert genfuse.Run(tmp_path / "run").model().mean.isfinite().all()


def test_a_class_that_is_no_plugin_is_refused_with_a_folder_before_training(digits, trainer, tmp_path):
    model = Breaking(Config())
    with pytest.raises(SettingsError, match="not registered as a model"):
        trainer(out=tmp_path / "run").fit(model, digits)
    assert model.seen == []
    assert list(tmp_path.iterdir()) == []


def test_a_model_made_from_its_registered_class_is_found(digits, trainer, tmp_path):
    run = trainer(epochs=1, out=tmp_path / "run").fit(Tiny(Config()), digits)
    assert run.config["model"]["name"] == "tiny"
    assert isinstance(run.model(), genfuse.models.load("tiny"))


def test_bf16_mixed_rounds_no_data_and_no_weights(make, digits, trainer):
    model = make("plain")
    trainer(precision="bf16-mixed", epochs=1).fit(model, digits)
    assert all(batch.x.dtype == torch.float32 for batch in model.seen)
    assert model.mean.dtype == torch.float32
    tiny = make("tiny")
    outputs = []
    tiny.net[0].register_forward_hook(lambda module, args, output: outputs.append(output.dtype))
    trainer(precision="bf16-mixed", epochs=1).fit(tiny, digits)
    assert set(outputs) == {torch.bfloat16}


def test_64_true_computes_in_float64(make, digits, trainer, tmp_path):
    model = make("plain")
    run = trainer(precision="64-true", epochs=1, out=tmp_path / "run", pictures=True).fit(model, digits)
    assert model.mean.dtype == torch.float64
    assert all(batch.x.dtype == torch.float64 for batch in model.seen)
    assert run.model().mean.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "16-mixed"}, "16-mixed needs CUDA"),
        ({"device": "cuda"}, "device 'cuda': this machine"),
        ({"device": "cuda:1"}, "device 'cuda:1': this machine"),
    ],
)
def test_what_needs_cuda_says_so(options, message, make, digits, trainer):
    with pytest.raises(SettingsError, match=message):
        trainer(**options).fit(make("plain"), digits)


def test_a_device_of_an_unknown_kind_is_named(make, digits, trainer):
    with pytest.raises(SettingsError, match="got 'gpu'"):
        trainer(device="gpu").fit(make("plain"), digits)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"steps": 0},
        {"batch_size": 0},
        {"checkpoint_every": 0},
        {"log_every": -1},
        {"devices": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"grad_clip": -1.0},
        {"seed": -1},
        {"schedule": "linear"},
        {"keep": "first"},
        {"precision": "8-true"},
        {"resume": True},
        {"resume": True, "overwrite": True, "out": "x"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SettingsError, match=next(iter(options))):
        Trainer(**options)


def test_data_of_another_shape_are_refused_before_anything_is_written(make, trainer, tmp_path):
    with pytest.raises(SettingsError, match="shape"):
        trainer(out=tmp_path / "run").fit(make("tiny"), genfuse.load_data("toy:moons"))
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_shows_on_a_terminal_only(make, digits, trainer, monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        trainer(log_every=1).fit(make("tiny"), digits)
        text = stream.getvalue()
        assert all((part in text) == shown for part in ("examples/s", "error", "epoch 2", "100%"))
        assert shown or not text


def test_losses_after_an_epoch_are_of_examples_of_all_classes(tmp_path):
    """A test split in order, as a folder of classes is, and larger than what is looked at."""
    in_order = torch.arange(20_000.0)[:, None] / 20_000
    data = Dataset("in order", {"train": Split(in_order[:64]), "test": Split(in_order)})
    model = genfuse.create("vae", data, hidden=(4,), latent_dim=1, decoder="gaussian")
    seen = []
    data_batch = type(data).batch

    def batch(self, split, index, generator=None):
        found = data_batch(self, split, index, generator)
        if split == "test":
            seen.append(found.x)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "batch", batch)
        Trainer(epochs=2, batch_size=32, device="cpu", out=tmp_path / "run", pictures=False).fit(model, data)
    first, second = torch.cat(seen).chunk(2)
    assert len(first) == 10_000 == len(first.unique())
    assert first.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(first, second)  # the same after each epoch


def told(trainer, model, data, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", TrainingWarning)
        run = trainer(**options).fit(model, data)
    return run, [str(each.message) for each in found if each.category is TrainingWarning]


def test_a_training_of_no_given_length_takes_the_models_usual_steps(digits, trainer, tmp_path):
    run, _ = told(trainer, Slope(Config()), digits, epochs=None, out=tmp_path / "run")
    assert run.step == 130
    held_out = [entry["step"] for entry in run.metrics() if entry["split"] == "test"]
    assert held_out == [105, 130]  # seven passes of 15 steps, as short ones are looked at together, and the end
    assert trainer(epochs=None, steps=7, out=tmp_path / "few").fit(Slope(Config()), digits).step == 7
    again = Trainer.resuming(run, steps=140).fit(run.model(), digits)
    assert again.step == 140


def test_a_loss_that_was_still_falling_or_had_long_been_rising_is_told_at_the_end(digits, trainer, tmp_path):
    run, messages = told(trainer, Slope(Config()), digits, epochs=8, out=tmp_path / "falling")
    assert len(messages) == 1
    assert re.search(r"test split was still falling at the end, from 4\.\d+ to 3\.8", messages[0])
    assert [entry["name"] for entry in run.metrics() if entry["split"] == "warning"] == ["improving"]
    model = Slope(Config())
    model.rising = True
    _, messages = told(trainer, model, digits, epochs=8, out=tmp_path / "rising")
    assert len(messages) == 1
    assert "test split was lowest at step 15, 5.15, and has risen to 6.2 since" in messages[0]
    _, messages = told(trainer, Slope(Config()), digits, epochs=3, out=tmp_path / "short")
    assert not messages  # too few looks to judge by


def test_a_model_sees_data_before_its_first_step_and_is_trained_in_stages(digits, trainer, tmp_path):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Staged(Config()))
        trainer(steps=9).fit(models[-1], digits)
    model, again = models
    assert model.trained == ["codes"] * 3 + ["head"] * 6
    assert [len(x) for x in model.seen] == [100, 100]
    rows = digits.batch("train", slice(None)).x.flatten(1)
    assert all((rows == x).all(1).any() for x in model.seen[0].flatten(1))  # in an order by the seed, and in full
    assert not torch.equal(model.seen[0], digits.batch("train", slice(0, 100)).x)
    assert torch.equal(model.seen[0], again.seen[0])
    assert torch.equal(model.codes, again.codes)


def test_data_is_not_seen_again_where_a_run_goes_on(make, digits, trainer, tmp_path):
    first, again = make("staged"), make("staged")
    run = trainer(steps=3, out=tmp_path / "run").fit(first, digits)
    Trainer.resuming(run, steps=6).fit(again, digits)
    assert first.seen
    assert not again.seen
    assert again.trained == ["head"] * 3


def test_by_default_the_best_weights_are_kept_where_a_validation_split_names_them(make, digits, trainer, tmp_path):
    kept = []
    for name, data in (("tiny", digits), ("tiny", validated(digits)), ("duel", validated(digits))):
        run = trainer(epochs=1, out=tmp_path / f"{name}-{len(kept)}").fit(make(name), data)
        kept.append(run.config["training"]["keep"])
        trainer(epochs=2, out=run.path, resume=True).fit(make(name), data)
    assert kept == ["last", "best", "last"]
    last = trainer(epochs=1, keep="last", out=tmp_path / "before").fit(make("tiny"), validated(digits))
    again = trainer(epochs=2, out=last.path, resume=True).fit(make("tiny"), validated(digits))
    assert again.config["training"]["keep"] == "last"
