"""
Train steering vectors in the residual stream of a frozen LLM with RLOO (arXiv:2509.06608, Sec. 2).

$ python train.py --layer 27                                  # embedded model, 2 CPU cores: 2 minutes, reward 19 -> 75 %
$ python train.py --layer all                                 # one vector per layer (arXiv:2505.18706)
$ python train.py --layer 3,14 --steps 40 --seed 1 --out out/pair
$ python train.py --layer 27 --resume                         # goes on where a run was stopped

The loop is the paper's: sample k answers to each of N problems from the steered model, reward 1 if the boxed answer is
right, advantage = reward minus the mean of the prompt's other rewards, one Adam step on the vectors. No KL, no clipped
ratio, no division by a standard deviation, one update per batch of rollouts.

Writes to the run folder: config.json, vectors.safetensors, metrics.jsonl, samples.jsonl, state.pt, reward.png.
"""

import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import tyro
from tqdm import tqdm

import model
from rewards import grade, grading_timeouts, interval

matplotlib.use("Agg")  # a window system is not needed for a PNG
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    layer: str = "27"                      # decoder layers that get a vector, 0-based: 27, -1 (the last), 3,14 or all
    model: str = "tiny"                    # the embedded model, a local folder or a Hugging Face hub id; kept frozen
    data: str | None = None                # jsonl of {problem, answer}; default: the embedded model's training problems
    held_out: str | None = None            # jsonl for the comparison at the end; default: the embedded model's, if --data is too
    steps: int = 32                        # RLOO updates
    prompts: int = 16                      # problems a step, N (paper: 128)
    samples: int = 16                      # answers to each of them, k
    max_tokens: int | None = None          # longest answer in tokens; default 80 for the embedded model, else 3072
    system: str | None = None              # system message; default: the chat template's own
    lr: float = 0.06                       # Adam step on s_l as a share of RMS(h_l), divided by the number of vectors
    lr_absolute: float | None = None       # Adam step in the units of the residual stream, undivided; replaces --lr
    warmup: int = 3                        # steps over which the learning rate rises to its value
    clip: float = 2.0                      # largest norm of the gradient of all vectors together
    temperature: float = 1.0               # of the sampler; training divides its logits by the same number (paper: 1)
    reward: Literal["verify", "random"] = "verify"  # Math-Verify on the boxed answer, or a coin (control)
    rows: int = 512                        # answers sampled at once; lower it when memory is short
    micro_tokens: int = 4096               # tokens of a training forward pass, padding included; lower it likewise
    eval_problems: int = 400               # held-out problems for the comparison at the end; 0: none
    sample_every: int = 4                  # steps between entries in samples.jsonl
    seed: int = 0                          # of the order of the problems, the rollouts and the held-out samples
    out: str | None = None                 # run folder; default out/MODEL-layerLAYER
    resume: bool = False                   # go on with the run in that folder
    device: str = "auto"                   # cpu, cuda, ...
    dtype: str = "auto"                    # of the frozen model: float32, bfloat16; vectors and Adam are always float32


# ------------------------------------------------------------------------------------------------------------ the maths


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """
    Leave-one-out advantages (arXiv:2402.14740): A_i = r_i - mean of the other k - 1 rewards of the same prompt.

    rewards: (N, k), k >= 2. Returns (N, k), every row sums to 0. [[1, 0, 0, 0]] -> [[1, -1/3, -1/3, -1/3]]
    Paper (P4 Sec. 2): the mean of all k rewards is subtracted; here: of the others, as in RLOO and in the authors' code,
    because the own reward in the baseline biases the gradient. The two differ by the factor k / (k - 1).
    """
    k = rewards.shape[1]
    assert k >= 2, f"leave-one-out needs at least 2 samples per prompt, got {k}"
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / (k - 1)


def rloo_loss(logps: torch.Tensor, mask: torch.Tensor, advantages: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """
    -sum_i A_i sum_t log pi(y_it) / total_tokens, for the rows of one micro-batch.

    logps, mask: (B, C); advantages: (B,). total_tokens: completion tokens of the *whole* batch of rollouts, also of those
    with A = 0 and of other micro-batches, so that losses add up to the same sum however the batch is split. A mean per
    answer instead would favour short right answers and long wrong ones (arXiv:2503.20783).
    """
    return -(advantages[:, None] * logps * mask).sum() / total_tokens


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """
    Split rows into batches of at most `budget` tokens, padding included: lists of row numbers, longest rows first.

    A row longer than the budget gets a batch of its own. ([3, 5, 2], 6) -> [[1], [0, 2]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)  # the first row of a batch is its longest: what all of its rows are padded to
        else:
            batches.append([i])
    return batches


def accumulate_gradient(llm, vectors, prompts, completions, advantages, temperature, budget) -> tuple[float, float]:
    """
    Add d loss / d s_l to the .grad of every vector. Returns the loss and the mean of -log pi (nats per trained token).

    prompts, completions: B lists of token ids; advantages: (B,). Rows with A = 0 add nothing and are not run.
    """
    total = sum(map(len, completions))
    rows = advantages.nonzero().flatten().tolist()
    lengths = [len(prompts[i]) + len(completions[i]) for i in rows]
    loss, nats, trained = 0.0, 0.0, sum(len(completions[i]) for i in rows)
    with model.steer(llm, vectors):
        for batch in micro_batches(lengths, budget):
            batch = [rows[j] for j in batch]
            logps, mask = model.token_logps(llm, [prompts[i] for i in batch], [completions[i] for i in batch], temperature)
            part = rloo_loss(logps, mask, advantages[batch].to(logps.device), total)
            part.backward()
            loss, nats = loss + part.item(), nats - logps.sum().item()
    return loss, nats / max(trained, 1)


# -------------------------------------------------------------------------------------------------- settings and files


def parse_layers(text: str, depth: int) -> list[int]:
    """The layers of --layer: "27" -> [27]; "-1" -> [depth - 1]; "3,14" -> [3, 14]; "all" -> [0, ..., depth - 1]."""
    if text == "all":
        return list(range(depth))
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        sys.exit(f"--layer wants a layer number, numbers joined by commas, or all; got {text!r}")
    if outside := [layer for layer in layers if not -depth <= layer < depth]:
        sys.exit(f"--layer {outside[0]}: this model has layers 0 to {depth - 1} (or -{depth} to -1 from the end)")
    layers = [layer % depth for layer in layers]
    if len(set(layers)) < len(layers):
        sys.exit(f"--layer {text}: names a layer twice")
    return sorted(layers)


def check(args: Config) -> None:
    """Exit with one line for a setting that cannot work, before anything is loaded or written."""
    least = {"steps": 1, "prompts": 1, "samples": 2, "max_tokens": 1, "warmup": 1, "sample_every": 1, "rows": 1}
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            sys.exit(f"--{name.replace('_', '-')} wants at least {low}, got {value}")
    for name in ("temperature", "lr", "lr_absolute", "clip"):
        if (value := getattr(args, name)) is not None and not value > 0:
            sys.exit(f"--{name.replace('_', '-')} wants a number above 0, got {value}")
    if args.data is None and args.model != "tiny":
        sys.exit(f"--model {args.model} needs --data FILE: the default problems are the embedded model's")
    if args.dtype == "float16":
        sys.exit("--dtype float16: gradients divided by all tokens of a batch underflow there; use bfloat16 or float32")


def open_run(args: Config, out: Path) -> None:
    """Make the run folder with config.json; with --resume, check that the run there has the same settings."""
    settings = {name: value for name, value in asdict(args).items() if name not in ("out", "resume")}
    config = out / "config.json"
    if args.resume:
        if not (out / "state.pt").is_file():
            sys.exit(f"--resume: no run to go on with in {out}; start one without --resume, or name its folder with --out")
        saved = json.loads(config.read_text())
        free = ("steps", "eval_problems", "device")  # these change no number that was already computed
        for name in settings:
            if name not in free and saved.get(name) != settings[name]:
                sys.exit(f"--resume: the run in {out} has {name} = {saved.get(name)!r}, now it is {settings[name]!r}")
    elif (out / "metrics.jsonl").exists():
        sys.exit(f"{out} holds a run already: add --resume to go on with it, name another --out, or delete the folder")
    out.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def save_state(path: Path, step: int, vectors: dict, adam: torch.optim.Adam) -> None:
    """
    Everything that the next step depends on: the vectors, Adam's moments and the number of steps done.

    No random state: the order of the problems is a function of (seed, epoch), the rollouts are one of (seed, step).
    """
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "vectors": {l: s.detach() for l, s in vectors.items()}, "adam": adam.state_dict()}, temporary)
    temporary.replace(path)  # a stop in the middle of writing leaves the last step's state whole


def keep_lines(path: Path, steps: int) -> None:
    """Drop the lines of steps that the saved state does not contain (stopped between the log and the state)."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] < steps:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break  # a line that a kill or a full disk cut off; it is the last one
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def batch_of_problems(rows: list[dict], n: int, step: int, seed: int) -> list[dict]:
    """The n problems of a step: the data in a new order every epoch, a function of (seed, step) alone."""
    per_epoch = len(rows) // n
    order = list(range(len(rows)))
    random.Random(f"{seed}:{step // per_epoch}").shuffle(order)
    first = step % per_epoch * n
    return [rows[i] for i in order[first : first + n]]


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a jsonl file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def some_samples(step: int, batch: list[dict], texts: list[str], rewards: torch.Tensor, n: int = 4) -> list[dict]:
    """Rows for samples.jsonl: the first n answers to each of the first n problems of a step, with their rewards."""
    k = rewards.shape[1]
    return [
        {"step": step, "problem": row["problem"], "answer": row["answer"], "completion": texts[i * k + j],
         "reward": rewards[i, j].item()}
        for i, row in enumerate(batch[:n]) for j in range(min(n, k))
    ]  # fmt: skip


def plot_reward(metrics: list[dict], base: float, path: Path) -> None:
    """The share of right answers of every step, with the level of the unsteered model dashed. base: 0 to 1."""
    fig, ax = plt.subplots(figsize=(6, 3.5), constrained_layout=True)
    ax.plot([m["step"] for m in metrics], [100 * m["accuracy"] for m in metrics], "o-", ms=3, label="steered, training")
    ax.axhline(100 * base, color="black", linestyle="--", label="base model")
    ax.set(xlabel="step", ylabel="reward: right answers (%)", title="RLOO on steering vectors", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left")
    fig.savefig(path, dpi=150)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------- the loop


def main(args: Config) -> None:
    check(args)
    out = Path(args.out or f"out/{Path(args.model).name}-layer{args.layer}")
    rows = model.read_problems(args.data or model.TINY / "train.jsonl")
    if len(rows) < args.prompts:
        sys.exit(f"--prompts {args.prompts}: the data has only {len(rows)} problems")
    llm, tokenizer = model.load(args.model, args.device, args.dtype)
    layers = parse_layers(args.layer, len(model.decoder_layers(llm)))
    args = replace(args, max_tokens=args.max_tokens or (80 if args.model == "tiny" else 3072))
    open_run(args, out)

    prompts = [model.prompt_ids(tokenizer, row["problem"], args.system) for row in rows[:16]]
    rms = model.residual_rms(llm, prompts, layers)
    # divided by the number of vectors, because their sum moves the stream: with 28 of them the undivided step diverges
    lr = {layer: args.lr_absolute or args.lr * rms[layer] / len(layers) for layer in layers}
    vectors = {l: torch.zeros(llm.config.hidden_size, device=llm.device, requires_grad=True) for l in layers}
    # a group for each layer's lr, no weight decay. eps: gradients are small because the loss is divided by all tokens of
    # the batch; with the usual 1e-8 the smallest coordinates moved 5 % less than lr on the embedded model
    adam = torch.optim.Adam([{"params": [vectors[layer]]} for layer in layers], eps=1e-15)
    first = 0
    if args.resume:
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        for layer in layers:
            vectors[layer].data.copy_(state["vectors"][layer])
        adam.load_state_dict(state["adam"])
        first = state["step"]
    keep_lines(out / "metrics.jsonl", first)
    keep_lines(out / "samples.jsonl", first)
    for layer in layers:
        print(f"layer {layer}: RMS(h) = {rms[layer]:.2f}, learning rate {lr[layer]:.3g} a step")

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="reward  ?", unit="step")
    try:
        for step in bar:
            batch = batch_of_problems(rows, args.prompts, step, args.seed)
            began = time.perf_counter()
            with model.steer(llm, vectors):
                rolled = model.rollouts(
                    llm, tokenizer, [row["problem"] for row in batch], args.samples, args.max_tokens,
                    args.temperature, seed=args.seed * 1_000_003 + step, system=args.system, max_rows=args.rows,
                )  # fmt: skip
            sampled = time.perf_counter()
            timeouts = grading_timeouts()
            right = rewards = grade(rolled.texts, [row["answer"] for row in batch for _ in range(args.samples)])
            timeouts = grading_timeouts() - timeouts
            if args.reward == "random":
                coin = random.Random(f"coin:{args.seed}:{step}")
                rewards = [float(coin.random() < 0.5) for _ in right]
            rewards = torch.tensor(rewards).view(-1, args.samples)  # (N, k)
            advantages = rloo_advantages(rewards).flatten()  # (N*k,)
            graded = time.perf_counter()

            for group, layer in zip(adam.param_groups, layers):
                group["lr"] = lr[layer] * min(1, (step + 1) / args.warmup)
            adam.zero_grad()
            loss, nats = accumulate_gradient(
                llm, vectors, rolled.prompts, rolled.completions, advantages, args.temperature, args.micro_tokens
            )
            grad_norm = torch.nn.utils.clip_grad_norm_(vectors.values(), args.clip)
            adam.step()
            trained = time.perf_counter()

            metrics = {
                "step": step,
                "reward_mean": rewards.mean().item(),  # 0 to 1
                "accuracy": sum(right) / len(right),  # share of right answers; differs from the reward if that is random
                "prompts_all_equal": (rewards == rewards[:, :1]).all(1).float().mean().item(),  # share: no signal from them
                "truncated": 1 - sum(rolled.ended) / len(rolled.ended),  # share of answers cut off at max_tokens
                "tokens_mean": sum(map(len, rolled.completions)) / len(rolled.completions),
                "loss": loss,
                "surprise_nats_per_token": nats,  # mean -log pi of the trained tokens: an estimate of the entropy
                "grad_norm": grad_norm.item(),  # before clipping
                "vector_norm": {str(layer): s.norm().item() for layer, s in vectors.items()},
                "seconds_sampling": sampled - began,
                "seconds_grading": graded - sampled,
                "seconds_training": trained - graded,
                "tokens_per_second_sampling": sum(map(len, rolled.completions)) / (sampled - began),
                "grading_timeouts": timeouts,  # comparisons given up in this step
            }
            if step % args.sample_every == 0:
                append(out / "samples.jsonl", some_samples(step, batch, rolled.texts, rewards))
            append(out / "metrics.jsonl", [metrics])
            model.save_vectors(out / "vectors.safetensors", vectors, llm, args.model, step + 1)
            save_state(out / "state.pt", step + 1, vectors, adam)  # last: a step counts once this is on the disk
            bar.set_description(f"reward {100 * metrics['reward_mean']:.0f} %")
            if step == first and metrics["truncated"] > 0.9:
                bar.write(f"{100 * metrics['truncated']:.0f} % of the answers are cut off: raise --max-tokens {args.max_tokens}")

        history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        base = history[0]["accuracy"]  # step 0 samples with zero vectors: the base model, on training problems
        held_out = args.held_out or (model.TINY / "test.jsonl" if args.data is None else None)
        if held_out and args.eval_problems:
            base = compare(llm, tokenizer, model.read_problems(held_out)[: args.eval_problems], vectors, args)
        plot_reward(history, base, out / "reward.png")
    except KeyboardInterrupt:
        bar.close()
        done = (out / "state.pt").exists()
        sys.exit("stopped" + (f"; the same command with --resume goes on from the last finished step in {out}" if done else ""))
    evaluate = f"python evaluate.py {out}" + (" --data FILE" if held_out is None else "")
    print(f"\nwrote {out}/ with reward.png; now: {evaluate}")


def compare(llm, tokenizer, rows: list[dict], vectors: dict, args: Config) -> float:
    """Print base and steered accuracy on held-out problems and three answers of each. Returns the base's at T = 1."""
    texts, correct = {}, {}
    for name, given in (("base", {}), ("steered", vectors)):
        for temperature in (1.0, 0.0):
            with model.steer(llm, given):
                rolled = model.rollouts(
                    llm, tokenizer, [row["problem"] for row in rows], 1, args.max_tokens, temperature, args.seed,
                    args.system, max_rows=args.rows, bar=f"{name}, held out, T = {temperature:g}",
                )  # fmt: skip
            texts[name, temperature] = rolled.texts
            correct[name, temperature] = grade(rolled.texts, [row["answer"] for row in rows])
    for temperature in (1.0, 0.0):  # the same problems: paired
        pairs = zip(correct["steered", temperature], correct["base", temperature])
        correct["difference", temperature] = [steered - base for steered, base in pairs]

    print(f"\nright answers to {len(rows)} held-out problems in %, with 95 % intervals over problems")
    print(f"{'':12}{'T = 1':>22}{'greedy':>22}")
    for name in ("base", "steered", "difference"):
        cells = ""
        for temperature in (1.0, 0.0):
            got = correct[name, temperature]
            low, high = interval([[c] for c in got])
            cells += f"{f'{100 * sum(got) / len(got):.1f} [{100 * low:.1f}, {100 * high:.1f}]':>22}"
        print(f"{name:12}{cells}")
    for i, row in enumerate(rows[:3]):
        print(f"\n{row['problem']}  (answer: {row['answer']})")
        for name in ("base", "steered"):
            verdict = "right" if correct[name, 1.0][i] else "wrong"
            print(f"  {name}, T = 1, {verdict}: " + texts[name, 1.0][i].replace("\n", "\n    "))
    return sum(correct["base", 1.0]) / len(rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
