"""The elementwise part of the routed MLP's backward pass, in plain `jax.numpy`.

F hidden width; N rows, or any leading axes.
"""

import jax
import jax.numpy as jnp


def swiglu_gradient(
    gated: jax.Array, up: jax.Array, from_output: jax.Array, row_gate: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""Of $g \cdot (\mathrm{SiLU}(a) \odot b)$ with row gate g, given $W^{down} \partial y$.

    Args:
      gated, up: (N, F) float32, a and b.
      from_output: (N, F) float32, the output's gradient through the down product.
      row_gate: (N, 1) float32.

    Returns:
      Gradients of a and b, the gated activation, and (N, F) terms whose sum over F is the gate's gradient; float32.
    """
    sigmoid = jax.nn.sigmoid(gated)
    silu = gated * sigmoid
    activation = silu * up
    activation_gradient = row_gate * from_output
    gated_gradient = activation_gradient * up * (sigmoid * (1 + gated * (1 - sigmoid)))
    return gated_gradient, activation_gradient * silu, row_gate * activation, activation * from_output


def hidden_gradient(
    hidden: jax.Array, from_output: jax.Array, row_gate: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the saved (N, 2F) products: the (N, F) gated activation, the products' gradient, the gate's (N,) gradient.

    Args:
      hidden: (N, 2F), the gate half first.
      from_output: (N, F).
      row_gate: (N,) float32.
    """
    gated, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    gated_gradient, up_gradient, weighted, terms = swiglu_gradient(
        gated, up, from_output.astype(jnp.float32), row_gate[..., None]
    )
    gradient = jnp.concatenate([gated_gradient, up_gradient], axis=-1)
    return weighted.astype(hidden.dtype), gradient.astype(hidden.dtype), jnp.sum(terms, axis=-1)
