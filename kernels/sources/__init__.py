"""What do the device kernels look like? Raw Triton functions; importing a module of this folder imports Triton."""
