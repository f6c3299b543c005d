"""Runs transformers' own common model tests against fused models, beside plain Llama as control.

    python tests/common/check_common.py

It downloads the source distribution of the installed transformers (the wheel holds no tests), puts its test files into
a temporary folder, adds what they need and the distribution leaves out, runs them against two fused models and a plain
Llama, and compares: a fused model may fail nothing that the control passes, except what `not_for_composites.txt` lists
with a reason. Needs pytest, parameterized and a package index. Nothing that it downloads belongs into this repository.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import transformers


HERE = Path(__file__).resolve().parent
CONTROL = "LlamaTest"
COMPOSITES = ("TwoLlamasTest", "MixedPairTest")
# seven follow from an embedding for each specialist or parts told apart by name, three from the promise that no tensor is
# made up
MOST_EXCEPTIONS = 10
# The rest is for tokenizers, processors, vision and mixtures of experts, or needs checkpoints from the Hub: pipelines,
# decision heads and ExecuTorch.
TEST_FILES = (
    *("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py"),
    *("test_tensor_parallel_mixin.py", "test_fsdp_mixin.py"),
)
# what those files import and the distribution leaves out
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'num_labels': 7}\n",
}
SETTINGS = "[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = ignore::pytest.PytestUnknownMarkWarning\n"

Outcomes = dict[str, dict[str, tuple[str, str]]]


def main() -> int:
    """Runs the tests and prints the comparison. Returns 0 if the composites fail nothing that they should pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the download and the report here, for the next time")
    parser.add_argument("-k", dest="pattern", help="only tests whose names match, as for pytest")
    options = parser.parse_args()

    start = time.time()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        unpack(sdist(folder), folder / "tests")
        outcomes = run(folder, options.pattern)
    allowed = exceptions()
    print(f"\nCommon model tests of transformers {transformers.__version__}, {time.time() - start:.0f} s\n")
    print_table(outcomes, allowed)
    print_skipped(outcomes)
    complaints = compare(outcomes, allowed)
    if options.pattern is None:
        complaints += incomplete(outcomes, allowed)
    print("", *complaints or ["Every failure that the control does not have is listed with a reason."], sep="\n")
    return 1 if complaints else 0


def sdist(folder: Path) -> Path:
    """Downloads the source distribution of the installed transformers into `folder`, unless it is there."""
    name = f"transformers-{transformers.__version__}.tar.gz"
    if not (folder / name).exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        requirement = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "--no-binary", "transformers", "--dest", str(folder), requirement], check=True)
    return folder / name


def unpack(archive: Path, package: Path) -> None:
    """Makes a `tests` package out of the distribution's test files, our stand-ins and our testers."""
    shutil.rmtree(package, ignore_errors=True)
    for name, text in STAND_INS.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    with tarfile.open(archive) as tar:
        for name in TEST_FILES:
            member = tar.extractfile(f"transformers-{transformers.__version__}/tests/{name}")
            (package / name).write_bytes(member.read())
    shutil.copy(HERE / "distributed_stand_in.py", package / "distributed_testing_utils.py")
    shutil.copy(HERE / "ultrafuser_tester.py", package / "test_ultrafuser.py")
    (package.parent / "pytest.ini").write_text(SETTINGS)


def run(folder: Path, pattern: str | None) -> Outcomes:
    """Runs the testers. Returns (outcome, message) of every test of every tester."""
    results = folder / "results.xml"
    results.unlink(missing_ok=True)
    path = os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    # tiny models, and tests of several processes: more threads would only wait for each other
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/test_ultrafuser.py", "-q", "--tb=short", f"--junitxml={results}"]
    status = subprocess.run([*command, *(["-k", pattern] if pattern else [])], cwd=folder, env=environment).returncode
    if status not in (0, 1):  # neither all passed nor some failed
        sys.exit(f"pytest did not get through the tests: its exit status is {status}.")
    return read(results)


def read(results: Path) -> Outcomes:
    """Reads pytest's report, where a test with subtests stands once for each of them: one that fails decides."""
    outcomes = {name: {} for name in (CONTROL, *COMPOSITES)}
    for case in ElementTree.parse(results).iter("testcase"):
        of_class, name = outcomes[case.get("classname").rpartition(".")[2]], case.get("name")
        problem = next((e for e in case if e.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        if of_class.get(name, ("",))[0] != "failed":
            of_class[name] = (outcome, "" if problem is None else problem.get("message", "").strip())
    return outcomes


def exceptions() -> dict[str, str]:
    """Tests that make no sense for a composite, with the reason. One "name: reason" per line."""
    lines = (HERE / "not_for_composites.txt").read_text().splitlines()
    pairs = (line.partition(": ") for line in lines if line and not line.startswith("#"))
    return {name: reason.strip() for name, _, reason in pairs}


def compare(outcomes: Outcomes, allowed: dict[str, str]) -> list[str]:
    """Prints every failure that the control does not have. Returns those that are not allowed."""
    complaints = []
    for name in COMPOSITES:
        for test, (outcome, message) in sorted(outcomes[name].items()):
            if outcome == "failed" and outcomes[CONTROL].get(test, ("absent",))[0] != "failed":
                print(f"\n{name}.{test}\n    {allowed.get(test) or message}")
                if test not in allowed:
                    complaints.append(f"FAILED and not listed: {name}.{test}")
    return complaints


def incomplete(outcomes: Outcomes, allowed: dict[str, str]) -> list[str]:
    """What would make a good result worthless: testers that ran nothing, exceptions without need, too many of them."""
    complaints = [f"{name} ran no test" for name, tests in outcomes.items() if not tests]
    failed = {t for name in COMPOSITES for t, (outcome, _) in outcomes[name].items() if outcome == "failed"}
    complaints += [f"{t} is listed as an exception but does not fail" for t in allowed if t not in failed]
    complaints += [f"{t} is listed as an exception without a reason" for t, reason in allowed.items() if not reason]
    if len(allowed) > MOST_EXCEPTIONS:
        complaints.append(f"{len(allowed)} exceptions are listed, at most {MOST_EXCEPTIONS} are allowed")
    return complaints


def print_table(outcomes: Outcomes, allowed: dict[str, str]) -> None:
    print(f"{'':16}{'passed':>8}{'failed':>8}{'of these listed':>17}{'skipped':>9}")
    for name, tests in outcomes.items():
        counts = Counter(outcome for outcome, _ in tests.values())
        listed = sum(outcome == "failed" and test in allowed for test, (outcome, _) in tests.items())
        print(f"{name:16}{counts['passed']:8}{counts['failed']:8}{listed:17}{counts['skipped']:9}")


def print_skipped(outcomes: Outcomes) -> None:
    """Prints what only a composite skips: a test that skips itself proves nothing."""
    for name in COMPOSITES:
        for test, (outcome, message) in sorted(outcomes[name].items()):
            if outcome == "skipped" and outcomes[CONTROL].get(test, ("skipped",))[0] != "skipped":
                print(f"\n{name}.{test} skipped itself, the control does not\n    {message}")


if __name__ == "__main__":
    sys.exit(main())
