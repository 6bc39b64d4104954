"""
Several processes under torchrun: how a step's problems are divided among them, and how their results are combined.

torchrun starts one process for every GPU. Each process samples answers to its shard of a step's problems, all k answers
to a problem, and trains on them. An all-reduce adds up the gradients (of vectors: a few kilobytes), and every process
takes the same Adam step. With --method full each process takes the step for its shard of the weights. Only process 0
writes and prints. Without torchrun there is one process, and its shard is everything.
"""

import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from plumbing.files import fitted, reading, written


def join_processes(device: str, prompts: int) -> str:
    """Join the process group if torchrun started this process; returns the device to use. prompts: of a step."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # gloo: Python objects; nccl: gradients
    if prompts % world()[1]:
        sys.exit(f"--prompts {prompts} cannot be divided evenly among {world()[1]} processes")
    return device


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank() -> int:
    return world()[0]


def shard(items: list) -> list:
    """This process's shard of a list; the shards of all processes, in the order of their ranks, are the list."""
    rank, n = world()
    return items[rank * len(items) // n : (rank + 1) * len(items) // n]


def all_gather(item) -> list:
    """The items of all processes, in the order of their ranks."""
    items = [item] * world()[1]
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def all_reduce(x: torch.Tensor) -> None:
    """Sum x over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(x)


# ---------------------------------------------------------------------------------------------------- sharded tensors


def sharded(x: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor that every process has; with one process the tensor itself."""
    if world()[1] == 1:
        return x
    mesh = dist.device_mesh.init_device_mesh(x.device.type, (world()[1],))
    return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)  # None: no communication, each cuts its own rows


def unshard(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor, from the shards of all processes. Every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def save_state(path, step: int, values: dict, adam: torch.optim.Optimizer) -> None:
    """
    Write {"step": steps done, "trained": {name: {"value", "exp_avg", "exp_avg_sq", "step"}}}, unsharded.

    "exp_avg", "exp_avg_sq" and "step" are Adam's. Every process must call it.
    """
    trained = {}
    for name, s in values.items():
        moments = {key: unshard(x).cpu() for key, x in adam.state[s].items()}
        trained[str(name)] = {"value": unshard(s.detach()).cpu()} | moments
    if rank() == 0:
        with written(path) as new:
            torch.save({"step": step, "trained": trained}, new)


def load_state(path, values: dict, adam: torch.optim.Optimizer) -> int:
    """Read what save_state wrote, perhaps with another number of processes; returns the steps done."""

    def like(s, x):
        return sharded(x.to(s.device)) if isinstance(s, DTensor) else x.to(s.device)

    state = state_of(path)
    with reading(path, "a state of this run"):
        for name, s in values.items():
            moments = dict(state["trained"][str(name)])
            if (value := moments.pop("value")).shape != s.shape:  # of moments it may be another
                raise ValueError(f"a tensor of shape {tuple(value.shape)} where {tuple(s.shape)} are trained")
            s.data.copy_(like(s, value))
            adam.state[s] = {key: x if key == "step" else like(s, x) for key, x in moments.items()}
    return state["step"]


def state_of(path) -> dict:
    """What save_state wrote. Nothing in the file is run, whatever it is."""
    with reading(path, "a state that train.py saved"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mmap: reads only what is used
        return fitted(state, {"step": int, "trained": dict})


class AllWeights:
    """
    All weights of the model. Adam steps fp32 copies of them; it has the methods of train.Vectors.

    A bfloat16 weight ignores steps below 1/256 of itself, and sums of small gradients lose most of their digits there.
    With several processes the copies and Adam's moments are sharded along their first dimension (ZeRO stage 1,
    arXiv:1910.02054): each of n processes holds 2 (bfloat16 weight) + 4 (gradient) + 12 / n bytes per weight. The
    weights themselves are not sharded, because every process samples. FSDP would gather them in every forward pass, in
    step with the others, but processes sample different numbers of tokens and train different numbers of micro-batches.
    """

    steering = {}

    def __init__(self, run):
        self.run, self.gradients, self.values = run, {}, {}
        for name, weight in run.subject.llm.named_parameters():
            self.gradients[name] = torch.zeros_like(weight, dtype=torch.float32)
            self.values[name] = sharded(weight.detach().float().clone()).requires_grad_()
            weight.requires_grad_().register_post_accumulate_grad_hook(partial(self._take_gradient, name))
        self.rates = dict.fromkeys(self.values, run.args.lr_absolute)

    def _take_gradient(self, name, weight):
        self.gradients[name] += weight.grad.float()
        weight.grad = None

    def gathered(self) -> list[torch.Tensor]:
        """The gradients, summed over all processes. Each process keeps its shard for Adam."""
        for name, gradient in self.gradients.items():
            all_reduce(gradient)
            self.values[name].grad = sharded(gradient)
        return list(self.gradients.values())

    def after_step(self) -> None:
        for name, gradient in self.gradients.items():
            gradient.zero_()
            self.values[name].grad = None  # frees the shard
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Copy the trained weights, unsharded, into the model and into vLLM."""
        subject = self.run.subject
        engine = subject.engine(self.run.rows)  # before the copy: a new engine is tested with the base model's weights
        for name, weight in subject.llm.named_parameters():
            weight.copy_(unshard(self.values[name]))
        if engine is not None:
            engine.push_weights(subject.llm)
        # kept answers are found by this name: these weights' answers are not the base model's
        subject.wanted_weights = subject.loaded_weights = str(self.run.out / "weights")

    def write(self, folder, step: int) -> None:
        """Write the model in the Hugging Face format."""
        with written(folder / "weights") as new:
            self.run.subject.llm.save_pretrained(new)
            self.run.subject.tokenizer.save_pretrained(new)


# ------------------------------------------------------------------------------------------------------- seconds

SECONDS = Counter()  # of the parts of one step; train.log writes and clears them


@contextmanager
def timed(part: str):
    """Add the seconds inside this context, or of the function that it decorates, to SECONDS[part]."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[part] += time.perf_counter() - began
