"""The "words" router: a classifier of the prompt's text, which no specialist reads for it."""

import torch
from torch import Tensor

from .prompt_reading import Prompts
from .router_base import Examples, Router


FEATURES = {"analyzer": "char_wb", "ngram_range": (1, 4), "sublinear_tf": True}
MOST_FEATURES = 20_000


class TextRouter(Router):
    """Base of routers that classify the prompt's text."""

    def __init__(self, settings: dict, tensors: dict[str, Tensor] | None = None):
        # missing, it is missed now, and not at the first request
        import sklearn  # noqa: F401

        super().__init__(settings, tensors)


class WordsRouter(TextRouter):
    """Predicts from the prompt's text which specialist answers best: logistic regression on character n-grams.

    The classifier of prompts that mixtures of whole models have before them, such as MoDEM, in its smallest form. It costs no
    pass of any model.
    """

    trains = True

    @classmethod
    def trained(cls, examples: Examples, settings: dict) -> "WordsRouter":
        names = examples.prompts[0].model.config.specialist_names
        return cls(*fitted(examples.texts, examples.best.tolist(), len(names)))

    def prior(self, prompts: Prompts) -> Tensor:
        return probabilities(self, prompts.texts)


def probabilities(router: Router, texts: list[str]) -> Tensor:
    """Predicts the class of texts from what `fitted` returned. Shape (texts, classes)."""
    weight, bias = router.tensors["weight"], router.tensors["bias"]
    if router.settings["vocabulary"]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        features = TfidfVectorizer(**FEATURES, vocabulary=router.settings["vocabulary"])
        features.idf_ = router.tensors["idf"].numpy()
        found = torch.tensor(features.transform(texts).toarray())
    else:
        found = weight.new_zeros(len(texts), 0)
    return (found @ weight.T + bias).softmax(-1).float()


def fitted(texts: list[str], labels: list[int], classes: int) -> tuple[dict, dict[str, Tensor]]:
    """Trains a classifier of texts. Where one class is always right, it is always predicted.

    Args:
        texts: What it reads.
        labels: The class of each.
        classes: How many there are; those without a text are never predicted.

    Returns:
        `settings` and `tensors` of a router, in float64: the vocabulary by index; inverse document frequencies (features,),
        weight (classes, features) and bias (classes,).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    seen = sorted(set(labels))
    bias = torch.full((classes,), -torch.inf, dtype=torch.float64)
    if len(seen) == 1:
        bias[seen] = 0
        return {"vocabulary": []}, {"weight": bias.new_zeros(classes, 0), "bias": bias, "idf": bias.new_zeros(0)}
    features = TfidfVectorizer(**FEATURES, max_features=MOST_FEATURES)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features.fit_transform(texts), labels)
    own, offsets = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    if len(seen) == 2:
        # scikit-learn keeps the second class's scores alone
        own, offsets = torch.cat([torch.zeros_like(own), own]), torch.cat([torch.zeros_like(offsets), offsets])
    weight = own.new_zeros(classes, own.shape[1])
    weight[seen], bias[seen] = own, offsets
    tensors = {"weight": weight, "bias": bias, "idf": torch.tensor(features.idf_)}
    return {"vocabulary": features.get_feature_names_out().tolist()}, tensors
