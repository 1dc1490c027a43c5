"""Text to token ids and back, from a tokenizer.json, through the `tokenizers` package (imported when first used).

Special tokens (begin of text and so on) are added only where tokenizer.json's own post-processor says so; text made by
a chat template has them already and is encoded with `add_special_tokens=False`. Truncation and padding that the file
asks for are switched off: a prompt is never shortened silently. `tokenizer_config.json` beside it gives the names of
the special tokens that chat templates want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from frontends.checkpoint_files import check_directory, companion
from frontends.json_file import MEBIBYTE, read_json_object, read_text
from ir.diagnostics import DiagnosticError

MAX_TOKENIZER_BYTES = 256 * MEBIBYTE
MAX_CONFIG_BYTES = 32 * MEBIBYTE
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(directory: Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model directory. One that makes ids of `vocab_size` or more is refused."""
    path = companion(check_directory(directory), "tokenizer.json")
    if path is None:
        names = sorted(p.name for p in directory.glob("*token*")) + sorted(p.name for p in directory.glob("*.model"))
        found = f"; there are {', '.join(names[:6])}" if names else ""
        raise DiagnosticError(
            f"has no tokenizer.json{found}",
            where=str(directory),
            expected="a tokenizer in the format of the tokenizers package",
            hint="AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of transformers writes one",
        )
    config_path = companion(directory, "tokenizer_config.json")
    config = read_json_object(config_path, limit=MAX_CONFIG_BYTES) if config_path is not None else {}
    tokenizer = Tokenizer(path, config)
    if vocab_size is not None:
        tokenizer.check_vocabulary(vocab_size)
    return tokenizer


class Tokenizer:
    """`special_tokens` maps names as in tokenizer_config.json ("bos_token", ...) to token texts."""

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = path
        text = read_text(path, limit=MAX_TOKENIZER_BYTES)
        try:
            self.backend = Backend.from_str(text)
        except Exception as error:  # the package raises nothing more special
            raise DiagnosticError(f"is no tokenizer: {str(error)[:300]}", where=str(path)) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = special_token_texts(config or {})
        self._config = config or {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. False for text that a chat template made."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"the text is not valid Unicode at character {error.start}"
            raise DiagnosticError(message, expected="text without lone surrogates") from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids that stand for nothing are left out; see `runtime.stream_decoder` for streaming."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, id: int) -> str | None:
        """The token of an id as the vocabulary spells it."""
        return self.backend.id_to_token(id)

    def id_of(self, token: str) -> int | None:
        """The id of a token, None when the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_vocabulary(self, model_size: int) -> None:
        """Refuses a tokenizer that makes ids for which the model has no embedding; fewer are normal (padding)."""
        if self.vocab_size <= model_size:
            return
        name = self.token(self.vocab_size - 1)
        raise DiagnosticError(
            f"token {name!r} has id {self.vocab_size - 1}, but the model has {model_size} embeddings",
            where=str(self.path),
            expected=f"ids below {model_size}",
            hint="the tokenizer belongs to another model, or tokens were added without resizing the embeddings",
        )

    def warnings(self) -> list[str]:
        """What tokenizer_config.json asks for and tokenizer.json does not do."""
        lines = []
        added = self.encode("a")
        for name, position in (("bos", 0), ("eos", -1)):
            id = self.id_of(self.special_tokens.get(f"{name}_token", ""))
            asked = self._config.get(f"add_{name}_token")
            if id is not None and isinstance(asked, bool) and asked != (added[position : position + 1 or None] == [id]):
                does = "does not" if asked else "does"
                lines.append(f"{self.path}: tokenizer_config.json has 'add_{name}_token': {str(asked).lower()}, but the"
                             f" post-processor {does} add it; the post-processor is followed")  # fmt: skip
        return lines


def special_token_texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens; a token is a string or an object with `content`."""
    found = {}
    for name in SPECIAL_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            found[name] = text
    return found
