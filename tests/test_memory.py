"""plumbing/memory.py: sizes worked by hand, and against what torch keeps."""

import re

import pytest
import torch
from conftest import random_llm
from transformers import Qwen2Config

import model
import train
from plumbing import memory

QWEN = Qwen2Config(  # of Qwen2.5-0.5B
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151_936,
)  # fmt: skip


def test_sizes_by_hand():
    assert memory.heads(QWEN) == (14, 2, 64)
    assert memory.cache_bytes(QWEN, 2) == 2 * 24 * 2 * 64 * 2 == 12_288
    assert memory.activation_bytes(QWEN, 2) == 8 * 896 + (4 * 896 + 3 * 4864) * 2 == 43_520
    assert memory.activation_bytes(QWEN, 4, weights=True) == 8 * 896 + (4 * 896 + 3 * 4864 + 2 * 896 + 4864) * 4
    assert memory.state_bytes(QWEN, 2, 100) == 179_200
    assert memory.head_rows(151_936) == 220 and memory.head_rows(498) == 1024 and memory.head_rows(10**9) == 1
    assert 1 << 20 < memory.free("cpu") < 1 << 50 and 1 << 20 < memory.peak("cpu") < 1 << 50


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [False, True])
def test_activations_against_what_torch_keeps(family, dtype, weights):
    """Of a layer more, so that what all layers share does not count; each tensor once, the weights not at all."""
    T, found = 50, []
    for depth in (2, 3):
        llm = random_llm(family, num_hidden_layers=depth, sliding_window=None).to(dtype).requires_grad_(weights)
        own, kept = {p.untyped_storage().data_ptr() for p in llm.parameters()}, {}

        def see(x, own=own, kept=kept):
            if x.untyped_storage().data_ptr() not in own:
                kept[x.untyped_storage().data_ptr()] = x  # held, or the next one may get its place
            return x

        s = torch.zeros(32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x), model.steer(llm, {0: s}):
            llm.get_decoder()(input_ids=torch.arange(T)[None], use_cache=False)
        found.append(sum(x.untyped_storage().nbytes() for x in kept.values()))
    want = T * memory.activation_bytes(llm.config, dtype.itemsize, weights)
    assert found[1] - found[0] == pytest.approx(want, rel=0.15)


def test_plan(monkeypatch):
    """A layer above the vector keeps (in float32) 8 * 32 + (4 * 32 + 3 * 40) * 4 = 1,248 bytes of a token."""
    llm, lengths = random_llm(), [(10, 90), (10, 30)]
    assert memory.activation_bytes(llm.config, 4) == 1248

    def plan(tokens, lowest=1, budget=4096, **how):  # half of what is free is room for so many tokens
        monkeypatch.setattr(memory, "free", lambda device: 2 * 1248 * tokens * (2 - lowest))
        return tuple(memory.plan(llm, lowest, lengths, budget, **how))

    assert plan(5000) == plan(5000, lowest=0) == (True, False, 4096)
    assert plan(2000) == (True, False, 2000)  # smaller micro-batches first
    assert plan(1000) == (False, True, 4096)  # too small: less memory by computing again
    assert plan(1000, budget=64) == (True, False, 64)
    assert plan(1000, recompute="no") == (True, False, 1000)
    assert plan(5000, recompute="yes") == (False, True, 4096)
    assert plan(5000, read_once="no") == (False, False, 4096)
    lengths.append((500, 2000))  # a row that does not fit
    assert plan(2000) == (False, True, 4096) and plan(2500) == (True, False, 2500)
    with pytest.raises(SystemExit, match="--read-once yes wants --recompute no"):
        plan(5000, recompute="yes", read_once="yes")
    assert memory.plan(llm, 2, lengths, 4096) == (True, False, 4096)  # nothing above the last layer
    llm.remembers_keys = False  # as a model with states
    assert plan(5000) == (False, False, 4096)


def test_forced_plans_reach_training(monkeypatch):
    llm, seen, real = random_llm(), [], memory.plan
    monkeypatch.setattr(memory, "plan", lambda *args: (seen.append(args[-2:]), real(*args))[1])
    rows = model.Rollouts([[3, 4], [3, 4]], [[5], [6]], [True] * 2, ["", ""], None)
    s = {1: torch.zeros(32, requires_grad=True)}
    train.accumulate_gradient(llm, s, rows, torch.tensor([1.0, -1.0]), 1.0, 100, recompute="yes", read_once="no")
    assert seen == [("yes", "no")]


SMALL = Qwen2Config(  # D 32, F 40, L 4, H 4, K 2, E 8, V 61; the head is the embedding
    hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=61, tie_word_embeddings=True,
)  # fmt: skip
WEIGHTS = 61 * 32 + 4 * (2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16 + 3 * 32 * 40 + 2 * 32) + 32  # 30,240 with the norms


def test_weights_are_the_published_numbers():
    """In billions, from the models' cards; built without memory."""
    known = {"Qwen2.5-0.5B": 0.494, "Qwen2.5-7B": 7.616, "Llama-3.2-1B": 1.236, "Llama-3.1-8B": 8.030}
    for name, billions in known.items():
        assert memory.numbers(memory.config_of(name)) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert memory.numbers(SMALL) == WEIGHTS


def test_estimate_by_hand():
    """On a GPU in bfloat16: a token's keys and values 2 * 4 * 2 * 8 * 2 = 256 bytes, a layer's activations 752."""
    job = memory.Job(k=4, tokens=1000, rows=10, lowest=1, answers=8, micro=2000)
    found = memory.estimate(SMALL, 2, "cuda", 10**9, job)
    assert found.always == {"weights": 2 * WEIGHTS, "kept states": 8 * 1000 * 32 * 2}
    assert found.sampling == {"keys and values of 8 answers": 8 * 256_000, "scores": 2 * 8 * 61 * 2 + 2 * 256 * 752}
    assert found.training == {"a micro-batch of 2,000 tokens": 2000 * 3 * 752, "head": 16 * 1024 * 61}  # layers 2, 3
    assert found.most == sum(found.always.values()) + sum(found.training.values()) and found.hints == []
    full = memory.estimate(SMALL, 2, "cuda", 10**9, job._replace(lowest=-1, processes=2)).always
    assert full == {"weights": 2 * WEIGHTS, "gradients, copies, Adam's moments": 10 * WEIGHTS}
    # on a CPU keys are float32, and a prompt's are there once for its 4 answers: 192 tokens less a row
    cpu = memory.estimate(SMALL, 2, "cpu", 10**9, job).sampling
    assert cpu["keys and values of 8 answers"] == 8 * 512 * (1000 - 192)


@pytest.mark.parametrize(
    "there, changes, hint",
    [
        (1_400_000, {}, "the 4 answers to a problem, sampled together: lower --context or --samples"),
        (1_400_000, {}, "a micro-batch of 2,000 tokens, layers computed again: lower --micro-tokens"),
        (1_400_000, {"micro": 10}, "a micro-batch of 1,000 tokens: lower --context"),
        (10**9, {"vllm": 0.5}, "vLLM's weights and the keys of one answer: raise --vllm-memory"),
        (200_000, {"lowest": -1}, "what stays in memory all the time: use more processes"),
    ],
)
def test_what_does_not_fit(there, changes, hint):
    job = memory.Job(k=4, tokens=1000, rows=10, lowest=1, answers=8, micro=2000)._replace(**changes)
    assert any(said.startswith(hint) for said in memory.estimate(SMALL, 2, "cuda", there, job).hints)


def test_said_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    random_llm().config.save_pretrained(tmp_path)  # a config alone
    subject = model.Subject(name=str(tmp_path), device="cpu", dtype="float32")
    memory.say(subject, 2, 100)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path} in float32 on cpu"
    assert re.match(r"memory in GB, at most: weights 0\.0; keys .*; at once 0\.\d, free \d", second)
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(SystemExit, match="the weights of .* do not fit: .* --dtype bfloat16 halves that"):
        memory.say(subject, 2, 100)
    capsys.readouterr()
    memory.say(model.Subject(name="tiny"), 2, 100)
    assert not capsys.readouterr().out  # nothing for the built-in model


def test_what_fits_on_a_card():
    assert memory.options(memory.config_of("Qwen2.5-0.5B"), 24, vllm=False) == "yes"
    assert memory.options(memory.config_of("Qwen2.5-14B"), 24, vllm=False) == "no"  # 29.5 GB of weights
    assert memory.options(memory.config_of("Qwen2.5-7B"), 80, vllm=True) == "yes"
