"""`LearnedKVSplice`: the projection between a latent and its code, and the ways to initialise it.

Encoding is `z = compress(softplus(scale) * c + shift)`, then LayerNorm if asked for; decoding is
`(expand(z) - shift) / softplus(scale)`. Decoding is affine in the code, `c_hat = D z + mu`, which is what lets
attention run on codes (see `attention.py`). So is encoding before the LayerNorm, `z = A (c - mu)`, with the same `mu`;
a merged splice keeps `A`, `D` and `mu` instead of computing them from its parameters.

The rotated key is stored beside the code as it is, or, where rows are packed, as a code of its own (`keys`).

Legend: `B` batch, `T` tokens, `R` kv_lora_rank, `r` spliced rank, `P` qk_rope_head_dim, `p` numbers of a key in a row:
those of its code, or P.
"""

import hashlib
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kvsplice_hf.code.codecs import Codec
from kvsplice_hf.code.keys import KeyProjection
from kvsplice_hf.code.matrix import SpliceMatrix
from kvsplice_hf.config import ROWS_CODEC
from kvsplice_hf.errors import ConfigError, FoldingError, PatchStateError, TrainingError, UnsupportedError
from kvsplice_hf.weights.offload import read_all, read_parameter


# A, D and mu of a merged splice. Buffers, so that they move, are cast and are copied with it; not saved.
_FOLDED = ("_folded_compress", "_folded_expand", "_folded_offset")


class SpliceWeights(NamedTuple):
    """What encoding and decoding of a splice multiply by.

    Attributes:
        compress, expand: [r, R] and [R, r].
        scale, shift: the parameters of the transform, [R]; None where it is merged into the others.
        offset: mu of a merged splice, [R]; None otherwise.
    """

    compress: torch.Tensor
    expand: torch.Tensor
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    offset: torch.Tensor | None


class LearnedKVSplice(nn.Module):
    """A per-dimension monotone transform followed by a low-rank pair of projections, and its inverse.

    Parameters: `transform_scale` and `transform_shift` of shape [R] (1 and 0 at the start; the scale in use is
    `softplus(transform_scale)`, so it is always positive), `compress.weight` [r, R], `expand.weight` [R, r + q], and
    `code_norm` (LayerNorm over r) if asked for. `codec` packs rows into bytes, `keys` codes rotated keys before their
    rotation; calibration sets them, at first there are none. Where latents are predicted from the codes of their keys,
    as these come back from packing, the last q columns of `expand` do that, and `compress` sees what is left.

    Args:
        latent_dim: R, the size of the latent.
        rank: r, the size of the code, from 1 to R.
        use_layernorm: normalise the code before it is stored.
        predicted_from: q, the numbers of a key's code that a latent is predicted from; 0: it is not.
        device, dtype: of the parameters.

    Raises:
        ConfigError: `rank` is not between 1 and `latent_dim`.

    Examples:
        >>> splice = LearnedKVSplice(512, 256)
        >>> splice.decode(splice.encode(torch.randn(1, 1, 7, 512))).shape
        torch.Size([1, 1, 7, 512])
    """

    # Whether codes are affine in latents and latents in codes, which attention on codes and kernels rely on.
    is_affine = True

    _folded_compress: torch.Tensor
    _folded_expand: torch.Tensor
    _folded_offset: torch.Tensor

    def __init__(
        self,
        latent_dim: int,
        rank: int,
        *,
        use_layernorm: bool = False,
        predicted_from: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= latent_dim:
            raise ConfigError(f"`rank` is {rank}; it must be between 1 and the latent size {latent_dim}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latent_dim, self.rank = latent_dim, rank
        self.transform_scale = nn.Parameter(torch.ones(latent_dim, **factory))
        self.transform_shift = nn.Parameter(torch.zeros(latent_dim, **factory))
        self.compress = SpliceMatrix(rank, latent_dim, **factory)
        self.predicted_from = predicted_from
        self.expand = SpliceMatrix(latent_dim, rank + predicted_from, **factory)
        self.code_norm = nn.LayerNorm(rank, **factory) if use_layernorm else None
        self.keys: KeyProjection | None = None
        self.codec: Codec | None = None
        # What `identity` was made of, and what it was.
        self._known_identity: tuple[Any, str] = (None, "")

    @property
    def identity(self) -> str:
        """Tells what codes mean: two splices that have it in common decode the same rows to the same numbers.

        It is a digest of what is in the parameters, so it is the same in another process and after a round trip through
        a file. It is computed again only when a parameter was written to, replaced or moved.
        """
        # The kind as well: a codec of another one may hold the very tensors of this one.
        stamp = (*_stamp(self._meaning()), self._kind_of_codec())
        if self._known_identity[0] != stamp:
            self._known_identity = stamp, self._digest()
        return self._known_identity[1]

    def forget_identity(self) -> None:
        """To be called after parameters were written to where that cannot be seen (accelerate keeps them elsewhere)."""
        self._known_identity = (None, "")

    def _meaning(self) -> list[Any]:
        """The tensors that say what a code means, as they are held."""
        # Past the lookup of attributes in modules, which is slow: each step of a model asks, once per layer.
        parts: dict[str, Any] = self._modules
        tensors: list[Any] = list(self._parameters.values())
        tensors += (parts["compress"]._parameters["weight"], parts["expand"]._parameters["weight"])
        keys, codec = parts.get("keys"), parts.get("codec")
        if keys is not None:
            tensors += (keys._parameters["mean"], keys._buffers["pairs"])
            tensors += (keys._modules["compress"]._parameters["weight"], keys._modules["expand"]._parameters["weight"])
        if codec is not None:
            tensors += codec.meaning()
        return tensors

    @torch.no_grad()
    def _digest(self) -> str:
        digest = hashlib.sha256()
        # Keys last, whichever part was set first; the others in the order that they have always had.
        for name, tensor in sorted(read_all(self).items(), key=lambda item: item[0].startswith("keys.")):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of this process, where it is spread
            values = local.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
        kind = self._kind_of_codec()
        if kind not in (None, ROWS_CODEC):  # whose digests are those of before there were others
            digest.update(f"codec {kind}".encode())
        return digest.hexdigest()

    def _kind_of_codec(self) -> str | None:
        codec: Any = self._modules.get("codec")
        return None if codec is None else codec.kind

    def _transform(self) -> tuple[torch.Tensor, torch.Tensor]:
        # In fp32: a scale rounded to bf16 on one way and not on the other would not cancel.
        scale = F.softplus(read_parameter(self, "transform_scale").float())
        return scale, read_parameter(self, "transform_shift").float()

    @property
    def is_merged(self) -> bool:
        """Whether the transform is folded into the projections; see `merge`."""
        return _FOLDED[0] in self._buffers

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the transform into the projections, for inference.

        Parameters stay as they are, and what is done to them is not seen until `unmerge`; loading parameters unmerges.
        What is folded is computed in fp32 and kept in the dtype of the weights.

        Raises:
            PatchStateError: the splice is merged already.
            FoldingError: a folded weight is not finite in the dtype of the weights.
        """
        if self.is_merged:
            raise PatchStateError(
                "This splice is already merged. If its parameters have changed since, unmerge it first."
            )
        scale, _ = self._transform()
        weight = read_parameter(self.compress, "weight")
        folded = ((weight * scale).to(weight.dtype), *self.fold())
        if not all(torch.isfinite(tensor).all() for tensor in folded):
            raise FoldingError(
                f"With the transform folded in, the projections have values that are not finite in {weight.dtype}. "
                "Cast the splice to float32 or bfloat16 before merging; if that does not help, it is damaged."
            )
        for name, tensor in zip(_FOLDED, folded, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def unmerge(self) -> None:
        """Undo `merge`, exactly: what was folded is dropped.

        Raises:
            PatchStateError: the splice is not merged.
        """
        if not self.is_merged:
            raise PatchStateError("This splice is not merged, so there is nothing to undo.")
        for name in _FOLDED:
            delattr(self, name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What is folded would go on encoding with the parameters of before.
        if self.is_merged and any(name.startswith(prefix) for name in state_dict):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def value_dim(self) -> int:
        """r + q, the numbers of a row, from the first, that a latent is decoded from."""
        return self.rank + self.predicted_from

    def encode(self, latent: torch.Tensor, key_code: torch.Tensor | None = None) -> torch.Tensor:
        """Codes [..., r] of latents [..., R], in the latents' dtype.

        Args:
            latent: of the tokens.
            key_code: what packing leaves of the codes of their keys, [..., q], where latents are predicted from that.

        Raises:
            TrainingError: the splice is merged, and this is training.
        """
        assert (key_code is None) == (self.predicted_from == 0)
        codes = self._compress_merged(latent, key_code) if self.is_merged else self._compress(latent, key_code)
        if self.code_norm is not None:
            codes = self.code_norm(codes)
        return codes.to(latent.dtype)

    def _compress(self, latent: torch.Tensor, key_code: torch.Tensor | None) -> torch.Tensor:
        scale, shift = self._transform()
        weight = read_parameter(self.compress, "weight")
        transformed = latent * scale + shift
        if key_code is not None:
            transformed = transformed - self._predicted(read_parameter(self.expand, "weight"), key_code)
        return F.linear(transformed.to(weight.dtype), weight)

    def _predicted(self, expand: torch.Tensor, key_code: torch.Tensor) -> torch.Tensor:
        """What of transformed latents, or with what is folded of latents, follows from their keys; float32 [..., R]."""
        with torch.autocast(key_code.device.type, enabled=False):
            return key_code.float() @ expand[:, self.rank :].float().T

    def _compress_merged(self, latent: torch.Tensor, key_code: torch.Tensor | None) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            raise TrainingError(
                "The splice is merged, so its parameters would not be trained. Call unmerge_kvsplice(model) first."
            )
        # The offset comes off first: a mean many times the spread would drown in the rounding of `A c`.
        weight, rest = self._folded_compress, latent - self._folded_offset
        if key_code is not None:
            rest = rest - self._predicted(self._folded_expand, key_code)
        return F.linear(rest.to(weight.dtype), weight)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Latents [..., R] of the first r + q numbers of rows, in their dtype."""
        matrix, offset = self.fold()
        return F.linear(codes.to(matrix.dtype), matrix, offset).to(codes.dtype)

    def rows(self, latent: torch.Tensor, k_rot: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
        """What a cache stores of latents [..., R] and rotated keys [..., P].

        Numbers `[code | key]` [..., r + p] in the latents' dtype, or with a codec packed bytes.

        Args:
            latent, k_rot: of the tokens.
            turns: uint8 [..., F], how their keys were rotated (`KeyProjection.turns_of`), where `keys` codes them.

        Raises:
            UnsupportedError: accelerate offloads buffers, and with them the tables of the codec.
        """
        self.require_codec_here()
        rows = self.numbers_to_store(latent, k_rot, turns)
        return rows if self.codec is None else self.codec.pack(rows)

    def numbers_to_store(
        self,
        latent: torch.Tensor,
        k_rot: torch.Tensor,
        turns: torch.Tensor | None = None,
        packed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[code | key]` [..., r + p] of latents [..., R] and rotated keys [..., P], in the latents' dtype.

        Args:
            latent, k_rot, turns: as in `rows`.
            packed: rows of the same tokens. Latents that are predicted from keys are so from those that these hold.
        """
        key = self._keys_to_store(k_rot, turns).to(latent.dtype)
        return torch.cat([self.encode(latent, self._as_read(key, packed)), key], dim=-1)

    def _as_read(self, key_code: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor | None:
        """What packing leaves of codes of keys [..., q], where latents are predicted from that."""
        if not self.predicted_from:
            return None
        assert self.codec is not None
        if packed is not None:
            return self.codec.unpack(packed)[..., self.rank :].to(key_code.dtype)
        return self.codec.behind(key_code, self.rank)

    def _keys_to_store(self, k_rot: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
        if self.keys is None:
            return k_rot
        assert turns is not None
        return self.keys.encode(k_rot, turns)

    def require_codec_here(self) -> None:
        """Check that the tables of the codec are on a device.

        Raises:
            UnsupportedError: accelerate offloads buffers, and with them the tables.
        """
        if self.codec is not None and any(tensor.is_meta for tensor in self.codec.meaning()):
            raise UnsupportedError(
                "The tables that read packed rows are on the meta device: accelerate offloads buffers. Dispatch the "
                "model with offload_buffers=False; they are a few kilobytes per layer."
            )

    def numbers(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`[code | key]` [..., r + p] of stored rows; in `dtype` where they were packed."""
        return rows if self.codec is None else self.codec.unpack(rows).to(dtype)

    def read(
        self, rows: torch.Tensor, dtype: torch.dtype, turns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What latents are decoded from [..., r + q], and rotated keys [..., P]; in `dtype` where rows were packed.

        Args:
            rows: as stored.
            dtype: of the result.
            turns: as in `rows`, of the rows' tokens.
        """
        if self.keys is None or self.codec is None:
            numbers = self.numbers(rows, dtype)
            return numbers[..., : self.rank], numbers[..., self.rank :]
        assert turns is not None
        numbers = self.codec.unpack(rows)
        k_rot = self.keys.decode(numbers[..., self.rank :], turns)
        return numbers[..., : self.value_dim].to(dtype), k_rot.to(dtype)

    def round_trip(
        self, latent: torch.Tensor, k_rot: torch.Tensor, turns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the cache would give back of latents [..., R] and rotated keys [..., P], without a cache.

        `turns` as in `rows`.
        """
        if self.codec is None:
            return self.decode(self.encode(latent)), k_rot
        self.require_codec_here()
        rows = self.codec.round_trip(self.numbers_to_store(latent, k_rot, turns))
        key = rows[..., self.rank :]
        if self.keys is not None:
            assert turns is not None
            key = self.keys.decode(key, turns).to(rows.dtype)
        return self.decode(rows[..., : self.value_dim]), key

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(D, mu)` of shapes [R, r + q] and [R], in the dtype of the weights, with `decode(z) == D z + mu`.

        Computed anew from the parameters at every call: R x r products cost nothing beside one read of the codes, and a
        result that is never kept can never be stale. A merged splice returns what `merge` kept.
        """
        if self.is_merged:
            return self._folded_expand, self._folded_offset
        weight, (scale, shift) = read_parameter(self.expand, "weight"), self._transform()
        return (weight / scale[:, None]).to(weight.dtype), (-shift / scale).to(weight.dtype)

    def weights(self) -> SpliceWeights:
        """What encoding and decoding multiply by, as it is held."""
        if self.is_merged:
            return SpliceWeights(self._folded_compress, self._folded_expand, None, None, self._folded_offset)
        return SpliceWeights(
            read_parameter(self.compress, "weight"),
            read_parameter(self.expand, "weight"),
            read_parameter(self, "transform_scale"),
            read_parameter(self, "transform_shift"),
            None,
        )

    def forward(self, latent: torch.Tensor, key_code: torch.Tensor | None = None) -> torch.Tensor:
        """What is left of latents [..., R] after the round trip through their codes; arguments as of `encode`."""
        codes = self.encode(latent, key_code)
        return self.decode(codes if key_code is None else torch.cat([codes, key_code.to(codes.dtype)], dim=-1))

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, rank={self.rank}"


_version_of = operator.attrgetter("_version")


def _stamp(tensors: list[Any]) -> list[int]:
    """Another one after one of the tensors was written to, replaced or moved."""
    try:  # by functions that are not written in Python
        return [*map(torch.Tensor.data_ptr, tensors), *map(_version_of, tensors)]
    except RuntimeError:  # spread over processes, or made in inference mode, where no versions are counted
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        return [n for t in local for n in (t.data_ptr(), -1 if t.is_inference() else t._version)]
