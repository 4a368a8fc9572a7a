"""What torch can quantize and the op table lacks, and what the table spells and torch lacks.

Both lists stand here with a reason per entry, and both directions fail: a gap that is not listed,
and a listed gap that is none any more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.ao.quantization as tq
import torch.ao.quantization.quantize_fx  # the backend configs need it loaded
from torch import Tensor
from torch.ao.quantization import backend_config, quantization_mappings

from fxqfix import _torch, ops
from tests.builds import elsewhere

CONFIGS = sorted(
    name
    for name in dir(backend_config)
    if name.startswith("get_") and name.endswith("_backend_config")
)

# Target of a backend config -> why the table has no row for it.
CONFIG_GAPS = {
    "torch.ao.quantization.utils.MatchAllNode": "a wildcard in onednn's add patterns, not an op",
}

# Module of an eager mapping -> why the table has no row for it.
MAPPING_GAPS = {
    "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional": "never called itself: "
    "its methods are traced to the functions that they call, which have rows",
    "torch.ao.nn.quantized.modules.functional_modules.QFunctional": "never called itself: "
    "its methods are traced to the kernels that they call, which have rows",
    "torch.ao.nn.sparse.quantized.linear.Linear": "block-sparse weights are read by no dialect",
    "torch.ao.nn.sparse.quantized.dynamic.linear.Linear": "block-sparse weights are read by no "
    "dialect",
}

# Pattern of a kernel's name in torch.ops.quantized -> why the table has no row for it.
KERNEL_GAPS = {
    r".*_(un)?pack(_\w+)?|\w+_prepack(_\w+)?|linear_unpack_fp16|conv2d_unpack_sizes": "packs or "
    "unpacks weights; it computes no activation",
    r"conv\w*_(stride|padding|output_padding|dilation|groups|transpose)": "asks a packed weight "
    "for an option",
    r"embedding_bag_\w+_rowwise_offsets": "asks a packed weight for an option",
    r"make_quantized_cell_params\w*": "makes the weights of a dynamic LSTM or GRU",
    r"quantized_(lstm|gru|rnn_relu|rnn_tanh)_cell_dynamic": "the kernel inside a dynamic cell "
    "module, which is a leaf of every trace",
    r"linear_dynamic_fp16_unpacked_weight": "float16 weights, of which there are no integer codes",
    r"linear_with_input_q_dq_qweight_dq(_relu)?_output_fp32": "a fused kernel of torch.compile, "
    "which no graph holds before compilation",
    r"int4mm_packed_weight_cpu": "weight-only int4 of torchao, no flow with activations",
}

# Spelling of the table -> why this torch has no such name.
UNRESOLVED = {
    ".hardsigmoid": "Tensor has no such method, but torch's backend configs list it as a pattern",
    ".hardsigmoid_": "Tensor has no such method, but torch's backend configs list it as a pattern",
    ".leaky_relu": "Tensor has no such method, but executorch's backend config lists it",
}


def dotted(target: Any) -> str:
    if isinstance(target, str):
        return f".{target}"
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or target
    return f"{getattr(target, '__module__', None) or 'torch'}.{name}"


def flat(pattern: Any) -> Iterator[Any]:
    if isinstance(pattern, (tuple, list)):
        for part in pattern:
            yield from flat(part)
    else:
        yield pattern


def targets_of(name: str) -> Iterator[Any]:
    """Every op, fused module, QAT module and reference module that a backend config names."""
    for entry in getattr(backend_config, name)().configs:
        yield from flat(entry.pattern or entry._pattern_complex_format)
        for kind in ("root_module", "qat_module", "reference_quantized_module", "fused_module"):
            module = getattr(entry, kind)
            if module is not None:
                yield module


# -------------------------------------------------------------- torch's configs -> the table


def test_the_configs_are_all_there() -> None:
    wanted = {"native", "fbgemm", "qnnpack", "onednn", "executorch"}
    assert {f"get_{name}_backend_config" for name in wanted} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_table_has_what_a_backend_config_names(name: str) -> None:
    targets = list(targets_of(name))
    assert len(targets) > 10
    missing = {dotted(target) for target in targets if ops.match(target) is None}
    assert missing <= CONFIG_GAPS.keys()


def test_config_gaps_are_gaps() -> None:
    named = [target for name in CONFIGS for target in targets_of(name)]
    missing = {dotted(target) for target in named if ops.match(target) is None}
    assert missing == CONFIG_GAPS.keys()


# ------------------------------------------------------------- torch's mappings -> the table


def mapped() -> Iterator[Any]:
    """Both sides of every mapping of eager mode, and its custom modules."""
    for name in dir(quantization_mappings):
        mapping = getattr(quantization_mappings, name)
        if re.fullmatch(r"DEFAULT_\w+_MAPPINGS?", name) and isinstance(mapping, dict):
            yield from mapping
            yield from mapping.values()
    for mapping in tq.get_default_custom_config_dict().values():
        yield from mapping
        yield from mapping.values()


def test_table_has_what_eager_mode_maps() -> None:
    targets = list(mapped())
    assert len(targets) > 100
    assert {dotted(t) for t in targets if ops.match(t) is None} == MAPPING_GAPS.keys()


# -------------------------------------------------------------- torch's kernels -> the table


def kernels() -> set[str]:
    """Names of all operators in torch.ops.quantized."""
    schemas = torch._C._jit_get_all_schemas()
    return {s.name.split("::")[1] for s in schemas if s.name.startswith("quantized::")}


def test_table_has_every_int8_kernel() -> None:
    names = kernels()
    assert len(names) > 100
    missing = {n for n in names if ops.match(getattr(torch.ops.quantized, n)) is None}
    unlisted = {n for n in missing if not any(re.fullmatch(p, n) for p in KERNEL_GAPS)}
    assert unlisted == set()
    idle = {p for p in KERNEL_GAPS if not any(re.fullmatch(p, n) for n in missing)}
    assert elsewhere() or idle == set()


# ------------------------------------------------------------------------ the table -> torch


def resolves(spelling: str) -> bool:
    if spelling.startswith("."):
        return hasattr(Tensor, spelling[1:])
    return _torch.resolve(spelling) is not None


def test_every_spelling_is_torchs() -> None:
    spelled = [spelling for row in ops.TABLE for _, spelling in ops.spellings(row)]
    assert {spelling for spelling in spelled if not resolves(spelling)} == UNRESOLVED.keys()


def test_a_spelling_matches_its_own_row() -> None:
    """No spelling is hidden by a row before it, under this or another name of the same object."""
    for row in ops.TABLE:
        for column, spelling in ops.spellings(row):
            target = spelling[1:] if spelling.startswith(".") else _torch.resolve(spelling)
            found = ops.match(target) if target is not None else None
            if found is not None:
                place = found.column + ("_relu" if found.relu else "")
                assert (found.spec.key, place) == (row.key, column), spelling
