"""What this project relies on of accelerate beyond its documents."""

import inspect

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import BatchSampler, SequentialSampler


def test_batches_are_dealt_to_processes_in_the_order_in_which_they_are_drawn():
    batches = BatchSampler(SequentialSampler(range(8)), batch_size=2, drop_last=False)
    shares = [list(BatchSamplerShard(batches, num_processes=2, process_index=i)) for i in range(2)]
    assert shares == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_gradients_are_in_step_at_the_last_of_the_accumulated_batches_alone():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    seen = []
    for _ in range(4):
        with accelerator.accumulate(model):
            seen.append(accelerator.sync_gradients)
    assert seen == [False, True, False, True]


def test_the_deepspeed_plugin_takes_a_configuration_and_tells_its_stage():
    assert "hf_ds_config" in inspect.signature(DeepSpeedPlugin).parameters
    assert "zero_stage" in DeepSpeedPlugin.__dataclass_fields__
