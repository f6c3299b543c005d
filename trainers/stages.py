"""The two stages of the paper (Ding et al., 2024, Algorithm 1) as thin subclasses of TRL's `SFTTrainer`.

A fused model is an ordinary causal language model, so TRL already computes the right loss. A stage says which
parameters it trains, and both draw their batches evenly from the domains.
"""

from collections.abc import Mapping

from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from .sampling import BalancedSampler


class _StageTrainer(SFTTrainer):
    """What both stages share.

    Args:
        model: A fused model, its folder or its Hub id.
        args: Training arguments. Batch sizes count examples of all domains together: a multiple of the number of
            domains makes every batch exactly even.
        train_dataset: A dataset with a column `domain`, or one dataset per domain name. Rows as for `SFTTrainer`.
        **kwargs: As for `SFTTrainer`.

    Raises:
        ValueError: If the data has no domains, the model is not a fused one, or nothing would be trained.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SFTConfig | None = None,
        train_dataset: Dataset | Mapping[str, Dataset] | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            trust = bool(args and args.trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust)
        if model.config.model_type != "ultrafuser":
            raise ValueError(
                f"{type(self).__name__} trains a fused model, but got a {type(model).__name__}. Build one with "
                f"`UltraFuserForCausalLM.from_specialists(...)`, or train a single model with TRL's `SFTTrainer`."
            )
        args = SFTConfig(type(self).__name__) if args is None else args
        self._choose_parameters(model, args)
        super().__init__(model, args, train_dataset=_with_domains(train_dataset), **kwargs)

    def _choose_parameters(self, model: PreTrainedModel, args: SFTConfig) -> None:
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        # the dataset that comes as an argument has already lost the columns that the model does not read
        return BalancedSampler(self.train_dataset["domain"], seed=self.args.seed)


class GateTrainer(_StageTrainer):
    """Stage one: trains the gate and leaves every specialist as it is.

    The specialists run without autograd, so no activations of theirs are kept. The paper takes 400 steps at 2e-5
    with 64 examples of each domain (section 4.1); specialists of a few million parameters want near 1e-3.
    """

    def _choose_parameters(self, model: PreTrainedModel, args: SFTConfig) -> None:
        if not list(model.model.fusion_gate.parameters()):
            raise ValueError(
                f"Stage one trains the gate, but gate={model.config.gate!r} has no parameters. Fuse with gate='mlp'."
            )
        model.requires_grad_(False)
        model.model.fusion_gate.requires_grad_(True)
        # checkpointing would make frozen specialists run a second time, for gradients that nobody needs
        args.gradient_checkpointing = False


class JointTrainer(_StageTrainer):
    """Stage two: trains the gate and every specialist together, from where stage one ended.

    The paper takes 2e-5 with 32 examples of each domain (section 4.1).
    """

    def _choose_parameters(self, model: PreTrainedModel, args: SFTConfig) -> None:
        model.requires_grad_(True)


def _with_domains(dataset: Dataset | Mapping[str, Dataset] | None) -> Dataset:
    if isinstance(dataset, Mapping):
        parts = [part.add_column("domain", [name] * len(part)) for name, part in dataset.items()]
        dataset = concatenate_datasets(parts)
    if dataset is None or "domain" not in dataset.column_names:
        columns = None if dataset is None else dataset.column_names
        raise ValueError(
            f"Batches are drawn evenly from the domains, so `train_dataset` needs a column 'domain', but its columns "
            f"are {columns}. Add one, or pass one dataset per domain: {{'text': ..., 'code': ...}}."
        )
    return dataset
