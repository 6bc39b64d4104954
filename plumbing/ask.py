"""evaluate.py --ask: an answer appears in the terminal as it is decoded."""

import os
import re
import sys

import torch
from transformers.cache_utils import DynamicCache

import model

COLOUR = "\033[30;43m{}\033[0m"  # black on yellow


@torch.no_grad()
def speak(models: list[tuple], tokenizer, prompt, limit: int, stop: list[int], temperature=0.0, seed=0) -> list[int]:
    """
    Print an answer of the first model while it is decoded; returns its tokens, those of `model.sample` for k = 1.

    models: [(llm, vectors), ...]. On a terminal a token is in colour where the last of them would have chosen another
    one, from the same text and the same random number.
    """
    colour = COLOUR if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "{}"
    caches, noise, ids, shown, changed = [DynamicCache() for _ in models], model.uniform(seed, limit, 1), [], "", False
    while len(ids) < limit and not (ids and ids[-1] in stop):
        given, found = torch.tensor([ids[-1:] or prompt]), []
        for (llm, vectors), cache in zip(models, caches):
            llm.answer_positions = (torch.arange(given.shape[1], device=llm.device) == given.shape[1] - 1)[None]
            with model.steer(llm, vectors):
                how = dict(input_ids=given.to(llm.device), past_key_values=cache, use_cache=True)
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
