"""Verbs of a model as programs that run without this library: `torch.export` and ONNX."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from genfuse import ops
from genfuse._files import replacing
from genfuse.errors import SettingsError
from genfuse.models import Decodes, Encodes, GenerativeModel, HasTrajectory
from genfuse.nn import Features
from genfuse.training import Run

EXAMPLES = 3  # that a verb is traced with; a program takes any number of them


class _Program(nn.Module):
    """One verb of a model, in the units of its data."""

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, verb: str, scaling: Any) -> None:
        super().__init__()
        self.model, self.verb, self.scaled = model, verb, scaling is not None
        if scaling is not None:
            self.register_buffer("mean", torch.tensor(scaling.mean, dtype=torch.float64))
            self.register_buffer("std", torch.tensor(scaling.std, dtype=torch.float64))

    def forward(self, x: Tensor, *y: Tensor) -> Tensor:
        inward = self.verb in ("log_prob", "encode")
        if self.scaled and inward:
            x = ((x - self.mean) / self.std).float()
        out = self.model.trajectory(x, *y)[-1] if self.verb == "sample" else getattr(self.model, self.verb)(x, *y)
        if not self.scaled or self.verb == "encode":
            return out
        return out - self.std.log().sum().float() if inward else out.double() * self.std + self.mean


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

    Programs of a conditional model also take y: labels (N,), or a context (N, C) as the model is given it.

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
    if missing := [verb for verb in verbs if verb not in has]:
        raise SettingsError(
            f"a {type(model).__name__} has no {missing[0]} that could be exported; it has: {', '.join(has) or 'none'}"
        )
    files: list[Path] = []
    programs: dict[str, torch.export.ExportedProgram] = {}
    for verb in verbs or has:
        of = "decode" if verb == "sample" and isinstance(model, Decodes) else verb
        programs[of] = programs.get(of) or _exported(run, model, of)
        file = out.with_name(f"{out.stem}-{verb}{out.suffix}")
        _write(programs[of], file)
        say(f"written: {file}")
        files.append(file)
    return files


def _exported(run: Run, model: GenerativeModel, verb: str) -> torch.export.ExportedProgram:
    shape = tuple(run.config["data"]["shape"])
    scaling = run.scaling
    cells = torch.Size(shape).numel()
    if verb in ("log_prob", "encode"):
        x = torch.rand(EXAMPLES, *shape, dtype=torch.float32 if scaling is None else torch.float64)
    else:
        x = torch.randn(EXAMPLES, int(getattr(model, "latent_dim", cells)))
    given: list[Tensor] = []
    if model.conditional:
        context = isinstance(model.embedding, Features)
        width = run.config["model"]["settings"].get("condition") or 0
        given = [torch.randn(EXAMPLES, width) if context and width else torch.zeros(EXAMPLES, dtype=torch.int64)]
    program = _Program(model, verb, scaling).eval()
    with torch.no_grad(), _quiet():
        dynamic = ({0: Dim.DYNAMIC}, *([({0: Dim.DYNAMIC},)] if given else []))
        exported = torch.export.export(program, (x, *given), dynamic_shapes=dynamic, strict=True)
        solve = {torch.ops.aten.linalg_solve_triangular.default: _solved}
        return exported.run_decompositions({**torch.export.default_decompositions(), **ops.decompositions(), **solve})


def _solved(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    """`torch.linalg.solve_triangular`, which ONNX does not have, by substitution."""
    if not left:
        return _solved(a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    n, x = a.shape[-1], b[..., :0, :]
    for i in reversed(range(n)) if upper else range(n):
        known = slice(i + 1, n) if upper else slice(0, i)
        row = b[..., i : i + 1, :] - a[..., i : i + 1, known] @ x
        row = row if unitriangular else row / a[..., i : i + 1, i : i + 1]
        x = torch.cat([row, x] if upper else [x, row], -2)
    return x


def _write(program: torch.export.ExportedProgram, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as beside, _quiet():
        if file.suffix == ".pt2":
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            beside.write_bytes(buffer.getvalue())
        else:
            written = torch.onnx.export(program, dynamo=True, verbose=False)
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
