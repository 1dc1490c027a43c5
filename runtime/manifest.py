"""The artifact's manifest as typed values. `runtime.manifest_reader` makes them, of a file that is hostile until proven
otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.await_info import AwaitInfo
from runtime.piece_info import PieceInfo


@dataclass(frozen=True)
class LaunchInfo:
    """One kernel of a program, in execution order: what it is, where in the model it comes from, and its work.

    `bytes` is what one launch reads and writes, `flops_per_token` what it computes for each token of the step; both
    are for reports only.
    """

    name: str
    origin: str
    bytes: float
    flops_per_token: float


@dataclass(frozen=True)
class ProgramInfo:
    """One compiled specialisation of the step: takes 1..max_tokens tokens, needs `arena_bytes` of scratch memory."""

    name: str
    symbol: str
    max_tokens: int
    arena_bytes: int
    launches: tuple[LaunchInfo, ...]
    awaits: tuple[AwaitInfo, ...] = ()
    kv_awaits: tuple[int, ...] = ()  # layers whose keys and values the program waits for, in its order


@dataclass(frozen=True)
class KVInfo:
    """Shape of the key/value cache; bytes count keys and values of all layers.

    `bytes_per_slot` is what a sequence takes besides its positions: a ring of the newest `ring` positions in 16 bits,
    of which a token reads at least `recent`. All three are 0 where everything is read in `format`.
    """

    layers: int
    num_kv_heads: int
    head_dim: int
    format: str
    bytes_per_position: int
    block: int
    bytes_per_slot: int = 0
    recent: int = 0
    ring: int = 0


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: a byte range of the weights file."""

    name: str
    offset: int
    bytes: int
    format: str


@dataclass(frozen=True)
class WeightsInfo:
    """The weights file, its size, and what lies in it; its hash is with those of the other files."""

    file: str
    bytes: int
    tensors: tuple[TensorInfo, ...]
    pieces: tuple[PieceInfo, ...] = ()


@dataclass(frozen=True)
class TargetInfo:
    """The machine the code was generated for; `features` are required, in LLVM's names."""

    name: str
    triple: str
    cpu: str
    features: tuple[str, ...]

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU runs it."""
        return self.triple.startswith("nvptx")


@dataclass(frozen=True)
class FileInfo:
    """Size and hash of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime reads. `model` and `raw` keep the rest for reports (`inspect`, licence lines)."""

    stratum_version: str
    model: dict[str, Any]
    vocab_size: int
    max_context: int
    dtype: str
    target: TargetInfo
    programs: tuple[ProgramInfo, ...]  # ascending max_tokens
    kv: KVInfo
    weights: WeightsInfo
    files: dict[str, FileInfo]
    raw: dict[str, Any]
    experts_per_token: int = 0
