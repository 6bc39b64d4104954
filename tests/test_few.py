"""data/few.py: a few numbers that make a vector or the LoRAs of TinyLoRA, by hand and against dense formulas."""

import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_llm
from test_train import A, rolled, settings

import analyze
import model
import train
from plumbing import few as numbers
from plumbing.settings import label_of, name_of_run

TEXTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


def few(llm=None, **changes):
    """Few on a random model of width 32 and F = 40, as a run would make it."""
    llm = llm or random_llm()
    subject = SimpleNamespace(llm=llm, depth=3, prompt=lambda row: row)
    args = train.Config(**({"layer": "1", "lr": 0.06, "numbers": 4} | changes))
    return train.trained_of(SimpleNamespace(args=args, subject=subject, rows=TEXTS))


KINDS = {
    "vector": {"layer": "0,2", "numbers": 5},
    "site": {"site": "self_attn.q_proj"},
    "tiny": {"layer": "all", "method": "tinylora", "rank": 2, "numbers": 6},
    "o_proj": {"layer": "all", "method": "tinylora", "rank": 2, "site": "self_attn.o_proj"},
}


def at(trained, v: dict):
    """Put these numbers in, as a resume does."""
    for name, x in v.items():
        trained.values[name].data.copy_(x)
    trained.put_back()


def test_columns_of_P_are_orthonormal_and_drawn_from_the_seed():
    trained = few(layer="0,2")
    P, other = trained.maps[0], trained.maps[2]
    torch.testing.assert_close(P @ P.T, torch.eye(4))
    assert P.shape == (4, 32) and (P @ other.T).abs().max() < 0.9  # each vector has its own directions
    assert torch.equal(few(layer="0,2").maps[2], other) and not torch.equal(few(layer="0,2", seed=1).maps[2], other)


def test_vectors_stay_in_the_span_of_P_and_start_at_0():
    trained = few()
    assert list(trained.values) == [1] and trained.values[1].shape == (4,) and not trained.steering[1].any()
    adam = train.adam_of(trained.values, trained.rates)
    for step in range(2):
        trained.made.values[1].grad.copy_(torch.randn(32, generator=torch.Generator().manual_seed(step)))
        train.update(trained, adam, 2.0, 1.0)
        assert not trained.values[1].grad.any() and not trained.made.values[1].grad.any()
    s, P = trained.steering[1], trained.maps[1]
    assert s.norm() > 0.1
    torch.testing.assert_close(s, (P @ s) @ P)
    torch.testing.assert_close(P @ s, trained.values[1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_numbers_against_a_central_difference(kind):
    llm = random_llm()
    trained = few(llm, **KINDS[kind])
    draw = torch.Generator().manual_seed(1)
    start = {name: torch.randn(len(v), generator=draw) / 10 for name, v in trained.values.items()}

    def loss(v):
        at(trained, v)
        return train.accumulate_gradient(llm, trained.steering, rolled(), A, 0.8, 9)["loss"]

    loss(start)
    grads = [grad.clone() for grad in trained.gathered()]
    norm = torch.nn.utils.get_total_norm(grads)
    steps = {name: 1e-2 * grad / norm for name, grad in zip(start, grads)}
    forward, back = ({name: v + sign * steps[name] for name, v in start.items()} for sign in (1, -1))
    assert norm > 0.01 and (loss(forward) - loss(back)) / 2e-2 == pytest.approx(norm.item(), rel=1e-2)
    assert len(grads) == (2 if kind == "vector" else 1)  # TinyLoRA's layers share one


def test_gradient_of_the_numbers_by_hand():
    """dJ/dv_i = sum over places of the sum over entries of M_i dJ/ds; two micro-batches have added up before."""
    trained = few(**KINDS["tiny"])
    want = torch.zeros(6)
    for place, M in trained.maps.items():
        grad = torch.randn(M.shape[1:], generator=torch.Generator().manual_seed(len(place)))
        trained.made.values[place].grad += grad
        for i, d, r in itertools.product(range(6), range(32), range(2)):
            want[i] += M[i, d, r] * grad[d, r]
    torch.testing.assert_close(trained.gathered()[0], want)


def test_tiny_lora_against_the_dense_formula():
    """W' = W + U S (sum_i v_i P_i) V^T with torch's SVD: the same weights, and as a LoRA the same logits."""
    llm, dense = random_llm(), random_llm()
    trained = few(llm, **KINDS["tiny"])
    v = torch.randn(6, generator=torch.Generator().manual_seed(1))
    (name,) = trained.values
    at(trained, {name: v})
    draw = torch.Generator().manual_seed(0)  # of --seed
    for layer in range(3):
        W = dense.model.layers[layer].mlp.down_proj.weight
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :2], S[:2], Vh[:2]
        for r in range(2):  # the sign that a resume finds again
            sign = U[U[:, r].abs().argmax(), r].sign()
            U[:, r], Vh[r] = sign * U[:, r], sign * Vh[r]
        P = torch.stack([torch.randn(2, 2, generator=draw) for _ in range(6)]) / 2**0.5
        step = U @ S.diag() @ torch.einsum("i,irs->rs", v, P) @ Vh
        made = trained.steering[f"{layer}.lora_B"] @ trained.steering[f"{layer}.lora_A"]
        torch.testing.assert_close(made, step, rtol=1e-3, atol=1e-4)
        assert step.norm() > 0.1 * W.norm()
        W += step
    ids = torch.tensor([[5, 6, 7, 8]])
    with model.steer(llm, trained.steering), torch.no_grad():
        got = llm(ids).logits
    torch.testing.assert_close(got, dense(ids).logits, rtol=1e-3, atol=1e-3)
    assert (got - random_llm()(ids).logits).abs().max() > 0.1


def test_a_step_moves_what_is_made_as_far_as_a_vectors_step():
    """All numbers move by their rate, with any signs. P: |s| = lr RMS(h) sqrt(D). TinyLoRA: 2 lr RMS(h) in all."""
    llm = random_llm()
    trained, rms = few(llm), model.residual_rms(llm, TEXTS, [0, 1, 2])
    at(trained, {1: torch.tensor([1.0, -1, -1, 1]) * trained.rates[1]})
    assert trained.steering[1].norm().item() == pytest.approx(0.06 * rms[1] * 32**0.5, rel=1e-4)
    assert few(llm, lr_absolute=0.3).rates == {1: 0.3}

    tiny, texts = few(llm, **KINDS["tiny"]), {}
    module = {layer: llm.model.layers[layer].mlp.down_proj for layer in range(3)}
    keep = lambda m, args, h, layer: texts.setdefault(layer, []).append(args[0][0])  # noqa: E731
    with model.hooks([(one, partial(keep, layer=layer)) for layer, one in module.items()]):
        for ids in TEXTS:
            llm(torch.tensor([ids]))
    moved = 0.0  # sum over layers of the median over tokens of RMS(B A x) / RMS(h), over all 2^6 signs
    for layer in range(3):
        squares = []
        for signs in itertools.product((1.0, -1.0), repeat=6):
            at(tiny, {"v": torch.tensor(signs) * tiny.rates["v"]})
            A, B = (tiny.steering[f"{layer}.lora_{x}"] for x in "AB")
            squares.append((torch.cat(texts[layer]) @ A.T @ B.T).square().mean(1))
        moved += torch.stack(squares).mean(0).sqrt().median().item() / rms[layer]
    assert moved == pytest.approx(2 * 0.06, rel=1e-3)  # as many vectors together: divided by half of their number


def test_a_run_of_tiny_lora_trains_13_numbers(tmp_path):
    """As analyze.py cost counts them; its first answers are the base model's."""
    tiny = dict(layer="all", method="tinylora", rank=2, reward="random", steps=2)
    train.main(settings(tmp_path / "tiny", **tiny))
    train.main(settings(tmp_path / "vector", reward="random", steps=1))
    doc = analyze.main(analyze.Config("cost", (str(tmp_path / "tiny"),), device="cpu", out=str(tmp_path / "figures")))
    assert doc["runs"]["tiny"]["trained_parameters"] == 13
    first = [(tmp_path / run / "samples.jsonl").read_text().splitlines()[0] for run in ("tiny", "vector")]
    assert json.loads(first[0])["completion"] == json.loads(first[1])["completion"]


def test_names_say_how_many_numbers():
    args = train.Config(layer="14", numbers=4)
    assert name_of_run(args) == "tiny-layer14-numbers4" and label_of(vars(args)) == "14, 4 numbers"
    args = train.Config(layer="all", method="tinylora", rank=2, numbers=13)
    assert name_of_run(args) == "tiny-layerall-tinylora2-numbers13"
    assert label_of(vars(args)) == "all, TinyLoRA of rank 2, 13 numbers"
    assert name_of_run(train.Config(model="folder/some.gguf")) == "some-layer27"
    assert name_of_run(train.Config(model=".")) == f"{Path.cwd().name}-layer27"


def test_more_numbers_than_there_are_give_one_line():
    with pytest.raises(SystemExit, match="--numbers 33: a vector there has 32 numbers"):
        few(numbers=33)
    with pytest.raises(SystemExit, match="--numbers 13: 3 LoRAs of rank 2 are made from at most 12; give --layer all"):
        few(layer="all", method="tinylora", rank=2, numbers=13)
    assert numbers.orthonormal(32, 32, torch.Generator()).shape == (32, 32)
