"""`python -m lanewise`: only calls `main()`, since spawned children cannot unpickle what is defined here."""

import sys

from lanewise.cli import main

if __name__ == "__main__":
    sys.exit(main())
