"""Rotary embeddings in all spellings, against numbers worked out by hand, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from frontends.config_reader import ConfigReader
from frontends.rope_config import read_rope
from ir.attributes import Rope
from ir.diagnostics import DiagnosticError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope(dim: int = 8, context: int = 4096, **fields: Any) -> Rope:
    return read_rope(ConfigReader(fields, "config.json"), dim, context, default_theta=10000.0)


def _refused(**fields: Any) -> str:
    with pytest.raises(DiagnosticError) as caught:
        _rope(**fields)
    return str(caught.value)


def test_default_frequencies() -> None:
    rope = _rope()
    assert rope == Rope(dim=8, theta=10000.0)
    assert rope.inverse_frequencies() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert _rope(rope_theta=1e6).theta == 1e6


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}},
        {"rope_parameters": {k: {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}
                             for k in ("full_attention", "sliding_attention")}},
        {"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 4.0},
         "rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}},
    ],
)  # fmt: skip
def test_spellings_of_linear_scaling(fields: dict[str, Any]) -> None:
    rope = _rope(**fields)
    assert rope == Rope(dim=8, theta=500000.0, scaling="linear", factor=4.0)
    assert rope.inverse_frequencies() == pytest.approx([500000.0 ** (-i / 4) / 4 for i in range(4)])


def test_an_empty_or_default_scaling_is_none() -> None:
    assert _rope(rope_scaling={}) == _rope(rope_scaling=None) == _rope(rope_scaling={"type": "default"}) == _rope()


def test_llama3_frequencies() -> None:
    """Wavelengths below 8192/4 stay, above 8192/1 are stretched by 8, between them a blend."""
    rope = _rope(dim=128, rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    got, base = rope.inverse_frequencies(), 500000.0 ** (-np.arange(64) / 64)
    wavelength = 2 * math.pi / base
    assert got[wavelength < 2048] == pytest.approx(base[wavelength < 2048])
    assert got[wavelength > 8192] == pytest.approx(base[wavelength > 8192] / 8)
    middle = int(np.argmax(wavelength > 4000))  # one of those in between
    smooth = (8192 / wavelength[middle] - 1) / 3
    assert got[middle] == pytest.approx((1 - smooth) * base[middle] / 8 + smooth * base[middle])
    assert rope.attention_factor == 1.0


def test_yarn_by_hand() -> None:
    """dim 8, theta 10000, 64 pretrained positions: the correction range is [floor(-0.99), ceil(2.02)] = [0, 3]."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = _rope(rope_scaling=scaling)
    low = 8 * math.log(64 / (32 * 2 * math.pi)) / (2 * math.log(10000))
    high = 8 * math.log(64 / (2 * math.pi)) / (2 * math.log(10000))
    assert (math.floor(low), math.ceil(high)) == (-1, 2)
    ramp = np.array([0, 0.5, 1, 1])
    base = np.array([1.0, 0.1, 0.01, 0.001])
    assert rope.inverse_frequencies() == pytest.approx(base / 4 * ramp + base * (1 - ramp))
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    exact = _rope(rope_scaling={**scaling, "truncate": False})
    ramp = np.clip(np.arange(4) / high, 0, 1)
    assert exact.inverse_frequencies() == pytest.approx(base / 4 * ramp + base * (1 - ramp))


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"factor": 40.0}, 0.1 * math.log(40) + 1),
        ({"factor": 0.5}, 1.0),
        ({"factor": 40.0, "attention_factor": 0.8}, 0.8),
        ({"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5},
         (0.0707 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
        ({"factor": 40.0, "mscale": 0.707}, 0.1 * math.log(40) + 1),
        ({}, 0.1 * math.log(4096 / 1024) + 1),
    ],
)  # fmt: skip
def test_yarn_attention_factor(parameters: dict[str, float], wanted: float) -> None:
    rope = _rope(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 1024, **parameters})
    assert rope.attention_factor == pytest.approx(wanted)


def test_original_context_of_the_top_level_comes_first() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert _rope(rope_scaling=yarn).original_context == 4096
    assert _rope(rope_scaling={**yarn, "original_max_position_embeddings": 512}).original_context == 512
    both = {**yarn, "original_max_position_embeddings": 512}
    assert _rope(rope_scaling=both, original_max_position_embeddings=256).original_context == 256


def test_zero_betas_mean_the_defaults() -> None:
    rope = _rope(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": 0, "beta_slow": 0})
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "of kind 'dynamic' (dynamic NTK scaling)"),
        ({"rope_scaling": {"type": "longrope"}}, "of kind 'longrope' (LongRoPE), which is not supported"),
        ({"rope_scaling": {"type": "su"}}, "of kind 'su' (LongRoPE)"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "multimodal rope"),
        ({"rope_scaling": {"type": "new"}}, "an unknown kind"),
        ({"rope_scaling": {"type": 3}}, "field 'rope_scaling.type' is 3\nexpected: a string"),
        ({"rope_scaling": [1]}, "field 'rope_scaling' is [1]\nexpected: an object"),
        ({"rope_scaling": {"type": "linear"}}, "field 'rope_scaling.factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "field 'rope_scaling.factor' is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "field 'rope_scaling.factor' is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "field 'rope_scaling.factor' is true"),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "is 1e+300"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 3}}, "'linear' has the fields 'beta_fast'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "'rope_type' and 'type' disagree"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "the high one above the low"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor' is 0.5"),
        ({"rope_theta": 0}, "field 'rope_theta' is 0"),
        ({"rope_theta": 1}, "'rope_theta' is 1\nexpected: a number above 1"),
        ({"rope_theta": "10000"}, "field 'rope_theta' is '10000'"),
        ({"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "one value"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
         "'rope_scaling' and 'rope_parameters' ask for different rotary embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         "'rope_parameters.full_attention' and 'rope_parameters.sliding_attention' ask for different"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}, "original_max_position_embeddings": -1},
         "original_max_position_embeddings' is -1"),
        ({"dim": 7}, "the head width is 7\nexpected: an even width"),
    ],
)  # fmt: skip
def test_bad_rope_is_refused(fields: dict[str, Any], message: str) -> None:
    assert message in _refused(**fields)
