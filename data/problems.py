"""
Read files of problems, and put a problem into a prompt.

A file of problems is jsonl with {"problem": text, "answer": text or list of texts} in every line; data/prepare.py makes
those of the papers. Two more fields are used if all lines agree on them: "samples", how many answers to each problem a
benchmark takes, and "source", which of the papers' training sets this is. A prompt is a problem in one of the papers'
templates (P4 App. K).
"""

import json
import re
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import date
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from plumbing.files import FAMILY, ROOT, TINY, checksum, fitted, reading, reason

PATIENCE = 10  # seconds that a chat template may take
MOST_SAMPLES = 100_000  # all answers to a problem are decoded together
PAPERS = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad"]  # P4's six benchmarks; Avg is their mean

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
R1_PROMPT = (  # as in arXiv:2503.20783, which P4 follows
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant "
    "first thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning "
    "process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.\nUser: PROBLEM\nAssistant: <think>"
)

DAY = date(2024, 7, 26)  # that of Llama 3.1's template. Others name today: prompts would change overnight


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
    with reading(path, "UTF-8"):
        rows, text = [], Path(path).read_text(encoding="utf-8")
    if not text.strip():
        sys.exit(f"{path} is empty: wanted a problem and an answer in every line")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # not splitlines: texts may have U+2028
        with reading(f"{path}, line {number}", "JSON"):
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is no text
        if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or "answer" not in row:
            sys.exit(f'{path}, line {number}: wanted {{"problem": text, "answer": ...}}, got {line[:80]}')
        golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not golds or not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in golds):
            sys.exit(f"{path}, line {number}: an answer is a text, a number or a list of them, got {row['answer']!r}")
        rows.append(row | {"answer": [str(a) for a in golds] if len(golds) > 1 else str(golds[0]), "line": number})
    common = {key: rows[0].get(key) for key in ("samples", "source") if len({str(row.get(key)) for row in rows}) == 1}
    with reading(path, 'a file of problems: "samples" is a number of answers, "source" a text'):
        fitted(common, {"samples": int | None, "source": str | None})
    if not 0 < (common.get("samples") or 1) <= MOST_SAMPLES:
        sys.exit(f"{path}: samples wants 1 to {MOST_SAMPLES} answers to each problem, got {common['samples']}")
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


@lru_cache
def dated(chat_template: str) -> str:
    """A chat template that names DAY where it would ask for today's date."""
    return re.sub(r"""strftime_now\((["'])(.*?)\1\)""", lambda found: repr(format(DAY, found[2])), chat_template)


def prompt_checksum(source) -> str:
    """Of what makes a model's prompts, and of its config.json; of a hub model its commit says that. See source_of."""
    kinds, local = (".json", ".jinja", ".model", ".txt"), isinstance(source, Path) and source.is_dir()
    files = [path.read_bytes() for path in sorted(source.iterdir()) if path.suffix in kinds] if local else []
    return checksum(b"".join(files) + f"{MATH_PROMPT} {R1_PROMPT} {DAY}".encode())


@lru_cache
def control_tokens(tokenizer) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def in_chat_template(tokenizer, problem: str, system: str) -> str:
    """
    A prompt in the tokenizer's own chat template; ends the program with one line if it does not hold the problem.

    The system message goes in front of the problem if the template refuses it, as Gemma's does, or leaves it out.
    """

    def fail(why, *_):
        sys.exit(f"the chat template of {tokenizer.name_or_path} makes no prompt ({why}); try --template r1")

    user, why = {"role": "user", "content": problem}, "it leaves the problem out"
    together = [user | {"content": f"{system}\n\n{problem}" if system else problem}]
    for messages in ([{"role": "system", "content": system}, user] if system else together, together):
        try:
            with in_time(PATIENCE, partial(fail, "it takes too long")):
                how = dict(chat_template=dated(tokenizer.get_chat_template()), tokenize=False)
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **how)
            if problem.strip() in text and system.strip() in text:
                return text
        except Exception as error:  # a template is a program, and may raise anything
            why = reason(error)
    fail(why)


@contextmanager
def in_time(seconds: int, late):
    """Inside the context, late() is called after so many seconds; only in the main thread, others cannot be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prompt_text(tokenizer, problem: str, system: str, template: str) -> str:
    """The prompt as a text, in a template of prompt_ids."""
    if template == "native":
        if tokenizer.chat_template is None:
            sys.exit("--template native: this model's tokenizer has no chat template; use --template r1 or qwen-math")
        return in_chat_template(tokenizer, problem, system)
    if template == "qwen-math":
        text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return text + f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    if template == "r1":
        return R1_PROMPT.replace("PROBLEM", problem)
    sys.exit(f"--template wants native, qwen-math or r1, got {template!r}")


def prompt_ids(tokenizer, problem: str, system: str | None = None, template: str | None = None) -> list[int]:
    """
    Token ids of the prompt, up to where the answer starts. They begin with one BOS, if the model uses one.

    template (P4 App. K): "native" (the tokenizer's own chat template), "qwen-math" (Qwen's chat format, written out) or
    "r1" (plain text, for base models without a chat format); default native if there is a chat template, else r1.
    system: system message of native and qwen-math, default MATH_PROMPT; "" for none (a template may add its own).
    """
    template = template_of(tokenizer, template)
    system = MATH_PROMPT if system is None else system
    text = prompt_text(tokenizer, problem, system, template)
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    # a second BOS in front would change what the model does
    encode = partial(tokenizer, add_special_tokens=template != "native" and not has_bos)
    if any(token in problem for token in control_tokens(tokenizer)):  # it is text there, and must not end the turn
        before, after = prompt_text(tokenizer, "A PROBLEM", system, template).split("A PROBLEM")
        ids, inside = encode(before).input_ids, text[len(before) : len(text) - len(after)]
        ids += tokenizer(inside, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += tokenizer(after, add_special_tokens=False).input_ids
    else:
        ids = encode(text).input_ids
    bos = tokenizer.bos_token_id  # later in the prompt it is fine: SmolLM2's opens every turn of a chat
    assert bos is None or ids[:2] != [bos, bos], "the chat template puts two BOS tokens in front of the prompt"
    return ids
