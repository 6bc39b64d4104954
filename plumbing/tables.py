"""Tables: as text with aligned columns, printed and kept beside their numbers."""

import json
from pathlib import Path

from plumbing.files import write


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table with aligned columns; columns without any entry are left out."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = [[row[i] for i in used] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def save_table(text: str, numbers, out: Path, name: str) -> None:
    """Print a text with tables, and write it and its numbers: NAME.md and NAME.json."""
    print(f"\n{text}")
    write(out / f"{name}.md", text)
    write(out / f"{name}.json", json.dumps(numbers, indent=1, default=lambda x: x.json()) + "\n")
    print(f"wrote {name}.md and {name}.json to {out}")
