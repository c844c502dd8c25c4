"""CODIS vision-language pre-training in JAX/Flax (Duan et al., CVPR 2022). The README maps paper to files."""
