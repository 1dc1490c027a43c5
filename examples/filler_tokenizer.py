"""A valid byte-level BPE tokenizer of any vocabulary size, made by rule instead of training.

Ids 0-2 are `<pad>`, `<s>` and `</s>`; then come the 256 bytes (printable ASCII first) in GPT-2's byte alphabet, then
merges of common letters: " t", "th", "the", "them". Every id decodes, and from 259 ids on every byte string encodes; a
smaller vocabulary lacks the rarest bytes, and the tokenizer drops them from its input, as the library does.
"""

import itertools
from collections.abc import Iterator

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 96  # printable ASCII and the newline
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The 256 characters byte-level BPE writes bytes as, printable ASCII and newline first, in a fixed order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in shown:
            shown[byte] = chr(256 + len(shown) - len(visible))
    first = [ord(" "), ord("\n"), *range(ord("!"), ord("~") + 1)]
    return [shown[byte] for byte in [*first, *(byte for byte in range(256) if byte not in first)]]


def tokenizer_json(vocab_size: int, add_bos: bool) -> dict[str, object]:
    """The content of tokenizer.json.

    Args:
        add_bos: whether encoding puts `<s>` first, as the Llama and Mistral tokenizers do.
    Raises:
        ValueError: the vocabulary is too small for printable text or larger than there are merges for.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"a vocabulary of {vocab_size} cannot hold printable text; the smallest is {SMALLEST_VOCABULARY}"
        )
    tokens = [*SPECIAL_TOKENS, *byte_alphabet()][:vocab_size]
    merges = [list(pair) for pair in itertools.islice(_merges(), vocab_size - len(tokens))]
    tokens += ["".join(pair) for pair in merges]
    if len(tokens) < vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size} is larger than the {len(tokens)} tokens there are rules for")
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": template if add_bos else None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def tokenizer_config(add_bos: bool, longest: int) -> dict[str, object]:
    """The content of tokenizer_config.json, chat template included."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": CHAT_TEMPLATE,
    }


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs whose parts and whose result are all different tokens, each made of earlier ones."""
    pairs = ["".join(pair) for pair in itertools.product(_LETTERS, repeat=2)]
    yield from (("Ġ", letter) for letter in _LETTERS)  # Ġ is the space
    yield from itertools.product(_LETTERS, repeat=2)
    yield from itertools.product(pairs, _LETTERS)
    yield from itertools.product(pairs, repeat=2)
