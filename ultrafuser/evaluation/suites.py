"""Public benchmarks, run by lm-eval and written down task by task.

    ultrafuser bench FOLDER paper --run-code --out results/paper
    ultrafuser bench FOLDER mmlu_math mmlu_medicine gsm8k --out results/some

A result file names the `lm_eval` command that gives the same scores without this package.

Six of the seven benchmarks of Ding et al. (2024, https://arxiv.org/abs/2403.08281) are in the suite "paper"; the
seventh, AlpacaEval, is scored by a judge, not by lm-eval. The paper asks without examples and without chain of
thought, and so does the suite. Its scores are still not the paper's, because

- TruthfulQA: the paper shows one answer at a time and lets the model judge it with Yes or No; `truthfulqa_mc2` is the
  probability that the model itself gives to the true answers, after six examples that are a part of the prompt;
- HumanEval: the paper words it as an instruction, as `humaneval_instruct` does, in words of its own; `humaneval` lets
  the model continue the code;
- GSM8K, MATH: how the paper finds the answer in what the model wrote is not told. `gsm8k` has a strict filter, which
  without examples hardly ever matches, and a flexible one, the last number: compare by `flexible-extract`.
  `hendrycks_math` compares all that stands between the first and the last dollar sign, or all that was written, so
  that a model that explains itself scores near zero;
- SAT-Math, AQuA-RAT: the most probable option counts here; nothing is written.

"mergebench" is what MergeBench (He et al., 2025, https://arxiv.org/abs/2505.10833) measures, but for safety, which its authors
measure with another harness. Programs are written once, greedily; they sample ten at a temperature of 0.2.

`ifeval` and "math_cot" need more packages: `pip install "lm_eval[ifeval]"`, `pip install "lm_eval[math]"`.
"""

import difflib
import glob
import json
import os
import re
import shlex
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, NamedTuple

import lm_eval.utils
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from modeling_ultrafuser import UltraFuserConfig
from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.fusions_ultrafuser import check_loss

from ..atomic import sole_writer, write_whole
from ..keys import check_address
from ..pretrained import load_config, load_tokenizer, refusing_code
from ..provenance import digest, provenance
from ..result_files import read_results
from ..yaml_files import read_yaml
from . import bench_changes, local_tasks, sandbox
from .comparison import slug
from .foreign_tasks import LM_EVAL_JINJA, Elsewhere, are_strange, names_task, sandboxed


class Suite(NamedTuple):
    """Tasks by lm-eval's names, and how many examples come before a question; None for each task's own number.

    Attributes:
        tasks: Names.
        shots: Of all tasks.
        few: Of tasks that differ, by name.
    """

    tasks: tuple[str, ...]
    shots: int | None = None
    few: Mapping[str, int] = MappingProxyType({})

    def by_task(self) -> dict[str, int | None]:
        """Returns how many examples come before a question of each task."""
        return dict.fromkeys(self.tasks, self.shots) | self.few


# 5, 9 and 43 subjects
MMLU_GROUPS: dict[str, list[str]] = read_yaml(Path(__file__).with_name("mmlu_groups.yaml"))

MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalc")
PAPER = ("truthfulqa_mc2", "humaneval", "gsm8k", "hendrycks_math", "agieval_sat_math", "agieval_aqua_rat")
SUITES = {
    "paper": Suite(PAPER, shots=0),
    "code": Suite(("humaneval", "mbpp")),
    "instructions": Suite(("ifeval",)),
    "local": Suite(local_tasks.NAMES),
    # with chains of thought, which the paper's table 10 adds; SAT-Math and AQuA-RAT have no such task in lm-eval
    "math_cot": Suite(("gsm8k_cot", *(f"minerva_math_{subject}" for subject in MATH))),
    **{f"mmlu_{g}": Suite(tuple(f"mmlu_{s}" for s in subjects), shots=0) for g, subjects in MMLU_GROUPS.items()},
}
# the tasks of He et al. that lm-eval has; safety is another harness's
SUITES["mergebench"] = Suite(
    (
        *("gsm8k_cot", "ifeval", "humaneval_plus", "mbpp_plus"),
        *(f"{task}_{language}" for language in ("fr", "es", "de", "ru") for task in ("m_mmlu", "arc", "hellaswag")),
    )
)
# table 5 of Wu et al.: five examples for the first two, none for MMLU
SUITES["skills_math"] = Suite(
    ("gsm8k", "hendrycks_math", *SUITES["mmlu_math"].tasks), shots=0, few={"gsm8k": 5, "hendrycks_math": 5}
)


def run_suite(
    folder: str | Path,
    names: list[str],
    out: str | Path,
    *,
    server: str | None = None,
    include: str | Path | None = None,
    limit: int | None = None,
    run_code: bool = False,
    chat: bool = False,
    batch_size: int = 8,
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Runs lm-eval, one task after the other, and writes each task's result as soon as it is there.

    Tasks whose result is in `out` already are not run again, so a run that was killed goes on where it was.

    Args:
        folder: The model, fused or not; a name on the Hub will do.
        names: Keys of `SUITES`, or lm-eval's own names of tasks, groups and tags.
        out: Folder of the result files, `<task>.json`; of a name that is no file's, one like it.
        server: Address of an OpenAI server that serves `folder`, such as "http://127.0.0.1:8000" of vLLM; then lm-eval's
            `local-completions` asks it, and only the tokenizer is loaded here.
        include: Folder of further tasks, lm-eval's `--include_path`; for "local", what `local_tasks.write` wrote to.
        limit: Only so many first questions of each task.
        run_code: Allows tasks that execute what the model wrote. Those of lm-eval do so in `evaluate`'s `code_eval`,
            which is no sandbox: use a container.
        chat: Asks through the tokenizer's chat template.
        batch_size: Questions at a time.
        dtype: Of the weights. A server has its own.
        seed: Of everything random.
        trust_remote_code: Allows code that comes with the model or its tokenizer, and with tasks of `include`.

    Returns:
        The content of each result file, by task.

    Raises:
        ValueError: Before any model is loaded, if a name is unknown, if a task executes code and `run_code` is not
            set, or if `out` holds a result of other settings.
        OSError: If the server does not answer.
    """
    strange = include is not None and not trust_remote_code and are_strange(Path(include))
    # tasks are templates that others wrote; those that nobody vouches for are rendered where they can do nothing else
    lm_eval.utils.env = Elsewhere() if strange else sandboxed(LM_EVAL_JINJA)
    out = Path(out)
    shots = {}
    for name in names:
        suite = SUITES.get(name, Suite((name,)))
        shots |= suite.by_task()
    with names_task(include, strange):
        manager = _task_manager(shots, include)
    _check_names(shots, manager)
    if not run_code:
        _check_nothing_runs_code(shots, manager)
    shared = {"model": str(folder), "server": server is not None, "limit": limit, "chat": chat, "seed": seed}
    shared |= {"dtype": None if server else dtype, "batch_size": batch_size}
    seeds = {f"{kind}random_seed": seed for kind in ("", "numpy_", "torch_", "fewshot_")}
    settings = {task: shared | {"shots": number} for task, number in shots.items()}
    files = {task: out / name for task, name in file_names(shots).items()}
    found = {task: read for task in shots if (read := _finished(files[task], settings[task]))}
    backend, arguments = _server(folder, server) if server else _weights(folder, dtype, trust_remote_code)
    if not server and not all(_generates(task, manager) for task in shots):
        _check_measurable(load_config(folder, trust_remote_code=trust_remote_code))
    # made from Python, lm-eval's `hf` wants a GPU unless told otherwise
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run_with = arguments | ({} if server else {"trust_remote_code": trust_remote_code, "device": device})
    if run_code:
        # `code_eval` asks once more
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"

    model = None
    with sole_writer(out, "bench", [glob.escape(files[task].name) for task in shots if task not in found]):
        for task, number in shots.items():
            if task in found:
                continue
            model = model or get_model(backend)(**run_with, batch_size=batch_size)
            start = time.monotonic()
            with names_task(task, strange):
                evaluated = simple_evaluate(
                    model,
                    tasks=[task],
                    task_manager=manager,
                    num_fewshot=number,
                    batch_size=batch_size,
                    limit=limit,
                    apply_chat_template=chat,
                    confirm_run_unsafe_code=run_code,
                    **seeds,
                )
            command = _command(task, backend, arguments, settings[task], include, run_code)
            found[task] = _result(task, evaluated) | {"settings": settings[task], "command": command}
            found[task] |= {"seconds": time.monotonic() - start, "answers": bench_changes.answers(task, evaluated)}
            if _runs_code(task, manager):
                ours = task in local_tasks.NAMES
                found[task]["sandbox"] = sandbox.confinement() if ours else "none: lm-eval runs the code itself"
            write_whole(files[task], json.dumps(found[task], indent=2) + "\n")
    return {task: found[task] for task in shots}


def files_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the name of the result file of every task of some suites or tasks."""
    return file_names(dict.fromkeys(task for name in names for task in SUITES.get(name, Suite((name,))).tasks))


def mmlu_means(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the accuracy in each group of MMLU whose subjects are all there: the plain mean, as Wu et al. have it.

    With all subjects there, "all" is the mean over the 57.
    """
    means = {}
    for group, subjects in (MMLU_GROUPS | {"all": sorted(sum(MMLU_GROUPS.values(), []))}).items():
        if all(f"mmlu_{subject}" in results for subject in subjects):
            means[group] = fmean(results[f"mmlu_{s}"]["scores"][f"mmlu_{s}"]["acc,none"]["value"] for s in subjects)
    return means


def skills_mean(results: dict[str, dict[str, Any]], mt_bench: float) -> float:
    """Returns the summary of Mixture-of-Skills (Wu et al., 2024): the mean of MMLU in per cent and ten times MT-Bench.

    Args:
        results: As `run_suite` returns them, with all subjects of MMLU.
        mt_bench: Mean grade, between 1 and 10.
    """
    return (100 * mmlu_means(results)["all"] + 10 * mt_bench) / 2


def read_mt_bench(path: Path, names: Iterable[str]) -> float:
    """Reads a mean grade to summarise with MMLU.

    Args:
        path: `results.json` of `ultrafuser judge`.
        names: Of the suites that are to be run.

    Raises:
        ValueError: If the file holds no grade, or not all subjects of MMLU are to be run.
    """
    needed = [f"mmlu_{group}" for group in MMLU_GROUPS]
    if missing := set(needed) - set(names):
        raise ValueError(
            f"The mean of MMLU and MT-Bench needs all subjects of MMLU, but {sorted(missing)} are not among the suites. "
            f"Name {' '.join(needed)}: what is finished in the output folder is not run again."
        )
    score = read_results(path).get("score")
    if score is None:
        raise ValueError(
            f"MT-Bench grades answers, but {str(path)!r} holds no mean grade. Pass what `ultrafuser judge --questions "
            f"mt_bench` wrote."
        )
    return score


def _task_manager(tasks: Iterable[str], include: str | Path | None) -> TaskManager:
    # lm-eval's own index takes many seconds to build
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if all(task in manager.all_tasks for task in tasks):
            return manager
    return TaskManager(include_path=None if include is None else str(include))


def _check_names(tasks: Iterable[str], manager: TaskManager) -> None:
    known = {*SUITES, *manager.all_tasks}
    for task in tasks:
        if task in local_tasks.NAMES and task not in known:
            raise ValueError(
                f"The local tasks are made from the corpora first, but {task!r} is not in `include`. Write them with "
                f"`local_tasks.write(folder)` and give `include=folder`; `ultrafuser bench` does both."
            )
        if task not in known:
            close = difflib.get_close_matches(task, known, n=4)
            raise ValueError(
                f"A benchmark is one of our suites, {sorted(SUITES)}, or a task of lm-eval, but {task!r} is neither. "
                + (f"Close to it are {close}." if close else "`lm-eval ls tasks` lists lm-eval's.")
            )


def _check_nothing_runs_code(tasks: Iterable[str], manager: TaskManager) -> None:
    if unsafe := [task for task in tasks if _runs_code(task, manager)]:
        raise ValueError(
            f"Code that a model wrote is executed only when asked for, but {unsafe} do so. Set `--run-code` "
            f"(`run_code=True`), preferably in a container, or leave them out."
        )


def _runs_code(task: str, manager: TaskManager) -> bool:
    return any(manager.task_index[t].cfg.get("unsafe_code") for t in _leaves(task, manager))


def _generates(task: str, manager: TaskManager) -> bool:
    # others compare the likelihoods of choices
    return all(manager.task_index[t].cfg.get("output_type") == "generate_until" for t in _leaves(task, manager))


def _check_measurable(config: Any) -> None:
    if isinstance(config, UltraFuserConfig):
        check_loss(config)


def file_names(tasks: Iterable[str]) -> dict[str, str]:
    """Returns a file name for each task: its name, or where that would lead elsewhere or is taken, one with a fingerprint."""
    names = {}
    for task in tasks:
        taken = {name.lower() for name in names.values()}
        plain = re.fullmatch(r"\w[\w.-]{0,80}", task) and f"{task}.json".lower() not in taken
        names[task] = f"{task if plain else f'{slug(task)[:40]}_{digest(task)}'}.json"
    return names


def _leaves(part: str | dict, manager: TaskManager, above: tuple = ()) -> Iterator[str]:
    # single tasks of a task, a group, a tag, or of what stands within a group
    if part in above:
        raise ValueError(f"A group holds tasks, but {part!r} holds itself. Correct its file.")
    entry = manager.task_index.get(part) if isinstance(part, str) else None
    if part in manager.all_subtasks:
        yield part
    elif part in manager.all_tags:
        yield from entry.tags
    elif inside := entry.cfg["task"] if entry else isinstance(part, dict) and part.get("task"):
        for one in [inside] if isinstance(inside, str) else inside:
            yield from _leaves(one, manager, (*above, part))


def _finished(file: Path, settings: dict) -> dict[str, Any] | None:
    if not file.exists():
        return None
    result = read_json(file)
    if not isinstance(result.get("settings"), dict):
        raise ValueError(
            f"Nothing is overwritten unasked, but {str(file)!r} is there and no result of a benchmark. Use another "
            f"`out`, or move it away."
        )
    if differing := {k: (result["settings"].get(k), v) for k, v in settings.items() if result["settings"].get(k) != v}:
        raise ValueError(
            f"Results of one folder are of one model and one setting, so that they can be compared, but {str(file)!r} "
            f"has (there, now) {differing}. Use another `out`, or remove the file."
        )
    return result


def _weights(folder: str | Path, dtype: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    # a model of lm-eval's, and what it is made from
    with refusing_code(folder):
        config = load_config(folder, trust_remote_code=trust_remote_code)
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
    # only where this package is not imported does a fused model need code from its folder
    told = trust_remote_code or isinstance(config, UltraFuserConfig)
    return "hf", {"pretrained": str(folder), "trust_remote_code": told, "dtype": dtype}


def _server(folder: str | Path, server: str) -> tuple[str, dict[str, Any]]:
    check_address(server)
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as answer:
        served = json.load(answer)["data"][0]
    arguments = {"model": served["id"], "base_url": f"{server}/v1/completions", "tokenizer": str(folder)}
    # vLLM says how long a prompt may be; longer ones are refused, not cut
    # lm-eval would send OpenAI's key to any server
    os.environ.pop("OPENAI_API_KEY", None)
    arguments |= {"max_length": served["max_model_len"]} if "max_model_len" in served else {}
    return "local-completions", arguments | {"tokenizer_backend": "huggingface"}


def _command(task: str, backend: str, arguments: dict, settings: dict, include, run_code: bool) -> str:
    options = {"model": backend, "model_args": ",".join(f"{k}={v}" for k, v in arguments.items()), "tasks": task}
    options |= {"batch_size": settings["batch_size"], "seed": settings["seed"], "num_fewshot": settings["shots"]}
    options |= {"limit": settings["limit"], "include_path": include}
    flags = ["--apply_chat_template"] * settings["chat"] + ["--confirm_run_unsafe_code"] * run_code
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    return " ".join(["lm_eval", *given, *flags])


def _result(task: str, evaluated: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a task's results that is kept: its scores, or those of the group and of all its tasks."""
    scores = {}
    for name, row in evaluated["results"].items():
        metrics = [key for key in row if "," in key and "_stderr," not in key]
        stderr = {key: row.get(key.replace(",", "_stderr,")) for key in metrics}
        # lm-eval says "N/A" where there is none
        numbers = {key: value if isinstance(value, float) else None for key, value in stderr.items()}
        scores[name] = {key: {"value": float(row[key]), "stderr": numbers[key]} for key in metrics}
    result = {"task": task, "scores": scores} | provenance()
    result["versions"] |= {"lm_eval": evaluated["lm_eval_version"], "tasks": evaluated["versions"]}
    return result | {"samples": {name: number["effective"] for name, number in evaluated["n-samples"].items()}}
