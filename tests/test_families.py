"""
Small random models of many families of transformers. Each is trained, answers, is analysed and exported, or the command
ends in one line before anything is sampled. The rows of the table in RESULTS.md are what was found here.

$ python tests/test_families.py        # prints the table, or the rows of the families that are named
"""

import json
import re
import sys
import tempfile
from contextlib import contextmanager, redirect_stdout
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
import plumbing.export  # noqa: E402
import train  # noqa: E402
from plumbing import ask  # noqa: E402
from plumbing.export import AS_LLAMA, export  # noqa: E402
from plumbing.vllm import VLLM_MODELS  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
SIZES = dict(
    vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
    pad_token_id=None, bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id,
)  # fmt: skip
MLA = dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, head_dim=4,
           num_key_value_heads=4)  # fmt: skip
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
    "bamba": MAMBA | {"attn_layer_indices": [1]},
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
    "falcon": {"head_dim": None},
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
    sizes = {name: x for name, x in (SIZES | FAMILIES[kind]).items() if (name, x) != ("head_dim", None)}
    config = AutoConfig.for_model(kind, **sizes)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    llm.config.architectures = [type(llm).__name__]
    return llm


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
    for layer, recompute in ((0, "auto"), (0, "yes"), (1, "auto")):
        rolled = subject.rollouts({layer: s}, rows, 2, keep=layer or None)
        weights, logps = [1.0, -0.5, 2.0, 0.3], [None] * 4
        how = dict(budget=4096, recompute=recompute)
        for batch, found, mask in model.micro_batches(llm, {layer: s}, rolled, list(range(4)), **how):
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
        patch.setattr(model, "load", self.load)
        for user in (model, evaluate, plumbing.export):
            patch.setattr(user, "load_config", lambda name: self.llm.config)
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

    def load(self, *args):
        model.check_family(self.llm)  # as model.load does
        return self.llm, TOKENIZER

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
        how = dict(model=f"random/{self.kind}", data=str(self.data), layer="1", steps=1, prompts=2, samples=2)
        how |= dict(max_tokens=6, reward="random", eval_problems=0, device="cpu", sampler="hf", lr_absolute=0.01)
        return train.main(train.Config(**(how | dict(out=str(self.folder / name)) | changes)))

    def measured(self, sampler="hf"):
        how = dict(data=str(self.data), problems=2, max_tokens=6, device="cpu", sampler=sampler)
        if (self.folder / "end" / "vectors.safetensors").is_file():
            return evaluate.main(evaluate.Config(run=str(self.folder / "end"), **how))
        return evaluate.main(evaluate.Config(model=f"random/{self.kind}", out=str(self.folder), **how))

    def asked(self):
        """--ask decodes on its own: what it writes is the greedy answer."""
        subject = model.Subject(name=f"random/{self.kind}", device="cpu", max_tokens=6)
        (row,), spoken, speak = [{"problem": "Start with 5, add 3."}], [], ask.speak
        how = dict(ask=(row["problem"],), max_tokens=6, device="cpu", sampler="hf", base=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ask, "speak", lambda *given: spoken.append(speak(*given)))
            evaluate.main(evaluate.Config(run=str(self.folder / "low"), **how))
        assert spoken == subject.rollouts({0: self.vector()}, [row], 1, 0.0).completions

    def analysed(self, name: str):
        how = dict(data=str(self.data), n=2, max_tokens=6, device="cpu", sampler="hf")
        return analyze.main(analyze.Config(name, (str(self.folder / "low"),), **how))

    def low(self) -> None:
        """A run with a vector at layer 0, after which a block follows."""
        config = json.loads((self.folder / "end" / "config.json").read_text())
        (self.folder / "low").mkdir()
        (self.folder / "low" / "config.json").write_text(json.dumps(config | {"layer": "0"}))
        file = self.folder / "low" / "vectors.safetensors"
        model.save_vectors(file, {0: self.vector()}, self.llm, f"random/{self.kind}", 0)

    def vector(self) -> torch.Tensor:
        return 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(1))

    def exported(self, to: str) -> None:
        export(str(self.folder / "end"), to, str(self.folder / f"exported-{to}"))


READ = ("lens", "case", "persistence", "attention", "patch")  # all ways in which analyses read a model
HEAD = ("train", "evaluate", "analyses", "all weights", "vLLM", "exports")


def row_of(kind: str, folder: Path, patch) -> tuple[list[str], list[str]]:
    """
    (the cells of its row in the table, the lines with which commands ended) of a family.

    What answers and is trained is compared with the second implementation, too.
    """
    family, lines = Family(kind, folder, patch), []

    def works(command) -> bool:
        line = family.outcome(command)
        lines.extend([line] * (line != "yes"))
        return line == "yes"

    trains, answers = works(partial(family.trained, "end")), works(family.measured)
    subject = model.Subject(name=f"random/{kind}", device="cpu", max_tokens=8, sampler="hf")
    s, reads, formats = family.vector(), [], []
    if answers:
        check_answers(family.llm, subject, s)
    if trains:
        check_gradient(family.llm, subject, s)
        family.low()
        assert works(family.asked)
        reads = [name for name in READ if works(partial(family.analysed, name))]
        # that for vLLM links the weights' files, which are not there; tests/test_export.py has it
        formats = [to for to in ("peft", "gguf", "transformers") if works(partial(family.exported, to))]
        formats += ["vllm"] if kind in AS_LLAMA or works(partial(family.exported, "vllm")) else []
    engine = family.llm.config.architectures[0] in VLLM_MODELS
    if answers and not engine:
        assert not works(partial(family.measured, sampler="vllm")) and "--sampler vllm can steer" in lines[-1]
    # last, because it changes the weights; --layer keeps its default, a layer that these models do not have
    full = works(partial(family.trained, "full", method="full", layer=train.Config.layer))
    missing = [name for name in READ if name not in reads]
    read = "no" if not reads else "all but " + ", ".join(missing) if missing else "all"
    cells = [*(("no", "yes")[x] for x in (trains, answers)), read, ("no", "yes")[full], ("no", "yes")[engine]]
    return [*cells, ", ".join(formats) or "none"], lines


def table(rows: dict[str, list[str]]) -> str:
    """Families with equal rows stand together."""
    alike = {}
    for kind, cells in rows.items():
        alike.setdefault(" | ".join(cells), []).append(f"`{kind}`")
    lines = [f"| {', '.join(kinds)} | {cells} |" for cells, kinds in alike.items()]
    return "\n".join(["| " + " | ".join(["family", *HEAD]) + " |", "|---" * 7 + "|", *lines])


def printed() -> dict[str, list[str]]:
    """{family: cells} as RESULTS.md has them."""
    found = {}
    for line in (ROOT / "RESULTS.md").read_text(encoding="utf-8").split("## Model families")[1].split("\n"):
        kinds, *cells = line.strip("| ").split(" | ")
        found |= dict.fromkeys(re.findall("`(.*?)`", kinds), cells) if len(cells) == len(HEAD) else {}
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_family(kind, tmp_path, monkeypatch):
    cells, lines = row_of(kind, tmp_path, monkeypatch)
    assert cells == printed()[kind]
    assert all("random/" in line or kind in line or "--" in line or "layer" in line for line in lines), lines


def test_the_table_has_every_family():
    assert printed().keys() == FAMILIES.keys() and len(FAMILIES) >= 25


def with_tokenizer(llm, folder: Path, **changes) -> str:
    """A model folder; changes: of its config.json, None takes a setting out."""
    llm.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: x for name, x in config.items() if x is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_config_without_architectures_and_without_a_longest_text(tmp_path):
    name = with_tokenizer(tiny("bloom"), tmp_path, architectures=None, max_position_embeddings=None)
    subject = model.Subject(name=name, device="cpu", max_tokens=4)
    assert subject.context == 32768 and subject.config.architectures == ["BloomForCausalLM"]
    assert len(subject.rollouts({}, [{"problem": "1+1?"}], 1).texts) == 1


def test_weights_that_need_another_package_end_in_one_line(tmp_path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    name = with_tokenizer(tiny("llama"), tmp_path, quantization_config=awq)
    with pytest.raises(SystemExit, match="cannot load the model .*The reason: ") as stopped:
        model.load(name, "cpu")
    assert "\n" not in str(stopped.value)


def test_logits_that_are_scaled_in_an_unknown_way_end_in_one_line(monkeypatch):
    """As a family of tomorrow might: its own logits are not head(h)."""
    llm = tiny("olmo")
    model.check_family(llm)
    llm.lm_head.register_forward_hook(lambda module, x, z: 30 * torch.tanh(z / 30))
    with pytest.raises(SystemExit, match="models of the type olmo scale their logits in a way that is not known"):
        model.check_family(llm)
    assert model.check_family(tiny("llama")) is None


if __name__ == "__main__":
    rows = {}
    for one in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as made, pytest.MonkeyPatch.context() as changed:
            with redirect_stdout(sys.stderr):
                rows[one] = row_of(one, Path(made), changed)[0]
    print(table(rows))
