"""Small networks, each as a JAX function and as the integer equations it has to become."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant as jq
from tests.arrays import normal
from tests.ops import integer_reference as ref

TENSOR = jq.PerTensor()
WEIGHTS = {
    "int8": jq.int8(),
    "int8 tensor": jq.int8(granularity=TENSOR),
    "int8 asymmetric": jq.int8(symmetric=False),
    "uint8 asymmetric": jq.uint8(granularity=TENSOR),
    "int4": jq.int4(),
    "int8 signed": jq.int8(range="signed"),
}
ACTIVATIONS = {
    "int8": jq.int8(granularity=TENSOR),
    "int8 asymmetric": jq.int8(symmetric=False, granularity=TENSOR),
    "uint8 asymmetric": jq.uint8(granularity=TENSOR),
}
MODES = ("float32", "fixed_point")


def spread(*shapes: tuple[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Weights and biases of layers named so; a bias is a vector named `<layer>_b`."""
    out = {}
    for n, (name, shape) in enumerate(shapes):
        w = np.random.default_rng(n + 10).standard_normal(shape)
        w = w / np.sqrt(max(np.prod(shape[:-1]), 1)) + 0.05
        out[name] = jax.device_put(w.astype(np.float32))
    return out


@dataclasses.dataclass(frozen=True)
class Network:
    """A function, its params and input, and its layers in order with what takes their results.

    `expected(layers, params, x)` gives the float result by the equations.
    """

    fn: Callable[..., Any]
    expected: Callable[..., Any]
    params: dict[str, Any]
    x: jax.Array
    takers: dict[str, str | None]
    start: int  # which of the pairs of weights and activations its first layer has

    def recipe(self) -> list[jq.Rule]:
        """Each layer has weights, activations and a way to requantize of its own."""
        names, rules = list(self.takers), []
        for n, name in enumerate(names):
            at = n + self.start
            weights = list(WEIGHTS)[at % 6]
            same = n - (name == "short")  # takes what the layer before takes
            activations = list(ACTIVATIONS)[(same + self.start) // 6]
            rules.append(rule(name, weights, activations, MODES[n % 2]))
        return rules

    def quantized(self, rules: Any) -> tuple[Any, Any]:
        batches = [self.x, np.float32(0.75) * np.asarray(self.x)]
        return jq.ptq(self.fn, self.params, rules, batches=batches)

    def layers(self, qparams: Any) -> dict[str, ref.Layer]:
        return {
            name: ref.layer(qparams[name], None if to is None else qparams[to])
            for name, to in self.takers.items()
        }


def chain(*names: str) -> dict[str, str | None]:
    """Layers of which each takes the results of the one before."""
    return dict(zip(names, (*names[1:], None), strict=True))


def rule(name: str, weights: str, activations: str, mode: str) -> jq.Rule:
    return jq.Rule(
        name,
        weights=WEIGHTS[weights],
        activations=ACTIVATIONS[activations],
        observer=jq.observers.minmax(),
        requantize=mode,
    )


relu, relu6 = jax.nn.relu, jax.nn.relu6
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def _conv_sums(at: ref.Layer, codes: Any, numbers: Any, bias: Any = None, **how: Any) -> ref.Sums:
    """A convolution by the equations; `bias` is a vector over the channels."""
    total = ref.conv(at.x.whole(codes), at.w, numbers=numbers, **how)
    kernel, out = numbers[1], numbers[2]
    others = tuple(a for a, c in enumerate(kernel) if c != "O")
    shape = [-1 if c == "C" else 1 for c in out]
    scale = at.scale.min(axis=others).reshape(shape)
    assert (at.scale.max(axis=others).reshape(shape) == scale).all()
    return ref.result(at, total, scale, None if bias is None else np.asarray(bias).reshape(shape))


def _dense_sums(at: ref.Layer, codes: Any, numbers: str, bias: Any = None, gain: Any = None) -> Any:
    total = ref.dense(at.x.whole(codes), at.w, numbers)
    kernel, out = numbers.partition("->")[0].split(",")[1], numbers.partition("->")[2]
    others = tuple(a for a, c in enumerate(kernel) if c not in out)
    scale = at.scale.min(axis=others)  # [*kept], in the kernel's order
    kept = [c for c in kernel if c in out]
    scale = scale.transpose(sorted(range(len(kept)), key=lambda a: out.index(kept[a])))
    shape = [n if c in kept else 1 for c, n in zip(out, total.shape, strict=True)]
    return ref.result(at, total, scale.reshape(shape), bias, gain)


# Convolutions, channels last: strided, padded in all ways, grouped, depthwise, dilated; max pooling
# and both kinds of residual addition.

_SAME = {"strides": (1, 1), "padding": "SAME"}
_DOWN = {"strides": (2, 2), "padding": "SAME"}
_UNEVEN = {"strides": (1, 2), "padding": ((2, 1), (0, 3)), "rhs_dilation": (2, 1)}
_VALID = {"strides": (2, 1), "padding": "VALID"}


def _conv(x, w, numbers=NHWC, groups=1, *, strides, padding, **how):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, feature_group_count=groups, **how
    )


def _plus(x, b, axis=-1):
    """A bias along the axes that end with `axis`."""
    last = axis % x.ndim
    return x + jnp.expand_dims(b, [a for a in range(x.ndim) if not last - b.ndim < a <= last])


def _images(p, x):
    x = relu(_plus(_conv(x, p["same"], **_SAME), p["same_b"]))
    x = relu6(_plus(_conv(x, p["down"], **_DOWN), p["down_b"]))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
    x = relu(_conv(x, p["depthwise"], groups=4, **_SAME))
    x = relu(x + _plus(_conv(x, p["grouped"], groups=2, **_SAME), p["grouped_b"]))
    a = _plus(_conv(x, p["uneven"], **_UNEVEN), p["uneven_b"])
    b = _conv(x, p["short"], strides=(1, 2), padding=((0, 0), (0, 2)))
    x = relu(a + b)
    x = relu(_plus(_conv(x, p["double"], groups=6, **_VALID), p["double_b"]))
    x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
    return _plus(x @ p["last"], p["last_b"])


def _pooled(x):
    parts = [x[:, i : x.shape[1] - 1 + i, j : x.shape[2] - 1 + j] for i in (0, 1) for j in (0, 1)]
    return np.max(parts, axis=0)


def _images_expected(at, p, x):
    q = at["same"].x.code(x)
    q = at["same"].y.relu(_conv_sums(at["same"], q, NHWC, p["same_b"], **_SAME).codes())
    q = at["down"].y.relu(_conv_sums(at["down"], q, NHWC, p["down_b"], **_DOWN).codes(), 6)
    q = _pooled(q)
    q = at["depthwise"].y.relu(_conv_sums(at["depthwise"], q, NHWC, groups=4, **_SAME).codes())
    sums = _conv_sums(at["grouped"], q, NHWC, p["grouped_b"], groups=2, **_SAME)
    here, to = at["grouped"].x, at["grouped"].y
    q = sums.plus(ref.fine(here.whole(q), here.scale / to.scale, at["grouped"].mode))
    q = to.relu(q)
    a = _conv_sums(at["uneven"], q, NHWC, p["uneven_b"], **_UNEVEN)
    b = _conv_sums(at["short"], q, NHWC, strides=(1, 2), padding=((0, 0), (0, 2)))
    q = at["uneven"].y.relu(a.plus(b.fine()))
    sums = _conv_sums(at["double"], q, NHWC, p["double_b"], groups=6, **_VALID)
    q = at["double"].y.relu(sums.codes())
    q = q.transpose(0, 3, 1, 2).reshape(len(q), -1)
    return _dense_sums(at["last"], q, "nk,ko->no", p["last_b"]).floats()


IMAGES = Network(
    _images,
    _images_expected,
    spread(
        *(("same", (3, 3, 3, 6)), ("same_b", (6,)), ("down", (3, 3, 6, 4)), ("down_b", (4,))),
        *(("depthwise", (3, 3, 1, 4)), ("grouped", (3, 3, 2, 4)), ("grouped_b", (4,))),
        *(("uneven", (3, 2, 4, 6)), ("uneven_b", (6,)), ("short", (2, 1, 4, 6))),
        *(("double", (2, 2, 1, 12)), ("double_b", (12,)), ("last", (24, 5)), ("last_b", (5,))),
    ),
    normal(1, 2, 8, 7, 3),
    chain("same", "down", "depthwise", "grouped", "uneven", "short", "double", "last")
    | {"uneven": "double"},
    start=0,
)


# Convolutions, channels first and in one dimension, transposed ones among them.

_UP = {"strides": (1, 1), "padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 3)}
_WIDE = {"strides": (2, 2), "padding": ((-1, 1), (0, 2)), "rhs_dilation": (2, 1)}
_LINE = {"strides": (2,), "padding": "SAME"}
_ODD = ("HWNC", "IOHW", "CHWN")
_LAST = ("NHC", "HIO", "NHC")


def _signals(p, x):
    x = relu(_plus(_conv(x, p["up"], NCHW, **_UP), p["up_b"], 1))
    x = relu6(_conv(x, p["wide"], NCHW, **_WIDE))
    x = jnp.transpose(x, (2, 3, 0, 1))
    x = relu(_plus(_conv(x, p["odd"], _ODD, **_SAME), p["odd_b"], 0))
    x = jnp.transpose(x, (3, 1, 2, 0)).reshape(x.shape[3], -1, x.shape[0])
    x = relu(_plus(_conv(x, p["line"], _LAST, 2, **_LINE), p["line_b"]))
    return _plus(jnp.einsum("nhc,oc->nho", x, p["head"]), p["head_b"])


def _signals_expected(at, p, x):
    q = at["up"].x.code(x)
    q = at["up"].y.relu(_conv_sums(at["up"], q, NCHW, p["up_b"], **_UP).codes())
    q = at["wide"].y.relu(_wide(at["wide"], q).codes(), 6)
    q = q.transpose(2, 3, 0, 1)
    sums = _conv_sums(at["odd"], q, _ODD, p["odd_b"], **_SAME)
    q = at["odd"].y.relu(sums.codes())
    q = q.transpose(3, 1, 2, 0).reshape(q.shape[3], -1, q.shape[0])
    sums = _conv_sums(at["line"], q, _LAST, p["line_b"], groups=2, **_LINE)
    q = at["line"].y.relu(sums.codes())
    return _dense_sums(at["head"], q, "nhc,oc->nho", p["head_b"]).floats()


def _wide(at, q):
    """Negative padding cuts the image."""
    return _conv_sums(at, q[:, :, 1:], NCHW, **{**_WIDE, "padding": ((0, 1), (0, 2))})


SIGNALS = Network(
    _signals,
    _signals_expected,
    spread(
        *(("up", (4, 3, 2, 3)), ("up_b", (4,)), ("wide", (6, 4, 2, 3)), ("odd", (6, 4, 1, 2))),
        *(("odd_b", (4,)), ("line", (3, 2, 6)), ("line_b", (6,)), ("head", (5, 6))),
        ("head_b", (5,)),
    ),
    normal(2, 2, 3, 4, 3),
    chain("up", "wide", "odd", "line", "head"),
    start=5,
)


# Dense layers: plain, several kept axes, several contracted ones, transposed kernels; a residual
# addition; a normalisation with fixed statistics.


def _rows(p, x):
    x = relu(_plus(x @ p["plain"], p["plain_b"]))
    x = relu(jnp.einsum("nk,ok->no", x, p["flipped"]))
    x = lax.dot_general(p["left"], x, (((0,), (1,)), ((), ())))
    x = relu(_plus(x, p["left_b"], 0))
    x = x.T
    x = relu(_plus(jnp.einsum("nk,kab->nab", x, p["heads"]), p["heads_b"]))
    y = _plus(jnp.einsum("nab,abo->no", x, p["joined"]), p["joined_b"])
    x = jnp.clip(y, -0.5, 0.75)
    x = x + relu(_plus(x @ p["inner"], p["inner_b"])) @ p["outer"]
    x = _plus(_plus(x @ p["normal"], -p["mean"]) * p["gain"][None], p["normal_b"])
    return relu(x) @ p["last"]


def _rows_expected(at, p, x):
    q = at["plain"].x.code(x)
    q = at["plain"].y.relu(_dense_sums(at["plain"], q, "nk,ko->no", p["plain_b"]).codes())
    q = at["flipped"].y.relu(_dense_sums(at["flipped"], q, "nk,ok->no").codes())
    bias = np.asarray(p["left_b"])[:, None]
    q = at["left"].y.relu(_dense_sums(at["left"], q, "nk,ko->on", bias).codes()).T
    q = at["heads"].y.relu(_dense_sums(at["heads"], q, "nk,kab->nab", p["heads_b"]).codes())
    q = _dense_sums(at["joined"], q, "nab,abo->no", p["joined_b"]).codes()
    to = at["joined"].y
    q = np.clip(q, to.code(ref.F32(-0.5)), to.code(ref.F32(0.75)))
    r = at["inner"].y.relu(_dense_sums(at["inner"], q, "nk,ko->no", p["inner_b"]).codes())
    sums = _dense_sums(at["outer"], r, "nk,ko->no")
    q = sums.plus(ref.fine(to.whole(q), to.scale / at["outer"].y.scale, at["outer"].mode))
    mean, gain, bias = (np.asarray(p[n]) for n in ("mean", "gain", "normal_b"))
    sums = _dense_sums(at["normal"], q, "nk,ko->no", -mean * gain + bias, gain)
    return _dense_sums(at["last"], at["normal"].y.relu(sums.codes()), "nk,ko->no").floats()


ROWS = Network(
    _rows,
    _rows_expected,
    spread(
        *(("plain", (12, 10)), ("plain_b", (10,)), ("flipped", (9, 10)), ("left", (9, 7))),
        *(("left_b", (7,)), ("heads", (7, 3, 4)), ("heads_b", (3, 4)), ("joined", (3, 4, 8))),
        *(("joined_b", (8,)), ("inner", (8, 11)), ("inner_b", (11,)), ("outer", (11, 8))),
        *(("normal", (8, 9)), ("mean", (9,)), ("gain", (9,)), ("normal_b", (9,)), ("last", (9, 5))),
    ),
    normal(3, 6, 12),
    chain(
        *("plain", "flipped", "left", "heads", "joined", "inner", "outer", "normal", "last"),
    ),
    start=9,
)
NETWORKS = {"images": IMAGES, "signals": SIGNALS, "rows": ROWS}


@functools.cache
def made(name: str) -> tuple[Any, Any]:
    """Quantized params and the report of a network, each layer with rules of its own."""
    network = NETWORKS[name]
    return network.quantized(network.recipe())
