"""OpenVINO behind the requests of `bench.peers.child`. Runs in the peers' venv.

    python -m bench.peers.openvino_child MODEL_DIR --threads 2 [--via infer|genai]

MODEL_DIR is what `optimum-cli export openvino` writes. `infer` drives the stateful model by infer requests, with the
head reduced to the last position as OpenVINO GenAI does; `genai` asks its LLMPipeline and takes its own performance
metrics (time to the first token, time per output token), as users see them, sampling included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from bench.peers.child import Answer, serve, token_ids


def last_position_only(model: ov.Model) -> None:
    """Puts a slice in front of the last product, so that a prompt computes logits for its last position alone."""
    from openvino import opset13 as ops

    result = next(r for r in model.get_results() if "logits" in r.output(0).get_names() | r.input_value(0).get_names())
    node = result.input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = node.input_value(0)
    start, stop, step, axis = (ops.constant(np.array([v], np.int64)) for v in (-1, np.iinfo(np.int64).max, 1, 1))
    sliced = ops.slice(rows, start, stop, step, axis)
    node.input(0).replace_source_output(sliced.output(0))
    model.validate_nodes_and_infer_types()


class Infer:
    """The stateful model and one infer request."""

    def __init__(self, options: argparse.Namespace) -> None:
        core = ov.Core()
        model = core.read_model(Path(options.model) / "openvino_model.xml")
        last_position_only(model)
        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": options.threads, "NUM_STREAMS": 1}
        compiled = core.compile_model(model, "CPU", properties)
        names = {name for port in compiled.inputs for name in port.get_names()}
        self.extra = {"beam_idx": np.zeros(1, np.int32)} if "beam_idx" in names else {}
        self.has_positions = "position_ids" in names
        self.request = compiled.create_infer_request()
        self.kv = str(compiled.get_property("KV_CACHE_PRECISION"))
        self.filled = 0

    def restart(self) -> None:
        """An empty context."""
        self.request.reset_state()
        self.filled = 0

    def step(self, ids: list[int]) -> None:
        """Appends tokens; the logits of the last are computed."""
        count = len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.filled + count), np.int64),
            **self.extra,
        }
        if self.has_positions:
            inputs["position_ids"] = np.arange(self.filled, self.filled + count, dtype=np.int64)[None]
        self.request.infer(inputs, share_inputs=True, share_outputs=True)
        self.filled += count


class OpenVino:
    """Prompt and decode by one of the two ways."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
        self.infer = Infer(options) if options.via == "infer" else None
        self.prompts = 0
        if options.via == "genai":
            import openvino_genai

            properties = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
            self.pipe = openvino_genai.LLMPipeline(options.model, "CPU", **properties)
            self.generation = openvino_genai.GenerationConfig
            self.inputs = openvino_genai.TokenizedInputs

    def about(self, request: dict[str, Any]) -> Answer:
        """Version and size."""
        packages = ("openvino", "openvino-genai", "nncf")
        return {
            "version": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
            "bytes": (Path(self.options.model) / "openvino_model.bin").stat().st_size,
            "threads": self.options.threads,
            "kv": self.infer.kv if self.infer else "default",
        }

    def prefill(self, request: dict[str, Any]) -> Answer:
        """Seconds of one prompt of `tokens`, from an empty context."""
        ids = token_ids(request["tokens"], self.vocab_size)
        if self.infer is None:
            self.prompts += 1  # the pipeline keeps the cache of prompts it has seen: each begins with another token
            return {"seconds": self._generate([self.prompts % self.vocab_size, *ids[1:]], 1)[0]}
        self.infer.restart()
        start = time.perf_counter()
        self.infer.step(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(self, request: dict[str, Any]) -> Answer:
        """Seconds of `tokens` steps of one token behind about `depth` positions and `warm` steps.

        The context is not wound back between requests at one depth: it has no such call. It starts `ahead` positions
        before the depth, so that the mean over the requests of a row is the depth.
        """
        depth, warm, ahead = request["depth"], request["warm"], request.get("ahead", 0)
        count = request["tokens"] + warm
        ids = token_ids(depth + count, self.vocab_size)
        if self.infer is None:
            prompt = ids[: max(depth, 1)]
            first, per_token = self._generate(prompt, count + 1)
            return {"seconds": per_token * request["tokens"], "first": first}
        if depth == 0 or not depth - ahead <= self.infer.filled <= depth + ahead:
            self.infer.restart()
            if depth:
                self.infer.step(ids[: depth - ahead])
        for token in ids[depth : depth + warm]:
            self.infer.step([token])
        start = time.perf_counter()
        for token in ids[depth + warm :]:
            self.infer.step([token])
        return {"seconds": time.perf_counter() - start}

    def _generate(self, ids: list[int], count: int) -> tuple[float, float]:
        """(seconds to the first token, seconds per token after it), by the pipeline's own metrics."""
        config = self.generation()
        config.max_new_tokens = count
        config.min_new_tokens = count
        config.do_sample = False
        config.ignore_eos = True
        tokens = np.array([ids], np.int64)
        result = self.pipe.generate(self.inputs(ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens))), config)
        metrics = result.perf_metrics
        return metrics.get_ttft().mean / 1000, metrics.get_tpot().mean / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--via", choices=["infer", "genai"], default="infer")
    engine = OpenVino(parser.parse_args())
    serve({name: getattr(engine, name) for name in ("about", "prefill", "decode")})


if __name__ == "__main__":
    main()
