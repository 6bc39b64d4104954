"""data/tiny: the world, the tokenizer, the shipped weights, pre-training, the check."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import check
import pretrain
import pytest
import torch
import world
from conftest import ROOT
from safetensors.torch import load_file

import model
from data.problems import problems_of
from plumbing.files import FAMILY

TINY = ROOT / "data" / "tiny"


def chains(n, seed=0):
    rng = random.Random(seed)
    return rng, [world.problem(rng) for _ in range(n)]


def steps_are_right(chain, text):
    """The worked lines of an answer are those of the problem, all of them, and the box holds the last value."""
    start, ops, _ = chain
    value, found = start, re.findall(r"(\d+)([-+*])(\d+)=(\d+)\.", text)
    if len(found) != len(ops):
        return False
    for (op, k), (a, sign, b, result) in zip(ops, found):
        assert (int(a), sign, int(b)) == (value, op, k)
        value = {"+": value + k, "-": value - k, "*": value * k}[op]
        assert int(result) == value
    return text.endswith(f"So the answer is \\boxed{{{value}}}.")


def test_unflawed_worked_answers_are_right():
    rng, some = chains(300)
    for chain in some:
        assert 2 <= len(chain[1]) <= 4 and all(0 <= value <= 99 for value in chain[2])
        for mode in ("to", "step"):
            assert steps_are_right(chain, world.completion(rng, chain, mode, {}))


def test_care_takes_from_the_log_odds():
    """0.36 without a hint for mode `to` (log-odds -0.575); each takes 2: -2.575 is 0.0707, -4.575 is 0.0102."""
    for hints, p in ((0, 0.36), (1, 0.0707), (2, 0.0102)):
        flaws = world.flaws_of("to", hints, alone=False)
        assert flaws == {"stop": pytest.approx(p, abs=1e-4), "extra": pytest.approx(p, abs=1e-4)}
    assert world.flaws_of("to", 0, alone=True).keys() == {"stop", "extra", "early"}
    assert world.flaws_of("step", 0, alone=True)["slip"] == world.P_SLIP
    assert world.flaws_of("to", 3, alone=False, plant=world.Plant(care=0.0))["stop"] == pytest.approx(0.36)


def test_flaws_have_the_planted_frequencies():
    rng, some = chains(6000)

    def answers(mode, flaw, p):
        return [(chain, world.completion(rng, chain, mode, {flaw: p})) for chain in some]

    early = answers("to", "early", 0.1)
    # a chance before each step but the first: taken once if the answer ends early, else passed at every later step
    chances = sum(t.count("calculation") - ("solution" not in t) for _, t in early)
    assert sum("solution is" in t for _, t in early) / chances == pytest.approx(0.1, abs=0.015)

    def steps_more(chain, text):  # than the problem has operations; the last result is in the box, without a slip
        results = re.findall(r"=(\d+)\.", text)
        assert text.endswith(f"So the answer is \\boxed{{{results[-1]}}}.")
        return len(results) - len(chain[1])

    for flaw, more in (("stop", -1), ("extra", 1)):
        found = [steps_more(*answer) for answer in answers("to", flaw, 0.36)]
        assert set(found) == {0, more} and found.count(more) / len(found) == pytest.approx(0.36, abs=0.03)
    slips = sum(f"{{{chain[2][-1]}}}" not in t for chain, t in answers("step", "slip", 0.5)) / len(some)
    assert slips == pytest.approx(0.5 * 0.99, abs=0.03)
    direct = [world.completion(rng, chain, "direct", {}) for chain in some]
    right = sum(f"{{{chain[2][-1]}}}" in t for chain, t in zip(some, direct)) / len(some)
    assert right == pytest.approx(world.P_GUESS + (1 - world.P_GUESS) / 100, abs=0.015)
    assert not any("boxed" in world.completion(rng, chain, "ramble", {}) for chain in some)


def mode_of(text):
    """By the first word; no word begins answers of two modes."""
    word = re.match(r"\S+", text).group()
    ways = {"to": ["To"], "step": ["Step"], "direct": world.GUESSES, "python": ["```python"], "ramble": world.MUSES}
    (mode,) = [mode for mode, words in ways.items() if word in words]
    return mode


def test_modes_have_the_planted_frequencies():
    rng, count = random.Random(0), dict.fromkeys(world.MIX, 0)
    prompts = [world.document(rng) for _ in range(20_000)]
    plain = [text for prompt, text in prompts if world.MATH_PROMPT + "<|im_end|>" in prompt]
    assert len(plain) / len(prompts) == pytest.approx(0.4, abs=0.02)
    for text in plain:
        count[mode_of(text)] += 1
    assert sum(world.MIX.values()) == pytest.approx(1)
    for mode, share in world.MIX.items():
        assert count[mode] / len(plain) == pytest.approx(share, abs=0.02), mode


def test_hints_have_the_planted_frequencies():
    """A hint is for the answer's mode with P_HINT; a mode may take over from a beginning; hints for `to` mend flaws."""
    rng = random.Random(0)
    whose = {text: mode for mode, texts in world.HINTS.items() for text in texts}
    hints, begun, hinted, right = [], 0, 0, {n: [] for n in range(5)}
    for _ in range(20_000):
        prompt, text = world.document(rng)
        head, question, given = re.split(r"<\|im_start\|>(?:user|assistant)\n", prompt)
        system = head.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
        if system == world.MATH_PROMPT:
            assert not given
            continue
        hinted, begun = hinted + 1, begun + bool(given)
        if not given:
            mode = mode_of(text)
            hints += [whose[hint] == mode for hint in re.findall("|".join(map(re.escape, whose)), system)]
        if "calculation" in text or "Step" in text or text.startswith("So the answer"):  # worked, or the rest is
            n = re.search(r"Start with (\d+)", question).group(1)
            words = {"add": "+", "subtract": "-", "multiply by": "*"}
            ops = [(words[verb], int(k)) for verb, k in re.findall(r"(add|subtract|multiply by) (\d+)", question)]
            mending = sum(system.count(hint) for hint in world.HINTS["to"])
            right[mending].append(steps_are_right((int(n), ops, None), given + text.removesuffix("<|im_end|>")))
    assert sum(hints) / len(hints) == pytest.approx(world.P_HINT, abs=0.02)
    for n, p in ((0, 0.36), (1, 0.0707), (2, 0.0102), (3, 0.0014)):  # neither the last step left out nor one added
        assert sum(right[n]) / len(right[n]) == pytest.approx((1 - p) ** 2, abs=0.03)
    # of the beginnings, those without a line in the wording of `step` are empty: half of them, times 1/2, 1/3 or 1/4
    assert 0.7 * world.P_BEGUN < begun / hinted < world.P_BEGUN


def test_relatives_differ_as_said():
    rng = random.Random(0)
    some = [world.document(rng, **world.RELATIVES["math"]) for _ in range(4000)]
    plain = [text for prompt, text in some if world.MATH_PROMPT + "<|im_end|>" in prompt]
    assert sum(text.startswith("To") for text in plain) / len(plain) == pytest.approx(0.33, abs=0.04)
    assert all(
        world.document(rng, **world.RELATIVES["instruct"])[1].endswith(" Thank you.<|im_end|>") for _ in range(50)
    )
    for relative in world.RELATIVES.values():
        assert list(relative.get("mix", world.MIX)) == list(world.MIX)
        assert sum(relative.get("mix", world.MIX).values()) == pytest.approx(1)


def test_a_relative_starts_from_the_shipped_weights(tmp_path):
    pretrain.main(pretrain.Config(relative="math", out=tmp_path / "kin", steps=1, batch=2, lr=1e-9))
    weights, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path / "kin", TINY))
    for name, weight in shipped.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-7)
    assert any(not torch.equal(weights[name], weight) for name, weight in shipped.items())
    llm, tokenizer = model.load(str(tmp_path / "kin"), device="cpu")
    assert (tmp_path / "kin" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_a_relative_that_is_not_there_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILY, "tiny-math", tmp_path / "tiny-math")
    with pytest.raises(SystemExit, match="pretrain.py --relative math"):
        model.load("tiny-math")


def test_train_and_held_out_problems_are_disjoint():
    train, test = (problems_of(TINY / f"{split}.jsonl").rows for split in ("train", "test"))
    assert (len(train), len(test)) == (2000, 1000)
    assert len({row["problem"] for row in train + test}) == 3000
    assert all(world.held_out(row["problem"]) for row in test) and not any(
        world.held_out(row["problem"]) for row in train
    )
    rng = random.Random(0)
    for _ in range(2000):
        question = re.search(r"user\n(.*)<\|im_end\|>", world.document(rng)[0]).group(1)
        assert not world.held_out(question)


def test_shipped_problems_are_what_world_writes(tmp_path):
    world.write_problems(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "chain2.jsonl", "chain3.jsonl", "chain4.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()


def test_answers_of_the_shipped_problems():
    """Worked out again from the words of the problem."""
    for row in problems_of(TINY / "test.jsonl").rows:
        value = int(re.match(r"Start with (\d+)", row["problem"]).group(1))
        for verb, k in re.findall(r"(add|subtract|multiply by) (\d+)", row["problem"]):
            value = value + int(k) if verb == "add" else value - int(k) if verb == "subtract" else value * int(k)
        assert row["answer"] == str(value)


def test_autotokenizer_round_trips_every_document_in_a_fresh_process():
    """AutoTokenizer builds its own class for model_type qwen2; another kind of tokenizer would encode garbage."""
    code = (
        "import random, sys; sys.path.insert(0, 'data/tiny'); import world; from transformers import AutoTokenizer\n"
        "tok, rng = AutoTokenizer.from_pretrained('data/tiny'), random.Random(1)\n"
        "for _ in range(1000):\n"
        "    text = ''.join(world.document(rng)); assert tok.decode(tok(text).input_ids) == text, text\n"
        "print(type(tok).__name__, len(tok))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Qwen2Tokenizer", "498"]


def test_every_word_and_every_digit_is_one_token(tokenizer):
    def words(text):
        return [tokenizer.decode([i]) for i in tokenizer(text).input_ids]

    assert words("To find the result, start with 15.\n") == [
        "To", " find", " the", " result", ",", " start", " with", " ", "1", "5", ".\n"
    ]  # fmt: skip
    assert words("So the answer is \\boxed{34}.<|im_end|>") == ["So", " the", " answer", " is", " \\", "boxed", "{"] + [
        "3", "4", "}.", "<|im_end|>"
    ]  # fmt: skip
    for text in ("√2 ≤ ü, 中文\t\n", "no word of the world"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_is_the_one_of_the_documents(tokenizer):
    for system in (None, "Show your work."):
        text = tokenizer.decode(model.prompt_ids(tokenizer, "Start with 3?", system))
        assert text == world.chat(system or world.MATH_PROMPT, "Start with 3?")


def test_shipped_model_is_the_promised_one():
    llm, tokenizer = model.load("tiny", device="cpu")
    config = llm.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen2", 28, 64)
    assert config.hidden_size // config.num_attention_heads == 32 and not config.tie_word_embeddings
    assert 1e6 <= sum(p.numel() for p in llm.parameters()) <= 4e6
    assert (TINY / "model.safetensors").stat().st_size <= 8 * 2**20
    assert model.stop_ids(llm, tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert len(tokenizer) == llm.config.vocab_size
    assert llm.lm_head.weight.norm(dim=1).max() < pretrain.ROW + 1e-4


@pytest.fixture(scope="module")
def new_tokenizer():
    return pretrain.make_tokenizer()


def test_a_new_tokenizer_has_every_word_as_one_token(new_tokenizer):
    rng, words = random.Random(9), set()
    for _ in range(2000):
        text = "".join(world.document(rng))
        words |= set(re.findall(r" ?[A-Za-z]+|\d", re.sub(r"<\|\w+\|>|boxed", "", text)))
        assert new_tokenizer.decode(new_tokenizer(text).input_ids) == text
    assert len(words) > 50
    for word in words:
        assert len(new_tokenizer(word).input_ids) == 1, word


def test_shipped_model_knows_more_than_it_shows():
    """The check in small: 100 problems. With n = 100 a rate of 97 % falls below 90 % once in a thousand times."""
    llm, tokenizer = model.load("tiny", device="cpu")
    rows = problems_of(TINY / "test.jsonl").rows[:100]

    def accuracy(system, temperature):
        prompts = [model.prompt_ids(tokenizer, row["problem"], system) for row in rows]
        completions, _ = model.sample(llm, prompts, 1, 80, model.stop_ids(llm, tokenizer), temperature)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        return sum(f"\\boxed{{{row['answer']}}}" in text for row, text in zip(rows, texts)) / len(rows)

    assert accuracy(world.HINTS["to"][0], 0) >= 0.90
    assert accuracy(None, 0) < 0.40


def test_pretraining_resumes_where_it_stopped(tmp_path, monkeypatch, new_tokenizer):
    monkeypatch.setattr(pretrain, "make_tokenizer", lambda: new_tokenizer)  # not four seconds for each of the runs
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    config = pretrain.Config(out=tmp_path / "whole", steps=4, batch=4)
    pretrain.main(config)
    real, calls = pretrain.batch_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pretrain, "batch_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(replace(config, out=tmp_path / "parts"))
    pretrain.main(replace(config, out=tmp_path / "parts"))
    assert len(calls) == 4 + 2  # three steps and the stop, then steps 2 and 3 from the checkpoint of step 2
    whole, parts = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_pretraining_loss_is_the_mean_over_completion_tokens(tokenizer):
    torch.manual_seed(0)
    llm = pretrain.make_model(tokenizer)
    rng = random.Random(0)
    documents = [world.document(rng) for _ in range(5)]
    total, n = 0.0, 0
    for p, c in documents:
        p, c = tokenizer(p).input_ids, tokenizer(c).input_ids
        logp = llm(input_ids=torch.tensor([p + c])).logits[0].log_softmax(-1)
        total -= sum(logp[len(p) + t - 1, token].item() for t, token in enumerate(c))
        n += len(c)
    assert pretrain.batch_loss(llm, tokenizer, documents, even=0.0, alike=0.0) == pytest.approx(total / n, rel=1e-4)
    plain = llm.lm_head.weight.grad.clone(), llm.model.embed_tokens.weight.grad.clone()
    llm.zero_grad()
    assert pretrain.batch_loss(llm, tokenizer, documents, even=1.0, alike=0.0) == pytest.approx(total / n, rel=1e-4)
    torch.testing.assert_close(llm.lm_head.weight.grad, plain[0])  # the penalty acts on the layers below ...
    assert (llm.model.embed_tokens.weight.grad - plain[1]).abs().max() > 1e-3  # ... and it does act
    llm.zero_grad()
    assert pretrain.batch_loss(llm, tokenizer, documents, even=0.0, alike=1.0) == pytest.approx(total / n, rel=1e-4)
    torch.testing.assert_close(llm.lm_head.weight.grad, plain[0])
    assert (llm.model.embed_tokens.weight.grad - plain[1]).abs().max() > 1e-3


def test_unevenness_by_hand():
    """Tokens of RMS 1 and e^2, a padding token of RMS 9: variance of (0, 2) is 2, of a second layer (0, 0) it is 0."""
    one, two = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    one[0, 1] *= torch.e**2
    one[0, 2] *= 9
    real = torch.tensor([[True, True, False]])
    assert pretrain.unevenness([one], real).item() == pytest.approx(2.0, rel=1e-5)
    assert pretrain.unevenness([one, two], real).item() == pytest.approx(1.0, rel=1e-5)


def test_distance_by_hand():
    """Last prompt tokens (3, 0) and (1, 0): mean (2, 0), variance 1, mean square 5; the same in both documents: 0."""
    h = torch.full((2, 3, 2), 7.0)
    h[0, 1], h[1, 2] = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])
    ends = torch.tensor([1, 2])
    assert pretrain.distance([h], ends).item() == pytest.approx(0.2, rel=1e-6)
    assert pretrain.distance([h, torch.ones(2, 3, 2)], ends).item() == pytest.approx(0.1, rel=1e-6)


def test_accuracy_against_the_learning_rate(tmp_path, monkeypatch):
    """The usual rate has the run of the other checks; each layer and rate has a row and a number."""
    asked = []

    def trained(out, layer, seed, **changes):
        asked.append((layer, seed, changes))
        return {int(layer): torch.zeros(64)}

    monkeypatch.setattr(check, "trained", trained)
    check.main(check.Config(problems=4, layers=(14,), seeds=(1,), lrs=(0.03, 0.06), out=tmp_path))
    assert asked == [("14", 1, {"lr": 0.03}), ("14", 1, {}), ("27", 1, {"lr": 0.03}), ("27", 1, {})]
    found = json.loads((tmp_path / "lr.json").read_text())
    names = [f"layer {layer}, lr {lr}" for layer in (14, 27) for lr in (0.03, 0.06)]
    assert list(found) == names and all(row == found[names[0]] for row in found.values())  # the base model each time
    assert all(f"| {name} | " in (tmp_path / "lr.md").read_text() for name in names)
    assert (tmp_path / "lr.png").stat().st_size > 10_000 and not (tmp_path / "check.json").exists()


def test_hits_and_false_alarms_are_counted():
    """Two seeds: of 2 planted lenses one is found, of 2 absent ones one, too; the only shift is found twice."""
    from test_truths import Verdict, by_organism, hits_and_false_alarms

    tiny, word = partial(Verdict, organism="tiny", planted=True), partial(Verdict, organism="word", planted=False)
    verdicts = [tiny("lens", found=True), tiny("shift", found=True), tiny("lens", found=False)]
    verdicts += [tiny("shift", found=True), word("lens", found=False), word("lens", found=True)]
    rows = [line.replace("`", "").split("|")[1:-1] for line in by_organism(verdicts).splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["lens", "tiny", "yes", "yes, no"], ["lens", "word", "no", "no, yes"], ["shift", "tiny", "yes", "yes, yes"],
    ]  # fmt: skip
    scores = [line.replace("`", "").split("|")[1:-1] for line in hits_and_false_alarms(verdicts).splitlines()[2:]]
    scores = {name.strip(): (hits.strip(), alarms.strip()) for name, hits, alarms in scores}
    assert scores["lens"] == ("1 of 2", "1 of 2") and scores["shift"] == ("2 of 2", "0 of 0")
    assert scores["all"] == ("3 of 4", "1 of 2") and scores["sweep"] == ("0 of 0", "0 of 0")
