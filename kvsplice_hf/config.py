"""`KVSpliceConfig`: what to splice and how, validated on construction, with a JSON round trip."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from kvsplice_hf.errors import ConfigError


SCHEMA_VERSION = 1
# Bytes of the stock row in bf16 over those of a row, where no budget is given.
DEFAULT_COMPRESSION = 4
# The exact tokens of a sequence of this length are counted into a budget of bytes per token.
REFERENCE_LENGTH = 4096
# The codecs of this package (`kvsplice_hf.code`).
ROWS_CODEC, TRELLIS_CODEC = "rows", "trellis"
DEFAULT_CODEC = TRELLIS_CODEC
KEYS = ("unrotated", "rotated", "exact")
VALUES = ("coded", "exact")
# Bytes of the smallest row of either: a bit or two, and the gain.
SMALLEST_ROW = 2
ALLOCATIONS = ("auto", "global", "layer")
ATTENTION_MODES = ("auto", "absorbed", "expanded")
INITIALISATIONS = ("svd", "orthogonal", "identity")
TRANSFORMS = ("affine", "spline")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _unknown_layers(layers: Any) -> str:
    return f'`layers` is {layers!r}; it must be "all", "last:n", "fisher:n", or a list of layer indices.'


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _rounded_up(value: float) -> float:
    """To one digit more than errors show."""
    return math.ceil(value * 100) / 100


def _rounded_down(value: float) -> float:
    return math.floor(value * 100) / 100


def _count_of_layers(layers: str, choice: str) -> int | None:
    """The n of "last:n" or "fisher:n", `choice` being what stands before it; None where the text is something else."""
    prefix, _, count = layers.partition(":")
    return int(count) if prefix == choice and count.isdecimal() and int(count) > 0 else None


@dataclass(frozen=True, kw_only=True)
class KVSpliceConfig:
    """What `patch_model_with_kvsplice` does to a model.

    Args:
        compression_ratio: spliced rank over latent rank, r / R, in (0, 1]; each layer gets `round(R * ratio)`, at
            least 1. Codes are stored as numbers of the model's dtype.
        rank: the spliced rank r itself, the same for every layer, from 1 to the smallest `kv_lora_rank`.
        bytes_per_token: all bytes per token and layer on average, in packed codes, for one sequence; the exact first
            tokens are counted in at a length of 4096, and so is what layers have in common. Needs calibration.
        bits: the same as bits per number of the stock row.
        compression: the same as a ratio: how many times smaller than the stock row in bf16, 1 or more. Of these five
            budgets give one; with none, `compression=4`.
        codec: name of the codec that packs rows: "trellis" is `TrellisCodec`, "rows" is `RowCodec`, which rounds each
            coordinate by itself, writes faster and loses more; others are registered (docs/how_to_add.md).
        keys: "unrotated" codes keys in packed rows before their rotation, which loses less at equal bytes; "rotated" as
            they come; "exact" stores them as they come in bf16, and codes values alone. Only read where a splice is
            fitted.
        key_block: how many numbers of a key before its rotation share a basis, those of neighbouring frequencies: even,
            or None for all. Narrow blocks decode faster, and lose more. Only read where a splice is fitted.
        values: of ordinary attention: "coded", or "exact" in bf16, so that keys alone are coded.
        allocation: "global" lets layers compete for bytes, "layer" gives each the same, "auto" takes what loses less on
            calibration text that was held out ("global" where there is none).
        layers: which latents to splice: "all", "last:n", "fisher:n" (the n that cost least by calibration, each at the
            same budget; docs/fisher.md), or a sequence of cache layer indices (`layer_idx`).
        layer_pattern: dotted path of the list that holds the layers ("transformer.h"), for models where more than one
            decoder, or none, is found by itself.
        use_layernorm: apply LayerNorm to the code. Full rank is then no longer exact.
        transform: of each number before the projection: "affine" is a scale and a shift, "spline" a monotone
            piecewise-linear function ahead of principal components, as in the research (docs/geometry.md). It is
            fitted to vectors, needs `compression_ratio` or `rank`, and is never absorbed: each step decodes. Of
            ordinary attention it codes the values of each key head, as so many numbers in bf16.
        key_rank: with splines, numbers kept of each key of ordinary attention, before its rotation; None: all.
        knots: of each spline, 2 or more. Only read where `transform="spline"`, as are the next two.
        spline_epochs: passes over the vectors that a spline is fitted to; 0: principal components alone.
        spline_learning_rate: of the splines, above 0.
        attention: "absorbed" attends on the codes themselves, "expanded" decodes them and runs the model's own
            attention, "auto" takes whichever costs fewer operations for the call at hand.
        materialise_weights: where the weight of `kv_b_proj` cannot be read (it is packed, adapted or sharded), keep it
            dense while the model runs, in the dtype of the model: absorbed attention needs it. On DeepSeek-V2-Lite in
            bf16 that takes 4.2 MB per layer, 113 MB in all, on DeepSeek-V3 33.6 MB and 2.0 GB. Without, such layers
            decode and expand all stored tokens at each step.
        init: how `compress` and `expand` start: "svd" of `kv_b_proj`, "orthogonal" (random), or "identity" (the first
            r latent dimensions).
        sink_tokens: this many first real tokens of each sequence keep their latents exactly (attention sinks).
        schema_version: version of this set of fields, for files.

    Raises:
        ConfigError: a value is out of range, or more than one budget is given.

    Examples:
        >>> config = KVSpliceConfig(bytes_per_token=193, layers="last:4")
        >>> KVSpliceConfig.from_dict(config.to_dict()) == config
        True
    """

    compression_ratio: float | None = None
    rank: int | None = None
    bytes_per_token: float | None = None
    bits: float | None = None
    compression: float | None = None
    codec: str = DEFAULT_CODEC
    keys: str = KEYS[0]
    key_block: int | None = None
    values: str = VALUES[0]
    allocation: str = "auto"
    layers: str | tuple[int, ...] = "all"
    layer_pattern: str | None = None
    use_layernorm: bool = False
    transform: str = TRANSFORMS[0]
    key_rank: int | None = None
    knots: int = 7
    spline_epochs: int = 8
    spline_learning_rate: float = 2e-3
    attention: str = "auto"
    materialise_weights: bool = True
    init: str = "svd"
    sink_tokens: int = 4
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError(
                f"`schema_version` is {self.schema_version!r}; this release of kvsplice_hf reads version "
                f"{SCHEMA_VERSION}. Upgrade kvsplice_hf to read newer files."
            )
        self._check_budget()
        self._check_layers()
        _check_choice("attention", self.attention, ATTENTION_MODES)
        _check_choice("init", self.init, INITIALISATIONS)
        self._check_exact()
        self._check_key_block()
        self._check_spline()
        _check_choice("allocation", self.allocation, ALLOCATIONS)
        if not _is_int(self.sink_tokens) or self.sink_tokens < 0:
            raise ConfigError(f"`sink_tokens` is {self.sink_tokens!r}; it must be an integer of 0 or more.")
        for name in ("use_layernorm", "materialise_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}; it must be True or False.")
        if not (isinstance(self.codec, str) and self.codec):
            raise ConfigError(f"`codec` is {self.codec!r}; it must be the name of a registered codec.")
        if self.codec != DEFAULT_CODEC and not self.is_packed:
            raise ConfigError("`codec` packs rows: give `bytes_per_token`, `bits`, or no budget.")
        if self.is_packed and self.use_layernorm:
            raise ConfigError("`use_layernorm` works on codes stored as numbers: give `compression_ratio` or `rank`.")
        if self.layer_pattern is not None and not (isinstance(self.layer_pattern, str) and self.layer_pattern):
            raise ConfigError(f'`layer_pattern` is {self.layer_pattern!r}; it must be a path such as "transformer.h".')

    def _check_key_block(self) -> None:
        size = self.key_block
        if size is not None and not (_is_int(size) and size > 0 and size % 2 == 0):
            raise ConfigError(f"`key_block` is {size!r}; it must be an even number of numbers, or None for all.")

    def _check_spline(self) -> None:
        _check_choice("transform", self.transform, TRANSFORMS)
        if not _is_int(self.knots) or self.knots < 2:
            raise ConfigError(f"`knots` is {self.knots!r}; a spline needs at least 2.")
        if not _is_index(self.spline_epochs):
            raise ConfigError(f"`spline_epochs` is {self.spline_epochs!r}; it must be an integer of 0 or more.")
        rate = self.spline_learning_rate
        if not (_is_number(rate) and 0 < rate < math.inf):
            raise ConfigError(f"`spline_learning_rate` is {rate!r}; it must be a number above 0.")
        size = self.key_rank
        if size is not None and not (_is_int(size) and size > 0):
            raise ConfigError(f"`key_rank` is {size!r}; it must be an integer of 1 or more, or None.")
        if self.transform != "spline":
            if size is not None:
                raise ConfigError('`key_rank` is for `transform="spline"`. Leave it out.')
            return
        refused = {
            "packed rows: give `compression_ratio` or `rank`": self.is_packed,
            'attention="absorbed": a spline does not fold into the weights, so that each step decodes. Leave '
            "`attention` out": self.attention == "absorbed",
            "`use_layernorm`: the principal components are kept as they are": self.use_layernorm,
            'keys="exact": it is for packed rows, and with a spline keys are stored as they come. Leave `keys` '
            "out": self.keys == "exact",
        }
        for what in (what for what, given in refused.items() if given):
            raise ConfigError(f'`transform` is "spline", which does not go with {what}.')

    def _check_exact(self) -> None:
        _check_choice("keys", self.keys, KEYS)
        _check_choice("values", self.values, VALUES)
        if self.keys == self.values == "exact":
            raise ConfigError('`keys` and `values` are both "exact"; one of them has to be coded.')
        for name in ("keys", "values"):
            if getattr(self, name) != "exact":
                continue
            if not self.is_packed:
                raise ConfigError(f'`{name}` is "exact"; it is for packed rows: give a budget in bytes, bits or times.')
            if self.codec not in (ROWS_CODEC, TRELLIS_CODEC):
                raise ConfigError(f'`{name}` is "exact"; the codec {self.codec!r} cannot leave numbers as they are.')

    def _check_budget(self) -> None:
        names = ("compression_ratio", "rank", "bytes_per_token", "bits", "compression")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) > 1:
            raise ConfigError(f"Give one budget, not {' and '.join(f'`{name}` ({v!r})' for name, v in given.items())}.")
        ratio, rank = self.compression_ratio, self.rank
        if ratio is not None and not (_is_number(ratio) and 0 < ratio <= 1):
            raise ConfigError(
                f"`compression_ratio` is {ratio!r}; it must be a number in (0, 1]: the spliced rank over kv_lora_rank."
            )
        if rank is not None and (not _is_int(rank) or rank < 1):
            raise ConfigError(f"`rank` is {rank!r}; it must be an integer from 1 to the model's kv_lora_rank.")
        for name, unit in (("bytes_per_token", "bytes per token and layer"), ("bits", "bits per number")):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < float("inf")):
                raise ConfigError(f"`{name}` is {value!r}; it must be a positive number of {unit}.")
        times = self.compression
        if times is not None and not (_is_number(times) and 1 <= times < float("inf")):
            raise ConfigError(
                f"`compression` is {times!r}; it must be a number of 1 or more: stock bytes in bf16 over those of rows."
            )

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed bytes."""
        return self.compression_ratio is None and self.rank is None

    @property
    def row_codec(self) -> str:
        """Name of the codec of rows that are bytes: `codec`, or where a rank was asked for that of plain numbers."""
        return self.codec if self.is_packed else ROWS_CODEC

    def row_budget(self, row_dim: int, shared: float = 0.0, smallest: float = SMALLEST_ROW) -> float:
        """Bytes of a packed row.

        Args:
            row_dim: numbers of the stock row, R + P, or those of all keys and values.
            shared: what else a cache keeps per token, divided by the layers that have it in common.
            smallest: bytes of the smallest row of the package's codecs.

        Raises:
            ConfigError: the smallest row and the exact first tokens take more than the budget.
        """
        if self.bytes_per_token is not None:
            budget = float(self.bytes_per_token)
        elif self.bits is not None:
            budget = self.bits * row_dim / 8
        else:
            budget = 2 * row_dim / (self.compression or DEFAULT_COMPRESSION)
        exact = self.exact_bytes(row_dim)
        needed = smallest + exact + shared
        if budget < needed and self.codec in (ROWS_CODEC, TRELLIS_CODEC):
            whole = " and ".join(f"`{name}`" for name in ("keys", "values") if getattr(self, name) == "exact")
            raise ConfigError(
                f"A budget of {budget:.1f} bytes per token and layer is below the {needed:.1f} that are the least: "
                f"{smallest:.1f} for the smallest row{whole and f' with exact {whole}'}, {exact:.1f} for "
                f"{self.sink_tokens} exact tokens in {REFERENCE_LENGTH}, and {shared:.1f} for how keys were rotated. "
                f"Give {self._form_of(needed, row_dim)}, or fewer `sink_tokens`{whole and f', or code {whole}'}."
            )
        return budget - exact - shared

    def _form_of(self, needed: float, row_dim: int) -> str:
        """The smallest budget, in the form in which one was given as well as in bytes."""
        forms = f"`bytes_per_token` of at least {_rounded_up(needed)}"
        if self.bits is not None:
            forms += f", or `bits` of {_rounded_up(needed * 8 / row_dim)}"
        if self.compression is not None and needed <= 2 * row_dim:
            forms += f", or `compression` of at most {_rounded_down(2 * row_dim / needed)}"
        return forms

    def exact_bytes(self, row_dim: int) -> float:
        """What the exact first tokens take per token, as they are counted into a budget of bytes."""
        return self.sink_tokens * (2 * row_dim + 8) / REFERENCE_LENGTH

    def _check_layers(self) -> None:
        layers = self.layers
        if isinstance(layers, str):
            if layers != "all" and not any(_count_of_layers(layers, choice) for choice in ("last", "fisher")):
                raise ConfigError(_unknown_layers(layers))
            return
        if not isinstance(layers, Sequence) or not layers or not all(_is_index(i) for i in layers):
            raise ConfigError(_unknown_layers(layers))
        # Lists come from JSON and from callers; a tuple keeps the config hashable.
        object.__setattr__(self, "layers", tuple(layers))

    def rank_for(self, kv_lora_rank: int, where: str) -> int:
        """The spliced rank r of a layer whose latent has `kv_lora_rank` dimensions; `where` names it in the error.

        Raises:
            ConfigError: `rank` is above `kv_lora_rank`.
        """
        if self.compression_ratio is not None:
            return max(1, round(self.compression_ratio * kv_lora_rank))
        if self.rank is None:
            raise ConfigError("The spliced rank of packed rows follows from calibration, not from the settings.")
        if self.rank > kv_lora_rank:
            raise ConfigError(
                f"`rank` is {self.rank}, but {where} has kv_lora_rank {kv_lora_rank}. "
                f"Give a rank of at most {kv_lora_rank}, or a `compression_ratio`."
            )
        return self.rank

    @property
    def cheapest_layers(self) -> int | None:
        """The n of "fisher:n"; None where `layers` says by itself which."""
        return _count_of_layers(self.layers, "fisher") if isinstance(self.layers, str) else None

    def select_layers(self, available: tuple[int, ...]) -> tuple[int, ...]:
        """The indices of `available` (ascending cache layer indices that hold a latent) chosen by `layers`.

        All of them where calibration is to choose among them ("fisher:n").

        Raises:
            ConfigError: a listed index holds no latent, or more layers are asked for than there are.
        """
        if self.layers == "all":
            return available
        if isinstance(self.layers, str):
            count = self.cheapest_layers or _count_of_layers(self.layers, "last") or len(available)
            if count > len(available):
                raise ConfigError(f"`layers` is {self.layers!r}, but only {len(available)} layers hold a latent.")
            return available if self.cheapest_layers else available[-count:]
        missing = sorted(set(self.layers) - set(available))
        if missing:
            raise ConfigError(f"`layers` names {missing}, which hold no latent. Layers that do: {list(available)}.")
        return tuple(sorted(set(self.layers)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, sorted by name."""
        values = asdict(self)
        if not self.is_packed:
            del values["codec"]
        # Files say it by what they hold, and releases that do not know of these go on reading them.
        defaults: dict[str, Any] = {"keys": KEYS[0], "values": VALUES[0], "compression": None, "key_block": None}
        defaults |= {
            "transform": TRANSFORMS[0],
            "key_rank": None,
            "knots": 7,
            "spline_epochs": 8,
            "spline_learning_rate": 2e-3,
        }
        for name, default in {**defaults, "materialise_weights": True}.items():
            if values[name] == default:
                del values[name]
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return dict(sorted(values.items()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote.

        Raises:
            ConfigError: a newer schema, an unknown field, or a value out of range.
        """
        version = values.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            return cls(schema_version=version)  # raises the error that names both versions
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"Unknown KVSpliceConfig fields {unknown}; known: {[f.name for f in fields(cls)]}.")
        return cls(**values)

    def save_json(self, path: str | Path) -> None:
        """Write the config as sorted JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a file of `save_json`.

        Raises:
            ConfigError: the file is missing, is not a JSON object, or holds values that `from_dict` refuses.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Cannot read a KVSpliceConfig from {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a JSON {type(values).__name__}; a KVSpliceConfig is a JSON object.")
        return cls.from_dict(values)
