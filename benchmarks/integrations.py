"""`python -m benchmarks integrations`: other libraries patched with our operators, beside themselves.

One pinned thread, CPU time, both sides in turns of some calls each, of one model made before the patch. What is timed
is compared first: densities, samples or losses, patched and not, at the same weights and the same noise.
"""

import os
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._measure import pinned
from benchmarks._peers import MODELS, Flow

PEERS = ("nflows", "normflows", "zuko", "pythae", "sbi")
ERROR = 1e-3  # of the largest value, in float32; a sampled batch passes through 5 layers


@dataclass(frozen=True)
class Case:
    """What is timed, `call`, and what it computes, `result`, which is the same patched and not."""

    result: Callable[[], Tensor]
    call: Callable[[], Any]


def _training(model: nn.Module, loss: Callable[[], Tensor], result: Callable[[], Tensor]) -> Case:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return Case(result, step)


def _density(flow: Flow, rows: int = 256, features: int = 43) -> Case:
    x = torch.randn(rows, features)
    return _training(flow.model, lambda: -flow.log_prob(x).mean(), lambda: flow.log_prob(x))


def _samples(flow: Flow, rows: int = 1000) -> Case:
    def call() -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return flow.sample(rows)

    return Case(call, call)


def _zuko(name: str, **options: Any) -> Flow:
    import zuko

    flow = getattr(zuko.flows, name)(43, **options)
    return Flow(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def _normflows_maf() -> Flow:
    import normflows as nf

    layers = [nf.flows.MaskedAffineAutoregressive(43, 256, num_blocks=1) for _ in range(2)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(43, trainable=False), layers)
    return Flow(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def _vae() -> Case:
    from pythae.models import VAE, VAEConfig

    model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=20, reconstruction_loss="bce"))
    x = torch.rand(128, 1, 28, 28)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return model({"data": x}).loss

    return _training(model, loss, loss)


def _iaf() -> Case:
    from pythae.models.normalizing_flows import IAF, IAFConfig

    flow, x = IAF(IAFConfig(input_dim=(43,), hidden_size=256)).eval(), torch.randn(1000, 43)

    def call() -> Tensor:
        with torch.no_grad():
            return flow(x).out

    return Case(call, call)


def _sbi() -> Case:
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    prior = BoxUniform(-2 * torch.ones(5), 2 * torch.ones(5))
    theta = prior.sample((2000,))
    x = theta + 0.3 * torch.randn(2000, 5)

    def call() -> Tensor:
        torch.manual_seed(1)
        inference = NPE(prior=prior, density_estimator="nsf", show_progress_bars=False)
        inference.append_simulations(theta, x).train(max_num_epochs=4)
        inference.build_posterior().sample((1000,), x=x[:1], show_progress_bars=False)
        return torch.tensor(inference.summary["best_validation_loss"])

    return Case(call, call)


# Name: the library that is patched, that which is timed, the case, and what issue it has to be times as fast.
CASES: dict[str, tuple[str, str, Callable[[], Case], float | None]] = {
    "nflows RQ-NSF(C), a step": ("nflows", "nflows", lambda: _density(MODELS["nsf"]["nflows"](43)), 1.8),
    "nflows RQ-NSF(AR), a step": ("nflows", "nflows", lambda: _density(MODELS["nsf-ar"]["nflows"](43)), None),
    "nflows RQ-NSF(AR), 100 samples": ("nflows", "nflows", lambda: _samples(MODELS["nsf-ar"]["nflows"](43), 100), None),
    "nflows MAF, a step": ("nflows", "nflows", lambda: _density(MODELS["maf"]["nflows"](43)), None),
    "normflows RQ-NSF(C), a step": ("normflows", "normflows", lambda: _density(MODELS["nsf"]["normflows"](43)), 3.0),
    "normflows MAF, a step": ("normflows", "normflows", lambda: _density(_normflows_maf()), None),
    "zuko NSF, a step": ("zuko", "zuko", lambda: _density(_zuko("NSF")), 2.0),
    "zuko NSF of 5 x (256, 256), a step": ("zuko", "zuko", lambda: _density(MODELS["nsf-ar"]["zuko"](43)), 2.0),
    "zuko MAF of 5 x (256, 256), a step": ("zuko", "zuko", lambda: _density(MODELS["maf"]["zuko"](43)), 1.1),
    "zuko RealNVP, a step": ("zuko", "zuko", lambda: _density(MODELS["realnvp"]["zuko"](43)), None),
    "zuko MAF, 1,000 samples": ("zuko", "zuko", lambda: _samples(_zuko("MAF")), 20.0),
    "zuko MAF of 5 x (256, 256), 1,000 samples": ("zuko", "zuko", lambda: _samples(MODELS["maf"]["zuko"](43)), 20.0),
    "pythae VAE, a step": ("pythae", "pythae", _vae, None),
    "pythae IAF, 1,000 points": ("pythae", "pythae", _iaf, None),
    "sbi NPE, default NSF, end to end": ("nflows", "sbi", _sbi, 1.5),
}


@contextmanager
def _elsewhere() -> Iterator[None]:
    """In a folder that is deleted, with what sbi writes beside the code that calls it."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def compare(
    patched: str, make: Callable[[], Case], *, turns: int, block: float
) -> tuple[list[float], list[float], Any]:
    """Seconds a call of the peer alone, and patched, of each turn; and the report of one call.

    Raises:
        RuntimeError: if the results differ.
    """
    module = import_module(f"genfuse.integrations.{patched}")
    torch.manual_seed(0)
    case = make()
    theirs = case.result().detach()
    with module.patch():
        error = float((case.result().detach() - theirs).abs().max() / theirs.abs().max())
        report = module.report()
    if not error <= ERROR:
        raise RuntimeError(f"WRONG: results differ by {error:.1e} of the largest")
    sides: tuple[list[float], list[float]] = [], []
    calls = [0, 0]
    for turn in range(turns + 1):
        for side, times in enumerate(sides):
            with module.patch() if side else nullcontext():
                if turn == 0:  # of cold code; how many calls make a block
                    calls[side] = max(1, round(block / _seconds(case.call, 1)))
                    continue
                if calls[side] > 1:
                    case.call()
                times.append(_seconds(case.call, calls[side]))
    return *sides, report


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name has one of these words")
    parser.add_argument("--quick", action="store_true", help="one turn: a check that all runs, not a measurement")


def run(args: Namespace) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)  # of the peers, about what PyTorch will take away
    found = {}
    for peer in PEERS:
        try:
            found[peer] = version(peer)
        except PackageNotFoundError:
            found[peer] = ""
    print(*(f"{name} {at or '(absent)'}" for name, at in found.items()), f"PyTorch {torch.__version__}\n", sep=", ")
    print("| one thread, D = 43, 256 rows | alone | patched | times as fast | bar | calls left to the library |")
    print("|---|---|---|---|---|---|")
    with pinned(), _elsewhere():
        for name, (patched, library, make, bar) in CASES.items():
            if args.only and not any(word.lower() in name.lower() for word in args.only):
                continue
            if not (found[library] and found[patched]):
                print(f"| {name} | {library} is not installed: `pip install '.[peers]'` | | | | |")
                continue
            effort = {"turns": 1, "block": 0.0} if args.quick else {"turns": 7, "block": 0.2}
            theirs, ours, report = compare(patched, make, **effort)
            ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
            ratio, low, high = median(ratios), ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
            left = sum(sum(why.values()) for why in report.left.values())
            verdict = f"{bar:g}, {'met' if ratio >= bar else 'NOT MET'}" if bar else ""
            print(
                f"| {name} | {_time(median(theirs))} | {_time(median(ours))} | {ratio:.2f} [{low:.2f}, {high:.2f}] "
                f"| {verdict} | {left} of {left + sum(report.served.values())} |",
                flush=True,
            )
