"""
Tokens per second of model.sample against the same model's `generate`, in turn, in one process.

$ python tests/bench/step.py                    # the built-in model, 32 problems x 16 samples, as in a step of train.py
$ python tests/bench/step.py --vectors out/tiny-layer27/vectors.safetensors  # steered: longer, more even answers
$ python tests/bench/step.py --growth           # instead: seconds of a training step against rollouts, length and layer
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
import model  # noqa: E402
import train  # noqa: E402
from data.problems import problems_of  # noqa: E402
from plumbing.files import TINY  # noqa: E402


@dataclass
class Config:
    model: str = "tiny"                    # built-in model, local folder or hub id
    vectors: str | None = None             # safetensors of steering vectors
    prompts: int = 32                      # problems
    samples: int = 16                      # answers to each
    max_tokens: int = 80                   # longest answer
    rounds: int = 3                        # pairs of measurements, after one that does not count
    threads: int | None = None             # CPU threads; default torch's
    growth: bool = False                   # measure how a step's cost grows instead
    out: str = "out/figures/growth.png"    # its figure


def generate(llm, prompts, k, max_tokens, stop):
    """Hugging Face's own sampler on the same rows: the number of tokens up to and with the stop token."""
    rows = [p for p in prompts for _ in range(k)]
    width = max(map(len, rows))
    out = llm.generate(
        input_ids=torch.tensor([[stop[0]] * (width - len(p)) + p for p in rows], device=llm.device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=llm.device),
        max_new_tokens=max_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=stop, pad_token_id=stop[0],
    )[:, width:]  # fmt: skip
    ends = torch.isin(out, torch.tensor(stop, device=out.device))
    return (ends.cumsum(1) - ends.long() == 0).sum().item()


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


def main(args: Config) -> None:
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    llm, tokenizer = model.load(args.model)
    vectors = model.load_vectors(args.vectors, llm.config)[0] if args.vectors else {}
    rows = problems_of(TINY / "test.jsonl").rows[: args.prompts]
    prompts, stop = [model.prompt_ids(tokenizer, row["problem"]) for row in rows], model.stop_ids(llm, tokenizer)
    if args.growth:
        return growth(args, llm, prompts)
    speeds = {"generate": [], "sample": []}
    for i in range(args.rounds + 1):
        for name in speeds:
            torch.manual_seed(i)
            began = time.perf_counter()
            with model.steer(llm, vectors):
                if name == "generate":
                    tokens = generate(llm, prompts, args.samples, args.max_tokens, stop)
                else:
                    completions, _ = model.sample(llm, prompts, args.samples, args.max_tokens, stop, seed=i)
                    tokens = sum(map(len, completions))
            seconds = time.perf_counter() - began
            print(f"round {i} {name:9} {tokens:7} tokens {seconds:6.2f} s {tokens / seconds:8.0f} tokens/s")
            speeds[name].append(tokens / seconds)
    ratios = [b / a for a, b in zip(speeds["generate"][1:], speeds["sample"][1:])]
    print(f"sample / generate: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
