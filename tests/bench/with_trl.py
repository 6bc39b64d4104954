"""
A training step of TRL's RLOOTrainer against train.py's, in turn, in one process.

$ pip install -r tests/bench/requirements.txt
$ python tests/bench/with_trl.py --layer 27 --threads 1             # three rounds of two steps each
$ python tests/bench/with_trl.py --layer 27 --steps 12 --threads 1  # long enough to reach a reward of 0.35
$ python tests/bench/with_trl.py --layer 14 --steps 16 --goal 0.6 --threads 1
$ python tests/bench/with_trl.py --model FOLDER --layer -1 --prompts 8 --samples 8 --max-tokens 128 --steps 1 --rows 8

The same problems in the same order, answers a problem, limit, rates with their warm-up, clipping, reward, threads. TRL
trains the vector as a bias of mlp.down_proj, which is the same. While it samples, its head asks for a gradient:
else torch copies the head once for every row, which is no fault of TRL's. A step: sampling, grading, training.
Round i draws problems and answers with seed i: the two draw other answers, and how many steps they need depends on
them.
"""

import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
import model  # noqa: E402
import train  # noqa: E402
from data.problems import problems_of  # noqa: E402
from plumbing.files import (
    TINY,  # noqa: E402
    lines_of,
)
from plumbing.settings import parse_layers  # noqa: E402
from rewards import grade  # noqa: E402


@dataclass
class Config:
    model: str = "tiny"                    # built-in model, local folder or hub id
    layer: str = "27"                      # as train.py's
    steps: int = 2                         # of each, each time from the base model on
    rounds: int = 3                        # pairs of measurements, who goes first changes
    prompts: int = 16                      # problems a step
    samples: int = 16                      # answers to each
    max_tokens: int = 80                   # longest answer
    rows: int | None = None                # of TRL's micro-batch; default all, whose logits must fit into memory
    goal: float = 0.35                     # reward of a step that is to be reached
    threads: int | None = None             # CPU threads; default torch's


def trl_steps(args: Config, trl, seed: int) -> list[dict]:
    """The steps of TRL's trainer: [{"sampling", "training": seconds, "tokens", "reward"}]."""
    from datasets import Dataset
    from transformers import TrainerCallback

    llm, tokenizer = model.load(args.model, device="cpu")
    rows, head = problems_of(TINY / "train.jsonl").rows, llm.get_output_embeddings()
    prompts = [model.prompt_ids(tokenizer, row["problem"]) for row in rows[:16]]
    layers = parse_layers(args.layer, llm.config.num_hidden_layers)
    rates = train.learning_rates(train.Config(lr=0.06), model.residual_rms(llm, prompts, layers), {})
    biases = {layer: torch.nn.Parameter(torch.zeros_like(head.weight[0])) for layer in layers}
    for layer, bias in biases.items():
        model.decoder_layers(llm)[layer].mlp.down_proj.bias = bias
    adam = train.adam_of(biases, rates)
    warm = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1, (step + 1) / 3))
    order = [row for step in range(args.steps) for row in train.batch_of_problems(rows, args.prompts, step, seed)]
    problems = Dataset.from_list(
        [{"prompt": tokenizer.decode(model.prompt_ids(tokenizer, r["problem"])), "answer": r["answer"]} for r in order]
    )
    found, rows = [], args.rows or args.prompts * args.samples

    def reward(completions, answer, completion_ids, **how):
        right = grade(completions, answer)
        found[-1] |= {"reward": statistics.mean(right), "tokens": sum(map(len, completion_ids))}
        return right

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **how):
            found.append({"began": time.perf_counter()})

        def on_step_end(self, *args, **how):
            found[-1]["training"] = time.perf_counter() - found[-1].pop("began") - found[-1]["sampling"]

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.RLOOTrainer(
            llm, reward, train_dataset=problems, processing_class=tokenizer, callbacks=[Clock()],
            optimizers=(adam, warm),
            args=trl.RLOOConfig(
                folder, per_device_train_batch_size=rows, num_generations=args.samples,
                gradient_accumulation_steps=args.prompts * args.samples // rows,
                max_completion_length=args.max_tokens, max_steps=args.steps, max_grad_norm=2.0, beta=0.0,
                shuffle_dataset=False, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
                disable_tqdm=True, logging_strategy="no", gradient_checkpointing=False, seed=seed,
            ),
        )  # fmt: skip
        generate = trainer._generate

        def timed(prompts):
            began = time.perf_counter()
            if not found or "sampling" in found[-1]:  # the trainer samples before the first step begins
                found.append({})
            head.weight.requires_grad_()
            answers = generate(prompts)
            head.weight.requires_grad_(False)
            found[-1]["sampling"] = time.perf_counter() - began
            return answers

        trainer._generate = timed
        trainer.train()
    return found


def our_steps(args: Config, seed: int) -> list[dict]:
    """As trl_steps, of train.py, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        train.main(train.Config(
            model=args.model, data=str(TINY / "train.jsonl"), layer=args.layer, steps=args.steps,
            prompts=args.prompts, samples=args.samples, lr=0.06,
            max_tokens=args.max_tokens, context=512, eval_problems=0, device="cpu", seed=seed, out=f"{folder}/run",
        ))  # fmt: skip
        return [
            {
                "sampling": m["seconds_sampling"],
                "training": m["seconds_training"] + m["seconds_grading"],
                "tokens": m["tokens_mean"] * args.prompts * args.samples,
                "reward": m["reward_mean"],
            }
            for m in lines_of(Path(folder) / "run" / "metrics.jsonl")
        ]


def until(goal: float, steps: list[dict]) -> float | None:
    """Seconds until the first step whose answers reach the goal, its sampling included; None if there is none."""
    seconds = 0.0
    for step in steps:
        if step["reward"] >= goal:
            return seconds + step["sampling"]
        seconds += step["sampling"] + step["training"]
    return None


def main(args: Config) -> None:
    try:
        import trl
    except ImportError as error:
        sys.exit(f"tests/bench/with_trl.py wants TRL ({error}): pip install -r tests/bench/requirements.txt")
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = {"TRL": partial(trl_steps, args, trl), "ours": partial(our_steps, args)}
    seconds, needed = [], {name: [] for name in runs}
    for i in range(args.rounds):
        found = {name: runs[name](i) for name in (runs if i % 2 == 0 else reversed(runs))}
        each = {name: [s["sampling"] + s["training"] for s in steps] for name, steps in found.items()}
        for name, steps in found.items():
            parts = {part: statistics.mean(s[part] for s in steps) for part in ("sampling", "training")}
            speed = sum(s["tokens"] for s in steps) / sum(s["sampling"] for s in steps)
            goal = until(args.goal, steps)
            reach = "more steps" if goal is None else f"{goal:.0f} s"
            print(
                f"round {i} {name:4} {statistics.mean(each[name]):6.2f} s a step: {parts['sampling']:.2f} of sampling, "
                f"{parts['training']:.2f} of grading and training; {speed:.0f} tokens/s sampled; "
                f"rewards {steps[0]['reward']:.2f} to {steps[-1]['reward']:.2f}; {args.goal} after {reach}",
                flush=True,
            )
        seconds.append(statistics.mean(each["TRL"]) / statistics.mean(each["ours"]))
        for name in runs:
            needed[name].append(until(args.goal, found[name]))
    pairs = [trl / ours for trl, ours in zip(*needed.values()) if trl and ours]
    for what, ratios in (("seconds a step", seconds), (f"seconds to {args.goal}", pairs)):
        if ratios:
            print(f"TRL / ours, {what}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
