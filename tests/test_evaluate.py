"""evaluate.py: what it writes agrees with what the model does."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, random_llm, rollouts

import evaluate
import model
import train
from data import problems as problem_files
from data.problems import PAPERS, problems_of
from evaluate import Estimate
from plumbing import ask
from plumbing.files import TINY
from plumbing.loading import load_config

SIZE = load_config("tiny")
ALL = problems_of(ROOT / "data/tiny/train.jsonl").rows


def make_run(folder, size=1.0):
    """A run folder with a random vector at layer 20, `size` times as large as the residual stream there."""
    llm, _ = model.load("tiny", device="cpu")
    rms = model.residual_rms(llm, [[1, 2, 3, 4]], [20])[20]
    s = size * rms * torch.randn(64, generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_vectors(folder / "vectors.safetensors", {20: s}, llm, "tiny", 1)
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "max_tokens": 30}))
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # answers go to out/answers
    return make_run(tmp_path / "out" / "run")


def config(run, **changes):
    small = dict(run=run and str(run), problems=4, temperatures=(0.0,), device="cpu")
    return evaluate.Config(**(small | changes))


def stored():
    """Kept answers as [(key, answers), ...], by temperature and seed."""
    files = [json.loads(path.read_text()) for path in Path("out/answers").glob("*.json")]
    kept = [(file["key"], file["found"]) for file in files]
    return sorted(kept, key=lambda pair: (pair[0]["temperature"], pair[0]["seed"]))


def test_stored_results_are_graded_by_hand(run):
    """From the completions: the boxed integer is the answer of that row, not of another."""
    run = make_run(run, size=0.1)
    settings = dict(problems=12, samples=3, seeds=(0, 1), prefix="To", max_tokens=80, temperatures=(1.0, 0.0))
    found = evaluate.main(config(run, base=False, **settings))
    greedy, first, second = stored()
    got = [(key["temperature"], key["seed"], key["samples"]) for key, _ in (greedy, first, second)]
    assert got == [(0.0, 0, 1), (1.0, 0, 3), (1.0, 1, 3)]
    rows = problems_of(ROOT / "data/tiny/test.jsonl").rows[:12]
    vectors, meta = evaluate.vectors_of(run, {"model": "tiny"})
    for key, result in (greedy, first, second):
        assert len(result["correct"]) == len(result["completions"]) == 12
        for row, correct, texts in zip(rows, result["correct"], result["completions"]):
            assert len(correct) == key["samples"]
            assert correct == [int(text.split("boxed{")[-1].startswith(row["answer"] + "}")) for text in texts]
        assert meta["step"] == "1" and key["max_tokens"] == 80
        assert key["vectors"] == evaluate.identity(vectors) != "none"
    first, second = first[1], second[1]
    assert first["completions"] != second["completions"]
    flat = sum(first["correct"] + second["correct"], [])
    assert 0 < sum(flat) < len(flat) == 72  # or a permutation could not be seen
    assert found["test", 1.0]["steered"]["accuracy"].value == pytest.approx(sum(flat) / 72)
    assert found["test", 1.0]["steered"]["samples"] == 6


def test_run_is_steered_and_base_is_not(run):
    evaluate.main(config(run))
    by_vectors = {key["vectors"]: found for key, found in stored()}
    base = by_vectors.pop("none")
    (steered,) = by_vectors.values()
    assert steered["completions"] != base["completions"]
    llm, tokenizer = model.load("tiny", device="cpu")
    problems = [row["problem"] for row in problems_of(ROOT / "data/tiny/test.jsonl").rows[:4]]
    assert [texts[0] for texts in base["completions"]] == rollouts(llm, tokenizer, {}, problems, 1, 30, 0).texts


def test_nothing_is_computed_twice_and_an_interruption_keeps_what_is_done(run, monkeypatch):
    calls, real = [], model.Subject.rollouts

    def counted(self, vectors, rows, k, **how):
        seed = next(s for s in (0, 1) if how["seed"][0] in model.prompt_seeds(s, range(9)))
        calls.append((how["temperature"], seed, len(rows)))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, vectors, rows, k, **how)

    monkeypatch.setattr(model.Subject, "rollouts", counted)
    settings = dict(base=False, temperatures=(1.0,), seeds=(0, 1))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config(run, **settings))
    evaluate.main(config(run, **settings))
    assert calls == [(1.0, 0, 4), (1.0, 1, 4), (1.0, 1, 4)]  # seed 0 once only
    four = evaluate.main(config(run, **settings))["test", 1.0]["steered"]
    three = evaluate.main(config(run, **(settings | {"problems": 3})))["test", 1.0]["steered"]  # the first of the four
    assert len(calls) == 3 and (three["problems"], four["problems"]) == (3, 4)
    evaluate.main(config(run, **(settings | {"problems": 6})))
    assert calls[3:] == [(1.0, 0, 2), (1.0, 1, 2)]  # the two that were missing
    for changes in ({"prefix": "To"}, {"max_tokens": 9}, {"system": "Use code."}):
        evaluate.main(config(run, **(settings | changes)))
    assert len(calls) == 5 + 3 * 2
    make_run(run, size=0.5)  # the run has other vectors now
    evaluate.main(config(run, **settings))
    assert len(calls) == 13


def test_answers_added_to_kept_ones_are_those_of_one_call(run):
    """A problem's answers depend on its own seed alone."""
    subject = model.Subject(name="tiny", device="cpu", max_tokens=30)
    problems = problems_of(ROOT / "data/tiny/test.jsonl").first(5)
    for n in (2, 5, 3):
        parts = evaluate.answers(subject, {}, problems.first(n), 2, 1.0, seed=4)
        assert {len(part) for part in parts.values()} == {n}
    subject.folder = Path("elsewhere")
    whole = evaluate.answers(subject, {}, problems, 2, 1.0, seed=4)
    assert all(parts[name] == whole[name][:3] for name in whole if name != "seconds")
    asked = [subject.prompt(row) for row in problems.rows]
    assert whole["prompt_ids"] == asked and [len(c) for c in whole["completion_ids"][0]] == whole["lengths"][0]


def test_a_mended_grader_grades_kept_answers_again_and_samples_none(run, monkeypatch):
    """Three kept rows, of which the first two are asked for: only they get new grades, all keep their texts."""
    subject = model.Subject(name="tiny", device="cpu", max_tokens=30)
    problems = problems_of(ROOT / "data/tiny/test.jsonl").first(3)
    before = evaluate.answers(subject, {}, problems, 2, 1.0, prefix="To")
    monkeypatch.setattr(evaluate, "grader", lambda: "another")
    names = lambda texts, golds, form: [f"{gold}: {text}" for text, gold in zip(texts, golds)]  # noqa: E731
    monkeypatch.setattr(evaluate, "grade", names)
    monkeypatch.setattr(model.Subject, "rollouts", None)  # nothing may be sampled
    after = evaluate.answers(subject, {}, problems.first(2), 2, 1.0, prefix="To")
    expected = [
        [f"{row['answer']}: {text}" for text in texts] for row, texts in zip(problems.rows[:2], before["completions"])
    ]
    assert after["correct"] == expected and after["completions"] == before["completions"][:2]
    ((_, found),) = stored()
    assert found["correct"] == expected + before["correct"][2:]
    assert found["grader"] == ["another"] * 2 + before["grader"][2:] and before["grader"][2] != "another"
    monkeypatch.setattr(evaluate, "grade", None)  # once is enough
    assert evaluate.answers(subject, {}, problems.first(2), 2, 1.0, prefix="To") == after


def test_under_r1_the_answer_is_the_content_of_a_tag(run, monkeypatch):
    """A right and a wrong answer in the asked form, then a right one in a box: 1, 0, 0; under native 0, 0, 1."""
    said = ["9 - 2 = 7 </think> <answer> 7 </answer>", "</think> <answer>8</answer>", "It is \\boxed{7}."]
    rows = [{"problem": f"{i}?", "answer": "7", "line": i} for i in range(3)]
    problems = problem_files.Problems("sevens", rows, "0")

    def rollouts(self, vectors, rows, k, **how):
        return model.Rollouts([[1]] * 3, [[2]] * 3, [True] * 3, said, None)

    monkeypatch.setattr(model.Subject, "rollouts", rollouts)
    for template, right in (("r1", [[1], [0], [0]]), ("native", [[0], [0], [1]])):
        subject = model.Subject(name="tiny", device="cpu", template=template)
        found = evaluate.answers(subject, {}, problems)
        assert found["correct"] == right and set(found["form"]) == {subject.form}
        with monkeypatch.context() as changed:
            changed.setattr(evaluate, "grader", lambda: "another")
            assert evaluate.answers(subject, {}, problems)["correct"] == right  # graded again
    subject.tokenizer.chat_template, subject.template = None, None  # a base model, which knows no chat
    assert subject.form == "answer"


def test_small_benchmarks_have_a_mean_and_checkpoints_are_chosen_fairly(tmp_path, capsys):
    """
    Three planted checkpoints: step 2 is best on the test problems, step 4 on training problems that no step drew.

    The counts are made again from the answers; the unseen problems from the order in which training draws them.
    """
    run = tmp_path / "run"
    settings = dict(steps=4, prompts=2, samples=2, reward="random", keep_every=2, eval_problems=0, max_tokens=40)
    train.main(train.Config(out=str(run), device="cpu", **settings))
    kept = {
        step: model.load_vectors(run / "checkpoints" / f"0000{step}" / "vectors.safetensors", SIZE) for step in (2, 4)
    }
    assert [int(meta["step"]) for _, meta in kept.values()] == [2, 4]
    assert not torch.equal(kept[2][0][27], kept[4][0][27])
    last, _ = model.load_vectors(run / "vectors.safetensors", SIZE)
    assert torch.equal(kept[4][0][27], last[27])
    chains = ("tiny/chain2", "tiny/chain4")
    args = config(run, checkpoints=True, benchmarks=chains, temperatures=(1.0,), seeds=(0, 1), problems=6)
    found = evaluate.main(args)
    subject = model.Subject.of_run(evaluate.config_of(run), args, folder=tmp_path / "answers")
    for step, (vectors, _) in kept.items():
        right = []
        for name in chains:
            problems = problems_of(ROOT / f"data/{name}.jsonl").first(6)
            seeds = [evaluate.answers(subject, vectors, problems, 1, 1.0, seed)["correct"] for seed in (0, 1)]
            right.append(sum(sum(row) for rows in seeds for row in rows) / 12)
        assert found["test"][step].value == pytest.approx(sum(right) / 2)
    seen = {row["problem"] for step in range(4) for row in train.batch_of_problems(ALL, 2, step, 0)}
    others = evaluate.unseen(run, evaluate.config_of(run), subject)
    assert len(seen) == 8 and len(others.rows) == 400 and not seen & {row["problem"] for row in others.rows}
    assert set(found["validation"]) == {2, 4} and found["rules"]["last"] == 4
    assert "| step |" in (run / "checkpoints.md").read_text() and "The choice adds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no checkpoints in .*--keep-every N"):
        evaluate.main(config(make_run(tmp_path / "other"), checkpoints=True))


def test_rules_of_choice_by_hand():
    """(steps: right of four) test 2: 3/4, 4: 2/4; unseen 2: 1/4, 4: 3/4. The optimistic choice adds 1/4."""
    rows = {1: [[1], [0], [0], [0]], 2: [[1], [1], [0], [0]], 3: [[1], [1], [1], [0]]}
    test, validation = (
        {2: Estimate.of(rows[3]), 4: Estimate.of(rows[2])},
        {2: Estimate.of(rows[1]), 4: Estimate.of(rows[3])},
    )
    rules = evaluate.chosen(test, validation)
    assert rules == {"last": 4, "best on unseen training problems": 4, "best on the test problems": 2}
    assert evaluate.chosen(test, {}) == {"last": 4, "best on the test problems": 2}


def test_summary_difference_and_average_by_hand():
    def result(correct, tokens=10):
        """Of these tokens all are in the first answer, which is cut off, and sampling took 2 seconds."""
        n, k = len(correct), len(correct[0])
        lengths, ended = [[0] * k for _ in correct], [[True] * k for _ in correct]
        lengths[0][0], ended[0][0] = tokens, False
        texts = [["\\boxed{1}" if right else "It is 1." for right in row] for row in correct]
        found = {"correct": correct, "completions": texts, "lengths": lengths, "ended": ended}
        return found | {"seconds": [2.0 / n] * n, "form": ["box"] * n}

    golds = ["1", "2"]

    # seed means 3/4 and 1/4; by problem 3/4 and 1/4
    got = evaluate.summary([result([[1, 1], [0, 1]]), result([[0, 1], [0, 0]], 30)], golds)
    assert (got["accuracy"].value, got["problems"], got["samples"]) == (0.5, 2, 4)
    assert (got["accuracy"].draws == Estimate.of([[1, 1, 0, 1], [0, 1, 0, 0]]).draws).all()
    assert got["sd_over_seeds"] == pytest.approx(0.25)  # divisor 2, the number of seeds
    other = evaluate.summary([result([[1], [1]]), result([[1], [0]])], golds)  # 1 and 1/2 by seed
    mean = evaluate.average([got, other])  # 7/8 and 3/8
    assert got["by_seed"] == [0.75, 0.25] and mean["sd_over_seeds"] == pytest.approx(0.25)
    assert mean["accuracy"].value == pytest.approx(0.625)
    assert (got["truncated"], got["tokens_mean"], got["tokens_per_second"]) == (2 / 8, 5.0, 10.0)
    assert got["accuracy"].interval == (0.25, 0.75)  # both the worse one, one of each, both the better one

    # right answers have a box: 4 of 8. The last number is 1 everywhere: right for the first problem, boxed or not.
    # of a problem's four answers 3 and 1 are right: two drawn from them are all wrong in 0 of 6 and in 3 of 6 cases
    assert (got["has_answer"], got["last_number"].value, got["pass_at_k"].value) == (0.5, 0.5, (1 + 0.5) / 2)
    assert got["last_number"].interval == (0, 1) and got["pass_at_k"].interval == (0.5, 1)
    assert evaluate.pass_at(1, [1, 0, 0, 0]) == 0.25 and evaluate.pass_at(3, [1, 0, 0, 0]) == 0.75
    assert other["pass_at_k"] is None  # of one answer it is the accuracy
    words = evaluate.summary([result([[1], [0]])], ["1", "east"])
    assert words["last_number"].value == 1 and len(set(words["last_number"].draws)) == 1  # one answer is a number
    assert evaluate.summary([result([[1]])], ["east"])["last_number"] is None

    # the same gain on every problem: no doubt about the difference, however far the problems are apart
    steered, base = (evaluate.summary([result(rows)], golds) for rows in ([[1, 1], [1, 0]], [[1, 0], [0, 0]]))
    gain = steered["accuracy"] - base["accuracy"]
    assert gain.value == 0.5 and gain.interval == (0.5, 0.5)

    # benchmarks weigh the same: (0.5 + 1) / 2, though one has a hundred times the problems
    one, many = (evaluate.summary([result(rows)], ["1"] * len(rows)) for rows in ([[0], [1]], [[1]] * 200))
    both = Estimate.mean([one["accuracy"], many["accuracy"]])
    assert both.value == 0.75 and both.interval == (0.5, 1.0)


def test_strength_scales_vectors_and_a_lora_once(run):
    """Kept answers differ by their vectors; the table of another strength stands beside the plain one."""
    A, B, s = torch.ones(2, 5), torch.ones(3, 2), torch.ones(3)
    half = evaluate.scaled({1: s, "2.lora_A": A, "2.lora_B": B}, 0.5)
    assert torch.equal(half["2.lora_B"] @ half["2.lora_A"], 0.5 * B @ A) and torch.equal(half[1], 0.5 * s)
    plain = evaluate.main(config(run))
    text = (run / "eval.md").read_text()
    evaluate.main(config(run, strength=(-2.0,)))
    assert (run / "eval.md").read_text() == text and "strength -2 " in (run / "eval-strength-2.md").read_text()
    (row,) = json.loads((run / "eval-strength-2.json").read_text())
    assert row["strength"] == -2 and json.loads((run / "eval.json").read_text())[0]["strength"] == 1
    by_vectors = {key["vectors"]: found["completions"] for key, found in stored()}
    vectors, _ = evaluate.vectors_of(run, {"model": "tiny"})
    subject = model.Subject(name="tiny", device="cpu", max_tokens=30)
    problems = problems_of(ROOT / "data/tiny/test.jsonl").first(4)
    said = subject.rollouts({20: -2 * vectors[20]}, problems.rows, 1, 0).texts
    assert [text for (text,) in by_vectors[evaluate.identity({20: -2 * vectors[20]})]] == said
    assert len(by_vectors) == 3 and evaluate.main(config(run, strength=(1.0,))) and len(stored()) == 3
    assert plain["test", 0.0]["difference"].keys() >= {"accuracy", "last_number", "has_answer", "truncated"}
    assert "| test      | greedy   | steered    | " in text and "| has a box % | cut off % |" in text


def test_a_run_in_another_model_of_its_shape(run, tmp_path):
    """Base and steered answers are those of the other model; the run's own table stays what it was."""
    other, _ = model.load("tiny", device="cpu")
    other.get_decoder().norm.weight.data[::2] *= -1
    unused = shutil.ignore_patterns("*.py", "*.md", "*.jsonl", "*.png")
    folder = shutil.copytree(TINY, tmp_path / "other", ignore=unused)
    other.save_pretrained(folder)
    evaluate.main(config(run, model=str(folder)))
    vectors, _ = evaluate.vectors_of(run, {"model": "tiny"})
    subject = model.Subject(name=str(folder), device="cpu", max_tokens=30)
    rows = problems_of(ROOT / "data/tiny/test.jsonl").rows[:4]
    kept = {key["vectors"]: (key["name"], found["completions"]) for key, found in stored()}
    for given in ({}, vectors):
        said = subject.rollouts(given, rows, 1, 0).texts
        assert kept[evaluate.identity(given)] == (str(folder), [[text] for text in said])
    assert kept["none"][1] != kept[evaluate.identity(vectors)][1]
    assert not (run / "eval.md").exists() and "trained in tiny" in (run / "eval-in-other.md").read_text()
    narrow = tmp_path / "narrow"
    random_llm("qwen2").save_pretrained(narrow)
    with pytest.raises(SystemExit, match="fits a model of width 64 and 28 layers; this one has width 32 and 3 layers"):
        evaluate.main(config(run, model=str(narrow)))


def test_a_kept_checkpoint_is_a_run(run):
    """Its vectors are measured, its table lies in its folder, its answers beside those of the run."""
    kept = run / "checkpoints" / "00002"
    make_run(kept, size=-1.0)
    (kept / "config.json").unlink()  # it has that of its run
    found = evaluate.main(config(kept, temperatures=(1.0,)))
    (base, own), (vectors, _) = stored(), evaluate.vectors_of(kept, evaluate.config_of(kept))
    assert {base[0]["vectors"], own[0]["vectors"]} == {"none", evaluate.identity(vectors)}
    assert not torch.equal(vectors[20], evaluate.vectors_of(run, {"model": "tiny"})[0][20])
    assert own[0]["max_tokens"] == 30 and found["test", 1.0].keys() == {"base", "steered", "difference"}
    assert (kept / "eval.md").is_file() and not (run / "eval.md").exists()
    mine = make_run(run.parent / "checkpoints" / "mine")  # a run of its own, whatever the folder around it is called
    assert evaluate.home_of(run) == run and evaluate.home_of(mine) == mine


def test_the_command_for_the_protocol_of_table_4(run, monkeypatch, tmp_path):
    """B App. E: mean@8 for GSM8K and MATH500 alike, of 500 problems, in 1,024 tokens, of the base model, too."""
    (command,) = re.findall(r"python evaluate.py out/gsm8k-layerall (.*)", (ROOT / "RESULTS.md").read_text())
    args = tyro.cli(evaluate.Config, args=[str(run), *command.split()])
    assert args.problems == 500
    monkeypatch.setattr(problem_files, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    for name, samples in (("gsm8k_test", 8), ("math500", 1)):  # as data/prepare.py writes them
        row = {"problem": "Start with 1, add 1.", "answer": "2", "samples": samples}
        (tmp_path / "data" / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    found = evaluate.main(replace(args, problems=2, max_tokens=2, device="cpu"))
    assert {key for key in found if key[0] != "Avg"} == {("gsm8k_test", 1.0), ("math500", 1.0)}
    for row in (row for key, row in found.items() if key[0] != "Avg"):
        assert all((row[who]["samples"], row[who]["seeds"]) == (8, 1) for who in ("base", "steered"))
    assert {key["context"] for key, _ in stored()} == {512}  # the built-in model's own, which is shorter
    assert model.Subject.of_run({"model": "tiny"}, replace(args, context=300)).context == 300


def test_what_is_written_to_the_terminal_is_what_is_measured(run, monkeypatch, capsys):
    """Token for token, greedy and sampled; coloured is what the base model, given the same text, would not write."""
    evaluate.main(config(run, temperatures=(0.0, 1.0)))
    rows = problems_of(ROOT / "data/tiny/test.jsonl").rows[:4]
    vectors, _ = evaluate.vectors_of(run, {"model": "tiny"})
    llm, tokenizer = model.load("tiny", device="cpu")
    spoken, real = [], ask.speak
    monkeypatch.setattr(ask, "speak", lambda *args: spoken.append(real(*args)))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    capsys.readouterr()
    asked = config(run, ask=tuple(row["problem"] for row in rows), temperatures=(0.0, 1.0), strength=(1.0, -2.0))
    assert evaluate.main(asked) is None
    printed = capsys.readouterr().out
    for T in (0.0, 1.0):
        kept = {key["vectors"]: found for key, found in stored() if key["temperature"] == T}
        for place, given in enumerate(({}, vectors)):  # of each question six: T, and base, strengths 1 and -2
            found = kept[evaluate.identity(given)]
            assert [spoken[6 * i + 3 * int(T) + place] for i in range(4)] == [ids for (ids,) in found["completion_ids"]]
            plain = printed.replace("\033[30;43m", "").replace("\033[0m", "")
            assert all(text.strip() in plain for (text,) in found["completions"])
    changed = []  # by one forward pass over each steered greedy answer
    for row, ids in zip(rows, spoken[1::6]):
        prompt = model.Subject(name="tiny", device="cpu").prompt(row)
        said = llm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        changed.append(sum(token != other for token, other in zip(ids, said)))
    greedy = [part.split("\n\nstrength")[0] for part in printed.split("strength 1: ")[1::2]]
    assert [part.count("\033[30;43m") for part in greedy] == changed and sum(changed) > 4
    monkeypatch.setenv("NO_COLOR", "1")
    evaluate.main(asked)
    assert "\033" not in capsys.readouterr().out


def test_questions_are_read_until_the_end_and_a_base_model_answers_alone(run, monkeypatch, capsys):
    typed = io.StringIO("Start with 5, add 3. What is the result?\n\n")
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    evaluate.main(config(None, model="tiny", ask=(), prefix="To", max_tokens=9))
    out = capsys.readouterr().out
    assert out.startswith("Type a question and press Enter; Ctrl-D ends.\n")
    assert out.count("base: To") == 1 and "steered" not in out and "strength" not in out and "\033" not in out
    assert not stored()


def test_interval():
    # 100 questions, one answer each, 30 right: standard error sqrt(0.3 * 0.7 / 100) of the mean, normal approximation
    low, high = Estimate.of([[1.0]] * 30 + [[0.0]] * 70).interval
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - half, abs=0.011) and high == pytest.approx(0.3 + half, abs=0.011)


def test_interval_is_over_questions():
    # 4 samples of a question that agree are one fact, not four: repeating them leaves the interval as it is
    answers = [[1.0]] * 8 + [[0.0]] * 12
    assert Estimate.of([row * 4 for row in answers]).interval == Estimate.of(answers).interval
    assert Estimate.of([[1.0, 0.0]] * 20).interval == (0.5, 0.5)  # no difference between questions
    assert Estimate.of([[1.0], [0.0, 0.0, 0.0]]).interval[1] == 1.0  # each question has the same weight
    draws = Estimate.of(answers).draws
    assert len(draws) == 10_000 and len(set(draws)) > 5 and (draws == Estimate.of(answers).draws).all()  # seeded
    other = Estimate.mean([Estimate.of(answers), Estimate.of(answers)])  # two sets of problems: drawn independently
    assert (other.draws != draws).any() and len(other.draws) == 10_000
    assert Estimate.of(answers).value == 0.4


def test_a_share_of_0_or_1_has_an_interval():
    """
    Wilson's limits solve (p - x)^2 = z^2 x (1 - x) / n for x. For p = 0: x = z^2 / (n + z^2), z^2 = 3.8416.

    So 0 of 2 -> 3.8416 / 5.8416 = 0.6576; 0 of 20 -> 3.8416 / 23.8416 = 0.1611. p = 1 is its mirror image.
    """
    none, both = Estimate.rate([[0], [0]]), Estimate.rate([[1, 1, 1], [1, 1, 1]])
    assert none.interval == pytest.approx((0, 0.6576), abs=1e-4)
    assert both.interval == pytest.approx((0.3424, 1), abs=1e-4) and both.text() == "100.0 [34.2, 100.0]"
    assert Estimate.rate([[0.0]] * 20).interval == pytest.approx((0, 0.1611), abs=1e-4)
    assert Estimate.largest(none, both).interval == both.interval
    # two sets of 10: as one of 20; sets of 10 and 90: all of a doubt could be in the small one, which weighs half
    assert Estimate.mean([Estimate.rate([[0]] * 10)] * 2).interval == pytest.approx((0, 0.1611), abs=1e-4)
    unequal = [Estimate.rate([[0]] * 10), Estimate.rate([[0]] * 90)]
    assert Estimate.mean(unequal).interval == pytest.approx((0, 0.1611), abs=1e-4)
    assert Estimate.mean([none, Estimate.rate([[1], [0]])]).interval == (0, 0.5)  # the bootstrap's, not degenerate
    # differences and ratios keep their draws; numbers that are no shares, cosines for example, may well be 0 or 1
    assert (both - none).interval == (1, 1) and (both / both).interval == (1, 1)
    assert Estimate.of([[1.0], [1.0]]).interval == (1, 1)


def test_estimates_by_hand():
    low, high, whole = (Estimate.of([[x]] * 4) for x in (0.2, 0.3, 0.6))
    share = high.share(low, whole)
    assert share.value == pytest.approx(0.25) and share.interval == pytest.approx((0.25, 0.25)) and not share.unclear
    assert (high / whole).value == pytest.approx(0.5) and (high / (low - low)).value is None
    assert high.share(low, low).unclear and all(map(math.isnan, high.share(low, low).interval))
    a, b = Estimate.of([[1], [0], [1], [1]]), Estimate.of([[0], [1], [0], [1]])
    best = Estimate.largest(a, b)
    assert best.value == 0.75 and (best.draws >= a.draws).all() and (best.draws >= b.draws).all()
    assert a.text() == "75.0 [25.0, 100.0]" and (a - b).text("+").startswith("+25.0 [")
    assert low.plain() == "0.2 [0.2, 0.2]" and low.json() == {"value": 0.2, "interval_95": (0.2, 0.2)}


def test_all_benchmarks_and_their_samples(run, monkeypatch, capsys, tmp_path):
    """The papers' six with two problems each, made here: 32 answers on AIME and AMC, one elsewhere, and Avg."""
    row = problems_of(ROOT / "data/tiny/test.jsonl").rows[0]
    monkeypatch.setattr(problem_files, "ROOT", tmp_path)
    missing = "no problems of aime24, .*olympiad: run `python data/prepare.py aime24 aime25"
    with pytest.raises(SystemExit, match=missing):
        evaluate.main(config(run, benchmarks=("all",)))
    (tmp_path / "data").mkdir()
    for name in [*PAPERS, "gsm8k_test"]:
        own = row | {"samples": {"aime24": 32, "aime25": 32, "amc23": 32, "gsm8k_test": 8}.get(name, 1)}
        lines = [json.dumps(own), json.dumps(own | {"problem": name})]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found = evaluate.main(config(run, benchmarks=("all",), temperatures=(1.0, 0.0), max_tokens=2))
    assert [found[b, 1.0]["base"]["samples"] for b in PAPERS] == [96, 96, 96, 3, 3, 3]  # of three seeds
    assert {found[b, 0.0]["base"]["samples"] for b in PAPERS} == {1}
    steered = [found[b, 1.0]["steered"]["accuracy"].value for b in PAPERS]
    assert found["Avg", 1.0]["steered"]["accuracy"].value == pytest.approx(sum(steered) / 6)
    table = (run / "eval.md").read_text()
    assert table.count(" mean@32 ") == 3 and table.count(" mean@1 ") == 9 and " ±" in table
    assert all("±" in line for line in table.splitlines() if line.startswith("| Avg") and "T = 1" in line)
    assert table.count("| Avg ") == 2 and "| aime24 " in table and table.split("\n\n")[1] in capsys.readouterr().out
    found = evaluate.main(config(run, benchmarks=("gsm8k_test",), temperatures=(1.0,), max_tokens=2))
    assert found["gsm8k_test", 1.0]["steered"]["samples"] == 24 and ("Avg", 1.0) not in found
    assert " mean@8 " in (run / "eval.md").read_text()
    for name, text in (("own", '{"problem": "a", "answer": 1}\n'), ("gsm8k_test", '{"problem": "a", "answer": 1}\n')):
        (tmp_path / f"{name}.jsonl").write_text(text)  # the number of answers stands in the file and not in its name
        assert problems_of(tmp_path / f"{name}.jsonl").samples == 1
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps({"problem": "a", "answer": 1, "samples": k}) + "\n" for k in (2, 4)))
    assert problems_of(mixed).samples == 1


def test_own_data_and_table(run, tmp_path, capsys):
    """A problem file in which every answer is what the model says: 100 %; then one that is wrong."""
    llm, tokenizer = model.load("tiny", device="cpu")
    texts = ["Start with 5, add 3, add 1. What is the result?", "Start with 2, add 9, add 1. What is the result?"]
    said = rollouts(llm, tokenizer, {}, texts, 1, 80, 0, prefix="To").texts
    golds = [text.split("boxed{")[-1].split("}")[0] for text in said]
    assert all(gold.isdigit() for gold in golds)
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": t, "answer": g}) + "\n" for t, g in zip(texts, golds)))
    own = evaluate.Config(run="x", problems=1)  # a run's own problems: those held out, else none but what is asked for
    assert evaluate.sets_of(own, {"model": "tiny", "data": "x", "held_out": str(data)})[0].name == "mine"
    assert evaluate.sets_of(own, {"model": "tiny", "data": "data/tiny/train.jsonl"})[0].name == "test"
    with pytest.raises(SystemExit, match="--data FILE is needed: the run has no held-out problems"):
        evaluate.sets_of(own, {"model": "tiny", "data": "x", "held_out": None})
    settings = config(None, model="tiny", data=str(data), prefix="To", out=str(tmp_path))
    assert evaluate.main(settings)["mine", 0.0]["base"]["accuracy"].value == 1
    assert [found["correct"] for _, found in stored()] == [[[1], [1]]]
    assert "| mine      | greedy   | 100.0 [34.2, 100.0] | mean@1 | 2 " in capsys.readouterr().out
    data.write_text(json.dumps({"problem": texts[0], "answer": golds[0] + "1"}) + "\n")  # other problems, the same name
    assert evaluate.main(settings)["mine", 0.0]["base"]["accuracy"].value == 0
    assert sorted(found["correct"] for _, found in stored()) == [[[0]], [[1], [1]]]


def test_errors_give_one_line(tmp_path):
    for folder, method in (("full", "full"), ("vector", "vector")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model": "tiny", "method": method}))
    (tmp_path / "full" / "weights").mkdir()
    for wrong, message in [
        ({}, "give a run folder .* or a base model"),
        ({"run": "x", "model": "tiny"}, "no run in x"),
        ({"run": "x", "model": "tiny", "checkpoints": True}, "--checkpoints wants .* no --model"),
        ({"run": str(tmp_path / "full"), "model": "tiny"}, "trained all weights: --strength and --model want vectors"),
        ({"run": str(tmp_path)}, "a run folder of train.py holds config.json"),
        ({"run": str(tmp_path / "full")}, "no weights in .*--resume"),
        ({"run": str(tmp_path / "vector")}, "no vectors in .*--resume"),
        ({"run": str(tmp_path / "full"), "tensor_parallel": 2}, "--tensor-parallel wants 1"),
        ({"model": "tiny", "strength": (2.0,)}, "--strength scales the vectors of a run"),
        ({"run": "x", "strength": (1.0, 2.0)}, "--strength takes several numbers with --ask alone"),
        ({"run": "x", "strength": (float("nan"),)}, "--strength wants numbers, got nan"),
        ({"run": str(tmp_path / "full"), "strength": (2.0,)}, "trained all weights"),
        ({"model": "tiny", "problems": 0}, "--problems wants at least 1, got 0"),
        ({"model": "tiny", "temperatures": (-1.0,)}, "--temperatures wants at least 0, got -1.0"),
        ({"model": "some/other"}, "--benchmarks NAME... or --data FILE is needed"),
        ({"model": "tiny", "benchmarks": ("tiny/chain9",)}, "no problems of tiny/chain9"),
        ({"model": "tiny", "data": str(tmp_path / "none.jsonl")}, "no problems at"),
        ({"model": "tiny", "data": "x", "benchmarks": ("aime24",)}, "either --benchmarks or --data"),
        (
            {"model": "tiny", "benchmarks": ("nonsense",)},
            "no problems of nonsense: run `python data/prepare.py nonsense",
        ),
    ]:
        with pytest.raises(SystemExit, match=message):
            evaluate.main(evaluate.Config(**wrong))
