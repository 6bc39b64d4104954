"""
vLLM, the sampler for GPUs: models that hold the vectors as biases, workers that change these biases, and the engine.

vLLM's worker processes import this file.
"""

import os
import sys
import time
from functools import partial
from importlib import import_module

import torch

from plumbing.bars import Bar, waiting
from plumbing.files import ROOT, source_of

# architectures that the engine can steer, and vLLM's modules for them
VLLM_MODELS = {f"{name}ForCausalLM": name.lower() for name in ("Qwen2", "Qwen3", "Llama", "Mistral")}


class Steered:
    """
    Mixed into a vLLM model: mlp.down_proj and self_attn.o_proj of every layer get a bias, which is the vector at the
    layer's end and after its attention. With `lora_rank` in the config mlp.down_proj also gets a LoRA's two matrices.

    They are buffers, because vLLM's loader looks for every *parameter* in the checkpoint. They are made in __init__,
    because vLLM compiles and captures CUDA graphs while it starts and would silently ignore a later hook or bias.
    Afterwards they change in place. With tensor parallelism only rank 0 adds its bias, before vLLM's sum over ranks,
    and every rank has its own columns of A.
    """

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rank = getattr(vllm_config.model_config.hf_config, "lora_rank", 0)

        def buffer(linear, name, *shape):
            linear.register_buffer(name, torch.zeros(shape, dtype=linear.params_dtype), persistent=False)

        for block in self.model.layers:
            if not hasattr(block, "mlp"):  # with pipeline parallelism, the placeholder of another rank's layer
                continue
            down = block.mlp.down_proj
            for linear in (down, block.self_attn.o_proj):
                assert linear.bias is None, "this model has a bias of its own where the vectors go; use --sampler hf"
                del linear.bias
                buffer(linear, "bias", linear.output_size)
            if rank:
                buffer(down, "lora_A", rank, down.input_size_per_partition)
                buffer(down, "lora_B", down.output_size, rank)
                # the product with the weight, before the sum over ranks; every module has a quant_method of its own
                down.quant_method.apply = partial(_apply_with_lora, down.quant_method.apply)


def _apply_with_lora(apply, linear, x, bias=None):
    return apply(linear, x, bias) + (x @ linear.lora_A.T) @ linear.lora_B.T


def register_vllm_models():
    """Register SteeredQwen2ForCausalLM and so on. Stock names would hit vLLM's compile cache, which goes by name."""
    from vllm import ModelRegistry

    for name, file in VLLM_MODELS.items():
        stock = getattr(import_module(f"vllm.model_executor.models.{file}"), name)
        ModelRegistry.register_model(f"Steered{name}", type(f"Steered{name}", (Steered, stock), {}))


class _Worker:
    """Mixed into vLLM's workers. They may be other processes, so they get the vectors as bytes."""

    @torch.inference_mode()
    def set_vectors(self, raw: dict[str, bytes], shapes: dict[str, list[int]]):
        """raw: for each site ("end", "attention", "lora_A", "lora_B") the fp32 numbers of all layers, of this shape."""
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
    """Python calls this for a name that the file lacks. A vLLM worker looks up VLLMWorker before it loads a model."""
    if name == "VLLMWorker":
        register_vllm_models()  # so this is the moment to register them in that process, too
        return _Worker
    raise AttributeError(f"plumbing/vllm.py has no {name}")


# ---------------------------------------------------------------------------------------------------------- the engine


def import_vllm(llm, tensor_parallel: int):
    """Import vllm, which reads its settings from the environment; exits with one line if it cannot serve llm."""
    architecture = llm.config.architectures[0]
    if architecture not in VLLM_MODELS:
        sys.exit(f"--sampler vllm can steer {', '.join(VLLM_MODELS)}, not {architecture}; use --sampler hf")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # started by torchrun: one engine in each process
    if several and tensor_parallel > 1:
        sys.exit("--tensor-parallel: torchrun gives every process one GPU; start a single process with python instead")
    if not several and llm.device.index:
        sys.exit(f"--device {llm.device}: vLLM takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES instead")
    if tensor_parallel == 1:  # run in this process: nothing is serialised, and errors keep their traceback
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"  # for worker processes
    try:
        import vllm
    except ImportError as error:
        sys.exit(f"--sampler vllm: no vLLM ({error}); pip install -r requirements-vllm.txt, or --sampler hf")
    register_vllm_models()
    return vllm


class VLLM:
    """
    A vLLM engine with the same weights as a loaded model, and vectors that can change between calls.

    name, llm: the model's name and what model.load returned for it. context: tokens of prompt and answer together.
    memory: vLLM's share of all of the GPU's memory, for weights and cache. lora_rank: the highest rank of a LoRA that
    it will be given, 0 for none. eager: do not compile, and capture no CUDA graphs.
    """

    @waiting("vLLM starts")
    def __init__(self, name, llm, context, memory=0.45, tensor_parallel=1, max_rows=512, lora_rank=0, eager=False):
        threads = torch.get_num_threads()
        vllm = import_vllm(llm, tensor_parallel)
        depth, width = llm.config.num_hidden_layers, llm.config.hidden_size
        self.shapes = {"end": [depth, width], "attention": [depth, width]}  # of what `push` sends
        if lora_rank:
            self.shapes["lora_A"] = [depth, lora_rank, llm.config.intermediate_size]
            self.shapes["lora_B"] = [depth, width, lora_rank]
        overrides = {"architectures": [f"Steered{llm.config.architectures[0]}"], "lora_rank": lora_rank}
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        try:
            self.engine = vllm.LLM(
                str(source_of(name)),
                hf_overrides=overrides,
                trust_remote_code=False,
                worker_extension_cls="plumbing.vllm.VLLMWorker",
                dtype=str(llm.dtype).removeprefix("torch."),
                max_model_len=context,
                max_num_seqs=max_rows,
                gpu_memory_utilization=memory,
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if several else None,
                logprobs_mode="processed_logprobs",  # after the temperature: those of the sampled distribution
                enable_prefix_caching=True,  # the k samples of a prompt share its keys and values
                # a prompt that is read in two chunks rewinds its random generator, which fails on a CPU
                enable_chunked_prefill=False if llm.device.type == "cpu" else None,
                enforce_eager=eager,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        except (ValueError, RuntimeError, torch.OutOfMemoryError) as error:  # too little memory, bad lengths, ...
            sys.exit(
                f"vLLM did not start with --vllm-memory {memory} and --context {context}: {str(error).strip()}\n"
                "raise --vllm-memory if vLLM lacks memory, lower it if the GPU is full; a shorter --context helps both"
            )
        torch.set_num_threads(threads)  # vLLM has set it to 1

    def push(self, tensors: dict) -> None:
        """Give the engine these vectors, {(site, layer): tensor} as from model.engine_tensors, and zero elsewhere."""
        stacks = {site: torch.zeros(shape) for site, shape in self.shapes.items()}
        for (site, layer), s in tensors.items():
            part = tuple(map(slice, s.shape))  # a LoRA of a lower rank than the engine's fills its first rows
            stacks[site][layer][part] += s.detach().float().cpu()
        raw = {site: stack.numpy().tobytes() for site, stack in stacks.items()}
        self._change("set_vectors", args=(raw, self.shapes))

    def push_weights(self, llm) -> None:
        """Give the engine all weights of the model. It takes the tensors themselves, so it must be in this process."""
        weights = [(name, weight.detach()) for name, weight in llm.named_parameters()]
        self._change("reload_weights", kwargs={"weights_iterator": weights})

    def close(self) -> None:
        """Stop the engine and give its memory back: one process can then start another."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.llm_engine.engine_core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()

    def _change(self, method, **what) -> None:
        """Change the engine, and drop its prefix cache: vLLM does not notice that keys and values are now stale."""
        began = time.perf_counter()
        self.engine.collective_rpc(method, **what)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: answers to one prompt would mix two sets of vectors")
        self.sync_seconds = time.perf_counter() - began

    def sample(self, tensors, prompts, k, max_tokens: list[int], stop, temperature, seeds: list[int], bar="sampling"):
        """As model.sample, with the vectors of `push`; returns (completions, ended, log-probs of their tokens)."""
        from vllm import SamplingParams

        self.push(tensors)
        greedy = temperature == 0
        # all settings are given, or a model's generation_config.json may change them. Sample j has the seed plus j
        how = dict(temperature=temperature, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
        how |= dict(n=1 if greedy else k, stop_token_ids=stop, logprobs=0, detokenize=False)
        params = [SamplingParams(max_tokens=n, seed=s, **how) for n, s in zip(max_tokens, seeds, strict=True)]
        shown = dict(desc=bar, total=len(prompts) * params[0].n, unit="answers")
        requests = [{"prompt_token_ids": p} for p in prompts]

        def progress(items=None, **usual):  # vLLM's bars: over the prompts that it reads, then of the answers
            return Bar(**usual | shown) if items is None else Bar(items, **usual)

        found = self.engine.generate(requests, params, use_tqdm=progress)
        rows = [row for request in found for row in request.outputs * (k if greedy else 1)]
        completions = [list(row.token_ids) for row in rows]
        logps = [[at[token].logprob for at, token in zip(row.logprobs, row.token_ids)] for row in rows]
        return completions, [row.finish_reason == "stop" for row in rows], logps

    def self_test(self, tensors: dict, prompts: list[list[int]], log_probs, exact: bool, max_tokens=32) -> dict:
        """
        Compare the engine with the Hugging Face model, with and without large random vectors; exit if they disagree.

        tensors: the random vectors, as for `push`. log_probs(steered, prompts, completions): the Hugging Face model's
        log-probs, a flat tensor. exact: both compute in float32.
        Returns mean |differences| of token log-probs in nats: "steered" and "base", where both have the same vectors,
        and "effect", where only the engine has them: what an error could be as large as.
        """
        found = {}
        for name, given, steered in (("base", {}, False), ("steered", tensors, True), ("effect", tensors, False)):
            limits, seeds = [max_tokens] * len(prompts), list(range(len(prompts)))
            completions, _, logps = self.sample(given, prompts, 1, limits, [], 1.0, seeds, bar="testing vLLM")
            sampled = torch.tensor([x for row in logps for x in row])
            found[name] = (log_probs(steered, prompts, completions).cpu() - sampled).abs().mean().item()
        # a right engine: 1e-7 in float32, 0.002 in bfloat16, which rounds; one of 28 layers forgotten: 0.03 to 0.1
        allowed = (0.001 if exact else 0.02) * found["effect"]
        numbers = (
            f"token log-probs differ by {found['steered']:.2g} nats (mean) with random vectors, {found['base']:.2g} "
            f"without; leaving the vectors out would make {found['effect']:.2g}"
        )
        if not max(found["steered"], found["base"]) < allowed:
            why = f"vLLM and the Hugging Face model disagree, so nothing was trained or measured: {numbers}"
            sys.exit(f"{why}. Use --sampler hf, and report the versions.")
        print(f"vLLM agrees with Hugging Face: {numbers}")
        return found
