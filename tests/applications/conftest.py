from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import genfuse


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """A table whose second column follows from the first."""
    draw = np.random.default_rng(0)
    age = draw.normal(50, 10, 1200)
    frame = pd.DataFrame(
        {"age": age, "income": 1000 * age + draw.normal(0, 2000, 1200), "noise": draw.normal(size=1200)}
    )
    path = tmp_path_factory.mktemp("data") / "people.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, people):
    """Runs by model, trained once: of the table, of digits, or with labels or a given column."""
    runs = {}

    def train(model, data=None, steps=200, **options):
        key = (model, data, *map(str, options.items()))
        if key not in runs:
            reading = {name: options.pop(name) for name in ("condition", "binarize") if name in options}
            loaded = genfuse.load_data(data or f"csv:{people}", **reading)
            out = tmp_path_factory.mktemp("runs") / model
            trainer = genfuse.Trainer(steps=steps, out=out, pictures=False, device="cpu")
            runs[key] = trainer.fit(genfuse.create(model, loaded, **options), loaded)
        return runs[key]

    return train


@pytest.fixture
def odd(tmp_path, people) -> Path:
    """Rows of which two are odd: row 7 breaks the pattern of usual values, row 9 has a value that is far out. The
    columns stand in another order, beside two others."""
    rows = pd.read_csv(people).head(60)
    rows.loc[7, "income"] = 1000 * rows.age[7] - 30000
    rows.loc[9, "noise"] = 9.0
    rows["odd"] = [int(i in (7, 9)) for i in range(60)]
    rows["id"] = np.arange(60) * 3
    path = tmp_path / "odd.csv"
    rows[["id", "noise", "income", "odd", "age"]].to_csv(path, index=False)
    return path


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """These models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
