"""parse: a pipeline of passes from its text."""

from __future__ import annotations

from fxqfix._settings import entry
from fxqfix.passes._base import Pass, registry
from fxqfix.passes._text import options_of, split
from fxqfix.registry import check_name

__all__ = ["parse"]


@entry
def parse(text: str) -> tuple[Pass, ...]:
    """The passes that a text names: `name{option=value other=value},name`.

    A value is a word, a number, true, false, none, or JSON: `ranges={"x":[0,127]}`. What is no
    text, such as another model, can't be given. `str` of a pass is its text.

    Raises:
        UnknownNameError: There is no such pass.
        OptionError: A pass has no such option, or the text is no pipeline.

    Example:
        >>> parse("freeze-qparams, pin-ranges{where=codes}")
        (FreezeQParams(uncalibrated=False), PinRanges(ranges=mappingproxy({}), where='codes'))
        >>> str(parse("pin-ranges{where=codes}")[0])
        'pin-ranges{where=codes}'
    """
    found = []
    for name, options in split(text):
        kind = registry()[check_name("pass", name, registry().keys(), "parse")]
        found.append(kind(**options_of(name, kind, options)))
    return tuple(found)
