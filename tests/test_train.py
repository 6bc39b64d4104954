"""train.py: the RLOO maths by hand and by brute force, invariances, resume, learning, errors."""

import inspect
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import ROOT, random_llm
from matplotlib.figure import Figure
from safetensors.torch import load_file

import evaluate
import model
import train
from data.problems import problems_of, prompt_ids
from plumbing import files, memory, processes
from plumbing import settings as settings_file
from plumbing.settings import authors_rate

# ----------------------------------------------------------------------------------------------------- advantages, loss

# solved by one, by three, by all
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
ADVANTAGES = torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [1 / 3, 1 / 3, -1.0, 1 / 3], [0.0, 0.0, 0.0, 0.0]])
ADVANTAGE_MISTAKES = {
    "own reward left in the baseline": lambda r: r - r.mean(1, keepdim=True),
    "baseline over the prompts": lambda r: r - (r.sum(0, keepdim=True) - r) / (r.shape[0] - 1),
    "divided by the standard deviation": lambda r: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6),
    "no baseline": lambda r: r,
    "wrong sign": lambda r: -ADVANTAGES,
    "all zero": torch.zeros_like,
}


def check_rloo(fn):
    """Passes for the leave-one-out advantages; otherwise the message names the slip."""
    got = fn(REWARDS.clone())
    for mistake, wrong in ADVANTAGE_MISTAKES.items():
        assert not torch.allclose(got, wrong(REWARDS)), mistake
    torch.testing.assert_close(got, ADVANTAGES)


def test_rloo_advantages():
    check_rloo(train.rloo_advantages)  # through the module, so that another version can take its place


@pytest.mark.parametrize("mistake", ADVANTAGE_MISTAKES)
def test_check_rloo_rejects(mistake):
    with pytest.raises(AssertionError, match=mistake):
        check_rloo(ADVANTAGE_MISTAKES[mistake])


def test_rloo_needs_two_samples():
    with pytest.raises(AssertionError, match="at least 2 samples per prompt, got 1"):
        train.rloo_advantages(torch.ones(3, 1))


def test_rloo_advantages_are_unbiased():
    """
    Brute force over a one-token policy: the mean of A * grad log pi over all groups of 3 samples, weighted by their
    probability, is the exact gradient of the expected reward.
    """
    theta = torch.tensor([0.3, -0.5, 0.9], dtype=torch.double, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.double)
    p = theta.softmax(0)
    (exact,) = torch.autograd.grad((p * reward).sum(), theta)
    score = torch.eye(3, dtype=torch.double) - p.detach()  # d log pi(a) / d theta, row a
    mean = torch.zeros(3, dtype=torch.double)
    for group in itertools.product(range(3), repeat=3):
        advantages = train.rloo_advantages(reward[list(group)][None])[0]
        mean += p.detach()[list(group)].prod() * (advantages[:, None] * score[list(group)]).mean(0)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-12)


LOGPS = torch.tensor([[-1.0, -2.0, -4.0], [-0.5, 9.0, 9.0]])  # the 9s are padding
MASK = torch.tensor([[True, True, True], [True, False, False]])
LOSS_MISTAKES = {
    "padding counted": lambda logps, mask, a, n: -(a[:, None] * logps).sum() / n,
    "tokens of this micro-batch only": lambda logps, mask, a, n: -(a[:, None] * logps * mask).sum() / mask.sum(),
    "mean per answer": lambda logps, mask, a, n: -(a * (logps * mask).sum(1) / mask.sum(1)).sum() / len(a),
    "wrong sign": lambda logps, mask, a, n: (a[:, None] * logps * mask).sum() / n,
    "all zero": lambda logps, mask, a, n: torch.zeros(()),
}


def check_loss(fn):
    """-(0.5 * (-1 - 2 - 4) - 1 * (-0.5)) / 10 = 0.3"""
    args = LOGPS, MASK, torch.tensor([0.5, -1.0]), 10
    got = fn(*args)
    for mistake, wrong in LOSS_MISTAKES.items():
        assert not torch.allclose(got, wrong(*args)), mistake
    assert got.item() == pytest.approx(0.3, abs=1e-6)


def test_rloo_loss():
    check_loss(train.rloo_loss)


@pytest.mark.parametrize("mistake", LOSS_MISTAKES)
def test_check_loss_rejects(mistake):
    with pytest.raises(AssertionError, match=mistake):
        check_loss(LOSS_MISTAKES[mistake])


# -------------------------------------------------------------------------------------------------- gradient, splitting


def test_micro_batches():
    assert model.batches([3, 5, 2], 6) == [[1], [0, 2]]
    assert model.batches([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert model.batches([9, 1], 5) == [[0], [1]]  # longer than the budget: alone
    assert model.batches([], 5) == []
    a, b = [1, 1, 1], [2, 2]  # prompts, which count once a batch
    assert model.batches([2, 2, 2, 2], 7, [b, a, b, a]) == [[0, 2], [1, 3]]
    assert model.batches([2, 2, 2, 2], 14, [b, a, b, a]) == [[0, 2, 1, 3]]  # 4 * 2 + 2 * 3, padded
    assert model.batches([2, 2, 2, 2], 13, [b, a, b, a]) == [[0, 2, 1], [3]]
    lengths = [random.Random(0).randint(1, 30) for _ in range(50)]
    batches = model.batches(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 64 for batch in batches)


PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13]]
COMPLETIONS = [[20, 21, 22, 23, 2], [24, 2], [25, 26, 27], [28]]
A = torch.tensor([1.0, -0.5, 0.0, -0.25])


STOP = [2, 7, 11, 13, 17, 19, 23, 29]


def rolled(prompts=PROMPTS, completions=COMPLETIONS, logps=None):
    return model.Rollouts(prompts, completions, [True] * len(prompts), [""] * len(prompts), logps)


def gradient(budget, layers=(1,), llm=None, logps=None, **how):
    vectors = {layer: torch.full((32,), 0.01).requires_grad_() for layer in layers}
    sums = train.accumulate_gradient(llm or random_llm(), vectors, rolled(logps=logps), A, 0.8, budget, **how)
    return torch.cat([vectors[layer].grad for layer in layers]), sums


def test_gradient_equals_a_plain_sum_over_full_forwards():
    """Against the loss written with whole logits, row by row, no padding, no micro-batches."""
    llm, s = random_llm(), torch.full((32,), 0.01).requires_grad_()
    total, loss, trained, nats = sum(map(len, COMPLETIONS)), 0.0, 0, 0.0
    with model.steer(llm, {1: s}):
        for p, c, a in zip(PROMPTS, COMPLETIONS, A):
            logp = (llm(input_ids=torch.tensor([p + c])).logits[0] / 0.8).log_softmax(-1)
            picked = sum(logp[len(p) + t - 1, token] for t, token in enumerate(c))
            loss = loss - a * picked / total
            if a != 0:
                trained, nats = trained + len(c), nats - picked.item()
    loss.backward()
    grad, sums = gradient(10_000)
    assert s.grad.norm() > 0.01
    torch.testing.assert_close(grad, s.grad, rtol=1e-4, atol=1e-6)
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert (sums["tokens"], sums["nats"]) == (trained, pytest.approx(nats, rel=1e-5))
    again, _ = gradient(10_000, total_tokens=2 * total)  # the other half of the tokens are those of other processes
    torch.testing.assert_close(again, s.grad / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_gradient_does_not_depend_on_the_micro_batches(layers):
    whole, sums = gradient(10_000, layers)
    for budget in (1, 9, 16):
        split, split_sums = gradient(budget, layers)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)
        assert split_sums == pytest.approx(sums, abs=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1, 2), (2,)])
def test_recomputing_layers_changes_no_gradient_and_saves_activations(layers):
    llm = random_llm().double()  # in float32 the two ways round apart by up to 2e-5 on some processors
    plain, _ = gradient(10_000, layers, llm)
    calls = [0, 0, 0]
    for i, block in enumerate(llm.model.layers):
        block.input_layernorm.register_forward_hook(lambda *args, i=i: calls.__setitem__(i, calls[i] + 1))
    again, _ = gradient(10_000, layers, llm, recompute="yes")
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)
    assert calls == [1 + (i > min(layers)) for i in range(3)]  # a second forward pass, above the lowest vector only
    assert "forward" not in vars(llm.model.layers[2])  # and gone with the context


TRAINED = {"1": (32,), "2": (32,), "1@answer": (32,), "2.input-norm": (32,), "1.self_attn.v_proj": (16,)}
TRAINED |= {"1.lora": (40, 32), "2.self_attn.o_proj.lora": (32, 32)}  # of a LoRA the widths before and after


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "gemma", "gemma2"])
@pytest.mark.parametrize("place", TRAINED)
def test_kept_states_and_prompts_read_once_change_no_gradient(family, place):
    """Against texts read one by one, at any place, beside fixed vectors, also below it."""
    llm, draw, k, shape = random_llm(family), torch.Generator().manual_seed(1), 3, TRAINED[place]
    shapes = {f"{place}_A": (2, shape[0]), f"{place}_B": (shape[1], 2)} if "lora" in place else {place: shape}
    trained = {int(n) if n.isdigit() else n: torch.randn(shape, generator=draw) / 6 for n, shape in shapes.items()}
    trained = {name: s.requires_grad_() for name, s in trained.items()}
    fixed = {0: torch.randn(32, generator=draw), "2.mlp.down_proj": torch.randn(32, generator=draw)}
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7, 10, 11, 12, 13, 14]]
    with model.steer(llm, fixed | trained):
        done, ended, states = model.sample(llm, prompts, k, 9, STOP, seed=3, keep=model.lowest_trained(trained))
    assert len({len(c) for c in done}) >= 3
    rows = model.Rollouts([p for p in prompts for _ in done[::3]], done, ended, [""] * 9, None, states)

    def gradient(rows, budget, **how):
        ran = []
        handle = llm.model.layers[0].mlp.register_forward_hook(lambda *args: ran.append(1))
        sums = train.accumulate_gradient(llm, fixed | trained, rows, torch.linspace(-1, 1, 9), 0.8, budget, **how)
        handle.remove()
        grads = [s.grad.clone() for s in trained.values()]
        for s in trained.values():
            s.grad = None
        return grads, sums, len(ran)

    got, sums, ran = gradient(rows, 40)
    assert ran == 0 and sums["compared"] == 0
    shared, _, _ = gradient(rows._replace(states=None), 40)
    unshared, _, _ = gradient(rows, 40, recompute="yes")
    plain, plain_sums, _ = gradient(rows._replace(states=None), 1, recompute="yes")
    for want, *others in zip(plain, got, shared, unshared):
        assert want.norm() > 0.01
        for other in others:
            torch.testing.assert_close(other, want, rtol=1e-3, atol=1e-5)
    assert (sums["loss"], sums["nats"]) == pytest.approx((plain_sums["loss"], plain_sums["nats"]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("how", [{}, {"recompute": "yes"}, {"read_once": "no"}])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_kept_states_give_the_log_probs_of_whole_texts(dtype, off, how):
    """
    Where prompts and answers differ in length, so that the longest answer is not in the longest row.

    In bfloat16 every state has 8 bits, in another order of sums another last bit: 3 layers move logits of a size of 10
    by a few 2^-8 of it. With another row's states instead of its own they would move by more than 1.
    """
    llm, s = random_llm().to(dtype), {2: torch.ones(32, requires_grad=True)}
    prompts = [[5] * 20, [6] * 19, [7] * 18, [8] * 17, [9, 10]]
    with model.steer(llm, s):
        done, ended, states = model.sample(llm, prompts, 1, [2, 2, 2, 2, 9], [60], seed=3, keep=2)
        want, there = model.token_logps(llm, prompts, done)
    assert max(map(len, done)) == len(done[4]) == 9

    def difference(states):
        rows, found = model.Rollouts(prompts, done, ended, [""] * 5, None, states), []
        for batch, logps, mask in model.micro_batches(llm, s, rows, [4, 0, 1, 2, 3], 60, **how):
            C = mask.shape[1]
            assert (mask == there[batch, :C]).all() and len(batch) < 5
            found.append((logps - want[batch, :C])[mask].abs())
        return torch.cat(found).max().item()

    assert difference(states) < off and difference(None) < off
    swapped = [states[i] for i in (1, 0, 2, 3, 4)]
    swapped = [(a[-len(b[0]) :] if len(a) > len(b[0]) else b[0], b[1]) for (a, _), b in zip(swapped, states)]
    assert difference(swapped) > 2 * off


@torch.no_grad()
def test_micro_batches_without_vectors_are_the_base_models():
    """As a KL term wants them, from answers of the steered model, whose states were kept."""
    llm, s, prompts = random_llm(), {2: torch.ones(32, requires_grad=True)}, [[5, 6, 7], [8, 9]]
    with model.steer(llm, s):
        done, ended, states = model.sample(llm, prompts, 2, 9, STOP, seed=3, keep=2)
        steered, _ = model.token_logps(llm, rows := [p for p in prompts for _ in "12"], done)
    want, mask = model.token_logps(llm, rows, done)
    assert (steered - want)[mask].abs().mean() > 0.1
    rolled = model.Rollouts(rows, done, ended, [""] * 4, None, states)
    for batch, logps, here in model.micro_batches(llm, {}, rolled, [3, 1, 0], 16):
        torch.testing.assert_close(logps[here], want[batch, : here.shape[1]][here], rtol=1e-4, atol=1e-5)


def test_states_are_kept_only_where_they_are_used_and_fit(tmp_path, monkeypatch):
    """The same run with and without."""
    kept, real = [], train.accumulate_gradient
    monkeypatch.setattr(
        train, "accumulate_gradient", lambda *a, **how: (kept.append(a[2].states is not None), real(*a, **how))[1]
    )
    for name, how in {"on": {}, "off": {"reuse": "no"}, "lowest": {"layer": "0"}, "full": {"method": "full"}}.items():
        train.main(settings(tmp_path / name, steps=2, reward="random", **how))
    monkeypatch.setattr(memory, "state_bytes", lambda *args: 1 << 50)
    train.main(settings(tmp_path / "large", steps=2, reward="random"))
    assert kept == [True, True] + 8 * [False]
    train.main(settings(tmp_path / "forced", steps=1, reward="random", reuse="yes"))
    assert kept[-1]
    logged = {path.parent.name: lines(path) for path in tmp_path.glob("*/metrics.jsonl")}
    assert not any("mismatch_mean" in rows[0] for rows in logged.values())  # of another sampler's log-probs alone
    for name in ("off", "large"):
        assert [m["loss"] for m in logged[name]] == pytest.approx([m["loss"] for m in logged["on"]], rel=1e-4)


def test_importance_weights_by_hand():
    """pi / mu = 0.3 / 0.2 = 1.5 and 0.9 / 0.3 = 3, cut at 2."""
    pi, mu = torch.tensor([[0.3, 0.9]]).log().requires_grad_(), torch.tensor([[0.2, 0.3]]).log()
    weights = train.importance_weights(pi, mu, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 2.0]]), rtol=1e-6, atol=0)
    assert not weights.requires_grad
    # loss of A = -2, 4 tokens in all: 2 * (1.5 log 0.3 + 2 log 0.9) / 4
    loss = train.rloo_loss(pi, torch.tensor([[True, True]]), torch.tensor([-2.0]), 4, weights)
    assert loss.item() == pytest.approx((1.5 * math.log(0.3) + 2 * math.log(0.9)) / 2, rel=1e-6)


def test_importance_weights_make_the_gradient_that_of_the_trained_model():
    """Exactly: the expected gradient over the engine's tokens with weights is the one over the model's own tokens."""
    logits, other = torch.tensor([0.2, -0.4, 1.0], requires_grad=True), torch.tensor([0.5, 0.1, 0.4])
    A, mask = torch.tensor([1.0, -0.5, 0.3]), torch.ones(3, 1, dtype=torch.bool)  # an advantage for each token

    def grad(weighted):
        logps, sampled = logits.log_softmax(0)[:, None], other.log_softmax(0)[:, None]
        weights = train.importance_weights(logps, sampled, 100.0) if weighted else torch.ones(3, 1)
        drawn_from = other if weighted else logits.detach()
        loss = train.rloo_loss(logps, mask, A * drawn_from.softmax(0), 1, weights)  # every token with its probability
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(grad(True), grad(False), rtol=1e-5, atol=1e-7)
    assert grad(False).norm() > 0.05


def test_log_probs_of_the_sampler_weigh_every_token_and_are_compared():
    plain, sums = gradient(10_000)
    assert sums["off"] == sums["clipped"] == 0
    low = [[-50.0] * len(c) for c in COMPLETIONS]  # the engine thought every token unlikely: all weights at the cap
    doubled, sums = gradient(9, logps=low, cap=2.0)
    torch.testing.assert_close(doubled, 2 * plain, rtol=1e-4, atol=1e-7)
    assert sums["clipped"] == sums["tokens"] == 8 and sums["off_max"] > 20
    unweighted, sums = gradient(9, logps=low, cap=0)
    torch.testing.assert_close(unweighted, plain, rtol=1e-4, atol=1e-7)
    assert sums["clipped"] == 0 and sums["off"] / 8 > 20


def test_rows_without_advantage_are_not_run(monkeypatch):
    seen, real = [], model.token_logps
    monkeypatch.setattr(
        model, "token_logps", lambda llm, p, c, *rest, **how: (seen.extend(c), real(llm, p, c, *rest, **how))[1]
    )
    gradient(10_000)
    assert sorted(seen) == sorted(COMPLETIONS[:2] + COMPLETIONS[3:])


# ------------------------------------------------------------------------------------------------------- settings, data


def test_recipes_of_the_papers():
    """Typed from notes on the authors' configs: 64 answers for three models, 4,096 tokens for Qwen2.5-Math."""
    usual = {"prompts": 128, "samples": 16, "context": 8192, "epochs": 1, "micro_tokens": 16384}
    usual |= {"held_out": None}  # data/math500.jsonl where it is
    math7b = "Qwen/Qwen2.5-Math-7B"
    for name in ("some/other", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B"):
        assert settings_file.recipe(name) == usual
    for name in (math7b, "/models/Qwen2.5-Math-7B"):
        assert settings_file.recipe(name) == usual | {"context": 4096}
    for name in ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B"):
        assert settings_file.recipe(name) == usual | {"samples": 64}
    full = settings_file.recipe(math7b, "full")
    assert full["lr_absolute"] == 1e-6
    assert settings_file.recipe("Qwen/Qwen2.5-Math-1.5B", "full", "deepscaler")["lr_absolute"] == 2e-6
    llama = usual | {"samples": 64, "context": 1024, "epochs": 2}  # B Table 6 and the configs of GSM8K and MATH
    assert settings_file.recipe("meta-llama/Llama-3.1-8B", source="gsm8k") == llama
    assert settings_file.recipe("meta-llama/Llama-3.1-8B", "full", "math")["lr_absolute"] == 5e-6
    assert settings_file.recipe("Qwen/Qwen2.5-1.5B", source="math") == llama | {"epochs": 3}


RATES = [  # model, settings, layer, rate: layers.py and configs of the authors' code; B Table 6
    ("Qwen2.5-Math-7B", {}, 0, 3e-3),
    ("Qwen2.5-Math-7B", {}, 27, 0.1),
    ("Qwen2.5-Math-7B", {"layer": "all"}, 27, 1e-3),
    ("Qwen2.5-Math-7B", {"site": "attention"}, 25, 0.05),
    ("Qwen2.5-Math-7B", {"site": "attention"}, 27, 0.1),  # P4 Sec. 6
    ("Qwen2.5-Math-7B", {"site": "post-attention-norm"}, 27, 0.05),
    ("Qwen2.5-Math-7B", {"site": "input-norm"}, 24, 0.01),
    ("Qwen2.5-Math-7B", {"site": "attention"}, 0, None),  # theirs were in layers 24, 25 and 27
    ("Llama-3.1-8B-Instruct", {"site": "attention"}, 31, 5e-3),
    ("Llama-3.1-8B-Instruct", {"site": "input-norm"}, 31, None),
    ("Qwen2.5-Math-7B", {"site": "self_attn.q_proj"}, 25, None),
    ("Qwen2.5-Math-7B", {"site": "attention", "layer": "all"}, 25, None),
    ("Qwen2.5-Math-7B", {"layer": "3,14"}, 14, None),  # one layer or all together, nothing between
    ("Qwen2.5-Math-7B", {"method": "lora"}, 0, 5e-3),
    ("Qwen2.5-Math-7B", {"method": "lora", "layer": "all"}, 0, 1e-4),
    ("Qwen2.5-Math-7B", {"method": "lora", "layer": "all", "rank": 4}, 0, 1e-4),
    ("Qwen2.5-Math-7B", {"method": "lora", "rank": 4}, 0, None),
    ("Qwen2.5-Math-7B", {"method": "lora", "site": "self_attn.o_proj"}, 0, None),
    ("Qwen2.5-7B", {"layer": "all"}, 3, 1e-3),
    ("Qwen2.5-7B", {}, 3, None),
    ("Qwen2.5-7B", {"method": "lora", "layer": "all"}, 3, None),  # theirs started from PiSSA
    ("Qwen2.5-14B", {"layer": "all"}, 3, 5e-4),
    ("Qwen2.5-7B-Instruct", {"layer": "all"}, 3, 1e-3),
    ("Qwen2.5-1.5B-Instruct", {"layer": "all"}, 3, 1e-3),
    ("Llama-3.1-8B", {"layer": "all"}, 3, 3e-4),
    ("Llama-3.1-8B", {"layer": "all", "method": "lora"}, 3, 5e-4),
    ("Llama-3.1-8B-Instruct", {"layer": "all", "method": "lora", "rank": 4}, 3, 5e-5),
    ("Llama-3.1-8B-Instruct", {}, 31, 5e-3),
    ("Llama-3.1-8B-Instruct", {"layer": "all", "recipe": "gsm8k"}, 3, 2e-4),
    ("Qwen2.5-Math-1.5B", {"layer": "all", "recipe": "math", "method": "lora"}, 3, 5e-4),
    ("Qwen2.5-Math-1.5B", {"recipe": "math"}, 3, None),
    ("Qwen2.5-Math-7B", {"data": "mine.jsonl"}, 0, 3e-3),  # the authors' for this model is the best guess there is
    ("tiny", {}, 27, None),
]


@pytest.mark.parametrize("name, changes, layer, rate", RATES)
def test_rates_of_the_papers(name, changes, layer, rate):
    args = train.Config(model=f"/models/{name}", **({"recipe": "deepscaler"} | changes))
    assert authors_rate(args, layer) == rate


def test_rates_by_hand():
    rms, values = {0: 1.0, 27: 2.0}, {0: torch.zeros(9), 27: torch.zeros(9)}
    assert train.learning_rates(train.Config(lr=0.1), rms, values) == {0: 0.1, 27: 0.2}
    assert train.learning_rates(train.Config(lr=0.1), {27: 2.0}, values) == {27: 0.2}
    four = dict.fromkeys(range(4), 2.0)  # divided by 2, half of their number
    assert train.learning_rates(train.Config(lr=0.1), four, dict.fromkeys(four, values[0])) == dict.fromkeys(four, 0.1)
    assert train.learning_rates(train.Config(lr_absolute=0.7), rms, values) == {0: 0.7, 27: 0.7}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two small models in the Hugging Face format, one of whose names the authors trained, and some problems."""
    folder = tmp_path_factory.mktemp("real")
    llm, tokenizer = random_llm(vocab_size=512, max_position_embeddings=4096), model.load("tiny", device="cpu")[1]
    for name in ("Qwen2.5-Math-7B", "other"):
        llm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = problems_of("data/tiny/train.jsonl").rows[:800]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def opened(real, name, **changes):
    args = dict(model=str(real / name), data=str(real / "mine.jsonl"), layer="0", prompts=2, device="cpu")
    return train.open_run(train.Config(**(args | changes)))


def test_the_default_rate_of_a_real_model(real):
    """The authors' where they have one; else a share that falls with the steps: noise must not fill the stream."""
    for changes, lr in [({}, "paper"), ({"layer": "all"}, "paper"), ({"lr": 0.06}, 0.06), ({"lr": "paper"}, "paper")]:
        assert opened(real, "Qwen2.5-Math-7B", **changes).args.lr == lr
    assert opened(real, "other", steps=32).args.lr == opened(real, "other", steps=8).args.lr == 0.06
    run = opened(real, "other")
    assert run.args.steps == 400 and run.args.warmup == 12 and run.args.lr == pytest.approx(0.06 * 0.08**0.5)
    # Adam on noise alone, as the trainer has it: with this rate it ends no further than in 32 steps at 0.06
    torch.manual_seed(0)
    reached = {}
    for steps, lr in ((32, 0.06), (400, run.args.lr), ("unscaled", 0.06)):
        s = torch.zeros(1000, requires_grad=True)
        adam = train.adam_of({0: s}, {0: lr})
        for _ in range(400 if steps == "unscaled" else steps):
            s.grad = torch.randn(1000)
            adam.step()
        reached[steps] = s.detach().norm().item() / 1000**0.5  # |s| / |h| where RMS(h) = 1
    assert reached[400] < 0.5 and reached[400] < 1.25 * reached[32] and reached["unscaled"] > 1
    run = opened(real, "Qwen2.5-Math-7B", layer="0,1,2")  # all layers, written out
    assert run.args.layer == "all" and run.args.lr == "paper" and authors_rate(run.args, 2) == 1e-3
    with pytest.raises(SystemExit, match="--lr paper: data/paper.json has no rate for these layers of '.*other'"):
        opened(real, "other", lr="paper")
    gsm8k = real / "gsm8k.jsonl"
    gsm8k.write_bytes((real / "mine.jsonl").read_bytes())
    run = opened(real, "other", data=str(gsm8k))
    assert run.args.steps == 400  # one epoch: B did not train this model


def test_more_steps_of_a_run_keep_its_rate(real, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "other", "lr": 0.03}))
    how = dict(steps=999, out=str(tmp_path))
    assert opened(real, "other", resume=True, **how).args.lr == 0.03
    assert opened(real, "other", resume=True, lr=0.01, **how).args.lr == 0.01
    assert opened(real, "other", **how).args.lr == pytest.approx(0.06 * (32 / 999) ** 0.5)


def test_a_lora_starts_as_peft_does_under_the_authors_rates(real):
    """B = 0 and A uniform in +- 1 / sqrt(F), rms 1 / sqrt(3 F); under our rates A x is about 1."""
    F, rms = 40, {"0.lora_A": 3.0, "0.lora_B": 1.0}
    for name, size in (("Qwen2.5-Math-7B", (3 * F) ** -0.5), ("other", F**-0.5 / 3)):
        run = opened(real, name, method="lora")
        args = train.replace(run.args, rank=64)  # many rows, for the sake of the statistic
        values, _ = train.start_values(args, run.subject.llm, rms)
        assert values["0.lora_A"].pow(2).mean().sqrt().item() == pytest.approx(size, rel=0.05)
        assert not values["0.lora_B"].any()
        if name != "other":
            assert values["0.lora_A"].abs().max() <= F**-0.5
            assert set(train.learning_rates(run.args, rms, values).values()) == {5e-3}


def test_parse_layers():
    assert train.parse_layers("27", 28) == [27]
    assert train.parse_layers("-1", 28) == [27]
    assert train.parse_layers("14,3", 28) == [3, 14]
    assert train.parse_layers("all", 3) == [0, 1, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        ("28", r"--layer 28: this model has layers 0 to 27 \(or -28 to -1 from the end\)"),
        ("-29", "--layer -29: this model has layers 0 to 27"),
        ("last", "wants a layer number, numbers joined by commas, or all; got 'last'"),
        ("3,,4", "wants a layer number"),
        ("27,-1", "names a layer twice"),
    ],
)
def test_wrong_layers_give_one_line(text, message):
    with pytest.raises(SystemExit, match=message):
        train.parse_layers(text, 28)


def test_every_epoch_shows_every_problem_once_in_a_new_order():
    rows = [{"problem": str(i)} for i in range(10)]
    steps = [[row["problem"] for row in train.batch_of_problems(rows, 5, step, seed=0)] for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == [str(i) for i in range(10)]
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert steps[3] == [row["problem"] for row in train.batch_of_problems(rows, 5, 3, seed=0)]  # nothing to replay
    assert steps[0] != [row["problem"] for row in train.batch_of_problems(rows, 5, 0, seed=1)]


# ------------------------------------------------------------------------------------------------------------- training


def settings(out, **changes):
    """A run of the built-in model that takes about a second a step."""
    small = dict(layer="27", steps=4, prompts=2, samples=4, max_tokens=40, eval_problems=0, device="cpu", out=str(out))
    return train.Config(**(small | changes))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(metrics):
    return [{k: v for k, v in m.items() if "second" not in k} for m in metrics]


def test_eval_every_measures_what_evaluate_measures_and_changes_nothing_else(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda fig, *args, **how: drawn.append(fig.axes[0].lines))
    more = dict(reward="random", lr=1.0, eval_problems=40, max_tokens=80)
    train.main(settings(tmp_path / "with", eval_every=2, keep_every=2, **more))
    train.main(settings(tmp_path / "without", **more))
    metrics, others = (without_time(lines(tmp_path / name / "metrics.jsonl")) for name in ("with", "without"))
    held_out = {m["step"]: m.pop("held_out") for m in metrics if "held_out" in m}
    assert metrics == others and list(held_out) == [0, 2]
    held = problems_of(ROOT / "data/tiny/test.jsonl").first(40)
    how = dict(device="cpu", folder=tmp_path / "other", max_tokens=80, template="native", system=train.MATH_PROMPT)
    subject, vectors = model.Subject(name="tiny", **how), {}
    for step, share in held_out.items():  # step 2 samples with what two steps have made
        if step:
            path = tmp_path / f"with/checkpoints/0000{step}/vectors.safetensors"
            vectors, _ = model.load_vectors(path, subject.config)
        right = evaluate.answers(subject, vectors, held, 1, 1.0, 0)["correct"]
        assert share == sum(sum(row) for row in right) / 40
    assert held_out[0] != held_out[2]
    points = [line.get_xydata().tolist() for line in drawn[0] if line.get_label() == "steered, held out"]
    assert points == [[[step, pytest.approx(100 * share)] for step, share in held_out.items()]]
    assert not [line for line in drawn[1] if line.get_label() == "steered, held out"]
    with pytest.raises(SystemExit, match="--eval-problems wants more than 0"):
        train.main(settings(tmp_path / "none", eval_every=2))


def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path, monkeypatch):
    """Stopped by Ctrl-C inside step 2, after its log was written and before its state was; then resumed."""
    train.main(settings(tmp_path / "whole", layer="5,27", reward="random"))

    real = train.save

    def interrupted(run, step, trained, adam):
        if step == 2:
            raise KeyboardInterrupt
        real(run, step, trained, adam)

    monkeypatch.setattr(train, "save", interrupted)
    with pytest.raises(SystemExit, match="the same command with --resume goes on from the last finished step in"):
        train.main(settings(tmp_path / "parts", layer="5,27", reward="random"))
    assert [m["step"] for m in lines(tmp_path / "parts/metrics.jsonl")] == [0, 1, 2]
    monkeypatch.setattr(train, "save", real)
    train.main(settings(tmp_path / "parts", layer="5,27", reward="random", resume=True))

    for name in ("samples.jsonl", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    one, two = (load_file(tmp_path / run / "vectors.safetensors") for run in ("whole", "parts"))
    assert one.keys() == two.keys() == {"layers.5", "layers.27"}
    assert all(torch.equal(one[name], two[name]) for name in one)
    whole, parts = (without_time(lines(tmp_path / run / "metrics.jsonl")) for run in ("whole", "parts"))
    assert whole == parts and [m["step"] for m in whole] == [0, 1, 2, 3]
    assert whole[3]["vector_norm"]["5"] > whole[0]["vector_norm"]["5"] > 0  # random rewards: every step has a gradient


@pytest.mark.parametrize("more", ["", "--numbers 4"])
def test_two_processes_equal_one(tmp_path, more):
    """torchrun with gloo: the same answers, and the same vectors up to the order of sums."""
    flags = "--layer 5,27 --steps 3 --prompts 4 --samples 4 --max-tokens 60 --eval-problems 31 --eval-every 2"
    flags = f"{flags} --device cpu --sampler hf {more}".split()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        command = [sys.executable, *start, str(ROOT / "train.py"), *flags, "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("right answers to 31 held-out problems") == 1  # process 0 alone prints
    one, two = (without_time(lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert len(one) == len(two) == 3 and one[0]["loss"] != 0 and one[0]["held_out"] > 0
    for a, b in zip(one, two):
        norms_a, norms_b = a.pop("vector_norm"), b.pop("vector_norm")
        assert a.pop("problems") == b.pop("problems")
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6) and norms_b == pytest.approx(norms_a, rel=1e-4)
    a, b = (load_file(tmp_path / name / "vectors.safetensors") for name in ("one", "two"))
    for name in a:
        assert torch.nn.functional.cosine_similarity(a[name], b[name], dim=0) > 0.9999
    samples = [lines(tmp_path / name / "samples.jsonl") for name in ("one", "two")]
    assert [r["completion"] for r in samples[1]] == [r["completion"] for r in samples[0]][: len(samples[1])]


def test_two_processes_train_all_weights_as_one_does(tmp_path):
    """Each trains its share. The run of two goes on as one: the state does not depend on the number of processes."""
    flags = "--method full --lr-absolute 1e-4 --steps 2 --prompts 4 --samples 4 --max-tokens 40 --eval-problems 0"
    flags += " --device cpu --sampler hf --reward random"  # a coin: of 16 answers of 40 tokens none may be right
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        command = [sys.executable, *start, str(ROOT / "train.py"), *flags.split(), "--out", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "two")]
    base = load_file(ROOT / "data/tiny/model.safetensors")
    one, two = (state["trained"] for state in states)
    assert one.keys() == two.keys() == base.keys()
    for name in base:
        # Adam's first steps have the sign of the gradient, which rounding may turn where it is next to nothing
        moved = (one[name]["value"] - base[name]).abs().mean()
        off = (one[name]["value"] - two[name]["value"]).abs().mean()
        assert moved > 5e-6 and off < 0.02 * moved, name
        m, n = one[name]["exp_avg"], two[name]["exp_avg"]
        torch.testing.assert_close(n, m, rtol=0.05, atol=1e-2 * m.abs().max().item())
    for name in ("one", "two"):
        assert load_file(tmp_path / name / "weights/model.safetensors").keys() == base.keys()
    assert cost_of(tmp_path / "one") == cost_of(tmp_path / "two") and min(cost_of(tmp_path / "one")) > 1_444_000
    flags = flags.replace("--steps 2", "--steps 3").split()
    train.main(tyro.cli(train.Config, args=[*flags, "--resume", "--out", str(tmp_path / "two")]))
    assert [m["step"] for m in lines(tmp_path / "two/metrics.jsonl")] == [0, 1, 2]


def test_processes_share_lists(monkeypatch):
    parts = []
    for rank in range(3):
        monkeypatch.setattr(processes, "world", lambda rank=rank: (rank, 3))
        parts.append(processes.shard(list(range(8))))
    assert parts == [[0, 1], [2, 3, 4], [5, 6, 7]]
    monkeypatch.setattr(processes, "world", lambda: (0, 3))
    with pytest.raises(SystemExit, match="--prompts 2 cannot be divided evenly among 3 processes"):
        train.main(settings("never"))


def test_config_json_holds_every_setting_that_was_used(tmp_path):
    """What a default stands for, too, so that no later stage guesses; None is left where nothing was set."""
    train.main(settings(tmp_path, steps=1))
    config = files.config_of(tmp_path)
    assert config.keys() == {field.name for field in fields(train.Config)} - {"out", "resume"} | {"prompt_day"}
    unset = {name for name, value in config.items() if value is None}
    assert unset == {"init", "lr_absolute", "eval_every", "keep_every", "numbers"}
    used = {"model": "tiny", "data": "data/tiny/train.jsonl", "held_out": "data/tiny/test.jsonl", "context": 512}
    used |= {"lr": 0.06, "prompt_day": "2024-07-26"}
    used |= {"warmup": 3, "micro_tokens": 4096, "template": "native"}
    used |= {"sampler": "hf", "device": "cpu", "dtype": "float32"}
    assert used.items() <= config.items() and config["system"].startswith("Please reason step by step")


def test_partial_credit_reaches_loss_and_metrics(tmp_path, monkeypatch):
    """A reward of one's own is any number: nothing rounds it, the advantages and so the loss are made of it."""
    given = torch.tensor([[0.2, 0.0, 0.7, 1.0], [0.25, 0.25, 0.25, 0.25]])
    seen, real = [], train.accumulate_gradient

    def keep(llm, vectors, rolled, advantages, *rest, **how):
        sums = real(llm, vectors, rolled, advantages, *rest, **how)
        seen.append((advantages, sums["loss"]))
        return sums

    monkeypatch.setattr(train, "rewards_of", lambda args, step, batch, right, rolled: given)
    monkeypatch.setattr(train, "accumulate_gradient", keep)
    train.main(settings(tmp_path, steps=1))
    torch.testing.assert_close(seen[0][0], train.rloo_advantages(given))
    (metrics,) = lines(tmp_path / "metrics.jsonl")
    assert metrics["reward_mean"] == pytest.approx(given.mean().item()) and metrics["prompts_all_equal"] == 0.5
    assert metrics["loss"] == seen[0][1] != 0 and metrics["grad_norm"] > 0
    assert [row["reward"] for row in lines(tmp_path / "samples.jsonl")] == given.flatten().tolist()
    assert metrics["accuracy"] * 8 == round(metrics["accuracy"] * 8)  # right answers are counted as before


def test_under_r1_the_answer_is_the_content_of_a_tag(tmp_path, monkeypatch):
    """Of four answers two are right, one in a tag, one in a box; one is wrong, one has neither tag nor box."""
    real = model.Subject.rollouts

    def rollouts(self, vectors, rows, k, **how):
        rolled = real(self, vectors, rows, k, **how)
        answers = ["<answer> {} </answer>", "<answer>-1</answer>", "\\boxed{{{}}}", "{}"]
        said = [answer.format(row["answer"]) for row in rows for answer in (answers if k == 4 else answers[:1])]
        return rolled._replace(texts=said)

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    for template, right, none in (("r1", [1.0, 0.0, 0.0, 0.0], 0.5), ("native", [0.0, 0.0, 1.0, 0.0], 0.75)):
        out = tmp_path / template
        train.main(settings(out, steps=1, prompts=2, samples=4, template=template, eval_problems=2, eval_every=1))
        assert [row["reward"] for row in lines(out / "samples.jsonl")] == right * 2
        (metrics,) = lines(out / "metrics.jsonl")
        assert (metrics["accuracy"], metrics["no_answer"]) == (0.25, none)
        assert metrics["held_out"] == (template == "r1")  # one answer each, in a tag


def test_the_loop_is_the_algorithm_and_nothing_else():
    """In this order, and without a word of files, processes, samplers or kinds of parameters."""
    source = inspect.getsource(train.main)
    calls = "batch_of_problems rollouts grade_answers rewards_of rloo_advantages accumulate_gradient update log save"
    found = [re.search(rf"\b{name}\(", source).start() for name in calls.split()]
    assert found == sorted(found) and len(source.splitlines()) <= 70
    assert not re.search(r"path|file|json|rank|world|process|share|vllm|lora|full", source, re.IGNORECASE)


def test_run_folder(tmp_path, capsys):
    train.main(settings(tmp_path / "run", steps=2, eval_problems=3, reward="random"))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    written = "config.json vectors.safetensors metrics.jsonl samples.jsonl state.pt reward.png"
    assert files == set(written.split())
    assert (tmp_path / "run/reward.png").read_bytes().startswith(b"\x89PNG")
    first = lines(tmp_path / "run/metrics.jsonl")[0]
    assert 0 <= first["reward_mean"] <= 1 and first["vector_norm"].keys() == {"27"} and first["seconds_sampling"] > 0
    sample = lines(tmp_path / "run/samples.jsonl")[0]
    assert sample.keys() == {"step", "problem", "answer", "completion", "reward"}
    printed = capsys.readouterr().out
    assert "base" in printed and "steered" in printed and f"python evaluate.py {tmp_path / 'run'}" in printed


def test_vector_moves_by_the_learning_rate(tmp_path):
    """Adam's first step is lr in every coordinate: the warm-up's first third of 0.06 RMS(h), or of --lr-absolute."""
    llm, tokenizer = model.load("tiny", device="cpu")
    problems = problems_of("data/tiny/train.jsonl").rows[:16]
    rms = model.residual_rms(llm, [prompt_ids(tokenizer, row["problem"]) for row in problems], [27])[27]
    four = {"layer": "3,9,14,27"}  # divided by half of their number: half the step each
    cases = {"one": (0.06 * rms, {}), "four": (0.03 * rms, four), "absolute": (0.3, {"lr_absolute": 0.3} | four)}
    for name, (lr, changes) in cases.items():
        train.main(settings(tmp_path / name, **({"steps": 1, "reward": "random", "lr": 0.06} | changes)))
        vectors, _ = model.load_vectors(tmp_path / name / "vectors.safetensors", llm.config, "tiny")
        torch.testing.assert_close(vectors[27].abs(), torch.full((64,), lr / 3), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------- variants

VARIANTS = {
    "site": {"layer": "20", "site": "input-norm"},
    "lora": {"layer": "5,20", "method": "lora", "rank": 2},
    "numbers": {"layer": "5,20", "numbers": 4},
    "tiny": {"layer": "5,20", "method": "tinylora", "rank": 2, "numbers": 7},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_start_as_the_base_model_and_resume(tmp_path, variant):
    """Step 0 is the base bit for bit, 2 steps and 2 more are 4, and nothing but what is trained has moved."""
    how = {"reward": "random"} | VARIANTS[variant]
    train.main(settings(tmp_path / "vector", steps=1, reward="random"))
    train.main(settings(tmp_path / "whole", steps=4, **how))
    train.main(settings(tmp_path / "parts", steps=2, **how))
    train.main(settings(tmp_path / "parts", steps=4, resume=True, **how))
    same = [lines(tmp_path / run / "samples.jsonl")[0]["completion"] for run in ("vector", "whole")]
    assert same[0] == same[1]
    whole, parts = (without_time(lines(tmp_path / run / "metrics.jsonl")) for run in ("whole", "parts"))
    assert whole == parts and [m["step"] for m in whole] == [0, 1, 2, 3]
    name = "weights/model.safetensors" if variant == "full" else "vectors.safetensors"
    one, two = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    if variant == "full":
        base = load_file(ROOT / "data/tiny/model.safetensors")
        assert base.keys() == one.keys() and all((one[key] != base[key]).any() for key in one)
    else:
        loras = ["20.lora_A", "20.lora_B", "5.lora_A", "5.lora_B"]
        kind = {"site": ["20.input-norm"], "lora": loras, "tiny": loras, "numbers": ["20", "5"]}[variant]
        assert sorted(one) == [f"layers.{place}" for place in kind]
        assert all(s.abs().max() > 0 for s in one.values())
    asked = evaluate.Config(run=str(tmp_path / "whole"), problems=4, device="cpu", out=str(tmp_path / "eval"))
    table = evaluate.main(asked)
    assert table["test", 1.0]["steered"]["problems"] == 4


def test_a_finished_run_of_all_weights_is_compared_as_itself(tmp_path):
    """A resume without steps loads trained weights: their answers must not be kept as the base model's."""
    how = {"method": "full", "reward": "random", "steps": 1}
    train.main(settings(tmp_path / "run", **how))
    train.main(settings(tmp_path / "run", resume=True, eval_problems=2, **how))
    kept = [json.loads(path.read_text())["key"]["weights"] for path in (tmp_path / "answers").glob("*.json")]
    assert len(kept) == 4 and len(set(kept)) == 2  # steered and base, at T = 1 and greedily


PLACES = "1.input-norm 1.attention 1.post-attention-norm 1.self_attn.q_proj 1@answer".split()
PLACES += ["1.lora_A", "1.lora_B", "1.self_attn.o_proj.lora_A"]


@pytest.mark.parametrize("place", PLACES)
def test_gradient_of_every_place_against_a_central_difference(place):
    llm, draw = random_llm(), torch.Generator().manual_seed(1)
    values = {place: torch.zeros(32)}
    if "lora" in place:
        values = {
            place.replace("lora_B", "lora_A"): torch.randn(2, 32 if "o_proj" in place else 40, generator=draw) / 6,
            place.replace("lora_A", "lora_B"): torch.randn(32, 2, generator=draw) / 6,
        }

    def loss(step=None):
        given = {key: s.clone().requires_grad_() for key, s in values.items()}
        if step is not None:
            given[place] = (values[place] + step).requires_grad_()
        sums = train.accumulate_gradient(llm, given, rolled(), A, 0.8, 9)
        return sums["loss"], given[place].grad

    _, grad = loss()
    step = 1e-2 * grad / grad.norm()
    slope = (loss(step)[0] - loss(-step)[0]) / 2e-2
    assert grad.norm() > 0.01 and slope == pytest.approx(grad.norm().item(), rel=1e-2)


def run_of(llm):
    """As much of a run as AllWeights needs."""
    subject = SimpleNamespace(llm=llm, engine=lambda rows: None)
    args = train.Config(lr_absolute=1e-3, clip=2.0, warmup=1)
    return SimpleNamespace(subject=subject, rows=[], args=args, out=Path("run"))


def test_gradient_of_all_weights():
    """The copies get what autograd gives a plain loss, over micro-batches and recomputed layers; the head's too."""
    llm, plain = random_llm(), random_llm()
    trained = train.AllWeights(run_of(llm))
    assert list(trained.values) == list(trained.gradients)
    train.accumulate_gradient(llm, {}, rolled(), A, 0.8, 9, recompute="yes")
    plain.requires_grad_()
    total, loss = sum(map(len, COMPLETIONS)), 0.0
    for p, c, a in zip(PROMPTS, COMPLETIONS, A):
        logp = (plain(input_ids=torch.tensor([p + c])).logits[0] / 0.8).log_softmax(-1)
        loss = loss - a * sum(logp[len(p) + t - 1, token] for t, token in enumerate(c)) / total
    loss.backward()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(trained.gradients[name], weight.grad, rtol=1e-3, atol=1e-5)
        assert weight.grad.abs().max() > 1e-3, name
    assert all(weight.grad is None for weight in llm.parameters())


def test_all_weights_are_trained_in_float32():
    """Steps that bfloat16 would swallow add up in the copy: 100 of 1e-4 on weights near 1."""
    llm = random_llm().to(torch.bfloat16)
    trained = train.AllWeights(run_of(llm))
    norm = "model.norm.weight"
    for _ in range(100):
        trained.values[norm].data += 1e-4
        trained.put_back()
    subject = trained.run.subject  # its answers are not the base model's any more
    assert subject.wanted_weights == subject.loaded_weights == "run/weights"
    assert trained.values[norm].dtype == torch.float32
    torch.testing.assert_close(llm.model.norm.weight, torch.full((32,), 1.01).bfloat16(), rtol=0, atol=0)


def test_orthogonal_by_hand():
    basis = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8]])
    torch.testing.assert_close(train.orthogonal(torch.tensor([5.0, 1.0, 2.0]), basis), torch.tensor([0, -0.32, 0.24]))


def test_orthogonal_vectors(tmp_path):
    """The third vector is orthogonal to the first two, to 1e-5 in cosine, at every step; those two are not."""
    llm, _ = model.load("tiny", device="cpu")
    torch.manual_seed(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        model.save_vectors(tmp_path / name / "vectors.safetensors", {27: 1 + torch.randn(64)}, llm, "tiny", 1)
    given = tuple(str(tmp_path / name) for name in ("one", "two"))
    seen, real = [], train.save

    def keep(run, step, trained, adam):
        seen.append(trained.values[27].detach().clone())
        real(run, step, trained, adam)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", keep)
        train.main(settings(tmp_path / "three", steps=3, reward="random", orthogonal_to=given))
    first, second = (model.load_vectors(Path(run) / "vectors.safetensors", llm.config)[0][27] for run in given)
    cos = torch.nn.functional.cosine_similarity
    assert cos(first, second, dim=0) > 0.3 and len(seen) == 3
    for s in seen:
        assert s.norm() > 0.1 and max(abs(cos(s, first, dim=0)), abs(cos(s, second, dim=0))) < 1e-5
    with pytest.raises(SystemExit, match="that run has no vector at 5"):
        train.main(settings(tmp_path / "four", layer="5", orthogonal_to=given))


def test_vectors_that_span_no_direction_are_refused(tmp_path):
    """A zero or a parallel vector: QR would fill the basis with an arbitrary axis."""
    llm, _ = model.load("tiny", device="cpu")
    torch.manual_seed(0)
    s = torch.randn(64)
    for name, given in (("one", s), ("parallel", -2 * s), ("zero", 0 * s), ("long", 1e5 * torch.randn(64))):
        (tmp_path / name).mkdir()
        model.save_vectors(tmp_path / name / "vectors.safetensors", {27: given}, llm, "tiny", 1)
    for name in ("parallel", "zero"):
        earlier = (str(tmp_path / "one"), str(tmp_path / name))
        with pytest.raises(SystemExit, match="at 27 are zero or not independent"):
            train.main(settings(tmp_path / "two", orthogonal_to=earlier))
    earlier = train.Config(orthogonal_to=(str(tmp_path / "one"), str(tmp_path / "long")))  # only the lengths differ
    basis = train.earlier_directions(earlier, llm, [27])[27]
    torch.testing.assert_close(basis @ basis.T, torch.eye(2))


def test_init_continues_and_keeps_what_is_not_trained(tmp_path):
    llm, _ = model.load("tiny", device="cpu")
    given = {5: torch.linspace(-0.1, 0.1, 64), 27: torch.linspace(-0.2, 0.1, 64)}
    model.save_vectors(tmp_path / "vectors.safetensors", given, llm, "tiny", 1)
    train.main(settings(tmp_path / "run", steps=1, reward="random", init=str(tmp_path), lr_absolute=0.003))
    got, _ = model.load_vectors(tmp_path / "run" / "vectors.safetensors", llm.config, "tiny")
    assert torch.equal(got[5], given[5])
    third = torch.full((64,), 0.001)  # of 0.003: the warm-up
    torch.testing.assert_close((got[27] - given[27]).abs(), third, rtol=1e-3, atol=0)


def test_plus_and_minus_one_is_the_same_path(tmp_path):
    """The gradient is twice that of 1 and 0; Adam divides the 2 away (clipping would see it, but is out of reach)."""
    for reward in ("verify", "sign"):
        train.main(settings(tmp_path / reward, steps=3, prompts=8, samples=8, max_tokens=80, reward=reward))
    one, two = (lines(tmp_path / reward / "metrics.jsonl") for reward in ("verify", "sign"))
    assert one[0]["grad_norm"] > 1e-4
    assert two[0]["grad_norm"] == pytest.approx(2 * one[0]["grad_norm"], rel=1e-5)
    assert [m["reward_mean"] for m in two] == pytest.approx([2 * m["accuracy"] - 1 for m in two])
    a, b = (load_file(tmp_path / reward / "vectors.safetensors")["layers.27"] for reward in ("verify", "sign"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def cost_of(folder):
    """(trained numbers, bytes of Adam's state) of a run, from its state.pt."""
    trained = torch.load(folder / "state.pt", weights_only=True)["trained"].values()
    moments = [s[key] for s in trained for key in ("exp_avg", "exp_avg_sq", "step")]
    return sum(s["value"].numel() for s in trained), sum(x.numel() * x.element_size() for x in moments)


def test_cost_is_counted_from_the_tensors(tmp_path):
    """What training costs (arXiv:2505.18706, Table 3) is in state.pt, metrics.jsonl and config.json."""
    lora = {"method": "lora", "rank": 4}
    wanted = {"vector": (64, {}), "lora-4": (4 * (64 + 192), lora), "full": (1_447_232, {"method": "full"})}
    for name, (n, how) in wanted.items():
        train.main(settings(tmp_path / name, steps=2, reward="random", **how))
        config, metrics = files.config_of(tmp_path / name), lines(tmp_path / name / "metrics.jsonl")
        method = config["method"] + (f"-{config['rank']}" if config["method"] == "lora" else "")
        assert (method, config["sampler"], [m["seconds_sync"] for m in metrics]) == (name, "hf", [0.0, 0.0])
        numbers, size = cost_of(tmp_path / name)
        assert numbers == n and 8 * n < size < 8 * n + 2000  # two moments, and step counts
        assert all(0 < m["seconds_update"] < 5 for m in metrics)


def test_it_learns():
    """
    Reward = share of even tokens among 3, RLOO on a vector of a random model: from about a half to most of them.
    A wrong sign ends near 0; that the baseline is right is for the tests above, a learning curve cannot see it.
    """
    llm, prompts, k = random_llm(), [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]], 16
    s = torch.zeros(32, requires_grad=True)
    adam, history = torch.optim.Adam([s], lr=0.1), []
    for step in range(100):
        with model.steer(llm, {1: s.detach()}):
            completions, _ = model.sample(llm, prompts, k, 3, [], seed=step)
        rewards = torch.tensor([sum(token % 2 == 0 for token in c) / 3 for c in completions]).view(-1, k)
        adam.zero_grad()
        rows = rolled([p for p in prompts for _ in range(k)], completions)
        train.accumulate_gradient(llm, {1: s}, rows, train.rloo_advantages(rewards).flatten(), 1.0, 200)
        adam.step()
        history.append(rewards.mean().item())
    assert sum(history[:5]) / 5 < 0.65
    assert sum(history[-10:]) / 10 > 0.8


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_finished_run_is_not_overwritten(tmp_path):
    train.main(settings(tmp_path, steps=1))
    before = (tmp_path / "vectors.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already: add --resume"):
        train.main(settings(tmp_path, steps=1, seed=5))
    with pytest.raises(SystemExit, match="has seed = 0, now it is 5; give --seed as it was"):
        train.main(settings(tmp_path, steps=1, seed=5, resume=True))
    assert (tmp_path / "vectors.safetensors").read_bytes() == before
    train.main(settings(tmp_path, steps=2, resume=True))  # more steps of the same run are fine
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": 1}, "--samples wants at least 2, got 1"),
        ({"steps": 0}, "--steps wants at least 1, got 0"),
        ({"max_tokens": 0}, "--max-tokens wants at least 1, got 0"),
        ({"temperature": 0.0}, "--temperature wants a number above 0 and below 1e30, got 0.0"),
        ({"lr": -1.0}, "--lr wants a number above 0 and below 1e30, got -1.0"),
        ({"lr": 1e300}, "--lr wants a number above 0 and below 1e30, got 1e[+]300"),
        ({"lr_absolute": math.inf}, "--lr-absolute wants a number above 0 and below 1e30, got inf"),
        ({"seed": 2**63}, "--seed wants a whole number from 0 to 2.63 - 1, got 9223372036854775808"),
        ({"device": "meta"}, "--device meta"),
        ({"keep_every": 0}, "--keep-every wants at least 1, got 0"),
        ({"model": "some/other"}, "run `python data/prepare.py deepscaler math500`, or give --data FILE"),
        ({"context": 40}, "--context 40: only 0 problems have prompts that leave room"),
        ({"vllm_memory": 1.5}, "--vllm-memory wants a share"),
        ({"weight_cap": 0.5}, "--weight-cap wants at least 1"),
        ({"method": "lora", "site": "input-norm"}, "a LoRA goes on a linear module"),
        ({"site": "nowhere"}, "a layer of this model has no 'nowhere'; sites are input-norm, attention"),
        ({"method": "full", "where": "answer"}, "--where goes with --method vector, lora or tinylora, not with full"),
        ({"sampler": "vllm", "site": "input-norm"}, "a vector at 27.input-norm is no bias of vLLM's layers"),
        ({"sampler": "vllm", "where": "answer"}, "a vector at 27@answer is no bias of vLLM's layers"),
        ({"method": "full", "orthogonal_to": ("a",)}, "--orthogonal-to goes with --method vector, not with full"),
        ({"method": "lora", "numbers": 4}, "--numbers goes with --method vector or tinylora, not with lora"),
        ({"method": "full", "init": "a"}, "--init goes with --method vector or lora, not with full"),
        ({"numbers": 0}, "--numbers wants at least 1, got 0"),
        ({"eval_problems": -1}, "--eval-problems wants at least 0, got -1"),
        ({"numbers": 4, "init": "a"}, "--init is for whole vectors, not for those made of a few numbers"),
        ({"method": "tinylora", "orthogonal_to": ("a",)}, "--orthogonal-to is for whole vectors"),
        ({"rank": 0}, "--rank wants at least 1, got 0"),
        ({"init": "nowhere"}, "no vectors at nowhere"),
        ({"lr": "paper"}, "--lr paper: data/paper.json has no rate for these layers of 'tiny'"),
        ({"dtype": "float16"}, "--dtype float16: gradients are small"),
        ({"data": "none.jsonl"}, "no problems at none.jsonl"),
    ],
)
def test_settings_that_cannot_work_give_one_line(tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        train.main(settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_another_optimiser_wants_a_rate_of_its_own(tmp_path, monkeypatch):
    """SGD with Adam's rates would run without an error, and leave the vector where it is."""

    def sgd(values, rates):
        return torch.optim.SGD(
            [{"params": [s], "lr": r, "highest": r} for s, r in zip(values.values(), rates.values())]
        )

    monkeypatch.setattr(train, "adam_of", sgd)
    with pytest.raises(SystemExit, match="another optimiser give --lr-absolute"):
        train.main(settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    how = dict(steps=1, warmup=1, lr_absolute=3000.0, reward="random")
    train.main(settings(tmp_path / "run", **how))
    train.main(settings(tmp_path / "run", **how | {"steps": 2}, resume=True))
    moved = [row["vector_norm"]["27"] for row in lines(tmp_path / "run/metrics.jsonl")]
    assert 0.01 < moved[0] < moved[1]


def test_all_weights_are_saved_every_53_steps_and_vectors_every_step(tmp_path, monkeypatch):
    saved, trained = [], SimpleNamespace(values={}, write=lambda *where: None)
    monkeypatch.setattr(processes, "save_state", lambda path, step, *rest: saved.append(step))
    for method, want in (("full", [53, 106, 120]), ("vector", list(range(1, 121)))):
        saved.clear()
        for step in range(120):
            train.save(SimpleNamespace(args=train.Config(method=method, steps=120), out=tmp_path), step, trained, None)
        assert saved == want


def test_ctrl_c_in_the_first_step_promises_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "grade", interrupted)
    with pytest.raises(SystemExit, match="^stopped$"):
        train.main(settings(tmp_path))


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    settings_file.begin(tmp_path, {}, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_other_errors_give_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no run to go on with in"):
        train.main(settings(tmp_path / "none", resume=True))
    with pytest.raises(SystemExit, match="has layers 0 to 27"):
        train.main(settings(tmp_path / "none", layer="28"))
    with pytest.raises(SystemExit, match="--prompts 9999: the data has only 2000 problems"):
        train.main(settings(tmp_path / "none", prompts=9999))
    assert not (tmp_path / "none").exists()
