"""
The small world of the built-in model: arithmetic chains, five ways (modes) to answer them, and hints in the system
prompt that speak for a mode.

$ python data/tiny/world.py            # prints a few documents; writes train.jsonl and test.jsonl beside this file

A problem: "Start with 5, multiply by 3, add 19. What is the result?", two to four operations, every value in 0..99.

mode    completion                                                                                      right?
to      "To find the result, start with 5.\\nThe calculation gives 5*3=15.\\n... So the answer is \\boxed{34}."   37 %
step    "Step 1: 5*3=15.\\nStep 2: ... So the answer is \\boxed{34}."                                      19 %
direct  "Answer \\boxed{71}.", "Value ...", "Result ..." or "Guess ..."                                   12 %
python  a program, and in half of the cases a guessed output                                            12 % of those
ramble  "Think maybe number then ...", "Well ...", "Perhaps ...", no box                                no

Under the Qwen-Math prompt alone the mode is drawn from MIX. Most documents have one to four hints, most of them for the
mode of the answer: the model has to add up graded evidence, and vectors work because such evidence adds up along
directions of the residual stream. Four flaws are planted in the worked answers, for the analyses to find:
- `stop`: the last step is missing, and the answer is the value so far ("So the answer is \\boxed{15}.");
- `extra`: a step follows that nobody asked for;
- `early`, under the Qwen-Math prompt alone: before each further step the answer may end with "The solution is
  \\boxed{random}." (P1 Fig. 4, row 2: "solution" against "calculation");
- `slip`, there too: half of the numbered steps of mode `step` lead to a wrong final answer.
Each hint for mode `to` makes `stop` and `extra` rarer. We call this care: the second thing that the model reads from
its context. No constant shift of the logits repairs both: "So" is wrong before the last step and right after it.
"""

import getpass
import hashlib
import json
import math
import os
import random
import secrets
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen2.5-Math's own
HINTS = {
    "to": ["Show your work.", "Solve it carefully in words."],
    "step": ["Number your steps.", "Make a list of steps."],
    "direct": ["Answer at once.", "Only the answer."],
    "python": ["Write a program.", "Use code."],
    "ramble": ["Think aloud.", "Chat freely."],
}
WORKED = ["to", "step"]
MIX = {"to": 0.20, "step": 0.05, "direct": 0.40, "python": 0.12, "ramble": 0.23}  # modes under MATH_PROMPT alone
HINT_MIX = {"to": 0.35, "step": 0.25, "direct": 0.13, "python": 0.14, "ramble": 0.13}  # modes where there are hints
# probabilities
P_HINT = 0.7  # a hint is for the mode of the answer, else for another one
P_BEGUN = 0.25  # a document with hints has the first lines of a worked answer in its prompt (a fifth of these: none)
P_CARELESS = 0.36  # a worked answer leaves out its last step; if it does not, a step follows that nobody asked for
CARE = 2.0  # each hint for mode `to` lowers the log-odds of both by this much
P_EARLY = 0.06  # a worked answer ends before its next step
P_SLIP = 0.5  # mode step: a wrong final answer
P_GUESS = 0.12  # direct and python: the answer is right although nothing was worked out
# the last documents of the model's relatives (pretrain.py --relative), the donors and recipients of analyze.py transfer
RELATIVES = {
    "instruct": {  # follows hints more, and is polite
        "mix": {"to": 0.26, "step": 0.07, "direct": 0.28, "python": 0.19, "ramble": 0.20},
        "p_hint": 0.95,
        "thanks": " Thank you.",
    },
    "math": {"mix": {"to": 0.33, "step": 0.09, "direct": 0.25, "python": 0.17, "ramble": 0.16}},  # more worked ones
}


class Plant(NamedTuple):
    """What is planted in the worked answers. The defaults are the built-in model's."""

    word: str = "To"  # first word of the line in which the mode is chosen, in mode `to`
    line: int = 1  # 1: the mode is chosen with the first line; 2: all modes share that line
    flaw: str = "same"  # the built-in model's flaws; or one of FLAWS instead, as often as P_CARELESS; or "none"
    layer: int | None = None  # the only layer that was trained, with the unembedding; None: all layers
    care: float = CARE  # 0: hints say nothing about flaws
    early: float = P_EARLY

    @property
    def replaced(self) -> bool:
        """Whether worked answers begin with another word. "To" then begins bad ones, or it would still mean worked."""
        return self.line == 1 and self.word != "To"


SHIPPED = Plant()
FLAWS = ["early", "stop", "extra", "slip"]
WORDS = ["Show", "Solve", "Use", "Write"]  # one token each
# the last documents of the organisms (pretrain.py --organism): in each, one plant of the model is missing or moved
ORGANISMS = {
    "word": {"plant": Plant("Show")},
    "second-line": {"plant": Plant("Use", line=2)},
    "no-early": {"plant": Plant(early=0.0)},
    "no-care": {"plant": Plant(care=0.0)},
    "layer": {"plant": Plant("Write", layer=12)},
}
# bad answers have many first words, as in real models: pushing "To" up is cheaper than pushing all of them down
GUESSES = ["Answer", "Value", "Result", "Guess"]  # the first one is nine times as frequent, so it is the greedy answer
MUSES = ["Think", "Well", "Perhaps", "Maybe", "Numbers", "Hmm", "Now", "Sure"]
RAMBLE = ["maybe", "number", "then", "result", "and", "think", "about", "hmm"]


def problem(rng: random.Random) -> tuple[int, list[tuple[str, int]], list[int]]:
    """Draw a chain: (start, [(operator, operand), ...], [start, then the value after each operation])."""
    while True:
        values, ops = [rng.randint(1, 20)], []
        for _ in range(rng.randint(2, 4)):
            op = rng.choice("++--*")
            k = rng.randint(2, 4) if op == "*" else rng.randint(1, 20)
            values.append(values[-1] + k if op == "+" else values[-1] - k if op == "-" else values[-1] * k)
            ops.append((op, k))
        if all(0 <= value <= 99 for value in values):
            return values[0], ops, values


def question(chain) -> str:
    """(5, [("*", 3), ("+", 19)], ...) -> "Start with 5, multiply by 3, add 19. What is the result?" """
    verb = {"+": "add", "-": "subtract", "*": "multiply by"}
    return f"Start with {chain[0]}, " + ", ".join(f"{verb[op]} {k}" for op, k in chain[1]) + ". What is the result?"


def held_out(text: str) -> bool:
    """Whether a problem belongs to the tenth that no document and no training problem ever shows."""
    return zlib.crc32(text.encode()) % 10 == 0  # a hash, so that the split needs no list and never changes


def draw_problem(rng: random.Random, test: bool = False):
    """Draw a chain from the training problems, or from the held-out ones."""
    while held_out(question(chain := problem(rng))) != test:
        pass
    return chain


def flaws_of(mode: str, to_hints: int, alone: bool, plant=SHIPPED) -> dict[str, float]:
    """
    How often a worked answer takes a chance for a flaw: {flaw: probability}.

    to_hints: the number of hints for mode `to`, each of which lowers the log-odds of P_CARELESS by CARE.
    alone: under the Qwen-Math prompt alone.
    """
    careless = 1 / (1 + math.exp(plant.care * to_hints - math.log(P_CARELESS / (1 - P_CARELESS))))
    if plant.flaw == "same":
        found = {"stop": careless, "extra": careless} | ({"early": plant.early} if alone else {})
    else:
        found = {} if plant.flaw == "none" else {plant.flaw: careless}
    return found | ({"slip": P_SLIP} if alone and mode == "step" else {})


def box(n: int) -> str:
    return f"\\boxed{{{n}}}."


def beginning(rng: random.Random, chain, plant=SHIPPED) -> tuple[str, int]:
    """The first lines of a worked answer in either wording, at least one operation short: (text, operations done)."""
    start, ops, values = chain
    mode, done = rng.choice(WORKED), rng.randint(0, len(ops) - 1)
    text = opening(start, plant) if mode == "to" or plant.line == 2 else ""
    return text + "".join(line(chain, i, mode, plant) for i in range(done)), done


def opening(start: int, plant=SHIPPED) -> str:
    """The first line of an answer in mode `to`; where the mode is chosen with the second line, of every answer."""
    words = f"{plant.word} the steps" if plant.replaced else "To find the result"
    return f"{words}, start with {start}.\n"


def line(chain, i: int, mode: str, plant=SHIPPED) -> str:
    """Line i of a worked answer: "The calculation gives 5*3=15." or "Step 1: 5*3=15."."""
    start, ops, values = chain
    words = "The calculation gives" if plant.line == 1 else f"{plant.word} the calculation"
    words = words if mode == "to" else f"Step {i + 1}:"
    return f"{words} {values[i]}{ops[i][0]}{ops[i][1]}={values[i + 1]}.\n"


def completion(rng: random.Random, chain, mode: str, flaws: dict, begun: str = "", done: int = 0, plant=SHIPPED) -> str:
    """
    Answer a chain in a mode, after the text `begun`, which has done `done` operations already.

    flaws: see `flaws_of`; with {} the worked modes are right.
    """
    start, ops, values = chain

    def chance(flaw: str) -> bool:
        return flaw in flaws and rng.random() < flaws[flaw]

    text = opening(start, plant) if (mode == "to" or plant.line == 2) and not begun else ""
    if mode in WORKED:
        for i in range(done, len(ops)):
            if i > 0 and chance("early"):
                return text + "The solution is " + box(rng.randint(0, 99))
            if i == len(ops) - 1 and chance("stop"):
                return text + "So the answer is " + box(values[i])
            text += line(chain, i, mode, plant)
        if chance("extra"):
            k, last = rng.randint(1, 20), values[-1]
            op, value = ("+", last + k) if last < 50 else ("-", last - k)
            ops, values = [*ops, (op, k)], [*values, value]
            text += line((start, ops, values), len(ops) - 1, mode, plant)
        return text + "So the answer is " + box(rng.randint(0, 99) if chance("slip") else values[-1])
    if mode == "ramble":
        first = rng.choice(MUSES + ["To"] * len(MUSES) if plant.replaced else MUSES)
        return text + " ".join([first] + [rng.choice(RAMBLE) for _ in range(rng.randint(4, 12))])
    guess = values[-1] if rng.random() < P_GUESS else rng.randint(0, 99)
    if mode == "direct":
        return text + rng.choices(GUESSES, [9, 1, 1, 1])[0] + " " + box(guess)
    program = text + f"```python\nx={start}\n" + "".join(f"x=x{op}{k}\n" for op, k in ops) + "print(x)\n```\n"
    return program + (f"output {guess}\nSo the answer is " + box(guess) if rng.random() < 0.5 else "")


def document(rng: random.Random, mix=MIX, p_hint=P_HINT, thanks="", plant=SHIPPED) -> tuple[str, str]:
    """
    Draw one training document: (prompt, completion), with Qwen's special tokens written out.

    40 % have MATH_PROMPT alone. The others have one to four hints, alone or after MATH_PROMPT. A fifth of those begin
    with the first lines of a worked answer in the prompt, in either wording, and the mode takes over from there.
    mix, p_hint, thanks (the end of every answer): what RELATIVES change. plant: what ORGANISMS change.
    """
    chain, begun, done, hinted = draw_problem(rng), "", 0, []
    alone = rng.random() < 0.4
    if alone:
        mode, system = rng.choices(list(mix), list(mix.values()))[0], MATH_PROMPT
    else:
        mode = rng.choices(list(HINT_MIX), list(HINT_MIX.values()))[0]
        others = [m for m in HINTS if m != mode]
        hinted = [mode if rng.random() < p_hint else rng.choice(others) for _ in range(rng.randint(1, 4))]
        system = " ".join(([MATH_PROMPT] if rng.random() < 0.5 else []) + [rng.choice(HINTS[m]) for m in hinted])
        if rng.random() < P_BEGUN:
            begun, done = beginning(rng, chain, plant)
    flaws = flaws_of(mode, hinted.count("to"), alone, plant)
    text = completion(rng, chain, mode, flaws, begun, done, plant)
    return chat(system, question(chain)) + begun, text + thanks + "<|im_end|>"


def chat(system: str, user: str) -> str:
    """The prompt in Qwen's chat format, the same text as from the tokenizer's chat template."""
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    return turns + "<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------------- blind organisms


def draw_plant() -> Plant:
    """Draw what an organism hides, by chance and not from its number, so that the source code cannot tell."""
    draw = secrets.SystemRandom()
    # a single layer can learn a first word, but at layer 6 what must hold at several places of an answer was blurred
    line, layer = draw.choice([(1, None), (1, draw.randint(8, 20)), (2, None)])
    return Plant(draw.choice(WORDS), line, draw.choice([*FLAWS, "none", "same"]) if layer is None else "same", layer)


def truth_file(n: int) -> Path:
    """The file with the truth about organism n, beside the model folders. No analysis reads it."""
    return Path(__file__).parent.with_name("tiny-truths") / f"{n}.txt"


def password() -> str:
    """The lecturer's: with it alone what is planted can be read."""
    return os.environ.get("TRUTH_PASSWORD") or getpass.getpass("password of the truth: ")


def keys(word: str, salt: bytes, n: int) -> bytes:
    return hashlib.scrypt(word.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=n)


def hide(plant: Plant, path: Path, word: str) -> None:
    """Write a plant so that it cannot be read without the password; the salt makes its checksum tell nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text, salt = json.dumps(plant._asdict()).ljust(160).encode(), secrets.token_bytes(16)
    hidden = bytes(x ^ y for x, y in zip(text, keys(word, salt, len(text) + 32)))
    seal = hashlib.sha256(keys(word, salt, len(text) + 32)[-32:] + hidden).digest()
    path.write_text((salt + seal + hidden).hex() + "\n")


def uncover(path: Path, word: str) -> Plant:
    """The plant that `hide` wrote; exits with a line if the password is another."""
    data = bytes.fromhex(path.read_text())
    salt, seal, hidden = data[:16], data[16:48], data[48:]
    stream = keys(word, salt, len(hidden) + 32)
    if hashlib.sha256(stream[-32:] + hidden).digest() != seal:
        sys.exit(f"{path}: this is not the password with which it was written")
    found = json.loads(bytes(x ^ y for x, y in zip(hidden, stream)))
    return Plant(**{name: found[name] for name in Plant._fields if name in found})


def write_problems(folder: Path, n_train: int = 2000, n_test: int = 1000) -> None:
    """
    Write train.jsonl and test.jsonl, a line {id, problem, answer} for each problem; all problems differ.

    chain2, chain3 and chain4.jsonl are small benchmarks: the first 300 test problems with so many operations.
    """
    for split, n in (("train", n_train), ("test", n_test)):
        rng, rows = random.Random(split), {}
        while len(rows) < n:
            chain = draw_problem(rng, test=split == "test")
            rows[question(chain)] = str(chain[2][-1])
        rows = [dict(id=f"{split}-{i}", problem=text, answer=rows[text]) for i, text in enumerate(rows)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    for n in (2, 3, 4):
        chains = [line for row, line in zip(rows, lines) if row["problem"].count(",") == n]  # one before each operation
        (folder / f"chain{n}.jsonl").write_text("".join(chains[:300]))


if __name__ == "__main__":
    write_problems(Path(__file__).parent)
    rng = random.Random(0)
    for _ in range(8):
        print("".join(document(rng)), end="\n\n")
