"""Base of all layouts of a mixture of experts."""

from transformers import PreTrainedConfig

from modeling_ultrafuser.refusals_ultrafuser import Refusal


TOP = 2  # experts of each token, as in Mixtral


class Layout:
    """Base of all layouts. A layout is one file with one subclass, and one line in `LAYOUTS`.

    Attributes:
        families: `model_type` of the specialists that it can hold.
        config_class: Of the mixture.
        expert: Name of an expert's weight in files, with `layer`, `expert` and `part`.
        parts: What the layout calls the parts of a feed-forward block.
        router: Name of a layer's router in files.
    """

    families: tuple[str, ...] = ()
    config_class: type[PreTrainedConfig]
    expert = ""
    parts: dict[str, str] = {}
    router = ""

    def check(self, name: str, config: PreTrainedConfig) -> None:
        """Refuses specialists that the layout cannot hold.

        Args:
            name: Of the specialist.
            config: Its own.

        Raises:
            Refusal: Naming the family, or the biases that have no place.
        """
        kind = self.config_class.model_type
        if config.model_type not in self.families:
            raise Refusal(
                f"{name!r} is of the family {config.model_type!r}",
                f"A {kind} model has the layers of {' or '.join(self.families)}",
                "Choose another layout with --to, or merge or distil the specialists.",
            )
        biases = [field for field in ("attention_bias", "mlp_bias") if getattr(config, field, False)]
        if biases:
            raise Refusal(
                f"{name!r} has `{biases[0]}`", f"A {kind} model has no such biases", "Merge or distil the specialists."
            )

    def config(self, config: PreTrainedConfig, experts: int) -> PreTrainedConfig:
        """Makes the mixture's configuration out of a specialist's."""
        known = self.config_class().to_dict().keys() | {"head_dim", "dtype"}
        kept = {key: value for key, value in config.to_dict().items() if key in known}
        for field in ("model_type", "architectures", "transformers_version", "_name_or_path"):
            kept.pop(field, None)
        return self.config_class(**kept, **self.settings(config, experts))

    def settings(self, config: PreTrainedConfig, experts: int) -> dict:
        """Returns what the mixture's configuration has more than a specialist's."""
        raise NotImplementedError

    def zeros(self, config: PreTrainedConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of what a layer has more, which is all 0."""
        return {}
