"""plumbing/bars.py: what a terminal and a pipe show, by a clock set by hand; nothing else depends on it."""

import io
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, random_llm

import model
import rewards
from plumbing import bars
from plumbing.bars import Bar

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def begun(bar, seconds: float):
    """The bar as if it had begun so long ago."""
    bar.start_t = time.time() - seconds
    return bar


def test_a_samplers_time_left_by_hand():
    with begun(Bar(total=10, desc="sampling", unit="answers"), 10.01) as bar:
        bar.later = 100
        bar.answered(200, 0, 300)  # 20 tokens/s; nothing has ended, so at most 400 tokens are to come
        assert str(bar) == "sampling |          | 0 of 10 answers, 00:10 gone, 00:20 left, 20 tokens/s"
        bar.answered(100, 2, 2000)  # 150 tokens for an answer, 8 answers: 1,200 tokens at 30 a second
        assert str(bar) == "sampling |##        | 2 of 10 answers, 00:10 gone, 00:40 left, 30 tokens/s"
        bar.answered(700, 8, 0)
        assert str(bar) == "sampling |##########| 10 of 10 answers, 00:10 gone, 00:00 left, 100 tokens/s"


def test_a_pipe_gets_one_line_a_minute(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(Bar, "spoke", 0)
    with begun(Bar(total=40, leave=True, desc="reward 12 %", unit="steps"), 120.01) as steps:
        steps.update(3)
        with begun(Bar(range(8), desc="training", unit="micro-batches"), 30.01) as inner, bars.waiting("quick"):
            inner.update(1)
            bars.beat(59)
            assert pipe.getvalue() == ""
            for now in (60, 61, 119):
                bars.beat(now)
            line = pipe.getvalue()
            assert re.fullmatch(
                r"reward 12 % \|.{10}\| 3 of 40 steps, 02:00 gone, 24:4\d left; "
                r"training \|.{10}\| 1 of 8 micro-batches, 00:30 gone, [\d:]+ left\n",
                line,
            )
            bars.beat(120)
            assert pipe.getvalue().count("\n") == 2
        steps.update(37)
    assert pipe.getvalue().count("\n") == 3 and "40 of 40 steps" in pipe.getvalue()  # inner bars leave nothing
    assert "\r" not in pipe.getvalue() and "quick" not in pipe.getvalue()


def test_a_terminal_gets_bars_that_move(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with begun(Bar(total=4, desc="training", unit="micro-batches"), 70.01):
        bars.beat(0)
        assert "training |          | 0 of 4 micro-batches, 01:10 gone, ? left" in sys.stderr.getvalue()
    with bars.waiting("quick"):
        bars.beat(0)
    assert "quick" not in sys.stderr.getvalue() and "\n" not in sys.stderr.getvalue()


def test_a_run_into_a_pipe_prints_whole_lines(tmp_path):
    code = "import time, train, model; from plumbing import bars; bars.EVERY = 0; real = model.sample\n"
    code += "model.sample = lambda *args: (time.sleep(0.8), real(*args))[1]\n"
    code += f"train.main(train.Config(steps=3, prompts=1, samples=2, eval_problems=4, out={str(tmp_path / 'run')!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    text = run.stderr.decode()
    assert run.returncode == 0 and "\r" not in text and text.endswith("\n"), text
    lines = [line for line in text.splitlines() if " steps, " in line]
    form = r"reward +(\?|\d+ %) \|.{10}\| \d of 3 steps, \d\d:\d\d gone, (\?|[\d:]+) left(; [a-z]+ \|.{10}\| .*)*"
    assert all(re.fullmatch(form, line) for line in lines), lines
    assert len(lines) > 2 and "3 of 3 steps" in text and re.search("[12] of 3 steps, ..:.. gone, 00:0[1-9] left", text)


@pytest.mark.parametrize("max_rows", [4, 512])  # in two batches, in one
def test_answers_are_counted_and_the_same_with_and_without(monkeypatch, max_rows):
    llm, seen = random_llm(), []

    class Seen(Bar):
        def close(self):
            seen.append((self.n, self.total, self.tokens, self.later))
            super().close()

    monkeypatch.setattr(model, "Bar", Seen)
    how = dict(k=2, max_tokens=[9, 12, 5], stop=[50, 51, 52], max_rows=max_rows)
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = model.sample(llm, PROMPTS, **how)
    monkeypatch.setenv("RANK", "1")
    assert model.sample(llm, PROMPTS, **how) == shown
    tokens = sum(map(len, shown[0]))
    assert any(shown[1]) and not all(shown[1])  # some ended by themselves
    assert seen[0] == (6, 6, tokens, 0)  # every answer and every token once


def test_grading_counts(monkeypatch):
    seen = []

    class Seen(Bar):
        def close(self):
            seen.append((self.n, self.total, self.desc))
            super().close()

    monkeypatch.setattr(rewards, "Bar", Seen)
    assert rewards.grade([r"\boxed{x+1}", r"\boxed{2}", r"\boxed{x+2}"], ["1+x", "2", "1+x"]) == [1, 1, 0]
    assert seen[0][1:] == (2, "grading")  # two of them need Math-Verify
