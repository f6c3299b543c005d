"""Decoding with the whole step as one compiled graph."""

from transformers import CompileConfig


def compiled() -> dict:
    """Options for `generate` that compile each step, all specialists, gate and head, over a static key-value cache.

        model.generate(**inputs, **compiled())

    For ordinary and for stacked models, greedily or sampling. On a GPU the library does this by itself for any static
    cache; on a CPU it has to be told, and a C++ compiler must be there. The first call compiles, for seconds to minutes:
    a stacked model's graph is as long as one specialist's. A longer text than any before compiles again, unless
    `max_cache_len` was large enough from the start.
    """
    config = CompileConfig(fullgraph=True, mode="default", dynamic=False)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}
