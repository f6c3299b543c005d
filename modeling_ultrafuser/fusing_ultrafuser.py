"""From specialists to a fused model: what is checked, loaded, cut, scaled and probed on the way."""

import copy
import inspect
import os
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from .configuration_ultrafuser import SCALE_FIELDS, UltraFuserConfig, soft_cap
from .gating_ultrafuser import GATES


logger = logging.get_logger(__name__)

# text that tells tokenizers apart which share a vocabulary but split differently
TOKENIZER_PROBE = (
    "def f(x_1):\n    return x_1 ** 2  # naïve 12345 + 6.7e-8\n\tThe Café’s “answer” is 42%. 日本語 🙂 <s> [INST]"
)


def fuse_specialists(
    cls: type[PreTrainedModel],
    specialists: dict[str, str | os.PathLike | PreTrainedModel],
    *,
    gate: str = "mlp",
    fusion: str = "logits",
    dtype: str | torch.dtype = "auto",
    gate_hidden_size: int = 512,
    gate_temperature: float = 1.0,
    revisions: dict[str, str] | None = None,
    device_map=None,
    attn_implementation: str | None = None,
    **hub_kwargs,
) -> PreTrainedModel:
    """Builds a fused model out of specialists. Reached as `UltraFuserForCausalLM.from_specialists`.

    Everything that can be told from configurations and tokenizers is checked before any weight is loaded. Then one
    specialist at a time is loaded, run once on a short input, and refused if its backbone and head, rebuilt as parts
    of the fused model, do not give its own logits.

    Args:
        specialists: Name to Hub id, local folder or model in memory, in the order of the gate's columns. Models in
            memory are copied. For multimodal checkpoints the text part is taken.
        gate: "mlp", "linear", "constant" or "uniform". A new gate gives every specialist the same weight.
        fusion: "logits" or "probabilities".
        dtype: Of the specialists and the head. "auto" takes what all specialists share; required if they differ.
        gate_hidden_size: Width of the hidden layer of the "mlp" gate.
        gate_temperature: Divides the gate's scores before the softmax.
        revisions: Name to branch, tag or commit of its Hub repository. Pin commits for results to be repeatable.
        device_map: Where the fused model goes, as for `from_pretrained`.
        attn_implementation: As for `from_pretrained`; reaches every specialist.
        **hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for `from_pretrained`.

    Returns:
        The fused model in evaluation mode, with a generation configuration merged from the specialists'.

    Raises:
        ValueError: If the specialists cannot be fused, with the rule, what came, and the way out.
        OSError: If a specialist cannot be found or read.
    """
    unknown = set(hub_kwargs) - {"token", "cache_dir", "local_files_only"}
    if unknown:
        raise TypeError(f"from_specialists() got unknown arguments {sorted(unknown)}.")
    if not isinstance(specialists, dict):
        raise TypeError(f"`specialists` must map a name to each specialist, but got {type(specialists).__name__}.")
    names = list(specialists)
    hub = {name: {**hub_kwargs, "revision": (revisions or {}).get(name) or "main"} for name in names}
    if set(revisions or {}) - set(names):
        raise ValueError(f"`revisions` names {sorted(set(revisions) - set(names))}, but specialists are {names}.")
    choices = {
        "gate": gate,
        "gate_hidden_size": gate_hidden_size,
        "gate_temperature": gate_temperature,
        "fusion": fusion,
    }
    if not names:
        raise ValueError("Fusing needs at least two specialists, but got none. Pass {'text': ..., 'code': ...}.")
    # names, their number and the choices are refused before anything is read
    UltraFuserConfig(specialist_names=names, specialists=[_PLACEHOLDER] * len(names), **choices)

    sources = {name: _own_config(name, s, **hub[name]) for name, s in specialists.items()}
    text_configs = {name: copy.deepcopy(c.get_text_config(decoder=True)) for name, c in sources.items()}
    for name, config in text_configs.items():
        _check_architecture(name, sources[name], config)
        if not isinstance(specialists[name], PreTrainedModel):
            _auto_class(name, sources[name])
    vocab_size = min(c.vocab_size for c in text_configs.values())
    dtype = _common_dtype(specialists, sources) if dtype == "auto" else _as_dtype(dtype)
    for name, config in text_configs.items():
        if config.vocab_size > vocab_size:
            print_line(
                f"{name}: {config.vocab_size} vocabulary rows cut to {vocab_size}, the smallest vocabulary among the "
                f"specialists; the {config.vocab_size - vocab_size} rows beyond it are dropped."
            )
        config.vocab_size = vocab_size
        if config.pad_token_id is not None and config.pad_token_id >= vocab_size:
            config.pad_token_id = None
    config = UltraFuserConfig(specialist_names=names, specialists=list(text_configs.values()), **choices)
    tokenizers = {n: _tokenizer(s, **hub[n]) for n, s in specialists.items() if not isinstance(s, PreTrainedModel)}
    for name in [n for n, t in tokenizers.items() if t is None]:
        print_line(f"{name}: its folder holds no tokenizer, so nothing checks that its token ids mean the same.")
        del tokenizers[name]
    if tokenizers:
        _widest_usable_tokenizer(tokenizers, vocab_size)
    generation_config = merged_generation_config(
        {n: _generation_config(s, sources[n], **hub[n]) for n, s in specialists.items()}, vocab_size
    )

    state, head, column = {}, None, 0
    for k, (name, source) in enumerate(specialists.items()):
        model = _load(name, source, sources[name], dtype, **hub[name])
        if dtype is None:
            dtype = model.dtype
        elif model.dtype != dtype:
            raise ValueError(_DTYPE_RULE.format({name: model.dtype, "the others": dtype}))
        backbone_state, columns = _probe(name, model, config.specialists[k], text_configs[name])
        if head is None:
            head = torch.empty(vocab_size, config.hidden_size, dtype=dtype)
        head[:, column : column + columns.shape[1]] = columns
        column += columns.shape[1]
        # a model in memory stays its owner's: training the fused one must not change it
        own = isinstance(source, PreTrainedModel)
        state |= {f"model.specialists.{name}.{key}": t.clone() if own else t for key, t in backbone_state.items()}
        # the columns are a view of the whole head, which must not stay while the next specialist is loaded
        del model, columns
    state["lm_head.weight"] = head
    new_gate = GATES[gate](config)
    new_gate.init_weights()
    state |= {f"model.fusion_gate.{key}": t for key, t in new_gate.state_dict().items()}

    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, field, getattr(generation_config, field))
    config.dtype = dtype
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map=device_map, output_loading_info=True, **extra
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The fused model must hold exactly its specialists' tensors, but {sorted(info['missing_keys'])[:3]} are "
            f"missing and {sorted(info['unexpected_keys'])[:3]} have no place. This is a defect: please report the "
            f"specialists' architectures {[c.model_type for c in config.specialists]}."
        )
    model.generation_config = generation_config
    return model.eval()


def print_line(line: str) -> None:
    """Tells the user what was decided on the way, once, at the library's own verbosity."""
    logger.warning(line)


_PLACEHOLDER = AutoConfig.for_model("llama")
_DTYPE_RULE = (
    "All specialists of a fused model have one dtype, because one head multiplies all their hidden states, but they "
    "are {}. Choose one: dtype=torch.bfloat16, say."
)


def _common_dtype(specialists: dict, configs: dict[str, PreTrainedConfig]) -> torch.dtype | None:
    dtypes = {n: _as_dtype(c.dtype or c.get_text_config(decoder=True).dtype) for n, c in configs.items()}
    # a model in memory may have been cast since its configuration was written
    dtypes |= {n: s.dtype for n, s in specialists.items() if isinstance(s, PreTrainedModel)}
    if len(set(dtypes.values()) - {None}) > 1:
        raise ValueError(_DTYPE_RULE.format(dtypes))
    return next((d for d in dtypes.values() if d is not None), None)


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`dtype` must be 'auto' or a floating point type such as torch.bfloat16, but got {dtype!r}.")
    return found


def _own_config(name: str, source, **hub) -> PreTrainedConfig:
    """The specialist's configuration, or a sentence saying why this is no specialist."""
    if isinstance(source, PreTrainedModel):
        if getattr(source, "quantization_method", None) is not None or getattr(source, "hf_quantizer", None):
            raise ValueError(_quantised(name, "a quantised model in memory"))
        if source.config.model_type == UltraFuserConfig.model_type:
            raise ValueError(_already_fused(name, source.config.specialist_names))
        return source.config
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"A specialist is a Hub id, a local folder or a transformers model, but {name!r} is a "
            f"{type(source).__name__}. A PEFT model must be merged first: `model.merge_and_unload()`."
        )
    source = os.fspath(source)
    if os.path.isfile(source):
        raise ValueError(f"A specialist is a folder or a Hub id, but {name!r} is the file {source!r}.")
    try:
        found = cached_file(source, "config.json", **hub)
    except OSError as error:
        raise _unreadable(name, source, error, **hub) from error
    if found is None:  # a local folder without it
        raise _unreadable(name, source, **hub)
    raw, _ = PreTrainedConfig.get_config_dict(os.path.dirname(found))
    model_type = raw.get("model_type")
    if raw.get("quantization_config"):
        raise ValueError(_quantised(name, repr(source)))
    if model_type == UltraFuserConfig.model_type:
        raise ValueError(_already_fused(name, raw.get("specialist_names")))
    if model_type not in CONFIG_MAPPING:
        needs_code = bool(raw.get("auto_map"))
        reason = "needs remote code of its own, which is never run here" if needs_code else "is unknown"
        raise ValueError(
            f"A specialist must be of an architecture that transformers itself contains, but {name!r} ({source!r}) is "
            f"of type {model_type!r}, which {reason}. Convert it to a native architecture, or upgrade transformers if "
            f"a newer version knows it."
        )
    return AutoConfig.from_pretrained(source, **hub)


def _quantised(name: str, what: str) -> str:
    return (
        f"A specialist must have plain weights, because its head becomes columns of one matrix, but {name!r} is "
        f"{what} with quantised weights. Fuse the unquantised model and quantise the result: "
        f"`from_pretrained(..., quantization_config=...)`."
    )


def _already_fused(name: str, specialist_names: list[str]) -> str:
    return (
        f"A specialist is a single model, but {name!r} is itself a fused model of {specialist_names}. Fuse those "
        f"specialists instead: `model.specialist(name)` gives each back."
    )


def _unreadable(name: str, source: str, error: OSError | None = None, **hub) -> OSError | ValueError:
    try:
        adapter = cached_file(source, "adapter_config.json", **hub)
    except OSError:
        adapter = None
    if adapter is not None:
        return ValueError(
            f"A specialist must be a whole model, but {name!r} ({source!r}) holds only an adapter. Merge it into its "
            f"base first: `AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload()`, then "
            f"`.save_pretrained(...)`."
        )
    if os.path.isdir(source):
        return FileNotFoundError(
            f"The folder of {name!r}, {source!r}, has no config.json, so it is no saved model. It holds "
            f"{sorted(os.listdir(source))[:8]}. Point to the folder that `save_pretrained` wrote."
        )
    token = "a token was given" if hub.get("token") else "no token was given"
    return OSError(
        f"The specialist {name!r} could not be read: {source!r} (revision {hub['revision']!r}) is neither a local "
        f"folder nor a Hub repository that can be reached; {token}. Check the spelling; for a private or gated "
        f"repository run `hf auth login` after accepting its terms; offline, pass a local folder. "
        f"The Hub client said: {str(error).splitlines()[0]}"
    )


def _check_architecture(name: str, config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    kind = f"{name!r} is a {config.model_type!r} model"
    suffixes = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
    saved_as = config.architectures or []
    if config.is_encoder_decoder or (saved_as and not any(a.endswith(suffixes) for a in saved_as)):
        raise ValueError(
            f"A specialist must be a decoder with a language-model head, but {kind} saved as {saved_as}: an encoder, "
            f"an encoder-decoder, or a model without its head. Use a causal language model."
        )
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(text_config) not in MODEL_MAPPING:
        raise ValueError(
            f"A specialist must be a causal language model, or contain one as its text part, but {kind}, for which "
            f"transformers has no causal language model. Use one that `AutoModelForCausalLM` can load."
        )
    if "past_key_values" not in inspect.signature(_backbone_class(text_config).forward).parameters:
        raise ValueError(
            f"A specialist must have attention layers with a key-value cache, because all specialists share one, but "
            f"{kind}, which keeps another kind of state. Use a transformer or a hybrid."
        )


def _backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple | list) else found


def _load(name: str, source, config: PreTrainedConfig, dtype: torch.dtype | None, **hub) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        cast = any(b.is_floating_point() and b.element_size() < 4 for b in source.buffers())
        if dtype in (None, source.dtype) and not cast:
            return source
        # loading keeps in float32 what `.to(dtype)` would round, or has rounded, such as rotary frequencies
        with _no_bars():
            loaded = type(source).from_pretrained(
                None, config=copy.deepcopy(source.config), state_dict=source.state_dict(), dtype=dtype or source.dtype
            )
        loaded.generation_config = source.generation_config
        return loaded.to(source.device)
    try:
        return _auto_class(name, config).from_pretrained(
            source, config=config, dtype="auto" if dtype is None else dtype, use_safetensors=True, **hub
        )
    except OSError as error:
        raise OSError(
            f"The weights of {name!r} could not be read from {os.fspath(source)!r}. Only the safetensors format is "
            f"read, because others can run code; load and save the model once to convert it. "
            f"Transformers said: {str(error).splitlines()[0]}"
        ) from error


def _auto_class(name: str, config: PreTrainedConfig) -> type:
    """Which auto class loads this checkpoint together with its head."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ValueError(
        f"A specialist must be a causal language model, or read images beside text, but {name!r} is a "
        f"{config.model_type!r} model, whose text part cannot be loaded on its own. Load it and pass the model."
    )


@contextmanager
def _no_bars():
    """For what moves tensors within memory and is over at once."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _probe(
    name: str, model: PreTrainedModel, config: PreTrainedConfig, text_config: PreTrainedConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Rebuilds a specialist from its configuration and checks that it speaks as before.

    Some architectures do more between backbone and logits than multiplying by a head: whatever it is, it shows here.

    Args:
        name: Of the specialist.
        model: The specialist as its own causal language model.
        config: Configuration of the backbone inside the fused model, with the fused vocabulary.
        text_config: The specialist's own configuration, with its own scale factors.

    Returns:
        The backbone's tensors by name, and the specialist's columns of the wide head, scale folded in.
        Shape (vocab, hidden).
    """
    rows = config.vocab_size
    backbone_class = _backbone_class(config)
    backbone = next((m for m in model.modules() if type(m) is backbone_class), None)
    head = model.get_output_embeddings()
    if backbone is None or head is None:
        raise ValueError(
            f"A specialist must be a backbone followed by a linear head, but {name!r} ({type(model).__name__}) holds "
            f"no {backbone_class.__name__} or no output embeddings. It cannot be fused."
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"A specialist's head must have no bias, because a bias could not be weighed by the gate inside one "
            f"linear head, but the head of {name!r} ({type(model).__name__}) has one. If it is all zeros, set it to "
            f"None before fusing."
        )
    columns = head.weight[:rows]
    state = dict(backbone.state_dict())
    embedding = backbone.get_input_embeddings().weight
    for key, tensor in state.items():
        if tensor.data_ptr() == embedding.data_ptr() and tensor.shape == embedding.shape:
            state[key] = tensor[:rows]
    refusal = (
        f"{name!r} ({type(model).__name__}) does something between its backbone and its logits that one linear head "
        f"cannot do, so the fused model would not speak as it does"
    )
    if columns.shape[1] != config.hidden_size:
        raise ValueError(
            f"{refusal}: its head reads {columns.shape[1]} numbers, its hidden size is {config.hidden_size}."
        )

    was_training = model.training
    model.eval()
    ids = (torch.arange(1, 17, device=model.device) * 7919 % rows)[None]
    own = model(input_ids=ids, use_cache=False).logits[..., :rows].float()
    changed = model(input_ids=torch.cat([ids[:, :-1], ids[:, :1]], dim=-1), use_cache=False).logits[..., :rows].float()
    if not torch.allclose(own[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-3 * own.abs().max().item()):
        raise ValueError(
            f"A specialist must be a decoder, which predicts each token from those before it, but in {name!r} "
            f"({type(model).__name__}) a later token changes an earlier prediction. Use a causal language model."
        )
    with _no_bars():
        rebuilt = backbone_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype).eval()
    hidden = rebuilt.to(model.device)(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    linear = F.linear(hidden, columns).float()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}.get(model.dtype, 2e-2)
    cap = soft_cap(text_config)
    for scale in _scales(text_config):
        logits = linear * scale if cap is None else cap * torch.tanh(linear * scale / cap)
        if (logits - own).abs().max() <= tolerance * own.abs().max().clamp(min=1e-6):
            return {k: t.cpu() for k, t in state.items()}, (columns if scale == 1.0 else columns * scale).cpu()
    difference = (linear - own).abs().max().item()
    raise ValueError(f"{refusal}: on a probe, logits differ by up to {difference:.3g}. It cannot be fused.")


def _scales(config: PreTrainedConfig) -> list[float]:
    """Factors that the logits may have been multiplied by: 1, and what the family writes down, either way up."""
    written = [getattr(config, field, None) for field in SCALE_FIELDS]
    return [1.0] + [s for w in written if w for s in (1 / w, w)]


def _generation_config(source, config: PreTrainedConfig, **hub) -> GenerationConfig | None:
    """What a specialist's own model would have, without loading it."""
    if isinstance(source, PreTrainedModel):
        return getattr(source, "generation_config", None)
    try:
        return GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        return GenerationConfig.from_model_config(config)


def merged_generation_config(configs: dict[str, GenerationConfig | None], vocab_size: int) -> GenerationConfig:
    """One generation configuration for all: any specialist's end of text ends the text, conflicts are dropped.

    Raises:
        ValueError: If an end-of-text id lies beyond the fused vocabulary.
    """
    written = {n: {} if c is None else c.to_diff_dict() for n, c in configs.items()}
    for fields in written.values():
        for key in _NOT_SETTINGS:
            fields.pop(key, None)
    ends = {n: f.pop("eos_token_id", None) for n, f in written.items()}
    ends = {n: e if isinstance(e, list) else [] if e is None else [e] for n, e in ends.items()}
    beyond = {n: [i for i in ids if i >= vocab_size] for n, ids in ends.items()}
    if any(beyond.values()):
        raise ValueError(
            f"Every end-of-text id must be in the fused vocabulary of {vocab_size} tokens, or the model could not "
            f"stop, but { ({n: ids for n, ids in beyond.items() if ids}) } lie beyond it. Fuse specialists whose "
            f"vocabularies all contain them."
        )
    eos = sorted({i for ids in ends.values() for i in ids})
    starts, pads = ([f.pop(key, None) for f in written.values()] for key in ("bos_token_id", "pad_token_id"))
    bos = next((i for i in starts if i is not None and i < vocab_size), None)
    pad = next((i for i in pads if i is not None and i < vocab_size), eos[0] if eos else None)
    merged = {}
    for key in sorted({k for fields in written.values() for k in fields}):
        values = {n: f.get(key) for n, f in written.items()}
        if len({repr(v) if v is not False else "None" for v in values.values()}) == 1:
            merged[key] = next(iter(values.values()))
        else:
            print_line(f"Generation setting `{key}` is dropped, because specialists disagree on it: {values}.")
    if not merged.get("do_sample"):
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if merged.pop(key, None) is not None:
                print_line(
                    f"Generation setting `{key}` is dropped, because the fused model does not sample by default."
                )
    end = eos[0] if len(eos) == 1 else eos or None
    return GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=pad, **merged)


# written by some versions and not by others, and no choice of how to generate
_NOT_SETTINGS = (
    *("transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states"),
)


def common_tokenizer(
    specialists: dict[str, str | os.PathLike | PreTrainedTokenizerBase],
    *,
    chat_template: str | None = None,
    revisions: dict[str, str] | None = None,
    vocab_size: int | None = None,
    **hub_kwargs,
) -> PreTrainedTokenizerBase:
    """The one tokenizer of a fused model, with its chat template.

    Args:
        specialists: Name to Hub id, local folder or loaded tokenizer.
        chat_template: Whose chat template to take, by specialist name. Needed only if they differ.
        revisions: Name to branch, tag or commit of its Hub repository.
        vocab_size: Rows of the fused head. Default: any.
        **hub_kwargs: `token`, `cache_dir` and `local_files_only`, as for `from_pretrained`.

    Returns:
        The tokenizer of the first specialist that fits the fused vocabulary, with the chosen template.

    Raises:
        ValueError: If the tokenizers differ, or their chat templates do and none was chosen.
    """
    hub = {n: {**hub_kwargs, "revision": (revisions or {}).get(n) or "main"} for n in specialists}
    tokenizers = {
        n: s if isinstance(s, PreTrainedTokenizerBase) else _tokenizer(s, **hub[n]) for n, s in specialists.items()
    }
    missing = [n for n, t in tokenizers.items() if t is None]
    if missing:
        raise ValueError(
            f"Every specialist must come with its tokenizer, but {missing} have none. Save it beside them."
        )
    tokenizer = copy.deepcopy(_widest_usable_tokenizer(tokenizers, vocab_size or 1 << 62))
    templates = {n: t.chat_template for n, t in tokenizers.items()}
    if chat_template is not None:
        if chat_template not in templates:
            raise ValueError(
                f"`chat_template` names the specialist whose template to take: one of {list(templates)}, "
                f"but got {chat_template!r}."
            )
        tokenizer.chat_template = templates[chat_template]
    elif len({repr(t) for t in templates.values()}) > 1:
        with_one = [n for n, t in templates.items() if t]
        raise ValueError(
            f"A fused model has one chat template, but the specialists' differ ({with_one} have one). Choose whose to "
            f"take: chat_template={with_one[0]!r}."
        )
    return tokenizer


def _tokenizer(source, **hub) -> PreTrainedTokenizerBase | None:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if os.path.isdir(source) and not any(os.path.exists(os.path.join(source, f)) for f in files):
        return None
    return AutoTokenizer.from_pretrained(source, **hub)


def _widest_usable_tokenizer(
    tokenizers: dict[str, PreTrainedTokenizerBase], vocab_size: int
) -> PreTrainedTokenizerBase:
    """The first tokenizer with no id beyond the fused vocabulary, once all agree below it."""
    vocabularies = {n: {i: t for t, i in k.get_vocab().items() if i < vocab_size} for n, k in tokenizers.items()}
    first = next(iter(tokenizers))
    for name in list(tokenizers)[1:]:
        a, b = vocabularies[first], vocabularies[name]
        differing = sorted(i for i in a.keys() | b.keys() if a.get(i) != b.get(i))
        rule = "Specialists must share one tokenizer, because their predictions are added token by token"
        if differing:
            i = differing[0]
            raise ValueError(
                f"{rule}, but {name!r} uses a different tokenizer from {first!r}: {len(differing)} ids differ, the "
                f"first is {i}, {a.get(i)!r} against {b.get(i)!r}. Fuse specialists trained from one base model."
            )
        ours, theirs = (tokenizers[n].encode(TOKENIZER_PROBE, add_special_tokens=False) for n in (first, name))
        if [i for i in ours if i < vocab_size] != [i for i in theirs if i < vocab_size]:
            raise ValueError(
                f"{rule}, but {name!r} splits text differently from {first!r} although the vocabularies are equal: a "
                f"test sentence became {len(theirs)} tokens instead of {len(ours)}. Fuse specialists trained from one "
                f"base model."
            )
    beyond = {n: sorted(i for i in t.get_vocab().values() if i >= vocab_size) for n, t in tokenizers.items()}
    usable = [n for n in tokenizers if not beyond[n]]
    if not usable:
        shown = {n: [tokenizers[n].convert_ids_to_tokens(i) for i in ids[:3]] for n, ids in beyond.items()}
        raise ValueError(
            f"The fused vocabulary has the {vocab_size} rows that every specialist's head has, but every tokenizer "
            f"can produce tokens beyond it, such as {shown}. Fuse specialists whose heads cover their tokenizers."
        )
    return tokenizers[usable[0]]
