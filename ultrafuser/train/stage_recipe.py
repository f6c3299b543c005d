"""Both stages of training from a recipe: what `ultrafuser train` and the scripts in `examples/` do."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.files_ultrafuser import file_or_none, in_words
from modeling_ultrafuser.fusions_ultrafuser import check_loss
from modeling_ultrafuser.log_ultrafuser import print_line
from trainers import (
    CachedGateTrainer,
    GateStageConfig,
    GateTrainer,
    JointStageConfig,
    JointTrainer,
    SingleStageConfig,
    SingleTrainer,
)
from trainers.heads import HEADS
from trainers.progress import ProgressOfTraining
from trainers.stage_checkpoint import STATE_FILE, last_complete_checkpoint

from ..atomic import sole_writer
from ..build.fusion_recipe import FusionSettings, described
from ..check import metadata
from ..hub import upload
from ..pretrained import check_there, load_config, load_tokenizer, read_ingredients, write_ingredients
from ..pretrained import load_model as load_any_model
from ..row_files import load
from ..yaml_files import read_yaml


# into the output folder, beside checkpoints
WRITES = (
    *("*.safetensors", "*.safetensors.index.json", "*_ultrafuser.py", "checkpoint-*", "cache", "training_args.bin"),
    *("config.json", "generation_config.json", "specialists.json", "adapter_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
STAGES = {"gate": GateStageConfig, "joint": JointStageConfig, "single": SingleStageConfig}
KINDS = ", ".join(sorted({kind for head in HEADS.values() for kind in head.kept}))


@dataclass
class FusedArguments(FusionSettings):
    """Given in the YAML recipe."""

    domains: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Domain to the arguments of `load_dataset`: {math: {path: ..., split: train}}; or arguments alone, "
            "of a set with a column `domain`."
        },
    )
    stage: str | None = field(default=None, metadata={"help": "gate, joint or single: which stage the recipe is for."})
    cached: bool = field(
        default=False,
        metadata={"help": "Stage gate: run the specialists once over the data, and train the gate on what they said."},
    )
    cache: str | None = field(
        default=None, metadata={"help": "Folder of what they said, for any number of gates. Default: OUT/cache."}
    )
    cache_keep: str | None = field(
        default=None, metadata={"help": f"{KINDS}; see CachedGateTrainer. Default: what is exact."}
    )


def parse(
    arguments: list[str], *, stage: str | None = None, recipe: Path | None = None
) -> tuple[FusedArguments, GateStageConfig | JointStageConfig, ModelConfig]:
    """Settings of a stage from a recipe, and from a command line, which goes before it.

    Every field of `GateStageConfig` or `JointStageConfig`, and so of TRL's `SFTConfig`, of TRL's `ModelConfig` and of
    `FusedArguments` can stand in either.

    Args:
        arguments: Of the command line.
        stage: "gate", "joint" or "single". Default: what the recipe says.
        recipe: YAML file.

    Raises:
        ValueError: If a field is unknown, or nobody says which stage.
        OSError: If the recipe cannot be read.
    """
    stage = stage or read_recipe(recipe).get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(
            f"A stage is one of {list(STAGES)}, but got {stage!r}. Choose one: --stage gate, for example."
        )
    fused, args, model = parse_fields(arguments, (FusedArguments, STAGES[stage], ModelConfig), recipe)
    fused.stage = stage
    return fused, args, model


def read_recipe(recipe: Path | None) -> dict[str, Any]:
    """Reads a recipe's fields; none without a recipe.

    Raises:
        ValueError: If the file holds something else.
        OSError: If it cannot be read.
    """
    written = {} if recipe is None else read_yaml(recipe)
    if not isinstance(written, dict):
        raise ValueError(
            f"A recipe says `field: value` in YAML, but {str(recipe)!r} holds a {type(written).__name__}."
        )
    return written


def parse_fields(arguments: list[str], kinds: tuple[type, ...], recipe: Path | None = None) -> list[Any]:
    """Reads settings from a recipe, and from a command line, which goes before it.

    Args:
        arguments: Of the command line.
        kinds: Dataclasses of the settings. One is of TRL, with `trust_remote_code`.
        recipe: YAML file.

    Returns:
        One of each kind.

    Raises:
        ValueError: If a field is unknown, or of another kind.
        OSError: If the recipe cannot be read.
    """
    written = read_recipe(recipe)
    trusted = any(word.startswith(("--trust_remote_code", "--trust-remote-code")) for word in arguments)
    _check_asks_for_nothing_more(recipe, arguments)
    _check_kinds(written, kinds)
    parser = TrlParser(kinds)
    # not with a usage of hundreds of lines
    parser.error = _refuse
    if not torch.accelerator.is_available():
        # TRL's defaults are for a GPU, and refuse a machine without one
        parser.set_defaults(use_cpu=True, bf16=False)
    # bars only where somebody watches; the lines of the log stay
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty())
    config = [] if recipe is None else ["--config", str(recipe)]
    with in_words("The settings", recipe or "the command line"):
        *parts, unknown = parser.parse_args_and_config([*config, *arguments], return_remaining_strings=True)
    if unknown:
        known = [f"--{setting.name}" for part in parts for setting in fields(part)]
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise ValueError(
            f"Options are fields of a stage's settings, but {unknown[0]!r} is none. "
            + (f"Near it: {', '.join(near)}." if near else "All are in the documentation of training.")
        )
    for part in parts:
        if isinstance(part, TrainingArguments):
            # a recipe may come from somebody else, and a fused model needs no code but this package's
            part.trust_remote_code &= trusted
    return parts


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"A setting in the recipe or on the command line is of another kind: {message}. Correct it.")


def _check_kinds(written: dict, classes: Iterable[type]) -> None:
    """Refuses values that fit no kind of their field. Words are left to the parser, which reads numbers from them."""
    for field_of in classes:
        hints = get_type_hints(field_of)
        for name in sorted(hints.keys() & written.keys()):
            value, kinds = written[name], set(_kinds(hints[name]))
            # where there is a word or nothing, "the last" may be said as true
            kinds |= {bool} if name == "resume_from_checkpoint" else {int} if float in kinds else set()
            if not isinstance(value, str) and type(value) not in kinds and Any not in kinds:
                names = sorted("nothing" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds)
                raise ValueError(
                    f"`{name}` of a recipe must be {' or '.join(names)}, but is {str(value)[:100]!r}. Correct it."
                )


def _kinds(hint) -> Iterator:
    if get_origin(hint) in (Union, UnionType):
        for inner in get_args(hint):
            yield from _kinds(inner)
    elif get_origin(hint) is Literal:
        yield from map(type, get_args(hint))
    else:
        yield get_origin(hint) or hint


def _check_asks_for_nothing_more(recipe: Path | None, arguments: list[str]) -> None:
    # TRL would set it
    path = recipe or (arguments[arguments.index("--config") + 1] if "--config" in arguments[:-1] else None)
    written = {} if path is None else read_yaml(path)
    if isinstance(written, dict) and "env" in written:
        raise ValueError(
            f"A recipe says what to train and how, and sets no environment variables, because these decide which code "
            f"and which servers are used, but {str(path)!r} has `env: {written['env']!r:.200}`. Take it out, and "
            f"`export` what you want of it."
        )
    asked = any(word.split("=")[0] in ("--push_to_hub", "--push-to-hub") for word in arguments)
    if isinstance(written, dict) and written.get("push_to_hub") and not asked:
        raise ValueError(
            f"A model is sent away only when whoever runs the command says so, because a recipe may come from somebody "
            f"else, but {str(path)!r} has `push_to_hub: {str(written['push_to_hub'])[:100]}`. Say --push_to_hub true as "
            f"well, or take it out."
        )


def train(fused: FusedArguments, args: GateStageConfig | JointStageConfig, model_args: ModelConfig) -> None:
    """Trains a stage and saves a folder that loads anywhere.

    Args:
        fused: What to train, on which data, in which stage.
        args: Settings of the stage. With `resume_from_checkpoint` it goes on from there; "True" is the last complete
            checkpoint.
        model_args: The model's folder, its dtype, LoRA.

    Raises:
        FileExistsError: If the output folder holds a run already, and is not to be gone on with.
        ValueError: If something given does not fit.
        OSError: If a model or data cannot be read.
    """
    with writing(args, "train"):
        _train(fused, args, model_args)


def writing(args: TrainingArguments, command: str) -> AbstractContextManager:
    """Holds a run's output folder. Of several processes one writes.

    Raises:
        FileExistsError: If it holds a run already, and is not to be gone on with, or somebody else writes it.
    """
    out = Path(args.output_dir)
    if not args.resume_from_checkpoint and (last_complete_checkpoint(out) or (out / "config.json").exists()):
        raise FileExistsError(
            f"Nothing is overwritten unasked, but {str(out)!r} holds another run's model or checkpoints. Go on from "
            f"the last checkpoint: `ultrafuser {command} --resume`, or --resume_from_checkpoint True; or choose another "
            f"output_dir."
        )
    begun = [path.parent.name for path in out.glob(f"checkpoint-*/{STATE_FILE}")]
    return sole_writer(out, command, WRITES, begun=begun) if args.process_index == 0 else nullcontext()


def _train(fused: FusedArguments, args: GateStageConfig | JointStageConfig, model_args: ModelConfig) -> None:
    out, resume = Path(args.output_dir), args.resume_from_checkpoint
    publish = _publishing(args)
    trainer_class, own = _trainer(fused, out, model_args)
    check_model(fused, model_args)
    domains = load_domains(fused, args.dataset_text_field)
    ingredients = ingredients_of(fused, model_args)
    model, tokenizer = load_model(fused, model_args, trust_remote_code=args.trust_remote_code)
    trainer = trainer_class(model, args, domains, processing_class=tokenizer, **own)
    if args.disable_tqdm and not sys.stderr.isatty():
        trainer.add_callback(ProgressOfTraining(f"stage {fused.stage}"))
    if args.should_save:
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        every = sum(p.numel() for p in trainer.model.parameters())
        print_line(f"Stage {fused.stage}: {trained:,} of {every:,} parameters are trained.")
    trainer.train(resume_from_checkpoint=resume == "True" or resume)
    if args.should_save:
        # before the weights: killed in between, it leaves nothing that loads
        tokenizer.save_pretrained(out)
        write_ingredients(out, ingredients)
    trainer.save_model(args.output_dir)
    if publish and args.should_save:
        publish()


def _publishing(args: GateStageConfig | JointStageConfig) -> Callable[[], None] | None:
    """Returns a function that pushes the trained model, if asked for: as `ultrafuser push` does, once and at the end.

    The library would send the whole output folder, its data and its arguments included, and keep the token in them.
    """
    token, args.hub_token = args.hub_token, None
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    repository = args.hub_model_id
    if not repository or "/" not in repository:
        raise ValueError(
            f"A model is pushed to `owner/name`, but `hub_model_id` is {repository!r}. Give --hub_model_id owner/name, or "
            f"push it afterwards: `ultrafuser push {args.output_dir} owner/name`."
        )
    upload.check_token(token)
    options = {"private": args.hub_private_repo, "revision": args.hub_revision, "token": token}
    return lambda: upload.push(Path(args.output_dir), repository, **options, say=print_line) and None


def _trainer(fused: FusedArguments, out: Path, model_args: ModelConfig) -> tuple[type, dict]:
    """A stage's trainer, and what it alone takes."""
    if fused.stage == "single" and fused.specialists:
        raise ValueError(
            f"Stage single trains one model that is there, but the recipe fuses {list(fused.specialists)}. Name one "
            f"(--model_name_or_path), or train --stage gate."
        )
    if fused.stage != "gate":
        if fused.cached:
            raise ValueError(
                f"What specialists say can be kept while they do not move, which is not so in stage {fused.stage}. Leave "
                f"`cached` out, or train --stage gate."
            )
        adapter = get_peft_config(model_args)
        if adapter is not None and not adapter.target_modules and not adapter.target_parameters:
            # PEFT's own choices are by architecture, and specialists may be of several. QLoRA's (Dettmers et al., 2023, arXiv 2305.14314)
            adapter.target_modules = "all-linear"
        return JointTrainer if fused.stage == "joint" else SingleTrainer, {"peft_config": adapter}
    if fused.cached:
        return CachedGateTrainer, {"cache": fused.cache or out / "cache", "keep": fused.cache_keep}
    return GateTrainer, {}


def check_model(fused: FusedArguments, model: ModelConfig) -> None:
    """Rejects a model that is not there, before any data are read.

    Raises:
        OSError: If it is neither a folder nor on the Hub.
    """
    if model.model_name_or_path and not fused.specialists:
        check_there(model.model_name_or_path, model.model_revision)


def ingredients_of(fused: FusedArguments, model: ModelConfig) -> dict[str, dict]:
    """Returns the specialists' origins: those that the folder names, or those that were fused."""
    if fused.specialists:
        revisions = fused.specialist_revisions or {}
        return {n: described(s, metadata.read(n, s, revisions.get(n))) for n, s in fused.specialists.items()}
    return read_ingredients(Path(model.model_name_or_path or ""))


def load_model(
    fused: FusedArguments, model: ModelConfig, *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The fused folder named by --model_name_or_path, or else the specialists, fused now."""
    shared = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    if bool(fused.specialists) == bool(model.model_name_or_path):
        raise ValueError(
            "Give either a fused model (--model_name_or_path) or specialists to fuse (`specialists:` in the recipe), "
            f"but got {model.model_name_or_path!r} and {fused.specialists!r}."
        )
    quantised = get_quantization_config(model)
    if fused.specialists:
        check_loss(UltraFuserConfig(**fused.choices()))
        if quantised is not None:
            raise ValueError(
                "A saved fused model is quantised while it is read, but `load_in_4bit` or `load_in_8bit` came with "
                "`specialists:`, which are fused now. Fuse them into a folder first: `ultrafuser fuse`."
            )
        own = {"revisions": fused.specialist_revisions, "base": fused.base}
        fusing = UltraFuserForCausalLM.from_specialists(fused.specialists, **fused.choices(), **own, **shared)
        words = {"chat_template": fused.chat_template, "vocab_size": fusing.config.vocab_size}
        return fusing, common_tokenizer(fused.specialists, **own, **words)
    shared |= {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    shared |= {} if quantised is None else {"quantization_config": quantised}
    folder = model.model_name_or_path
    try:
        tokenizer = load_tokenizer(folder, revision=model.model_revision, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"Text is read with the fused model's tokenizer, but {folder!r} holds none that loads. Save a specialist's "
            f"there: `common_tokenizer(specialists).save_pretrained({folder!r})`."
        ) from error
    # a folder of adapters alone has none
    if file_or_none(folder, "config.json", revision=model.model_revision) is not None:
        config = load_config(folder, revision=model.model_revision, trust_remote_code=trust_remote_code)
        if isinstance(config, UltraFuserConfig):
            check_loss(config)
    return load_any_model(folder, **shared), tokenizer


def load_domains(fused: FusedArguments, text_field: str = "text") -> Dataset | dict[str, Dataset]:
    """Loads the training data: one dataset per domain, or one whose rows name theirs.

    Raises:
        ValueError: If a domain cannot be read, naming it, its file and the row.
        OSError: If there is no such file or set.
    """
    if not fused.domains:
        raise ValueError("Training draws from domains, but the recipe has none. Add `domains:`, a dataset for each.")
    one = isinstance(fused.domains, dict) and isinstance(fused.domains.get("path"), str)
    places = [fused.domains] if one else list(fused.domains.values()) if isinstance(fused.domains, dict) else [None]
    if odd := [p for p in places if not isinstance(p, dict) or not isinstance(p.get("path"), str)]:
        raise ValueError(
            f"`domains` says for each domain where its data are, {{math: {{path: ..., split: train}}}}, but one is "
            f"{str(odd[0])[:200]!r}. Correct it."
        )
    if one:
        return load(fused.domains, text_field=text_field)
    return {name: load(arguments, name, text_field=text_field) for name, arguments in fused.domains.items()}
