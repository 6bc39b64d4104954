"""
What fits into memory: plain arithmetic on a model's config, and what is free. Sizes are in bytes.

Names: b bytes of a number, D width, F width inside the MLP, L layers, H heads, K key-value heads, E size of a head,
V vocabulary.
"""

import os
import resource
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

if sys.path[0] == str(Path(__file__).parent):  # this folder has a vllm.py that is not the package
    sys.path[0] = str(Path(__file__).parents[1])
from plumbing import fast  # noqa: E402
from plumbing.files import FAMILY  # noqa: E402


def free(device) -> int:
    """Memory that nobody uses, of a GPU, or of this machine within the limit of its control group."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it, unused
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        there = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
        limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
        if limit.is_file() and limit.read_text().strip() != "max":
            there = min(there, int(limit.read_text()) - int(used.read_text()))
        return there
    except (OSError, StopIteration, ValueError):  # no Linux
        return 8 << 30


def peak(device) -> int:
    """The most memory that this process has had."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # no Linux
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def heads(config) -> tuple[int, int, int]:
    """(H, K, E) of a config."""
    config = config.get_text_config()
    H = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // H
    return H, getattr(config, "num_key_value_heads", None) or H, size


def cache_bytes(config, b: int) -> int:
    """Keys and values of one token: 2 L K E b. Qwen2.5-0.5B (L 24, K 2, E 64) in bfloat16: 12,288."""
    _, K, E = heads(config)
    return 2 * config.get_text_config().num_hidden_layers * K * E * b


def activation_bytes(config, b: int, weights=False) -> int:
    """
    What the backward pass of one layer keeps of one token: 8 D + (4 H E + 3 F) b.

    Two norms keep their input in float32, attention its queries, keys, values and result, the MLP gate, its
    activation and up. Qwen2.5-0.5B (D 896, H E 896, F 4,864) in bfloat16: 43,520. weights: all weights are trained;
    then every linear module keeps its input, too: (2 D + F) b more.
    """
    config, (H, _, E) = config.get_text_config(), heads(config)
    D, F = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 8 * D + (4 * H * E + 3 * F) * b + (2 * D + F) * b * weights


def state_bytes(config, b: int, tokens: int) -> int:
    """The states that enter one layer: D b for each token."""
    return config.get_text_config().hidden_size * b * tokens


def head_rows(V: int, device="cpu") -> int:
    """Rows that the head runs on at a time, at most 1,024: on a CPU 128 MB of logits, 220 rows of 152k tokens."""
    room = 1 << 27 if torch.device(device).type == "cpu" else 1 << 30  # more rows make a GPU's products faster
    return max(1, min(1024, room // (4 * V)))


ROOM = {"cpu": 2 << 30}  # for activations, at most: more rows at once do not make a CPU faster


def plan(llm, lowest: int, lengths: list, budget: int, recompute="auto", read_once="auto") -> tuple[bool, bool, int]:
    """
    How a step is trained, so that a micro-batch fits into half of what is free: (once, again, tokens of a micro-batch).

    once: a prompt is read once for all of its answers. again: layers keep only their input for the backward pass, and
    are computed again there.
    lowest: the lowest layer with something trained, -1 for all weights. lengths: (prompt, answer) of every row.
    budget: tokens of a micro-batch, at most. recompute, read_once: "yes", "no", or "auto".
    Smaller micro-batches go before computing again, which costs a forward pass, as long as they have 1,024 tokens and
    the longest row fits.
    """
    longest = max((p + c for p, c in lengths), default=0)
    how = llm.config, llm.dtype.itemsize, llm.device.type, free(llm.device)
    again, budget = micro_batch(*how, lowest, longest, budget, recompute)
    once = read_once == "yes" or read_once == "auto" and not again and fast.shareable(llm)
    # a layer that is computed again would fill a cache of the prompts twice
    if again and once:
        sys.exit("--read-once yes wants --recompute no")
    return once, again, budget


def micro_batch(config, b, device: str, there: int, lowest, longest, budget, recompute="auto") -> tuple[bool, int]:
    """(whether layers are computed again, tokens of a micro-batch), see `plan`. there: free bytes."""
    room, above = min(there // 2, ROOM.get(device, there)), config.get_text_config().num_hidden_layers - 1 - lowest
    fits = room // max(1, above * activation_bytes(config, b, weights=lowest < 0))
    again = recompute == "yes" or recompute == "auto" and fits < min(budget, max(1024, longest))
    return again, budget if again else min(budget, max(1, fits))


# ------------------------------------------------------------------------------------------- said before a run starts

PROMPT = 256  # tokens of a prompt, a guess: no prompt has been read before the model is loaded


class Job(NamedTuple):
    """What a command will do with a model."""

    k: int  # answers to a problem
    tokens: int  # of a prompt and its answer
    rows: int = 512  # answers sampled at once
    vllm: float = 0.0  # vLLM's share of the memory
    lowest: int | None = None  # the lowest layer with something trained, -1 for all weights, None if nothing is
    answers: int = 0  # of a step of training, in one process
    micro: int = 16384  # tokens of a micro-batch
    recompute: str = "auto"
    processes: int = 1


class Estimate(NamedTuple):
    always: dict[str, int]  # bytes that are there all the time
    sampling: dict[str, int]  # beside them, one after the other
    training: dict[str, int]
    hints: list[str]  # what does not fit, and the option that helps

    @property
    def most(self) -> int:
        return sum(self.always.values()) + max(sum(self.sampling.values()), sum(self.training.values()))


def numbers(config) -> int:
    """How many weights a model has: it is built without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters())


def estimate(config, b: int, device: str, there: int, job: Job) -> Estimate:
    """The memory that a job needs at most, if answers are as long as they may be. there: free bytes."""
    text, n = config.get_text_config(), numbers(config)
    always, sampling, training, hints = {"weights": n * b}, {}, {}, []
    layer, token = activation_bytes(config, b, job.lowest == -1), cache_bytes(config, 4 if device == "cpu" else b)
    if job.lowest == -1:
        always["gradients, copies, Adam's moments"] = 4 * n + 12 * n // job.processes
    if job.vllm:
        always["vLLM"] = int(job.vllm * there)
        if always["vLLM"] < n * b + token * job.tokens + (1 << 30):  # 1 GB: its own activations and CUDA graphs
            hints.append("vLLM's weights and the keys of one answer: raise --vllm-memory or lower --context")
    left = there - sum(always.values())
    once = int(PROMPT * (1 - 1 / job.k))  # what a row saves if a prompt is there once for its k answers
    if left < 0 and n * b < there:
        ways = "lower --vllm-memory" if job.vllm else "use more processes (torchrun)"
        hints.append(f"what stays in memory all the time: {ways}")
    if not job.vllm:
        most = int(0.7 * left / (token * job.tokens))  # as in model.sample
        if most < job.k:
            hints.append(f"the {job.k} answers to a problem, sampled together: lower --context or --samples")
        rows = max(1, min(job.rows, most, job.answers or job.rows) // job.k) * job.k
        sampling[f"keys and values of {rows} answers"] = rows * token * (job.tokens - once * (device == "cpu"))
        sampling["scores"] = 2 * rows * text.vocab_size * b + rows // job.k * PROMPT * layer
    if job.lowest is not None:
        again, micro = micro_batch(config, b, device, left, job.lowest, job.tokens, job.micro, job.recompute)
        micro = min(max(micro, job.tokens), job.answers * (job.tokens - once * (not again)))
        above, D = text.num_hidden_layers - 1 - job.lowest, text.hidden_size
        what = f"a micro-batch of {micro:,} tokens" + ", layers computed again" * again
        training[what] = micro * (above * (D * b if again else layer) + layer)  # one layer more: what it works with
        training["head"] = 4 * 4 * head_rows(text.vocab_size, device) * text.vocab_size
        if sum(training.values()) > left:
            option = "--context" if micro == job.tokens else "--micro-tokens"
            hints.append(f"{what}: lower {option}, or train higher layers only")
        kept = state_bytes(config, b, job.answers * job.tokens)
        if job.lowest > 0 and kept < left // 4:  # as in train.how_to_sample
            always["kept states"] = kept
    return Estimate(always, sampling, training, hints)


def say(subject, k: int, context: int, **training) -> None:
    """Print what a command will need, before the model is loaded; exit if its weights cannot fit. training: see Job."""
    if subject.name in FAMILY or int(os.environ.get("RANK", 0)) > 0:
        return
    b, there, tokens = getattr(torch, subject.dtype).itemsize, free(subject.device), context
    if subject.max_tokens:
        tokens = min(context, PROMPT + subject.max_tokens)
    share = subject.vllm_memory * (subject.samples_with == "vllm")
    device = torch.device(subject.device).type
    found = estimate(subject.config, b, device, there, Job(k, tokens, subject.rows, share, **training))
    parts = [f"{what} {size / 1e9:.1f}" for part in found[:3] for what, size in part.items()]
    print(f"{subject.name} in {subject.dtype} on {device}")
    print(f"memory in GB, at most: {'; '.join(parts)}; at once {found.most / 1e9:.1f}, free {there / 1e9:.1f}")
    if found.always["weights"] > there and (device == "cuda" or sys.platform == "linux"):  # elsewhere `free` guesses
        way = "; --dtype bfloat16 halves that" if b == 4 else ""
        size = f"they take {parts[0].split()[-1]} GB, and {there / 1e9:.1f} are free"
        sys.exit(f"the weights of {subject.name} do not fit: {size}{way}")
    for hint in found.hints:
        print(f"this may not fit: {hint}")


# the numbers in their config.json: D, F, L, H, K, V, whether the head is the embedding
MODELS = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151_936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152_064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152_064, False),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128_256, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128_256, False),
}


def config_of(name: str):
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    sizes = dict(zip([*names.split(), "tie_word_embeddings"], MODELS[name]))
    return (Qwen2Config if name.startswith("Qwen") else LlamaConfig)(**sizes)


def options(config, card: int, vllm: bool) -> str:
    """What train.py wants on a card of so many GB, for a vector in the middle layer and 128 x 16 answers a step."""
    middle, there = config.num_hidden_layers // 2, int(0.95 * (card << 30))  # the rest is CUDA's own
    for context, micro, share in product((8192, 4096, 2048, 1024), (16384, 4096), (0.45, 0.6, 0.3) if vllm else (0,)):
        if not estimate(config, 2, "cuda", there, Job(16, context, 512, share, middle, 128 * 16, micro)).hints:
            given = f"--context {context}" * (context < 8192) + f" --micro-tokens {micro}" * (micro < 16384)
            given += f" --vllm-memory {share}" * (share not in (0, 0.45))
            return f"`{given.strip()}`" if given else "yes"
    return "no"


if __name__ == "__main__":
    head = [f"{card} GB{how}" for how in ("", ", vLLM") for card in (8, 24, 80)]
    print("| " + " | ".join(["model", *head]) + " |\n" + "|---" * 7 + "|")
    for name in MODELS:
        cells = [options(config_of(name), card, vllm) for vllm in (False, True) for card in (8, 24, 80)]
        print("| " + " | ".join([name, *cells]) + " |")
