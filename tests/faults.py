"""Trainings, comparisons and evaluations under faults: `python -m tests.faults [--kills N]`. It takes minutes.

Each fault is tried many times at moments and places that a seed rules, and each try is held against the same work
without a fault: the bytes of weights and state, the lines of metrics and the figures of a table must be the same. The
table that is printed is the one of docs/reliability.md. What must be mounted, as small disks, needs root.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genfuse
from genfuse import plugins
from genfuse.errors import GenfuseError
from genfuse.training import Run, Trainer

CLOCKS = ("seconds", "examples_per_second", "training_seconds", "sampling_seconds", "peak_memory")
STEPS = 24
IMAGES = ("glow",)  # models that take images alone
PRELOAD = (
    "lightning_fabric",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "rich.progress",
    "matplotlib.figure",
    "scipy.linalg",
)
MODELS = [plugin.name for plugin in plugins.discover("models") if plugin.distribution == plugins.OURS]


# What is done, each in a process of its own


def small(model: str) -> dict[str, Any]:
    """Settings of a network that trains in moments."""
    fields = {field.name: field.default for field in dataclasses.fields(genfuse.models.load(model).Config)}
    made = {"hidden": (8,), "channels": (8,), "layers": 2, "levels_of_scale": 1, "timesteps": 20, "latent_dim": 2}
    made |= {"decoder": "gaussian", "blocks": 1, "depth": 1}
    settings = {}
    for name, value in made.items():
        if name in fields:
            settings[name] = value[0] if isinstance(value, tuple) and isinstance(fields[name], int) else value
    return settings


def name_of_data(model: str, home: Path) -> str:
    return "digits" if model in IMAGES else f"npy:{home}/table.npy"


def train(home: Path, model: str, out: Path) -> None:
    """Begin a run, or go on with it."""
    data = genfuse.load_data(name_of_data(model, home))
    resume = (out / "config.json").is_file()
    options = {"batch_size": 32, "checkpoint_every": 1, "log_every": 1, "pictures": False, "device": "cpu"}
    torch.manual_seed(0)
    Trainer(steps=STEPS, out=out, resume=resume, **options).fit(genfuse.create(model, data, **small(model)), data)


def compare(home: Path, out: Path) -> None:
    data = genfuse.load_data(f"npy:{home}/table.npy")
    settings = {name: json.loads(json.dumps(small(name))) for name in ("vae", "maf")}
    trainer = Trainer(device="cpu", batch_size=32)
    genfuse.compare(
        [*settings], data, out=out, budget="256examples", seeds=2, settings=settings, trainer=trainer, n=70, limit=4
    )


def evaluate(home: Path, run: Path) -> None:
    from genfuse.cli import main

    assert main(["evaluate", str(run), "--samples", "2", "--limit", "20", "--n", "70"]) == 0


def sample(home: Path, run: Path) -> None:
    from genfuse.cli import main

    assert main(["sample", str(run), "--n", "5", "--out", f"{home}/x.npy", "--overwrite"]) == 0


def compare_run(home: Path, run: Path) -> None:
    shutil.rmtree(home / "compared", ignore_errors=True)
    result = genfuse.comparison.compare_runs([run], out=home / "compared", device="cpu", n=70, limit=4)
    assert result["rows"][0]["outcome"] == "1 of 1", result["rows"][0]["outcome"]


def job(work: Callable[..., None], said: Path, *args: Any) -> None:
    """Ends with 0, or 2 for an error that is documented, 3 for any other; ``said`` is what a user would read."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            work(*args)
        code = 0
    except GenfuseError as error:
        code = 2
        text.write(str(error))
    except BaseException as error:  # OSErrors too, which the command line shows as they are
        code = 3
        text.write(f"{type(error).__name__}: {error}")
    said.write_text(text.getvalue())
    os._exit(code)


class Faults:
    def __init__(self, home: Path, kills: int) -> None:
        self.home, self.kills, self.random = home, kills, random.Random(0)
        self.seconds = 1.0  # within which a job is killed
        self.findings: list[str] = []
        self.table: list[tuple[str, str, int, int]] = []
        os.environ["PYTHONWARNINGS"] = "ignore:'tests.faults' found in sys.modules"  # as it is loaded for each job
        self.jobs = multiprocessing.get_context("forkserver")
        self.jobs.set_forkserver_preload(
            ["tests.faults", "genfuse.training", "genfuse.comparison", "genfuse.cli", *PRELOAD]
        )
        np.save(home / "table.npy", np.random.default_rng(0).normal(size=(500, 2)))

    def start(self, work: Callable[..., None], *args: Any) -> Any:
        said = Path(tempfile.mkstemp(dir=self.home)[1])
        process = self.jobs.Process(target=job, args=(work, said, self.home, *args))
        process.start()
        process.said = said
        return process

    def finish(self, work: Callable[..., None], *args: Any) -> tuple[int, str]:
        process = self.start(work, *args)
        process.join(120)
        return process.exitcode, process.said.read_text()

    @contextlib.contextmanager
    def fault(self, name: str, checked: str) -> Iterator[Callable[[], None]]:
        """Counts tries and findings, and prints the row of the table."""
        before, tries = len(self.findings), 0

        def tried() -> None:
            nonlocal tries
            tries += 1

        began = time.monotonic()
        try:
            yield tried
        except Exception as error:
            self.findings.append(f"{name}: {type(error).__name__}: {error}")
        self.table.append((name, checked, tries, len(self.findings) - before))
        row = f"{name}: {tries} tries, {len(self.findings) - before} findings, {time.monotonic() - began:.0f} s"
        print(row, *self.findings[before:], sep="\n    ", file=sys.stderr, flush=True)

    def expect(self, true: bool, finding: str) -> None:
        if not true:
            self.findings.append(finding)

    def whole(self, model: str) -> Path:
        """A run of a model that nothing disturbed."""
        out = self.home / "whole" / model
        if not out.exists():
            code, said = self.finish(train, model, out)
            assert code == 0, said
        return out

    def same(self, out: Path, model: str) -> bool:
        """Whether a run is, to the byte and but for clocks, the one that nothing disturbed."""
        whole = self.whole(model)
        names = ("state.safetensors", "model.safetensors")
        lines = [
            [{k: v for k, v in e.items() if k not in CLOCKS} for e in Run(path).metrics()] for path in (out, whole)
        ]
        return lines[0] == lines[1] and all((out / n).read_bytes() == (whole / n).read_bytes() for n in names)

    def kill_at(self, process: Any) -> bool:
        """Kill a job at some moment; whether it was still at work. How long jobs last is learnt on the way."""
        process.join(self.random.uniform(0, self.seconds))
        working = process.is_alive()
        self.seconds *= 1.1 if working else 0.7
        process.kill()
        process.join()
        return working

    # The faults

    def killed_trainings(self) -> None:
        each = max(1, round(0.8 * self.kills / len(MODELS)))
        with self.fault(
            f"SIGKILL at any moment of a training, {len(MODELS)} models",
            "resumed, it ends in the same bytes and metrics",
        ) as tried:
            for model in MODELS:
                self.whole(model)
                number = landed = 0
                out = self.home / "killed" / f"{model}-{number}"
                while landed < each:
                    if self.kill_at(self.start(train, model, out)):
                        landed += 1
                        tried()
                    else:
                        self.expect(self.same(out, model), f"{model}: the run {out} is not the one without kills")
                        number += 1
                        out = self.home / "killed" / f"{model}-{number}"
                code, said = self.finish(train, model, out)
                self.expect(code == 0, f"{model}: {out} cannot be resumed: {said}")
                self.expect(code != 0 or self.same(out, model), f"{model}: the run {out} is not the one without kills")
                left = [path.name for path in out.rglob(".*")]
                self.expect(not left, f"{model}: {out} holds {left}")

    def killed_comparisons(self) -> None:
        def figures(out: Path) -> Any:
            rows = json.loads((out / "comparison.json").read_text())["rows"]
            kept = [[{k: v for k, v in r["figures"].items() if k not in CLOCKS} for r in row["runs"]] for row in rows]
            return [row["label"] for row in rows], kept

        with self.fault(
            "SIGKILL at any moment of a comparison", "the same command goes on to the same figures"
        ) as tried:
            began = time.monotonic()
            code, said = self.finish(compare, self.home / "compare")
            assert code == 0, said
            self.seconds, number, landed = time.monotonic() - began, 0, 0
            while landed < self.kills // 10:
                out = self.home / f"compare-{number}"
                number += 1
                for _ in range(4):
                    if not self.kill_at(self.start(compare, out)):
                        break
                    landed += 1
                    tried()
                code, said = self.finish(compare, out)
                self.expect(code == 0, f"{out} does not go on: {said}")
                self.expect(code != 0 or figures(out) == figures(self.home / "compare"), f"{out} has other figures")

    def killed_evaluations(self) -> None:
        with self.fault(
            "SIGKILL at any moment of an evaluation", "the run is as it was; evaluation.json is whole or absent"
        ) as tried:
            run = self.home / "evaluated"
            shutil.copytree(self.whole("vae"), run)
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            began = time.monotonic()
            assert self.finish(evaluate, run)[0] == 0
            self.seconds, whole = time.monotonic() - began, (run / "evaluation.json").read_bytes()
            landed = 0
            while landed < self.kills // 10:
                (run / "evaluation.json").unlink(missing_ok=True)
                if self.kill_at(self.start(evaluate, run)):
                    landed += 1
                    tried()
                there = (run / "evaluation.json").read_bytes() if (run / "evaluation.json").exists() else whole
                self.expect(there == whole, "evaluation.json is half there")
                self.expect(all(path.read_bytes() == raw for path, raw in before.items()), "the run has changed")
            assert self.finish(evaluate, run)[0] == 0
            self.expect((run / "evaluation.json").read_bytes() == whole, "the same evaluation gives other numbers")

    def signals(self) -> None:
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        with self.fault(" / ".join(names) + " in a training", "saved, ended, and resumed to the same bytes") as tried:
            for number in range(12):
                model, name = MODELS[number % len(MODELS)], names[number % 3]
                out = self.home / "signalled" / f"{model}-{number}"
                process = self.start(train, model, out)
                while process.is_alive() and not (out / "tensorboard").exists():
                    time.sleep(0.005)
                os.kill(process.pid, getattr(signal, name))
                process.join(60)
                tried()
                if process.exitcode != 0:  # else it had ended
                    self.expect(
                        process.exitcode in (3, -getattr(signal, name)), f"{name}: ended with {process.exitcode}"
                    )
                code, said = self.finish(train, model, out)
                self.expect(
                    code == 0 and self.same(out, model), f"{name}: {out} is not the run without signals: {said}"
                )

    def flips(self) -> None:
        with self.fault(
            "one bit flipped in a file of a run", "noticed, or of no effect: resumed, it ends in the same bytes"
        ) as tried:
            for number in range(self.kills // 4):
                model = MODELS[number % len(MODELS)]
                out = self.home / "flipped"
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(self.whole(model), out)
                file = self.random.choice(sorted(path for path in out.iterdir() if path.is_file()))
                raw = bytearray(file.read_bytes())
                raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
                file.write_bytes(raw)
                tried()
                code, said = self.finish(train, model, out)
                self.expect(code in (0, 2), f"{file.name} of {model}: {said}")
                config = file.name == "config.json" and code == 0  # which may end at another step, as it now says
                same = config or code != 0 or self.same(out, model)
                self.expect(same, f"a flip in {file.name} of {model} was taken for what was written")

    def two_writers(self) -> None:
        with self.fault(
            "two trainings into one folder, 0 to 40 ms apart", "one is refused by name; the other's run is whole"
        ) as tried:
            for number in range(24):
                model, begun = MODELS[number % len(MODELS)], number % 2
                out = self.home / "shared" / str(number)
                if begun:  # both resume
                    process = self.start(train, model, out)
                    while process.is_alive() and not (out / "config.json").exists():
                        time.sleep(0.002)
                    process.kill()
                    process.join()
                processes = [self.start(train, model, out)]
                time.sleep(self.random.uniform(0, 0.04))
                processes.append(self.start(train, model, out))
                for process in processes:
                    process.join(120)
                tried()
                said = [process.said.read_text() for process in processes]
                codes = [process.exitcode for process in processes]
                # The second may come after the first has ended: then it resumes a finished run, which changes nothing.
                refused = [text for code, text in zip(codes, said, strict=True) if code == 2]
                named = all("is being written to by" in text or "exists: choose" in text for text in refused)
                self.expect(0 in codes and set(codes) <= {0, 2} and named, f"{model}: {codes} {said}")
                self.expect(self.same(out, model), f"{model}: the run {out} is torn")

    def full_disk(self) -> None:
        disk = self.home / "disk"
        disk.mkdir(exist_ok=True)
        with self.fault(
            "disk full at some byte of a training",
            "file and last checkpoint are named; with room it ends in the same bytes",
        ) as tried:
            for number in range(32):
                model = MODELS[number % len(MODELS)]
                size = sum(path.stat().st_size for path in self.whole(model).rglob("*") if path.is_file()) // 1024
                most = 16 + self.random.randrange(max(1, size))  # kB; pages of 4 kB take more
                with mounted(disk, most):
                    code, said = self.finish(train, model, disk / "run")
                    if code == 0:
                        continue
                    tried()
                    begun = (disk / "run" / "config.json").exists()
                    named = "No space left on device: '" in said and ("which is whole" in said or "cannot be" in said)
                    self.expect(code == 2 and named, f"{model} in {most} kB: ended with {code}: {said}")
                    self.expect("Traceback" not in said, f"{model} in {most} kB: a traceback: {said}")
                    if begun:
                        Run(disk / "run").model()
                    subprocess.run(["mount", "-o", f"remount,size={most + 8 * size + 999}k", disk], check=True)
                    code, said = self.finish(train, model, disk / "run")
                    self.expect(
                        code == 0 and self.same(disk / "run", model), f"{model} in {most} kB, then more: {said}"
                    )

    def read_only(self) -> None:
        disk = self.home / "disk"
        disk.mkdir(exist_ok=True)
        with (
            self.fault(
                "a run on a disk for reading alone", "evaluated, sampled and compared; training is refused"
            ) as tried,
            mounted(disk, 99_999),
        ):
            for model in ("vae", "maf", "gan", "ddpm"):
                shutil.copytree(self.whole(model), disk / model)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            for model in ("vae", "maf", "gan", "ddpm"):
                for work in (evaluate, sample, compare_run):
                    code, said = self.finish(work, disk / model)
                    tried()
                    self.expect(code == 0, f"{work.__name__} of {model}: {said}")
                code, said = self.finish(train, model, disk / model)
                self.expect(code in (2, 3) and "Read-only file system" in said, f"train {model}: {code}: {said}")


@contextlib.contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


ALL = ("killed_trainings", "killed_comparisons", "killed_evaluations", "signals", "flips", "two_writers")
OF_ROOT = ("full_disk", "read_only")


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(ALL + OF_ROOT)}; by default all")
    parser.add_argument("--kills", type=int, default=200, help="of trainings, comparisons and evaluations together")
    options = parser.parse_args()
    chosen = options.faults or [*ALL, *OF_ROOT]
    if os.geteuid() != 0:
        print(f"left out, as they need root: {', '.join(OF_ROOT)}", file=sys.stderr)
        chosen = [name for name in chosen if name not in OF_ROOT]
    with tempfile.TemporaryDirectory() as home:
        faults = Faults(Path(home), options.kills)
        for name in chosen:
            getattr(faults, name)()
        print("| fault | what must hold | tries | findings |\n| --- | --- | --: | --: |")
        for row in faults.table:
            print(f"| {' | '.join(map(str, row))} |")
        return min(1, len(faults.findings))


if __name__ == "__main__":
    sys.exit(main())
