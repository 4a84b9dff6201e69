"""What a suite must not skip."""

import os

import pytest
import torch

REQUIRED = set(filter(None, os.environ.get("GENFUSE_REQUIRE", "").split(",")))
# Cases for a GPU are there only where one is, or has to be.
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() or "cuda" in REQUIRED else [])]


def skip(what: str, reason: str) -> None:
    """Skip, unless GENFUSE_REQUIRE names what is missing: a suite that must run a thing cannot pass by skipping it."""
    if what in REQUIRED:
        pytest.fail(f"GENFUSE_REQUIRE={what}: {reason}")
    pytest.skip(reason)
