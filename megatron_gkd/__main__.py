"""`python -m megatron_gkd ...`, the form that torchrun starts."""

import sys

from megatron_gkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
