"""`python -m m2f_hf.cli` is the same as `m2f`."""

import sys

from .main import main


sys.exit(main())
