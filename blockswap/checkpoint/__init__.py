"""What a model file's header says, without loading a weight."""
