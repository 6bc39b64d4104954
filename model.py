"""
The frozen LLM and its steering vectors: load a model, add vectors to its residual stream, sample, score given tokens,
save and load vectors. Nothing here knows about rewards or training. vLLM, the sampler for GPUs: plumbing/vllm.py.

A vector s_l is added to the residual stream at the end of decoder layer l (0-based), at every position, prompt included
(arXiv:2509.06608, Sec. 2). Vectors are a plain dict {place: fp32 tensor}. A place says where a tensor acts:

    27                        the end of layer 27                              (D,)
    "25.attention"            another site of layer 25, see SITES              (D,)
    "25.self_attn.q_proj"     the output of any linear module or layer norm    (its width,)
    "14.lora_A", "14.lora_B"  a LoRA on mlp.down_proj of layer 14              (r, F), (D, r)
    "14.self_attn.o_proj.lora_A", ...lora_B: a LoRA on another linear module of the layer
    "27@answer"               as 27, only at the positions that predict the answer, from the prompt's last token on

Shapes: N prompts, k samples of each, B = N*k rows, P prompt tokens, C completion tokens, T = P + C, D width,
V vocabulary, F width inside the MLP, r rank of a LoRA.
"""

import re
import sys
import zlib
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from data.problems import prompt_checksum, prompt_ids, template_of
from plumbing import fast, memory
from plumbing.bars import Bar, waiting
from plumbing.fast import batches
from plumbing.files import FAMILY, base_checksum, is_gguf, reading, source_of, written
from plumbing.loading import load_config, read_pretrained, resolve
from plumbing.settings import Asking
from plumbing.vllm import VLLM, VLLM_MODELS

# ---------------------------------------------------------------------------------------------------------- the model


@waiting("loading the model")
def load(name: str = "tiny", device: str = "auto", dtype: str = "auto"):
    """
    Load a causal LM, frozen and in eval mode, with its tokenizer: (llm, tokenizer).

    name: "tiny" (the built-in model), a relative of it (FAMILY), a folder in the Hugging Face format, a .gguf file, or
    a hub id.
    """
    device, dtype = resolve(device, dtype, load_config(name))
    logging.disable_progress_bar()  # one bar for every few tensors loaded hides what the program prints
    llm, tokenizer = read_pretrained(name, getattr(torch, dtype))
    llm.config.architectures = [type(llm).__name__]  # files without it are common, vLLM and the exports want it
    check_family(llm.to(device).eval().requires_grad_(False))
    return llm, tokenizer


@torch.no_grad()
def check_family(llm) -> None:
    """Exit with one line for a model that cannot be steered or sampled from here, or whose head `logits` is not."""
    kind, decoder = llm.config.model_type, llm.get_decoder()
    decoder_layers(llm)
    if "past_key_values" not in signature(decoder.forward).parameters or hasattr(decoder, "_setup_cache"):
        sys.exit(f"models of the type {kind} do not keep what they have read in transformers' cache")  # Mamba
    if kind not in SITES_OF:  # of these the tests know the head
        (h, _), ids = read(llm, [[0]], [[1, 2]]), torch.tensor([[0, 1, 2]], device=llm.device)
        theirs = llm(input_ids=ids, use_cache=False).logits.float()
        if (logits(llm, h) - theirs).abs().max() > max(1e-4, 4 * torch.finfo(llm.dtype).eps) * theirs.abs().max():
            sys.exit(f"models of the type {kind} scale their logits in a way that is not known here")


def stop_ids(llm, tokenizer) -> list[int]:
    """Every token that ends an answer: the tokenizer's, generation_config's, and those that end a turn of a chat."""
    ids = llm.generation_config.eos_token_id
    ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
    vocabulary = tokenizer.get_vocab()  # many files name one of several: the end of a text, or that of a turn
    known = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
    ids |= {vocabulary[token] for token in known if token in vocabulary}
    if not ids:
        sys.exit("neither the tokenizer nor generation_config.json of this model names a token that ends an answer")
    return sorted(ids)


def decoder_layers(llm):
    """The decoder layers of a Hugging Face causal LM, a ModuleList; index l is the paper's layer l."""
    lists = [part for part in llm.get_decoder().children() if isinstance(part, torch.nn.ModuleList)]
    found = [part for part in lists if len(part) == llm.config.get_text_config().num_hidden_layers]
    if not found:  # most models call them layers, GPT-2 h, MPT blocks
        sys.exit(f"models of the type {llm.config.model_type} have no list of decoder layers to steer")
    return found[0]


# -------------------------------------------------------------------------------------------------------- the vectors

SITES = {  # names for the modules of a layer whose outputs may get a vector, in the order of the layer
    "input-norm": "input_layernorm",
    "attention": "self_attn.o_proj",  # the same as the residual stream between attention and MLP
    "post-attention-norm": "post_attention_layernorm",
    "end": "mlp",  # the same as the residual stream at the end of the layer
}
NORM_AFTER = SITES | {  # Gemma 2 and 3 normalise the outputs of attention and MLP before they add them
    "attention": "post_attention_layernorm",
    "post-attention-norm": "pre_feedforward_layernorm",
}
PRE_NORM = ("qwen2", "qwen3", "llama", "mistral")  # h += attention(norm(h)); h += mlp(norm(h)), and nothing else
SITES_OF = dict.fromkeys((*PRE_NORM, "gemma"), SITES) | dict.fromkeys(("gemma2", "gemma3_text"), NORM_AFTER)
ON_THE_STREAM = ("end", "attention", "mlp.down_proj", "self_attn.o_proj")  # their outputs are summands of the stream


class Place(NamedTuple):
    layer: int
    site: str  # "end", another name of SITES, or the path of a module inside the layer
    matrix: str  # "lora_A", "lora_B", or "" for a vector
    where: str  # "all" positions, or those that predict the "answer"


def split(place: int | str) -> Place:
    """The parts of a place: 27 -> (27, "end", "", "all"); "14.lora_A" -> (14, "mlp.down_proj", "lora_A", "all")."""
    text, _, where = str(place).partition("@")
    layer, _, site = text.partition(".")
    matrix = next((name for name in ("lora_A", "lora_B") if site.endswith(name)), "")
    site = site.removesuffix(matrix).rstrip(".")
    return Place(int(layer), site or ("mlp.down_proj" if matrix else "end"), matrix, where or "all")


def lowest_trained(vectors: dict) -> int:
    """The lowest layer with a vector that is trained, -1 if all weights are: below it nothing is differentiated."""
    return min((split(place).layer for place, s in vectors.items() if s.requires_grad), default=-1)


def site_module(llm, place):
    """
    The module whose output gets the vector of a place; exits with a line if the layer has none.

    At the end of a layer of a pre-norm model it is the MLP, so that an engine, which has only the bias of
    `mlp.down_proj`, rounds alike. Other models scale or normalise the MLP's output: there it is the whole layer.
    """
    layer, site, matrix, _ = split(place)
    block, kind = decoder_layers(llm)[layer], llm.config.model_type
    if site == "end" and kind not in PRE_NORM:
        return block
    if site in SITES:
        if kind not in SITES_OF:
            known = ", ".join(SITES_OF)
            sys.exit(f"the site {site} is known for {known}, not for {kind!r}; the end of a layer fits any model")
        site = SITES_OF[kind][site]
    inside = dict(block.named_modules())
    if site not in inside:
        linear = (name for name, module in inside.items() if isinstance(module, torch.nn.Linear))
        names = ", ".join([*SITES, *linear])
        sys.exit(f"a layer of this model has no {site!r}; sites are {names}")
    linear = isinstance(inside[site], torch.nn.Linear)
    if matrix and not linear:
        sys.exit(f"a LoRA goes on a linear module, for example self_attn.o_proj; {site} is none")
    if not (linear or site == "mlp" or site.endswith("layernorm")):
        sys.exit(f"a vector goes after a linear module, a layer norm or the mlp; {site} is none of them")
    return inside[site]


@contextmanager
def hooks(pairs, whole=False):
    """
    Inside the context, every function of [(module, function), ...] is a forward hook of its module.

    function(module, args, output) returns what takes the place of the output, or None. Some families' layers return a
    tuple: without `whole` its first entry, the states, stands for it.
    """

    def hook(function, module, args, output):
        if whole or not isinstance(output, tuple):
            return function(module, args, output)
        h = function(module, args, output[0])
        return None if h is None else (h, *output[1:])

    with ExitStack() as handles:  # removes them on errors too, or the next call in a notebook is silently steered
        for module, function in pairs:
            handles.enter_context(module.register_forward_hook(partial(hook, function)))
        yield


@contextmanager
def steer(llm, vectors: dict):
    """
    Inside the context, the residual stream after decoder layer l is h_l + s_l at every position. vectors: {l: (D,)}.

    Other places add theirs to the output of their module. A LoRA adds B A x, x the input of its module: for r = 1 the
    vector B[:, 0] times every token's own number A x (arXiv:2505.18706, App. D, with alpha = r).
    A place with "@answer" acts where `sample` and `read`, which know where the answer begins, say so.
    """
    pairs = []
    for place, s in vectors.items():
        at, B = split(place), None
        if at.matrix == "lora_B":
            continue  # goes with its A
        if at.matrix == "lora_A":
            B = vectors[str(place).replace("lora_A", "lora_B")].to(llm.device)
        module = site_module(llm, place)
        wanted = getattr(module, "in_features" if at.matrix else "out_features", s.shape[-1])
        if s.shape[-1] != wanted:
            sys.exit(f"the vector at {place} has {s.shape[-1]} numbers; {wanted} fit there")
        pairs.append((module, partial(_add, llm, at.where, s.to(llm.device), B)))
    with hooks(pairs):
        yield


def _add(llm, where, s, B, module, args, h):
    """h + s, or with a LoRA's A as s and its B: h + B A x. h: (B, T, D), x: (B, T, F)."""
    if B is None:
        added = s.to(h.dtype)  # s itself stays fp32: small Adam steps vanish in bf16
    else:
        added = (args[0] @ s.to(h.dtype).T) @ B.to(h.dtype).T
    if where == "answer":  # (B, T), True there, or (1, 1) while an answer is decoded
        mask = getattr(llm, "answer_positions", None)
        known = mask is not None and mask.shape in (h.shape[:2], (1, 1))
        assert known, "@answer works in model.sample and model.read only"
        added = added * mask.to(h.dtype)[..., None]
    return h + added  # not +=, another hook may hold h


@torch.no_grad()
def residual_rms(llm, prompts: list[list[int]], places: list) -> dict:
    """
    The size of what is steered: {place: median over tokens of sqrt(mean of h^2)}.

    h is the residual stream after layer l where a summand of it is steered, else the output of the module.
    For a LoRA's A it is the module's input.
    The median, because the first token of most LLMs is an attention sink with a hundred times the norm of others.
    """
    found, pairs = {place: [] for place in places}, []

    def keep(place, module, args, h):
        x = args[0] if split(place).matrix == "lora_A" else h
        found[place].append(x.float().pow(2).mean(-1).sqrt().flatten())  # x: (1, P, D or F)

    for place in places:
        layer, site, matrix, _ = split(place)
        module = site_module(llm, place)
        if site in ON_THE_STREAM and matrix != "lora_A":
            module = decoder_layers(llm)[layer]
        pairs.append((module, partial(keep, place)))
    with hooks(pairs):
        for ids in Bar(prompts, desc="size of the stream", unit="prompts"):
            llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    return {place: torch.cat(sizes).median().item() for place, sizes in found.items()}


# ----------------------------------------------------------------------------------------------------------- sampling


def prompt_seeds(seed: int, numbers) -> list[int]:
    """A seed for each of the prompts with these numbers: a hash of 32 bits, torch's CPU generator takes no more."""
    return [zlib.crc32(f"{seed}:{i}".encode()) for i in numbers]


@torch.no_grad()
def sample(
    llm, prompts: list[list[int]], k: int, max_tokens: int | list[int], stop: list[int], temperature=1.0,
    seed: int | list[int] = 0, max_rows=512, bar="sampling", keep: int | None = None,
) -> tuple:  # fmt: skip
    """
    Sample k completions of every prompt from the model as it is (call inside `steer` to steer it).

    max_tokens: longest completion, one number or one for each prompt.
    stop: token ids that end a completion and belong to it.
    temperature: 0 decodes greedily, token for token as `generate`.
    seed: one number, or one for each prompt. A prompt's answers depend on its own seed alone, not on the batch it is
    in (up to rounding).
    max_rows: rows decoded at once, fewer if memory is short, but all k of a prompt. bar: what the progress bar says.
    Returns N*k completions as token ids, prompt by prompt, and for each whether it ended by itself.
    keep: a layer; a third list has the states that enter it, if they can be had, for every completion those of its
    prompt (P, D) and of its tokens but the last (C - 1, D).
    Faster than `generate`: a prompt is read once for its k samples, and finished rows leave the batch.
    """
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    seeds = seed if isinstance(seed, list) else prompt_seeds(seed, range(len(prompts)))
    assert temperature >= 0 and k >= 1 and min(limits) >= 1, (temperature, k, min(limits))
    row = memory.cache_bytes(llm.config, 4 if llm.device.type == "cpu" else llm.dtype.itemsize)  # of a token
    row *= max(map(len, prompts)) + max(limits)  # should its answer be as long as it may
    max_rows = min(max_rows, int(0.7 * memory.free(llm.device) / row))
    completions, states, entering, n = [], [], [], max(1, max_rows // k)  # entering: in each forward pass of a batch

    def see(module, args, output):
        if not isinstance(output, tuple):  # layers that return tuples are not skipped later, so nothing is kept
            entering.append(args[0])

    seen = [] if keep is None else [(decoder_layers(llm)[keep], see)]
    bar = Bar(total=len(prompts) * k, desc=bar, unit="answers")
    try:
        for i in range(0, len(prompts), n):
            batch, bar.later = slice(i, i + n), k * sum(limits[i + n :])
            with hooks(seen, whole=True):
                rows, fed = _decode(llm, prompts[batch], k, limits[batch], stop, temperature, seeds[batch], bar)
            completions += rows
            if entering:
                states += fast.states_by_row(prompts[batch], rows, fed, entering)
    finally:
        bar.close()
        llm.answer_positions = None  # after Ctrl-C, too: nothing else may take them for its own
    found = completions, [row[-1] in stop for row in completions]
    return (*found, states) if states else found


def _decode(llm, prompts, k, limits, stop, temperature, seeds, bar):
    """One batch of `sample`: the completions of its B = N*k rows, and the rows of every forward pass."""
    device, B, P, C = llm.device, len(prompts) * k, max(map(len, prompts)), max(limits)
    copies = k if fast.looks_back(llm) else 1  # states are not copied from row to row: there a prompt is read k times
    ids, mask, positions = fast.left_padded([p for p in prompts for _ in range(k // copies)], device)
    # a uniform number for every token to come, (C, B); time first, so that a longer limit leaves the first ones alone
    noise = torch.cat([uniform(seed, C, k) for seed in seeds], 1).to(device)
    cache = fast.empty_cache(llm)

    def forward(ids, mask, positions):  # (rows, new tokens), ... -> (rows, V)
        how = dict(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        h = llm.get_decoder()(input_ids=ids, **how).last_hidden_state[:, -1]  # never (N, P, V)
        return logits(llm, h, dtype=None)

    llm.answer_positions = torch.arange(P, device=device).expand(ids.shape) == P - 1  # for "@answer", here and below
    scores = forward(ids, mask, positions).repeat_interleave(copies, 0)
    llm.answer_positions = torch.ones(1, 1, device=device)
    length = mask.sum(1, keepdim=True).repeat_interleave(copies, 0)  # (B, 1) of the row's prompt
    shared = fast.plain(llm, cache) and fast.takes_attention(llm)
    if shared:
        cache = fast.AnswerCache(cache, mask, k)
    elif copies > 1:  # a copy of the prompt for every row
        cache.batch_repeat_interleave(copies)
    mask = torch.cat([mask.repeat_interleave(copies, 0), mask.new_ones(B, C)], 1)  # (B, P + C)
    limit = torch.tensor(limits, device=device).repeat_interleave(k)
    ends = torch.tensor(stop, dtype=torch.long, device=device)
    tokens, count = torch.zeros(B, C, dtype=torch.long, device=device), torch.zeros_like(limit)
    going = torch.ones(B, dtype=torch.bool, device=device)  # neither ended nor at its limit
    rows, fed, idle = torch.arange(B, device=device), [], 0  # those still in the batch; in every forward pass
    unfinished = B
    with fast.attending(llm, cache) if shared else nullcontext():
        for t in range(C):
            tokens[rows, t] = token = pick(scores, temperature, noise[t, rows])
            count += going
            going[rows] &= ~torch.isin(token, ends) & (t + 1 < limit[rows])
            alive = going[rows].nonzero().flatten()
            bar.answered(unfinished, unfinished - len(alive), len(alive) * (C - t - 1))
            unfinished = len(alive)
            if len(alive) == 0:
                break
            idle += len(rows) - len(alive)  # rows that were run for nothing, since the last time that any left
            if idle > MOVING * len(rows) and fast.looks_back(llm):
                cache.batch_select_indices(alive)
                rows, idle = rows[alive], 0
            fed.append(rows)
            scores = forward(tokens[rows, t : t + 1], None if shared else mask[rows, : P + t + 1], length[rows] + t)
    return [row[:n] for row, n in zip(tokens.tolist(), count.tolist())], fed


MOVING = 0.25  # taking ended rows out of the cache costs so many forward passes: they stay until they cost as much


def uniform(seed: int, *shape: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) of 48 random bits, float64: from float32's 24 bits rare tokens get none or too many."""
    high, low = (torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in (seed, seed ^ 0x5A5A5A5A))
    return high.double() + low.double() * 2**-24


@torch.no_grad()
def pick(logits: torch.Tensor, temperature: float, noise: torch.Tensor | None = None, width=512) -> torch.Tensor:
    """
    Draw a token a row from softmax(logits / temperature), the argmax at temperature 0. (B, V) -> (B,)

    noise: (B,), uniform in [0, 1): the token where the cumulative probability passes it.
    The sums are float64: float32 sums over 152k tokens would skip many of them. They run over blocks of `width` tokens
    first, then inside the block that was found. That takes a third of the time of one sum over all tokens.
    """
    if temperature == 0:
        return logits.argmax(-1)
    found, V = [], logits.shape[-1]
    rows = max(8, (1 << 20) // V)  # as many at a time as stay in the processor's cache
    for x, u in zip(logits.split(rows), noise.double().split(rows)):
        p = x.new_zeros(len(x), -(-V // width) * width, dtype=torch.float32)
        torch.exp((x.float() - x.amax(-1, keepdim=True)) / temperature, out=p[:, :V])
        p = p.unflatten(-1, (-1, width))  # (rows, blocks, width), up to a factor
        up_to = p.sum(-1, dtype=torch.float64).cumsum(-1)
        u = u[:, None] * up_to[:, -1:]
        block = torch.searchsorted(up_to, u, right=True).clamp(max=up_to.shape[1] - 1)
        u = u - pad(up_to, (1, 0)).gather(1, block)  # what is left of it inside the block
        inside = p[torch.arange(len(p)), block[:, 0]].cumsum(-1, dtype=torch.float64)
        u = torch.minimum(u, inside[:, -1:] * (1 - 2**-52))  # rounding: never beyond the last possible token
        found.append(block * width + torch.searchsorted(inside, u, right=True))
    return torch.cat(found).flatten()


class Rollouts(NamedTuple):
    """k answers to each of N problems, in B = N*k rows, prompt by prompt."""

    prompts: list[list[int]]  # token ids of the row's prompt, a forced beginning of the answer included
    completions: list[list[int]]  # token ids of the row's answer, with the token that ended it
    ended: list[bool]  # False: cut off at its limit
    texts: list[str]  # the answers as text, a forced beginning included
    logps: list[list[float]] | None  # of every completion token, as vLLM computed them; None from the HF sampler
    states: list | None = None  # what `sample` kept of every row; None if nothing was to be kept, or too much


# ---------------------------------------------------------------------------------------------------- token log-probs


def read(llm, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Run the decoder on B given texts: (h, before).

    h: (B, T, D) after the final norm. before: (B, T), True at the positions that predict the completions' tokens:
    t - 1 predicts token t. So h[before] is (completion tokens, D), row by row.
    """
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    T = max(map(len, rows))
    # right-padded: a causal model never looks ahead, so no attention mask is needed
    ids = torch.tensor([r + [0] * (T - len(r)) for r in rows], device=llm.device)
    before = torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        before[i, len(p) - 1 : len(p) + len(c) - 1] = True
    llm.answer_positions = before = before.to(llm.device)  # stays: a backward pass may compute a layer again
    return llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, before


def logits(llm, h: torch.Tensor, exact=False, rows=16384, dtype=torch.float32) -> torch.Tensor:
    """
    The logits of states after the final norm: h (..., D) -> (..., V), fp32, since sums over many tokens follow.

    exact: the product is fp32, too, so that the small difference between two bf16 states is not lost; `rows` rows of
    the head are converted at a time, never all of it. Otherwise the product has the model's own dtype, as in the
    sampler: training wants the log-probs of the distribution that was sampled from. dtype: None for the model's own.
    """
    head, config = llm.get_output_embeddings(), llm.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)  # Cohere; Granite
    shape, h = h.shape[:-1], h.reshape(-1, h.shape[-1]).contiguous()  # else torch copies a frozen head for every prompt
    if exact:
        x = torch.cat([h.float() @ part.float().T for part in head.weight.split(rows)], -1)
    else:
        x = h @ head.weight.T
        x = x if dtype is None else x.to(dtype)
    x = x if head.bias is None else x + head.bias.to(x.dtype)
    x = x if scale == 1 else x * scale
    x = x if cap is None else cap * torch.tanh(x / cap)
    return x.view(*shape, -1)


def token_logps(llm, prompts: list, completions: list, temperature=1.0, chunk=None, share=False, states=None):
    """
    log pi(y_t | x, y_<t) in nats of every completion token, as the sampler at this temperature draws it.

    Returns (logps, mask), both (B, C), C the longest completion. mask is True on real tokens: it comes from the
    lengths, so the stop token counts. logps is 0 elsewhere.
    Differentiable with respect to vectors of an enclosing `steer`.
    share: read a prompt once for all of its rows. states: (layer, what `sample` kept of every row), to start there.
    The head runs on completion positions only, `chunk` at a time: neither (B, T, V) nor (B, C, V) ever exists.
    """
    layer, kept = states or (0, None)
    if share:
        h = fast.read_together(llm, decoder_layers(llm), prompts, completions, layer, kept)
    else:  # of the last token no state is known, and none is needed
        given = kept and pad_sequence([torch.cat([*parts, parts[0][:1]]) for parts in kept], batch_first=True)
        with fast.starting_at(decoder_layers(llm), layer, given):
            h, before = read(llm, prompts, completions)
        h = h[before]
    target = torch.tensor([token for c in completions for token in c], device=h.device)
    head = llm.get_output_embeddings().weight

    def score(x, y):  # (chunk, D), (chunk,) -> (chunk,)
        return (logits(llm, x) / temperature).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)

    chunk, logps = chunk or memory.head_rows(len(head), llm.device), []
    for x, y in zip(h.split(chunk), target.split(chunk)):
        if head.requires_grad:  # its own gradient needs the logits again
            logps.append(checkpoint(score, x, y, use_reentrant=False))
        elif torch.is_grad_enabled() and x.requires_grad:
            logps.append(fast.ChosenLogps.apply(x, y, partial(logits, llm, dtype=None), temperature))
        else:
            logps.append(score(x, y))
    lengths = torch.tensor([len(c) for c in completions], device=h.device)
    mask = torch.arange(lengths.max(), device=h.device) < lengths[:, None]
    return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, torch.cat(logps)), mask


def micro_batches(
    llm, vectors: dict, rolled: Rollouts, rows: list[int], budget: int, temperature=1.0,
    recompute="auto", read_once="auto",
):  # fmt: skip
    """
    The log-probs of answers under these vectors, a micro-batch at a time: (numbers of its rows, logps, mask).

    vectors: {} for the base model. rows: those to run, of all in `rolled`; the longest come first. budget: tokens of a
    micro-batch, at most. recompute, read_once: see memory.plan. logps, mask: see token_logps.
    The vectors are in the model until the next micro-batch is taken, so run the backward pass inside the loop.
    """
    lowest, lengths = lowest_trained(vectors), [(len(rolled.prompts[i]), len(rolled.completions[i])) for i in rows]
    share, recompute, budget = memory.plan(llm, lowest, lengths, budget, recompute, read_once)
    prompts = [rolled.prompts[i] for i in rows] if share else None
    blocks = decoder_layers(llm)[lowest + 1 :] if recompute else []  # in those below autograd stores nothing
    with steer(llm, vectors), fast.recomputed(blocks):
        found = batches([c if share else p + c for p, c in lengths], budget, prompts)
        for batch in Bar(found, desc="training", unit="micro-batches"):
            batch = [rows[j] for j in batch]
            states = None if rolled.states is None or lowest < 0 else (lowest, [rolled.states[i] for i in batch])
            texts = [rolled.prompts[i] for i in batch], [rolled.completions[i] for i in batch]
            yield batch, *token_logps(llm, *texts, temperature, share=share, states=states)


# --------------------------------------------------------------------------------------------------- how it is asked


@dataclass(kw_only=True)
class Subject(Asking):
    """A model under test and how it is asked. It is loaded when it is first needed; `key` needs its files alone."""

    name: str
    holds: dict = field(default_factory=dict)  # vectors that it will be given: vLLM makes room for them when it starts
    folder: Path = Path("out/answers")  # where evaluate.py keeps its answers

    def __post_init__(self):
        self.config = load_config(self.name)
        self.device, self.dtype = resolve(self.device, self.dtype, self.config)
        longest = getattr(self.config, "max_position_embeddings", None) or 32768  # some families have no limit
        self.context = min(self.context or 32768, longest)  # 32K: the papers'
        if self.max_tokens is None and self.name in FAMILY:
            self.max_tokens = 80
        self.wanted_weights = self.loaded_weights = self.name
        self.started = None  # vLLM

    @classmethod
    def of_run(cls, config: dict, args: Asking, **more) -> "Subject":
        """The model of a run, asked as its config.json says; settings that are given in args go first."""
        how = {name: config.get(name) for name in ("template", "system", "max_tokens")}  # its context is for training
        how |= {"name": config["model"], "dtype": config.get("dtype", "auto")}
        given = {one.name: getattr(args, one.name) for one in fields(Asking)}
        return cls(**(how | {name: value for name, value in given.items() if value not in (None, "auto")} | more))

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    @property
    def samples_with(self) -> str:
        """ "hf", or "vllm"; exits with a line where vLLM cannot hold the vectors. auto: vLLM where all suits it."""
        if self.sampler == "auto":
            here = self.device.startswith("cuda") and find_spec("vllm") and not is_gguf(self.name)
            fits = here and self.config.architectures[0] in VLLM_MODELS and all(map(engine_site, self.holds))
            return "vllm" if fits else "hf"
        if self.sampler == "vllm":
            engine_tensors(self.holds)  # exits for a vector that is none of vLLM's
            if is_gguf(self.name):
                sys.exit("--sampler vllm: vLLM reads no .gguf file; use --sampler hf")
        return self.sampler

    @property
    def key(self) -> dict:
        """What its answers depend on, from files alone. Of a hub model the commit stands for the weights."""
        names = ("name", "template", "system", "context", "max_tokens", "dtype")
        weights = base_checksum(self.wanted_weights)
        also = {"weights": weights, "prompts": prompt_checksum(source_of(self.name)), "sampler": self.samples_with}
        return {name: getattr(self, name) for name in names} | also

    @cached_property
    def loaded(self) -> tuple:
        return load(self.name, self.device, self.dtype)

    @property
    def tokenizer(self):
        return self.loaded[1]

    @property
    @torch.no_grad()
    def llm(self):
        llm = self.loaded[0]
        if self.loaded_weights != self.wanted_weights:
            other = dict(load(self.wanted_weights, str(llm.device), self.dtype)[0].named_parameters())
            for name, weight in llm.named_parameters():
                weight.copy_(other[name])
            self.loaded_weights = self.wanted_weights
            if self.started is not None:
                self.started.push_weights(llm)
        return llm

    def free(self) -> None:
        """Let the model and the engine go, so that another one has room."""
        vars(self).pop("loaded", None)
        if self.started is not None:
            self.started.close()  # gives back, too, what torch keeps of the model's memory
        self.started = None

    @property
    def form(self) -> str:
        """Where the prompt asks for the answer, one of rewards.FORMS: r1 asks for a tag, the others for a box."""
        template = self.template or template_of(self.tokenizer)
        return "answer" if template == "r1" else "box"

    def swap(self, name: str) -> None:
        """Take the weights of another model of the same shape (a run's of --method full) when they are next needed."""
        self.wanted_weights = name

    def forced(self, prefix: str | list[int]) -> list[int]:
        """Token ids of what an answer is made to begin with: a text, or these very ids, which a text may not give."""
        text = prefix and isinstance(prefix, str)
        return self.tokenizer(prefix, add_special_tokens=False).input_ids if text else prefix

    def prompt(self, row: dict, prefix: str | list[int] = "") -> list[int]:
        """Token ids of a problem as it is asked here, and of what the answer is made to begin with."""
        return [*prompt_ids(self.tokenizer, row["problem"], self.system, self.template), *self.forced(prefix)]

    def room(self, prompt: list[int], context: int | None = None) -> int:
        """Tokens that an answer may have. context: of these answers, default the subject's; max_tokens counts too."""
        context = context or self.context
        if context <= len(prompt):
            sys.exit(f"--context {context}: a prompt has {len(prompt)} tokens and leaves no room for an answer")
        return min(self.max_tokens or context, context - len(prompt))

    def engine(self, rows: list[dict]) -> VLLM | None:
        """The vLLM engine, tested on the first problems; None where the model itself samples."""
        if self.started is None and self.samples_with == "vllm":
            llm = self.loaded[0]
            ranks = [s.shape[0] for place, s in self.holds.items() if split(place).matrix == "lora_A"]
            how = dict(tensor_parallel=self.tensor_parallel, max_rows=self.rows, lora_rank=max(ranks, default=0))
            self.started = VLLM(self.name, llm, self.context, self.vllm_memory, **how)
            prompts = [prompt for row in rows[:8] if len(prompt := self.prompt(row)) + 32 < self.context]
            test_engine(self.started, llm, prompts)
        return self.started

    def rollouts(
        self, vectors: dict, rows: list[dict], k: int, temperature=1.0, seed: int | list[int] = 0,
        prefix: str | list[int] = "", context: int | None = None, keep: int | None = None, bar="sampling",
    ) -> Rollouts:  # fmt: skip
        """
        k answers to each problem, of the model with these vectors, {} for the base: by `sample` or by vLLM.

        seed: as for `sample`. prefix: what every answer is made to begin with, see `forced`. context: see `room`. keep:
        see `sample`.
        """
        if not rows:  # of several processes, some may have none
            return Rollouts([], [], [], [], None)
        llm, engine = self.llm, self.engine(rows)
        prompts = [self.prompt(row, prefix) for row in rows]
        limits = [self.room(prompt, context) for prompt in prompts]
        seeds = seed if isinstance(seed, list) else prompt_seeds(seed, range(len(prompts)))
        stop, logps, states = stop_ids(llm, self.tokenizer), None, []
        if engine is not None:
            tensors = engine_tensors(vectors)
            completions, ended, logps = engine.sample(tensors, prompts, k, limits, stop, temperature, seeds, bar)
        else:
            how = temperature, seeds, self.rows, bar, keep
            with steer(llm, vectors):
                completions, ended, *states = sample(llm, prompts, k, limits, stop, *how)
        forced = self.forced(prefix)  # decoded in one with the rest: SentencePiece drops a text's first space
        texts = self.tokenizer.batch_decode([[*forced, *c] for c in completions], skip_special_tokens=True)
        return Rollouts([p for p in prompts for _ in range(k)], completions, ended, texts, logps, *states)


def engine_site(place) -> str | None:
    """Which of vLLM's tensors holds a place: "end", "attention", "lora_A", "lora_B", or None."""
    _, site, matrix, where = split(place)
    if where != "all":
        return None
    if matrix:
        return matrix if site == "mlp.down_proj" else None
    sites = {"end": "end", "mlp.down_proj": "end", "attention": "attention", "self_attn.o_proj": "attention"}
    return sites.get(site)


def engine_tensors(vectors: dict) -> dict:
    """{place: tensor} as vLLM takes them: {(site, layer): tensor}. Two vectors at one of its biases are added."""
    found = {}
    for place, s in vectors.items():
        if (at := (engine_site(place), split(place).layer))[0] is None:
            sys.exit(f"--sampler vllm: a vector at {place} is no bias of vLLM's layers; use --sampler hf")
        found[at] = found[at] + s if at in found else s
    return found


def test_engine(engine: VLLM, llm, prompts: list[list[int]]) -> dict[str, float]:
    """Compare a vLLM engine with the model under a large random vector at every place that it has; see self_test."""
    draw, vectors = torch.Generator().manual_seed(0), {}
    for site, (depth, *shape) in engine.shapes.items():
        for place, size in residual_rms(llm, prompts[:2], [f"{l}.{site}" for l in range(depth)]).items():
            scale = 1 / (size * shape[-1] ** 0.5) if site == "lora_A" else 0.2 * size  # A x has size 1
            vectors[place] = scale * torch.randn(shape, generator=draw)

    @torch.no_grad()
    def log_probs(steered: bool, prompts, completions):
        with steer(llm, vectors if steered else {}):
            logps, mask = token_logps(llm, prompts, completions)
        return logps[mask]

    return engine.self_test(engine_tensors(vectors), prompts, log_probs, llm.dtype == torch.float32)


# -------------------------------------------------------------------------------------------------------- their files


def metadata_of(vectors: dict, config, model: str, step) -> dict[str, str]:
    """What a file of vectors says about itself, and what is exported from it. config: of the model."""
    places = [split(place) for place in vectors]
    sites = {"lora" if place.matrix else place.site for place in places}
    return {
        "operation": "add",  # to the output of the site; a LoRA adds B A x, x its input
        "layers": ", ".join(map(str, sorted({place.layer for place in places}))),
        "layer_numbers": "0-based; the end of layer is the output of the decoder layer",
        "site": ", ".join(sorted(sites)).replace("end", "end of layer"),
        "positions": ", ".join(sorted({place.where for place in places})),  # answer: from the prompt's last token on
        "model": model,
        "model_checksum": base_checksum(model),
        "width": str(config.hidden_size),
        "num_layers": str(config.num_hidden_layers),
        "step": str(step),
    }


def save_vectors(path, vectors: dict, llm, model: str, step: int) -> None:
    """Write vectors as safetensors ("layers.27", "layers.25.attention": fp32); the metadata says whose they are."""
    tensors = {f"layers.{place}": s.detach().float().cpu().contiguous() for place, s in vectors.items()}
    with written(path) as new:
        save_file(tensors, new, metadata_of(vectors, llm.config, model, step))


def load_vectors(path, config, model: str | None = None) -> tuple[dict, dict[str, str]]:
    """
    Read what save_vectors wrote: ({place: fp32 tensor on the CPU}, metadata). path: of a file, or of a run folder.

    config: of the model that gets them (llm.config).
    model: the name they were trained for; None allows another model of the same width and depth (transfer).
    Exits with one line when there is no such file, or when it does not fit.
    """
    path = Path(path, "vectors.safetensors") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        sys.exit(f"no vectors at {path}: train some first, for example `python train.py --layer 27`")
    with reading(path, "a safetensors file"), safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    missing = [key for key in ("model", "width", "num_layers", "site", "step") if key not in meta]
    if missing or not tensors:
        lacks = f"its metadata lacks {', '.join(missing)}" if missing else "it has no tensors"
        sys.exit(f"{path} is not a file of steering vectors: {lacks}")
    width, depth = config.hidden_size, config.num_hidden_layers
    if model is not None and meta["model"] != model:
        sys.exit(f"{path} was trained for the model {meta['model']!r}, not for {model!r}")
    if (meta["width"], meta["num_layers"]) != (str(width), str(depth)):
        fits = f"fits a model of width {meta['width']} and {meta['num_layers']} layers"
        sys.exit(f"{path} {fits}; this one has width {width} and {depth} layers")
    vectors = {}
    for name, s in tensors.items():
        place = name.removeprefix("layers.")
        fits = re.fullmatch(r"\d+(\.[\w.-]+)?(@answer)?", place) and split(place).layer < depth
        _, site, matrix, _ = split(place) if fits else Place(0, "", "", "")
        if site == "mlp.down_proj" or (site in SITES and not matrix):  # the config tells no other module's width
            shapes = {"lora_A": (s.shape[0], config.intermediate_size), "lora_B": (width, s.shape[-1])}
            fits = tuple(s.shape) == shapes.get(matrix, (width,))
        if not fits:
            sys.exit(f"{path}: {name} of shape {tuple(s.shape)} does not fit a model of {depth} layers, width {width}")
        if not s.is_floating_point() or not s.isfinite().all():
            sys.exit(f"{path}: {name} has entries that are no finite floating-point numbers")
        vectors[int(place) if place.isdigit() else place] = s
    for place in vectors:
        A, B = (vectors.get(re.sub("lora_[AB]", name, str(place))) for name in ("lora_A", "lora_B"))
        if split(place).matrix and (A is None or B is None or len(A) != B.shape[1]):
            sys.exit(f"{path}: the LoRA at {place} lacks its A or B, or they have different ranks")
    return vectors, meta
