"""
What fits into memory: plain arithmetic on a model's config, and what is free. Sizes are in bytes.

Names: b bytes of a number, D width, F width inside the MLP, L layers, H heads, K key-value heads, E size of a head,
V vocabulary.
"""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from plumbing import fast


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


def start(device="cpu") -> int:
    """Begin to measure `peak`; returns what is in use now."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no Linux: the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device) -> int:
    """The most memory that this process has had since `start`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
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
    activation and up. Qwen2.5-0.5B (D 896, H E 896, F 4,864) in bfloat16: 43,520. weights: theirs are trained, too,
    so that every linear module keeps its input: (2 D + F) b more.
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


class Plan(NamedTuple):
    """How a step is trained."""

    share: bool  # a prompt is read once for all of its answers
    recompute: bool  # layers keep their input alone, and are computed again in the backward pass
    budget: int  # tokens of a micro-batch


ROOM = {"cpu": 2 << 30}  # for activations, at most: more rows at once do not make a CPU faster


def plan(llm, lowest: int, lengths: list, budget: int, recompute="auto", read_once="auto") -> Plan:
    """
    What to share and to compute again, so that a micro-batch fits into half of what is free.

    lowest: the lowest layer with something trained, -1 for all weights. lengths: (prompt, answer) of every row.
    budget: tokens of a micro-batch, at most. recompute, read_once: "yes", "no", or "auto".
    Smaller micro-batches go before computing again, which costs a forward pass, as long as they have 1,024 tokens and
    the longest row fits.
    """
    b, room = llm.dtype.itemsize, free(llm.device) // 2
    room = min(room, ROOM.get(llm.device.type, room))
    above = llm.config.get_text_config().num_hidden_layers - 1 - lowest
    fits = room // max(1, above * activation_bytes(llm.config, b, weights=lowest < 0))
    longest = max((p + c for p, c in lengths), default=0)
    again = recompute == "yes" or recompute == "auto" and fits < min(budget, max(1024, longest))
    once = read_once == "yes" or read_once == "auto" and not again and fast.shareable(llm)
    # a layer that is computed again would fill a cache of the prompts twice
    if again and once:
        sys.exit("--read-once yes wants --recompute no")
    return Plan(once, again, budget if again else min(budget, max(1, fits)))
