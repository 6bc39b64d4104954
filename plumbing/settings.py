"""
Settings. How a model is asked (Asking) is common to all three programs. For train.py: the defaults of each model, the
checks, the name of a run, and what a resumed run must not change.

The authors' settings are a table in data/paper.json, by model and by the data that they trained it on.
"""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import tyro

from data.problems import MOST_SAMPLES, Problems, problems_of
from plumbing.files import FAMILY, ROOT, config_of, lines_of, write
from plumbing.processes import state_of

T = TypeVar("T")
# an option that may be left out. Its comment says what happens then, so --help does not add "(default: None)"
Usual = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
Several = Annotated[tuple[T, ...], tyro.conf.arg(help_behavior_hint="")]  # the same for a list, empty if it is left out

# settings that change no number: a resumed run or a kept result may differ in them
CHANGE_NO_NUMBER = ("device", "sampler", "vllm_memory", "tensor_parallel", "rows", "out")


def own_first(config):
    """Put the fields that a dataclass defines before those that it inherits, in --help too."""
    all_fields = config.__dataclass_fields__
    config.__dataclass_fields__ = {name: all_fields[name] for name in [*config.__annotations__, *all_fields]}
    return config


@dataclass(kw_only=True)
class Asking:
    """How a model is asked. train.py, evaluate.py and analyze.py have these settings in common."""

    template: Usual[Literal["native", "qwen-math", "r1"]] = None  # of the prompt: the run's; else native, or r1
    system: Usual[str] = None              # system message: the run's; else to reason step by step, with a boxed answer
    context: Usual[int] = None             # tokens of prompt and answer: the model's own, at most 32768
    max_tokens: Usual[int] = None          # longest answer in tokens: the run's; tiny: 80, else what the context leaves
    sampler: Literal["auto", "hf", "vllm"] = "auto"  # auto: vLLM if it is installed and a GPU is there, else hf
    vllm_memory: float = 0.45              # share of the GPU's memory for vLLM, beside the Hugging Face model
    tensor_parallel: int = 1               # GPUs that one vLLM engine is spread over
    rows: int = 512                        # most answers sampled at once; all answers to a prompt are sampled together
    device: str = "auto"                   # cpu, cuda, ...; auto: a GPU if there is one
    dtype: str = "auto"                    # of the frozen model: float32 or bfloat16; vectors are always float32


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def at_least(args, **lows: int) -> None:
    """Exit with one line if a setting is below its smallest value; all values of a tuple are checked."""
    for name, low in lows.items():
        value = getattr(args, name)
        for one in value if isinstance(value, tuple) else [value]:
            if one is not None and not one >= low:  # "not >=" catches nan, too
                sys.exit(f"{flag(name)} wants at least {low}, got {one}")
            if name == "samples" and (one or 0) > MOST_SAMPLES:
                sys.exit(f"--samples wants at most {MOST_SAMPLES}, got {one}")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:  # torch's limit
        sys.exit(f"--seed wants a whole number from 0 to 2^63 - 1, got {seed}")


def check(args) -> None:
    """Exit with one line for a setting of train.py that cannot work, before anything is loaded or written."""
    at_least(args, steps=1, prompts=1, samples=2, max_tokens=1, warmup=1, rows=1, context=2, tensor_parallel=1)
    at_least(args, micro_tokens=1, rank=1, numbers=1, eval_every=1, keep_every=1, eval_problems=0)
    for name in ("temperature", "lr", "lr_absolute", "clip"):
        value = getattr(args, name)
        if value not in (None, "paper") and not 0 < value < 1e30:  # must be a float32 number
            sys.exit(f"{flag(name)} wants a number above 0 and below 1e30, got {value}")
    check_seed(args.seed)
    useless = {"lora": ("orthogonal_to", "numbers"), "full": ("site", "where", "orthogonal_to", "init", "numbers")}
    for name in useless.get(args.method, ()):
        if getattr(args, name) != getattr(type(args), name):
            suits = {"orthogonal_to": "vector", "init": "vector or lora", "numbers": "vector or tinylora"}
            suits = suits.get(name, "vector, lora or tinylora")
            sys.exit(f"{flag(name)} goes with --method {suits}, not with {args.method}")
    for name in ("orthogonal_to", "init") if args.numbers or args.method == "tinylora" else ():
        if getattr(args, name):
            sys.exit(f"{flag(name)} is for whole vectors, not for those made of a few numbers")
    if not 0 < args.vllm_memory <= 1:
        sys.exit(f"--vllm-memory wants a share of the GPU's memory between 0 and 1, got {args.vllm_memory}")
    if args.weight_cap and not args.weight_cap >= 1:
        sys.exit(f"--weight-cap wants at least 1, or 0 for no importance weights, got {args.weight_cap}")
    if args.eval_every and not args.eval_problems:
        sys.exit("--eval-every needs held-out problems: --eval-problems wants more than 0")
    if args.method == "full" and args.lr == "paper":
        sys.exit("--method full has a learning rate of its own: give --lr-absolute instead of --lr")
    if args.method == "full" and args.tensor_parallel > 1:
        sys.exit("--method full can give its weights to vLLM only inside one process: --tensor-parallel wants 1")
    if args.dtype == "float16":
        sys.exit("--dtype float16: gradients are small and would underflow to 0; use bfloat16 or float32")


def check_measuring(args) -> None:
    """Exit with one line for a setting of evaluate.py that cannot work."""
    if args.run is None and args.model is None:
        sys.exit("give a run folder (python evaluate.py out/NAME) or a base model (--model tiny)")
    at_least(args, problems=1, samples=1, max_tokens=1, rows=1, context=1, tensor_parallel=1, temperatures=0)
    if not args.strength or not all(abs(x) < 1e6 for x in args.strength):
        sys.exit(f"--strength wants numbers, got {' '.join(map(str, args.strength)) or 'none'}")
    if len(args.strength) > 1 and args.ask is None:
        sys.exit("--strength takes several numbers with --ask alone: measure one after the other")
    if args.strength != (1.0,) and (args.run is None or args.checkpoints):
        sys.exit("--strength scales the vectors of a run, and goes not with --checkpoints")
    if args.benchmarks and args.data:
        sys.exit("give either --benchmarks or --data")
    if args.checkpoints and (args.run is None or args.model):
        sys.exit("--checkpoints wants a run folder of train.py --keep-every N, and no --model")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("evaluate.py runs as one process, not under torchrun; --tensor-parallel N spreads vLLM over N GPUs")


def parse_layers(text: str, depth: int) -> list[int]:
    """The layers of --layer: "27" -> [27]; "-1" -> [depth - 1]; "3,14" -> [3, 14]; "all" -> [0, ..., depth - 1]."""
    if text == "all":
        return list(range(depth))
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        sys.exit(f"--layer wants a layer number, numbers joined by commas, or all; got {text!r}")
    if outside := [layer for layer in layers if not -depth <= layer < depth]:
        sys.exit(f"--layer {outside[0]}: this model has layers 0 to {depth - 1} (or -{depth} to -1 from the end)")
    layers = [layer % depth for layer in layers]
    if len(set(layers)) < len(layers):
        sys.exit(f"--layer {text} names a layer twice")
    return sorted(layers)


# ------------------------------------------------------------------------------------------------------------ defaults

# problems for the comparison at the end, by training data
HELD_OUT = {"tiny": "data/tiny/test.jsonl", "gsm8k": "data/gsm8k_test.jsonl"}
HELD_OUT |= dict.fromkeys(("deepscaler", "math"), "data/math500.jsonl")


def authors(model: str, recipe: str | None) -> dict:
    """
    How the authors trained a model: prompts, samples, context, epochs and "lr" (the rates); else {"lr": {}}.

    model: only the last part of its name counts, so a local copy is recognised. recipe: deepscaler, gsm8k or math.
    """
    models = json.loads((ROOT / "data" / "paper.json").read_text(encoding="utf-8"))["authors"]["models"]
    entry = next((entry for hub, entry in models.items() if Path(hub).name == Path(model).name), {})
    return entry.get(recipe) or entry.get("deepscaler") or {"lr": {}}


def authors_rate(args, layer: int) -> float | None:
    """
    The authors' learning rate for this layer under train.py's settings; None if paper.json has none.

    They trained either one layer or all of them together, with a different rate.
    """
    what = f"lora{args.rank}" if args.method == "lora" else "vector"
    what += f" at {args.site}" * (args.site != "end")
    where = "all layers" if args.layer == "all" else f"layer {layer}"
    return None if "," in args.layer else authors(args.model, args.recipe)["lr"].get(f"{what}, {where}")


def recipe(model: str, method: str = "vector", source: str | None = None) -> dict:
    """
    Defaults of train.py: those of the built-in model, or the authors' if they trained this model, or general ones.

    source: where the training problems come from: "tiny", "deepscaler", "gsm8k" or "math". None stands for your own
    problems: DeepScaleR's settings are used, and no other file is taken as held out.
    """
    held_out = HELD_OUT.get(source)
    found = dict(held_out=held_out if held_out and (ROOT / held_out).is_file() else None, epochs=1)
    if model in FAMILY:
        found |= dict(steps=40, prompts=16, samples=16, context=512, max_tokens=80, warmup=3, micro_tokens=4096)
        found["lr"], full_rate = 0.06, 3e-4
    else:
        known = authors(model, source)
        found |= dict(prompts=128, samples=16, context=8192, micro_tokens=16384)
        found |= {name: known[name] for name in ("prompts", "samples", "context", "epochs") if name in known}
        full_rate = known["lr"].get("full", 1e-6)
    if method == "tinylora":
        found["numbers"] = 13  # arXiv:2602.04118
    if method == "full":
        found["lr_absolute"] = full_rate
    return found


def with_defaults(args) -> tuple:
    """(args with every default of the recipe filled in, training problems, epochs)."""
    tiny = args.model in FAMILY
    usual = "data/tiny/train.jsonl" if tiny else "data/deepscaler.jsonl"
    if args.data is None and not (ROOT / usual).is_file():
        sys.exit(f"no problems at {usual}: run `python data/prepare.py deepscaler math500`, or give --data FILE")
    problems: Problems = problems_of(args.data or usual)
    source = args.recipe or (problems.source if args.data else "tiny" if tiny else "deepscaler")
    found = recipe(args.model, args.method, source)
    if args.method == "full" and args.lr_absolute is None and not tiny:
        known = "full" in authors(args.model, source)["lr"]
        whose = "the authors' rate for this model" if known else "as usual; the authors' rate for it is not known"
        print(f"all weights: {found['lr_absolute']:g} a step, {whose}")
    epochs = found.pop("epochs")
    found |= {"data": usual, "recipe": source}
    args = replace(args, **{name: value for name, value in found.items() if getattr(args, name) is None})
    return args, problems, epochs


def with_rate(args, layers: list[int]):
    """args with the learning rate filled in: the authors', or a share of RMS(h_l) that falls with --steps."""
    if args.method == "full" or args.lr_absolute is not None:
        return args
    known = all(authors_rate(args, layer) for layer in layers)
    if args.lr == "paper" and not known:
        sys.exit(f"--lr paper: data/paper.json has no rate for these layers of {args.model!r}; leave --lr out")
    return replace(args, lr=args.lr or ("paper" if known else 0.06 * min(1, (32 / args.steps) ** 0.5)))


# ------------------------------------------------------------------------------------------------------ the run folder


def unusual(config: dict) -> list[tuple[str, str]]:
    """What is special about a run: [(for the name of its folder, for a label in a table)]."""
    method, rank, numbers = config.get("method"), config.get("rank"), config.get("numbers") or 0
    site, where, reward = config.get("site", "end"), config.get("where", "all"), config.get("reward", "verify")
    earlier = len(config.get("orthogonal_to") or ())
    choices = [
        (site != "end", site, site),
        (where != "all", where, f"{where}s only"),
        (method == "lora", f"lora{rank}", f"LoRA of rank {rank}"),
        (method == "tinylora", f"tinylora{rank}", f"TinyLoRA of rank {rank}"),
        (numbers, f"numbers{numbers}", f"{numbers} number{'s' * (numbers > 1)}"),
        (earlier, f"orthogonal{earlier}", f"orthogonal to {earlier}"),
        (reward != "verify", f"reward-{reward}", f"{reward} reward"),
    ]
    return [(name, label) for special, name, label in choices if special]


def stem_of(model: str) -> str:
    """A model's name in the name of a folder: "Qwen/Qwen2.5-0.5B" -> "Qwen2.5-0.5B", "a/b.gguf" -> "b"."""
    return Path(os.path.abspath(model)).name.removesuffix(".gguf")  # abspath: "." has a name, too


def name_of_run(args) -> str:
    """The folder's name, from train.py's settings: MODEL-layerLAYER and what is special."""
    what = "full" if args.method == "full" else f"layer{args.layer}"
    return "-".join([stem_of(args.model), what, *(name for name, _ in unusual(vars(args)))])


def label_of(config: dict) -> str:
    """A run in a table: "27", "26, attention", "14, orthogonal to 2"."""
    what = "all weights" if config.get("method") == "full" else str(config.get("layer", "?"))
    return ", ".join([what, *(label for _, label in unusual(config))])


def check_folder(folder: Path, settings: dict, resume: bool) -> None:
    """Exit with one line if a run cannot start in this folder, or if it cannot be resumed there."""
    exists = (folder / "state.pt").is_file()
    if exists and not resume:
        ways = "add --resume to go on with it, name another --out, or delete the folder"
        sys.exit(f"{folder} holds a run already: {ways}")
    if not resume:
        return
    if not exists:
        sys.exit(f"--resume: no run to go on with in {folder}; leave --resume out, or name the run's folder with --out")
    free = (*CHANGE_NO_NUMBER, "steps", "held_out", "eval_problems", "eval_every", "keep_every", "resume")
    free += ("micro_tokens", "recompute", "read_once", "reuse", "prompt_day")
    saved = config_of(folder)
    for name, value in json.loads(json.dumps(settings)).items():  # tuples become lists, as in the file
        if name not in free and (had := saved.get(name)) != value:
            change = f"has {name} = {had!r}, now it is {value!r}"
            sys.exit(f"--resume: the run in {folder} {change}; give {flag(name)} as it was")


def begin(folder: Path, settings: dict, steps: int) -> None:
    """Write config.json, and drop the log of steps that came after the saved state."""
    settings = {name: value for name, value in settings.items() if name not in ("out", "resume")}
    logs = {name: lines_of(folder / name, {"step": int}) for name in ("metrics.jsonl", "samples.jsonl")}
    write(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    for name, rows in logs.items():
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["step"] < steps]
        write(folder / name, "".join(rows))


@contextmanager
def told_how_to_go_on(run):
    """Inside the context, Ctrl-C and a full memory end with one line that says what to do."""
    try:
        yield
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        full = "out of memory: lower --micro-tokens (training), --samples or --max-tokens (sampling: all answers to a "
        full += "prompt are decoded together) or --vllm-memory (vLLM's share)"
        why = full if isinstance(error, torch.OutOfMemoryError) else "stopped"
        if (run.out / "state.pt").exists():
            why += f"; the same command with --resume goes on from the last finished step in {run.out}"
        sys.exit(why)


def folders_of(run: Path) -> dict[int, Path]:
    """{steps done: folder} of the checkpoints, and of the run itself, whose step is the last."""
    found = {int(path.name): path for path in sorted((run / "checkpoints").glob("[0-9]*")) if path.name.isdigit()}
    if not found:
        sys.exit(f"no checkpoints in {run}: train with --keep-every N, for example 53 as the authors")
    return found | {state_of(run / "state.pt")["step"]: run}
