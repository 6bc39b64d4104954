"""data/paper.json: the papers' numbers. Shapes, sums within rounding, cells typed again by hand, rates in range."""

import copy
import json

import pytest
from conftest import ROOT

FILE = ROOT / "data" / "paper.json"
PAPER = json.loads(FILE.read_text(encoding="utf-8"))
TABLES = {key: table for key, table in PAPER.items() if key != "authors"}
QWEN, LLAMA = "Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.1-8B-Instruct"
LAYERS = {QWEN: 28, LLAMA: 32}
SCORES = ["P4.table2", "P4.table3", "P4.table4", "P4.table5", "B.table1"]  # six benchmarks and Avg
SQUARE = ["P4.table6.diff_diff", "P4.table6.diff_vector", "P4.table7.diff_diff", "P4.table7.diff_vector",
          "P1.table2.qwen", "P1.table2.llama"]  # fmt: skip
DONOR = {"Base": 1, "Instruct": 2, "Math": 3}  # column of a recipient's own vectors in P4.table9; column 0: no vectors


def row(table, **where):
    """The one row of a table with these entries."""
    (found,) = [r for r in table["rows"] if all(r[k] == v for k, v in where.items())]
    return found


def name(r):
    return f"{r['model']} {r['setup']}" if "model" in r else r["setup"]


def test_every_entry_has_a_source():
    settings = [entry for model in PAPER["authors"]["models"].values() for entry in model.values()]
    for entry in [*TABLES.values(), PAPER["authors"], *settings]:
        assert entry["source"].startswith(("arXiv:", "code of ", "configs/"))
    for key, table in TABLES.items():
        assert table["title"] and table["unit"] and table["columns"] and table["rows"], key
    papers = {"P4": "2509.06608v4", "P1": "2509.06608v1", "B": "2505.18706"}
    assert all(papers[key.split(".")[0]] in table["source"] for key, table in TABLES.items())


def test_tables_are_complete():
    numbers = {int(key.split(".")[1][5:]) for key in TABLES if key.startswith("P4.table")}
    assert numbers == set(range(1, 16))
    assert {f"B.table{n}" for n in range(1, 7)} < set(TABLES)


def test_file_is_readable():
    text = FILE.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 230

    def no_key_twice(pairs):
        assert len(dict(pairs)) == len(pairs), pairs

    json.loads(text, object_pairs_hook=no_key_twice)


@pytest.mark.parametrize("key", SCORES[:4])
def test_one_row_per_layer(key):
    table = TABLES[key]
    assert [r["layer"] for r in table["rows"]] == [None] * 4 + list(range(LAYERS[table["model"]]))
    assert [r["setup"] for r in table["rows"][:4]] == ["base, greedy", "base, T=1", "full", "all layers"]


@pytest.mark.parametrize("key", TABLES)
def test_rows_have_equal_fields_and_lengths(key):
    width = len(TABLES[key]["columns"])
    for r in TABLES[key]["rows"]:
        assert r.keys() - {"pm"} == TABLES[key]["rows"][0].keys() - {"pm"}
        for field in {"mean", "pm", "diff"} & r.keys():
            assert not isinstance(r[field], list) or len(r[field]) == width
        if "pm" in r and isinstance(r["pm"], list):
            assert [x is None for x in r["pm"]] == [x is None for x in r["mean"]]


@pytest.mark.parametrize("key", SQUARE)
def test_upper_triangles(key):
    table = TABLES[key]
    n = LAYERS[table["model"]]
    assert table["columns"] == [r["layer"] for r in table["rows"]] == list(range(n))
    for i, r in enumerate(table["rows"]):
        assert len(r["value"]) == n and r["value"][:i] == [None] * i
        if key.startswith("P4"):
            assert r["value"][i] == 1 and all(-1 <= x <= 1 for x in r["value"][i:])
        else:
            assert all(x is None or 10 < x < 45 for x in r["value"][i:])


def check_averages(table):
    """Avg = mean of the six columns; both sides are rounded to 0.1: at most 0.1 apart, but for the rows in avg_off."""
    off = {}
    for r in table["rows"]:
        if None not in r["mean"]:
            gap = r["mean"][6] - sum(r["mean"][:6]) / 6
            if abs(gap) > 0.1 + 1e-9:
                off[name(r)] = gap
    assert off == pytest.approx(table["avg_off"], abs=0.006)


@pytest.mark.parametrize("key", SCORES)
def test_averages(key):
    check_averages(TABLES[key])


@pytest.mark.parametrize("setup", ["layer 2", "layer 14"])  # a row that adds up, a row that does not
def test_check_averages_rejects_a_wrong_digit(setup):
    table = copy.deepcopy(TABLES["P4.table2"])
    row(table, setup=setup)["mean"][3] += 2
    with pytest.raises(AssertionError):
        check_averages(table)


@pytest.mark.parametrize("key", SCORES[:4])
def test_small_sets_are_one_sample_and_three_seeds(key):
    for r in TABLES[key]["rows"]:
        for x, problems in zip(r["mean"][:3], [30, 30, 40]):
            assert round(100 * round(x * 3 * problems / 100) / (3 * problems), 1) == pytest.approx(x)


def test_transfer_gains():
    """Table 1 = (donor - none) / (own - none) of 9; Table 9 = mean of Tables 10 to 15 to 0.01 but for avg_off."""
    raw, off = TABLES["P4.table9"], {}
    for r in TABLES["P4.table1"]["rows"]:
        who = {k: r[k] for k in ("family", "recipient")}
        mean = row(raw, **who)["mean"]
        for donor, gain in zip(mean[1:], r["value"]):
            if gain is not None:
                assert (donor - mean[0]) / (mean[DONOR[r["recipient"]]] - mean[0]) == pytest.approx(gain, abs=0.0051)
        for k, column in enumerate(raw["columns"]):
            if mean[k] is not None:
                gap = mean[k] - sum(row(TABLES[f"P4.table{n}"], **who)["mean"][k] for n in range(10, 16)) / 6
                if abs(gap) > 0.01 + 1e-9:
                    off[f"{r['family']} {r['recipient']}, donor {column}"] = gap
    assert off == pytest.approx(raw["avg_off"], abs=0.006)


def test_figures_agree_with_tables():
    avg = {(key, r["setup"]): r["mean"][6] for key in SCORES[:4] for r in TABLES[key]["rows"]}
    for model, sampled, greedy in [(QWEN, "P4.table2", "P4.table4"), (LLAMA, "P4.table3", "P4.table5")]:
        last = f"layer {LAYERS[model] - 1}"
        for decoding, key, base in [("T=1", sampled, "base, T=1"), ("greedy", greedy, "base, greedy")]:
            bars, again = (row(TABLES[fig], model=model, decoding=decoding) for fig in ("P4.fig4", "P4.fig13"))
            assert (bars["base"], bars["vector"]) == (avg[key, base], avg[key, last])
            assert (again["base"], again["base_prefix"]) == (bars["base"], bars["base_prefix"])
    sites = TABLES["P4.fig10"]["rows"]
    assert (sites[0]["mean"], sites[-1]["mean"]) == (avg["P4.table2", "layer 24"], avg["P4.table2", "layer 25"])
    for r in TABLES["P4.fig12"]["rows"]:
        assert r["value"][0] == avg["P4.table2", f"layer {r['layer']}"]
        assert r["value"] == sorted(r["value"], reverse=True)


def test_differences_to_full_fine_tuning():
    table = TABLES["B.table4"]
    assert len(table["rows"]) == 16
    for r in table["rows"]:
        full = row(table, train=r["train"], test=r["test"], setup="Full-Tune")["mean"]
        for x, y, diff in zip(r["mean"], full, r["diff"]):
            assert diff is None if r["setup"] in ("Base", "Full-Tune") else x - y == pytest.approx(diff, abs=1e-6)


CELLS = [  # typed from the papers: table, row, field, column, value
    ("P4.table1", dict(family="Qwen2.5-7B", recipient="Instruct"), "value", "Math", -0.34),
    ("P4.table1", dict(family="Qwen2.5-1.5B", recipient="Instruct"), "value", "Base", 0.94),
    ("P4.table1", dict(family="Llama3.1-8B", recipient="Base"), "value", "Math", None),
    ("P4.table2", dict(setup="base, greedy"), "mean", "Avg", 24.8),
    ("P4.table2", dict(setup="all layers"), "pm", "AIME25", 6.3),
    ("P4.table2", dict(layer=16), "mean", "Avg", 40.1),
    ("P4.table2", dict(layer=24), "pm", "MATH500", 5.6),
    ("P4.table2", dict(layer=27), "mean", "AIME24", 11.1),
    ("P4.table3", dict(setup="base, T=1"), "mean", "Avg", 11.7),
    ("P4.table3", dict(layer=9), "mean", "MATH500", 56.9),
    ("P4.table3", dict(layer=31), "mean", "Avg", 14.7),
    ("P4.table4", dict(setup="full"), "mean", "AIME24", 31.1),
    ("P4.table4", dict(layer=15), "mean", "Avg", 43.9),
    ("P4.table4", dict(layer=22), "pm", "AIME25", 3.1),
    ("P4.table5", dict(setup="full"), "mean", "Avg", 28.4),
    ("P4.table5", dict(layer=26), "mean", "AMC23", 42.5),
    ("P4.table5", dict(layer=30), "pm", "AMC23", 4.7),
    ("P4.table6.diff_diff", dict(layer=0), "value", 27, 0.57),
    ("P4.table6.diff_diff", dict(layer=1), "value", 25, 0.29),
    ("P4.table6.diff_diff", dict(layer=16), "value", 17, 0.8),
    ("P4.table6.diff_vector", dict(layer=0), "value", 13, 0.09),
    ("P4.table6.diff_vector", dict(layer=2), "value", 3, 0.55),
    ("P4.table6.diff_vector", dict(layer=23), "value", 24, 0.68),
    ("P4.table6.diff_vector", dict(layer=24), "value", 27, 0.07),
    ("P4.table7.diff_diff", dict(layer=2), "value", 3, 0.74),
    ("P4.table7.diff_diff", dict(layer=0), "value", 31, 0.57),
    ("P4.table7.diff_diff", dict(layer=30), "value", 31, 0.78),
    ("P4.table7.diff_vector", dict(layer=1), "value", 30, 0.15),
    ("P4.table7.diff_vector", dict(layer=4), "value", 28, -0.01),
    ("P4.table7.diff_vector", dict(layer=0), "value", 28, 0.0),
    ("P4.table9", dict(family="Qwen2.5-7B", recipient="Math"), "mean", "Math", 42.82),
    ("P4.table9", dict(family="Llama3.1-8B*", recipient="Instruct"), "pm", "Base", 0.46),
    ("P4.table9", dict(family="Qwen2.5-1.5B", recipient="Math"), "mean", "Base", 19.48),
    ("P4.table10", dict(family="Qwen2.5-7B", recipient="Base"), "pm", "None", 6.29),
    ("P4.table10", dict(family="Llama3.1-8B", recipient="Instruct"), "mean", "Instruct", 6.63),
    ("P4.table11", dict(family="Qwen2.5-7B", recipient="Math"), "mean", "Math", 12.64),
    ("P4.table11", dict(family="Qwen2.5-1.5B", recipient="Instruct"), "mean", "Base", 1.60),
    ("P4.table12", dict(family="Qwen2.5-7B", recipient="Base"), "pm", "None", 12.42),
    ("P4.table12", dict(family="Llama3.1-8B", recipient="Instruct"), "mean", "Base", 22.60),
    ("P4.table13", dict(family="Qwen2.5-7B", recipient="Math"), "pm", "Instruct", 7.11),
    ("P4.table13", dict(family="Qwen2.5-1.5B", recipient="Base"), "mean", "Base", 56.80),
    ("P4.table14", dict(family="Qwen2.5-7B", recipient="Instruct"), "mean", "Base", 37.75),
    ("P4.table14", dict(family="Llama3.1-8B", recipient="Base"), "mean", "Instruct", 3.19),
    ("P4.table15", dict(family="Qwen2.5-1.5B", recipient="Math"), "mean", "None", 15.46),
    ("P4.table15", dict(family="Qwen2.5-7B", recipient="Math"), "mean", "Math", 43.21),
    ("P1.table2.qwen", dict(layer=0), "value", 16, 41.9),
    ("P1.table2.qwen", dict(layer=3), "value", 4, 32.7),
    ("P1.table2.qwen", dict(layer=14), "value", 26, 42.2),
    ("P1.table2.qwen", dict(layer=14), "value", 25, None),
    ("P1.table2.llama", dict(layer=4), "value", 29, 11.3),
    ("P1.table2.llama", dict(layer=9), "value", 22, 24.9),
    ("P1.table2.llama", dict(layer=29), "value", 30, 12.3),
    ("B.table1", dict(model=QWEN, setup="Steering"), "mean", "Avg", 43.3),
    ("B.table1", dict(model="Qwen/Qwen2.5-7B", setup="R1-Distill"), "mean", "MATH500", 88.1),
    ("B.table1", dict(model="meta-llama/Llama-3.1-8B", setup="Full-Tune"), "pm", "MinervaMath", 2.1),
    ("B.table4", dict(train="MATH", test="MATH", setup="Steering"), "mean", "meta-llama/Llama-3.1-8B", 22.05),
    ("B.table4", dict(train="GSM8K", test="MATH", setup="LoRA"), "diff", "Qwen/Qwen2.5-1.5B", 8.54),
]
ENTRIES = [  # the same for tables whose cells have names: table, row, field, value
    ("P4.table8.qwen", dict(dot=42.5), "token", "To"),
    ("P4.table8.qwen", dict(token="\\"), "dot", 19.75),
    ("P4.table8.qwen", dict(token="-to"), "cos", 0.12),
    ("P4.table8.llama", dict(cos=0.12), "token", "final"),
    ("P4.table8.llama", dict(token="Step"), "dot", 1.32),
    ("P4.fig4", dict(model=QWEN, decoding="greedy"), "base_prefix", 35.5),
    ("P4.fig4", dict(model=LLAMA, decoding="T=1"), "base_prefix", 13.4),
    ("P4.fig10", dict(site="layer 25, after input norm"), "mean", 35.2),
    ("P4.fig12", dict(layer=15), "value", [39.2, 27.4, 20.9]),
    ("P4.fig13", dict(model=QWEN, decoding="greedy"), "vector", 40.8),
    ("P4.fig13", dict(model=LLAMA, decoding="greedy"), "vector", 18.2),
    ("P4.setup", dict(name="samples_per_prompt"), "value", 16),
    ("P4.setup", dict(name="prompts_of_probability_shift"), "value", 1000),
    ("P4.text", dict(name="all_layers_t1_pct", model=QWEN), "value", 42.9),
    ("P4.text", dict(name="trained_after_attention_pct", model=LLAMA), "value", 19.9),
    ("P1.text", dict(name="prompts_of_probability_shift"), "value", 256),
    ("B.table2", dict(layer=30), "cluster", "Causal & contrastive connectors"),
    ("B.table3", dict(metric="optimiser memory"), "steering", [240, "KB"]),
    ("B.table5", dict(model="Qwen/Qwen2.5-7B", metric="broadcast per step"), "full", [5.30, "s"]),
    ("B.table6", dict(model=LLAMA, data="GSM8K", setup="LoRA-1"), "lr", 6e-4),
    ("B.table6", dict(model="Qwen/Qwen2.5-1.5B", data="MATH", setup="Full-Tune"), "generations", 64),
    ("B.text", dict(name="lora_alpha"), "value", 4),
]


def test_cells():
    for key, where, field, column, value in CELLS:
        table = TABLES[key]
        assert row(table, **where)[field][table["columns"].index(column)] == value, (key, where, field, column)
    for key, where, field, value in ENTRIES:
        assert row(TABLES[key], **where)[field] == value, (key, where, field)
    assert {key for key, *_ in CELLS + ENTRIES} == set(TABLES)  # no table without a cell typed by hand


def test_learning_rates():
    models = PAPER["authors"]["models"]
    for model, depth in LAYERS.items():
        rates = models[model]["deepscaler"]["lr"]
        for kind in ("vector", "lora1"):
            single = [rates[f"{kind}, layer {layer}"] for layer in range(depth)]
            assert all(0 < x <= 0.1 for x in single) and f"{kind}, layer {depth}" not in rates
        assert rates["vector, all layers"] < min(rates[f"vector, layer {layer}"] for layer in range(depth))
    qwen, llama = (models[model]["deepscaler"]["lr"] for model in (QWEN, LLAMA))
    rates = [3e-3, 7e-3, 5e-3, 1e-2, 3e-2, 0.1, 1e-2, 1e-2, 0.1]
    assert [qwen[f"vector, layer {i}"] for i in (0, 1, 2, 17, 18, 22, 23, 24, 25)] == rates
    rates = [5e-4, 7e-4, 2e-3, 1e-3, 2e-3, 5e-3, 7e-3, 5e-3]
    assert [llama[f"vector, layer {i}"] for i in (3, 4, 11, 12, 24, 25, 30, 31)] == rates
    kinds = {key.split(",")[0] for model in models.values() for entry in model.values() for key in entry["lr"]}
    sites = {f"vector at {site}" for site in ("input-norm", "attention", "post-attention-norm")}
    assert kinds == {"vector", "lora1", "lora4", "full"} | sites


def test_settings_of_the_authors():
    models = PAPER["authors"]["models"]
    deepscaler = {model: entry["deepscaler"] for model, entry in models.items()}
    assert len(deepscaler) == 9
    assert [deepscaler[model]["lr"]["vector, all layers"] for model in (QWEN, LLAMA)] == [1e-3, 8e-5]
    assert deepscaler["Qwen/Qwen2.5-Math-1.5B"]["lr"]["full"] == 2e-6  # the others' is 1e-6
    for model, r in deepscaler.items():
        assert r["prompts"] == 128 and r["epochs"] == 1 and r["samples"] in (16, 64)
        assert r["context"] == (4096 if "Math" in model else 8192)
        assert r["template"] == ("r1" if model == "meta-llama/Llama-3.1-8B" else "qwen_math")
    small = {(model, data): e for model, entry in models.items() for data, e in entry.items() if data != "deepscaler"}
    kinds = {"Steering": "vector, all layers", "LoRA-1": "lora1, all layers", "LoRA-4": "lora4, all layers"}
    rows = PAPER["B.table6"]["rows"]
    assert len(rows) == 4 * len(small) == 32
    for r in rows:
        entry = small[r["model"], r["data"].lower()]
        assert entry["lr"][kinds.get(r["setup"], "full")] == r["lr"] and entry["samples"] == r["generations"]
        assert entry["context"] == 1024 and entry["epochs"] == (2 if r["model"].endswith("8B") else 3)
    assert 128 * deepscaler[QWEN]["samples"] * 314 == 643_072  # rollouts of one run
