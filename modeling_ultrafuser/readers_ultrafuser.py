"""All readers, and which of them a configuration means."""

from .reader_adapters_ultrafuser import AdapterReader
from .reader_base_ultrafuser import Reader
from .reader_separate_ultrafuser import SeparateReader


READERS: dict[str, type[Reader]] = {
    "separate": SeparateReader,
    "adapters": AdapterReader,
}


def state_widths(config) -> list[int]:
    """Returns the width of each specialist's last hidden states, as the wide head reads them."""
    return [columns.stop - columns.start for columns in reader_of(config).head_columns(config)]


def reader_of(config) -> type[Reader]:
    """Returns the reader of a fused model's specialists. The configuration may still be under construction."""
    return READERS["separate" if config.__dict__.get("adapters") is None else "adapters"]
