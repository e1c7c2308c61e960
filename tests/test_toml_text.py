"""TOML that people write by hand: the line that is wrong, what is wrong with it, and how to write it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import train_network
from library import launch
from library.config_util import ConfigError, SupportedKinds, load_data_config
from library.generation.prompt_file import read_prompt_file
from library.options.errors import UserError
from library.options.toml_text import decoded, parsed

PLACES = ("config", "dataset", "prompts")


def message_of(place: str, content: bytes, folder: Path) -> str:
    """What is said about a file with this content, given as the config, dataset or prompt file."""
    path = folder / f"{place}.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        if place == "config":
            launch.read_command_line(train_network.SCRIPT, ["--config_file", str(path)])
        elif place == "dataset":
            load_data_config(SimpleNamespace(dataset_config=path), SupportedKinds(), bucket_step=1)
        else:
            read_prompt_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (r'image_dir = "C:\Users\me"', r"single quotes, 'C:\Users\me'"),
        (r'image_dir = "D:\photos"', "write the path with /"),
        ("flip_aug = True", "true and false in small letters"),
        ("vae = None", "leave the line out"),
        ("seed =", "the value is missing"),
        ("output_name = my lora", "a text needs quotes around it"),
        ("output_name: 'x'", "write = between a key and its value"),
        ('output_name = "x', "the quote at the end is missing"),
    ],
)
def test_a_wrong_line_is_shown_with_its_number_and_what_to_write(
    place: str, line: str, advice: str, tmp_path: Path
) -> None:
    message = message_of(place, f"[general]\n\n{line}\n".encode(), tmp_path)
    assert f"line 3: {line}: " in message and advice in message


@pytest.mark.parametrize("place", PLACES)
def test_another_encoding_is_named(place: str, tmp_path: Path) -> None:
    text = "a = 1\nb = 'Café'\n"
    assert "UTF-16 text; save it as UTF-8" in message_of(place, text.encode("utf-16"), tmp_path)
    assert "UTF-16 text; save it as UTF-8" in message_of(place, text.encode("utf-16-le"), tmp_path)
    assert "line 2: the file is not UTF-8" in message_of(place, text.encode("cp1252"), tmp_path)
    assert "b = 'Café'" in message_of(place, text.encode("cp1252"), tmp_path)


@pytest.mark.parametrize("value", [r'"C:\new\train"', r'"C:\train"', r'["D:\a b", "E:\tmp"]'])
def test_a_backslash_that_made_another_letter_is_found(value: str) -> None:
    with pytest.raises(ValueError, match="backslash"):
        parsed(f"image_dir = {value}\n")


def test_what_is_right_is_read() -> None:
    text = 'a = \'C:\\new\'\nb = "C:\\\\new"\nc = """two\nlines"""\n'
    assert parsed(text) == {"a": "C:\\new", "b": "C:\\new", "c": "two\nlines"}
    assert decoded("\ufeffä".encode()) == "ä"


def test_a_dataset_file_and_a_file_of_options_are_not_mixed_up(tmp_path: Path) -> None:
    data, options = b'[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"\n', b"seed = 1\n"
    assert "is a dataset file ([[datasets]]): give it as --dataset_config" in message_of("config", data, tmp_path)
    message = message_of("dataset", options, tmp_path)
    assert "holds options (seed): give it as --config_file" in message
    assert "give it as --config_file" in message_of("dataset", b"[model]\nvae = 'x'\n[a]\nseed = 1\n", tmp_path)


def test_an_option_among_the_keys_of_a_dataset_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.toml"
    subset = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\n"
    path.write_text(f"[general]\nresolution = 64\nnetwork_dim = 4\n{subset}", "utf-8")
    with pytest.raises(ConfigError, match="network_dim.*an option of the command line and of --config_file"):
        load_data_config(SimpleNamespace(dataset_config=path), SupportedKinds(), bucket_step=1)
    assert issubclass(ConfigError, UserError)
