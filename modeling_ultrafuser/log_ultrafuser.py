"""Lines that tell the user what was decided, and bars that tell how far something is."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


logger = logging.get_logger(__name__)


def print_line(line: str) -> None:
    """Tells the user what was decided on the way, once, at the library's own verbosity."""
    logger.warning(line)


@contextmanager
def no_bars() -> Iterator[None]:
    """For what moves tensors within memory and is over at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
