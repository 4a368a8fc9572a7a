"""Graph passes, one per file. Each works on a copy, records its edits and verifies its result."""

from fxqfix.inserted import FloatIsland, InMemoryOrder, QuantizedIsland, hold_range, round_to_grid
from fxqfix.passes._base import Pass, PassResult, Rewriter, chain, registry
from fxqfix.passes._frozen import FrozenFakeQuantize
from fxqfix.passes._pipeline import parse
from fxqfix.passes.avoid_defects import AvoidDefects
from fxqfix.passes.cut_sites import CutSites
from fxqfix.passes.decompose_quantize import DecomposeQuantize
from fxqfix.passes.emulate_engine import EmulateEngine
from fxqfix.passes.explicit_writes import ExplicitWrites
from fxqfix.passes.float_islands import FloatIslands
from fxqfix.passes.float_weights import FloatWeights
from fxqfix.passes.fold_batchnorm import FoldBatchNorm
from fxqfix.passes.freeze_qparams import FreezeQParams
from fxqfix.passes.graft_islands import GraftIslands
from fxqfix.passes.hold_weights import HoldWeights
from fxqfix.passes.insert_shadows import InsertShadows
from fxqfix.passes.own_readers import OwnReaders
from fxqfix.passes.pin_ranges import PinRanges
from fxqfix.passes.remove_shadows import RemoveShadows
from fxqfix.passes.reroute_reads import RerouteReads
from fxqfix.passes.restore_qparams import RestoreQParams
from fxqfix.passes.restore_range import RestoreRange
from fxqfix.passes.signed_codes import SignedCodes
from fxqfix.passes.split_shared import SplitShared
from fxqfix.passes.suit_xnnpack import SuitXnnpack
from fxqfix.registry import plugins

__all__ = [
    "AvoidDefects",
    "CutSites",
    "DecomposeQuantize",
    "EmulateEngine",
    "ExplicitWrites",
    "FloatIsland",
    "FloatIslands",
    "FloatWeights",
    "FoldBatchNorm",
    "FreezeQParams",
    "FrozenFakeQuantize",
    "GraftIslands",
    "HoldWeights",
    "InMemoryOrder",
    "InsertShadows",
    "OwnReaders",
    "Pass",
    "PassResult",
    "PinRanges",
    "QuantizedIsland",
    "RemoveShadows",
    "RerouteReads",
    "RestoreQParams",
    "RestoreRange",
    "Rewriter",
    "SignedCodes",
    "SplitShared",
    "SuitXnnpack",
    "chain",
    "hold_range",
    "parse",
    "registry",
    "round_to_grid",
]

plugins(__name__)  # a pass registers itself
