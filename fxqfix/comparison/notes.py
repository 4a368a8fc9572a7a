"""What a reader of a comparison has to know about its two models, a sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fxqfix import _torch, ops
from fxqfix.dialects import Reading, Tap
from fxqfix.dialects._base import modules_of
from fxqfix.dialects.quantizer import read_quantizer
from fxqfix.report import Row

__all__ = ["kernel_of", "of_parts", "of_prepared", "of_roundings", "of_weights"]


def of_weights(rows: Iterable[Row]) -> Iterator[str]:
    """A line where the values of weights or biases are not the prepared model's.

    Args:
        rows: The rows of the report.
    """
    names = [row.name for row in rows if "other-weights" in row.causes]
    if names:
        yield (
            f"at {names[0]!r}{f' and {len(names) - 1} more rows' if names[1:] else ''} the "
            "converted weights or biases have other values than the prepared ones: these may be "
            "two checkpoints"
        )


def moving(reading: Reading) -> int:
    """How many fake-quants observe: a forward would move their qparams.

    Args:
        reading: Of a prepared model.
    """
    modules = reading.graph_module.modules()
    return sum(_torch.is_fake_quant(m) and read_quantizer(m).observing for m in modules)


def of_prepared(reading: Reading) -> list[str]:
    """The prepared model's state: observers that are on, train mode, sites that don't quantize.

    Args:
        reading: Its reading.
    """
    notes = []
    if moves := moving(reading):
        notes.append(
            f"{moves} fake-quants still observe; they were held at their present state "
            "(the prepared model's own forward would move their qparams)"
        )
    if reading.training:
        notes.append(
            "the prepared model is in train mode: BatchNorm and dropout act as in training"
        )
    plain = sum(not t.site.quantizes for t in reading.activations)
    if plain:
        which = "1 site is" if plain == 1 else f"{plain} sites are"
        notes.append(
            f"{which} only observed: the prepared model computes in float there, so the "
            "cumulative discrepancy is that of quantization itself"
        )
    return notes


def of_parts(batches: int, floored: int, attributed: float) -> Iterator[str]:
    """Lines where the noise floor, or the causes, are not those of all batches.

    Args:
        batches: How many were read.
        floored: Of how many the noise floor is.
        attributed: For how many causes were asked for.
    """
    if 0 < floored < batches:
        yield f"the noise floor is that of the first of {batches} batches (noise_floor='all')"
    if 0 < attributed < batches:
        yield f"causes are those of the first {attributed:g} of {batches} batches"


def kernel_of(tap: Tap, reading: Reading) -> str:
    """What computes a converted value, as torch spells it.

    Args:
        tap: The converted site.
        reading: The converted model.
    """
    node = tap.kernel
    found = ops.match_node(node, modules_of(reading.graph_module))
    if node.op == "call_module":
        if found is not None and found.column == "int8":
            return f"quantized.{found.key}"
        return type(reading.graph_module.get_submodule(str(node.target))).__name__
    name = getattr(node.target, "__name__", str(node.target))
    spelled = str(node.target)
    for space in ("quantized_decomposed.", "quantized."):
        if space in spelled:
            return space + spelled.rpartition(space)[2].removesuffix(".default")
    return str(name)


def of_roundings(names: Iterable[str]) -> Iterator[str]:
    """A line where only the converted model rounds.

    Args:
        names: Its ops there.
    """
    if listed := ", ".join(names):
        yield f"only the converted model rounds at {listed}: compared with what reads it"
