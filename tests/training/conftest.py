from pathlib import Path

import pytest
import torch

import genfuse
from genfuse import plugins

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """A folder with the metadata of an installed package that registers the models of tiny_models.py."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "tiny_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-models\nVersion: 1.0\n")
    names = ("Tiny", "Duel", "Plain", "Slope", "Staged")
    lines = "".join(f"{name.lower()} = tiny_models:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[genfuse.models]\n{lines}")
    return folder


@pytest.fixture(autouse=True)
def installed(package, monkeypatch):
    """The package is installed, here and in the processes that a test starts."""
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", f"{package}:{HERE}")
    plugins.discover.cache_clear()
    yield
    plugins.discover.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    return genfuse.load_data("digits")


@pytest.fixture
def make(digits):
    """Make a model for the digits with the same first weights every time."""

    def make(name, **settings):
        torch.manual_seed(0)
        return genfuse.create(name, digits, **settings)

    return make


@pytest.fixture
def trainer():
    """A trainer on the CPU that is quick and draws nothing."""

    def trainer(**options):
        return genfuse.Trainer(**{"epochs": 2, "batch_size": 100, "device": "cpu", "pictures": False, **options})

    return trainer


@pytest.fixture
def same_weights():
    def same_weights(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return same_weights
