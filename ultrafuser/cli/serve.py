"""Commands that put a fused model to use."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..decoding import EVERY, KEEP
from ..plain import Console, echo
from ..strategies import FUSION_HELP, SPARSIFIER_HELP
from .arguments import Model
from .group import Group


Host = Annotated[str, Option(help="Address to listen on.")]
AllowHost = Annotated[
    list[str] | None, Option(help="Further name under which the server may be asked for; may be given again.")
]
AllowOrigin = Annotated[
    list[str] | None, Option(help="Web page that may ask, https://example.org; may be given again.")
]
KeyVariable = Annotated[str, Option(help="Environment variable of the key that clients must send.")]
WithoutKey = Annotated[bool, Option("--without-key", help="Let others than this machine ask without a key.")]
KEY_VARIABLE = "ULTRAFUSER_KEY"
Decoding = Annotated[
    str, Option(help="plain; stacked; auto: what of these is faster, by measurement; or dropping, with other tokens.")
]
Keep = Annotated[
    str | None,
    Option(
        help="Dropping: specialists that predict until the next decision, by the gate's mean weights. "
        f"{SPARSIFIER_HELP} Default: {KEEP}."
    ),
]
Every = Annotated[
    int | None,
    Option(
        min=1,
        help=f"Dropping: tokens from one decision to the next. Fewer for texts that change their domain. Default: {EVERY}.",
    ),
]

Fusion = Annotated[str | None, Option(help=f"Read the model by this fusion rule. {FUSION_HELP} Default: its own.")]
Router = Annotated[
    str | None,
    Option(
        help="Weighs the specialists for a whole request: a folder that `ultrafuser route` wrote, or perplexity:1.0, by how well "
        "each predicts the prompt."
    ),
]
Alone = Annotated[bool, Option("--alone", help="The specialist that the router weighs most answers alone.")]

group = Group("Use")


@group.command()
def chat(
    model: Model,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 512,
    decoding: Decoding = "plain",
    keep: Keep = None,
    every: Every = None,
    router: Router = None,
    alone: Alone = False,
    fusion: Fusion = None,
) -> None:
    """Chat in the terminal, every token coloured by the specialist that leads. Or pipe one prompt per line into it.

    Example: ultrafuser chat fused
    """
    from ..pretrained import open_fused
    from ..route.prompt_route import PromptRoute
    from ..serve.chat import Chat, typed
    from ..serve.decode_benchmark import check_streamed, for_streaming

    _check_alone(router, alone, decoding)
    dropping = check_streamed(decoding, keep=keep, every=every)
    console = Console()
    fused, tokenizer = open_fused(model, **({"fusion": fusion} if fusion else {}))
    able, settings = for_streaming(fused, tokenizer, decoding, dropping)
    route = PromptRoute(able, tokenizer, router, alone=alone)
    conversation = Chat(able, tokenizer, console, max_new_tokens=max_new_tokens, route=route, settings=settings)
    conversation.run(typed(console) if sys.stdin.isatty() else sys.stdin)


@group.command()
def speed(
    model: Model,
    prompt: Annotated[
        list[str] | None, Option(help="Example prompt to measure with; repeat it to form a batch.")
    ] = None,
    new_tokens: Annotated[int, Option(min=8, help="Tokens to generate for each prompt.")] = 64,
    compile_steps: Annotated[
        bool, Option("--compile", help="Also measure strategies that compile (takes minutes).")
    ] = False,
    assistant: Annotated[str | None, Option(help="Small model of the same tokenizer, to draft.")] = None,
    keep: Keep = None,
    every: Every = None,
) -> None:
    """Benchmark every decoding strategy on this machine, beside each specialist alone.

    Example: ultrafuser speed fused --prompt "def area(width, height):"
    """
    from ..pretrained import open_fused
    from ..serve import decode_benchmark

    decode_benchmark.check_keep(keep)
    dropping = {name: given for name, given in (("keep", keep), ("every", every)) if given is not None}
    fused, tokenizer = open_fused(model)
    prompts = prompt or [decode_benchmark.PROMPT]
    settings = {"compile_steps": compile_steps, "assistant": assistant, "dropping": dropping}
    alone, found = decode_benchmark.measure_decoding(fused, tokenizer, prompts, new_tokens=new_tokens, **settings)
    Console().print(decode_benchmark.table(fused, alone, found))
    for way, reason in found.left_out.items():
        echo(f"Not {way}: {reason}")
    echo(
        f"In Python, the fastest: model, options = ultrafuser.decoding.choosing.decoder(model, {found.fastest!r}); "
        f"model.generate(**inputs, **options)"
    )


@group.command(extra="serve")
def serve(
    folder: Annotated[str, Argument(help="Folder of a fused model: its name in requests.")],
    host: Host = "localhost",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    key_variable: KeyVariable = KEY_VARIABLE,
    without_key: WithoutKey = False,
    device: Annotated[str, Option(help="auto, cpu, cuda:0 and so on.")] = "auto",
    dtype: Annotated[str, Option(help="dtype of the weights. Default: as saved.")] = "auto",
    attn_implementation: Annotated[str | None, Option(help="sdpa, eager, flash_attention_2 and so on.")] = None,
    continuous_batching: Annotated[
        bool, Option("--continuous-batching", help="One paged cache for all requests; sampling is the model's own.")
    ] = False,
    decoding: Decoding = "plain",
    keep: Keep = None,
    every: Every = None,
    router: Router = None,
    alone: Alone = False,
    fusion: Fusion = None,
    chat_template_kwargs: Annotated[
        str | None, Option(help="""JSON, variables of the chat template: '{"enable_thinking": false}'.""")
    ] = None,
) -> None:
    """Serve one fused model behind OpenAI's protocol, with transformers' handlers. Nobody can make it load another.

    Example: ultrafuser serve fused --port 8000
    """
    from transformers.utils import logging

    from ..pretrained import open_fused
    from ..route.prompt_route import PromptRoute
    from ..serve.decode_benchmark import check_streamed, for_streaming
    from ..serve.guard import Access, check_free, host_names, key_for, run
    from ..serve.request_fields import template_variables
    from ..serve.server import application

    if continuous_batching and (decoding != "plain" or router):
        other = f"--router {router}" if router else f"--decoding {decoding}"
        raise ValueError(
            f"With --continuous-batching a paged cache is decoded by transformers' engine, but got {other}. Leave one of them "
            f"out."
        )
    _check_alone(router, alone, decoding)
    dropping = check_streamed(decoding, keep=keep, every=every)
    key = key_for(host, key_variable, without_key)
    check_free(host, port)
    access = Access(host_names(host, allow_host or ()), allow_origin or (), key)
    variables = template_variables(chat_template_kwargs)
    loading = {"device_map": device, "dtype": dtype}
    if attn_implementation is not None:
        loading["attn_implementation"] = attn_implementation
    if fusion is not None:
        loading["fusion"] = fusion
    logging.set_verbosity_error()
    fused, tokenizer = open_fused(folder, **loading)
    fused, options = for_streaming(fused, tokenizer, decoding, dropping)
    settings = {"continuous_batching": continuous_batching, "template_variables": variables, "decoding": options}
    settings["route"] = PromptRoute(fused, tokenizer, router, alone=alone)
    app = application(fused, tokenizer, folder, access, **settings)
    echo(f"Serving {folder!r} at http://{host}:{port}/v1. End it with Ctrl-C.")
    run(app, host, port)


def _check_alone(router: str | None, alone: bool, decoding: str) -> None:
    """Rejects one specialist that answers alone where nobody chooses it, or where it is to be decoded like several."""
    if alone and (router is None or decoding != "plain"):
        other = "no --router" if router is None else f"--decoding {decoding}"
        raise ValueError(
            f"With --alone the specialist that a router chooses is decoded as any model, but got {other}. Name a router, and "
            f"leave --decoding out."
        )


@group.command(extra="demo")
def demo(
    model: Model,
    host: Host = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    key_variable: KeyVariable = KEY_VARIABLE,
    without_key: WithoutKey = False,
) -> None:
    """A web page to chat with a fused model, coloured by who speaks, with sliders that steer the gate.

    Example: ultrafuser demo fused --port 7860
    """
    from ..pretrained import open_fused
    from ..serve import demo as web
    from ..serve.guard import Access, check_free, host_names, key_for, run

    key = key_for(host, key_variable, without_key)
    check_free(host, port)
    access = Access(host_names(host, allow_host or ()), allow_origin or (), key)
    name = Path(model).resolve().name if Path(model).exists() else model
    page = web.application(*open_fused(model), name, access)
    echo(f"Open http://{host}:{port}. End it with Ctrl-C.")
    run(page, host, port)
