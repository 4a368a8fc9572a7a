"""A route of one's own: any object that follows a small protocol, given or found by entry point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx

from fxqfix.errors import RouteError
from fxqfix.routes._base import Deployed, Route

__all__ = ["GROUP", "Deployer", "plugin", "plugins", "route_of"]

GROUP = "fxqfix.routes"
"""The group of entry points: a package names its route there, and `certify` takes it by name."""


@runtime_checkable
class Deployer(Protocol):
    """How a decomposed graph is deployed: what a route of one's own has to have.

    Attributes:
        name: What the certificate calls it.
        summary: What it is, in one sentence.

    Example:
        >>> import torch
        >>> class Torch:
        ...     name, summary = "torch", "the graph's own ops"
        ...
        ...     def deploy(self, graph_module, batch):
        ...         return lambda *inputs: [graph_module(*inputs)]
        >>> isinstance(Torch(), Deployer)
        True
    """

    name: str
    summary: str

    def deploy(
        self, graph_module: fx.GraphModule, batch: tuple[Any, ...]
    ) -> Callable[..., Sequence[Tensor]] | Deployed:
        """Deploy a graph, for inputs of one batch's shapes.

        Args:
            graph_module: Decomposed ops. `certify` hands over two graphs: the model's, and the same
                cut at its sites, which takes codes and gives codes.
            batch: Its inputs.

        Returns:
            A function of the graph's inputs, in order, that gives its outputs, in order, as
            tensors; or a `Deployed`, which names kernels too.
        """


def route_of(given: Any, where: str = "certify") -> Route:
    """A route from an object.

    Args:
        given: A `Route`, or what follows `Deployer`.
        where: Who asks, for messages.

    Raises:
        RouteError: It is neither.
    """
    if isinstance(given, Route):
        return given
    named = isinstance(getattr(given, "name", None), str) and bool(given.name)
    told = isinstance(getattr(given, "summary", None), str)
    if isinstance(given, type) or not (named and told and callable(getattr(given, "deploy", None))):
        raise RouteError(
            "this is no route",
            where=where,
            found=f"the class {given.__name__}" if isinstance(given, type) else repr(given)[:80],
            expected="a route's name, or an object with name, summary and "
            "deploy(graph_module, batch)",
        )

    def deploy(graph_module: fx.GraphModule, batch: tuple[Any, ...], _: object) -> Deployed:
        made = given.deploy(graph_module, batch)
        return made if isinstance(made, Deployed) else Deployed(made)

    return Route(name=given.name, summary=given.summary, deploy=deploy)


def plugins() -> dict[str, EntryPoint]:
    """Routes of other packages by name; nothing of theirs is imported.

    Example:
        >>> from fxqfix.routes import plugins
        >>> "export" in plugins()
        False
    """
    return {found.name: found for found in entry_points(group=GROUP)}


def plugin(name: str, where: str = "certify") -> Route | None:
    """The route that a package names so; None where none does.

    Args:
        name: Of the entry point.
        where: Who asks, for messages.

    Raises:
        RouteError: It can't be imported, or is no route.
    """
    found = plugins().get(name)
    if found is None:
        return None
    try:
        made = found.load()
        made = made() if isinstance(made, type) else made
    except Exception as error:  # of another package
        raise RouteError(
            f"the route {name!r} can't be loaded",
            where=where,
            found=f"{type(error).__name__}: {error}",
            expected=f"what {found.value} names",
        ) from error
    return route_of(made, where)
