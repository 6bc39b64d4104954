"""evaluate.py --ask: an answer appears in the terminal as it is decoded."""

import os
import re
import sys
from pathlib import Path

import torch

import model
from plumbing import fast

COLOUR = "\033[30;43m{}\033[0m"  # black on yellow


@torch.no_grad()
def speak(models: list[tuple], tokenizer, prompt, limit: int, stop: list[int], temperature=0.0, seed=0) -> list[int]:
    """
    Print an answer of the first model while it is decoded; returns its tokens, those of `model.sample` for k = 1.

    models: [(llm, vectors), ...]. On a terminal a token is in colour where the last of them would have chosen another
    one, from the same text and the same random number.
    """
    colour = COLOUR if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "{}"
    caches, noise = [fast.empty_cache(llm) for llm, _ in models], model.uniform(seed, limit, 1)
    ids, shown, changed = [], "", False
    while len(ids) < limit and not (ids and ids[-1] in stop):
        given, found = torch.tensor([ids[-1:] or prompt]), []
        mask = torch.ones(1, len(prompt) + len(ids), dtype=torch.long)
        positions = (mask.cumsum(1) - 1)[:, -given.shape[1] :]  # given, because not every family counts them right
        for (llm, vectors), cache in zip(models, caches):
            llm.answer_positions = (torch.arange(given.shape[1], device=llm.device) == given.shape[1] - 1)[None]
            with model.steer(llm, vectors):
                how = dict(input_ids=given.to(llm.device), past_key_values=cache, use_cache=True)
                how |= dict(attention_mask=mask.to(llm.device), position_ids=positions.to(llm.device))
                h = llm.get_decoder()(**how).last_hidden_state[:, -1]
            llm.answer_positions = None
            found += model.pick(model.logits(llm, h, dtype=None), temperature, noise[len(ids)].to(h.device)).tolist()
        ids, changed = [*ids, found[0]], changed or found[0] != found[-1]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else a part of a character
            new, shown = text.removeprefix(shown), text
            print(re.sub("[^\n]+", lambda x: colour.format(x[0]), new) if changed else new, end="", flush=True)
            changed = False
    print()
    return ids


def ask(subject: model.Subject, steered: list[dict], run: dict, args) -> None:
    """
    Answer the questions of --ask, or those typed: the base model, then the run at every strength.

    steered: vectors, one set for each of --strength.
    """
    base, tuned, speakers = (subject.llm, {}), subject, {}
    if run.get("method") == "full":  # both models have to be there, to compare them
        tuned = model.Subject.of_run(run, args)
        tuned.swap(str(Path(args.run) / "weights"))
    if args.base or args.run is None:
        speakers["base"] = [base]
    for x, vectors in zip(args.strength, steered if args.run else ()):
        speakers["steered" if args.strength == (1.0,) else f"strength {x:g}"] = [(tuned.llm, vectors), base]
    stop = model.stop_ids(subject.llm, subject.tokenizer)
    if not args.ask and sys.stdin.isatty():
        print("Type a question and press Enter; Ctrl-D ends.")
    for number, question in enumerate(filter(str.strip, args.ask or sys.stdin)):
        prompt = subject.prompt({"problem": question.strip()}, args.prefix)
        (seed,) = model.prompt_seeds((args.seeds or (0,))[0], [number])
        for temperature in args.temperatures or (0.0,):
            for who, models in speakers.items():
                print(f"\n{who}: {args.prefix}", end="")
                speak(models, subject.tokenizer, prompt, subject.room(prompt), stop, temperature, seed)
