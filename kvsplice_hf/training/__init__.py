"""Fine-tuning of the splice alone, or of a reduced latent, with the `Trainer` of transformers."""

from kvsplice_hf.training.healing import heal
from kvsplice_hf.training.parameters import freeze_all_but_kvsplice, print_trainable_parameters
from kvsplice_hf.training.trainer import KVSpliceTrainer, KVSpliceTrainingArguments


__all__ = [
    "KVSpliceTrainer",
    "KVSpliceTrainingArguments",
    "freeze_all_but_kvsplice",
    "heal",
    "print_trainable_parameters",
]
