"""fxqfix's passes under torch's own PassManager, beside a pass of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager

from fxqfix import to_decomposed
from fxqfix.passes import (
    DecomposeQuantize,
    FoldBatchNorm,
    FreezeQParams,
    Pass,
    PinRanges,
    Rewriter,
)


@dataclass(frozen=True)
class DropIdentity(Pass):
    """A pass of one's own: take nn.Identity out of the graph."""

    name: ClassVar[str] = "drop-identity"

    def rewrite(self, rewriter: Rewriter) -> None:
        for node in list(rewriter.graph.nodes):
            if node.op != "call_module":
                continue
            if isinstance(rewriter.module.get_submodule(str(node.target)), nn.Identity):
                rewriter.replace(node, node.all_input_nodes[0], "identity -> nothing")


def count_nodes(graph_module: fx.GraphModule) -> PassResult:
    """A torch pass."""
    print("nodes:", len(graph_module.graph.nodes))
    return PassResult(graph_module, False)


def main() -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Identity())
    prepared = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    prepared.eval()

    passes = [
        FreezeQParams(),
        FoldBatchNorm(),
        DecomposeQuantize(),
        count_nodes,
        PinRanges(),
        DropIdentity(),
        count_nodes,
    ]
    result = PassManager(passes=passes)(prepared)
    print("modified:", result.modified)

    # One at a time, a pass says what it did; the model that it is given stays as it is.
    frozen = FreezeQParams()(prepared)
    print(frozen.edits[0])
    print("a second time:", FoldBatchNorm()(FoldBatchNorm()(prepared).graph_module).modified)

    expected = to_decomposed(prepared)
    print("equals to_decomposed:", torch.equal(result.graph_module(x), expected(x)))
    return result.graph_module


if __name__ == "__main__":
    main()
