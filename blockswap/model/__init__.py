"""What is swapped: a model's blocks, their tensors and bytes."""
