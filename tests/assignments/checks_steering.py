"""Exercises 2.1 to 2.5: the hook, where to steer, what is added, a token from logits, a direction left alone."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from cases_steering import COUNT
from judge import Check

# ----------------------------------------------------------------------------------------------------------- 2.1 steer


@contextmanager
def wrapped(llm, vectors, change=lambda h, v: h + v, shift=0, left=0, on_errors=True):
    """The layer's forward is wrapped, no hook. change: what happens to its output h. left: how many stay behind."""
    blocks = [(llm.model.layers[layer + shift], v) for layer, v in vectors.items()]
    before = [(block, vars(block).get("forward")) for block, _ in blocks]
    for block, v in blocks:
        block.forward = lambda *a, inner=block.forward, v=v, **k: change(inner(*a, **k), v)

    def put_back():
        for block, forward in before[: len(before) - left]:
            del block.forward
            if forward:
                block.forward = forward

    try:
        yield
    except KeyError:
        if on_errors:
            put_back()
        raise
    put_back()


def hook_not_removed(llm, vectors):
    """The hook stays after the context: every later call of the model is steered, silently."""
    return wrapped(llm, vectors, left=len(vectors))


def last_hook_not_removed(llm, vectors):
    """Of several vectors the last one's hook stays: remove all of them, not the one that the variable still names."""
    return wrapped(llm, vectors, left=1 if len(vectors) > 1 else 0)


def one_vector_for_all_layers(llm, vectors):
    """Every layer gets the last vector: the hook looks its variable up when it runs, after the loop has ended."""
    return wrapped(llm, dict.fromkeys(vectors, next(reversed(vectors.values()), None)))


def prefill_only(llm, vectors):
    """Only texts of several tokens are steered: while an answer is written, a forward pass has one token."""
    return wrapped(llm, vectors, lambda h, v: h + v if h.shape[1] > 1 else h)


def no_gradient_for_the_vector(llm, vectors):
    """The vector is detached: it is added, but it cannot be trained."""
    return wrapped(llm, vectors, lambda h, v: h + v.detach())


def hook_stays_after_an_error(llm, vectors):
    """After an error inside the context the hook stays: remove it in `finally`."""
    return wrapped(llm, vectors, on_errors=False)


def layer_off_by_one(llm, vectors):
    """The vector is added a layer early: hidden_states[l] is what enters layer l, the vector belongs to its output."""
    return wrapped(llm, vectors, shift=-1)


def wrong_sign_of_the_vector(llm, vectors):
    """The vector is subtracted."""
    return wrapped(llm, vectors, lambda h, v: h - v)


def first_row_only(llm, vectors):
    """Only the first row is steered: output[0] is the output of older versions' tuples, and here the first row."""
    return wrapped(llm, vectors, lambda h, v: torch.cat([h[:1] + v, h[1:]]))


def last_position_only(llm, vectors):
    """Only the last position is steered: the vector is added at every position, prompt included."""
    return wrapped(llm, vectors, lambda h, v: torch.cat([h[:, :-1], h[:, -1:] + v], 1))


def first_row_for_all(llm, vectors):
    """Every row gets the first row's state: output[0] is the first row here, and it spreads over the batch."""
    return wrapped(llm, vectors, lambda h, v: (h[0] + v).expand_as(h))


# ----------------------------------------------------------------------------------------------------- 2.2 site_module


INSIDE = {  # the module of each place, in pre-norm models and where norms come after attention and MLP
    "qwen2": ["mlp", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm"],
    "gemma": ["", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm"],
    "gemma2": ["", "post_attention_layernorm", "input_layernorm", "pre_feedforward_layernorm"],
}


def by_table(llm, place, count=lambda text: int(text), lora="mlp.down_proj", **changes):
    layer, _, site = str(place).partition("@")[0].partition(".")
    if site.split(".")[-1] in ("lora_A", "lora_B"):
        site = ".".join(site.split(".")[:-1]) or lora
    sites = ["", "attention", "input-norm", "post-attention-norm"]
    kind = llm.config.model_type
    table = dict(zip(sites, INSIDE.get(kind, INSIDE["qwen2"]))) | changes.get(kind, {})
    name = table.get(site, site)
    block = llm.model.layers[count(layer)]
    if name not in dict(block.named_modules()):
        raise SystemExit(f"the layer has no {site}")
    return block.get_submodule(name)


def layer_before(llm, place):
    """The layer is counted from 1: layer l is decoder_layers(llm)[l]."""
    return by_table(llm, place, lambda text: int(text) - 1)


def first_digit_of_the_layer(llm, place):
    """Only the first digit of the layer is read: models have more than ten layers."""
    return by_table(llm, place, lambda text: int(text[0]))


def attention_with_its_tuple(llm, place):
    """self_attn returns a tuple, (output, weights), and a vector cannot be added to it; o_proj returns a tensor."""
    return by_table(llm, place, **{kind: {"attention": "self_attn"} for kind in ("qwen2", "gemma2", "llama", "gemma")})


def norms_after_are_forgotten(llm, place):
    """Gemma 2 normalises the outputs of attention and MLP before it adds them, which would rescale a vector there."""
    return by_table(llm, place, gemma2=dict(zip(["", "attention", "", "post-attention-norm"], INSIDE["qwen2"])))


def whole_layer_in_every_model(llm, place):
    """The end of a layer is the MLP in Qwen, Llama and Mistral models: an engine can only add a bias there."""
    return by_table(llm, place, qwen2={"": ""}, llama={"": ""})


def mlp_in_every_model(llm, place):
    """The end of a layer is the whole layer in Gemma models: the MLP's output is scaled or normalised afterwards."""
    return by_table(llm, place, gemma={"": "mlp"}, gemma2={"": "mlp"})


def lora_on_the_whole_mlp(llm, place):
    """A LoRA without another site goes on mlp.down_proj, whose input has the inner width F; the mlp's has width D."""
    return by_table(llm, place, lora="mlp")


# ------------------------------------------------------------------------------------------------------------ 2.3 _add


def token_by_token(llm, where, s, B, module, args, h, scale=lambda A, x: A @ x, mask=True, sign=1):
    out, where_it_is = h.clone(), getattr(llm, "answer_positions", None)
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            if where == "answer" and mask and not where_it_is.expand(h.shape[:2])[b, t]:
                continue
            step = s if B is None else sum(a * B[:, i] for i, a in enumerate(scale(s, args[0][b, t].float())))
            out[b, t] += sign * step.to(h.dtype)
    return out


def changed_in_place(llm, where, s, B, module, args, h):
    """h itself is changed (+=): another hook may hold it, and it would see the steered state."""
    return h.copy_(token_by_token(llm, where, s, B, module, args, h))


def mask_forgotten(*given):
    """With "answer" only the positions in llm.answer_positions get the vector."""
    return token_by_token(*given, mask=False)


def same_at_every_token(*given):
    """B is added as it is: a LoRA adds B A x, so every token has its own number A x."""
    return token_by_token(*given, scale=lambda A, x: A.sum(1))


def mask_upside_down(llm, where, s, B, module, args, h):
    """The vector is added where the answer is not: answer_positions is True where it is."""
    return token_by_token(SimpleNamespace(answer_positions=~llm.answer_positions), where, s, B, module, args, h)


def no_gradient_for_the_step(llm, where, s, B, module, args, h):
    """The step is detached: what is added cannot be trained."""
    return h + (token_by_token(llm, where, s, B, module, args, h) - h).detach()


def result_in_float32(*given):
    """The result is float32 in a bfloat16 model: the next layer would fail, or the whole run slow down."""
    return token_by_token(*given[:-1], given[-1].float())


def divided_by_the_rank(*given):
    """The step is divided by the rank: alpha = r here, so the factor alpha / r is 1."""
    return token_by_token(*given, scale=lambda A, x: A @ x / len(A))


def wrong_sign_of_the_step(*given):
    """The step is subtracted."""
    return token_by_token(*given, sign=-1)


# ------------------------------------------------------------------------------------------------------------ 2.4 pick


def walked(logits, temperature, noise=None, power=lambda T: 1 / T, late=0, ranked=False, first=lambda left: left < 0):
    found = []
    for i, row in enumerate(logits.tolist()):
        if temperature == 0:
            found.append(max(range(len(row)), key=lambda v: row[v]))
            continue
        top = max(row)
        w = [math.exp((x - top) * power(temperature)) for x in row]
        order = sorted(range(len(w)), key=lambda v: -w[v]) if ranked else range(len(w))
        left = noise[i].item() * sum(w)
        for v in order:
            left -= w[v]
            if first(left):
                break
        found.append(max(0, v - late))
    return torch.tensor(found)


def drawn_without_the_noise(logits, temperature, noise=None):
    """The noise is not used: with it a row's answer is the same whatever else is in the batch."""
    return torch.multinomial((logits.float() / (temperature or 1e-4)).softmax(-1), 1).flatten()


def one_noise_for_all_rows(logits, temperature, noise=None):
    """All rows use the first row's noise: the k answers to a prompt would all be the same."""
    return walked(logits, temperature, noise if noise is None else noise[:1].expand(len(logits)))


def impossible_token(logits, temperature, noise=None):
    """A token of probability 0 is drawn at noise 0: the cumulative probability must be above the noise, not equal."""
    return walked(logits, temperature, noise, first=lambda left: left <= 0)


def summed_in_bfloat16(logits, temperature, noise=None):
    """The probabilities are added up in bfloat16, which has 8 bits: use float32."""
    if temperature == 0 or logits.dtype != torch.bfloat16:
        return walked(logits, temperature, noise)
    up_to = (logits / temperature).softmax(-1).cumsum(-1)
    at = torch.searchsorted(up_to.float(), noise[:, None] * up_to[:, -1:].float(), right=True).flatten()
    return at.clamp(max=logits.shape[-1] - 1)


def always_the_likeliest(logits, temperature, noise=None):
    """This is greedy decoding at every temperature: RLOO needs samples, and k greedy answers are all the same."""
    return logits.argmax(-1)


def temperature_multiplied(logits, temperature, noise=None):
    """The logits are multiplied by the temperature: high temperatures must flatten."""
    return walked(logits, temperature, noise, lambda T: T)


def temperature_not_used(logits, temperature, noise=None):
    """The temperature changes nothing (but 0)."""
    return walked(logits, temperature, noise, lambda T: 1)


def one_token_early(logits, temperature, noise=None):
    """The token before the one where the cumulative probability passes the noise is taken."""
    return walked(logits, temperature, noise, late=temperature and 1)


def likeliest_token_first(logits, temperature, noise=None):
    """The tokens are cumulated from the likeliest down; the docstring says: in the order of the vocabulary."""
    return walked(logits, temperature, noise, ranked=True)


# ------------------------------------------------------------------------------------------------------ 2.5 orthogonal


def step_by_step(s, basis, sign=1, rows=None):
    out = s.clone()
    for b in basis[:rows]:
        out = out - sign * sum(x * y for x, y in zip(s.tolist(), b.tolist())) * b
    return out


def first_direction_only(s, basis):
    """Only the first row of the basis is taken out."""
    return step_by_step(s, basis, rows=1)


def part_inside_the_span(s, basis):
    """This is the part inside the span; what is wanted is the rest."""
    return s - step_by_step(s, basis)


def part_added(s, basis):
    """The part along the basis is added once more, not taken away."""
    return step_by_step(s, basis, sign=-1)


def orthogonal_and_normalised(s, basis):
    """The rest has been given length 1: only its direction was to change."""
    out = step_by_step(s, basis)
    return out / out.norm().clamp(min=1e-12)


def scaled_back(s, basis):
    """The rest is scaled to the norm that s had: that is another vector, and as a gradient a larger one."""
    out = step_by_step(s, basis)
    return out * s.norm() / out.norm().clamp(min=1e-12)


CHECKS = [
    Check(
        "2.1", wrapped,
        {
            "what is added after layer 0": torch.zeros(2, 5, 32).tolist(),
            "what is added after layer 1": COUNT.expand(2, 5, 32).tolist(),
            "what is left behind after the context": 0.0,
            "what three vectors leave behind": 0.0,
            "what is left behind after an error": 0.0,
            "another hook of the same layer still works": True,
        },
        (hook_not_removed, last_hook_not_removed, hook_stays_after_an_error, layer_off_by_one, wrong_sign_of_the_vector,
         first_row_only, first_row_for_all, last_position_only, one_vector_for_all_layers, prefill_only,
         no_gradient_for_the_vector),
    ),
    Check(
        "2.2", by_table,
        {"qwen2, LAYER": "model.layers.LAYER.mlp", "gemma2, LAYER": "model.layers.LAYER"},
        (layer_before, first_digit_of_the_layer, attention_with_its_tuple, norms_after_are_forgotten,
         whole_layer_in_every_model, mlp_in_every_model, lora_on_the_whole_mlp),
    ),
    Check(
        "2.3", token_by_token,
        {  # A x is 1 + 6 = 7 at the first token, 2 + 4 = 6 at the second
            "h + s, s = (10, 20, 30)": [[[11, 22, 33], [14, 25, 36]]],
            "h + s, where the answer is": [[[1, 2, 3], [14, 25, 36]]],
            "rank 1, A = (1, 2, 3, 4), B = (1, 0, -1)": [[[8, 2, -4], [10, 5, 0]]],
            "rank 1, where the answer is": [[[1, 2, 3], [10, 5, 0]]],
        },
        (changed_in_place, mask_forgotten, mask_upside_down, same_at_every_token, divided_by_the_rank,
         wrong_sign_of_the_step, no_gradient_for_the_step, result_in_float32),
    ),
    Check(
        "2.4", walked,
        {
            "p = 0.1, 0.2, 0.3, 0.4; noise 0.05, 0.15, 0.35, 0.95, 0": [0, 1, 2, 3, 0],
            "the same, temperature 0": [3, 3, 3],
            "the same, temperature 0.5": [1, 1, 2, 3, 0],  # p squared, cumulated: 1/30, 5/30, 14/30, 1
            "noise just below 1: tokens that the vocabulary lacks": 0,
            "noise 0, first token impossible": [1],
        },
        (drawn_without_the_noise, one_noise_for_all_rows, impossible_token, summed_in_bfloat16, always_the_likeliest,
         temperature_multiplied, temperature_not_used, one_token_early, likeliest_token_first),
    ),
    Check(
        "2.5", step_by_step,
        {
            "(3, 4, 5) without axes 1 and 2": [0, 0, 5],
            "(1, 2, 3) without (0.6, 0.8, 0)": [-0.32, 0.24, 3],
            "what is left along them": [0.0, 0.0, 0.0],
        },
        (first_direction_only, part_inside_the_span, part_added, scaled_back, orthogonal_and_normalised),
    ),
]  # fmt: skip
