"""Routers: what they are named for, by hand, and the same again from a folder."""

import json

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from tests.support.tiny import tokenizer
from ultrafuser.evaluation import contenders
from ultrafuser.evaluation.baselines import ensemble, perplexity_weights
from ultrafuser.evaluation.contenders import Comparison
from ultrafuser.evaluation.measurement import held_out, score
from ultrafuser.route import ROUTERS
from ultrafuser.route.prompt_reading import Prompts, left_padded
from ultrafuser.route.router_base import Examples
from ultrafuser.route.router_files import load_router, router_named, save_router
from ultrafuser.route.router_perplexity import PerplexityRouter
from ultrafuser.route.router_table import TableRouter
from ultrafuser.route.router_training import measured, prompts_of
from ultrafuser.route.router_words import WordsRouter, fitted, probabilities


NAMES = ["text", "code", "math"]
CODE = [f"def f{i}(self): return" for i in range(9)]
SUMS = [f"What is {i} * {i + 1}?" for i in range(9)]


def batch(model, lines):
    ids, mask = left_padded([torch.tensor(tokenizer()(line)["input_ids"]) for line in lines])
    return Prompts(model, tokenizer(), ids, mask)


@pytest.fixture
def examples(fused):
    """Code, which "code" answers best, and sums, which "math" does."""
    losses = torch.tensor([[3.0, 1.0, 2.0]] * 9 + [[3.0, 2.0, 1.0]] * 9)
    return Examples([batch(fused, CODE), batch(fused, SUMS)], losses, ["programs"] * 9 + ["sums"] * 9)


def trained(word, examples):
    kind, settings = router_named(word, trained=True)
    return kind.trained(examples, settings)


TRAINED = [name for name, kind in ROUTERS.items() if kind.trains]


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_router_finds_who_answers_what(name, examples, fused):
    router = trained(name, examples)
    found = router.prior(batch(fused, ["def f77(self): return", "What is 21 * 22?"]))
    assert found.argmax(-1).tolist() == [1, 2]
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


@pytest.mark.parametrize("name", TRAINED)
def test_a_router_comes_back_from_its_folder_as_it_was(name, examples, fused, tmp_path):
    router, asked = trained(name, examples), batch(fused, ["def area(w): return", "x"])
    save_router(tmp_path, name, router, NAMES)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert torch.equal(load_router(tmp_path, NAMES).prior(asked), router.prior(asked))


@pytest.mark.parametrize("name", TRAINED)
def test_one_that_saw_one_specialist_win_everywhere_chooses_it(name, examples, fused):
    examples.losses = torch.tensor([[2.0, 2.0, 1.0]]).expand(18, -1)
    assert trained(name, examples).prior(batch(fused, ["def f(): x", "1 + 1"])).argmax(-1).tolist() == [2, 2]


def test_losses_on_a_prompt_are_the_specialists_own(fused):
    lines = ["what is 2+2?", "def read(self): return 1"]
    prompts = batch(fused, lines)
    for row, line in enumerate(lines):
        ids = torch.tensor([tokenizer()(line)["input_ids"]])
        for k, name in enumerate(NAMES):
            expected = fused.specialist(name)(ids, labels=ids).loss.item()
            assert prompts.losses[row, k].item() == pytest.approx(expected, rel=1e-5)
    found = PerplexityRouter(PerplexityRouter.parse("0.5")).prior(prompts)
    torch.testing.assert_close(found, (-prompts.losses / 0.5).softmax(-1))


@torch.no_grad()
def test_states_are_the_mean_over_a_prompt_without_padding_and_its_last_token(fused):
    lines = ["what is 2+2?", "def read(self): return 1"]
    prompts = batch(fused, lines)
    for row, line in enumerate(lines):
        ids = torch.tensor([tokenizer()(line)["input_ids"]])[:, :-1]
        own = [fused.specialist(n).base_model(ids).last_hidden_state.mean(1) for n in NAMES]
        torch.testing.assert_close(prompts.mean_states()[row], torch.cat(own, -1)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prompts.mean_states(1)[row], own[0][0], rtol=1e-4, atol=1e-5)


def test_placing_a_prompt_among_others_runs_one_specialist(examples, fused):
    router, runs = trained("nearest", examples), []
    for k, own in enumerate(fused.model.specialists.values()):
        own.register_forward_hook(lambda *_, k=k: runs.append(k))
    router.prior(batch(fused, ["2+2?"]))
    assert runs == [0]


def test_the_nearest_vote_and_one_neighbour_decides_alone(examples, fused):
    asked = batch(fused, [CODE[3], SUMS[5]])
    one = trained("nearest:1", examples).prior(asked)
    assert torch.equal(one, torch.eye(3)[[1, 2]])
    states = torch.cat([b.mean_states(1) for b in examples.prompts])
    likeness = F.cosine_similarity(asked.mean_states(1)[:, None], states[None], dim=-1)
    votes = examples.best[likeness.sort(-1, descending=True).indices[:, :5]]
    expected = torch.stack([(votes == k).float().mean(-1) for k in range(3)], -1)
    torch.testing.assert_close(trained("nearest:5", examples).prior(asked), expected)


def test_a_table_of_ones_on_the_diagonal_is_its_classifier_and_any_other_looks_up(examples, fused):
    asked = batch(fused, ["def f77(self): return", "What is 21 * 22?"])
    router = trained("table", examples)
    assert router.settings["categories"] == ["programs", "sums"]
    torch.testing.assert_close(router.tensors["table"], -torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]))
    own = probabilities(router, asked.texts).argmax(-1)
    same = TableRouter(router.settings, {**router.tensors, "table": torch.eye(2)})
    assert torch.equal(same.prior(asked).argmax(-1), own)
    swapped = TableRouter(router.settings, {**router.tensors, "table": torch.eye(2).flip(0)})
    assert torch.equal(swapped.prior(asked).argmax(-1), 1 - own)


@pytest.mark.parametrize("classes", [2, 3])
def test_words_predict_what_scikit_learn_predicts(classes):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [*CODE, *SUMS, *(f"once upon a time {i}" for i in range(9))][: 9 * classes]
    labels = [i // 9 for i in range(len(texts))]
    features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), max_features=20_000, sublinear_tf=True)
    model = make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000)).fit(texts, labels)
    asked = ["def upon(time): 3 * 4?", "what is once", "f"]
    # the fourth class has no text
    found = probabilities(WordsRouter(*fitted(texts, labels, 4)), asked)
    torch.testing.assert_close(
        found[:, :classes].double(), torch.tensor(model.predict_proba(asked)), rtol=1e-5, atol=1e-6
    )
    assert not found[:, classes:].any()


def test_rows_of_evaluate_are_these_routers(fused, monkeypatch):
    """A uniform gate with this prior, and the trained one's choice, are what `evaluate` measures."""
    rows = [{"text": line} for line in ("what is 2+2? it is 4", "def read(self): return 1")]
    data = held_out(rows, tokenizer(), prompt_tokens=8)
    monkeypatch.setattr(contenders, "cost", lambda *_: {})
    comparison = Comparison(fused, fused, tokenizer(), {"text": data}, {"text": data})
    scores = {name: score(model, data) for name, model in comparison.specialists.items()}
    prompts = prompts_of(fused, tokenizer(), data)[0]
    prior = PerplexityRouter({"temperature": 1.0}).prior(prompts)
    torch.testing.assert_close(prior, perplexity_weights(scores, data), rtol=1e-4, atol=1e-5)
    comparison.found = {f"{n} specialist": comparison.run(s, "specialist") for n, s in comparison.specialists.items()}
    alike = ensemble(fused, "uniform")
    row = contenders.weighted_by_perplexity(comparison, alike).scores["text"].losses
    by_hand = score(alike, data, before=lambda _: {"gate_prior": prior}).losses
    torch.testing.assert_close(row, by_hand, rtol=1e-4, atol=1e-4)
    found = measured(fused, tokenizer(), {"text": data})
    assert torch.equal(found.best, contenders.best_per_request(scores, data))
    chosen = WordsRouter.trained(found, {}).prior(prompts).argmax(-1)
    assert torch.equal(contenders.trained_choice(comparison)(scores, data), chosen)


@pytest.mark.parametrize(
    ("word", "is_trained", "told"),
    [
        ("word", True, "no such router: 'word'.*one of .*'words', 'table', 'states', 'nearest'"),
        ("perplexity", True, "A router that is trained is one of"),
        ("no/such/folder", False, "no such router.*'perplexity'.*folders that `ultrafuser route` wrote"),
        ("words", False, "no such router.*folders that"),
        ("perplexity:cold", False, "a number from 1e-6 to 1e6, but got 'cold'"),
        ("perplexity:0", False, "a number from 1e-6 to 1e6, but got '0'"),
        ("nearest:0", True, "a positive integer, but got '0'"),
        ("words:3", True, "has no setting, but got '3'"),
    ],
)
def test_a_name_or_a_setting_that_there_is_not_is_refused(word, is_trained, told):
    with pytest.raises(ValueError, match=told):
        router_named(word, trained=True) if is_trained else load_router(word, NAMES)


def test_a_folder_of_another_kind_or_for_other_specialists_is_refused(examples, tmp_path):
    save_router(tmp_path, "words", trained("words", examples), NAMES)
    with pytest.raises(ValueError, match="chooses among .*'math'.*but the model has .*'law'.*Train one for this"):
        load_router(tmp_path, ["text", "code", "law"])
    about = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps(about | {"kind": "oracle"}))
    with pytest.raises(ValueError, match="a router of the kind 'oracle'.*Train it again"):
        load_router(tmp_path, NAMES)
    (tmp_path / "router.json").write_text(json.dumps(about))
    (tmp_path / "router.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="The router .*cannot be read"):
        load_router(tmp_path, NAMES)
