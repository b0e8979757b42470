"""GPT-2 with Multi-head Latent Attention, to be trained from scratch, with a splice built in or without.

Importing this sub-package makes the model known to `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`; importing
`kvsplice_hf` alone does not. The last four names are those of the research that KVSplice comes from.

The rooms:

- `configuration`: the settings;
- `attention`, `mlp`, `modeling`: the two halves of a block, and the models;
- `reciprocal`: heads that also attend with the roles of queries and keys exchanged;
- `splicing`: the splice that is built in;
- `conversion`: a start from a trained GPT-2.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvsplice_hf.gpt2_mla.configuration import GPT2MLAConfig
from kvsplice_hf.gpt2_mla.modeling import (
    GPT2_MLA_KV,
    GPT2MLAAttention,
    GPT2MLAForCausalLM,
    GPT2MLAModel,
    GPT2MLAPreTrainedModel,
)


AutoConfig.register(GPT2MLAConfig.model_type, GPT2MLAConfig, exist_ok=True)
AutoModel.register(GPT2MLAConfig, GPT2MLAModel, exist_ok=True)
AutoModelForCausalLM.register(GPT2MLAConfig, GPT2MLAForCausalLM, exist_ok=True)

MLA_Config = GPT2MLAConfig
MLA_Flash = GPT2MLAAttention
GPT2_MLA = GPT2MLAForCausalLM

__all__ = [
    "GPT2MLAAttention",
    "GPT2MLAConfig",
    "GPT2MLAForCausalLM",
    "GPT2MLAModel",
    "GPT2MLAPreTrainedModel",
    "GPT2_MLA",
    "GPT2_MLA_KV",
    "MLA_Config",
    "MLA_Flash",
]
