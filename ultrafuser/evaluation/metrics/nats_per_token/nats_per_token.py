"""Loss of a language model on text: negative log-likelihood, in nats per token."""

import datasets
import evaluate


class NatsPerToken(evaluate.Metric):
    """Every token counts alike, however long its example; e to the power of the result is the perplexity."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="log_probabilities: of each example, natural logarithms of the probabilities that the "
            "model gave to the tokens that came. Examples may have none.",
            features=datasets.Features({"log_probabilities": datasets.List(datasets.Value("float64"))}),
        )

    def _compute(self, log_probabilities):
        flat = [value for example in log_probabilities for value in example]
        if not flat:
            raise ValueError("Nats per token need a token, but no example has any.")
        return {"nats_per_token": -sum(flat) / len(flat), "tokens": len(flat)}
