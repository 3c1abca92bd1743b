"""Hugging Face checkpoint directories (config.json and safetensors) as the reference models.

load        the call: files, tensors, and where each goes      family      how a kind of model is stored
families    which model_type is which family                   encoders, decoders, pairs    the families
"""

from .load import load_checkpoint

__all__ = ["load_checkpoint"]
