"""Specialists put into and taken out of a fused model whose gate keeps what it learned.

What a gate can keep depends on what its scores read. Gate weights are the softmax of one score per specialist, so as
long as the scores of the others stay, their shares stay in proportion:

- taken out: new weights of the others = old weights / (1 - old weight of the one taken out);
- put in: new weights of the others = old weights * (1 - weight of the newcomer).

Both hold exactly, at every token, except for taking a specialist out of a gate that reads the hidden states of all side
by side ("linear", "cross"), see `remove_specialist`; and for gates that look back ("posterior", "evidence"), which compare
each specialist's predictions so far with those of all others.

Signed weights are no shares: the others' stay as they are, and a newcomer's begins at 0.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.checkpoint_ultrafuser import refuse_other_tensors
from modeling_ultrafuser.gate_base_ultrafuser import Gate
from modeling_ultrafuser.gates_ultrafuser import GATES
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.specialist_config_ultrafuser import own_config

from ..atomic import new_folder
from ..check import metadata
from ..pretrained import fused_config, read_ingredients, read_tokenizer, save_fused, save_tokenizer
from .fusion_recipe import described


BACKBONE, GATE, HEAD = "model.specialists.", "model.fusion_gate.", "lm_head.weight"


def add(folder: Path, name: str, source: str, out: Path, *, revision: str | None = None) -> None:
    """Writes a fused folder with one more specialist, see `add_specialist`."""
    with new_folder(out) as part:
        config = fused_config(folder)
        first, rows = config.specialist_names[0], config.vocab_size
        tokenizer = read_tokenizer(folder)
        read = metadata.read(name, source, revision)
        # token ids must mean the same to it; the chat template stays
        both, revisions = {first: tokenizer, name: source}, {name: read.revision}
        common_tokenizer(both, chat_template=first, revisions=revisions, vocab_size=rows)
        model = add_specialist(UltraFuserForCausalLM.from_pretrained(folder), name, source, revision=read.revision)
        save_fused(part, model, tokenizer, read_ingredients(folder) | {name: described(source, read)})


def remove(folder: Path, name: str, out: Path) -> None:
    """Writes a fused folder without one of its specialists, see `remove_specialist`."""
    with new_folder(out) as part:
        _check_name(fused_config(folder), name)
        model = remove_specialist(UltraFuserForCausalLM.from_pretrained(folder), name)
        ingredients = {n: i for n, i in read_ingredients(folder).items() if n != name}
        save_fused(part, model, read_tokenizer(folder), ingredients)


def take_out(folder: Path, name: str, out: Path) -> None:
    """Writes one specialist of a fused folder as an ordinary model's folder, with the fused model's tokenizer."""
    with new_folder(out) as part:
        _check_name(fused_config(folder), name)
        save_tokenizer(part, read_tokenizer(folder))
        UltraFuserForCausalLM.from_pretrained(folder).specialist(name).save_pretrained(part)


def remove_specialist(model: UltraFuserForCausalLM, name: str) -> UltraFuserForCausalLM:
    """A fused model without one of its specialists. The tensors of the others stay as they are, bit by bit.

    With an "mlp" or "constant" gate the others' scores stay, and with them their shares in proportion. A "linear" or
    "cross" gate scores every specialist from the hidden states of all, so what it read from the one taken out is missing
    from the others' scores: train it again; so with "evidence". An "anchor" gate keeps its anchor. "uniform" and "posterior" have nothing to keep.

    Args:
        model: A fused model of three specialists or more. It is not changed.
        name: Of the specialist to take out.

    Raises:
        ValueError: If there is no such specialist, a single one would be left, or the gate cannot keep what it learned.
    """
    names = model.config.specialist_names
    _check_name(model.config, name)
    if len(names) == 2:
        left = next(n for n in names if n != name)
        raise Refusal(
            f"without {name!r} only {left!r} would be left",
            "A fused model has at least two specialists",
            f"Take that one by itself: `ultrafuser specialist FOLDER {left}`.",
            about="specialists",
        )
    return keep_specialists(model, [n for n in names if n != name])


def keep_specialists(model: UltraFuserForCausalLM, names: Sequence[str]) -> UltraFuserForCausalLM:
    """A fused model without all but some of its specialists, as `remove_specialist` removes one after another.

    Args:
        model: A fused model. It is not changed.
        names: Names of two specialists or more that are left, in its order.

    Raises:
        ValueError: If the gate cannot keep what it learned.
    """
    chosen = [name in names for name in model.config.specialist_names]
    config, gate = keep_in_gate(model, names)
    dropped = tuple(
        f"{BACKBONE}{n}." for n, keep in zip(model.config.specialist_names, chosen, strict=True) if not keep
    )
    state = {k: t for k, t in model.state_dict().items() if not k.startswith((*dropped, GATE))}
    for key, (dim, index) in model.model.reader.shared_parts(chosen).items():
        state[key] = state[key].index_select(dim, index.to(state[key].device))
    return _built(model, config, state, gate.state_dict())


def keep_in_gate(model: UltraFuserForCausalLM, names: Sequence[str]) -> tuple[UltraFuserConfig, Gate]:
    """Returns the configuration and the gate that `keep_specialists` gives a model, and makes nothing else of it.

    Raises:
        ValueError: If the gate cannot keep what it learned.
    """
    config, gate = model.config, model.model.fusion_gate
    for name in [n for n in config.specialist_names if n not in names]:
        index = config.specialist_names.index(name)
        state = gate.without(index, config)
        others = [list(part) for part in (config.specialist_names, config.specialists)]
        for part in others:
            del part[index]
        config = _config(config, *others, model.generation_config)
        gate = GATES[config.gate](config)
        gate.load_state_dict(state, assign=True)
    return config, gate.eval()


def add_specialist(
    model: UltraFuserForCausalLM, name: str, source: str | os.PathLike, *, revision: str | None = None
) -> UltraFuserForCausalLM:
    """A fused model with one more specialist, the last. The tensors of the others stay as they are, bit by bit.

    The others' scores stay. The newcomer's own score is, with a gate that is

    - "mlp", of equal hidden sizes: what the shared layers make of its hidden states, as of everyone's;
    - "mlp", of different hidden sizes: one number, what the gate makes of a hidden state of zeros, as its first layer
      starts at zero;
    - "constant": such that it starts with an equal share, 1 in all specialists;
    - "linear", "anchor", "cross" or "evidence": a bias alone, the one that would be an equal share if the others' biases were all
      they had;
    - "posterior": what it is for all, without training.

    Then train the gate: nothing so far has shown it when the newcomer is right.

    Args:
        model: A fused model. It is not changed.
        name: Of the newcomer.
        source: Its Hub id or folder.
        revision: Branch, tag or commit of its repository.

    Raises:
        ValueError: If it does not fit the others.
        OSError: If it cannot be read.
    """
    config = model.config
    names = config.specialist_names
    if name in names:
        raise Refusal(
            f"there is a {name!r} among {names} already",
            "Every specialist has a name of its own",
            "Choose another name.",
            about="specialists",
        )
    model.model.reader_class.check_newcomer(config)
    rows = own_config(name, source, revision=revision or "main").get_text_config(decoder=True).vocab_size
    if rows < config.vocab_size:
        raise Refusal(
            f"{name!r} has only {rows} rows",
            f"A specialist is put in without touching the others, whose vocabulary has {config.vocab_size} rows",
            f"Fuse all of them anew: `ultrafuser fuse` cuts every one to {rows}.",
            about="specialists",
        )
    # fused with one of the others first: that checks, scales, cuts and probes it as ever
    pair = UltraFuserForCausalLM.from_specialists(
        {names[0]: model.specialist(names[0]), name: source},
        gate="uniform",
        # a rule may name specialists that this pair has not
        fusion="logits" if model.model.fusion_rule.one_head else "probabilities",
        dtype=model.dtype,
        revisions={name: revision} if revision else None,
    )
    newcomer = pair.config.specialists[1]
    new_config = _config(config, [*names, name], [*config.specialists, newcomer], pair.generation_config)
    state = {k: t for k, t in model.state_dict().items() if not k.startswith(GATE)}
    state |= {k: t for k, t in pair.state_dict().items() if k.startswith(f"{BACKBONE}{name}.")}
    state[HEAD] = torch.cat([state[HEAD], pair.lm_head.weight.detach()[:, -newcomer.hidden_size :]], dim=1)
    gate = model.model.fusion_gate.with_one_more(name, new_config)
    return _built(pair, new_config, state, gate)


def _check_name(config: UltraFuserConfig, name: str) -> None:
    if name not in config.specialist_names:
        raise Refusal(
            f"there is no specialist {name!r}", "", f"Choose one of {config.specialist_names}.", about="specialists"
        )


def _config(config: UltraFuserConfig, names: list[str], specialists: list, generation_config) -> UltraFuserConfig:
    """A model's configuration with other specialists. Whatever follows from them follows anew."""
    fields = {**config.to_dict(), "specialist_names": names, "specialists": specialists}
    # the longest context is that of the shortest
    del fields["max_position_embeddings"]
    if config.signed_weights is not None:
        signed = dict(zip(config.specialist_names, config.signed_weights, strict=True))
        fields["signed_weights"] = [signed.get(name, 0.0) for name in names]
        if not any(fields["signed_weights"]):
            raise Refusal(
                f"the signed weights of {names} are all 0",
                "A fused model needs a specialist with another one",
                f"Keep one of {[n for n, number in signed.items() if number]}, or take one of {names} by itself: "
                f"`ultrafuser specialist FOLDER NAME`.",
                about="specialists",
            )
    ends = {f: getattr(generation_config, f) for f in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return UltraFuserConfig.from_dict({**fields, **ends})


def _built(
    like: UltraFuserForCausalLM, config: UltraFuserConfig, state: dict[str, Tensor], gate: dict[str, Tensor]
) -> UltraFuserForCausalLM:
    """Builds an edited model, with the dtype and the generation settings of another one."""
    edited = built(config, state | {f"{GATE}{key}": tensor for key, tensor in gate.items()}, like.dtype)
    edited.generation_config = like.generation_config
    return edited


def built(config: UltraFuserConfig, state: dict[str, Tensor], dtype: torch.dtype | str) -> UltraFuserForCausalLM:
    """A fused model of these tensors and no others.

    Raises:
        ValueError: Naming a tensor that is missing or left over.
    """
    model, info = UltraFuserForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    refuse_other_tensors("the model", info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model.eval()
