"""``python -m guard.engine``."""

import gc
import sys

if __name__ == "__main__":  # vLLM's child processes import this module again
    gc.disable()  # nothing that an import makes is garbage; guard.engine.launch enables it
    try:
        from guard.engine.launch import main
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the engine needs the package {error.name}; install neuronguard[cpu] or neuronguard[cuda]"
        )
    sys.exit(main())
