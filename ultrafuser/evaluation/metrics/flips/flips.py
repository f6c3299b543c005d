"""What an update of a model breaks and mends: flips from right to wrong and back (MUSCLE, arXiv 2407.09435)."""

import datasets
import evaluate
import numpy as np


class Flips(evaluate.Metric):
    """A mean hides what was lost for what was won: a fused model may be better and still wrong where a part was right."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="before: whether each item was right in the specialist; after: in the fused model.",
            features=datasets.Features({"before": datasets.Value("bool"), "after": datasets.Value("bool")}),
        )

    def _compute(self, before, after):
        before, after = np.asarray(before, bool), np.asarray(after, bool)
        return {
            "positive_flips": float((~before & after).mean()),
            "negative_flips": float((before & ~after).mean()),
            # of what was right before; where nothing was, nothing could be kept
            "retention": float((before & after).sum() / before.sum()) if before.any() else None,
        }
