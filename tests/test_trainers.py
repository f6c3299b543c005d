import pytest
from datasets import Dataset

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.tiny import specialist, tokenizer
from tests.training import changed, conversations, weights
from trainers import DomainSampler, GateTrainer, JointTrainer


def domains(sizes):
    return {name: Dataset.from_list(conversations(size)) for name, size in sizes.items()}


def trainer(cls, model, folder, data=None, **settings):
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **settings,
    }
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    data = domains({"text": 8, "code": 6, "math": 9}) if data is None else data
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    arguments = cls.config_class(str(folder), **{**quiet, "examples_per_domain": 2, **settings})
    return cls(model, arguments, data, processing_class=tokenizer(chat_template=template))


@pytest.mark.parametrize("stage", [GateTrainer, JointTrainer])
def test_a_stage_moves_its_own_parameters_and_no_others(stage, fused, tmp_path):
    before = weights(fused)
    trainer(stage, fused, tmp_path).train()
    moved = {".".join(name.split(".")[:2]) for name in changed(fused, before)}
    everything = {"model.fusion_gate", "model.specialists", "lm_head.weight"}
    assert moved == ({"model.fusion_gate"} if stage is GateTrainer else everything)


def test_stage_two_continues_from_stage_one_although_stage_one_froze_the_specialists(fused, tmp_path):
    trainer(GateTrainer, fused, tmp_path).train()
    before = weights(fused)
    trainer(JointTrainer, fused, tmp_path).train()
    assert any(name.startswith("model.specialists") for name in changed(fused, before))


def test_every_batch_holds_the_same_number_of_examples_of_each_domain(fused, tmp_path):
    stage = trainer(GateTrainer, fused, tmp_path, domains({"text": 30, "code": 3, "math": 11}))
    names = stage.train_dataset["domain"]
    draws = [names[i] for i in stage._get_train_sampler()]
    batches = [draws[i : i + 6] for i in range(0, len(draws), 6)]
    assert all(batch.count(d) == 2 for batch in batches for d in ("text", "code", "math"))


def test_a_domain_is_drawn_whole_before_it_repeats_in_another_order():
    sampler = DomainSampler(["a"] * 12 + ["b"] * 4, 4)
    draws = [i for i in sampler if i >= 12]
    assert len(draws) == 8
    assert sorted(draws[:4]) == sorted(draws[4:]) == [12, 13, 14, 15]
    assert draws[:4] != draws[4:]


def test_the_next_epoch_continues_the_stream():
    one, two = DomainSampler(["a"] * 6 + ["b"] * 6, 4), DomainSampler(["a"] * 6 + ["b"] * 6, 4)
    two.set_epoch(1)
    assert sorted(one) == sorted(two) == list(range(12))
    assert list(one) != list(two)


def test_another_seed_gives_another_stream_and_the_same_seed_the_same():
    labels = ["a"] * 20 + ["b"] * 20
    assert list(DomainSampler(labels, 4, seed=0)) == list(DomainSampler(labels, 4, seed=0))
    assert list(DomainSampler(labels, 4, seed=0)) != list(DomainSampler(labels, 4, seed=1))


def test_an_interrupted_stage_ends_where_an_uninterrupted_one_ends(specialists, tmp_path):
    def fuse():
        return UltraFuserForCausalLM.from_specialists(specialists)

    whole, halves = fuse(), fuse()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3}
    trainer(JointTrainer, whole, tmp_path, **settings).train()
    trainer(JointTrainer, halves, tmp_path / "again", **settings).train(str(tmp_path / "checkpoint-3"))
    assert changed(halves, weights(whole)) == set()


def test_data_without_domains_is_refused(fused, tmp_path):
    with pytest.raises(ValueError, match="needs a column 'domain', but its columns are \\['messages'\\]"):
        trainer(GateTrainer, fused, tmp_path, Dataset.from_list(conversations()))


def test_a_gate_without_parameters_is_refused(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, gate="uniform")
    with pytest.raises(ValueError, match="gate='uniform' has no parameters"):
        trainer(GateTrainer, model, tmp_path)


def test_a_single_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got a LlamaForCausalLM"):
        trainer(JointTrainer, specialist(), tmp_path)
