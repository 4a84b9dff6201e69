import os
from collections.abc import Callable
from pathlib import Path

import pytest

from genfuse.data import load_data
from genfuse.errors import DataError


@pytest.fixture
def data_root(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """data_root("mnist/file") is the root that GENFUSE_DATA names; the test is skipped where the file is not in it."""
    root = os.environ.get("GENFUSE_DATA")

    def require(file: str) -> Path:
        if not root or not (Path(root) / file).exists():
            pytest.skip(f"needs {file} in the folder that GENFUSE_DATA names")
        return Path(root)

    return require


@pytest.fixture
def refused() -> Callable[..., str]:
    """refused(name, *words, ...) is the message of the DataError that load_data raises, which has all the words."""

    def refused(name: str, *words: str, **settings: object) -> str:
        with pytest.raises(DataError) as caught:
            load_data(name, **settings)
        message = str(caught.value)
        for word in words:
            assert word in message, message
        return message

    return refused
