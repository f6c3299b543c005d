"""Tokenizers of one vocabulary: added tokens that only some know, begin tokens that only some add, stop strings."""

import logging

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, set_seed

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.generation_config_ultrafuser import merged_generation_config
from modeling_ultrafuser.tokenizer_ultrafuser import tokenizer_notes, widest_usable_tokenizer
from tests.support.tiny import specialist, tokenizer
from ultrafuser.check.checks import judge
from ultrafuser.evaluation.local_answers import _generate


ROWS = 99


def words(added=(), *, special=True, vocab_size=90, **choices):
    """A tokenizer of 90 tokens and these."""
    made = tokenizer(vocab_size, **choices)
    made.add_tokens(list(added), special_tokens=special)
    return made


def begins(made):
    made._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def folders(path, made: dict, rows=ROWS):
    set_seed(0)
    for name, own in made.items():
        specialist(layers=1, hidden_size=16, vocab_size=rows).save_pretrained(path / name)
        own.save_pretrained(path / name)
    return {name: path / name for name in made}


def notes_on(made):
    """What is told, each fact followed by what to do."""
    return list(map(" ".join, tokenizer_notes(made, ROWS, widest_usable_tokenizer(made, ROWS))))


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines that fusing printed."""
    monkeypatch.setattr(logging.getLogger("modeling_ultrafuser"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("modeling_ultrafuser")]


def warnings_of(both):
    found = judge({name: (str(folder), None) for name, folder in both.items()})
    return found.verdict, [f.text + " " + f.fix for f in found.findings if f.about == "tokenizer"]


# ---------------------------------------------------------------------------------- added tokens


@pytest.mark.grid
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("knowing", ["text", "code"])
def test_added_tokens_that_only_some_know_are_told_and_fused(special, knowing, tmp_path, lines):
    other = {"text": "code", "code": "text"}[knowing]
    made = {
        name: words(["<think>", "</think>"] if name == knowing else [], special=special) for name in ("text", "code")
    }
    both = folders(tmp_path, made)
    fused = UltraFuserForCausalLM.from_specialists(both)
    assert fused.config.vocab_size == ROWS
    [line] = lines()
    assert f"{knowing}: '<think>', '</think>'" in line
    assert f"{other}:" not in line
    verdict, told = warnings_of(both)
    assert verdict == "warning"
    assert [text for text in told if f"{knowing}: '<think>', '</think>'" in text]
    # the one that knows them is taken, whichever stands first
    assert common_tokenizer(both)("a<think>").input_ids == [made[knowing].convert_tokens_to_ids("a"), 90]


def test_names_of_rows_that_are_kept_free_are_no_tokens():
    # as Llama 3 and 3.1 have them: two names are given, and the free ones have moved
    old = [f"<|reserved_special_token_{i}|>" for i in range(4)]
    new = ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|eom_id|>", "<|reserved_special_token_1|>"]
    made = {"llama_3": words(old), "llama_31": words(new)}
    assert common_tokenizer(made).get_vocab()["<|eom_id|>"] == 92
    [note] = notes_on(made)
    assert "llama_31: '<|finetune_right_pad_id|>', '<|eom_id|>'" in note
    assert "reserved" not in note


@pytest.mark.parametrize(
    "name", ["<unused7>", "[control_8]", "<SPECIAL_20>", "<|placeholder3|>", "<｜place▁holder▁no▁7｜>"]
)
def test_every_makers_name_of_a_free_row_gives_way_to_a_token(name):
    [note] = notes_on({"text": words([name]), "code": words(["<eom>"])})
    assert "code: '<eom>'" in note


def test_an_added_token_of_another_name_is_refused_for_what_it_is(tmp_path):
    made = {"text": words(["<|user|>", "<|end|>"]), "code": words(["<|human|>", "<|end|>"])}
    with pytest.raises(
        ValueError,
        match=r"1 of the tokens .* have other names .*id 90 is '<\|user\|>' in 'text' and '<\|human\|>' in 'code'",
    ):
        UltraFuserForCausalLM.from_specialists(folders(tmp_path, made))
    verdict, told = warnings_of({name: tmp_path / name for name in made})
    assert verdict == "blocks"
    assert "'<|human|>' in 'code'" in told[0]


def test_an_added_token_of_another_id_is_refused():
    made = {"text": words(["<unused0>", "<eom>"]), "code": words(["<eom>"])}
    with pytest.raises(ValueError, match=r"'<eom>' has the id 91 in 'text' and 90 in 'code'"):
        common_tokenizer(made)


def test_blanks_that_only_some_read_as_one_token_cut_text_otherwise():
    with pytest.raises(ValueError, match="splits text differently"):
        common_tokenizer({"text": words(), "code": words(["    "], special=False)})


def test_words_of_a_vocabulary_itself_must_all_be_known():
    with pytest.raises(ValueError, match="uses a different tokenizer from 'text': 3 ids differ, the first is 87"):
        common_tokenizer({"text": tokenizer(90), "code": tokenizer(87)})


def test_of_three_tokenizers_two_that_disagree_are_found():
    made = {"text": words(), "code": words(["<a>"]), "math": words(["<b>"])}
    with pytest.raises(ValueError, match="'<a>' in 'code' and '<b>' in 'math'"):
        common_tokenizer(made)


def test_tokens_of_the_chosen_template_that_the_fused_model_lacks_are_told(tmp_path, lines):
    template = "<think>{{ messages[0]['content'] }}"
    made = {"text": words(), "code": words(["<think>"], chat_template=template)}
    assert common_tokenizer(made, chat_template="code", vocab_size=90).chat_template == template
    [line] = lines()
    assert "template of code holds '<think>'" in line


# ---------------------------------------------------------------------------------- beginnings and ends


@pytest.mark.parametrize("order", [("plain", "begins"), ("begins", "plain")])
def test_a_begin_token_that_only_some_add_is_told(order, tmp_path, lines):
    made = {"plain": tokenizer(), "begins": begins(tokenizer())}
    both = folders(tmp_path, {name: made[name] for name in order})
    UltraFuserForCausalLM.from_specialists(both)
    [line] = lines()
    assert "plain nothing" in line
    assert "begins ['<s>']" in line
    assert f"is that of {order[0]}" in line
    verdict, told = warnings_of(both)
    assert verdict == "warning"
    assert "in front of a text" in told[0]
    ids = common_tokenizer(both)("ab").input_ids
    assert ids == made[order[0]]("ab").input_ids


def test_an_end_token_that_differs_is_told():
    other = tokenizer()
    other.eos_token = "<s>"
    [note] = notes_on({"text": tokenizer(), "code": other})
    assert "text '</s>', code '<s>'; the fused model's is that of text" in note


@pytest.mark.parametrize("blanks", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_an_added_token_that_takes_in_blanks_in_some_only_is_told(blanks):
    plain, other = tokenizer(90), tokenizer(90)
    plain.add_tokens([AddedToken("<x>")])
    other.add_tokens([AddedToken("<x>", **blanks)])
    [note] = notes_on({"text": plain, "code": other})
    assert "whether '<x>' take in blanks" in note
    assert "is that of text" in note


def test_stop_strings_of_all_specialists_end_the_text():
    configs = {
        "text": GenerationConfig(eos_token_id=2, stop_strings=["<|end|>", "END"]),
        "code": GenerationConfig(eos_token_id=2),
        "math": GenerationConfig(eos_token_id=2, stop_strings="END"),
        "law": GenerationConfig(eos_token_id=2, stop_strings="###"),
    }
    assert merged_generation_config(configs, ROWS)[0].stop_strings == ["<|end|>", "END", "###"]
    assert merged_generation_config({"code": configs["code"]}, ROWS)[0].stop_strings is None


def test_an_answer_ends_at_a_stop_string():
    set_seed(0)
    fused = UltraFuserForCausalLM.from_specialists(
        {name: specialist(layers=1, hidden_size=16, eos_token_id=None) for name in ("text", "code")}
    )
    made = tokenizer()
    [(whole, why)] = _generate(fused, made, ["abc"], 8, {"do_sample": False})
    assert (len(whole), why) == (8, "length")
    fused.generation_config.stop_strings = [whole[2:4]]
    [(answer, why)] = _generate(fused, made, ["abc"], 8, {"do_sample": False})
    assert why == "stop"
    assert answer == whole[: whole.index(whole[2:4]) + 2]
