"""What deployed forms compute, with and without pinned ranges; and what the pins cost Inductor.

`certify` on every route that starts from the decomposed graph: six architectures with ranges of
[0,127], each without clamps, with clamps on values, and with clamps on codes, at 1, 1.5 and 3 times
the calibrated amplitude; and a PT2E model.

python benchmarks/hand_off.py [ROUTE ...]     all routes: half an hour on one core
python benchmarks/hand_off.py speed           only the speed of Inductor's kernels
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator

import _common
import torch
from torch import fx

from fxqfix import Certificate, certify, to_decomposed
from fxqfix._inductor import Freezing
from fxqfix.errors import FxqfixError, MissingDependencyError, RouteError
from fxqfix.passes import FloatWeights
from fxqfix.routes import registry
from tests.dialects import pt2e_nets
from tests.routes import nets

ROUTES = [name for name, route in registry().items() if route.deploy is not None]
PINS = {"plain": False, "values": "values", "codes": "codes"}


def certificates(route: str, pins: str) -> Iterator[tuple[str, Certificate | FxqfixError]]:
    """Of every architecture; or why there is none."""
    models = {name: functools.partial(nets.prepared, name) for name in nets.NETS}
    models["PT2E"] = functools.partial(pt2e_nets.prepared, "x86-reduced", "residual")
    for name, make in models.items():
        model = to_decomposed(make(), pin_ranges=PINS[pins])
        if FloatWeights() in registry()[route].passes:
            model = FloatWeights()(model).graph_module
        data = nets.batches()
        if name == "PT2E":
            data = [gain * pt2e_nets.image(seed=i) for i, gain in enumerate(nets.GAINS)]
        try:
            yield name, certify(model, route, data)
        except (MissingDependencyError, RouteError) as error:
            yield name, error


def table(routes: list[str]) -> None:
    print("route, pins, net: codes out of range, that differ, of; LSB; kernels, causes")
    for route in routes:
        for pins in PINS:
            total: Counter[str] = Counter()
            most = 0
            for name, found in certificates(route, pins):
                row = f"{route:24} {pins:7} {name:10}"
                if isinstance(found, FxqfixError):
                    total["refused"] += 1
                    print(f"{row} {str(found)[:160]}", flush=True)
                    continue
                codes = sum(s.found.elements for s in found.sites if s.grid is not None)
                counts = {"out": found.out_of_range, "differ": found.differing, "of": codes}
                total.update({**counts, "kernels": found.integer_kernels, **found.causes})
                most = max(most, found.max_lsb)
                print(
                    f"{row} {found.out_of_range:6} {found.differing:7} {codes:8} "
                    f"{found.max_lsb:3}  {dict(found.kernels)}, {found.causes}",
                    flush=True,
                )
            print(f"{route:24} {pins:7} SUM {dict(total)}, by at most {most}", flush=True)


def speed() -> None:
    """CPU seconds of Inductor's form of the larger networks, pinned and not, in turns."""
    x = torch.rand(8, 3, 32, 32)
    for network, make in _common.NETWORKS.items():
        prepared = _common.prepare(make(), x)
        forms = {name: _compiled(prepared, name, x) for name in ("plain", "values")}
        calls = {name: functools.partial(form, x) for name, form in forms.items()}
        found = _common.medians(calls, 101)
        ratio = found["values"] / found["plain"]
        print(
            f"{network}: pinned over plain {ratio:.3f}x "
            f"({1e3 * found['values']:.2f} ms, {1e3 * found['plain']:.2f} ms); load "
            f"{os.getloadavg()[0]:.1f}",
            flush=True,
        )


def _compiled(prepared: fx.GraphModule, pins: str, x: torch.Tensor) -> Freezing:
    model = to_decomposed(prepared, pin_ranges=PINS[pins])
    form = Freezing(torch.export.export(model, (x,)).module(), dynamic=False)
    print(f"  {pins}: {form.compiled_for(x)}", flush=True)
    return form


def main() -> None:
    _common.settle()
    asked = sys.argv[1:]
    if asked != ["speed"]:
        table(asked or ROUTES)
    if not asked or asked == ["speed"]:
        speed()


if __name__ == "__main__":
    main()
