"""Options of the verbs that run a model: how text is generated, what memory may be used, how a directory is built.

@generation_options     # -n, --chat, --temperature ... --seed, --stop: arguments by their names
@memory_options         # --memory, --plan, --expert-policy, --kv-dir, --no-mmap: one argument `limits`, a `Limits`
@directory_options      # --dtype, --recipe, --target
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.eviction import POLICIES
from stratum.cli.options import DTYPES, recipe_option

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Limits:
    """What a process may use, as `stratum.load` takes it: a budget as text, a plan, details of both; whether weights
    stay where the page cache has them."""

    memory: str | None = None
    plan: Path | None = None
    expert_policy: str | None = None
    kv_dir: Path | None = None
    mmap: bool = True


def memory_options(function: F) -> F:
    """--memory, --plan, --expert-policy, --kv-dir, --no-mmap. The function gets them as `limits`."""

    @functools.wraps(function)
    def with_limits(
        *args: Any,
        memory: str | None,
        plan: Path | None,
        expert_policy: str | None,
        kv_dir: Path | None,
        no_mmap: bool,
        **others: Any,
    ) -> Any:
        return function(*args, limits=Limits(memory, plan, expert_policy, kv_dir, not no_mmap), **others)

    return _with(
        with_limits,
        click.option(
            "-m", "--memory", metavar="SIZE", help="Use no more than this (2GiB): read weights as they are needed."
        ),
        click.option("--plan", type=click.Path(path_type=Path), metavar="FILE", help="Run what 'plan -o' wrote."),
        click.option(
            "--expert-policy",
            type=click.Choice(POLICIES),
            help="With --memory or --plan: which experts go first.",
        ),
        click.option(
            "--kv-dir",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="With --memory or --plan: for KV it has no room for.",
        ),
        click.option(
            "--no-mmap",
            is_flag=True,
            help="Copy the weights into memory of huge pages: starts later, often 10 % faster then.",
        ),
    )


def generation_options(function: F) -> F:
    """How much text is generated, and how tokens are chosen; -t and -c."""
    return _with(
        function,
        click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=128, help="Tokens to generate at most."),
        click.option("--chat", is_flag=True, help="A text is a user's message: apply the model's chat template."),
        click.option(
            "--temperature",
            "--temp",
            type=float,
            help="0 is greedy. Default: as generation_config.json says, else 0.",
        ),
        click.option("--top-k", type=int, help="Keep the K most probable tokens; 0 is off."),
        click.option("--top-p", type=float, help="Keep the most probable tokens that sum to P; 1 is off."),
        click.option("--min-p", type=float, help="Drop tokens less probable than P times the best; 0 is off."),
        click.option("--repetition-penalty", type=float, help="Divide the scores of tokens seen before; 1 is off."),
        click.option("--seed", type=int, help="Same seed, same text. Default: a new one each time."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
        click.option("-t", "--threads", type=int, help="Default: one a physical core this process may use."),
        click.option("-c", "--context", type=int, help="Positions of each sequence. Default: the model's."),
    )


def directory_options(function: F) -> F:
    """--dtype, --recipe, --target: how a directory is built, which an artifact was already."""
    return _with(
        function,
        click.option(
            "--dtype", type=click.Choice(DTYPES), help="For a directory: weights and KV cache. Default: bf16."
        ),
        recipe_option("For a directory. "),
        click.option("--target", metavar="NAME", help="For a directory: see 'compile-model targets'. Default: host."),
    )


def _with(function: Any, *options: Callable[[Any], Any]) -> Any:
    """The function with these options, shown in this order."""
    for option in reversed(options):
        function = option(function)
    return function
