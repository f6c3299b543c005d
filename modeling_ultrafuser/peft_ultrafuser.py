"""Refusals of adapters that PEFT would train or save for some of the specialists only, and say nothing."""

from torch import nn

from .refusals_ultrafuser import Refusal


def check_adapters(model: nn.Module) -> None:
    """Refuses adapters of PEFT, on a fused model, that would be saved or trained by half. The last one is taken out.

    PEFT leaves out of an adapter's file whatever has another adapter's name in its path.

    Args:
        model: A fused model, `peft_config` of which PEFT sets.

    Raises:
        ValueError: Naming the adapter, and the way out.
    """
    adapters = model.__dict__.get("peft_config")
    if not adapters:
        return
    taken = sorted(model.path_parts.intersection(adapters)) if len(adapters) > 1 else []
    name, config = list(adapters.items())[-1]
    complaint = None
    if taken:
        complaint = (
            f"Adapters side by side must not be called as a part of the model is, because PEFT leaves every tensor with "
            f"another adapter's name in its path out of an adapter's file, but adapters are {list(adapters)} and {taken} "
            f"are in the paths of this model. Choose other names (`adapter_name`); a saved adapter can be loaded by any."
        )
    elif model.__dict__.get("_checked_adapter") is not config:
        complaint = _about_embeddings(model, config)
    if complaint is not None:
        del adapters[name]
        raise ValueError(complaint)
    model.__dict__["_checked_adapter"] = config


def check_head(head: nn.Module, reader: str) -> None:
    """Refuses a head with an adapter beside its weight, to those who multiply by parts of that weight.

    Args:
        head: The wide head.
        reader: Who does.

    Raises:
        ValueError: Naming the ways out.
    """
    # trainable tokens wrap it once more
    if hasattr(getattr(head, "token_adapter", head), "base_layer"):
        raise Refusal(
            f"{reader} takes the head one specialist at a time and would leave the adapter out",
            "An adapter on `lm_head` is computed beside its weight, for all specialists at once",
            "Merge it (`merge_and_unload()`) where that model runs, or train the head itself: "
            "modules_to_save=['lm_head'].",
            about="adapter",
        )


def has_prefix(model: nn.Module) -> bool:
    """Returns whether PEFT generates with a prefix, for which it prepares a model's inputs itself."""
    # it puts its own function in place of the model's, and that one back afterwards
    return getattr(model.prepare_inputs_for_generation, "__self__", None) is not model


def _about_embeddings(model: nn.Module, config) -> str | None:
    """Why the adapter would not hold what becomes of every specialist's token embedding, or None."""
    saved = set(getattr(config, "modules_to_save", None) or ())
    indices = getattr(config, "trainable_token_indices", None)
    leaves = {name: embedding_leaf(s) for name, s in model.base_model.specialists.items()}
    # PEFT looks for a list of tokens in modules of this name
    named = saved | (set(indices) if isinstance(indices, dict) else set() if indices is None else {"embed_tokens"})
    trained = [name for name, leaf in leaves.items() if leaf in named]
    if trained and len(trained) < len(leaves):
        return (
            f"An adapter trains the token embeddings of all specialists or names one by its path, but {sorted(named)} "
            f"reaches those of {trained} alone. They are called {leaves}: name all, in `modules_to_save` or as the keys "
            f"of `trainable_token_indices`."
        )
    if model.base_model.resized and model.name_or_path and not (trained and "lm_head" in saved):
        return (
            f"The vocabulary was resized since the model was loaded from {model.name_or_path!r}, and an adapter's file "
            f"would hold the new rows of one specialist out of {list(leaves)}. Save the resized model "
            f"(`save_pretrained`) and load that before the adapter is put on; or train the embeddings as a part of it: "
            f"modules_to_save={sorted({*leaves.values(), 'lm_head'})}."
        )
    return None


def embedding_leaf(specialist: nn.Module) -> str:
    """Returns the name of a specialist's token embedding: the last part of its path."""
    embedding = specialist.get_input_embeddings()
    return next(name for name, module in specialist.named_modules() if module is embedding).rpartition(".")[2]
