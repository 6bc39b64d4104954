"""Progress: bars on a terminal; elsewhere, as in a log file, one line a minute that shows all bars that are open."""

import math
import os
import sys
import time
from contextlib import contextmanager
from threading import Thread

from tqdm import tqdm

FORM = "{desc} |{bar:10}| {n} of {total} {unit}, {elapsed} gone, {remaining} left{postfix}"
EVERY = 60  # seconds between lines
NOWHERE = open(os.devnull, "w")  # where tqdm draws if there is no terminal


class Bar(tqdm):
    """
    A tqdm bar, to iterate over or to `update`. It shows after a second, and its clock runs on while a step takes long.

    leave: its last state stays, else it goes. Of several processes only the first shows any.
    """

    monitor_interval = 0  # no thread of tqdm's; ours is below
    watch, spoke = None, time.monotonic()  # the thread; when it wrote the last line

    def __init__(self, items=None, leave=False, **how):
        self.tokens = self.most = self.later = 0
        how.setdefault("bar_format", FORM)
        how |= dict(file=sys.stderr) if sys.stderr.isatty() else dict(file=NOWHERE, ascii=True)
        super().__init__(items, leave=leave, delay=1, disable=int(os.environ.get("RANK", 0)) > 0, **how)
        if Bar.watch is None:
            Bar.watch = Thread(target=watch, daemon=True)
            Bar.watch.start()

    def answered(self, tokens: int, finished: int, most: int) -> None:
        """A sampler's step: the tokens that it drew, the answers that ended, and what the others may need at most."""
        self.tokens, self.most = self.tokens + tokens, self.later + most
        self.update(finished)

    @property
    def format_dict(self) -> dict:
        """
        What is shown. A sampler's time left assumes that the answers to come are as long as those so far.

        Their length is estimated as all tokens drawn, also of unfinished answers, over the answers that have ended.
        Together they never have more tokens than the limits allow.
        """
        found = super().format_dict
        if self.tokens:
            speed, unfinished = self.tokens / max(found["elapsed"], 1e-9), self.total - self.n
            left = min(self.most, unfinished * self.tokens / self.n if self.n else math.inf) / speed
            found |= {"rate": max(unfinished, 1) / max(left, 1e-9), "postfix": f"{speed:,.0f} tokens/s"}
        return found

    def close(self) -> None:
        if self.leave and not self.disable and self.fp == NOWHERE:
            print(self, file=sys.stderr, flush=True)
        super().close()


def beat(now: float) -> None:
    """Draw the open bars once more, or write the line if it is time."""
    with Bar.get_lock():
        bars = [bar for bar in Bar._instances if isinstance(bar, Bar) and hasattr(bar, "start_t") and not bar.disable]
        bars = sorted((bar for bar in bars if time.time() > bar.start_t + 1), key=lambda bar: abs(bar.pos))
        for bar in bars:
            bar.refresh(nolock=True)
        if bars and bars[0].fp == NOWHERE and now >= Bar.spoke + EVERY:
            Bar.spoke = now
            print("; ".join(map(str, bars)), file=sys.stderr, flush=True)


def watch() -> None:
    while True:
        time.sleep(1)
        beat(time.monotonic())


@contextmanager
def waiting(what: str):
    """Show a clock inside the context, or while the decorated function runs: its end cannot be estimated."""
    with Bar(desc=what, bar_format="{desc}: {elapsed}"):
        yield
