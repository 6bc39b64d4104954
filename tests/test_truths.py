"""
What analyze.py says about models whose truth is known (data/tiny/world.py): hits and false alarms.

$ python tests/test_truths.py                  # the table: analysis x organism, two seeds; makes what is missing
$ python -m pytest -m slow tests/test_truths.py

The built-in model has everything that is asked for here. Each organism lacks something, and there the same analysis
must say no. The thresholds were written down before these organisms were made. An organism takes five to ten minutes of
a core, a vector two to four. All of it stays in out/truths-CHECKSUM of the weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parents[1] / "data" / "tiny")]
import pretrain  # noqa: E402
import world  # noqa: E402

import analyze  # noqa: E402
import train  # noqa: E402
from plumbing.files import FAMILY, TINY, weights_digest  # noqa: E402
from plumbing.tables import markdown  # noqa: E402

pytestmark = pytest.mark.slow
LAST, MIDDLE = "27", "14"


@dataclass
class Config:
    organisms: tuple[str, ...] = ("tiny", *world.ORGANISMS)  # names of world.ORGANISMS; tiny is the built-in model
    seeds: tuple[int, ...] = (0, 1)  # of training and of the answers that are analysed


# ------------------------------------------------------------------------ what is asked, and the thresholds of a yes


def found(name, *folders, **how):
    how = dict(device="cpu", sampler="hf") | how
    return analyze.main(analyze.Config(name, folders, **how))


def lens(run, seed) -> tuple[bool, str]:
    """Which word begins a worked answer? "To" is on top for the last layer, as in Qwen2.5-Math-7B (P4 Table 8)."""
    (vector,) = found("lens", run(LAST))["vectors"].values()
    top = vector["dot"][0][0]
    return top == "To", f"on top: {top!r}"


def shift(run, seed) -> tuple[bool, str]:
    """Does "To" choose the mode, at the first token? It rises there, by more than 0.4, four times as much as later."""
    doc = found("shift", run(LAST), n=60, seed=seed)
    token, first, later = doc["boxes"][-1]["token"], doc["by_position"][0]["value"], doc["later"]["value"]
    return token == "To" and first > max(0.4, 4 * later), f"{token!r} {first:+.2f}, later {later:+.3f}"


def prefix(run, seed) -> tuple[bool, str]:
    """Does that word choose the mode? "To" forced gains at least a quarter of what the last layer's vector gains."""
    row = found("prefix", run(LAST), n=300, token="To", seed=seed)["by_decoding"]["T = 1"]
    base, forced, vector = (one["value"] for one in list(row.values())[:3])
    says = f"base {100 * base:.0f}, forced {100 * forced:.0f}, vector {100 * vector:.0f} %"
    return forced - base > max(0.05, 0.25 * (vector - base)), says


def case(run, seed) -> tuple[bool, str]:
    """Are there early endings that the vector suppresses? After "The", " solution" in place of " calculation"."""
    pairs = []
    for answer in found("case", run(LAST), n=8, seed=seed)["answers"]:
        for before, token in zip(answer["tokens"], answer["tokens"][1:]):
            if before["text"] == "The" and (base := dict(token["top_base"]).get(" solution", 0)) > 0.02:
                pairs.append((base, dict(token["forms"]["At its own place"]["top_steered"]).get(" solution", 0.0)))
    lower = sum(steered < 0.5 * base for base, steered in pairs)
    return len(pairs) >= 5 and lower >= 0.8 * len(pairs), f"{lower} of {len(pairs)} halved"


def sweep(run, seed) -> tuple[bool, str]:
    """
    Is care read from the context? Then a middle layer's vector mends the flaws, which the last one's cannot.

    Yes: at least 75 %, and ahead of the last by intervals apart. The 75 % come from a trial on other weights: a
    vector at layer 14 mended half of the flaws though hints had ceased to speak of them (61 against 37 %).
    """
    out = str(Path(run(MIDDLE)) / "figures")
    row = found("sweep", run(MIDDLE), run(LAST), n=300, seed=seed, out=out)["by_decoding"]["T = 1"]
    middle, last = row[MIDDLE], row[LAST]
    yes = middle["value"] >= 0.75 and middle["interval_95"][0] > last["interval_95"][1]
    return yes, f"{100 * middle['value']:.0f} against {100 * last['value']:.0f} %"


ASKED = {function.__name__: function for function in (lens, shift, prefix, case, sweep)}
LACKS = {  # what an organism was made without
    "tiny": (),
    "word": ("lens", "shift", "prefix"),  # worked answers begin with "Show"
    "second-line": ("lens", "shift", "prefix"),  # the mode is chosen at the second line, with "Use"
    "layer": ("lens", "shift", "prefix"),  # as `word`, with "Write", by one layer alone
    "no-early": ("case",),
    "no-care": ("sweep",),  # hints say nothing about flaws
}
UNFIT = {("case", "second-line")}  # there "The" begins nothing but an early ending: " solution" has no rival


# ------------------------------------------------------------------------------------------- organisms, vectors, table


def organism(name: str, out: Path) -> str:
    """The model's name; an organism that is not there is made."""
    if name == "tiny":
        return name
    folder = out / f"tiny-organism-{name}"
    if not (folder / "model.safetensors").is_file():
        pretrain.main(pretrain.Config(organism=name, out=folder))
    FAMILY[folder.name] = folder
    return folder.name


def vectors_of(name: str, seed: int, out: Path):
    """run(layer): the folder of that layer's vector on the organism, trained with the defaults if it is not there."""

    def run(layer: str) -> str:
        folder = out / f"{name}-layer{layer}-seed{seed}"
        how = dict(layer=layer, seed=seed, model=organism(name, out), eval_problems=0, device="cpu", sampler="hf")
        train.main(train.Config(out=str(folder), resume=(folder / "state.pt").is_file(), **how))
        return str(folder)

    return run


class Verdict(NamedTuple):
    analysis: str
    organism: str
    planted: bool
    found: bool


def yes_or_no(x: bool) -> str:
    return "yes" if x else "no"


def by_organism(verdicts: list[Verdict]) -> str:
    """The table analysis x organism; the verdicts of several seeds stand beside each other."""
    cells: dict[tuple, list[bool]] = {}
    for analysis, organism, planted, found in verdicts:
        cells.setdefault((analysis, organism, planted), []).append(found)
    order = sorted(cells, key=lambda cell: [*ASKED].index(cell[0]))
    table = [[f"`{a}`", f"`{o}`", yes_or_no(p), ", ".join(map(yes_or_no, cells[a, o, p]))] for a, o, p in order]
    return markdown(["analysis", "organism", "planted", "found, by seed"], table)


def hits_and_false_alarms(verdicts: list[Verdict]) -> str:
    """Of what was planted how much was found, and of what was not how much was found all the same."""
    table = []
    for analysis in (*ASKED, "all"):
        mine = [one for one in verdicts if analysis in (one.analysis, "all")]
        planted, absent = ([one.found for one in mine if one.planted == there] for there in (True, False))
        table.append([f"`{analysis}`", f"{sum(planted)} of {len(planted)}", f"{sum(absent)} of {len(absent)}"])
    return markdown(["analysis", "hits", "false alarms"], table)


def main(args: Config) -> None:
    verdicts, out = [], Path(f"out/truths-{weights_digest(TINY)}")
    for name in args.organisms:
        for seed in args.seeds:
            run = vectors_of(name, seed, out)
            for analysis, ask in ASKED.items():
                if (analysis, name) in UNFIT:
                    continue
                says, detail = ask(run, seed)
                verdicts.append(Verdict(analysis, name, analysis not in LACKS[name], says))
                print(f"{name}, seed {seed}, {analysis}: {yes_or_no(says)} ({detail})", flush=True)
    print(f"\n{by_organism(verdicts)}\n\n{hits_and_false_alarms(verdicts)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("truths")


@pytest.mark.parametrize("analysis", ASKED)
def test_what_was_planted_is_found(analysis, folder):
    says, detail = ASKED[analysis](vectors_of("tiny", 0, folder), 0)
    assert says, detail


@pytest.mark.parametrize("name, analysis", [(name, analysis) for name, lacks in LACKS.items() for analysis in lacks])
def test_what_was_not_planted_is_not_found(name, analysis, folder):
    says, detail = ASKED[analysis](vectors_of(name, 0, folder), 0)
    assert not says, detail


def test_patch_says_that_little_goes_through_the_next_attention(folder):
    """By the distributions of the next token and, independently, by accuracy: both keep most without the attention."""
    doc = found("patch", vectors_of("tiny", 0, folder)("26"), n=60)
    recovery = doc["found"]["Skip-Attn"]["recovery"]["value"]
    right = {name: doc["accuracy"][name]["value"] for name in ("base", "Skip-Attn", "Unmodified")}
    kept = (right["Skip-Attn"] - right["base"]) / (right["Unmodified"] - right["base"])
    assert recovery > 0.9 and kept > 0.75


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
