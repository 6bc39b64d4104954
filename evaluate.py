"""
Measure a run, or a base model, on problems with known answers, or ask it something. `answers` asks, grades and keeps
the answers; `Estimate` is a number with its interval over problems. train.py and analyze.py measure with both, too.

$ python evaluate.py out/tiny-layer27                        # the run and its base model, on data/tiny/test.jsonl
$ python evaluate.py out/tiny-layer27 --ask "What is 17 + 25?"  # base and steered answer; without a text it asks you
$ python evaluate.py --model tiny --prefix To                # a base model with the first token forced (P1 Sec. 3)
$ python evaluate.py out/NAME --benchmarks all               # the papers' six benchmarks, three seeds
$ python evaluate.py out/NAME --data mine.jsonl --samples 4 --seeds 0 1 2
$ python evaluate.py out/NAME --model OTHER                  # its vectors in another model of this shape (P4 Sec. 7)
$ python evaluate.py out/NAME/checkpoints/00159              # a checkpoint of train.py --keep-every 53

Prints tables and writes them to the run folder as eval.md, their numbers as eval.json: accuracies of run and base model
and their difference with 95 % intervals over problems, and what of it is form. Answers are kept in out/answers/, those
of train.py and analyze.py too, and are not computed again: run an interrupted command again, and it goes on.
"""

import plumbing.threads  # noqa: F401 - before torch is loaded

# isort: split
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial, partialmethod
from math import comb
from pathlib import Path

import numpy as np
import tyro

import model
from data.problems import PAPERS, Problems, problems_of, prompt_ids, sets_of
from model import Subject
from plumbing import memory
from plumbing.ask import ask
from plumbing.bars import Bar
from plumbing.console import one_line
from plumbing.files import checksum, config_of, grader, home_of, identity, keep, kept, lines_of
from plumbing.loading import load_config
from plumbing.settings import Usual, check_measuring, folders_of, own_first, stem_of
from plumbing.tables import markdown, save_table
from rewards import grade, last_number_right, no_answer


@own_first
@dataclass
class Config(model.Asking):
    run: tyro.conf.Positional[Usual[str]] = None  # run folder of train.py, or a checkpoint in it
    model: Usual[str] = None               # base model to measure, or another one of its shape for the run's vectors
    ask: Usual[tuple[str, ...]] = None     # print answers to these questions, or to the lines you type, measure nothing
    strength: tuple[float, ...] = (1.0,)   # factor on the run's vectors; several with --ask
    benchmarks: tuple[str, ...] = ()       # names of data/NAME.jsonl (made by data/prepare.py), or all: the papers' six
    data: Usual[str] = None                # jsonl of {problem, answer} instead; default data/tiny/test.jsonl
    problems: Usual[int] = None            # use only the first N problems
    samples: Usual[int] = None             # answers to a problem at T > 0; default what the file says (AIME: 32), or 1
    temperatures: Usual[tuple[float, ...]] = None  # default 1 and 0, which decodes greedily; with --ask 0
    seeds: tuple[int, ...] = ()            # of the sampler; default 0, with --benchmarks 0 1 2 as in the papers
    base: bool = True                      # measure the run's base model too, and the difference
    checkpoints: bool = False              # measure what train.py --keep-every kept instead, and choose among it
    prefix: str = ""                       # text that every answer begins with, for example To
    out: Usual[str] = None                 # folder of the table; default the run folder, or out/MODEL-base


# ---------------------------------------------------------------------------------------------------- ask, grade, keep


def answers(
    subject: Subject, vectors: dict, problems: Problems, k=1, temperature=1.0, seed=0, prefix="", bar="sampling"
) -> dict[str, list]:
    """
    Answer every problem k times (greedily once) with the steered model, {} for the base, and grade: lists by problem.

    {"correct": [problem][sample] rewards, "completions": texts, "ended": False where cut off, "lengths": tokens,
    "prompt_ids", "completion_ids", "seconds", "grader", "form": in which the prompts asked for the answers}.
    Kept answers are reused: 300 asked for are the first 300 of 1,000 kept ones, and to 300 kept ones 700 are added,
    because a problem's answers depend on its own seed alone. Answers that another grader graded are graded again.
    """
    k, seed = (k, seed) if temperature else (1, 0)
    key = subject.key | {"vectors": identity(vectors), "data": problems.checksum, "prefix": prefix}
    key |= {"samples": k, "temperature": temperature, "seed": seed}
    name = f"{problems.name}-T{temperature:g}-seed{seed}-{checksum(json.dumps(key).encode())}.json"
    shape = {"correct": [list], "completions": [list], "prompt_ids": [list], "grader": [str], "form": [str]}
    found = kept(subject.folder / name, key, shape) or {}
    done, n = len(found.get("correct", [])), len(problems.rows)
    if stale := [i for i in range(min(done, n)) if found["grader"][i] != grader()]:
        texts, golds = zip(*((text, problems.rows[i]["answer"]) for i in stale for text in found["completions"][i]))
        again = grade(texts, golds, found["form"][0])
        for place, i in enumerate(stale):
            found["correct"][i], found["grader"][i] = again[place * k : place * k + k], grader()
        keep(subject.folder / name, key, found)
    if done < n:
        rows, seeds = problems.rows[done:], model.prompt_seeds(seed, range(done, n))
        began = time.perf_counter()
        rolled = subject.rollouts(vectors, rows, k, temperature=temperature, seed=seeds, prefix=prefix, bar=bar)
        seconds = time.perf_counter() - began
        by_row = {
            "correct": grade(rolled.texts, [row["answer"] for row in rows for _ in range(k)], subject.form),
            "completions": rolled.texts,
            "ended": rolled.ended,
            "lengths": [len(c) for c in rolled.completions],
            "completion_ids": rolled.completions,
        }
        new = {what: [flat[i : i + k] for i in range(0, len(flat), k)] for what, flat in by_row.items()}
        each = {"seconds": seconds / len(rows), "grader": grader(), "form": subject.form}
        new |= {what: [x] * len(rows) for what, x in each.items()} | {"prompt_ids": rolled.prompts[::k]}
        found = keep(subject.folder / name, key, {what: found.get(what, []) + part for what, part in new.items()})
    return {what: part[:n] for what, part in found.items()}


# ----------------------------------------------------------------------------------------- a number and its interval


@lru_cache(4)
def resamples(n: int, draws: int = 10_000) -> np.ndarray:
    """Bootstrap samples of n problems, (draws, n): the same for every estimate, so that estimates are paired."""
    return np.random.default_rng(0).integers(n, size=(draws, n)).astype(np.int32)


class Estimate:
    """
    A number over problems with bootstrap draws of it.

    Whole problems are resampled, because the answers to one are not independent. All estimates over n problems resample
    the same ones, so the draws of a - b are those of the difference: what is hard for both does not count as noise.
    """

    def __init__(self, value: float | None, draws: np.ndarray, n: int = 0):
        self.value, self.draws, self.n, self.unclear = value, draws, n, False  # n: problems of a share, else 0

    @classmethod
    def of(cls, rows: list[list[float]], share=False) -> "Estimate":
        """The mean of the rows' means. rows: [problem][sample]; share: numbers from 0 to 1, grades for example."""
        means = np.array([np.mean(row) for row in rows])
        return cls(float(means.mean()), means[resamples(len(means))].mean(1), len(rows) if share else 0)

    rate = partialmethod(of, share=True)

    @classmethod
    def mean(cls, parts: list["Estimate"]) -> "Estimate":
        """The mean over different sets of problems (benchmarks of equal weight), drawn independently of each other."""
        draws = [np.random.default_rng(i).permutation(part.draws) for i, part in enumerate(parts)]
        n = len(parts) * min(part.n for part in parts)  # the smallest set has the largest doubt
        return cls(statistics.mean(part.value for part in parts), np.mean(draws, 0), n)

    @classmethod
    def largest(cls, *parts: "Estimate") -> "Estimate":
        """The largest of paired estimates, chosen anew in every draw."""
        return cls(max(part.value for part in parts), np.max([part.draws for part in parts], 0), parts[0].n)

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio of paired estimates: None where the divisor is 0, without the draws where it is."""
        fine = other.draws != 0
        return Estimate(self.value / other.value if other.value else None, self.draws[fine] / other.draws[fine])

    def share(self, zero: "Estimate", whole: "Estimate") -> "Estimate":
        """
        (self - zero) / (whole - zero), the share of a gain. (0.3, 0.2, 0.6) -> 0.25

        `unclear` is True where the interval of whole - zero is not above 0: then the share says nothing.
        """
        found = (self - zero) / (whole - zero)
        found.unclear = (whole - zero).interval[0] <= 0
        return found

    @property
    def interval(self) -> tuple[float, float]:
        """
        (low, high) of the 95 % percentile interval; without any draws not a number.

        A share of 0 or 1 stays what it is in every draw, and has Wilson's interval instead: 0 of 2 -> (0, 0.66).
        """
        if self.n and self.value in (0, 1):
            width = 1.96**2 / (self.n + 1.96**2)
            return (0.0, width) if self.value == 0 else (1 - width, 1.0)
        low, high = np.percentile(self.draws, [2.5, 97.5]) if len(self.draws) else (float("nan"),) * 2
        return float(low), float(high)

    def text(self, sign: str = "") -> str:
        """In percent: "43.2 [41.0, 45.4]"; with sign "+" as a difference, in points."""
        low, high = self.interval
        return f"{100 * self.value:{sign}.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def plain(self, digits: int = 2) -> str:
        """As it is, with so many significant digits: "0.61 [0.6, 0.64]"."""
        low, high = self.interval
        return f"{self.value:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"

    def json(self) -> dict:
        return {"value": self.value, "interval_95": self.interval} | ({"unclear": True} if self.unclear else {})


# ---------------------------------------------------------------------------------------------------------- the tables

COUNTED = {"accuracy": "right %", "last_number": "last number right %", "has_answer": "has a box %"}
COUNTED |= {"truncated": "cut off %", "pass_at_k": "pass@k %"}


def measure(subject: Subject, vectors: dict, sets: list[Problems], args: Config, who: str) -> dict:
    """{(benchmark, temperature): summary} of the model with these vectors, {} for the base."""
    found, seeds = {}, args.seeds or ((0, 1, 2) if args.benchmarks else (0,))
    for temperature in args.temperatures or (1.0, 0.0):
        for problems in sets:
            k, results = args.samples or problems.samples, []
            for seed in seeds if temperature else (0,):  # greedy decoding has no randomness: one answer says all
                bar = f"{who}, {problems.name}, T = {temperature:g}, seed {seed}"
                results.append(answers(subject, vectors, problems, k, temperature, seed, args.prefix, bar=bar))
            found[problems.name, temperature] = summary(results, [row["answer"] for row in problems.rows])
        names = [problems.name for problems in sets]
        names = PAPERS if set(PAPERS) <= set(names) else names
        if len(names) > 1:
            found["Avg", temperature] = average([found[name, temperature] for name in names])
    return found


def pass_at(k: int, right: list[float]) -> float:
    """The chance that one of k of these grades is 1: 1 - C(n - c, k) / C(n, k). (2, [1, 0, 0, 0]) -> 1/2"""
    return 1 - comb(right.count(0), k) / comb(len(right), k)


def summary(results: list[dict], golds: list) -> dict:
    """The answers of several seeds as one row: accuracy, what else is counted (COUNTED), and how it was measured."""

    def joined(what: str) -> list[list]:  # [problem][samples of all seeds]
        return [sum(rows, []) for rows in zip(*(r[what] for r in results))]

    correct, texts, lengths = joined("correct"), joined("completions"), sum(joined("lengths"), [])
    numbers = [[last_number_right(text, gold) for text in row] for row, gold in zip(texts, golds)]
    numbers = [row for row in numbers if None not in row]  # None: the answer is no number
    by_seed = [statistics.mean(map(statistics.mean, r["correct"])) for r in results]
    form, k = results[0]["form"][0], len(results[0]["correct"][0])
    return {
        "accuracy": Estimate.rate(correct),
        "last_number": Estimate.rate(numbers) if numbers else None,  # boxed or not
        "has_answer": 1 - no_answer(sum(texts, []), form) / len(lengths),
        "truncated": 1 - statistics.mean(sum(joined("ended"), [])),
        "pass_at_k": Estimate.rate([[pass_at(k, row)] for row in correct]) if k > 1 else None,
        "by_seed": by_seed,
        "sd_over_seeds": statistics.pstdev(by_seed) if len(by_seed) > 1 else None,  # divisor n, as the papers
        "problems": len(correct),
        "samples": k * len(results),  # of all seeds together
        "seeds": len(results),
        "tokens_mean": statistics.mean(lengths),
        "tokens_per_second": sum(lengths) / sum(sum(r["seconds"]) for r in results),
    }


def average(found: list[dict]) -> dict:
    """The mean of several benchmarks' summaries, and its standard deviation over seeds."""
    by_seed = [statistics.mean(seed) for seed in zip(*(row["by_seed"] for row in found))]
    mean = Estimate.mean([row["accuracy"] for row in found])
    return {"accuracy": mean, "sd_over_seeds": statistics.pstdev(by_seed) if len(by_seed) > 1 else None}


def difference(steered: dict, base: dict) -> dict:
    return {what: steered[what] - base[what] for what in COUNTED if None not in (steered.get(what), base.get(what))}


def cell(found: dict, what="accuracy", sign="") -> str:
    """In percent 43.2 ±0.3 [41.0, 45.4], or 43.2 where there is no interval; with sign "+" as a difference."""
    x = found.get(what)
    if not isinstance(x, Estimate):
        return "" if x is None else f"{100 * x:{sign}.1f}"
    value, _, interval = x.text(sign).partition(" ")
    spread = found.get("sd_over_seeds") if what == "accuracy" else None
    return f"{value} {interval}" if spread is None else f"{value} ±{100 * spread:.1f} {interval}"


def tables(found: dict) -> tuple[str, str]:
    """Right answers; and what part of them is form. found: {(benchmark, temperature): {who: summary}}."""
    rows, parts = [], []
    for (name, temperature), row in found.items():
        where, about = [name, f"T = {temperature:g}" if temperature else "greedy"], row.get("steered") or row["base"]
        sizes = [""] * 5
        if "problems" in about:  # the papers: PASS@1, mean@8, AVG@32
            sizes = [f"mean@{about['samples'] // about['seeds']}", f"{about['problems']}", f"{about['seeds']}"]
            sizes += [f"{about['tokens_mean']:.0f}", f"{about['tokens_per_second']:.0f}"]
        signs = {"steered": "", "base": "", "difference": "+"}
        rows.append([*where, *(cell(row.get(who, {}), sign=sign) for who, sign in signs.items()), *sizes])
        for who in row if "problems" in about else ():
            parts.append([*where, who, *(cell(row[who], what, signs[who]) for what in COUNTED)])
    head = ["steered %", "base %", "difference", "metric", "problems", "seeds", "tokens", "tokens/s"]
    where = ["benchmark", "decoding"]
    return markdown([*where, *head], rows), markdown([*where, "model", *COUNTED.values()], parts)


def write_tables(found: dict, what: str, strength: float, out: Path, name: str) -> None:
    """Print the tables, write NAME.md and NAME.json. found: as for `tables`."""
    right, parts = tables(found)
    text = f"{what}. Percent of right answers, 95 % intervals over problems"
    text += "; ± is the standard deviation over seeds (divisor: their number, as in the papers)" if "±" in right else ""
    text += f"\n\n{right}\n\nHow much of it is form? A box is the tag <answer> under the template r1. The last number "
    text += "counts boxed or not,\nwhere the answer is a number. pass@k: one of k answers is right, k as in mean@k.\n\n"
    numbers = []
    for (benchmark, temperature), row in found.items():
        parts_of = {who: part | part["accuracy"].json() for who, part in row.items()}
        numbers.append({"benchmark": benchmark, "temperature": temperature, "strength": strength} | parts_of)
    save_table(f"{text}{parts}\n", numbers, out, name)


def compare_with_base(subject, vectors: dict, problems: Problems, base: str, seed: int) -> float:
    """
    Print accuracies of run and base model, their difference, three answers; returns the base's accuracy at T = 1.

    subject: the model of the run; with --method full its weights are the trained ones. base: name of the base model.
    """
    found = {}
    for who, given in (("steered", vectors), ("base", {})):
        if who == "base":
            subject.swap(base)
        for t in (1.0, 0.0):
            found[who, t] = answers(subject, given, problems, 1, t, seed, bar=f"{who}, held out, T = {t:g}")
    accuracy = {key: Estimate.rate(x["correct"]) for key, x in found.items()}
    accuracy |= {("difference", t): accuracy["steered", t] - accuracy["base", t] for t in (1.0, 0.0)}
    print(f"\nright answers to {len(problems.rows)} held-out problems in %, with 95 % intervals over problems\n")
    table = [[who, accuracy[who, 1.0].text(), accuracy[who, 0.0].text()] for who in ("base", "steered", "difference")]
    print(markdown(["model", "T = 1", "greedy"], table))
    for i, row in enumerate(problems.rows[:3]):
        print(f"\n{row['problem']}  (answer: {row['answer']})")
        for who in ("base", "steered"):
            verdict = "right" if found[who, 1.0]["correct"][i][0] else "wrong"
            print(f"  {who}, T = 1, {verdict}: " + found[who, 1.0]["completions"][i][0].replace("\n", "\n    "))
    return accuracy["base", 1.0].value


# --------------------------------------------------------------------------------------------------------- checkpoints

# The authors plot the best of several checkpoints, chosen by the test score. Chosen and measured on the same problems
# it is too high. So `checkpoints` also chooses by training problems that no step has seen, and shows the difference.


def unseen(run: Path, config: dict, subject: Subject) -> Problems:
    """Problems of a run's training file that none of its steps drew, at most 400. metrics.jsonl has what was drawn."""
    data = problems_of(config["data"])
    seen = {line for row in lines_of(run / "metrics.jsonl", {"problems": [int]}) for line in row["problems"]}
    asked = partial(prompt_ids, subject.tokenizer, system=config.get("system"), template=config.get("template"))
    every = Bar(data.rows, desc="prompts", unit="problems")
    rows = [row for row in every if row["line"] not in seen and len(asked(row["problem"])) < config["context"]]
    return Problems(f"unseen-{data.name}", rows[:400], checksum(json.dumps(rows[:400]).encode()))


def chosen(test: dict[int, Estimate], validation: dict[int, Estimate]) -> dict[str, int]:
    """The step that each rule takes: the last, the best on unseen training or on test problems, of equals the first."""
    rules = {"last": max(test)}
    if validation:
        rules["best on unseen training problems"] = max(validation, key=lambda step: validation[step].value)
    return rules | {"best on the test problems": max(test, key=lambda step: test[step].value)}


def checkpoints(subject: Subject, config: dict, run: Path, sets: list[Problems], args: Config) -> dict:
    """
    Measure a run's checkpoints at the first temperature; writes checkpoints.md and checkpoints.json to the run folder.

    Returns {"test": {step: Estimate}, the mean over `sets`, "validation": {step: Estimate}, "rules": {rule: step},
    "difference": Estimate of what it adds to choose by the test problems}.
    """
    folders, test, validation, table = folders_of(run), {}, {}, []
    T, others = (args.temperatures or (1.0,))[0], unseen(run, config, subject)
    for step, folder in folders.items():
        vectors, _ = vectors_of(folder, config)
        if config.get("method") == "full":
            subject.swap(str(folder / "weights"))
        found = measure(subject, vectors, sets, replace(args, temperatures=(T,)), f"step {step}")
        parts = [found[problems.name, T]["accuracy"] for problems in sets]
        test[step] = parts[0] if len(parts) == 1 else Estimate.mean(parts)
        if others.rows:
            bar = f"step {step}, {others.name}"
            validation[step] = Estimate.rate(answers(subject, vectors, others, 1, T, 0, args.prefix, bar)["correct"])
    rules = chosen(test, validation)
    fair, optimistic = rules.get("best on unseen training problems", rules["last"]), rules["best on the test problems"]
    numbers = {"test": test, "validation": validation, "rules": rules, "difference": test[optimistic] - test[fair]}
    for step in test:
        names = ", ".join(rule for rule, taken in rules.items() if taken == step)
        table.append([str(step), validation[step].text() if validation else "", test[step].text(), names])
    head = ["step", f"{len(others.rows)} unseen training problems %", "test problems %", "chosen as"]
    names = ", ".join(f"{problems.name} ({len(problems.rows)})" for problems in sets)
    text = f"{run}, T = {T:g}; test problems: {names}; 95 % intervals over problems\n\n{markdown(head, table)}\n\n"
    if not validation:
        text += f"After {max(test)} steps no training problem is unseen, so the last step is the fair choice.\n"
    text += "The best on the test problems is how the authors choose; its own accuracy is too high, for the same "
    text += f"problems choose and measure. The choice adds {numbers['difference'].text('+')} points here.\n"
    save_table(text, numbers, Path(args.out or run), "checkpoints")
    return numbers


# ------------------------------------------------------------------------------------------------------- the command


def vectors_of(run, config: dict, other=False) -> tuple[dict, dict]:
    """
    (vectors, metadata) of a run, on the CPU; ({}, {}) of a run of all weights. Exits if there are none yet.

    config: names the model that gets them. other: it may be another one than they were trained in.
    """
    full = config.get("method") == "full"
    what, file = ("weights", "weights/*.safetensors") if full else ("vectors", "vectors.safetensors")
    if not any(Path(run).glob(file)):
        sys.exit(f"no {what} in {run}: the run did not get that far, --resume goes on with it")
    name = config["model"]
    return ({}, {}) if full else model.load_vectors(Path(run) / file, load_config(name), None if other else name)


def scaled(vectors: dict, strength: float) -> dict:
    """Vectors of so many times the effect. Of a LoRA, B alone is scaled: B A x is linear in it."""
    return {place: s if model.split(place).matrix == "lora_A" else strength * s for place, s in vectors.items()}


@one_line()
def main(args: Config) -> dict | None:
    """Returns {(benchmark, temperature): {"base": summary, "steered": summary, "difference": ...}} or `checkpoints`."""
    check_measuring(args)
    run = config_of(args.run) if args.run else {"model": args.model}
    full, (strength, *_) = run.get("method") == "full", args.strength
    if full and (args.tensor_parallel > 1 or args.strength != (1.0,) or args.model):
        sys.exit(f"{args.run} trained all weights: --strength and --model want vectors, --tensor-parallel wants 1")
    sets = sets_of(args, run) if args.ask is None else []
    run |= {"model": args.model or run["model"]}
    vectors, meta = vectors_of(args.run, run, other=bool(args.model)) if args.run else ({}, {})
    folder = home_of(args.run or "out/base").parent / "answers"  # where train.py and analyze.py look, too
    subject, found = Subject.of_run(run, args, holds=vectors, folder=folder), {}
    if args.ask is not None:
        return ask(subject, [scaled(vectors, x) for x in args.strength], run, args)
    memory.say(subject, max(args.samples or problems.samples for problems in sets), subject.context)
    if args.checkpoints:
        return checkpoints(subject, run, Path(args.run), sets, args)
    if args.base or args.run is None:
        found["base"] = measure(subject, {}, sets, args, "base")
    if args.run is not None:
        if full:  # all weights were trained: they take the base's place
            subject.swap(str(Path(args.run) / "weights"))
        found["steered"] = measure(subject, scaled(vectors, strength), sets, args, "steered")
    rows = {row: {who: part[row] for who, part in found.items()} for row in found[min(found)]}
    for row in rows.values():
        if len(row) == 2:
            row["difference"] = difference(**row)
    what = f"{run['model']}, base model"
    if args.run is not None:
        where = "all weights" if full else f"steered at layers {', '.join(map(str, vectors))}, step {meta['step']}"
        where += f", strength {strength:g}" if strength != 1 else ""
        where += f", trained in {meta['model']}" if args.model else ""
        what = f"{run['model']}, {where} ({args.run})"
    what += f", answers begin with {args.prefix!r}" if args.prefix else ""
    other = stem_of(args.model or "")
    name = "eval" + f"-strength{strength:g}" * (strength != 1) + f"-in-{other}" * bool(args.model and args.run)
    write_tables(rows, what, strength, Path(args.out or args.run or f"out/{other}-base"), name)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
