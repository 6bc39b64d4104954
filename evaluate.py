"""
Measure a run, or a base model, on problems with known answers.

$ python evaluate.py out/tiny-layer27                        # the run and its base model, the embedded model's held-out problems
$ python evaluate.py --model tiny --prefix To                # a base model with the first token forced (P1 Sec. 3)
$ python evaluate.py out/NAME --benchmarks all               # AIME24/25, AMC23, MATH500, Minerva, OlympiadBench; three seeds
$ python evaluate.py out/NAME --data mine.jsonl --samples 4 --seeds 0 1 2

One table, in the terminal and as eval.md in the run folder: accuracy with its 95 % interval over problems, the base model's,
and their difference, paired by problem; the numbers are in eval.json. Every benchmark, temperature and seed has a file with
0/1 arrays and answers in eval/ of the run (of out/MODEL-base for the base model) and is not computed again if it is there:
an interrupted command is given again and goes on.
"""

import json
import os
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

import model
from rewards import bootstrap, grade, interval, percentiles

PAPERS = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad"]  # P4's six; Avg is the mean of their accuracies
SAMPLES = {"aime24": 32, "aime25": 32, "amc23": 32, "gsm8k_test": 8}  # answers to each problem; 1 elsewhere (P4 Sec. 2, B Sec. 3)


@dataclass
class Config:
    run: tyro.conf.Positional[str | None] = None  # run folder of train.py; its config.json names the model
    model: str | None = None               # base model, instead of a run: tiny, a local folder or a hub id
    benchmarks: tuple[str, ...] = ()       # names of data/NAME.jsonl (python data/prepare.py NAME), or all: the papers' six
    data: str | None = None                # jsonl of {problem, answer}, instead; default: the embedded model's held-out problems
    problems: int | None = None            # only the first so many
    samples: int | None = None             # answers to each problem and seed; default 32 (AIME, AMC), 8 (GSM8K) or 1; greedy 1
    temperatures: tuple[float, ...] = (1.0, 0.0)  # 0 decodes greedily
    seeds: tuple[int, ...] = ()            # of the sampler; default 0, with --benchmarks 0 1 2 as in the papers
    base: bool = True                      # measure the run's base model too, and the difference
    template: Literal["native", "qwen-math", "r1"] | None = None  # of the prompt; default: as in the run
    system: str | None = None              # system message; default: as in the run
    prefix: str = ""                       # text that every answer begins with, for example To
    context: int | None = None             # tokens of prompt and answer; default what the model was made for, at most 32768
    max_tokens: int | None = None          # longest answer in tokens; default as in the run; 80 (tiny); what the context leaves
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # auto: vllm where it is installed beside a CUDA device
    vllm_memory: float = 0.45              # share of the GPU's memory for vLLM, beside the Hugging Face model
    tensor_parallel: int = 1               # GPUs that the vLLM engine is spread over
    rows: int = 512                        # answers sampled at once; lower it when memory is short
    out: str | None = None                 # folder of the results; default the run folder, or out/MODEL-base
    device: str = "auto"                   # cpu, cuda, ...
    dtype: str = "auto"                    # float32, bfloat16, ...


def measure(llm, tokenizer, vectors: dict, rows: list[dict], k: int, temperature: float, seed: int, **how) -> dict:
    """
    Answer every problem k times with the steered model and grade: correct [problem][sample], completions, counts, seconds.

    vectors: {} for the base model. how: more of model.rollouts, for example max_tokens, prefix, engine.
    """
    began = time.perf_counter()
    problems = [row["problem"] for row in rows]
    rolled = model.rollouts(llm, tokenizer, vectors, problems, k, temperature=temperature, seed=seed, **how)
    sampled = time.perf_counter()
    flat = grade(rolled.texts, [row["answer"] for row in rows for _ in range(k)])
    return {
        "correct": [[int(x) for x in flat[i * k : (i + 1) * k]] for i in range(len(rows))],
        "truncated": len(rolled.ended) - sum(rolled.ended),  # answers cut off at their limit
        "tokens": sum(map(len, rolled.completions)),
        "seconds_sampling": sampled - began,
        "completions": [rolled.texts[i * k : (i + 1) * k] for i in range(len(rows))],
    }


def load_or_measure(folder: Path, settings: dict, compute) -> dict:
    """The result with these settings from folder, or from compute(), which is then saved there: settings and result."""
    text = json.dumps(settings, sort_keys=True)
    name = f"{settings['benchmark']}-T{settings['temperature']:g}-seed{settings['seed']}-{zlib.crc32(text.encode()):08x}.json"
    path = folder / "eval" / name
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    result = settings | compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return result


def summary(results: list[dict]) -> dict:
    """The results of several seeds as one: accuracy (0 to 1), its 95 % interval over problems, spread over seeds, ..."""
    correct = [sum(answers, []) for answers in zip(*(r["correct"] for r in results))]  # [problem][samples of all seeds]
    by_seed = [statistics.mean(map(statistics.mean, r["correct"])) for r in results]
    answers = sum(map(len, correct))
    seconds = sum(r["seconds_sampling"] for r in results)
    return {
        "accuracy": statistics.mean(by_seed),
        "interval_95": interval(correct),
        "sd_over_seeds": statistics.stdev(by_seed) if len(by_seed) > 1 else None,
        "problems": len(correct),
        "samples": answers // len(correct),  # of all seeds together
        "seeds": len(results),
        "truncated": sum(r["truncated"] for r in results) / answers,
        "tokens_mean": sum(r["tokens"] for r in results) / answers,
        "tokens_per_second": sum(r["tokens"] for r in results) / seconds,
        "correct": correct,
    }


def difference(steered: dict, base: dict) -> dict:
    """Steered minus base, paired by problem: both saw the same ones, so what is hard for both does not count as noise."""
    pairs = zip(steered["correct"], base["correct"])
    gains = [[statistics.mean(s) - statistics.mean(b)] for s, b in pairs]
    return {"accuracy": steered["accuracy"] - base["accuracy"], "interval_95": interval(gains), "correct": gains}


def average(parts: list[dict]) -> dict:
    """The mean accuracy of benchmarks, each of equal weight however many problems it has, and its interval."""
    draws = sum(bootstrap(part["correct"], seed=i) for i, part in enumerate(parts)) / len(parts)  # benchmarks are independent
    return {"accuracy": statistics.mean(p["accuracy"] for p in parts), "interval_95": percentiles(draws)}


def cell(found: dict | None, sign: str = "") -> str:
    """43.2 [41.0, 45.4] in percent."""
    if found is None:
        return ""
    low, high = found["interval_95"]
    spread = f" ±{100 * found['sd_over_seeds']:.1f}" if found.get("sd_over_seeds") is not None else ""
    return f"{100 * found['accuracy']:{sign}.1f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def write_table(found: dict, what: str, out: Path) -> None:
    """
    Print the table and write it as eval.md, with the numbers in eval.json.

    found: {temperature: {benchmark: {"steered": summary or None, "base": ..., "difference": ...}}}.
    """
    head = ["benchmark", "decoding", "steered %", "base %", "difference"]
    table = [head + ["metric", "problems", "seeds", "truncated", "tokens", "tokens/s"]]
    for temperature, benchmarks in found.items():
        for name, row in benchmarks.items():
            about = row["steered"] or row["base"]
            counts = [""] * 6
            if "problems" in about:
                k = about["samples"] // about["seeds"]
                metric = "PASS@1" if k == 1 else f"mean@{k}" if name.startswith("gsm8k") else f"AVG@{k}"  # the papers' names
                counts = [
                    metric, str(about["problems"]), str(about["seeds"]), f"{100 * about['truncated']:.1f} %",
                    f"{about['tokens_mean']:.0f}", f"{about['tokens_per_second']:.0f}",
                ]  # fmt: skip
            decoding = f"T = {temperature:g}" if temperature else "greedy"
            cells = [cell(row["steered"]), cell(row["base"]), cell(row["difference"], "+")]
            table.append([name, decoding, *cells, *counts])
    table = [row[:2] + [c for c, used in zip(row[2:], map(any, zip(*[r[2:] for r in table[1:]]))) if used] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    text = f"{what}. Percent of right answers, 95 % intervals over problems" + (
        "; ± is the standard deviation over seeds" if "±" in "".join(lines) else ""
    )
    print(f"\n{text}\n\n" + "\n".join(lines))
    (out / "eval.md").write_text(f"{text}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    numbers = [
        {"benchmark": name, "temperature": temperature}
        | {who: part and {k: v for k, v in part.items() if k != "correct"} for who, part in row.items()}
        for temperature, benchmarks in found.items()
        for name, row in benchmarks.items()
    ]
    (out / "eval.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\nwrote eval.md, eval.json and eval/ in {out}")


def check(args: Config) -> None:
    """Exit with one line for a setting that cannot work."""
    if (args.run is None) == (args.model is None):
        sys.exit("give either a run folder (python evaluate.py out/NAME) or a base model (--model tiny)")
    for name in ("problems", "samples", "max_tokens", "rows", "context", "tensor_parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            sys.exit(f"--{name.replace('_', '-')} wants at least 1, got {value}")
    if not args.temperatures or min(args.temperatures) < 0:
        sys.exit("--temperatures wants one or more numbers from 0 up")
    if args.run is not None and not (Path(args.run) / "config.json").is_file():
        sys.exit(f"no run in {args.run}: a run folder of train.py holds config.json and vectors.safetensors or weights/")
    if args.benchmarks and args.data:
        sys.exit("give either --benchmarks or --data")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("evaluate.py runs as one process, not under torchrun; --tensor-parallel N spreads vLLM over N GPUs")


def files_of(args: Config, name: str) -> dict[str, Path]:
    """{benchmark: its problems}. name: of the model."""
    if args.data:
        return {Path(args.data).stem: Path(args.data)}
    if not args.benchmarks:
        if name not in model.FAMILY:
            sys.exit("--benchmarks NAME... or --data FILE is needed: only the embedded model has held-out problems of its own")
        return {"tiny": model.TINY / "test.jsonl"}
    names = PAPERS if args.benchmarks == ("all",) else args.benchmarks
    files = {name: Path(__file__).parent / "data" / f"{name}.jsonl" for name in names}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        sys.exit(f"no problems of {', '.join(missing)}: run `python data/prepare.py {' '.join(missing)}`")
    return files


def main(args: Config) -> dict:
    check(args)
    run = {"model": args.model} if args.run is None else json.loads((Path(args.run) / "config.json").read_text())
    name = run["model"]
    benchmarks = {b: model.read_problems(path)[: args.problems] for b, path in files_of(args, name).items()}
    llm, tokenizer = model.load(name, args.device, run.get("dtype", "auto") if args.dtype == "auto" else args.dtype)
    weights = model.fingerprint(llm)
    vectors, base_folder = {}, Path(args.out or f"out/{Path(name).resolve().name}-base")
    folder, state = base_folder, {"step": 0, "vectors": None}
    full = run.get("method") == "full"
    if full and args.tensor_parallel > 1:
        sys.exit(f"--tensor-parallel wants 1 for {args.run}: all weights of a run reach vLLM within one process only")
    if args.run is not None:
        folder, state["vectors"] = Path(args.out or args.run), model.stamp(args.run, run)
    if args.run is not None and not full:
        vectors, meta = model.load_vectors(Path(args.run) / "vectors.safetensors", llm, name)
        state["step"] = int(meta["step"])
    # what the model was made for, at most the papers' 32K: 4,096 for Qwen2.5-Math
    context = args.context or min(32768, llm.config.max_position_embeddings)
    max_tokens = args.max_tokens or run.get("max_tokens") or (80 if name in model.FAMILY else None)
    asked = {
        "model": name,
        "template": args.template or run.get("template"),
        "system": run.get("system") if args.system is None else args.system,
        "prefix": args.prefix,
        "context": context,
        "max_tokens": max_tokens,
    }
    how = {key: asked[key] for key in ("template", "system", "prefix", "context", "max_tokens")}
    first = next(iter(benchmarks.values()))
    engine = model.open_engine(
        args.sampler, name, llm, [model.prompt_ids(tokenizer, r["problem"], how["system"], how["template"]) for r in first[:8]],
        context, args.vllm_memory, args.tensor_parallel, args.rows, vectors,
    )  # fmt: skip

    seeds = args.seeds or ((0, 1, 2) if args.benchmarks else (0,))

    def measured(who, temperature, benchmark, rows):
        given, place, about = {}, base_folder, {"step": 0, "vectors": None}
        if who == "steered":
            given, place, about = vectors, folder, state
        k = (args.samples or SAMPLES.get(benchmark, 1)) if temperature else 1  # greedy has no randomness: one answer says all
        results = []
        for seed in seeds if temperature else (0,):
            settings = {"benchmark": benchmark, "temperature": temperature, "seed": seed, "problems": len(rows), "samples": k}
            text = json.dumps(rows, sort_keys=True).encode()
            settings |= asked | {"data": f"{zlib.crc32(text):08x}"} | about
            settings |= {"weights": weights, "dtype": str(llm.dtype), "sampler": "vllm" if engine else "hf"}
            bar = f"{who}, {benchmark}, T = {temperature:g}, seed {seed}"
            compute = partial(
                measure, llm, tokenizer, given, rows, k, temperature, seed, max_rows=args.rows, engine=engine, bar=bar, **how
            )
            results.append(load_or_measure(place, settings, compute))
        return summary(results)

    found = {t: {b: {"steered": None, "base": None, "difference": None} for b in benchmarks} for t in args.temperatures}
    for who in ["base"] * (args.base or args.run is None) + ["steered"] * (args.run is not None):
        if who == "steered" and full:  # all weights were trained: they take the base's place
            model.replace_weights(llm, str(Path(args.run) / "weights"))
            if engine is not None:
                engine.push_weights(llm)
        for temperature in args.temperatures:
            for benchmark, rows in benchmarks.items():
                found[temperature][benchmark][who] = measured(who, temperature, benchmark, rows)
    for temperature in args.temperatures:
        for row in found[temperature].values():
            if row["steered"] and row["base"]:
                row["difference"] = difference(row["steered"], row["base"])
        if set(PAPERS) <= set(benchmarks):
            six = [found[temperature][benchmark] for benchmark in PAPERS]
            row = {who: average([r[who] for r in six]) if six[0][who] else None for who in six[0]}
            found[temperature]["Avg"] = row

    what = f"{name}, base model"
    if args.run is not None:
        where = "all weights" if full else f"steered at layers {', '.join(map(model.name_of, vectors))}, step {state['step']}"
        what = f"{name}, {where} ({args.run})"
    what += f", answers begin with {args.prefix!r}" if args.prefix else ""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(found, what, folder)
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
