"""A fused folder behind transformers' own server, asked over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import CHAT_TEMPLATE
from tests.support.tiny import specialist, stir_gate, tokenizer
from ultrafuser.cli.app import app


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "fused"
    model = UltraFuserForCausalLM.from_specialists({name: specialist(layers=1) for name in ("text", "code")})
    stir_gate(model)
    model.save_pretrained(folder)
    tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def client(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from ultrafuser.cli import main; main()", "serve", folder, "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/health") as answer:
                assert json.load(answer) == {"status": "ok"}
            break
        except OSError:
            assert server.poll() is None, server.stdout.read()[-3000:]
            time.sleep(0.5)
    yield openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    server.terminate()
    server.wait()


def messages(prompt):
    return [{"role": "user", "content": prompt}]


def generated(folder, conversation):
    """What `generate` says, greedily, in this process."""
    model, own = UltraFuserForCausalLM.from_pretrained(folder), tokenizer(chat_template=CHAT_TEMPLATE)
    inputs = own.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return own.decode(ids[0, inputs["input_ids"].shape[-1] :], skip_special_tokens=True)


def asked(client, folder, conversation, **settings):
    return client.chat.completions.create(model=folder, messages=conversation, max_tokens=TOKENS, **settings)


def streamed(client, folder, conversation):
    chunks = asked(client, folder, conversation, stream=True)
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def test_it_lists_the_one_model_that_it_serves(client, folder):
    assert [model.id for model in client.models.list()] == [folder]


def test_an_answer_is_what_generate_says(client, folder):
    answer = asked(client, folder, messages("2+2?"))
    assert answer.choices[0].message.content == generated(folder, messages("2+2?"))
    assert answer.usage.prompt_tokens == len("<user>2+2?\n<assistant>")


def test_a_streamed_answer_is_the_same_in_pieces(client, folder):
    pieces = streamed(client, folder, messages("2+2?"))
    assert "".join(pieces) == generated(folder, messages("2+2?"))
    assert len([p for p in pieces if p]) > 1


def test_a_streamed_conversation_of_three_turns_is_that_of_generate(client, folder):
    conversation = []
    for question in ("2+2?", "and why?", "what is a prime number?"):
        conversation += messages(question)
        answer = "".join(streamed(client, folder, conversation))
        assert answer == generated(folder, conversation)
        conversation.append({"role": "assistant", "content": answer})
    assert len({turn["content"] for turn in conversation}) == 6


def test_two_requests_at_once_get_each_its_own_answer(client, folder):
    prompts = ["2+2?", "what is a prime number?"]
    with ThreadPoolExecutor(2) as pool:
        answers = [
            a.choices[0].message.content for a in pool.map(lambda p: asked(client, folder, p), map(messages, prompts))
        ]
    expected = [generated(folder, messages(p)) for p in prompts]
    assert answers == expected
    assert expected[0] != expected[1]


def test_another_models_name_is_refused(client):
    with pytest.raises(openai.BadRequestError):
        asked(client, "owner/another", messages("2+2?"))


def test_a_folder_of_another_model_is_refused_before_anything_is_loaded(tmp_path):
    specialist().config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "of type 'llama'" in result.output
