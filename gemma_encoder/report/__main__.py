"""`python -m gemma_encoder.report`."""

import sys

from gemma_encoder.report.program import main

sys.exit(main())
