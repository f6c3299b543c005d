"""Greedy answers in blocks: the same as transformers' own, and the same after a kill."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.real import generating
from experiments.real.generating import answers, greedy
from experiments.real.measuring import example_losses
from experiments.real.packing import shared_start, tokenised
from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support import adapted
from tests.support.conversations import conversations
from tests.support.tiny import stir_gate


QUESTIONS = ["12+3?", "a", "Tell me about the sea.", "zzzz 9", "qq", "1*1*1*1*1", "Why?"]
LONGEST = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    adapted.make(folder)
    sources = {"text": folder / "base", "math": folder / "math", "code": folder / "code"}
    found = {
        "base": AutoModelForCausalLM.from_pretrained(folder / "base"),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "base"),
    }
    for gate, fusion in (("cross:16", "logits"), ("evidence:16+calibration", "logits"), ("cross:16", "probabilities")):
        model = UltraFuserForCausalLM.from_specialists(
            {name: str(path) for name, path in sources.items()},
            base=str(folder / "base"),
            gate=gate,
            fusion=fusion,
            dtype="float32",
        )
        stir_gate(model)
        found[f"{gate}, {fusion}"] = model.eval()
    return found


@pytest.mark.parametrize(
    "name", ["base", "cross:16, logits", "evidence:16+calibration, logits", "cross:16, probabilities"]
)
def test_rows_that_have_ended_change_nothing_for_the_others(models, name):
    model, tokenizer = models[name], models["tokenizer"]
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = {"max_new_tokens": LONGEST, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=mask, eos_token_id=98, **length)[:, ids.shape[1] :].tolist()
    # a token that ends some answers early and others never
    end = plain[0][2]
    expected = [row[: row.index(end)] if end in row else row for row in plain]
    lengths = sorted(map(len, expected))
    assert lengths[0] < lengths[-1]
    assert greedy(model, ids, mask, LONGEST, end) == expected


def test_answers_that_go_on_after_a_kill_are_the_same(models, monkeypatch):
    model, tokenizer = models["base"], models["tokenizer"]
    whole, kept, blocks = answers(model, tokenizer, QUESTIONS, LONGEST, batch=2), {}, []
    block = generating._block

    def killed(*args):
        blocks.append(args)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return block(*args)

    monkeypatch.setattr(generating, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        answers(model, tokenizer, QUESTIONS, LONGEST, batch=2, keep=kept.update)
    assert len(kept) == 4
    assert answers(model, tokenizer, QUESTIONS, LONGEST, batch=2, done=kept) == whole
    assert len(blocks) == 5


def test_losses_are_those_of_the_model_on_answers_alone_or_on_questions(models):
    model, tokenizer, start = models["base"], models["tokenizer"], shared_start(models["tokenizer"])
    row = conversations(3)[2]
    example = tokenised(tokenizer, row["messages"], len(start))
    ids = torch.tensor([start + example.ids])
    labels = torch.tensor([[-100] * len(start) + example.labels])
    ((loss, count),) = example_losses(model, tokenizer, [row])
    assert count == (labels != -100).sum()
    assert loss / count == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
    labels = torch.where(labels == -100, ids, -100)
    labels[:, : len(start)] = -100
    ((loss, count),) = example_losses(model, tokenizer, [row], prompts=True)
    assert loss / count == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
