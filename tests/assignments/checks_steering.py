"""Exercises 2.1 to 2.5: the hook, where to steer, what is added, a token from logits, a direction left alone."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from checks_rl import drawn
from conftest import random_llm
from judge import Exercise

# ----------------------------------------------------------------------------------------------------------- 2.1 steer

IDS = torch.tensor([[5, 17, 3, 40, 8], [9, 2, 33, 21, 60]])  # 2 rows of 5 tokens
COUNT = torch.arange(32.0)


@torch.no_grad()
def residual(llm):
    """(after layer 0, after layer 1): (B, T, D) each."""
    return llm(IDS, output_hidden_states=True).hidden_states[1:3]


def steer_cases(fn, seed):
    draw, _ = drawn(seed)
    found, llm, v = {}, random_llm(), COUNT.clone()
    before = residual(llm)
    with fn(llm, {1: v}):
        inside = residual(llm)
    found["what is added after layer 0"], found["what is added after layer 1"] = (x - y for x, y in zip(inside, before))
    found["what is left behind after the context"] = (residual(llm)[1] - before[1]).abs().max()
    llm = random_llm()
    try:
        with fn(llm, {1: v}):
            raise KeyError("an error inside the context")
    except KeyError:
        found["what is left behind after an error"] = (residual(llm)[1] - before[1]).abs().max()
    llm, two = random_llm(), {0: torch.randn(32, generator=draw), 2: torch.randn(32, generator=draw)}
    with fn(llm, two), torch.no_grad():
        found["logits with vectors after layers 0 and 2"] = llm(IDS).logits[..., :7]
    found["the vector is left as it was"] = torch.equal(v, COUNT)
    return found


@contextmanager
def wrapped(llm, vectors, change=lambda h, v: h + v, shift=0, remove=True, on_errors=True):
    """The layer's forward is wrapped, no hook. change: what happens to its output h."""
    blocks = [(llm.model.layers[layer + shift], v) for layer, v in vectors.items()]
    for block, v in blocks:
        block.forward = lambda *a, inner=block.forward, v=v, **k: change(inner(*a, **k), v)

    def put_back():
        for block, _ in blocks if remove else ():
            del block.forward

    try:
        yield
    except KeyError:
        if on_errors:
            put_back()
        raise
    put_back()


def hook_not_removed(llm, vectors):
    """The hook stays after the context: every later call of the model is steered, silently."""
    return wrapped(llm, vectors, remove=False)


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

PLACES = ["{l}", "{l}.attention", "{l}.input-norm", "{l}.post-attention-norm", "{l}.self_attn.q_proj", "{l}.lora_A"]


def module_cases(fn, seed):
    found = {}
    for family in ("qwen2", "gemma2"):
        llm = random_llm(family)
        names = {id(module): name for name, module in llm.named_modules()}
        for place in PLACES:
            layer = 1 + (seed + len(place)) % 2
            place = place.format(l=layer)
            module = fn(llm, int(place) if place.isdigit() else place)
            found[f"{family}, {place.replace(str(layer), 'layer', 1)}"] = names.get(id(module), "no module").replace(
                f"layers.{layer}", "layers.LAYER"
            )
    try:
        fn(random_llm(), "1.self_attn.no_such")
    except SystemExit:
        found["a site that is not there"] = "exits"
    return found | {"a site that is not there": found.get("a site that is not there", "goes on")}


INSIDE = {  # the module of each place, in pre-norm models and where norms come after attention and MLP
    "qwen2": ["mlp", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm", "self_attn.q_proj"],
    "gemma2": ["", "post_attention_layernorm", "input_layernorm", "pre_feedforward_layernorm", "self_attn.q_proj"],
}


def by_table(llm, place, **changes):
    layer, _, site = str(place).partition(".")
    sites = ["", "attention", "input-norm", "post-attention-norm", "self_attn.q_proj", "lora_A"]
    table = dict(zip(sites, [*INSIDE[llm.config.model_type], "mlp.down_proj"])) | changes
    if site not in table:
        raise SystemExit("no such site")
    block = llm.model.layers[int(layer)]
    return block.get_submodule(table[site])


def layer_before(llm, place):
    """The layer is counted from 1: layer l is decoder_layers(llm)[l]."""
    layer, dot, site = str(place).partition(".")
    return by_table(llm, f"{int(layer) - 1}{dot}{site}")


def attention_with_its_tuple(llm, place):
    """self_attn returns a tuple, (output, weights), and a vector cannot be added to it; o_proj returns a tensor."""
    return by_table(llm, place, attention="self_attn")


def norms_after_are_forgotten(llm, place):
    """Gemma 2 normalises the outputs of attention and MLP before it adds them, which would rescale a vector there."""
    table = dict(zip(["", "attention", "input-norm", "post-attention-norm"], INSIDE["qwen2"]))
    return by_table(llm, place, **table)


def lora_on_the_whole_mlp(llm, place):
    """A LoRA without another site goes on mlp.down_proj, whose input has the inner width F; the mlp's has width D."""
    return by_table(llm, place, lora_A="mlp")


# ------------------------------------------------------------------------------------------------------------ 2.3 _add


def add_cases(fn, seed):
    draw, some = drawn(seed)
    h, x = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]]), torch.tensor([[[1.0, 0, 2, 0], [0, 1, 0, 1]]])
    A, B = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0], [0], [-1]])
    kept, one = h.clone(), SimpleNamespace(answer_positions=torch.tensor([[False, True]]))
    found = {
        "h + s, s = (10, 20, 30)": fn(one, "all", torch.tensor([10.0, 20, 30]), None, None, (), h),
        "h + s, where the answer is": fn(one, "answer", torch.tensor([10.0, 20, 30]), None, None, (), h),
        "rank 1, A = (1, 2, 3, 4), B = (1, 0, -1)": fn(one, "all", A, B, None, (x,), h),
        "rank 1, where the answer is": fn(one, "answer", A, B, None, (x,), h),
    }
    found["h is left as it was"] = torch.equal(h, kept)
    h, x = torch.randn(3, 5, 4, generator=draw), torch.randn(3, 5, 7, generator=draw)
    A, B = torch.randn(2, 7, generator=draw), torch.randn(4, 2, generator=draw)
    some_llm = SimpleNamespace(answer_positions=some(0, 2, 3, 5).bool())
    found["rank 2, 3 rows of 5 tokens"] = fn(some_llm, "all", A, B, None, (x,), h)
    found["rank 2, where the answer is"] = fn(some_llm, "answer", A, B, None, (x,), h)
    found["bfloat16 stays bfloat16"] = str(fn(one, "all", torch.ones(4), None, None, (), h.bfloat16()).dtype)
    return found


def token_by_token(llm, where, s, B, module, args, h, scale=lambda A, x: A @ x, mask=True, sign=1):
    out = h.clone()
    for b in range(h.shape[0]):
        for t in range(h.shape[1]):
            if where == "answer" and mask and not llm.answer_positions[b, t]:
                continue
            step = s if B is None else sum(a * B[:, i] for i, a in enumerate(scale(s, args[0][b, t])))
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


def divided_by_the_rank(*given):
    """The step is divided by the rank: alpha = r here, so the factor alpha / r is 1."""
    return token_by_token(*given, scale=lambda A, x: A @ x / len(A))


def wrong_sign_of_the_step(*given):
    """The step is subtracted."""
    return token_by_token(*given, sign=-1)


# ------------------------------------------------------------------------------------------------------------ 2.4 pick


def pick_cases(fn, seed):
    draw, _ = drawn(seed)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    noise = torch.tensor([0.05, 0.15, 0.35, 0.95, 0.0])
    logits = 2 * torch.randn(200, 11, generator=draw)
    noises = torch.rand(200, generator=draw)
    return {
        "p = 0.1, 0.2, 0.3, 0.4; noise 0.05, 0.15, 0.35, 0.95, 0": fn(p.expand(5, 4), 1.0, noise),
        "the same, temperature 0": fn(p.expand(3, 4), 0, torch.tensor([0.05, 0.15, 0.35])),
        "the same, temperature 0.5": fn(p.expand(5, 4), 0.5, noise),
        "200 rows of 11 tokens": fn(logits, 1.0, noises),
        "200 rows, temperature 1.7": fn(logits, 1.7, noises),
    }


def walked(logits, temperature, noise=None, power=lambda T: 1 / T, late=0, ranked=False):
    found = []
    for i, row in enumerate(logits.tolist()):
        if temperature == 0:
            found.append(max(range(len(row)), key=lambda v: row[v]))
            continue
        w = [math.exp(x * power(temperature)) for x in row]
        order = sorted(range(len(w)), key=lambda v: -w[v]) if ranked else range(len(w))
        left = noise[i].item() * sum(w)
        for v in order:
            left -= w[v]
            if left < 0:
                break
        found.append(max(0, v - late))
    return torch.tensor(found)


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


def orthogonal_cases(fn, seed):
    draw, _ = drawn(seed)
    basis = torch.linalg.qr(torch.randn(7, 3, generator=draw)).Q.T
    s = torch.randn(7, generator=draw)
    kept, out = s.clone(), fn(s, basis)
    return {
        "(3, 4, 5) without axes 1 and 2": fn(torch.tensor([3.0, 4, 5]), torch.eye(3)[:2]),
        "(1, 2, 3) without (0.6, 0.8, 0)": fn(torch.tensor([1.0, 2, 3]), torch.tensor([[0.6, 0.8, 0]])),
        "7 numbers, 3 directions": out,
        "what is left along them": basis @ out,
        "s is left as it was": torch.equal(s, kept),
    }


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


def scaled_back(s, basis):
    """The rest is scaled to the norm that s had: that is another vector, and as a gradient a larger one."""
    out = step_by_step(s, basis)
    return out * s.norm() / out.norm()


EXERCISES = [
    Exercise(
        "2.1", "model.steer", steer_cases, wrapped,
        {
            "what is added after layer 0": torch.zeros(2, 5, 32).tolist(),
            "what is added after layer 1": COUNT.expand(2, 5, 32).tolist(),
            "what is left behind after the context": 0.0,
            "what is left behind after an error": 0.0,
        },
        (hook_not_removed, hook_stays_after_an_error, layer_off_by_one, wrong_sign_of_the_vector, first_row_only,
         first_row_for_all, last_position_only),
    ),
    Exercise(
        "2.2", "model.site_module", module_cases, by_table,
        {"qwen2, layer": "model.layers.LAYER.mlp", "gemma2, layer": "model.layers.LAYER"},
        (layer_before, attention_with_its_tuple, norms_after_are_forgotten, lora_on_the_whole_mlp),
    ),
    Exercise(
        "2.3", "model._add", add_cases, token_by_token,
        {  # A x is 1 + 6 = 7 at the first token, 2 + 4 = 6 at the second
            "h + s, s = (10, 20, 30)": [[[11, 22, 33], [14, 25, 36]]],
            "h + s, where the answer is": [[[1, 2, 3], [14, 25, 36]]],
            "rank 1, A = (1, 2, 3, 4), B = (1, 0, -1)": [[[8, 2, -4], [10, 5, 0]]],
            "rank 1, where the answer is": [[[1, 2, 3], [10, 5, 0]]],
        },
        (changed_in_place, mask_forgotten, same_at_every_token, divided_by_the_rank, wrong_sign_of_the_step),
    ),
    Exercise(
        "2.4", "model.pick", pick_cases, walked,
        {
            "p = 0.1, 0.2, 0.3, 0.4; noise 0.05, 0.15, 0.35, 0.95, 0": [0, 1, 2, 3, 0],
            "the same, temperature 0": [3, 3, 3],
            "the same, temperature 0.5": [1, 1, 2, 3, 0],  # p squared, cumulated: 1/30, 5/30, 14/30, 1
        },
        (always_the_likeliest, temperature_multiplied, temperature_not_used, one_token_early, likeliest_token_first),
    ),
    Exercise(
        "2.5", "train.orthogonal", orthogonal_cases, step_by_step,
        {
            "(3, 4, 5) without axes 1 and 2": [0, 0, 5],
            "(1, 2, 3) without (0.6, 0.8, 0)": [-0.32, 0.24, 3],
            "what is left along them": [0.0, 0.0, 0.0],
        },
        (first_direction_only, part_inside_the_span, part_added, scaled_back),
    ),
]  # fmt: skip
