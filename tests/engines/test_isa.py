"""The instruction set as data: names, parts, what this process runs, and what is refused."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxqfix
from fxqfix import Isa
from fxqfix._torch import quantized_engine, quiet
from fxqfix.engines import ENGINES, ISAS, isa, isa_of
from fxqfix.errors import OptionError, UnknownNameError, UnsupportedError
from fxqfix.passes import EmulateEngine
from tests.builds import elsewhere

CAPPED = """
import torch
from fxqfix.engines import isa_of
state = torch.get_rng_state()
torch.backends.quantized.engine = "qnnpack"
isa = isa_of(None)
assert torch.equal(state, torch.get_rng_state())
assert torch.backends.quantized.engine == "qnnpack"
print(isa.onednn, isa.fbgemm, isa.aten, isa.cpu)
"""


@functools.cache
def _native(**caps: str) -> Isa:
    known = {k: v for k, v in os.environ.items() if k not in CAPS}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CAPPED],
        env={**known, **caps},
        capture_output=True,
        text=True,
        check=True,
    )
    return Isa(*done.stdout.split())


CAPS = ("ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
x86 = pytest.mark.skipif(isa_of(None).cpu == "unknown", reason="this is no x86 CPU")


@pytest.mark.slow
@x86
def test_each_cap_moves_its_own_part_only() -> None:
    own, onednn = _native(), _native(ONEDNN_MAX_CPU_ISA="AVX2")
    level = "unknown" if elsewhere() and onednn.onednn == "unknown" else "avx2"
    assert onednn == Isa(level, own.fbgemm, own.aten, own.cpu)
    both = {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "default"}
    assert _native(**both) == Isa(own.onednn, "avx2", "default", own.cpu)


@pytest.mark.slow
@x86
@pytest.mark.parametrize("level", ["avx2_vnni", "avx512", "vnni"])
def test_levels_of_onednn_are_told_apart(level: str) -> None:
    names = {"avx2_vnni": "AVX2_VNNI", "avx512": "AVX512_CORE", "vnni": "AVX512_CORE_VNNI"}
    order = list(names)
    own = _native()
    if own.onednn not in (*order[order.index(level) :], "amx"):
        pytest.skip(f"this CPU's level is {own.onednn}")
    found = _native(ONEDNN_MAX_CPU_ISA=names[level]).onednn
    if elsewhere() and found == "unknown":  # then nothing is judged by it
        pytest.skip("the probes tell the levels of CI's torch apart")
    assert found == level or (level == "avx2_vnni" and found == "avx2")  # a CPU may lack AVX-VNNI


def test_names_fix_all_parts() -> None:
    assert ISAS == ("avx2", "avx2_vnni", "avx512", "vnni", "amx")
    assert [isa_of(name).onednn for name in ISAS] == list(ISAS)
    assert [str(isa_of(name)) for name in ISAS] == list(ISAS)
    assert isa_of("vnni") == Isa(onednn="vnni", fbgemm="vnni", aten="avx512")
    mixed = Isa(onednn="avx2", fbgemm="vnni", aten="default")
    assert isa_of(mixed) is mixed
    assert mixed.cpu == "vnni"
    assert str(mixed) == "onednn=avx2 fbgemm=vnni aten=default cpu=vnni"


def test_wrong_levels_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"there is no isa 'sse'.*avx2, avx2_vnni, avx512"):
        isa_of("sse")
    with pytest.raises(UnknownNameError, match=r"fbgemm has no level 'amx'.*avx2, avx512, vnni"):
        Isa(onednn="amx", fbgemm="amx", aten="avx512")
    with pytest.raises(OptionError, match="isa names a level"):
        isa_of(2)  # type: ignore[arg-type]


def _converted(engine: str) -> nn.Module:
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
    with quantized_engine(engine), quiet():
        prepared = prepare_fx(net, get_default_qconfig_mapping(engine), (x,))
        prepared(x)
        return convert_fx(prepared)


def test_emulated_models_say_what_they_hold_for() -> None:
    engine = torch.backends.quantized.engine
    emulated = fxqfix.emulate(_converted(engine), engine=engine, isa="avx512", threads=3)
    said = {"engine": engine, "isa": isa_of("avx512"), "threads": 3}
    for model in (emulated, copy.deepcopy(emulated)):
        assert model.meta["emulation"] == said
        assert f"engine={engine}, isa=avx512, threads=3" in repr(model)
    own = EmulateEngine(engine)(_converted(engine)).graph_module
    here = {"isa": isa_of(None), "threads": torch.get_num_threads()}
    assert own.meta["emulation"] == {"engine": engine, **here}


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_counted(threads: Any) -> None:
    engine = torch.backends.quantized.engine
    with pytest.raises(OptionError, match="threads counts the threads of the kernels"):
        fxqfix.emulate(_converted(engine), engine=engine, threads=threads)


@pytest.mark.skipif("onednn" not in torch.backends.quantized.supported_engines, reason="no onednn")
def test_kernels_that_nobody_measured_are_refused() -> None:
    isa = Isa(onednn="unknown", fbgemm="vnni", aten="avx2")
    with pytest.raises(UnsupportedError, match=r"nobody has measured .*onednn=unknown"):
        fxqfix.emulate(_converted("onednn"), engine="onednn", isa=isa)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_cpu_that_nobody_measured_is_not_judged(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet(), quantized_engine(engine):
        prepared = prepare_fx(
            nn.Sequential(nn.Linear(8, 4)).eval(),
            get_default_qconfig_mapping(engine),
            (torch.linspace(-1, 1, 16).reshape(2, 8),),
        )
        prepared(torch.linspace(-1, 1, 16).reshape(2, 8))
        here = fxqfix.certificate_of(fxqfix.to_int8(prepared, engine=engine))
        assert here.verdict == "ok"
        monkeypatch.setattr(isa, "_native", lambda: Isa("unknown", "unknown", "unknown"))
        certificate = fxqfix.certificate_of(fxqfix.to_int8(prepared, engine=engine))
        found = fxqfix.lint(prepared, engine=engine).findings
    assert certificate.verdict == "not judged"
    assert "nobody has measured the kernels" in certificate.left_out[0]
    said = [f for f in found if "nobody has measured" in f.evidence]
    assert [(f.code, f.severity) for f in said] == [("kernel-defect", "warning")]


def test_unmeasured_looks_at_the_engine_s_own_parts() -> None:
    mixed = Isa(onednn="unknown", fbgemm="vnni", aten="avx2")
    assert [bool(mixed.unmeasured(e)) for e in ("fbgemm", "qnnpack", "onednn", "x86")] == [
        False,
        False,
        True,
        True,
    ]
    assert Isa(onednn="vnni", fbgemm="vnni", aten="unknown").unmeasured("qnnpack")


def test_a_report_says_what_its_kernels_ran_on() -> None:
    x = torch.linspace(-1, 1, 16).reshape(2, 8)
    engine = torch.backends.quantized.engine
    with quiet():
        prepared = prepare_fx(
            nn.Sequential(nn.Linear(8, 4)).eval(), get_default_qconfig_mapping(engine), (x,)
        )
        prepared(x)
        report = fxqfix.compare(prepared, None, [x], noise_floor=False)
    assert report.isa == str(isa_of(None))
    assert report.threads == torch.get_num_threads()
    assert fxqfix.Report.from_json(report.to_json()) == report
