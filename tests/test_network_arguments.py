"""Network arguments: how their text is read, and what is said about values that cannot be."""

from __future__ import annotations

import pytest

from networks.arguments import NetworkArguments, argument_problems, checked_rank

READERS = ("integer", "number", "probability", "flag", "text", "integers", "numbers")


@pytest.mark.parametrize(("reader", "value", "expected"), [
    ("integer", "4", 4), ("integer", 4, 4), ("number", "1e-2", 0.01), ("number", 3, 3.0),
    ("probability", "0", 0.0), ("probability", "0.99", 0.99), ("text", "a,b", "a,b"), ("text", 3, "3"),
    ("flag", "True", True), ("flag", " YES ", True), ("flag", "1", True), ("flag", True, True),
    ("flag", "false", False), ("flag", "No", False), ("flag", "0", False), ("flag", False, False),
    ("integers", "1,2", [1, 2]), ("integers", [1, 2], [1, 2]),
    ("numbers", "1,.5", [1.0, 0.5]), ("numbers", (1,), [1.0]),
])  # fmt: skip
def test_values_are_text_or_numbers(reader: str, value: object, expected: object) -> None:
    read = getattr(NetworkArguments({"a": value}, "net"), reader)("a")
    assert read == expected and type(read) is type(expected)


def test_what_is_absent_is_its_default() -> None:
    for arguments in (NetworkArguments({}, "net"), NetworkArguments(dict.fromkeys("a"), "net")):
        assert [getattr(arguments, reader)("a") for reader in READERS] == [None, None, None, False, None, None, None]
        assert (arguments.integer("a", 3), arguments.number("a", 0.5)) == (3, 0.5)
        assert arguments.flag("a", default=True) is True
        assert arguments.select("a") == {}


@pytest.mark.parametrize(("reader", "value", "said"), [
    ("integer", "4.5", "a=4.5: expected a whole number"), ("number", "x", "a=x: expected a number"),
    ("number", "nan", "a=nan: expected a number"), ("probability", "inf", "a=inf: expected a number"),
    ("probability", "-0.1", "a is -0.1; a dropout probability lies between 0 and 1"),
    ("probability", "1.1", "a is 1.1; a dropout probability lies between 0 and 1"),
    ("probability", "1", "a=1 drops everything"), ("flag", "maybe", "a=maybe: expected true or false"),
    ("integers", "1,x", "a=1,x: expected whole numbers separated by commas"),
    ("numbers", "1,inf", "a=1,inf: expected numbers separated by commas"),
])  # fmt: skip
def test_values_that_cannot_be_read_are_named(reader: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^network argument {said}"):
        getattr(NetworkArguments({"a": value}, "net"), reader)("a")


def test_only_what_was_asked_for_is_known(caplog: pytest.LogCaptureFixture) -> None:
    arguments = NetworkArguments({"rank": "1", "late": "2", "dropout": 0.1}, "net")
    arguments.integer("rank")
    arguments.select("early", "list")
    assert arguments.known == {"rank", "early", "list"}
    with pytest.raises(ValueError, match="network argument late is unknown to net; .*Known: early, list, rank"):
        arguments.refuse_unknown()
    arguments.ignore("late", "later", reason="because")
    assert "net: no effect of the network arguments late: because" in caplog.text
    arguments.refuse_unknown()
    assert "ignores" not in caplog.text, "trainers pass dropout as a number, for other networks"
    NetworkArguments({"dropout": "0.1"}, "net").refuse_unknown()
    assert "net ignores the network argument dropout" in caplog.text


def test_all_problems_are_said_and_those_of_several_together_only_without_others() -> None:
    def read(arguments: NetworkArguments) -> None:
        a, b = arguments.integer("a"), arguments.integer("b")
        if a and b and a > b:
            raise ValueError("network argument a is more than b.")

    assert argument_problems(read, {"a": "1", "b": "2"}, "net") == []
    assert argument_problems(read, {"a": "2", "b": "1"}, "net") == ["--network_args: a is more than b."]
    assert argument_problems(read, {"a": "x", "b": "y"}, "net") == [
        "--network_args: a=x: expected a whole number.", "--network_args: b=y: expected a whole number.",
    ]  # fmt: skip


def test_a_rank_is_not_negative() -> None:
    assert [checked_rank(rank, "--network_dim") for rank in (0, 4)] == [0, 4]
    with pytest.raises(ValueError, match="--network_dim is -1"):
        checked_rank(-1, "--network_dim")
