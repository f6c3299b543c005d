"""How transformers generates and serves, on which our own stands."""

import inspect
import re

import pytest
from transformers import (
    CompileConfig,
    LlamaForCausalLM,
)
from transformers.generation import logits_process
from transformers.generation.continuous_batching import ContinuousBatchingManager

from tests.support.llamas import IDS, llama


class Drafted(LlamaForCausalLM):
    """Notes how drafts are asked for."""

    def _get_candidate_generator(self, *, input_ids, model_kwargs, **kwargs):
        generator = super()._get_candidate_generator(input_ids=input_ids, model_kwargs=model_kwargs, **kwargs)
        draft = generator.get_candidates

        def get_candidates(input_ids, *args, **kwargs):
            candidates, logits = draft(input_ids, *args, **kwargs)
            self.drafts.append(candidates.shape[1] - input_ids.shape[1])
            return candidates[:, : input_ids.shape[1]], None

        self.drafts, generator.get_candidates = [], get_candidates
        return generator


def test_generate_asks_get_candidate_generator_and_takes_shorter_drafts():
    plain = llama().generate(IDS, max_new_tokens=4, do_sample=False)
    model = llama(Drafted)
    drafted = model.generate(IDS, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)
    assert max(model.drafts) > 0
    assert drafted.tolist() == plain.tolist()


def test_generate_refuses_drafts_where_is_stateful_is_true():
    class Recurrent(LlamaForCausalLM):
        _is_stateful = True

    with pytest.raises(ValueError, match="stateful"):
        llama(Recurrent).generate(IDS, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_a_custom_generate_is_called_with_what_extract_generation_mode_kwargs_returns():
    class Handed(LlamaForCausalLM):
        def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
            extracted = super()._extract_generation_mode_kwargs(
                custom_generate, kwargs, synced_gpus, assistant_model, streamer
            )
            self.without = dict(extracted)
            return extracted | {"streamer": "heard"}

    def custom(model, input_ids, streamer=None, **kwargs):
        return streamer

    model = llama(Handed)
    assert model.generate(IDS, custom_generate=custom) == "heard"
    assert "streamer" not in model.without


def test_inputs_of_a_step_are_as_many_tokens_as_next_sequence_length_says():
    model = llama()
    for count, read in ((None, 5), (1, 1)):
        assert model.prepare_inputs_for_generation(IDS, next_sequence_length=count)["input_ids"].shape == (1, read)


@pytest.mark.parametrize("everywhere", [None, True])
def test_generate_compiles_on_a_processor_only_with_compile_all_devices(everywhere, monkeypatch):
    model, compiled, how = llama(), [], CompileConfig()
    assert how._compile_all_devices is None
    how._compile_all_devices = everywhere
    monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled.append(config) or model.__call__)
    model.generate(IDS, max_new_tokens=3, cache_implementation="static", compile_config=how)
    assert bool(compiled) == bool(everywhere)


def test_processors_of_logits_are_called_by_the_names_that_drafting_lists():
    named = [n for n in vars(logits_process) if n.endswith(("LogitsProcessor", "LogitsWarper"))]
    stateless = {"Temperature", "TopP", "TopK", "MinP", "Typical", "RepetitionPenalty", "NoRepeatNGram"}
    assert stateless <= {name.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") for name in named}
    assert {getattr(logits_process, name).__module__ for name in named} == {logits_process.__name__}


# ---- the server


def test_transformers_server_has_what_ours_is_made_of():
    pytest.importorskip("fastapi")
    from transformers.cli.serving import chat_completion, completion, response, utils

    def parameters(function):
        return list(inspect.signature(function).parameters)

    for handler in (chat_completion.ChatCompletionHandler, completion.CompletionHandler, response.ResponseHandler):
        assert parameters(handler.__init__)[:3] == ["self", "model_manager", "generation_state"]
        assert parameters(handler.handle_request) == ["self", "body", "request_id"]
    assert parameters(utils.BaseHandler.get_processor_inputs_from_messages) == ["messages", "modality"]
    assert parameters(response.ResponseHandler._normalize_input) == ["body"]
    assert parameters(response.ResponseHandler._normalize_tools) == ["tools"]
    for name in ("submit", "async_submit"):
        assert parameters(getattr(utils.GenerateManager, name)) == ["self", "fn", "args", "kwargs"]
    assert parameters(utils.CBGenerateManager.init_cb) == ["self", "model", "gen_config"]
    assert utils.CBGenerateManager()._cb is None
    assert parameters(ContinuousBatchingManager.cancel_request) == ["self", "request_id"]
    asked_of = inspect.getsource(utils) + "".join(map(inspect.getsource, (chat_completion, completion, response)))
    asked_for = set(re.findall(r"self\.model_manager\.(\w+)", asked_of))
    assert asked_for <= {"force_model", "process_model_name", "load_model_and_processor", "get_model_modality"}
