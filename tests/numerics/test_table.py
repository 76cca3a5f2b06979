"""The printed table says what the records say."""

import json
from itertools import pairwise

import pytest

from jaxquant.numerics import FORMATS, BlockFormat, Format, get
from jaxquant.numerics.table import FormatTable, formats

PLAIN = [f for f in FORMATS.values() if isinstance(f, Format)]
BLOCKS = [f for f in FORMATS.values() if isinstance(f, BlockFormat)]


def rows(text):
    """Each line of a part of the table as a mapping of column heads to cells, by name."""
    head, rule, *lines = text.splitlines()
    ends = [0]
    for width in map(len, rule.split("  ")):
        ends.append(ends[-1] + width + 2)
    spans = [slice(a, b - 2) for a, b in pairwise(ends)]
    columns = [head[s].strip() for s in spans]
    cells = [[line[s].strip() for s in spans] for line in lines]
    return {c[0]: dict(zip(columns, c, strict=True)) for c in cells}


@pytest.mark.parametrize("f", PLAIN, ids=lambda f: f.name)
def test_a_row_for_each_format(f):
    row = rows(formats.table().split("\n\n")[0])[f.name]

    def cell(value):
        return "-" if value is None else f"{value:.7g}"

    assert row["bits"] == str(f.bits)
    assert row["sign"] == str(int(f.signed))
    assert row["exponent"] == cell(f.exponent_bits)
    assert row["mantissa"] == cell(f.mantissa_bits)
    assert row["bias"] == cell(f.bias)
    assert row["largest"] == cell(f.max)
    assert row["smallest normal"] == cell(f.smallest_normal)
    assert row["smallest subnormal"] == cell(f.smallest_subnormal)
    assert row["epsilon"] == cell(f.epsilon)
    assert float(row["bytes"]) == f.bytes
    low, high = (float(part.removeprefix("10^")) for part in row["decimal range"].split(" .. "))
    assert (low, high) == pytest.approx(f.decimal_range, abs=0.05)


@pytest.mark.parametrize("f", BLOCKS, ids=lambda f: f.name)
def test_a_row_for_each_block_format(f):
    row = rows(formats.table().split("\n\n")[1])[f.name]
    assert row["block"] == str(f.block)
    assert (row["element"], row["scale"]) == (f.element.name, f.scale.name)
    assert row["global scale"] == ("float32" if f.global_scale else "-")
    assert float(row["bits per value"]) == f.bits


def test_lines_are_aligned():
    for part in formats.table().split("\n\n"):
        assert len({len(line) for line in part.splitlines()}) == 1


def test_print_and_repr_are_the_table():
    assert str(formats) == repr(formats) == formats.table()


def test_it_is_a_mapping():
    assert dict(formats) == dict(FORMATS)
    assert len(formats) == len(FORMATS)
    assert "int4" in formats
    assert "int44" not in formats
    assert 3 not in formats
    assert formats["bf16"] is get("bfloat16")
    with pytest.raises(ValueError, match="did you mean 'int4'"):
        formats["int44"]


def test_to_dict_is_plain_data_with_every_fact():
    data = formats.to_dict()
    assert json.loads(json.dumps(data)) == data
    for f in PLAIN:
        facts = data[f.name]
        for field in f.__dataclass_fields__:
            value = getattr(f, field)
            assert facts[field] == (list(value) if field == "codebook" and value else value)
        assert facts["decimal_range"] == list(f.decimal_range)
    assert data["nvfp4"]["global_scale"] is True


def test_a_part_of_the_table():
    assert "block" not in FormatTable({"int8": FORMATS["int8"]}).table()
    assert FormatTable({"mxfp4": FORMATS["mxfp4"]}).table().startswith("name ")
    assert FormatTable({}).table() == ""
