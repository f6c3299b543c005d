"""One generation configuration out of the specialists'."""

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from .files_ultrafuser import in_words
from .gguf_ultrafuser import is_gguf
from .refusals_ultrafuser import Refusal


# written by some versions and not by others, and no choice of how to generate
_NOT_SETTINGS = (
    *("transformers_version", "_from_model_config"),
    *("use_cache", "output_attentions", "output_hidden_states"),
)


def own_generation_config(source, config: PreTrainedConfig, **hub) -> GenerationConfig | None:
    """Returns the generation configuration of a specialist's model, without loading it."""
    if isinstance(source, PreTrainedModel):
        return getattr(source, "generation_config", None)
    if is_gguf(source):
        return GenerationConfig.from_model_config(config)
    with in_words("The settings of generation", source):
        try:
            return GenerationConfig.from_pretrained(source, **hub)
        except OSError:
            return GenerationConfig.from_model_config(config)


def merged_generation_config(
    configs: dict[str, GenerationConfig | None], vocab_size: int
) -> tuple[GenerationConfig, list[str]]:
    """One generation configuration for all: any specialist's end or stop string ends the text, conflicts are dropped.

    Returns:
        The configuration, and a sentence about each setting that is dropped or needs something.

    Raises:
        ValueError: If an end-of-text id lies beyond the fused vocabulary.
    """
    written = {n: {} if c is None else c.to_diff_dict() for n, c in configs.items()}
    for fields in written.values():
        for key in _NOT_SETTINGS:
            fields.pop(key, None)
    ends = {n: f.pop("eos_token_id", None) for n, f in written.items()}
    stops = [f.pop("stop_strings", None) or [] for f in written.values()]
    stops = list(dict.fromkeys(s for own in stops for s in ([own] if isinstance(own, str) else own)))
    ends = {n: e if isinstance(e, list) else [] if e is None else [e] for n, e in ends.items()}
    beyond = {n: [i for i in ids if i >= vocab_size] for n, ids in ends.items()}
    if any(beyond.values()):
        raise Refusal(
            f"end-of-text ids lie beyond the fused vocabulary of {vocab_size} tokens: "
            f"{ {n: ids for n, ids in beyond.items() if ids} }",
            "Every one must be in it, or the model could not stop",
            "Fuse specialists whose vocabularies all contain them.",
            about="generation",
        )
    eos = sorted({i for ids in ends.values() for i in ids})
    starts, pads = ([f.pop(key, None) for f in written.values()] for key in ("bos_token_id", "pad_token_id"))
    bos = next((i for i in starts if i is not None and i < vocab_size), None)
    pad = next((i for i in pads if i is not None and i < vocab_size), eos[0] if eos else None)
    merged, notes = {}, []
    for key in sorted({k for fields in written.values() for k in fields}):
        values = {n: f.get(key) for n, f in written.items()}
        if len({repr(v) if v is not False else "None" for v in values.values()}) == 1:
            merged[key] = next(iter(values.values()))
        else:
            notes.append(f"Generation setting `{key}` is dropped, because specialists disagree on it: {values}.")
    if not merged.get("do_sample"):
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if merged.pop(key, None) is not None:
                notes.append(
                    f"Generation setting `{key}` is dropped, because the fused model does not sample by default."
                )
    if stops:
        merged["stop_strings"] = stops
        notes.append(f"Text ends at {stops}, too, for which `generate` takes `tokenizer=`.")
    end = eos[0] if len(eos) == 1 else eos or None
    return GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=pad, **merged), notes
