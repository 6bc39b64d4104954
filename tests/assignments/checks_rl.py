"""Exercises 1.1 to 1.6: the maths of RLOO. Each has a second way, and wrong versions whose names are the slips'."""

import math

import torch
from cases_rl import SUMS
from judge import Check

# ------------------------------------------------------------------------------------------------- 1.1 rloo_advantages


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
    return others_mean(rewards.T).T if len(rewards) > 1 else torch.zeros_like(rewards)


def divided_by_the_deviation(rewards):
    """This is GRPO's advantage, divided by the standard deviation; RLOO divides by nothing."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def wrong_sign_of_advantages(rewards):
    """The sign is turned: a reward above the others' mean has a positive advantage."""
    return -others_mean(rewards)


# ------------------------------------------------------------------------------------------------------- 1.2 rloo_loss


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


def padded(rows):
    return max(rows) * len(rows)


def once_each(prompts):
    return max(map(len, prompts)) * len({tuple(p) for p in prompts})


def filled(lengths, budget, prompts=None, size=padded, order=True, read=once_each):
    rows = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if order else range(len(lengths))
    found, now = [], []
    for i in rows:
        more = [*now, i]
        tokens = size([lengths[j] for j in more]) + (read([prompts[j] for j in more]) if prompts else 0)
        if now and tokens > budget:
            found, now = [*found, now], []
        now = [*now, i]
    return [*found, now] if now else []


def padding_not_counted(*given):
    """Lengths are added up: a batch is padded, so it costs its longest row times its rows."""
    return filled(*given, size=sum)


def rows_in_the_order_given(*given):
    """The rows are not sorted: longest first, or a short row pays for a long neighbour."""
    return filled(*given, order=False)


def budget_never_reached(lengths, budget, prompts=None):
    """A batch of exactly the budget is split: at most the budget, so it may be equal."""
    return filled(lengths, budget - 1, prompts)


def padded_to_the_newcomer(*given):
    """A batch is measured with the length of the row that comes last; it is padded to its longest row, the first."""
    return filled(*given, size=lambda rows: rows[-1] * len(rows))


def prompts_not_counted(lengths, budget, prompts=None):
    """The prompts are not counted: where they are given, each is read once for all of its rows in the batch."""
    return filled(lengths, budget)


def a_prompt_for_every_row(*given):
    """Every row pays for its prompt: a prompt that several rows of a batch share is read once."""
    return filled(*given, read=lambda prompts: padded(list(map(len, prompts))))


def an_empty_batch_for_no_rows(lengths, budget, prompts=None):
    """Without rows there are no batches: [] and not [[]], which would be run."""
    return filled(lengths, budget, prompts) or [[]]


# --------------------------------------------------------------------------------------------- 1.5 accumulate_gradient


def row_by_row(
    llm, vectors, rolled, advantages, temperature, budget, total_tokens=None, cap=2.0, denominator=None,
    rows_of=lambda j, i: i, only=None,
):  # fmt: skip
    """Each row alone, with a wrapped forward in place of a hook. denominator: of a micro-batch's rows."""
    A, total = advantages.flatten(), total_tokens or sum(map(len, rolled.completions))
    rows = [i for i in range(len(A)) if A[i]]
    sums = dict.fromkeys(SUMS, 0.0)
    parts = filled([len(rolled.prompts[i]) + len(rolled.completions[i]) for i in rows], budget)
    for layer, v in vectors.items():
        block = llm.model.layers[layer]
        block.forward = lambda *a, inner=block.forward, v=v, **k: inner(*a, **k) + v
    for part in parts:
        part = [rows[j] for j in part]
        if only is not None:
            for v in vectors.values():
                v.grad = torch.zeros_like(v)  # what a gradient that is not added up leaves: the last part's
        for j, i in enumerate(part):
            logps, mask = logps_row_by_row(llm, [rolled.prompts[i]], [rolled.completions[i]], temperature)
            w = torch.ones_like(logps)
            if rolled.logps is not None:
                sampled = rolled.logps[i]
                if cap:
                    w = ratios(logps, torch.tensor([sampled]), cap)
                    sums["clipped"] += sum(x >= cap for x in w[0].tolist())
                off = [abs(x - y) for x, y in zip(logps[0].tolist(), sampled)]
                sums["compared"], sums["off"] = sums["compared"] + len(off), sums["off"] + sum(off)
                sums["off_max"] = max(sums["off_max"], *off)
            below = denominator([len(rolled.completions[i]) for i in part], total) if denominator else total
            loss = -(A[rows_of(j, i)] * w * logps).sum() / below
            loss.backward()
            for key, x in zip(sums, (loss.item(), logps.numel(), -logps.sum().item())):
                sums[key] += x
    for layer in vectors:
        del llm.model.layers[layer].forward
    return sums


def denominator_of_each_micro_batch(*given, **more):
    """Each micro-batch is divided by its own tokens: the gradient then depends on how the batch is split."""
    return row_by_row(*given, **more, denominator=lambda lengths, total: sum(lengths))


def advantages_in_the_wrong_order(*given, **more):
    """Rows are sorted by length for the micro-batches, and their advantages stay in the old order."""
    return row_by_row(*given, **more, rows_of=lambda j, i: j)


def last_micro_batch_only(*given, **more):
    """The gradient is set, not added: only the last micro-batch is left in it."""
    return row_by_row(*given, **more, only=True)


def rows_without_advantage_not_counted(llm, vectors, rolled, advantages, *given, total_tokens=None, **more):
    """Tokens of rows with A = 0 are left out of the denominator: such rows need no forward pass, but they count."""
    tokens = total_tokens or sum(len(c) for c, a in zip(rolled.completions, advantages.flatten()) if a)
    return row_by_row(llm, vectors, rolled, advantages, *given, total_tokens=tokens, **more)


def total_tokens_not_used(*given, total_tokens=None, **more):
    """total_tokens is not used: over several processes the tokens of all of them stand below the sum."""
    return row_by_row(*given, **more)


def cap_not_used(*given, cap=2.0, **more):
    """The cap of the importance weights is not used: 2 is its default only."""
    return row_by_row(*given, cap=2.0, **more)


def weights_where_the_cap_is_0(*given, cap=2.0, **more):
    """A cap of 0 means no importance weights: here they are all cut to something, or not cut at all."""
    return row_by_row(*given, cap=cap or math.exp(300), **more)


def temperature_of_1(llm, vectors, rolled, advantages, temperature, *given, **more):
    """The temperature is not used: the log-probs are those that the sampler drew with."""
    return row_by_row(llm, vectors, rolled, advantages, 1.0, *given, **more)


# ---------------------------------------------------------------------------------------------- 1.6 importance_weights


def ratios(logps, sampled, cap):
    rows = zip(logps.tolist(), sampled.tolist())
    return torch.tensor([[math.exp(min(x - y, math.log(cap))) for x, y in zip(*row)] for row in rows])


def ratio_upside_down(logps, sampled, cap):
    """This is mu / pi: tokens that the model finds likelier than the sampler did count more."""
    return ratios(sampled, logps, cap)


def not_truncated(logps, sampled, cap):
    """The cap is not applied: one rare token can outweigh a batch."""
    return ratios(logps, sampled, math.exp(300))


def clipped_on_both_sides(logps, sampled, cap):
    """Small ratios are raised to 1 / cap: only large ones are cut."""
    return ratios(logps, sampled, cap).clamp(min=1 / cap)


def ratio_of_the_whole_answer(logps, sampled, cap):
    """The ratio is that of whole answers, a product over their tokens; each token has its own."""
    return (logps - sampled).detach().sum(1, keepdim=True).exp().clamp(max=cap).expand_as(logps)


def differentiated(logps, sampled, cap):
    """The weights carry a gradient: they are constants, so that only log pi is differentiated."""
    return (logps - sampled).exp().clamp(max=cap)


CHECKS = [
    Check(
        "1.1", others_mean,
        {"3 prompts, 4 samples": [[1, -1 / 3, -1 / 3, -1 / 3], [0, 0, 0, 0], [2 / 3, 2 / 3, -2 / 3, -2 / 3]]},
        (mean_over_the_batch, own_reward_in_the_baseline, group_order, over_the_samples, divided_by_the_deviation,
         wrong_sign_of_advantages),
    ),
    Check(
        "1.2", loss_of,
        {"3 answers of 2, 3 and 1 tokens": 3 / 8},  # -(1 * -3 + -1/3 * -6 + 1/2 * -4) / 8
        (denominator_of_the_micro_batch, mean_per_answer, wrong_sign_of_the_loss, padding_in_the_loss,
         weights_forgotten),
    ),
    Check(
        "1.3", logps_row_by_row,
        {"all tokens equally likely": [[[-math.log(61)] * 3], [[True] * 3]]},
        (off_by_one, stop_token_left_out, temperature_forgotten, prompt_in_the_loss, padding_scored),
    ),
    Check(
        "1.4", filled,
        {
            "lengths 3, 5, 2, budget 6": [[5], [3, 2]],
            "lengths 4, 4, 7, 2, 9, 1, budget 12": [[9], [7], [4, 4, 2], [1]],
            "a row above the budget": [[30], [3, 2]],
            "no rows": [],
            # 4 * 2 + 5 = 13 fits; with the third row it would be 4 * 3 + 5 * 2 = 22
            "answers of 4, 3 and 2 tokens to prompts of 5, 5 and 2, budget 14": [[4, 3], [2]],
        },
        (padding_not_counted, rows_in_the_order_given, budget_never_reached, padded_to_the_newcomer,
         prompts_not_counted, a_prompt_for_every_row, an_empty_batch_for_no_rows),
    ),
    Check(
        "1.5", row_by_row,
        {
            "all tokens equally likely": {
                "loss": math.log(61) * (4 - 0.25 - 4.5 + 14 - 6) / 23, "tokens": 21, "nats": 21 * math.log(61),
                "compared": 0, "off": 0, "off_max": 0, "clipped": 0,
            },
            "a forward pass of more than 20 tokens": False,
        },
        (denominator_of_each_micro_batch, advantages_in_the_wrong_order, last_micro_batch_only,
         rows_without_advantage_not_counted, total_tokens_not_used, cap_not_used, weights_where_the_cap_is_0,
         temperature_of_1),
    ),
    Check(
        "1.6", ratios,
        {"pi 0.2, 0.5, 0.4; mu 0.4, 0.25, 0.1; cap 3": [[0.5, 2, 3]], "has a gradient (it is a constant)": False},
        (ratio_upside_down, not_truncated, clipped_on_both_sides, ratio_of_the_whole_answer, differentiated),
    ),
]  # fmt: skip
