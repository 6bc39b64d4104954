r"""
Fetch the problems that the papers train on and measure with: data/NAME.jsonl, a line {"id", "problem", "answer"} for
each.

$ python data/prepare.py math500 gsm8k                          # from the hub (pip install datasets==5.2.0)
$ python data/prepare.py all                                    # all sets; those that are there stay as they are
$ python data/prepare.py deepscaler --drop-contaminated         # without problems of the benchmarks in data/
$ python data/prepare.py math500 --from test.jsonl              # from a local jsonl, json or parquet file, no network

Benchmarks: aime24, aime25, amc23, math500, minerva, olympiad, gsm8k_test. Training sets: gsm8k, math, deepscaler,
open-s1.

Golds are cleaned (see clean) as far as rewards.py does not read them anyway. It reads Minerva's 4.5e33,
np.arcsin(10/13), -1./3 and \exp{a*t}, and Olympiad's $69$,$84$, which is one gold: an answer must have both. The papers
train on all rows of DeepScaleR, one epoch in 314 steps of 128 prompts: a row is left out only if it has no gold, if its
gold is no answer (`proof`, `notfound`: nobody can be right there), or if an option below says so. MATH has 12,000
problems to train on and 500 to measure with (arXiv:2505.18706, App. E): here the 7,500 rows of its train split, then
the 5,000 of its test split, without the problems of math500.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import rewards  # noqa: E402
from plumbing.console import one_line  # noqa: E402
from plumbing.files import write  # noqa: E402

HERE = Path(__file__).parent
SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
SOURCES = {  # name: (hub id, configs, split, field of the problem, field of the gold, rows that are right)
    "aime24": ("HuggingFaceH4/aime_2024", [None], "train", "problem", "answer", [30]),
    "aime25": ("math-ai/aime25", [None], "test", "problem", "answer", [30]),
    "amc23": ("math-ai/amc23", [None], "test", "question", "answer", [40]),
    "math500": ("HuggingFaceH4/MATH-500", [None], "test", "problem", "answer", [500]),
    "minerva": ("math-ai/minervamath", [None], "test", "question", "answer", [272]),
    # 674 at the hub; OpenBMB's own file and Qwen2.5-Math's copy, which others measure with, have one more
    "olympiad": ("Hothan/OlympiadBench", ["OE_TO_maths_en_COMP"], "train", "question", "final_answer", [674, 675]),
    "gsm8k_test": ("openai/gsm8k", ["main"], "test", "question", "answer", [1319]),
    "gsm8k": ("openai/gsm8k", ["main"], "train", "question", "answer", [7473]),
    "math": ("EleutherAI/hendrycks_math", SUBJECTS, "train+test", "problem", "solution", [12500]),  # less 500
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", [None], "train", "problem", "answer", [40315]),
    "open-s1": ("knoveleng/open-s1", [None], "train", "problem", "solution", [18615]),  # rows: its dataset card
}
SAMPLES = {"aime24": 32, "aime25": 32, "amc23": 32, "gsm8k_test": 8}  # answers to a problem; else 1 (P4 Sec. 2, B)
BENCHMARKS = list(SOURCES)[:7]  # they come first, so that `all` can compare the training sets with them
REVISIONS = {  # as other public code pins them; where one is gone from the hub, put main
    "HuggingFaceH4/aime_2024": "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",  # aethercompute/aether-rl taskset.py
    "agentica-org/DeepScaleR-Preview-Dataset": "b6ae8c60f5c1f2b594e2140b91c49c9ad0949e29",  # the same file
    "math-ai/aime25": "563bb8404243c5f09de6ec262f2db674fe5bce9b",  # allenai/open-instruct prepare_eopd_math_prompts.py
    "math-ai/amc23": "80815d37005feb82cd7f8fbc6901d5d3eff43057",  # the same file
    "HuggingFaceH4/MATH-500": "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",  # the same file
    "math-ai/minervamath": "ee46ddc498933b1977577953250ca5c66be64f96",  # the same file
    "Hothan/OlympiadBench": "91184b52131e7fc9455fef848035173aea8cc01a",  # evaluation scripts, which state 674 rows
    "openai/gsm8k": "740312add88f781978c0658806c59bc2815b9866",  # dozens of repositories
    "EleutherAI/hendrycks_math": "21a5633873b6a120296cce3e2df9d5550074f4a3",  # dozens of repositories
    "knoveleng/open-s1": "main",  # none found; the commit that main stands for is printed
}
NO_ANSWER = re.compile(r"(?i)(?:\\text *\{)?[\s$]*(?:proof|prove[dn]?|not ?found|no answer|omitted|null|nan)[\s$.]*\}?")


@dataclass
class Config:
    names: tyro.conf.Positional[tuple[str, ...]]  # sets to prepare, or all
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None  # local file instead, with exactly one name
    out: Path = HERE                       # folder of NAME.jsonl
    force: bool = False                    # make sets again that are there already
    drop_contaminated: bool = False        # leave out training problems that a benchmark in the folder has
    drop_conflicting: bool = False         # leave out training problems that occur with different golds


# ---------------------------------------------------------------------------------------------------------------- fetch


def load_hub(hub: str, config: str | None, split: str, revision: str) -> tuple[list[dict], str]:
    """The rows of one split at the hub, and the commit that they are from."""
    try:
        import datasets  # here, because --from does without
    except ImportError as error:
        sys.exit(f"wanted the package datasets: pip install datasets==5.2.0, or a local file with --from ({error})")
    try:
        builder = datasets.load_dataset_builder(hub, config, revision=revision)  # load_dataset, but it knows its commit
        builder.download_and_prepare()
        return builder.as_dataset(split=split).to_list(), builder.hash
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # offline, no such split, damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.exit(f"could not load {hub} from the hub, --from takes a local file instead ({reason})")


def read_file(path: Path) -> list:
    """The rows of a parquet file, a json file (one list) or a jsonl file."""
    if not path.is_file():
        sys.exit(f"no file {path}")
    where = path
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet  # comes with datasets

            return parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(text.rstrip("\n").split("\n"), 1):  # splitlines splits at more
                where = f"{path}, row {number}"
                rows.append(json.loads(line))
    except ImportError as error:
        sys.exit(f"wanted the package pyarrow to read {path}: pip install datasets==5.2.0 ({error})")
    except (ValueError, RecursionError) as error:  # of the parquet, the UTF-8 or the JSON
        sys.exit(f"{where}: wanted {path.suffix[1:] or 'jsonl'} ({error})")
    if not isinstance(rows, list):
        sys.exit(f"{path}: wanted a list of rows, got {type(rows).__name__}")
    return rows


# ---------------------------------------------------------------------------------------------------------------- clean


def boxed(solution: str) -> str:
    r"""The gold of a solution, or "": "\boxed{3}? No, \boxed{4}." -> "4". MATH has $\boxed 4$ and \fbox{4}, too."""
    solution = re.sub(r"\\fbox(?=\s*\{)", r"\\boxed", solution)
    return rewards.last_boxed(re.sub(r"\\boxed\s+([^${}\\]+)\$", r"\\boxed{\1}$", solution)) or ""


def clean(name: str, gold: str) -> str:
    r"""
    A gold as people write it.

    AIME, AMC (integers)  "27.0" -> "27", "025" -> "25", "336^\circ" -> "336"
    GSM8K                 "1,234" -> "1234"
    Olympiad              "$\frac{1}{2}$" -> "\frac{1}{2}", but "$69$,$84$" and "\$36" stay: no pair around all of it
    """
    gold = gold.strip()
    if name in ("aime24", "aime25", "amc23"):
        gold = re.sub(r"\.0+$|\s*\^\{?\\circ\}?$", "", gold)
        gold = re.sub(r"^(-?)0+(?=\d)", r"\1", gold)
    elif name in ("gsm8k", "gsm8k_test"):
        gold = re.sub(r"(?<=\d),(?=\d{3})", "", gold)
    elif name == "olympiad" and (pair := re.fullmatch(r"\$((?:[^$\\]|\\.)+)\$", gold, re.DOTALL)):
        gold = pair[1].strip()
    return gold


def read_row(name: str, row, where: str) -> tuple[str, list[str], list[str]]:
    """(problem, golds as they stand, golds cleaned) of a row with the hub's fields or with `problem` and `answer`."""
    problem_field, gold_field = SOURCES[name][3:5]
    if not isinstance(row, dict):
        sys.exit(f"{where}: wanted fields {problem_field} and {gold_field}, got {row!r:.80}")
    for field, ours in ((problem_field, "problem"), (gold_field, "answer")):
        if field not in row and ours not in row:
            sys.exit(f"{where}: wanted a field {field}, got {', '.join(map(str, row)) or 'none'}")
    problem = row.get(problem_field, row.get("problem"))
    if not isinstance(problem, str) or not problem.strip():
        sys.exit(f"{where}: wanted a text in the field {problem_field}, got {problem!r:.80}")
    value = row.get(gold_field, row.get("answer"))
    golds = [gold for gold in (value if isinstance(value, list) else [value]) if gold is not None]
    if not all(isinstance(gold, (str, int, float)) and not isinstance(gold, bool) for gold in golds):
        sys.exit(f"{where}: wanted a text, a number or a list of them in the field {gold_field}, got {value!r:.80}")
    golds = [str(gold).strip() for gold in golds]
    if gold_field == "solution" and gold_field in row:
        golds = [boxed(gold) or str(row.get("answer") or "").strip() for gold in golds]  # open-s1 has an answer, too
    if name.startswith("gsm8k"):
        if problem_field in row and not all("####" in gold for gold in golds):
            sys.exit(f"{where}: wanted the answer after ####, got {value!r:.80}")
        golds = [gold.split("####")[-1].strip() for gold in golds]
    if row.get("is_multiple_answer"):  # all of them are wanted; a list in our files is a choice
        golds = [", ".join(golds)]
    return problem, [gold for gold in golds if gold], [clean(name, gold) for gold in golds if gold]


def letters(problem: str) -> str:
    """What two copies of a problem have in common: its letters and digits."""
    return "".join(filter(str.isalnum, problem)).lower()


# -------------------------------------------------------------------------------------------------------------- prepare


def without_math500(rows: list[dict], path: Path) -> list[dict]:
    """The rows whose problem is not in the file of MATH500; two problems are one if only their white space differs."""
    if not path.is_file():
        sys.exit(f"math leaves out the problems of MATH500, and there is no file {path}: prepare math500 first")
    evaluation = {" ".join(row["problem"].split()) for row in read_file(path)}
    kept = [row for row in rows if " ".join(row["problem"].split()) not in evaluation]
    print(f"  problems of MATH500 left out: {len(rows) - len(kept)}, expected 500 of 12500")
    return kept


def check_training(rows: list[dict], args: Config) -> list[dict]:
    """Count problems that a benchmark in the folder has, and those with different golds; drop them if asked to."""
    golds, shared, dirty = {}, [], set()
    for row in rows:
        golds.setdefault(letters(row["problem"]), set()).add(str(row["answer"]))
    for bench in BENCHMARKS:
        path = args.out / f"{bench}.jsonl"
        found = golds.keys() & {letters(row["problem"]) for row in read_file(path)} if path.is_file() else set()
        shared.append(f"{bench} {len(found) if path.is_file() else 'not there'}")
        dirty |= found
    if args.drop_contaminated and all(part.endswith("not there") for part in shared):
        sys.exit(f"--drop-contaminated wants benchmarks in {args.out}: prepare math500, olympiad, ... first")
    conflicting = {problem for problem, different in golds.items() if len(different) > 1}
    drop = (dirty if args.drop_contaminated else set()) | (conflicting if args.drop_conflicting else set())
    kept = [row for row in rows if letters(row["problem"]) not in drop]
    counts = f"{len(golds)} different problems; {len(conflicting)} have different golds"
    print(f"  {counts}; in benchmarks: {', '.join(shared)}")
    print(f"  rows dropped: {len(rows) - len(kept)} (--drop-contaminated and --drop-conflicting decide)")
    return kept


def prepare(name: str, args: Config) -> None:
    """Make one set; ids are the numbers of the source's rows, from 1. Its file is replaced when all is ready."""
    path = args.out / f"{name}.jsonl"
    if path.exists() and not args.force:
        return print(f"{name}: {path} is there already, left as it is (--force makes it again)")
    hub, configs, split, *_, expected = SOURCES[name]
    if args.source:
        raw, origin = read_file(args.source), str(args.source)
    else:
        parts = [load_hub(hub, config, part, REVISIONS[hub]) for part in split.split("+") for config in configs]
        raw, origin = [row for part, _ in parts for row in part], f"{hub} at {parts[0][1]}"
    wanted = " or ".join(map(str, expected))
    differ = "" if len(raw) in expected else ": WARNING, they differ"
    print(f"{name}: {len(raw)} rows of {origin}, expected {wanted}{differ}")

    rows, changed, without, unanswered = [], 0, [], []
    for number, row in enumerate(raw, 1):
        problem, golds, cleaned = read_row(name, row, f"{name}, row {number} of {origin}")
        changed += golds != cleaned
        if cleaned and all(map(NO_ANSWER.fullmatch, cleaned)):
            unanswered.append(number)
        elif cleaned:
            cleaned = [gold for gold in cleaned if not NO_ANSWER.fullmatch(gold)]
            gold = cleaned if len(cleaned) > 1 else cleaned[0]
            about = {"source": name} | ({"samples": SAMPLES[name]} if name in SAMPLES else {})
            rows.append({"id": f"{name}-{number}", "problem": problem, "answer": gold} | about)
        else:
            without.append(number)
    if not rows:
        sys.exit(f"{name}: no row of {origin} has a gold")
    which = f", {without[:10]}" if without else ""
    print(f"  golds cleaned: {changed}; rows without a gold, left out: {len(without)}{which}")
    if unanswered:
        print(f"  rows whose gold is no answer (proof, notfound), left out: {len(unanswered)}, {unanswered[:10]}")
    if name == "math":
        rows = without_math500(rows, args.out / "math500.jsonl")
    if name not in BENCHMARKS:
        rows = check_training(rows, args)

    # ASCII, so that no reader takes a line separator of Unicode inside of a problem for the end of the row
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write(path, text)
    print(f"  wrote {path}: {len(rows)} problems, sha256 {hashlib.sha256(text.encode('ascii')).hexdigest()}")


@one_line()
def main(args: Config) -> None:
    names = list(SOURCES) if args.names == ("all",) else args.names
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        sys.exit(f"wanted all or names of {', '.join(SOURCES)}; got {', '.join(unknown) or 'none'}")
    if args.source and len(set(names)) != 1:
        sys.exit(f"--from takes exactly one name, got {len(set(names))}")
    if "math" in names and not args.source and not (args.out / "math500.jsonl").exists():
        names = [*names, "math500"]  # math needs its problems, and is measured with them
    for name in SOURCES:  # benchmarks first; each file is finished before the next begins
        if name in names:
            prepare(name, args)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
