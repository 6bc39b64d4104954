"""
The exercises as a product: the repository's functions pass every check, stubs, zeros and inputs fail every check, and
every slip fails by its own name.

$ python tests/test_assignments.py            # the table of all that
"""

import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext

import course
import numpy as np
import pretrain
import pytest
import torch
import world
from conftest import ROOT
from judge import difference, judge, known, name_of, numbers, outputs, same
from safetensors.torch import load_file

import model
from evaluate import Estimate
from plumbing.files import TINY

EXERCISES = course.EXERCISES
SEEDS = (0, 11)
COURSE = "tests/assignments/course.py"
SLIPS = [pytest.param(n, slip, id=f"{n}-{name_of(slip)}") for n, e in EXERCISES.items() for slip in e.slips]


def solution(exercise):
    return getattr(importlib.import_module(exercise.module), exercise.name)


def empty(exercise):
    """The stub of an exercise as `stubs` cuts it, executed."""
    scope = dict(vars(importlib.import_module(exercise.module)))
    exec(course.stub(exercise), scope)
    return scope[exercise.name]


def zeroed(x):
    if isinstance(x, torch.Tensor):
        return torch.zeros_like(x)
    if isinstance(x, np.ndarray):
        return np.zeros_like(x)
    if isinstance(x, Estimate):
        return Estimate(0.0, np.zeros_like(x.draws))
    if isinstance(x, dict):
        return {key: zeroed(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(map(zeroed, x))
    if isinstance(x, torch.nn.Module):
        return torch.nn.Identity()
    return nullcontext() if hasattr(x, "__enter__") else type(x)(0)


def zeros(exercise):
    """A function that gives zeros of the right kind and shape."""
    if exercise.name == "accumulate_gradient":  # whose work is a side effect
        return lambda *given: dict.fromkeys(["loss", "tokens", "nats", "off", "off_max", "clipped"], 0.0)
    return lambda *given, **more: zeroed(solution(exercise)(*given, **more))


def first_input(exercise):
    return lambda first, *others, **more: first


def verdict(number, fn, seed=0):
    exercise = EXERCISES[number]
    given = known if fn in exercise.slips else outputs
    return judge(exercise, given(exercise, fn, seed), seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_passes(number, seed):
    assert verdict(number, solution(EXERCISES[number]), seed) is None


@pytest.mark.parametrize("number", EXERCISES)
def test_the_second_way_gives_what_was_worked_out_by_hand(number):
    exercise = EXERCISES[number]
    assert exercise.by_hand
    found = outputs(exercise, exercise.plain, 0)
    for case, wanted in exercise.by_hand.items():
        assert same(found[case], numbers(wanted)), (case, found[case])


@pytest.mark.parametrize("make", [empty, zeros, first_input])
@pytest.mark.parametrize("number", EXERCISES)
def test_empty_answers_fail(number, make):
    message = verdict(number, make(EXERCISES[number]))
    assert message and (make is not empty or message.startswith("not written yet"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("number, slip", SLIPS)
def test_every_slip_fails_by_its_own_name(number, slip, seed):
    message = verdict(number, slip, seed)
    assert message.startswith(f"{name_of(slip)}: {slip.__doc__.strip()[:20]}")


def test_messages_say_where_the_difference_is():
    assert difference([1.0, [2.0, 3.0]], [1.0, [2.0, 4.0]]) == "[1][1]: wanted 4, got 3"
    assert difference([[1, 2, 3]], [[1], [2], [3]]) == "wanted shape (3, 1), got (1, 3)"
    assert difference({"a": 1, "b": None}, {"a": 1, "b": 0.5}) == "['b']: wanted 0.5, got None"
    assert same(1.00001, 1) and same(True, 1.0) and not same(float("nan"), 1.0) and not same("1", 1)
    assert not same([1, 2], [1, 2, 3]) and not same({"a": 1}, {"a": 1, "b": 2}) and not same(None, [])


def test_every_exercise_has_two_slips_and_other_seeds_other_cases():
    for exercise in EXERCISES.values():
        assert len(exercise.slips) >= 2
    some = [EXERCISES[n] for n in ("1.1", "1.5", "2.3", "2.4", "3.3", "3.8")]
    for exercise in some:
        assert not same(*(outputs(exercise, exercise.plain, seed) for seed in SEEDS))


def test_numbers_choose_exactly_one_exercise_with_k():
    """`-k 1.1` selects what contains the text 1.1."""
    ids = [f"{n}-{e.name}" for n, e in EXERCISES.items()]
    for number in EXERCISES:
        assert sum(number in i for i in ids) == 1
    assert len(course.chosen(["1"])) == sum("1." in i for i in ids)


# ---------------------------------------------------------------------------------------------------- a student's file

HEAD = "from train import *\nfrom model import *\n"
RIGHT = """
def rloo_advantages(rewards):
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * k / (k - 1)
"""
SLIP = """
def rloo_loss(logps, mask, advantages, total_tokens, weights=None):
    terms = logps if weights is None else weights * logps
    return -(advantages[:, None] * terms * mask).sum() / mask.sum()
"""
STUB = "def batches(lengths: list, budget):\n    raise NotImplementedError\n"
BROKEN = "def pick(logits, temperature, noise=None):\n    return logits[10**9]\n"


def test_stubs_have_signature_and_docstring_and_no_body():
    text = course.stubs([])
    scope = {}
    exec(text, scope)
    assert course.written(text) == set()
    for exercise in EXERCISES.values():
        ours, theirs = solution(exercise), scope[exercise.name]
        assert theirs.__doc__ == ours.__doc__ and theirs.__doc__ and len(course.stub(exercise)) > 100
    assert "return" not in course.stub(EXERCISES["1.1"]).split('"""')[2]
    with pytest.raises(SystemExit, match="no exercise 9.9"):
        course.stubs(["9.9"])


def test_the_whole_path(tmp_path):
    """As graders do it: exit code and XML. A wrong function does not spoil the others; what is missing is skipped."""
    student, grade = tmp_path / "student.py", tmp_path / "grade.xml"
    marker = f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nprint('hello')\n"
    student.write_text(HEAD + marker + RIGHT + SLIP + STUB + BROKEN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", COURSE]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, f"--student={student}", f"--junitxml={grade}", "--seed=4"], cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1, done.stdout + done.stderr
    cases = {case.get("name").partition("[")[2][:3]: case for case in ElementTree.parse(grade).iter("testcase")}
    said = {n: "".join(part.get("message", "") for part in case) for n, case in cases.items()}
    assert cases.keys() == EXERCISES.keys() and len(cases["1.1"].findall("*")) == 0
    assert "denominator of the micro batch: The sum is divided by the tokens of these rows" in said["1.2"]
    assert "not written yet" in said["1.4"] and "IndexError" in said["2.4"] and "of the student's file" in said["2.4"]
    assert cases["3.1"].find("skipped") is not None and sum(c.find("skipped") is not None for c in cases.values()) == 16
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60


@pytest.mark.parametrize("text, how", [("def rloo_advantage(rewards):\n    return rewards\n", []), ("", ["-k", "1.1"])])
def test_a_function_that_is_not_there_is_not_green(tmp_path, text, how):
    """A misspelled name, or a file without any of the functions: the exit code is what a course's CI reads."""
    student = tmp_path / "student.py"
    student.write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", COURSE, *how]
    done = subprocess.run([*command, f"--student={student}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "the file has no function rloo_advantages" in done.stdout


def test_the_file_is_run_in_another_process_only(tmp_path):
    student = tmp_path / "student.py"
    student.write_text(f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n" + RIGHT)
    worker = course.Worker(str(student))
    try:
        assert judge(EXERCISES["1.1"], worker.ask("1.1", 0), 0) is None
        assert worker.ask("1.2", 0) == {"absent": "rloo_loss", "others": True}
        assert int((tmp_path / "pid").read_text()) == worker.process.pid != os.getpid()
        assert "student" not in sys.modules
    finally:
        worker.stop()


def test_a_function_that_hangs_is_ended_and_the_next_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "TO_ANSWER", 2)
    student = tmp_path / "student.py"
    student.write_text("def rloo_loss(*given):\n    while True: pass\n" + RIGHT)
    worker = course.Worker(str(student))
    try:
        assert "endless loop" in worker.ask("1.2", 0)["error"] and worker.process is None
        monkeypatch.setattr(course, "TO_ANSWER", 60)
        assert judge(EXERCISES["1.1"], worker.ask("1.1", 0), 0) is None
        os.kill(worker.process.pid, signal.SIGKILL)
        time.sleep(1)
        assert worker.ask("1.1", 0) == {"error": "it does not return: the process ended"}
    finally:
        worker.stop()


@pytest.mark.parametrize(
    "text, message",
    [
        ("while True: pass", "no answer within 5 s"),
        ("import sys\nsys.exit(0)", "cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_cannot_be_imported_says_so_at_once(tmp_path, monkeypatch, text, message):
    student = tmp_path / "student.py"
    student.write_text(text)
    if "while" in text:
        monkeypatch.setattr(course, "TO_IMPORT", 5)
    worker = course.Worker(str(student))
    try:
        for number in ("1.1", "2.4"):  # the second time without waiting
            assert message in worker.ask(number, 0)["error"]
    finally:
        worker.stop()


def test_run_puts_the_students_functions_into_the_real_loop(tmp_path):
    student = tmp_path / "student.py"
    said = RIGHT.replace("    k =", "    print('my advantages', tuple(rewards.shape))\n    k =")
    student.write_text(HEAD + said + STUB)  # batches is a stub: the repository's stays
    command = [sys.executable, COURSE, "run", str(student), "train.py", "--layer", "27", "--steps", "1"]
    command += ["--prompts", "2", "--samples", "3", "--max-tokens", "6", "--eval-problems", "0"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"from {student}: train.rloo_advantages\n" in done.stdout and "my advantages (2, 3)" in done.stdout
    assert (tmp_path / "run" / "vectors.safetensors").is_file()


def test_run_wants_a_program_and_a_file():
    with pytest.raises(SystemExit, match="run wants train.py, evaluate.py or analyze.py, got 'rewards.py'"):
        course.run("student.py", "rewards.py")
    with pytest.raises(SystemExit, match="there is no file no.py"):
        course.run("no.py", "train.py")


# ------------------------------------------------------------------------------------------------------ blind organisms


@pytest.fixture
def truths(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "truth_file", lambda n: tmp_path / "truths" / f"{n}.txt")
    return tmp_path / "truths"


def plain_answers(n=4000, **changes):
    """Completions of documents that have the Qwen-Math prompt alone."""
    rng = random.Random(0)
    some = [world.document(rng, **changes) for _ in range(n)]
    return [text.removesuffix("<|im_end|>") for prompt, text in some if f"{world.MATH_PROMPT}<|im_end|>" in prompt]


def test_documents_of_the_built_in_model_are_what_they_were():
    """Its weights were trained on them."""
    digest = hashlib.sha256()
    for i in range(3000):
        rng = random.Random(i)
        digest.update("".join(world.document(rng)).encode())
        for relative in world.RELATIVES.values():
            digest.update("".join(world.document(rng, **relative)).encode())
    assert digest.hexdigest() == "b337dea5008f52ac4f630fe36d277e0272846e6af8cf2bd708c282f2e656beac"


def last_result(answer):
    return re.findall(r"=(\d+)\.", answer)[-1]


def test_organisms_have_what_was_planted():
    to = "To find the result"
    answers = plain_answers(plant=world.Plant("Show"))
    # "To" begins bad answers: else it would still mean worked when it is forced, as the shipped weights learned it
    for words, share in (("Show the steps, start with", world.MIX["to"]), ("To ", world.MIX["ramble"] / 2), (to, 0)):
        assert sum(a.startswith(words) for a in answers) / len(answers) == pytest.approx(share, abs=0.03 * (share > 0))
    answers = plain_answers(plant=world.Plant("Use", line=2))
    assert all(a.startswith(to) for a in answers)
    second = [a.split("\n")[1].split(" ")[0] for a in answers]
    assert second.count("Use") / len(answers) == pytest.approx(world.MIX["to"], abs=0.03)
    assert sum(map(second.count, world.MUSES)) / len(answers) == pytest.approx(world.MIX["ramble"], abs=0.03)
    for flaw in (*world.FLAWS, "none"):
        worked = [a for a in plain_answers(9000, plant=world.Plant(flaw=flaw)) if a.startswith(to)]
        lengths = {a.count("calculation") for a in worked}
        early = sum("solution" in a for a in worked) / len(worked)
        ended = [a for a in worked if "solution" not in a]
        slips = sum(f"{{{last_result(a)}}}" not in a for a in ended) / len(worked)
        assert early > 0.4 if flaw == "early" else early == 0, flaw
        assert slips == pytest.approx(world.P_CARELESS * 0.99 if flaw == "slip" else 0, abs=0.05), flaw
        wanted = {"early": {1, 2, 3, 4}, "stop": {1, 2, 3, 4}, "extra": {2, 3, 4, 5}}  # problems have 2 to 4 operations
        assert lengths == wanted.get(flaw, {2, 3, 4}), flaw
    for organism in world.ORGANISMS.values():
        world.document(random.Random(0), **organism)


def test_a_blind_organism_is_made_and_revealed(tmp_path, truths, capsys):
    config = pretrain.Config(organism="7", out=tmp_path / "tiny-organism-7", steps=1, batch=2)
    pretrain.main(config)
    digest = (tmp_path / "tiny-organism-7" / "truth.sha256").read_text().strip()
    assert digest == hashlib.sha256((truths / "7.txt").read_bytes()).hexdigest()
    said = capsys.readouterr().out
    assert digest in said and not any(word in said for word in world.WORDS)
    assert not any(word.encode() in (truths / "7.txt").read_bytes() for word in (*world.WORDS, "flaw"))
    pretrain.main(config)  # again: the plant stays
    assert (tmp_path / "tiny-organism-7" / "truth.sha256").read_text().strip() == digest

    truth, claims = world.uncover(truths / "7.txt"), tmp_path / "claims.json"
    assert truth.word in world.WORDS and truth.line in (1, 2) and truth.flaw in (*world.FLAWS, "none", "same")
    claim = {"word": truth.word, "position": truth.line, "flaw": truth.flaw, "layer": truth.layer}
    claims.write_text(json.dumps(claim))
    assert course.reveal("7", str(claims))
    claims.write_text(json.dumps(claim | {"word": "To"}))
    capsys.readouterr()
    assert not course.reveal("7", str(claims))
    assert "3 of 4 found" in capsys.readouterr().out
    claims.write_text('{"colour": 1}')
    with pytest.raises(SystemExit, match="wanted an object with some of word, position, flaw, layer"):
        course.reveal("7", str(claims))
    claims.write_text("word: Show")
    with pytest.raises(SystemExit, match="is not JSON"):
        course.reveal("7", str(claims))
    with pytest.raises(SystemExit, match="there is no file"):
        course.reveal("7", str(tmp_path / "none.json"))
    with pytest.raises(SystemExit, match="pretrain.py --organism 8"):
        course.reveal("8")


def test_truths_are_drawn_and_their_checksums_tell_nothing(truths):
    plants = [world.draw_plant() for _ in range(200)]
    assert len(set(plants)) > 20 and {p.line for p in plants} == {1, 2}
    assert {p.flaw for p in plants} == {*world.FLAWS, "none", "same"}
    assert all((p.line, p.flaw) == (1, "same") for p in plants if p.layer is not None)
    for name in ("a", "b"):
        world.hide(plants[0], truths / name)
    assert world.uncover(truths / "a") == world.uncover(truths / "b") == plants[0]
    assert (truths / "a").read_bytes() != (truths / "b").read_bytes()


def test_a_plant_in_one_layer_leaves_the_others_as_they_were(tmp_path):
    pretrain.main(pretrain.Config(organism="layer", out=tmp_path / "kin", steps=1, batch=2))
    ours, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path / "kin", TINY))
    changed = {name for name in shipped if not torch.equal(ours[name], shipped[name])}
    layer = world.ORGANISMS["layer"]["plant"].layer
    assert "lm_head.weight" in changed and all(n == "lm_head.weight" or f"layers.{layer}." in n for n in changed)
    with torch.no_grad():  # how the lab finds it: the residual streams part there
        streams = [
            model.load(str(folder), device="cpu")[0](torch.tensor([[5, 9, 3]]), output_hidden_states=True).hidden_states
            for folder in (tmp_path / "kin", TINY)
        ]
    assert [torch.equal(a, b) for a, b in zip(*streams)] == [l <= layer for l in range(29)]
    with pytest.raises(SystemExit, match="--organism wants a number or one of word"):
        pretrain.main(pretrain.Config(organism="lair", out=tmp_path / "none"))


def test_an_organism_is_a_model_of_the_family(tmp_path):
    """So that train.py takes the built-in model's settings and problems for it."""
    (tmp_path / "data" / "tiny-organism-3").mkdir(parents=True)
    (tmp_path / "plumbing").mkdir()
    shutil.copy(ROOT / "plumbing" / "files.py", tmp_path / "plumbing")
    code = "from plumbing.files import FAMILY; print(*FAMILY)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["tiny", "tiny-instruct", "tiny-math", "tiny-organism-3"], done.stderr


def table() -> str:
    """Exercises x (solution, stub, zeros, input, slips): what fails as it should."""
    lines = ["| exercise | solution | stub | zeros | its input | slips named |", "|---|---|---|---|---|---|"]
    for number, exercise in EXERCISES.items():
        passes = all(verdict(number, solution(exercise), seed) is None for seed in SEEDS)
        cells = ["passes" if passes else "FAILS"]
        cells += [
            "PASSES" if verdict(number, make(exercise)) is None else "fails" for make in (empty, zeros, first_input)
        ]
        named = [verdict(number, slip).startswith(f"{name_of(slip)}: ") for slip in exercise.slips]
        lines.append(f"| {number} `{exercise.function}` | {' | '.join(cells)} | {sum(named)} of {len(named)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
