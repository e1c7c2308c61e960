"""Textual Inversion: trains the embeddings of a new word, nothing else (Gal et al. 2022)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.checkpoints.embeddings import read_embeddings, write_embeddings
from library.families.base import EmbeddingTable
from library.methods.base import LossRecipe, ParameterGroup, Placement, TrainingMethod
from library.methods.caption_templates import object_captions, style_captions
from library.model_spec import TEXTUAL_INVERSION
from library.text.new_words import vector_words, with_all_words

logger = logging.getLogger(__name__)


class TrainedRows:
    """The rows of new words in one text encoder's token table. All its other rows stay what they are."""

    def __init__(self, table: EmbeddingTable, ids: Sequence[int], start: Tensor) -> None:
        """The consecutive `ids` begin with the embeddings `start` [k,d]."""
        table.set_rows(ids[0], start)
        self.name = table.name
        self.first, self.end = ids[0], ids[-1] + 1
        self.module: nn.Embedding = table.encoder.get_input_embeddings().requires_grad_(True)
        self._before = self.weight.detach()[: self.first].clone()
        self._after = self.weight.detach()[self.end :].clone()

    @property
    def weight(self) -> nn.Parameter:
        """The whole table [V,d]."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def values(self) -> Tensor:
        """The new rows [k,d], without their history."""
        return self.weight.detach()[self.first : self.end]

    def drop_other_gradients(self) -> None:
        """Optimizers see a gradient in the new rows only."""
        if self.weight.grad is not None:
            self.weight.grad[: self.first].zero_()
            self.weight.grad[self.end :].zero_()

    @torch.no_grad()
    def restore_others(self) -> None:
        """Undo what an optimizer did without a gradient (weight decay)."""
        self.weight[: self.first].copy_(self._before)
        self.weight[self.end :].copy_(self._after)


def random_rows(known: Tensor, count: int) -> Tensor:
    """New rows [count,d] that are distributed like the `known` [V,d]: mean and deviation of each dimension."""
    deviation, mean = torch.std_mean(known.float().cpu(), dim=0)
    return mean + deviation * torch.randn(count, len(mean))


class TextualInversion(TrainingMethod):
    """The new word `--token_string` stands for `--num_vectors_per_token` trained embeddings: word, word1, word2, ..."""

    tracker_name = "textual_inversion"

    tables: list[TrainedRows]  # after `attach`

    # --- before anything is loaded -------------------------------------------------------------------------
    def check_options(self) -> list[str]:
        """A kind of model that has token tables, and a fitting embedding file."""
        weights = self.options.textual_inversion.weights
        try:
            names = [table.name for table in self.family.embedding_tables()]
            if weights:
                self.starting_rows(weights, names)
        except (ValueError, OSError) as error:
            return [str(error)]
        return []

    def trained_text_encoders(self) -> list[bool]:
        """Every one: each has a token table of its own."""
        return [True] * len(self.family.text_encoder_names)

    @property
    def words(self) -> list[str]:
        """One word per vector."""
        chosen = self.options.textual_inversion
        return vector_words(str(chosen.token_string), chosen.num_vectors_per_token)

    @property
    def trained_words(self) -> list[str]:
        """The words whose embeddings are trained; word k starts as vector k modulo the number of vectors."""
        return self.words

    def prepare_text(self) -> None:
        """Adds the words to every tokenizer. Raises ValueError if one of them is known already.

        `--init_word` is read before: it may be the new word itself, and then means what it meant until now.
        """
        init_word, tables = self.options.textual_inversion.init_word, self.family.embedding_tables()
        self.init_ids = {table.name: table.tokenizer.text_ids(init_word) if init_word else [] for table in tables}
        self.trained_ids = {table.name: table.add_words(self.trained_words) for table in tables}

    @property
    def caption_replacements(self) -> Mapping[str, str | list[str]]:
        """The templates for whole captions; else, with several vectors, all words where the first one stands."""
        chosen, words = self.options.textual_inversion, " ".join(self.words)
        if chosen.use_object_template:
            return {"": list(object_captions(words))}
        if chosen.use_style_template:
            return {"": list(style_captions(words))}
        return {self.words[0]: words} if len(self.words) > 1 else {}

    def prompt_text(self, prompt: str) -> str:
        """A sample prompt with all words where the first one stands."""
        return with_all_words(prompt, self.words)

    # --- set-up --------------------------------------------------------------------------------------------
    def attach(self, placement: Placement) -> list[ParameterGroup]:
        """Longer token tables, of which only the new rows train; everything else is frozen."""
        options, family = self.options, self.family
        family.denoiser.to(placement.device)
        family.denoiser.train(options.training.gradient_checkpointing)  # recomputing only works in train mode
        if options.training.gradient_checkpointing:
            family.enable_gradient_checkpointing()
        tables = family.embedding_tables()
        for table in tables:
            table.encoder.requires_grad_(False)
            table.encoder.to(placement.device, placement.trained_dtype)
            table.encoder.train()
        start = self._start(tables)
        self.tables = [TrainedRows(table, self.trained_ids[table.name], start[table.name]) for table in tables]
        self.trainable = nn.ModuleDict({rows.name: rows.module for rows in self.tables})
        self.recipe = LossRecipe.from_options(options, family)
        return [ParameterGroup("embeddings", self.trained_parameters())]

    def _start(self, tables: Sequence[EmbeddingTable]) -> dict[str, Tensor]:
        """What the new rows [k,d] begin with, by table: `--weights`, else `--init_word`, else chance."""
        chosen = self.options.textual_inversion
        count = len(self.trained_words)
        saved = self.starting_rows(chosen.weights, [table.name for table in tables]) if chosen.weights else {}
        start = {}
        for table in tables:
            if table.name in saved:
                start[table.name] = saved[table.name]
                continue
            if saved:
                logger.warning("--weights %s has nothing for %s, which starts without it.", chosen.weights, table.name)
            known = table.encoder.get_input_embeddings().weight.detach()
            ids = self.init_ids[table.name]
            start[table.name] = self._rows_of(known, ids, count) if ids else random_rows(known, count)
        return start

    def _rows_of(self, known: Tensor, ids: Sequence[int], count: int) -> Tensor:
        """The embeddings of `ids` in turn for every vector of the word, and these again for every layer."""
        vectors = len(self.words)
        if len(ids) > 1 and len(ids) != vectors:
            logger.warning(
                "--init_word has %d tokens, there are %d vectors: its tokens are used in turn.", len(ids), vectors
            )
        return known[[ids[index % vectors % len(ids)] for index in range(count)]]

    def starting_rows(self, path: str, encoders: Sequence[str]) -> dict[str, Tensor]:
        """Encoder name -> rows [k,d] of an embedding file, one row per trained word."""
        saved = read_embeddings(path, encoders)
        for name, rows in saved.items():
            if len(rows) != len(self.words):
                raise ValueError(
                    f"--weights {path} has {len(rows)} vectors for {name}, --num_vectors_per_token asks for "
                    f"{len(self.words)}: the numbers must be equal."
                )
        return saved

    def trained_parameters(self) -> list[nn.Parameter]:
        """The whole token tables: clipping measures the gradient of all their rows."""
        return [rows.weight for rows in self.tables]

    # --- the step ------------------------------------------------------------------------------------------
    def before_optimizer_step(self) -> None:
        """Only the new rows keep a gradient."""
        for rows in self.tables:
            rows.drop_other_gradients()

    def after_step(self, *, synced: bool) -> Mapping[str, float]:
        """Only the new rows have changed."""
        if synced:
            for rows in self.tables:
                rows.restore_others()
        return {}

    # --- saving --------------------------------------------------------------------------------------------
    def save(
        self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str], counters: tuple[int, int] = (0, 0)
    ) -> None:
        """The new rows: `emb_params` [n,d], or with several text encoders one key for each."""
        write_embeddings(path, {rows.name: rows.values for rows in self.tables}, dtype=dtype, metadata=metadata)

    @property
    def file_extension(self) -> str:
        """`--save_model_as`; `.pt` by default."""
        return f".{self.options.saving.save_model_as or 'pt'}"

    def metadata(self) -> dict[str, Any]:
        """Only the modelspec."""
        return {"model_type": TEXTUAL_INVERSION}
