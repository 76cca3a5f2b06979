"""Rules and recipes: what matches what, what is refused, what the presets say."""

import copy
import dataclasses
import inspect
import pickle
import re

import pytest

import jaxquant as jq
from jaxquant import PerBlock, PerChannel, PerGroup, PerTensor, QSpec, Recipe, Rule
from jaxquant.recipe import as_recipe, attention_spec, pattern_matches


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("**", "a", True),
        ("**", "a/b/c", True),
        ("**", "", True),
        ("*", "a", True),
        ("*", "a/b", False),
        ("a/*", "a/b", True),
        ("a/*", "a/b/c", False),
        ("a/*", "a", False),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("**/c", "c", True),
        ("**/c", "a/b/c", True),
        ("**/c", "a/bc", False),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/**/c", "a/b/cc", False),
        ("**/mlp/**", "encoder/layer_0/mlp/kernel", True),
        ("**/mlp/**", "encoder/layer_0/mlp2/kernel", False),
        ("a/**/**/c", "a/c", True),
        ("layer_?/w", "layer_3/w", True),
        ("layer_?/w", "layer_13/w", False),
        ("layer_[0-3]/w", "layer_2/w", True),
        ("layer_[!0-3]/w", "layer_2/w", False),
        ("layer_[!0-3]/w", "layer_7/w", True),
        ("a[!b]c", "a/c", False),  # a set never spans levels
        ("a[]]c", "a]c", True),
        ("a[b", "a[b", True),  # no set without an end
        ("a.b", "axb", False),
        ("a+(b)", "a+(b)", True),
        ("*kernel*", "my_kernel_2", True),
        # a leading `params/` may be there or not, on either side
        ("encoder/*", "params/encoder/kernel", True),
        ("params/encoder/*", "encoder/kernel", True),
        ("params/encoder/*", "params/encoder/kernel", True),
        ("*/kernel", "params/kernel", True),
        ("encoder/*", "batch_stats/encoder/kernel", False),
        # repeats of a site belong to its key unless the pattern asks for one of them
        ("a/kernel", "a/kernel#1", True),
        ("a/kernel#1", "a/kernel#1", True),
        ("a/kernel#1", "a/kernel", False),
        ("a/kernel#*", "a/kernel#2", True),
        (re.compile(r".*/kernel"), "a/b/kernel", True),
        (re.compile(r"kernel"), "a/b/kernel", False),  # the whole key, as for globs
        (re.compile(r"A/.*", re.IGNORECASE), "a/b", True),
        (re.compile(r"encoder/\w+"), "params/encoder/kernel", True),
        (re.compile(r"params/encoder/\w+"), "encoder/kernel", True),
        (re.compile(r"a/kernel"), "a/kernel#1", True),
    ],
)
def test_patterns(pattern, key, expected):
    assert pattern_matches(pattern, key) is expected
    assert Rule(pattern, skip=True).matches(key) is expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("**"), r"Rule\('\*\*'\) does nothing"),
        (lambda: Rule("**", encoder=jq.encoders.rtn()), "does nothing"),
        (lambda: Rule("a", skip=True, weights=jq.int8()), "does not go with weights"),
        (lambda: Rule("a", skip=True, encoder=jq.encoders.rtn()), "does not go with"),
        (lambda: Rule("a", activations=jq.int8()), "activations without weights"),
        (lambda: Rule("a", weights="int8"), "weights takes a QSpec .* got 'int8'"),
        (lambda: Rule("a", weights=jq.int8), "weights takes a QSpec"),
        (lambda: Rule("a", weights=jq.w8a16()), "weights takes a QSpec .* got <Recipe w8a16"),
        (lambda: Rule("a", weights=jq.int8(), encoder="gptq"), "encoder takes a value"),
        (lambda: Rule("a/b**", skip=True), "matches whole levels"),
        (lambda: Rule("[z-a]", skip=True), "bad character range"),
        (lambda: Rule(3, skip=True), "expected a glob or a compiled regex"),
        (lambda: Rule(re.compile(b"a"), skip=True), "expected a glob or a compiled regex"),
        (lambda: Rule("a", attention=QSpec("nf4")), "integer or 8-bit float format, got nf4"),
        (lambda: Rule("a", attention=QSpec("bfloat16")), "got bfloat16"),
        (lambda: Rule("a", attention=QSpec("mxfp4")), "got float4_e2m1fn"),
        (lambda: Rule("a", attention=jq.int8(group=4)), "expected PerTensor"),
        (
            lambda: Rule("a", weights=jq.int8(), activations=QSpec("int8", PerChannel(0))),
            "one scale per row",
        ),
        (
            lambda: Rule("a", weights=jq.int8(), activations=QSpec("int8", PerBlock(2, 2))),
            "expected PerTensor",
        ),
        (
            lambda: Rule("a", weights=QSpec("uint4")),
            "uint4 without a zero point would lose every negative value",
        ),
        (lambda: Recipe([]), "at least one rule"),
        (lambda: Recipe(["**"]), "expected rules, got"),
        (lambda: jq.int4(group=0), "expected a positive integer, got 0"),
        (lambda: jq.int4(group=8, granularity=PerTensor()), "not both"),
        (lambda: jq.int4(True), "group is a number of values, got True"),
        (lambda: jq.int4("per_channel"), "group is a number of values"),
        (lambda: jq.w4a16(group=True), "group is a number of values, got True"),
        (lambda: jq.w4a16(group=-1), "expected a positive integer"),
    ],
)
def test_mistakes_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_allowed():
    Rule("a", weights=jq.int8(), activations=QSpec("int8", PerTensor()))
    Rule("a", weights=jq.int8(), activations=QSpec("float8_e5m2"))
    Rule("a", weights=jq.uint8())
    Rule("a", attention=jq.int8())
    Rule("a", lookup=jq.int8())


def test_the_first_match_wins():
    recipe = Recipe([Rule("a/*", skip=True), Rule("**/w", weights=jq.int8())], "mine")
    assert recipe.match("a/w").skip
    assert recipe.match("b/w").weights == jq.int8()
    assert recipe.match("b/v") is None
    assert len(recipe) == 2
    assert list(recipe) == list(recipe.rules)


def test_rules_put_in_front_win():
    recipe = jq.w8a8().prepend(Rule("head/*", skip=True), Rule("body/*", weights=jq.int4()))
    assert [rule.key for rule in recipe.rules] == ["head/*", "body/*", "**"]
    assert recipe.match("head/kernel").skip
    assert recipe.title == "w8a8 + 2 rules"
    assert recipe.prepend(Rule("a", skip=True)).title == "w8a8 + 3 rules"
    assert jq.w8a8().prepend().name == "w8a8"
    own = Recipe(recipe.rules, "mine + yours").prepend(Rule("a", skip=True))
    assert own.title == "mine + yours + 1 rule"


@pytest.mark.parametrize(
    "value",
    [Recipe([Rule("a", skip=True)]), Rule("a", skip=True), [Rule("a", skip=True)]],
    ids=["recipe", "rule", "list"],
)
def test_what_makes_a_recipe(value):
    assert as_recipe(value, "here") == Recipe([Rule("a", skip=True)])
    assert as_recipe(iter(Recipe(value)), "here") == Recipe([Rule("a", skip=True)])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (jq.w8a8, r"got the function w8a8; call it: jq\.w8a8\(\)"),
        (dict, "got the class dict$"),
        ("w8a8", r"got the string 'w8a8'.* jq\.w8a8\(\)"),
        (None, "got None"),
        ({"a": 1}, "got a dict"),
        ([1], "got a list that holds a int"),
        ([jq.w8a8()], "prepend"),
    ],
    ids=range(7),
)
def test_what_is_no_recipe(value, message):
    with pytest.raises(ValueError, match=f"^here: expected a Recipe such as jq.w8a8.*{message}"):
        as_recipe(value, "here")


def test_parts_are_skipped_and_overridden():
    recipe = jq.w4a8().skip("lm_head", re.compile("a/.*")).override("down", weights=jq.int8())
    for path in ("lm_head", "params/x/lm_head/kernel", "a/b"):
        assert recipe.match(path).skip, path
    down = recipe.match("params/mlp/down/kernel")
    assert (down.weights, down.activations, down.lookup) == (jq.int8(), jq.int8(), jq.int8())
    assert recipe.match("params/mlp/up/kernel") == jq.w4a8().rules[0]
    assert recipe.title == "w4a8 + 3 rules"
    with pytest.raises(ValueError, match=r"no rule of .* sets weights"):
        Recipe(Rule("**", attention=jq.int8())).override("down", weights=jq.int8())
    with pytest.raises(TypeError, match="weight"):
        recipe.override("down", weight=jq.int8())


def test_a_spec_is_a_recipe_for_weights():
    for spec, lookup in ((jq.nf4(), jq.int8()), (jq.int8(), None)):
        assert as_recipe(spec, "here") == Recipe(
            [Rule("**", weights=spec, lookup=lookup)], spec.name
        )
    assert Recipe(jq.mxfp4()).prepend(Rule("a", skip=True)).title == "mxfp4 + 1 rule"


def test_swapped_arguments_are_named():
    with pytest.raises(ValueError, match="here: got a Recipe for params"):
        as_recipe({}, "here", jq.w8a8())


def test_recipes_are_values():
    def make():
        return Recipe(
            [Rule(re.compile("a.*"), weights=jq.int4(group=8), encoder=jq.encoders.rtn())]
        )

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != jq.w8a8()
    assert pickle.loads(pickle.dumps(make())) == make()
    assert copy.deepcopy(make()) == make()
    assert repr(jq.w8a8()) == "<Recipe w8a8: 1 rule>"
    assert repr(Rule("a", skip=True)) == "Rule('a', skip=True)"


def test_attention_follows_the_rules_that_speak_of_it():
    recipe = Recipe(
        [
            Rule("layer_0/**", weights=jq.int4()),  # says nothing of attention
            Rule("layer_1/**", skip=True),
            Rule("layer_2/**", attention=QSpec("float8_e4m3fn")),
            Rule("**", weights=jq.int8(), attention=jq.int8()),
        ]
    )

    def spec(key):
        return attention_spec(recipe.attention, key)

    assert spec("layer_0/attn") == jq.int8()
    assert spec("layer_1/attn") is None
    assert spec("layer_2/attn#1") == QSpec("float8_e4m3fn")
    assert spec("layer_3/attn") == jq.int8()
    assert attention_spec((), "a") is None
    hash(recipe.attention)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_specs(bits):
    make = getattr(jq.recipe, f"int{bits}")
    assert make() == QSpec(f"int{bits}")
    assert make().granularity == PerChannel()
    assert make(group=32).granularity == PerGroup(32)
    assert make(32) == make(group=32)
    assert str(inspect.signature(make)).startswith("(group: 'int | None' = None, *, symmetric:")
    with pytest.raises(TypeError, match=rf"^int{bits}\(\) got an unexpected .* 'groups'"):
        make(groups=4)
    spec = make(granularity=PerBlock(2, 4), symmetric=False, scale_dtype="bfloat16")
    assert spec == QSpec(f"int{bits}", PerBlock(2, 4), symmetric=False, scale_dtype="bfloat16")
    assert make(range="qmax").range == "qmax"


@pytest.mark.parametrize(
    ("recipe", "weights", "activations", "attention", "lookup"),
    [
        (jq.w8a8(), jq.int8(), jq.int8(), jq.int8(), None),
        (jq.w8a8(attention=False), jq.int8(), jq.int8(), None, None),
        (jq.w8a16(), jq.int8(), None, None, None),
        (jq.w4a16(), jq.int4(group=128), None, None, jq.int8()),
        (jq.w4a16(group=64), jq.int4(group=64), None, None, jq.int8()),
        (jq.w4a8(), jq.int4(group=128), jq.int8(), None, jq.int8()),
        (jq.w4a8(attention=True), jq.int4(group=128), jq.int8(), jq.int8(), jq.int8()),
        (Recipe(jq.nf4()), QSpec("nf4", PerGroup(64)), None, None, jq.int8()),
        (jq.w8a8_fp8(), QSpec("float8_e4m3fn"), QSpec("float8_e4m3fn"), None, None),
        (Recipe(jq.mxfp4()), QSpec("mxfp4"), None, None, jq.int8()),
        (Recipe(jq.nvfp4()), QSpec("nvfp4"), None, None, jq.int8()),
        (Recipe(jq.int4(group=64)), jq.int4(group=64), None, None, jq.int8()),
        (Recipe(jq.fp8()), QSpec("float8_e4m3fn"), None, None, None),
    ],
    ids=lambda x: repr(x) if isinstance(x, Recipe) else "",
)
def test_presets(recipe, weights, activations, attention, lookup):
    (rule,) = recipe.rules
    assert rule.key == "**"
    assert recipe.name
    found = (rule.weights, rule.activations, rule.attention, rule.lookup)
    assert found == (weights, activations, attention, lookup)


STATIC = jq.int8(granularity=PerTensor())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"observer": "mse"}, r"observer takes a value such as jq\.observers\.mse\(\), got 'mse'"),
        ({"observer": jq.observers.mse}, r"observer takes a value such as .*, got <function mse"),
        ({"observer": type(jq.observers.absmax())}, r"observer takes a value .*, got <class"),
        (
            {"activations": None, "observer": jq.observers.mse()},
            "observer without activations or attention",
        ),
        (
            {"observer": jq.observers.mse(axis=-1)},
            r"activations has one scale, and mse\(axis=-1\) finds .* each channel; use axis=None",
        ),
        (
            {"activations": jq.int8(), "observer": jq.observers.mse()},
            r"a scale for each row .*activations takes .*PerTensor\(\) or PerChannel.*, got QSpec",
        ),
        (
            {
                "attention": jq.int8(granularity=PerChannel(-1)),
                "activations": None,
                "observer": jq.observers.mse(axis=-1),
            },
            r"a scale for each row .* attention takes granularity=PerTensor\(\), got QSpec",
        ),
        (
            {
                "activations": jq.int8(granularity=PerChannel(-1)),
                "observer": jq.observers.absmax(),
            },
            r"activations has a scale .* last axis, so the observer needs axis=-1, got absmax\(\)",
        ),
        (
            {"activations": QSpec("int16", PerTensor()), "observer": jq.observers.absmax()},
            r".*activations .*at most 8 bits, got int16",
        ),
        ({"requantize": "float32"}, "requantize needs integer activations with an observer"),
        (
            {"requantize": "int", "observer": jq.observers.mse()},
            r"requantize: expected one of \('float32', 'fixed_point'\), got 'int'",
        ),
        (
            {
                "activations": QSpec("float8_e4m3fn", PerTensor()),
                "observer": jq.observers.mse(),
                "requantize": "float32",
            },
            "requantize needs integer activations",
        ),
        (
            {
                "activations": jq.int8(granularity=PerChannel(-1)),
                "observer": jq.observers.mse(axis=-1),
                "requantize": "float32",
            },
            r"requantize needs activations with one scale, PerTensor\(\)",
        ),
    ],
)
def test_static_rules_that_cannot_be(given, message):
    how = {"weights": jq.int8(), "activations": STATIC} | given
    with pytest.raises(ValueError, match=rf"^Rule\('a/\*'\): {message}"):
        Rule("a/*", **how)


@pytest.mark.parametrize("name", ["observer", "requantize"])
def test_a_rule_that_skips_observes_nothing(name):
    given = {"observer": jq.observers.mse(), "requantize": "float32"}[name]
    with pytest.raises(ValueError, match=f"skip=True does not go with {name}"):
        Rule("a", skip=True, **{name: given})


def test_static_presets():
    (rule,) = jq.w8a8_static().rules
    assert (rule.weights, rule.observer) == (jq.int8(), jq.observers.mse())
    assert rule.activations == dataclasses.replace(STATIC, symmetric=False)
    assert rule.attention is rule.requantize is None
    (rule,) = jq.w8a8_static(jq.observers.minmax(), symmetric=True).rules
    assert (rule.activations, rule.observer) == (STATIC, jq.observers.minmax())
    (rule,) = jq.w8a8_static(per_channel=True).rules
    assert rule.activations == jq.int8(granularity=PerChannel(-1))
    assert rule.observer == jq.observers.absmax(axis=-1)
    recipe = jq.w8a8_static(attention=True)
    assert recipe.match("encoder/kernel").attention is None
    assert recipe.attention_rule("encoder/attn").observer == jq.observers.mse()
    assert recipe.attention_rule("encoder/attn").attention.granularity == PerTensor()
    with pytest.raises(ValueError, match="needs axis=-1"):
        jq.w8a8_static(jq.observers.mse(), per_channel=True)
    for mode in ("float32", "fixed_point"):
        (rule,) = jq.w8a8_integer(requantize=mode, symmetric=True).rules
        assert (rule.requantize, rule.activations) == (mode, STATIC)
    for recipe in (jq.w8a8_static(), jq.w8a8_integer()):
        hash(recipe)
        assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe)
        assert "observer=mse()" in repr(recipe.rules[0])


def test_the_first_rule_of_attention_decides():
    recipe = Recipe(
        [
            Rule("head/**", skip=True),
            Rule("a/**", weights=jq.int8()),  # says nothing of attention
            Rule("a/**", attention=STATIC, observer=jq.observers.mse()),
            Rule("**", attention=jq.int8()),
        ]
    )
    assert recipe.attention_rule("head/scores") is None
    assert recipe.attention_rule("a/scores") is recipe.rules[2]
    assert recipe.attention_rule("b/scores").observer is None
    assert Recipe([Rule("a", weights=jq.int8())]).attention_rule("a") is None
