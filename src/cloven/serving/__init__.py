"""The OpenAI-compatible endpoint: transformers' own handlers over a protected model that is loaded already."""
