"""Reads the models of a merge: folders of specialists, or those in a fused folder, and what all were tuned from."""

from dataclasses import dataclass
from pathlib import Path

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.files_ultrafuser import read_json
from modeling_ultrafuser.lora_ultrafuser import adapter_config
from modeling_ultrafuser.refusals_ultrafuser import Refusal

from ..check import metadata
from ..compress.compressing import one_tokenizer
from ..compress.full_models import LEAST_COSINE, Checkpoint, check_same, cosine_of_a_layer
from ..hub.model_card import read_licences
from ..licences import Ingredient, read_ingredient
from ..pretrained import read_ingredients, read_tokenizer


BASE = "base"
RULE = "A merge adds up weights, so all models have one architecture and one shape"
WAY_OUT = "Leave it out; or fuse them, which needs one tokenizer only."


@dataclass
class Sources:
    """Models to merge, one tensor at a time.

    Attributes:
        specialists: By name.
        base: The model that all were tuned from, if it is known.
        origins: Hub id or folder of each, by name; None if it is not known.
        ingredients: Each with its licence.
    """

    specialists: dict[str, Checkpoint]
    base: Checkpoint | None
    origins: dict[str, str | None]
    ingredients: list[Ingredient]

    def __post_init__(self):
        self.tokenizer = one_tokenizer(self.all)

    @property
    def all(self) -> list[Checkpoint]:
        """Specialists and base."""
        return [*self.specialists.values(), *([self.base] if self.base is not None else [])]

    @property
    def first(self) -> Checkpoint:
        """The specialist whose configuration the merged model has."""
        return self.all[0]

    @property
    def start(self) -> Checkpoint:
        """The model that changes are counted from: the base, or a specialist where any model does."""
        return self.base or self.first

    @property
    def names(self) -> list[str]:
        """Names of the specialists."""
        return list(self.specialists)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.first.config.get_text_config(decoder=True).num_hidden_layers

    def check_numbers(self) -> None:
        """Refuses models that do not have one start.

        Raises:
            Refusal: Naming two.
        """
        for other in self.all:
            layer, cosine = cosine_of_a_layer(self.start, other)
            if not cosine > LEAST_COSINE:
                raise Refusal(
                    f"`{layer}` of {other.name!r} has nothing to do with that of {self.start.name!r}: a cosine of {cosine:.3f}",
                    "A merge adds up changes of one start, which what was tuned from it resembles",
                    WAY_OUT,
                )


def read_sources(what: list[str], base: str | None, work: Path) -> Sources:
    """Reads and checks everything but numbers.

    Args:
        what: NAME=ID, NAME=ID@REVISION or NAME=FOLDER of each specialist; or the folder of a fused model alone, whose
            specialists are written to `work` first, adapters merged into their base.
        base: The model that all were tuned from: ID, ID@REVISION or folder.
        work: Folder for what is needed meanwhile.

    Raises:
        ValueError: If one is no full model, or they are not of one architecture and shape.
        OSError: If one cannot be read.
    """
    fused = Path(what[0])
    if len(what) == 1 and is_fused(fused):
        places = _written(fused, work)
        recorded = read_ingredients(fused)
        origins = {name: recorded.get(name, {}).get("source") for name in places}
        ingredients = read_licences(fused, list(places))
    else:
        places = metadata.parse(what)
        origins = {name: location for name, (location, _) in places.items()}
        ingredients = [read_ingredient(name, location) for name, location in origins.items()]
    if BASE in places:
        rule = "The model that all were tuned from is called so"
        raise Refusal(f"a specialist is called {BASE!r}", rule, "Choose another name.")
    models = {name: _checkpoint(name, *place) for name, place in places.items()}
    root = None
    if base is not None:
        [place] = metadata.parse([base]).values()
        root, origins[BASE] = _checkpoint(BASE, *place), place[0]
        ingredients.append(read_ingredient(BASE, place[0]))
    for other in models.values():
        check_same(root or next(iter(models.values())), other, RULE, WAY_OUT)
    return Sources(models, root, origins, ingredients)


def is_fused(folder: Path) -> bool:
    """Returns whether a folder holds a fused model."""
    config = folder / "config.json"
    return config.exists() and read_json(config).get("model_type") == "ultrafuser"


def _checkpoint(name: str, location: str, revision: str | None) -> Checkpoint:
    if adapter_config(location, revision=revision or "main") is not None:
        raise Refusal(
            f"{name!r} is a LoRA adapter, {location!r}",
            "A merge adds up full models' weights",
            "Fuse the adapters, and merge the fused folder: `ultrafuser merge FUSED --base BASE`.",
            about="adapters",
        )
    return Checkpoint(name, location, revision)


def _written(fused: Path, work: Path) -> dict[str, tuple[str, None]]:
    """Writes the specialists of a fused model as ordinary models."""
    model, tokenizer = UltraFuserForCausalLM.from_pretrained(fused, dtype="auto"), read_tokenizer(fused)
    for name in model.config.specialist_names:
        model.specialist(name).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    return {name: (str(work / name), None) for name in model.config.specialist_names}
