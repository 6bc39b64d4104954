"""A number over problems with its 95 % interval, and evaluate.py's table of such numbers."""

import json
import statistics
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.runs import write


@lru_cache(4)
def resamples(n: int, draws: int = 10_000) -> np.ndarray:
    """Bootstrap samples of n problems, (draws, n): the same for every estimate, so that estimates are paired."""
    return np.random.default_rng(0).integers(n, size=(draws, n)).astype(np.int32)


class Estimate:
    """
    A number over problems with bootstrap draws of it.

    Whole problems are resampled, because the answers to one are not independent. All estimates over n problems resample
    the same ones, so the draws of a - b are those of the difference: what is hard for both does not count as noise.
    """

    def __init__(self, value: float | None, draws: np.ndarray, open: bool = False):
        self.value, self.draws, self.open = value, draws, open

    @classmethod
    def of(cls, rows: list[list[float]]) -> "Estimate":
        """The mean of the rows' means. rows: [problem][sample], for example 0 or 1."""
        means = np.array([np.mean(row) for row in rows])
        return cls(float(means.mean()), means[resamples(len(means))].mean(1))

    @classmethod
    def mean(cls, parts: list["Estimate"]) -> "Estimate":
        """The mean over different sets of problems (benchmarks of equal weight), drawn independently of each other."""
        draws = [np.random.default_rng(i).permutation(part.draws) for i, part in enumerate(parts)]
        return cls(statistics.mean(part.value for part in parts), np.mean(draws, 0))

    @classmethod
    def largest(cls, *parts: "Estimate") -> "Estimate":
        """The largest of paired estimates, chosen anew in every draw."""
        return cls(max(part.value for part in parts), np.max([part.draws for part in parts], 0))

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio of paired estimates: None where the divisor is 0, without the draws where it is."""
        fine = other.draws != 0
        return Estimate(self.value / other.value if other.value else None, self.draws[fine] / other.draws[fine])

    def share(self, zero: "Estimate", whole: "Estimate") -> "Estimate":
        """
        (self - zero) / (whole - zero), the share of a gain. (0.3, 0.2, 0.6) -> 0.25

        `open` is True where the interval of whole - zero is not above 0: then the share says nothing.
        """
        found = (self - zero) / (whole - zero)
        found.open = (whole - zero).interval[0] <= 0
        return found

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of the 95 % percentile interval; without any draws not a number."""
        low, high = np.percentile(self.draws, [2.5, 97.5]) if len(self.draws) else (float("nan"),) * 2
        return float(low), float(high)

    def text(self, sign: str = "") -> str:
        """In percent: "43.2 [41.0, 45.4]"; with sign "+" as a difference, in points."""
        low, high = self.interval
        return f"{100 * self.value:{sign}.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    def plain(self, digits: int = 2) -> str:
        """As it is, with so many significant digits: "0.61 [0.6, 0.64]"."""
        low, high = self.interval
        return f"{self.value:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"

    def json(self) -> dict:
        return {"value": self.value, "interval_95": self.interval} | ({"open": True} if self.open else {})


def summary(results: list[dict]) -> dict:
    """The answers of several seeds as one row: accuracy (an Estimate), standard deviation over seeds, counts."""
    correct = [sum(rows, []) for rows in zip(*(r["correct"] for r in results))]  # [problem][samples of all seeds]
    by_seed = [statistics.mean(map(statistics.mean, r["correct"])) for r in results]
    lengths = [length for r in results for row in r["lengths"] for length in row]
    return {
        "accuracy": Estimate.of(correct),
        "by_seed": by_seed,
        "sd_over_seeds": statistics.pstdev(by_seed) if len(by_seed) > 1 else None,  # divisor n, as the papers
        "problems": len(correct),
        "samples": len(correct[0]),  # of all seeds together
        "seeds": len(results),
        "truncated": 1 - statistics.mean(ended for r in results for row in r["ended"] for ended in row),
        "tokens_mean": statistics.mean(lengths),
        "tokens_per_second": sum(lengths) / sum(sum(r["seconds"]) for r in results),
    }


def average(found: list[dict]) -> dict:
    """The mean of several benchmarks' summaries, and its standard deviation over seeds."""
    by_seed = [statistics.mean(seed) for seed in zip(*(row["by_seed"] for row in found))]
    mean = Estimate.mean([row["accuracy"] for row in found])
    return {"accuracy": mean, "sd_over_seeds": statistics.pstdev(by_seed) if len(by_seed) > 1 else None}


def cell(found: dict | None, sign: str = "") -> str:
    """43.2 ±0.3 [41.0, 45.4] in percent."""
    if found is None:
        return ""
    value, _, interval = found["accuracy"].text(sign).partition(" ")
    spread = found.get("sd_over_seeds")
    return f"{value} {interval}" if spread is None else f"{value} ±{100 * spread:.1f} {interval}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table with aligned columns; columns without any entry are left out."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = [[row[i] for i in used] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def counts(name: str, about: dict) -> list[str]:
    """The table's columns on how a number was measured."""
    if "problems" not in about:
        return [""] * 6
    k = about["samples"] // about["seeds"]
    metric = "PASS@1" if k == 1 else f"mean@{k}" if k == 8 else f"AVG@{k}"  # the papers' names
    truncated, tokens = f"{100 * about['truncated']:.1f} %", f"{about['tokens_mean']:.0f}"
    return [metric, f"{about['problems']}", f"{about['seeds']}", truncated, tokens, f"{about['tokens_per_second']:.0f}"]


def write_table(found: dict, what: str, out: Path) -> None:
    """Print the table, write eval.md and eval.json. found: {(benchmark, temperature): {who: summary}}."""
    head = ["benchmark", "decoding", "steered %", "base %", "difference"]
    head += ["metric", "problems", "seeds", "truncated", "tokens", "tokens/s"]
    rows, numbers = [], []
    for (name, temperature), row in found.items():
        cells = [cell(row.get("steered")), cell(row.get("base")), cell(row.get("difference"), "+")]
        cells += counts(name, row.get("steered") or row["base"])
        rows.append([name, f"T = {temperature:g}" if temperature else "greedy", *cells])
        numbers.append({"benchmark": name, "temperature": temperature})
        for who, part in row.items():
            rest = {key: x for key, x in part.items() if key != "accuracy"}
            numbers[-1][who] = rest | part["accuracy"].json()
    table = markdown(head, rows)
    text = f"{what}. Percent of right answers, 95 % intervals over problems"
    text += "; ± is the standard deviation over seeds (divisor: their number, as in the papers)" if "±" in table else ""
    print(f"\n{text}\n\n{table}")
    write(out / "eval.md", f"{text}\n\n{table}\n")
    write(out / "eval.json", json.dumps(numbers, indent=1, default=Estimate.json) + "\n")
    print(f"\nwrote eval.md and eval.json to {out}")
