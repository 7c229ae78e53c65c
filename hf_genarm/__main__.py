"""`python -m hf_genarm` is the command `hf-genarm`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
