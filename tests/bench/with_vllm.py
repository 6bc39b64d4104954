"""
Tokens per second of vLLM with steering vectors against stock vLLM, in turn in one process, and the time of changing
vectors.

$ python tests/bench/with_vllm.py                     # built-in model; --model for another
$ VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind python tests/bench/with_vllm.py --eager   # on a CPU
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
import model  # noqa: E402
from data.problems import problems_of  # noqa: E402
from plumbing.files import TINY  # noqa: E402
from plumbing.vllm import VLLM  # noqa: E402


@dataclass
class Config:
    model: str = "tiny"                    # built-in model, local folder or hub id
    prompts: int = 32                      # problems
    samples: int = 16                      # answers to each
    max_tokens: int = 60                   # tokens of every answer: none ends earlier, so both make the same number
    context: int = 512                     # tokens of prompt and answer
    memory: float = 0.4                    # share of the GPU's memory, for each of the two engines
    rounds: int = 5                        # pairs of measurements, after one that does not count
    eager: bool = False                    # no compilation, no CUDA graphs


def main(args: Config) -> None:
    llm, tokenizer = model.load(args.model)
    steered = VLLM(args.model, llm, args.context, args.memory, eager=args.eager)
    import vllm

    name = str(TINY) if args.model == "tiny" else args.model
    stock = vllm.LLM(
        name, dtype=str(llm.dtype).removeprefix("torch."), max_model_len=args.context, max_num_seqs=512,
        gpu_memory_utilization=args.memory, enforce_eager=args.eager, disable_log_stats=True,
    )  # fmt: skip
    rows = problems_of(TINY / "test.jsonl").rows[: args.prompts]
    requests = [{"prompt_token_ids": model.prompt_ids(tokenizer, row["problem"])} for row in rows]
    width, depth = llm.config.hidden_size, len(model.decoder_layers(llm))
    vectors = {layer: torch.randn(width) for layer in range(depth)}
    steered.push(vectors)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        steered.push(vectors)
        times.append(1000 * (time.perf_counter() - began))
    print(f"vectors of {depth} layers pushed, cache dropped: median {statistics.median(times):.2f} ms")

    speeds = {"stock": [], "steered": []}
    for i in range(args.rounds + 1):
        params = vllm.SamplingParams(
            n=args.samples, temperature=1.0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False, logprobs=0
        )
        for name, engine in [("stock", stock), ("steered", steered.engine)][:: 1 if i % 2 else -1]:
            engine.reset_prefix_cache()
            began = time.perf_counter()
            found = engine.generate(requests, params, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = sum(len(row.token_ids) for request in found for row in request.outputs)
            speeds[name].append(tokens / seconds)
            print(f"round {i} {name:8} {tokens:7} tokens {seconds:6.2f} s {tokens / seconds:8.0f} tokens/s")
    ratios = [b / a for a, b in zip(speeds["stock"][1:], speeds["steered"][1:])]
    print(f"steered / stock: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
