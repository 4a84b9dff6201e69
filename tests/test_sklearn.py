"""scikit-learn's own checks, and what its users do with estimators."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from genfuse.errors import SettingsError
from genfuse.sklearn import AnomalyDetector, DensityEstimator, Synthesizer, Transformer

SMALL = {"settings": {"hidden": 8}, "steps": 5, "random_state": 0}
ALL = (AnomalyDetector, DensityEstimator, Synthesizer, Transformer)


def expected_failures(estimator):
    """A DataFrame of whole numbers is a table of integers, and an array one of real numbers: their models differ."""
    check = "check_classifier_data_not_an_array"
    return {check: expected_failures.__doc__} if isinstance(estimator, AnomalyDetector) else {}


@parametrize_with_checks(
    [Estimator("maf", settings={"hidden": 4}, steps=2, random_state=0) for Estimator in ALL],
    expected_failed_checks=expected_failures,
)
def test_scikit_learn_takes_them_for_its_own(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def people():
    age = np.random.default_rng(0).normal(50, 10, 600)
    return pd.DataFrame({"age": age, "income": 1000 * age + np.random.default_rng(1).normal(0, 3000, 600)})


def test_densities_are_those_of_the_rows_in_their_own_units(people):
    train, test = people[:500], people[500:]
    ours = DensityEstimator("nsf", settings={"hidden": 32}, steps=300, random_state=0).fit(train)
    truth = -0.5 * ((test.age - 50) ** 2 / 100 + (test.income - 1000 * test.age) ** 2 / 9e6) - np.log(2 * np.pi * 3e4)
    assert ours.score(test) == pytest.approx(truth.mean(), abs=0.3)
    drawn = ours.sample(2000)
    assert list(drawn.columns) == ["age", "income"]
    assert drawn.corr().iloc[0, 1] == pytest.approx(people.corr().iloc[0, 1], abs=0.1)


def test_few_rows_are_not_learned_by_heart():
    a = np.random.default_rng(0).normal(size=(1300, 6))
    a[:, 1] = a[:, 0] ** 2 + 0.5 * a[:, 1]
    a[:, 3] = np.sin(2 * a[:, 2]) + 0.3 * a[:, 3]
    a[:, 5] = a[:, 0] * a[:, 4] + 0.5 * a[:, 5]
    few, fresh = a[:300], a[300:]
    settings = {"settings": {"hidden": 32}, "steps": 500, "random_state": 0}
    kept = DensityEstimator("nsf", **settings).fit(few)
    last = DensityEstimator("nsf", validation_fraction=0, **settings).fit(few)
    assert kept.score(fresh) > last.score(fresh) + 0.3
    assert last.score(few) > last.score(fresh) + 2
    with pytest.raises(SettingsError, match=r"validation_fraction must be in \[0, 1\); got 1.5"):
        DensityEstimator("nsf", validation_fraction=1.5).fit(few)


def test_what_breaks_the_pattern_is_found(people):
    detector = AnomalyDetector("nsf", contamination=0.02, settings={"hidden": 32}, steps=300, random_state=0).fit(
        people
    )
    assert (detector.predict(people) < 0).mean() == pytest.approx(0.02, abs=0.005)
    odd = pd.DataFrame({"age": [40.0, 40.0], "income": [40_000.0, 65_000.0]})  # each value alone is usual
    assert detector.predict(odd).tolist() == [1, -1]


def test_codes_lead_back_to_the_rows(people):
    transformer = Transformer("nsf", **SMALL).fit(people)
    z = transformer.transform(people)
    pd.testing.assert_frame_equal(transformer.inverse_transform(z), people, rtol=1e-4)
    assert transformer.get_feature_names_out().tolist() == ["transformer0", "transformer1"]


def test_they_clone_pickle_and_search(people):
    search = GridSearchCV(DensityEstimator(**SMALL), {"lr": [1e-6, 1e-2], "model": ["realnvp"]}, cv=2)
    assert search.fit(people).best_params_["lr"] == 1e-2
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(again.score_samples(people), search.best_estimator_.score_samples(people))
    assert clone(again).get_params() == again.get_params()
    rows = make_pipeline(StandardScaler(), Synthesizer(**SMALL)).fit(people)
    assert rows[-1].sample(3).shape == (3, 2)
    density = make_pipeline(Transformer(**SMALL), KernelDensity()).fit(people)
    assert np.isfinite(density.score(people))


def test_tables_of_several_kinds_go_in_and_come_out(people):
    mixed = people.assign(plan=np.where(people.age > 50, "plus", "basic"), visits=people.age.round().astype(int))
    mixed.loc[::7, "income"] = np.nan
    drawn = Synthesizer("vae", settings={"hidden": 8}, steps=20, random_state=0).fit(mixed).sample(50)
    assert list(drawn.columns) == list(mixed.columns)
    assert set(drawn["plan"]) <= {"plus", "basic"}
    assert drawn["income"].isna().any()
    detector = AnomalyDetector("nsf", settings={"hidden": 8}, steps=20, random_state=0).fit(mixed)
    assert np.isfinite(detector.score_samples(mixed)).all()
    with pytest.raises(ValueError, match="one of the categories basic, plus"):
        detector.predict(mixed.assign(plan="gold"))


def test_a_model_without_the_verb_is_named(people):
    with pytest.raises(SettingsError, match="a GAN does not encode: use a VAE or a flow"):
        Transformer("gan", **SMALL).fit(people)
    with pytest.raises(SettingsError, match="a GAN has no likelihood of examples; it has: nearest, critic"):
        DensityEstimator("gan", **SMALL).fit(people).score(people)
    assert np.isfinite(AnomalyDetector("gan", **SMALL).fit(people).score_samples(people)).all()
    vae = Transformer("vae", settings={"hidden": 8, "latent_dim": 1, "decoder": "gaussian"}, steps=5, random_state=0)
    assert vae.fit_transform(people).shape == (600, 1)


def test_bins_of_a_detector_are_damped_only_where_nothing_else_smooths():
    rows = np.random.default_rng(0).normal(size=(60, 3))
    for expected, options in ((0, {}), (0.25, {"smooth": 0}), (1, {"settings": {"damped": 1.0}})):
        found = AnomalyDetector("nsf", steps=1, random_state=0, **options).fit(rows)
        assert found.model_.config.damped == expected
    AnomalyDetector("vae", steps=1).fit(rows)


@pytest.mark.parametrize(("smooth", "decoder"), [(0.5, "gaussian"), (0.0, "mixture")])
def test_what_smooths_rows_has_a_gaussian_decoder(smooth, decoder):
    detector = AnomalyDetector("vae", smooth=smooth, steps=2, random_state=0)
    detector.fit(np.random.default_rng(0).normal(size=(60, 3)))
    assert detector.model_.config.decoder == decoder
