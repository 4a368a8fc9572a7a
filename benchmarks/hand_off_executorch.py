"""What ExecuTorch's XNNPACK kernels keep of the declared range: six networks, pinned and not.

Each network is trained with ranges of [0,127], decomposed, and certified on the route "executorch"
at 1, 1.5 and 3 times the calibrated amplitude: codes that differ and codes out of range at the
sites, on the same inputs, and why.

python benchmarks/hand_off_executorch.py
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the networks of the tests

from fxqfix import certify
from tests.routes import nets


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # executorch's and torch's own, about themselves
    for pinned in (False, True):
        print("pinned" if pinned else "plain")
        for name in nets.NETS:
            found = certify(nets.decomposed(name, pinned), "executorch", nets.batches())
            codes = sum(s.found.elements for s in found.sites if s.grid is not None)
            print(
                f"  {name:10} {found.differing:5} of {codes} differ "
                f"({100 * found.differing / codes:.3f}%), at most {found.max_lsb}, "
                f"{found.out_of_range} out of range, {found.integer_kernels} int8 kernels; "
                + ", ".join(f"{cause} {count}" for cause, count in found.causes.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
