"""Training as deployed: what it recovers on real images, that it is exact, and what a step costs.

python benchmarks/deployed.py                    all, as text
python benchmarks/deployed.py accuracy --write   one of accuracy, photos, exact, step; --write puts
                                                 the table into docs/benchmarks.md

Images: the digits of scikit-learn, a quarter held out; tiles of ten photographs that scikit-image
ships, the right quarter of each held out: from which one is it? The int8
models are emulated for the level that the table names, so that any machine gives these figures.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import _common
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    disable_observer,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import fxqfix
from fxqfix._torch import quantized_engine, quiet
from fxqfix.demos.digits import Digits, Images, images, train

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
STEPS = 50


# ------------------------------------------------------------------------------- accuracy


def qconfig(act_max: int, weight_min: int, weight_max: int) -> QConfigMapping:
    """Activations in [0, act_max], weights per channel."""
    activation = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=act_max,
        dtype=torch.quint8,
    )
    weight = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=weight_min,
        quant_max=weight_max,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    return QConfigMapping().set_global(QConfig(activation=activation, weight=weight))


# What is trained for, and the engine and the level that it is deployed on.
CASES: dict[str, tuple[Callable[[], QConfigMapping], str, str]] = {
    "8 bits, CPU without VNNI": (lambda: qconfig(255, -128, 127), "fbgemm", "avx2"),
    "8 bits, CPU without VNNI, oneDNN": (lambda: qconfig(255, -128, 127), "onednn", "avx2"),
    "4 bits": (lambda: qconfig(15, -8, 7), "fbgemm", "vnni"),
    "3 bits": (lambda: qconfig(7, -4, 3), "fbgemm", "vnni"),
    "qnnpack": (lambda: get_default_qat_qconfig_mapping("qnnpack"), "qnnpack", "vnni"),
}


def share(model: nn.Module, data: Images) -> float:
    """Percent of the images whose digit the model names."""
    found = fxqfix.validate(model, [(data.pixels, data.labels)], "accuracy", progress=False)
    return 100 * float(found.value)


PHOTOGRAPHS = (
    *("brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "moon.png", "page.png", "rocket.jpg"),
)
TILE, TILES = 32, (160, 50)  # pixels, halved; per photograph: to train on, and held out


def photographs() -> tuple[Images, Images]:
    """Tiles of the photographs in gray, drawn by the random state."""
    from skimage import color, data_dir, io

    pixels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name in PHOTOGRAPHS:
        image = io.imread(f"{data_dir}/{name}")
        gray = torch.tensor(color.rgb2gray(image) if image.ndim == 3 else image / 255).float()
        edge = 3 * gray.shape[1] // 4
        for part, found, count in zip((gray[:, :edge], gray[:, edge:]), pixels, TILES, strict=True):
            tiles = part.unfold(0, TILE, TILE // 4).unfold(1, TILE, TILE // 4)
            tiles = F.avg_pool2d(tiles.reshape(-1, TILE, TILE), 2)
            found.append(tiles[torch.randperm(len(tiles))[:count]])
    labels = [[torch.full((len(t),), i) for i, t in enumerate(part)] for part in pixels]
    train_on, held_out = (
        Images(torch.cat(p)[:, None], torch.cat(n)) for p, n in zip(pixels, labels, strict=True)
    )
    return train_on, held_out


def accuracies(
    name: str, read: Callable[[], tuple[Images, Images]] = images
) -> tuple[float, float, float, float]:
    """Percent right: prepared; deployed; deployed after more QAT; after as much as deployed."""
    mapping, engine, isa = CASES[name]
    torch.manual_seed(0)
    data, held_out = read()
    network = Digits()
    train(network, data, 10, 1e-2)
    prepared = prepare_qat_fx(network.train(), mapping(), (data.pixels[:1],))
    train(prepared, data, 4, 1e-3)
    prepared.apply(disable_observer).apply(freeze_bn_stats).eval()

    def deployed(model: nn.Module) -> float:
        int8 = fxqfix.to_int8(model, engine=engine)
        return share(fxqfix.emulate(int8, engine=engine, isa=isa, threads=1), held_out)

    model = fxqfix.as_deployed(prepared, engine=engine, isa=isa, threads=1)
    longer = copy.deepcopy(model.prepared)  # frozen too, so that both train the same parameters
    for parameters in (longer, model):
        torch.manual_seed(1)
        train(parameters, data, 4, 1e-3)
    return share(prepared, held_out), deployed(prepared), deployed(longer), share(model, held_out)


def photo_table() -> Iterator[str]:
    """Rows of Markdown."""
    return accuracy_table(photographs)


def accuracy_table(
    read: Callable[[], tuple[Images, Images]] = images,
) -> Iterator[str]:
    """Rows of Markdown."""
    yield "| trained for (engine, level) | prepared | deployed | more QAT, deployed | as deployed |"
    yield "| --- | --- | --- | --- | --- |"
    for name, (_, engine, isa) in CASES.items():
        figures = " | ".join(f"{value:.1f}%" for value in accuracies(name, read))
        yield f"| {name} ({engine}, {isa}) | {figures} |"


# ---------------------------------------------------------------------------- exact, step


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    """The networks of the tests, and the two of the other benchmarks."""
    from tests.engines.nets import NETS, SHAPES

    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, make in NETS.items():
        found[name] = make(), torch.randn(SHAPES.get(name, (4, 3, 16, 16)), generator=generator)
    for name, make in _common.NETWORKS.items():
        found[name] = make(), torch.randn(2, 3, 32, 32, generator=generator)
    return found


def prepare(net: nn.Module, x: Tensor) -> fx.GraphModule:
    """As users do, with settled observers."""
    model: fx.GraphModule = prepare_qat_fx(
        net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,)
    )
    model(x)
    return model.apply(disable_observer).eval()


def trained_apart(prepared: nn.Module, x: Tensor, engine: str) -> tuple[int, int]:
    """(Outputs that differ from to_int8's, outputs) before, during and after 50 steps."""
    model = fxqfix.as_deployed(prepared, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    differing = total = 0
    for step in range(STEPS + 1):
        found = model((1 + step % 3) * x)
        if step % 10 == 0:
            with torch.no_grad(), quantized_engine(engine):
                wanted = fxqfix.to_int8(model, engine=engine)((1 + step % 3) * x)
            differing += int((found != wanted).sum())
            total += wanted.numel()
        optimizer.zero_grad()
        (found * torch.linspace(-1, 1, found.numel()).reshape(found.shape)).sum().backward()
        optimizer.step()
    return differing, total


def exact_table() -> Iterator[str]:
    """Rows of Markdown."""
    engines = ("fbgemm", "x86", "onednn", "qnnpack")
    yield "| network | " + " | ".join(engines) + " |"
    yield "| --- |" + " --- |" * len(engines)
    for name, (net, x) in nets().items():
        prepared = prepare(net, x)
        found = (trained_apart(prepared, x, engine) for engine in engines)
        yield f"| {name} | " + " | ".join(f"{bad} of {all_}" for bad, all_ in found) + " |"


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def step_table() -> Iterator[str]:
    """Rows of Markdown."""
    yield "| network | prepared step | as deployed, fbgemm | onednn | qnnpack |"
    yield "| --- | --- | --- | --- | --- |"
    for name, make in _common.NETWORKS.items():
        x = torch.randn(32, 3, 32, 32)
        prepared = prepare(make(), x)
        training = copy.deepcopy(prepared).train().apply(freeze_bn_stats)
        forms: dict[str, nn.Module] = {"prepared": training}
        for engine in ("fbgemm", "onednn", "qnnpack"):
            forms[engine] = fxqfix.as_deployed(prepared, engine=engine)
        found = _common.medians({n: step_of(m, x) for n, m in forms.items()}, 5)
        base = found.pop("prepared")
        ratios = " | ".join(f"{seconds / base:.2f}x" for seconds in found.values())
        yield f"| {name} | {1000 * base:.0f} ms | {ratios} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "accuracy": accuracy_table,
    "photos": photo_table,
    "exact": exact_table,
    "step": step_table,
}


def write(name: str, rows: list[str]) -> None:
    """Put a table between its marks in the page."""
    begin, end = f"<!-- deployed: {name} -->", f"<!-- end of deployed: {name} -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    table = "\n".join(rows)
    PAGE.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description="Training as deployed.")
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], default=[])
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md, too")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    _common.settle()
    with quiet():
        for name in given.tables or TABLES:
            print(f"\n{name}")
            rows = []
            for row in TABLES[name]():
                print(row, flush=True)
                rows.append(row)
            if given.write:
                write(name, rows)


if __name__ == "__main__":
    main()
