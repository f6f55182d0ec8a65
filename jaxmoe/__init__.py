"""jaxmoe: scaling studies of Mixture-of-Experts language models in JAX.

Import the part you need: `jaxmoe.layers`, `jaxmoe.models`, `jaxmoe.accounting`, `jaxmoe.data`,
`jaxmoe.training`, `jaxmoe.evaluation`, `jaxmoe.scaling`.
"""

from jaxmoe.version import __version__

__all__ = ["__version__"]
