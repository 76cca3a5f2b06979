"""Layers quantized in order, each by the inputs that arrive there once all before are quantized."""

import dataclasses
import functools
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jaxquant as jq
from jaxquant.encoders import Encoder, Info
from jaxquant.observers import Inputs, InputStats, input_stats, inputs
from jaxquant.qtensor import QTensor
from tests.arrays import normal

pytestmark = pytest.mark.filterwarnings("ignore:gptq. .* calibration rows")

SPEC = jq.int3(group=4)


def rules(**kwargs: Any) -> list[jq.Rule]:
    how: dict[str, Any] = {"weights": SPEC, "encoder": jq.gptq()} | kwargs
    return [jq.Rule("**", **how)]


def mlp(p: Any, x: Any) -> Any:
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


MLP = {name: normal(n, 8, 8) for n, name in enumerate("abc")}
BATCHES = [normal(10 + n, 16, 8) for n in range(3)]


@jax.jit
def observed(xs: list[jax.Array]) -> Any:
    state = inputs().init(xs[0])
    for x in xs:
        state = inputs().update(state, x)
    return state


def stats_of(xs: list[Any]) -> InputStats:
    return input_stats(observed(xs))


def same(a: Any, b: Any) -> bool:
    """Whether all arrays of two trees are equal, bit for bit."""
    flat = [jax.tree.leaves(t) for t in (a, b)]
    return len(flat[0]) == len(flat[1]) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*flat, strict=True)
    )


def test_each_layer_sees_what_the_quantized_ones_before_it_give() -> None:
    xs, expected = BATCHES, {}
    for name in "abc":
        spec = jq.int3(granularity=jq.PerGroup(4, axis=0))
        expected[name], _ = jq.gptq()(MLP[name], spec, storage_last_axes=(0,), stats=stats_of(xs))
        w = np.asarray(jq.dequantize(expected[name]))
        xs = [np.tanh(np.asarray(x) @ w) for x in xs]
    qparams, _ = jq.ptq(mlp, MLP, rules(), batches=BATCHES)
    for name in "abc":
        # one order of summation differs from another by float rounding, which may turn a tie
        got, want = (np.asarray(jq.dequantize(q[name])) for q in (qparams, expected))
        assert np.mean(np.abs(got - want) > 1e-6) < 0.02
    one_pass, _ = jq.ptq(mlp, MLP, rules(), batches=BATCHES, sequential=False)
    assert same(one_pass["a"], qparams["a"]) and not same(one_pass["c"], qparams["c"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Layers(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.scan:
            for _ in range(3):
                x, _ = Block()(x, None)
            return x
        options: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Block), length=3, **options)()(x, None)[0]


@pytest.fixture(scope="module")
def stacked() -> tuple[Any, Any, Any]:
    """The variables of the scanned model, and those of the loop that is the same function."""
    x = normal(0, 2, 6, 8)
    scanned = jax.jit(Layers(True).init)(jax.random.key(0), x)
    inner = jax.tree.map(np.asarray, scanned["params"]["ScanCheckpointBlock_0"])
    looped = {f"Block_{n}": jax.tree.map(lambda a, n=n: a[n], inner) for n in range(3)}
    looped = jax.device_put(looped)
    batches = [normal(20 + n, 2, 6, 8) for n in range(4)]
    return scanned, {"params": looped}, batches


AWQ = jq.awq(steps=4)


@pytest.fixture(scope="module")
def walked(stacked: Any) -> Any:
    """The scanned model quantized with a rewrite, once for all tests."""
    scanned, _, batches = stacked
    ptq = functools.partial(jq.ptq, Layers(True).apply, scanned, batches=batches)
    return functools.cache(lambda rewrite: ptq(rules(rewrite=rewrite)))


@pytest.mark.parametrize("rewrite", [None, AWQ], ids=["gptq", "awq then gptq"])
def test_scanned_layers_are_walked_one_by_one(stacked: Any, walked: Any, rewrite: Any) -> None:
    _, looped, batches = stacked
    a, report = walked(rewrite)
    b, _ = jq.ptq(Layers(False).apply, looped, rules(rewrite=rewrite), batches=batches)
    stack = jax.tree.map(np.asarray, a["params"]["ScanCheckpointBlock_0"])
    for n in range(3):
        layer = jax.tree.map(lambda x, n=n: x[n], stack)
        assert same(layer, b["params"][f"Block_{n}"])
    assert report["params/ScanCheckpointBlock_0/Dense_0/kernel"].sqnr_db is not None


@dataclasses.dataclass(frozen=True)
class Noting(Encoder):
    """Rounds to nearest; `rows` is how many rows its statistics hold, written into the scale."""

    observer: ClassVar[Inputs] = inputs()

    def __call__(self, w: Any, spec: Any, *, stats: Any = None, **kwargs: Any) -> Any:
        q, info = jq.encoders.rtn()(w, spec, **kwargs)
        assert stats is not None
        return with_rows(q, stats.rows), info


@jax.jit
def with_rows(q: QTensor, rows: jax.Array) -> QTensor:
    rows = jnp.max(rows.reshape(*q.scale.shape[: rows.ndim], -1), axis=-1)
    rows = rows.reshape(rows.shape + (1,) * (q.scale.ndim - rows.ndim))
    return dataclasses.replace(q, scale=jnp.broadcast_to(rows, q.scale.shape))


def rows_seen(q: QTensor) -> np.ndarray:
    return np.unique(np.asarray(q.scale))


def test_loops_over_time_ties_and_branches_use_one_pass_beforehand() -> None:
    def fn(p: Any, xs: Any) -> Any:
        h, _ = lax.scan(lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"]), None), xs[0], xs)
        h = lax.cond(h.sum() > 1e9, lambda h: h, lambda h: h @ p["branch"], h)
        h = lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["loop"]), h)
        return jnp.tanh(h @ p["tied"]) @ p["tied"], h @ p["last"]

    names = ["w", "u", "branch", "loop", "tied", "last"]
    params = {name: normal(n, 4, 4) for n, name in enumerate(names)}
    batches = [normal(n, 3, 5, 4) for n in range(2)]
    q, _ = jq.ptq(fn, params, rules(encoder=Noting()), batches=batches)
    found = {name: rows_seen(q[name]).tolist() for name in names}
    # 5 rows a batch, 3 steps of the scan, 2 of the loop, 2 uses
    assert found == {"w": [30], "u": [30], "branch": [10], "loop": [20], "tied": [20], "last": [10]}


@pytest.mark.slow
def test_convolutions_experts_and_several_contracted_axes() -> None:
    def fn(p: Any, x: Any) -> Any:
        y = lax.conv_general_dilated(
            x, p["conv"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jnp.einsum("nhwc,hwcd->nd", jnp.tanh(y), p["all"])
        z = jnp.einsum("nd,edf->enf", jnp.tanh(y), p["spread"])
        return jnp.einsum("enf,efg->eng", jnp.tanh(z), p["experts"])

    shapes = {"conv": (3, 3, 2, 4), "all": (2, 2, 4, 6), "spread": (3, 6, 4), "experts": (3, 4, 5)}
    params = {name: normal(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    batches = [normal(n, 32, 4, 4, 2) for n in range(2)]
    q, _ = jq.ptq(fn, params, rules(encoder=Noting()), batches=batches)
    assert rows_seen(q["conv"]).tolist() == [2 * 32 * 4]  # 2 x 2 windows
    assert all(rows_seen(q[name]).tolist() == [64] for name in ("all", "spread", "experts"))
    q, _ = jq.ptq(fn, params, rules(), batches=batches)
    rounded, _ = jq.ptq(fn, params, rules(encoder=None), batches[0])
    plain = jax.jit(fn)
    y, z, nearest = (
        np.asarray(plain(p, batches[0]))
        for p in (params, jq.dequantize_params(q), jq.dequantize_params(rounded))
    )
    assert np.linalg.norm(z - y) < np.linalg.norm(nearest - y)


def test_what_needs_no_inputs_is_quantized_first() -> None:
    recipe = [jq.Rule("a", weights=jq.int2(group=4)), *rules()]
    q, _ = jq.ptq(mlp, MLP, recipe, batches=BATCHES)
    first = np.asarray(jq.dequantize(q["a"]))
    spec = jq.int3(granularity=jq.PerGroup(4, axis=0))
    stats = stats_of([np.tanh(np.asarray(x) @ first) for x in BATCHES])
    want, _ = jq.gptq()(MLP["b"], spec, storage_last_axes=(0,), stats=stats)
    got, want = (np.asarray(jq.dequantize(t)) for t in (q["b"], want))
    assert np.mean(np.abs(got - want) > 1e-6) < 0.02


def test_offloading_changes_nothing(stacked: Any, walked: Any) -> None:
    scanned, _, batches = stacked
    fn = Layers(True).apply
    offloaded, _ = jq.ptq(fn, scanned, rules(), batches=batches, offload=True)
    assert same(walked(None)[0], offloaded)


@pytest.mark.slow
def test_several_passes_within_a_budget_change_nothing(stacked: Any) -> None:
    scanned, _, batches = stacked
    fn, once = Layers(True).apply, {"sequential": False}
    whole, _ = jq.ptq(fn, scanned, rules(), batches=batches, **once)
    tight, _ = jq.ptq(fn, scanned, rules(), batches=batches, budget=4_000, **once)
    assert same(whole, tight)


def test_statistics_may_be_gathered_apart() -> None:
    stats = jq.capture(mlp, MLP, inputs(), batches=BATCHES)
    a, _ = jq.ptq(mlp, MLP, rules(), BATCHES[0], stats=stats)
    b, _ = jq.ptq(mlp, MLP, rules(), batches=BATCHES, sequential=False)
    assert same(a, b)


def test_keyword_arguments_and_pytrees_of_inputs() -> None:
    def fn(p: Any, x: Any, *, scale: Any, name: str) -> Any:
        assert name == "plain"
        return mlp(p, x["x"] * scale)

    batches = [({"x": x},) for x in BATCHES]
    a, _ = jq.ptq(
        fn, MLP, rules(), batches=batches, kwargs={"scale": np.float32(2.0), "name": "plain"}
    )
    b, _ = jq.ptq(mlp, MLP, rules(), batches=[2 * np.asarray(x) for x in BATCHES])
    assert same(a, b)


# --------------------------------------------------------------------------------------------------
# Interrupted


@dataclasses.dataclass(frozen=True)
class Failing(Encoder):
    """GPTQ that fails once `path` holds so many files."""

    folder: str
    after: int
    observer: ClassVar[Inputs] = inputs()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[QTensor, Info]:
        if len(list(pathlib.Path(self.folder).glob("step*"))) == self.after:
            raise RuntimeError("killed")
        return jq.gptq()(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(jq.gptq())  # what a run is of is told by the recipe's text


@pytest.mark.parametrize(
    "after", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 11)), 5]
)
def test_a_run_goes_on_where_it_stopped(
    stacked: Any, walked: Any, tmp_path: Any, after: int
) -> None:
    scanned, _, batches = stacked
    fn, folder = Layers(True).apply, tmp_path / "run"
    whole, _ = walked(AWQ)
    recipe = rules(encoder=Failing(str(folder), after), rewrite=AWQ)
    with pytest.raises(RuntimeError, match="killed"):
        jq.ptq(fn, scanned, recipe, batches=batches, save=folder)
    before = {p.name: p.read_bytes() for p in folder.glob("step*")}
    assert len(before) == after
    again, _ = jq.ptq(
        *(fn, scanned, rules(rewrite=AWQ)),
        batches=batches,
        save=folder,
        resume=folder,
    )
    assert same(whole, again)
    assert all((folder / name).read_bytes() == data for name, data in before.items())


SCRIPT = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, jaxquant as jq

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((40, 32, 32)), jnp.float32)}
    batches = [jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2)]
    rule = jq.Rule("**", weights=jq.int3(group=16), encoder=jq.gptq())
    folder = sys.argv[1] or None
    q, _ = jq.ptq(fn, params, rule, batches=batches, save=folder, resume=folder)
    np.savez(sys.argv[2], *map(np.asarray, jax.tree.leaves(q)))
"""


def environment() -> dict[str, str]:
    """Programs of another process are compiled as here, and kept where those of this one are."""
    names = ["jax_disable_most_optimizations", "jax_compilation_cache_dir"]
    names += [f"jax_persistent_cache_min_{x}" for x in ("compile_time_secs", "entry_size_bytes")]
    held = {name.upper(): jax.config.values[name] for name in names}
    return {**os.environ, **{name: str(x) for name, x in held.items() if x is not None}}


def test_a_killed_process_goes_on_to_the_same_bytes(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, folder = tmp_path / "run.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SCRIPT))

    def command(save: Any, out: str) -> list[str]:
        return [sys.executable, str(script), str(save), str(tmp_path / out)]

    process = subprocess.Popen(command(folder, "killed.npz"), env=environment())
    deadline = time.monotonic() + 300
    while len(list(folder.glob("step*"))) < 7 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 7 <= len(list(folder.glob("step*"))) < 40
    subprocess.run(command(folder, "resumed.npz"), check=True, env=environment())
    monkeypatch.setattr(sys, "argv", command("", "whole.npz")[1:])
    runpy.run_path(str(script))
    resumed, whole = (np.load(tmp_path / name) for name in ("resumed.npz", "whole.npz"))
    assert resumed.files == whole.files
    assert all(resumed[k].tobytes() == whole[k].tobytes() for k in whole.files)


# --------------------------------------------------------------------------------------------------
# Mistakes


def test_mistakes_are_told_before_work() -> None:
    def ptq(*rule: Any, params: Any = MLP, fn: Any = mlp, **kwargs: Any) -> Any:
        return jq.ptq(fn, params, *(rule or (rules(),)), **({"batches": BATCHES} | kwargs))

    with pytest.raises(ValueError, match="needs calibration samples"):
        jq.ptq(mlp, MLP, rules(), BATCHES[0])
    with pytest.raises(ValueError, match="no batches; expected at least one"):
        ptq(batches=[])
    with pytest.raises(ValueError, match=r"budget=100 bytes.*smallest budget for this model is 3"):
        ptq(budget=100)
    with pytest.raises(ValueError, match=r"budget=100 bytes.*smallest budget for this model is 3"):
        ptq(budget=100, sequential=False)
    with pytest.raises(ValueError, match="batch 1: argument 0: expected float32"):
        ptq(batches=[BATCHES[0], np.asarray(BATCHES[0])[:3]])
    with pytest.raises(ValueError, match="a: input_stats: non-finite values in 1 of 2"):
        ptq(batches=[BATCHES[0], np.full_like(BATCHES[0], np.nan)])
    absmax = jq.capture(mlp, MLP, jq.observers.absmax(), batches=BATCHES)
    with pytest.raises(ValueError, match="looks at inputs, but there are no statistics of them"):
        jq.ptq(mlp, MLP, rules(), BATCHES[0], stats=absmax)
    with pytest.raises(ValueError, match="needs statistics of the parameter's inputs"):
        jq.quantize_params(MLP, rules(), sites=jq.trace(mlp, MLP, BATCHES[0]))
    with pytest.raises(ValueError, match="rewrite takes a value such as awq"):
        jq.Rule("**", weights=SPEC, rewrite=jq.awq)
    with pytest.raises(ValueError, match="rewrite without weights"):
        jq.Rule("**", lookup=jq.int8(), rewrite=jq.awq())


def test_few_rows_are_warned_of_with_their_number() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jq.ptq(mlp, MLP, rules(), batches=[np.asarray(BATCHES[0])[:5]])
    assert any("5 calibration rows for 8 columns" in str(w.message) for w in caught)


def test_a_folder_of_another_run_is_refused(tmp_path: Any) -> None:
    folder = tmp_path / "run"
    jq.ptq(mlp, MLP, rules(), batches=BATCHES, save=folder)
    with pytest.raises(ValueError, match="is not empty; continue the run in it by resume="):
        jq.ptq(mlp, MLP, rules(), batches=BATCHES, save=folder)
    with pytest.raises(ValueError, match="differs in recipe"):
        jq.ptq(mlp, MLP, rules(weights=jq.int4(group=4)), batches=BATCHES, resume=folder)
    with pytest.raises(ValueError, match="differs in batches"):
        jq.ptq(mlp, MLP, rules(), batches=BATCHES[:2], resume=folder)
    with pytest.raises(ValueError, match="differs in params"):
        jq.ptq(
            mlp,
            jax.tree.map(lambda a: 2 * np.asarray(a), MLP),
            rules(),
            batches=BATCHES,
            resume=folder,
        )
    with pytest.raises(ValueError, match="holds no run"):
        jq.ptq(mlp, MLP, rules(), batches=BATCHES, resume=tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        jq.ptq(mlp, MLP, rules(), batches=BATCHES, save=tmp_path / "a" / "b")
    (folder / "step_00002.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        jq.ptq(mlp, MLP, rules(), batches=BATCHES, resume=folder)


def test_tied_weights_are_quantized_once_with_the_statistics_of_every_use() -> None:
    def fn(p: Any, tokens: Any) -> Any:
        return jnp.tanh(p["table"][tokens]) @ p["table"].T + jnp.tanh(p["table"][tokens]) @ p["out"]

    table = normal(0, 12, 4)
    params = {"table": table, "out": normal(1, 4, 12)}
    batches = list(np.arange(12, dtype=np.int32).reshape(2, 6))
    q, report = jq.ptq(fn, params, rules(encoder=Noting()), batches=batches)
    assert rows_seen(q["table"]).tolist() == [12]
    across = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"].T
    with pytest.raises(ValueError, match=r"a: it is contracted differently at its sites a, b"):
        jq.ptq(across, {"a": table, "b": table}, rules(), batches=[normal(2, 5, 12)])
    w = normal(3, 4, 4)
    twice = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    q, report = jq.ptq(twice, {"a": w, "b": w}, rules(encoder=Noting()), batches=[normal(2, 5, 4)])
    assert q["a"] is q["b"] and report["b"].shared
    assert rows_seen(q["a"]).tolist() == [10]
