"""Verbs of a model as programs that run without this library: `torch.export` and ONNX."""

import importlib.util
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.torch_version import TorchVersion

from genfuse import ops
from genfuse._files import replacing
from genfuse.data import Schema
from genfuse.errors import SettingsError
from genfuse.models import Decodes, DiffusionModel, Encodes, GenerativeModel, HasTrajectory
from genfuse.nn import Features, LULinear
from genfuse.training import Run

EXAMPLES = 3  # that a verb is traced with; a program takes any number of them
LOOPS = TorchVersion(torch.__version__) >= "2.13"  # of which ONNX takes a loop; it has each step otherwise


class _Program(nn.Module):
    """One verb of a model, in the units of its data."""

    model: Any
    mean: Tensor
    std: Tensor
    whole: Tensor  # of which columns all values are whole numbers, as codes of categories are

    def __init__(self, model: Any, verb: str, scaling: Any, schema: Schema | None) -> None:
        super().__init__()
        self.model, self.verb, self.scaled = model, verb, scaling is not None
        for layer in model.modules():
            if isinstance(layer, LULinear):
                layer._solve()
        if scaling is not None:
            self.register_buffer("mean", torch.tensor(scaling.mean, dtype=torch.float64))
            self.register_buffer("std", torch.tensor(scaling.std, dtype=torch.float64))
            whole = [column.whole for column in schema.columns] if schema else [False] * len(scaling.mean)
            self.register_buffer("whole", torch.tensor(whole))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        inward = self.verb in ("log_prob", "encode")
        if self.scaled and inward:
            x = ((x - self.mean) / self.std).float()
        if self.verb == "trajectory":
            looped = LOOPS and type(self.model).trajectory is DiffusionModel.trajectory
            out = self.model.trajectory_end(x, *given) if looped else self.model.trajectory(x, *given)[-1]
        elif self.verb == "draw":
            out = self.model.decode(x, *given[1:], u=given[0])
        else:
            out = getattr(self.model, self.verb)(x, *given)
        if not self.scaled or self.verb == "encode":
            return out
        if inward:
            return out - self.std.log().sum().float()
        out = out.double() * self.std + self.mean
        return torch.where(self.whole, out.round(), out)


def verbs_of(model: GenerativeModel) -> list[str]:
    """Those of log_prob, encode, decode and sample that a model has as functions without noise of their own."""
    standard = getattr(model, "prior", None) is None
    has = {
        "log_prob": "log_prob" in model.likelihoods and not hasattr(model, "log_prob_and_error"),  # which solves an ODE
        "encode": isinstance(model, Encodes),
        "decode": isinstance(model, Decodes),
        "sample": standard and isinstance(model, (Decodes, HasTrajectory)),
    }
    return [verb for verb, there in has.items() if there]


def export(
    run: Run | str | Path, out: str | Path, verbs: Sequence[str] = (), *, say: Callable[[str], None] = print
) -> list[Path]:
    """Write verbs of a run's model as programs that take any number of examples; returns the files, OUT-VERB.SUFFIX.

    ``out`` ends in .pt2 (`torch.export`, which `torch.export.load` reads) or .onnx. The programs are made of standard
    operators, and of a table take and give its own units, as float64. By ``verbs``, by default all that the model has:

    - ``log_prob``: x (N, *shape) -> log p(x), (N,) nats, of the examples in those units;
    - ``encode``: x -> z (N, D); ``decode``: z -> x;
    - ``sample``: z ~ N(0, I) (N, D) -> a draw x (N, *shape): noise is given, since a program draws none. Of a VAE the
      mean E[x | z].

    A table with columns of several kinds is an array of numbers: categories by their codes 0, 1, ..., dates as days or
    seconds since 1970-01-01, and NaN where a cell is missing. OUT-columns.json says what they mean. ``sample`` of a VAE
    or GAN then takes u (N, U) too, uniform draws in (0, 1), which say what is drawn where z leaves it open.

    Programs of a conditional model also take y, last: labels (N,), or a context (N, C) as the model is given it.

    Raises SettingsError for another suffix, a verb that the model does not have, and ONNX without the packages onnx and
    onnxscript.
    """
    run, out = run if isinstance(run, Run) else Run(run), Path(out)
    if out.suffix not in (".pt2", ".onnx"):
        raise SettingsError(f"--out must end in .pt2 or .onnx; got {out}")
    needed = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if out.suffix == ".onnx" and needed:
        raise SettingsError(
            f"ONNX needs the package {' and '.join(needed)}: pip install onnx onnxscript; or write .pt2"
        )
    model = run.model()
    has = verbs_of(model)
    if missing := [verb for verb in verbs if verb not in has] or ["verb"] * (not has):
        raise SettingsError(
            f"a {type(model).__name__} has no {missing[0]} that could be exported; it has: {', '.join(has) or 'none'}"
            + _why(model, missing[0])
        )
    files: list[Path] = []
    programs: dict[str, Path] = {}
    for verb in verbs or has:
        of = verb
        if verb == "sample":
            draws = getattr(model, "uniforms", 0)
            of = "draw" if draws else "decode" if isinstance(model, Decodes) else "trajectory"
        file = out.with_name(f"{out.stem}-{verb}{out.suffix}")
        if of in programs:
            with replacing(file) as beside:
                shutil.copyfile(programs[of], beside)
        else:
            _write(_exported(run, model, of), file, ["x", *["u"] * (of == "draw"), *["y"] * model.conditional])
        programs[of] = file
        say(f"written: {file}")
        files.append(file)
    if (schema := run.schema) is not None:
        file = out.with_name(f"{out.stem}-columns.json")
        known = ("name", "kind", "categories", "unit", "missing")
        columns = [{name: getattr(column, name) for name in known} for column in schema.columns]
        with replacing(file) as beside:
            beside.write_text(json.dumps(columns, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"written: {file}: what the numbers of each column mean")
        files.append(file)
    return files


def _why(model: Any, verb: str) -> str:
    """Why a model has not this verb as a program."""
    if verb == "log_prob" and hasattr(model, "log_prob_and_error"):
        return "; its density is the solution of a differential equation, in steps that depend on the example"
    bound = verb == "log_prob" and "elbo" in model.likelihoods
    return "; it has a bound of its likelihood alone, which draws noise: a program draws none" if bound else ""


def _exported(run: Run, model: GenerativeModel, verb: str) -> torch.export.ExportedProgram:
    shape = tuple(run.config["data"]["shape"])
    scaling = run.scaling
    columns, cells = getattr(model, "columns", None), torch.Size(shape).numel()
    if columns is not None:  # of a flow, or a diffusion model
        cells = columns.latents if isinstance(model, Encodes) else columns.width
    if verb in ("log_prob", "encode"):
        x = torch.rand(EXAMPLES, *shape, dtype=torch.float32 if scaling is None else torch.float64)
    else:
        x = torch.randn(EXAMPLES, int(getattr(model, "latent_dim", cells)))
    given: list[Tensor] = []
    if verb == "draw":
        given.append(torch.rand(EXAMPLES, getattr(model, "uniforms", 0)))
    if model.conditional:
        context = isinstance(model.embedding, Features)
        width = run.config["model"]["settings"].get("condition") or 0
        given.append(torch.randn(EXAMPLES, width) if context and width else torch.zeros(EXAMPLES, dtype=torch.int64))
    program = _Program(model, verb, scaling, run.schema).eval()
    with torch.no_grad(), _quiet():
        each = {0: Dim.DYNAMIC}
        dynamic = (each, *([tuple(each for _ in given)] if given else []))
        exported = torch.export.export(program, (x, *given), dynamic_shapes=dynamic, strict=True)
        return exported.run_decompositions({**torch.export.default_decompositions(), **ops.decompositions(), **OURS})


def _searched(knots: Tensor, x: Tensor, **_: Any) -> Tensor:
    """`torch.searchsorted`, which ONNX does not have, by comparing all."""
    return (knots[..., None, :] < x[..., None]).sum(-1)


def _added(total: Tensor, dim: int, index: Tensor, source: Tensor, **_: Any) -> Tensor:
    """`torch.index_add` along the last axis, which ONNX does not have, by a product with 0 and 1."""
    places = index[:, None] == torch.arange(total.shape[-1], device=index.device)
    return total + (source.double() @ places.double()).to(total.dtype)


OURS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.searchsorted.Tensor: _searched,
    torch.ops.aten.index_add.default: _added,
}


def _write(program: torch.export.ExportedProgram, file: Path, names: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as beside, _quiet():
        if file.suffix == ".pt2":
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            beside.write_bytes(buffer.getvalue())
        else:
            written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names)
            assert written is not None
            beside.write_bytes(written.model_proto.SerializeToString())


@contextmanager
def _quiet() -> Any:
    """Without what the exporters say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
