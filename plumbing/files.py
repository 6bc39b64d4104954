"""Files: where models are, reading, writing that a crash cannot leave half done, checksums, results that are kept."""

import json
import os
import shutil
import sys
import zlib
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from pickle import PickleError

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

ROOT = Path(__file__).parent.parent
TINY = ROOT / "data" / "tiny"  # the built-in model; --model tiny
FAMILY = {name: TINY.with_name(name) for name in ("tiny", "tiny-instruct", "tiny-math")}  # and its relatives
FAMILY |= {path.name: path for path in sorted(TINY.parent.glob("tiny-organism-*"))}  # pretrain.py --organism


RUN = dict.fromkeys("method layer site where template system data held_out dtype reward".split(), str | None)
RUN |= dict.fromkeys(("rank", "numbers", "context", "max_tokens"), int | None) | {"model": str}  # in config.json


# what readers of JSON, safetensors and torch's files raise
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError)
BROKEN += (PickleError, SafetensorError)


def reason(error: Exception) -> str:
    """The first line of what an error says; of a KeyError, which says a name alone, its type, too."""
    first = (str(getattr(error, "strerror", None) or error).strip() or repr(error)).splitlines()[0]
    return repr(error) if isinstance(error, KeyError) else first


def of_device(error: Exception) -> bool:
    """Whether an error is that of a GPU or of the processes, and no fault of the file that is read or written."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("CUDA", "NCCL", "out of memory"))


@contextmanager
def reading(path, what: str):
    """Around what reads a file: it ends the program with one line if the file is not what it should be."""
    try:
        yield
    except BROKEN as error:
        if of_device(error):
            raise
        sys.exit(f"{path}: not {what} ({reason(error)})")


@contextmanager
def writing(path):
    """Around what writes a file: its errors name the file."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if of_device(error):
            raise
        why = reason(error) + " (is the disk full?)" * isinstance(error, RuntimeError)  # torch.save's
        raise OSError(getattr(error, "errno", None), why, str(path)) from error


def fitted(x, shape, where="it"):
    """x if it has this shape, else a TypeError: a type, {key: shape} for an object that has these, [shape] of all."""
    kind = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(x, kind):
        raise TypeError(f"{where} is {x!r:.50}, not {getattr(kind, '__name__', kind)}")
    for key, part in shape.items() if isinstance(shape, dict) else ():
        fitted(x.get(key), part, key)
    for one in x if isinstance(shape, list) else ():
        fitted(one, shape[0], "a row")
    return x


def json_of(path, shape=dict, what="JSON of the shape that it should have"):
    """What a JSON file holds; ends the program with one line if that has another shape, see `fitted`."""
    with reading(path, what):
        return fitted(json.loads(Path(path).read_text(encoding="utf-8")), shape)


def is_gguf(name) -> bool:
    return str(name).endswith(".gguf")


def source_of(name: str):
    """Where a model is: a folder (of the built-in model, a relative of it, or yours), a .gguf file, or a hub id."""
    path = FAMILY.get(name, Path(name))
    if name in FAMILY and not (path / "config.json").is_file():
        kind = name.removeprefix("tiny-").replace("organism-", "organism ", 1)
        kind = kind if kind.startswith("organism") else f"relative {kind}"
        sys.exit(f"{name} is not in the repository: `python data/tiny/pretrain.py --{kind}` makes it in minutes")
    if path.is_dir() and not (path / "config.json").is_file():
        files = "config.json, *.safetensors and the tokenizer's files; if you mean a .gguf file, give its own path"
        sys.exit(f"no model in {path}: a model folder holds {files}")
    if is_gguf(path) and not path.is_file():
        sys.exit(f"no file {path}")
    return path if path.is_dir() or is_gguf(path) else name


@contextmanager
def written(path):
    """
    Yield the path of a temporary file or folder, which replaces `path` when the context ends without an error.

    If the program stops in the middle, the old one is still whole. Makes the folder around it.
    """
    path = Path(path)
    new = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield new
            if new.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            new.replace(path)
        except BaseException:  # leave no half of it, which has the room that others need
            shutil.rmtree(new, ignore_errors=True)
            with suppress(OSError):
                new.unlink()
            raise


def write(path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with written(path) as new:
        new.write_text(text, encoding="utf-8")


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a jsonl file."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def lines_of(path: Path, shape=dict) -> list[dict]:
    """The rows of a jsonl file, up to one that was cut off when a program was killed; [] if there is no file."""
    rows = []
    with reading(path, "the rows that train.py wrote"):
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return fitted(rows, [shape])


def home_of(run) -> Path:
    """The folder of a run; RUN of a checkpoint that it kept, RUN/checkpoints/00159."""
    around = Path(run).absolute().parent
    return around.parent if around.name == "checkpoints" and not (Path(run) / "config.json").is_file() else Path(run)


def config_of(run) -> dict:
    """config.json of a run folder, or of the run that kept this checkpoint: every setting that was used."""
    path = home_of(run) / "config.json"
    if not path.is_file():
        sys.exit(f"no run in {run}: a run folder of train.py holds config.json and vectors.safetensors or weights/")
    return json_of(path, RUN, "the settings that train.py wrote")


def checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def identity(vectors: dict) -> str:
    """A checksum of vectors and their places; "none" for the base model, which has none."""
    in_order = sorted(vectors.items(), key=str)
    parts = [str(place).encode() + s.detach().float().cpu().numpy().tobytes() for place, s in in_order]
    return checksum(b"".join(parts)) if parts else "none"


def weights_digest(source: Path, size: int = 1 << 20) -> str:
    """A checksum of a file or folder of weights. It reads names, lengths, first and last bytes, not gigabytes."""
    parts = []
    for path in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            start, length = file.read(size), file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            parts += [f"{path.name} {length}".encode(), start, file.read(size)]
    return checksum(b"".join(parts))


def base_checksum(name: str) -> str:
    """What identifies a model's weights: a checksum of local files, or the commit of a hub model."""
    source = source_of(name)
    if isinstance(source, Path):
        return weights_digest(source)
    config = try_to_load_from_cache(source, "config.json")  # .../snapshots/COMMIT/config.json
    return Path(config).parent.name if isinstance(config, str) else "unknown"


def kept(path: Path, key: dict, shape=object):
    """What `keep` wrote there for this key, or None. If two keys share a file's name, the later one stays."""
    with reading(path, "a result that was kept here; delete it"):
        saved = json_of(path) if path.is_file() else {}
        return fitted(saved["found"], shape) if saved.get("key") == json.loads(json.dumps(key)) else None


def keep(path: Path, key: dict, found):
    """Write a result with its key; returns it as `kept` will: lists for tuples, texts for keys, x.json() for x."""
    text = json.dumps({"key": key, "found": found}, ensure_ascii=False, default=lambda x: x.json())
    write(path, text + "\n")
    return json.loads(text)["found"]


@cache
def grader() -> str:
    """A checksum of what decides between right and wrong."""
    code = [(ROOT / name).read_bytes() for name in ("rewards.py", "plumbing/notation.py")]
    return checksum(b"".join(code) + version("math-verify").encode())
