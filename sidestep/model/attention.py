"""Attention processors for diffusers' ACE-Step decoder.

B batch, L condition rows.
"""

from diffusers.models.transformers.ace_step_transformer import AceStepAttnProcessor2_0, AceStepTransformer1DModel
from torch import Tensor


class MaskedCrossAttention(AceStepAttnProcessor2_0):
    """Cross-attention that leaves out the padding rows of shorter prompts.

    The model itself has no padding mask and would attend to them. `mask_B11L` holds for the next forward pass and its
    backward pass; None means that every row counts. One instance serves all blocks of a decoder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask_B11L: Tensor | None = None

    def set_rows(self, rows_BL: Tensor | None) -> None:
        """Say which condition rows count in the next pass."""
        self.mask_B11L = None if rows_BL is None else rows_BL[:, None, None, :]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        """Attend from the latents to the condition rows that count."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask_B11L, image_rotary_emb)


def mask_cross_attention(decoder: AceStepTransformer1DModel) -> MaskedCrossAttention:
    """Give every cross-attention of the decoder one shared masking processor and return it."""
    processor = MaskedCrossAttention()
    for block in decoder.layers:
        block.cross_attn.set_processor(processor)
    return processor
