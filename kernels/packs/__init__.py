"""Which kernels come compiled, for GPUs without a compiler beside them? One file for each compute capability."""
