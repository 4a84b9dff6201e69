"""scikit-learn's estimators around any registered model, for its pipelines, grid searches and pickles."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from typing_extensions import Self

from genfuse.applications import find_method, scores
from genfuse.data import load_data, named
from genfuse.errors import SettingsError
from genfuse.metrics import undisturbed
from genfuse.models import Decodes, Encodes, create, load
from genfuse.models.vae import VAE
from genfuse.training import Trainer
from genfuse.training.trainer import FEW


class _Estimator(BaseEstimator):
    """A model by name, trained on a table X (n_samples, n_features): an array of numbers, or a DataFrame, whose columns
    may be numbers, integers, categories, booleans or dates, with cells missing.

    Args:
        model: of `genfuse list models`.
        settings: of the model, by name.
        steps, batch_size, lr: of the `Trainer`.
        validation_fraction: of the rows of X, in [0, 1), drawn by chance. They are not trained on, and the weights with
            the least loss of them are kept, since a few rows are soon learned by heart. 0: all rows are trained on, and
            the last weights are kept; so it is with fewer than 50 rows, and for models of two players, such as GANs.
        device: where it is trained.
        random_state: seed of the first weights, the rows held out, the order of the examples, and noise.

    Attributes: ``model_``, the trained model in float64; ``scaling_``, of its columns, and their ``schema_``, if they
    are not all real numbers. Errors are ValueErrors.
    """

    model_: Any
    scaling_: Any

    def __init__(
        self,
        model: str = "nsf",
        *,
        settings: Mapping[str, Any] | None = None,
        steps: int = 1000,
        batch_size: int = 128,
        lr: float | None = None,
        validation_fraction: float = 0.1,
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        self.validation_fraction = validation_fraction
        self.model, self.settings, self.steps, self.batch_size = model, settings, steps, batch_size
        self.lr, self.device, self.random_state = lr, device, random_state

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Train the model on the rows of X. ``y`` is not used."""
        if not 0 <= self.validation_fraction < 1:
            raise SettingsError(f"validation_fraction must be in [0, 1); got {self.validation_fraction}")
        rows = self._checked(X, reset=True)
        self._seed = int(check_random_state(self.random_state).randint(2**31))
        data = load_data(rows, hold_out=False, seed=self._seed)
        settings, smooth = dict(self.settings or {}), getattr(self, "smooth", 0.0) if data.schema is None else 0.0
        if smooth:  # the noise holds bins back; damped too, or by mixtures, models find fewer anomalies
            made_by = load(self.model)
            if hasattr(made_by.Config, "damped"):
                settings.setdefault("damped", 0.0)
            if issubclass(made_by, VAE):
                settings.setdefault("decoder", "gaussian")
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            model = create(self.model, data, **settings)
        options: dict[str, Any] = {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "smooth": smooth}
        if self.validation_fraction and data.examples >= FEW and len(list(model.players())) == 1:
            data = data.with_validation(self.validation_fraction)  # by which the trainer keeps the best weights
        Trainer(**options, device=self.device, seed=self._seed, pictures=False).fit(model, data)
        self.model_, self.scaling_, self.schema_ = model.double(), data.scaling, data.schema
        self._columns = (
            list(data.scaling.names) if hasattr(rows, "iloc") and data.scaling and data.scaling.names else None
        )
        return self

    def _checked(self, X: Any, reset: bool = False) -> Any:  # noqa: N803
        """A DataFrame as it is, anything else as an array of finite numbers."""
        if hasattr(X, "iloc"):
            return named(validate_data(self, X, reset=reset, skip_check_array=True))
        return validate_data(self, X, dtype=np.float64, reset=reset)

    def _rows(self, X: Any) -> Tensor:  # noqa: N803
        check_is_fitted(self)
        rows = self._checked(X)
        if self.schema_ is not None:
            import pandas as pd

            frame = rows if hasattr(rows, "iloc") else pd.DataFrame(rows, columns=self.schema_.names)
            return self.schema_.encode(frame[list(self.schema_.names)], "X").to(self.model_.device, torch.float64)
        if hasattr(rows, "iloc"):
            rows = check_array(rows[self._columns] if self._columns else rows, dtype=np.float64)
        mean, std = (np.asarray(of) for of in (self.scaling_.mean, self.scaling_.std))
        return torch.from_numpy((rows - mean) / std).to(self.model_.device)

    def _restored(self, x: Tensor) -> Any:
        """Rows in the units, and as the kind, of what was fitted."""
        if self.schema_ is not None:
            return self.schema_.decode(x)
        values = self.scaling_.restore(x.cpu()).numpy()
        if self._columns is None:
            return values
        import pandas as pd

        return pd.DataFrame(values, columns=self._columns)

    def _scores(self, X: Any, method: str) -> np.ndarray:  # noqa: N803
        x = self._rows(X)
        found = scores(self.model_, x, method=method, seed=self._seed).double().numpy()
        exact = find_method(self.model_, method) == "likelihood"
        return -found - (np.log(self.scaling_.std).sum() if exact else 0)

    def _sample(self, n_samples: int, random_state: Any) -> Any:
        check_is_fitted(self)
        seed = self._seed + 1 if random_state is None else int(check_random_state(random_state).randint(2**31))
        with undisturbed(self.model_):
            torch.manual_seed(seed)
            generator = torch.Generator(self.model_.device).manual_seed(seed)
            return self._restored(self.model_.sample(n_samples, generator=generator))


class DensityEstimator(DensityMixin, _Estimator):
    """log p(x), exact or bounded from below, of any model that has a likelihood: flows, VAEs, diffusion models."""

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        """log p(x) of each row in its own units, (n_samples,) nats."""
        return self._scores(X, "likelihood")

    def score(self, X: Any, y: Any = None) -> float:  # noqa: N803
        """The mean of `score_samples`."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draws, (n_samples, n_features), a DataFrame if one was fitted."""
        return self._sample(n_samples, random_state)


class Synthesizer(_Estimator):
    """Rows like those that were fitted, of any model."""

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draws, (n_samples, n_features), a DataFrame if one was fitted."""
        return self._sample(n_samples, random_state)


class AnomalyDetector(OutlierMixin, _Estimator):
    """What is unlike the rows that were fitted, by `genfuse.applications.scores`.

    Args, beside those of all: ``contamination``, the share of the fitted rows that is called odd, in (0, 0.5];
    ``method``, of the scores; and ``smooth``, of the `Trainer`, used if all columns are real numbers: then ``damped``
    is 0 and a VAE's ``decoder`` gaussian, unless ``settings`` say more. ``offset_`` is the score at which that share
    begins.
    """

    def __init__(
        self,
        model: str = "nsf",
        *,
        contamination: float = 0.1,
        method: str = "auto",
        smooth: float = 0.5,
        settings: Mapping[str, Any] | None = None,
        steps: int = 1000,
        batch_size: int = 128,
        lr: float | None = None,
        validation_fraction: float = 0.1,
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        super().__init__(model, settings=settings, steps=steps, batch_size=batch_size, lr=lr,
                         validation_fraction=validation_fraction, device=device, random_state=random_state)  # fmt: skip
        self.contamination, self.method, self.smooth = contamination, method, smooth

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Train the model on the rows of X. ``y`` is not used."""
        if not 0 < self.contamination <= 0.5:
            raise SettingsError(f"contamination must be in (0, 0.5]; got {self.contamination}")
        super().fit(X)
        self.offset_ = float(np.percentile(self.score_samples(X), 100 * self.contamination))
        return self

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        """The lower, the odder, (n_samples,): log p(x) in nats, or minus another score."""
        return self._scores(X, self.method)

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """`score_samples` less ``offset_``: below 0 for what is called odd, (n_samples,)."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """-1 for what is called odd, 1 for all else, (n_samples,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)


class Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Estimator):
    """Codes of rows, and rows of codes, of any model that encodes: VAEs and flows."""

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Train the model on the rows of X. ``y`` is not used. Raises SettingsError for a model without ``encode``."""
        super().fit(X)
        where = self.model_.device
        if not isinstance(self.model_, Encodes):
            raise SettingsError(f"a {type(self.model_).__name__} does not encode: use a VAE or a flow")
        nothing = torch.zeros(1, len(self.scaling_.mean), dtype=torch.float64, device=where)
        self._n_features_out = self.model_.encode(nothing).shape[1]
        return self

    @torch.no_grad()
    def transform(self, X: Any) -> np.ndarray:  # noqa: N803
        """z (n_samples, D) of each row."""
        return self.model_.encode(self._rows(X)).flatten(1).cpu().numpy()

    @torch.no_grad()
    def inverse_transform(self, X: Any) -> Any:  # noqa: N803
        """The rows of codes (n_samples, D), a DataFrame if one was fitted."""
        check_is_fitted(self)
        where = self.model_.device
        if not isinstance(self.model_, Decodes):
            raise SettingsError(f"a {type(self.model_).__name__} does not decode")
        z = torch.as_tensor(np.asarray(X), dtype=torch.float64, device=where)
        return self._restored(self.model_.decode(z))
