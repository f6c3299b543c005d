"""One model learns from a fused one: losses, draws, factors of domains, resuming, and what comes out."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, set_seed
from trl import DistillationConfig, DistillationTrainer

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE, conversations, weights
from tests.support.fusions import MIXTURES
from tests.support.tiny import specialist, stir_gate, tokenizer
from trainers.distil_checks import student_of
from trainers.distil_config import DistilConfig
from trainers.distil_trainer import DistilTrainer
from trainers.divergences import divergence, token_divergences
from trainers.domain_scale import factors


pytestmark = pytest.mark.e2e


SMALL = {"max_steps": 2, "examples_per_domain": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
PLAIN = {"logging_steps": 1, "gradient_checkpointing": False, "max_completion_length": 5}


def teacher_of(fusion="logits"):
    set_seed(0)
    model = UltraFuserForCausalLM.from_specialists(
        {"text": specialist(), "code": specialist(layers=1)}, gate="mlp", fusion=fusion
    )
    stir_gate(model)
    return model


def rows(number):
    return Dataset.from_list(conversations(number))


def trainer_of(folder, teacher=None, data=None, student=None, **settings):
    teacher = teacher_of() if teacher is None else teacher
    data = {"text": rows(7), "code": rows(5)} if data is None else data
    student = student_of(teacher, "text") if student is None else student
    args = DistilConfig(str(folder), **{**QUIET, **PLAIN, **SMALL, **settings})
    return DistilTrainer(student, teacher, args, data, processing_class=tokenizer(chat_template=CHAT_TEMPLATE))


def logged(trainer):
    return [{k: v for k, v in e.items() if k != "step_time"} for e in trainer.state.log_history if "loss" in e]


# ---- the loss


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        (1.0, 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
    ],
)
def test_the_ends_are_kl_of_the_teacher_and_of_the_student(beta, expected):
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    torch.testing.assert_close(divergence(student, teacher, beta), torch.tensor([expected]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_trls_own_where_it_can_read_the_teacher(beta, tmp_path):
    teacher = teacher_of()
    ours = trainer_of(tmp_path, teacher, beta=beta, off_policy=True, balance_scale=False)
    theirs_args = DistillationConfig(str(tmp_path), beta=beta, **QUIET)
    student = student_of(teacher, "text")
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    prompts = Dataset.from_dict({"prompt": ["a"]})
    theirs = DistillationTrainer(student, teacher, theirs_args, train_dataset=prompts, processing_class=words)
    prompt, answer = torch.randint(3, 99, (3, 4)), torch.randint(3, 99, (3, 6))
    ids, ones = torch.cat([prompt, answer], 1), torch.ones(3, 10, dtype=torch.long)
    items = torch.tensor(18.0)
    trained = torch.arange(10).expand(3, -1) >= 4
    domain = torch.tensor([0, 1, 0])
    batch = {"input_ids": ids, "attention_mask": ones, "trained": trained, "domain": domain}
    its = {"prompt_ids": prompt, "prompt_mask": ones[:, :4], "completion_ids": answer, "completion_mask": ones[:, :6]}
    found = []
    for trainer, inputs in ((ours, batch), (theirs, its)):
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, {**inputs, "num_items_in_batch": items})
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}))
    (loss, gradients), (its_loss, its_gradients) = found
    assert loss > 0.1
    torch.testing.assert_close(loss, its_loss)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, its_gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fusion", MIXTURES)
def test_every_fusion_rule_teaches_what_it_predicts(fusion, tmp_path):
    teacher = teacher_of(fusion)
    trainer = trainer_of(tmp_path, teacher, off_policy=True, beta=0.0, balance_scale=False)
    batch = trainer.completed([trainer.train_dataset[i] for i in (0, 6, 9)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    own, its = (m(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1) for m in (trainer.model, teacher))
    kl = F.kl_div(own, its, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(loss, kl[batch["trained"][:, 1:]].mean())


def test_by_label_each_row_is_compared_with_the_specialist_of_its_domain(tmp_path):
    teacher = teacher_of()
    trainer = trainer_of(tmp_path, teacher, off_policy=True, by_label=True)
    batch = trainer.completed([trainer.train_dataset[i] for i in (0, 9)])
    assert [trainer.drawn[d] for d in batch["domain"]] == ["code", "text"]
    taught = trainer._taught(batch["input_ids"], batch["attention_mask"], batch["domain"], 0)
    for row, name in enumerate(("code", "text")):
        ids, mask = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        expected = teacher.specialist(name).eval()(input_ids=ids, attention_mask=mask).logits[:, :-1]
        torch.testing.assert_close(taught[row : row + 1], expected)


def test_only_the_tokens_of_answers_are_trained_and_padding_is_not(tmp_path):
    trainer = trainer_of(tmp_path, off_policy=True)
    words = trainer.processing_class
    batch = trainer.completed([trainer.train_dataset[i] for i in (0, 1)])
    for ids, trained in zip(batch["input_ids"], batch["trained"], strict=True):
        text, answer = words.decode(ids), words.decode(ids[trained])
        assert answer.startswith("It is ")
        assert answer in text
        assert "<pad>" not in answer
    assert batch["num_items_in_batch"] == batch["trained"].sum()


# ---- domains


def test_factors_are_the_papers():
    rng = np.random.default_rng(0)
    gaps = [rng.normal(1, spread, 500) for spread in (1.0, 2.0, 30.0)]
    sums = np.array([[len(g), 0, g.sum(), (g**2).sum()] for g in gaps])
    pooled = np.concatenate(gaps).std()
    expected = [min(max(pooled / g.std(), 0.25), 4) for g in gaps]
    assert expected[0] == 4
    np.testing.assert_allclose(factors(sums), expected)


def test_factors_are_1_where_nothing_spreads():
    assert factors(np.array([[10, 0, 10, 10], [1, 0, 5, 25], [0, 0, 0, 0], [4, 0, 0, 8.0]])).tolist()[:3] == [1, 1, 1]


def test_a_domain_that_differs_more_is_scaled_down_in_the_next_step(tmp_path):
    trainer = trainer_of(tmp_path, by_label=True, off_policy=True, max_steps=1)
    trainer.train()
    # the student began as the specialist that teaches "text", so that all that differs is code
    code, text = trainer.feedback.factors.tolist()
    assert trainer.drawn == ["code", "text"]
    assert code < 1 <= text


def test_batches_hold_as_many_rows_of_each_domain_and_each_step_is_read_once(tmp_path):
    trainer = trainer_of(tmp_path, data={"text": rows(30), "code": rows(3)}, off_policy=True, max_steps=3)
    seen = []
    completed = trainer.completed
    trainer.completed = lambda rows: (seen.append([row["domain"] for row in rows]), completed(rows))[1]
    trainer.train()
    assert trainer.args.gradient_accumulation_steps == 2
    assert [sorted(names) for names in seen] == [["code", "code", "text", "text"]] * 3
    told = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all({"loss/text", "tokens/code", "scale/code", "epochs/text"} <= entry.keys() for entry in told)
    assert told[-1]["epochs/code"] == 2.0


def test_mixed_examples_are_a_share_of_their_own(tmp_path):
    trainer = trainer_of(tmp_path, off_policy=True, mixed_share=0.5)
    assert trainer.drawn == ["code", "text", "mixed"]
    assert trainer.draws.counts(10).tolist() == [10, 10, 20]


# ---- what moves


def test_on_policy_the_student_writes_after_the_prompts_and_learns_from_them_alone(tmp_path):
    teacher = teacher_of()
    prompts = Dataset.from_dict({"prompt": [f"{i}+{i}?" for i in range(6)]})
    before = weights(teacher)
    settings = {"max_steps": 12, "examples_per_domain": 6, "per_device_train_batch_size": 12}
    trainer = trainer_of(tmp_path, teacher, {"text": prompts, "code": prompts}, beta=0.0, **settings)
    start = weights(trainer.model)
    trainer.train()
    first, last = (np.mean([e["loss"] for e in logged(trainer)[part]]) for part in (slice(3), slice(-3, None)))
    assert last < 0.8 * first
    assert all(t.equal(before[n]) for n, t in teacher.state_dict().items())
    assert any(not t.equal(start[n]) for n, t in trainer.model.state_dict().items())


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(off_policy, tmp_path):
    teacher = teacher_of()
    start = student_of(teacher, "text")
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "off_policy": off_policy}
    whole = trainer_of(tmp_path / "whole", teacher, student=copy.deepcopy(start), **saved)
    whole.train()
    begun = trainer_of(tmp_path / "begun", teacher, student=copy.deepcopy(start), **saved)

    class KilledError(Exception):
        pass

    loss = begun.compute_loss

    def killed(*args, **kwargs):
        if begun.state.global_step == 3:
            raise KilledError
        return loss(*args, **kwargs)

    begun.compute_loss = killed
    with pytest.raises(KilledError):
        begun.train()
    set_seed(123)
    resumed = trainer_of(tmp_path / "begun", teacher, student=copy.deepcopy(start), **saved)
    resumed.train(resume_from_checkpoint=True)
    assert [e["step"] for e in logged(resumed)] == [1, 2, 3, 4, 5]
    assert logged(resumed) == logged(whole)
    assert all(t.equal(whole.model.state_dict()[n]) for n, t in resumed.model.state_dict().items())
    assert not all(t.equal(start.state_dict()[n]) for n, t in resumed.model.state_dict().items())
    # one that had ended stays as it is
    again = trainer_of(tmp_path / "begun", teacher, student=copy.deepcopy(start), **saved)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    with pytest.raises(ValueError, match="off_policy is"):
        trainer_of(tmp_path / "begun", teacher, **{**saved, "off_policy": not off_policy}).train(True)


def test_a_specialist_as_student_shares_nothing_and_predicts_the_same():
    teacher = teacher_of()
    student, ids = student_of(teacher, "code"), torch.arange(3, 30)[None]
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    torch.testing.assert_close(student(ids).logits, teacher.specialist("code")(ids).logits)


def test_a_student_of_another_shape_learns_and_is_saved_as_a_stock_folder(tmp_path):
    student = specialist("qwen2", layers=1, hidden_size=16)
    trainer = trainer_of(tmp_path / "run", student=student, off_policy=True, max_steps=1)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=False)
    assert type(loaded).__module__.startswith("transformers.models.qwen2")


# ---- rows


def one_row(row, tmp_path, **settings):
    return trainer_of(tmp_path, data={"text": Dataset.from_list([row] * 2), "code": rows(3)}, **settings)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "1+1?", "completion": "2"}, "1+1?", "2</s>"),
        ({"text": "abcdef"}, "abc", "def</s>"),
        (conversations(2)[1], "<user>1+1?\n<assistant>", "It is 2. It is 2. \n"),
        ({"input_ids": [10, 11, 12], "labels": [-100, 11, 12]}, "&", "'("),
        ({"input_ids": [10, 11, 12, 13]}, "&'(", ")"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "<user>a\n<assistant>",
            "b\n",
        ),
    ],
)
def test_rows_of_every_form_are_a_prompt_and_an_answer(row, prompt, answer, tmp_path):
    read = one_row(row, tmp_path, off_policy=True, prompt_tokens=3)
    found = next(r for r in read.train_dataset if r["domain"] == "text")
    words = read.processing_class
    trained = [i for i in found["labels"] if i != -100]
    assert words.decode(found["input_ids"]) == prompt + answer
    assert words.decode(trained) == answer
    on_policy = one_row(row, tmp_path, prompt_tokens=3)
    found = next(r for r in on_policy.train_dataset if r["domain"] == "text")
    assert words.decode(found["input_ids"]) == prompt


def test_rows_with_too_long_prompts_are_left_out_and_counted(tmp_path, caplog):
    data = {"text": Dataset.from_dict({"prompt": ["a" * 4, "b" * 40]}), "code": rows(3)}
    trainer = trainer_of(tmp_path, data=data, max_length=30)
    assert [r["domain"] for r in trainer.train_dataset].count("text") == 1
    assert "Of 2 rows of domain 'text', 1 are left out" in caplog.text


# ---- what is rejected


@pytest.mark.parametrize(
    ("row", "settings", "fault"),
    [
        ({"question": "a"}, {}, "domain 'text' have \\['question'\\]"),
        ({"prompt": "a"}, {"off_policy": True}, "prompts alone"),
        ({"prompt": ""}, {}, "Row 1 of domain 'text' has an empty prompt"),
        ({"input_ids": [3, 200]}, {}, "the id 200"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, "no prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"off_policy": True}, "no answer"),
        ({"prompt": "a" * 99}, {"max_length": 50}, "none of the 2 rows"),
    ],
)
def test_rows_that_cannot_teach_are_refused_by_name(row, settings, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        one_row(row, tmp_path, **settings)


@pytest.mark.parametrize(
    ("student", "fault"),
    [
        (lambda teacher: specialist(vocab_size=80), "80 rows, and the teacher's has 99"),
        (lambda teacher: teacher, "The student is a fused model"),
        (lambda teacher: teacher.specialist("text"), "tensors of the student are the teacher's own"),
    ],
)
def test_students_that_cannot_learn_are_refused(student, fault, tmp_path):
    teacher = teacher_of()
    with pytest.raises(ValueError, match=fault):
        trainer_of(tmp_path, teacher, student=student(teacher))


def test_labels_need_a_specialist_for_each_domain(tmp_path):
    with pytest.raises(ValueError, match="domains are \\['law'\\]"):
        trainer_of(tmp_path, data={"law": rows(3)}, by_label=True)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"mixed_share": 0.5}, "without off_policy=True"),
        ({"mixed_share": 1.5, "off_policy": True}, "at least 0 and below 1"),
        ({"beta": 2.0}, "beta"),
        ({"max_length": 1}, "at least 2"),
        ({"prompt_tokens": 0}, "at least 1"),
        ({"by_label": "perhaps"}, "by_label"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"push_to_hub": True}, "push_to_hub"),
    ],
)
def test_settings_out_of_range_are_refused(settings, fault, tmp_path):
    with pytest.raises(ValueError, match=fault):
        DistilConfig(str(tmp_path), **{**QUIET, **settings})


def test_gradients_flow_to_the_student_alone():
    own, its = (torch.randn(5, 7, requires_grad=True) for _ in "ab")
    losses, gaps, entropies = token_divergences(own, its.detach(), torch.arange(5), beta=1.0)
    assert losses.requires_grad
    assert not gaps.requires_grad
    assert not entropies.requires_grad
    expected = its.log_softmax(-1).diagonal() - own.log_softmax(-1).diagonal()
    torch.testing.assert_close(gaps, expected.detach()[:5])
