"""
What analyze.py says about the embedded model, against what data/tiny/world.py planted there.

Slow: trains two vectors with the defaults, 9 minutes on 2 busy cores. python -m pytest -m slow tests/test_truths.py
"""

import json

import pytest

import analyze
import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(layer): the folder of `python train.py --layer LAYER`, trained once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def of(layer):
        if layer not in done:
            done[layer] = str(folder / str(layer))
            train.main(train.Config(layer=str(layer), eval_problems=0, device="cpu", sampler="hf", out=done[layer]))
        return done[layer]

    return of


def found(name, folder, **how):
    return json.loads(json.dumps(analyze.main(analyze.Config(name, (folder,), device="cpu", **how))))


def test_lens_names_the_first_word_of_worked_answers(run):
    """And of real ones: "To" is on top for the last layer of Qwen2.5-Math-7B, too (P4 Table 8)."""
    (vector,) = found("lens", run(27))["vectors"].values()
    assert vector["dot"][0][0] == "To" and vector["cosine"][0][0] == "To"


def test_shift_is_at_the_first_token_and_nowhere_else_of_that_size(run):
    """The mode is chosen with the first token: 20 % "To" before (world.MIX), nearly always after."""
    shift = found("shift", run(27), n=60)
    first, *later = shift["by_position"]
    assert first["position"] == 0 and first["value"] > 0.6
    assert max(row["value"] for row in later if row["n"] >= 30) < 0.2 * first["value"]
    assert shift["later"]["interval_95"][1] < 0.05


def test_forcing_that_token_recovers_most_of_the_gain(run):
    """In the paper about three quarters of it (P4 Sec. 5, T = 1); here more, because the first token fixes the mode."""
    rows = found("prefix", run(27), n=100)["by_decoding"]["T = 1"]
    gain, token = (rows[name]["value"] - rows["base"]["value"] for name in ("vector", 'base + "To"'))
    assert gain > 0.4 and 0.6 < token / gain < 1.3


def test_case_finds_the_early_ending_suppressed(run):
    """After "The" an answer goes on with " calculation" or ends with " solution", one time in ten (world.P_EARLY)."""
    pairs = []
    for answer in found("case", run(27), n=8)["answers"]:
        for before, token in zip(answer["tokens"], answer["tokens"][1:]):
            if before["text"] == "The" and (base := dict(token["top_base"]).get(" solution", 0)) > 0.02:
                pairs.append((base, dict(token["forms"]["At its own place"]["top_steered"]).get(" solution", 0.0)))
    assert len(pairs) >= 5 and all(steered < 0.5 * base for base, steered in pairs)


def test_patch_says_that_little_goes_through_the_next_attention(run):
    """By the distributions of the next token and, independently, by accuracy: both keep most without the attention."""
    doc = found("patch", run(26), n=60)
    recovery = doc["found"]["Skip-Attn"]["recovery"]["value"]
    right = {name: doc["accuracy"][name]["value"] for name in ("base", "Skip-Attn", "Unmodified")}
    kept = (right["Skip-Attn"] - right["base"]) / (right["Unmodified"] - right["base"])
    assert recovery > 0.9 and kept > 0.75
