"""`make sanitize`: the operators' tests and the fuzz under sanitizers and in several orders of threads.

Prints what it ran and how it ended. The exit status is 1 where anything was found.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator

TESTS = ["-m", "pytest", "-p", "emulated", "-q", "-m", "not slow", "-r", "fE", "--capture=sys", "tests/ops"]
FUZZ = ["tests/cuda_emulator/fuzz.py"]
RUNS = [  # variant, order of threads, what is run
    ("cpu", 0, TESTS),
    ("cpu", 0, FUZZ),
    ("asan", 0, TESTS),
    ("asan", 1, [*FUZZ, "--share", "0.3"]),
    ("tsan", 0, TESTS),
    ("tsan", 1, [*FUZZ, "--share", "0.1"]),
    ("plain", 0, FUZZ),
    *(("plain", order, TESTS) for order in (1, 2, 3)),
]
PRELOAD = {  # of a library that throws exceptions, AddressSanitizer must know before it starts
    "cpu": ("libasan.so", "libstdc++.so.6"),
    "asan": ("libasan.so", "libstdc++.so.6"),
    "tsan": ("libtsan.so",),
    "plain": (),
}


def run(variant: str, order: int, command: list[str]) -> bool:
    """Whether a run, in a process of its own, found nothing."""
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
    text = done.stdout if done.returncode == 0 else f"{done.stdout[-20_000:]}{done.stderr[-20_000:]}"
    last = text.strip().splitlines()[-1:] if done.returncode == 0 else [text]
    kernels = "C++ kernels, AddressSanitizer, UBSan" if variant == "cpu" else f"emulated CUDA, {variant}, order {order}"
    print(f"{'FOUND' if done.returncode else 'clean'}  {kernels}: {' '.join(command)}, {time.time() - start:.0f} s")
    print("       " + "".join(last), flush=True)
    return done.returncode == 0


def main() -> int:
    for variant in emulator.VARIANTS:
        print(f"built  {Path(emulator.module(variant)).relative_to(emulator.ROOT)}", flush=True)
    mistakes = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/cuda_emulator", "-k", "planted"], cwd=emulator.ROOT
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = list(pool.map(lambda job: run(*job), RUNS))
    print(f"{sum(clean)} of {len(clean)} runs found nothing")
    return int(mistakes.returncode != 0 or not all(clean))


if __name__ == "__main__":
    sys.exit(main())
