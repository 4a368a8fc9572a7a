"""The ways of deploying a decomposed graph, one per file, and `certify`, which watches them."""

from fxqfix.routes._base import Deployed, Route, SiteView
from fxqfix.routes._lapses import LAPSES
from fxqfix.routes._own import Deployer, plugins
from fxqfix.routes._registry import find, registry
from fxqfix.routes.certify import certify
from fxqfix.routes.migrate import migrate

__all__ = [
    "LAPSES",
    "Deployed",
    "Deployer",
    "Route",
    "SiteView",
    "certify",
    "find",
    "migrate",
    "plugins",
    "registry",
]
