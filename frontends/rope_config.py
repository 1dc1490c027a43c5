"""Rotary embeddings in config.json, in all spellings, as one `Rope` attribute.

Before transformers v5: `rope_theta` and `rope_scaling: {"type" or "rope_type": ..., "factor": ...}`. Since v5:
`rope_parameters: {"rope_type": ..., "rope_theta": ...}`, possibly one such object for each layer type. Kinds: default,
linear, llama3 and yarn, with the meaning of transformers 5.23 (`modeling_rope_utils`). Kinds whose frequencies depend
on the length of the text (dynamic, longrope) are refused by name.
"""

from __future__ import annotations

import math
from typing import Any

from frontends.config_reader import ConfigReader
from ir.attributes import Rope

KINDS = ("default", "linear", "llama3", "yarn")
_OTHER_KINDS = {
    "dynamic": "dynamic NTK scaling",
    "longrope": "LongRoPE",
    "su": "LongRoPE",
    "mrope": "multimodal rope",
    "proportional": "proportional rope",
    "axial": "axial rope",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_rope(config: ConfigReader, head_dim: int, max_context: int, default_theta: float) -> Rope:
    """The rope of a model whose heads are `head_dim` wide. `default_theta` holds where the config names none."""
    if head_dim % 2:
        raise config.fault(f"the head width is {head_dim}", "an even width, for rotary embeddings")
    theta = config.real("rope_theta", low=1.0, high=1e15, default=default_theta)
    stated = config.fields.get("rope_theta") is not None
    original = config.value("original_max_position_embeddings")
    made: dict[str, Rope] = {}
    for name in ("rope_scaling", "rope_parameters"):
        for fields in _objects(config, name):
            here = fields.real("rope_theta", low=1.0, high=1e15, default=theta)
            if stated and here != theta:
                raise config.fault(
                    f"'rope_theta' is {theta:g} and '{fields.prefix}rope_theta' is {here:g}", "one value"
                )
            made[fields.prefix] = _rope(fields, head_dim, max_context, here, original)
    if not made:
        return Rope(dim=head_dim, theta=_usable(config, theta))
    (first, rope), *others = made.items()
    for prefix, other in others:
        if other != rope:
            raise config.fault(
                f"'{first.rstrip('.')}' and '{prefix.rstrip('.')}' ask for different rotary embeddings",
                "one rotary embedding for all layers",
            )
    return rope


def _objects(config: ConfigReader, name: str) -> list[ConfigReader]:
    """The object under `name`; those of the layer types where there is one each; nothing when it is absent."""
    found = config.nested(name)
    if found is None or not found.fields:
        return []
    keys = [k for k in _LAYER_TYPES if isinstance(found.fields.get(k), dict)]
    if not keys:
        return [found]
    inner = [found.nested(k) for k in keys]
    return [reader for reader in inner if reader is not None]


def _rope(fields: ConfigReader, dim: int, max_context: int, theta: float, stated_original: Any) -> Rope:
    kind = fields.text("rope_type", "type", default="default")
    if kind not in KINDS:
        meaning = _OTHER_KINDS.get(kind, "an unknown kind")
        raise fields.fault(f"the rotary embedding is of kind {kind[:60]!r} ({meaning}), which is not supported",
                           f"one of {', '.join(KINDS)}")  # fmt: skip
    fields.real("partial_rotary_factor", low=1.0, high=1.0, default=1.0)  # other values rotate a part of the head
    theta = _usable(fields, theta)
    made = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}[kind]
    rope = made(fields, dim, theta, _original_context(fields, kind, max_context, stated_original), max_context)
    extra = ", ".join(repr(n[:60]) for n in fields.unasked()[:8])
    if extra:
        raise fields.fault(
            f"'{fields.prefix.rstrip('.')}' of kind {kind!r} has the fields {extra}", "only the parameters of that kind"
        )
    return rope


def _usable(fields: ConfigReader, theta: float) -> float:
    if theta <= 1.0:
        raise fields.fault(f"'rope_theta' is {theta:g}", "a number above 1")
    return theta


def _original_context(fields: ConfigReader, kind: str, max_context: int, stated: Any) -> int:
    """Context of the pretraining: the top-level field first, then the one beside the factor, then the context."""
    beside = fields.integer("original_max_position_embeddings", low=1, high=1 << 31, default=max_context)
    if stated is None or kind not in ("llama3", "yarn"):
        return beside
    if type(stated) is not int or not 1 <= stated <= 1 << 31:
        raise fields.wrong(("original_max_position_embeddings",), stated, f"a whole number in 1 .. {1 << 31}")
    return stated


def _factor(fields: ConfigReader) -> float:
    return fields.real("factor", low=1e-3, high=1e6)


def _default(fields: ConfigReader, dim: int, theta: float, original: int, max_context: int) -> Rope:
    return Rope(dim=dim, theta=theta)


def _linear(fields: ConfigReader, dim: int, theta: float, original: int, max_context: int) -> Rope:
    return Rope(dim=dim, theta=theta, scaling="linear", factor=_factor(fields))


def _llama3(fields: ConfigReader, dim: int, theta: float, original: int, max_context: int) -> Rope:
    low = fields.real("low_freq_factor", low=1e-3, high=1e6)
    high = fields.real("high_freq_factor", low=1e-3, high=1e6)
    if high <= low:
        raise fields.fault(
            f"'{fields.prefix}high_freq_factor' is {high:g} and low_freq_factor {low:g}", "the high one above the low"
        )
    return Rope(
        dim=dim,
        theta=theta,
        scaling="llama3",
        factor=_factor(fields),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=original,
    )


def _yarn(fields: ConfigReader, dim: int, theta: float, original: int, max_context: int) -> Rope:
    factor = _factor(fields) if fields.value("factor") is not None else max_context / original
    # As in transformers, a zero stands for the default of these.
    beta_fast = fields.real("beta_fast", low=0, high=1e6, default=32.0) or 32.0
    beta_slow = fields.real("beta_slow", low=0, high=1e6, default=1.0) or 1.0
    mscale = fields.real("mscale", low=0, high=1e3, default=0.0)
    mscale_all_dim = fields.real("mscale_all_dim", low=0, high=1e3, default=0.0)
    if mscale and mscale_all_dim:
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    else:
        attention = _mscale(factor, 1.0)
    return Rope(
        dim=dim,
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_context=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=fields.flag("truncate", default=True),
        attention_factor=fields.real("attention_factor", low=0, high=1e3, default=attention),
    )


def _mscale(factor: float, scale: float) -> float:
    """arXiv:2309.00071, equation 22: the temperature that longer contexts need."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
