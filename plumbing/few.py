"""
Vectors and LoRAs that are made of a few trained numbers v by a fixed linear map, which is drawn from --seed.

`--numbers u` makes every vector from u numbers, s = P v. `--method tinylora` (TinyLoRA, arXiv:2602.04118) makes the
LoRAs of all layers from one v.
"""

import sys

import torch
from torch.nn.functional import normalize

import model
from plumbing.processes import rank


class Few:
    """
    A few numbers v that Adam steps in place of the tensors of Vectors: s = sum_i v_i M_i, so dJ/dv_i = <M_i, dJ/ds>.

    Answers the calls of Vectors. The tensors s stay leaves: sampler, gradient and file know nothing of v. Vectors have
    a v each, the LoRAs of TinyLoRA share one. M_i are the columns of P, or U S P_i.
    Rates: v moves what it makes as far as a vector's step would. If v_i = 1 and any signs add g to a coordinate (RMS),
    the rate of v is r / g, r that of a vector there. For orthonormal P that is r sqrt(D / u): 4 numbers of 64 get 4 r.
    Places with one v: the mean of g / r over them.
    """

    def __init__(self, made, run):
        args, llm = run.args, run.subject.llm
        self.made, self.steering, self.write = made, made.steering, made.write
        draw, tiny = torch.Generator().manual_seed(args.seed), args.method == "tinylora"
        if tiny:
            self.maps = tiny_lora(llm, made, args.numbers, draw)
            prompts = [run.subject.prompt(row) for row in run.rows[:16]]
            sizes = added_by_lora(llm, made.steering, self.maps, prompts)
        else:
            self.maps = {place: orthonormal(len(s), args.numbers, draw) for place, s in made.values.items()}
            sizes = {place: (args.numbers / len(s)) ** 0.5 for place, s in made.values.items()}
        self.maps = {place: M.to(llm.device) for place, M in self.maps.items()}
        self.name = {place: "v" if tiny else place for place in self.maps}  # of the v that a place is made of
        self.values = {name: torch.zeros(args.numbers, device=llm.device) for name in self.name.values()}
        self.rates = {}
        for name, v in self.values.items():
            ratios = [sizes[place] / made.rates[place] for place in self.maps if self.name[place] == name]
            self.rates[name] = args.lr_absolute or len(ratios) / sum(ratios)
            v.grad = torch.zeros_like(v.requires_grad_())
            if rank() == 0:
                what = f"all {len(ratios)} places" if tiny else name
                print(f"{args.numbers} numbers for {what}: learning rate {self.rates[name]:.3g} a step")

    def gathered(self) -> list[torch.Tensor]:
        """The gradients of the numbers, summed over all processes."""
        self.made.gathered()
        for place, M in self.maps.items():
            self.values[self.name[place]].grad += (M * self.made.values[place].grad).flatten(1).sum(1)
        return [v.grad for v in self.values.values()]

    def after_step(self) -> None:
        self.made.after_step()
        for v in self.values.values():
            v.grad.zero_()
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the tensors from the numbers."""
        for place, M in self.maps.items():
            self.made.values[place].copy_(torch.tensordot(self.values[self.name[place]], M, 1))


def orthonormal(width: int, u: int, draw: torch.Generator) -> torch.Tensor:
    """u random directions as orthonormal rows, the columns of P: (u, width)."""
    if u > width:
        sys.exit(f"--numbers {u}: a vector there has {width} numbers, give at most as many")
    return torch.linalg.qr(torch.randn(width, u, generator=draw, dtype=torch.float64)).Q.T.float()


# ------------------------------------------------------------------------------------------------------------- TinyLoRA


def tiny_lora(llm, made, u: int, draw: torch.Generator) -> dict:
    """
    TinyLoRA (arXiv:2602.04118): W' = W + U S (sum_i v_i P_i) V^T, U S V^T the SVD of W cut to rank r.

    P_i: (r, r), N(0, 1 / r) as PEFT draws it; the paper names no distribution. As a LoRA: A = V^T (r, F),
    set here and kept, and B = sum_i v_i M_i. M_i = U S P_i. Returns {place of B: M (u, D, r)}.
    The signs of an SVD are free. Here the largest entry of every column of U is positive, so that a resumed run, or
    one on another machine, goes on with the same A.
    """
    maps = {}
    for place in [place for place in made.values if model.split(place).matrix == "lora_A"]:
        A = made.values.pop(place).requires_grad_(False)
        W, r = model.site_module(llm, place).weight.double().cpu(), len(A)  # the same digits on every machine
        U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :r]  # of W's SVD: far faster where W is wide
        U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        US_P = [U * (U.T @ W).norm(dim=1) @ torch.randn(r, r, generator=draw).to(W) / r**0.5 for _ in range(u)]
        A.copy_(normalize(U.T @ W))
        maps[place.replace("lora_A", "lora_B")] = torch.stack(US_P).to(A)
    if u > len(maps) * r * r:
        sys.exit(f"--numbers {u}: {len(maps)} x rank {r} squared has fewer; give --layer all or a higher --rank")
    return maps


@torch.no_grad()
def added_by_lora(llm, steering: dict, maps: dict, prompts: list[list[int]]) -> dict:
    """{place: RMS of what v adds to a coordinate, if v_i = 1 with any signs, the median over tokens}."""
    found, pairs = {place: [] for place in maps}, []

    def keep(place, A, G, module, args, h):
        z = args[0][0].float() @ A.T  # (T, r)
        found[place].append(((z @ G) * z).sum(1).sqrt())

    for place, M in maps.items():
        A = steering[place.replace("lora_B", "lora_A")]
        G = torch.einsum("udr,uds->rs", M, M) / M.shape[1]  # z G z = sum_i |M_i z|^2 / D
        pairs.append((model.site_module(llm, place), lambda *call, how=(place, A, G): keep(*how, *call)))
    with model.hooks(pairs):
        for ids in prompts:
            llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    return {place: torch.cat(sizes).median().item() for place, sizes in found.items()}
