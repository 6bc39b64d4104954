"""Analyses: each number against a slow or hand-worked one, kept results, errors, pages, and every command once."""

import copy
import dataclasses
import html
import itertools
import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import tyro
from conftest import random_llm, rollouts
from torch.nn.functional import cosine_similarity, normalize

import analyze
import evaluate
import model
from data import paper
from data.problems import Problems
from evaluate import Estimate
from plumbing import figures
from plumbing.files import TINY
from plumbing.loading import load_config

FAMILIES = ["qwen2", "llama", "mistral", "gemma2"]
PROMPTS = [[5, 9, 3, 7], [8, 4], [11, 6, 12, 13, 3]]
COMPLETIONS = [[10, 20, 30, 2], [40, 2], [7, 7, 9]]
ROWS = [p + c for p, c in zip(PROMPTS, COMPLETIONS)]


def vector(seed, width=32, size=0.5):
    return size * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def as_json(found):
    """Numbers as in a JSON file."""
    return json.loads(json.dumps(found, default=Estimate.json))


class Subject:
    """Stands for model.Subject around a random model."""

    name, system, template, form, sampler = "random", None, None, "box", "hf"

    def __init__(self, llm, tokenizer, folder):
        self.llm, self.tokenizer, self.folder = llm, tokenizer, folder
        self.depth, self.key = len(model.decoder_layers(llm)), {"name": "random"}

    def rollouts(self, vectors, rows, k, **how):
        problems = [row["problem"] for row in rows]
        return rollouts(self.llm, self.tokenizer, vectors, problems, k, max_tokens=6, **how)


def lab_of(llm, vectors, folder, tokenizer=None, rows=None, **changes):
    """A lab around a random model: three problems, and a run for each of the vectors."""
    args = analyze.Config("lens", ("run",), **changes)
    runs = [analyze.Run(folder / f"run{i}", {}, v, ",".join(map(str, v))) for i, v in enumerate(vectors)]
    problems = Problems("three", rows or [{"problem": "1+1", "answer": "2"}] * 3, "0")
    return analyze.Lab(args, Subject(llm, tokenizer, folder), runs, [problems])


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(analyze.Lab, "answered", lambda *a: (PROMPTS, COMPLETIONS, [True, True, False]))


# ---------------------------------------------------------------------------------------------------------------- lens


def test_read_out():
    s, U = vector(0), torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    dot, cosine = analyze.read_out(s, U)
    for v in range(7):
        by_hand = sum(s[d].item() * U[v, d].item() for d in range(32))
        assert dot[v].item() == pytest.approx(by_hand, abs=1e-5)
        assert cosine[v].item() == pytest.approx(by_hand / (s.pow(2).sum() * U[v].pow(2).sum()).sqrt().item(), abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_folded(family):
    llm = random_llm(family)
    norm, U = llm.get_decoder().norm, llm.get_output_embeddings().weight
    norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    h = vector(3)
    logits = U @ norm(h)  # the direction of what the model computes: norm and gain, then U
    logits_folded = analyze.folded(llm, U) @ h / h.pow(2).mean().sqrt()
    torch.testing.assert_close(logits_folded, logits, rtol=1e-4, atol=1e-4)


def test_piece(tokenizer):
    # characters that no token has as a whole; among them those that byte-level BPE writes differently from Latin-1
    for character in "é\u00a0\u00ad\u0080ÿ€":
        ids = tokenizer(character, add_special_tokens=False).input_ids
        as_bytes = "".join(f"\\x{byte:02x}" for byte in character.encode())
        assert "".join(figures.piece(tokenizer, i) for i in ids) == as_bytes
    assert "".join(figures.piece(tokenizer, i) for i in tokenizer(" To\n").input_ids) == " To\n"


# --------------------------------------------------------------------------------------------------------------- shift


@pytest.mark.parametrize("family", FAMILIES)
def test_next_tokens(family):
    llm, vectors = random_llm(family), {1: vector(0), 2: vector(1)}
    seen = 0
    for (base, steered), rows, positions in analyze.next_tokens(llm, [{}, vectors], PROMPTS, COMPLETIONS, chunk=4):
        for b, s, row, t in zip(base, steered, rows.tolist(), positions.tolist()):
            ids = torch.tensor([ROWS[row]])
            at = len(PROMPTS[row]) + t - 1
            torch.testing.assert_close(b, llm(ids).logits[0].softmax(-1)[at], rtol=1e-4, atol=1e-6)
            with model.steer(llm, vectors):
                torch.testing.assert_close(s, llm(ids).logits[0].softmax(-1)[at], rtol=1e-4, atol=1e-6)
            assert (b - s).abs().max() > 1e-3
            seen += 1
    assert seen == sum(map(len, COMPLETIONS))


def test_largest_shifts(qwen2):
    vectors = {2: vector(0)}
    shifts = analyze.largest_shifts(qwen2, vectors, PROMPTS, COMPLETIONS)
    found = {(row, t): (token, delta) for row, t, token, delta in shifts}
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        ids = torch.tensor([prompt + completion])
        base = qwen2(ids).logits[0].softmax(-1)
        with model.steer(qwen2, vectors):
            delta = qwen2(ids).logits[0].softmax(-1) - base  # (T, V)
        for t in range(len(completion)):
            largest = delta[len(prompt) + t - 1]
            assert found.pop((row, t)) == (largest.argmax().item(), pytest.approx(largest.max().item(), abs=1e-6))
    assert not found


def in_double(llm, vectors):
    """Log-probs of the next tokens from the states of the model in its dtype and a product in double."""
    states = []
    for row, prompt in zip(ROWS, PROMPTS):
        with model.steer(llm, vectors), torch.no_grad():
            h = llm.get_decoder()(torch.tensor([row])).last_hidden_state[0, len(prompt) - 1 : -1]
        states.append(h)
    h = torch.cat(states)
    return h, (h.double() @ llm.get_output_embeddings().weight.double().T).log_softmax(-1)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_small_shifts_of_a_bf16_model_are_not_rounded(family):
    """Delta p and KL of a small vector: products with the head in fp32, as in double; in bf16 they would be noise."""
    llm = analyze.other_dtype(random_llm(family))
    vectors = {2: vector(0, size=0.02)}
    (h, logp), (h_s, logp_s) = in_double(llm, {}), in_double(llm, vectors)
    want, want_kl = (logp_s.exp() - logp.exp()).amax(-1), (logp_s.exp() * (logp_s - logp)).sum(-1)
    found = {(row, t): delta for row, t, _, delta in analyze.largest_shifts(llm, vectors, PROMPTS, COMPLETIONS)}
    got = torch.tensor([found[i, t] for i, c in enumerate(COMPLETIONS) for t in range(len(c))], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(analyze.kl(llm, h_s, h).double(), want_kl, atol=1e-6, rtol=1e-4)
    rounded, rounded_s = (model.logits(llm, x).log_softmax(-1) for x in (h, h_s))  # as in training
    assert ((rounded_s.exp() - rounded.exp()).amax(-1) - want).abs().mean() > 0.1 * want.mean()
    assert want.mean() > 1e-4 and want_kl.mean() > 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_exact_logits_in_parts_of_the_head(family):
    llm = analyze.other_dtype(random_llm(family))
    h, W = vector(0)[None].bfloat16(), llm.get_output_embeddings().weight
    want = h.double() @ W.double().T
    want = 30 * (want / 30).tanh() if family == "gemma2" else want
    for rows in (7, 61, 1000):
        got = model.logits(llm, h, exact=True, rows=rows)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    assert (model.logits(llm, h) - want).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floor(dtype):
    """The base model in bf16 and in fp32, text by text."""
    llm = random_llm() if dtype == torch.float32 else analyze.other_dtype(random_llm())
    other = analyze.other_dtype(llm)
    assert {llm.dtype, other.dtype} == {torch.float32, torch.bfloat16}
    (_, logp), (h, _) = in_double(llm, {}), in_double(other, {})
    q = (h.double() @ llm.lm_head.weight.double().T).log_softmax(-1)
    found = analyze.floor(llm, PROMPTS, COMPLETIONS)
    assert found["tokens"] == sum(map(len, COMPLETIONS)) and llm.dtype == dtype
    assert found["delta_p"] == pytest.approx((q.exp() - logp.exp()).amax(-1).mean().item(), rel=1e-3)
    assert found["kl"] == pytest.approx((logp.exp() * (logp - q)).sum(-1).mean().item(), rel=1e-2)
    assert found["delta_p"] > 1e-3 and analyze.floor(llm, PROMPTS, COMPLETIONS, texts=1)["tokens"] == 4


def test_shift_counts_answers_that_ended(qwen2, tokenizer, tmp_path, texts):
    found = analyze.shift(lab_of(qwen2, [{2: vector(0)}], tmp_path, tokenizer))
    assert found["answers"] == 2 and [point["n"] for point in found["by_position"]] == [2, 2, 1, 1]
    largest = analyze.largest_shifts(qwen2, {2: vector(0)}, PROMPTS[:2], COMPLETIONS[:2])
    assert found["by_position"][0]["value"] == pytest.approx(sum(d for _, t, _, d in largest if t == 0) / 2)
    assert max(box["max"] for box in found["boxes"]) == pytest.approx(max(d for *_, d in largest))
    floor = analyze.floor(qwen2, PROMPTS, COMPLETIONS)
    assert found["floor"] == floor and f"another dtype) makes {floor['delta_p']:.2g}" in found["reading"]


def test_the_command_for_the_papers_prompts(runs):
    """What shift's docstring says draws 1,000 problems of that file, as shuffle(seed) of the authors' package does."""
    command = re.search(r"`analyze.py (shift RUN --data \S+ --n 1000)`", analyze.shift.__doc__)[1]
    args = tyro.cli(analyze.Config, args=command.replace("RUN", runs["a"]).split())
    assert args.data == "data/deepscaler.jsonl"
    lines = [row["line"] for row in analyze.problems_of("data/tiny/train.jsonl").rows]
    drawn = {}
    for seed in (0, 1):
        for name in ("shift", "case", "persistence", "attention", "scale"):
            run = runs["lora" if name == "scale" else "a"]
            given = dataclasses.replace(args, name=name, runs=(run,), data="data/tiny/train.jsonl", device="cpu")
            lab = analyze.open_lab(dataclasses.replace(given, seed=seed))
            drawn[name, seed] = [row["line"] for row in lab.texts.rows]
            assert lab.about == f"tiny; train-drawn{seed} (n = 1000); seed {seed}"
        shuffled = datasets.Dataset.from_dict({"line": lines}).shuffle(seed=seed, keep_in_memory=True)["line"]
        assert all(found == list(shuffled)[:1000] for (_, s), found in drawn.items() if s == seed)
    assert drawn["shift", 0] != drawn["shift", 1] and len(set(drawn["shift", 0])) == 1000
    few = analyze.open_lab(dataclasses.replace(args, data="data/tiny/train.jsonl", device="cpu", n=30))
    assert [row["line"] for row in few.texts.rows] == drawn["shift", 0][:30]  # so kept answers serve a smaller n
    assert few.sets[0].checksum != analyze.problems_of("data/tiny/train.jsonl").checksum
    own = analyze.open_lab(dataclasses.replace(args, data=None, device="cpu", n=3))  # held out: the first ones
    assert own.texts.rows == analyze.problems_of("data/tiny/test.jsonl").rows[:3]
    sweep = analyze.open_lab(dataclasses.replace(args, name="sites", data="data/tiny/train.jsonl", device="cpu", n=3))
    assert [row["line"] for row in sweep.sets[0].rows] == lines[:3]  # accuracies, as in evaluate.py


# --------------------------------------------------------------------------------------------- persistence, similarity


def literal_states(llm, ids, vectors):
    """The residual stream after every layer, (L, T, D), with layers whose forward adds the vector: no hooks at all."""
    seen, layers = [], model.decoder_layers(llm)

    def wrap(layer, forward):
        def run(*args, **kwargs):
            output = forward(*args, **kwargs) + vectors.get(layer, 0)
            seen.append(output[0])
            return output

        return run

    try:
        for i, layer in enumerate(layers):
            layer.forward = wrap(i, layer.forward)
        llm(torch.tensor([ids]))
    finally:
        for layer in layers:
            del layer.forward
    return torch.stack(seen)


LONG = [[5, 9], list(range(20, 30)), [8, 4, 6], [11, 6, 12, 13]]
ANSWERS = [[10, 2], [*range(30, 59), 2], [7, 7, 9], [2]]  # texts of 4, 40, 6 and 5 tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_persistence(family):
    """Against all cosines one by one: to the mean of all, to the mean of the own text (the authors'), to the vector."""
    llm, s = random_llm(family), {0: vector(0), 1: vector(1), 2: vector(2)}
    sums = analyze.shift_sums(llm, {0: s[0]}, LONG, ANSWERS, [0, 1, 2])
    found = analyze.persistence_of(*sums, {0: s[0], 2: s[2]}, [0, 1, 2])
    for l in range(3):
        deltas = []
        for prompt, answer in zip(LONG, ANSWERS):
            row = prompt + answer
            shift = literal_states(llm, row, {0: s[0]})[l] - literal_states(llm, row, {})[l]
            deltas.append(shift[:-2])  # match_effect.py cuts the last token off the text, and again off the states
        every = torch.cat(deltas)  # (all tokens, D)
        assert len(every) == 2 + 38 + 4 + 3
        own = [cosine_similarity(d, d.mean(0)[None]) for d in deltas]
        want = {
            "diff_diff": cosine_similarity(every, every.mean(0)[None]).mean(),
            "diff_diff_authors": torch.cat(own).mean(),
        }
        want["diff_vector"] = cosine_similarity(every, s[l][None]).mean()
        for kind, x in want.items():
            if (kind, l) == ("diff_vector", 1):
                assert found[kind][l] is None
                continue
            assert found[kind][l].value == pytest.approx(x.item(), abs=1e-4)
            low, high = found[kind][l].interval
            assert low - 1e-4 <= high <= 1 + 1e-4
        if l:  # the rules are far apart: texts that weigh alike, one mean for all texts, and the authors'
            by_text = sum(x.mean().item() for x in own) / len(own)
            rules = [by_text, want["diff_diff"].item(), want["diff_diff_authors"].item()]
            assert min(abs(x - y) for x, y in itertools.combinations(rules, 2)) > 0.01
    for kind in found:
        assert found[kind][0].value == pytest.approx(1, abs=1e-4)


def test_batches_and_padding_change_nothing(qwen2, monkeypatch):
    whole = analyze.shift_sums(qwen2, {0: vector(0)}, PROMPTS, COMPLETIONS, [1, 2])
    monkeypatch.setattr(model, "batches", lambda lengths, budget: [[i] for i in range(len(lengths))])
    for one, other in zip(whole, analyze.shift_sums(qwen2, {0: vector(0)}, PROMPTS, COMPLETIONS, [1, 2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_similarity(qwen2, tmp_path, texts):
    vectors = [{0: vector(0)}, {2: vector(2)}, {1: vector(1)}]
    found = analyze.similarity(lab_of(qwen2, vectors, tmp_path))
    assert found["layers"] == [0, 1, 2]
    means = []
    for v in sorted(vectors, key=str):
        shifts = [(literal_states(qwen2, row, v)[2] - literal_states(qwen2, row, {})[2])[:-2] for row in ROWS]
        means.append(torch.cat(shifts).mean(0))
    want = normalize(torch.stack(means), dim=-1)
    torch.testing.assert_close(torch.tensor(found["cosine"]), want @ want.T, rtol=1e-4, atol=1e-4)
    pair = found["pairs"][0]
    assert list(pair["layers"]) == [0, 1] and pair["value"] == found["cosine"][0][1] and abs(pair["value"]) < 0.99
    assert pair["interval_95"][0] <= pair["value"] <= pair["interval_95"][1]


# ---------------------------------------------------------------------------------------------------------- accuracies


def accuracy(right, n=10):
    return Estimate.of([[1]] * right + [[0]] * (n - right))


def test_pair_gain():
    gain = analyze.pair_gain(accuracy(50, 100), accuracy(20, 100), accuracy(40, 100), accuracy(60, 100))
    share = gain["share"]
    assert share.value == pytest.approx(0.5) and not share.unclear and not gain["cross"]
    assert share.interval[0] < 0.5 < share.interval[1]
    # the better of the two singles counts, whichever it is
    other = analyze.pair_gain(accuracy(50, 100), accuracy(40, 100), accuracy(20, 100), accuracy(60, 100))
    assert as_json(other) == as_json(gain)
    same = analyze.pair_gain(accuracy(60, 100), accuracy(20, 100), accuracy(40, 100), accuracy(60, 100))
    assert same["cross"] and same["share"].interval == (1, 1)  # resampled together: one and the same in every draw
    worse = analyze.pair_gain(accuracy(30, 100), accuracy(20, 100), accuracy(40, 100), accuracy(60, 100))
    assert worse["share"].value == pytest.approx(-0.5)
    assert gain["over_single"].value == pytest.approx(0.1) and worse["over_single"].value == pytest.approx(-0.1)
    low, high = worse["over_single"].interval  # right answers nested as they are: the difference is that of 10 in 100
    assert -0.2 < low < -0.1 < high < 0
    assert analyze.pair_gain(accuracy(5), accuracy(2), accuracy(4), accuracy(4))["share"].value is None
    assert analyze.pair_gain(accuracy(5), accuracy(2), accuracy(4), accuracy(5))["share"].unclear
    upside_down = analyze.pair_gain(accuracy(90, 100), accuracy(20, 100), accuracy(80, 100), accuracy(20, 100))
    assert upside_down["share"].unclear


def test_differences_are_paired():
    noisy, other = Estimate.of([[0], [1]] * 50), Estimate.of([[1], [0]] * 50)
    assert (noisy - noisy).interval == (0, 0)
    low, high = (noisy - other).interval
    assert low == pytest.approx(-high, abs=0.06) and high > 0.1


def test_random_like():
    s = vector(0)
    noise = analyze.random_like(s, 0, 3)
    assert noise.norm().item() == pytest.approx(s.norm().item()) and torch.equal(noise, analyze.random_like(s, 0, 3))
    long = torch.linspace(-5, 9, 64)
    assert all(abs(cosine_similarity(analyze.random_like(long, seed, 9), long, dim=0)) < 0.6 for seed in range(3))
    assert not torch.equal(noise, analyze.random_like(s, 1, 3)) and not torch.equal(noise, analyze.random_like(s, 0, 4))


def test_moved():
    s = {0: vector(0), 20: vector(1), "27.attention": vector(2), "3@answer": vector(3)}
    assert analyze.moved(s, 28) == {14: s[0], 6: s[20], "13.attention": s["27.attention"], "17@answer": s["3@answer"]}


def test_an_interruption_keeps_what_was_measured(runs, tmp_path, monkeypatch):
    out = shutil.copytree(Path(runs["three"]).parent, tmp_path / "out")
    calls, fail_at = [], 3
    golds = {row["problem"]: row["answer"] for row in analyze.problems_of(TINY / "test.jsonl").rows}

    def rollouts(subject, vectors, rows, k, **how):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(sorted(vectors))
        right = 2 if len(vectors) == 1 else 3
        texts = [rf"\boxed{{{golds[row['problem']] if i < right else 'no'}}}" for i, row in enumerate(rows)]
        return model.Rollouts([[1]] * 3, [[2]] * 3, [True] * 3, texts, None)

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    with pytest.raises(KeyboardInterrupt):
        go("ablate", str(out / "three"), n=3)
    fail_at, calls[:] = None, []
    doc = go("ablate", str(out / "three"), n=3)
    assert len(calls) == 8 - 3  # all, base, three without, three alone
    assert doc["conditions"]["only 20"]["value"] == pytest.approx(2 / 3)
    assert doc["conditions"]["without 20"]["value"] == 1
    assert [3, 26] in calls and [20] in calls
    assert go("ablate", str(out / "three"), n=3) == doc and len(calls) == 5  # and now nothing is measured again
    path = out / "three" / "vectors.safetensors"
    vectors, _ = model.load_vectors(path, load_config("tiny"))
    model.save_vectors(path, vectors | {20: vectors[20] + 1}, model.load("tiny", "cpu")[0], "tiny", 0)
    go("ablate", str(out / "three"), n=3)
    assert len(calls) == 5 + 8 - 4  # base, only 3, only 26 and without 20 have no changed vector
    go("ablate", str(out / "three"), n=3, seed=1)
    assert len(calls) == 9 + 8


# --------------------------------------------------------------------------------------------------------- scale, case


def test_segments():
    system, turn, other = [1, 2, 3], [8, 9], [1, 2, 3, 50, 8, 9]
    assert analyze.segments([system + [4, 5] + turn, system + [6] + turn], other) == [
        ["system"] * 3 + ["question"] * 2 + ["turn"] * 2,
        ["system"] * 3 + ["question"] + ["turn"] * 2,
    ]


def test_token_scales(qwen2):
    """|B| A x_t from the inputs of down_proj, for texts of different lengths; in layer 2 under what layer 1 added."""
    vectors = {}
    for layer in (1, 2):
        A, B = vector(layer, 40)[None], vector(layer + 5, 32)[:, None]
        vectors |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
    got = analyze.token_scales(qwen2, vectors, PROMPTS, COMPLETIONS)
    # the same as one matrix
    qwen2.model.layers[1].mlp.down_proj.weight.data += vectors["1.lora_B"] @ vectors["1.lora_A"]
    for layer in (1, 2):
        at = f"{layer}.lora_A"
        assert [len(sizes) for sizes in got[at]] == [len(row) for row in ROWS]
        for row, sizes in zip(ROWS, got[at]):
            inputs = []
            down = model.decoder_layers(qwen2)[layer].mlp.down_proj
            handle = down.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0][0]))
            qwen2(torch.tensor([row]))
            handle.remove()
            want = vectors[f"{layer}.lora_B"].norm() * (inputs[0] * vectors[at][0]).sum(-1)
            torch.testing.assert_close(torch.tensor(sizes), want, rtol=1e-3, atol=1e-3)
            assert want.abs().max() > 0.1


def test_token_scales_at_the_answer_only(qwen2):
    vectors = {"1.lora_A@answer": vector(1, 40)[None], "1.lora_B@answer": vector(6, 32)[:, None]}
    for prompt, sizes in zip(PROMPTS, analyze.token_scales(qwen2, vectors, PROMPTS, COMPLETIONS)["1.lora_A@answer"]):
        before = len(prompt) - 1  # the prompt's last token predicts the answer's first
        assert not any(sizes[:before]) and all(size != 0 for size in sizes[before:-1])


def biased(llm, layer, module, s):
    """The model with s as a bias of a module, whose linear layers have none: no hooks."""
    other = copy.deepcopy(llm)
    other.get_submodule(f"model.layers.{layer}.{module}").bias = torch.nn.Parameter(s.clone(), requires_grad=False)
    return other


@pytest.mark.parametrize(("layer", "block"), [(0, 1), (1, 2), (2, 2)])
def test_case_in_both_forms(layer, block, tokenizer, tmp_path, texts):
    """s at the end of its layer, and after the attention of the next block, of the last one for the last layer."""
    llm, s = random_llm(), vector(0)
    lab = lab_of(llm, [{layer: s}], tmp_path, tokenizer)
    doc = as_json(analyze.case(lab))
    models = {"At its own place": biased(llm, layer, "mlp.down_proj", s)}
    models[f"After the attention of layer {block}"] = biased(llm, block, "self_attn.o_proj", s)
    assert doc["forms"] == list(models)
    changed = 0
    for form, other in models.items():
        differ = 0
        for row, prompt, answer, text in zip(ROWS, PROMPTS, COMPLETIONS, doc["answers"]):
            p, q = (m(torch.tensor([row])).logits[0, len(prompt) - 1 : -1].softmax(-1) for m in (llm, other))
            assert len(text["tokens"]) == len(answer)
            for t, y in enumerate(answer):
                entry = text["tokens"][t]
                assert entry["base"] == pytest.approx(p[t, y].item(), rel=1e-3, abs=1e-6)
                assert entry["forms"][form]["steered"] == pytest.approx(q[t, y].item(), rel=1e-3, abs=1e-6)
                assert entry["forms"][form]["differs"] == (p[t].argmax() != q[t].argmax()).item()
                differ += entry["forms"][form]["differs"]
                changed += abs(q[t, y] - p[t, y]) > 1e-3
        assert f"{form} the vector changes the most likely token at {differ} of 9 positions" in doc["reading"]
    assert changed > 4 and {row[0] for row in doc["table"][1]} == set(models)
    own, after = (
        [token["forms"][form]["steered"] for text in doc["answers"] for token in text["tokens"]] for form in models
    )
    assert own != pytest.approx(after, abs=1e-3)
    figures.draw("case", doc, tmp_path / "case.png")
    assert (tmp_path / "case.png").stat().st_size > 10_000


@pytest.mark.parametrize("places", [{"1.attention": 32}, {0: 32, 1: 32}, {"1@answer": 32}])
def test_case_of_other_runs_has_the_own_place_alone(places, qwen2, tokenizer, tmp_path, texts):
    vectors = {place: vector(0, n) for place, n in places.items()}
    doc = as_json(analyze.case(lab_of(qwen2, [vectors], tmp_path, tokenizer)))
    assert doc["forms"] == ["At its own place"] and "P4 Fig. 6's form" in doc["reading"]
    figures.draw("case", doc, tmp_path / "case.png")


def test_the_report_escapes():
    table = paper.table_of(["<i>", "b"], [['<script>"&', None]])
    assert "<script" not in table and "<i>" not in table and "&lt;script&gt;" in table and "None" not in table


def test_lines_of():
    lines = figures.lines_in([("a" * 60, 0, False), ("b" * 60, 0, False), ("c\n\n", 0, False), ("d", 0, False)])
    assert [[(column, text) for column, text, *_ in line] for line in lines] == [
        [(0, "a" * 60)], [(0, "b" * 60), (60, "c↵↵")], [], [(0, "d")]
    ]  # fmt: skip


def test_panels_that_share_y_show_the_highest_of_all(tmp_path, monkeypatch):
    """Greedy accuracies are above those at T = 1, and no point may be cut off."""
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda fig, *args, **how: drawn.append(fig))
    row = {"base": 0.1, "3": 0.2}, {"base": 0.1, "3": 0.95}
    by_decoding = {name: {key: {"value": x} for key, x in values.items()} for name, values in zip("ab", row)}
    figures.draw("sweep", {"layers": [3], "depth": 28, "by_decoding": by_decoding}, tmp_path / "sweep.png")
    for ax in drawn[0].axes:
        low, high = ax.get_ylim()
        assert low == 0 and 95 < high < 110


# ------------------------------------------------------------------------------------------------- every command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of the built-in model with vectors that nobody trained."""
    folder = tmp_path_factory.mktemp("out")
    llm, _ = model.load("tiny", "cpu")

    def run(name, layers, **config):
        (folder / name).mkdir()
        settings = {"layer": ",".join(map(str, layers)), "model": "tiny", "max_tokens": 80, "context": 512}
        settings |= {"held_out": "data/tiny/test.jsonl", "dtype": "float32", "sampler": "hf"} | config
        (folder / name / "config.json").write_text(json.dumps(settings))
        vectors = {layer: vector(layer, 64, 0.05) for layer in layers}
        model.save_vectors(folder / name / "vectors.safetensors", vectors, llm, settings["model"], 0)
        return str(folder / name)

    made = {"a": run("a", [3]), "b": run("b", [20]), "two": run("two", [3, 20])}
    made["all"] = run("all", range(28), layer="all")
    made["site"] = run("site", [20], orthogonal_to=["out/b"])
    made["three"], made["lone"] = run("three", [3, 20, 26]), run("lone", [7])
    for name, numbers in (("a", 64), ("all", 1792)):
        state = {str(i): {"value": torch.zeros(64), **dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(64))}
                 for i in range(numbers // 64)}  # fmt: skip
        torch.save({"step": 2, "trained": state}, folder / name / "state.pt")
        seconds = {"seconds_sampling": 2.0, "seconds_grading": 0.5, "seconds_training": 1.0}
        seconds["seconds_sync"] = 0.001
        rows = [{"step": i, "seconds_update": update} | seconds for i, update in enumerate((0.25, 0.75))]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["q_proj"] = run("q_proj", [])
    model.save_vectors(folder / "q_proj" / "vectors.safetensors", {"3.self_attn.q_proj": vector(3, 64)}, llm, "tiny", 0)
    inner = llm.config.intermediate_size
    lora = {"20.lora_A": vector(1, inner, 0.05)[None], "20.lora_B": vector(2, 64)[:, None]}
    made["lora"] = run("lora", [20], method="lora", rank=1)
    model.save_vectors(folder / "lora" / "vectors.safetensors", lora, llm, "tiny", 0)
    made["copy"] = str(folder / "copy-of-tiny")
    shutil.copytree(TINY, made["copy"], ignore=shutil.ignore_patterns("*.py", "*.md", "*.jsonl", "*.png"))
    made["full"] = run("full", [], method="full", layer="27")
    (folder / "full" / "vectors.safetensors").unlink()
    (folder / "full" / "weights").mkdir()
    files = "config.json tokenizer.json tokenizer_config.json chat_template.jinja generation_config.json"
    for file in files.split():
        shutil.copy(TINY / file, folder / "full" / "weights")
    other, _ = model.load("tiny", "cpu")
    other.get_decoder().norm.weight.data *= -1  # another model of the same shape
    other.save_pretrained(folder / "full" / "weights")
    made["folder"] = folder
    return made


def go(name, *runs, n=2, max_tokens=3, **changes):
    return analyze.main(analyze.Config(name, tuple(runs), n=n, max_tokens=max_tokens, device="cpu", **changes))


COMMANDS = {
    "lens": (["a"], {}),
    "shift": (["a"], {"max_tokens": 80}),
    "prefix": (["a"], {"token": "To", "controls": True}),
    "case": (["a"], {}),
    "sweep": (["a", "b", "all", "full"], {"controls": True}),
    "persistence": (["a", "b"], {}),
    "similarity": (["a", "b"], {}),
    "sites": (["a", "b"], {}),
    "orthogonal": (["b", "site"], {}),
    "compose": (["a", "b", "all"], {"controls": True}),
    "ablate": (["two"], {}),
    "transfer": (["a"], {"recipients": ("copy", "tiny")}),
    "scale": (["lora"], {}),
    "cost": (["a", "all"], {}),
    "patch": (["a"], {}),
    "attention": (["a"], {}),
}


def test_every_analysis_has_a_command_and_a_figure():
    assert set(COMMANDS) == set(analyze.ANALYSES) and set(figures.FIGURES) <= set(analyze.ANALYSES)
    listed = analyze.listed()
    for name, one in analyze.ANALYSES.items():
        assert f"  {name} " in listed and one.papers in listed and one.compute.__doc__.strip()[:20] in listed


def test_a_new_analysis_is_one_function(runs, tmp_path, monkeypatch, capsys):
    """Registered by its decorator, it has a command, a place in --help, and its table as figure."""
    monkeypatch.setattr(analyze, "ANALYSES", dict(analyze.ANALYSES))

    @analyze.analysis("ours", least=2, most=2, n=None)
    def cosine(lab):
        """Do two runs find the same direction?"""
        one, other = (next(iter(run.vectors.values())) for run in lab.runs)
        x = cosine_similarity(one, other, dim=0).item()
        return analyze.finding(f"The cosine is {x:.2f}.", ["runs", "cosine"], [["a, b", f"{x:.2f}"]], cosine=x)

    with pytest.raises(SystemExit, match="cosine wants 2 run folders, got 1"):
        go("cosine", runs["a"])
    doc = go("cosine", runs["a"], runs["b"], out=str(tmp_path))
    assert doc["cosine"] == pytest.approx(cosine_similarity(vector(3, 64), vector(20, 64), dim=0).item(), abs=1e-6)
    assert (tmp_path / "cosine.png").stat().st_size > 5000 and "| a, b |" in (tmp_path / "cosine.md").read_text()
    assert "Do two runs find the same direction? (ours)" in analyze.listed()


def test_a_copy_of_the_runs_model_takes_its_place(runs, tmp_path):
    """As where a run names a hub model and only a local folder of it is there."""
    own = go("lens", runs["a"], out=str(tmp_path / "own"))
    there = go("lens", runs["a"], out=str(tmp_path / "there"), model=runs["copy"])
    assert there["vectors"] == own["vectors"] and f"--model {runs['copy']}" in there["command"]
    with pytest.raises(SystemExit, match="cannot load the model 'nowhere'"):
        go("lens", runs["a"], out=str(tmp_path / "nowhere"), model="nowhere")


class Engine:
    """Stands for vLLM: started with a model's weights, later given others."""

    def __init__(self, llm):
        self.started, self.pushed = fingerprint(llm), []

    def push_weights(self, llm):
        self.pushed.append(fingerprint(llm))


def fingerprint(llm):
    return llm.get_decoder().norm.weight.sum().item()


def test_sweep_measures_a_run_of_all_weights_in_their_place(runs, tmp_path, monkeypatch):
    seen, real, engines = [], model.Subject.rollouts, []

    def watched(subject, vectors, rows, k, **how):
        subject.engine(rows)
        seen.append(fingerprint(subject.llm))
        with monkeypatch.context() as here:  # the model itself samples
            here.setattr(model.Subject, "engine", lambda subject, rows: None)
            return real(subject, vectors, rows, k, **how)

    def start(name, llm, *args, **how):
        engines.append(Engine(llm))
        return engines[-1]

    out = shutil.copytree(runs["folder"], tmp_path / "out", ignore=shutil.ignore_patterns("answers"))
    a, full = str(out / "a"), str(out / "full")
    monkeypatch.setattr(model.Subject, "rollouts", watched)
    go("sweep", a, full, out=str(tmp_path / "hf"))
    own, other = (fingerprint(model.load(name, "cpu")[0]) for name in ("tiny", full + "/weights"))
    assert own != other and seen == [own] * 4 + [other] * 2  # base and layer 3 at T = 1 and greedy, then all weights
    # an engine, too, starts with the base model's weights, also when only the other ones are still to be measured
    monkeypatch.setattr(model.Subject, "samples_with", "vllm")
    monkeypatch.setattr(model, "VLLM", start)
    monkeypatch.setattr(model, "test_engine", lambda *args: None)
    go("sweep", a, out=str(tmp_path / "vllm"))
    seen.clear()
    doc = go("sweep", a, full, out=str(tmp_path / "vllm"))
    assert seen == [other] * 2 and [engine.started for engine in engines] == [own] * 2
    assert [engine.pushed for engine in engines] == [[], [other]]
    # measured once; other weights are another run
    seen.clear()
    assert go("sweep", a, full, out=str(tmp_path / "vllm")) == doc and not seen
    changed, _ = model.load(full + "/weights", "cpu")
    changed.get_decoder().norm.weight.data *= 2
    changed.save_pretrained(full + "/weights")
    go("sweep", a, full, out=str(tmp_path / "vllm"))
    assert seen == [pytest.approx(2 * other)] * 2


GOLDS = {"one": ["1", "2", "3"], "two": ["4", "5"]}


@pytest.fixture
def small(monkeypatch, runs, tmp_path):
    """A run in a folder of its own, benchmarks of three and two problems, and a sampler without a model."""
    for name, golds in GOLDS.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"problem": f"{name} {g}", "answer": g}) + "\n" for g in golds))
    monkeypatch.setattr("data.problems.ROOT", tmp_path)
    calls = []

    def rollouts(subject, vectors, rows, k, seed=None, temperature=1.0, **how):
        problems, asked = [row["problem"] for row in rows], dict(template=subject.template, system=subject.system)
        asked |= dict(k=k, temperature=temperature, problems=problems, vectors=sorted(vectors, key=str))
        calls.append(how | asked)
        texts = []
        for problem, number in zip(problems, seed):
            gold = problem.split()[1]
            texts += [rf"\boxed{{{gold if right(number + j, vectors) else 'no'}}}" for j in range(k)]
        n = len(texts)
        return model.Rollouts([[1]] * n, [[2]] * n, [True] * n, texts, None)

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    run = shutil.copytree(runs["a"], tmp_path / "out" / "a")
    return str(run), calls


def right(number, vectors):
    """Whether the stand-in's answer with this seed is right: one half of them, of the steered model two thirds."""
    return number % 3 > 0 if vectors else number % 2 > 0


def mean_by_hand(seeds, vectors, k=1):
    """The mean over the sets of means over seeds, problems and samples."""
    means = []
    for golds in GOLDS.values():
        each = [
            right(number + j, vectors)
            for seed in seeds
            for number in model.prompt_seeds(seed, range(len(golds)))
            for j in range(k)
        ]
        means.append(sum(each) / len(each))
    return sum(means) / len(means)


def test_accuracies_are_means_over_seeds_and_benchmarks(small, tmp_path):
    run, calls = small
    how = {"n": None, "benchmarks": ("one", "two")}
    doc = go("sweep", run, out=str(tmp_path / "papers"), **how)
    for name, vectors in (("base", {}), ("3", {3: 0})):
        assert doc["by_decoding"]["T = 1"][name]["value"] == pytest.approx(mean_by_hand((0, 1, 2), vectors))
        assert doc["by_decoding"]["greedy"][name]["value"] == pytest.approx(mean_by_hand((0,), vectors))
    assert doc["about"] == "tiny; mean of one (n = 3), two (n = 2); seed 0, 1, 2"
    assert len(calls) == 2 * 2 * (3 + 1)
    pooled = [right(x, {3: 0}) for seed in range(3) for n in (3, 2) for x in model.prompt_seeds(seed, range(n))]
    assert abs(sum(pooled) / len(pooled) - mean_by_hand((0, 1, 2), {3: 0})) > 0.01  # sets weigh alike, not problems
    doc = go("sites", run, out=str(tmp_path / "own"), seeds=(4, 7), samples=5, seed=9, **how)
    assert doc["conditions"]["3"]["value"] == pytest.approx(mean_by_hand((4, 7), {3: 0}, 5))
    doc = go("sites", run, out=str(tmp_path / "first"), n=1, benchmarks=("two",), seed=9)
    assert doc["about"] == "tiny; two (n = 1); seed 0, 1, 2"
    doc = go("sites", run, out=str(tmp_path / "data"), data=str(tmp_path / "data" / "one.jsonl"), n=None, seed=9)
    assert doc["about"] == "tiny; one (n = 3); seed 9"


def test_answers_are_shared_with_evaluate(small, tmp_path, monkeypatch):
    """After evaluate.py with the same benchmarks nothing is sampled, and the accuracies are its own."""
    run, calls = small
    how = {"benchmarks": ("one", "two"), "max_tokens": 3, "device": "cpu"}
    measured = evaluate.main(evaluate.Config(run=run, samples=2, **how))
    assert len(calls) == 2 * 2 * (3 + 1)

    def never(*args, **how):
        raise AssertionError("sampled again")

    monkeypatch.setattr(model.Subject, "rollouts", never)
    doc = go("sweep", run, out=str(tmp_path), n=None, benchmarks=("one", "two"), samples=2)
    for decoding, T in (("T = 1", 1.0), ("greedy", 0.0)):
        for name, who in (("base", "base"), ("3", "steered")):
            sets = [measured[benchmark, T][who]["accuracy"].value for benchmark in GOLDS]
            assert doc["by_decoding"][decoding][name]["value"] == pytest.approx(sum(sets) / 2)
    with pytest.raises(AssertionError, match="sampled again"):
        go("sweep", run, out=str(tmp_path), n=None, benchmarks=("one", "two"), samples=2, seeds=(3,))


def test_all_problems_of_benchmarks_but_few_texts(runs, monkeypatch, tmp_path):
    """Accuracies take all problems of benchmarks; answers are read to as many as without."""
    rows = [json.dumps({"problem": str(i), "answer": "1"}) for i in range(130)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "many.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("data.problems.ROOT", tmp_path)

    def sizes(name, **changes):
        lab = analyze.open_lab(analyze.Config(name, (runs["a"],), benchmarks=("many",), device="cpu", **changes))
        return len(lab.sets[0].rows), len(lab.texts.rows)

    assert sizes("patch") == (130, 100) and sizes("patch", n=120) == (120, 120)
    assert sizes("shift") == (100, 100) and sizes("case") == (4, 4) and sizes("shift", n=120) == (120, 120)


def test_a_template_for_recipients(small, tmp_path):
    """P4 Table 1: an instruct model is asked in the base model's template."""
    run, calls = small
    settings = {"recipients": ("tiny",), "data": str(tmp_path / "data" / "one.jsonl")}
    go("transfer", run, out=str(tmp_path / "r1"), template="r1", system="Think.", **settings)
    assert len(calls) == 2 and {(call["template"], call["system"]) for call in calls} == {("r1", "Think.")}
    go("transfer", run, out=str(tmp_path / "own"), **settings)  # another template is another measurement
    assert len(calls) == 4 and {(call["template"], call["system"]) for call in calls[2:]} == {(None, None)}


def test_compose_adds_two_vectors_or_half_of_each(runs, tmp_path, monkeypatch):
    given = {}

    def measure(lab, vectors, label, temperature=None):
        given[label] = vectors
        size = sum(s.norm().item() for s in vectors.values())
        return accuracy(max(0, 90 - round(100 * size)), 100)  # the longer, the worse

    monkeypatch.setattr(analyze.Lab, "accuracy", measure)
    doc = go("compose", runs["a"], runs["b"], runs["all"], out=str(tmp_path), controls=True)
    pair, half = given["3+20"], given["half of 3+20"]
    for layer in (3, 20):
        torch.testing.assert_close(pair[layer], vector(layer, 64, 0.05))
        torch.testing.assert_close(half[layer], vector(layer, 64, 0.05) / 2)
    single = max(doc["conditions"][layer]["value"] for layer in ("3", "20"))
    over = {}
    for kind, name in (("gains", "3+20"), ("halves", "half of 3+20")):
        over[kind] = doc[kind]["3+20"]["over_single"]["value"]
        assert over[kind] == pytest.approx(doc["conditions"][name]["value"] - single)
    assert over["halves"] > over["gains"]


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, runs, tmp_path, monkeypatch, capsys):
    keys, changes = COMMANDS[name]
    if "recipients" in changes:
        changes = changes | {"recipients": tuple(runs.get(r, r) for r in changes["recipients"])}
    out = str(tmp_path / "figures")
    doc = go(name, *(runs[key] for key in keys), out=out, **changes)
    assert doc["reading"] in capsys.readouterr().out
    assert json.loads((tmp_path / "figures" / f"{name}.json").read_text())["found"] == doc
    assert doc["table"][0][0] in (tmp_path / "figures" / f"{name}.md").read_text()
    picture = tmp_path / "figures" / f"{name}.png"
    assert picture.stat().st_size > 5000
    # the same command again loads no model: the key comes from files alone, the figure from the JSON
    picture.unlink()
    monkeypatch.setattr(model, "load", None)
    assert go(name, *(runs[key] for key in keys), out=out, **changes) == doc
    assert picture.is_file()


def test_the_same_settings_compute_nothing(runs, tmp_path, monkeypatch):
    out = str(tmp_path)
    doc = go("lens", runs["a"], out=out)
    assert len(doc["vectors"]["3"]["dot"]) == 10 and doc["command"].startswith("python analyze.py lens")

    def never(lab):
        raise AssertionError("computed again")

    monkeypatch.setitem(analyze.ANALYSES, "lens", analyze.ANALYSES["lens"]._replace(compute=never))
    assert go("lens", runs["a"], out=out) == doc
    for changes in ({"top": 3}, {"seed": 1}, {"n": 3}):
        with pytest.raises(AssertionError, match="computed again"):
            go("lens", runs["a"], out=out, **changes)
    with pytest.raises(AssertionError, match="computed again"):
        go("lens", runs["b"], out=out)


def test_lens_of_many_layers(runs, tmp_path):
    doc = go("lens", runs["all"], out=str(tmp_path))
    assert list(doc["vectors"]) == [str(l) for l in range(28)]
    doc = go("lens", runs["a"], runs["two"], out=str(tmp_path))
    assert list(doc["vectors"]) == ["3", "3,20: 3", "3,20: 20"]


def test_lens_lists_both_ends(runs, tmp_path, tokenizer):
    """Of the dot products and of the cosines: B Sec. 4.2 calls a token suppressed by its cosine."""
    doc = go("lens", runs["a"], out=str(tmp_path), top=4)
    llm, _ = model.load("tiny", "cpu")
    U, s = llm.get_output_embeddings().weight[: len(tokenizer)].double(), vector(3, 64, 0.05).double()
    dot = U @ s
    for kind, x in (("cosine", dot / U.norm(dim=-1) / s.norm()), ("dot", dot)):
        order = x.argsort(descending=True).tolist()
        column = 2 if kind == "cosine" else 1
        for name, ids in ((kind, order[:4]), (f"lowest {kind}", order[::-1][:4])):
            listed = doc["vectors"]["3"][name]
            assert [row[0] for row in listed] == [figures.piece(tokenizer, i) for i in ids]
            assert [row[column] for row in listed] == pytest.approx(x[ids].tolist(), rel=1e-4)
    assert "lowest cosine" in (tmp_path / "lens.md").read_text()


def test_a_kept_checkpoint_goes_into_every_analysis(runs, tmp_path):
    """Beside its run, under a name of its own; what it cost are the steps before it."""
    run = shutil.copytree(runs["a"], tmp_path / "out" / "a")
    kept = run / "checkpoints" / "00001"
    kept.mkdir(parents=True)
    llm, _ = model.load("tiny", "cpu")
    model.save_vectors(kept / "vectors.safetensors", {3: vector(9, 64, 0.05)}, llm, "tiny", 1)
    given = (str(run), str(kept))
    doc = go("lens", *given, out=str(tmp_path / "f"))
    assert list(doc["vectors"]) == ["a", "a/00001"] and doc["vectors"]["a"] != doc["vectors"]["a/00001"]
    doc = go("sites", *given, out=str(tmp_path / "f"))
    assert list(doc["conditions"]) == ["base", "a", "a/00001"]
    assert (tmp_path / "out" / "answers").is_dir() and not (run / "checkpoints" / "answers").exists()
    doc = go("transfer", *given, out=str(tmp_path / "f"), recipients=("tiny",))
    assert doc["donors"] == ["a", "a/00001"]
    assert doc["recipients"]["tiny"]["accuracies"].keys() == {"base", *doc["donors"]}
    doc = go("cost", *given, out=str(tmp_path / "f"))
    assert [doc["runs"][name]["training_seconds"] for name in ("a", "a/00001")] == [7.0, 3.5]
    for name in ("case", "shift", "persistence", "attention", "patch"):
        doc = go(name, str(kept), max_tokens=80 if name == "shift" else 3)
        assert doc["command"].split()[3] == str(kept) and (kept / "figures" / f"{name}.json").is_file()
    analyze.main(analyze.Config("report", (str(tmp_path / "out"),)))
    assert "case: " + str(kept) in (tmp_path / "out" / "report.html").read_text()


def test_prefix_forces_the_very_token(runs, tmp_path, monkeypatch, tokenizer):
    """Of a token that is a part of a character no text gives its id back."""

    def again(i):
        return tokenizer(figures.piece(tokenizer, i), add_special_tokens=False).input_ids

    part = next(i for i in range(len(tokenizer)) if again(i) != [i])
    monkeypatch.setattr(analyze, "shifts_of", lambda lab, run: ([], 1, [(part, 1)]))
    asked, real = [], model.Subject.rollouts

    def rollouts(subject, *args, prefix="", **how):
        found = real(subject, *args, prefix=prefix, **how)
        asked.append((prefix, found))
        return found

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    doc = go("prefix", runs["a"], out=str(tmp_path))
    forced = [found for prefix, found in asked if prefix == [part]]
    assert len(forced) == 2 and doc["token"] == figures.piece(tokenizer, part)
    for found in forced:
        for prompt, completion, text in zip(found.prompts, found.completions, found.texts):
            assert prompt[-1] == part and text == tokenizer.decode([part, *completion], skip_special_tokens=True)
    go("prefix", runs["a"], out=str(tmp_path), token="So")  # a text of one's own
    assert [found.prompts[0][-1:] for prefix, found in asked if prefix == "So"] == [tokenizer("So").input_ids] * 2


def test_report(runs, tmp_path):
    folder = tmp_path / "out"
    go("lens", runs["a"], out=str(folder / "a" / "figures"))
    go("cost", runs["a"], runs["all"], out=str(folder / "figures"))
    go("sites", runs["a"], out=str(folder / "figures"))
    (folder / "figures" / "other.json").write_text("[1]")  # not ours
    analyze.main(analyze.Config("report", (str(folder),)))
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # sites: the paper's, too
    assert "In the paper, Qwen2.5-Math-7B" in page
    for key in ("P4.setup", "P4.text", "P1.text", "B.text", "B.table6"):
        assert page.count(f"The paper: {html.escape(paper.PAPER[key]['title'])} (") >= 1, key
    text = page.split("The papers: settings, and numbers in their text")[1]
    qwen, llama = re.findall(r"<tr>.*?trained_after_attention_pct.*?</tr>", text)  # P4 Sec. 6
    assert re.findall(r"<td>(.*?)</td>", qwen)[1:] == ["Qwen/Qwen2.5-Math-7B", "38.8", "Sec. 6", "0.6"]
    assert re.findall(r"<td>(.*?)</td>", llama)[1:] == ["meta-llama/Llama-3.1-8B-Instruct", "19.9", "Sec. 6", "0.1"]
    contents = page.split("<ol>")[1].split("</ol>")[0]  # begins with what is on the page and found
    assert contents.count("<li>") == 3 and "the largest cosine is" in contents
    assert "http" not in page.replace("arxiv", "")
    assert "Logit lens of the last layer" in page and "42.5" in page  # the paper's numbers
    assert "python analyze.py sites" in page and "seed 0" in page and "<script" not in page


def test_cost_shows_what_was_measured(runs, tmp_path):
    """Seconds of all steps without the update's, which are part of training; accuracies as evaluate.py wrote them."""
    run = tmp_path / "a"
    shutil.copytree(runs["a"], run)
    made = []
    for temperature, a in ((1.0, 0.5), (0.0, 0.9)):
        steered = {"value": a, "interval_95": [a - 0.03, a + 0.02], "problems": 9}
        made.append({"benchmark": "tiny", "temperature": temperature, "steered": steered})
    (run / "eval.json").write_text(json.dumps(made))
    doc = go("cost", str(run), runs["all"], out=str(tmp_path / "figures"))
    found = doc["runs"]["a"]
    assert (found["training_seconds"], found["update_seconds"], found["optimizer_bytes"]) == (7.0, 0.5, 512)
    head, rows = doc["table"]
    assert head[:4] == ["run", "tiny, T = 1, n = 9 %", "tiny, greedy, n = 9 %", "trained numbers"]
    assert rows[0][:6] == ["a", "50.0 [47.0, 52.0]", "90.0 [87.0, 92.0]", "64", "0.5 kB", "7 s"]
    assert rows[1][:4] == ["all", "", "", "1,792"] and "28 times as many" in doc["reading"]


def test_the_ladder_shows_accuracy_against_trained_numbers(tmp_path):
    """By hand: two seeds of 4 numbers beside each other, all weights; greedy has one run and no panel."""
    rows = [("14, 4 numbers", 4, 0.5), ("all weights", 1_444_672, 0.9), ("14, 4 numbers", 4, 0.6), ("27", 64, None)]
    found = {"runs": {}, "about": "tiny", "table": (["run"], [["a"]])}
    for i, (label, n, value) in enumerate(rows):
        one = {"value": value, "interval_95": [(value or 0) - 0.1, (value or 0) + 0.05], "base": {"value": 0.2}}
        right = {"T = 1": one, "greedy": one} if i == 1 else {"T = 1": one} if value else {}
        found["runs"][str(i)] = {"trained_parameters": n, "label": label, "right": right}
    (panel,) = figures.FIGURES["cost"](found)["panels"]
    few, every = panel["series"]
    assert (few["label"], few["x"], every["x"]) == ("layer 14, 4 numbers", [4, 4 * 1.12], [1_444_672])
    assert (few["y"], few["low"], few["high"]) == ([50, 60], [40, 50], pytest.approx([55, 65]))
    assert panel["ticks"] == {4: "4", 1_444_672: "1.4 M"} and panel["flat"][0]["y"] == 20
    figures.draw("cost", found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    found["runs"] = {"3": found["runs"]["3"]}
    assert figures.FIGURES["cost"](found)["panels"][0]["form"] == "table"


ERRORS = {
    "vLLM under hooks": (("patch", "a"), {"sampler": "vllm", "sample_heads": True}, "--sampler vllm: patch samples"),
    "vLLM beside copies": (("attention", "a"), {"sampler": "vllm"}, "--sampler vllm: attention samples"),
    "no run given": (("lens",), {}, "lens wants 1 or more run folders, got 0"),
    "no such run": (("lens", "nowhere"), {}, "no run in nowhere"),
    "two runs": (("shift", "a", "b"), {}, "shift wants 1 run folders, got 2"),
    "a run with many vectors": (("persistence", "a", "two"), {}, "persistence wants runs with one vector"),
    "one layer twice": (("persistence", "b", "site"), {}, "both have 20"),
    "one run to compare": (("similarity", "a"), {}, "similarity wants 2 or more run folders, got 1"),
    "no all-layer run": (("compose", "a", "b", "site"), {}, "both have 20"),
    "no run of all layers": (("compose", "a", "b", "lone"), {}, "all-layer run"),
    "no single layer": (("sweep", "all", "full"), {}, "single layer"),
    "two of all weights": (("sweep", "a", "full", "full"), {}, "at most one"),
    "only all weights": (("sweep", "full"), {}, "a vector at a single layer"),
    "lens of all weights": (("lens", "full"), {}, "all weights and no vectors"),
    "all weights over GPUs": (("sweep", "a", "full"), {"tensor_parallel": 2}, "--tensor-parallel"),
    "one vector": (("ablate", "a"), {}, "several vectors"),
    "no LoRA": (("scale", "a"), {}, "--method lora --rank 1"),
    "no cost": (("cost", "b"), {}, "has no state.pt"),
    "no recipients": (("transfer", "a"), {}, "--recipients"),
    "recipients elsewhere": (("lens", "a"), {"recipients": ("tiny",)}, "--recipients"),
    "no problems": (("lens", "a"), {"n": 0}, "--n wants at least 1"),
    "cold": (("lens", "a"), {"temperature": -1.0}, "--temperature"),
    "a vector elsewhere": (("lens", "q_proj"), {}, "as wide as the residual stream"),
    "no such analysis": (("lense", "a"), {}, "no analysis 'lense'"),
    "LoRA": (("sweep", "lora"), {}, "sweep wants vectors"),
    "benchmarks of one file": (("shift", "a"), {"benchmarks": ("all",)}, "shift reads answers to one file"),
    "two sources": (("sites", "a"), {"data": "x", "benchmarks": ("all",)}, "either --benchmarks or --data"),
    "nothing ended": (("shift", "a"), {"max_tokens": 1}, "ended by itself"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error, runs, tmp_path):
    (name, *keys), changes, wanted = ERRORS[error]
    with pytest.raises(SystemExit) as stopped:
        go(name, *(runs.get(key, key) for key in keys), out=str(tmp_path), **changes)
    assert wanted in str(stopped.value) and "\n" not in str(stopped.value)


def test_the_papers_numbers_are_drawn_by_the_same_functions(tmp_path):
    """Cells as they stand in the papers, at least one from each table that a figure is made of."""
    found = {(name, who[:4]): doc for name in analyze.ANALYSES for who, doc in paper.numbers_of(name).items()}
    assert len(found) == 10

    def shown(rows, *names):
        return [round(100 * rows[name]["value"], 1) for name in names]

    qwen, llama = (found["sweep", who]["by_decoding"] for who in ("Qwen", "Llam"))
    assert shown(qwen["T = 1"], "base", "16", "27", "all", "full") == [14.3, 40.1, 29.4, 42.9, 43.8]
    assert shown(qwen["greedy"], "base", "27", "full") == [24.8, 38.7, 46.0]
    assert qwen["T = 1"]["27"]["interval_95"] == pytest.approx([0.290, 0.298])
    assert shown(llama["T = 1"], "base", "31", "all", "full") == [11.7, 14.7, 25.8, 26.4]
    assert shown(llama["greedy"], "base", "31") == [21.5, 21.6] and "all" not in llama["greedy"]
    assert found["sweep", "Llam"]["layers"] == list(range(32))
    travel = found["persistence", "Qwen"]["by_layer"]["1"]
    assert travel["layers"] == list(range(1, 28))
    assert travel["diff_diff_authors"][25 - 1]["value"] == 0.29 and travel["diff_vector"][1]["value"] == 0.33
    assert found["persistence", "Llam"]["by_layer"]["0"]["diff_diff_authors"][11]["value"] == 0.24
    qwen = found["prefix", "Qwen"]["by_decoding"]["greedy"]
    assert shown(qwen, "base", 'base + "To"', "vector") == [24.8, 35.5, 38.7]
    assert shown(found["prefix", "Llam"]["by_decoding"]["T = 1"], 'base + "Step"') == [13.4]
    assert shown(found["sites", "Qwen"]["conditions"], "base", "layer 25, after attention") == [14.3, 36.2]
    assert shown(found["sites", "Qwen"]["conditions"], "layer 27, after attention") == [38.8]  # P4 Sec. 6
    assert shown(found["orthogonal", "Qwen"]["conditions"], "14", "14, second orthogonal", "15") == [40.0, 23.2, 39.2]
    qwen, llama = (found["compose", who]["gains"] for who in ("Qwen", "Llam"))
    # against v1's own singles, 34.6 and 35.4
    assert qwen["0+4"]["over_single"]["value"] == pytest.approx(0.362 - 0.354)
    assert qwen["0+14"]["share"]["value"] == pytest.approx((41.6 - 40.0) / (42.9 - 40.0))  # 14: lost there, v4's 40.0
    assert "14+25" not in qwen  # lost in the text of the PDF
    assert llama["0+1"]["over_single"]["value"] == pytest.approx(0.173 - 0.219)
    for (name, who), doc in found.items():
        figures.draw(name, doc, tmp_path / f"{name}-{who}.png")
        assert (tmp_path / f"{name}-{who}.png").stat().st_size > 5000


def test_report_of_nothing(tmp_path):
    with pytest.raises(SystemExit, match="no figures under"):
        analyze.main(analyze.Config("report", (str(tmp_path),)))


def test_transfer_refuses_other_sizes(runs, tokenizer, tmp_path):
    other = tmp_path / "other"
    random_llm("qwen2", vocab_size=len(tokenizer)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(SystemExit, match="width 64 and 28 layers; this one has width 32 and 3 layers"):
        go("transfer", runs["a"], out=str(tmp_path / "figures"), recipients=(str(other),))


def test_runs_must_agree(runs, tmp_path):
    shutil.copytree(runs["b"], tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text()) | {"template": "r1"}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="the same template"):
        go("similarity", runs["a"], str(tmp_path / "b"), out=str(tmp_path))
