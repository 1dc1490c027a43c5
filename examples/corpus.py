"""The text examples/tiny-moe is trained on: the Python standard library, as every machine has it.

Gives documents (name, text) in a fixed order, split into training and held-out documents by a hash of the name, and
a byte-level BPE tokenizer trained on the training half. Nothing is downloaded. Test suites, generated tables and
exact duplicates are left out; the reference topics of `pydoc_data` are taken as plain prose.
"""

import ast
import hashlib
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_FRACTION = 1 / 36
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "encodings",
        "pydoc_data",
        "_bundled",
        "__phello__",
    }
)
# Tables of data, not text anybody reads.
SKIPPED_FILES = frozenset(
    {
        "html/entities.py",
        "msilib/schema.py",
        "msilib/sequence.py",
        "msilib/text.py",
        "stringprep.py",
        "lib2to3/pgen2/grammar.py",
    }
)
SMALLEST_DOCUMENT = 400  # characters; shorter files are import stubs


def standard_library_documents(root: Path | None = None) -> list[tuple[str, str]]:
    """All documents, sorted by name, without exact duplicates.

    Args:
        root: the folder of the standard library; by default that of the running interpreter.
    Returns:
        (name, text) pairs; the name is the path below `root`, or `pydoc_data/topics/NAME`.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or name in SKIPPED_FILES or "sysconfigdata" in name:
            continue
        try:
            found[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the few sources kept in a legacy encoding
    for topic, text in _reference_topics(root / "pydoc_data" / "topics.py").items():
        found[f"pydoc_data/topics/{topic}"] = text
    documents, seen = [], set()
    for name in sorted(found):
        text = found[name].replace("\r\n", "\n").replace("\t", "    ").strip() + "\n"
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) >= SMALLEST_DOCUMENT and digest not in seen and END_OF_TEXT not in text:
            seen.add(digest)
            documents.append((name, text))
    return documents


def is_held_out(name: str) -> bool:
    """Whether a document is kept away from training: decided by a hash of its name only, so it is stable."""
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return value < HELD_OUT_FRACTION * 2**64


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose id 0 is `<|endoftext|>`; every byte string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one int64 stream, each opened by `<|endoftext|>`. Shape (tokens,)."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = [np.array([end, *encoding.ids], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(parts)


def _reference_topics(path: Path) -> dict[str, str]:
    """The language reference's topics as pydoc ships them: one dict literal named `topics`."""
    if not path.exists():
        return {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "topics":
            return ast.literal_eval(statement.value)
    return {}
