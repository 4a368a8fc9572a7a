"""The same comparison on the ranks of a distributed run: each its own shard, one report for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import distributed

from fxqfix.errors import DataError, FxqfixError, OptionError
from fxqfix.report import Report

__all__ = ["over_ranks"]


def over_ranks(compared: Callable[[], Report], process_group: Any) -> Report:
    """What all ranks of a group saw together, on every rank.

    A rank that fails tells the others, so that none waits for it.

    Args:
        compared: Compares this rank's shard.
        process_group: The group; None for this process alone.

    Returns:
        The sum of the ranks' reports, in their order.

    Raises:
        OptionError: There is no process group.
        DataError: Another rank failed; the message is its.
        PairingError: The ranks hold other models.
    """
    if process_group is None:
        return compared()
    if not (distributed.is_available() and distributed.is_initialized()):
        raise OptionError(
            "there is no process group",
            where="compare",
            found=f"process_group={process_group!r}",
            expected="a group of an initialized torch.distributed, e.g. dist.group.WORLD",
            remedy="call torch.distributed.init_process_group first",
        )
    failure: FxqfixError | None = None
    report = ""
    try:
        report = compared().to_json()
    except FxqfixError as error:
        failure = error
    said: list[tuple[str, str]] = [("", "")] * distributed.get_world_size(process_group)
    mine = report, str(failure or "")
    distributed.all_gather_object(said, mine, group=process_group)
    if failure is not None:
        raise failure
    for rank, (_, problem) in enumerate(said):
        if problem:
            raise DataError(f"rank {rank} could not compare", where="compare", found=problem)
    return functools.reduce(Report.merge, (Report.from_json(text) for text, _ in said))
