"""Capture: runs a function on sample batches and gathers statistics of its activations by site."""

from jaxquant.capture.batches import arguments
from jaxquant.capture.judge import activation_report
from jaxquant.capture.plan import Plan, observed_call, plan_of, require_observers
from jaxquant.capture.run import CaptureError, CaptureKeywords, batch_step, capture, capture_with
from jaxquant.capture.statistics import Observed, Statistics

__all__ = [
    "CaptureError",
    "CaptureKeywords",
    "Observed",
    "Plan",
    "Statistics",
    "activation_report",
    "arguments",
    "batch_step",
    "capture",
    "capture_with",
    "observed_call",
    "plan_of",
    "require_observers",
]
