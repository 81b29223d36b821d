"""`python -m mask2former_hf COMMAND`, for launchers that take a module: `torchrun -m mask2former_hf train ...`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
