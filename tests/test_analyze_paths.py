"""analyze.py: every condition against a decoder block written out by hand, recovery, attention patterns."""

import itertools
import math
from functools import partial

import conftest
import pytest
import torch
from conftest import random_llm
from test_analyze import as_json, lab_of
from transformers import Gemma3TextConfig

import analyze
import model
from data.problems import problems_of
from plumbing import figures
from plumbing.files import TINY

FAMILIES = ["qwen2", "llama", "mistral", "qwen3", "gemma", "gemma2"]
L = 1  # the block that s, at the end of layer 0, enters
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(3))  # longer than the sliding windows


def vector(seed=0, size=1.0):
    draw = torch.Generator().manual_seed(100 + seed)  # not the seeds of the random controls
    return size * torch.randn(32, generator=draw)


@torch.no_grad()
def states(llm, ids=IDS):
    return llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def conditions(llm, layer, s, through_norm=True):
    """All conditions as contexts: ({name: way}, {sweep: ways})."""
    lines = {name: partial(model.steer, llm, vectors) for name, vectors in analyze.lines_past(layer, s).items()}
    return lines, analyze.head_ways(llm, layer, s, through_norm)


def through_block(llm, ids=IDS):
    """What goes into block L and what comes out."""
    seen = {}
    hooks = [
        model.decoder_layers(llm)[L].register_forward_pre_hook(lambda m, args: seen.update(X=args[0])),
        model.decoder_layers(llm)[L].register_forward_hook(lambda m, args, out: seen.update(Z=out)),
    ]
    states(llm, ids)
    for hook in hooks:
        hook.remove()
    return seen["X"], seen["Z"]


# -------------------------------------------------------------------------------------------------- a block by hand


def rms_norm(norm, x, gemma):
    w = 1 + norm.weight if gemma else norm.weight
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w


def rotate(x, theta=10_000.0):
    """Rotary positions, (B, T, size): the pair (x_j, x_{j + size/2}) turns by position * theta^(-2j/size)."""
    B, T, size = x.shape
    angle = torch.arange(T)[:, None] * theta ** (-2 * torch.arange(size // 2) / size)
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def block_by_hand(llm, X, s, into=(), out=(), q=(), k=(), v=(), whole=False, through_norm=True):
    """
    Block L, head by head. s is added at "X", "Y" (after attention) or "Z" if named in `into`; heads in q, k, v see s.

    whole: k and v name query heads. out: a list that gets the attention pattern of every head.
    """
    block, c, family = model.decoder_layers(llm)[L], llm.config, llm.config.model_type
    gemma, att = family.startswith("gemma"), block.self_attn
    X = X + s if "X" in into else X
    U = rms_norm(block.input_layernorm, X, gemma)
    Us = rms_norm(block.input_layernorm, X + s, gemma) if through_norm else U + s
    T, size, group = X.shape[1], 8, 2
    slides = family == "mistral" or (family == "gemma2" and c.layer_types[L] == "sliding_attention")
    window = c.sliding_window if slides else 99
    distance = torch.arange(T)[:, None] - torch.arange(T)
    visible = (distance >= 0) & (distance < window)

    def head(name, i, steered):
        p, r = getattr(att, name), slice(i * size, (i + 1) * size)
        x = (Us if steered else U) @ p.weight[r].T
        x = x if p.bias is None else x + p.bias[r]
        if family == "qwen3" and name != "v_proj":
            x = rms_norm(att.q_norm if name == "q_proj" else att.k_norm, x, False)
        return x if name == "v_proj" else rotate(x)

    mixed = []
    for h in range(4):
        g = h // group
        name = h if whole else g
        Q, K, V = head("q_proj", h, h in q), head("k_proj", g, name in k), head("v_proj", g, name in v)
        scores = Q @ K.mT / math.sqrt(c.query_pre_attn_scalar if family == "gemma2" else size)
        if family == "gemma2":
            scores = c.attn_logit_softcapping * torch.tanh(scores / c.attn_logit_softcapping)
        A = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        mixed.append(A @ V)
        if isinstance(out, list):
            out.append(A)
    attended = torch.cat(mixed, -1) @ att.o_proj.weight.T
    if family == "gemma2":
        attended = rms_norm(block.post_attention_layernorm, attended, True)
    Y = X + attended + (s if "Y" in into else 0)
    before = block.pre_feedforward_layernorm if family == "gemma2" else block.post_attention_layernorm
    M, act = rms_norm(before, Y, gemma), torch.nn.functional.gelu if gemma else torch.nn.functional.silu
    gate = act(M @ block.mlp.gate_proj.weight.T, **({"approximate": "tanh"} if gemma else {}))
    M = (gate * (M @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
    if family == "gemma2":
        M = rms_norm(block.post_feedforward_layernorm, M, True)
    return Y + M + (s if "Z" in into else 0)


@pytest.mark.parametrize("through_norm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_condition_against_a_block_by_hand(family, through_norm):
    llm, s = random_llm(family, rms_norm_eps=1e-6), vector(size=2.0)
    X, Z = through_block(llm)
    torch.testing.assert_close(Z, block_by_hand(llm, X, s), atol=1e-5, rtol=1e-5)  # the oracle itself
    lines, sweeps = conditions(llm, L - 1, s, through_norm)
    assert [len(ways) for ways in sweeps.values()] == [4, 2, 2, 4, 4]
    want = {(name, None): {"into": at} for name, at in (("Unmodified", "X"), ("Skip-Attn", "Y"), ("Skip-Layer", "Z"))}
    want |= {("Steer-Q", i): {"into": "Y", "q": [i]} for i in range(4)}
    want |= {("Steer-K", i): {"into": "Y", "k": [i]} for i in range(2)}
    want |= {("Steer-V", i): {"into": "Y", "v": [i]} for i in range(2)}
    for i in range(4):
        others = {0, 1, 2, 3} - {i}
        want["Steer-Head", i] = {"into": "Y", "q": [i], "k": [i], "v": [i], "whole": True}
        want["Skip-Head", i] = {"into": "Y", "q": others, "k": others, "v": others, "whole": True}
    seen = []
    for (name, i), how in want.items():
        with (lines[name] if i is None else sweeps[name][i])():
            got = through_block(llm)[1]
        by_hand = block_by_hand(llm, X, s, through_norm=through_norm, **how)
        torch.testing.assert_close(got, by_hand, atol=2e-5, rtol=1e-5)
        assert all((got - other).abs().max() > 1e-3 for other in seen), f"{name} {i} is the same as another condition"
        seen.append(got)


# ---------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
def test_steering_values_after_the_norm_adds_a_constant(family):
    """P4 App. I with groups: Steer-V of key-value head g adds sum over query heads h of it of W_O[h] W_V[g] s."""
    llm, s, g, size = random_llm(family), vector(), 1, 8
    att = model.decoder_layers(llm)[L].self_attn
    value = att.v_proj.weight[g * size : (g + 1) * size] @ s
    constant = sum(att.o_proj.weight[:, h * size : (h + 1) * size] @ value for h in (2, 3))
    with analyze.patched(llm, L - 1, s, v=[g], through_norm=False):
        got = states(llm)
    hook = att.o_proj.register_forward_hook(lambda m, args, out: out + constant + s)
    want = states(llm)
    hook.remove()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with analyze.patched(llm, L - 1, s, v=[g]):  # through the norm it is no identity
        assert (states(llm) - want).abs().max() > 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
def test_heads_add_up(family, monkeypatch):
    """All key-value heads are all un-grouped heads; all paths together are the steered model."""
    monkeypatch.setitem(conftest.FAMILIES, "gemma3_text", Gemma3TextConfig)
    llm, s = random_llm(family), vector()
    with analyze.patched(llm, L - 1, s, v=[0, 1]):
        grouped = states(llm)
    with analyze.patched(llm, L - 1, s, v=range(4), whole=True):
        torch.testing.assert_close(states(llm), grouped, atol=1e-5, rtol=1e-5)
    with model.steer(llm, {L - 1: s}):
        steered = states(llm)
    with analyze.patched(llm, L - 1, s, range(4), [0, 1], [0, 1]):
        torch.testing.assert_close(states(llm), steered, atol=2e-5, rtol=1e-5)
    assert (grouped - steered).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ungrouping_changes_nothing_and_is_undone(llm, implementation):
    if llm.config.model_type != "gemma2":  # always eager
        llm.set_attn_implementation(implementation)
    att, want = model.decoder_layers(llm)[L].self_attn, states(llm)
    before = [*att.k_proj.parameters(), *att.v_proj.parameters()]
    with pytest.raises(ZeroDivisionError), analyze.ungrouped(att):
        assert att.k_proj.weight.shape == (32, 32) and att.num_key_value_groups == 1
        torch.testing.assert_close(states(llm), want, atol=5e-6, rtol=0)  # rounding
        raise ZeroDivisionError
    after = [*att.k_proj.parameters(), *att.v_proj.parameters()]
    assert all(one is other for one, other in zip(after, before, strict=True)) and att.num_key_value_groups == 2
    assert torch.equal(states(llm), want)


@pytest.mark.parametrize("whole", [False, True])
def test_hooks_that_add_nothing_change_no_bit(llm, whole):
    s, n = vector(), 4 if whole else 2
    with model.steer(llm, {L - 1: s}):
        steered = states(llm)
        with analyze.patched(llm, L - 1, torch.zeros(32), range(4), range(n), range(n), whole):
            got = states(llm)
    if whole:  # another shape of matrix product may round otherwise
        torch.testing.assert_close(got, steered, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(got, steered)


def test_hooks_are_gone_after_an_error(qwen2):
    want, s = states(qwen2), vector()
    with pytest.raises(ZeroDivisionError), analyze.patched(qwen2, L - 1, s, [0], [3], [2], True):
        assert not torch.equal(states(qwen2), want)
        raise ZeroDivisionError
    assert torch.equal(states(qwen2), want)
    assert not any(module._forward_hooks for module in qwen2.modules())


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
def test_sampling_with_a_cache_is_the_same(family, prompts):
    """Greedy answers of model.sample under a condition against the argmax of whole forward passes."""
    llm, s = random_llm(family), vector(size=3.0)
    _, sweeps = conditions(llm, L - 1, s)
    plain, _ = model.sample(llm, prompts, 1, 8, [2], temperature=0)
    changed = 0
    for name, i in (("Steer-Q", 3), ("Steer-K", 0), ("Steer-V", 1), ("Steer-Head", 2), ("Skip-Head", 1)):
        with sweeps[name][i](), torch.no_grad():
            got, _ = model.sample(llm, prompts, 1, 8, [2], temperature=0)
            for prompt, answer in zip(prompts, got):
                whole = llm(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].argmax(-1)
                assert whole[len(prompt) - 1 : -1].tolist() == answer, name
        changed += got != plain
    assert changed == 5


# ------------------------------------------------------------------------------------------------------------ recovery


def check_kl(fn, llm):
    """Against softmax by softmax in double, over the tokens that the states predict."""
    prompts, answers, s = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], vector(size=0.3)
    h_p = analyze.states(llm, partial(model.steer, llm, {0: s}), prompts, answers)
    h_q = analyze.states(llm, partial(model.steer, llm, {}), prompts, answers)
    want = []
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer])
        with model.steer(llm, {0: s}), torch.no_grad():
            p = llm(input_ids=ids).logits[0].double().softmax(-1)
        with torch.no_grad():
            q = llm(input_ids=ids).logits[0].double().softmax(-1)
        for t in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
            want.append(sum(x * math.log(x / y) for x, y in zip(p[t].tolist(), q[t].tolist())))
    want = torch.tensor(want)
    assert want.min() > 1e-3
    torch.testing.assert_close(fn(llm, h_p, h_q), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # Gemma 2 bends its logits
def test_kl(family):
    llm = random_llm(family)
    check_kl(analyze.kl, llm)
    check_kl(lambda *args: analyze.kl(*args, chunk=2), llm)
    with pytest.raises(AssertionError):
        check_kl(lambda llm, p, q: analyze.kl(llm, q, p), llm)


def test_kl_sums_are_those_of_single_answers(qwen2):
    prompts, answers = [[5, 6, 7], [8], [9, 3]], [[9, 10], [11, 12, 13], [4]]
    lines, _ = conditions(qwen2, 0, vector())
    lines["base"] = lambda: model.steer(qwen2, {})
    got = analyze.kl_sums(qwen2, lines, prompts, answers, tokens=10)
    assert got["Unmodified"] == [0, 0, 0]
    for i in range(3):
        one = analyze.kl_sums(qwen2, lines, [prompts[i]], [answers[i]])
        for name in lines:
            assert one[name][0] == pytest.approx(got[name][i], rel=1e-4, abs=1e-6)
    assert min(got["base"]) > 1e-3 and min(got["Skip-Attn"]) > 1e-3


def test_recovery_by_hand():
    base = [4.0, 8.0]

    def found(*args):
        estimate = analyze.recovery(*args)
        return estimate.value, estimate.interval

    assert found([0.0, 0.0], base) == (1.0, (1.0, 1.0))
    assert found(base, base) == (0.0, (0.0, 0.0))
    assert found([1.0, 2.0], base) == (0.75, (0.75, 0.75))  # 1 - 1/4 whichever problems are drawn
    assert found([4.0, 0.0], base) == (pytest.approx(1 - 4 / 12), (0.0, 1.0))
    assert found([1.0, 2.0], base, [2.0, 4.0])[0] == 0.25
    assert found([8.0, 16.0], base)[0] == -1  # worse than no vector


def test_familywise_p_against_all_signs():
    gains = [[3.0, 1.0, 2.0, 4.0, 1.0], [1.0, -1.0, 2.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    d = torch.tensor(gains, dtype=torch.float64)

    def far(signs):
        sums = (d @ torch.tensor(signs, dtype=torch.float64)).abs()
        return (sums / d.norm(dim=1).clamp(min=1e-300)).tolist()

    every = [max(far(signs)) for signs in itertools.product((-1, 1), repeat=5)]
    want = [sum(x >= y - 1e-9 for x in every) / len(every) for y in far([1] * 5)]
    assert analyze.familywise_p(gains) == pytest.approx(want, abs=0.02)
    assert 0.05 < want[0] < 0.3 and want[2] == 1
    assert analyze.familywise_p([[1.0, 1.0, 1.0]])[0] == pytest.approx(0.25, abs=0.02)
    single = analyze.familywise_p(gains[1:2])[0]
    assert single < want[1] - 0.05  # the other heads count


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_against_a_block_by_hand(family):
    llm, s, want = random_llm(family, rms_norm_eps=1e-6), vector(), []
    before, queries = llm.config._attn_implementation, torch.tensor([1, 5, 10])
    with model.steer(llm, {0: s}):
        X, _ = through_block(llm, IDS[:1])
        block_by_hand(llm, X, s, out=want)
        got = analyze.patterns(llm, IDS[0, :4].tolist(), IDS[0, 4:].tolist(), queries)
    assert sorted(got) == [0, 1, 2] and got[L].shape == (4, 3, 11)
    torch.testing.assert_close(got[L], torch.cat(want)[:, queries], atol=1e-5, rtol=1e-5)
    assert llm.config._attn_implementation == before and not any(m._forward_hooks for m in llm.modules())


def test_eager_is_undone_after_an_error(qwen2):
    assert qwen2.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), analyze.eager(qwen2):
        assert qwen2.config._attn_implementation == "eager"
        raise ZeroDivisionError
    assert qwen2.config._attn_implementation == "sdpa"


def test_pattern_kl_by_hand():
    p, q = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]), torch.tensor([[[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]])
    first = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    torch.testing.assert_close(analyze.pattern_kl(p, q), torch.tensor([(first + math.log(2)) / 2]))
    torch.testing.assert_close(analyze.pattern_kl(1.01 * p, q), analyze.pattern_kl(p, q))  # bf16 rows
    assert analyze.pattern_kl(p, p).item() == 0


def test_copies_in_another_dtype_keep_their_rotary_frequencies(qwen2):
    other = analyze.other_dtype(qwen2)
    assert other.dtype == torch.bfloat16 and qwen2.dtype == torch.float32
    assert torch.equal(other.model.rotary_emb.inv_freq, qwen2.model.rotary_emb.inv_freq)
    assert analyze.other_dtype(other).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ analyses


def small_lab(tokenizer, vectors, folder, n=4, **changes):
    """A lab around a random model that can read the built-in model's problems."""
    llm = random_llm(vocab_size=len(tokenizer), max_position_embeddings=256)
    rows = problems_of(TINY / "test.jsonl").rows[:n]
    return lab_of(llm, vectors, folder, tokenizer, rows, **changes)


def test_patch_and_its_figure(tokenizer, tmp_path, monkeypatch):
    real, asked, tested = (model.Subject.rollouts, analyze.familywise_p), [], []
    monkeypatch.setattr(model.Subject, "rollouts", lambda *args, **how: asked.append(args[1]) or real[0](*args, **how))
    monkeypatch.setattr(analyze, "familywise_p", lambda gains: tested.extend(gains) or real[1](gains))
    s = vector()
    lab = small_lab(tokenizer, [{1: s}, {2: vector(1)}], tmp_path, samples=2, sample_heads=True)
    doc = as_json(analyze.patch(lab))
    assert asked[0] == {1: s}  # texts of the steered model; then one after the other the conditions
    assert [sorted(map(str, given)) for given in asked[1:4]] == [["1"], ["2.attention"], ["2"]]
    assert len(asked) == 1 + 9 + 16 and not any(asked[10:])  # those of heads come as contexts
    found, accuracy = doc["found"], doc["accuracy"]
    total = found["base"]["kl"] * doc["tokens"]
    steer_q = [found[f"Steer-Q {i}"]["over_skip_attn"]["value"] for i in range(4)]
    assert [sum(gains) / total for gains in tested[:4]] == pytest.approx(steer_q)
    assert len(tested) == 4 + 2 + 2 + 4
    assert doc["controls"]["no_patch"] == 0 and doc["controls"]["no_groups"] < 1e-5
    assert found["all heads"]["recovery"]["value"] == pytest.approx(1, abs=1e-4)
    assert found["Unmodified"]["recovery"]["value"] == 1 and found["base"]["recovery"]["value"] == 0
    assert found["base"]["kl"] > 1e-3 and {"next vector", "random 1, Skip-Attn"} < set(doc["lines"])
    difference = found["Steer-V 0"]["recovery"]["value"] - found["Skip-Attn"]["recovery"]["value"]
    assert difference == pytest.approx(found["Steer-V 0"]["over_skip_attn"]["value"])
    assert accuracy["Skip-Head 3"]["value"] == 0  # a random model
    assert "Skip-Attn keeps" in doc["reading"] and "of 12 heads differ" in doc["reading"]
    assert (
        0 < doc["floor"]["kl"] < 0.1 * found["base"]["kl"]
        and f"{doc['floor']['kl']:.2g} nats a token" in doc["reading"]
    )
    assert ["floor: another dtype", "", f"{doc['floor']['kl']:.3g}", ""] in doc["table"][1]
    assert ["base", "0.0 [0.0, 0.0]"] in [row[:2] for row in doc["table"][1]]
    few = doc | {"accuracy": {name: accuracy[name] for name in doc["lines"]}}
    for name, given in ("few", few), ("all", doc):  # accuracies of the lines, and of every head
        figures.draw("patch", given, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_accuracies_are_sampled_under_their_condition(tokenizer, tmp_path, monkeypatch):
    """Right answers appear where the vector is in force: a stand-in for sampling is right if the model is steered."""
    lab = small_lab(tokenizer, [], tmp_path, samples=2, seed=5)
    golds, plain = [row["answer"] for row in lab.sets[0].rows], states(lab.llm)

    def rollouts(subject, vectors, rows, k, temperature, seed, **how):
        assert vectors == {} and (seed, temperature, subject.max_tokens) == (5, 1.0, 6)
        steered = not torch.equal(states(subject.llm), plain)
        texts = [rf"\boxed{{{gold if steered and j == 0 else 'no'}}}" for gold in golds for j in range(k)]
        return model.Rollouts([], [], [], texts, None)

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    lines, _ = conditions(lab.llm, 0, vector())
    assert analyze.under(lab, "base", partial(model.steer, lab.llm, {}), {}).value == 0
    steered = analyze.under(lab, "Skip-Layer", lines["Skip-Layer"], {1: vector()})
    assert steered.value == 0.5 and steered.interval == (0.5, 0.5)  # one right of two, for every problem
    # kept are texts: another grader grades them again, and nothing is sampled
    monkeypatch.setattr(model.Subject, "rollouts", None)
    monkeypatch.setattr(lab.subject, "form", "answer")  # asked for in a tag, so that no box is right
    assert analyze.under(lab, "Skip-Layer", lines["Skip-Layer"], {1: vector()}).value == 0
    monkeypatch.setattr(analyze, "grade", lambda texts, golds, form: [1.0] * len(texts))
    assert analyze.under(lab, "Skip-Layer", lines["Skip-Layer"], {1: vector()}).value == 1


def test_accuracies_under_conditions_have_the_papers_protocol(tokenizer, tmp_path, monkeypatch):
    """Every seed and every set, k answers each; greedily one."""
    lab, asked = small_lab(tokenizer, [], tmp_path, seeds=(3, 8)), []
    lab.sets = [lab.sets[0]._replace(name="few", samples=2), lab.sets[0].first(1)]

    def rollouts(subject, vectors, rows, k, temperature, seed, **how):
        asked.append((len(rows), k, seed, temperature))
        first = k if seed == 3 else 0  # all right with one seed, none with the other
        texts = [
            rf"\boxed{{{row['answer'] if j < first else 'no'}}}"
            for row in lab.sets[0].rows[: len(rows)]
            for j in range(k)
        ]
        return model.Rollouts([], [], [], texts, None)

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    assert analyze.under(lab, "x", partial(model.steer, lab.llm, {}), {}).value == 0.5
    assert asked == [(4, 2, 3, 1.0), (4, 2, 8, 1.0), (1, 1, 3, 1.0), (1, 1, 8, 1.0)]
    lab.args.temperature = 0.0
    assert analyze.under(lab, "x", partial(model.steer, lab.llm, {}), {}).value == 0
    assert asked[4:] == [(4, 1, 0, 0.0), (1, 1, 0, 0.0)]


def test_the_first_layer_whose_attention_can_change():
    later = [3, "3@answer", "3.attention", "3.post-attention-norm", "3.self_attn.v_proj", "3.self_attn.o_proj"]
    same = ["3.input-norm", "3.input_layernorm", "3.self_attn.q_proj", "3.self_attn.k_proj", "3.self_attn.qkv_proj"]
    assert {analyze.first_seen(place) for place in later} == {4}
    assert {analyze.first_seen(place) for place in same} == {3}


def test_attention_and_its_figure(tokenizer, tmp_path):
    doc = as_json(analyze.attention(small_lab(tokenizer, [{0: vector()}], tmp_path)))
    assert doc["controls"] == {"largest_below": 0}
    heads = {name: torch.tensor(x) for name, x in doc["by_head"].items()}
    assert heads["steered"].shape == (3, 4) and heads["floor"].min() > 0
    assert heads["steered"][1:].min() > 10 * heads["floor"].max()
    for name, x in doc["by_layer"].items():
        assert [m["value"] for m in x] == pytest.approx(heads[name].mean(1).tolist())
    assert doc["above"]["steered"]["value"] == pytest.approx(heads["steered"][1:].mean().item())
    figures.draw("attention", doc, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    last = as_json(analyze.attention(small_lab(tokenizer, [{2: vector()}], tmp_path / "last", n=1)))
    assert last["above"] is None and "last layer" in last["reading"]
    figures.draw("attention", last, tmp_path / "last.png")


def test_bad_input_is_one_line(qwen2, tokenizer, tmp_path):
    def refused(*vectors, match):
        with pytest.raises(SystemExit, match=match):
            analyze.patch(lab_of(qwen2, vectors, tmp_path, tokenizer))

    refused({0: vector(), 1: vector()}, match="one vector at the end of a layer; .* has 0, 1")
    refused({"0.attention": vector()}, match="one vector at the end of a layer; .* has 0.attention")
    refused({0: vector()}, {2: vector()}, match="at layer 1")
    refused({0: torch.zeros(32)}, match="is zero")
    refused({2: vector()}, match="layer 2 is the last of 3")
    qwen2.config.model_type = "phi3"  # q, k and v in one matrix
    refused({0: vector()}, match="not for 'phi3'")
