"""
Measure a run, or a base model, on problems with known answers. Every accuracy of the project is made here: `answers`
asks, grades and keeps, `Estimate` (data/estimate.py) is a number with its interval over problems.

$ python evaluate.py out/tiny-layer27                        # the run and its base model, on data/tiny/test.jsonl
$ python evaluate.py --model tiny --prefix To                # a base model with the first token forced (P1 Sec. 3)
$ python evaluate.py out/NAME --benchmarks all               # the papers' six benchmarks, three seeds
$ python evaluate.py out/NAME --data mine.jsonl --samples 4 --seeds 0 1 2

Prints a table and writes it to the run folder as eval.md, its numbers as eval.json: accuracies of run and base model,
their difference, 95 % intervals over problems. Answers are kept in out/answers/, those of train.py and analyze.py too,
and are not computed again: an interrupted command is given again and goes on.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro

import model
import rewards
from data.estimate import average, summary, write_table
from data.problems import PAPERS, Problems, prompt_ids, sets_of
from data.runs import base_checksum, checksum, config_of, identity, keep, kept
from rewards import grade


@dataclass
class Config:
    run: tyro.conf.Positional[str | None] = None  # run folder of train.py; its config.json names the model
    model: str | None = None               # base model, instead of a run: tiny, a local folder or a hub id
    benchmarks: tuple[str, ...] = ()       # names of data/NAME.jsonl (made by data/prepare.py), or all: the papers' six
    data: str | None = None                # jsonl of {problem, answer} instead; default data/tiny/test.jsonl
    problems: int | None = None            # use only the first N problems
    samples: int | None = None             # answers to a problem; default 32 (AIME, AMC), 8 (GSM8K), 1; greedy 1
    temperatures: tuple[float, ...] = (1.0, 0.0)  # 0 decodes greedily
    seeds: tuple[int, ...] = ()            # of the sampler; default 0, with --benchmarks 0 1 2 as in the papers
    base: bool = True                      # measure the run's base model too, and the difference
    checkpoints: bool = False              # measure what train.py --keep-every kept instead, and choose among it
    template: Literal["native", "qwen-math", "r1"] | None = None  # of the prompt; default: as in the run
    system: str | None = None              # system message; default: as in the run
    prefix: str = ""                       # text that every answer begins with, for example To
    context: int | None = None             # tokens of prompt and answer; default the model's own, at most 32768
    max_tokens: int | None = None          # longest answer in tokens; default as in the run, or what the context leaves
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # auto: vllm where it is installed beside a CUDA device
    vllm_memory: float = 0.45              # share of the GPU's memory for vLLM, beside the Hugging Face model
    tensor_parallel: int = 1               # GPUs that the vLLM engine is spread over
    rows: int = 512                        # answers sampled at once; lower it when memory is short
    out: str | None = None                 # folder of the table; default the run folder, or out/MODEL-base
    device: str = "auto"                   # cpu, cuda, ...
    dtype: str = "auto"                    # float32, bfloat16, ...


# ------------------------------------------------------------------------------------------------- a model under test


@dataclass
class Subject:
    """A model under test and how it is asked. It is loaded when it is first needed; `key` needs its files alone."""

    name: str
    template: str | None = None
    system: str | None = None
    context: int | None = None  # tokens of prompt and answer; default the model's own, at most the papers' 32K
    max_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    sampler: str = "auto"
    vllm_memory: float = 0.45
    tensor_parallel: int = 1
    rows: int = 512
    holds: dict = field(default_factory=dict)  # vectors that it will be given: vLLM makes room for them when it starts
    folder: Path = Path("out/answers")

    def __post_init__(self):
        self.config = model.load_config(self.name)
        self.device, self.dtype = model.resolve(self.device, self.dtype)
        self.context = min(self.context or 32768, self.config.max_position_embeddings)
        if self.max_tokens is None and self.name in model.FAMILY:
            self.max_tokens = 80
        self.weights = self.inside = self.name  # whose weights are wanted, whose are in the loaded model
        self.started = None

    @classmethod
    def of_run(cls, config: dict, args, **more) -> "Subject":
        """As a run with this config.json asks its model; settings that are given in args go first."""
        how = {name: config.get(name) for name in ("template", "system", "max_tokens")}  # its context is for training
        how |= {"name": config["model"], "dtype": config.get("dtype", "auto")}
        names = ("template", "system", "max_tokens", "context", "dtype", "device")
        for name in (*names, "sampler", "vllm_memory", "tensor_parallel", "rows"):
            if (given := getattr(args, name, None)) not in (None, "auto"):
                how[name] = given
        return cls(**(how | more))

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    @property
    def samples_with(self) -> str:
        """ "hf", or "vllm"; exits with a line where vLLM cannot hold the vectors."""
        return model.choose_sampler(self.sampler, self.device, self.config.architectures[0], self.holds)

    @property
    def key(self) -> dict:
        """What its answers depend on, from files alone; of a hub model the commit."""
        names = ("name", "template", "system", "context", "max_tokens", "dtype")
        weights = base_checksum(self.weights)
        return {name: getattr(self, name) for name in names} | {"weights": weights, "sampler": self.samples_with}

    @cached_property
    def loaded(self) -> tuple:
        return model.load(self.name, self.device, self.dtype)

    @property
    def tokenizer(self):
        return self.loaded[1]

    @property
    @torch.no_grad()
    def llm(self):
        llm = self.loaded[0]
        if self.inside != self.weights:
            other = dict(model.load(self.weights, str(llm.device), self.dtype)[0].named_parameters())
            for name, weight in llm.named_parameters():
                weight.copy_(other[name])
            self.inside = self.weights
            if self.started is not None:
                self.started.push_weights(llm)
        return llm

    def swap(self, name: str) -> None:
        """Take the weights of another model of the same shape (a run's of --method full) when they are next needed."""
        self.weights = name

    def prompt(self, row: dict) -> list[int]:
        """Token ids of a problem as it is asked here."""
        return prompt_ids(self.tokenizer, row["problem"], self.system, self.template)

    def engine(self, rows: list[dict]):
        """The vLLM engine, tested on the first problems; None where the model itself samples."""
        if self.started is None and self.samples_with == "vllm":
            prompts = [self.prompt(row) for row in rows[:8]]
            how = dict(memory=self.vllm_memory, tensor_parallel=self.tensor_parallel, max_rows=self.rows)
            self.started = model.open_engine(self.name, self.loaded[0], prompts, self.context, self.holds, **how)
        return self.started

    def rollouts(self, vectors: dict, rows: list[dict], k: int, **how) -> model.Rollouts:
        """k answers to each problem. how: more of model.rollouts."""
        settings = {name: getattr(self, name) for name in ("max_tokens", "system", "template", "context")}
        settings |= {"max_rows": self.rows, "engine": self.engine(rows)} | how
        return model.rollouts(self.llm, self.tokenizer, vectors, [row["problem"] for row in rows], k, **settings)


# ---------------------------------------------------------------------------------------------------- ask, grade, keep


@cache
def grader() -> str:
    """A checksum of what decides between right and wrong."""
    code = [(Path(rewards.__file__).parent / name).read_bytes() for name in ("rewards.py", "plumbing/notation.py")]
    return checksum(b"".join(code) + version("math-verify").encode())


def answers(
    subject: Subject, vectors: dict, problems: Problems, k=1, temperature=1.0, seed=0, prefix="", ids=False, bar=None
) -> dict[str, list]:
    """
    Answer every problem k times (greedily once) with the steered model, {} for the base, and grade: lists by problem.

    {"correct": [problem][sample] rewards, "completions": texts, "ended": False where cut off, "lengths": tokens,
    "seconds", "grader"}; with ids also "prompt_ids" and "completion_ids". Kept answers are read: 300 are the first of
    1,000 kept ones, and to 300 kept ones 700 are added, because a problem's answers depend on its own seed alone.
    Those that another grader graded are graded again, not sampled again.
    """
    k, seed = (k, seed) if temperature else (1, 0)
    key = subject.key | {"vectors": identity(vectors), "data": problems.checksum, "prefix": prefix, "ids": ids}
    key |= {"samples": k, "temperature": temperature, "seed": seed}
    name = f"{problems.name}-T{temperature:g}-seed{seed}-{checksum(json.dumps(key).encode())}.json"
    found = kept(subject.folder / name, key) or {}
    done, n = len(found.get("correct", [])), len(problems.rows)
    graders = found.setdefault("grader", [""] * done)
    if stale := [i for i in range(min(done, n)) if graders[i] != grader()]:
        texts, golds = zip(*((text, problems.rows[i]["answer"]) for i in stale for text in found["completions"][i]))
        again = grade(texts, golds)
        for place, i in enumerate(stale):
            found["correct"][i], graders[i] = again[place * k : place * k + k], grader()
        keep(subject.folder / name, key, found)
    if done < n:
        rows, seeds = problems.rows[done:], model.prompt_seeds(seed, range(done, n))
        began = time.perf_counter()
        rolled = subject.rollouts(vectors, rows, k, temperature=temperature, seed=seeds, prefix=prefix, bar=bar)
        seconds = time.perf_counter() - began
        by_row = {
            "correct": grade(rolled.texts, [row["answer"] for row in rows for _ in range(k)]),
            "completions": rolled.texts,
            "ended": rolled.ended,
            "lengths": [len(c) for c in rolled.completions],
        }
        if ids:
            by_row |= {"completion_ids": rolled.completions}
        new = {what: [flat[i : i + k] for i in range(0, len(flat), k)] for what, flat in by_row.items()}
        new |= {"seconds": [seconds / len(rows)] * len(rows), "grader": [grader()] * len(rows)}
        if ids:
            new["prompt_ids"] = rolled.prompts[::k]
        found = keep(subject.folder / name, key, {what: found.get(what, []) + part for what, part in new.items()})
    return {what: part[:n] for what, part in found.items()}


def measure(subject: Subject, vectors: dict, sets: list[Problems], args: Config, who: str) -> dict:
    """{(benchmark, temperature): summary} of the model with these vectors, {} for the base."""
    found, seeds = {}, args.seeds or ((0, 1, 2) if args.benchmarks else (0,))
    for temperature in args.temperatures:
        for problems in sets:
            k, results = args.samples or problems.samples, []
            for seed in seeds if temperature else (0,):  # greedy decoding has no randomness: one answer says all
                bar = f"{who}, {problems.name}, T = {temperature:g}, seed {seed}"
                results.append(answers(subject, vectors, problems, k, temperature, seed, args.prefix, bar=bar))
            found[problems.name, temperature] = summary(results)
        names = [problems.name for problems in sets]
        names = PAPERS if set(PAPERS) <= set(names) else names
        if len(names) > 1:
            found["Avg", temperature] = average([found[name, temperature] for name in names])
    return found


# ------------------------------------------------------------------------------------------------------- the command


def check(args: Config) -> None:
    """Exit with one line for a setting that cannot work."""
    if (args.run is None) == (args.model is None):
        sys.exit("give either a run folder (python evaluate.py out/NAME) or a base model (--model tiny)")
    for name in ("problems", "samples", "max_tokens", "rows", "context", "tensor_parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            sys.exit(f"--{name.replace('_', '-')} wants at least 1, got {value}")
    if not args.temperatures or min(args.temperatures) < 0:
        sys.exit("--temperatures wants one or more numbers from 0 up")
    if args.benchmarks and args.data:
        sys.exit("give either --benchmarks or --data")
    if args.checkpoints and args.run is None:
        sys.exit("--checkpoints wants a run folder of train.py --keep-every N")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("evaluate.py runs as one process, not under torchrun; --tensor-parallel N spreads vLLM over N GPUs")


def vectors_of(run, config: dict) -> tuple[dict, dict]:
    """(vectors, metadata) of a run, on the CPU; ({}, {}) of a run of all weights. Exits if there are none yet."""
    full = config.get("method") == "full"
    what, file = ("weights", "weights/*.safetensors") if full else ("vectors", "vectors.safetensors")
    if not any(Path(run).glob(file)):
        sys.exit(f"no {what} in {run}: the run did not get that far, --resume goes on with it")
    name = config["model"]
    return ({}, {}) if full else model.load_vectors(Path(run) / file, model.load_config(name), name)


def main(args: Config) -> dict:
    """Returns {(benchmark, temperature): {"base": summary, "steered": summary, "difference": ...}} or `checkpoints`."""
    check(args)
    run = {"model": args.model} if args.run is None else config_of(args.run)
    full = run.get("method") == "full"
    if full and args.tensor_parallel > 1:
        sys.exit(f"--tensor-parallel wants 1 for {args.run}: all weights of a run reach vLLM within one process only")
    sets = sets_of(args, run)
    vectors, meta = ({}, {}) if args.run is None else vectors_of(args.run, run)
    folder = Path(args.run or "out/base").parent / "answers"  # beside the run, where train.py and analyze.py look, too
    subject, found = Subject.of_run(run, args, holds=vectors, folder=folder), {}
    if args.checkpoints:
        from data.compare import checkpoints  # here, because it measures with this file

        return checkpoints(subject, run, Path(args.run), sets, args)
    if args.base or args.run is None:
        found["base"] = measure(subject, {}, sets, args, "base")
    if args.run is not None:
        if full:  # all weights were trained: they take the base's place
            subject.swap(str(Path(args.run) / "weights"))
        found["steered"] = measure(subject, vectors, sets, args, "steered")
    rows = {row: {who: part[row] for who, part in found.items()} for row in found[min(found)]}
    for row in rows.values():
        if len(row) == 2:
            row["difference"] = {"accuracy": row["steered"]["accuracy"] - row["base"]["accuracy"]}
    what = f"{run['model']}, base model"
    if args.run is not None:
        where = "all weights" if full else f"steered at layers {', '.join(map(str, vectors))}, step {meta['step']}"
        what = f"{run['model']}, {where} ({args.run})"
    what += f", answers begin with {args.prefix!r}" if args.prefix else ""
    write_table(rows, what, Path(args.out or args.run or f"out/{Path(args.model).resolve().name}-base"))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
