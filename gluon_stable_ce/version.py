"""The version of the package, which the file name of the fused kernel's library has in it too."""

__version__ = '0.3.0'
