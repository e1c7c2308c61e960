"""A small CLIP byte-pair tokenizer for the demo's text encoder, written in the file format of the CLIP tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77

# Words that become one token each. The first group occurs in the training captions; the others are there so that
# ordinary prompts, new concepts and negative prompts do not fall apart into single letters.
WORDS = """
a an the one of on in with and at small big large little tiny huge left right top bottom middle centre
circle square triangle star shape thing figure object red yellow green cyan blue purple white grey gray black
background drawing picture photo image icon sign flat simple
sks heart ring cross moon sun arrow hexagon diamond ellipse cat dog house tree flower car bird face person man woman
girl boy hand orange pink brown beige gold silver dark light bright soft pale deep colour color coloured colored
style painting sketch art cartoon poster logo quality best worst low high blurry ugly bad good beautiful detailed
new old round sharp pointed pointy straight two three four five many no not without over under behind near between
is are this that my your it its to from for by as made
""".split()


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of CLIP's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in plain]
    return [chr(value) for value in plain] + [chr(256 + index) for index in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in spellings):
        pairs = Counter(pair for parts in spellings for pair in zip(parts, parts[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merge(parts, best) for parts in spellings]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and the two configuration files; start and end token have the last two ids."""
    folder.mkdir(parents=True, exist_ok=True)
    letters, merges = byte_letters(), learn_merges(WORDS)
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def special(content: str, normalized: bool) -> dict[str, object]:
        return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}

    names = {"bos_token": special(START, True), "eos_token": special(END, True),
             "unk_token": special(END, True), "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
    settings = {
        "add_prefix_space": False, "bos_token": START, "do_lower_case": True, "eos_token": END, "errors": "replace",
        "model_max_length": MAX_TOKENS, "pad_token": END, "tokenizer_class": "CLIPTokenizer", "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
