import warnings
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

import genfuse
from genfuse import plots
from genfuse.applications import detection, examples, labels_of, score, scores, weights
from genfuse.data import Split
from genfuse.errors import DataError, DataWarning, SettingsError

FLOW = {"model": "nsf", "hidden": 32}
pytestmark = pytest.mark.filterwarnings("ignore::genfuse.errors.DataWarning")


def test_a_score_is_minus_the_density_of_each_row_in_the_order_of_the_file(trained, people, odd):
    run = trained(**FLOW)
    frame = score(run, odd)
    rows = pd.read_csv(odd)[["age", "income", "noise"]]
    x = run.scaling.apply(torch.tensor(rows.to_numpy()))
    assert frame["score"].to_numpy() == pytest.approx(-run.model().log_prob(x).detach().numpy(), abs=1e-3)
    assert frame["row"].tolist() == list(range(60))
    assert set(frame.sort_values("score")["row"].tail(2)) == {7, 9}
    assert score(run, rows)["score"].to_numpy() == pytest.approx(frame["score"].to_numpy(), abs=1e-3)


@pytest.mark.parametrize(
    ("model", "settings"),
    [("nsf", {"hidden": 32}), ("vae", {"decoder": "gaussian", "latent_dim": 2}), ("edm", {"hidden": (32, 32)})],
)
def test_the_columns_that_make_a_row_odd_are_named(model, settings, trained, odd):
    frame = score(trained(model, **settings), odd, explain=4).sort_values("score", ascending=False)
    assert set(frame["row"].head(2)) == {7, 9}
    assert frame.set_index("row").loc[9, "column_1"] == "noise"
    assert frame.set_index("row").loc[7, "column_1"] in ("age", "income")
    assert frame["column_1"].notna().sum() == 4
    assert (frame["weight_1"].dropna() >= frame["weight_2"].dropna()).all()


def test_a_relative_score_is_the_share_of_a_picture_that_its_reconstruction_lacks(trained):
    model = trained("vae", data="digits").model()
    x = genfuse.load_data("digits").batch("test", slice(20)).x
    x = torch.cat([x, torch.zeros_like(x[:1])])  # a blank picture has a score too
    found = scores(model, x, method="relative")
    explained = [r2_score(a, b) for a, b in zip(x.flatten(1), model.reconstruct(x).detach().flatten(1), strict=True)]
    torch.testing.assert_close(found[:-1], 1 - torch.tensor(explained[:-1]), atol=1e-4, rtol=1e-4)
    assert found[-1].isfinite()
    with pytest.raises(SettingsError, match="has no relative of examples"):
        scores(genfuse.create("vae", genfuse.load_data("toy:moons")), torch.zeros(1, 2), method="relative")


def test_a_relative_score_of_a_density_is_beside_the_bytes_of_the_picture(trained):
    model = trained("idf", data="digits", steps=2).model()
    x = genfuse.load_data("digits").batch("test", slice(5)).x
    sizes = [8 * len(zlib.compress((each * 16).round().byte().numpy().tobytes(), 9)) for each in x]
    expected = 64 * model.bits_per_dim(x).detach() / torch.tensor(sizes)
    torch.testing.assert_close(scores(model, x), expected)


@pytest.mark.parametrize(
    ("model", "settings"), [("vae", {}), ("realnvp", {"hidden": (128, 128)}), ("edm", {"network": "mlp"})]
)
def test_pictures_are_scored_so_that_other_digits_are_odd(model, settings):
    """A likelihood alone takes a 1 for a more usual 0 than most 0s."""
    digits = genfuse.load_data("digits")
    train, test = digits.splits["train"], digits.splits["test"]
    zeros = replace(digits, splits={"train": Split(train.x[train.y == 0]), "test": test})
    torch.manual_seed(0)
    made = genfuse.create(model, zeros, **settings)
    genfuse.Trainer(steps=200, pictures=False, device="cpu").fit(made, zeros)
    assert roc_auc_score(test.y != 0, scores(made, test.x.float() / 16).numpy()) > 0.95


def test_a_weight_is_what_the_best_of_the_models_values_takes_from_the_score():
    class Gaussian(genfuse.models.GenerativeModel):
        def __init__(self):
            super().__init__(shape=(2,))
            self.mean = torch.nn.Parameter(torch.zeros(2))

        def log_prob(self, x):
            return -0.5 * x.square().sum(1)

        def sample(self, n, *, generator=None):
            return torch.linspace(-1, 1, n)[:, None].expand(n, 2) + 0.5

    x = torch.tensor([[3.0, 0.0], [0.1, -2.0]])
    best = (torch.linspace(-1, 1, 16) + 0.5).square().min()
    assert torch.allclose(weights(Gaussian(), x), (0.5 * (x.square() - best)).clamp(min=0), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "settings", "method", "others"),
    [
        ("vae", {}, "relative", ["likelihood", "reconstruction"]),
        ("realnvp", {"channels": 8}, "relative", ["likelihood"]),
        ("idf", {"channels": 8}, "relative", ["likelihood"]),
        ("gan", {}, "nearest", ["critic"]),
        ("wgan-gp", {}, "nearest", ["critic"]),
        ("edm", {"channels": (8, 8)}, "relative", ["likelihood", "denoising"]),
    ],
)
def test_every_family_scores_images_and_one_row_as_many(model, settings, method, others, trained):
    run = trained(model, "digits", steps=2, **settings)
    few = genfuse.load_data("digits").batch("test", slice(0, 4)).x
    first = score(run, few.numpy())
    assert (first.columns == ["row", "score"]).all()
    assert np.isfinite(first["score"]).all()
    assert torch.equal(scores(run.model(), few), scores(run.model(), few, method=method))
    for other in others:
        assert scores(run.model(), few, method=other).shape == (4,)
    with pytest.raises(SettingsError, match=f"has no .* of examples; it has: {', '.join([method, *others])}"):
        scores(run.model(), few, method=next(m for m in ("critic", "denoising") if m not in (method, *others)))


@pytest.mark.parametrize("model", ["gan", "wgan", "wgan-gp"])
def test_what_is_far_from_all_draws_of_a_generator_is_odd(model, trained, odd):
    found = score(trained(model, steps=600, hidden=(64, 64)), odd)
    assert found["score"].idxmax() == 9
    assert found.loc[9, "column_1"] == "noise"


def test_the_distance_is_to_the_five_nearest_draws():
    class OnALine(genfuse.models.GenerativeModel):
        def __init__(self):
            super().__init__(shape=(2,))
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def realness(self, x):
            return x[:, 0]

        def sample(self, n, *, generator=None):
            return torch.stack([torch.arange(n) % 1000 / 1000, torch.zeros(n)], 1)  # several of each

    x = torch.tensor([[0.5, 0.0], [0.5, 3.0], [-4.0, 0.0]])
    assert scores(OnALine(), x).tolist() == pytest.approx([0, 3, 4], abs=2e-3)
    assert scores(OnALine(), x, method="critic").tolist() == [-0.5, -0.5, 4.0]


def test_the_distance_to_draws_is_that_of_what_is_given(trained):
    run = trained("gan", steps=2, condition="age", hidden=(8,))
    x, y = run.data().batch("test", slice(0, 6))
    found = scores(run.model(), x, y, method="nearest", samples=20)
    model = run.model()
    draws = model.sample(20, y=y[2].repeat(20, 1), generator=None)
    assert found.shape == (6,)
    assert torch.equal(found, scores(model, x, y, method="nearest", samples=20, seed=3))
    assert found[2] < torch.cdist(x[2:3], draws).max()


def test_of_pictures_the_scores_say_which_file(trained, tmp_path):
    from PIL import Image

    run = trained("vae", "digits", steps=2)
    pixels = (genfuse.load_data("digits").batch("test", slice(0, 3)).x[:, 0] * 255).byte().numpy()
    for name, image in zip(("c", "a", "b"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    found = score(run, tmp_path)
    assert found["file"].tolist() == [str(tmp_path / f"{name}.png") for name in "abc"]


def test_the_denoising_error_is_the_loss_of_each_example(trained):
    model = trained("edm", hidden=(32, 32)).model()
    x = torch.randn(2000, 3)
    sigma = model.sigma_schedule(1)[0]
    torch.manual_seed(0)
    assert model.denoising_error(x, levels=1).mean().item() == pytest.approx(
        model.denoiser.loss(x, sigma).item(), rel=0.1
    )


def test_a_conditional_models_labels_and_columns_are_matched_by_name(trained, people, odd, tmp_path):
    run = trained("vae", "digits", steps=2, conditional=True)
    test = genfuse.load_data("digits").splits["test"]
    some = (test.y == 3) | (test.y == 7)  # which alone would be numbered 0 and 1
    x = (test.x[some].float() / 16).numpy()
    found = examples(run, (x, test.y[some].numpy()))
    assert torch.equal(found.batch.y, test.y[some])
    with pytest.raises(DataError, match=r"has the labels 12, and the run .* knows 0, 1, 2"):
        examples(run, (x, np.where(test.y[some] == 3, 3, 12)))
    given = trained("nsf", hidden=8, condition="age", steps=20)
    batch = examples(given, odd).batch
    rows = pd.read_csv(odd)
    assert given.condition_scaling.restore(batch.y)[:, 0].numpy() == pytest.approx(rows["age"], rel=1e-5)
    assert given.scaling.restore(batch.x).numpy() == pytest.approx(
        rows[["income", "noise"]].to_numpy(), rel=1e-4, abs=1e-4
    )
    assert len(score(given, odd)) == 60


def test_a_file_that_does_not_fit_the_run_is_named_with_what_is_wrong(trained, people, odd, tmp_path):
    run, images = trained(**FLOW), trained("vae", "digits", steps=2)
    rows = pd.read_csv(odd)
    for columns, message in (
        (["income", "noise"], "other.csv has no column age; it has: income, noise"),
        (["id", "odd"], "other.csv has 2 columns, and the run .* was trained on 3: age, income, noise"),
    ):
        rows[columns].to_csv(tmp_path / "other.csv", index=False)
        with pytest.raises(DataError, match=message):
            examples(run, tmp_path / "other.csv")
    rows[["age", "income", "noise"]].to_csv(tmp_path / "bare.csv", index=False, header=False)
    with pytest.raises(DataError, match=r"has no header, and the run .* was trained on the columns age, income, noise"):
        examples(run, tmp_path / "bare.csv")
    with pytest.raises(DataError, match=r"has 2 columns, and the run .* was trained on 3: age, income, noise"):
        examples(run, np.ones((4, 2)))
    with pytest.raises(DataError, match=r"shape \(1, 8, 8\), images, and the run .* rows of a table of shape \(3,\)"):
        examples(run, "digits")
    plots.sample_grid(torch.rand(1, 1, 8, 8), tmp_path / "a.png")
    with pytest.raises(DataError, match="images, and the run"):
        examples(run, tmp_path / "a.png")
    with pytest.raises(DataError, match="rows of a table, and the run"):
        examples(images, odd)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match="is empty"):
        examples(run, tmp_path / "empty.csv")
    with pytest.raises(DataError, match="there is no file or folder"):
        examples(run, tmp_path / "absent.csv")
    with pytest.raises(DataError, match="has no split 'validation'; it has: train, test"):
        examples(images, "digits", split="validation")


def test_a_single_picture_and_a_single_row_are_scored(trained, tmp_path):
    from PIL import Image

    run = trained("vae", "digits", steps=2)
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "one.png")
    assert len(score(run, tmp_path / "one.png")) == 1
    assert len(score(trained(**FLOW), np.array([[50.0, 50000.0, 0.0]]))) == 1


def test_images_of_other_levels_are_taken_in_those_of_the_run(trained):
    run, test = trained("realnvp", "digits", steps=2, channels=8), genfuse.load_data("digits").splits["test"]
    fine = (test.x.float() * 255 / 16).round().byte().numpy()  # of 256 levels, the 17 of the run
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert torch.equal(examples(run, fine).data.splits["test"].x, test.x)
    with pytest.warns(DataWarning, match="has 256 levels, and the run 17: each is taken for the nearest"):
        examples(run, np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8))


@pytest.mark.parametrize("model", ["vae", "nsf"])
def test_rows_with_words_and_empty_cells_are_read_as_the_run_reads_them(model, trained, tmp_path):
    draw = np.random.default_rng(0)
    plan = draw.choice(["basic", "plus"], 600)
    calls = np.where(plan == "plus", draw.poisson(40, 600), draw.poisson(4, 600))
    frame = pd.DataFrame(
        {"id": np.arange(600) + 5, "plan": plan, "calls": calls, "paid": draw.normal(9, 2, 600).round(2)}
    )
    frame.loc[::9, "paid"] = np.nan
    frame.to_csv(tmp_path / "plans.csv", index=False)
    run = trained(model, f"csv:{tmp_path / 'plans.csv'}", steps=300 if model == "nsf" else 2000, hidden=32)
    new = frame[["calls", "paid", "plan"]].head(40).assign(odd="no")
    new.loc[3, ["plan", "calls"]] = ["basic", 40]
    new.loc[3, "odd"] = "yes"
    new.to_csv(tmp_path / "new.csv", index=False)
    scored = score(run, tmp_path / "new.csv").sort_values("score")
    assert 3 in scored["row"].tail(5).tolist()
    assert scored.set_index("row").loc[3, "column_1"] in ("plan", "calls")
    assert score(run, new)["score"].to_numpy() == pytest.approx(scored.sort_index()["score"].to_numpy(), abs=1e-4)
    with pytest.raises(DataError, match=r"labels must be 0, or 1 .*; got no, yes"):
        detection(scored["score"], labels_of(examples(run, tmp_path / "new.csv"), "odd"))
    new.loc[5, "plan"] = "gold"
    with pytest.raises(DataError, match=r"row 5, column 3 \(plan\): one of the categories basic, plus.*; got 'gold'"):
        score(run, new)
    found = examples(run, tmp_path / "new.csv")
    assert set(found.restored(found.batch.x)["plan"]) == {"basic", "plus"}


def test_detection_agrees_with_scikit_learn_and_keeps_its_false_alarms():
    draw = np.random.default_rng(0)
    labels = draw.random(500) < 0.1
    values = draw.normal(size=500) + 1.5 * labels
    found = detection(values, labels, fpr=0.1)
    assert found["auroc"] == roc_auc_score(labels, values)
    assert found["average_precision"] == average_precision_score(labels, values)
    alarms = values >= found["threshold"]
    assert alarms[~labels].mean() == found["false_positive_rate"] <= 0.1
    lower = values[values < found["threshold"]].max()
    assert (values >= lower)[~labels].mean() > 0.1  # the next threshold would be too low
    assert alarms[labels].mean() == found["true_positive_rate"]
    assert labels[alarms].mean() == found["precision"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 0], "labels must be 0, or 1 for what is to be found; got 2"),
        ([0, 0, 0, 0], "all 4 labels are 0: both 0 and 1 are needed"),
        ([0, 1, 1], r"each example needs one label: got \(4,\) scores and \(3,\) labels"),
        (["a", "b", "a", "b"], "labels must be 0, or 1"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        detection([1.0, 2.0, 3.0, 4.0], labels)
    with pytest.raises(DataError, match="1 of 2 scores are NaN or infinite"):
        detection([np.nan, 2.0], [0, 1])
    with pytest.raises(SettingsError, match=r"false-positive rate must be in 0..1; got 5"):
        detection([1.0, 2.0], [0, 1], fpr=5)


def test_labels_are_a_column_of_the_file_an_array_beside_it_or_another_file(trained, odd, tmp_path):
    run, rows = trained(**FLOW), pd.read_csv(odd)
    found = examples(run, odd)
    assert labels_of(found, "odd").tolist() == rows["odd"].tolist()
    rows[["odd"]].to_csv(tmp_path / "labels.csv", index=False)
    assert labels_of(found, tmp_path / "labels.csv").tolist() == rows["odd"].tolist()
    np.savez(tmp_path / "both.npz", X=rows[["age", "income", "noise"]].to_numpy(), y=rows["odd"].to_numpy())
    for file in (tmp_path / "both.npz", (rows[["age", "income", "noise"]].to_numpy(), rows["odd"].to_numpy())):
        assert labels_of(examples(run, file), "y").tolist() == rows["odd"].tolist()
    with pytest.raises(DataError, match="has no labels 'age', and there is no such file; it has: id, odd"):
        labels_of(found, "age")
    rows[["odd"]].head(30).to_csv(tmp_path / "few.csv", index=False)
    with pytest.raises(DataError, match="must hold one label for each of the 60 examples"):
        labels_of(found, tmp_path / "few.csv")
