"""What is exported answers as the model under `steer`; what a format cannot hold is refused in one line."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_llm, rollouts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from data.problems import problems_of
from plumbing.export import export
from plumbing.files import TINY

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def numbers(seed, *shape, scale=4.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny():
    return model.load("tiny", "cpu")


@pytest.fixture(scope="module")
def problems():
    return [row["problem"] for row in problems_of(TINY / "test.jsonl").rows[:50]]


@pytest.fixture
def run_of(tmp_path, tiny):
    """A run folder with these vectors: run_of(vectors), of another base with run_of(vectors, folder, llm)."""

    def make(vectors, name="tiny", llm=None, **settings):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        layers = ",".join(sorted({str(model.split(place).layer) for place in vectors}))
        settings = {"model": str(name), "layer": layers, "steps": 7, "system": "Think."} | settings
        (run / "config.json").write_text(json.dumps(settings))
        model.save_vectors(run / "vectors.safetensors", vectors, llm or tiny[0], str(name), 7)
        return run

    return make


@pytest.fixture
def base_of(tmp_path):
    """A random model of a family in a folder, cut into shards: (folder, the model)."""

    def make(family, **changes):
        llm = random_llm(family, **changes)
        for name, weight in llm.named_parameters():
            if name.endswith("bias"):  # random models have zeros there
                weight += numbers(5, *weight.shape, scale=0.5)
        llm.save_pretrained(tmp_path / family, max_shard_size="20KB")
        assert len(list((tmp_path / family).glob("*.safetensors"))) > 2
        return tmp_path / family, llm

    return make


@torch.no_grad()
def logits(llm, vectors=None):
    with model.steer(llm, vectors or {}):
        return llm(input_ids=IDS, use_cache=False).logits


def greedy(llm, tokenizer, vectors, problems):
    return rollouts(llm, tokenizer, vectors, problems, 1, 60, temperature=0.0).completions


def differ(a, b):
    return sum(x != y for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------------- peft


def test_peft_answers_as_the_steered_model(tiny, problems, run_of):
    peft = pytest.importorskip("peft")
    vectors = {
        3: numbers(0, 64),
        27: numbers(1, 64),
        "14.attention": numbers(2, 64),
        "9.self_attn.q_proj": numbers(3, 64),
    }
    run = run_of(vectors)
    (run / "eval.md").write_text("table: 98.0 [97.1, 98.8]\n")
    export(str(run), "peft")
    loaded = peft.PeftModel.from_pretrained(model.load("tiny", "cpu")[0], run / "peft").get_base_model()
    ours = greedy(*tiny, vectors, problems)
    assert greedy(loaded, tiny[1], {}, problems) == ours
    assert differ(greedy(*tiny, {}, problems), ours) > 40
    some = {place: vectors[place] for place in (3, 27)}
    assert differ(greedy(*tiny, some, problems), ours) > 10  # the other two count
    card = (run / "peft/README.md").read_text()
    for text in ("layers | 3, 9, 14, 27", "0-based", "steps | 7", "system | Think.", "98.0 [97.1, 98.8]", "checksum"):
        assert text in card, text
    with safe_open(run / "peft/adapter_model.safetensors", "pt") as file:
        assert file.metadata()["operation"] == "add" and file.metadata()["step"] == "7"


def test_a_lora_becomes_a_plain_lora(run_of, base_of):
    peft = pytest.importorskip("peft")
    folder, llm = base_of("qwen3")
    vectors = {"1.lora_A": numbers(0, 3, 40, scale=0.2), "1.lora_B": numbers(1, 32, 3)}
    vectors |= {
        "2.self_attn.o_proj.lora_A": numbers(2, 3, 32, scale=0.2),
        "2.self_attn.o_proj.lora_B": numbers(3, 32, 3),
    }
    run = run_of(vectors, folder, llm, method="lora", rank=3)
    export(str(run), "peft")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), run / "peft")
    assert json.loads((run / "peft/adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(logits(loaded.get_base_model()), logits(llm, vectors), rtol=0, atol=1e-4)
    assert (logits(llm, vectors) - logits(llm)).abs().max() > 0.1
    export(
        str(run_of(vectors | {0: numbers(4, 32)}, folder, llm)), "transformers"
    )  # which holds both, the next does not
    with pytest.raises(SystemExit, match="an adapter holds vectors or LoRAs, and this run has both"):
        export(str(run), "peft")
    other = {"1.lora_A": numbers(0, 2, 40), "1.lora_B": numbers(1, 32, 2)}
    with pytest.raises(SystemExit, match=r"the LoRAs of an adapter have one rank, and this run has the ranks \[2, 3\]"):
        export(str(run_of(vectors | other, folder, llm)), "peft")


# --------------------------------------------------------------------------------------------------------------- vllm


def test_the_vllm_folder_answers_as_the_steered_model_in_transformers(tiny, problems, run_of):
    vectors = {0: numbers(0, 64), 27: numbers(1, 64), "14.attention": numbers(2, 64)}
    run = run_of(vectors)
    for _ in range(2):  # the second takes the place of the first
        export(str(run), "vllm")
    folder = run / "vllm"
    loaded, how = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(how.values()), how  # nothing missing, nothing left over
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = greedy(*tiny, vectors, problems)
    assert greedy(loaded.eval(), tokenizer, {}, problems) == ours
    assert differ(greedy(*tiny, {}, problems), ours) > 40
    assert model.stop_ids(loaded, tokenizer) == model.stop_ids(*tiny)
    own = [file for file in folder.iterdir() if not file.is_symlink()]
    assert sum(file.stat().st_size for file in own) < 150_000 < (folder / "base-model.safetensors").stat().st_size
    with safe_open(folder / "steering.safetensors", "pt") as file:
        meta = file.metadata()
    assert meta["layers"] == "0, 14, 27" and meta["site"] == "attention, end of layer" and meta["format"] == "pt"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_vllm_folder_of_every_family(family, run_of, base_of):
    """Shards, biases that the base has, and settings that the families' classes have other defaults for."""
    folder, llm = base_of(family, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    short = json.loads((folder / "config.json").read_text())
    for key in ("bos_token_id", "pad_token_id"):  # a Llama's own default is not this class's
        del short[key]
    (folder / "config.json").write_text(json.dumps(short))
    vectors = {0: numbers(0, 32), "1.attention": numbers(1, 32), "2.mlp.up_proj": numbers(2, 40), 2: numbers(3, 32)}
    run = run_of(vectors, folder, llm)
    export(str(run), "vllm")
    loaded = AutoModelForCausalLM.from_pretrained(run / "vllm").eval()
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.config.bos_token_id == AutoModelForCausalLM.from_pretrained(folder).config.bos_token_id
    torch.testing.assert_close(logits(loaded), logits(llm, vectors), rtol=0, atol=2e-4)
    for left_out in vectors:
        rest = {place: s for place, s in vectors.items() if place != left_out}
        assert (logits(llm, vectors) - logits(llm, rest)).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------------- gguf


def test_gguf_read_again(run_of):
    gguf = pytest.importorskip("gguf")
    vectors = {3: numbers(0, 64), 27: numbers(1, 64), "27.mlp.down_proj": numbers(2, 64)}  # the last two act together
    run = run_of(vectors)
    export(str(run), "gguf")
    reader = gguf.GGUFReader(run / "vector.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(found) == ["direction.27", "direction.3"]
    assert torch.equal(torch.tensor(found["direction.3"].data), vectors[3])
    assert torch.equal(torch.tensor(found["direction.27"].data), vectors[27] + vectors["27.mlp.down_proj"])
    for tensor in found.values():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and list(tensor.shape) == [64]
    says = {name: field.contents() for name, field in reader.fields.items()}
    assert says["general.architecture"] == "controlvector" and says["controlvector.model_hint"] == "qwen2"
    assert says["controlvector.layer_count"] == 2 and says["steering.operation"] == "add"
    assert re.fullmatch("[0-9a-f]{8}", says["steering.model_checksum"]) and says["steering.step"] == "7"


# --------------------------------------------------------------------------------------------- printed, what is said


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_printed_lines_steer_a_plain_model(family, run_of, base_of, capsys):
    folder, llm = base_of(family)
    vectors = {1: numbers(0, 32), "2.input-norm": numbers(1, 32)}
    vectors |= {"0.lora_A": numbers(2, 2, 40, scale=0.2), "0.lora_B": numbers(3, 32, 2)}
    run, base = run_of(vectors, folder, llm), logits(llm)
    export(str(run), "transformers")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("bridge")]
    assert len(lines) == 4
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    exec("\n".join(lines), {"llm": loaded})
    torch.testing.assert_close(logits(loaded), logits(llm, vectors), rtol=0, atol=1e-5)
    assert (logits(llm, vectors) - base).abs().max() > 0.1


def test_the_command_works_from_any_folder(run_of, tmp_path):
    command = [sys.executable, str(ROOT / "plumbing/export.py"), str(run_of({27: numbers(0, 64)})), "--to"]
    done = subprocess.run([*command, "transformers"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'llm.get_submodule("model.layers.27.mlp").register_forward_hook' in done.stdout


def test_an_older_file_is_read_and_its_export_says_as_much(run_of, capsys):
    gguf = pytest.importorskip("gguf")
    run = run_of({27: numbers(0, 64)})
    tensors = load_file(run / "vectors.safetensors")
    meta = {"model": "tiny", "width": "64", "num_layers": "28", "site": "end of layer", "step": "5"}
    save_file(tensors, run / "vectors.safetensors", meta)
    export(str(run), "gguf")
    says = {name: field.contents() for name, field in gguf.GGUFReader(run / "vector.gguf").fields.items()}
    assert says["steering.operation"] == "add" and says["steering.step"] == "5" and says["steering.layers"] == "27"
    assert "warning" not in capsys.readouterr().out
    save_file(tensors, run / "vectors.safetensors", meta | {"model_checksum": "00000000"})
    export(str(run), "transformers")
    assert "the base model 'tiny' has changed since" in capsys.readouterr().out


@pytest.mark.parametrize(
    "to, vectors, settings, line",
    [
        ("gguf", {0: (64,), 3: (64,)}, {}, "layer 0 cannot be held: llama.cpp has no control vector"),
        ("gguf", {"3.attention": (64,)}, {}, "acts at the end of layers, and 3.attention does not"),
        ("gguf", {"3.lora_A": (2, 192), "3.lora_B": (64, 2)}, {}, "3.lora_A does not"),
        ("gguf", {"3@answer": (64,)}, {}, "3@answer does not"),
        ("peft", {"3.input-norm": (64,)}, {}, "3.input-norm: no linear module has this output"),
        ("peft", {"3@answer": (64,)}, {}, "3@answer: a bias acts at every position"),
        ("vllm", {"3@answer": (64,)}, {}, "3@answer: a bias acts at every position"),
        ("vllm", {"3.post-attention-norm": (64,)}, {}, "no linear module has this output"),
        ("vllm", {"3.self_attn.q_proj": (64,)}, {}, "layers.3.self_attn.q_proj of the base has a bias already"),
        ("vllm", {"3.lora_A": (2, 192), "3.lora_B": (64, 2)}, {}, "--to peft, then `vllm serve BASE --enable-lora"),
        ("transformers", {"3@answer": (64,)}, {}, "3@answer: a plain hook acts at every position"),
        ("peft", {3: (64,)}, {"method": "full"}, "run/weights is a model folder"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(run_of, to, vectors, settings, line):
    pytest.importorskip({"vllm": "torch", "transformers": "torch"}.get(to, to))
    run = run_of({place: numbers(0, *shape) for place, shape in vectors.items()}, **settings)
    before = sorted(run.iterdir())
    with pytest.raises(SystemExit) as error:
        export(str(run), to)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert sorted(run.iterdir()) == before  # and nothing is left half written


@pytest.mark.parametrize("to", ["peft", "vllm", "gguf"])
def test_what_is_there_and_is_no_export_is_not_replaced(run_of, to, tmp_path):
    folder = run_of({27: torch.ones(64)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place in (folder, tmp_path / "mine"):
        with pytest.raises(SystemExit, match="exists, but it is not an export --to " + to):
            export(str(folder), to, str(place))
    assert (folder / "vectors.safetensors").is_file() and (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    for _ in range(2):  # an earlier export is
        export(str(folder), to, str(tmp_path / "there"))


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])  # q and k norms, a sliding window, scaled outputs
def test_models_that_are_no_llama_are_refused_for_vllm(family, run_of, base_of):
    folder, llm = base_of(family)
    lines = {"qwen3": "no architecture that is a qwen3 with biases", "mistral": "no sliding window"}
    with pytest.raises(SystemExit, match=lines.get(family, "no linear module has this output")):
        export(str(run_of({1: numbers(0, 32)}, folder, llm)), "vllm")


HUB = """
import json, sys, torch
import evaluate, model
from plumbing.export import export
run = sys.argv[1]
llm, _ = model.load("some/tiny", "cpu")
with open(f"{run}/config.json", "w") as file:
    json.dump({"model": "some/tiny", "layer": "27", "max_tokens": 8, "context": 256}, file)
model.save_vectors(f"{run}/vectors.safetensors", {27: torch.ones(64)}, llm, "some/tiny", 3)
evaluate.main(evaluate.Config(run, data=sys.argv[2], problems=2, temperatures=(0.0,), base=False, device="cpu"))
export(run, "vllm")
"""


def test_a_base_model_of_the_hub(tmp_path):
    """A cache of the hub with one model in it: measured by the id, exported with links into the cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub/models--some--tiny/snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in (*TINY.glob("*.json"), TINY / "chat_template.jinja", TINY / "model.safetensors"):
        shutil.copy(file, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    run = tmp_path / "out/run"
    run.mkdir(parents=True)
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HUB, str(run), str(TINY / "test.jsonl")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "vllm/base-model.safetensors").resolve() == snapshot / "model.safetensors"
    with safe_open(run / "vllm/steering.safetensors", "pt") as file:
        assert file.metadata()["model_checksum"] == commit
    kept = next((tmp_path / "out/answers").iterdir()).read_text()
    assert json.loads(kept)["key"]["weights"] == commit
