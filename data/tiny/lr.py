"""
How accuracy depends on the relative learning rate of train.py, for an early, a middle and the last layer: lr.json,
lr.png.

$ python data/tiny/lr.py                         # trains what out/check-CHECKSUM lacks, 2 to 6 minutes for each vector
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
from check import trained  # noqa: E402

from data.problems import problems_of  # noqa: E402
from evaluate import answers, summary  # noqa: E402
from model import Subject  # noqa: E402
from plumbing.files import TINY, weights_digest  # noqa: E402
from plumbing.settings import recipe  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    layers: tuple[int, ...] = (4, 14, 27)  # an early, a middle and the last one
    lrs: tuple[float, ...] = (0.03, 0.06, 0.12)  # shares of RMS(h_l)
    problems: int = 1000                   # held-out problems, one answer to each at T = 1
    seed: int = 0                          # of training and sampling


def draw(found: list[dict], path: Path) -> None:
    """Accuracy against the learning rate, a line for each layer, with 95 % intervals."""
    fig, ax = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    for layer in sorted({row["layer"] for row in found}):
        rows = [row for row in found if row["layer"] == layer]
        y = [100 * row["accuracy"] for row in rows]
        low, high = zip(*(row["interval_95"] for row in rows))
        spread = [[a - 100 * b for a, b in zip(y, low)], [100 * b - a for a, b in zip(y, high)]]
        ax.errorbar([row["lr"] for row in rows], y, spread, marker="o", ms=4, capsize=2, label=f"layer {layer}")
    ax.set_xscale("log")
    ax.set_xticks(sorted({row["lr"] for row in found}), [f"{lr:g}" for lr in sorted({row["lr"] for row in found})])
    ax.minorticks_off()
    ax.set(xlabel="learning rate as a share of RMS(h)", ylabel="right answers, T = 1 (%)", ylim=(0, 100))
    ax.legend(frameon=False, loc="lower left")
    fig.savefig(path, dpi=150)


def main(args: Config) -> None:
    out = Path(f"out/check-{weights_digest(TINY)}")  # the folder of check.py
    subject, problems = Subject(name="tiny", device="cpu"), problems_of(TINY / "test.jsonl").first(args.problems)
    found, usual = [], recipe("tiny")["lr"]  # check.py has trained with that one
    for layer in args.layers:
        for lr in args.lrs:
            vectors = trained(out, str(layer), args.seed, **({} if lr == usual else {"lr": lr}))
            got = summary([answers(subject, vectors, problems, 1, 1.0, args.seed)])
            row = {
                "accuracy": got["accuracy"].value,
                "interval_95": got["accuracy"].interval,
                "problems": got["problems"],
            }
            found.append({"layer": layer, "lr": lr} | row)
            print(f"layer {layer}, lr {lr:g}: {got['accuracy'].text()}", flush=True)
            (out / "lr.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, out / "lr.png")
    print(f"wrote lr.json and lr.png in {out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
