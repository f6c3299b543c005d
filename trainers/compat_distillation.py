"""Private hooks of TRL's `DistillationTrainer`. They are apart from `compat.py` because importing it takes seconds.

Seen in trl 1.16. `tests/contracts/test_distillation_contract.py` holds a test of each.
"""

from typing import Any

from torch import Tensor, nn
from trl import DistillationTrainer

from .compat import HookedTrainer


class HookedDistillationTrainer(HookedTrainer, DistillationTrainer):
    """`DistillationTrainer` that reads prompts of tokens, and calls methods with public names in place of private ones.

    A subclass defines, beside what `HookedTrainer` asks for,

    - `completed(rows)`, which makes one batch of the rows of a whole step: a dict of tensors, of rows but for
      `num_items_in_batch`, the number of trained tokens over all processes;
    - `token_loss(student, inputs, num_items)`, which returns the loss of a part of it, the sum of the student's
      entropies in nats, and the number of trained tokens.
    """

    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Lets the student write on, as the settings of generation say. Prompts and answers are token ids."""
        return self._generate(prompts)[1]

    def _tokenize_prompts(self, prompts: list) -> tuple:
        # TRL generates from what this returns: tokens, images, and what goes with these
        return prompts, None, {}

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        # TRL calls it once a step, and cuts what comes back into as many parts as steps are accumulated
        return self.completed(inputs)

    def _compute_loss(self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch) -> tuple:
        # TRL's `compute_loss` calls it within the forward pass of whatever wraps the student
        return self.token_loss(unwrapped_student, inputs, num_items_in_batch)
