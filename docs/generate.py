"""Write the generated pages: the reference from the registries, outputs from the code above them.

python docs/generate.py            everything
python docs/generate.py reference  the reference pages only (no model runs)
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fxqfix
from fxqfix import (
    causes,
    checks,
    deviations,
    dialects,
    engines,
    errors,
    ops,
    passes,
    report,
    routes,
)

DOCS = Path(__file__).resolve().parent
NOTICE = "<!-- Written by docs/generate.py: edit the source, then run it again. -->\n"

# Pages whose Python blocks run.
PAGES = (
    DOCS.parent / "README.md",
    DOCS / "why.md",
    DOCS / "tutorial.md",
    DOCS / "howto-qat-training-script.md",
    DOCS / "howto-migrate-convert-fx.md",
    DOCS / "howto-debug-layer-by-layer.md",
    DOCS / "howto-show.md",
    DOCS / "howto-pt2e.md",
    DOCS / "howto-deploy.md",
    DOCS / "judge.md",
    DOCS / "moving-to-0.2.md",
)


# --- Google-style docstrings to Markdown ---------------------------------------------------------


def docstring(documented: object, skip: Iterable[str] = ("Example",)) -> str:
    """The docstring as Markdown; the examples run where they stand and are left out here."""
    text = inspect.getdoc(documented) or ""
    parts = re.split(r"^(\w+):\n(?=\s)", text, flags=re.MULTILINE)
    rendered = [_code(parts[0].strip())]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title not in skip:
            rendered.append(f"**{title}**\n\n{_entries(body)}")
    return "\n\n".join(rendered)


def _entries(body: str) -> str:
    lines: list[str] = []
    for line in inspect.cleandoc(body).splitlines():
        name, colon, rest = line.partition(": ")
        if line.startswith(" ") and lines:
            lines[-1] += f" {line.strip()}"
        elif colon and re.fullmatch(r"\*{0,2}\w+(, \w+)*", name):
            names = ", ".join(f"`{n}`" for n in name.split(", "))
            lines.append(f"- {names}: {_code(rest)}")
        elif lines:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(_code(line))
    return "\n".join(lines)


def _code(text: str) -> str:
    return text.replace("``", "`")


def summary(documented: object) -> str:
    return _code((inspect.getdoc(documented) or "").partition("\n")[0])


def table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headers, tuple("---" for _ in headers), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in r)} |" for r in lines
    )


# --- the pages -----------------------------------------------------------------------------------


def passes_page() -> str:
    # A user's own passes are in the registry too.
    known = {n: p for n, p in passes.registry().items() if p.__module__.startswith("fxqfix.")}
    parts = [
        "# Passes",
        "All are in `fxqfix.passes`. A pass is a frozen dataclass: its fields are its options. "
        "Calling it works on a copy of the model, checks what it promises, and returns a "
        "`PassResult` with `graph_module`, `modified` and `edits`. Passes run under "
        "`torch.fx.passes.infra.pass_manager.PassManager` as they are "
        "(`examples/use_passes_with_torch_passmanager.py`). Of a pass of your own, "
        "`fxqfix.testing.check_pass(step, model, *inputs)` tells whether it keeps these promises.",
        "`fxqfix.passes.chain(model, *passes)` runs several on one copy. It refuses a pass that "
        "stands before one whose result it goes by, and calls `between(step, result)` behind each. "
        "`str(step)` is a pass as text, and `fxqfix.passes.parse` reads it: "
        "`freeze-qparams,fold-batchnorm,decompose-quantize,pin-ranges{where=codes}`. On the "
        "command line: `fxqfix rewrite pkg.module:function PIPELINE [--code]`.",
        table(
            ("pass", "class", "what it does"),
            (
                (f"[{name}](#{name})", f"`{found.__name__}`", summary(found))
                for name, found in known.items()
            ),
        ),
    ]
    for name, found in known.items():
        options = ", ".join(_option(f) for f in dataclasses.fields(found))
        call = f"fxqfix.passes.{found.__name__}({options})"
        if len(call) > 100:  # as ruff formats it
            call = f"fxqfix.passes.{found.__name__}(\n    {options}\n)"
        signature = f"```py\n{call}\n```"
        parts += [f"## {name}", signature, docstring(found)]
    return "\n\n".join(parts)


def _option(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        text = repr(field.default).replace("'", '"')  # as ruff writes it
        return f"{field.name}={text}"
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.name}={dict(field.default_factory()) or '{}'}"
    return field.name


def causes_page() -> str:
    parts = [
        "# Causes",
        "Asked in this order at every site where a code differs; each takes the codes that its "
        "own correction repairs and that no cause before it took. The shares add up to all codes "
        "that differ locally or cumulatively. [Architecture](../architecture.md#causes) says why.",
        table(
            ("cause", "what it is", "repaired by"),
            (
                (f"[{c.name}](#{c.name})", c.summary, f"`{c.repair}`" if c.repair else "-")
                for c in causes.registry()
            ),
        ),
    ]
    for cause in causes.registry():
        repaired = f"- Repaired by: `{cause.repair}`\n" if cause.repair else ""
        parts += [
            f"## {cause.name}",
            docstring(type(cause)),
            f"{repaired}- What to do: {cause.advice}",
        ]
    return "\n\n".join(parts)


def deviations_page() -> str:
    rows = deviations.registry().values()
    return "\n\n".join(
        [
            "# Deviations",
            "What `judge` tries where a device's codes differ from the reference: each alone, then "
            "in pairs. What gives every code is named; those that give the same codes are named "
            "together. To add one is to write a row in `fxqfix/deviations/`.",
            table(
                ("deviation", "the device ...", "to change", "told apart by"),
                ((f"`{d.name}`", d.summary, d.remedy, d.needs or "-") for d in rows),
            ),
        ]
    )


def verdicts_page() -> str:
    names = (*(c.name for c in causes.registry()), *routes.LAPSES)
    kinds = tuple(kind for kind in report.ALLOWED if kind != "Judgement")  # it has deviations
    allowed = " and ".join(f"`{name}`" for name in sorted(report.ALLOWED["Judgement"]))
    rows = [
        (f"`{name}`", *("allowed" if name in report.ALLOWED[kind] else "not ok" for kind in kinds))
        for name in dict.fromkeys(names)
    ]
    return "\n\n".join(
        [
            "# Verdicts",
            "Every result (`Report`, `Certificate`, `Int8Certificate`, `Repair`, `Migration`, "
            "`Judgement`) has `verdict`, `ok`, `exact`, and `reasons`, which says why the verdict "
            "is not *ok*.",
            "- **exact**: everything that the model returns and everything that it quantizes was "
            "looked at, and every code and every output is equal, as `torch.equal` compares; "
            "NaN is equal to NaN.\n"
            "- **ok**: everything was looked at, nothing is out of range, and every difference has "
            "a named cause that this kind of record allows. An output that differs only by what "
            "such codes set off is ok where feeding the right codes there makes it equal.\n"
            "- **not ok**: a code is out of range, a cause is not allowed, or none was found; "
            "values lie on another grid (a scale that is not the prepared one, be codes equal or "
            "not); codes are shifted (another zero point, be values equal or not); an output is "
            "lacking, or another constant stands in its place (`faults`).\n"
            "- **not judged**: nothing wrong was seen, but something was left out (`left_out`): a "
            "site without a partner, a module or a nested graph that no reader opens, an output, "
            "codes whose cause was not asked for. 0 of 0 is not judged.",
            "The exit code of a command is 0 for ok, 1 for not ok, and 2 for not judged or an "
            "error. `compare --fail-on-difference` asks for exact; `--allow CAUSE` accepts a "
            "cause, as `report.check(allow=...)` does.",
            "An `Int8Certificate` is made without data, so it is never exact; its faults are "
            "ranges that are not held, weights that differ, kernels that are known to be wrong, "
            "and ops that can't run on what they get. An output that training returns in float "
            "and the deployed model as codes: a `Report` has looked at it (`requantization`, "
            "allowed); an `Int8Certificate` has no data to look with, so it is not judged there. "
            "A `Repair` and a `Migration` take the verdict of the comparison and the certificate "
            "that they hold.",
            f"A `Judgement` of a device allows the [deviations](deviations.md) {allowed}.",
            "## Causes that each kind of record allows",
            "A cause is allowed where it moves codes by a rounding that every healthy deployment "
            "has. `upstream` is allowed because its own cause counts at the site where it began.",
            table(("cause", *(f"`{kind}`" for kind in kinds)), rows),
        ]
    )


def checks_page() -> str:
    rows = [(f"`{check.code}`", _code(check.summary)) for check in checks.registry()]
    return "\n\n".join(
        [
            "# Checks",
            "What `fxqfix.lint` looks for, and `fxqfix lint` on the command line, which exits with "
            "1 where it finds an error. No data, no forward. *error*: the converted model will "
            "compute something else, or will not run; *warning*: it may, on some data or CPUs; "
            "*info*: worth knowing. A code that is also a [cause](causes.md) leads to it.",
            table(("code", "what it finds"), rows),
        ]
    )


def ops_page() -> str:
    parts = [
        "# Ops",
        "One row per op family, with its spellings in every dialect. Readers, rewrites and tests "
        "read this table; a new op is a new row of `fxqfix/ops.py`. A spelling that the installed "
        "torch lacks is skipped.",
        _rules("Output rules"),
        _rules("Value rules"),
    ]
    families = dict.fromkeys(row.family for row in ops.TABLE)
    for family in families:
        rows = [row for row in ops.TABLE if row.family == family]
        parts += [
            f"## {family.capitalize()}",
            table(
                ("op", "output", "on floats", "on quantized tensors", "int8 weights, float values"),
                ((f"`{row.key}`", _rule(row), *_spellings(row)) for row in rows),
            ),
        ]
    return "\n\n".join(parts)


def _rules(name: str) -> str:
    text = inspect.getdoc(ops) or ""
    _, _, rules = text.partition(name)
    title, _, items = rules.partition(":\n\n")
    items = re.split(r"\n\n(?!\*)", items)[0]
    joined = re.sub(r"\n {2,}", " ", items.strip())
    return f"{name} {' '.join(title.split())}:\n\n{_code(joined)}"


def _rule(row: ops.OpSpec) -> str:
    return f"{row.output}, {row.values}" if row.values else row.output


def _spellings(row: ops.OpSpec) -> tuple[str, str, str]:
    def cell(*columns: str) -> str:
        return "<br>".join(f"`{name}`" for c in columns for name in getattr(row, c)) or "-"

    return cell("spelled", "spelled_relu"), cell("int8", "int8_relu"), cell("dynamic")


def engines_page() -> str:
    return "\n\n".join(
        [
            "# Engines",
            "What `fxqfix.emulate` computes to the code, per op and engine; `fxqfix engines` "
            "prints the same. An op that is not here, or has no engine, is refused by name. "
            "*moves codes*: the op runs on the codes as it stands.",
            table(*engines.listing.coverage()),
            "x86 runs convolutions on onednn where the CPU has VNNI, groups <= 100 and no weight "
            "has a zero point; all else on fbgemm.",
            "## Kernels that are plainly wrong",
            "Each row has a probe that runs the kernel: `fxqfix engines --probe` says which are "
            "wrong on your machine. A model that meets one is refused by `emulate`, unless the "
            "effect is arithmetic that can be followed.",
            table(*engines.listing.known_wrong()),
        ]
    )


def dialects_page() -> str:
    parts = [
        "# Dialects",
        "A dialect is one of torch's spellings of a quantized model. A reader per dialect turns a "
        "graph into sites; everything above it sees sites only. They are asked in this order. "
        "Eager models are traced first (`fxqfix.trace`), with quantization modules as leaves and "
        "hooked observers as nodes, and are then read as `fx-prepared` or `fx-int8`.",
    ]
    for found in dialects.DIALECTS:
        module: Any = found
        title, _, rest = (inspect.getdoc(module) or "").partition("\n")
        described = re.sub(r'^Dialect "[\w-]+": ', "", title)
        source = module.__name__.rpartition(".")[2]
        parts += [
            f"## {found.NAME}",
            _code(described),
            _code(rest.strip()),
            f"Reader: `fxqfix/dialects/{source}.py`",
        ]
    return "\n\n".join(filter(None, parts))


def routes_page() -> str:
    rows = (
        (f"`{r.name}`", _code(r.summary), f"`{r.extra}`" if r.extra else "-")
        for r in routes.registry().values()
    )
    parts = [
        "# Routes",
        "What `fxqfix.certify(model, route, data)` takes. A route deploys the decomposed "
        "graph; the certificate says what the deployed form computes beside it. A new route is a "
        "file in `fxqfix/routes/`.",
        table(("route", "what it is", "extra"), rows),
    ]
    for module in dict.fromkeys(map(_module, routes.registry().values())):
        title, _, rest = (inspect.getdoc(module) or "").partition("\n")
        if rest.strip():
            parts += [f"## {title}", _code(rest.strip())]
    causes = ((f"`{name}`", text) for name, text in routes.LAPSES.items())
    parts += [
        "## What kernels compute otherwise",
        "Causes of a certificate beside `range-lost`, `requantization`, `rounding` and "
        "`unexplained`. Each is proven by recomputing the site so.",
        table(("cause", "what it is"), causes),
    ]
    return "\n\n".join(parts)


def _module(route: routes.Route) -> Any:
    function: Any = route.deploy or route.certify
    return inspect.getmodule(getattr(function, "func", function))


def errors_page() -> str:
    base = errors.FxqfixError
    found = [getattr(errors, name) for name in errors.__all__ if name != base.__name__]
    rows = (
        (f"`{cls.__name__}`", ", ".join(f"`{b.__name__}`" for b in _builtins(cls)), summary(cls))
        for cls in found
    )
    return "\n\n".join(
        [
            "# Errors",
            "All are in `fxqfix.errors`. Each is an `FxqfixError` and the apt builtin too, so "
            "`except ValueError` catches what it should. A message says what is wrong, where, "
            "what was found, what was expected and what to do; the same are attributes: `what`, "
            "`where`, `found`, `expected`, `remedy`. After an error the models are as before.",
            table(("error", "is also", "when"), rows),
        ]
    )


def _builtins(cls: type) -> list[type]:
    return [b for b in cls.__bases__ if b.__module__ == "builtins"]


def api_page() -> str:
    parts = [
        "# Public names",
        "What `import fxqfix` gives. The passes are in [`fxqfix.passes`](passes.md), the "
        "exceptions in [`fxqfix.errors`](errors.md).",
    ]
    public = [getattr(fxqfix, name) for name in fxqfix.__all__ if not name.startswith("_")]
    functions = [f for f in public if inspect.isfunction(f)]
    for function in sorted(functions, key=lambda f: f.__name__):
        signature = re.sub(
            r"[\w.]+\.(\w+)", r"\1", str(inspect.signature(function, eval_str=False))
        )
        signature = signature.replace("'", "")
        parts += [
            f"## {function.__name__}",
            f"```py\nfxqfix.{function.__name__}{signature}\n```",
            docstring(function),
        ]
    for cls in sorted((c for c in public if inspect.isclass(c)), key=lambda c: c.__name__):
        members = ((n, m) for n, m in vars(cls).items() if not n.startswith("_"))
        methods = [_member(name, member) for name, member in members if inspect.getdoc(member)]
        methods = ["**Properties and methods**\n", *filter(None, methods)]
        parts += [f"## {cls.__name__}", docstring(cls), "\n".join(methods) * (len(methods) > 1)]
    return "\n\n".join(filter(None, parts))


def _member(name: str, member: object) -> str:
    if isinstance(member, property):
        return f"- `{name}`: {summary(member)}"
    if isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
        return f"- `{name}()`: {summary(member)}"
    return ""


REFERENCE: dict[str, Callable[[], str]] = {
    "passes": passes_page,
    "causes": causes_page,
    "deviations": deviations_page,
    "verdicts": verdicts_page,
    "checks": checks_page,
    "ops": ops_page,
    "engines": engines_page,
    "dialects": dialects_page,
    "routes": routes_page,
    "errors": errors_page,
    "api": api_page,
}


def reference(name: str) -> str:
    """The text of a reference page."""
    return f"{NOTICE}\n{REFERENCE[name]().strip()}\n"


def main(arguments: list[str]) -> None:
    for name in REFERENCE:
        (DOCS / "reference" / f"{name}.md").write_text(reference(name), encoding="utf-8")
    if "reference" in arguments:
        return
    from blocks import render

    for page in PAGES:
        if not arguments or page.stem in arguments:
            page.write_text(render(page), encoding="utf-8")
            print(f"wrote {page.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
