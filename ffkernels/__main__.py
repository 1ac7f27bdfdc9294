"""`python -m ffkernels`."""

import sys

try:
    from .cli import main

    code = main()
except KeyboardInterrupt:  # before or after all that `main` does
    code = 130
sys.exit(code)
