"""
A model in a GGUF file, the format of llama.cpp: read by transformers, then a plain model of dense weights.

transformers reads some of these files wrong without saying so: it ignores scaled rotary frequencies, does not know
tokenizers that split numbers into digits, and makes up weights that a file lacks. This module corrects what it can, and
ends the program with one line where it cannot.
"""

import sys
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

try:
    from transformers import GgufConfig
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, read_gguf_metadata
except ImportError:  # transformers before 5.23
    GgufConfig, GGUF_CONFIG_ARCHS, read_gguf_metadata = None, (), None

DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")  # in llama.cpp


def readable() -> str:
    """The architectures that transformers reads from a GGUF file."""
    return ", ".join(sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS}))


def read(kind, path: Path, **how):
    """kind.from_pretrained of the file alone: a tokenizer or config that lies beside it may be another model's."""
    with TemporaryDirectory() as empty:
        return kind.from_pretrained(empty, gguf_file=str(path.absolute()), trust_remote_code=False, **how)


def config_of(path: Path):
    if GgufConfig is None:
        raise ImportError("GGUF files need transformers 5.23 or newer")
    return deepcopy(_config_of(path.absolute(), path.stat().st_mtime_ns))


@lru_cache
def _config_of(path: Path, changed: int):
    """Kept, because reading a large vocabulary takes seconds. changed: when, so that another file is read again."""
    config, (says, names) = read(AutoConfig, path), read_gguf_metadata(str(path))
    scaled = {key: value for key, value in says.items() if ".rope.scaling." in key and value not in ("none", 1)}
    scaled |= {name: "a tensor" for name in names if name.startswith("rope_factors")}
    if scaled and config.model_type != "gpt_oss":  # the only one whose scaling transformers reads
        what = ", ".join(f"{key} = {value}" for key, value in scaled.items())
        sys.exit(f"{path} scales its rotary frequencies ({what}); transformers does not read that: use the original")
    if "rope_freqs.weight" in names and config.model_type == "llama":
        config.rope_parameters = llama3_rope(config, path)
    return config


def llama3_rope(config, path: Path) -> dict:
    """
    The settings of Llama 3.1's rotary frequencies, which a GGUF file holds as the factors that divide them.

    All published models differ in the largest factor alone: 8 or 32.
    """
    from gguf import GGUFReader

    factors = next(t.data for t in GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    plain = deepcopy(config)
    usual = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain.rope_parameters = config.rope_parameters | usual | {"factor": float(factors.max())}
    base = ROPE_INIT_FUNCTIONS["llama3"](plain, "cpu")[0]
    theta = config.rope_parameters["rope_theta"]
    wanted = theta ** -(torch.arange(len(factors)) / len(factors)) / torch.tensor(factors)
    if not torch.allclose(base, wanted, rtol=1e-3):
        sys.exit(f"{path} scales its rotary frequencies in another way than Llama 3.1: use the original")
    return plain.rope_parameters


def load(path: Path, dtype: torch.dtype) -> tuple:
    """(llm, tokenizer), the weights dense in this dtype."""
    config, says = config_of(path), read_gguf_metadata(str(path))[0]
    how = dict(config=config, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    llm, found = read(AutoModelForCausalLM, path, output_loading_info=True, **how)
    if found["missing_keys"]:  # transformers makes them up
        sys.exit(f"{path} lacks {len(found['missing_keys'])} weights, such as {min(found['missing_keys'])}")
    llm.hf_quantizer = None  # it is dense now; transformers would not save it otherwise
    llm.config._name_or_path = str(path)
    tokenizer, kind = read(AutoTokenizer, path), says.get("tokenizer.ggml.pre")
    if kind in DIGITS_APART:  # transformers does not know these kinds, and would join "12" to one token
        back = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        back.pre_tokenizer = pre_tokenizers.Sequence([digits, back.pre_tokenizer])
    return llm, tokenizer
