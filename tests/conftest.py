"""One torch thread per worker, seeded tests, and what the results depend on in the header."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from fxqfix._torch import quiet
from fxqfix.engines import ENGINES, isa_of
from tests.levels import CAPS, missing, own
from tests.pretend import DEVICE as PRETENDED
from tests.pretend import PretendedCuda

# Run by `make mutants`; it imports cosmic-ray, which nothing else needs.
collect_ignore = ["mutants"]
SEED = 0
GOLDEN = Path(__file__).resolve().parent / "golden"

# Two xdist workers on two cores; one thread also fixes the order of float sums.
torch.set_num_threads(1)
_ENGINE = torch.backends.quantized.engine

if platform.libc_ver()[0] == "glibc":
    # Tensors of some megabytes are made and freed all the time: glibc gives each back to the
    # system, which clears its pages anew, a third of the time of the engines' tests.
    _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
    _LIBC = ctypes.CDLL(None)
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)

hypothesis.settings.register_profile(
    "fxqfix",
    deadline=None,  # the first call of a kernel or a compilation is slow by nature
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("fxqfix")


def pytest_report_header() -> list[str]:
    quantized, isa = torch.backends.quantized, isa_of(None)
    caps = " ".join(f"{name}={os.environ[name]}" for name in CAPS if name in os.environ)
    return [
        f"torch: {torch.__version__}, cuda: {torch.version.cuda or 'not built in'}, "
        f"threads: {torch.get_num_threads()}",
        f"quantized engines: {', '.join(quantized.supported_engines)}; default {quantized.engine}",
        f"int8 kernels: onednn {isa.onednn}, fbgemm {isa.fbgemm}, ATen {isa.aten}; "
        f"CPU {isa.cpu}, by which x86 dispatches; caps: {caps or 'none'}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What no test of this process ran natively."""
    lacking = [e for e in ENGINES if e not in torch.backends.quantized.supported_engines]
    lines = [f"levels of int8 kernels: {missing(own())}; make levels runs those of this CPU"]
    lines += [f"engines that torch lacks: {', '.join(lacking)}"] * bool(lacking)
    lines += ["CUDA: torch sees no GPU"] * (not torch.cuda.is_available())
    terminalreporter.section("not run natively")
    terminalreporter.line("\n".join(lines))


def pytest_collection_finish() -> None:
    """What torch and the test modules hold lives to the end: collections need not look at it.

    A tenth of the suite's time went into collections, which find next to nothing that is young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)


@pytest.fixture(scope="session", autouse=True)
def implicit_ops() -> Iterator[None]:
    """Each torch.export looks up a thousand ops for each namespace; here only after new ones."""
    utils = importlib.import_module("torch._export.utils")
    if not hasattr(utils, "_materialize_cpp_cia_ops"):  # another torch, with its own ways
        yield
        return
    look_up, seen = utils._materialize_cpp_cia_ops, set[int]()

    def once() -> None:
        key = "CompositeImplicitAutograd"
        count = len(torch._C._dispatch_get_registrations_for_dispatch_key(key))
        if count not in seen:
            look_up()
            seen.add(count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", once)
        yield


@pytest.fixture(scope="session")
def onnx_functions() -> Iterator[None]:
    """Each torch.onnx.export parses the source of a thousand functions, which takes seconds."""
    try:
        with quiet():
            found = importlib.import_module("torch.onnx._internal.exporter._registration")
        apis = found.onnxscript_apis
        listed = apis.get_torchlib_ops
    except (ImportError, AttributeError):  # no onnxscript, or another torch
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(listed))
        yield


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Every test starts from one seed and from torch's own engine, whatever ran before it."""
    # torch.manual_seed also queues a stack trace for each kind of device that is not there.
    torch.default_generator.manual_seed(SEED)
    torch.backends.quantized.engine = _ENGINE
    yield SEED
    torch.backends.quantized.engine = _ENGINE


@pytest.fixture
def device() -> Iterator[str]:
    """A GPU where there is one; else a device that is checked like one and has values."""
    if torch.cuda.is_available():
        yield "cuda:0"
        return
    with PretendedCuda():
        yield PRETENDED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden texts anew; then read them"
    )
    parser.addoption(
        "--quick", action="store_true", help="of each file the first test that isn't slow"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    fast = [item for item in items if not item.get_closest_marker("slow")]
    first = set({item.path: item for item in reversed(fast)}.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in first])
    items[:] = [item for item in items if item in first]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Assert that a text is the one in tests/golden/<name>.txt."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        # Padding at the end of a line is invisible, and editors remove it from the file.
        text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), (
            f"read it, then pytest {request.node.nodeid} --update-golden"
        )

    return check
