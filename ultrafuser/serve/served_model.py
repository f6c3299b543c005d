"""Gives transformers' handlers one model that nothing unloads, and threads that answer at once."""

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context

import anyio
import torch
from transformers import BatchEncoding, ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving import utils

from modeling_ultrafuser import UltraFuserForCausalLM

from ..compat import cancel
from ..route.prompt_route import PromptRoute


AT_ONCE = 8  # requests that are answered at once


class Asked:
    """A request that is being answered.

    Attributes:
        ids: Of its prompt.
        seed: Of its random numbers.
        prior: Weights of the specialists that it asks for. Shape (1, specialists).
        over: Set when nobody waits for the answer any more.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.seed = 0
        self.prior: torch.Tensor | None = None
        self.over = threading.Event()


ASKED: ContextVar[Asked | None] = ContextVar("asked", default=None)


class AbandonedError(Exception):
    """Nobody waits for this answer."""


class FailedError(RuntimeError):
    """The model failed: not the request's fault."""


class OneModel:
    """In place of transformers' manager of models, which loads whatever is asked for."""

    def __init__(self, name: str, model: "ServedModel", tokenizer: "ServedTokenizer"):
        self.force_model, self.model, self.tokenizer = name, model, tokenizer

    def process_model_name(self, name: str) -> str:
        """As it is: there is one revision."""
        return name

    def load_model_and_processor(self, name: str, gguf_file: str | None = None):
        """The model and its tokenizer, whatever the name: the handler has refused all but one."""
        return self.model, self.tokenizer

    def get_model_modality(self, model, processor=None) -> utils.Modality:
        """Text."""
        return utils.Modality.LLM


class ServedTokenizer:
    """A tokenizer that reads nothing anew: the prompt of the request in hand has been read already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer_itself = tokenizer

    def __getattr__(self, name: str):
        return getattr(self.tokenizer_itself, name)

    def __call__(self, *_, return_tensors: str | None = None, **__) -> BatchEncoding:
        """The prompt."""
        ids = ASKED.get().ids
        # continuous batching takes one flat list
        read = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if return_tensors is None:
            return BatchEncoding(read)
        return BatchEncoding({key: [value] for key, value in read.items()}, tensor_type=return_tensors)

    apply_chat_template = __call__


class ServedModel:
    """A model that generates for several requests at once, each with random numbers of its own, until it is over.

    Where layers are run, it is looked whether anybody still waits: a long prompt is not read to its end for nobody.

    Args:
        model: A fused model.
        tokenizer: Its tokenizer.
        decoding: Options of `generate`, for all requests.
        route: Chooses who answers. Default: the gate, token by token.
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        decoding: dict | None = None,
        route: PromptRoute | None = None,
    ):
        self.model, self.tokenizer, self.turn = model, tokenizer, threading.Lock()
        self.decoding, self.route = decoding or {}, route or PromptRoute(model, tokenizer)
        for module in model.model.specialists.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_pre_hook(_go_on)

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def generate(self, **settings):
        """As the model does, or the specialist that is to answer alone.

        Raises:
            AbandonedError: If the request is over.
            FailedError: If the model fails.
        """
        asked = ASKED.get()
        settings |= {"tokenizer": self.tokenizer, **self.decoding}
        own = _OwnNumbers(self.turn, asked.seed, self.model.device)
        if settings["generation_config"].do_sample:
            settings |= {"logits_processor": [own.before], "stopping_criteria": [own.after]}
        try:
            _go_on()
            routed = self.route(settings["input_ids"], settings.get("attention_mask"), asked.prior)
            return routed.model.generate(**settings, **routed.options)
        except AbandonedError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if asked.over.is_set():
                raise AbandonedError from error
            raise FailedError(f"The model failed: {type(error).__name__}.") from error
        finally:
            own.release()


def _go_on(*_) -> None:
    asked = ASKED.get()
    if asked is not None and asked.over.is_set():
        raise AbandonedError


class _OwnNumbers:
    """Puts a request's random state in place while its next token is drawn: torch has one for all threads."""

    def __init__(self, turn: threading.Lock, seed: int, device: torch.device):
        self.turn, self.held = turn, False
        self.random = torch.random if device.type == "cpu" else torch.get_device_module(device)
        self.state = torch.Generator(device).manual_seed(seed).get_state()

    def before(self, input_ids, scores):
        """Begins the request's turn, as a logits processor."""
        # where a draft is checked, several times before a token is drawn
        if not self.held:
            self.turn.acquire()
            self.held = True
            self.random.set_rng_state(self.state)
        return scores

    def after(self, input_ids, scores, **_):
        """Ends it, as a stopping criterion that stops nothing."""
        self.state = self.random.get_rng_state()
        self.release()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def release(self) -> None:
        """Lets others draw."""
        if self.held:
            self.held = False
            self.turn.release()


class Threads(utils.GenerateManager):
    """Answers several requests at once, each in a thread: a long one does not hold the others up."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="answering")

    def submit(self, fn: Callable, *args, **kwargs):
        """Runs a function for the request in hand, when its turn comes."""
        return self.pool.submit(copy_context().run, fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args, **kwargs) -> asyncio.Future:
        """Likewise, to be awaited."""
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def stop(self) -> None:
        """Answers nobody else."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class Batches(utils.CBGenerateManager):
    """Continuous batching, which lets go of requests that nobody waits for."""

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id: str):
        """As the library does."""
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            cancel(self, request_id)
            raise


class State(utils.GenerationState):
    """Has one manager, for the one model.

    Attributes:
        inside: Number of requests that are being answered or wait.
        readers: How many prompts are read at once.
    """

    def __init__(self, model: UltraFuserForCausalLM, continuous_batching: bool = False):
        super().__init__(continuous_batching=continuous_batching)
        self.inside, self.readers = 0, anyio.CapacityLimiter(2)
        self.manager = Batches(_blocks(model)) if continuous_batching else Threads()
        if continuous_batching:
            # else the first request would choose sampling for all others
            self.manager.init_cb(model, GenerationConfig(**{**model.generation_config.to_dict(), "use_cache": False}))

    def get_manager(self, model_id: str, use_cb: bool = False) -> utils.BaseGenerateManager:
        """Returns the manager that generates."""
        return self.manager

    def is_cb_alive(self) -> bool:
        """Returns whether the manager still runs."""
        return not isinstance(self.manager, Batches) or self.manager.is_alive()

    def shutdown(self) -> None:
        """Ends what answers."""
        self.manager.stop()


def _blocks(model: UltraFuserForCausalLM) -> ContinuousBatchingConfig | None:
    """Returns the settings of the paged cache. On a GPU transformers fits it to the memory; on a CPU it would take all."""
    if model.device.type != "cpu":
        return None
    blocks = math.ceil((model.config.max_position_embeddings or 0) / ContinuousBatchingConfig().page_size)
    return ContinuousBatchingConfig(num_blocks=AT_ONCE * (1 + blocks), max_batch_tokens=512)
