"""
How the problems of a step are shared out over the processes of torchrun, and what they found is put together again.

torchrun starts a process for every GPU. Each answers and trains on its share of a step's problems, all k answers to a
problem in one process. The gradients are summed, for vectors a few kilobytes, and every process takes the same Adam
step. With --method full every process takes the step of its part of the weights. Process 0 alone writes and prints.
Without torchrun there is one process, which has the whole of everything.
"""

import os
import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data.runs import append, written
from rewards import grading_timeouts


def join_processes(device: str, prompts: int) -> str:
    """Meet the other processes if torchrun started this one; returns the device to use. prompts: problems of a step."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # objects by gloo, gradients by nccl
    if prompts % world()[1]:
        sys.exit(f"--prompts {prompts} cannot be shared by {world()[1]} processes evenly")
    return device


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank() -> int:
    return world()[0]


def share(items: list) -> list:
    """This process's part of a list: the parts of all processes in order are the list."""
    rank, n = world()
    return items[rank * len(items) // n : (rank + 1) * len(items) // n]


def batch_of_problems(rows: list[dict], n: int, step: int, seed: int) -> list[dict]:
    """
    This process's share of the n problems of a step.

    The data come in a new order every epoch, a function of (seed, epoch) alone: nothing has to be replayed on a resume.
    """
    per_epoch = len(rows) // n
    order = list(range(len(rows)))
    random.Random(f"{seed}:{step // per_epoch}").shuffle(order)
    first = step % per_epoch * n
    return share([rows[i] for i in order[first : first + n]])


def everyone(item) -> list:
    """What each of the processes has, in their order."""
    parts = [item] * world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, item)
    return parts


def tokens_of_all(rolled) -> int:
    """Completion tokens of a step's answers over all processes."""
    return sum(everyone(sum(map(len, rolled.completions))))


def add_up(x: torch.Tensor) -> None:
    """The sum over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(x)


# ------------------------------------------------------------------------------------------------- tensors in parts


def sharded(x: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor that every process has whole; alone the tensor itself."""
    if world()[1] == 1:
        return x
    mesh = dist.device_mesh.init_device_mesh(x.device.type, (world()[1],))
    return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)  # None: no communication, each cuts its own part


def whole(x: torch.Tensor) -> torch.Tensor:
    """What `sharded` cut, put together again; every process has to ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def save_state(path, step: int, values: dict, adam: torch.optim.Optimizer) -> None:
    """
    Write {"step", "trained": {name: {"value", "exp_avg", "exp_avg_sq", "step"}}}: the steps done, whole tensors.

    "exp_avg", "exp_avg_sq" and "step" are Adam's. Every process has to call it.
    """
    trained = {}
    for name, s in values.items():
        moments = {key: whole(x).cpu() for key, x in adam.state[s].items()}
        trained[str(name)] = {"value": whole(s.detach()).cpu()} | moments
    if rank() == 0:
        with written(path) as new:
            torch.save({"step": step, "trained": trained}, new)


def load_state(path, values: dict, adam: torch.optim.Optimizer) -> int:
    """What save_state wrote, also with another number of processes; returns the steps done."""

    def like(s, x):
        return sharded(x.to(s.device)) if isinstance(s, DTensor) else x.to(s.device)

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads what is used
    for name, s in values.items():
        moments = dict(state["trained"][str(name)])
        s.data.copy_(like(s, moments.pop("value")))
        adam.state[s] = {key: x if key == "step" else like(s, x) for key, x in moments.items()}
    return state["step"]


class AllWeights:
    """
    All weights of the model, trained in fp32 copies.

    In bfloat16 a weight ignores steps below 1/256 of itself, and sums of small gradients lose most of their digits.
    With several processes copies and Adam's moments are DTensors, cut along their first dimension (as ZeRO stage 1,
    arXiv:1910.02054): each of n processes holds 2 (bfloat16 weight) + 4 (gradient) + 12 / n bytes a weight. The weights
    stay whole, because every process samples. Not FSDP: processes sample different numbers of tokens and train
    different numbers of micro-batches, and FSDP gathers weights in every forward pass.
    """

    steering = {}

    def __init__(self, run):
        self.run, self.gradients, self.values = run, {}, {}
        for name, weight in run.subject.llm.named_parameters():
            self.gradients[name] = torch.zeros_like(weight, dtype=torch.float32)
            self.values[name] = sharded(weight.detach().float().clone()).requires_grad_()
            weight.requires_grad_().register_post_accumulate_grad_hook(partial(self._hand_over, name))
        self.rates = dict.fromkeys(self.values, run.args.lr_absolute)

    def _hand_over(self, name, weight):
        self.gradients[name] += weight.grad.float()
        weight.grad = None

    def gathered(self) -> list[torch.Tensor]:
        """The gradients, summed over all processes; every process takes the step of its part."""
        for name, gradient in self.gradients.items():
            add_up(gradient)
            self.values[name].grad = sharded(gradient)
        return list(self.gradients.values())

    def after_step(self) -> None:
        for name, gradient in self.gradients.items():
            gradient.zero_()
            self.values[name].grad = None  # a part of the gradient need not stay
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Copy the trained copies, put together again, into the model and into vLLM."""
        subject = self.run.subject
        engine = subject.engine(self.run.rows)  # before the copy: it is tested against the base model's weights
        for name, weight in subject.llm.named_parameters():
            weight.copy_(whole(self.values[name]))
        if engine is not None:
            engine.push_weights(subject.llm)
        subject.weights = subject.inside = str(self.run.out / "weights")  # its answers are not the base model's

    def write(self, folder, step: int) -> None:
        """Write the model in the Hugging Face format."""
        with written(folder / "weights") as new:
            self.run.subject.llm.save_pretrained(new)
            self.run.subject.tokenizer.save_pretrained(new)


# ------------------------------------------------------------------------------------------------ what a step has found

SECONDS = Counter()  # of the parts of a step, until `log` writes and clears them


@contextmanager
def timed(part: str):
    """Add the seconds inside this context, or of the function that it decorates, to SECONDS[part]."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[part] += time.perf_counter() - began


def compare(sums: dict, logps: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> None:
    """Add the differences of two computations of the same log-probs to the sums. All (B, C)."""
    off = (logps.detach() - others).abs()[mask]
    for name, x in (("compared", off.numel()), ("off", off.sum().item())):
        sums[name] += x
    sums["off_max"] = max(sums["off_max"], off.max().item())


def log(run, step: int, vectors: dict, sums: dict, batch, rolled, right, rewards) -> None:
    """Write the metrics of a step, and every fourth step some samples; show the reward."""
    metrics = {"step": step} | metrics_of(run, vectors, sums, rolled, right, rewards)
    run.timeouts = grading_timeouts()
    SECONDS.clear()
    run.bar.set_description(f"reward {100 * metrics['reward_mean']:.0f} %")
    if rank() > 0:
        return
    if step % 4 == 0:
        append(run.out / "samples.jsonl", some_samples(step, batch, rolled.texts, rewards))
    append(run.out / "metrics.jsonl", [metrics])
    if step == run.bar.initial and metrics["truncated"] > 0.9:
        cut = f"{100 * metrics['truncated']:.0f} % of the answers are cut off"
        run.bar.write(f"{cut}: raise --context or --max-tokens")


def metrics_of(run, vectors: dict, sums: dict, rolled, right, rewards) -> dict:
    """The metrics of a step, over all processes."""
    sums = sums | {
        "reward": rewards.sum().item(),
        "right": right.sum().item(),
        "equal": (rewards == rewards[:, :1]).all(1).sum().item(),
        "ended": sum(rolled.ended),
        "length": sum(map(len, rolled.completions)),
        "timeouts": grading_timeouts() - run.timeouts,
    }
    parts = everyone(sums)
    total = {name: sum(part[name] for part in parts) for name in sums}
    n, trained_tokens = run.args.prompts * run.args.samples, max(total["tokens"], 1)
    metrics = {
        "reward_mean": total["reward"] / n,
        "accuracy": total["right"] / n,  # share of right answers; differs from the reward if that is another one
        "prompts_all_equal": total["equal"] / run.args.prompts,  # share: no signal from them
        "truncated": 1 - total["ended"] / n,  # share of answers cut off at their limit
        "tokens_mean": total["length"] / n,
        "loss": total["loss"],
        "surprise_nats_per_token": total["nats"] / trained_tokens,  # mean -log pi: estimates the entropy
        "grad_norm": sums["norm"],  # before clipping
        "vector_norm": {str(place): s.norm().item() for place, s in vectors.items() if s.requires_grad},
        "seconds_sampling": SECONDS["sampling"],
        "seconds_grading": SECONDS["grading"],
        "seconds_training": SECONDS["gradient"] + SECONDS["update"],
        "seconds_update": SECONDS["update"],  # of that: clipping, Adam, the copy into the model
        "seconds_sync": getattr(run.subject.started, "sync_seconds", 0.0),  # to give the sampler what was trained
        "tokens_per_second_sampling": total["length"] / SECONDS["sampling"],  # of all processes
        "grading_timeouts": total["timeouts"],  # comparisons given up in this step
    }
    if "held_out" in sums:
        metrics["held_out"] = sums["held_out"]  # share of right answers to the held-out problems
    if total["compared"]:  # a few 1e-2 nats in bfloat16; a jump means that the sampler has other vectors
        metrics |= {
            "mismatch_mean": total["off"] / total["compared"],
            "mismatch_max": max(part["off_max"] for part in parts),
        }
    if rolled.logps is not None:
        metrics["weights_clipped"] = total["clipped"] / trained_tokens
    return metrics


def some_samples(step: int, batch: list[dict], texts: list[str], rewards: torch.Tensor, n: int = 4) -> list[dict]:
    """Rows for samples.jsonl: the first n answers to each of the first n problems of a step, with their rewards."""
    k, found = rewards.shape[1], []
    for i, row in enumerate(batch[:n]):
        about = {"step": step, "problem": row["problem"], "answer": row["answer"]}
        found += [about | {"completion": texts[i * k + j], "reward": rewards[i, j].item()} for j in range(min(n, k))]
    return found
