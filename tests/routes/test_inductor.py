"""Routes inductor and inductor:lowered: ranges, int8 kernels, and what oneDNN computes otherwise.

Compiling takes seconds for each form: two layers are compiled here, the architectures are lowered
by the same patterns, and benchmarks/hand_off.py compiles them all.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxqfix import _inductor, certify, to_decomposed
from fxqfix.engines import isa_of
from fxqfix.errors import MissingDependencyError, RouteError
from fxqfix.passes import FloatWeights
from tests.builds import elsewhere
from tests.routes import nets, small

INPUTS = [gain * small.rows(seed=i) for i, gain in enumerate(nets.GAINS)]
saturates = pytest.mark.skipif(
    isa_of(None).onednn.endswith(("vnni", "amx")), reason="products don't saturate on this CPU"
)


@pytest.fixture(scope="module")
def torchao() -> None:
    pytest.importorskip("torchao", reason="the route needs torchao")


# ------------------------------------------------------------------------ compiled


@pytest.mark.slow
def test_compiled_ranges_hold_and_the_loss_is_seen() -> None:
    plain = certify(to_decomposed(small.linears(), pin_ranges=False), "inductor", INPUTS)
    assert plain.out_of_range > 0
    assert set(plain.causes) <= {"range-lost", "rounding"}
    assert plain.causes["range-lost"] > 0
    pinned = certify(small.linears(), "inductor", INPUTS)
    assert pinned.ok, str(pinned)
    assert pinned.out_of_range == 0
    assert pinned.kernels == plain.kernels
    if elsewhere() and not pinned.kernels:
        pytest.skip("the Inductor of this torch finds no int8 linear here")
    assert pinned.kernels == (("qlinear_unary", 2),)


@pytest.mark.slow
def test_any_batch_size() -> None:
    data = [small.rows(count) for count in (4, 6)]
    found = certify(small.linears(), "inductor", data, dynamic_batch=True)
    assert found.ok, str(found)
    assert not any("several sizes" in note for note in found.notes)


@pytest.mark.slow
def test_nothing_of_the_process_is_changed() -> None:
    config = torch._inductor.config
    with torch.enable_grad():
        form = _inductor.Freezing(nn.Linear(2, 2), dynamic=False)
        found = form(torch.ones(1, 2))
        assert torch.is_grad_enabled()
    assert not found.requires_grad
    assert config.freezing is False


def test_without_a_compiler() -> None:
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.raises(RouteError, match=r"no C\+\+ compiler.*inductor:lowered"):
        certify(small.linears(), "inductor", INPUTS[:1])


def test_clamps_on_codes_are_refused() -> None:
    """Of a convolution; its pattern finds the clamp where it wants the quantize."""
    model = to_decomposed(nets.prepared("residual"), pin_ranges="codes")
    if elsewhere():
        pytest.skip("seen with CI's torch; others may lower it")
    with pytest.raises(RouteError, match="can't lower this graph"):
        certify(model, "inductor", nets.batches()[:1])


# ------------------------------------------------------------------------ lowered by torchao


@pytest.mark.usefixtures("torchao")
def test_a_lowered_architecture() -> None:
    found = certify(nets.decomposed("shuffle"), "inductor:lowered", nets.batches())
    assert found.ok, str(found)
    assert found.out_of_range == 0
    assert set(found.causes) <= {"rounding"}
    codes = sum(s.found.elements for s in found.sites)
    assert found.differing <= 1e-5 * codes
    plain = certify(nets.decomposed("shuffle", pinned=False), "inductor:lowered", nets.batches())
    assert plain.out_of_range > 0
    assert plain.causes["range-lost"] > 0
    assert plain.kernels == found.kernels
    assert dict(found.kernels) == {"onednn.qconv_pointwise": 4, "onednn.qlinear_pointwise": 1}


@pytest.mark.usefixtures("torchao")
def test_pt2e() -> None:
    from tests.dialects import pt2e_nets

    data = [gain * pt2e_nets.image(seed=i) for i, gain in enumerate(nets.GAINS)]
    prepared = pt2e_nets.prepared("x86-reduced", "residual")
    found = certify(prepared, "inductor", data)
    assert found.ok, str(found)
    assert found.out_of_range == 0
    assert found.pinned == found.narrow > 0
    assert found.integer_kernels == 3


@pytest.mark.usefixtures("torchao")
def test_a_cut_graph_that_fails_leaves_the_outputs() -> None:
    """Its fused add takes no strided input, which only the cut graph has here."""
    from tests.dialects import pt2e_nets

    prepared = pt2e_nets.prepared("x86-reduced", "residual")
    found = certify(prepared, "inductor:lowered", [pt2e_nets.image()])
    assert found.integer_kernels == 3
    assert found.sites == ()
    assert found.unchecked[0][0] == "all sites"
    assert found.outputs[0].found.elements > 0


@pytest.mark.usefixtures("torchao")
@saturates
@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_pairs_of_products_saturate(layer: str) -> None:
    """Activations in [0,255] on CPUs without VNNI: every code is off, and the cause is named."""
    found = certify(small.heavy(layer), "inductor:lowered", [small.bright(layer)])
    assert not found.ok
    assert found.max_lsb > 1
    wrong = [s for s in found.sites if s.found.differing]
    assert [set(s.causes) for s in wrong] == [{"int16-saturation-by-channel"}]


@pytest.mark.usefixtures("torchao")
def test_zero_points_of_weights_are_lost() -> None:
    """torch's fused QAT observer gives a channel without positive weights a zero point of 127."""
    model = to_decomposed(small.linears())
    name = next(n for n, b in model.named_buffers() if n.endswith("weight_zero_point"))
    points = model.get_buffer(name)
    assert not points.any()
    points[3] = 20
    found = certify(model, "inductor:lowered", INPUTS[:1])
    assert not found.ok
    assert found.max_lsb > 1
    (wrong,) = (s for s in found.sites if s.found.differing)
    assert set(wrong.causes) == {"weight-zero-point"}
    assert wrong.found.differing <= len(INPUTS[0])  # of one channel only
    mended = FloatWeights()(model)
    assert mended.modified
    assert torch.equal(mended.graph_module(INPUTS[0]), model(INPUTS[0]))
    sound = certify(mended.graph_module, "inductor:lowered", INPUTS[:1])
    assert sound.ok
    assert sound.max_lsb <= 1
    assert sound.integer_kernels == found.integer_kernels - 1


@pytest.mark.usefixtures("torchao")
def test_weights_per_tensor_stay_float() -> None:
    found = certify(
        small.heavy("conv", per_channel=False), "inductor:lowered", [small.bright("conv")]
    )
    assert found.ok
    assert found.kernels == ()
    assert any("no op was lowered" in note for note in found.notes)


@pytest.mark.usefixtures("torchao")
def test_what_the_lowering_refuses() -> None:
    with pytest.raises(RouteError, match="inputs of one size"):
        certify(small.linears(), "inductor:lowered", INPUTS, dynamic_batch=True)
    # Its convolutions return channels last, on which the exported graph's view fails.
    with pytest.raises(RouteError, match="can't run this batch"):
        certify(nets.decomposed("plain"), "inductor:lowered", nets.batches())


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization.pt2e.lowering", None)
    with pytest.raises(MissingDependencyError, match=r"fxqfix\[pt2e\]"):
        certify(small.linears(), "inductor:lowered", INPUTS[:1])


# ------------------------------------------------------------------------ CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_decomposed_graph_and_its_export_run_on_cuda() -> None:
    model = nets.decomposed("residual")
    program = torch.export.export(model, (nets.image(),))
    there = to_decomposed(nets.prepared("residual")).cuda()
    exported = torch.export.export(there, (nets.image().cuda(),)).module()
    grid = next(n for n in model.graph.nodes if n.name.endswith("head_quantize")).args[1]
    for x in nets.batches():
        wanted = program.module()(x)
        for found in (there(x.cuda()), exported(x.cuda())):
            # reason: cuDNN sums in another order, which moves ties by one code.
            steps = ((found.cpu() - wanted) / grid).round().abs()
            assert steps.max() <= 1
            assert (steps > 0).double().mean() <= 0.05
