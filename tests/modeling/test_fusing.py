"""From folders and models to one fused model: what is cut, scaled, merged, copied and freed on the way."""

import logging
import re
import shutil
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    set_seed,
)

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from tests.support.checkpoints import gemma3, inkling, llava, save, small
from tests.support.fusions import MIXTURES
from tests.support.tiny import specialist, tokenizer


IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two specialists that agree on everything, in folders."""
    set_seed(0)
    return {name: save(small(), tmp_path_factory.mktemp(name)) for name in ("text", "code")}


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines that fusing printed."""
    for name in ("transformers_modules", "modeling_ultrafuser"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("modeling_ultrafuser")]


fuse = UltraFuserForCausalLM.from_specialists


@torch.no_grad()
def assert_says_what_it_should(fused, models, rows=99, rtol=1e-4, atol=1e-5):
    """A fresh gate weighs all alike, so the fused logits are the plain average."""
    average = sum(m(input_ids=IDS).logits[..., :rows].float() for m in models) / len(models)
    torch.testing.assert_close(fused(IDS).logits.float(), average, rtol=rtol, atol=atol)


def loaded(*folders):
    return [AutoModelForCausalLM.from_pretrained(f) for f in folders]


# ---------------------------------------------------------------------------------- folders


def test_folders_are_fused_into_their_average_and_ready_for_use(two):
    fused = fuse(two)
    assert not fused.training
    assert fused.config.specialist_names == ["text", "code"]
    assert_says_what_it_should(fused, loaded(*two.values()))


def test_a_path_may_be_a_string(two):
    assert_says_what_it_should(fuse({n: str(f) for n, f in two.items()}), loaded(*two.values()))


def test_the_order_of_specialists_is_the_order_given(two):
    fused = fuse({"zeta": two["text"], "alpha": two["code"]})
    assert fused.config.specialist_names == list(fused.model.specialists) == ["zeta", "alpha"]
    first = loaded(two["text"])[0].model.embed_tokens.weight
    assert torch.equal(fused.model.specialists["zeta"].embed_tokens.weight, first)


def test_a_folder_without_a_tokenizer_is_fused_with_a_line(two, lines, tmp_path):
    small().save_pretrained(tmp_path)
    fuse({"text": two["text"], "bare": tmp_path})
    assert [line for line in lines() if re.search("bare: .* no tokenizer", line)]


def test_the_choice_of_attention_reaches_every_specialist(two):
    fused = fuse(two, attn_implementation="eager")
    assert {m.config._attn_implementation for m in fused.model.specialists.values()} == {"eager"}


def test_a_device_map_places_the_fused_model(two):
    fused = fuse(two, device_map={"model": "cpu", "lm_head": "meta"})
    assert fused.hf_device_map == {"model": "cpu", "lm_head": "meta"}


def test_revisions_choose_among_the_commits_of_a_repository(two, tmp_path):
    repository = tmp_path / "models--lab--code"
    for commit, revision, folder in (("a" * 40, "main", two["text"]), ("b" * 40, "v1", two["code"])):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    new, old = loaded(two["text"], two["code"])
    same = {"text": two["text"], "code": "lab/code"}
    assert_says_what_it_should(fuse(same, cache_dir=tmp_path), [new, new])
    for revision in ("v1", "b" * 40):
        assert_says_what_it_should(fuse(same, cache_dir=tmp_path, revisions={"code": revision}), [new, old])
    assert common_tokenizer(same, cache_dir=tmp_path, revisions={"code": "v1"}).get_vocab() == tokenizer().get_vocab()
    with pytest.raises(OSError, match="'lab/code' .revision 'v2'"):
        fuse(same, cache_dir=tmp_path, revisions={"code": "v2"})


# ---------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_rows_beyond_the_smallest_vocabulary_are_cut_with_a_line(tied, two, lines, tmp_path):
    save(small(vocab_size=104, tied=tied), tmp_path / "wide")
    fused = fuse({"text": two["text"], "wide": tmp_path / "wide"})
    assert [line for line in lines() if "104" in line] == [
        "wide: 104 vocabulary rows cut to 99, the smallest vocabulary among the specialists; "
        "the 5 rows beyond it are dropped."
    ]
    assert fused.config.vocab_size == fused.config.wide.vocab_size == 99
    assert fused.lm_head.weight.shape[0] == fused.model.specialists["wide"].embed_tokens.weight.shape[0] == 99
    assert_says_what_it_should(fused, loaded(two["text"], tmp_path / "wide"))
    fused.save_pretrained(tmp_path / "fused")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(IDS).logits, fused(IDS).logits)


def test_nothing_is_cut_and_nothing_said_when_vocabularies_are_equal(two, lines):
    fuse(two)
    assert lines() == []


def test_a_padding_id_beyond_the_vocabulary_is_dropped(two, tmp_path):
    wide = small(vocab_size=104)
    wide.config.pad_token_id = wide.generation_config.pad_token_id = 103
    save(wide, tmp_path)
    fused = fuse({"wide": tmp_path, "text": two["text"]})
    assert fused.config.wide.pad_token_id is None
    assert fused.config.pad_token_id == fused.generation_config.pad_token_id == 0
    assert_says_what_it_should(fused, loaded(tmp_path, two["text"]))


def test_a_begin_id_beyond_the_vocabulary_is_dropped(two, tmp_path):
    wide = small(vocab_size=104)
    wide.generation_config.bos_token_id = 103
    save(wide, tmp_path)
    assert fuse({"wide": tmp_path, "text": two["text"]}).generation_config.bos_token_id == 1


@pytest.mark.parametrize("eos", [103, [2, 103]])
def test_an_end_id_beyond_the_vocabulary_is_refused_before_loading(eos, two, tmp_path, monkeypatch):
    wide = small(vocab_size=104)
    wide.generation_config.eos_token_id = eos
    save(wide, tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("about to load"))
    with pytest.raises(ValueError, match=r"nd-of-text ids lie beyond .* 99 tokens: \{'wide': \[103\]\}"):
        fuse({"text": two["text"], "wide": tmp_path})


def test_tokenizers_that_all_reach_beyond_the_vocabulary_are_refused(tmp_path):
    both = {name: save(small(vocab_size=97), tmp_path / name) for name in ("text", "code")}
    for refuse in (lambda: fuse(both), lambda: common_tokenizer(both, vocab_size=97)):
        with pytest.raises(ValueError, match=r"tokenizer can produce tokens beyond .* 97 rows.*'}', '~'"):
            refuse()


def test_the_tokenizer_that_fits_the_vocabulary_is_taken(tmp_path):
    wide = save(small(vocab_size=99), tmp_path / "wide")
    narrow = save(small(vocab_size=97), tmp_path / "narrow", tokenizer(97))
    both = {"wide": wide, "narrow": narrow}
    assert fuse(both).config.vocab_size == 97
    assert len(common_tokenizer(both, vocab_size=97)) == 97


# ---------------------------------------------------------------------------------- dtype


def test_the_common_dtype_is_kept(tmp_path):
    both = {name: save(small().bfloat16(), tmp_path / name) for name in ("text", "code")}
    fused = fuse(both)
    assert dtypes(fused) == {torch.bfloat16}
    assert fused.config.dtype == torch.bfloat16
    assert_says_what_it_should(fused, loaded(*both.values()), rtol=2e-2, atol=2e-2)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64])
def test_a_chosen_dtype_is_taken(dtype, two):
    assert dtypes(fuse(two, dtype=dtype)) == {getattr(torch, str(dtype).removeprefix("torch."))}


def test_a_model_in_memory_is_fused_in_the_dtype_that_it_has(two):
    models = dict(zip(two, [m.bfloat16() for m in loaded(*two.values())], strict=True))
    assert models["text"].config.dtype == torch.float32
    assert dtypes(fuse(models)) == {torch.bfloat16}
    with pytest.raises(ValueError, match="'text': torch.bfloat16, 'code': torch.float32.*one dtype"):
        fuse({"text": models["text"], "code": two["code"]})


def dtypes(fused):
    assert {p.dtype for p in fused.model.fusion_gate.parameters()} == {torch.float32}
    return {p.dtype for name, p in fused.named_parameters() if "fusion_gate" not in name}


# ---------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_models_in_memory_are_copied(dtype):
    models = {"text": small(), "code": small(tied=True)}
    before = {name: {k: t.clone() for k, t in m.state_dict().items()} for name, m in models.items()}
    configs = {name: m.config.to_dict() for name, m in models.items()}
    fused = fuse(models, dtype=dtype)
    with torch.no_grad():
        for tensor in fused.state_dict().values():
            tensor.add_(1)
    fused.generation_config.eos_token_id = 7
    fused.config.text.rms_norm_eps = 7.0
    for name, model in models.items():
        assert model.config.to_dict() == configs[name]
        assert model.generation_config.eos_token_id == 2
        assert all(torch.equal(t, before[name][k]) for k, t in model.state_dict().items())
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_in_memory_keeps_its_mode(two):
    models = dict(zip(two, loaded(*two.values()), strict=True))
    models["text"].train()
    fused = fuse(models)
    assert models["text"].training
    assert not models["code"].training
    assert not any(m.training for m in fused.modules())


def test_specialists_are_loaded_one_at_a_time(two, tmp_path, monkeypatch):
    load, alive = AutoModelForCausalLM.from_pretrained, []

    def load_after_the_last_is_gone(*args, **kwargs):
        assert [ref() for ref in alive] == [None] * len(alive)
        model = load(*args, **kwargs)
        alive.extend([weakref.ref(model), weakref.ref(model.lm_head.weight)])
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_after_the_last_is_gone)
    fused = fuse(two | {"math": save(small(), tmp_path)})
    assert len(alive) == 6
    assert [ref() for ref in alive] == [None] * 6
    assert len(fused.config.specialists) == 3


# ---------------------------------------------------------------------------------- between backbone and logits


SCALED = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("rows", [99, 97])
def test_states_that_are_divided_and_rows_that_pad_a_vocabulary_are_made_even(rows, two, lines, tmp_path):
    padded = inkling(logits_mup_width_multiplier=3.0, vocab_size=104, unpadded_vocab_size=rows)
    # without a tokenizer, which would know more than 97 tokens
    plain = small()
    fused = fuse({"text": plain, "padded": padded})
    assert fused.config.vocab_size == rows
    assert any(f"padded: 104 vocabulary rows cut to {rows}" in line for line in lines())
    assert_says_what_it_should(fused, [plain, padded], rows)
    alone = fused.specialist("padded")
    torch.testing.assert_close(alone(IDS).logits, padded(IDS).logits, rtol=1e-4, atol=1e-5)
    fused.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, fused(IDS).logits)


@pytest.mark.grid
@pytest.mark.parametrize("fusion", MIXTURES)
@pytest.mark.parametrize("family", SCALED)
def test_a_scale_on_the_logits_is_folded_into_the_head(family, fusion, two):
    scaled, plain = specialist(family, layers=1, hidden_size=16, **SCALED[family]), loaded(two["text"])[0]
    fused = fuse({"text": two["text"], "scaled": scaled}, fusion=fusion)
    (field,) = SCALED[family]
    assert getattr(fused.config.scaled, field) == 1
    assert getattr(scaled.config, field) == SCALED[family][field]
    with torch.no_grad():
        alone = fused.specialist("scaled")(IDS).logits
        torch.testing.assert_close(alone, scaled(IDS).logits, rtol=1e-4, atol=1e-5)
        logits = torch.stack([m(IDS).logits for m in (plain, scaled)])
        average = logits.mean(0) if fusion == "logits" else logits.softmax(-1).mean(0).log()
        torch.testing.assert_close(fused(IDS).logits, average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [gemma3, llava])
def test_the_text_part_of_a_multimodal_checkpoint_is_taken(build, two, tmp_path):
    multimodal, plain = build(), loaded(two["text"])[0]
    save(multimodal, tmp_path)
    for other in (tmp_path, multimodal):
        fused = fuse({"text": two["text"], "seer": other})
        assert fused.config.seer.model_type == multimodal.config.text_config.model_type
        assert not [name for name in fused.state_dict() if "vision" in name]
        assert_says_what_it_should(fused, [plain, multimodal])


# ---------------------------------------------------------------------------------- generation


def with_generation(folder, **fields):
    model = small()
    model.generation_config = GenerationConfig(**{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | fields)
    return save(model, folder)


def test_any_specialists_end_of_text_ends_the_text(tmp_path):
    ends = {"text": 2, "code": [5, 2], "math": 4, "law": None}
    folders = {name: with_generation(tmp_path / name, eos_token_id=eos) for name, eos in ends.items()}
    fused = fuse(folders)
    assert sorted(fused.generation_config.eos_token_id) == [2, 4, 5]
    assert sorted(fused.config.eos_token_id) == [2, 4, 5]


def test_generation_settings_on_which_all_agree_are_kept(tmp_path, lines):
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
    fused = fuse({name: with_generation(tmp_path / name, **settings) for name in ("text", "code")})
    assert settings.items() <= fused.generation_config.to_dict().items()
    assert lines() == []


def test_generation_settings_that_conflict_are_dropped_with_a_line(tmp_path, lines):
    fused = fuse(
        {
            "text": with_generation(tmp_path / "text", do_sample=True, temperature=0.7, repetition_penalty=1.1),
            "code": with_generation(tmp_path / "code", do_sample=True, temperature=0.3, repetition_penalty=1.1),
        }
    )
    assert fused.generation_config.temperature in (None, GenerationConfig().temperature)
    assert fused.generation_config.repetition_penalty == 1.1
    assert fused.generation_config.do_sample
    assert lines() == [
        "Generation setting `temperature` is dropped, because specialists disagree on it: {'text': 0.7, 'code': 0.3}."
    ]


def test_sampling_settings_without_sampling_are_dropped_so_that_the_model_can_be_saved(two, tmp_path, lines):
    sampling = with_generation(tmp_path / "sampling", do_sample=True, temperature=0.7, top_k=20)
    fused = fuse({"text": two["text"], "sampling": sampling})
    told = [re.search("`(.*?)` is dropped", line)[1] for line in lines()]
    assert sorted(told) == ["do_sample", "temperature", "top_k"]
    assert not fused.generation_config.do_sample
    fused.save_pretrained(tmp_path / "fused")
    again = GenerationConfig.from_pretrained(tmp_path / "fused").to_diff_dict()
    assert not {"do_sample", "temperature", "top_k"} & set(again)
    assert fused.generate(IDS[:1], max_new_tokens=2).shape[1] > IDS.shape[1]


def test_a_model_without_generation_settings_of_its_own_takes_those_of_its_configuration(two, tmp_path):
    save(small(), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    fused = fuse({"text": two["text"], "bare": tmp_path})
    assert (fused.generation_config.eos_token_id, fused.generation_config.pad_token_id) == (2, 0)


# ---------------------------------------------------------------------------------- one tokenizer


A, B = "{{ messages[0]['content'] }}", "A: {{ messages[0]['content'] }}"


def test_one_chat_template_is_taken_where_all_agree(two):
    words = common_tokenizer({"text": tokenizer(chat_template=A), "code": tokenizer(chat_template=A)})
    assert words.chat_template == A
    assert common_tokenizer(two).chat_template is None
    assert common_tokenizer(two).get_vocab() == AutoTokenizer.from_pretrained(two["text"]).get_vocab()


def test_chat_templates_that_differ_need_a_choice():
    words = {"text": tokenizer(), "code": tokenizer(chat_template=A), "math": tokenizer(chat_template=B)}
    with pytest.raises(ValueError, match=r"chat templates differ .\['code', 'math'\] have one.*chat_template='code'"):
        common_tokenizer(words)
    for name, template in (("text", None), ("code", A), ("math", B)):
        assert common_tokenizer(words, chat_template=name).chat_template == template
    assert words["text"].chat_template is None


def test_a_choice_of_template_must_name_a_specialist():
    words = {"text": tokenizer(), "code": tokenizer(chat_template=A)}
    with pytest.raises(ValueError, match=r"'law'.*one of \['text', 'code'\]"):
        common_tokenizer(words, chat_template="law")


def test_a_common_tokenizer_needs_a_tokenizer_from_each(two, tmp_path):
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\['bare'\] have no tokenizer"):
        common_tokenizer({"text": two["text"], "bare": tmp_path})


def test_different_tokenizers_have_nothing_in_common():
    with pytest.raises(ValueError, match="2 ids differ"):
        common_tokenizer({"text": tokenizer(), "code": tokenizer(swap="xy")})
