"""Where the tensors of a node live and how fast they move: the only place that knows blocks, kernels, torch.compile and C++."""
