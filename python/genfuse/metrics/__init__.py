"""What is measured of a model."""

from genfuse.metrics._distances import Moments as Moments
from genfuse.metrics._distances import TooFewSamplesError as TooFewSamplesError
from genfuse.metrics._distances import frechet_distance as frechet_distance
from genfuse.metrics._distances import kernel_distance as kernel_distance
from genfuse.metrics._distances import sliced_wasserstein_distance as sliced_wasserstein_distance
from genfuse.metrics._evaluate import evaluate as evaluate
from genfuse.metrics._evaluate import undisturbed as undisturbed
from genfuse.metrics._features import Extractor as Extractor
from genfuse.metrics._features import classifier_path as classifier_path
from genfuse.metrics._features import extractor as extractor
from genfuse.metrics._features import train_features as train_features
from genfuse.metrics._modes import mode_coverage as mode_coverage
from genfuse.metrics._neighbours import nearest as nearest
from genfuse.metrics._neighbours import prdc as prdc
from genfuse.metrics._samples import evaluate_samples as evaluate_samples
from genfuse.metrics.scores import Samples as Samples
