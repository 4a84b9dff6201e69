"""The operators' tests pass on their CUDA kernels, without a GPU; and the emulator finds what is planted."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import sanitize
from required import skip

HERE = Path(__file__).resolve().parent

PLAIN = {  # what is said of a kernel with a mistake
    "no_barrier": "a result is wrong",
    "divergent_shuffle": "no thread can go on",
    "absent_lane": "reads lane 8, which is not there",
    "divergent_barrier": "wait at __syncthreads of tests/cuda_emulator/mistakes.cu:",
    "returns_before_barrier": "block (0, 0, 0) thread (5, 0, 0) has returned",
    "not_aligned": "an access that is not aligned",
    "nowhere": "Segmentation fault",
    "grid": "invalid configuration",
    "no_blocks": "invalid configuration",
    "much_shared": "invalid argument",
}
MISTAKES = {
    "plain": PLAIN,
    "asan": PLAIN
    | {
        "not_aligned": "misaligned address",
        "nowhere": "AddressSanitizer: SEGV",
        "beyond_shared": "index 128 out of bounds",
        "beyond_dynamic": "heap-buffer-overflow",
        "beyond_memory": "heap-buffer-overflow",
    },
    "tsan": {name: message for name, message in PLAIN.items() if name != "not_aligned"}
    | {
        "no_barrier": "data race",
        "nowhere": "ThreadSanitizer: SEGV",
        "race_in_memory": "data race",
        "no_barrier_before_reuse": "data race",
    },
}


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if not shutil.which("g++"):
        skip("native", "no g++: CUDA kernels run on the emulator only with it")


@pytest.mark.parametrize(
    "variant", ["plain", pytest.param("asan", marks=pytest.mark.slow), pytest.param("tsan", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("order", [0, 1, 7])
def test_planted_mistakes_are_found_and_what_is_right_passes(variant: str, order: int) -> None:
    program, mistakes = emulator.program(HERE / "mistakes.cu", variant), dict(MISTAKES[variant])
    if order == 1 and variant != "tsan":
        del mistakes["no_barrier"]  # backwards its result is right
    found = {}
    for name in ["right", *mistakes]:
        environment = {**os.environ, "EMULATOR_ORDER": str(order)}
        run = subprocess.run([program, name], env=environment, capture_output=True, text=True, check=False)
        found[name] = run.returncode, run.stdout + run.stderr
    assert found.pop("right") == (0, "")
    missed = {name: found[name] for name, says in mistakes.items() if says not in found[name][1] or not found[name][0]}
    assert not missed


def test_the_operators_tests_pass_on_emulated_cuda_kernels() -> None:
    environment = {**os.environ, "EMULATED": "plain", "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *emulator.PYTEST,
        str(emulator.ROOT / "tests/ops"),
    ]
    run = subprocess.run(command, cwd=emulator.ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.fail(f"{' '.join(command)}\n{run.stdout[-20_000:]}{run.stderr[-5_000:]}", pytrace=False)
    launches = int(run.stdout.split("emulated CUDA (plain): ")[1].split()[0])
    assert launches > 1000


def test_operators_launch_as_many_kernels_as_the_docs_say() -> None:
    environment = {**os.environ, "EMULATED": "plain", "PYTHONPATH": f"{HERE}{os.pathsep}{emulator.ROOT}"}
    command = [sys.executable, HERE / "launches.py"]
    run = subprocess.run(command, cwd=emulator.ROOT, env=environment, capture_output=True, text=True, check=True)
    text = (emulator.ROOT / "docs/operators.md").read_text()
    documented = re.findall(r"^\| `(\w+)`[^|]*\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert [tuple(line.split()) for line in run.stdout.splitlines()] == documented


@pytest.mark.parametrize(
    ("printed", "status", "cases", "findings"),
    [
        ("88 passed, 12 skipped in 517.2s", 0, 88, 0),
        ("actnorm: 26 cases, 0 results wrong, 3 ill-conditioned, 50 s", 0, 26, 0),
        ("actnorm: 26 cases, 2 results wrong, 3 ill-conditioned, 50 s", 1, 26, 2),
        ("2 failed, 5 passed, 1 error in 3s", 1, 7, 3),
        ("WARNING: ThreadSanitizer: data race\nWARNING: ThreadSanitizer: data race\n9 passed", 66, 9, 2),
        ("rows.cuh:3:4: runtime error: load of misaligned address", 134, 0, 1),
        ("Segmentation fault", 139, 0, 1),
        ("no tests ran", 0, 0, 1),
    ],
)
def test_whatever_a_sanitizers_run_ends_with_is_counted(printed: str, status: int, cases: int, findings: int) -> None:
    assert sanitize.outcome(printed, status) == (cases, findings)
