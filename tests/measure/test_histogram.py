from __future__ import annotations

import numpy as np
import pytest
import torch

from fxqfix import QParams
from fxqfix.measure import Histogram, histogram

UNSIGNED = QParams(0.5, 3, 0, 127, torch.quint8)
SIGNED = QParams(0.5, 0, -128, 127, torch.qint8)
WIDE = QParams(0.5, 0, -(2**15), 2**15 - 1, torch.int32)


def test_counts_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    mine = torch.randint(0, 256, (3, 50), generator=generator, dtype=torch.uint8)
    theirs = torch.randint(-128, 128, (3, 50), generator=generator, dtype=torch.int8)
    found = histogram(mine, theirs, UNSIGNED, SIGNED)
    assert found is not None
    edges = np.arange(-128, 257)
    assert found.first == -128
    assert list(found.prepared) == np.histogram(mine.numpy(), edges)[0].tolist()
    assert list(found.converted) == np.histogram(theirs.numpy(), edges)[0].tolist()


def test_sums_align_the_codes() -> None:
    total = Histogram(-1, (1, 2), (0, 3)) + Histogram(0, (5, 0, 1), (4, 1, 1))
    assert total == Histogram(-1, (1, 7, 0, 1), (0, 7, 1, 1))


@pytest.mark.parametrize("pair", [(WIDE, SIGNED), (UNSIGNED, WIDE)])
def test_wide_codes_are_not_counted(pair: tuple[QParams, QParams]) -> None:
    assert histogram(torch.tensor([1]), torch.tensor([1]), *pair) is None
