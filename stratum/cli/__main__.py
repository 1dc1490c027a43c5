"""`python -m stratum.cli`: the command of a checkout that is not installed."""

import sys

from stratum.cli import main

sys.exit(main())
