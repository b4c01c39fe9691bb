"""vLLM as a scorer and a sampler; no other folder imports vLLM."""
