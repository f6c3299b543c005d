"""The specialists' backbones as one part of the model."""

from torch import nn


# the one part of `Specialists` where all specialists are adapters of it
BASE = "base"


class Specialists(nn.ModuleDict):
    """The specialists' backbones by name; or their base alone, where specialists are adapters of it.

    `PreTrainedModel.post_init` collects what follows from its direct children only, by attribute name: without these
    properties `device_map="auto"` could cut a decoder layer in two and tensor-parallel plans would be empty.
    """

    _no_split_modules = property(lambda self: self._union("_no_split_modules"))
    _keep_in_fp32_modules = property(lambda self: self._union("_keep_in_fp32_modules"))
    _keep_in_fp32_modules_strict = property(lambda self: self._union("_keep_in_fp32_modules_strict"))
    _skip_keys_device_placement = property(lambda self: self._union("_skip_keys_device_placement"))
    _keys_to_ignore_on_load_unexpected = property(lambda self: self._union("_keys_to_ignore_on_load_unexpected"))
    _keys_to_ignore_on_load_missing = property(lambda self: self._union("_keys_to_ignore_on_load_missing"))
    _keys_to_ignore_on_save = property(lambda self: self._prefixed_set("_keys_to_ignore_on_save"))
    _tp_plan = property(lambda self: self._prefixed_dict("_tp_plan"))
    _ep_plan = property(lambda self: self._prefixed_dict("_ep_plan"))
    _fsdp_plan = property(lambda self: self._prefixed_dict("_fsdp_plan"))

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        pairs = [(name, tied) for name, m in self.items() for tied in m.all_tied_weights_keys.items()]
        return {f"{name}.{target}": f"{name}.{source}" for name, (target, source) in pairs}

    def _union(self, field: str) -> set[str]:
        return {entry for m in self.values() for entry in getattr(m, field, None) or ()}

    def _prefixed_set(self, field: str) -> set[str]:
        return {f"{name}.{entry}" for name, m in self.items() for entry in getattr(m, field, None) or ()}

    def _prefixed_dict(self, field: str) -> dict:
        return {f"{n}.{k}": v for n, m in self.items() for k, v in (getattr(m, field, None) or {}).items()}
