"""validate: the metric of the deployed integers, and nothing perturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxqfix
from fxqfix import validate
from fxqfix._torch import quantized_engine
from fxqfix.errors import DataError, OptionError
from tests.pretend import DEVICE, PretendedCuda
from tests.test_to_int8 import prepared_net


def _data(x: Tensor, classes: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    scaled = [x[:3], 2 * x, x[:1]]
    return [(b, torch.randint(classes, (len(b),), generator=generator)) for b in scaled]


def _share(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data)
    return right / sum(len(y) for _, y in data)


def test_the_metric_is_that_of_the_kernels() -> None:
    prepared, x = prepared_net("Residual", qat=True)
    data = _data(x)
    with quantized_engine("fbgemm"):
        int8 = fxqfix.to_int8(prepared, engine="fbgemm")
        wanted = _share(int8, data)
    emulated = fxqfix.emulate(int8, engine="fbgemm")
    found = validate(emulated, data, "accuracy")
    assert found.value == pytest.approx(wanted, abs=1e-12)  # reason: a mean of three means
    assert (found.metric, found.samples, found.batches) == ("accuracy", 8, 3)
    assert found.emulation["engine"] == "fbgemm"
    assert "fbgemm" in str(found)
    model = fxqfix.as_deployed(prepared, engine="fbgemm")
    assert validate(model, data, "accuracy").value == found.value
    with PretendedCuda():
        there = validate(emulated.to(DEVICE), data, "accuracy")
    assert there.value == found.value
    assert there.device == DEVICE


class _Sum:
    """A metric of its own kind."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.seen.append((len(outputs), len(targets)))

    def compute(self) -> int:
        return sum(n for n, _ in self.seen)


class _Named(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_metrics_and_inputs_of_every_kind() -> None:
    x, y = torch.eye(4), torch.arange(4)
    assert validate(nn.Identity(), iter([(x, y), (x, y)]), _Sum()).value == 8
    assert validate(_Named(), [((x, x), y), ({"a": x, "b": x}, y)], "accuracy").value == 1.0
    error = validate(nn.Identity(), [(x, x + 1)], nn.functional.mse_loss)
    assert (error.value, error.metric) == (1.0, "mse_loss")


def test_modes_and_random_numbers_are_put_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[0].eval()
    before = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    validate(model, [(torch.eye(4), torch.arange(4))], "accuracy")
    assert [m.training for m in model.modules()] == [True, False, True]
    assert all(map(torch.equal, before, model.buffers()))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("data", [[], [torch.eye(4)], [(1, 2, 3)]])
def test_bad_data_is_refused(data: Any) -> None:
    with pytest.raises(DataError):
        validate(nn.Identity(), data, "accuracy")


def test_a_bad_metric_is_refused() -> None:
    with pytest.raises(OptionError, match="metric"):
        validate(nn.Identity(), [(torch.eye(4), torch.arange(4))], "precision")


def test_a_metric_gives_a_number_or_one_per_sample() -> None:
    data = [
        (torch.tensor([[1.0], [2.0], [6.0]]), torch.zeros(3)),
        (torch.ones(1, 1), torch.zeros(1)),
    ]
    model = nn.Identity()
    assert validate(model, data, lambda y, _: y[:, 0]).value == 2.5
    assert validate(model, data, lambda y, _: float(y.mean())).value == 2.5
    assert validate(model, data, lambda y, _: y[:, 0] > 1).value == 0.5
    with pytest.raises(
        OptionError, match=r"Tensor of shape \[2, 1\].*each of the batch's 3 samples"
    ):
        validate(model, data, lambda y, _: y[:2])
    with pytest.raises(OptionError, match=r"Found: str\."):
        validate(model, data, lambda y, _: "good")


@pytest.mark.parametrize(
    "targets", [torch.zeros(3, 1), torch.tensor(0), torch.zeros(5), torch.zeros(3, 2), [0, 1, 1]]
)
def test_accuracy_refuses_targets_of_another_shape(targets: Any) -> None:
    with pytest.raises(DataError, match=r"class numbers.*Expected: targets \[3\]"):
        validate(nn.Identity(), [(torch.zeros(3, 2), targets)], "accuracy")


def test_a_batch_without_samples_counts_nothing() -> None:
    good = torch.eye(2), torch.tensor([0, 0])
    data = [good, (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))]
    assert validate(nn.Identity(), data, "accuracy").value == 0.5


def test_a_shuffled_loader_leaves_the_random_state() -> None:
    samples = TensorDataset(torch.eye(4), torch.arange(4))
    before = torch.get_rng_state()
    found = validate(nn.Identity(), DataLoader(samples, batch_size=2, shuffle=True), "accuracy")
    assert found.value == 1.0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bar_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    data = [(torch.eye(4), torch.arange(4))] * 3
    validate(nn.Identity(), data, "accuracy", progress=False)
    assert "validate" not in capsys.readouterr().err
