"""Dynamic groups of prompt lines: `{a|b}` draws a variant, `{e$$a|b}` makes one prompt per variant."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from library.generation.request import PromptSyntaxError

MAX_PROMPTS = 10_000  # that one line may enumerate
MAX_DEPTH = 20  # of groups within groups
SEPARATOR = ", "

_BRACE = re.compile(r"\\[{}]|[{}\n]")
_SPECIAL = re.compile(r"\\[{}]|[{|]")
_PREFIX = re.compile(r"(?:(?P<enumerate>[eE])\$\$)?(?:(?P<count>[0-9-]+)\$\$)?")


@dataclass(frozen=True)
class Group:
    """`{...}`: from `low` to `high` of the variants, joined by `separator`."""

    source: str
    is_enumerated: bool
    low: int
    high: int
    separator: str
    variants: tuple[Text, ...]


Text = tuple[str | Group, ...]  # plain text and groups, in order


@dataclass(frozen=True)
class DynamicLine:
    """A line with its groups. `count` prompts come of one expansion; more than one only by enumeration."""

    text: Text
    count: int
    has_groups: bool
    is_enumerated: bool
    warnings: tuple[str, ...] = ()

    def expand(self, generator: random.Random) -> Iterator[str]:
        """The prompts of the enumerated groups, the last group fastest; every other group is drawn for each prompt.

        All draws of all levels come from `generator`, in the order of the text.
        """
        for text in _enumerate(self.text):
            yield _draw(text, generator)


def parse_groups(line: str) -> DynamicLine:
    """The groups of a line: `{` [`e$$`] [count`$$`] [separator`$$`] variant `|` variant ... `}`, nested at will.

    `\\{` and `\\}` are literal braces; so are `{}` and braces without partner on their line of text. A count is `n` or
    `n-m`, in any order, clamped to the number of variants. Raises PromptSyntaxError that names the group for a range
    with a number missing, for groups nested deeper than MAX_DEPTH and for more than MAX_PROMPTS prompts.
    """
    parser = _Parser(line)
    (text,) = parser.variants(0, len(line), depth=0)
    count = _count(text)
    if count > MAX_PROMPTS:
        first = next(group for group in parser.groups if group.is_enumerated)
        raise PromptSyntaxError(
            f"the group '{first.source}' and the other enumerated groups of the line make more than "
            f"{MAX_PROMPTS} prompts"
        )
    is_enumerated = any(group.is_enumerated for group in parser.groups)
    return DynamicLine(text, count, bool(parser.groups), is_enumerated, tuple(parser.warnings))


# --- reading --------------------------------------------------------------------------------------------------


class _Parser:
    """Reads one line; `groups` are those found so far, inner ones before the outer one."""

    def __init__(self, line: str) -> None:
        self._line = line
        self._ends = _partners(line)
        self.groups: list[Group] = []
        self.warnings: list[str] = []

    def variants(self, start: int, end: int, *, depth: int) -> tuple[Text, ...]:
        """line[start:end], split at the `|` of this level (there are none at depth 0)."""
        found: list[list[str | Group]] = [[]]
        while start < end:
            match = _SPECIAL.search(self._line, start, end)
            stop = match.start() if match else end
            if stop > start:
                found[-1].append(self._line[start:stop])
            if match is None:
                break
            start = match.end()
            if match[0] == "|" and depth:
                found.append([])
            elif match[0] == "{" and stop in self._ends:
                found[-1].append(self._group(start, self._ends[stop], depth=depth + 1))
                start = self._ends[stop] + 1
            else:
                found[-1].append(match[0].removeprefix("\\"))
        return tuple(tuple(parts) for parts in found)

    def _group(self, start: int, end: int, *, depth: int) -> Group:
        source = self._line[start - 1 : end + 1]
        if depth > MAX_DEPTH:
            raise PromptSyntaxError(f"the group '{source}' stands inside of more than {MAX_DEPTH} others")
        head = self._line[start : self._end_of_head(start, end)]
        prefix = _PREFIX.match(head)
        assert prefix is not None, "the pattern matches everything: each of its parts may be missing"
        separator, length = _separator(head, prefix.end(), has_count=prefix["count"] is not None)
        variants = self.variants(start + length, end, depth=depth)
        low, high = self._bounds(prefix["count"] or "1", len(variants), source)
        group = Group(source, prefix["enumerate"] is not None, low, high, separator, variants)
        self.groups.append(group)
        return group

    def _bounds(self, count: str, variants: int, source: str) -> tuple[int, int]:
        """`n` or `n-m` -> smallest and largest number of items."""
        numbers = count.split("-")
        if len(numbers) > 2:
            self.warnings.append(f"the group '{source}': '{count}' is no range n-m; one item is taken")
            return 1, 1
        if not all(numbers):
            raise PromptSyntaxError(f"the group '{source}': the range '{count}' needs a number before and after '-'")
        low, high = sorted(_clamped(number, variants) for number in (numbers[0], numbers[-1]))
        return low, high

    def _end_of_head(self, start: int, end: int) -> int:
        """Where the first variant surely has begun: at the first `|` or inner group."""
        for match in _SPECIAL.finditer(self._line, start, end):
            if match[0] == "|" or (match[0] == "{" and match.start() in self._ends):
                return match.start()
        return end


def _partners(line: str) -> dict[int, int]:
    """Positions of opening braces -> positions of their closing braces, for those that make a group."""
    ends: dict[int, int] = {}
    open_braces: list[int] = []
    for match in _BRACE.finditer(line):
        if match[0] == "{":
            open_braces.append(match.start())
        elif match[0] == "\n":
            open_braces.clear()
        elif match[0] == "}" and open_braces:
            start = open_braces.pop()
            if match.start() > start + 1:
                ends[start] = match.start()
    return ends


def _separator(head: str, position: int, *, has_count: bool) -> tuple[str, int]:
    """The separator that stands at `position` (an empty one needs a count before it), and where the variants begin."""
    stop = head.find("$$", position)
    if stop > position or (stop == position and has_count):
        return re.sub(r"\\([{}])", r"\1", head[position:stop]), stop + 2
    return SEPARATOR, position


def _clamped(digits: str, largest: int) -> int:
    significant = digits.lstrip("0")
    return largest if len(significant) > 9 else min(int(significant or "0"), largest)


# --- expanding ------------------------------------------------------------------------------------------------


def _count(text: Text) -> int:
    """How many prompts enumeration makes of `text`; anything above MAX_PROMPTS may be MAX_PROMPTS + 1."""
    total = 1
    for part in text:
        if isinstance(part, Group):
            total = min(total * _count_group(part), MAX_PROMPTS + 1)
    return total


def _count_group(group: Group) -> int:
    counts = [_count(variant) for variant in group.variants]
    if not group.is_enumerated:
        return min(math.prod(counts), MAX_PROMPTS + 1)
    total = 0
    for size in range(group.low, group.high + 1):
        total += math.comb(len(counts), size)
        if total > MAX_PROMPTS:
            return MAX_PROMPTS + 1
    if max(counts) == 1:
        return total
    # elementary symmetric polynomials of the counts: ways[k] prompts take k variants, for all k that still matter
    ways = [1] + [0] * group.high
    for used, count in enumerate(counts, 1):
        for size in range(min(group.high, used), max(0, group.low - len(counts) + used - 1), -1):
            ways[size] = min(ways[size] + ways[size - 1] * count, MAX_PROMPTS + 1)
    return min(sum(ways[group.low :]), MAX_PROMPTS + 1)


def _enumerate(text: Text) -> Iterator[Text]:
    """All texts without enumerated groups."""
    choices = [[(part,)] if isinstance(part, str) else list(_alternatives(part)) for part in text]
    for chosen in itertools.product(*choices):
        yield tuple(itertools.chain.from_iterable(chosen))


def _alternatives(group: Group) -> Iterator[Text]:
    if not group.is_enumerated:
        for variants in itertools.product(*(list(_enumerate(variant)) for variant in group.variants)):
            yield (replace(group, variants=variants),)
        return
    for size in range(group.low, group.high + 1):
        for chosen in itertools.combinations(group.variants, size):
            for texts in itertools.product(*(list(_enumerate(variant)) for variant in chosen)):
                yield _joined(texts, group.separator)


def _joined(texts: Sequence[Text], separator: str) -> Text:
    parts: list[str | Group] = []
    for index, text in enumerate(texts):
        parts += [separator, *text] if index else text
    return tuple(parts)


def _draw(text: Text, generator: random.Random) -> str:
    return "".join(part if isinstance(part, str) else _draw_group(part, generator) for part in text)


def _draw_group(group: Group, generator: random.Random) -> str:
    chosen = generator.sample(group.variants, generator.randint(group.low, group.high))
    return group.separator.join(_draw(variant, generator) for variant in chosen)
