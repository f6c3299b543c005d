"""Templates that others wrote: what they render is right, and they can do nothing else."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.stand_ins import ALPACA, CHATML, INST
from tests.support.tiny import tokenizer
from trainers import template_sandbox
from trainers.template_sandbox import RenderingError, placeholders, render_chat, render_prompt


TALK = [
    {"role": "system", "content": "Be kind – and “brief”."},
    {"role": "user", "content": "2+2?\n\ud800", "name": None},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]
CODE = (
    "{% for c in X.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
    "{{ c.__init__.__globals__['system']('touch PWNED') }}{% endif %}{% endfor %}"
)
# each of them runs code in Jinja outside of a sandbox
ESCAPES = {
    "subclasses": CODE.replace("X", "description"),
    "globals of a macro's module": "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "globals of a filter": "{{ (description | attr('__class__')).__mro__ }}{{ lipsum.__globals__['os'].popen('touch PWNED') }}",
    "format": "{{ '{0.__class__.__mro__[1].__subclasses__}'.format(description) }}{{ self.__init__.__globals__ }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': joiner.__init__.__globals__}) }}",
    "changing what was given": "{{ known.append(1) }}",
}
# each of them takes minutes or gigabytes
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a power of what is given": "{% set n = description | length + 9 %}{{ n ** (n ** (n ** n)) }}",
    "a long text": "{{ 'x' * 10 ** 10 }}",
    "a wide text": "{{ 'x'.ljust(10 ** 10) }}",
    "a wide number": "{{ '%09999999999d' % 1 }}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "many characters": "{% for a in range(4000) %}{{ 'x' * 4000 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hasty(monkeypatch):
    """No patience, for templates that never end."""
    monkeypatch.setattr(template_sandbox, "SECONDS", 3.0)


@pytest.mark.parametrize("template", [CHATML, INST, ALPACA, "{{ bos_token }}{{ messages | tojson(indent=1) }}"])
@pytest.mark.parametrize("prompt", [True, False])
def test_a_conversation_is_rendered_as_transformers_renders_it(template, prompt):
    words = tokenizer(chat_template=template)
    # what is not said is left out, as later versions of the library do
    talk = [{key: value for key, value in message.items() if value is not None} for message in TALK]
    expected = words.apply_chat_template(talk, add_generation_prompt=prompt, tokenize=False)
    assert render_chat(words, TALK, prompt=prompt) == expected
    assert render_chat(words, TALK, "{{ messages[1]['content'] }}") == TALK[1]["content"]


def test_a_prompt_needs_all_its_placeholders_and_says_which():
    text = "{% for k in known %}\n{{ k }}, {{ number }}\n{% endfor %}\nof {{ description }}"
    assert placeholders(text) == {"known", "number", "description"}
    assert render_prompt(text, {"known": ["a", "b"], "number": 2, "description": "d"}) == "a, 2\nb, 2\nof d"
    with pytest.raises(RenderingError, match="'number' is undefined"):
        render_prompt(text, {"known": ["a"], "description": "d"})
    with pytest.raises(RenderingError, match="expected token 'end of print statement'") as caught:
        placeholders("first\n{{ a b }}")
    assert caught.value.line == 2
    with pytest.raises(RenderingError, match="access to attribute '__class__' of 'str' object is unsafe$"):
        render_prompt("{{ description.__class__ }}", {"description": "d"})


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_a_template_runs_no_code(escape, tmp_path):
    for render in (
        lambda: render_prompt(escape, {"description": "d", "known": []}),
        lambda: render_chat(tokenizer(), TALK, escape.replace("description", "messages").replace("known", "messages")),
    ):
        with contextlib.suppress(RenderingError):
            assert not re.search("<(function|class|module)", render())
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_template_that_does_not_end_is_ended_and_the_next_one_is_rendered(bomb, hasty):
    for _ in ("compiled", "from the cache"):
        with pytest.raises(
            RenderingError, match=r"longer than|memory|deeply|the most|recursion|exceeded|too (big|large)"
        ):
            render_prompt(bomb, {"description": "d"})
    assert render_prompt("{{ number }}", {"number": 1}) == "1"


@pytest.mark.e2e
def test_looking_for_placeholders_computes_nothing_for_long(hasty):
    # Jinja works out what is constant when it compiles
    with pytest.raises(RenderingError):
        placeholders("{{ 9 ** (9 ** (9 ** 9)) }} {{ number }}")
    with pytest.raises(RenderingError):
        placeholders("{{ " + "(" * 100_000 + " }}")


@pytest.mark.e2e
def test_a_chat_template_that_hangs_on_the_second_turn_is_ended(hasty):
    template = "{% if messages | length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}hello"
    assert render_chat(tokenizer(), TALK[:1], template) == "hello"
    with pytest.raises(RenderingError, match="longer than 3 s"):
        render_chat(tokenizer(), TALK, template)


def test_threads_and_forks_get_what_they_asked_for():
    wrong = []

    def ask(number):
        for k in range(20):
            if render_prompt("{{ number }}", {"number": [number, k]}) != f"[{number}, {k}]":
                wrong.append((number, k))

    threads = [threading.Thread(target=ask, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if not child:
        ask(4)
        os._exit(len(wrong))
    for thread in threads:
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not wrong


def test_the_process_that_renders_ends_with_the_one_that_asked():
    code = "from trainers import template_sandbox as r; r.render_prompt('', {}); print(r._processes['prompt'].pid)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    deadline = time.monotonic() + 60
    while Path("/proc", done.stdout.strip()).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path("/proc", done.stdout.strip()).exists()
    assert "Error" not in done.stderr


def test_even_out_of_the_sandbox_a_template_opens_and_starts_nothing(monkeypatch, tmp_path):
    weak = tmp_path / "template_sandbox.py"
    source = Path(template_sandbox.__file__).read_text()
    assert "import ImmutableSandboxedEnvironment" in source
    weak.write_text(
        source.replace("import ImmutableSandboxedEnvironment", "import SandboxedEnvironment").replace(
            " = ImmutableSandboxedEnvironment(", " = jinja2.Environment("
        )
    )
    monkeypatch.setattr(template_sandbox, "__file__", str(weak))
    monkeypatch.setattr(template_sandbox, "_processes", {})
    assert "environ" in render_prompt("{{ cycler.__init__.__globals__.os.environ }}", {})
    assert "TOKEN" not in render_prompt("{{ cycler.__init__.__globals__.os.environ }}", {})
    with pytest.raises(RenderingError, match="Too many open files"):
        render_prompt("{{ cycler.__init__.__globals__.os.popen('touch PWNED') }}", {})
    with pytest.raises(RenderingError, match="Too many open files"):
        render_prompt("{{ cycler.__init__.__globals__.__builtins__.open('/etc/passwd') }}", {})
    render_prompt("{{ cycler.__init__.__globals__.os.system('touch PWNED') }}", {})
    assert not (tmp_path / "PWNED").exists()
