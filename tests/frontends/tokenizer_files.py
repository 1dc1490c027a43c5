"""Tokenizers made in tests: byte-level BPE as of Qwen and Llama 3, and BPE with byte fallback as of Llama 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "def main():\n    return 'hello world'  # héllo wörld\n",
    "The quick brown fox jumps over the lazy dog. Ünïcödé ist schön.",
    "日本語のテキストも少しあります。日本 日本語",
    "Смешанный текст на русском языке",
    "🙂🙃🙂 emoji 👩‍👩‍👧 family",
] * 4


def byte_level(vocab_size: int = 400, *, pre_split: bool = True) -> Tokenizer:
    """Byte-level BPE. Without `pre_split` merges cross words, and with them borders of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A small vocabulary with a token for every byte, blanks as U+2581 and one put before the text, as in Llama 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    letters = sorted(set("".join(CORPUS[:2]).replace(" ", "")) - {"\n", "'"})
    tokens += [c for c in letters if c not in tokens]
    merges = []
    for first, second in (("h", "e"), ("▁", "t"), ("▁t", "he"), ("▁", "w"), ("o", "r"), ("▁w", "or"), ("l", "d")):
        merges.append((first, second))
        tokens.append(first + second)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def with_bos(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer with a post-processor that puts `token` first."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> Path:
    """tokenizer.json and, where given, tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
