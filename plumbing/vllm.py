"""
What runs inside vLLM: its models with vectors as biases, and what its workers need in order to change them.

model.VLLM starts the engine. Its worker processes import this file.
"""

from functools import partial
from importlib import import_module

import torch

# architectures that the engine can steer, and where vLLM keeps them
VLLM_MODELS = {f"{name}ForCausalLM": name.lower() for name in ("Qwen2", "Qwen3", "Llama", "Mistral")}


class Steered:
    """
    Mixed into a vLLM model: every mlp.down_proj and self_attn.o_proj gets a bias, the vector at the end of the layer
    and after its attention, and with `lora_rank` in the config every mlp.down_proj the two matrices of a LoRA.

    They are buffers, because vLLM's loader wants every *parameter* from the checkpoint. They are made in __init__,
    because vLLM compiles and captures CUDA graphs while it starts: it ignores a later hook or bias without a word.
    Afterwards they change in place. With tensor parallelism vLLM adds the bias of rank 0 only, before the sum over
    ranks, and every rank has its columns of A.
    """

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rank = getattr(vllm_config.model_config.hf_config, "lora_rank", 0)

        def buffer(linear, name, *shape):
            linear.register_buffer(name, torch.zeros(shape, dtype=linear.params_dtype), persistent=False)

        for block in self.model.layers:
            if not hasattr(block, "mlp"):  # a rank of a pipeline has placeholders for the layers of others
                continue
            down = block.mlp.down_proj
            for linear in (down, block.self_attn.o_proj):
                assert linear.bias is None, "this model has a bias of its own where the vectors go; use --sampler hf"
                del linear.bias
                buffer(linear, "bias", linear.output_size)
            if rank:
                buffer(down, "lora_A", rank, down.input_size_per_partition)
                buffer(down, "lora_B", down.output_size, rank)
                # what multiplies by the weight, before the sum over ranks; every module has one of its own
                down.quant_method.apply = partial(_apply_with_lora, down.quant_method.apply)


def _apply_with_lora(apply, linear, x, bias=None):
    return apply(linear, x, bias) + (x @ linear.lora_A.T) @ linear.lora_B.T


def register_vllm_models():
    """Make vLLM know SteeredQwen2ForCausalLM and so on: new names, since its compile cache knows models by name."""
    from vllm import ModelRegistry

    for name, file in VLLM_MODELS.items():
        stock = getattr(import_module(f"vllm.model_executor.models.{file}"), name)
        ModelRegistry.register_model(f"Steered{name}", type(f"Steered{name}", (Steered, stock), {}))


class _Worker:
    """Mixed into vLLM's workers, which may be other processes: they get the vectors as bytes."""

    @torch.inference_mode()
    def set_vectors(self, raw: dict[str, bytes], shapes: dict[str, list[int]]):
        """raw: fp32 numbers of all layers by site, "end", "attention", "lora_A", "lora_B", of these shapes."""
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
    raise AttributeError(f"vllm_model.py has no {name}")
