"""``python -m guard.engine``."""

import sys

from guard.engine.launch import main

if __name__ == "__main__":  # vLLM's child processes import this module again
    sys.exit(main())
