"""
Small random models of many families of transformers. Each is trained, answers, is analysed and exported, or the command
ends in one line before anything is sampled. The rows of the table in RESULTS.md are what was found here.

$ python tests/test_families.py        # prints the table
"""

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from conftest import ROOT  # noqa: E402

import analyze  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
SIZES = dict(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
    pad_token_id=None, bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id,
)  # fmt: skip
MLA = dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_num_experts=4)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16, mamba_d_ssm=64)
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA,
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4, "n_inner": 48},
    "cohere": {},
    "cohere2": {"sliding_window": 6},
    "deepseek_v2": MLA | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2,
                              topk_group=1, first_k_dense_replace=1),
    "deepseek_v3": MLA | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2,
                              topk_group=1, first_k_dense_replace=1),
    "ernie4_5": {},
    "exaone4": {"sliding_window": 6},
    "falcon": {},
    "falcon_h1": MAMBA,
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_neox": {},
    "gpt_oss": MOE | {"sliding_window": 6},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": MOE,
    "helium": {},
    "jamba": MOE | dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": MOE | {"intermediate_size_mlp": 48, "attention_chunk_size": 16},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "minicpm3": MLA,
    "mixtral": MOE,
    "mpt": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": MOE,
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": MOE | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
}  # fmt: skip


def tiny(kind: str):
    """A small random model of a family, frozen, in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | FAMILIES[kind]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- a second implementation


@contextmanager
def added(llm, layer: int, s):
    """Inside the context s is added to the output of a decoder layer; our hook in a few lines of its own."""

    def add(module, args, output):
        return (output[0] + s, *output[1:]) if isinstance(output, tuple) else output + s

    blocks = [m for m in llm.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    handle = blocks[0][layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def check_answers(llm, subject, s) -> None:
    """Greedy answers are those of `generate`, each prompt for itself, so without padding."""
    rows = [{"problem": "Start with 5, add 3."}, {"problem": "Start with 2. What is the result of it, plus 11?"}]
    greedy = subject.rollouts({0: s}, rows, 1, temperature=0.0)
    for prompt, completion in zip(greedy.prompts, greedy.completions):
        ids = torch.tensor([prompt])
        with added(llm, 0, s):
            how = dict(do_sample=False, max_new_tokens=subject.max_tokens, pad_token_id=0)
            how["eos_token_id"] = model.stop_ids(llm, TOKENIZER)
            want = llm.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :]
        assert completion == want.tolist(), (completion, want.tolist())


def check_gradient(llm, subject, s) -> None:
    """Log-probs and gradient of sampled answers are those of a plain forward pass for each answer."""
    rows = [{"problem": "Start with 5, add 3."}, {"problem": "Start with 2. What is the result of it, plus 11?"}]
    s = s.clone().requires_grad_()
    for layer in (0, 1):
        rolled = subject.rollouts({layer: s}, rows, 2, keep=layer or None)
        weights = [1.0, -0.5, 2.0, 0.3]
        (ours,), logps = torch.zeros(1), [None] * 4
        for batch, found, mask in model.micro_batches(llm, {layer: s}, rolled, list(range(4)), 4096):
            loss = sum(weights[i] * row[m].sum() for i, row, m in zip(batch, found, mask))
            loss.backward()
            for i, row, m in zip(batch, found, mask):
                logps[i] = row[m].detach()
        ours, s.grad = s.grad, None
        for i, (prompt, completion) in enumerate(zip(rolled.prompts, rolled.completions)):
            with added(llm, layer, s):
                scores = llm(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
            want = scores.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(logps[i], want.detach(), atol=2e-4, rtol=1e-4)
            (weights[i] * want.sum()).backward()
        assert s.grad.norm() > 1e-3
        torch.testing.assert_close(ours, s.grad, atol=2e-4 * s.grad.norm().item(), rtol=2e-3)
        s.grad = None


# --------------------------------------------------------------------------------------------- the commands of a family


class Family:
    """The commands of one family; the model is in memory, so that nothing is written and read again."""

    def __init__(self, kind: str, folder: Path, patch):
        self.kind, self.llm, self.folder, self.answered = kind, tiny(kind), folder, 0
        patch.setattr(model, "load", lambda *args: (self.llm, TOKENIZER))
        patch.setattr(model, "load_config", lambda name: self.llm.config)
        patch.setattr(train, "plot_reward", lambda *args: None)
        patch.setattr(analyze, "draw", lambda *args: None)
        rollouts = model.Subject.rollouts

        def counted(*args, **how):
            found = rollouts(*args, **how)
            self.answered += 1
            return found

        patch.setattr(model.Subject, "rollouts", counted)
        rows = [{"problem": f"Start with {i}, add {i}. What is the result?", "answer": str(2 * i)} for i in range(4)]
        self.data = folder / "data.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def outcome(self, command) -> str:
        """ "yes", or the line that it ends with, before anything was sampled."""
        before = self.answered
        try:
            command()
        except SystemExit as stopped:
            line = str(stopped.code)
            assert "\n" not in line and len(line) > 20, line
            assert self.answered == before, f"{self.kind}: after an answer: {line}"
            return line
        return "yes"

    def trained(self, name: str, **changes):
        how = dict(model=f"random/{self.kind}", data=str(self.data), layer="0", steps=1, prompts=2, samples=2)
        how |= dict(max_tokens=6, reward="random", eval_problems=0, device="cpu", sampler="hf", lr_absolute=0.01)
        return train.main(train.Config(**(how | dict(out=str(self.folder / name)) | changes)))

    def measured(self):
        how = dict(data=str(self.data), problems=2, max_tokens=6, device="cpu", sampler="hf")
        if (self.folder / "end" / "vectors.safetensors").is_file():
            return evaluate.main(evaluate.Config(run=str(self.folder / "end"), **how))
        return evaluate.main(evaluate.Config(model=f"random/{self.kind}", out=str(self.folder), **how))

    def analysed(self, name: str):
        how = dict(data=str(self.data), n=2, max_tokens=6, device="cpu", sampler="hf")
        return analyze.main(analyze.Config(name, (str(self.folder / "end"),), **how))


def row_of(kind: str, folder: Path, patch) -> dict[str, str]:
    """What each command does with a family: the row of the table."""
    family = Family(kind, folder, patch)
    found = {"train": family.outcome(partial(family.trained, "end")), "evaluate": family.outcome(family.measured)}
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_family(kind, tmp_path, monkeypatch):
    found = row_of(kind, tmp_path, monkeypatch)
    if found["evaluate"] == "yes":
        subject = model.Subject(name=f"random/{kind}", device="cpu", max_tokens=8, sampler="hf")
        s = 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
        check_answers(subject.llm, subject, s)
        if found["train"] == "yes":
            check_gradient(subject.llm, subject, s)
    print(kind, found)
