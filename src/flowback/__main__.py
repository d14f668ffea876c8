"""`python -m flowback`, as `torchrun -m` starts it."""

import sys

from flowback.cli import main

sys.exit(main())
