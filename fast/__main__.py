"""`python -m fast`: how this machine multiplies bf16, how exactly, and how fast."""

import sys

from fast.bf16 import main

sys.exit(main())
