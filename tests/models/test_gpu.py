"""Models and operators on a GPU, as far as it can be seen without one: devices, dtypes, and what waits."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from required import skip
from torch.utils._python_dispatch import TorchDispatchMode

import genfuse
from benchmarks.operators import OPERATORS
from genfuse import plugins
from genfuse.ops import _op
from genfuse.training import Trainer

HERE = Path(__file__).resolve().parent
MODELS = [plugin.name for plugin in plugins.discover("models") if plugin.distribution == plugins.OURS]
WAIT = {  # for the device, to know a value or a shape
    "_local_scalar_dense", "nonzero", "repeat_interleave", "masked_select", "is_nonzero", "equal", "unique_dim",
    "_unique2", "bincount", "linalg_lu_factor_ex", "_linalg_check_errors", "linalg_inv_ex", "_linalg_solve_ex",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Keeps what would wait for a GPU, or copy from the host's memory."""

    def __init__(self):
        super().__init__()
        self.waiting, self.copies = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        masks = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name in WAIT or any(isinstance(m, torch.Tensor) and m.dtype is torch.bool for m in masks):
            self.waiting[name] += 1
        if name in ("copy_", "_to_copy") and {"device", "pin_memory"} & set(kwargs or {}):
            self.copies.append((name, kwargs))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def no_gpu(tmp_path_factory):
    """no_gpu.cpp, compiled."""
    if torch.version.cuda or not shutil.which("g++"):
        skip("cuda", "fake tensors on a GPU take a PyTorch without CUDA, and g++")
    library = tmp_path_factory.mktemp("no_gpu") / "no_gpu.so"
    include = Path(torch.__file__).parent / "include"
    flags = ["-shared", "-fPIC", "-std=c++20", "-O0", f"-I{include}"]
    subprocess.run(["g++", *flags, HERE / "no_gpu.cpp", "-o", library], check=True)
    return library


def test_a_step_and_a_sample_of_each_model_stay_on_the_gpu_in_float32_and_wait_for_nothing(no_gpu):
    command = [sys.executable, HERE / "fake_gpu.py", no_gpu, *MODELS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "done", run.stdout + run.stderr[-2000:]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_an_operator_can_be_captured_in_a_cuda_graph(operator):
    """Nothing inside its compiled kernels' launches waits, reads a value or copies from the host's memory."""
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "genfuse" and func._schema.name != "genfuse::seed":
                calls.append((func._schema.name.partition("::")[2], args))
            return func(*args, **(kwargs or {}))

    arguments = operator.arguments(operator.sizes[0], torch.float32, "cpu")
    with Recorder(), Launches() as launches:
        outputs = operator.function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if operator.learned:
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    assert calls
    for name, args in calls:
        kernel = _op.KERNELS[name]
        if kernel.find("native", "cpu")[0] is None:
            skip("native", "no compiled kernels")
        with launches, torch.no_grad():
            kernel.native(*args)
    assert not launches.waiting
    assert not launches.copies


@pytest.fixture
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        skip("cuda", "no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which is PyTorch's default for convolutions
    return torch.device("cuda")


def _made(name, source):
    data = genfuse.load_data(source)
    torch.manual_seed(0)
    try:
        return genfuse.create(name, data), data
    except genfuse.errors.GenfuseError as error:
        pytest.skip(f"{name} is not made for {source}: {error}")


@pytest.mark.parametrize("source", ["digits", "toy:moons"])
@pytest.mark.parametrize("name", MODELS)
def test_each_model_trains_and_resumes_on_a_gpu_and_is_there_what_it_is_on_the_cpu(name, source, gpu, tmp_path):
    model, data = _made(name, source)
    trainer = Trainer(steps=6, checkpoint_every=3, batch_size=32, device="cuda", pictures=False, out=tmp_path / "run")
    run = trainer.fit(model, data)
    Trainer.resuming(run, steps=9).fit(run.model(), data)
    there, here = run.model(gpu), run.model()
    x = data.batch("test", slice(16)).x
    assert there.sample(4).isfinite().all()
    for verb in ("log_prob", "encode", "decode", "reconstruct"):  # those of diffusion are solved by adaptive steps
        if name not in ("edm", "ddpm", "score", "flow-matching") and hasattr(there, verb) and hasattr(there, "encode"):
            given = here.encode(x) if verb == "decode" else x
            torch.manual_seed(0)
            torch.testing.assert_close(
                getattr(there, verb)(given.to(gpu)).cpu(), getattr(here, verb)(given), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_a_gpu_waits_for_nothing(name, gpu):
    model, data = _made(name, "digits")
    model.to(gpu).train()
    batch = data.to(gpu).batch("train", slice(32))
    optimizers = {player.name: player.optimizer(player.parameters) for player in model.players()}
    for attempt in range(3):
        for player in model.players():
            torch.cuda.set_sync_debug_mode("error" if attempt == 2 else "default")  # what the first ones do once
            try:
                loss, _ = model.loss(batch, player.name)
                loss.backward()
                optimizers[player.name].step()
                optimizers[player.name].zero_grad()
                model.stepped(player.name)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("name", ["realnvp", "nsf"])
def test_a_training_by_cuda_graphs_ends_in_the_same_weights(name, schedule, gpu):
    weights = []
    for how in ("off", "cuda-graphs"):
        model, data = _made(name, "toy:moons")
        Trainer(steps=12, batch_size=1000, device="cuda", schedule=schedule, compile=how).fit(model, data)
        weights.append(model.state_dict())
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=1e-3, atol=1e-5)
