"""Similarity of answers and references: the cosine of their sentence embeddings, by a local model."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_instruct.errors import InputError, one_line, warn

FLAG = "--similarity_model"
NAME = "similarity"  # the figure's
BATCH_SIZE = 32  # texts embedded at once


class Similarity:
    """A model of sentence embeddings.

    Args:
        model: a SentenceTransformer.
        source: where it comes from, for errors.
        flag: what named it, for errors.
    """

    def __init__(self, model: Any, source: str, flag: str = FLAG) -> None:
        """Take the model."""
        self.model, self.source, self.flag = model, source, flag

    def embeddings(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts [texts, D].

        Raises:
            InputError: the model fails, or gives what is not finite.
        """
        what = f"{self.flag} {self.source}"
        bar = sys.stderr.isatty()
        try:
            vectors = self.model.encode(texts, batch_size=BATCH_SIZE, convert_to_numpy=True, show_progress_bar=bar)
        except Exception as error:  # of many types: it is any model
            raise InputError(f"{what} can't embed the texts ({one_line(error, 400)}): name another model") from error
        if not np.isfinite(vectors).all():
            raise InputError(f"{what} gives embeddings that are not finite: name another model")
        return np.asarray(vectors, dtype=float)

    def scores(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Return, for each answer, the cosine between it and the nearest of its references [A], from -1 to 1.

        An embedding of zeros, as a model may give for an empty text, has the cosine 0 with everything.

        Raises:
            InputError: the model fails.
        """
        texts = list(dict.fromkeys([*answers, *(text for alternatives in references for text in alternatives)]))
        self.warn_of_long(texts)
        vectors = self.embeddings(texts)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(lengths > 0, lengths, 1.0)
        row_of = {text: number for number, text in enumerate(texts)}
        return np.array(
            [
                max(float(vectors[row_of[answer]] @ vectors[row_of[reference]]) for reference in alternatives)
                for answer, alternatives in zip(answers, references, strict=True)
            ]
        )

    def warn_of_long(self, texts: Sequence[str]) -> None:
        """Say how many texts are longer than the model reads, where it says how long that is."""
        longest, tokenizer = getattr(self.model, "max_seq_length", None), getattr(self.model, "tokenizer", None)
        if not longest or not callable(tokenizer) or not texts:
            return
        num_long = sum(
            len(ids) > longest for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        )
        if num_long:
            what = f"more than the {longest:,} tokens that {self.flag} reads"
            warn(f"{num_long:,} of {len(texts):,} texts have {what}: cut")


def check_similarity_model(source: str, flag: str = FLAG) -> None:
    """Refuse a model of sentence embeddings that can't be loaded, as far as that is seen without loading it.

    Args:
        source: as in `load_similarity`.
        flag: what named it, for errors.

    Raises:
        InputError: the package is not installed, or the folder holds no such model.
    """
    what = f"{flag} {source}"
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InputError(f"{what} needs sentence-transformers: pip install '.[similarity]', or drop the flag")
    path = Path(source).expanduser()
    is_path = path.exists() or source.startswith((".", "/", "~"))
    if is_path and not (path / "modules.json").is_file():
        raise InputError(f"{what}: no model of sentence embeddings there (modules.json): name the folder of one")


def load_similarity(source: str, flag: str = FLAG) -> Similarity:
    """Load a model of sentence embeddings, from a folder or from the Hub's cache. Code that comes with it is not run.

    Args:
        source: a folder that sentence-transformers wrote, or a name on the Hub.
        flag: what named it, for errors.

    Raises:
        InputError: the package is not installed, or there is no such model.
    """
    check_similarity_model(source, flag)
    from open_instruct.quiet import silence_transformers

    silence_transformers()
    path = Path(source).expanduser()
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path) if path.is_dir() else source)
    except Exception as error:  # of many types: files, JSON, safetensors, the Hub
        raise InputError(f"{flag} {source} can't be loaded ({one_line(error, 400)}): name another model") from error
    return Similarity(model, source, flag)
