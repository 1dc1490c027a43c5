"""Perplexity of a model on a text, and its divergence from a reference, window by window.

    text = encode_text(read_text(path), tokenizer)
    plan = plan_windows(len(text.ids), context=512)
    results = evaluate([session], text, plan, reference=reference_session)

The text is cut into windows of `context` tokens as llama-perplexity cuts it; each starts without memory of the ones
before. Without a stride windows lie side by side, and the second half of each is scored: a window of n tokens gives
n - 1 - n // 2 predictions, each with at least n // 2 tokens in front of it. With a stride a window begins every
`stride` tokens and its last `stride` predictions are scored, so that each token is scored once. Tokens behind the last
whole window are left out; a text shorter than one window is a window of its own (llama-perplexity refuses it).

Models run side by side: the logits of one piece of a window are scored and dropped before the next piece runs, at most
64 MiB a model, whatever the size of text and vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ir.diagnostics import DiagnosticError
from stratum.quality_metrics import (
    Divergence,
    Perplexity,
    Scores,
    divergence_of,
    perplexity_of,
    score_rows,
)

if TYPE_CHECKING:
    from frontends.tokenizer import Tokenizer

DEFAULT_CONTEXT = 512
MAX_TEXT_BYTES = 1 << 30
_LOGITS_BYTES = 64 << 20  # of one model, of one piece of a window
_LEAST_PIECE = 16  # tokens: fewer at once would waste the programs made for prompts
Tell = Callable[[int, int], None]  # tokens done, tokens in all


class StepModel(Protocol):
    """What is evaluated: a `runtime.session.Session`, or anything that steps like one."""

    vocab_size: int

    def step(self, ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray: ...

    def release(self, slot: int) -> int: ...


@dataclass(frozen=True)
class Plan:
    """Windows of `length` tokens at `starts`; of each, the last `scored` tokens are predicted from those before."""

    length: int
    starts: tuple[int, ...]
    scored: int

    @property
    def tokens(self) -> int:
        """Predictions in all."""
        return self.scored * len(self.starts)


@dataclass(frozen=True)
class Evaluation:
    """What was found of one model, and the numbers of every position that it was found from."""

    perplexity: Perplexity
    reference: Perplexity | None
    divergence: Divergence | None
    scores: Scores


@dataclass(frozen=True)
class Text:
    """A text as a model sees it: `ids` int32, the begin token in front if the tokenizer adds one (`bos`, else None).

    `num_bytes` counts UTF-8 bytes, those of special tokens that the text spells out excepted.
    """

    ids: np.ndarray
    bos: int | None
    num_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """The text's average, by which losses in nats per token become bits per byte."""
        return self.num_bytes / (len(self.ids) - (self.bos is not None))


class OneByOne:
    """A model that is given its tokens one by one, as in decoding: what a step computes may depend on how many."""

    def __init__(self, model: StepModel) -> None:
        self.model, self.vocab_size = model, model.vocab_size

    def step(self, ids: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """As `StepModel.step`."""
        place = {row: at for at, row in enumerate(rows.tolist())}
        logits = np.empty((len(place), self.vocab_size), np.float32)
        for token in range(len(ids)):
            one = slice(token, token + 1)
            wanted = np.zeros(int(token in place), np.int32)
            found = self.model.step(ids[one], positions[one], slots[one], wanted)
            if token in place:
                logits[place[token]] = found[0]
        return logits

    def release(self, slot: int) -> int:
        """As `StepModel.release`."""
        return self.model.release(slot)


def plan_windows(num_tokens: int, context: int, *, stride: int | None = None, limit: int | None = None) -> Plan:
    """The windows of a text; `limit` is the most of them. Raises DiagnosticError for sizes without a prediction."""
    if num_tokens < 2:
        raise DiagnosticError(
            f"the text has {num_tokens} token{'' if num_tokens == 1 else 's'}",
            expected="2 or more: the second is the first that can be predicted",
        )
    if context < 2:
        raise DiagnosticError(f"a window of {context} tokens predicts nothing", expected="a context of 2 or more")
    if stride is not None and not 1 <= stride < context:
        raise DiagnosticError(
            f"a stride of {stride} does not fit windows of {context} tokens",
            expected=f"1 to {context - 1}, the predictions of one window",
        )
    length = min(context, num_tokens)
    scored = max(1, length - 1 - length // 2) if stride is None else min(stride, length - 1)
    starts = range(0, num_tokens - length + 1, stride or length)
    return Plan(length, tuple(starts[:limit] if limit is not None else starts), scored)


def evaluate(
    models: Sequence[StepModel],
    text: Text,
    plan: Plan,
    *,
    reference: StepModel | None = None,
    tell: Tell | None = None,
) -> list[Evaluation]:
    """Runs every model over every window, and gives what was found of each, in order.

    Raises DiagnosticError when a model's vocabulary is not the reference's, or not the text's, or logits are not
    finite.
    """
    everyone = [*models, *([reference] if reference is not None else [])]
    _check_vocabularies(everyone, text.ids)
    pieces: list[list[Scores]] = [[] for _ in models]
    total = len(plan.starts) * (plan.length - 1)
    for window, start in enumerate(plan.starts):
        ids = text.ids[start : start + plan.length].copy()
        if text.bos is not None:
            ids[0] = text.bos
        for model in everyone:
            model.release(0)
        for first, last, rows in _steps(plan, everyone[0].vocab_size):
            theirs = _step(reference, ids, first, last, rows) if reference is not None else None
            for found, model in zip(pieces, models, strict=True):
                logits = _step(model, ids, first, last, rows)
                if rows:
                    found.append(score_rows(logits, ids[last - rows + 1 : last + 1], theirs))
            if tell is not None:
                tell(window * (plan.length - 1) + last, total)
    return [_summary(Scores.join(found), text.bytes_per_token) for found in pieces]


def _steps(plan: Plan, vocab_size: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, rows): tokens first..last-1 of a window are one step, logits are wanted of the last `rows`."""
    feed = plan.length - 1  # the last token is predicted, and predicts nothing that is known
    unscored = feed - plan.scored
    most = max(_LEAST_PIECE, _LOGITS_BYTES // (4 * vocab_size))
    if feed <= most:
        yield 0, feed, plan.scored
        return
    if unscored:
        yield 0, unscored, 0
    for first in range(unscored, feed, most):
        last = min(first + most, feed)
        yield first, last, last - first


def _step(model: StepModel, ids: np.ndarray, first: int, last: int, rows: int) -> np.ndarray:
    """f32 [rows, vocabulary]."""
    positions = np.arange(first, last, dtype=np.int32)
    wanted = np.arange(last - first - rows, last - first, dtype=np.int32)
    return model.step(ids[first:last], positions, np.zeros(last - first, np.int32), wanted)


def _summary(scores: Scores, bytes_per_token: float) -> Evaluation:
    compared = len(scores.divergence) > 0
    return Evaluation(
        perplexity_of(scores.loss, bytes_per_token),
        perplexity_of(scores.reference_loss, bytes_per_token) if compared else None,
        divergence_of(scores) if compared else None,
        scores,
    )


def _check_vocabularies(models: Sequence[StepModel], ids: np.ndarray) -> None:
    sizes = [model.vocab_size for model in models]
    for size in sizes[1:]:
        if size != sizes[0]:
            raise DiagnosticError(
                f"the models have vocabularies of {sizes[0]} and {size} tokens",
                expected="a reference with the vocabulary of the model",
                hint="the reference is the same model in full precision",
            )
    if len(ids) and int(ids.max()) >= sizes[0]:
        raise DiagnosticError(
            f"the text has token id {int(ids.max())}", expected=f"ids below {sizes[0]}, the model's vocabulary"
        )


# -- texts -----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A file's UTF-8 text, without a byte-order mark. Raises DiagnosticError for other bytes and for an empty file."""
    with path.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise DiagnosticError(
            "the text is too large", where=str(path), expected=f"{MAX_TEXT_BYTES >> 20} MiB or less, in one file"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DiagnosticError(
            f"the text is not UTF-8 (byte {error.start})", where=str(path), expected="a text file in UTF-8"
        ) from None
    if not text:
        raise DiagnosticError("the text is empty", where=str(path), expected="a text of 2 tokens or more")
    return text


def encode_text(text: str, tokenizer: Tokenizer, where: str = "") -> Text:
    """The tokens of a text. Special tokens that it spells out (`<|endoftext|>` between documents) are one token each.

    Raises DiagnosticError when fewer than 2 tokens come out, the begin token counted.
    """
    bos = begin_token(tokenizer)
    plain = tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(plain if bos is None else [bos, *plain], dtype=np.int32)
    if len(ids) < 2:
        raise DiagnosticError(
            f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}",
            where=where,
            expected="2 or more: the second is the first that can be predicted",
        )
    special = [token for token in plain if token in tokenizer.special_ids]
    spelled = sum(len((tokenizer.token(token) or "").encode()) for token in special)
    return Text(ids, bos, max(0, len(text.encode()) - spelled))


def begin_token(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts in front of every text, None if it does not. One at the end is never used."""
    bare, dressed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    if len(dressed) > len(bare) and dressed[: len(bare)] != bare:
        return dressed[0]
    return None
