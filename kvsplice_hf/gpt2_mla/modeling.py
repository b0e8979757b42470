"""GPT-2 with Multi-head Latent Attention: queries at full size, keys and values from one small latent per token.

MLP and initialisation are those of transformers' GPT-2.

Legend: `B` batch, `T` new tokens, `S` cached tokens, `D` n_embd, `H` heads, `R` kv_lora_rank, `P` qk_rope_head_dim,
`N` qk_nope_head_dim, `V` v_head_dim.
"""

import copy
import math
from typing import Any, Self

import torch
from torch import nn
from transformers import GenerationMixin, GPT2LMHeadModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from kvsplice_hf.code.projection import LearnedKVSplice
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.gpt2_mla.attention import Angles, GPT2MLAAttention, SeparateExpansion, rotary_angles
from kvsplice_hf.gpt2_mla.configuration import GPT2MLAConfig
from kvsplice_hf.gpt2_mla.conversion import convert_gpt2
from kvsplice_hf.gpt2_mla.mlp import mlp_of
from kvsplice_hf.gpt2_mla.reciprocal import ReciprocalMix
from kvsplice_hf.gpt2_mla.splicing import build_in_splice, has_built_in_splice
from kvsplice_hf.upstream import cache_argument, cache_of, causal_mask, given_cache, output_with_cache


class GPT2MLABlock(GradientCheckpointingLayer):
    """A GPT-2 block (norm before attention and MLP) with Multi-head Latent Attention."""

    def __init__(self, config: GPT2MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2MLAAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = mlp_of(config)
        reciprocal = config.fed_by_attention()
        # What attention gives is small at first, and of another size in each layer.
        self.ln_attention = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon) if reciprocal else None

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Hidden states [B, T, D] after the block; `kwargs` are those of the attention."""
        attended = self.attn(self.ln_1(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + attended
        if self.ln_attention is None:
            return hidden_states + self.mlp(self.ln_2(hidden_states))
        return hidden_states + self.mlp(self.ln_2(hidden_states), self.ln_attention(attended))


class GPT2MLAPreTrainedModel(GPT2PreTrainedModel):
    """What the models have in common: GPT-2's flags and initialisation, and a splice that is saved with the model."""

    config: GPT2MLAConfig  # type: ignore[assignment]  # not a GPT2Config, but all that is read of one
    _no_split_modules = ["GPT2MLABlock"]
    _can_record_outputs = {"hidden_states": GPT2MLABlock, "attentions": GPT2MLAAttention}
    _keys_to_ignore_on_load_unexpected = []
    _input_embed_layer = "wte"

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not in the sense of transformers, which does not let custom code initialise modules without parameters of
        their own, and so would leave out GPT-2's scaling of residual projections."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GPT2MLAAttention):
            # As GPT-2 does for what is added to the residual stream: twice per layer.
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            initialization.normal_(module.o_proj.weight, mean=0.0, std=std)
        elif isinstance(module, ReciprocalMix) and module.gate is not None:
            initialization.zeros_(module.gate)
        elif isinstance(module, SeparateExpansion):
            initialization.normal_(module.key_weight, mean=0.0, std=self.config.initializer_range)
            initialization.normal_(module.value_weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, LearnedKVSplice):
            basis = initialization.orthogonal_(torch.empty(module.latent_dim, module.rank))
            initialization.copy_(module.compress.weight, basis.T)
            initialization.copy_(module.expand.weight, basis)
            initialization.ones_(module.transform_scale)
            initialization.zeros_(module.transform_shift)

    def _build_in_splice(self) -> None:
        """To be called when all layers are there, before `post_init`."""
        splice = self.config.splice_config()
        if splice is not None:
            build_in_splice(self, splice)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a built-in splice is saved as the part of the model that it is.

        Raises:
            ConfigError: the settings have a built-in splice that the model no longer has.
        """
        if self.config.kvsplice is not None and not has_built_in_splice(self):
            raise ConfigError(
                f"`config.kvsplice` is {self.config.kvsplice}, but the built-in splice was taken off by "
                "unpatch_model. Set `model.config.kvsplice = None` to save the model without it."
            )
        return super().save_pretrained(*args, **kwargs)


class GPT2MLAModel(GPT2MLAPreTrainedModel):
    """The decoder without a head.

    Raises:
        ConfigError: the settings cannot be used.
    """

    def __init__(self, config: GPT2MLAConfig) -> None:
        config.validate_settings()
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.qk_rope_head_dim else nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2MLABlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._build_in_splice()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of `input_ids` [B, T] or `inputs_embeds` [B, T, D].

        The cache may be given as `cache` or as `past_key_values`; the output calls it as the installed release of
        transformers does.

        Raises:
            ValueError: both inputs are given, or neither; or two caches.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        cache = given_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], dtype=torch.int64, device=inputs_embeds.device)[None] + seen
            )
        mask = causal_mask(
            cache,
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        hidden_states, angles = self._embed(inputs_embeds, position_ids)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                use_cache=use_cache,
                position_ids=position_ids,
                position_embeddings=angles,
                **cache_argument(cache),  # under the name that gradient checkpointing looks for
                **kwargs,
            )
        hidden_states = self.ln_f(hidden_states)
        return output_with_cache(BaseModelOutputWithPast, cache if use_cache else None, last_hidden_state=hidden_states)

    def _embed(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, Angles | None]:
        """Input of the first block [B, T, D], and the angles by which keys and queries are rotated, if they are."""
        if self.wpe is not None:
            return self.drop(embeds + self.wpe(position_ids)), None
        angles = rotary_angles(position_ids, self.config.qk_rope_head_dim, self.config.rope_theta, embeds.dtype)
        return self.drop(embeds), angles


class GPT2MLAForCausalLM(GPT2MLAPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head, tied to the embeddings unless `tie_word_embeddings` is off.

    Raises:
        ConfigError: the settings cannot be used.

    Examples:
        >>> model = GPT2MLAForCausalLM(GPT2MLAConfig(n_layer=2, kvsplice={"compression_ratio": 0.5}))
        >>> model.generate(ids, max_new_tokens=8).shape  # on a cache of 128 coordinates per token and layer
        torch.Size([1, 35])
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2MLAConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2MLAModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._build_in_splice()
        self.post_init()

    @classmethod
    def from_gpt2(cls, model: GPT2LMHeadModel, kv_lora_rank: int = 256, calibration: Any = None) -> Self:
        """A start from a trained GPT-2, in closed form: see `conversion.convert_gpt2`.

        Returns:
            A new model on the device and in the dtype of `model`, sharing no memory with it.

        Raises:
            ConfigError: `model` is no GPT-2 that can be carried over, or the rank is out of its range.
            CalibrationError: the calibration tokens cannot be used.
        """
        config, state = convert_gpt2(model, kv_lora_rank, calibration)
        converted: Any = cls(config)
        # A built-in splice starts as it would from nothing.
        state |= {name: tensor for name, tensor in converted.state_dict().items() if ".kvsplice." in name}
        converted.load_state_dict(state)
        converted.generation_config = copy.deepcopy(model.generation_config)
        return converted.to(device=model.device, dtype=model.dtype).train(model.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of `input_ids` [B, T] or `inputs_embeds` [B, T, D], and the loss of `labels` [B, T].

        Labels are shifted here, and positions with -100 do not count. `logits_to_keep` leaves that many positions at
        the end (0: all), or those listed.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache_argument(given_cache(cache, past_key_values)),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return output_with_cache(
            CausalLMOutputWithPast,
            cache_of(outputs),
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GPT2_MLA_KV(GPT2MLAForCausalLM):
    """`GPT2MLAForCausalLM` with a splice built in, at half the latent where the settings do not say otherwise."""

    def __init__(self, config: GPT2MLAConfig) -> None:
        if config.kvsplice is None:
            config = copy.deepcopy(config)
            config.kvsplice = {"compression_ratio": 0.5}
        super().__init__(config)
