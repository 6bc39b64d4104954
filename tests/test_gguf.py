"""GGUF files as models: the built-in model in that format is itself; what would be read wrong is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import random_llm, write_gguf
from transformers import AutoConfig

import evaluate
import model
import train
from plumbing import gguf_file
from plumbing.export import Trained, export, to_gguf
from plumbing.loading import load_config

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tiny():
    return model.load("tiny", "cpu")


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", tiny[0])


def test_it_is_the_model_that_was_written(tiny, tiny_file, tmp_path):
    (tiny_file.parent / "tokenizer.json").write_text("{}")  # of another model: what lies beside the file counts nothing
    llm, tokenizer = model.load(str(tiny_file), "cpu")
    assert load_config(str(tiny_file)).architectures == ["Qwen2ForCausalLM"]
    for (name, ours), (wanted_name, wanted) in zip(llm.named_parameters(), tiny[0].named_parameters(), strict=True):
        assert name == wanted_name and type(ours) is torch.nn.Parameter and not ours.requires_grad
        assert torch.equal(ours, wanted), name
    for problem in ("Start with 16, add 1. What is the result?", "12 + 345 = ?\n  x"):
        assert model.prompt_ids(tokenizer, problem) == model.prompt_ids(tiny[1], problem)
    assert model.stop_ids(llm, tokenizer) == model.stop_ids(*tiny)
    llm.save_pretrained(tmp_path / "saved")  # as --method full does
    tokenizer.save_pretrained(tmp_path / "saved")
    again, words = model.load(str(tmp_path / "saved"), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), llm.parameters(), strict=True))
    assert words("12 + 345").input_ids == tokenizer("12 + 345").input_ids
    assert model.load(str(tiny_file), "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_the_round_trip(tiny_file, tmp_path, monkeypatch, capsys):
    """Trained on a file, measured, and given back as a control vector for that very file."""
    monkeypatch.chdir(tmp_path)
    train.main(train.Config(
        model=str(tiny_file), layer="20", data="data/tiny/train.jsonl", held_out="data/tiny/test.jsonl", steps=1,
        prompts=2, samples=4, max_tokens=8, eval_problems=2,
    ))  # fmt: skip; the device, too, is left to its default
    run = tmp_path / "out/small-layer20"
    assert json.loads((run / "config.json").read_text())["model"] == str(tiny_file)
    evaluate.main(evaluate.Config(str(run), data="data/tiny/test.jsonl", problems=2, device="cpu"))
    capsys.readouterr()
    for to in ("gguf", "peft", "transformers"):
        export(str(run), to)
    said = capsys.readouterr().out
    assert f"llama-cli -m {tiny_file} --control-vector {run}/vector.gguf" in said
    assert "mind" not in said  # the checksum is that of the file
    assert '"FOLDER OF THE BASE MODEL", gguf_file="small.gguf")' in (run / "peft/README.md").read_text()
    with pytest.raises(SystemExit, match="--to vllm: the base model is a .gguf file.*--to gguf makes"):
        export(str(run), "vllm")
    evaluate.main(evaluate.Config(model=str(tiny_file), data="data/tiny/test.jsonl", problems=2, max_tokens=8))
    assert (tmp_path / "out/small-base/eval.md").is_file()


def test_the_checksum_is_that_of_the_bytes(tiny, tiny_file, tmp_path):
    other = random_llm("qwen2", vocab_size=498)
    files = [write_gguf(tmp_path / folder / "small.gguf", llm) for folder, llm in (("a", tiny[0]), ("b", other))
             if not (tmp_path / folder).mkdir()]  # fmt: skip
    same, different = (model.base_checksum(str(file)) for file in files)
    assert same == model.base_checksum(str(tiny_file)) != different


def test_llama_3s_rotary_frequencies(tmp_path):
    """A file has the factors that divide the frequencies; transformers leaves them out."""
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0)
    rope |= dict(original_max_position_embeddings=8192)
    sizes = dict(vocab_size=498, hidden_size=64, head_dim=16, rope_parameters=rope, max_position_embeddings=16384)
    llm = random_llm("llama", **sizes)
    plain = 500000.0 ** -(torch.arange(8) / 8)
    factors = plain / llm.model.rotary_emb.inv_freq
    assert factors.max() == pytest.approx(8) and factors.min() == pytest.approx(1)
    how = dict(rope_dimension_count=16, tokenizer_pre="llama-bpe")
    found = {}
    for name, f in (("right", factors), ("other", factors**2)):
        file = write_gguf(tmp_path / f"{name}.gguf", permuted(llm), "llama", tensors={"rope_freqs.weight": f}, **how)
        found[name] = file
    loaded = model.load(str(found["right"]), "cpu")[0]
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, llm.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    ids = torch.randint(3, 400, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, llm(ids).logits, rtol=0, atol=1e-3)
    with pytest.raises(SystemExit, match="in another way than Llama 3.1"):
        load_config(str(found["other"]))


def permuted(llm):
    """llama.cpp keeps the two halves of a head's queries and keys interleaved (of the architecture "llama" alone)."""
    from copy import deepcopy

    llm = deepcopy(llm)
    for layer in llm.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            w = projection.weight.view(-1, 2, llm.config.head_dim // 2, llm.config.hidden_size)
            projection.weight = torch.nn.Parameter(w.transpose(1, 2).reshape(projection.weight.shape))
    return llm.requires_grad_(False)


def test_what_would_be_read_wrong_is_refused(tiny, tiny_file, tmp_path):
    scaled = write_gguf(tmp_path / "scaled.gguf", tiny[0], rope_scaling_type=yarn(), rope_scaling_factor=4.0)
    with pytest.raises(SystemExit, match=r"qwen2.rope.scaling.type = yarn, qwen2.rope.scaling.factor = 4.0.*does not"):
        load_config(str(scaled))
    lost = "model.layers.3.mlp.up_proj.weight"
    lacking = write_gguf(tmp_path / "lacking.gguf", tiny[0], leave_out=(lost,))
    with pytest.raises(SystemExit, match=f"lacks 1 weights, such as {lost}"):
        model.load(str(lacking), "cpu")
    bytes_of = tiny_file.read_bytes()
    files = {
        "cut.gguf": bytes_of[: len(bytes_of) // 2],
        "head.gguf": bytes_of[:2000],
        "zip.gguf": b"PK" + bytes_of,
        "old.gguf": bytes_of.replace(b"qwen2", b"qwenX"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as error:
            model.load(str(tmp_path / name), "cpu")
        said = str(error.value)
        assert "transformers reads GGUF files of bloom," in said and "llama, " in said and "\n" not in said, name
    with pytest.raises(SystemExit, match="no file .*gone.gguf"):
        load_config(str(tmp_path / "gone.gguf"))
    with pytest.raises(SystemExit, match="if you mean a .gguf file, give"):
        load_config(str(tmp_path))


def yarn():
    import gguf as library

    return library.RopeScalingType.YARN


def test_digits_stand_alone_where_llama_cpp_splits_them(tiny, tmp_path):
    """With "smollm" as pre-tokeniser transformers would apply merges to digits."""
    file = write_gguf(tmp_path / "digits.gguf", tiny[0], tokenizer_pre="smollm")
    _, tokenizer = model.load(str(file), "cpu")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("is 12, 3")
    assert [text for text, _ in pieces] == ["is", "Ġ", "1", "2", ",", "Ġ", "3"]


def test_vllm_reads_no_gguf_file(tiny_file):
    subject = model.Subject(name=str(tiny_file), device="cpu", sampler="vllm")
    with pytest.raises(SystemExit, match="--sampler vllm: vLLM reads no .gguf file; use --sampler hf"):
        subject.samples_with  # noqa: B018
    assert model.Subject(name=str(tiny_file), device="cpu").samples_with == "hf"


def test_the_list_of_what_can_be_read():
    assert {"llama", "qwen2", "qwen3", "gemma3", "qwen35"} <= set(gguf_file.readable().split(", "))


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_models_whose_control_vectors_llama_cpp_ignores(kind, tmp_path):
    config = AutoConfig.for_model(kind)
    trained = Trained(tmp_path, {}, {3: torch.ones(64)}, {}, SimpleNamespace(config=config))
    with pytest.raises(SystemExit, match=f"ignore the control vector of a {kind} without a word; --to peft"):
        to_gguf(trained, tmp_path / "vector.gguf")
    assert not any(tmp_path.iterdir())
