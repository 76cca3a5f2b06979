"""What is timed against float32: jaxquant's formats, and peers where they are installed."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxquant as jq
from benchmarks.suite.program import Program


@dataclasses.dataclass(frozen=True)
class Jitted:
    """A program of JAX: a function, not yet compiled, and its arguments."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A program of another library, that waits for its result."""

    call: Callable[[], Any]
    seconds: float | None = None  # that making it took


Contender = Callable[[Program], "Jitted | Ready | None"]
"""Makes what is timed of a program; `None` where it cannot take part."""


def plain(program: Program) -> Jitted:
    """The float32 model as it is."""
    return Jitted(program.model.apply, (program.variables, *program.args))


def bfloat16(program: Program) -> Jitted:
    """All floats in bfloat16, the model as it is."""

    def cast(a: Any) -> Any:
        floats = jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)
        return jnp.asarray(a, jnp.bfloat16) if floats else a

    return Jitted(program.model.apply, jax.tree.map(cast, (program.variables, *program.args)))


def by(recipe: jq.Recipe, *, calibrated: bool = False) -> Contender:
    """The model quantized by a recipe."""

    def make(program: Program) -> Jitted:
        batches = program.samples if calibrated else None
        args = () if calibrated else program.args
        apply = program.model.apply
        qvariables, _ = jq.ptq(
            apply, program.variables, recipe, *args, batches=batches, progress=False
        )
        return Jitted(jq.quantized(apply), (qvariables, *program.args))

    return make


def qwix(**settings: Any) -> Contender:
    """The model quantized by Qwix; layers that it refuses leave it out."""

    def make(program: Program) -> Jitted | None:
        import qwix

        rule = qwix.QuantizationRule(module_path=".*", **settings)
        model = qwix.quantize_model(program.model, qwix.PtqProvider([rule]))
        abstract = jax.eval_shape(model.init, jax.random.key(0), *program.args)
        params = qwix.quantize_params(program.variables["params"], abstract["params"])
        return Jitted(model.apply, ({"params": params}, *program.args))

    return make


def _palette() -> jq.Recipe:
    return jq.Recipe([jq.Rule("**", weights=jq.palette(4), encoder=jq.kmeans())])


FORMATS: dict[str, Contender] = {
    "float32": plain,
    "bfloat16": bfloat16,
    "w8a8": by(jq.w8a8()),
    "w8a8 float attention": by(jq.w8a8(attention=False)),
    "w8a8 static": by(jq.w8a8_static(), calibrated=True),
    "integer": by(jq.w8a8_integer(), calibrated=True),
    "w8a16": by(jq.w8a16()),
    "w4a8": by(jq.w4a8()),
    "w4a16": by(jq.w4a16()),
    "nf4": by(jq.nf4()),
    "kmeans4": by(_palette()),
}


def _peers() -> dict[str, Contender]:
    """Of what is installed."""
    found: dict[str, Contender] = {}
    if importlib.util.find_spec("qwix"):
        found |= {
            "qwix w8a8": qwix(weight_qtype="int8", act_qtype="int8"),
            "qwix w8a16": qwix(weight_qtype="int8"),
            "qwix w4a8": qwix(weight_qtype="int4", act_qtype="int8", tile_size=128),
            "qwix w4a16": qwix(weight_qtype="int4", tile_size=128),
        }
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        from benchmarks.suite import onnx_peer

        found |= onnx_peer.CONTENDERS
    if importlib.util.find_spec("torchao"):
        from benchmarks.suite import torch_peer

        found |= torch_peer.CONTENDERS
    return found


def chosen(globs: str) -> dict[str, Contender]:
    """The contenders that comma-separated globs match, float32 first.

    Raises:
      ValueError: a glob matches nothing.
    """
    known = FORMATS | _peers()
    wanted = [glob.strip() for glob in globs.split(",")]
    for glob in wanted:
        if not fnmatch.filter(known, glob):
            raise ValueError(f"no format matches {glob!r}; there are {', '.join(known)}")
    wanted = ["float32", *wanted]
    return {n: c for n, c in known.items() if any(fnmatch.fnmatch(n, g) for g in wanted)}
