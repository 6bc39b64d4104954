"""Grading: what is accepted and what is not, and that no answer can stop or break it."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rewards

ROOT = Path(rewards.__file__).parent


def boxed(answer):
    return rf"So the answer is \boxed{{{answer}}}."


@pytest.mark.parametrize(
    "text, want",
    [
        (r"So the answer is \boxed{34}.", "34"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.} and } more", r"\left\{ 1 \right."),  # a printed brace may stand alone
        (r"\boxed{1 \\{2}}", r"1 \\{2}"),  # a line break, then a real brace
        (r"\boxed{\boxed{7}}", "7"),
        ("\\boxed {\n 5 }", "5"),
        ("The answer is 34.", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{1} or \boxed{ }", None),  # the last box counts, also when it is empty
        (r"\boxed{1} or \boxed{2", None),
        (r"\boxed{1} or \boxed{2\}", None),
    ],
)
def test_last_boxed(text, want):
    assert rewards.last_boxed(text) == want


NO_UNITS = """million,million dollars,hundred,thousand,dozen,noon,midnight,squared,cubed,factorial,thirds,half,halves
and a half,times as many,times x,over x,divided by x,less than x,more than x,out of three,of x,or six
plus two,minus two,below zero,degrees below zero,above,sqrt,root,pi,π,twice""".replace("\n", ",").split(",")

# rule: gold, answers to accept, answers to reject
CASES = {
    "integers": ("34", ["34", "034", "+34", "34.0", "x = 34"], ["43", "-34", "340", "34.5", "3 4", "34, 35"]),
    "float golds": ("41.0", ["41", "41.00"], ["410", "4.1"]),
    "leading zeros": ("073", ["73", "073", "73.0"], ["730", "37"]),
    "long integers": ("1000000000000000007", ["1,000,000,000,000,000,007"], ["1000000000000000008"]),
    "fractions": ("3/4", [r"\frac{6}{8}", r"\dfrac34", "0.75", r"\tfrac{3}{4}"], ["4/3", "0.7", r"\frac{3}{5}"]),
    "mixed numbers": (r"5\frac12", [r"\frac{11}{2}", "5.5"], ["51/2", r"\frac{51}{2}"]),
    "expressions": ("x^2-1", ["(x-1)(x+1)", "-1+x^2"], ["y^2-1", "x^2+1"]),
    "roots": (r"2\sqrt{3}", [r"\sqrt{12}", "2√3", "2sqrt(3)"], [r"2\sqrt{5}", r"3\sqrt{2}"]),
    "lists in any order": ("1,-2", ["-2, 1", r"1 \text{ and } -2", r"\{1,-2\}"], ["1", "1, -2, 5", "1, 2"]),
    "dollars inside": ("$71$,$86$", ["86, 71", r"71 \text{ and } 86"], ["71", "$71$,$85$"]),
    "pairs": ("(3,-5)", [r"\left(3, -5\right)"], ["(-5,3)", r"\{3,-5\}", "(3,5)"]),
    "sets are not pairs": (r"\{3,-5\}", ["-5, 3"], ["(3,-5)"]),
    "intervals": ("(3,4]", ["(3, 4]", r"3 < x \leq 4", r"x \in (3,4]"], ["[3,4]", "(3,4)", "3 < x < 4"]),
    "intervals that are empty": ("(1,1]", [], ["[1,1)"]),
    "half-open intervals": ("[0,1/2)", ["[0, 0.5)", r"0 \leq x < \frac12"], ["(0,1/2]", "[0,1/2]"]),
    "inequalities joined by or": (
        r"x<-1 \text{ or } x>3",
        [r"x>3 \text{ or } x<-1", "x<-1 or x>3", "x<-1, x>3"],
        [r"x<-1 \text{ and } x>3", "x<-1 and x>3", r"x<-1 \text{ or } x>4"],
    ),
    "two values are no pair": ("(2,3)", ["2, 3", r"2 \text{ and } 3"], [r"2 \text{ or } 3", "2 or 3", r"2\text{or}3"]),
    "a pair is not two values": (r"2 \text{ or } 3", ["3, 2", r"2 \text{ and } 3", r"\{2,3\}"], ["(2,3)", "2"]),
    "pairs joined by or": ("((1,2),(3,4))", [r"(1,2) \text{ or } (3,4)"], [r"(1,2) \text{ or } (4,3)"]),
    "or inside a name": ("(3,2)", [r"\lfloor 3.5 \rfloor, 2"], [r"\lfloor 2.5 \rfloor, 2"]),
    "matrices": (
        r"\begin{pmatrix} 1 \\ x \end{pmatrix}",
        [r"\begin{bmatrix} 1 \\x \end{bmatrix}", r"\begin{bmatrix}1\\x\\\end{bmatrix}"],
        [r"\begin{pmatrix} x \\ 1 \end{pmatrix}"],
    ),
    "doubled escapes": (r"\frac{\pi}{7}", [r"\\frac{\\pi}{7}"], [r"\\frac{\\pi}{8}"]),
    "a comma and a space make a list": (
        "41250",
        ["41,250", r"41,\!250", r"41, \!250"],
        ["41, 250", r"41,\ 250", r"41,\,250", r"41 \text{ and } 250"],
    ),
    "a number with a comma is no list": ("41,250", ["41250", r"41,\!250"], ["41, 250", "250, 41"]),
    "lists of three digits": ("41, 250", ["250, 41", r"41 \text{ and } 250", "41,250"], ["41250", r"41,\!250"]),
    "money is no list": (r"\$41,\!250", ["41,250"], ["41, 250"]),
    "thousands": ("6250", [r"6\,250", r"6,\!250", r"6{,}250", "6,250", r"6\ 250"], [r"62\,50", "6.250", "6, 250.5"]),
    "spaces": ("9", ["9\u00a0", "\u200b9", "9~", r"\, 9 \,"], ["\u200b8"]),
    "minus sign": ("-3x", ["\u22123x", "\u20133x"], ["3x"]),
    "times": (r"6 \times 10^{5} k", ["6 × 10^5 k", "6·10^5 k"], ["6 × 10^6 k"]),
    "degrees": (r"75^\circ", ["75", "75°", r"75^{\circ}", r"75 \text{ degrees}"], ["76°", r"\frac{5\pi}{12}"]),
    "degrees in expressions": (r"\frac{x}{2}", [r"\frac{x}{2}°"], [r"\frac{x}{3}°"]),
    "money": (r"\$12,\!480", ["12,480", r"12480 \text{ dollars}", r"\$12480"], ["12", r"\$12,481"]),
    "math delimiters": (r"\frac{7}{9}", [r"\(\frac{7}{9}\)", r"\[ \frac{7}{9} \]"], [r"\(\frac{9}{7}\)"]),
    "sizes": (r"\sin\left(\frac{x}{2}\right)", [r"\sin\bigg(\frac{x}{2}\bigg)"], [r"\sin\bigg(\frac{x}{3}\bigg)"]),
    "fonts": (r"\text{west}", ["west", r"\textbf{West}", r"\mathrm{west}", r"\mbox{ west }"], ["east", "w"]),
    "choices": (r"\text{(E)}", ["E", "(E)", r"\textbf{(E)}"], ["D", r"\text{(D)}"]),
    "fraction styles": (r"\frac{a}{b}", [r"\dfrac{a}{b}", r"\cfrac{a}{b}"], [r"\dfrac{b}{a}"]),
    "numpy names": ("np.arctan(3/8)", [r"\arctan\frac{3}{8}", r"\arctan(0.375)"], [r"\arctan\frac{8}{3}"]),
    "names as text": (r"\text{sin}(x)", [r"\sin x"], [r"\cos x"]),
    "names without backslash": (r"\frac{5\pi}{6}", ["5pi/6"], ["5pi/7"]),
    "imaginary unit": ("3+11i", ["11i+3", "3 + 11 i", "11 i + 3"], ["3-11i", "11+3i"]),
    "gamma is a variable": (r"(\gamma^2-1) c", [r"(\gamma-1)(\gamma+1) c"], [r"-0.667c", r"(\gamma^2+1) c"]),
    "hbar is a variable": (r"\hbar", [r" \hbar"], ["2", "h"]),
    "point before a slash": ("-7./9", [r"-\frac{7}{9}"], [r"\frac{7}{9}", r"-\frac{9}{7}"]),
    "end of sentence": (r"\sqrt{7}", [r"\sqrt{7}.", r"\sqrt{7},"], [r"\sqrt{6}."]),
    "end of sentence, numbers": ("58", ["58.", "58 ."], ["5.8", "58.1"]),
    "scientific": (
        "4.5e33",
        [r"4.5 \times 10^{33}", r"4.5\cdot 10^{33}", r"45 \times 10^{32}", r"E = 4.5 \times 10^{33}"],
        [r"4.5 \times 10^{34}", "4.5", r"4.6 \times 10^{33}"],
    ),
    "scientific, small": ("1.2e-27", [r"1.2 \times 10^{-27}"], [r"1.2 \times 10^{-26}", "0"]),
    "percent": ("35", [r"35\%", r"35.0\%", "35 percent", r"35 \text{ percent}"], [r"3.5\%", r"36\%"]),
    "percent in the gold": (r"35\%", ["35", "0.35", r"35.0 \%"], ["3.5", r"0.35\%"]),
    "percent, fractions": (r"\frac{200}{3}\%", [r"\frac{200}{3}"], [r"\frac{2}{3}\%", r"\frac{100}{3}"]),
    "percent, the word": ("0.35", ["35 percent", r"35 \text{ percent}"], ["36 percent"]),
    "ordinals": ("15th day", ["15", r"15^{\text{th}} day", r"15\text{th}"], ["16th day"]),
    "times of the day": ("4:30 \\text{ p.m.}", ["4:30 PM", r"4:30 \text{ PM}"], [r"4:30 \text{ AM}", "5:30 PM"]),
    "units": ("19", [r"19 \text{ cm}^2", r"19\,\mathrm{m}/\mathrm{s}", r"19 \text{ mol}^{-1}"], [r"18 \text{ cm}^2"]),
    "units after doubled escapes": ("19", [r"19 \\text{ m}"], [r"18 \\text{ m}"]),
    "units are no second answer": ("19", ["19 \\text{ m}"], [r"19 \text{ or 8}", r"19 \text{ or } 8"]),
    "units with their number in text": (
        r"\text{17 liters}",
        [r"17 \text{ liters}", "17", r"\mathrm{17 liters}", r"\text{17 cm}^3", r"\text{17cm}", r"\mbox{17 m/s}"],
        [r"18 \text{ liters}", r"\text{18 liters}", r"\text{17 of 20}", r"\text{17 or 18}", r"\text{17 - x}"],
    ),
    "units with their number in text, in the answer": (
        "17",
        [r"\text{17 liters}", r"\text{17.0 liters}"],
        [r"\text{17 of 20 liters}", r"\text{17x}", r"\text{17 pi}", r"\text{1 and 7}", r"\text{about 17}"],
    ),
    "units of many words": (
        "5",
        [
            r"5 \text{ m}",
            r"\text{5 m}",
            r"5 \text{ J/(kg K)}",
            r"5 \text{ U.S. dollars}",
            r"\text{5 cups of flour}",
            r"5 \text{ two-digit numbers}",
            r"5 \text{ lessons left over}",  # less, over
            r"5 \text{ more apples}",
            r"5 \text{ square cm}",
            r"5 \text{ cm squared}",
            r"5 \text{ times}",
        ],
        [],
    ),
    "words that change the value": (
        "5",
        [],
        [form.replace("w", word) for form in (r"5 \text{ w}", r"\text{5 w}") for word in NO_UNITS]
        + [f"5 {word}" for word in ("million", "hundred", "dozen", "noon", "squared", "factorial", "thirds", "sqrt")],
    ),
    "one letter in text is a variable": (
        "5",
        [],
        [form.replace("w", x) for form in (r"5 \text{ w}", r"\text{5 w}") for x in "x,a,i,e,xy,x y,x.,X".split(",")],
    ),
    "variables in text": ("5x", [r"5\text{x}", r"5 \text{ x}", r"\text{5 x}"], [r"5 \text{ y}", r"5 \text{ m}"]),
    "names after a number in text": (r"4\pi", [r"4 \text{ pi}", r"\text{4 pi}", "4pi"], ["4", r"4\text{ e}"]),
    "no name is lost": ("2", [], [r"2\text{cos}x", r"2\text{cos} x"]),
    "millions": (
        r"\text{2 million}",
        ["2 million", r"2 \text{ million}", r"\$2 \text{ million}"],
        ["2", r"2 \text{ billion}", r"\text{2 billion}", r"\text{3 million}", r"2 \text{ dollars}"],
    ),
    "noon": (r"\text{12 noon}", [r"12 \text{ noon}"], [r"\text{12 midnight}", r"12 \text{ midnight}", "12"]),
    "less and more": (
        r"\text{5 less than x}",
        [],
        [r"\text{5 more than x}", r"\text{5 less than y}", "5", r"\text{5 x}"],
    ),
    "out of": (r"\text{2 out of three}", [], ["2", r"\text{2 out of four}", r"\text{3 out of three}"]),
    "fractions of something": (r"\frac{1}{2}", [], [r"\text{1/2 of x}", r"1/2 \text{ of x}", r"\frac12 \text{ x}"]),
    "percent with its number in text": (r"\text{35 percent}", [r"35\%", "0.35", r"35 \text{ percent}"], ["3.5"]),
    "times of the day in text": (
        r"\text{6:40 p.m.}",
        [r"6:40 \text{ p.m.}", "6:40 PM", r"\text{6:40 PM}", r"\text{6:40pm}"],
        [r"6:40 \text{ a.m.}", r"\text{6:40 a.m.}", r"\text{6:04 p.m.}", "6"],
    ),
    "units without text": ("6.3 cents", ["6.3", "6.3cents", "6.3 kg"], ["6.4 cents"]),
    "letters are no units": ("5t", ["t*5"], ["5", "5s", "5m"]),
    "set builder": (r"\{x \mid -1 < x < 1\}", ["-1<x<1", "(-1,1)"], ["[-1,1]", "(-1,2)"]),
    "names of values": ("x=16, y=3", ["16, 3"], ["16, 4", "x=3, y=16"]),
    "names in the answer": ("1,3", ["Minimum: 1, Maximum: 3", "a = 1, b = 3"], ["Minimum: 1, Maximum: 4"]),
    "names on both sides": ("x=5", ["5", "x = 5"], ["y=5"]),
    "bases": ("52_8", ["52_{8}", "52"], ["52_9", "53_8"]),
    "dots": (r"1,2,\ldots,9", [r"1, 2, \ldots, 9"], ["1,2,9", r"1,3,\ldots,9"]),
    "repeated elements": ("4,1,1", ["1,4,1"], ["4,1", "1"]),
    "repeated elements, alone": ("-2,-2", ["-2, -2"], ["-2"]),
    "repeated elements, other ones": ("5,5,8", ["8, 5, 5", r"\frac{10}{2}, 8, 5"], ["5, 8, 8", "5, 8", "5, 5, 8, 8"]),
    "repeated elements, joined": (
        "6,2,2",
        [r"2, 6 \text{ and } 2", r"2 \text{ and } 2 \text{ and } 6", r"\{2, 2, 6\}", "6, 2 and 2", "a=6, b=2, c=2"],
        [r"2 \text{ and } 6", r"\{2, 6\}", r"6, 6 \text{ and } 2"],
    ),
    "repeated elements, as a tuple": (
        "6,2,2",
        ["(6, 2, 2)", "(a, b, c) = (6, 2, 2)", "((6, 2, 2))", r"\left(6, \frac{4}{2}, 2\right)"],
        ["(6, 2)", "(2, 6, 2)", "(6, 6, 2)", "(a, b, c) = (6, 2, 3)"],  # a tuple has an order
    ),
    "repeated pairs": (
        "((4,4),(4,4))",
        ["(4, 4), (4, 4)", r"(4, 4) \text{ and } \left(\frac{8}{2}, 4\right)"],
        ["(4,4)", "4, 4, 4, 4", "(4,4), (4,5)"],
    ),
    "pairs, each with its names": ("(7,7),(9,1)", ["(x,y)=(9,1), (x,y)=(7,7)"], ["(x,y)=(9,1)", "(7,9),(7,1)"]),
    "tiny numbers": (r"\frac{1}{2^{99}}", ["2^{-99}"], [r"\frac{1}{2^{98}}", "0"]),
    "huge denominators": (r"\frac{1}{2006!}", [r"\frac{1}{2006 \cdot 2005!}"], [r"\frac{1}{2004!}"]),
    "infinite": (r"\frac{x}{0}", [], [r"\frac{x}{0}+0", r"\frac{1}{0}"]),
    "infinity": (r"+\infty", [r"\infty"], [r"-\infty"]),
    "garbage around the gold": (
        r"\frac{3}{7}",
        [],
        [r"see [ \frac{3}{7} ] ( {", r"\text{it is } \frac{3}{7}, \frac{1}{2}"],
    ),
    "code": ("5", ["5"], ["Eq(x, 5)", "print(5)", "int('5')", "True"]),
    "echoes": ("7", [], ["ANSWER", "...", "?", "x", r"\text{the answer}", "0=0", r"\infty"]),
}


@pytest.mark.parametrize("rule", CASES)
def test_rules(rule):
    gold, accept, reject = CASES[rule]
    answers = [gold, *accept, *reject]
    got = rewards.grade([boxed(a) for a in answers], [gold] * len(answers))
    assert dict(zip(answers, got)) == {a: float(a == gold or a in accept) for a in answers}


def test_only_the_last_box_counts():
    assert rewards.reward(r"\boxed{1}, no: \boxed{2}", "2") == 1
    assert rewards.reward(r"\boxed{1}, no: \boxed{2}", "1") == 0
    assert rewards.reward(r"\boxed{2}, no: \boxed{2", "2") == 0
    assert rewards.reward(r"\boxed{1}, \boxed{2}", "1, 2") == 0  # boxes are not joined
    assert rewards.reward("The answer is 2", "2") == 0


def test_any_gold_of_a_list_will_do():
    golds = ["4", r"\frac{x}{2}"]
    assert [rewards.reward(boxed(a), golds) for a in ("4", "0.5x", "5", "2x")] == [1, 1, 0, 0]
    assert rewards.reward(boxed("4"), []) == 0


def test_gold_and_answer_are_not_exchanged():
    # an equation as answer gives its right side, an equation as gold is itself
    assert rewards.equal(answer="2x+z=1", gold="1")
    assert not rewards.equal(answer="1", gold="2x+z=1")


def test_too_long_answers_get_nothing():
    assert rewards.reward(boxed("5" + "+0" * rewards.MAX_CHARS), "5") == 0
    assert rewards.reward("so " * 10_000 + boxed("5"), "5") == 1  # only the answer must be short


def test_grade_agrees_with_reward():
    answers = ["34", "35", r"\frac{3}{4}", "0.75", r"\frac{6}{8}", "x+1", "1+x", "34"]
    completions = [boxed(a) for a in answers] + ["no box", r"\boxed{}"]
    golds = ["34", "34", "3/4", "3/4", ["1", "3/4"], "1+x", ["x"], "x"] + ["34", ""]
    want = [rewards.reward(c, g) for c, g in zip(completions, golds)]
    assert rewards.grade(completions, golds) == rewards.grade(completions, golds, workers=1) == want
    assert want == [1, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert rewards.grade([], []) == []
    with pytest.raises(AssertionError, match="2 completions, but 1 golds"):
        rewards.grade(["a", "b"], ["a"])


def test_equal_pairs_are_graded_once(monkeypatch):
    asked = []
    monkeypatch.setattr(rewards, "ask", lambda *question: asked.append(question) or True)
    assert rewards.grade([boxed("x+1")] * 9 + [boxed("7")] * 9, ["1+x"] * 9 + ["7"] * 9) == [1.0] * 18
    assert asked == [("x+1", "1+x", 5.0)]  # and plain numbers never


SLOW = r"9^{9^{9^{9}}}"  # a number with 10^(10^8) digits


def test_a_hanging_answer_harms_nobody_else(caplog):
    answers = [r"\frac{2}{4}", SLOW, "0.5y", r"\frac{1}{4}", SLOW]
    golds = ["1/2", "3/7", "y/2", "3/4", "3/7"]
    before, start = rewards.grading_timeouts(), time.perf_counter()
    with caplog.at_level(logging.WARNING, logger="rewards"):
        got = rewards.grade([boxed(a) for a in answers], golds, timeout=1, workers=2)
    assert got == [1, 0, 1, 0, 0]
    assert rewards.grading_timeouts() == before + 1  # the same question twice is one comparison
    assert len(caplog.records) == 1 and SLOW in caplog.text
    assert time.perf_counter() - start < 60  # about 2 s on a free machine
    assert rewards.grade([boxed(a) for a in answers[:1]], golds[:1]) == [1]  # a new worker takes over


HOSTILE = [
    "__import__('os').system('touch hacked')",
    r"\text{__import__('os').system('touch hacked')}",
    "open('hacked','w')",
    "exit()",
    "1e999999999",
    r"10^{999999999} \cdot 0.1",
    r"(10^{8})!",
    "(" * 600 + "1" + ")" * 600,
    r"\frac{1}{" * 200 + "1" + "}" * 200,
    r"\sum_{k=1}^{10^{12}} \frac{1}{k^3+\sin k}",
    "{" * 900 + "}" * 900,
    "1" + " " * 1900 + "x",
    "\\" * 1998,
    "\ud800\x00\x1b\n",
    ",".join(str(i) for i in range(400)),
]


def test_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rewards.stop_workers()  # so that the workers start in tmp_path
    got = rewards.grade([boxed(a) for a in HOSTILE] + [boxed("0.5x")], ["3/7"] * len(HOSTILE) + ["x/2"], timeout=1)
    assert got == [0.0] * len(HOSTILE) + [1.0]
    assert os.listdir(tmp_path) == []
    rewards.stop_workers()


def serve(setup, *questions):
    """Run a worker by hand, after the Python lines `setup`. Returns the finished process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rewards; {setup}; rewards.serve()"
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    return subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=60)


def test_worker_replies_and_imports_no_torch():
    done = serve("pass", [r"\frac{2}{4}", "1/2", 5], ["x", "y", 5])
    assert (done.stdout, done.stderr, done.returncode) == ("1\n0\n", "", 0)
    done = serve("rewards.equal = lambda a, g: print('noise') or 'torch' in sys.modules", ["x", "y", 5])
    assert (done.stdout, done.returncode) == ("0\n", 0)  # what a library prints is no reply


def test_time_limit_is_processor_time():
    # a machine that is busy with training must not turn right answers into wrong ones
    done = serve("import time; rewards.equal = lambda a, g: time.sleep(0.5) is None", ["x", "y", 0.2])
    assert (done.stdout, done.returncode) == ("1\n", 0)
    done = serve("rewards.equal = lambda a, g: g == '0.5x' or sum(iter(int, 1))", ["x", "y", 0.2])
    assert done.stdout == "" and done.returncode < 0


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit of the address space")
def test_worker_memory_is_bounded():
    done = serve("rewards.equal = lambda a, g: bytearray(rewards.MAX_MEMORY) and True", ["x", "y", 5])
    assert "MemoryError" in done.stderr and done.stdout == ""
    setup = "rewards.MAX_MEMORY = 600 << 20; rewards.equal = lambda a, g: len('x' * (200 << 20)) > 0"
    done = serve(setup, ["x", "y", 5], ["x", "y", 5])
    assert (done.stdout, done.returncode) == ("1\n", 0)  # it retires after one large answer
    ballast = b"x" * (200 << 20)  # what the parent holds is not the worker's: a run of 7B holds more than a worker may
    done = serve("rewards.MAX_MEMORY = 600 << 20; rewards.equal = lambda a, g: True", ["x", "y", 5], ["x", "y", 5])
    assert (done.stdout, done.returncode, len(ballast)) == ("1\n1\n", 0, 200 << 20)


def test_worker_that_retired_is_replaced_and_a_bug_is_not_hidden():
    rewards.stop_workers()

    def put(code):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process.wait()
        rewards._idle.put(process)

    put("pass")
    assert rewards.reward(boxed("0.5x"), "x/2") == 1
    rewards.stop_workers()
    put("raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="a bug"):
        rewards.reward(boxed("0.5x"), "x/2")


def test_works_in_threads():
    got = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: rewards.grade([boxed(f"{i}+x")], [f"x+{i}"], workers=1)}))
        for i in range(3)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == {0: [1], 1: [1], 2: [1]}


def test_works_in_a_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "print('started')\n"
        "import rewards\n"
        "print(rewards.grade(['\\\\boxed{0.5x}', '\\\\boxed{x}'], ['x/2', 'x/2']))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("started\n[1.0, 0.0]\n", "")  # workers do not run the script, and end quietly
