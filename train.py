"""
Train steering vectors in the residual stream of a frozen LLM with RLOO (arXiv:2509.06608, Sec. 2).

$ python train.py --layer 27                                  # embedded model, 2 CPU cores: 2 minutes, reward 20 -> 87 %
$ python train.py --layer all                                 # one vector per layer (arXiv:2505.18706)
$ python train.py --layer 3,14 --steps 40 --seed 1 --out out/pair
$ python train.py --layer 25 --site input-norm                # a vector at another site (arXiv:2509.06608, Fig. 10)
$ python train.py --layer 14 --method lora --rank 1           # a vector whose size every token decides for itself
$ python train.py --method full                               # all weights, the papers' baseline
$ python train.py --layer 27 --resume                         # goes on where a run was stopped

The loop is the paper's: sample k answers to each of N problems from the steered model, reward 1 if the boxed answer is
right, advantage = reward minus the mean of the prompt's other rewards, one Adam step on the vectors. No KL, no clipped
ratio, no division by a standard deviation, one update per batch of rollouts.

Writes to the run folder: config.json, vectors.safetensors (or weights/), metrics.jsonl, samples.jsonl, state.pt, cost.json,
reward.png.
"""

import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import model
from rewards import grade, grading_timeouts, interval

matplotlib.use("Agg")  # a window system is not needed for a PNG
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data"


@dataclass
class Config:
    """Where two defaults are given, the first is the embedded model's, the second the papers' for real models."""

    layer: str = "27"                      # decoder layers that get a vector, 0-based: 27, -1 (the last), 3,14 or all
    model: str = "tiny"                    # the embedded model, a local folder or a Hugging Face hub id; kept frozen
    method: Literal["vector", "lora", "full"] = "vector"  # vectors; LoRA on mlp.down_proj of the layers; all weights
    site: Literal["input-norm", "attention", "post-attention-norm", "end"] = "end"  # component whose output gets the vector
    rank: int = 1                          # of the LoRA
    orthogonal_to: tuple[str, ...] = ()    # runs to whose vectors at the same place the new one is kept orthogonal
    init: str | None = None                # run whose vectors to start from; those that are not trained stay as they are
    data: str | None = None                # jsonl of {problem, answer}; default data/tiny/train.jsonl; data/deepscaler.jsonl
    held_out: str | None = None            # jsonl for the comparison at the end; default data/tiny/test.jsonl; data/math500.jsonl
    steps: int | None = None               # RLOO updates; default 32; one epoch, 314 on DeepScaleR
    prompts: int | None = None             # problems a step, N; default 16; 128
    samples: int | None = None             # answers to each of them, k; default 16; 16, or 64 for two base models (see recipe)
    context: int | None = None             # tokens of prompt and answer together; default 512; 4096 for Qwen2.5-Math, else 8192
    max_tokens: int | None = None          # longest answer in tokens; default 80; what the context leaves
    template: Literal["native", "qwen-math", "r1"] | None = None  # of the prompt; default native, r1 without a chat template
    system: str | None = None              # system message; default: reason step by step, and put the answer in a box
    lr: float | Literal["paper"] = 0.06    # Adam step on s_l as a share of RMS(h_l) / number of vectors; paper: data/paper.json's
    lr_absolute: float | None = None       # Adam step as it is, undivided; replaces --lr; default of full 3e-4 (tiny); 1e-6
    warmup: int | None = None              # steps over which the learning rate rises to its value; default 3; 3 % of an epoch
    clip: float = 2.0                      # largest norm of the gradient of all vectors together
    temperature: float = 1.0               # of the sampler; training divides its logits by the same number (paper: 1)
    reward: Literal["verify", "sign", "random"] = "verify"  # 1 or 0 by Math-Verify; 1 or -1, as the authors; a coin (control)
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # auto: vllm where it is installed beside a CUDA device
    vllm_memory: float = 0.45              # share of the GPU's memory for vLLM's weights and cache; the rest is for training
    tensor_parallel: int = 1               # GPUs that one vLLM engine is spread over
    weight_cap: float = 2.0                # largest importance weight of a vLLM token; 0: no weights
    rows: int = 512                        # answers sampled at once; lower it when memory is short
    micro_tokens: int | None = None        # tokens of a training forward pass with padding; default 4096; 16384
    checkpoint: bool | None = None         # recompute the layers above the vectors in the backward pass; default no; yes
    eval_problems: int = 400               # held-out problems for the comparison at the end; 0: none
    sample_every: int = 4                  # steps between entries in samples.jsonl
    save_every: int | None = None          # steps between states that --resume can go on from; default 1; 53 with full
    seed: int = 0                          # of the order of the problems, the rollouts and the held-out samples
    out: str | None = None                 # run folder; default out/MODEL-layerLAYER and what is not usual, or out/MODEL-full
    resume: bool = False                   # go on with the run in that folder
    device: str = "auto"                   # cpu, cuda, ...
    dtype: str = "auto"                    # of the frozen model: float32, bfloat16; vectors and Adam are always float32


def of_paper(kind: str, name: str) -> dict:
    """The entry of data/paper.json ("recipes" or "lr") for a model, by the last part of its name: a local copy has it, too."""
    entries = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))[kind]
    return next((entry for hub, entry in entries.items() if Path(hub).name == Path(name).name), {})


def recipe(name: str) -> dict:
    """Defaults for a model: the embedded one's, else those of the authors, and for models they did not train the usual ones."""
    if name in model.FAMILY:
        return dict(
            steps=32, prompts=16, samples=16, context=512, max_tokens=80, warmup=3, micro_tokens=4096, checkpoint=False
        )
    known = {key: value for key, value in of_paper("recipes", name).items() if key in ("prompts", "samples", "context")}
    return dict(prompts=128, samples=16, context=8192, micro_tokens=16384, checkpoint=True) | known


# ------------------------------------------------------------------------------------------------------------ the maths


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """
    Leave-one-out advantages (arXiv:2402.14740): A_i = r_i - mean of the other k - 1 rewards of the same prompt.

    rewards: (N, k), k >= 2. Returns (N, k), every row sums to 0. [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]]
    Paper (P4 Sec. 2): the mean of all k rewards is subtracted; here: of the others, as in RLOO and in the authors' code,
    because the own reward in the baseline biases the gradient. The two differ by the factor k / (k - 1).
    """
    k = rewards.shape[1]
    assert k >= 2, f"leave-one-out needs at least 2 samples per prompt, got {k}"
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(
    logps: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, total_tokens: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """
    -sum_i A_i sum_t w_it log pi(y_it) / total_tokens, for the rows of one micro-batch.

    logps, mask, weights: (B, C); advantages: (B,). total_tokens: completion tokens of the *whole* batch of rollouts, also of
    those with A = 0 and of other micro-batches, so that losses add up to the same sum however the batch is split. A mean per
    answer instead would favour short right answers and long wrong ones (arXiv:2503.20783).
    """
    terms = logps if weights is None else weights * logps
    return -(advantages[:, None] * terms * mask).sum() / total_tokens


def importance_weights(logps: torch.Tensor, sampled: torch.Tensor, cap: float) -> torch.Tensor:
    """
    min(pi(y_t) / mu(y_t), cap) for tokens drawn from mu, the engine's slightly different model of the same weights.

    logps: log pi, sampled: log mu, both (B, C). Without them the gradient is that of the wrong distribution; truncated, since a
    rare large ratio is noise. Per token: the ratio of whole answers is a product of thousands. A constant, not differentiated.
    """
    return (logps.detach() - sampled).exp().clamp(max=cap)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """
    Split rows into batches of at most `budget` tokens, padding included: lists of row numbers, longest rows first.

    A row longer than the budget gets a batch of its own. ([3, 5, 2], 6) -> [[1], [0, 2]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)  # the first row of a batch is its longest: what all of its rows are padded to
        else:
            batches.append([i])
    return batches


def accumulate_gradient(
    llm, vectors, rolled: model.Rollouts, advantages, temperature, budget, total_tokens=None, cap=2.0, recompute=False
) -> dict[str, float]:
    """
    Add d loss / d s_l to the .grad of every vector that requires it. Rows with A = 0 add nothing and are not run.

    advantages: (B,). budget: tokens of a micro-batch. total_tokens: of the completions of all processes, if there are others.
    cap: of the importance weights, if the sampler gave log-probs (0: none). recompute: see model.checkpointed.
    Returns sums over the trained tokens: loss, tokens, nats (-log pi), and with the sampler's log-probs off (|log pi - log mu|),
    off_max, clipped (weights at the cap).
    """
    prompts, completions = rolled.prompts, rolled.completions
    total = total_tokens or sum(map(len, completions))
    rows = advantages.nonzero().flatten().tolist()
    lengths = [len(prompts[i]) + len(completions[i]) for i in rows]
    sums = dict.fromkeys(["loss", "tokens", "nats", "off", "off_max", "clipped"], 0.0)
    lowest = min((model.layer_of(place) for place, s in vectors.items() if s.requires_grad), default=-1)  # -1: all weights train
    above = lowest if recompute else len(model.decoder_layers(llm))
    with model.steer(llm, vectors), model.checkpointed(llm, above):
        for batch in micro_batches(lengths, budget):
            batch = [rows[j] for j in batch]
            logps, mask = model.token_logps(llm, [prompts[i] for i in batch], [completions[i] for i in batch], temperature)
            weights = None
            if rolled.logps is not None:
                sampled = torch.zeros_like(logps)
                for j, i in enumerate(batch):
                    sampled[j, : len(completions[i])] = torch.tensor(rolled.logps[i])
                off = (logps.detach() - sampled).abs()[mask]
                sums["off"], sums["off_max"] = sums["off"] + off.sum().item(), max(sums["off_max"], off.max().item())
                if cap:
                    weights = importance_weights(logps, sampled, cap)
                    sums["clipped"] += (weights[mask] >= cap).sum().item()
            loss = rloo_loss(logps, mask, advantages[batch].to(logps.device), total, weights)
            loss.backward()
            sums["loss"] += loss.item()
            sums["tokens"] += mask.sum().item()
            sums["nats"] -= logps.sum().item()
    return sums


def orthogonal(s: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """s without its part in the span of the orthonormal rows of basis. (D,), (n, D) -> (D,)"""
    return s - (s @ basis.T) @ basis


# ------------------------------------------------------------------------------------------------------ what is trained


def places_of(args: Config, layers: list[int]) -> list:
    """Where something is trained: layers, (layer, site) pairs, or the two matrices of a LoRA; nothing for all weights."""
    if args.method == "full":
        return []
    if args.method == "lora":
        return [(layer, matrix) for layer in layers for matrix in ("lora_A", "lora_B")]
    return [layer if args.site == "end" else (layer, args.site) for layer in layers]


def start_values(args: Config, llm, rms: dict) -> tuple[dict, dict]:
    """
    ({place: fp32 tensor to train}, {place: tensor that stays fixed}). rms: {place: size there}, of every place to train.

    Zeros, so that step 0 is the base model, except a LoRA's A: random, of such a size that A x is about 1, so that a step on
    B moves the stream as far as the same step on a vector. With --init from that run.
    """
    draw = torch.Generator().manual_seed(args.seed)
    c, values = llm.config, {}
    for place in rms:
        if model.name_of(place).endswith("lora_A"):
            values[place] = torch.randn(args.rank, c.intermediate_size, generator=draw) / c.intermediate_size**0.5 / rms[place]
        else:
            values[place] = torch.zeros((c.hidden_size, args.rank) if args.method == "lora" else c.hidden_size)
    given = model.load_vectors(Path(args.init) / "vectors.safetensors", llm)[0] if args.init else {}
    for place in values:
        if place in given and given[place].shape != values[place].shape:
            sys.exit(f"--init {args.init}: its LoRA has another rank than --rank {args.rank}")
        values[place] = given.pop(place, values[place]).to(llm.device).requires_grad_()
    return values, given


def earlier_directions(args: Config, llm, places: list) -> dict:
    """{place: (n, D) orthonormal rows that span the vectors which the runs of --orthogonal-to have there}."""
    runs = [model.load_vectors(Path(run) / "vectors.safetensors", llm)[0] for run in args.orthogonal_to]
    for place in places:
        for run, vectors in zip(args.orthogonal_to, runs):
            if place not in vectors:
                sys.exit(f"--orthogonal-to {run}: that run has no vector at {model.name_of(place)}")
    if not runs:
        return {}
    stacks = {place: torch.stack([vectors[place] for vectors in runs], 1) for place in places}  # (D, n)
    return {place: torch.linalg.qr(stack.double().cpu()).Q.T.float().to(llm.device) for place, stack in stacks.items()}


def owners(llm) -> dict[str, int]:
    """{name of a weight: the process that trains it}, largest weights first, each to the process with the least so far."""
    load, owner = [0] * world()[1], {}
    for name, weight in sorted(llm.named_parameters(), key=lambda pair: -pair[1].numel()):
        owner[name] = load.index(min(load))
        load[owner[name]] += weight.numel()
    return owner


def all_weights(llm, owner: dict[str, int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    This process's share of the weights as fp32 copies to train, and the fp32 gradient of every weight: {name: tensor} each.

    A backward pass through the model adds to the gradients. In bfloat16 a weight ignores steps below 1/256 of itself, and sums of
    small gradients lose most of their digits. Copies and Adam's moments are shared out over the processes, as in ZeRO stage 1
    (arXiv:1910.02054): each of n holds 2 (bfloat16 weight) + 4 (gradient) + 12 / n bytes a weight. The weights stay whole,
    because every process samples.
    """
    copies, gradients = {}, {}

    def hand_over(name, weight):
        gradients[name] += weight.grad.float()
        weight.grad = None

    for name, weight in llm.named_parameters():
        gradients[name] = torch.zeros_like(weight, dtype=torch.float32)
        if owner[name] == world()[0]:
            copies[name] = weight.detach().float().clone().requires_grad_()
        weight.requires_grad_().register_post_accumulate_grad_hook(partial(hand_over, name))
    return copies, gradients


@torch.no_grad()
def write_back(llm, copies: dict[str, torch.Tensor], owner: dict[str, int]) -> None:
    """Copy the trained copies of all processes into the model of each."""
    for name, weight in llm.named_parameters():
        if name in copies:
            weight.copy_(copies[name])
        if world()[1] > 1:
            dist.broadcast(weight, owner[name])


# -------------------------------------------------------------------------------------------------- settings and files


def parse_layers(text: str, depth: int) -> list[int]:
    """The layers of --layer: "27" -> [27]; "-1" -> [depth - 1]; "3,14" -> [3, 14]; "all" -> [0, ..., depth - 1]."""
    if text == "all":
        return list(range(depth))
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        sys.exit(f"--layer wants a layer number, numbers joined by commas, or all; got {text!r}")
    if outside := [layer for layer in layers if not -depth <= layer < depth]:
        sys.exit(f"--layer {outside[0]}: this model has layers 0 to {depth - 1} (or -{depth} to -1 from the end)")
    layers = [layer % depth for layer in layers]
    if len(set(layers)) < len(layers):
        sys.exit(f"--layer {text}: names a layer twice")
    return sorted(layers)


def check(args: Config) -> None:
    """Exit with one line for a setting that cannot work, before anything is loaded or written."""
    least = {
        "steps": 1, "prompts": 1, "samples": 2, "max_tokens": 1, "warmup": 1, "sample_every": 1, "rows": 1, "context": 2,
        "tensor_parallel": 1, "micro_tokens": 1, "rank": 1, "save_every": 1,
    }  # fmt: skip
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            sys.exit(f"--{name.replace('_', '-')} wants at least {low}, got {value}")
    for name in ("temperature", "lr", "lr_absolute", "clip"):
        if (value := getattr(args, name)) not in (None, "paper") and not value > 0:
            sys.exit(f"--{name.replace('_', '-')} wants a number above 0, got {value}")
    if not 0 < args.vllm_memory <= 1:
        sys.exit(f"--vllm-memory wants a share of the GPU's memory between 0 and 1, got {args.vllm_memory}")
    if args.weight_cap and args.weight_cap < 1:
        sys.exit(f"--weight-cap wants at least 1, or 0 for no weights, got {args.weight_cap}")
    other = {"lora": ("site", "orthogonal_to"), "full": ("site", "orthogonal_to", "init")}.get(args.method, ())
    for name in other:
        if getattr(args, name) != getattr(Config, name):
            sys.exit(f"--{name.replace('_', '-')} goes with --method vector, not with {args.method}")
    if args.method == "full" and (args.tensor_parallel > 1 or args.lr == "paper"):
        sys.exit("--method full has its own rate (--lr-absolute), and its weights reach vLLM with --tensor-parallel 1 only")
    if args.dtype == "float16":
        sys.exit("--dtype float16: gradients divided by all tokens of a batch underflow there; use bfloat16 or float32")


def open_run(args: Config, out: Path) -> None:
    """Make the run folder with config.json; with --resume, check that the run there has the same settings."""
    settings = {name: value for name, value in asdict(args).items() if name not in ("out", "resume")}
    config = out / "config.json"
    if args.resume:
        if not (out / "state.pt").is_file():
            sys.exit(f"--resume: no run to go on with in {out}; start one without --resume, or name its folder with --out")
        saved = json.loads(config.read_text())
        settings = json.loads(json.dumps(settings))  # as the file has them: lists, not tuples
        # these change no number that was already computed
        free = "steps eval_problems held_out device sampler vllm_memory tensor_parallel rows micro_tokens checkpoint save_every"
        for name in settings:
            if name not in free.split() and saved.get(name) != settings[name]:
                sys.exit(f"--resume: the run in {out} has {name} = {saved.get(name)!r}, now it is {settings[name]!r}")
    elif (out / "state.pt").exists():
        sys.exit(f"{out} holds a run already: add --resume to go on with it, name another --out, or delete the folder")
    out.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def whole_state(trained: dict, adam: torch.optim.Adam, owner: dict) -> dict:
    """
    {place or name: {value, exp_avg, exp_avg_sq, step}} of all that is trained, whichever process trains it, on the CPU.

    owner: {name: process} if each trains a share; process 0 gets the others' shares, one weight at a time, and they get {}.
    """
    state, rank = {}, world()[0]
    for name in owner or trained:
        if name in trained:
            s = trained[name]
            part = [{"value": s.detach().cpu()} | {key: x.cpu() for key, x in adam.state[s].items()}]
            if owner.get(name, 0) == rank > 0:
                dist.send_object_list(part, dst=0)
        elif rank == 0:
            part = [None]
            dist.recv_object_list(part, src=owner[name])
        if rank == 0:
            state[name] = part[0]
    return state


def save_state(path: Path, step: int, state: dict) -> None:
    """
    Everything that the next step depends on: the trained tensors, Adam's moments and the number of steps done.

    No random state: the order of the problems is a function of (seed, epoch), the rollouts are one of (seed, step).
    """
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "trained": state}, temporary)
    temporary.replace(path)  # a stop in the middle of writing leaves the last step's state whole


def save_weights(folder: Path, llm, tokenizer) -> None:
    """Write the model in the Hugging Face format."""
    temporary = folder.with_suffix(".tmp")
    llm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_cost(path: Path, args: Config, parameters: int, optimizer_bytes: int, metrics: list[dict], sampler: str) -> None:
    """cost.json: what this way of training costs (arXiv:2505.18706, Tables 3 and 5). Seconds are medians over steps."""
    cost = {
        "method": args.method + (f"-{args.rank}" if args.method == "lora" else ""),
        "trained_parameters": parameters,
        "optimizer_bytes": optimizer_bytes,  # Adam's moments, of all processes that train a share; fp32 copies are not in it
        "update_seconds": statistics.median(m["seconds_update"] for m in metrics),  # clipping, Adam, the copy into the model
        "sync_seconds": statistics.median(m["seconds_sync"] for m in metrics),  # until the sampler has it; 0: it is the model
        "sampler": sampler,
    }
    path.write_text(json.dumps(cost, indent=2) + "\n")


def keep_lines(path: Path, steps: int) -> None:
    """Drop the lines of steps that the saved state does not contain (stopped between the log and the state)."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] < steps:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break  # a line that a kill or a full disk cut off; it is the last one
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def batch_of_problems(rows: list[dict], n: int, step: int, seed: int) -> list[dict]:
    """The n problems of a step: the data in a new order every epoch, a function of (seed, step) alone."""
    per_epoch = len(rows) // n
    order = list(range(len(rows)))
    random.Random(f"{seed}:{step // per_epoch}").shuffle(order)
    first = step % per_epoch * n
    return [rows[i] for i in order[first : first + n]]


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a jsonl file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def some_samples(step: int, batch: list[dict], texts: list[str], rewards: torch.Tensor, n: int = 4) -> list[dict]:
    """Rows for samples.jsonl: the first n answers to each of the first n problems of a step, with their rewards."""
    k = rewards.shape[1]
    first = batch[: min(n, len(texts) // k)]  # texts may be those of process 0 alone
    return [
        {"step": step, "problem": row["problem"], "answer": row["answer"], "completion": texts[i * k + j],
         "reward": rewards[i, j].item()}
        for i, row in enumerate(first) for j in range(min(n, k))
    ]  # fmt: skip


def plot_reward(metrics: list[dict], base: float, path: Path) -> None:
    """The share of right answers of every step, with the level of the unsteered model dashed. base: 0 to 1."""
    fig, ax = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    ax.plot([m["step"] for m in metrics], [100 * m["accuracy"] for m in metrics], "o-", ms=3, label="steered, training")
    ax.axhline(100 * base, color="black", linestyle="--", label="base model")
    ax.set(xlabel="step", ylabel="reward: right answers (%)", title="RLOO on steering vectors", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left")
    fig.savefig(path, dpi=150)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------- several processes

# torchrun starts a process for every GPU. Each samples and trains on its share of a step's prompts; the gradients of the
# vectors are summed, a few kilobytes, and every process takes the same Adam step. With --method full every process takes the step
# of its share of the weights (owners), and they are exchanged (write_back). Process 0 alone writes and prints.


def world() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items: list) -> list:
    """This process's part of a list: the parts of all processes in order are the list."""
    rank, n = world()
    return items[rank * len(items) // n : (rank + 1) * len(items) // n]


def everyone(items: list) -> list:
    """The lists of all processes, joined in their order."""
    parts = [items] * world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def join_processes(device: str) -> str:
    """Meet the other processes if torchrun started this one; returns the device to use."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # objects by gloo, gradients by nccl
    return device


# ------------------------------------------------------------------------------------------------------------- the loop


def prepare(args: Config) -> tuple:
    """Load problems and model, fill in the recipe: (complete settings, problems, held-out ones, llm, tokenizer, layers)."""
    check(args)
    args = replace(args, **{name: value for name, value in recipe(args.model).items() if getattr(args, name) is None})
    data = args.data or (model.TINY / "train.jsonl" if args.model in model.FAMILY else DATA / "deepscaler.jsonl")
    if args.method == "full" and args.lr_absolute is None:
        args = replace(args, lr_absolute=3e-4 if args.model in model.FAMILY else 1e-6)
    args = replace(args, save_every=args.save_every or (53 if args.method == "full" else 1))  # the authors': 6 a run
    if args.data is None and not data.is_file():
        sys.exit(f"no problems at {data}: run `python data/prepare.py deepscaler math500`, or give --data FILE")
    rows = model.read_problems(data)
    held_out = args.held_out
    if held_out is None and args.data is None:
        held_out = model.TINY / "test.jsonl" if args.model in model.FAMILY else DATA / "math500.jsonl"
        held_out = held_out if held_out.is_file() else None
    held_out = model.read_problems(held_out)[: args.eval_problems] if held_out and args.eval_problems else []
    if len(rows) < args.prompts:
        sys.exit(f"--prompts {args.prompts}: the data has only {len(rows)} problems")
    if args.prompts % world()[1]:
        sys.exit(f"--prompts {args.prompts} cannot be shared by {world()[1]} processes evenly")
    llm, tokenizer = model.load(args.model, args.device, args.dtype)
    layers = parse_layers(args.layer, len(model.decoder_layers(llm)))
    args = replace(args, context=min(args.context, llm.config.max_position_embeddings))

    def fits(row):
        return len(model.prompt_ids(tokenizer, row["problem"], args.system, args.template)) < args.context

    fit, held_out = [row for row in rows if fits(row)], [row for row in held_out if fits(row)]
    if len(fit) < len(rows) and world()[0] == 0:
        print(f"left out {len(rows) - len(fit)} of {len(rows)} problems, whose prompts fill the context of {args.context} tokens")
    if len(fit) < args.prompts:
        sys.exit(f"--context {args.context}: only {len(fit)} problems have prompts that leave room for an answer")
    epoch = len(fit) // args.prompts  # the warm-up is a share of the epoch, so that more --steps of a run change nothing before
    args = replace(args, steps=args.steps or epoch, warmup=args.warmup or math.ceil(0.03 * epoch))
    return args, fit, held_out, llm, tokenizer, layers


def learning_rates(args: Config, rms: dict, width: int) -> dict:
    """
    The size of an Adam step on everything that is trained, in its own units: {place: lr}. rms: {place: size of what is steered}.

    width: F, what a LoRA's A reads; its entries are about 1 / (sqrt(F) RMS(x)), and the step is a share of that.
    """
    if args.lr_absolute is not None:
        return dict.fromkeys(rms, args.lr_absolute)
    if args.lr == "paper":
        found = of_paper("lr", args.model)
        # all layers together have one rate of their own, and so has any site but the end of a layer
        kind = f"lora{args.rank}_layers" if args.method == "lora" else "layers"
        lr = {place: found.get(kind, {}).get(str(model.layer_of(place))) for place in rms}
        if args.site != "end" or (args.layer == "all" and args.method == "vector"):
            lr = dict.fromkeys(rms, found.get("site" if args.site != "end" else "all"))
        if lacking := [place for place in lr if lr[place] is None]:
            sys.exit(f"--lr paper: data/paper.json has no rate for layer {model.name_of(lacking[0])} of {args.model!r}")
        return lr
    # divided by the number of vectors, because their sum moves the stream: with 28 of them the undivided step diverges
    vectors = sum(not model.name_of(place).endswith("lora_A") for place in rms)
    return {
        place: args.lr / (width**0.5 * size) if model.name_of(place).endswith("lora_A") else args.lr * size / vectors
        for place, size in rms.items()
    }


def name_of_run(args: Config) -> str:
    """The folder's name: MODEL-layerLAYER, and every choice that is not the usual one."""
    if args.method == "full":
        parts = [Path(args.model).name, "full"]
    else:
        parts = [Path(args.model).name, f"layer{args.layer}"]
        parts += [args.site] * (args.site != "end") + [f"lora{args.rank}"] * (args.method == "lora")
        parts += [f"orthogonal{len(args.orthogonal_to)}"] * bool(args.orthogonal_to)
    return "-".join(parts + [f"reward-{args.reward}"] * (args.reward != "verify"))


def main(args: Config) -> None:
    args = replace(args, device=join_processes(args.device))
    args, rows, held_out, llm, tokenizer, layers = prepare(args)
    rank, processes = world()
    out = Path(args.out or f"out/{name_of_run(args)}")
    prompts = [model.prompt_ids(tokenizer, row["problem"], args.system, args.template) for row in rows[:16]]
    rms = model.residual_rms(llm, prompts, places_of(args, layers))
    lr = learning_rates(args, rms, llm.config.intermediate_size)
    vectors, fixed = start_values(args, llm, rms)
    steering = fixed | vectors  # what is added to the stream; {} where all weights are trained
    earlier = earlier_directions(args, llm, list(vectors))
    if rank == 0:
        open_run(args, out)
    everyone([None])  # nobody goes on before the folder is there
    full = args.method == "full"
    owner = owners(llm) if full else {}
    trained, gradients = all_weights(llm, owner) if full else (vectors, {p: torch.zeros_like(s) for p, s in vectors.items()})
    for place, s in trained.items():
        s.grad = gradients[place]  # a backward pass adds to it
    # a group for each lr, no weight decay. eps: gradients are small because the loss is divided by all tokens of the batch;
    # with the usual 1e-8 the smallest coordinates moved 5 % less than lr on the embedded model
    groups = {name: {"params": [s], "lr": lr.get(name, args.lr_absolute)} for name, s in trained.items()}
    highest = [group["lr"] for group in groups.values()]
    adam = torch.optim.Adam(groups.values(), eps=1e-15)
    first = 0
    if args.resume:
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True, mmap=True)  # each reads its share alone
        if "trained" not in state:
            sys.exit(f"{out}/state.pt was written by an older train.py: delete the folder, or name another --out")
        for place, s in trained.items():
            moments = state["trained"][place]
            s.data.copy_(moments.pop("value"))
            adam.state[s] = {name: x if name == "step" else x.to(s.device) for name, x in moments.items()}
        first = state["step"]
        del state
        if full:
            write_back(llm, trained, owner)
    if rank == 0:
        keep_lines(out / "metrics.jsonl", first)
        keep_lines(out / "samples.jsonl", first)
        for place in vectors:
            print(f"layer {model.name_of(place)}: size there {rms[place]:.2f}, learning rate {lr[place]:.3g} a step")
    engine = model.open_engine(
        args.sampler, args.model, llm, prompts[:8], args.context, args.vllm_memory, args.tensor_parallel, args.rows, steering
    )  # fmt: skip
    if engine is not None and full and args.resume:
        engine.push_weights(llm)

    def answer(problems, k, temperature, seed, given, bar=None):
        return model.rollouts(
            llm, tokenizer, given, problems, k, args.max_tokens, temperature, seed, args.system, args.template,
            context=args.context, max_rows=args.rows, engine=engine, bar=bar,
        )  # fmt: skip

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="reward  ?", unit="step", disable=rank > 0)
    try:
        for step in bar:
            batch = batch_of_problems(rows, args.prompts, step, args.seed)
            seeds = model.prompt_seeds(args.seed * 1_000_003 + step, range(len(batch)))
            began = time.perf_counter()
            problems = [row["problem"] for row in share(batch)]
            rolled = answer(problems, args.samples, args.temperature, share(seeds), steering)
            sampled = time.perf_counter()
            timeouts = grading_timeouts()
            right = grade(rolled.texts, [row["answer"] for row in share(batch) for _ in range(args.samples)])
            timeouts = grading_timeouts() - timeouts
            right, lengths = everyone(right), everyone([len(c) for c in rolled.completions])
            rewards = [2 * x - 1 for x in right] if args.reward == "sign" else right
            if args.reward == "random":
                coin = random.Random(f"coin:{args.seed}:{step}")
                rewards = [float(coin.random() < 0.5) for _ in right]
            rewards = torch.tensor(rewards).view(-1, args.samples)  # (N, k)
            advantages = torch.tensor(share(rloo_advantages(rewards).tolist())).flatten()  # (N*k,) of this process
            graded = time.perf_counter()

            for group, size in zip(adam.param_groups, highest):
                group["lr"] = size * min(1, (step + 1) / args.warmup)
            for gradient in gradients.values():
                gradient.zero_()
            sums = accumulate_gradient(
                llm, steering, rolled, advantages, args.temperature, args.micro_tokens, sum(lengths), args.weight_cap,
                args.checkpoint,
            )  # fmt: skip
            if processes > 1:
                for gradient in gradients.values():
                    dist.all_reduce(gradient)
            sums = everyone([sums])
            total = {name: sum(part[name] for part in sums) for name in sums[0]}
            began_update = time.perf_counter()
            for place, basis in earlier.items():
                gradients[place].copy_(orthogonal(gradients[place], basis))
            grad_norm = torch.nn.utils.get_total_norm(gradients.values()).item()  # of all, whoever trains them
            torch.nn.utils.clip_grads_with_norm_(trained.values(), args.clip, torch.tensor(grad_norm))
            adam.step()
            for place, basis in earlier.items():  # Adam divides every coordinate by a size of its own, which turns the step
                trained[place].data = orthogonal(trained[place].data, basis)
            if full:
                write_back(llm, trained, owner)
            if llm.device.type == "cuda":
                torch.cuda.synchronize()
            updated = time.perf_counter()
            if engine is not None and full:
                engine.push_weights(llm)

            ended = everyone(rolled.ended)
            metrics = {
                "step": step,
                "reward_mean": rewards.mean().item(),  # 0 to 1
                "accuracy": sum(right) / len(right),  # share of right answers; differs from the reward if that is random
                "prompts_all_equal": (rewards == rewards[:, :1]).all(1).float().mean().item(),  # share: no signal from them
                "truncated": 1 - sum(ended) / len(ended),  # share of answers cut off at their limit
                "tokens_mean": sum(lengths) / len(lengths),
                "loss": total["loss"],
                "surprise_nats_per_token": total["nats"] / max(total["tokens"], 1),  # mean -log pi: estimates the entropy
                "grad_norm": grad_norm,  # before clipping
                "vector_norm": {model.name_of(place): s.norm().item() for place, s in vectors.items()},
                "seconds_sampling": sampled - began,
                "seconds_grading": graded - sampled,
                "seconds_training": updated - graded,
                "seconds_update": updated - began_update,  # of that: clipping, Adam, the copy into the model
                "seconds_sync": engine.sync_seconds if engine else 0.0,  # to give the sampler what was trained
                "tokens_per_second_sampling": sum(lengths) / (sampled - began),  # of all processes
                "grading_timeouts": sum(everyone([timeouts])),  # comparisons given up in this step
            }
            if engine is not None:  # a few 1e-2 nats in bfloat16; a jump means that the engine has other vectors
                metrics |= {
                    "mismatch_mean": total["off"] / max(total["tokens"], 1),
                    "mismatch_max": max(part["off_max"] for part in sums),
                    "weights_clipped": total["clipped"] / max(total["tokens"], 1),
                }
            if rank == 0:
                if step % args.sample_every == 0:
                    append(out / "samples.jsonl", some_samples(step, batch, rolled.texts, rewards))
                append(out / "metrics.jsonl", [metrics])
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                state = whole_state(trained, adam, owner)
                if rank == 0:
                    if full:
                        save_weights(out / "weights", llm, tokenizer)
                    else:
                        model.save_vectors(out / "vectors.safetensors", steering, llm, args.model, step + 1)
                    save_state(out / "state.pt", step + 1, state)  # last: a step counts once this is on the disk
                del state  # of large models it is large
            bar.set_description(f"reward {100 * metrics['reward_mean']:.0f} %")
            if rank == 0 and step == first and metrics["truncated"] > 0.9:
                bar.write(f"{100 * metrics['truncated']:.0f} % of the answers are cut off: raise --context or --max-tokens")

        history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if rank == 0 else []
        moments = sum(x.numel() * x.element_size() for moments in adam.state.values() for x in moments.values())
        moments = sum(everyone([moments])) if full else moments
        if rank == 0:
            parameters = sum(gradient.numel() for gradient in gradients.values())
            write_cost(out / "cost.json", args, parameters, moments, history, "vllm" if engine else "hf")
        base = None
        if held_out:
            if full:  # the base model's answers with the base model's weights
                model.replace_weights(llm, args.model)
                if engine is not None:
                    engine.push_weights(llm)
            base = held_out_answers("base", answer, held_out, {}, args.seed)
            if full:
                write_back(llm, trained, owner)
                if engine is not None:
                    engine.push_weights(llm)
            steered = held_out_answers("steered", answer, held_out, steering, args.seed)
            if rank == 0:
                print_comparison(held_out, base, steered)
        if rank == 0:
            # step 0 samples with zero vectors: the base model, on training problems
            level = history[0]["accuracy"] if base is None else sum(base[1.0][0]) / len(held_out)
            plot_reward(history, level, out / "reward.png")
            print(f"\nwrote {out}/ with reward.png; now: python evaluate.py {out}" + (" --data FILE" if args.data else ""))
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        bar.close()
        why = "stopped"
        if isinstance(error, torch.OutOfMemoryError):
            why = "out of memory: lower --micro-tokens (training), --rows (sampling) or --vllm-memory (vLLM's share of the GPU)"
        done = (out / "state.pt").exists()
        sys.exit(why + (f"; the same command with --resume goes on from the last finished step in {out}" if done else ""))


def held_out_answers(name: str, answer, rows: list[dict], vectors: dict, seed: int) -> dict:
    """
    One answer to every problem at T = 1 and greedily: {temperature: (correct, texts)}.

    answer(problems, k, temperature, seeds, vectors, bar) gives rollouts, as in main.
    """
    found, seeds = {}, model.prompt_seeds(seed, range(len(rows)))
    for temperature in (1.0, 0.0):
        bar = f"{name}, held out, T = {temperature:g}" if world()[0] == 0 else None
        rolled = answer([row["problem"] for row in share(rows)], 1, temperature, share(seeds), vectors, bar)
        correct = everyone(grade(rolled.texts, [row["answer"] for row in share(rows)]))
        found[temperature] = correct, everyone(rolled.texts)
    return found


def print_comparison(rows: list[dict], base: dict, steered: dict) -> None:
    """Print accuracies with intervals, their difference paired by problem, and three answers of each."""
    print(f"\nright answers to {len(rows)} held-out problems in %, with 95 % intervals over problems")
    print(f"{'':12}{'T = 1':>22}{'greedy':>22}")
    for name in ("base", "steered", "difference"):
        cells = ""
        for temperature in (1.0, 0.0):
            before, after = base[temperature][0], steered[temperature][0]
            got = {"base": before, "steered": after, "difference": [a - b for a, b in zip(after, before)]}[name]
            low, high = interval([[c] for c in got])
            cells += f"{f'{100 * sum(got) / len(got):.1f} [{100 * low:.1f}, {100 * high:.1f}]':>22}"
        print(f"{name:12}{cells}")
    for i, row in enumerate(rows[:3]):
        print(f"\n{row['problem']}  (answer: {row['answer']})")
        for name, (correct, texts) in (("base", base[1.0]), ("steered", steered[1.0])):
            verdict = "right" if correct[i] else "wrong"
            print(f"  {name}, T = 1, {verdict}: " + texts[i].replace("\n", "\n    "))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
    if dist.is_initialized():
        dist.destroy_process_group()
