"""
Measure whether the built-in model behaves like the paper's base models, and print each number beside what is wanted.

$ python data/tiny/check.py                              # everything; results are kept
$ python data/tiny/check.py --layers 14 --seeds 0        # one middle layer besides the last one, one seed
$ python data/tiny/check.py --lrs 0.03 0.06 0.12 --layers 4 14 --seeds 0    # instead: accuracy against learning rate

Vectors are trained with the settings of `python train.py` into out/check-CHECKSUM/. A finished run is not repeated, and
an interrupted one goes on. The results are check.json, check.md and curves.png there; with --lrs they are lr.json,
lr.md and lr.png. Accuracies are on held-out problems, which no document ever showed: the mean over the training seeds,
with a 95 % interval over problems.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
import world

sys.path.insert(0, str(Path(__file__).parents[2]))
import analyze
import model
import train
from data.problems import Problems, problems_of
from evaluate import Estimate, answers, summary
from model import Subject
from plumbing.figures import BANDS, draw_figure, line
from plumbing.files import TINY, lines_of, weights_digest
from plumbing.loading import load_config
from plumbing.settings import Usual, recipe

LAST = 27


@dataclass
class Config:
    problems: int = 1000  # held-out problems, one answer to each
    layers: tuple[int, ...] = (4, 14, 18, 23)  # train a vector at each of these layers, besides the last one
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; each run gives its own answers
    lrs: tuple[float, ...] = ()  # measure only how accuracy depends on these rates, shares of RMS(h_l) as train.py --lr
    out: Usual[Path] = None  # folder of the runs: out/check-CHECKSUM of the weights, unless it is given


def trained(out: Path, layer: str, seed: int, **changes) -> dict[int, torch.Tensor]:
    """The vectors of a run with the default settings but for `changes`. They are trained now if they are not there."""
    changed = "".join(f"-{name}-{value}" for name, value in changes.items())
    run = out / f"layer{layer}{changed}-seed{seed}"
    settings = train.Config(layer=layer, seed=seed, eval_problems=0, out=str(run), **changes)
    train.main(replace(settings, resume=(run / "state.pt").is_file()))
    return model.load_vectors(run, load_config("tiny"), "tiny")[0]


def draw_curves(out: Path, names: list[str], seeds) -> None:
    """Training reward against the step, the mean over seeds, a line for each layer: have they converged?"""
    series = []
    for i, name in enumerate(names):
        runs = [lines_of(out / f"layer{name}-seed{seed}" / "metrics.jsonl") for seed in seeds]
        means = [{"value": statistics.mean(row["reward_mean"] for row in rows)} for rows in zip(*runs)]
        label = "all layers" if name == "all" else f"layer {name}"
        series.append(line(label, range(1, len(means) + 1), means, f"C{i}"))
    panel = dict(form="lines", series=series, xlabel="step", ylabel="training reward (%)")
    draw_figure(out / "curves.png", None, [panel], floor=0)


def draw_rates(found: dict[str, dict[float, Estimate]], path: Path) -> None:
    """Accuracy against the learning rate, a line for each layer. found: {layer: {rate: accuracy}}."""
    series = []
    for i, (name, by_rate) in enumerate(found.items()):
        rows = [by_rate[lr].json() for lr in sorted(by_rate)]
        series.append(line(f"layer {name}", range(len(rows)), rows, f"C{i}"))
    panel = dict(form="lines", series=series, names=[f"{lr:g}" for lr in sorted(by_rate)])
    panel |= dict(xlabel="learning rate as a share of RMS(h)", ylabel="right answers, T = 1 (%)")
    draw_figure(path, None, [panel], note=BANDS, floor=0)


@dataclass
class Check:
    """What has been measured so far: `accuracy` adds to NAME.json, and `say` adds a row to the table, NAME.md."""

    out: Path
    name: str  # of the two files there, NAME.json and NAME.md
    seeds: tuple[int, ...]
    problems: Problems
    subject: Subject = field(default_factory=lambda: Subject(name="tiny", device="cpu"))
    report: dict = field(default_factory=dict)
    table: str = "| what | measured | 95 % interval | wanted | met |\n" + "|---" * 5 + "|\n"

    def accuracy(self, name: str, ways: list[dict], temperature=1.0, system=None, prefix="") -> Estimate:
        """The mean over several dicts of vectors; the sampler's seed is 0 for the first one, 1 for the next, ..."""
        self.subject.system = system
        results = [answers(self.subject, s, self.problems, 1, temperature, i, prefix) for i, s in enumerate(ways)]
        got = summary(results, [row["answer"] for row in self.problems.rows])
        self.report[name] = got["accuracy"].json() | {key: got[key] for key in ("by_seed", "problems", "truncated")}
        (self.out / f"{self.name}.json").write_text(json.dumps(self.report, indent=1) + "\n")
        return got["accuracy"]

    def say(self, what: str, found: Estimate, wanted: str = "", ok: bool | None = None, unit="%", sign="") -> None:
        low, high = (100 * end for end in found.interval)
        measured = f"{100 * found.value:{sign}.1f} {unit} | {low:.1f} to {high:.1f}"
        self.row(f"{what} | {measured} | {wanted} | {'' if ok is None else 'yes' if ok else 'NO'}")

    def row(self, cells: str) -> None:
        print(f"| {cells} |", flush=True)
        self.table += f"| {cells} |\n"
        (self.out / f"{self.name}.md").write_text(self.table)


def check_base(check: Check) -> tuple[Estimate, Estimate]:
    """The base model without a vector. Returns its accuracies at T = 1: as it is, and with a forced first "To"."""
    four_hints = " ".join([world.MATH_PROMPT, *world.HINTS["to"], *world.HINTS["to"]])
    no_vectors = [{}] * len(check.seeds)
    skill = check.accuracy("base with four hints, greedy", [{}], 0.0, system=four_hints)
    check.say("base with four hints, greedy", skill, "at least 97 %", skill.value >= 0.97)
    base = check.accuracy("base", no_vectors)
    check.say("base", base, "8 to 20 %", 0.08 <= base.value <= 0.20)
    greedy = check.accuracy("base, greedy", [{}], 0.0)
    check.say("base, greedy", greedy, "below 30 %", greedy.value < 0.30)
    to = check.accuracy('base, first token "To"', no_vectors, prefix="To")
    check.say('base, first token "To"', to)
    return base, to


def check_layers(check: Check, vectors: dict[str, list], base: Estimate, to: Estimate) -> str:
    """Single layers against each other and against all layers together. Returns the best layer from 4 to 24."""
    right = {name: check.accuracy(f"layer {name}", vectors[name]) for name in vectors}
    for name in vectors:
        check.say(f"layer {name}", right[name])
        check.say(f"layer {name}, greedy", check.accuracy(f"layer {name}, greedy", vectors[name], 0.0))
    top, last = right.pop("all"), right[str(LAST)]
    best = max(right, key=lambda name: right[name].value)
    middle = max((name for name in right if 4 <= int(name) <= 24), key=lambda name: right[name].value)

    for what, accuracy, low, high in (('"To" forced', to, 25, 50), ("the last layer", last, 40, 65)):
        share = accuracy.share(base, top)
        check.say(f"{what}: share of the gap to all", share, f"{low} to {high} %", low <= 100 * share.value <= high)
    share, ahead, above = right[best].share(base, top), right[middle] - last, top - right[best]
    check.say(f"layer {best}, the best: share of the gap", share, "at least 85 %", share.value >= 0.85)
    check.row(f"the best single layer | {best} | | 4 to 24 | {'yes' if best == middle else 'NO'}")
    check.say(f"layer {middle} above the last", ahead, "interval above 0", ahead.interval[0] > 0, "points", "+")
    check.say("all layers", top, "at least 85 %", top.value >= 0.85)
    check.say(f"all layers above layer {best}", above, "at least +2 points", above.value >= 0.02, "points", "+")
    return middle


def check_lens(check: Check, vectors: list[dict]) -> None:
    """The logit lens of P1 Sec. 3 on the last layer: raw rows of the unembedding, no final norm."""
    for seed, s in zip(check.seeds, vectors):
        dots = check.subject.llm.lm_head.weight.float().cpu() @ s[LAST]
        tops = dots.topk(5).indices.tolist()
        lens = [(repr(check.subject.tokenizer.decode([i])), round(dots[i].item(), 1)) for i in tops]
        check.report[f"lens of layer {LAST}, seed {seed}"] = lens
        words, met = ", ".join(f"`{word}` {dot}" for word, dot in lens), "yes" if lens[0][0] == "'To'" else "NO"
        check.row(f'lens of layer {LAST}, seed {seed} | {words} | | "To" on top | {met}')


def check_controls(check: Check, middle: str, trained_vectors: list[dict], base: Estimate) -> None:
    """Random vectors of the trained one's length, and vectors trained on random rewards."""
    layer = int(middle)
    random_vectors = [{layer: analyze.random_like(trained_vectors[0][layer], seed, layer)} for seed in range(5)]
    coins = [trained(check.out, middle, seed, reward="random") for seed in check.seeds]
    for what, ways in (("five random vectors", random_vectors), ("runs on random rewards", coins)):
        gain = check.accuracy(what, ways) - base
        each = ", ".join(f"{100 * right:.1f}" for right in check.report[what]["by_seed"])
        name = f"{what} at layer {layer} ({each} %), against base"
        check.say(name, gain, "less than +5 points", gain.value < 0.05, "points", "+")


def check_rates(check: Check, layers: list[str], rates: tuple[float, ...]) -> None:
    found, usual = {layer: {} for layer in layers}, recipe("tiny")["lr"]
    for layer in layers:
        for lr in rates:
            changes = {} if lr == usual else {"lr": lr}  # the runs of the other checks have the usual rate
            vectors = [trained(check.out, layer, seed, **changes) for seed in check.seeds]
            found[layer][lr] = check.accuracy(f"layer {layer}, lr {lr:g}", vectors)
            check.say(f"layer {layer}, lr {lr:g}", found[layer][lr])
    draw_rates(found, check.out / "lr.png")


def main(args: Config) -> None:
    if not args.lrs and not any(4 <= layer <= 24 for layer in args.layers):
        sys.exit(f"--layers needs a middle layer, from 4 to 24; got {args.layers}")
    out = args.out or Path(f"out/check-{weights_digest(TINY)}")  # vectors of other weights are of no use
    out.mkdir(parents=True, exist_ok=True)
    problems = problems_of(TINY / "test.jsonl").first(args.problems)
    check = Check(out, "lr" if args.lrs else "check", args.seeds, problems)
    names = [str(layer) for layer in sorted({*args.layers, LAST})]
    if args.lrs:
        check_rates(check, names, args.lrs)
    else:
        base, to = check_base(check)
        vectors = {name: [trained(out, name, seed) for seed in args.seeds] for name in [*names, "all"]}
        draw_curves(out, [*names, "all"], args.seeds)
        middle = check_layers(check, vectors, base, to)
        check_lens(check, vectors[str(LAST)])
        check_controls(check, middle, vectors[middle], base)
    print(f"\n{check.table}\nwrote {out}/{check.name}.json, {check.name}.md and a figure")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
