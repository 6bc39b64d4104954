"""evaluate.py: what it writes agrees with what the model does."""

import json
import math

import pytest
import torch
from conftest import ROOT

import evaluate
import model


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
    monkeypatch.chdir(tmp_path)  # the base model's results go to out/tiny-base
    return make_run(tmp_path / "run")


def config(run, **changes):
    small = dict(run=run and str(run), problems=4, temperatures=(0.0,), device="cpu")
    return evaluate.Config(**(small | changes))


def stored(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "eval").glob("*.json"))]


def test_stored_results_are_graded_by_hand(run):
    """From the completions: the boxed integer is the answer of that row, not of another."""
    run = make_run(run, size=0.1)
    settings = dict(problems=12, samples=3, seeds=(0, 1), prefix="To", max_tokens=80, temperatures=(1.0, 0.0))
    found = evaluate.main(config(run, **settings))
    greedy, first, second = stored(run)
    got = [(r["temperature"], r["seed"], r["samples"]) for r in (greedy, first, second)]
    assert got == [(0.0, 0, 1), (1.0, 0, 3), (1.0, 1, 3)]
    rows = model.read_problems(ROOT / "data/tiny/test.jsonl")[:12]
    for result in (greedy, first, second):
        assert len(result["correct"]) == len(result["completions"]) == 12
        for row, correct, texts in zip(rows, result["correct"], result["completions"]):
            assert len(correct) == result["samples"]
            assert correct == [int(text.split("boxed{")[-1].startswith(row["answer"] + "}")) for text in texts]
        assert result["step"] == 1 and result["max_tokens"] == 80
    assert first["completions"] != second["completions"]
    flat = sum(first["correct"] + second["correct"], [])
    assert 0 < sum(flat) < len(flat) == 72  # or a permutation could not be seen
    assert found[1.0]["tiny"]["steered"]["accuracy"] == pytest.approx(sum(flat) / 72)
    assert found[1.0]["tiny"]["steered"]["samples"] == 6


def test_run_is_steered_and_base_is_not(run):
    evaluate.main(config(run))
    (steered,), (base,) = stored(run), stored(run.parent / "out/tiny-base")
    assert steered["completions"] != base["completions"]
    llm, tokenizer = model.load("tiny", device="cpu")
    problems = [row["problem"] for row in model.read_problems(ROOT / "data/tiny/test.jsonl")[:4]]
    assert [texts[0] for texts in base["completions"]] == model.rollouts(llm, tokenizer, {}, problems, 1, 30, 0).texts


def test_nothing_is_computed_twice_and_an_interruption_keeps_what_is_done(run, monkeypatch):
    calls, real = [], evaluate.measure

    def counted(*args, **how):
        calls.append(args[5:7])  # temperature, seed
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(evaluate, "measure", counted)
    settings = dict(base=False, temperatures=(1.0,), seeds=(0, 1))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config(run, **settings))
    evaluate.main(config(run, **settings))
    assert calls == [(1.0, 0), (1.0, 1), (1.0, 1)]  # seed 0 once only
    evaluate.main(config(run, **settings))
    assert len(calls) == 3
    for changes in ({"prefix": "To"}, {"problems": 3}, {"max_tokens": 9}, {"system": "Use code."}):
        evaluate.main(config(run, **(settings | changes)))
    assert len(calls) == 3 + 4 * 2
    make_run(run, size=0.5)  # the run has other vectors now
    evaluate.main(config(run, **settings))
    assert len(calls) == 13


def test_summary_difference_and_average_by_hand():
    def result(correct, tokens=10):
        return {"correct": correct, "tokens": tokens, "truncated": 1, "seconds_sampling": 2.0}

    # seed means 3/4 and 1/4; by problem 3/4 and 1/4
    got = evaluate.summary([result([[1, 1], [0, 1]]), result([[0, 1], [0, 0]], 30)])
    assert (got["accuracy"], got["problems"], got["samples"]) == (0.5, 2, 4)
    assert got["correct"] == [[1, 1, 0, 1], [0, 1, 0, 0]]
    assert got["sd_over_seeds"] == pytest.approx(math.sqrt(0.125))
    assert (got["truncated"], got["tokens_mean"], got["tokens_per_second"]) == (2 / 8, 5.0, 10.0)
    assert got["interval_95"] == (0.25, 0.75)  # two problems: both the worse one, one of each, both the better one

    # the same gain on every problem: no doubt about the difference, however far the problems are apart
    steered, base = evaluate.summary([result([[1, 1], [1, 0]])]), evaluate.summary([result([[1, 0], [0, 0]])])
    gain = evaluate.difference(steered, base)
    assert gain["accuracy"] == 0.5 and gain["interval_95"] == (0.5, 0.5)

    # benchmarks weigh the same: (0.5 + 1) / 2, though one has a hundred times the problems
    one, many = evaluate.summary([result([[0], [1]])]), evaluate.summary([result([[1]] * 200)])
    both = evaluate.average([one, many])
    assert both["accuracy"] == 0.75 and both["interval_95"] == (0.5, 1.0)


def test_all_benchmarks_and_their_samples(run, monkeypatch, capsys, tmp_path):
    """The papers' six with two problems each, made here: 32 answers on AIME and AMC, one elsewhere, and Avg."""
    row = model.read_problems(ROOT / "data/tiny/test.jsonl")[0]
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    with pytest.raises(SystemExit, match="no problems of aime24, .*olympiad: run `python data/prepare.py aime24 aime25"):
        evaluate.main(config(run, benchmarks=("all",)))
    (tmp_path / "data").mkdir()
    for name in [*evaluate.PAPERS, "gsm8k_test"]:
        lines = [json.dumps(row), json.dumps(row | {"problem": name})]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found = evaluate.main(config(run, benchmarks=("all",), temperatures=(1.0, 0.0), max_tokens=6))
    assert [found[1.0][b]["base"]["samples"] for b in evaluate.PAPERS] == [96, 96, 96, 3, 3, 3]  # of three seeds
    assert {found[0.0][b]["base"]["samples"] for b in evaluate.PAPERS} == {1}
    steered = [found[1.0][b]["steered"]["accuracy"] for b in evaluate.PAPERS]
    assert found[1.0]["Avg"]["steered"]["accuracy"] == pytest.approx(sum(steered) / 6)
    table = (run / "eval.md").read_text()
    assert table.count(" AVG@32 ") == 3 and table.count(" PASS@1 ") == 9 and " ±" in table
    assert table.count("| Avg ") == 2 and "| aime24 " in table and table.split("\n\n")[1] in capsys.readouterr().out
    found = evaluate.main(config(run, benchmarks=("gsm8k_test",), temperatures=(1.0,), max_tokens=6))
    assert found[1.0]["gsm8k_test"]["steered"]["samples"] == 24 and "Avg" not in found[1.0]
    assert " mean@8 " in (run / "eval.md").read_text()


def test_own_data_and_table(run, tmp_path, capsys):
    """A problem file in which every answer is what the model says: 100 %; then one that is wrong."""
    llm, tokenizer = model.load("tiny", device="cpu")
    texts = ["Start with 5, add 3, add 1. What is the result?", "Start with 2, add 9, add 1. What is the result?"]
    said = model.rollouts(llm, tokenizer, {}, texts, 1, 80, 0, prefix="To").texts
    golds = [text.split("boxed{")[-1].split("}")[0] for text in said]
    assert all(gold.isdigit() for gold in golds)
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": t, "answer": g}) + "\n" for t, g in zip(texts, golds)))
    settings = config(None, model="tiny", data=str(data), prefix="To", out=str(tmp_path))
    assert evaluate.main(settings)[0.0]["mine"]["base"]["correct"] == [[1], [1]]
    assert "| mine      | greedy   | 100.0 [100.0, 100.0] | PASS@1 | 2 " in capsys.readouterr().out
    data.write_text(json.dumps({"problem": texts[0], "answer": golds[0] + "1"}) + "\n")
    assert evaluate.main(settings)[0.0]["mine"]["base"]["correct"] == [[0]]  # other problems in a file of the same name


def test_errors_give_one_line(tmp_path):
    for folder, method in (("full", "full"), ("vector", "vector")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model": "tiny", "method": method}))
    (tmp_path / "full" / "weights").mkdir()
    for wrong, message in [
        ({}, "either a run folder"),
        ({"run": "x", "model": "tiny"}, "either a run folder"),
        ({"run": str(tmp_path)}, "a run folder of train.py holds config.json"),
        ({"run": str(tmp_path / "full")}, "no weights in .*--resume"),
        ({"run": str(tmp_path / "vector")}, "no vectors in .*--resume"),
        ({"run": str(tmp_path / "full"), "tensor_parallel": 2}, "--tensor-parallel wants 1"),
        ({"model": "tiny", "problems": 0}, "--problems wants at least 1, got 0"),
        ({"model": "tiny", "temperatures": (-1.0,)}, "--temperatures wants one or more"),
        ({"model": "some/other"}, "--benchmarks NAME... or --data FILE is needed"),
        ({"model": "tiny", "data": str(tmp_path / "none.jsonl")}, "no problems at"),
        ({"model": "tiny", "data": "x", "benchmarks": ("aime24",)}, "either --benchmarks or --data"),
        ({"model": "tiny", "benchmarks": ("nonsense",)}, "no problems of nonsense: run `python data/prepare.py nonsense`"),
    ]:
        with pytest.raises(SystemExit, match=message):
            evaluate.main(evaluate.Config(**wrong))
