"""
Write a student's edition: a copy of the repository in which the functions of these exercises are stubs.

$ python tests/assignments/handout.py OUT --exercises 1.1 1.2 2.1         # OUT/: for students, OUT-lecturer/: for you

What shows an answer is not in it: second ways, right answers, model answers, tests, history, the page for lecturers.
The checks run from numbers that were computed here, for seeds 0 to 4. While one function is checked, the others are
the repository's; these are in the same file, packed. Packed is not secret: the repository itself is public.
"""

import argparse
import ast
import base64
import gzip
import inspect
import json
import shutil
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import course
from cases import EXERCISES
from checks import CHECKS
from judge import Book

SEEDS = range(5)
LEFT_OUT = ("tests/test_*.py", "tests/assignments/checks*.py", "tests/assignments/answers.py", ".ci/*",
            "tests/assignments/model_answers.md", "tests/assignments/handout.py", "tests/assignments/grade.py",
            "data/tiny-*/*")  # fmt: skip


def tracked() -> list[Path]:
    """The files of the repository, without history and what was trained here."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=course.ROOT, capture_output=True, text=True)
    names = [Path(name) for name in done.stdout.split("\0") if name]
    if done.returncode or not names:
        hidden = (".git", ".venv", "out", "__pycache__")
        names = [path.relative_to(course.ROOT) for path in course.ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not set(hidden) & set(name.parts)]
    return [name for name in names if (course.ROOT / name).is_file()]


def stubbed(text: str, functions: dict[str, str]) -> str:
    """The source with stubs. functions: {name: number of the exercise}."""
    lines = text.splitlines()
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name in functions]
    for node in reversed(nodes):  # from below, so that line numbers stay right
        number = functions[node.name]
        documented = ast.get_docstring(node) is not None
        start = node.body[0].end_lineno if documented else node.body[0].lineno - 1
        said = f'    raise NotImplementedError("exercise {number}: {node.name} is yours to write")'
        lines[start : node.end_lineno] = [said]
    return "\n".join(lines) + "\n"


def rounded(x):
    """Numbers with six digits: a quarter of the file."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(part) for part in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def source(number: str) -> str:
    return textwrap.dedent(inspect.getsource(inspect.unwrap(EXERCISES[number].ours)))


def expected(numbers: list[str], stubs: list[str], seeds=SEEDS) -> bytes:
    """What course.Printed reads: {number: {seed: {"wanted": ..., "slips": [...]}}}, and the functions of the stubs."""
    book, found = Book(EXERCISES, CHECKS), {}
    for n in numbers:
        found[n] = {s: {"wanted": rounded(book.wanted(n, s)), "slips": rounded(list(book.slips(n, s)))} for s in seeds}
    packed = {n: base64.b85encode(zlib.compress(source(n).encode())).decode() for n in stubs}
    return gzip.compress(json.dumps(found | {"packed": packed}).encode(), mtime=0)


def write(out: Path, numbers: list[str], seeds=SEEDS) -> None:
    """The student's edition, from the files of the repository."""
    by_file = {}
    for number in numbers:
        file = Path(inspect.getsourcefile(inspect.unwrap(EXERCISES[number].ours))).resolve().relative_to(course.ROOT)
        by_file.setdefault(file, {})[EXERCISES[number].name] = number
    for name in tracked():
        if any(name.match(pattern) for pattern in LEFT_OUT):
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name in by_file:
            text = stubbed((course.ROOT / name).read_text(), by_file[name])
            (out / name).write_text(text)
        elif name == Path("ASSIGNMENTS.md"):
            (out / name).write_text((course.ROOT / name).read_text().partition("\n## For lecturers")[0] + "\n")
        else:
            shutil.copy(course.ROOT / name, out / name)
    (out / "tests" / "assignments" / "expected.json.gz").write_bytes(expected(numbers, numbers, seeds))
    (out / "student.py").write_text(course.stubs(numbers))


def main(*given: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--exercises", nargs="+", default=[], help="numbers, or 1 for the first part; default all")
    args = parser.parse_args(given or None)
    lecturer = args.out.with_name(args.out.name + "-lecturer")
    for folder in (args.out, lecturer):
        if folder.exists():
            sys.exit(f"{folder} is there already: give a folder that is not")
    numbers = [exercise.number for exercise in course.chosen(args.exercises)]
    write(args.out, numbers)
    lecturer.mkdir(parents=True)
    shutil.copy(course.HERE / "model_answers.md", lecturer)
    right = [f"# {number}\n{source(number)}" for number in numbers]
    imports = dict.fromkeys(f"from {EXERCISES[n].module} import *" for n in numbers)
    (lecturer / "solutions.py").write_text("\n".join(imports) + "\n\n\n" + "\n\n".join(right))
    print(f"{args.out}: stubs of {', '.join(numbers)}. {lecturer}: solutions.py, model_answers.md")


if __name__ == "__main__":
    main()
