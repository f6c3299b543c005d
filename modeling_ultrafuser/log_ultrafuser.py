"""Lines that tell the user what was decided."""

from transformers.utils import logging


logger = logging.get_logger(__name__)


def print_line(line: str) -> None:
    """Tells the user what was decided on the way, once, at the library's own verbosity."""
    logger.warning(line)
