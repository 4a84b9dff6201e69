import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time

import pytest
import torch

import genfuse.flows._flow
from benchmarks import _measure, _peers, _plain, _record, examples, fits, flows, gans, ops, steps
from benchmarks.__main__ import main
from benchmarks.operators import OPERATORS
from examples.fused import vae

OP = "reparameterize_kl"
QUICK = ["ops", "--op", OP, "--size", "2x4", "--quick"]
cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def replace_function(monkeypatch, function):
    monkeypatch.setitem(OPERATORS, OP, dataclasses.replace(OPERATORS[OP], function=function))


def measured(path):
    """Sides that have a time, by mode."""
    comparisons = json.loads(path.read_text())["comparisons"]
    return {c["mode"]: {side for side, result in c["sides"].items() if "median" in result} for c in comparisons}


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_a_quick_run_writes_its_record(tmp_path, device):
    path = tmp_path / "record.json"
    assert main([*QUICK, "--no-compile", "--device", device, "--json", str(path)]) == 0
    record = _record.load(path)
    assert {"commit", "torch", "CPU", "SIMD", "threads", "date"} <= set(record["machine"])
    assert [comparison["mode"] for comparison in record["comparisons"]] == ["forward", "backward", "both"]
    for comparison in record["comparisons"]:
        assert comparison["copy"] > 0
        for side in ("eager", *ops.implementations(OPERATORS[OP], device)):
            result = comparison["sides"][side]
            assert 0 < result["low"] <= result["median"] <= result["high"]
            assert result["memory"] > 0
            assert result["error"] < 1e-4


def test_a_wrong_implementation_gets_no_time(tmp_path, monkeypatch, capsys):
    right = OPERATORS[OP].function
    replace_function(monkeypatch, lambda mu, logvar: right(1.001 * mu, logvar))
    path = tmp_path / "record.json"
    assert main([*QUICK, "--no-compile", "--json", str(path)]) == 1
    assert "WRONG: error" in capsys.readouterr().out
    assert measured(path) == {"forward": {"eager"}, "backward": {"eager"}, "both": {"eager"}}


def test_nan_in_any_result_is_wrong(monkeypatch, capsys):
    def function(mu, logvar):
        z, kl = right(mu, logvar)
        return z, kl * torch.nan

    right = OPERATORS[OP].function
    replace_function(monkeypatch, function)
    assert main([*QUICK, "--no-compile", "--mode", "both"]) == 1
    assert "WRONG: error nan" in capsys.readouterr().out


def test_an_implementation_that_raises_is_wrong(monkeypatch, capsys):
    def function(mu, logvar):
        raise RuntimeError("no such kernel")

    replace_function(monkeypatch, function)
    assert main([*QUICK, "--no-compile", "--mode", "both"]) == 1
    assert "WRONG: RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "verdict"), [(1e-9, "met"), (1e9, "NOT MET")])
def test_a_bar_says_whether_it_is_met(monkeypatch, capsys, factor, verdict):
    monkeypatch.setattr(ops, "BARS", (ops.Speed(OP, (2, 4), "both", "eager", factor),))
    assert main([*QUICK, "--no-compile", "--mode", "both"]) == 0
    bar, mean = capsys.readouterr().out.splitlines()[-2:]
    assert bar.startswith(f"{OP} (2, 4) forward+backward vs eager: ")
    assert bar.endswith(f"x (bar {factor:g}x) {verdict}")
    assert mean.startswith("forward+backward vs eager, geometric mean of 1 sizes: ")
    assert mean.split(": ")[1].split()[0] == bar.split(": ")[1].split()[0]  # of one size: its own ratio


def test_a_bar_at_most_is_met_from_below():
    bar = _record.Bar("share", 4.0, 5.0, "%", at_most=True)
    assert str(bar) == "share: 4.00% (bar at most 5%) met"
    assert dataclasses.replace(bar, value=5.1).verdict == "NOT MET"


def test_a_formula_that_does_not_compile_is_a_row_that_says_why(tmp_path, monkeypatch, capsys):
    def compile_(*_args, **_kwargs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(ops, "BARS", (ops.Speed(OP, (2, 4), "both", "compile", 2.0),))
    path = tmp_path / "record.json"
    assert main([*QUICK, "--mode", "both", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "compile    RuntimeError: no compiler found" in out
    assert "NOT MEASURED: RuntimeError: no compiler found" in out
    assert "compile" not in measured(path)["both"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_torch_compile_is_measured_in_every_mode(tmp_path):
    path = tmp_path / "record.json"
    assert main([*QUICK, "--json", str(path)]) == 0
    assert all("compile" in sides for sides in measured(path).values())


def test_backward_is_timed_without_forward_and_accumulates_nothing():
    calls = []

    def function(x):
        calls.append(x)
        return x**3

    x = torch.ones(3, requires_grad=True)
    task = ops.task(function, {"x": x}, "backward")
    for _ in range(3):
        task()
    assert len(calls) == 1
    assert x.grad is None


def test_sides_take_turns_and_the_slower_one_is_slower():
    entered = []

    def side(name, seconds):
        @contextlib.contextmanager
        def context():
            entered.append(name)
            yield

        return _measure.Side(lambda: time.sleep(seconds), context)

    timings = _measure.interleave({"fast": side("fast", 0), "slow": side("slow", 0.002)}, "cpu", _measure.QUICK)
    rounds = [set(entered[i : i + 2]) for i in range(0, len(entered), 2)]
    assert rounds == [{"fast", "slow"}] * (1 + _measure.QUICK.rounds[0])  # the first to find the length of a block
    assert timings["slow"].low >= 0.002
    assert timings["slow"].median > timings["fast"].median


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_peak_memory_counts_what_is_held_at_a_time(device):
    def run():
        freed = torch.empty(2**20, device=device)
        kept = torch.empty(2**21, device=device)
        del freed
        return torch.empty(2**18, device=device), kept

    assert _measure.peak_memory(_measure.Side(run), device) == 4 * (2**20 + 2**21)


def test_the_report_is_made_from_records_alone_and_is_always_the_same(tmp_path):
    record, pages = tmp_path / "record.json", [tmp_path / "a.md", tmp_path / "b.md"]
    main([*QUICK, "--no-compile", "--json", str(record)])
    for page in pages:
        assert main(["report", str(record), "--out", str(page), "--plot", str(tmp_path / "plots")]) == 0
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    assert "## ops, cpu, float32" in text
    assert "`--quick`" in text
    assert f"commit: {json.loads(record.read_text())['machine']['commit']}\n" in text
    assert text.count("| 2 x 4 | forward+backward |") == 2
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        f"{OP}_cpu_float32_{mode}.png" for mode in ("backward", "both", "forward")
    ]
    main(["report", str(record), str(record), "--out", str(pages[0])])  # two parts of one section
    twice = pages[0].read_text()
    other = tmp_path / "other.json"
    other.write_text(record.read_text().replace('"dtype": "float32"', '"dtype": "float64"'))
    main(["report", str(other), "--out", str(pages[0])])
    assert pages[0].read_text().startswith(twice.rstrip())  # a section that no record is of stays as it is
    assert "\n\n## ops, cpu, float64\n" in pages[0].read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 0}'])
def test_what_is_no_record_is_refused_by_name(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(path), "--out", str(tmp_path / "page.md")])
    assert stopped.value.code == 2
    assert "other.json" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.skipif("GENFUSE_DATA" not in os.environ, reason="needs MNIST: set GENFUSE_DATA")
def test_training_is_timed_beside_plain_pytorch(tmp_path, capsys):
    path = tmp_path / "record.json"
    assert main(["training", "--quick", "--json", str(path)]) == 0
    record = _record.load(path)
    assert len(record["bars"]) == 3
    assert all(bar["value"] > 0 for bar in record["bars"])
    main(["report", str(path), "--out", str(tmp_path / "page.md")])
    for name in ("vae", "wgan-gp"):
        assert f"| {name} on MNIST (640 images), an epoch, genfuse |" in (tmp_path / "page.md").read_text()


ABSENT = "nothing is installed here"


def all_absent(monkeypatch):
    monkeypatch.setattr(_peers, "absent", lambda library: ABSENT)


def flows_record(path, *parts):
    code = main(["flows", "--quick", "--no-compile", "--only", *parts, "--json", str(path)])
    return code, _record.load(path)


def sides(record):
    """By what was compared and by side, the seconds, or None where the row says why there are none."""
    rows = [row for part in record["parts"] for row in part["rows"]]
    return {row["what"]: row.get("median") for row in rows if "median" in row or "failure" in row}


def test_flows_are_timed_where_no_peer_is_installed_and_its_bars_are_not_counted(tmp_path, monkeypatch):
    all_absent(monkeypatch)
    path = tmp_path / "record.json"
    code, record = flows_record(path, "spline", "inside", "sampling")
    assert code == 0
    found = sides(record)
    timed = {what for what, seconds in found.items() if seconds is not None}
    assert timed == {what for what in found if what.endswith(", genfuse") and not what.startswith(_peers.LIBRARIES)}
    assert {what.split()[0] for what in timed} >= {"maf", "nsf-ar", "rational_quadratic_spline"}
    for bar in record["bars"]:
        ours_alone = "samples / log_prob" in bar["what"]
        assert bar["value"] > 0 if ours_alone else bar["value"] is None and bar["why"]
    assert main(["report", str(path), "--out", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "### sampling" in page
    assert f"| nflows's nsf (16, 6), a step, nflows | {ABSENT} |" in page
    assert f"NOT MEASURED: {ABSENT}" in page


@pytest.mark.parametrize("library", _peers.LIBRARIES)
def test_flows_are_timed_beside_a_peer(library, tmp_path, monkeypatch):
    pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.setattr(_peers, "absent", lambda other: "" if other == library else ABSENT)
    code, record = flows_record(tmp_path / "record.json", "spline", "inside", "sampling")
    assert code == 0
    assert any(what.endswith(f", {library}") and seconds for what, seconds in sides(record).items())
    assert any(bar["what"].endswith(f"vs {library}") and bar["value"] > 0 for bar in record["bars"])


@pytest.mark.parametrize(("name", "side"), [(n, side) for n, sides in _peers.MODELS.items() for side in sides])
def test_a_peer_fits_what_it_is_given(name, side):
    if reason := _peers.absent(side):
        pytest.skip(reason)
    x = 0.3 * torch.randn(256, 4)
    peer = _peers.MODELS[name][side](4)
    before = _peers.log_likelihood(peer, x)
    _peers.fit(peer, x, x, steps=30, batch_size=64, lr=3e-3, grad_clip=5.0)
    assert _peers.log_likelihood(peer, x) > before + 0.5
    assert peer.sample(5).shape == (5, 4)


def test_memory_is_measured_with_and_without_reversible(tmp_path):
    code, record = flows_record(tmp_path / "record.json", "memory")
    assert code == 0
    (part,) = record["parts"]
    assert [row["memory"] > 0 for row in part["rows"] if "memory" in row] == [True] * 6
    *gradients, growth = record["bars"]
    assert len(gradients) == 3
    assert all(bar["value"] < 1e-4 for bar in gradients)
    assert 0 < growth["value"] < 1.3


def test_a_flow_whose_density_is_wrong_gets_no_time(tmp_path, monkeypatch, capsys):
    all_absent(monkeypatch)
    right = genfuse.flows._flow.standard_normal_log_prob
    monkeypatch.setattr(
        genfuse.flows._flow,
        "standard_normal_log_prob",
        lambda z, logdet: right(z, logdet) * (1.001 if z.dtype is torch.float32 else 1),
    )
    code, record = flows_record(tmp_path / "record.json", "sampling")
    assert code == 1
    assert "WRONG: density is off by" in capsys.readouterr().out
    assert not any(sides(record).values())


def test_the_gradient_penalty_is_timed_beside_double_backward(tmp_path):
    path = tmp_path / "record.json"
    assert main(["gans", "--quick", "--json", str(path)]) == 0
    record = _record.load(path)
    assert all(seconds for seconds in sides(record).values())
    assert len(record["bars"]) == 5
    assert all(bar["value"] > 0 for bar in record["bars"])


def test_a_gradient_penalty_with_a_wrong_gradient_gets_no_time(tmp_path, monkeypatch, capsys):
    right = gans.gradient_penalty
    monkeypatch.setattr(gans, "gradient_penalty", lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    path = tmp_path / "record.json"
    assert main(["gans", "--quick", "--only", "penalty", "--json", str(path)]) == 1
    assert "WRONG: the gradient is off by" in capsys.readouterr().out
    assert not any(seconds for what, seconds in sides(_record.load(path)).items() if what.endswith(", genfuse"))


def test_examples_are_timed_beside_their_twins(tmp_path):
    path = tmp_path / "record.json"
    assert main(["examples", "--quick", "--json", str(path)]) == 0
    found = sides(_record.load(path))
    assert all(found.values())
    assert {what.split()[0] for what in found} == set(examples.EXAMPLES)
    assert main(["report", str(path), "--out", str(tmp_path / "page.md")]) == 0
    assert "| vae (8, 6), a step, plain PyTorch |" in (tmp_path / "page.md").read_text()


def test_a_twin_whose_gradient_is_wrong_gets_no_time(tmp_path, monkeypatch, capsys):
    class Wrong(vae.VAE):
        def loss(self, images):
            loss = super().loss(images)
            return loss + 0.01 * (self.decoder[-1].bias.sum() - self.decoder[-1].bias.sum().detach())

    monkeypatch.setattr(vae, "VAE", Wrong)
    path = tmp_path / "record.json"
    assert main(["examples", "--quick", "--json", str(path)]) == 1
    assert "WRONG: the gradient is off by" in capsys.readouterr().out
    assert [what for what, seconds in sides(_record.load(path)).items() if not seconds] == [
        "vae (8, 6), a step, genfuse"
    ]


SMALLEST = "vae 64-64-64-10, batch 64"


def test_replays_are_of_a_gpu(capsys):
    with pytest.raises(SystemExit):
        main([*QUICK, "--replay"])
    assert "--replay: only with --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("name", OPERATORS)
def test_all_arguments_of_an_operator_are_on_the_device_that_was_asked_for(name):
    made = OPERATORS[name].arguments(OPERATORS[name].sizes[0], torch.float32, "meta")
    assert {value.device.type for value in made.values() if isinstance(value, torch.Tensor)} == {"meta"}


def test_training_steps_are_timed_beside_plain_pytorch_and_their_products(tmp_path):
    path, chart, page = (tmp_path / name for name in ("record.json", "steps.svg", "page.md"))
    before = os.sched_getaffinity(0), torch.get_num_threads(), dict(os.environ)
    page.write_text("# Old\n\n## gans, cpu\n\nkept\n\n## Whole training steps, cpu\n\nreplaced\n")
    arguments = ["--quick", "--threads", "one", "--only", SMALLEST, "--profile", "--chart", str(chart)]
    assert main(["steps", *arguments, "--json", str(path)]) == 0
    assert (os.sched_getaffinity(0), torch.get_num_threads(), dict(os.environ)) == before
    record = _record.load(path)
    (row,) = record["comparisons"]
    assert (row["case"], row["setting"]) == (SMALLEST, "one")
    times = row["sides"]
    assert 0 < times["products"]["median"] < times["genfuse"]["median"]
    for side in ("products", "PyTorch", "PyTorch, fused Adam"):
        assert 0 < times[side]["ratio"]["low"] <= times[side]["ratio"]["value"] <= times[side]["ratio"]["high"]
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert all(row["shares"][part] > 0.01 for part in ("kernels", "optimizer", "rest"))
    assert "</svg>" in chart.read_text()
    assert main(["report", str(path), "--out", str(page)]) == 0
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Whole training steps, cpu",
        "## gans, cpu",
    ]
    assert "![Training steps beside other code](steps.svg)" in text
    assert f"| {SMALLEST} |" in text
    assert "kept" in text
    assert "replaced" not in text


@pytest.mark.parametrize("name", steps.CASES)
def test_a_step_is_that_of_the_same_model_by_hand(name, monkeypatch):
    all_absent(monkeypatch)
    made = steps.sides(steps.CASES[name], compiled=False)
    assert isinstance(made["genfuse"], _measure.Side), made["genfuse"]


@pytest.mark.parametrize("cases", ["wgan-gp critic 784-256-256-1, batch 64", SMALLEST, "8 couplings of 2 x 64"])
def test_a_step_is_that_of_jax(cases, monkeypatch):
    for library in ("jax", "optax"):
        pytest.importorskip(library)
    monkeypatch.setattr(_peers, "absent", lambda library: "" if library in ("jax", "optax") else ABSENT)
    (case,) = (case for name, case in steps.CASES.items() if name.startswith(cases))
    made = steps.sides(case, compiled=False)
    assert isinstance(made["JAX"], _measure.Side), made["JAX"]
    right = case.jax
    wrong = dataclasses.replace(case, jax=lambda model: (_scaled(right(model)[0]), right(model)[1]))
    assert steps.sides(wrong, compiled=False)["JAX"].startswith("WRONG: the loss is off by")


def _scaled(loss):
    return lambda *args: 1.001 * loss(*args)


def test_a_step_with_another_loss_or_gradient_gets_no_time(monkeypatch):
    def with_a_gradient(self, *args):
        loss, bias = right(self, *args), self.decoder[-1].bias
        return loss + 1.0 * (bias - bias.detach()).sum()

    all_absent(monkeypatch)
    right = _plain.VAE.loss
    monkeypatch.setattr(_plain.VAE, "loss", lambda *args: 1.001 * right(*args))
    assert steps.sides(steps.CASES[SMALLEST], False)["genfuse"].startswith("WRONG: the loss is off by")
    monkeypatch.setattr(_plain.VAE, "loss", with_a_gradient)
    assert steps.sides(steps.CASES[SMALLEST], False)["genfuse"].startswith("WRONG: the gradient is off by")


def test_a_step_that_is_wrong_fails_the_command():
    row = {"sides": {"genfuse": {"failure": "WRONG: the loss is off by 1"}, "JAX": {"failure": ABSENT}}}
    assert steps.wrong({"comparisons": [row]})
    del row["sides"]["genfuse"]
    assert not steps.wrong({"comparisons": [row]})


def test_the_products_of_a_step_are_recorded_and_replayed():
    layer, x = torch.nn.Linear(3, 4), torch.randn(2, 3, requires_grad=True)
    convolution, image = torch.nn.Conv2d(1, 2, 3), torch.randn(1, 1, 5, 5)
    with steps.Products() as products:
        layer(x).relu().sum().backward()
        convolution(image).exp().sum().backward()
    names = [function._schema.name.removeprefix("aten::") for function, _, _ in products.calls]
    assert names == ["addmm", "mm", "mm", "convolution", "convolution_backward"]
    with torch.no_grad(), steps.Products() as again:
        products.replay()
    assert [call[0] for call in again.calls] == [call[0] for call in products.calls]


def test_the_ratio_of_two_steps_is_not_moved_by_turns_that_were_disturbed():
    ours = [1.0 + 0.001 * i for i in range(20)]
    theirs = [2 * each for each in ours]
    disturbed = [each * (50 if i % 3 == 0 else 1) for i, each in enumerate(theirs)]
    for found in (steps.ratio(theirs, ours), steps.ratio(disturbed, ours)):
        assert found["low"] <= found["value"] <= found["high"]
        assert found["value"] == pytest.approx(2, rel=0.01)
        assert found["high"] < 2.1


def test_bars_of_steps_hold_the_setting_that_they_are_of():
    def row(setting, **ratios):
        sides = {side: {"ratio": {"value": ratio}} for side, ratio in ratios.items()}
        return {"case": "vae 784-256-256-20, batch 128", "setting": setting, "sides": {"genfuse": {}, **sides}}

    made = steps.bars([row("one", products=0.5, JAX=1.25), row("all", products=0.5, JAX=1.25)])
    assert [(bar.value, bar.bar, bar.verdict) for bar in made] == [(0.8, 1.0, "met"), (2.0, 1.25, "NOT MET")]


@pytest.mark.skipif("GENFUSE_DATA" not in os.environ, reason="needs MNIST, MINIBOONE and POWER: set GENFUSE_DATA")
@pytest.mark.parametrize("part", flows.QUALITY)
def test_what_flows_learn_of_real_data_is_measured(part, tmp_path, monkeypatch):
    all_absent(monkeypatch)
    code, record = flows_record(tmp_path / "record.json", part)
    assert code == 0
    values = [row["value"] for row in record["parts"][0]["rows"] if "value" in row]
    assert len(values) >= 4
    assert all(math.isfinite(value) for value in values)


def test_a_fit_is_of_the_weights_that_validate_best(monkeypatch):
    parts = [
        torch.randn(rows, 3) @ torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.3, 0.0], [0.0, 0.0, 1.0]])
        for rows in (400, 50, 60)
    ]
    monkeypatch.setattr(fits, "load", lambda table: (parts, 0.5))
    start, trained = (fits.fit("maf", "genfuse", "", 0, steps, lr=lr) for steps, lr in ((1, 1e-9), (40, 2e-3)))
    assert start["nats"] + 0.3 < trained["nats"]
    assert trained["worst"] < trained["nats"]
    again = fits.fit("maf", "genfuse", "", 0, 40, lr=2e-3)
    assert again == trained


def test_the_quality_of_a_model_is_a_table_and_a_picture_and_is_not_trained_again(tmp_path, capsys):
    torch.manual_seed(0)
    arguments = ["quality", "--model", "gan", "--model", "glow", "--steps", "4", "--runs", str(tmp_path / "runs"),
                 "--out", str(tmp_path)]  # fmt: skip
    assert main([*arguments, "--data", "toy:moons"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\| `gan` \| \d+ \| 4 \| [\d,]+ \| \S+ \| [\d.]+ \| 0", said)
    assert (tmp_path / "comparison-toy-moons.png").stat().st_size > 10_000
    found = tmp_path / "runs/gan-toy-moons/quality.json"
    found.write_text(found.read_text().replace('"steps": 4', '"steps": 5'))
    assert main([*arguments, "--data", "toy:moons"]) == 0
    assert "| 5 |" in capsys.readouterr().out


def test_patched_libraries_are_compared_before_they_are_timed(monkeypatch, capsys):
    pytest.importorskip("zuko", reason="zuko is not installed")
    case = ["integrations", "--quick", "--only", "zuko MAF, 1,000 samples"]
    assert main(case) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"\| zuko MAF, 1,000 samples( \| [\d.e+]+ m?s){2} \| [\d.]+ \[.*\] \| 20, (NOT MET|met) \| 0 of 3 \|",
        row,
    )
    right = genfuse.ops.autoregressive_inverse
    wrong = lambda *args, **kwargs: (right(*args, **kwargs)[0] + 1, None)  # noqa: E731
    monkeypatch.setattr(genfuse.ops, "autoregressive_inverse", wrong)
    with pytest.raises(RuntimeError, match="WRONG: results differ by"):
        main(case)
