"""Selection by instruction-following difficulty: the score, and who is kept."""

import math

import pytest
import torch
from datasets import Dataset

from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.mixes import MIXES, fuse
from tests.support.tiny import specialist, tokenizer
from trainers.ifd import ifd_scores, select_by_ifd


CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]}


def speller(**options):
    return tokenizer(chat_template=CHAT_TEMPLATE, **options)


@torch.no_grad()
def loss_by_hand(model, context, response):
    """Nats per token of a response, one token after another."""
    context, response = (speller()(text, add_special_tokens=False)["input_ids"] for text in (context, response))
    total = 0.0
    for token in response:
        total -= model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token].item()
        context = [*context, token]
    return total / len(response)


def test_the_score_is_the_loss_behind_the_prompt_over_the_loss_behind_the_assistants_header_alone():
    model = specialist()
    told = loss_by_hand(model, "<user>2+2?\n<assistant>", "It is 4.")
    alone = loss_by_hand(model, "<assistant>", "It is 4.")
    assert ifd_scores(model, speller(), [CHAT]) == pytest.approx([told / alone], rel=1e-4)


def test_a_template_that_begins_with_the_first_token_begins_the_response_alone_with_it_too():
    model, spelling = specialist(), tokenizer(chat_template="<s>" + CHAT_TEMPLATE)
    told = loss_by_hand(model, "<s><user>2+2?\n<assistant>", "It is 4.")
    assert ifd_scores(model, spelling, [CHAT]) == pytest.approx(
        [told / loss_by_hand(model, "<s><assistant>", "It is 4.")], rel=1e-4
    )


@pytest.mark.parametrize("begins", [True, False])
def test_a_template_without_a_header_leaves_the_response_alone_behind_the_first_or_the_last_token(begins):
    model, spelling = specialist(), tokenizer(chat_template="[INST] {{ messages[0]['content'] }} [/INST]")
    if not begins:
        spelling.bos_token = None
    told = loss_by_hand(model, "[INST] 2+2? [/INST]", "It is 4.")
    alone = loss_by_hand(model, "<s>" if begins else "</s>", "It is 4.")
    assert ifd_scores(model, spelling, [CHAT]) == pytest.approx([told / alone], rel=1e-4)


# positions of GPT-2 are counted, not relative, and Mamba has no attention that a mask could reach
@pytest.mark.grid
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "fused"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_every_example_the_score_it_gets_alone(family, side):
    model = fuse(MIXES["one family"]()) if family == "fused" else specialist(family)
    spelling, rows = speller(), Dataset.from_list(conversations(7))
    spelling.padding_side = side
    together = ifd_scores(model, spelling, rows, batch_size=4)
    assert together == pytest.approx([ifd_scores(model, spelling, [row])[0] for row in rows], rel=1e-4)
    assert len(set(together)) == 7


def test_a_fused_model_scores_as_a_specialist_does_if_it_is_asked_for_it():
    specialists = MIXES["one family"]()
    asked = fuse(specialists).specialist("code")
    expected = ifd_scores(specialists["code"], speller(), conversations(3))
    assert ifd_scores(asked, speller(), conversations(3)) == pytest.approx(expected, rel=1e-4)


def test_losses_are_in_float32_whatever_the_model_is_in():
    model = specialist().to(torch.bfloat16)
    score = ifd_scores(model, speller(), [CHAT])[0]
    assert torch.tensor(score).to(torch.bfloat16).item() != score


def test_dropout_has_no_part_in_it_and_training_goes_on_after():
    model = specialist(attention_dropout=0.5).train()
    assert ifd_scores(model, speller(), conversations(3)) == ifd_scores(model, speller(), conversations(3))
    assert model.training


def test_text_is_scored_as_the_messages_it_stands_for():
    model = specialist()
    text = {"prompt": "2+2?", "completion": "It is 4."}
    assert ifd_scores(model, speller(), [text]) == ifd_scores(model, speller(), [CHAT])


def test_an_example_without_response_gets_no_score_and_one_that_is_too_long_neither_and_both_are_told():
    rows = [
        CHAT,
        {"messages": CHAT["messages"][:1]},
        {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "Four. " * 20}]},
        {"messages": CHAT["messages"][:1]},
    ]
    with pytest.warns(UserWarning, match="examples get no score") as told:
        scores = ifd_scores(specialist(), speller(), rows, batch_size=2, max_length=60)
    assert [math.isnan(score) for score in scores] == [False, True, True, True]
    assert len(told) == 1
    message = str(told[0].message)
    assert message.startswith("3 of 4 examples get no score: 2 like row 1: An example ends with the text of an")
    assert "1 like row 2: An example has at most max_length=60 tokens" in message


def test_data_of_which_nothing_can_be_scored_is_refused():
    with pytest.raises(ValueError, match="No example of 2 can be scored: 2 like row 0.*has only \\['instruction'\\]"):
        ifd_scores(specialist(), speller(), [{"instruction": "2+2?"}] * 2)


# ---------------------------------------------------------------------------------------------- who is kept


def rows(domains):
    return Dataset.from_dict({"domain": domains, "number": list(range(len(domains)))})


def kept(domains, scores, share):
    return select_by_ifd(rows(domains), scores, share)["number"][:]


def test_each_domain_keeps_its_own_share_of_its_most_difficult_in_their_old_order():
    domains = ["text"] * 10 + ["code"] * 4
    scores = [0.1 * i for i in range(10)] + [0.04, 0.01, 0.03, 0.02]
    assert kept(domains, scores, 0.3) == [7, 8, 9, 10]
    assert kept(domains, scores, 0.5) == [5, 6, 7, 8, 9, 10, 12]
    assert kept(domains, scores, 1.0) == list(range(14))


@pytest.mark.parametrize(("share", "number"), [(0.29, 29), (0.1, 10), (0.001, 1)])
def test_quotas_are_exact(share, number):
    assert len(kept(["text"] * 100, [i / 100 for i in range(100)], share)) == number


def test_an_example_above_one_or_without_score_is_dropped_and_does_not_take_anothers_place():
    assert kept(["text"] * 6, [1.01, 1.0, 0.9, math.nan, math.inf, 0.2], 0.5) == [1, 2, 5]
    assert kept(["text"] * 6, [1.01, 1.0, math.nan, math.nan, math.inf, 1.2], 0.5) == [1]


def test_a_domain_that_would_vanish_is_refused():
    with pytest.raises(ValueError, match="of 'code' none has a score of at most 1, out of 2. Score with another"):
        kept(["text", "code", "code"], [0.5, 1.5, math.nan], 0.5)


@pytest.mark.parametrize(
    ("scores", "share", "message"),
    [
        ([0.5], 0.5, "got 1 scores for 2 rows"),
        ([0.5, 0.6], 0.0, "above 0 and up to 1, but got 0.0"),
        ([0.5, 0.6], 10, "above 0 and up to 1, but got 10"),
    ],
)
def test_what_cannot_be_selected_from_is_refused(scores, share, message):
    with pytest.raises(ValueError, match=message):
        kept(["text", "code"], scores, share)


def test_rows_that_name_no_domain_are_refused():
    with pytest.raises(ValueError, match="column 'domain' tells, but the columns are \\['number'\\]"):
        select_by_ifd(rows(["text"]).remove_columns("domain"), [0.5], 0.5)
