"""
Look into trained vectors: one analysis at a time, its numbers as JSON, its figure beside them.

$ python analyze.py lens out/tiny-layer27                     # tokens the vector points at (P4 Table 8, B Table 2)
$ python analyze.py shift out/tiny-layer27                    # what it does to next-token probabilities (P4 Fig. 4, left)
$ python analyze.py prefix out/tiny-layer27                   # against its top token forced as the first one (P4 Fig. 4, right)
$ python analyze.py case out/tiny-layer27                     # answers, token by token, as a page for the browser (P4 Fig. 6)
$ python analyze.py ablate out/tiny-layerall                  # all layers but one, and only one
$ python analyze.py sweep out/tiny-layer{?,??,all} out/tiny-full     # accuracy by layer (P4 Fig. 1, 9)
$ python analyze.py persistence out/tiny-layer{?,??}          # how a shift travels (P4 Fig. 2, Tables 6, 7)
$ python analyze.py similarity out/tiny-layer{?,??}           # mean shifts at the last layer (P4 Fig. 3, 11)
$ python analyze.py compose out/tiny-layer{?,??,all} --controls      # pairs of vectors added together (P1 Fig. 5, Table 2)
$ python analyze.py patch out/tiny-layer26 out/tiny-layer27   # through which part of the next block it acts (P4 Fig. 5, 7, 8)
$ python analyze.py attention out/tiny-layer26                # does it change where the model looks?
$ python analyze.py sites RUN...    $ python analyze.py orthogonal RUN...    # accuracies side by side (P4 Fig. 10, 12)
$ python analyze.py transfer RUN... --recipients MODEL...     # one model's vectors in another (P4 Tables 1, 9 to 15)
$ python analyze.py scale RUN       $ python analyze.py cost RUN...   # rank-1 LoRA by token (P1 abstract); costs (B Tables 3, 5)
$ python analyze.py report                                    # one page of all figures under out/, beside the papers' numbers

P1, P4: versions 1 and 4 of arXiv:2509.06608; B: arXiv:2505.18706. Numbers and figure go to RUN/figures/NAME.json and .png, with
several runs to out/figures/. A command whose settings are those of the JSON there computes nothing and only draws (transfer
loads its models again). All but patch and attention keep what they have in figures/parts/: an interrupted command goes on.

Every problem counts once: intervals are 95 % bootstrap intervals over problems, and conditions share problems and random seeds.
"""

import base64
import copy
import html
import json
import shlex
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
import torch
import tyro
from torch import nn
from torch.nn.functional import normalize
from tqdm import tqdm

import model
from rewards import bootstrap, grade, percentiles

matplotlib.use("Agg")  # a window system is not needed for a PNG
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data"
Name = Literal[
    "lens", "shift", "prefix", "case", "ablate", "sweep", "persistence", "similarity", "compose", "sites", "orthogonal",
    "transfer", "scale", "cost", "patch", "attention", "report",
]  # fmt: skip
# settings that change no number, or are kept in another form
FREE = ("name", "runs", "out", "draw", "device", "rows", "sampler", "vllm_memory", "tensor_parallel")
HF_ONLY = ("transfer", "patch", "attention")  # several models, or hooks inside a block: the Hugging Face model samples
ONE_RUN = ("shift", "prefix", "case", "ablate", "scale", "attention")


# fmt: off
@dataclass
class Config:
    name: tyro.conf.Positional[Name]       # the analysis
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders of train.py; of report: the folder of the runs, default out
    n: int = 100                           # problems, the first of the file
    samples: int = 1                       # answers to each at a temperature above 0
    temperature: float = 1.0               # of rollouts and accuracies; sweep and prefix measure T = 1 and greedy
    seed: int = 0                          # of the sampler and of random vectors
    data: str | None = None                # jsonl of {problem, answer}; default: the run's held-out problems
    token: str | None = None               # prefix: the first token; default: the top token of lens
    recipients: tuple[str, ...] = ()       # transfer: models that get the runs' vectors
    controls: bool = False                 # sweep, prefix: random vectors of equal norm, vectors elsewhere; compose: halved pairs
    through_norm: bool = True              # patch: heads see LN(X + s), as the authors' code; else LN(X) + s, the papers' formula
    sample_heads: bool = False             # patch: measure accuracy for every head, too, as the papers' Fig. 5
    top: int = 10                          # lens: tokens listed
    cases: int = 4                         # case: answers shown
    max_tokens: int | None = None          # longest answer in tokens; default as in the run
    rows: int = 512                        # answers sampled at once; lower it when memory is short
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # auto: vllm where it is installed beside a CUDA device; hf where it must be
    vllm_memory: float = 0.45              # share of the GPU's memory for vLLM, beside the Hugging Face model
    tensor_parallel: int = 1               # GPUs that the vLLM engine is spread over
    out: str | None = None                 # folder of figure and JSON; default RUN/figures, with several runs out/figures
    draw: bool = False                     # only draw the figure again from its JSON; loads no model
    device: str = "auto"                   # cpu, cuda, ...
    dtype: str = "auto"                    # float32, bfloat16, ...
# fmt: on


class Run(NamedTuple):
    folder: Path
    config: dict  # its config.json
    vectors: dict  # {layer: (D,) fp32}
    label: str  # "27", "all": the layers, and what else the config says about the vectors


class Lab(NamedTuple):
    """What an analysis works with."""

    args: Config
    model: str  # its name
    llm: torch.nn.Module
    tokenizer: object
    runs: list[Run]
    rows: list[dict]  # problems and answers
    how: dict  # more of model.rollouts: template, system, context, max_tokens
    state: dict  # what every number depends on: checksums of weights and problems, dtype, n, seed, how
    folder: Path  # of the figure
    engine: object = lambda: None  # a function that gives the vLLM engine, started when it is first needed; None: sample with llm


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def identity(vectors: dict) -> str:
    """A checksum of vectors and their places; that of the base model is "none"."""
    parts = [str(key).encode() + s.float().cpu().numpy().tobytes() for key, s in sorted(vectors.items(), key=str)]
    return checksum(b"".join(parts)) if parts else "none"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def kept(lab: Lab, asked: dict, compute):
    """compute(), or what it gave when it was last asked the same in this folder: an interruption loses one condition."""
    text = json.dumps(lab.state | asked, sort_keys=True)
    path = lab.folder / "parts" / f"{checksum(text.encode())}.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["asked"] == json.loads(text):  # two settings may share a checksum
            return saved["found"]
    found = compute()
    write(path, json.dumps({"asked": json.loads(text), "found": found}, ensure_ascii=False))
    return json.loads(json.dumps(found))  # the same types whether it was computed or read: tuples become lists


def answers(lab: Lab, vectors: dict, temperature: float, bar: str, prefix: str = "") -> dict:
    """Accuracy of the steered model, {} for the base: {"accuracy": 0 to 1, "interval_95", "correct": [problem][sample]}."""
    k = lab.args.samples if temperature else 1  # greedy decoding has no randomness

    def compute():
        rolled = model.rollouts(
            lab.llm, lab.tokenizer, vectors, [row["problem"] for row in lab.rows], k, temperature=temperature,
            seed=lab.args.seed, prefix=prefix, max_rows=lab.args.rows, engine=lab.engine(), bar=bar, **lab.how,
        )  # fmt: skip
        flat = grade(rolled.texts, [row["answer"] for row in lab.rows for _ in range(k)])
        return [[int(x) for x in flat[i : i + k]] for i in range(0, len(flat), k)]

    asked = {"what": "answers", "vectors": identity(vectors), "temperature": temperature, "prefix": prefix, "samples": k}
    return accuracy_of(kept(lab, asked, compute))


def accuracy_of(correct: list) -> dict:
    """The accuracy of answers, [problem][sample], with its interval over problems."""
    found = {"accuracy": statistics.mean(map(statistics.mean, correct)), "interval_95": percentiles(draws_of(correct))}
    return found | {"correct": correct}


def draws_of(correct: list) -> np.ndarray:
    """Bootstrap draws of an accuracy. One seed for all conditions: they resample the same problems, so draws are paired."""
    return bootstrap(correct, seed=0)


def minus(one: dict, other: dict) -> dict:
    """The difference of two accuracies on the same problems, paired."""
    interval = percentiles(draws_of(one["correct"]) - draws_of(other["correct"]))
    return {"accuracy": one["accuracy"] - other["accuracy"], "interval_95": interval}


def ratio(values: tuple, draws: tuple) -> dict:
    """
    The share (one - zero) / (whole - zero) of a gain with its interval; each of the three from the same bootstrap samples.

    "open" is true where whole is not clearly above zero, its interval against it not above 0: then the share says nothing.
    (0.3, 0.2, 0.6) -> 0.25
    """
    one, zero, whole = values
    low, _ = percentiles(draws[2] - draws[1])
    found = {"share": None, "interval_95": None, "open": bool(low <= 0)}
    if whole != zero:
        fine = draws[2] != draws[1]
        found["share"] = (one - zero) / (whole - zero)
        found["interval_95"] = percentiles((draws[0] - draws[1])[fine] / (draws[2] - draws[1])[fine])
    return found


def share_of(one: dict, zero: dict, whole: dict) -> dict:
    """The share of the gain from zero to whole that one has: see ratio."""
    return ratio(tuple(x["accuracy"] for x in (one, zero, whole)), tuple(draws_of(x["correct"]) for x in (one, zero, whole)))


def rolled_out(lab: Lab, vectors: dict, label: str) -> list[list]:
    """[prompts, completions, ended]: an answer of the steered model to every problem, as token ids."""

    def compute():
        rolled = model.rollouts(
            lab.llm, lab.tokenizer, vectors, [row["problem"] for row in lab.rows], 1, temperature=lab.args.temperature,
            seed=lab.args.seed, max_rows=lab.args.rows, engine=lab.engine(), bar=f"answers, {label}", **lab.how,
        )  # fmt: skip
        return [rolled.prompts, rolled.completions, rolled.ended]

    asked = {"what": "rollouts", "vectors": identity(vectors), "temperature": lab.args.temperature}
    return kept(lab, asked, compute)


def batches(rows: list[list[int]], tokens: int = 4096) -> Iterator[list[int]]:
    """Indices of rows to be read at once: as many as stay under this number of tokens with padding, at least one."""
    batch, longest = [], 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row))
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], len(row)
        batch.append(i)
    yield batch


def padded(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, T), padded on the right: a causal model never looks ahead, so it needs no attention mask."""
    T = max(map(len, rows))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    return ids, torch.tensor([[1.0] * len(row) + [0.0] * (T - len(row)) for row in rows], device=device)


@contextmanager
def watch(llm, layers, see):
    """
    Inside the context, see(layer, h) is called with the residual stream after each of these layers, h: (B, T, D).

    To see steered states, enter it inside `steer`: hooks run in the order in which they were made. Not
    output_hidden_states, which misses hooks that were made after its own and has the final norm in its last entry.
    """

    def hook(layer):
        return lambda module, args, output: see(layer, output[0] if isinstance(output, tuple) else output)

    handles = [model.decoder_layers(llm)[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def piece(tokenizer, token: int) -> str:
    r"""A token as text of its own; a part of a character, which has none, as its bytes: "\xe2\x82"."""
    raw = tokenizer.convert_ids_to_tokens(token)
    if raw is None:  # rows of the unembedding that no token uses
        return f"[{token}]"
    if raw.startswith("▁"):  # SentencePiece drops the space when it decodes one token
        return raw.replace("▁", " ")
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text
    if raw.startswith("<0x"):  # SentencePiece's own name of a byte
        return raw
    # byte-level BPE writes a byte as a printable character: itself, or those from 256 on for the others in order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return "".join(f"\\x{byte[c]:02x}" if c in byte else c for c in raw)


def layer_vectors(lab: Lab) -> dict[int, Run]:
    """{layer: run} of runs with one vector each, at the end of a layer; exits if one is not like that."""
    found = {}
    for run in lab.runs:
        if len(run.vectors) != 1 or not isinstance(next(iter(run.vectors)), int):
            sys.exit(f"{lab.args.name} wants runs with one vector at the end of a layer; {run.folder} has {list(run.vectors)}")
        layer = next(iter(run.vectors))
        if layer in found:
            sys.exit(f"{lab.args.name} wants one run for a layer; {found[layer].folder} and {run.folder} both have {layer}")
        found[layer] = run
    return dict(sorted(found.items()))


def singles_and_all(lab: Lab) -> tuple[dict[int, Run], Run | None]:
    """The runs with one vector, {layer: run}, and the one with a vector at every layer."""
    depth = len(model.decoder_layers(lab.llm))
    whole = [run for run in lab.runs if len(run.vectors) == depth > 1]
    if len(whole) > 1:
        sys.exit(f"{lab.args.name} wants at most one all-layer run, got {', '.join(str(run.folder) for run in whole)}")
    rest = [run for run in lab.runs if run not in whole]
    return layer_vectors(lab._replace(runs=rest)), whole[0] if whole else None


def resampled(n: int, draws: int = 1000) -> torch.Tensor:
    """How often each of n problems is in each bootstrap sample, (draws + 1, n); the first row is the data themselves."""
    counts = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=draws)
    return torch.cat([torch.ones(1, n), torch.from_numpy(counts).float()])


def percent(found: dict, sign: str = "") -> str:
    """43.2 [41.0, 45.4] %; with sign "+" a difference, in points."""
    low, high = found["interval_95"]
    return f"{100 * found['accuracy']:{sign}.1f} [{100 * low:.1f}, {100 * high:.1f}] {'points' if sign else '%'}"


def span(found, digits: int = 2) -> str:
    """[0.61, 0.64]: an interval, or that of a number that has one."""
    low, high = found["interval_95"] if isinstance(found, dict) else found
    return f"[{low:.{digits}g}, {high:.{digits}g}]"


def mean_of(rows: list[list[float]]) -> dict:
    """The mean of the rows' means, with its interval over rows."""
    return {"mean": statistics.mean(map(statistics.mean, rows)), "interval_95": percentiles(bootstrap(rows))}


def quoted(token: str) -> str:
    """'" To"': a token with its spaces and line breaks to be seen."""
    return json.dumps(token, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------- lens


def read_out(s: torch.Tensor, U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The logit lens of a vector: <s, u_v> and <s, u_v> / (|s| |u_v|) for every token v (B Sec. 4.2; P4 Sec. 5, App. G).

    s: (D,); U: (V, D), rows of the unembedding. Returns (dot products, cosines), both (V,). No final norm, as in the papers.
    """
    dot = U.float() @ s.float()
    return dot, dot / (s.float().norm() * U.float().norm(dim=-1)).clamp(min=1e-12)


def folded(llm, U: torch.Tensor) -> torch.Tensor:
    """Rows of the unembedding with the gain g of the final norm folded in, u_v * g; the norm of (1, ..., 1) is g. (V, D)"""
    norm = llm.get_decoder().norm
    return U.float() * norm(torch.ones_like(U[:1])).float()


def clusters(U: torch.Tensor, k: int = 5) -> list[list[int]]:
    """
    Indices of rows in k groups, the largest first: the two groups with the largest mean cosine between members are merged
    until k are left (average linkage). B App. F asks GPT for topics instead. U: (n, D)
    """
    sums = (normalize(U.float(), dim=-1) @ normalize(U.float(), dim=-1).T).cpu().numpy()  # of cosines between two groups
    groups = [[i] for i in range(len(U))]
    while len(groups) > k:
        sizes = np.array([len(group) for group in groups])
        mean = sums / np.outer(sizes, sizes)
        np.fill_diagonal(mean, -np.inf)
        i, j = sorted(np.unravel_index(mean.argmax(), mean.shape))
        groups[i] += groups.pop(j)
        sums[i] += sums[j]
        sums[:, i] += sums[:, j]
        sums = np.delete(np.delete(sums, j, 0), j, 1)
    return sorted(groups, key=len, reverse=True)


def lens(lab: Lab) -> dict:
    U = lab.llm.get_output_embeddings().weight[: len(lab.tokenizer)].float()  # some models have rows beyond the last token
    gained, top = folded(lab.llm, U), min(lab.args.top, len(U))
    # a run's vectors by layer; of several runs, by run and layer
    vectors = {
        (str(key) if len(lab.runs) == 1 else run.label if len(run.vectors) == 1 else f"{run.label}: {key}"): s
        for run in lab.runs
        for key, s in run.vectors.items()
    }
    # what directions without any meaning show: the largest cosine and dot product with so many rows, 95 % of them below
    noise = normalize(torch.randn(200, U.shape[1], generator=torch.Generator().manual_seed(lab.args.seed)), dim=-1).to(U.device)
    largest = torch.stack([torch.stack([x.max() for x in read_out(n, U)]) for n in noise])  # (200, 2): dot, cosine
    chance_dot, chance = largest.quantile(0.95, dim=0).tolist()
    found = {}
    for label, s in vectors.items():
        (dot, cosine), (gained_dot, gained_cosine) = read_out(s, U), read_out(s, gained)

        def listed(by, dot, cosine):
            return [[piece(lab.tokenizer, i), dot[i].item(), cosine[i].item()] for i in by.topk(top).indices.tolist()]

        near = cosine.topk(min(50, len(U))).indices  # 50 tokens, as in B Sec. 4.2
        counts, edges = np.histogram(cosine.cpu().numpy(), bins=40)
        found[label] = {  # lists of [token, dot product, cosine]
            "dot": listed(dot, dot, cosine),
            "cosine": listed(cosine, dot, cosine),
            "lowest dot": listed(-dot, dot, cosine),
            "dot, gain folded in": listed(gained_dot, gained_dot, gained_cosine),
            "cosine, gain folded in": listed(gained_cosine, gained_dot, gained_cosine),
            "clusters": [[piece(lab.tokenizer, near[i].item()) for i in group] for group in clusters(U[near])],
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "chance dot": chance_dot * s.norm().item(),
        }
    best = max(found, key=lambda label: found[label]["cosine"][0][2])
    (by_cosine, _, cosine), (by_dot, dot, _) = found[best]["cosine"][0], found[best]["dot"][0]
    down, lowest, _ = found[best]["lowest dot"][0]
    reading = (
        f"Layer {best}: the largest cosine is {cosine:.2f} with {quoted(by_cosine)}, the largest dot product {dot:.3g} with "
        f"{quoted(by_dot)}, the lowest {lowest:.3g} with {quoted(down)}. Of random directions 95 % stay below {chance:.2f} and "
        f"{found[best]['chance dot']:.3g}, upwards and downwards alike. Reading is not steering: a vector may steer where "
        "the lens shows nothing, and what it shows need not be what steers."
    )
    return {"reading": reading, "chance": chance, "vectors": found}


def plot_lens(doc: dict, path: Path) -> None:
    found, chance = doc["found"]["vectors"], doc["found"]["chance"]
    random = f"95 % of random\ndirections have no\ncosine above {chance:.2f}"
    if len(found) == 1:
        ((label, table),) = found.items()
        fig, axes = plt.subplots(1, 3, figsize=(8, 3.8), constrained_layout=True)
        for ax, kind, title in zip(axes, ("cosine", "cosine, gain folded in"), ("raw rows", "rows times final gain")):
            tokens, dots, cosines = zip(*table[kind][::-1])
            ax.barh(range(len(tokens)), cosines, color="tab:blue")
            if kind == "cosine":  # the random directions were compared with the raw rows
                ax.axvline(chance, color="black", linestyle="--", linewidth=1)
            ax.set_yticks(range(len(tokens)), [plain(quoted(t)) for t in tokens], fontsize=8)
            for y, dot in enumerate(dots):
                ax.text(0.01 * max(cosines), y, f"{dot:.3g}", va="center", fontsize=7, color="white")
            ax.set(xlabel="cosine (in the bar: dot product)", title=title)
        axes[2].stairs(table["histogram"]["counts"], table["histogram"]["edges"], fill=True, color="tab:blue")
        axes[2].axvline(chance, color="black", linestyle="--", linewidth=1, label=random)
        axes[2].set(xlabel="cosine", ylabel="tokens", yscale="log", title="all tokens, raw rows")
        axes[2].set_ylim(0.8, 30 * max(table["histogram"]["counts"]))  # room for the legend
        axes[2].legend(frameon=False, fontsize=7, loc="upper left")
        fig.suptitle(f"Which tokens does the vector at layer {label} point at?", fontsize=11)
    else:
        columns = min(6, *(len(table["cosine"]) for table in found.values()))
        grid = [[cosine for _, _, cosine in table["cosine"][:columns]] for table in found.values()]
        texts = [[plain(quoted(token)) for token, _, _ in table["cosine"][:columns]] for table in found.values()]
        fig, ax = plt.subplots(figsize=(8, 1.5 + 0.27 * len(found)), constrained_layout=True)
        bar = heat(ax, grid, list(found), range(1, columns + 1), 0, max(map(max, grid)), texts, every=1)
        bar.set_label("cosine with the unembedding row\n(" + random.replace("\n", " ") + ")", fontsize=8)
        ax.set(xlabel="rank by cosine", ylabel="layer of the vector (0-based)", title="Which tokens do the vectors point at?")
    finish(fig, doc, path, "raw unembedding rows, no final norm; to read is not to steer")


# --------------------------------------------------------------------------------------------------------------- shift


@torch.no_grad()
def next_tokens(llm, vectors: dict, prompts, completions, chunk: int = 512) -> Iterator[tuple]:
    """
    p(x) and p(x; s) at every completion position of given rollouts (P4 Sec. 5), teacher-forced at T = 1, in chunks.

    Yields (base, steered, row, position, token): probabilities (n, V) fp32; (n,) number of the rollout; (n,) position in the
    answer, 0 is predicted by the last token of the prompt; (n,) the token that stands there. Neither (B, T, V) ever exists.
    """
    head, cap = llm.get_output_embeddings(), getattr(llm.config, "final_logit_softcapping", None)  # cap: Gemma 2
    assert head.bias is None, "an output layer with a bias is not supported"

    def probabilities(h):
        logits = (h @ head.weight.T).float()
        return (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1)

    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    for batch in tqdm(list(batches(rows)), desc="probabilities", leave=False):
        ids, _ = padded([rows[i] for i in batch], llm.device)
        at = [(b, i, t) for b, i in enumerate(batch) for t in range(len(completions[i]))]
        b, i, t = torch.tensor(at, device=llm.device).T
        before = t - 1 + torch.tensor([len(p) for p in prompts], device=llm.device)[i]  # position t - 1 predicts token t
        base = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[b, before]
        with model.steer(llm, vectors):
            steered = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[b, before]
        for part in torch.arange(len(at), device=llm.device).split(chunk):
            yield probabilities(base[part]), probabilities(steered[part]), i[part], t[part], ids[b[part], before[part] + 1]


def largest_shifts(llm, vectors: dict, prompts, completions) -> list[tuple[int, int, int, float]]:
    """At every completion position the token whose probability grows most: [(rollout, position, token, p(x; s) - p(x))]."""
    found = []
    for base, steered, row, position, _ in next_tokens(llm, vectors, prompts, completions):
        most = (steered - base).max(-1)
        found += zip(row.tolist(), position.tolist(), most.indices.tolist(), most.values.tolist())
    return found


def spread(values: list[float]) -> dict:
    """What a box plot shows: quartiles, 5 and 95 % points, the number of values and the largest."""
    low, q1, med, q3, high = np.percentile(values, [5, 25, 50, 75, 95]).tolist()
    return {"whislo": low, "q1": q1, "med": med, "q3": q3, "whishi": high, "count": len(values), "max": max(values)}


def shift(lab: Lab, tokens: int = 5, positions: int = 60) -> dict:
    """
    Distribution of Delta p = p(x; s) - p(x) by token, and by position (P4 Sec. 5, Fig. 4 left, Fig. 13), on answers of the
    steered model that ended. As in the authors' code a position counts for one token, that whose Delta p is largest.
    """
    (run,) = lab.runs
    rolled = [(p, c) for p, c, ended in zip(*rolled_out(lab, run.vectors, "steered")) if ended]
    if not rolled:
        sys.exit(f"{run.folder}: none of {len(lab.rows)} answers ended by itself; raise --max-tokens or --n")
    largest = largest_shifts(lab.llm, run.vectors, *zip(*rolled))
    first = Counter(token for _, position, token, _ in largest if position == 0).most_common(1)[0][0]
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
    curve = [mean_of(by_position[t]) | {"position": t, "n": len(by_position[t])} for t in sorted(by_position)[:positions]]
    after = mean_of(list(later.values())) if later else None
    reading = (
        f"On the first token of {len(rolled)} answers the largest increase is {curve[0]['mean']:.2f} {span(curve[0])}, for "
        f"{quoted(boxes[-1]['token'])} in {len(at_first)}"
    ) + (f"; later it is {after['mean']:.3f} {span(after)}." if after else ".")
    return {"reading": reading, "answers": len(rolled), "boxes": boxes, "by_position": curve, "later": after}


def plot_shift(doc: dict, path: Path) -> None:
    boxes, curve = doc["found"]["boxes"], doc["found"]["by_position"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), constrained_layout=True)
    where = [*range(len(boxes) - 1), len(boxes) - 0.5]  # position 0 stands apart
    drawn = left.bxp(boxes, positions=where, showfliers=False, patch_artist=True, widths=0.6, medianprops={"color": "black"})
    for i, box in enumerate(drawn["boxes"]):
        box.set_facecolor("tab:orange" if i == len(boxes) - 1 else "tab:blue")
    names = [f"{plain(quoted(b['token']))}\n{'pos. 0, ' if b['where'] == 'position 0' else ''}n={b['count']}" for b in boxes]
    left.set_xticks(where, names, fontsize=7)
    left.set(ylabel="increase of probability", title="tokens with the largest maximum")
    at, low, high = [c["position"] for c in curve], *zip(*(c["interval_95"] for c in curve))
    right.plot(at, [c["mean"] for c in curve], "o-", ms=3, color="tab:blue")
    right.fill_between(at, low, high, alpha=0.25, color="tab:blue", linewidth=0)
    right.set(xlabel="position in the answer (tokens)", ylabel="largest increase, mean", title="by position", ylim=(0, None))
    finish(fig, doc, path, f"{doc['found']['answers']} ended; whiskers: 5 and 95 %; band: 95 % interval of the mean over answers")


# -------------------------------------------------------------------------------------------------------------- prefix


def random_like(s: torch.Tensor, seed: int, key) -> torch.Tensor:
    """A random vector with the norm of s, another one for every place and seed. (D,)"""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    return (normalize(torch.randn(len(s), generator=draw), dim=0) * s.norm().cpu()).to(s.device)


def moved(vectors: dict, depth: int) -> dict:
    """The same vectors at other layers, half the depth away."""

    def away(key):
        return (key + depth // 2) % depth if isinstance(key, int) else ((key[0] + depth // 2) % depth, *key[1:])

    return {away(key): s for key, s in vectors.items()}


def prefix(lab: Lab) -> dict:
    """The base model, the base model with its first token forced, and the steered model (P4 Sec. 5, Fig. 4 right)."""
    (run,) = lab.runs
    token = lab.args.token
    if token is None:  # the top token of lens
        s = list(run.vectors.values())[-1]
        U = lab.llm.get_output_embeddings().weight[: len(lab.tokenizer)]
        token = piece(lab.tokenizer, read_out(s, U)[0].argmax().item())
    conditions = {"base": ({}, ""), f"base + {quoted(token)}": ({}, token), "vector": (run.vectors, "")}
    if lab.args.controls:
        conditions["random vector"] = ({key: random_like(s, lab.args.seed, key) for key, s in run.vectors.items()}, "")
        conditions["vector, half the depth away"] = (moved(run.vectors, len(model.decoder_layers(lab.llm))), "")
    found, said = {}, []
    for decoding, temperature in (("greedy", 0.0), ("T = 1", 1.0)):
        row = {name: answers(lab, given, temperature, f"{name}, {decoding}", text) for name, (given, text) in conditions.items()}
        base, forced, vector = list(row.values())[:3]
        gain, by_token, share = minus(vector, base), minus(forced, base), share_of(forced, base, vector)
        said.append(f"{decoding}: the vector gains {percent(gain, '+')}, the token {percent(by_token, '+')}")
        said[-1] += "" if share["open"] else f", {share['share']:.2f} {span(share)} of it"
        row |= {"vector - base": gain, "forced - base": by_token, "share": share}
        found[decoding] = row
    reading = f"The first token {quoted(token)} forced, against the vector; " + "; ".join(said) + "."
    return {"reading": reading, "token": token, "conditions": list(conditions), "by_decoding": found}


def plot_prefix(doc: dict, path: Path) -> None:
    found = doc["found"]
    fig, ax = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    names, shades = found["conditions"], ["0.75", "tab:orange", "tab:blue", "0.45", "tab:green"]
    for i, name in enumerate(names):
        x = [g + 0.8 * (i - (len(names) - 1) / 2) / len(names) for g in range(2)]
        rows = [found["by_decoding"][decoding][name] for decoding in ("greedy", "T = 1")]
        bars(ax, x, rows, 0.8 / len(names), shades[i], plain(name))
    ax.set_xticks(range(2), ["greedy", "T = 1"])
    ax.set(ylabel="right answers (%)", title="How much of the vector is its first token?", ylim=(0, None))
    fig.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)  # bars may stand anywhere
    finish(fig, doc, path, "error bars: 95 % intervals over problems")


# --------------------------------------------------------------------------------------------- persistence, similarity


@torch.no_grad()
def shift_sums(llm, vectors: dict, rows: list[list[int]], layers: list[int]) -> tuple[torch.Tensor, ...]:
    """
    Sums over the tokens of each text of Delta = F_l(x; s) - F_l(x) (P4 Sec. 4) and of Delta / |Delta|, F_l: after layer l.

    rows: n texts as token ids, every position counts. Returns (units, shifts, counts): (n, len(layers), D) twice, fp32, and (n,).
    These are enough for mean cosines: mean over tokens of cos(Delta, m) = (sum of Delta / |Delta|) . m / (|m| count).
    """
    units = torch.zeros(len(rows), len(layers), llm.config.hidden_size)
    shifts, counts = torch.zeros_like(units), torch.tensor([float(len(row)) for row in rows])
    for batch in tqdm(list(batches(rows)), desc="shifts", leave=False):
        ids, mask = padded([rows[i] for i in batch], llm.device)
        base = {}
        with watch(llm, layers, base.__setitem__):
            llm.get_decoder()(input_ids=ids, use_cache=False)

        def compare(layer, h):
            delta = (h.float() - base.pop(layer).float()) * mask[..., None]  # noqa: B023, used at once; (B, T, D)
            unit = delta / delta.norm(dim=-1, keepdim=True).clamp(min=1e-20)
            i = layers.index(layer)
            units[batch, i], shifts[batch, i] = unit.sum(1).cpu(), delta.sum(1).cpu()  # noqa: B023

        with model.steer(llm, vectors), watch(llm, layers, compare):
            llm.get_decoder()(input_ids=ids, use_cache=False)
    return units, shifts, counts


def persistence_of(units, shifts, counts, targets: dict[int, torch.Tensor], layers: list[int]) -> dict:
    """
    Mean cosines of one injection layer with every later layer l (P4 Sec. 4), from shift_sums:

    diff_diff = E[cos(Delta_l, E Delta_l)], E over all tokens of all texts; diff_vector = E[cos(Delta_l, s_l)], null where targets
    has no s_l; diff_diff_per_text: against the mean of the own text, then mean over texts (the authors' code).
    """
    found = {key: [] for key in ("diff_diff", "diff_diff_95", "diff_diff_per_text", "diff_vector", "diff_vector_95")}
    W = resampled(len(counts))  # (draws + 1, n)
    for i, layer in enumerate(layers):
        u = (W @ units[:, i]) / (W @ counts)[:, None]  # mean unit vector, (draws + 1, D)
        to_mean = (u * normalize(W @ shifts[:, i], dim=-1)).sum(-1)
        own = (units[:, i] * normalize(shifts[:, i], dim=-1)).sum(-1) / counts
        found["diff_diff"].append(to_mean[0].item())
        found["diff_diff_95"].append(percentiles(to_mean[1:].numpy()))
        found["diff_diff_per_text"].append(own.mean().item())
        to_vector = u @ normalize(targets[layer].float().cpu(), dim=0) if layer in targets else None
        found["diff_vector"].append(None if to_vector is None else to_vector[0].item())
        found["diff_vector_95"].append(None if to_vector is None else percentiles(to_vector[1:].numpy()))
    return {"layers": layers} | found


def persistence(lab: Lab) -> dict:
    """How the shift that a vector makes changes on its way through later layers (P4 Sec. 4, Fig. 2, Tables 6 and 7)."""
    runs, depth = layer_vectors(lab), len(model.decoder_layers(lab.llm))
    targets = {layer: run.vectors[layer] for layer, run in runs.items()}

    def compute(layer, run):
        prompts, completions, _ = rolled_out(lab, run.vectors, f"layer {layer}")
        later = list(range(layer, depth))
        sums = shift_sums(lab.llm, run.vectors, [p + c for p, c in zip(prompts, completions)], later)
        return persistence_of(*sums, targets, later)

    found = {}
    for layer, run in tqdm(runs.items(), desc="injection layers"):
        asked = {"what": "persistence", "vectors": identity(run.vectors), "targets": identity(targets)}
        found[str(layer)] = kept(lab, asked | {"temperature": lab.args.temperature}, partial(compute, layer, run))
    x, i, l, ends = min((x, i, l, e) for i, f in found.items() for l, x, e in zip(f["layers"], f["diff_diff"], f["diff_diff_95"]))
    reading = f"The shift keeps a common direction: Diff-Diff is at least {x:.2f} {span(ends)} (layer {i} seen after layer {l})"
    others = [x for f in found.values() for x in f["diff_vector"][1:] if x is not None]
    if others:
        reading += f"; Diff-Vector, with the later layers' own vectors, is {statistics.mean(others):.2f} on average"
        reading += f", at most {max(others):.2f}"
    return {"reading": reading + ".", "depth": depth, "by_layer": found}


def plot_persistence(doc: dict, path: Path) -> None:
    depth = doc["found"]["depth"]
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.5), sharey=True, constrained_layout=True)
    titles = {"diff_diff": "to the mean shift: Diff-Diff", "diff_vector": "to the layer's vector: Diff-Vector"}
    for ax, (kind, title) in zip(axes, titles.items()):
        for layer, row in doc["found"]["by_layer"].items():
            seen = [(l, x) for l, x in zip(row["layers"], row[kind]) if x is not None]
            ax.plot(*zip(*seen), "o-", ms=2.5, linewidth=1, color=shade(int(layer), depth))
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set(xlabel="layer where the shift is seen (0-based)", title=title)
    axes[0].set_ylabel("mean cosine over tokens")
    fig.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, depth - 1), SHADES), ax=axes, label="layer of the vector")
    finish(fig, doc, path, "prompts and answers of each steered model; mean shift over all of them; intervals: JSON")


def similarity(lab: Lab) -> dict:
    """Cosines between mean shifts at the last block's output, before the final norm, of all injection layers (P4 Fig. 3)."""
    runs, last = layer_vectors(lab), len(model.decoder_layers(lab.llm)) - 1
    means = []  # (draws + 1, D) for each run
    for layer, run in tqdm(runs.items(), desc="injection layers"):
        prompts, completions, _ = rolled_out(lab, run.vectors, f"layer {layer}")
        _, shifts, counts = shift_sums(lab.llm, run.vectors, [p + c for p, c in zip(prompts, completions)], [last])
        W = resampled(len(counts))
        means.append(normalize((W @ shifts[:, 0]) / (W @ counts)[:, None], dim=-1))
    M = torch.stack(means, 1)  # (draws + 1, runs, D)
    draws = (M @ M.transpose(1, 2)).numpy()  # (draws + 1, runs, runs)
    low, high = np.percentile(draws[1:], [2.5, 97.5], axis=0).tolist()
    layers, cosine = list(runs), draws[0].tolist()
    pairs = [(cosine[i][j], i, j) for i in range(len(layers)) for j in range(i)]
    if not pairs:
        sys.exit("similarity wants two or more runs")
    x, i, j = min(pairs)
    reading = (
        f"The mean shifts at the last block are least alike for layers {layers[j]} and {layers[i]}: cosine {x:.2f} "
        f"{span([low[i][j], high[i][j]])}; the median of all pairs is {statistics.median(p[0] for p in pairs):.2f}."
    )
    return {"reading": reading, "layers": layers, "cosine": cosine, "low": low, "high": high}


def plot_similarity(doc: dict, path: Path) -> None:
    found = doc["found"]
    low = min(map(min, found["cosine"]))
    fig, ax = plt.subplots(figsize=(5.6, 4.6), constrained_layout=True)
    bar = heat(ax, found["cosine"], found["layers"], found["layers"], -1 if low < 0 else 0, 1)
    bar.set_label("cosine of mean shifts at the last block's output")
    ax.set(xlabel="layer of the vector (0-based)", ylabel="layer of the vector", title="Do shifts from all layers end up alike?")
    finish(fig, doc, path, f"smallest cosine {low:.2f}")


# ---------------------------------------------------------------------------------------------------------------- case


def case(lab: Lab) -> dict:
    """Delta p = p(x; s) - p(x) of the token that stands at each position of some answers of the steered model (P4 Fig. 6)."""
    (run,) = lab.runs
    prompts, completions, _ = rolled_out(lab, run.vectors, "steered")

    def listed(probabilities):
        top = probabilities.topk(min(5, len(probabilities)))
        return [[piece(lab.tokenizer, i), p] for i, p in zip(top.indices.tolist(), top.values.tolist())]

    shown = [{"prompt": lab.tokenizer.decode(p), "tokens": []} | row for p, row in zip(prompts, lab.rows)]
    for base, steered, row, _, token in next_tokens(lab.llm, run.vectors, prompts, completions):
        for b, s, i, y in zip(base, steered, row.tolist(), token.tolist()):
            entry = {"text": piece(lab.tokenizer, y), "base": b[y].item(), "steered": s[y].item()}
            entry |= {"top_base": listed(b), "top_steered": listed(s), "most": piece(lab.tokenizer, (s - b).argmax().item())}
            shown[i]["tokens"].append(entry | {"differs": (b.argmax() != s.argmax()).item()})
    tokens = [t for text in shown for t in text["tokens"]]
    up = max(tokens, key=lambda t: t["steered"] - t["base"])
    reading = (
        f"The vector changes the most likely token at {sum(t['differs'] for t in tokens)} of {len(tokens)} positions in "
        f"{len(shown)} answers; it raises {quoted(up['text'])} most, from {up['base']:.2f} to {up['steered']:.2f}."
    )
    return {"reading": reading, "answers": shown}


def tint(delta: float) -> str:
    """The background of a token: blue for more likely, red for less, the stronger the larger; full at 1."""
    return f"rgba({'33,102,172' if delta > 0 else '178,24,43'},{min(abs(delta), 1):.2f})"


def token_span(token: dict) -> str:
    """One token as HTML: coloured by Delta p on a scale that is the same everywhere, underlined where the argmax differs."""
    delta = token["steered"] - token["base"]
    tops = [", ".join(f"{quoted(t)} {p:.3f}" for t, p in token[who]) for who in ("top_base", "top_steered")]
    tip = f"{quoted(token['text'])}: {token['base']:.3f} -> {token['steered']:.3f}, change {delta:+.3f}\n"
    tip += f"base: {tops[0]}\nsteered: {tops[1]}\ngrows most: {quoted(token['most'])}"
    mark = " class=differs" if token["differs"] else ""
    text = html.escape(token["text"]).replace("\n", "↵\n")
    return f'<span{mark} style="background:{tint(delta)}" title="{html.escape(tip)}">{text}</span>'


def page(title: str, body: str) -> str:
    """A page that needs nothing else: no script, no other file."""
    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap;"
        "font:14px/1.7 monospace;background:#f6f6f6;padding:.7em}pre.answer{background:#fff;border:1px solid #ccc}"
        ".differs{border-bottom:2px solid black}img{max-width:100%}td,th{padding:.1em .6em;text-align:right}"
        "table{border-collapse:collapse;font-size:13px}small{color:#666}code{font-size:12px}"
    )
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    head += f"<style>{style}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"


def plot_case(doc: dict, path: Path) -> None:
    body = f"<p>{html.escape(doc['reading'])}</p>\n<p>Change of the probability of the token that stands there: "
    for x in (-1, -0.5, 0, 0.5, 1):
        body += f'<span style="background:{tint(x)}">&nbsp;{x:+g}&nbsp;</span> '
    body += (
        "(blue: the vector makes it more likely). <span class=differs>Underlined</span>: base and steered model would choose "
        f"different tokens. The pointer over a token shows probabilities.</p>\n<p><small>{html.escape(about(doc))}</small></p>\n"
    )
    for text in doc["found"]["answers"]:
        body += f"<pre class=prompt>{html.escape(text['prompt'])}</pre>\n<pre class=answer>"
        body += "".join(map(token_span, text["tokens"]))
        body += f"</pre>\n<p><small>right answer: {html.escape(str(text['answer']))}</small></p>\n"
    write(path.with_suffix(".html"), page("What the vector changes, token by token", body))
    tokens = []
    for text in doc["found"]["answers"]:
        tokens += [(word + " ", None, False) for word in text["problem"].split(" ")] + [("\n", None, False)]
        tokens += [(t["text"], t["steered"] - t["base"], t["differs"]) for t in text["tokens"]] + [("\n\n", None, False)]
    tokens = tokens[:-1]  # no empty lines at the end
    lines = lines_of(tokens)
    width = max(70, max(column + len(text) for line in lines for column, text, *_ in line))
    fig, ax = plt.subplots(figsize=(8 * width / WIDTH, 1.2 + 0.2 * len(lines)), constrained_layout=True)
    write_tokens(ax, tokens, 1.0, width)
    bar = plt.cm.ScalarMappable(plt.Normalize(-1, 1), "RdBu")
    fig.colorbar(bar, ax=ax, location="top", shrink=0.5, aspect=40, label="change of probability; box: the argmax differs")
    finish(fig, doc, path, "first answers of the steered model")


WIDTH = 112  # characters in a line of a figure


def lines_of(tokens: list[tuple]) -> list[list]:
    """Break [(text, ...)] into lines of at most WIDTH characters: [[(column, text, ...), ...], ...]; marks line breaks."""
    lines, column = [[]], 0
    for text, *rest in tokens:
        shown = text.replace("\n", "↵") if rest[0] is not None else text.rstrip("\n")
        if column and column + len(shown) > WIDTH:
            lines.append([])
            column = 0
        lines[-1].append((column, shown, *rest))
        column += len(shown)
        if text.endswith("\n"):
            lines += [[] for _ in range(text.count("\n"))]
            column = 0
    return lines


def write_tokens(ax, tokens: list[tuple], limit: float, width=WIDTH) -> None:
    """Write [(text, value, marked)] as text, every token coloured by its value on -limit..limit; value None: grey text."""
    lines, colours = lines_of(tokens), plt.cm.ScalarMappable(plt.Normalize(-limit, limit), "RdBu")
    for y, line in enumerate(lines):
        for column, text, value, marked in line:
            colour = "0.4"
            if value is not None:
                face = colours.to_rgba(value)[:3]
                edge = {"edgecolor": "black", "linewidth": 0.8} if marked else {"linewidth": 0}
                ax.add_patch(plt.Rectangle((column, y - 0.45), len(text), 0.9, facecolor=face, **edge))
                colour = "white" if sum(share * x for share, x in zip((0.3, 0.6, 0.1), face)) < 0.5 else "black"
            ax.text(column, y, plain(text), family="monospace", fontsize=8, va="center", color=colour)
    ax.set(xlim=(0, width), ylim=(len(lines) - 0.5, -0.7))
    ax.axis("off")


# ---------------------------------------------------------------------- accuracies: sweep, ablate, compose, sites, transfer


def with_weights(lab: Lab, run: Run) -> Lab:
    """The lab with all weights of a run of --method full, which take the model's place when something is not kept yet."""

    def engine():
        started = lab.engine()  # before the change: it compares itself with the model
        model.replace_weights(lab.llm, str(run.folder / "weights"))
        if started is not None:
            started.push_weights(lab.llm)
        return started

    return lab._replace(engine=cache(engine), state=lab.state | {"weights": model.stamp(run.folder, run.config)})


def sweep(lab: Lab) -> dict:
    """
    Accuracy of vectors at single layers, of the base model and of all layers together (P4 Sec. 3, Fig. 1; greedy: Fig. 9).

    One run may have trained all weights: the papers' upper line.
    """
    full = [run for run in lab.runs if run.config.get("method") == "full"]
    if len(full) > 1:
        sys.exit(f"sweep wants at most one run of all weights, got {', '.join(str(run.folder) for run in full)}")
    runs, whole = singles_and_all(lab._replace(runs=[run for run in lab.runs if run not in full]))
    if not runs:
        sys.exit("sweep wants one or more runs with a vector at a single layer: train.py --layer 14, say")
    depth = len(model.decoder_layers(lab.llm))
    conditions = {"base": {}} | ({"all": whole.vectors} if whole else {}) | {str(l): run.vectors for l, run in runs.items()}
    if lab.args.controls:
        for layer, run in runs.items():
            conditions[f"random {layer}"] = {layer: random_like(run.vectors[layer], lab.args.seed, layer)}
            conditions[f"moved {layer}"] = moved(run.vectors, depth)
    decodings, found, said = {"T = 1": 1.0, "greedy": 0.0}, {}, []
    for decoding, temperature in decodings.items():
        bar = tqdm(conditions.items(), desc=f"sweep, {decoding}")
        found[decoding] = {name: answers(lab, given, temperature, f"layer {name}") for name, given in bar}
    for run in full:  # last, for the model is not what it was afterwards
        there = with_weights(lab, run)
        for decoding, temperature in decodings.items():
            found[decoding]["full"] = answers(there, {}, temperature, f"all weights, {decoding}")
    for decoding, row in found.items():
        best = max(map(str, runs), key=lambda layer: row[layer]["accuracy"])  # noqa: B023, used at once
        said.append(f"{decoding}: base {percent(row['base'])}, best layer {best} {percent(row[best])}")
        said[-1] += f", all layers {percent(row['all'])}" if whole else ""
        said[-1] += f", all weights {percent(row['full'])}" if full else ""
    return {"reading": "; ".join(said) + ".", "depth": depth, "layers": list(runs), "by_decoding": found}


def plot_sweep(doc: dict, path: Path) -> None:
    layers = doc["found"]["layers"]
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.5), sharey=True, constrained_layout=True)
    for ax, (decoding, rows) in zip(axes, doc["found"]["by_decoding"].items()):
        for kind, colour in (("", "tab:orange"), ("random ", "0.5"), ("moved ", "tab:green")):
            if f"{kind}{layers[0]}" in rows:
                band(ax, layers, [rows[f"{kind}{layer}"] for layer in layers], colour, f"{kind or 'one '}vector")
        ax.axhline(100 * rows["base"]["accuracy"], color="black", linestyle="--", label="base model")
        for name, colour, label in (("all", "tab:blue", "all layers"), ("full", "tab:purple", "all weights")):
            if name in rows:
                ax.axhline(100 * rows[name]["accuracy"], color=colour, label=label)
        ax.set(xlabel="layer of the vector (0-based)", title=decoding, xlim=(-0.5, doc["found"]["depth"] - 0.5))
    axes[0].set(ylabel="right answers (%)", ylim=(0, None))
    axes[1].legend(frameon=False, fontsize=8)
    finish(fig, doc, path, "bands: 95 % intervals over problems")


def ablate(lab: Lab) -> dict:
    """Leave one layer's vector out of a set, or keep only that one."""
    (run,) = lab.runs
    if len(run.vectors) < 2:
        sys.exit(f"ablate wants a run with several vectors, for example of --layer all; {run.folder} has {list(run.vectors)}")
    conditions = {"all": run.vectors, "base": {}}
    for key in run.vectors:
        conditions[f"without {key}"] = {other: s for other, s in run.vectors.items() if other != key}
        conditions[f"only {key}"] = {key: run.vectors[key]}
    bar = tqdm(conditions.items(), desc="ablate")
    found = {name: answers(lab, given, lab.args.temperature, name) for name, given in bar}
    found |= {f"loss {key}": minus(found["all"], found[f"without {key}"]) for key in run.vectors}
    most, best = (max(run.vectors, key=lambda key: found[f"{kind} {key}"]["accuracy"]) for kind in ("loss", "only"))
    reading = (
        f"All vectors: {percent(found['all'])}, base {percent(found['base'])}. Most is lost without layer {most} "
        f"({percent(found[f'loss {most}'], '+')}); alone, layer {best} is best ({percent(found[f'only {best}'])})."
    )
    return {"reading": reading, "layers": [str(key) for key in run.vectors], "conditions": found}


def plot_ablate(doc: dict, path: Path) -> None:
    found, layers = doc["found"]["conditions"], doc["found"]["layers"]
    fig, ax = plt.subplots(figsize=(7, 3.5), constrained_layout=True)
    for kind, colour in (("without", "tab:blue"), ("only", "tab:orange")):
        band(ax, layers, [found[f"{kind} {layer}"] for layer in layers], colour, f"{kind} this layer")
    ax.axhline(100 * found["all"]["accuracy"], color="tab:green", label="all vectors")
    ax.axhline(100 * found["base"]["accuracy"], color="black", linestyle="--", label="base model")
    ax.tick_params(axis="x", labelsize=7)
    ax.set(xlabel="layer (0-based)", ylabel="right answers (%)", title="Which of the vectors matter?", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8)
    finish(fig, doc, path, "bands: 95 % intervals over problems")


def compose(lab: Lab) -> dict:
    """
    Pairs of vectors that were trained alone, added together (P1 Sec. 5, Fig. 5, Table 2):

    norm(s_i, s_j) = (Acc(s_i, s_j) - max(Acc(s_i), Acc(s_j))) / (Acc(all layers) - max(Acc(s_i), Acc(s_j))).

    With --controls every pair again with half of each vector: does a pair do worse because two shifts add up to too much?
    """
    runs, whole = singles_and_all(lab)
    if whole is None or len(runs) < 2:
        sys.exit("compose wants two or more single-layer runs and the all-layer run (train.py --layer all) to compare with")
    pairs = {f"{i}+{j}": (i, j) for i in runs for j in runs if i < j}
    conditions = {"all": whole.vectors, "base": {}} | {str(l): run.vectors for l, run in runs.items()}
    conditions |= {name: runs[i].vectors | runs[j].vectors for name, (i, j) in pairs.items()}
    if lab.args.controls:
        conditions |= {f"half of {name}": {key: s / 2 for key, s in conditions[name].items()} for name in pairs}
    bar = tqdm(conditions.items(), desc="compose")
    found = {name: answers(lab, given, lab.args.temperature, f"layers {name}") for name, given in bar}

    def gains_of(kind):
        return {name: pair_gain(found[kind + name], found[str(i)], found[str(j)], found["all"]) for name, (i, j) in pairs.items()}

    def worse(gains):
        return sum(gain["over_single"]["interval_95"][1] < 0 for gain in gains.values())

    gains = gains_of("")
    best = max(gains, key=lambda name: found[name]["accuracy"])
    crosses, unclear = (sum(gain[key] for gain in gains.values()) for key in ("cross", "open"))
    reading = (
        f"The best pair is {best}, {percent(found[best])}; all layers: {percent(found['all'])}. {crosses} of {len(pairs)} pairs "
        f"reach 99 % of all layers; {worse(gains)} do clearly worse than the better single; for {unclear} all layers are not "
        "clearly above it."
    )
    halves = gains_of("half of ") if lab.args.controls else {}
    if halves:
        mean, half = (statistics.mean(g["over_single"]["accuracy"] for g in some.values()) for some in (gains, halves))
        reading += (
            f" A pair minus the better single is {100 * mean:+.1f} points on average; with half of each vector it is "
            f"{100 * half:+.1f}, and {worse(halves)} do clearly worse."
        )
    return {"reading": reading, "layers": list(runs), "conditions": found, "gains": gains, "halves": halves}


def pair_gain(pair: dict, one: dict, other: dict, whole: dict) -> dict:
    """
    The normalised gain of a pair, all four accuracies resampled together, so that the better single is chosen in every draw.

    (0.5, 0.2, 0.4, 0.6) -> (0.5 - 0.4) / (0.6 - 0.4) = 0.5. "over_single": 0.5 - 0.4, which can be judged where the share cannot.
    "cross": the pair reaches 99 % of all layers (P1 Fig. 5).
    """
    p, a, b, w = (x["accuracy"] for x in (pair, one, other, whole))
    draws = [draws_of(x["correct"]) for x in (pair, one, other, whole)]
    single = np.maximum(draws[1], draws[2])
    over = {"accuracy": p - max(a, b), "interval_95": percentiles(draws[0] - single)}
    return ratio((p, max(a, b), w), (draws[0], single, draws[3])) | {"over_single": over, "cross": p >= 0.99 * w}


def plot_compose(doc: dict, path: Path) -> None:
    layers, gains, halves = doc["found"]["layers"], doc["found"]["gains"], doc["found"].get("halves")

    def share(gain):
        return np.nan if gain["open"] else gain["share"]

    def over_single(gain):
        return 100 * gain["over_single"]["accuracy"]

    most = max(abs(over_single(gain)) for gain in gains.values()) or 1.0
    panels = [("normalised gain (0: better single, 1: all layers)", share, gains, 1.0)]
    panels += [("pair minus the better single (points)", over_single, gains, most)]
    panels += [("the same with half of each vector (points)", over_single, halves, most)] if halves else []
    rows = 2 if halves else 1
    fig, axes = plt.subplots(rows, 2, figsize=(9, 4.3 * rows), sharey=True, constrained_layout=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, value, given, limit) in zip(axes.flat, panels):
        grid = np.full((len(layers), len(layers)), np.nan)
        for y, x in zip(*np.triu_indices(len(layers), 1)):
            gain = given.get(f"{layers[y]}+{layers[x]}")
            cell = {"xy": (x - 0.5, y - 0.5), "width": 1, "height": 1, "linewidth": 0}
            if gain is None:  # some of the papers' are lost
                ax.add_patch(plt.Rectangle(**cell, facecolor="none", edgecolor="0.7", hatch="////"))
                continue
            grid[y, x] = value(gain)
            if gain["open"] and value is share:
                ax.add_patch(plt.Rectangle(**cell, facecolor="0.8"))
            if gain["cross"]:
                ax.plot(x, y, "x", color="black", ms=4)
        heat(ax, grid, layers, layers, -limit, limit, beyond=value is share)
        ax.set(xlabel="layer of one vector (0-based)", ylabel="layer of the other" if ax in axes[:, 0] else None)
        ax.set_title(title, fontsize=10)
    fig.suptitle("Do vectors add up?")
    finish(fig, doc, path, "cross: 99 % of all layers or more; grey: all layers not clearly above the better single")


def side_by_side(lab: Lab) -> dict:
    """Accuracies of the base model and of each run (sites: P4 Fig. 10, P1 Fig. 8; orthogonal: P4 App. F, Fig. 12)."""
    labels = [run.label for run in lab.runs]
    labels = [str(run.folder.name) if labels.count(run.label) > 1 else run.label for run in lab.runs]
    conditions = {"base": {}} | {label: run.vectors for label, run in zip(labels, lab.runs)}
    found = {name: answers(lab, given, lab.args.temperature, name) for name, given in conditions.items()}
    gains = {name: minus(found[name], found["base"]) for name in labels}
    best = max(labels, key=lambda name: found[name]["accuracy"])
    worst = min(labels, key=lambda name: found[name]["accuracy"])
    reading = f"Base {percent(found['base'])}; highest: {best}, {percent(found[best])}; lowest: {worst}, {percent(found[worst])}."
    if best != worst:
        reading = reading[:-1] + f"; their difference: {percent(minus(found[best], found[worst]), '+')}."
    return {"reading": reading, "conditions": found, "gains": gains}


def plot_side_by_side(doc: dict, path: Path) -> None:
    found = dict(doc["found"]["conditions"])
    base = found.pop("base")
    fig, ax = plt.subplots(figsize=(max(4.5, 1.5 + 1.1 * len(found)), 3.5), constrained_layout=True)
    bars(ax, range(len(found)), list(found.values()), 0.6, "tab:orange", None)
    ax.axhline(100 * base["accuracy"], color="black", linestyle="--", label="base model")
    ax.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found], fontsize=8)
    ax.set(xlabel="layer and place of the vector", ylabel="right answers (%)", ylim=(0, None))
    ax.set_title("Where does a vector work?" if doc["name"] == "sites" else "Is there a second direction?")
    ax.legend(frameon=False)
    finish(fig, doc, path, "error bars: 95 % intervals over problems")


def transfer(lab: Lab) -> dict:
    """
    Vectors of one model in another (P4 Sec. 7, Table 1, App. J), normalised by what the recipient's own vectors gain:

    (Acc(recipient with donor's) - Acc(recipient)) / (Acc(recipient with its own) - Acc(recipient)).
    """
    donors = [(str(run.folder.name), run) for run in lab.runs]
    found = {}
    for name in lab.args.recipients:
        own = [run for _, run in donors if run.config["model"] == name]
        there = open_lab(lab.args, lab.folder, name, (own or lab.runs)[0].config, lab.rows)
        row = {"base": answers(there, {}, lab.args.temperature, f"{name}, base")}
        for donor, run in donors:
            fitted = model.load_vectors(run.folder / "vectors.safetensors", there.llm)[0]  # exits if the sizes differ
            row[donor] = answers(there, fitted, lab.args.temperature, f"{name}, vectors of {donor}")
        mine = next((row[donor] for donor, run in donors if run.config["model"] == name), None)
        shares = {donor: share_of(row[donor], row["base"], mine) if mine else None for donor, _ in donors}
        found[name] = {"accuracies": row, "shares": shares, "measured": there.state}
        del there  # one at a time: they may be large
    foreign = [
        (row["accuracies"][donor]["accuracy"] - row["accuracies"]["base"]["accuracy"], donor, name, row)
        for name, row in found.items() for donor, run in donors if run.config["model"] != name
    ]  # fmt: skip
    reading = "No vectors came from another model."
    if foreign:
        _, donor, name, row = max(foreign, key=lambda x: x[0])
        gain, share = minus(row["accuracies"][donor], row["accuracies"]["base"]), row["shares"][donor]
        reading = f"The largest transfer: vectors of {donor} in {name} gain {percent(gain, '+')}"
        if share and not share["open"]:
            low, high = share["interval_95"]
            reading += f", {share['share']:.2f} [{low:.2f}, {high:.2f}] of what its own gain"
        reading += "."
    return {"reading": reading, "donors": {donor: run.config["model"] for donor, run in donors}, "recipients": found}


def plot_transfer(doc: dict, path: Path) -> None:
    donors, found = list(doc["found"]["donors"]), doc["found"]["recipients"]
    shares = [[row["shares"][donor] for donor in donors] for row in found.values()]
    grid = [[s["share"] if s and not s["open"] else np.nan for s in row] for row in shares]
    raw = [[f"{100 * row['accuracies'][donor]['accuracy']:.1f} %" for donor in donors] for row in found.values()]
    texts = [[t if np.isnan(x) else f"{x:.2f}\n{t}" for x, t in zip(*rows)] for rows in zip(grid, raw)]
    names = [f"{Path(n).name}\n(base {100 * row['accuracies']['base']['accuracy']:.1f} %)" for n, row in found.items()]
    fig, ax = plt.subplots(figsize=(3.5 + 1.3 * len(donors), 1.6 + 0.6 * len(found)), constrained_layout=True)
    heat(ax, grid, names, donors, -1, 1, texts, every=1, beyond=True).set_label("share of the\nown vectors' gain")
    ax.set_facecolor("0.85")
    ax.set(xlabel="vectors of", ylabel="recipient", title="Do vectors work in other models?")
    finish(fig, doc, path, "grey: the recipient's own gain is missing or not clearly above 0")


# --------------------------------------------------------------------------------------------------------------- patch
#
# Block l turns the residual stream X into Y = X + MHA(LN(X)) and Z = Y + MLP(LN(Y)). A vector s of layer l-1 is added to X and
# so takes several paths at once: past the block, through its MLP, through every query, key and value head. Each condition
# below opens some of them (P4 Sec. 6):
#
#   Unmodified       X <- X + s: all paths                      Skip-Layer     Z <- Z + s: past the block alone
#   Skip-Attn        Y <- Y + s: past the attention alone       Steer-Q/K/V i  Skip-Attn, and head i of one projection sees s
#   Steer-Head i     Skip-Attn, and all of head i sees s        Skip-Head i    Unmodified, but head i does not see s


def block_after(llm, layer: int):
    """Block l = layer + 1, which the vector of `layer` enters, with its (query heads, key-value heads); or exits with a line."""
    depth = len(model.decoder_layers(llm))
    if layer + 1 >= depth:
        sys.exit(f"layer {layer} is the last of {depth}: no block follows its vector; take a run of --layer {depth - 2}, say")
    block = model.decoder_layers(llm)[layer + 1]
    model.site_module(llm, (layer + 1, "attention"))  # exits for a model whose blocks are not known
    queries, keys = (p.out_features // block.self_attn.head_dim for p in (block.self_attn.q_proj, block.self_attn.k_proj))
    return block, queries, keys


@contextmanager
def ungrouped(attention):
    """Inside the context, every query head has a copy of its key-value head to itself (query h reads h // group size)."""
    groups, originals = attention.num_key_value_groups, {name: getattr(attention, name) for name in ("k_proj", "v_proj")}
    try:
        for name, old in originals.items():
            has_bias = old.bias is not None
            new = nn.Linear(old.in_features, old.out_features * groups, bias=has_bias, device="meta")  # meta: draws no numbers
            for part, p in old.named_parameters():
                p = p.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, 0).flatten(0, 1)
                setattr(new, part, nn.Parameter(p, requires_grad=False))
            setattr(attention, name, new)
        attention.num_key_value_groups = 1
        yield
    finally:
        attention.num_key_value_groups = groups
        for name, old in originals.items():
            setattr(attention, name, old)


@contextmanager
def patched(llm, layer: int, s: torch.Tensor, q=(), k=(), v=(), whole=False, through_norm=True):
    """
    Inside the context, s of `layer` enters the next block after its attention, Y <- Y + s, and through the given heads only.

    Head i in q: U W_Q[i] -> U' W_Q[i]; k and v alike, with key-value heads. whole: k and v name query heads instead, each of
    which then has its own keys and values. U' = LN(X + s), as in the authors' code; with through_norm=False U' = LN(X) + s, as
    P4 Sec. 6 writes it. No head at all is Skip-Attn. s: (D,).
    """
    block, _, _ = block_after(llm, layer)
    attention, seen = block.self_attn, {}

    def norm(module, args, output):  # .forward, here and below, is the module without its hooks
        seen["U'"] = module.forward(args[0] + s.to(args[0].dtype)) if through_norm else output + s.to(output.dtype)

    def project(heads, module, args, output):
        column = torch.arange(output.shape[-1], device=output.device) // attention.head_dim  # the head of every column
        mine = torch.isin(column, torch.tensor(list(heads), device=output.device))
        return torch.where(mine, module.forward(seen["U'"]), output)  # all heads are computed: s = 0 then changes no bit

    with ExitStack() as stack:  # undone on errors too
        if whole:
            stack.enter_context(ungrouped(attention))
        stack.enter_context(model.steer(llm, {(layer + 1, "attention"): s}))
        hooks = []
        if q or k or v:
            hooks.append((block.input_layernorm, norm))
        for name, heads in ("q_proj", q), ("k_proj", k), ("v_proj", v):
            if heads:
                hooks.append((getattr(attention, name), partial(project, heads)))
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def conditions(llm, layer: int, s: torch.Tensor, through_norm=True) -> tuple[dict, dict]:
    """
    The ways of s into block l, each a function that makes its context: ({name: way}, {sweep: [way of head 0, of head 1, ...]}).

    Unmodified and Skip-Layer are vectors at the ends of layers l-1 and l.
    """
    _, queries, keys = block_after(llm, layer)
    way = partial(patched, llm, layer, s, through_norm=through_norm)
    every = range(queries)
    lines = {
        "Unmodified": partial(model.steer, llm, {layer: s}),
        "Skip-Attn": way,
        "Skip-Layer": partial(model.steer, llm, {layer + 1: s}),
    }
    sweeps = {
        "Steer-Q": [partial(way, q=[i]) for i in every],
        "Steer-K": [partial(way, k=[i]) for i in range(keys)],
        "Steer-V": [partial(way, v=[i]) for i in range(keys)],
        "Steer-Head": [partial(way, q=[i], k=[i], v=[i], whole=True) for i in every],
        "Skip-Head": [partial(way, **dict.fromkeys("qkv", [h for h in every if h != i]), whole=True) for i in every],
    }
    return lines, sweeps


@torch.no_grad()
def answer_states(llm, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """The states, after the final norm, that predict the completions' tokens, row by row: (completion tokens, D)."""
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    ids, _ = padded(rows, llm.device)
    h = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    return torch.cat([x[len(p) - 1 : len(p) + len(c) - 1] for x, p, c in zip(h, prompts, completions)])


@torch.no_grad()
def kl(llm, h_p: torch.Tensor, h_q: torch.Tensor, chunk=1024) -> torch.Tensor:
    """KL(p || q) = sum_v p(v) (log p(v) - log q(v)) of the next-token distributions that two states give. (n, D) -> (n,) nats."""
    W, cap = llm.get_output_embeddings().weight, getattr(llm.config, "final_logit_softcapping", None)  # cap: Gemma 2
    found = []
    for i in range(0, len(h_p), chunk):  # never (n, V)
        logits = [(h[i : i + chunk] @ W.T).float() for h in (h_p, h_q)]  # fp32: small differences of large sums
        logp, logq = ((cap * torch.tanh(x / cap) if cap else x).log_softmax(-1) for x in logits)
        found.append((logp.exp() * (logp - logq)).sum(-1))
    return torch.cat(found)


def kl_sums(llm, ways: dict, prompts, completions, batch=32, bar=None) -> dict[str, list[float]]:
    """KL(Unmodified || way), summed over the tokens of each answer, nats: {way: [one number for each answer]}."""
    sums = {name: [] for name in ways}
    for i in tqdm(range(0, len(prompts), batch), desc=bar, disable=bar is None, unit="batch", leave=False):
        texts = prompts[i : i + batch], completions[i : i + batch]
        with ways["Unmodified"]():
            full = answer_states(llm, *texts)
        for name, way in ways.items():
            with way():
                each = kl(llm, full, answer_states(llm, *texts))
            sums[name] += [x.sum().item() for x in each.split([len(c) for c in texts[1]])]
    return sums


def recovery(lost: list[float], base: list[float], reference: list[float] | None = None) -> dict:
    """
    1 - KL(full || patched) / KL(full || base), with its 95 % bootstrap interval: 1 is the steered model, 0 the base.

    lost, base: of each problem, the KL summed over its tokens, so that the ratio is that of the means over all tokens; numerator
    and denominator are resampled together. reference: the recovery minus that of another way with these sums.
    lost [1, 2], base [4, 8] -> 0.75; with reference [2, 4] -> 0.25
    """
    start = base if reference is None else reference
    saved = [[x - y] for x, y in zip(start, lost, strict=True)]
    whole = bootstrap([[x] for x in base])  # the same seed draws the same problems
    return {"value": sum(x for (x,) in saved) / sum(base), "interval_95": percentiles(bootstrap(saved) / whole)}


def familywise_p(gains: list[list[float]], draws=10_000, seed=0) -> list[float]:
    """
    For every head, the p-value of "it changes nothing", adjusted for the number of heads: sign flips, largest t (Westfall-Young).

    gains: (heads, N), the head's KL against the reference's, problem by problem; without an effect each sign is as likely as the
    other. p = share of draws of N signs in which some head is as far from 0 as this one. One head, [1, 1, 1] -> about 2/8.
    """
    d = torch.tensor(gains, dtype=torch.float64)
    size = d.norm(dim=1).clamp(min=1e-300)  # flips leave it as it is, so this statistic orders the draws as t does
    signs = torch.randint(0, 2, (draws, d.shape[1]), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    largest = ((signs @ d.T).abs() / size).amax(1)  # (draws,)
    t = d.sum(1).abs() / size * (1 - 1e-9)  # the draw of all plus signs is as far as the data, whatever the order of summation
    return ((1 + (largest[:, None] >= t).sum(0)) / (1 + draws)).tolist()


def accuracies(llm, tokenizer, ways: dict, rows: list[dict], k=1, **how) -> dict[str, dict]:
    """Share of right answers, k to each problem, sampled under each way with the same seeds, so that differences are paired."""
    right = {}
    for name, way in ways.items():
        with way():
            texts = model.rollouts(llm, tokenizer, {}, [row["problem"] for row in rows], k, **how).texts
        flat = grade(texts, [row["answer"] for row in rows for _ in range(k)])
        right[name] = [flat[i : i + k] for i in range(0, len(flat), k)]  # [problem][answer]
    found = {name: accuracy_of(x) for name, x in right.items()}
    return {name: one | {"over_base": minus(one, found["base"])} for name, one in found.items()}


def percent_of(found: dict) -> str:
    """{"value": 0.432, "interval_95": (0.41, 0.452)} -> "43.2 % [41.0, 45.2]"."""
    low, high = found["interval_95"]
    return f"{100 * found['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def path_patching(
    llm, tokenizer, vectors: dict[int, torch.Tensor], rows: list[dict], following: dict[int, torch.Tensor] | None = None,
    through_norm=True, random=2, k=1, sample_heads=False, batch=32, temperature=1.0, seed=0, bar=None, **how,
) -> dict:  # fmt: skip
    """
    How much of the effect of a vector takes each path through the next block, in two measures.

    recovery: see there; on one answer of the steered model to each problem, for every head. accuracy: k new answers to each
    problem, sampled under the condition; only for those without heads unless sample_heads (the papers' Fig. 5: all).
    following: {l: s_l}, the next layer's own vector. random: number of random vectors of equal norm. how: see model.rollouts.
    """
    if len(vectors) != 1:
        sys.exit(f"path patching wants a run with one vector, this one has layers {sorted(vectors)}; train.py --layer 26, say")
    ((layer, s),) = vectors.items()
    if not s.any():
        sys.exit(f"the vector of layer {layer} is zero: there is no effect to follow; train it first")
    lines, sweeps = conditions(llm, layer, s, through_norm)
    if following is not None:
        if list(following) != [layer + 1]:
            sys.exit(f"the second run must have one vector, at layer {layer + 1}; it has layers {sorted(following)}")
        lines["next vector"] = partial(model.steer, llm, following)
    for i in range(random):
        chance, _ = conditions(llm, layer, random_like(s, i, layer), through_norm)
        lines |= {f"random {i}, {name}": chance[name] for name in ("Unmodified", "Skip-Attn")}
    lines["base"] = partial(model.steer, llm, {})
    heads = {f"{sweep} {i}": way for sweep, ways in sweeps.items() for i, way in enumerate(ways)}
    q, kv = range(len(sweeps["Steer-Q"])), range(len(sweeps["Steer-K"]))
    every_path = {"all heads": partial(patched, llm, layer, s, q, kv, kv)}  # through the norm: the steered model again

    how |= {"temperature": temperature, "seed": seed, "bar": bar}
    rolled = model.rollouts(llm, tokenizer, vectors, [row["problem"] for row in rows], 1, **how)
    lost = kl_sums(llm, lines | heads | every_path, rolled.prompts, rolled.completions, batch, bar)
    steer_heads = [name for name in heads if name.startswith("Steer")]  # Skip-Head has no reference that it could be better than
    p = familywise_p([[x - y for x, y in zip(lost["Skip-Attn"], lost[name])] for name in steer_heads])
    tokens, p = sum(map(len, rolled.completions)), dict(zip(steer_heads, p))

    def row(name):
        found = {"kl": sum(lost[name]) / tokens} | recovery(lost[name], lost["base"])
        if name in p:
            found |= {"over_skip_attn": recovery(lost[name], lost["base"], lost["Skip-Attn"]), "p_adjusted": p[name]}
        return found

    first = rolled.prompts[:batch], rolled.completions[:batch]
    with model.steer(llm, vectors):
        plain, zero = answer_states(llm, *first), torch.zeros_like(s)
        with patched(llm, layer, zero, q, kv, kv, through_norm=through_norm):
            no_patch = (answer_states(llm, *first) - plain).abs().max().item()
        with patched(llm, layer, zero, q, q, q, True, through_norm):
            no_groups = (answer_states(llm, *first) - plain).abs().max().item()
    numbers = {
        "settings": {
            "layer": layer, "block": layer + 1, "norm": s.norm().item(), "problems": len(rows), "tokens": tokens,
            "temperature": temperature, "seed": seed, "through_norm": through_norm, "comparisons": len(p),
        },
        "controls": {  # hooks that add nothing: 0; the same with heads un-grouped: 0 up to rounding; every path: recovery 1
            "no_patch": no_patch, "no_groups": no_groups, "all_heads": row("all heads"),
        },
        "lines": {name: row(name) for name in lines},
        "heads": {sweep: [row(f"{sweep} {i}") for i in range(len(ways))] for sweep, ways in sweeps.items()},
        "accuracy": accuracies(llm, tokenizer, lines | heads if sample_heads else lines, rows, k, **how),
    }  # fmt: skip
    best = max(steer_heads, key=lambda name: row(name)["over_skip_attn"]["value"])
    main = [name for name in lines if not name.startswith("random")]
    numbers["reading"] = (
        f"The vector of layer {layer} through block {layer + 1} (n = {len(rows)} problems, 95 % intervals): Skip-Attn keeps "
        f"{percent_of(row('Skip-Attn'))} of the change of the next-token distributions, Skip-Layer "
        f"{percent_of(row('Skip-Layer'))}; the head that adds most to Skip-Attn is {best} with "
        f"{percent_of(row(best)['over_skip_attn'])}, and "
        f"{sum(x < 0.05 for x in p.values())} of {len(p)} differ from it (adjusted p < 0.05). Accuracy: "
        + ", ".join(f"{name} {percent(numbers['accuracy'][name])}" for name in main)
        + "."
    )
    return numbers


COLOURS = {"Unmodified": "black", "Skip-Attn": "tab:orange", "Skip-Layer": "tab:purple", "next vector": "tab:green"}
COLOURS["base"] = "grey"


def draw_heads(ax, sweeps: dict, lines: dict) -> None:
    """A dot for every head of {sweep: [{"value", "interval_95"}]} between the lines of the conditions without heads."""
    x, ticks, inside = 0.0, {}, [lines["Skip-Attn"], lines["Skip-Layer"], lines["Unmodified"]]
    for sweep, heads in sweeps.items():
        width = max(len(heads), 11)  # room for the name
        ax.text(x + width / 2, 1.01, sweep, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
        for i, head in enumerate(heads):
            at, (low, high) = x + (i + 0.5) * width / len(heads), head["interval_95"]
            bars = [[100 * (head["value"] - low)], [100 * (high - head["value"])]]
            fill = None if head.get("p_adjusted", 1) < 0.05 else "white"
            ax.errorbar(at, 100 * head["value"], bars, fmt="o", ms=5, color="tab:blue", mfc=fill, capsize=2)
            ticks[at] = f"{i}" if i % (1 + len(heads) // 8) == 0 else ""
        inside += heads
        x += width + 1
        ax.axvline(x - 0.5, color="lightgrey", lw=0.8)
    for name, found in lines.items():
        (low, high), colour, label = found["interval_95"], COLOURS.get(name), f"{name} {100 * found['value']:.1f} %"
        if colour is None:  # random vectors: often far below, so only in the key
            ax.plot([], [], " ", label=label)
            continue
        ax.axhline(100 * found["value"], color=colour, lw=1.2, ls="--" if name == "base" else "-", zorder=0, label=label)
        ax.axhspan(100 * low, 100 * high, color=colour, alpha=0.13, lw=0, zorder=0)
    low, high = 100 * min(f["interval_95"][0] for f in inside), 100 * max(f["interval_95"][1] for f in inside)
    room = 0.08 * (high - low) + 0.01
    ax.set(xlim=(-0.5, x - 0.5), xticks=list(ticks), xticklabels=ticks.values(), ylim=(low - room, high + room))
    ax.set_xlabel("query head (Q, Head) or key-value head (K, V)")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_patch(numbers: dict, path: Path) -> None:
    """Recovery of every head (as P4 Fig. 5, 7, 8), and below it the accuracies: of every head if there are any."""
    settings, lines, accuracy, sweeps = numbers["settings"], numbers["lines"], numbers["accuracy"], numbers["heads"]
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7.5), constrained_layout=True)
    draw_heads(top, sweeps, lines)
    top.set_ylabel("recovery (%)")
    top.set_title(f"Through which part of block {settings['block']} does the vector of layer {settings['layer']} act?", pad=22)
    if len(accuracy) > len(lines):
        shown = {name: found | {"value": found["accuracy"]} for name, found in accuracy.items()}
        by_head = {sweep: [shown[f"{sweep} {i}"] for i in range(len(heads))] for sweep, heads in sweeps.items()}
        draw_heads(bottom, by_head, {name: shown[name] for name in lines})
        bottom.set_ylabel("accuracy (%)")
    else:
        for y, (name, found) in enumerate(accuracy.items()):
            low, high = found["interval_95"]
            bars = [[100 * (found["accuracy"] - low)], [100 * (high - found["accuracy"])]]
            bottom.errorbar(100 * found["accuracy"], y, xerr=bars, fmt="o", color=COLOURS.get(name, "tab:brown"), capsize=3)
        bottom.axvline(100 * accuracy["base"]["accuracy"], color="grey", linestyle="--", lw=1.2, zorder=0)
        bottom.set(yticks=range(len(accuracy)), yticklabels=accuracy, xlim=(0, 100), xlabel="accuracy (%)")
        bottom.invert_yaxis()
    fig.supxlabel(
        f"T = {settings['temperature']:g}; bars, bands: 95 % intervals over {settings['problems']} problems. Full dots differ "
        f"from Skip-Attn (p < 0.05, adjusted for {settings['comparisons']} heads).\nRecovery: 1 - KL(full || patched) / KL(full "
        "|| base) on answers of the steered model." + ("" if settings["through_norm"] else " s enters after the norm."),
        fontsize=9,
    )
    fig.savefig(path, dpi=150)
    plt.close(fig)


def patch(lab: Lab) -> dict:
    """How much of a vector's effect takes each path through the next block; a second run has the next layer's own vector."""
    first, *more = lab.runs
    if len(more) > 1:
        sys.exit(f"patch wants a run and, if it is there, one of the next layer; got {len(lab.runs)}")
    following, args = more[0].vectors if more else None, lab.args
    return path_patching(
        lab.llm, lab.tokenizer, first.vectors, lab.rows, following, through_norm=args.through_norm, k=args.samples,
        sample_heads=args.sample_heads, temperature=args.temperature, seed=args.seed, bar="patch", **lab.how,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- attention


@contextmanager
def eager(llm):
    """Inside the context, attention is computed by plain products, the only way that gives its weights (sdpa gives none)."""
    before = llm.config._attn_implementation
    llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        llm.set_attn_implementation(before)


@torch.no_grad()
def patterns(llm, ids: list[int], queries: torch.Tensor, reduce=lambda layer, pattern: pattern) -> dict:
    """Read one text: {layer: reduce(layer, pattern)}; pattern: (H, Q, T) fp32, the weights of the queries on all keys."""
    found = {}

    def hook(layer, module, args, output):
        found[layer] = reduce(layer, output[1][0, :, queries].float())  # of (1, H, T, T), which does not outlive its layer

    with eager(llm), ExitStack() as stack:
        for layer, block in enumerate(model.decoder_layers(llm)):
            stack.callback(block.self_attn.register_forward_hook(partial(hook, layer)).remove)
        llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    return found


def pattern_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of attention rows, mean over the queries: (H, Q, T) twice -> (H,) nats. Masked keys are 0 in both."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))  # bf16 rows add up to 1 only roughly
    tiny = torch.finfo(torch.float32).tiny
    return (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum(-1).mean(-1)


def in_dtype(llm, dtype):
    """A copy with parameters of another dtype. Not llm.to: that rounds the rotary frequencies too, as loading never does."""
    other = copy.deepcopy(llm)
    for p in other.parameters():
        p.data = p.data.to(dtype)
    return other


def attention_kl(
    llm, tokenizer, vectors: dict[int, torch.Tensor], rows: list[dict], queries=128, temperature=1.0, seed=0, bar=None, **how
) -> dict:
    """
    KL(steered || base) of the attention patterns on one answer of the steered model to each problem, by layer and head.

    Beside it the same KL for random vectors of equal norms, and the floor: the base model in another dtype (bf16 for an fp32
    model, fp32 else) against itself. Mean over query positions, prompt included, at most `queries` of them in even steps (all
    layers' rows of the base model are kept meanwhile); the first sees one key only and is left out. how: more of model.rollouts.
    """
    problems = [row["problem"] for row in rows]
    rolled = model.rollouts(llm, tokenizer, vectors, problems, 1, temperature=temperature, seed=seed, bar=bar, **how)
    other = in_dtype(llm, torch.bfloat16 if llm.dtype == torch.float32 else torch.float32)
    chance = {layer: random_like(s, seed, layer) for layer, s in vectors.items()}
    runs = {"steered": (llm, vectors), "random": (llm, chance), "floor": (other, {})}
    found = {name: [] for name in runs}  # of each answer: (L, H)
    for prompt, answer in tqdm(list(zip(rolled.prompts, rolled.completions)), desc=bar, disable=bar is None, leave=False):
        ids = prompt + answer
        some = torch.linspace(1, len(ids) - 1, min(queries, len(ids) - 1)).round().long().to(llm.device)
        base = patterns(llm, ids, some)
        for name, (who, given) in runs.items():
            with model.steer(who, given):
                layers = patterns(who, ids, some, lambda layer, pattern, base=base: pattern_kl(pattern, base[layer]))
            found[name].append(torch.stack(list(layers.values())).cpu())
    found = {name: torch.stack(x).double() for name, x in found.items()}  # (N, L, H)

    above = min(vectors) + 1  # up to there nothing can change
    numbers = {
        "settings": {
            "layers": sorted(vectors), "problems": len(rows), "temperature": temperature, "seed": seed, "queries": queries,
            "floor": f"{other.dtype} against {llm.dtype}".replace("torch.", ""),
        },
        "controls": {"largest_below": found["steered"][:, :above].abs().max().item()},  # 0
        "heads": {name: x.mean(0).tolist() for name, x in found.items()},  # [layer][head]
        "layers": {name: [mean_of(x[:, layer].tolist()) for layer in range(x.shape[1])] for name, x in found.items()},
        "above": {name: mean_of(x[:, above:].flatten(1).tolist()) for name, x in found.items()} if above < len(base) else None,
    }  # fmt: skip
    if numbers["above"] is None:
        numbers["reading"] = f"The vector is at the last layer, {above - 1}: no attention comes after it, so none can change."
        return numbers
    by_head = found["steered"].mean(0)
    layer, head = divmod(by_head.argmax().item(), by_head.shape[1])
    text = {name: f"{x['mean']:.2g} {span(x)}" for name, x in numbers["above"].items()}
    numbers["reading"] = (
        f"Above layer {above - 1} the vector changes attention by {text['steered']} nats a query (mean over layers and heads, "
        f"n = {len(rows)} answers, 95 % intervals), a random vector of equal norm by {text['random']}, rounding "
        f"({numbers['settings']['floor']}) by {text['floor']}; most at layer {layer}, head {head}: {by_head[layer, head]:.2g}."
    )
    return numbers


def draw_attention(numbers: dict, path: Path) -> None:
    """Heat map of the KL by layer and head, and its mean over heads by layer against the random vector and the floor."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.2), constrained_layout=True, height_ratios=[1, 1.3])
    values = list(zip(*numbers["heads"]["steered"]))  # [head][layer]
    shown = [[x if x > 0 else float("nan") for x in row] for row in values]  # nan: grey
    image = top.imshow(shown, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    top.set_facecolor("lightgrey")
    fig.colorbar(image, ax=top, label="KL (nats)")
    layers = ", ".join(map(str, numbers["settings"]["layers"]))
    top.set(ylabel="query head", yticks=range(0, len(values), 1 + len(values) // 8))
    top.set_title(f"Does the vector of layer {layers} change where the model looks?", fontsize=11)
    for name, colour, label in (
        ("steered", "tab:blue", "the vector"),
        ("random", "tab:brown", "random vector of equal norm"),
        ("floor", "grey", f"floor: base model, {numbers['settings']['floor']}"),
    ):
        by_layer = [(layer, x) for layer, x in enumerate(numbers["layers"][name]) if x["mean"] > 0]
        if by_layer:
            x = [layer for layer, _ in by_layer]
            bottom.plot(x, [m["mean"] for _, m in by_layer], ".-", color=colour, label=label)
            bottom.fill_between(x, *zip(*(m["interval_95"] for _, m in by_layer)), color=colour, alpha=0.2, lw=0)
    bottom.set(
        yscale="log", ylabel="mean over heads (nats)", xlim=(-0.5, len(values[0]) - 0.5),
        xlabel="layer (0-based). Grey: exactly 0\nKL(steered || base) of attention patterns, mean over queries; bands: 95 % "
        f"intervals over {numbers['settings']['problems']} answers",
    )  # fmt: skip
    bottom.legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def attention(lab: Lab) -> dict:
    """Where the steered model looks, against the base model: KL of attention patterns."""
    (run,) = lab.runs
    how = {"temperature": lab.args.temperature, "seed": lab.args.seed, "bar": "attention"}
    return attention_kl(lab.llm, lab.tokenizer, run.vectors, lab.rows, **how, **lab.how)


# --------------------------------------------------------------------------------------------------------- scale, cost


@torch.no_grad()
def token_scales(llm, vectors: dict, rows: list[list[int]]) -> dict[int, list[list[float]]]:
    """|B| A x_t of every token of each text under rank-1 LoRAs, x the input of mlp.down_proj: {layer: [a list for each text]}."""
    layers = [model.layer_of(place) for place in vectors if model.name_of(place).endswith("lora_A")]
    sizes = {layer: [] for layer in layers}
    for batch in batches(rows):

        def see(layer, module, args):
            size = vectors[layer, "lora_B"].norm() * (args[0].float() @ vectors[layer, "lora_A"][0])  # (B, T)
            sizes[layer] += [size[b, : len(rows[i])].tolist() for b, i in enumerate(batch)]  # noqa: B023, used at once

        with ExitStack() as stack:
            stack.enter_context(model.steer(llm, vectors))
            for layer in layers:
                down = model.decoder_layers(llm)[layer].mlp.down_proj
                stack.callback(down.register_forward_pre_hook(partial(see, layer)).remove)
            llm.get_decoder()(input_ids=padded([rows[i] for i in batch], llm.device)[0], use_cache=False)
    return sizes


def segments(prompts: list[list[int]], other: list[int]) -> list[list[str]]:
    """
    For every token of each prompt "system", "question" or "turn" (the template behind the question).

    other: a prompt with a question that has nothing in common with theirs; what a prompt shares with it is the template.
    """
    found = []
    for prompt in prompts:
        room = min(len(prompt), len(other))
        before = next((i for i in range(room) if prompt[i] != other[i]), room)
        after = next((i for i in range(room - before) if prompt[-1 - i] != other[-1 - i]), room - before)
        found.append(["system"] * before + ["question"] * (len(prompt) - before - after) + ["turn"] * after)
    return found


def scale(lab: Lab) -> dict:
    """The size |B| A x_t of what a rank-1 LoRA adds at each token, x the input of mlp.down_proj (P1 abstract, iii; B App. D)."""
    (run,) = lab.runs
    ranks = {s.shape[0] for place, s in run.vectors.items() if model.name_of(place).endswith("lora_A")}
    if ranks != {1}:
        shapes = {model.name_of(place): tuple(s.shape) for place, s in run.vectors.items()}
        sys.exit(f"scale wants a run of train.py --method lora --rank 1; {run.folder} holds {shapes}")
    prompts, completions, _ = rolled_out(lab, run.vectors, "adapted")
    other = model.prompt_ids(lab.tokenizer, "?!", lab.how["system"], lab.how["template"])
    where = [s + ["answer"] * len(c) for s, c in zip(segments(prompts, other), completions)]
    rows = [p + c for p, c in zip(prompts, completions)]
    sizes = token_scales(lab.llm, run.vectors, rows)
    found = {str(layer): {} for layer in sizes}
    for layer in sizes:
        for segment in ("system", "question", "turn", "answer"):
            texts = [[x for x, at in zip(row, ats) if at == segment] for row, ats in zip(sizes[layer], where)]
            if texts := [text for text in texts if text]:
                found[str(layer)][segment] = spread(sum(texts, [])) | mean_of([[abs(x) for x in text] for text in texts])
    layer = list(sizes)[-1]
    tokens = [[piece(lab.tokenizer, token), x] for token, x in zip(rows[0], sizes[layer][0])]
    said = ", ".join(f"{segment} {row['mean']:.3g} {span(row, 3)}" for segment, row in found[str(layer)].items())
    reading = f"Mean size of what is added at layer {layer}, by part of the text: {said}."
    return {"reading": reading, "by_layer": found, "example": {"layer": layer, "tokens": tokens}}


def plot_scale(doc: dict, path: Path) -> None:
    found, example = doc["found"]["by_layer"], doc["found"]["example"]
    limit = max(abs(x) for _, x in example["tokens"]) or 1.0
    tokens = [(text, x, False) for text, x in example["tokens"]]
    lower = 0.2 * len(lines_of(tokens)) + 0.5
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 3.2 + lower), height_ratios=[2.6, lower], constrained_layout=True)
    boxes = [(layer, segment, row) for layer, rows in found.items() for segment, row in rows.items()]
    top.bxp([row for _, _, row in boxes], showfliers=False)
    names = [f"{segment}\n{f'layer {l}, ' if len(found) > 1 else ''}n={row['count']}" for l, segment, row in boxes]
    top.set_xticks(range(1, len(names) + 1), names, fontsize=7)
    top.axhline(0, color="black", linewidth=0.5)
    top.set(ylabel="|B| A x", title="Where does the adaptive vector act?")
    write_tokens(bottom, tokens, limit)
    bar = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), "RdBu")
    label = f"|B| A x at layer {example['layer']} (units of the residual stream)"
    fig.colorbar(bar, ax=bottom, location="bottom", shrink=0.5, aspect=40, label=label)
    finish(fig, doc, path, "boxes: quartiles over tokens, whiskers 5 and 95 %")


def cost(args: Config) -> dict:
    """What training each run costs (B Table 3), from its cost.json, and what it brings, if evaluate.py has measured it."""
    keys = ("method", "trained_parameters", "optimizer_bytes", "update_seconds", "sync_seconds", "sampler")
    found = {}
    for folder in args.runs:
        path = Path(folder) / "cost.json"
        if not path.is_file():
            sys.exit(f"{folder} has no cost.json: train.py writes it at the end of a run; train it again, or leave it out")
        row = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in keys if key not in row]:
            sys.exit(f"{path} lacks {', '.join(missing)}")
        found[folder] = {key: row[key] for key in keys} | {"training_seconds": None, "right": {}}
        if (path := Path(folder) / "metrics.jsonl").is_file():
            steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            parts = ["seconds_sampling", "seconds_grading", "seconds_training"]  # vectors are synchronised within the sampling
            parts += ["seconds_sync"] * (row["method"] == "full")
            found[folder]["training_seconds"] = sum(step.get(part, 0.0) for step in steps for part in parts)
        if (path := Path(folder) / "eval.json").is_file():
            measured = json.loads(path.read_text(encoding="utf-8"))
            name = next((m["benchmark"] for m in measured if m["benchmark"] == "Avg"), measured[0]["benchmark"])
            for m in measured:
                if m["benchmark"] == name and (steered := m["steered"]):
                    column = f"{name}, " + (f"T = {m['temperature']:g}" if m["temperature"] else "greedy")
                    column += f", n = {steered['problems']}" if "problems" in steered else ""
                    found[folder]["right"][column] = {key: steered[key] for key in ("accuracy", "interval_95")} | {"of": name}
    least, most = (pick(found, key=lambda run: found[run]["trained_parameters"]) for pick in (min, max))
    reading = f"{least} trains {found[least]['trained_parameters']:,} numbers"
    if least != most:
        times = found[most]["trained_parameters"] / found[least]["trained_parameters"]
        reading += f", {most} {found[most]['trained_parameters']:,}, {times:,.0f} times as many"
    return {"reading": reading + ".", "runs": found}


def plot_cost(doc: dict, path: Path) -> None:
    runs = doc["found"]["runs"]
    decodings = list(dict.fromkeys(decoding for row in runs.values() for decoding in row["right"]))
    head = ["run", *decodings, "trained\nparameters", "optimizer\nmemory"]
    head += ["training", "update", "sync to\nsampler", "sampler"]
    cells = [
        [Path(run).name]
        + [percent(row["right"][decoding]) if decoding in row["right"] else "" for decoding in decodings]
        + [f"{row['trained_parameters']:,}", f"{row['optimizer_bytes'] / 1000:,.1f} kB"]
        + ["" if row["training_seconds"] is None else f"{row['training_seconds']:,.0f} s"]
        + [f"{row['update_seconds']:.2g} s", f"{row['sync_seconds']:.2g} s", str(row["sampler"])]
        for run, row in runs.items()
    ]
    fig, ax = plt.subplots(figsize=(8 + 1.5 * len(decodings), 1.2 + 0.3 * len(cells)), constrained_layout=True)
    table = ax.table([[plain(c) for c in row] for row in cells], colLabels=head, loc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(range(len(head)))
    for (row, _), made in table.get_celld().items():
        made.set_height(0.85 / (len(cells) + 2) * (1.8 if row == 0 else 1))
    ax.axis("off")
    ax.set_title("What does training cost?")
    finish(fig, doc, path, "training: sampling, grading and training of all steps; update and sync: medians over steps")
    lines = ["| " + " | ".join(c.replace("\n", " ") for c in row) + " |" for row in [head, *cells]]
    lines.insert(1, "|" + "---|" * len(head))
    write(path.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


# -------------------------------------------------------------------------------------------------------------- figures

SHADES = matplotlib.colors.LinearSegmentedColormap.from_list("layers", plt.cm.turbo_r(np.linspace(0.08, 0.95, 64)))


def shade(layer: int, depth: int):
    """The colour of a layer, the same in all figures: early warm, late cool (P4 Fig. 2)."""
    return SHADES(layer / max(1, depth - 1))


def plain(text: str) -> str:
    """Text that matplotlib prints as it stands: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def points(rows: list[dict]) -> tuple[list, list, list]:
    """(accuracies, lower ends, upper ends) in percent."""
    return tuple([100 * x for x in xs] for xs in zip(*((r["accuracy"], *r["interval_95"]) for r in rows)))


def bars(ax, x, rows: list[dict], width: float, colour, label: str | None) -> None:
    """Accuracies as bars with their intervals and the number on top, in percent."""
    acc, low, high = points(rows)
    error = [[a - b for a, b in zip(acc, low)], [b - a for a, b in zip(acc, high)]]
    error = error if np.any(error) else None  # some of the papers' numbers have none
    ax.bar(x, acc, width, yerr=error, capsize=2, color=colour, label=label, error_kw={"linewidth": 1})
    ax.margins(y=0.12)  # room for the numbers
    for at, a, top in zip(x, acc, high):
        ax.text(at, top, f"{a:.1f}", ha="center", va="bottom", fontsize=7)


def band(ax, x, rows: list[dict], colour, label: str) -> None:
    """Accuracies as a line with their intervals as a band, in percent."""
    acc, low, high = points(rows)
    ax.plot(x, acc, "o-", ms=3, color=colour, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def heat(ax, grid, rows, columns, low: float, high: float, texts=None, every: int | None = None, beyond=False):
    """
    A matrix as colours, low < 0: RdBu centred at 0, else one hue; texts in its cells. Returns the bar of colours.

    Labels are thinned out unless every is 1. beyond: values may lie outside low..high.
    """
    image = ax.imshow(np.array(grid, float), cmap="RdBu" if low < 0 else "Blues", vmin=low, vmax=high, aspect="auto")
    for y, line in enumerate(texts or []):
        for x, text in enumerate(line):
            strong = abs(grid[y][x]) > 0.65 * high  # False for nan
            ax.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if strong else "black")
    for axis, names in ((ax.yaxis, list(rows)), (ax.xaxis, list(columns))):
        some = range(0, len(names), every or max(1, len(names) // 14))
        axis.set_ticks(list(some), [names[i] for i in some], fontsize=7)
    return ax.figure.colorbar(image, ax=ax, extend="both" if beyond else "neither")


def about(doc: dict) -> str:
    """Model, n and seed of an analysis, for captions."""
    s = doc["settings"]
    if "n" not in s or doc["name"] == "lens":  # no problem is involved
        return s.get("model", "")
    answers_each = f" x {s['samples']} answers" if s["samples"] > 1 else ""
    return f"{s['model']}; n = {s['n']} problems{answers_each}, seed {s['seed']}"


def finish(fig, doc: dict, path: Path, more: str) -> None:
    """Add the caption and write the figure."""
    fig.supxlabel(plain("; ".join(filter(None, [about(doc), doc.get("caption", more)]))), fontsize=7, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------------------- report

PAPERS = {  # the papers' numbers for an analysis, keys of data/paper.json
    "sweep": ["P4.table2", "P4.table4", "P4.table3", "P4.table5"],
    "lens": ["P4.table8.qwen", "P4.table8.llama", "B.table2"],
    "prefix": ["P4.fig4", "P4.fig13"],
    "persistence": ["P4.table6.diff_diff", "P4.table6.diff_vector", "P4.table7.diff_diff", "P4.table7.diff_vector"],
    "sites": ["P4.fig10"],
    "orthogonal": ["P4.fig12"],
    "compose": ["P1.table2.qwen", "P1.table2.llama"],
    "transfer": ["P4.table1"],
    "cost": ["B.table3", "B.table5"],
}


BOXES = ("by_decoding", "by_layer", "conditions", "recipients", "accuracies", "vectors")  # names that say nothing to a reader


def table_of(rows: list[dict], columns: list | None = None) -> str:
    """Rows of names and numbers as HTML; a list is spread over columns, whose names are given if they all have one."""

    def spread_out(row, cell):
        return "".join(f"<{cell}>{'' if x is None else html.escape(str(x))}</{cell}>" for x in row)

    first = rows[0].items()
    names = [
        [key] if not isinstance(x, list) else columns if columns and len(x) == len(columns) else [""] * len(x) for key, x in first
    ]
    lines = [spread_out(sum(names, []), "th")]
    for row in rows:
        lines.append(spread_out([x for value in row.values() for x in (value if isinstance(value, list) else [value])], "td"))
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def numbers(found, name: str = "") -> list[dict]:
    """What an analysis found as rows of a table: accuracies, shares, and lists of tokens or cosines, wherever they are."""
    if isinstance(found, dict) and isinstance(found.get("accuracy"), (int, float)):
        return [{"what": name, "value": percent(found, "" if {"correct", "of"} & found.keys() else "+")}]
    if isinstance(found, dict) and isinstance(found.get("value"), (int, float)):  # a recovery; those of heads are in the figure
        return [{"what": name, "value": percent_of(found)}]
    if isinstance(found, dict) and isinstance(found.get("share"), float):
        share = {"what": name, "value": f"{found['share']:.2f} {span(found)}" + (" (not to be judged)" if found["open"] else "")}
        return [share, *numbers(found.get("over_single"), f"{name}, over the better single")]
    if isinstance(found, dict):
        return [
            row
            for key, part in found.items()
            if key != "heads"
            for row in numbers(part, ", ".join(filter(None, [name, "" if key in BOXES else str(key)])))
        ]
    if isinstance(found, list) and found and all(isinstance(x, list) and len(x) == 3 and isinstance(x[0], str) for x in found):
        return [{"what": name, "value": [f"{quoted(token)} {dot:.3g} {cosine:.2f}" for token, dot, cosine in found]}]
    if isinstance(found, list) and found and all(isinstance(x, list) and x and isinstance(x[0], str) for x in found):
        return [{"what": f"{name} {i + 1}", "value": " ".join(map(quoted, tokens))} for i, tokens in enumerate(found)]
    if isinstance(found, list) and found and all(isinstance(x, list) for x in found):
        return [row for i, part in enumerate(found) for row in numbers(part, f"{name} {i + 1}")]
    if isinstance(found, list) and found and all(x is None or isinstance(x, float) for x in found):
        return [{"what": name, "value": [None if x is None else f"{x:.3g}" for x in found]}]
    return []


# The papers' numbers in the form of what our analyses find, so that the same functions draw them. Each function takes
# data/paper.json and a model's name; it returns (found, caption), or None where the paper has no such figure for that model.

PAPER_TABLES = {
    "Qwen2.5-Math-7B": {"T = 1": "P4.table2", "greedy": "P4.table4", "shifts": "P4.table6", "pairs": "P1.table2.qwen"},
    "Llama-3.1-8B-Instruct": {"T = 1": "P4.table3", "greedy": "P4.table5", "shifts": "P4.table7", "pairs": "P1.table2.llama"},
}


def printed(mean: float, pm: float = 0.0) -> dict:
    """A printed accuracy in percent, and its +- where there is one, in the form of `accuracy_of`."""
    return {"accuracy": mean / 100, "interval_95": [(mean - pm) / 100, (mean + pm) / 100]}


def averages(paper: dict, who: str, decoding: str) -> dict:
    """Of the six benchmarks, from P4 Tables 2 to 5: {"base", "all", "full", "0", "1", ...: see printed}."""
    rows = paper[PAPER_TABLES[who][decoding]]["rows"]
    names = {f"base, {decoding.replace(' ', '')}": "base", "all layers": "all"}  # both tables have the base model both ways
    found = {row["setup"].removeprefix("layer "): printed(row["mean"][-1], row["pm"][-1]) for row in rows}
    return {names.get(name, name): row for name, row in found.items() if not name.startswith("base") or name in names}


def paper_sweep(paper: dict, who: str):
    found = {decoding: averages(paper, who, decoding) for decoding in ("T = 1", "greedy")}
    if found["greedy"]["all"] == found["T = 1"]["all"]:
        del found["greedy"]["all"]  # Llama's Table 5 repeats the row of Table 3: there is no greedy number
    layers = sorted(int(name) for name in found["greedy"] if name.isdigit())
    tables = " and ".join(PAPER_TABLES[who][decoding][-1] for decoding in found)
    caption = f"v4, Tables {tables}; mean of six benchmarks; bands: printed ± over seeds"
    return {"depth": len(layers), "layers": layers, "by_decoding": found}, caption


def paper_persistence(paper: dict, who: str):
    table, found = PAPER_TABLES[who]["shifts"], {}
    for kind in ("diff_diff", "diff_vector"):
        for row in paper[f"{table}.{kind}"]["rows"]:
            layer, values = row["layer"], row["value"]  # with nulls before the layer
            found.setdefault(str(layer), {"layers": list(range(layer, len(values)))})[kind] = values[layer:]
    return {"depth": len(found), "by_layer": found}, f"v4, Table {table[-1]}"


def paper_prefix(paper: dict, who: str):
    found = {}
    for row in paper["P4.fig4"]["rows"]:
        if Path(row["model"]).name == who:
            accuracy = {"base": row["base"], f"base + {quoted(row['prefix'])}": row["base_prefix"], "vector": row["vector"]}
            found[row["decoding"].replace("=", " = ")] = {name: printed(x) for name, x in accuracy.items()}
    return {"conditions": list(found["greedy"]), "by_decoding": found}, "v4, Fig. 4; mean of six benchmarks; no ± printed"


def paper_sites(paper: dict, who: str):
    if who != "Qwen2.5-Math-7B":
        return None
    found = {row["site"]: printed(row["mean"], row["pm"]) for row in paper["P4.fig10"]["rows"]}
    caption = "v4, Fig. 10, base: Table 2; mean of six benchmarks; bars: printed ± over seeds\norder of the middle three: likely"
    return {"conditions": {"base": averages(paper, who, "T = 1")["base"]} | found}, caption


def paper_orthogonal(paper: dict, who: str):
    if who != "Qwen2.5-Math-7B":
        return None
    names = ("", ", first orthogonal", ", second orthogonal")
    found = {f"{row['layer']}{name}": printed(x) for row in paper["P4.fig12"]["rows"] for name, x in zip(names, row["value"])}
    caption = "v4, Fig. 12, base: Table 2; mean of six benchmarks; no ± printed"
    return {"conditions": {"base": averages(paper, who, "T = 1")["base"]} | found}, caption


def paper_compose(paper: dict, who: str):
    table = paper[PAPER_TABLES[who]["pairs"]]
    cells = {(i, j): x / 100 for i, row in enumerate(table["rows"]) for j, x in enumerate(row["value"]) if x is not None}
    elsewhere, gains = averages(paper, who, "T = 1"), {}
    whole = elsewhere["all"]["accuracy"]
    for (i, j), pair in cells.items():
        if i < j:  # on the diagonal the table has the single vectors, where they are not lost
            single = max(cells.get((x, x), elsewhere[str(x)]["accuracy"]) for x in (i, j))
            gain = {"open": whole <= single, "cross": pair >= 0.99 * whole, "over_single": {"accuracy": pair - single}}
            gains[f"{i}+{j}"] = gain | {"share": None if gain["open"] else (pair - single) / (whole - single)}
    place = "column 26 below row 3" if who.startswith("Qwen") else "column 30 below row 12"  # the notes in paper.json
    caption = f"v1, Table 2; all layers and lost singles: v4, Table {PAPER_TABLES[who]['T = 1'][-1]}\n"
    caption += f"hatched: lost in the text of the PDF; {place}: assigned by place alone"
    return {"layers": table["columns"], "gains": gains}, caption


PAPER_FIGURES = {
    "sweep": paper_sweep, "persistence": paper_persistence, "prefix": paper_prefix, "sites": paper_sites,
    "orthogonal": paper_orthogonal, "compose": paper_compose,
}  # fmt: skip


def paper_docs(name: str, paper: dict) -> list[dict]:
    """The papers' numbers for an analysis as documents like ours, one for each model."""
    docs = []
    for who in PAPER_TABLES if name in PAPER_FIGURES else ():
        if (read := PAPER_FIGURES[name](paper, who)) is not None:
            found, caption = read
            docs.append({"name": name, "settings": {"model": who}, "found": found, "caption": f"arXiv:2509.06608{caption}"})
    return docs


def picture(path: Path, text: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">\n'


def report(folder: Path) -> Path:
    """One page with every figure under folder/*/figures and folder/figures, and the papers' figures and numbers beside ours."""
    paper = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))
    body, done, order = "", set(), {name: i for i, name in enumerate(ANALYSES)}
    docs = [(path, read_doc(path)) for path in sorted([*folder.glob("figures/*.json"), *folder.glob("*/figures/*.json")])]
    docs = sorted(((p, d) for p, d in docs if d), key=lambda pd: (order.get(pd[1]["name"], len(order)), str(pd[0])))
    if not docs:
        sys.exit(f"no figures under {folder}: make one first, for example `python analyze.py lens out/tiny-layer27`")
    for path, doc in docs:
        body += f"<h2>{html.escape(doc['name'])}: {html.escape(str(path.parent.parent))}</h2>\n"
        body += f"<p>{html.escape(doc['reading'])}</p>\n"
        image = path.with_suffix(".png")
        if image.is_file():
            body += picture(image, doc["reading"])
        if path.with_suffix(".html").is_file():
            body += f"<p>The answers token by token: <code>{html.escape(str(path.with_suffix('.html')))}</code></p>\n"
        body += f"<p><small>{html.escape(about(doc))}: <code>{html.escape(doc['command'])}</code></small></p>\n"
        if doc["name"] != "case" and (ours := numbers(doc["found"])):
            body += f"<details><summary>the numbers</summary>{table_of(ours)}</details>\n"
        for other in paper_docs(doc["name"], paper):
            drawn = folder / "paper" / f"{doc['name']}-{other['settings']['model']}.png"
            if drawn not in done:  # prefix, for one, may be there for several runs
                ANALYSES[doc["name"]][1](other, drawn)
                done.add(drawn)
                title = f"In the paper, {other['settings']['model']}"
                body += f"<details open><summary>{title}</summary>{picture(drawn, title)}</details>\n"
        for entry in (paper[key] for key in PAPERS.get(doc["name"], [])):
            what = html.escape(f"The paper: {entry['title']} ({entry['source']}; {entry['unit']})")
            body += f"<details><summary>{what}</summary>{table_of(entry['rows'], entry['columns'])}</details>\n"
    path = folder / "report.html"
    write(path, page("Steering vectors: what was measured", body))
    return path


# ----------------------------------------------------------------------------------------------------------------- main

ANALYSES = {  # name: (numbers, figure); cost and report need no model
    "sweep": (sweep, plot_sweep),
    "lens": (lens, plot_lens),
    "shift": (shift, plot_shift),
    "prefix": (prefix, plot_prefix),
    "case": (case, plot_case),
    "persistence": (persistence, plot_persistence),
    "similarity": (similarity, plot_similarity),
    "sites": (side_by_side, plot_side_by_side),
    "orthogonal": (side_by_side, plot_side_by_side),
    "compose": (compose, plot_compose),
    "ablate": (ablate, plot_ablate),
    "transfer": (transfer, plot_transfer),
    "scale": (scale, plot_scale),
    "cost": (cost, plot_cost),
    "patch": (patch, lambda doc, path: draw_patch(doc["found"], path)),
    "attention": (attention, lambda doc, path: draw_attention(doc["found"], path)),
}


def read_doc(path: Path) -> dict | None:
    """What an analysis wrote, None if there is nothing of ours."""
    if not path.is_file():
        return None
    try:
        doc = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        sys.exit(f"{path} is not JSON ({error}); delete it, and the analysis is done again")
    return doc if isinstance(doc, dict) and {"name", "settings", "reading", "found", "command"} <= set(doc) else None


def read_config(folder: str) -> dict:
    path = Path(folder) / "config.json"
    if not path.is_file():
        sys.exit(f"no run in {folder}: a run folder of train.py holds config.json and vectors.safetensors")
    return json.loads(path.read_text(encoding="utf-8"))


def label_of(config: dict) -> str:
    """What the config says about a run's vectors: "27", "26, attention", "14, orthogonal to 2"."""
    label = str(config.get("layer", "?"))
    if config.get("site") not in (None, "end"):
        label += f", {config['site']}"
    if config.get("method") == "lora":
        label += f", LoRA of rank {config['rank']}"
    if config.get("orthogonal_to"):
        label += f", orthogonal to {len(config['orthogonal_to'])}"  # earlier vectors
    return label


def problems_of(args: Config, config: dict) -> list[dict]:
    """The problems that a run is measured on: --data, or the run's held-out ones."""
    file = args.data or config.get("held_out")
    if file is None and config.get("data") is not None:
        sys.exit("the run was trained on --data without --held-out: say which problems to use with --data FILE")
    return model.read_problems(file or (model.TINY / "test.jsonl" if config["model"] in model.FAMILY else DATA / "math500.jsonl"))


def open_lab(args: Config, folder: Path, name: str, config: dict, rows: list[dict]) -> Lab:
    """Load a model to answer problems as in a run with this config."""
    dtype = config.get("dtype", "auto") if args.dtype == "auto" else args.dtype
    llm, tokenizer = model.load(name, args.device, dtype)
    how = {key: config.get(key) for key in ("template", "system", "context")}
    how["context"] = min(how["context"] or 32768, llm.config.max_position_embeddings)
    how["max_tokens"] = args.max_tokens or config.get("max_tokens")
    state = {"model": name, "weights": model.fingerprint(llm), "dtype": str(llm.dtype), "n": len(rows), "seed": args.seed} | how
    state["problems"] = checksum(json.dumps(rows, sort_keys=True).encode())
    return Lab(args, name, llm, tokenizer, [], rows, how, state, folder)


def with_engine(lab: Lab) -> Lab:
    """The lab with a function that starts the vLLM engine, if that is to sample: once, and only if something is not kept yet."""
    vectors = {}
    for run in lab.runs:
        for place, s in run.vectors.items():  # the LoRA of the highest rank says how much room the engine needs
            if place not in vectors or s.numel() > vectors[place].numel():
                vectors[place] = s
    if model.choose_sampler(lab.args.sampler, lab.llm, vectors) == "hf":
        return lab
    asked = [model.prompt_ids(lab.tokenizer, row["problem"], lab.how["system"], lab.how["template"]) for row in lab.rows[:8]]
    start = cache(partial(
        model.open_engine, "vllm", lab.model, lab.llm, asked, lab.how["context"], lab.args.vllm_memory,
        lab.args.tensor_parallel, lab.args.rows, vectors,
    ))  # fmt: skip
    return lab._replace(engine=start, state=lab.state | {"sampler": "vllm"})  # it draws other random numbers


def check(args: Config) -> None:
    """Exit with one line for settings that cannot work."""
    if args.sampler == "vllm" and args.name in HF_ONLY:
        sys.exit(f"--sampler vllm: {args.name} samples with the Hugging Face model, for it opens several, or hooks into a block")
    for name in ("n", "samples", "top", "cases", "rows", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            sys.exit(f"--{name.replace('_', '-')} wants at least 1, got {value}")
    if args.temperature < 0:
        sys.exit(f"--temperature wants a number from 0 up, got {args.temperature}")
    if not args.runs:
        sys.exit(f"{args.name} wants run folders: python analyze.py {args.name} out/NAME")
    if args.name in ONE_RUN and len(args.runs) > 1:
        sys.exit(f"{args.name} wants one run, got {len(args.runs)}")
    if (args.name == "transfer") != bool(args.recipients):
        sys.exit("transfer, and only transfer, wants --recipients MODEL...")


def measured(args: Config, folder: Path, old: dict | None) -> dict:
    """The old document if its settings are today's, else a new one."""
    flags = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in FREE}
    given = ""
    for name, value in flags.items():
        if value != getattr(Config(args.name), name):
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            given += f" --{name.replace('_', '-')}" + "".join(f" {shlex.quote(str(x))}" for x in values)
    doc = {"name": args.name, "command": f"python analyze.py {args.name} {shlex.join(args.runs)}{given}"}
    compute = ANALYSES[args.name][0]
    if args.name == "cost":
        found = compute(args)
        return doc | {"settings": {"runs": list(args.runs)}, "reading": found["reading"], "found": found}

    configs = {run: read_config(run) for run in args.runs}
    for key in ("model", "template", "system") if args.name != "transfer" else ():
        if len(values := {str(config.get(key)) for config in configs.values()}) > 1:
            sys.exit(f"{args.name} compares runs with the same {key}; these have {', '.join(sorted(values))}")
    full = [run for run, config in configs.items() if config.get("method") == "full"]
    if full and (args.name != "sweep" or len(full) == len(configs) or args.tensor_parallel > 1):
        sys.exit(f"{full[0]} has all weights, no vectors: sweep takes one beside single-layer runs, without --tensor-parallel")
    stamps = {run: model.stamp(run, config) for run, config in configs.items()}
    first = next(iter(configs.values()))
    args = replace(args, n=args.cases) if args.name == "case" else args
    rows = problems_of(args, first)[: args.n]
    if args.name == "transfer":  # it opens its recipients itself; what was measured is in figures/parts
        lab = Lab(args, "", None, None, [], rows, {}, {}, folder)
        lab.state.update(model=", ".join(args.recipients), n=len(rows), seed=args.seed)
    else:
        lab = open_lab(args, folder, first["model"], first, rows)
    runs = []
    for run in args.runs:
        file = Path(run) / "vectors.safetensors"
        vectors = {} if args.name == "transfer" or run in full else model.load_vectors(file, lab.llm, lab.model)[0]
        matrices = [model.name_of(place) for place, s in vectors.items() if s.dim() > 1]
        if matrices and args.name not in ("scale", "shift", "case", "sites"):
            sys.exit(f"{args.name} wants vectors; {run} has a LoRA: shift, case, sites, scale and transfer take one")
        in_order = sorted(vectors, key=lambda key: (key,) if isinstance(key, int) else key)  # a key may be (layer, site)
        vectors = {key: vectors[key] for key in in_order}
        runs.append(Run(Path(run), configs[run], vectors, label_of(configs[run])))
    lab = lab._replace(runs=runs)
    lab = lab if args.name in HF_ONLY else with_engine(lab)
    settings = flags | lab.state | {"runs": stamps}
    settings = json.loads(json.dumps(settings))
    if old and old["settings"] == settings and args.name != "transfer":
        return old
    found = json.loads(json.dumps(compute(lab)))
    return doc | {"settings": settings, "reading": found["reading"], "found": found}


def main(args: Config) -> dict | None:
    if args.name == "report":
        print(f"wrote {report(Path(args.runs[0] if args.runs else 'out'))}")
        return None
    check(args)
    folder = Path(args.out or (Path(args.runs[0]) / "figures" if len(args.runs) == 1 else "out/figures"))
    path = folder / f"{args.name}.json"
    old = read_doc(path)
    if args.draw and old is None:
        sys.exit(f"--draw: no numbers at {path}; give the command without --draw first")
    doc = old if args.draw else measured(args, folder, old)
    if doc is not old:
        write(path, json.dumps(doc, ensure_ascii=False) + "\n")
    ANALYSES[args.name][1](doc, path.with_suffix(".png"))
    print(f"{doc['reading']}\nwrote {path} and {path.with_suffix('.png')}")
    return doc


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
