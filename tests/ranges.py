"""Runs the test suite on the oldest or the newest libraries that `setup.cfg` admits, in an environment of its own.

python tests/ranges.py oldest
python tests/ranges.py newest
"""

import argparse
import configparser
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).parent.parent
LIBRARIES = ("transformers", "trl", "peft")


def requirements(end: str) -> list[str]:
    """Pins of the three libraries at one end of their ranges, as pip takes them."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    ranges = {re.split("[><=]", line)[0]: line for line in lines}
    if end == "newest":
        return [ranges[name] for name in LIBRARIES]
    return [f"{name}~={re.search('>=([0-9.]+)', ranges[name])[1]}.0" for name in LIBRARIES]


def torch_pin() -> str:
    """The tested torch: installed first, so that nothing else chooses its build."""
    return next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def main() -> None:
    """Makes the environment, shows what is in it, and runs pytest there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=["oldest", "newest"])
    parser.add_argument("pytest", nargs="*", help="passed on to pytest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = os.path.join(folder, "bin", "python")
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, torch_pin()], check=True)
        subprocess.run([*install, "--editable", f"{ROOT}[test]", *requirements(arguments.end)], check=True)
        names = ", ".join(LIBRARIES)
        versions = f"import {names}; print(*(f'{{m.__name__}} {{m.__version__}}' for m in ({names})))"
        subprocess.run([python, "-c", versions], check=True)
        command = [python, "-m", "pytest", "-q", "-n", "2", "-m", "unit or e2e or process", *arguments.pytest]
        sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
