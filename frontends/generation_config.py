"""generation_config.json: how its authors want a model to be sampled, and where its text ends.

Takes a directory and the model's config, gives `GenerationDefaults`. Token ids that the file does not name come from
config.json. Every number is bounded; kinds of generation other than sampling from one sequence (beams, penalties of
n-grams) are named as warnings, since a caller who ignores them gets other text than the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from frontends.checkpoint_files import companion
from frontends.config import MAX_CONTEXT, MAX_VOCAB, token_ids
from frontends.config_reader import ConfigReader
from frontends.json_file import read_json_object

# Fields that would change what is generated, with the values at which they do nothing.
_UNUSED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "diversity_penalty": (0, 0.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "min_length": (0,),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """`do_sample` false means greedy whatever the rest says. 0 turns top_k and min_p off, 1 top_p and the penalty."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 0  # 0: no wish
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    pad_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


class TokenFacts(Protocol):
    """What the defaults need to know of a model; `frontends.config.ModelConfig` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_ids(self) -> tuple[int, ...]: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_ids(self) -> tuple[int, ...]: ...


def load_generation_defaults(directory: Path, config: TokenFacts) -> GenerationDefaults:
    """The defaults of a model directory; without a file, greedy with the token ids of config.json.

    A file that asks for sampling and names no `top_k` means 50, as in transformers.
    """
    path = companion(directory, "generation_config.json")
    fields = ConfigReader(read_json_object(path) if path is not None else {}, str(path))
    found = {name: token_ids(fields, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    for name, ids in found.items():
        outside = [i for i in ids if i >= config.vocab_size]
        if outside:
            raise fields.fault(f"field '{name}_token_id' names token {outside[0]}", f"ids below {config.vocab_size}")
    temperature = fields.real("temperature", low=0.0, high=1e3, default=1.0)
    samples = fields.flag("do_sample", default=False) and temperature > 0
    return GenerationDefaults(
        do_sample=samples,
        temperature=temperature,
        top_k=fields.integer("top_k", low=0, high=MAX_VOCAB, default=50 if samples else 0),
        top_p=fields.real("top_p", low=1e-6, high=1.0, default=1.0),
        min_p=fields.real("min_p", low=0.0, high=1.0, default=0.0),
        repetition_penalty=fields.real("repetition_penalty", low=1e-3, high=1e3, default=1.0),
        max_new_tokens=fields.integer("max_new_tokens", low=1, high=MAX_CONTEXT, default=0),
        bos_ids=found["bos"] or config.bos_ids,
        eos_ids=found["eos"] or config.eos_ids,
        pad_ids=found["pad"] or config.pad_ids,
        warnings=tuple(_warnings(fields)),
    )


def _warnings(fields: ConfigReader) -> list[str]:
    lines = []
    for name, neutral in _UNUSED.items():
        found = fields.value(name)
        if found is not None and found not in neutral:
            lines.append(f"{fields.where}: field {name!r} = {str(found)[:60]} is not supported and was ignored")
    return lines
