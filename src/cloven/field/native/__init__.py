"""C++ kernels with a plain C interface: optional, built at installation where there is a compiler."""
