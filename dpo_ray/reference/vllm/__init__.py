"""vLLM as a scorer and a sampler; the only folder that imports it."""
