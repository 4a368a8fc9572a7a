"""Models on CUDA, for real where there is a GPU, else on a pretended device (tests/pretend.py).

There every tensor has its values, each op is checked as CUDA checks it, and the figures have to be
those of the CPU; fake tensors on "cuda" say the same of what needs no values.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.ao.quantization import (
    disable_observer,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet, set_flag
from fxqfix.errors import DeviceError, UnsupportedError
from fxqfix.passes import InsertShadows
from tests.engines.nets import NETS, SHAPES
from tests.engines.test_emulate import Record, _data, converted
from tests.engines.test_samples import _cases, _codes
from tests.op_flows import batches, convert, prepare
from tests.op_samples import Sample
from tests.pretend import DEVICE

ENGINE = "fbgemm"
# UNet's bilinear resize is a composite of other ops, with other roundings, for tensors of any
# class but torch's own; the random streams of the others are not in play.
SAME_FLOATS = ("PlainCNN", "Residual", "Mobile", "Shuffle", "MLP", "Recurrent")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    with quantized_engine(ENGINE), torch.no_grad():
        yield


@functools.cache
def _trained(name: str) -> tuple[fx.GraphModule, Tensor]:
    """A prepared model on the CPU, its observers off, and a batch."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES.get(name, (4, 3, 16, 16))
    x = torch.randn(shape, generator=generator)
    with quantized_engine(ENGINE), quiet(), torch.no_grad():
        torch.manual_seed(0)
        mapping = get_default_qat_qconfig_mapping(ENGINE)
        prepared = prepare_qat_fx(NETS[name]().train(), mapping, (x,))
        for _ in range(3):
            prepared(torch.randn(shape, generator=generator))
    return prepared.eval().apply(disable_observer), 2 * x


@functools.cache
def _converted(name: str) -> fx.GraphModule:
    with quantized_engine(ENGINE), quiet():
        return convert_fx(copy.deepcopy(_trained(name)[0]))


def _there(name: str, device: str) -> tuple[Any, Tensor]:
    prepared, x = _trained(name)
    return copy.deepcopy(prepared).to(device), x.to(device)


def _devices(model: nn.Module) -> set[str]:
    return {str(t.device) for t in (*model.parameters(), *model.buffers())}


def _pretended(device: str) -> bool:
    return not device.startswith("cuda")


class _Where(fx.Interpreter):
    """Where every value of a graph lies; scalars count as well."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.devices: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        values = torch.utils._pytree.tree_leaves(found)
        self.devices |= {str(v.device) for v in values if isinstance(v, Tensor)}
        return found


# ------------------------------------------------------------------------- results' devices

MADE: dict[str, Callable[[Any], fx.GraphModule]] = {
    "freeze": fxqfix.freeze,
    "to_decomposed": fxqfix.to_decomposed,
    "not pinned": lambda m: fxqfix.to_decomposed(m, pin_ranges=False),
    "pinned codes": lambda m: fxqfix.to_decomposed(m, pin_ranges="codes"),
    "twin": lambda m: InsertShadows(m)(fxqfix.to_decomposed(m)).graph_module,
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["Residual", "Mobile", "Recurrent"])
def test_what_is_made_lies_where_the_model_does(name: str, made: str, device: str) -> None:
    prepared, x = _there(name, device)
    before = {k: v.clone() for k, v in prepared.state_dict().items() if isinstance(v, Tensor)}
    model = MADE[made](prepared)
    assert _devices(model) == {device}
    where = _Where(model)
    found = where.run(x)
    assert where.devices == {device}
    if _pretended(device):
        here = MADE[made](_trained(name)[0])
        assert torch.equal(found.cpu(), here(_trained(name)[1]))
    state = prepared.state_dict()
    assert all(torch.equal(v, state[k]) and v.device == state[k].device for k, v in before.items())


@pytest.mark.parametrize(
    ("name", "engine_"),
    [*((name, "fbgemm") for name in NETS), ("Mobile", "qnnpack"), ("Mobile", "onednn")],
)
def test_emulated_codes_are_the_engines(name: str, engine_: str, device: str) -> None:
    if engine_ not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no engine {engine_}")
    with quantized_engine(engine_), quiet():
        emulated = fxqfix.emulate(converted(name, engine_))
    here, there = Record(emulated), Record(copy.deepcopy(emulated).to(device))
    here.run(_data(name))
    there.run(_data(name).to(device))
    for site, codes in here.codes.items():
        assert str(there.codes[site].device) == device
        assert torch.equal(codes, there.codes[site].cpu()), site


def _samples() -> Iterator[Any]:
    for case in _cases():
        sample, setting, engine = case.values
        # One asks for the CPU by name; float16 and dynamic kernels have rows of their own.
        if engine in ("fbgemm", "qnnpack") and sample.name != "shape_eager":
            yield pytest.param(sample, setting, engine, id=case.id)


@pytest.mark.parametrize(("sample", "setting", "own"), list(_samples()))
def test_each_op_of_the_table(sample: Sample, setting: str, own: str, device: str) -> None:
    if own not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no such engine")
    with quantized_engine(own), quiet():
        try:
            converted = convert(sample, setting, prepare(sample, setting))
            data = list(batches(sample))
            wanted = [_codes(converted(*batch)) for batch in data]
            emulated = fxqfix.emulate(converted)
        except (RuntimeError, UnsupportedError) as error:  # which: tests/engines/test_samples.py
            pytest.skip(f"not converted, run or emulated: {str(error).splitlines()[0]}")
    model = copy.deepcopy(emulated).to(device)
    for batch, codes in zip(data, wanted, strict=True):
        moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
        for a, b in zip(codes, _codes(model(*moved)), strict=True):
            assert str(b.device) == device
            # A float op of the GPU's own rounds in its own way.
            assert torch.equal(a, b.cpu()) or (a.is_floating_point() and not _pretended(device))


# ------------------------------------------------------------------------- flows


def _rows(report: fxqfix.Report) -> list[Any]:
    """What a report says; energies are sums of float64, in another order on another device."""
    return [
        (
            r.name,
            dict(r.causes),
            *(
                (d.elements, d.differing, d.max_lsb, d.sum_lsb, d.out_of_range)
                for d in (r.local, r.cumulative, r.noise_floor)
                if d is not None
            ),
        )
        for r in report.rows
    ]


def _check(found: fxqfix.Report, here: Callable[[], fxqfix.Report], device: str) -> None:
    assert found.unexplained == 0
    assert found.coverage.paired
    if _pretended(device):
        assert _rows(found) == _rows(here())


@pytest.mark.parametrize(
    ("name", "given"), [*((name, True) for name in SAME_FLOATS), ("Residual", False)]
)
def test_compare_with_an_int8_model(name: str, given: bool, device: str) -> None:
    (there, y), (here, x) = _there(name, device), _trained(name)
    converted = _converted(name) if given else None
    found = fxqfix.compare(there, converted, [y], culprits=2)
    _check(found, lambda: fxqfix.compare(here, converted, [x]), device)
    assert any("was emulated on " + device in note for note in found.notes)
    assert not any("emulated" in n for n in fxqfix.compare(here, converted, [x]).notes)
    assert found.corrected


@pytest.mark.parametrize("name", ["Mobile", "Recurrent"])
def test_compare_with_a_decomposed_model(name: str, device: str) -> None:
    (there, y), (here, x) = _there(name, device), _trained(name)
    found = fxqfix.compare(there, fxqfix.to_decomposed(there), [y])
    assert found.exact
    _check(found, lambda: fxqfix.compare(here, fxqfix.to_decomposed(here), [x]), device)


def test_culprits_are_the_same_on_the_kernels_own_grids(device: str) -> None:
    """An emulated kernel has its input's grid built in: corrected codes are put on it."""
    (there, y), (here, x) = _there("Residual", device), _trained("Residual")
    converted = fxqfix.to_int8(here)  # its grids are the trained ones
    weight = converted.get_submodule(
        next(str(n.target) for n in converted.graph.nodes if n.op == "call_module")
    )
    with quiet():
        packed, bias = weight._weight_bias()  # type: ignore[operator]  # a quantized module
        weight.set_weight_bias(packed, bias + 0.05)  # type: ignore[operator]
    found = fxqfix.compare(there, converted, [y], culprits=3)
    wanted = fxqfix.compare(here, converted, [x], culprits=3)
    assert wanted.corrected
    if _pretended(device):
        assert [str(c) for c in found.corrected or ()] == [str(c) for c in wanted.corrected or ()]


def test_lint_and_inspect(device: str) -> None:
    (there, _), (here, _) = _there("Residual", device), _trained("Residual")
    assert fxqfix.lint(there).findings == fxqfix.lint(here).findings
    assert fxqfix.inspect(there) == fxqfix.inspect(here)


def test_conversion_is_of_a_copy_on_the_cpu(device: str) -> None:
    (there, _), (here, x) = _there("Residual", device), _trained("Residual")
    made, wanted = fxqfix.to_int8(there), fxqfix.to_int8(here)
    certificate = fxqfix.certificate_of(made)
    assert certificate.ok
    assert f"the model is on {device}" in str(certificate)
    assert "the model is on" not in str(fxqfix.certificate_of(wanted))
    assert torch.equal(made(x), wanted(x))
    assert _devices(there) == {device}


def test_repair(device: str) -> None:
    (there, y), (here, x) = _there("Mobile", device), _trained("Mobile")
    converted = _converted("Mobile")
    found = fxqfix.repair(there, converted, data=[y])
    wanted = fxqfix.repair(here, converted, data=[x])
    assert found.applied == wanted.applied
    assert found.after is not None
    assert found.after.unexplained == 0
    assert torch.equal(found.graph_module(x), wanted.graph_module(x))


def test_repair_of_a_decomposed_model(device: str) -> None:
    there, y = _there("Residual", device)
    decomposed = fxqfix.to_decomposed(there)
    weight = next(b for n, b in decomposed.named_buffers() if n.endswith("_weight"))
    weight.view(-1)[0] += 5 if int(weight.view(-1)[0]) < 100 else -5
    found = fxqfix.repair(there, decomposed, data=[y])
    assert [m.step for m in found.applied] == ["restore-qparams"]
    assert _devices(found.graph_module) == {device}
    assert found.after is not None
    assert found.after.exact


@pytest.mark.parametrize("route", ["int8:fbgemm", "float64"])
def test_certify(route: str, device: str) -> None:
    (there, y), (here, x) = _there("Residual", device), _trained("Residual")
    found, wanted = fxqfix.certify(there, route, [y]), fxqfix.certify(here, route, [x])
    assert found.ok
    if _pretended(device):
        assert (found.sites, found.outputs) == (wanted.sites, wanted.outputs)
    if route != "float64":
        said = "\n".join(found.notes)
        assert f"emulated on {device}" in said
        assert f"the model is on {device}" in said


def test_a_route_of_the_cpu_takes_a_copy(device: str) -> None:
    pytest.importorskip("onnxruntime")
    if _pretended(device):
        pytest.skip("torch.onnx exports real tensors only")
    there, y = _there("Residual", device)
    found = fxqfix.certify(there, "onnxruntime", [y])
    assert any(f"the model is on {device}" in note for note in found.notes)


def test_parameters_and_golden_vectors(device: str) -> None:
    (there, y), (here, x) = _there("Residual", device), _trained("Residual")
    found, wanted = fxqfix.extract_parameters(there), fxqfix.extract_parameters(here)
    for a, b in zip(found, wanted, strict=True):
        assert a.name == b.name
        for name in ("weight", "bias", "bias_int32", "multiplier", "fixed_multiplier"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs), (a.name, name)  # on the CPU both
    golden = fxqfix.golden_vectors(there, y)
    assert {str(v.device) for v in golden.values.values()} == {"cpu"}
    if _pretended(device):
        others = fxqfix.golden_vectors(here, x).values
        assert all(torch.equal(v, others[k]) for k, v in golden.values.items())


def test_an_eager_model(device: str) -> None:
    net = nn.Sequential(
        torch.ao.quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()
    ).eval()
    net.qconfig = get_default_qconfig(ENGINE)  # type: ignore[assignment]  # torch's own way
    x = _trained("Residual")[1]
    with quiet():
        prepared = torch.ao.quantization.prepare(net)
    prepared(x)
    found = fxqfix.compare(copy.deepcopy(prepared).to(device), None, [x.to(device)])
    _check(found, lambda: fxqfix.compare(prepared, None, [x]), device)
    assert _devices(fxqfix.freeze(copy.deepcopy(prepared).to(device))) == {device}


# ------------------------------------------------------------------------- switches


def _no_switch() -> None:
    pass


def _tf32() -> None:
    torch.set_float32_matmul_precision("high")
    set_flag(torch.backends.cudnn, "allow_tf32", True)


def _half() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def _benchmark() -> None:
    set_flag(torch.backends.cudnn, "benchmark", True)


def _deterministic() -> None:
    torch.use_deterministic_algorithms(True)


SWITCHES = (_no_switch, _tf32, _half, _benchmark, _deterministic)


@pytest.fixture
def put_back() -> Iterator[None]:
    backends = torch.backends
    conv, bench = backends.cudnn.allow_tf32, backends.cudnn.benchmark
    matmul = backends.cuda.matmul
    half = matmul.allow_fp16_reduced_precision_reduction
    brain = matmul.allow_bf16_reduced_precision_reduction
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    set_flag(backends.cudnn, "allow_tf32", conv)  # modules of torch's own tests freeze the flags
    set_flag(backends.cudnn, "benchmark", bench)
    matmul.allow_fp16_reduced_precision_reduction = half
    matmul.allow_bf16_reduced_precision_reduction = brain


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.usefixtures("put_back")
def test_no_switch_makes_emulation_inexact(
    switch: Callable[[], None], cast: torch.dtype | None, device: str
) -> None:
    x = _trained("Mobile")[1]
    converted = _converted("Mobile")
    emulated = fxqfix.emulate(converted).to(device)
    wanted = converted(x)
    switch()
    kind = "cpu" if _pretended(device) else "cuda"
    with torch.autocast(kind, cast, enabled=cast is not None):
        assert torch.equal(emulated(x.to(device)).cpu(), wanted)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.usefixtures("put_back")
def test_no_switch_changes_a_comparison(switch: Callable[[], None], device: str) -> None:
    there, y = _there("PlainCNN", device)
    converted = _converted("PlainCNN")
    wanted = _rows(fxqfix.compare(there, converted, [y]))
    switch()
    assert _rows(fxqfix.compare(there, converted, [y])) == wanted


# ------------------------------------------------------------------------- what is refused


def _refused(call: Callable[[], Any], problem: str, remedy: str) -> str:
    with pytest.raises(DeviceError, match=problem) as caught:
        call()
    assert remedy in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        fxqfix.to_int8,
        fxqfix.freeze,
        fxqfix.to_decomposed,
        lambda m: fxqfix.compare(m, None, [_trained("Residual")[1]]),
        lambda m: fxqfix.certify(m, "float64", [_trained("Residual")[1]]),
        lambda m: fxqfix.repair(m, _converted("Residual")),
        lambda m: fxqfix.golden_vectors(m, _trained("Residual")[1]),
    ],
)
def test_a_model_on_several_devices(call: Callable[[Any], Any], device: str) -> None:
    prepared = copy.deepcopy(_trained("Residual")[0])
    prepared.head.to(device)
    said = _refused(lambda: call(prepared), "parts lie on several devices", f".to({device!r})")
    assert "on cpu" in said
    assert f"on {device}" in said


def test_an_int8_model_that_was_moved(device: str) -> None:
    (there, y), (here, x) = _there("Residual", device), _trained("Residual")
    moved = copy.deepcopy(_converted("Residual")).to(device)
    for call in (
        lambda: fxqfix.compare(there, moved, [y]),
        lambda: fxqfix.compare(here, moved, [x]),
        lambda: fxqfix.repair(there, moved, data=[y]),
        lambda: fxqfix.emulate(moved),
        lambda: fxqfix.golden_vectors(moved, y),
    ):
        _refused(call, "int8 kernels run on the CPU only", "converted.cpu()")
    found = fxqfix.compare(there, moved.cpu(), [y])  # the remedy
    assert found.unexplained == 0


def test_two_models_on_different_devices(device: str) -> None:
    (there, y), (here, x) = _there("Residual", device), _trained("Residual")
    decomposed = fxqfix.to_decomposed(here)
    _refused(
        lambda: fxqfix.compare(there, decomposed, [y]), "on different devices", f"to({device!r})"
    )
    assert fxqfix.compare(there, copy.deepcopy(decomposed).to(device), [y]).exact
    _refused(
        lambda: fxqfix.compare(here, copy.deepcopy(decomposed).to(device), [x]),
        "on different devices",
        "to('cpu')",
    )


def test_a_batch_on_another_device(device: str) -> None:
    (there, y), (here, x) = _there("Residual", device), _trained("Residual")
    for call, remedy in (
        (lambda: fxqfix.compare(there, _converted("Residual"), [x]), f".to({device!r})"),
        (lambda: fxqfix.compare(here, _converted("Residual"), [y]), ".to('cpu')"),
        (lambda: fxqfix.certify(there, "float64", [x]), f".to({device!r})"),
        (lambda: fxqfix.golden_vectors(there, x), f".to({device!r})"),
        (lambda: fxqfix.golden_vectors(_converted("Residual"), y), ".to('cpu')"),
    ):
        _refused(call, "batch and model are on different devices", remedy)


def test_an_op_that_is_not_emulated(device: str) -> None:
    """What can't be emulated can't be compared there; the remedy is the CPU."""
    there, y = _there("Residual", device)
    with quantized_engine("qnnpack"), quiet():
        other = convert_fx(copy.deepcopy(_trained("Residual")[0]))
    _refused(
        lambda: fxqfix.compare(there, other, [y], engine="fbgemm"),
        "can't be emulated",
        "prepared.cpu()",
    )


# ------------------------------------------------------------------------- fake tensors


# A build without CUDA can name that device, and copy nothing on it.
FAKE = "cuda:0" if torch.version.cuda else DEVICE


def _fake(mode: FakeTensorMode, model: fx.GraphModule, x: Tensor) -> tuple[fx.GraphModule, Any]:
    """The model, which is changed, and its input, as fake tensors."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None:
                    store[name] = mode.from_tensor(value.detach()).to(FAKE)
    return model, mode.from_tensor(x).to(FAKE)


@pytest.mark.parametrize("made", ["to_decomposed", "pinned codes"])
def test_a_decomposed_graph_of_fake_tensors(made: str) -> None:
    prepared, x = _trained("Mobile")
    model = MADE[made](prepared)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, y = _fake(mode, model, x)
        where = _Where(fake)
        where.run(y)
    assert where.devices == {FAKE}


@pytest.mark.parametrize("name", ["PlainCNN", "Residual", "MLP"])
def test_an_emulated_graph_of_fake_tensors(name: str) -> None:
    """Nothing asks for a value, which would wait for the device.

    Only sums that saturate do, and on VNNI these have none.
    """
    _, x = _trained(name)
    model = fxqfix.emulate(_converted(name), isa="vnni")
    model(x)  # what is asked once of a build of torch
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, y = _fake(mode, model, x)
        where = _Where(fake)
        where.run(y)
    assert where.devices == {FAKE}
