"""What fxqfix needs to be imported: torch, and neither torch.ao.quantization nor torchao."""

from __future__ import annotations

from tests.warm import run_code

WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("torch.ao.", "torchao")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import torch
vars(torch.ao).pop("quantization", None)
for name in [m for m in sys.modules if m.startswith(("torch.ao.", "torchao", "fxqfix"))]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
import fxqfix, fxqfix.cli
from fxqfix import _torch
known = fxqfix.passes.registry()
print(len(known) > 20, fxqfix.inspect.__name__)
try:
    _torch.quantization()
except fxqfix.FxqfixError as error:
    print(type(error).__name__)
"""


def test_neither_torch_ao_quantization_nor_torchao() -> None:
    done = run_code(WITHOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "inspect", "MissingDependencyError"]
