"""``python -m guard.serve``."""

from guard.serve.command import serve

if __name__ == "__main__":
    serve()
