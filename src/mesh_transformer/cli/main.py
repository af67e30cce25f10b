"""The command: one thin function a subcommand; everything heavy is imported inside them.

Exit status: 0 done; 2 the user's input is wrong; 1 anything else; 128 + n ended by signal n.
"""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer

from mesh_transformer.cli import (
    bench,
    convert,
    demo,
    doctor,
    evaluate,
    examples,
    generate,
    inspect,
    launch,
    plan,
    prepare,
    report,
    serve,
    tpu,
    train,
)
from mesh_transformer.config.errors import MeshTransformerError

# A path where something else stands in the way, or that may not be used.
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)

app = typer.Typer(
    name="mesh-transformer",
    help="Train, sample, serve, convert and inspect GPT-J-class language models in JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("demo")(demo.demo)
app.command("prepare")(prepare.prepare)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("launch")(launch.launch)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("evaluate", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(evaluate.evaluate)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(tpu.app, name="tpu")
examples.add_to(app)


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Print the versions in use and whether they were tested."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error. May stand anywhere."),
) -> None:
    """Train, sample, serve, convert and inspect GPT-J-class language models in JAX."""
    if version:
        from mesh_transformer.compat import version_report
        from mesh_transformer.kernels.native import description

        typer.echo(version_report(description()))
        raise typer.Exit


def main() -> NoReturn:
    """Runs the command line and exits."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(app(arguments, prog_name="mesh-transformer", standalone_mode=False) or 0)
    except MeshTransformerError as error:
        _fail(error, str(error), error.exit_status, debug)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; nobody is left to tell.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno not in _UNUSABLE or error.filename is None:
            _fail_unforeseen(error, debug)
        _fail(error, f"{error.filename}: {error.strerror}; choose another place, or make it usable", 2, debug)
    except Exception as error:
        # What the command line library raises for wrong usage; other exceptions are not its own.
        if hasattr(error, "format_message"):
            if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help, and nothing is wrong with it
                print(error.format_message(), file=sys.stderr)
                sys.exit(2)
            context = getattr(error, "ctx", None)
            asked = context.command_path if context else "mesh-transformer"
            text = f"{error.format_message()}{_given(error)}\nsee: {asked} --help"
            _fail(error, text, getattr(error, "exit_code", 2), debug)
        _fail_unforeseen(error, debug)


def _fail(error: BaseException, text: str, status: int, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exception(error)
    else:
        print(f"error: {text}", file=sys.stderr)
    if "mesh_transformer.processes" in sys.modules:  # nobody else can have joined others
        from mesh_transformer.processes import end_after_error

        end_after_error(status)
    sys.exit(status)


def _fail_unforeseen(error: BaseException, debug: bool) -> NoReturn:
    first_line = next(iter(str(error).splitlines()), "")
    _fail(error, f"{type(error).__name__}: {first_line}\nrun again with --debug for the traceback", 1, debug)


def _given(error: BaseException) -> str:
    """The value of an option that could not be converted: the library's message lacks it."""
    errors = getattr(error.__cause__, "errors", None)
    return f"; given: {errors()[0]['input']}" if errors else ""
