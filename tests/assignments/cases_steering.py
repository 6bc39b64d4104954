"""What is asked in exercises 2.1 to 2.5: {case: what a function gives there}. No answers stand here."""

import math
from types import SimpleNamespace

import torch
from cases_rl import drawn, gradient
from conftest import random_llm

# ----------------------------------------------------------------------------------------------------------- 2.1 steer

IDS = torch.tensor([[5, 17, 3, 40, 8], [9, 2, 33, 21, 60]])  # 2 rows of 5 tokens
COUNT = torch.arange(32.0)


@torch.no_grad()
def entering(llm, ids=IDS):
    """[what enters layer 1, layer 2, ..., the final norm]: seen from behind, however a vector was added."""
    found, behind = [], [*llm.model.layers[1:], llm.model.norm]

    def see(module, args, more):
        found.append((args[0] if args else more["hidden_states"]).clone())

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in behind]
    llm(ids)
    for handle in handles:
        handle.remove()
    return found


def logits(llm):
    with torch.no_grad():
        return llm(IDS).logits[..., :7]


def steer_cases(fn, seed):
    draw, _ = drawn(seed)
    found, before = {}, entering(random_llm())
    llm, foreign = random_llm(), []
    llm.model.layers[1].mlp.register_forward_hook(lambda module, args, h: foreign.append(1))
    with fn(llm, {1: COUNT.clone()}):
        inside = entering(llm)
    for layer in (0, 1):
        found[f"what is added after layer {layer}"] = inside[layer] - before[layer]
    found["what is left behind after the context"] = (entering(llm)[1] - before[1]).abs().max()
    found["another hook of the same layer still works"] = len(foreign) == 2

    llm = random_llm()
    with fn(llm, {0: COUNT, 1: COUNT, 2: COUNT}):
        pass
    found["what three vectors leave behind"] = (entering(llm)[2] - before[2]).abs().max()
    try:
        with fn(llm, {0: COUNT, 1: COUNT}):
            raise KeyError("an error inside the context")
    except KeyError:
        found["what is left behind after an error"] = (entering(llm)[1] - before[1]).abs().max()

    one, two, three = (torch.randn(32, generator=draw) for _ in range(3))
    with fn(llm := random_llm(), {0: one, 2: two}):
        found["logits with vectors after layers 0 and 2"] = logits(llm)
        with fn(llm, {0: three}):
            found["logits in a context inside another"] = logits(llm)
        found["logits after the inner context"] = logits(llm)
    with fn(llm := random_llm("gemma2"), {1: one}):
        found["Gemma 2, logits"] = logits(llm)
    with fn(llm := random_llm("llama", num_hidden_layers=12), {1: one, 10: two, 11: three}):
        found["12 layers, logits with vectors after 1, 10 and 11"] = logits(llm)
    with fn(llm := random_llm(), {1: 3 * one}), torch.no_grad():
        many = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
        found["tokens that it writes, one by one"] = llm.generate(IDS, **many)[:, 5:]
    v = one.clone().requires_grad_()
    with fn(llm := random_llm(), {1: v}):
        found["the gradient of a vector"] = gradient(llm(IDS).logits, v)
    return found


# ----------------------------------------------------------------------------------------------------- 2.2 site_module

PLACES = [
    "{l}", "{l}@answer", "{l}.attention", "{l}.input-norm", "{l}.post-attention-norm", "{l}.attention@answer",
    "{l}.self_attn.q_proj", "{l}.mlp.down_proj", "{l}.lora_A", "{l}.lora_B", "{l}.self_attn.o_proj.lora_B@answer",
]  # fmt: skip


def module_cases(fn, seed):
    found = {}
    for family in ("qwen2", "gemma2", "llama", "gemma"):
        llm = random_llm(family, num_hidden_layers=12)
        names = {id(module): name for name, module in llm.named_modules()}
        for i, place in enumerate(PLACES):
            layer = (10, 1, 11)[(seed + i) % 3]
            place = place.format(l=layer)
            name = names.get(id(fn(llm, int(place) if place.isdigit() else place)), "no module of the model")
            found[f"{family}, {place.replace(str(layer), 'LAYER', 1)}"] = name.replace(f".{layer}", ".LAYER")
        try:
            fn(llm, "1.self_attn.no_such")
            said = "goes on"
        except SystemExit as error:
            said = "exits with a line" if isinstance(error.code, str) else "exits without a line"
        found[f"{family}, a site that is not there"] = said
    return found


# ------------------------------------------------------------------------------------------------------------ 2.3 _add


def add_cases(fn, seed):
    draw, some = drawn(seed)
    h, x = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]]), torch.tensor([[[1.0, 0, 2, 0], [0, 1, 0, 1]]])
    s, A, B = torch.tensor([10.0, 20, 30]), torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0], [0], [-1]])
    one, always = (SimpleNamespace(answer_positions=torch.tensor([m])) for m in ([False, True], [True]))
    found = {
        "h + s, s = (10, 20, 30)": fn(one, "all", s, None, None, (x,), h),
        "h + s, where the answer is": fn(one, "answer", s, None, None, (x,), h),
        "h + s, while an answer is decoded": fn(always, "answer", s, None, None, (x[:, :1],), h[:, :1]),
        "rank 1, A = (1, 2, 3, 4), B = (1, 0, -1)": fn(one, "all", A, B, None, (x,), h),
        "rank 1, where the answer is": fn(one, "answer", A, B, None, (x,), h),
    }
    h, x = torch.randn(3, 5, 4, generator=draw), torch.randn(3, 5, 7, generator=draw)
    A, B = torch.randn(2, 7, generator=draw).requires_grad_(), torch.randn(4, 2, generator=draw).requires_grad_()
    s = torch.randn(4, generator=draw).requires_grad_()
    some_llm = SimpleNamespace(answer_positions=some(0, 2, 3, 5).bool())

    def run(where, s, B=None):
        return fn(some_llm, where, s, B, None, (x,), h.clone())  # a copy: whoever changes it spoils this case only

    found["rank 2, 3 rows of 5 tokens"] = run("all", A, B)
    found["rank 2, where the answer is"] = run("answer", A, B)
    found["a vector, where the answer is"] = run("answer", s)
    found["the gradient of A"] = gradient(run("answer", A, B), A)
    found["the gradient of B"] = gradient(run("answer", A, B), B)
    found["the gradient of s"] = gradient(run("answer", s), s)
    h, x = h.bfloat16(), x.bfloat16()
    found["bfloat16 stays bfloat16"] = str(run("all", s).dtype)
    found["with a LoRA, too"] = str(run("answer", A, B).dtype)
    return found


# ------------------------------------------------------------------------------------------------------------ 2.4 pick


def pick_cases(fn, seed):
    draw, some = drawn(seed)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    noise = torch.tensor([0.05, 0.15, 0.35, 0.95, 0.0])
    logits, noises = 2 * torch.randn(200, 11, generator=draw), torch.rand(200, generator=draw)
    # 3,000 tokens in bfloat16; the noise is the middle of a likely token's share, far from both ends
    many = (3 * torch.randn(40, 3000, generator=draw)).bfloat16()
    shares = many.double().softmax(-1)
    token = (shares > 5e-4).float().multinomial(1, generator=draw)
    middle = (shares.cumsum(-1) - shares / 2).gather(1, token).flatten().float()
    below_one = torch.full((40,), 1 - 2**-24)
    last = fn(many, 1.0, below_one)
    return {
        "p = 0.1, 0.2, 0.3, 0.4; noise 0.05, 0.15, 0.35, 0.95, 0": fn(p.expand(5, 4), 1.0, noise),
        "the same, temperature 0": fn(p.expand(3, 4), 0, torch.tensor([0.05, 0.15, 0.35])),
        "the same, temperature 0 and no noise": fn(p.expand(3, 4), 0),
        "the same, temperature 0.5": fn(p.expand(5, 4), 0.5, noise),
        "200 rows of 11 tokens": fn(logits, 1.0, noises),
        "200 rows, temperature 1.7": fn(logits, 1.7, noises),
        "200 rows, temperature 0.3": fn(logits, 0.3, noises),
        "logits of some hundreds, where exp overflows": fn(100 * logits[:20] + 500, 1.0, noises[:20]),
        "3,000 tokens in bfloat16": fn(many, 1.0, middle),
        "noise just below 1: tokens that the vocabulary lacks": int(((last < 0) | (last >= 3000)).sum()),
        "noise 0, first token impossible": fn(torch.tensor([[-math.inf, 0.0, 0.0]]), 1.0, torch.zeros(1)),
    }


# ------------------------------------------------------------------------------------------------------ 2.5 orthogonal


def orthogonal_cases(fn, seed):
    draw, _ = drawn(seed)
    square, basis = (torch.linalg.qr(torch.randn(n, n, generator=draw)).Q for n in (4, 7))
    s = 5 * torch.randn(7, generator=draw)
    out = fn(s, basis[:3].clone())
    return {
        "(3, 4, 5) without axes 1 and 2": fn(torch.tensor([3.0, 4, 5]), torch.eye(3)[:2]),
        "(1, 2, 3) without (0.6, 0.8, 0)": fn(torch.tensor([1.0, 2, 3]), torch.tensor([[0.6, 0.8, 0]])),
        "7 numbers, 3 directions": out,
        "what is left along them": basis[:3] @ out,
        "4 numbers, all 4 directions": fn(torch.randn(4, generator=draw), square),
        "a small vector": 1e4 * fn(1e-4 * s, basis[3:5].clone()),
    }


CASES = {
    "2.1": steer_cases,
    "2.2": module_cases,
    "2.3": add_cases,
    "2.4": pick_cases,
    "2.5": orthogonal_cases,
}
