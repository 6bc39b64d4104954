"""
Train only a few numbers v. A fixed random linear map, drawn from --seed, makes the vectors or LoRAs from them.

`--numbers u` makes every vector s = P v from u numbers of its own. `--method tinylora` (TinyLoRA, arXiv:2602.04118)
makes the LoRAs of all layers from one v.
"""

import sys
from functools import partial

import torch
from torch.nn.functional import normalize

import model
from plumbing.processes import rank


class Few:
    """
    The numbers v that Adam steps, instead of the tensors s of train.Vectors: s = sum_i v_i M_i, dJ/dv_i = <M_i, dJ/ds>.

    It has the methods of Vectors. Sampler, gradient and file know nothing of v, because the tensors s stay leaves. M_i
    are the columns of P (each vector has a v of its own), or U S P_i (TinyLoRA: all LoRAs share one).
    Learning rate: a step of v should move the stream as far as a step of a whole vector, with the rate r, would. If
    v_i = +-1 change a coordinate by g (RMS), the rate of v is r / g. For orthonormal P that is r sqrt(D / u): 4 r for 4
    numbers of 64. If several places share v, g / r is averaged over them.
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
        self.name = {place: "v" if tiny else place for place in self.maps}  # which v a place is made from
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
        """Compute the tensors from the numbers."""
        for place, M in self.maps.items():
            self.made.values[place].copy_(torch.tensordot(self.values[self.name[place]], M, 1))


def orthonormal(width: int, u: int, draw: torch.Generator) -> torch.Tensor:
    """The columns of P: u random orthonormal directions as rows, (u, width)."""
    if u > width:
        sys.exit(f"--numbers {u}: a vector there has {width} numbers; give at most that many")
    return torch.linalg.qr(torch.randn(width, u, generator=draw, dtype=torch.float64)).Q.T.float()


# ------------------------------------------------------------------------------------------------------------- TinyLoRA


def tiny_lora(llm, made, u: int, draw: torch.Generator) -> dict:
    """
    TinyLoRA (arXiv:2602.04118): W' = W + U S (sum_i v_i P_i) V^T, where U S V^T is the SVD of W, cut to rank r.

    P_i: (r, r), drawn from N(0, 1 / r) as in PEFT; the paper names no distribution. As a LoRA: A = V^T (r, F), which is
    set here and stays fixed, and B = sum_i v_i M_i with M_i = U S P_i. Returns {place of B: M (u, D, r)}.
    The signs of an SVD are arbitrary. Here the largest entry of every column of U is positive, so that a resumed run,
    or one on another machine, has the same A.
    """
    maps = {}
    for place in [place for place in made.values if model.split(place).matrix == "lora_A"]:
        A = made.values.pop(place).requires_grad_(False)
        W, r = model.site_module(llm, place).weight.double().cpu(), len(A)  # double: the same on every machine
        U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :r]  # as torch.linalg.svd, far faster where W is wide
        U = U * U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        US_P = [U * (U.T @ W).norm(dim=1) @ torch.randn(r, r, generator=draw).to(W) / r**0.5 for _ in range(u)]
        A.copy_(normalize(U.T @ W))
        maps[place.replace("lora_A", "lora_B")] = torch.stack(US_P).to(A)
    if u > len(maps) * r * r:
        most = f"{len(maps)} LoRAs of rank {r} are made from at most {len(maps) * r * r}"
        sys.exit(f"--numbers {u}: {most}; give --layer all or a higher --rank")
    return maps


@torch.no_grad()
def added_by_lora(llm, steering: dict, maps: dict, prompts: list[list[int]]) -> dict:
    """{place: RMS over coordinates and signs of what v_i = +-1 add there, the median over tokens}."""
    found, pairs = {place: [] for place in maps}, []

    def measure(place, A, G, module, args, h):
        z = args[0][0].float() @ A.T  # (T, r)
        found[place].append(((z @ G) * z).sum(1).sqrt())

    for place, M in maps.items():
        A = steering[place.replace("lora_B", "lora_A")]
        G = torch.einsum("udr,uds->rs", M, M) / M.shape[1]  # z G z = sum_i |M_i z|^2 / D
        pairs.append((model.site_module(llm, place), partial(measure, place, A, G)))
    with model.hooks(pairs):
        for ids in prompts:
            llm.get_decoder()(input_ids=torch.tensor([ids], device=llm.device), use_cache=False)
    return {place: torch.cat(sizes).median().item() for place, sizes in found.items()}
