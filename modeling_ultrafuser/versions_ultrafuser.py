"""Names that differ between versions of transformers, in one place."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast


OLD_CACHE = "past_key_values"
# from 5.24 on it is "cache", as an argument and in outputs
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", OLD_CACHE))


def takes_cache(method: Callable) -> Callable:
    """Lets a method with an argument `past_key_values` be given it as `cache`, where that is the library's name.

    The pages of continuous batching always came as `cache`, beside it, and still do.
    """
    if CACHE == OLD_CACHE:
        # engines compile the method by its own code
        return method

    @wraps(method)
    def taking(*args, **kwargs):
        if "cache" in kwargs and not isinstance(kwargs["cache"], PagedAttentionCache):
            kwargs[OLD_CACHE] = kwargs.pop("cache")
        return method(*args, **kwargs)

    signature = inspect.signature(method)
    parameters = [p.replace(name=CACHE) if p.name == OLD_CACHE else p for p in signature.parameters.values()]
    taking.__signature__ = signature.replace(parameters=parameters)
    return taking
