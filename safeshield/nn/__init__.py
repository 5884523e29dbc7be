"""Networks, each written once: they run on tensors (training) and on NumPy arrays (deployment).

What a shield runs loads no PyTorch: `nn.arrays` holds the few operations that differ.
"""
