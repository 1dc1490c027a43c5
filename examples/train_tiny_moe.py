"""Train, evaluate and sample examples/tiny-moe, the repository's own Mixture-of-Experts language model.

Takes the Python standard library of the running interpreter (see corpus.py); gives a Hugging Face directory. Training
runs on one core until a wall-clock budget is spent, and the learning rate falls to zero at its end; a killed run goes
on from its last saved state with --resume.

    python examples/train_tiny_moe.py --minutes 60              # writes examples/tiny-moe
    python examples/train_tiny_moe.py --evaluate                # perplexity on held_out.txt
    python examples/train_tiny_moe.py --generate "def main("    # greedy text
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples import corpus
from examples.moe_model import MoeModel, MoeShape, load_checkpoint, save_checkpoint

MODEL_FOLDER = Path(__file__).resolve().parent / "tiny-moe"
EVALUATION_WINDOW = 512  # tokens predicted per window; windows do not overlap and start without context
BALANCE_WEIGHT = 0.01  # of the load-balancing loss; the value used by Switch and Qwen3-MoE is of this order
MUON_RATE, ADAM_RATE, NORM_RATE = 0.02, 3e-3, 2e-3
WARMUP, DECAY_START = 0.01, 0.35  # as fractions of the budget
# Window length from a fraction of the budget on: short windows first, because attention over them is cheaper, and
# the model's full context at the end, so that no position is untrained.
WINDOW_LENGTHS = ((0.0, 256), (0.5, 512), (0.85, MoeShape().max_position_embeddings))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by a Newton-Schulz iteration; for matrices and stacks of matrices.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). It reaches the same loss
    in roughly half the tokens AdamW needs, which is what counts on one core.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.02) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(state["momentum"], group["momentum"]))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix, approximately; shape (..., rows, columns)."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def learning_rate(progress: float) -> float:
    """Multiplier of the peak rate: warm up, hold, then fall linearly to zero at progress 1."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return 1.0 if progress < DECAY_START else max(0.0, 1 - (progress - DECAY_START) / (1 - DECAY_START))


def windows(stream: np.ndarray, length: int, tokens: int, random: np.random.Generator) -> Tensor:
    """One batch of random windows. Shape (tokens // length, length + 1): inputs and, one later, targets."""
    starts = random.integers(0, len(stream) - length - 1, tokens // length)
    return torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]))


@torch.no_grad()
def evaluate(model: MoeModel, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """Mean loss of `text` (documents separated by `<|endoftext|>`), in non-overlapping windows.

    Returns:
        tokens, nats_per_token, perplexity (per token), bits_per_byte (of the UTF-8 text).
    """
    stream = torch.tensor(tokenizer.encode(text).ids)
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, EVALUATION_WINDOW):
        piece = stream[start : start + EVALUATION_WINDOW + 1]
        logits, _ = model(piece[None, :-1])
        total += float(functional.cross_entropy(logits[0].double(), piece[1:], reduction="sum"))
        count += len(piece) - 1
    size = len(text.replace(corpus.END_OF_TEXT, "").encode())
    return {
        "tokens": count,
        "nats_per_token": total / count,
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / size,
    }


@torch.no_grad()
def generate(model: MoeModel, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Prompt and up to `count` greedy tokens, as text."""
    ids = tokenizer.encode(prompt).ids
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    for _ in range(min(count, model.shape.max_position_embeddings - len(ids))):
        best = int(model(torch.tensor([ids]))[0][0, -1].argmax())
        if best == end:
            break
        ids.append(best)
    return tokenizer.decode(ids)


def prepare(folder: Path, vocab_size: int) -> tuple[Tokenizer, np.ndarray, str]:
    """Write tokenizer files and held_out.txt into `folder`; give the tokenizer, training stream and held-out text."""
    documents = corpus.standard_library_documents()
    training = [text for name, text in documents if not corpus.is_held_out(name)]
    held_out = "".join(corpus.END_OF_TEXT + text for name, text in documents if corpus.is_held_out(name))
    tokenizer = corpus.train_tokenizer(training, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = corpus.END_OF_TEXT
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": special,
        "eos_token": special,
        "pad_token": special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MoeShape().max_position_embeddings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "held_out.txt").write_text(held_out, encoding="utf-8")
    stream = corpus.token_stream(tokenizer, training)
    print(f"{len(training)} documents, {len(stream)} training tokens, {len(held_out)} held-out characters", flush=True)
    return tokenizer, stream, held_out


def train(
    folder: Path, state_file: Path, minutes: float, batch_tokens: int, resume: bool, export_minutes: float
) -> None:
    """Train until `minutes` of work are spent and leave the final model in `folder`."""
    shape = MoeShape()
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    tokenizer, stream, held_out = prepare(folder, shape.vocab_size)
    model = MoeModel(shape)
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "router" not in n and n != "embedding"]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    tables = [p for n, p in model.named_parameters() if n == "embedding" or "router" in n]
    optimizers = [
        Muon(matrices, MUON_RATE),
        torch.optim.AdamW(
            [{"params": tables, "lr": ADAM_RATE}, {"params": vectors, "lr": NORM_RATE}],
            betas=(0.9, 0.98),
            weight_decay=0.0,
            foreach=True,
        ),
    ]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, spent, exported = 0, 0.0, export_minutes <= 0
    if resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        random = np.random.default_rng(step)
    first_step = step
    budget, began, saved_at, mean_loss = minutes * 60, time.monotonic() - spent, spent, 0.0
    while (spent := time.monotonic() - began) < budget:
        progress = spent / budget
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(progress)
        window = next(length for start, length in reversed(WINDOW_LENGTHS) if progress >= start)
        batch = windows(stream, window, batch_tokens, random)
        with torch.autocast("cpu", torch.bfloat16):
            logits, balance = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + BALANCE_WEIGHT * balance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        step += 1
        mean_loss += (float(loss.detach()) - mean_loss) * max(0.02, 1 / (step - first_step))
        if step % 20 == 0:
            print(
                f"step {step} minutes {spent / 60:.1f} loss {mean_loss:.3f} balance {float(balance.detach()):.3f} "
                f"tokens {step * batch_tokens}",
                flush=True,
            )
        if spent - saved_at > 300:
            saved_at = spent
            temporary = state_file.with_suffix(".new")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step,
                    "spent": spent,
                },
                temporary,
            )
            temporary.replace(state_file)
            print({k: round(v, 4) for k, v in evaluate(model, tokenizer, held_out).items()}, flush=True)
        if not exported and spent > export_minutes * 60:
            exported = True
            save_checkpoint(model, folder)
            print(f"exported at step {step}", flush=True)
    save_checkpoint(model, folder)
    print(evaluate(load_checkpoint(folder), tokenizer, held_out))


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=MODEL_FOLDER, help="the model directory")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget of training")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("build/tiny-moe-state.pt"), help="where a run is saved")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--export-minutes", type=float, default=0.0, help="also write an early model at this time")
    parser.add_argument("--evaluate", action="store_true", help="print the perplexity on held_out.txt and stop")
    parser.add_argument("--generate", metavar="PROMPT", help="print greedy text and stop")
    parser.add_argument("-n", type=int, default=128, help="tokens for --generate")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.evaluate or options.generate is not None:
        model = load_checkpoint(options.folder)
        tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
        if options.generate is not None:
            print(generate(model, tokenizer, options.generate, options.n))
        if options.evaluate:
            print(json.dumps(evaluate(model, tokenizer, (options.folder / "held_out.txt").read_text("utf-8"))))
        return
    options.state.parent.mkdir(parents=True, exist_ok=True)
    train(options.folder, options.state, options.minutes, options.batch_tokens, options.resume, options.export_minutes)


if __name__ == "__main__":
    main()
