"""Steps of few calls, against PyTorch's own."""

import io
import os
import platform
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from tiny_models import Tiny
from torch import nn

import genfuse
from genfuse.data import Batch
from genfuse.errors import SettingsError
from genfuse.training import Run, Trainer, flatten, lean
from genfuse.training.lean import Graphed
from genfuse.training.process import SMALL, fitting_threads

ADAM = {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-6, "fused": True}
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, **ADAM),
    "adam with decay": lambda p: torch.optim.Adam(p, weight_decay=0.1, maximize=True, **ADAM),
    "adamw": lambda p: torch.optim.AdamW(p, **ADAM),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, **ADAM),
    "plain adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9),
    "rmsprop with decay": lambda p: torch.optim.RMSprop(p, lr=1e-2, weight_decay=0.1),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}
LEAN = ["adam", "adam with decay", "adamw", "rmsprop", "rmsprop with decay"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 2))


def trained(model, optimizer, steps, unused=()):
    """Train; in the steps ``unused`` the last layer has no gradient."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(8, 3, generator=generator)
        (model[:-1](x) if step in unused else model(x)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(weight.grad is None for weight in model.parameters())
    return model


def assert_same(optimizer, other):
    """The same state, in the same format."""
    ours, theirs = optimizer.state_dict(), other.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(ours["state"][index][key], value)
    for group, others in zip(optimizer.param_groups, other.param_groups, strict=True):
        for weight, theirs in zip(group["params"], others["params"], strict=True):
            torch.testing.assert_close(weight, theirs)


@pytest.fixture
def own_steps(monkeypatch):
    """How often a lean optimizer steps by itself."""
    counts = []
    optimizers = torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
    for cls in (each for each in optimizers if "step" in vars(each)):  # AdamW's step is Adam's, from PyTorch 2.7 on
        lean(cls([nn.Parameter(torch.zeros(1))]))  # by then its step has its hooks
        wrapped = cls.step.__wrapped__
        counted = lambda *args, wrapped=wrapped: counts.append(1) or wrapped(*args)  # noqa: E731
        monkeypatch.setattr(cls.step, "__wrapped__", counted)
    return counts


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unused", [(), (0,), (2, 3)], ids=["all", "none at first", "none later"])
def test_steps_are_those_of_the_optimizer(name, unused):
    optimizers = []
    for change in (lean, lambda optimizer: optimizer):
        model = network()
        optimizers.append(change(OPTIMIZERS[name](model.parameters())))
        trained(model, optimizers[-1], 6, unused)
    assert_same(*optimizers)


@pytest.mark.parametrize("name", LEAN)
def test_after_the_first_no_step_is_the_optimizers_own(name, own_steps):
    model = network()
    optimizer = lean(OPTIMIZERS[name](model.parameters()))
    trained(model, optimizer, 5)
    assert len(own_steps) == 1  # which makes the state
    trained(model, optimizer, 5, unused=(2,))
    assert len(own_steps) == 2


@pytest.mark.parametrize("name", LEAN)
def test_a_state_is_saved_and_loaded_between_lean_and_other_optimizers(name, own_steps):
    model = network()
    optimizer = lean(OPTIMIZERS[name](model.parameters()))
    trained(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    others = []
    for change in (lean, lambda optimizer: optimizer):
        file.seek(0)
        weights, state = torch.load(file)
        other = network()
        other.load_state_dict(weights)
        others.append(change(OPTIMIZERS[name](other.parameters())))
        others[-1].load_state_dict(state)
        own_steps.clear()
        trained(other, others[-1], 4)
        assert not own_steps
    trained(model, optimizer, 4)
    assert_same(optimizer, others[0])
    assert_same(optimizer, others[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), others[0].param_groups[0]["params"], strict=True))


def test_groups_hooks_and_schedules_are_as_of_any_optimizer():
    optimizers, called = [], []
    for change in (lean, lambda optimizer: optimizer):
        model = network()
        groups = [{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 1e-3}]
        optimizer = change(torch.optim.Adam(groups, **ADAM))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.register_step_post_hook(lambda *_: called.append(1))
        for _ in range(4):
            trained(model, optimizer, 1)
            schedule.step()
        optimizers.append(optimizer)
    assert_same(*optimizers)
    assert len(called) == 8


def test_weights_that_moved_are_trained_on():
    optimizers = []
    for change in (lean, lambda optimizer: optimizer):
        model = network()
        optimizers.append(change(OPTIMIZERS["rmsprop"](model.parameters())))
        trained(model, optimizers[-1], 2)
        model[2].weight.data = torch.ones(7, 20)
        trained(model, optimizers[-1], 2)
    assert_same(*optimizers)


def test_a_sparse_gradient_is_refused_as_ever():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = lean(torch.optim.Adam(table.parameters(), fused=True))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_a_cleared_state_begins_anew():
    model = network()
    optimizer = lean(OPTIMIZERS["adam"](model.parameters()))
    trained(model, optimizer, 3)
    optimizer.state.clear()
    trained(model, optimizer, 2)
    assert [float(state["step"]) for state in optimizer.state.values()] == [2] * 6


@pytest.mark.parametrize("name", ["vae", "wgan", "gan", "ddpm"])
def test_a_training_is_the_same_to_rounding_as_with_steps_of_pytorch(name, monkeypatch):
    data = genfuse.load_data("toy:moons")
    weights = []
    for change in (lean, lambda optimizer: optimizer):
        monkeypatch.setattr("genfuse.training.loop.lean", change)
        torch.manual_seed(0)
        model = genfuse.create(name, data, hidden=(16,))
        Trainer(steps=12, batch_size=32, pictures=False).fit(model, data)
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=1e-3, atol=1e-5)


def test_a_model_with_a_weight_that_no_loss_sees_is_trained(digits):
    class Idle(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.idle = nn.Parameter(torch.ones(3))
            self.tie = nn.Parameter(self.net[0].bias.data)  # of the same memory

    model = Idle(Tiny.Config())
    before = model.net[0].weight.clone()
    Trainer(steps=4, pictures=False).fit(model, digits)
    assert torch.equal(model.idle, torch.ones(3))
    assert not torch.equal(model.net[0].weight, before)
    assert torch.equal(model.tie, model.net[0].bias)


def test_flat_parameters_are_public():
    assert flatten(network().parameters())[0].dim() == 1


# compiled


def test_a_graphed_step_is_replayed_on_whole_batches_after_the_first(monkeypatch):
    class Graph:  # on the CPU nothing can be recorded: a replay here runs the step again on the examples that it has
        def replay(self):
            graphed.terms["sum"].copy_(graphed.batch.x.sum() + graphed.batch.y.sum())
            replays.append(1)

    def step(batch):
        steps.append(len(batch.x))
        return {"sum": batch.x.sum() + batch.y.sum()}

    steps, replays = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    graphed = Graphed(step, 4)
    sizes = [4, 4, 3, 1, 4, 4, 2, 4]
    terms = [graphed(Batch(torch.full((n,), float(i)), torch.ones(n))) for i, n in enumerate(sizes)]
    assert steps == [4, 4, 3, 1, 4, 2]  # 4 for the record
    assert len(replays) == 3
    assert [float(each["sum"]) for each in terms] == [n * (i + 1) for i, n in enumerate(sizes)]


def test_cuda_graphs_without_cuda_are_refused(digits):
    with pytest.raises(SettingsError, match="compile 'cuda-graphs' needs a CUDA device"):
        Trainer(steps=1, device="cpu", compile="cuda-graphs").fit(Tiny(Tiny.Config()), digits)
    with pytest.raises(SettingsError, match="of one device, and not of precision 16-mixed"):
        Trainer(compile="cuda-graphs", devices=2)
    with pytest.raises(SettingsError, match="compile must be one of off, loss, cuda-graphs"):
        Trainer(compile="all")


def test_a_compiled_loss_trains_to_the_same_weights(monkeypatch):
    compiled = []

    def eager(function, compile=torch.compile):
        compiled.append(function)
        return compile(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", eager)
    data = genfuse.load_data("toy:moons")
    weights = []
    for how in ("off", "loss"):
        torch.manual_seed(0)
        model = genfuse.create("realnvp", data, hidden=(8,), layers=2)
        Trainer(steps=5, batch_size=1500, compile=how, pictures=False).fit(model, data)
        weights.append(model.state_dict())
    assert len(compiled) == 1
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key])


# threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seen(model, batch_size, **options):
    with fitting_threads(model, batch_size, **options):
        return torch.get_num_threads()


def test_small_steps_are_on_one_thread_and_large_ones_on_all(two_threads, monkeypatch):
    model = Tiny(Tiny.Config())
    weights = sum(weight.numel() for weight in model.parameters())
    most = int(SMALL / 6 / weights)
    assert (seen(model, most), seen(model, most + 1)) == (1, 2)
    model.convolution = nn.Conv2d(1, 2, 3)  # at each of 64 pixels
    most = int(SMALL / 6 / (weights + 2 + 18 * 64))
    assert (seen(model, most), seen(model, most + 1)) == (1, 2)
    assert torch.get_num_threads() == 2  # as before
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert seen(model, 1) == 2  # as the user says


def test_a_run_goes_on_on_as_many_threads_as_it_had(two_threads, digits, tmp_path, recwarn):
    assert seen(Tiny(Tiny.Config()), 1, recorded=2) == 2
    assert seen(Tiny(Tiny.Config()), 1, recorded=4) == 2  # there are no more
    assert seen(Tiny(Tiny.Config()), 1, recorded="many") == 1
    torch.manual_seed(0)
    run = Trainer(steps=2, out=tmp_path / "run", pictures=False).fit(genfuse.create("tiny", digits), digits)
    assert run.config["threads"] == 1
    assert torch.get_num_threads() == 2
    Trainer.resuming(Run(run.path), steps=3).fit(run.model(), digits)
    assert not [each for each in recwarn if "threads" in str(each.message)]


@pytest.mark.parametrize(
    ("given", "said"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "7"}, "None")]
)
def test_the_commands_threads_wait_passively_unless_the_user_says_otherwise(given, said):
    code = "import os; from genfuse.cli import main; main(['--version']); print(os.environ.get('OMP_WAIT_POLICY'))"
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == said


# memory

FAULTS = """
import resource, torch
from genfuse.training.process import keep_freed_memory
keep_freed_memory()
def fill():
    torch.ones(2**24)  # 64 MB, in 16,384 pages
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left as they are")
def test_large_temporaries_are_written_where_the_last_step_had_them():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 16_384  # the heap may grow a few times; each of the 16 would fault otherwise
