"""
Comparisons on problems that were not trained on: a finished run with its base model, and a run's checkpoints.

The authors plot the best of several checkpoints, chosen by the test score. Chosen and measured on the same problems it
is too high. So `checkpoints` also chooses by training problems that no step has seen, and shows the difference.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.estimate import Estimate, markdown
from data.parallel import batch_of_problems, everyone, share
from data.problems import Problems, problems_of, prompt_ids
from data.runs import checksum, write
from evaluate import answers, measure, vectors_of
from model import prompt_seeds
from rewards import grade


def compare_with_base(subject, vectors: dict, problems: Problems, base: str, seed: int) -> float:
    """
    Print accuracies of run and base model, their difference, three answers; returns the base's accuracy at T = 1.

    subject: the model of the run; with --method full its weights are the trained ones. base: name of the base model.
    """
    found = {}
    for who, given in (("steered", vectors), ("base", {})):
        if who == "base":
            subject.swap(base)
        for t in (1.0, 0.0):
            found[who, t] = answers(subject, given, problems, 1, t, seed, bar=f"{who}, held out, T = {t:g}")
    accuracy = {key: Estimate.of(x["correct"]) for key, x in found.items()}
    accuracy |= {("difference", t): accuracy["steered", t] - accuracy["base", t] for t in (1.0, 0.0)}
    print(f"\nright answers to {len(problems.rows)} held-out problems in %, with 95 % intervals over problems\n")
    table = [[who, accuracy[who, 1.0].text(), accuracy[who, 0.0].text()] for who in ("base", "steered", "difference")]
    print(markdown(["model", "T = 1", "greedy"], table))
    for i, row in enumerate(problems.rows[:3]):
        print(f"\n{row['problem']}  (answer: {row['answer']})")
        for who in ("base", "steered"):
            verdict = "right" if found[who, 1.0]["correct"][i][0] else "wrong"
            print(f"  {who}, T = 1, {verdict}: " + found[who, 1.0]["completions"][i][0].replace("\n", "\n    "))
    return accuracy["base", 1.0].value


def held_out_accuracy(run, vectors: dict, step: int) -> dict[str, float]:
    """
    At the steps of --eval-every {"held_out": share of right answers to the held-out problems, one each at T = 1}.

    run: train.py's. The random numbers are those of the comparison at the end. Every process has to call it.
    """
    if not run.args.eval_every or step % run.args.eval_every or not run.held_out:
        return {}
    rows, n = share(run.held_out.rows), len(run.held_out.rows)
    rolled = run.subject.rollouts(vectors, rows, 1, seed=share(prompt_seeds(run.args.seed, range(n))))
    right = sum(grade(rolled.texts, [row["answer"] for row in rows]))
    return {"held_out": sum(everyone(right)) / n}


# --------------------------------------------------------------------------------------------------------- checkpoints


def unseen(config: dict, steps: int, subject) -> Problems:
    """Problems of a run's training file that none of its steps drew, at most 400."""
    data = problems_of(config["data"])
    asked = partial(prompt_ids, subject.tokenizer, system=config.get("system"), template=config.get("template"))
    fit = [row for row in data.rows if len(asked(row["problem"])) < config["context"]]  # as train.py has it
    drawn = [batch_of_problems(fit, config["prompts"], step, config["seed"]) for step in range(steps)]
    seen = {row["problem"] for batch in drawn for row in batch}
    rows = [row for row in fit if row["problem"] not in seen][:400]
    return Problems(f"unseen-{data.name}", rows, checksum(json.dumps(rows).encode()))


def folders_of(run: Path) -> dict[int, Path]:
    """{steps done: folder} of the checkpoints, and of the run itself, whose step is the last."""
    found = {int(path.name): path for path in sorted((run / "checkpoints").glob("[0-9]*")) if path.name.isdigit()}
    if not found:
        sys.exit(f"no checkpoints in {run}: train with --keep-every N, for example 53 as the authors")
    last = torch.load(run / "state.pt", map_location="cpu", weights_only=True, mmap=True)["step"]
    return found | {last: run}


def chosen(test: dict[int, Estimate], validation: dict[int, Estimate]) -> dict[str, int]:
    """The step that each rule takes: the last, the best on unseen training or on test problems, of equals the first."""
    rules = {"last": max(test)}
    if validation:
        rules["best on unseen training problems"] = max(validation, key=lambda step: validation[step].value)
    return rules | {"best on the test problems": max(test, key=lambda step: test[step].value)}


def checkpoints(subject, config: dict, run: Path, sets: list[Problems], args) -> dict:
    """
    Measure a run's checkpoints; print a table, write checkpoints.md and checkpoints.json to the run folder.

    args: evaluate.py's. Test accuracy: the mean over `sets`, at the first of args.temperatures.
    Returns {"test", "validation": {step: Estimate}, "rules": {rule: step}, "difference": Estimate or None}.
    """
    folders, test, validation = folders_of(run), {}, {}
    T, others = args.temperatures[0], unseen(config, max(folders), subject)
    for step, folder in folders.items():
        vectors, _ = vectors_of(folder, config)
        if config.get("method") == "full":
            subject.swap(str(folder / "weights"))
        found = measure(subject, vectors, sets, replace(args, temperatures=(T,)), f"step {step}")
        parts = [found[problems.name, T]["accuracy"] for problems in sets]
        test[step] = parts[0] if len(parts) == 1 else Estimate.mean(parts)
        if others.rows:
            bar = f"step {step}, {others.name}"
            right = answers(subject, vectors, others, 1, T, 0, args.prefix, bar=bar)["correct"]
            validation[step] = Estimate.of(right)
    rules = chosen(test, validation)
    fair, optimistic = rules.get("best on unseen training problems", rules["last"]), rules["best on the test problems"]
    difference = test[optimistic] - test[fair]
    table = []
    for step in folders:
        names = ", ".join(rule for rule, taken in rules.items() if taken == step)
        table.append([str(step), validation[step].text() if validation else "", test[step].text(), names])
    head = ["step", f"{len(others.rows)} unseen training problems %", "test problems %", "chosen as"]
    names = ", ".join(f"{problems.name} ({len(problems.rows)})" for problems in sets)
    text = f"{run}, T = {T:g}; test problems: {names}; 95 % intervals over problems\n\n{markdown(head, table)}\n\n"
    if not validation:
        text += f"After {max(folders)} steps no training problem is unseen, so the last step is the fair choice.\n"
    text += "The best on the test problems is how the authors choose; its own accuracy is too high, for the same "
    text += f"problems choose and measure. The choice adds {difference.text('+')} points here.\n"
    print(f"\n{text}")
    out = Path(args.out or run)
    write(out / "checkpoints.md", text)
    numbers = {"test": test, "validation": validation, "rules": rules, "difference": difference}
    write(out / "checkpoints.json", json.dumps(numbers, indent=1, default=Estimate.json) + "\n")
    print(f"wrote checkpoints.md and checkpoints.json to {out}")
    return numbers
