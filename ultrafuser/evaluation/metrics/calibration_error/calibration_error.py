"""Expected calibration error: the mean gap between confidence and accuracy (Guo et al., 2017, arXiv 1706.04599, eq. 3)."""

import datasets
import evaluate
import torch

from ultrafuser.evaluation.resampling import calibration_error


class CalibrationError(evaluate.Metric):
    """Guesses are sorted by confidence into bins of equal width; each bin's gap counts by its share of guesses."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="confidence: the probability of each guess; correct: whether it was right; bins: how "
            "many, 15 unless told.",
            features=datasets.Features({"confidence": datasets.Value("float64"), "correct": datasets.Value("bool")}),
        )

    def _compute(self, confidence, correct, bins=15):
        found = calibration_error(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), bins)
        return {"calibration_error": found}
