"""Statistics: saved, resumed, merged, printed, as a pytree."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxquant as jq
from jaxquant.capture import Statistics, capture
from jaxquant.observers import absmax, minmax, moving_average, percentile
from tests.capture.programs import PROGRAMS, Program

RECURRENT, LAYERS = PROGRAMS["recurrent"], PROGRAMS["layers"]


STATIC = jq.int8(granularity=jq.PerTensor())


def run(given: Any, observer: Any, program: Program = LAYERS, **kwargs: Any) -> Statistics:
    return capture(program.fn, program.params, observer, batches=given, **kwargs)


def assert_same(a: Statistics, b: Statistics) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal(a, b)


@dataclasses.dataclass(frozen=True)
class Mean(jq.observers.Observer):
    """An observer that jaxquant does not know."""

    axis: None = None

    def init(self, aval: Any) -> Any:
        zero = jnp.zeros((), jnp.int32)
        return {"sum": jnp.zeros(()), "updates": zero, "bad": zero}

    def update(self, state: Any, x: Any) -> Any:
        return state | {"sum": state["sum"] + x.mean(), "updates": state["updates"] + 1}

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

    def finish(self, state: Any, spec: Any) -> Any:
        mean = jnp.abs(state["sum"] / state["updates"])
        return jq.observers.Range(-mean, mean)


CASES = [(moving_average(0.8), LAYERS), (percentile(99.0, bins=64, axis=-1), RECURRENT)]


@pytest.mark.parametrize(("observer", "program"), CASES, ids=["layers", "recurrent"])
def test_an_interrupted_capture_goes_on_to_the_same_bits(
    observer: Any, program: Program, tmp_path: Any
) -> None:
    given, path = program.batches, tmp_path / "stats.npz"

    def interrupted() -> Any:
        yield from given[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted(), observer, program, save=path)
    kept = Statistics.load(path)
    assert kept.batches == 2 and [p.name for p in tmp_path.iterdir()] == ["stats.npz"]
    whole = run(given, observer, program)
    assert_same(run(given, observer, program, resume=str(path), save=path), whole)
    assert_same(Statistics.load(path), whole)
    assert_same(run(given, observer, program, resume=whole), whole)
    jax.tree.map(np.asarray, kept)  # what is resumed from may be used again
    assert_same(run(given, observer, program, resume=kept), whole)
    jax.tree.map(np.asarray, kept)


def test_merged_shards_equal_one_pass() -> None:
    observer = jq.Rule("*/in", weights=jq.int8(), activations=STATIC, observer=percentile(99.0, 64))
    given = LAYERS.batches
    shards = [run(part, observer) for part in (given[:1], given[1:])]
    merged, whole = shards[0].merge(shards[1]), run(given, observer)
    assert merged.batches == 3
    assert_same(merged, whole)
    with pytest.raises(
        ValueError, match=r"merge: these are statistics by another observer: .*observer"
    ):
        whole.merge(run(given[:1], dataclasses.replace(observer, observer=absmax())))


def test_a_pytree_that_checkpoints_and_prints(tmp_path: Any) -> None:
    stats = run(LAYERS.batches[:1], minmax())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stats", stats)
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, stats)
        assert_same(checkpointer.restore(tmp_path / "stats", target), stats)
    assert_same(jax.jit(lambda s: s)(stats), stats)
    lines = str(stats).splitlines()
    assert lines[0].split() == ["site", "operand", "observer", "range", "updates"]
    assert len(lines) == 1 + sum(len(stats[key]) for key in stats)
    assert lines[1].startswith("layers/in") and " .. " in lines[1] and lines[1].endswith(" 1")
    with pytest.raises(KeyError):
        stats["nothing"]
    with pytest.raises(ValueError, match=r"no statistics of 'layers/in', operand 'rhs'; there are"):
        stats.finish("layers/in", "rhs", jq.int8())


def test_an_observer_of_the_users_own() -> None:
    program = PROGRAMS["dense"]
    stats = capture(program.fn, program.params, Mean(), batches=program.batches)
    mean = np.mean([np.mean(batch) for batch in program.batches])
    np.testing.assert_allclose(stats.finish("a", "lhs", jq.int8()).high, abs(mean), rtol=1e-5)
    with pytest.raises(ValueError, match=r"save: only observers of jaxquant.observers.*Mean"):
        capture(program.fn, program.params, Mean(), batches=program.batches, save="nowhere.npz")


def test_files_that_hold_no_statistics(tmp_path: Any) -> None:
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match=r"no statistics at .*no such file"):
        Statistics.load(path)
    path.write_text("not this")
    with pytest.raises(ValueError, match="no statistics at "):
        Statistics.load(path)
    np.savez(path, x=np.zeros(2))
    with pytest.raises(ValueError, match=r"no statistics at .*statistics.json"):
        Statistics.load(path)
    run(LAYERS.batches[:1], absmax(), save=path)
    arrays = dict(np.load(path))
    meta = json.loads(arrays["statistics.json"].tobytes())
    for name in ("Path", "finish_stacked", "Observer"):  # only observers are ever made of a name
        meta["entries"][0]["observer"] = {"class": name, "fields": {}}
        arrays["statistics.json"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=f"of the observer '{name}', which"):
            Statistics.load(path)


def test_a_bar_only_when_asked_for_or_on_a_terminal(capsys: Any) -> None:
    for progress, shown in ((None, False), (False, False), (True, True)):
        run(LAYERS.batches, absmax(), progress=progress)
        out, err = capsys.readouterr()
        assert out == "" and bool(err) is shown
