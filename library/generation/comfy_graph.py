"""Prompts in ComfyUI's graphs: from the sampler of a graph back to the texts that lead to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MAX_LINKS = 50  # that are followed from a sampler to a text
_TEXT_INPUTS = ("text", "text_g", "text_l", "t5xxl", "clip_l", "string", "value", "prompt")
_PLAIN_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_CUSTOM_SAMPLERS = ("SamplerCustomAdvanced",)

Graph = Mapping[str, Mapping[str, Any]]


def read_graph(text: str) -> Graph | None:
    """The nodes of a graph in API form, or None if `text` is something else (a prompt, a workflow of the editor)."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(graph, dict) or not graph:
        return None
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict) and "class_type" in node}
    return nodes if len(nodes) == len(graph) else None


def settings_of(graph: Graph) -> dict[str, Any] | None:
    """What one sampler of the graph draws: "prompt", "negative", and what is plain of seed, steps, cfg, sampler_name.

    None if the graph has no sampler or its text cannot be told: two samplers with different prompts, or nodes between
    text and sampler that join texts.
    """
    found = []
    for key, node in graph.items():
        kind = node["class_type"]
        if kind in _PLAIN_SAMPLERS:
            found.append((key, _of_plain_sampler(graph, node)))
        elif kind in _CUSTOM_SAMPLERS:
            found.append((key, _of_custom_sampler(graph, node)))
    if not found or any(settings["prompt"] is None for _, settings in found):
        return None
    if len({(settings["prompt"], settings["negative"]) for _, settings in found}) > 1:
        return None
    return next((settings for _, settings in found if settings.pop("begins")), found[0][1])


def _of_plain_sampler(graph: Graph, node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = _inputs(node)
    seed = "seed" if "seed" in inputs else "noise_seed"
    return {
        "prompt": _text(graph, inputs.get("positive")),
        "negative": _text(graph, inputs.get("negative")),
        "seed": _number(graph, inputs.get(seed)),
        "steps": _number(graph, inputs.get("steps")),
        "cfg": _number(graph, inputs.get("cfg")),
        "sampler_name": inputs.get("sampler_name"),
        "begins": _begins(graph, inputs.get("latent_image")),
    }


def _of_custom_sampler(graph: Graph, node: Mapping[str, Any]) -> dict[str, Any]:
    inputs = _inputs(node)
    guider, noise, sampler, sigmas = (
        _inputs(_node(graph, inputs.get(name))) for name in ("guider", "noise", "sampler", "sigmas")
    )
    return {
        "prompt": _text(graph, guider.get("positive", guider.get("conditioning"))),
        "negative": _text(graph, guider.get("negative")),
        "seed": _number(graph, noise.get("noise_seed")),
        "steps": _number(graph, sigmas.get("steps")),
        "cfg": _number(graph, guider.get("cfg", 1.0)),
        "sampler_name": sampler.get("sampler_name"),
        "begins": _begins(graph, inputs.get("latent_image")),
    }


def _begins(graph: Graph, link: Any) -> bool:
    """Whether a sampler starts from an empty picture."""
    return str(_node(graph, link).get("class_type", "")).startswith("Empty")


def _text(graph: Graph, link: Any) -> str | None:
    """The one text that a conditioning comes from; None if there is none or there are several."""
    for _ in range(_MAX_LINKS):
        node = _node(graph, link)
        if node.get("class_type") == "ConditioningZeroOut":
            return ""
        inputs = _inputs(node)
        texts = {_string(graph, inputs[name]) for name in _TEXT_INPUTS if name in inputs}
        if texts:
            return texts.pop() if len(texts) == 1 else None
        links = [name for name, value in inputs.items() if name.startswith(("conditioning", "positive", "negative"))]
        if len(links) != 1:
            return None
        link = inputs[links[0]]
    return None


def _string(graph: Graph, value: Any) -> str | None:
    """A text, or the text of the node that a link names."""
    for _ in range(_MAX_LINKS):
        if isinstance(value, str):
            return value
        inputs = _inputs(_node(graph, value))
        given = [inputs[name] for name in _TEXT_INPUTS if name in inputs]
        if len(given) != 1:
            return None
        value = given[0]
    return None


def _number(graph: Graph, value: Any) -> Any:
    """A number, or the only number of the node that a link names."""
    if isinstance(value, list):
        inputs = _inputs(_node(graph, value))
        numbers = [one for one in inputs.values() if isinstance(one, int | float) and not isinstance(one, bool)]
        return numbers[0] if len(numbers) == 1 else None
    return value


def _node(graph: Graph, link: Any) -> Mapping[str, Any]:
    """The node that a link ["key", output] names; an empty one if it is no link."""
    if isinstance(link, list) and len(link) == 2:
        return graph.get(str(link[0]), {})
    return {}


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}
