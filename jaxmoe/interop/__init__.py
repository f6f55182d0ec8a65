"""Models from and to other software: `jaxmoe.interop.huggingface`."""
