"""Transforms of functions of ShardedTensors: gradients, vmap, remat, scan, shard_map, plans."""
