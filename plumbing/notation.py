r"""
Notation: an answer as Math-Verify reads it. Tables of characters, commands and patterns; rewards.py compares.

"\$32,\!348 " -> "32,348"    "4.5e33" -> "4.5 \times 10^{33}"    "9 \text{ cm}^2" -> "9"    "\mathbf{½}" -> "\frac12"
"5 1/2" -> "5\frac{1}{2}"    "0.8\overline{3}" -> "\frac{75}{90}"    "\sin 20^\circ" -> "\sin (\frac{20 \pi}{180})"
"""

import re
from fractions import Fraction
from functools import lru_cache

CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2013\u2010\u2011", "-")  # the minus signs of typography
    | dict.fromkeys("\u200b\u200c\u200d\ufeff", "")
    | dict.fromkeys("°º", r"^\circ ")
    | {chr(i + 0xFEE0): chr(i) for i in range(33, 127)}  # full width
    | {"ℝ": r"\mathbb{R}", "…": r"\ldots ", "\u2009": r"\,", "\u202f": r"\,"}
    | {c: rf"\{name} " for c, name in zip("∞∪∩∈∅×·⋅÷±≤≥≠≈πθ∠", """infty cup cap in emptyset times cdot cdot div pm le ge
        ne approx pi theta angle""".split())}
    | {c: rf"\frac{n}" for c, n in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "12 13 23 14 34 15 25 35 45 16 56 18 38 58 78".split())}
)  # fmt: skip
POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
COMMANDS = {  # name: what stands for it
    name: same
    for same, names in (
        ("", "left right big bigg Big Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle tiny small large"),
        ("", "Large LARGE huge Huge boldsymbol bm pmb bf rm ensuremath underline checkmark therefore"),
        (r"\text", "mathrm mathbf mathit mathsf mathtt mbox operatorname"),
        (r"\text", "textrm textbf textit textsf texttt textnormal"),
        (r"\le", "leq leqslant leqq"),
        (r"\ge", "geq geqslant geqq"),
        (r"\frac", "dfrac tfrac cfrac"),
        (r"\binom", "dbinom tbinom"),
        ("|", "mid lvert rvert vert"),
        (" ", "quad qquad"),
    )
    for name in names.split()
} | dict(lt="<", gt=">", langle="(", rangle=")", lbrace=r"\{", rbrace=r"\}", degree=r"^\circ", textminus="-") | dict(
    thinspace=r"\,", lg=r"\log_{10}", R=r"\mathbb{R}", varnothing=r"\emptyset"
)  # fmt: skip

UNIT = r"[a-z]{4,}|[ckm]m|k?g|m[lgi]|ft|in|lbs?|oz|hrs?|min|sec|mph|days?|yen|rad"  # not m, s, t, h: variables, too
QUANTITY = rf"(?i)^\\text *\{{ *([-+]?[\d.,:/ ]*\d)((?: [a-z]|[ap]\.?m|{UNIT})(?:[^{{}}\d+<=>\\-]|\^-?\d)*)\}}(?=\^|$)"
VALUE = (  # what changes the value: 2 \text{ million}, 5 \text{ squared}, 3 \text{ x}, \text{2 out of three}
    r"(?:(?i:(?<![a-z\\])(?:one|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|[a-z]*illion|half"
    r"|halves|thirds|fourths|fifths|tenths|plus|minus|(?:times|over)(?= \w)|divided|than|out|above|most|least|negative"
    r"|mod|modulo|not|wrong|about|approximately|roughly|nearly|almost"
    r"|below|factorial|root|sqrt|noon|midnight|twice|double)s?(?![a-z-])|(?<=\d |\{ |.\{)(?:of|or|and|squared|cubed)\b)"
    r"|\\pi|√|(?<![a-zA-Z])(?<![a-zA-Z]\.)(?:[b-fijknp-rt-w]|[x-z]+|[EIQXYZ]|a(?=[. ]*\}))(?!\.?[a-zA-Z]))"
)
UNITS = rf"\\text *\{{(?![^{{}}]*{VALUE})(?:[^{{}}\d]|\^-?\d)*\}}"  # other words; m, s, h, g, l, N, J, ... are units
AFTER = r"(?:(?<=[\d}})])|(?<=\d[a-zA-Z])|(?<=\\pi)|(?<=\\pi ))"  # a unit follows a number: 9, x^{2}, 2x, \pi
TH = r" *(?:(?:st|nd|rd|th)|\\text *\{ *(?:st|nd|rd|th) *\})"
TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])"
DEGREES = r"\^ *(?:\\circ(?![a-zA-Z])|\{ *\\circ *\}) ?"
NOT = r"(?![^{}]*\b(?:not|no|about|between|negative|minus)\b)"


def whole(words: str) -> str:
    """A pattern for an answer that is one of these words, in text or not."""
    return rf"(?i)^(?:\\text *\{{)? *(?:{words}) *\}}?$"


def recurring(match: re.Match) -> str:
    r"""0.8\overline{3} as a fraction: (83 - 8) / 90."""
    fixed, period = match[1] + match[2], match[3] or match[4]
    return rf"\frac{{{int(fixed + period) - int(fixed or 0)}}}{{{10 ** len(match[2] + period) - 10 ** len(match[2])}}}"


RULES = [  # (pattern, replacement), in order, on answer and gold alike
    # characters and commands that mean the same
    (r"\\\\(?=[a-zA-Z])(?![\s\S]*end\{)", r"\\"),  # doubled escapes, \\frac; in a matrix \\ ends a row
    (r"\\(?:text)?color *\{[^{}]*\}|\\[hv]?phantom *\{[^{}]*\}|\\(?:left|right) *\.(?!\d)", ""),
    (r"(?<!\\)\\([a-zA-Z]+)", lambda m: COMMANDS.get(m[1], m[0])),
    (r"(?<=\d)(?:(?:(?:, ?)?\\!|\\[, ]|')\s*|\{,\})+(?=\d{3}(?!\d))", ""),  # thousands: 6\,250  11,\! 111  1{,}000
    (r"\s+|(?<!\\)\\[,;:! ]|~", " "),
    (r"[⁰¹²³⁴-⁹⁺⁻]+", lambda m: f"^{{{m[0].translate(POWERS)}}}"),
    (r"(?:√|(?<![\\a-z])sqrt) *(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}"),
    (r"\\?\$|\bUSD\b|(?<!\\)\\[()[\]]", ""),  # money \$36; delimiters of $69$,$84$: deleting only $ would leave \36
    (r"^ *([*_`]{1,3})(.+?)\1 *$", r"\2"),  # Markdown: **7**
    (r"\\begin\{(cases|aligned)\}([^<>]*=[^<>]*)\\end\{\1\}", lambda m: m[2].replace("&", "").replace(r"\\", ",")),
    (r"(?<=\d) (?=\d{3}(?![\d/]))", ""),  # 1 250 000
    (r"(,.*?) *;", r"\1 \\text{ or }"),  # x=1, y=2; x=3, y=4
    (r" *;", ","),
    (r"^\](.*,.*)\[$|^[A-Z] ?\(([^()]*,[^()]*)\)$", r"(\1\2)"),  # ]0,1[, P(2,7)
    # names, words and fonts
    (r"\\text *(?=\{ *[-+]?(?:\d[\d.,/ ]*\}|\\(?:frac|sqrt|infty)))", ""),  # \textbf{3/4}
    (r"\\text *\{([-+/:. ]+)\}", r"\1"),
    (r"\\text *\{ *([ei]) *\}", r" \1 "),  # \mathrm{e}
    (r"(?<![\\a-zA-Z])(arc(?:sin|cos|tan)|sin|cos|tan|ln|log|exp|pi)(?![a-zA-Z])", r"\\\1 "),  # pi/6, arcsin(1/2)
    (r"\\text *\{ *(\\(?:sin|cos|tan|ln|log|pi) ) *\}|(?:np|numpy|math)\.(?=[\\a-z])", r"\1"),
    (r"(?<!frac\d)(?<=\d)i(?![a-zA-Z])", " i"),  # Math-Verify looks for a free-standing i: 2i+1 would be real
    (r"\\gamma(?![a-zA-Z])", r"\\kappa_{g}"),  # the variable, not Euler's constant or the gamma function
    (r"(?<=[a-z])[.!] *\}$", "}"),
    (whole(r"no (?:real |integer )?solutions?|none|(?:the )?empty set|\\\{ *\\"), r"\\emptyset"),  # \{ \}, too
    (whole(r"all real(?: number)?s?|\( *- *\\infty *, *\+? *\\infty *\)"), r"\\mathbb{R}"),
    (whole(r"infinity"), r"\\infty"),
    (rf"(?i)(^|, ?)(?:\\text *\{{{NOT}([^{{}}]+?)(?::| is| are) *\}} *(?=\S)|([a-z]{{3,}}) ?:)", r"\1\\text{\2\3} = "),
    (r"(?i)^((?:the )?(?:final |correct )?(?:answer|result|solution)) is:? *", r"\\text{\1} = "),
    (r"(?<![a-zA-Z])f\(x\) *(?==)", "y "),
    (r"^ *(?:\\approx|\\Rightarrow|\\implies|=) *|(?<=\S) *\\approx.*", ""),  # 1/3 \approx 0.33
    # numbers
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot) *(?:\{(\d+)\}|(\d))", recurring),
    (r"(?<![\d.^_])(\d+) (\d+) ?/ ?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 5 1/2
    (r"(?<![\d.^_])(\d+) ?\( ?(\\frac *(?:\d\d|\{\d+\} *\{\d+\})|\d+ ?/ ?\d+) ?\)", r"\1 \\cdot (\2)"),  # no 5 1/2
    (r"(?<![\w}^])\((\d+)\) ?(?=\(|\\frac)", r"\1 \\cdot "),
    (r"\((\d+)\)(?=_)", r"\1"),  # (101)_2
    (r"^ *\{(?!.*\\(?:choose|over))((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\} *$", r"\1"),  # {7}
    (r"(?<=\d)\.(?![\d.])", ""),  # -1./3: a decimal point has a digit after it
    (r"(?<![.\\]) *[.,;]$", ""),  # the end of the sentence is not part of the answer
    (r"(?<![\w.])(\d(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),  # 4.5e33; Math-Verify: 4.5*E*33
    # units, at the end
    (rf"({TRIG}[^,=]*?)(?<![\d.])(\d[\d.]*|[a-zA-Z])(\)?) *{DEGREES}", r"\1(\\frac{\2 \\pi}{180})\3"),  # \sin 20^\circ
    (DEGREES, ""),
    (QUANTITY, r"\1\\text{\2}"),  # \text{3 m} is 3\text{ m}; \text{3 of 4}, \text{3 - x} and \text{3x} stay
    (r"\\frac *\{ *(\\text *\{[^{}\d]*\}) *\} *\{ *(\\text *\{[^{}\d]*\}) *\}$", r"\1/\2"),  # km over h
    (r" *(?:\\text *\{ *)?(?:percent|pct) *\}?$", r"\\%"),
    (rf"(?<=\d)(?:\^\{{{TH} *\}}|{TH})(?![a-zA-Z])", ""),  # 15th, 12^{\text{th}}
    (r"(?i)(?<=\d) *(?:\\text *\{)? *([ap])\.? *m\.? *\}?$", r" \1m"),  # 4:30 \text{ p.m.}; a.m. is another time
    (rf"{AFTER}(?:(?: |/|\\cdot)*{UNITS}(?:\^\{{?-?\d\}}?)?)+$", ""),  # 9 \text{ cm}^2, 5 \text{ m}/\text{s}
    (rf"(?:(?<=\d)|(?<=\\pi)|(?<=\\pi )) *(?!{VALUE})(?i:{UNIT})(?:\^\{{?\d\}}?)?$", ""),  # 5 cents
    (r"^\\\{ *[a-z] *[|:](.*)\\\}$", r"\1"),  # {x | -1 < x < 1} is its condition
]
RULES = [(re.compile(pattern), replacement) for pattern, replacement in RULES]


@lru_cache(10_000)
def normalise(answer: str) -> str:
    r"""Rewrite what Math-Verify misreads: "\$32,\!348 " -> "32,348", "4.5e33" -> "4.5 \times 10^{33}"."""
    if re.fullmatch(r"-?\d+", answer):
        return answer
    answer = answer.translate(CHARACTERS)
    for pattern, replacement in RULES:
        answer = pattern.sub(replacement, answer).strip()
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


# ---------------------------------------------------------------------------------------------------------- take apart

AND, OR = (  # 1 \text{ and } 2, 1 or 2
    rf"[, ]*(?:\\text *\{{[, ]*{word}[, ]*\}}|(?<=[\d)}}\],] ){word}(?= [-\d(\\\[a-zA-Z]))"
    for word in ("(?:and|or)", "or")
)
TUPLE = r"\(((?:[^()]|\([^()]*\))*)\)"  # one pair of parentheses around all: (1,(2,3)), not (1,2),(3,4)
NAME = re.compile(  # of a value, x_1, f(3), AB, \angle B, \text{Area}; what is asked for, m+n, \frac{a}{b}: no number
    r"(?![-+/])(?:[a-zA-Z'+\-/{} ]|_(?:\w|\{[^{}]*\})|\^(?:\*|\{\*\})|(?<=[a-zA-Z}])\([^()]*\)|\|[A-Z]+\|"
    rf"|\\text *\{{{NOT}[^{{}}]*\}}|\\(?!text|sqrt|pi(?![a-z])|infty|log|ln|exp|pm)[a-zA-Z]+(?![a-zA-Z]))+"
)
NAMES = re.compile(r"\((?:\\?[a-zA-Z]+(?:_\{?\w\}?)?[, ]*)+\)")  # (x, y)
RANGE = re.compile(  # x < 3, (1,2) \cup (3,4), x \in (1,2), (-\infty,1]
    r"[<>]|\\setminus|\\[lg]e(?![a-z])|[)\]] *\\cup|\\cup *[(\[]|\\in *[(\[]|[(\[] *-? *\\infty|\\infty *[)\]]"
)


def split(answer: str, at: str) -> list[str]:
    """The parts between the separators that stand outside of all brackets: "1,(2,3)" -> ["1", "(2,3)"]."""
    depth, parts = 0, ""
    for c in answer:
        depth += (c in "([{") - (c in ")]}")
        parts += "\n" if c == at and depth <= 0 else c  # no answer has a \n of its own: see RULES
    return [part.strip() for part in parts.split("\n")]


def elements(answer: str) -> list[str]:
    r"""The members of a list, tuple or set: "1,(2,3)", "(1,(2,3))", "\{1,(2,3)\}" -> ["1", "(2,3)"]."""
    while (inner := re.sub(rf"^(?:{TUPLE}|\\\{{(.*)\\\}})$", r"\1\2", answer)) != answer:
        answer = inner
    return split(answer, ",")


def unlabel(answer: str) -> str:
    r"""Without names: "w = 16" -> "16", "5 = x" -> "5", "(a, b) = (2, 2)" -> "(2, 2)"; but "x^2 = 5" stays."""
    parts = split(answer, "=")
    return "=".join([part for part in parts if not (NAME.fullmatch(part) or NAMES.fullmatch(part))] or parts[-1:])


def named(answer: str) -> dict[str, str]:
    r"""The values of two or more different names: "y=3, x=2" or "(y,x)=(3,2)" -> {"y": "3", "x": "2"}; else {}."""
    pairs = [split(part, "=") for part in elements(answer)]
    if len(pairs) == 1 and len(pairs[0]) == 2 and NAMES.fullmatch(pairs[0][0]):
        pairs = list(zip(*map(elements, pairs[0])))
    if not all(len(pair) == 2 and NAME.fullmatch(pair[0]) for pair in pairs):
        return {}
    values = {name.replace(" ", "").lower(): value for name, value in pairs}
    return values if len(values) == len(pairs) > 1 else {}


def in_order(values: dict[str, str]) -> str:
    """The tuple of named values: of x and y in this order, of names that are no letters in the order they have."""
    names = sorted(values) if all(re.fullmatch(r"[a-z](?:_\{?\d\}?)?", name) for name in values) else values
    return f"({', '.join(values[name] for name in names)})"


def union(answer: str) -> str:
    r"""Inequalities as intervals: "5 > x \ge -1" -> "[-1, 5)", "x < 2 or x = 3" -> "(-\infty, 2) \cup \{3\}"."""
    parts = re.split(OR, answer)
    for i, part in enumerate(parts):
        terms = [term.strip() for term in re.split(r"(<|>|\\[lg]e(?![a-z]))", part)]
        if set(terms[1::2]) & {">", r"\ge"}:
            terms = [{">": "<", r"\ge": r"\le", "<": ">", r"\le": r"\ge"}.get(term, term) for term in reversed(terms)]
        if len(terms) == 3:
            terms = [r"-\infty", "<", *terms] if NAME.fullmatch(terms[0]) else [*terms, "<", r"\infty"]
        if len(terms) == 5 and NAME.fullmatch(terms[2]) and not set(terms[1::2]) & {">", r"\ge"}:
            parts[i] = f"{'[('[terms[1] == '<']}{terms[0]}, {terms[4]}{'])'[terms[3] == '<']}"
        elif len(parts) > 1 and "=" in part:
            parts[i] = rf"\{{{unlabel(part)}\}}"
    return r" \cup ".join(re.sub(r"^ *[a-zA-Z] *\\in(?![a-z])", "", part) for part in parts)
