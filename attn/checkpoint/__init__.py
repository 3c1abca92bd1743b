"""Hugging Face checkpoint directories (config.json and safetensors) as the reference models.

load        the calls: each tensor to its place      files       what a directory holds
families    which model_type is which family         family      how a family is stored
encoders, decoders, pairs   the families             ropes       the rotary options of decoders
"""

from .load import from_tensors, load_checkpoint

__all__ = ["from_tensors", "load_checkpoint"]
