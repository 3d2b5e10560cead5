"""What every command does at its edges: errors of the user, and results printed or written."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from energymodel.errors import EnergyModelError

if TYPE_CHECKING:
    from energymodel.journal import Journal


@contextmanager
def user_errors() -> Iterator[None]:
    """Print an error's message on stderr and exit with code 2."""
    try:
        yield
    except EnergyModelError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except MemoryError as error:
        typer.echo("error: out of memory; give a smaller trace, or lower the limits", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None


@contextmanager
def kept_until_done(journal: Journal[Any, Any] | None) -> Iterator[None]:
    """Close a journal after the work: deleted if all went well; on Ctrl-C, say what it keeps."""
    completed = False
    try:
        yield
        completed = True
    except KeyboardInterrupt:
        if journal is None:
            raise
        typer.echo(
            f"interrupted: {len(journal.kept)} {journal.what} are kept in {journal.path}; run the "
            "same command again to go on",
            err=True,
        )
        raise typer.Exit(130) from None
    finally:
        if journal is not None:
            journal.close(delete=completed)


def in_color(output: Path | None = None) -> bool:
    """Whether a result goes to a terminal."""
    return output is None and sys.stdout is not None and sys.stdout.isatty()


def print_text(text: str) -> None:
    """Write to stdout; a reader that has gone (`| head`) is no error."""
    if sys.stdout is None:
        raise EnergyModelError("standard output is closed; use --output FILE")
    try:
        typer.echo(text)
    except BrokenPipeError:
        # what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise EnergyModelError(f"standard output cannot be written: {error.strerror}") from error


def check_writable(output: Path | None, *inputs: str | None, option: str = "--output") -> None:
    """Fail before the work, not after it.

    Parameters
    ----------
    output : where a result will be written; None is the terminal
    inputs : names or files that the command reads; `output` may be none of them
    option : that named the file, for messages

    Raises
    ------
    EnergyModelError
        If `output` cannot be written, or would overwrite an input.
    """
    if output is None:
        return
    try:
        if output.is_dir():
            raise EnergyModelError(f"{option} {output} is a folder; name a file")
        for read in inputs:
            if output.is_file() and read and Path(read).is_file() and output.samefile(read):
                raise EnergyModelError(
                    f"{option} {output} would overwrite {read}, which is read; name another file"
                )
        target = _target(output)
        folder_exists = target.parent.is_dir()
        writable = os.access(target.parent if _is_replaced(target) else target, os.W_OK)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, null byte
        raise EnergyModelError(f"{option} {str(output)!r} is no usable path: {error}") from error
    if not folder_exists:
        raise EnergyModelError(f"{option} {output}: the folder {target.parent} does not exist")
    if not writable:
        raise EnergyModelError(f"{option} {output} cannot be written; choose another place")


def write_text(text: str, output: Path | None) -> None:
    """Print, or write whole: a file appears complete or not at all."""
    if output is None:
        print_text(text)
        return
    write_bytes((text + "\n").encode("utf-8", errors="replace"), output)


def write_bytes(data: bytes, output: Path) -> None:
    """Write whole: a file appears complete or not at all."""
    try:
        target = _target(output)
        if _is_replaced(target):
            _replace(target, data)
        else:
            target.write_bytes(data)
    except BrokenPipeError:
        return  # the reader of the pipe has gone
    except OSError as error:
        raise EnergyModelError(f"{output} cannot be written: {error.strerror}") from error


def _target(output: Path) -> Path:
    """The file behind links, so that a link stays one; a pipe or a device (`/dev/stdout`) as is."""
    return output if output.exists() and not output.is_file() else output.resolve()


def _is_replaced(target: Path) -> bool:
    """Whether a new file takes the place of `target`; a pipe or a device is written into."""
    return target.is_file() or not target.exists()


def _replace(target: Path, data: bytes) -> None:
    """Put a complete file in the place of `target`, its mode kept."""
    part = target.with_name(f".energymodel-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            part.chmod(target.stat().st_mode & 0o7777)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
