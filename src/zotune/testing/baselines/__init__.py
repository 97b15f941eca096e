"""What zotune is measured against: the peers' own procedures, written from their descriptions.

* `zotune.testing.baselines.official`: a step of MeZO and of LOZO as their released trainers take it.
* `zotune.testing.baselines.lora_slots`: through stock vLLM, with two adapter slots that are rewritten in place.
* `zotune.testing.baselines.public_api`: through vLLM's public interface alone, with an adapter file per state.
* `zotune.testing.baselines.first_order`: AdamW by backpropagation, of every parameter or of LoRA matrices.
"""

from zotune.testing.baselines.official import OfficialLozo, OfficialMezo

__all__ = ["OfficialLozo", "OfficialMezo"]
