"""Whether an op draws random numbers, by its own arguments; of Python code, by reading it.

Code is followed with what is known: the arguments of the call and the attributes of the module. So
``F.dropout(x, self.p, self.training)`` draws in train mode only, and an early return is one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxqfix.dialects._base import modules_of

__all__ = ["drawing"]

_UNKNOWN = object()
_SEEDED = torch.Tag.nondeterministic_seeded
_OFF = {"train": False, "training": False, "dropout_p": 0, "dropout": 0, "p": 0}
_Packet, _Overload = type(torch.ops.aten.relu), type(torch.ops.aten.relu.default)
_DEEP = 6  # calls within calls that are followed
_OTHERS = ("numpy.random", "random")  # generators that are not torch's
_METHODS = ("forward", "calculate_qparams")
_TELLING = ("Drop", "RReLU", "Attention", "Transformer", "LSTM", "GRU", "RNN", "Fractional")
_BODIES = ("body", "orelse", "finalbody")

_OPERATORS: dict[type, Callable[..., Any]] = {
    **{ast.Not: operator.not_, ast.USub: operator.neg},
    **{
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Is: operator.is_,
        ast.IsNot: operator.is_not,
    },
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
    **{
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
    },
}

Known = Mapping[str, Any]


def drawing(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes whose ops draw random numbers when they run.

    Args:
        graph_module: A graph; what its modules call is read, nothing is run.
    """
    modules = modules_of(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            parts = modules[str(node.target)].modules()
            found = any(_module_draws(part) for part in parts)
        elif node.op in ("call_function", "call_method"):
            args: Any = fx.map_arg(node.args, _unknown)
            kwargs: Any = fx.map_arg(node.kwargs, _unknown)
            target = node.target if node.op == "call_function" else _method(str(node.target))
            found = _call_draws(target, args, kwargs, 0)
        else:
            continue
        if found:
            yield node


def _unknown(node: fx.Node) -> Any:
    return _UNKNOWN


def _module_draws(module: nn.Module) -> bool:
    kind = type(module)
    for name in _METHODS:
        method = getattr(kind, name, None)
        if not isinstance(method, types.FunctionType) or _is_quiet(method, kind):
            continue
        if _code_draws(method, dict.fromkeys(method.__code__.co_varnames[:1], module), 0):
            return True
    return False


def _is_quiet(method: types.FunctionType, kind: type) -> bool:
    """Whether torch or this package wrote it, and none of their modules with that name draws."""
    own = (method.__module__ or "").startswith(("torch.", "fxqfix."))  # generated code has none
    return own and not any(word in kind.__name__ for word in _TELLING)


def _method(name: str) -> Any:
    return getattr(torch.ops.aten, name, None)


def _call_draws(target: Any, args: Any, kwargs: Known, depth: int) -> bool:
    """Whether a call draws, by its arguments; some may be `_UNKNOWN`."""
    if _is_other(target) or _is_other(type(getattr(target, "__self__", None))):
        return True
    if isinstance(target, types.MethodType):
        return _call_draws(target.__func__, (target.__self__, *args), kwargs, depth)
    if isinstance(target, types.FunctionType):
        module = target.__module__ or ""
        followed = not module.startswith("torch.") or module == "torch.nn.functional"
        return followed and _code_draws(target, _bound(target, args, kwargs), depth)
    if not isinstance(target, _Overload | _Packet):
        builtin = isinstance(target, types.BuiltinFunctionType | types.MethodDescriptorType)
        target = _method(target.__name__) if builtin else None
    return any(_overload_draws(op, args, kwargs) for op in _overloads(target)[:1])


def _is_other(target: Any) -> bool:
    place = str(getattr(target, "__module__", None) or "")
    return any(place == name or place.startswith(f"{name}.") for name in _OTHERS)


def _overloads(target: Any) -> list[Any]:
    """The seeded ones."""
    if isinstance(target, _Overload):
        found = [target]
    elif isinstance(target, _Packet):
        found = [getattr(target, name) for name in target.overloads()]  # type: ignore[no-untyped-call]  # torch's own
    else:
        found = []
    return [op for op in found if _SEEDED in op.tags]


def _overload_draws(op: Any, args: Any, kwargs: Known) -> bool:
    schema = op._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs)
    return not any(name in given and _is(given[name], off) for name, off in _OFF.items())


def _is(value: Any, off: Any) -> bool:
    return isinstance(value, bool | int | float) and value == off


def _bound(function: Callable[..., Any], args: Any, kwargs: Known) -> dict[str, Any]:
    try:
        found = inspect.signature(function).bind_partial(*args, **kwargs)
        found.apply_defaults()
    except (TypeError, ValueError):
        return {}
    return dict(found.arguments)


@functools.lru_cache(maxsize=512)
def _body(code: types.CodeType) -> list[ast.stmt]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # no source: typed in, or a lambda within a line
        return []
    found = tree.body[0]
    return found.body if isinstance(found, ast.FunctionDef) else []


def _code_draws(function: types.FunctionType, known: Known, depth: int) -> bool:
    if depth > _DEEP:
        return False
    body = _body(function.__code__)
    if not body:  # by the names alone
        return any(_overloads(_method(name)) for name in function.__code__.co_names)
    return _Reader(function, dict(known), depth).draws(body)[0]


class _Reader:
    """Follows the statements of one function with what is known of its variables."""

    def __init__(self, function: types.FunctionType, known: dict[str, Any], depth: int) -> None:
        self.known, self.depth = known, depth
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        self.outer = {**function.__globals__, **{name: _content(cell) for name, cell in cells}}

    def draws(self, statements: list[ast.stmt]) -> tuple[bool, bool]:
        """Whether any statement that may run draws, and whether the last one leaves."""
        for statement in statements:
            if isinstance(statement, ast.If):
                found, left = self._branches(statement)
            else:
                inner = [s for name in _BODIES for s in _part(statement, name)]
                found = any(map(self._expression, _heads(statement))) or self.draws(inner)[0]
                left = isinstance(statement, ast.Return | ast.Raise)
                self._assign(statement)
            if found or left:
                return found, left
        return False, False

    def _branches(self, statement: ast.If) -> tuple[bool, bool]:
        test = self.value(statement.test)
        if test is not _UNKNOWN:
            return self.draws(statement.body if test else statement.orelse)
        before = dict(self.known)
        found = self.draws(statement.body)
        after, self.known = self.known, before
        others = self.draws(statement.orelse)
        same = {n: v for n, v in self.known.items() if n in after and after[n] is v}
        self.known = self.known if found[1] else same
        return self._expression(statement.test) or found[0] or others[0], found[1] and others[1]

    def _assign(self, statement: ast.stmt) -> None:
        for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
            for name in ast.walk(target) if isinstance(target, ast.AST) else ():
                if isinstance(name, ast.Name):
                    plain = isinstance(statement, ast.Assign) and name is target
                    value = self.value(statement.value) if plain else _UNKNOWN  # type: ignore[attr-defined]
                    self.known[name.id] = value

    def _expression(self, node: ast.AST) -> bool:
        """Whether an expression, or one that it is made of, draws."""
        if isinstance(node, ast.IfExp) and (test := self.value(node.test)) is not _UNKNOWN:
            return self._expression(node.body if test else node.orelse)
        if isinstance(node, ast.Call) and self._call(node):
            return True
        return any(map(self._expression, ast.iter_child_nodes(node)))

    def _call(self, node: ast.Call) -> bool:
        target = self.value(node.func)
        if isinstance(target, nn.Module | type):
            return False  # a module is looked at by itself
        args = [self.value(a) for a in node.args if not isinstance(a, ast.Starred)]
        kwargs = {k.arg: self.value(k.value) for k in node.keywords if k.arg is not None}
        if target is _UNKNOWN and isinstance(node.func, ast.Attribute):  # a tensor's method
            target, args = _method(node.func.attr), [_UNKNOWN, *args]
        return target is not _UNKNOWN and _call_draws(target, args, kwargs, self.depth + 1)

    def value(self, node: ast.expr) -> Any:
        """What an expression gives, where that follows from what is known."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.known.get(node.id, self.outer.get(node.id, _UNKNOWN))
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            held = isinstance(owner, nn.Module | types.ModuleType | type)
            return getattr(owner, node.attr, _UNKNOWN) if held else _UNKNOWN
        parts = [self.value(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
        simple = ast.UnaryOp | ast.BoolOp | ast.Compare | ast.BinOp | ast.IfExp
        numbers = all(p is None or isinstance(p, bool | int | float | str) for p in parts)
        if isinstance(node, ast.BoolOp):
            return self._either(node, parts)
        if not isinstance(node, simple) or not numbers:
            return _UNKNOWN
        return self._computed(node)

    def _either(self, node: ast.BoolOp, parts: list[Any]) -> Any:
        wanted = isinstance(node.op, ast.Or)  # one such part decides
        plain = [p for p in parts if p is None or isinstance(p, bool | int | float | str)]
        if any(bool(p) is wanted for p in plain):
            return wanted
        return (not wanted) if len(plain) == len(parts) else _UNKNOWN

    def _computed(self, node: ast.expr) -> Any:
        try:
            if isinstance(node, ast.IfExp):
                return self.value(node.body if self.value(node.test) else node.orelse)
            if isinstance(node, ast.UnaryOp):
                return _OPERATORS[type(node.op)](self.value(node.operand))
            if isinstance(node, ast.BinOp):
                sides = self.value(node.left), self.value(node.right)
                return _OPERATORS[type(node.op)](*sides)
            if isinstance(node, ast.Compare) and len(node.ops) == 1:
                sides = self.value(node.left), self.value(node.comparators[0])
                return _OPERATORS[type(node.ops[0])](*sides)
        except (KeyError, TypeError, ArithmeticError):
            pass
        return _UNKNOWN


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _UNKNOWN


def _heads(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement itself, without those of the statements inside."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield child


def _part(statement: ast.stmt, name: str) -> list[ast.stmt]:
    found = getattr(statement, name, [])
    return found if isinstance(found, list) else []
