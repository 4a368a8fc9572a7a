"""Monitor: training goes on bit for bit, whatever wraps the model and whatever goes wrong."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    default_fake_quant,
    default_per_channel_weight_fake_quant,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.utils.data import DataLoader, TensorDataset

from fxqfix import Monitor
from fxqfix.errors import (
    DataError,
    OptionError,
    UnknownNameError,
    UnsupportedError,
    WriteError,
)
from fxqfix.report.history import Check


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.conv(x)).flatten(1))


MAPPING = get_default_qat_qconfig_mapping("fbgemm")
# The fused fake-quant of the default mapping fails under bfloat16 autocast, in torch itself.
PLAIN = QConfigMapping().set_global(
    QConfig(activation=default_fake_quant, weight=default_per_channel_weight_fake_quant)
)


def made(mapping: QConfigMapping = MAPPING) -> nn.Module:
    torch.manual_seed(0)
    prepared: nn.Module = prepare_qat_fx(Net().train(), mapping, (torch.ones(1, 1, 8, 8),))
    return prepared


def loader(generator: torch.Generator | None = None) -> DataLoader[Any]:
    pixels = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    data = TensorDataset(pixels, torch.arange(48) % 3)
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


Watch = Callable[[nn.Module, DataLoader[Any]], Monitor] | None


def train(
    watch: Watch,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    cast: bool = False,
    accumulate: int = 1,
    mapping: QConfigMapping = MAPPING,
) -> tuple[list[Tensor], Monitor | None]:
    """Two epochs; all that training left behind, the random state included."""
    prepared = made(mapping)
    model = wrap(prepared)
    data = loader(torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    monitor = watch(model, data) if watch is not None else None
    count = 0
    for _ in range(2):
        for pixels, label in data:
            count += 1
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = F.cross_entropy(model(pixels), label)
            loss.backward()
            if count % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            if monitor is not None:
                monitor.step(count // accumulate)
    left = [*prepared.state_dict().values(), torch.get_rng_state(), torch.rand(2)]
    left += [p.grad for p in prepared.parameters() if p.grad is not None]
    left += [v for state in optimizer.state.values() for v in state.values()]
    return [value.clone() for value in left], monitor


def watching(model: nn.Module, data: DataLoader[Any]) -> Monitor:
    return Monitor(model, data, every=3, engine="fbgemm")


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"cast": True, "mapping": PLAIN},
    "accumulation": {"accumulate": 2},
    "compiled": {"wrap": lambda model: torch.compile(model, backend="eager")},
    "data parallel": {"wrap": nn.DataParallel},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # from torch.compile
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_bit_for_bit(case: str) -> None:
    without, _ = train(None, **CASES[case])
    watched, monitor = train(watching, **CASES[case])
    assert len(without) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(without, watched, strict=True))
    assert monitor is not None
    steps = 12 // CASES[case].get("accumulate", 1)
    assert [check.step for check in monitor.history] == [*range(3, steps + 1, 3)]
    assert [check.problem for check in monitor.history] == [""] * len(monitor.history)
    assert all(check.local for check in monitor.history)


def test_history_is_told_and_what_it_cost() -> None:
    _, monitor = train(watching)
    assert monitor is not None
    lines = str(monitor).splitlines()
    assert lines[0].startswith("fxqfix monitor: every 3 steps, ")
    assert " ms a check, " in lines[0]
    assert len(lines) == 4 + len(monitor.history)
    assert 0.0 < monitor.overhead < 1.0
    assert monitor.latest is not None
    last = monitor.history[-1]
    assert last.causes == monitor.latest.causes
    assert "<!DOCTYPE html>" in monitor.to_html()
    ax = pytest.importorskip("matplotlib.axes")
    drawn = monitor.plot()
    assert isinstance(drawn, ax.Axes)
    assert drawn.get_xlabel() == "training step"
    pytest.importorskip("matplotlib.pyplot").close(drawn.figure)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    _, first = train(watching)
    assert first is not None
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    second = Monitor(made(), loader(), every=3, engine="fbgemm")
    second.load_state_dict(torch.load(tmp_path / "monitor.pt"))
    assert second.history == first.history
    assert not second.step(12)  # seen before the checkpoint
    assert second.history == first.history
    second.prepared(torch.rand(8, 1, 8, 8))
    second.step(15)
    assert [check.step for check in second.history] == [3, 6, 9, 12, 15]
    with pytest.raises(DataError, match="no state of a monitor"):
        second.load_state_dict({"history": []})


def test_stops_and_warns_on_what_is_named() -> None:
    model, batch = made(), torch.rand(8, 1, 8, 8)
    model(batch)
    names = {"range-lost"}
    monitor = Monitor(model, 3 * batch, every=1, stop_on=names, engine="fbgemm")
    assert monitor.step()
    assert monitor.stopped == "range-lost"
    assert "stop: range-lost" in str(monitor)
    monitor = Monitor(model, batch, every=1, stop_on="kernel-defect", engine="fbgemm")
    assert not monitor.step()

    def many(check: Check) -> bool:
        return check.worst[1] >= 0.0

    monitor = Monitor(model, batch, every=1, stop_on=many, warn_on=many, engine="fbgemm")
    with pytest.warns(UserWarning, match="fxqfix: many says so at step 1"):
        assert monitor.step()


def test_a_look_that_fails_is_named_and_training_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = Monitor(made(), torch.rand(8, 1, 8, 8), every=1, engine="fbgemm")
    with caplog.at_level(logging.INFO, "fxqfix"):
        assert not monitor.step()  # no data went through the model yet
    seen = monitor.history[0]
    assert (seen.verdict, monitor.latest) == ("not judged", None)
    assert "never saw data" in seen.problem
    assert "uncalibrated" in seen.findings
    assert caplog.records[0].levelname == "WARNING"
    assert "never saw data" in caplog.text
    with pytest.raises(DataError, match="no report yet"):
        monitor.to_html()


class Tags:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self.figures: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts[tag] = text

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append(tag)


def test_writers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made(), torch.rand(8, 1, 8, 8)
    model(batch)
    tags, path = Tags(), tmp_path / "run.csv"
    logger = logging.getLogger("mine")
    with caplog.at_level(logging.INFO, "mine"):
        for writer in (tags, path, logger):
            monitor = Monitor(model, batch, every=1, writer=writer, engine="fbgemm", prefix="a")
            monitor.step()
            monitor.step()
    assert tags.scalars["a/check_ms"] > 0
    assert tags.scalars["a_causes/kernel-defect"] == 0
    assert "fxqfix report" in tags.texts["a/summary"]
    lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [line["step"] for line in lines] == ["1", "2"]
    assert {"milliseconds", "cause_range_lost", "worst_site"} <= lines[0].keys()
    assert [record.name for record in caplog.records] == ["mine", "mine"]
    assert " ms" in caplog.text
    plt = pytest.importorskip("matplotlib.pyplot")
    watched = Monitor(model, batch, every=1, writer=tags, engine="fbgemm")
    watched.step()
    plt.close(watched.plot().figure)
    assert tags.figures == ["fxqfix/history"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 0}, OptionError),
        ({"every": 2.5}, OptionError),
        ({"batches": True}, OptionError),
        ({"writer": 3}, OptionError),
        ({"writer": "run.txt"}, OptionError),
        ({"writer": "no/such/folder/run.csv"}, WriteError),
        ({"stop_on": {"range_lost"}}, UnknownNameError),
        ({"warn_on": "nonsense"}, UnknownNameError),
        ({"data": []}, DataError),
        ({"data": 3}, DataError),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception]) -> None:
    given = {"data": torch.rand(2, 1, 8, 8), **options}
    with pytest.raises(error, match="Monitor"):
        Monitor(made(), **given)


def _rank(rank: int, folder: str) -> None:
    """One of two processes: DDP training, watched or not."""
    import os

    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ddp = nn.parallel.DistributedDataParallel

    def watch(model: nn.Module, data: DataLoader[Any]) -> Monitor:
        # Rank 0's own answer: the batch is calibrated, so nothing but a step count stops it.
        return Monitor(model, data, every=3, stop_on=lambda c: c.step == 9, engine="fbgemm")

    without, _ = train(None, wrap=ddp)
    watched, monitor = train(watch, wrap=ddp)
    assert monitor is not None
    same = all(torch.equal(a, b) for a, b in zip(without, watched, strict=True))
    torch.save((same, len(monitor.history), monitor.stopped), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_ranks_train_alike_and_stop_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert answers == [(True, 4, "<lambda> says so"), (True, 0, "<lambda> says so")]


def test_a_hook_is_refused_and_not_called() -> None:
    """A copy shares the hook with the model, and the hook its state: a look would be a step."""
    prepared, calls = made(), []
    prepared(torch.ones(2, 1, 8, 8))
    monitor = Monitor(prepared, loader(), every=1, engine="fbgemm")
    layer = next(m for m in prepared.modules() if isinstance(m, nn.Linear))
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *given: calls.append(given))
        monitor.step()
        problem = monitor.history[-1].problem
        assert "would call this forward hook" in problem
        assert "remove it (handle.remove())" in problem
        with pytest.raises(UnsupportedError, match="forward hook"):
            Monitor(prepared, loader(), engine="fbgemm")
        handle.remove()
    assert calls == []
    monitor.step()
    assert monitor.history[-1].problem == ""
