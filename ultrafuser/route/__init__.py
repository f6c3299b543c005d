"""Chooses specialists for a whole request, from its prompt. All routers by name."""

from .router_base import Router
from .router_fitted import FittedRouter
from .router_nearest import NearestRouter
from .router_perplexity import PerplexityRouter
from .router_states import StatesRouter
from .router_table import TableRouter
from .router_words import WordsRouter


ROUTERS: dict[str, type[Router]] = {
    "perplexity": PerplexityRouter,
    "fitted": FittedRouter,
    "words": WordsRouter,
    "table": TableRouter,
    "states": StatesRouter,
    "nearest": NearestRouter,
}
