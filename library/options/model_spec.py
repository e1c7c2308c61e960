"""Options for the `modelspec.*` entries in saved files."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option


@dataclass(frozen=True)
class ModelSpecOptions:
    metadata_title: str | None = option("title stored in the file (default: the output name)")
    metadata_author: str | None = option("author stored in the file")
    metadata_description: str | None = option("description stored in the file")
    metadata_license: str | None = option("license stored in the file")
    metadata_tags: str | None = option("tags stored in the file, separated by commas")
    metadata_usage_hint: str | None = option("advice on how to use the model, stored in the file")
    metadata_thumbnail: str | None = option("preview picture as a data URL or a path, stored in the file")
    metadata_merged_from: str | None = option("names of the models that this one was merged from")
    metadata_trigger_phrase: str | None = option("words that call up what was trained")
    metadata_preprocessor: str | None = option("preprocessing that a conditioning image needs")
    metadata_is_negative_embedding: str | None = option("`true` if the embedding is meant for negative prompts")
