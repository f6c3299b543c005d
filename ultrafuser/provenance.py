"""Records the origin of numbers."""

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def provenance() -> dict:
    """Versions, commit and machine, as every result file has them."""
    return {"versions": versions(), "commit": commit(), "machine": machine()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that numbers depend on."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "ultrafuser")}
    return {"python": platform.python_version(), **libraries}


def machine() -> dict[str, str | int]:
    """The kind of machine: its GPU, or that it has none, and its cores."""
    # heavy, and not needed to say the rest
    import torch

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"kind": kind, "cores": os.cpu_count()}


def commit() -> str | None:
    """The commit of this code, with a + if a file differs from it. None where it is installed without its history."""
    folder = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        asked = ["git", *arguments, "--", "modeling_ultrafuser", "trainers", "ultrafuser", "experiments"]
        return subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None


def weights_digest(folder: Path) -> str | None:
    """A fingerprint of a folder's files of weights, None without any: one trained on, or saved anew, has another.

    A file, such as a GGUF, stands for itself.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return digest(found) if found else None


def digest(value, length: int = 16) -> str:
    """Returns a fingerprint of anything that JSON can hold, in hexadecimal digits, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
