"""Observers: monoids that accumulate the range of an activation over batches."""

from jaxquant.observers.base import Observer, Range, finish_stacked, range_to_scale
from jaxquant.observers.histogram import Histogram, histogram
from jaxquant.observers.inputs import Inputs, InputStats, input_stats, inputs
from jaxquant.observers.profile import Profile, profile
from jaxquant.observers.ranges import (
    AbsMax,
    MinMax,
    MovingAverage,
    absmax,
    minmax,
    moving_average,
)
from jaxquant.observers.score import Score, Suggestion, score, suggest
from jaxquant.observers.search import (
    Entropy,
    MeanSquaredError,
    Percentile,
    entropy,
    mse,
    percentile,
)

__all__ = [
    "AbsMax",
    "Entropy",
    "Histogram",
    "InputStats",
    "Inputs",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "Profile",
    "Range",
    "Score",
    "Suggestion",
    "absmax",
    "entropy",
    "finish_stacked",
    "histogram",
    "input_stats",
    "inputs",
    "minmax",
    "moving_average",
    "mse",
    "percentile",
    "profile",
    "range_to_scale",
    "score",
    "suggest",
]
