"""What leaves the house: a model as a folder, a GGUF file, a repository of the hub."""
