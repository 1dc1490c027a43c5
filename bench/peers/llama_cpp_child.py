"""llama.cpp behind the requests of `bench.peers.child`, through its low-level interface. Runs in the peers' venv.

    python -m bench.peers.llama_cpp_child MODEL.gguf --threads 2 --context 4096 [--kv f16|q8_0] [--experts]

As llama-bench measures: a prompt is one batch (micro-batches of 512), decoding is one token a call with logits;
sampling and tokenizing are not part of it. `--experts` also reads what the router chose (not for timing).
"""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import llama_cpp

from bench.peers.child import Answer, serve, token_ids

_NE, _NB = 16, 48  # offsets of ne[4] and nb[4] in struct ggml_tensor: after type and buffer


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user: ctypes.c_void_p) -> None:
    """Its log is long and goes nowhere."""


class _ExpertCounter:
    """Collects which experts the router chose, by layer, from the tensors `ffn_moe_topk-LAYER`."""

    def __init__(self) -> None:
        library = ctypes.CDLL(llama_cpp.llama_cpp._lib._name.replace("libllama", "libggml-base"))
        self._name = library.ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self._data = library.ggml_get_data
        self._data.restype, self._data.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self.chosen: dict[str, dict[int, int]] = {}
        self.callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._visit)

    def _visit(self, tensor: int, asking: bool, user: object) -> bool:
        name = self._name(tensor).decode()
        if not name.startswith("ffn_moe_topk-"):
            return not asking
        if not asking:
            experts, tokens = (ctypes.c_int64 * 2).from_address(tensor + _NE)
            steps = (ctypes.c_size_t * 2).from_address(tensor + _NB)
            base = self._data(tensor)
            counts = self.chosen.setdefault(name, {})
            for token in range(tokens):
                for rank in range(experts):
                    expert = ctypes.c_int32.from_address(base + token * steps[1] + rank * steps[0]).value
                    counts[expert] = counts.get(expert, 0) + 1
        return True


class LlamaCpp:
    """A loaded model and one context with one sequence."""

    def __init__(self, options: argparse.Namespace) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = not options.mapped
        self.model = llama_cpp.llama_model_load_from_file(options.model.encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {options.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = options.context, 1
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = options.threads
        if options.kv == "q8_0":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
        self.counter = _ExpertCounter() if options.experts else None
        if self.counter:
            params.cb_eval = self.counter.callback
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.options = options
        self.filled = 0

    def about(self, request: dict[str, Any]) -> Answer:
        """Version, size, features."""
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "bytes": llama_cpp.llama_model_size(self.model),
            "parameters": llama_cpp.llama_model_n_params(self.model),
            "threads": self.options.threads,
            "features": llama_cpp.llama_print_system_info().decode(),
        }

    def prefill(self, request: dict[str, Any]) -> Answer:
        """Seconds of one prompt of `tokens`, from an empty context."""
        ids = token_ids(request["tokens"], self.vocab_size, request.get("topics", 1))
        self._forget(0)
        start = time.perf_counter()
        self._decode(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(self, request: dict[str, Any]) -> Answer:
        """Seconds of `tokens` steps of one token, or of as many as `seconds` allow, behind `depth` positions and `warm`
        steps."""
        depth, warm = request["depth"], request["warm"]
        count = request["tokens"] + warm
        ids = token_ids(depth + count, self.vocab_size, request.get("topics", 1))
        if self.filled < depth or depth == 0:
            self._forget(0)
            for first in range(0, depth, 512):
                self._decode(ids[first : min(first + 512, depth)])
        self._forget(depth)
        for token in ids[depth : depth + warm]:
            self._decode([token])
        start, done = time.perf_counter(), 0
        for token in ids[depth + warm :]:
            self._decode([token])
            done += 1
            if time.perf_counter() - start > request.get("seconds", 1e9):
                break
        return {"seconds": time.perf_counter() - start, "tokens": done}

    def experts(self, request: dict[str, Any]) -> Answer:
        """How many different experts the layers used over `tokens` decoded tokens: mean, least, most."""
        if self.counter is None:
            raise ValueError("started without --experts")
        self.counter.chosen.clear()
        self.decode({"depth": 0, "tokens": request["tokens"], "warm": 0})
        distinct = [len(counts) for counts in self.counter.chosen.values()]
        return {"mean": sum(distinct) / len(distinct), "least": min(distinct), "most": max(distinct)}

    def _forget(self, first: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, 0, first, -1)
        self.filled = first

    def _decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        self.filled += len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--kv", choices=["f16", "q8_0"], default="f16")
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--mapped", action="store_true", help="weights stay as the file has them: nothing is repacked")
    engine = LlamaCpp(parser.parse_args())
    serve({name: getattr(engine, name) for name in ("about", "prefill", "decode", "experts")})


if __name__ == "__main__":
    main()
