"""Exercises 3.1 to 3.9: looking into vectors. The lens, shifts of probabilities, Diff-Diff, patches, intervals."""

import math
from types import SimpleNamespace

import numpy as np
import torch
from checks_rl import drawn, texts
from conftest import random_llm
from judge import Exercise

# -------------------------------------------------------------------------------------------------------- 3.1 read_out


def lens_cases(fn, seed):
    draw, _ = drawn(seed)
    s, U = torch.tensor([3.0, 4]), torch.tensor([[1.0, 0], [0, 2], [-3, -4], [4, -3]])
    return {
        "s = (3, 4), 4 tokens": fn(s, U),
        "7 numbers, 11 tokens": fn(torch.randn(7, generator=draw), torch.randn(11, 7, generator=draw)),
    }


def token_by_token(s, U, by_s=True, by_u=True):
    dots = [sum(x * y for x, y in zip(s.tolist(), u)) for u in U.tolist()]
    sizes = [(math.hypot(*s.tolist()) if by_s else 1) * (math.hypot(*u) if by_u else 1) for u in U.tolist()]
    return torch.tensor(dots), torch.tensor([x / size for x, size in zip(dots, sizes)])


def through_a_norm(s, U):
    """The vector is divided by its RMS, as the final norm would: the papers read the raw vector."""
    return token_by_token(s / s.pow(2).mean().sqrt(), U)


def cosine_without_the_vector_s_norm(s, U):
    """The cosine is not divided by |s|."""
    return token_by_token(s, U, by_s=False)


def cosine_without_the_rows_norms(s, U):
    """The cosine is not divided by |u_v|: long rows, those of frequent or of odd tokens, would win."""
    return token_by_token(s, U, by_u=False)


def cosines_first(s, U):
    """The two are swapped: dot products come first."""
    return token_by_token(s, U)[::-1]


# ---------------------------------------------------------------------------------------------------------- 3.2 folded


def gains_cases(fn, seed):
    draw, _ = drawn(seed)
    found = {}
    for family in ("qwen2", "gemma2"):
        llm = random_llm(family)
        for i, norm in enumerate((llm.model.norm, llm.model.layers[-1].input_layernorm)):
            norm.weight.copy_((i + 1) * torch.arange(32) / 8)
        found[f"{family}, a row of ones"] = fn(llm, torch.ones(1, 32))
        found[f"{family}, 5 tokens"] = fn(llm, torch.randn(5, 32, generator=draw))
    return found


def gain_of(llm):
    return llm.model.norm.weight + (llm.config.model_type == "gemma2")  # Gemma's gain is 1 + weight


def row_times_gain(llm, U):
    return torch.stack([torch.tensor([x * g for x, g in zip(u, gain_of(llm).tolist())]) for u in U.tolist()])


def final_norm_forgotten(llm, U):
    """The rows come back as they were: the gain of the final norm is not in them."""
    return U.clone()


def applied_twice(llm, U):
    """The gain is in there twice."""
    return U * gain_of(llm) ** 2


def norm_of_another_place(llm, U):
    """This is the gain of the last layer's input norm; the final norm stands behind the last layer."""
    return U * (llm.model.layers[-1].input_layernorm.weight + (llm.config.model_type == "gemma2"))


def weight_taken_for_the_gain(llm, U):
    """This is the norm's weight; Gemma's gain is 1 + weight: send a row of ones through the norm itself."""
    return U * llm.model.norm.weight


# -------------------------------------------------------------------------------------------------- 3.3 largest_shifts


def shift_cases(fn, seed):
    draw, _ = drawn(seed)
    prompts, completions = texts(seed, (5, 9, 2), (4, 1, 6))
    v, only = torch.randn(32, generator=draw), ([[3, 4]], [[5, 6, 2]])
    with torch.no_grad():
        nothing = sorted(fn(random_llm(), {1: torch.zeros(32)}, *only))
        found = {"a vector of zeros, 3 positions": [[row, position, gain] for row, position, _, gain in nothing]}
        found["answers of 4, 1 and 6 tokens"] = sorted(fn(random_llm(), {2: v}, prompts, completions))
        found["another layer"] = sorted(fn(random_llm(), {0: v / 2}, prompts, completions))
    return found


def text_by_text(llm, vectors, prompts, completions, gain=lambda p, q: q - p, first=0, best=None):
    ((layer, v),), found = vectors.items(), []
    for row, (p, c) in enumerate(zip(prompts, completions)):
        block, ids = llm.model.layers[layer], torch.tensor([p + c])
        base = llm(ids).logits[0].softmax(-1)
        block.forward = lambda *a, inner=block.forward, **k: inner(*a, **k) + v
        steered = llm(ids).logits[0].softmax(-1)
        del block.forward
        for t in range(len(c)):
            b, s = base[len(p) + t - 1], steered[len(p) + t - 1]
            token = (best or gain)(b, s).argmax().item()
            found.append((row, t + first, token, gain(b, s)[token].item()))
    return found


def base_minus_steered(*given):
    """This is p(x) - p(x; s), what the vector takes away; what it gives is p(x; s) - p(x)."""
    return text_by_text(*given, gain=lambda p, q: p - q)


def size_of_the_change(*given):
    """The token that moves most, up or down, is taken; wanted is the one that gains most."""
    return text_by_text(*given, gain=lambda p, q: (q - p).abs())


def likeliest_token_instead(*given):
    """This is the steered model's likeliest token; the base model may have liked it as much."""
    return text_by_text(*given, best=lambda p, q: q)


def logarithms_instead(*given):
    """These are differences of log-probs: tokens that never come would win."""
    return text_by_text(*given, gain=lambda p, q: q.log() - p.log())


def positions_from_one(*given):
    """Positions are counted from 1: position 0 is the answer's first token, which the prompt's last one predicts."""
    return text_by_text(*given, first=1)


# -------------------------------------------------------------------------------------------------- 3.4 persistence_of


def diff_diff_cases(fn, seed):
    draw, _ = drawn(seed)
    one, two = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1], [0, 1]])

    def run(deltas, targets):
        """deltas: of each text (tokens, layers, D)."""
        units = torch.stack([(d / d.norm(dim=-1, keepdim=True)).sum(0) for d in deltas])
        shifts, counts = torch.stack([d.sum(0) for d in deltas]), torch.tensor([float(len(d)) for d in deltas])
        layers = list(range(deltas[0].shape[1]))
        found = fn(units, shifts, counts, targets, layers)["diff_diff"]
        return [getattr(value, "value", value) for value in found]

    many = [torch.randn(n, 3, 6, generator=draw) + 0.7 for n in (3, 5, 2, 7)]
    targets = {l: torch.randn(6, generator=draw) for l in range(3)}
    return {
        "shifts (1, 0) in one text; (0, 1), (0, 1) in another": run([one[:, None], two[:, None]], {0: one[0]}),
        "4 texts of 3, 5, 2 and 7 tokens, 3 layers": run(many, targets),
    }


# the sums over tokens are all that Diff-Diff needs: the cosine with a fixed m is unit . m / |m|
def one_layer_at_a_time(units, shifts, counts, targets, layers):
    found = []
    for i in range(len(layers)):
        mean = [sum(column) / sum(counts.tolist()) for column in zip(*shifts[:, i].tolist())]
        size = math.hypot(*mean)
        found.append(
            sum(sum(u * m for u, m in zip(text, mean)) / size for text in units[:, i].tolist()) / sum(counts.tolist())
        )
    return {"diff_diff": found}


def every_text_alike(units, shifts, counts, targets, layers):
    """Every text counts the same here; the mean is over tokens, so a long text counts more."""
    return one_layer_at_a_time(units / counts[:, None, None], shifts, torch.ones_like(counts), targets, layers)


def against_the_own_text_s_mean(units, shifts, counts, targets, layers):
    """Each token is compared with its own text's mean shift (diff_diff_authors); wanted is the mean over all texts."""
    cos = (units * torch.nn.functional.normalize(shifts, dim=-1)).sum(-1)
    return {"diff_diff": (cos.sum(0) / counts.sum()).tolist()}


def cosine_of_the_means(units, shifts, counts, targets, layers):
    """This is the cosine of two means; wanted is the mean of the tokens' cosines, which falls where tokens differ."""
    return {"diff_diff": torch.cosine_similarity(units.sum(0), shifts.sum(0), dim=-1).tolist()}


def against_the_vector(units, shifts, counts, targets, layers):
    """This is Diff-Vector, the cosine with the later layer's own vector; Diff-Diff is with the mean shift."""
    towards = torch.stack(
        [
            torch.nn.functional.normalize(targets[l], dim=0) if l in targets else units[0, i]
            for i, l in enumerate(layers)
        ]
    )
    return {"diff_diff": ((units.sum(0) / counts.sum()) * towards).sum(-1).tolist()}


def mean_of_the_units(units, shifts, counts, targets, layers):
    """The mean is taken of the shifts after each has length 1; E Delta is the mean of the shifts as they are."""
    return one_layer_at_a_time(units, units, counts, targets, layers)


# ------------------------------------------------------------------------------------------------------ 3.5 lines_past


def line_cases(fn, seed):
    import model

    draw, _ = drawn(seed)
    ids, found = torch.tensor([[5, 17, 3, 40], [9, 2, 33, 21]]), {}
    with torch.no_grad():
        base = random_llm()(ids, output_hidden_states=True)
        for layer, s in ((0, torch.arange(32.0)), (1, torch.randn(32, generator=draw))):
            for name, vectors in fn(layer, s).items():
                llm = random_llm()
                with model.steer(llm, vectors):
                    states = llm(ids, output_hidden_states=True)
                found[f"vector of layer {layer}, {name}, logits"] = states.logits[..., :5]
                # hidden_states[l] enters layer l
                moved = [x - y for x, y in zip(states.hidden_states, base.hidden_states)]
                found[f"vector of layer {layer}, {name}, what enters block {layer + 1}"] = moved[layer + 1]
                if (layer, name) == (0, "Skip-Layer"):
                    found["vector of layer 0, Skip-Layer, what leaves block 1"] = moved[2]
    return found


def by_places(layer, s, attention=1, past=1, swap=False):
    skips = {f"{layer + attention}.attention": s}, {layer + past: s}
    skips = skips[::-1] if swap else skips
    return {"Unmodified": {layer: s}, "Skip-Attn": skips[0], "Skip-Layer": skips[1]}


def skips_swapped(layer, s):
    """The two are swapped: Skip-Attn adds s after the attention (the MLP sees it), Skip-Layer after the whole block."""
    return by_places(layer, s, swap=True)


def attention_of_the_own_block(layer, s):
    """This skips the attention of the vector's own layer; the vector comes after it. The next block is layer + 1."""
    return by_places(layer, s, attention=0)


def skip_layer_that_skips_nothing(layer, s):
    """Skip-Layer adds s where the vector stands anyway; past the next block means at the end of layer + 1."""
    return by_places(layer, s, past=0)


# ----------------------------------------------------------------------------------------------------- 3.6 block_after


def block_cases(fn, seed):
    found = {}
    for heads, keys, layer in ((4, 2, 0), (6, 3, 1), (6, 1, 0)):
        llm = random_llm(num_attention_heads=heads, num_key_value_heads=keys)
        block, *counts = fn(llm, layer)
        at = next((i for i, other in enumerate(llm.model.layers) if other is block), "none of its blocks")
        found[f"{heads} query and {keys} key-value heads, after layer {layer}"] = [at, *counts]
    try:
        fn(random_llm(), 2)
        found["after the last layer"] = "goes on"
    except SystemExit:
        found["after the last layer"] = "exits"
    except IndexError:
        found["after the last layer"] = "an IndexError"
    return found


def from_the_config(llm, layer):
    if layer + 1 >= llm.config.num_hidden_layers:
        raise SystemExit("no block follows")
    return llm.model.layers[layer + 1], llm.config.num_attention_heads, llm.config.num_key_value_heads


def key_heads_counted_as_query_heads(llm, layer):
    """The key-value heads are fewer than the query heads (grouped attention): count those of k_proj."""
    block, queries, _ = from_the_config(llm, layer)
    return block, queries, queries


def the_block_of_the_vector(llm, layer):
    """This is the vector's own block; the vector enters the next one."""
    _, queries, keys = from_the_config(llm, layer)
    return llm.model.layers[layer], queries, keys


def width_over_head_size(llm, layer):
    """The heads are not hidden_size / head_dim: q_proj may be wider or narrower than the residual stream."""
    block, _, keys = from_the_config(llm, layer)
    return block, llm.config.hidden_size // block.self_attn.head_dim, keys


# -------------------------------------------------------------------------------------------------------- 3.7 recovery


def recovery_cases(fn, seed):
    draw, _ = drawn(seed)
    lost, base, other = (torch.rand(6, generator=draw) for _ in range(3))
    lost, base, other = (0.2 * lost).tolist(), (1 + base).tolist(), (0.5 * other).tolist()
    return {
        "lost 1, 2 of 4, 8": fn([1.0, 2.0], [4.0, 8.0]).value,
        "lost 1, 2; another way 2, 4": fn([1.0, 2.0], [4.0, 8.0], [2.0, 4.0]).value,
        "6 problems": fn(lost, base).value,
        "6 problems, against another way": fn(lost, base, other).value,
    }


def one_number(value):
    return SimpleNamespace(value=value)


def of_sums(lost, base, reference=None):
    start = sum(base if reference is None else reference)
    return one_number((start - sum(lost)) / sum(base))


def mean_of_the_ratios(lost, base, reference=None):
    """Each problem's ratio is averaged: problems where little is at stake count as much. Divide the sums."""
    start = base if reference is None else reference
    return one_number(sum((x - y) / z for x, y, z in zip(start, lost, base)) / len(lost))


def share_that_is_lost(lost, base, reference=None):
    """This is the share that is lost; recovery is 1 minus it."""
    return one_number(sum(lost) / sum(base) if reference is None else (sum(lost) - sum(reference)) / sum(base))


def patch_swapped(lost, base, reference=None):
    """Patched and base are swapped: the KL of the base model is the whole, it stands below."""
    return one_number(1 - sum(base) / sum(lost) if reference is None else (sum(reference) - sum(base)) / sum(lost))


def reference_not_used(lost, base, reference=None):
    """With a reference the recovery is counted from that way, not from the base model."""
    return of_sums(lost, base)


# ------------------------------------------------------------------------------------------------------- 3.8 pair_gain


def rows_of_answers(seed):
    """[problem] of 0 or 1 for a pair, two singles and all layers: hard problems are hard for all of them."""
    draw, _ = drawn(seed)
    hard = torch.rand(60, generator=draw)
    return [((0.5 * torch.rand(60, generator=draw) + 0.5 * hard) < p).float() for p in (0.55, 0.4, 0.42, 0.7)]


def gain_cases(fn, seed):
    from evaluate import Estimate

    def run(parts, interval=True):
        found = fn(*parts)
        numbers = {"share": found["share"].value, "over_single": found["over_single"].value, "cross": found["cross"]}
        if interval:
            numbers["interval"] = found["over_single"].interval
            numbers["open"] = found["share"].open
        return numbers

    def just(value):  # without spread
        return Estimate(value, np.full(10, value))

    def numbers_of(rows):
        return [Estimate.of([[x] for x in row.tolist()]) for row in rows]

    return {
        "pair 0.5, singles 0.2 and 0.4, all 0.6": run([just(x) for x in (0.5, 0.2, 0.4, 0.6)], False),
        "pair 0.995, singles 0.75 and 0.5, all 1": run([just(x) for x in (0.995, 0.75, 0.5, 1.0)], False),
        "60 problems": run(numbers_of(rows_of_answers(seed))),
        "60 other problems": run(numbers_of(rows_of_answers(seed + 100))),
    }


class Number:
    """A value and its draws: what pair_gain returns, by plain numpy."""

    def __init__(self, value, draws, open=False):
        self.value, self.draws, self.open = value, draws, open

    @property
    def interval(self):
        return [float(x) for x in np.percentile(self.draws, [2.5, 97.5])]


def drawn_by_drawn(pair, one, other, whole, single=None, zero=None, order=lambda x: x, least=0.99):
    value, draws = single(one, other) if single else (max(one.value, other.value), np.maximum(one.draws, other.draws))
    draws = order(draws)
    gap = Number(whole.value - value, whole.draws - draws)
    below = whole.value if zero else gap.value
    return {
        "share": Number((pair.value - value) / below, (pair.draws - draws), open=gap.interval[0] <= 0),
        "over_single": Number(pair.value - value, pair.draws - draws),
        "cross": pair.value >= least * whole.value,
    }


def unpaired_interval(*given):
    """The draws of pair and single are shuffled against each other: the same problems must be in both, or easy and hard
    problems count as noise."""
    return drawn_by_drawn(*given, order=lambda draws: np.random.default_rng(1).permutation(draws))


def mean_of_the_singles(*given):
    """The pair is compared with the mean of its two vectors; wanted is the better one."""
    return drawn_by_drawn(*given, single=lambda a, b: ((a.value + b.value) / 2, (a.draws + b.draws) / 2))


def better_one_chosen_once(*given):
    """The better single is chosen once; choose it in every draw, or the winner's luck counts as skill."""
    return drawn_by_drawn(*given, single=lambda a, b: max(((x.value, x.draws) for x in (a, b)), key=lambda x: x[0]))


def worse_single(*given):
    """The pair is compared with the worse of the two."""
    return drawn_by_drawn(*given, single=lambda a, b: (min(a.value, b.value), np.minimum(a.draws, b.draws)))


def share_of_the_whole(*given):
    """The gain is divided by all layers' accuracy; divide by what all layers gain over the single."""
    return drawn_by_drawn(*given, zero=True)


def crossing_at_the_whole(*given):
    """A pair crosses at 99 % of all layers' accuracy (P1 Fig. 5)."""
    return drawn_by_drawn(*given, least=1.0)


# ------------------------------------------------------------------------------------------------------ 3.9 resamples


def resample_cases(fn, seed):
    def again(n, draws):
        getattr(fn, "cache_clear", lambda: None)()  # under lru_cache the second call would be the first one's array
        return np.asarray(fn(n, draws))

    n = 50 + seed % 7
    draws, twice = again(n, 2000), again(n, 2000)
    right = np.arange(n) < n // 2  # half of the problems are solved
    spread = right[draws % n].mean(1).std() / (right.std() / math.sqrt(n))
    different = np.mean([len(set(row)) for row in draws.tolist()]) / n
    return {
        "shape for 7 problems, 30 draws": list(again(7, 30).shape),
        "the same when asked again": bool((draws == twice).all()) if draws.shape == twice.shape else False,
        "numbers of problems, all of them": sorted(set(draws.flatten().tolist())) == list(range(n)),
        "draws differ": len(set(map(tuple, draws[:100].tolist()))) > 50,
        "share of different problems in a draw": round(float(different), 1),  # 1 - 1/e
        "spread of a mean, in standard errors": round(float(spread), 1),
    }


def with_a_generator(n, draws=10_000, seed=3):
    draw = np.random.default_rng(seed)
    return np.array([[int(x * n) for x in draw.random(n)] for _ in range(draws)])


def new_draws_every_time(n, draws=10_000):
    """Every call draws anew: two estimates over the same problems must resample the same ones, or they are unpaired."""
    return np.random.randint(0, n, (draws, n))


def without_replacement(n, draws=10_000):
    """Every draw is a permutation: it has the mean of the data, always. Draw with replacement."""
    draw = np.random.default_rng(0)
    return np.array([draw.permutation(n) for _ in range(draws)])


def half_of_the_problems(n, draws=10_000):
    """Each draw has fewer problems than the data: its spread is that of a smaller set."""
    return with_a_generator(n, draws)[:, : n // 2]


def one_draw_for_all(n, draws=10_000):
    """All draws are the same one."""
    return np.repeat(with_a_generator(n, 1), draws, 0)


def transposed(n, draws=10_000):
    """Rows and columns are swapped: a row is a draw."""
    return with_a_generator(n, draws).T


EXERCISES = [
    Exercise(
        "3.1", "analyze.read_out", lens_cases, token_by_token,
        {"s = (3, 4), 4 tokens": [[3, 8, -25, 0], [0.6, 0.8, -1, 0]]},
        (through_a_norm, cosine_without_the_vector_s_norm, cosine_without_the_rows_norms, cosines_first),
    ),
    Exercise(
        "3.2", "analyze.folded", gains_cases, row_times_gain,
        {
            "qwen2, a row of ones": [[i / 8 for i in range(32)]],
            "gemma2, a row of ones": [[1 + i / 8 for i in range(32)]],
        },
        (final_norm_forgotten, applied_twice, norm_of_another_place, weight_taken_for_the_gain),
    ),
    Exercise(
        "3.3", "analyze.largest_shifts", shift_cases, text_by_text,
        {"a vector of zeros, 3 positions": [[0, 0, 0.0], [0, 1, 0.0], [0, 2, 0.0]]},
        (base_minus_steered, size_of_the_change, likeliest_token_instead, logarithms_instead, positions_from_one),
    ),
    Exercise(
        "3.4", "analyze.persistence_of", diff_diff_cases, one_layer_at_a_time,
        # the mean shift is (1/3, 2/3); the cosines are 1/sqrt 5 once and 2/sqrt 5 twice
        {"shifts (1, 0) in one text; (0, 1), (0, 1) in another": [5 / (3 * math.sqrt(5))]},
        (every_text_alike, against_the_own_text_s_mean, cosine_of_the_means, against_the_vector, mean_of_the_units),
    ),
    Exercise(
        "3.5", "analyze.lines_past", line_cases, by_places,
        {
            "vector of layer 0, Unmodified, what enters block 1": torch.arange(32.0).expand(2, 4, 32).tolist(),
            "vector of layer 0, Skip-Attn, what enters block 1": torch.zeros(2, 4, 32).tolist(),
            "vector of layer 0, Skip-Layer, what enters block 1": torch.zeros(2, 4, 32).tolist(),
            "vector of layer 0, Skip-Layer, what leaves block 1": torch.arange(32.0).expand(2, 4, 32).tolist(),
        },
        (skips_swapped, attention_of_the_own_block, skip_layer_that_skips_nothing),
    ),
    Exercise(
        "3.6", "analyze.block_after", block_cases, from_the_config,
        {
            "4 query and 2 key-value heads, after layer 0": [1, 4, 2],
            "6 query and 3 key-value heads, after layer 1": [2, 6, 3],
            "6 query and 1 key-value heads, after layer 0": [1, 6, 1],
        },
        (key_heads_counted_as_query_heads, the_block_of_the_vector, width_over_head_size),
    ),
    Exercise(
        "3.7", "analyze.recovery", recovery_cases, of_sums,
        {"lost 1, 2 of 4, 8": 0.75, "lost 1, 2; another way 2, 4": 0.25},
        (mean_of_the_ratios, share_that_is_lost, patch_swapped, reference_not_used),
    ),
    Exercise(
        "3.8", "analyze.pair_gain", gain_cases, drawn_by_drawn,
        {
            "pair 0.5, singles 0.2 and 0.4, all 0.6": {"share": 0.5, "over_single": 0.1, "cross": False},
            "pair 0.995, singles 0.75 and 0.5, all 1": {"share": 0.98, "over_single": 0.245, "cross": True},
        },
        (unpaired_interval, mean_of_the_singles, better_one_chosen_once, worse_single, share_of_the_whole,
         crossing_at_the_whole),
    ),
    Exercise(
        "3.9", "evaluate.resamples", resample_cases, with_a_generator,
        {
            "shape for 7 problems, 30 draws": [30, 7],
            "the same when asked again": True,
            "numbers of problems, all of them": True,
            "draws differ": True,
            "share of different problems in a draw": 0.6,
            "spread of a mean, in standard errors": 1.0,
        },
        (new_draws_every_time, without_replacement, half_of_the_problems, one_draw_for_all, transposed),
    ),
]  # fmt: skip
