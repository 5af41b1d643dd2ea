"""`python -m gemma_encoder` is the command `gemma-encoder`."""

import sys

from gemma_encoder.cli import main

if __name__ == "__main__":
    sys.exit(main())
