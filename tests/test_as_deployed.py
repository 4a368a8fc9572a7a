"""as_deployed: what is trained is what runs, at every moment; and its gradients, op by op."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.backend_config import get_onednn_backend_config
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import fxqfix
from fxqfix import as_deployed
from fxqfix._torch import quantized_engine
from fxqfix.dialects import read
from fxqfix.engines import ISAS
from fxqfix.errors import (
    DeviceError,
    DialectError,
    FxqfixError,
    NonFiniteError,
    OptionError,
    UncalibratedError,
    UnknownNameError,
    UnsupportedError,
)
from fxqfix.pairing import pair
from tests.engines.nets import NETS
from tests.op_flows import inputs, prepare
from tests.op_samples import SAMPLES, Sample
from tests.states import fingerprint
from tests.test_to_int8 import prepared_net

ENGINES = [e for e in torch.backends.quantized.supported_engines if e != "none"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:must run observer before calling:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:All inputs of this cat operator:UserWarning"),
]

each_engine = pytest.mark.parametrize("engine", ENGINES)


def tensors(value: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(value)
    return [t.dequantize() if t.is_quantized else t for t in found]


def deployed_outputs(model: nn.Module, engine: str, *x: Tensor, config: Any = None) -> list[Tensor]:
    """What torch's own kernels give, of the state as it is."""
    with torch.no_grad(), quantized_engine(engine):
        return tensors(fxqfix.to_int8(model, engine=engine, backend_config=config)(*x))


def equal(found: Any, wanted: Any) -> bool:
    pairs = zip(tensors(found), tensors(wanted), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def loss_of(found: Any) -> Tensor:
    parts = [t for t in tensors(found) if t.requires_grad]
    weights = (torch.linspace(-1, 1, t.numel()).reshape(t.shape) for t in parts)
    return torch.stack([(t * w).sum() for t, w in zip(parts, weights, strict=True)]).sum()


# ------------------------------------------------------------------------------ equality


@each_engine
@pytest.mark.parametrize("name", sorted(NETS))
def test_equals_to_int8_while_it_trains(name: str, engine: str) -> None:
    prepared, x = prepared_net(name, qat=True)
    before = fingerprint(prepared)
    model = as_deployed(prepared, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    start = [p.clone() for p in model.parameters()]
    for step in range(3):
        found = model((1.0 + step) * x)
        assert equal(found, deployed_outputs(model, engine, (1.0 + step) * x))
        optimizer.zero_grad()
        loss_of(found).backward()
        optimizer.step()
    with torch.no_grad():
        assert equal(model(3 * x), deployed_outputs(model, engine, 3 * x))
    assert all(p.grad is not None for p in model.parameters())
    assert not any(map(torch.equal, start, model.parameters()))
    assert fingerprint(prepared) == before
    # The state is that of any prepared model: nothing of the answer comes from this object.
    assert equal(deployed_outputs(model.prepared, engine, x), deployed_outputs(model, engine, x))


# What as_deployed refuses by name, and to_int8 does not: sample -> words of the refusal.
REFUSED = {
    "functional_dropout_qat": "traced in train mode",
    "conv2d_add": "kernel is wrong in torch",  # the addend is read again
}
RUNS = [("fx-qat", "fbgemm"), ("eager-qat", "qnnpack"), ("fx-ptq", "x86"), ("eager-ptq", "onednn")]


def _runs() -> Iterator[Any]:
    for index, sample in enumerate(SAMPLES):
        runs = [run for run in RUNS if run[0] in sample.settings]
        if runs:  # one of them, in turn: each takes about a second
            setting, engine = runs[index % len(runs)]
            yield pytest.param(sample, setting, engine, id=f"{sample.name}-{setting}-{engine}")


@pytest.mark.parametrize(("sample", "setting", "engine"), list(_runs()))
def test_every_row_of_the_op_table(sample: Sample, setting: str, engine: str) -> None:
    prepared, x = prepare(sample, setting), inputs(sample, 1.5, 5)
    config = get_onednn_backend_config() if sample.backend == "onednn" else None
    engine = "onednn" if config is not None else engine
    deploy = functools.partial(as_deployed, prepared, engine=engine, backend_config=config)
    try:
        wanted = deployed_outputs(prepared, engine, *x, config=config)
    except (FxqfixError, RuntimeError):
        with pytest.raises((FxqfixError, RuntimeError)):
            deploy()(*x)
        return
    if sample.name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[sample.name]):
            deploy()
        return
    model = deploy()
    found = model(*x)
    assert equal(found, wanted)
    moved = [p for p in model.parameters() if p.requires_grad]
    if not moved or not any(t.requires_grad for t in tensors(found)):
        return
    loss_of(found).backward()
    torch.optim.SGD(moved, lr=0.05).step()
    assert equal(model(*x), deployed_outputs(model, engine, *x, config=config))


# ----------------------------------------------------------------------------- gradients


class _OpByOp:
    """Autograd of one op at a time, each at the values of torch's own int8 kernels."""

    def __init__(self, model: nn.Module, engine: str) -> None:
        self.frozen = fxqfix.freeze(model)
        with quantized_engine(engine):
            self.int8 = fxqfix.to_int8(model, engine=engine)
        pairs = pair(read(self.frozen), read(self.int8)).pairs
        self.partner = {
            p.prepared.node.name: p.converted.node.name
            for p in pairs
            if p.prepared.site.kind == "activation"
        }

    def run(self, engine: str, *x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of the loss by the frozen model's parameters, and by their names."""
        kernels = _Values(self.int8)
        with torch.no_grad(), quantized_engine(engine):
            kernels.run(*x)
        taken = _Values(self.frozen, {n: kernels.values[m] for n, m in self.partner.items()})
        taken.run(*x)
        output = next(iter(self.frozen.graph.output_node().all_input_nodes))
        result = kernels.values[self.int8.graph.output_node().all_input_nodes[0].name]
        grads = {output.name: torch.linspace(-1, 1, result.numel()).reshape(result.shape)}
        names = {id(p): n for n, p in self.frozen.named_parameters()}
        found: dict[str, Tensor] = {}
        for node in reversed(self.frozen.graph.nodes):
            if node.name not in taken.steps or node.name not in grads:
                continue
            out, leaves, held = taken.steps[node.name]
            wanted = [t for t in (*leaves.values(), *held) if t.requires_grad]
            given = torch.autograd.grad(out, wanted, grads[node.name], allow_unused=True)
            for tensor, grad in zip(wanted, given, strict=True):
                if grad is None:
                    continue
                place = next((n for n, t in leaves.items() if t is tensor), None)
                into = grads if place is not None else found
                key = place or names[id(tensor)]
                into[key] = into[key] + grad if key in into else grad
        return found, grads


class _Values(fx.Interpreter):
    """Runs op by op on detached inputs, with the values that are given in place of some."""

    def __init__(self, model: fx.GraphModule, given: dict[str, Tensor] | None = None) -> None:
        super().__init__(model)
        self.given = given or {}
        self.values: dict[str, Any] = {}
        self.steps: dict[str, tuple[Tensor, dict[str, Tensor], list[Tensor]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if self.given:
            leaves = {i.name: self.env[i].detach().requires_grad_() for i in n.all_input_nodes}
            before = {i: self.env[i] for i in n.all_input_nodes}
            self.env.update({i: leaves[i.name] for i in n.all_input_nodes})
            found = super().run_node(n)
            self.env.update(before)
            if n.op not in ("placeholder", "output"):
                module = self.fetch_attr(str(n.target)) if n.op == "call_module" else nn.Module()
                self.steps[n.name] = found, leaves, list(module.parameters())
            found = self.given.get(n.name, found)
        else:
            found = super().run_node(n)
        if isinstance(found, Tensor):
            self.values[n.name] = found.dequantize() if found.is_quantized else found.detach()
            return found if not self.given else self.values[n.name]
        return found


def _unfolded(model: nn.Module, folded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a BatchNorm's parameters, of those of the folded weight and bias."""
    found = dict(folded)
    for path, module in model.named_modules():
        bn = getattr(module, "bn", None)
        if not isinstance(bn, nn.BatchNorm2d):
            continue
        held: Any = module
        mean, variance = bn.running_mean, bn.running_var
        assert mean is not None
        assert variance is not None
        leaves = {f"{path}.{name}": p.detach().requires_grad_() for name, p in _own(held)}
        factor = leaves[f"{path}.bn.weight"] / torch.sqrt(variance + bn.eps)
        weight = leaves[f"{path}.weight"]
        weight = weight * factor.reshape(-1, *(1 for _ in weight.shape[1:]))
        centred = leaves.get(f"{path}.bias", torch.zeros_like(mean)).double() - mean.double()
        shifted = (centred * factor.double() + leaves[f"{path}.bn.bias"].double()).float()
        grads = found.pop(f"{path}.weight"), found.pop(f"{path}.bias")
        own = torch.autograd.grad((weight, shifted), list(leaves.values()), grads)
        found |= dict(zip(leaves, own, strict=True))
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    names = ("weight", "bias", "bn.weight", "bn.bias")
    return ((n, p) for n, p in module.named_parameters() if n in names)


@each_engine
@pytest.mark.parametrize("name", ["Mobile", "MLP", "Inception", "UNet"])
def test_gradients_are_those_of_each_op_by_itself(name: str, engine: str) -> None:
    prepared, x = prepared_net(name, qat=True)
    model = as_deployed(prepared, engine=engine)
    x = 1.5 * x  # beyond the range, where gradients are 0
    found = model(x)
    loss_of(found).backward()
    folded, _ = _OpByOp(model, engine).run(engine, x)
    wanted = _unfolded(model.prepared, folded)
    grads = {n.removeprefix("prepared."): p.grad for n, p in model.named_parameters()}
    assert set(grads) == set(wanted)
    for key, grad in grads.items():
        assert grad is not None
        assert torch.equal(grad, wanted[key]), key
    assert any(bool((g == 0).any()) for g in grads.values() if g is not None)


# ------------------------------------------------------------------------- as any module


@functools.cache
def _trained(engine: str = "fbgemm") -> tuple[nn.Module, Tensor]:
    return prepared_net("Residual", qat=True)


def _model(engine: str = "fbgemm") -> tuple[Any, Tensor]:
    prepared, x = _trained()
    return as_deployed(prepared, engine=engine), x


def _step(model: nn.Module, x: Tensor, rate: float = 0.05) -> None:
    for p in model.parameters():
        p.grad = None
    loss_of(model(x)).backward()
    torch.optim.SGD(model.parameters(), lr=rate).step()


def test_a_copy_is_a_model_of_its_own() -> None:
    model, x = _model()
    before = model(x).detach()
    own = copy.deepcopy(model)
    _step(own, x)
    assert torch.equal(model(x), before)
    assert not torch.equal(own(x), before)
    assert equal(own(x), deployed_outputs(own, "fbgemm", x))


def test_a_state_dict_goes_from_one_to_another() -> None:
    model, x = _model()
    other, _ = _model()
    _step(model, x)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))
    state = model.state_dict()
    name = next(n for n in state if n.endswith(".scale"))
    state[name] = state[name] * 2
    with pytest.raises(OptionError, match="other grids"):
        other.load_state_dict(state)


def test_a_refused_state_dict_changes_nothing() -> None:
    model, x = _model()
    state = {name: value * 2 for name, value in model.state_dict().items()}
    inner = {name.removeprefix("prepared."): value for name, value in state.items()}
    for held in (model, copy.deepcopy(model)):
        before = {name: value.clone() for name, value in held.state_dict().items()}
        for part, given in ((held, state), (held.prepared, inner)):
            for assign in (False, True):
                with pytest.raises(OptionError, match="other grids"):
                    part.load_state_dict(given, assign=assign)
        now = held.state_dict()
        assert all(torch.equal(value, now[name]) for name, value in before.items())
        assert equal(held(x), deployed_outputs(held, "fbgemm", x))


def test_train_switches_dropout_and_nothing_else() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(8 * 36, 5)).train()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared = prepare_qat_fx(net, get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    model = as_deployed(prepared, engine="fbgemm")
    fixed = model(x)
    statistics = [b.clone() for b in model.buffers()]
    model.train()
    found = [model(x) for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    assert all(map(torch.equal, statistics, model.buffers()))
    assert [type(m).__name__ for m in model.prepared.modules() if m.training] == ["Dropout"]
    # What the integers dropped, the gradients' graph drops: no gradient where the value is zero.
    codes: list[Tensor] = []
    drop = next(m for n, m in model.prepared.named_modules() if type(m) is nn.Dropout)
    hook = drop.register_forward_hook(lambda module, args, out: codes.append(out.detach()))
    loss_of(model(x)).backward()
    hook.remove()
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(model.eval()(x), fixed)


def test_dropout_traced_in_train_mode_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.fc(x), training=self.training)

    x = torch.randn(3, 4)
    prepared = prepare_qat_fx(Net().train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    with pytest.raises(UnsupportedError, match="traced in train mode"):
        as_deployed(prepared, engine="fbgemm")


def test_autocast_is_off_inside_and_says_so() -> None:
    model, x = _model()
    wanted = model(x)
    loss_of(wanted).backward()
    grads = [p.grad for p in model.parameters()]
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is off"):
        assert torch.equal(other(x), wanted)
    other.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(other(x))
    loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, other.parameters(), strict=True))


def test_gradients_add_up() -> None:
    model, x = _model()
    loss_of(model(x)).backward()
    once = [p.grad.clone() for p in model.parameters()]
    loss_of(model(x)).backward()
    assert all(torch.equal(2 * a, p.grad) for a, p in zip(once, model.parameters(), strict=True))


def test_without_gradients_only_the_integers_run() -> None:
    model, x = _model()
    with torch.no_grad():
        found = model(x)
    assert not found.requires_grad
    assert torch.equal(found, model(x))


def test_a_wrapper_is_seen_through() -> None:
    model, x = _model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert equal(deployed_outputs(averaged, "fbgemm", x), model(x))
    assert fxqfix.compare(model, None, [x], engine="fbgemm", noise_floor=False).rows
    assert isinstance(fxqfix.freeze(model), fx.GraphModule)


@pytest.mark.parametrize("isa", ISAS)
def test_other_levels_than_this_one(isa: str) -> None:
    """Held to emulate, which tests/engines holds to the kernels of each level."""
    prepared, x = prepared_net("VGGWide", qat=True)
    model = as_deployed(prepared, engine="x86", isa=isa, threads=2)
    assert str(model.emulation["isa"]) in repr(model)
    for _ in range(2):
        wanted = fxqfix.emulate(fxqfix.to_int8(model, engine="x86"), engine="x86", isa=isa)
        assert torch.equal(model(3 * x), wanted(3 * x))
        _step(model, x)


# ----------------------------------------------------------------------------- bad input


def test_what_can_not_be_deployed_is_refused_before_the_first_step() -> None:
    prepared, x = _trained()
    with pytest.raises(UnknownNameError):
        as_deployed(prepared, engine="tpu")
    with pytest.raises(OptionError):
        as_deployed(prepared, engine="fbgemm", threads=0)
    with pytest.raises(DialectError):
        as_deployed(nn.Linear(2, 2), engine="fbgemm")
    new = prepare_qat_fx(
        nn.Sequential(nn.Linear(8, 2)).train(), get_default_qat_qconfig_mapping("fbgemm"), (x,)
    )
    with pytest.raises(UncalibratedError):
        as_deployed(new, engine="fbgemm")
    with pytest.raises(UnsupportedError, match="float16"):
        as_deployed(copy.deepcopy(prepared).half(), engine="fbgemm")
    moved = copy.deepcopy(prepared)
    next(iter(moved.children())).to("meta")
    with pytest.raises(DeviceError):
        as_deployed(moved, engine="fbgemm")


def test_half_precision_and_other_devices_are_refused_when_they_come() -> None:
    model, x = _model()
    with pytest.raises(UnsupportedError, match="deployed from float32"):
        model.half()
    assert model(x).dtype == torch.float32
    with pytest.raises(UnsupportedError, match="float32 inputs"):
        model(x.half())
    with pytest.raises(DeviceError, match="another device"):
        model(x.to("meta"))


class _OwnConvBn(torch.ao.nn.intrinsic.qat.ConvBn2d):
    """A subclass that conversion doesn't know."""


def test_a_batch_norm_that_can_not_be_folded_is_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(tq.QuantStub(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    net.qconfig = tq.get_default_qat_qconfig("fbgemm")
    tq.fuse_modules_qat(net, [["1", "2"]], inplace=True)
    prepared = tq.prepare_qat(net)
    prepared[1].__class__ = _OwnConvBn
    prepared(x)
    with pytest.raises(UnsupportedError, match="no form without BatchNorm"):
        as_deployed(prepared, engine="fbgemm")


# --------------------------------------------------------------- compiled, distributed, moved


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's too
def test_compiled_it_is_the_same() -> None:
    model, x = _model()
    wanted = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(x)
    assert torch.equal(found, wanted)
    loss_of(found).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert equal(compiled(x), deployed_outputs(model, "fbgemm", x))
    torch.compiler.reset()


@pytest.mark.gpu
def test_on_a_device_it_is_the_same(device: str) -> None:
    model, x = _model()
    wanted = model(x)
    loss_of(wanted).backward()
    there = copy.deepcopy(model).to(device)
    there.zero_grad()
    found = there(x.to(device))
    assert torch.equal(found.cpu(), wanted)
    (found * torch.linspace(-1, 1, found.numel()).reshape(found.shape).to(device)).sum().backward()
    grads = zip(model.named_parameters(), there.parameters(), strict=True)
    for (name, p), q in grads:
        assert p.grad is not None
        assert q.grad is not None
        # reason: sums of float32 products in the order of another device
        assert torch.allclose(p.grad, q.grad.cpu(), rtol=1e-3, atol=1e-3), name
    with pytest.raises(DeviceError):
        there(x)


def _train_apart(rank: int, world: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    shared = torch.distributed.FileStore(store, world)
    torch.distributed.init_process_group("gloo", store=shared, rank=rank, world_size=world)
    torch.manual_seed(0)
    prepared, x = prepared_net("MLP", qat=True)
    model = nn.parallel.DistributedDataParallel(as_deployed(prepared, engine="fbgemm"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    same = equal(model(x), deployed_outputs(model, "fbgemm", x))
    results.put((rank, same, [p.detach().double().sum().item() for p in model.parameters()]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_two_processes_train_one_model(tmp_path: Any) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, 2, str(tmp_path / "store"), results) for rank in (0, 1)]
    workers = [context.Process(target=_train_apart, args=a) for a in arguments]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [same for _, same, _ in found] == [True, True]
    assert found[0][2] == found[1][2]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean([2, 3]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["conv.weight", "conv.bn.weight", "conv.bn.running_var", "fc.weight", "fc.bias"]
)
def test_nan_and_inf_are_refused_before_and_while_it_trains(name: str, value: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4)
    mapping = get_default_qat_qconfig_mapping("fbgemm")
    prepared = prepare_qat_fx(Normed().train(), mapping, (x,))
    prepared(x)
    model = as_deployed(prepared, engine="fbgemm")
    for made in (prepared, model.prepared):
        held = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        with torch.no_grad():
            held[name].view(-1)[0] = value
    for call in (lambda: as_deployed(prepared, engine="fbgemm"), lambda: model(x)):
        with pytest.raises(NonFiniteError, match=f"as_deployed: '{name}' holds NaN or inf"):
            call()
