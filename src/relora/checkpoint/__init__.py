"""Checkpoints that survive a kill, and exports that stock transformers loads; safetensors and JSON only."""
