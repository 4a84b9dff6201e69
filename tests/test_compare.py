import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import skip
from distributions import write_distribution

import genfuse
from genfuse import plugins
from genfuse.cli import main
from genfuse.comparison import Budget, compare_runs, markdown
from genfuse.comparison._measures import MEASURES, training_seconds
from genfuse.data import Dataset, Split
from genfuse.errors import PluginError, RunError, SettingsError
from genfuse.models import Batch
from genfuse.training import Run, Trainer

SMALL = {"vae": {"hidden": [32], "latent_dim": 4}, "gan": {"hidden": [32], "latent_dim": 4}}
MODELS = ["vae", "gan", "flow=realnvp", "broken", "runaway", "picky"]
PLUGINS = {
    "acme_broken": "import module_that_is_not_there",
    "acme_runaway": """
from genfuse.models.vae import VAE

class Runaway(VAE):
    def loss(self, batch, player="model"):
        loss, terms = super().loss(batch, player)
        return (loss * float("nan") if self.updates > 2 else loss), terms
""",
    "acme_picky": """
from genfuse.models.vae import VAE

class Picky(VAE):
    def loss(self, batch, player="model"):
        raise RuntimeError("not <these> examples")
""",
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Few of the digits, in two classes."""
    digits = genfuse.load_data("digits")
    return Dataset(
        "few-digits",
        {part: Split(split.x[:200], split.y[:200] % 2) for part, split in digits.splits.items()},
        levels=digits.levels,
    )


@pytest.fixture(scope="module")
def acme(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acme")
    entries = {name.removeprefix("acme_"): f"{name}:{name.removeprefix('acme_').title()}" for name in PLUGINS}
    write_distribution(folder, "acme", "models", entries, PLUGINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)
        patch.syspath_prepend(str(folder))
        plugins.discover.cache_clear()
        yield
    plugins.discover.cache_clear()


@pytest.fixture(scope="module")
def compared(data, acme, tmp_path_factory) -> tuple[Path, dict]:
    """A VAE, a GAN and a flow with two seeds each, and three plugins that fail in different ways."""
    out = tmp_path_factory.mktemp("compare") / "c"
    settings = {**SMALL, "flow": {"scales": 1, "blocks": 0, "channels": 4}}
    settings = {**SMALL, "flow": flow_settings()}
    return out, genfuse.compare(MODELS, data, out=out, budget="1280examples", seeds=2, settings=settings, limit=50)


def flow_settings() -> dict:
    names = genfuse.create("realnvp").config.__dataclass_fields__
    return {key: value for key, value in {"hidden": [8], "channels": 4, "layers": 2}.items() if key in names}


def test_print_settings():
    print(genfuse.create("realnvp").config)
