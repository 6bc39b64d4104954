"""Exercises 1.1 to 1.6: the maths of RLOO. Each: the cases, a second way, wrong versions whose names are the slips'."""

import math

import torch
from conftest import random_llm
from judge import Exercise

from model import Rollouts


def drawn(seed: int):
    """(a generator of random tensors, of random ints)."""
    draw = torch.Generator().manual_seed(seed)
    return draw, lambda low, high, *size: torch.randint(low, high, size, generator=draw)


# ------------------------------------------------------------------------------------------------- 1.1 rloo_advantages


def advantage_cases(fn, seed):
    draw, _ = drawn(seed)
    by_hand = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    return {
        "3 prompts, 4 samples": fn(by_hand),
        "2 prompts, 5 samples, rewards of any size": fn(torch.randn(2, 5, generator=draw)),
        "5 prompts, 2 samples": fn(torch.rand(5, 2, generator=draw)),
    }


def others_mean(rewards):
    found = rewards.clone()
    for i, row in enumerate(rewards.tolist()):
        for j, r in enumerate(row):
            others = row[:j] + row[j + 1 :]
            found[i, j] = r - sum(others) / len(others)
    return found


def mean_over_the_batch(rewards):
    """This is the mean over the batch, not over the other answers to the same prompt."""
    return rewards - rewards.mean()


def own_reward_in_the_baseline(rewards):
    """The mean of the whole row holds the answer's own reward; leave it out (they differ by the factor k / (k - 1))."""
    return rewards - rewards.mean(1, keepdim=True)


def group_order(rewards):
    """Groups were made by a reshape to (k, N): a row here is a prompt, its k samples stand side by side."""
    n, k = rewards.shape
    return others_mean(rewards.reshape(k, n).T).T.reshape(n, k)


def over_the_samples(rewards):
    """The mean is taken over the prompts (dim 0), not over the samples of one prompt (dim 1)."""
    return others_mean(rewards.T).T


def divided_by_the_deviation(rewards):
    """This is GRPO's advantage, divided by the standard deviation; RLOO divides by nothing."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def wrong_sign_of_advantages(rewards):
    """The sign is turned: a reward above the others' mean has a positive advantage."""
    return -others_mean(rewards)


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
    logps.requires_grad_()
    found["its gradient, with weights"] = torch.autograd.grad(fn(logps, mask, A, 50, w), logps)[0]
    return found


def loss_of(logps, mask, advantages, total_tokens, weights=None, rows=None):
    total = 0.0
    for i in range(len(logps)):
        for t in range(logps.shape[1]):
            if mask[i, t]:
                total = total - advantages[i] * logps[i, t] * (1 if weights is None else weights[i, t]) / total_tokens
    return total


def denominator_of_the_micro_batch(logps, mask, advantages, total_tokens, weights=None):
    """The sum is divided by the tokens of these rows, so the loss depends on the split; divide by total_tokens."""
    return loss_of(logps, mask, advantages, mask.sum(), weights)


def mean_per_answer(logps, mask, advantages, total_tokens, weights=None):
    """Each answer is divided by its own length: that favours short right answers and long wrong ones."""
    terms = logps if weights is None else weights * logps
    return -(advantages * (terms * mask).sum(1) / mask.sum(1)).mean()


def wrong_sign_of_the_loss(logps, mask, advantages, total_tokens, weights=None):
    """The minus is missing: Adam goes downhill, and the loss must fall where good answers get likelier."""
    return -loss_of(logps, mask, advantages, total_tokens, weights)


def padding_in_the_loss(logps, mask, advantages, total_tokens, weights=None):
    """Padding is summed, too: the mask says which tokens are real."""
    return loss_of(logps, torch.ones_like(mask), advantages, total_tokens, weights)


def weights_forgotten(logps, mask, advantages, total_tokens, weights=None):
    """The importance weights are not used."""
    return loss_of(logps, mask, advantages, total_tokens)


# ----------------------------------------------------------------------------------------------------- 1.3 token_logps


def texts(seed, prompt_lengths, completion_lengths):
    _, some = drawn(seed)
    return tuple([some(3, 61, n).tolist() for n in lengths] for lengths in (prompt_lengths, completion_lengths))


def flat(llm):
    """The model with equal logits for all of its 61 tokens."""
    llm.lm_head.weight.zero_()
    return llm


def logp_cases(fn, seed):
    prompts, completions = texts(seed, (5, 9, 2), (4, 1, 6))
    with torch.no_grad():
        return {
            "all tokens equally likely": fn(flat(random_llm()), [[3, 4]], [[5, 6, 2]]),
            "answers of 4, 1 and 6 tokens": fn(random_llm(), prompts, completions),
            "at temperature 0.7, in chunks of 3": fn(random_llm(), prompts, completions, 0.7, 3),
        }


def logps_row_by_row(llm, prompts, completions, temperature=1.0, chunk=1024, shift=1, drop=0):
    C = max(map(len, completions))
    logps, mask = torch.zeros(len(prompts), C), torch.zeros(len(prompts), C, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        scores = (llm(torch.tensor([p + c])).logits[0].float() / temperature).log_softmax(-1)
        for t, token in enumerate(c[: len(c) - drop]):
            logps[i, t], mask[i, t] = scores[len(p) + t - shift, token], True
    return logps, mask


def off_by_one(llm, prompts, completions, temperature=1.0, chunk=1024):
    """The log-probs are read one position late: the logits at t - 1 predict token t."""
    return logps_row_by_row(llm, prompts, completions, temperature, shift=0)


def stop_token_left_out(llm, prompts, completions, temperature=1.0, chunk=1024):
    """The last token of each answer is left out: it was sampled, too, so the model is to learn when to stop."""
    return logps_row_by_row(llm, prompts, completions, temperature, drop=1)


def temperature_forgotten(llm, prompts, completions, temperature=1.0, chunk=1024):
    """The logits are not divided by the temperature: these are not the log-probs that the sampler drew with."""
    return logps_row_by_row(llm, prompts, completions)


def prompt_in_the_loss(llm, prompts, completions, temperature=1.0, chunk=1024):
    """The prompts' tokens are scored as well: only the answers were sampled from the model."""
    return logps_row_by_row(
        llm, [p[:1] for p in prompts], [p[1:] + c for p, c in zip(prompts, completions)], temperature
    )


def padding_scored(llm, prompts, completions, temperature=1.0, chunk=1024):
    """Padding is scored and stands in the mask: rows shorter than the longest end with False and 0."""
    longest = max(map(len, completions))
    return logps_row_by_row(llm, prompts, [c + [0] * (longest - len(c)) for c in completions], temperature)


# --------------------------------------------------------------------------------------------------------- 1.4 batches


def batch_cases(fn, seed):
    _, some = drawn(seed)
    return {
        "lengths 3, 5, 2, budget 6": fn([3, 5, 2], 6),
        "lengths 4, 4, 7, 2, 9, 1, budget 12": fn([4, 4, 7, 2, 9, 1], 12),
        "a row above the budget": fn([2, 30, 3], 9),
        "20 rows, budget 50": fn(some(1, 25, 20).tolist(), 50),
        "13 rows, budget 31": fn(some(1, 12, 13).tolist(), 31),
    }


def filled(lengths, budget, size=lambda rows: max(rows) * len(rows), order=True):
    rows = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if order else range(len(lengths))
    found, now = [], []
    for i in rows:
        if now and size([lengths[j] for j in [*now, i]]) > budget:
            found, now = [*found, now], []
        now = [*now, i]
    return [*found, now]


def padding_not_counted(lengths, budget):
    """Lengths are added up: a batch is padded, so it costs its longest row times its rows."""
    return filled(lengths, budget, sum)


def rows_in_the_order_given(lengths, budget):
    """The rows are not sorted: longest first, or a short row pays for a long neighbour."""
    return filled(lengths, budget, order=False)


def budget_never_reached(lengths, budget):
    """A batch of exactly the budget is split: at most the budget, so it may be equal."""
    return filled(lengths, budget - 1)


def padded_to_the_newcomer(lengths, budget):
    """A batch is measured with the length of the row that comes last; it is padded to its longest row, the first."""
    return filled(lengths, budget, lambda rows: rows[-1] * len(rows))


# --------------------------------------------------------------------------------------------- 1.5 accumulate_gradient


SUMS = ["loss", "tokens", "nats", "compared", "off", "off_max", "clipped"]  # what train.py logs


def gradient_cases(fn, seed):
    draw, _ = drawn(seed)
    prompts, completions = texts(seed, (5, 5, 5, 3, 3, 3), (4, 1, 6, 2, 7, 3))
    A = torch.tensor([[1.0, -0.25, -0.75], [0, 2, -2]])  # the fourth row adds nothing, but its tokens count
    sampled = [(-torch.rand(len(c), generator=draw) * 5).tolist() for c in completions]

    def run(llm, budget, begin=0.0, logps=None, vectors=None):
        rolled = Rollouts(prompts, completions, [], [], logps)
        v = torch.randn(32, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        v.grad = torch.full_like(v, begin)
        sums = fn(llm, {1: v}, rolled, A, 1.0, budget)
        lacking = [key for key in SUMS if key not in sums]
        assert not lacking, f"the sums lack {', '.join(lacking)}, which train.py logs"
        return {"gradient": v.grad, "sums": {key: sums[key] for key in ("loss", "tokens", "nats")}}

    # log 61 nats a token: loss = log 61 * (4 * 1 - 0.25 * 1 - 0.75 * 6 + 2 * 7 - 2 * 3) / 23 tokens
    return {
        "all tokens equally likely": run(flat(random_llm()), 1000)["sums"],
        "one micro-batch": run(random_llm(), 1000),
        "micro-batches of 20 tokens": run(random_llm(), 20),
        "added to a gradient that is there": run(random_llm(), 15, begin=1.0)["gradient"],
        "with the sampler's log-probs": run(random_llm(), 20, logps=sampled)["gradient"],
    }


def row_by_row(
    llm, vectors, rolled, advantages, temperature, budget, denominator=None, rows_of=lambda j, i: i, only=None
):
    """Each row alone, with a wrapped forward in place of a hook. denominator: of a micro-batch's rows."""
    A, total = advantages.flatten(), sum(map(len, rolled.completions))
    rows = [i for i in range(len(A)) if A[i]]
    sums, (layer, v) = dict.fromkeys(SUMS, 0.0), next(iter(vectors.items()))
    block = llm.model.layers[layer]
    parts = filled([len(rolled.prompts[i]) + len(rolled.completions[i]) for i in rows], budget)
    inner = block.forward
    block.forward = lambda *a, **k: inner(*a, **k) + v
    for part in parts:
        part = [rows[j] for j in part]
        if only is not None:
            v.grad = torch.zeros_like(v)  # what a gradient that is not added up leaves: the last part's
        for j, i in enumerate(part):
            logps, mask = logps_row_by_row(llm, [rolled.prompts[i]], [rolled.completions[i]], temperature)
            w = torch.ones_like(logps)
            if rolled.logps is not None:
                w = (logps.detach() - torch.tensor([rolled.logps[i]])).exp().clamp(max=2.0)
            below = denominator([len(rolled.completions[i]) for i in part], total) if denominator else total
            loss = -(A[rows_of(j, i)] * w * logps).sum() / below
            loss.backward()
            for key, x in zip(sums, (loss.item(), logps.numel(), -logps.sum().item())):
                sums[key] += x
    del block.forward
    return sums


def denominator_of_each_micro_batch(*given):
    """Each micro-batch is divided by its own tokens: the gradient then depends on how the batch is split."""
    return row_by_row(*given, denominator=lambda lengths, total: sum(lengths))


def advantages_in_the_wrong_order(*given):
    """Rows are sorted by length for the micro-batches, and their advantages stay in the old order."""
    return row_by_row(*given, rows_of=lambda j, i: j)


def last_micro_batch_only(*given):
    """The gradient is set, not added: only the last micro-batch is left in it."""
    return row_by_row(*given, only=True)


def rows_without_advantage_not_counted(llm, vectors, rolled, advantages, *given):
    """Tokens of rows with A = 0 are left out of the denominator: such rows need no forward pass, but they count."""
    tokens = sum(len(c) for c, a in zip(rolled.completions, advantages.flatten()) if a)
    return row_by_row(llm, vectors, rolled, advantages, *given, denominator=lambda lengths, total: tokens)


# ---------------------------------------------------------------------------------------------- 1.6 importance_weights


def weight_cases(fn, seed):
    draw, _ = drawn(seed)
    ours, theirs = torch.tensor([[0.2, 0.5, 0.4]]).log(), torch.tensor([[0.4, 0.25, 0.1]]).log()
    logps, sampled = (-2 * torch.rand(4, 5, generator=draw) for _ in range(2))
    return {
        "pi 0.2, 0.5, 0.4; mu 0.4, 0.25, 0.1; cap 3": fn(ours, theirs, 3.0),
        "4 answers of 5 tokens, cap 1.5": fn(logps, sampled, 1.5),
        "has a gradient": fn(logps.clone().requires_grad_(), sampled, 2.0).requires_grad,
    }


def ratios(logps, sampled, cap):
    rows = zip(logps.tolist(), sampled.tolist())
    return torch.tensor([[min(math.exp(x) / math.exp(y), cap) for x, y in zip(*row)] for row in rows])


def ratio_upside_down(logps, sampled, cap):
    """This is mu / pi: tokens that the model finds likelier than the sampler did count more."""
    return ratios(sampled, logps, cap)


def not_truncated(logps, sampled, cap):
    """The cap is not applied: one rare token can outweigh a batch."""
    return ratios(logps, sampled, math.inf)


def clipped_on_both_sides(logps, sampled, cap):
    """Small ratios are raised to 1 / cap: only large ones are cut."""
    return ratios(logps, sampled, cap).clamp(min=1 / cap)


def ratio_of_the_whole_answer(logps, sampled, cap):
    """The ratio is that of whole answers, a product over their tokens; each token has its own."""
    return (logps - sampled).detach().sum(1, keepdim=True).exp().clamp(max=cap).expand_as(logps)


def differentiated(logps, sampled, cap):
    """The weights carry a gradient: they are constants, so that only log pi is differentiated."""
    return (logps - sampled).exp().clamp(max=cap)


EXERCISES = [
    Exercise(
        "1.1", "train.rloo_advantages", advantage_cases, others_mean,
        {"3 prompts, 4 samples": [[1, -1 / 3, -1 / 3, -1 / 3], [0, 0, 0, 0], [2 / 3, 2 / 3, -2 / 3, -2 / 3]]},
        (mean_over_the_batch, own_reward_in_the_baseline, group_order, over_the_samples, divided_by_the_deviation,
         wrong_sign_of_advantages),
    ),
    Exercise(
        "1.2", "train.rloo_loss", loss_cases, loss_of,
        {"3 answers of 2, 3 and 1 tokens": 3 / 8},  # -(1 * -3 + -1/3 * -6 + 1/2 * -4) / 8
        (denominator_of_the_micro_batch, mean_per_answer, wrong_sign_of_the_loss, padding_in_the_loss,
         weights_forgotten),
    ),
    Exercise(
        "1.3", "model.token_logps", logp_cases, logps_row_by_row,
        {"all tokens equally likely": [[[-math.log(61)] * 3], [[True] * 3]]},
        (off_by_one, stop_token_left_out, temperature_forgotten, prompt_in_the_loss, padding_scored),
    ),
    Exercise(
        "1.4", "plumbing.fast.batches", batch_cases, filled,
        {
            "lengths 3, 5, 2, budget 6": [[1], [0, 2]],
            "lengths 4, 4, 7, 2, 9, 1, budget 12": [[4], [2], [0, 1, 3], [5]],
            "a row above the budget": [[1], [2, 0]],
        },
        (padding_not_counted, rows_in_the_order_given, budget_never_reached, padded_to_the_newcomer),
    ),
    Exercise(
        "1.5", "train.accumulate_gradient", gradient_cases, row_by_row,
        {
            "all tokens equally likely": {
                "loss": math.log(61) * (4 - 0.25 - 4.5 + 14 - 6) / 23, "tokens": 21, "nats": 21 * math.log(61)
            }
        },
        (denominator_of_each_micro_batch, advantages_in_the_wrong_order, last_micro_batch_only,
         rows_without_advantage_not_counted),
    ),
    Exercise(
        "1.6", "train.importance_weights", weight_cases, ratios,
        {"pi 0.2, 0.5, 0.4; mu 0.4, 0.25, 0.1; cap 3": [[0.5, 2, 3]], "has a gradient": False},
        (ratio_upside_down, not_truncated, clipped_on_both_sides, ratio_of_the_whole_answer, differentiated),
    ),
]  # fmt: skip
