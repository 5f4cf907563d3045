"""Measurements of whole MoE layers and of their grouped matmuls."""
