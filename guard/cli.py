"""``neuronguard``: the command line. Each sub-command is a module of ``guard.commands``."""

from __future__ import annotations

import logging
from typing import Any

import click

from guard import __version__
from guard.commands.answer import answer
from guard.commands.bundle import bundle
from guard.commands.compare import compare
from guard.commands.drift import drift
from guard.commands.evaluate import evaluate
from guard.commands.fit import fit
from guard.commands.judge import judge
from guard.commands.locate import locate
from guard.commands.materialise import materialise
from guard.commands.tune import tune
from guard.commands.units import units
from guard.commands.verify import verify
from guard.serve.command import serve
from service.__main__ import gateway

# What the gateway does without: the base installation has none of these.
_EXTRA = frozenset(
    {
        "accelerate",
        "cryptography",
        "jinja2",
        "matplotlib",
        "numpy",
        "openai",
        "peft",
        "safetensors",
        "scipy",
        "sklearn",
        "torch",
        "tqdm",
        "transformers",
        "vllm",
    }
)


class _OneSentence(click.Group):
    """Turns the errors that the package raises on purpose into one sentence; anything else is a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _EXTRA:
                raise
            extra = "tune" if error.name in ("accelerate", "peft") else "fit"
            raise click.ClickException(
                f"this command needs the package {error.name}; install neuronguard[{extra}] "
                "(or neuronguard[cpu], neuronguard[cuda])"
            ) from error
        except (ValueError, FileNotFoundError) as error:
            # Every error that is meant for users is a class of this package; others keep their traceback.
            if not type(error).__module__.startswith("guard."):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="neuronguard")
@click.option("-v", "--verbose", is_flag=True, help="Say what is being done.")
def main(verbose: bool) -> None:
    """A safety guard inside the vLLM engine it protects: fit it, check it, serve it."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")


main.add_command(locate)
main.add_command(units)
main.add_command(tune)
main.add_command(fit)
main.add_command(evaluate)
main.add_command(compare)
main.add_command(answer)
main.add_command(judge)
main.add_command(drift)
main.add_command(bundle)
main.add_command(verify)
main.add_command(materialise)
main.add_command(serve)
main.add_command(gateway)
