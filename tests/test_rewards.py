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
from plumbing import notation

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
        (r"\boxed{1} or \boxed{2}", None),  # two offers are no answer
        (r"It is $\boxed{1}$ or $\boxed{\frac{1}{2}}$", None),
        (r"\boxed{1} for x or y, \boxed{2} for z", "2"),
        (r"so x = \boxed 7.", "7"),
        (r"\boxed -7.5, as asked for in \boxed.", "-7.5"),
        (r"$\boxed{42}$, given in \boxed as asked", "42"),
        (r"\fbox{9}", "9"),
        (r"\boxed(7)", None),
        (r"\boxed{\fbox{9}}", "9"),
    ],
)
def test_last_boxed(text, want):
    assert rewards.last_boxed(text) == want


TAGS = [  # text, what the last tag holds
    ("<think>3 + 4</think> <answer> 7 </answer>", "7"),
    ("<answer>6</answer> no, <answer>7</answer> at last", "7"),
    (r"<answer>So it is \boxed{7}.</answer>", "7"),  # a box in the tag counts as its content
    (r"\boxed{8} <answer>$7$</answer>", "$7$"),
    (r"<answer>\boxed{6}, no, \boxed{7}</answer> \boxed{8}", "7"),
    ("<answer>\n7\n</answer>", "7"),
    ("<answer> <answer>7</answer>", "7"),
    (r"\boxed{7}", None),
    ("The answer is 7", None),
    ("<answer>7", None),
    ("<answer>7</answer> <answer>8", None),
    ("7</answer>", None),
    ("<answer> </answer>", None),
    (r"<answer>7 \boxed{}</answer>", None),
    (r"<answer>\boxed{7</answer>", None),
    (r"<answer>\boxed{6} or \boxed{7}</answer>", None),
]


@pytest.mark.parametrize("text, want", TAGS)
def test_last_tagged(text, want):
    assert rewards.last_tagged(text) == want


def test_only_the_form_that_the_prompt_asks_for_counts():
    box, tag = r"\boxed{\frac{2}{4}}", r"<answer>\frac{2}{4}</answer>"
    for form, right in (("box", box), ("answer", tag)):
        texts = [box, tag, "1/2", right.replace("4", "5")]
        assert rewards.grade(texts, ["1/2"] * 4, form=form) == [float(text == right) for text in texts]
        assert rewards.no_answer(texts, form=form) == 2
        assert [rewards.has_answer(text, form) for text in texts] == [text == right or "5" in text for text in texts]
        assert rewards.reward(right, "0.5", form) == 1
    assert rewards.grade([box, tag], ["1/2", "1/2"]) == [1, 0]
    assert rewards.no_answer([text for text, _ in TAGS], "answer") == sum(want is None for _, want in TAGS) == 9
    assert rewards.reward("<answer>The answer is 7.</answer>", "7", "answer") == 1
    with pytest.raises(KeyError):
        rewards.grade([box], ["1/2"], form="tag")


@pytest.mark.parametrize(
    "text, gold, want",
    [
        ("so 3 + 4 = 7.", "7", True),
        (r"so it is \boxed{7}", "7", True),
        (r"\boxed{7} of 9", "7", False),
        ("7, of course", "8", False),
        ("none at all", "7", False),
        ("", "7", False),
        ("it costs $1,234.50.", "1234.5", True),
        (r"it is 1{,}234 or 12,\!345", "12345", True),
        ("x = -7", "-7", True),
        ("x = -7", "7", False),
        ("12 - 7", "7", True),
        ("12-7", "7", True),  # minus, not a sign
        (r"\boxed{-7}", "-7", True),
        ("an area of 7 cm^2", "7", True),
        (r"an area of 7 \text{ cm}^{2}", "7", True),
        ("half of it, 3/4", "4", False),
        ("half of it, 3/4", "0.75", True),
        (r"\boxed{\frac{3}{4}}", "0.75", True),
        (r"\boxed{\frac{3}{4}}", "4", False),
        (r"-\frac{3}{4}", "-0.75", True),
        ("divide by 3/0", "3", True),
        ("35% of them", r"35\%", True),
        ("7.0 in all", "7", True),
        ("70", "7", False),
        ("7", ["8", "7"], True),
        ("7", [r"\frac{1}{2}", "7"], True),
        ("7", r"\sqrt{49}", None),  # no plain number: not counted
        ("7", "x", None),
    ],
)
def test_last_number_right(text, gold, want):
    assert rewards.last_number_right(text, gold) is want


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


# Kinds of notation, each with golds (=), answers to accept (+) and to refuse (-), two spaces between them.
KINDS = r"""
# values, intervals
= \{4,9\}
+ 9, 4  4 \text{ or } 9  \{9, 4\}  x = 4 \text{ or } x = 9  x=9, x=4  x \in \{4, 9\}
- 4<x<9  (4,9)  x \in (4,9)  4 \le x \le 9  [4,9]  |x-6.5|<2.5  4 < n < 9  ]4,9[
= 1 < t < 6
+ (1,6)  6 > t > 1  t \in (1,6)  \{t : 1<t<6\}  \{t \mid 1 < t < 6\}  1 < t \text{ and } t < 6
- 1, 6  \{1, 6\}  1 \text{ or } 6  t=1, t=6  1 < t \le 6  [1,6)  2 < t < 6  1 < t  \{2,3,4,5\}
= 5\pm2
+ 3, 7  \{3,7\}  7 \text{ and } 3  5 \pm 2
- |x-5|<2  3<x<7  (3,7)  3  7  [3,7]
= 0, 8
+ 8, 0  0 \text{ and } 8  \{0,8\}
- 0<x<8  x\in(0,8)  0 \leq x \leq 8  0  8  08
= x=-1 \text{ or } x=4
+ -1, 4  x=4, x=-1  x = 4 \text{ or } -1
- -1<x<4  (-1,4)  [-1,4]  x=-1  x=1 \text{ or } x=4
= [2,\infty)
+ x \ge 2  2 \le x  x \geqslant 2  [2,+\infty)  \{x : x \ge 2\}
- x>2  (2,\infty)  2  x \le 2  (-\infty,2]
= (-4,0)\cup(0,4)
+ -4<x<0 \text{ or } 0<x<4  (0,4)\cup(-4,0)  x \in (-4,0) \cup (0,4)
- (-4,4)  (-4,0)  -4, 0, 4  -4<x<4
= x \le -3 \text{ or } x > 1
+ (-\infty,-3]\cup(1,\infty)  1 < x \text{ or } x \le -3  x > 1 \text{ or } -3 \ge x  (-∞,-3]∪(1,∞)
- x \le -3 \text{ and } x > 1  (-\infty,-3)\cup(1,\infty)  -3 \le x < 1  -3, 1  x>1
# named
= p=4, q=9
+ (4,9)  q=9, p=4  p=4 \text{ and } q=9  (p,q)=(4,9)  (q,p)=(9,4)  4, 9  \begin{cases} p = 4 \\ q = 9 \end{cases}
- (9,4)  p=9, q=4  9, 4  (p,q)=(9,4)  4  p=4  (4,9,0)  \{4,9\} \cup \{1\}
= (6,1)
+ x=6, y=1  y=1, x=6  (x,y)=(6,1)  a=6, b=1  x = 6 \text{ and } y = 1
- x=1, y=6  y=6, x=1  (1,6)  b=6, a=1  \{6,1\}  6
= r=2, s=5, t=-3
+ (2,5,-3)  t=-3, r=2, s=5  (r,s,t)=(2,5,-3)
- (5,2,-3)  (2,-3,5)  r=5, s=2, t=-3  -3, 2, 5  r=2, s=5
= (m,n)=(7,12)
+ m=7, n=12  (7,12)  n = 12, m = 7
- (12,7)  m=12, n=7  n=7, m=12  7  (m,n)=(12,7)
= x=1, y=8 \text{ or } x=2, y=5
+ (1,8),(2,5)  (2,5), (1,8)  (x,y)=(1,8) \text{ or } (x,y)=(2,5)
- x=1, y=5 \text{ or } x=2, y=8  (1,5),(2,8)  (8,1),(5,2)  1,8,2,5  (1,8)
= k=11
+ 11  k = 11  \text{k} = 11  k=11.0
- j=11  k=12  k^2=11  2k=11
# degrees
= \cos 25^\circ
+ \sin 65^\circ  cos 25°  \cos\left(25^{\circ}\right)  \cos \frac{5\pi}{36}
- \cos 25  \sin 25^\circ  25  \cos 25\pi
= \frac{\sqrt{2}}{2}
+ \sin 45^\circ  \cos(45^\circ)  \sin\frac{\pi}{4}
- \sin 45  \tan 45^\circ  \cos 45
= 1
+ \tan 45^\circ  \sin 90°
- \tan 45  \cos 90^\circ
= 30^\circ
+ 30  30 \text{ degrees}  30^{\circ}  \angle C = 30^\circ  30\degree  x = 30°
- \frac{\pi}{6}  3  \sin 30^\circ
= 3\sin 10^\circ
+ 3 \sin(10^\circ)  3\cos 80^\circ
- 3\sin 10  \sin 30^\circ
# mixed
= 4\frac{2}{5}
+ \frac{22}{5}  4.4  4 2/5  4\,\frac25  22/5  4 \text{ } \frac{2}{5}
- 4(\frac25)  4 \cdot \frac{2}{5}  4(2/5)  \frac{8}{5}  42/5
= \frac{6}{7}
+ 3\left(\frac{2}{7}\right)  (3)\frac{2}{7}
- 3\frac{2}{7}  3 2/7
= 7.5
+ 7 1/2  7\frac12  \frac{15}{2}  15/2
- 7(1/2)  71/2  7\frac{1}{3}
= 8 1/3
+ \frac{25}{3}  8\frac13  25/3
- \frac{8}{3}  8  81/3
= -3\frac{1}{4}
+ -\frac{13}{4}  -3.25  -3 1/4
- -\frac{11}{4}  3\frac14  -2.75
# words
= 12
+ 12 \text{ apples}  12 \text{ feet}  12 \text{ people}  12 cm  12\text{ in all}  12 \text{ each}  12 \text{ ways}
- 12 \text{ at least}  12 \text{ or fewer}  12'  12^{\prime}  12''  12 \text{ negative}  12 \text{ approximately}
- 12 \text{ thousand}  12 \text{ mod } 7  \text{at most } 12  \text{about } 12  12!  12i  12\text{i}  \text{not } 12
- \text{more than } 12  > 12  \neq 12  12 \text{ squared}  12 or 13  12 \text{ wrong}
# equations
= 9
+ y = 9  9 = y  \text{Total} = 9  \text{Sum: } 9  AB = 9  \angle Q = 9^\circ  a_5 = 9  f(2) = 9  \overline{PQ} = 9
+ m+n = 9  x = \sqrt{81} = 9  \text{The answer is } 9  the answer is 9  x = 9.0  S_{ABC} = 9  \alpha = 9  P(3) = 9
+ |AB| = 9  \text{Maximum value} = 9  Answer: 9  \frac{a}{b} = 9  9 = 9  N=9 \text{ units}
- y^2 = 9  3y = 9  8 = 9  9 = 8  \sqrt{y} = 9  y = 9z  y + 1 = 9  \frac{y}{2} = 9  \log_2 y = 9  2^y = 9  y > 9
- y \le 9  y = 9, z = 1  f(9) = 8  |y| = 9  -y = 9  \text{Maximum: } 8  10 = 9 = 9  y! = 9  1/y = 9  \text{not } y = 9
# unevaluated
= 45
+ 45  \sqrt{2025}  \frac{90}{2}  90/2  4.5 \times 10^1  4.5\cdot10^{1}  x = 45  \binom{10}{2}  5 \cdot 9 = 45
- 5 \cdot 9  5*9  9 \times 5  5×9  40+5  50 - 5  6\cdot 7 + 3  \frac{80+10}{2}  5(4+5)  2^5+13  45+0  45-0  45*1
- 40+6 = 45  6 \times 7 = 45  90 \div 2  90÷2  \sqrt{2000+25}  x = 5 \cdot 9  5·9  (5)(9)  45 + \frac{0}{3}
- 5 * 9 apples
= 512
+ 2^9  8^3  512  512.0
- 2^4 \cdot 2^5  2^{10-1}  500+12  2^{10} - 2^9
= -6
+ -6  x=-6  -\sqrt{36}  −6  -12/2
- 4-10  -3-3  -2\cdot 3  2 - 8  -(2+4)
= 0.25
+ \frac14  2^{-2}  1/4  25\%  \frac{1}{4}
- 0.5 \cdot 0.5  1 - 0.75  \frac{1}{2} \times \frac{1}{2}  \frac{1}{2}-\frac{1}{4}
= 2^{12}
+ 4096  4^6  2^{10} \cdot 2^2
- 4095
= 3+\sqrt{5}
+ \sqrt5+3  \sqrt{5} + 3
- 3-\sqrt5  3
= x+3
+ 3+x  x + 1 + 2
- x-3
# units after letters
= 9\pi
+ 9\pi \text{ cm}  9\pi \text{ square meters}  9\pi \mathrm{~ft}  9\pi cm  9pi  9 \pi \text{ units}^2  9π
+ 9\pi\text{ inches}
- 9  9\pi^2  9\pi \text{ x}  9\pi \text{ squared}  9\pi r  8\pi \text{ cm}
= 16\pi \text{ cubic feet}
+ 16\pi  16\pi \text{ ft}^3
- 16  4\pi
= 4y
+ 4y \text{ dollars}  4y\text{ cm}  4 y
- 4  4y \text{ squared}  4y \text{ z}
= 60 \mathrm{~km} / \mathrm{h}
+ 60  60 \text{ km/h}  60 \frac{\text{km}}{\text{h}}
- 6  60h
# recurring
= \frac{4}{11}
+ 0.\overline{36}  0.\bar{36}
- 0.36  0.3\overline{6}  0.37
= 0.\overline{12}
+ \frac{4}{33}  \frac{12}{99}  0.\overline{12}
- 0.12  0.1\overline{2}
= \frac{13}{6}
+ 2.1\overline{6}  2.1\bar{6}  2.1\overline6
- 2.16  2.17  2.\overline{16}
= 0.4
+ 2/5  0.40
- 0.\overline{4}  0.444...  0.4\ldots
= -\frac{2}{3}
+ -0.\overline{6}  -0.\bar6
- 0.\overline{6}  -0.67
# roman
= 4\mathrm{e}
+ 4e  4\text{e}  e \cdot 4
- 4  e^4  4\pi
= 5-2\mathrm{i}
+ 5-2i  -2i+5  5-2\text{i}
- 5+2i  5-2  3
= \mathrm{e}^{-3}
+ e^{-3}  \frac{1}{e^3}  \frac{1}{\mathrm{e}^{3}}
- e^3  -3
# imaginary
= -i
+ \frac{1}{i}  e^{-i\pi/2}  i^3  e^{\frac{3\pi i}{2}}
- i  e^{i\pi/2}  -1
= 1+i
+ \sqrt{2}e^{i\pi/4}  i+1  \sqrt2\left(\cos\frac{\pi}{4}+i\sin\frac{\pi}{4}\right)
- 1-i  \sqrt2 e^{-i\pi/4}  1
# styling
= \frac{5}{8}
+ \boldsymbol{\frac{5}{8}}  \color{blue}{\frac58}  {\color{red}\frac{5}{8}}  \textbf{5/8}  **5/8**  \bm{\frac58}
+ \mathbf{\dfrac{5}{8}}  \textcolor{green}{\frac{5}{8}}  \large \frac58  {\bf \frac58}  `5/8`  \underline{\frac58}
+ \displaystyle\frac{5}{8}  $\frac58$  \(\frac58\)  \fbox{\frac58}
- \boldsymbol{\frac{8}{5}}  **8/5**  \color{blue}{\frac{5}{9}}
= 26
+ \boldsymbol{26}  \mathbf{26}  \color{red} 26  **26**  \textbf{26}  *26*  \underline{26}  \fbox{26}  {26}  \huge 26
+ 26 \checkmark  \therefore 26  \phantom{1}26  ２６  \left. 26 \right.
- **27**  \boldsymbol{2}  ２７  \underline{2}6\cdot 1
# unicode
= (-\infty,7)
+ (-∞,7)  (−∞, 7)  x<7  (-\infty, 7)
- (-∞,7]  (7,∞)  (-∞,∞)
= \frac{3}{4}
+ ¾  3/4
- ¼  4/3
= y^2-4
+ y²-4  y² − 4  (y-2)(y+2)
- y³-4  y²+4
= x \ne 5
+ x≠5  x \neq 5
- x=5  x≠6
= 2\pi r
+ 2πr  2π r
- 2πr²  π r
= 10^{-3}
+ 10⁻³  0.001
- 10³  10⁻²
= \sqrt{7}
+ √7  √(7)
- √17  7
# words for sets
= \emptyset
+ \varnothing  \{\}  ∅  \text{no solution}  \text{No solutions.}  no solution  \text{no real solutions}
- 0  \{0\}  \mathbb{R}  \text{one solution}
= \mathbb{R}
+ \text{all real numbers}  (-\infty,\infty)  ℝ  (-\infty,+\infty)  x \in \mathbb{R}  all real numbers
+ \text{All real numbers.}
- \mathbb{N}  \emptyset  (0,\infty)  \text{all integers}
= \text{no solution}
+ \text{no solution.}  \varnothing  No solution
- 0  \text{solution}  \text{a solution}
= \infty
+ +\infty  ∞  \text{infinity}
- -\infty  -\text{infinity}  0
# or
= 3 or -5
+ -5, 3  3 \text{ or } -5  x = 3 or x = -5  \{-5,3\}
- 3  3, 5  (3,-5)
# chains
= 0 < a \le 10
+ (0,10]  10 \ge a > 0  0<a<=10  0<a≤10
- (0,10)  [0,10]  10 > a \ge 0  0, 10  0 \le a < 10
= y>-2
+ -2<y  (-2,\infty)  y \in (-2, \infty)
- y<-2  y\ge-2  -2  z>-2  y>2
# percent
= 0.3
+ 30\%  0.30  3/10
- 0.3\%  30  3
= 64
+ 64\%  64 percent
- 0.64\%  0.64
# lists
= 2,4,8
+ 8, 2, 4  2, 4 \text{ and } 8  2, 4, and 8  \{8,4,2\}  2;4;8
- 2,4  2,4,9  2 < x < 8  (2,4)  248
# thousands
= 1,480,000
+ 1480000  1{,}480{,}000  1 480 000  1\,480\,000  1'480'000  1.48 \times 10^6  \$1,480,000
- 1,480  1, 480, 0  1.48  148000
# separators, labels and commands
= p=5,q=2;p=7,q=2
+ (5,2),(7,2)  p=7, q=2; p=5, q=2
- (2,5),(7,2)  5,2,7,2  p=5,q=2
= [2;6]
+ [2,6]  2 \leqslant x \leqslant 6
- (2,6)  2;6
= f(x)=3x-2
+ 3x-2  y = 3x-2  f(x) = -2+3x
- -2  3x+2  y=2x-3  f(x)=3x
= \frac{8}{3}
+ x = \frac{8}{3} \approx 2.67  \approx \frac83
- 2.67  \approx 2.67
= 321_4
+ (321)_4  321_{4}
- (321)_5  57
= (1,-4)
+ \langle 1,-4 \rangle  \left\langle 1, -4 \right\rangle  P(1,-4)  P = (1,-4)
- \langle -4, 1 \rangle  P(-4,1)
= |x|+1
+ \lvert x \rvert + 1  \mid x \mid + 1  1+\left|x\right|
- x+1
= \log_{10} 7
+ \lg 7
- \ln 7  7
= \{3, 5\}
+ \lbrace 3,5 \rbrace  3\quad\text{and}\quad 5
- \lbrace 3,6 \rbrace
"""


@pytest.mark.parametrize("kind", KINDS.strip("\n# ").split("\n# "), ids=lambda kind: kind.partition("\n")[0])
def test_kinds(kind):
    cases, gold = [], ""  # (gold, answer, reward)
    for line in kind.split("\n")[1:]:
        mark, answers = line[0], line[2:]
        gold = answers if mark == "=" else gold
        cases += [(gold, answer, float(mark == "+")) for answer in answers.split("  ") if mark in "+-"]
    got = rewards.grade([boxed(answer) for _, answer, _ in cases], [gold for gold, *_ in cases])
    assert [case for case, reward in zip(cases, got) if case[2] != reward] == []
    assert len(cases) > 5


def test_the_table_of_the_docstring():
    rows = [line for line in rewards.__doc__.split("\n") if line[17:].startswith("\\boxed")][1:]  # the first: no boxes
    for row in rows:
        gold, accepted, rejected = row[:17].strip(), row[17:65].strip().split("  "), row[65:].strip().split("  ")
        answers = [answer for answer in accepted + rejected if answer]
        got = rewards.grade(answers, [gold] * len(answers))
        assert dict(zip(answers, got)) == {answer: float(answer in accepted) for answer in answers}, gold
    assert len(rows) > 12


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


def test_every_rule_has_an_example():
    # each has an example that it changes
    answers = [line[2:] for line in KINDS.split("\n") if line]
    answers = [a for line in answers for a in line.split("  ")] + [
        a for gold, *some in CASES.values() for a in [gold, *some[0], *some[1]]
    ]
    for rule in notation.RULES:
        others = [other for other in notation.RULES if other is not rule]
        assert any(apply(notation.RULES, a) != apply(others, a) for a in answers), rule[0].pattern


def apply(rules, answer):
    answer = answer.translate(notation.CHARACTERS)
    for pattern, replacement in rules:
        answer = pattern.sub(replacement, answer).strip()
    return answer


def test_gold_and_answer_are_not_exchanged():
    assert rewards.equal(answer="8+x+2 = 10+x", gold="10+x")  # an answer may show its steps, a gold is itself
    assert not rewards.equal(answer="10+x", gold="8+2x = 10+x")


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
