"""A small random DeepSeek-V3 with a tokenizer and a splice, for programs that start engines and were given no model.

Its rows have the sizes of the published models (R = 512, P = 64), everything else is small. Being random, it writes
nothing of meaning; what its cache holds, and what is stored and read of it, is as in a trained one.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from kvsplice_hf import KVSpliceCalibrator, KVSpliceConfig, patch_model_with_kvsplice, save_kvsplice


# Tokens before it are begin, end and unknown; the others are words.
FIRST_WORD = 3
STOCK_ROW_BYTES = 2 * (512 + 64)
SMALL_SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.08,
}


def save_word_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer whose words are `t3 t4 t5 ...`, one for each id of a vocabulary, separated by spaces."""
    # Special tokens are looked for inside words as well, so none may be the beginning of one.
    special = {"bos_token": "<begin>", "eos_token": "<end>", "unk_token": "<unknown>"}
    names = [*special.values(), *(f"t{index}" for index in range(FIRST_WORD, vocabulary))]
    words = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=special["unk_token"])
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False, **special)
    tokenizer.save_pretrained(folder)


def save_small_model(folder: Path, layers: int, positions: int) -> None:
    """Save the model and its tokenizer, the same for the same sizes.

    Args:
        folder: where to.
        layers: of the model, none with experts.
        positions: how many tokens a sequence may have.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = SMALL_SHAPE | {"num_hidden_layers": layers, "first_k_dense_replace": layers}
        config = DeepseekV3Config(**settings, max_position_embeddings=positions)
        DeepseekV3ForCausalLM(config).bfloat16().eval().save_pretrained(folder)
    save_word_tokenizer(folder, SMALL_SHAPE["vocab_size"])


def save_small_splice(model_folder: Path, folder: Path, bytes_per_token: float, sink_tokens: int) -> int:
    """Save a splice of a small model, calibrated on random words; all its layers have rows of the same size.

    Args:
        model_folder: of `save_small_model`.
        folder: where to.
        bytes_per_token: of a row.
        sink_tokens: exact first tokens of a sequence.

    Returns:
        Bytes of a row of a layer.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    random = torch.Generator("cpu").manual_seed(0)
    words = FIRST_WORD, SMALL_SHAPE["vocab_size"]
    ids = torch.randint(*words, (40, 64), generator=random, dtype=torch.int64, device="cpu")
    calibration = KVSpliceCalibrator(model, sink_tokens=sink_tokens).collect(list(ids))
    config = KVSpliceConfig(bytes_per_token=bytes_per_token, sink_tokens=sink_tokens, allocation="layer")
    patch_model_with_kvsplice(model, config, calibration=calibration)
    save_kvsplice(model, folder)
    return int(model.model.layers[0].self_attn.kvsplice.codec.row_bytes)
