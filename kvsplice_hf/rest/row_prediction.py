"""`RowPrediction`: what makes the file of a cache smaller, `save_cache(..., compress="layers")`; fitted, kept, applied.

It belongs to the splices of one model, whose rows it predicts from one another (`prediction`), and is kept in a file
of its own: fitted once, it serves all caches of the model.

Legend: `B` sequences, `S` tokens in the cache, `T` = B S tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kvsplice_hf.code.codec import RowCodec
from kvsplice_hf.code.heads import HeadSplices
from kvsplice_hf.errors import CacheMismatchError, ConfigError, UnsupportedError
from kvsplice_hf.patch.state import is_patched, patched_sites
from kvsplice_hf.rest.ans import Numbers, Reader, damaged
from kvsplice_hf.rest.prediction import (
    AHEAD,
    BEHIND,
    GAINS,
    LEVEL_BITS,
    Columns,
    LayerPrediction,
    Passage,
    read_layer,
    write_layers,
)
from kvsplice_hf.rest.row_levels import Group, groups_of, levels_of, packed_rows


# Tokens that are written together: what is known along the way of so many is held in memory.
BLOCK = 4096
_TOKEN_SPREAD = 28.0
_FINE = 2.0**20
_LARGEST = 2.0**24
# A gain is a byte, 16 to an octave (`code.codec`).
_GAIN_LEVELS = (np.arange(256, dtype=np.int64) - 128) << (LEVEL_BITS - 4)
Streams: TypeAlias = dict[str, NDArray[Any]]


class RowsOfLayer:
    """The rows of a layer as levels, and back.

    Args:
        codecs: of its key heads, or of its latent.
        tables: levels of each width, whole numbers.
    """

    def __init__(self, codecs: Sequence[RowCodec], tables: Mapping[int, Numbers]) -> None:
        self.codecs = list(codecs)
        self.sizes = [codec.row_bytes for codec in codecs]
        self.raw_bytes = sum(2 * len(codec._raw) for codec in codecs)
        self._groups: list[dict[str, Group]] = [
            dict(zip((BEHIND, AHEAD), groups_of(codec), strict=True)) for codec in codecs
        ]
        self.columns = {
            GAINS: self._gain_columns(),
            **{kind: self._columns(kind, tables) for kind in (BEHIND, AHEAD)},
        }

    def _gain_columns(self) -> Columns:
        count = sum(codec.gain_bytes for codec in self.codecs)
        each = np.arange(count, dtype=np.int64)
        chains = [(place, place + 1, 0) for place in range(count)]
        return Columns([_GAIN_LEVELS] * count, [1] * count, chains, each, np.full(count, -1, dtype=np.int64))

    def _columns(self, kind: str, tables: Mapping[int, Numbers]) -> Columns:
        levels: list[Numbers] = []
        steps: list[int] = []
        chains, heads, gains, first_gain = [], [], [], 0
        for head, (codec, groups) in enumerate(zip(self.codecs, self._groups, strict=True)):
            group = groups[kind]
            chains.append((len(levels), len(levels) + len(group.widths), group.chain))
            levels += [tables[width] for width in group.widths]
            steps += group.steps()
            heads += [head] * len(group.widths)
            gains += [-1 if group.gain is None else first_gain + group.gain] * len(group.widths)
            first_gain += codec.gain_bytes
        return Columns(levels, steps, chains, np.array(heads, dtype=np.int64), np.array(gains, dtype=np.int64))

    def numbers(self, rows: torch.Tensor) -> dict[str, NDArray[np.uint8]]:
        """Levels uint8 [T, c] of the parts of packed rows uint8 [T, bytes]."""
        found: dict[str, list[NDArray[np.uint8]]] = {GAINS: [], BEHIND: [], AHEAD: []}
        for codec, part, groups in zip(self.codecs, rows.split(self.sizes, dim=-1), self._groups, strict=True):
            found[GAINS].append(part[:, : codec.gain_bytes].numpy())
            levels = codec.level_numbers(codec.codes(part)).numpy()
            for kind, group in groups.items():
                found[kind].append(levels[:, group.coordinates])
        return {kind: np.concatenate(parts, axis=1) for kind, parts in found.items()}

    def raw(self, rows: torch.Tensor) -> torch.Tensor:
        """Bytes of the 16-bit numbers of rows, which are kept as they are, uint8 [T, bytes]."""
        parts = zip(self.codecs, rows.split(self.sizes, dim=-1), strict=True)
        return torch.cat([part[:, c.gain_bytes : c.gain_bytes + 2 * len(c._raw)] for c, part in parts], dim=-1)

    def rows(self, codes: Mapping[str, Numbers], raw: torch.Tensor) -> torch.Tensor:
        """Packed rows uint8 [T, bytes] of the codes of their parts."""
        rows, gain, start, places = [], 0, 0, {BEHIND: 0, AHEAD: 0}
        for codec, groups in zip(self.codecs, self._groups, strict=True):
            whole = np.zeros((len(raw), codec.row_dim), dtype=np.uint8)
            for kind, group in groups.items():
                first = places[kind]
                places[kind] = first + len(group.widths)
                whole[:, group.coordinates] = codes[kind][:, first : places[kind]]
            gains = codes[GAINS][:, gain : gain + codec.gain_bytes].astype(np.uint8)
            own = raw[:, start : start + 2 * len(codec._raw)]
            gain, start = gain + codec.gain_bytes, start + 2 * len(codec._raw)
            rows.append(packed_rows(codec, torch.from_numpy(whole), torch.from_numpy(gains), own))
        return torch.cat(rows, dim=-1)


def codecs_of(splice: nn.Module, where: str) -> list[RowCodec]:
    """The codecs of a layer's rows: of its key heads, or of its latent.

    Raises:
        UnsupportedError: rows are not packed, or by a codec whose levels are not known here.
    """
    heads: Any = list(splice) if isinstance(splice, HeadSplices) else [splice]
    for head in heads:
        if not isinstance(head.codec, RowCodec):
            kind = "numbers" if head.codec is None else f"packed by the codec {head.codec.kind!r}"
            raise UnsupportedError(
                f"The rows of {where} are {kind}, and only those of this package's own codecs are predicted. Patch "
                'with `bytes_per_token` and one of these, or save without `compress="layers"`.'
            )
    return [head.codec for head in heads]


def packed_splices(model: nn.Module) -> dict[int, nn.Module]:
    """The splices of a model whose rows are predicted, by cache layer index.

    Raises:
        UnsupportedError: it has none, or their rows are not packed.
    """
    sites = patched_sites(model) if is_patched(model) else []
    found = {site.layer_idx: patched.splice for site, patched in sites}
    for index, splice in found.items():
        codecs_of(splice, f"layer {index}")
    if not found:
        raise UnsupportedError(
            'This model has no packed rows, which alone are predicted. Patch it, or save without `compress="layers"`.'
        )
    return found


def level_tables(codec: RowCodec) -> dict[int, Numbers]:
    """Levels of each width, as whole numbers."""
    return {width: np.rint(levels_of(codec, width) * 2**LEVEL_BITS).astype(np.int64) for width in codec.grids}


def token_inputs(model: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """What tokens [T] themselves say: their embeddings, of one size, on 8 bits. The same on any machine.

    Sums are of whole numbers, and square root and division are rounded alike everywhere (IEEE 754).
    """
    weight: torch.Tensor = model.get_input_embeddings().weight
    rows = weight.detach()[torch.from_numpy(ids).to(weight.device)].cpu().double().numpy()
    whole = np.rint(np.clip(rows * _FINE, -_LARGEST, _LARGEST))
    energy = np.square(whole.astype(np.int64)).sum(1).astype(np.float64)
    size = np.sqrt(energy / rows.shape[1]).clip(min=1.0)
    return np.rint(whole * _TOKEN_SPREAD / size[:, None]).clip(-127, 127).astype(np.float32)


class RowPrediction:
    """How the rows of a model are predicted, for smaller files of its caches.

    Attributes:
        layers: those with packed rows, in their order.
        tables: levels of each width, whole numbers.
        identities: of the splices whose rows are predicted.
        depth: how many layers before a layer predict it.
        uses_tokens: whether the tokens do as well, so that they must be known.
        identity: a digest of all of it.
    """

    def __init__(
        self,
        layers: Sequence[LayerPrediction],
        tables: Mapping[int, Numbers],
        identities: Sequence[str],
        depth: int,
        uses_tokens: bool,
        identity: str,
    ) -> None:
        self.layers, self.tables, self.identities = list(layers), dict(tables), list(identities)
        self.depth, self.uses_tokens, self.identity = depth, uses_tokens, identity

    def require_splices(self, splices: Sequence[nn.Module]) -> None:
        """Check that the rows of these splices are those that are predicted.

        Raises:
            CacheMismatchError: they are others.
        """
        found: list[Any] = [splice.identity for splice in splices]
        if found != self.identities:
            raise CacheMismatchError(
                f"The prediction of rows was fitted to {len(self.identities)} splices, and these {len(found)} are not "
                "the same. Fit it again: fit_row_prediction(model, data, tokenizer=tokenizer)."
            )

    def compress(
        self, splices: Sequence[nn.Module], rows: Sequence[torch.Tensor], tokens: NDArray[np.float32]
    ) -> Streams:
        """Rows of all layers as words.

        Args:
            splices: of the layers.
            rows: of each, uint8 [T, bytes].
            tokens: see `tokens_of`, [T, e].

        Raises:
            CacheMismatchError: the prediction is of other splices.
        """
        of_layers = self._of_layers(splices)
        streams: Streams = {}
        for block, start in enumerate(range(0, len(tokens), BLOCK)):
            part = slice(start, start + BLOCK)
            passage = Passage(tokens[part], self.depth)
            states, words = write_layers(self._numbers([own[part] for own in rows], of_layers), passage)
            streams |= {f"{block}.states": states.view(np.int64), f"{block}.words": words.view(np.int32)}
        for index, (layer, own) in enumerate(zip(of_layers, rows, strict=True)):
            raw = layer.raw(own)
            if raw.shape[1]:
                streams[f"{index}.raw"] = raw.numpy()
        return streams

    def _numbers(
        self, rows: Sequence[torch.Tensor], of_layers: Sequence[RowsOfLayer]
    ) -> Iterator[tuple[LayerPrediction, Mapping[str, Numbers]]]:
        for layer, of_layer, own in zip(self.layers, of_layers, rows, strict=True):
            found = of_layer.numbers(own)
            yield layer, {kind: levels.astype(np.int64) for kind, levels in found.items()}

    def restore(
        self,
        splices: Sequence[nn.Module],
        stream: Callable[[str], NDArray[Any]],
        tokens: NDArray[np.float32],
        path: object,
    ) -> list[torch.Tensor]:
        """The rows of all layers, each uint8 [T, bytes].

        Args:
            splices, tokens: as of `compress`.
            stream: gives what that gave, by name.
            path: of the file, for messages.

        Raises:
            CacheMismatchError: the prediction is of other splices.
            CheckpointError: they are damaged.
        """
        of_layers = self._of_layers(splices)
        found: list[list[torch.Tensor]] = [[] for _ in of_layers]
        for block, start in enumerate(range(0, len(tokens), BLOCK)):
            part = slice(start, start + BLOCK)
            passage = Passage(tokens[part], self.depth)
            states, words = stream(f"{block}.states").view(np.uint64), stream(f"{block}.words").view(np.uint32)
            if states.shape != (len(passage.tokens),) or words.ndim != 1:
                raise damaged(path)
            reader = Reader(states, words, path)
            for index, (layer, of_layer) in enumerate(zip(self.layers, of_layers, strict=True)):
                codes = read_layer(reader, layer, passage)
                raw = stream(f"{index}.raw") if of_layer.raw_bytes else np.zeros((len(tokens), 0), dtype=np.uint8)
                if raw.shape != (len(tokens), of_layer.raw_bytes):
                    raise damaged(path)
                found[index].append(of_layer.rows(codes, torch.from_numpy(raw[part])))
            reader.finish()
        return [torch.cat(parts) for parts in found]

    def _of_layers(self, splices: Sequence[nn.Module]) -> list[RowsOfLayer]:
        self.require_splices(splices)
        return [RowsOfLayer(codecs_of(splice, "a layer"), self.tables) for splice in splices]


def tokens_of(model: nn.Module, count: int, ids: torch.Tensor | None, are_used: bool) -> NDArray[np.float32]:
    """See `Passage`.

    Raises:
        ConfigError: tokens are used, and not given.
    """
    if not are_used:
        return np.zeros((count, 0), dtype=np.float32)
    if ids is None:
        raise ConfigError(
            '`compress="layers"` predicts rows from their tokens, and there are none. Give `input_ids`, or fit the '
            "prediction with `uses_tokens=False`."
        )
    return token_inputs(model, ids.numpy())
