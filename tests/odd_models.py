"""Prepared models of unusual kinds: for each, every function gives a result or names its reason."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao import quantization as tq
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

Made = tuple[nn.Module, list[Any]]
_WEIGHT = tq.default_per_channel_weight_observer


def rows() -> Tensor:
    """A batch of vectors."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def perceptron() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def by_fx(net: nn.Module, qconfig: Any, *x: Any, qat: bool = False, **options: Any) -> Made:
    """Prepared by FX and run once."""
    mapping = qconfig
    if isinstance(qconfig, tq.QConfig):
        mapping = tq.QConfigMapping().set_global(qconfig)
    make = prepare_qat_fx if qat else prepare_fx
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = make(net.train(qat), mapping, x, **options)
        prepared(*x)
    return prepared.eval(), [x if len(x) > 1 else x[0]]


def eager(qconfig: Any, *, qat: bool = False, net: nn.Module | None = None, x: Any = None) -> Made:
    """Prepared by eager mode and run once."""
    torch.manual_seed(0)
    net = nn.Sequential(tq.QuantStub(), nn.Linear(8, 4), tq.DeQuantStub()) if net is None else net
    net.train(qat).qconfig = qconfig  # type: ignore[assignment]  # a plain attribute
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = (tq.prepare_qat if qat else tq.prepare)(net)
        x = rows() if x is None else x
        prepared(x)
    return prepared.eval(), [x]


def observed(**options: Any) -> Any:
    """A MinMaxObserver's maker."""
    return tq.MinMaxObserver.with_args(**options)


class Given(nn.Module):
    """A weight that is an input."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.function(x, w)


class Computed(nn.Module):
    """A weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.p * 2)


class Tells(tq.ObserverBase):
    """An observer of a user's own."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__(torch.quint8)
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    @classmethod
    def making(cls, answer: Any) -> Any:
        return functools.partial(cls, answer)


class OwnLSTM(torch.ao.nn.quantizable.LSTM):
    """A subclass, as prepare_custom_config puts it in."""


class Sequence(nn.Module):
    """An LSTM between stubs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.lstm = tq.QuantStub(), tq.DeQuantStub(), nn.LSTM(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dequant(self.lstm(self.quant(x))[0])
        return found


class Parts(nn.Module):
    """A value in parts, and the parts together again."""

    def __init__(self, split: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.split, self.fc = split, nn.Linear(8, 8)
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.join = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(self.fc(self.quant(x)))
        found: Tensor = self.dequant(self.join.add(parts[0], parts[1]))
        return found


class Holder(nn.Module):
    """A module that holds a prepared graph."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 2)
        self.training = body.training

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


def _usual(*, qat: bool = False) -> Made:
    of = tq.get_default_qat_qconfig_mapping if qat else tq.get_default_qconfig_mapping
    return by_fx(perceptron(), of("fbgemm"), rows(), qat=qat)


def _wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Made:
    model, data = _usual(qat=True)
    return wrap(model), data


def _bag(qconfig: Any) -> Made:
    torch.manual_seed(0)
    indices = torch.randint(0, 10, (4, 3))
    return by_fx(nn.Sequential(nn.EmbeddingBag(10, 16, mode="sum")), qconfig, indices)


def _own_lstm() -> Made:
    net, x = Sequence().eval(), torch.randn(3, 2, 8)
    net.qconfig = tq.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        own = {"float_to_observed_custom_module_class": {nn.LSTM: OwnLSTM}}
        prepared = tq.prepare(net, prepare_custom_config_dict=own)
        prepared(x)
    return prepared, [x]


def _own_lstm_fx() -> Made:
    custom = PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, OwnLSTM)
    x, mapping = torch.randn(3, 2, 8), tq.get_default_qconfig_mapping("fbgemm")
    return by_fx(Sequence(), mapping, x, prepare_custom_config=custom)


def _equalized() -> Made:
    from torch.ao.quantization.fx._equalize import default_equalization_qconfig

    config = tq.QConfigMapping().set_global(default_equalization_qconfig)
    mapping = tq.get_default_qconfig_mapping("fbgemm")
    return by_fx(perceptron(), mapping, rows(), _equalization_config=config)


def _given(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Made:
    values = (torch.randn(shape) for shape in shapes)
    return by_fx(Given(function), tq.get_default_qconfig_mapping("fbgemm"), *values)


def pt2e(act: Any, weight: Any) -> Made:
    """Prepared by PT2E: each linear with these specs for its values and its weight."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

    class Chooser(Quantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in model.graph.nodes:
                if node.target == torch.ops.aten.linear.default:
                    specs = {node.args[0]: act, node.args[1]: weight}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map=specs, output_qspec=act, _annotated=True
                    )
            return model

        def validate(self, model: fx.GraphModule) -> None:
            """Nothing to say."""

    exported = torch.export.export(perceptron(), (rows(),)).module()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(exported, Chooser())  # type: ignore[arg-type]  # a GraphModule
        prepared(rows())
    return prepared, [rows()]


def _pt2e(dtype: torch.dtype, low: int, high: int, *, per_channel: bool = False) -> Made:
    from torchao.quantization import pt2e as ao
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    affine = torch.per_channel_affine if per_channel else torch.per_tensor_affine
    maker = ao.PerChannelMinMaxObserver if per_channel else ao.MinMaxObserver
    options: dict[str, Any] = {"ch_axis": 1} if per_channel else {}
    act = QuantizationSpec(dtype, maker, low, high, affine, **options)
    weight = QuantizationSpec(torch.int8, ao.MinMaxObserver, -127, 127, torch.per_tensor_symmetric)
    return pt2e(act, weight)


def _quantize(config: str) -> Made:
    import torchao.quantization as ao
    from torchao.quantization.qat import QATConfig

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    chosen = getattr(ao, config)()
    ao.quantize_(model, QATConfig(chosen, step="prepare") if "Intx" in config else chosen)
    return model, [torch.randn(2, 64)]


_CHANNELS = tq.PerChannelMinMaxObserver.with_args(ch_axis=1, dtype=torch.quint8)
_FAKE_CHANNELS = tq.FakeQuantize.with_args(
    observer=tq.PerChannelMinMaxObserver,
    ch_axis=1,
    quant_min=0,
    quant_max=127,
    dtype=torch.quint8,
    qscheme=torch.per_channel_affine,
)
_WIDE = observed(dtype=torch.qint32, quant_min=-(2**31), quant_max=2**31 - 1)
_QUINT8 = torch.quint8

MODELS: dict[str, Callable[[], Made]] = {
    "channels-fx": lambda: by_fx(perceptron(), tq.QConfig(_CHANNELS, _WEIGHT), rows()),
    "channels-qat": lambda: by_fx(
        perceptron(), tq.QConfig(_FAKE_CHANNELS, tq.default_weight_fake_quant), rows(), qat=True
    ),
    "channels-eager": lambda: eager(tq.QConfig(_CHANNELS, _WEIGHT)),
    "channels-pt2e": lambda: _pt2e(torch.int8, -128, 127, per_channel=True),
    "bag": lambda: _bag(tq.float_qparams_weight_only_qconfig),
    "bag-4bit": lambda: _bag(tq.float_qparams_weight_only_qconfig_4bit),
    "bag-eager": lambda: eager(
        tq.float_qparams_weight_only_qconfig,
        net=nn.Sequential(nn.EmbeddingBag(10, 16, mode="sum")),
        x=torch.zeros(4, 3, dtype=torch.int64),
    ),
    "lstm-eager": _own_lstm,
    "lstm-fx": _own_lstm_fx,
    "weight-linear": lambda: _given(F.linear, (4, 8), (3, 8)),
    "weight-conv": lambda: _given(F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3)),
    "weight-computed": lambda: by_fx(Computed(), tq.get_default_qconfig_mapping("fbgemm"), rows()),
    "placeholder": lambda: by_fx(
        perceptron(), tq.QConfig(tq.PlaceholderObserver.with_args(dtype=_QUINT8), _WEIGHT), rows()
    ),
    "float16": lambda: by_fx(perceptron(), tq.float16_static_qconfig, rows()),
    "noop-eager": lambda: eager(tq.QConfig(tq.NoopObserver.with_args(dtype=_QUINT8), _WEIGHT)),
    "noop-weight": lambda: by_fx(
        perceptron(),
        tq.QConfig(tq.MinMaxObserver, tq.NoopObserver.with_args(dtype=torch.qint8)),
        rows(),
    ),
    "recorder": lambda: by_fx(perceptron(), tq.default_debug_qconfig, rows()),
    "tells-none": lambda: by_fx(perceptron(), tq.QConfig(Tells, _WEIGHT), rows()),
    "tells-nothing": lambda: eager(tq.QConfig(Tells.making((None, None)), _WEIGHT)),
    "raises": lambda: by_fx(
        perceptron(), tq.QConfig(Tells.making(RuntimeError("boom")), _WEIGHT), rows()
    ),
    "no-range": lambda: by_fx(
        perceptron(),
        tq.QConfig(Tells.making((torch.tensor(0.1), torch.tensor(3))), _WEIGHT),
        rows(),
    ),
    "float8-pt2e": lambda: _pt2e(torch.float8_e4m3fn, -448, 448),
    "int32-pt2e": lambda: _pt2e(torch.int32, -(2**31), 2**31 - 1),
    "qint32-eager": lambda: eager(tq.QConfig(_WIDE, _WEIGHT)),
    "qint32-fx": lambda: by_fx(perceptron(), tq.QConfig(_WIDE, _WEIGHT), rows()),
    "equalized": _equalized,
    "dynamic-fx": lambda: by_fx(perceptron(), tq.default_dynamic_qconfig, rows()),
    "dynamic-eager": lambda: eager(tq.default_dynamic_qconfig),
    "chunk-eager": lambda: eager(tq.default_qconfig, net=Parts(lambda y: y.chunk(2, 1))),
    "split-eager": lambda: eager(
        tq.get_default_qat_qconfig("fbgemm"), net=Parts(lambda y: y.split([4, 4], 1)), qat=True
    ),
    "unbind-eager": lambda: eager(
        tq.default_qconfig, net=Parts(lambda y: y.reshape(4, 2, 4).unbind(1))
    ),
    "compiled": lambda: _wrapped(torch.compile),  # type: ignore[arg-type]  # a wrapper's module
    "parallel": lambda: _wrapped(nn.DataParallel),
    "averaged": lambda: _wrapped(torch.optim.swa_utils.AveragedModel),
    "held": lambda: _wrapped(Holder),
    "held-compiled": lambda: _wrapped(lambda m: Holder(torch.compile(m))),  # type: ignore[arg-type]
    "torchao-weights": lambda: _quantize("Int8WeightOnlyConfig"),
    "torchao-qat": lambda: _quantize("Int8DynamicActivationIntxWeightConfig"),
}
