"""
Grade a folder of students' files: a table, grade.csv, JUnit's grade.xml, and Gradescope's results.json for each.

$ python tests/assignments/grade.py handed-in --exercises 1.1 1.2 1.3 --points 2 3 4      # NAME.py, or NAME/anything.py
$ python tests/assignments/grade.py /autograder/submission --results /autograder/results/results.json    # one student

Each exercise of each student runs in a process of its own, forked from one that knows no answers (process.py). A
function that is missing or misspelt has 0 points, as has one that was ended because of time, memory or output.
"""

import argparse
import ast
import csv
import difflib
import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import course
from judge import judge
from process import Nursery, Worker
from table import FUNCTIONS


def files_in(folder: Path) -> dict[str, list[Path]]:
    """{student: files}: NAME.py, or a folder NAME with one .py file in it."""
    found = {path.stem: [path] for path in sorted(folder.glob("*.py"))}
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))):
        found[inside.name] = sorted(inside.glob("*.py"))
    return found


def defined(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def verdict(worker: Worker, book, number: str, seed: int) -> tuple[str, str]:
    """("right", "wrong", "missing" or "ended"; what there is to say)."""
    found = worker.ask(number, seed)
    if "absent" in found:
        if found["absent"] in defined(worker.path):
            return "missing", f"{found['absent']} is defined, but a later import puts the repository's in its place"
        near = difflib.get_close_matches(found["absent"], defined(worker.path), 1)
        return "missing", f"no function {found['absent']}{f'; is {near[0]} meant?' if near else ''}"
    message = judge(book, number, {k: v for k, v in found.items() if k != "killed"}, seed)
    return "ended" if "killed" in found else "wrong" if message else "right", message or ""


def grade(students: dict[str, list[Path]], numbers: list[str], points: dict[str, float], seed: int) -> list[dict]:
    """A row for each student and exercise."""
    book, nursery, rows = course.make_book(), Nursery(), []
    try:
        for name, paths in students.items():
            worker = Worker(str(paths[0]), nursery) if len(paths) == 1 else None
            for number in numbers:
                began = time.monotonic()
                if worker:
                    state, message = verdict(worker, book, number, seed)
                else:
                    state, message = "missing", f"wanted one .py file, got {len(paths)}"
                rows.append(
                    {
                        "student": name, "exercise": number, "state": state, "maximum": points[number],
                        "points": points[number] if state == "right" else 0, "message": " ".join(message.split()),
                        "seconds": round(time.monotonic() - began, 2),
                    }
                )  # fmt: skip
    finally:
        nursery.stop()
    return rows


def table(rows: list[dict]) -> str:
    """A line for each student, and below it one for each exercise that is not right."""
    names = list(dict.fromkeys(row["student"] for row in rows))
    wide, lines = max(map(len, names), default=0), []
    for name in names:
        mine = [row for row in rows if row["student"] == name]
        got, most = (sum(row[key] for row in mine) for key in ("points", "maximum"))
        lines.append(f"{name:{wide}}  {got:g} of {most:g}")
        for row in mine:
            if row["state"] != "right":
                lines.append(f"{'':{wide}}    {row['exercise']} {row['state']}: {row['message']:.200}")
    ended = [f"{row['student']} {row['exercise']}" for row in rows if row["state"] == "ended"]
    return "\n".join([*lines, f"ended because of time, memory or output: {', '.join(ended) or 'none'}"])


def junit(rows: list[dict]) -> bytes:
    """A suite for each student."""
    root = ElementTree.Element("testsuites")
    for name in dict.fromkeys(row["student"] for row in rows):
        mine = [row for row in rows if row["student"] == name]
        failed = sum(row["state"] != "right" for row in mine)
        suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(mine)), failures=str(failed))
        for row in mine:
            kinds = dict(classname=name, name=row["exercise"], time=str(row["seconds"]))
            case = ElementTree.SubElement(suite, "testcase", kinds)
            if row["state"] != "right":
                message = "".join(c if c.isprintable() else "?" for c in row["message"])
                ElementTree.SubElement(case, "failure", message=message, type=row["state"])
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def gradescope(rows: list[dict]) -> dict:
    """The rows of one student as Gradescope's autograder specification has results.json."""
    tests = [
        {
            "number": row["exercise"], "name": FUNCTIONS[row["exercise"]][1], "score": row["points"],
            "max_score": row["maximum"], "status": "passed" if row["state"] == "right" else "failed",
            "output": row["message"] or "right", "output_format": "text", "visibility": "visible",
        }
        for row in rows
    ]  # fmt: skip
    seconds = round(sum(row["seconds"] for row in rows))
    return {"execution_time": seconds, "stdout_visibility": "hidden", "visibility": "visible", "tests": tests}


def main(*given: str) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of students' files")
    parser.add_argument("--exercises", nargs="+", default=[], help="numbers, or 1 for the first part; default all")
    parser.add_argument("--points", nargs="+", type=float, help="of each exercise; default those of table.py")
    parser.add_argument("--seed", type=int, default=20, help="of the drawn cases; students try 0")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="folder for grade.csv, grade.xml, results/")
    parser.add_argument("--results", type=Path, help="Gradescope's results.json, of the one student in the folder")
    args = parser.parse_args(given or None)
    numbers = [exercise.number for exercise in course.chosen(args.exercises)]
    if args.points and len(args.points) != len(numbers):
        parser.error(f"--points wants {len(numbers)} numbers, for {', '.join(numbers)}; got {len(args.points)}")
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}")
    points = dict(zip(numbers, args.points or [FUNCTIONS[n][2] for n in numbers]))
    students = {args.folder.name: sorted(args.folder.glob("*.py"))} if args.results else files_in(args.folder)
    rows = grade(students, numbers, points, args.seed)
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    with open(args.out / "grade.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["student", "exercise", "points", "maximum", "state", "message", "seconds"])
        writer.writeheader()
        writer.writerows(rows)
    (args.out / "grade.xml").write_bytes(junit(rows))
    for name in students:
        text = json.dumps(gradescope([row for row in rows if row["student"] == name]), indent=1)
        (args.results or args.out / "results" / f"{name}.json").write_text(text)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
