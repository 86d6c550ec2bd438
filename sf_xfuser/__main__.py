"""``python -m sf_xfuser`` is the ``sf-xfuser`` command."""

import sys

from sf_xfuser.cli import main

if __name__ == "__main__":
    sys.exit(main())
