"""Options for what a script writes to the console."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class ConsoleOptions:
    console_log_level: str | None = option(
        "least important level of messages that is shown (default: INFO)",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: str | None = option("write messages to this file instead of the console; it is overwritten")
    console_log_simple: bool = flag("write bare messages to standard output, without time and level")
