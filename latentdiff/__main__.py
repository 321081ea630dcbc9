"""`python -m latentdiff`: the command line, for launchers such as `accelerate launch -m`."""

import sys

from latentdiff.cli import run

if __name__ == "__main__":
    sys.exit(run())
