"""Recipes of fused models: checks what to fuse, downloads it, fuses it and writes the folder."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from rich.filesize import decimal
from transformers import PreTrainedTokenizerBase

from modeling_ultrafuser import UltraFuserConfig, UltraFuserForCausalLM, common_tokenizer
from modeling_ultrafuser.gates_ultrafuser import DEFAULT_GATE, gate_settings
from modeling_ultrafuser.plan_base_ultrafuser import BLOCKS
from modeling_ultrafuser.refusals_ultrafuser import Refusal
from modeling_ultrafuser.signed_ultrafuser import in_order
from modeling_ultrafuser.sparsifiers_ultrafuser import NONE

from .. import licences
from ..atomic import new_folder
from ..check.checks import Judgement, judge
from ..check.metadata import Source
from ..pretrained import save_fused
from ..strategies import FUSION_HELP, GATE_HELP, SPARSIFIER_HELP
from ..yaml_files import read_yaml


@dataclass
class FusionSettings:
    """Settings of a recipe: specialists, gate, fusion rule."""

    specialists: dict[str, str] | None = field(
        default=None, metadata={"help": "Name to Hub id or folder, to fuse first. Or give --model_name_or_path."}
    )
    specialist_revisions: dict[str, str] | None = field(
        default=None, metadata={"help": "Name to commit of its repository, for results that can be repeated."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Whose chat template to take, if they differ."})
    gate: str = field(default=DEFAULT_GATE, metadata={"help": GATE_HELP})
    fusion: str = field(default="logits", metadata={"help": FUSION_HELP})
    gate_sparsifier: str = field(default=NONE, metadata={"help": SPARSIFIER_HELP})
    base: str | None = field(
        default=None, metadata={"help": "Where the base of specialists that are adapters is, if not where they say."}
    )
    signed_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Name to a number of either sign, which the gate's scores are added to."}
    )

    def __post_init__(self):
        for name in ("specialists", "specialist_revisions"):
            check_words(name, getattr(self, name) or {})
        for name in ("chat_template", "gate", "fusion", "gate_sparsifier", "base"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise Refusal(
                    f"`{name}` of a recipe is {str(value)[:200]!r}", "It is a word", "Correct it.", about="recipe"
                )

    def choices(self) -> dict:
        """Gate, sparsifier, signed weights and fusion rule, as fields of the configuration."""
        signed = in_order(self.signed_weights, list(self.specialists or {}))
        weights = {"gate_sparsifier": self.gate_sparsifier, "signed_weights": signed}
        return {**gate_settings(self.gate), **weights, "fusion": self.fusion}


def check_words(field: str, value) -> None:
    """Refuses what is no dict from words to words.

    Raises:
        ValueError: Naming the field.
    """
    pairs = value.items() if isinstance(value, dict) else [(None, None)]
    if not all(isinstance(word, str) and word for pair in pairs for word in pair):
        raise Refusal(
            f"`{field}` of a recipe is {str(value)[:200]!r}",
            "It says `name: word` for each",
            "Correct it; put what looks like a number into quotes.",
            about="recipe",
        )


@dataclass
class FusionRecipe:
    """A recipe that fuses specialists.

    Attributes:
        fusion: What to fuse.
        dtype: Of the specialists and the head; "auto" takes what they share.
        out: The folder to write, where the recipe says one.
    """

    fusion: FusionSettings
    dtype: str = "auto"
    out: Path | None = None

    @classmethod
    def read(cls, path: Path) -> "FusionRecipe":
        """Reads a YAML file that says what to fuse, and may say `dtype` and `out` too.

        Raises:
            ValueError: If it holds something else.
            OSError: If it cannot be read.
        """
        raw = read_yaml(path)
        known = [f.name for f in fields(FusionSettings)]
        unknown = sorted(set(raw) - {*known, "dtype", "out"}) if isinstance(raw, dict) else [type(raw).__name__]
        if unknown:
            raise Refusal(
                f"{str(path)!r} has {unknown}",
                f"A recipe for fusing has the fields {[*known, 'dtype', 'out']}",
                "Recipes for training are for `ultrafuser train`, which fuses first.",
                about="recipe",
            )
        rest = {k: raw[k] for k in ("dtype", "out") if k in raw}
        check_words("dtype and out", rest)
        out = Path(rest["out"]) if "out" in rest else None
        return cls(FusionSettings(**{k: v for k, v in raw.items() if k in known}), rest.get("dtype", "auto"), out)

    def choose(self, choices: dict[str, Any], dtype: str | None = None) -> "FusionRecipe":
        """Returns the recipe with other choices: fields of `FusionSettings`, and a dtype."""
        return replace(self, fusion=replace(self.fusion, **choices), dtype=dtype or self.dtype)

    def plan(self) -> Judgement:
        """Checks the specialists without their weights. Returns the findings, and what fusing would take.

        Raises:
            ValueError: If it is not said what to fuse, or a choice is unknown.
        """
        fusion = self.fusion
        specialists, revisions = fusion.specialists or {}, fusion.specialist_revisions or {}
        if len(specialists) < 2 or set(revisions) - set(specialists):
            raise Refusal(
                f"the specialists are {specialists} and the revisions {revisions}",
                "Fusing needs at least two specialists, name=ID each, and revisions of those",
                "",
                about="recipe",
            )
        # refuses unknown choices
        UltraFuserConfig(**fusion.choices())
        locations = {name: (location, revisions.get(name)) for name, location in specialists.items()}
        return judge(locations, dtype=self.dtype, base=fusion.base, **fusion.choices())

    def build(
        self,
        out: Path,
        *,
        say: Callable[[str], None] = print,
        train: Callable[[UltraFuserForCausalLM, PreTrainedTokenizerBase], None] | None = None,
    ) -> None:
        """Writes the folder of a fused model: weights, code, tokenizer, and where the specialists come from.

        Killed at any time, it leaves nothing that loads; run again, it goes on with the files that the Hub's cache has.

        Args:
            out: The folder to write. There must be nothing in it.
            say: Called with a line about each step.
            train: Called with the model and its tokenizer before they are written. Default: the gate weighs all alike.

        Raises:
            FileExistsError: If there is something in `out`.
            ValueError: If the specialists cannot be fused.
            OSError: If one cannot be read, or the disk is too small.
        """
        with new_folder(out) as folder:
            judgement, tokenizer = self.fetch(folder, say=say)
            say("fusing")
            model = self.fuse(judgement.sources)
            if train is not None:
                train(model, tokenizer)
            say("writing")
            save_fused(folder, model, tokenizer, self.origins(judgement.sources))

    def fetch(self, folder: Path, *, say: Callable[[str], None]) -> tuple[Judgement, PreTrainedTokenizerBase]:
        """Checks the specialists and the room in `folder`, then makes the tokenizer and downloads weights.

        Returns:
            The findings of the checks, and the specialists' common tokenizer.

        Raises:
            ValueError: If the specialists cannot be fused.
            OSError: If one cannot be read, or the disk is too small.
        """
        judgement, specialists = self.plan(), self.fusion.specialists
        if blocks := [f"{f.about}: {f.text} {f.fix}".rstrip() for f in judgement.findings if f.status == BLOCKS]:
            raise ValueError("\n".join(blocks))
        sources, size = judgement.sources, judgement.numbers["disk"]
        tokenizer = common_tokenizer(
            specialists,
            chat_template=self.fusion.chat_template,
            revisions=commits(sources),
            vocab_size=judgement.numbers["vocab_size"],
            base=self.fusion.base,
        )
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(
                f"The fused model takes {decimal(size)}, and {decimal(free)} are free at {str(folder)!r}. Make room, or "
                f"choose a folder on another disk."
            )
        for k, (name, source) in enumerate(sources.items(), start=1):
            say(f"{name} ({k} of {len(sources)}): {specialists[name]}")
            if source.download:
                snapshot_download(source.location, revision=source.commit, allow_patterns=[*source.weights])
        if judgement.base is not None:
            say(f"their base: {judgement.base.location}")
        return judgement, tokenizer

    def fuse(self, sources: dict[str, Source]) -> UltraFuserForCausalLM:
        """Returns the specialists fused as they are at the commits that were read, with a new gate."""
        fusion = self.fusion
        own = {"dtype": self.dtype, "revisions": commits(sources), "base": fusion.base}
        return UltraFuserForCausalLM.from_specialists(fusion.specialists, **fusion.choices(), **own)

    def origins(self, sources: dict[str, Source]) -> dict[str, dict[str, str | None]]:
        """Describes the origin of each specialist, see `described`."""
        return {name: described(self.fusion.specialists[name], source) for name, source in sources.items()}


def commits(sources: dict[str, Source]) -> dict[str, str]:
    """The commit of each specialist that is a repository."""
    return {name: source.commit for name, source in sources.items() if source.commit}


def described(location: str, source: Source) -> dict[str, str | None]:
    """Describes a specialist's origin and the licence on its card, to be kept beside the model."""
    stated = asdict(licences.read_ingredient(location, str(source.folder)))
    del stated["name"]
    return {"source": location, "commit": source.commit, **{key: value for key, value in stated.items() if value}}
