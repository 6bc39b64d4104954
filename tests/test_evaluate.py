"""evaluate.py: what it writes agrees with what the model does."""

import json

import pytest
import torch
from conftest import ROOT

import evaluate
import model


def make_run(folder, size):
    """A run folder with a random vector at layer 20, `size` times as large as the residual stream there."""
    llm, _ = model.load("tiny", device="cpu")
    rms = model.residual_rms(llm, [[1, 2, 3, 4]], [20])[20]
    s = size * rms * torch.randn(64, generator=torch.Generator().manual_seed(0))
    model.save_vectors(folder / "vectors.safetensors", {20: s}, llm, "tiny", 1)
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "max_tokens": 30}))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, size=1.0)


def test_eval_json(tmp_path):
    """Graded by hand from the completions: the boxed integer is the answer of that row, not of another."""
    run = make_run(tmp_path, size=0.1)
    config = evaluate.Config(run=str(run), problems=12, samples=3, seeds=(0, 1), prefix="To", max_tokens=80, device="cpu")
    evaluate.main(config)
    sampled, greedy = json.loads((run / "eval.json").read_text()).values()
    assert (sampled["temperature"], sampled["samples"], greedy["temperature"], greedy["samples"]) == (1.0, 6, 0.0, 1)
    rows = model.read_problems(ROOT / "data/tiny/test.jsonl")[:12]
    for result in (sampled, greedy):
        assert len(result["correct"]) == len(result["completions"]) == 12
        for row, correct, texts in zip(rows, result["correct"], result["completions"]):
            assert correct == [int(text.split("boxed{")[-1].startswith(row["answer"] + "}")) for text in texts]
        flat = sum(result["correct"], [])
        assert sum(flat) > 0 and (result is greedy or sum(flat) < len(flat))  # or a permutation could not be seen
        assert result["accuracy"] == pytest.approx(sum(flat) / len(flat))
        assert result["layers"] == [20] and result["step"] == 1
    assert sampled["completions"][0][:3] != sampled["completions"][0][3:]  # the two seeds


def test_run_is_steered_and_base_is_not(run, tmp_path):
    evaluate.main(evaluate.Config(run=str(run), problems=4, temperatures=(0.0,), max_tokens=30, device="cpu"))
    evaluate.main(evaluate.Config(model="tiny", problems=4, temperatures=(0.0,), max_tokens=30, out=str(tmp_path / "base")))
    (steered,) = json.loads((run / "eval.json").read_text()).values()
    (base,) = json.loads((tmp_path / "base/eval.json").read_text()).values()
    assert steered["completions"] != base["completions"]
    llm, tokenizer = model.load("tiny", device="cpu")
    problems = [row["problem"] for row in model.read_problems(ROOT / "data/tiny/test.jsonl")[:4]]
    assert [texts[0] for texts in base["completions"]] == model.rollouts(llm, tokenizer, problems, 1, 30, 0).texts


def test_settings_stand_side_by_side(run):
    greedy = {"temperatures": (0.0,)}
    for changes in (greedy, greedy | {"prefix": "To"}, {"temperatures": (1.0,)}, {"temperatures": (1.0,), "seeds": (1,)}, greedy):
        evaluate.main(evaluate.Config(run=str(run), problems=2, device="cpu", **changes))
    results = [json.loads(key) for key in json.loads((run / "eval.json").read_text())]
    assert [(r["temperature"], r["seeds"], r["prefix"]) for r in results] == [
        (0.0, [0], ""), (0.0, [0], "To"), (1.0, [0], ""), (1.0, [1], "")
    ]  # fmt: skip


def test_own_data_and_table(tmp_path, capsys):
    """A problem file in which every answer is what the model says: 100 %; then one that is wrong."""
    llm, tokenizer = model.load("tiny", device="cpu")
    texts = ["Start with 5, add 3, add 1. What is the result?", "Start with 2, add 9, add 1. What is the result?"]
    said = model.rollouts(llm, tokenizer, texts, 1, 80, 0, prefix="To").texts
    golds = [text.split("boxed{")[-1].split("}")[0] for text in said]
    assert all(gold.isdigit() for gold in golds)
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": t, "answer": g}) + "\n" for t, g in zip(texts, golds)))
    config = evaluate.Config(
        model="tiny", data=str(data), temperatures=(0.0,), prefix="To", out=str(tmp_path), device="cpu"
    )
    (result,) = evaluate.main(config).values()
    assert result["correct"] == [[1], [1]]
    assert "greedy     100.0 %" in capsys.readouterr().out
    data.write_text(json.dumps({"problem": texts[0], "answer": golds[0] + "1"}) + "\n")
    (result,) = evaluate.main(config).values()
    assert result["correct"] == [[0]]


def test_errors_give_one_line(tmp_path):
    with pytest.raises(SystemExit, match="either a run folder"):
        evaluate.main(evaluate.Config())
    with pytest.raises(SystemExit, match="either a run folder"):
        evaluate.main(evaluate.Config(run="x", model="tiny"))
    with pytest.raises(SystemExit, match="a run folder of train.py holds config.json"):
        evaluate.main(evaluate.Config(run=str(tmp_path)))
    with pytest.raises(SystemExit, match="--problems wants at least 1, got 0"):
        evaluate.main(evaluate.Config(model="tiny", problems=0))
    with pytest.raises(SystemExit, match="--temperatures wants one or more"):
        evaluate.main(evaluate.Config(model="tiny", temperatures=(-1.0,)))
    with pytest.raises(SystemExit, match="--data FILE is needed"):
        evaluate.main(evaluate.Config(model="some/other"))
    with pytest.raises(SystemExit, match="no problems at"):
        evaluate.main(evaluate.Config(model="tiny", data=str(tmp_path / "none.jsonl")))
