"""`make sanitize`: the operators' tests and the fuzz under sanitizers and in several orders of threads.

    python tests/cuda_emulator/sanitize.py [--only cpu asan tsan plain] [--fuzz 0.2] [operator ...]

Each operator runs in processes of its own, so that what ends one hides nothing of the others. Prints a table of what
ran and what was found; the exit status is 1 where anything was found, or nothing ran.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator

OPERATORS = sorted(p.parent.name for p in emulator.ROOT.glob("csrc/*/cpu.cpp"))
COLUMNS = {  # variant: what it is, the orders of threads for the tests, and for the fuzz with its share of cases
    "cpu": ("C++, asan + ubsan", (0,), {0: 1.0}),
    "asan": ("CUDA, asan + ubsan", (0,), {1: 0.3}),
    "tsan": ("CUDA, tsan", (0,), {1: 0.1}),
    "plain": ("CUDA, orders 0 to 3", (0, 1, 2, 3), {0: 1.0}),
}
PRELOAD = {  # of a library that throws exceptions, AddressSanitizer must know before it starts
    "cpu": ("libasan.so", "libstdc++.so.6"),
    "asan": ("libasan.so", "libstdc++.so.6"),
    "tsan": ("libtsan.so",),
    "plain": (),
}
REPORT = r"WARNING: ThreadSanitizer|ERROR: AddressSanitizer|: runtime error: "


def jobs(variants: list[str], operators: list[str], fuzz: float | None) -> list[tuple[str, str, int, list[str]]]:
    """Operator, variant, order of threads and command of each run; of the fuzz alone, and a share of it, if asked."""
    made = []
    for variant in variants:
        _, orders, shares = COLUMNS[variant]
        for operator in operators:
            if variant != "cpu" and operator in emulator.CPP_ONLY:
                continue
            tests = [
                *emulator.PYTEST,
                "--capture=sys",
                "-k",
                operator,
            ]
            if fuzz is None:
                made += [(operator, variant, order, [*tests, "tests/ops"]) for order in orders]
            command = ["tests/cuda_emulator/fuzz.py", operator, "--share"]
            made += [(operator, variant, order, [*command, str((fuzz or 1) * s)]) for order, s in shares.items()]
    return made


def run(operator: str, variant: str, order: int, command: list[str]) -> tuple[int, int]:
    """How many cases ran in a process of their own, and how many mistakes they found."""
    environment = {
        **os.environ,
        "EMULATED": variant,
        "EMULATOR_ORDER": str(order),
        "PYTHONPATH": str(emulator.HERE),
        "OMP_NUM_THREADS": "2" if variant == "cpu" else "1",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's
    }
    if libraries := PRELOAD[variant]:
        names = [f"-print-file-name={library}" for library in libraries]
        found = [subprocess.run(["gcc", name], capture_output=True, text=True, check=True).stdout for name in names]
        environment["LD_PRELOAD"] = " ".join(map(str.strip, found))
    start = time.time()
    done = subprocess.run(
        [sys.executable, *command], cwd=emulator.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    cases, findings = outcome(done.stdout + done.stderr, done.returncode)
    print(f"{findings or 'nothing'} found in {cases} cases of {operator}, {variant}, order {order}, "
          f"{'tests' if '-m' in command else 'fuzz'}, {time.time() - start:.0f} s", flush=True)  # fmt: skip
    if findings:
        print(f"{' '.join(command)}\n{done.stdout[-20_000:]}{done.stderr[-20_000:]}", flush=True)
    return cases, findings


def outcome(text: str, status: int) -> tuple[int, int]:
    """Cases and findings of what a run of tests or of the fuzz has printed. What ended it otherwise is a finding."""

    def count(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, text)))

    findings = count(r"(\d+) (?:failed|errors?|results wrong)\b") + len(re.findall(REPORT, text))
    cases = count(r"(\d+) (?:passed|failed|cases)\b")
    return cases, findings or int(status != 0 or not cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", default=OPERATORS)
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=[*COLUMNS], help="variants of the build")
    parser.add_argument("--fuzz", type=float, metavar="SHARE", help="the fuzz alone, of a share of its cases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    settings = parser.parse_args()
    for variant in settings.only:
        print(f"built {Path(emulator.module(variant)).relative_to(emulator.ROOT)}", flush=True)
    mistakes = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/cuda_emulator", "-k", "planted"], cwd=emulator.ROOT
    )
    todo = jobs(settings.only, settings.operators, settings.fuzz)
    with ThreadPoolExecutor(settings.jobs) as pool:
        results = list(pool.map(lambda job: run(*job), todo))
    rows = [["", *(COLUMNS[variant][0] for variant in settings.only)]]
    for operator in settings.operators:
        rows.append([operator])
        for variant in settings.only:
            of = [(0, 0)] + [
                result for job, result in zip(todo, results, strict=True) if job[:2] == (operator, variant)
            ]
            cases, findings = map(sum, zip(*of, strict=True))
            none = variant != "cpu" and operator in emulator.CPP_ONLY
            rows[-1].append("no kernel" if none else f"{cases} cases, {findings} found")
    for row in rows:
        print(f"{row[0]:27}" + "".join(f"{cell:>25}" for cell in row[1:]))
    return int(mistakes.returncode != 0 or any(findings for _, findings in results))


if __name__ == "__main__":
    sys.exit(main())
