"""Values that make a random mixture of experts route as in a recorded session: `make_model.py --router session`.

Experts are as popular as by Zipf's law with the exponent 1.4, which meets the recorded trace best (docs/
expert_caches.md). Token id belongs to topic id % TOPICS: the first elements of its embedding are 0 but for a mark at
its topic, which the routers turn into the topic's popularities (`hw_targets.routing.router_weights`). Text that
stays with a topic for a while, then goes on to the next, routes as a session that drifts; tokens of all topics mixed
route much more evenly. Takes what the tensors would be otherwise; only the embedding and the routers change.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from examples.model_presets import Fields, ModelRequestError, TensorShape
from hw_targets.routing.router_weights import session_router_weights

TOPICS = 8
EXPONENT = 1.4
MARK = 8.0  # times the deviation of the embedding
LEAST_DEVIATION = 4.0  # of the embedding's elements: layers add about 1 each, and must not drown the marks
Draw = Callable[[TensorShape], Iterator[np.ndarray]]


class SessionRouter:
    """The model with these fields; `draw` gives a tensor's values otherwise, `deviation` those of the embedding."""

    def __init__(self, fields: Fields, draw: Draw, deviation: float, seed: int) -> None:
        experts = fields.get("num_experts", fields.get("num_local_experts"))
        if not experts:
            raise ModelRequestError(f"a {fields['model_type']} model has no router to make")
        if experts <= fields["num_experts_per_tok"] or fields["hidden_size"] <= TOPICS:
            raise ModelRequestError(f"a session router needs experts to choose among, and a hidden_size above {TOPICS}")
        if deviation < LEAST_DEVIATION:
            least = LEAST_DEVIATION * fields["hidden_size"] ** 0.5
            raise ModelRequestError(
                f"a session router needs an embedding that outweighs the layers: an embedding scale of {least:.0f} "
                f"or more (or, with an init_std, one that gives it a deviation of {LEAST_DEVIATION:g})"
            )
        self._draw, self._deviation, self._seed = draw, deviation, seed
        self._hidden, self._experts, self._top_k = fields["hidden_size"], experts, fields["num_experts_per_tok"]

    def values(self, tensor: TensorShape) -> Iterator[np.ndarray]:
        """The values of one tensor in row-major order, in float32 blocks."""
        if tensor.role == "embedding":
            return self._embedding(tensor)
        if tensor.name.endswith(".gate.weight"):
            return iter([self._router(tensor)])
        return self._draw(tensor)

    def _embedding(self, tensor: TensorShape) -> Iterator[np.ndarray]:
        start = 0
        for block in self._draw(tensor):
            token, element = np.divmod(np.arange(start, start + len(block)), self._hidden)
            start += len(block)
            marked = np.where(element == token % TOPICS, np.float32(MARK * self._deviation), np.float32(0))
            yield np.where(element < TOPICS, marked, block)

    def _router(self, tensor: TensorShape) -> np.ndarray:
        """The router's input is the embedding divided by its root mean square, times the weights of the norm before."""
        layer = tensor.name.split(".mlp.")[0].split(".block_sparse_moe.")[0]
        norm = TensorShape(f"{layer}.post_attention_layernorm.weight", (self._hidden,), "norm")
        mean_square = (MARK**2 + self._hidden - TOPICS) / self._hidden  # in units of the embedding's variance
        scale = np.concatenate(list(self._draw(norm))) / mean_square**0.5  # weights of norms are near 1
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {tensor.name}".encode()).digest()[:8], "big")
        marks = (MARK * scale[:TOPICS]).tolist()
        weights = session_router_weights(
            self._experts, self._top_k, marks, scale[TOPICS:], exponent=EXPONENT, seed=seed
        )
        return weights.reshape(-1)
