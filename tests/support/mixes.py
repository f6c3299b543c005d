"""Mixes of specialists that differ in every way a fused model allows, and the naive sum that it must equal."""

import copy
import math

import torch
from torch import nn

from modeling_ultrafuser import UltraFuserForCausalLM
from modeling_ultrafuser.gate_base_ultrafuser import Reads
from tests.support.tiny import specialist, stir_gate


MIXES = {
    "one family": lambda: {
        "text": specialist("llama", layers=1),
        "code": specialist("llama", layers=2, tied=True),
        "math": specialist("llama", layers=3, hidden_size=48),
    },
    "three families": lambda: {
        "text": specialist("llama", layers=1, tied=True),
        "code": specialist("qwen2", layers=2, hidden_size=48),
        "math": specialist("gpt_neox", layers=1),
    },
    # caps this low bend the tiny models' logits a lot
    "soft caps": lambda: {
        "text": specialist("gemma2", final_logit_softcapping=1.5, sliding_window=4),
        "code": specialist("gemma2", layers=3, tied=True, final_logit_softcapping=1.5, sliding_window=8),
    },
    "windows": lambda: {
        "text": specialist("mistral", sliding_window=4),
        "code": specialist("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
        "math": specialist("llama", layers=1, hidden_size=48),
    },
    "scale factors": lambda: {
        "text": specialist("granite", logits_scaling=0.25, embedding_multiplier=3.0, residual_multiplier=0.5),
        "code": specialist("cohere", logit_scale=2.5),
    },
    "experts": lambda: {
        "text": specialist("mixtral", num_local_experts=4, num_experts_per_tok=2),
        "code": specialist("llama", layers=3),
    },
}


def fuse(specialists, **options):
    """A fused model whose gate has opinions but listens to all, and that does not stop by itself."""
    softness = {"gate": "mlp", "gate_hidden_size": 16, "gate_temperature": 3.0}
    model = UltraFuserForCausalLM.from_specialists(specialists, **softness | options)
    stir_gate(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch=2, length=9):
    return torch.randint(3, 99, (batch, length))


def uncapped(model):
    """The same specialist, speaking before its soft cap."""
    if getattr(model.config, "final_logit_softcapping", None) is None:
        return model
    model = copy.deepcopy(model)
    model.config.final_logit_softcapping = None
    return model


def naive_logits(fused, specialists, input_ids, gate_weights, **inputs):
    """What the fused model must say: each specialist's own words, weighed one by one."""
    cap = getattr(fused.config, "final_logit_softcapping", None)
    total = 0
    for k, model in enumerate(specialists.values()):
        weight = gate_weights[..., k : k + 1]
        if fused.config.fusion == "probabilities":
            total = total + weight * model(input_ids, **inputs).logits.softmax(-1)
        else:
            total = total + weight * uncapped(model)(input_ids, **inputs).logits
    if fused.config.fusion == "probabilities":
        return total.log()
    return total if cap is None else cap * torch.tanh(total / cap)


def naive_gate_weights(fused, specialists, input_ids, **inputs):
    """The fused model's gate, on the hidden states of the specialists it was made from."""
    states = [m.base_model(input_ids, **inputs).last_hidden_state for m in specialists.values()]
    gate = fused.model.fusion_gate
    if Reads.PAST not in gate.reads:
        return gate(states).weights
    log_probs = [m(input_ids, **inputs).logits.double().log_softmax(-1)[:, :-1] for m in specialists.values()]
    of_tokens = [lp.gather(-1, input_ids[:, 1:, None]) for lp in log_probs]
    evidence = [textbook(row.exp().tolist(), *gate.evidence) for row in torch.cat(of_tokens, -1)]
    return gate(states, torch.tensor(evidence)).weights


def textbook(likelihoods, decays, switches):
    """Evidence of one text, a token at a time, in plain numbers.

    Args:
        likelihoods: What each specialist held of the second token, of the third, and so on.
        decays: Of sums of log-likelihoods.
        switches: Of fixed-share forecasters, in the form of Herbster and Warmuth (1998): each expert gives away a share
            of its weight, in equal parts to all others.

    Returns:
        For each token, for each specialist: the sums, then the logarithms of the forecasters' weights.
    """
    number = len(likelihoods[0]) if likelihoods else 0
    sums = [[0.0] * number for _ in decays]
    weights = [[1 / number] * number for _ in switches]

    def numbers():
        columns = [*sums, *([math.log(w) for w in own] for own in weights)]
        return [[column[k] for column in columns] for k in range(number)]

    found = [numbers()]
    for likelihood in likelihoods:
        for own, decay in zip(sums, decays, strict=True):
            own[:] = [decay * s + math.log(p) for s, p in zip(own, likelihood, strict=True)]
        for own, switch in zip(weights, switches, strict=True):
            # of a switch that may lead back to the same one, so much leads elsewhere
            share = switch * (number - 1) / number
            updated = [w * p for w, p in zip(own, likelihood, strict=True)]
            updated = [w / sum(updated) for w in updated]
            pool = sum(share * w for w in updated)
            own[:] = [(1 - share) * w + (pool - share * w) / (number - 1) for w in updated]
        found.append(numbers())
    return found


@torch.no_grad()
def naive_greedy(fused, specialists, input_ids, steps):
    """Greedy decoding without a cache, without the wide head and without the library's `generate`."""
    for _ in range(steps):
        weights = naive_gate_weights(fused, specialists, input_ids)
        logits = naive_logits(fused, specialists, input_ids, weights)[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return input_ids


def prefer(fused, name):
    """Makes a constant gate listen to one specialist only."""
    scores = [100.0 if n == name else 0.0 for n in fused.config.specialist_names]
    fused.model.fusion_gate.logits = nn.Parameter(torch.tensor(scores))
