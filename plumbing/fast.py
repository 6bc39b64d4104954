"""
What makes sampling and training fast. No story needs it: everything here gives the same numbers as the plain way.

- The k answers to a prompt share its keys and values, in sampling (AnswerCache) and in training (read_together).
- Training starts at the lowest trained layer, with the states that sampling computed there (starting_at).
- The head keeps a gradient instead of the logits (ChosenLogps).
- Rows are put into micro-batches (batches); layers are computed again in the backward pass (recomputed).

Shapes are those of model.py; H heads, K key-value heads, G = H / K, E the size of a head.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "shared_prompts"  # a name of its own: other models of the process keep transformers' "sdpa"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)


def left_padded(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids of N prompts that end in one column, 1 where they are no padding, positions: (N, P) each."""
    P = max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


class AnswerCache:
    """
    Keys and values while answers are decoded: those of N prompts once, and those of every row's own tokens.

    A row's attention is one softmax over both: softmax(q [K_prompt, K_own]^T) [V_prompt, V_own]. The queries of all
    rows of a prompt are put into one matrix, so that the prompt's keys and values are read once, and not once a row.
    All of it is float32, whatever the model's dtype: bfloat16 scores of a size of 100 would be off by 0.25, and sdpa
    adds up in float32, too.
    """

    def __init__(self, prompts: DynamicCache, mask: torch.Tensor, k: int):
        """prompts: the cache of the prompts' forward pass. mask: (N, P), 0 where they are padded, on the left."""
        self.prompts = [(layer.keys.float(), layer.values.float()) for layer in prompts.layers]  # (N, K, P, E)
        self.own = [torch.empty(2, 0, 0, 0, 0)] * len(self.prompts)  # keys and values (2, rows, K, room, E)
        self.length = [0] * len(self.prompts)  # tokens in it
        self.padding = torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)
        self.place(torch.arange(len(mask), device=mask.device).repeat_interleave(k))

    def place(self, owner: torch.Tensor) -> None:
        """Number the rows of every prompt. owner: (rows,), the prompt of each, in order."""
        self.owner = owner
        self.number = torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)
        self.most = int(self.number.max()) + 1  # rows of one prompt
        self.bias = self.padding[owner, None, None]  # (rows, 1, 1, P), for the scores

    def update(self, key, value, layer: int, *args, **how):
        """Append a token's keys and values, (rows, K, 1, E); returns those of the rows' own tokens, (rows, K, t, E)."""
        own, t = self.own[layer], self.length[layer]
        if t == own.shape[3]:  # room for twice as many: an answer may be long, but few are
            room = key.new_empty(2, *key.shape[:2], max(32, t), key.shape[3], dtype=torch.float32)
            own = self.own[layer] = torch.cat([own[:, : len(key)], room], 3) if t else room
        own, self.length[layer] = own[:, : len(key), :, : t + 1], t + 1
        own[0, :, :, t:], own[1, :, :, t:] = key, value
        return own[0], own[1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.prompts[layer][0].shape[2] + self.length[layer]

    def batch_select_indices(self, alive: torch.Tensor) -> None:
        """Keep these rows, and the prompts that they have."""
        prompts, owner = self.owner[alive].unique(return_inverse=True)
        if len(prompts) < len(self.padding):
            self.prompts = [(key[prompts], value[prompts]) for key, value in self.prompts]
            self.padding = self.padding[prompts]
        self.place(owner)
        for own, t in zip(self.own, self.length):
            if t:
                own[:, : len(alive), :, :t] = own[:, alive, :, :t]

    def attend(self, module, query, key, value, mask, scaling=None, sliding_window=None, **how):
        """query: (rows, H, 1, E), of a token each; key, value: (rows, K, t, E). Returns (rows, 1, H, E), None."""
        prompt_key, prompt_value = self.prompts[module.layer_idx]
        q, P = scaling * query.float().view(*key.shape[:2], -1, key.shape[3]), prompt_key.shape[2]  # (rows, K, G, E)
        scores = torch.cat([self.with_prompts(q, prompt_key.mT) + self.bias, q @ key.mT], -1)
        if sliding_window is not None:  # all prompts end in column P - 1: the last columns are the last tokens
            scores[..., :-sliding_window] = -torch.inf
        weights = scores.softmax(-1)  # (rows, K, G, P + t)
        out = self.with_prompts(weights[..., :P], prompt_value) + weights[..., P:] @ value
        return out.view(len(out), 1, -1, out.shape[-1]).to(query.dtype), None

    def with_prompts(self, x, y):
        """The product of every row's x with its prompt's y: (rows, K, G, a), (N, K, a, b) -> (rows, K, G, b)."""
        together = x.new_zeros(*y.shape[:2], self.most, *x.shape[2:])  # (N, K, most, G, a)
        together[self.owner, :, self.number] = x
        return (together.flatten(2, 3) @ y).unflatten(2, (self.most, -1))[self.owner, :, self.number]


def looks_back(llm) -> bool:
    """Whether every layer attends to all earlier tokens or to the last ones; not if it is recurrent or has chunks."""
    kinds = getattr(llm.config.get_text_config(), "layer_types", None) or ()
    return set(kinds) <= {"full_attention", "sliding_attention"}


def empty_cache(llm) -> DynamicCache:
    """Without the config, so that sliding-window layers keep every position, too; recurrent layers need the config."""
    return DynamicCache() if looks_back(llm) else DynamicCache(config=llm.config)


def plain(llm, cache: DynamicCache) -> bool:
    """Whether a model remembers a text as keys and values alone, and every layer has its own."""
    each = [type(layer) is DynamicLayer and layer.keys.shape == layer.values.shape for layer in cache.layers]
    llm.remembers_keys = looks_back(llm) and each == [True] * llm.config.get_text_config().num_hidden_layers
    return llm.remembers_keys


@torch.no_grad()
def shareable(llm) -> bool:
    """Whether a prompt can be read once for all of its answers, see `plain`. Tried with one token, once for a model."""
    if not hasattr(llm, "remembers_keys"):
        cache, llm.answer_positions = empty_cache(llm), torch.ones(1, 1, device=llm.device)
        llm.get_decoder()(input_ids=torch.tensor([[0]], device=llm.device), past_key_values=cache, use_cache=True)
        llm.answer_positions = None
        plain(llm, cache)
    return llm.remembers_keys


def takes_attention(llm) -> bool:
    """Whether the model is on a CPU, and its attention is a function that can be replaced (now sdpa)."""
    # not on a GPU, where the model's own attention and a copy of the prompt for every row were not measured against it
    replaceable = llm.config._attn_implementation == "sdpa" and type(llm)._can_set_attn_implementation()
    return replaceable and llm.device.type == "cpu"


@contextmanager
def attending(llm, cache: AnswerCache):
    """Inside the context `cache.attend` is the attention of this model, and of no other."""
    before = llm.config._attn_implementation
    AttentionInterface.register(ATTENTION, cache.attend)
    llm.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        llm.config._attn_implementation = before
        AttentionInterface.register(ATTENTION, sdpa_attention_forward)  # lets the cache go


def batches(lengths: list[int], budget: int, prompts: list[list[int]] | None = None) -> list[list[int]]:
    """
    Split rows into batches of at most `budget` tokens, padding included: lists of row numbers, longest rows first.

    A row longer than the budget gets a batch of its own. ([3, 5, 2], 6) -> [[1], [0, 2]]
    prompts: the prompt of every row, if it is read once for all rows of a batch. Then `lengths` are without it.
    """
    prompts, numbers = [tuple(p) for p in prompts or [()] * len(lengths)], {}
    number = [numbers.setdefault(p, len(numbers)) for p in prompts]
    found, there, longest = [], set(), 0  # the batches; the prompts of the last one, and the length of their longest
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], number[i])):
        there, longest = there | {number[i]}, max(longest, len(prompts[i]))
        # the first row of a batch is its longest: what all of its rows are padded to
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) + longest * len(there) <= budget:
            found[-1].append(i)
        else:
            found.append([i])
            there, longest = {number[i]}, len(prompts[i])
    return found


def states_by_row(prompts, completions, fed, entering) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    The states of a batch's forward passes, row by row: of the prompt (P, D) and of the completion's tokens (C - 1, D).

    fed: the rows that were in each pass after the prompts'. entering: (N, P, D), or (B, P, D) where every row reads its
    prompt for itself, then (rows, 1, D) each; is emptied.
    """
    first, k = entering[0], len(completions) // len(prompts)
    each = len(completions) // len(first)  # rows that share the states of a prompt
    later = first.new_zeros(len(completions), len(fed), first.shape[-1])
    for t, (rows, h) in enumerate(zip(fed, entering[1:])):
        later[rows, t] = h[:, 0]
    entering.clear()
    return [(first[i // each, -len(prompts[i // k]) :], later[i, : len(c) - 1]) for i, c in enumerate(completions)]


@contextmanager
def computing(blocks, function):
    """Inside the context, every block computes function(its own forward) instead."""
    for block in blocks:
        block.forward = function(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is visible again


@contextmanager
def starting_at(blocks, layer: int, h: torch.Tensor | None):
    """Inside the context the decoder starts at this one of its blocks with the states h; the lower ones do nothing."""
    if h is None:
        yield
        return
    handle = blocks[layer].register_forward_pre_hook(lambda module, args: (h, *args[1:]))
    with handle, computing(blocks[:layer], lambda forward: lambda x, *args, **how: x):
        yield


def recomputed(blocks):
    """
    Inside the context these layers keep only their input for the backward pass and are computed again there.

    Memory for the activations of one layer instead of all; costs a second forward pass. Not reentrant: the reentrant
    kind drops gradients where no input needs one, and here a layer's only trainable part is in a hook.
    """
    return computing(blocks, lambda forward: partial(checkpoint, forward, use_reentrant=False))


class ChosenLogps(torch.autograd.Function):
    """
    log softmax(z / temperature)[y] of every row, with z = head(h). It keeps the gradient, (rows, D), not the logits.

    A row's log-prob depends on its own state alone, so one backward pass of their sum gives the gradients of all. The
    head runs forward and back once; with `checkpoint` it would run forward twice. d log p_y / dz = (1[y] - p) / T.
    """

    @staticmethod
    def forward(ctx, h, y, head, temperature):
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            z = head(x)  # (rows, V), in the model's dtype
        logps = []
        few = len(z) if z.is_cuda else max(1, (1 << 20) // z.shape[1])  # rows that stay in a CPU's cache
        for part, token in zip(z.detach().split(few), y[:, None].split(few)):
            logp = part.float() if temperature == 1 else part.float() / temperature
            logp = logp.log_softmax(-1)
            logps.append(logp.gather(-1, token))
            p = logp.exp_()
            part.copy_(p.scatter_add_(-1, token, torch.full_like(logps[-1], -1.0)))  # z is read no more: now p - 1[y]
        (slope,) = torch.autograd.grad(z, x, z.detach())
        ctx.save_for_backward(slope / -temperature)
        return torch.cat(logps).flatten()

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None


def read_together(llm, blocks, prompts, completions, layer=0, kept: list | None = None) -> torch.Tensor:
    """
    As `read`, but each prompt is run once for all of its completions.

    Returns the states that predict the completions' tokens, row by row. Gradients flow through the prompt's keys and
    values. blocks: the decoder layers. kept: the states of every row that enter `layer`, see `sample`.
    """
    texts = list(dict.fromkeys(map(tuple, prompts)))  # N of them, each once
    owner = [texts.index(tuple(p)) for p in prompts]
    C = max(2, *map(len, completions)) - 1  # after the last token nothing is predicted
    cache = DynamicCache()
    ids, mask, positions = left_padded(texts, llm.device)
    later = torch.tensor([(c[:-1] + [0] * C)[:C] for c in completions], device=llm.device)  # (B, C)
    given = later_given = None
    if kept is not None:
        given = [kept[owner.index(i)][0] for i in range(len(texts))]
        given = torch.stack([pad(x, (0, 0, ids.shape[1] - len(x), 0)) for x in given])
        later_given = torch.stack([pad(x, (0, 0, 0, C - len(x))) for _, x in kept])

    def run(ids, mask, positions):
        how = dict(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return llm.get_decoder()(input_ids=ids, **how).last_hidden_state

    llm.answer_positions = torch.arange(ids.shape[1], device=llm.device).expand(ids.shape) == ids.shape[1] - 1
    with starting_at(blocks, layer, given):
        last = run(ids, mask, positions)[:, -1:]  # (N, 1, D), of the prompts' last tokens
    owner = torch.tensor(owner, device=llm.device)
    for part in cache.layers[layer:]:
        part.keys, part.values = part.keys.index_select(0, owner), part.values.index_select(0, owner)
    cache.layers[:layer] = [cache.layers[layer]] * layer  # transformers asks the first one how long it is
    llm.answer_positions = torch.ones(1, 1, device=llm.device)
    mask = torch.cat([mask[owner], torch.ones_like(later)], 1)
    with starting_at(blocks, layer, later_given):
        h = run(later, mask, positions[owner, -1:] + 1 + torch.arange(C, device=llm.device))  # (B, C, D)
    lengths = torch.tensor([len(c) for c in completions], device=llm.device)
    return torch.cat([last[owner], h], 1)[torch.arange(C + 1, device=llm.device) < lengths[:, None]]
