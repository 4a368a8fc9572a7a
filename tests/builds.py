"""What tests ask of the builds that are installed, where these differ from those of CI."""

from __future__ import annotations

import functools

import torch

__all__ = ["elsewhere", "lacks_integer_max"]

MEASURED = "2.13.0"  # what constraints.txt pins: there nothing is left out


def elsewhere() -> bool:
    """Whether this is another release of torch than CI's."""
    return torch.__version__.partition("+")[0] != MEASURED


@functools.cache
def lacks_integer_max() -> str:
    """What onnxruntime says to a Max of codes: older exporters write clamps so; "" if it runs."""
    import onnxruntime
    from onnx import TensorProto, helper

    names = "a", "b", "c"
    a, b, c = (helper.make_tensor_value_info(n, TensorProto.UINT8, [2]) for n in names)
    graph = helper.make_graph([helper.make_node("Max", ["a", "b"], ["c"])], "max", [a, b], [c])
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, not exported
        return f"onnxruntime {onnxruntime.__version__}: {str(error).splitlines()[0]}"
    return ""
