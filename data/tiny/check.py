"""
Measure whether the embedded model behaves like the paper's base models, and print each figure beside what is wanted.

$ python data/tiny/check.py                      # everything; results are kept
$ python data/tiny/check.py --layers 4 16        # fewer single layers, 2 to 6 minutes each

Trains vectors with the settings of `python train.py` into out/check-CHECKSUM/ (a finished run is not repeated, an
interrupted one goes on) and writes check.json and check.md there. Accuracies are on held-out problems,
which no document ever showed.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
import world

sys.path.insert(0, str(Path(__file__).parents[2]))
import analyze  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from data.problems import problems_of  # noqa: E402
from data.runs import weights_digest  # noqa: E402
from evaluate import Subject, answers, summary  # noqa: E402


@dataclass
class Config:
    problems: int = 1000                   # held-out problems, one answer to each
    layers: tuple[int, ...] = (4, 8, 12, 16, 20, 24)  # single layers to train besides the last one
    seed: int = 0                          # of training and sampling
    out: Path | None = None                # folder of the runs; default out/check-CHECKSUM of the weights


def trained(out: Path, layer: str, seed: int, **changes) -> dict[int, torch.Tensor]:
    """The vectors of a run with the default settings but for `changes`, trained now if they are not there yet."""
    defaults = train.Config()
    changed = "".join(f"-{name}-{value}" for name, value in changes.items() if getattr(defaults, name) != value)
    run = out / f"layer{layer}{changed}"
    settings = train.Config(layer=layer, seed=seed, eval_problems=0, out=str(run), **changes)
    train.main(replace(settings, resume=(run / "state.pt").is_file()))
    return model.load_vectors(run / "vectors.safetensors", model.load_config("tiny"), "tiny")[0]


def main(args: Config) -> None:
    out = args.out or Path(f"out/check-{weights_digest(model.TINY)}")  # vectors of other weights are no use here
    out.mkdir(parents=True, exist_ok=True)
    subject, problems = Subject("tiny"), problems_of(model.TINY / "test.jsonl").first(args.problems)
    report, table = {}, ["| what | measured | 95 % interval | wanted | met |", "|---|---|---|---|---|"]

    def accuracy(name, vectors=None, temperature=1.0, system=None, prefix=""):
        subject.system = system
        found = answers(subject, vectors or {}, problems, 1, temperature, args.seed, prefix)
        got = summary([found])
        report[name] = {"accuracy": got["accuracy"].value, "interval_95": got["accuracy"].interval}
        report[name] |= {key: got[key] for key in ("problems", "truncated")}
        report[name]["begins_with_To"] = (
            sum(text[0].startswith("To ") for text in found["completions"]) / got["problems"]
        )
        (out / "check.json").write_text(json.dumps(report, indent=1) + "\n")
        return report[name]["accuracy"]

    def say(name, ok=None, wanted=""):
        low, high = report[name]["interval_95"]
        measured = f"{100 * report[name]['accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f}"
        table.append(f"| {name} | {measured} | {wanted} | {'' if ok is None else 'yes' if ok else 'NO'} |")
        print(table[-1], flush=True)

    style = world.HINTS["to"][0]
    skill = accuracy(f'base, system prompt "{style}", greedy', temperature=0.0, system=style)
    say(f'base, system prompt "{style}", greedy', skill >= 0.97, "at least 97 %")
    base = accuracy("base, T = 1")
    say("base, T = 1", 0.10 <= base <= 0.30, "10 to 30 %")
    say("base, greedy", accuracy("base, greedy", temperature=0.0) < 0.30, "below 30 %")
    say(
        'base, first token "To", T = 1', accuracy('base, first token "To", T = 1', prefix="To") >= 0.60, "at least 60 %"
    )

    for steps in (32, 64):  # 28 vectors share the step of one, so the ceiling is measured with twice the steps
        every = trained(out, "all", args.seed, steps=steps)
        top = accuracy(f"all layers, {steps} steps, T = 1", every)
        say(f"all layers, {steps} steps, T = 1", *((top >= 0.90, "at least 90 %") if steps == 64 else ()))
        accuracy(f"all layers, {steps} steps, greedy", every, 0.0)
        say(f"all layers, {steps} steps, greedy")
    vectors, closed = {}, {}
    for layer in sorted({*args.layers, 27}):
        vectors[layer] = trained(out, str(layer), args.seed)
        closed[layer] = (accuracy(f"layer {layer}, T = 1", vectors[layer]) - base) / (top - base)
        accuracy(f"layer {layer}, greedy", vectors[layer], 0.0)
    best = max(closed, key=closed.get)
    for layer in closed:
        ok, wanted = None, f"closes {100 * closed[layer]:.0f} % of the gap from base to all layers"
        if layer == 27:
            ok, wanted = 0.40 <= closed[layer] <= 0.75, wanted + "; 40 to 75 %"
        elif layer == best:
            ok, wanted = closed[layer] >= 0.80, wanted + "; the best layer at least 80 %"
        say(f"layer {layer}, T = 1", ok, wanted)
        say(f"layer {layer}, greedy")

    # the logit lens of P1 Sec. 3: raw rows, no final norm
    dots = subject.llm.lm_head.weight.float().cpu() @ vectors[27][27]
    lens = [(subject.tokenizer.decode([i]), round(dots[i].item(), 1)) for i in dots.topk(5).indices.tolist()]
    report["layer 27, logit lens"] = lens
    words = ", ".join(f"`{word}` {dot}" for word, dot in lens)
    table.append(f'| layer 27, logit lens | {words} | | "To" on top | {"yes" if lens[0][0] == "To" else "NO"} |')

    for layer in sorted({27, best}):
        s = vectors[layer][layer]
        controls = {
            f"random vector {seed} at layer {layer}": {layer: analyze.random_like(s, seed, layer)} for seed in range(3)
        }
        controls[f"layer {layer} trained on random rewards"] = trained(out, str(layer), args.seed, reward="random")
        for name, control in controls.items():
            gain = accuracy(f"{name}, T = 1", control) - base
            say(f"{name}, T = 1", gain < 0.05, f"{100 * gain:+.1f} points against base; less than +5")

    (out / "check.md").write_text("\n".join(table) + "\n")
    print("\n" + "\n".join(table) + f"\n\nwrote {out}/check.json and check.md")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
