"""Run the command line with `python -m smi_fast`."""

import sys

from smi_fast.cli import main

sys.exit(main())
