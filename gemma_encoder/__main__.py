"""Entry point of `python -m gemma_encoder`, equivalent to the command `gemma-encoder`."""

import sys

from gemma_encoder.cli import main

if __name__ == "__main__":
    sys.exit(main())
