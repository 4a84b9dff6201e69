import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributions import write_distribution

import genfuse
from genfuse import ops, plugins
from genfuse.cli import main


@pytest.fixture(autouse=True)
def _fresh_plugins(monkeypatch):
    monkeypatch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)
    plugins.discover.cache_clear()
    yield
    plugins.discover.cache_clear()


def lines_of(capsys: pytest.CaptureFixture, *args: str) -> dict[str, str]:
    """What the report says, by the name on the left."""
    assert main(["doctor", *args]) == 0
    lines = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    return {name: fact.strip() for name, fact in lines}


def test_it_names_the_versions_in_use(capsys):
    said = lines_of(capsys)
    assert said["genfuse"].startswith(genfuse.__version__)
    assert said["torch"].startswith(torch.__version__)
    assert sys.executable in said["python"]


def test_every_operator_has_its_implementation_and_the_reason_on_every_device(capsys):
    said = lines_of(capsys)
    assert len(ops.implementations()) >= 3
    for operator, device, implementation, why in ops.implementations():
        assert said[f"{operator} on {device}"] == f"{implementation}: {why}"


def test_the_reason_is_given_where_native_kernels_are_missing(capsys, monkeypatch):
    monkeypatch.setattr(ops, "build_info", lambda: {"native": False, "reason": "installed with GENFUSE_PURE=1"})
    assert lines_of(capsys)["native"] == "missing: installed with GENFUSE_PURE=1"


def test_simd_level_and_cuda_architectures_are_those_of_the_build(capsys, monkeypatch):
    build = {"compiler": "GNU 13", "simd": "AVX2", "openmp": True, "threads": 3}
    cuda = {"cuda_built": True, "cuda_architectures": ["sm_80", "sm_90"]}
    monkeypatch.setattr(ops, "build_info", lambda: {"native": True, "reason": "", **build, **cuda})
    said = lines_of(capsys)
    assert (said["SIMD"], said["OpenMP"], said["CUDA"]) == ("AVX2", "3 threads", "sm_80 sm_90")


def test_a_broken_plugin_is_shown_with_its_error_beside_the_others(capsys, monkeypatch, tmp_path):
    write_distribution(tmp_path, "acme", "models", {"flow": "acme_sick:Model"}, {"acme_sick": "import nowhere_at_all"})
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.discover.cache_clear()
    said = lines_of(capsys)
    assert "acme 1.0 (acme_sick:Model) failed to import: ModuleNotFoundError" in said["model flow"]
    assert re.fullmatch(rf"\d+ of genfuse {genfuse.__version__}, 1 of acme 1\.0", said["models"])


def test_the_data_root_is_shown_and_one_that_was_asked_for_must_exist(capsys, monkeypatch, tmp_path):
    assert lines_of(capsys, "--data-root", str(tmp_path))["root"] == str(tmp_path)
    monkeypatch.setenv("GENFUSE_DATA", str(tmp_path / "absent"))
    assert "there is no such folder" in lines_of(capsys)["root"]
    assert main(["doctor", "--data-root", str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_forced_implementation_is_what_it_reports():
    env = {**os.environ, "GENFUSE_IMPL": "reference"}
    done = subprocess.run([sys.executable, "-m", "genfuse", "doctor"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = [line for line in done.stdout.splitlines() if " on cpu" in line]
    assert chosen
    assert all("reference: " in line for line in chosen)
    assert Path(sys.executable).name in done.stdout


def test_without_the_compiled_module_nothing_is_available_natively():
    program = "import sys; sys.modules['genfuse._C'] = None; from genfuse import ops; print(ops.available('cpu'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
    assert "native" not in done.stdout
