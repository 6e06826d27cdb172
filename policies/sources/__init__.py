"""Where checkpoints come from: folders and files of several formats, memory, the hub."""
