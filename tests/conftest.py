"""Random 3-layer models that every test can afford; all sizes differ, so that a swapped axis cannot pass."""

import os
import sys
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
