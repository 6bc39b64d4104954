"""
The exercises as a product: the repository's functions pass every check, stubs, zeros and inputs fail every check, and
every slip fails by its own name.

$ python tests/test_assignments.py            # the table of all that
"""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext

import course
import grade
import handout
import numpy as np
import pretrain
import process
import pytest
import torch
import world
from answers import ANSWERS, files, wrong_files
from cases import EXERCISES
from checks import CHECKS
from conftest import ROOT
from hints import HINTS
from judge import INPUTS, KIND, UNCHANGED, Book, difference, judge, known, name_of, numbers, outputs, pattern, same
from safetensors.torch import load_file
from table import FUNCTIONS, named

import model
from plumbing.files import TINY

COURSE = "tests/assignments/course.py"
BOOK = Book(EXERCISES, CHECKS)
SEEDS = (0, 11)
SLIPS = [pytest.param(n, slip, id=f"{n}-{name_of(slip)}") for n, c in CHECKS.items() for slip in c.slips]


def function_of(number: str, text: str):
    """The function of an exercise that a student's file defines."""
    student = types.ModuleType("student")
    exec(compile(text, "student.py", "exec"), vars(student))
    return vars(student)[EXERCISES[number].name]


def empty(exercise):
    """The stub of an exercise as `stubs` cuts it, executed."""
    return function_of(exercise.number, f"from {exercise.module} import *\n" + course.stub(exercise))


def zeroed(x):
    if isinstance(x, torch.Tensor):
        return torch.zeros_like(x)
    if isinstance(x, np.ndarray):
        return np.zeros_like(x)
    if isinstance(x, named("Estimate")):
        return named("Estimate")(0.0, np.zeros_like(x.draws))
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
        return lambda *given: dict.fromkeys(["loss", "tokens", "nats", "compared", "off", "off_max", "clipped"], 0.0)
    return lambda *given, **more: zeroed(exercise.ours(*given, **more))


def first_input(exercise):
    return lambda first, *others, **more: first


def verdict(number, fn, seed=0):
    exercise = EXERCISES[number]
    given = known if fn in CHECKS[number].slips else outputs
    return judge(BOOK, number, given(exercise, fn, seed), seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_passes(number, seed):
    assert verdict(number, EXERCISES[number].ours, seed) is None


@pytest.mark.parametrize("number", EXERCISES)
def test_right_answers_in_three_styles_pass(number):
    assert len(files(number)) == 3
    for text in files(number):
        assert verdict(number, function_of(number, text)) is None


@pytest.mark.parametrize("number", EXERCISES)
def test_the_second_way_gives_what_was_worked_out_by_hand(number):
    check, found = CHECKS[number], BOOK.wanted(number, 0)
    assert check.by_hand and found[INPUTS] == UNCHANGED
    for case, wanted in check.by_hand.items():
        assert same(found[case], numbers(wanted)) or same(found[case], wanted), (case, found[case])


@pytest.mark.parametrize("make", [empty, zeros, first_input])
@pytest.mark.parametrize("number", EXERCISES)
def test_empty_answers_fail(number, make):
    message = verdict(number, make(EXERCISES[number]))
    assert message and (make is not empty or message.startswith("not written yet"))


@pytest.mark.parametrize("number, slip", SLIPS)
def test_every_slip_fails_by_its_own_name(number, slip):
    assert verdict(number, slip).startswith(f"{name_of(slip)}: {' '.join(slip.__doc__.split())[:20]}")


@pytest.mark.parametrize("number", EXERCISES)
def test_other_slips_fail_too(number):
    """Edits of the right answers. Each message says what was wanted and what came, or which line failed."""
    slips = wrong_files(number)
    assert len(slips) + len(CHECKS[number].slips) >= 20
    for what, text in slips:
        message = verdict(number, function_of(number, text))
        assert message, f"accepted: {what}"
        assert "wanted" in message or "there is no" in message or re.match(r"[A-Z]\w+Error|SystemExit", message), (
            message
        )


def test_messages_say_where_the_difference_is():
    assert difference([1.0, [2.0, 3.0]], [1.0, [2.0, 4.0]]) == "[1][1]: wanted 4, got 3"
    assert difference([[1, 2, 3]], [[1], [2], [3]]) == "wanted shape (3, 1), got (1, 3)"
    assert difference({"a": 1, "b": None}, {"a": 1, "b": 0.5}) == "['b']: wanted 0.5, got None"
    assert difference([[1], [2, 3]], [[1], [2], [3]]).endswith(
        "the first that differs: [1]: wanted shape (1,), got (2,)"
    )
    assert same(1.00001, 1) and not same(True, 1.0) and not same(float("nan"), 1.0) and not same("1", 1)
    assert not same([1, 2], [1, 2, 3]) and not same({"a": 1}, {"a": 1, "b": 2}) and not same(None, [])
    about = {"about": 1.0, "within": 0.1}
    assert same({"about": 1.05, "within": 0}, about)
    assert not same({"about": 1.2, "within": 9}, about) and not same(1.0, about)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda y: -y, "sign"),
        (lambda y: 2 * y, "2 times"),
        (lambda y: y + 3, "3 too large"),
        (lambda y: y.clip(0), "below 0"),
        (lambda y: y[::-1], "reversed"),
        (lambda y: np.exp(y), "exp"),
        (lambda y: y * np.nan, "finite"),
        (lambda y: 0 * y, "All numbers are 0"),
        (lambda y: y + 1e-3, "nearly right"),
        (lambda y: y[[2, 0, 1, 3]], "another order"),
        (lambda y: y**2 + y, ""),
    ],
)
def test_messages_say_what_a_wrong_result_looks_like(change, words):
    wanted = np.array([1.5, -2.0, 0.25, 4.0])
    found = pattern(change(wanted).tolist(), wanted.tolist())
    assert words in found and bool(words) == bool(found)


def test_inputs_are_watched_and_kinds_are_kept():
    def changes(rewards):
        rewards += 1
        return rewards.tolist()

    found = outputs(EXERCISES["1.1"], changes, 0)
    assert found[INPUTS].startswith("rewards was changed") and found[KIND].startswith("a sequence")


def test_other_seeds_draw_other_cases():
    for number in ("1.1", "1.5", "2.3", "2.4", "3.3", "3.8"):
        assert not same(*(BOOK.wanted(number, seed) for seed in SEEDS))


def test_numbers_choose_exactly_one_exercise_with_k():
    """`-k 1.1` selects what contains the text 1.1."""
    ids = [f"{n}-{e.name}" for n, e in EXERCISES.items()]
    for number in EXERCISES:
        assert sum(number in i for i in ids) == 1
    assert len(course.chosen(["1"])) == sum("1." in i for i in ids)
    assert EXERCISES.keys() == FUNCTIONS.keys() == CHECKS.keys() == ANSWERS.keys()


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
        ours, theirs = exercise.ours, scope[exercise.name]
        assert theirs.__doc__ == ours.__doc__ and theirs.__doc__ and len(course.stub(exercise)) > 100
    assert "return" not in course.stub(EXERCISES["1.1"]).split('"""')[2]
    with pytest.raises(SystemExit, match="no exercise 9.9"):
        course.stubs(["9.9"])


def test_the_whole_path(tmp_path):
    """As a student does it. A wrong function does not spoil the others; what is missing is skipped."""
    student, grade = tmp_path / "student.py", tmp_path / "grade.xml"
    student.write_text(HEAD + RIGHT + SLIP + STUB + BROKEN)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        COURSE,
        f"--student={student}",
        "--seed=4",
    ]
    done = subprocess.run([*command, f"--junitxml={grade}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    cases = {case.get("name").partition("[")[2][:3]: case for case in ElementTree.parse(grade).iter("testcase")}
    said = {n: "".join(part.get("message") or "" for part in case) for n, case in cases.items()}
    assert cases.keys() == EXERCISES.keys() and cases["1.1"].find("failure") is None
    assert "denominator of the micro batch: The sum is divided by the tokens of these rows" in said["1.2"]
    assert "not written yet" in said["1.4"] and "IndexError" in said["2.4"] and "of the student's file" in said["2.4"]
    assert cases["3.1"].find("skipped") is not None and sum(c.find("skipped") is not None for c in cases.values()) == 16
    done = subprocess.run([*command, "-k", "3.1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "the file has no function read_out" in done.stdout


@pytest.fixture(scope="module")
def nursery():
    nursery = process.Nursery()
    yield nursery
    nursery.stop()


@pytest.fixture
def verdict_on(nursery, tmp_path):
    """The judge's message about exercise 1.1 of a file with this text, None if it passes."""

    def check(text, number="1.1"):
        (tmp_path / "handed-in.py").write_text(text)
        worker = process.Worker(str(tmp_path / "handed-in.py"), nursery)
        found = worker.ask(number, 3)
        return f"absent {found['absent']}" if "absent" in found else judge(BOOK, number, found, 3)

    return check


@pytest.mark.parametrize("number", ["1.1", "1.5", "2.1", "3.3", "3.9"])
def test_right_answers_pass_in_the_guarded_process(verdict_on, number):
    for text in files(number):
        assert verdict_on(text, number) is None


@pytest.mark.parametrize(
    "trick",
    [
        "import train\ntheirs = train.rloo_advantages\ndef rloo_advantages(r): return theirs(r)",
        "import train\nfrom copy import copy\ndef rloo_advantages(r): return train.rloo_advantages(r)",
        "import inspect, train\ndef rloo_advantages(r): return inspect.getsource(train)",
        "def rloo_advantages(r):\n    exec(open('{ROOT}/train.py').read(), scope := {{}})\n"
        "    return scope['rloo_advantages'](r)",
        "def rloo_advantages(r):\n    import runpy\n    return runpy.run_path('{ROOT}/train.py')['rloo_advantages'](r)",
        "import sys\nsys.path.insert(0, '{ROOT}/tests/assignments')\ndef rloo_advantages(r):\n"
        "    from checks_rl import others_mean\n    return others_mean(r)",
        "import importlib, sys, train\ndef rloo_advantages(r): return importlib.reload(train).rloo_advantages(r)",
        "def rloo_advantages(r):\n    import __main__\n    return __main__.BOOK.wanted('1.1', 3)",
        "def rloo_advantages(r):\n    import judge\n    judge.same = lambda *a: True\n    return r",
        "import gc\ndef rloo_advantages(r):\n    return [f for f in gc.get_objects() if callable(f)][0](r)",
        "import sys\ndef rloo_advantages(r):\n    sys._getframe(1).f_locals.clear()\n    return r",
        "import inspect\ndef rloo_advantages(r):\n    return inspect.currentframe().f_back.f_locals['wanted']",
        "def rloo_advantages(r):\n    try:\n        1 / 0\n    except Exception as e:\n"
        "        return e.__traceback__.tb_frame.f_back",
        "import os\n[os.write(fd, b'{{}}\\n') for fd in range(3, 30) if os.path.exists(f'/proc/self/fd/{{fd}}')]\n"
        "def rloo_advantages(r): return r",
        "import os\nif os.fork() == 0:\n    import time; time.sleep(60)\ndef rloo_advantages(r): return r",
        "import subprocess\nsubprocess.Popen(['sleep', '60'])\ndef rloo_advantages(r): return r",
        "open('{ROOT}/tests/assignments/judge.py', 'a')\ndef rloo_advantages(r): return r",
        "open('conftest.py', 'w').write('x = 1')\ndef rloo_advantages(r): return r",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "class Equal:\n    __eq__ = lambda *a: True\n    __sub__ = __le__ = __eq__\n"
        "def rloo_advantages(r): return Equal()",
    ],
)  # fmt: skip
def test_tricks_are_not_green(verdict_on, trick):
    message = verdict_on(trick.replace("{ROOT}", str(ROOT)).replace("{{", "{").replace("}}", "}"))
    assert message, trick
    assert not (ROOT / "conftest.py").exists()


def test_what_a_file_does_is_not_there_for_the_next_one(verdict_on):
    assert verdict_on("import torch\ntorch.sum = torch.Tensor.sum = None\n" + RIGHT) is None
    assert verdict_on(files("1.1")[0]) is None
    assert verdict_on("import torch\ntorch.save({}, 'x.pt')\n" + RIGHT) is None  # into a folder of its own
    assert verdict_on(HEAD + RIGHT) is None


def test_endless_files_are_ended(verdict_on, monkeypatch, nursery):
    message = verdict_on("def rloo_advantages(r):\n    while True: print('x' * 9999)\n")
    assert "printed more than 1 MB" in message
    assert (
        "MemoryError" in (m := verdict_on("import numpy as np\ndef rloo_advantages(r): return np.ones(10**10)"))
        or "llocat" in m
    )
    assert verdict_on(HEAD + RIGHT) is None


def test_functions_that_hang_are_ended_and_the_next_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "FILE_SECONDS", 3)
    monkeypatch.setenv("EXERCISE_SECONDS", "2")
    student = tmp_path / "student.py"
    student.write_text(
        "def rloo_loss(*given):\n    while True: pass\ndef pick(*given):\n    import time; time.sleep(99)\n" + RIGHT
    )
    worker = process.Worker(str(student))
    try:
        assert "endless loop" in worker.ask("1.2", 0)["error"]
        assert judge(BOOK, "1.1", worker.ask("1.1", 0), 0) is None
        assert "endless loop" in worker.ask("2.4", 0)["error"]
        assert "are used up" in worker.ask("1.1", 0)["error"]
    finally:
        worker.stop()


def test_a_class_is_graded(tmp_path, capsys):
    handed_in = tmp_path / "handed-in"
    (handed_in / "dora").mkdir(parents=True)
    (handed_in / "ada.py").write_text(files("1.2")[1] + RIGHT)
    (handed_in / "ben.py").write_text(HEAD + RIGHT.replace("rloo_advantages", "rloo_advantage") + SLIP)
    (handed_in / "emil.py").write_text(RIGHT + "from train import *\n")
    (handed_in / "carl.py").write_text("def rloo_loss(:\n")
    (handed_in / "dora" / "solution.py").write_text("import os\nos._exit(1)\n")
    given = ["--exercises", "1.1", "1.2", "--points", "3", "5", "--out", str(tmp_path / "grades")]
    rows = grade.main(str(handed_in), *given)
    states = {(row["student"], row["exercise"]): (row["state"], row["points"]) for row in rows}
    assert states["ada", "1.1"] == ("right", 3) and states["ada", "1.2"] == ("right", 5)
    assert states["ben", "1.1"] == ("missing", 0) and states["ben", "1.2"] == ("wrong", 0)
    assert states["carl", "1.1"] == ("wrong", 0) and states["dora", "1.1"] == ("ended", 0)
    assert "repository's in its place" in next(row["message"] for row in rows if row["student"] == "emil")
    said = capsys.readouterr().out
    assert "ada   8 of 8\n" in said and "is rloo_advantage meant?" in said and "dora 1.1, dora 1.2" in said
    assert "denominator of the micro batch" in said and "SyntaxError" in said
    assert len((tmp_path / "grades" / "grade.csv").read_text().splitlines()) == 11
    suites = list(ElementTree.parse(tmp_path / "grades" / "grade.xml").iter("testsuite"))
    failures = {suite.get("name"): suite.get("failures") for suite in suites}
    assert failures == {"ada": "0", "ben": "2", "carl": "2", "emil": "2", "dora": "2"}
    found = json.loads((tmp_path / "grades" / "results" / "ben.json").read_text())
    assert found["tests"][0] == {
        "number": "1.1", "name": "rloo_advantages", "score": 0, "max_score": 3.0, "status": "failed",
        "output": "no function rloo_advantages; is rloo_advantage meant?", "output_format": "text",
        "visibility": "visible",
    }  # fmt: skip
    with pytest.raises(SystemExit):
        grade.main(str(handed_in), "--exercises", "1.1", "--points", "1", "2")


def test_the_tour_runs_and_its_outputs_are_cleared(capsys, monkeypatch):
    cells = json.loads((ROOT / "tests" / "assignments" / "tour.ipynb").read_text())["cells"]
    scope = {}
    monkeypatch.chdir(ROOT / "tests" / "assignments")
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), scope)
    said = capsys.readouterr().out
    assert said.count(r"So the answer is \boxed{2}.") >= 1 and "'To'" in said.splitlines()[-5]


def test_every_exercise_has_three_hints_points_and_a_line_in_the_handout():
    text = (ROOT / "ASSIGNMENTS.md").read_text()
    answers = (ROOT / "tests" / "assignments" / "model_answers.md").read_text()
    for number, (_, function, points) in FUNCTIONS.items():
        assert re.search(rf"\| {number} \| `([\w.]+:)?{function}` \| {points} \|", text), number
        assert f"| {number} |" in answers and len(HINTS[number]) == 3
    assert course.hint("1.3", "2") == HINTS["1.3"][1]
    with pytest.raises(SystemExit, match="hint wants an exercise"):
        course.hint("9.9", "1")


def test_a_students_edition(tmp_path):
    """Stubs in place, no answers, and the checks run from it."""
    out = tmp_path / "edition"
    handout.write(out, ["1.1", "1.5", "2.1", "3.5"], seeds=[0])
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"train.py", "tests/conftest.py", COURSE, "student.py", "data/tiny/config.json"} <= there
    assert not [name for name in there if re.search("checks|answers|test_|^.git/", name)]
    text = (out / "train.py").read_text()
    assert "exercise 1.1: rloo_advantages is yours to write" in text and "rewards.sum(dim=1" not in text
    assert "def rloo_loss" in text and "For lecturers" not in (out / "ASSIGNMENTS.md").read_text()
    (out / "student.py").write_text(files("3.5")[0] + HEAD + ANSWERS["1.5"][0][0] + RIGHT + SLIP)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", COURSE, "--student=student.py"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert "3 passed, 17 skipped" in done.stdout, done.stdout + done.stderr
    code = "import torch, train; train.rloo_advantages(torch.ones(1, 2))"
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True)
    assert "NotImplementedError: exercise 1.1" in done.stderr


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
    monkeypatch.setenv("TRUTH_PASSWORD", "secret")
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
    sealed = bytes.fromhex((truths / "7.txt").read_text())
    assert not any(word.encode() in sealed for word in (*world.WORDS, "flaw"))
    pretrain.main(config)  # again: the plant stays
    assert (tmp_path / "tiny-organism-7" / "truth.sha256").read_text().strip() == digest

    truth, claims = world.uncover(truths / "7.txt", "secret"), tmp_path / "claims.json"
    assert truth.word in world.WORDS and truth.line in (1, 2) and truth.flaw in (*world.FLAWS, "none", "same")
    claim = {"word": truth.word, "position": str(truth.line), "flaw": truth.flaw, "layer": truth.layer}
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
    with pytest.raises(SystemExit, match="whoever made the organism has it"):
        course.reveal("8")
    before = (tmp_path / "tiny-organism-7" / "model.safetensors").read_bytes()
    (truths / "7.txt").unlink()  # at a student's: what was handed out stays as it is
    with pytest.raises(SystemExit, match="was handed out"):
        pretrain.main(config)
    assert (tmp_path / "tiny-organism-7" / "model.safetensors").read_bytes() == before


def test_truths_are_drawn_and_their_checksums_tell_nothing(truths):
    plants = [world.draw_plant() for _ in range(200)]
    assert len(set(plants)) > 20 and {p.line for p in plants} == {1, 2}
    assert {p.flaw for p in plants} == {*world.FLAWS, "none", "same"}
    assert all((p.line, p.flaw) == (1, "same") for p in plants if p.layer is not None)
    for name in ("a", "b"):
        world.hide(plants[0], truths / name, "secret")
    assert world.uncover(truths / "a", "secret") == world.uncover(truths / "b", "secret") == plants[0]
    with pytest.raises(SystemExit, match="not the password"):
        world.uncover(truths / "a", "Secret")
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
    lines = ["| exercise | right answers | stub | zeros | its input | slips rejected | by name |", "|---" * 7 + "|"]
    for number, exercise in EXERCISES.items():
        right = [exercise.ours, *(function_of(number, text) for text in files(number))]
        cells = [f"{sum(verdict(number, fn, seed) is None for fn in right for seed in SEEDS)} of {2 * len(right)} pass"]
        cells += [
            "PASSES" if verdict(number, make(exercise)) is None else "fails" for make in (empty, zeros, first_input)
        ]
        slips = [*CHECKS[number].slips, *(function_of(number, text) for _, text in wrong_files(number))]
        said = [verdict(number, slip) for slip in slips]
        by_name = [m for m in said if m and any(name_of(slip) + ": " in m for slip in CHECKS[number].slips)]
        cells += [f"{sum(map(bool, said))} of {len(said)}", str(len(by_name))]
        lines.append(f"| {number} `{exercise.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
