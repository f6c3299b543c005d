"""A gate trained on what specialists said once, beside one that runs them in every step."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from modeling_ultrafuser import UltraFuserForCausalLM
from tests.support.conversations import changed, conversations, weights
from tests.support.stage_run import data as sums
from tests.support.stages import SIZES, build, logs
from tests.support.tiny import specialist, stir_gate
from trainers import GateTrainer, gate_cache
from trainers.gate_cache import LOCK, STATE, CachedGateTrainer
from trainers.heads.kept_top import mixed_log_probs, summarised


EXACT = [("logits", "hidden"), ("probabilities", "log_probs")]


def fuse(specialists, fusion="logits", gate="mlp", **settings):
    model = UltraFuserForCausalLM.from_specialists(specialists, fusion=fusion, gate=gate, **settings)
    stir_gate(model)
    return model


def both(specialists, tmp_path, fusion, keep=None, data=None, **settings):
    """The plain stage and the one from a cache, trained on the same draws."""
    plain = fuse(specialists, fusion)
    twin = copy.deepcopy(plain)
    one = build(GateTrainer, plain, tmp_path / "plain", data=data, **settings)
    two = build(
        CachedGateTrainer, twin, tmp_path / "cached", data=data,
        cached={"cache": tmp_path / "cache", "keep": keep}, **settings,
    )  # fmt: skip
    one.train(), two.train()
    return one, two


LAYOUTS = {
    "padded": {},
    "end to end": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 96, "examples_per_domain": 1},
    "with terms": {"gate_entropy": 0.1, "gate_balance": 0.2, "gate_domain": 0.1, "mix_reward": "loss", "mix_every": 1},
}


@pytest.mark.e2e
@pytest.mark.grid
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fusion", "keep"), EXACT)
def test_a_gate_from_the_cache_is_the_gate_of_the_plain_stage(fusion, keep, layout, specialists, tmp_path):
    # plain descent: Adam would blow up what is rounding
    one, two = both(specialists, tmp_path, fusion, optim="sgd", learning_rate=0.1, **LAYOUTS[layout])
    assert two.keep == keep
    for plain, cached in zip(logs(one), logs(two), strict=True):
        cached.pop("num_tokens"), plain.pop("num_tokens")  # the cache counts supervised ones
        known = {k: v for k, v in plain.items() if k in cached and k not in ("grad_norm",)}
        assert {"loss", "gate/code/math", "tokens/text", "loss/code", "mix/text"} <= set(known)
        assert {k: cached[k] for k in known} == pytest.approx(known, abs=1e-5)
        assert set(plain) - set(cached) == (set() if keep == "hidden" else {"entropy", "mean_token_accuracy"})
    torch.testing.assert_close(weights(two.fused), weights(one.fused), rtol=1e-5, atol=1e-5)


@pytest.mark.e2e
def test_likely_tokens_and_a_polynomial_come_near_the_plain_stage(specialists, tmp_path):
    one, two = both(specialists, tmp_path, "logits", "top")
    for plain, cached in zip(logs(one), logs(two), strict=True):
        assert cached["loss"] == pytest.approx(plain["loss"], abs=1e-3)


@pytest.mark.e2e
def test_specialists_run_once_over_the_data(specialists, tmp_path):
    model, read = fuse(specialists), []
    model.model.specialists["code"].register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    stage = build(CachedGateTrainer, model, tmp_path, cached={"cache": tmp_path / "cache"}, max_steps=9)
    stage.train()
    assert sum(len(ids) for ids in read) == 28
    # another gate reads the same files
    other = fuse(specialists, gate="linear")
    build(CachedGateTrainer, other, tmp_path, cached={"cache": tmp_path / "cache"}).train()
    assert sum(len(ids) for ids in read) == 28


@pytest.mark.e2e
def test_a_gate_from_the_cache_speaks_in_the_fused_model(specialists, tmp_path):
    model = fuse(specialists)
    before = weights(model)
    stage = build(CachedGateTrainer, model, tmp_path, cached={"cache": tmp_path / "cache"})
    stage.train()
    assert {n.split(".")[1] for n in changed(model, before)} == {"fusion_gate"}
    stage.save_model(str(tmp_path / "saved"))
    loaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    # the trained object itself goes on as a model
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), loaded.generate(ids, **given))


@pytest.mark.e2e
def test_a_killed_pass_goes_on_where_it_was(specialists, tmp_path, monkeypatch):
    whole, killed = ({"cache": tmp_path / name} for name in ("whole", "killed"))
    build(CachedGateTrainer, fuse(specialists), tmp_path, cached=whole).train()
    said = CachedGateTrainer._said_of

    def until(self, rows):
        if rows.start >= 12:
            raise KeyboardInterrupt
        return said(self, rows)

    monkeypatch.setattr(CachedGateTrainer, "_said_of", until)
    with pytest.raises(KeyboardInterrupt):
        build(CachedGateTrainer, fuse(specialists), tmp_path, cached=killed).train()
    assert json.loads((tmp_path / "killed" / STATE).read_text())["rows_done"] == 12
    seen = []
    monkeypatch.setattr(CachedGateTrainer, "_said_of", lambda self, rows: seen.extend(rows) or said(self, rows))
    build(CachedGateTrainer, fuse(specialists), tmp_path, cached=killed).train()
    assert seen == list(range(12, 28))
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


@pytest.mark.e2e
def test_of_two_at_once_one_makes_the_pass_and_the_other_waits_for_it(specialists, tmp_path, monkeypatch):
    cached = {"cache": tmp_path / "cache"}
    one, other = (build(CachedGateTrainer, fuse(specialists), tmp_path, cached=cached) for _ in range(2))
    said, rows, begun, told = CachedGateTrainer._said_of, [], Event(), Event()

    def slowly(self, given):
        rows.extend(given)
        begun.set()
        assert told.wait(30)
        return said(self, given)

    monkeypatch.setattr(CachedGateTrainer, "_said_of", slowly)
    monkeypatch.setattr(gate_cache, "print_line", lambda line: told.set() if "Another process" in line else None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(one.fill)
        assert begun.wait(30)
        second = pool.submit(other.fill)
        first.result(60), second.result(60)
    assert rows == list(range(28))
    assert one.cache.complete
    assert other.cache.complete
    assert torch.equal(one.cache.arrays["states"], other.cache.arrays["states"])


@pytest.mark.e2e
def test_a_cache_that_is_begun_is_of_one_data_set_before_its_first_row(specialists, tmp_path):
    cached = {"cache": tmp_path / "cache"}
    build(CachedGateTrainer, fuse(specialists), tmp_path, cached=cached)
    with pytest.raises(ValueError, match="its own data, but rows is"):
        build(CachedGateTrainer, fuse(specialists), tmp_path, cached=cached, data=sums({**SIZES, "math": 11}))


def test_a_cache_takes_its_room_before_the_pass(specialists, tmp_path):
    stage = build(CachedGateTrainer, fuse(specialists), tmp_path, cached={"cache": tmp_path / "cache"})
    for path in (tmp_path / "cache").glob("*.bin"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 0
    assert stage.cache.rows_done == 0


@pytest.mark.e2e
def test_a_stage_resumes_from_its_checkpoint(specialists, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "cached": {"cache": tmp_path / "cache"}}
    whole, resumed = fuse(specialists), fuse(specialists)
    build(CachedGateTrainer, whole, tmp_path / "one", **settings).train()
    build(CachedGateTrainer, resumed, tmp_path / "two", **settings).train(str(tmp_path / "one" / "checkpoint-2"))
    assert changed(resumed, weights(whole)) == set()


def test_evaluation_runs_the_model(specialists, tmp_path):
    from datasets import Dataset

    model = fuse(specialists)
    more = {"eval_dataset": Dataset.from_list(conversations(5))}
    stage = build(CachedGateTrainer, model, tmp_path, cached={"cache": tmp_path / "cache"}, more=more, max_steps=1)
    stage.train()
    batch = stage.data_collator(list(stage.eval_dataset))
    with torch.no_grad():
        expected = model.eval()(**batch, use_cache=False).loss.item()
    assert stage.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.e2e
def test_sixteen_bits_halve_the_hidden_states(specialists, tmp_path):
    losses, sizes = [], []
    model = fuse(specialists)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        stage = build(CachedGateTrainer, copy.deepcopy(model), folder, cached={"cache": folder, "dtype": dtype})
        stage.train()
        losses.append([entry["loss"] for entry in logs(stage)])
        sizes.append((folder / "states.bin").stat().st_size)
    assert sizes[0] == 2 * sizes[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# ---- what is refused


@pytest.mark.e2e
def test_a_cache_of_other_data_or_other_specialists_is_refused(specialists, tmp_path):
    cached = {"cache": tmp_path / "cache"}
    build(CachedGateTrainer, fuse(specialists), tmp_path, cached=cached).train()
    with pytest.raises(
        ValueError, match="its own data, but rows is '.*' in the cache '.*' and '.*' here. Choose another"
    ):
        build(CachedGateTrainer, fuse(specialists), tmp_path, cached=cached, data=sums({**SIZES, "math": 11}))
    others = {**specialists, "code": specialist("llama", layers=3, tied=True)}
    with pytest.raises(ValueError, match="but specialists is"):
        build(CachedGateTrainer, fuse(others), tmp_path, cached=cached)


def test_a_disk_without_room_is_refused_before_anything_runs(specialists, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100_000, 0, 100_000))
    with pytest.raises(OSError, match=r"is to hold .* MB and its disk has 0.1 MB left"):
        build(CachedGateTrainer, fuse(specialists), tmp_path, cached={"cache": tmp_path / "cache"})
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("fusion", "cached", "settings", "sentence"),
    [
        ("logits", {"keep": "log_probs"}, {}, "keeps one of \\['hidden', 'top'\\], but `keep` is 'log_probs'"),
        ("logits", {}, {"mix_reward": "regret"}, "mix_reward='regret' runs the specialists on the way"),
    ],
)
def test_what_is_not_in_a_cache_is_refused(fusion, cached, settings, sentence, specialists, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        build(CachedGateTrainer, fuse(specialists, fusion), tmp_path, cached={"cache": tmp_path, **cached}, **settings)


# ---- the likeliest tokens and the rest


@pytest.mark.parametrize("specialists", [2, 3, 5])
def test_mixtures_are_summed_up_for_all_weights(specialists):
    words = (3 * torch.randn(20, specialists, 800)).log_softmax(-1)
    targets = torch.randint(0, 800, (20,))
    own = words.gather(-1, targets[:, None, None].expand(-1, specialists, -1))[..., 0]
    top, tail = summarised(words)
    for _ in range(10):
        shares = torch.rand(20, specialists).log().mul(-1)
        shares = (shares / shares.sum(-1, keepdim=True)).requires_grad_()
        expected = (shares[..., None] * words).sum(1).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        found = mixed_log_probs(shares, own, top, tail)
        assert (found - expected).abs().max() < 1e-2
        assert (found - expected).abs().mean() < 1e-3
        gradients = [torch.autograd.grad(f.sum(), shares)[0] for f in (found, expected)]
        # along the simplex: a change that all share is none
        gradients = [g - g.mean(-1, keepdim=True) for g in gradients]
        assert F.cosine_similarity(*gradients, -1).min() > 0.99
    corner = torch.eye(specialists)[:1].expand(20, -1).clone().requires_grad_()
    found = mixed_log_probs(corner, own, top, tail)
    torch.testing.assert_close(found, own[:, 0], atol=1e-4, rtol=1e-4)
    assert torch.autograd.grad(found.sum(), corner)[0].isfinite().all()


def test_a_vocabulary_of_likely_tokens_alone_is_exact():
    words = torch.randn(5, 3, 40).log_softmax(-1)
    shares = torch.rand(5, 3).softmax(-1)
    found = mixed_log_probs(shares, words[..., 7], *summarised(words))
    torch.testing.assert_close(found, (shares[..., None] * words).sum(1).log_softmax(-1)[:, 7])
