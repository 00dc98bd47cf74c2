"""The command line. Each command is a module with a function whose typed signature is its interface; heavy imports wait until it runs."""

from __future__ import annotations

import sys

import typer

from sterna import __version__
from sterna.commands import apply, compose, compress, demo, evaluate, inspect, merge, pilot, recode, report, search, similarity, train, verify
from sterna.errors import SternaError
from sterna.training.errors import Interrupted, InvalidConfig

app = typer.Typer(
    name="sterna",
    help="Experts: what fine-tuning taught a model, as a small file that goes onto a live model in milliseconds and comes off to the bit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (train, compress, recode, inspect, verify, similarity, merge, compose, apply, evaluate, search, report, pilot, demo):
    app.command()(getattr(module, module.__name__.rpartition(".")[2]))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sterna {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and leave.")) -> None:
    pass


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr (a faulty config: one for each fault) and exit code 2."""
    try:
        app()
    except InvalidConfig as error:
        for fault in error.faults:
            print(f"sterna: {fault}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        print(f"sterna: {error}", file=sys.stderr)
        sys.exit(130)
    except SternaError as error:
        print(f"sterna: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output left early, as `head` does
        sys.stderr.close()
        sys.exit(141)
