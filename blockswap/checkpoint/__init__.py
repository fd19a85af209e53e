"""What is read from a model file's header, without loading a weight."""
