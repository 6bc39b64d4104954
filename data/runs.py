"""
The files between the stages: a run folder, and results that are kept so that nothing is computed twice.

train.py writes out/NAME/ with config.json, vectors.safetensors, metrics.jsonl and samples.jsonl; the other stages take
that folder and ask for no setting again.
"""

import json
import os
import shutil
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

TINY = Path(__file__).parent / "tiny"  # the embedded model; --model tiny
FAMILY = {name: TINY.with_name(name) for name in ("tiny", "tiny-instruct", "tiny-math")}  # and its relatives
FAMILY |= {path.name: path for path in sorted(TINY.parent.glob("tiny-organism-*"))}  # pretrain.py --organism


def source_of(name: str):
    """Where a model is: the folder of the built-in one or of a relative, a local folder or .gguf file, or a hub id."""
    path = FAMILY.get(name, Path(name))
    if name in FAMILY and not (path / "config.json").is_file():
        kind = name.removeprefix("tiny-").replace("organism-", "organism ", 1)
        kind = kind if kind.startswith("organism") else f"relative {kind}"
        makes = f"`python data/tiny/pretrain.py --{kind}` makes it in minutes"
        sys.exit(f"{name} is not in the repository: {makes}")
    if path.is_dir() and not (path / "config.json").is_file():
        files = "config.json, *.safetensors and the tokenizer's files; of a .gguf file give the path of the file itself"
        sys.exit(f"no model in {path}: a model folder holds {files}")
    if path.suffix == ".gguf" and not path.is_file():
        sys.exit(f"no file {path}")
    return path if path.is_dir() or path.suffix == ".gguf" else name


@contextmanager
def written(path):
    """
    Yield the path of a new file or folder, which takes the place of `path` when it is complete.

    A stop in the middle leaves the old one whole. Makes the folder around it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    yield new
    if new.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    new.replace(path)


def write(path, text: str) -> None:
    """A text file, whole or not at all."""
    with written(path) as new:
        new.write_text(text, encoding="utf-8")


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a jsonl file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def lines_of(path: Path) -> list[dict]:
    """The rows of a jsonl file, up to one that a kill or a full disk cut off; [] where there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def config_of(run) -> dict:
    """config.json of a run folder: every setting that was used."""
    path = Path(run) / "config.json"
    if not path.is_file():
        sys.exit(f"no run in {run}: a run folder of train.py holds config.json and vectors.safetensors or weights/")
    return json.loads(path.read_text(encoding="utf-8"))


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def identity(vectors: dict) -> str:
    """A checksum of vectors and their places; that of the base model is "none"."""
    some = sorted(vectors.items(), key=str)
    parts = [str(place).encode() + s.detach().float().cpu().numpy().tobytes() for place, s in some]
    return checksum(b"".join(parts)) if parts else "none"


def weights_digest(source: Path, size: int = 1 << 20) -> str:
    """A checksum of a file or folder of weights: names, lengths, first and last bytes, without reading gigabytes."""
    parts = []
    for path in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            start, length = file.read(size), file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            parts += [f"{path.name} {length}".encode(), start, file.read(size)]
    return checksum(b"".join(parts))


def base_checksum(name: str) -> str:
    """What tells a model's weights from others: of local files a checksum, of a hub model its commit."""
    source = source_of(name)
    if isinstance(source, Path):
        return weights_digest(source)
    config = try_to_load_from_cache(source, "config.json")  # .../snapshots/COMMIT/config.json
    return Path(config).parent.name if isinstance(config, str) else "unknown"


def kept(path: Path, key: dict):
    """What was written there for this key, or None. Of two keys that share a file's name the later one stays."""
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return saved["found"] if saved.get("key") == json.loads(json.dumps(key)) else None


def keep(path: Path, key: dict, found):
    """Write what was found for a key; returns it as `kept` will: tuples become lists, keys become texts."""
    text = json.dumps({"key": key, "found": found}, ensure_ascii=False)
    write(path, text + "\n")
    return json.loads(text)["found"]


# ---------------------------------------------------------------------------------------------- settings of train.py


def check(args) -> None:
    """Exit with one line for a setting of train.py that cannot work, before anything is loaded or written."""
    given = {name: value for name, value in vars(args).items() if value not in (None, "paper")}
    least = dict(steps=1, prompts=1, samples=2, max_tokens=1, warmup=1, rows=1, context=2, tensor_parallel=1)
    for name, low in (least | dict(micro_tokens=1, rank=1, numbers=1, eval_every=1, keep_every=1)).items():
        if given.get(name, low) < low:
            sys.exit(f"{flag(name)} wants at least {low}, got {given[name]}")
    for name in ("temperature", "lr", "lr_absolute", "clip"):
        if not 0 < given.get(name, 1) < 1e30:  # the numbers of the model are float32
            sys.exit(f"{flag(name)} wants a number above 0 and below 1e30, got {given[name]}")
    check_seed(args.seed)
    closed = {"lora": ("orthogonal_to", "numbers"), "full": ("site", "where", "orthogonal_to", "init", "numbers")}
    for name in closed.get(args.method, ()):
        if getattr(args, name) != getattr(type(args), name):
            suits = "vector or tiny" if name == "numbers" else "vector"
            sys.exit(f"{flag(name)} goes with --method {suits}, not with {args.method}")
    for name in ("orthogonal_to", "init") if args.numbers or args.method == "tiny" else ():
        if getattr(args, name):
            sys.exit(f"{flag(name)} is for whole vectors, not for those made of a few numbers")
    memory, cap = args.vllm_memory, args.weight_cap
    if not 0 < memory <= 1:
        sys.exit(f"--vllm-memory wants a share of the GPU's memory between 0 and 1, got {memory}")
    if cap and cap < 1:
        sys.exit(f"--weight-cap wants at least 1, or 0 for no weights, got {cap}")
    if args.eval_every and not args.eval_problems:
        sys.exit("--eval-every measures on the held-out problems: --eval-problems wants more than 0")
    if args.method == "full" and (args.tensor_parallel > 1 or args.lr == "paper"):
        reach = "its weights reach vLLM with --tensor-parallel 1 only"
        sys.exit(f"--method full has its own rate (--lr-absolute), and {reach}")
    if args.dtype == "float16":
        underflow = "gradients divided by all tokens of a batch underflow there"
        sys.exit(f"--dtype float16: {underflow}; use bfloat16 or float32")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:  # torch takes no more
        sys.exit(f"--seed wants a whole number from 0 to 2^63 - 1, got {seed}")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        sys.exit(f"--layer {text}: names a layer twice")
    return sorted(layers)


def name_of_run(args) -> str:
    """The folder's name, from train.py's settings: MODEL-layerLAYER, and every choice that is not the usual one."""
    parts = [
        (Path(args.model).name.removesuffix(".gguf"), True),
        (f"layer{args.layer}", args.method != "full"),
        ("full", args.method == "full"),
        (args.site, args.site != "end"),
        (args.where, args.where != "all"),
        (f"lora{args.rank}", args.method == "lora"),
        (f"tinylora{args.rank}", args.method == "tiny"),
        (f"numbers{args.numbers}", args.numbers),
        (f"orthogonal{len(args.orthogonal_to)}", args.orthogonal_to),
        (f"reward-{args.reward}", args.reward != "verify"),
    ]
    return "-".join(part for part, wanted in parts if wanted)


# ------------------------------------------------------------------------------------------- the run folder of train.py


def label_of(config: dict) -> str:
    """What the config says about a run's vectors: "27", "26, attention", "14, orthogonal to 2"."""
    parts = ["all weights" if config.get("method") == "full" else str(config.get("layer", "?"))]
    parts += [config.get("site")] * (config.get("site", "end") != "end")
    parts += ["answers only"] * (config.get("where", "all") != "all")
    parts += [f"LoRA of rank {config.get('rank')}"] * (config.get("method") == "lora")
    parts += [f"TinyLoRA of rank {config.get('rank')}"] * (config.get("method") == "tiny")
    few = config.get("numbers") or 0
    parts += [f"{few} number{'s' * (few > 1)}"] * (few > 0)
    earlier = config.get("orthogonal_to") or ()
    return ", ".join(parts + [f"orthogonal to {len(earlier)}"] * bool(earlier))


def check_folder(folder: Path, settings: dict, resume: bool) -> None:
    """Exit with one line where a run cannot start in this folder, or with `resume` cannot go on there."""
    if not resume:
        if (folder / "state.pt").exists():
            ways = "add --resume to go on with it, name another --out, or delete the folder"
            sys.exit(f"{folder} holds a run already: {ways}")
        return
    if not (folder / "state.pt").is_file():
        ways = "start one without --resume, or name its folder with --out"
        sys.exit(f"--resume: no run to go on with in {folder}; {ways}")
    # these change no number that was already computed
    free = ["steps", "eval_problems", "held_out", "device", "sampler", "vllm_memory", "tensor_parallel", "rows"]
    free += ["micro_tokens", "eval_every", "keep_every", "reuse", "out", "resume"]
    saved = config_of(folder)
    for name, value in json.loads(json.dumps(settings)).items():  # as the file has them: lists, not tuples
        if name not in free and saved.get(name) != value:
            had, ways = saved.get(name), f"give {flag(name)} as it was"
            sys.exit(f"--resume: the run in {folder} has {name} = {had!r}, now it is {value!r}; {ways}")


def begin(folder: Path, settings: dict, steps: int) -> None:
    """Write config.json, and drop what was logged of steps that the saved state does not contain."""
    settings = {name: value for name, value in settings.items() if name not in ("out", "resume")}
    write(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_lines(folder / name, steps)


def keep_lines(path: Path, steps: int) -> None:
    """Drop the lines of later steps (stopped between the log and the state), and one that was cut off."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines_of(path) if row["step"] < steps))


@contextmanager
def told_how_to_go_on(run):
    """Ctrl-C and a full memory end with one line."""
    try:
        yield
    except (KeyboardInterrupt, torch.OutOfMemoryError) as error:
        why = "stopped"
        if isinstance(error, torch.OutOfMemoryError):
            why = "out of memory: lower --micro-tokens (training), --rows (sampling) or --vllm-memory (vLLM's share)"
        if (run.out / "state.pt").exists():
            why += f"; the same command with --resume goes on from the last finished step in {run.out}"
        sys.exit(why)


def plot_reward(metrics: list[dict], base: float, path: Path) -> None:
    """reward.png: the share of right answers of every step, the level of the unsteered model dashed. base: 0 to 1."""
    from matplotlib.figure import Figure  # here, because most who ask for a file draw nothing

    fig = Figure(figsize=(6, 3.5), layout="constrained")
    ax = fig.subplots()
    ax.plot([m["step"] for m in metrics], [100 * m["accuracy"] for m in metrics], "o-", ms=3, label="steered, training")
    if held_out := [(m["step"], 100 * m["held_out"]) for m in metrics if "held_out" in m]:
        ax.plot(*zip(*held_out), "s", label="steered, held out")
    ax.axhline(100 * base, color="black", linestyle="--", label="base model")
    ax.set(xlabel="step", ylabel="right answers (%)", title="RLOO on steering vectors", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left")
    fig.savefig(path, dpi=150)
