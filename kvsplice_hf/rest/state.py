"""The layers of a cache as tensors and plain data, and back.

Everything that a layer holds is taken, by name, so that a field that a new release of transformers adds is not lost
without a word: what has no form in a file is refused, and so is a file whose fields are not those of the layers here.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import StaticLayer

from kvsplice_hf import upstream
from kvsplice_hf.cache.exact import ExactTokens
from kvsplice_hf.cache.layers import stock_type_of
from kvsplice_hf.cache.splicing import SplicedLayerMixin
from kvsplice_hf.cache.turns import FixedTurns, TurnTable
from kvsplice_hf.errors import CacheMismatchError, UnsupportedError
from kvsplice_hf.retention.layer import RetainedLayerMixin


# Of a call, of the splice, or another view of what is saved anyway.
_LEFT_OUT = frozenset(
    {"splice", "geometry", "identity", "announced", "attention_mask", "embeddings", "position_ids"}
    | {"_buffer", "_own_keys", "_own_values"}
)
# What layers of transformers have only once they hold something.
_AFTER_FIRST_TOKEN = frozenset(
    {"device", "dtype", "batch_size", "max_batch_size", "num_heads", "k_head_dim", "v_head_dim"}
    | {"indexer_device", "indexer_dtype"}
)
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for table in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING)
    for kind in table.values()
}
# Rows of a layer of fixed size, and along which axis: only those that are filled are saved.
_ROWS = {"keys": -2, "values": -2, "indexer_keys": 1}


class Packed:
    """Takes values apart, into data that JSON can hold and tensors by name. What is shared stays shared.

    Attributes:
        tensors: by name.
        tables: of how keys were rotated, which layers share.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.tables: list[dict[str, Any]] = []
        self._names: dict[Any, str] = {}
        self._places: dict[int, int] = {}
        self._storages: set[int] = set()

    def layer(self, layer: Any, index: int) -> dict[str, Any]:
        """One layer of a cache.

        Raises:
            UnsupportedError: it is of a kind, or holds something, that has no form in a file.
        """
        if isinstance(layer, RetainedLayerMixin):
            raise UnsupportedError(
                f"Cache layer {index} was filled inside of retention, which drops rows, and cannot be saved: what is "
                "left of it is not the cache of its tokens. Save the cache of the prompt outside of the context."
            )
        kind = stock_type_of(layer).__name__
        if _KINDS.get(kind) is not stock_type_of(layer):
            raise UnsupportedError(
                f"Cache layer {index} is a {type(layer).__name__}, which cannot be saved. Saved are caches of the "
                "layers that DynamicCache and StaticCache have: leave `cache_implementation` unset, or set it to "
                '"static" or "offloaded".'
            )
        spliced = isinstance(layer, SplicedLayerMixin)
        held = {name: value for name, value in vars(layer).items() if name not in _LEFT_OUT}
        return {
            "kind": kind,
            "geometry": asdict(layer.geometry) if spliced else None,
            "identity": layer.identity if spliced else "",
            "fields": {name: self._field(layer, index, name, value) for name, value in held.items()},
        }

    def _field(self, layer: Any, index: int, name: str, value: Any) -> Any:
        table = getattr(layer, "table", None)
        if name == "values" and isinstance(table, FixedTurns) and value is table.row_slots:
            return {"row_slots": True}
        if name in _ROWS and isinstance(layer, StaticLayer) and isinstance(value, torch.Tensor):
            axis, size = _ROWS[name], value.shape[_ROWS[name]]
            filled = min(int(layer.get_seq_length()), size)
            # An indexer may hold keys where attention holds none.
            if not value.narrow(axis, filled, size - filled).any():
                return {"rows": self.value(value.narrow(axis, 0, filled), f"{index}.{name}"), "of": size}
        return self.value(value, f"{index}.{name}")

    def value(self, value: Any, name: str) -> Any:
        """A value of a layer, whose tensors are named after `name`.

        Raises:
            UnsupportedError: it has no form in a file.
        """
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"plain": value}
        if isinstance(value, torch.device):
            return {"device": True}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
            return {"tensor": self._tensor(value, name)}
        if isinstance(value, ExactTokens):
            return {"exact": [self.value(part, f"{name}.{which}") for which, part in zip("lp", value, strict=True)]}
        if isinstance(value, (TurnTable, FixedTurns)):
            return {"table": self._table(value)}
        if isinstance(value, dict):
            return {"dict": [[key, self.value(part, f"{name}.{key}")] for key, part in value.items()]}
        raise UnsupportedError(
            f"`{name}` of this cache is a {type(value).__name__}, which cannot be saved. This transformers "
            f"({upstream.INSTALLED}) keeps something in its caches that this release of kvsplice_hf does not know."
        )

    def _tensor(self, tensor: torch.Tensor, name: str) -> str:
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and same in self._names:
            return self._names[same]
        self._names[same] = name
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage().data_ptr()
        if storage in self._storages:  # safetensors refuses two views of one memory
            kept = kept.clone()
        self._storages.add(storage)
        self.tensors[name] = kept
        return name

    def _table(self, table: TurnTable | FixedTurns) -> int:
        if id(table) not in self._places:
            place = self._places[id(table)] = len(self.tables)
            fields = {name: self.value(part, f"table{place}.{name}") for name, part in table.to_save().items()}
            self.tables.append({"kind": type(table).__name__, "fields": fields})
        return self._places[id(table)]


class Unpacked:
    """Puts values together again.

    Args:
        tensor: gives the tensor of a name.
        tables: as of `Packed`.
    """

    def __init__(self, tensor: Callable[[str], torch.Tensor], tables: list[dict[str, Any]]) -> None:
        self._tensor, self._tables = tensor, tables
        self._tensors: dict[Any, torch.Tensor] = {}
        self._made: dict[int, Any] = {}

    def fill(self, layer: Any, index: int, saved: Mapping[str, Any], device: torch.device) -> None:
        """Give an empty layer what was saved of one.

        Args:
            layer: of the same kind, spliced if that was.
            index: of the layer.
            saved: as `Packed.layer` gave it.
            device: where its tensors go.

        Raises:
            CacheMismatchError: the fields are not those of the layer.
        """
        fields = saved["fields"]
        own = set(vars(layer)) - _LEFT_OUT
        odd = sorted((own - set(fields)) | (set(fields) - own - _AFTER_FIRST_TOKEN))
        if odd:
            raise CacheMismatchError(
                f"Layer {index} of the saved cache and a {type(layer).__name__} of this transformers "
                f"({upstream.INSTALLED}) do not hold the same: {', '.join(odd)}. Use the release that the cache was "
                "saved with (describe_cache(path).transformers), or compute and save it again."
            )
        for name in sorted(fields, key=lambda name: name != "table"):  # what is shared with the table comes after it
            setattr(layer, name, self._field(layer, name, fields[name], device))
        if isinstance(layer, StaticLayer):
            self._keep_in_place(layer)

    def _field(self, layer: Any, name: str, saved: Mapping[str, Any], device: torch.device) -> Any:
        if "row_slots" in saved:
            return layer.table.row_slots
        if "rows" in saved:
            filled = self.value(saved["rows"], device)
            axis, shape = _ROWS[name], list(filled.shape)
            shape[axis] = saved["of"]
            whole = torch.zeros(shape, dtype=filled.dtype, device=device)
            whole.narrow(axis, 0, filled.shape[axis]).copy_(filled)
            return whole
        if "table" in saved:
            return self._table(saved["table"], layer, device)
        # What a layer of fixed size holds is changed in place, and the file stays as it is.
        return self.value(saved, device, copies=isinstance(layer, StaticLayer))

    def value(self, saved: Mapping[str, Any], device: torch.device, copies: bool = False) -> Any:
        """What `Packed.value` took apart."""
        kind, content = next(iter(saved.items()))
        if kind == "tensor":
            return self._read(content, device, copies)
        if kind == "device":
            return device
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "exact":
            return ExactTokens(*(self.value(part, device, copies) for part in content))
        if kind == "dict":
            return {key: self.value(part, device, copies) for key, part in content}
        return content

    def _read(self, name: str, device: torch.device, copies: bool) -> torch.Tensor:
        known = self._tensors.get((name, device))
        if known is None:
            found = self._tensor(name)
            known = self._tensors[name, device] = (
                found.clone() if copies and found.device == device else found.to(device)
            )
        return known

    def _table(self, place: int, layer: Any, device: torch.device) -> TurnTable | FixedTurns:
        if place in self._made:
            made: TurnTable | FixedTurns = self._made[place]
            return made
        saved = self._tables[place]
        fields = {name: self.value(part, device) for name, part in saved["fields"].items()}
        columns = layer.splice.keys.pairs[2]
        if saved["kind"] == FixedTurns.__name__:
            table: TurnTable | FixedTurns = FixedTurns(columns, fields["batch"], fields["length"], device)
        else:
            table = TurnTable(columns)
        table.restore(fields)
        self._made[place] = table
        return table

    def _keep_in_place(self, layer: Any) -> None:
        """Have compiled graphs find the tensors of a layer of fixed size where they are."""
        for value in vars(layer).values():
            for tensor in value if isinstance(value, ExactTokens) else [value]:
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static_address(tensor)


def empty_like(kind: str, fields: Mapping[str, Any], index: int) -> Any:
    """An empty stock layer of a kind, with the sizes that are among the fields.

    Raises:
        CacheMismatchError: this release of transformers has no such kind.
    """
    if kind not in _KINDS:
        raise CacheMismatchError(
            f"Layer {index} of the saved cache is a {kind}, which this transformers ({upstream.INSTALLED}) does not "
            "have. Use the release that it was saved with (describe_cache(path).transformers)."
        )
    names = ("max_cache_len", "sliding_window", "number_of_states")
    sizes = {name: fields[name]["plain"] for name in names if name in fields}
    if issubclass(_KINDS[kind], cache_utils.StaticSlidingWindowLayer):
        sizes.setdefault("sliding_window", sizes["max_cache_len"])
    return _KINDS[kind](**sizes)
