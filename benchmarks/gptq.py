"""Time of GPTQ on one layer, relative to a plain loop over columns in PyTorch.

    python benchmarks/gptq.py                            2048 x 2048, 4096 rows, groups of 128
    python benchmarks/gptq.py --torch-python PATH        PyTorch from another environment
    python benchmarks/gptq.py --quick                    a small case, to see that it runs

PyTorch runs the algorithm as its reference implementation does: `cholesky`, `cholesky_inverse`,
`cholesky` again, blocks of 128 columns, within a block one column after another. It runs in a
process of its own, since two thread pools on the same cores disturb each other, where `torch` can
be imported by the interpreter given; all else is measured without. Both start from `X` and `W` and
end with codes and scales; both find the Hessian themselves. `gptq()` as it comes also orders the
columns and searches the scales. The error is that of the output,
`|X (W - Q)|^2 / |X W|^2`. Seconds of CPU say more than those of the clock where others use the
cores; on one core (`taskset -c 0`) they say what the arithmetic costs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

GROUP, BITS, DAMPING, BLOCK = 128, 4, 0.01, 128


def data_of(width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `[rows, width]` with correlated columns of unlike size, and weights."""
    rng = np.random.default_rng(0)
    spectrum = np.linspace(1.0, 0.05, width)
    mixing = rng.standard_normal((width, width)) / np.sqrt(width)
    x = (rng.standard_normal((rows, width)) * spectrum) @ mixing
    x *= np.exp(0.5 * rng.standard_normal(width))
    w = rng.standard_normal((width, width)) / np.sqrt(width)
    return np.float32(x), np.float32(w)


def output_error(x: np.ndarray, w: np.ndarray, q: np.ndarray) -> float:
    """`|X (W - Q)|^2 / |X W|^2`."""
    return float(np.square(x @ (w - q)).sum() / np.square(x @ w).sum())


def timed(call: Callable[[], Any], times: int) -> tuple[list[float], list[float], Any]:
    """Seconds of each call by the clock and of CPU, and what the last one returned."""
    clock, busy, out = [], [], None
    for _ in range(times):
        start = time.perf_counter(), time.process_time()
        out = call()
        clock.append(time.perf_counter() - start[0])
        busy.append(time.process_time() - start[1])
    return clock, busy, out


def in_torch(x: np.ndarray, w: np.ndarray, rounds: int) -> dict[str, Any]:
    """Seconds and error of a plain implementation, weights `[outputs, inputs]` as there."""
    import torch

    def run() -> torch.Tensor:
        inputs, weights = torch.from_numpy(x), torch.from_numpy(w).t().contiguous().clone()
        columns = weights.shape[1]
        hessian = inputs.t() @ inputs * (2 / len(inputs))
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper = torch.linalg.cholesky(inverse, upper=True)
        out, top = torch.zeros_like(weights), 2 ** (BITS - 1) - 1
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            block = weights[:, start:stop].clone()
            errors, corner = torch.zeros_like(block), upper[start:stop, start:stop]
            for i in range(stop - start):
                if (start + i) % GROUP == 0:
                    amax = block[:, i : i + GROUP].abs().amax(dim=1)
                    scale = torch.where(amax > 0, amax / (top + 0.5), torch.ones_like(amax))
                column = block[:, i]
                q = torch.clamp(torch.round(column / scale), -top - 1, top) * scale
                out[:, start + i] = q
                error = (column - q) / corner[i, i]
                block[:, i:] -= error.unsqueeze(1) @ corner[i, i:].unsqueeze(0)
                errors[:, i] = error
            weights[:, stop:] -= errors @ upper[start:stop, stop:]
        return out.t()

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    times, busy, q = timed(run, 1 + rounds)
    return {
        "first": times[0],
        "again": float(np.median(times[1:])),
        "busy": float(np.median(busy[1:])),
        "error": output_error(x, w, q.numpy()),
        "versions": f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
    }


def in_jax(x: np.ndarray, w: np.ndarray, rounds: int, **options: Any) -> dict[str, Any]:
    """Seconds and error of `gptq`, the first time with tracing and compilation."""
    import jax
    import jax.numpy as jnp

    import jaxquant as jq
    from jaxquant.encoders import gptq, rtn
    from jaxquant.observers import input_stats, inputs

    observer, spec = inputs(), jq.QSpec(f"int{BITS}", jq.PerGroup(GROUP, 0))
    encoder = gptq(damping=DAMPING, block=BLOCK, **options)
    update = jax.jit(observer.update)
    rows, weights = jnp.asarray(x), jnp.asarray(w)

    def run() -> Any:
        stats = input_stats(update(observer.init(rows), rows))
        return jax.block_until_ready(encoder(weights, spec, stats=stats))[0]

    times, busy, q = timed(run, 1 + rounds)
    nearest, _ = rtn()(weights, spec)
    return {
        "first": times[0],
        "again": float(np.median(times[1:])),
        "busy": float(np.median(busy[1:])),
        "error": output_error(x, w, np.asarray(jq.dequantize(q))),
        "nearest": output_error(x, w, np.asarray(jq.dequantize(nearest))),
        "versions": ", ".join(f"{p} {metadata.version(p)}" for p in ("jaxquant", "jax", "jaxlib"))
        + f", Python {platform.python_version()}, {jax.default_backend()}",
    }


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "same": functools.partial(in_jax, act_order=False, grid="range"),
    "default": in_jax,
    "torch": in_torch,
}


def apart(side: str, python: str, folder: str, rounds: int) -> dict[str, Any] | None:
    """One side in a process of its own; `None` where the interpreter lacks PyTorch."""
    if side == "torch":
        has = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
        if has.returncode:
            return None
    command = [python, __file__, "--side", side, folder, "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, folder = options.side
        arrays = (np.load(Path(folder) / f"{name}.npy") for name in "xw")
        print(json.dumps(SIDES[side](*arrays, options.rounds)))
        return
    width, rows, rounds = (256, 512, 1) if options.quick else (2048, 4096, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for name, array in zip("xw", data_of(width, rows), strict=True):
            np.save(Path(folder) / f"{name}.npy", array)
        ours = apart("same", sys.executable, folder, rounds)
        default = apart("default", sys.executable, folder, rounds)
        theirs = apart("torch", options.torch_python, folder, rounds)
    assert ours is not None
    print(f"GPTQ of {width} x {width}, {rows} rows, int{BITS} in groups of {GROUP}\n")
    print("| | seconds, first call | later | of CPU, later | output error |")
    print("|---|---|---|---|---|")
    sides = (("jaxquant, the same", ours), ("PyTorch", theirs), ("jaxquant, as it comes", default))
    for name, side in sides:
        if side is not None:
            cells = " | ".join(f"{side[column]:.2f}" for column in ("first", "again", "busy"))
            print(f"| {name} | {cells} | {side['error']:.6f} |")
    if theirs is not None:
        columns = ("first", "again", "busy")
        cells = " | ".join(f"{theirs[column] / ours[column]:.1f}" for column in columns)
        print(f"| times as fast | {cells} | |")
    print(f"| round to nearest | | | | {ours['nearest']:.6f} |")
    print(f"\n{ours['versions']}" + (f"; {theirs['versions']}" if theirs else "; no PyTorch"))


if __name__ == "__main__":
    main()
