"""The embedded runtime: a Hugging Face model in this process, its modules wrapped in place."""

from zotune.runtimes.embedded.runtime import EmbeddedRuntime, digest, fingerprint, twin

__all__ = ["EmbeddedRuntime", "digest", "fingerprint", "twin"]
