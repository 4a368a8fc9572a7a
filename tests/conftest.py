"""One torch thread per worker, seeded tests, and what the results depend on in the header."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

SEED = 0

# Two xdist workers on two cores; one thread also fixes the order of float sums.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "fxqfix",
    deadline=None,  # the first call of a kernel or a compilation is slow by nature
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("fxqfix")


def pytest_report_header() -> list[str]:
    quantized = torch.backends.quantized
    return [
        f"torch: {torch.__version__}, cuda: {torch.cuda.is_available()}",
        f"quantized engines: {', '.join(quantized.supported_engines)}; default {quantized.engine}",
    ]


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(SEED)
    return SEED
