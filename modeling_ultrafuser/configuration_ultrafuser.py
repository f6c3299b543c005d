"""Configuration of a fused model: which specialists, which gate, which fusion."""

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .adapters_ultrafuser import EMBEDDING_RANK, HEAD_RANK
from .compat_ultrafuser import attention_of
from .families_ultrafuser import (
    SCALE_FIELDS,
    WINDOWS,
    Heads,
    common,
    field_of,
    heads_of,
    intermediate_size,
    plain_dict,
    specialist_layer_types,
)
from .files_ultrafuser import is_number
from .fusions_ultrafuser import fusion_class
from .gate_base_ultrafuser import WIDEST
from .gates_ultrafuser import GATES
from .names_ultrafuser import validate_specialist_names
from .readers_ultrafuser import reader_of
from .signed_ultrafuser import check_signed
from .sparsifiers_ultrafuser import NONE, sparsifier


# counts up when a saved folder changes in a way that older code would misread
FORMAT_VERSION = 2
HOTTEST = 1_000_000  # temperature of a gate
AUTO_MAP = {
    "AutoConfig": "configuration_ultrafuser.UltraFuserConfig",
    "AutoModel": "modeling_ultrafuser.UltraFuserModel",
    "AutoModelForCausalLM": "modeling_ultrafuser.UltraFuserForCausalLM",
    "AutoModelForSequenceClassification": "modeling_ultrafuser.UltraFuserForSequenceClassification",
}


class UltraFuserConfig(PreTrainedConfig):
    """Describes a fused model, and shows its specialists' layers laid end to end as one decoder.

    The derived fields at the top level (`hidden_size`, `num_hidden_layers`, `layer_types`, ...) are what generation,
    serving and training code reads from any causal language model; they always follow from the specialists.

    Args:
        specialist_names: Name of each specialist, in the order of the gate's columns.
        specialists: Configuration of each specialist's backbone, in the same order. Dicts are accepted.
        gate: How gate weights are computed, a name in `GATES`. "mlp" is the paper's, and what a folder means that says
            nothing; `from_specialists` chooses `DEFAULT_GATE`.
        gate_hidden_size: Width of the hidden layer of a gate that has one. 512 in the paper (section 4.1).
        gate_anchor: Name of the specialist whose hidden state alone the "anchor" gate reads.
        gate_temperature: Gate scores are divided by it before the softmax. Above 1 is softer, below 1 is sharper.
        gate_sparsifier: Which specialists keep a weight at a token: a name in `SPARSIFIERS`, a colon and its setting.
        signed_weights: A number of either sign for each specialist, which the gate's scores are added to in place of the
            softmax. Default: none, see `signed_ultrafuser.py`.
        gate_calibration: Whether the gate also predicts temperatures, see `Gate`.
        gate_switch_probability: How likely the "posterior" gate holds it that the best specialist changes after a token.
            Default: what suits the fusion rule.
        fusion: What is mixed, a name in `FUSIONS`; a colon and its settings, if it has any. "logits" is the paper's (Eq. 1).
        adapters: Where specialists are LoRA adapters of one base, whose configuration all then have: the highest `rank`
            among them, and the names of the linear layers that any of them adapts, `target_modules`. If any is on the
            token embedding or on the head, the highest `embedding_rank` or `head_rank`, too.
        vocab_size: Rows of the fused head. Default: the smallest vocabulary among the specialists.
        max_position_embeddings: Longest context, in tokens. Default: the shortest limit among the specialists.
        format_version: Of the saved folder, the first that knows all its fields. A folder newer than this code is refused.

    Raises:
        ValueError: If a choice is unknown or the specialists cannot be fused.
        TypeError: If a specialist is neither a configuration nor a dict.
    """

    model_type = "ultrafuser"
    # what `Trainer` does not count as predictions
    keys_to_ignore_at_inference = ["past_key_values", "cache", "gate_weights"]
    # the inherited default names modules that this model does not have
    base_model_fsdp_plan = {}

    specialist_names: list[str] | None = None
    specialists: list[Any] | None = None
    gate: str = "mlp"
    gate_hidden_size: int = 512
    gate_anchor: str | None = None
    gate_temperature: float = 1.0
    gate_sparsifier: str = NONE
    signed_weights: list[float] | None = None
    gate_calibration: bool = False
    gate_switch_probability: float | None = None
    fusion: str = "logits"
    adapters: dict[str, Any] | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02
    format_version: int = 1
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self._validate_choices()
        if self.specialist_names is None:
            self.specialist_names = []
        # before the specialists: a field of that name would have been written over one of them
        validate_specialist_names(self.specialist_names, type(self))
        self.specialists = [_as_backbone_config(c) for c in self.specialists or []]
        if len(self.specialist_names) != len(self.specialists):
            raise ValueError(
                f"Every specialist needs one name and one configuration, but got {len(self.specialist_names)} names "
                f"({self.specialist_names}) and {len(self.specialists)} configurations. Pass two lists of one length."
            )
        if self.specialists:
            self._derive_fields()
            for derived in self._DERIVED:
                kwargs.pop(derived, None)
        # written anew when it is saved, and the library cannot write into another kind
        if not isinstance(kwargs.get("auto_map"), dict):
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "UltraFuserConfig":
        """Like the library's, and refuses specialists that are no list of names and of configurations."""
        names, configs = (config_dict.get(field) or [] for field in ("specialist_names", "specialists"))
        lists = isinstance(names, list | tuple) and isinstance(configs, list | tuple)
        if not lists or not all(isinstance(c, dict | PreTrainedConfig) for c in configs):
            raise ValueError(
                f"A fused model's configuration holds a list of names and a list of configurations, but it holds "
                f"{str(names)[:100]!r} and {str(configs)[:100]!r}. Load it as it was saved."
            )
        return super().from_dict(config_dict, **kwargs)

    # written to config.json for readers that do not run this code, recomputed whenever it is read back
    _DERIVED = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("layer_types", "sliding_window", "attention_chunk_size", "final_logit_softcapping", "intermediate_size"),
    )

    def _validate_choices(self) -> None:
        # first: in a newer folder anything else may read as a mistake
        if self.format_version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"This code reads folders of fused models up to format {FORMAT_VERSION}, but this one is in format "
                f"{self.format_version!r}. Install a newer checkout of UltraFuser, or load the folder with its own code: "
                f"`trust_remote_code=True` in a process that does not import `modeling_ultrafuser`."
            )
        if not isinstance(self.gate, str) or self.gate not in GATES:
            raise ValueError(f"Unknown gate {self.gate!r}. Choose one of {list(GATES)}.")
        fusion_class(self.fusion)
        sparsifier(self.gate_sparsifier)
        if not isinstance(self.gate_calibration, bool):
            raise ValueError(f"`gate_calibration` is {self.gate_calibration!r:.100}, but it must be true or false.")
        if self.gate_calibration and not GATES[self.gate].can_calibrate:
            able = [name for name, gate in GATES.items() if gate.can_calibrate]
            raise ValueError(
                f"The gate {self.gate!r} predicts no temperatures. For `gate_calibration` choose one of {able}."
            )
        temperature = self.gate_temperature
        if not is_number(temperature) or not 1 / HOTTEST <= temperature <= HOTTEST:
            raise ValueError(
                f"`gate_temperature` divides the gate's scores, so it must be a positive number, from {1 / HOTTEST} to "
                f"{HOTTEST:,}, but it is {temperature!r:.100}. 1.0 changes nothing; for equal weights choose "
                f"gate='uniform'."
            )
        switch = self.gate_switch_probability
        if switch is not None and not (is_number(switch) and 0 <= switch < 1):
            raise ValueError(
                f"`gate_switch_probability` is the probability that another specialist becomes the best one, so it must be "
                f"at least 0 and below 1, but it is {switch!r:.100}. Leave it out for the one that fits the fusion rule."
            )
        width = self.gate_hidden_size
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= WIDEST:
            raise ValueError(
                f"`gate_hidden_size` is the width of the gate's hidden layer, so it must be a positive integer, at most "
                f"{WIDEST:,}, but it is {width!r:.100}. The paper uses 512."
            )

    def _derive_fields(self) -> None:
        if len(self.specialists) < 2:
            raise ValueError(
                f"Fusing needs at least two specialists, but got {self.specialist_names}. A single model can be "
                f"loaded with its own class."
            )
        reader_of(self).check(self)
        if len(self.backbones) < len(self.specialists):
            # one object, so that what changes it changes it for all
            self.specialists = self.backbones * len(self.specialists)
        configs, backbones = self.specialists, self.backbones
        self.hidden_size = max(columns.stop for columns in reader_of(self).head_columns(self))
        if self.adapters and self.adapters.keys() & {EMBEDDING_RANK, HEAD_RANK}:
            self.format_version = 2
        self.num_hidden_layers = sum(c.num_hidden_layers for c in backbones)
        for field, values in zip(Heads._fields, zip(*map(heads_of, configs), strict=True), strict=True):
            # absent where specialists differ: readers then fail loudly instead of guessing from `hidden_size`
            value = common(values)
            if value is not None:
                # heads of adapters of one base lie side by side in one cache
                copies = len(configs) // len(backbones) if field != "head_dim" else 1
                setattr(self, field, copies * value)
        self.intermediate_size = sum(intermediate_size(c) for c in backbones)
        self.layer_types = [t for c in backbones for t in specialist_layer_types(c)]
        for field, layer_type in WINDOWS.items():
            sizes = [field_of(c, field) for c in configs if layer_type in specialist_layer_types(c)]
            if sizes and common(sizes) is not None:
                setattr(self, field, sizes[0])
        fusion = fusion_class(self.fusion)
        for strategy in (fusion, GATES[self.gate]):
            strategy.check(self)
            self.format_version = max(self.format_version, strategy.format_version)
        if self.signed_weights is not None:
            check_signed(self)
            self.signed_weights, self.format_version = [float(n) for n in self.signed_weights], 2
        if fusion.fused_cap(self) is not None:
            self.final_logit_softcapping = fusion.fused_cap(self)
        if self.vocab_size is None:
            self.vocab_size = min(c.vocab_size for c in configs)
        if self.max_position_embeddings is None:
            limits = [getattr(c, "max_position_embeddings", None) for c in configs]
            self.max_position_embeddings = min((n for n in limits if n), default=None)

    def validate(self) -> None:
        """Like the library's, but for types of layers: a family may have some that only its own configuration admits."""
        layer_types = self.__dict__.pop("layer_types", None)
        try:
            super().validate()
        finally:
            if layer_types is not None:
                self.layer_types = layer_types

    @property
    def backbones(self) -> list[PreTrainedConfig]:
        """Configurations of the backbones that there are: one for each specialist, or the base's alone."""
        return reader_of(self).backbones(self._names_and_configs()[1])

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """Class of each specialist's configuration by name: how dtype and attention choices reach specialists."""
        return {n: type(c) for n, c in zip(*self._names_and_configs(), strict=False)}

    @property
    def per_layer_config(self) -> list[PreTrainedConfig]:
        """The configuration that each layer was built from, specialist after specialist: how caches are laid out."""
        return [layer for c in self.backbones for layer in c.per_layer_config]

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """Returns the layers that reuse another's keys and values (Gemma 3n and 4): caches hold none of theirs."""
        configs = self.backbones
        modes = [getattr(c, "kv_sharing_modes", None) for c in configs]
        if not any(modes):
            return None
        return [m for c, own in zip(configs, modes, strict=True) for m in own or [None] * c.num_hidden_layers]

    @per_layer_config.setter
    def per_layer_config(self, value) -> None:
        raise AttributeError("`per_layer_config` follows from the specialists' own configurations: change those.")

    def _names_and_configs(self) -> tuple[list[str], list[PreTrainedConfig]]:
        # read during construction too, when neither field need exist
        return self.__dict__.get("specialist_names") or [], self.__dict__.get("specialists") or []

    def __getattr__(self, name: str):
        names, configs = self._names_and_configs()
        if name in names and len(names) == len(configs):
            return configs[names.index(name)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value) -> None:
        names, configs = self._names_and_configs() if name != "specialists" else ([], [])
        if name in names:
            configs[names.index(name)] = value
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Like the library's, with the list of specialists as a list of dicts in its own order."""
        # the library converts a configuration that is a direct attribute, but not one inside a list
        output = super().to_dict()
        output["specialists"] = [plain_dict(c) for c in self._names_and_configs()[1]]
        # vLLM asks for `AutoModel`, which saving the causal language model alone would leave out
        output["auto_map"] = AUTO_MAP
        # a model may have been loaded with another rule, or given another gate
        strategies = fusion_class(self.fusion), GATES[self.gate]
        output["format_version"] = max(self.format_version, *(s.format_version for s in strategies))
        if self.gate_anchor is None:
            del output["gate_anchor"]
        if self.gate_sparsifier == NONE:
            del output["gate_sparsifier"]
        if self.signed_weights is None:
            del output["signed_weights"]
        return output


def _as_backbone_config(config: PreTrainedConfig | dict) -> PreTrainedConfig:
    """A copy that describes the backbone alone: its head is a part of the wide head, scaled and never tied."""
    config = copy.deepcopy(_as_config(config).get_text_config(decoder=True))
    config.tie_word_embeddings = False
    # or the library's own causal models cannot read their backbone's output
    config.return_dict = True
    # what is returned is the fused model's choice, whatever stands here
    config.output_hidden_states = config.output_attentions = False
    if getattr(config, "output_router_logits", False):
        # for a loss that a fused model does not have, which is told when fusing
        config.output_router_logits = False
    for field in SCALE_FIELDS:
        if getattr(config, field, None) is None:
            continue
        if isinstance(getattr(type(config), field, None), property):
            # MiniCPM3 computes its scale from two widths
            field, one = "dim_model_base", config.hidden_size
        else:
            one = 1.0
        setattr(config, field, one)
    for field in ("architectures", "auto_map"):
        config.__dict__.pop(field, None)
    return config


def _as_config(config: PreTrainedConfig | dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict):
        raise TypeError(
            f"A specialist is described by a configuration object or a dict, but got {type(config).__name__}. Load "
            f"one with `AutoConfig.from_pretrained(...)`."
        )
    config = dict(config)
    model_type = config.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"A specialist must be of an architecture that transformers itself contains, because its own remote code "
            f"is never run, but `model_type` is {model_type!r}. Upgrade transformers if the architecture is newer "
            f"than it."
        )
    return AutoConfig.for_model(model_type, **config)


def attention_of_all(config: "UltraFuserConfig") -> str | None:
    """The attention implementation that all specialists run by, or None."""
    return common(map(attention_of, config.backbones))
