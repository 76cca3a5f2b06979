"""The equations of integer inference in NumPy, int64 and float32; nothing here is jaxquant's.

Arrays of the quantized params are read as `QTensor` documents them, everything else is done anew.
"""

import dataclasses
import itertools
import math

import numpy as np

F32 = np.float32
LIMITS = {"int8": (-128, 127), "uint8": (-128, 127), "int4": (-8, 7)}


def high_mul(a: int, b: int) -> int:
    """gemmlowp's SaturatingRoundingDoublingHighMul."""
    if a == b == -(2**31):
        return 2**31 - 1
    product = a * b
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    return nudged // 2**31 if nudged >= 0 else -(-nudged // 2**31)  # C divides towards zero


def divide_by_power(x: int, exponent: int) -> int:
    """gemmlowp's RoundingDivideByPOT."""
    mask = (1 << exponent) - 1
    return (x >> exponent) + int((x & mask) > (mask >> 1) + int(x < 0))


def quantized_multiplier(scale: float) -> tuple[int, int]:
    """TFLite's QuantizeMultiplier: `scale = multiplier 2^-31 2^-shift`."""
    if scale == 0:
        return 0, 0
    mantissa, exponent = math.frexp(float(scale))
    return round(mantissa * 2**31), -exponent


def multiply_by(x: int, multiplier: int, shift: int) -> int:
    """TFLite's MultiplyByQuantizedMultiplier; a left shift saturates."""
    moved = min(max(x << max(-shift, 0), -(2**31)), 2**31 - 1)
    return divide_by_power(high_mul(moved, multiplier), max(shift, 0))


def rescaled(total, multiplier, mode: str, bits: int = 0):
    """`round(total multiplier 2^bits)`, int64; `multiplier` is float32."""
    total, multiplier = np.broadcast_arrays(np.asarray(total), np.asarray(multiplier, F32))
    if mode == "float32":
        return np.round(total.astype(F32) * (multiplier * F32(2.0**bits))).astype(np.int64)
    pairs = {m: quantized_multiplier(m) for m in set(multiplier.ravel().tolist())}
    out = [
        multiply_by(int(t), pairs[m][0], pairs[m][1] - bits)
        for t, m in zip(total.ravel().tolist(), multiplier.ravel().tolist(), strict=True)
    ]
    return np.array(out, np.int64).reshape(total.shape)


def dense(x, w, numbers: str):
    """A contraction of int64 arrays, `numbers` as of an einsum."""
    assert x.dtype == w.dtype == np.int64
    return np.einsum(numbers, x, w)


def conv(x, w, strides, padding, numbers, lhs_dilation=None, rhs_dilation=None, groups=1):
    """A convolution of int64 arrays, one position of the result after the other."""
    image, kernel, out = numbers
    space = [c for c in image if c not in "NC"]
    x = x.transpose([image.index(c) for c in ("N", "C", *space)])
    w = w.transpose([kernel.index(c) for c in ("O", "I", *space)])
    rank = len(space)
    apart, dilation = lhs_dilation or (1,) * rank, rhs_dilation or (1,) * rank
    size = [(n - 1) * d + 1 for n, d in zip(x.shape[2:], apart, strict=True)]
    wide = np.zeros((*x.shape[:2], *size), np.int64)
    wide[(slice(None), slice(None), *(slice(None, None, d) for d in apart))] = x
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation, strict=True)]
    if padding == "VALID":
        padding = [(0, 0)] * rank
    elif padding == "SAME":
        lack = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, s, r in zip(x.shape[2:], strides, reach, strict=True)
        ]
        padding = [(n // 2, n - n // 2) for n in lack]
    wide = np.pad(wide, [(0, 0), (0, 0), *padding])  # zeros: zero points are taken off already
    steps = [(n - r) // s + 1 for n, r, s in zip(wide.shape[2:], reach, strides, strict=True)]
    inputs, outputs = w.shape[1], w.shape[0] // groups
    y = np.zeros((x.shape[0], w.shape[0], *steps), np.int64)
    for at in itertools.product(*(range(n) for n in steps)):
        for tap in itertools.product(*(range(k) for k in w.shape[2:])):
            here = tuple(
                a * s + t * d for a, s, t, d in zip(at, strides, tap, dilation, strict=True)
            )
            for g in range(groups):
                own = slice(g * outputs, (g + 1) * outputs)
                values = wide[(slice(None), slice(g * inputs, (g + 1) * inputs), *here)]
                y[(slice(None), own, *at)] += values @ w[(own, slice(None), *tap)].T
    return y.transpose([("N", "C", *space).index(c) for c in out])


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values `scale (q - zero)`."""

    scale: np.float32
    zero: int
    low: int
    high: int

    def code(self, x):
        """Codes of floats, by the reciprocal, which XLA takes for some quotients by a scalar."""
        v = np.round(np.asarray(x).astype(F32) * (F32(1) / self.scale)) + F32(self.zero)
        return np.clip(v, self.low, self.high).astype(np.int64)

    def whole(self, codes):
        """`q - zero`."""
        return codes - self.zero

    def clip(self, steps):
        """Codes of a number of steps from zero."""
        return np.clip(steps + self.zero, self.low, self.high)

    def relu(self, codes, most=None):
        """Codes of `max(x, 0)`, or of that and at most `most`."""
        codes = np.maximum(codes, self.code(F32(0)))
        return codes if most is None else np.minimum(codes, self.code(F32(most)))

    def floats(self, codes):
        """What codes stand for."""
        return self.whole(codes).astype(F32) * self.scale


def grid(held, spec) -> Grid | None:
    """A calibrated grid as numbers."""
    if held is None:
        return None
    zero = 0 if held.zero_point is None else int(held.zero_point)
    return Grid(F32(np.asarray(held.scale)), zero, *LIMITS[spec.format.name])


def _whole(q, stored):
    """From storage order to the array's own."""
    stored = stored[tuple(slice(0, n) for n in q.storage)]
    order = [a % len(q.core) for merged in q.axes for a in merged]
    return stored.reshape([q.core[a] for a in order]).transpose(np.argsort(order))


def _stored_codes(q):
    """Codes in storage order: bytes, or tiles of which each holds planes of 4, 2 and 1 bits."""
    codes, bits = np.asarray(q.codes), q.spec.format.bits
    if bits == 8:
        return codes.astype(np.int64)
    size = 8 * codes.shape[-1] // bits
    tile = next(t for t in (64, 32, 16, 8) if size % t == 0)
    tiles = codes.reshape(*codes.shape[:-1], size // tile, tile * bits // 8).astype(np.int64)
    out, start, left = np.zeros((*tiles.shape[:-1], tile), np.int64), 0, bits
    for width in (n for n in (4, 2, 1) if bits & n):
        stop, left = start + tile * width // 8, left - width
        turns = [tiles[..., start:stop] >> shift for shift in range(0, 8, width)]
        out |= (np.concatenate(turns, axis=-1) & (2**width - 1)) << left
        start = stop
    out = out.reshape(*codes.shape[:-1], size)
    return np.where(out >= 2 ** (bits - 1), out - 2**bits, out) if q.spec.format.signed else out


@dataclasses.dataclass(frozen=True)
class Layer:
    """What of a quantized parameter enters the equations.

    Attributes:
      w: int64 `q_w - Z_w`, in the array's own order.
      scale: float32 `S_w`, of the same shape.
      x: grid of its input.
      y: grid of what takes its results; `None` where they become float.
      mode: how results are requantized.
    """

    w: np.ndarray
    scale: np.ndarray
    x: Grid
    y: Grid | None
    mode: str


def layer(q, taker=None) -> Layer:
    """Reads a quantized parameter; `taker` is the one that takes its results."""

    def spread(a):
        for axis, block in enumerate(q.blocks):
            a = np.repeat(a, block, axis=axis)
        return _whole(q, a)

    codes = _whole(q, _stored_codes(q))
    zero = 0 if q.zero_point is None else spread(np.asarray(q.zero_point).astype(np.int64))
    to = None if taker is None else grid(q.calibration.output, taker.contraction.activations)
    return Layer(
        codes - zero,
        spread(np.asarray(q.scale).astype(F32)),
        grid(q.calibration.input, q.contraction.activations),
        to,
        q.contraction.requantize,
    )


@dataclasses.dataclass(frozen=True)
class Sums:
    """`unit total`: int64 sums with the bias in, and float32 units that broadcast with them."""

    total: np.ndarray
    unit: np.ndarray
    layer: Layer

    @property
    def multiplier(self):
        """From sums to steps of the output grid."""
        return self.unit / self.layer.y.scale

    def floats(self):
        """The last layer's result."""
        return self.total.astype(F32) * self.unit

    def codes(self):
        """Requantized."""
        return self.layer.y.clip(rescaled(self.total, self.multiplier, self.layer.mode))

    def fine(self):
        """Steps of the output grid with 12 bits after the point."""
        return fine(self.total, self.multiplier, self.layer.mode)

    def plus(self, other):
        """The codes of a sum of two results on the output grid."""
        return self.layer.y.clip((self.fine() + other + 2048) >> 12)


def fine(total, multiplier, mode):
    """Steps of a grid with 12 bits after the point."""
    return np.clip(rescaled(total, multiplier, mode, 12), -(2**24), 2**24)


def result(at: Layer, total, scale, bias=None, gain=None) -> Sums:
    """Sums with a bias, all of it times a gain before: `gain S total + bias`."""
    unit = scale * at.x.scale
    if gain is not None:
        unit = unit * np.asarray(gain, F32)
    if bias is not None:
        total = total + np.round(np.asarray(bias, F32) / unit).astype(np.int64)
    return Sums(total, unit, at)
