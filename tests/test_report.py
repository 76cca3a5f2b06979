"""Reports: totals that add up, a table that can be read, a dict that JSON takes."""

import dataclasses
import json
import math

import pytest

from jaxquant.report import ActivationReport, Edge, Event, LeafReport, Report, SiteReport

LONG = "encoder/transformer/layers_with_a_long_name/self_attention/query_projection/kernel"


def leaf(path, before=400, after=100, **fields):
    defaults = {"shape": (10, 10), "dtype": "float32", "action": "int8 per channel"}
    defaults |= {"quantized": True, "sqnr_db": 44.25}
    return LeafReport(path, bytes_before=before, bytes_after=after, **(defaults | fields))


REPORT = Report(
    leaves=(
        leaf("a/kernel"),
        leaf(LONG, before=4000, after=1000, shape=(1000,), sqnr_db=math.inf, sites=("x", "y")),
        leaf("tied", shared=True, notes=("tied: stored once, at a/kernel",)),
        leaf("b", 40, 40, shape=(10,), quantized=False, sqnr_db=None, action="kept: no rule"),
        leaf("n", 0, 0, shape=(0,), quantized=False, sqnr_db=None, action="kept: no rule"),
    ),
    recipe="w8a8",
)


def test_totals_count_tied_leaves_once():
    assert REPORT.bytes_before == 4440
    assert REPORT.bytes_after == 1140
    assert REPORT.ratio == 1140 / 4440
    assert REPORT.quantized == 3
    assert REPORT.bits_per_weight == pytest.approx(8 * 1140 / 1110)
    assert REPORT["a/kernel"].bits_per_weight == 8.0
    assert REPORT["n"].bits_per_weight == 0.0
    with pytest.raises(KeyError):
        REPORT["missing"]


def test_the_table_lines_up():
    lines = str(REPORT).splitlines()
    head = ("path", "array", "action", "before", "after", "bits", "SQNR", "dB")
    assert tuple(lines[0].split()) == head
    table = lines[: lines.index(lines[1], 2) + 2]
    assert len(table) == 1 + 1 + 5 + 1 + 1
    figures = [line for line in table if not line.startswith("-")]
    column = figures[0].index("before") + len("before")
    assert all(line[column : column + 2].strip() == "" for line in figures)
    assert table[-1].startswith("total")
    assert "3 quantized by w8a8" in table[-1]
    assert "4.4 kB" in table[-1]
    assert "x 0.257" in table[-1]
    assert "exact" in str(REPORT)
    assert "(tied)" in str(REPORT)
    assert lines[-1] == "tied: tied: stored once, at a/kernel"


def test_paths_are_whole_and_rows_unique():
    paths = [f"params/{LONG}/layer_{i}/kernel" for i in range(12)]
    lines = str(Report(tuple(map(leaf, paths)))).splitlines()
    assert [line.split()[0] for line in lines[2:14]] == paths


def test_a_tree_that_is_one_array_has_a_name():
    report = Report((leaf("", notes=("a note",)),))
    assert str(report).splitlines()[2].startswith("(root)  float32[10,10]")
    assert str(report).splitlines()[-1] == "(root): a note"


@pytest.mark.parametrize(
    ("sites", "line"),
    [
        ((), None),
        ([("a", "int8")], "attention: 1 contraction int8 (a)"),
        (
            [(f"attn{i}", "int8") for i in range(24)] + [("head", None)],
            "attention: 24 contractions int8 (attn0, attn1, attn2, ...); 1 left float (head)",
        ),
        ([("a", None), ("b", None)], "attention: 2 contractions left float (a, b)"),
    ],
)
def test_attention_has_a_line(sites, line):
    report = dataclasses.replace(REPORT, attention=tuple(sites))
    found = [text for text in str(report).splitlines() if text.startswith("attention")]
    assert found == ([line] if line else [])
    names = [(entry["site"], entry["format"]) for entry in report.to_dict()["attention"]]
    assert names == list(sites)


def test_no_ratio_is_shown_as_a_dash():
    row = str(Report((leaf("w", sqnr_db=None),))).splitlines()[2]
    assert row.endswith("  -")
    assert str(Report((leaf("w", sqnr_db=math.nan),))).splitlines()[2] == row


def test_events_are_listed_once():
    event = Event("dequantized", "encoder/x", "add", "the weight met an elementwise op")
    report = REPORT.with_events([event, event]).with_events([event])
    assert report.events == (event,)
    assert str(event) == "dequantized by add at encoder/x: the weight met an elementwise op"
    assert str(report).splitlines()[-1] == str(event)
    assert REPORT.events == ()


def test_the_dict_is_json():
    report = REPORT.with_events([Event("policy", "", "", "bfloat16 instead of float16")])
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["bytes_after"] == 1140
    assert data["ratio"] == report.ratio
    first, exact, *_ = data["leaves"]
    assert first["shape"] == [10, 10]
    assert first["sqnr_db"] == 44.25
    assert first["bits_per_weight"] == 8.0
    assert not first["exact"]
    assert exact["sqnr_db"] is None
    assert exact["exact"]
    assert exact["sites"] == ["x", "y"]
    assert data["events"][0]["kind"] == "policy"


def test_an_empty_report_prints():
    report = Report(())
    assert report.ratio == 1.0
    assert report.bits_per_weight == 0.0
    assert "0 leaves" in str(report)


ROWS = (
    SiteReport("enc/w", "lhs", "int8, mse()", -0.5, 123.456789, 0.00125, 39.96),
    SiteReport("w", "rhs", "uint8 asymmetric, minmax()", 0.0, 2.0),
    SiteReport("", "lhs", "int8, profile()", 0.0, 0.0, 0.0, math.nan),
    SiteReport("e[1]", "lhs", "int4, profile()", -1.0, 1.0, 0.5, math.inf, "per channel", 12.34),
)


def test_activations_line_up_and_say_what_is_not_known():
    lines = str(ActivationReport(ROWS, ("a note",))).splitlines()
    assert lines[-1] == "a note"
    head, rule, *rows = lines[:-1]
    assert " ".join(head.split()) == "site operand how suggestion range clipped % SQNR dB"
    assert set(rule) == {"-"} and len(rule) == max(map(len, lines[:-1]))
    assert [row.split()[0] for row in rows] == ["enc/w", "w", "(root)", "e[1]"]
    assert [row.split()[-2:] for row in rows] == [
        ["0.125", "40.0"], ["-", "-"], ["0.000", "-"], ["50.000", "exact"]
    ]  # fmt: skip
    assert "-0.5 .. 123.5" in rows[0]
    assert "per channel: +12.3 dB" in rows[3]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    starts = [row.index(r.how) for row, r in zip(rows, ROWS, strict=True)]
    assert set(starts) == {head.index("how")}


def test_activations_are_json_and_found_by_site():
    report = ActivationReport(ROWS)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["sqnr_db"] for row in data["sites"]] == [39.96, None, None, None]
    assert data["sites"][3]["suggestion"] == "per channel"
    assert data["sites"][1]["clipped"] is None
    assert report["e[1]"].gain_db == 12.34
    with pytest.raises(KeyError):
        report["e"]


def test_edges_are_counted_and_those_that_are_not_integer_listed():
    edges = (Edge("a", "b", True), Edge("b", "tanh in mlp", False, "tanh"), Edge("", "c", True))
    report = dataclasses.replace(REPORT, edges=edges, activations=ActivationReport(ROWS[:1]))
    lines = str(report).splitlines()
    at = lines.index("edges: 2 of 3 int8, the others:")
    assert lines[at + 1] == "  b -> tanh in mlp: float, tanh"
    assert lines[at + 2].startswith("tied:")
    assert lines[-4:] == ["", *str(report.activations).splitlines()]
    assert str(edges[2]) == "(root) -> c: int8"
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["edges"][1] == {
        "source": "b", "target": "tanh in mlp", "integer": False, "reason": "tanh"
    }  # fmt: skip
    assert data["activations"]["sites"][0]["site"] == "enc/w"
    whole = str(dataclasses.replace(REPORT, edges=edges[:1]))
    assert "edges: 1 of 1 int8\n" in whole
    assert "edges" not in str(REPORT)
    assert REPORT.to_dict()["activations"] is None
