"""All communication between processes, which share the data and have the same φ and θ."""

from equigrad.parallel.fully_sharded import is_fully_sharded
from equigrad.parallel.ranks import ALONE, Ranks
from equigrad.parallel.shards import Layout, OnShards, mesh_of, meshes, whole
from equigrad.parallel.wrappers import (
    data_parallel,
    group_of,
    is_data_parallel,
    is_group,
    processes,
)

__all__ = [
    "ALONE",
    "Layout",
    "OnShards",
    "Ranks",
    "data_parallel",
    "group_of",
    "is_data_parallel",
    "is_fully_sharded",
    "is_group",
    "mesh_of",
    "meshes",
    "processes",
    "whole",
]
