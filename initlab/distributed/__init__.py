"""Tensors that are spread over ranks: what this rank holds of them, small collectives, and one norm for all.

Nothing here is public API but what `initlab` exports; every module is imported by its name.

- dtensors.py: what kind of tensor it is, asked once for each call, and its local part.
- shards.py: which regions of the logical tensor a rank holds of a DTensor, and what to draw into them.
- intervals.py: the arithmetic behind it: sharding one dimension, without torch.
- fsdp.py: FSDP modules whose parameters are not where the logical tensors are.
- groups.py: the groups of ranks that collectives run over: dimensions of meshes, pipeline stages, arguments of callers.
- collectives.py: all_reduce, all_gather and all_gather_object over them.
- agreement.py: whether all ranks mean the same, and an error that lists where they do not.
- flags.py: all_reduce_flags_, non-finite flags of several ranks or-ed.
- norm.py: MeshTensors, the norm of plain tensors and DTensors together, and scaling them.

torch.distributed.tensor is looked up among the modules already imported: where nobody has imported it, there is no
DTensor, and `import initlab` does not pay for it.
"""
