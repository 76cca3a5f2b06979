"""Optimizers with 8-bit state, as optax transformations."""

from jaxquant.optim.blocks import Blocks, is_blocks
from jaxquant.optim.optimizers import adam8bit, adamw8bit, lion8bit, momentum8bit
from jaxquant.optim.quantize_state import quantize_state
from jaxquant.optim.spec import StateSpec

__all__ = [
    "Blocks",
    "StateSpec",
    "adam8bit",
    "adamw8bit",
    "is_blocks",
    "lion8bit",
    "momentum8bit",
    "quantize_state",
]
