"""`python -m orthrus.cli`: the `orthrus` command without an installation."""

import sys

from orthrus.cli import main

sys.exit(main())
