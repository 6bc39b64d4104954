"""What is asked in exercises 1.1 to 1.6: {case: what a function gives there}. No answers stand here."""

import torch
from conftest import random_llm
from table import named


def drawn(seed: int):
    """(a generator of random tensors, of random ints)."""
    draw = torch.Generator().manual_seed(seed)
    return draw, lambda low, high, *size: torch.randint(low, high, size, generator=draw)


def texts(seed, prompt_lengths, completion_lengths, most=61):
    _, some = drawn(seed)
    return tuple([some(3, most, n).tolist() for n in lengths] for lengths in (prompt_lengths, completion_lengths))


def gradient(y, x):
    """d (sum of y squared) / dx, or a text that says why there is none."""
    if not isinstance(y, torch.Tensor) or not y.requires_grad:
        return "no gradient: a .detach(), torch.no_grad() or .item() cuts it off"
    found = torch.autograd.grad(y.pow(2).sum(), x, allow_unused=True)[0]
    return "no gradient: the result does not depend on it" if found is None else found


def flat(llm):
    """The model with equal logits for all of its 61 tokens."""
    llm.lm_head.weight.zero_()
    return llm


# ------------------------------------------------------------------------------------------------- 1.1 rloo_advantages


def advantage_cases(fn, seed):
    draw, _ = drawn(seed)
    by_hand = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    return {
        "3 prompts, 4 samples": fn(by_hand),
        "2 prompts, 5 samples, rewards of any size": fn(3 * torch.randn(2, 5, generator=draw) - 1),
        "5 prompts, 2 samples": fn(torch.rand(5, 2, generator=draw)),
        "4 prompts, 4 samples": fn(torch.randn(4, 4, generator=draw)),
        "1 prompt, 16 samples": fn(torch.rand(1, 16, generator=draw)),
    }


# ------------------------------------------------------------------------------------------------------- 1.2 rloo_loss


def loss_cases(fn, seed):
    draw, some = drawn(seed)
    # padding holds -7 and -9: a mask that is forgotten must show
    logps = torch.tensor([[-1.0, -2, -7], [-3, -1, -2], [-4, -9, -9]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    found = {"3 answers of 2, 3 and 1 tokens": fn(logps, mask, torch.tensor([1.0, -1 / 3, 0.5]), 8)}
    logps, lengths = -3 * torch.rand(4, 6, generator=draw), some(1, 7, 4)
    mask, A, w = torch.arange(6) < lengths[:, None], torch.randn(4, generator=draw), torch.rand(4, 6, generator=draw)
    found["4 answers of a batch of 40 tokens"] = fn(logps, mask, A, 40)
    found["the same, of a batch of 400 tokens"] = fn(logps, mask, A, 400)
    found["the same, with weights"] = fn(logps, mask, A, 40, w)
    found["one answer of a batch of 40 tokens"] = fn(logps[:1], mask[:1], A[:1], 40)
    logps = logps.clone().requires_grad_()
    found["its gradient"] = gradient(fn(logps, mask, A, 50), logps)
    found["its gradient, with weights"] = gradient(fn(logps, mask, A, 50, w), logps)
    return found


# ----------------------------------------------------------------------------------------------------- 1.3 token_logps


def logp_cases(fn, seed):
    prompts, completions = texts(seed, (5, 9, 2), (4, 1, 6))
    sharp, v = random_llm(), torch.zeros(32, requires_grad=True)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(40)
        found = {
            "all tokens equally likely": fn(flat(random_llm()), [[3, 4]], [[5, 6, 2]]),
            "answers of 4, 1 and 6 tokens": fn(random_llm(), prompts, completions),
            "at temperature 0.7, in chunks of 3": fn(random_llm(), prompts, completions, 0.7, 3),
            "answers that hold the numbers 0 and 2 of padding and stop": fn(
                random_llm(), [[5, 6], [7, 8, 9]], [[3, 0, 2, 7, 0], [2, 2]]
            ),
            "logits of some hundreds, where exp overflows": fn(sharp, prompts, completions),
            "Gemma 2, whose logits are capped": fn(random_llm("gemma2"), prompts, completions),
        }
    llm = random_llm()
    llm.model.layers[1].register_forward_hook(lambda module, args, h: h + v)
    found["the gradient of a vector after layer 1"] = gradient(fn(llm, prompts, completions, 1.3)[0], v)
    return found


# --------------------------------------------------------------------------------------------------------- 1.4 batches


def lengths_of(fn, lengths, budget, *prompts):
    """The lengths in each batch: rows of equal length may stand in any order."""
    found = fn(lengths, budget, *prompts)
    rows = [int(i) for batch in found for i in batch]
    if sorted(rows) != list(range(len(lengths))):
        return f"the rows {rows}, where each of the {len(lengths)} is wanted once"
    return [[lengths[int(i)] for i in batch] for batch in found]


def batch_cases(fn, seed):
    draw, some = drawn(seed)
    distinct = (1 + torch.randperm(14, generator=draw)).tolist()  # of equal lengths the order would matter here
    prompts = [[int(p)] * (3 + 4 * int(p)) for p in some(0, 3, 14)]
    return {
        "lengths 3, 5, 2, budget 6": lengths_of(fn, [3, 5, 2], 6),
        "lengths 4, 4, 7, 2, 9, 1, budget 12": lengths_of(fn, [4, 4, 7, 2, 9, 1], 12),
        "a row above the budget": lengths_of(fn, [2, 30, 3], 9),
        "no rows": fn([], 9),
        "20 rows, budget 50": lengths_of(fn, some(1, 25, 20).tolist(), 50),
        "13 rows, budget 31": lengths_of(fn, some(1, 12, 13).tolist(), 31),
        "30 rows of lengths 1 to 4, budget 8": lengths_of(fn, some(1, 5, 30).tolist(), 8),
        "answers of 4, 3 and 2 tokens to prompts of 5, 5 and 2, budget 14": lengths_of(
            fn, [3, 4, 2], 14, [[8] * 5, [8] * 5, [9] * 2]
        ),
        "14 answers, prompts of 3, 7 and 11 tokens, budget 60": lengths_of(fn, distinct, 60, prompts),
    }


# --------------------------------------------------------------------------------------------- 1.5 accumulate_gradient


SUMS = ["loss", "tokens", "nats", "compared", "off", "off_max", "clipped"]  # what train.py logs


def gradient_cases(fn, seed):
    draw, _ = drawn(seed)
    prompts, completions = texts(seed, (5, 5, 5, 3, 3, 3), (4, 1, 6, 2, 7, 3))
    A = torch.tensor([[1.0, -0.25, -0.75], [0, 2, -2]])  # the fourth row adds nothing, but its tokens count
    sampled = [(-torch.rand(len(c), generator=draw) * 5).tolist() for c in completions]

    def run(llm, budget, begin=0.0, logps=None, layers=(1,), **more):
        rolled, largest = named("Rollouts")(prompts, completions, [], [], logps), []
        llm.model.embed_tokens.register_forward_pre_hook(lambda module, args: largest.append(args[0].numel()))
        again = torch.Generator().manual_seed(seed)
        vectors = {layer: torch.randn(32, generator=again).requires_grad_() for layer in layers}
        for v in vectors.values():
            v.grad = torch.full_like(v, begin)
        sums = fn(llm, vectors, rolled, A, more.pop("temperature", 1.0), budget, **more)
        lacking = [key for key in SUMS if key not in sums]
        assert not lacking, f"the sums lack {', '.join(lacking)}, which train.py logs"
        found = {key: float(sums[key]) for key in SUMS}
        return {"gradient": [v.grad for v in vectors.values()], "sums": found, "largest": max(largest, default=0)}

    # log 61 nats a token: loss = log 61 * (4 * 1 - 0.25 * 1 - 0.75 * 6 + 2 * 7 - 2 * 3) / 23 tokens
    whole, parts = run(random_llm(), 1000), run(random_llm(), 20)
    found = {
        "all tokens equally likely": run(flat(random_llm()), 1000)["sums"],
        "one micro-batch": {key: whole[key] for key in ("gradient", "sums")},
        "micro-batches of 20 tokens": {key: parts[key] for key in ("gradient", "sums")},
        "a forward pass of more than 20 tokens": parts["largest"] > 20,
        "added to a gradient that is there": run(random_llm(), 15, begin=1.0)["gradient"],
    }
    two = run(random_llm(), 20, layers=(0, 2), temperature=0.7)
    found["two vectors, temperature 0.7"] = {key: two[key] for key in ("gradient", "sums")}
    found["total_tokens 50"] = run(random_llm(), 20, total_tokens=50)["gradient"]
    for cap in (2.0, 1.2, 0):
        given = run(random_llm(), 20, logps=sampled, cap=cap)
        found[f"with the sampler's log-probs, cap {cap}"] = {key: given[key] for key in ("gradient", "sums")}
    return found


# ---------------------------------------------------------------------------------------------- 1.6 importance_weights


def weight_cases(fn, seed):
    draw, _ = drawn(seed)
    ours, theirs = torch.tensor([[0.2, 0.5, 0.4]]).log(), torch.tensor([[0.4, 0.25, 0.1]]).log()
    logps, sampled = (-2 * torch.rand(4, 5, generator=draw) for _ in range(2))
    given = fn(logps.clone().requires_grad_(), sampled, 2.0)
    return {
        "pi 0.2, 0.5, 0.4; mu 0.4, 0.25, 0.1; cap 3": fn(ours, theirs, 3.0),
        "4 answers of 5 tokens, cap 1.5": fn(logps, sampled, 1.5),
        "the same, cap 1": fn(logps, sampled, 1.0),
        "tokens of -300 nats, where exp gives 0": fn(logps - 300, sampled - 300, 2.0),
        "pi far above mu": fn(logps, sampled - 200, 2.0),
        "has a gradient (it is a constant)": bool(given.requires_grad),
    }


CASES = {
    "1.1": advantage_cases,
    "1.2": loss_cases,
    "1.3": logp_cases,
    "1.4": batch_cases,
    "1.5": gradient_cases,
    "1.6": weight_cases,
}
