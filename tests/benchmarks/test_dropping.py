"""The benchmark of dropping: what it scores from known hidden states is what the decoder predicts."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import dropping
from modeling_ultrafuser.sparsifiers_ultrafuser import sparsifier
from tests.support.mixes import MIXES, fuse, prompt
from tests.ultrafuser.decoding.test_drafting import passes
from ultrafuser.decoding.dropping import Asked
from ultrafuser.decoding.reading import TextReader
from ultrafuser.evaluation.measurement import held_out


PROMPT, SEQ = 6, 20
LIVE = torch.ones(1, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _as_the_command_sets_it():
    with torch.no_grad():
        yield


def answers(fused, domain="text", count=1):
    rows = [{"input_ids": row} for row in prompt(batch=count, length=SEQ).tolist()]
    return dropping.answers_of(fused, domain, held_out(rows, None, prompt_tokens=PROMPT))


@pytest.mark.parametrize("gate", ["mlp", "cross"])
def test_losses_and_reads_are_those_of_the_decoder_given_the_tokens(gate):
    fused = fuse(MIXES["one family"](), gate=gate)
    (answer,) = answers(fused)
    nats, reads = dropping.forced(fused, answer, dropping.logits_of(fused, answer), 4, "top_k:1")
    asked, logits = Asked(TextReader(fused, {}), sparsifier("top_k:1"), 4), []
    lengths = range(PROMPT, SEQ)
    counts = passes(fused, lambda: logits.extend(asked.logits(answer.ids[:, :n], LIVE)[0, -1] for n in lengths))
    expected = cross_entropy(torch.stack(logits), answer.ids[0, PROMPT:], reduction="none")
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-5)
    assert reads == sum(counts.values()) == 14 + 2 * 5


def test_keeping_everybody_costs_three_reads_and_no_loss(monkeypatch):
    monkeypatch.setattr(dropping, "EVERIES", (4,))
    monkeypatch.setattr(dropping, "KEEPS", ("top_k:3", "top_k:1"))
    fused = fuse(MIXES["one family"]())
    given = [*answers(fused, "text", 2), *answers(fused, "code")]
    found = dropping.losses(fused, given)
    assert found["tokens"] == {"text": 28, "code": 14}
    plain = fused(given[-1].ids).logits[0, PROMPT - 1 : -1]
    assert found["plain"]["code"] == pytest.approx(float(cross_entropy(plain, given[-1].ids[0, PROMPT:])), abs=1e-5)
    everybody, one = found["rows"]
    assert everybody["reads"] == {"text": 3, "code": 3}
    assert everybody["above plain"] == pytest.approx({"text": 0, "code": 0}, abs=1e-6)
    assert one["reads"] == pytest.approx({"text": 24 / 14, "code": 24 / 14})
    assert all(abs(above) > 1e-3 for above in one["above plain"].values())


def test_tokens_are_compared_and_timed():
    fused = fuse(MIXES["one family"]())
    asked = dropping.first_prompts(answers(fused, "text", 2) + answers(fused, "code"))
    assert {d: tuple(ids.shape) for d, ids in asked.items()} == {"text": (1, PROMPT), "code": (1, PROMPT)}
    assert dropping.same_tokens(fused, asked) == {"greedy": True, "with a seed": True}
    found = dropping.times(fused, asked, 1)
    assert list(found["code"]) == ["plain", "top_p:0.8, every 8", "top_k:1, every 8", "top_k:2, every 4"]
    assert all(way["seconds"]["value"] > 0 for way in found["text"].values())
    # all at the first token, the second, and then at every eighth
    reads = dropping.generated(fused, answers(fused, "text", 2) + answers(fused, "code"))
    assert reads["top_k:1, every 8"] == dict.fromkeys(("text", "code"), (dropping.NEW + 2 * 4) / dropping.NEW)
    assert not any(s._forward_pre_hooks for s in fused.model.specialists.values())
