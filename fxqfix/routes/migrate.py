"""migrate: from what convert_fx takes to a decomposed .pt2 file, and what that file computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxqfix import _pt2e, _rng, _torch, dialects
from fxqfix._devices import CPU, device_of
from fxqfix._settings import entry
from fxqfix.dialects import Reading
from fxqfix.dialects._finite import refuse_non_finite
from fxqfix.errors import DataError, DeviceError, DialectError, RouteError
from fxqfix.flows import compare, freeze, to_decomposed
from fxqfix.measure import Discrepancy, State, cannot_run, float_discrepancy, tensors_of
from fxqfix.names import Engine, PinPlace, RangesFrom
from fxqfix.report import Certificate, Migration, Report
from fxqfix.routes import _registry
from fxqfix.routes._base import Route
from fxqfix.routes._file import SavedFile
from fxqfix.routes._identity import file_digest
from fxqfix.routes.certify import Watched, with_code
from fxqfix.routes.export import Axes, Dynamic, axes_of, open_axes

__all__ = ["check", "migrate"]

SUFFIX = ".pt2"


@entry
def migrate(
    model: nn.Module,
    data: Iterable[Any],
    path: str | Path,
    *,
    converted: nn.Module | None = None,
    ranges_from: RangesFrom | None = None,
    pin_ranges: bool | PinPlace = True,
    dynamic_batch: bool = False,
    dynamic_shapes: Axes | None = None,
    route: str = "export",
    engine: Engine | None = None,
    progress: bool | None = None,
) -> Migration:
    """Write a model as a decomposed .pt2 file, and certify the file that was written.

    The file is loaded back, and runs on every batch beside the decomposed graph and beside
    ``freeze(model)``. Only then does it get its name: no failure leaves a file behind.

    Args:
        model: What convert_fx would get: a prepared model, FX, eager or PT2E, in eval mode. A
            reference or int8 model needs `ranges_from`. It is not changed.
        data: Any iterable of batches, as in `compare`; read once, never stored. The sizes of the
            first one are those that the file takes.
        path: The file, FOLDER/NAME.pt2; one that is there is replaced.
        converted: What was deployed up to now: the result says how it differs.
        ranges_from: As for `to_decomposed`.
        pin_ranges: Likewise.
        dynamic_batch: Whether the file takes any size of its inputs' first dimension.
        dynamic_shapes: The axes that it takes any size of, as in `certify`.
        route: A route of `certify`, which deploys the loaded file; "export" runs it as it is.
        engine: The engine of `converted`; None is torch.backends.quantized.engine.
        progress: Show a bar (needs tqdm); None shows it on a terminal only.

    Raises:
        RouteError, DataError: The graph can't be exported, or the file can't run a batch; no batch.
        UnknownNameError, DialectError and others: As in `certify`, `to_decomposed` and `compare`.

    Example:
        >>> import tempfile, torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import prepare_fx
        >>> x, net = torch.ones(1, 8), torch.nn.Sequential(torch.nn.Linear(8, 2)).eval()
        >>> prepared = prepare_fx(net, get_default_qconfig_mapping("fbgemm"), (x,))
        >>> _ = prepared(x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = migrate(prepared, [x, 3 * x], f"{folder}/model.pt2")
        >>> done.ok, done.weights, done.trained.differing
        (True, 1, 0)
    """
    target, chosen = check(path, route)
    own = _read(model, chosen)
    with torch.no_grad(), _rng.same_rng(), _replacing(target) as temporary:
        graph = to_decomposed(own.graph_module, ranges_from=ranges_from, pin_ranges=pin_ranges)
        file, trained = SavedFile(temporary, with_code(dialects.read(graph), own)), _Trained.of(own)
        axes = open_axes(file.reading, dynamic_shapes, dynamic_batch)
        watched = Watched(file.deployed_by(chosen), file.reading, axes, "migrate")
        batches = _seen(watched, file, trained, data, progress)
        report = _compared(model, converted, batches, engine)
        return _migration(target, file, watched, trained, report)


def _check_device(own: Reading, route: Route) -> None:
    """A file holds its model's device; some routes run on the CPU only."""
    home = device_of(own.graph_module, "migrate")
    if home != CPU and not route.anywhere:
        raise DeviceError(
            f"route {route.name!r} deploys files of models on the CPU",
            where="migrate",
            found=f"a model on {home}",
            remedy="pass model.cpu() and batches on the CPU, or route='export'",
        )


def _seen(
    watched: Watched, file: SavedFile, trained: _Trained, data: Any, progress: bool | None
) -> Iterator[Any]:
    """Yield each batch when the file, the graph and the frozen model have run on it."""
    for args in watched.stream(data, progress):
        trained.batch(file.program, args)
        yield args


def _compared(
    model: nn.Module, converted: nn.Module | None, batches: Iterator[Any], engine: Engine | None
) -> Report | None:
    """What the old conversion computes, on the batches as they come; reads them in any case."""
    if converted is None:
        for _ in batches:
            pass
        return None
    return compare(model, converted, batches, engine=engine, noise_floor=False, progress=False)


def _migration(
    path: Path, file: SavedFile, watched: Watched, trained: _Trained, report: Report | None
) -> Migration:
    return Migration(
        path=str(path),
        size=file.path.stat().st_size,
        dynamic_batch=_opens_batch(watched.dynamic),
        sites=len(file.reading.activations),
        weights=len(file.reading.weights),
        certificate=_identified(watched.certificate(), file.path),
        trained=trained.found if trained.frozen is not None else None,
        report=report,
        notes=(*trained.notes, *file.notes),
    )


def _identified(certificate: Certificate, path: Path) -> Certificate:
    return replace(certificate, identity={**certificate.identity, "file": file_digest(path)})


def _opens_batch(dynamic: Dynamic) -> bool:
    return dynamic if isinstance(dynamic, bool) else any(0 in axes_of(a) for a in dynamic)


def check(path: str | Path, route: str) -> tuple[Path, Route]:
    """Refuse what can't be written or deployed, before anything slow runs.

    Args:
        path: The file.
        route: The route's name.

    Raises:
        DataError: It is no path of a .pt2 file in a folder that there is.
        UnknownNameError: There is no such route.
        RouteError: The route does not start from a decomposed graph.

    Example:
        >>> check("model.pt2", "export")[1].name
        'export'
    """
    target, found, problem = Path(path), _registry.find(route, "migrate"), None
    if target.suffix != SUFFIX:  # torch.export warns of any other
        problem = f"the suffix is {target.suffix!r}, not {SUFFIX!r}"
    elif not target.parent.is_dir():
        problem = f"there is no folder {target.parent}"
    elif target.is_dir():
        problem = "it is a folder"
    if problem is not None:
        raise DataError(
            f"can't write {target}: {problem}", where="migrate", expected=f"FOLDER/NAME{SUFFIX}"
        )
    if found.deploy is None:
        raise RouteError(
            f"route {route} does not start from a decomposed graph, so not from a file of one",
            where="migrate",
            remedy=f"call fxqfix.certify(prepared, {route!r}, data) for it",
        )
    return target, found


def _read(model: nn.Module, route: Route) -> Reading:
    refuse_non_finite(model, "migrate")
    reading = dialects.read(model, "migrate")
    _check_device(reading, route)
    if reading.prepared and reading.training:
        raise DialectError(
            "the model is in train mode: its file would hold dropout and BatchNorm as in training",
            where="migrate",
            expected="a model in eval mode",
            remedy="call prepared.eval(); move_exported_model_to_eval(prepared) in the PT2E flow",
        )
    return reading


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to: the file gets `path` at the end, or is gone where anything failed."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{SUFFIX}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class _Trained:
    """The frozen model, and how far the file's outputs are from its outputs."""

    frozen: fx.GraphModule | None
    notes: tuple[str, ...] = ()
    found: Discrepancy = field(default_factory=Discrepancy)
    states: tuple[State, ...] = ()

    @classmethod
    def of(cls, reading: Reading) -> _Trained:
        """The frozen form of a prepared model; none where it computes something else."""
        if not reading.prepared:
            note = f"no prepared model was given ({reading.dialect}): the graph is the reference"
            return cls(None, (note,))
        frozen = freeze(reading.graph_module)
        if any(_torch.is_dynamic(m) or _pt2e.is_blockwise(m) for m in frozen.modules()):
            note = "freeze(prepared) leaves in float what is quantized at run time: not compared"
            return cls(None, (note,))
        return cls(frozen)

    def batch(self, program: nn.Module, args: tuple[Any, ...]) -> None:
        """Add one batch."""
        if self.frozen is None:
            return
        copies = [_torch.tree_map_tensors(Tensor.clone, args) for _ in range(2)]
        if not self.states:
            self.states = (State(self.frozen), State(program))
        with self.states[0].held(), self.states[1].held():
            self._compare(program, args, copies)

    def _compare(self, program: nn.Module, args: tuple[Any, ...], copies: list[Any]) -> None:
        assert self.frozen is not None
        try:
            with _rng.same_rng():
                wanted = list(tensors_of([self.frozen.forward(*copies[0])]))
        except Exception as error:  # a model can raise anything
            raise cannot_run("freeze(model)", error, "migrate", args) from error
        with _rng.same_rng():
            found = tensors_of([program(*copies[1])])
            for a, b in zip(wanted, found, strict=True):
                self.found += float_discrepancy(a, b)
