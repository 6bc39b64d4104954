"""
Several processes under torchrun: how a step's problems are divided among them, and how their results are combined.

torchrun starts one process for every GPU. Each process answers and trains on its shard of a step's problems, with all k
answers to a problem in one process. The gradients are summed, for vectors a few kilobytes, and every process takes the
same Adam step. With --method full every process takes the step of its shard of the weights. Only process 0 writes and
prints. Without torchrun there is one process, and its shard is everything.
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

from plumbing.files import written


def join_processes(device: str, prompts: int) -> str:
    """Meet the other processes if torchrun started this one; returns the device to use. prompts: problems of a step."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # objects by gloo, gradients by nccl
    if prompts % world()[1]:
        sys.exit(f"--prompts {prompts} cannot be divided evenly among {world()[1]} processes")
    return device


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank() -> int:
    return world()[0]


def shard(items: list) -> list:
    """This process's part of a list: the parts of all processes in order are the list."""
    rank, n = world()
    return items[rank * len(items) // n : (rank + 1) * len(items) // n]


def all_gather(item) -> list:
    """The items of all processes, in their order."""
    parts = [item] * world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, item)
    return parts


def all_reduce(x: torch.Tensor) -> None:
    """Sum x over all processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(x)


def barrier() -> None:
    """Wait until every process is here."""
    all_gather(None)


# ---------------------------------------------------------------------------------------------------- sharded tensors


def sharded(x: torch.Tensor) -> torch.Tensor:
    """This process's rows of a tensor that every process has whole; with one process the tensor itself."""
    if world()[1] == 1:
        return x
    mesh = dist.device_mesh.init_device_mesh(x.device.type, (world()[1],))
    return distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)  # None: no communication, each cuts its own part


def unshard(x: torch.Tensor) -> torch.Tensor:
    """The whole tensor from the shards of all processes; every process has to call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def save_state(path, step: int, values: dict, adam: torch.optim.Optimizer) -> None:
    """
    Write {"step", "trained": {name: {"value", "exp_avg", "exp_avg_sq", "step"}}}: the steps done, whole tensors.

    "exp_avg", "exp_avg_sq" and "step" are Adam's. Every process has to call it.
    """
    trained = {}
    for name, s in values.items():
        moments = {key: unshard(x).cpu() for key, x in adam.state[s].items()}
        trained[str(name)] = {"value": unshard(s.detach()).cpu()} | moments
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
            all_reduce(gradient)
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
            weight.copy_(unshard(self.values[name]))
        if engine is not None:
            engine.push_weights(subject.llm)
        # its answers are not the base model's
        subject.wanted_weights = subject.loaded_weights = str(self.run.out / "weights")

    def write(self, folder, step: int) -> None:
        """Write the model in the Hugging Face format."""
        with written(folder / "weights") as new:
            self.run.subject.llm.save_pretrained(new)
            self.run.subject.tokenizer.save_pretrained(new)


# ------------------------------------------------------------------------------------------------------- seconds

SECONDS = Counter()  # of the parts of a step, until train.log writes and clears them


@contextmanager
def timed(part: str):
    """Add the seconds inside this context, or of the function that it decorates, to SECONDS[part]."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    SECONDS[part] += time.perf_counter() - began
