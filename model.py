"""
The frozen LLM and its steering vectors: load a model, add vectors to its residual stream, sample, score given tokens,
save and load vectors. Nothing here knows about rewards or training.

A vector s_l is added to the residual stream at the end of decoder layer l (0-based), at every position, prompt included
(arXiv:2509.06608, Sec. 2). Vectors are a plain dict {place: fp32 tensor (D,)}. A place is a layer number, meaning the end of
that layer, or a pair: (25, "input-norm") is another site in layer 25, and (25, "lora_A"): (r, F) with (25, "lora_B"): (D, r)
is a LoRA on its mlp.down_proj, a vector whose size depends on the token.

Shapes: N prompts, k samples of each, B = N*k rows, P prompt tokens, C completion tokens, T = P + C, D width, V vocabulary,
F width inside the MLP, r rank of a LoRA.
"""

import json
import os
import sys
import time
import zlib
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.utils import logging

TINY = Path(__file__).parent / "data" / "tiny"  # the embedded model; --model tiny
FAMILY = {name: TINY.with_name(name) for name in ("tiny", "tiny-instruct", "tiny-math")}  # and its relatives, for transfer
MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
R1_PROMPT = (  # as in arXiv:2503.20783, which P4 follows
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant first "
    "thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process is "
    "enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>.\nUser: PROBLEM\nAssistant: <think>"
)

# ---------------------------------------------------------------------------------------------------------- the model


def load(name: str = "tiny", device: str = "auto", dtype: str = "auto"):
    """
    Load a causal LM, frozen and in eval mode, with its tokenizer: (llm, tokenizer).

    name: "tiny" (the embedded model) or one of its relatives (FAMILY), a local folder in the Hugging Face format, or a hub id.
    device: "cpu", "cuda", ..., or "auto" (CUDA if there is one); dtype: "float32", "bfloat16", "float16", or "auto"
    (bfloat16 on CUDA, float32 on a CPU). Exits with one line when the model cannot be had.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        sys.exit(f"--dtype wants auto, float32, bfloat16 or float16, got {dtype!r}")
    path = FAMILY.get(name, Path(name))
    if name in FAMILY and not (path / "config.json").is_file():
        sys.exit(f"{name} is not in the repository: `python data/tiny/pretrain.py --relative {name[5:]}` makes it in minutes")
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


def fingerprint(llm) -> str:
    """A checksum of the first numbers of every weight, to tell results of other weights by."""
    some = (p.detach().flatten()[:256].float().cpu().numpy().tobytes() for p in llm.parameters())
    return f"{zlib.crc32(b''.join(some)):08x}"


def stamp(run: str | Path, config: dict) -> str:
    """
    What tells a run's vectors from those of other runs, or of the same run trained on: a checksum of the file.

    Of all weights (--method full) names, sizes and times, since a checksum would read the whole model. Exits if there are none.
    """
    full = config.get("method") == "full"
    files = sorted(Path(run).glob("weights/*.safetensors" if full else "vectors.safetensors"))
    if not files:
        sys.exit(f"no {'weights' if full else 'vectors'} in {run}: the run did not get that far, --resume goes on with it")
    if full:
        return str([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return f"{zlib.crc32(files[0].read_bytes()):08x}"


@torch.no_grad()
def replace_weights(llm, name: str) -> None:
    """Give a loaded model the weights of another of the same shape. name: as for `load`."""
    other = dict(load(name, str(llm.device), str(llm.dtype).removeprefix("torch."))[0].named_parameters())
    for key, weight in llm.named_parameters():
        weight.copy_(other[key])


def prompt_ids(tokenizer, problem: str, system: str | None = None, template: str | None = None) -> list[int]:
    """
    The problem as the model is asked it, up to where the answer begins, as token ids with at most one BOS.

    template (P4 App. K): "native" (the tokenizer's own chat template), "qwen-math" (Qwen's chat format, written out), "r1" (plain
    text, for base models that know no chat); default native where the tokenizer has a chat template, else r1. system: the
    system message of native and qwen-math, by default MATH_PROMPT; "" leaves it out (a template may then insert its own).
    """
    template = template or ("native" if tokenizer.chat_template else "r1")
    system = MATH_PROMPT if system is None else system
    if template == "native":
        if tokenizer.chat_template is None:
            sys.exit("--template native: this model's tokenizer has no chat template; use --template r1 or qwen-math")
        messages = [{"role": "system", "content": system}] if system else []
        try:
            text = tokenizer.apply_chat_template(
                [*messages, {"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError:  # Gemma's template refuses system messages
            messages = [{"role": "user", "content": f"{system}\n\n{problem}"}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    elif template == "qwen-math":
        text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        text += f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    elif template == "r1":
        text = R1_PROMPT.replace("PROBLEM", problem)
    else:
        sys.exit(f"--template wants native, qwen-math or r1, got {template!r}")
    # a chat template writes the BOS itself; a second one would change what the model does
    ids = tokenizer(text, add_special_tokens=template != "native").input_ids
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) <= 1, "two BOS tokens in the prompt"
    return ids


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
    """Every token that ends an answer: the tokenizer's, those of generation_config, and those that end a turn of a chat."""
    ids = llm.generation_config.eos_token_id
    ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
    vocabulary = tokenizer.get_vocab()  # the configs of base models may name only <|endoftext|>; their chat template has these
    ids |= {vocabulary[token] for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if token in vocabulary}
    if not ids:
        sys.exit("neither the tokenizer nor generation_config.json of this model names a token that ends an answer")
    return sorted(ids)


def decoder_layers(llm):
    """The decoder layers of a Hugging Face causal LM, a ModuleList; index l is the paper's layer l."""
    return llm.get_decoder().layers


# --------------------------------------------------------------------------------------------------------- the vectors


SITES = ("input-norm", "attention", "post-attention-norm", "end")  # in the order of a layer; its components' outputs
PRE_NORM = ("qwen2", "qwen3", "llama", "mistral")  # h += attention(norm(h)); h += mlp(norm(h)), and nothing else


def layer_of(place) -> int:
    """The layer of a place: 27 -> 27; (27, "attention") -> 27."""
    return place[0] if isinstance(place, tuple) else place


def name_of(place) -> str:
    """A place as text, for files: 27 -> "27"; (27, "attention") -> "27.attention"."""
    return f"{place[0]}.{place[1]}" if isinstance(place, tuple) else str(place)


def site_module(llm, place):
    """
    The module whose output gets the vector of a place.

    The end of a layer: the MLP's output, which in pre-norm models is the last summand of the layer: the same as a bias of
    `mlp.down_proj`, so that an engine which has only that bias rounds alike. Other models scale or normalise the MLP's output
    before they add it, so there the whole layer's output is taken. "attention" is the residual stream between attention and
    MLP: by the same reasoning the attention's output projection. After a norm a vector reaches attention or MLP, not the stream.
    """
    layer, site = place if isinstance(place, tuple) else (place, "end")
    block, kind = decoder_layers(llm)[layer], llm.config.model_type
    if site == "end":
        return block.mlp if kind in PRE_NORM else block
    if site.startswith("lora"):
        return block.mlp.down_proj
    after = kind in ("gemma2", "gemma3_text")  # they normalise the attention's and the MLP's output before they add it
    if not (after or kind in (*PRE_NORM, "gemma")):
        known = ", ".join((*PRE_NORM, "gemma", "gemma2", "gemma3_text"))
        sys.exit(f"the site {site} is known for {known}, not for {kind!r}; the end of a layer fits any model")
    if site == "input-norm":
        return block.input_layernorm
    if site == "attention":
        return block.post_attention_layernorm if after else block.self_attn.o_proj
    return block.pre_feedforward_layernorm if after else block.post_attention_layernorm


@contextmanager
def steer(llm, vectors: dict):
    """
    Inside the context, the residual stream after decoder layer l is h_l + s_l at every position. vectors: {l: (D,)}.

    A place (l, site) adds its vector to the output of that component instead. A LoRA adds B A x, x the input of mlp.down_proj
    (arXiv:2505.18706, App. D, with alpha = r): for r = 1 the vector B[:, 0] times a number A x that every token has for itself.
    """
    handles = []
    try:
        for place, s in vectors.items():
            match place:
                case (layer, "lora_A"):
                    hook = partial(_add_lora, s, vectors[layer, "lora_B"])
                case (_, "lora_B"):
                    continue
                case _:
                    hook = partial(_add, s)
            handles.append(site_module(llm, place).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()  # on errors too, or the next call in a notebook is silently steered


def _add(s, module, args, output):
    h = output[0] if isinstance(output, tuple) else output  # (B, T, D); transformers 4 returned tuples
    h = h + s.to(h.dtype)  # not +=, another hook may hold h. s itself stays fp32: small Adam steps vanish in bf16
    return (h, *output[1:]) if isinstance(output, tuple) else h


def _add_lora(A, B, module, args, output):
    x = args[0]  # (B, T, F)
    return output + (x @ A.to(x.dtype).T) @ B.to(x.dtype).T


@torch.no_grad()
def residual_rms(llm, prompts: list[list[int]], places: list) -> dict:
    """
    The size of what is steered: {place: median over tokens of sqrt(mean of h^2)}.

    h is, at the end of layer l and after its attention, the residual stream after layer l; at a norm its output; for
    (l, "lora_A") the LoRA's input x, and for (l, "lora_B") the residual stream again. The median, because the first token of most
    LLMs is an attention sink whose norm is hundreds of times the others'.
    """
    found = {place: [] for place in places}

    def keep(place, module, args, output):
        h = args[0] if name_of(place).endswith("lora_A") else output[0] if isinstance(output, tuple) else output
        found[place].append(h.float().pow(2).mean(-1).sqrt().flatten())  # h: (1, P, D or F)

    handles = []
    for place in places:
        on_the_stream = not isinstance(place, tuple) or place[1] in ("end", "attention", "lora_B")
        module = decoder_layers(llm)[layer_of(place)] if on_the_stream else site_module(llm, place)
        handles.append(module.register_forward_hook(partial(keep, place)))
    try:
        for ids in prompts:
            llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {place: torch.cat(sizes).median().item() for place, sizes in found.items()}


def save_vectors(path, vectors: dict, llm, model: str, step: int) -> None:
    """Write vectors as safetensors ("layers.27", "layers.25.attention", ...: fp32) with metadata that says whose they are."""
    sites = {place[1].split("_")[0] if isinstance(place, tuple) else "end" for place in vectors}
    metadata = {
        "model": model,
        "width": str(llm.config.hidden_size),
        "num_layers": str(len(decoder_layers(llm))),
        "site": ", ".join(sorted(sites)).replace("end", "end of layer"),
        "step": str(step),
    }
    tensors = {f"layers.{name_of(place)}": s.detach().float().cpu().contiguous() for place, s in vectors.items()}
    temporary = Path(f"{path}.tmp")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)  # a stop in the middle leaves the old file whole


def load_vectors(path, llm, model: str | None = None) -> tuple[dict, dict[str, str]]:
    """
    Read what save_vectors wrote: ({place: fp32 tensor on the model's device}, metadata).

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
    vectors = {}
    for name, s in tensors.items():
        layer, *site = name.removeprefix("layers.").split(".")
        known = not site or site[0] in (*SITES, "lora_A", "lora_B")
        inner = getattr(llm.config, "intermediate_size", None)
        shapes = {"lora_A": [(s.shape[0], inner)], "lora_B": [(width, s.shape[-1])]}.get(*site or [""], [(width,)])
        if not (layer.isdigit() and int(layer) < depth and known and tuple(s.shape) in shapes):
            sys.exit(f"{path}: {name} of shape {tuple(s.shape)} does not fit a model of {depth} layers of width {width}")
        vectors[(int(layer), site[0]) if site else int(layer)] = s.to(llm.device)
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


def prompt_seeds(seed: int, numbers) -> list[int]:
    """A seed for each of the prompts with these numbers. A hash of 32 bits: torch's CPU generator ignores the bits above."""
    return [zlib.crc32(f"{seed}:{i}".encode()) for i in numbers]


@torch.no_grad()
def sample(
    llm, prompts: list[list[int]], k: int, max_tokens: int | list[int], stop: list[int], temperature=1.0,
    seed: int | list[int] = 0, max_rows=512, bar=None,
) -> tuple[list[list[int]], list[bool]]:  # fmt: skip
    """
    Sample k completions of every prompt from the model as it is (call inside `steer` to steer it).

    temperature: 0 decodes greedily, and then gives token for token what `generate` gives. stop: token ids that end a
    completion (the ending token is part of it). max_tokens: completion tokens at most, one number or one for each prompt.
    seed: one number, or one for each prompt (see prompt_seeds); a prompt's answers depend on its own seed alone, not on the
    batch it is in (up to rounding, which may depend on the batch). max_rows: rows decoded at once, fewer if a GPU's memory is
    short, but never less than the k of one prompt. bar: the name of a progress bar over batches, None for no bar.
    Returns N*k completions as token ids, prompt by prompt, and for each whether it ended by itself (False: truncated).

    Faster than `generate` where lengths vary: a prompt is read once for its k samples, memory for keys and values is
    allocated once, and finished rows leave the batch.
    """
    limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    if llm.device.type == "cuda":  # keys and values of a row: memory for its longest possible answer is taken at once
        c = llm.config.get_text_config()
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        row = 2 * c.num_hidden_layers * c.num_key_value_heads * size * llm.dtype.itemsize * (max(map(len, prompts)) + max(limits))
        max_rows = min(max_rows, int(0.7 * torch.cuda.mem_get_info(llm.device)[0] / row))
    seeds = seed if isinstance(seed, list) else prompt_seeds(seed, range(len(prompts)))
    assert temperature >= 0 and k >= 1 and min(limits) >= 1, (temperature, k, min(limits))
    completions, ended, n = [], [], max(1, max_rows // k)
    for i in tqdm(range(0, len(prompts), n), desc=bar, disable=bar is None, unit="batch", leave=False):
        batch = slice(i, i + n)
        tokens, lengths, done = _decode(llm, prompts[batch], k, limits[batch], stop, temperature, seeds[batch])
        completions += [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
        ended += done.tolist()
    return completions, ended


def _decode(llm, prompts, k, limits, stop, temperature, seeds):
    """One batch of `sample`: (tokens (B, C), lengths (B,), ended (B,)); tokens beyond a row's length mean nothing."""
    device, B, P, C = llm.device, len(prompts) * k, max(map(len, prompts)), max(limits)
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=device)  # left-padded, (N, P)
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
    # a uniform number for every token to come, (C, B); time first, so that a longer limit leaves the first ones as they are
    noise = [torch.rand(C, k, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.cat(noise, 1).to(device)
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
    cache = Cache(layers=[_Buffer(layer, k, C) for layer in prefill.layers])
    mask = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(B, C)], 1)  # (B, P + C)
    position = mask[:, :P].sum(1, keepdim=True)  # (B, 1) of the token to come
    stop = torch.tensor(stop, dtype=torch.long, device=device)
    tokens = torch.zeros(B, C, dtype=torch.long, device=device)
    lengths = torch.tensor(limits, device=device).repeat_interleave(k)  # of a row that ends: the length it had
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    row = torch.arange(B, device=device)  # the output row of every row still in the batch
    for t in range(C):
        token = pick(logits, temperature, noise[t, row])  # (rows in the batch,)
        tokens[row, t] = token
        ends = torch.isin(token, stop) & (t < lengths[row])  # those still in the batch beyond their end do not end again
        lengths[row[ends]] = t + 1
        ended[row[ends]] = True
        alive = (t + 1 < lengths[row]).nonzero().flatten()
        if len(alive) == 0:
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


def pick(logits: torch.Tensor, temperature: float, noise: torch.Tensor | None = None) -> torch.Tensor:
    """
    Draw a token a row from softmax(logits / temperature), the argmax at temperature 0. (B, V) -> (B,)

    noise: (B,) numbers, uniform in [0, 1): the token where the cumulative probability passes the number.
    """
    if temperature == 0:
        return logits.argmax(-1)
    up_to = (logits.float() / temperature).softmax(-1).cumsum(-1)  # (B, V); the last entry is 1 but for rounding
    token = torch.searchsorted(up_to, noise[:, None] * up_to[:, -1:], right=True)
    return token.flatten().clamp(max=logits.shape[-1] - 1)


# ------------------------------------------------------------------------------------------------------------ rollouts


class Rollouts(NamedTuple):
    """k answers to each of N problems, in B = N*k rows, prompt by prompt."""

    prompts: list[list[int]]  # token ids of the row's prompt, a forced beginning of the answer included
    completions: list[list[int]]  # token ids of the row's answer, with the token that ended it
    ended: list[bool]  # False: cut off at its limit
    texts: list[str]  # the answers as text, a forced beginning included
    logps: list[list[float]] | None  # of every completion token, as vLLM computed them; None from the HF sampler


def rollouts(
    llm, tokenizer, vectors: dict[int, torch.Tensor], problems: list[str], k: int, max_tokens: int | None = None,
    temperature=1.0, seed: int | list[int] = 0, system=None, template=None, prefix="", context: int | None = None,
    max_rows=512, engine: "VLLM | None" = None, bar=None,
) -> Rollouts:  # fmt: skip
    """
    Answer problems with the steered model, {} for the base: by `sample`, or by an engine if there is one.

    system, template: see prompt_ids. prefix: text that every answer is made to begin with. context: tokens of prompt and
    answer together; max_tokens: of the answer alone; the smaller one counts.
    """
    if not problems:  # of several processes, some may have none
        return Rollouts([], [], [], [], None)
    forced = tokenizer(prefix, add_special_tokens=False).input_ids
    prompts = [prompt_ids(tokenizer, problem, system, template) + forced for problem in problems]
    context = context or llm.config.max_position_embeddings
    limits = [min(max_tokens or context, context - len(p)) for p in prompts]
    if min(limits) < 1:
        sys.exit(f"--context {context}: the longest prompt has {max(map(len, prompts))} tokens and leaves no room for an answer")
    stop = stop_ids(llm, tokenizer)
    if engine is not None:
        completions, ended, logps = engine.sample(vectors, prompts, k, limits, stop, temperature, seed, bar)
    else:
        with steer(llm, vectors):
            completions, ended = sample(llm, prompts, k, limits, stop, temperature, seed, max_rows, bar)
        logps = None
    texts = [prefix + text for text in tokenizer.batch_decode(completions, skip_special_tokens=True)]
    return Rollouts([p for p in prompts for _ in range(k)], completions, ended, texts, logps)


# ---------------------------------------------------------------------------------------------------------------- vLLM

VLLM_MODELS = {  # architectures that the engine can steer, and where vLLM keeps them
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}


class Steered:
    """
    Mixed into a vLLM model: every mlp.down_proj and self_attn.o_proj gets a bias, the vector at the end of the layer and after
    its attention; with `lora_rank` in the config every mlp.down_proj gets the two matrices of a LoRA, too.

    Buffers, since vLLM's loader wants every *parameter* from the checkpoint. Made in __init__, since vLLM compiles and
    captures CUDA graphs while it starts: a hook or bias that comes later is ignored without a word. In place ever after.
    With tensor parallelism vLLM adds the bias of rank 0 only, before the sum over ranks, and every rank has its columns of A.
    """

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rank = getattr(vllm_config.model_config.hf_config, "lora_rank", 0)
        for block in self.model.layers:
            if not hasattr(block, "mlp"):  # a rank of a pipeline has placeholders for the layers of others
                continue
            for linear in (block.mlp.down_proj, block.self_attn.o_proj):
                assert linear.bias is None, "this model has a bias of its own where the vectors go; use --sampler hf"
                del linear.bias
                linear.register_buffer("bias", torch.zeros(linear.output_size, dtype=linear.params_dtype), persistent=False)
            if rank:
                down = block.mlp.down_proj
                A = torch.zeros(rank, down.input_size_per_partition, dtype=down.params_dtype)
                B = torch.zeros(down.output_size, rank, dtype=down.params_dtype)
                down.register_buffer("lora_A", A, persistent=False)
                down.register_buffer("lora_B", B, persistent=False)
                # the part of it that multiplies by the weight, before the sum over ranks; every module has one of its own
                down.quant_method.apply = partial(_apply_with_lora, down.quant_method.apply)


def _apply_with_lora(apply, linear, x, bias=None):
    return apply(linear, x, bias) + (x @ linear.lora_A.T) @ linear.lora_B.T


def register_vllm_models():
    """Make vLLM know SteeredQwen2ForCausalLM and so on. New names, since its compile cache tells models apart by name."""
    from vllm import ModelRegistry

    for name, file in VLLM_MODELS.items():
        stock = getattr(import_module(f"vllm.model_executor.models.{file}"), name)
        ModelRegistry.register_model(f"Steered{name}", type(f"Steered{name}", (Steered, stock), {}))


class _Worker:
    """Mixed into vLLM's workers, which may be other processes: they get the vectors as bytes."""

    @torch.inference_mode()
    def set_vectors(self, raw: dict[str, bytes], shapes: dict[str, list[int]]):
        """raw: fp32 numbers of all layers by site. "end", "attention": (L, D); "lora_A": (L, r, F); "lora_B": (L, D, r)."""
        given = {site: torch.frombuffer(bytearray(raw[site]), dtype=torch.float32).view(*shapes[site]) for site in raw}
        for l, block in enumerate(self.get_model().model.layers):
            if hasattr(block, "mlp"):
                down = block.mlp.down_proj
                down.bias.copy_(given["end"][l])
                block.self_attn.o_proj.bias.copy_(given["attention"][l])
                if "lora_A" in given:
                    columns = down.lora_A.shape[1]
                    down.lora_A.copy_(given["lora_A"][l][:, down.tp_rank * columns :][:, :columns])
                    down.lora_B.copy_(given["lora_B"][l])


def __getattr__(name):
    """Python's hook for names that this file does not define: vLLM's worker processes ask it for VLLMWorker ..."""
    if name == "VLLMWorker":
        register_vllm_models()  # ... and have to know the models too, before they load one
        return _Worker
    raise AttributeError(f"model.py has no {name}")


class VLLM:
    """A vLLM engine with the same weights as a loaded model, and vectors that change between calls."""

    def __init__(self, name: str, llm, context: int, memory=0.45, tensor_parallel=1, max_rows=512, lora_rank=0, eager=False):
        """
        name, llm: what `load` was given and gave. context: tokens of prompt and answer together. memory: share of the GPU's
        whole memory for vLLM's weights and cache, beside what this process holds. lora_rank: of the LoRA that it will be given, 0
        for none. eager: no compilation, no CUDA graphs.
        """
        architecture = llm.config.architectures[0]
        if architecture not in VLLM_MODELS:
            sys.exit(f"--sampler vllm can steer {', '.join(VLLM_MODELS)}, not {architecture}; use --sampler hf")
        if tensor_parallel == 1:  # in this process: no serialisation, and errors come with their own traceback
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"  # for worker processes
        threads = torch.get_num_threads()
        try:
            import vllm
        except ImportError as error:
            sys.exit(f"--sampler vllm: vLLM cannot be imported ({error}); pip install -r requirements-vllm.txt, or --sampler hf")
        register_vllm_models()
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # started by torchrun: an engine for each process
        if several and tensor_parallel > 1:
            sys.exit("--tensor-parallel: torchrun gives every process one GPU; start a single process with python instead")
        if not several and llm.device.index:
            sys.exit(f"--device {llm.device}: vLLM takes the first GPU that it sees; choose with CUDA_VISIBLE_DEVICES instead")
        depth, width, inner = len(decoder_layers(llm)), llm.config.hidden_size, llm.config.intermediate_size
        self.shapes = {"end": [depth, width], "attention": [depth, width]}  # of what `push` sends
        if lora_rank:
            self.shapes |= {"lora_A": [depth, lora_rank, inner], "lora_B": [depth, width, lora_rank]}
        try:
            self.engine = vllm.LLM(
                str(FAMILY.get(name, name)),
                hf_overrides={"architectures": [f"Steered{architecture}"], "lora_rank": lora_rank},
                worker_extension_cls="model.VLLMWorker",
                dtype=str(llm.dtype).removeprefix("torch."),
                max_model_len=context,
                max_num_seqs=max_rows,
                gpu_memory_utilization=memory,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if several else None,
                logprobs_mode="processed_logprobs",  # after the temperature: those of the distribution that is sampled from
                enable_prefix_caching=True,  # the k samples of a prompt share its keys and values
                # a prompt that is read in two parts winds its random generator back, which a CPU's cannot
                enable_chunked_prefill=False if llm.device.type == "cpu" else None,
                enforce_eager=eager,
                disable_log_stats=True,
            )
        except (ValueError, RuntimeError, torch.OutOfMemoryError) as error:  # vLLM's for too little memory, bad lengths, ...
            sys.exit(
                f"vLLM did not start with --vllm-memory {memory} and --context {context}: {str(error).strip()}\n"
                "raise --vllm-memory if vLLM lacks room, lower it if the GPU is full; a shorter --context needs less of both; "
                "--sampler hf works without vLLM"
            )
        if torch.get_num_threads() != threads:  # vLLM sets it to 1
            torch.set_num_threads(threads)

    def push(self, vectors: dict) -> None:
        """Give vectors to the engine. {place: tensor}; places that are not named get zero."""
        stacks = {site: torch.zeros(shape) for site, shape in self.shapes.items()}
        for place, s in vectors.items():
            layer, site = place if isinstance(place, tuple) else (place, "end")
            if site not in stacks:
                sys.exit(f"--sampler vllm: a vector at {name_of(place)} is no bias of vLLM's layers; use --sampler hf")
            stacks[site][layer] = s.detach().float().cpu()
        began = time.perf_counter()
        raw = {site: stack.numpy().tobytes() for site, stack in stacks.items()}
        self.engine.collective_rpc("set_vectors", args=(raw, self.shapes))
        self.forget()
        self.sync_seconds = time.perf_counter() - began

    def push_weights(self, llm) -> None:
        """Give the engine all weights of the model. It must live in this process: the tensors are handed over as they are."""
        began = time.perf_counter()
        weights = [(name, weight.detach()) for name, weight in llm.named_parameters()]
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.forget()
        self.sync_seconds = time.perf_counter() - began

    def forget(self) -> None:
        """Drop the prefix cache: keys and values above a changed vector are stale, and vLLM does not notice."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: answers to the same prompt would mix two sets of vectors")

    def sample(self, vectors, prompts, k, max_tokens: list[int], stop, temperature=1.0, seed: int | list[int] = 0, bar=None):
        """As the function `sample`, with these vectors; returns (completions, ended, log-probs of the sampled tokens)."""
        from vllm import SamplingParams

        self.push(vectors)
        seeds = seed if isinstance(seed, list) else prompt_seeds(seed, range(len(prompts)))
        greedy = temperature == 0
        # every setting stated: a model's generation_config.json may bring others. The j-th sample gets the seed plus j
        params = [
            SamplingParams(
                n=1 if greedy else k, temperature=temperature, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0,
                max_tokens=limit, seed=s, stop_token_ids=stop, logprobs=0, detokenize=False,
            )
            for limit, s in zip(max_tokens, seeds, strict=True)
        ]  # fmt: skip
        found = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=bar is not None)
        rows = [row for request in found for row in request.outputs * (k if greedy else 1)]
        completions = [list(row.token_ids) for row in rows]
        logps = [[at[token].logprob for at, token in zip(row.logprobs, row.token_ids)] for row in rows]
        return completions, [row.finish_reason == "stop" for row in rows], logps

    def self_test(self, llm, prompts: list[list[int]], max_tokens=32) -> dict[str, float]:
        """
        Compare the engine with the Hugging Face model under large random vectors and under none; exit if they disagree.

        Returns mean |difference| of token log-probs in nats: "steered" and "base" (the engine against the model, both with the
        same vectors), "effect" (the engine with vectors against the model without: how much there is to miss).
        """
        draw = torch.Generator().manual_seed(0)
        vectors = {}  # at every place that the engine has
        for site, (depth, *shape) in self.shapes.items():
            places = [(l, site) for l in range(depth)]
            for place, size in residual_rms(llm, prompts[:2], places).items():
                scale = 1 / (size * shape[-1] ** 0.5) if site == "lora_A" else 0.2 * size  # A x has size 1
                vectors[place] = scale * torch.randn(shape, generator=draw).to(llm.device)
        found = {}
        for name, given in (("base", {}), ("steered", vectors)):
            completions, _, logps = self.sample(given, prompts, 1, [max_tokens] * len(prompts), [], 1.0)
            sampled = torch.tensor([x for row in logps for x in row])

            def off(s):
                with steer(llm, s), torch.no_grad():
                    ours, mask = token_logps(llm, prompts, completions)  # noqa: B023, used at once
                return (ours[mask].cpu() - sampled).abs().mean().item()  # noqa: B023

            found[name] = off(given)
        found["effect"] = off({})
        # right engines: 1e-7 in float32, 0.002 in bfloat16, which rounds; one of 28 layers forgotten: 0.03 to 0.1
        allowed = (0.001 if llm.dtype == torch.float32 else 0.02) * found["effect"]
        if not max(found["steered"], found["base"]) < allowed:
            sys.exit(
                "vLLM and the Hugging Face model disagree, so nothing was trained or measured. Mean difference of token "
                f"log-probs: {found['steered']:.3g} nats with the same vectors, {found['base']:.3g} without any; "
                f"leaving the vectors out would make {found['effect']:.3g}. Use --sampler hf, and report the versions."
            )
        return found


def choose_sampler(sampler: str, llm, vectors: dict) -> str:
    """What samples, "hf" or "vllm" (sampler: see `open_engine`); exits with a line where vLLM cannot hold the vectors."""
    norms = [place for place in vectors if isinstance(place, tuple) and place[1].endswith("norm")]
    if sampler == "auto":
        able = llm.device.type == "cuda" and find_spec("vllm") and llm.config.architectures[0] in VLLM_MODELS and not norms
        return "vllm" if able else "hf"
    if sampler == "vllm" and norms:
        sys.exit(f"--sampler vllm: a vector after a norm ({name_of(norms[0])}) is no bias of vLLM's layers; use --sampler hf")
    return sampler


def open_engine(
    sampler: str, name: str, llm, prompts: list[list[int]], context: int, memory=0.45, tensor_parallel=1, max_rows=512,
    vectors: dict | None = None,
) -> VLLM | None:  # fmt: skip
    """
    The vLLM engine of a loaded model, tested against it on some prompts; None where the model itself is to sample.

    sampler: "hf", "vllm", or "auto" (vLLM where it is installed, the model on a CUDA device and of a kind it can steer).
    vectors: what it will be given, for their places and shapes.
    """
    if choose_sampler(sampler, llm, vectors or {}) == "hf":
        return None
    ranks = {s.shape[0] for place, s in (vectors or {}).items() if name_of(place).endswith("lora_A")}
    engine = VLLM(name, llm, context, memory, tensor_parallel, max_rows, lora_rank=max(ranks, default=0))
    found = engine.self_test(llm, [p for p in prompts if len(p) + 32 < context])
    print(
        f"vLLM agrees with Hugging Face: mean difference of token log-probs {found['steered']:.2g} nats under random vectors, "
        f"{found['base']:.2g} under none; leaving the vectors out would make {found['effect']:.2g}"
    )
    return engine


# ---------------------------------------------------------------------------------------------------- token log-probs


@contextmanager
def checkpointed(llm, above: int):
    """
    Inside the context, layers above `above` keep only their input for the backward pass and are computed again there.

    Memory for the activations of one layer instead of all; costs a second forward pass of those layers. Not reentrant: the
    reentrant kind drops gradients where no input needs one, and here a layer's only trainable part is in a hook. Layers up to
    `above`, the lowest one with a vector, need nothing: autograd stores nothing there.
    """
    blocks = decoder_layers(llm)[above + 1 :]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is visible again


def token_logps(
    llm, prompts: list[list[int]], completions: list[list[int]], temperature=1.0, chunk=1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log pi(y_t | x, y_<t) in nats of every completion token, as the sampler at this temperature draws it.

    prompts, completions: B lists of ids each. Returns (logps, mask), both (B, C), C the longest completion; mask is True
    on real tokens (it comes from the lengths: the stop token counts), logps is 0 elsewhere. Differentiable with respect
    to vectors of an enclosing `steer`; autograd stores nothing below the lowest of them, since nothing there needs a
    gradient. The head runs on completion positions only, `chunk` of them at a time: neither (B, T, V) nor (B, C, V) ever
    exists.
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
    head, cap = llm.get_output_embeddings(), getattr(llm.config, "final_logit_softcapping", None)  # cap: Gemma 2
    assert head.bias is None, "an output layer with a bias is not supported"
    scaled = [name for name in ("logits_scaling", "logit_scale") if getattr(llm.config, name, None) is not None]
    assert not scaled, f"models with {scaled} are not supported"
    if head.weight.requires_grad:  # full fine-tuning: the head's own gradient needs the logits again
        parts = zip(h.split(chunk), target.split(chunk))
        logps = torch.cat([checkpoint(_logps, x, head.weight, y, temperature, cap, use_reentrant=False) for x, y in parts])
    else:
        logps = _HeadLogps.apply(h, head.weight, target, temperature, cap, chunk)
    return torch.zeros(mask.shape, device=h.device).masked_scatter(mask, logps), mask


def _logps(h, W, target, temperature, cap):
    """Log-probs of targets under the output layer: h (n, D), W (V, D), target (n,) -> (n,), fp32."""
    logits = (h @ W.T).float()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return (logits / temperature).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)


class _HeadLogps(torch.autograd.Function):
    """
    As _logps, where the output layer is frozen.

    A function of our own, because d logp / d h = (one-hot of the target - probabilities) W / temperature can be had while the
    logits of a chunk are there: two products with W in all, and no logits kept. Autograd would keep them, checkpointing
    would compute them twice; with 152,000 tokens one product costs as much as two layers of a 7B model.
    """

    @staticmethod
    def forward(ctx, h, W, target, temperature, cap, chunk):
        logps = torch.empty(len(h), device=h.device)
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for i in range(0, len(h), chunk):
            part, y = slice(i, i + chunk), target[i : i + chunk, None]
            logits = (h[part] @ W.T).float()  # fp32, since a sum over thousands of tokens is taken of them
            if cap is not None:
                bend = torch.tanh(logits / cap)
                logits = cap * bend
            logp = (logits / temperature).log_softmax(-1)
            logps[part] = logp.gather(-1, y).squeeze(-1)
            if grad is not None:
                slope = -logp.exp()
                slope.scatter_add_(-1, y, torch.ones_like(slope[:, :1]))
                if cap is not None:
                    slope *= 1 - bend**2
                grad[part] = (slope / temperature).to(W.dtype) @ W
        ctx.save_for_backward(grad)
        return logps

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return (upstream[:, None] * grad).to(grad.dtype), None, None, None, None, None
