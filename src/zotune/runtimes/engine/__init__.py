"""The vLLM runtime: stock vLLM with zotune's worker, scored by packed forwards."""
