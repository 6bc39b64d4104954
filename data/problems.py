"""
Problems: their files, and how a model is asked them.

A file of problems is jsonl with {"problem": text, "answer": text or list of texts} in every line; data/prepare.py makes
those of the papers. A prompt is a problem in one of the papers' templates (P4 App. K). A recipe says with how many
problems and answers a model is trained.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from jinja2.exceptions import TemplateError

from data.runs import FAMILY, TINY, checksum

ROOT = Path(__file__).parent.parent
PAPERS = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad"]  # P4's six; Avg: the mean of their accuracies
SAMPLES = {"aime24": 32, "aime25": 32, "amc23": 32, "gsm8k_test": 8}  # answers to a problem; else 1 (P4 Sec. 2, B)
SMALLER = ("gsm8k", "math")  # B trains on these, too (App. E), and then measures with 8 answers: mean@8

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
R1_PROMPT = (  # as in arXiv:2503.20783, which P4 follows
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: PROBLEM\nAssistant: <think>"
)


class Problems(NamedTuple):
    name: str
    rows: list[dict]  # {"problem": text, "answer": text or list of texts, ...}
    checksum: str  # of the whole file, also where only its first rows are used
    samples: int = 1  # answers to each problem in the papers

    def first(self, n: int | None) -> "Problems":
        return self._replace(rows=self.rows[:n])


def problems_of(path) -> Problems:
    """Read a jsonl file of {problem, answer, ...}; exits with the line number of a row that is not one."""
    if not Path(path).is_file() and (here := ROOT / path).is_file():
        path = here  # the project's own files are named from its folder
    if not Path(path).is_file():
        sys.exit(f"no problems at {path}: wanted a jsonl file with a problem and an answer in every line")
    rows, text = [], Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            sys.exit(f"{path}, line {number}: not JSON ({error})")
        if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or "answer" not in row:
            sys.exit(f'{path}, line {number}: wanted {{"problem": text, "answer": ...}}, got {line[:80]}')
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not golds or not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in golds):
            sys.exit(f"{path}, line {number}: an answer is a text, a number or a list of them, got {row['answer']!r}")
        rows.append(row | {"answer": [str(a) for a in golds] if len(golds) > 1 else str(golds[0])})
    if not rows:
        sys.exit(f"{path} is empty: wanted a problem and an answer in every line")
    name = Path(path).stem
    return Problems(name, rows, checksum(text.encode()), SAMPLES.get(name, 1))


def benchmarks(names: tuple[str, ...], trained_on: str | None = None) -> list[Problems]:
    """data/NAME.jsonl of these names, or of the papers' six for ("all",). trained_on: the data of the run."""
    names = [one for name in names for one in (PAPERS if name == "all" else [name])]
    files = [ROOT / "data" / f"{name}.jsonl" for name in names]
    if missing := [name for name, path in zip(names, files) if not path.is_file()]:
        sys.exit(f"no problems of {', '.join(missing)}: run `python data/prepare.py {' '.join(missing)}`")
    sets = [problems_of(path) for path in files]
    if Path(trained_on or "").stem in SMALLER:
        sets = [problems._replace(samples=8) if problems.name == "math500" else problems for problems in sets]
    return sets


def sets_of(args, run: dict) -> list[Problems]:
    """What evaluate.py's settings ask for (benchmarks, data, problems), for a run with this config."""
    usual = run["model"] in FAMILY and run.get("data") in (None, "data/tiny/train.jsonl")
    own = TINY / "test.jsonl" if usual else None
    if args.benchmarks:
        sets = benchmarks(args.benchmarks, run.get("data"))
    elif (file := args.data or run.get("held_out") or own) is None:
        sys.exit("--benchmarks NAME... or --data FILE is needed: the run has no held-out problems")
    else:
        sets = [problems_of(file)]
    return [problems.first(args.problems) for problems in sets]


def prompt_ids(tokenizer, problem: str, system: str | None = None, template: str | None = None) -> list[int]:
    """
    Token ids of the prompt, ending where the answer starts, with one BOS in front, or none where the model wants none.

    template (P4 App. K): "native" (the tokenizer's own chat template), "qwen-math" (Qwen's chat format, written out),
    "r1" (plain text, for base models that know no chat); default native where there is a chat template, else r1.
    system: system message of native and qwen-math, default MATH_PROMPT; "" leaves it out (a template may have its own).
    """
    template = template or ("native" if tokenizer.chat_template else "r1")
    system = MATH_PROMPT if system is None else system
    if template == "native":
        if tokenizer.chat_template is None:
            sys.exit("--template native: this model's tokenizer has no chat template; use --template r1 or qwen-math")
        messages = [{"role": "system", "content": system}] if system else []
        try:
            text = tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError:  # Gemma's template refuses system messages
            messages = [{"role": "user", "content": f"{system}\n\n{problem}"}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    elif template == "qwen-math":
        text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        text += f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    elif template == "r1":
        text = R1_PROMPT.replace("PROBLEM", problem)
    else:
        sys.exit(f"--template wants native, qwen-math or r1, got {template!r}")
    # where the text begins with the BOS, a second one in front of it would change what the model does
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=template != "native" and not begins).input_ids
    bos = tokenizer.bos_token_id  # later in the prompt it is welcome: SmolLM2's opens every turn of a chat
    assert bos is None or ids[:2] != [bos, bos], "the chat template puts two BOS tokens in front of the prompt"
    return ids


def segments(prompts: list[list[int]], other: list[int]) -> list[list[str]]:
    """
    For every token of each prompt "system", "question" or "turn" (the template behind the question).

    other: a prompt with a question that has nothing in common with theirs: what a prompt shares with it is the
    template.
    """
    found = []
    for prompt in prompts:
        room = min(len(prompt), len(other))
        before = next((i for i in range(room) if prompt[i] != other[i]), room)
        after = next((i for i in range(room - before) if prompt[-1 - i] != other[-1 - i]), room - before)
        found.append(["system"] * before + ["question"] * (len(prompt) - before - after) + ["turn"] * after)
    return found


def of_paper(entries: dict, name: str) -> dict:
    """The entry of a model, by the last part of its name, as of a local copy; {} where there is none."""
    return next((entry for hub, entry in entries.items() if Path(hub).name == Path(name).name), {})


def authors(name: str, data: str) -> dict:
    """
    How the authors trained a model: prompts, samples, context, epochs, and "rates", their Adam steps.

    rates: {"vector", "lora1", "lora4": at all layers, "full": all weights, "vector_layers", "lora1_layers": {layer:
    rate} of single layers, "site": a vector at another site of a layer of "site_layers"}. On GSM8K and MATH (B Table
    6), else on DeepScaleR, whose settings also serve data of one's own. {"rates": {}} for a model that they did not
    train.
    """
    paper = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))
    found = of_paper(paper["recipes"], name)
    single, loras = of_paper(paper["lr"], name), found.get("lr_lora_all_layers", {})
    rates = {"vector": found.get("lr_all_layers")} | {f"lora{rank}": rate for rank, rate in loras.items()}
    rates |= {"vector_layers": single.get("layers", {}), "lora1_layers": single.get("lora1_layers", {})}
    rates |= {kind: single.get(kind) for kind in ("full", "site", "site_layers")}
    rows = [row for row in paper["B.table6"]["rows"] if Path(row["model"]).name == Path(name).name]
    if rows := [row for row in rows if row["data"].lower() == Path(data).stem]:
        kinds = {"Steering": "vector", "LoRA-1": "lora1", "LoRA-4": "lora4", "Full-Tune": "full"}
        rates = {kinds[row["setup"]]: row["lr"] for row in rows}
        found = dict(paper["recipes_gsm8k_math"], samples=rows[0]["generations"])
        found["epochs"] = of_paper({hub: {"n": n} for hub, n in found["epochs"].items()}, name)["n"]
    sizes = {key: found[key] for key in ("prompts", "samples", "context", "epochs") if key in found}
    return sizes | {"rates": {kind: rate for kind, rate in rates.items() if rate}}


def authors_rate(args, layer: int) -> float | None:
    """
    The authors' Adam step under train.py's settings for a place in this layer; None where paper.json has none.

    They trained one layer, or all of them together, which has a rate of its own; nothing between.
    """
    rates, kind = authors(args.model, args.data)["rates"], f"lora{args.rank}" if args.method == "lora" else "vector"
    if args.layer == "all":
        return rates.get(kind) if args.site == "end" else None
    if "," in args.layer:
        return None
    if args.site == "end":
        return rates.get(f"{kind}_layers", {}).get(str(layer))
    known = kind == "vector" and args.site in ("input-norm", "attention", "post-attention-norm")  # P4 Fig. 10
    return rates.get("site") if known and layer in rates.get("site_layers", []) else None


def recipe(name: str, method: str = "vector", data: str | None = None) -> dict:
    """
    Defaults of train.py: the embedded model's, the authors' if they trained this model, else generic ones.

    name: of the model. data: other problems than the usual ones. Those of one's own are not compared on others.
    """
    tiny = name in FAMILY
    usual = "data/tiny/train.jsonl" if tiny else "data/deepscaler.jsonl"
    found = dict(data=usual, held_out="data/tiny/test.jsonl" if tiny else "data/math500.jsonl", epochs=1)
    if tiny:
        found |= dict(steps=40, prompts=16, samples=16, context=512, max_tokens=80, warmup=3, micro_tokens=4096)
        rates, found["lr"] = {"full": 3e-4}, 0.06
    else:
        known = authors(name, data or usual)
        rates = known.pop("rates")
        found |= dict(prompts=128, samples=16, context=8192, micro_tokens=16384) | known
        if Path(data or "").stem in SMALLER:
            found["held_out"] = {"gsm8k": "data/gsm8k_test.jsonl"}.get(Path(data).stem, found["held_out"])
    own = data is not None and (tiny or Path(data).stem not in SMALLER)
    if own or not (ROOT / found["held_out"]).is_file():
        found["held_out"] = None
    if method == "tiny":
        found["numbers"] = 13  # arXiv:2602.04118
    if method == "full":
        return found | dict(lr_absolute=rates.get("full", 1e-6), save_every=53)  # 53: the authors', 6 in a run
    return found | dict(save_every=1)
