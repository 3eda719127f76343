"""GLUE's metrics as evaluate.Metric classes that need no network: evaluate.load would fetch their code from the hub.

The numbers are scikit-learn's and scipy's.
"""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda references, predictions: _correlation(pearsonr, references, predictions),
    "spearmanr": lambda references, predictions: _correlation(spearmanr, references, predictions),
}


class GlueMetric(evaluate.Metric):
    """The official metrics of a GLUE task.

    Args:
        names: keys of METRICS, in the order in which they are reported; the first one decides between runs.
        is_regression: whether predictions and references are scores instead of class numbers.
    Source: Wang et al. 2019 (arXiv:1804.07461), table 1.
    """

    def __init__(self, names, is_regression):
        self.names, self.is_regression = names, is_regression
        super().__init__(config_name="-".join(names), keep_in_memory=True)

    def _info(self):
        kind = datasets.Value("float64" if self.is_regression else "int64")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        return {name: float(METRICS[name](references, predictions)) for name in self.names}


def _correlation(function, references, predictions):
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:  # undefined; no better than chance
        return 0.0
    return function(references, predictions).statistic
