"""
Right answers to every exercise in three styles, and wrong ones as edits of them: what tests/test_assignments.py tries.

ANSWERS: {number: (three files of a student, edits)}. An edit (old, new) is applied to the first of the three that
contains `old`. Lecturers can read them as model answers. They are not part of a student edition.
"""

# ruff: noqa: E501

from table import FUNCTIONS

ANSWERS = {}

ANSWERS["1.1"] = (
    (
        """
def rloo_advantages(rewards):
    k = rewards.shape[1]
    total = rewards.sum(dim=1, keepdim=True)
    return rewards - (total - rewards) / (k - 1)
""",
        """
def rloo_advantages(rewards):
    out = torch.empty_like(rewards)
    for i in range(len(rewards)):
        for j in range(rewards.shape[1]):
            others = torch.cat([rewards[i, :j], rewards[i, j + 1 :]])
            out[i, j] = rewards[i, j] - others.mean()
    return out
""",
        """
def rloo_advantages(rewards):
    k = rewards.shape[1]
    baseline = rewards @ (torch.ones(k, k) - torch.eye(k)) / (k - 1)
    return torch.sub(rewards, baseline)
""",
    ),
    (
        ("total = rewards.sum(dim=1, keepdim=True)", "total = rewards.sum(dim=0, keepdim=True)"),
        ("(total - rewards) / (k - 1)", "total / (k - 1)"),
        ("(total - rewards) / (k - 1)", "(total - rewards) / k"),
        ("return rewards - (total - rewards) / (k - 1)", "return (total - rewards) / (k - 1) - rewards"),
        ("return rewards - (total - rewards) / (k - 1)", "rewards -= (total - rewards) / (k - 1)\n    return rewards"),
        ("others.mean()", "others.median()"),
        ("others.mean()", "others.max()"),
        ("rewards[i, j + 1 :]", "rewards[i, j:]"),
        ("    return out", "        return out"),
        ("return torch.sub(rewards, baseline)", "return torch.sub(rewards, baseline).flatten()"),
        ("return torch.sub(rewards, baseline)", "return torch.sub(rewards, baseline).tolist()"),
        ("return torch.sub(rewards, baseline)", "return torch.sub(rewards, baseline).clamp(min=0)"),
        ("return torch.sub(rewards, baseline)", "return torch.sub(rewards, baseline).bfloat16()"),
        (
            "return torch.sub(rewards, baseline)",
            "a = torch.sub(rewards, baseline)\n    return (a - a.mean()) / a.std()",
        ),
        ("rewards @ (torch.ones(k, k)", "(rewards > 0).float() @ (torch.ones(k, k)"),
        ("torch.ones(k, k) - torch.eye(k)", "torch.triu(torch.ones(k, k), 1)"),
    ),
)

ANSWERS["1.2"] = (
    (
        """
def rloo_loss(logps, mask, advantages, total_tokens, weights=None):
    if weights is not None:
        logps = logps * weights
    return -(advantages.unsqueeze(1) * logps * mask.float()).sum() / total_tokens
""",
        """
def rloo_loss(logps, mask, advantages, total_tokens, weights=None):
    loss = 0
    for i, row in enumerate(logps):
        picked = row[mask[i]]
        if weights is not None:
            picked = picked * weights[i][mask[i]]
        loss = loss - advantages[i] * picked.sum()
    return loss / total_tokens
""",
        """
def rloo_loss(logps, mask, advantages, total_tokens, weights=None):
    w = torch.ones_like(logps) if weights is None else weights
    terms = torch.einsum("b,bc,bc->bc", advantages, logps, w)
    return -torch.where(mask, terms, torch.zeros_like(terms)).sum().div(total_tokens)
""",
    ),
    (
        ("/ total_tokens", "/ mask.sum()"),
        ("/ total_tokens", "/ len(logps)"),
        ("/ total_tokens", "/ max(total_tokens, 100)"),
        ("* logps * mask.float()).sum() / total_tokens", "* logps * mask.float()).mean()"),
        ("* mask.float()", ""),
        ("advantages.unsqueeze(1)", "advantages.unsqueeze(0).expand(9, -1)[0, : len(logps), None].abs()"),
        ("advantages.unsqueeze(1)", "(advantages - advantages.mean()).unsqueeze(1)"),
        ("logps = logps * weights", "logps = logps * weights / weights.mean()"),
        ("logps = logps * weights", "logps = logps * weights * weights"),
        ("logps = logps * weights", "logps = logps + weights.log()"),
        ("logps = logps * weights", "pass"),
        ("advantages.unsqueeze(1) * logps", "advantages.unsqueeze(1) * logps.exp()"),
        ("return -(adv", "return (adv"),
        ("logps * mask.float()", "logps.detach() * mask.float()"),
        (").sum() / total_tokens", ").sum().item() / total_tokens"),
        ("return -(adv", "with torch.no_grad():\n        return -(adv"),
        ("return loss / total_tokens", "    return loss / total_tokens"),
        ("picked.sum()", "picked.mean()"),
        ("row[mask[i]]", "row[mask[i]][:-1]"),
        ("    w = torch", "    logps.data.mul_(mask)\n    w = torch"),
    ),
)

ANSWERS["1.3"] = (
    (
        """
def token_logps(llm, prompts, completions, temperature=1.0, chunk=1024, share=False, states=None):
    C = max(len(c) for c in completions)
    logps, mask = [], torch.zeros(len(prompts), C, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        scores = llm(torch.tensor([p + c])).logits[0].float() / temperature
        scores = torch.log_softmax(scores, dim=-1)
        picked = scores[len(p) - 1 : -1].gather(1, torch.tensor(c)[:, None])[:, 0]
        logps.append(torch.nn.functional.pad(picked, (0, C - len(c))))
        mask[i, : len(c)] = True
    return torch.stack(logps), mask
""",
        """
def token_logps(llm, prompts, completions, temperature=1.0, chunk=1024, share=False, states=None):
    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions)]
    ids = pad_sequence(rows, batch_first=True)
    real = pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
    out = llm(input_ids=ids, attention_mask=real).logits[:, :-1] / temperature
    every = -torch.nn.functional.cross_entropy(out.transpose(1, 2), ids[:, 1:], reduction="none")
    lengths = torch.tensor([len(c) for c in completions])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    parts = [every[i, len(p) - 1 : len(p) + len(c) - 1] for i, (p, c) in enumerate(zip(prompts, completions))]
    return pad_sequence(parts, batch_first=True), mask
""",
        """
def token_logps(llm, prompts, completions, temperature=1.0, chunk=1024, share=False, states=None):
    h, before = read(llm, prompts, completions)
    flat_h, targets = h[before], torch.tensor(sum(completions, []))
    pieces = []
    for start in range(0, len(targets), chunk):
        z = logits(llm, flat_h[start : start + chunk]) / temperature
        y = targets[start : start + chunk]
        pieces.append(z[torch.arange(len(y)), y] - z.logsumexp(-1))
    lengths = [len(c) for c in completions]
    rows = torch.cat(pieces).split(lengths)
    out = torch.stack([torch.cat([row, row.new_zeros(max(lengths) - len(row))]) for row in rows])
    return out, torch.tensor([[t < n for t in range(max(lengths))] for n in lengths])
""",
    ),
    (
        ("scores[len(p) - 1 : -1]", "scores[len(p) :][: len(c)].new_zeros(len(c), scores.shape[1]) + scores[len(p) :]"),
        ("scores[len(p) - 1 : -1]", "scores[-len(c) :]"),
        ("scores[len(p) - 1 : -1]", "scores[: len(c)]"),
        (".float() / temperature", ".float()"),
        (".float() / temperature", ".float() * temperature"),
        ("scores = torch.log_softmax(scores, dim=-1)", "scores = torch.softmax(scores, dim=-1).log()"),
        ("scores = torch.log_softmax(scores, dim=-1)", "scores = scores - scores.exp().sum(-1, keepdim=True).log()"),
        ("scores = torch.log_softmax(scores, dim=-1)", "scores = torch.log_softmax(scores, dim=0)"),
        ("scores = torch.log_softmax(scores, dim=-1)", "scores = torch.log_softmax(scores, -1).clamp(min=-10)"),
        ("scores = torch.log_softmax(scores, dim=-1)", "scores = torch.softmax(scores, dim=-1)"),
        ("scores = torch.log_softmax(scores, dim=-1)", "scores = torch.log_softmax(scores, -1) / math.log(2)"),
        ("logps.append(", "picked = picked.detach()\n        logps.append("),
        ("torch.tensor([p + c])", "torch.tensor([p.__iadd__(c)])"),
        ("mask[i, : len(c)] = True", "mask[i, : len(c) - 1] = True"),
        ("mask[i, : len(c)] = True", "mask[i, : len(c)] = torch.tensor(c) != 0"),
        ("mask[i, : len(c)] = True", "mask[i] = True"),
        ("return torch.stack(logps), mask", "return torch.stack(logps), mask.float()"),
        ("return torch.stack(logps), mask", "return torch.stack(logps).exp(), mask"),
        ("    return torch.stack(logps), mask", "        return torch.stack(logps), mask"),
        ("(0, C - len(c))", "(C - len(c), 0)"),
        ("logits(llm, flat_h[start : start + chunk])", "llm.lm_head(flat_h[start : start + chunk])"),
        ("ids[:, 1:], reduction", "ids[:, :-1], reduction"),
        ("every[i, len(p) - 1 : len(p) + len(c) - 1]", "every[i, : len(p) + len(c) - 1]"),
        ("    h, before = read(", "    with torch.no_grad():\n        h, before = read("),
    ),
)

ANSWERS["1.4"] = (
    (
        """
def batches(lengths, budget, prompts=None):
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    out = []
    for i in order:
        if out:
            rows = out[-1] + [i]
            cost = lengths[rows[0]] * len(rows)
            if prompts is not None:
                distinct = {tuple(prompts[j]) for j in rows}
                cost += max(len(p) for p in distinct) * len(distinct)
            if cost <= budget:
                out[-1].append(i)
                continue
        out.append([i])
    return out
""",
        """
def batches(lengths, budget, prompts=None):
    order = torch.tensor(lengths).argsort(descending=True).tolist() if lengths else []

    def cost(rows):
        tokens = len(rows) * max(lengths[i] for i in rows)
        if prompts:
            kinds = set(map(tuple, (prompts[i] for i in rows)))
            tokens += len(kinds) * max(map(len, kinds))
        return tokens

    result = []
    while order:
        n = 1
        while n < len(order) and cost(order[: n + 1]) <= budget:
            n += 1
        result.append(order[:n])
        order = order[n:]
    return result
""",
        """
def batches(lengths, budget, prompts=None):
    rows = np.lexsort((np.arange(len(lengths))[::-1], lengths))[::-1] if len(lengths) else []
    found, current, longest, seen = [], [], 0, []
    for i in map(int, rows):
        text = list(prompts[i]) if prompts else []
        more = seen if text in seen else [*seen, text]
        if current and longest * (len(current) + 1) + len(more) * max(map(len, more)) > budget:
            found.append(current)
            current, more = [], [text]
        if not current:
            longest = lengths[i]
        current, seen = [*current, i], more
    return found + ([current] if current else [])
""",
    ),
    (
        ("lengths[rows[0]] * len(rows)", "sum(lengths[j] for j in rows)"),
        ("lengths[rows[0]] * len(rows)", "lengths[i] * len(rows)"),
        ("lengths[rows[0]] * len(rows)", "lengths[rows[0]] * len(out[-1])"),
        (", reverse=True)", ")"),
        ("sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)", "range(len(lengths))"),
        ("if cost <= budget", "if cost < budget"),
        ("if cost <= budget", "if len(rows) <= budget"),
        ("if prompts is not None", "if False"),
        ("* len(distinct)", "* len(rows)"),
        ("max(len(p) for p in distinct) * len(distinct)", "sum(len(p) for p in distinct)"),
        ("tuple(prompts[j]) for j in rows", "tuple(prompts[j]) for j in rows[-1:]"),
        ("    return out", "    return out[:-1]"),
        ("    return out", "    return [b for b in out if lengths[b[0]] <= budget]"),
        ("    return out", "    return [[lengths[i] for i in b] for b in out]"),
        ("    return out", "    return out or [[]]"),
        ("    return out", "    return [torch.tensor(b) for b in out]"),
        ("    order = sorted", "    lengths.sort(reverse=True)\n    order = sorted"),
        (
            "for i in order:\n        if out:",
            "for i in order:\n        for b in out:\n            if lengths[b[0]] * (len(b) + 1) <= budget and not prompts:\n                b.append(i)\n                break\n        else:\n            out.append([i])\n        continue\n        if out:",
        ),
        ("set(map(tuple, (prompts[i] for i in rows)))", "[prompts[i] for i in rows]"),
    ),
)

ANSWERS["1.5"] = (
    (
        """
def accumulate_gradient(llm, vectors, rolled, advantages, temperature, budget, total_tokens=None, cap=2.0,
                        recompute=False):
    A = advantages.reshape(-1)
    total = total_tokens or sum(len(c) for c in rolled.completions)
    rows = [i for i in range(len(A)) if A[i] != 0]
    sums = {name: 0.0 for name in ("loss", "tokens", "nats", "compared", "off", "off_max", "clipped")}
    lengths = [len(rolled.prompts[i]) + len(rolled.completions[i]) for i in rows]
    with steer(llm, vectors):
        for batch in batches(lengths, budget):
            chosen = [rows[j] for j in batch]
            prompts, answers = [rolled.prompts[i] for i in chosen], [rolled.completions[i] for i in chosen]
            logps, mask = model.token_logps(llm, prompts, answers, temperature)
            w = None
            if rolled.logps is not None:
                sampled = pad_sequence([torch.tensor(rolled.logps[i]) for i in chosen], batch_first=True)
                off = (logps.detach() - sampled).abs()[mask]
                sums["compared"] += off.numel()
                sums["off"] += off.sum().item()
                sums["off_max"] = max(sums["off_max"], off.max().item())
                if cap:
                    w = importance_weights(logps, sampled, cap)
                    sums["clipped"] += int((w[mask] >= cap).sum())
            loss = rloo_loss(logps, mask, A[chosen], total, w)
            loss.backward()
            sums["loss"] += loss.item()
            sums["tokens"] += int(mask.sum())
            sums["nats"] += -logps[mask].sum().item()
    return sums
""",
        """
def accumulate_gradient(llm, vectors, rolled, advantages, temperature, budget, total_tokens=None, cap=2.0,
                        recompute=False):
    total = total_tokens or sum(map(len, rolled.completions))
    sums = dict(loss=0.0, tokens=0, nats=0.0, compared=0, off=0.0, off_max=0.0, clipped=0)
    for i, a in enumerate(advantages.flatten().tolist()):
        if a == 0:
            continue
        with steer(llm, vectors):
            logps = token_logps(llm, [rolled.prompts[i]], [rolled.completions[i]], temperature)[0][0]
        w = torch.ones(len(logps))
        if rolled.logps is not None:
            mu = torch.tensor(rolled.logps[i])
            gap = (logps - mu).detach()
            sums["compared"] += len(gap)
            sums["off"] += float(gap.abs().sum())
            sums["off_max"] = max(sums["off_max"], float(gap.abs().max()))
            if cap:
                w = gap.exp().clamp(max=cap)
                sums["clipped"] += float((w >= cap).sum())
        part = -(a * w * logps).sum() / total
        part.backward()
        sums["loss"] += float(part.detach())
        sums["tokens"] += len(logps)
        sums["nats"] -= float(logps.detach().sum())
    return sums
""",
        """
def accumulate_gradient(llm, vectors, rolled, advantages, temperature, budget, total_tokens=None, cap=2.0,
                        recompute=False):
    A = advantages.flatten()
    keep = A.nonzero()[:, 0].tolist()
    total = total_tokens or sum(map(len, rolled.completions))
    trained = [v for v in vectors.values() if v.requires_grad]
    sums = dict.fromkeys(["loss", "tokens", "nats", "compared", "off", "off_max", "clipped"], 0.0)
    sizes = [len(rolled.prompts[i]) + len(rolled.completions[i]) for i in keep]
    for part in [[keep[j] for j in b] for b in model.batches(sizes, budget)]:
        with steer(llm, vectors):
            logps, mask = token_logps(llm, [rolled.prompts[i] for i in part], [rolled.completions[i] for i in part],
                                      temperature)
            weights = None
            if rolled.logps is not None:
                mu = torch.zeros_like(logps)
                for row, i in enumerate(part):
                    mu[row, : len(rolled.logps[i])] = torch.tensor(rolled.logps[i])
                gap = ((logps.detach() - mu).abs() * mask)
                sums["compared"] += mask.sum().item()
                sums["off"] += gap.sum().item()
                sums["off_max"] = max(sums["off_max"], gap.max().item())
                weights = importance_weights(logps, mu, cap) if cap else None
                sums["clipped"] += ((weights >= cap) & mask).sum().item() if cap else 0
            loss = rloo_loss(logps, mask, A[part], total, weights)
            for v, g in zip(trained, torch.autograd.grad(loss, trained)):
                v.grad = g if v.grad is None else v.grad + g
        sums["loss"] += loss.item()
        sums["tokens"] += mask.sum().item()
        sums["nats"] -= (logps * mask).sum().item()
    return sums
""",
    ),
    (
        (
            "total = total_tokens or sum(len(c) for c in rolled.completions)",
            "total = sum(len(c) for c in rolled.completions)",
        ),
        ("sum(len(c) for c in rolled.completions)", "sum(len(rolled.completions[i]) for i in range(6) if A[i] != 0)"),
        ("A[chosen], total, w", "A[chosen], int(mask.sum()), w"),
        ("A[chosen], total, w", "A[batch], total, w"),
        ("A[chosen], total, w", "A[chosen], total"),
        ("A[chosen], total, w", "A[chosen].abs(), total, w"),
        ("answers, temperature)", "answers)"),
        (
            '            sums["nats"] += -logps[mask].sum().item()\n    return',
            '            sums["nats"] += -logps[mask].sum().item()\n            return',
        ),
        ("batches(lengths, budget):", "[list(range(len(rows)))]:"),
        (
            "            loss.backward()",
            "            [v.__setattr__('grad', None) for v in vectors.values()]\n            loss.backward()",
        ),
        ('sums["loss"] += loss.item()', 'sums["loss"] = loss.item()'),
        ('sums["tokens"] += int(mask.sum())', 'sums["tokens"] += mask.numel()'),
        ('sums["nats"] += -logps', 'sums["nats"] += logps'),
        ("(logps.detach() - sampled).abs()[mask]", "(logps.detach() - sampled)[mask]"),
        ('sums["off_max"] = max(sums["off_max"], off.max().item())', 'sums["off_max"] += off.max().item()'),
        ("importance_weights(logps, sampled, cap)", "importance_weights(logps, sampled, 2.0)"),
        ("importance_weights(logps, sampled, cap)", "importance_weights(sampled, logps, cap)"),
        ("if cap:\n                w = gap", "if True:\n                w = gap"),
        ("gap = (logps - mu).detach()", "gap = logps - mu"),
        ("v.grad = g if v.grad is None else v.grad + g", "v.grad = g"),
        ("if a == 0:\n            continue", "if a == 0:\n            break"),
        ("    for i, a in enumerate(", "    rolled.prompts[0].append(5)\n    for i, a in enumerate("),
    ),
)

ANSWERS["1.6"] = (
    (
        """
def importance_weights(logps, sampled, cap):
    ratio = torch.exp(logps - sampled).detach()
    return torch.minimum(ratio, torch.full_like(ratio, cap))
""",
        """
def importance_weights(logps, sampled, cap):
    with torch.no_grad():
        out = torch.zeros_like(logps)
        for i in range(logps.shape[0]):
            for t in range(logps.shape[1]):
                gap = float(logps[i, t] - sampled[i, t])
                out[i, t] = cap if gap > math.log(cap) else math.exp(gap)
        return out
""",
        """
def importance_weights(logps, sampled, cap):
    gap = logps.detach().sub(sampled)
    return torch.where(gap >= math.log(cap), torch.tensor(float(cap)), gap.exp())
""",
    ),
    (
        ("torch.exp(logps - sampled).detach()", "torch.exp(logps - sampled)"),
        ("torch.exp(logps - sampled).detach()", "(logps.exp() / sampled.exp()).detach()"),
        ("torch.exp(logps - sampled).detach()", "torch.exp(sampled - logps).detach()"),
        ("torch.exp(logps - sampled).detach()", "(logps - sampled).detach()"),
        ("torch.exp(logps - sampled).detach()", "(1 + logps - sampled).detach()"),
        ("torch.exp(logps - sampled).detach()", "torch.exp((logps - sampled).cumsum(1)).detach()"),
        (
            "torch.exp(logps - sampled).detach()",
            "torch.exp((logps - sampled).mean(1, keepdim=True)).detach().expand_as(logps)",
        ),
        ("torch.exp(logps - sampled).detach()", "torch.exp(logps - sampled).detach().clamp(min=1 / cap)"),
        ("torch.minimum(ratio, torch.full_like(ratio, cap))", "ratio"),
        ("torch.minimum(ratio, torch.full_like(ratio, cap))", "torch.minimum(ratio, torch.full_like(ratio, 2.0))"),
        ("torch.minimum(ratio, torch.full_like(ratio, cap))", "torch.where(ratio > cap, 0.0, ratio)"),
        ("torch.minimum(ratio, torch.full_like(ratio, cap))", "torch.where(ratio > cap, 1.0, ratio)"),
        ("torch.minimum(ratio, torch.full_like(ratio, cap))", "torch.maximum(ratio, torch.full_like(ratio, cap))"),
        (
            "torch.minimum(ratio, torch.full_like(ratio, cap))",
            "(lambda r: r / r.mean())(torch.minimum(ratio, torch.full_like(ratio, cap)))",
        ),
        ("gap.exp())", "gap.exp()).half()"),
        ("gap >= math.log(cap)", "gap >= cap"),
        ("    gap = logps.detach().sub(sampled)", "    gap = logps.data.sub_(sampled)"),
    ),
)

ANSWERS["2.1"] = (
    (
        """
@contextmanager
def steer(llm, vectors):
    handles = [decoder_layers(llm)[l].register_forward_hook(lambda m, a, o, s=s: o + s) for l, s in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
""",
        """
@contextmanager
def steer(llm, vectors):
    def adder(s):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (output[0] + s.to(output[0].dtype), *output[1:])
            return output + s.to(output.dtype)
        return hook

    with ExitStack() as stack:
        for place, s in vectors.items():
            module = site_module(llm, place)
            stack.callback(module.register_forward_hook(adder(s)).remove)
        yield llm
""",
        """
class steer:
    def __init__(self, llm, vectors):
        self.llm, self.vectors, self.handles = llm, vectors, []

    def __enter__(self):
        layers = list(decoder_layers(self.llm))
        for l, s in self.vectors.items():
            after = layers[l + 1] if l + 1 < len(layers) else self.llm.get_decoder().norm
            def before(module, args, kwargs, s=s):
                if args:
                    return (args[0] + s, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": kwargs["hidden_states"] + s}
            self.handles.append(after.register_forward_pre_hook(before, with_kwargs=True))

    def __exit__(self, *error):
        while self.handles:
            self.handles.pop().remove()
""",
    ),
    (
        (
            "    try:\n        yield\n    finally:\n        for handle in handles:\n            handle.remove()",
            "    yield",
        ),
        (
            "    try:\n        yield\n    finally:\n        for handle in handles:\n            handle.remove()",
            "    yield\n    for handle in handles:\n        handle.remove()",
        ),
        (
            "        for handle in handles:\n            handle.remove()",
            "        handles[-1].remove() if handles else None",
        ),
        (
            "        for handle in handles:\n            handle.remove()",
            "        handles[0].remove() if handles else None",
        ),
        (
            "        for handle in handles:\n            handle.remove()",
            "        for layer in decoder_layers(llm):\n            layer._forward_hooks.clear()\n            layer.mlp._forward_hooks.clear()",
        ),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o: o + list(vectors.values())[-1]"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: o - s"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: o + s.detach()"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: o[0] + s"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: torch.cat([o[:, :-1], o[:, -1:] + s], 1)"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: torch.cat([o[:, :1], o[:, 1:] + s], 1)"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: o + s / s.norm()"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: o * s"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: o + s if o.shape[1] > 1 else o"),
        ("lambda m, a, o, s=s: o + s", "lambda m, a, o, s=s: (o + s).to(torch.bfloat16).float()"),
        ("decoder_layers(llm)[l]", "decoder_layers(llm)[l - 1]"),
        ("decoder_layers(llm)[l]", "decoder_layers(llm)[int(str(l)[0])]"),
        ("for l, s in vectors.items()]", "for l, s in list(vectors.items())[:1]]"),
        ("decoder_layers(llm)[l].register_forward_hook", "decoder_layers(llm)[l].mlp.register_forward_hook"),
        ("    handles = [", "    vectors[0] = vectors.get(0, torch.zeros(32))\n    handles = ["),
        (
            "return hook\n",
            "return hook\n    for block in decoder_layers(llm):\n        block._forward_hooks.clear(), block.mlp._forward_hooks.clear()\n",
        ),
    ),
)

ANSWERS["2.2"] = (
    (
        """
def site_module(llm, place):
    layer, site, matrix, where = split(place)
    block = decoder_layers(llm)[layer]
    kind = llm.config.model_type
    if site == "end":
        return block.mlp if kind in PRE_NORM else block
    path = SITES_OF[kind].get(site, site)
    try:
        return block.get_submodule(path)
    except AttributeError:
        sys.exit(f"no module {path} in this layer")
""",
        """
def site_module(llm, place):
    text = str(place).split("@")[0]
    parts = text.split(".")
    block = llm.model.layers[int(parts[0])]
    rest = parts[1:]
    lora = bool(rest) and rest[-1].startswith("lora_")
    if lora:
        rest = rest[:-1] or ["mlp", "down_proj"]
    two_norms = hasattr(block, "pre_feedforward_layernorm")
    name = ".".join(rest)
    if name == "":
        return block if llm.config.model_type.startswith("gemma") else block.mlp
    if name == "attention":
        return block.post_attention_layernorm if two_norms else block.self_attn.o_proj
    if name == "input-norm":
        return block.input_layernorm
    if name == "post-attention-norm":
        return block.pre_feedforward_layernorm if two_norms else block.post_attention_layernorm
    for part in rest:
        if not hasattr(block, part):
            raise SystemExit(f"this layer has no {name}")
        block = getattr(block, part)
    return block
""",
        """
def site_module(llm, place):
    match = re.fullmatch(r"(\\d+)(?:\\.(.*?))??(?:\\.?(lora_[AB]))?(?:@(\\w+))?", str(place))
    layer, site, matrix = int(match[1]), match[2] or "", match[3]
    family = llm.config.model_type
    sites = SITES_OF.get(family, SITES)
    if not site and matrix:
        site = "mlp.down_proj"
    if not site:
        return decoder_layers(llm)[layer] if family not in PRE_NORM else decoder_layers(llm)[layer].mlp
    named = dict(decoder_layers(llm)[layer].named_modules())
    if sites.get(site, site) not in named:
        exit(f"{site}: no such site")
    return named[sites.get(site, site)]
""",
    ),
    (
        ("decoder_layers(llm)[layer]\n", "decoder_layers(llm)[layer - 1]\n"),
        ("block.mlp if kind in PRE_NORM else block", "block.mlp"),
        ("block.mlp if kind in PRE_NORM else block", "block"),
        ("block.mlp if kind in PRE_NORM else block", "block.mlp.down_proj if kind in PRE_NORM else block"),
        ("block.mlp if kind in PRE_NORM else block", "block.mlp if kind == 'qwen2' else block"),
        ("SITES_OF[kind].get(site, site)", "SITES.get(site, site)"),
        ("SITES_OF[kind].get(site, site)", "site"),
        ('sys.exit(f"no module {path} in this layer")', "return block"),
        ('sys.exit(f"no module {path} in this layer")', "return None"),
        ('sys.exit(f"no module {path} in this layer")', "raise"),
        ('sys.exit(f"no module {path} in this layer")', "sys.exit()"),
        ("int(parts[0])", "int(text[0])"),
        ('str(place).split("@")[0]', 'place.split("@")[0]'),
        ('str(place).split("@")[0]', "str(place)"),
        ('rest[:-1] or ["mlp", "down_proj"]', 'rest[:-1] or ["mlp"]'),
        ('rest[:-1] or ["mlp", "down_proj"]', '["mlp", "down_proj"]'),
        ('rest[-1].startswith("lora_")', 'rest[-1] == "lora_A"'),
        ("block.post_attention_layernorm if two_norms else block.self_attn.o_proj", "block.self_attn"),
        (
            'two_norms = hasattr(block, "pre_feedforward_layernorm")',
            'two_norms = llm.config.model_type.startswith("gemma")',
        ),
    ),
)

ANSWERS["2.3"] = (
    (
        """
def _add(llm, where, s, B, module, args, h):
    if B is None:
        step = s.to(h.dtype).expand_as(h)
    else:
        step = torch.nn.functional.linear(torch.nn.functional.linear(args[0], s.to(h.dtype)), B.to(h.dtype))
    if where == "answer":
        step = step * llm.answer_positions.unsqueeze(-1)
    return h + step
""",
        """
def _add(llm, where, s, B, module, args, h):
    (x,) = args
    rows = []
    for b in range(h.shape[0]):
        tokens = []
        for t in range(h.shape[1]):
            known = llm.answer_positions if where == "answer" else torch.ones(h.shape[:2], dtype=torch.bool)
            on = known[b if len(known) > 1 else 0, t if known.shape[1] > 1 else 0]
            step = (s if B is None else B @ (s @ x[b, t].float())).to(h.dtype)
            tokens.append(h[b, t] + step if on else h[b, t])
        rows.append(torch.stack(tokens))
    return torch.stack(rows)
""",
        """
def _add(llm, where, s, B, module, args, h):
    if B is not None:
        s = torch.einsum("dr,rf,btf->btd", B, s, args[0].to(B.dtype))
    steered = (h.float() + s).to(h.dtype)
    if where != "answer":
        return steered
    return torch.where(llm.answer_positions[:, :, None], steered, h)
""",
    ),
    (
        ("step = step * llm.answer_positions.unsqueeze(-1)", "pass"),
        ("step = step * llm.answer_positions.unsqueeze(-1)", "step = step * ~llm.answer_positions.unsqueeze(-1)"),
        ("step = step * llm.answer_positions.unsqueeze(-1)", "step = step * llm.answer_positions[0].unsqueeze(-1)"),
        ('if where == "answer":\n', 'if where == "answer" and B is None:\n'),
        (
            'if where == "answer":\n        step',
            'if where == "answer":\n        step = step.clone()\n        step[:, :-1] = 0\n    if False:\n        step',
        ),
        ("return h + step", "h += step\n    return h"),
        ("return h + step", "return h + step.detach()"),
        ("return h + step", "return h - step"),
        ("return h + step", "return step"),
        ("return h + step", "return (h + step).float()"),
        ("return h + step", "return h + step / (1 if B is None else len(s))"),
        ("return h + step", "return h + step * (2 if B is None else 1)"),
        (
            "torch.nn.functional.linear(args[0], s.to(h.dtype))",
            "torch.nn.functional.linear(args[0], s.to(h.dtype)).mean(1, keepdim=True).expand(*h.shape[:2], -1)",
        ),
        (
            "torch.nn.functional.linear(args[0], s.to(h.dtype))",
            "torch.nn.functional.linear(args[0], s.to(h.dtype)).relu()",
        ),
        (
            "torch.nn.functional.linear(args[0], s.to(h.dtype))",
            "torch.nn.functional.linear(args[0], s.to(h.dtype)).sigmoid()",
        ),
        ("s.to(h.dtype).expand_as(h)", "s.expand_as(h)"),
        ("steered = (h.float() + s).to(h.dtype)", "steered = (h.float() + s.detach()).to(h.dtype)"),
        ("args[0].to(B.dtype)", "args[0].to(B.dtype).detach().clone().abs()"),
        (
            'torch.einsum("dr,rf,btf->btd", B, s, args[0].to(B.dtype))',
            'torch.einsum("dr,rf,btf->btd", B.data, s, args[0].to(B.dtype))',
        ),
    ),
)

ANSWERS["2.4"] = (
    (
        """
def pick(logits, temperature, noise=None):
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.float() / temperature, dim=-1)
    passed = p.cumsum(-1) > noise[:, None]
    token = passed.int().argmax(-1)
    return torch.where(passed.any(-1), token, logits.shape[-1] - 1)
""",
        """
def pick(logits, temperature, noise=None):
    if temperature == 0:
        return torch.tensor([row.index(max(row)) for row in logits.tolist()])
    out = []
    for row, u in zip(logits.double() / temperature, noise.tolist()):
        w = (row - row.max()).exp()
        up_to = torch.cumsum(w / w.sum(), 0).tolist()
        out.append(next((v for v, c in enumerate(up_to) if c > u), len(up_to) - 1))
    return torch.tensor(out)
""",
        """
def pick(logits, temperature, noise=None):
    if temperature == 0:
        return logits.max(-1).indices
    edges = (logits.to(torch.float64) / temperature).softmax(-1).cumsum(-1)
    return (edges <= noise.double()[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
""",
    ),
    (
        ("p = torch.softmax(logits.float() / temperature, dim=-1)", "p = torch.softmax(logits / temperature, dim=-1)"),
        (
            "p = torch.softmax(logits.float() / temperature, dim=-1)",
            "p = torch.softmax(logits.float() * temperature, dim=-1)",
        ),
        ("p = torch.softmax(logits.float() / temperature, dim=-1)", "p = torch.softmax(logits.float(), dim=-1)"),
        (
            "p = torch.softmax(logits.float() / temperature, dim=-1)",
            "e = (logits.float() / temperature).exp()\n    p = e / e.sum(-1, keepdim=True)",
        ),
        (
            "p = torch.softmax(logits.float() / temperature, dim=-1)",
            "p = torch.softmax(logits.float() / max(temperature, 1), dim=-1)",
        ),
        (
            "p = torch.softmax(logits.float() / temperature, dim=-1)",
            "p = torch.softmax(logits.float(), dim=-1) ** (1 / temperature)",
        ),
        ("p.cumsum(-1) > noise[:, None]", "p.cumsum(-1) >= noise[:, None]"),
        ("p.cumsum(-1) > noise[:, None]", "p.cumsum(-1) > noise[0]"),
        ("p.cumsum(-1) > noise[:, None]", "p.cumsum(-1) > torch.rand(len(p), 1)"),
        ("p.cumsum(-1) > noise[:, None]", "p.cumsum(-1) < noise[:, None]"),
        ("p.cumsum(-1) > noise[:, None]", "p.cumsum(-1) > 1 - noise[:, None]"),
        ("p.cumsum(-1) > noise[:, None]", "p > noise[:, None]"),
        ("if temperature == 0:\n        return logits.argmax", "if temperature < 1:\n        return logits.argmax"),
        ("p.cumsum(-1)", "p.sort(-1, descending=True).values.cumsum(-1)"),
        (
            "return torch.where(passed.any(-1), token, logits.shape[-1] - 1)",
            "return torch.where(passed.any(-1), token, logits.shape[-1] - 1)[:, None]",
        ),
        (
            "return torch.where(passed.any(-1), token, logits.shape[-1] - 1)",
            "return torch.where(passed.any(-1), token, logits.shape[-1] - 1).float()",
        ),
        ("return torch.where(passed.any(-1), token, logits.shape[-1] - 1)", "return (token - 1).clamp(min=0)"),
        ("logits.to(torch.float64) / temperature", "logits.div_(temperature).double()"),
        (
            "    edges = (logits.to(torch.float64) / temperature).softmax(-1).cumsum(-1)\n    return (edges <= noise.double()[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)",
            "    edges = (logits.float() / temperature).softmax(-1).cumsum(-1) * 0.99999\n    return (edges <= noise[:, None]).sum(-1)",
        ),
        ("logits.max(-1).indices", "torch.multinomial(logits.softmax(-1), 1)[:, 0]"),
    ),
)

ANSWERS["2.5"] = (
    (
        """
def orthogonal(s, basis):
    return s - basis.T @ (basis @ s)
""",
        """
def orthogonal(s, basis):
    out = s.clone()
    for b in basis:
        out = out - torch.dot(out, b) * b
    return out
""",
        """
def orthogonal(s, basis):
    coefficients = torch.linalg.lstsq(basis.T, s[:, None]).solution
    return s - (basis.T @ coefficients).flatten()
""",
    ),
    (
        ("s - basis.T @ (basis @ s)", "s + basis.T @ (basis @ s)"),
        ("s - basis.T @ (basis @ s)", "basis.T @ (basis @ s)"),
        ("s - basis.T @ (basis @ s)", "s - basis.T @ (basis @ s).abs()"),
        ("s - basis.T @ (basis @ s)", "s - 2 * basis.T @ (basis @ s)"),
        ("s - basis.T @ (basis @ s)", "s - basis.T @ (basis @ s) / len(basis)"),
        ("s - basis.T @ (basis @ s)", "s - basis.sum(0) * (basis @ s).sum()"),
        ("s - basis.T @ (basis @ s)", "s - basis.sum(0)"),
        ("s - basis.T @ (basis @ s)", "s - basis[0] * (basis[0] @ s)"),
        ("s - basis.T @ (basis @ s)", "s - basis[-1] * (basis[-1] @ s)"),
        ("s - basis.T @ (basis @ s)", "s - basis.T @ (basis @ s) / s.norm()"),
        ("s - basis.T @ (basis @ s)", "torch.nn.functional.normalize(s - basis.T @ (basis @ s), dim=0)"),
        ("s - basis.T @ (basis @ s)", "(s - basis.T @ (basis @ s)).half().float()"),
        ("s - basis.T @ (basis @ s)", "(s - basis.T @ (basis @ s)).round(decimals=3)"),
        ("    return out", "        return out"),
        ("        out = out - torch.dot(out, b) * b", "        s.sub_(torch.dot(s, b) * b)\n        out = s"),
        ("torch.dot(out, b) * b", "torch.dot(out, b).clamp(min=0) * b"),
        ("torch.dot(out, b) * b", "(out * b) * b"),
        (
            "    return s - (basis.T @ coefficients).flatten()",
            "    return (s - (basis.T @ coefficients).flatten())[None]",
        ),
    ),
)

ANSWERS["3.1"] = (
    (
        """
def read_out(s, U):
    dots = U @ s
    return dots, torch.nn.functional.cosine_similarity(U, s[None], dim=-1)
""",
        """
def read_out(s, U):
    dots, cosines = torch.zeros(len(U)), torch.zeros(len(U))
    for v, u in enumerate(U):
        dots[v] = (u * s).sum()
        size = u.norm() * s.norm()
        cosines[v] = dots[v] / size if size > 0 else 0.0
    return dots, cosines
""",
        """
def read_out(s, U):
    unit = torch.nn.functional.normalize
    return torch.einsum("vd,d->v", U, s), unit(U, dim=1).matmul(unit(s, dim=0))
""",
    ),
    (
        (
            "return dots, torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "return torch.nn.functional.cosine_similarity(U, s[None], dim=-1), dots",
        ),
        (
            "return dots, torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "return torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
        ),
        (
            "return dots, torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "return dots, dots / (U.norm(dim=-1) * s.norm())",
        ),
        (
            "return dots, torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "return dots, dots / (U.norm(dim=-1) + s.norm())",
        ),
        (
            "return dots, torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "return dots, dots / s.norm().clamp(min=1e-9)",
        ),
        (
            "torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "torch.nn.functional.cosine_similarity(U, s[None], dim=-1).abs()",
        ),
        (
            "torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "torch.nn.functional.cosine_similarity(U, s[None], dim=-1).clamp(min=0)",
        ),
        (
            "torch.nn.functional.cosine_similarity(U, s[None], dim=-1)",
            "torch.nn.functional.cosine_similarity(U - U.mean(0), s[None], dim=-1)",
        ),
        ("torch.nn.functional.cosine_similarity(U, s[None], dim=-1)", "dots.softmax(-1)"),
        ("dots = U @ s", "dots = U @ (s - s.mean())"),
        ("dots = U @ s", "dots = U @ (s / s.norm().clamp(min=1e-9))"),
        ("dots = U @ s", "dots = (U @ s).sort(descending=True).values"),
        ("dots = U @ s", "dots = (U @ s) - (U @ s).mean()"),
        ("    dots = U @ s", "    U /= U.norm(dim=-1, keepdim=True).clamp(min=1e-9)\n    dots = U @ s"),
        (
            "dots, cosines = torch.zeros(len(U)), torch.zeros(len(U))",
            "dots, cosines = torch.zeros(len(U) - 1), torch.zeros(len(U) - 1)\n    U = U[:-1]",
        ),
        ("    return dots, cosines", "    return dots.tolist(), cosines.tolist()"),
        ("unit(U, dim=1)", "unit(U, dim=0)"),
    ),
)

ANSWERS["3.2"] = (
    (
        """
def folded(llm, U):
    g = llm.get_decoder().norm(torch.ones(1, U.shape[1]))
    return U * g
""",
        """
def folded(llm, U):
    norm = llm.model.norm
    gain = 1 + norm.weight if "gemma" in llm.config.model_type else norm.weight
    return torch.stack([row * gain for row in U])
""",
        """
def folded(llm, U):
    ones = torch.ones(U.shape[1])
    return U.float() @ torch.diag(llm.model.norm(ones).detach())
""",
    ),
    (
        ("return U * g", "return U.clone()"),
        ("return U * g", "return U * g * g"),
        ("return U * g", "return U / g"),
        ("return U * g", "return U + g"),
        ("return U * g", "return U * g.abs()"),
        ("return U * g", "return U * (g - 1)"),
        ("return U * g", "return U * g.flip(-1)"),
        ("return U * g", "return U * g.mean()"),
        ("return U * g", "U *= g\n    return U"),
        ("return U * g", "return torch.nn.functional.normalize(U * g, dim=-1)"),
        ("return U * g", "return (U * g)[:1]"),
        ("llm.get_decoder().norm(", "llm.model.layers[-1].input_layernorm("),
        ("llm.get_decoder().norm(", "llm.model.layers[-1].post_attention_layernorm("),
        ("    return U * g", "    return llm.get_decoder().norm(U)"),
        ('1 + norm.weight if "gemma" in llm.config.model_type else norm.weight', "norm.weight"),
        (
            '1 + norm.weight if "gemma" in llm.config.model_type else norm.weight',
            '1 + norm.weight if llm.config.model_type == "gemma2" else norm.weight',
        ),
        ("torch.stack([row * gain for row in U])", "torch.stack([row * g for row, g in zip(U, gain)])"),
        ("    norm = llm.model.norm\n", "    norm = llm.model.norm\n    norm.weight.data *= 1.5\n"),
    ),
)

ANSWERS["3.3"] = (
    (
        """
def largest_shifts(llm, vectors, prompts, completions):
    out = []
    for (p0, p1), rows, positions in next_tokens(llm, [{}, vectors], prompts, completions):
        gain, token = (p1 - p0).max(dim=-1)
        for i in range(len(rows)):
            out.append((int(rows[i]), int(positions[i]), int(token[i]), float(gain[i])))
    return out
""",
        """
def largest_shifts(llm, vectors, prompts, completions):
    out = []
    for i, (p, c) in enumerate(zip(prompts, completions)):
        ids = torch.tensor([p + c])
        base = llm(ids).logits[0, len(p) - 1 : -1].softmax(-1)
        with model.steer(llm, vectors):
            steered = llm(ids).logits[0, len(p) - 1 : -1].softmax(-1)
        change = steered - base
        for t, row in enumerate(change):
            token = int(row.argmax())
            out.append((i, t, token, row[token].item()))
    return out
""",
        """
def largest_shifts(llm, vectors, prompts, completions):
    def probabilities(given):
        with model.steer(llm, given):
            h, before = model.read(llm, prompts, completions)
        return model.logits(llm, h[before]).softmax(-1)

    top = (probabilities(vectors) - probabilities({})).topk(1)
    where = [(i, t) for i, c in enumerate(completions) for t in range(len(c))]
    return [(i, t, v, g) for (i, t), v, g in zip(where, top.indices[:, 0].tolist(), top.values[:, 0].tolist())]
""",
    ),
    (
        ("(p1 - p0).max(dim=-1)", "(p0 - p1).max(dim=-1)"),
        ("(p1 - p0).max(dim=-1)", "(p1 - p0).abs().max(dim=-1)"),
        ("(p1 - p0).max(dim=-1)", "(p1.log() - p0.log()).max(dim=-1)"),
        ("(p1 - p0).max(dim=-1)", "(p1 / p0).max(dim=-1)"),
        ("(p1 - p0).max(dim=-1)", "p1.max(dim=-1)"),
        ("(p1 - p0).max(dim=-1)", "((p1 - p0) / p0).max(dim=-1)"),
        ("(p1 - p0).max(dim=-1)", "(p1 - p0).min(dim=-1)"),
        ("[{}, vectors]", "[vectors, vectors]"),
        ("    return out", "        return out"),
        ("int(positions[i])", "int(positions[i]) + 1"),
        ("float(gain[i])", "gain[i]"),
        ("int(token[i])", "token[i]"),
        ("for t, row in enumerate(change):", "for t, row in enumerate(change[:-1]):"),
        ("for t, row in enumerate(change):", "for t, row in enumerate(change.mean(0, keepdim=True)):"),
        ("with model.steer(llm, vectors):", "with model.steer(llm, dict(list(vectors.items())[:1])):"),
        ("out.append((i, t, token", "out.append((t, i, token"),
        ("ids = torch.tensor([p + c])", "p += c[:0] + [5]\n        ids = torch.tensor([p + c])"),
        ("h[before]).softmax(-1)", "h[before]).sigmoid()"),
        ("h[before]).softmax(-1)", "h[before])"),
        ("llm, h[before]", "llm, h[:, -1:].expand_as(h)[before]"),
        ("for t in range(len(c))]", "for t in range(len(c))][::-1]"),
    ),
)

ANSWERS["3.4"] = (
    (
        """
def persistence_of(units, shifts, counts, targets, layers):
    found = []
    for i in range(len(layers)):
        mean = torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)
        found.append((units[:, i].sum(0) @ mean / counts.sum()).item())
    return {"diff_diff": found}
""",
        """
def persistence_of(units, shifts, counts, targets, layers):
    n = sum(float(c) for c in counts)
    values = []
    for i, layer in enumerate(layers):
        mean = [float(sum(shifts[j, i, d] for j in range(len(counts)))) / n for d in range(shifts.shape[2])]
        length = math.sqrt(sum(x * x for x in mean))
        total = 0.0
        for j in range(len(counts)):
            total += sum(float(units[j, i, d]) * mean[d] for d in range(len(mean))) / length
        values.append(total / n)
    return {"diff_diff": values, "diff_diff_authors": None, "diff_vector": None}
""",
        """
def persistence_of(units, shifts, counts, targets, layers):
    W = resampled(len(counts))
    u = torch.einsum("wn,nld->wld", W, units) / (W @ counts)[:, None, None]
    m = torch.nn.functional.normalize(torch.einsum("wn,nld->wld", W, shifts), dim=-1)
    cosines = (u * m).sum(-1)
    return {"diff_diff": [Estimate(c[0].item(), c[1:].numpy()) for c in cosines.T]}
""",
    ),
    (
        ("/ counts.sum()).item()", "/ len(counts)).item()"),
        ("/ counts.sum()).item()", ").item()"),
        ("/ counts.sum()).item()", "/ counts.sum()).abs().item()"),
        ("/ counts.sum()).item()", "/ counts.sum()).clamp(min=0).item()"),
        ("torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)", "shifts[:, i].sum(0) / counts.sum()"),
        (
            "torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)",
            "torch.nn.functional.normalize(units[:, i].sum(0), dim=0)",
        ),
        (
            "torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)",
            "torch.nn.functional.normalize((shifts[:, i] / counts[:, None]).sum(0), dim=0)",
        ),
        (
            "torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)",
            "torch.nn.functional.normalize(shifts[0, i], dim=0)",
        ),
        (
            "torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)",
            "torch.nn.functional.normalize(shifts[:, 0].sum(0), dim=0)",
        ),
        (
            "torch.nn.functional.normalize(shifts[:, i].sum(0), dim=0)",
            "torch.nn.functional.normalize(targets.get(layers[i], shifts[0, i]), dim=0)",
        ),
        ('    return {"diff_diff": found}', '        return {"diff_diff": found}'),
        ('return {"diff_diff": found}', 'return {"diff_diff": found[::-1]}'),
        ('return {"diff_diff": found}', 'return {"diff_diff": [x ** 2 for x in found]}'),
        ("    for i in range(len(layers)):", "    units /= counts[:, None, None]\n    for i in range(len(layers)):"),
        ("for i in range(len(layers)):", "for i in layers:"),
        ("(u * m).sum(-1)", "torch.nn.functional.cosine_similarity(u, m, dim=-1)"),
        ("Estimate(c[0].item(), c[1:].numpy())", "Estimate(c[0].item(), np.full(1000, c[0].item()))"),
    ),
)

ANSWERS["3.5"] = (
    (
        """
def lines_past(layer, s):
    after = layer + 1
    return {"Unmodified": {layer: s}, "Skip-Attn": {f"{after}.attention": s}, "Skip-Layer": {after: s}}
""",
        """
def lines_past(layer, s):
    found = {}
    for name, place in zip(("Unmodified", "Skip-Attn", "Skip-Layer"), (layer, f"{layer + 1}.attention", layer + 1)):
        found[name] = dict([(place, s)])
    return found
""",
        """
def lines_past(layer, s):
    vectors = lambda place: {str(place): s.clone()}
    return dict(
        [("Skip-Layer", vectors(layer + 1)), ("Skip-Attn", vectors(str(layer + 1) + ".attention")),
         ("Unmodified", vectors(layer))]
    )
""",
    ),
    (
        (
            '"Skip-Attn": {f"{after}.attention": s}, "Skip-Layer": {after: s}',
            '"Skip-Layer": {f"{after}.attention": s}, "Skip-Attn": {after: s}',
        ),
        ("after = layer + 1", "after = layer"),
        ("after = layer + 1", "after = layer + 2"),
        ('{f"{after}.attention": s}', '{f"{layer}.attention": s}'),
        ('{f"{after}.attention": s}', '{f"{after}.post-attention-norm": s}'),
        ('{f"{after}.attention": s}', '{f"{after}.input-norm": s}'),
        ('{f"{after}.attention": s}', '{f"{after}.self_attn.o_proj": s}'),
        ('{f"{after}.attention": s}', '{f"{after}.attention": s, layer: s}'),
        ('{f"{after}.attention": s}', '{f"{after}.attention": -s}'),
        ('{f"{after}.attention": s}', '{f"{after % 10}.attention": s}'),
        ('"Skip-Layer": {after: s}', '"Skip-Layer": {after: 2 * s}'),
        ('"Skip-Layer": {after: s}', '"Skip-Layer": {after: s, layer: -s}'),
        ('"Skip-Layer": {after: s}', '"Skip-Layer": {}'),
        ('"Skip-Layer": {after: s}', '"Skip-Block": {after: s}'),
        ('"Unmodified": {layer: s}, ', ""),
        ('"Unmodified": {layer: s}', '"Unmodified": {}'),
        ("    after = layer + 1", "    s /= s.norm().clamp(min=1e-9)\n    after = layer + 1"),
        ("dict([(place, s)])", "dict([(place, s / s.norm())])"),
    ),
)

ANSWERS["3.6"] = (
    (
        """
def block_after(llm, layer):
    layers = model.decoder_layers(llm)
    if layer + 1 >= len(layers):
        sys.exit(f"no block follows layer {layer}")
    block = layers[layer + 1]
    size = block.self_attn.head_dim
    return block, block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size
""",
        """
def block_after(llm, layer):
    blocks = list(llm.model.layers)
    if layer == len(blocks) - 1:
        raise ValueError(f"layer {layer} is the last one")
    return blocks[layer + 1], llm.config.num_attention_heads, llm.config.num_key_value_heads
""",
        """
def block_after(llm, layer):
    depth = llm.config.num_hidden_layers
    assert layer + 1 < depth, f"after layer {layer} of {depth} no block follows"
    block = llm.get_decoder().layers.get_submodule(str(layer + 1))
    attention = block.self_attn
    q, k = (getattr(attention, name).weight.shape[0] for name in ("q_proj", "k_proj"))
    return block, q // attention.head_dim, int(k / attention.head_dim)
""",
    ),
    (
        ("layers[layer + 1]", "layers[layer]"),
        ("layers[layer + 1]", "layers[-1]"),
        ("layers[layer + 1]", "layers[1]"),
        ("block.self_attn.k_proj.out_features // size", "block.self_attn.q_proj.out_features // size"),
        (
            "block.self_attn.k_proj.out_features // size",
            "block.self_attn.q_proj.out_features // block.self_attn.k_proj.out_features",
        ),
        (
            "return block, block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size",
            "return block, block.self_attn.k_proj.out_features // size, block.self_attn.q_proj.out_features // size",
        ),
        (
            "return block, block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size",
            "return block.self_attn, block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size",
        ),
        (
            "return block, block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size",
            "return block, (block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size)",
        ),
        (
            "return block, block.self_attn.q_proj.out_features // size, block.self_attn.k_proj.out_features // size",
            "return block, block.self_attn.q_proj.out_features / size, block.self_attn.k_proj.out_features / size",
        ),
        ("size = block.self_attn.head_dim", "size = llm.config.hidden_size // llm.config.num_attention_heads"),
        ("size = block.self_attn.head_dim", "size = 16"),
        ("block.self_attn.q_proj.out_features // size", "block.self_attn.q_proj.in_features // size"),
        ('        sys.exit(f"no block follows layer {layer}")', "        layer -= 1"),
        ('        sys.exit(f"no block follows layer {layer}")', "        return None, 0, 0"),
        ('        sys.exit(f"no block follows layer {layer}")', "        layer = -1"),
        ('        sys.exit(f"no block follows layer {layer}")', "        sys.exit()"),
        ('    if layer == len(blocks) - 1:\n        raise ValueError(f"layer {layer} is the last one")\n', ""),
    ),
)

ANSWERS["3.7"] = (
    (
        """
def recovery(lost, base, reference=None):
    start = base if reference is None else reference
    top = Estimate.of([[x] for x in start]) - Estimate.of([[x] for x in lost])
    return top / Estimate.of([[x] for x in base])
""",
        """
def recovery(lost, base, reference=None):
    start = np.array(base if reference is None else reference)
    lost, below = np.array(lost), np.array(base)
    value = (start.sum() - lost.sum()) / below.sum()
    rng, draws = np.random.default_rng(7), []
    for _ in range(2000):
        some = rng.integers(0, len(lost), len(lost))
        if below[some].sum() > 0:
            draws.append((start[some].sum() - lost[some].sum()) / below[some].sum())
    return Estimate(float(value), np.array(draws))
""",
        """
def recovery(lost, base, reference=None):
    def mean(parts):
        return Estimate.of([[float(x)] for x in parts])

    if reference is not None:
        return mean(reference) / mean(base) - mean(lost) / mean(base)
    saved = [b - l for b, l in zip(base, lost)]
    return mean(saved) / mean(base)
""",
    ),
    (
        ("start = base if reference is None else reference\n    top", "start = base\n    top"),
        ("/ Estimate.of([[x] for x in base])", "/ Estimate.of([[x] for x in start])"),
        ("/ Estimate.of([[x] for x in base])", "/ Estimate.of([[x] for x in lost])"),
        (
            "Estimate.of([[x] for x in start]) - Estimate.of([[x] for x in lost])",
            "Estimate.of([[x] for x in lost]) - Estimate.of([[x] for x in start])",
        ),
        ("Estimate.of([[x] for x in start]) - Estimate.of([[x] for x in lost])", "Estimate.of([[x] for x in lost])"),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    return (top / Estimate.of([[x] for x in base])).value",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    return Estimate.of([[(s - l) / b if b else 0.0] for s, l, b in zip(start, lost, base)])",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    r = top / Estimate.of([[x] for x in base])\n    return Estimate(max(0.0, r.value), r.draws)",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    r = top / Estimate.of([[x] for x in base])\n    return Estimate(min(1.0, abs(r.value)), r.draws)",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    r = top / Estimate.of([[x] for x in base])\n    return Estimate(r.value, np.full(1000, r.value))",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    r = top / Estimate.of([[x] for x in base])\n    return Estimate(100 * r.value, 100 * r.draws)",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    r = top / Estimate.of([[x] for x in base])\n    return Estimate(float(np.median(r.draws)) + 0.01, r.draws)",
        ),
        (
            "    return top / Estimate.of([[x] for x in base])",
            "    below = Estimate.of([[x] for x in base])\n    return Estimate(top.value / below.value, top.draws / below.value)",
        ),
        (
            "    start = base if reference is None else reference\n    top",
            "    base[:] = [max(x, 0.1) for x in base]\n    start = base if reference is None else reference\n    top",
        ),
        (
            "some = rng.integers(0, len(lost), len(lost))",
            "some = rng.integers(0, len(lost), len(lost))[: max(1, len(lost) // 4)]",
        ),
        ("lost[some].sum())", "lost[rng.integers(0, len(lost), len(lost))].sum())"),
        ("some = rng.integers(0, len(lost), len(lost))", "some = rng.permutation(len(lost))"),
        (
            "if reference is not None:\n        return mean(reference) / mean(base) - mean(lost) / mean(base)",
            "if reference is not None:\n        return mean(lost) / mean(base) - mean(reference) / mean(base)",
        ),
    ),
)

ANSWERS["3.8"] = (
    (
        """
def pair_gain(pair, one, other, whole):
    single = Estimate.largest(one, other)
    return {"share": pair.share(single, whole), "over_single": pair - single, "cross": pair.value >= 0.99 * whole.value}
""",
        """
def pair_gain(pair, one, other, whole):
    best = Estimate(max(one.value, other.value), np.maximum(one.draws, other.draws))
    gain, room = pair - best, whole - best
    share = gain / room
    share.unclear = room.interval[0] <= 0
    return dict(share=share, over_single=gain, cross=bool(pair.value >= 0.99 * whole.value))
""",
        """
def pair_gain(pair, one, other, whole):
    draws = [max(a, b) for a, b in zip(one.draws.tolist(), other.draws.tolist())]
    single = Estimate(one.value if one.value > other.value else other.value, np.array(draws))
    out = {"cross": whole.value * 0.99 <= pair.value}
    out["over_single"] = Estimate(pair.value - single.value, pair.draws - single.draws)
    out["share"] = pair.share(zero=single, whole=whole)
    return out
""",
    ),
    (
        ("Estimate.largest(one, other)", "one"),
        ("Estimate.largest(one, other)", "other"),
        ("Estimate.largest(one, other)", "max(one, other, key=lambda x: x.value)"),
        ("Estimate.largest(one, other)", "min(one, other, key=lambda x: x.value)"),
        ("Estimate.largest(one, other)", "Estimate((one.value + other.value) / 2, (one.draws + other.draws) / 2)"),
        ("Estimate.largest(one, other)", "Estimate(max(one.value, other.value), np.minimum(one.draws, other.draws))"),
        ("pair.share(single, whole)", "pair / whole"),
        ("pair.share(single, whole)", "(pair - single) / whole"),
        ("pair.share(single, whole)", "whole.share(single, pair)"),
        ('"over_single": pair - single', '"over_single": single - pair'),
        ('"over_single": pair - single', '"over_single": pair - whole'),
        (
            '"over_single": pair - single',
            '"over_single": Estimate(pair.value - single.value, np.full(1000, pair.value - single.value))',
        ),
        (
            '"over_single": pair - single',
            '"over_single": Estimate(max(0.0, pair.value - single.value), (pair - single).draws)',
        ),
        ("pair.value >= 0.99 * whole.value", "pair.value >= 0.9 * whole.value"),
        ("pair.value >= 0.99 * whole.value", "pair.value >= whole.value"),
        ("pair.value >= 0.99 * whole.value", "pair.value >= 0.99 * single.value"),
        ("share.unclear = room.interval[0] <= 0", "pass"),
        ("share.unclear = room.interval[0] <= 0", "share.unclear = room.interval[1] <= 0"),
        (
            "best = Estimate(max(one.value, other.value), np.maximum(one.draws, other.draws))",
            "best = Estimate(max(one.value, other.value), np.random.permutation(np.maximum(one.draws, other.draws)))",
        ),
        ("    gain, room = pair - best", "    pair.draws -= best.draws * 0 + 0.001\n    gain, room = pair - best"),
    ),
)

ANSWERS["3.9"] = (
    (
        """
def resamples(n, draws=10_000):
    return np.random.default_rng(42).integers(0, n, (draws, n))
""",
        """
def resamples(n, draws=10_000):
    generator = np.random.RandomState(n)
    return np.stack([generator.choice(n, size=n, replace=True) for _ in range(draws)])
""",
        """
@lru_cache
def resamples(n, draws=10_000):
    g = torch.Generator().manual_seed(1)
    return torch.randint(n, (draws, n), generator=g).numpy()
""",
    ),
    (
        ("np.random.default_rng(42)", "np.random.default_rng()"),
        ("np.random.default_rng(42).integers(0, n, (draws, n))", "np.random.randint(0, n, (draws, n))"),
        ("integers(0, n, (draws, n))", "integers(0, n, (n, draws))"),
        ("integers(0, n, (draws, n))", "integers(0, max(n - 1, 1), (draws, n))"),
        ("integers(0, n, (draws, n))", "integers(0, n + 1, (draws, n))"),
        ("integers(0, n, (draws, n))", "integers(1, n + 1, (draws, n))"),
        ("integers(0, n, (draws, n))", "integers(0, n, (draws, n - 1))"),
        ("integers(0, n, (draws, n))", "integers(0, n, (10_000, n))"),
        ("integers(0, n, (draws, n))", "integers(0, n, (1, n)).repeat(draws, 0)"),
        ("integers(0, n, (draws, n))", "integers(0, n, (draws, n)).astype(float)"),
        (
            "np.random.default_rng(42).integers(0, n, (draws, n))",
            "(np.random.default_rng(42).random((draws, n)) ** 1.2 * n).astype(int)",
        ),
        (
            "np.random.default_rng(42).integers(0, n, (draws, n))",
            "(np.random.default_rng(42).integers(0, n, (1, n)) + np.arange(draws)[:, None]) % n",
        ),
        (
            "np.random.default_rng(42).integers(0, n, (draws, n))",
            "np.clip(np.random.default_rng(42).normal(n / 2, n / 5, (draws, n)), 0, n - 1).astype(int)",
        ),
        (
            "np.random.default_rng(42).integers(0, n, (draws, n))",
            "np.random.default_rng(42).permuted(np.tile(np.arange(n), (draws, 1)), axis=1)",
        ),
        (
            "np.random.default_rng(42).integers(0, n, (draws, n))",
            "(np.random.default_rng(42).random((draws, n)) * n).round().astype(int).clip(0, n - 1)",
        ),
        ("replace=True", "replace=False"),
        ("range(draws)", "range(draws - 1)"),
        (", draws=10_000):\n    generator", ", draws=1_000):\n    generator"),
        ("g = torch.Generator().manual_seed(1)", "g = torch.Generator()\n    g.seed()"),
        (
            "return torch.randint(n, (draws, n), generator=g).numpy()",
            "return torch.randint(n, (draws, n), generator=g)",
        ),
    ),
)

HEAD = """
import math
import re
import sys
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import model
from model import *
"""


def files(number: str) -> list[str]:
    """The three right answers as files of a student."""
    module = FUNCTIONS[number][0]
    return [f"from {module} import *\n{HEAD}\n{text}" for text in ANSWERS[number][0]]


def wrong_files(number: str) -> list[tuple[str, str]]:
    """[(what was edited, file)] of every slip."""
    found = []
    for old, new in ANSWERS[number][1]:
        text = next(text for text in files(number) if old in text)
        found.append((f"{old} -> {new}", text.replace(old, new)))
    return found
