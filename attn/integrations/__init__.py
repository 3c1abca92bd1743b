"""Other libraries' models on these kernels: one file a library, imported only on request."""
