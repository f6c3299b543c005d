"""lm-eval's plain `hf` model runs tasks on a saved fused folder, and counts what the model itself would."""

import json

import pytest
import torch
import yaml


lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from modeling_ultrafuser import UltraFuserForCausalLM  # noqa: E402
from tests.support.conversations import CHAT_TEMPLATE  # noqa: E402
from tests.support.tiny import tokenizer  # noqa: E402


SUMS = [
    {"question": f"{a}+{b}=", "answer": str(a + b), "choices": [str(a + b), str(a), "?"]}
    for a, b in ((1, 2), (3, 4), (2, 2), (5, 3))
]


@pytest.fixture
def folder(fused, tmp_path):
    fused.save_pretrained(tmp_path / "fused")
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.fixture
def tasks(tmp_path):
    """A folder of two local tasks over the same questions."""
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in SUMS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 1,
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    written = {
        "task": "sums_written",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        "task": "sums_chosen",
        "output_type": "multiple_choice",
        "doc_to_target": 0,
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    for task in (written, chosen):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return tmp_path / "tasks"


def hf(folder, **settings):
    return HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", **{"batch_size": 2, **settings})


@torch.no_grad()
def own_loglikelihood(model, context, continuation):
    """Sum of the continuation's log-probabilities, and whether greedy decoding would have said it, token by token."""
    encode = tokenizer().encode
    ids, total, greedy = encode(context), 0.0, True
    for token in encode(continuation):
        log_probabilities = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total += log_probabilities[token].item()
        greedy &= log_probabilities.argmax().item() == token
        ids.append(token)
    return total, greedy


def test_loglikelihood_is_the_models_own(fused, folder):
    said = tokenizer().decode(fused.generate(torch.tensor([tokenizer().encode("2+2=")]), max_new_tokens=3)[0, -3:])
    pairs = [("2+2=", "4"), ("The longer of two contexts", " and its end"), ("2+2=", said), ("x", "y z")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = hf(folder).loglikelihood(requests, disable_tqdm=True)
    expected = [own_loglikelihood(fused, *pair) for pair in pairs]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] == [False, False, True, False]


def test_the_loglikelihood_of_a_whole_text_is_the_models_own_loss(fused, folder):
    text = "A text of 34 characters, no token."
    (found,) = hf(folder).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = torch.tensor([[tokenizer().bos_token_id, *tokenizer().encode(text)]])
    assert found == pytest.approx(-fused(ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-5)


def test_the_longest_context_is_the_shortest_of_the_specialists(fused, folder):
    assert hf(folder).max_length == fused.config.max_position_embeddings == 256


@pytest.mark.e2e
@pytest.mark.parametrize("settings", [{}, {"apply_chat_template": True, "fewshot_as_multiturn": True}])
def test_local_tasks_run_on_the_saved_folder(settings, fused, folder, tasks):
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True},
        tasks=["sums_written", "sums_chosen"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        **settings,
    )
    written, chosen = (results["samples"][task] for task in ("sums_written", "sums_chosen"))
    assert [len(written), len(chosen)] == [len(SUMS), len(SUMS)]
    for sample in written:
        (arguments,) = sample["arguments"]
        prompt = torch.tensor([tokenizer().encode(arguments[0])])
        said = fused.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert sample["resps"] == [[tokenizer().decode(said, skip_special_tokens=True).split("\n")[0]]]
    right = []
    for sample in chosen:
        own = [own_loglikelihood(fused, *arguments)[0] for arguments in sample["arguments"]]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(own, rel=1e-5)
        right.append(own[0] == max(own))
    assert results["results"]["sums_chosen"]["acc,none"] == sum(right) / len(right)


def test_a_mixture_of_probabilities_is_scored_alike(specialists, tmp_path):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion="probabilities")
    model.save_pretrained(tmp_path / "mixture")
    tokenizer().save_pretrained(tmp_path / "mixture")
    ((found, _),) = hf(tmp_path / "mixture").loglikelihood(
        [Instance("loglikelihood", {}, ("2+2=", "4!"), 0)], disable_tqdm=True
    )
    assert found == pytest.approx(own_loglikelihood(model, "2+2=", "4!")[0], rel=1e-5)
