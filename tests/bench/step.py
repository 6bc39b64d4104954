"""
The two halves of a training step, sampling and training, against `generate` and against their matrix products alone.

$ python tests/bench/step.py                # the built-in model, 32 problems x 16 samples
$ python tests/bench/step.py --model FOLDER --prompts 8 --max-tokens 128    # a real model: Qwen2.5-Coder-0.5B, say
$ python tests/bench/step.py --vectors out/tiny-layer27/vectors.safetensors  # steered: longer, more even answers
$ python tests/bench/step.py --growth       # instead: seconds of a training step against rollouts, length and layer

Parts, in turn, in one process: `generate` of the same model, whose weights ask for gradients as TRL's do, or not
(frozen, where torch copies the head for every prompt); sample; the gradient of all its answers at the last layer, in
the middle and at all layers. "of limit": the seconds that the necessary matrix products take, measured in this process
at the number of rows, over those of the part. Training needs a forward pass above the lowest vector, a backward pass to
its activations, the head forward and back.
"""

import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
import model  # noqa: E402
import train  # noqa: E402
from data.problems import problems_of  # noqa: E402
from plumbing import memory  # noqa: E402
from plumbing.files import TINY  # noqa: E402


@dataclass
class Config:
    model: str = "tiny"                    # built-in model, local folder or hub id
    vectors: str | None = None             # safetensors of steering vectors
    prompts: int = 32                      # problems
    samples: int = 16                      # answers to each
    max_tokens: int = 80                   # longest answer
    parts: tuple[str, ...] = ("generate", "sample", "last", "middle", "all")  # and frozen
    rounds: int = 3                        # of all parts; who goes first changes
    warm: bool = True                      # a round before that does not count
    threads: int | None = None             # CPU threads; default torch's
    growth: bool = False                   # measure how a step's cost grows instead
    out: str = "out/figures/growth.png"    # its figure


def generate(llm, prompts, k, max_tokens, stop, frozen):
    """Hugging Face's own sampler on the same rows: the number of tokens up to and with the stop token."""
    rows = [p for p in prompts for _ in range(k)]
    width = max(map(len, rows))
    llm.requires_grad_(not frozen)
    out = llm.generate(
        input_ids=torch.tensor([[stop[0]] * (width - len(p)) + p for p in rows], device=llm.device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=llm.device),
        max_new_tokens=max_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=stop, pad_token_id=stop[0],
    )[:, width:]  # fmt: skip
    llm.requires_grad_(False)
    ends = torch.isin(out, torch.tensor(stop, device=out.device))
    return (ends.cumsum(1) - ends.long() == 0).sum().item()


def start_of_peak(device="cpu") -> int:
    """Begin to measure `memory.peak`; returns what is in use now."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no Linux: the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
    return memory.peak(device)


def step(llm, prompts, k: int, length: int, layer: int) -> float:
    """Processor seconds of a step without grading: k answers of this length to each prompt, and their gradient."""
    began, vectors = time.process_time(), {layer: torch.zeros(llm.config.hidden_size, requires_grad=True)}
    with model.steer(llm, vectors):
        completions, ended, *states = model.sample(llm, prompts, k, length, [], keep=layer or None)
    rows = [p for p in prompts for _ in range(k)]
    rolled = model.Rollouts(rows, completions, ended, [""] * len(rows), None, *states)
    train.accumulate_gradient(llm, vectors, rolled, torch.ones(len(rows)), 1.0, 4096)
    return time.process_time() - began


def growth(args: Config, llm, prompts) -> None:
    """Seconds of a step against its rollouts, their length and the layer, one at a time; prints them and draws them."""
    import matplotlib.pyplot as plt

    usual = {"rollouts": 256, "length": 48, "layer": 14}
    depth = llm.config.num_hidden_layers
    layers = [*range(0, depth, 7), depth - 1]
    values = {"rollouts": [32, 64, 128, 256, 512], "length": [6, 12, 24, 48, 96], "layer": layers}
    label = {"length": "tokens of an answer", "layer": "layer of the vector"}
    figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True, constrained_layout=True)
    highest = 0.0
    for panel, (name, xs) in zip(panels, values.items()):
        seconds = []
        for x in xs:
            now = usual | {name: x}
            given = prompts[:16], now["rollouts"] // 16, now["length"], now["layer"]
            runs = [step(llm, *given) for _ in range(args.rounds)]
            seconds.append(statistics.median(runs))
            print(f"{name} {x}: {seconds[-1]:.2f} s, {min(runs):.2f} to {max(runs):.2f}", flush=True)
        highest = max(highest, *seconds)
        panel.plot(xs, seconds, "o-")
        panel.set(xlabel=label.get(name, name))
    panels[0].set(ylabel="processor seconds of a step", ylim=(0, 1.05 * highest))
    figure.suptitle(", ".join(f"{name} {x}" for name, x in usual.items()) + ", where not varied")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


class Limit:
    """Seconds of the matrix products of a forward pass, measured once at some numbers of rows."""

    def __init__(self, llm):
        linear = (m.weight for block in model.decoder_layers(llm) for m in block.modules() if hasattr(m, "in_features"))
        self.blocks, self.head, self.known = list(linear), [llm.get_output_embeddings().weight], {}

    def measured(self, kind: str, rows: int, weights: list) -> float:
        if (kind, rows) not in self.known:
            x = [torch.randn(rows, weight.shape[1]).to(weight.dtype) for weight in weights[:7]]
            times = []
            for _ in range(4):
                began = time.perf_counter()
                for i, weight in enumerate(weights):
                    x[i % 7] @ weight.T
                times.append(time.perf_counter() - began)
            self.known[kind, rows] = min(times[1:])
        return self.known[kind, rows]

    def seconds(self, rows: int, kinds=("blocks", "head")) -> float:
        """Of so many rows: between two powers of two a straight line, beyond 512 in proportion."""
        if rows > 512:
            return rows / 512 * self.seconds(512, kinds)
        low = 1 << (rows.bit_length() - 1)
        ends = [sum(self.measured(kind, n, getattr(self, kind)) for kind in kinds) for n in (low, min(512, 2 * low))]
        return ends[0] + (ends[1] - ends[0]) * (rows - low) / low

    def sampling(self, prompts, completions) -> float:
        rows = [sum(len(c) > t for c in completions) for t in range(max(map(len, completions)))]
        first = self.seconds(sum(map(len, prompts)), ["blocks"]) + self.seconds(len(prompts), ["head"])
        return first + sum(self.seconds(n) for n in rows[1:])

    def training(self, llm, prompts, completions, lowest: int) -> float:
        depth, tokens = len(model.decoder_layers(llm)), sum(map(len, completions))
        forward = 1 if lowest == 0 else (depth - lowest) / depth  # from the states that enter the layer
        above = forward + (depth - 1 - lowest) / depth
        body = above * self.seconds(tokens + sum(map(len, prompts)), ["blocks"])
        return body + 2 * self.seconds(tokens, ["head"])


def states_of(llm, prompts, completions, layer: int) -> list | None:
    """The states that enter a layer, as `sample` keeps them."""
    seen, found = [], []
    if layer == 0:
        return None
    look = [(model.decoder_layers(llm)[layer], lambda module, args, output: seen.append(args[0][0]))]
    with torch.no_grad(), model.hooks(look):
        for p, c in zip(prompts, completions):
            model.read(llm, [p], [c])
            h = seen.pop()
            found.append((h[: len(p)].clone(), h[len(p) : -1].clone()))
    return found


def table(args: Config, llm, prompts, stop, vectors: dict) -> None:
    depth, limit, k = llm.config.num_hidden_layers, Limit(llm), args.samples
    lowest = {"last": depth - 1, "middle": depth // 2, "all": 0}
    found, completions, rows = {part: [] for part in args.parts}, None, [p for p in prompts for _ in range(k)]
    for i in range(not args.warm, args.rounds + 1):
        parts = [part for part in args.parts if part not in lowest][:: 1 if i % 2 else -1]
        for part in parts + [part for part in args.parts if part in lowest]:
            torch.manual_seed(i)
            if part in lowest:
                n = lowest[part]
                trained = {n: torch.zeros(llm.config.hidden_size, requires_grad=True)}
                if part == "all":
                    trained = {layer: torch.zeros_like(trained[0], requires_grad=True) for layer in range(depth)}
                states = states_of(llm, rows, completions, n)
                rolled = model.Rollouts(rows, completions, [True] * len(rows), [""] * len(rows), None, states)
            before = start_of_peak()
            began = time.perf_counter()
            if part in lowest:
                train.accumulate_gradient(llm, trained, rolled, torch.ones(len(rows)), 1.0, 4096)
                tokens, least = sum(map(len, completions)), limit.training(llm, prompts, completions, n)
            elif part == "sample":
                with model.steer(llm, vectors):
                    completions, _ = model.sample(llm, prompts, k, args.max_tokens, stop, seed=i)
                tokens = sum(map(len, completions))
            else:
                with model.steer(llm, vectors):
                    tokens = generate(llm, prompts, k, args.max_tokens, stop, part == "frozen")
            seconds, peak = time.perf_counter() - began, memory.peak(llm.device) - before
            line = f"round {i} {part:9}{tokens:7} tokens {seconds:7.2f} s {tokens / seconds:7.0f} tokens/s"
            if part == "sample" or part in lowest:
                least = least if part in lowest else limit.sampling(prompts, completions)
                line += f" {100 * least / seconds:4.0f} % of limit"
            print(f"{line}, {peak / 2**30:.2f} GiB above what was there", flush=True)
            if i:
                found[part].append(tokens / seconds)
    for part in [part for part in args.parts if part != "sample"]:
        ratios = [b / a for a, b in zip(found[part], found["sample"])]
        what = "sample / " + part if part not in lowest else f"seconds of {part} / sampling"
        print(f"{what}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def main(args: Config) -> None:
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    llm, tokenizer = model.load(args.model)
    vectors = model.load_vectors(args.vectors, llm.config)[0] if args.vectors else {}
    rows = problems_of(TINY / "test.jsonl").rows[: args.prompts]
    prompts, stop = [model.prompt_ids(tokenizer, row["problem"]) for row in rows], model.stop_ids(llm, tokenizer)
    run = growth if args.growth else partial(table, stop=stop, vectors=vectors)
    print(f"{args.model}, {llm.dtype}, {torch.get_num_threads()} threads, {len(prompts)} x {args.samples} answers")
    run(args, llm, prompts)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
