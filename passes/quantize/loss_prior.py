"""What an error in a product costs a model on average, by the part of the model.

Divergence in nats per relative squared error of a product's output: averages over the layers of examples/tiny-moe at 3
and 4 bits (docs/passes/bits_per_weight.md). Only their ratios matter. Keys are the first role of a joint product.
"""

from __future__ import annotations

PRIOR = {
    "attention.q": 0.45,
    "attention.o": 0.3,
    "mlp.gate": 0.13,
    "mlp.down": 0.1,
    "experts.gate": 0.13,
    "experts.down": 0.1,
    "head": 3.5,
}
