r"""
The reward: 1.0 if the answer of a completion, in the form that its prompt asks for, equals the gold answer, else 0.0.

gold             accepted                                        rejected
34               \boxed{34}  \boxed{x = 34.0}  \boxed{34.}       34 without a box, \boxed{34} ... \boxed{35}, \boxed{34
34               \boxed{\text{Area: } 34}  \boxed{\sqrt{1156}}   \boxed{2 \cdot 17}  \boxed{30+5 = 34}  \boxed{x^2 = 34}
3/4              \boxed{\frac{6}{8}}  \boxed{0.75}               \boxed{4/3}  \boxed{0.7}
1,-2             \boxed{-2, 1}  \boxed{1 \text{ and } -2}        \boxed{1}  \boxed{1, -2, 5}  \boxed{-2 < x < 1}
x=2, y=3         \boxed{y = 3, x = 2}  \boxed{(2, 3)}            \boxed{(3, 2)}  \boxed{x = 3, y = 2}
4.5e33           \boxed{4.5 \times 10^{33}}                      \boxed{4.5 \times 10^{34}}
2,2,3            \boxed{3, 2, 2}  \boxed{(2, 2, 3)}              \boxed{2, 3}  \boxed{2, 3, 3}  \boxed{(3, 2, 2)}
\$32,\!348       \boxed{32,348}  \boxed{32348 \text{ dollars}}   \boxed{32}  \boxed{32, 348}  \boxed{32348 \text{ tens}}
90^\circ         \boxed{90}  \boxed{90 \text{ degrees}}          \boxed{\pi/2}
\text{9:15 a.m.} \boxed{9:15 \text{ a.m.}}  \boxed{9:15 AM}      \boxed{9:15 \text{ p.m.}}
35\%             \boxed{35}  \boxed{35.0\%}  \boxed{0.35}        \boxed{3.5}
52_8             \boxed{52_{8}}  \boxed{52}                      \boxed{52_9}
(3,4]            \boxed{(3, 4]}  \boxed{4 \geq x > 3}            \boxed{[3,4]}
x^2-1            \boxed{(x-1)(x+1)}                              \boxed{y^2-1}

A prompt may ask for <answer>34</answer> instead (see FORMS). Math-Verify (sympy) compares; around it stand the tables
of plumbing/notation.py for what it misreads, and vetoes (in decide, equal and far_apart) for what it accepts wrongly.
Units are dropped, not compared; variables are compared without case. Where the gold is a plain number, a sum or product
that nobody evaluated is refused: it may be a copy of the question. Refused though right: roots that need x > 0
(\sqrt{1/n} for 1/\sqrt{n}), rounded decimals, a column for a tuple, 3i - j + 2k, "(B) 12" for B, 9:00 for 9 a.m.,
2 \text{ hours } 30 \text{ minutes}, radians for degrees, intersections, R - {2}, \operatorname{cis}, conditions in
another order, answers in several boxes, and what stands beside the box: -\boxed{7}, \boxed{7}\pi.

An expression of a model can keep sympy busy for ever (9^{9^{9^9}}), so Math-Verify runs only in worker processes, which
die when one answer takes too long. Equal strings and plain numbers are decided without a worker. Nothing a model writes
is evaluated as Python.
"""

import atexit
import json
import logging
import os
import queue
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from plumbing.bars import Bar
from plumbing.notation import (
    AND,
    OR,
    RANGE,
    TUPLE,
    elements,
    in_order,
    named,
    normalise,
    number,
    split,
    squeeze,
    union,
    unlabel,
)

MAX_CHARS = 2000  # longer answers get 0: the longest gold of the usual benchmarks has a few hundred
MAX_MEMORY = 4 << 30  # bytes of address space of one worker
log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------- extract


def last_boxed(text: str) -> str | None:
    r"""
    The content of the last \boxed{} or \fbox{}, or None if it is empty or not closed, or if two are offered.

    "\boxed{1} no, \boxed{\{2, 3\}}" -> "\{2, 3\}";  "\boxed 7." -> "7";  "\boxed{1} no, \boxed{2" -> None
    """
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(-?\d+(?:[.,]\d+)*))", text))
    if not boxes or re.search(r"\\boxed\s*\{.{1,99}\}[ $]*,? *or *\$?$", text[: boxes[-1].start()]):
        return None  # \boxed{3} or \boxed{5}
    if boxes[-1][1]:
        return boxes[-1][1]
    start, depth = boxes[-1].end(), 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)  # \{ and \} are printed characters: \left\{ may stand alone
        if depth == 0:
            return text[start : token.start()].strip() or None
    return None


def last_tagged(text: str) -> str | None:
    r"""
    The content of the last <answer>...</answer>, or None if it is empty or not closed; a box in it is its content.

    "<answer> 7 </answer>" -> "7";  "<answer>It is \boxed{7}.</answer>" -> "7";  "\boxed{7}" -> None
    """
    _, tag, rest = text.rpartition("<answer>")
    content, end, _ = rest.partition("</answer>")
    if not (tag and end):
        return None
    return last_boxed(content) if re.search(r"\\(?:boxed|fbox)", content) else content.strip() or None


FORMS = {"box": last_boxed, "answer": last_tagged}  # what the prompt asks for; R1's (arXiv:2509.06608, App. K): a tag


def has_answer(text: str, form: str = "box") -> bool:
    """Whether a completion has an answer in this form, right or wrong."""
    return FORMS[form](text) is not None


def no_answer(texts: list[str], form: str = "box") -> int:
    """How many of the completions have no answer in this form."""
    return sum(not has_answer(text, form) for text in texts)


def last_number_right(text: str, gold: str | list[str]) -> bool | None:
    r"""
    Whether the last number of a text, boxed or not, is the gold; None if no gold is a plain number.

    "so 3 + 4 = 7 cm^2." and 7 -> True;  "\boxed{7} of 9" and 7 -> False;  "7, that is 3/4" and 4 -> False
    """
    golds = {number(squeeze(normalise(g)).rstrip("\\%")) for g in ([gold] if isinstance(gold, str) else gold)} - {None}
    text = re.sub(r"\^ *(?:\{[^{}]*\}|-?\w)|(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})", "", text)  # cm^2, 1{,}000
    decimal = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+"
    found = re.findall(rf"((?<![\w.)}}$])-)?(?:\\[dt]?frac *\{{)?({decimal})(?:(?: */ *|\}} *\{{)({decimal}))?", text)
    if not golds or not found:
        return False if golds else None
    sign, over, under = found[-1]
    value = number(over) / number(under) if under and number(under) else number(over)
    return (-value if sign else value) in golds


# ------------------------------------------------------------------------------------------------------------- compare

INFIX = re.compile(  # 9 \cdot 37, 16+1-15, \frac{1+2}{3}; not -3, 2^{-3}, 10^{-2}
    r"[\d)}!%\]] *(?:[-+*:]|\\(?:times|cdot|div|ast|pm)(?![a-zA-Z])) *(?=[-+\d({.\\])"
)
SIGNS = (  # they must agree where both have them: 52_8 is not 52_9, or is not and, [1,1) is not (1,1] (both are empty)
    r"\d *_\W*(?:text\W*)?(\d+)",
    r"\b(and|or)\b(?=.*(?:[<>]|\\[lg]e))",
    r"^(\[)[^])]*\)$|^\([^])]*(\])$",
)


def is_list(answer: str) -> bool:
    r"""Whether it is several values, and no pair or interval: "1, 2", "\{1, 2\}", "1 or 2", "3 \pm 1"."""
    several = re.search(r"\\\{|\\pm|\b(?:or|and)\b", answer) or len(split(answer, ",")) > 1
    return bool(several) and not RANGE.search(answer)


def prepare(answer: str, gold: str) -> tuple[str, str]:
    """Both normalised, and without the name of their one value unless both have one: y = 5 is not x = 5."""
    answer, gold = normalise(answer), normalise(gold)
    alone = [not (is_list(s) or named(s) or RANGE.search(s)) for s in (answer, gold)]
    a = unlabel(answer) if alone[0] and "=" not in gold else answer
    if alone[1] and "=" not in answer:
        gold = unlabel(gold.rpartition("=")[2] if gold.count("=") > 1 else gold)
    return a, gold


def decide(answer: str, gold: str) -> bool | None:
    """Compare strings and plain numbers, and refuse what Math-Verify would accept wrongly; None: ask Math-Verify."""
    if len(answer) > MAX_CHARS:
        return False
    answer, gold = prepare(answer, gold)
    a, g = squeeze(answer), squeeze(gold)
    x, y = number(a.rstrip("\\%")), number(g.rstrip("\\%"))
    if a == g:
        return a != "" and (x is None or ", " not in answer or ", " in gold)  # 32,349 is a number; 32, 349 is a list
    if x is not None and y is not None and ", " not in answer + gold:
        percent = a.endswith("%") - g.endswith("%")  # 35\% is 35 (the sign is a unit) or 0.35; 0.4\% is not 0.4
        return (x == y and not (percent > 0 and abs(y) < 1)) or (percent != 0 and x == y * Fraction(100) ** percent)
    if y is not None and "=" not in answer and INFIX.search(re.sub(r"\\(?:times|cdot) *10 *\^", "e", answer)):
        return False  # nobody evaluated it, perhaps it is a copy of the question
    if re.search(r"\\[lcd]?dots|\.\.\.", a + g):
        return False  # Math-Verify drops the dots: 1,2,\ldots,9 would be the set {1,2,9}
    if len(re.findall(r"'|\\prime", a)) != len(re.findall(r"'|\\prime", g)):
        return False  # and the prime of 7'
    for sign in SIGNS:
        a_signs, g_signs = re.findall(sign, answer), re.findall(sign, gold)
        if a_signs and g_signs and a_signs != g_signs:
            return False
    for s, t in ((answer, gold), (gold, answer)):
        if is_list(s) and RANGE.search(t):
            return False  # Math-Verify compares the members only: 1,2 would be 1 < x < 2
        if re.match(r"\\\{|[^()]*\bor\b|[^(]*\\pm", s) and re.fullmatch(TUPLE, squeeze(t)) and not RANGE.search(t):
            return False  # and the set {1,2}, 1 or 2, and 3 \pm 1 would be the pairs (1,2) and (2,4)
    return None


def equal(answer: str, gold: str) -> bool:
    """Whether the two are the same mathematically. Without a time limit: see grade."""
    decided = decide(answer, gold)
    if decided is not None:
        return decided
    answer, gold = prepare(answer, gold)
    if RANGE.search(answer + gold):
        a, g = union(answer), union(gold)
        letters = [set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", s)) for s in (answer, a, gold, g)]
        names = [letters[0] - letters[1], letters[2] - letters[3]]  # of the variables, x < 3 is not y < 3
        return same(re.sub(AND, ", ", answer), re.sub(AND, ", ", gold)) or (
            (names[0] == names[1] or not all(names)) and same(a, g)
        )
    a, g = (re.split(OR, s) for s in (answer, gold))  # x=1, y=2 or x=3, y=4 is (1,2), (3,4)
    if all(map(named, a)) and len(a) > 1:
        answer = ", ".join(in_order(named(part)) for part in a)
    if all(map(named, g)) and len(g) > 1:
        gold = ", ".join(in_order(named(part)) for part in g)
    answer, gold = (re.sub(AND, ", ", s) for s in (answer, gold))
    a_names, g_names = named(answer), named(gold)
    if a_names and g_names:
        return a_names.keys() == g_names.keys() and all(equal(a_names[name], g_names[name]) for name in g_names)
    *steps, last = split(unlabel(answer), "=")
    if steps and not a_names and "=" not in gold and len(split(answer, ",")) == 1:
        return all(same(step, gold) for step in steps) and equal(last, gold)  # \sqrt{25} = 5; not 7 + 7 = 15 for 15
    if g_names and not re.fullmatch(TUPLE, answer):
        orders = in_order(g_names), f"({', '.join(g_names.values())})"  # a set has none
        return not answer.startswith(r"\{") and any(same(f"({answer})", order) for order in orders)
    if a_names and re.fullmatch(TUPLE, gold):
        answer = in_order(a_names)
    return same_list(answer, in_order(g_names) if g_names else gold)


def same_list(answer: str, gold: str) -> bool:
    """Whether two values or lists of values are the same; tuples in order."""
    equations = [len(split(s, "=")) > 1 for s in (answer, gold)]
    if equations[0] != equations[1]:
        answer, gold = (", ".join(map(unlabel, split(s, ","))) if "=" in s else s for s in (answer, gold))
        if equations[0] and len(split(answer, "=")) > 1:
            return False  # Math-Verify takes the right side, x^2 = 5 would be 5
    a_list, g_list = elements(squeeze(answer)), elements(squeeze(gold))
    if len(set(a_list)) == len(a_list) and len(set(g_list)) == len(g_list):
        return same(answer, gold) or ("%" in answer + gold and same(answer.rstrip("\\%"), gold.rstrip("\\%")))
    # Math-Verify makes sets of lists: 2,2 would be 2, and 2,2,3 would be 2,3,3
    in_order = any(re.fullmatch(TUPLE, squeeze(s)) for s in (answer, gold))
    for x in a_list:
        y = next((y for y in g_list[: 1 if in_order else None] if equal(x, y)), None)
        if y is None:
            return False
        g_list.remove(y)
    return not g_list


def same(answer: str, gold: str) -> bool:
    """What Math-Verify says to them as they stand."""
    from latex2sympy2_extended import NormalizationConfig  # here: it takes a second, and only the workers need it
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import I

    # it would warn that its own time limit is off: SIGALRM in main threads only; ours is in serve
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Only LaTeX: in plain text it takes any number that it finds, and hands the text to Python's eval. No units: its
    # list has s, t, m, ..., so that 5t would be 5s.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=config)
    found = []
    for text in (answer, gold):
        value, *rest = parse(rf"\boxed{{{text}}}", [latex], extraction_mode="first_match", parsing_timeout=None) or [""]
        i = [s for s in getattr(value, "free_symbols", ()) if s.name == "i"]  # in a power it reads i as a variable
        found.append([value.subs({s: I for s in i}) if i else value, *rest])
    a, g = found
    # gold first: verify is not symmetric
    return verify(g, a, allow_set_relation_comp=True, timeout_seconds=None) and not far_apart(a[0], g[0])


def far_apart(a, b) -> bool:
    """Whether two sympy expressions differ by more than 1e-4 of their size, each variable set to some fixed number."""
    # Math-Verify compares to 6 or 15 digits after the point, where all tiny numbers are equal: 1/2^{98} and 1/2^{99}
    from sympy import Expr, nan, zoo

    if not all(isinstance(x, Expr) and x.is_commutative for x in (a, b)):
        return False  # sets, equations, matrices
    names = sorted({s.name for s in a.free_symbols | b.free_symbols})
    a, b = (x.subs({s: 1.3 + 0.37 * names.index(s.name) for s in x.free_symbols}).evalf(15) for x in (a, b))
    if a in (nan, zoo) or b in (nan, zoo):
        return True  # misread, or a division by zero
    distance, size = abs(a - b).evalf(15), abs(b).evalf(15)
    return distance.is_Float and size.is_Float and bool(distance > 1e-4 * size)


# --------------------------------------------------------------------------------------------------------------- grade

_idle = queue.SimpleQueue()  # worker processes that wait for work
_timeouts = 0
os.register_at_fork(after_in_child=lambda: globals().update(_idle=queue.SimpleQueue()))  # a pipe has one owner


def grade(
    completions: list[str], golds: list, form: str = "box", timeout: float = 5.0, workers: int | None = None
) -> list[float]:
    """
    The rewards of many completions, each 0.0 or 1.0.

    golds: for each completion a string, or a list of strings, any of which will do.
    form: where the prompt asks for the answer, "box" or "answer" (tags); an answer in another form gets 0.
    timeout: seconds of processor time for one comparison; a worker that needs more dies, and its answer gets 0.
    workers: processes at most; they start at the first need and wait for the next call.
    """
    assert len(completions) == len(golds), f"{len(completions)} completions, but {len(golds)} golds"
    pairs = []  # of each completion: (answer, gold) for each of its golds
    for completion, gold in zip(completions, golds):
        answer = FORMS[form](completion)
        pairs.append([] if answer is None else [(answer, g) for g in ([gold] if isinstance(gold, str) else gold)])
    known = {pair: decide(*pair) for pair in {pair: None for some in pairs for pair in some}}
    jobs = [pair for pair, same in known.items() if same is None]
    if jobs:
        workers = workers or min(os.cpu_count(), 16)
        with ThreadPoolExecutor(min(workers, len(jobs))) as threads:  # each thread waits for one process
            replies = threads.map(lambda pair: ask(*pair, timeout), jobs)
            known |= zip(jobs, Bar(replies, total=len(jobs), desc="grading", unit="answers"))
    return [float(any(known[pair] for pair in some)) for some in pairs]


def reward(completion: str, gold: str | list[str], form: str = "box") -> float:
    """1.0 if the answer of the completion equals the gold, or one of several golds, else 0.0. See grade."""
    return grade([completion], [gold], form)[0]


def grading_timeouts() -> int:
    """How many comparisons were given up so far: too slow, too much memory."""
    return _timeouts


def ask(answer: str, gold: str, timeout: float) -> bool:
    """equal(answer, gold) by a worker process, a new one if none is idle; False if it dies over the question."""
    global _timeouts
    try:
        worker = _idle.get_nowait()
    except queue.Empty:
        worker = start_worker()
    try:
        worker.stdin.write(json.dumps([answer, gold, timeout]) + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline()
    except BrokenPipeError:
        reply = ""
    if reply:
        _idle.put(worker)
        return reply == "1\n"
    worker.communicate()  # closes the pipes and waits for the end
    if worker.returncode == 0:
        return ask(answer, gold, timeout)  # it had retired before the question came
    if worker.returncode > 0:
        raise RuntimeError(f"a bug, see the worker's traceback above: answer {answer!r}, gold {gold!r}")
    _timeouts += 1  # ended by its timer, or by the system for its memory
    log.warning("grading gave up within %g s, reward 0: answer %.80r, gold %.80r", timeout, answer, gold)
    return False


def start_worker() -> subprocess.Popen:
    """A Python process that runs serve()."""
    # not multiprocessing: fork is unsafe beside torch's threads, spawn runs the caller's script again, torch and all
    return subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy orders some sets by hash: every worker shall agree
        start_new_session=True,  # Ctrl-C is for the parent; workers end when their stdin closes
    )


def serve() -> None:
    """A worker: reads [answer, gold, timeout] as json lines, prints 1 or 0. Ends when stdin closes: with the parent."""
    if sys.platform == "linux":  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default ends the process
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback when the parent is gone
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for a reply
    equal(r"\frac{x}{2}", "0.5x")  # the first parse builds the grammar; no time limit yet
    for line in sys.stdin:
        answer, gold, timeout = json.loads(line)
        # processor time, so that a busy machine makes no right answer wrong; it fires inside of a long C call, too
        signal.setitimer(signal.ITIMER_PROF, timeout)
        same = equal(answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(same), file=replies, flush=True)
        if peak_memory() > MAX_MEMORY / 4:
            break  # retire: sympy's caches keep results, and Math-Verify turns a later MemoryError into "not equal"


def peak_memory() -> int:
    """The most bytes that this process has held."""
    if sys.platform == "linux":  # where ru_maxrss begins with the parent's, and a parent that trains has many
        with open("/proc/self/status") as file:
            return int(re.search(r"Vm(?:HWM|RSS):\s*(\d+) kB", file.read())[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@atexit.register
def stop_workers() -> None:
    """End the idle workers; grade starts new ones when it needs them."""
    while not _idle.empty():
        worker = _idle.get()
        worker.kill()
        worker.communicate()


if __name__ == "__main__":
    serve()
