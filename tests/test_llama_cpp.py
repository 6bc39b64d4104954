"""
llama.cpp as the reader of an exported control vector: its next-token probabilities are those of the steered model.

The built-in model is written as a GGUF file in float32. SmolLM2's file is the very one that we load, quantised:
llama.cpp multiplies with its 4-bit blocks and rounds the states to 8 bits, we with the dequantised weights.
ik-llama-cpp-python has llama.cpp for x86-64; elsewhere these tests are skipped.
"""

import ctypes
import json

import pytest
import torch
from conftest import write_gguf

import model
from plumbing.export import export

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
bindings = pytest.importorskip("ik_llama_cpp._ctypes_api", reason="ik-llama-cpp-python is not installed")
from ik_llama_cpp._internals import IkContext, IkModel, make_batch_range  # noqa: E402

apply_vector = bindings._lib.llama_control_vector_apply
apply_vector.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int32] * 3]
apply_vector.restype = ctypes.c_int32

PROBLEMS = [  # numbers of one to four digits after all that can stand before one: where pre-tokenisers differ
    "Start with 16, add 1, subtract 15. What is the result?",
    "A farm has 1024 hens, 7 of them white; 12% lay eggs for $3.50 at 6:45.\n\n3+4=7 and x2y33?",
]


def rows_of(path, depth, width):
    """What llama.cpp makes of the file: direction.N is row N - 1, layers without one are zero."""
    rows = torch.zeros(depth, width)
    for tensor in gguf.GGUFReader(path).tensors:
        rows[int(tensor.name.removeprefix("direction.")) - 1] = torch.tensor(tensor.data)
    return rows


def its_logps(loaded: IkModel, ids, rows=None):
    """Log-probs of the token after every token in llama.cpp, with a control vector: (tokens, V)."""
    context = IkContext(loaded, n_ctx=256, n_threads=1, flash_attn=False)
    if rows is not None:
        depth, width = rows.shape
        data = rows.contiguous()
        assert apply_vector(context.ctx, data.data_ptr(), data.numel(), width, 1, depth) == 0
    found = []
    for start in range(0, len(ids), 16):  # with 4-bit blocks this build errs in batches of 32 and more tokens
        part = ids[start : start + 16]
        batch = make_batch_range(part, pos_start=start)
        for i in range(len(part)):
            batch.logits[i] = 1
        assert context.decode(batch) == 0
        found += [torch.tensor(context.get_logits(i)[: loaded.n_vocab]) for i in range(len(part))]
        bindings.llama_batch_free(batch)
    context.close()
    return torch.stack(found).log_softmax(-1)


@torch.no_grad()
def our_logps(llm, ids, vectors):
    with model.steer(llm, vectors):
        return llm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture
def exported(tmp_path):
    """The control vector of a run with these vectors, as rows."""

    def make(name, llm, vectors):
        (tmp_path / "config.json").write_text(json.dumps({"model": name, "layer": "1"}))
        model.save_vectors(tmp_path / "vectors.safetensors", vectors, llm, name, 1)
        export(str(tmp_path), "gguf")
        return rows_of(tmp_path / "vector.gguf", llm.config.num_hidden_layers, llm.config.hidden_size)

    return make


def test_next_token_probabilities_of_the_built_in_model(exported, tmp_path):
    llm, tokenizer = model.load("tiny", "cpu")
    ids, draw = model.prompt_ids(tokenizer, PROBLEMS[0]), torch.Generator().manual_seed(1)
    vectors = {layer: 3 * torch.randn(64, generator=draw) for layer in (1, 14, 27)}
    loaded, close = IkModel(str(write_gguf(tmp_path / "tiny.gguf", llm))), dict(rtol=0, atol=0.02)
    torch.testing.assert_close(its_logps(loaded, ids), our_logps(llm, ids, {}), **close)
    steered = its_logps(loaded, ids, exported("tiny", llm, vectors))
    torch.testing.assert_close(steered, our_logps(llm, ids, vectors), **close)
    for layer in vectors:  # every layer counts, and so does its number
        without, elsewhere = ({l: s for l, s in vectors.items() if l != layer} for _ in range(2))
        elsewhere[layer - 1] = vectors[layer]
        for wrong in (without, elsewhere):
            assert (steered - our_logps(llm, ids, wrong)).abs().max() > 0.2
    loaded.close()


def test_next_token_probabilities_of_smollm2_on_its_own_file(smollm2_file, exported, capsys):
    llm, tokenizer = model.load(str(smollm2_file), "cpu")
    loaded = IkModel(str(smollm2_file))
    for problem in PROBLEMS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
        )
        ids = model.prompt_ids(tokenizer, problem, system="")
        assert loaded.tokenize(text, add_bos=False, special=True) == ids
    size = model.residual_rms(llm, [ids], [12])[12]
    s = size * torch.randn(576, generator=torch.Generator().manual_seed(0))
    steered = its_logps(loaded, ids, exported(str(smollm2_file), llm, {12: s}))

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)[1:].mean().item()  # the first token is an attention sink of its own

    found = {"base": kl(its_logps(loaded, ids), our_logps(llm, ids, {}))}
    found |= {layer: kl(steered, our_logps(llm, ids, {layer: s})) for layer in (11, 12, 13)}
    print(found)
    loaded.close()
    assert max(found["base"], found[12]) < 0.03 and min(found[11], found[13]) > 0.3, found
