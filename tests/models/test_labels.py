"""The labels that conditional models draw where they are given none: those that training examples have."""

import pytest
import torch

import genfuse
from genfuse.data import Dataset, Split
from genfuse.errors import DataError, SettingsError

MODELS = {
    "realnvp": {"layers": 2, "hidden": (8,)},
    "edm": {"hidden": (8,)},
    "gan": {"hidden": (8,), "latent_dim": 2},
}


def data(labels, **names):
    y = torch.tensor(labels).repeat(100)
    x = torch.randn(len(y), 2) + y[:, None]
    return Dataset("labelled", {"train": Split(x[:-30], y[:-30]), "test": Split(x[-30:], y[-30:])}, **names)


@pytest.mark.parametrize("labels", [(1, 2, 3), (0, 5, 9)])
def test_labels_with_gaps_are_refused_where_they_have_no_names(labels):
    assert data(labels).seen_labels == labels
    genfuse.create("realnvp", data(labels), **MODELS["realnvp"])  # which takes none
    with pytest.raises(SettingsError, match=f"have the labels {', '.join(map(str, labels))}, which are not all of 0"):
        genfuse.create("realnvp", data(labels), conditional=True, **MODELS["realnvp"])


@pytest.mark.parametrize("name", MODELS)
def test_a_class_without_training_examples_is_never_drawn(name, monkeypatch):
    few = data((0, 2), class_names=("cat", "dog", "owl"))
    model = genfuse.create(name, few, conditional=True, **MODELS[name]).eval()
    assert model.drawn_labels.tolist() == [0, 2]
    asked = []
    monkeypatch.setattr(model, "context_of", lambda y, n, of=model.context_of: asked.append(y) or of(y, n))
    model.sample(300, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat(asked).bincount(minlength=3)
    assert drawn[1] == 0
    assert drawn[0] > 100 < drawn[2]
    model.sample(3, y=1)  # asked for by name, it is what the model makes of it


@pytest.mark.parametrize("name", MODELS)
def test_all_labels_are_drawn_where_all_were_seen(name):
    model = genfuse.create(name, data((0, 1, 2)), conditional=True, **MODELS[name])
    assert model.config.seen_labels is None
    assert model.drawn_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"class_names": ("a", "b", "b")}, "3 different names"),
        ({"class_names": ("a", "b"), "classes": 3}, "3 different names, one for each class; got a, b"),
        ({"class_names": ("a", "b")}, "labels of the train split are 0..2"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(names, problem):
    with pytest.raises(DataError, match=problem):
        data((0, 1, 2), **names)
