"""Geometries of a whole model (`ModelGeometry`): a spline and principal components for each layer, or key head.

This is what the research calls its calibrator: vectors are collected from a model that runs as it is, and a geometry is
fitted to each kind of them.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kvsplice_hf.calibration.data import WINDOW, as_batches
from kvsplice_hf.calibration.fingerprint import model_fingerprint, same_model
from kvsplice_hf.calibration.key_geometries import KeyGeometry, fit_key_geometries
from kvsplice_hf.calibration.media import Media
from kvsplice_hf.calibration.statistics import part_of_name, written_part
from kvsplice_hf.calibration.vectors import collect_samples, collect_vectors
from kvsplice_hf.code.heads import PartKey
from kvsplice_hf.errors import CheckpointError, ConfigError
from kvsplice_hf.geometry import SplinePCA
from kvsplice_hf.geometry.files import is_geometry_file, read_geometry_file, write_geometry_file
from kvsplice_hf.geometry.spline_pca import Fitted
from kvsplice_hf.patch.families import AttentionSite
from kvsplice_hf.patch.sites import find_sites


_FORMAT = "kvsplice-model-geometry"
# What stands ahead of the names of tensors of keys, and what those hold beside the tensors of a geometry.
_OF_KEYS, _PAIRS = "key.", "pairs"
MAX_SAMPLES = 120_000


class ModelGeometry(Mapping[PartKey, SplinePCA]):
    """Geometries by cache layer index, or by layer and key head, and which model they were fitted on.

    Args:
        geometries: fitted, all of one `k` and one number of knots.
        fingerprint: of the model.
        reports: see below.
        keys: geometries of the keys of each key head as well, all of one `k`.

    Attributes:
        reports: what each fit found; empty where they were loaded.
        keys_of: those of keys; empty where there are none.
        key_k: numbers of their codes, or None.

    Raises:
        ConfigError: there are none, they differ in `k` or knots, or some parts have geometries of keys and others none.
    """

    def __init__(
        self,
        geometries: Mapping[PartKey, SplinePCA],
        fingerprint: str,
        reports: Mapping[PartKey, Fitted] | None = None,
        keys: Mapping[PartKey, KeyGeometry] | None = None,
    ) -> None:
        sizes = {(geometry.k, geometry.knots) for geometry in geometries.values()}
        if len(sizes) != 1:
            raise ConfigError(f"Geometries of one model have one `k` and one number of knots; got {sorted(sizes)}.")
        self._geometries, self.fingerprint, self.reports = dict(geometries), fingerprint, dict(reports or {})
        ((self.k, self.knots),) = sizes
        self.keys_of = dict(keys or {})
        of_keys = {(found.geometry.k, found.geometry.knots) for found in self.keys_of.values()}
        if self.keys_of and (
            len(of_keys) != 1 or set(self.keys_of) != set(self) or {n for _, n in of_keys} != {self.knots}
        ):
            raise ConfigError(
                "Geometries of keys are there for all key heads or for none, with one `k` and the same knots."
            )
        self.key_k = next((size for size, _ in of_keys), None)

    def __getitem__(self, part: PartKey) -> SplinePCA:
        return self._geometries[part]

    def __iter__(self) -> Iterator[PartKey]:
        return iter(self._geometries)

    def __len__(self) -> int:
        return len(self._geometries)

    @classmethod
    def fit(
        cls,
        vectors: Mapping[PartKey, torch.Tensor],
        k: int,
        fingerprint: str,
        *,
        knots: int = 7,
        epochs: int = 8,
        learning_rate: float = 2e-3,
        progress: bool = True,
        keys: Mapping[PartKey, KeyGeometry] | None = None,
    ) -> "ModelGeometry":
        """Fit a geometry to the vectors [M, n] of each part; arguments as of `SplinePCA` and `SplinePCA.fit`.

        `keys` are geometries of the keys of each part that were fitted before.

        Raises:
            CalibrationError, ConfigError: as `SplinePCA.fit`.
        """
        geometries, reports = {}, {}
        for part, rows in tqdm(vectors.items(), desc="fitting splines", file=sys.stderr, disable=not progress):
            geometry = SplinePCA(k, knots)
            reports[part] = geometry.fit(rows, epochs=epochs, learning_rate=learning_rate, progress=False)
            geometry.fitted_on = fingerprint
            geometries[part] = geometry
        return cls(geometries, fingerprint, reports, keys)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {
            f"{written_part(part)}.{name}": tensor
            for part, geometry in self.items()
            for name, tensor in geometry.tensors().items()
        }
        for part, found in self.keys_of.items():
            own = {**found.geometry.tensors(), _PAIRS: found.pairs.contiguous()}
            tensors |= {f"{written_part(part)}.{_OF_KEYS}{name}": tensor for name, tensor in own.items()}
        about = {"k": self.k, "knots": self.knots, "fitted_on": self.fingerprint, "key_k": self.key_k}
        write_geometry_file(path, _FORMAT, about, tensors)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "ModelGeometry":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: if given, the geometries must have been fitted on it.

        Raises:
            CheckpointError: there is no such file, or it is damaged, of something else, of a newer version, or of
                another model.
        """
        about, tensors = read_geometry_file(path, _FORMAT)
        by_part: dict[PartKey, dict[str, torch.Tensor]] = {}
        of_keys: dict[PartKey, dict[str, torch.Tensor]] = {}
        try:
            for name, tensor in tensors.items():
                part, _, own = name.partition(".")
                place = of_keys if own.startswith(_OF_KEYS) else by_part
                place.setdefault(part_of_name(part), {})[own.removeprefix(_OF_KEYS)] = tensor
            k, knots = int(about["k"]), int(about["knots"])
            found = {part: SplinePCA.of_tensors(k, knots, by_part[part]) for part in by_part}
            keys = {part: _key_geometry(int(about["key_k"]), knots, own) for part, own in of_keys.items()}
            geometry = cls(found, str(about["fitted_on"]), keys=keys)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Fit and save the geometry again.") from error
        for one in (*found.values(), *(found_keys.geometry for found_keys in keys.values())):
            one.fitted_on = geometry.fingerprint
        if model is not None:
            geometry.require_model(model)
        return geometry

    def require_model(self, model: nn.Module, layer_pattern: str | None = None) -> None:
        """Refuse a model that the geometries were not fitted on.

        Raises:
            CheckpointError: its weights are others.
            NotMLAError: it has no attention layer that is known.
        """
        if not same_model(self.fingerprint, model_fingerprint(model, find_sites(model, layer_pattern))):
            raise CheckpointError(
                f"The geometry was fitted on another model than this {type(model).__name__}: its weights are others. "
                "Fit one to vectors of this model (fit_geometry)."
            )


def _key_geometry(k: int, knots: int, tensors: dict[str, torch.Tensor]) -> KeyGeometry:
    """What `ModelGeometry.save` wrote of the keys of a part.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: it is damaged.
    """
    pairs = tensors.pop(_PAIRS)
    geometry = SplinePCA.of_tensors(k, knots, tensors)
    numbers, (_, mean, _) = pairs[:2].flatten().sort().values, geometry.fitted()
    if pairs.dtype != torch.int64 or pairs.shape[0] != 3 or numbers.tolist() != list(range(len(mean))):
        raise ValueError("its pairs are not those of the numbers of a key")
    return KeyGeometry(geometry, pairs)


def fit_geometry(
    model: nn.Module,
    data: Any,
    k: int,
    *,
    tokenizer: Any = None,
    knots: int = 7,
    samples: int = MAX_SAMPLES,
    max_batches: int = 64,
    batch_size: int = 8,
    window: int = WINDOW,
    epochs: int = 8,
    learning_rate: float = 2e-3,
    of: str = "heads",
    key_k: int | None = None,
    sink_tokens: int = 4,
    progress: bool = True,
) -> ModelGeometry:
    """The calibrator of the research as a call: collect vectors of a model, and fit a geometry to each kind of them.

    The vectors are latents of MLA, or values of ordinary attention: those that `c_attn` of GPT-2 makes, `v_proj` of
    others. Of each batch tokens are drawn at random and moved to the CPU at once.

    Args:
        model: unpatched; it runs as it is, without gradients.
        data: as of `KVSpliceCalibrator.collect`.
        k: numbers of a code.
        tokenizer: needed unless `data` are tokens.
        knots: of each spline.
        samples: vectors of each kind, at most.
        max_batches: batches to run over, at most.
        batch_size: sequences of texts in a batch.
        window: tokens per sequence of texts.
        epochs, learning_rate: as of `SplinePCA.fit`.
        of: "heads", a geometry for the values of each key head, or "layers", one for all values of a layer.
        key_k: numbers of a code of keys, of each key head before their rotation; None: keys have no geometry.
        sink_tokens: the first tokens of each sequence, which are left out.
        progress: show bars.

    Raises:
        CalibrationError: the data cannot be used, or are too few.
        ConfigError: `k`, or a setting, cannot be; `k` is refused before the model runs.
        PatchStateError: the model is patched.
        NotMLAError: it has no attention layer that is known.

    Examples:
        >>> geometry = fit_geometry(model, texts, 16, tokenizer=tokenizer)
        >>> geometry.save("geometry.safetensors")
        >>> ModelGeometry.load("geometry.safetensors", model).k
        16
    """
    sites = [site for site in find_sites(model) if site.stores_latent]
    sizes = [site.kv_lora_rank * (max(site.kv_heads, 1) if of == "layers" else 1) for site in sites]
    if k > min(sizes):
        raise ConfigError(f"`k` is {k}, above the {min(sizes)} numbers of a vector.")
    SplinePCA(k, knots)  # refuses what cannot be before the model runs
    _require_keys(sites, key_k, of)
    batches = as_batches(data, tokenizer, max_batches * batch_size * window, window, Media.of(model))
    if all(len(batch["input_ids"]) == 1 and len(batch) == 1 for batch in batches):
        batches = _together([batch["input_ids"] for batch in batches], batch_size)
    fingerprint = model_fingerprint(model, sites)
    drawing: dict[str, Any] = {
        "max_samples": samples,
        "max_batches": max_batches,
        "sink_tokens": sink_tokens,
        "progress": progress,
    }
    fitting: dict[str, Any] = {"knots": knots, "epochs": epochs, "learning_rate": learning_rate, "progress": progress}
    if key_k is None:
        return ModelGeometry.fit(collect_vectors(model, batches, of=of, **drawing), k, fingerprint, **fitting)
    drawn = collect_samples(model, batches, with_keys=True, **drawing)
    sampled_keys = {part: sample.keys for part, sample in drawn.items() if sample.keys is not None}
    of_keys, _ = fit_key_geometries(sampled_keys, key_k, **fitting)
    vectors = {part: sample.vectors for part, sample in drawn.items()}
    return ModelGeometry.fit(vectors, k, fingerprint, keys=of_keys, **fitting)


def _require_keys(sites: Sequence[AttentionSite], key_k: int | None, of: str) -> None:
    """Refuse geometries of keys that cannot be, before the model runs."""
    if key_k is None:
        return
    latent = next((site for site in sites if not site.kv_heads), None)
    if latent is not None:
        raise ConfigError(
            f"`key_k` is for ordinary attention, and {latent.name} ({type(latent.module).__name__}) stores a latent."
        )
    if of != "heads":
        raise ConfigError(f'`key_k` goes with of="heads"; `of` is {of!r}.')
    small = min(sites, key=lambda site: site.qk_rope_head_dim)
    if not 1 <= key_k <= small.qk_rope_head_dim:
        raise ConfigError(f"`key_k` is {key_k}; the keys of {small.name} have {small.qk_rope_head_dim} numbers.")


def _together(rows: list[torch.Tensor], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Sequences [1, T] as batches of several, where they are of one length."""
    if len({row.shape[1] for row in rows}) > 1:
        return [{"input_ids": row} for row in rows]
    return [{"input_ids": part} for part in torch.cat(rows).split(batch_size)]


def is_model_geometry(path: str | Path) -> bool:
    """Whether a file says that `ModelGeometry.save` wrote it."""
    return is_geometry_file(path, _FORMAT)
