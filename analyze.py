"""
Look into trained vectors, one analysis at a time (`python analyze.py --help` lists them all).

$ python analyze.py lens out/tiny-layer27                     # tokens that the vector points at
$ python analyze.py sweep out/tiny-layer{?,??,all} out/tiny-full       # accuracy by layer
$ python analyze.py patch out/tiny-layer26 out/tiny-layer27   # which part of the next block it acts through
$ python analyze.py report                                    # one page with all results, beside the papers' numbers

An analysis is a function under @analysis. It returns numbers, a table and a sentence that reads them. To add one, write
such a function; --help and the report then list it. A function of the same name in plumbing/figures.py draws it; if
there is none, the figure is the table.

Numbers go to RUN/figures/NAME.json (of several runs: out/figures/), the table to NAME.md, the figure to NAME.png. The
same command again only draws, without loading a model. evaluate.py keeps the answers, so an interrupted command goes on
where it stopped, and nothing is measured twice. Intervals are 95 % bootstrap intervals over problems. Conditions share
problems and seeds, so differences are paired. P1, P4: versions 1 and 4 of arXiv:2509.06608; B: arXiv:2505.18706.
"""

import plumbing.threads  # noqa: F401 - before torch is loaded

# isort: split
import copy
import json
import shlex
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from torch.nn.functional import normalize

import model
from data.paper import report
from data.problems import Problems, benchmarks, problems_of, prompt_ids
from evaluate import Estimate, answers, vectors_of
from model import Subject
from plumbing.bars import Bar, waiting
from plumbing.console import one_line
from plumbing.figures import draw, piece, quoted, spread
from plumbing.files import checksum, config_of, grader, home_of, identity, json_of, keep, kept, lines_of, write
from plumbing.processes import state_of
from plumbing.settings import CHANGE_NO_NUMBER, Usual, at_least, check_seed, flag, label_of, own_first
from plumbing.tables import markdown
from rewards import grade


@own_first
@dataclass
class Config(model.Asking):
    name: tyro.conf.Positional[str]        # which analysis
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders of train.py; for report the folder around them, out
    model: Usual[str] = None               # a copy of the runs' model, for example a local folder of a hub model
    n: Usual[int] = None                   # use the first N problems; default 100 (case: 4; with --benchmarks: all)
    benchmarks: tuple[str, ...] = ()       # names of data/NAME.jsonl, or all: the papers' six; answers: of the first
    seeds: tuple[int, ...] = ()            # for accuracies; default --seed; with --benchmarks 0 1 2 as in evaluate.py
    data: Usual[str] = None                # jsonl instead of the held-out problems; texts to read are drawn by --seed
    samples: Usual[int] = None             # answers to each problem at T > 0; default what the file says, or 1
    temperature: float = 1.0               # of answers and accuracies; sweep and prefix always use T = 1 and greedy
    seed: int = 0                          # for the answers that are read, and for random vectors
    token: Usual[str] = None               # prefix: this text instead of the token that shift finds at position 0
    recipients: tuple[str, ...] = ()       # transfer: models that get the runs' vectors
    controls: bool = False                 # sweep, prefix: also random and misplaced vectors; compose: half vectors
    through_norm: bool = True              # patch: heads see LN(X + s), as the authors' code; no: LN(X) + s, as in P4
    sample_heads: bool = False             # patch: also the accuracy with every head (P4 Fig. 5); with the HF sampler
    top: int = 10                          # lens: how many tokens to list
    out: Usual[str] = None                 # folder for figure and numbers; default as above


# settings that change no number, or that are in Lab.key in another form
FREE = (*CHANGE_NO_NUMBER, "runs", "data", "benchmarks", "recipients")


# ------------------------------------------------------------------------------------------------------------ the lab


class Analysis(NamedTuple):
    compute: Callable  # takes a Lab, returns a finding
    papers: str  # where the papers have it
    least: int = 1  # number of runs
    most: int | None = None
    takes: tuple[str, ...] = ()  # runs that it takes beside those with vectors: "lora", "full"
    n: int | None = 100  # problems by default; None if it needs none
    accuracies: bool = False  # measures accuracies: over all problems of the benchmarks, with several seeds


ANALYSES: dict[str, Analysis] = {}  # in the order of this file, which is also that of --help and the report


def analysis(papers: str, **wants):
    """Register the function below; the first line of its docstring is its --help. wants: fields of Analysis."""

    def register(compute):
        ANALYSES[compute.__name__] = Analysis(compute, papers, **wants)
        return compute

    return register


def finding(reading: str, head: list[str], rows: list[list[str]], **numbers) -> dict:
    """What an analysis returns: a sentence, a table, and the numbers for the figure and for later readers."""
    return {"reading": reading, "table": (head, rows)} | numbers


class Run(NamedTuple):
    folder: Path
    config: dict  # its config.json
    vectors: dict  # {place: fp32 tensor}; {} if all weights were trained
    label: str  # "27", "all", "26, attention": see settings.label_of
    full = property(lambda run: run.config.get("method") == "full")
    places = property(lambda run: ", ".join(map(str, run.vectors)))

    @property
    def name(self) -> str:
        """ "tiny-layer27"; of a checkpoint "tiny-layer27/00040"."""
        home = home_of(self.folder)
        return home.name if home == self.folder else f"{home.name}/{self.folder.name}"

    @property
    def stamp(self) -> str:
        """A checksum of what was trained; it changes when training goes on."""
        return model.Subject(name=str(self.folder / "weights")).key["weights"] if self.full else identity(self.vectors)


@dataclass
class Lab:
    """What an analysis works with: a model, runs and problems. The model is loaded only if results are missing."""

    args: Config
    subject: Subject
    runs: list[Run]
    sets: list[Problems]
    recipients: list[Subject] = field(default_factory=list)  # for transfer

    llm = property(lambda lab: lab.subject.llm)
    tokenizer = property(lambda lab: lab.subject.tokenizer)
    depth = property(lambda lab: lab.subject.depth)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds for accuracies, as in evaluate.py."""
        return self.args.seeds or ((0, 1, 2) if self.args.benchmarks else (self.args.seed,))

    @property
    def texts(self) -> Problems:
        """The problems whose answers are read: of the first benchmark, and as many as without benchmarks."""
        return self.sets[0].first(self.args.n or ANALYSES[self.args.name].n)

    @property
    def about(self) -> str:
        """The model, the problems and the seeds, for the caption."""
        seeds = self.seeds if ANALYSES[self.args.name].accuracies else (self.args.seed,)
        files = ", ".join(f"{problems.name} (n = {len(problems.rows)})" for problems in self.sets)
        files = "mean of " * (len(self.sets) > 1) + files
        return f"{self.subject.name}; {files}; seed {', '.join(map(str, seeds))}" if files else self.subject.name

    @property
    def key(self) -> dict:
        """Everything that the numbers depend on; computed from files, without the model."""
        settings = {name: value for name, value in asdict(self.args).items() if name not in FREE}
        return settings | {
            "seeds": self.seeds,
            "grader": grader(),
            "subjects": [subject.key for subject in self.recipients or [self.subject]],
            "runs": [[str(run.folder), run.stamp] for run in self.runs],
            "problems": [[one.name, one.checksum, len(one.rows), one.samples] for one in self.sets],
        }

    def over_sets(self, right, temperature: float) -> Estimate:
        """The mean of the grades right(problems, k, seed), [problem][sample], over sets and seeds."""
        parts = []
        for problems in self.sets:
            k = (self.args.samples or problems.samples) if temperature else 1  # greedy answers are all the same
            by_seed = [right(problems, k, seed) for seed in (self.seeds if temperature else (0,))]
            parts.append(Estimate.rate([sum(samples, []) for samples in zip(*by_seed)]))
        return parts[0] if len(parts) == 1 else Estimate.mean(parts)

    def accuracy(self, vectors: dict, label: str, temperature=None, prefix="", subject=None) -> Estimate:
        """Share of right answers with these vectors ({}: the base model). evaluate.py keeps the answers."""
        T = self.args.temperature if temperature is None else temperature

        def right(problems, k, seed):
            bar = f"{label}, {problems.name}, T = {T:g}, seed {seed}"
            return answers(subject or self.subject, vectors, problems, k, T, seed, prefix, bar=bar)["correct"]

        return self.over_sets(right, T)

    def compare(self, conditions: dict, temperature: float | None = None) -> dict[str, Estimate]:
        """The accuracy under each condition {name: vectors}."""
        bar = Bar(conditions.items(), desc=self.args.name, unit="conditions")
        return {name: self.accuracy(vectors, name, temperature) for name, vectors in bar}

    def answered(self, vectors: dict, label: str) -> tuple[list, list, list]:
        """(prompts, completions, ended): one answer of the steered model to every problem of `texts`, as token ids."""
        T, seed = self.args.temperature, self.args.seed
        found = answers(self.subject, vectors, self.texts, 1, T, seed, bar=f"answers, {label}")
        return found["prompt_ids"], [c for (c,) in found["completion_ids"]], [e for (e,) in found["ended"]]

    def once(self, what: str, vectors: dict, compute):
        """compute(), or its kept result, so that an interrupted command goes on where it stopped."""
        without = ("name", "token", "controls", "sample_heads", "top", "seeds", "grader")  # other analyses may share it
        key = {name: x for name, x in self.key.items() if name not in without}
        key |= {"runs": identity(vectors), "what": what}
        path = self.subject.folder / f"{what.split()[0]}-{checksum(json.dumps(key).encode())}.json"
        found = kept(path, key)
        return keep(path, key, compute()) if found is None else found


def open_runs(args: Config) -> list[Run]:
    """The runs of a command; exits with one line if the analysis cannot take one."""
    runs = []
    for folder in args.runs:
        config = config_of(folder)
        config |= {"model": args.model or config["model"]}
        vectors, _ = vectors_of(folder, config, other=bool(args.model))
        vectors = dict(sorted(vectors.items(), key=lambda item: model.split(item[0])))
        runs.append(run := Run(Path(folder), config, vectors, label_of(config)))
        lora = any(model.split(place).matrix for place in vectors)
        kind, what = ("full", "all weights and no vectors") if run.full else ("lora", "a LoRA")
        if (run.full or lora) and kind not in ANALYSES[args.name].takes:
            takers = ", ".join(name for name, other in ANALYSES.items() if kind in other.takes)
            sys.exit(f"{args.name} wants vectors; {folder} has {what}. These can take it: {takers}")
    for key in ("model", "template", "system") if args.name not in ("transfer", "cost") else ():
        if len(values := {str(run.config.get(key)) for run in runs}) > 1:
            sys.exit(f"{args.name} compares runs with the same {key}; these have {', '.join(sorted(values))}")
    return runs


def drawn(problems: Problems, seed: int) -> Problems:
    """The problems in a random order, as the authors draw texts: that of shuffle(seed) of the package datasets."""
    rows = [problems.rows[i] for i in np.random.default_rng(seed).permutation(len(problems.rows))]
    name, order = f"{problems.name}-drawn{seed}", checksum(f"{problems.checksum} {seed}".encode())
    return problems._replace(name=name, rows=rows, checksum=order)


def open_lab(args: Config) -> Lab:
    runs = open_runs(args)
    first, wanted = runs[0].config, ANALYSES[args.name]
    file, sets = args.data or first.get("held_out"), []
    if wanted.n is not None:
        if not args.benchmarks and file is None:
            sys.exit("the run was trained on --data without --held-out: give the problems to use with --data FILE")
        sets = benchmarks(args.benchmarks) if args.benchmarks else [problems_of(file)]
        sets = [drawn(one, args.seed) for one in sets] if args.data and not wanted.accuracies else sets
    n = args.n or (None if args.benchmarks and wanted.accuracies else wanted.n)
    room = {}  # the largest tensor at every place: vLLM makes room for the LoRA of the highest rank
    for place, s in (item for run in runs for item in run.vectors.items()):
        room[place] = max(s, room.get(place, s), key=torch.numel)
    how = {"holds": room, "folder": home_of(args.runs[0]).parent / "answers"}
    like = {run.config["model"]: run.config for run in reversed(runs)}
    recipients = [Subject.of_run(like.get(name, first), args, name=name, **how) for name in args.recipients]
    subject = Subject.of_run(first, args, **how)
    if args.sample_heads or args.name == "attention":
        if args.sampler == "vllm":
            sys.exit(f"--sampler vllm: {args.name} samples with the Hugging Face model here; leave --sampler out")
        subject.sampler = "hf"  # vLLM cannot use hooks, and an engine beside a copy of the model does not fit
    return Lab(args, subject, runs, [problems.first(n) for problems in sets], recipients)


def labels_of(runs: list[Run]) -> list[str]:
    """What tells the runs apart in a table: their labels, or where several have the same their folders."""
    times = Counter(run.label for run in runs)
    return [run.label if times[run.label] == 1 else run.name for run in runs]


def layer_vectors(lab: Lab, runs: list[Run] | None = None) -> dict[int, Run]:
    """{layer: run} of runs with one vector each, at the end of a layer; exits if one is not like that."""
    found = {}
    for run in lab.runs if runs is None else runs:
        layer, *others = run.vectors or (None,)
        if others or not isinstance(layer, int):
            sys.exit(f"{lab.args.name} wants runs with one vector at the end of a layer; {run.folder} has {run.places}")
        if other := found.get(layer):
            sys.exit(f"{lab.args.name} wants one run per layer; {other.folder} and {run.folder} both have {layer}")
        found[layer] = run
    return dict(sorted(found.items()))


def singles_and_all(lab: Lab) -> tuple[dict[int, Run], Run | None]:
    """({layer: run with a vector there alone}, the run with a vector at every layer or None)."""
    whole = [run for run in lab.runs if len(run.vectors) == lab.depth > 1]
    if len(whole) > 1:
        sys.exit(f"{lab.args.name} wants at most one all-layer run, got {', '.join(str(run.folder) for run in whole)}")
    singles = [run for run in lab.runs if run not in whole and not run.full]
    return layer_vectors(lab, singles), whole[0] if whole else None


# ------------------------------------------------------------------------------------------------------ shared tools


def random_like(s: torch.Tensor, seed: int, place) -> torch.Tensor:
    """A random vector with the norm of s, different for every place and seed. (D,)"""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{place}".encode()))
    return (normalize(torch.randn(len(s), generator=draw), dim=0) * s.norm().cpu()).to(s.device)


def moved(vectors: dict, depth: int) -> dict:
    """The same vectors, each half the depth away from its own layer."""

    def away(place):
        layer = model.split(place).layer
        there = str(place).replace(str(layer), str((layer + depth // 2) % depth), 1)
        return int(there) if there.isdigit() else there

    return {away(place): s for place, s in vectors.items()}


def segments(prompts: list[list[int]], other: list[int]) -> list[list[str]]:
    """
    For every token of each prompt "system", "question" or "turn" (the rest of the template, after the question).

    other: a prompt with another question; what a prompt shares with it at either end is the template.
    """
    found = []
    for prompt in prompts:
        room = min(len(prompt), len(other))
        before = next((i for i in range(room) if prompt[i] != other[i]), room)
        after = next((i for i in range(room - before) if prompt[-1 - i] != other[-1 - i]), room - before)
        found.append(["system"] * before + ["question"] * (len(prompt) - before - after) + ["turn"] * after)
    return found


def resampled(n: int, draws: int = 1000) -> torch.Tensor:
    """How often each of n problems is in each bootstrap sample, (draws + 1, n). The first row is the data: all 1."""
    counts = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=draws)
    return torch.cat([torch.ones(1, n), torch.from_numpy(counts).float()])


@torch.no_grad()
def states(llm, way, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """The states that predict the completions' tokens, inside the context way(): (completion tokens, D)."""
    with way():
        h, before = model.read(llm, prompts, completions)
    return h[before]


@torch.no_grad()
def log_probs(llm, *several: torch.Tensor, chunk=512) -> Iterator[tuple[torch.Tensor, ...]]:
    """log p of the next tokens for several (N, D) states, in parts of (n, V), n <= chunk: (N, V) never exists."""
    for part in zip(*(h.split(chunk) for h in several)):
        yield tuple(model.logits(llm, h, exact=True).log_softmax(-1) for h in part)


def other_dtype(llm):
    """A copy in another dtype, to measure rounding: bf16 for an fp32 model, else fp32."""
    other = copy.deepcopy(llm)
    for name, p in [*other.named_parameters(), *other.named_buffers()]:
        if p.is_floating_point() and "inv_freq" not in name:  # not llm.to, which would round rotary frequencies, too
            p.data = p.data.to(torch.bfloat16 if llm.dtype == torch.float32 else torch.float32)
    return other


def floor(llm, prompts, completions, texts=32) -> dict[str, float]:
    """
    What rounding alone does: the base model against itself in another dtype, over the tokens of the first texts.

    {"delta_p": mean of the largest increase, "kl": mean KL in nats, "tokens"}. Both compute the logits in fp32.
    """
    parts, device = list(batches_of(prompts[:texts], completions[:texts])), llm.device
    own = torch.cat([states(llm, ExitStack, *part[1:]) for part in parts])
    other = other_dtype(llm.cpu()).to(device)  # one after the other: with vLLM on it, a GPU has no room for both
    rounded = torch.cat([states(other, ExitStack, *part[1:]) for part in parts])
    del other
    llm.to(device)
    delta = torch.cat([(q.exp() - p.exp()).amax(-1) for p, q in log_probs(llm, own, rounded)])
    return {"delta_p": delta.mean().item(), "kl": kl(llm, own, rounded).mean().item(), "tokens": len(own)}


def batches_of(prompts, completions, tokens=4096, desc="texts") -> Iterator[tuple[list[int], list, list]]:
    """(numbers of the rows, their prompts, their completions), at most so many tokens at a time."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for batch in Bar(model.batches(lengths, tokens), desc=desc, unit="batches"):
        yield batch, [prompts[i] for i in batch], [completions[i] for i in batch]


def over_base(found: dict[str, Estimate], *first: str) -> list[list[str]]:
    """Rows of a table: what is given first, the condition, its accuracy, the difference to the base model's."""
    return [[*first, name, one.text(), (one - found["base"]).text("+")] for name, one in found.items()]


# -------------------------------------------------------------------------------------------------------------- lens


def read_out(s: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The logit lens of a vector: <s, u_v> and <s, u_v> / (|s| |u_v|) for every token v (B Sec. 4.2; P4 Sec. 5, App. G).

    s: (D,); U: (V, D), rows of the unembedding. Returns (dot products, cosines), both (V,). The final norm is left out.
    """
    dot = U.float() @ s.float()
    return dot, dot / (s.float().norm() * U.float().norm(dim=-1)).clamp(min=1e-12)


def folded(llm, U: torch.Tensor) -> torch.Tensor:
    """Rows of the unembedding times the gain g of the final norm, u_v * g. (V, D)"""
    norms = [module for module in llm.get_decoder().children() if "norm" in type(module).__name__.lower()]
    if not norms:
        sys.exit(f"lens: models of the type {llm.config.model_type} have no final norm, whose gain it folds in")
    x = torch.ones_like(U[:1], dtype=llm.dtype)
    x[:, ::2] = -1  # of mean 0 and size 1: any kind of norm maps it to x g, perhaps plus a bias
    return U.float() * (x * (norms[-1](x) - norms[-1](-x)) / 2).float()


@analysis("P4 Table 8, B Table 2", n=None)
def lens(lab: Lab) -> dict:
    """Which tokens does the vector point at?"""
    U = lab.llm.get_output_embeddings().weight[: len(lab.tokenizer)].float()  # no token uses the remaining rows
    gained, top = folded(lab.llm, U), min(lab.args.top, len(U))
    # the largest dot product and cosine that 95 % of random directions stay below
    noise = normalize(torch.randn(200, U.shape[1], generator=torch.Generator().manual_seed(lab.args.seed)), dim=-1)
    dots = noise.to(U.device) @ U.T  # (200, V)
    chance_dot, chance = (x.amax(1).quantile(0.95).item() for x in (dots, dots / U.norm(dim=-1).clamp(min=1e-12)))
    found, table = {}, []
    for run, name in zip(lab.runs, labels_of(lab.runs)):
        for place, s in run.vectors.items():
            if model.split(place).site not in (*model.SITES, *model.ON_THE_STREAM):
                sys.exit(f"lens wants vectors as wide as the residual stream; {run.folder} has one at {place}")
            label = name + f": {place}" * (len(run.vectors) > 1) if len(lab.runs) > 1 else str(place)
            plain, behind_norm = (read_out(s.to(U.device), rows) for rows in (U, gained))  # (dot products, cosines)
            found[label] = {"chance dot": chance_dot * s.norm().item()}
            for kind, by, (dot, cosine) in (
                ("cosine", plain[1], plain),
                ("lowest cosine", -plain[1], plain),
                ("dot", plain[0], plain),
                ("lowest dot", -plain[0], plain),
                ("dot, gain folded in", behind_norm[0], behind_norm),
                ("cosine, gain folded in", behind_norm[1], behind_norm),
            ):
                ids = by.topk(top).indices.tolist()
                found[label][kind] = [[piece(lab.tokenizer, i), dot[i].item(), cosine[i].item()] for i in ids]
                for i, (token, x, y) in enumerate(found[label][kind], 1):
                    table.append([label, kind, str(i), quoted(token), f"{x:.3g}", f"{y:.2f}"])
    best = max(found, key=lambda label: found[label]["cosine"][0][2])
    (by_cosine, _, cosine), (by_dot, dot, _) = found[best]["cosine"][0], found[best]["dot"][0]
    (away, _, least), (down, lowest, _) = found[best]["lowest cosine"][0], found[best]["lowest dot"][0]
    reading = (
        f"Layer {best}: the largest cosine is {cosine:.2f} with {quoted(by_cosine)}, the lowest {least:.2f} with "
        f"{quoted(away)}; the largest dot product is {dot:.3g} with {quoted(by_dot)}, the lowest {lowest:.3g} with "
        f"{quoted(down)}. Of random directions 95 % stay below "
        f"{chance:.2f} and {found[best]['chance dot']:.3g}, upwards and downwards alike. Reading is not steering: a "
        "vector may steer where the lens shows nothing, and what it shows need not be what steers."
    )
    head = ["layer", "order", "rank", "token", "dot product", "cosine"]
    return finding(reading, head, table, chance=chance, vectors=found)


# ------------------------------------------------------------------------------------- next tokens: shift, prefix, case


@torch.no_grad()
def next_tokens(llm, ways: list[dict], prompts, completions, chunk: int = 512) -> Iterator[tuple]:
    """
    p(x; s) at every position of given answers under several sets of vectors s, {} for the base model (P4 Sec. 5).

    Teacher-forced, T = 1. Yields (probabilities, row, position): for each set (n, V) fp32, n <= chunk; (n,) number of
    the answer; (n,) position in it, where the last token of the prompt predicts position 0.
    """
    for batch, *texts in batches_of(prompts, completions, desc="probabilities"):
        several = [states(llm, partial(model.steer, llm, given), *texts) for given in ways]
        at = torch.tensor([(i, t) for i in batch for t in range(len(completions[i]))])
        for logps, part in zip(log_probs(llm, *several, chunk=chunk), at.split(chunk)):
            yield [logp.exp() for logp in logps], part[:, 0], part[:, 1]


def largest_shifts(llm, vectors: dict, prompts, completions) -> list[tuple[int, int, int, float]]:
    """At every position of the answers the token that gains most: [(answer, position, token, p(x; s) - p(x))]."""
    found = []
    for (base, steered), row, position in next_tokens(llm, [{}, vectors], prompts, completions):
        most = (steered - base).max(-1)
        found += zip(row.tolist(), position.tolist(), most.indices.tolist(), most.values.tolist())
    return found


def shifts_of(lab: Lab, run: Run) -> tuple[list, int, list]:
    """(largest_shifts of the answers that ended, their number, [(token that gains most at position 0, how often)])."""
    rolled = [(p, c) for p, c, ended in zip(*lab.answered(run.vectors, "steered")) if ended]
    if not rolled:
        sys.exit(f"{run.folder}: none of {len(lab.texts.rows)} answers ended by itself; raise --max-tokens or --n")
    found = lab.once("shifts", run.vectors, lambda: largest_shifts(lab.llm, run.vectors, *zip(*rolled)))
    return found, len(rolled), Counter(token for _, position, token, _ in found if position == 0).most_common()


@analysis("P4 Fig. 4 left, 13", most=1, takes=("lora",))
def shift(lab: Lab, tokens: int = 5, positions: int = 60) -> dict:
    """
    Which probabilities does it raise, and where? Each position counts for one token, as in the authors' code.

    The papers used 1,000 random prompts. `analyze.py shift RUN --data data/deepscaler.jsonl --n 1000` draws as many of
    the same data (P4 Fig. 4), and `--data data/open-s1.jsonl` those of Fig. 13.
    """
    (run,) = lab.runs
    largest, answers_read, [(first, times), *_] = shifts_of(lab, run)
    rounding = lab.once("floor", run.vectors, lambda: floor(lab.llm, *lab.answered(run.vectors, "steered")[:2]))
    grouped, by_position, later = {}, {}, {}
    for row, position, token, delta in largest:
        grouped.setdefault(token, []).append(delta)
        by_position.setdefault(position, []).append([delta])
        if position > 0:
            later.setdefault(row, []).append(delta)
    top = sorted(grouped, key=lambda token: max(grouped[token]), reverse=True)[:tokens]
    boxes = [{"token": piece(lab.tokenizer, token), "where": "any position"} | spread(grouped[token]) for token in top]
    at_first = [delta for _, position, token, delta in largest if (position, token) == (0, first)]
    boxes.append({"token": piece(lab.tokenizer, first), "where": "position 0"} | spread(at_first))
    curve = {t: Estimate.of(by_position[t]) for t in sorted(by_position)[:positions]}
    after = Estimate.of(list(later.values())) if later else None
    reading = f"On the first token of {answers_read} answers the largest increase is {curve[0].plain()}, for "
    reading += f"{quoted(boxes[-1]['token'])} in {times}" + (f"; later it is {after.plain()}" if after else "")
    reading += f". Rounding alone (another dtype) makes {rounding['delta_p']:.2g}."
    table = [[quoted(b["token"]), b["where"], str(b["count"]), f"{b['med']:.3f}", f"{b['max']:.3f}"] for b in boxes]
    points = [e.json() | {"position": t, "n": len(by_position[t])} for t, e in curve.items()]
    head = ["token", "where", "positions", "median increase", "largest"]
    numbers = {"answers": answers_read, "boxes": boxes, "later": after, "by_position": points, "floor": rounding}
    return finding(reading, head, table, **numbers)


@analysis("P4 Fig. 4 right", most=1, accuracies=True)
def prefix(lab: Lab) -> dict:
    """How much of the vector is its first token?"""
    (run,) = lab.runs
    token, forced = lab.args.token, lab.args.token  # a text of yours, or the very token that gains most at position 0
    if token is None:
        forced = [shifts_of(lab, run)[2][0][0]]  # as an id: the text of a part of a character would give other tokens
        token = piece(lab.tokenizer, *forced)
    conditions = {"base": ({}, ""), f"base + {quoted(token)}": ({}, forced), "vector": (run.vectors, "")}
    if lab.args.controls:
        conditions["random vector"] = ({p: random_like(s, lab.args.seed, p) for p, s in run.vectors.items()}, "")
        conditions["vector, half the depth away"] = (moved(run.vectors, lab.depth), "")
    found, said, table = {}, [], []
    for decoding, T in (("greedy", 0.0), ("T = 1", 1.0)):
        row = {name: lab.accuracy(given, name, T, text) for name, (given, text) in conditions.items()}
        base, forced, vector, *_ = row.values()
        share = forced.share(base, vector)
        table += over_base(row, decoding)
        found[decoding] = row | {"share": share}
        gains = (vector - base).text("+"), (forced - base).text("+")
        said.append(f"{decoding}: the vector gains {gains[0]} points, the token {gains[1]}")
        said[-1] += "" if share.unclear else f", {share.plain()} of it"
    reading = f"The first token {quoted(token)}, forced, against the vector: " + "; ".join(said) + "."
    head = ["decoding", "condition", "right answers %", "over base"]
    return finding(reading, head, table, token=token, conditions=list(conditions), by_decoding=found)


def after_attention(lab: Lab, run: Run) -> dict[str, dict]:
    """As in P4 Fig. 6, the vector of layer l after the attention of the next block, or of the last; else {}."""
    if list(map(type, run.vectors)) != [int] or lab.llm.config.model_type not in model.SITES_OF:
        return {}
    ((layer, s),) = run.vectors.items()
    block = min(layer + 1, lab.depth - 1)
    return {f"After the attention of layer {block}": {f"{block}.attention": s}}


@analysis("P4 Fig. 6", most=1, takes=("lora",), n=4)
def case(lab: Lab) -> dict:
    """What does it change in an answer, token by token? The change in each token's p, with the vector at two places."""
    (run,) = lab.runs
    prompts, completions, _ = lab.answered(run.vectors, "steered")
    forms = {"At its own place": run.vectors} | after_attention(lab, run)

    def listed(probabilities):
        top = probabilities.topk(min(5, len(probabilities)))
        return [[piece(lab.tokenizer, i), p] for i, p in zip(top.indices.tolist(), top.values.tolist())]

    shown = [{"problem": row["problem"], "answer": row["answer"], "tokens": []} for row in lab.texts.rows]
    for several, row, position in next_tokens(lab.llm, [{}, *forms.values()], prompts, completions):
        for (b, *steered), i, t in zip(zip(*several), row.tolist(), position.tolist()):
            y = completions[i][t]
            entry = {"text": piece(lab.tokenizer, y), "base": b[y].item(), "top_base": listed(b), "forms": {}}
            for form, s in zip(forms, steered):
                differs = (b.argmax() != s.argmax()).item()
                entry["forms"][form] = {"steered": s[y].item(), "top_steered": listed(s), "differs": differs}
            shown[i]["tokens"].append(entry)
    tokens, said, table = [t for text in shown for t in text["tokens"]], [], []
    for form in forms:
        seen = [(quoted(t["text"]), t["base"], t["forms"][form]["steered"]) for t in tokens]
        order = sorted(seen, key=lambda t: t[1] - t[2])  # the token that it raises most comes first
        (most, before, after), changed = order[0], sum(t["forms"][form]["differs"] for t in tokens)
        said.append(
            f"{form} the vector changes the most likely token at {changed} of {len(tokens)} positions in {len(shown)} "
            f"answers; it raises {most} most, from {before:.2f} to {after:.2f}."
        )
        table += [[form, token, f"{p:.3f}", f"{p_s:.3f}"] for token, p, p_s in order[:5] + order[-5:]]
    said += ["P4 Fig. 6's form, after an attention, is for one vector at the end of a layer."] * (len(forms) == 1)
    head = ["vector", "token", "p, base", "p, steered"]
    return finding(" ".join(said), head, table, forms=list(forms), answers=shown)


# ------------------------------------------------------------ accuracies: sweep, ablate, compose, sites, transfer


@analysis("P4 Fig. 1, 9; Tables 2 to 5", takes=("full",), accuracies=True)
def sweep(lab: Lab) -> dict:
    """Which layer to steer? With a run of --layer all and one of --method full it has the papers' upper lines, too."""
    full = [run for run in lab.runs if run.full]
    if len(full) > 1:
        sys.exit(f"sweep wants at most one run of all weights, got {', '.join(str(run.folder) for run in full)}")
    runs, whole = singles_and_all(lab)
    if not runs:
        sys.exit("sweep wants at least one run with a vector at a single layer: train.py --layer 14, for example")
    if full and lab.args.tensor_parallel > 1:
        sys.exit("--tensor-parallel wants 1 with a run of all weights: they reach vLLM only inside one process")
    conditions = {"base": {}} | ({"all": whole.vectors} if whole else {})
    conditions |= {str(layer): run.vectors for layer, run in runs.items()}
    if lab.args.controls:
        for layer, run in runs.items():
            conditions[f"random {layer}"] = {layer: random_like(run.vectors[layer], lab.args.seed, layer)}
            conditions[f"moved {layer}"] = moved(run.vectors, lab.depth)
    decodings, said, table = {"T = 1": 1.0, "greedy": 0.0}, [], []
    found = {decoding: lab.compare(conditions, T) for decoding, T in decodings.items()}
    for run in full:  # its weights replace the base model's, so it comes last
        lab.subject.swap(str(run.folder / "weights"))
        for decoding, T in decodings.items():
            found[decoding]["full"] = lab.accuracy({}, "all weights", T)
        lab.subject.swap(lab.subject.name)
    for decoding, row in found.items():
        best = max(map(str, runs), key=lambda layer: row[layer].value)  # noqa: B023, used at once
        named = {"base": "base", best: f"best layer {best}", "all": "all layers", "full": "all weights"}
        said.append(f"{decoding}: " + ", ".join(f"{words} {row[k].text()} %" for k, words in named.items() if k in row))
        table += over_base(row, decoding)
    head = ["decoding", "layer", "right answers %", "over base"]
    return finding("; ".join(said) + ".", head, table, layers=list(runs), depth=lab.depth, by_decoding=found)


@analysis("ours", most=1, accuracies=True)
def ablate(lab: Lab) -> dict:
    """Which vectors of a set matter? Leave one out, or keep only that one."""
    (run,) = lab.runs
    if len(run.vectors) < 2:
        sys.exit(f"ablate wants a run with several vectors, for example of --layer all; {run.folder} has {run.places}")
    conditions = {"all": run.vectors, "base": {}}
    for place in run.vectors:
        conditions[f"without {place}"] = {other: s for other, s in run.vectors.items() if other != place}
        conditions[f"only {place}"] = {place: run.vectors[place]}
    found = lab.compare(conditions)
    loss = {place: found["all"] - found[f"without {place}"] for place in run.vectors}
    most, best = max(loss, key=lambda p: loss[p].value), max(loss, key=lambda p: found[f"only {p}"].value)
    reading = (
        f"All vectors: {found['all'].text()} %, base {found['base'].text()} %. Most is lost without layer {most} "
        f"({loss[most].text('+')} points); alone, layer {best} is best ({found[f'only {best}'].text()} %)."
    )
    table = [[str(p), found[f"without {p}"].text(), loss[p].text("+"), found[f"only {p}"].text()] for p in run.vectors]
    head = ["layer", "without it %", "all minus that", "only it %"]
    return finding(reading, head, table, layers=list(map(str, run.vectors)), conditions=found, loss=loss)


def pair_gain(pair: Estimate, one: Estimate, other: Estimate, whole: Estimate) -> dict:
    """
    What a pair of vectors gains over the better single one, which is chosen anew in every bootstrap draw (P1 Sec. 5).

    "share": (Acc(pair) - Acc(single)) / (Acc(all layers) - Acc(single)); (0.5, 0.2, 0.4, 0.6) -> 0.1 / 0.2.
    "over_single": 0.5 - 0.4, which has a meaning even if the share has none. "cross": the pair reaches 99 % of all
    layers (P1 Fig. 5).
    """
    single = Estimate.largest(one, other)
    return {"share": pair.share(single, whole), "over_single": pair - single, "cross": pair.value >= 0.99 * whole.value}


@analysis("P1 Fig. 5, Table 2", least=3, accuracies=True)
def compose(lab: Lab) -> dict:
    """Do pairs of vectors add up? --controls also adds half of each: is the sum of both just too large?"""
    runs, whole = singles_and_all(lab)
    if whole is None or len(runs) < 2:
        sys.exit("compose wants two or more single-layer runs and the all-layer run (train.py --layer all)")
    pairs = {f"{i}+{j}": (i, j) for i in runs for j in runs if i < j}
    conditions = {"all": whole.vectors, "base": {}} | {str(l): run.vectors for l, run in runs.items()}
    conditions |= {name: runs[i].vectors | runs[j].vectors for name, (i, j) in pairs.items()}
    kinds = {"": "", "half of ": " with half of each vector"} if lab.args.controls else {"": ""}
    for name in pairs if lab.args.controls else ():
        conditions[f"half of {name}"] = {place: s / 2 for place, s in conditions[name].items()}
    found, gains, said, table = lab.compare(conditions), {}, [], []
    for kind, words in kinds.items():
        gains[kind] = gain = {}
        for name, (i, j) in pairs.items():
            gain[name] = pair_gain(found[kind + name], found[str(i)], found[str(j)], found["all"])
        best = max(pairs, key=lambda name: found[kind + name].value)  # noqa: B023, used at once
        over = [g["over_single"] for g in gain.values()]
        below, above = sum(o.interval[1] < 0 for o in over), sum(o.interval[0] > 0 for o in over)
        crosses, unclear = sum(g["cross"] for g in gain.values()), sum(g["share"].unclear for g in gain.values())
        said.append(
            f"The best pair{words} is {best}, {found[kind + best].text()} %. On average a pair is "
            f"{100 * statistics.mean(o.value for o in over):+.1f} points over the better single. Of {len(pairs)} pairs "
            f"{below} are clearly below it, {above} clearly above; {crosses} reach 99 % of all layers; for {unclear} "
            "all layers are not clearly above the single."
        )
        for name, g in gain.items():
            share = "not to be judged" if g["share"].unclear else g["share"].plain()
            table.append([kind + name, found[kind + name].text(), g["over_single"].text("+"), share])
    reading = " ".join(said) + f" All layers: {found['all'].text()} %."
    head = ["layers", "right answers %", "over the better single", "normalised gain"]
    both = {"gains": gains[""], "halves": gains.get("half of ")}
    return finding(reading, head, table, layers=list(runs), conditions=found, **both)


@analysis("P4 Fig. 10, P1 Fig. 8", takes=("lora",), accuracies=True)
def sites(lab: Lab) -> dict:
    """Where in a layer does a vector work?"""
    labels = labels_of(lab.runs)
    found = lab.compare({"base": {}} | {label: run.vectors for label, run in zip(labels, lab.runs)})
    best, worst = (pick(labels, key=lambda name: found[name].value) for pick in (max, min))
    reading = f"Base {found['base'].text()} %; highest: {best}, {found[best].text()} %"
    reading += f"; lowest: {worst}, {found[worst].text()} %"
    if best != worst:
        reading += f"; their difference: {(found[best] - found[worst]).text('+')} points"
    return finding(reading + ".", ["run", "right answers %", "over base"], over_base(found), conditions=found)


@analysis("P4 App. F, Fig. 12", accuracies=True)
def orthogonal(lab: Lab) -> dict:
    """Is there a second direction?"""
    return sites(lab)


@analysis("P4 Sec. 7, Table 1, App. J", takes=("lora",), accuracies=True)
def transfer(lab: Lab) -> dict:
    """Do vectors work in other models? Their gain there, as a share of the gain of the recipient's own vectors."""
    found, table, foreign = {}, [], []
    for recipient in lab.recipients:
        row = {"base": lab.accuracy({}, f"{recipient.name}, base", subject=recipient)}
        for run in lab.runs:
            vectors, _ = model.load_vectors(run.folder / "vectors.safetensors", recipient.config)
            row[run.name] = lab.accuracy(vectors, f"{recipient.name}, {run.name}", subject=recipient)
        recipient.free()
        own = next((run.name for run in lab.runs if run.config["model"] == recipient.name), None)
        shares = {name: row[name].share(row["base"], row[own]) for name in row if own and name != "base"}
        found[recipient.name] = {"accuracies": row, "shares": shares}
        for run in lab.runs:
            name, gain = run.name, row[run.name] - row["base"]
            share = shares[name].plain() if name in shares and not shares[name].unclear else ""
            table.append([recipient.name, name, row[name].text(), gain.text("+"), share])
            if run.config["model"] != recipient.name:
                foreign.append((gain.value, table[-1]))
    reading = "No vectors came from another model."
    if foreign:
        name, donor, _, gain, share = max(foreign)[1]
        reading = f"The largest transfer: vectors of {donor} in {name} gain {gain} points"
        reading += f", {share} of what its own gain." if share else "."
    head = ["recipient", "vectors of", "right answers %", "gain", "share of the own gain"]
    return finding(reading, head, table, donors=[run.name for run in lab.runs], recipients=found)


# ------------------------------------------------------------------------------------------- persistence, similarity


@torch.no_grad()
def shift_sums(llm, vectors: dict, prompts, completions, layers: list[int]) -> tuple[torch.Tensor, ...]:
    """
    Sums over the tokens of each text of Delta / |Delta| and of Delta = F_l(x; s) - F_l(x), after layer l (P4 Sec. 4).

    As in the authors' code (match_effect.py), the prompt's tokens count, and the last two of a text do not.
    Returns (units, shifts, counts): (n, len(layers), D) twice, fp32, and (n,). They are all that a mean cosine needs:
    mean over tokens of cos(Delta, m) = (sum of Delta / |Delta|) . m / (|m| count).
    """
    units = torch.zeros(len(prompts), len(layers), llm.config.hidden_size)
    shifts, counts = torch.zeros_like(units), torch.zeros(len(prompts))
    for batch, *texts in batches_of(prompts, completions, desc="shifts"):
        lengths = torch.tensor([len(p) + len(c) for p, c in zip(*texts)])
        counts[batch] = (lengths - 2).float()
        base, mask = {}, (torch.arange(lengths.max()) < lengths[:, None] - 2).to(llm.device)  # (B, T)

        def see(layer, module, args, h):
            base[layer] = h.float()  # noqa: B023, used at once

        def compare(layer, module, args, h):
            delta = (h.float() - base.pop(layer)) * mask[..., None]  # noqa: B023
            unit = delta / delta.norm(dim=-1, keepdim=True).clamp(min=1e-20)
            i = layers.index(layer)
            units[batch, i], shifts[batch, i] = unit.sum(1).cpu(), delta.sum(1).cpu()  # noqa: B023

        for given, look in (({}, see), (vectors, compare)):
            with model.steer(llm, given):  # first, because hooks run in the order in which they were made
                with model.hooks([(model.decoder_layers(llm)[layer], partial(look, layer)) for layer in layers]):
                    model.read(llm, *texts)
    return units, shifts, counts


def persistence_of(units, shifts, counts, targets: dict[int, torch.Tensor], layers: list[int]) -> dict[str, list]:
    """
    Mean cosines, over all tokens of all texts, after the layer of the vector and every later layer l; from shift_sums.

    diff_diff = E[cos(Delta_l, E Delta_l)], E over all texts (P4 Sec. 4). diff_diff_authors has the mean of the token's
    own text instead of E Delta_l, as the authors' code and so P4 Tables 6 and 7. diff_vector = E[cos(Delta_l, s_l)];
    None if targets has no s_l.
    """
    found = {"diff_diff": [], "diff_diff_authors": [], "diff_vector": []}
    W = resampled(len(counts))  # (draws + 1, n)
    total = W @ counts  # tokens
    for i, layer in enumerate(layers):
        u = (W @ units[:, i]) / total[:, None]  # mean unit vector, (draws + 1, D)
        own = (units[:, i] * normalize(shifts[:, i], dim=-1)).sum(-1)  # (n,), sums over the tokens of a text
        cosines = {"diff_diff": (u * normalize(W @ shifts[:, i], dim=-1)).sum(-1), "diff_diff_authors": W @ own / total}
        cosines["diff_vector"] = u @ normalize(targets[layer].float(), dim=0) if layer in targets else None
        for kind, x in cosines.items():
            found[kind].append(None if x is None else Estimate(x[0].item(), x[1:].numpy()))
    return found


@analysis("P4 Sec. 4, Fig. 2, Tables 6 and 7")
def persistence(lab: Lab) -> dict:
    """How does the shift that a vector makes change on its way through the later layers?"""
    runs, found, table, least = layer_vectors(lab), {}, [], {}
    kinds = {"diff_diff": "Diff-Diff", "diff_diff_authors": "Diff-Diff, own text", "diff_vector": "Diff-Vector"}
    targets = {layer: run.vectors[layer] for layer, run in runs.items()}

    def compute(layer, run):
        prompts, completions, _ = lab.answered(run.vectors, f"layer {layer}")
        later = list(range(layer, lab.depth))
        sums = shift_sums(lab.llm, run.vectors, prompts, completions, later)
        return {"layers": later} | persistence_of(*sums, targets, later)

    for layer, run in runs.items():
        found[str(layer)] = lab.once(f"persistence {identity(targets)}", run.vectors, partial(compute, layer, run))
        for l, *cosines in zip(*(found[str(layer)][key] for key in ("layers", *kinds))):
            table.append([str(layer), str(l), *("" if x is None else f"{x['value']:.3f}" for x in cosines)])
    for kind in ("diff_diff", "diff_diff_authors"):
        seen = [(x["value"], i, l, x["interval_95"]) for i, f in found.items() for l, x in zip(f["layers"], f[kind])]
        value, i, l, (low, high) = min(seen)
        least[kind] = f"{value:.2f} [{low:.2f}, {high:.2f}] (layer {i} seen after layer {l})"
    reading = f"The shift keeps a common direction: Diff-Diff is at least {least['diff_diff']}; by the authors' rule, "
    reading += f"with the mean shift of the own text (P4 Tables 6 and 7), {least['diff_diff_authors']}"
    if others := [v["value"] for f in found.values() for v in f["diff_vector"][1:] if v is not None]:
        mean, most = statistics.mean(others), max(others)
        reading += f"; Diff-Vector, with the later layers' own vectors, is {mean:.2f} on average, at most {most:.2f}"
    head = ["layer of the vector", "seen after layer", *kinds.values()]
    return finding(reading + ".", head, table, depth=lab.depth, by_layer=found)


@analysis("P4 Fig. 3, 11", least=2)
def similarity(lab: Lab) -> dict:
    """Do shifts from all layers end up alike? Cosines of mean shifts after the last block, before the final norm."""
    runs, means = layer_vectors(lab), []  # (draws + 1, D) for each run
    for layer, run in runs.items():
        prompts, completions, _ = lab.answered(run.vectors, f"layer {layer}")
        _, shifts, counts = shift_sums(lab.llm, run.vectors, prompts, completions, [lab.depth - 1])
        W = resampled(len(counts))
        means.append(normalize((W @ shifts[:, 0]) / (W @ counts)[:, None], dim=-1))
    M = torch.stack(means, 1)  # (draws + 1, runs, D)
    draws, layers = (M @ M.transpose(1, 2)).numpy(), list(runs)  # (draws + 1, runs, runs)
    pairs = {}
    for i, j in zip(*np.tril_indices(len(layers), -1)):
        pairs[layers[j], layers[i]] = Estimate(float(draws[0, i, j]), draws[1:, i, j])
    one, other = least = min(pairs, key=lambda pair: pairs[pair].value)
    reading = (
        f"The mean shifts at the last block are least alike for layers {one} and {other}: cosine "
        f"{pairs[least].plain()}; the median of all pairs is {statistics.median(e.value for e in pairs.values()):.2f}."
    )
    table = [[str(one), str(other), e.plain()] for (one, other), e in pairs.items()]
    listed = [e.json() | {"layers": list(pair)} for pair, e in pairs.items()]
    numbers = {"layers": layers, "cosine": draws[0].tolist(), "pairs": listed}
    return finding(reading, ["layer", "layer", "cosine"], table, **numbers)


# --------------------------------------------------------------------------------------------------------------- patch

# Block l turns the residual stream X into Y = X + MHA(LN(X)) and then Z = Y + MLP(LN(Y)). A vector s of layer l-1 is
# added to X, so it takes several paths at once: past the block, through its MLP, and through every query, key and value
# head. Each condition opens some of these paths (P4 Sec. 6):
#
#   Unmodified      X <- X + s: all paths
#   Skip-Attn       Y <- Y + s: all but the attention
#   Skip-Layer      Z <- Z + s: only past the block
#   Steer-Q/K/V i   Skip-Attn, and head i of one projection sees s
#   Steer-Head i    Skip-Attn, and all of head i sees s
#   Skip-Head i     Unmodified, but head i does not see s


def block_after(llm, layer: int):
    """(block l = layer + 1, which the vector of `layer` enters; number of its query heads; of its key-value heads)."""
    depth = len(model.decoder_layers(llm))
    if layer + 1 >= depth:
        sys.exit(f"layer {layer} is the last of {depth}: no block follows it; take a run of --layer {depth - 2}")
    block = model.decoder_layers(llm)[layer + 1]
    model.site_module(llm, f"{layer + 1}.attention")  # exits for a model whose blocks are not known
    attention = block.self_attn
    return block, *(p.out_features // attention.head_dim for p in (attention.q_proj, attention.k_proj))


@contextmanager
def ungrouped(attention):
    """Inside the context, every query head has its own copy of its key-value head (query h reads h // group size)."""
    groups, saved = attention.num_key_value_groups, []
    try:
        for module in (attention.k_proj, attention.v_proj):
            for name, p in list(module.named_parameters()):
                saved.append((module, name, p))
                heads = p.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, 0)
                setattr(module, name, torch.nn.Parameter(heads.flatten(0, 1), requires_grad=False))
        attention.num_key_value_groups = 1
        yield
    finally:
        attention.num_key_value_groups = groups
        for module, name, p in saved:
            setattr(module, name, p)


@contextmanager
def patched(llm, layer: int, s: torch.Tensor, q=(), k=(), v=(), whole=False, through_norm=True):
    """
    Inside the context, s of `layer` enters the next block after its attention, Y <- Y + s, and through these heads.

    For head i in q, U W_Q[i] becomes U' W_Q[i]; for key-value heads in k and v alike. whole: k and v name query heads,
    each of which gets its own keys and values. U' = LN(X + s), as in the authors' code, or with through_norm=False
    LN(X) + s, as P4 Sec. 6 writes it. Without any head this is Skip-Attn. s: (D,).
    """
    block, _, _ = block_after(llm, layer)
    attention, seen, s = block.self_attn, {}, s.to(llm.device)

    def norm(module, args, output):  # .forward, here and below, runs the module without its hooks
        seen["U'"] = module.forward(args[0] + s.to(args[0].dtype)) if through_norm else output + s.to(output.dtype)

    def project(heads, module, args, output):
        head_of = torch.arange(output.shape[-1], device=output.device) // attention.head_dim  # of every column
        chosen = torch.isin(head_of, torch.tensor(list(heads), device=output.device))
        return torch.where(chosen, module.forward(seen["U'"]), output)  # computes all heads: s = 0 changes no bit

    with ungrouped(attention) if whole else ExitStack(), model.steer(llm, {f"{layer + 1}.attention": s}):
        projections = (attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)
        pairs = [(module, partial(project, heads)) for module, heads in projections if heads]
        with model.hooks([(block.input_layernorm, norm)] * bool(pairs) + pairs):
            yield


def lines_past(layer: int, s: torch.Tensor) -> dict[str, dict]:
    """The conditions that name no head are vectors at other places: {name: vectors}."""
    return {"Unmodified": {layer: s}, "Skip-Attn": {f"{layer + 1}.attention": s}, "Skip-Layer": {layer + 1: s}}


def head_ways(llm, layer: int, s: torch.Tensor, through_norm=True) -> dict[str, list]:
    """The conditions that name a head, each a function that makes its context: {sweep: [of head 0, head 1, ...]}."""
    _, queries, keys = block_after(llm, layer)
    way = partial(patched, llm, layer, s, through_norm=through_norm)
    every = range(queries)
    return {
        "Steer-Q": [partial(way, q=[i]) for i in every],
        "Steer-K": [partial(way, k=[i]) for i in range(keys)],
        "Steer-V": [partial(way, v=[i]) for i in range(keys)],
        "Steer-Head": [partial(way, q=[i], k=[i], v=[i], whole=True) for i in every],
        "Skip-Head": [partial(way, **dict.fromkeys("qkv", [h for h in every if h != i]), whole=True) for i in every],
    }


def kl(llm, h_p: torch.Tensor, h_q: torch.Tensor, chunk=512) -> torch.Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) of next tokens, from the states of both. (n, D) -> (n,) nats."""
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in log_probs(llm, h_p, h_q, chunk=chunk)])


def kl_sums(llm, ways: dict, prompts, completions, tokens=4096) -> dict[str, list[float]]:
    """KL(Unmodified || way) in nats, summed over the tokens of each answer: {way: [one number for each answer]}."""
    sums = {name: [0.0] * len(prompts) for name in ways}
    for batch, *texts in batches_of(prompts, completions, tokens, desc="patch"):
        full = states(llm, ways["Unmodified"], *texts)
        for name, way in ways.items():
            each = kl(llm, full, states(llm, way, *texts)).split([len(c) for c in texts[1]])
            for i, x in zip(batch, each):
                sums[name][i] = x.sum().item()
    return sums


def recovery(lost: list[float], base: list[float], reference: list[float] | None = None) -> Estimate:
    """
    1 - KL(full || patched) / KL(full || base): 1 for the steered model, 0 for the base model.

    lost, base: KL of each problem, summed over its tokens, so that all tokens weigh alike in the ratio.
    reference: sums of another condition, whose recovery is subtracted. [1, 2], [4, 8] -> 0.75; with [2, 4] -> 0.25
    """
    start = base if reference is None else reference
    saved = [[x - y] for x, y in zip(start, lost, strict=True)]
    return Estimate.of(saved) / Estimate.of([[x] for x in base])


def familywise_p(gains: list[list[float]], draws=10_000, seed=0) -> list[float]:
    """
    For every head the p-value of "it changes nothing", adjusted for the number of heads by sign flips (Westfall-Young).

    gains: (heads, N), KL of the reference minus that of the head, by problem. Without an effect both signs are equally
    likely. p = share of draws of N signs in which some head is as far from 0 as this one. [[1, 1, 1]] -> about 2/8.
    """
    d = torch.tensor(gains, dtype=torch.float64)
    size = d.norm(dim=1).clamp(min=1e-300)  # sign flips do not change it, so sum / size orders the draws as t does
    signs = torch.randint(0, 2, (draws, d.shape[1]), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    largest = ((signs @ d.T).abs() / size).amax(1)  # (draws,)
    t = d.sum(1).abs() / size * (1 - 1e-9)  # less, so that the draw of all plus signs counts despite rounding
    return ((1 + (largest[:, None] >= t).sum(0)) / (1 + draws)).tolist()


def no_change(llm, layer: int, s: torch.Tensor, prompts, completions, through_norm=True) -> dict[str, float]:
    """Controls: patching the steered model with a zero vector changes nothing (with ungrouped heads: only rounding)."""
    _, queries, keys = block_after(llm, layer)
    q, kv, zero = range(queries), range(keys), torch.zeros_like(s)
    steered, found = partial(model.steer, llm, {layer: s}), {}
    plain = states(llm, steered, prompts, completions)
    for name, heads in (("no_patch", (q, kv, kv, False)), ("no_groups", (q, q, q, True))):
        with steered():
            way = partial(patched, llm, layer, zero, *heads, through_norm=through_norm)
            found[name] = (states(llm, way, prompts, completions) - plain).abs().max().item()
    return found


def under(lab: Lab, name: str, way, vectors: dict) -> Estimate:
    """The accuracy inside the context way(), measured as in Lab.accuracy. vectors: what it depends on."""
    T = lab.args.temperature

    def right(problems, k, seed):
        def ask():
            with way():
                return lab.subject.rollouts({}, problems.rows, k, temperature=T, seed=seed).texts

        # texts are kept, not grades, so that a corrected grader can grade them again
        texts = lab.once(f"accuracy {name}, {problems.name}, seed {seed}", vectors, ask)
        flat = grade(texts, [row["answer"] for row in problems.rows for _ in range(k)], lab.subject.form)
        return [flat[i : i + k] for i in range(0, len(flat), k)]

    return lab.over_sets(right, T)


def conditions_without_heads(lab: Lab) -> tuple[int, torch.Tensor, dict[str, dict]]:
    """(layer, its vector, {name: vectors}) of `patch`; exits with one line if there is no effect to follow."""
    layer, *others = runs = layer_vectors(lab)
    s = runs[layer].vectors[layer]
    if not s.any():
        sys.exit(f"the vector of layer {layer} is zero: there is no effect to follow; train it first")
    if others not in ([], [layer + 1]):
        sys.exit(f"patch wants the second run's vector at layer {layer + 1}, right after the first, got {others[0]}")
    lines = lines_past(layer, s) | ({"next vector": runs[layer + 1].vectors} if others else {})
    for seed in range(2):
        chance = lines_past(layer, random_like(s, seed, layer))
        lines |= {f"random {seed}, {name}": chance[name] for name in ("Unmodified", "Skip-Attn")}
    return layer, s, lines | {"base": {}}


@analysis("P4 Fig. 5, 7, 8, App. I", most=2, accuracies=True)
def patch(lab: Lab) -> dict:
    """
    Through which part of the next block does it act? Give the run of the next layer's own vector, too, to compare.

    Recovery is measured for every condition, on one answer of the steered model to each problem. Accuracy is that of
    new answers under each condition that names no head; with --sample-heads (the papers' Fig. 5) under all.
    """
    layer, s, lines = conditions_without_heads(lab)
    block_after(lab.llm, layer)  # exits before anything is sampled
    prompts, completions, _ = lab.answered({layer: s}, "steered")
    sweeps = head_ways(lab.llm, layer, s, lab.args.through_norm)
    heads = {f"{sweep} {i}": way for sweep, ways in sweeps.items() for i, way in enumerate(ways)}
    q, kv = range(len(sweeps["Steer-Q"])), range(len(sweeps["Steer-K"]))
    ways = {name: partial(model.steer, lab.llm, vectors) for name, vectors in lines.items()} | heads
    ways["all heads"] = partial(patched, lab.llm, layer, s, q, kv, kv)  # should be the steered model again
    every = {f"{name} {place}": vector for name, vectors in lines.items() for place, vector in vectors.items()}
    lost = lab.once("patch", every, lambda: kl_sums(lab.llm, ways, prompts, completions))
    rounding = lab.once("floor", {layer: s}, lambda: floor(lab.llm, prompts, completions))
    steered = [name for name in heads if name.startswith("Steer")]  # these are compared with Skip-Attn
    if not any(lost["base"]):
        sys.exit("the vector changes no probability in this dtype: there is no effect to follow")
    p = familywise_p([[x - y for x, y in zip(lost["Skip-Attn"], lost[name])] for name in steered])
    accuracy = lab.compare(lines) | {n: under(lab, n, way, every) for n, way in heads.items() if lab.args.sample_heads}
    found, tokens, table = {}, sum(map(len, completions)), []
    for name in ways:
        found[name] = {"recovery": recovery(lost[name], lost["base"]), "kl": sum(lost[name]) / tokens}
        if name in steered:
            over = recovery(lost[name], lost["base"], lost["Skip-Attn"])
            found[name] |= {"over_skip_attn": over, "p_adjusted": p[steered.index(name)]}
        right = accuracy[name].text() if name in accuracy else ""
        table.append([name, found[name]["recovery"].text(), f"{found[name]['kl']:.3g}", right])
    table.append(["floor: another dtype", "", f"{rounding['kl']:.3g}", ""])
    best = max(steered, key=lambda name: found[name]["over_skip_attn"].value)
    keeps = {name: found[name]["recovery"].text() for name in lines}
    reading = (
        f"The vector of layer {layer} through block {layer + 1}: Skip-Attn keeps {keeps['Skip-Attn']} % of the change "
        f"of the next-token distributions, Skip-Layer {keeps['Skip-Layer']} %. The head that adds most to Skip-Attn is "
        f"{best} with {found[best]['over_skip_attn'].text('+')} points; {sum(x < 0.05 for x in p)} of {len(p)} heads "
        f"differ from it (adjusted p < 0.05). Rounding alone (another dtype) makes a KL of {rounding['kl']:.2g} nats a "
        f"token, the vector {found['base']['kl']:.2g}. Accuracy: "
    )
    reading += ", ".join(f"{name} {accuracy[name].text()} %" for name in lines if not name.startswith("random"))
    numbers = {"layer": layer, "norm": s.norm().item(), "tokens": tokens, "floor": rounding, "lines": list(lines)}
    numbers |= {"found": found, "accuracy": accuracy, "heads": {name: len(ways) for name, ways in sweeps.items()}}
    numbers["controls"] = no_change(lab.llm, layer, s, prompts[:8], completions[:8], lab.args.through_norm)
    return finding(reading + ".", ["condition", "recovery %", "KL a token (nats)", "right answers %"], table, **numbers)


# ----------------------------------------------------------------------------------------------------------- attention


@contextmanager
def eager(llm):
    """Inside the context, attention is computed by plain matrix products, the only way that returns its weights."""
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)


@torch.no_grad()
def patterns(llm, prompt: list[int], answer: list[int], queries, reduce=lambda layer, pattern: pattern) -> dict:
    """Read one text: {layer: reduce(layer, pattern)}. pattern: (H, Q, T) fp32, the queries' weights on all keys."""
    found = {}

    def see(layer, module, args, output):  # output[1]: (1, H, T, T), reduced at once to save memory
        found[layer] = reduce(layer, output[1][0, :, queries].float())

    blocks = enumerate(model.decoder_layers(llm))
    with eager(llm), model.hooks([(block.self_attn, partial(see, layer)) for layer, block in blocks], True):
        model.read(llm, [prompt], [answer])
    return found


def pattern_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of attention rows, mean over the queries: (H, Q, T) twice -> (H,) nats. Masked keys are 0 in both."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))  # rows in bf16 only roughly add up to 1
    tiny = torch.finfo(torch.float32).tiny
    return (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum(-1).mean(-1)


def attention_kl(llm, vectors: dict, prompts, completions, queries=128, seed=0) -> dict[str, list]:
    """
    KL(steered || base) of the attention patterns of given texts, by layer and head: {"steered": (N, L, H), ...} nats.

    Also the same KL for "random" vectors of equal norms, and the "floor", the base model against itself in another
    dtype. Mean over at most `queries` positions in even steps, prompt included, because the base model's rows are held
    in memory for all layers. The first position is left out: it sees only one key.
    """
    other = other_dtype(llm)
    chance = {place: random_like(s, seed, place) for place, s in vectors.items()}
    runs = {"steered": (llm, vectors), "random": (llm, chance), "floor": (other, {})}
    found = {name: [] for name in runs}  # of each text: (L, H)
    for text in Bar(list(zip(prompts, completions)), desc="attention", unit="texts"):
        last = sum(map(len, text)) - 1
        some = torch.linspace(1, last, min(queries, last)).round().long().to(llm.device)
        base = patterns(llm, *text, some)
        for name, (who, given) in runs.items():
            with model.steer(who, given):
                layers = patterns(who, *text, some, lambda layer, pattern, base=base: pattern_kl(pattern, base[layer]))
            found[name].append(torch.stack(list(layers.values())).cpu())
    return {name: torch.stack(x).double().tolist() for name, x in found.items()}


def first_seen(place) -> int:
    """The first layer whose attention a vector at this place can change: its own, if the vector stands before it."""
    layer, site, *_ = model.split(place)
    return layer + (not site.startswith(("input", "self_attn.q", "self_attn.k")))


@analysis("ours; P4 Sec. 6", most=1)
def attention(lab: Lab) -> dict:
    """Does it change where the model looks? KL of attention patterns, steered against base."""
    (run,) = lab.runs
    if not all(hasattr(block, "self_attn") for block in model.decoder_layers(lab.llm)):
        sys.exit(f"attention: not every layer of a {lab.llm.config.model_type} model has a module self_attn")
    texts = lab.answered(run.vectors, "steered")[:2]
    found = lab.once("attention", run.vectors, lambda: attention_kl(lab.llm, run.vectors, *texts, seed=lab.args.seed))
    each = {name: torch.tensor(x) for name, x in found.items()}  # (N, L, H)
    by_layer = {name: [Estimate.of(x[:, l].tolist()) for l in range(lab.depth)] for name, x in each.items()}
    by_head = {name: x.mean(0) for name, x in each.items()}
    above = min(map(first_seen, run.vectors))  # nothing can change below
    reading = f"The vector is at the last layer, {above - 1}: no attention comes after it, so none can change."
    total = None
    if above < lab.depth:
        total = {name: Estimate.of(x[:, above:].flatten(1).tolist()) for name, x in each.items()}
        text = {name: estimate.plain() for name, estimate in total.items()}
        layer, head = divmod(by_head["steered"].argmax().item(), by_head["steered"].shape[1])
        reading = (
            f"Above layer {above - 1} the vector changes attention by {text['steered']} nats a query (mean over layers "
            f"and heads), a random vector of equal norm by {text['random']}, rounding (another dtype) by "
            f"{text['floor']}; most at layer {layer}, head {head}: {by_head['steered'][layer, head]:.2g}."
        )
    table = [[str(l), *(by_layer[name][l].plain(3) for name in each)] for l in range(lab.depth)]
    numbers = {"layer": above - 1, "depth": lab.depth, "by_layer": by_layer, "above": total}
    numbers["by_head"] = {name: x.tolist() for name, x in by_head.items()}
    numbers["controls"] = {"largest_below": each["steered"][:, :above].abs().max().item()}  # 0
    return finding(reading, ["layer", *(f"{name} (nats)" for name in each)], table, **numbers)


# --------------------------------------------------------------------------------------------------------- scale, cost


@torch.no_grad()
def token_scales(llm, vectors: dict, prompts, completions) -> dict[str, list[list[float]]]:
    """|B| A x_t of every token under rank-1 LoRAs, x the input of the module: {place of A: [numbers of a text]}."""
    sizes = {place: [[] for _ in prompts] for place in vectors if model.split(place).matrix == "lora_A"}
    for batch, *texts in batches_of(prompts, completions):

        def see(place, module, args, h):
            B = vectors[place.replace("lora_A", "lora_B")]
            size = B.norm() * (args[0].float() @ vectors[place][0].to(h.device))  # (B, T)
            if model.split(place).where == "answer":
                size = size * llm.answer_positions
            for b, i in enumerate(batch):  # noqa: B023, used at once
                sizes[place][i] = size[b, : len(prompts[i]) + len(completions[i])].tolist()

        with model.steer(llm, vectors), model.hooks([(model.site_module(llm, p), partial(see, p)) for p in sizes]):
            model.read(llm, *texts)
    return sizes


@analysis("P1 abstract (iii), B App. D", most=1, takes=("lora",))
def scale(lab: Lab) -> dict:
    """At which tokens does a rank-1 LoRA act? The size |B| A x_t of what it adds, where x is its module's input."""
    (run,) = lab.runs
    if {s.shape[0] for place, s in run.vectors.items() if model.split(place).matrix == "lora_A"} != {1}:
        shapes = {place: tuple(s.shape) for place, s in run.vectors.items()}
        sys.exit(f"scale wants a run of train.py --method lora --rank 1; {run.folder} holds {shapes}")
    prompts, completions, _ = lab.answered(run.vectors, "adapted")
    other = prompt_ids(lab.tokenizer, "?!", lab.subject.system, lab.subject.template)
    where = [s + ["answer"] * len(c) for s, c in zip(segments(prompts, other), completions)]
    sizes, found, table = token_scales(lab.llm, run.vectors, prompts, completions), {}, []
    for place in sizes:
        found[place] = {}
        for segment in ("system", "question", "turn", "answer"):
            texts = [[x for x, at in zip(row, ats) if at == segment] for row, ats in zip(sizes[place], where)]
            if texts := [text for text in texts if text]:
                mean = Estimate.of([[abs(x) for x in text] for text in texts])
                found[place][segment] = spread(sum(texts, [])) | {"mean": mean}
                table.append([str(model.split(place).layer), segment, mean.plain(3)])
    place = list(sizes)[-1]
    tokens = [[piece(lab.tokenizer, t), x] for t, x in zip(prompts[0] + completions[0], sizes[place][0])]
    said = ", ".join(f"{segment} {row['mean'].plain(3)}" for segment, row in found[place].items())
    reading = f"Mean size of what is added at layer {model.split(place).layer}, by part of the text: {said}."
    example = {"place": place, "tokens": tokens}
    return finding(reading, ["layer", "part of the text", "mean size"], table, by_place=found, example=example)


@analysis("B Tables 3, 5", takes=("lora", "full"), n=None)
def cost(lab: Lab) -> dict:
    """What does training cost, and, if evaluate.py has measured it, what does it bring?"""
    found, table, columns = {}, [], {}
    for run in lab.runs:
        home = home_of(run.folder)
        steps = lines_of(home / "metrics.jsonl", {"seconds_update": float, "seconds_sync": float})
        if not (home / "state.pt").is_file() or not steps:
            sys.exit(f"{home} has no state.pt or metrics.jsonl of train.py; train it again, or leave it out")
        steps = steps if home == run.folder else steps[: int(run.folder.name)]  # of a checkpoint, those before it
        state = state_of(home / "state.pt")["trained"]
        moments = [x for one in state.values() for name, x in one.items() if name != "value"]
        parts = ["seconds_sampling", "seconds_grading", "seconds_training"]
        parts += ["seconds_sync"] * run.full  # the sync of vectors is a part of the sampling
        found[run.name] = row = {
            "trained_parameters": sum(one["value"].numel() for one in state.values()),
            "optimizer_bytes": sum(x.numel() * x.element_size() for x in moments),  # of all processes together
            "training_seconds": sum(step.get(part, 0.0) for step in steps for part in parts),
            "update_seconds": statistics.median(step["seconds_update"] for step in steps),
            "sync_seconds": statistics.median(step["seconds_sync"] for step in steps),
            "sampler": run.config.get("sampler"), "label": run.label, "right": {},
        }  # fmt: skip
        file = run.folder / "eval.json"
        measured = json_of(file, [{"benchmark": str, "temperature": float | int}]) if file.is_file() else []
        names = [m["benchmark"] for m in measured]
        for m in measured:
            if m["benchmark"] == ("Avg" if "Avg" in names else names[0]) and (steered := m.get("steered")):
                decoding = f"T = {m['temperature']:g}" if m["temperature"] else "greedy"
                n = f", n = {steered['problems']}" if "problems" in steered else ""
                text = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (steered["value"], *steered["interval_95"])))
                row["right"][f"{m['benchmark']}, {decoding}{n} %"] = steered | {"text": text, "base": m.get("base")}
        columns |= dict.fromkeys(row["right"])
    for name, row in found.items():
        cells = [row["right"].get(column, {"text": ""})["text"] for column in columns]
        cells += [f"{row['trained_parameters']:,}", f"{row['optimizer_bytes'] / 1000:,.1f} kB"]
        cells += [f"{row['training_seconds']:,.0f} s", f"{row['update_seconds']:.2g} s", f"{row['sync_seconds']:.2g} s"]
        table.append([name, *cells, str(row["sampler"])])
    least, most = (pick(found, key=lambda name: found[name]["trained_parameters"]) for pick in (min, max))
    few, many = found[least]["trained_parameters"], found[most]["trained_parameters"]
    reading = f"{least} trains {few:,} numbers"
    reading += f", {most} {many:,}, {many / few:,.0f} times as many" if few < many else ""
    head = ["run", *columns, "trained numbers", "Adam's moments", "training", "update", "sync to sampler", "sampler"]
    return finding(reading + ".", head, table, runs=found)


# ----------------------------------------------------------------------------------------------------------------- main


def listed() -> str:
    """The analyses, their questions and where the papers have them, for --help."""
    first = {name: (one.compute.__doc__ or "?").strip().splitlines()[0] for name, one in ANALYSES.items()}
    return "\n".join(["Analyses:", *(f"  {name:12} {first[name]} ({ANALYSES[name].papers})" for name in first)])


def check(args: Config) -> None:
    """Exit with one line for settings that cannot work."""
    if args.name not in ANALYSES:
        sys.exit(f"no analysis {args.name!r}; there are {', '.join(ANALYSES)} and report")
    at_least(args, n=1, samples=1, top=1, rows=1, context=1, max_tokens=1, tensor_parallel=1, temperature=0)
    check_seed(args.seed)
    if args.benchmarks and args.data:
        sys.exit("give either --benchmarks or --data")
    if not ANALYSES[args.name].accuracies and (len(args.benchmarks) > 1 or "all" in args.benchmarks):
        sys.exit(f"{args.name} reads answers to one file of problems: give a single benchmark")
    least, most, given = ANALYSES[args.name].least, ANALYSES[args.name].most, len(args.runs)
    if given < least or given > (most or given):
        wanted = f"{least} or more" if most is None else f"{least} to {most}" if least < most else f"{least}"
        sys.exit(f"{args.name} wants {wanted} run folders, got {given}: python analyze.py {args.name} out/NAME")
    if (args.name == "transfer") != bool(args.recipients):
        sys.exit("transfer, and only transfer, wants --recipients MODEL...")


def command(args: Config) -> str:
    """The command line that makes these numbers."""
    given = [args.name, *args.runs]
    for name, value in asdict(args).items():
        if name in ("name", "runs", "out", "device") or value == getattr(Config, name, None):
            continue
        if isinstance(value, bool):
            given.append(flag(name) if value else flag(f"no_{name}"))
        else:
            given += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return "python analyze.py " + shlex.join(given)


@one_line()
def main(args: Config) -> dict | None:
    if args.name == "report":
        print(f"wrote {report(Path(args.runs[0] if args.runs else 'out'), list(ANALYSES))}")
        return None
    check(args)
    lab = open_lab(args)
    folder = Path(args.out or (lab.runs[0].folder / "figures" if len(lab.runs) == 1 else "out/figures"))
    path = folder / f"{args.name}.json"
    # the key does not know the files that cost reads
    doc = None if args.name == "cost" else kept(path, lab.key, {"reading": str, "table": [list]})
    if doc is None:
        about = {"name": args.name, "command": command(args), "about": lab.about}
        with waiting(args.name):
            doc = keep(path, lab.key, about | ANALYSES[args.name].compute(lab))
        write(path.with_suffix(".md"), f"{doc['reading']}\n\n{markdown(*doc['table'])}\n")
    draw(args.name, doc, path.with_suffix(".png"))
    print(f"{doc['reading']}\nwrote {path} and {path.with_suffix('.png')}")
    return doc


if __name__ == "__main__":
    main(tyro.cli(Config, description=f"{__doc__}\n{listed()}"))
