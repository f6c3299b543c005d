"""Checks that lm-eval gives a model the same scores through transformers and through vLLM's OpenAI server.

    python tests/vllm/scores.py QUICKSTART [--write]

QUICKSTART is the folder that `ultrafuser quickstart` wrote: its fused model and each specialist answer the local
benchmarks (`ultrafuser/evaluation/local_tasks.py`) both ways, in float32. vLLM's own virtual environment is made as by
`tests/vllm/check_vllm.py`. A run that was killed goes on where it was if `--work` is given. Exits with 1 if a score differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # this script's own folder would hide the vllm package

from experiments.tables import scores  # noqa: E402
from tests.vllm.check_vllm import PACKAGES, environment, server, versions_of  # noqa: E402
from ultrafuser.evaluation import local_tasks  # noqa: E402
from ultrafuser.evaluation.suites import run_suite  # noqa: E402


MODELS = ("fused", "text", "code", "math")
WAYS = ("hf", "vllm")
RESULTS = ROOT / "results" / "lm_eval"


def main() -> None:
    """Runs everything and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="of vLLM; made if it is not there")
    parser.add_argument("--work", type=Path, help="folder for what can be kept if the run is killed")
    parser.add_argument("--write", action="store_true", help="write results/lm_eval/")
    options = parser.parse_args()
    python = environment(options.venv.absolute())
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        tasks = work / "tasks"
        if not tasks.exists():
            seed = json.loads((options.quickstart / "results.json").read_text())["seed"]
            local_tasks.write(tasks, seed)
        models = {name: both_ways(options.quickstart.absolute() / name, tasks, work / name, python) for name in MODELS}
    print(scores(models))
    if options.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for name, found in models.items():
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not all(row["hf"] == row["vllm"] for found in models.values() for row in found["scores"].values()))


def both_ways(folder: Path, tasks: Path, out: Path, python: str) -> dict:
    """Scores of one model, by task and way, with where they come from."""
    settings = {"include": tasks, "run_code": True, "dtype": "float32", "seed": 0}
    run_suite(folder, ["local"], out / "hf", **settings)
    files = {way: {task: out / way / f"{task}.json" for task in local_tasks.NAMES} for way in WAYS}
    # a server takes a minute to start
    if not all(file.exists() for file in files["vllm"].values()):
        with server(out, python, folder) as url:
            run_suite(folder, ["local"], out / "vllm", server=url, **settings)
    found = {way: {task: json.loads(file.read_text()) for task, file in files[way].items()} for way in WAYS}
    origin = {key: found["hf"][local_tasks.NAMES[0]][key] for key in ("versions", "commit", "machine")}
    by_task = {task: {way: found[way][task]["scores"][task] for way in WAYS} for task in local_tasks.NAMES}
    samples = {task: found["hf"][task]["samples"][task] for task in local_tasks.NAMES}
    origin["versions"]["tasks"] = {task: found["hf"][task]["versions"]["tasks"][task] for task in local_tasks.NAMES}
    served_with = versions_of(python, PACKAGES)
    return {
        "model": folder.name,
        "seed": 0,
        **origin,
        "served_with": served_with,
        "samples": samples,
        "scores": by_task,
    }


if __name__ == "__main__":
    main()
