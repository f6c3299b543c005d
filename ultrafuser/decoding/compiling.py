"""Decoding with the whole step as one compiled graph."""

from transformers import CompileConfig

from ..compat import compile_on_any_device


def compiled(cpp_wrapper: bool = False) -> dict:
    """Options for `generate` that compile each step, all specialists, gate and head, over a static key-value cache.

        model.generate(**inputs, **compiled())

    For ordinary and for stacked models, greedily or sampling. On a GPU the library does this by itself for any static
    cache; on a CPU it has to be told, and a C++ compiler must be there. The first call compiles, for seconds to minutes:
    a stacked model's graph is as long as one specialist's. A longer text than any before compiles again, unless
    `max_cache_len` was large enough from the start.

    Args:
        cpp_wrapper: Whether what calls the kernels is compiled, too. Small models' steps become a fifth shorter, and
            compiling takes several times as long: for servers.
    """
    how = {"mode": None, "options": {"cpp_wrapper": True}} if cpp_wrapper else {"mode": "default"}
    config = CompileConfig(fullgraph=True, dynamic=False, **how)
    compile_on_any_device(config)
    return {"cache_implementation": "static", "compile_config": config}
