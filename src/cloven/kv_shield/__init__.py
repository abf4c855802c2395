"""KV-Shield: the accelerator never holds the true KV cache; a small trusted process, the enclave, holds the keys."""
