"""Builds genfuse's compiled module with its CUDA kernels on the emulator, or with sanitizers: emulator.py VARIANT

It needs g++ and pybind11, neither nvcc nor a GPU. Objects are kept in build/cuda_emulator of the checkout, and made
anew when what they are made of changes.
"""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_emulator"
PYTEST = ["-m", "pytest", "-p", "emulated", "-q", "-m", "not slow", "-r", "fE"]  # of the tests on emulated kernels
CPP_ONLY = [p.parent.name for p in ROOT.glob("csrc/*/cpu.cpp") if not p.with_name("cuda.cu").exists()]

_ASAN = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
VARIANTS = {  # of the CUDA kernels on the emulator, but for "cpu", which is of the C++ kernels
    "plain": ["-O1", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"],
    "asan": _ASAN,
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    "cpu": _ASAN,
}
_CXX = ["g++", "-std=c++17", "-fPIC", "-fopenmp", "-fno-strict-aliasing", "-ftrivial-auto-var-init=pattern", "-w"]
_MODULE = [
    "-fvisibility=hidden", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
    '-DGENFUSE_COMPILER="emulator"', '-DGENFUSE_CUDA_COMPILER="emulated"', '-DGENFUSE_CUDA_ARCHITECTURES="none"',
    "-Dtarget_clones(...)=",  # whose resolvers would run before a sanitizer is ready
]  # fmt: skip
_CUDA = [f"-I{HERE / 'include'}", "-include", "cuda_runtime.h"]
# Limits of genfuse's launches, made small in the sanitizers' builds: there every grid strides over its work.
_FEW = {r"(kManyRows) = [^;]+;": r"\1 = 40;"}  # that a test can have
_SMALL = {
    r"(kMostBlocks\w*) = [^;]+;": r"\1 = 3;",
    r"(kSharedMemory) = [^;]+;": r"\1 = 1024;",
}


def _closing(text: str, start: int) -> int:
    """Where the bracket at ``start`` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i
    raise ValueError(f"nothing closes {text[start : start + 40]!r}")


def _opening(text: str, end: int) -> int:
    """Where the template arguments that end with the > at ``end`` start. Those in parentheses are no brackets."""
    depth = inner = 0
    for i in range(end, -1, -1):
        inner += (text[i] in ")]}") - (text[i] in "([{")
        if not inner:
            depth += (text[i] == ">") - (text[i] == "<")
        if not depth:
            return i
    raise ValueError(f"nothing opens {text[end - 40 : end + 1]!r}")


def _launches(text: str) -> str:
    """kernel<T><<<blocks, threads>>>(a, b) -> emulated::run("kernel<T>", Grid(blocks, threads), lambda, a, b)."""
    while (at := text.find("<<<")) >= 0:
        name_end = len(text[:at].rstrip())
        start = _opening(text, name_end - 1) if text[name_end - 1] == ">" else name_end
        while re.match(r"[\w:]", text[start - 1]):
            start -= 1
        close = text.index(">>>", at)
        first = text.index("(", close)
        last = _closing(text, first)
        kernel, grid, arguments = text[start:name_end], text[at + 3 : close], text[first + 1 : last]
        name = " ".join(kernel.split())
        lines = "\n" * text[name_end:at].count("\n")
        function = f"[&](const auto&... emulated_arguments) {{ {kernel}(emulated_arguments...); }}"
        if arguments.strip():
            arguments = f", {arguments}"
        call = f'::emulated::run("{name}", ::emulated::Grid({grid}), {function}{arguments})'
        text = text[:start] + lines + call + text[last + 1 :]
    return text


def _declarators(text: str) -> Iterator[str]:
    """What stands between the commas of a declaration that are in no brackets."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and not depth:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _shared(match: re.Match[str]) -> str:
    """__shared__ T a[n], b; -> auto& a = emulated::shared<T[n]>(tag); auto& b = emulated::shared<T>(tag);"""
    declaration, alignment = match["declaration"], "1"
    if aligned := re.search(r"(?:alignas|__align__)\s*\(([^()]*)\)", match[0]):
        declaration, alignment = declaration.replace(aligned[0], ""), aligned[1]
    base, result = "", []
    for declarator in _declarators(declaration):
        found = re.fullmatch(r"\s*(.*?)\s*(\w+)\s*((?:\[.*\])?)\s*", declarator, re.DOTALL)
        assert found, match[0]
        base = base or found[1]
        if match["extern"]:
            result.append(f"auto* const {found[2]} = static_cast<{base}*>(::emulated::dynamic_shared());")
        else:
            result.append(f"auto& {found[2]} = ::emulated::shared<{base}{found[3]}>([] {{}}, {alignment});")
    return " ".join(result) + "\n" * match[0].count("\n")


def rewrite(text: str) -> str:
    """What g++ cannot read in a .cu file, in its terms: launches and shared variables."""
    text = re.sub(  # without comments, in lines of the same numbers
        r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or "\n" * m[0].count("\n"), text, flags=re.DOTALL
    )
    before = r"(?P<extern>extern\s+)?(?:(?:static|(?:alignas|__align__)\s*\([^()]*\))\s+)*"
    text = re.sub(before + r"__shared__\s+(?P<declaration>[^;=]+);", _shared, text)
    return _launches(text)


def _compile(source: Path, flags: list[str], headers: str) -> Path:
    """The object of a source, which is made unless it is there."""
    command = [*_CXX, *flags, "-c", str(source)]
    key = hashlib.sha256("\0".join([*command, source.read_text(), headers]).encode()).hexdigest()[:16]
    target = BUILD / "objects" / f"{source.parent.name}-{source.stem}-{key}.o"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        run = subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        unfinished.replace(target)
    target.touch()
    return target


def _for_g_plus_plus(source: Path, target: Path, variant: str) -> None:
    """Write what g++ can read of a file, and leave the target alone if it says so already."""
    text = rewrite(source.read_text())
    for pattern, small in (_FEW | _SMALL if variant != "plain" else _FEW).items():
        text = re.sub(pattern, small, text)
    text = f'#line 1 "{source.relative_to(ROOT) if source.is_relative_to(ROOT) else source}"\n{text}'
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def _link(jobs: list[tuple[Path, list[str]]], target: Path, flags: list[str], include: list[Path]) -> Path:
    """Compile sources, as many at a time as there are processors, and link them."""
    for folder in (BUILD / "objects", target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    headers = "\0".join(p.read_text() for d in include for s in ("*.h", "*.cuh") for p in sorted(d.rglob(s)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(job[0], job[1], headers), jobs))
    linked, names = target.with_suffix(".objects"), "\n".join(map(str, objects))
    if not target.exists() or not linked.exists() or linked.read_text() != names:
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-fopenmp", *flags, *map(str, objects), "-o", str(unfinished)], check=True)
        unfinished.replace(target)
        linked.write_text(names)
    for old in (BUILD / "objects").iterdir():
        if old.stat().st_mtime < time.time() - 7 * 24 * 3600:
            old.unlink(missing_ok=True)
    return target


def _emulator(variant: str) -> tuple[Path, list[str]]:
    """emulator.cpp and its flags. ThreadSanitizer does not look at it."""
    return HERE / "emulator.cpp", [
        _CUDA[0], *(["-O1", "-DEMULATOR_TSAN"] if variant == "tsan" else VARIANTS[variant]),
    ]  # fmt: skip


def program(source: Path, variant: str) -> Path:
    """A program of one .cu file, on the emulator."""
    out = BUILD / f"{source.stem}-{variant}"
    target = out / f"{source.stem}.cpp"
    _for_g_plus_plus(source, target, variant)
    jobs = [(target, [*_CUDA, *VARIANTS[variant]]), _emulator(variant)]
    return _link(jobs, out / source.stem, VARIANTS[variant], [HERE])


def module(variant: str, csrc: Path = ROOT / "csrc") -> Path:
    """genfuse's compiled module, an extension of Python.

    Raises:
        RuntimeError: for what g++ does not compile, with its messages.
    """
    out, flags = BUILD / variant, VARIANTS[variant]
    names = " ".join(f"OP({p.parent.name})" for p in sorted(csrc.glob("*/cpu.cpp")))
    common = [f"-I{csrc}", *_MODULE, f"-DGENFUSE_OPS={names}"]
    cpp = [csrc / "bindings.cpp", *sorted(csrc.glob("*/cpu.cpp"))]
    if variant == "cpu":
        jobs = [(source, [*common, *flags]) for source in cpp]
    else:
        common.append("-DGENFUSE_CUDA")
        jobs = [(source, [*common, "-O0"]) for source in cpp]  # for what Python calls: nothing is run on the CPU
        for source in sorted([*csrc.rglob("*.cu"), *csrc.rglob("*.cuh")]):
            target = out / "src" / source.relative_to(csrc)
            if source.suffix == ".cu":
                target = target.with_suffix(".cu.cpp")
                jobs.insert(
                    0, (target, [f"-I{out / 'src'}", *common, *_CUDA, *flags])
                )  # what takes longest is begun first
            _for_g_plus_plus(source, target, variant)
        jobs.append(_emulator(variant))
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return _link(jobs, out / name, ["-shared", *flags], [csrc, out / "src", HERE])


if __name__ == "__main__":
    print(module(sys.argv[1] if len(sys.argv) > 1 else "plain"))
