"""Arguments in, exit code out: 0 all done, 1 the run failed, 2 something asked for cannot be done, 130 interrupted."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import Cancelled, FluxFoundryError, NumericError, UserError
from ..version import VERSION
from .arguments import add_convert, add_demo, add_generate, add_inspect, add_models, add_plan, add_prompts
from .arguments_guided import add_control, add_edit, add_fill, add_outpaint, add_redux
from .console import fault
from .purposes import DRAWING

__all__ = ["main"]

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
NAME_FAULTS = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EINVAL})
DEBUG_VARIABLE = "FLUXFOUNDRY_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its words; those of the process when None.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no fault
    for name in ("SIGTERM", "SIGHUP"):  # so that what is half written is taken away again
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), _end)
    try:
        return _run(argv)
    except SystemExit as exit_:  # argparse's, after --help and --version
        return exit_.code if isinstance(exit_.code, int) else DONE
    except (UserError, NumericError) as error:  # numbers that are not finite come from a file or dtype that was chosen
        return _ended(REFUSED, str(error))
    except (KeyboardInterrupt, Cancelled):
        return _ended(INTERRUPTED, "interrupted; no file was left half written")
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except FluxFoundryError as error:
        return _ended(FAILED, str(error))
    except OSError as error:
        return _ended(REFUSED if error.errno in NAME_FAULTS else FAILED, _explain(error))
    except Exception as error:  # noqa: BLE001 - the last frame: every fault ends in a sentence and a code
        return _ended(FAILED, _explain(error))


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command in DRAWING:
        from .generate import run
    elif arguments.command == "inspect":
        from .inspect import run
    elif arguments.command == "convert":
        from .convert import run
    elif arguments.command == "plan":
        from .plan import run
    elif arguments.command == "prompts":
        from .prompts import run
    elif arguments.command == "demo":
        from .demo import run
    else:
        from .models import run
    code: int = run(arguments)
    return code


def _ended(code: int, sentence: str) -> int:
    if os.environ.get(DEBUG_VARIABLE) and sys.exc_info()[0] is not None:
        traceback.print_exc()
    fault(sentence)
    return code


def _explain(error: Exception) -> str:
    """A sentence for what nobody foresaw, and for a full device."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name} is missing; run `pip install -r requirements.txt` in the pack's folder"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the name, the folder, its permissions and its room"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "the device ran out of memory; ask for a smaller picture, use --dtype bf16, or free memory and try again"
    return f"unexpected {type(error).__name__}: {text or 'no message'}; set {DEBUG_VARIABLE}=1 to see where"


class _Parser(argparse.ArgumentParser):
    """Faults become one sentence, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m flux", description="FLUX from prompts and pictures to pictures, without ComfyUI.")
    parser.add_argument("--version", action="version", version=f"FLUX Foundry {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    adders: tuple[Callable[[argparse._SubParsersAction[_Parser]], None], ...] = (
        add_generate,
        add_fill,
        add_outpaint,
        add_control,
        add_redux,
        add_edit,
        add_inspect,
        add_convert,
        add_models,
        add_plan,
        add_prompts,
        add_demo,
    )
    for add in adders:
        add(commands)
    return parser
