"""The command line: `jaxquant demo`, `jaxquant formats`, `jaxquant --version`.

`formats` and `--version` need nothing beyond the library; the rest needs the `demo` extra.
"""

# No `from __future__ import annotations`: typer is imported within a function, where it could not
# find the names in annotations that are strings.

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from jaxquant import __version__
from jaxquant.numerics.table import formats


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits; the console script `jaxquant`.

    Args:
      arguments: the words after the command's name, by default those the program was given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = app()
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit(_without_typer(given))
    command(given, prog_name="jaxquant")


def app() -> Any:
    """The typer application; `ModuleNotFoundError` without the `demo` extra."""
    import typer

    command = typer.Typer(
        help="Quantization for JAX and Flax, as pure functions.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # a bug's own traceback says more, and can be searched for
    )

    def show_version(asked: bool) -> None:
        if asked:
            typer.echo(f"jaxquant {__version__}")
            raise typer.Exit

    @command.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option(
                "--version", is_eager=True, callback=show_version, help="Print the version."
            ),
        ] = False,
    ) -> None:
        pass

    @command.command("demo")
    def demo(
        presets: Annotated[
            str, typer.Option(metavar="NAMES", help="Presets, joined by commas; all by default.")
        ] = "",
        quick: Annotated[
            bool, typer.Option("--quick", help="Train and time for less long.")
        ] = False,
    ) -> None:
        """Train a small CNN on digits, quantize it by every preset, and compare."""
        from jaxquant import demo as the_demo  # Flax and Optax take a second to import

        names = [name.strip() for name in presets.split(",") if name.strip()]
        try:
            the_demo.check_presets(names or the_demo.PRESETS)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--presets") from None
        try:
            the_demo.main(names or the_demo.PRESETS, quick=quick)
        except the_demo.MissingExtra as error:
            typer.echo(f"jaxquant demo: {error}", err=True)
            raise typer.Exit(1) from None

    @command.command("formats")
    def show_formats() -> None:
        """Print every numeric format: bits, range, smallest values, epsilon."""
        typer.echo(formats.table())

    return command


def _without_typer(given: Sequence[str]) -> int:
    """What can be done without the demo extra; the exit status."""
    if list(given) == ["formats"]:
        print(formats.table())
    elif list(given) == ["--version"]:
        print(f"jaxquant {__version__}")
    else:
        print(
            "jaxquant: only `jaxquant formats` and `jaxquant --version` work here, as typer is "
            'missing. For the other commands: pip install "jaxquant[demo]"',
            file=sys.stderr,
        )
        return 2
    return 0
