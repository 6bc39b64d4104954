"""
Exercises: stubs, hints, checks that name the slip, a student's functions in the real programs (ASSIGNMENTS.md).

$ python tests/assignments/course.py stubs 1.1 1.2 > student.py             # or 1: the whole first part
$ python -m pytest tests/assignments/course.py --student student.py -k 1.1
$ python -m pytest tests/assignments/course.py -k 1.1                        # after editing train.py itself
$ python tests/assignments/course.py hint 1.3 1                             # the first of three hints
$ python tests/assignments/course.py run student.py train.py --layer 27     # the student's functions in the real loop
$ python tests/assignments/course.py reveal 7 claims.json                   # organism 7, with the lecturer's password

--seed N draws other cases. A student's file is run in a process of its own (process.py); that process computes, and
this one, which never runs the file, compares. grade.py grades a folder of files, handout.py makes a student's edition.
"""

import ast
import gzip
import importlib
import inspect
import json
import os
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE), str(ROOT / "data" / "tiny")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from cases import EXERCISES  # noqa: E402
from judge import Book, judge, outputs  # noqa: E402
from process import Worker, functions_of, imported  # noqa: E402
from table import KEPT, PROGRAMS  # noqa: E402

EXPECTED = HERE / "expected.json.gz"  # in a student's edition, which has no second ways


class Printed:
    """As judge.Book, from a file that handout.py wrote."""

    def __init__(self, path: Path):
        self.found = json.loads(gzip.decompress(path.read_bytes()))

    def of(self, number: str, seed: int) -> dict:
        if number not in self.found:
            sys.exit(f"exercise {number} is not one of this edition's")
        seeds = self.found[number]
        if str(seed) not in seeds:
            sys.exit(f"--seed {seed}: this edition has the seeds {', '.join(seeds)}")
        return seeds[str(seed)]

    def wanted(self, number: str, seed: int) -> dict:
        return self.of(number, seed)["wanted"]

    def slips(self, number: str, seed: int):
        yield from self.of(number, seed)["slips"]


def make_book():
    if EXPECTED.is_file():
        return Printed(EXPECTED)
    from checks import CHECKS

    return Book(EXERCISES, CHECKS)


# --------------------------------------------------------------------------------------------------------------- stubs


def chosen(wanted: list[str]) -> list:
    """The exercises of these numbers: "1.2", or "1" for a whole part."""
    if unknown := [w for w in wanted if not any(w in (n, n.partition(".")[0]) for n in EXERCISES)]:
        sys.exit(f"no exercise {unknown[0]}; there are {', '.join(EXERCISES)}, and 1, 2, 3 for whole parts")
    return [e for n, e in EXERCISES.items() if not wanted or n in wanted or n.partition(".")[0] in wanted]


def stub(exercise) -> str:
    """The function as it stands in the source, up to the end of its docstring."""
    function = inspect.unwrap(exercise.ours)
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


# ----------------------------------------------------------------------------------------------------------- the checks


@pytest.fixture(scope="session")
def worker(pytestconfig):
    path = pytestconfig.getoption("student")
    if path and not Path(path).is_file():
        pytest.exit(f"--student {path}: there is no such file", returncode=4)
    worker = Worker(str(Path(path).resolve())) if path else None
    yield worker
    if worker:
        worker.stop()


@pytest.fixture(scope="session")
def book():
    return make_book()


@pytest.mark.parametrize("number", [pytest.param(n, id=f"{n}-{e.name}") for n, e in EXERCISES.items()])
def test_exercise(number, worker, book, pytestconfig):
    seed, exercise = pytestconfig.getoption("seed"), EXERCISES[number]
    if isinstance(book, Printed) and number not in book.found:
        pytest.skip("not one of this edition's exercises")
    found = worker.ask(number, seed) if worker else outputs(exercise, exercise.ours, seed)
    print(found.pop("said", ""))
    if "absent" in found:
        why = f"the file has no function {found['absent']}"
        if pytestconfig.getoption("keyword") or not found["others"]:  # asked for by name, or a file of nothing
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    if message := judge(book, number, found, seed):
        pytest.fail(f"exercise {number}, {exercise.module}.{exercise.name}: {message}", pytrace=False)


# ------------------------------------------------------------------------------------------------------ run and reveal


def put_in_place(student, names: set[str]) -> list[str]:
    """Replace the repository's functions by the student's, under every name that a module has for them."""
    replaced = []
    for number, fn in functions_of(student, EXERCISES).items():
        exercise = EXERCISES[number]
        if exercise.name in names:
            ours = exercise.ours
            for module in map(importlib.import_module, PROGRAMS):
                if getattr(module, exercise.name, None) is ours:
                    setattr(module, exercise.name, fn)
            replaced.append(f"{exercise.module}.{exercise.name}")
    return replaced


def hint(number: str, step: str) -> str:
    """Hint 1, 2 or 3 of an exercise: where to look, how to think of it, almost the line."""
    from hints import HINTS

    if number not in HINTS or step not in ("1", "2", "3"):
        sys.exit(f"hint wants an exercise ({', '.join(HINTS)}) and 1, 2 or 3; got {number} {step}")
    return HINTS[number][int(step) - 1]


def text_of(path: str) -> str:
    if not Path(path).is_file():
        sys.exit(f"there is no file {path}")
    return Path(path).read_text(encoding="utf-8")


def keyed(function, student: str):
    """The repository's kept or keep, with the student's file in the key."""
    return lambda path, key, *found: function(path, key | {"student": student}, *found)


def run(path: str, program: str, *args: str) -> None:
    """`python PROGRAM ARGS` with the student's functions; those that are still stubs stay the repository's."""
    import tyro

    kept_in = importlib.import_module(KEPT)
    checksum, keep, kept = kept_in.checksum, kept_in.keep, kept_in.kept
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
        sys.exit(f"the truth about organism {number} is not here ({file}): whoever made the organism has it")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    print(f"sha256 of the truth: {digest}")
    promised = ROOT / "data" / f"tiny-organism-{number}" / "truth.sha256"
    if promised.is_file() and promised.read_text().strip() != digest:
        sys.exit(f"{promised} has another checksum: this truth is not the one that the organism was made with")
    if path is None:
        return True
    truth = world.uncover(file, world.password())
    planted = {"word": truth.word, "position": truth.line, "flaw": truth.flaw, "layer": truth.layer}
    try:
        claims = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        sys.exit(f"{path} is not JSON: {error}")
    if not isinstance(claims, dict) or not claims.keys() <= planted.keys():
        sys.exit(f"{path}: wanted an object with some of {', '.join(planted)}; got {json.dumps(claims):.80}")
    right = {name: str(claims[name]) == str(planted[name]) for name in claims}  # "1" is 1
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
    elif command == "hint" and len(args) == 2:
        print(hint(*args))
    else:
        sys.exit(__doc__.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
