"""Networks. The same code runs on tensors in training and on NumPy arrays in deployment.

The networks of a deployed shield do not load PyTorch. `nn.arrays` contains the operations that
differ between arrays and tensors.
"""
