"""emulate-engine: every int8 op replaced by its engine's integer arithmetic in plain tensor ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from fxqfix import dialects, engines, ops
from fxqfix.dialects._base import modules_of
from fxqfix.dialects._writes import overwrites
from fxqfix.errors import DialectError, UnsupportedError
from fxqfix.names import Engine, IsaName
from fxqfix.passes._base import Pass, Rewriter
from fxqfix.passes._in_integers import EMULATED

__all__ = ["LEFT", "EmulateEngine"]

LEFT = "left as they were"  # in the meta of a model that is emulated in parts: node -> why


class Emulated(fx.GraphModule):
    """A model whose repr says what it holds for."""

    def extra_repr(self) -> str:
        """Engine, instruction set and threads."""
        return ", ".join(f"{name}={value}" for name, value in self.meta["emulation"].items())


@dataclass(frozen=True)
class EmulateEngine(Pass):
    """Replace int8 ops by modules that compute the same codes on any machine.

    Quantized tensors become integer tensors of their codes; a model that returns a quantized
    tensor returns its codes. What the result holds for is in its repr and its
    `meta["emulation"]`.

    Attributes:
        engine: The engine that the model was converted for.
        isa: The levels of the kernels; see `fxqfix.emulate`.
        threads: Number of threads that they run on; None for torch.get_num_threads().
        strict: Refuse a model with an op that can't be emulated, instead of leaving the op as it
            is: the result then runs in parts only, and where a kernel is known to be wrong these
            compute what it should.

    Raises:
        DialectError: The model is not an int8 model.
        UnsupportedError: An op can't be emulated (if strict).

    Example:
        >>> from fxqfix.passes import EmulateEngine
        >>> EmulateEngine("qnnpack", isa="vnni").isa
        'vnni'
    """

    engine: Engine
    isa: IsaName | engines.Isa | None = None
    threads: int | None = None
    strict: bool = True
    name: ClassVar[str] = "emulate-engine"
    requires: ClassVar[tuple[str, ...]] = (
        "avoid-defects",
        "restore-range",
    )

    def rewrite(self, rewriter: Rewriter) -> None:
        """Replace node by node, in the graph's order."""
        model = rewriter.graph_module
        reading = dialects.read(model)
        if not reading.has_kernels:
            plain = not reading.prepared
            raise DialectError(
                "only int8 models are emulated",
                where=self.name,
                found=f"a model of dialect {reading.dialect}"
                + ", which has no int8 kernel" * plain,
                expected="an int8 model",
                remedy="run it as it is: its ops are torch's own float ops, on any machine"
                if plain
                else "pass what convert_fx or eager convert returned",
            )
        done: dict[fx.Node, fx.Node] = {}
        left = {site.name.removesuffix(".weight"): why for site, why in reading.unsupported}
        isa, threads = engines.isa_of(self.isa), engines.threads_of(self.threads)
        options = self.engine, isa, threads
        _read_results(model)
        for node, call in engines.calls(model, *options, strict=self.strict).items():
            inputs = tuple(done.get(n, n) for n in call.inputs)
            # In parts, each has inputs of its own, and what a kernel writes over is nobody else's.
            known = replace(call, present=self.present(node))
            known = known if self.strict else replace(known, rereads=())
            try:
                done[node] = self._replace(rewriter, node, known, inputs)
            except UnsupportedError as error:
                if self.strict:
                    raise
                left[node.name] = error.what
        for node in reversed(model.graph.nodes):  # scales and packed weights that nothing reads
            if node.op == "get_attr" and not node.users:
                model.graph.erase_node(node)
        rewriter.module = Emulated(model, model.graph)
        rewriter.module.meta = {
            **model.meta,
            "emulation": {"engine": self.engine, "isa": isa, "threads": threads},
            **({} if self.strict else {LEFT: left}),
        }

    def present(self, node: fx.Node) -> engines.Present | None:
        """What gives an op's parameters while they are trained; here they stay as they are."""
        return None

    def _replace(
        self, rewriter: Rewriter, node: fx.Node, call: engines.Call, inputs: tuple[fx.Node, ...]
    ) -> fx.Node:
        row = engines.row_of(call, as_it_should=not self.strict)
        if row.build is None:
            return node
        name = rewriter.add_module(f"{EMULATED}{node.name}", row.build(call))
        with rewriter.graph.inserting_before(node):
            new = rewriter.graph.create_node("call_module", name, inputs)
        rewriter.replace(node, new, f"{call.key} in integers, as {call.engine} computes it")
        return new


def _read_results(model: fx.GraphModule) -> None:
    """Let readers of what a kernel wrote over read its result: in integers, no op writes."""
    modules = modules_of(model)
    for use in overwrites(model.graph, modules):
        match = ops.match_node(use.op, modules)
        if match is not None and match.spec.inplace:
            use.reader.replace_input_with(use.value, use.op)
