"""
llama.cpp as the reader of an exported control vector: its next-token probabilities are those of the steered model.

Optional: it runs where llama.cpp is installed (pip install llama-cpp-py-sync==0.11739; needs glibc 2.38), else it is
skipped.
"""

import json

import pytest
import torch

import model
from plumbing.export import export

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings", reason="llama-cpp-py-sync is not installed")
try:
    bindings.get_lib()
except RuntimeError as error:  # an older glibc
    pytest.skip(str(error), allow_module_level=True)
IDS = torch.randint(3, 400, (17,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def llm():
    return model.load("tiny", "cpu")[0]


@pytest.fixture(scope="module")
def base_file(llm, tmp_path_factory):
    """The embedded model as GGUF, without its tokenizer."""
    config, path = llm.config, tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in llm.named_parameters():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rows_of(path, depth, width):
    """What llama.cpp makes of the file: direction.N is row N - 1, layers without one are zero."""
    rows = torch.zeros(depth, width)
    for tensor in gguf.GGUFReader(path).tensors:
        rows[int(tensor.name.removeprefix("direction.")) - 1] = torch.tensor(tensor.data)
    return rows


def next_token_logps(base_file, rows=None):
    """Log-probs of the token after IDS in llama.cpp, with a control vector."""
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(base_file).encode(), lib.llama_model_default_params())
    how = lib.llama_context_default_params()
    how.n_ctx, how.n_threads, how.n_threads_batch = 64, 1, 1
    context = lib.llama_init_from_model(loaded, how)
    if rows is not None:
        depth, width = rows.shape
        data = ffi.new("float[]", rows.flatten().tolist())
        assert lib.llama_set_adapter_cvec(context, data, rows.numel(), width, 1, depth) == 0
    tokens = ffi.new("int32_t[]", IDS)
    assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(IDS))) == 0
    logits = torch.tensor(ffi.unpack(lib.llama_get_logits_ith(context, -1), 498))
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    return logits.log_softmax(-1)


@torch.no_grad()
def test_next_token_probabilities(llm, base_file, tmp_path):
    draw = torch.Generator().manual_seed(1)
    vectors = {layer: 3 * torch.randn(64, generator=draw) for layer in (1, 14, 27)}
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny", "layer": "1,14,27"}))
    model.save_vectors(tmp_path / "vectors.safetensors", vectors, llm, "tiny", 1)
    export(str(tmp_path), "gguf")
    rows = rows_of(tmp_path / "vector.gguf", 28, 64)

    def ours(vectors):
        with model.steer(llm, vectors):
            return llm(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1)

    steered, close = next_token_logps(base_file, rows), dict(rtol=0, atol=0.02)
    torch.testing.assert_close(next_token_logps(base_file), ours({}), **close)
    torch.testing.assert_close(steered, ours(vectors), **close)
    for layer in vectors:  # every layer counts, and so does its number
        assert (steered - ours({l: s for l, s in vectors.items() if l != layer})).abs().max() > 0.2
        assert (steered - ours({(l - 1 if l == layer else l): s for l, s in vectors.items()})).abs().max() > 0.2
