"""The peer: transformers on torch, eager, bf16, random weights of the same shape. Prints one JSON line.

python -m bench.torch_peer CONFIG_DIR --prompt 512 --generate 16 --threads 2 --repetitions 3
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    config = AutoConfig.from_pretrained(options.config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (1, options.prompt))
    prefill, decode = [], []
    with torch.inference_mode():
        model(ids[:, :32], logits_to_keep=1)  # warm-up
        for _ in range(options.repetitions):
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            prefill.append(options.prompt / (time.perf_counter() - start))
            out = model(ids[:, :8], use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            start = time.perf_counter()
            for _ in range(options.generate):
                out = model(token, past_key_values=cache, use_cache=True)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            decode.append(options.generate / (time.perf_counter() - start))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"prefill": prefill, "decode": decode, "versions": versions}))


if __name__ == "__main__":
    main()
