"""Times: kernels and layers, training steps, generation, the CPU, the data path."""
