"""
Measure a run, or a base model, on problems with known answers.

$ python evaluate.py out/tiny-layer27                        # the run's vectors, on the embedded model's held-out problems
$ python evaluate.py --model tiny                            # the base model
$ python evaluate.py --model tiny --prefix To                # ... with the first token forced (P1 Sec. 3)
$ python evaluate.py out/tiny-layer27 --data mine.jsonl --samples 4 --seeds 0 1 2

Prints one table and writes eval.json to the run folder: for every setting the accuracy with its 95 % interval over
problems, the 0/1 array [problem][sample] and the completions. The same settings measured again replace their old entry.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import model
from rewards import grade, interval


@dataclass
class Config:
    run: tyro.conf.Positional[str | None] = None  # run folder of train.py; its config.json names the model
    model: str | None = None               # base model, instead of a run: tiny, a local folder or a hub id
    data: str | None = None                # jsonl of {problem, answer}; default: the embedded model's held-out problems
    problems: int | None = None            # only the first so many
    samples: int = 1                       # answers to each problem and seed; at temperature 0 always one
    temperatures: tuple[float, ...] = (1.0, 0.0)  # 0 decodes greedily
    seeds: tuple[int, ...] = (0,)          # of the sampler
    system: str | None = None              # system message; default: as in the run, else the chat template's own
    prefix: str = ""                       # text that every answer begins with, for example To
    max_tokens: int | None = None          # longest answer in tokens; default: as in the run, else 80 (tiny) or 3072
    rows: int = 512                        # answers sampled at once; lower it when memory is short
    out: str | None = None                 # folder of eval.json; default the run folder, or out/MODEL-base
    device: str = "auto"                   # cpu, cuda, ...
    dtype: str = "auto"                    # float32, bfloat16, ...


def measure(
    llm, tokenizer, rows, k, max_tokens, temperature, seeds=(0,), system=None, prefix="", max_rows=512
) -> dict:
    """
    Answer every problem k times with every seed, and grade: accuracy (0 to 1), interval, correct [problem][sample], ...

    The model is taken as it is: call inside model.steer to measure a steered one. Samples of a problem stand together,
    seed by seed.
    """
    began, tokens = time.perf_counter(), 0
    texts, ended = [[] for _ in rows], [[] for _ in rows]  # [problem][sample]
    for seed in seeds:
        rolled = model.rollouts(
            llm, tokenizer, [row["problem"] for row in rows], k, max_tokens, temperature, seed, system, prefix,
            max_rows, bar=f"T = {temperature:g}, seed {seed}",
        )  # fmt: skip
        for i in range(len(rows)):
            texts[i] += rolled.texts[i * k : (i + 1) * k]
            ended[i] += rolled.ended[i * k : (i + 1) * k]
        tokens += sum(map(len, rolled.completions))
    sampled = time.perf_counter()
    n = k * len(seeds)
    flat = grade([text for answers in texts for text in answers], [row["answer"] for row in rows for _ in range(n)])
    correct = [[int(x) for x in flat[i * n : (i + 1) * n]] for i in range(len(rows))]
    return {
        "accuracy": sum(flat) / len(flat),
        "interval_95": interval(correct),
        "problems": len(rows),
        "samples": n,
        "truncated": 1 - sum(map(sum, ended)) / len(flat),  # share of answers cut off at max_tokens
        "tokens_mean": tokens / len(flat),
        "seconds_sampling": sampled - began,
        "tokens_per_second_sampling": tokens / (sampled - began),
        "correct": correct,
        "completions": texts,
    }


def write_results(path: Path, results: dict) -> None:
    """Add results to eval.json; entries of other settings stay."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(old | results, indent=1) + "\n")
    temporary.replace(path)


def main(args: Config) -> dict:
    if (args.run is None) == (args.model is None):
        sys.exit("give either a run folder (python evaluate.py out/NAME) or a base model (--model tiny)")
    for name in ("problems", "samples", "max_tokens", "rows"):
        if (value := getattr(args, name)) is not None and value < 1:
            sys.exit(f"--{name.replace('_', '-')} wants at least 1, got {value}")
    if not args.temperatures or min(args.temperatures) < 0 or not args.seeds:
        sys.exit("--temperatures wants one or more numbers from 0 up, --seeds one or more")
    if args.run is not None:
        config = Path(args.run) / "config.json"
        if not config.is_file():
            sys.exit(f"no run in {args.run}: a run folder of train.py holds config.json and vectors.safetensors")
        run = json.loads(config.read_text())
    else:
        run = {"model": args.model, "max_tokens": 80 if args.model == "tiny" else 3072}
    own_problems = run["model"] == "tiny" and run.get("data") is None
    data = args.data or run.get("held_out") or (model.TINY / "test.jsonl" if own_problems else None)
    if data is None:
        sys.exit("--data FILE is needed: only the embedded model has held-out problems of its own")
    rows = model.read_problems(data)[: args.problems]
    llm, tokenizer = model.load(run["model"], args.device, run.get("dtype", "auto") if args.dtype == "auto" else args.dtype)
    vectors, meta = {}, {"step": 0}
    if args.run is not None:
        vectors, meta = model.load_vectors(Path(args.run) / "vectors.safetensors", llm, run["model"])
    out = Path(args.out or args.run or f"out/{args.model.replace('/', '-')}-base") / "eval.json"

    results = {}
    for temperature in args.temperatures:
        settings = {
            "data": str(data),
            "problems": len(rows),
            "temperature": temperature,
            # greedy decoding has no randomness: one answer says all
            "samples_per_seed": args.samples if temperature > 0 else 1,
            "seeds": list(args.seeds) if temperature > 0 else [0],
            "system": args.system or run.get("system"),
            "prefix": args.prefix,
            "max_tokens": args.max_tokens or run["max_tokens"],
            "step": int(meta["step"]),  # of training
        }
        with model.steer(llm, vectors):
            result = measure(
                llm, tokenizer, rows, settings["samples_per_seed"], settings["max_tokens"], temperature,
                settings["seeds"], settings["system"], settings["prefix"], args.rows,
            )  # fmt: skip
        about = {"model": run["model"], "layers": sorted(vectors), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        results[json.dumps(settings)] = settings | about | result
        write_results(out, results)  # after every setting: an interruption loses one at most

    what = f"{run['model']}, " + (f"steered by {args.run}" if vectors else "base")
    print(what + (f", answers begin with {args.prefix!r}" if args.prefix else "") + f", {data}")
    print(f"{'':8}{'accuracy':>10}{'95 % interval':>16}{'problems':>10}{'samples':>9}{'truncated':>11}{'tokens':>8}")
    for result in results.values():
        name = f"T = {result['temperature']:g}" if result["temperature"] else "greedy"
        low, high = result["interval_95"]
        print(
            f"{name:8}{100 * result['accuracy']:8.1f} %{f'[{100 * low:.1f}, {100 * high:.1f}]':>16}{result['problems']:>10}"
            f"{result['samples']:>9}{100 * result['truncated']:9.1f} %{result['tokens_mean']:8.1f}"
        )
    print(f"wrote {out}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
