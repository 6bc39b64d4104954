r"""
The reward: 1.0 if the content of the last \boxed{} of a completion equals the gold answer, else 0.0.

gold             accepted                                        rejected
34               \boxed{34}  \boxed{x = 34.0}  \boxed{34.}       34 without a box, \boxed{34} ... \boxed{35}, \boxed{34
3/4              \boxed{\frac{6}{8}}  \boxed{0.75}               \boxed{4/3}  \boxed{0.7}
1,-2             \boxed{-2, 1}  \boxed{1 \text{ and } -2}        \boxed{1}  \boxed{1, -2, 5}
4.5e33           \boxed{4.5 \times 10^{33}}                      \boxed{4.5 \times 10^{34}}
2,2,3            \boxed{3, 2, 2}  \boxed{(2, 2, 3)}              \boxed{2, 3}  \boxed{2, 3, 3}  \boxed{(3, 2, 2)}
\$32,\!348       \boxed{32,348}  \boxed{32348 \text{ dollars}}   \boxed{32}  \boxed{32, 348}  \boxed{32348 \text{ tens}}
90^\circ         \boxed{90}  \boxed{90 \text{ degrees}}          \boxed{\pi/2}
\text{9:15 a.m.} \boxed{9:15 \text{ a.m.}}  \boxed{9:15 AM}      \boxed{9:15 \text{ p.m.}}
35\%             \boxed{35}  \boxed{35.0\%}  \boxed{0.35}        \boxed{3.5}
52_8             \boxed{52_{8}}  \boxed{52}                      \boxed{52_9}
(3,4]            \boxed{(3, 4]}  \boxed{3 < x \leq 4}            \boxed{[3,4]}
x^2-1            \boxed{(x-1)(x+1)}                              \boxed{y^2-1}

Math-Verify (sympy) compares; around it stand RULES for what it misreads, and vetoes (in decide and far_apart) for what
it accepts wrongly. Units are dropped, not compared; variables are compared without case. An expression of a model can
keep sympy busy for ever (9^{9^{9^9}}), so Math-Verify runs only in worker processes, which die when one answer takes
too long. Equal strings and plain numbers are decided without a worker. Nothing a model writes is evaluated as Python.
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

MAX_CHARS = 2000  # longer answers get 0: the longest gold of the usual benchmarks has a few hundred
MAX_MEMORY = 4 << 30  # bytes of address space of one worker
log = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------- extract, normalise


def last_boxed(text: str) -> str | None:
    r"""
    The content of the last \boxed{...}, or None if that box is empty or not closed; earlier boxes never count.

    "\boxed{1} no, \boxed{\{2, 3\}}" -> "\{2, 3\}";  "\boxed{1} no, \boxed{2" -> None
    """
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)  # \{ and \} are printed characters: \left\{ may stand alone
        if depth == 0:
            return text[start : token.start()].strip() or None
    return None


UNIT = r"[a-z]{4,}|[ckm]m|k?g|m[lgi]|ft|in|lbs?|oz|hrs?|min|sec|mph|days?|yen"  # not m, s, t, h: they are variables too
QUANTITY = rf"(?i)^\\text *\{{ *([-+]?[\d.,:/ ]*\d)((?: [a-z]|[ap]\.?m|{UNIT})(?:[^{{}}\d+<=>\\-]|\^-?\d)*)\}}(?=\^|$)"
VALUE = (  # what changes the value: 2 \text{ million}, 5 \text{ squared}, 3 \text{ x}, \text{2 out of three}
    r"(?:(?i:(?<![a-z\\])(?:one|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|[a-z]*illion|half"
    r"|halves|thirds|fourths|fifths|tenths|plus|minus|(?:times|over)(?= \w)|divided|than|out|above"
    r"|below|factorial|root|sqrt|noon|midnight|twice|double)s?(?![a-z-])|(?<=\d |\{ |.\{)(?:of|or|and|squared|cubed)\b)"
    r"|\\pi|[π√]|(?<![a-zA-Z])(?<![a-zA-Z]\.)(?:[b-fijknp-rt-w]|[x-z]+|[EIQXYZ]|a(?=[. ]*\}))(?!\.?[a-zA-Z]))"
)
UNITS = rf"\\text *\{{(?![^{{}}]*{VALUE})(?:[^{{}}\d]|\^-?\d)*\}}"  # other words; m, s, h, g, l, N, J, ... are units
AND = r"[, ]*\\text *\{[, ]*(?:and|or)[, ]*\}|(?<=[\d)}] )(?:and|or)(?= [-\d(\\])"  # 1 \text{ and } 2, 1 and 2
TUPLE = r"\(((?:[^()]|\([^()]*\))*)\)"  # one pair of parentheses around all: (1,(2,3)), not (1,2),(3,4)
TH = r" *(?:(?:st|nd|rd|th)|\\text *\{ *(?:st|nd|rd|th) *\})"
RULES = [  # (pattern, replacement), in order, on answer and gold alike
    # characters and commands that mean the same
    (r"\\\\(?=[a-zA-Z])(?![\s\S]*end\{)", r"\\"),  # doubled escapes, \\frac; in a matrix \\ ends a row
    (r"(?<=\d)(?:(?:(?:, ?)?\\!|\\[, ])\s*|\{,\})+(?=\d{3}(?!\d))", ""),  # thousands: 6\,250  11,\! 111  1{,}000
    (r"\s+|(?<!\\)\\[,;:! ]|~|[\u200b\u200c\u200d\ufeff]", " "),
    (r"[\u2212\u2013]", "-"),  # the minus signs of typography
    (r"·", r"\\cdot "),
    (r"√ *(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"°|\^ *(?:\\circ|\{ *\\circ *\})", ""),  # degrees
    (r"\\?\$|(?<!\\)\\[()[\]]", ""),  # money \$36, and the delimiters of $69$,$84$: deleting only $ would leave \36
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z]) *", ""),  # sizes
    (r"\\(?:math|text)(?:rm|bf|it)(?= *\{)|\\(?:mbox|operatorname|textnormal)(?= *\{)", r"\\text"),
    # names
    (r"(?<![\\a-zA-Z])(arc(?:sin|cos|tan)|sin|cos|tan|ln|log|exp|pi)(?![a-zA-Z])", r"\\\1 "),  # pi/6, arcsin(1/2)
    (r"\\text *\{ *(\\(?:sin|cos|tan|ln|log|pi) ) *\}|(?:np|numpy|math)\.(?=[\\a-z])", r"\1"),
    (r"(?<=\d)i(?![a-zA-Z])", " i"),  # Math-Verify looks for a free-standing i: 2i+1 would be real, 1+2 i complex
    (r"\\gamma(?![a-zA-Z])", r"\\kappa_{g}"),  # the variable, not Euler's constant or the gamma function
    # numbers
    (r"(?<=\d)\.(?![\d.])", ""),  # -1./3: a decimal point has a digit after it
    (r"(?<![.\\]) *[.,;]$", ""),  # the end of the sentence is not part of the answer
    (r"(?<![\w.])(\d(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),  # 4.5e33; Math-Verify: 4.5*E*33
    # units, at the end
    (QUANTITY, r"\1\\text{\2}"),  # \text{3 m} is 3\text{ m}; \text{3 of 4}, \text{3 - x} and \text{3x} stay
    (r" *(?:\\text *\{ *)?(?:percent|pct) *\}?$", r"\\%"),
    (rf"(?<=\d)(?:\^\{{{TH} *\}}|{TH})(?![a-zA-Z])", ""),  # 15th, 12^{\text{th}}
    (r"(?i)(?<=\d) *(?:\\text *\{)? *([ap])\.? *m\.? *\}?$", r" \1m"),  # 4:30 \text{ p.m.}; a.m. is another time
    (rf"(?<=[\d}})])(?:(?: |/|\\cdot)*{UNITS}(?:\^\{{?-?\d\}}?)?)+$", ""),  # 9 \text{ cm}^2, 5 \text{ m}/\text{s}
    (rf"(?<=\d) *(?!{VALUE})(?i:{UNIT})(?:\^\{{?\d\}}?)?$", ""),  # 5 cents
    (r"^\\\{ *[a-z] *(?:\||\\mid)(.*)\\\}$", r"\1"),  # {x | -1 < x < 1} is its condition
]


def normalise(answer: str) -> str:
    r"""Rewrite what Math-Verify misreads: "\$32,\!348 " -> "32,348", "4.5e33" -> "4.5 \times 10^{33}"."""
    for pattern, replacement in RULES:
        answer = re.sub(pattern, replacement, answer).strip()
    return answer


def squeeze(answer: str) -> str:
    r"""Without spaces and fonts: "\text{ east }" -> "east", "( 3 , 4 )" -> "(3,4)"; but "5 1/2" is not "51/2"."""
    answer = re.sub(r"\\text *\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"(?<!\d) +| +(?!\d)", "", answer)
    answer = re.sub(r"^\(([A-Z])\)$", r"\1", answer)  # choices: (C) is C
    return answer.lower() if re.fullmatch(r"[a-zA-Z]{3,}", answer) else answer


def number(answer: str) -> Fraction | None:
    r"""The exact value of a plain decimal number: "1,234.50" -> 2469/2, "7\times10^{3}" -> 7000, "3/4" -> None."""
    decimal = r"([-+]?)(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    power = r"(?:\\(?:times|cdot)10\^\{?([-+]?\d{1,3})\}?)?"  # three digits: 10^(10^9) would fill the memory
    match = re.fullmatch(decimal + power, answer)
    if match is None:
        return None
    sign, digits, exponent = match.groups()
    return Fraction(sign + digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)


# ------------------------------------------------------------------------------------------------------------- compare


def decide(answer: str, gold: str) -> bool | None:
    """Compare strings and plain numbers, and refuse what Math-Verify would accept wrongly; None: ask Math-Verify."""
    if len(answer) > MAX_CHARS:
        return False
    answer, gold = normalise(answer), normalise(gold)
    a, g = squeeze(answer), squeeze(gold)
    x, y = number(a.rstrip("\\%")), number(g.rstrip("\\%"))
    if a == g:
        return a != "" and (x is None or ", " not in answer or ", " in gold)  # 32,349 is a number; 32, 349 is a list
    if x is not None and y is not None and ", " not in answer + gold:
        percent = a.endswith("%") - g.endswith("%")
        return x == y or (percent != 0 and x == y * Fraction(100) ** percent)  # 35\% is 35 (the sign is a unit) or 0.35
    if re.search(r"\\[lcd]?dots|\.\.\.", a + g):
        return False  # Math-Verify drops the dots: 1,2,\ldots,9 would be the set {1,2,9}
    for sign in (r"\d *_\W*(?:text\W*)?(\d+)", r"\b(and|or)\b(?=.*(?:[<>]|\\[lg]e))", r"^(\[)[^])]*\)$|^\([^])]*(\])$"):
        a_signs, g_signs = re.findall(sign, answer), re.findall(sign, gold)
        if a_signs and g_signs and a_signs != g_signs:
            return False  # for Math-Verify 52_9 is 52_8, x < 1 or x > 3 is x < 1 and x > 3, [1,1) is (1,1] (empty)
    if any(re.match(r"\\\{|[^()]*\bor\b", s) and re.fullmatch(TUPLE, t) for s, t in ((answer, g), (gold, a))):
        return False  # Math-Verify compares the members only: the set {1,2} and 1 or 2 would be the pair (1,2)
    return None


def elements(answer: str) -> list[str]:
    r"""The members of a list, tuple or set: "1,(2,3)", "(1,(2,3))", "\{1,(2,3)\}" -> ["1", "(2,3)"]."""
    depth, members = 0, ""
    while (inner := re.sub(rf"^(?:{TUPLE}|\\\{{(.*)\\\}})$", r"\1\2", answer)) != answer:
        answer = inner
    for c in answer:
        depth += (c in "([{") - (c in ")]}")
        members += "\n" if c == "," and depth == 0 else c  # no answer has a \n of its own: see RULES
    return members.split("\n")


def equal(answer: str, gold: str) -> bool:
    """Whether the two are the same mathematically. Without a time limit: see grade."""
    decided = decide(answer, gold)
    if decided is not None:
        return decided
    from latex2sympy2_extended import NormalizationConfig  # here: it takes a second, and only the workers need it
    from math_verify import LatexExtractionConfig, parse, verify

    # it would warn that its own time limit is off: SIGALRM in main threads only; ours is in serve
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Only LaTeX: in plain text it takes any number that it finds, and hands the text to Python's eval. No units: its
    # list has s, t, m, ..., so that 5t would be 5s.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    latex = LatexExtractionConfig(boxed_match_priority=0, normalization_config=config)

    def same(a, g):
        a, g = (parse(rf"\boxed{{{s}}}", [latex], extraction_mode="first_match", parsing_timeout=None) for s in (a, g))
        # gold first: verify is not symmetric
        return verify(g, a, allow_set_relation_comp=True, timeout_seconds=None) and not far_apart(a[0], g[0])

    a, g = (re.sub(AND, ", ", normalise(s)) for s in (answer, gold))
    a, g = (a if "=" in g else unlabel(a)), (g if "=" in a else unlabel(g))  # not both: y = 5 is not x = 5
    a_list, g_list = elements(squeeze(a)), elements(squeeze(g))
    if len(set(a_list)) == len(a_list) and len(set(g_list)) == len(g_list):
        return same(a, g) or ("%" in a + g and same(a.rstrip("\\%"), g.rstrip("\\%")))
    # Math-Verify makes sets of lists: 2,2 would be 2, and 2,2,3 would be 2,3,3
    in_order = any(re.fullmatch(TUPLE, squeeze(s)) for s in (a, g))
    for x in a_list:
        y = next((y for y in g_list[: 1 if in_order else None] if equal(x, y)), None)
        if y is None:
            return False
        g_list.remove(y)
    return not g_list


def unlabel(answer: str) -> str:
    """Drop the names of values: "w = 16, f(x) = 3, (a, b) = (2, 2), Minimum: 1" -> "16, 3, (2, 2), 1"."""
    names = r"[a-zA-Z](?:\([a-z]\)|_\{?\w\}?)?\s*=|\((?:[a-zA-Z],\s*)+[a-zA-Z]\)\s*="
    return re.sub(rf"(^|,)\s*(?:{names}|(?:\\text\s*\{{[^{{}}]*\}}|[a-zA-Z]{{3,}})\s*[=:])", r"\1", answer)


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


def grade(completions: list[str], golds: list, timeout: float = 5.0, workers: int | None = None) -> list[float]:
    """
    The rewards of many completions, each 0.0 or 1.0.

    golds: for each completion a string, or a list of strings, any of which will do.
    timeout: seconds of processor time for one comparison; a worker that needs more dies, and its answer gets 0.
    workers: processes at most; they start at the first need and wait for the next call.
    """
    assert len(completions) == len(golds), f"{len(completions)} completions, but {len(golds)} golds"
    pairs = []  # of each completion: (answer, gold) for each of its golds
    for completion, gold in zip(completions, golds):
        answer = last_boxed(completion)
        pairs.append([] if answer is None else [(answer, g) for g in ([gold] if isinstance(gold, str) else gold)])
    known = {pair: decide(*pair) for pair in {pair: None for some in pairs for pair in some}}
    jobs = [pair for pair, same in known.items() if same is None]
    if jobs:
        workers = workers or min(os.cpu_count(), 16)
        with ThreadPoolExecutor(min(workers, len(jobs))) as threads:  # each thread waits for one process
            replies = threads.map(lambda pair: ask(*pair, timeout), jobs)
            known |= zip(jobs, Bar(replies, total=len(jobs), desc="grading", unit="answers"))
    return [float(any(known[pair] for pair in some)) for some in pairs]


def reward(completion: str, gold: str | list[str]) -> float:
    """1.0 if the last box of the completion equals the gold, or one of several golds, else 0.0. See grade."""
    return grade([completion], [gold])[0]


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
