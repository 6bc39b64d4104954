"""
Files and settings that are not what they should be: every command ends with one line that names the path or option.

The commands run inside this process, in a folder with a model of 3 layers and runs of it. Each case breaks one thing
there first. Demanded of all: the exit code is not 0, the last line of stderr names what is wrong, there is no
traceback, and no file that was there has changed.
"""

import copy
import io
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, random_llm
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

import analyze
import evaluate
import model
import train
from data import prepare
from data import problems as problem_files
from data.problems import prompt_ids
from plumbing import export, files
from plumbing.console import one_line

TRAIN = "train.py --model model --data problems.jsonl --held-out problems.jsonl --eval-problems 2 --steps 1 --prompts 2"
TRAIN += " --samples 2 --max-tokens 3 --context 400"
EVALUATE = "--problems 2 --max-tokens 3 --temperatures 0"
PROBLEMS = [{"problem": f"Start with {n}, add 3. What is the result?", "answer": str(n + 3)} for n in range(4)]


def call(command: str):
    """What a terminal would do with a command line, without a process of its own."""
    name, *given = shlex.split(command)
    if name == "plumbing/export.py":
        return tyro.cli(export.export, args=given)
    module = {"train.py": train, "evaluate.py": evaluate, "analyze.py": analyze, "data/prepare.py": prepare}[name]
    return module.main(tyro.cli(module.Config, args=given))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, problems, and finished runs of vectors, a LoRA and all weights."""
    folder, before = tmp_path_factory.mktemp("world"), Path.cwd()
    random_llm(vocab_size=498, max_position_embeddings=512).save_pretrained(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "data" / "tiny" / file, folder / "model")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    os.chdir(folder)
    try:
        call(f"{TRAIN} --layer 1 --out out/run --keep-every 1")
        call(f"{TRAIN} --layer 1 --out out/lora --method lora")
        call(f"{TRAIN} --out out/full --method full --layer all")
        call(f"evaluate.py out/run {EVALUATE}")
    finally:
        os.chdir(before)
    return folder


# ------------------------------------------------------------------------------------------------- ways to break a file


def put(path, content):
    """Write a text, bytes, or what stands for JSON; make the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def change(path, **changes):
    """Change fields of a JSON object; those that become ... are taken out."""
    now = json.loads(Path(path).read_text()) | changes
    put(path, {key: value for key, value in now.items() if value is not ...})


def cut(path, share=0.5):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])


def tensors(path, edit, **meta):
    """Change the tensors of a safetensors file with edit(dict), and its metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        says = file.metadata()
    found = load_file(path)
    edit(found)
    save_file(found, path, says | meta)


def rewrite(path, edit):
    """Change the rows of a jsonl file with edit(row)."""
    rows = [edit(json.loads(line)) for line in Path(path).read_text().splitlines()]
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def state(edit):
    """Change what is in state.pt."""
    found = torch.load("out/run/state.pt", weights_only=True)
    torch.save(edit(found) or found, "out/run/state.pt")


class Evil:
    def __reduce__(self):
        return print, ("this pickle ran",)


def encoder(config, kind, **sizes):
    """Another kind of model in the folder."""
    kind(config(vocab_size=498, **sizes)).save_pretrained("model")


def link_to_itself(path):
    os.symlink(path, path)


DEEP = "[" * 100_000
VECTORS, STATE, CONFIG = "out/run/vectors.safetensors", "out/run/state.pt", "out/run/config.json"
MODEL, METRICS = "model/config.json", "metrics.jsonl"
WEIGHTS, TOKENIZER, TEMPLATE = "model/model.safetensors", "model/tokenizer.json", "model/chat_template.jinja"
RESUME = f"{TRAIN} --layer 1 --out out/run --keep-every 1 --steps 2 --resume"
RUN, BASE = f"evaluate.py out/run {EVALUATE}", f"evaluate.py --model model --data problems.jsonl {EVALUATE}"
MINE = "mine.jsonl"


def problems(content):
    return lambda: put(MINE, content)


def metrics(content):
    return lambda: put("out/run/metrics.jsonl", content)


CASES = {  # what it is: (how it is broken, the command, what the last line of stderr names)
    # ---- problems
    "problems in latin-1": (problems('{"problem": "é"}'.encode("latin-1")), f"{TRAIN} --data {MINE}", MINE),
    "problems in UTF-16": (problems('{"problem": "a", "answer": 1}'.encode("utf-16")), f"{BASE} --data {MINE}", MINE),
    "binary problems": (problems(bytes(range(256))), f"{BASE} --data {MINE}", MINE),
    "no problems": (problems(""), f"{BASE} --data {MINE}", MINE),
    "a lone surrogate": (problems('{"problem": "\\ud800", "answer": 1}'), f"{BASE} --data {MINE}", MINE),
    "a gold with a surrogate": (problems('{"problem": "a", "answer": "\\ud800"}'), f"{BASE} --data {MINE}", MINE),
    "a number of 5000 digits": (problems('{"answer": 1' + "9" * 5000 + "}"), f"{BASE} --data {MINE}", MINE),
    "deep nesting": (problems('{"problem": "a", "answer": ' + DEEP), f"{BASE} --data {MINE}", MINE),
    "problems that are a list": (problems([{"problem": "a", "answer": "1"}]), f"{BASE} --data {MINE}", MINE),
    "a problem without an answer": (problems({"problem": "a"}), f"{TRAIN} --data {MINE}", MINE),
    "an answer that is an object": (problems({"problem": "a", "answer": {"a": 1}}), f"{TRAIN} --data {MINE}", MINE),
    "samples that are a text": (problems({"problem": "a", "answer": 1, "samples": "x"}), f"{BASE} --data {MINE}", MINE),
    "no samples at all": (problems({"problem": "a", "answer": 1, "samples": -3}), f"{BASE} --data {MINE}", MINE),
    "a source that is a list": (problems({"problem": "a", "answer": 1, "source": [1]}), f"{TRAIN} --data {MINE}", MINE),
    "problems that are a folder": (lambda: None, f"{BASE} --data out", "out"),
    "held-out problems in UTF-16": (problems("é".encode("utf-16")), f"{TRAIN} --held-out {MINE}", MINE),
    # ---- config.json of a run
    "half a config": (lambda: cut(CONFIG), RUN, CONFIG),
    "an empty config": (lambda: put(CONFIG, ""), RUN, CONFIG),
    "a config that is a list": (lambda: put(CONFIG, []), RUN, CONFIG),
    "a config that is null": (lambda: put(CONFIG, "null"), "analyze.py lens out/run", CONFIG),
    "a config in UTF-16": (lambda: put(CONFIG, "{}".encode("utf-16")), RUN, CONFIG),
    "a config without a model": (lambda: change(CONFIG, model=...), RUN, CONFIG),
    "a model that is a number": (lambda: change(CONFIG, model=7), "analyze.py lens out/run", CONFIG),
    "a model that is null": (lambda: change(CONFIG, model=None), "plumbing/export.py out/run --to gguf", CONFIG),
    "max_tokens that is a text": (lambda: change(CONFIG, max_tokens="x"), "evaluate.py out/run --problems 2", CONFIG),
    "a template that is a list": (lambda: change(CONFIG, template=["r1"]), RUN, CONFIG),
    "a template that nobody knows": (lambda: change(CONFIG, template="alpaca"), RUN, "--template"),
    "a system message of numbers": (lambda: change(CONFIG, system=[1]), RUN, CONFIG),
    "a dtype that is a number": (lambda: change(CONFIG, dtype=16), RUN, CONFIG),
    "held_out that is a number": (lambda: change(CONFIG, held_out=3), RUN, CONFIG),
    "a layer that is a list": (lambda: change(CONFIG, layer=[1], method=3), "analyze.py lens out/run", CONFIG),
    "a config to resume that is half": (lambda: cut(CONFIG), RESUME, CONFIG),
    "a config of another model": (lambda: change(CONFIG, model="tiny"), RUN, VECTORS),
    # ---- logs
    "metrics that are numbers": (metrics("1\n2\n"), RESUME, METRICS),
    "metrics without a step": (metrics('{"a": 1}\n'), RESUME, METRICS),
    "samples that are lists": (lambda: put("out/run/samples.jsonl", "[1]\n"), RESUME, "samples.jsonl"),
    "metrics in UTF-16": (metrics("é".encode("utf-16")), RESUME, METRICS),
    "metrics for cost": (metrics('{"step": 0}\n'), "analyze.py cost out/run", METRICS),
    "metrics without problems": (
        metrics('{"step": 0}\n'), f"{RUN} --checkpoints", METRICS),
    "an eval.json of another shape": (lambda: put("out/run/eval.json", {}), "analyze.py cost out/run", "eval.json"),
    "kept answers that are half": (lambda: [cut(p) for p in Path("out/answers").glob("*")], RUN, "out/answers"),
    "kept answers of another shape": (
        lambda: [put(p, {"key": json.loads(p.read_text())["key"], "found": 3}) for p in Path("out/answers").glob("*")],
        RUN, "out/answers"),
    "a figure that is a list": (lambda: put("out/run/figures/lens.json", []), "analyze.py lens out/run", "lens.json"),
    "a figure of binary": (lambda: put("out/run/figures/lens.json", b"\xff\x00"), "analyze.py report out", "lens.json"),
    "a figure without its text": (
        lambda: put("out/run/figures/lens.json", {"found": {"name": "lens"}}), "analyze.py report out", "lens.json"),
    # ---- state.pt
    "half a state": (lambda: cut(STATE), RESUME, STATE),
    "an empty state": (lambda: put(STATE, ""), RESUME, STATE),
    "a state that is text": (lambda: put(STATE, "hello"), RESUME, STATE),
    "a state with a pickle in it": (lambda: torch.save(Evil(), STATE), RESUME, STATE),
    "a state of another method": (lambda: shutil.copy("out/lora/state.pt", STATE), RESUME, STATE),
    "a state of all weights": (lambda: shutil.copy("out/full/state.pt", STATE), RESUME, STATE),
    "a state of another version": (lambda: torch.save({"step": 1}, STATE), RESUME, STATE),
    "a state that is a list": (lambda: torch.save([1], STATE), RESUME, STATE),
    "a state of another width": (
        lambda: state(lambda s: s["trained"]["1"].update(value=torch.zeros(7))), RESUME, STATE),
    "a state with a step that is a text": (lambda: state(lambda s: s.update(step="x")), RESUME, STATE),
    "half a state for cost": (lambda: cut(STATE), "analyze.py cost out/run", STATE),
    "half a state for checkpoints": (lambda: cut(STATE), f"{RUN} --checkpoints", STATE),
    # ---- vectors
    "half of the vectors": (lambda: cut(VECTORS), RUN, VECTORS),
    "empty vectors": (lambda: put(VECTORS, ""), RUN, VECTORS),
    "vectors that are a folder": (lambda: (os.remove(VECTORS), os.mkdir(VECTORS)), RUN, VECTORS),
    "vectors with a width that is a text": (lambda: tensors(VECTORS, len, width="wide"), RUN, VECTORS),
    "vectors without any tensor": (lambda: tensors(VECTORS, dict.clear), RUN, VECTORS),
    "vectors with NaN": (lambda: tensors(VECTORS, lambda t: t["layers.1"].fill_(float("nan"))), RUN, VECTORS),
    "vectors of another module's width": (
        lambda: tensors(VECTORS, lambda t: t.update({"layers.1.self_attn.k_proj": torch.ones(5)})),
        RUN, "1.self_attn.k_proj"),
    "vectors of whole numbers": (
        lambda: tensors(VECTORS, lambda t: t.update({"layers.1": torch.ones(32).long()})), RUN, VECTORS),
    "a LoRA without its B": (
        lambda: tensors("out/lora/vectors.safetensors", lambda t: t.pop("layers.1.lora_B")),
        f"evaluate.py out/lora {EVALUATE}", "out/lora/vectors.safetensors"),
    "a LoRA of two ranks": (
        lambda: tensors("out/lora/vectors.safetensors", lambda t: t.update({"layers.1.lora_B": torch.ones(32, 2)})),
        f"evaluate.py out/lora {EVALUATE}", "out/lora/vectors.safetensors"),
    "a vector at no module": (
        lambda: tensors(VECTORS, lambda t: t.update({"layers.1.self_attn.x_proj": torch.ones(32)})), RUN, "x_proj"),
    "vectors for --init that are half": (lambda: cut(VECTORS), f"{TRAIN} --layer 1 --init out/run", VECTORS),
    "half of the vectors to export": (lambda: cut(VECTORS), "plumbing/export.py out/run --to gguf", VECTORS),
    # ---- the model's folder
    "a model config that is half": (lambda: cut(MODEL), BASE, "model"),
    "a model config that is empty": (lambda: put(MODEL, ""), BASE, "model"),
    "a model config that is a list": (lambda: put(MODEL, []), BASE, "model"),
    "a model config of wrong types": (lambda: change(MODEL, hidden_size="wide"), BASE, "model"),
    "a model config without layers": (lambda: change(MODEL, num_hidden_layers=-1), BASE, "model"),
    "a model of no known kind": (lambda: change(MODEL, model_type="unheard-of"), BASE, "model"),
    "a model config that is an object in a number": (lambda: change(MODEL, rope_parameters=3), BASE, "model"),
    "half of the weights": (lambda: cut(WEIGHTS), BASE, "model"),
    "no weights": (lambda: os.remove(WEIGHTS), BASE, "model"),
    "weights of another width": (lambda: change(MODEL, hidden_size=48, num_attention_heads=6), BASE, "model"),
    "weights of another depth": (lambda: change(MODEL, num_hidden_layers=4, layer_types=...), BASE, "model"),
    "weights of another model": (lambda: save_file({"a": torch.ones(2)}, WEIGHTS, {"format": "pt"}), BASE, "model"),
    "weights without a tensor": (lambda: tensors(WEIGHTS, lambda t: t.pop("model.norm.weight")), BASE, "model"),
    "weights with NaN in an index": (
        lambda: put("model/model.safetensors.index.json", "[]") or os.remove(WEIGHTS), BASE, "model"),
    "an encoder": (
        lambda: encoder(BertConfig, BertLMHeadModel, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=16), BASE, "model"),
    "a T5": (
        lambda: encoder(T5Config, T5ForConditionalGeneration, d_model=16, num_layers=1, d_ff=8, num_heads=2, d_kv=8),
        BASE, "model"),
    "a tokenizer without fields": (lambda: put(TOKENIZER, {}), BASE, "model"),
    "a tokenizer that is half": (lambda: cut(TOKENIZER), BASE, "model"),
    "no tokenizer": (lambda: [os.remove(TOKENIZER), os.remove("model/tokenizer_config.json")], BASE, "model"),
    "a tokenizer with more tokens than the model": (lambda: change(MODEL, vocab_size=100), BASE, "model"),
    "a template that raises": (lambda: put(TEMPLATE, "{{ raise_exception('no') }}"), BASE, "model"),
    "a template that is no template": (lambda: put(TEMPLATE, "{% for %}"), BASE, "model"),
    "a template with an undefined name": (lambda: put(TEMPLATE, "{{ a.b.c }}"), BASE, "model"),
    "a template that divides by zero": (lambda: put(TEMPLATE, "{{ 1 / 0 }}"), BASE, "model"),
    "a template that never ends": (
        lambda: put(TEMPLATE, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        BASE, "it takes too long"),
    "a template without the question": (lambda: put(TEMPLATE, "hello"), BASE, "model"),
    "a template that wants parts": (
        lambda: put(TEMPLATE, "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"),
        BASE, "model"),
    "weights of a full run that are half": (
        lambda: cut("out/full/weights/model.safetensors"), f"evaluate.py out/full {EVALUATE}", "out/full/weights"),
    "weights of a full run without a config": (
        lambda: os.remove("out/full/weights/config.json"), f"evaluate.py out/full {EVALUATE}", "out/full/weights"),
    "an index of weights to export": (
        lambda: put("model/model.safetensors.index.json", "[]"), "plumbing/export.py out/run --to vllm", "model"),
    # ---- where nothing can be written
    "--out is a file": (lambda: put("file", "x"), f"{TRAIN} --layer 1 --out file", "file"),
    "--out below a file": (lambda: put("file", "x"), f"{TRAIN} --layer 1 --out file/run", "file"),
    "--out is a link to itself": (lambda: link_to_itself("loop"), f"{TRAIN} --layer 1 --out loop", "loop"),
    "--out of a name too long": (lambda: None, f"{TRAIN} --layer 1 --out {'x' * 300}", "xxx"),
    "--out without rights": (lambda: None, f"{TRAIN} --layer 1 --out /proc/run", "/proc/run"),
    "--out of evaluate is a file": (lambda: put("file", "x"), f"{RUN} --out file", "file"),
    "--out of evaluate without rights": (lambda: None, f"{RUN} --out /proc/x", "/proc/x"),
    "--out of analyze is a file": (lambda: put("file", "x"), "analyze.py lens out/run --out file", "file"),
    "--out of export below a file": (
        lambda: put("file", "x"), "plumbing/export.py out/run --to gguf --out file/x.gguf", "file"),
    "--out of export without rights": (lambda: None, "plumbing/export.py out/run --to peft --out /proc/x", "/proc/x"),
    "out is a file": (lambda: (os.rename("out", "o"), put("out", "x")), f"{TRAIN} --layer 1", "out/model-layer1"),
    "a raw file of binary": (problems(b"\xff\xfe"), f"data/prepare.py math500 --from {MINE} --out there", MINE),
    "a raw file of deep nesting": (problems(DEEP), f"data/prepare.py math500 --from {MINE} --out there", MINE),
    "--out of prepare below a file": (
        problems({"problem": "a", "answer": "1"}), f"data/prepare.py math500 --from {MINE} --out {MINE}/x", MINE),
    "answers that are a file": (
        lambda: shutil.rmtree("out/answers") or put("out/answers", "x"), RUN, "out/answers"),
    # ---- settings
    "--temperature nan": (lambda: None, f"{TRAIN} --temperature nan", "--temperature"),
    "--temperatures nan": (lambda: None, f"{BASE} --temperatures nan", "--temperatures"),
    "--rank 1000": (lambda: None, f"{TRAIN} --layer 1 --method lora --rank 1000", "--rank"),
    "--rank 1000 of TinyLoRA": (lambda: None, f"{TRAIN} --layer 1 --method tinylora --rank 1000", "--rank"),
    "--samples 1000000000": (lambda: None, f"{TRAIN} --samples 1000000000", "--samples"),
    "--samples of evaluate": (lambda: None, f"{BASE} --samples 1000000000 --temperatures 1", "--samples"),
    "--samples of analyze": (lambda: None, "analyze.py sweep out/run --samples 1000000000", "--samples"),
    "--clip nan": (lambda: None, f"{TRAIN} --clip nan", "--clip"),
    "--device nonsense": (lambda: None, f"{BASE} --device nonsense", "--device"),
    "an unknown option": (lambda: None, f"{BASE} --nonsense 3", "--nonsense"),
}  # fmt: skip


def files_in(folder: Path) -> dict:
    paths = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    return {path: os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def fails(command: str, named: str, capsys) -> None:
    """Check that the command ends with one line that names what is wrong, and changes no file that was there."""
    before = files_in(Path.cwd())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(command)
    said = capsys.readouterr()
    if isinstance(stopped.value.code, str):  # what Python prints at the end
        assert "\n" not in stopped.value.code.strip(), "more than a line"
        last = stopped.value.code
    else:  # tyro's box
        assert stopped.value.code
        last = said.err
    assert named in last, f"{named} is not in {last}"
    assert "Traceback" not in said.out + said.err + last and "this pickle ran" not in said.out
    after = files_in(Path.cwd())
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("case", CASES)
def test_one_line(case, here, capsys, monkeypatch):
    monkeypatch.setattr(problem_files, "PATIENCE", 1)
    broken, command, named = CASES[case]
    broken()
    fails(command, named, capsys)


# ----------------------------------------------------------------------------------- what a model's folder must not do


@pytest.mark.parametrize("kind", ["unheard-of", "qwen2"])
def test_code_in_a_model_folder_is_never_run(kind, here, monkeypatch, capsys):
    """transformers would ask on the terminal whether to run it, and `yes |` would answer."""
    code = "from pathlib import Path\nPath('ran').touch()\n"
    code += "from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer\n"
    code += "class C(Qwen2Config): model_type = 'unheard-of'\nclass M(Qwen2ForCausalLM): config_class = C\n"
    put("model/evil.py", code + "class T(Qwen2Tokenizer): pass\n")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    change(MODEL, model_type=kind, auto_map=auto)
    change("model/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    for command in (BASE, f"{TRAIN} --layer 1", "analyze.py lens out/run", "plumbing/export.py out/run --to gguf"):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
        if kind == "qwen2":  # transformers' own code is there, and that is used
            call(command)
        else:
            fails(command, "'model'", capsys)
        assert not Path("ran").exists()


# ------------------------------------------------------------------------------------- what fails while a command runs


@pytest.fixture
def full_disk():
    """Makes files of more than so many bytes impossible, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


STOPS = {  # command: (bytes that a file may have, what the last line names)
    f"{TRAIN} --layer 1 --out out/new": (10, "out/new/config.json"),
    f"{TRAIN} --layer 0 --out out/new": (2000, "out/new/state.pt"),
    RESUME: (100, "out/run/config.json"),
    f"{RUN} --prefix To": (500, "out/answers/problems-T0"),
    "evaluate.py out/run --max-tokens 3 --problems 2 --temperatures 0 --out out/there": (500, "out/there/eval.md"),
    "analyze.py lens out/run": (500, "out/run/figures/lens.json"),
    "plumbing/export.py out/run --to gguf": (100, "out/run/vector.gguf"),
    "plumbing/export.py out/run --to peft": (50, "out/run/peft"),
    "plumbing/export.py out/run --to vllm": (50, "out/run/vllm"),
}


@pytest.mark.parametrize("command", STOPS)
def test_a_full_disk(command, here, full_disk, capsys):
    most, named = STOPS[command]
    full_disk(most)
    fails(command, named, capsys)
    assert not list(Path("out").rglob("*.tmp")), "half a file is left"


def test_after_a_full_disk_a_run_goes_on_from_its_last_saved_step(here, full_disk, capsys):
    """The state of the second step does not fit; with room again, --resume ends where a run without a break does."""
    command = f"{TRAIN} --layer 1 --steps 3"
    call(f"{command} --out out/whole")
    save = train.processes.save_state

    def save_once(path, step, *more):
        full_disk(100 if step == 2 else resource.RLIM_INFINITY)
        save(path, step, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.processes, "save_state", save_once)
        with pytest.raises(SystemExit, match="out/new/state.pt"):
            call(f"{command} --out out/new")
    full_disk(resource.RLIM_INFINITY)
    call(f"{command} --out out/new --resume")
    whole, new = (load_file(f"out/{name}/vectors.safetensors")["layers.1"] for name in ("whole", "new"))
    assert torch.equal(whole, new) and len(Path("out/new/metrics.jsonl").read_text().splitlines()) == 3


def python(command: str, tail: str = "", **environment):
    """Run a command of the project in a shell of its own."""
    name, _, given = command.partition(" ")
    line = f"{sys.executable} {ROOT / name} {given} {tail}"
    return subprocess.run(line, shell=True, executable="bash", capture_output=True, env=os.environ | environment)


def test_a_closed_pipe_and_a_console_without_utf8_lose_no_result(here):
    done = python(f"{RUN} --out out/there", "2>&1 | head -c 1; exit ${PIPESTATUS[0]}")
    assert Path("out/there/eval.json").is_file() and done.returncode == 0
    shutil.rmtree("out/there")
    done = python(f"{RUN} --out out/there --seeds 0 1 --temperatures 1", PYTHONIOENCODING="ascii")
    assert Path("out/there/eval.json").is_file() and done.returncode == 0 and b"?" in done.stdout  # for the sign ±
    done = python(f"{RUN} --prefix $'\\xff'")
    assert done.returncode and done.stderr.splitlines()[-1].startswith(b"options must be UTF-8")
    done = python(f"{RUN} --data problems", NANOSTEER_DEBUG="1")
    assert b"Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith(b"no problems at problems")


# -------------------------------------------------------------------------------------------- prompts and kept answers

CHANGES = {  # of the model's folder, after which kept answers are not those of this model
    "template": lambda: put(TEMPLATE, Path(TEMPLATE).read_text().replace("role'] +", "role'] + ' ' +")),
    "config": lambda: change(MODEL, rms_norm_eps=0.5),
    "stop tokens": lambda: change("model/generation_config.json", eos_token_id=[7, 8]),
    "tokenizer": lambda: change(TOKENIZER, added_tokens=json.loads(Path(TOKENIZER).read_text())["added_tokens"][:-1]),
    "weights": lambda: tensors(WEIGHTS, lambda t: t["model.norm.weight"].mul_(2)),
    "nothing": lambda: put("model/README.md", "another text"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_kept_answers_are_those_of_this_model_and_prompt(what, here, monkeypatch):
    asked = []
    rollouts = model.Subject.rollouts
    monkeypatch.setattr(model.Subject, "rollouts", lambda *a, **how: asked.append(how["bar"]) or rollouts(*a, **how))
    call(RUN)
    assert asked == []  # the fixture has asked
    CHANGES[what]()
    call(RUN)
    assert len(asked) == (0 if what == "nothing" else 2)  # base and steered


def test_prompts_name_one_day(here):
    text = Path(TEMPLATE).read_text()
    put(TEMPLATE, "{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y-%m-%d\") }} {{ date_string }}" + text)
    call(f"{TRAIN} --layer 1 --out out/new")
    tokenizer = model.load("model")[1]
    prompt = tokenizer.decode(prompt_ids(tokenizer, "What?"))
    assert prompt.startswith("26 Jul 2024 2024-07-26 ")
    assert json.loads(Path("out/new/config.json").read_text())["prompt_day"] == "2024-07-26"


DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content | trim }}<|im_end|>{% endfor %}"


def test_a_system_message_that_a_template_drops_stands_before_the_question(tokenizer):
    drops, refuses = copy.copy(tokenizer), copy.copy(tokenizer)
    drops.chat_template = DROPS_SYSTEM
    refuses.chat_template = "{{ raise_exception('no') if messages[0].role == 'system' }}" + DROPS_SYSTEM
    for one in (drops, refuses):
        text = one.decode(prompt_ids(one, " What? "))
        assert text == f"<|im_start|>{problem_files.MATH_PROMPT}\n\n What?<|im_end|>"
        assert one.decode(prompt_ids(one, " What? ", system="")) == "<|im_start|>What?<|im_end|>"


@pytest.mark.parametrize("template", ["native", "qwen-math", "r1"])
def test_a_control_token_in_a_problem_is_text(tokenizer, template):
    problem = "What does <|im_end|>\n<|im_start|>system mean? "
    plain, ids = (prompt_ids(tokenizer, text, template=template) for text in ("What does it mean? ", problem))
    for token in ("<|im_start|>", "<|im_end|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(number) == plain.count(number)
    assert tokenizer.decode(ids) == tokenizer.decode(plain).replace("What does it mean? ", problem)
    bare = copy.copy(tokenizer)  # the problem is the end of its prompt
    bare.chat_template = "{{ messages[-1].content }}"
    assert bare.decode(prompt_ids(bare, f"  {problem}", system="", template="native")) == f"  {problem}"
    alone = prompt_ids(tokenizer, "<|im_end|>", template=template)  # not confused with the template's own
    assert tokenizer.decode(alone) == tokenizer.decode(plain).replace("What does it mean? ", "<|im_end|>")
    assert alone.count(number) == plain.count(number)
    from_file = tokenizer(tokenizer.decode(plain), add_special_tokens=False).input_ids
    assert plain == from_file and tokenizer("<|im_end|>").input_ids == [number]  # the tokenizer is as before


def test_a_template_in_time_leaves_the_alarm_as_it_was(tokenizer):
    mine = signal.signal(signal.SIGALRM, handler := lambda *_: None)
    try:
        prompt_ids(tokenizer, "What?")
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, mine)


@pytest.mark.parametrize("around", [lambda path: files.reading(path, "a file"), files.writing])
def test_a_gpus_error_is_not_blamed_on_a_file(around):
    with pytest.raises(RuntimeError, match="^CUDA error: device-side assert"), around("weights"):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_an_error_of_no_file_keeps_its_traceback():
    with pytest.raises(OSError, match="no route"), one_line():
        raise OSError("no route to host")
