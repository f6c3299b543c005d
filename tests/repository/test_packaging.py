"""What is installed: every file of the packages that git tracks, and no other."""

import fnmatch
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

import pytest


ROOT = Path(__file__).parents[2]
PACKAGES = ("modeling_ultrafuser", "trainers", "ultrafuser")


def tracked(*folders):
    names = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [PurePosixPath(name) for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    return tracked(*PACKAGES)


def test_every_folder_with_modules_is_a_package(files):
    """Folders without `__init__.py` are left out of a wheel, and `.gitignore` can swallow one unseen."""
    modules = {path for path in files if path.suffix == ".py"}
    folders = {folder for path in modules for folder in path.parents} - {PurePosixPath(".")}
    assert not {folder for folder in folders if folder / "__init__.py" not in modules}


def test_every_other_file_is_package_data(files):
    package = ConfigParser()
    package.read(ROOT / "setup.cfg")
    endings = [pattern.removeprefix("**/") for pattern in package["options.package_data"]["ultrafuser"].split()]
    others = [path for path in files if path.suffix != ".py"]
    assert others
    assert not [path for path in others if not any(fnmatch.fnmatch(path.name, ending) for ending in endings)]


@pytest.mark.slow
def test_a_wheel_holds_the_files_of_the_packages_and_the_command(files, tmp_path):
    for path in tracked():
        target = tmp_path / "source" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("ultrafuser-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {PurePosixPath(name) for name in archive.namelist()}
        described = {path for path in held if path.parts[0].endswith(".dist-info")}
        assert held - described == set(files)
        (entry_points,) = (path for path in described if path.name == "entry_points.txt")
        assert b"ultrafuser = ultrafuser.cli" in archive.read(str(entry_points))
