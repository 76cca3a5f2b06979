"""k-means against scikit-learn, and contractions with a codebook against float, in one process.

    python benchmarks/kmeans.py            MiniLM's 36 dense kernels, 16 clusters; 2048 x 2048
    python benchmarks/kmeans.py --quick    two small arrays, to see that it runs

Each array is clustered by both in turn, so that what else the machine does falls on both alike.
scikit-learn takes the best of ten starts. The first round of jaxquant's compiles and is told apart.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _interleaved import print_table, ratios
from safetensors.numpy import load_file
from sklearn.cluster import KMeans

import jaxquant as jq

CLUSTERS = 4  # bits
ENCODERS = {"coarse": jq.kmeans(), "exact": jq.kmeans(exact=True)}


def minilm_kernels() -> list[np.ndarray]:
    """The 36 dense kernels of MiniLM-L6, `[inputs, outputs]`."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
    import _data  # fetched or cached, as the examples have it

    tensors = load_file(_data.minilm_files()["model.safetensors"])
    return [
        np.ascontiguousarray(t.T)
        for name, t in tensors.items()
        if "encoder" in name and name.endswith(".weight") and t.ndim == 2
    ]


def inertia(x: np.ndarray, centroids: Any) -> float:
    """`sum_i min_k (x_i - c_k)^2` in float64."""
    x, c = x.astype(np.float64).ravel(), np.sort(np.asarray(centroids, np.float64).ravel())
    return float(((x - c[np.searchsorted((c[1:] + c[:-1]) / 2, x)]) ** 2).sum())


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the seconds it took."""
    start = time.perf_counter()
    return jax.block_until_ready(call()), time.perf_counter() - start


def clustering(arrays: list[np.ndarray], bits: int, starts: int) -> None:
    """Prints seconds and inertia of every encoder relative to scikit-learn's."""
    spec = jq.palette(bits)
    first, again = dict.fromkeys(ENCODERS, 0.0), dict.fromkeys(ENCODERS, 0.0)
    worst = dict.fromkeys(ENCODERS, 0.0)
    peer = 0.0
    for x in arrays:
        model = KMeans(2**bits, n_init=starts, random_state=0)
        _, seconds = timed(lambda m=model, x=x: m.fit(x.reshape(-1, 1)))
        peer += seconds
        own = inertia(x, model.cluster_centers_)
        w = jnp.asarray(x)
        for name, encoder in ENCODERS.items():
            _, seconds = timed(lambda e=encoder, w=w: e(w, spec))
            first[name] += seconds
            (q, _), seconds = timed(lambda e=encoder, w=w: e(w, spec))
            again[name] += seconds
            worst[name] = max(worst[name], inertia(x, q.codebook) / own)
    print(f"{len(arrays)} arrays, {sum(x.size for x in arrays):,} values, {2**bits} clusters: ")
    print(f"scikit-learn, best of {starts}: {peer:.2f} s\n")
    print("| start | s, compiling | times faster | s | times faster | worst inertia / theirs |")
    print("|---" * 6 + "|")
    for name in ENCODERS:
        cells = f"{first[name]:.2f} | {peer / first[name]:.0f} | {again[name]:.2f} | "
        print(f"| {name} | {cells}{peer / again[name]:.0f} | {worst[name]:.4f} |")


def contractions(size: int, rounds: int) -> None:
    """Prints the time of products with a codebook relative to float's."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((size, size)), jnp.float32)
    plain = jax.jit(lambda x, w: x @ w)
    served = jax.jit(jq.quantized(lambda p, x: x @ p))
    whole = jax.jit(lambda x, q: x @ jq.dequantize(q))

    def row(bits: int, rows: int) -> tuple[dict[str, float], float]:
        q, _ = jq.kmeans()(w, jq.palette(bits), storage_last_axes=(0,))
        x = jnp.asarray(rng.standard_normal((rows, size)), jnp.float32)
        calls = {
            "float": lambda: plain(x, w).block_until_ready(),
            "served": lambda: served(q, x).block_until_ready(),
            "dequantized": lambda: whole(x, q).block_until_ready(),
        }
        return ratios(calls, rounds)

    cases = [(bits, rows) for bits in (4, 8) for rows in (1, 16, 256)]
    print_table(
        ("served", "dequantized"),
        (
            (f"palette({bits}), {size} x {size}, {rows} rows", row(bits, rows))
            for bits, rows in cases
        ),
    )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, few rounds")
    options = parser.parse_args()
    if options.quick:
        rng = np.random.default_rng(0)
        clustering([rng.standard_normal((96, 128)).astype(np.float32) for _ in range(2)], 4, 2)
    else:
        clustering(minilm_kernels(), CLUSTERS, 10)
    print()
    contractions(256 if options.quick else 2048, 3 if options.quick else 15)


if __name__ == "__main__":
    main()
