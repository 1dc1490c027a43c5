"""Which experts a model's routers chose: recorded traces, synthetic routers, and how local the choices are."""

from hw_targets.routing.locality import LayerLocality, Locality, locality, popularity
from hw_targets.routing.synthetic import MIXED, SESSION, Router, synthetic_trace
from hw_targets.routing.trace import Batch, RoutingTrace
from hw_targets.routing.trace_file import parse_trace, read_trace, write_trace

__all__ = [
    "MIXED",
    "SESSION",
    "Batch",
    "LayerLocality",
    "Locality",
    "Router",
    "RoutingTrace",
    "locality",
    "parse_trace",
    "popularity",
    "read_trace",
    "synthetic_trace",
    "write_trace",
]
