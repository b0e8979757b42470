"""What calibration may be given: texts, chats, data sets, token batches, paths.

Legend: `B` batch, `T` tokens.
"""

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from kvsplice_hf.calibration.collect import Batch, has_images
from kvsplice_hf.calibration.items import ACCEPTED
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.calibration.pieces import PieceReader
from kvsplice_hf.calibration.tokens import FEWEST_TOKENS
from kvsplice_hf.errors import CalibrationError, ConfigError
from kvsplice_hf.text import SOURCES, cut_windows, spread_evenly, token_ids, tokenizer_of


WINDOW = 512
_TEXT = Media()


def as_batches(data: Any, tokenizer: Any, max_tokens: int, window: int = WINDOW, media: Media = _TEXT) -> list[Batch]:
    """About `max_tokens` tokens of `data`, at most, as batches.

    Args:
        data: a text of any length; the name of a source (`kvsplice_hf.text`), or the path of a file or folder, where
            a `Path` is always a path; token ids [B, T] or [T]; a mapping with `input_ids` and perhaps `attention_mask`
            (what a tokenizer returns), with texts under "text" or "content", or with a chat under "messages" or
            "conversations"; a chat, that is a list of messages; or many of these: a list, a generator, a `DataLoader`,
            a data set of `datasets` or a column of one, a table of pandas. Of several splits "train" is taken. Rows
            that are empty or None are skipped.
        tokenizer: needed for everything but tokens; a processor's is used. Chats go through its chat template.
        max_tokens: texts are cut into windows, and those taken are spread evenly over them; so are the rows of a batch
            that has more, and token sequences that are longer.
        window: tokens per sequence of texts.
        media: what the model takes beside text; mappings of tokens may hold it as well (what a processor returns).

    Raises:
        CalibrationError: the data cannot be read as any of these, or hold too few tokens; placeholders of images come
            without images, or a batch with images is larger than `max_tokens`.
        ConfigError: a tokenizer is needed and there is none, or no file is where a path leads.
    """
    texts: list[str] = []
    batches: list[Batch] = []
    rows = total = 0
    for piece in PieceReader(tokenizer, max_tokens, media).pieces_of_all(data):
        rows += 1
        if isinstance(piece, str):
            texts.append(piece)
        elif piece is not None:
            batches.append(piece)
            total += piece["input_ids"].numel()
        if total >= max_tokens:
            break
    if texts and batches:
        raise CalibrationError("The calibration data hold both texts and token ids. Give one of the two.")
    if batches:
        return [part for batch in map(media.checked, batches) for part in _within(batch, max_tokens, window)]
    if not texts:
        found = f": of {rows} rows none holds a text, or two tokens" if rows else ""
        raise CalibrationError(f"The calibration data are empty{found}. Give {ACCEPTED}.")
    return [media.checked(batch) for batch in _text_batches(texts, tokenizer_of(tokenizer), max_tokens, window)]


def share_of_process(batches: Sequence[Batch], rank: int, world_size: int) -> list[Batch]:
    """The batches that process `rank` of `world_size` takes."""
    return list(batches[rank::world_size])


def _within(batch: Batch, max_tokens: int, window: int) -> list[Batch]:
    """A batch as it is, or as much of it as `max_tokens`: rows, or windows of longer rows, spread evenly over it."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.numel() <= max_tokens:
        return [batch]
    if has_images(batch):  # which of its tensors belong to which row only the model knows
        raise CalibrationError(
            f"A calibration batch with images has {ids.numel()} tokens, more than `max_tokens` = {max_tokens}, and "
            "cannot be cut. Give batches of fewer sequences, or a higher `max_tokens`."
        )
    if ids.shape[1] <= max_tokens:
        return [{name: spread_evenly(tensor, max_tokens // ids.shape[1]) for name, tensor in batch.items()}]
    real = ids.flatten() if mask is None else ids[mask.bool()]
    windows = cut_windows(real, min(window, len(real)))
    return [{"input_ids": row[None]} for row in spread_evenly(windows, max(1, max_tokens // window))]


def _text_batches(texts: Sequence[str], tokenizer: Any, max_tokens: int, window: int) -> list[Batch]:
    if window < 2:
        raise ConfigError(f"`window` is {window}; a window needs two tokens at least.")
    ids = token_ids(tokenizer, texts)
    needed = min(window, FEWEST_TOKENS)
    if len(ids) < needed:
        is_word = len(texts) == 1 and not any(map(str.isspace, texts[0]))
        instead = f", the path of a file that is there, or one of {', '.join(SOURCES)}" if is_word else ""
        raise CalibrationError(
            f"The calibration text {shorten(' ... '.join(texts), 80)!r} has {len(ids)} tokens; {needed} are needed at "
            f"least, and 8,000 to 20,000 to be good. Give more text{instead}."
        )
    if len(ids) < window:  # short text is better than none
        return [{"input_ids": ids[None]}]
    return [{"input_ids": row[None]} for row in spread_evenly(cut_windows(ids, window), max(1, max_tokens // window))]
