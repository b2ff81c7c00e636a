"""Make the environment in `.venv`: run by `make`, with whatever `python3` there is.

This file holds nothing but the version gate, in syntax that any Python 3 can read; the work is in
`environment.py`, which may use what Python 3.11 offers.
"""

import sys

OLDEST, NEWEST = (3, 11), (3, 14)


def main():
    """Refuse an unsupported interpreter in one sentence, else set the environment up."""
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        limits = ".".join(map(str, OLDEST)) + " to " + ".".join(map(str, NEWEST))
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            "neuronguard needs Python "
            + limits
            + " and this is "
            + found
            + ": name another with `make PYTHON=/path/to/python3.12 ...`."
        )
    import environment

    return environment.main()


if __name__ == "__main__":
    sys.exit(main())
