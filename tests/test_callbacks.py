"""The callbacks with the real packages, where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fxqfix import Monitor
from fxqfix.errors import MissingDependencyError
from tests.test_monitor import loader, made

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_package_is_named(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    module = importlib.import_module(f"fxqfix.callbacks.{name}")
    monitor = Monitor(made(), torch.rand(2, 1, 8, 8))
    with pytest.raises(MissingDependencyError, match=rf"fxqfix\[{name}\]"):
        module.MonitorCallback(monitor)


def test_lightning_steps_and_stops(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from fxqfix.callbacks.lightning import MonitorCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = made()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-2)

    def fit(monitor: Monitor | None, module: Any, **options: Any) -> Any:
        torch.manual_seed(1)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[MonitorCallback(monitor)] if monitor is not None else [], **options,
        )  # fmt: skip
        trainer.fit(module, loader())
        return trainer

    plain, watched = Module(), Module()
    fit(None, plain)
    monitor = Monitor(watched.model, loader(), every=2, engine="fbgemm")
    trainer = fit(monitor, watched, accumulate_grad_batches=2)
    assert [check.step for check in monitor.history] == [2, 4, 6]
    assert trainer.global_step == 6
    again = Module()
    second = Monitor(again.model, loader(), every=3, engine="fbgemm")
    fit(second, again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True)
    )
    third = Monitor(again.model, loader(), every=2, stop_on=lambda check: True, engine="fbgemm")
    assert fit(third, again).global_step == 2
    file = next(tmp_path.rglob("*.ckpt"))
    saved = torch.load(file, weights_only=False)["callbacks"]
    assert [len(state["history"]) for state in saved.values() if "history" in state]


def test_transformers_steps_and_stops(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from fxqfix.callbacks.transformers import MonitorCallback

    class Data(Dataset[dict[str, Tensor]]):
        def __init__(self) -> None:
            batches = DataLoader(loader().dataset, batch_size=48)
            self.pixels, self.labels = next(iter(batches))

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"x": self.pixels[i], "labels": self.labels[i]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = made()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def fit(monitor: Monitor | None, model: nn.Module) -> Any:
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8,
            report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, seed=1,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=options, train_dataset=Data(),
            callbacks=[MonitorCallback(monitor)] if monitor is not None else [],
        )  # fmt: skip
        trainer.train()
        return trainer

    plain, watched = Model(), Model()
    fit(None, plain)
    monitor = Monitor(watched.model, Data().pixels[:4], every=4, engine="fbgemm")
    assert fit(monitor, watched).state.global_step == 12
    assert [check.step for check in monitor.history] == [4, 8, 12]
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    stopping = Monitor(watched.model, Data().pixels[:4], every=4, stop_on=lambda check: True)
    assert fit(stopping, watched).state.global_step == 4
