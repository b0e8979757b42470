"""Model shapes for benchmarks: published geometries with few layers and random weights, so nothing is downloaded.

Three changes keep a few layers on a small machine true to a decode step of the whole model. As many routed experts run
per token as published, but fewer are there to choose from, which costs the same time at batch 1 and a fraction of the
memory. (From batch 2 on, fewer different experts are read than of the whole set; `bandwidth.weight_bytes` counts those
that are.) One layer has a dense MLP where the published model has any. And the vocabulary is cut in proportion to the
layers, or the output head would outweigh the few layers before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from kvsplice_hf.errors import ConfigError


# Positions of the models whose sizes are written out here.
_POSITIONS = {"max_position_embeddings": 1 << 17}


@dataclass(frozen=True)
class Geometry:
    """A published model shape.

    Args:
        family: the classes of transformers are `<family>Config` and `<family>ForCausalLM`.
        sizes: what differs from the default values of the configuration class.
        published_layers: layers of the whole model; None: the default of the configuration class.
    """

    family: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    published_layers: int | None = None

    def config(self, layers: int, whole_vocabulary: bool = False) -> PreTrainedConfig:
        """The configuration of a model with so many layers.

        Raises:
            ConfigError: the installed transformers does not have this family.
        """
        make = self._class("Config")
        published = make(**self.sizes)
        sizes = {**self.sizes, "num_hidden_layers": layers}
        if not whole_vocabulary:
            sizes["vocab_size"] = (
                published.vocab_size * layers // (self.published_layers or published.num_hidden_layers)
            )
        return make(**sizes)

    def build(self, config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """A model of that configuration, always with the same random weights."""
        torch.manual_seed(0)
        with torch.device(device):
            # In its dtype from the start: V3 in fp32 first would take twice the memory.
            return self._class("ForCausalLM")._from_config(config, dtype=dtype).eval()

    def _class(self, suffix: str) -> Any:
        try:
            return getattr(transformers, self.family + suffix)
        except AttributeError:
            raise ConfigError(
                f"transformers {transformers.__version__} has no {self.family}{suffix}; a newer one may."
            ) from None


_V2_LITE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 8,  # of 64
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
    **_POSITIONS,
}
GEOMETRIES = {
    "v2-lite": Geometry("DeepseekV2", _V2_LITE, published_layers=27),
    "v3": Geometry(
        "DeepseekV3",
        {
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 10,  # of 256
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            # The published eight groups, of which four are searched, choose among 256.
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,  # of 3 in 61 layers
            "vocab_size": 129280,
            **_POSITIONS,
        },
        published_layers=61,
    ),
    # Sizes of the next two are the default values of the configuration classes in transformers 5.23.0, not of files on
    # the hub. Glm4MoeLiteConfig: 47 layers, hidden 2048, 20 heads, q_lora_rank 768, R 512, P 64, N 192, V 256, 4 of 64
    # experts of 1536. That these are the sizes of GLM-4.7-Flash the class does not say (it names GLM-4.5, which is no
    # MLA model). Mistral4Config, for Mistral-Small-4-119B-2603: 36 layers, hidden 4096, 32 heads, q_lora_rank 1024,
    # R 256, P 64, N 64, V 128, 4 of 128 experts of 2048.
    "glm-4.7-flash": Geometry("Glm4MoeLite", {"n_routed_experts": 8}),
    "mistral-4": Geometry("Mistral4", {"n_routed_experts": 8}),
    # What kvsplice_hf.demo makes of SmolLM2-135M: R is 2 * 3 * 64 numbers of keys and values less the 64 that rotate,
    # and one constant channel.
    "smollm2-mla": Geometry(
        "DeepseekV3",
        {
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 9,
            "kv_lora_rank": 321,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "intermediate_size": 1536,
            "first_k_dense_replace": 30,
            "rope_interleave": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
            **_POSITIONS,
        },
        published_layers=30,
    ),
    # Ordinary attention, with grouped queries.
    "smollm2": Geometry(
        "Llama",
        {
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
            **_POSITIONS,
        },
        published_layers=30,
    ),
    "llama-3.1-8b": Geometry(
        "Llama",
        {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            **_POSITIONS,
        },
        published_layers=32,
    ),
    # For trying things out: the attention of V2-Lite on narrow layers.
    "mini": Geometry(
        "DeepseekV2",
        {
            **_V2_LITE,
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "vocab_size": 8192,
        },
        published_layers=27,
    ),
}
