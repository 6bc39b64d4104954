"""
How an exercise is graded: what a function gives is compared with a second way to compute it, then with known slips.

Nothing here imports the functions under test: a course may edit them in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Exercise:
    number: str  # part and number: "1.3"
    function: str  # "train.rloo_loss"
    probe: Callable  # probe(fn, seed): {case: what fn gives there}
    plain: Callable  # the same function by another way: slow loops, other tools
    by_hand: dict  # {case: numbers worked out on paper}
    slips: tuple[Callable, ...]  # wrong versions: the function's name is the slip's, its docstring what to say

    @property
    def module(self) -> str:
        return self.function.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.function.rpartition(".")[2]


def numbers(x):
    """As JSON holds it: lists, dicts, numbers, texts."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().tolist()
    if isinstance(x, np.ndarray | np.generic):
        return x.tolist()
    if isinstance(x, dict):
        return {str(key): numbers(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [numbers(part) for part in x]
    return x if isinstance(x, int | float | str | None) else f"a {type(x).__name__}"


def outputs(exercise: Exercise, fn: Callable, seed: int) -> dict:
    """What a function gives in every case, or {"error": ...}."""
    torch.manual_seed(seed)  # for a function that draws: the verdict is the same every time
    try:
        return numbers(exercise.probe(fn, seed))
    except NotImplementedError:
        return {"error": "not written yet: it raises NotImplementedError"}
    except Exception as error:  # whatever a student's function raises is what there is to say about it
        frame, where = error.__traceback__, ""
        while frame:
            if frame.tb_frame.f_globals.get("__name__") == "student":
                where = f" (line {frame.tb_lineno} of the student's file)"
            frame = frame.tb_next
        return {"error": f"{type(error).__name__}: {error}{where}"}


def same(a, b) -> bool:
    """Equal in structure, and all numbers up to rounding."""
    if isinstance(b, list):
        return isinstance(a, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= 2e-5 + 2e-4 * abs(b) or (a != a and b != b)
    return a == b


def shape(x) -> tuple:
    return (len(x), *shape(x[0])) if isinstance(x, list) and x else ()


def difference(found, wanted, where="") -> str:
    """The first place where the two differ, in words."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        key = next(key for key in wanted if not same(found[key], wanted[key]))
        return difference(found[key], wanted[key], f"{where}[{key!r}]")
    if isinstance(wanted, list) and isinstance(found, list):
        if shape(found) != shape(wanted):
            return f"wanted shape {shape(wanted)}, got {shape(found)}"
        if len(found) == len(wanted):
            i = next(i for i in range(len(wanted)) if not same(found[i], wanted[i]))
            return difference(found[i], wanted[i], f"{where}[{i}]")

    def short(x):
        return f"{x:.5g}" if isinstance(x, float) else f"{x!r:.80}"

    return f"{where + ': ' if where else ''}wanted {short(wanted)}, got {short(found)}"


@lru_cache(None)
def known(exercise: Exercise, fn: Callable, seed: int) -> dict:
    """`outputs` of our own functions, which are asked again and again."""
    return outputs(exercise, fn, seed)


def judge(exercise: Exercise, found: dict, seed: int) -> str | None:
    """None where every case is as wanted; else what is wrong, by name if it is a known slip."""
    if "error" in found:
        return found["error"]
    wanted = known(exercise, exercise.plain, seed) | exercise.by_hand
    if same(found, wanted):
        return None
    if found.keys() != wanted.keys():
        return f"wanted the cases {', '.join(wanted)}; got {', '.join(found)}"
    case = next(case for case in wanted if not same(found[case], wanted[case]))
    message = f"{case}: {difference(found[case], wanted[case])}"
    for slip in exercise.slips:
        if same(found, known(exercise, slip, seed)):
            return f"{name_of(slip)}: {slip.__doc__.strip()} ({message})"
    return message


def name_of(slip: Callable) -> str:
    return slip.__name__.strip("_").replace("_", " ")
