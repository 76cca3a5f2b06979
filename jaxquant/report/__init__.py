"""Reports on quantized parameters and activations, as printed tables and dicts."""

from jaxquant.report.activations import ActivationReport, SiteReport
from jaxquant.report.events import Edge, Event
from jaxquant.report.report import LeafReport, Report
from jaxquant.report.text import Called, Found, shown

__all__ = [
    "ActivationReport",
    "Called",
    "Edge",
    "Event",
    "Found",
    "LeafReport",
    "Report",
    "SiteReport",
    "shown",
]
