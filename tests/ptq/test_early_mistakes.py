"""What calibration by inputs refuses before it starts, and what its report tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq

RNG = np.random.default_rng(0)
X = [jax.device_put(RNG.normal(size=(24, 16)).astype(np.float32)) for _ in range(2)]
W4 = jq.Rule("**", weights=jq.int4(group=8))


def drawn(*shape):
    return jax.device_put((RNG.normal(size=shape) / 4).astype(np.float32))


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


PARAMS = {"a": drawn(16, 24), "b": drawn(24, 8)}


def using(encoder=None, rewrite=None):
    return jq.Recipe([W4]).using(encoder, rewrite)


def test_arguments_to_trace_with_are_those_of_the_batches():
    with pytest.raises(ValueError, match=r"argument 0: expected float32\[24, 16\] as in batch 0"):
        jq.ptq(mlp, PARAMS, using(jq.gptq()), np.asarray(X[0])[:1], batches=X)


def test_statistics_do_not_serve_ranges_that_rewrites_change():
    recipe = jq.w8a8_static().using(rewrite=jq.smoothquant())
    stats = jq.capture(mlp, PARAMS, jq.observers.inputs(), batches=X)
    with pytest.raises(ValueError, match="give batches, not stats"):
        jq.ptq(mlp, PARAMS, recipe, X[0], stats=stats)
    with pytest.raises(ValueError, match=r"a: smoothquant\(\) beside activations with a scale"):
        jq.ptq(
            mlp, PARAMS, jq.w8a8_static(per_channel=True).using(None, jq.smoothquant()), batches=X
        )


def test_capture_takes_a_recipe_that_looks_at_inputs():
    recipe = using(jq.gptq())
    stats = jq.capture(mlp, PARAMS, recipe, batches=X)
    q, _ = jq.ptq(mlp, PARAMS, recipe, X[0], stats=stats)
    expected, _ = jq.ptq(mlp, PARAMS, recipe, batches=X, sequential=False)
    for name in PARAMS:
        np.testing.assert_array_equal(q[name].codes, expected[name].codes)


def grouped(p, x):
    y = x.reshape(24, 4, 4) @ p["mix"]
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(
        y, p["depthwise"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=4
    )
    return y.reshape(24, 16) @ p["out"]


def test_what_is_no_matrix_is_named_at_once_and_no_matter_to_rewrites(tmp_path):
    params = {"mix": drawn(4, 4), "depthwise": drawn(3, 1, 4), "out": drawn(16, 8)}
    recipe = jq.Recipe([jq.Rule("**", weights=jq.int8())])
    with pytest.raises(ValueError, match="depthwise: a convolution with feature_group_count=4"):
        jq.ptq(grouped, params, recipe.using(jq.gptq()), batches=X, save=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    _, report = jq.ptq(grouped, params, recipe.using(None, jq.awq()), batches=X)
    assert report["depthwise"].notes[-1].startswith("not rewritten: scale cannot move across conv")


def test_encoders_see_their_specs_before_anything_runs(tmp_path):
    rules = [
        jq.Rule("a", weights=jq.int4(group=8), encoder=jq.gptq()),
        jq.Rule("b", weights=jq.palette(8, channels=1), encoder=jq.kmeans()),
    ]
    with pytest.raises(ValueError, match=r"b: kmeans: a codebook of 256 values for each group of"):
        jq.ptq(mlp, PARAMS, jq.Recipe(rules), batches=X, save=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"awq\(\) is a rewrite, not an encoder"):
        using(jq.awq())
    with pytest.raises(ValueError, match="has not been called"):
        using(jq.gptq)
    with pytest.raises(ValueError, match="budget: expected a number of bytes, got '1GB'"):
        jq.ptq(mlp, PARAMS, using(jq.gptq()), batches=X, budget="1GB")
    with pytest.raises(ValueError, match="smoothquant: alpha: expected a number"):
        jq.smoothquant("0.5")
    with pytest.raises(ValueError, match="awq: online: expected True or False"):
        jq.awq(online="no")
    assert jq.gptq(act_order=True) == jq.gptq(act_order="static")
    with pytest.raises(ValueError, match="act_order is one of"):
        jq.gptq(act_order=1)


def test_leaves_that_take_in_factors_say_so():
    def fn(p, x):
        return (x * p["scale"][None]) @ p["w"]

    grown = np.asarray(drawn(16, 8)) * np.arange(1, 17, dtype=np.float32)[:, None]
    params = {"scale": np.ones(16, np.float32), "w": grown}
    _, report = jq.ptq(fn, params, using(None, jq.smoothquant()), batches=X)
    assert report["w"].notes[-1] == "factors folded into scale"
    assert report["scale"].notes == ("absorbed the factors of w",)


def test_a_run_goes_on_only_as_itself(tmp_path):
    recipe, folder = using(jq.gptq()), tmp_path / "run"
    folder.mkdir()  # an empty one will do
    run = lambda fn, **more: jq.ptq(fn, PARAMS, recipe, batches=X, resume=folder, **more)
    first, report = run(mlp, save=folder)
    again, told = run(mlp, save=folder)
    for name in PARAMS:
        np.testing.assert_array_equal(first[name].codes, again[name].codes)
    assert [row.notes for row in told.leaves] == [row.notes for row in report.leaves]
    with pytest.raises(ValueError, match="differs in function"):
        run(lambda p, x: jnp.sin(x @ p["a"]) @ p["b"])
    with pytest.raises(ValueError, match="differs in key"):
        run(mlp, key=jax.random.key(1))


def test_what_is_calibrated_beforehand_is_kept_site_by_site(tmp_path):
    full, _ = jq.ptq(mlp, PARAMS, using(jq.gptq()), batches=X, sequential=False)
    folder = tmp_path / "run"
    jq.ptq(mlp, PARAMS, using(jq.gptq()), batches=X, sequential=False, save=folder)
    kept = sorted(path.name for path in folder.glob("beforehand_*"))
    assert kept == ["beforehand_00000.npz", "beforehand_00001.npz"]
    (folder / kept[1]).unlink()
    q, _ = jq.ptq(
        mlp, PARAMS, using(jq.gptq()), batches=X, sequential=False, save=folder, resume=folder
    )
    for name in PARAMS:
        np.testing.assert_array_equal(q[name].codes, full[name].codes)


def test_keys_between_layers_stay_where_they_are():
    def fn(p, x, key):
        a, b = jax.random.split(key)
        y = jnp.tanh(x @ p["a"]) + 0.1 * jax.random.normal(a, (24, 24))
        return y @ p["b"] + jax.random.normal(b, (24, 8))

    batches = [(x, jax.random.key(n)) for n, x in enumerate(X)]
    q, _ = jq.ptq(fn, PARAMS, using(jq.gptq()), batches=batches)
    off, _ = jq.ptq(fn, PARAMS, using(jq.gptq()), batches=batches, offload=True)
    np.testing.assert_array_equal(q["b"].codes, off["b"].codes)


def test_tables_that_meet_no_inputs_are_clustered_without_weights():
    fn = lambda p, tokens: p["table"][tokens] @ p["w"]
    params = {"table": drawn(32, 16), "w": drawn(16, 8)}
    rule = jq.Rule("**", weights=jq.palette(3), encoder=jq.kmeans(weighted=True))
    _, report = jq.ptq(fn, params, rule, batches=[np.arange(8, dtype=np.int32)] * 2)
    assert report["table"].sqnr_db > 10
    assert any("meets no inputs: kmeans()" in note for note in report["table"].notes)
    assert any("Huffman-coded: bits per weight" in note for note in report["w"].notes)
