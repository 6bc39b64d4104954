"""
Train steering vectors in the residual stream of a frozen LLM with RLOO (arXiv:2509.06608, Sec. 2).

$ python train.py --layer 27                         # built-in model, 2 CPU cores: 2 minutes, 9 -> 43 %
$ python train.py --layer all                        # one vector per layer (arXiv:2505.18706): 91 %
$ python train.py --layer 26 --site input-norm       # at another site (arXiv:2509.06608, Fig. 10): 38 %
$ python train.py --layer 26 --method lora --rank 1  # a vector scaled per token: 93 %
$ python train.py --layer 14 --numbers 13            # a vector made of 13 trained numbers: 35 %
$ python train.py --layer all --method tinylora --rank 2  # 13 numbers (arXiv:2602.04118): 13 %
$ python train.py --method full                      # all weights, the papers' baseline: 97 %
$ python train.py --layer 27 --resume                # goes on where a run was stopped

%: right answers to held-out problems at T = 1. Each command takes 2 to 5 minutes.

The loop in `main` is the paper's. Sample k answers to each of N problems from the steered model. The reward is 1 if the
boxed answer is right. The advantage is the reward minus the mean of the prompt's other rewards. Then Adam takes one
step on the vectors. There is no KL, no clipped ratio, no standard deviation, and one update per batch of rollouts.

Writes to the run folder: config.json, vectors.safetensors (or weights/), metrics.jsonl, samples.jsonl, state.pt,
reward.png. Defaults and checks of the settings are in plumbing/settings.py, several processes and --method full in
plumbing/processes.py, --numbers and TinyLoRA in plumbing/few.py.
"""

import plumbing.threads  # noqa: F401 - before torch is loaded

# isort: split
import math
import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

import model
from data.problems import DAY, MATH_PROMPT, Problems, problems_of, template_of
from evaluate import compare_with_base
from model import Subject
from plumbing import memory, processes, settings
from plumbing.bars import Bar
from plumbing.console import one_line
from plumbing.few import Few
from plumbing.figures import plot_reward
from plumbing.files import FAMILY, append, config_of, lines_of
from plumbing.processes import SECONDS, AllWeights, all_gather, rank, shard, timed
from plumbing.settings import Several, Usual, authors_rate, own_first, parse_layers
from rewards import grade, grading_timeouts, no_answer


@own_first
@dataclass
class Config(settings.Asking):
    layer: str = "27"                   # layers that get a vector, 0-based: 27, -1 (the last), 3,14 or all
    model: str = "tiny"                 # tiny (the built-in model), a local folder, a .gguf file or a hub id; frozen
    method: Literal["vector", "lora", "tinylora", "full"] = "vector"  # vectors, LoRA, TinyLoRA or all weights
    site: str = "end"                   # input-norm, attention, post-attention-norm, end, or a module's path
    where: Literal["all", "answer"] = "all"  # positions that get the vector: all, or only those that predict the answer
    rank: int = 1                       # rank of a LoRA; with --site end it is on mlp.down_proj
    numbers: Usual[int] = None          # train only this many numbers; a fixed random map makes the vector from them
    orthogonal_to: Several[str] = ()    # keep the vector orthogonal to the vectors of these runs
    init: Usual[str] = None             # start from this run's vectors; those not trained here stay fixed
    data: Usual[str] = None             # jsonl to train on; tiny: data/tiny/train.jsonl, else data/deepscaler.jsonl
    recipe: Usual[str] = None           # the authors' settings for this data; default: the data's source or deepscaler
    held_out: Usual[str] = None         # jsonl to measure on; tiny: data/tiny/test.jsonl, else data/math500.jsonl
    steps: Usual[int] = None            # RLOO updates; tiny: 40, else one epoch, 314 on DeepScaleR
    prompts: Usual[int] = None          # N, problems per step; tiny: 16, else 128
    samples: Usual[int] = None          # k, answers to each problem; tiny: 16, else 16 or 64, as the authors
    context: Usual[int] = None          # most tokens of prompt and answer; tiny: 512, else 4096 (Qwen2.5-Math) or 8192
    max_tokens: Usual[int] = None       # most tokens of an answer; tiny: 80, else what the context leaves
    lr: Usual[float | Literal["paper"]] = None  # share of RMS(h_l); tiny: 0.06, else the authors' rate, if any
    lr_absolute: Usual[float] = None    # Adam's rate itself, instead of --lr; full: tiny 3e-4, the authors' or 1e-6
    warmup: Usual[int] = None           # steps in which the rate rises to its value; tiny: 3, else 3 % of an epoch
    clip: float = 2.0                   # the gradient of all vectors together is clipped to this norm
    temperature: float = 1.0            # of the sampler, and of the logits in training (papers: 1)
    reward: Literal["verify", "sign", "random"] = "verify"  # 1 or 0 by Math-Verify; sign: 1 or -1; random: a coin
    weight_cap: float = 2.0             # cap on pi/mu per token sampled by vLLM; 0 turns the correction off
    recompute: Literal["auto", "yes", "no"] = "auto"  # recompute layers in the backward pass; auto: if memory is short
    read_once: Literal["auto", "yes", "no"] = "auto"  # run a prompt once for its k answers; auto: unless recomputed
    reuse: Literal["auto", "yes", "no"] = "auto"  # reuse the hidden states of sampling; auto: if memory allows
    micro_tokens: Usual[int] = None     # tokens of a training forward pass, with padding; tiny: 4096, else 16384
    eval_problems: int = 400            # held-out problems for the comparison at the end; 0: none
    eval_every: Usual[int] = None       # also measure on them every so many steps: the squares in reward.png
    keep_every: Usual[int] = None       # keep a checkpoint every so many steps, for evaluate.py --checkpoints
    seed: int = 0                       # seed of the order of the problems, of the rollouts and of the held-out samples
    out: Usual[str] = None              # run folder; default: out/MODEL-layerLAYER and what is special
    resume: bool = False                # go on with the run in that folder


# ----------------------------------------------------------------------------------------------------------- the maths


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """
    Leave-one-out advantages (arXiv:2402.14740): A_i = r_i - mean of the other k - 1 rewards of the same prompt.

    rewards: (N, k), k >= 2. Returns (N, k), every row sums to 0. [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]]
    Paper (P4 Sec. 2): the mean of all k rewards is subtracted; here: the mean of the others, as in RLOO and in the
    authors' code, because a baseline with the own reward biases the gradient. The two differ by the factor k / (k - 1).
    """
    k = rewards.shape[1]
    assert k >= 2, f"leave-one-out needs at least 2 samples per prompt, got {k}"
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(
    logps: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, total_tokens: int, weights=None
) -> torch.Tensor:
    """
    -sum_i A_i sum_t w_it log pi(y_it) / total_tokens, for the rows of one micro-batch.

    logps, mask, weights: (B, C); advantages: (B,). total_tokens: completion tokens of the *whole* batch of rollouts,
    with those of other micro-batches and of answers with A = 0. So the sum of the losses does not depend on how the
    batch is split. A mean per answer instead would favour short right answers and long wrong ones (arXiv:2503.20783).
    """
    terms = logps if weights is None else weights * logps
    return -(advantages[:, None] * terms * mask).sum() / total_tokens


def importance_weights(logps: torch.Tensor, sampled: torch.Tensor, cap: float) -> torch.Tensor:
    """
    min(pi(y_t) / mu(y_t), cap) for tokens drawn from mu: the same weights in vLLM, which computes slightly differently.

    logps: log pi, sampled: log mu, both (B, C). Without these weights the gradient would be that of another
    distribution. They are capped, because a rare large ratio is noise; per token, because the ratio of a whole answer
    is a product of thousands; and constants, so no gradient flows through them.
    """
    return (logps.detach() - sampled).exp().clamp(max=cap)


def orthogonal(s: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part of s that is orthogonal to the orthonormal rows of basis. (D,), (n, D) -> (D,)"""
    return s - (s @ basis.T) @ basis


@timed("gradient")
def accumulate_gradient(
    llm, vectors, rolled: model.Rollouts, advantages, temperature, budget, total_tokens=None, cap=2.0, **how
) -> dict[str, float]:
    """
    Add d loss / d s_l to the .grad of every vector that requires it. Answers with A = 0 add nothing and are skipped.

    advantages: (N, k) or (B,). budget: tokens of a micro-batch. total_tokens: completion tokens of all processes
    (default: of this one). cap: of the importance weights, if the sampler gave log-probs (0: none). how: recompute and
    read_once, see model.micro_batches. Returns sums over the trained tokens: loss, tokens, nats (-log pi), clipped
    (weights at the cap), and off: |our log-probs - the sampler's| over `compared` tokens, with its maximum off_max.
    """
    advantages, total = advantages.flatten(), total_tokens or sum(map(len, rolled.completions))
    rows = advantages.nonzero().flatten().tolist()
    sums = dict.fromkeys(["loss", "tokens", "nats", "compared", "off", "off_max", "clipped"], 0.0)
    for batch, logps, mask in model.micro_batches(llm, vectors, rolled, rows, budget, temperature, **how):
        weights = None
        if rolled.logps is not None:
            sampled = [torch.tensor(rolled.logps[i], device=logps.device) for i in batch]
            sampled = pad_sequence(sampled, batch_first=True)
            off = (logps.detach() - sampled).abs()[mask]
            sums["compared"] += off.numel()
            sums["off"] += off.sum().item()
            sums["off_max"] = max(sums["off_max"], off.max().item())
            if cap:
                weights = importance_weights(logps, sampled, cap)
                sums["clipped"] += (weights[mask] >= cap).sum().item()
        loss = rloo_loss(logps, mask, advantages[batch].to(logps.device), total, weights)
        loss.backward()
        sums["loss"] += loss.item()
        sums["tokens"] += mask.sum().item()
        sums["nats"] -= logps.sum().item()
    return sums


# ------------------------------------------------------------------------------------------------------------ the loop


@dataclass
class Run:
    args: Config  # with every default filled in
    out: Path
    rows: list[dict]  # problems to train on
    held_out: Problems | None
    subject: Subject  # the model, its sampler, and how it is asked
    timeouts: int = field(default_factory=grading_timeouts)  # comparisons that the grader gave up before this step
    bar: Bar | None = None


@one_line()
def main(args: Config) -> None:
    run = open_run(args)
    args, subject, trained = run.args, run.subject, trained_of(run)
    adam = adam_of(trained.values, trained.rates)
    start(run, trained, adam)
    with settings.told_how_to_go_on(run):
        for step in run.bar:
            batch = batch_of_problems(run.rows, args.prompts, step, args.seed)  # N problems
            with timed("sampling"):  # k answers to each, of the steered model
                rolled = subject.rollouts(trained.steering, batch, args.samples, **how_to_sample(run, trained, step))
            right = grade_answers(rolled, batch, subject.form)  # (N, k)
            rewards = rewards_of(args, step, batch, right, rolled)  # (N, k)
            advantages = rloo_advantages(rewards)  # (N, k)
            total = sum(all_gather(sum(map(len, rolled.completions))))  # completion tokens of the whole step
            sums = accumulate_gradient(
                subject.llm, trained.steering, rolled, advantages, args.temperature, args.micro_tokens, total,
                args.weight_cap, recompute=args.recompute, read_once=args.read_once,
            )  # fmt: skip
            sums |= held_out_accuracy(run, trained.steering, step)  # with --eval-every, of the model that sampled
            sums["norm"] = update(trained, adam, args.clip, (step + 1) / args.warmup)
            log(run, step, trained.steering, sums, batch, rolled, right, rewards)
            save(run, step, trained, adam)
            del rolled  # its states, before the next ones are kept
        finish(run, trained.steering)


def batch_of_problems(rows: list[dict], n: int, step: int, seed: int) -> list[dict]:
    """
    This process's shard of the n problems of a step.

    Every epoch has a new order, a function of (seed, epoch) alone, so a resumed run has nothing to replay.
    """
    per_epoch = len(rows) // n
    order = list(range(len(rows)))
    random.Random(f"{seed}:{step // per_epoch}").shuffle(order)
    first = step % per_epoch * n
    return shard([rows[i] for i in order[first : first + n]])


def how_to_sample(run: Run, trained, step: int) -> dict:
    """How a step's rollouts are sampled. Every prompt has a seed of its own, a function of (seed, step)."""
    args, llm, lowest = run.args, run.subject.llm, model.lowest_trained(trained.steering)
    seeds = shard(model.prompt_seeds(args.seed * 1_000_003 + step, range(args.prompts)))
    size = memory.state_bytes(llm.config, llm.dtype.itemsize, len(seeds) * args.samples * args.context)
    fits = size < memory.free(llm.device) // 4
    keep = lowest if lowest > 0 and (args.reuse == "yes" or (args.reuse == "auto" and fits)) else None
    return dict(temperature=args.temperature, seed=seeds, context=args.context, keep=keep)


@timed("grading")
def grade_answers(rolled: model.Rollouts, batch: list[dict], form: str) -> torch.Tensor:
    """1 where the answer, in the form that the prompt asks for, equals the gold, else 0: (N, k)."""
    k = len(rolled.texts) // len(batch)
    return torch.tensor(grade(rolled.texts, [row["answer"] for row in batch for _ in range(k)], form)).view(-1, k)


def rewards_of(args: Config, step: int, batch: list[dict], right: torch.Tensor, rolled: model.Rollouts) -> torch.Tensor:
    """
    The rewards of a step, any numbers, (N, k): put a reward of your own here. batch: N problems; right: (N, k).

    For partial credit, for example: boxed = torch.tensor(["boxed" in text for text in rolled.texts]).view_as(right)
    and then right + 0.2 * (1 - right) * boxed. rolled.texts: N*k answers, prompt by prompt.
    """
    if args.reward == "sign":
        return 2 * right - 1
    if args.reward == "random":  # drawn for all processes, so that shards do not repeat
        coin = random.Random(f"coin:{args.seed}:{step}")
        coins = [[float(coin.random() < 0.5) for _ in range(args.samples)] for _ in range(args.prompts)]
        return torch.tensor(shard(coins))
    return right


def adam_of(values: dict, rates: dict) -> torch.optim.Adam:
    """
    Adam with a learning rate for each tensor and no weight decay.

    eps: gradients are small, because the loss is divided by all tokens of the batch. With the usual 1e-8 the smallest
    coordinates of the built-in model moved 5 % less than lr.
    """
    groups = [{"params": [s], "lr": rates[name], "highest": rates[name]} for name, s in values.items()]
    return torch.optim.Adam(groups, eps=1e-15)


@timed("update")
def update(trained, adam: torch.optim.Adam, clip: float, warm: float) -> float:
    """Clip the gradients together, then take an Adam step. warm: share of the rates. Returns the unclipped norm."""
    norm = torch.nn.utils.get_total_norm(trained.gathered())
    torch.nn.utils.clip_grads_with_norm_(trained.values.values(), clip, norm)
    for group in adam.param_groups:
        group["lr"] = group["highest"] * min(1, warm)
    adam.step()
    trained.after_step()
    return norm.item()


def save(run: Run, step: int, trained, adam: torch.optim.Adam) -> None:
    """
    Write what was trained, and the state that --resume needs: the trained tensors, Adam's moments and the steps done.

    No random state is needed: the problems depend on (seed, epoch) alone, the rollouts on (seed, step).
    """
    if run.args.keep_every and (step + 1) % run.args.keep_every == 0 and rank() == 0:
        trained.write(run.out / "checkpoints" / f"{step + 1:05}", step + 1)
    every = 53 if run.args.method == "full" else 1  # 53 as the authors, because the files are large
    if (step + 1) % every == 0 or step + 1 == run.args.steps:
        if rank() == 0:
            trained.write(run.out, step + 1)
        # written last: --resume counts a step as done once this file is there
        processes.save_state(run.out / "state.pt", step + 1, trained.values, adam)


# ----------------------------------------------------------------------------------------------------- what is trained


class Vectors:
    """
    Steering vectors or LoRAs at some places of the frozen model, in fp32.

    AllWeights and Few have the same attributes and methods: values {name: fp32 tensor that Adam steps}, their rates,
    steering (what is added to the stream), gathered (gradients, summed over processes), after_step, put_back (after
    values have been loaded) and write.
    """

    def __init__(self, run: Run):
        args, self.run = run.args, run
        llm, places = run.subject.llm, places_of(args, run.subject.depth)
        rms = model.residual_rms(llm, [run.subject.prompt(row) for row in run.rows[:16]], places)
        self.values, fixed = start_values(args, llm, rms)
        self.rates, self.steering = learning_rates(args, rms, self.values), fixed | self.values
        self.earlier = earlier_directions(args, llm, places)
        for place, s in self.values.items():
            s.grad = torch.zeros_like(s)  # never None: a process without answers to train on joins the all-reduce
            if rank() == 0 and not args.numbers:
                whose = "the authors' rate" if args.lr == "paper" and not args.lr_absolute else "learning rate"
                print(f"layer {place}: size there {rms[place]:.2f}, {whose} {self.rates[place]:.3g} a step")

    def gathered(self) -> list[torch.Tensor]:
        """The gradients, summed over all processes."""
        for place, s in self.values.items():
            processes.all_reduce(s.grad)
            if place in self.earlier:
                s.grad.copy_(orthogonal(s.grad, self.earlier[place]))
        return [s.grad for s in self.values.values()]

    def after_step(self) -> None:
        for place, s in self.values.items():
            s.grad.zero_()
            if place in self.earlier:  # an orthogonal gradient is not enough: Adam scales every coordinate differently
                s.data = orthogonal(s.data, self.earlier[place])

    def put_back(self) -> None:
        """Nothing to do: the hooks use these very tensors."""

    def write(self, folder: Path, step: int) -> None:
        file = folder / "vectors.safetensors"
        model.save_vectors(file, self.steering, self.run.subject.llm, self.run.args.model, step)


def trained_of(run: Run):
    made = AllWeights(run) if run.args.method == "full" else Vectors(run)
    return Few(made, run) if run.args.numbers else made


def earlier_directions(args, llm, places: list) -> dict:
    """{place: (n, D) orthonormal rows that span the vectors of the --orthogonal-to runs there}."""
    runs = {run: model.load_vectors(run, llm.config)[0] for run in args.orthogonal_to}
    found = {}
    for place in places if runs else ():
        for run, vectors in runs.items():
            if place not in vectors:
                sys.exit(f"--orthogonal-to {run}: that run has no vector at {place}")
        stack = normalize(torch.stack([vectors[place] for vectors in runs.values()], 1).double(), dim=0)  # (D, n)
        if torch.linalg.matrix_rank(stack, rtol=1e-4) < len(runs):  # QR would fill the basis with arbitrary directions
            sys.exit(f"--orthogonal-to: the vectors of {', '.join(runs)} at {place} are zero or not independent")
        found[place] = torch.linalg.qr(stack).Q.T.float().to(llm.device)
    return found


def places_of(args: Config, depth: int) -> list:
    """The places that are trained: layers, or "14.attention" and so on; for a LoRA those of its two matrices."""
    site = "" if args.site == "end" else f".{args.site}"
    where = "" if args.where == "all" else f"@{args.where}"
    matrices = (".lora_A", ".lora_B") if args.method in ("lora", "tinylora") else ("",)
    places = [f"{layer}{site}{matrix}{where}" for layer in parse_layers(args.layer, depth) for matrix in matrices]
    return [int(place) if place.isdigit() else place for place in places]


def start_values(args: Config, llm, rms: dict) -> tuple[dict, dict]:
    """
    ({place: fp32 tensor to train}, {place: tensor that stays fixed}). rms: {place: size there}, of all places to train.

    Vectors start at zero, so step 0 is the base model. A LoRA's B does, too; its A is random and makes A x about 1, so
    that a step on B moves the stream as far as the same step on a vector. With the authors' rates A starts as in PEFT,
    uniform in +- 1 / sqrt(F), because they chose the rates for that. --init takes the run's tensors instead.
    """
    draw, values = torch.Generator().manual_seed(args.seed), {}
    given = model.load_vectors(args.init, llm.config)[0] if args.init else {}
    for place, size in rms.items():
        module, matrix = model.site_module(llm, place), model.split(place).matrix
        s = torch.zeros(getattr(module, "out_features", llm.config.hidden_size))
        if matrix == "lora_A":
            s = torch.randn(args.rank, module.in_features, generator=draw) / module.in_features**0.5 / size
            if args.lr == "paper":
                nn.init.kaiming_uniform_(s, a=5**0.5, generator=draw)
        elif matrix == "lora_B":
            s = s[:, None].repeat(1, args.rank)
        if place in given and given[place].shape != s.shape:
            sys.exit(f"--init {args.init}: its LoRA has another rank than --rank {args.rank}")
        values[place] = given.pop(place, s).to(llm.device).requires_grad_()
    return values, given


def learning_rates(args: Config, rms: dict, values: dict) -> dict:
    """
    Absolute learning rate for every trained tensor: {place: lr}. rms: {place: size of what is steered}.

    The default is the authors' rate, if data/paper.json has one. Otherwise it is a share of the size there: 0.06 for up
    to 32 steps, 0.06 sqrt(32 / steps) for more. Where the gradient is noise, Adam walks at random, as far as 6 rates in
    32 steps and 17.5 in 314, and 17.5 * 0.06 is as long as the stream itself. (The built-in model keeps 0.06.)
    A LoRA's A has entries of about 1 / (sqrt(F) RMS(x)), and its rate is a share of that.
    """
    if args.lr_absolute is not None:
        return dict.fromkeys(rms, args.lr_absolute)
    if args.lr == "paper":
        return {place: authors_rate(args, model.split(place).layer) for place in rms}
    # all vectors together move the stream, and with 28 undivided rates training diverges. Half of their number is a
    # better divisor than all of it: with 28 vectors the built-in model reaches 91 % in 40 steps instead of 87 %
    inner = {place: values[place].shape[1] for place in rms if model.split(place).matrix == "lora_A"}
    parts = max(1, (len(rms) - len(inner)) / 2)
    lr = {place: args.lr * size / parts for place, size in rms.items()}
    return lr | {place: args.lr / (width**0.5 * rms[place]) for place, width in inner.items()}


# ------------------------------------------------------------------------------------------------- before the loop


def open_run(args: Config) -> Run:
    """Fill in the defaults, load the problems and the model."""
    settings.check(args)
    args, problems, epochs = settings.with_defaults(args)
    held_out = problems_of(args.held_out).first(args.eval_problems) if args.held_out and args.eval_problems else None
    if len(problems.rows) < args.prompts:
        sys.exit(f"--prompts {args.prompts}: the data has only {len(problems.rows)} problems")
    args = replace(args, device=processes.join_processes(args.device, args.prompts))
    subject = Subject.of_run({"model": args.model}, replace(args, context=None))
    # exits for a bad --layer before the model is loaded
    layers = [] if args.method == "full" else parse_layers(args.layer, subject.depth)
    if args.rank > subject.config.hidden_size:
        sys.exit(f"--rank {args.rank}: a LoRA of this model has at most rank {subject.config.hidden_size}, its width")
    args = replace(args, layer="all") if len(layers) == subject.depth > 1 else args
    args = replace(args, context=min(args.context, subject.context))
    lowest, shared = -1 if args.method == "full" else min(layers), processes.world()[1]
    how = dict(lowest=lowest, answers=args.prompts * args.samples // shared, micro=args.micro_tokens)
    memory.say(subject, args.samples, args.context, **how, recompute=args.recompute, processes=shared)
    subject.template = template_of(subject.tokenizer, args.template)
    subject.system = MATH_PROMPT if args.system is None else args.system
    asked = Bar(problems.rows, desc="prompts", unit="problems")
    fit = [row for row in asked if len(subject.prompt(row)) < args.context]
    if (cut := len(problems.rows) - len(fit)) and rank() == 0:
        print(f"left out {cut} of {len(problems.rows)} problems: their prompts fill --context {args.context}")
    if len(fit) < args.prompts:
        sys.exit(f"--context {args.context}: only {len(fit)} problems have prompts that leave room for an answer")
    usual = epochs * (len(fit) // args.prompts)  # also for the warm-up: the first steps do not depend on --steps
    args = replace(args, steps=args.steps or usual, warmup=args.warmup or math.ceil(0.03 * usual))
    out = Path(args.out or f"out/{settings.name_of_run(args)}")
    if args.resume and args.lr is None and (out / "config.json").is_file():
        args = replace(args, lr=config_of(out)["lr"])  # the default depends on --steps, which may be more now
    args = settings.with_rate(args, layers)
    subject.folder = out.parent / "answers"
    return Run(args, out, fit, held_out, subject)


def start(run: Run, trained, adam: torch.optim.Optimizer) -> None:
    """Make the run folder, or with --resume check its settings and load the saved state; make the progress bar."""
    subject, first, steps = run.subject, 0, run.args.steps
    if not isinstance(adam, torch.optim.Adam) and run.args.lr_absolute is None:
        small = "gradients are about 1e-5 a coordinate, so SGD wants a rate of thousands"
        sys.exit(f"--lr is a step of Adam; with another optimiser give --lr-absolute ({small})")
    subject.holds = trained.steering
    config = asdict(run.args) | {name: getattr(subject, name) for name in ("template", "system", "device", "dtype")}
    config |= {"prompt_day": str(DAY), "sampler": subject.samples_with}  # exits if vLLM cannot hold the vectors
    settings.check_folder(run.out, config, run.args.resume)
    if run.args.resume:
        first = processes.load_state(run.out / "state.pt", trained.values, adam)
        trained.put_back()
    all_gather(None)  # a barrier: every process has read the folder before process 0 writes to it
    if rank() == 0:
        settings.begin(run.out, config, first)
    run.bar = Bar(range(first, steps), leave=True, initial=first, total=steps, desc="reward  ?", unit="steps")


# ------------------------------------------------------------------------------------------------- what a step found


def log(run: Run, step: int, vectors: dict, sums: dict, batch, rolled, right, rewards) -> None:
    """Write the metrics of a step, and every fourth step some samples; show the reward."""
    metrics = {"step": step} | metrics_of(run, vectors, sums, rolled, right, rewards)
    metrics["problems"] = sum(all_gather([row["line"] for row in batch]), [])  # their lines in the data file
    run.timeouts = grading_timeouts()
    SECONDS.clear()
    run.bar.set_description_str(f"reward {100 * metrics['reward_mean']:.0f} %")
    if rank() > 0:
        return
    if step % 4 == 0:
        append(run.out / "samples.jsonl", some_samples(step, batch, rolled.texts, rewards))
    append(run.out / "metrics.jsonl", [metrics])
    if step == run.bar.initial and metrics["truncated"] > 0.9:
        run.bar.write(f"{100 * metrics['truncated']:.0f} % of the answers are cut off: raise --context or --max-tokens")


def metrics_of(run: Run, vectors: dict, sums: dict, rolled, right, rewards) -> dict:
    """The metrics of a step, over all processes."""
    sums = sums | {
        "reward": rewards.sum().item(),
        "right": right.sum().item(),
        "equal": (rewards == rewards[:, :1]).all(1).sum().item(),
        "ended": sum(rolled.ended),
        "no_answer": no_answer(rolled.texts, run.subject.form),
        "length": sum(map(len, rolled.completions)),
        "timeouts": grading_timeouts() - run.timeouts,
    }
    parts = all_gather(sums)
    total = {name: sum(part[name] for part in parts) for name in sums}
    n, trained_tokens = run.args.prompts * run.args.samples, max(total["tokens"], 1)
    metrics = {
        "reward_mean": total["reward"] / n,
        "accuracy": total["right"] / n,  # share of right answers; differs from the reward if that is another one
        "prompts_all_equal": total["equal"] / run.args.prompts,  # share: no signal from them
        "no_answer": total["no_answer"] / n,  # share of answers without a box, or without the tag that r1 asks for
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
        metrics["mismatch_mean"] = total["off"] / total["compared"]
        metrics["mismatch_max"] = max(part["off_max"] for part in parts)
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


def held_out_accuracy(run: Run, vectors: dict, step: int) -> dict[str, float]:
    """
    {"held_out": share of right answers to the held-out problems, one each at T = 1}; {} between the --eval-every steps.

    The random numbers are those of the comparison at the end. Every process has to call it.
    """
    if not run.args.eval_every or step % run.args.eval_every or not run.held_out:
        return {}
    rows, n = shard(run.held_out.rows), len(run.held_out.rows)
    seeds = shard(model.prompt_seeds(run.args.seed, range(n)))
    rolled = run.subject.rollouts(vectors, rows, 1, seed=seeds, bar="held out")
    right = sum(grade(rolled.texts, [row["answer"] for row in rows], run.subject.form))
    return {"held_out": sum(all_gather(right)) / n}


# ----------------------------------------------------------------------------------------------------- after the loop


def finish(run: Run, vectors: dict) -> None:
    """Compare with the base model on held-out problems, draw reward.png. Process 0 alone."""
    if rank() > 0:
        return
    history = lines_of(run.out / "metrics.jsonl", {"accuracy": float, "reward_mean": float})
    level = history[0]["accuracy"]  # step 0 samples with zero vectors: the base model, on training problems
    if run.held_out:
        level = compare_with_base(run.subject, vectors, run.held_out, run.args.model, run.args.seed)
    plot_reward(history, level, run.out / "reward.png")
    own = f" --data {run.args.data}" if run.args.model not in FAMILY else ""
    print(f"\nmost memory in use: {memory.peak(run.subject.device) / 1e9:.1f} GB")
    print(f"wrote {run.out}/ with reward.png; now: python evaluate.py {run.out}{own}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
    processes.leave_processes()
