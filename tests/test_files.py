"""Files appear whole, follow no link, have one writer, and do not fill the memory."""

import errno
import gzip
import io
import os
import re
import signal
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

import genfuse
from genfuse import _files
from genfuse._files import UNPACKED, gunzip, keep_as, locked, plain, read_array, refuse_links, writing
from genfuse.errors import DataError, RunError

# Writing


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(TypeError), writing(path) as file:
        file.writelines([b"half", 1])
    assert path.read_text() == "before"
    with writing(path) as file:
        file.write(b"after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_no_link_is_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "x"
    path.symlink_to(victim)
    (tmp_path / ".x.new").symlink_to(victim)
    names = set()
    for _ in range(2):
        with writing(path) as file:
            file.write(b"theirs")
            names |= {each.name for each in tmp_path.iterdir()}
    assert victim.read_text() == "mine"
    assert not path.is_symlink()
    assert len([name for name in names if re.fullmatch(r"\.x\.[0-9a-f]{16}\.new", name)]) == 2


def test_a_name_that_is_guessed_after_all_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(_files.secrets, "token_hex", lambda n: "0" * 16)
    (tmp_path / f".x.{'0' * 16}.new").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), writing(tmp_path / "x"):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_full_disk_is_said_of_the_file_that_was_to_be(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x'"), writing(tmp_path / "x") as file:
        file.write(b"much")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_can_have_a_second_name(links, tmp_path, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(_files.os, "link", refused)
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    keep_as(tmp_path / "new", "old")
    with writing(tmp_path / "new") as file:
        file.write(b"newer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"new": "newer", "old": "new"}


def test_links_and_other_oddities_are_refused_and_named(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "file").touch()
    refuse_links(tmp_path, "inner", "absent")
    os.mkfifo(tmp_path / "inner" / "pipe")
    with pytest.raises(RunError, match=f"{tmp_path}/inner/pipe is neither a file nor a folder"):
        refuse_links(tmp_path, "inner")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RunError, match=f"{tmp_path}/link is a symbolic link"):
        refuse_links(tmp_path, "inner")


# One writer


def test_the_second_writer_is_told_who_the_first_one_is(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(RunError) as caught, locked(tmp_path / "run"):
            pass
        who = f"run is being written to by process {os.getpid()} on {re.escape(socket.gethostname())}, since 20"
        assert re.search(who, str(caught.value))
        (tmp_path / "run" / "result").touch()
    with locked(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_a_folder_to_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "run"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process(tmp_path):
    code = f"""
import pathlib, time
from genfuse._files import locked
with locked(pathlib.Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".lock").exists()
        with locked(tmp_path):
            pass
    finally:
        process.kill()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_file_system_the_name_in_the_file_counts(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_files.fcntl, "flock", refused)
    lock = tmp_path / ".lock"
    lock.write_text('{"host": "elsewhere", "process": 7, "since": "2026-01-01"}')
    with pytest.raises(RunError, match=f"process 7 on elsewhere, since 2026-01-01: .* delete {lock}"), locked(tmp_path):
        pass
    lock.write_text(f'{{"host": "{socket.gethostname()}", "process": 1, "since": "2026-01-01"}}')
    with pytest.raises(RunError, match="process 1 on"), locked(tmp_path):
        pass
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(f'{{"host": "{socket.gethostname()}", "process": {gone.pid}, "since": "2026-01-01"}}')
    with locked(tmp_path):
        assert str(os.getpid()) in lock.read_text()


@pytest.mark.parametrize("content", ["", "null", "[]", '{"host": 1}', "[" * 2000, '{"host": "\x1b[31m"}'])
def test_a_lock_file_that_somebody_made_up_is_no_obstacle(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    with locked(tmp_path):
        pass


def test_a_linked_lock_file_is_not_followed(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


# What unpacks to too much


def npy(shape, content=b"\0" * 64):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def bomb(tmp_path, kind):
    """The name of data that unpacks to 3 MB or more from 20 kB."""
    zeros = b"\0" * 3_000_000
    if kind == "gz":
        for part in ("train", "t10k"):
            for name, dims, shape in (("images-idx3", 3, (3000, 1000, 1)), ("labels-idx1", 1, (3000,))):
                header = bytes([0, 0, 8, dims]) + b"".join(n.to_bytes(4, "big") for n in shape)
                with gzip.open(tmp_path / f"{part}-{name}-ubyte.gz", "wb") as file:
                    file.write(header + zeros)
        return "mnist"
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", npy((len(zeros) // 8, 1), zeros))
        return f"npz:{tmp_path / 'x.npz'}"
    for i in range(4):
        Image.new("L", (900, 900)).save(tmp_path / f"{i}.png")
    return f"images:{tmp_path}"


@pytest.mark.parametrize("kind", ["gz", "npz", "png"])
def test_what_would_unpack_to_too_much_is_refused_with_the_limit_and_how_to_raise_it(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "UNPACKED_BYTES", 2**20)  # so that the test is quick
    name = bomb(tmp_path, kind)
    with pytest.raises(DataError, match=rf"would unpack from [\d,]+ bytes to [\d,]+ .*raise the limit: {UNPACKED}="):
        genfuse.load_data(name, root=tmp_path)
    monkeypatch.setenv(UNPACKED, "a lot")
    with pytest.raises(DataError, match="must be a number of bytes, as 4e9; got 'a lot'"):
        genfuse.load_data(name, root=tmp_path)


def test_the_limit_can_be_raised_and_lowered(tmp_path, monkeypatch):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0" * 5_000_000))
    assert len(gunzip(path)) == 5_000_000
    monkeypatch.setenv(UNPACKED, "1e6")
    with pytest.raises(DataError, match="beyond the limit of 1,000,000"):
        gunzip(path)
    monkeypatch.setenv(UNPACKED, "5e6")
    assert len(gunzip(path)) == 5_000_000


@pytest.mark.parametrize("shape", [(10**12,), (2**40, 2**40), (9, 1), (-1,), (-4, -2)])
def test_a_header_that_announces_more_than_there_is_takes_no_memory(shape, tmp_path):
    (tmp_path / "x.npy").write_bytes(npy(shape))
    with pytest.raises(ValueError, match=r"its header announces .* bytes, but there are 64"):
        read_array(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", npy(shape))
    for kind in ("npy", "npz"):
        with pytest.raises(DataError, match=f"x.{kind} cannot be read"):
            genfuse.load_data(f"{kind}:{tmp_path}/x.{kind}")


# Terminals


def test_what_others_wrote_cannot_command_the_terminal():
    assert plain("a\x1b[2Jb\rc\x07\u202ed\udcff") == "a\\x1b[2Jb\\rc\\x07\\u202ed\\udcff"
    assert plain("Zürich, 東京\n\tα") == "Zürich, 東京\n\tα"
