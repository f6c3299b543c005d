"""Private hooks of TRL, transformers and torch that the trainers rely on, each behind a name of its own.

Seen in trl 1.16, transformers 5.23, accelerate 1.15 and torch 2.13. `tests/contracts/` holds a test of each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from modeling_ultrafuser.gate_base_ultrafuser import Reads


class HookedTrainer:
    """Mixin for a `Trainer` that draws with a sampler of its own, and adds to checkpoints.

    A subclass defines `save_stage(folder)`, which writes its state into a checkpoint.

    Attributes:
        sampler: Draws the training examples.
    """

    sampler: Sampler

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        # `Trainer` makes the training data loader with it, and shards what it draws over the processes
        return self.sampler

    def _save_rng_state(self, output_dir: str) -> None:
        # every process runs it for every checkpoint, before `trainer_state.json` is written and old ones are deleted
        super()._save_rng_state(output_dir)
        self.save_stage(output_dir)


class HookedSFTTrainer(HookedTrainer, SFTTrainer):
    """`SFTTrainer` that calls methods with public names where a stage replaces or extends private ones.

    A subclass defines `prepare(dataset, whose, processing_class, args, packing, formatting_func)`, which turns rows into
    tokens and labels, and what `HookedTrainer` asks for.

    Attributes:
        extra_columns: Columns that stay in the data beside those that the model reads.
    """

    extra_columns: tuple[str, ...] = ("domain",)

    def prepare_as_trl(self, dataset, whose: str, processing_class, args, packing, formatting_func) -> Any:
        """Calls TRL's own preparation of a dataset."""
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, whose)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # TRL calls it in `__init__` for the training and the evaluation data, and before each evaluation of others
        return self.prepare(dataset, dataset_name, processing_class, args, packing, formatting_func)

    def _set_signature_columns_if_needed(self) -> None:
        # TRL and `Trainer` drop all columns but `_signature_columns`, which this fills in unless it is a list already
        super()._set_signature_columns_if_needed()
        missing = [c for c in self.extra_columns if c not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *missing]


def model_columns(trainer: Trainer) -> list[str]:
    """Returns the columns that the collator is given, as `Trainer` would select them for a prepared dataset."""
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    return trainer._signature_columns


def without_unused_columns(trainer: Trainer, dataset) -> Any:
    """Returns a dataset with the columns that training reads, as the training data loader has it."""
    return trainer._remove_unused_columns(dataset, description="training")


def on_device(trainer: Trainer, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Moves a batch to the device of this process, as the training step does (`Trainer._prepare_inputs`)."""
    return trainer._prepare_inputs(batch)


def token_scores(model: nn.Module, batch: dict[str, Tensor]):
    """Runs a model that TRL gave a fused head to. The output has `log_probs`, `entropy`, `is_top1` and `label_mask`.

    `SFTTrainer.__init__` puts the keyword `fused_lm_head` on `model.forward`, and `compute_loss` passes it.
    """
    return model(**batch, use_cache=False, fused_lm_head=True)


def forget_metrics(trainer: SFTTrainer, names: tuple[str, ...]) -> None:
    """Drops what TRL has gathered for the next log of training (`_metrics`), before it logs the means."""
    for name in names:
        trainer._metrics["train"].pop(name, None)


def dict_settings(config: type[SFTConfig] | SFTConfig) -> list[str]:
    """Returns the names of settings that are parsed as JSON on the command line (`_VALID_DICT_FIELDS`)."""
    return config._VALID_DICT_FIELDS


def renew_deepspeed(args: SFTConfig) -> None:
    """Fills in DeepSpeed's configuration anew, after settings that it copies from `args` have changed.

    `TrainingArguments.__post_init__` fills it in once, with the accumulated steps and the learning rate of then.
    """
    if getattr(args, "hf_deepspeed_config", None) is not None:
        args.hf_deepspeed_config = type(args.hf_deepspeed_config)(args.deepspeed)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = type(args.deepspeed_plugin)(hf_ds_config=args.hf_deepspeed_config)


def remember_callback(state: TrainerState, callback: TrainerCallback) -> None:
    """Adds a callback to the state, where `Trainer` looks for it by class name even if the checkpoint had none."""
    state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())


def end_without_training(trainer: Trainer) -> None:
    """Leaves `train()` before its first step: resets `is_in_train`, and loads the best model where one is asked for."""
    trainer.is_in_train = False
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()


def keep_head_whole(fused: PreTrainedModel) -> None:
    """Lets FSDP2 gather the head by its own means before anything multiplies by its weight.

    TRL's fused head gathers it with `full_tensor()`, whose backward pass gives each process the gradient of its own batch.
    """

    def gather(*_) -> None:
        head = fused.get_output_embeddings()
        if hasattr(head, "unshard"):
            head.unshard()

    def scatter(*_) -> None:
        head = fused.get_output_embeddings()
        if hasattr(head, "reshard") and not torch.is_grad_enabled():  # else the backward pass does
            head.reshard()

    if Reads.PAST in fused.model.fusion_gate.reads:
        # the backbone asks it for evidence
        fused.model.register_forward_pre_hook(gather)
    fused.model.register_forward_hook(gather)
    fused.register_forward_hook(scatter)


def whole_head(fused: PreTrainedModel) -> Tensor:
    """Returns the head's weight, gathered from all processes where each holds a part. Shape (vocab, hidden sizes).

    Every process must call it at the same time. FSDP2 parameters have `full_tensor`, those of ZeRO-3 have `ds_id`.
    """
    weight = fused.lm_head.weight
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor()
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight


def is_zero_3(trainer: Trainer) -> bool:
    """Returns whether DeepSpeed holds every parameter in parts, as Accelerate's plugin says."""
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
