"""
Exercises: stubs, checks that name the slip, a student's functions in the real programs. ASSIGNMENTS.md lists them.

$ python tests/assignments/course.py stubs 1.1 1.2 > student.py             # or 1: the whole first part
$ python -m pytest tests/assignments/course.py --student student.py -k 1.1 --junitxml=grade.xml
$ python -m pytest tests/assignments/course.py -k 1.1                        # after editing train.py itself
$ python tests/assignments/course.py run student.py train.py --layer 27     # the student's functions in the real loop
$ python tests/assignments/course.py reveal 7 claims.json           # what organism 7 hid, against these claims

--seed N draws other cases. A student's file is run in a process of its own, with a time limit; that process computes,
and this one, which never runs the file, compares.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE), str(ROOT / "data" / "tiny")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from checks_inside import EXERCISES as INSIDE  # noqa: E402
from checks_rl import EXERCISES as RL  # noqa: E402
from checks_steering import EXERCISES as STEERING  # noqa: E402
from judge import judge, outputs  # noqa: E402

EXERCISES = {exercise.number: exercise for exercise in RL + STEERING + INSIDE}
TO_IMPORT, TO_ANSWER = 240, 60  # seconds: torch and the file, and the cases of one exercise; much, for busy machines
PROGRAMS = ("model", "rewards", "train", "evaluate", "analyze", "data.problems", "plumbing.fast", "plumbing.processes")


# --------------------------------------------------------------------------------------------------------------- stubs


def chosen(wanted: list[str]) -> list:
    """The exercises of these numbers: "1.2", or "1" for a whole part."""
    if unknown := [w for w in wanted if not any(w in (n, n.partition(".")[0]) for n in EXERCISES)]:
        sys.exit(f"no exercise {unknown[0]}; there are {', '.join(EXERCISES)}, and 1, 2, 3 for whole parts")
    return [e for n, e in EXERCISES.items() if not wanted or n in wanted or n.partition(".")[0] in wanted]


def stub(exercise) -> str:
    """The function as it stands in the source, up to the end of its docstring."""
    function = inspect.unwrap(getattr(importlib.import_module(exercise.module), exercise.name))
    source = textwrap.dedent(inspect.getsource(function))
    last = ast.parse(source).body[0].body[0].end_lineno
    head = "\n".join(source.splitlines()[:last])
    return f"# {exercise.number}\n{head}\n    raise NotImplementedError\n"


def stubs(wanted: list[str]) -> str:
    """A file for a student: imports, and each function with its docstring and without its body."""
    some = chosen(wanted)
    imports = "".join(f"from {m} import *\n" for m in dict.fromkeys(e.module for e in some))
    head = '"""Write the bodies. ASSIGNMENTS.md says what to read, how to check them and what to report."""\n\n'
    return f"{head}{imports}\n\n" + "\n\n".join(map(stub, some))


def written(text: str) -> set[str]:
    """The names of the functions of a file whose body is more than `raise NotImplementedError`."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    last = {node.name: ast.unparse(node.body[-1]) for node in functions}
    return {name for name, body in last.items() if not body.startswith("raise NotImplementedError")}


# ------------------------------------------------------------------------------- the process that runs a student's file


def imported(path: str):
    """The student's file as the module `student`."""
    spec = importlib.util.spec_from_file_location("student", path)
    module = sys.modules["student"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions_of(student) -> dict:
    """{number: function} of those that the file itself defines."""
    found = {number: getattr(student, e.name, None) for number, e in EXERCISES.items()}
    return {number: fn for number, fn in found.items() if getattr(fn, "__module__", None) == "student"}


def serve(path: str, pipe: int) -> None:
    """Read [number, seed] as lines of JSON, write what the function gives. path "": the repository's functions."""
    replies = os.fdopen(pipe, "w")  # not stdout, where a student's file may print

    def reply(found):
        print(json.dumps(found), file=replies, flush=True)

    try:
        student = imported(path) if path else None
    except (Exception, SystemExit) as error:  # whatever the file raises is what there is to say about it
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return reply({"error": f"the file cannot be imported{where}: {type(error).__name__}: {error}"})
    asked = functions_of(student) if path else EXERCISES
    ours = {n: getattr(importlib.import_module(EXERCISES[n].module), EXERCISES[n].name) for n in asked}
    theirs = asked if path else ours
    reply({})
    for line in sys.stdin:
        number, seed = json.loads(line)
        if number not in theirs:
            reply({"absent": EXERCISES[number].name, "others": bool(theirs)})
            continue
        if path:  # each is checked among the repository's: a slip in one is not a slip in the next
            vars(student).update({EXERCISES[n].name: (theirs if n == number else ours)[n] for n in theirs})
        reply(outputs(EXERCISES[number], theirs[number], seed))


class Worker:
    """A process that runs a student's file, started anew when it hangs or dies."""

    def __init__(self, path: str):
        self.path, self.process, self.broken = path, None, None

    def start(self) -> None:
        self.pipe, theirs = os.pipe()
        command = [sys.executable, __file__, "serve", self.path, str(theirs)]
        kinds = dict(stdin=subprocess.PIPE, text=True, pass_fds=[theirs], start_new_session=True, cwd=ROOT)
        self.process, self.waiting = subprocess.Popen(command, **kinds), b""
        os.close(theirs)
        self.broken = self.reply(TO_IMPORT, "the file cannot be imported").get("error")

    def reply(self, seconds: float, what: str) -> dict:
        """The next line that the process writes; it is ended when it takes too long."""
        while b"\n" not in self.waiting:
            ready, _, _ = select.select([self.pipe], [], [], seconds)  # a line comes in pieces, none of which is late
            piece = os.read(self.pipe, 1 << 16) if ready else b""
            if not piece:
                why = "the process ended" if ready else f"no answer within {seconds} s; is there an endless loop?"
                self.stop()
                return {"error": f"{what}: {why}"}
            self.waiting += piece
        line, _, self.waiting = self.waiting.partition(b"\n")
        return json.loads(line)

    def ask(self, number: str, seed: int) -> dict:
        if self.process is None and not self.broken:
            self.start()
        if self.broken:
            return {"error": self.broken}
        try:
            self.process.stdin.write(json.dumps([number, seed]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it ended after its last answer; `reply` says so
            pass
        return self.reply(TO_ANSWER, "it does not return")

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it has started
            self.process.communicate()
            os.close(self.pipe)
            self.process = None


# ----------------------------------------------------------------------------------------------------------- the checks


@pytest.fixture(scope="session")
def worker(pytestconfig):
    path = pytestconfig.getoption("student")
    if path and not Path(path).is_file():
        pytest.exit(f"--student {path}: there is no such file", returncode=4)
    worker = Worker(str(Path(path).resolve()) if path else "")
    yield worker
    worker.stop()


@pytest.mark.parametrize("number", [pytest.param(n, id=f"{n}-{e.name}") for n, e in EXERCISES.items()])
def test_exercise(number, worker, pytestconfig):
    seed = pytestconfig.getoption("seed")
    found = worker.ask(number, seed)
    if "absent" in found:
        why = f"the file has no function {found['absent']}"
        if pytestconfig.getoption("keyword") or not found["others"]:  # asked for by name, or a file of nothing
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    if message := judge(EXERCISES[number], found, seed):
        pytest.fail(f"exercise {number}, {EXERCISES[number].function}: {message}", pytrace=False)


# ------------------------------------------------------------------------------------------------------ run and reveal


def put_in_place(student, names: set[str]) -> list[str]:
    """Replace the repository's functions by the student's, under every name that a module has for them."""
    replaced = []
    for number, fn in functions_of(student).items():
        exercise = EXERCISES[number]
        if exercise.name in names:
            ours = getattr(importlib.import_module(exercise.module), exercise.name)
            for module in map(importlib.import_module, PROGRAMS):
                if getattr(module, exercise.name, None) is ours:
                    setattr(module, exercise.name, fn)
            replaced.append(exercise.function)
    return replaced


def text_of(path: str) -> str:
    if not Path(path).is_file():
        sys.exit(f"there is no file {path}")
    return Path(path).read_text(encoding="utf-8")


def keyed(function, student: str):
    """plumbing.files.kept or keep, with the student's file in the key."""
    return lambda path, key, *found: function(path, key | {"student": student}, *found)


def run(path: str, program: str, *args: str) -> None:
    """`python PROGRAM ARGS` with the student's functions; those that are still stubs stay the repository's."""
    import tyro

    from plumbing.files import checksum, keep, kept

    if program not in ("train.py", "evaluate.py", "analyze.py"):
        sys.exit(f"run wants train.py, evaluate.py or analyze.py, got {program!r}")
    module, text = importlib.import_module(Path(program).stem), text_of(path)
    try:
        replaced = put_in_place(imported(path), written(text))
    except SyntaxError as error:
        sys.exit(f"{path}, line {error.lineno}: {error.msg}")
    if program == "train.py" and not {"--out", "--help"} & set(args):  # not the repository's own run folder
        n = next(n for n in range(1, 10_000) if not Path(f"out/student-{n}").exists())
        args += ("--out", f"out/student-{n}")
    for name in ("evaluate", "analyze"):  # results that are kept are this file's, or the repository's, never mixed
        other = importlib.import_module(name)
        other.kept, other.keep = (keyed(function, checksum(text.encode())) for function in (kept, keep))
    print(f"from {path}: {', '.join(replaced) or 'nothing, all functions are stubs'}")
    sys.argv = [program, *args]
    module.main(tyro.cli(module.Config, description=module.__doc__))


def reveal(number: str, path: str | None = None) -> bool:
    """Compare claims with what was planted in organism `number`; without claims print the checksum alone."""
    import hashlib

    import world

    if not number.isdigit():
        sys.exit(f"reveal wants the number of an organism, got {number!r}")
    file = world.truth_file(int(number))
    if not file.is_file():
        sys.exit(
            f"no truth about organism {number} at {file}: `python data/tiny/pretrain.py --organism {number}` makes it"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    print(f"sha256 of the truth: {digest}")
    promised = ROOT / "data" / f"tiny-organism-{number}" / "truth.sha256"
    if promised.is_file() and promised.read_text().strip() != digest:
        sys.exit(f"{promised} has another checksum: this truth is not the one that the organism was made with")
    if path is None:
        return True
    truth = world.uncover(file)
    planted = {"word": truth.word, "position": truth.line, "flaw": truth.flaw, "layer": truth.layer}
    try:
        claims = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        sys.exit(f"{path} is not JSON: {error}")
    if not isinstance(claims, dict) or not claims.keys() <= planted.keys():
        sys.exit(f"{path}: wanted an object with some of {', '.join(planted)}; got {json.dumps(claims):.80}")
    right = {name: claims[name] == planted[name] for name in claims}
    for name in claims:
        print(f"{name:10} claimed {claims[name]!s:8} planted {planted[name]!s:8} {'right' if right[name] else 'wrong'}")
    print(f"{sum(right.values())} of {len(planted)} found")
    return sum(right.values()) == len(planted)


def main(command: str = "", *args: str) -> None:
    if command == "stubs":
        print(stubs(list(args)), end="")
    elif command == "run" and len(args) >= 2:
        run(*args)
    elif command == "reveal" and len(args) in (1, 2):
        reveal(*args)
    elif command == "serve" and len(args) == 2:
        serve(args[0], int(args[1]))
    else:
        sys.exit(__doc__.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
