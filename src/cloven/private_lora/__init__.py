"""Private LoRA: the adapter stays at the server, the input with the client; arXiv 2501.01672."""
