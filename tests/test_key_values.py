"""The reader of `key=value` arguments: what people and programs write, and what was meant by it."""

from __future__ import annotations

from typing import Any

import pytest

from library.options import make_options
from library.options.checks import check_options
from library.options.errors import UserError
from library.options.generation_checks import network_arguments
from library.options.key_values import read_literals, read_texts
from library.options.script import NETWORK_TRAINING
from networks import contract

PRODIGY = {"d_coef": 1, "weight_decay": 0.01, "betas": (0.9, 0.99), "decouple": True}


@pytest.mark.parametrize(
    "items",
    [
        ["d_coef=1", "weight_decay=0.01", "betas=0.9,0.99", "decouple=True"],
        ["d_coef=1,", "weight_decay=0.01,", "betas=0.9,0.99,", "decouple=true,"],
        ["d_coef=1 weight_decay=0.01 betas=0.9,0.99 decouple=True"],
        ["d_coef=1, weight_decay=0.01, betas=(0.9, 0.99), decouple=True"],
        ["d_coef = 1  weight_decay = 0.01\tbetas=0.9, 0.99 decouple=True"],
        ['"d_coef=1" "weight_decay=0.01" "betas=0.9,0.99" "decouple=True"'],
        ["'d_coef=1', 'weight_decay=0.01', 'betas=(0.9, 0.99)', 'decouple=True'"],
        ["d_coef=1 weight_decay=0.01", '"betas=0.9,0.99"', " ", "decouple=True"],
        ["d_coef=1", "d_coef=1", "weight_decay=1e-2", "betas=.9,.99", "decouple=TRUE"],
    ],
)
def test_optimizer_arguments_are_read_as_they_were_meant(items: list[str]) -> None:
    items = [item for item in items if item.strip()]
    assert read_literals(items, "--optimizer_args") == PRODIGY


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        ("scale_parameter=False,", {"scale_parameter": False}),
        ("betas=[0.9, 0.99]", {"betas": [0.9, 0.99]}),
        ("betas=(0.9,)", {"betas": (0.9,)}),
        ("a='x, b=1' b=2", {"a": "x, b=1", "b": 2}),
        ("step_rules='1:10,0.1:20,0.01'", {"step_rules": "1:10,0.1:20,0.01"}),
        ("a={'b': 1, 'c': 2} d=none", {"a": {"b": 1, "c": 2}, "d": None}),
    ],
)
def test_values_with_commas_and_blanks_stay_whole(item: str, wanted: dict[str, Any]) -> None:
    assert read_literals([item], "--optimizer_args") == wanted


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        (["conv_dim=4,", "conv_alpha=1,"], {"conv_dim": "4", "conv_alpha": "1"}),
        (["conv_dim=4 conv_alpha=1"], {"conv_dim": "4", "conv_alpha": "1"}),
        (['"conv_dim=4" "conv_alpha=1"'], {"conv_dim": "4", "conv_alpha": "1"}),
        (["preset='my folder/full.toml' algo=lokr"], {"preset": "my folder/full.toml", "algo": "lokr"}),
        (["preset=my folder/full.toml"], {"preset": "my folder/full.toml"}),
        (["dims=a.*=4, single=8 algo=x"], {"dims": "a.*=4, single=8", "algo": "x"}),
        (["block_dims=2,2,2"], {"block_dims": "2,2,2"}),
    ],
)
def test_network_arguments_are_texts(items: list[str], wanted: dict[str, str]) -> None:
    assert read_texts(items, "--network_args") == wanted
    assert contract.parse_network_args(items) == wanted
    assert network_arguments(";".join(items)) == wanted


@pytest.mark.parametrize("items", [["a"], ["=1"], ['"a=1'], ["'a=1' b"], ["a=1", "a=2"], ["a b=1"]])
def test_what_cannot_be_meant_is_named(items: list[str]) -> None:
    for read in (read_texts, read_literals):
        with pytest.raises(UserError, match="^--some_args: ") as error:
            read(items, "--some_args")
        assert repr(items[-1]) in str(error.value)


def test_bad_arguments_are_found_with_the_options() -> None:
    options = make_options(
        optimizer_args=["a=1", "weight_decay=abc"], lr_scheduler_args=["x"], network_args=["b=1", "b=2"]
    )
    found = [text for text in check_options(options, NETWORK_TRAINING).problems if "_args" in text]
    assert [text.split(":")[0] for text in found] == ["--network_args", "--optimizer_args", "--lr_scheduler_args"]
    assert "'weight_decay=abc'" in found[1]
