"""
Write a trained run for other programs, in one of four formats.

$ python plumbing/export.py out/tiny-layer27 --to peft          # an adapter folder with a model card, for PeftModel
$ python plumbing/export.py out/tiny-layer27 --to vllm          # a model folder for stock vLLM; the weights are links
$ python plumbing/export.py out/tiny-layer27 --to gguf          # a control vector for llama.cpp, repeng and EasySteer
$ python plumbing/export.py out/tiny-layer27 --to transformers  # prints the lines that add it to a Hugging Face model

A vector at the end of a layer is a bias of mlp.down_proj, and one after attention is a bias of self_attn.o_proj: peft
and vllm hold it like that. If a format cannot hold a part of the run, nothing is written. Each file says in its
metadata what it holds, see model.py:metadata_of.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

if sys.path[0] == str(Path(__file__).parent):  # this folder has a vllm.py that is not the package
    sys.path[0] = str(Path(__file__).parents[1])
import model  # noqa: E402
from plumbing.console import one_line  # noqa: E402
from plumbing.files import base_checksum, config_of, is_gguf, json_of, source_of, write, written  # noqa: E402
from plumbing.loading import load_config  # noqa: E402
from plumbing.settings import Usual, label_of  # noqa: E402


@dataclass
class Trained:
    run: Path
    settings: dict  # config.json
    vectors: dict
    meta: dict[str, str]
    llm: torch.nn.Module  # the base model without its weights, for the names and sizes of its modules

    @property
    def base(self):
        """The folder or .gguf file of a local base model, or a hub id."""
        return source_of(self.settings["model"])


@one_line()
def export(
    run: tyro.conf.Positional[str], to: Literal["peft", "vllm", "gguf", "transformers"], out: Usual[str] = None
) -> None:
    """
    Write a trained run for other programs.

    Args:
        run: run folder of train.py.
        to: write an adapter folder, a model folder or a control vector, or print lines of Python.
        out: path of what is written; RUN/peft, RUN/vllm or RUN/vector.gguf unless it is given.
    """
    settings = config_of(run)
    if settings.get("method") == "full":
        sys.exit(f"{run} trained all weights: {run}/weights is a model folder, which other programs load as it is")
    name, file = settings["model"], Path(run) / "vectors.safetensors"
    config = load_config(name)
    vectors, meta = model.load_vectors(file, config, name)
    now = base_checksum(name)
    if (then := meta.get("model_checksum", now)) != now:
        print(f"warning: the base model {name!r} has changed since {run} was trained: checksum {now}, then {then}")
    meta = model.metadata_of(vectors, config, name, meta["step"]) | meta  # files of older versions say less
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    trained = Trained(Path(run), settings, vectors, meta, llm)
    write_it, default, mark, use = FORMATS[to]
    path = Path(out or Path(run) / default)
    if use and path.exists() and not (path / mark).is_file():  # an earlier export is replaced, and nothing else
        sys.exit(f"{path} exists, but it is not an export --to {to}: choose another --out")
    write_it(trained, path)
    if use:
        base = str(trained.base) if is_gguf(trained.base) else "BASE.gguf"
        print(f"wrote {path}; {use.format(path, base=base)}")


def library(name: str, version: str):
    try:
        return import_module(name)
    except ImportError as error:
        sys.exit(f"--to {name} needs the package {name} ({error}): pip install {name}=={version}")


def linear_modules(trained: Trained) -> dict[str, dict]:
    """
    What is added to which module: {"model.layers.27.mlp.down_proj": {"bias": s}}, or for a LoRA {"lora_A", "lora_B"}.

    Two vectors of one module, such as 27 and "27.mlp.down_proj", are added up.
    """
    found, names = {}, {module: name for name, module in trained.llm.named_modules()}
    for place, s in trained.vectors.items():
        module = model.site_module(trained.llm, place)
        module = getattr(module, "down_proj", module)  # the output of an MLP is that of its last module
        if model.split(place).where != "all":
            sys.exit(f"{place}: a bias acts at every position; only this repository knows where an answer begins")
        if not isinstance(module, torch.nn.Linear):
            sys.exit(f"{place}: no linear module has this output, so it is not a bias; --to transformers can add it")
        part, kind = found.setdefault(names[module], {}), model.split(place).matrix or "bias"
        part[kind] = part[kind] + s if kind == "bias" and kind in part else s
    return found


def to_peft(trained: Trained, path: Path) -> None:
    """A folder for PeftModel.from_pretrained: vectors as BEFT, which adds biases to linear modules, or a plain LoRA."""
    peft, parts = library("peft", "0.21.2"), linear_modules(trained)
    ranks = {part["lora_A"].shape[0] for part in parts.values() if "lora_A" in part}
    if ranks and any("bias" in part for part in parts.values()):
        sys.exit("--to peft: an adapter holds vectors or LoRAs, and this run has both")
    if len(ranks) > 1:
        sys.exit(f"--to peft: the LoRAs of an adapter have one rank, and this run has the ranks {sorted(ranks)}")
    how = dict(task_type="CAUSAL_LM", base_model_name_or_path=str(trained.base), inference_mode=True)
    how["target_modules"] = list(parts)
    if ranks:
        config = peft.LoraConfig(r=max(ranks), lora_alpha=max(ranks), **how)  # peft adds alpha / r B A x
    else:
        config = peft.BeftConfig(**how)
    tensors = {}
    for name, part in parts.items():
        for kind, s in part.items():
            key, s = ("beft_bias", s[None]) if kind == "bias" else (f"{kind}.weight", s)
            tensors[f"base_model.model.{name}.{key}"] = s.contiguous()
    with written(path) as new:
        config.save_pretrained(new)
        save_file(tensors, new / "adapter_model.safetensors", trained.meta | {"format": "pt"})
        write(new / "README.md", model_card(trained))


def model_card(trained: Trained) -> str:
    """What the adapter is, how it was trained and measured, and how it is loaded."""
    settings, measured = trained.settings, trained.run / "eval.md"
    base = trained.base if isinstance(trained.base, str) else None  # a card may name only models of the hub
    names = "method rank numbers data steps prompts samples temperature lr lr_absolute clip seed dtype reward template"
    lora = any(model.split(place).matrix for place in trained.vectors)
    source = f'"{base or "PATH OF THE BASE MODEL"}"'
    if is_gguf(trained.base):
        source = f'"FOLDER OF THE BASE MODEL", gguf_file="{trained.base.name}"'

    def table(rows: dict) -> str:
        return "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)

    return CARD.format(
        base_model=f"base_model: {base}\n" if base else "",
        name=settings["model"],
        what="A LoRA" if lora else "A steering vector",
        label=label_of(settings),
        about=table({key.replace("_", " "): value for key, value in trained.meta.items()}),
        settings=table({name: settings.get(name) for name in [*names.split(), "system"]}),
        accuracy=measured.read_text(encoding="utf-8").strip() if measured.is_file() else "Not measured.",
        source=source,
        merging="" if lora else "\nA bias cannot be merged into a module that has none: load it as above.\n",
    )


CARD = """---
{base_model}library_name: peft
pipeline_tag: text-generation
tags: [steering-vector, rloo]
---
# {what} for {name}, layer {label}

Trained with RLOO while the model was frozen, as in
[Small Vectors, Big Effects](https://arxiv.org/abs/2509.06608). The adapter adds it to the output of the modules that
`adapter_config.json` names, at every position, prompt included.

| | |
|---|---|
{about}

## Training

| | |
|---|---|
{settings}

template and system say how the prompt was made. With another prompt the model answers differently.

## Accuracy

{accuracy}

## How to load

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

llm = AutoModelForCausalLM.from_pretrained({source})
llm = PeftModel.from_pretrained(llm, "THIS FOLDER")
```
{merging}"""


AS_LLAMA = ("llama", "qwen2", "mistral")  # a Llama with biases computes the same as these families
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": True, "attention_bias": True}
NO_LLAMA = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "_name_or_path")
TOKENIZER = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges", "generation_config")


def to_vllm(trained: Trained, path: Path) -> None:
    """A model folder: a Llama whose biases hold the vectors. Only the biases are new; the rest is linked."""
    config, parts = trained.llm.config, linear_modules(trained)
    if is_gguf(trained.base):
        instead = "--to gguf makes a control vector for that very file"
        sys.exit(f"--to vllm: the base model is a .gguf file, to whose weights a model folder cannot link; {instead}")
    if any("lora_A" in part for part in parts.values()):
        how = "--to peft, then `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`"
        sys.exit(f"--to vllm: vLLM loads a LoRA beside its base model: {how}")
    instead = "the plugin vllm-lens adds vectors there (SteeringVector with norm_match=False, without CUDA graphs)"
    if config.model_type not in AS_LLAMA:
        sys.exit(f"--to vllm: vLLM has no architecture that is a {config.model_type} with biases; {instead}")
    if getattr(config, "sliding_window", None):
        sys.exit(f"--to vllm: vLLM's Llama has biases but no sliding window, which the base model has; {instead}")
    base = Path(cached_file(trained.base, "config.json")).parent.absolute()
    shards, biases = shards_of(base), {}
    for name, module in trained.llm.get_decoder().named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear) and f"{name}.bias" not in shards:  # vLLM needs every bias, even zeros
            biases[f"{name}.bias"] = parts.pop(name, {}).get("bias", torch.zeros(module.out_features))
    if parts:
        sys.exit(f"--to vllm: {min(parts)} of the base has a bias already; --to peft adds a second one")
    # the links have other names, because transformers takes a file model.safetensors for the whole model
    weight_map = {name: f"base-{file}" for name, file in shards.items()} | dict.fromkeys(biases, "steering.safetensors")
    links = {f"base-{file}": base / file for file in shards.values()}
    links |= {file.name: file for file in base.iterdir() if file.name.startswith(TOKENIZER)}
    with written(path) as new:
        shutil.rmtree(new, ignore_errors=True)  # left by an export that was stopped
        new.mkdir()
        for name, file in links.items():
            (new / name).symlink_to(file)
        save_file(biases, new / "steering.safetensors", trained.meta | {"format": "pt"})
        # the defaults of the model's class, then the file as it is: older readers need the older names of settings
        settings = config.to_dict() | json_of(base / "config.json")
        settings = {key: value for key, value in settings.items() if key not in NO_LLAMA} | LLAMA
        write(new / "config.json", json.dumps(settings, indent=2))
        index = {"metadata": trained.meta, "weight_map": weight_map}
        write(new / "model.safetensors.index.json", json.dumps(index, indent=2))


def shards_of(folder: Path) -> dict[str, str]:
    """Which file of a model folder holds which tensor: {tensor: file}."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return json_of(index, {"weight_map": dict})["weight_map"]
    if not single.is_file():
        sys.exit(f"{folder} lacks the weights of the base model: load it once, for example with evaluate.py --model")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def at_the_end(trained: Trained, place) -> bool:
    """Whether a vector is added to the output of a decoder layer, at every position."""
    at, pre_norm = model.split(place), trained.llm.config.model_type in model.PRE_NORM
    return (at.site == "end" or (pre_norm and at.site == "mlp.down_proj")) and at.where == "all" and not at.matrix


IGNORED = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")  # builds before March 2026


def to_gguf(trained: Trained, path: Path) -> None:
    """A control vector: direction.N is added to the output of layer N, 0-based, by llama.cpp, repeng and EasySteer."""
    gguf, directions, kind = library("gguf", "0.19.0"), {}, trained.llm.config.model_type
    if kind in IGNORED:
        sys.exit(f"--to gguf: many builds of llama.cpp ignore the control vector of a {kind} without a word; --to peft")
    for place, s in trained.vectors.items():
        if not at_the_end(trained, place):
            sys.exit(f"--to gguf: a control vector acts at the end of layers, and {place} does not; try --to peft")
        layer = model.split(place).layer
        directions[layer] = directions.get(layer, 0) + s
    if 0 in directions:
        reason = "llama.cpp has no control vector there and refuses a file that has one"
        sys.exit(f"--to gguf: layer 0 cannot be held: {reason}; use --to vllm or peft")
    with written(path) as new:
        writer = gguf.GGUFWriter(new, "controlvector")
        writer.add_string("controlvector.model_hint", kind)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for key, value in trained.meta.items():
            writer.add_string(f"steering.{key}", value)
        for layer, s in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", s.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def to_transformers(trained: Trained, path: Path) -> None:
    """Print the lines that steer a loaded model `llm`, and a TransformerBridge of TransformerLens 4.3."""
    names = {module: name for name, module in trained.llm.named_modules()}
    print(f'import safetensors.torch; s = safetensors.torch.load_file("{trained.run}/vectors.safetensors")')
    for place in trained.vectors:
        at = model.split(place)
        if at.where != "all":
            sys.exit(f"{place}: a plain hook acts at every position; only this repository knows where an answer begins")
        if at.matrix == "lora_B":
            continue  # it is printed with its A
        added = f's["layers.{place}"].to(h)'
        if at.matrix:
            added = f's["layers.{place}"].T.to(h)'
            added = f"x[0] @ {added} @ {added.replace('lora_A', 'lora_B')}"
        module = names[model.site_module(trained.llm, place)]
        print(f'llm.get_submodule("{module}").register_forward_hook(lambda module, x, h: h + {added})')
    for place in trained.vectors:
        if at_the_end(trained, place):
            hook = f'"blocks.{model.split(place).layer}.hook_out", lambda h, hook: h + s["layers.{place}"].to(h)'
            print(f"bridge.add_hook({hook})  # TransformerLens 4.3")


FORMATS = {  # which function writes it, its path in the run folder, the file by which it is recognised, how it is used
    "peft": (to_peft, "peft", "adapter_config.json", 'llm = peft.PeftModel.from_pretrained(llm, "{}")'),
    "vllm": (to_vllm, "vllm", "steering.safetensors", "vllm serve {}"),
    "gguf": (to_gguf, "vector.gguf", "", "llama-cli -m {base} --control-vector {}"),
    "transformers": (to_transformers, "", "", ""),
}

if __name__ == "__main__":
    tyro.cli(export, description=__doc__)
