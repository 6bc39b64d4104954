"""Exercises 3.1 to 3.9: looking into vectors. The lens, shifts of probabilities, Diff-Diff, patches, intervals."""

import math

import numpy as np
import torch
from judge import Check

# -------------------------------------------------------------------------------------------------------- 3.1 read_out


def token_by_token(s, U, by_s=True, by_u=True):
    dots = [sum(x * y for x, y in zip(s.tolist(), u)) for u in U.tolist()]
    sizes = [(math.hypot(*s.tolist()) if by_s else 1) * (math.hypot(*u) if by_u else 1) for u in U.tolist()]
    return torch.tensor(dots), torch.tensor([x / size if size else 0.0 for x, size in zip(dots, sizes)])


def through_a_norm(s, U):
    """The vector is divided by its RMS, as the final norm would: the papers read the raw vector."""
    return token_by_token(s / s.pow(2).mean().sqrt().clamp(min=1e-12), U)


def cosine_without_the_vector_s_norm(s, U):
    """The cosine is not divided by |s|."""
    return token_by_token(s, U, by_s=False)


def cosine_without_the_rows_norms(s, U):
    """The cosine is not divided by |u_v|: long rows, those of frequent or of odd tokens, would win."""
    return token_by_token(s, U, by_u=False)


def no_number_for_a_row_of_zeros(s, U):
    """A row of zeros gives 0 / 0: real vocabularies have such rows, and their cosine is 0."""
    dot, cosine = token_by_token(s, U)
    return dot, torch.where((U.norm(dim=-1) * s.norm()) > 0, cosine, torch.nan)


def cosines_first(s, U):
    """The two are swapped: dot products come first."""
    return token_by_token(s, U)[::-1]


# ---------------------------------------------------------------------------------------------------------- 3.2 folded


def gain_of(llm):
    return llm.model.norm.weight + llm.config.model_type.startswith("gemma")  # Gemma's gain is 1 + weight


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
    return U * (llm.model.layers[-1].input_layernorm.weight + llm.config.model_type.startswith("gemma"))


def weight_taken_for_the_gain(llm, U):
    """This is the norm's weight; Gemma's gain is 1 + weight: send a row of ones through the norm itself."""
    return U * llm.model.norm.weight


# -------------------------------------------------------------------------------------------------- 3.3 largest_shifts


def text_by_text(llm, vectors, prompts, completions, gain=lambda p, q: q - p, first=0, best=None):
    found = []
    for row, (p, c) in enumerate(zip(prompts, completions)):
        ids = torch.tensor([p + c])
        base = llm(ids).logits[0].softmax(-1)
        for layer, v in vectors.items():
            block = llm.model.layers[layer]
            block.forward = lambda *a, inner=block.forward, v=v, **k: inner(*a, **k) + v
        steered = llm(ids).logits[0].softmax(-1)
        for layer in vectors:
            del llm.model.layers[layer].forward
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


def all_in_one(layer, s):
    """Skip-Attn still has the vector at its own layer, so the attention reads it; it must stand in one place only."""
    found = by_places(layer, s)
    return found | {"Skip-Attn": found["Skip-Attn"] | {layer: s}}


def skip_layer_that_skips_nothing(layer, s):
    """Skip-Layer adds s where the vector stands anyway; past the next block means at the end of layer + 1."""
    return by_places(layer, s, past=0)


# ----------------------------------------------------------------------------------------------------- 3.6 block_after


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


def counts_that_are_not_whole(llm, layer):
    """The counts are floats: a division with / gives 4.0, and range(4.0) fails. Use //."""
    block, queries, keys = from_the_config(llm, layer)
    return block, float(queries), float(keys)


def around_the_end(llm, layer):
    """After the last layer no block follows: this takes another one in its place."""
    last = llm.config.num_hidden_layers - 1
    return from_the_config(llm, layer) if layer < last else (llm.model.layers[0], 4, 2)


def width_over_head_size(llm, layer):
    """The heads are not hidden_size / head_dim: q_proj may be wider or narrower than the residual stream."""
    block, _, keys = from_the_config(llm, layer)
    return block, llm.config.hidden_size // block.self_attn.head_dim, keys


# -------------------------------------------------------------------------------------------------------- 3.7 recovery


class Number:
    """A value and its draws, by plain numpy: what recovery and pair_gain return."""

    def __init__(self, value, draws, unclear=False):
        self.value, self.draws, self.unclear = value, np.asarray(draws), unclear

    @property
    def interval(self):
        return [float(x) for x in np.percentile(self.draws, [2.5, 97.5])]


def of_sums(lost, base, reference=None, ratio=lambda start, lost, base: (sum(start) - sum(lost)) / sum(base)):
    start, draw, draws = base if reference is None else reference, np.random.default_rng(5), []
    for _ in range(1000):
        some = draw.integers(len(base), size=len(base))
        parts = [[part[i] for i in some] for part in (start, lost, base)]
        draws += [ratio(*parts)] if sum(parts[2]) else []
    return Number(ratio(start, lost, base), draws)


def mean_of_the_ratios(*given):
    """Each problem's ratio is averaged: problems where little is at stake count as much. Divide the sums."""
    return of_sums(
        *given, ratio=lambda *parts: float(np.mean([(x - y) / z if z else np.nan for x, y, z in zip(*parts)]))
    )


def share_that_is_lost(lost, base, reference=None):
    """This is the share that is lost; recovery is 1 minus it."""
    return of_sums(reference or [0.0] * len(base), base, lost)


def patch_swapped(lost, base, reference=None):
    """Patched and base are swapped: the KL of the base model is the whole, it stands below."""
    return of_sums(base, [x or 1e-12 for x in lost], reference)


def never_below_0(*given):
    """The recovery is cut off at 0: a patch that does harm has a negative one."""
    return of_sums(*given, ratio=lambda start, lost, base: max(0.0, (sum(start) - sum(lost)) / sum(base)))


def interval_without_width(*given):
    """Every draw of the interval is the value itself: resample the problems, and divide the sums of every draw."""
    found = of_sums(*given)
    return Number(found.value, np.full(1000, found.value))


def unpaired_sums(lost, base, reference=None):
    """The two sums are drawn from different problems: both must come from the same ones in every draw."""
    top = of_sums(lost, base, reference, lambda start, lost, base: sum(start) - sum(lost))
    draws = np.random.default_rng(6).permutation(
        [sum(np.random.default_rng(i).choice(base, len(base))) for i in range(1000)]
    )
    return Number(top.value / sum(base), top.draws / np.where(draws > 0, draws, 1)[: len(top.draws)])


def reference_not_used(lost, base, reference=None):
    """With a reference the recovery is counted from that way, not from the base model."""
    return of_sums(lost, base)


# ------------------------------------------------------------------------------------------------------- 3.8 pair_gain


def drawn_by_drawn(pair, one, other, whole, single=None, zero=None, order=lambda x: x, least=0.99):
    value, draws = single(one, other) if single else (max(one.value, other.value), np.maximum(one.draws, other.draws))
    draws = order(draws)
    gap = Number(whole.value - value, whole.draws - draws)
    below = whole if zero else gap
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = ((pair.draws - draws) / below.draws)[below.draws != 0]
    return {
        "share": Number((pair.value - value) / below.value if below.value else None, shares, gap.interval[0] <= 0),
        "over_single": Number(pair.value - value, pair.draws - draws),
        "cross": pair.value >= least * whole.value,
    }


def never_negative(*given):
    """The gain is cut off at 0: a pair can lose against the better single, and often does."""
    found = drawn_by_drawn(*given)
    for name in ("share", "over_single"):
        found[name].value, found[name].draws = max(0.0, found[name].value or 0.0), found[name].draws.clip(0)
    return found


def interval_without_its_width(*given):
    """Every draw is the value itself, so the interval has no width: subtract the estimates, not their values."""
    found = drawn_by_drawn(*given)
    found["over_single"].draws = np.full(1000, found["over_single"].value)
    return found


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


def last_problem_never_drawn(n, draws=10_000):
    """The last problem is never drawn: the upper end of integers(0, n) is not included already."""
    return np.minimum(with_a_generator(n, draws), max(n - 2, 0))


def turned_round(n, draws=10_000):
    """Every draw is the first one, turned round: the numbers of a draw must be independent of those of another."""
    first = with_a_generator(n, 1)
    return (first + np.arange(draws)[:, None]) % n


def one_draw_for_all(n, draws=10_000):
    """All draws are the same one."""
    return np.repeat(with_a_generator(n, 1), draws, 0)


def transposed(n, draws=10_000):
    """Rows and columns are swapped: a row is a draw."""
    return with_a_generator(n, draws).T


CHECKS = [
    Check(
        "3.1", token_by_token,
        {"s = (3, 4), 4 tokens": [[3, 8, -25, 0], [0.6, 0.8, -1, 0]]},
        (through_a_norm, cosine_without_the_vector_s_norm, cosine_without_the_rows_norms, cosines_first,
         no_number_for_a_row_of_zeros),
    ),
    Check(
        "3.2", row_times_gain,
        {
            "qwen2, a row of ones": [[i / 8 - 1 for i in range(32)]],
            "gemma2, a row of ones": [[i / 8 for i in range(32)]],
        },
        (final_norm_forgotten, applied_twice, norm_of_another_place, weight_taken_for_the_gain),
    ),
    Check(
        "3.3", text_by_text,
        {"a vector of zeros, 3 positions": [[0, 0, 0.0], [0, 1, 0.0], [0, 2, 0.0]]},
        (base_minus_steered, size_of_the_change, likeliest_token_instead, logarithms_instead, positions_from_one),
    ),
    Check(
        "3.4", one_layer_at_a_time,
        # the mean shift is (1/3, 2/3); the cosines are 1/sqrt 5 once and 2/sqrt 5 twice
        {
            "shifts (1, 0) in one text; (0, 1), (0, 1) in another": {
                "values": [5 / (3 * math.sqrt(5))], "an interval without width": False
            }
        },
        (every_text_alike, against_the_own_text_s_mean, cosine_of_the_means, against_the_vector, mean_of_the_units),
    ),
    Check(
        "3.5", by_places,
        {
            "qwen2, vector of layer 0, Unmodified, what enters block 1": torch.arange(32.0).expand(2, 4, 32).tolist(),
            "qwen2, vector of layer 0, Skip-Attn, what enters block 1": torch.zeros(2, 4, 32).tolist(),
            "qwen2, vector of layer 0, Skip-Layer, what enters block 1": torch.zeros(2, 4, 32).tolist(),
            "qwen2, vector of layer 0, Skip-Layer, what leaves block 1": torch.arange(32.0).expand(2, 4, 32).tolist(),
        },
        (skips_swapped, attention_of_the_own_block, skip_layer_that_skips_nothing, all_in_one),
    ),
    Check(
        "3.6", from_the_config,
        {
            "4 query and 2 key-value heads, after layer 0": [1, 4, 2, "whole: True"],
            "6 query and 1 key-value heads, after layer 0": [1, 6, 1, "whole: True"],
            "8 query and 4 key-value heads, after layer 9": [10, 8, 4, "whole: True"],
            "after the last layer": "stops with a line",
        },
        (key_heads_counted_as_query_heads, the_block_of_the_vector, width_over_head_size, counts_that_are_not_whole,
         around_the_end),
    ),
    Check(
        "3.7", of_sums,
        {
            "lost 1, 2 of 4, 8": 0.75, "lost 1, 2; another way 2, 4": 0.25,
            "lost 6, 9 of 4, 8 (a patch that does harm)": -0.25,
            "a problem where nothing is at stake": 0.75,
        },
        (mean_of_the_ratios, share_that_is_lost, patch_swapped, reference_not_used, never_below_0,
         interval_without_width, unpaired_sums),
    ),
    Check(
        "3.8", drawn_by_drawn,
        {
            "pair 0.5, singles 0.2 and 0.4, all 0.6": {"share": 0.5, "over_single": 0.1, "cross": False},
            "pair 0.995, singles 0.75 and 0.5, all 1": {"share": 0.98, "over_single": 0.245, "cross": True},
            "pair 0.3, singles 0.5 and 0.4, all 0.9": {"share": -0.5, "over_single": -0.2, "cross": False},
        },
        (unpaired_interval, never_negative, interval_without_its_width, mean_of_the_singles, better_one_chosen_once,
         worse_single, share_of_the_whole, crossing_at_the_whole),
    ),
    Check(
        "3.9", with_a_generator,
        {
            "shape for 7 problems, 30 draws": [30, 7],
            "shape for 5 problems": [10_000, 5],
            "the same when asked again": True,
            "the lowest and the highest number": [0, -1],
            "how many of the problems are drawn at all": 1.0,
            "different draws among the first 100": 100,
            "share of different problems in a draw": {"about": 1 - math.exp(-1), "within": 0.004},
            "spread of a mean, in standard errors": {"about": 1.0, "within": 0.08},
            "one problem": [[0]] * 4,
        },
        (new_draws_every_time, without_replacement, half_of_the_problems, last_problem_never_drawn, turned_round,
         one_draw_for_all, transposed),
    ),
]  # fmt: skip
