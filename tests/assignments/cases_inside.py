"""What is asked in exercises 3.1 to 3.9: {case: what a function gives there}. No answers stand here."""

import math

import numpy as np
import torch
from cases_rl import drawn, texts
from conftest import random_llm
from judge import about
from table import named

# -------------------------------------------------------------------------------------------------------- 3.1 read_out


def lens_cases(fn, seed):
    draw, _ = drawn(seed)
    s, U = torch.tensor([3.0, 4]), torch.tensor([[1.0, 0], [0, 2], [-3, -4], [4, -3]])
    return {
        "s = (3, 4), 4 tokens": fn(s, U),
        "7 numbers, 11 tokens": fn(torch.randn(7, generator=draw), 3 * torch.randn(11, 7, generator=draw)),
        "5 numbers, 5 tokens": fn(1 + torch.randn(5, generator=draw), torch.randn(5, 5, generator=draw)),
        "a row of zeros (its cosine is 0)": fn(s, torch.tensor([[0.0, 0], [1, 1]])),
        "a vector of zeros": fn(torch.zeros(2), U),
    }


# ---------------------------------------------------------------------------------------------------------- 3.2 folded


def gains_cases(fn, seed):
    draw, _ = drawn(seed)
    found = {}
    for family in ("qwen2", "gemma2", "gemma"):
        llm = random_llm(family)
        for i, norm in enumerate((llm.model.norm, llm.model.layers[-1].input_layernorm)):
            norm.weight.copy_((i + 1) * torch.arange(32) / 8 - 1)
        found[f"{family}, a row of ones"] = fn(llm, torch.ones(1, 32))
        found[f"{family}, 5 tokens"] = fn(llm, torch.randn(5, 32, generator=draw))
        found[f"{family}, 32 tokens"] = fn(llm, torch.randn(32, 32, generator=draw))
    return found


# -------------------------------------------------------------------------------------------------- 3.3 largest_shifts


def shift_cases(fn, seed):
    draw, _ = drawn(seed)
    prompts, completions = texts(seed, (5, 9, 2), (4, 1, 6))
    v, w, only = torch.randn(32, generator=draw), torch.randn(32, generator=draw), ([[3, 4]], [[5, 6, 2]])
    with torch.no_grad():
        nothing = sorted(fn(random_llm(), {1: torch.zeros(32)}, *only))
        found = {"a vector of zeros, 3 positions": [[row, position, gain] for row, position, _, gain in nothing]}
        found["answers of 4, 1 and 6 tokens"] = sorted(fn(random_llm(), {2: v}, prompts, completions))
        found["another layer"] = sorted(fn(random_llm(), {0: v / 2}, prompts, completions))
        found["two vectors, Gemma 2"] = sorted(fn(random_llm("gemma2"), {0: v, 2: w}, prompts, completions))
        long = texts(seed, range(2, 11), [58 + i for i in range(9)])
        found["9 answers of 58 to 66 tokens"] = sorted(fn(random_llm(), {2: -v}, *long))
    return found


# -------------------------------------------------------------------------------------------------- 3.4 persistence_of


def diff_diff_cases(fn, seed):
    draw, _ = drawn(seed)
    one, two = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1], [0, 1]])

    def run(deltas, targets, first=0):
        """deltas: of each text (tokens, layers, D)."""
        units = torch.stack([(d / d.norm(dim=-1, keepdim=True)).sum(0) for d in deltas])
        shifts, counts = torch.stack([d.sum(0) for d in deltas]), torch.tensor([float(len(d)) for d in deltas])
        layers = list(range(first, first + deltas[0].shape[1]))
        found = fn(units, shifts, counts, {l + first: t for l, t in targets.items()}, layers)["diff_diff"]
        widths = [x.interval[1] - x.interval[0] for x in found if hasattr(x, "interval")]
        values = [getattr(value, "value", value) for value in found]
        return {"values": values, "an interval without width": any(w < 1e-6 for w in widths)}

    many = [torch.randn(n, 3, 6, generator=draw) + 0.7 for n in (3, 5, 2, 7)]
    targets = {l: torch.randn(6, generator=draw) for l in range(2)}
    # one token with a large shift makes the mean, the others point away from it: the mean cosine is below 0
    away = [torch.tensor([[9.0, 0]])[:, None], torch.tensor([[-1.0, 1], [-1, -1], [-1, 0.5]])[:, None]]
    return {
        "shifts (1, 0) in one text; (0, 1), (0, 1) in another": run([one[:, None], two[:, None]], {0: one[0]}),
        "shifts (9, 0) in one text; (-1, 1), (-1, -1), (-1, 0.5) in another": run(away, {}),
        "4 texts of 3, 5, 2 and 7 tokens, layers 0 to 2": run(many, targets),
        "the same, layers 11 to 13": run(many, targets, first=11),
    }


# ------------------------------------------------------------------------------------------------------ 3.5 lines_past


def line_cases(fn, seed):
    draw, _ = drawn(seed)
    ids, found = torch.tensor([[5, 17, 3, 40], [9, 2, 33, 21]]), {}
    given = ((0, torch.arange(32.0), "qwen2"), (1, torch.randn(32, generator=draw), "gemma2"))
    steer = named("steer")
    with torch.no_grad():
        for layer, s, family in given:
            base = random_llm(family)(ids, output_hidden_states=True)
            for name, vectors in fn(layer, s).items():
                llm = random_llm(family)
                with steer(llm, vectors):
                    states = llm(ids, output_hidden_states=True)
                # hidden_states[l] enters layer l
                moved = [x - y for x, y in zip(states.hidden_states, base.hidden_states)]
                found[f"{family}, vector of layer {layer}, {name}, what enters block {layer + 1}"] = moved[layer + 1]
                if (layer, name) == (0, "Skip-Layer"):
                    found[f"{family}, vector of layer 0, Skip-Layer, what leaves block 1"] = moved[2]
                found[f"{family}, vector of layer {layer}, {name}, logits"] = states.logits[..., :5]
        llm, s = random_llm(num_hidden_layers=12), torch.randn(32, generator=draw)
        for name, vectors in fn(9, s).items():
            with steer(llm, vectors):
                found[f"12 layers, vector of layer 9, {name}, logits"] = llm(ids).logits[..., :5]
    return found


# ----------------------------------------------------------------------------------------------------- 3.6 block_after


def block_cases(fn, seed):
    found = {}
    sizes = ((4, 2, 0, "qwen2", 3), (6, 3, 1, "qwen2", 3), (6, 1, 0, "qwen2", 3), (8, 4, 9, "qwen3", 12))
    for heads, keys, layer, family, depth in sizes:
        llm = random_llm(family, num_attention_heads=heads, num_key_value_heads=keys, num_hidden_layers=depth)
        block, *counts = fn(llm, layer)
        at = next((i for i, other in enumerate(llm.model.layers) if other is block), "none of its blocks")
        whole = all(isinstance(n, int) for n in counts)
        found[f"{heads} query and {keys} key-value heads, after layer {layer}"] = [at, *counts, f"whole: {whole}"]
    try:
        fn(random_llm(), 2)
        found["after the last layer"] = "goes on"
    except (SystemExit, ValueError, AssertionError) as error:
        found["after the last layer"] = "stops with a line" if str(error) else "stops without a line"
    except IndexError:
        found["after the last layer"] = "an IndexError of the list"
    return found


# -------------------------------------------------------------------------------------------------------- 3.7 recovery


def recovery_cases(fn, seed):
    draw, _ = drawn(seed)
    lost, base, other = (torch.rand(40, generator=draw) for _ in range(3))
    base = (0.02 + base**3).tolist()
    lost, other = ([float(x) * y for x, y in zip(part, base)] for part in (0.4 * lost, 0.3 + other))

    def run(*given):
        found = fn(*given)
        low, high = found.interval
        return {"value": found.value, "low": about(low, (high - low) / 6), "high": about(high, (high - low) / 6)}

    return {
        "lost 1, 2 of 4, 8": fn([1.0, 2.0], [4.0, 8.0]).value,
        "lost 1, 2; another way 2, 4": fn([1.0, 2.0], [4.0, 8.0], [2.0, 4.0]).value,
        "lost 6, 9 of 4, 8 (a patch that does harm)": fn([6.0, 9.0], [4.0, 8.0]).value,
        "lost 3, 0; another way 1, 1": fn([3.0, 0.0], [4.0, 8.0], [1.0, 1.0]).value,
        "a problem where nothing is at stake": fn([0.0, 2.0], [0.0, 8.0]).value,
        "40 problems": run(lost, base),
        "40 problems, against another way": run(lost, base, other),
    }


# ------------------------------------------------------------------------------------------------------- 3.8 pair_gain


def rows_of_answers(seed, pair=0.55):
    """[problem] of 0 or 1 for a pair, two singles and all layers: hard problems are hard for all of them."""
    draw, _ = drawn(seed)
    hard = torch.rand(60, generator=draw)
    return [((0.5 * torch.rand(60, generator=draw) + 0.5 * hard) < p).float() for p in (pair, 0.4, 0.42, 0.7)]


def gain_cases(fn, seed):
    Estimate = named("Estimate")

    def run(parts, interval=True):
        found = fn(*parts)
        share, over = found["share"], found["over_single"]
        numbers = {"share": share.value, "over_single": over.value, "cross": bool(found["cross"])}
        if interval:
            of_share = "open" if share.unclear else share.interval
            numbers |= {"interval": over.interval, "open": bool(share.unclear), "interval of share": of_share}
        return numbers

    def just(*values):  # without spread
        return [Estimate(x, np.full(10, x)) for x in values]

    def numbers_of(rows):
        return [Estimate.of([[x] for x in row.tolist()]) for row in rows]

    rows = rows_of_answers(seed)
    pair, one, other, whole = numbers_of(rows)
    rows[3] = rows[1] * (torch.arange(60) > 20)
    worse = numbers_of(rows)[3]
    rows[3] = rows[2].roll(7)
    hardly = numbers_of(rows)[3]
    return {
        "pair 0.5, singles 0.2 and 0.4, all 0.6": run(just(0.5, 0.2, 0.4, 0.6), False),
        "pair 0.995, singles 0.75 and 0.5, all 1": run(just(0.995, 0.75, 0.5, 1.0), False),
        "pair 0.3, singles 0.5 and 0.4, all 0.9": run(just(0.3, 0.5, 0.4, 0.9), False),
        "pair 0.79, singles 0.5 and 0.4, all 0.8": run(just(0.79, 0.5, 0.4, 0.8), False),
        "60 problems": run([pair, one, other, whole]),
        "60 problems, a pair that loses": run(numbers_of(rows_of_answers(seed + 100, 0.3))),
        "60 problems, all layers worse than a single": run([pair, one, other, worse]),
        "60 problems, all layers as good as a single": run([pair, one, other, hardly]),
    }


# ------------------------------------------------------------------------------------------------------ 3.9 resamples


def resample_cases(fn, seed):
    def again(*given):
        getattr(fn, "cache_clear", lambda: None)()  # under lru_cache the second call would be the first one's array
        return np.asarray(fn(*given))

    n = 300 + seed % 7
    draws = again(n, 3000)
    np.random.seed(12345)  # whatever else has drawn numbers meanwhile
    torch.manual_seed(12345)
    twice = again(n, 3000)
    right = np.arange(n) < n // 2  # half of the problems are solved
    spread = right[draws % n].mean(1).std() / (right.std() / math.sqrt(n))
    different = np.mean([len(set(row)) for row in draws.tolist()]) / n
    counts = np.bincount(draws.flatten() % n, minlength=n)
    return {
        "shape for 7 problems, 30 draws": list(again(7, 30).shape),
        "shape for 5 problems": list(again(5).shape),
        "the same when asked again": bool((draws == twice).all()) if draws.shape == twice.shape else False,
        "the lowest and the highest number": [int(draws.min()), int(draws.max()) - n],
        "how many of the problems are drawn at all": len(set(draws.flatten().tolist())) / n,
        "how often the rarest one is drawn, of the mean": about(counts.min() / counts.mean(), 0.05),
        "how often the most frequent one is drawn": about(counts.max() / counts.mean(), 0.05),
        "different draws among the first 100": len(set(map(tuple, draws[:100].tolist()))),
        "share of different problems in a draw": about(different, 0.004),  # 1 - 1/e
        "spread of a mean, in standard errors": about(spread, 0.08),
        "different steps from a draw's first to its second number": about(
            len(set(((draws[:, 1] - draws[:, 0]) % n).tolist())) / n, 0.02
        ),
        "one problem": again(1, 4).tolist(),
    }


CASES = {
    "3.1": lens_cases,
    "3.2": gains_cases,
    "3.3": shift_cases,
    "3.4": diff_diff_cases,
    "3.5": line_cases,
    "3.6": block_cases,
    "3.7": recovery_cases,
    "3.8": gain_cases,
    "3.9": resample_cases,
}
