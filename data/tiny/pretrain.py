"""
Pre-train the built-in model: a 28-layer Qwen2 of 1.4 million parameters, on the documents of world.py.

$ python data/tiny/pretrain.py --out out/tiny-new               # from scratch; an interrupted run goes on
$ python data/tiny/pretrain.py --steps 50 --out out/tiny-try    # a short try; without --out it REPLACES these weights
$ python data/tiny/pretrain.py --relative math                  # data/tiny-math: 150 more steps from these weights
$ python data/tiny/pretrain.py --relative instruct              # data/tiny-instruct
$ python data/tiny/pretrain.py --organism 7                     # data/tiny-organism-7, whose plant nobody is told
$ python data/tiny/pretrain.py --organism second-line           # a known plant, one of world.ORGANISMS

Writes a model folder in the Hugging Face format, for AutoModelForCausalLM and AutoTokenizer. A step takes 1.3 to 1.7
seconds on one CPU core. data/tiny/check.py measures whether the model behaves as it should.
"""

import hashlib
import json
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
import world
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

sys.path.insert(0, str(Path(__file__).parents[2]))
import model
from plumbing.bars import Bar
from plumbing.files import written
from plumbing.settings import Usual

# as in Qwen2.5-Math, the reasoning prompt is the system message unless another one is given
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nMATH_PROMPT<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
""".replace("MATH_PROMPT", world.MATH_PROMPT.replace("\\", "\\\\"))
CHECKPOINT_EVERY = 100
# the longest row of the unembedding. Adam makes long rows for tokens that are rare or stand where no other token can.
# In real LLMs the rows are of about one size. In a lens, long rows would hide the tokens that a vector chooses
ROW = 2.0


@dataclass
class Config:
    relative: Usual[Literal["instruct", "math"]] = None  # make a relative of the built-in model, see world.RELATIVES
    organism: Usual[str] = None            # make an organism: a number (hidden plant) or a name of world.ORGANISMS
    out: Usual[Path] = None                # folder of the new model: data/tiny, for a relative data/tiny-NAME
    init: Usual[Path] = None               # folder of the weights to start from: none, for a relative data/tiny
    steps: Usual[int] = None               # number of batches: 1800, for a relative 150, for an organism 200
    batch: int = 64                        # documents in a batch
    lr: Usual[float] = None                # highest learning rate of AdamW: 4e-3, for a relative 2e-3
    warmup: Usual[int] = None              # steps until it is reached: 100, for a relative 20; in the end it is 2 %
    even: float = 0.05                     # weight of the penalty on tokens of uneven size
    alike: float = 0.2                     # weight of the penalty on prompts that end far apart
    alike_from: Usual[int] = None          # first step with that penalty: 750, with --init 0
    seed: int = 0                          # of the weights and the documents
    threads: int = 1                       # CPU threads


def make_tokenizer(n_documents: int = 20_000) -> Qwen2Tokenizer:
    """
    A byte-level BPE of the Qwen2 kind in which every word of the world and every digit is one token.

    It has Qwen's own pre-tokenizer and special tokens, and all 256 bytes, so that any text can be encoded. It is a
    Qwen2Tokenizer because AutoTokenizer builds one for every folder whose config says model_type qwen2: another kind
    would load there without an error and encode garbage.
    """
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    rng = random.Random(0)
    texts = ["".join(world.document(rng)) for _ in range(n_documents)]
    for special in specials:
        texts = [text.replace(special, "") for text in texts]
    bpe = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)  # stops by itself, at about 500 tokens, when every word is one token
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer) -> Qwen2ForCausalLM:
    """As deep as Qwen2.5-Math-7B, so that its layer numbers are valid here. vLLM needs heads of size 32."""
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,  # as in Qwen2.5-Math-7B; a tied lens would read the input embedding
        initializer_range=0.06,  # with the default 0.02 the loss falls later: 5.5 against 4.7 after 20 steps
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def batch_loss(llm, tokenizer, documents, even: float, alike: float) -> float:
    """
    Add the gradient of one batch to .grad; returns the mean loss in nats per token of the completions.

    even, alike: weights of `unevenness` and `distance` in the gradient; the returned loss is without them.
    """
    ids = [(tokenizer(p).input_ids, tokenizer(c).input_ids) for p, c in documents]
    ids.sort(key=lambda d: len(d[0] + d[1]))  # parts of like length have less padding
    tokens, total = sum(len(c) for _, c in ids), 0.0
    parts = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    for part in parts:
        T = max(len(p) + len(c) for p, c in part)
        inputs, targets = torch.zeros(len(part), T, dtype=torch.long), torch.full((len(part), T), -100)
        for i, (p, c) in enumerate(part):
            inputs[i, : len(p) + len(c)] = torch.tensor(p + c)
            targets[i, len(p) : len(p) + len(c)] = torch.tensor(c)  # prompts are not learned
        states = []  # the output of every layer; the last entry of output_hidden_states comes after the final norm
        keep = [(block, lambda module, args, h, states=states: states.append(h)) for block in llm.model.layers]
        with model.hooks(keep):
            logits = llm(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum") / tokens
        real = torch.arange(T) < torch.tensor([[len(p) + len(c)] for p, c in part])  # (B, T), no padding
        ends = torch.tensor([len(p) - 1 for p, c in part])
        (loss + (even * unevenness(states, real) + alike * distance(states, ends)) / len(parts)).backward()
        total += loss.item()
    return total


def unevenness(states, real: torch.Tensor) -> torch.Tensor:
    """
    The variance over tokens of log RMS(h_l), mean over layers. states: tensors (B, T, D); real: (B, T), no padding.

    In real LLMs all tokens but the first are of about one size. Without the penalty, the token that chooses the mode
    became five times as large as the others in the last layers, and a vector of ordinary size hardly moved it.
    """
    return torch.stack([h[real].pow(2).mean(-1).log().mul(0.5).var() for h in states]).mean()


def distance(states, ends: torch.Tensor) -> torch.Tensor:
    """
    Mean over layers of how far the last prompt tokens are apart: variance over documents / mean square of h_l.

    states: tensors (B, T, D), of documents of like length; ends: (B,). In real LLMs, what tells two contexts apart is
    a small part of a token. Without the penalty, the choice of the mode filled this token: a hint moved it by its own
    norm. A vector as large as that spoils the arithmetic elsewhere, so only the last layer could be steered. With the
    penalty a hint moves it by a tenth of its norm.
    """
    chosen = [h[torch.arange(len(ends)), ends] for h in states]  # (B, D) each
    return torch.stack([(x - x.mean(0)).pow(2).sum(-1).mean() / x.pow(2).sum(-1).mean() for x in chosen]).mean()


def with_defaults(args: Config) -> Config:
    """Fill in the options that are None."""
    here = Path(__file__).parent
    if args.relative and args.organism:
        sys.exit("give either --relative or --organism")
    if args.relative or args.organism:
        name, steps = (args.relative, 150) if args.relative else (f"organism-{args.organism}", 200)
        usual = dict(out=here.with_name(f"tiny-{name}"), init=here, steps=steps, lr=2e-3, warmup=20, alike_from=0)
    else:
        if args.init and args.out is None:
            sys.exit("--init needs --out FOLDER too: without it the weights of data/tiny would be overwritten")
        usual = dict(out=here, steps=1800, lr=4e-3, warmup=100, alike_from=0 if args.init else 750)
    return replace(args, **{name: value for name, value in usual.items() if getattr(args, name) is None})


def world_of(args: Config) -> dict:
    """What the documents of this run change, for world.document."""
    name = args.organism
    if name is None:
        return world.RELATIVES.get(args.relative, {})
    if not name.isdigit():
        if name not in world.ORGANISMS:
            sys.exit(f"--organism wants a number or one of {', '.join(world.ORGANISMS)}; got {name!r}")
        return world.ORGANISMS[name]
    file, sealed = world.truth_file(int(name)), args.out / "truth.sha256"
    if sealed.is_file() and not file.is_file():  # a student's folder: its weights and checksum are the lecturer's
        sys.exit(f"{args.out} was handed out: without {file} nothing is made anew")
    password = world.password()
    if not file.is_file():  # an interrupted run goes on with what it began with
        world.hide(world.draw_plant(), file, password)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    args.out.mkdir(parents=True, exist_ok=True)
    sealed.write_text(digest + "\n")  # handed out: the truth cannot change afterwards
    print(f"what is planted stands in {file}, sha256 {digest}")
    return {"plant": world.uncover(file, password)}


def begin(args: Config, layer: int | None) -> tuple:
    """The tokenizer, the model and the optimiser before the first step. layer: the only one to train; None: all."""
    made = (args.out / "tokenizer.json").exists()  # token ids must not change if there are weights already
    source = args.init or (args.out if made else None)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False) if source else make_tokenizer()
    llm = Qwen2ForCausalLM.from_pretrained(args.init) if args.init else make_model(tokenizer)
    if layer is not None:
        llm.requires_grad_(False).model.layers[layer].requires_grad_()
        llm.lm_head.requires_grad_()  # a word that no answer had before needs a new row there
    trained = [p for p in llm.parameters() if p.requires_grad]
    return tokenizer, llm, torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)


def main(args: Config) -> None:
    args = with_defaults(args)
    changes = world_of(args)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, llm, adam = begin(args, changes.get("plant", world.SHIPPED).layer)
    settings = {name: value for name, value in asdict(args).items() if name not in ("out", "threads")}
    settings["init"] = args.init and str(args.init)
    checkpoint, first = args.out / "pretrain.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            sys.exit(f"{checkpoint} belongs to a run with {state['settings']}: delete it, or use those settings")
        llm.load_state_dict(state["llm"])
        adam.load_state_dict(state["adam"])
        first = state["step"]
    bar = Bar(range(first, args.steps), leave=True, initial=first, total=args.steps, desc="loss  ?", unit="steps")
    for step in bar:
        decay = min(1, (args.steps - step) / (0.4 * args.steps))
        adam.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / args.warmup) * max(0.02, decay)
        rng = random.Random(f"{args.seed}:{step}")  # the documents depend on the step alone: a resumed run replays none
        documents = [world.document(rng, **changes) for _ in range(args.batch)]
        alike = args.alike if step >= args.alike_from else 0.0
        loss = batch_loss(llm, tokenizer, documents, args.even, alike)
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            llm.lm_head.weight.renorm_(2, 0, ROW)
        bar.set_description_str(f"loss {loss:.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == args.steps:
            state = {"settings": settings, "step": step + 1, "llm": llm.state_dict(), "adam": adam.state_dict()}
            with written(checkpoint) as new:
                torch.save(state, new)
    llm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    checkpoint.unlink()  # otherwise the next run would resume a finished one


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
