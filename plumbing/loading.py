"""
What can go wrong while a model is loaded, and the line that says so. `model.load` calls these three in this order.
"""

import sys
from functools import partial

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plumbing import gguf_file
from plumbing.files import is_gguf, reason, source_of


def load_config(name: str):
    """The config of a model, from its files alone. name: as for `load`."""
    source = source_of(name)
    try:
        read = gguf_file.config_of if is_gguf(source) else partial(AutoConfig.from_pretrained, trust_remote_code=False)
        decoder = type(config := read(source)) in MODEL_FOR_CAUSAL_LM_MAPPING and getattr(config, "is_decoder", True)
        if not decoder or getattr(config, "num_hidden_layers", 1) < 1:  # of encoders is_decoder is False
            raise ValueError(f"its config.json is that of no causal language model, but of {config.model_type}")
    except Exception as error:
        sys.exit(cannot_load(name, error))
    if not config.architectures:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def resolve(device: str, dtype: str, config) -> tuple[str, str]:
    """
    What "auto" stands for: CUDA if there is one, and bfloat16 there. config: of the model.

    On a CPU the checkpoint's own where the processor multiplies bfloat16 (two to four times faster), else float32.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).tolist()  # fails on the device "meta", which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's for a device that is not there
        sys.exit(f"--device {device}: {reason(error)}")
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" or config.dtype == torch.bfloat16 and native_bfloat16() else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        sys.exit(f"--dtype wants auto, float32, bfloat16 or float16, got {dtype!r}")
    return device, dtype


def native_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers (avx512_bf16, amx_bf16, those of ARM)."""
    return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def cannot_load(name: str, error: Exception) -> str:
    wanted = "give 'tiny', a local folder, a .gguf file or a hub id (offline, one that is in the local cache)"
    if is_gguf(name):
        wanted = f"transformers reads GGUF files of {gguf_file.readable()}"
    return f"cannot load the model {name!r}: {wanted}. The reason: {reason(error)}"


def read_pretrained(name: str, dtype: torch.dtype):
    """(llm, tokenizer) as they are in the files, on the CPU; exits unless all is there and fits together."""
    source = source_of(name)
    try:
        if is_gguf(source):
            return gguf_file.load(source, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        how = dict(use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, dtype=dtype)
        llm, found = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **how)
        if lost := [*found["missing_keys"], *found["mismatched_keys"]]:  # transformers would make them up
            raise ValueError(f"{len(lost)} weights are not in its files, or of another shape, such as {lost[0]}")
        rows = llm.get_input_embeddings().num_embeddings
        if tokenizer.vocab_size > rows or not tokenizer("1", add_special_tokens=False).input_ids:
            raise ValueError(f"its tokenizer, of {tokenizer.vocab_size} tokens, is not that of a model of {rows}")
    except Exception as error:  # a folder may hold anything, and tokenizers raises Exception itself
        sys.exit(cannot_load(name, error))
    return llm, tokenizer
