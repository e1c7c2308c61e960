"""Ready-made captions for Textual Inversion: what stands around a new word (Gal et al. 2022, appendix)."""

from __future__ import annotations

_OBJECT_OPENINGS = (
    "a photo of a", "a photo of the", "a photo of my", "the photo of a", "a photo of one",
    *(f"a photo of a {adjective}" for adjective in ("clean", "dirty", "nice", "cool", "small")),
    *(f"a photo of the {adjective}" for adjective in ("cool", "clean", "nice", "small", "weird", "large")),
    *(f"a {quality} photo of a" for quality in ("cropped", "close-up", "good")),
    *(f"a {quality} photo of the" for quality in ("cropped", "dark", "close-up", "bright", "good")),
    "a rendering of a", "a rendition of the", "a rendition of a",
)  # fmt: skip
_STYLE_PICTURES = (
    "a painting", "a rendering", "the painting", "a picture", "a rendition",
    *(
        f"a {adjective} painting"
        for adjective in (
            "cropped", "cropped", "clean", "dirty", "dark", "cool", "close-up", "close-up", "bright", "good", "nice",
            "small", "weird", "large",
        )
    ),
)  # fmt: skip


def object_captions(words: str) -> list[str]:
    """The 27 captions for a thing that is called `words`."""
    return [f"{opening} {words}" for opening in _OBJECT_OPENINGS]


def style_captions(words: str) -> list[str]:
    """The 19 captions for a style that is called `words`; two of them stand there twice, for twice the chance."""
    return [f"{picture} in the style of {words}" for picture in _STYLE_PICTURES]
