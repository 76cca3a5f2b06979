"""The papers' formulas in NumPy, value by value and in float64, and the tables they are held to."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec
from jaxquant.numerics import codebook_format
from tests import reference

SHAPE = (6, 10)
GRANULARITIES = [
    PerTensor(),
    PerChannel(1),
    PerGroup(4, 0),  # uneven: 6 = 4 + 2
    PerBlock(4, 3),  # uneven along both axes
]
BITS = (2, 3, 4, 5, 6, 7, 8, 16)
TERNARY = codebook_format([-0.5, 0.0, 0.25, 1.0], name="uneven")
FORMATS: list[tuple[object, bool]] = [
    *((f"{u}int{b}", True) for u in ("", "u") for b in BITS),
    *((f"{u}int{b}", False) for u in ("", "u") for b in (2, 4, 8)),
    *((name, True) for name in ("float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float4_e2m1fn")),
    *((name, True) for name in ("nf4", "mxfp4", "nvfp4", TERNARY)),
]


def spec_of(name, granularity, symmetric=True, **more) -> QSpec:
    return QSpec(name, granularity, symmetric, **more)


def label(spec: QSpec) -> str:
    return f"{spec.format.name}-{'sym' if spec.symmetric else 'asym'}-{spec.granularity}"


def table(shift: int, *, odd: bool = True) -> list[QSpec]:
    """Every format, each with another granularity than under the next shift.

    Args:
      shift: where in the granularities it begins.
      odd: whether integers of 3, 5, 6 and 7 bits are there.
    """
    skipped = () if odd else tuple(f"{u}int{b}" for u in ("", "u") for b in (3, 5, 6, 7))
    formats = [f for f in FORMATS if f[0] not in skipped]
    granularities = itertools.islice(itertools.cycle(GRANULARITIES), shift, None)
    return [
        spec_of(f, g, symmetric) for (f, symmetric), g in zip(formats, granularities, strict=False)
    ]


def asymmetric(shift: int) -> list[QSpec]:
    """Every asymmetric format of `table`, and some symmetric ones."""
    some = ("int4", "uint4", "float8_e4m3fn", "nf4")
    return [s for s in table(shift, odd=False) if not s.symmetric or s.format.name in some]


def few() -> list[QSpec]:
    """One format of each kind, over all granularities between them."""
    return [
        spec_of("int4", PerGroup(4, 0)),
        spec_of("uint8", PerChannel(1), False),
        spec_of("nvfp4", PerBlock(4, 3)),
        spec_of("nf4", PerTensor()),
    ]


def normal(shape=SHAPE, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def values_of(spec: QSpec) -> np.ndarray:
    """All values of a spec's format, unscaled, ascending."""
    if spec.format == TERNARY:
        return np.array(TERNARY.codebook)
    return reference.grid(spec.format.name)


@functools.cache
def groups_of(shape, granularity) -> np.ndarray:
    """For every value, the flat index of its scale in `QTensor.scale`, stored as `trained` does.

    Read off a tensor whose codes are all 1 and whose scales count.
    """
    q = jq.quantize(jnp.ones(shape), QSpec("int8", granularity), storage_last_axes=(0,))
    count = np.arange(q.scale.size, dtype=np.float32).reshape(q.scale.shape)
    q = dataclasses.replace(q, codes=jnp.ones_like(q.codes), scale=jnp.asarray(count))
    index = np.asarray(jq.dequantize(q)).astype(int)
    shared = reference.sharing(shape, granularity)
    assert (
        len({*zip(index.flat, shared.flat, strict=True)}) == len(np.unique(shared)) == q.scale.size
    )
    return index


def stored(steps: np.ndarray, spec: QSpec) -> np.ndarray:
    """Steps as the spec stores its scales, float64."""
    if spec.scale_dtype == "float8_e8m0fnu":
        return np.exp2(np.ceil(np.log2(steps.astype(np.float64))))
    if spec.global_scale:
        total = np.float32(steps.max()) / np.float32(448)
        kept = (steps.astype(np.float32) / total).astype(ml_dtypes.float8_e4m3fn)
        return kept.astype(np.float64) * np.float64(total)
    return steps.astype(np.float64)


def nearest(v: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values nearest to `v`; what is beyond the ends takes them."""
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, v)]


def clear(v: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where float32 cannot round `v` otherwise than float64: nowhere near a tie or an end."""
    bounds = np.r_[(values[1:] + values[:-1]) / 2, values[[0, -1]]]
    gap = np.abs(v[..., None] - bounds).min(axis=-1)
    sure = gap > 2.0**-22 * (np.abs(v) + 1.0)
    assert sure.mean() > 0.9
    return sure


def summed(each: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sums over what shares a step."""
    out = np.zeros(groups.max() + 1)
    np.add.at(out, groups, each)
    return out


def bound(each: np.ndarray, v: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How far float32 may be from such sums: `eps` of each term and of `v`, for each addition."""
    terms = np.abs(each) + np.abs(v) + 1.0
    return np.finfo(np.float32).eps * each.size * summed(terms, groups)


def trained(estimator, spec, w, learned, g):
    """Codes, values and gradients of a weight."""
    w, g = jnp.asarray(w), jnp.asarray(g)

    def values(w, learned):
        q = estimator.encode(w, learned, spec, storage_last_axes=(0,))
        return estimator.values(w, learned, q), q

    y, pull, q = jax.vjp(values, w, learned, has_aux=True)
    return q, y, jq.dequantize(q), pull(g)


compiled = jax.jit(trained, static_argnums=(0, 1))
