"""
Figures: a few forms that draw numbers, ours and the papers' alike.

A figure is a dict with the arguments of draw_figure, and each of its panels is a dict with the arguments of draw_panel:
"form" names one of the forms below, whose own arguments stand beside it. So analyze.py and data/paper.py give numbers,
and only this file knows how they are drawn.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure  # without pyplot: a notebook keeps its backend
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

SHADES = LinearSegmentedColormap.from_list("layers", colormaps["turbo_r"](np.linspace(0.08, 0.95, 64)))
BANDS = "bands: 95 % intervals over problems"
ERROR_BARS = "error bars: 95 % intervals over problems"
RIGHT = "right answers (%)"
WIDTH = 112  # characters in a line of tokens


def draw(name: str, found: dict, path: Path) -> None:
    """
    Write the figure of an analysis as PNG.

    found: the numbers of the analysis, with "about" for the caption (model, n, seed) and "table", which is drawn if
    FIGURES has no function for the analysis.
    """
    figure = FIGURES[name](found) if name in FIGURES else table_figure(found, name)
    draw_figure(path, found.get("about"), **figure)


def draw_figure(
    path, about, panels, title=None, note=None, size=None, columns=None, heights=None, share_y=False, floor=None
) -> None:
    """
    Write panels, row by row, as one PNG. about, note: the caption.

    heights: of the rows, relative to each other. floor: where y begins. It is set after all panels are drawn, because
    panels that share y must end at the highest of all.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    size = size or (6 if columns == 1 else 8, 3.5 * rows)
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(rows, columns, sharey=share_y, height_ratios=heights, squeeze=False)
    for ax, panel in zip(axes.flat, panels):
        draw_panel(ax, **panel)
    for ax in axes.flat[: len(panels)] if floor is not None else ():
        ax.set_ylim(floor, None)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax in axes[:, 1:].flat if share_y else ():
        ax.set_ylabel(None)
    fig.suptitle(title, fontsize=11)
    fig.supxlabel(plain("; ".join(filter(None, [about, note]))), fontsize=7, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def draw_panel(ax, form, xlabel=None, ylabel=None, subtitle=None, **numbers) -> None:
    FORMS[form](ax, **numbers)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(subtitle, fontsize=10)


def plain(text: str) -> str:
    """Escape dollar signs: matplotlib would read the text between two of them as mathematics."""
    return text.replace("$", r"\$")


def quoted(token: str) -> str:
    """'" To"': a token in quotes, so that its spaces and line breaks can be seen."""
    return json.dumps(token, ensure_ascii=False)


def piece(tokenizer, token: int) -> str:
    r"""One token as text. A token that is a part of a character is shown as its bytes: "\xe2\x82"."""
    raw = tokenizer.convert_ids_to_tokens(token)
    if raw is None:  # a row of the unembedding that no token uses
        return f"[{token}]"
    if raw.startswith("▁"):  # SentencePiece drops the space when it decodes one token
        return raw.replace("▁", " ")
    text = tokenizer.decode([token])
    if "\ufffd" not in text or raw.startswith("<0x"):  # <0xE2> is SentencePiece's own name of a byte
        return raw if "\ufffd" in text else text
    # byte-level BPE writes a byte as a printable character: as itself, or, if it is not printable, as one from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return "".join(f"\\x{byte[c]:02x}" if c in byte else c for c in raw)


def spread(values: list[float]) -> dict:
    """The numbers of a box plot: quartiles, 5 and 95 % points, the number of values and the largest value."""
    low, q1, med, q3, high = np.percentile(values, [5, 25, 50, 75, 95]).tolist()
    return {"whislo": low, "q1": q1, "med": med, "q3": q3, "whishi": high, "count": len(values), "max": max(values)}


# ------------------------------------------------------------------------------------------------- numbers for a panel


def line(label: str, x: Iterable, rows: list[dict], colour, scale=100) -> dict:
    """A series of estimates, {"value", "interval_95"} each, in percent unless scale says otherwise."""
    made = dict(label=label, x=list(x), y=[scale * row["value"] for row in rows], colour=colour)
    if rows and "interval_95" in rows[0]:
        made["low"], made["high"] = ([scale * row["interval_95"][i] for row in rows] for i in (0, 1))
    return made


def level(rows: list[tuple]) -> list[dict]:
    """Horizontal lines, from [(label, estimate or None, colour)]; the base model's line is dashed."""
    return [dict(label=label, y=100 * row["value"], colour=colour) for label, row, colour in rows if row is not None]


def table_figure(found: dict, title: str, note: str = "") -> dict:
    head, rows = found["table"]
    size = (1.5 + 1.3 * len(head), 1.2 + 0.3 * len(rows))
    return dict(title=title, panels=[dict(form="table", head=head, rows=rows)], note=note, size=size)


# ---------------------------------------------------------------------------------------------------------------- forms


def flats(ax, flat: list[dict], **where) -> None:
    """Horizontal lines, see level, and the legend, if anything has a label."""
    for one in flat:
        style = "--" if one["label"].startswith("base") else "-"
        ax.axhline(one["y"], color=one["colour"], linestyle=style, lw=1.2, zorder=0, label=plain(one["label"]))
    if any(ax.get_legend_handles_labels()[1]):
        ax.legend(frameon=False, fontsize=8, **where)


def lines(ax, series, flat=(), depth=None, names=None, log_y=False, whole_x=False, x=None) -> None:
    """
    Lines with bands.

    depth: colours are numbers of layers, of so many; early ones are warm and late ones cool (P4 Fig. 2). names: what
    stands at x = 0, 1, ...; whole_x: only whole numbers stand on the x axis; x: its limits.
    """
    for one in series:
        colour = SHADES(one["colour"] / max(1, depth - 1)) if depth else one["colour"]
        ax.plot(one["x"], one["y"], "o-", ms=3, lw=1 if depth else 1.5, color=colour, label=plain(one["label"]) or None)
        if "low" in one:
            ax.fill_between(one["x"], one["low"], one["high"], color=colour, alpha=0.2, linewidth=0)
    flats(ax, flat)
    if depth:
        bar = ScalarMappable(Normalize(0, depth - 1), SHADES)
        ax.figure.colorbar(bar, ax=ax, label="layer of the vector")
    if names:
        every = max(1, len(names) // 14)
        ax.set_xticks(range(0, len(names), every), names[::every], fontsize=7)
    if x is not None:
        ax.set_xlim(*x)
    if log_y:
        ax.set_yscale("log")
    if whole_x:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def dots(ax, series, ticks: dict, y: tuple, flat=(), log_x=False) -> None:
    """Estimates as dots with error bars, filled where "full" says so. ticks: {x: name}; y: limits of the axis."""
    for i, one in enumerate(series):
        for x, value, low, high, full in zip(one["x"], one["y"], one["low"], one["high"], one["full"]):
            fill = f"C{i}" if full else "white"
            error = [[value - low], [high - value]]
            ax.errorbar(x, value, error, fmt="o", ms=4, color=f"C{i}", mfc=fill, capsize=2, lw=1)
        ax.plot([], [], "o", ms=4, color=f"C{i}", label=one["label"])
    flats(ax, flat, loc="center left", bbox_to_anchor=(1, 0.5))
    if log_x:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(list(ticks), list(ticks.values()), fontsize=7, rotation=45 * log_x)
    ax.set_ylim(*y)


def bars(ax, series, names, flat=()) -> None:
    """Estimates as bars with their intervals and their numbers on top; several series stand side by side."""
    width = (0.6 if len(series) == 1 else 0.8) / len(series)
    for i, one in enumerate(series):
        x = [g + width * (i - (len(series) - 1) / 2) for g in one["x"]]
        high = one.get("high", one["y"])
        error = [[v - a for v, a in zip(one["y"], one.get("low", one["y"]))], [b - v for v, b in zip(one["y"], high)]]
        error = error if np.any(error) else None  # some of the papers' numbers have no interval
        ax.bar(x, one["y"], width, yerr=error, capsize=2, color=one["colour"], label=plain(one["label"]) or None)
        for at, value, top in zip(x, one["y"], high):
            ax.text(at, top, f"{value:.1f}", ha="center", va="bottom", fontsize=7)
    flats(ax, flat, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the bars, which may stand anywhere
    ax.set_xticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    ax.margins(y=0.15)  # room for the numbers
    ax.set_ylim(0, None)


def heat(ax, grid, rows, columns, low, high, texts=None, label="", thin=False) -> None:
    """A matrix as colours: RdBu centred at 0 if low < 0, else one hue. texts: in the cells; None: an empty cell."""
    values = np.array([[np.nan if x is None else x for x in row] for row in grid], float)
    image = ax.imshow(values, cmap="RdBu" if low < 0 else "Blues", vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(texts or []):
        for x, text in enumerate(row):
            strong = abs(values[y][x]) > 0.65 * high  # False for nan
            ax.text(x, y, plain(text), ha="center", va="center", fontsize=6, color="white" if strong else "black")
    for axis, names in ((ax.yaxis, rows), (ax.xaxis, columns)):
        some = range(0, len(names), max(1, len(names) // 14) if thin else 1)
        axis.set_ticks(list(some), [plain(str(names[i])) for i in some], fontsize=7)
    beyond = np.nanmax(np.abs(values), initial=0) > high
    ax.figure.colorbar(image, ax=ax, label=label, extend="both" if beyond and low < 0 else "neither")


def boxes(ax, boxes, names) -> None:
    """Box plots, from their quartiles."""
    drawn = ax.bxp(boxes, showfliers=False, patch_artist=True, widths=0.6, medianprops={"color": "black"})
    for box in drawn["boxes"]:
        box.set_facecolor("lightsteelblue")
    ax.set_xticks(range(1, len(names) + 1), [plain(name) for name in names], fontsize=7)
    ax.axhline(0, color="black", linewidth=0.5)


def lines_in(tokens: list[tuple]) -> list[list]:
    """Break [(text, ...)] into lines of at most WIDTH characters: [[(column, text, ...)]]. Line breaks are shown."""
    lines, column = [[]], 0
    for text, *rest in tokens:
        shown = text.replace("\n", "↵") if rest[0] is not None else text.rstrip("\n")
        if column and column + len(shown) > WIDTH:
            lines.append([])
            column = 0
        lines[-1].append((column, shown, *rest))
        column += len(shown)
        if text.endswith("\n"):
            lines += [[] for _ in range(text.count("\n"))]
            column = 0
    return lines


def width_of(broken: list[list]) -> int:
    return max(70, max(column + len(text) for row in broken for column, text, *_ in row))


def size_of(tokens: list[tuple]) -> tuple[float, float]:
    """(width, height) in inches of these tokens, so that a character has the width of its font."""
    broken = lines_in(tokens)
    return 8 * width_of(broken) / WIDTH, 0.2 * len(broken)


def tokens(ax, tokens, limit: float, label="") -> None:
    """[(text, value, marked)] as text: each token coloured by its value from -limit to limit, or grey if it is None."""
    broken, colours = lines_in(tokens), ScalarMappable(Normalize(-limit, limit), "RdBu")
    for y, row in enumerate(broken):
        for column, text, value, marked in row:
            colour = "0.4"
            if value is not None:
                face = colours.to_rgba(value)[:3]
                edge = {"edgecolor": "black", "linewidth": 0.8} if marked else {"linewidth": 0}
                ax.add_patch(Rectangle((column, y - 0.45), len(text), 0.9, facecolor=face, **edge))
                colour = "white" if sum(share * x for share, x in zip((0.3, 0.6, 0.1), face)) < 0.5 else "black"
            ax.text(column, y, plain(text), family="monospace", fontsize=8, va="center", color=colour)
    ax.set(xlim=(0, width_of(broken)), ylim=(len(broken) - 0.5, -0.7))
    ax.axis("off")
    ax.figure.colorbar(colours, ax=ax, location="top", shrink=0.5, aspect=40, label=label)


def table(ax, head, rows) -> None:
    cells = [[plain(cell) for cell in row] for row in rows]
    made = ax.table(cells, colLabels=[name.replace(" ", "\n", 1) for name in head], loc="center", edges="horizontal")
    made.auto_set_font_size(False)
    made.set_fontsize(8)
    made.auto_set_column_width(range(len(head)))
    for (row, _), cell in made.get_celld().items():
        cell.set_height(0.85 / (len(cells) + 2) * (1.8 if row == 0 else 1))
    ax.axis("off")


FORMS = {form.__name__: form for form in (lines, dots, bars, heat, boxes, tokens, table)}

# ------------------------------------------------------------------------------------- how each analysis is drawn


def lens(found: dict) -> dict:
    tables, kind = found["vectors"], "cosine"
    if len(tables) == 1:  # one vector: its lists, one below the other
        ((label, lists),) = tables.items()
        names = ("cosine", "dot", "dot, gain folded in", "lowest cosine", "lowest dot")
        tables = {name: {kind: lists[name]} for name in names}
        title, ylabel = f"Which tokens does the vector at layer {label} point at?", "ordered by"
    else:
        title, ylabel = "Which tokens do the vectors point at?", "layer of the vector (0-based)"
    columns = min(8, *(len(table[kind]) for table in tables.values()))
    rows = [table[kind][:columns] for table in tables.values()]
    grid = [[cosine for _, _, cosine in row] for row in rows]
    texts = [[f"{quoted(token)}\n{x:.2f}" for token, _, x in row] for row in rows]
    least, most = min(map(min, grid)), max(max(abs(x) for x in row) for row in grid)
    panel = dict(form="heat", grid=grid, rows=list(tables), columns=range(1, columns + 1), texts=texts)
    panel |= dict(low=-most if least < 0 else 0, high=most, label="cosine with the unembedding row")
    panel |= dict(xlabel="rank", ylabel=ylabel)
    note = f"gain: the final norm's; 95 % of random directions stay below a cosine of {found['chance']:.2f}"
    return dict(title=title, panels=[panel], note=note, size=(9, 1.6 + 0.4 * len(tables)))


def shift(found: dict) -> dict:
    names = [f"{quoted(b['token'])}\n{b['where'].replace('any position', '')}\nn={b['count']}" for b in found["boxes"]]
    left = dict(form="boxes", boxes=found["boxes"], names=names)
    left |= dict(ylabel="increase of probability", subtitle="tokens with the largest maximum")
    curve = found["by_position"]
    rounding = dict(label="rounding alone: another dtype", y=found["floor"]["delta_p"], colour="grey")
    series = [line("", [row["position"] for row in curve], curve, "tab:blue", scale=1)]
    right = dict(form="lines", series=series, flat=[rounding], log_y=True, subtitle="by position")
    right |= dict(xlabel="position in the answer (tokens)", ylabel="largest increase, mean")
    note = f"{found['answers']} answers that ended; whiskers: 5 and 95 %; band: 95 % interval of the mean over answers"
    return dict(title="Which probabilities does the vector raise?", panels=[left, right], note=note)


def prefix(found: dict) -> dict:
    decodings, colours = ["greedy", "T = 1"], ["0.75", "tab:orange", "tab:blue", "0.45", "tab:green"]
    series = [
        line(name, range(2), [found["by_decoding"][d][name] for d in decodings], colour)
        for name, colour in zip(found["conditions"], colours)
    ]
    panel = dict(form="bars", series=series, names=decodings, ylabel=RIGHT)
    return dict(title="How much of the vector is its first token?", panels=[panel], note=ERROR_BARS)


def case(found: dict) -> dict:
    panels, heights = [], []
    for form in found["forms"]:
        tokens = []
        for text in found["answers"]:
            tokens += [(word + " ", None, False) for word in text["problem"].split(" ")] + [("\n", None, False)]
            seen = [(t["text"], t["base"], t["forms"][form]) for t in text["tokens"]]
            tokens += [(word, s["steered"] - base, s["differs"]) for word, base, s in seen] + [("\n\n", None, False)]
        del tokens[-1]
        width, height = size_of(tokens)
        panels.append(dict(form="tokens", tokens=tokens, limit=1.0, label=f"{form}: change of probability"))
        heights.append(height + 0.9)
    size = (width, sum(heights) + 0.3)
    return dict(panels=panels, note="box: the argmax differs", size=size, heights=heights, columns=1)


def sweep(found: dict) -> dict:
    layers, panels = found["layers"], []
    for decoding, row in found["by_decoding"].items():
        series = [
            line(f"{kind or 'one '}vector", layers, [row[f"{kind}{layer}"] for layer in layers], colour)
            for kind, colour in (("", "tab:orange"), ("random ", "0.5"), ("moved ", "tab:green"))
            if f"{kind}{layers[0]}" in row
        ]
        flat = [("base model", row["base"], "black"), ("all layers", row.get("all"), "tab:blue")]
        flat = level([*flat, ("all weights", row.get("full"), "tab:purple")])
        panel = dict(form="lines", series=series, flat=flat, whole_x=True, x=(-0.5, found["depth"] - 0.5))
        panels.append(panel | dict(subtitle=decoding, xlabel="layer of the vector (0-based)", ylabel=RIGHT))
    return dict(title="Which layer to steer?", panels=panels, note=BANDS, share_y=True, floor=0)


def ablate(found: dict) -> dict:
    rows, layers = found["conditions"], found["layers"]
    series = [
        line(f"{kind} this layer", range(len(layers)), [rows[f"{kind} {layer}"] for layer in layers], colour)
        for kind, colour in (("without", "tab:blue"), ("only", "tab:orange"))
    ]
    flat = level([("all vectors", rows["all"], "tab:green"), ("base model", rows["base"], "black")])
    panel = dict(form="lines", series=series, flat=flat, names=layers, xlabel="layer (0-based)", ylabel=RIGHT)
    return dict(title="Which of the vectors matter?", panels=[panel], note=BANDS, size=(7, 3.5), floor=0)


def compose(found: dict) -> dict:
    layers, gains, halves = found["layers"], found["gains"], found.get("halves")
    most = max(abs(100 * gain["over_single"]["value"]) for gain in gains.values()) or 1.0
    wanted = [("normalised gain (0: better single, 1: all layers)", "share", gains, 1, 1.0)]
    wanted += [("pair minus the better single (points)", "over_single", gains, 100, most)]
    wanted += [("the same with half of each vector (points)", "over_single", halves, 100, most)] if halves else []
    labels, panels = dict(xlabel="layer of one vector (0-based)", ylabel="layer of the other"), []
    for title, key, given, scale, limit in wanted:
        grid, texts = [[None] * len(layers) for _ in layers], [[""] * len(layers) for _ in layers]
        for y, x in zip(*np.triu_indices(len(layers), 1)):
            gain = given.get(f"{layers[y]}+{layers[x]}")
            lost = gain is None or gain[key].get("unclear")
            grid[y][x] = None if lost else scale * gain[key]["value"]
            texts[y][x] = "–" if gain is None else "×" if gain["cross"] else "?" if lost else ""
        panel = dict(form="heat", grid=grid, rows=layers, columns=layers, low=-limit, high=limit, texts=texts)
        panels.append(panel | dict(thin=True, subtitle=title, **labels))
    note = "×: 99 % of all layers or more; ?: all layers not clearly above the single; –: lost in the text of the PDF"
    size = (9, 4.3 * (1 + (len(panels) > 2)))
    return dict(title="Do vectors add up?", panels=panels, note=note, size=size, columns=2)


def sites(found: dict) -> dict:
    rows = dict(found["conditions"])
    flat = level([("base model", rows.pop("base"), "black")])
    series = [line("", range(len(rows)), list(rows.values()), "tab:orange")]
    panel = dict(form="bars", series=series, flat=flat, names=[name.replace(", ", "\n") for name in rows])
    panel |= dict(xlabel="layer and place of the vector", ylabel=RIGHT)
    size = (max(4.5, 1.5 + 1.1 * len(rows)), 3.5)
    return dict(title="Where does a vector work?", panels=[panel], note=ERROR_BARS, size=size)


def orthogonal(found: dict) -> dict:
    return sites(found) | dict(title="Is there a second direction?")


def transfer(found: dict) -> dict:
    donors, grid, texts, names = found["donors"], [], [], []
    for name, row in found["recipients"].items():
        shares = [row["shares"].get(donor) for donor in donors]
        grid.append([share["value"] if share and not share.get("unclear") else None for share in shares])
        raw = [f"{100 * row['accuracies'][donor]['value']:.1f} %" for donor in donors]
        texts.append([text if x is None else f"{x:.2f}\n{text}" for x, text in zip(grid[-1], raw)])
        names.append(f"{Path(name).name}\n(base {100 * row['accuracies']['base']['value']:.1f} %)")
    panel = dict(form="heat", grid=grid, rows=names, columns=donors, low=-1, high=1, texts=texts)
    panel |= dict(label="share of the\nown vectors' gain", xlabel="vectors of", ylabel="recipient")
    note = "white without a share: the recipient's own gain is missing or not clearly above 0"
    size = (4.5 + 1.3 * len(donors), 1.6 + 0.6 * len(names))
    return dict(title="Do vectors work in other models?", panels=[panel], note=note, size=size)


def persistence(found: dict) -> dict:
    panels, titles = [], {"diff_diff": "to the mean shift: Diff-Diff"}
    titles["diff_diff_authors"] = "to the own text's mean: as the authors'"
    titles["diff_vector"] = "to the layer's vector: Diff-Vector"
    for kind, title in titles.items():
        series = []
        for layer, row in found["by_layer"].items():
            seen = [(l, x) for l, x in zip(row["layers"], row.get(kind, [])) if x is not None]
            bare = [{"value": x["value"]} for _, x in seen]  # without bands: those of so many lines hide each other
            series.append(line("", [l for l, _ in seen], bare, int(layer), scale=1))
        if any(one["x"] for one in series):  # the papers print one of the two Diff-Diffs
            panel = dict(form="lines", series=series, subtitle=title, depth=found["depth"], whole_x=True)
            panel |= dict(xlabel="layer where the shift is seen (0-based)", ylabel="mean cosine over tokens")
            panels.append(panel)
    note = "prompts and answers of each steered model but their last two tokens; intervals: JSON"
    return dict(title="How does a shift travel?", panels=panels, note=note, share_y=True, columns=2)


def similarity(found: dict) -> dict:
    layers, low = found["layers"], min(map(min, found["cosine"]))
    panel = dict(form="heat", grid=found["cosine"], rows=layers, columns=layers, low=-1 if low < 0 else 0, high=1)
    panel |= dict(thin=True, label="cosine of mean shifts")
    panel |= dict(xlabel="layer of the vector (0-based)", ylabel="layer of the vector")
    note = f"at the last block's output; smallest cosine {low:.2f}"
    return dict(title="Do shifts from all layers end up alike?", panels=[panel], note=note, size=(5.6, 4.6))


def head_panel(heads: dict, rows: dict, ylabel: str) -> dict:
    """Dots of all heads, in groups; lines of the conditions without a head. heads: {group: number of its heads}."""
    series, start, ticks = [], 0, {}
    for group, n in heads.items():
        some = [rows[f"{group} {i}"] for i in range(n)]
        series.append(line(group, range(start, start + n), some, None))
        series[-1]["full"] = [row.get("p", 1) < 0.05 for row in some]
        ticks |= {start + i: str(i) for i in range(0, n, 1 + n // 8)}
        start += n + 1
    colours = {"Unmodified": "black", "Skip-Attn": "tab:orange", "Skip-Layer": "tab:purple", "next vector": "tab:green"}
    colours["base"] = "grey"
    flat = level([(name, rows[name], colours[name]) for name in colours if name in rows])
    inside = [one["y"] for one in flat[:3]] + [x for one in series for x in one["low"] + one["high"]]
    room = 0.08 * (max(inside) - min(inside)) + 0.01  # base and next vector may be far off: then in the legend only
    limits = (min(inside) - room, max(inside) + room)
    panel = dict(form="dots", series=series, flat=flat, ticks=ticks, y=limits, ylabel=ylabel)
    return panel | dict(xlabel="query head (Q, Head) or key-value head (K, V)")


def patch(found: dict) -> dict:
    by_name = {name: row["recovery"] | {"p": row.get("p_adjusted", 1)} for name, row in found["found"].items()}
    panels, lines = [head_panel(found["heads"], by_name, "recovery (%)")], found["lines"]
    if len(found["accuracy"]) > len(lines):
        panels.append(head_panel(found["heads"], found["accuracy"], "accuracy (%)"))
    else:
        bars = [line("", range(len(lines)), [found["accuracy"][name] for name in lines], "tab:blue")]
        names = [name.replace(", ", "\n").replace("-", "-\n") for name in lines]
        panels.append(dict(form="bars", series=bars, names=names, ylabel=RIGHT))
    note = "full dots differ from Skip-Attn (p < 0.05, adjusted for the number of heads); bars, bands: 95 % intervals\n"
    note += "recovery: 1 - KL(full || patched) / KL(full || base) on answers of the steered model; "
    rounding = 100 * found["floor"]["kl"] / found["found"]["base"]["kl"]
    note += f"rounding alone (another dtype) costs {rounding:.2g} points"
    title = f"Through which part of block {found['layer'] + 1} does the vector of layer {found['layer']} act?"
    return dict(title=title, panels=panels, columns=1, note=note, size=(9, 7))


def attention(found: dict) -> dict:
    grid = [[x if x > 0 else None for x in row] for row in zip(*found["by_head"]["steered"])]  # [head][layer]
    high = max([x for row in grid for x in row if x] or [1.0])
    top = dict(form="heat", grid=grid, rows=range(len(grid)), columns=range(found["depth"]), low=0, high=high)
    top |= dict(thin=True, label="KL (nats)", xlabel="layer (0-based); white: exactly 0", ylabel="query head")
    series, kinds = [], [("steered", "the vector", "tab:blue"), ("random", "random vector of equal norm", "tab:brown")]
    for name, label, colour in [*kinds, ("floor", "floor: another dtype", "grey")]:
        seen = {l: x for l, x in enumerate(found["by_layer"][name]) if x["value"] > 0}
        if seen:
            series.append(line(label, seen, list(seen.values()), colour, scale=1))
    bottom = dict(form="lines", series=series, log_y=True, xlabel="layer (0-based)", ylabel="mean over heads (nats)")
    note = "KL(steered || base) of attention patterns, mean over queries; bands: 95 % intervals over answers"
    title = f"Does the vector of layer {found['layer']} change where the model looks?"
    return dict(title=title, panels=[top, bottom], columns=1, note=note, size=(8, 6))


def scale(found: dict) -> dict:
    several = len(found["by_place"]) > 1
    boxes, names = [], []
    for place, rows in found["by_place"].items():
        boxes += rows.values()
        where = f"{place}, " if several else ""
        names += [f"{segment}\n{where}n={row['count']}" for segment, row in rows.items()]
    top = dict(form="boxes", boxes=boxes, names=names, ylabel="|B| A x")
    tokens = [(text, x, False) for text, x in found["example"]["tokens"]]
    bottom = dict(form="tokens", tokens=tokens, limit=max(abs(x) for _, x, _ in tokens) or 1.0)
    bottom["label"] = f"|B| A x at {found['example']['place']} (units of the residual stream)"
    lower = size_of(tokens)[1] + 0.5
    made = dict(title="Where does the adaptive vector act?", note="boxes: quartiles over tokens, whiskers 5 and 95 %")
    return made | dict(panels=[top, bottom], columns=1, size=(8, 3.2 + lower), heights=[2.6, lower])


def cost(found: dict) -> dict:
    """Accuracy against the number of trained numbers, if evaluate.py has measured it; else the table."""
    runs, panels = sorted(found["runs"].values(), key=lambda row: row["trained_parameters"]), []
    for column in dict.fromkeys(column for row in runs for column in row["right"]):
        measured, marks, beside = [row for row in runs if column in row["right"]], {}, Counter()
        for row in measured:
            n, (layers, *rest) = row["trained_parameters"], row["label"].split(", ")
            whose = {"all": "all layers", "all weights": "all weights"}.get(layers, f"layer {layers}")
            marks.setdefault(", ".join([whose, *rest]), []).append((n * 1.12 ** beside[n], row["right"][column]))
            beside[n] += 1  # runs with equally many numbers stand beside each other
        series = [line(label, *zip(*some), None) | {"full": [True] * len(some)} for label, some in marks.items()]
        base = next((row["right"][column]["base"] for row in measured if row["right"][column]["base"]), None)
        names = {n: f"{n:,}" if n < 1e5 else f"{n / 1e6:.2g} M" for n in beside}
        panel = dict(form="dots", series=series, ticks=names, y=(0, 100), log_x=True)
        panel |= dict(flat=level([("base model", base, "black")]))
        panel |= dict(xlabel="trained numbers", ylabel=f"right answers, {column}")
        panels += [panel] if len(beside) > 1 else []
    if panels:
        title = "How many trained numbers does it take?"
        return dict(title=title, panels=panels, columns=1, size=(8, 3.8 * len(panels)), note=ERROR_BARS)
    note = "training: sampling, grading and training of all steps; update and sync: medians over steps"
    return table_figure(found, "What does training cost?", note)


drawn = [lens, shift, prefix, case, sweep, ablate, compose, sites]
drawn += [orthogonal, transfer, persistence, similarity, patch, attention, scale, cost]
FIGURES = {function.__name__: function for function in drawn}  # the table of any other analysis is drawn


def plot_reward(metrics: list[dict], base: float, path: Path) -> None:
    """reward.png: the share of right answers of every step, the level of the unsteered model dashed. base: 0 to 1."""
    fig = Figure(figsize=(6, 3.5), layout="constrained")
    ax = fig.subplots()
    ax.plot([m["step"] for m in metrics], [100 * m["accuracy"] for m in metrics], "o-", ms=3, label="steered, training")
    if held_out := [(m["step"], 100 * m["held_out"]) for m in metrics if "held_out" in m]:
        ax.plot(*zip(*held_out), "s", label="steered, held out")
    ax.axhline(100 * base, color="black", linestyle="--", label="base model")
    ax.set(xlabel="step", ylabel="right answers (%)", title="RLOO on steering vectors", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper left")
    fig.savefig(path, dpi=150)
