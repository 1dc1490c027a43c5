"""Loss over bits per weight: the bits solver beside uniform formats of the same size. Prints markdown.

    python -m bench.bits_curve [--model examples/tiny-moe] [--text examples/tiny-moe/held_out.txt] [--windows 24]

Loss is the mean KL divergence of the logits from the model's own float32 ones, in nats per token, over windows of the
text. Every assignment has the bytes of the uniform format in its row or fewer. One column for each way to learn the
sensitivities: a text of the model's own (the default of --bits-per-weight), and the weights alone. The numbers that
weights and activations stand for are those of a build; products are added up in float32 by numpy, so this is the loss
of the formats, without that of the kernels' roundings and of a low-bit KV cache.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.measure import table
from frontends.config import open_config, token_ids
from frontends.huggingface import import_model
from passes.quantize.bit_choice import BitProblem
from passes.quantize.bit_recipe import candidates_of
from passes.quantize.bits_solver import solve, uniform_solutions
from passes.quantize.sensitivity import WholeModel, estimate, measure
from passes.quantize.sensitivity_table import SensitivityTable
from passes.quantize.weight_groups import joined_products
from stratum.api import ensure_built
from stratum.bit_budget import CHECK_EVERY, LENGTH, SEQUENCES
from stratum.calibration_tokens import tokens_of_model, tokens_of_text


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=Path("examples/tiny-moe"))
    arguments.add_argument("--text", type=Path, default=Path("examples/tiny-moe/held_out.txt"))
    arguments.add_argument("--windows", type=int, default=24)
    arguments.add_argument("--recipe", help="Candidates, as --recipe names them; default: integers of 2 to 8 bits.")
    arguments.add_argument("--kept", type=Path, help="Folder for sensitivities, so that a second run is quick.")
    print(curve(arguments.parse_args()))


def curve(options: argparse.Namespace) -> str:
    """The table."""
    imported = import_model(options.model)
    with imported.checkpoint as checkpoint, tempfile.TemporaryDirectory() as folder:
        kept = options.kept or Path(folder)
        func, products = joined_products(imported.module, {n: s.role for n, s in imported.weights.items()})
        groups = [group for _, group in products]
        candidates = candidates_of(options.recipe)
        vocab = imported.config.vocab_size
        tables = {name: SensitivityTable(kept / f"{name}.jsonl") for name in ("own text", "weights alone")}
        estimate(products, checkpoint.read, candidates, tables["weights alone"])
        begin = next(iter(token_ids(open_config(options.model), "bos_token_id")), None)
        own = tokens_of_model(ensure_built(options.model), begin=begin, sequences=SEQUENCES, length=LENGTH)
        measured = [i % CHECK_EVERY != CHECK_EVERY - 1 for i in range(SEQUENCES)]
        measure(func, products, checkpoint.read, own[measured], candidates, tables["own text"])
        text = tokens_of_text(options.model, options.text, vocab_size=vocab, sequences=options.windows, length=LENGTH)
        whole = WholeModel(func, products, checkpoint.read, text)
        problems = {name: BitProblem.of(groups, candidates, table) for name, table in tables.items()}
        first = problems["own text"]
        rows = []
        for uniform in sorted(uniform_solutions(first.problem).values(), key=lambda s: s.nbytes):
            losses = [whole.loss(first.assignment(uniform))]
            for problem in problems.values():
                losses.append(whole.loss(problem.assignment(solve(problem.problem, uniform.nbytes))))
            name = next(iter(first.assignment(uniform).values())).weights
            ratio = f"{losses[1] / losses[0]:.2f}" if losses[0] else "-"
            rows.append([f"`{name}`", f"{first.bits(uniform):.3f}", *(f"{loss:.5f}" for loss in losses), ratio])
    return table(["uniform format", "bits", "KL of it", *(f"solver, {n}" for n in problems), "ratio"], rows)


if __name__ == "__main__":
    main()
