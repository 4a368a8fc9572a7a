"""A device like CUDA where there is none: tensors with values that say they lie on it.

Fake tensors have no values, and whatever compares codes asks for some. These hold theirs on the
CPU, and every op is checked as CUDA checks it: all tensors on one device (a CPU scalar may join),
no product of integers, no pool, convolution or softmax of integers, nothing quantized. What a call
makes without naming a device lies on the CPU, so that the next op which takes both is refused.
The device is called "lazy", the one kind besides the CPU and meta that every build of torch can
name, gradients included; a model, and fxqfix, can tell it from CUDA by that name only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["DEVICE", "PretendedCuda"]

DEVICE = "lazy:0"

_KIND = torch.device(DEVICE).type

# What CUDA has for floats only.
_NO_INTEGERS = (
    *("dot", "vdot", "mv", "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm"),
    *("convolution", "_softmax", "_log_softmax", "native_layer_norm", "native_batch_norm"),
    *(f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg", "_adaptive_avg") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *("upsample_nearest2d", "upsample_bilinear2d", "erfinv"),
)
# These copy between devices, or take indices from the CPU.
_MIXES = ("copy_", "_to_copy", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_")


_DATA: Any = torch._C.TensorBase.data  # what `.data = ` sets, of any tensor


class _Pretended(Tensor):
    """A tensor on the pretended device; `elem` holds its values."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor) -> _Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
        )
        made.elem = elem
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pretended:
        if id(self) not in memo:
            made = _Pretended(self.elem.clone())
            if getattr(self, "_is_param", False):
                made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
            memo[id(self)] = made
        found: _Pretended = memo[id(self)]
        return found

    @property
    def data(self) -> Any:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, new: _Pretended) -> None:
        _DATA.__set__(self, new)
        self.elem = new.elem

    def tolist(self) -> Any:
        return self.elem.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"on {DEVICE}: {self.elem!r}"


class PretendedCuda(TorchDispatchMode):
    """While it is on, `.to(DEVICE)` and `device=DEVICE` work."""

    def __enter__(self) -> PretendedCuda:
        torch._C._set_only_lift_cpu_tensors(True)
        # Module.to and .double() put new parameters in place of the old ones: these keep `elem`.
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    there = any(isinstance(t, _Pretended) for t in given)
    asked = kwargs.get("device")
    if not there and (asked is None or torch.device(asked).type != _KIND):
        return func(*args, **kwargs)
    _check(func, given)
    if asked is not None:
        there = torch.device(asked).type == _KIND
        kwargs = {**kwargs, "device": "cpu"}
    wrappers = {id(t.elem): t for t in given if isinstance(t, _Pretended)}
    plain = tree_map_only(_Pretended, lambda t: t.elem, (args, kwargs))
    found = func(*plain[0], **plain[1])
    for wrapper in wrappers.values():
        if wrapper.shape != wrapper.elem.shape:  # resize_, and what writes into an empty `out`
            _DATA.__set__(wrapper, _Pretended(wrapper.elem))

    def wrap(made: Tensor) -> Tensor:
        if id(made) in wrappers:
            return wrappers[id(made)]
        if not there:
            return made.clone() if any(made is t for t in tree_iter(plain)) else made
        if made.is_quantized:
            raise RuntimeError(f"{func} makes a quantized tensor on {DEVICE}")
        return _Pretended(made.clone() if any(made is t for t in given) else made)

    return tree_map_only(Tensor, wrap, found)


def _check(func: Any, given: list[Tensor]) -> None:
    name = func._schema.name.partition("::")[2]
    if func.namespace == "quantized":
        raise NotImplementedError(f"Could not run '{func}' with arguments from the CUDA backend")
    floats = [t for t in given if t.is_floating_point() or t.is_complex()]
    if name in _NO_INTEGERS and given and not floats:
        raise RuntimeError(f'"{name}_cuda" not implemented for {given[0].dtype}')
    if name in _MIXES:
        own = given[0] if name.startswith(("index", "_index")) else None
        if own is None or isinstance(own, _Pretended):
            return
    here = [t for t in given if not isinstance(t, _Pretended)]
    if len(here) != len(given) and any(t.dim() for t in here):
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found at least two, "
            f"cpu and {DEVICE}"
        )
