"""Converts what becomes of fused models to GGUF, runs it in llama.cpp on a CPU, and compares with transformers.

    python tests/gguf/check_gguf.py [--folder FUSED] [--write]

Gets llama.cpp's converter with the packages that it asks for, and llama.cpp itself in node-llama-cpp (needs npm), if they are
not there. Then it makes ordinary folders of tiny fused models by the commands of this package, with vocabularies that llama.cpp
knows, and of FUSED. Exits with 1 if a token or a log-probability differs, or if what cannot be converted was.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402
from transformers.utils import logging  # noqa: E402

from tests.gguf.folders import FUSED, MADE, as_bfloat16, ordinary, tiny_fused, with_new_names, with_own_vocabulary  # noqa: E402
from tests.vllm.check_vllm import VERSIONS, furthest, tokens_row, versions_of  # noqa: E402


# the source of a release of llama-cpp-python holds that of llama.cpp
SOURCE, ENGINE = "llama-cpp-python==0.3.36", ("node-llama-cpp@3.21.1", "@node-llama-cpp/linux-x64@3.21.1")
PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "requirements/", "models/ggml-vocab-")
NEW_TOKENS, TOLERANCES = 24, {"f32": 1e-3, "bf16": 0.1}
GIVEN = "the given folder: its last specialist"
CHAT = [{"role": "user", "content": "Write a Python function that adds two numbers."}]
TEXTS = ["What is 47 * 36?", "def fibonacci(n):\n    ", "It costs 12345 dollars, don't you think? Über: 你好 🙂", "a"]


@dataclass
class Tools:
    """Where llama.cpp's converter, the packages that it asks for, and its engine are."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "llama.cpp"

    def get(self) -> None:
        """Gets what is not there."""
        if not self.source.exists():
            with tempfile.TemporaryDirectory() as work:
                pip("download", "--no-deps", "--no-binary", ":all:", "-d", work, SOURCE)
                with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
                    archive.extractall(self.source, list(wanted(archive)), filter="data")
        if not (packages := self.folder / "packages").exists():
            asked = self.source / "requirements" / "requirements-convert_legacy_llama.txt"
            pip("install", "--target", packages, "-r", asked)
        if not (engine := self.folder / "engine").exists():
            # graphics cards' builds are optional, and ten times as large
            few = ("--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund")
            subprocess.run(["npm", "install", *few, "--prefix", engine, *ENGINE], check=True)

    def convert(self, folder: Path, dtype: str = "f32") -> tuple[Path | None, str]:
        """Runs the converter in its own packages, with this environment's torch. Returns the file and what was said."""
        out = folder.with_suffix(f".{dtype}.gguf")
        script = self.source / "convert_hf_to_gguf.py"
        variables = os.environ | {"PYTHONPATH": str(self.folder / "packages"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, script, folder, "--outfile", out, "--outtype", dtype]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        return (out if done.returncode == 0 else None), done.stderr

    def run(self, work: Path, jobs: list[dict]) -> dict:
        """Continues texts in llama.cpp."""
        (work / "jobs.json").write_text(json.dumps(jobs))
        command = ["node", Path(__file__).with_name("inside.mjs"), self.folder / "engine"]
        subprocess.run([*command, work / "jobs.json", work / "answers.json"], check=True)
        return json.loads((work / "answers.json").read_text())

    def versions(self, release: str) -> dict[str, str]:
        """Versions of the converter, of what it runs with, and of llama.cpp in the engine."""
        names = ("transformers", "sentencepiece")
        variables = os.environ | {"PYTHONPATH": str(self.folder / "packages")}
        command = [sys.executable, "-c", VERSIONS % (names,)]
        read = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
        name, version = SOURCE.split("==")
        engine, _, engine_version = ENGINE[0].rpartition("@")
        return {name: version, **json.loads(read.stdout), engine: engine_version, "llama.cpp in it": release}


def wanted(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Parts of llama.cpp in the source of llama-cpp-python, named as in llama.cpp."""
    for member in archive.getmembers():
        _, found, name = member.name.partition("/vendor/llama.cpp/")
        if found and name.startswith(PARTS):
            member.name = name
            yield member


def pip(*words: str | Path) -> None:
    """Runs pip, quietly."""
    subprocess.run([sys.executable, "-m", "pip", "-q", *words], check=True)


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a fused model to check too, such as that of `quickstart --real`")
    parser.add_argument("--tools", type=Path, default=ROOT / ".venv-gguf", help="filled if it is not there")
    parser.add_argument("--write", action="store_true", help="write results/gguf.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tools = Tools(arguments.tools.absolute())
    tools.get()
    with tempfile.TemporaryDirectory() as work:
        rows, release = check(Path(work), tools, arguments.folder)
    for row in rows:
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['case']:52} {row['detail']}")
    if arguments.write:
        machine = {"kind": "cpu", "architecture": platform.machine(), "cores": os.cpu_count()}
        built = versions_of(sys.executable, ("torch", "transformers"))
        versions = {"built with": built, "run with": tools.versions(release)}
        results = {"machine": machine, "versions": versions, "checks": rows}
        (ROOT / "results" / "gguf.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(not all(row["passed"] for row in rows))


def check(work: Path, tools: Tools, folder: Path | None) -> tuple[list[dict], str]:
    """Makes folders, converts, runs and compares. Returns one row per model, and llama.cpp's release."""
    fused = {name: tiny_fused(work / name, tools.source / "models", name) for name in FUSED}
    made = {case: ordinary(work / f"made_{i}", fused[n], words) for i, (case, (n, words)) in enumerate(MADE.items())}
    dtypes = [(case, "f32") for case in made]
    if folder is not None:
        name = json.loads((folder / "config.json").read_text())["specialist_names"][-1]
        made[GIVEN] = ordinary(work / "given", folder.absolute(), ["specialist", "FUSED", name])
        dtypes += [(GIVEN, "f32"), (GIVEN, "bf16")]
    files = {each: tools.convert(made[each[0]], each[1]) for each in dtypes}
    failed = [
        {"case": f"{c}, {d}", "passed": False, "detail": said[-500:]} for (c, d), (f, said) in files.items() if not f
    ]
    wanted = {each: expected(made[each[0]], each[1]) for each, (file, _) in files.items() if file}
    jobs = [job(files[each][0], one) for each, one in wanted.items()]
    done = tools.run(work, jobs)
    rows = [compare(*one) for one in zip(wanted, wanted.values(), done["found"], strict=True)]
    refused = [refusal(tools, *one) for one in unknown(work, fused["llama"], made["Llama: a specialist"])]
    return failed + rows + refused, done["release"]


def unknown(work: Path, fused: Path, known: Path) -> Iterator[tuple[str, Path, str]]:
    """What cannot be converted, and what the converter must say of it."""
    yield "a fused model", fused, "Model UltraFuserForCausalLM is not supported"
    own = with_own_vocabulary(work / "own")
    yield "a vocabulary of one's own, as the quickstart's", own, "BPE pre-tokenizer was not recognized"
    # when this one is converted, `save_tokenizer` is no longer needed
    new = with_new_names(known, work / "new_names")
    yield "a tokenizer by its names in transformers 5", new, "Tokenizer class TokenizersBackend does not exist"


def refusal(tools: Tools, case: str, folder: Path, sentence: str) -> dict:
    """One row: the converter must have stopped with its sentence."""
    file, said = tools.convert(folder)
    passed = file is None and sentence in said
    return {"case": f"refused: {case}", "passed": passed, "detail": sentence if passed else said[-500:]}


def job(file: Path, wanted: dict) -> dict:
    """What the engine is asked."""
    return {"file": str(file), "texts": wanted["texts"], "new_tokens": NEW_TOKENS}


def expected(folder: Path, dtype: str) -> dict:
    """What transformers says of the same folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = as_bfloat16(model) if dtype == "bf16" else model
    texts = [*TEXTS, tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers, log_probs = zip(*(greedy(model, prompt) for prompt in prompts), strict=True)
    words = {"prompts": prompts, "chat_template": tokenizer.chat_template, "eos": tokenizer.eos_token_id}
    return {"texts": texts, "answers": list(answers), "log_probs": list(log_probs), "words": words}


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The likeliest next tokens, ends of answers too, and their log-probabilities."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    ids = torch.tensor([prompt])
    # without a mask what is padding in other texts would be left out
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **options)
    tokens = output.sequences[0, len(prompt) :]
    log_probs = torch.cat(output.logits).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.tolist(), log_probs.tolist()


def compare(each: tuple[str, str], wanted: dict, found: dict) -> dict:
    """One row: the same tokens of a text, chat template and end, the same tokens said, and near log-probabilities."""
    case, dtype = each
    said = {key: [one[key] for one in found["said"]] for key in ("tokens", "log_probs", "prompt")}
    row = tokens_row(f"{case}, {dtype}", wanted["answers"], said["tokens"])
    row["furthest_log_prob"] = furthest(wanted, said)
    words = {"prompts": said["prompt"], "chat_template": found["chat_template"], "eos": found["eos"]}
    different = [key for key, value in words.items() if value != wanted["words"][key]]
    row["detail"] += f", log-probabilities up to {row['furthest_log_prob']:.0e} apart"
    row["detail"] += f"; differ: {different}" if different else ""
    near = row["furthest_log_prob"] <= TOLERANCES[dtype] and not different
    # rounded, the likeliest token may be another, and then all after it
    enough = row["passed"] if dtype == "f32" else 2 * row["equal_tokens"] >= row["tokens"]
    return row | {"passed": near and enough}


if __name__ == "__main__":
    main()
