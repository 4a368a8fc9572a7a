"""compare on the ranks of a gloo group: the counts of one process, and no rank that waits."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from fxqfix import Report, compare
from fxqfix.errors import DataError, OptionError, PairingError
from tests.report.test_merging import said

SHARDS = 4


def models(drift: float = 0.0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.rand(8, 1, 8, 8)
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared((1 + drift) * x)
    return prepared.eval(), convert_fx(copy.deepcopy(prepared))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(1 + i % 2) * torch.rand(8, 1, 8, 8, generator=generator) for i in range(SHARDS)]


def together(data: list[Tensor], **options: Any) -> Report:
    return compare(*models(), data, engine="fbgemm", noise_floor="all", progress=False, **options)


def _rank(rank: int, size: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    group = distributed.group.WORLD
    report = together(batches()[rank::size], process_group=group)
    report.to_json(f"{folder}/{rank}.json")
    # One rank without data, then one with another model: all end, none waits.
    errors = []
    try:
        together(batches()[:1] if rank else [], process_group=group)
    except DataError as error:
        errors.append(str(error))
    try:
        options: dict[str, Any] = {"engine": "fbgemm", "progress": False, "process_group": group}
        compare(*models(0.5 * rank), batches()[:1], **options)
    except PairingError as error:
        errors.append(str(error))
    torch.save(errors, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_get_the_counts_of_one_process(size: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = together(batches())
    finally:
        torch.set_num_threads(threads)
    torch.multiprocessing.spawn(_rank, (size, str(tmp_path)), nprocs=size)
    found = [Report.from_json(tmp_path / f"{rank}.json") for rank in range(size)]
    assert all(report == found[0] for report in found)
    assert found[0].batches == SHARDS
    mine, theirs = ({row.name: row for row in r.rows} for r in (alone, found[0]))
    assert mine.keys() == theirs.keys()
    assert alone.causes
    for name, row in mine.items():
        other = theirs[name]
        assert (row.causes, row.differing) == (other.causes, other.differing)
        assert row.histogram == other.histogram
    first, second = said(alone)["rows"], said(found[0])["rows"]
    for one, two in zip(first, second, strict=True):
        for stream in ("local", "cumulative", "noise_floor"):
            assert one[stream] == two[stream]
    for rank in range(size):
        empty, drifted = torch.load(tmp_path / f"{rank}.pt")
        assert ("data holds no batch" in empty) == (rank == 0) or "rank 0 could not" in empty
        assert "only reports of the same two models" in drifted


def test_without_a_group_it_says_so() -> None:
    with pytest.raises(OptionError, match="there is no process group"):
        together(batches(), process_group=object())
