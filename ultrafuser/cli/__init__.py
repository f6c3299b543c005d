"""The command line: `ultrafuser --help`."""

from .app import main


__all__ = ["main"]
