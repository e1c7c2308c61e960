"""Messages of the scripts: where they go, how they look, and warnings that are given once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from library.options.console import ConsoleOptions

_warned: set[str] = set()


def set_up(options: ConsoleOptions) -> None:
    """Send messages of every library to standard error, to `--console_log_file`, or plainly to standard output.

    Of several processes only the first shows more than errors. Replaces an earlier set-up. Raises OSError if the
    file cannot be written.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "is_ours", False):
            root.removeHandler(handler)
            handler.close()
    handler = _make_handler(options)
    handler.is_ours = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    is_first = os.environ.get("RANK", "0") == "0"
    root.setLevel(options.console_log_level or "INFO" if is_first else "ERROR")
    for name in ("httpx", "httpcore", "filelock", "PIL", "matplotlib"):  # their INFO and DEBUG drown ours
        logging.getLogger(name).setLevel(logging.WARNING)
    # warns at import about a kernel for 4-bit weights on CPUs, which nothing here uses
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _make_handler(options: ConsoleOptions) -> logging.Handler:
    if options.console_log_file:
        handler: logging.Handler = logging.FileHandler(options.console_log_file, mode="w", encoding="utf-8")
    else:
        handler = logging.StreamHandler(sys.stdout if options.console_log_simple else sys.stderr)
    bare = options.console_log_simple and not options.console_log_file
    pattern = "%(message)s" if bare else "%(asctime)s %(levelname)-8s %(message)s"
    handler.setFormatter(logging.Formatter(pattern, datefmt="%Y-%m-%d %H:%M:%S"))
    return handler


@contextmanager
def kept_warnings() -> Iterator[list[str]]:
    """The texts of the warnings that are given inside, which nobody sees."""
    texts: list[str] = []
    root = logging.getLogger()
    keeper = logging.Handler()
    keeper.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    keeper.setLevel(logging.WARNING)
    handlers, root.handlers = root.handlers, [keeper]
    try:
        yield texts
    finally:
        root.handlers = handlers


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning unless this process has logged the same one before."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
