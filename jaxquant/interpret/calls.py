"""A call of any function as a jaxpr: its traced arguments and the paths of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from jaxquant.interpret import _compat
from jaxquant.interpret.evaluate import Interpreter, abstract
from jaxquant.interpret.sites import path_str
from jaxquant.interpret.values import Facts, Origin, Value
from jaxquant.qtensor import dequantize, is_fake_quant, is_qtensor

STATIC = (bool, int, float, complex, str, bytes)


def is_traced(leaf: Any) -> bool:
    """Whether an argument's leaf is traced: arrays are, Python values stay static."""
    if is_qtensor(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return True
    return isinstance(leaf, jax.ShapeDtypeStruct) or (
        not isinstance(leaf, STATIC) and hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """`fn(params, *args, **kwargs)` traced with float stand-ins.

    Attributes:
      jaxpr: the open jaxpr.
      consts: its constants, including outer tracers that `fn` closes over.
      leaves: data of the traced leaves, including `QTensor`s.
      paths: key path of each leaf that belongs to `params`, `None` for inputs.
      out_tree: structure of the result.
    """

    jaxpr: Any
    consts: list[Any]
    leaves: list[Any]
    paths: list[str | None]
    out_tree: Any

    def values(self, leaves: list[Any] | None = None) -> list[Value]:
        """The leaves with their facts: parameters have an origin, inputs are live."""
        out = []
        for leaf, path in zip(self.leaves if leaves is None else leaves, self.paths, strict=True):
            aval = leaf if is_qtensor(leaf) else jax.typeof(leaf)
            if path is None:
                out.append(Value(leaf, Facts(live=True)))
            elif jax.dtypes.issubdtype(aval.dtype, np.floating) or is_qtensor(leaf):
                shape = tuple(aval.shape)
                axes = tuple((a,) for a in range(len(shape)))
                out.append(Value(leaf, Facts(Origin(path, shape, str(aval.dtype), axes))))
            else:
                out.append(Value(leaf))
        return out

    def run(self, interpreter: Interpreter, leaves: list[Any] | None = None) -> Any:
        """Evaluates the call and returns `fn`'s result."""
        out = interpreter.run(self.jaxpr, self.consts, self.values(leaves), ())
        out = [interpreter.in_float(v, (), None, "results are floats") for v in out]
        return jax.tree.unflatten(self.out_tree, [self._result(v) for v in out])

    def with_params(self, params: list[Any]) -> Call:
        """The call with its parameter leaves replaced by those of `params`, in order."""
        traced = iter(leaf for leaf in params if is_traced(leaf))
        leaves = [
            leaf if path is None else next(traced)
            for leaf, path in zip(self.leaves, self.paths, strict=True)
        ]
        return dataclasses.replace(self, leaves=leaves)

    def _result(self, value: Value) -> Any:
        """Returns unmoved parameters as they are, and dequantizes rows and slices of them."""
        if not is_qtensor(value.data):
            return value.data
        origin = value.facts.origin
        if origin is None or not origin.moved:
            if is_fake_quant(value.data) and origin is not None:
                return self.leaves[self.paths.index(origin.path)]  # the trained float leaf
            return dequantize(value.data) if value.facts.live else value.data
        return dequantize(value.data)

    @property
    def param_paths(self) -> list[str]:
        """Key paths of the parameters."""
        return [p for p in self.paths if p is not None]


def trace_call(
    fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Call:
    """Traces `fn` once with a float stand-in for every array.

    Raises:
      ValueError: `fn` cannot be traced with `params`, for example a key is missing.
    """
    flat, tree = jax.tree.flatten_with_path(
        ((params, *args), dict(kwargs or {})), is_leaf=is_qtensor
    )
    traced = [is_traced(leaf) for _, leaf in flat]
    # a key path here is (args or kwargs, position, ...): parameters are position 0 of args
    in_params = [
        path[0].idx == 0 and path[1].idx == 0
        if len(path) > 1 and hasattr(path[1], "idx")
        else False
        for path, _ in flat
    ]
    leaves = [leaf for (_, leaf), t in zip(flat, traced, strict=True) if t]
    paths = [
        path_str(path[2:]) if inside else None
        for (path, _), t, inside in zip(flat, traced, in_params, strict=True)
        if t
    ]

    def call(*arrays: Any) -> Any:
        rest = iter(arrays)
        all_leaves = [next(rest) if t else leaf for (_, leaf), t in zip(flat, traced, strict=True)]
        all_args, all_kwargs = jax.tree.unflatten(tree, all_leaves)
        return fn(*all_args, **all_kwargs)

    stand_ins = [abstract(leaf) for leaf in leaves]
    try:
        closed, out_shape = jax.make_jaxpr(call, return_shape=True)(*stand_ins)
    except jax.errors.JAXTypeError:
        raise  # the function reads the value of a tracer: its params are not the cause
    except (KeyError, IndexError, AttributeError, TypeError, FlaxError) as error:
        raise ValueError(
            "the function cannot be traced with these params: "
            f"{type(error).__name__}: {error}. The params' leaves are "
            f"{_listed([p for p in paths if p])}"
        ) from error
    jaxpr, consts = _compat.opened(closed)
    return Call(jaxpr, consts, leaves, paths, jax.tree.structure(out_shape))


def _listed(names: list[str], most: int = 20) -> str:
    """The first `most` names, and the number of the others."""
    more = len(names) - most
    return (", ".join(names[:most]) or "none") + (f" and {more} more" if more > 0 else "")
