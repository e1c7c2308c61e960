"""Options for reading other options from a file."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class ConfigFileOptions:
    config_file: str | None = option("TOML file with options; the command line wins over it")
    output_config: bool = flag("write the options to --config_file and stop, without training")
