r"""data/prepare.py: what is cleaned and what is not, every error's one line, and that nothing finished is ever lost."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import rewards
from data.problems import problems_of

ROOT = Path(rewards.__file__).parent
sys.path.insert(0, str(ROOT / "data"))
import prepare  # noqa: E402

CLEAN = [  # set, gold, cleaned
    ("amc23", "27.0", "27"),
    ("amc23", "-1.0", "-1"),
    ("amc23", "2.5", "2.5"),
    ("amc23", "0.0", "0"),
    ("aime24", "025", "25"),
    ("aime24", "000", "0"),
    ("aime24", "204", "204"),
    ("aime24", "100", "100"),
    ("aime25", r"336^\circ", "336"),
    ("aime25", r"336^{\circ}", "336"),
    ("gsm8k_test", "1,234,567", "1234567"),
    ("gsm8k", "-5", "-5"),
    ("gsm8k", "3,4", "3,4"),  # no thousands
    ("olympiad", r"$\frac{1}{2}$", r"\frac{1}{2}"),
    ("olympiad", "$(1,8), (2,7)$", "(1,8), (2,7)"),
    ("olympiad", r"$8 \%$", r"8 \%"),
    ("olympiad", "$69$,$84$", "$69$,$84$"),  # two pairs
    ("olympiad", r"\$36", r"\$36"),
    ("olympiad", r"$\$36$", r"\$36"),
    ("olympiad", r"$5\$", r"$5\$"),  # the second one is a printed dollar
    ("olympiad", "$", "$"),
    ("olympiad", "1,3,5", "1,3,5"),
    ("olympiad", " 7\n", "7"),
    ("math500", "58,500", "58,500"),  # rewards.py reads these as they stand
    ("math500", r"\$32,\!348", r"\$32,\!348"),
    ("minerva", "4.5e33", "4.5e33"),
    ("minerva", "56.0", "56.0"),
    ("deepscaler", "007", "007"),
]
MISTAKES = {
    "every dollar deleted": lambda name, gold: gold.replace("$", "").strip(),
    "every comma deleted": lambda name, gold: gold.replace(",", "").strip(),
    "every zero stripped": lambda name, gold: gold.strip().strip("0").rstrip("."),
    "as it stands": lambda name, gold: gold,
}


def check_clean(fn):
    wrong = [(name, gold, fn(name, gold)) for name, gold, want in CLEAN if fn(name, gold) != want]
    assert not wrong


def test_clean():
    check_clean(prepare.clean)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_clean_rejects(mistake):
    with pytest.raises(AssertionError):
        check_clean(MISTAKES[mistake])


@pytest.mark.parametrize(
    "solution, gold",
    [
        (r"First \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"So $\boxed{\{1, 2\}}$.", r"\{1, 2\}"),
        (r"Hence $x = \boxed 4$.", "4"),
        (r"Hence $\boxed x^2$.", "x^2"),  # all of it
        (r"Hence $\fbox{12}$.", "12"),
        (r"Hence \boxed {5}.", "5"),
        ("No box.", ""),
        (r"Empty: \boxed{}.", ""),
        (r"Cut off: \boxed{5", ""),
    ],
)
def test_boxed(solution, gold):
    assert prepare.boxed(solution) == gold


# set: rows as they are at the hub, the golds wanted, right answers, wrong answers
HUB = {
    "aime24": ([{"id": 60, "problem": "Add 20 and 5.", "answer": "025", "year": "2024"}], ["25"], ["25"], ["250"]),
    "aime25": ([{"id": "0", "problem": "An angle?", "answer": r"336^\circ"}], ["336"], [r"336^\circ"], ["335"]),
    "amc23": ([{"id": 0, "question": "Nine times three?", "answer": 27.0, "url": ""}], ["27"], ["27"], ["27.5"]),
    "math500": (
        [{"problem": "A price?", "answer": r"\$32,\!348", "solution": r"\boxed{7}", "unique_id": "a.json"}],
        [r"\$32,\!348"], ["32348"], ["32"],
    ),
    "minerva": (
        [
            {"question": "A luminosity?", "answer": "4.5e33"},
            {"question": "An angle?", "answer": "np.arcsin(10/13)"},
            {"question": "A slope?", "answer": "-1./3"},
            {"question": "A function?", "answer": r"\frac{1}{2}(\exp{a*t} + \exp{-a*t})"},
        ],
        ["4.5e33", "np.arcsin(10/13)", "-1./3", r"\frac{1}{2}(\exp{a*t} + \exp{-a*t})"],
        [r"4.5 \times 10^{33}", r"\arcsin\frac{10}{13}", r"-\frac{1}{3}", r"\frac{e^{at} + e^{-at}}{2}"],
        [r"4.5 \times 10^{34}", r"\arccos\frac{10}{13}", r"\frac{1}{3}", r"\frac{e^{at} - e^{-at}}{2}"],
    ),
    "olympiad": (
        [
            {"question": "A half?", "final_answer": [r"$\frac{1}{2}$"], "is_multiple_answer": False},
            {"question": "Both?", "final_answer": ["$69$,$84$"], "is_multiple_answer": True},
            {"question": "All three?", "final_answer": ["1,3,5"], "is_multiple_answer": True},
            {"question": "All, in a list?", "final_answer": ["$2$", "$7$"], "is_multiple_answer": True},
        ],
        [r"\frac{1}{2}", "$69$,$84$", "1,3,5", "$2$, $7$"],
        ["0.5", r"84 \text{ and } 69", "5, 3, 1", "7, 2"],
        ["0.2", "69", "1, 3", "7"],
    ),
    "gsm8k_test": (
        [{"question": "Her savings?", "answer": "She has <<1200+34=1234>>1,234.\n#### 1,234"}],
        ["1234"], ["1,234"], ["1200"]
    ),
    "gsm8k": ([{"question": "Clips?", "answer": "48 + 24 = 72 #### 72"}], ["72"], ["72"], ["48"]),
    "math": ([{"problem": "A root?", "solution": r"\boxed{1}? $\boxed{\sqrt{2}}$", "level": "Level 1"}], [r"\sqrt{2}"],
             [r"\sqrt 2"], ["1"]),
    "deepscaler": (
        [{"problem": "A share?", "answer": r"$\frac{40}{9}$", "solution": "..."},
         {"problem": "A fee?", "answer": r"\$150"}],
        [r"$\frac{40}{9}$", r"\$150"], [r"\frac{40}{9}", "150"], [r"\frac{40}{7}", "15"],
    ),
    "open-s1": (
        [
            {"problem": "A sum?", "solution": r"So \(\boxed{12}\).", "answer": "12", "source": "s", "messages": []},
            {"problem": "Unboxed?", "solution": "So 13.", "answer": "13", "source": "s", "messages": []},
        ],
        ["12", "13"], ["12", "13"], ["13", "12"],
    ),
}  # fmt: skip


def run(out, *names, **options):
    prepare.main(prepare.Config(names=names, out=out, **options))


def error_of(out, *names, **options):
    """The one line that a run ends with."""
    with pytest.raises(SystemExit) as stop:
        run(out, *names, **options)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def hub(monkeypatch):
    """The hub, with the rows of HUB; returns the list of what was asked for."""
    asked = []

    def load_hub(hub, config, split, revision):
        asked.append((hub, config, split, revision))
        name = next(n for n, source in prepare.SOURCES.items() if source[0] == hub and split in source[2].split("+"))
        first = (config, split) == (prepare.SOURCES[name][1][0], prepare.SOURCES[name][2].split("+")[0])
        return HUB[name][0] if first else [], "abc123"

    monkeypatch.setattr(prepare, "load_hub", load_hub)
    return asked


def test_every_set_from_the_hub(hub, tmp_path, capsys):
    run(tmp_path, "all")
    completions, golds, expected = [], [], []
    for name, (rows, want, right, wrong) in HUB.items():
        problems = problems_of(tmp_path / f"{name}.jsonl").rows
        assert [row["answer"] for row in problems] == want
        assert [row["problem"] for row in problems] == [row.get("problem", row.get("question")) for row in rows]
        assert [row["id"] for row in problems] == [f"{name}-{i}" for i in range(1, len(rows) + 1)]
        more = ["source", "samples"] if name in ("aime24", "aime25", "amc23", "gsm8k_test") else ["source"]
        assert all(list(row) == ["id", "problem", "answer", *more] for row in read(tmp_path, name))
        found = problems_of(tmp_path / f"{name}.jsonl")
        assert found.source == name and found.samples == (8 if name == "gsm8k_test" else 32 if len(more) == 2 else 1)
        for answers, reward in ((want, 1.0), (right, 1.0), (wrong, 0.0)):
            completions += [rf"So \boxed{{{answer}}}." for answer in answers]
            golds += [row["answer"] for row in problems]
            expected += [reward] * len(problems)
    assert rewards.grade(completions, golds, timeout=30) == expected
    assert set(HUB) == set(prepare.SOURCES) and len(hub) == 10 + 7 * 2  # MATH: seven subjects, train and test
    assert ("openai/gsm8k", "main", "test", prepare.REVISIONS["openai/gsm8k"]) in hub
    assert ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", prepare.REVISIONS["Hothan/OlympiadBench"]) in hub
    assert len({config for name, config, *_ in hub if name == "EleutherAI/hendrycks_math"}) == 7
    printed = capsys.readouterr().out
    assert (
        "1 rows of HuggingFaceH4/aime_2024 at abc123, expected 30: WARNING, they differ\n  golds cleaned: 1;" in printed
    )
    assert re.search(r"wrote \S+aime24.jsonl: 1 problems, sha256 [0-9a-f]{64}\n", printed)
    assert not list(tmp_path.glob("*.tmp"))


def test_pins():
    assert prepare.BENCHMARKS == ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad", "gsm8k_test"]
    assert set(prepare.REVISIONS) == {source[0] for source in prepare.SOURCES.values()}
    unpinned = [hub for hub, revision in prepare.REVISIONS.items() if not re.fullmatch("[0-9a-f]{40}", revision)]
    assert unpinned == ["knoveleng/open-s1"] and prepare.REVISIONS["knoveleng/open-s1"] == "main"


ROWS = [
    {"id": "x", "problem": "What is 3 + 4\u2028 in €?", "answer": ["$7$"], "extra": None},
    {"id": "y", "problem": "Even \\(n\\)?", "answer": ["2", "$n=2$"]},
    {"problem": "A number?", "answer": 12},
]


def save(path, rows):
    if path.suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [
            row
            | {"answer": [str(a) for a in row["answer"]] if isinstance(row["answer"], list) else [str(row["answer"])]}
            for row in rows
        ]  # a column has one type
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_from_file(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "load_hub", None)  # never called
    run(tmp_path / "new" / "out", "olympiad", source=save(tmp_path / f"mine.{ending}", ROWS))
    rows = problems_of(tmp_path / "new" / "out" / "olympiad.jsonl").rows  # splits at \u2028 if it is written as it is
    assert [row["problem"] for row in rows] == [row["problem"] for row in ROWS]
    assert [row["answer"] for row in rows] == ["7", ["2", "n=2"], "12"]
    assert [row["id"] for row in rows] == ["olympiad-1", "olympiad-2", "olympiad-3"]


def test_from_file_of_the_hubs_rows(tmp_path):
    for name, (rows, want, *_) in HUB.items():
        run(tmp_path, name, source=write_jsonl(tmp_path / "rows.json.jsonl", rows))
        assert [row["answer"] for row in read(tmp_path, name)] == want


def test_prepared_files_can_be_prepared_again(hub, tmp_path):
    for name in HUB:
        run(tmp_path, name)
        run(tmp_path / "again", name, source=tmp_path / f"{name}.jsonl")
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()


def test_second_run_does_nothing(hub, tmp_path, capsys):
    run(tmp_path, "aime24")
    (tmp_path / "aime24.jsonl").write_text("mine\n")
    run(tmp_path, "aime24", drop_contaminated=True)
    assert len(hub) == 1 and (tmp_path / "aime24.jsonl").read_text() == "mine\n"
    assert "is there already, left as it is (--force makes it again)" in capsys.readouterr().out
    run(tmp_path, "aime24", force=True)
    assert len(hub) == 2 and read(tmp_path, "aime24")[0]["answer"] == "25"


@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_a_failure_midway_leaves_the_old_file(method, hub, tmp_path, monkeypatch):
    run(tmp_path, "aime24")
    before = (tmp_path / "aime24.jsonl").read_bytes()

    def half(self, text, **how):
        with open(self, "w") as file:
            file.write(str(text)[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, method, half)
    with pytest.raises(SystemExit, match="aime24.jsonl: disk full"):
        run(tmp_path, "aime24", force=True)
    assert (tmp_path / "aime24.jsonl").read_bytes() == before


def test_a_failing_set_leaves_the_others(hub, tmp_path, monkeypatch):
    rows = HUB["gsm8k"][0] + [{"question": "Lost?", "answer": "no mark"}]
    monkeypatch.setitem(HUB, "gsm8k", (rows, *HUB["gsm8k"][1:]))
    assert "gsm8k, row 2 of openai/gsm8k at abc123: wanted the answer after ####" in error_of(
        tmp_path, "gsm8k", "math500"
    )
    assert read(tmp_path, "math500") and not (tmp_path / "gsm8k.jsonl").exists()  # the benchmark came first


GOOD = {"problem": "One?", "answer": "1"}


@pytest.mark.parametrize(
    "name, rows, want",
    [
        ("math500", [GOOD, {"problem": "Two?"}], "row 2 of PATH: wanted a field answer, got problem"),
        ("math500", [GOOD, {"answer": "2"}], "row 2 of PATH: wanted a field problem, got answer"),
        ("amc23", [{"text": "?", "answer": "2"}], "row 1 of PATH: wanted a field question, got text, answer"),
        ("math", [{"problem": "?"}], "row 1 of PATH: wanted a field solution, got problem"),
        ("math500", [{}], "row 1 of PATH: wanted a field problem, got none"),
        ("math500", [GOOD, "two"], "row 2 of PATH: wanted fields problem and answer, got 'two'"),
        ("math500", [{"problem": " ", "answer": "2"}], "row 1 of PATH: wanted a text in the field problem, got ' '"),
        ("math500", [{"problem": None, "answer": "2"}], "row 1 of PATH: wanted a text in the field problem, got None"),
        ("math500", [{"problem": 5, "answer": "2"}], "row 1 of PATH: wanted a text in the field problem, got 5"),
        ("math500", [{"problem": "?", "answer": True}], "a number or a list of them in the field answer, got True"),
        ("math500", [{"problem": "?", "answer": {"a": 1}}], "a list of them in the field answer, got {'a': 1}"),
        (
            "olympiad",
            [{"question": "?", "final_answer": [["1"]]}],
            "a list of them in the field final_answer, got [['1']]",
        ),
        (
            "gsm8k",
            [{"question": "?", "answer": "It is 4."}],
            "row 1 of PATH: wanted the answer after ####, got 'It is 4.'",
        ),
        (
            "math500",
            [{"problem": "?", "answer": ""}, {"problem": "!", "answer": None}],
            "math500: no row of PATH has a gold",
        ),
        ("math", [{"problem": "?", "solution": "Trivial."}], "math: no row of PATH has a gold"),
    ],
)
def test_malformed_rows(name, rows, want, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert want.replace("PATH", str(path)) in error_of(tmp_path / "out", name, source=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, content, want",
    [
        ("a.jsonl", b'{"problem": "?", "answer": "1"}\n{"problem": \n', "PATH, row 2: wanted jsonl ("),
        ("a.jsonl", b"", "PATH, row 1: wanted jsonl ("),
        ("a.jsonl", b'{"problem": "\xff"}', "PATH: wanted jsonl ('utf-8'"),
        ("a.json", b'{"problem": "?"}\n{"problem": "?"}', "PATH: wanted json (Extra data"),
        ("a.json", b'{"data": []}', "PATH: wanted a list of rows, got dict"),
        ("a.json", b"[]", "math500: no row of PATH has a gold"),
    ],
)
def test_malformed_files(file, content, want, tmp_path):
    (tmp_path / file).write_bytes(content)
    assert error_of(tmp_path, "math500", source=tmp_path / file).startswith(want.replace("PATH", str(tmp_path / file)))


def test_broken_or_unreadable_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    if importlib.util.find_spec("pyarrow"):
        assert error_of(tmp_path, "math500", source=path).startswith(f"{path}: wanted parquet (")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    assert error_of(tmp_path, "math500", source=path).startswith(
        f"wanted the package pyarrow to read {path}: pip install"
    )


def test_names(tmp_path):
    assert error_of(tmp_path).endswith("gsm8k, math, deepscaler, open-s1; got none")
    assert error_of(tmp_path, "math500", "math5000").endswith("; got math5000")
    assert error_of(tmp_path, "all", source=tmp_path / "a.jsonl") == "--from takes exactly one name, got 11"
    assert error_of(tmp_path, "math", "gsm8k", source=tmp_path / "a.jsonl") == "--from takes exactly one name, got 2"
    assert error_of(tmp_path, "math", source=tmp_path / "a.jsonl") == f"no file {tmp_path / 'a.jsonl'}"


def test_rows_without_a_gold_are_left_out(tmp_path, capsys):
    rows = [
        GOOD,
        {"problem": "Two?", "answer": ""},
        {"problem": "Three?", "answer": None},
        {"problem": "Four?", "answer": "4"},
    ]
    run(tmp_path, "deepscaler", source=write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [row["id"] for row in read(tmp_path, "deepscaler")] == ["deepscaler-1", "deepscaler-4"]
    assert "rows without a gold, left out: 2, [2, 3]\n" in capsys.readouterr().out


def test_golds_that_are_no_answers_are_left_out(tmp_path, capsys):
    golds = ["proof", "7", "Notfound", r"\text{proof}", "$not found$", "waterproof", ["proof", "8"], "a proof: 3"]
    rows = [{"problem": f"Problem {i}?", "answer": gold} for i, gold in enumerate(golds)]
    run(tmp_path, "deepscaler", source=write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [row["answer"] for row in read(tmp_path, "deepscaler")] == ["7", "waterproof", "8", "a proof: 3"]
    printed = capsys.readouterr().out
    assert "rows whose gold is no answer (proof, notfound), left out: 4, [1, 3, 4, 5]\n" in printed
    assert "rows without a gold, left out: 0\n" in printed


TRAINING = [
    {"problem": "Compute $2+3$.", "answer": "5"},
    {"problem": "Compute $4+5$.", "answer": "9"},
    {"problem": "compute \\( 2 + 3 \\)", "answer": "5"},  # the first one, but for marks and case
    {"problem": "Say which.", "answer": "A"},
    {"problem": "Say which!", "answer": "B"},
    {"problem": "Compute $7+8$.", "answer": "15"},
]


def test_math_has_both_splits_without_math500(tmp_path, monkeypatch, capsys):
    rows = {  # (subject, split): problems
        ("algebra", "train"): ["Find $x$ if\n$x + 1 = 3$.", "Compute $5 - 2$."],
        ("algebra", "test"): ["Compute $5 + 2$.", "Is 7 prime?"],
        ("precalculus", "test"): ["Find $\\sin 0$. ", "find $\\cos 0$."],
    }
    evaluation = ["Find $x$ if $x + 1 = 3$.", "Compute  $5 + 2$.", "Find $\\sin 0$.", "Find $\\cos 0$."]

    def load_hub(hub, config, split, revision):
        if hub == "HuggingFaceH4/MATH-500":
            return [{"problem": problem, "answer": "1"} for problem in evaluation], "abc123"
        return [{"problem": problem, "solution": "$\\boxed{1}$"} for problem in rows.get((config, split), [])], "abc123"

    monkeypatch.setattr(prepare, "load_hub", load_hub)
    run(tmp_path, "math")
    kept = [(row["id"], row["problem"]) for row in read(tmp_path, "math")]
    # a sign or a capital makes another problem, white space does not; the rows keep their numbers
    assert kept == [("math-2", "Compute $5 - 2$."), ("math-4", "Is 7 prime?"), ("math-6", "find $\\cos 0$.")]
    assert [row["problem"] for row in read(tmp_path, "math500")] == evaluation  # it came along
    printed = capsys.readouterr().out
    assert "math: 6 rows of EleutherAI/hendrycks_math at abc123, expected 12500: WARNING" in printed
    assert "problems of MATH500 left out: 3, expected 500 of 12500\n" in printed
    (tmp_path / "math500.jsonl").write_text(json.dumps({"problem": "Is 7 prime?", "answer": "1"}) + "\n")
    run(tmp_path, "math", force=True)  # the file in the folder counts, and is not made again
    assert len(read(tmp_path, "math")) == 5 and len(read(tmp_path, "math500")) == 1


def test_math_from_a_file_wants_math500(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    line = error_of(tmp_path, "math", source=source)
    assert line.endswith(f"there is no file {tmp_path / 'math500.jsonl'}: prepare math500 first")
    assert not (tmp_path / "math.jsonl").exists()


def test_contamination_and_conflicts(tmp_path, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", TRAINING)
    assert "--drop-contaminated wants benchmarks" in error_of(
        tmp_path, "deepscaler", source=source, drop_contaminated=True
    )
    bench = [{"problem": "Compute 2 + 3.", "answer": "5"}, {"problem": "Compute 1 + 1.", "answer": "2"}]
    run(tmp_path, "math500", source=write_jsonl(tmp_path / "bench.jsonl", bench))
    run(
        tmp_path, "olympiad", source=write_jsonl(tmp_path / "bench.jsonl", [{"problem": "Compute 7+8", "answer": "15"}])
    )
    capsys.readouterr()

    def ids(**options):
        run(tmp_path, "deepscaler", source=source, force=True, **options)
        return [int(row["id"].split("-")[1]) for row in read(tmp_path, "deepscaler")]

    assert ids() == [1, 2, 3, 4, 5, 6]  # the papers' training set is not changed without being asked to
    printed = capsys.readouterr().out
    assert "4 different problems; 1 have different golds; in benchmarks: aime24 not there" in printed
    assert (
        "math500 1, minerva not there, olympiad 1, gsm8k_test not there\n" in printed and "rows dropped: 0 (" in printed
    )
    assert ids(drop_contaminated=True) == [2, 4, 5]
    assert "rows dropped: 3 (" in capsys.readouterr().out
    assert ids(drop_conflicting=True) == [1, 2, 3, 6]
    assert ids(drop_contaminated=True, drop_conflicting=True) == [2]


# ------------------------------------------------------------------------------------------------- the package datasets


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = error_of(tmp_path, "math500")
    assert line.startswith("wanted the package datasets: pip install datasets==") and "--from" in line


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach\nit"), ValueError("BuilderConfig 'x' not found")])
def test_the_hub_fails(error, tmp_path, monkeypatch):
    def load_dataset_builder(hub, config, revision):
        assert (hub, config, revision) == ("math-ai/amc23", None, prepare.REVISIONS["math-ai/amc23"])
        raise error

    fake = SimpleNamespace(
        load_dataset_builder=load_dataset_builder, exceptions=SimpleNamespace(DatasetsError=KeyError)
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert error_of(tmp_path, "amc23").startswith(
        "could not load math-ai/amc23 from the hub, --from takes a local file"
    )


def test_the_real_package_offline(tmp_path):
    pytest.importorskip("datasets")
    command = [sys.executable, ROOT / "data" / "prepare.py", "amc23", "--out", tmp_path]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("could not load math-ai/amc23 from the hub")
    assert done.stderr.count("\n") == 1


def test_the_real_package_on_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "amc").mkdir()
    write_jsonl(tmp_path / "amc" / "test.jsonl", HUB["amc23"][0])  # a folder loads like a repository of the hub
    monkeypatch.setitem(prepare.SOURCES, "amc23", (str(tmp_path / "amc"), *prepare.SOURCES["amc23"][1:]))
    monkeypatch.setitem(prepare.REVISIONS, str(tmp_path / "amc"), None)
    run(tmp_path, "amc23")
    assert read(tmp_path, "amc23") == [
        {"id": "amc23-1", "problem": "Nine times three?", "answer": "27", "source": "amc23", "samples": 32}
    ]


def test_command_line(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", HUB["aime24"][0])
    command = [sys.executable, ROOT / "data" / "prepare.py", "aime24", "--from", source, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "aime24: 1 rows of" in done.stdout
    assert read(tmp_path, "aime24")[0]["answer"] == "25"
