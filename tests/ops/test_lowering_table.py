"""Each row of the table: the form is what the program has, and its result is the plain form's."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from benchmarks.suite import forms
from benchmarks.suite.lowering_table import TABLE
from jaxquant.ops import dot_general

ROWS = [pytest.param(row, id=f"{row.what}, {row.case}") for row in TABLE]
FLOAT = ("float rows", "codebook", "learned")  # of a float activation
# of the largest result: sums of integers differ by the rounding of float32 alone
LIMBS, EXACT = 2.0**-14, 2.0**-20


def small(row):
    """Shapes that compute fast."""
    case = row.case
    if case.window:
        return dataclasses.replace(case, rows=6, inputs=8, outputs=8)
    return dataclasses.replace(case, rows=min(case.rows, 70), inputs=256, outputs=24)


def program(row):
    """What the library makes of the row's case, lowered for a CPU; nothing is computed."""
    x, q, _ = jax.eval_shape(lambda: forms.arguments(row.case))
    if row.case.window:
        fn = forms.convolved(row.case)
    elif row.what == "codes of an activation":
        fn = forms.forms_of(row.case)["in one program"]
    else:
        spec = None if row.what.startswith(FLOAT) else forms.INT8
        fn = lambda x, q: dot_general(x, q, forms.OVER, activations=spec)
    return jax.jit(fn).trace(x, q).lower(lowering_platforms=("cpu",)).as_text()


def products(text):
    """Types of the operands of every product, and of its result."""
    found = re.findall(r"stablehlo\.dot_general.*: \((.*)\) -> (tensor<\S*>)", text)
    return [f"{operands} -> {result}" for operands, result in found]


def has(text, *types):
    """Whether there is one product, of these types."""
    return products(text) == ["{}, {} -> {}".format(*(f"tensor<{t}>" for t in types))]


def has_form(text, row):
    rows, k, n = row.case.rows, row.case.inputs, row.case.outputs
    weight = f"{n}x{k}xi8"
    match row.chosen:
        case "one loop" | "one loop, 15 bits":  # no product: multiplied and summed as it is read
            stored = f"{n}x{k // 2}xui8" if row.case.format == "int4" else weight
            wide = re.search(r"multiply.*xi32>", text)
            return not products(text) and wide and f"tensor<{stored}>" in text
        case "contracted axis last":
            return has(text, f"{rows}x{k}xi8", weight, f"{rows}x{n}xi32")
        case "two rows":
            return has(text, f"2x1x{k}xi8", weight, f"2x1x{n}xi32")
        case "limbs" if row.case.group:  # in a loop over groups
            b = row.case.group
            return products(text)[:1] == [
                f"tensor<{n}x{b}xi8>, tensor<2x{b}xi8> -> tensor<{n}x2xi32>"
            ]
        case "limbs":
            limbs = f"{2 * rows}x{k}xi8"
            return has(text, limbs, weight, f"{2 * rows}x{n}xi32")
        case "loop" | "scales once":
            b, rows = row.case.group, "2x1" if rows == 1 else rows
            types = f"{n}x{b}xi8", f"{rows}x{b}xi8", f"{n}x{rows}xi32"
            want = "tensor<{}>, tensor<{}> -> tensor<{}>".format(*types)
            # the scale of the rows is not among what is multiplied in the loop
            inside = [line for line in text.splitlines() if f"tensor<1x{rows}xf32>" in line]
            loops = "stablehlo.while" in text and set(products(text)) == {want}
            return loops and not any("multiply" in line for line in inside)
        case "whole":
            (product,) = products(text)
            return f"tensor<{n}x{k}xf32>" in product
        case "in one program":
            return "optimization_barrier" not in text and products(text)
        case "direct":
            return re.search(r"convolution.*xi8>, tensor<\S*xi8>\) -> tensor<\S*xi32>", text)
        case "shifted products":
            return "stablehlo.convolution" not in text
    raise AssertionError(f"no sign is known of {row.chosen}")


@pytest.mark.parametrize("row", ROWS)
def test_the_program_has_the_form(row):
    text = program(row)
    assert has_form(text, row), "\n".join(products(text)) or text


@pytest.mark.parametrize("row", ROWS)
def test_the_form_equals_the_others(row):
    case = small(row)
    x, q, _ = forms.arguments(case)
    known = forms.forms_of(case)
    got = np.asarray(jax.jit(known[row.form])(x, q))
    scale = np.abs(got).max()
    assert scale > 0
    for other in {row.form, *row.others} - {row.chosen}:
        found = np.asarray(jax.jit(known[other])(x, q))
        bound = LIMBS if row.what.startswith(FLOAT) else EXACT
        assert np.abs(found - got).max() <= bound * scale, other


@pytest.mark.parametrize("row", ROWS)
def test_times_are_of_its_forms(row):
    assert row.times, "not measured"
    for where, times in row.times.items():
        assert set(times) <= {row.form, *row.others}, where
        older = "0.10" in where and row.before
        assert {row.before if older else row.form} < set(times), where
        assert all(t > 0 for t in times.values()), where
    assert {row.form, *row.others} <= set(forms.forms_of(row.case))
