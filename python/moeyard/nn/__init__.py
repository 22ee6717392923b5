"""Layers above the ops: router, experts, MoE layer, losses, message passing. Sees `ops` only."""
