"""transformers: finding groups of linears, swapping modules, loading through `from_pretrained`, sessions at run time."""
