"""Recipes, ordered lists of rules, and `as_recipe`, which accepts other forms of one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jaxquant.encoders import Encoder
from jaxquant.qtensor import QSpec
from jaxquant.recipe.patterns import pattern_matches
from jaxquant.recipe.rewrite import Rewrite
from jaxquant.recipe.rules import Pattern, Rule
from jaxquant.recipe.specs import int8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order; the first that matches a key path applies.

    Attributes:
      rules: the rules, from any iterable; or one spec for all weights, where lookup tables stay
        int8 if the spec has fewer than 8 bits.
      name: shown in reports.
      added: number of rules prepended to those that the name refers to.

    >>> import jaxquant as jq
    >>> recipe = jq.Recipe([jq.Rule("**/head/*", skip=True), jq.Rule("**", weights=jq.int8())])
    >>> recipe.match("head/kernel").skip, recipe.match("body/kernel").skip
    (True, False)
    """

    rules: tuple[Rule, ...]
    name: str = ""
    added: int = 0

    def __init__(
        self, rules: Iterable[Rule] | Rule | QSpec, name: str = "", added: int = 0
    ) -> None:
        if isinstance(rules, QSpec):
            lookup = int8() if rules.format.bits < 8 else None
            name = name or rules.name
            rules = Rule("**", weights=rules, lookup=lookup)
        rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
        if not rules:
            raise ValueError("Recipe: expected at least one rule, got none")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"Recipe: expected rules, got {rule!r}")
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "added", added)

    @property
    def title(self) -> str:
        """The name and the number of added rules; empty without a name."""
        more = f" + {_plural(self.added)}" if self.added else ""
        return self.name + more if self.name else ""

    def match(self, key: str) -> Rule | None:
        """The first rule that matches a key path, or `None`."""
        return next((rule for rule in self.rules if rule.matches(key)), None)

    def prepend(self, *rules: Rule) -> Recipe:
        """This recipe with rules prepended, which take precedence.

        >>> import jaxquant as jq
        >>> jq.w8a8().prepend(jq.Rule("**/head/*", skip=True))
        <Recipe w8a8 + 1 rule: 2 rules>
        """
        return Recipe(rules + self.rules, self.name, self.added + len(rules))

    def skip(self, *patterns: Pattern) -> Recipe:
        """This recipe with every key path that matches one of the patterns left in float.

        A bare name matches levels of that name and everything below: `lm_head` means
        `**/lm_head/**`.

        >>> import jaxquant as jq
        >>> recipe = jq.w8a8().skip("lm_head", "*/scale")
        >>> recipe.match("params/lm_head/kernel").skip, recipe.match("params/mlp/kernel").skip
        (True, False)
        """
        return self.prepend(*(Rule(_anywhere(pattern), skip=True) for pattern in patterns))

    def override(self, pattern: Pattern, **changes: Any) -> Recipe:
        """This recipe with a first rule for `pattern`: its last rule for weights with `changes`.

        Args:
          pattern: pattern of the new rule; bare names as for `skip`.
          **changes: fields of `Rule`, such as `weights=` or `encoder=`.

        Raises:
          ValueError: no rule of the recipe sets weights, or `Rule` raises.

        >>> import jaxquant as jq
        >>> rule = jq.w4a8().override("**/down/*", weights=jq.int8()).match("block/down/kernel")
        >>> rule.weights.name, rule.activations.name
        ('int8', 'int8')
        """
        bases = [rule for rule in self.rules if rule.weights is not None]
        if not bases:
            raise ValueError(
                f"override: no rule of {self!r} sets weights; use prepend(jq.Rule(...))"
            )
        changes = {"pattern": _anywhere(pattern), **changes}
        return self.prepend(dataclasses.replace(bases[-1], **changes))

    def using(self, encoder: Encoder | None = None, rewrite: Rewrite | None = None) -> Recipe:
        """This recipe with an encoder, or a rewrite, in all rules that quantize weights.

        It replaces any encoder or rewrite a rule has; `None` changes nothing.

        >>> import jaxquant as jq
        >>> recipe = jq.w4a16(group=64).using(jq.gptq(), jq.awq())
        >>> recipe.name, recipe.rules[0].encoder
        ('w4a16, awq, gptq', gptq())
        """
        fields = {"encoder": encoder, "rewrite": rewrite}
        new: Any = {name: value for name, value in fields.items() if value is not None}
        rules = [
            rule if rule.weights is None else dataclasses.replace(rule, **new) for rule in self
        ]
        words = [v.name for v in (rewrite, encoder) if v is not None]
        name = ", ".join([self.name, *words]) if self.name else ""
        return Recipe(rules, name, self.added)

    @property
    def attention(self) -> tuple[tuple[Pattern, QSpec | None], ...]:
        """Pattern and spec of the rules for contractions without a parameter, in order.

        Those with `attention=`, and those with `skip=True`, whose spec is `None`; see
        `attention_spec`.
        """
        return tuple(
            (rule.pattern, rule.attention)
            for rule in self.rules
            if rule.attention is not None or rule.skip
        )

    def attention_rule(self, key: str) -> Rule | None:
        """The rule of a contraction without a parameter, by its site's key; `None` to skip it."""
        rules = [rule for rule in self.rules if rule.attention is not None or rule.skip]
        first = next((rule for rule in rules if rule.matches(key)), None)
        return None if first is None or first.skip else first

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __repr__(self) -> str:
        if self.name:
            return f"<Recipe {self.title}: {_plural(len(self.rules))}>"
        return f"Recipe([{', '.join(map(repr, self.rules))}])"


RecipeLike = Recipe | Rule | QSpec | Iterable[Rule]
"""Types that `as_recipe` accepts."""


def _anywhere(pattern: Pattern) -> Pattern:
    """For a bare name, the pattern of its levels at any depth; other patterns unchanged."""
    bare = isinstance(pattern, str) and not set(pattern) & set("/*?[#")
    return f"**/{pattern}/**" if bare else pattern


def _plural(count: int) -> str:
    return f"{count} rule{'' if count == 1 else 's'}"


def as_recipe(value: Any, where: str, params: Any = None) -> Recipe:
    """A `Recipe` from a caller's argument: a recipe, or rules or a spec.

    Args:
      value: the argument.
      where: name of the called function, for errors.
      params: the caller's `params` argument, to detect that the two were swapped.

    Raises:
      ValueError: anything else.

    >>> import jaxquant as jq
    >>> as_recipe(jq.Rule("**", weights=jq.int8()), "ptq")
    Recipe([Rule('**', weights=QSpec(int8, PerChannel(axes=None)))])
    >>> as_recipe(jq.nf4(), "ptq")
    <Recipe nf4: 1 rule>
    >>> as_recipe(jq.w8a8, "ptq")
    Traceback (most recent call last):
    ...
    ValueError: ptq: expected a Recipe such as jq.w8a8(), got the function w8a8; call it: jq.w8a8()
    """
    if isinstance(params, (Recipe, Rule, QSpec)):
        raise ValueError(
            f"{where}: got a {type(params).__name__} for params; params come before the recipe"
        )
    if isinstance(value, Recipe):
        return value
    if isinstance(value, (Rule, QSpec)):
        return Recipe(value)
    got = f"a {type(value).__name__}"
    if isinstance(value, (list, tuple, Iterator)):
        rules = list(value)
        other = [rule for rule in rules if not isinstance(rule, Rule)]
        if not other:
            return Recipe(rules)
        got += f" that holds a {type(other[0]).__name__}, not rules alone"
        if any(isinstance(rule, Recipe) for rule in other):
            got += "; to put rules in front of a recipe use recipe.prepend(*rules)"
    elif isinstance(value, str):
        call = re.sub(r"\W", "", value)
        got = f"the string {value!r}; a preset is a function: jq.{call or 'w8a8'}()"
    elif value is None:
        got = "None"
    elif callable(value):
        name = getattr(value, "__name__", type(value).__name__)
        module = getattr(value, "__module__", "") or ""
        ours, package = module.startswith("jaxquant."), "observers." * ("observers" in module)
        kind = "class" if isinstance(value, type) else "function"
        got = f"the {kind} {name}" + (f"; call it: jq.{package}{name}()" if ours else "")
    raise ValueError(f"{where}: expected a Recipe such as jq.w8a8(), got {got}")


def attention_spec(attention: Iterable[tuple[Pattern, QSpec | None]], key: str) -> QSpec | None:
    """The spec for a contraction without a parameter, from the first pattern that matches.

    Args:
      attention: `Recipe.attention`, also stored as `ContractionConfig.attention`.
      key: key of the contraction's site.

    >>> import jaxquant as jq
    >>> attention_spec(jq.w8a8().attention, "encoder/layer_0/attn").format.name
    'int8'
    """
    for pattern, spec in attention:
        if pattern_matches(pattern, key):
            return spec
    return None
