"""What a quantized language model loses and saves: perplexity, bits, seconds, memory; the table."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

import jaxquant as jq
from jaxquant.report import Report

BATCH = 4  # windows at a time: their logits, 49,152 wide, are what takes memory

Apply = Callable[..., Any]  # (variables, tokens [batch, time]) -> logits [batch, time, vocab]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to quantize the model.

    Attributes:
      name: what it is called in the table and by `--methods`.
      scheme: how weights and activations are stored, as the table groups them.
      recipe: what `ptq` is given; `None` is float.
      options: further keywords of `ptq`.
    """

    name: str
    scheme: str
    recipe: jq.Recipe | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text, which `ptq` is then given as batches."""
        rules = self.recipe or ()
        return any(rule.gathers or rule.observer for rule in rules)

    @property
    def weight_only(self) -> bool:
        """Whether contractions are in float, on the very values that the codes stand for."""
        return self.recipe is None or all(
            rule.activations is None and rule.attention is None for rule in self.recipe
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a method.

    `bits` are stored bits for each weight of the layers, scales included; `megabytes` are of the
    whole model. `seconds` are those of `ptq`, compilation included, and `peak` is the most memory,
    in megabytes, that the process held meanwhile. `perplexity` is by the name of a text.
    """

    name: str
    scheme: str
    bits: float
    megabytes: float
    seconds: float
    peak: float
    perplexity: dict[str, float]
    evaluation: float = 0.0


def perplexity(
    apply: Apply,
    variables: Any,
    windows: np.ndarray,
    step: Callable[[], Any] = lambda: None,
    batch: int = BATCH,
) -> float:
    """`exp` of the mean of `-log p(token | those before it)` over windows [n, length].

    The first token of a window is given; nothing from before the window is seen. `step` is called
    for each batch.
    """
    total = 0.0
    for start in range(0, len(windows), batch):
        given = windows[start : start + batch]
        filled = given[np.minimum(np.arange(batch), len(given) - 1)]  # one shape, compiled once
        total += float(np.sum(np.asarray(apply(variables, filled), np.float64)[: len(given)]))
        step()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def losses(fn: Apply) -> Apply:
    """The jitted function `(variables, tokens [batch, time]) -> -log p`, summed, [batch]."""

    def found(variables: Any, tokens: jax.Array) -> jax.Array:
        logits = fn(variables, tokens)[:, :-1]
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen, axis=-1)

    return jax.jit(found)


def measure(
    method: Method,
    fn: Apply,
    variables: Any,
    measured: Mapping[str, np.ndarray],
    calibration: np.ndarray,
    *,
    integer: bool = False,
    step: Callable[[], Any] = lambda: None,
) -> tuple[Row, Report | None]:
    """The row of one method on the windows of each text.

    A method that quantizes weights only is measured by the float program on what its codes stand
    for, which is what `quantized(fn)` computes but for the order of sums; `integer` has
    `quantized(fn)` itself do it.
    """
    forget_peak()
    start = time.perf_counter()
    qvariables, report = quantize(method, fn, variables, calibration)
    jax.block_until_ready(qvariables)
    seconds = time.perf_counter() - start
    peak = peak_megabytes()
    bits, megabytes = stored(qvariables)
    start = time.perf_counter()
    as_float = method.recipe is None or (method.weight_only and not integer)
    if as_float:
        qvariables = jq.dequantize_params(qvariables)
    loss = losses(fn if as_float else jq.quantized(fn))
    found = {name: perplexity(loss, qvariables, w, step) for name, w in measured.items()}
    evaluation = time.perf_counter() - start
    row = Row(method.name, method.scheme, bits, megabytes, seconds, peak, found, evaluation)
    return row, report


def quantize(
    method: Method, fn: Apply, variables: Any, calibration: np.ndarray
) -> tuple[Any, Report | None]:
    """The quantized variables, and the report of it (none of the float ones)."""
    if method.recipe is None:
        return variables, None
    given = dict(method.options)
    if method.calibrates:
        count = len(calibration) // BATCH * BATCH
        given["batches"] = [calibration[i : i + BATCH] for i in range(0, count, BATCH)]
    tokens = jax.ShapeDtypeStruct((BATCH, calibration.shape[-1]), jnp.int32)
    return jq.ptq(fn, variables, method.recipe, tokens, **given)


def stored(variables: Any) -> tuple[float, float]:
    """Bits of each weight of the layers' matrices, and megabytes of everything.

    The bytes are those of the arrays that are kept: codes, padding among them, and scales.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        variables, is_leaf=lambda x: isinstance(x, jq.QTensor)
    )
    sizes = [(jax.tree_util.keystr(path), leaf.size, tree_bytes(leaf)) for path, leaf in leaves]
    layers = [(n, b) for path, n, b in sizes if re.search("block.*kernel", path)]
    weights, kept = (sum(column) for column in zip(*layers, strict=True))
    return 8 * kept / weights, sum(b for _, _, b in sizes) / 1e6


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays in a pytree, a 4-bit one's elements counted as half a byte each."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8 for leaf in leaves)


def forget_peak() -> None:
    """Lets the peak of memory begin anew, where Linux allows it."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then the process's since its start: no smaller


def peak_megabytes() -> float:
    """The most memory that this process has held resident, in megabytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage would count in what the parent held when it forked
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """The rows as a table of at most 100 columns; the first row is float."""
    found = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        caption_style="dim",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    found.add_column("scheme", style="dim", no_wrap=True)
    found.add_column("method", style="bold", no_wrap=True)
    first = rows[0]
    for text in first.perplexity:
        found.add_column(text, justify="right", no_wrap=True)
        found.add_column("ratio", justify="right", no_wrap=True)
    for header in ("bits a\nweight", "all\nMB", "time\ns", "peak\nGB"):
        found.add_column(header, justify="right", no_wrap=True)
    before = first.scheme
    for row in rows:
        if row.scheme != before:
            found.add_section()
        figures = []
        for text, value in row.perplexity.items():
            figures += [_short(value), _short(value / first.perplexity[text], 3)]
        found.add_row(
            "" if row.scheme == before and row is not first else row.scheme,
            row.name,
            *figures,
            f"{row.bits:.2f}",
            f"{row.megabytes:.0f}",
            "" if row is first else f"{row.seconds:.1f}",
            f"{row.peak / 1e3:.2f}",
        )
        before = row.scheme
    return found


def _short(value: float, digits: int = 2) -> str:
    """A figure that may be very large."""
    return f"{value:.{digits}f}" if value < 1e3 else f"{value:.1e}"
