"""Rules, gradients and schedules that say what cannot be."""

from __future__ import annotations

from typing import Any

import pytest

import jaxquant as jq
from jaxquant import PerChannel, PerTensor, QSpec, Rule, Schedule, ste
from jaxquant.qtensor import Gradients
from tests.qat.programs import LEVELS, tensor

GRID = tensor("int8")


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "a class": (
        {"weights": jq.int8(), "weight_estimator": type(ste.lsq())},
        r"weight_estimator takes a value such as jq\.ste\.lsq\(\), got <class",
    ),
    "a maker": (
        {"weights": jq.int8(), "weight_estimator": ste.lsq},
        r"Rule\('\*\*'\): weight_estimator takes a value .*got <function lsq",
    ),
    "no weights": (
        {"attention": jq.int8(), "weight_estimator": ste.lsq()},
        r"weight_estimator without weights",
    ),
    "no activations": (
        {"weights": jq.int8(), "activation_estimator": ste.lsq()},
        r"activation_estimator without activations",
    ),
    "codebook activations": (
        {
            "weights": QSpec(LEVELS, PerTensor()),
            "activations": GRID,
            "activation_estimator": ste.kmeans(),
        },
        r"KMeans\(.*\) is for weights only",
    ),
    "learned and observed": (
        {
            "weights": jq.int8(),
            "activations": GRID,
            "activation_estimator": ste.pact(),
            "observer": jq.observers.minmax(),
        },
        r"learns the range that the observer would find; leave one of them out",
    ),
    "a step for each row": (
        {"weights": jq.int8(), "activations": jq.int8(), "activation_estimator": ste.lsq()},
        r"learns one step, so activations take granularity=PerTensor\(\), got QSpec\(int8, PerCh",
    ),
    "gradients as a spec": (
        {"weights": jq.int8(), "activations": jq.int8(), "gradients": jq.int8()},
        r"gradients: expected jaxquant\.qtensor\.Gradients\(\.\.\.\), got QSpec",
    ),
    "gradients alone": (
        {"weights": jq.int8(), "gradients": Gradients()},
        r"gradients without activations",
    ),
    "skip": (
        {"skip": True, "weight_estimator": ste.lsq(), "gradients": Gradients()},
        r"skip=True does not go with weight_estimator, gradients",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    kwargs, message = RULES[name]
    with pytest.raises(ValueError, match=message):
        Rule("**", **kwargs)


GRADIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"input": None, "weight": None}, r"expected a spec for input or weight, got neith"),
    "a name": ({"input": "int8"}, r"Gradients: input takes a QSpec, got 'int8'"),
    "unsigned": (
        {"weight": jq.uint8()},
        r"weight: expected a signed integer or 8-bit float .*uint8",
    ),
    "a codebook": ({"weight": QSpec("nf4", PerTensor())}, r"weight: expected a signed .* got nf4"),
    "4-bit floats": ({"input": QSpec("float4_e2m1fn")}, r"input: .* got float4_e2m1fn"),
    "groups": ({"input": jq.int8(group=16)}, r"input: expected PerTensor\(\) .* got PerGroup"),
    "axes": ({"weight": QSpec("int8", PerChannel(0))}, r"weight: expected .* got PerChannel\(axes"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str) -> None:
    kwargs, message = GRADIENTS[name]
    with pytest.raises(ValueError, match=message):
        Gradients(**kwargs)


SCHEDULES: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"start": -1}, r"Schedule: start: expected a step, 0 or more, got -1"),
    "half a step": ({"freeze": 0.5}, r"freeze: expected a step, 0 or more, got 0\.5"),
    "a flag": ({"freeze_batchnorm": True}, r"freeze_batchnorm: expected a step.* got True"),
    "ends early": (
        {"start": 10, "bits": ((0, 8), (5, 4))},
        r"bits end at step 5, before rounding starts at step 10",
    ),
    "freezes early": (
        {"start": 10, "freeze": 9},
        r"ranges freeze at step 9, before rounding starts at step 10",
    ),
    "not ascending": ({"bits": ((3, 8), (3, 4))}, r"expected steps that ascend, got \(\(3, 8\)"),
    "more bits later": ({"bits": ((0, 4), (3, 8))}, r"expected fewer bits at each step"),
    "one bit": ({"bits": ((0, 1),)}, r"expected 2 to 8 bits"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    kwargs, message = SCHEDULES[name]
    with pytest.raises(ValueError, match=message):
        Schedule(**kwargs)
