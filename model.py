"""
The frozen LLM and its steering vectors: load a model, add vectors to its residual stream, sample, score given tokens,
save and load vectors. Nothing here knows about rewards or training. vLLM, the sampler for GPUs, comes last.

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

import os
import re
import sys
import time
import zlib
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from struct import error as StructError
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from data import shared_prompts
from data.problems import prompt_ids
from data.runs import FAMILY, TINY, base_checksum, source_of, written  # noqa: F401
from data.shared_prompts import batches  # noqa: F401
from data.vllm_model import VLLM_MODELS, register_vllm_models
from plumbing import gguf

# no such id, no connection; no causal LM; broken file; a package or an architecture that GGUF files need is missing
UNREADABLE = (OSError, ValueError, SafetensorError, ImportError, NotImplementedError, KeyError, IndexError, StructError)

# ---------------------------------------------------------------------------------------------------------- the model


def load(name: str = "tiny", device: str = "auto", dtype: str = "auto"):
    """
    Load a causal LM, frozen and in eval mode, with its tokenizer: (llm, tokenizer).

    name: "tiny" (the built-in model), a relative of it (FAMILY), a folder in the Hugging Face format, a .gguf file, or
    a hub id.
    """
    device, dtype = resolve(device, dtype)
    source, how = source_of(name), dict(dtype=getattr(torch, dtype))
    logging.disable_progress_bar()  # one bar for every few tensors loaded hides what the program prints
    try:
        if gguf.is_gguf(source):
            llm, tokenizer = gguf.load(source, **how)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
            llm = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **how)
    except UNREADABLE as error:
        sys.exit(cannot_load(name, error))
    llm.config.architectures = [type(llm).__name__]  # files without it are common, vLLM and the exports want it
    try:
        torch.zeros(1, device=device).tolist()  # fails on the device "meta", which holds no numbers
        llm = llm.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's for a device that is not there
        sys.exit(f"--device {device}: {str(error).strip().splitlines()[0]}")
    return llm.eval().requires_grad_(False), tokenizer


def load_config(name: str):
    """The config of a model, from its files alone. name: as for `load`."""
    source = source_of(name)
    try:
        config = gguf.config_of(source) if gguf.is_gguf(source) else AutoConfig.from_pretrained(source)
    except UNREADABLE as error:
        sys.exit(cannot_load(name, error))
    if not config.architectures and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def resolve(device: str, dtype: str) -> tuple[str, str]:
    """What "auto" stands for: CUDA if there is one; bfloat16 there, float32 on a CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        sys.exit(f"--dtype wants auto, float32, bfloat16 or float16, got {dtype!r}")
    return device, dtype


def cannot_load(name: str, error: Exception) -> str:
    wanted = "give 'tiny', a local folder, a .gguf file or a hub id (offline, one that is in the local cache)"
    if gguf.is_gguf(name):
        wanted = f"transformers reads GGUF files of {gguf.readable()}"
    return f"cannot load the model {name!r}: {wanted}. The reason: {str(error).strip().splitlines()[0]}"


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
    return llm.get_decoder().layers


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
def hooks(pairs):
    """
    Inside the context, every function of [(module, function), ...] is a forward hook of its module.

    function(module, args, output) returns what takes the place of the output, or None.
    """
    with ExitStack() as handles:  # removes them on errors too, or the next call in a notebook is silently steered
        for module, function in pairs:
            handles.enter_context(module.register_forward_hook(function))
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
        pairs.append((site_module(llm, place), partial(_add, llm, at.where, s.to(llm.device), B)))
    with hooks(pairs):
        yield


def _add(llm, where, s, B, module, args, h):
    """h + s, or with a LoRA's A as s and its B: h + B A x. h: (B, T, D), x: (B, T, F)."""
    if B is None:
        step = s.to(h.dtype)  # s itself stays fp32: small Adam steps vanish in bf16
    else:
        step = (args[0] @ s.to(h.dtype).T) @ B.to(h.dtype).T
    if where == "answer":  # (B, T), True there, or (1, 1) while an answer is decoded
        mask = getattr(llm, "answer_positions", None)
        known = mask is not None and mask.shape in (h.shape[:2], (1, 1))
        assert known, "@answer works in model.sample and model.read only"
        step = step * mask.to(h.dtype)[..., None]
    return h + step  # not +=, another hook may hold h


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
        for ids in prompts:
            llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    return {place: torch.cat(sizes).median().item() for place, sizes in found.items()}


# ----------------------------------------------------------------------------------------------------------- sampling


def prompt_seeds(seed: int, numbers) -> list[int]:
    """A seed for each of the prompts with these numbers: a hash of 32 bits, torch's CPU generator takes no more."""
    return [zlib.crc32(f"{seed}:{i}".encode()) for i in numbers]


@torch.no_grad()
def sample(
    llm, prompts: list[list[int]], k: int, max_tokens: int | list[int], stop: list[int], temperature=1.0,
    seed: int | list[int] = 0, max_rows=512, bar=None, keep: int | None = None,
) -> tuple:  # fmt: skip
    """
    Sample k completions of every prompt from the model as it is (call inside `steer` to steer it).

    max_tokens: longest completion, one number or one for each prompt.
    stop: token ids that end a completion and belong to it.
    temperature: 0 decodes greedily, token for token as `generate`.
    seed: one number, or one for each prompt. A prompt's answers depend on its own seed alone, not on the batch it is
    in (up to rounding).
    max_rows: rows decoded at once, fewer if a GPU's memory is short, but all k of a prompt.
    Returns N*k completions as token ids, prompt by prompt, and for each whether it ended by itself.
    keep: a layer; a third list has the states that enter it, for every completion those of its prompt (P, D) and of its
    tokens but the last (C - 1, D).
    Faster than `generate`: a prompt is read once for its k samples, and finished rows leave the batch.
    """
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    seeds = seed if isinstance(seed, list) else prompt_seeds(seed, range(len(prompts)))
    assert temperature >= 0 and k >= 1 and min(limits) >= 1, (temperature, k, min(limits))
    if llm.device.type == "cuda":  # keys and values of a row, should its answer be as long as it may
        c, T = llm.config.get_text_config(), max(map(len, prompts)) + max(limits)
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        row = 2 * c.num_hidden_layers * c.num_key_value_heads * size * llm.dtype.itemsize * T
        max_rows = min(max_rows, int(0.7 * torch.cuda.mem_get_info(llm.device)[0] / row))
    completions, states, entering, n = [], [], [], max(1, max_rows // k)  # entering: in each forward pass of a batch
    see = [] if keep is None else [(decoder_layers(llm)[keep], lambda module, args, output: entering.append(args[0]))]
    try:
        for i in tqdm(range(0, len(prompts), n), desc=bar, disable=bar is None, unit="batch", leave=False):
            batch = slice(i, i + n)
            with hooks(see):
                rows, fed = _decode(llm, prompts[batch], k, limits[batch], stop, temperature, seeds[batch])
            completions += rows
            if keep is not None:
                states += shared_prompts.states_by_row(prompts[batch], rows, fed, entering)
    finally:
        llm.answer_positions = None  # after Ctrl-C, too: nothing else may take them for its own
    found = completions, [row[-1] in stop for row in completions]
    return found if keep is None else (*found, states)


def _decode(llm, prompts, k, limits, stop, temperature, seeds):
    """One batch of `sample`: the completions of its B = N*k rows, and the rows of every forward pass."""
    device, B, P, C = llm.device, len(prompts) * k, max(map(len, prompts)), max(limits)
    ids, mask, positions = shared_prompts.left_padded(prompts, device)
    # a uniform number for every token to come, (C, B); time first, so that a longer limit leaves the first ones alone
    noise = [torch.rand(C, k, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.cat(noise, 1).to(device)
    cache = DynamicCache()  # without the config, so that sliding-window layers too keep every position

    def forward(ids, mask, positions, **how):  # (rows, new tokens), ... -> (rows, V)
        return llm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # never (N, P, V)
            **how,
        ).logits[:, -1]

    llm.answer_positions = torch.arange(P, device=device).expand(ids.shape) == P - 1  # for "@answer", here and below
    logits = forward(ids, mask, positions).repeat_interleave(k, 0)
    llm.answer_positions = torch.ones(1, 1, device=device)
    length = mask.sum(1, keepdim=True).repeat_interleave(k, 0)  # (B, 1) of the row's prompt
    how, known = {}, llm.config.model_type in SITES_OF and llm.config._attn_implementation == "sdpa"
    # measured on a CPU, in float32; elsewhere the model has its own attention, and a copy of the prompt for every row
    if known and llm.device.type == "cpu" and llm.dtype.itemsize >= 4:
        cache = shared_prompts.AnswerCache(cache, mask, k)
        how["attend"] = cache.attend
    else:
        cache.batch_repeat_interleave(k)
    mask = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(B, C)], 1)  # (B, P + C)
    limit = torch.tensor(limits, device=device).repeat_interleave(k)
    ends = torch.tensor(stop, dtype=torch.long, device=device)
    tokens = torch.zeros(B, C, dtype=torch.long, device=device)
    going = torch.ones(B, dtype=torch.bool, device=device)  # neither ended nor at its limit
    rows, fed = torch.arange(B, device=device), []  # those still in the batch; in every forward pass
    for t in range(C):
        tokens[rows, t] = token = pick(logits, temperature, noise[t, rows])
        going[rows] &= ~torch.isin(token, ends) & (t + 1 < limit[rows])
        alive = going[rows].nonzero().flatten()
        if len(alive) == 0:
            break
        if len(alive) < 0.75 * len(rows):  # moving the cache costs about a step, so not for every row that ends
            cache.batch_select_indices(alive)
            rows = rows[alive]
        fed.append(rows)
        seen = shared_prompts.NO_MASK if how else mask[rows, : P + t + 1]
        logits = forward(tokens[rows, t : t + 1], seen, length[rows] + t, **how)
    completions = []
    for row, n in zip(tokens.tolist(), limit.tolist()):
        last = next((t for t in range(n) if row[t] in stop), n - 1)
        completions.append(row[: last + 1])
    return completions, fed


def pick(logits: torch.Tensor, temperature: float, noise: torch.Tensor | None = None) -> torch.Tensor:
    """
    Draw a token a row from softmax(logits / temperature), the argmax at temperature 0. (B, V) -> (B,)

    noise: (B,), uniform in [0, 1): the token where the cumulative probability passes it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    up_to = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (B, V); the last entry is 1 but for rounding
    token = torch.searchsorted(up_to, noise[:, None] * up_to[:, -1:], right=True)
    return token.flatten().clamp(max=logits.shape[-1] - 1)


KEPT_BYTES = 4 << 30  # of states: tokens x width x bytes of a number. 7B, 128 x 16 answers of 1,000 tokens: 15e9


class Rollouts(NamedTuple):
    """k answers to each of N problems, in B = N*k rows, prompt by prompt."""

    prompts: list[list[int]]  # token ids of the row's prompt, a forced beginning of the answer included
    completions: list[list[int]]  # token ids of the row's answer, with the token that ended it
    ended: list[bool]  # False: cut off at its limit
    texts: list[str]  # the answers as text, a forced beginning included
    logps: list[list[float]] | None  # of every completion token, as vLLM computed them; None from the HF sampler
    states: list | None = None  # what `sample` kept of every row; None if nothing was to be kept, or too much


def rollouts(
    llm, tokenizer, vectors: dict, problems: list[str], k: int, max_tokens: int | None = None, temperature=1.0,
    seed: int | list[int] = 0, system=None, template=None, prefix="", context: int | None = None,
    max_rows=512, engine: "VLLM | None" = None, bar=None, keep: int | None = None,
) -> Rollouts:  # fmt: skip
    """
    Answer problems with the steered model, {} for the base: by `sample`, or by an engine if there is one.

    system, template: see prompt_ids. prefix: text that every answer is made to begin with.
    context: tokens of prompt and answer together; max_tokens: of the answer alone; the smaller one counts.
    keep: see `sample`; what may need more than KEPT_BYTES is not kept.
    """
    if not problems:  # of several processes, some may have none
        return Rollouts([], [], [], [], None)
    forced = tokenizer(prefix, add_special_tokens=False).input_ids
    prompts = [prompt_ids(tokenizer, problem, system, template) + forced for problem in problems]
    context = context or llm.config.max_position_embeddings
    longest = max(map(len, prompts))
    if context <= longest:
        sys.exit(f"--context {context}: the longest prompt has {longest} tokens and leaves no room for an answer")
    limits = [min(max_tokens or context, context - len(p)) for p in prompts]
    stop, logps, states = stop_ids(llm, tokenizer), None, []
    size = sum(len(p) + k * limit for p, limit in zip(prompts, limits)) * llm.config.hidden_size * llm.dtype.itemsize
    if engine is not None:
        completions, ended, logps = engine.sample(vectors, prompts, k, limits, stop, temperature, seed, bar)
    else:
        how = temperature, seed, max_rows, bar, keep if size <= KEPT_BYTES else None
        with steer(llm, vectors):
            completions, ended, *states = sample(llm, prompts, k, limits, stop, *how)
    texts = [prefix + text for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
    return Rollouts([p for p in prompts for _ in range(k)], completions, ended, texts, logps, *states)


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


def logits(llm, h: torch.Tensor, exact=False, rows=16384) -> torch.Tensor:
    """
    The logits of states after the final norm: h (..., D) -> (..., V), fp32, since sums over many tokens follow.

    exact: an fp32 product, too, so that of two bf16 states the small difference stays; `rows` of the head at a time
    are fp32, never all of it. Without it the product has the model's own dtype, as the sampler's has: training wants
    the log-probs of the distribution that was sampled from.
    """
    head, cap = llm.get_output_embeddings(), getattr(llm.config, "final_logit_softcapping", None)  # cap: Gemma 2
    assert head.bias is None, "an output layer with a bias is not supported"
    scaled = [name for name in ("logits_scaling", "logit_scale") if getattr(llm.config, name, None) is not None]
    assert not scaled, f"models with {scaled} are not supported"
    if exact:
        x = torch.cat([h.float() @ part.float().T for part in head.weight.split(rows)], -1)
    else:
        x = (h @ head.weight.T).float()
    return x if cap is None else cap * torch.tanh(x / cap)


def token_logps(llm, prompts: list, completions: list, temperature=1.0, chunk=1024, share=False, states=None):
    """
    log pi(y_t | x, y_<t) in nats of every completion token, as the sampler at this temperature draws it.

    Returns (logps, mask), both (B, C), C the longest completion. mask is True on real tokens: it comes from the
    lengths, so the stop token counts. logps is 0 elsewhere.
    Differentiable with respect to vectors of an enclosing `steer`.
    share: read a prompt once for all of its rows. states: (layer, what `sample` kept of every row), to start there.
    The head runs on completion positions only, `chunk` at a time, and again in the backward pass: neither (B, T, V)
    nor (B, C, V) ever exists.
    """
    layer, kept = states or (0, None)
    if share:
        h = shared_prompts.read_together(llm, prompts, completions, layer, kept)
    else:  # of the last token no state is known, and none is needed
        given = kept and pad_sequence([torch.cat([*parts, parts[0][:1]]) for parts in kept], batch_first=True)
        with shared_prompts.starting_at(decoder_layers(llm), layer, given):
            h, before = read(llm, prompts, completions)
        h = h[before]
    target = torch.tensor([token for c in completions for token in c], device=h.device)

    def score(x, y):  # (chunk, D), (chunk,) -> (chunk,)
        return (logits(llm, x) / temperature).log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)

    parts = zip(h.split(chunk), target.split(chunk))
    logps = torch.cat([checkpoint(score, x, y, use_reentrant=False) for x, y in parts])
    lengths = torch.tensor([len(c) for c in completions], device=h.device)
    mask = torch.arange(lengths.max(), device=h.device) < lengths[:, None]
    return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, logps), mask


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
    Read what save_vectors wrote: ({place: fp32 tensor on the CPU}, metadata).

    config: of the model that gets them (llm.config).
    model: the name they were trained for; None allows another model of the same width and depth (transfer).
    Exits with one line when the file is none or does not fit.
    """
    if not Path(path).is_file():
        sys.exit(f"no vectors at {path}: train some first, for example `python train.py --layer 27`")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        sys.exit(f"{path} is not a safetensors file: {error}")
    missing = [key for key in ("model", "width", "num_layers", "site", "step") if key not in meta]
    if missing:
        sys.exit(f"{path} is not a file of steering vectors: its metadata lacks {', '.join(missing)}")
    width, depth = config.hidden_size, config.num_hidden_layers
    if model is not None and meta["model"] != model:
        sys.exit(f"{path} was trained for the model {meta['model']!r}, not for {model!r}")
    if (int(meta["width"]), int(meta["num_layers"])) != (width, depth):
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
        vectors[int(place) if place.isdigit() else place] = s
    return vectors, meta


# --------------------------------------------------------------------------------------------------------------- vLLM

def engine_site(place) -> str | None:
    """Which of the engine's tensors holds a place: "end", "attention", "lora_A", "lora_B", or None."""
    _, site, matrix, where = split(place)
    if where != "all":
        return None
    if matrix:
        return matrix if site == "mlp.down_proj" else None
    sites = {"end": "end", "mlp.down_proj": "end", "attention": "attention", "self_attn.o_proj": "attention"}
    return sites.get(site)


def choose_sampler(sampler: str, device: str, architecture: str, places) -> str:
    """
    What samples, "hf" or "vllm"; exits with a line where vLLM cannot hold a vector at one of these places.

    sampler: "hf", "vllm", or "auto": vLLM where it is installed, and device, model and places suit it.
    """
    foreign = [place for place in places if engine_site(place) is None]
    if sampler == "vllm" and architecture == "a .gguf file":
        sys.exit("--sampler vllm: vLLM reads no .gguf file; use --sampler hf")
    if sampler == "auto":
        here = device.startswith("cuda") and find_spec("vllm")
        return "vllm" if here and architecture in VLLM_MODELS and not foreign else "hf"
    if sampler == "vllm" and foreign:
        sys.exit(f"--sampler vllm: a vector at {foreign[0]} is no bias of vLLM's layers; use --sampler hf")
    return sampler


def import_vllm(llm, tensor_parallel: int):
    """The package vllm, which reads its settings from the environment; exits with a line where it cannot serve llm."""
    architecture = llm.config.architectures[0]
    if architecture not in VLLM_MODELS:
        sys.exit(f"--sampler vllm can steer {', '.join(VLLM_MODELS)}, not {architecture}; use --sampler hf")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # started by torchrun: an engine for each process
    if several and tensor_parallel > 1:
        sys.exit("--tensor-parallel: torchrun gives every process one GPU; start one process, with python, instead")
    if not several and llm.device.index:
        sys.exit(f"--device {llm.device}: vLLM takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES instead")
    if tensor_parallel == 1:  # in this process: no serialisation, and errors come with their own traceback
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"  # for worker processes
    try:
        import vllm
    except ImportError as error:
        sys.exit(f"--sampler vllm: no vLLM ({error}); pip install -r requirements-vllm.txt, or --sampler hf")
    register_vllm_models()
    return vllm


class VLLM:
    """
    A vLLM engine with the same weights as a loaded model, and vectors that change between calls.

    name, llm: what `load` was given and gave.
    context: tokens of prompt and answer together.
    memory: vLLM's share of the GPU's whole memory, for its weights and cache.
    lora_rank: of the LoRA that it will be given, 0 for none.
    eager: no compilation, no CUDA graphs.
    """

    def __init__(self, name, llm, context, memory=0.45, tensor_parallel=1, max_rows=512, lora_rank=0, eager=False):
        threads = torch.get_num_threads()
        vllm = import_vllm(llm, tensor_parallel)
        depth, width = len(decoder_layers(llm)), llm.config.hidden_size
        self.shapes = {"end": [depth, width], "attention": [depth, width]}  # of what `push` sends
        if lora_rank:
            self.shapes["lora_A"] = [depth, lora_rank, llm.config.intermediate_size]
            self.shapes["lora_B"] = [depth, width, lora_rank]
        overrides = {"architectures": [f"Steered{llm.config.architectures[0]}"], "lora_rank": lora_rank}
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        try:
            self.engine = vllm.LLM(
                str(FAMILY.get(name, name)),
                hf_overrides=overrides,
                worker_extension_cls="data.vllm_model.VLLMWorker",
                dtype=str(llm.dtype).removeprefix("torch."),
                max_model_len=context,
                max_num_seqs=max_rows,
                gpu_memory_utilization=memory,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if several else None,
                logprobs_mode="processed_logprobs",  # after the temperature: of the distribution that is sampled from
                enable_prefix_caching=True,  # the k samples of a prompt share its keys and values
                # a prompt that is read in two parts winds its random generator back, which a CPU's cannot
                enable_chunked_prefill=False if llm.device.type == "cpu" else None,
                enforce_eager=eager,
                disable_log_stats=True,
            )
        except (ValueError, RuntimeError, torch.OutOfMemoryError) as error:  # too little memory, bad lengths, ...
            sys.exit(
                f"vLLM did not start with --vllm-memory {memory} and --context {context}: {str(error).strip()}\n"
                "raise --vllm-memory if vLLM lacks room, lower it if the GPU is full; a shorter --context helps both"
            )
        torch.set_num_threads(threads)  # vLLM sets it to 1

    def push(self, vectors: dict) -> None:
        """Give vectors to the engine. {place: tensor}; places that are not named get zero."""
        stacks = {site: torch.zeros(shape) for site, shape in self.shapes.items()}
        for place, s in vectors.items():
            if (site := engine_site(place)) not in stacks:
                sys.exit(f"--sampler vllm: a vector at {place} is no bias of vLLM's layers; use --sampler hf")
            part = tuple(map(slice, s.shape))  # of a LoRA of a lower rank than the engine has room for: the first rows
            stacks[site][split(place).layer][part] += s.detach().float().cpu()
        raw = {site: stack.numpy().tobytes() for site, stack in stacks.items()}
        self._change("set_vectors", args=(raw, self.shapes))

    def push_weights(self, llm) -> None:
        """Give the engine all weights of the model. It must live in this process: it gets the tensors as they are."""
        weights = [(name, weight.detach()) for name, weight in llm.named_parameters()]
        self._change("reload_weights", kwargs={"weights_iterator": weights})

    def _change(self, method, **what) -> None:
        """Change the engine and drop its prefix cache, whose keys and values are stale: vLLM does not notice that."""
        began = time.perf_counter()
        self.engine.collective_rpc(method, **what)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: answers to one prompt would mix two sets of vectors")
        self.sync_seconds = time.perf_counter() - began

    def sample(self, vectors, prompts, k, max_tokens, stop, temperature=1.0, seed: int | list[int] = 0, bar=None):
        """As the function `sample`, with these vectors; returns (completions, ended, log-probs of their tokens)."""
        from vllm import SamplingParams

        self.push(vectors)
        seeds = seed if isinstance(seed, list) else prompt_seeds(seed, range(len(prompts)))
        greedy = temperature == 0
        # every setting stated: a model's generation_config.json may bring others. The j-th sample gets the seed plus j
        how = dict(
            n=1 if greedy else k,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            stop_token_ids=stop,
            logprobs=0,
            detokenize=False,
        )
        params = [SamplingParams(max_tokens=n, seed=s, **how) for n, s in zip(max_tokens, seeds, strict=True)]
        found = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=bar is not None)
        rows = [row for request in found for row in request.outputs * (k if greedy else 1)]
        completions = [list(row.token_ids) for row in rows]
        logps = [[at[token].logprob for at, token in zip(row.logprobs, row.token_ids)] for row in rows]
        return completions, [row.finish_reason == "stop" for row in rows], logps

    def self_test(self, llm, prompts: list[list[int]], max_tokens=32) -> dict[str, float]:
        """
        Compare the engine with the Hugging Face model under large random vectors and none; exit if they disagree.

        Returns mean |difference| of token log-probs in nats: "steered" and "base" (both have the same vectors),
        "effect" (the engine alone has them: how much there is to miss).
        """
        draw, vectors = torch.Generator().manual_seed(0), {}  # a vector at every place that the engine has
        for site, (depth, *shape) in self.shapes.items():
            for place, size in residual_rms(llm, prompts[:2], [f"{l}.{site}" for l in range(depth)]).items():
                scale = 1 / (size * shape[-1] ** 0.5) if site == "lora_A" else 0.2 * size  # A x has size 1
                vectors[place] = scale * torch.randn(shape, generator=draw)
        found = {}
        for name, given, ours in (("base", {}, {}), ("steered", vectors, vectors), ("effect", vectors, {})):
            completions, _, logps = self.sample(given, prompts, 1, [max_tokens] * len(prompts), [], 1.0)
            with steer(llm, ours), torch.no_grad():
                expected, mask = token_logps(llm, prompts, completions)
            sampled = torch.tensor([x for row in logps for x in row])
            found[name] = (expected[mask].cpu() - sampled).abs().mean().item()
        # right engines: 1e-7 in float32, 0.002 in bfloat16, which rounds; one of 28 layers forgotten: 0.03 to 0.1
        allowed = (0.001 if llm.dtype == torch.float32 else 0.02) * found["effect"]
        numbers = (
            f"mean difference of token log-probs {found['steered']:.2g} nats under random vectors, {found['base']:.2g} "
            f"under none; leaving the vectors out would make {found['effect']:.2g}"
        )
        if not max(found["steered"], found["base"]) < allowed:
            why = f"vLLM and the Hugging Face model disagree, so nothing was trained or measured: {numbers}"
            sys.exit(f"{why}. Use --sampler hf, and report the versions.")
        print(f"vLLM agrees with Hugging Face: {numbers}")
        return found


def open_engine(name: str, llm, prompts: list[list[int]], context: int, vectors: dict, **how) -> VLLM:
    """The vLLM engine of a loaded model, tested on some prompts. vectors: for their shapes. how: see VLLM."""
    ranks = [s.shape[0] for place, s in vectors.items() if split(place).matrix == "lora_A"]
    engine = VLLM(name, llm, context, lora_rank=max(ranks, default=0), **how)
    engine.self_test(llm, [p for p in prompts if len(p) + 32 < context])
    return engine


if __name__ == "__main__":  # python model.py RUN --to peft: a run for other programs
    import tyro

    from data.export import export

    tyro.cli(export)
