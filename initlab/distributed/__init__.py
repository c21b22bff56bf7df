"""Tensors that are spread over ranks: what this rank holds, small collectives over meshes, and norms over them."""
