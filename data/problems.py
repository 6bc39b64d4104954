"""
Read files of problems, and put a problem into a prompt.

A file of problems is jsonl with {"problem": text, "answer": text or list of texts} in every line; data/prepare.py makes
those of the papers. Two more fields are used if all lines agree on them: "samples", how many answers to each problem a
benchmark takes, and "source", which of the papers' training sets this is. A prompt is a problem in one of the papers'
templates (P4 App. K).
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jinja2.exceptions import TemplateError

from plumbing.files import FAMILY, ROOT, TINY, checksum

PAPERS = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad"]  # P4's six benchmarks; Avg is their mean

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
    samples: int = 1  # answers to each problem by default
    source: str | None = None  # "deepscaler", "gsm8k" or "math": training sets of the papers

    def first(self, n: int | None) -> "Problems":
        return self._replace(rows=self.rows[:n])


def problems_of(path) -> Problems:
    """Read a jsonl file of {problem, answer, ...}; a bad row ends the program with its line number."""
    if not Path(path).is_file() and (here := ROOT / path).is_file():
        path = here  # the project's own files are found from any working directory
    if not Path(path).is_file():
        sys.exit(f"no problems at {path}: wanted a jsonl file with a problem and an answer in every line")
    rows, text = [], Path(path).read_text(encoding="utf-8")
    if not text.strip():
        sys.exit(f"{path} is empty: wanted a problem and an answer in every line")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # not splitlines: texts may have U+2028
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            sys.exit(f"{path}, line {number}: not JSON ({error})")
        if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or "answer" not in row:
            sys.exit(f'{path}, line {number}: wanted {{"problem": text, "answer": ...}}, got {line[:80]}')
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not golds or not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in golds):
            sys.exit(f"{path}, line {number}: an answer is a text, a number or a list of them, got {row['answer']!r}")
        rows.append(row | {"answer": [str(a) for a in golds] if len(golds) > 1 else str(golds[0]), "line": number})
    common = {key: rows[0].get(key) for key in ("samples", "source") if len({str(row.get(key)) for row in rows}) == 1}
    name = Path(path).stem
    return Problems(name, rows, checksum(text.encode()), common.get("samples") or 1, common.get("source"))


def benchmarks(names: tuple[str, ...]) -> list[Problems]:
    """The problems of data/NAME.jsonl for these names; "all" stands for the papers' six."""
    names = [one for name in names for one in (PAPERS if name == "all" else [name])]
    files = [ROOT / "data" / f"{name}.jsonl" for name in names]
    if missing := [name for name, path in zip(names, files) if not path.is_file()]:
        sys.exit(f"no problems of {', '.join(missing)}: run `python data/prepare.py {' '.join(missing)}`")
    return [problems_of(path) for path in files]


def sets_of(args, run: dict) -> list[Problems]:
    """The problems that evaluate.py's settings ask for, of a run with this config."""
    usual = run["model"] in FAMILY and run.get("data") in (None, "data/tiny/train.jsonl")
    own = TINY / "test.jsonl" if usual else None
    if args.benchmarks:
        sets = benchmarks(args.benchmarks)
    elif (file := args.data or run.get("held_out") or own) is None:
        sys.exit("--benchmarks NAME... or --data FILE is needed: the run has no held-out problems")
    else:
        sets = [problems_of(file)]
    return [problems.first(args.problems) for problems in sets]


def template_of(tokenizer, template: str | None = None) -> str:
    """The template that is used where `template` is asked for: without any, native if there is a chat, else r1."""
    return template or ("native" if tokenizer.chat_template else "r1")


def prompt_ids(tokenizer, problem: str, system: str | None = None, template: str | None = None) -> list[int]:
    """
    Token ids of the prompt, up to where the answer starts. They begin with one BOS, if the model uses one.

    template (P4 App. K): "native" (the tokenizer's own chat template), "qwen-math" (Qwen's chat format, written out) or
    "r1" (plain text, for base models without a chat format); default native if there is a chat template, else r1.
    system: system message of native and qwen-math, default MATH_PROMPT; "" for none (a template may add its own).
    """
    template = template_of(tokenizer, template)
    system = MATH_PROMPT if system is None else system
    if template == "native":
        if tokenizer.chat_template is None:
            sys.exit("--template native: this model's tokenizer has no chat template; use --template r1 or qwen-math")
        written = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        messages = [{"role": "system", "content": system}] if system else []
        try:
            text = written([*messages, {"role": "user", "content": problem}])
        except TemplateError:  # Gemma's template refuses system messages
            text = written([{"role": "user", "content": f"{system}\n\n{problem}"}])
    elif template == "qwen-math":
        text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        text += f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    elif template == "r1":
        text = R1_PROMPT.replace("PROBLEM", problem)
    else:
        sys.exit(f"--template wants native, qwen-math or r1, got {template!r}")
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    # a second BOS in front would change what the model does
    ids = tokenizer(text, add_special_tokens=template != "native" and not has_bos).input_ids
    bos = tokenizer.bos_token_id  # later in the prompt it is fine: SmolLM2's opens every turn of a chat
    assert bos is None or ids[:2] != [bos, bos], "the chat template puts two BOS tokens in front of the prompt"
    return ids
