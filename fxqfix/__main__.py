"""`python -m fxqfix` runs the command line."""

import sys

from fxqfix.cli import main

sys.exit(main())
