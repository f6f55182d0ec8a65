"""The routed SwiGLU MLP in one call: `api.moe_mlp`."""
