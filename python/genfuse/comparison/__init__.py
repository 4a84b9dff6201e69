"""One table of several models, trained equally long on the same data and measured alike."""

from genfuse.comparison._compare import Budget as Budget
from genfuse.comparison._compare import Comparison as Comparison
from genfuse.comparison._compare import compare as compare
from genfuse.comparison._compare import compare_runs as compare_runs
from genfuse.comparison._report import markdown as markdown
from genfuse.comparison._report import show as show
