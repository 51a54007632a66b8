"""Check of the GPU path without a GPU: compile for cards that are not there, and read what the programs would do."""
