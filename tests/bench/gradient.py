"""
Time and memory of a training step's gradient against a plain forward pass of the same tokens, random weights.

$ python tests/bench/gradient.py --shape 7b                       # Qwen2.5-7B's shape, one GPU
$ python tests/bench/gradient.py --shape small --device cpu --tokens 4096 --context 512 --dtype float32

One row a layer: seconds of the gradient (accumulate_gradient: forward pass, head, backward pass down to the vector),
tokens a second, its ratio to "forward" (the same tokens through the same model and head without a gradient), the share
of the device's peak that the necessary operations are (recomputed ones do not count), and the peak of memory above the
weights.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[2]))
import model  # noqa: E402
import train  # noqa: E402

SHAPES = {  # width, MLP, layers, heads, KV heads, vocabulary
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "small": (256, 1344, 28, 4, 2, 8192),  # the same proportions for a CPU: the head as large as two layers
}


@dataclass
class Config:
    shape: str = "7b"                      # 7b, 1.5b or small
    layers: tuple[int, ...] = (0, 14, 26, 27)  # where the one vector is
    context: int = 4096                    # tokens of prompt and answer
    prompt: int = 150                      # tokens of the prompt
    tokens: int = 32768                    # tokens of the step, in all rows together
    micro_tokens: int = 16384              # tokens of a forward pass
    rounds: int = 3                        # the fastest counts, after one that does not
    peak: float = 989e12                   # operations a second of the device (H100, H200: bfloat16, dense)
    device: str = "cuda"
    dtype: str = "bfloat16"


def operations(llm, prompts, completions, layer: int | None) -> float:
    """Floating-point operations that are needed: forward, and backward to the inputs of what lies above the vector."""
    block = sum(p.numel() for p in model.decoder_layers(llm)[0].parameters())
    width, depth = llm.config.hidden_size, len(model.decoder_layers(llm))
    tokens = sum(len(p) + len(c) for p, c in zip(prompts, completions))
    scores = sum((len(p) + len(c)) ** 2 for p, c in zip(prompts, completions)) / 2  # causal: half of the pairs
    one_layer = 2 * block * tokens + 4 * width * scores
    head = 2 * llm.get_output_embeddings().weight.numel() * sum(map(len, completions))
    above = 0 if layer is None else depth - 1 - layer
    attention_again = 4 * width * scores  # backward through attention costs twice its forward pass, the rest once
    return depth * one_layer + head + (0 if layer is None else head + above * (one_layer + attention_again))


def best_time(run, rounds: int, cuda: bool) -> float:
    times = []
    for _ in range(rounds + 1):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def main(args: Config) -> None:
    width, mlp, depth, heads, kv, vocabulary = SHAPES[args.shape]
    config = Qwen2Config(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=max(4096, args.context),
        tie_word_embeddings=False,
    )  # fmt: skip
    cuda = args.device.startswith("cuda")
    with torch.device(args.device):
        llm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (args.tokens // args.context, args.context), generator=draw).tolist()
    prompts, completions = [row[: args.prompt] for row in ids], [row[args.prompt :] for row in ids]
    rolled = model.Rollouts(prompts, completions, [True] * len(ids), [""] * len(ids), None)
    advantages = torch.ones(len(ids))

    def forward():
        with torch.no_grad():
            for batch in model.batches([args.context] * len(ids), args.micro_tokens):
                model.token_logps(llm, [prompts[i] for i in batch], [completions[i] for i in batch])

    def measure(run):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = best_time(run, args.rounds, cuda)
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else float("nan")

    weights = sum(p.numel() * p.element_size() for p in llm.parameters()) / 2**30
    rows = f"{len(ids)} rows of {args.context} tokens"
    print(f"{args.shape}: {weights:.1f} GiB of weights, {rows}, {args.dtype}, {args.device}")
    print(f"{'':10}{'seconds':>9}{'tokens/s':>10}{'ratio':>7}{'of peak':>9}{'GiB above weights':>19}")
    plain = None
    for layer in (None, *args.layers):
        if layer is None:
            seconds, memory = measure(forward)
            plain = seconds
        else:
            vectors = {layer: torch.zeros(width, device=args.device, requires_grad=True)}
            seconds, memory = measure(lambda vectors=vectors: train.accumulate_gradient(
                llm, vectors, rolled, advantages, 1.0, args.micro_tokens, recompute="yes"
            ))  # fmt: skip
        share = operations(llm, prompts, completions, layer) / seconds / args.peak
        name = "forward" if layer is None else f"layer {layer}"
        line = f"{name:10}{seconds:9.3f}{args.tokens / seconds:10.0f}{seconds / plain:7.3f}"
        print(f"{line}{100 * share:8.1f}%{memory:19.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
