"""emulate: the engine's integer arithmetic in plain tensor ops."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxqfix import _torch, dialects, engines
from fxqfix._devices import check_int8
from fxqfix._settings import entry
from fxqfix.dialects._wrappers import refuse_code
from fxqfix.engines import ENGINES, Isa, isa_of, threads_of
from fxqfix.engines.dispatch import check_packed
from fxqfix.names import Engine, IsaName
from fxqfix.passes import EmulateEngine, chain
from fxqfix.registry import check_name

__all__ = ["emulate"]


@entry
def emulate(
    converted: nn.Module,
    *,
    engine: Engine | None = None,
    isa: IsaName | Isa | None = None,
    threads: int | None = None,
) -> fx.GraphModule:
    """Rewrite an int8 model to its engine's integer arithmetic in ordinary tensor ops.

    The result gives the codes that the engine's kernels give on any machine; it does not need the
    engine. One rule is that of the torch that runs the result, not of the one that made it: where
    native quantize puts ties (`fxqfix.qparams.zero_point_first`). Quantized values are integer
    tensors of their codes (uint8 for quint8, int8 for qint8); what the model dequantizes, it
    returns as floats.

    Args:
        converted: What `convert_fx` or eager `convert` returned. It is not changed.
        engine: "fbgemm", "x86", "onednn" or "qnnpack": the one that the model was converted for.
            None means torch.backends.quantized.engine.
        isa: The instruction set of the kernels: "avx2", "avx2_vnni", "avx512", "vnni" or "amx", or
            an `Isa` where their parts differ. None means what this process runs, caps included.
        threads: Number of threads that the kernels run on: each has its own scalar tail, where
            element-wise ops round exact ties in another way. None means torch.get_num_threads().

    Returns:
        A new GraphModule with one module per op. Its repr, and `meta["emulation"]`, say which
        engine, instruction set and number of threads it holds for.

    Raises:
        UnknownNameError: There is no such engine or isa.
        OptionError: `isa` or `threads` has a value that it can't have.
        DialectError: The model is not an int8 model.
        UnsupportedError: An op has no exact arithmetic on this engine, a weight is packed for
            another one, or a module has a hook of the user's.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qconfig_mapping
        >>> from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
        >>> torch.backends.quantized.engine = "qnnpack"
        >>> x = torch.linspace(-1, 1, 8).reshape(1, 8)
        >>> mapping = get_default_qconfig_mapping("qnnpack")
        >>> prepared = prepare_fx(torch.nn.Sequential(torch.nn.Linear(8, 2)).eval(), mapping, (x,))
        >>> _ = prepared(x)
        >>> converted = convert_fx(prepared)
        >>> torch.equal(emulate(converted)(x), converted(x))
        True
    """
    chosen = check_name("engine", engine or torch.backends.quantized.engine, ENGINES)
    options = chosen, isa_of(isa), threads_of(threads)
    with _torch.quantized_engine(chosen):
        model = dialects.read(converted, "emulate").graph_module
        check_int8(model, "emulate")
        refuse_code(converted, "emulate")
        # Asked of the user's own model: a copy is packed anew, for the engine of the moment.
        for call in engines.calls(model, *options, strict=False).values():
            check_packed(call, chosen)
        traced = model is not dialects.unwrapped(converted)  # a copy already
        emulated: fx.GraphModule = chain(model, EmulateEngine(*options), owned=traced).graph_module
    return emulated
