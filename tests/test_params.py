"""Params trees by recipe: what is quantized, along which axes, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, QTensor, Recipe, Rule
from jaxquant.encoders import Encoder
from jaxquant.interpret.sites import Site, Sites

SHAPES = {
    "emb": (100, 16),
    "q": (3, 16, 4, 4),
    "o": (3, 4, 4, 16),
    "conv": (3, 3, 8, 4),
    "head": (16, 10),
    "scale": (3, 16),
}


def site(param, contracted, scanned=(), primitive="dot_general", repeat=""):
    return Site(
        key=(param or "attn") + repeat,
        primitive=primitive,
        param=param,
        shape=SHAPES.get(param, ()),
        dtype="float32",
        contracted=contracted,
        scanned=scanned,
        batched=(),
        operands=((), ()),
        scope="",
    )


SITES = Sites(
    sites=(
        site("emb", (1,), primitive="gather"),
        site("q", (1,), (0,)),
        site(None, ()),
        site("o", (1, 2), (0,)),
        site("conv", (0, 1, 2), primitive="conv_general_dilated"),
        site("head", (0,)),
    ),
    leaves={path: (shape, "float32") for path, shape in SHAPES.items()},
    met={"scale": "mul"},
)


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    pairs = zip(SHAPES.items(), keys, strict=True)
    return {path: jax.random.normal(k, shape) for (path, shape), k in pairs}


def weights(pattern, granularity, name="int8", **fields):
    return Recipe([Rule(pattern, weights=QSpec(name, granularity), **fields)])


def test_scales_follow_the_contractions(params):
    qparams, report = jq.quantize_params(params, jq.w8a8(), sites=SITES)
    scales = {path: q.scale.shape for path, q in qparams.items() if isinstance(q, QTensor)}
    assert scales == {
        "emb": (100, 1),
        "q": (3, 4, 4, 1),
        "o": (3, 16, 1, 1),
        "conv": (1, 1, 1, 4),
        "head": (10, 1),
    }
    assert qparams["scale"] is params["scale"]
    assert qparams["q"].batch == (3,)
    assert qparams["o"].axes == ((-1,), (-3,), (-2,))
    assert qparams["conv"].axes == ((-4,), (-3,), (-2,), (-1,))  # as XLA wants kernels
    assert report["q"].action == "int8 per channel, activations int8"
    assert report["emb"].action == "int8 per channel (looked up)"
    assert report["scale"].action == "kept: no contraction (met mul)"
    assert report.quantized == 5
    for path, q in qparams.items():
        if isinstance(q, QTensor):
            q.validate()
            assert report[path].bytes_after == q.nbytes
            assert 40 < report[path].sqnr_db < 55
            assert q.contraction.activations == jq.int8()
            assert q.contraction.attention == (("**", jq.int8()),)


def test_values_are_those_of_quantize(params):
    qparams, _ = jq.quantize_params(params, jq.w4a16(group=8), sites=SITES)
    spec = QSpec("int4", PerGroup(8, (-3, -2)))
    layer = jq.quantize(params["o"][1], spec, storage_last_axes=(0, 1))
    np.testing.assert_array_equal(
        np.asarray(jq.dequantize(qparams["o"])[1]), np.asarray(jq.dequantize(layer))
    )
    restored = jq.dequantize_params(qparams)
    assert jax.tree.map(jnp.shape, restored) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(restored["o"], jq.dequantize(qparams["o"]))


def test_tables_in_schemes_of_four_bits(params):
    for recipe in (jq.w4a16(group=8), jq.w4a8(group=8), jq.nf4(group=8), jq.mxfp4()):
        qparams, _ = jq.quantize_params(params, recipe, sites=SITES)
        assert qparams["emb"].spec.format.name == "int8"
        assert qparams["head"].spec.format.bits == 4


def test_reasons_to_keep(params):
    params = params | {
        "scale": jnp.arange(48).reshape(3, 16),
        "head": params["head"].astype(jnp.float8_e4m3fn),
    }
    recipe = Recipe(
        [
            Rule("q", skip=True),
            Rule("o", attention=jq.int8()),
            Rule("emb", lookup=jq.int8()),
            Rule("[hs]*", weights=jq.int8()),
        ]
    )
    _, report = jq.quantize_params(params, recipe, sites=SITES)
    assert {leaf.path: leaf.action for leaf in report.leaves} == {
        "conv": "kept: no rule matches",
        "emb": "int8 per channel (looked up)",
        "head": "kept: float8_e4m3fn is narrow already",
        "o": "kept: the rule sets no weights",
        "q": "kept: rule says skip",
        "scale": "kept: not a float array (int32)",
    }


def test_quantized_leaves_stay(params):
    once, _ = jq.quantize_params(params, weights("head", PerChannel(1)))
    twice, report = jq.quantize_params(once, jq.w8a8(), sites=SITES)
    assert twice["head"] is once["head"]
    assert report["head"].action == "kept: already quantized (int8)"
    assert not report["head"].quantized
    with pytest.raises(ValueError, match=r"quantizes nothing: every leaf it could .*; head: kept"):
        jq.quantize_params(twice, jq.w8a8(), sites=SITES)
    rest = {path: q for path, q in twice.items() if isinstance(q, QTensor)}
    with pytest.raises(ValueError, match="quantizes nothing: all leaves are quantized already"):
        jq.quantize_params(rest, jq.w8a8())


def test_a_tree_that_is_one_array():
    _, report = jq.quantize_params(jnp.ones((8, 2)), weights("**", PerChannel(1)))
    assert "(root)" in str(report)
    with pytest.raises(ValueError, match=r"no parameter; nearest: \(root\)"):
        jq.quantize_params(jnp.ones((8, 2)), weights("w", PerChannel(1)))
    with pytest.raises(ValueError, match=r"^\(root\) \(float array"):
        jq.quantize_params(jnp.ones((8, 2)), weights("**", PerChannel(3)))


def test_values_beyond_float32_leave_the_ratio_open():
    class Boundless(Encoder):
        def __call__(self, w, spec, **options):
            q, info = jq.encoders.rtn()(w, spec, **options)
            return q, info._replace(error=jnp.float32(jnp.inf))

    rule = Rule("w", weights=QSpec("int8", PerChannel(1)), encoder=Boundless())
    _, report = jq.quantize_params({"w": jnp.ones((8, 2))}, [rule])
    assert report["w"].sqnr_db is None
    assert "not measured" in report["w"].notes[0]
    for value in (3e38, 1e-38, 0.0):
        _, report = jq.quantize_params(
            {"w": jnp.full((8, 2), value)}, Rule("w", weights=rule.weights)
        )
        str(report)


def test_nearest_paths_share_parts(params):
    tree = {
        "mlp": {"kernel": params["head"], "bias": params["scale"]},
        "klp": {"kernels": params["emb"]},
    }
    with pytest.raises(ValueError, match=r"nearest: mlp/kernel, mlp/bias$"):
        jq.quantize_params(tree, weights("mlp/kernels2", PerTensor()))


@pytest.mark.parametrize("recipe", [jq.w8a8, "w8a8", None, jq.int8], ids=range(4))
def test_recipes_are_checked_first(recipe):
    with pytest.raises(ValueError, match=r"^quantize_params: expected a Recipe"):
        jq.quantize_params(object(), recipe)


def test_a_scale_per_value_saves_nothing():
    sites = Sites((site("w", ()),), {"w": ((8,), "float32"), "v": ((8, 2), "float32")}, {})
    params = {"w": jnp.ones(8), "v": jnp.ones((8, 2))}
    with pytest.raises(ValueError, match="every value would need its own scale"):
        jq.quantize_params(params, jq.w8a8(), sites=sites)


def test_explicit_axes_need_no_sites(params):
    qparams, _ = jq.quantize_params(params, weights("q", PerGroup(8, 1), "int4"))
    assert qparams["q"].scale.shape == (3, 4, 4, 2)
    assert qparams["q"].batch == ()
    for granularity in (PerTensor(), PerChannel((0, -1)), PerBlock(2, 2)):
        jq.quantize_params(params, weights("q", granularity))


def test_explicit_axes_count_in_the_whole_parameter(params):
    qparams, _ = jq.quantize_params(params, weights("q", PerChannel((0, 3))), sites=SITES)
    assert qparams["q"].batch == (3,)
    assert qparams["q"].scale.size == 3 * 4
    qparams, _ = jq.quantize_params(params, weights("q", PerTensor()), sites=SITES)
    assert qparams["q"].scale.shape == (3, 1, 1, 1)


MISTAKES = [
    (jq.w8a8(), None, r"^conv .*no sites are given .* would be a guess"),
    (weights("hed", PerTensor()), SITES, r"Rule\('hed'.* matches no parameter; nearest: head"),
    (jq.w8a8().prepend(Rule("x/*", skip=True)), SITES, r"Rule\('x/\*', skip=True\) matches no"),
    (
        jq.w8a8().prepend(Rule("at", attention=jq.int8())),
        SITES,
        "matches no contraction of two activations; nearest: attn",
    ),
    (weights("head#1", PerTensor()), SITES, "matches no parameter"),
    (Recipe([Rule("**", skip=True)]), SITES, "quantizes no parameter.*rule says skip"),
    (Recipe([Rule("attn", attention=jq.int8())]), SITES, "quantizes no parameter"),
    (weights("scale", PerTensor()), SITES, "quantizes no parameter.*met mul"),
    (weights("head", PerChannel(2)), SITES, r"^head .*axis 2 is out of range, expected -2 to 1"),
    (weights("head", PerGroup(8, -3)), None, r"^head .*axis -3 is out of range"),
    (weights("head", PerChannel((0, -2))), None, r"^head .*named twice"),
    (weights("scale", PerBlock(2, 2, (0, 2))), None, r"^scale .*axis 2 is out of range"),
    (weights("q", PerGroup(3, 0)), SITES, r"^q .*axis -4 is scanned over"),
    (
        weights("head", PerTensor(), encoder=jq.encoders.rtn(stochastic=True)),
        None,
        "^head: rtn.* pass key=",
    ),
]


@pytest.mark.parametrize(("recipe", "sites", "message"), MISTAKES, ids=[m[-1] for m in MISTAKES])
def test_mistakes_are_value_errors(params, recipe, sites, message):
    with pytest.raises(ValueError, match=message):
        jq.quantize_params(params, recipe, sites=sites)


def test_sites_of_another_model(params):
    with pytest.raises(ValueError, match=r"^head: the sites were traced with this parameter"):
        jq.quantize_params({k: v for k, v in params.items() if k != "head"}, jq.w8a8(), sites=SITES)
    with pytest.raises(ValueError, match=r"^head2: not a parameter .*; nearest: head"):
        jq.quantize_params(params | {"head2": params["head"]}, jq.w8a8(), sites=SITES)
    with pytest.raises(
        ValueError, match=r"^head: expected shape \[16, 10\] as traced, got \[16, 9\]"
    ):
        jq.quantize_params(params | {"head": params["head"][:, :9]}, jq.w8a8(), sites=SITES)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named_before_any_work(params, value):
    calls = []

    class Counting(Encoder):
        def __call__(self, *args, **kwargs):
            calls.append(args)
            return jq.encoders.rtn()(*args, **kwargs)

    bad = params | {"o": params["o"].at[1, 0, 0, :2].set(value)}
    recipe = Recipe([Rule("**", weights=jq.int8(), encoder=Counting())])
    with pytest.raises(ValueError, match=r"NaN or infinity in o \(2 of 768 values\)"):
        jq.quantize_params(bad, recipe, sites=SITES)
    assert not calls
    # what is not quantized may hold anything, as masks do
    kept = params | {"scale": params["scale"].at[0].set(value)}
    jq.quantize_params(kept, recipe, sites=SITES)


def test_a_rule_for_leaves_that_are_no_floats():
    params = {"ids": jnp.arange(4), "w": jnp.ones((4, 4)), "c": jnp.ones(4, jnp.complex64)}
    for pattern in ("ids", "c"):
        with pytest.raises(ValueError, match=f"expected float arrays to quantize, got {pattern} "):
            jq.quantize_params(params, weights(pattern, PerTensor()).prepend(Rule("w", skip=True)))
    _, report = jq.quantize_params(params, weights("**", PerTensor()))
    assert report["ids"].action == "kept: not a float array (int32)"
    assert report["c"].action == "kept: not a float array (complex64)"


def test_a_rule_without_a_leaf_of_its_own_is_noted(params):
    recipe = Recipe([Rule("**", weights=jq.int4()), Rule("head", weights=jq.int8())])
    _, report = jq.quantize_params(params, recipe, sites=SITES)
    assert report.notes == ("rule 'head' decides no leaf: earlier rules take all that it matches",)


def test_rules_for_sites_without_a_parameter(params):
    skip = jq.w8a8().prepend(Rule("attn", skip=True))
    qparams, _ = jq.quantize_params(params, skip, sites=SITES)
    assert qparams["head"].contraction.attention == (("attn", None), ("**", jq.int8()))
    plain, _ = jq.quantize_params(params, skip, sites=SITES, use=False)
    assert plain["head"].contraction == jq.qtensor.ContractionConfig()


def test_tied_leaves_are_stored_once(params):
    sites = Sites(
        (site("emb", (1,), primitive="gather"), site("head", (1,))),
        {"emb": ((100, 16), "float32"), "head": ((100, 16), "float32")},
        {},
    )
    tied = {"emb": params["emb"], "head": params["emb"]}
    qparams, report = jq.quantize_params(tied, jq.w4a16(group=8), sites=sites)
    assert qparams["emb"] is qparams["head"]
    assert qparams["emb"].spec.format.name == "int8"  # as one of its uses is a lookup
    assert report["head"].notes == ("tied: stored once, at emb",)
    assert report.bytes_before == params["emb"].nbytes
    assert report.bytes_after == qparams["emb"].nbytes


def test_disagreeing_sites_are_noted():
    leaves = {"q": (SHAPES["q"], "float32")}
    sites = Sites((site("q", (1,), (0,)), site("q", (2, 3), (), repeat="#1")), leaves, {})
    qparams, report = jq.quantize_params({"q": jnp.ones(SHAPES["q"])}, jq.w8a8(), sites=sites)
    assert qparams["q"].batch == ()  # one of the sites does not scan
    assert qparams["q"].scale.shape == (3, 4, 4, 1)
    assert report["q"].notes == (
        "contracted over axes [1] and [2, 3] at its sites; scales fit the first",
    )


def test_stochastic_keys_are_each_leafs_own(params, key):
    recipe = weights("[ho]*", PerTensor(), "int4", encoder=jq.encoders.rtn(stochastic=True))
    both, _ = jq.quantize_params(params, recipe, key=key)
    alone, _ = jq.quantize_params({"head": params["head"]}, recipe, key=key)
    np.testing.assert_array_equal(np.asarray(both["head"].codes), np.asarray(alone["head"].codes))
    other, _ = jq.quantize_params(params, recipe, key=jax.random.key(7))
    assert (np.asarray(both["head"].codes) != np.asarray(other["head"].codes)).any()


def test_shapes_are_enough(params):
    shapes = jax.eval_shape(lambda: params)
    for recipe in (jq.w8a8(), jq.mxfp4()):
        promised, report = jq.quantize_params(shapes, recipe, sites=SITES)
        got, full = jq.quantize_params(params, recipe, sites=SITES)
        assert jax.tree.structure(promised) == jax.tree.structure(got)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), promised) == jax.tree.map(
            lambda a: (a.shape, a.dtype), got
        )
        assert report.bytes_after == full.bytes_after
        assert report["q"].sqnr_db is None
        restored = jq.dequantize_params(promised)
        assert jax.tree.map(jnp.shape, restored) == jax.tree.map(jnp.shape, params)


def test_it_traces(params):
    jitted = jax.jit(lambda p: jq.quantize_params(p, jq.w8a8(), sites=SITES)[0])(params)
    plain, _ = jq.quantize_params(params, jq.w8a8(), sites=SITES)
    assert jax.tree.structure(jitted) == jax.tree.structure(plain)
    np.testing.assert_array_equal(np.asarray(jitted["o"].codes), np.asarray(plain["o"].codes))
