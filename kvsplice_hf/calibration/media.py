"""Images, videos and sound in calibration batches of models that read them beside text.

A prompt holds placeholders, one for each part of an image, and the batch holds the image itself under the names that
the model's forward takes (`pixel_values`, `image_grid_thw`, ...). Placeholders without their image would be counted as
if the model had seen one, so they are refused.

Legend: `B` batch, `T` tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvsplice_hf import upstream
from kvsplice_hf.calibration.items import as_plain, is_missing
from kvsplice_hf.errors import CalibrationError


# What a batch of text holds.
OF_TEXT = frozenset(("input_ids", "attention_mask"))
# What a forward takes that is no image, video or sound, nor tells how one lies in the prompt.
_NOT_MEDIA = frozenset(
    (*upstream.CACHE_NAMES, "input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels")
    + ("use_cache", "cache_position", "logits_to_keep", "output_attentions", "output_hidden_states", "return_dict")
    + ("output_router_logits", "mm_encoder_outputs")
)
_PLACEHOLDERS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))
# Names under which processors hand over images, videos and sound.
_FEATURES = ("pixel_values", "input_features")


@dataclass(frozen=True)
class Media:
    """What a model takes of images, videos and sound.

    Attributes:
        placeholders: ids of the tokens that stand for their parts.
        inputs: arguments of the model's forward for them.
    """

    placeholders: tuple[int, ...] = ()
    inputs: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: Any) -> "Media":
        """Of a model; nothing for one of text alone."""
        config = getattr(model, "config", None)
        found = {getattr(config, name, None) for name in _PLACEHOLDERS}
        ids = tuple(sorted(value for value in found if isinstance(value, int)))
        return cls(ids, frozenset(upstream.forward_parameters(model)) - _NOT_MEDIA) if ids else cls()

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of the tokens [B, T] stand for a part of an image, bool [B, T]."""
        wanted = torch.tensor(self.placeholders, dtype=ids.dtype, device=ids.device)
        return torch.isin(ids, wanted)

    def predicted(self, ids: torch.Tensor) -> torch.Tensor:
        """Behind which of the tokens [B, T] the model's prediction is of use: not where a part of an image follows."""
        places = self.places(ids)
        return torch.cat([~places[:, 1:], torch.ones_like(places[:, :1])], dim=1)

    def of_row(self, row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors of a mapping that belong to its images.

        Raises:
            CalibrationError: one of them is no tensor; or images that the model does not take.
        """
        given = {name: value for name, value in row.items() if isinstance(name, str) and not is_missing(value)}
        foreign = [name for name in given if name.startswith(_FEATURES) and name not in self.inputs]
        if foreign:
            raise CalibrationError(
                f"Calibration data hold {', '.join(foreign)}, and the model takes no such argument"
                f"{f': it takes {sorted(self.inputs)}' if self.inputs else ', nor any image'}. Calibrate the whole "
                "model of images and text, on what its own processor returns."
            )
        found = {name: as_plain(value) for name, value in given.items() if name in self.inputs}
        odd = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise CalibrationError(
                f"Calibration data hold {odd[0]} as a {type(found[odd[0]]).__name__}; it must be a tensor. Call the "
                'processor with return_tensors="pt".'
            )
        return found

    def checked(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch with its images; of text alone, without what would tell where images are.

        Args:
            batch: `input_ids` [B, T], and perhaps `attention_mask` and the tensors of images.

        Raises:
            CalibrationError: there is a placeholder, and nothing that could be an image.
        """
        if any(tensor.is_floating_point() for tensor in batch.values()):
            return batch
        count = int(self.places(batch["input_ids"]).sum())
        if count:
            raise CalibrationError(
                f"Calibration tokens hold {count} placeholders of images (token ids {self.placeholders}), but no "
                "images. Give all that the processor returns (pixel_values and what goes with them), or text without "
                "images."
            )
        return {name: tensor for name, tensor in batch.items() if name in OF_TEXT}
