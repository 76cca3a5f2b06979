"""The demo: its figures as data, and its table."""

import io
import re

import numpy as np
import pytest

pytest.importorskip("sklearn")
from rich.console import Console

from jaxquant import demo

# Preset: the most points of accuracy it may lose (a digit of 597 is 0.17), least agreement with
# float, and most bits per weight.
EXPECTED = {
    "w8a8": (0.5, 0.99, 8.3),
    "w8a16": (0.5, 0.99, 8.3),
    "w8a8_fp8": (1.0, 0.98, 8.3),
    "w4a16": (2.0, 0.96, 5.0),
    "w4a8": (2.0, 0.96, 5.0),
    "nf4": (2.0, 0.96, 5.0),
    "mxfp4": (2.0, 0.96, 4.5),
}


# One test, as workers that share a fixture would each train the model.
def test_every_preset_stays_close_to_float():
    told = []
    rows = demo.run(epochs=6, rounds=1, watch=lambda *step: told.append(step))
    reference, *presets = rows
    assert [row.name for row in presets] == list(demo.PRESETS)
    assert reference.name == "float32"
    assert reference.accuracy > 0.95
    assert reference.agreement == 1
    assert reference.bits_per_weight == 32
    for row in presets:
        points, agreement, bits = EXPECTED[row.name]
        assert 100 * abs(row.accuracy - reference.accuracy) <= points, row
        assert row.agreement >= agreement, row
        assert row.bits_per_weight < bits, row
        assert row.seconds > 0, row
    for stage in ("training", "quantizing", "timing"):
        steps = [step[1:] for step in told if step[0].split(":")[0] == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_table_fits_eighty_columns():
    rows = [
        demo.Row("float32", "float / float", 0.9916, 1.0, 605_224, 151_306, 0.01),
        demo.Row("w4a16", "int4 g128 / float", 0.9866, 0.9966, 84_700, 151_306, 0.123),
    ]
    out = io.StringIO()
    Console(width=80, file=out).print(demo.table(rows))
    assert "…" not in out.getvalue()
    for figure in ("99.2 %", "98.7 %", "100.0 %", "605.2", "84.7", "0.140", "4.48", "12.30"):
        assert figure in out.getvalue()


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match=re.escape("mxfp4; got 'w9a9'")):
        demo.run(["w8a8", "w9a9"])
    with pytest.raises(ValueError, match="got none"):
        demo.run([])


def test_split_is_fixed():
    a, b = demo.load_digits(), demo.load_digits()
    assert len(a.train_x) + len(a.test_x) == 1797
    np.testing.assert_array_equal(a.test_x, b.test_x)
    assert a.train_x.min() == 0 and a.train_x.max() == 1
