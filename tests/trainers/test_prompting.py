"""Every specialist reads the prompt in its own template, and all share one response."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import changed, weights
from tests.support.mixes import MIXES, fuse, prefer
from tests.support.tiny import tokenizer
from trainers.prompt_views import ViewCollator, prompt_views


NAMES = ["text", "code", "math"]
# the paper's three, shortened
TEMPLATES = {
    "text": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Assistant:",
    "code": "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
    "math": "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:{% endif %}",
}
ALIKE = dict.fromkeys(NAMES, TEMPLATES["text"])
QUESTIONS = ["2+2?", "Say something longer than that.", "Why?"]
ANSWERS = ["It is 4.", "Yes", "Because it is so."]
ROWS = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + ALIKE["text"]
)
ONLY_USER = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def specialists():
    return MIXES["one family"]()


@pytest.fixture
def fused(specialists):
    return fuse(specialists)


def views(prompts=QUESTIONS, responses=None, templates=TEMPLATES, **options):
    return prompt_views(
        prompts, responses, tokenizer=tokenizer(), templates=templates, specialist_names=NAMES, **options
    )


def collator(templates=TEMPLATES, **options):
    return ViewCollator(tokenizer(), templates, NAMES, **options)


def told(batch, row, k):
    """What one specialist reads of one row, as text."""
    return tokenizer().decode(batch["specialist_input_ids"][row, k][batch["specialist_attention_mask"][row, k] == 1])


def learned(batch, row):
    return tokenizer().decode(batch["labels"][row][batch["labels"][row] != -100])


# ---------------------------------------------------------------------------------------------- what is rendered


def test_each_view_is_the_specialists_own_rendering_and_then_the_shared_response():
    batch = views(responses=ANSWERS)
    assert [told(batch, 0, k) for k in range(3)] == [
        "user: 2+2?\nAssistant:It is 4.</s>",
        "<s>[INST] 2+2? [/INST]It is 4.</s>",
        "### user:\n2+2?\n\n### Response:It is 4.</s>",
    ]


def test_a_token_of_the_response_has_one_position_in_all_views_and_only_it_is_learned():
    batch = views(responses=ANSWERS)
    trained = batch["labels"] != -100
    for k in range(3):
        assert torch.equal(batch["specialist_input_ids"][:, k][trained], batch["labels"][trained])
    assert [learned(batch, row) for row in range(3)] == [answer + "</s>" for answer in ANSWERS]


def test_padding_is_on_the_left_and_the_ordinary_input_is_the_first_view():
    batch = views(responses=ANSWERS)
    masks = batch["specialist_attention_mask"]
    assert (masks.diff(dim=-1) >= 0).all()
    assert masks[..., -1].all()
    assert (batch["specialist_input_ids"][masks == 0] == 0).all()
    assert torch.equal(batch["input_ids"], batch["specialist_input_ids"][:, 0])
    assert torch.equal(batch["attention_mask"], masks[:, 0])
    assert masks.shape[-1] == masks.sum(-1).max()


def test_views_come_in_the_models_order_whatever_the_order_of_the_templates():
    turned = {name: TEMPLATES[name] for name in reversed(NAMES)}
    assert torch.equal(views(templates=turned)["specialist_input_ids"], views()["specialist_input_ids"])


def test_a_response_that_ends_itself_is_not_ended_twice():
    assert learned(views(["2+2?"], ["4</s>"]), 0) == "4</s>"


def test_a_tokenizer_without_padding_pads_with_what_the_mask_hides():
    bare = tokenizer()
    bare.pad_token = None
    batch = prompt_views(QUESTIONS, tokenizer=bare, templates=TEMPLATES, specialist_names=NAMES)
    assert (batch["specialist_input_ids"][batch["specialist_attention_mask"] == 0] == bare.eos_token_id).all()


def test_a_view_that_is_too_long_loses_the_beginning_of_its_prompt_but_not_the_token_that_begins_texts():
    batch = views(["a long question"], ["4"], max_length=12)
    assert [told(batch, 0, k) for k in range(3)] == ["Assistant:4</s>", "<s>n [/INST]4</s>", " Response:4</s>"]
    assert told(views(["a long question"], max_length=9), 0, 1) == "<s> [/INST]"


@pytest.mark.parametrize(("max_length", "rest"), [(6, "It is"), (12, "It is four.")])
def test_a_response_that_is_too_long_alone_is_cut_at_its_end_and_that_is_said(max_length, rest):
    with pytest.warns(UserWarning, match=f"Responses are cut at their end, because max_length={max_length}"):
        batch = collator(max_length=max_length)([{"prompt": "2+2?", "completion": "It is four."}])
    assert [told(batch, 0, k) for k in range(3)] == [":" + rest, "]" + rest, ":" + rest]
    assert learned(batch, 0) == rest


# ---------------------------------------------------------------------------------------------- rows


USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "2+2?", "completion": "4"},
        {"messages": None, "prompt": "2+2?", "completion": [ASSISTANT]},
    ],
    ids=["messages", "prompt and completion", "text", "columns of several kinds"],
)
def test_every_form_of_row_gives_the_same_batch(row):
    batch, expected = collator()([row]), views(["2+2?"], ["4"])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert batch.keys() == expected.keys()


def test_earlier_turns_belong_to_the_prompt():
    batch = collator()(
        [{"messages": [USER, ASSISTANT, {"role": "user", "content": "3+3?"}, {**ASSISTANT, "content": "6"}]}]
    )
    assert told(batch, 0, 1) == "<s>[INST] 2+2? [/INST] 4</s>[INST] 3+3? [/INST]6</s>"
    assert learned(batch, 0) == "6</s>"


def test_domains_are_handed_on():
    assert collator()([{**row, "domain": "text"} for row in ROWS])["domain"] == ["text"] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER]}, "ends with 'user' and '2\\+2\\?'. Drop what comes after"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "ends with 'assistant' and None"),
        ({"prompt": "2+2?", "completion": " \n"}, "ends with 'assistant' and ' "),
        ({"messages": [ASSISTANT]}, "this one begins with it: '4'"),
        ({"instruction": "2+2?", "output": "4"}, "has only \\['instruction', 'output'\\]. Rename"),
        ({"prompt": "2+2?", "completion": ""}, "has only \\['prompt'\\]"),
    ],
)
def test_a_row_without_prompt_or_response_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        collator()([row])


@pytest.mark.parametrize(
    ("templates", "error", "message"),
    [
        ({"text": "a", "code": "b"}, ValueError, r"\['math'\] have none"),
        ({**TEMPLATES, "math": None}, ValueError, r"\['math'\] have none"),
        ({**TEMPLATES, "maths": "a"}, ValueError, r"templates for \['maths'\], which are no specialists"),
        ({**TEMPLATES, "math": {"default": "a"}}, TypeError, r"got {'math': 'dict'}.*choose one"),
    ],
)
def test_templates_that_are_not_one_per_specialist_are_refused(templates, error, message):
    with pytest.raises(error, match=message):
        collator(templates)
    with pytest.raises(error, match=message):
        views(templates=templates)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM, r"specialist 'code' cannot render the roles \['system', 'user'\]: No system role. Put that text"),
        (ONLY_USER, "specialist 'code' leaves out the system message 'Be brief.'. Put that text"),
        ("{% for m in messages %}", "specialist 'code' cannot render"),
        ("{{ 1 + messages[0]['content'] }}", "specialist 'code' cannot render"),
    ],
)
def test_a_template_that_cannot_render_what_was_said_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        views([[{"role": "system", "content": "Be brief."}, USER]], templates={**TEMPLATES, "code": template})


def test_a_template_may_leave_out_an_earlier_response():
    views([[USER, ASSISTANT, USER]], templates={**TEMPLATES, "code": ONLY_USER})


@pytest.mark.parametrize("prompts", ["2+2?", [USER], [[]], [7]], ids=["text", "messages", "nothing", "number"])
def test_prompts_of_another_form_are_refused(prompts):
    with pytest.raises(TypeError, match=r"Pass \[prompt\]|Several prompts are a list"):
        views(prompts)


def test_responses_that_are_not_one_per_prompt_are_refused():
    with pytest.raises(ValueError, match="got 3 prompts, 1 responses"):
        views(responses=["4"])


def test_a_tokenizer_without_an_end_of_text_cannot_end_a_response():
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has none. Set its `eos_token`"):
        prompt_views(QUESTIONS, ANSWERS, tokenizer=bare, templates=TEMPLATES, specialist_names=NAMES)


def test_a_length_without_room_for_prompt_and_response_is_refused():
    with pytest.raises(ValueError, match="2 or more, but got 1"):
        views(max_length=1)


# ---------------------------------------------------------------------------------------------- the model


def alone(batch, row, k):
    """One specialist's view of one row, without padding. Shape (1, seq)."""
    return batch["specialist_input_ids"][row, k][batch["specialist_attention_mask"][row, k] == 1][None]


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_templates_that_are_all_alike_give_what_the_ordinary_input_gives(fused):
    batch = views(responses=ANSWERS, templates=ALIKE)
    outputs = fused(**batch)
    losses = []
    for row in range(3):
        ids = alone(batch, row, 0)
        plain = fused(ids).logits[0]
        close(outputs.logits[row, -len(plain) :], plain)
        response = len(ANSWERS[row]) + 1
        losses.append(-plain.log_softmax(-1)[-response - 1 : -1].gather(-1, ids[0, -response:, None]))
    close(outputs.loss, torch.cat(losses).mean())


@pytest.mark.grid
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_gate_that_listens_to_one_specialist_says_what_it_says_to_its_own_prompt(name, specialists):
    fused, k = fuse(specialists, gate="constant"), NAMES.index(name)
    prefer(fused, name)
    batch = views(responses=ANSWERS)
    logits = fused(**batch).logits
    for row in range(3):
        own = specialists[name](alone(batch, row, k)).logits[0]
        # from the token that predicts the response's first on
        positions = len(ANSWERS[row]) + 2
        close(logits[row, -positions:], own[-positions:])


@torch.no_grad()
def test_a_batch_gives_every_row_what_it_gets_alone(fused):
    together = fused(**views(responses=ANSWERS)).logits
    for row in range(3):
        batch = views(QUESTIONS[row : row + 1], ANSWERS[row : row + 1])
        positions = len(ANSWERS[row]) + 2
        close(together[row, -positions:], fused(**batch).logits[0, -positions:])


@torch.no_grad()
def test_the_loss_is_that_of_the_response_whatever_the_prompts_tokens_are_worth(fused):
    batch = views(responses=ANSWERS)
    outputs = fused(**batch)
    losses = [
        -outputs.logits[row, at - 1].log_softmax(-1)[batch["labels"][row, at]]
        for row in range(3)
        for at in range(batch["labels"].shape[1] - len(ANSWERS[row]) - 1, batch["labels"].shape[1])
    ]
    assert len(losses) == sum(map(len, ANSWERS)) + 3
    close(outputs.loss, torch.stack(losses).mean())


@torch.no_grad()
def test_generation_takes_at_every_step_the_best_token_of_the_views_so_far(fused):
    inputs = views()
    text = fused.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ids, masks = inputs["specialist_input_ids"], inputs["specialist_attention_mask"]
    for step in range(5):
        logits = fused(ids[:, 0], specialist_input_ids=ids, specialist_attention_mask=masks).logits[:, -1]
        best = logits.argmax(-1)
        assert torch.equal(text[:, step], best)
        ids = torch.cat([ids, best[:, None, None].expand(-1, 3, 1)], dim=-1)
        masks = torch.cat([masks, torch.ones_like(ids[..., :1])], dim=-1)


@pytest.mark.grid
@pytest.mark.parametrize("name", NAMES)
def test_a_gate_that_listens_to_one_specialist_generates_what_it_generates_from_its_own_prompt(name, specialists):
    fused, k = fuse(specialists, gate="constant"), NAMES.index(name)
    prefer(fused, name)
    inputs = views()
    text = fused.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row in range(3):
        ids = alone(inputs, row, k)
        own = fused.specialist(name).generate(ids, max_new_tokens=6, do_sample=False)
        assert text[row].tolist() == own[0, ids.shape[1] :].tolist()


# ---------------------------------------------------------------------------------------------- trainers


QUIET = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
QUIET |= {"per_device_train_batch_size": 3, "learning_rate": 0.0, "remove_unused_columns": False, "disable_tqdm": True}


@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_a_trainer_prints_the_loss_of_the_views(library, fused, tmp_path):
    with torch.no_grad():
        expected = fused(**views(responses=ANSWERS)).loss.item()
    if library == "trl":
        settings = {**QUIET, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        cls, arguments = SFTTrainer, SFTConfig(str(tmp_path), **settings)
    else:
        cls, arguments = Trainer, TrainingArguments(str(tmp_path), **QUIET)
    own = {"processing_class": tokenizer(chat_template=ALIKE["text"]), "data_collator": collator()}
    trainer = cls(model=fused, args=arguments, train_dataset=Dataset.from_list(ROWS), **own)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([expected, expected], rel=1e-3)


def test_training_on_views_teaches_the_response(specialists, tmp_path):
    fused = UltraFuserForCausalLM.from_specialists(specialists)
    before, batch = weights(fused), views(responses=ANSWERS)
    first = fused(**batch).loss.item()
    arguments = TrainingArguments(str(tmp_path), **{**QUIET, "learning_rate": 1e-2, "max_steps": 8})
    own = {"train_dataset": Dataset.from_list(ROWS), "data_collator": collator()}
    Trainer(model=fused, args=arguments, **own).train()
    assert fused.eval()(**batch).loss.item() < first / 2
    assert changed(fused, before)
