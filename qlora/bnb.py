"""bitsandbytes, imported without its advice.

On AVX512-BF16 hosts bitsandbytes 0.50 tells whoever imports it first to install ``kernels``, a package
that would then ask the hub. The logger is given its level back: nothing global is changed.
"""

import logging

_chatty = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _chatty.level
_chatty.setLevel(logging.CRITICAL)
try:
    import bitsandbytes as bnb
finally:
    _chatty.setLevel(_level)

__all__ = ["bnb"]
