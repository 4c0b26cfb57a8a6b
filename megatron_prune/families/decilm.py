"""Llama with layers of different FFN widths, for transformers and vLLM.

megatron-prune writes this file beside the config.json of such a model, never runs it, and names it
there in ``auto_map``; it is run by those who ask for it (``trust_remote_code=True``,
``--trust-remote-code``) and needs transformers alone. vLLM takes only the configuration from here.
"""

from copy import copy
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class Block(dict[str, Any]):
    """A JSON object whose keys read as attributes, as serving engines ask for them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """LlamaConfig, and ``block_configs``: one entry a layer, of which the FFN width counts."""

    model_type = "nemotron-nas"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs" and value is not None:
            value = [Block({part: Block(x) for part, x in block.items()}) for block in value]
        super().__setattr__(name, value)


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama, each layer's MLP of its own width."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs):
            own = copy(config)
            own.intermediate_size = _width(block.ffn, config.hidden_size)
            layer.mlp = LlamaMLP(own)


def _width(ffn: Block, hidden_size: int) -> Any:
    if "ffn_mult" not in ffn:
        return ffn.intermediate_size
    return -(-int(2 * ffn.ffn_mult * hidden_size / 3) // 256) * 256
