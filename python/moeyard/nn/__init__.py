"""Layers above the ops: router, experts, MoE layer, losses, message passing. Sees `ops` only."""

from moeyard.nn.expert_optimizer import ExpertOptimizer, expert_parameters
from moeyard.nn.experts import Experts
from moeyard.nn.losses import (
    importance_loss,
    router_z_loss,
    routing_entropy,
    squared_deviation,
    switch_load_balancing,
)
from moeyard.nn.message_passing import Edges, RadialBasis, RadialInteraction, VectorReadout, edges_of
from moeyard.nn.moe import MoE, MoEOutput
from moeyard.nn.router import Router
from moeyard.nn.usage import collapse_warnings, expert_usage
from moeyard.ops.expert_ffn import expert_ffn

__all__ = [
    "Edges",
    "ExpertOptimizer",
    "Experts",
    "MoE",
    "MoEOutput",
    "RadialBasis",
    "RadialInteraction",
    "Router",
    "VectorReadout",
    "collapse_warnings",
    "edges_of",
    "expert_ffn",
    "expert_parameters",
    "expert_usage",
    "importance_loss",
    "router_z_loss",
    "routing_entropy",
    "squared_deviation",
    "switch_load_balancing",
]
