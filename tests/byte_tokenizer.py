"""A tokenizer of single bytes, and a tiny MLA model that has learnt some English by bytes. Nothing is downloaded."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from kvsplice_hf.text import load_texts, token_windows


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@functools.cache
def trained_model(steps: int = 150) -> DeepseekV3ForCausalLM:
    """A dense two-layer MLA model, trained for a few seconds on the calibration half of pydoc. Do not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DeepseekV3Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            first_k_dense_replace=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            max_position_embeddings=512,
            eos_token_id=None,
            bos_token_id=None,
        )
        model = DeepseekV3ForCausalLM(config)
        windows = token_windows(byte_tokenizer(), load_texts("pydoc", "calibration"), 64)
        optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        for _ in range(steps):
            batch = windows[torch.randint(len(windows), (32,))]
            model(batch, labels=batch, use_cache=False).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return model.eval()
