"""Time to the first token and throughput of vLLM with Stem, beside vLLM's own attention."""
