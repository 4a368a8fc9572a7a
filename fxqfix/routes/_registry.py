"""The registry of routes: a new route is a file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fxqfix.errors import OptionError, counting
from fxqfix.registry import Registry, check_name
from fxqfix.routes._base import Route
from fxqfix.routes._lapses import LAPSES
from fxqfix.routes._own import Deployer, plugin, plugins, route_of

__all__ = ["find", "registry", "with_opset"]


def _problem(route: Route) -> str | None:
    if route.deploy is None and route.certify is None:
        return "it can neither deploy nor certify"
    unknown = sorted(set(route.lapses) - LAPSES.keys())
    return f"there is no lapse {unknown[0]!r}" if unknown else None


ROUTES: Registry[str, Route] = Registry("route", parts=("summary",), check=_problem)
ROUTES.discover("fxqfix.routes", "ROUTE", but=("certify", "migrate"))


def registry() -> dict[str, Route]:
    """All routes by name.

    Example:
        >>> from fxqfix.routes import registry
        >>> "int8:fbgemm" in registry()
        True
    """
    return dict(ROUTES)


def find(name: str | Deployer | Route, where: str = "certify") -> Route:
    """The route of that name: one of these, or a plug-in's.

    Args:
        name: As the user wrote it; an object that follows `Deployer` is a route itself.
        where: The call that asks, for the message.

    Raises:
        UnknownNameError: There is none.
        RouteError: The object is no route, or the plug-in can't be loaded.

    Example:
        >>> find("export").name
        'export'
    """
    if not isinstance(name, str):
        return route_of(name, where)
    if name not in registry() and (found := plugin(name, where)) is not None:
        return found
    return registry()[check_name("route", name, (*registry(), *plugins()), where)]


def with_opset(route: Route, opset: int | None) -> Route:
    """A route that exports for an ONNX opset.

    Args:
        route: The route.
        opset: The opset; None leaves the route as it is.

    Raises:
        OptionError: The route has none, or this is none.
    """
    if opset is None:
        return route
    counting(opset, "certify", "opset is a number of ONNX's")
    if "onnx" not in route.packages or route.deploy is None:
        raise OptionError(
            f"route {route.name} has no opset",
            where="certify",
            found=f"opset={opset}",
            remedy="leave it out, or certify a route 'onnxruntime'",
        )
    return replace(route, deploy=partial(route.deploy, opset=opset))
