"""migrate: the file that was written is what was trained, bit for bit; what it refuses."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    get_default_qat_qconfig,
    get_default_qconfig_mapping,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

import fxqfix
from fxqfix import Migration, _pt2e, migrate
from fxqfix.errors import (
    DataError,
    DeviceError,
    DialectError,
    FxqfixError,
    MissingDependencyError,
    ModelRunError,
    PairingError,
    RangeUnknownError,
    RouteError,
    TraceError,
    UncalibratedError,
    UnknownNameError,
)
from fxqfix.routes import Deployed, _file, _registry
from fxqfix.routes.export import ROUTE, exported
from tests import op_flows, op_samples
from tests.routes import nets
from tests.states import fingerprint

Written = tuple[Migration, Path]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """One file for a fixed batch size, with the old conversion, from a one-shot iterator."""
    path = tmp_path_factory.mktemp("static") / "model.pt2"
    path.write_bytes(b"of yesterday")  # it is replaced
    model = nets.prepared("residual")
    old = convert_fx(copy.deepcopy(model))
    return migrate(model, iter(nets.batches()), path, converted=old, engine="fbgemm"), path


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """One file for any batch size; the first batch is a single image."""
    path = tmp_path_factory.mktemp("dynamic") / "model.pt2"
    data = [3 * nets.image(size) for size in (1, 4, 7)]
    return migrate(nets.prepared("residual"), data, path, dynamic_batch=True), path


def loaded(written: Written) -> fx.GraphModule:
    program: Any = torch.export.load(written[1])
    found: fx.GraphModule = program.module()
    return found


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "batches"), [("static", 3), ("dynamic", 3)])
def test_the_file_keeps_every_bit(kind: str, batches: int, request: pytest.FixtureRequest) -> None:
    done, path = request.getfixturevalue(kind)
    assert done.ok
    assert done.certificate.exact
    assert done.certificate.batches == batches
    assert done.certificate.pinned == done.certificate.narrow == done.sites == 8
    assert done.weights == 4
    assert done.trained.differing == 0 < done.trained.elements
    assert done.size == path.stat().st_size
    assert left(path.parent) == ["model.pt2"]
    program, frozen = loaded((done, path)), fxqfix.freeze(nets.prepared("residual"))
    for size, gain in ((4, 1.0), (4, 3.0), *([(2, 1.5), (1, 1.0)] if done.dynamic_batch else [])):
        x = gain * nets.image(size, seed=9)
        assert torch.equal(program(x), frozen(x))
        assert torch.equal(program(x), nets.decomposed("residual")(x))


def test_the_weights_in_the_file_are_integers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 256)).eval()
    x = torch.rand(2, 256)
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    done = migrate(prepared, [x], tmp_path / "int8.pt2")
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "float.pt2")
    large = [v for v in torch.export.load(done.path).state_dict.values() if v.numel() > 256]
    assert [v.dtype for v in large] == [torch.int8]
    spared = (tmp_path / "float.pt2").stat().st_size - done.size
    assert spared > 2 * 256 * 256  # three of four bytes, less what the quantize ops take


def test_the_file_runs_without_fxqfix(static: Written, tmp_path: Path) -> None:
    x = 1.5 * nets.image(seed=5)
    torch.save((x, fxqfix.freeze(nets.prepared("residual"))(x)), tmp_path / "wanted.pt")
    code = (
        "import sys, torch, torch.ao.quantization.quantize_fx\n"
        "x, wanted = torch.load(sys.argv[2])\n"
        "found = torch.export.load(sys.argv[1]).module()(x)\n"
        "assert 'fxqfix' not in sys.modules\n"
        "print(torch.equal(found, wanted))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, static[1], tmp_path / "wanted.pt"]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert found.stdout == "True\n", found.stderr


def test_the_old_conversion_is_summed_up(static: Written) -> None:
    done, _ = static
    assert done.report is not None
    plain = fxqfix.compare(
        nets.prepared("residual"),
        convert_fx(copy.deepcopy(nets.prepared("residual"))),
        nets.batches(),
        engine="fbgemm",
    )
    assert done.report.causes == plain.causes
    assert done.report.causes["range-lost"] > 0
    text = str(done)
    assert "ok\n- loaded back: 8 sites and 4 weights equal the graph's, to the bit" in text
    assert "its outputs against freeze(prepared): 0 of 120 values differ" in text
    assert "what ran is the .pt2 file, loaded back" in text
    assert "the old conversion, against the prepared model: not ok, differs in" in text
    assert f"- range-lost: {done.report.causes['range-lost']} codes in" in text
    told = json.loads(done.to_json())
    assert told["old_conversion"] == done.report.causes
    assert (told["ok"], told["certificate"]["exact"], told["trained"]["differing"]) == (
        True,
    ) * 2 + (0,)


# --- what goes in --------------------------------------------------------------------------------


def eager() -> nn.Module:
    net = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU()).train()
    net.qconfig = get_default_qat_qconfig("fbgemm")
    prepared = prepare_qat(net)
    prepared(nets.image())
    return prepared.eval()


def test_an_eager_model(tmp_path: Path) -> None:
    model = eager()
    before = fingerprint(model)
    data = [nets.image(size) * 3 for size in (4, 1)]
    done = migrate(model, data, tmp_path / "model.pt2", dynamic_batch=True)
    assert done.ok
    assert done.certificate.exact
    assert done.trained is not None
    assert done.trained.differing == 0 < done.trained.elements
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", ["x86-reduced", "xnnpack-dynamic"])
def test_pt2e_models(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("torchao", reason="PT2E needs torchao")
    from tests.dialects import pt2e_nets

    net = "mlp" if "dynamic" in mode else "residual"
    data = [pt2e_nets.image(), pt2e_nets.image(seed=1, gain=3.0)]
    done = migrate(pt2e_nets.prepared(mode, net), data, tmp_path / "model.pt2")
    certificate = done.certificate
    assert all(record.found.exact for record in (*certificate.sites, *certificate.outputs))
    assert done.verdict == ("not judged" if mode == "xnnpack-dynamic" else "ok")
    if mode == "xnnpack-dynamic":
        assert done.trained is None
        assert "not compared" in done.notes[0]
    else:
        assert done.trained.differing == 0 < done.trained.elements
    program: Any = torch.export.load(done.path)
    assert any(v.dtype == torch.int8 for v in program.state_dict.values())


def test_a_pt2e_model_of_any_batch_size(tmp_path: Path) -> None:
    """It has to be open in the model's own export, else the error says so."""
    pytest.importorskip("torchao", reason="PT2E needs torchao")
    from tests.dialects import pt2e_nets

    def prepared(shapes: Any) -> fx.GraphModule:
        net, x = pt2e_nets.Mlp().eval(), pt2e_nets.image()
        graph_module = torch.export.export(net, (x,), dynamic_shapes=shapes).module()
        spec = pt2e_nets.activation_spec(quant_max=127)
        model = pt2e_nets.prepare_pt2e(graph_module, pt2e_nets.Tiny(pt2e_nets.weight_spec(), spec))
        model(x)
        return model

    data = [pt2e_nets.image(size, gain=3.0) for size in (2, 1, 5)]
    path = tmp_path / "model.pt2"
    model = prepared(({0: torch.export.Dim("batch")},))
    done = migrate(model, data, path, dynamic_batch=True)
    assert done.ok
    assert done.certificate.exact
    assert done.certificate.pinned == done.sites == 3
    path.unlink()
    with pytest.raises(RouteError, match="where its own export left it open"):
        migrate(prepared(None), data, path, dynamic_batch=True)
    assert left(tmp_path) == []


def test_pt2e_without_its_conversion(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("torchao", reason="PT2E needs torchao")
    from tests.dialects import pt2e_nets

    monkeypatch.setattr(_pt2e, "_CONVERSIONS", ("no.such.convert_pt2e",) * 2)
    model = pt2e_nets.prepared("x86-reduced", "residual")
    with pytest.raises(MissingDependencyError, match=r"no convert_pt2e .*fxqfix\[pt2e\]"):
        migrate(model, [pt2e_nets.image()], tmp_path / "model.pt2")
    assert left(tmp_path) == []


def test_a_reference_model_with_its_ranges(tmp_path: Path) -> None:
    model = nets.prepared("plain")
    reference = convert_to_reference_fx(copy.deepcopy(model))
    done = migrate(reference, [nets.image()], tmp_path / "model.pt2", ranges_from=model)
    assert done.certificate.exact
    assert done.certificate.pinned == done.certificate.narrow > 0
    assert done.trained is None
    assert "no prepared model was given (fx-reference)" in str(done)


def test_modules_that_export_opens(tmp_path: Path) -> None:
    """An attention's own sites are in the file, and in no row of the certificate."""
    sample = next(s for s in op_samples.SAMPLES if s.name == "attention")
    prepared = op_flows.prepare(sample, "eager-ptq")
    data = list(op_flows.batches(sample))[:1]
    done = migrate(prepared, data, tmp_path / "model.pt2")
    assert done.ok
    assert done.certificate.exact
    assert [s.name for s in done.certificate.sites] == ["x", "inner_linear"]
    assert (done.sites, done.weights) == (2, 1)
    program: Any = torch.export.load(done.path)
    inside = len([s for s in fxqfix.inspect(program) if s.kind == "activation"]) - done.sites
    assert done.notes[0].startswith(f"{inside} sites inside of modules that export opens")


def test_nothing_is_perturbed_and_data_is_read_once(tmp_path: Path) -> None:
    model, data, state = nets.prepared("plain"), nets.batches(), torch.get_rng_state()
    before, copies, read = fingerprint(model), [b.clone() for b in data], list[int]()

    def once() -> Iterator[Tensor]:
        for index, batch in enumerate(data):
            read.append(index)
            yield batch

    assert migrate(model, once(), tmp_path / "model.pt2").certificate.batches == 3
    assert read == [0, 1, 2]
    assert fingerprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# --- it sees what is wrong -----------------------------------------------------------------------


def _scaled(graph_module: fx.GraphModule) -> fx.GraphModule:
    wrong = copy.deepcopy(graph_module)
    relu = next(n for n in wrong.graph.nodes if n.name == "relu")
    with wrong.graph.inserting_after(relu):
        more = wrong.graph.call_function(torch.mul, (relu, 1.25))
    relu.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
    wrong.recompile()
    return wrong


def _unpinned(graph_module: fx.GraphModule) -> fx.GraphModule:
    wrong = copy.deepcopy(graph_module)
    clamp = next(n for n in wrong.graph.nodes if n.target is torch.clamp)
    clamp.replace_all_uses_with(clamp.all_input_nodes[0])
    wrong.graph.erase_node(clamp)
    wrong.recompile()
    return wrong


def _other_weight(graph_module: fx.GraphModule) -> fx.GraphModule:
    wrong = copy.deepcopy(graph_module)
    weight = next(b for b in wrong.buffers() if b.dtype == torch.int8)
    weight.flatten()[0] += 1 if int(weight.flatten()[0]) < 127 else -1
    return wrong


def test_a_file_that_computes_something_else(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_file, "exported", lambda g, *rest: exported(_scaled(g), *rest))
    done = migrate(nets.prepared("residual"), [nets.image()], tmp_path / "model.pt2")
    assert not done.ok
    assert done.trained.differing > 0
    assert [s.name for s in done.certificate.sites if s.found.differing] == ["relu"]
    assert "NOT what was trained" in str(done)


@pytest.mark.parametrize(
    ("change", "found"),
    [(_unpinned, "grids, ranges or clamps"), (_other_weight, "integer weights")],
)
def test_a_file_with_another_state(
    tmp_path: Path, monkeypatch, change: Callable[[Any], Any], found: str
) -> None:
    monkeypatch.setattr(_file, "exported", lambda g, *rest: exported(change(g), *rest))
    with pytest.raises(RouteError, match=f"not the graph that was exported. Found: other {found}"):
        migrate(nets.prepared("plain"), [nets.image()], tmp_path / "model.pt2")
    assert left(tmp_path) == []


def test_another_route_starts_from_the_file(tmp_path: Path, monkeypatch) -> None:
    given: list[fx.GraphModule] = []

    def deploy(graph_module: fx.GraphModule, batch: Any, dynamic: bool) -> Deployed:
        given.append(graph_module)
        return ROUTE.deploy(graph_module, batch, dynamic)  # type: ignore[misc]

    planted = replace(ROUTE, name="planted", deploy=deploy)
    monkeypatch.setattr(_registry, "ROUTES", {**_registry.ROUTES, "planted": planted})
    data = [nets.image()]
    done = migrate(nets.prepared("plain"), data, tmp_path / "model.pt2", route="planted")
    assert done.ok
    assert done.certificate.route == "planted"
    assert len(given) == 2  # the whole, and its parts
    for graph_module in given:  # ATen ops: of the file, and not of the graph in memory
        assert torch.ops.aten.relu.default in {n.target for n in graph_module.graph.nodes}


# --- bad input -----------------------------------------------------------------------------------


class Choosing(nn.Module):
    """A leaf whose control flow depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def unexportable() -> fx.GraphModule:
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig

    net = nn.Sequential(nn.Linear(4, 4), Choosing()).eval()
    custom = PrepareCustomConfig().set_non_traceable_module_classes([Choosing])
    mapping, x = get_default_qconfig_mapping("fbgemm"), torch.rand(2, 4)
    prepared = prepare_fx(net, mapping, (x,), prepare_custom_config=custom)
    prepared(x)
    return prepared


def uncalibrated() -> fx.GraphModule:
    mapping = get_default_qconfig_mapping("fbgemm")
    return prepare_fx(nn.Sequential(nn.Linear(4, 4)).eval(), mapping, (torch.rand(2, 4),))


class Fixed(nn.Module):
    """Knows its batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1)


def fixed_batch() -> fx.GraphModule:
    mapping = get_default_qconfig_mapping("fbgemm")
    prepared = prepare_fx(Fixed().eval(), mapping, (nets.image(),))
    prepared(nets.image())
    return prepared


def at(size: int) -> list[Tensor]:
    return [nets.image(), nets.image(size)]


REFUSED: dict[str, tuple[type[FxqfixError], str, Callable[[], Any], Any, dict[str, Any]]] = {
    "no batch": (DataError, "migrate: data holds no batch", lambda: nets.prepared("plain"), [], {}),
    "another size": (
        RouteError,
        r"\[\(2, 3, 16, 16\)\].*--dynamic-batch",
        lambda: nets.prepared("plain"),
        at(2),
        {},
    ),
    "a batch of other inputs": (
        ModelRunError,
        r"migrate, batch 0: the model can't run this batch",
        lambda: nets.prepared("plain"),
        [torch.rand(2, 5)],
        {},
    ),
    "another device": (
        DeviceError,
        "batch on meta",
        lambda: nets.prepared("plain"),
        [nets.image().to("meta")],
        {},
    ),
    "a batch size that the model fixes": (
        RouteError,
        "Constraints violated.*leave dynamic_batch=True out",
        fixed_batch,
        at(4),
        {"dynamic_batch": True},
    ),
    "train mode": (
        DialectError,
        r"train mode.*prepared\.eval\(\)",
        lambda: copy.deepcopy(nets.prepared("plain")).train(),
        at(4),
        {},
    ),
    "not exportable": (
        RouteError,
        r"migrate: torch\.export can't take this graph: \w+: .*(data-dep|Dynamic control)",
        unexportable,
        [torch.rand(2, 4)],
        {},
    ),
    "never calibrated": (UncalibratedError, "never saw data", uncalibrated, at(4), {}),
    "float": (DialectError, "^migrate: Sequential holds no observer", nn.Sequential, at(4), {}),
    "no model": (TraceError, "not a module", lambda: 7, at(4), {}),
    "no ranges": (
        RangeUnknownError,
        "ranges_from=",
        lambda: convert_fx(copy.deepcopy(nets.prepared("plain"))),
        at(4),
        {},
    ),
    "no such route": (UnknownNameError, "'tflite'", lambda: None, [], {"route": "tflite"}),
    "a route from elsewhere": (
        RouteError,
        r"fxqfix\.certify\(prepared, 'int8:fbgemm', data\)",
        lambda: None,
        [],
        {"route": "int8:fbgemm"},
    ),
    "another conversion": (
        PairingError,
        "is not a conversion of the prepared one",
        lambda: nets.prepared("plain"),
        at(4),
        {"converted": nets.decomposed("mobile")},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_no_file(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, message, make, data, options = REFUSED[name]
    model = make()
    with pytest.raises(kind, match=message):
        migrate(model, data, tmp_path / "model.pt2", **options)
    assert left(tmp_path) == []
    assert "def forward" not in capfd.readouterr().err  # torch.export prints what it can't take


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.onnx", "the suffix is '.onnx'"),
        ("no/model.pt2", "there is no folder .*no. Expected: FOLDER/NAME.pt2"),
        ("folder.pt2", "it is a folder"),
    ],
)
def test_paths_that_can_t_be_written(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(DataError, match=message):
        migrate(nn.Identity(), [], tmp_path / path)


def test_a_file_that_is_there_survives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"of yesterday")
    with pytest.raises(DataError):
        migrate(nets.prepared("plain"), [], path)
    assert path.read_bytes() == b"of yesterday"
    assert left(tmp_path) == ["model.pt2"]


# --- a loaded file, wherever a model goes --------------------------------------------------------

TAKEN: dict[str, Callable[[Any], bool]] = {
    "inspect": lambda m: len(fxqfix.inspect(m)) == 12,
    "compare": lambda m: fxqfix.compare(nets.prepared("residual"), m, [nets.image()]).exact,
    "to_decomposed": lambda m: torch.equal(
        fxqfix.to_decomposed(m)(nets.image()), nets.decomposed("residual")(nets.image())
    ),
    "certify": lambda m: fxqfix.certify(m, "export", [nets.image()]).exact,
    "extract_parameters": lambda m: len(fxqfix.extract_parameters(m)) == 9,
    "golden_vectors": lambda m: len(fxqfix.golden_vectors(m, nets.image()).ops) == 9,
    "repair": lambda m: fxqfix.repair(nets.prepared("residual"), m).applied == (),
    "ranges_from": lambda m: torch.equal(
        fxqfix.to_decomposed(_reference(), ranges_from=m)(3 * nets.image()),
        fxqfix.to_decomposed(_reference(), ranges_from=nets.prepared("residual"))(3 * nets.image()),
    ),
}


def _reference() -> fx.GraphModule:
    return convert_to_reference_fx(copy.deepcopy(nets.prepared("residual")))


REFUSING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lint": (fxqfix.lint, "lint: only prepared models are checked"),
    "freeze": (fxqfix.freeze, "freeze: .*observers.*before its conversion"),
    "to_int8": (lambda m: fxqfix.to_int8(m, engine="fbgemm"), "before its conversion"),
    "emulate": (
        lambda m: fxqfix.emulate(m, engine="fbgemm"),
        "which has no int8 kernel.*run it as it is",
    ),
    "certify int8": (
        lambda m: fxqfix.certify(m, "int8:fbgemm", [nets.image()]),
        "pass the prepared model",
    ),
    "compare as prepared": (
        lambda m: fxqfix.compare(m, None, [nets.image()]),
        r"compare: the first model is not a prepared one.*compare\(prepared, converted, data\)",
    ),
    "repair as prepared": (
        lambda m: fxqfix.repair(m, nets.decomposed("residual")),
        r"repair: the first model is not a prepared one.*repair\(prepared, converted\)",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_loaded_program_is_taken(static: Written, name: str) -> None:
    assert TAKEN[name](torch.export.load(static[1]))
    if name in ("inspect", "to_decomposed", "extract_parameters"):
        assert TAKEN[name](loaded(static))


@pytest.mark.parametrize("name", REFUSING)
def test_where_a_loaded_program_is_of_no_use(static: Written, name: str) -> None:
    call, message = REFUSING[name]
    for model in (torch.export.load(static[1]), loaded(static)):
        with pytest.raises((DialectError, PairingError), match=message):
            call(model)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("inspect", fxqfix.inspect),
        ("to_decomposed", fxqfix.to_decomposed),
        ("certify", lambda m: fxqfix.certify(m, "export", [])),
        ("extract_parameters", fxqfix.extract_parameters),
        ("golden_vectors", lambda m: fxqfix.golden_vectors(m, torch.ones(1))),
        ("emulate", lambda m: fxqfix.emulate(m, engine="fbgemm")),
        ("compare", lambda m: fxqfix.compare(m, None, [])),
        ("repair", lambda m: fxqfix.repair(nets.prepared("plain"), m)),
        ("repair", lambda m: fxqfix.repair(m, nets.decomposed("plain"))),
        ("lint", fxqfix.lint),
        ("freeze", fxqfix.freeze),
    ],
)
def test_a_float_model_is_refused_by_the_flow_that_was_called(
    name: str, call: Callable[[Any], Any]
) -> None:
    with pytest.raises(DialectError, match=f"^{name}: "):
        call(nn.Sequential(nn.Linear(2, 2)))
