"""Tokens to measure a model with: of a text that the user gives, or that the model makes itself.

    tokens_of_text(model, Path("text.txt"), vocab_size=.., sequences=12, length=256)   # int32 [sequences, length]
    tokens_of_model(artifact, begin=1, sequences=12, length=256)         # sampled from its bf16 build, always the same

Sequences of a text are spread evenly over it and do not overlap. Refuses texts that are shorter than one sequence, no
UTF-8, or larger than 1 GiB, and models without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ir.diagnostics import DiagnosticError

MAX_TEXT_BYTES = 1 << 30
MAX_ENCODED_BYTES = 8 << 20  # of a larger text, this much is read from evenly spread places
SEED = 20240229


def tokens_of_text(model: Path, text: Path, *, vocab_size: int, sequences: int, length: int) -> np.ndarray:
    """int32 [at most `sequences`, `length`] of a text file, by the tokenizer in the Hugging Face directory `model`."""
    from frontends.tokenizer import load_tokenizer

    ids = np.array(load_tokenizer(model, vocab_size).encode(_read_text(text)), np.int32)
    available = len(ids) // length
    if available < 1:
        raise DiagnosticError(
            f"the text is too short: {len(ids)} tokens", where=str(text), expected=f"{length} tokens or more"
        )
    count = min(sequences, available)
    starts = [(len(ids) - length) * i // max(1, count - 1) for i in range(count)] if count > 1 else [0]
    return np.stack([ids[s : s + length] for s in starts])


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise DiagnosticError(
                "the text is too large", where=str(path), expected=f"{MAX_TEXT_BYTES >> 30} GiB or less"
            )
        data = path.read_bytes()
    except OSError as error:
        raise DiagnosticError(f"the text cannot be read: {error.strerror}", where=str(path)) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DiagnosticError(f"the text is not UTF-8 (byte {error.start})", where=str(path)) from None
    if len(text) <= MAX_ENCODED_BYTES:
        return text
    part = MAX_ENCODED_BYTES // 16
    starts = [(len(text) - part) * i // 15 for i in range(16)]
    return "".join(text[s : s + part] for s in starts)


def tokens_of_model(
    artifact: Path,
    *,
    begin: int | None,
    sequences: int,
    length: int,
    tell: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """int32 [sequences, `length`] sampled at temperature 1 from the float build `artifact`, always the same.

    Every other sequence starts with the token `begin`, where there is one; the rest with one drawn from the vocabulary.
    After the end of a text the model goes on to the next.
    """
    from runtime.generation import GenerationParams, generate
    from runtime.sampling import SamplingParams
    from stratum.model import Model

    rng = np.random.Generator(np.random.PCG64(SEED))
    found = np.zeros((sequences, length), np.int32)
    with Model(artifact, max_context=length) as model:
        for index in range(sequences):
            drawn = int(rng.integers(model.manifest.vocab_size))
            first = begin if begin is not None and index % 2 == 0 else drawn
            params = GenerationParams(length - 1, SamplingParams(temperature=1.0, seed=SEED + index))
            made = [event.token for event in generate(model.session, [first], params)]
            found[index] = [first, *made][:length]
            if tell is not None:
                tell(index + 1, sequences)
    return found
