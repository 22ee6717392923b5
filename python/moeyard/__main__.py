"""`python -m moeyard` is the `moeyard` command."""

import sys

from moeyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
