"""Analyses: each number against a slow or hand-worked one, kept results, errors, pages, and every command once."""

import html
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_llm
from torch.nn.functional import cosine_similarity, normalize

import analyze
import model

FAMILIES = ["qwen2", "llama", "mistral", "gemma2"]
PROMPTS = [[5, 9, 3, 7], [8, 4], [11, 6, 12, 13, 3]]
COMPLETIONS = [[10, 20, 30, 2], [40, 2], [7, 7, 9]]
ROWS = [p + c for p, c in zip(PROMPTS, COMPLETIONS)]


def vector(seed, width=32, size=0.5):
    return size * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def lab_of(llm, vectors, folder, tokenizer=None, **changes):
    """A lab around a random model: three problems whose texts are PROMPTS and COMPLETIONS, a run for each of the vectors."""
    args = analyze.Config("lens", ("run",), **changes)
    runs = [analyze.Run(folder / f"run{i}", {}, v, ",".join(map(str, v))) for i, v in enumerate(vectors)]
    rows = [{"problem": "1+1", "answer": "2"}] * 3
    return analyze.Lab(args, "random", llm, tokenizer, runs, rows, {}, {"model": "random"}, folder)


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(analyze, "rolled_out", lambda *a: [PROMPTS, COMPLETIONS, [True, True, False]])


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


def test_clusters():
    axes = torch.eye(8)[:3]
    rows = torch.stack([axes[i] + 0.1 * vector(10 + n, 8) for n, i in enumerate([0, 1, 0, 2, 0, 1])])
    assert [sorted(group) for group in analyze.clusters(rows, 3)] == [[0, 2, 4], [1, 5], [3]]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_link_by_the_average(seed):
    rows = normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
    groups = [{i} for i in range(20)]
    while len(groups) > 4:  # every mean computed anew
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        i, j = max(pairs, key=lambda ij: (rows[list(groups[ij[0]])] @ rows[list(groups[ij[1]])].T).mean().item())
        groups[i] |= groups.pop(j)
    assert set(map(frozenset, analyze.clusters(rows, 4))) == set(map(frozenset, groups))


def test_piece(tokenizer):
    # characters that no token has as a whole; among them those that byte-level BPE writes differently from Latin-1
    for character in "é\u00a0\u00ad\u0080ÿ€":
        ids = tokenizer(character, add_special_tokens=False).input_ids
        assert "".join(analyze.piece(tokenizer, i) for i in ids) == "".join(f"\\x{byte:02x}" for byte in character.encode())
    assert "".join(analyze.piece(tokenizer, i) for i in tokenizer(" To\n").input_ids) == " To\n"


# --------------------------------------------------------------------------------------------------------------- shift


@pytest.mark.parametrize("family", FAMILIES)
def test_next_tokens(family):
    llm, vectors = random_llm(family), {1: vector(0), 2: vector(1)}
    seen = 0
    for base, steered, rows, positions, tokens in analyze.next_tokens(llm, vectors, PROMPTS, COMPLETIONS, chunk=4):
        for b, s, row, t, token in zip(base, steered, rows.tolist(), positions.tolist(), tokens.tolist()):
            ids = torch.tensor([ROWS[row]])
            at = len(PROMPTS[row]) + t - 1
            torch.testing.assert_close(b, llm(ids).logits[0].softmax(-1)[at], rtol=1e-4, atol=1e-6)
            with model.steer(llm, vectors):
                torch.testing.assert_close(s, llm(ids).logits[0].softmax(-1)[at], rtol=1e-4, atol=1e-6)
            assert token == COMPLETIONS[row][t] and (b - s).abs().max() > 1e-3
            seen += 1
    assert seen == sum(map(len, COMPLETIONS))


def test_largest_shifts(qwen2):
    vectors = {2: vector(0)}
    found = {(row, t): (token, delta) for row, t, token, delta in analyze.largest_shifts(qwen2, vectors, PROMPTS, COMPLETIONS)}
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        ids = torch.tensor([prompt + completion])
        base = qwen2(ids).logits[0].softmax(-1)
        with model.steer(qwen2, vectors):
            delta = qwen2(ids).logits[0].softmax(-1) - base  # (T, V)
        for t in range(len(completion)):
            largest = delta[len(prompt) + t - 1]
            assert found.pop((row, t)) == (largest.argmax().item(), pytest.approx(largest.max().item(), abs=1e-6))
    assert not found


def test_shift_counts_answers_that_ended(qwen2, tokenizer, tmp_path, texts):
    found = analyze.shift(lab_of(qwen2, [{2: vector(0)}], tmp_path, tokenizer))
    assert found["answers"] == 2 and [point["n"] for point in found["by_position"]] == [2, 2, 1, 1]
    largest = analyze.largest_shifts(qwen2, {2: vector(0)}, PROMPTS[:2], COMPLETIONS[:2])
    assert found["by_position"][0]["mean"] == pytest.approx(sum(d for _, t, _, d in largest if t == 0) / 2)
    assert max(box["max"] for box in found["boxes"]) == pytest.approx(max(d for *_, d in largest))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_persistence(family):
    llm, s = random_llm(family), {0: vector(0), 1: vector(1), 2: vector(2)}
    found = analyze.persistence_of(*analyze.shift_sums(llm, {0: s[0]}, ROWS, [0, 1, 2]), {0: s[0], 2: s[2]}, [0, 1, 2])
    for l in range(3):
        deltas = [literal_states(llm, row, {0: s[0]})[l] - literal_states(llm, row, {})[l] for row in ROWS]
        every = torch.cat(deltas)  # (all tokens, D)
        to_mean = cosine_similarity(every, every.mean(0)[None]).mean().item()
        own = sum(cosine_similarity(d, d.mean(0)[None]).mean().item() for d in deltas) / len(deltas)
        assert found["diff_diff"][l] == pytest.approx(to_mean, abs=1e-4)
        assert found["diff_diff_per_text"][l] == pytest.approx(own, abs=1e-4)
        if l != 1:
            to_vector = cosine_similarity(every, s[l][None]).mean().item()
            assert found["diff_vector"][l] == pytest.approx(to_vector, abs=1e-4)
        low, high = found["diff_diff_95"][l]
        assert low <= high <= 1 + 1e-4
    assert found["diff_diff"][0] == pytest.approx(1, abs=1e-4) and found["diff_vector"][0] == pytest.approx(1, abs=1e-4)
    assert found["diff_vector"][1] is None and found["diff_diff"][2] < 0.99


def test_batches_and_padding_change_nothing(qwen2, monkeypatch):
    whole = analyze.shift_sums(qwen2, {0: vector(0)}, ROWS, [1, 2])
    monkeypatch.setattr(analyze, "batches", lambda rows: ([i] for i in range(len(rows))))
    for one, other in zip(whole, analyze.shift_sums(qwen2, {0: vector(0)}, ROWS, [1, 2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_batches():
    assert list(analyze.batches([[0] * n for n in (5, 3, 9, 2, 40)], tokens=20)) == [[0, 1], [2, 3], [4]]


def test_similarity(qwen2, tmp_path, texts):
    vectors = [{0: vector(0)}, {2: vector(2)}, {1: vector(1)}]
    found = analyze.similarity(lab_of(qwen2, vectors, tmp_path))
    assert found["layers"] == [0, 1, 2]
    means = []
    for v in sorted(vectors, key=str):
        means.append(torch.cat([literal_states(qwen2, row, v)[2] - literal_states(qwen2, row, {})[2] for row in ROWS]).mean(0))
    want = normalize(torch.stack(means), dim=-1)
    torch.testing.assert_close(torch.tensor(found["cosine"]), want @ want.T, rtol=1e-4, atol=1e-4)
    assert abs(found["cosine"][0][1]) < 0.99 and found["low"][0][1] <= found["cosine"][0][1] <= found["high"][0][1]


# ---------------------------------------------------------------------------------------------------------- accuracies


def accuracy(right, n=10):
    correct = [[1]] * right + [[0]] * (n - right)
    return {"accuracy": right / n, "correct": correct}


def test_pair_gain():
    gain = analyze.pair_gain(accuracy(50, 100), accuracy(20, 100), accuracy(40, 100), accuracy(60, 100))
    assert gain["share"] == pytest.approx(0.5) and not gain["open"] and not gain["cross"]
    assert gain["interval_95"][0] < 0.5 < gain["interval_95"][1]
    # the better of the two singles counts, whichever it is
    assert analyze.pair_gain(accuracy(50, 100), accuracy(40, 100), accuracy(20, 100), accuracy(60, 100)) == gain
    same = analyze.pair_gain(accuracy(60, 100), accuracy(20, 100), accuracy(40, 100), accuracy(60, 100))
    assert same["cross"] and same["interval_95"] == (1, 1)  # resampled together: one and the same in every draw
    worse = analyze.pair_gain(accuracy(30, 100), accuracy(20, 100), accuracy(40, 100), accuracy(60, 100))
    assert worse["share"] == pytest.approx(-0.5)
    assert gain["over_single"]["accuracy"] == pytest.approx(0.1) and worse["over_single"]["accuracy"] == pytest.approx(-0.1)
    low, high = worse["over_single"]["interval_95"]  # right answers nested as they are: the difference is that of 10 in 100
    assert -0.2 < low < -0.1 < high < 0
    assert analyze.pair_gain(accuracy(5), accuracy(2), accuracy(4), accuracy(4))["share"] is None
    assert analyze.pair_gain(accuracy(5), accuracy(2), accuracy(4), accuracy(5))["open"]
    assert analyze.pair_gain(accuracy(90, 100), accuracy(20, 100), accuracy(80, 100), accuracy(20, 100))["open"]  # upside down


def test_differences_are_paired():
    noisy = {"accuracy": 0.5, "correct": [[0], [1]] * 50}
    assert analyze.minus(noisy, noisy)["interval_95"] == (0, 0)
    other = {"accuracy": 0.5, "correct": [[1], [0]] * 50}
    low, high = analyze.minus(noisy, other)["interval_95"]
    assert low == pytest.approx(-high, abs=0.06) and high > 0.1


def test_random_like():
    s = vector(0)
    noise = analyze.random_like(s, 0, 3)
    assert noise.norm().item() == pytest.approx(s.norm().item()) and torch.equal(noise, analyze.random_like(s, 0, 3))
    long = torch.linspace(-5, 9, 64)
    assert all(abs(cosine_similarity(analyze.random_like(long, seed, 9), long, dim=0)) < 0.6 for seed in range(3))
    assert not torch.equal(noise, analyze.random_like(s, 1, 3)) and not torch.equal(noise, analyze.random_like(s, 0, 4))


def test_moved():
    s = {0: vector(0), 20: vector(1), (27, "o_proj"): vector(2)}
    assert analyze.moved(s, 28) == {14: s[0], 6: s[20], (13, "o_proj"): s[27, "o_proj"]}


def count_rollouts(monkeypatch, fail_at=None):
    calls = []

    def rollouts(llm, tokenizer, vectors, problems, k, **how):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(sorted(vectors))
        return model.Rollouts([[1]] * 3, [[2]] * 3, [True] * 3, ["\\boxed{2}"] * (2 if len(vectors) == 1 else 3) + [""] * 3, None)

    monkeypatch.setattr(model, "rollouts", rollouts)
    monkeypatch.setattr(analyze, "grade", lambda texts, golds: [float("2" in text) for text in texts[:3]])
    return calls


def test_an_interruption_keeps_what_was_measured(qwen2, tmp_path, monkeypatch):
    lab = lab_of(qwen2, [{0: vector(0), 1: vector(1), 2: vector(2)}], tmp_path)
    calls = count_rollouts(monkeypatch, fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        analyze.ablate(lab)
    calls = count_rollouts(monkeypatch)
    found = analyze.ablate(lab)
    assert len(calls) == 8 - 3  # all, base, three without, three alone
    assert found["conditions"]["only 1"]["accuracy"] == pytest.approx(2 / 3)
    assert found["conditions"]["without 1"]["accuracy"] == 1
    assert [0, 2] in calls and [1] in calls
    assert analyze.ablate(lab) == found and len(calls) == 5  # and now nothing is measured again
    other = lab._replace(runs=[lab.runs[0]._replace(vectors={0: vector(0), 1: vector(7), 2: vector(2)})])
    analyze.ablate(other)
    assert len(calls) == 5 + 8 - 4  # base, only 0, only 2 and without 1 have no changed vector
    analyze.ablate(lab._replace(state={"model": "another"}))
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
        vectors |= {(layer, "lora_A"): vector(layer, 40)[None], (layer, "lora_B"): vector(layer + 5, 32)[:, None]}
    got = analyze.token_scales(qwen2, vectors, ROWS)
    qwen2.model.layers[1].mlp.down_proj.weight.data += vectors[1, "lora_B"] @ vectors[1, "lora_A"]  # the same as one matrix
    for layer in (1, 2):
        assert [len(sizes) for sizes in got[layer]] == [len(row) for row in ROWS]
        for row, sizes in zip(ROWS, got[layer]):
            inputs = []
            down = model.decoder_layers(qwen2)[layer].mlp.down_proj
            handle = down.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0][0]))
            qwen2(torch.tensor([row]))
            handle.remove()
            want = vectors[layer, "lora_B"].norm() * (inputs[0] * vectors[layer, "lora_A"][0]).sum(-1)
            torch.testing.assert_close(torch.tensor(sizes), want, rtol=1e-3, atol=1e-3)
            assert want.abs().max() > 0.1


def test_token_span_escapes():
    token = {"text": '<script>"&\n', "base": 0.5, "steered": 0.25, "most": "<b>", "differs": True}
    span = analyze.token_span(token | {"top_base": [["'\"<i>", 0.5]], "top_steered": [["x", 0.25]]})
    assert "<script" not in span and "<b>" not in span and "<i>" not in span
    assert "↵\n</span>" in span and "class=differs" in span and "178,24,43,0.25" in span
    attribute = span.split('title="')[1].split('"')[0]  # the tooltip ends where it should: no quote inside
    assert "grows most" in attribute and '"<b>"' in html.unescape(attribute)


def test_lines_of():
    lines = analyze.lines_of([("a" * 60, 0, False), ("b" * 60, 0, False), ("c\n\n", 0, False), ("d", 0, False)])
    assert [[(column, text) for column, text, *_ in line] for line in lines] == [
        [(0, "a" * 60)], [(0, "b" * 60), (60, "c↵↵")], [], [(0, "d")]
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- every command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of the embedded model with vectors that nobody trained."""
    folder = tmp_path_factory.mktemp("out")
    llm, _ = model.load("tiny", "cpu")

    def run(name, layers, **config):
        (folder / name).mkdir()
        settings = {"layer": ",".join(map(str, layers)), "model": "tiny", "max_tokens": 80, "context": 512} | config
        (folder / name / "config.json").write_text(json.dumps(settings))
        vectors = {layer: vector(layer, 64, 0.05) for layer in layers}
        model.save_vectors(folder / name / "vectors.safetensors", vectors, llm, settings["model"], 0)
        return str(folder / name)

    made = {"a": run("a", [3]), "b": run("b", [20]), "two": run("two", [3, 20]), "all": run("all", range(28), layer="all")}
    made["site"] = run("site", [20], orthogonal_to=["out/b"])
    for name in ("a", "all"):
        costs = {"method": "vector", "trained_parameters": 64 if name == "a" else 1792, "optimizer_bytes": 512,
                 "update_seconds": 0.5, "sync_seconds": 0.001, "sampler": "hf"}  # fmt: skip
        (folder / name / "cost.json").write_text(json.dumps(costs))
    inner = llm.config.intermediate_size
    lora = {(20, "lora_A"): vector(1, inner, 0.05)[None], (20, "lora_B"): vector(2, 64)[:, None]}
    made["lora"] = run("lora", [20])
    model.save_vectors(folder / "lora" / "vectors.safetensors", lora, llm, "tiny", 0)
    made["copy"] = str(folder / "copy-of-tiny")
    shutil.copytree(model.TINY, made["copy"], ignore=shutil.ignore_patterns("*.py", "*.md", "*.jsonl", "*.png"))
    made["full"] = run("full", [], method="full", layer="27")
    (folder / "full" / "vectors.safetensors").unlink()
    (folder / "full" / "weights").mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(model.TINY / file, folder / "full" / "weights")
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
    "case": (["a"], {"cases": 2}),
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


def test_every_analysis_has_a_command():
    assert set(COMMANDS) == set(analyze.ANALYSES) == set(analyze.Name.__args__) - {"report"}


class Engine:
    """Stands for vLLM: started with a model's weights, later given others."""

    def __init__(self, llm):
        self.started, self.pushed = model.fingerprint(llm), []

    def push_weights(self, llm):
        self.pushed.append(model.fingerprint(llm))


def test_sweep_measures_a_run_of_all_weights_in_their_place(runs, tmp_path, monkeypatch):
    seen, rollouts, engines = [], model.rollouts, []

    def watched(llm, *args, **how):
        seen.append(model.fingerprint(llm))
        return rollouts(llm, *args, **how | {"engine": None})

    def start(sampler, name, llm, *args):
        engines.append(Engine(llm))
        return engines[-1]

    monkeypatch.setattr(model, "rollouts", watched)
    go("sweep", runs["a"], runs["full"], out=str(tmp_path / "hf"))
    own, other = (model.fingerprint(model.load(name, "cpu")[0]) for name in ("tiny", runs["full"] + "/weights"))
    assert own != other and seen == [own] * 4 + [other] * 2  # base and layer 3 at T = 1 and greedy, then all weights
    # an engine, too, starts with the base model's weights, also when only the other ones are still to be measured
    monkeypatch.setattr(model, "choose_sampler", lambda *args: "vllm")
    monkeypatch.setattr(model, "open_engine", start)
    go("sweep", runs["a"], out=str(tmp_path / "vllm"))
    seen.clear()
    doc = go("sweep", runs["a"], runs["full"], out=str(tmp_path / "vllm"))
    assert seen == [other] * 2 and [engine.started for engine in engines] == [own] * 2
    assert [engine.pushed for engine in engines] == [[], [other]]
    # measured once; another file is another run
    seen.clear()
    assert go("sweep", runs["a"], runs["full"], out=str(tmp_path / "vllm")) == doc and not seen
    (file,) = Path(runs["full"], "weights").glob("*.safetensors")
    os.utime(file, (0, 0))
    go("sweep", runs["a"], runs["full"], out=str(tmp_path / "vllm"))
    assert seen == [other] * 2


def test_compose_adds_two_vectors_or_half_of_each(runs, tmp_path, monkeypatch):
    given = {}

    def answers(lab, vectors, temperature, bar):
        given[bar] = vectors
        size = sum(s.norm().item() for s in vectors.values())
        return analyze.accuracy_of(accuracy(max(0, 90 - round(100 * size)), 100)["correct"])  # the longer, the worse

    monkeypatch.setattr(analyze, "answers", answers)
    doc = go("compose", runs["a"], runs["b"], runs["all"], out=str(tmp_path), controls=True)
    pair, half = given["layers 3+20"], given["layers half of 3+20"]
    for layer in (3, 20):
        torch.testing.assert_close(pair[layer], vector(layer, 64, 0.05))
        torch.testing.assert_close(half[layer], vector(layer, 64, 0.05) / 2)
    single = max(doc["found"]["conditions"][layer]["accuracy"] for layer in ("3", "20"))
    for gain, name in ((doc["found"]["gains"]["3+20"], "3+20"), (doc["found"]["halves"]["3+20"], "half of 3+20")):
        assert gain["over_single"]["accuracy"] == pytest.approx(doc["found"]["conditions"][name]["accuracy"] - single)
    assert doc["found"]["halves"]["3+20"]["over_single"]["accuracy"] > doc["found"]["gains"]["3+20"]["over_single"]["accuracy"]


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name, runs, tmp_path, monkeypatch, capsys):
    keys, changes = COMMANDS[name]
    if "recipients" in changes:
        changes = changes | {"recipients": tuple(runs.get(r, r) for r in changes["recipients"])}
    out = str(tmp_path / "figures")
    doc = go(name, *(runs[key] for key in keys), out=out, **changes)
    assert doc["reading"] in capsys.readouterr().out
    assert json.loads((tmp_path / "figures" / f"{name}.json").read_text()) == doc
    picture = tmp_path / "figures" / f"{name}.png"
    assert picture.stat().st_size > 5000
    # the figure comes from the JSON alone: no model, no computation
    picture.unlink()
    monkeypatch.setattr(model, "load", None)
    go(name, *(runs[key] for key in keys), out=out, draw=True, **changes)
    assert picture.is_file()


def test_the_same_settings_compute_nothing(runs, tmp_path, monkeypatch):
    out = str(tmp_path)
    doc = go("lens", runs["a"], out=out)
    assert len(doc["found"]["vectors"]["3"]["dot"]) == 10 and doc["command"].startswith("python analyze.py lens")

    def never(lab):
        raise AssertionError("computed again")

    monkeypatch.setitem(analyze.ANALYSES, "lens", (never, analyze.plot_lens))
    assert go("lens", runs["a"], out=out) == doc
    for changes in ({"top": 3}, {"seed": 1}, {"n": 3}):
        with pytest.raises(AssertionError, match="computed again"):
            go("lens", runs["a"], out=out, **changes)
    with pytest.raises(AssertionError, match="computed again"):
        go("lens", runs["b"], out=out)


def test_lens_of_many_layers(runs, tmp_path):
    doc = go("lens", runs["all"], out=str(tmp_path))
    assert list(doc["found"]["vectors"]) == [str(l) for l in range(28)]
    doc = go("lens", runs["a"], runs["two"], out=str(tmp_path))
    assert list(doc["found"]["vectors"]) == ["3", "3,20: 3", "3,20: 20"]


def test_report(runs, tmp_path):
    folder = tmp_path / "out"
    go("lens", runs["a"], out=str(folder / "a" / "figures"))
    go("cost", runs["a"], runs["all"], out=str(folder / "figures"))
    go("sites", runs["a"], out=str(folder / "figures"))
    (folder / "figures" / "other.json").write_text("[1]")  # not ours
    analyze.main(analyze.Config("report", (str(folder),)))
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "In the paper, Qwen2.5-Math-7B" in page  # sites: the paper's figure, too
    assert "http" not in page.replace("arxiv", "")
    assert "Logit lens of the last layer" in page and "42.5" in page  # the paper's numbers
    assert "python analyze.py sites" in page and "seed 0" in page and "<script" not in page


def test_cost_shows_what_was_measured(runs, tmp_path):
    """Seconds of all steps without the update's, which are part of training; accuracies as evaluate.py wrote them."""
    run = tmp_path / "a"
    shutil.copytree(runs["a"], run)
    steps = [{"seconds_sampling": 2.0, "seconds_grading": 0.5, "seconds_training": 1.0, "seconds_update": 0.25}] * 2
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    made = [
        {"benchmark": "tiny", "temperature": t, "steered": {"accuracy": a, "interval_95": [a - 0.03, a + 0.02], "problems": 9}}
        for t, a in ((1.0, 0.5), (0.0, 0.9))
    ]
    (run / "eval.json").write_text(json.dumps(made))
    doc = go("cost", str(run), runs["all"], out=str(tmp_path / "figures"))
    assert doc["found"]["runs"][str(run)]["training_seconds"] == 7.0
    lines = (tmp_path / "figures" / "cost.md").read_text().splitlines()
    assert lines[0].split(" | ")[:4] == ["| run", "tiny, T = 1, n = 9", "tiny, greedy, n = 9", "trained parameters"]
    rows = analyze.numbers(doc["found"])
    assert [row["value"] for row in rows] == ["50.0 [47.0, 52.0] %", "90.0 [87.0, 92.0] %"]  # no differences
    assert lines[2].startswith("| a | 50.0 [47.0, 52.0] % | 90.0 [87.0, 92.0] % | 64 | 0.5 kB | 7 s |")
    assert lines[3].startswith("| all |  |  | 1,792 |")


ERRORS = {
    "vLLM under hooks": (("patch", "a"), {"sampler": "vllm"}, "hooks into a block"),
    "no run given": (("lens",), {}, "wants run folders"),
    "no such run": (("lens", "nowhere"), {}, "no run in nowhere"),
    "two runs": (("shift", "a", "b"), {}, "shift wants one run, got 2"),
    "a run with many vectors": (("persistence", "a", "two"), {}, "persistence wants runs with one vector"),
    "one layer twice": (("persistence", "b", "site"), {}, "both have 20"),
    "one run to compare": (("similarity", "a"), {}, "two or more"),
    "no all-layer run": (("compose", "a", "b"), {}, "all-layer run"),
    "no single layer": (("sweep", "all", "full"), {}, "single layer"),
    "two of all weights": (("sweep", "a", "full", "full"), {}, "at most one"),
    "only all weights": (("sweep", "full"), {}, "single-layer runs"),
    "lens of all weights": (("lens", "full"), {}, "no vectors"),
    "all weights over GPUs": (("sweep", "a", "full"), {"tensor_parallel": 2}, "--tensor-parallel"),
    "one vector": (("ablate", "a"), {}, "several vectors"),
    "no LoRA": (("scale", "a"), {}, "--method lora --rank 1"),
    "no cost": (("cost", "b"), {}, "no cost.json"),
    "no recipients": (("transfer", "a"), {}, "--recipients"),
    "recipients elsewhere": (("lens", "a"), {"recipients": ("tiny",)}, "--recipients"),
    "no problems": (("lens", "a"), {"n": 0}, "--n wants at least 1"),
    "cold": (("lens", "a"), {"temperature": -1.0}, "--temperature"),
    "nothing to draw": (("lens", "a"), {"draw": True}, "--draw"),
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
    paper = json.loads((analyze.DATA / "paper.json").read_text())
    both = [(name, doc) for name in analyze.ANALYSES for doc in analyze.paper_docs(name, paper)]
    docs = {(name, doc["settings"]["model"][:4]): doc["found"] for name, doc in both}
    assert len(docs) == 10 and {name for name, _ in docs} == set(analyze.PAPER_FIGURES)

    def shown(rows, *names):
        return [round(100 * rows[name]["accuracy"], 1) for name in names]

    qwen, llama = (docs["sweep", who]["by_decoding"] for who in ("Qwen", "Llam"))
    assert shown(qwen["T = 1"], "base", "16", "27", "all", "full") == [14.3, 40.1, 29.4, 42.9, 43.8]
    assert shown(qwen["greedy"], "base", "27", "full") == [24.8, 38.7, 46.0]
    assert qwen["T = 1"]["27"]["interval_95"] == pytest.approx([0.290, 0.298])
    assert shown(llama["T = 1"], "base", "31", "all", "full") == [11.7, 14.7, 25.8, 26.4]
    assert shown(llama["greedy"], "base", "31") == [21.5, 21.6] and "all" not in llama["greedy"]
    assert docs["sweep", "Llam"]["layers"] == list(range(32))
    travel = docs["persistence", "Qwen"]["by_layer"]["1"]
    assert travel["layers"] == list(range(1, 28)) and travel["diff_diff"][25 - 1] == 0.29 and travel["diff_vector"][1] == 0.33
    assert docs["persistence", "Llam"]["by_layer"]["0"]["diff_diff"][11] == 0.24
    assert shown(docs["prefix", "Qwen"]["by_decoding"]["greedy"], "base", 'base + "To"', "vector") == [24.8, 35.5, 38.7]
    assert shown(docs["prefix", "Llam"]["by_decoding"]["T = 1"], 'base + "Step"') == [13.4]
    assert shown(docs["sites", "Qwen"]["conditions"], "base", "layer 25, after attention") == [14.3, 36.2]
    assert shown(docs["orthogonal", "Qwen"]["conditions"], "14", "14, second orthogonal", "15") == [40.0, 23.2, 39.2]
    qwen, llama = (docs["compose", who]["gains"] for who in ("Qwen", "Llam"))
    assert qwen["0+4"]["over_single"]["accuracy"] == pytest.approx(0.362 - 0.354)  # against v1's own singles, 34.6 and 35.4
    assert qwen["0+14"]["share"] == pytest.approx((41.6 - 40.0) / (42.9 - 40.0))  # 14 is lost on the diagonal: v4's 40.0
    assert "14+25" not in qwen  # lost in the text of the PDF
    assert llama["0+1"]["over_single"]["accuracy"] == pytest.approx(0.173 - 0.219)
    for name, doc in both:
        analyze.ANALYSES[name][1](doc, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").is_file()


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
