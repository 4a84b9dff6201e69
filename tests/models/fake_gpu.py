"""A training step and a sample of each model, on fake tensors that say they are on a GPU: python fake_gpu.py LIBRARY.

What mixes devices or dtypes raises, and so does what would wait for the GPU: a fake tensor has no value to be read.
LIBRARY is no_gpu.cpp, compiled, for a PyTorch without CUDA; it must be there before PyTorch is. Prints what failed.
"""

import ctypes
import importlib.util
import sys
import traceback
from functools import partial

spec = importlib.util.find_spec("torch")
assert spec is not None
assert spec.submodule_search_locations is not None
ctypes.CDLL(f"{spec.submodule_search_locations[0]}/lib/libtorch_cpu.so", ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import genfuse  # noqa: E402
from genfuse import models, nn  # noqa: E402

torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *given, **settings: True


def to_gpu(model: torch.nn.Module) -> None:
    """Fake parameters and buffers in place of the model's, those that are shared stay so."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.ActNorm):
            module._asked = True  # it waits once in a training, and says so
        for name, own in list(module._parameters.items()):
            if own is not None:
                there = torch.nn.Parameter(torch.empty_like(own, device="cuda:0"), requires_grad=own.requires_grad)
                module._parameters[name] = moved.setdefault(id(own), there)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), torch.empty_like(buffer, device="cuda:0"))


def step(model: models.GenerativeModel, x: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    model.train()
    for player in model.players():
        optimizer = player.optimizer(player.parameters)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            loss, _ = model.loss(models.Batch(x, None), player.name)
        assert (loss.device.type, loss.dtype) == ("cuda", torch.float32), (loss.device, loss.dtype)
        loss.backward()
        optimizer.step()


def sample(model: models.GenerativeModel) -> None:
    model.eval()
    made = model.sample(4)
    assert (made.device.type, made.dtype) == ("cuda", torch.float32), (made.device, made.dtype)


for name in sys.argv[2:]:
    for shape in ((1, 16, 16), (6,)):
        try:
            model = genfuse.create(name, shape=shape)
        except genfuse.errors.GenfuseError:
            continue  # not of this shape
        if hasattr(model, "sigma_schedule"):  # they are made on the CPU, where fake tensors have no values either
            model.sampler = (model.sampler[0], 4)  # every step is as the others
            sigmas = model.sigma_schedule(4)
            model.sigma_schedule = lambda steps, sigmas=sigmas: sigmas
        with FakeTensorMode(allow_non_fake_inputs=True):
            to_gpu(model)
            x = torch.rand(8, *shape, device="cuda:0")
            for what, run in {
                "step": partial(step, model, x),
                "step in bfloat16": partial(step, model, x, torch.bfloat16),
                "step in float16": partial(step, model, x, torch.float16),
                "sample": partial(sample, model),
            }.items():
                try:
                    run()
                except Exception as error:
                    where = [f for f in traceback.extract_tb(error.__traceback__) if "genfuse" in f.filename]
                    print(f"{name} {shape}: {what}: {type(error).__name__}: {str(error)[:200]!r} at {where[-1:]}")
print("done")
