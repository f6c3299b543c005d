"""Runs the commands and code of documents as a reader would, page by page, on small stand-ins for models and servers.

    python -m tests.support.pages [--slow] README.md docs/fuse.md ...

Prints a JSON object for every command and every block of code: what was done with it, and the error if there is one. A
page stops at its first error. `<!-- slow: why -->` above a block keeps it for --slow.
"""

import argparse
import copy
import gc
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.support.hub_server import TOKEN, HubServer


ROOT = Path(__file__).parents[2]
LANGUAGES = ("bash", "python", "yaml")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}.+\n)+)")
SLOW = re.compile(r"<!-- slow: .+ -->\n\Z")

# by their first words; each is still parsed, so that no option in a document is one that is not there
NOT_RUN = {
    "pip": "the network",
    "pytest": "this is it",
    "mkdocs": "test_docs.py builds the site",
    "vllm": "an environment of its own: tests/vllm",
    "inspect": "an environment of its own",
    "python examples/mlx_ultrafuser.py": "an environment of its own: tests/mlx",
    "mlx_lm.generate": "an environment of its own: tests/mlx",
    "accelerate": "several GPUs: test_processes.py has two processes",
    "python tests/families.py": "an hour: test_families.py has a few families",
    "python -m benchmarks.rivals": "minutes: test_benchmarks.py has the smallest sizes",
    "python -m benchmarks.gate_costs": "minutes: test_benchmarks.py has the smallest sizes",
    "python -m benchmarks.merging": "minutes: test_merging_benchmark.py has the smallest sizes",
    "python -m benchmarks.dropping": "minutes: test_dropping.py has the smallest sizes",
    "python -m benchmarks.compression": "minutes: test_compression.py has the smallest sizes",
    "python -m benchmarks.growth": "minutes: test_benchmarks.py has the smallest sizes",
    "python -m benchmarks.serving": "minutes: test_benchmarks.py has the smallest sizes",
    "python -m benchmarks.real_serving": "minutes: test_real_serving.py has the smallest sizes",
    "ultrafuser quickstart": "minutes: test_quickstart.py has fewer steps",
    "ultrafuser demo": "it serves until it is stopped: test_demo.py opens it",
    "ultrafuser bench": "lm-eval's data sets: test_suites.py has some of its own",
    "ultrafuser judge fused --questions mt_bench": "a data set on the Hub: docs/evaluate.md has a file",
    "ultrafuser data take-in mathinstruct": "a data set on the Hub: docs/data.md has a file",
    "ultrafuser data push": "an account on the Hub: test_looking.py has a server",
}

# run with --slow, otherwise parsed as those above
SLOW_COMMANDS = tuple(f"ultrafuser {name} " for name in ("serve", "data look", "evaluate", "report", "card"))

MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen/Qwen2.5-Math-1.5B-Instruct")
BASE = "Qwen/Qwen2.5-1.5B"
DOMAINS = ("text", "code", "math")
# a template as TRL wants it for assistant_only_loss
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# what the README leaves for the reader to fill in, or offers as another way to what is there already
README = {
    "load_dataset(...)": 'load_dataset("json", data_files="text.jsonl", split="train")',
    "generate(...": 'generate(**tokenizer("1+1", return_tensors="pt")',
    "text.jsonl --data code=code.jsonl --out stage-one": "text.jsonl --data code=code.jsonl --out by-command",
    "--base BASE": f"--base {BASE}",
}


@dataclass
class Block:
    """Code in a document, the line that it begins at, and whether it is kept for slow tests."""

    line: int
    language: str
    text: str
    slow: bool = False


def blocks(path: Path) -> list[Block]:
    """A document's commands and code in order. Indented lines are commands."""
    text = path.read_text()
    found = []
    for match in FENCED.finditer(text):
        if match[1] in LANGUAGES:
            slow = bool(SLOW.search(text[: match.start()]))
            found.append(Block(text.count("\n", 0, match.start()) + 2, match[1], match[2], slow))
    prose = FENCED.sub(lambda m: re.sub(r".", "~", m[0]), text)
    for match in INDENTED.finditer(prose):
        found.append(Block(prose.count("\n", 0, match.start()) + 1, "bash", re.sub(r"(?m)^ {4}", "", match[1])))
    return sorted(found, key=lambda block: block.line)


def commands(text: str) -> Iterator[list[list[str]]]:
    """Every command of a shell script, as the pipe of which it is a part."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&")
        lexer.whitespace_split = True
        pipe: list[list[str]] = [[]]
        for word in lexer:
            if word == "&&":
                yield pipe
                pipe = [[]]
            elif word == "|":
                pipe.append([])
            else:
                pipe[-1].append(word)
        if pipe[0]:
            yield pipe


def why_not(words: list[str]) -> str | None:
    """Why a command is not run, or None if it is."""
    return next((why for start, why in NOT_RUN.items() if words[: len(start.split())] == start.split()), None)


def parse(words: list[str]) -> None:
    """Refuses options, extras and files that are not there."""
    program, *rest = words
    if program in ("ultrafuser", "mkdocs"):
        import typer.main

        if program == "ultrafuser":
            from ultrafuser.cli.app import app

            command = typer.main.get_command(app)
        else:
            from mkdocs.__main__ import cli as command
        context = None
        while hasattr(command, "commands"):
            context = command.make_context(program, rest[:1], parent=context, resilient_parsing=True)
            program, *rest = rest
            command = command.commands[program]
        command.make_context(program, rest, parent=context)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        asked = launch_command_parser().parse_args(rest[1:])
        recipe = asked.training_script_args[asked.training_script_args.index("--config") + 1]
        assert all(Path(file).is_file() for file in (asked.config_file, asked.training_script, recipe))
    elif program == "pip":
        from configparser import ConfigParser

        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extras in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras
        assert "-c" not in rest or Path(rest[rest.index("-c") + 1]).is_file()
    elif program == "python":
        assert find_spec(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).is_file(), rest
    elif program == "vllm":
        known = (ROOT / "tests/vllm/check_vllm.py").read_text()
        assert all(f'"{word}"' in known for word in rest if word.startswith("-")), rest
    elif program == "inspect":
        assert (rest[0], rest[2]) == ("eval", "--model"), rest


class Reader:
    """Does what a page says, in a folder of its own.

    Args:
        slow: Whether to run what is kept for slow tests.
        replaced: What stands in a page, and what is run in its place.
    """

    def __init__(self, slow: bool, replaced: dict[str, str]):
        self.slow, self.replaced = slow, replaced
        self.names: dict = {"__name__": "a_document"}
        self.servers = ExitStack()

    def read(self, page: Path) -> Iterator[dict]:
        with self.servers:
            for block in blocks(page):
                text = block.text
                for old, new in self.replaced.items():
                    text = text.replace(old, new)
                place = {"page": page.name, "line": block.line, "language": block.language}
                if block.slow and not self.slow:
                    if block.language == "python":
                        compile(text, page.name, "exec")
                    yield place | {"done": "slow", "why": "--slow", "what": text}
                elif block.language == "bash":
                    for pipe in commands(text):
                        yield place | {"what": shlex.join(pipe[-1]), **self.run(pipe)}
                else:
                    {"python": self.run_python, "yaml": self.write}[block.language](text, f"{page.name}:{block.line}")
                    yield place | {"done": "run", "what": text}

    def run_python(self, text: str, place: str) -> None:
        exec(compile(text, place, "exec"), self.names)

    def write(self, text: str, place: str) -> None:
        import yaml

        name = re.match(r"# (\S+\.yaml)\n", text)
        assert name, f"{place} names no file in its first line"
        assert isinstance(yaml.safe_load(text), dict)
        Path(name[1]).write_text(text)

    def run(self, pipe: list[list[str]]) -> dict:
        said = ""
        for words in pipe:
            if why := why_not(words):
                parse(words)
                return {"done": "parsed", "why": why}
            if not self.slow and " ".join(words).startswith(SLOW_COMMANDS):
                parse(words)
                return {"done": "slow", "why": "--slow"}
            said = self.run_one(words, said)
        return {"done": "run"}

    def run_one(self, words: list[str], given: str) -> str:
        """What a command says."""
        program, *rest = words
        if program == "echo":
            return " ".join(rest) + "\n"
        if words[:2] == ["ultrafuser", "serve"]:
            self.servers.enter_context(served(rest[1:]))
            return ""
        if program == "ultrafuser":
            from typer.testing import CliRunner

            from ultrafuser.cli.app import app

            if rest[0] == "chat" and "--max-new-tokens" not in rest:
                rest += ["--max-new-tokens", "4"]
            done = CliRunner().invoke(app, rest, input=given)
            if done.exit_code:
                raise RuntimeError(f"exit code {done.exit_code}\n{done.output}") from done.exception
            return done.output
        if program == "python":
            sys.argv = rest
            runpy.run_path(rest[0], run_name="__main__")
            return ""
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        # a server that refuses does so with a status of its own
        assert '"error"' not in done.stdout, done.stdout
        return done.stdout


# ------------------------------------------------------------------------------------------------------- stand-ins


@contextmanager
def served(words: list[str]) -> Iterator[None]:
    """`ultrafuser serve` in a process of its own, once it answers."""
    command = [sys.executable, "-c", "from ultrafuser.cli import main; main()", "serve", *words, "--device", "cpu"]
    address = f"http://localhost:{words[words.index('--port') + 1]}/health"
    with Path("serve.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(300):
                assert server.poll() is None, Path("serve.log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(address).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield
        finally:
            server.terminate()


def save_models(models: dict[str, Path], fused: Path) -> None:
    """Tiny specialists in the place of real ones, and a fused model of three of them."""
    import torch

    from modeling_ultrafuser import UltraFuserForCausalLM
    from tests.support.tiny import specialist, tokenizer
    from tests.support.tuned import changed

    words = tokenizer(chat_template=TEMPLATE)
    base = specialist(layers=1, max_position_embeddings=1024)
    for seed, (name, folder) in enumerate(models.items()):
        # as if all were tuned from the base
        model = base if name == BASE else changed(copy.deepcopy(base), seed)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = UltraFuserForCausalLM.from_specialists({d: models[m] for d, m in zip(DOMAINS, MODELS, strict=True)})
    for parameter in model.model.fusion_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(fused)
    words.save_pretrained(fused)


def lay_out(folder: Path, page: Path, fused: Path, teacher: str) -> None:
    """What a reader of the page has by then: data, the repository's examples, and a fused model."""
    from tests.support.conversations import conversations
    from tests.support.judge_server import ROWS

    rows = conversations(12)
    for domain, place in zip(DOMAINS, range(3), strict=True):
        write_rows(folder / f"{domain}.jsonl", rows[place::3] * 2)
        write_rows(folder / f"more-{domain}.jsonl", rows[place::3])
    sums = [{"question": f"What is {i} + {i}? Say it in words.", "answer": f"It is {2 * i}."} for i in range(20, 30)]
    write_rows(folder / "questions.jsonl", sums)
    write_rows(folder / "exam.jsonl", sums[:1])
    write_rows(folder / "judged-questions.jsonl", ROWS)
    shutil.copy(ROOT / "constraints.txt", folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    for recipe in (folder / "examples/recipes").glob("*.yaml"):
        text = recipe.read_text().replace("http://localhost:8000/v1", teacher)
        text = text.replace("model: Qwen/Qwen2.5-7B-Instruct\n", "model: scripted\n")
        text = text.replace(
            "{path: HuggingFaceH4/ultrachat_200k, split: train_sft}", "{path: json, data_files: text.jsonl}"
        )
        recipe.write_text(text)
    if page.name == "README.md":
        public = {"domain": "math", "topic": "sums", "source": "ours", "licence": "cc0-1.0"}
        write_rows(folder / "public.jsonl", [c | public for c in rows])
    if page.name == "five-minutes.md":
        shutil.copytree(fused, folder / "ultrafuser-quickstart/fused")
    elif page.name not in ("README.md", "fuse.md"):  # which make it themselves
        shutil.copytree(fused, folder / "fused")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("pages", nargs="+", type=Path)
    asked = parser.parse_args()
    pages = [page.absolute() for page in asked.pages]
    with ExitStack() as stack, redirect_stdout(sys.stderr):
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = {name: work / "models" / name.replace("/", "--") for name in (*MODELS, BASE)}
        hub = stack.enter_context(HubServer(models, store=work / "pushed"))
        # before the Hub's client is imported, which reads them once
        os.environ.update(
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT=hub.url,
            HF_TOKEN=TOKEN,
            HF_HUB_DISABLE_XET="1",
            HF_HOME=str(work / "hub"),
            NO_PROXY="127.0.0.1,localhost",
        )
        from tests.support.judge_server import Server
        from tests.support.short_runs import make_runs_short
        from tests.support.teacher_server import TeacherServer

        save_models(models, work / "fused")
        teacher = stack.enter_context(TeacherServer())
        judge = Server()
        stack.callback(judge.close)
        make_runs_short()
        # every trainer collects garbage, among all that is imported
        gc.collect()
        gc.freeze()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        replaced = {"http://localhost:8001/v1": judge.url, "localhost:8000": f"localhost:{port}", "8000": str(port)}
        for page in pages:
            folder = work / "pages" / page.stem
            folder.mkdir(parents=True)
            lay_out(folder, page, work / "fused", teacher.url)
            os.chdir(folder)
            reader = Reader(asked.slow, replaced | (README if page.name == "README.md" else {}))
            began = time.process_time()
            try:
                for event in reader.read(page):
                    event["seconds"], began = round(time.process_time() - began, 2), time.process_time()
                    print(json.dumps(event), file=sys.__stdout__, flush=True)
            except BaseException:
                print(
                    json.dumps({"page": page.name, "error": traceback.format_exc()}), file=sys.__stdout__, flush=True
                )
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
