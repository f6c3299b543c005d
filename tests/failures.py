"""Provokes the failures of `docs/failures.md`, each as a user would, and writes there what is said.

python -m tests.failures
"""

import json
import logging
import os
import re
import tempfile
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import tests.conftest  # noqa: F401


# isort: split
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, set_seed
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from modeling_ultrafuser import UltraFuserForCausalLM, common_tokenizer
from tests.support.conversations import CHAT_TEMPLATE, conversations
from tests.support.hub_server import HubServer
from tests.support.stand_ins import LLAMA_2_13B, many_words, stand_in
from tests.support.tiny import specialist, tokenizer
from trainers import GateStageConfig, GateTrainer, JointStageConfig, JointTrainer
from ultrafuser.cli.app import app
from ultrafuser.decoding.drafting import self_draft


PAGE = Path(__file__).parents[1] / "docs" / "failures.md"
# the failure with its cause, what is done about it, what is said, and the tests
ROW = re.compile(r'^\| <a id="([\w-]+)"></a>(.*) \| (.*) \| (.*) \| (.*) \|$', re.MULTILINE)


# ---------------------------------------------------------------------------------- how things are said


def refused(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except (ValueError, OSError, AttributeError) as error:
        return str(error)
    raise AssertionError("nothing was refused")


def fuse(*names, **choices):
    return UltraFuserForCausalLM.from_specialists({name: name for name in names or ("text", "code")}, **choices)


def logged(call) -> str:
    """The lines that fusing prints on its way."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("modeling_ultrafuser")
    logger.addHandler(handler)
    try:
        call()
    finally:
        logger.removeHandler(handler)
    return "\n".join(lines)


def warned(call, about: str) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    return next(str(w.message) for w in told if about in str(w.message))


def checked(about: str, *arguments: str) -> str:
    """The lines of `ultrafuser check` about something."""
    shown = CliRunner().invoke(app, ["check", *(arguments or ("text", "code"))])
    return lines_about(about, shown.stdout)


def lines_about(about: str, shown: str) -> str:
    lines = [re.split(r"\s{2,}", line) for line in shown.splitlines()]
    found = ["  ".join(line) for line in lines if about in line[:2]]
    assert found, shown
    return "\n".join(found)


# ---------------------------------------------------------------------------------- what is to go wrong


def save(name, *, family="llama", words=None, template=None, licence="mit", **fields):
    model = specialist(family, **{"layers": 1, "hidden_size": 16, **fields})
    model.save_pretrained(name)
    words = words or tokenizer()
    words.chat_template = template
    words.save_pretrained(name)
    Path(name, "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return model


def edit(file, **fields):
    path = Path(file)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def stage(cls, model=None, *, data=None, folder="out", more=None, **settings):
    config = {GateTrainer: GateStageConfig, JointTrainer: JointStageConfig}[cls]
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    small = {"examples_per_domain": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    data = data or {name: Dataset.from_list(conversations(4)) for name in ("text", "code")}
    arguments = config(folder, **{**quiet, **small, "max_steps": 1, **settings})
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    return cls(model or tiny(), arguments, data, processing_class=words, **(more or {}))


def tiny(**choices):
    parts = {name: specialist(layers=1, hidden_size=16) for name in ("text", "code")}
    return UltraFuserForCausalLM.from_specialists(parts, **choices)


# ---------------------------------------------------------------------------------- building


def different_tokenizers():
    save("text"), save("code", words=tokenizer(swap="ab"))
    return refused(fuse)


def unequal_rows():
    save("text"), save("code", vocab_size=104)
    return logged(fuse)


def lost_tokens():
    save("text", vocab_size=1500, words=many_words(1500))
    save("code", vocab_size=1502, words=many_words(1500, ["<fill>", "<hole>"]))
    return checked("vocabulary")


def unequal_ends():
    save("text"), save("code", eos_token_id=3)
    return checked("generation")


def little_memory():
    save("text"), save("code")
    with mock.patch("psutil.virtual_memory", return_value=SimpleNamespace(available=10_000)):
        return checked("memory")


def unequal_dtypes():
    save("text"), save("code")
    edit("code/config.json", dtype="bfloat16")
    return refused(fuse)


def gated_repository():
    save("text"), save("closed")
    with HubServer({"lab/closed": Path("closed")}, gated=["lab/closed"]) as server, ExitStack() as changed:
        online = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(Path("cache").absolute())}
        online["HF_TOKEN_PATH"] = str(Path("no-token").absolute())
        online["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in online.items():
            changed.enter_context(mock.patch(f"huggingface_hub.constants.{name}", value))
        # a proxy of the machine would be asked for its own address
        changed.enter_context(mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1", "HF_TOKEN": ""}))
        return checked("access", "text", "lab/closed")


def remote_code():
    save("text"), save("code")
    edit("code/config.json", model_type="novel", auto_map={"AutoConfig": "configuration_novel.NovelConfig"})
    return refused(fuse)


def unequal_positions():
    save("text"), save("code", max_position_embeddings=64)
    return checked("positions")


def adapter_alone():
    save("text")
    LoraConfig(base_model_name_or_path="text").save_pretrained("code")
    return refused(fuse)


def quantised():
    save("text"), save("code")
    edit("code/config.json", quantization_config={"quant_method": "awq"})
    return refused(fuse)


def sees_images():
    save("text")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 99, "head_dim": 8, "num_key_value_heads": 1, "max_position_embeddings": 256}
    vision = {**small, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, eos_token_id=2)
    config.text_config.final_logit_softcapping = None
    Gemma3ForConditionalGeneration(config).save_pretrained("code")
    tokenizer().save_pretrained("code")
    return next(line for line in checked("architecture").splitlines() if line.startswith("warning"))


# ---------------------------------------------------------------------------------- saving


def other_specialists():
    tiny().save_pretrained("fused")
    config = UltraFuserForCausalLM.from_specialists({n: specialist(layers=1, hidden_size=16) for n in "abc"}).config
    return refused(UltraFuserForCausalLM.from_pretrained, "fused", config=config)


def sampling_without_sampling():
    for name in ("text", "code"):
        save(name)
        edit(f"{name}/generation_config.json", temperature=0.7, do_sample=False)
    return logged(fuse)


def unequal_templates():
    save("text", template=CHAT_TEMPLATE), save("code", template=CHAT_TEMPLATE + " ")
    return refused(common_tokenizer, {"text": "text", "code": "code"})


def no_template():
    save("text"), save("code")
    return checked("chat template")


def mixed_licences():
    save("text"), save("code", licence="cc-by-nc-4.0")
    return checked("licence")


# ---------------------------------------------------------------------------------- training


def head_alone():
    rows = Dataset.from_list(conversations(2))
    settings = SFTConfig("out", max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    model = tiny(fusion="probabilities")
    return refused(lambda: SFTTrainer(model, settings, train_dataset=rows, processing_class=words).train())


def shards():
    begin = JointTrainer._begin

    def begin_under_fsdp(trainer):
        begin(trainer)
        # all that is made up
        trainer.is_fsdp_enabled = True

    with mock.patch.object(JointTrainer, "_begin", begin_under_fsdp):
        return refused(stage, JointTrainer, train_specialists=["code"])


def no_labels():
    short = [{"prompt": f"{i}+{i}?", "completion": f"It is {2 * i}."} for i in range(4)]
    long = [{"prompt": row["prompt"] * 20, "completion": row["completion"]} for row in short]
    data = {"text": Dataset.from_list(short), "code": Dataset.from_list(long)}
    return refused(stage, GateTrainer, data=data, max_length=32)


def collapsed_gate():
    model = tiny(gate="constant")
    next(model.model.fusion_gate.parameters()).data.flatten()[0] = 9.0
    return warned(stage(GateTrainer, model, learning_rate=1e-9).train, "collapsed")


def unmoved_gate():
    return warned(stage(GateTrainer, learning_rate=1e-8, max_steps=21, logging_steps=21).train, "hardly moved")


def sharp_gate():
    model = tiny(gate="constant+calibration")
    next(model.model.fusion_gate.parameters()).data.flatten()[-1] = 1.0
    run = stage(GateTrainer, model, learning_rate=1e-9, max_steps=21, logging_steps=21)
    return warned(run.train, "multiplies logits")


def other_stage():
    stage(GateTrainer, folder="gate", save_strategy="steps", save_steps=1).train()
    return refused(stage(JointTrainer).train, "gate/checkpoint-1")


# ---------------------------------------------------------------------------------- use


def drafts_without_way_back():
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    types = ["linear_attention", "full_attention"]
    hybrid = specialist("qwen3_5_text", layer_types=types, linear_value_head_dim=8, **linear)
    model = UltraFuserForCausalLM.from_specialists({"text": specialist(), "code": hybrid})
    ids = torch.arange(3, 9)[None]
    return refused(model.generate, ids, max_new_tokens=2, custom_generate=self_draft)


def cost():
    for name in ("text", "code"):
        stand_in(Path(name), tokenizer(), **LLAMA_2_13B | {"vocab_size": 99, "num_hidden_layers": 1})
    return checked("cost of a token")


def not_for_vllm():
    save("text"), save("code", num_attention_heads=2, head_dim=8)
    return checked("vLLM")


PROVOCATIONS = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(different_tokenizers, unequal_rows, lost_tokens, unequal_ends, little_memory, unequal_dtypes),
        *(gated_repository, remote_code, unequal_positions, adapter_alone, quantised, sees_images),
        *(other_specialists, sampling_without_sampling, unequal_templates, no_template, mixed_licences),
        *(head_alone, shards, no_labels, collapsed_gate, unmoved_gate, sharp_gate),
        *(other_stage, drafts_without_way_back, cost, not_for_vllm),
    )
}


@contextmanager
def elsewhere():
    """An empty folder to be in, so that messages name no place of this machine."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def said(name: str) -> str:
    """What a user sees of a failure, as the page shows it."""
    set_seed(0)
    with elsewhere():
        message = PROVOCATIONS[name]()
    assert "|" not in message, "it would end a table's cell"
    return "<br>".join(f"`` {line} ``" for line in message.splitlines())


def written(page: str, name: str, message: str) -> str:
    """The page with a message in its place."""
    return ROW.sub(lambda m: m[0].replace(f" | {m[4]} | ", f" | {message} | ") if m[1] == name else m[0], page)


def main():
    page = PAGE.read_text()
    for name in PROVOCATIONS:
        page = written(page, name, said(name))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
