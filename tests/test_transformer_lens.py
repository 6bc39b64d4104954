"""
TransformerLens as a second opinion on the path patching and attention patterns of analyze.py; the exported line in it.

Optional: it runs where transformer-lens is installed (pip install transformer-lens==4.3.0), and is skipped elsewhere.
"""

import json
from functools import partial

import pytest
import torch

import analyze
import model
from plumbing.export import export
from plumbing.files import TINY

bridge = pytest.importorskip("transformer_lens.model_bridge", reason="transformer-lens is not installed")
IDS = torch.randint(3, 400, (2, 17), generator=torch.Generator().manual_seed(0))
S = 3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
LAYER = 26  # the vector at its end enters block 27


@pytest.fixture(scope="module")
def both():
    llm, _ = model.load("tiny", "cpu")
    return llm, bridge.TransformerBridge.boot_transformers(str(TINY), dtype=torch.float32, device="cpu")


def add(x, hook):
    return x + S


@torch.no_grad()
def test_every_line_and_every_steered_projection(both):
    llm, lens = both
    steered = {}

    def keep(x, hook):
        steered[hook.name] = x.clone()

    parts = {part: f"blocks.27.attn.hook_{part}" for part in "qkv"}
    lens.run_with_hooks(IDS, fwd_hooks=[("blocks.26.hook_out", add)] + [(name, keep) for name in parts.values()])

    def through(heads):
        def replace(x, hook):
            x = x.clone()
            x[:, :, heads] = steered[hook.name][:, :, heads]
            return x

        return replace

    past = ("blocks.27.attn.hook_out", add)  # past the attention: on the residual stream
    lines = {name: partial(model.steer, llm, vectors) for name, vectors in analyze.lines_past(LAYER, S).items()}
    sweeps = analyze.head_ways(llm, LAYER, S)
    pairs = [
        (lines["Unmodified"], [("blocks.26.hook_out", add)]),
        (lines["Skip-Attn"], [past]),
        (lines["Skip-Layer"], [("blocks.27.hook_out", add)]),
        (sweeps["Steer-K"][0], [past, (parts["k"], through([0]))]),
        (sweeps["Steer-V"][0], [past, (parts["v"], through([0]))]),
    ]
    pairs += [(sweeps["Steer-Q"][i], [past, (parts["q"], through([i]))]) for i in range(2)]
    base, seen = llm(input_ids=IDS, use_cache=False).logits, []
    for way, hooks in pairs:
        with way():
            ours = llm(input_ids=IDS, use_cache=False).logits
        theirs = lens.run_with_hooks(IDS, fwd_hooks=hooks)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # of logits of about 10; rounding gives 1e-5 or so
        seen.append(ours - base)
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert (one - other).abs().max() > 0.02  # the conditions are not all the same


@torch.no_grad()
def test_attention_patterns(both):
    llm, lens = both
    _, cache = lens.run_with_cache(IDS[:1])
    text, every = IDS[0].tolist(), torch.arange(IDS.shape[1])
    for layer, pattern in analyze.patterns(llm, text[:5], text[5:], every).items():
        torch.testing.assert_close(pattern, cache[f"blocks.{layer}.attn.hook_pattern"][0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_exported_line_steers_the_bridge(both, tmp_path, capsys):
    llm, lens = both
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny", "layer": "3,26"}))
    vectors = {3: 2 * S.flip(0), LAYER: S}
    model.save_vectors(tmp_path / "vectors.safetensors", vectors, llm, "tiny", 1)
    export(str(tmp_path), "transformers")
    load, *_, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("bridge.add_hook") and second.startswith("bridge.add_hook")
    base = lens(IDS)
    exec("\n".join([load, first, second]), {"bridge": lens})
    theirs = lens(IDS)
    lens.reset_hooks()
    with model.steer(llm, vectors):
        ours = llm(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert (theirs - base).abs().max() > 0.1 and torch.equal(lens(IDS), base)
