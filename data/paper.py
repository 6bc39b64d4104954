"""
The report page, and the papers' numbers in it beside ours. They stand in data/paper.json.

P1 and P4 are versions 1 and 4 of arXiv:2509.06608, B is arXiv:2505.18706. numbers_of gives the papers' numbers in the
form in which our analyses give theirs, so that the same functions of plumbing/figures.py draw both.
"""

import base64
import html
import json
import sys
from pathlib import Path

from plumbing.figures import draw, quoted
from plumbing.files import fitted, json_of, reading, write

PAPER = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
MODELS = {  # the tables of each model
    "Qwen2.5-Math-7B": ("P4.table2", "P4.table4", "P4.table6", "P1.table2.qwen"),
    "Llama-3.1-8B-Instruct": ("P4.table3", "P4.table5", "P4.table7", "P1.table2.llama"),
}
MODELS = {who: dict(zip(("T = 1", "greedy", "shifts", "pairs"), keys)) for who, keys in MODELS.items()}


# ----------------------------------------------------------------------- the papers' numbers in our analyses' form


def printed(mean: float, pm: float = 0.0) -> dict:
    """A printed accuracy in percent as an estimate; its interval is the printed ± over seeds, if there is one."""
    return {"value": mean / 100, "interval_95": [(mean - pm) / 100, (mean + pm) / 100]}


def averages(who: str, decoding: str) -> dict:
    """Means of the six benchmarks, from P4 Tables 2 to 5: {"base", "all", "full", "0", "1", ...: see printed}."""
    names, found = {f"base, {decoding.replace(' ', '')}": "base", "all layers": "all"}, {}
    for row in PAPER[MODELS[who][decoding]]["rows"]:
        name = names.get(row["setup"], row["setup"].removeprefix("layer "))
        if not name.startswith("base, "):  # every table has the base model's other decoding, too
            found[name] = printed(row["mean"][-1], row["pm"][-1])
    return found


def sweep(who: str) -> tuple:
    found = {decoding: averages(who, decoding) for decoding in ("T = 1", "greedy")}
    if found["greedy"]["all"] == found["T = 1"]["all"]:
        del found["greedy"]["all"]  # Llama's Table 5 repeats this row of Table 3: the greedy number is not known
    layers = sorted(int(name) for name in found["greedy"] if name.isdigit())
    tables = " and ".join(MODELS[who][decoding][-1] for decoding in found)
    note = f"v4, Tables {tables}; mean of six benchmarks; bands: ± over seeds"
    return {"layers": layers, "depth": len(layers), "by_decoding": found}, note


def persistence(who: str) -> tuple:
    table, found = MODELS[who]["shifts"], {}
    for kind, ours in (("diff_diff", "diff_diff_authors"), ("diff_vector", "diff_vector")):
        for row in PAPER[f"{table}.{kind}"]["rows"]:
            layer, values = row["layer"], row["value"]  # the values before the layer are null
            entry = found.setdefault(str(layer), {"layers": list(range(layer, len(values)))})
            entry[ours] = [None if x is None else {"value": x} for x in values[layer:]]
    return {"depth": len(found), "by_layer": found}, f"v4, Table {table[-1]}"


def prefix(who: str) -> tuple:
    found = {}
    for row in PAPER["P4.fig4"]["rows"]:
        if Path(row["model"]).name == who:
            forced = f"base + {quoted(row['prefix'])}"
            numbers = {"base": row["base"], forced: row["base_prefix"], "vector": row["vector"]}
            found[row["decoding"].replace("=", " = ")] = {name: printed(x) for name, x in numbers.items()}
    note = "v4, Fig. 4; mean of six benchmarks; no ± printed"
    return {"conditions": list(found["greedy"]), "by_decoding": found}, note


def sites(who: str) -> tuple:
    rows = {row["site"]: printed(row["mean"], row["pm"]) for row in PAPER["P4.fig10"]["rows"]}
    for row in PAPER["P4.text"]["rows"]:
        if row["name"] == "trained_after_attention_pct" and Path(row["model"]).name == who:
            rows["layer 27, after attention"] = printed(row["value"], row["pm"])
    note = "v4, Fig. 10, base: Table 2, layer 27: Sec. 6; mean of six benchmarks; bars: ± over seeds"
    return {"conditions": {"base": averages(who, "T = 1")["base"]} | rows}, note


def orthogonal(who: str) -> tuple:
    rows = {"base": averages(who, "T = 1")["base"]}
    for row in PAPER["P4.fig12"]["rows"]:
        for name, x in zip(("", ", first orthogonal", ", second orthogonal"), row["value"]):
            rows[f"{row['layer']}{name}"] = printed(x)
    return {"conditions": rows}, "v4, Fig. 12, base: Table 2; mean of six benchmarks; no ± printed"


def compose(who: str) -> tuple:
    table = PAPER[MODELS[who]["pairs"]]
    cells = {(i, j): x / 100 for i, row in enumerate(table["rows"]) for j, x in enumerate(row["value"]) if x}
    elsewhere, gains = averages(who, "T = 1"), {}
    whole = elsewhere["all"]["value"]
    for (i, j), pair in cells.items():
        if i < j:  # the diagonal of the table has the single vectors, except some that the text of the PDF lacks
            single = max(cells.get((x, x), elsewhere[str(x)]["value"]) for x in (i, j))
            share = {"unclear": True} if whole <= single else {"value": (pair - single) / (whole - single)}
            gains[f"{i}+{j}"] = {"cross": pair >= 0.99 * whole, "over_single": {"value": pair - single}, "share": share}
    place = "column 26 below row 3" if who.startswith("Qwen") else "column 30 below row 12"  # the notes in paper.json
    elsewhere = MODELS[who]["T = 1"][-1]
    note = f"v1, Table 2; all layers and lost singles: v4, Table {elsewhere}; {place}: assigned by place alone"
    return {"layers": table["columns"], "gains": gains}, note


def numbers_of(name: str) -> dict[str, dict]:
    """The papers' numbers for an analysis, as our analysis gives them: {model: found}."""
    read = {f.__name__: f for f in (sweep, persistence, prefix, compose, sites, orthogonal)}.get(name)
    found = {}
    for who in MODELS if read else ():
        if who.startswith("Qwen") or read not in (sites, orthogonal):  # the paper has these two for Qwen alone
            numbers, note = read(who)
            found[who] = numbers | {"about": f"{who}; arXiv:2509.06608{note}"}
    return found


# ----------------------------------------------------------------------------------------------------------- the report
STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em} img{max-width:100%}
small{color:#666} td,th{padding:.1em .6em;text-align:right} table{border-collapse:collapse;font-size:13px}
code{font-size:12px}"""


def table_of(head: list, rows: list[list]) -> str:
    """A table as HTML."""
    lines = []
    for tag, row in [("th", head), *(("td", row) for row in rows)]:
        cells = "".join(f"<{tag}>{'' if x is None else html.escape(str(x))}</{tag}>" for x in row)
        lines.append(f"<tr>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def paper_table(entry: dict) -> str:
    """A table of paper.json as folded HTML; where all rows have a list, it fills as many columns as it has numbers."""
    head, rows = [], [[] for _ in entry["rows"]]
    for name in dict.fromkeys(name for row in entry["rows"] for name in row):
        cells = [row.get(name) for row in entry["rows"]]
        width = len(cells[0]) if all(isinstance(x, list) for x in cells) else None
        head += [name] if width is None else entry["columns"] if len(entry["columns"]) == width else [""] * width
        for row, x in zip(rows, cells):
            row += [x] if width is None else x
    return folded(f"The paper: {entry['title']} ({entry['source']}; {entry['unit']})", table_of(head, rows))


def folded(title: str, content: str, open="") -> str:
    return f"<details {open}><summary>{html.escape(title)}</summary>{content}</details>\n"


def picture(path: Path, text: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">\n'


def documents(folder: Path, order: list[str]) -> list[tuple[Path, dict]]:
    """The results of a folder of runs, or of one run, and of their checkpoints, in this order of the analyses."""
    found = []
    places = [f"{run}{part}figures/*.json" for run in ("", "*/") for part in ("", "checkpoints/*/")]
    for path in sorted(path for place in places for path in folder.glob(place)):
        saved = json_of(path, object, "JSON; delete it and run the analysis again")
        if isinstance(saved, dict) and (saved.get("found") or {}).get("name") in order:
            with reading(path, "a result of analyze.py; delete it"):
                fitted(saved["found"], {"reading": str, "about": str, "command": str, "table": list})
            found.append((path, saved["found"]))
    return sorted(found, key=lambda item: order.index(item[1]["name"]))


def report(folder: Path, order: list[str]) -> Path:
    """Write folder/report.html: a list of the findings, then each figure and table, with the papers' beside ours."""
    docs, body, contents, done = documents(folder, order), "", "", set()
    if not docs:
        sys.exit(f"no figures under {folder}: make one first, for example `python analyze.py lens out/tiny-layer27`")
    for i, (path, doc) in enumerate(docs):
        title, reading = html.escape(f"{doc['name']}: {path.parent.parent}"), html.escape(doc["reading"])
        contents += f'<li><a href="#{i}">{title}</a><br><small>{reading.split(". ")[0]}</small></li>\n'
        body += f'<h2 id="{i}">{title}</h2>\n<p>{reading}</p>\n'
        if path.with_suffix(".png").is_file():
            body += picture(path.with_suffix(".png"), doc["reading"])
        body += f"<p><small>{html.escape(doc['about'])}: <code>{html.escape(doc['command'])}</code></small></p>\n"
        body += folded("the numbers", table_of(*doc["table"]))
        for who, found in numbers_of(doc["name"]).items():
            drawn = folder / "paper" / f"{doc['name']}-{who}.png"
            if drawn not in done:  # once, even if several runs have this analysis
                draw(doc["name"], found, drawn)
                done.add(drawn)
                body += folded(f"In the paper, {who}", picture(drawn, who), open="open")
        body += "".join(paper_table(entry) for entry in PAPER.values() if entry.get("analysis") == doc["name"])
    body += "<h2>The papers: settings, and numbers in their text</h2>\n"
    body += "".join(paper_table(entry) for entry in PAPER.values() if "rows" in entry and "analysis" not in entry)
    title = "Steering vectors: what was measured"
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    page = f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
    page += f"<ol>\n{contents}</ol>\n{body}</body></html>\n"
    write(folder / "report.html", page)
    return folder / "report.html"
