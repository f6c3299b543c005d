"""Gates of other papers against their formulas, token by token, and the recipes that fit them alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import ledger
from experiments.published_gates import (
    AttentionGate,
    DomainGate,
    EntropyGate,
    Measured,
    PrototypeGate,
    alone,
    by_entropies,
    heads_of,
    newcomers,
    published,
)
from experiments.run_processes import check
from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.evaluation.measurement import MIXED, held_out, mean_loss


NAMES = ("text", "code", "math")
WIDTH, ROWS = 32, 99


@pytest.fixture
def model():
    return UltraFuserForCausalLM.from_specialists({n: specialist(layers=1) for n in NAMES}, gate="uniform").eval()


@pytest.fixture
def states():
    return [torch.randn(1, 2, WIDTH) for _ in NAMES]


def stirred(gate):
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=0.5)
    return gate.eval()


def dot(one, other):
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def normalised(vector):
    return (vector - vector.mean()) / vector.std(correction=0)


def assert_scores(gate, states, score):
    """`score` is what specialist k says at a token whose states are given."""
    found = gate.scores(states)
    for t in range(2):
        expected = [float(score(k, [h[0, t] for h in states])) for k in range(len(NAMES))]
        assert found[0, t].tolist() == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_a_prototypes_score_is_a_cosine_of_centred_vectors(model, states):
    gate = stirred(PrototypeGate(model.config))
    assert_scores(gate, states, lambda k, h: dot(normalised(gate.vectors[k]), normalised(h[k])) / math.sqrt(WIDTH))


@torch.no_grad()
def test_attention_compares_a_query_of_the_mean_with_each_key(model, states):
    gate = stirred(AttentionGate(model.config))

    def score(k, h):
        query, key = gate.query @ (sum(h) / 3), gate.keys[k] @ h[k]
        return dot(query, key) / math.sqrt(len(query))

    assert_scores(gate, states, score)


@torch.no_grad()
def test_a_domains_vector_is_projected_from_its_embedding_and_a_newcomer_changes_no_other_score(model, states):
    embeddings = torch.randn(3, 5)
    gate = stirred(DomainGate(model.config, embeddings, reads=2))

    def score(k, h):
        gated, value = (gate.first @ embeddings[k]).chunk(2)
        return dot(gate.second @ (gated * gated.sigmoid() * value), torch.cat(h[:2]))

    assert_scores(gate, states, score)
    before = gate.scores(states)
    gate.embeddings = torch.cat([embeddings[:2], torch.randn(1, 5)])
    after = gate.scores(states)
    assert torch.equal(after[..., :2], before[..., :2])
    assert not torch.equal(after[..., 2], before[..., 2])


@torch.no_grad()
def test_the_entropy_gate_sees_entropies_alone(model, states):
    gate = EntropyGate(model.config, heads_of(model))
    gate.init_weights()
    gate.eval()
    seen = []
    gate.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scores = gate.scores(states)
    p = (states[1][0, 0] @ heads_of(model)[1].T).softmax(0).tolist()
    assert seen[0][0, 1].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-4)
    assert seen[0].shape == (2, 3)
    assert scores.shape == (1, 2, 3)


@pytest.fixture
def subject(tmp_path):
    """Of each domain a specialist, and a few blocks."""
    torch.manual_seed(0)
    for name in NAMES:
        specialist(layers=1).save_pretrained(tmp_path / name)
    blocks = {name: {"fuse": torch.randint(3, ROWS, (4, 12))} for name in NAMES}
    return SimpleNamespace(folder=tmp_path, blocks=blocks, seed=0)


def test_a_prototype_that_is_fitted_alone_does_not_see_the_others(subject):
    (_, model), (name, sparse) = alone(subject, ["none", "top_k:2"], steps=3)
    assert (name, sparse is model) == (", top_k:2", True)
    vectors = model.model.fusion_gate.vectors.clone()
    subject.blocks["math"]["fuse"] = torch.randint(3, ROWS, (4, 12))
    ((_, again),) = alone(subject, ["none"], steps=3)
    moved = [not torch.equal(a, b) for a, b in zip(vectors, again.model.fusion_gate.vectors, strict=True)]
    assert moved == [False, False, True]
    # the first of six per cent of three steps is not slower: AdamW moves every number by its rate
    assert vectors.abs().max().item() == pytest.approx(3 * 5e-3, rel=0.1)


def test_entropies_are_fitted_to_the_mixtures_loss_and_more_epochs_fit_more(subject):
    def loss(model):
        ids = torch.cat([subject.blocks[name]["fuse"] for name in NAMES])
        return model(ids, labels=ids).loss.item()

    losses = [loss(model) for _, model in by_entropies(subject, [1, 40], batch=16)]
    assert losses[1] < losses[0]


def test_the_configs_of_these_experiments_are_settings_that_their_functions_take():
    runs = [run for run in ledger.read("strategies") if run.settings["kind"] in ("published gates", "newcomers")]
    assert len(runs) == 6
    for run in runs:
        check(run)


def tests_of(subject):
    rows = {name: [{"input_ids": row} for row in own["fuse"].tolist()] for name, own in subject.blocks.items()}
    return {name: held_out(own, None, prompt_tokens=3) for name, own in rows.items()}


@pytest.mark.parametrize("fusion", ["logits", "probabilities"])
def test_states_that_are_read_once_give_the_loss_that_the_model_has(fusion, subject):
    tests = subject.tests = tests_of(subject)
    measured = Measured(subject)
    for gate in ("linear", "uniform", "cross:8+calibration"):
        parts = {name: subject.folder / name for name in NAMES}
        model = UltraFuserForCausalLM.from_specialists(parts, gate=gate, fusion=fusion)
        stir_gate(model)
        expected = {name: mean_loss(model, test) for name, test in tests.items()}
        assert measured.losses(model) == pytest.approx(expected, abs=1e-5)


@pytest.mark.e2e
def test_gates_are_fitted_jointly_and_a_newcomer_joins_without_training(subject):
    specialist(layers=1).save_pretrained(subject.folder / "base")
    stage = {"max_steps": 2, "learning_rate": 0.01, "gate_scale": 0.5, "mixed_share": 0.25}
    subject.tests = {**tests_of(subject), MIXED: tests_of(subject)["text"]}
    subject.losses = lambda model: {domain: mean_loss(model, test) for domain, test in subject.tests.items()}
    subject.plain = {"gate": "cross:8+calibration", "fusion": "logits", "stage": stage}
    subject.tokenizer, subject.examples_per_domain = tokenizer(), 2
    words = ["prototypes", "attention", "domain embeddings"]
    rows = published(
        subject,
        {word: {"method": word} for word in words}
        | {
            "anchor": {"method": "product", "gate": "anchor:code"},
            "uniform": {"method": "product", "gate": "uniform", "learning_rate": None},
        },
    )
    assert len({row["text"] for row in rows.values()}) == len(rows) == 5
    rows = newcomers(
        subject,
        [
            "domain embedding of the newcomer",
            "plain gate, ultrafuser add",
            "plain gate, no newcomer",
            "posterior gate",
        ],
    )
    for row in rows.values():
        assert row.keys() == {*NAMES, MIXED, "others"}
    assert len({row["math"] for row in rows.values()}) == 4
