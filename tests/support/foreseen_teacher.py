"""A teacher that answers as the plan foresees, without a server."""

import itertools
import json
from collections import Counter, defaultdict

from ultrafuser.data.teacher import Reply


class AsForeseen:
    """A teacher whose replies have the length that the recipe says, and can all be used. Counts."""

    stopped = None

    def __init__(self):
        self.counts, self.numbers = defaultdict(Counter), itertools.count()

    def ask(self, requests):
        for request in requests:
            amounts = {"tokens_in": request.prompt_tokens(), "tokens_out": request.reply_tokens}
            self.counts[request.step, request.domain].update(calls=1, **amounts)
        return [Reply(self.text(request)) for request in requests]

    def text(self, request):
        length = 4 * request.reply_tokens // (request.number or 1)
        items = [f"{next(self.numbers):x}".ljust(length, "x") for _ in range(request.number or 1)]
        return items[0] if request.number is None else json.dumps({"items": items})
