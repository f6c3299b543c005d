"""The paper's fusion (Ding et al., 2024, section 4.1): each specialist reads the prompt in the template that it knows.

    python examples/llama2.py examples/recipes/paper_gate.yaml
    python examples/llama2.py examples/recipes/paper_joint.yaml

Llama 2, Code Llama and WizardMath share the first 32,000 rows of their vocabularies, which are what is fused; the 16 and
the 1 that two of them have behind these are dropped. All three continue the same answer, token by token. Ends with one,
in the templates that it was trained with.
"""

import sys
from pathlib import Path

from modeling_ultrafuser.log_ultrafuser import print_line
from trainers import GateTrainer, JointTrainer
from trainers.prompt_views import ViewCollator, prompt_views
from ultrafuser.train.stage_recipe import load_domains, load_model, parse


QUESTION = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
# as the paper prints them (its table of templates); its first specialist was UltraLM
TEMPLATES = {
    "text": f"User: {QUESTION}\nAssistant:",
    "code": f"<s>[INST] {QUESTION} [/INST]",
    "math": "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    f"\n\n### Instruction:\n{QUESTION}\n\n### Response:",
}


def main(recipe: str, *arguments: str) -> None:
    """Trains the stage that a recipe is for, and generates."""
    fused, args, model_args = parse(list(arguments), recipe=Path(recipe))
    # text reaches the collator as it is, which makes tokens of it three times
    args.remove_unused_columns, args.dataset_kwargs = False, {"skip_prepare_dataset": True}
    model, tokenizer = load_model(fused, model_args, trust_remote_code=True)
    names = model.config.specialist_names
    collator = ViewCollator(tokenizer, TEMPLATES, names, max_length=args.max_length)
    trainer = {"gate": GateTrainer, "joint": JointTrainer}[fused.stage]
    run = trainer(model, args, load_domains(fused), processing_class=tokenizer, data_collator=collator)
    run.train()
    run.save_model()

    views = prompt_views(["What is 47 * 36?"], tokenizer=tokenizer, templates=TEMPLATES, specialist_names=names)
    prompt = views["input_ids"].shape[1]
    answer = run.model.eval().generate(**views.to(run.model.device), max_new_tokens=64)
    print_line(tokenizer.decode(answer[0, prompt:], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
