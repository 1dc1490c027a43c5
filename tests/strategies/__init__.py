"""Hypothesis strategies of valid IR that nobody wrote by hand, with everything needed to run it."""

from tests.strategies.batches import Batch, batches
from tests.strategies.generated import GeneratedModule
from tests.strategies.graph_modules import FEATURES, graph_modules
from tests.strategies.step_modules import step_modules, step_shapes

__all__ = ["FEATURES", "Batch", "GeneratedModule", "batches", "graph_modules", "step_modules", "step_shapes"]
