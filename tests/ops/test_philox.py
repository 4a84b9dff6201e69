"""The generator against its published answers, in every form that it has."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from genfuse.ops import _op, _philox

# Random123's kat_vectors: counter, key, answer.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.skipif(_op._C is None, reason="no compiled kernels")
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_compiled_generator_gives_the_published_answers(counter, key, answer):
    assert list(_op._C.philox(counter, key)) == answer


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64") or not shutil.which("g++"),
    reason="needs g++ on Linux on x86-64",
)
def test_words_made_side_by_side_are_those_of_each_counter(tmp_path):
    here = Path(__file__).parent
    flags = ["-std=gnu++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"]
    command = ["g++", *flags, f"-I{here.parents[1] / 'csrc'}", here / "noise.cpp", "-o", tmp_path / "noise"]
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "noise"], check=True, capture_output=True, text=True).stdout
    if not found:
        pytest.skip("a processor without AVX2, which makes words one by one")
    assert all(line.split()[1] == "0" for line in found.splitlines()), found


def test_the_reference_gives_the_published_answer():
    zero = torch.zeros((), dtype=torch.int64)
    assert [int(w) for w in _philox.philox(zero, zero)] == KNOWN[0][2]


@pytest.mark.skipif(_op._C is None, reason="no compiled kernels")
def test_reference_and_compiled_agree_on_counters_and_keys_of_64_bits():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(50, 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    for counter, key in numbers:
        c, k = int(counter) % 2**64, int(key) % 2**64
        compiled = _op._C.philox([c % 2**32, c >> 32, 0, 0], [k % 2**32, k >> 32])
        assert [int(w) for w in _philox.philox(counter, key)] == list(compiled)


def test_a_seed_has_64_bits_and_follows_the_generator():
    like = torch.zeros(1)
    seeds = torch.stack([_philox.seed(like, torch.Generator().manual_seed(i)) for i in range(200)])
    assert len(seeds.unique()) == 200
    assert 50 < int((seeds < 0).sum()) < 150
    assert torch.equal(seeds[7], _philox.seed(like, torch.Generator().manual_seed(7)))
    torch.manual_seed(7)
    assert torch.equal(seeds[7], _philox.seed(like))
