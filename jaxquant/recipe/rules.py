"""`Rule`: how parameters and contractions that match a pattern are quantized."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Literal

from jaxquant.encoders import Encoder
from jaxquant.observers import Inputs, Observer, inputs
from jaxquant.qtensor import Gradients, Outliers, PerChannel, PerTensor, QSpec
from jaxquant.recipe.patterns import compile_glob, pattern_matches
from jaxquant.recipe.rewrite import Rewrite
from jaxquant.ste import Estimator

Pattern = str | re.Pattern[str]
Requantize = Literal["float32", "fixed_point"]
REQUANTIZE = ("float32", "fixed_point")
_TRAINING = ("weight_estimator", "activation_estimator", "gradients")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters and contractions whose key path matches a pattern are quantized.

    Key paths are joined by `/` (`encoder/layer_0/mlp/kernel`); see `pattern_matches` for globs and
    regular expressions. A contraction without a parameter, as of attention scores, has the path
    of the scope it runs in, and only rules with `attention=` or `skip=True` apply to it.

    Attributes:
      pattern: a glob, or a compiled regular expression.
      weights: how parameters are stored; `None` leaves them in float.
      activations: how the other operand of a contraction with a matching parameter is quantized at
        run time; `None` leaves it in float.
      attention: how both operands are quantized where neither is a parameter.
      encoder: how codes are chosen; `None` rounds to nearest. Some use calibration samples.
      rewrite: moves scale between the weights' input channels and the activations before weights
        are encoded: `jaxquant.smoothquant()`, `jaxquant.awq()`.
      skip: leave matches in float, whatever later rules say.
      lookup: replaces `weights` for lookup tables (embeddings), which lose more at few bits.
      observer: makes `activations` and `attention` static, with ranges that this observer finds in
        calibration samples; see `jaxquant.capture`.
      requantize: keeps results of static contractions as integers, int32 sums that become the next
        layer's int8 input: `"float32"` by a float32 multiplier, `"fixed_point"` by an int32
        multiplier and a rounding shift.

      weight_estimator: gradient estimator for the rounding of weights in training, and which
        parameters are learned; from `jaxquant.ste`. `None` is `ste.straight_through()`.
      activation_estimator: the same for activations. One that learns a step makes them static.
      gradients: how gradients are quantized in training, for integer contractions in the backward
        pass; `None` leaves these in float.
      outliers: which columns of activations stay in float in contractions with a matching parameter
        (LLM.int8()); needs symmetric integer activations with a scale for each row. Convolutions
        and training ignore it.

    Raises:
      ValueError: nothing is set, or `skip` with other fields; activations without weights;
        activations or attention in a format other than integers or 8-bit floats, or with a
        granularity other than `PerTensor()` or `PerChannel()`; an observer without either, or with
        a scale for each row; `requantize` without static integer activations; an estimator or
        `gradients` without the spec it applies to.

    >>> import jaxquant as jq
    >>> rule = jq.Rule("**/mlp/**", weights=jq.int8(), activations=jq.int8())
    >>> rule.matches("params/encoder/mlp/kernel")
    True
    """

    pattern: Pattern
    _: dataclasses.KW_ONLY
    weights: QSpec | None = None
    activations: QSpec | None = None
    attention: QSpec | None = None
    encoder: Encoder | None = None
    rewrite: Rewrite | None = None
    skip: bool = False
    lookup: QSpec | None = None
    observer: Observer | None = None
    requantize: Requantize | None = None
    weight_estimator: Estimator | None = None
    activation_estimator: Estimator | None = None
    gradients: Gradients | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            compile_glob(self.pattern)
        elif not (isinstance(self.pattern, re.Pattern) and isinstance(self.pattern.pattern, str)):
            raise ValueError(f"Rule: expected a glob or a compiled regex, got {self.pattern!r}")
        specs = {n: getattr(self, n) for n in ("weights", "activations", "attention", "lookup")}
        for name, spec in specs.items():
            if not (spec is None or isinstance(spec, QSpec)):
                raise ValueError(
                    f"{self._name}: {name} takes a QSpec such as jq.int8() or "
                    f"jq.QSpec('nf4', jq.PerGroup(64)), got {spec!r}"
                )
        actions = [name for name, spec in specs.items() if spec is not None]
        for name, value, like in (
            ("encoder", self.encoder, "rtn() or gptq()"),
            ("rewrite", self.rewrite, "awq() or smoothquant()"),
        ):
            ours = str(getattr(value, "__module__", "")).startswith("jaxquant.")
            if ours and (inspect.isroutine(value) or isinstance(value, type)):
                raise ValueError(
                    f"{self._name}: {name} takes a value such as {like}, got {value!r}, which "
                    "has not been called"
                )
        if isinstance(self.encoder, Rewrite):
            raise ValueError(
                f"{self._name}: {self.encoder!r} is a rewrite, not an encoder: rewrite="
                f"{self.encoder!r}"
            )
        if self.encoder is not None and not isinstance(self.encoder, Encoder):
            raise ValueError(
                f"{self._name}: encoder takes a value such as rtn(), or of a class of your own "
                f"derived from jaxquant.encoders.Encoder; got {self.encoder!r}"
            )
        if self.rewrite is not None:
            if not isinstance(self.rewrite, Rewrite) or isinstance(self.rewrite, type):
                raise ValueError(
                    f"{self._name}: rewrite takes a value such as awq(), got {self.rewrite!r}"
                )
            if self.weights is None:
                raise ValueError(f"{self._name}: rewrite without weights")
        if self.skip:
            actions += [
                n
                for n in ("encoder", "rewrite", "observer", "requantize", "outliers", *_TRAINING)
                if getattr(self, n)
            ]
        if self.skip and actions:
            raise ValueError(f"{self._name}: skip=True does not go with {', '.join(actions)}")
        if not self.skip and not actions:
            raise ValueError(
                f"{self._name} does nothing: give weights, activations, attention or lookup, "
                "or skip=True"
            )
        if self.activations is not None and self.weights is None and self.lookup is None:
            raise ValueError(
                f"{self._name}: activations without weights; both operands must be quantized for "
                "a contraction to run on integers"
            )
        for name in ("weights", "lookup"):
            spec = specs[name]
            learner = self.weight_estimator if name == "weights" else None
            if isinstance(learner, Estimator) and "codebook" in learner.learns:
                continue  # a learned codebook replaces the values of the format
            if spec is not None and spec.symmetric and not spec.format.min < 0:
                raise ValueError(
                    f"{self._name}: {name} in {spec.format.name} without a zero point would lose "
                    "every negative value; use symmetric=False or a signed format"
                )
        for name in ("activations", "attention"):
            _check_format(f"{self._name}: {name}", specs[name])
            if self.observer is None:
                _check_dynamic(f"{self._name}: {name}", specs[name])
        self._check_static()
        self._check_training()
        self._check_outliers()

    @property
    def gathers(self) -> Inputs | None:
        """The observer of the input statistics that its encoder and rewrite need, if any."""
        steps = [value for value in (self.encoder, self.rewrite) if value is not None]
        observers = [step.observer for step in steps if step.observer is not None]
        return inputs(any(observer.hessian for observer in observers)) if observers else None

    def _check_outliers(self) -> None:
        if self.outliers is None:
            return
        if not isinstance(self.outliers, Outliers):
            raise ValueError(
                f"{self._name}: outliers takes jq.qtensor.Outliers(...), got {self.outliers!r}"
            )
        spec = self.activations
        rows = spec is not None and spec.granularity == PerChannel() and spec.symmetric
        if spec is None or not rows or not spec.format.is_integer or not spec.format.signed:
            raise ValueError(
                f"{self._name}: outliers need symmetric integer activations with a scale for each "
                f"row, such as jq.int8(range='qmax'), got {spec!r}"
            )
        if self.observer is not None:
            raise ValueError(f"{self._name}: outliers with an observer; leave one of them out")
        fixed = self.encoder is not None and self.encoder.outliers is not None
        if self.outliers.calibrated and not fixed:
            raise ValueError(
                f"{self._name}: calibrated outliers are chosen by the encoder; use "
                "encoder=vectorwise(outliers)"
            )

    def _check_static(self) -> None:
        specs = [s for s in (self.activations, self.attention) if s is not None]
        if self.observer is not None:
            if not isinstance(self.observer, Observer) or isinstance(self.observer, type):
                raise ValueError(
                    f"{self._name}: observer takes a value such as jq.observers.mse(), "
                    f"got {self.observer!r}"
                )
            if not specs:
                raise ValueError(f"{self._name}: observer without activations or attention")
            for name, spec in (("activations", self.activations), ("attention", self.attention)):
                self._check_granularity(name, spec)
                if spec is not None and spec.format.bits > 8:
                    raise ValueError(
                        f"{self._name}: with an observer, {name} have at most 8 bits, "
                        f"got {spec.format.name}"
                    )
        if self.requantize is None:
            return
        if self.requantize not in REQUANTIZE:
            raise ValueError(
                f"{self._name}: requantize: expected one of {REQUANTIZE}, got {self.requantize!r}"
            )
        if not (self.observer and self.activations and self.activations.format.is_integer):
            raise ValueError(f"{self._name}: requantize needs integer activations with an observer")

    def _check_granularity(self, name: str, spec: QSpec | None) -> None:
        if spec is None or self.observer is None:
            return
        axis = self.observer.axis
        if spec.granularity == PerTensor():
            if axis is None:
                return
            raise ValueError(
                f"{self._name}: {name} has one scale, and {self.observer} finds a range for each "
                f"channel; use axis=None, or granularity=PerChannel(axes={axis!r})"
            )
        if name == "attention" or spec.granularity not in (PerChannel(-1), PerChannel((-1,))):
            raise ValueError(
                f"{self._name}: a scale for each row cannot be static; with an observer, "
                f"{name} takes granularity=PerTensor()"
                f"{'' if name == 'attention' else ' or PerChannel(axes=-1)'}, got {spec!r}"
            )
        if axis not in (-1, (-1,)):
            raise ValueError(
                f"{self._name}: {name} has a scale for each channel of the last axis, so the "
                f"observer needs axis=-1, got {self.observer}"
            )
        if self.requantize is not None:
            raise ValueError(
                f"{self._name}: requantize needs activations with one scale, PerTensor()"
            )

    def _check_training(self) -> None:
        for name, spec in (
            ("weight_estimator", self.weights or self.lookup),
            ("activation_estimator", self.activations),
        ):
            estimator = getattr(self, name)
            if estimator is None:
                continue
            if not isinstance(estimator, Estimator) or isinstance(estimator, type):
                raise ValueError(
                    f"{self._name}: {name} takes a value such as jq.ste.lsq(), got {estimator!r}"
                )
            if spec is None:
                raise ValueError(f"{self._name}: {name} without {name.partition('_')[0]}s")
        learner = self.activation_estimator
        if learner is not None and learner.learns:
            if "codebook" in learner.learns:
                raise ValueError(f"{self._name}: {learner!r} is for weights only")
            if self.observer is not None:
                raise ValueError(
                    f"{self._name}: {learner!r} learns the range that the observer would find; "
                    "leave one of them out"
                )
            if self.activations is not None and self.activations.granularity != PerTensor():
                raise ValueError(
                    f"{self._name}: {learner!r} learns one step, so activations take "
                    f"granularity=PerTensor(), got {self.activations!r}"
                )
        if self.gradients is not None:
            if not isinstance(self.gradients, Gradients):
                raise ValueError(
                    f"{self._name}: gradients: expected jaxquant.qtensor.Gradients(...), "
                    f"got {self.gradients!r}"
                )
            if self.activations is None:
                raise ValueError(f"{self._name}: gradients without activations")

    @property
    def _name(self) -> str:
        return f"Rule({self.key!r})"

    @property
    def key(self) -> str:
        """The pattern as text."""
        return self.pattern if isinstance(self.pattern, str) else self.pattern.pattern

    def matches(self, key: str) -> bool:
        """Whether the rule's pattern matches a key path."""
        return pattern_matches(self.pattern, key)

    def __repr__(self) -> str:
        parts = [repr(self.key) if isinstance(self.pattern, str) else repr(self.pattern)]
        for f in dataclasses.fields(self)[1:]:
            value = getattr(self, f.name)
            if value is not None and value is not False:
                parts.append(f"{f.name}={value!r}")
        return f"Rule({', '.join(parts)})"


def _check_format(where: str, spec: QSpec | None) -> None:
    if spec is None:
        return
    fmt = spec.format
    float8 = fmt.is_float and fmt.bits == 8 and fmt.signed
    if not (fmt.is_integer or float8):
        raise ValueError(f"{where}: expected an integer or 8-bit float format, got {fmt.name}")


def _check_dynamic(where: str, spec: QSpec | None) -> None:
    if spec is not None and spec.granularity not in (PerTensor(), PerChannel()):
        raise ValueError(
            f"{where}: expected PerTensor() or PerChannel() (one scale per row), "
            f"got {spec.granularity!r}"
        )
