"""
How an exercise is graded: what a function gives is compared with a second way to compute it, then with known slips.

Nothing here imports the functions under test: a course may edit them in place. `outputs` runs in the student's process,
which knows no answers; `judge` runs in another one, which never runs the student's file.
"""

import copy
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from table import FUNCTIONS

INPUTS, KIND = "what its inputs are afterwards", "the kind of what it returns"  # cases of every exercise
UNCHANGED = "as they were"


@dataclass(frozen=True, eq=False)
class Exercise:
    number: str  # part and number: "1.3"
    probe: Callable  # probe(fn, seed): {case: what fn gives there}

    @property
    def module(self) -> str:
        return FUNCTIONS[self.number][0]

    @property
    def name(self) -> str:
        return FUNCTIONS[self.number][1]

    @property
    def ours(self) -> Callable:
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True, eq=False)
class Check:
    """What only the judge knows."""

    number: str
    plain: Callable  # the same function by another way: slow loops, other tools
    by_hand: dict  # {case: numbers worked out on paper}
    slips: tuple[Callable, ...]  # wrong versions: the function's name is the slip's, its docstring what to say


# --------------------------------------------------------------------------------------------- what a function gives


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


def about(x, within: float) -> dict:
    """A number that need not be met exactly, such as one that depends on random draws."""
    return {"about": numbers(x), "within": float(within)}


def kind(x) -> str:
    if isinstance(x, torch.Tensor | np.ndarray):
        what = "a tensor" if isinstance(x, torch.Tensor) else "an array"
        name = str(x.dtype).removeprefix("torch.")
        return f"{what} of {'bools' if 'bool' in name else 'integers' if 'int' in name else 'floats'}"
    if isinstance(x, torch.nn.Module):
        return "a module"
    if isinstance(x, list | tuple):
        parts = dict.fromkeys(map(kind, x)) if len(x) < 5 else [kind(x[0])]
        return f"a sequence of {', '.join(parts)}" if parts else "a sequence"
    if isinstance(x, dict):
        return "a dict"
    if isinstance(x, bool | int | float | np.generic):
        return "a number"
    if x is None or isinstance(x, str):
        return "None" if x is None else "a text"
    return "a context manager" if hasattr(x, "__enter__") else "an object"


def frozen(x):
    """A copy of an input, to see afterwards whether it was changed."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone(), x.requires_grad
    if isinstance(x, torch.nn.Module):
        hooks = {name: [len(m._forward_hooks), len(m._forward_pre_hooks)] for name, m in x.named_modules()}
        return {name: frozen(p) for name, p in x.state_dict(keep_vars=True).items()}, hooks, x.training
    if isinstance(x, dict):
        return {key: frozen(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [frozen(part) for part in x]
    if isinstance(getattr(x, "draws", None), np.ndarray):  # an Estimate
        return x.value, x.draws.copy()
    return copy.copy(x) if isinstance(x, np.ndarray | int | float | str) else None


def alike(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


class Watched:
    """A function whose inputs are compared at the end with what they were, and whose kinds of results are kept."""

    def __init__(self, fn: Callable, names: list[str]):
        self.fn, self.names, self.given, self.kinds = fn, names, {}, {}
        if hasattr(fn, "cache_clear"):
            self.cache_clear = fn.cache_clear

    def __call__(self, *args, **more):
        for name, x in (dict(zip(self.names, args)) | more).items():
            self.given.setdefault(id(x), (name, x, frozen(x)))  # as it was when it was given first
        found = self.fn(*args, **more)
        self.kinds[kind(found)] = None
        return found

    def inputs(self) -> str:
        for name, x, before in self.given.values():
            if not alike(before, frozen(x)):
                module = isinstance(x, torch.nn.Module)
                what = "has other weights or hooks than before" if module else "was changed"
                return f"{name} {what}; a function leaves its inputs as they were"
        return UNCHANGED


def outputs(exercise: Exercise, fn: Callable, seed: int, names: list[str] | None = None) -> dict:
    """What a function gives in every case, or {"error": ...}. names: of its arguments."""
    torch.manual_seed(seed)  # for a function that draws: the verdict is the same every time
    np.random.seed(seed)
    watched = Watched(fn, names or list(inspect.signature(inspect.unwrap(exercise.ours)).parameters))
    try:
        found = numbers(exercise.probe(watched, seed))
        return found | {KIND: ", or ".join(watched.kinds), INPUTS: watched.inputs()}
    except NotImplementedError as error:
        return {"error": f"not written yet: it raises NotImplementedError{f' ({error})' if str(error) else ''}"}
    except (Exception, SystemExit) as error:  # whatever a function raises is what there is to say about it
        frame, where = error.__traceback__, ""
        while frame:
            if frame.tb_frame.f_globals.get("__name__") == "student":
                where = f" (line {frame.tb_lineno} of the student's file)"
            frame = frame.tb_next
        also = "" if watched.inputs() == UNCHANGED else f". Besides, {watched.inputs()}"
        return {"error": f"{type(error).__name__}: {error}{where}"[:1000] + also}


# ------------------------------------------------------------------------------------------------------- the verdict


def same(a, b) -> bool:
    """a is what came, b what was wanted: equal in structure, and all numbers up to rounding."""
    if isinstance(b, list):
        return isinstance(a, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        if b.keys() == {"about", "within"}:
            near = isinstance(a, dict) and isinstance(a.get("about"), int | float)
            return near and abs(a["about"] - b["about"]) <= b["within"]
        return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or abs(a - b) <= 2e-5 + 2e-4 * abs(b) or (a != a and b != b)
    return a == b


def shape(x) -> tuple | None:
    """Of nested lists; None where they are ragged."""
    if not isinstance(x, list):
        return ()
    shapes = {shape(part) for part in x}
    return (len(x), *(shapes.pop() if shapes else ())) if len(shapes) < 2 and None not in shapes else None


def short(x) -> str:
    if isinstance(x, dict) and x.keys() == {"about", "within"}:
        return f"about {x['about']:.4g}"
    if isinstance(x, list) and len(f"{x!r}") > 60:
        first = next(iter(flat(x) or ["..."]))
        return f"{'x'.join(map(str, shape(x) or (len(x),)))} numbers, the first {first:.5g}" if flat(x) else "a list"
    return f"{x:.5g}" if isinstance(x, float) else x if isinstance(x, str) else f"{x!r:.80}"


def difference(found, wanted, where="") -> str:
    """The first place where the two differ, in words."""
    inside = isinstance(wanted, dict) and isinstance(found, dict) and "about" not in wanted
    if inside and wanted.keys() == found.keys():
        key = next(key for key in wanted if not same(found[key], wanted[key]))
        return difference(found[key], wanted[key], f"{where}[{key!r}]")
    if inside:
        keys = [", ".join(x) or "none" for x in (wanted, found)]
        return f"{where + ': ' if where else ''}wanted the keys {keys[0]}; got {keys[1]}"
    if isinstance(wanted, list) and isinstance(found, list):
        before = f"{where}: " if where else ""
        shapes = shape(wanted), shape(found)
        if None not in shapes and shapes[0] != shapes[1]:
            return f"{before}wanted shape {shapes[0]}, got {shapes[1]}"
        pairs = zip(found, wanted)
        i = next((i for i, pair in enumerate(pairs) if not same(*pair)), None)
        if len(found) == len(wanted):
            return difference(found[i], wanted[i], f"{where}[{i}]")
        lengths = f"{before}wanted {len(wanted)} entries, got {len(found)}"
        first = "" if i is None else f"; the first that differs: {difference(found[i], wanted[i], f'[{i}]')}"
        return lengths + first
    return f"{where + ': ' if where else ''}wanted {short(wanted)}, got {short(found)}"


def flat(x) -> list | None:
    """The numbers in nested lists and dicts, in order; None if there is anything else."""
    if isinstance(x, dict | list):
        parts = [flat(part) for part in (x.values() if isinstance(x, dict) else x)]
        return None if None in parts else [n for part in parts for n in part]
    return [float(x)] if isinstance(x, int | float) and not isinstance(x, bool) else None


def pattern(found, wanted) -> str:
    """What a wrong case has in common with the right one: a factor, an order, rows. "" if nothing is seen."""
    if isinstance(wanted, dict) and isinstance(found, dict) and wanted.keys() == found.keys():
        key = next(key for key in wanted if not same(found[key], wanted[key]))
        return pattern(found[key], wanted[key])
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found) == 2:
        return pattern(*next(pair for pair in zip(found, wanted) if not same(*pair)))  # one of two results
    rows = isinstance(found, list) and isinstance(wanted, list) and len(wanted) > 2 and 0 < len(found) <= len(wanted)
    if rows and isinstance(wanted[0], list) and same(found[0], wanted[0]):
        if not any(same(*pair) for pair in zip(found[1:], wanted[1:])):
            return f"Only the first of {len(wanted)} is right: does a loop end early, by a `return` inside it?"
    a, b = flat(found), flat(wanted)
    if a is None or b is None or not b or len(a) != len(b):
        return ""
    if shape(found) != shape(wanted):
        ragged = None in (shape(found), shape(wanted))
        return "The numbers are right, their shape is not" if a == b and not ragged else ""
    x, y = np.array(a), np.array(b)
    if np.isnan(x).any() or (np.isinf(x) & ~np.isinf(y)).any():
        return "Not a finite number: a division by 0, the logarithm of 0, or an exp that overflows"
    if not np.isfinite(y).all() or not (len(y) == 1 or leaves(wanted) > 2):
        return ""
    if not x.any():
        return "All numbers are 0" if len(y) > 1 else ""

    def close(p, q):
        return bool(np.all(np.abs(p - q) <= 2e-5 + 2e-4 * np.abs(q)))

    if np.all(np.abs(x - y) <= 0.01 * np.abs(y) + 1e-3):
        return "It is nearly right: is something rounded, in half precision, or left out?"
    with np.errstate(all="ignore"):
        likely = {"The sign is turned": -y, "This is 1 minus what is wanted": 1 - y, "It is upside down": 1 / y,
                  "This is in percent": 100 * y}  # fmt: skip
        if (np.abs(y) > 1e-3).sum() > 1 and np.ptp(y) > 0:
            factor, offset = (x @ y) / (y @ y), (x - y).mean()
            likely |= {
                "Numbers below 0 are cut off": y.clip(0), "The signs are gone": np.abs(y),
                "This is exp of what is wanted": np.exp(y), "This is the logarithm of what is wanted": np.log(y),
                "These are the squares of what is wanted": y**2, "The order is reversed": y[::-1],
                f"Every number is {factor:.4g} times what is wanted": factor * y,
                f"Every number is {abs(offset):.4g} too {'large' if offset > 0 else 'small'}": y + offset,
            }  # fmt: skip
    for words, other in likely.items():
        if np.isfinite(other).all() and close(x, other):
            return words
    return "These are the right numbers in another order" if len(y) > 2 and close(np.sort(x), np.sort(y)) else ""


@lru_cache(None)
def known(exercise: Exercise, fn: Callable, seed: int) -> dict:
    """`outputs` of our own functions, which are asked again and again."""
    return outputs(exercise, fn, seed)


def leaves(x) -> int:
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return sum(map(leaves, parts)) if isinstance(x, dict | list) else isinstance(x, float)


class Book:
    """The wanted outputs and those of the slips, computed when they are asked for."""

    def __init__(self, exercises: dict, checks: dict):
        self.exercises, self.checks = exercises, checks

    def wanted(self, number: str, seed: int) -> dict:
        return known(self.exercises[number], self.checks[number].plain, seed)

    def slips(self, number: str, seed: int):
        """(name, what to say, outputs) of each."""
        for slip in self.checks[number].slips:
            yield name_of(slip), " ".join(slip.__doc__.split()), known(self.exercises[number], slip, seed)


def judge(book, number: str, found: dict, seed: int) -> str | None:
    """None where every case is as wanted; else what is wrong, by name if it is a known slip."""
    found = {case: value for case, value in found.items() if case != "said"}
    if "error" in found:
        return found["error"]
    wanted = book.wanted(number, seed)
    if same(found, wanted):
        return None
    if found.keys() != wanted.keys():
        lacking, more = ([case for case in a if case not in b] for a, b in ((wanted, found), (found, wanted)))
        return f"there is no {lacking[0]!r}" if lacking else f"nothing like {more[0]!r} was wanted"
    case = next(case for case in wanted if not same(found[case], wanted[case]))
    message = f"{case}: {difference(found[case], wanted[case])}"
    also = f". Besides, {found[INPUTS]}" if case != INPUTS and found[INPUTS] != UNCHANGED else ""
    likely = pattern(found[case], wanted[case])
    slips = list(book.slips(number, seed))
    for name, words, slip in slips:
        if same(found, slip):
            return f"{name}: {words} ({message})"
    for name, words, slip in slips:
        if leaves(found[case]) > 3 and case in slip and same(found[case], slip[case]):
            return f"{message}. In this case it is a known slip, {name}: {words}{also}"
    return message + (f". {likely}" if likely else "") + also


def name_of(slip: Callable) -> str:
    return slip.__name__.strip("_").replace("_", " ")
