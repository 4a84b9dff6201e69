"""What nvcc makes of the CUDA kernels, without a GPU: nothing is spilled, and rows are moved 16 bytes at a time."""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from required import skip

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(CSRC.glob("*/cuda.cu"))

# Of each kernel that moves rows: how many tensors it has in flight at once, and how many it writes.
MOVES = {
    "actnorm::features_kernel<{}>(Problem, Lines, Forward)": (4, 4),
    "actnorm::images_kernel<{}>(Problem, Forward)": (1, 1),
    "actnorm::features_kernel<{}>(Problem, Lines, Backward)": (4, 2),
    "actnorm::images_kernel<{}>(Problem, Backward)": (2, 1),
    "affine_coupling::tile_kernel<(affine_coupling::Kind)0, {}>(Problem, Forward, int)": (2, 1),
    "affine_coupling::tile_kernel<(affine_coupling::Kind)0, {}>(Problem, Backward, int)": (3, 2),
    "bernoulli::draw_kernel<{}>(Problem, Forward)": (1, 1),
    "diffuse::forward_kernel<(diffuse::Target)1, {}>(Problem, Forward)": (1, 2),
    "diffuse::forward_kernel<(diffuse::Target)2, {}>(Problem, Forward)": (1, 2),
    "diffuse::packs_kernel<(diffuse::Target)1, {}>(Problem, Forward, unsigned int, Divisor)": (1, 2),
    "diffuse::backward_kernel<false, {}>(Problem, Backward)": (2, 0),
    "diffuse::backward_kernel<true, {}>(Problem, Backward)": (3, 0),
    "gradient_norm_penalty::kernel<{}>(Problem, Forward)": (1, 0),
    "gradient_norm_penalty::kernel<{}>(Problem, Backward)": (1, 1),
    "gradient_norm_penalty::dot_kernel<{}>(Problem, DoubleBackward)": (2, 0),
    "gradient_norm_penalty::kernel<{}>(Problem, DoubleBackward)": (2, 1),
    "interpolate::kernel<{}>(Problem, Forward)": (2, 1),
    "interpolate::kernel<{}>(Problem, Backward)": (1, 2),
    "reparameterize_kl::kernel<true, {}>(Problem, Forward)": (2, 1),
    "reparameterize_kl::kernel<true, {}>(Problem, Backward)": (2, 2),
    "standard_normal_log_prob::kernel<{}>(Problem, Forward)": (4, 0),
    "standard_normal_log_prob::kernel<{}>(Problem, Backward)": (1, 1),
}


def _tool(name: str) -> str:
    """A program of the CUDA toolkit, which Triton brings some of."""
    triton = find_spec("triton")
    own = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    found = shutil.which(name) or (str(own) if own and own.exists() else None)
    return found or skip("cuda", f"no {name}: what the CUDA kernels are compiled to cannot be looked at")


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout + done.stderr


def _name(mangled: str) -> str:
    name = re.sub(r"genfuse::|\(anonymous namespace\)::", "", _run("c++filt", mangled).strip().removeprefix("void "))
    function, _, arguments = name.rpartition("(")
    return f"{function}({', '.join(a.rsplit('::', 1)[-1] for a in arguments.split(', '))}"


def _most_in_flight(instructions: list[str], load: str) -> int:
    """The longest run of such loads that no store interrupts."""
    best = run = 0
    for instruction in instructions:
        run = 0 if instruction.startswith("STG") else run + instruction.startswith(load)
        best = max(best, run)
    return best


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(a, marks=() if a == "sm_90" else pytest.mark.slow) for a in ("sm_80", "sm_90", "sm_100", "sm_120")
    ],
)
def kernels(request, tmp_path_factory):
    """By name: registers and bytes spilled of each kernel, and its instructions."""
    nvcc, cuobjdump, out = _tool("nvcc"), _tool("cuobjdump"), tmp_path_factory.mktemp("cubins")

    def look(source: Path) -> dict[str, tuple[int, int, list[str]]]:
        cubin = out / f"{source.parent.name}.cubin"
        says = _run(
            nvcc, "-cubin", f"-arch={request.param}", "-std=c++17", f"-I{CSRC}", "-Xptxas=-v",
            '-DGENFUSE_CUDA_ARCHITECTURES=""', source, "-o", cubin,
        )  # fmt: skip
        use = re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores.*\n.*?Used (\d+) registers", says)
        code = re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", _run(cuobjdump, "-sass", cubin), re.DOTALL)
        lines = {name: re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?(\S+)", text) for name, text in code}
        return {_name(name): (int(registers), int(spilled), lines[name]) for name, spilled, registers in use}

    with ThreadPoolExecutor(2) as pool:
        return {name: found for made in pool.map(look, SOURCES) for name, found in made.items()}


def test_no_kernel_spills_registers_or_takes_so_many_that_few_threads_fit(kernels, request):
    assert len(kernels) > 100
    # Splines of 8 and 16 bins keep the shares of all bins in registers, in place of reading them a second time. Up to
    # 255, a block of 256 threads fits.
    many = {n: 200 if re.search(r"rational_quadratic_spline::kernel", n) else 128 for n in kernels}
    # Bytes that ptxas spills for sm_100 and sm_120 even where registers are left: in kernels of 16 bits, and two
    # registers of actnorm's in float64; and some of float64 on sm_120, whose arithmetic in it is 64 times as slow.
    arch = request.node.callspec.params["kernels"]
    of_bits = {"sm_100": {16: 32, 64: 8}, "sm_120": {16: 16, 64: 48}}.get(arch, {})
    few = {n: of_bits.get(64 if "double" in n else 16 if re.search("Half|BFloat16", n) else 32, 0) for n in kernels}
    wrong = {n: found[:2] for n, found in kernels.items() if found[1] > few[n] or found[0] > many[n]}
    assert not wrong


@pytest.mark.parametrize(("storage", "bytes_of_four"), [("float", 16), ("double", 32), ("Half", 8), ("BFloat16", 8)])
def test_rows_are_moved_16_bytes_at_a_time_with_all_tensors_in_flight(kernels, storage, bytes_of_four):
    at_once = max(1, bytes_of_four // 16)  # of 16 bytes, for four values or the eight of 16 bits
    wrong = {}
    for pattern, (loads, stores) in MOVES.items():
        name = pattern.format(storage)
        _, _, instructions = kernels[name]
        # Loads straight into shared memory, LDGSTS, and those into registers.
        wide = Counter(re.sub(r"(LDG|STG)\..*128.*", r"\1", i) for i in instructions if "128" in i)
        found = _most_in_flight([i for i in instructions if "128" in i], "LDG"), wide["STG"]
        if found[0] < loads * at_once or found[1] < stores * at_once:
            wrong[name] = found
    assert not wrong
