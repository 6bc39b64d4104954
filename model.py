"""
The frozen LLM and its steering vectors: load a model, add vectors to its residual stream, sample, score given tokens,
save and load vectors. Nothing here knows about rewards or training.

A vector s_l is added to the residual stream at the end of decoder layer l (0-based), at every position, prompt included
(arXiv:2509.06608, Sec. 2). Vectors are a plain dict {layer: fp32 tensor (D,)}.

Shapes: N prompts, k samples of each, B = N*k rows, P prompt tokens, C completion tokens, T = P + C, D width, V vocabulary.
"""

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.utils import logging

TINY = Path(__file__).parent / "data" / "tiny"  # the embedded model; --model tiny

# ---------------------------------------------------------------------------------------------------------- the model


def load(name: str = "tiny", device: str = "auto", dtype: str = "auto"):
    """
    Load a causal LM, frozen and in eval mode, with its tokenizer: (llm, tokenizer).

    name: "tiny" (the embedded model), a local folder in the Hugging Face format, or a hub id.
    device: "cpu", "cuda", ..., or "auto" (CUDA if there is one); dtype: "float32", "bfloat16", "float16", or "auto"
    (bfloat16 on CUDA, float32 on a CPU). Exits with one line when the model cannot be had.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        sys.exit(f"--dtype wants auto, float32, bfloat16 or float16, got {dtype!r}")
    path = TINY if name == "tiny" else Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        sys.exit(f"no model in {path}: a model folder holds config.json, *.safetensors and the tokenizer's files")
    source = path if path.is_dir() else name
    logging.disable_progress_bar()  # one bar for every few tensors loaded hides what the program prints
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        llm = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:  # no such id or file, no connection; no causal LM; broken file
        reason = str(error).strip().splitlines()[0]
        sys.exit(
            f"cannot load the model {name!r}: give 'tiny', a local folder or a hub id (offline, a hub id works only "
            f"once it is in the local cache). The reason: {reason}"
        )
    try:
        llm = llm.to(device)
    except (RuntimeError, AssertionError) as error:  # torch's for a device that is not there
        sys.exit(f"--device {device}: {str(error).strip().splitlines()[0]}")
    return llm.eval().requires_grad_(False), tokenizer


def prompt_ids(tokenizer, problem: str, system: str | None = None) -> list[int]:
    """
    The problem in the model's chat template, up to where the answer begins, as token ids.

    system: the system message; None leaves the template's own (Qwen2.5-Math and the embedded model: the instruction to
    reason step by step and to box the answer).
    """
    if tokenizer.chat_template is None:
        sys.exit("this model's tokenizer has no chat template; use a model that has one, or set tokenizer.chat_template")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": problem})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template wrote them: a second BOS would change the model


def read_problems(path) -> list[dict]:
    """Read a jsonl file of {problem, answer, ...}; exits with the line number of a row that is not one."""
    if not Path(path).is_file():
        sys.exit(f"no problems at {path}: wanted a jsonl file with a problem and an answer in every line")
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            sys.exit(f"{path}, line {number}: not JSON ({error})")
        if not isinstance(row, dict) or not isinstance(row.get("problem"), str) or "answer" not in row:
            sys.exit(f'{path}, line {number}: wanted {{"problem": text, "answer": ...}}, got {line[:80]}')
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not answers or not all(isinstance(a, (str, int, float)) and not isinstance(a, bool) for a in answers):
            sys.exit(f"{path}, line {number}: an answer is a text, a number or a list of them, got {row['answer']!r}")
        rows.append(row | {"answer": [str(a) for a in answers] if len(answers) > 1 else str(answers[0])})
    if not rows:
        sys.exit(f"{path} is empty: wanted a problem and an answer in every line")
    return rows


def stop_ids(llm, tokenizer) -> list[int]:
    """Every token that ends an answer: the tokenizer's and those of generation_config (Llama and Qwen have several)."""
    ids = llm.generation_config.eos_token_id
    ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
    if not ids:
        sys.exit("neither the tokenizer nor generation_config.json of this model names a token that ends an answer")
    return sorted(ids)


def decoder_layers(llm):
    """The decoder layers of a Hugging Face causal LM, a ModuleList; index l is the paper's layer l."""
    return llm.get_decoder().layers


# --------------------------------------------------------------------------------------------------------- the vectors


@contextmanager
def steer(llm, vectors: dict[int, torch.Tensor]):
    """
    Inside the context, the residual stream after decoder layer l is h_l + s_l at every position. vectors: {l: (D,)}.

    Added to the MLP's output, which in pre-norm models (Qwen2, Llama, Mistral) is the last summand of the layer: the same
    as a bias of `mlp.down_proj`, so that an engine which has only that bias rounds alike. Gemma 2 and 3 normalise the
    MLP's output, so there the whole layer's output is taken.
    """
    handles = []
    try:
        for layer, s in vectors.items():
            block = decoder_layers(llm)[layer]
            site = block if hasattr(block, "post_feedforward_layernorm") else block.mlp
            handles.append(site.register_forward_hook(partial(_add, s)))
        yield
    finally:
        for handle in handles:
            handle.remove()  # on errors too, or the next call in a notebook is silently steered


def _add(s, module, args, output):
    h = output[0] if isinstance(output, tuple) else output  # (B, T, D); transformers 4 returned tuples
    h = h + s.to(h.dtype)  # not +=, another hook may hold h. s itself stays fp32: small Adam steps vanish in bf16
    return (h, *output[1:]) if isinstance(output, tuple) else h


@torch.no_grad()
def residual_rms(llm, prompts: list[list[int]], layers: list[int]) -> dict[int, float]:
    """
    RMS(h_l), the size of the residual stream after layer l: {l: median over tokens of sqrt(mean of h^2 over D)}.

    The median, because the first token of most LLMs is an attention sink whose norm is hundreds of times the others'.
    """
    found = {layer: [] for layer in layers}

    def keep(layer, module, args, output):
        h = output[0] if isinstance(output, tuple) else output  # (1, P, D)
        found[layer].append(h.float().pow(2).mean(-1).sqrt().flatten())

    handles = [decoder_layers(llm)[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        for ids in prompts:
            llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(sizes).median().item() for layer, sizes in found.items()}


def save_vectors(path, vectors: dict[int, torch.Tensor], llm, model: str, step: int) -> None:
    """Write vectors as safetensors ("layers.27": (D,) fp32) with metadata that says which model and site they belong to."""
    metadata = {
        "model": model,
        "width": str(llm.config.hidden_size),
        "num_layers": str(len(decoder_layers(llm))),
        "site": "end of layer",
        "step": str(step),
    }
    tensors = {f"layers.{layer}": s.detach().float().cpu().contiguous() for layer, s in vectors.items()}
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)  # a stop in the middle leaves the old file whole


def load_vectors(path, llm, model: str | None = None) -> tuple[dict[int, torch.Tensor], dict[str, str]]:
    """
    Read what save_vectors wrote: ({layer: (D,) fp32 on the model's device}, metadata).

    model: the name the vectors must have been trained for; None allows another model of the same width and depth
    (transfer). Exits with one line when the file is not such a file or does not fit the model.
    """
    if not Path(path).is_file():
        sys.exit(f"no vectors at {path}: train some first, for example `python train.py --layer 27`")
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        sys.exit(f"{path} is not a safetensors file: {error}")
    missing = [key for key in ("model", "width", "num_layers", "site", "step") if key not in meta]
    if missing:
        sys.exit(f"{path} is not a file of steering vectors: its metadata lacks {', '.join(missing)}")
    width, depth = llm.config.hidden_size, len(decoder_layers(llm))
    if model is not None and meta["model"] != model:
        sys.exit(f"{path} was trained for the model {meta['model']!r}, not for {model!r}")
    if (int(meta["width"]), int(meta["num_layers"])) != (width, depth):
        sys.exit(
            f"{path} fits a model of width {meta['width']} and {meta['num_layers']} layers; "
            f"this one has width {width} and {depth} layers"
        )
    vectors = {int(name.removeprefix("layers.")): s.to(llm.device) for name, s in tensors.items()}
    wrong = [layer for layer, s in vectors.items() if s.shape != (width,) or not 0 <= layer < depth]
    if wrong:
        sys.exit(f"{path}: layers {wrong} do not fit a model of {depth} layers of width {width}")
    return vectors, meta


# ------------------------------------------------------------------------------------------------------------ sampling


class _Buffer(CacheLayerMixin):
    """Keys and values of one layer, (B, heads, T, head size), in memory that is allocated once; rows can be dropped."""

    def __init__(self, prefill, k: int, room: int):
        """prefill: the cache layer of N prompts of P tokens; becomes N*k rows with room for more tokens."""
        super().__init__()
        N, heads, P, size = prefill.keys.shape
        self.length, self.rows, self.is_initialized = P, N * k, True
        self.keys = prefill.keys.new_empty(N * k, heads, P + room, size)
        self.values = prefill.values.new_empty(N * k, heads, P + room, size)
        for x, prompt in (self.keys, prefill.keys), (self.values, prefill.values):
            x.unflatten(0, (N, k))[..., :P, :] = prompt[:, None]  # k rows of every prompt

    def update(self, keys, values, *args, **kwargs):
        new = slice(self.length, self.length + keys.shape[2])
        self.keys[: self.rows, :, new], self.values[: self.rows, :, new] = keys, values
        self.length = new.stop
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def keep(self, index):
        for x in (self.keys, self.values):
            x[: len(index), :, : self.length] = x[index, :, : self.length]  # the right side is a copy, made first
        self.rows = len(index)

    def lazy_initialization(self, *args, **kwargs):
        pass

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name up to transformers 5.22


@torch.no_grad()
def sample(
    llm, prompts: list[list[int]], k: int, max_tokens: int, stop: list[int], temperature=1.0, seed=0, max_rows=512, bar=None
) -> tuple[list[list[int]], list[bool]]:
    """
    Sample k completions of every prompt from the model as it is (call inside `steer` to steer it).

    temperature: 0 decodes greedily, and then gives token for token what `generate` gives. stop: token ids that end a
    completion (the ending token is part of it). max_tokens: completion tokens at most. max_rows: rows decoded at once,
    but never less than the k of one prompt. bar: the name of a progress bar over batches, None for no bar.
    Returns N*k completions as token ids, prompt by prompt, and for each whether it ended by itself (False: truncated).

    Faster than `generate` where lengths vary: a prompt is read once for its k samples, memory for keys and values is
    allocated once, and finished rows leave the batch.
    """
    assert temperature >= 0 and k >= 1 and max_tokens >= 1, (temperature, k, max_tokens)
    generator = torch.Generator(llm.device).manual_seed(seed)
    completions, ended, n = [], [], max(1, max_rows // k)
    for i in tqdm(range(0, len(prompts), n), desc=bar, disable=bar is None, unit="batch", leave=False):
        tokens, lengths, done = _decode(llm, prompts[i : i + n], k, max_tokens, stop, temperature, generator)
        completions += [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
        ended += done.tolist()
    return completions, ended


def _decode(llm, prompts, k, max_tokens, stop, temperature, generator):
    """One batch of `sample`: (tokens (B, C), lengths (B,), ended (B,)); tokens beyond a row's length mean nothing."""
    device, B, P = llm.device, len(prompts) * k, max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=device)  # left-padded, (N, P)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    prefill = DynamicCache()  # without the config, so that sliding-window layers too keep every position
    logits = llm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=prefill,
        use_cache=True,
        logits_to_keep=1,  # never (N, P, V)
    ).logits[:, -1]
    logits = logits.repeat_interleave(k, 0)  # (B, V)
    cache = Cache(layers=[_Buffer(layer, k, max_tokens) for layer in prefill.layers])
    mask = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(B, max_tokens)], 1)  # (B, P + C)
    position = mask[:, :P].sum(1, keepdim=True)  # (B, 1) of the token to come
    stop = torch.tensor(stop, dtype=torch.long, device=device)
    tokens = torch.zeros(B, max_tokens, dtype=torch.long, device=device)
    lengths = torch.full((B,), max_tokens, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    row = torch.arange(B, device=device)  # the output row of every row still in the batch
    for t in range(max_tokens):
        token = pick(logits, temperature, generator)  # (rows in the batch,)
        tokens[row, t] = token
        ends = torch.isin(token, stop) & ~ended[row]
        lengths[row[ends]] = t + 1
        ended[row[ends]] = True
        alive = (~ended[row]).nonzero().flatten()
        if len(alive) == 0 or t + 1 == max_tokens:
            break
        if len(alive) < 0.75 * len(row):  # moving the cache costs about a step, so not for every row that ends
            for layer in cache.layers:
                layer.keep(alive)
            row, mask, position, token = row[alive], mask[alive], position[alive], token[alive]
        logits = llm(
            input_ids=token[:, None],
            attention_mask=mask[:, : P + t + 1],
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        position = position + 1
    return tokens, lengths, ended


class Rollouts(NamedTuple):
    """k answers to each of N problems, in B = N*k rows, prompt by prompt."""

    prompts: list[list[int]]  # token ids of the row's prompt, a forced beginning of the answer included
    completions: list[list[int]]  # token ids of the row's answer, with the token that ended it
    ended: list[bool]  # False: cut off at max_tokens
    texts: list[str]  # the answers as text, a forced beginning included


def rollouts(
    llm, tokenizer, problems: list[str], k: int, max_tokens: int, temperature=1.0, seed=0, system=None, prefix="",
    max_rows=512, bar=None,
) -> Rollouts:
    """
    Answer problems, by `sample`, with the model as it is.

    system: the system message, None for the chat template's own. prefix: text that every answer is made to begin with.
    """
    forced = tokenizer(prefix, add_special_tokens=False).input_ids
    prompts = [prompt_ids(tokenizer, problem, system) + forced for problem in problems]
    stop = stop_ids(llm, tokenizer)
    completions, ended = sample(llm, prompts, k, max_tokens, stop, temperature, seed, max_rows, bar)
    texts = [prefix + text for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
    return Rollouts([p for p in prompts for _ in range(k)], completions, ended, texts)


def pick(logits: torch.Tensor, temperature: float, generator=None) -> torch.Tensor:
    """Draw a token a row from softmax(logits / temperature), the argmax at temperature 0. (B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator).flatten()


# ---------------------------------------------------------------------------------------------------- token log-probs


def token_logps(
    llm, prompts: list[list[int]], completions: list[list[int]], temperature=1.0, chunk=1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log pi(y_t | x, y_<t) in nats of every completion token, as the sampler at this temperature draws it.

    prompts, completions: B lists of ids each. Returns (logps, mask), both (B, C), C the longest completion; mask is True
    on real tokens (it comes from the lengths: the stop token counts), logps is 0 elsewhere. Differentiable with respect
    to vectors of an enclosing `steer`; autograd stores nothing below the lowest of them, since nothing there needs a
    gradient. The head runs on completion positions only, `chunk` of them at a time, and its logits are computed again
    in the backward pass: neither (B, T, V) nor (B, C, V) ever exists.
    """
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    T, C = max(map(len, rows)), max(map(len, completions))
    # right-padded: a causal model never looks ahead, so no attention mask is needed
    ids = torch.tensor([r + [0] * (T - len(r)) for r in rows], device=llm.device)
    h = llm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D), after the final norm
    before = torch.zeros(len(rows), T, dtype=torch.bool)  # position t - 1 predicts token t: one before each completion token
    mask = torch.zeros(len(rows), C, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        before[i, len(p) - 1 : len(p) + len(c) - 1] = True
        mask[i, : len(c)] = True
    h, mask = h[before.to(h.device)], mask.to(h.device)  # (completion tokens, D)
    target = torch.tensor([token for c in completions for token in c], device=h.device)
    pieces = [
        checkpoint(_head_logps, llm, a, b, temperature, use_reentrant=False)
        for a, b in zip(h.split(chunk), target.split(chunk))
    ]
    return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, torch.cat(pieces)), mask


def _head_logps(llm, h, target, temperature):
    """(n, D), (n,) -> (n,): log-probs of the targets; fp32, since a sum over thousands of tokens is taken of them."""
    logits = llm.get_output_embeddings()(h).float()
    if (cap := getattr(llm.config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return (logits / temperature).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
