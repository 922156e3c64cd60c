"""`python -m fast`: whether this machine has bf16 tiles, how exact their products are, and how fast."""

import sys

from fast.bf16 import main

sys.exit(main())
